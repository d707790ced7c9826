"""The form of openai-harmony: golden messages, conversations and parses that the compiled library made with the real vocabulary,
kept as text. Every field of the format is in them."""

import json

import pytest
from harmony import encode_with_special
from paths import FIXTURES

from models.chat.form import Form
from models.chat.library_form import tools_section
from models.chat.parse import parse_completion
from models.chat.render import (
    Message,
    generation_prompt,
    harmony_messages,
    kept_messages,
    render_message,
    render_prompt,
    system_sections,
)
from models.chat.tools import builtin_sections

GOLDEN = json.loads((FIXTURES / "harmony" / "library.json").read_text(encoding="utf-8"))


def messages_of(case) -> list[Message]:
    """A conversation's messages, their system and developer content as text."""
    has_functions = any("functions" in (message["content"].get("tools") or {})
                        for message in case["messages"] if message["role"] == "developer")
    found = []
    for message in case["messages"]:
        content = message["content"]
        if message["role"] == "system":
            content = system_sections(
                content["model_identity"], content["knowledge_cutoff"], content["current_date"], content["reasoning_effort"],
                content["channels"], builtin_sections(content["builtin_tools"]), has_functions=has_functions)
        elif message["role"] == "developer":
            parts = [] if content.get("instructions") is None else [f"# Instructions\n\n{content['instructions']}"]
            content = "\n\n".join([*parts, *([tools_section(list(content["tools"].values()))] if content.get("tools") else [])])
        found.append(Message(**{**message, "content": content}))
    return found


@pytest.mark.parametrize("case", GOLDEN["conversations"], ids=lambda case: case["name"])
def test_messages_are_written_as_the_library_writes_them(case, tokenizer):
    for message, expected in zip(messages_of(case), case["texts"], strict=True):
        ids = render_message(message, tokenizer)
        assert tokenizer.decode(ids, keep_special=True) == expected
        if "<|" not in message.content:
            assert ids == encode_with_special(tokenizer, expected)


@pytest.mark.parametrize("case", GOLDEN["conversations"], ids=lambda case: case["name"])
def test_conversations_have_the_messages_that_the_library_keeps(case, tokenizer):
    messages = messages_of(case)
    kept = [index for index, is_kept in enumerate(kept_messages(messages, Form.library)) if is_kept]
    for mode in ("completion", "training"):
        assert kept == case["renders"][mode]["messages"]
    for mode in ("completion_keep", "training_keep"):
        assert case["renders"][mode]["messages"] == list(range(len(messages)))
    assert len(case["renders"]["completion"]["append"]) == 2  # <|start|>assistant
    ids = render_prompt([messages[index] for index in kept], tokenizer)
    expected = "".join(case["texts"][index] for index in kept) + "<|start|>assistant"
    assert tokenizer.decode(ids, keep_special=True) == expected


@pytest.mark.parametrize("case", GOLDEN["parses"], ids=lambda case: case["name"])
def test_completions_are_read_as_the_library_reads_them(case, tokenizer):
    parsed = parse_completion(encode_with_special(tokenizer, case["text"]), tokenizer, role=case["role"])
    if "error" in case:
        words = case["error"].split(" 200")[0].split(" Some(")[0]  # ids and Rust's quotes are spelled here
        assert parsed.error is not None and parsed.error.startswith(words)
        return
    assert parsed.error is None
    found = [{key: value for key, value in vars(message).items() if value is not None} for message in parsed.messages]
    assert found == case["messages"]


def test_parts_are_encoded_one_by_one_and_a_broadcast_names_no_recipient(tokenizer):
    whole, parts = (Message("assistant", content, "commentary", "all") for content in ("ab", ["a", "", "b"]))
    start, ends = render_message(whole, tokenizer), render_message(parts, tokenizer)
    assert tokenizer.decode(start, keep_special=True) == "<|start|>assistant<|channel|>commentary<|message|>ab<|call|>"
    assert ends[-3:] == [*tokenizer.encode("a"), *tokenizer.encode("b"), tokenizer.call]


CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {
    "x": {"type": "integer", "default": 3}, "y": {"type": "string", "enum": ["a"], "default": "a"}}}}
CHAT = [{"role": "system", "content": "i"}, {"role": "user", "content": "q"},
        {"role": "assistant", "thinking": "t", "tool_calls": [CALL]}, {"role": "tool", "content": "r"},
        {"role": "assistant", "thinking": "u", "content": "a"}, {"role": "user", "content": "s"},
        {"role": "assistant", "thinking": "v", "content": "b"}, {"role": "user", "content": "w"}]


@pytest.mark.parametrize(("form", "developer", "rest"), [
    (Form.hub, "x?: number, // default: 3,\ny?: \"a\", // default: a,\n",
     ['{"x": 1}', '"r"', "a<|end|><|start|>user<|message|>s<|end|><|start|>assistant<|channel|>final<|message|>b"]),
    (Form.library, "x?: number, // default: 3\ny?: \"a\", // default: a\n",
     ['{"x":1}', "r", "a<|end|><|start|>user<|message|>s<|end|><|start|>assistant<|channel|>analysis<|message|>v<|end|>"
      "<|start|>assistant<|channel|>final<|message|>b"])])
def test_a_conversation_of_an_api_in_both_forms(form, developer, rest, tokenizer):
    ids = render_prompt(harmony_messages(CHAT, current_date="2025-06-28", tools=[TOOL], form=form), tokenizer)
    text = tokenizer.decode(ids, keep_special=True)
    arguments, result, answers = rest
    opening = "# Instructions\n\ni\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n// d\ntype f = (_: {\n"
    assert f"{opening}{developer}}}) => any;" in text
    assert text.split("<|message|>q<|end|>")[1] == (
        f"<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{arguments}<|call|>"
        f"<|start|>functions.f to=assistant<|channel|>commentary<|message|>{result}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{answers}<|end|>"
        "<|start|>user<|message|>w<|end|><|start|>assistant")
    assert ids[-len(generation_prompt(tokenizer)):] == generation_prompt(tokenizer)
