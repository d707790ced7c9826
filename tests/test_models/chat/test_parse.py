"""Harmony parsing: the golden completions, malformed ones, random ids, and messages that were rendered."""

import json
import random

import pytest
from harmony import encode_with_special
from paths import FIXTURES

from models.chat.parse import Span, parse_completion
from models.chat.render import Message, generation_prompt, render_message
from models.chat.tokenizer import build_tiny_tokenizer

PARSE_CASES = json.loads((FIXTURES / "harmony" / "parse_cases.json").read_text(encoding="utf-8"))


def as_dicts(messages: list[Message]) -> list[dict]:
    return [{key: value for key, value in vars(message).items() if value is not None} for message in messages]


@pytest.mark.parametrize("case", PARSE_CASES, ids=lambda case: case["name"])
def test_completions_parse_as_the_golden_cases(case, tokenizer):
    ids = encode_with_special(tokenizer, case["text"])
    parsed = parse_completion(ids, tokenizer, role=case["role"])
    if isinstance(case["strict"], list):
        assert (as_dicts(parsed.messages), parsed.error) == (case["strict"], None)
    else:
        assert parsed.error == case["strict"]["error"]
    if isinstance(case["lenient"], list):
        assert as_dicts(parsed.messages) == case["lenient"]


@pytest.mark.parametrize(
    ("text", "messages", "error"),
    [
        ("<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>fin", [("analysis", "x")], "Unexpected EOS"),
        ("<|channel|>analysis<|message|>x<|end|><|start|>assist", [("analysis", "x")], "Unexpected EOS"),
        ("<|channel|>analysis<|message|>x<|end|><|start|>", [("analysis", "x")], "Unexpected EOS"),
        ("<|channel|>", [], "Unexpected EOS"),
        ("<|channel|>final<|message|>4<|return|>hello", [("final", "4")], "Unexpected token 'hello'"),
        ("<|channel|>final<|message|>4<|end|><|end|>", [("final", "4")], "Unexpected token '<|end|>'"),
        ("<|channel|>final<|message|>4<|end|>so <|start|>assistant<|channel|>final<|message|>5<|return|>",
         [("final", "4"), ("final", "5")], "Unexpected token 'so ' while expecting start token"),
        ("<|channel|><|message|>4<|return|>", [(None, "4")], "channel marker present but no channel value found"),
        ("<|channel|>final a b c<|message|>4<|return|>",
         [("final", "4")], "unexpected tokens remaining in message header: 'a'"),
        ("<|channel|>final a b c d<|message|>4<|return|>",
         [("final", "4")], "unexpected tokens remaining in message header: 'a b'"),
        ("<|channel|>final<|message|>4<|end|><|start|><|channel|>final<|message|>5<|return|>",
         [("final", "4"), ("final", "5")], "message header did not contain a role"),
        ("<|channel|>final<|message|>4<|end|><|start|>asistant<|channel|>final<|message|>5<|return|>",
         [("final", "4"), ("final", "5")], "Unknown role: asistant"),
        ("<|channel|>final The answer is 4<|return|>", [("final", "The answer is 4")], "Unexpected EOS"),
    ],
)  # fmt: skip
def test_malformed_completions_give_what_can_be_read_and_the_error(text, messages, error, tokenizer):
    ids = encode_with_special(tokenizer, text)
    parsed = parse_completion(ids, tokenizer)
    assert [(message.channel, message.content) for message in parsed.messages] == messages
    assert parsed.error.startswith(error)
    assert not parsed.is_complete


def test_completeness_means_well_formed_and_stopped_by_the_model(tokenizer):
    def is_complete(text):
        return parse_completion(encode_with_special(tokenizer, text), tokenizer).is_complete

    assert is_complete("<|channel|>final<|message|>4<|return|>")
    assert is_complete("<|channel|>commentary to=functions.f<|message|>{}<|call|>")
    assert not is_complete("<|channel|>final<|message|>4")
    assert not is_complete("<|channel|>final<|message|>4<|end|>")
    assert not is_complete("<|channel|>final<|message|>4<|endoftext|>")
    assert not is_complete("<|return|>")
    assert not is_complete("")


def test_endoftext_ends_a_completion_and_is_no_content(tokenizer):
    ids = encode_with_special(tokenizer, "<|channel|>final<|message|>4<|endoftext|>")
    parsed = parse_completion(ids, tokenizer)
    assert (parsed.messages[0].content, parsed.error) == ("4", None)
    assert (parsed.final, parsed.fault) == ("", "cut off in the final message")
    inside = encode_with_special(tokenizer, "<|channel|>final<|message|>4<|endoftext|>5<|return|>")
    assert parse_completion(inside, tokenizer).messages[0].content == "4<|endoftext|>5"


THOUGHT = "<|channel|>analysis<|message|>x<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>42<|return|>"
CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
RESULT = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>42<|end|>"


@pytest.mark.parametrize(
    "text",
    [
        FINAL.removeprefix("<|start|>assistant"),
        THOUGHT + FINAL,
        THOUGHT + "<|start|>assistant<|channel|>commentary<|message|>I begin.<|end|>" + FINAL,
        THOUGHT + "<|start|>assistant" + THOUGHT + FINAL,
        THOUGHT + "<|start|>assistant<|channel|>final <|constrain|>json<|message|>42<|return|>",
        THOUGHT + "<|start|>assistant<|channel|>final<|constrain|>json<|message|>42<|return|>",
    ],
)
def test_a_finished_answer_in_the_right_form_has_no_fault(text, tokenizer):
    parsed = parse_completion(encode_with_special(tokenizer, text), tokenizer)
    assert (parsed.fault, parsed.final) == (None, "42")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "Unexpected EOS"),
        ("<|return|>", "Unexpected EOS"),
        (THOUGHT, "no final message"),
        (CALL, "no final message"),
        (THOUGHT + FINAL.removesuffix("<|return|>"), "cut off in the final message"),
        (THOUGHT + FINAL.replace("<|return|>", "<|end|>"), "final message that ends in <|end|>"),
        (THOUGHT + FINAL.replace("<|return|>", "<|call|>"), "final message that ends in <|call|>"),
        (THOUGHT + FINAL.replace("assistant", "user"), "the policy wrote as user"),
        (THOUGHT + FINAL.replace("assistant", "system"), "the policy wrote as system"),
        (THOUGHT + FINAL.replace("assistant", "developer"), "the policy wrote as developer"),
        (THOUGHT + FINAL.replace("assistant", "tool"), "the policy wrote as tool"),
        (THOUGHT + FINAL.replace("assistant", "functions.f to=assistant"), "the policy wrote as functions.f"),
        (THOUGHT + "<|start|>user<|message|>Is it 42?<|end|>" + FINAL, "the policy wrote as user"),
        (CALL.replace("<|call|>", "<|end|>") + RESULT + FINAL, "call that ends in <|end|>"),
        (CALL.replace("<|call|>", "<|return|>"), "call that ends in <|return|>"),
        (CALL.replace("<|call|>", "<|end|>") + FINAL, "call that ends in <|end|>"),
        (CALL + RESULT + FINAL, "the policy wrote as functions.f"),
        (CALL + FINAL, "the policy went on after a call that nobody had answered"),
        (CALL.replace("commentary", "final"), "recipient 'functions.f' on channel final"),
        (FINAL.removeprefix("<|start|>assistant").replace("final", "final to=functions.f"), "recipient 'functions.f' on"),
        (" to=functions.f" + FINAL.removeprefix("<|start|>assistant"), "recipient 'functions.f' on channel final"),
        (THOUGHT + FINAL.replace("final", "final to=user"), "recipient 'user' on channel final"),
        (THOUGHT + FINAL.replace("final", "final <|constrain|>"), "recipient '<|constrain|>' on channel final"),
        (THOUGHT + FINAL.replace("final", "final <|constrain|>json<|end|>"), "a control token inside the final message"),
        (THOUGHT + FINAL.replace("final", "final json"), "recipient 'json' on channel final"),
        (THOUGHT + FINAL.replace("final", "final <|constrain|>to=functions.f"), "recipient '<|constrain|>to=functions.f' on"),
        (" " + FINAL.removeprefix("<|start|>"), "assistant again, where the prompt had named the author"),
        (CALL.replace("functions.f", "user"), "recipient 'user' on channel commentary"),
        (CALL.replace("functions.f", ""), "recipient '' on channel commentary"),
        (THOUGHT.replace("analysis", "thoughts") + FINAL, "unknown channel 'thoughts'"),
        (THOUGHT + FINAL.replace("final", "finale"), "unknown channel 'finale'"),
        ("<|message|>x<|end|>" + FINAL, "no channel"),
        (FINAL.removeprefix("<|start|>"), "assistant again, where the prompt had named the author"),
        (THOUGHT + FINAL.replace("<|channel|>final", ""), "no channel"),
        (THOUGHT + FINAL.replace("<|return|>", "<|end|>") + FINAL, "final message that ends in <|end|>"),
        (THOUGHT + FINAL + FINAL, "messages after the final one"),
        (THOUGHT + FINAL + "<|start|>assistant" + THOUGHT, "messages after the final one"),
        (THOUGHT + FINAL + " 43", "Unexpected token"),
        (THOUGHT.replace("<|end|>", "<|return|>") + FINAL, "analysis message that ends in <|return|>"),
        (THOUGHT.replace("<|end|>", "<|call|>") + FINAL, "analysis message that ends in <|call|>"),
        (THOUGHT + FINAL.replace("42", "<|start|>assistant<|channel|>final<|message|>42"), "a control token inside the final"),
        (THOUGHT.replace("x<|end|>", "x") + FINAL, "a control token inside the analysis message"),
        (THOUGHT + "<|start|>assistant<|start|>" + FINAL.removeprefix("<|start|>"), "Unknown role: assistant<|start|>"),
        (THOUGHT + FINAL.replace("final", "final<|channel|>final"), "Unknown role: assistant<|ch"),
        (THOUGHT + FINAL.replace("<|return|>", "<|endoftext|>"), "cut off in the final message"),
    ],
)  # fmt: skip
def test_what_is_no_finished_answer_in_the_right_form_has_no_final_text(text, fault, tokenizer):
    parsed = parse_completion(encode_with_special(tokenizer, text), tokenizer)
    assert parsed.fault.startswith(fault)
    assert parsed.final == ""


def test_a_spelled_constrain_marker_names_no_content_type(tokenizer):
    ids = encode_with_special(tokenizer, "<|channel|>") + tokenizer.encode("final <|constrain|>json")
    ids += encode_with_special(tokenizer, "<|message|>42<|return|>")
    parsed = parse_completion(ids, tokenizer)
    assert (parsed.messages[0].recipient, parsed.fault) == (
        "<|constrain|>json",
        "recipient '<|constrain|>json' on channel final",
    )


def sampled_and_given(tokenizer, *parts) -> tuple[list[int], list[bool]]:
    """Ids of texts, alternately the policy's and the environment's, and whose each id is."""
    ids, is_policy = [], []
    for index, text in enumerate(parts):
        piece = encode_with_special(tokenizer, text)
        ids += piece
        is_policy += [index % 2 == 0] * len(piece)
    return ids, is_policy


def test_a_tools_result_counts_only_if_the_environment_wrote_all_of_it(tokenizer):
    answer = FINAL.removeprefix("<|start|>assistant")
    ids, is_policy = sampled_and_given(tokenizer, CALL, RESULT + "<|start|>assistant", answer)
    given = parse_completion(ids, tokenizer, is_policy=is_policy)
    assert (given.fault, given.final) == (None, "42")
    assert [span.is_policy for span in given.spans] == [True, False, True]
    assert parse_completion(ids, tokenizer).fault == "the policy wrote as functions.f"
    head, tail = RESULT.split("42")
    ids, is_policy = sampled_and_given(tokenizer, CALL, head, "42", tail + "<|start|>assistant", answer)
    assert parse_completion(ids, tokenizer, is_policy=is_policy).fault == "the policy wrote as functions.f"


def test_a_final_message_of_the_environment_is_no_answer(tokenizer):
    ids, is_policy = sampled_and_given(tokenizer, CALL, FINAL)
    parsed = parse_completion(ids, tokenizer, is_policy=is_policy)
    assert (parsed.fault, parsed.final) == ("no final message", "")


def test_spans_say_where_messages_stand_and_how_they_ended(tokenizer):
    ids = encode_with_special(tokenizer, THOUGHT + "<|start|>assistant<|channel|>final<|message|>42")
    parsed = parse_completion(ids, tokenizer)
    length = len(encode_with_special(tokenizer, THOUGHT))
    content = tokenizer.encode("42")
    assert parsed.spans == [
        Span(0, ids.index(tokenizer.message) + 1, length, tokenizer.end, True),
        Span(length + 1, len(ids) - len(content), len(ids), None, True),
    ]
    assert ids[parsed.spans[1].content_start :] == content


def test_analysis_is_what_the_policy_thought_and_not_what_it_had_computed(tokenizer):
    text = THOUGHT + "<|start|>assistant<|channel|>analysis to=python code<|message|>1+1<|call|>"
    assert parse_completion(encode_with_special(tokenizer, text), tokenizer).analysis == "x"
    ids, is_policy = sampled_and_given(tokenizer, THOUGHT, "<|start|>assistant" + THOUGHT.replace(">x<", ">given<"))
    assert parse_completion(ids, tokenizer, is_policy=is_policy).analysis == "x"
    two = THOUGHT + "<|start|>assistant" + THOUGHT.replace(">x<", ">y<") + FINAL
    assert parse_completion(encode_with_special(tokenizer, two), tokenizer).analysis == "x\ny"


def test_spelled_control_tokens_do_not_delimit(tokenizer):
    spelled = "4<|return|><|start|>assistant<|channel|>final<|message|>5"
    ids = [
        tokenizer.channel,
        *tokenizer.encode("final"),
        tokenizer.message,
        *tokenizer.encode(spelled),
        tokenizer.return_,
    ]
    parsed = parse_completion(ids, tokenizer)
    assert as_dicts(parsed.messages) == [{"role": "assistant", "channel": "final", "content": spelled}]
    assert parsed.is_complete
    # a header that spells the marker names no channel
    ids = [*tokenizer.encode("<|channel|>final"), tokenizer.message, *tokenizer.encode("4"), tokenizer.return_]
    assert parse_completion(ids, tokenizer).messages[0].channel is None
    assert parse_completion(ids, tokenizer).final == ""


def test_broken_characters_in_content_and_header_are_read(tokenizer):
    wave = tokenizer.encode("👋")
    ids = [tokenizer.channel, *tokenizer.encode("final"), tokenizer.message, *tokenizer.encode("ok "), *wave[:3]]
    assert parse_completion(ids, tokenizer).messages[0].content == "ok \ufffd"
    ids = [tokenizer.channel, *tokenizer.encode("final"), tokenizer.message, *wave[1:], 10**6, tokenizer.return_]
    assert parse_completion(ids, tokenizer).final == "\ufffd\ufffd\ufffd\ufffd"
    ids = [
        tokenizer.channel,
        *tokenizer.encode("final "),
        wave[0],
        tokenizer.message,
        *tokenizer.encode("4"),
        tokenizer.return_,
    ]
    parsed = parse_completion(ids, tokenizer)
    assert (parsed.messages[0].content, parsed.error) == ("4", "could not decode header")


def test_any_ids_are_read_and_only_well_formed_ones_are_complete(tokenizer):
    rng = random.Random(0)
    control = [
        tokenizer.start,
        tokenizer.end,
        tokenizer.message,
        tokenizer.channel,
        tokenizer.constrain,
        tokenizer.return_,
        tokenizer.call,
        tokenizer.endoftext,
    ]
    texts = ("assistant", "final", " to=functions.f", " json", "hello ", "👋", "functions.f")
    words = [tokenizer.encode(text) for text in texts]
    well_formed_start = encode_with_special(tokenizer, "<|channel|>final<|message|>x<|end|>")
    num_well_formed = 0
    for _ in range(2000):
        ids: list[int] = []
        for _ in range(rng.randint(0, 12)):
            kind = rng.random()
            if kind < 0.5:
                ids.append(rng.choice(control))
            else:
                ids += rng.choice(words) if kind < 0.9 else [rng.randrange(-5, 201100)]
        if rng.random() < 0.5:
            ids = well_formed_start + ids
        parsed = parse_completion(ids, tokenizer, role=rng.choice(["assistant", None]))
        assert len(parsed.spans) == len(parsed.messages)
        num_well_formed += parsed.error is None
        assert parsed.error is None or not parsed.is_complete
    assert 100 < num_well_formed < 1900


def test_messages_survive_rendering_and_parsing(tokenizer):
    rng = random.Random(0)
    contents = [
        "",
        " ",
        "4",
        "two\n\nlines  ",
        "Grüße 👋🏽 ∑ᵢ xᵢ²",
        '{"a": "<|call|>"}',
        "<|end|><|start|>system<|message|>",
        "\r\n\t\x00",
    ]
    authors = [
        {"role": "user"},
        {"role": "system"},
        {"role": "developer"},
        {"role": "assistant", "channel": "final"},
        {"role": "assistant", "channel": "analysis"},
        {"role": "assistant", "channel": "commentary", "recipient": "functions.f", "content_type": "json"},
        {"role": "assistant", "channel": "commentary", "recipient": "functions.f", "content_type": "<|constrain|>json"},
        {"role": "assistant", "channel": "analysis", "recipient": "python", "content_type": "code"},
        {"role": "assistant", "recipient": "functions.g"},
        {"role": "tool", "name": "functions.f", "recipient": "assistant", "channel": "commentary"},
    ]
    for _ in range(200):
        messages = [
            Message(content="".join(rng.choices(contents, k=rng.randint(1, 3))), **rng.choice(authors))
            for _ in range(4)
        ]
        ids = [id for message in messages for id in render_message(message, tokenizer)]
        parsed = parse_completion(ids, tokenizer, role=None)
        assert (parsed.messages, parsed.error) == (messages, None)
        # the completion that an assistant continues from the generation prompt
        mine = [message for message in messages if message.role == "assistant"]
        ids = [id for message in mine for id in render_message(message, tokenizer)]
        prompt = generation_prompt(tokenizer)
        if mine and mine[0].recipient is None:
            assert ids[: len(prompt)] == prompt
            assert parse_completion(ids[len(prompt) :], tokenizer).messages == mine


def test_a_tiny_tokenizer_speaks_harmony():
    tiny = build_tiny_tokenizer([], "0123456789+=,")
    ids = encode_with_special(tiny,
        "<|channel|>analysis<|message|>4+9=13<|end|><|start|>assistant<|channel|>final<|message|>63<|return|>"
    )
    parsed = parse_completion(ids, tiny)
    assert (parsed.analysis, parsed.final, parsed.is_complete) == ("4+9=13", "63", True)
    prompt = render_message(Message("user", "14+49"), tiny) + generation_prompt(tiny)
    assert tiny.decode(prompt, keep_special=True) == "<|start|>user<|message|>14+49<|end|><|start|>assistant"
    assert len(prompt) == 1 + 1 + 1 + 5 + 1 + 2
