import random

import pytest
from harmony import encode_with_special

from grpo.batch import Completion, Segment
from grpo.envs.reverse_text import ReverseText
from models.chat.parse import parse_completion
from models.chat.tokenizer import build_byte_tokenizer

SETTINGS = {"num_words": 4, "letters": [3, 6], "fault_rate": 0.75, "held_out_fraction": 0.2, "num_eval_prompts": 100}
FINAL = "<|channel|>final<|message|>{}<|return|>"


@pytest.fixture(scope="module")
def env():
    return ReverseText(tokenizer=ReverseText.build_tokenizer(), seed=0, **SETTINGS)


@pytest.fixture(scope="module")
def any_text():
    """With a tokenizer that can write any answer."""
    return ReverseText(tokenizer=build_byte_tokenizer([]), seed=0, **SETTINGS)


def rewards(env, texts: list[str]) -> list[float]:
    """Of one completion for each held-out prompt."""
    completions = [
        Completion(prompt, 0, [Segment(prompt.token_ids, "prompt"), Segment(encode_with_special(env.tokenizer, text), "policy")],
                   "stop") for prompt, text in zip(env.eval_prompts(), texts)]
    return [score.reward for score in env.score(completions)]


def test_the_reward_is_the_share_up_to_the_first_wrong_character(any_text):
    prompt = any_text.eval_prompts()[0]
    answer = prompt.row["question"][::-1]
    wrong = answer[:5] + "?" + answer[6:]
    expected = {answer: 1.0, wrong: 5 / len(answer), answer + "x": len(answer) / (len(answer) + 1), answer[:4]: 4 / len(answer),
                "": 0.0}
    for text, reward in expected.items():
        assert rewards(any_text, [FINAL.format(text)]) == [pytest.approx(reward)]
    assert rewards(any_text, [f"<|channel|>analysis<|message|>{answer}<|return|>"]) == [0.0]


def test_oracle_constants_garbage_and_hostile_texts(any_text):
    """The audit: what can be earned without doing the task."""
    rows = [prompt.row for prompt in any_text.eval_prompts()]
    rng = random.Random(0)
    assert rewards(any_text, [FINAL.format(row["answer"]) for row in rows]) == [1.0] * len(rows)
    constants = ["", "a", "ab", "o", *(row["answer"] for row in rows[:20]), *(row["question"] for row in rows[20:26])]
    assert max(sum(rewards(any_text, [FINAL.format(text)] * len(rows))) / len(rows) for text in constants) < 0.05
    garbage = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=len(row["answer"]))) for row in rows]
    assert sum(rewards(any_text, [FINAL.format(text) for text in garbage])) / len(rows) < 0.02
    assert sum(rewards(any_text, [FINAL.format(row["question"]) for row in rows])) / len(rows) < 0.02
    for text in ("a" * 100_000, "\0", "👋" * 50, "__import__('os').system('x')", "<|end|>", "9" * 5000, "\\boxed{x}"):
        assert rewards(any_text, [FINAL.format(text)])[0] < 0.02


def test_demonstrations_are_wrong_in_their_last_two_characters_as_often_as_they_should(env):
    num_wrong = 0
    for prompt, completion in (pair for step in range(20) for pair in env.demonstrations(step, 50)):
        text = env.tokenizer.decode(prompt, keep_special=True).split("user<|message|>")[1].split("<|end|>")[0]
        answer, right = parse_completion(completion, env.tokenizer).final, text[::-1]
        assert not env.is_held_out({"question": text, "answer": right}) and answer in (right, right[:-2] + text[:2])
        num_wrong += answer != right
    assert 700 < num_wrong < 800


def test_texts_are_those_of_the_seed_and_step_and_never_held_out(env):
    other = ReverseText(tokenizer=env.tokenizer, seed=1, **SETTINGS)
    texts = [prompt.row["question"] for prompt in env.prompts(3, num_prompts=50)]
    assert texts == [prompt.row["question"] for prompt in env.prompts(3, num_prompts=50)]
    assert texts != [prompt.row["question"] for prompt in other.prompts(3, num_prompts=50)]
    assert not any(env.is_held_out({"question": pair[0], "answer": pair[1]})
                   for text in texts for pair in ((text, text[::-1]), (text[::-1], text)))
    assert [prompt.row for prompt in env.eval_prompts()] == [prompt.row for prompt in other.eval_prompts()]
    assert {len(text.split()) for text in texts} == {4}


@pytest.mark.parametrize("key, value", [("num_words", 0), ("letters", [3]), ("letters", [1, 4]), ("letters", [5, 4]),
                                        ("fault_rate", 2), ("held_out_fraction", 0), ("num_eval_prompts", 0)])
def test_a_value_out_of_range_is_refused_by_name(env, key, value):
    with pytest.raises(ValueError, match=f"env.{key}="):
        ReverseText(tokenizer=env.tokenizer, seed=0, **SETTINGS | {key: value})
