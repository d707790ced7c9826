"""Conversations of data as completions: which tokens are trained on, behind which prompt, and what is refused."""

import json

import pytest

from grpo.batch import pack
from grpo.envs.conversations import Conversations
from grpo.envs.data_files import DataError

KEYWORDS = {"seed": 0, "current_date": "2025-08-05", "reasoning_effort": "low", "max_tokens": 1000}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}}]


@pytest.fixture
def build(tokenizer, tmp_path):
    def make(*rows, **keywords):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        form = {} if {"completion_key", "chosen_key"} & keywords.keys() else {"messages_key": "messages"}
        return Conversations(tokenizer=tokenizer, path=str(tmp_path / "rows.jsonl"), **KEYWORDS | form | keywords)

    return make


def user(text):
    return {"role": "user", "content": text}


def answer(text, thinking=None):
    return {"role": "assistant", "content": text} | ({} if thinking is None else {"thinking": thinking})


def shown(completion, tokenizer) -> list[tuple[str, str]]:
    """Source and text of each segment; of prompts, what follows the system message."""
    texts = [tokenizer.decode(segment.token_ids, keep_special=True) for segment in completion.segments]
    return [(segment.source, text.split("<|end|>", 1)[1] if segment.source == "prompt" else text)
            for segment, text in zip(completion.segments, texts)]


def test_analysis_and_answer_are_trained_on_as_the_model_would_say_them(build, tokenizer):
    completion, = build({"messages": [user("1+1?"), answer("2", "one and one")]}).recorded_completions(0, num_prompts=1)
    assert shown(completion, tokenizer) == [
        ("prompt", "<|start|>user<|message|>1+1?<|end|><|start|>assistant"),
        ("policy", "<|channel|>analysis<|message|>one and one<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>")]


def test_each_turn_is_a_sequence_behind_a_prompt_without_the_earlier_analysis(build, tokenizer):
    row = {"messages": [user("1+1?"), answer("2", "one and one"), user("more"), answer("3", "add one")]}
    completion, = build(row).recorded_completions(0, num_prompts=1)
    assert shown(completion, tokenizer)[2:] == [
        ("prompt", "<|start|>user<|message|>1+1?<|end|><|start|>assistant<|channel|>final<|message|>2<|end|>"
                   "<|start|>user<|message|>more<|end|><|start|>assistant"),
        ("policy", "<|channel|>analysis<|message|>add one<|end|><|start|>assistant<|channel|>final<|message|>3<|return|>")]
    batch = pack([completion], [1.0])
    assert batch.num_rows == 2 and batch.num_sequences == 1
    said = tokenizer.decode(batch.tokens[batch.loss_mask].tolist(), keep_special=True)
    assert said.count("<|return|>") == 2 and "user" not in said
    # of the second prompt only the user's message is new
    text = tokenizer.decode(completion.completion_ids, keep_special=True)
    assert text.count("<|start|>user<|message|>1+1?") == 0 and text.count("<|start|>user<|message|>more") == 1


def test_only_the_last_turn_on_demand(build, tokenizer):
    row = {"messages": [user("1+1?"), answer("2"), user("more"), answer("3")]}
    completion, = build(row, turns="last").recorded_completions(0, num_prompts=1)
    assert [source for source, _ in shown(completion, tokenizer)] == ["prompt", "policy"]
    assert shown(completion, tokenizer)[1][1] == "<|channel|>final<|message|>3<|return|>"


def test_calls_are_trained_on_and_results_are_not(build, tokenizer):
    call = {"role": "assistant", "thinking": "call", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
    row = {"messages": [user("go"), call, {"role": "tool", "name": "add", "content": 2}, answer("2")], "tools": TOOLS}
    completion, = build(row).recorded_completions(0, num_prompts=1)
    assert shown(completion, tokenizer)[1:] == [
        ("policy", "<|channel|>analysis<|message|>call<|end|>"
                   '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>'),
        ("env", "<|start|>functions.add to=assistant<|channel|>commentary<|message|>2<|end|><|start|>assistant"),
        ("policy", "<|channel|>final<|message|>2<|return|>")]


def test_prompt_and_completion_may_be_texts(build, tokenizer):
    env = build({"prompt": "1+1?", "completion": "2"}, prompt_key="prompt", completion_key="completion")
    completion, = env.recorded_completions(0, num_prompts=1)
    assert shown(completion, tokenizer)[1] == ("policy", "<|channel|>final<|message|>2<|return|>")
    assert completion.reward is None


@pytest.mark.parametrize("row", [
    {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
    {"prompt": [user("1+1?")], "chosen": [answer("2")], "rejected": [answer("3")]},
    {"chosen": [user("1+1?"), answer("2")], "rejected": [user("1+1?"), answer("3")]}])
def test_a_pair_is_a_group_of_two_behind_one_prompt(build, tokenizer, row):
    pair = build(row, prompt_key="prompt", chosen_key="chosen", rejected_key="rejected").recorded_completions(0, num_prompts=1)
    assert [(c.prompt.id, c.sample, c.reward) for c in pair] == [(0, 0, 1.0), (0, 1, 0.0)]
    assert pair[0].segments[0].token_ids == pair[1].segments[0].token_ids
    assert [shown(c, tokenizer)[1][1] for c in pair] == [f"<|channel|>final<|message|>{n}<|return|>" for n in (2, 3)]


def test_rows_come_once_an_epoch_in_an_order_of_the_seed(build):
    rows = [{"messages": [user(f"{i}?"), answer(str(i))]} for i in range(6)]
    env = build(*rows)

    def seen(env, steps):
        return [c.prompt.row["_source"] for step in steps for c in env.recorded_completions(step, num_prompts=3)]

    first, second = seen(env, (0, 1)), seen(env, (2, 3))
    assert sorted(first) == sorted(second) == sorted(row.source for row in env.rows) and first != second
    assert seen(build(*rows), (2, 3)) == second
    assert seen(build(*rows, seed=1), (0, 1)) != first


def test_held_out_rows_are_not_trained_on_and_do_not_depend_on_the_seed(build):
    rows = [{"messages": [user(f"{i}?"), answer(str(i))]} for i in range(40)]
    env, other = build(*rows, held_out_fraction=0.25), build(*rows, held_out_fraction=0.25, seed=5)
    held_out = {row.source for row in env.eval_rows}
    assert 3 <= len(held_out) <= 20 and held_out == {row.source for row in other.eval_rows}
    assert not held_out & {row.source for row in env.rows} and len(env.rows) + len(held_out) == 40
    assert len(env.held_out_completions()) == len(held_out)


@pytest.mark.parametrize("row, keywords, complaint", [
    ({"messages": [user("1+1?")]}, {}, r"rows.jsonl:1: the conversation must end with a turn of the assistant"),
    ({"text": "x"}, {}, r"rows.jsonl:1: no column 'messages', which env.messages_key names; .*completion_key; columns: text"),
    ({"messages": [user("1+1?"), answer("2")]}, {"max_tokens": 9},
     r"rows.jsonl:1: a sequence of \d+ tokens, more than env.max_tokens=9"),
    ({"chosen": [user("a"), answer("2")], "rejected": [user("b"), answer("2")]},
     {"chosen_key": "chosen", "rejected_key": "rejected"},
     "'chosen' and 'rejected' differ before their last turn")])
def test_rows_that_cannot_be_used_are_named(build, row, keywords, complaint):
    with pytest.raises(DataError, match=complaint):
        build(row, **keywords)


@pytest.mark.parametrize("keywords, key", [
    ({"turns": "first"}, "env.turns='first'"), ({"on_long": "cut"}, "env.on_long='cut'"),
    ({"held_out_fraction": 1.0}, "env.held_out_fraction=1.0"), ({"completion_key": "c", "messages_key": "m"}, "env.messages_key"),
    ({"chosen_key": "c"}, "env.chosen_key and env.rejected_key"), ({"completion_key": "c"}, "env.prompt_key: required")])
def test_wrong_keywords_are_named(build, keywords, key):
    with pytest.raises(ValueError, match=key):
        build({"messages": [user("1+1?"), answer("2")]}, **keywords)
