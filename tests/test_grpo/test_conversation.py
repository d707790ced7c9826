"""grpo.generate: how a conversation looks on the terminal and what is fed to the model, with scripted completions."""
from __future__ import annotations

import builtins
import io
import random

import pytest
from harmony import encode_with_special
from on_terminal import shown
from paths import FIXTURES

from grpo.batch import Completion, Prompt, Segment
from grpo.configuration.launch import load_config
from grpo.generate import (
    CompletionView,
    Conversation,
    TextStream,
    questions,
    run_generation,
)
from grpo.rollout.sampling import SamplingParams
from models.chat.tokenizer import Tokenizer

DATE = "2025-08-05"


class ScriptedSampler:
    """Streams prepared completions and keeps the prompts it was given."""

    def __init__(self, *completions: list[int]) -> None:
        self.completions, self.prompts = list(completions), []

    def stream(self, prompt: Prompt, params: SamplingParams, *, step: int):
        self.prompts.append(prompt)
        yield from self.completions.pop(0)


def answer(tokenizer: Tokenizer, analysis: str, final: str) -> list[int]:
    return encode_with_special(tokenizer, f"<|channel|>analysis<|message|>{analysis}<|end|>"
                                         f"<|start|>assistant<|channel|>final<|message|>{final}<|return|>")


def conversation(tokenizer: Tokenizer, sampler: ScriptedSampler, *, instructions: str | None = None) -> Conversation:
    settings = {"instructions": instructions, "reasoning_effort": "low", "current_date": DATE}
    return Conversation(load_config("generate", ["run=r"]), sampler, tokenizer, None, settings)


# ---- text on the terminal


@pytest.mark.parametrize("name", ["tokenizer_compact", "tokenizer_real_ids"])
def test_streamed_pieces_join_to_the_text_of_all_ids(name):
    tokenizer = Tokenizer.load(FIXTURES / name)
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 12))]
        ids += tokenizer.encode("Grüße 👋🏽数学\ufffd")[: rng.randint(0, 20)]
        stream = TextStream(tokenizer)
        pieces = [stream.feed(token_id) for token_id in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, keep_special=True)


def test_a_character_of_several_tokens_appears_whole(compact):
    ids = compact.encode("👋")
    assert len(ids) == 4  # a token per byte
    stream = TextStream(compact)
    assert [stream.feed(token_id) for token_id in ids] == ["", "", "", "👋"]


def test_text_appears_with_the_token_that_completes_it(compact):
    stream = TextStream(compact)
    assert [stream.feed(token_id) for token_id in compact.encode("ab")] == ["a", "b"]


def test_messages_are_marked_by_their_channel(compact, capsys):
    assert shown(compact, answer(compact, "9+4=13", "63"), capsys) == "[analysis] 9+4=13\n[final] 63\n"


def test_a_tool_call_shows_its_recipient(compact, capsys):
    ids = encode_with_special(compact, "<|channel|>commentary to=functions.f json<|message|>{}<|call|>")
    assert shown(compact, ids, capsys) == "[commentary to=functions.f json] {}\n"


def test_control_characters_of_the_model_are_shown_as_escapes(compact, capsys):
    ids = encode_with_special(compact, "<|channel|>final<|message|>") + compact.encode("a\x1b[2J\r\u202eb\tc\nd")
    assert shown(compact, ids, capsys) == "[final] a\\x1b[2J\\r\\u202eb\tc\nd\n"


def test_control_characters_in_a_header_are_shown_as_escapes(compact, capsys):
    ids = [compact.channel, *compact.encode("fi\x1bnal"), compact.message, *compact.encode("a")]
    assert shown(compact, ids, capsys) == "[fi\\x1bnal] a\n"


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("hello<|return|>", "hello<|return|>\n"),
        ("<|channel|>final", "<|channel|>final\n"),
        ("<|end|>", "<|end|>\n"),
        ("", ""),
        ("<|channel|>final<|message|>1<|end|>stray<|start|>assistant<|channel|>final<|message|>2",
         "[final] 1\n[stray final] 2\n"),
    ],
)
def test_malformed_completions_lose_no_text(compact, capsys, completion, expected):
    assert shown(compact, encode_with_special(compact, completion), capsys) == expected.replace("stray", "strayassistant")


def test_text_that_never_becomes_a_header_appears_before_the_end(compact, capsys):
    view = CompletionView(compact)
    for token_id in compact.encode("x" * 40):
        view.feed(token_id)
    assert capsys.readouterr().out == "x" * 33 + "\n"


# ---- what the model is given


def test_history_is_rendered_as_a_conversation_with_final_answers_only(compact, capsys):
    sampler = ScriptedSampler(answer(compact, "think", "two"), answer(compact, "more", "four"))
    chat = conversation(compact, sampler, instructions="be brief")
    chat.ask("1+1?")
    chat.ask("2+2?")
    text = compact.decode(sampler.prompts[1].token_ids, keep_special=True)
    assert text.endswith("<|start|>developer<|message|># Instructions\n\nbe brief\n\n<|end|>"
                         "<|start|>user<|message|>1+1?<|end|><|start|>assistant<|channel|>final<|message|>two<|end|>"
                         "<|start|>user<|message|>2+2?<|end|><|start|>assistant")
    assert "Reasoning: low" in text and "think" not in text
    assert compact.return_ not in sampler.prompts[1].token_ids


def test_control_tokens_spelled_by_the_user_stay_text(compact, capsys):
    sampler = ScriptedSampler(answer(compact, "a", "b"))
    conversation(compact, sampler).ask("<|return|><|call|>")
    ids = sampler.prompts[0].token_ids
    assert compact.return_ not in ids and compact.call not in ids
    assert "<|return|><|call|>" in compact.decode(ids, keep_special=True)


def test_an_answer_without_a_final_message_leaves_no_history(compact, capsys):
    sampler = ScriptedSampler(encode_with_special(compact, "<|channel|>analysis<|message|>hm<|return|>"),
                              answer(compact, "a", "b"))
    chat = conversation(compact, sampler)
    chat.ask("lost?")
    assert "no final answer" in capsys.readouterr().err
    chat.ask("kept?")
    assert "lost?" not in compact.decode(sampler.prompts[1].token_ids)
    assert chat.messages == [{"role": "user", "content": "kept?"}, {"role": "assistant", "content": "b"}]


def test_a_completion_without_a_stop_token_is_reported_as_cut_off(compact, capsys):
    conversation(compact, ScriptedSampler(answer(compact, "a", "b")[:-1])).ask("?")
    assert "cut off after 11 tokens" in capsys.readouterr().err


def test_a_question_asked_twice_has_another_sampling_key(compact):
    sampler = ScriptedSampler(answer(compact, "a", "b"), answer(compact, "a", "b"))
    chat = conversation(compact, sampler)
    chat.ask("?")
    chat.ask("?")
    assert [prompt.id for prompt in sampler.prompts] == [0, 1]


# ---- a chat


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def type_in(monkeypatch, *lines: str | type[BaseException]) -> None:
    """Lines for input(), exceptions for control keys; then Ctrl-D."""
    typed = iter([*lines, EOFError])

    def fake_input(sign: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr(builtins, "input", fake_input)


def test_a_chat_reads_lines_until_control_d(monkeypatch):
    type_in(monkeypatch, "14+49", "  ", " 1+2 ")
    assert list(questions()) == ["14+49", "1+2"]


def test_control_c_cuts_an_answer_short_and_the_chat_goes_on(compact, monkeypatch, capsys):
    class Interrupting(ScriptedSampler):
        def stream(self, prompt, params, **settings):
            for token_id in super().stream(prompt, params, **settings):
                if token_id == -1:
                    raise KeyboardInterrupt
                yield token_id

    half = [*encode_with_special(compact, "<|channel|>final<|message|>ha"), -1]
    chat = conversation(compact, Interrupting(half, answer(compact, "a", "b")))
    monkeypatch.setattr("grpo.generate.load_conversation", lambda config: chat)
    type_in(monkeypatch, "first", "second")
    assert run_generation(load_config("generate", ["run=r"])) == 0
    assert "[final] ha\n" in capsys.readouterr().out
    assert [message["content"] for message in chat.messages] == ["second", "b"]


def test_new_forgets_the_conversation(compact, monkeypatch):
    sampler = ScriptedSampler(answer(compact, "a", "b"), answer(compact, "a", "c"))
    chat = conversation(compact, sampler)
    monkeypatch.setattr("grpo.generate.load_conversation", lambda config: chat)
    type_in(monkeypatch, "first", "/new", "second")
    assert run_generation(load_config("generate", ["run=r"])) == 0
    assert "first" not in compact.decode(sampler.prompts[1].token_ids) and len(sampler.prompts) == 2


def test_control_c_at_the_prompt_ends_the_process_as_the_signal_would(compact, monkeypatch):
    monkeypatch.setattr("grpo.generate.load_conversation", lambda config: conversation(compact, ScriptedSampler()))
    type_in(monkeypatch, KeyboardInterrupt)
    assert run_generation(load_config("generate", ["run=r"])) == 130


def test_calls_and_results_are_shown_where_the_environment_has_tools(compact, capsys):
    texts = (' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
             "<|start|>functions.f to=assistant<|channel|>commentary<|message|>7<|end|><|start|>assistant",
             "<|channel|>final<|message|>7<|return|>")

    class Tools:
        def generate(self, sampler, prompts, params, *, step, num_samples):
            segments = [Segment(encode_with_special(compact, text), source)
                        for text, source in zip(texts, ("policy", "env", "policy"), strict=True)]
            return [Completion(prompts[0], 0, [Segment(prompts[0].token_ids, "prompt"), *segments], "stop")]

    conversation = Conversation(load_config("generate", ["run=r"]), None, compact, compact.encode, {}, turns=Tools())
    conversation.ask("1*7")
    shown = capsys.readouterr()
    assert shown.out == ('[to=functions.f commentary json] {"a": 1}\n[functions.f to=assistant commentary] 7\n[final] 7\n')
    assert shown.err == ""
