"""Countdown: expressions that use the given numbers and reach the target earn, nothing else does."""

import random
import re
from collections import Counter
from fractions import Fraction

import pytest
from audit import GARBAGE, answered
from paths import ROOT

from grpo.batch import Prompt
from grpo.configuration.launch import load_config
from grpo.environment import checked_scores, make_environment
from grpo.envs.countdown import Countdown, Refused, evaluate

SETTINGS = load_config("train", ["+experiment=countdown_20b", f"model.path={ROOT / 'tests/fixtures/tiny_bf16'}"]).env


@pytest.fixture(scope="module")
def env():
    return make_environment(SETTINGS, Countdown.build_tokenizer(), seed=0, total_steps=1)


def score(env, text, numbers=(3, 4, 2, 50), target=14):
    prompt = Prompt(0, [1], {"question": "?", "numbers": list(numbers), "target": target})
    return checked_scores(env, [answered(env, prompt, text)])[0]


@pytest.mark.parametrize("text", [
    "(3+4)*2", " ( 3 + 4 ) * 2 ", "2*(4+3)", "(3+4)*2 = 14", "(3 + 4) × 2", "50/2-3*4+1", "(50-(4*2))/3",
    "4*3+2", "((((4))))*3+2"])
def test_expressions_have_the_value_that_python_gives(env, text):
    numbers = [int(number) for number in re.findall(r"\d+", text.split("=")[0])]
    expected = eval(text.split("=")[0].replace("×", "*"))  # Python's own, of a text of this test
    assert evaluate(text, numbers, 14) == Fraction(expected)
    assert score(env, text, numbers).reward == float(expected == 14)


def test_random_expressions_have_the_value_that_python_gives():
    rng = random.Random(0)
    for _ in range(300):
        numbers = [rng.randint(1, 30) for _ in range(rng.randint(2, 6))]
        text = "".join(f"{'(' * (rng.random() < 0.3)}{number}{rng.choice('+-*/')}" for number in numbers[:-1]) + str(numbers[-1])
        text += ")" * text.count("(")
        try:
            expected = eval(re.sub(r"(\d+)", r"Fraction(\1)", text))
        except ZeroDivisionError:
            with pytest.raises(Refused, match="division by zero"):
                evaluate(text, numbers, 1)
        else:
            assert evaluate(text, numbers, 1) == expected


@pytest.mark.parametrize("text, reason", [
    ("3+4", "equals 7"), ("14", "uses 14"), ("3+4+7", "uses 7"), ("4+4+4+2", "uses 4"), ("34-20", "uses 34, 20"),
    ("(3+4)*2=13", "behind ="), ("(3+4)*2=14=14", "behind ="), ("(3+4)*2 because", "no expression"), ("3 4", "no expression"),
    ("-2+4*4", "uses 4"), ("-2+4*3", "missing before '-'"), ("2**3", "missing before '*'"), ("50//3", "missing before '/'"),
    ("3+", "missing before the end"), ("(3+4", "not closed"), ("3+4)", "unexpected '\\)'"), ("()", "missing before '\\)'"),
    ("3(4)+2", "unexpected '\\('"), ("4/(3-3)", "uses 3"), ("(50-2*4*3-50)", "uses 50"), ("3+4*2; print(1)", "no expression"),
    ("٣+4", "no expression"), ("3+4*2e0", "no expression"), ("3.0+4", "no expression"), ("(3+4)*2\n(3+4)*2", "no expression"),
    ("(" * 21 + "3" + ")" * 21, "too many brackets"), ("(" * 90 + "3" + ")" * 90, "too many brackets"),
    ("+".join("1" * 150), "200"), ("(3+4)*2 or 4*3+2", "no expression")])
def test_everything_else_is_refused_and_says_why(env, text, reason):
    verdict = score(env, text)
    assert verdict.reward == 0.0 and not verdict.is_correct and re.search(reason, verdict.extra["refused"]), verdict.extra
    assert verdict.parts["valid"] == float(text == "3+4")


def test_a_division_by_zero_is_refused(env):
    assert "division by zero" in score(env, "4/(3-3)", (3, 3, 4)).extra["refused"]


# --- the task and its audit -------------------------------------------------------------------------------------------


def test_every_problem_is_solved_by_what_it_was_made_of_and_by_no_number_alone(env):
    prompts = env.eval_prompts() + [prompt for step in range(10) for prompt in env.prompts(step, num_prompts=16)]
    assert {len(prompt.row["numbers"]) for prompt in prompts} == {4, 5}
    for verdict in checked_scores(env, [answered(env, prompt, prompt.row["solution"]) for prompt in prompts]):
        assert verdict.reward == 1.0 and verdict.is_correct
    assert all(1 <= prompt.row["target"] <= 999 and prompt.row["target"] not in prompt.row["numbers"] for prompt in prompts)


def test_a_prompt_has_the_problem_and_not_its_solution(env):
    prompt = env.eval_prompts()[0]
    text = env.tokenizer.decode(prompt.token_ids, keep_special=True)
    numbers = ", ".join(map(str, prompt.row["numbers"]))
    assert f"<|message|>Numbers: {numbers}\nTarget: {prompt.row['target']}<|end|>" in text and prompt.row["solution"] not in text


def test_problems_are_those_of_the_seed_and_step_and_never_held_out(env):
    other = make_environment(SETTINGS, env.tokenizer, seed=1, total_steps=1)
    rows = [prompt.row for prompt in env.prompts(3, num_prompts=64)]
    assert rows == [prompt.row for prompt in env.prompts(3, num_prompts=64)]
    assert rows != [prompt.row for prompt in other.prompts(3, num_prompts=64)]
    held_out = [prompt.row for prompt in env.eval_prompts()]
    assert held_out == [prompt.row for prompt in other.eval_prompts()]
    assert len({env.identity(row) for row in held_out}) == 256
    assert not {env.identity(row) for row in held_out} & {env.identity(row) for row in rows}
    assert env.identity({"numbers": [3, 1, 2], "target": 7}) == env.identity({"numbers": [1, 2, 3], "target": 7})


def test_no_constant_earns_anything_to_speak_of(env):
    prompts = env.eval_prompts()
    common = Counter(prompt.row["solution"] for prompt in prompts).most_common(10)
    constants = [text for text, _ in common]
    constants += [f"{a}{operator}{b}" for a in (1, 2, 10, 25, 50) for b in (1, 4) for operator in "+*"]
    means = [sum(verdict.reward for verdict in env.score([answered(env, prompt, text) for prompt in prompts])) / len(prompts)
             for text in constants]
    assert len(constants) == 30 and max(means) <= 0.02


def test_garbage_and_hostile_texts_earn_nothing_and_raise_nothing(env):
    for text in GARBAGE:
        verdict = score(env, text)
        assert verdict.reward == 0.0 and verdict.parts["valid"] == 0.0, text


@pytest.mark.parametrize("key, value", [("fewest_numbers", 1), ("most_numbers", 3), ("largest_number", 0), ("largest_target", 1)])
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=re.escape(f"env.{key}={value}: must lie in ")):
        make_environment(SETTINGS | {key: value}, Countdown.build_tokenizer(), seed=0, total_steps=1)
