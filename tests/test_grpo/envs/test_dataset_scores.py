"""Scores of a data set's completions: matching, format and reward functions together, and what failed."""

import pytest
from question_data import GOOD, complete, final, make, problem, rows, write

from grpo.rewards.functions import RewardError
from grpo.rewards.workers import WorkerOutcome


@pytest.fixture
def sums(tokenizer, tmp_path):
    def build(**changes):
        return make(tokenizer, path=write(tmp_path, rows()), **changes)

    return build


def score(env, text, finish_reason="stop"):
    """The score of one completion whose {answer} is the right one."""
    prompt = env.prompts(0, num_prompts=1)[0]
    return env.score([complete(env, prompt, text.replace("{answer}", str(prompt.row["answer"])), finish_reason)])[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (final("{answer}"), 1.0),
        (final("It is {answer}.0."), 1.0),
        (final("1{answer}"), 0.0),
        (final("{answer} or 99"), 0.0),
        (final("{answer}").removesuffix("<|return|>"), 0.0),
        ("{answer}", 0.0),
        ("<|channel|>analysis<|message|>{answer}<|return|>", 0.0),
        ("<|channel|>final<|message|>99<|end|><|start|>assistant" + final("{answer}"), 0.0),
        ("", 0.0),
    ],
)
def test_only_the_finished_final_channel_is_matched(sums, text, expected):
    result = score(sums(), text)
    assert result.reward == expected
    assert result.is_correct is bool(expected)
    assert result.parts["numeric_match"] == expected


def test_match_format_and_functions_add_up_by_weight(sums, tmp_path):
    file = tmp_path / "extra.py"
    file.write_text(
        "def brevity(completions, **kwargs):\n    return [-float(len(c)) for c in completions]\n\n"
        "def watched(row, text):\n    return {'score': 5.0, 'chars': len(text)}\n"
    )
    env = sums(
        match_reward=2.0,
        format_reward=0.25,
        rewards=[{"fn": f"{file}:brevity", "weight": 0.5}, {"fn": f"{file}:watched", "weight": 0, "name": "seen"}],
    )
    result = score(env, final("{answer} "))
    length = len(str(env.prompts(0, num_prompts=1)[0].row["answer"])) + 1
    assert result.reward == pytest.approx(2.0 + 0.25 - 0.5 * length)
    assert result.parts == {"format": 1.0, "numeric_match": 1.0, "brevity": -length, "seen": 5.0}
    assert result.metrics == {"seen/chars": float(length), "reward/error_rate": 0.0}


REWARDS = """
def unlucky(row, text):
    if text == "99":
        raise RuntimeError("no luck")
    return 1.0

def nothing(completions, **kwargs):
    return [None] * len(completions)

def not_a_number(text):
    return float("nan") if text else 0.0

def some(completions, **kwargs):
    return [None if c == "99" else 1.0 for c in completions]
"""


def group(env, texts):
    prompt = env.prompts(0, num_prompts=1)[0]
    return env.score([complete(env, prompt, final(text)) for text in texts])


def test_a_failed_reward_leaves_the_row_without_one_and_counts_it(sums, tmp_path):
    file = tmp_path / "r.py"
    file.write_text(REWARDS)
    env = sums(rewards=[{"fn": f"{file}:unlucky"}], max_error_rate=0.5)
    good, bad = group(env, ["98", "99"])
    assert (good.reward, bad.reward) == (1.0, None)
    assert (good.metrics["reward/error_rate"], bad.metrics["reward/error_rate"]) == (0.0, 1.0)
    assert bad.extra["unlucky/error"].startswith("RuntimeError: no luck (r.py:4)")
    assert bad.is_correct is False


def test_a_failed_metric_does_not_cost_the_reward(sums, tmp_path):
    file = tmp_path / "r.py"
    file.write_text(REWARDS)
    env = sums(rewards=[{"fn": f"{file}:unlucky", "weight": 0}], max_error_rate=1.0)
    assert [result.reward for result in group(env, ["98", "99"])] == [0.0, 0.0]


def test_too_many_failures_raise_naming_function_and_line(sums, tmp_path):
    file = tmp_path / "r.py"
    file.write_text(REWARDS)
    env = sums(rewards=[{"fn": f"{file}:unlucky"}])
    assert [score.reward for score in group(env, ["98", *["99"] * 5])] == [1.0, *[None] * 5]  # 5 of 100 are allowed
    with pytest.raises(
        RewardError, match=r"'unlucky' failed on 6 of its last 7 completions.*data\.jsonl:\d+: RuntimeError: no luck"
    ):
        group(env, ["99"])


def test_a_nan_reward_stops_in_the_dry_run(sums, tmp_path):
    file = tmp_path / "r.py"
    file.write_text(REWARDS)
    with pytest.raises(
        RewardError, match=r"'not_a_number' failed its dry run on row .*data\.jsonl:\d+.*nan, which is not finite"
    ):
        sums(rewards=[{"fn": f"{file}:not_a_number"}])
    env = sums(rewards=[{"fn": f"{file}:not_a_number"}], dry_run=False)
    with pytest.raises(RewardError, match="'not_a_number' failed on 6 of its last 6"):
        group(env, ["98"] * 6)


def test_a_function_that_does_not_apply_is_left_out_of_the_sum(sums, tmp_path):
    file = tmp_path / "r.py"
    file.write_text(REWARDS)
    results = group(sums(match="none", rewards=[{"fn": f"{file}:some"}], correct_at=1.0), ["98", "99"])
    assert [(r.reward, r.is_correct) for r in results] == [(1.0, True), (None, False)]
    results = group(sums(match="none", rewards=[{"fn": f"{file}:nothing"}]), ["98", "99"])
    assert [(r.reward, r.metrics["reward/error_rate"]) for r in results] == [(None, 0.0), (None, 0.0)]


def test_without_match_or_threshold_nothing_is_called_correct(sums, tmp_path):
    file = tmp_path / "r.py"
    file.write_text(REWARDS)
    assert group(sums(match="none", rewards=[{"fn": f"{file}:some"}]), ["98"])[0].is_correct is None


def test_functions_see_the_step_of_the_last_prompts(sums, tmp_path):
    file = tmp_path / "r.py"
    file.write_text(
        "def stepper(completions, trainer_state, **kwargs):\n    return [trainer_state.global_step] * len(completions)\n"
    )
    env = sums(match="none", rewards=[{"fn": f"{file}:stepper"}])
    prompt = env.prompts(11, num_prompts=1)[0]
    assert env.score([complete(env, prompt, final("1"))])[0].reward == 11.0


def of_answers(tokenizer, folder, answers, **changes):
    questions = [{"question": f"Question {i}?", "answer": answer} for i, answer in enumerate(answers)]
    return make(tokenizer, path=write(folder, questions), eval_path=write(folder, rows(2), "eval.jsonl"), **changes)


def graded(env, text):
    prompts = sorted(env.prompts(0, num_prompts=len(env.train_rows)), key=lambda prompt: prompt.row["question"])
    return [score.reward for score in env.score([complete(env, prompt, final(text)) for prompt in prompts])]


@pytest.mark.parametrize(("match", "text"), [("exact", "12"), ("numeric", "12.0"), ("math", r"3 \cdot 4")])
def test_any_of_a_list_of_accepted_answers_is_right(tokenizer, tmp_path, match, text):
    if match == "math":
        pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    answers = [["11", "12"], [12], ["11", "13"], {"target": ["12", "13"]}, {"target": "12"}, 12]
    env = of_answers(tokenizer, tmp_path, answers, match=match)
    assert graded(env, text) == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    assert {row.source[-1]: row.answer for row in env.train_rows}["4"] == {"target": ["12", "13"]}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([], "'answer' is a list of no answers"),
        (["1", ""], "'answer' is empty"),
        (["1", None], "'answer' is a NoneType; expected text, a number, or a list"),
        (["1", "x"], "'answer' is 'x', which is not a number"),
        ({"value": 1}, "'answer' is a dict; expected text, a number, or a list or {'target': ...} of accepted ones"),
    ],
)
def test_a_list_that_holds_no_accepted_answers_is_a_bad_row(tokenizer, tmp_path, answer, words):
    assert words in problem(tokenizer, write(tmp_path, [GOOD, {"question": "b", "answer": answer}]))


def test_reward_functions_get_lists_and_dicts_of_answers_as_they_are(tokenizer, tmp_path):
    file = tmp_path / "graders.py"
    file.write_text(
        "def grade(solution_str, ground_truth):\n    return float(ground_truth == {'target': ['12'], 'style': 3})\n"
    )
    answers = [{"target": ["12"], "style": 3}, ["12"], {"style": 3}]
    grader = [{"fn": f"{file}:grade"}]
    assert graded(of_answers(tokenizer, tmp_path, answers, match="none", rewards=grader), "12") == [1.0, 0.0, 0.0]
    assert graded(of_answers(tokenizer, tmp_path, answers[:2], match="exact", rewards=grader), "12") == [2.0, 1.0]


def test_an_answer_that_could_not_be_judged_gets_no_reward_and_is_counted(tokenizer, tmp_path):
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    env = of_answers(tokenizer, tmp_path, ["x+1", "x+2"], match="math", dry_run=False)
    env._match_expressions.workers = DeadWorkers()
    prompts = sorted(env.prompts(0, num_prompts=2), key=lambda prompt: prompt.row["question"])
    judged, lost = env.score([complete(env, prompts[0], final("x+1")), complete(env, prompts[1], final("2+x"))])
    assert (judged.reward, judged.is_correct, judged.metrics["reward/error_rate"]) == (1.0, True, 0.0)
    assert (lost.reward, lost.is_correct, lost.metrics["reward/error_rate"]) == (None, None, 1.0)
    assert lost.extra == {"math_match/error": "its worker died"} and "math_match" not in lost.parts


class DeadWorkers:
    def map(self, items, *, budget):
        return [WorkerOutcome(error="its worker died") for _ in items]


def test_answers_after_a_marker_are_cut_out(tokenizer, tmp_path):
    path = write(tmp_path, [{"question": f"{n}?", "answer": f"First 3 #### no.\n#### {n}"} for n in range(12)])
    env = make(tokenizer, path=path, answer_after="####")
    prompt = env.prompts(0, num_prompts=1)[0]
    number = prompt.row["question"].removesuffix("?")
    assert env.score([complete(env, prompt, final(number))])[0].reward == 1.0
    assert env.describe(complete(env, prompt, final("77")))["answer"] == number
    assert "has no '$$'" in problem(tokenizer, path, answer_after="$$")


def test_the_described_completion_shows_source_question_and_channels(sums):
    env = sums()
    prompt = env.eval_prompts()[0]
    described = env.describe(complete(env, prompt, final("8")))
    assert described["source"].rpartition(":")[0].endswith("data.jsonl")
    assert (described["question"], described["analysis"], described["final"]) == (prompt.row["question"], "hm", "8")


def test_the_question_described_is_the_last_user_message(tokenizer, tmp_path):
    def messages(n):
        call = {"type": "function", "function": {"name": "look", "arguments": {"n": n}}}
        return [
            {"role": "system", "content": "Be terse."},
            {"role": "user", "content": f"Look up {n}."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": f"found {n}"},
        ]

    path = write(tmp_path, [{"prompt": messages(n), "answer": str(n)} for n in range(9)])
    env = make(tokenizer, path=path, prompt_key="prompt", held_out_fraction=0.5)
    prompt = env.prompts(0, num_prompts=1)[0]
    number = prompt.row["answer"]
    assert env.describe(complete(env, prompt, final("8")))["question"] == f"Look up {number}."
