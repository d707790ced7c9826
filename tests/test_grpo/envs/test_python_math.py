"""The tool python, and questions that it answers."""

import math
import queue
import random
import re

import pytest
from audit import GARBAGE, answered
from paths import ROOT

from grpo.batch import Prompt, ToolCall
from grpo.configuration.launch import load_config
from grpo.environment import checked_scores, make_environment
from grpo.envs import python_math
from grpo.envs.python_math import KINDS, PythonMath
from grpo.envs.python_tool import PythonTool
from grpo.rollout.episodes import EpisodeThread
from grpo.sandbox.calls import VIOLATIONS
from grpo.sandbox.pool import Sandbox

SETTINGS = load_config("train", ["+experiment=python_math_20b", f"model.path={ROOT / 'tests/fixtures/tiny_bf16'}"]).env


@pytest.fixture(scope="module")
def env(sandbox):
    return make_environment(SETTINGS, PythonMath.build_tokenizer(), seed=0, total_steps=1, sandbox=sandbox)


@pytest.fixture
def tool(sandbox):
    return PythonTool(sandbox, seconds=2.0, keeps_state=False)


# --- the tool ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code, result", [
    ("print(6 * 7)", "42"), ("6 * 7", "42"), ("x = 6\nx * 7", "42"), ("x = 1", "(no output)"),
    ("None", "(no output)"), ("", "(no output)"),
    ("print('a')\n'b'", "a\n'b'"), ("from math import comb\ncomb(5, 2)", "10"),
    ("def f(n): return n and n + f(n - 1)\nf(10)", "55"), ("[n for n in range(3)]", "[0, 1, 2]")])  # fmt: skip
def test_the_result_is_what_is_printed_and_the_last_expression(tool, code, result):
    assert tool.python(code) == result and tool.get_reward() == []


@pytest.mark.parametrize("code, ending", [
    ("1 / 0", "ZeroDivisionError: division by zero"), ("print(1)\n1 +", "SyntaxError: invalid syntax"),
    ("print('seen')\nraise SystemExit(3)", "SystemExit: 3"), ("x" * 50, f"NameError: name '{'x' * 50}' is not defined"),
    ("import sys\nsys.stdout = None\nboom", "NameError: name 'boom' is not defined")])
def test_an_error_is_a_result_that_ends_in_it(tool, code, ending):
    result = tool.python(code)
    assert result.endswith(ending) and tool.get_reward() == []
    assert "candidate" not in result and "ast.py" not in result  # its own frames are left out
    assert ("seen" in result) == ("seen" in code)


@pytest.mark.parametrize("code, kind", [
    ("import numpy", "import"), ("open('/etc/passwd').read()", "call"), ("while True: pass", "time"),
    ("import random\nrandom._os._exit(1)", "crash")])
def test_a_violation_is_told_and_noted(sandbox, code, kind):
    tool = PythonTool(sandbox, seconds=1.0, keeps_state=True)
    result = tool.python(code)
    assert f"error: {VIOLATIONS[kind]}" in result and tool.get_reward() == [kind]
    assert ("ModuleNotFoundError: No module named 'numpy'" in result) == (kind == "import")
    assert tool.earlier == []


def test_an_honest_recursion_that_fills_the_stack_gates_no_reward(tool):
    tool.python("import functools, sys\nsys.setrecursionlimit(10**9)\n"
                "@functools.cache\ndef f(n): return n and f(n - 1)\nf(10**6)")
    assert not set(tool.get_reward()) & set(python_math.GATING)  # a violation of the memory, or a RecursionError


def test_output_is_cut_off(tool):
    result = tool.python("print('x' * 10**6)")
    assert len(result) < 10_100 and result.startswith("xxx") and result.endswith("(cut off after 10000 characters)")


def test_without_state_each_call_begins_anew(tool):
    tool.python("x = 3")
    assert "NameError" in tool.python("x")


def test_with_state_names_stay_and_earlier_output_does_not_come_again(sandbox):
    tool = PythonTool(sandbox, seconds=2.0, keeps_state=True)
    assert tool.python("x = [1]\nprint('first')\nx") == "first\n[1]"
    assert "ZeroDivisionError" in tool.python("x.append(2)\n1 / 0")
    assert tool.python("print(x)") == "[1, 2]"  # as in a notebook: what ran before the error counts


def test_the_recipient_python_gets_the_text_as_it_is_and_answers_in_plain_text(sandbox):
    replies = queue.SimpleQueue()
    thread = EpisodeThread(0, lambda: PythonTool(sandbox, seconds=2.0, keeps_state=False), replies, writes_json=True)
    for name, arguments, result in (("python", "print('a b')", "a b"), ("functions.python", '{"code": "print(7)"}', '"7"')):
        thread.call(name, arguments)
        assert replies.get()[1] == ToolCall(name, arguments, result, False)
    thread.end(list)
    assert replies.get()[1] == []
    thread.leave()


def test_a_zygote_that_is_started_anew_during_an_episode_is_none_of_its_processes():
    own = Sandbox("auto", num_zygotes=1)
    own._zygotes[0].process.kill()
    own._zygotes[0].process.wait()
    replies = queue.SimpleQueue()
    thread = EpisodeThread(0, lambda: PythonTool(own, seconds=20.0, keeps_state=False), replies, writes_json=False)
    thread.call("python", "6 * 7")
    assert replies.get()[1].result == "42"
    thread.end(list)
    assert replies.get()[1] == []  # no fault that it left a process running
    thread.leave()
    assert own._zygotes[0].process.poll() is None
    own.close()


# --- the task ---------------------------------------------------------------------------------------------------------

SOLUTIONS = {  # question -> code, by other means than the task's own
    r"remainder of (\d+)\^(\d+) divided by (\d+)": "print({0} ** {1} % {2})",
    r"from 1 to (\d+) are divisible by (\d+) or (\d+), but not by (\d+)":
        "print(len((set(range({1}, {0} + 1, {1})) | set(range({2}, {0} + 1, {2}))) - set(range({3}, {0} + 1, {3}))))",
    r"digits of (\d+)!": "p = 1\nfor n in range(1, {0} + 1): p *= n\nprint(sum(int(d) for d in str(p)))",
    r"with (\d+) <= p <= (\d+)":
        "composite = {{m for d in range(2, 160) for m in range(2 * d, {1} + 1, d)}}\n"
        "print(len([n for n in range({0}, {1} + 1) if n not in composite]))",
    r"Begin with (\d+)": "f = lambda n: 0 if n == 1 else 1 + f(3 * n + 1 if n % 2 else n // 2)\nprint(f({0}))",
    r"can (\d+) be paid with coins of (\d+), (\d+), (\d+), (\d+)":
        "print(sum(({0} - a - b - c) % {4} == 0 for a in range(0, {0} + 1, {1}) for b in range(0, {0} + 1 - a, {2}) "
        "for c in range(0, {0} + 1 - a - b, {3})))",
    r"x_0 = (\d+) and x_\(n\+1\) = \((\d+) \* x_n\^2 \+ (\d+)\) mod (\d+). What is x_(\d+)":
        "x = {0}\nfor _ in range({4}): x = (x * x * {1} + {2}) % {3}\nprint(x)",
    r"prime factor of (\d+)": "print(max(d for e in range(1, 3200) if {0} % e == 0 for d in (e, {0} // e) "
                              "if d > 1 and all(d % f for f in range(2, int(d ** 0.5) + 1))))"}  # fmt: skip


def solution(question: str) -> str:
    (code, found), = [(code, found) for pattern, code in SOLUTIONS.items() if (found := re.search(pattern, question))]
    return code.format(*found.groups())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_oracle_computes_each_kind_with_the_tool_and_earns_everything(env, kind):
    for seed in range(4):
        question, answer = kind(random.Random(seed))
        prompt = Prompt(0, [1], {"question": question, "answer": str(answer)})
        episode = env.episode(prompt, 0)
        found = episode.python(solution(question))
        completion = answered(env, prompt, f"\\boxed{{{found}}}", outcome=episode.get_reward())
        (score,) = checked_scores(env, [completion])
        assert score.reward == 1.0 and score.is_correct and sum(score.metrics.values()) == 0, (question, found, answer)


def test_a_prompt_names_the_tool_and_says_whether_names_stay(env, sandbox):
    text = env.tokenizer.decode(env.encode_prompt("What?"), keep_special=True)
    assert "## python" in text and "begins anew" in text
    assert text.endswith("<|start|>user<|message|>What?<|end|><|start|>assistant")
    other = make_environment(SETTINGS | {"keeps_state": True}, env.tokenizer, seed=0, total_steps=1, sandbox=sandbox)
    assert "begins anew" not in env.tokenizer.decode(other.encode_prompt("What?"))


def test_problems_are_those_of_the_seed_and_step_and_never_held_out(env):
    other = make_environment(SETTINGS, env.tokenizer, seed=1, total_steps=1, sandbox=None)
    questions = [prompt.row["question"] for prompt in env.prompts(3, num_prompts=40)]
    assert questions == [prompt.row["question"] for prompt in env.prompts(3, num_prompts=40)]
    assert questions != [prompt.row["question"] for prompt in other.prompts(3, num_prompts=40)]
    held_out = [prompt.row["question"] for prompt in env.eval_prompts()]
    assert held_out == [prompt.row["question"] for prompt in other.eval_prompts()] and len(set(held_out)) == 256
    assert not set(held_out) & set(questions)
    ids = [prompt.id for attempt in range(2) for prompt in env.prompts(0, num_prompts=20, attempt=attempt)]
    assert len(set(ids)) == 40


def test_no_constant_earns_half(env):
    prompts = env.eval_prompts()
    constants = [str(n) for n in [*range(25), 100, 997, 1000, 1024, 4096]]
    means = [sum(score.reward for score in env.score([answered(env, prompt, text) for prompt in prompts])) / len(prompts)
             for text in constants]
    assert len(constants) == 30 and max(means) <= 0.05


def test_garbage_and_hostile_texts_earn_nothing_and_raise_nothing(env):
    prompt = Prompt(0, [1], {"question": "?", "answer": "42"})
    for text in [*GARBAGE, "41 42", "42 or 43", "\\boxed{41} \\boxed{42}", "42" + " " * 10_000]:
        (score,) = checked_scores(env, [answered(env, prompt, text)])
        assert score.reward == 0.0 and score.is_correct is False, text


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_violations_are_counted_and_those_that_no_honest_code_commits_gate_the_reward(env, kind):
    prompt = Prompt(0, [1], {"question": "?", "answer": "42"})
    (score,) = checked_scores(env, [answered(env, prompt, "42", outcome=[kind, kind])])
    assert score.metrics == {f"sandbox/violations/{name}": float(name == kind) for name in VIOLATIONS}
    assert score.reward == float(kind not in python_math.GATING) and score.parts == {"numeric_match": 1.0}


def test_a_completion_without_form_earns_nothing(env):
    prompt = Prompt(0, [1], {"question": "?", "answer": "42"})
    completion = answered(env, prompt, "42")
    completion.segments[1].token_ids.pop()
    assert checked_scores(env, [completion])[0].reward == 0.0


@pytest.mark.parametrize("key, value", [("seconds", 0), ("held_out_fraction", 1.0), ("num_eval_prompts", 0)])
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=re.escape(f"env.{key}={value}: must lie in ")):
        make_environment(SETTINGS | {key: value}, PythonMath.build_tokenizer(), seed=0, total_steps=1, sandbox=None)


def test_answers_are_those_of_known_cases(monkeypatch):
    class Given(random.Random):
        def __init__(self, *numbers):
            super().__init__()
            self.numbers = list(numbers)

        def randint(self, low, high):
            return self.numbers.pop(0)

        def sample(self, population, k):
            return self.numbers.pop(0)

    assert python_math.power(Given(3, 4, 7))[1] == 4  # 81 = 11 * 7 + 4
    assert python_math.multiples(Given(10, [2, 3, 4]))[1] == 5  # 2 3 6 9 10
    assert python_math.factorial_digits(Given(10))[1] == 27  # 3628800
    assert python_math.primes(Given(10, 10))[1] == 4  # 11 13 17 19
    assert python_math.collatz(Given(6))[1] == 8  # 3 10 5 16 8 4 2 1
    assert python_math.coins(Given(10, [2, 5]))[1] == 2  # 5 * 2, 2 * 5
    assert python_math.recurrence(Given(2, 1, 1, 100, 3))[1] == 77  # 5, 26, 677
    assert python_math.largest_factor(Given(84))[1] == 7 and math.prod([2, 2, 3, 7]) == 84
