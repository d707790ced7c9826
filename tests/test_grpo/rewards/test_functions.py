import asyncio
import dataclasses

import numpy as np
import pytest
import torch

from grpo.rewards.forms import Sample, TrainerState
from grpo.rewards.functions import Reward, load_reward

CALL = {
    "state": TrainerState(global_step=0, max_steps=10, epoch=0.0, num_train_epochs=1, train_batch_size=2),
    "retries": 0,
}

# --- functions written to the signatures that other trainers document ------------------------------------------------


def samples(texts=("42", "7"), *, answers=("42", "8"), messages=False, **columns):
    made = []
    for i, (text, answer) in enumerate(zip(texts, answers)):
        question = f"question {i}"
        row = {"question": question, "solution": answer, **{name: values[i] for name, values in columns.items()}}
        prompt = [{"role": "user", "content": question}] if messages else question
        made.append(
            Sample(
                row=row,
                source=f"train.jsonl:{i + 1}",
                prompt=prompt,
                text=text,
                thinking=f"thought {i}",
                completion_ids=[10 + i, 11 + i],
                is_truncated=False,
                answer=answer,
            )
        )
    return made


def adapt(function, *, columns=("question", "solution"), has_answer=True, weight=1.0, **kwargs):
    return Reward(
        function,
        key="env.rewards[0].fn",
        name=function.__name__,
        weight=weight,
        kwargs=kwargs,
        columns=set(columns),
        has_answer=has_answer,
    )


def values(function, made, *, step=0, **options):
    columns = {name for sample in made for name in sample.row}
    state = dataclasses.replace(CALL["state"], global_step=step)
    return [result.value for result in adapt(function, columns=columns, **options)(made, state=state, retries=0)]


def trl_length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def trl_chars(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def trl_format(prompts, completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [1.0 if content == "42" else 0.0 for content in contents]


def trl_solution(completions, solution, **kwargs):
    return [1.0 if content == truth else 0.0 for content, truth in zip(completions, solution)]


def trl_math_only(prompts, completions, task, **kwargs):
    return [
        float(len(prompt)) if kind == "math" else None for prompt, completion, kind in zip(prompts, completions, task)
    ]


def trl_curriculum(completions, trainer_state, **kwargs):
    return [float(trainer_state.global_step)] * len(completions)


def trl_logging(completions, solution, log_extra=None, log_metric=None, **kwargs):
    rewards = [float(c == s) for c, s in zip(completions, solution)]
    if log_extra:
        log_extra("golden", list(solution))
    if log_metric:
        log_metric("accuracy", sum(rewards) / len(rewards))
    return rewards


async def trl_async(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(completion)) for completion in completions]


def test_trl_functions_get_texts_for_text_prompts():
    assert values(trl_chars, samples(("abc", "de"))) == [3.0, 2.0]
    assert values(trl_length, samples()) == [2.0, 2.0]


def test_trl_functions_get_message_lists_for_conversational_prompts():
    assert values(trl_format, samples(messages=True)) == [1.0, 0.0]


def test_trl_functions_get_columns_as_lists():
    assert values(trl_solution, samples()) == [1.0, 0.0]


def test_trl_functions_may_find_themselves_not_applicable():
    results = adapt(trl_math_only, columns={"task"})(samples(task=["math", "code"]), **CALL)
    assert [(r.value, r.error) for r in results] == [(10.0, None), (None, None)]


def test_trl_functions_see_the_step():
    assert values(trl_curriculum, samples(), step=7) == [7.0, 7.0]


def test_trl_functions_log_columns_and_metrics():
    results = adapt(trl_logging)(samples(), **CALL)
    assert [result.value for result in results] == [1.0, 0.0]
    assert [result.extra for result in results] == [{"golden": "42"}, {"golden": "8"}]
    assert [result.metrics for result in results] == [{"accuracy": 0.5}] * 2


def test_logged_columns_become_json():
    def batch(completions, log_extra):
        log_extra("place", [{1}, float("nan")])
        return [0.0, 0.0]

    assert [result.extra for result in adapt(batch)(samples(), **CALL)] == [{"place": "{1}"}, {"place": "nan"}]


def test_async_batch_functions_are_awaited():
    assert values(trl_async, samples(("abc", "de"))) == [3.0, 2.0]


def test_trl_keyword_rest_holds_the_documented_names():
    seen = {}

    def spy(completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(completions)

    values(spy, samples(prompt=["p", "q"]))
    assert sorted(seen) == [
        "completion_ids",
        "log_extra",
        "log_metric",
        "prompts",
        "question",
        "solution",
        "trainer_state",
    ]
    assert seen["solution"] == ["42", "8"]


def single_answer(completion, answer):
    return completion[-1]["content"] == answer


def single_state(state, info, task, **kwargs):
    assert sorted(kwargs) == ["answer", "completion", "prompt"]
    return float(state["answer"] == state["completion"]) + info["bonus"] + (task == "sums")


async def single_async(prompt, completion, answer):
    await asyncio.sleep(0)
    return float(completion == answer)


def group_ranks(completions, answers):
    order = sorted(range(len(completions)), key=lambda i: (completions[i] == answers[i], completions[i]))
    return [float(order.index(i)) for i in range(len(completions))]


def test_singular_names_are_called_per_completion():
    assert values(single_answer, samples(messages=True)) == [1.0, 0.0]
    assert values(single_state, samples(info=[{"bonus": 0.5}, {"bonus": 0.25}], task=["sums", "x"])) == [2.5, 0.25]
    assert values(single_async, samples()) == [1.0, 0.0]


def test_plural_names_are_called_per_group():
    assert values(group_ranks, samples(("7", "8"), answers=("7", "9"))) == [1.0, 0.0]


def test_native_functions_get_row_and_text():
    def native(row, text):
        return text == row["solution"]

    assert values(native, samples()) == [1.0, 0.0]


def test_native_functions_may_name_columns_and_the_reasoning():
    def native(text, question, thinking, bonus=1.0):
        return float(question[-1] == thinking[-1]) + bonus

    assert values(native, samples(), bonus=2.0) == [3.0, 3.0]


def test_a_function_cannot_change_the_row_that_the_group_shares():
    made = samples(notes=[[1], [2]])

    def mutate(row, text):
        row["notes"].append(3)
        row["solution"] = "x"
        return 0.0

    values(mutate, made)
    assert made[0].row["notes"] == [1] and made[0].row["solution"] == "42"


@pytest.mark.parametrize(
    ("returned", "value"),
    [
        (1, 1.0),
        (True, 1.0),
        (False, 0.0),
        (-0.5, -0.5),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (torch.tensor(0.25), 0.25),
        (None, None),
        ({"score": None}, None),
        ({"score": 2}, 2.0),
    ],
)
def test_numbers_of_any_kind_are_taken(returned, value):
    def native(text):
        return returned

    result = adapt(native)(samples(), **CALL)[0]
    assert (result.value, result.error) == (value, None)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (float("nan"), "nan, which is not finite"),
        (float("inf"), "inf, which is not finite"),
        ("1.0", "returned a str"),
        ([1.0], "returned a list"),
        ({"reward": 1.0}, "a dict without 'score'"),
        ({"score": float("nan")}, "not finite"),
        (10**400, "no number"),
        (torch.tensor([1.0, 2.0]), "no number"),
        (1j, "returned"),
    ],
)
def test_what_is_no_finite_number_is_an_error_never_a_zero(returned, words):
    def native(text):
        return returned

    result = adapt(native)(samples(), **CALL)[0]
    assert result.value is None and words in result.error


def test_batch_results_may_be_arrays():
    assert values(lambda_array, samples()) == [1.0, 2.0]


def lambda_array(completions):
    return np.array([1.0, 2.0])


@pytest.mark.parametrize(
    ("returned", "words"), [([1.0], "1 values for 2"), (1.0, "a float for 2"), (None, "a NoneType for 2")]
)
def test_a_batch_function_must_return_one_value_for_each_completion(returned, words):
    def batch(completions):
        return returned

    assert all(words in result.error for result in adapt(batch)(samples(), **CALL))


def test_a_log_column_of_another_length_is_an_error():
    def batch(completions, log_extra):
        log_extra("x", [1])
        return [0.0, 0.0]

    assert "log_extra('x') got 1 values for 2" in adapt(batch)(samples(), **CALL)[0].error


def fails_on_seven(text):
    if text == "7":
        raise ZeroDivisionError("seven")
    return 1.0


def exits(text):
    raise SystemExit(3)


async def fails_async(text):
    raise KeyError("k")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (fails_on_seven, "ZeroDivisionError: seven (test_functions.py:"),
        (exits, "SystemExit: 3"),
        (fails_async, "KeyError: 'k'"),
    ],
)
def test_exceptions_are_errors_with_their_place(function, words):
    assert words in adapt(function)(samples(), **CALL)[1].error


# --- loading and signatures ------------------------------------------------------------------------------------------

OPTIONS = {"key": "env.rewards[0].fn", "columns": {"question"}, "has_answer": True}


def test_functions_load_by_dotted_path_and_from_files(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass Bonus:\n    value: float = 3.0\n\n"
        "def score(row, text):\n    return Bonus().value + len(text)\n"
    )
    for path in ("grpo.rewards.match:exact_match", "grpo.rewards.match.exact_match"):
        assert [r.value for r in load_reward(path, **OPTIONS)(samples(), **CALL)] == [1.0, 0.0]
    reward = load_reward(f"{file}:score", **OPTIONS)
    assert (reward.name, reward.weight) == ("score", 1.0)
    assert [r.value for r in reward(samples(), **CALL)] == [5.0, 4.0]


def test_keyword_arguments_come_from_the_config():
    reward = load_reward("grpo.rewards.match.numeric_match", **OPTIONS, kwargs={"tolerance": 0.2})
    assert [r.value for r in reward(samples(("44", "7")), **CALL)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("score", "expected package.module:function"),
        ("nowhere.at_all:score", "cannot import nowhere.at_all"),
        ("grpo.rewards.match:exact_mach", "has no 'exact_mach'; it defines: exact_match"),
        ("grpo.rewards.numbers:MAX_EXPONENT", "is a int, no function"),
        ("missing_file.py:score", "missing_file.py; a relative path starts at the working directory"),
        ("grpo.rewards.match:", "expected package.module:function"),
        ("lib/mine.py", "names a file and nothing in it; write lib/mine.py:NAME"),
    ],
)
def test_a_path_that_leads_nowhere_names_its_key(path, words):
    with pytest.raises(ValueError) as caught:
        load_reward(path, **OPTIONS)
    assert str(caught.value).startswith(f"env.rewards[0].fn={path!r}")
    assert words in str(caught.value)


def test_a_file_that_fails_to_import_names_the_line(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("x = 1\nraise RuntimeError('no license')\n")
    with pytest.raises(ValueError, match=r"RuntimeError: no license \(broken.py:2\)"):
        load_reward(f"{file}:score", **OPTIONS)


def unknown_parameter(text, difficulty):
    return 0.0


def names_nothing(a, b):
    return 0.0


def positional(text, /):
    return 0.0


def wants_answer(text, answer):
    return 0.0


@pytest.mark.parametrize(
    ("function", "has_answer", "words"),
    [
        (unknown_parameter, True, "parameter 'difficulty'.*columns question, solution"),
        (names_nothing, True, "name no completion"),
        (positional, True, "name no completion"),
        (wants_answer, False, "parameter 'answer'"),
    ],
)
def test_a_signature_that_cannot_be_filled_is_refused(function, has_answer, words):
    with pytest.raises(ValueError, match=words):
        adapt(function, has_answer=has_answer)


def test_unknown_kwargs_and_bad_weights_are_refused():
    with pytest.raises(ValueError, match="kwargs 'scale'"):
        adapt(wants_answer, scale=2)
    for weight in (float("nan"), "1", True):
        with pytest.raises(ValueError, match="weight="):
            adapt(wants_answer, weight=weight)
