"""Conversations of a data set: tool calls, tools, content parts and template settings of its rows; which text answers."""

import json
import re

import pytest
import question_data
from harmony import encode_with_special
from question_data import write

from grpo.batch import Completion, Segment
from grpo.envs.data_files import DataError

SETTINGS = {"prompt_key": "prompt", "held_out_fraction": 0.5, "max_prompt_tokens": 2000}


def make(tokenizer, **changes):
    return question_data.make(tokenizer, **SETTINGS | changes)


def call(arguments, **fields):
    function = {"name": "get_weather", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}], **fields}


def asked(question, *turns):
    return [{"role": "user", "content": question}, *turns]


def first_prompt(tokenizer, tmp_path, build, **columns):
    """The text of a prompt of a file whose row n has the messages build(n)."""
    path = write(tmp_path, [{"prompt": build(n), "answer": str(n), **columns} for n in range(9)])
    env = make(tokenizer, path=path)
    return tokenizer.decode(env.eval_prompts()[0].token_ids, keep_special=True)


RESULT = {"role": "tool", "tool_call_id": "c1", "content": {"temp": 20}}
CALL_AND_RESULT = (
    '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "SF"}<|call|>'
    '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>{"temp": 20}<|end|><|start|>assistant'
)


@pytest.mark.parametrize(
    "turn",
    [
        call('{"city": "SF"}', content=None),
        call('{"city":"SF"}', content=""),
        call({"city": "SF"}),
        call({"city": "SF"}, content=[], thinking=None, refusal=None, name="agent"),
    ],
)
def test_tool_call_turns_of_a_row_render_as_apis_return_them(tokenizer, tmp_path, turn):
    assert first_prompt(tokenizer, tmp_path, lambda n: asked(f"{n}?", turn, RESULT)).endswith("<|end|>" + CALL_AND_RESULT)


def test_content_parts_and_a_system_beside_a_developer_message_are_rendered(tokenizer, tmp_path):
    def build(n):
        parts = [{"type": "text", "text": f"What is {n}"}, {"type": "text", "text": "+0?"}]
        return [
            {"role": "system", "content": "You are X"},
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": parts},
        ]

    text = first_prompt(tokenizer, tmp_path, build)
    assert "# Instructions\n\nYou are X\n\nBe brief\n\n<|end|>" in text
    assert re.search(r"<\|start\|>user<\|message\|>What is \d\+0\?<\|end\|>", text)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "2"}, {"type": "text", "text": "0"}], '"20"'),
        ([{"type": "image", "text": "2"}], '[{"type": "image", "text": "2"}]'),
        ([2, 0], "[2, 0]"),
    ],
)
def test_a_tools_result_in_text_parts_is_their_text_and_other_lists_are_json(tokenizer, tmp_path, content, text):
    found = first_prompt(tokenizer, tmp_path, lambda n: asked(f"{n}?", call({}), RESULT | {"content": content}))
    assert found.endswith(f"<|channel|>commentary<|message|>{text}<|end|><|start|>assistant")


WEATHER = {
    "name": "get_weather",
    "description": "d",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "day": None}},
}


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": WEATHER}],
        [WEATHER],
        json.dumps([{"type": "function", "function": WEATHER}]),
        [json.dumps(WEATHER)],
    ],
)
def test_a_tools_column_is_declared_in_the_prompt(tokenizer, tmp_path, tools):
    text = first_prompt(tokenizer, tmp_path, lambda n: asked(f"{n}?"), tools=tools)
    assert "\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>" in text
    assert text.split("<|start|>developer<|message|>")[1].startswith(
        "# Tools\n\n## functions\n\nnamespace functions {\n\n// d\ntype get_weather = (_: {\ncity?: string,\n}) => any;\n\n"
        "} // namespace functions<|end|><|start|>user"
    )


@pytest.mark.parametrize("form", [dict, json.dumps])
def test_a_chat_template_kwargs_column_is_honoured(tokenizer, tmp_path, form):
    settings = {
        "reasoning_effort": "high",
        "model_identity": "You are Q.",
        "builtin_tools": ["python"],
        "current_date": "2031-02-03",
        "enable_thinking": None,
    }
    text = first_prompt(tokenizer, tmp_path, lambda n: asked(f"{n}?"), chat_template_kwargs=form(settings), tools=[])
    assert text.startswith("<|start|>system<|message|>You are Q.\n")
    assert "\nCurrent date: 2031-02-03\n\nReasoning: high\n\n# Tools\n\n## python\n\n" in text
    assert "<|start|>developer" not in text


@pytest.mark.parametrize(
    ("prompt", "columns", "words"),
    [
        (asked("a"), {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs has 'enable_thinking', which"),
        (asked("a"), {"chat_template_kwargs": {"reasoning_effort": "max"}}, "reasoning_effort is 'max'; allowed: low"),
        (asked("a"), {"chat_template_kwargs": [1]}, "chat_template_kwargs is a list"),
        (asked("a"), {"chat_template_kwargs": {"builtin_tools": "python"}}, "builtin_tools is 'python'; allowed: browser"),
        (asked("a"), {"tools": "hammer"}, "tools is text that is no JSON"),
        (asked("a"), {"tools": [{"type": "web_search"}]}, "tools[0] must be"),
        (asked("a"), {"tools": [{"name": "f", "parameters": {"properties": [1]}}]}, "tools[0] (f) has parameters that are no"),
        (asked("a", {"role": "system", "content": "late"}, *asked("b")), {}, "messages[1] has role 'system' and is left out"),
        (asked("a", call({}) | {"tool_calls": [{"name": "f", "arguments": {}}] * 2}, RESULT), {}, "2 calls and only the"),
        (asked("a", call("not JSON"), RESULT), {}, "messages[1].tool_calls[0].arguments is text that is no JSON"),
        (asked("a", call("[1]"), RESULT), {}, "messages[1].tool_calls[0].arguments is a list"),
        (asked("a", call({}), RESULT | {"tool_call_id": "c2"}), {}, "messages[2].tool_call_id is 'c2', but the call"),
        (asked("a", call({}), RESULT | {"name": "g"}), {}, "messages[2].name is 'g', but the call before it is functions.get"),
        (asked("a", {"role": "assistant", "content": "b"}), {}, "the prompt ends with a message of the assistant"),
        (asked("a", {"role": "assistant", "content": "b", "function_call": {"name": "f"}}), {}, "messages[1].function_call"),
        (asked(" "), {}, "the prompt is empty"),
        (json.dumps(asked("a")), {}, "the prompt is messages written as text"),
        (str(asked("a")), {}, "the prompt is messages written as text"),
        (asked("a", *asked("b\ud800")), {}, "messages[1] cannot be encoded: the user message's content holds half of a"),
    ],
)
def test_what_cannot_be_rendered_is_named_by_line_and_message(tokenizer, tmp_path, prompt, columns, words):
    path = write(tmp_path, [{"prompt": asked("fine?"), "answer": "1"}, {"prompt": prompt, "answer": "1", **columns}])
    with pytest.raises(DataError) as caught:
        make(tokenizer, path=path)
    assert str(caught.value).startswith(f"{path}:2: ") and words in str(caught.value)


def test_rows_that_differ_in_their_tools_only_are_different_prompts(tokenizer, tmp_path):
    tools = (WEATHER, WEATHER | {"name": "get_time"})
    same = [{"prompt": asked("same?"), "answer": "1", "tools": [tool]} for tool in tools]
    others = write(tmp_path, [{"prompt": asked("other?"), "answer": "1"}], "eval.jsonl")
    env = make(tokenizer, path=write(tmp_path, same), eval_path=others, held_out_fraction=None)
    assert len(env.train_rows) == 2


# --- the text that answers ------------------------------------------------------------------------------------------

CALL = "<|channel|>commentary to=functions.f json<|message|>{}"
GIVEN = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>5<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>5<|return|>"


@pytest.mark.parametrize(
    ("pieces", "is_answer"),
    [
        ([("policy", FINAL)], True),
        ([("policy", FINAL.replace("final", "final <|constrain|>json"))], True),
        ([("policy", CALL + "<|call|>"), ("env", GIVEN), ("policy", FINAL)], True),
        ([("policy", CALL + "<|call|>" + GIVEN + FINAL)], False),
        ([("policy", CALL + "<|end|>" + GIVEN + FINAL)], False),
        ([("policy", "<|channel|>analysis<|message|>x<|end|><|start|>user" + FINAL)], False),
        ([("policy", FINAL.replace("final", "final to=functions.f"))], False),
        ([("policy", FINAL.replace("<|return|>", "<|call|>"))], False),
        ([("policy", FINAL.replace("<|return|>", "<|end|><|start|>assistant") + FINAL)], False),
        ([("policy", FINAL.removesuffix("<|return|>"))], False),
    ],
)
def test_match_format_reward_functions_and_log_agree_on_the_final_text(tokenizer, tmp_path, pieces, is_answer):
    file = tmp_path / "seen.py"
    file.write_text("def said(row, text):\n    return {'score': 0.0, 'chars': len(text)}\n")
    env = make(
        tokenizer,
        path=write(tmp_path, [{"prompt": f"{n} of 5?", "answer": "5"} for n in range(9)]),
        format_reward=0.25,
        rewards=[{"fn": f"{file}:said"}],
    )
    prompt = env.prompts(0, num_prompts=1)[0]
    segments = [Segment(encode_with_special(tokenizer, text), source) for source, text in pieces]
    completion = Completion(prompt, 0, [Segment(prompt.token_ids, "prompt"), *segments], "stop")
    score = env.score([completion])[0]
    assert (score.reward, score.is_correct, score.metrics["said/chars"]) == ((1.25, True, 1) if is_answer else (0, False, 0))
    described = env.describe(completion)
    assert described["final"] == ("5" if is_answer else "")
    assert (described["fault"] is None) == is_answer
