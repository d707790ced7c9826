import pytest
from harmony import encode_with_special

from grpo.batch import Completion, Segment
from grpo.envs.calculator import Calculator
from models.chat.parse import parse_completion

SETTINGS = {"digits": 2, "call_rate": 0.3, "held_out_fraction": 0.2, "num_eval_prompts": 256}
CALL = ' to=functions.multiply<|channel|>commentary json<|message|>{"a": 69, "b": 88}<|call|>'
RESULT = "<|start|>functions.multiply to=assistant<|channel|>commentary<|message|>6072<|end|><|start|>assistant"


@pytest.fixture(scope="module")
def tokenizer():
    return Calculator.build_tokenizer()


@pytest.fixture(scope="module")
def env(tokenizer):
    return Calculator(tokenizer=tokenizer, seed=0, **SETTINGS)


def completion_of(env, *texts: str) -> Completion:
    prompt = env.eval_prompts()[0]
    prompt.row = {"question": "69*88", "answer": "6072"}
    sources = ["policy", "env"] * len(texts)
    segments = [Segment(encode_with_special(env.tokenizer, text), source) for text, source in zip(texts, sources)]
    return Completion(prompt, 0, [Segment(prompt.token_ids, "prompt"), *segments], "stop")


def test_a_prompt_declares_the_function(env, tokenizer):
    text = tokenizer.decode(env.encode_prompt("69*88"), keep_special=True)
    assert "// Multiplies two whole numbers.\ntype multiply = (_: {\na: number,\nb: number,\n}) => any;" in text
    assert "'functions'." in text and text.endswith("<|start|>user<|message|>69*88<|end|><|start|>assistant")
    assert len(env.encode_prompt("69*88")) < 25  # a tiny model reads few tokens


@pytest.mark.parametrize("texts, reward", [
    ((CALL, RESULT, "<|channel|>final<|message|>6072<|return|>"), 1.0),
    (("<|channel|>final<|message|>6072<|return|>",), 1.0),
    ((CALL, RESULT, "<|channel|>final<|message|>6073<|return|>"), 0.0), ((CALL,), 0.0),
    ((CALL, RESULT, "<|channel|>final<|message|>6072<|end|>"), 0.0),
    (("<|channel|>final<|message|>5<|end|><|start|>assistant<|channel|>final<|message|>6072<|return|>",), 0.0),
    (("<|channel|>analysis<|message|>6072<|return|>",), 0.0),
    (("<|start|>functions.multiply to=assistant<|channel|>commentary<|message|>6072<|end|>",), 0.0)])
def test_only_the_product_as_the_final_message_is_rewarded(env, texts, reward):
    score, = env.score([completion_of(env, *texts)])
    assert (score.reward, score.is_correct) == (reward, reward == 1)


def test_demonstrations_call_as_often_as_they_should_and_are_right_then(env, tokenizer):
    num_calls, num_right, num_guesses, results = 0, 0, 0, 0
    for prompt, completion in (pair for step in range(40) for pair in env.demonstrations(step, 25)):
        parsed = parse_completion(completion, tokenizer)
        text = tokenizer.decode(prompt, keep_special=True)
        a, b = map(int, text.split("user<|message|>")[1].split("<|end|>")[0].split("*"))
        assert not env.is_held_out({"question": f"{a}*{b}"}) and not env.is_held_out({"question": f"{b}*{a}"})
        if parsed.messages[-1].recipient:
            assert completion[-1] == tokenizer.call and parsed.messages[-1].content == f'{{"a": {a}, "b": {b}}}'
            num_calls += 1
        elif "to=assistant" in text:
            assert parsed.final == str(a * b) == text.split("to=assistant<|channel|>commentary<|message|>")[1].split("<|end|>")[0]
            results += 1
        else:
            num_guesses, num_right = num_guesses + 1, num_right + (parsed.final == str(a * b))
    assert num_calls == results and num_calls + num_guesses == 1000
    assert 250 < num_calls < 350 and num_right <= 3


def test_the_tool_multiplies_and_refuses_numbers_without_end(env):
    tool = env.episode(env.eval_prompts()[0], 0)
    assert tool.multiply(69, 88) == 6072
    with pytest.raises(ValueError, match="18 digits"):
        tool.multiply(10**18, 1)


def test_prompts_are_those_of_the_seed_and_step_and_never_held_out(env, tokenizer):
    other = Calculator(tokenizer=tokenizer, seed=1, **SETTINGS)
    questions = [prompt.row["question"] for prompt in env.prompts(3, num_prompts=50)]
    assert questions == [prompt.row["question"] for prompt in env.prompts(3, num_prompts=50)]
    assert questions != [prompt.row["question"] for prompt in other.prompts(3, num_prompts=50)]
    held_out = {prompt.row["question"] for prompt in env.eval_prompts()}
    assert held_out == {prompt.row["question"] for prompt in other.eval_prompts()} and len(held_out) == 256
    assert held_out.isdisjoint(questions)


@pytest.mark.parametrize("key, value", [("digits", 0), ("call_rate", 1.5), ("held_out_fraction", 1), ("num_eval_prompts", 10**6)])
def test_a_value_out_of_range_is_refused_by_name(tokenizer, key, value):
    with pytest.raises(ValueError, match=rf"env.{key}={value}: must lie"):
        Calculator(tokenizer=tokenizer, seed=0, **SETTINGS | {key: value})
