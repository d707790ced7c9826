"""Harmony, gpt-oss's chat format: sampled ids -> messages, and whether they are a well-formed answer.

Parsing follows the state machine and error texts of OpenAI's `openai-harmony`, on ids: only control ids delimit, spelled
ones do not. One departure: a lone header word behind <|constrain|> is a content type (the library: a recipient).
The library accepts much that no answer should look like; `_find_fault` is the one judge of that.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from models.chat.render import CHANNELS, ROLES, Message
from models.chat.tokenizer import REPLACEMENT, Tokenizer

SPACES = " \t\n\x0b\f\r\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"  # in Rust
SPACES += "\u2028\u2029\u202f\u205f\u3000"


class _Malformed(Exception):
    """Ids that are not well-formed harmony; the text is the library's."""


@dataclass
class Span:
    """A message's position in the parsed ids, and who wrote it."""

    start: int  # of the header, behind its <|start|>
    content_start: int
    stop: int  # behind the closing token, or the end of the ids
    closing: int | None  # <|end|>, <|return|> or <|call|>; None if the ids ended first
    is_policy: bool  # whether the policy sampled any of its ids; a tool's result holds none of them


@dataclass
class Parsed:
    """A parsed completion: `error` is None iff the ids are well-formed; `messages` has all messages that could be read."""

    messages: list[Message]
    spans: list[Span]  # one for each message
    error: str | None  # in the library's words
    is_complete: bool  # well-formed and ended by the model itself, with <|return|> or <|call|>
    fault: str | None  # why this is no finished answer in the right form, None if it is; the error if there is one

    @property
    def final(self) -> str:
        """The content of the final message if the completion has no fault, else "". It is matched with the answer, shown to
        reward functions and put into the history of a chat."""
        return self.messages[-1].content if self.fault is None else ""

    @property
    def analysis(self) -> str:
        """Contents of the policy's analysis messages, calls aside, joined by newlines."""
        return "\n".join(
            message.content
            for message, span in zip(self.messages, self.spans)
            if (message.role, message.channel, message.recipient) == ("assistant", "analysis", None) and span.is_policy
        )


def parse_completion(ids: Iterable[int], tokenizer: Tokenizer, *, role: str | None = "assistant",
                     is_policy: Sequence[bool] | None = None) -> Parsed:
    """Messages of sampled ids, read token by token; never raises on them, whatever the model wrote.

    `role` is the author that the prompt already named (`<|start|>assistant`); None if the ids begin with <|start|>.
    `is_policy` says of each id whether the policy sampled it; None: it sampled all.
    Malformed ids give `error` and all that can be read: words before a stop token that no <|message|> preceded are
    content; unknown header words and ids between messages are skipped; a message cut off in its header has no content and is
    left out. Truncation inside content is no error: the message closes at the end (`is_complete` is False). A trailing
    <|endoftext|> ends the ids like truncation. Invalid UTF-8 and ids without a token read as U+FFFD. As in the library, a
    lone header word is a recipient, with or without `to=`, unless <|constrain|> stands before it.
    """
    if role is not None and role not in ROLES:
        raise ValueError(f"role is {role!r}; allowed: {', '.join(ROLES)}, or None if the ids begin with <|start|>")
    ids = list(map(int, ids))
    sources = [True] * len(ids) if is_policy is None else list(map(bool, is_policy))
    assert len(sources) == len(ids), f"{len(sources)} sources of {len(ids)} ids"
    while ids and ids[-1] == tokenizer.endoftext:
        ids.pop()
    error = None
    try:
        messages, spans = _parse(ids, tokenizer, role, sources, is_strict=True)
    except _Malformed as problem:
        error = str(problem)
        messages, spans = _parse(ids, tokenizer, role, sources, is_strict=False)
    is_complete = error is None and bool(ids) and ids[-1] in (tokenizer.return_, tokenizer.call)
    fault = error or _find_fault(messages, spans, ids, tokenizer, role)
    return Parsed(messages, spans, error, is_complete, fault)


def conversation(parsed: Parsed) -> list[dict]:
    """The messages as APIs have them: `assistant` with content, thinking and tool_calls, `tool` and `user`. What the policy wrote
    in the place of others, and a final message with a fault, are left out."""
    found, thinking = [], []
    later = zip(parsed.messages[1:], parsed.spans[1:])
    is_answered = [*(message.role == "user" and not span.is_policy for message, span in later), parsed.fault is None]
    for message, span, is_answer in zip(parsed.messages, parsed.spans, is_answered):
        if not span.is_policy:
            name = {"name": message.name} if message.role == "tool" else {}
            found.append({"role": message.role, **name, "content": message.content})
            continue
        if message.role != "assistant" or message.channel == "final" and not is_answer:
            continue
        if message.channel == "analysis" and message.recipient is None:
            thinking.append(message.content)
            continue
        entry = {"role": "assistant", "content": "" if message.recipient else message.content}
        if thinking:
            entry["thinking"] = "\n".join(thinking)
        if message.recipient:
            call = {"name": message.recipient.removeprefix("functions."), "arguments": message.content}
            entry["tool_calls"] = [{"type": "function", "function": call}]
        found.append(entry)
        thinking = []
    return [*found, {"role": "assistant", "content": "", "thinking": "\n".join(thinking)}] if thinking else found


def _find_fault(messages: list[Message], spans: list[Span], ids: list[int], tokenizer: Tokenizer, role: str | None) -> str | None:
    """The reason why well-formed ids are no answer, None if they are one. An answer is the policy's analysis, preambles and
    calls, each call answered by the environment, then one final message that ends in <|return|>. If a user answers that, the same
    again."""
    if not messages:
        return "no message"
    was_called = False
    for index, (message, span) in enumerate(zip(messages, spans, strict=True)):
        if not span.is_policy:
            was_called = False
            continue
        is_call = message.recipient is not None
        is_final = message.channel == "final"
        wanted = tokenizer.call if is_call else tokenizer.return_ if is_final else tokenizer.end
        markers = [id for id in ids[span.start : span.content_start] if tokenizer.is_special(id)]
        goes_on = index + 1 < len(messages) and spans[index + 1].is_policy
        header = [tokenizer.channel, *[tokenizer.constrain] * (tokenizer.constrain in markers), tokenizer.message]
        fault = None
        if message.role != "assistant":
            fault = f"the policy wrote as {message.name or message.role}"
        elif index == 0 and role is not None and tokenizer.decode(ids[: span.content_start]).lstrip().startswith(role):
            fault = f"{role} again, where the prompt had named the author"
        elif was_called:
            fault = "the policy went on after a call that nobody had answered"
        elif message.channel not in CHANNELS:
            fault = "no channel" if message.channel is None else f"unknown channel {message.channel!r}"
        elif is_call and (is_final or not message.recipient or message.recipient in ROLES):
            fault = f"recipient {message.recipient!r} on channel {message.channel}"
        elif markers != header or tokenizer.places_of_special(ids[span.content_start : span.stop - 1]):
            fault = f"a control token inside the {message.channel} message"
        elif span.closing is None:
            fault = f"cut off in the {message.channel} message"
        elif span.closing != wanted:
            what = "call" if is_call else f"{message.channel} message"
            fault = f"{what} that ends in {tokenizer.decode([span.closing], keep_special=True)}"
        elif is_final and goes_on:
            fault = "messages after the final one"
        if fault is not None:
            return fault
        was_called = is_call
    return None if messages[-1].channel == "final" and spans[-1].is_policy else "no final message"


def _parse(
    ids: list[int], tokenizer: Tokenizer, role: str | None, sources: list[bool], *, is_strict: bool
) -> tuple[list[Message], list[Span]]:
    stops = {tokenizer.end, tokenizer.return_, tokenizer.call}
    header_ends = {tokenizer.message} if is_strict else {tokenizer.message, *stops}
    specials = tokenizer.places_of_special(ids)
    messages: list[Message] = []
    spans: list[Span] = []
    position, author = 0, role
    while author is not None or position < len(ids):
        if author is None:
            if ids[position] != tokenizer.start:
                run_end = _find(ids, specials, None, position)
                run = tokenizer.decode(ids[position : max(run_end, position + 1)], keep_special=True)
                _complain(f"Unexpected token {run!r} while expecting start token", is_strict)
                position = _find(ids, specials, {tokenizer.start}, position)
                continue
            position += 1
        named, author = author, None  # the headers of all but the first message name their author
        start, header_end = position, _find(ids, specials, header_ends, position)
        if header_end == len(ids):
            _complain("Unexpected EOS while waiting for message header to complete", is_strict)
            break
        header_ids, position = ids[start:header_end], header_end + 1
        if ids[header_end] != tokenizer.message:
            # Closed before <|message|>: content only if the author was named in advance, as the library's lenient mode.
            if named is not None and header_ids:
                messages.append(_headless_message(header_ids, tokenizer, named))
                spans.append(Span(start, start, position, ids[header_end], any(sources[start:position])))
            continue
        header = _parse_header(header_ids, tokenizer, named, is_strict=is_strict)
        content_end = _find(ids, specials, stops, position)
        messages.append(replace(header, content=tokenizer.decode(ids[position:content_end], keep_special=True)))
        closing = ids[content_end] if content_end < len(ids) else None
        stop = min(content_end + 1, len(ids))
        spans.append(Span(start, position, stop, closing, any(sources[start:stop])))
        position = stop
    return messages, spans


def _complain(text: str, is_strict: bool) -> None:
    if is_strict:
        raise _Malformed(text)


def _find(ids: list[int], specials: list[int], wanted: set[int] | None, position: int) -> int:
    """Index of the first wanted id from `position` on, len(ids) if there is none. specials: the places of all control ids;
    wanted: some of those, None for any."""
    for place in range(bisect_left(specials, position), len(specials)):
        if wanted is None or ids[specials[place]] in wanted:
            return specials[place]
    return len(ids)


def _split_header(header_ids: list[int], tokenizer: Tokenizer) -> tuple[str | None, list[str]]:
    """The channel (None without a marker, "" if no name follows it) and the header's other words."""
    pieces: list[str | int] = []  # text, and control ids
    for is_special, ids in groupby(header_ids, tokenizer.is_special):
        run = list(ids)
        pieces += run if is_special else [tokenizer.decode(run)]
    channel = None
    if tokenizer.channel in pieces:
        at = pieces.index(tokenizer.channel)
        following = pieces[at + 1] if at + 1 < len(pieces) and isinstance(pieces[at + 1], str) else ""
        channel = re.match(f"[^{SPACES}<]*", following).group()
        pieces[at : at + (2 if following else 1)] = [following[len(channel) :]]
    # <|constrain|> begins a word; any other control token is spelled where it stands.
    text = ""
    for piece in pieces:
        text += " " if piece == tokenizer.constrain else ""
        text += piece if isinstance(piece, str) else tokenizer.decode([piece], keep_special=True)
    return channel, re.findall(r"[^ \t\n\r\f]+", text.strip(SPACES))


def _parse_header(header_ids: list[int], tokenizer: Tokenizer, role: str | None, *, is_strict: bool) -> Message:
    """A message without content. Forgiving: keeps what it understands of a malformed header."""
    channel, words = _split_header(header_ids, tokenizer)
    if any(REPLACEMENT in part for part in (channel or "", *words)):
        _complain("could not decode header", is_strict)
    if channel == "":
        _complain("channel marker present but no channel value found in header", is_strict)
    name = None
    if role is None:
        if not words:
            _complain("message header did not contain a role", is_strict)
        name = words[0] if words else "assistant"
        if name in ROLES:
            role = name
        elif len(words) > 1 or name.startswith("to="):
            role = "tool"
            words = words[1:]
        else:
            _complain(f"Unknown role: {name}", is_strict)
            role = name
    if words and words[0] == role:
        words = words[1:]
    recipient = content_type = None
    if len(words) == 1 and re.match(r"<\|constrain\|>(?!to=).", words[0]) and tokenizer.constrain in header_ids:
        content_type = words.pop()
    elif words and (words[-1].startswith("to=") or len(words) == 1):
        recipient = words.pop().removeprefix("to=")
    elif words:
        content_type = words.pop()
        recipient = words.pop().removeprefix("to=")
    if words:
        _complain(f"unexpected tokens remaining in message header: {' '.join(words)!r}", is_strict)
    return Message(role, "", channel or None, recipient, content_type, name if role == "tool" else None)


def _headless_message(header_ids: list[int], tokenizer: Tokenizer, role: str) -> Message:
    """A message whose <|message|> is missing: the channel if there is one, all other words are content."""
    channel, words = _split_header(header_ids, tokenizer)
    if words and words[0] == role:
        words = words[1:]
    return Message(role, " ".join(words), channel or None)
