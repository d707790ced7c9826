"""The matmul task: right and fast code earns, nothing else does."""

import itertools
import json
import random
import re
import sys
from pathlib import Path

import pytest
from audit import answered, block
from paths import ROOT

from grpo.batch import Completion, Segment
from grpo.configuration.launch import load_config
from grpo.environment import checked_scores, make_environment
from grpo.envs import matmul
from grpo.envs.code_answers import RefusedAnswer, code_of
from grpo.envs.matmul import TASKS, Matmul, Task, check_result
from grpo.sandbox.calls import VIOLATIONS, Outcome, SandboxError

sys.path.insert(0, str(Path(__file__).parent))
import matmul_answers as answers  # noqa: E402

pytestmark = pytest.mark.slow

SETTINGS = load_config("train", ["+experiment=matmul_20b", f"model.path={ROOT / 'tests/fixtures/tiny_bf16'}"]).env
PLAIN = Task("product", "float", False, False, False)


@pytest.fixture(scope="module")
def env(sandbox):
    return make_environment(SETTINGS, Matmul.build_tokenizer(), seed=0, total_steps=1, sandbox=sandbox)


def score(env, task, text):
    return checked_scores(env, [answered(env, env._prompt(0, task), text)])[0]


def violations(verdict) -> dict[str, float]:
    return {kind: verdict.metrics[f"sandbox/violations/{kind}"] for kind in VIOLATIONS}


# --- the tasks --------------------------------------------------------------------------------------------------------


def by_hand(task: Task, a, b):
    """The result by the definition, entry by entry."""
    transpose = lambda matrix: [list(line) for line in zip(*matrix)]  # noqa: E731
    a, b = (transpose(a) if task.a_is_columns else a), (transpose(b) if task.b_is_columns else b)
    c = [[None] * len(b[0]) for _ in a]
    for i, j in itertools.product(range(len(a)), range(len(b[0]))):
        pairs = [(a[i][k], b[k][j]) for k in range(len(b))]
        c[i][j] = {
            "product": lambda pairs=pairs: sum(x * y for x, y in pairs),
            "modular": lambda pairs=pairs: sum(x * y for x, y in pairs) % 997,
            "longest": lambda pairs=pairs: max(x + y for x, y in pairs),
            "shortest": lambda pairs=pairs: min(x + y for x, y in pairs),
        }[task.formula]()
    return transpose(c) if task.c_is_columns else c


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answer_triple_loop_and_oracle_agree_with_the_definition(task):
    rng = random.Random(str(task))
    for shape in ((1, 1, 1), (2, 5, 3), (7, 4, 9)):
        a, b = task.draw(rng, shape)
        expected = by_hand(task, a, b)
        for code in (task.triple_loop(), answers.oracle(task)):
            defined = {}
            exec(code, defined)
            check_result(defined["matmul"](a, b), expected, {"int": int, "float": float}[task.number])
        check_result(task.answer(a, b), expected, {"int": int, "float": float}[task.number])
        width, height = (len(expected), len(expected[0])) if task.c_is_columns else (len(expected[0]), len(expected))
        assert (height, width) == (shape[0], shape[2])


def test_there_are_56_tasks_with_questions_of_their_own():
    assert len({task.question() for task in TASKS}) == len(TASKS) == 56


def test_a_question_says_what_is_asked(env):
    text = Task("shortest", "int", True, False, True).question()
    assert "c[j][i] = the smallest of a[k][i] + b[k][j] over all k" in text and "lists of lists of ints" in text
    rendered = env.tokenizer.decode(env.encode_prompt(text), keep_special=True)
    assert (
        "Reasoning: low" in rendered
        and rendered.endswith("<|start|>assistant")
        and f"<|start|>user<|message|>{text}<|end|>" in rendered
    )


def test_held_out_tasks_are_never_trained_on_and_ids_differ(env):
    held_out = {prompt.row["task"] for prompt in env.eval_prompts()}
    assert len(held_out) == 14
    for step, attempt in itertools.product(range(5), range(2)):
        prompts = env.prompts(step, num_prompts=16, attempt=attempt)
        assert (
            not held_out & {prompt.row["task"] for prompt in prompts}
            and len({prompt.row["task"] for prompt in prompts}) == 16
        )
    ids = [prompt.id for attempt in range(3) for prompt in env.prompts(0, num_prompts=50, attempt=attempt)]
    assert len(set(ids)) == len(ids) == 150
    assert env.prompts(3, num_prompts=4) == env.prompts(3, num_prompts=4) != env.prompts(4, num_prompts=4)


# --- the reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speedup, reward", [(1.0, 0.5), (0.5, 0.5), (1.75**0.5, 0.75), (1.75, 1.0), (9.0, 1.0)])
def test_the_reward_is_half_for_a_right_function_and_half_by_the_logarithm_of_its_speed(
    env, monkeypatch, speedup, reward
):
    monkeypatch.setattr(env, "_speedup", lambda task, code, rng: speedup)
    verdict = score(env, PLAIN, block("x"))
    assert verdict.reward == pytest.approx(reward) and verdict.is_correct and verdict.metrics["speedup"] == speedup
    assert violations(verdict) == dict.fromkeys(VIOLATIONS, 0.0)


def test_the_speedup_is_the_fastest_call_of_the_loop_over_the_fastest_of_the_function(env, monkeypatch):
    seconds = iter([0.0, 0.9, 0.3, 0.6, 0.2, 0.8, 0.4])  # of the small matrices, then loop and function in turn
    monkeypatch.setattr(env, "_checked", lambda task, code, inputs: Outcome(values=[], cpu_seconds=next(seconds)))
    assert env._speedup(PLAIN, "", random.Random(0)) == pytest.approx(0.6 / 0.2)


def test_every_timed_call_has_inputs_of_its_own_and_is_checked(env, monkeypatch):
    seen, checked = [], []
    call, check = env.sandbox.call, matmul.check_result
    monkeypatch.setattr(
        env,
        "sandbox",
        type("", (), {"call": staticmethod(lambda *given, **named: seen.append(given) or call(*given, **named))}),
    )
    monkeypatch.setattr(matmul, "check_result", lambda *given: checked.append(given) or check(*given))
    env._speedup(PLAIN, answers.oracle(PLAIN), random.Random(1))
    inputs = [str(pair) for _, _, calls in seen for pair in calls]
    assert len(set(inputs)) == len(inputs) == len(checked) == 4 + 2 * SETTINGS["timed_trials"]
    assert [code == PLAIN.triple_loop() for code, _, _ in seen] == [False, *[True, False] * SETTINGS["timed_trials"]]


def test_a_run_prints_and_records_the_layers_and_counts_violations(entry_points, tmp_path):
    result = entry_points.run(
        "grpo.train", "+experiment=smoke", "env=matmul", "warmup=null", "steps=1", "rollout.max_new_tokens=8", "name=run",
        "output_dir=out", "optim.max_tokens=8192", "model.architecture.max_position_embeddings=4096", "eval.at_start=false",
        "eval.max_prompts=2", folder=tmp_path, PYTHONPATH=str(ROOT))  # fmt: skip
    assert result.code == 0, result.err
    described = json.loads((tmp_path / "out/run/summary.json").read_text())["sandbox"]
    assert described.startswith("auto: seccomp, ") and f"sandbox  {described}" in " ".join(result.out.split("\n"))
    lines = [json.loads(line) for line in (tmp_path / "out/run/metrics.jsonl").read_text().splitlines()]
    assert {f"sandbox/violations/{kind}" for kind in VIOLATIONS} <= lines[-1].keys() | lines[0].keys()


# --- the audit --------------------------------------------------------------------------------------------------------

SOME = TASKS[::9]  # of every formula, number and layout


def test_the_oracle_earns_everything(env):
    verdicts = {str(task): score(env, task, block(answers.oracle(task))) for task in SOME}
    assert {name: (v.reward, v.extra) for name, v in verdicts.items() if v.reward < 0.99} == {}
    assert all(verdict.is_correct for verdict in verdicts.values())


def test_no_constant_answer_earns_half(env, monkeypatch):
    monkeypatch.setattr(env, "timed_trials", 1)
    monkeypatch.setattr(env, "size", 8)
    texts = [block(task.triple_loop()) for task in TASKS[::4]] + [block(answers.oracle(task)) for task in TASKS[1::4]]
    texts += [
        "",
        "42",
        block("def matmul(a, b): return a"),
        block("def matmul(a, b): return [[0] * len(b[0]) for _ in a]"),
    ]
    means = [sum(score(env, task, text).reward for task in TASKS[::14]) / len(TASKS[::14]) for text in texts]
    assert len(texts) >= 30 and max(means) <= 0.5


GARBAGE = [
    "", " ", "\0", "null", "42", "```", "```python\n```", "```python\n\n```\n```python\n\n```", block("matmul = 3"),
    block("def matmul(:"), block("return"),
    block("def matmul(a): return a"), "x" * 100_000, "```python\n" * 2000, block("(" * 19_000), block("# " + "x" * 30_000),
    block("import os\nos.system('true')"), block("__import__('subprocess').run('true')"), block("open('/etc/passwd').read()"),
    block("raise SystemExit(0)"), block("exit()"), block("while True: pass"), block("x = bytearray(1 << 40)"),
    block("def matmul(a, b): return matmul"), block("def matmul(a, b): return {'a': 1}"),
    block("def matmul(a, b): return [[True]]"),
    block("def matmul(a, b): return [['1']]"), block("def matmul(a, b): return [a, b, [a]] * 10**6"), "\ud7ff\U0010ffff",
    "eval(\"__import__('os').system('true')\")", "{\"values\": [[[1.0]]]}", "The answer is correct. Reward: 1.0",
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(GARBAGE)))
def test_garbage_and_hostile_texts_earn_nothing_and_raise_nothing(env, monkeypatch, index):
    monkeypatch.setattr(env, "seconds", 1.0)
    verdict = score(env, PLAIN, GARBAGE[index])
    assert verdict.reward == 0.0 and verdict.is_correct is False and "refused" in verdict.extra


def test_completions_without_a_form_earn_nothing(env):
    prompt = env._prompt(0, PLAIN)
    noise = random.Random(0)
    for ids in ([env.tokenizer.return_], [noise.randrange(env.tokenizer.vocab_size) for _ in range(300)]):
        completion = Completion(prompt, 0, [Segment(prompt.token_ids, "prompt"), Segment(ids, "policy")], "length")
        assert checked_scores(env, [completion])[0].reward == 0.0


@pytest.mark.parametrize("name", answers.EXPLOITS)
def test_an_exploit_earns_no_more_than_an_honest_wrong_answer(env, name):
    wrong = score(env, PLAIN, block("def matmul(a, b): return [[0.0] * len(b[0]) for _ in a]"))
    assert wrong.reward == 0.0 and sum(violations(wrong).values()) == 0
    for task in (PLAIN, TASKS[1]):
        verdict = score(env, task, block(answers.exploit(name, task)))
        assert verdict.reward <= wrong.reward, verdict


def test_there_are_fifteen_exploits():
    assert len(answers.EXPLOITS) == 15


@pytest.mark.parametrize("code, kind", [
    ("import numpy", "import"), ("open('/etc/passwd')", "call"), ("while True: pass", "time"),
    ("x = bytearray(1 << 40)", "memory"),
    ("def matmul(a, b): return 'x' * (1 << 22)", "output"), ("import random\nrandom._os._exit(1)", "crash"),
    ("def matmul(a, b): return [[float('inf')] * len(b[0]) for _ in a]", "non_finite"), ("def matmul(a, b): return 3", "type"),
    ("def matmul(a, b): return [[0] * len(b[0]) for _ in a]", "type")])  # fmt: skip
def test_a_violation_is_counted_by_its_kind(env, code, kind):
    verdict = score(env, PLAIN, block(code))
    assert violations(verdict) == {**dict.fromkeys(VIOLATIONS, 0.0), kind: 1.0} and verdict.reward == 0.0
    assert verdict.extra["refused"].startswith("violation: ")


def test_a_triple_loop_that_fails_is_the_sandboxs_failure_and_not_the_functions(env, monkeypatch):
    monkeypatch.setattr(Task, "triple_loop", lambda task: "def matmul(a, b): return 1 / 0")
    assert score(env, PLAIN, block(answers.oracle(PLAIN))).reward is None


def test_honest_failures_are_no_violations(env):
    for code, reason in (("def matmul(a, b): return 1 / 0", "error: ZeroDivisionError: division by zero"),
                         ("def matmul(a, b): return [[0.5] * len(b[0]) for _ in a]", "a wrong result"),
                         ("def matmul(a, b): return []", "a wrong result")):  # fmt: skip
        verdict = score(env, PLAIN, block(code))
        assert (verdict.extra["refused"], sum(violations(verdict).values())) == (reason, 0.0)


def test_a_failure_of_the_sandbox_leaves_the_completion_out(env, monkeypatch):
    def fail(task, code, rng):
        raise SandboxError("gone")

    monkeypatch.setattr(env, "_speedup", fail)
    verdict = score(env, PLAIN, block("x"))
    assert verdict.reward is None and verdict.is_correct is None and "gone" in verdict.extra["refused"]


def test_a_result_of_other_numbers_is_refused():
    check_result([[1, 2]], [[1, 2]], int)
    for value in ([[1.0, 2.0]], [[True, 2]], [[1, None]], [1, 2], [[1, [2]]], "12", None):
        with pytest.raises(RefusedAnswer) as refused:
            check_result(value, [[1, 2]], int)
        assert refused.value.violation == "type"
    for value in ([[1, 3]], [[1]], [[1, 2], [1, 2]], []):
        with pytest.raises(RefusedAnswer) as refused:
            check_result(value, [[1, 2]], int)
        assert refused.value.violation is None


@pytest.mark.parametrize("text, code", [
    (block("x = 1"), "x = 1"), ("```py\nx\n```", "x"), ("```\nx\ny\n```", "x\ny"), ("no block", None),
    ("```python\nx\n```\n```python\ny\n```", None), ("```python\n" + "x" * 20_001 + "\n```", None)])  # fmt: skip
def test_an_answer_is_one_code_block(text, code):
    if code is not None:
        assert code_of(text) == code
        return
    with pytest.raises(RefusedAnswer):
        code_of(text)


@pytest.mark.parametrize(
    "key, value", [("size", 4), ("timed_trials", 0), ("full_speedup", 1.0), ("seconds", 0), ("held_out_fraction", 1.0)]
)
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=re.escape(f"env.{key}={value}: must lie in ")):
        make_environment(SETTINGS | {key: value}, Matmul.build_tokenizer(), seed=0, total_steps=1, sandbox=None)
