"""Harmony, gpt-oss's chat format: conversations -> messages -> prompt ids.

Rendering builds ids, not text, so that text from users never becomes a control token. It has two forms: that of the chat template
of the hub checkpoints (`chat_template.jinja` of openai/gpt-oss-20b), which other trainers feed the model, and that of OpenAI's
`openai-harmony` library, which servers use. Where they differ:

* the template: instructions are followed by a blank line even without tools; a default ends in a comma inside its comment
  (`days?: number, // default: 3,`), and nested schemas have the template's own line breaks and spaces; analysis of every earlier
  turn is dropped, while a tool call has no final message after it, its analysis stays; results of functions are written as JSON,
  a text in quotes;
* the library: declarations as in models/chat/library_form.py; if the assistant's last message is a final one, everything on
  the channel analysis before the first final message is dropped, and nothing else; results and arguments that are text stay as
  they are.

In both a call's recipient stands in the role part, and its content type is `json` without <|constrain|>.

Only prompts are rendered. The template also renders an answer for training, but drops analysis that the answer's own prompt
held: train on prompt ids + sampled ids instead.

Departures from the template: special tokens spelled in content stay text; the date is an argument; system and developer
messages that open a conversation together are joined by a blank line (it loses all but the first); arguments given as the
JSON text of an object are that object (it encodes them twice); calls of built-in tools have the library's form; content
may be text parts; a function without description gets no comment line, and a default of an enum or oneOf that is no
string is written as JSON (it fails on all three); what it drops in silence (a later system message, a message's second
call) is dropped with a warning.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import takewhile
from typing import Any

from models.chat.form import Form
from models.chat.library_form import tools_section
from models.chat.tokenizer import Tokenizer
from models.chat.tools import builtin_sections, declare_functions, from_json, read_call, read_tools, to_json

MODEL_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
TEMPLATE_KWARGS = ("reasoning_effort", "model_identity", "builtin_tools", "current_date")
CHANNELS = ("analysis", "commentary", "final")
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_EFFORTS = ("low", "medium", "high")
CONSTRAIN = "<|constrain|>"
SPELLED_HEADER = re.compile(r"<\|channel\|>(analysis|final)<\|message\|>")


@dataclass
class Message:
    """One message. `recipient`: the function or role that it is written to; `name`: a tool message's author (`functions.f`).
    Content in several parts is text that is encoded part by part."""

    role: str
    content: str | list[str]
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None


def harmony_messages(messages: Sequence[Mapping[str, Any]], *, current_date: str, reasoning_effort: str = "medium",
                     model_identity: str = MODEL_IDENTITY, instructions: str | None = None,
                     tools: Sequence[Mapping[str, Any]] | str | None = None, builtin_tools: Sequence[str] | None = None,
                     form: Form = Form.hub) -> list[Message]:
    """A conversation as the messages that the hub's chat template, or openai-harmony, writes. The one check of conversations.

    `messages`: dicts as transformers and APIs have them. The first ones may be `system` and `developer` (together they
    become the developer message, which is `instructions` if there are none); `user` has content; `assistant` has content
    and maybe `thinking` (or `reasoning_content`, `reasoning`), or has `tool_calls`; `tool` has content, any JSON value.
    Content is text or a list of text parts, which are joined. Keys with value None are as absent.
    `tools`: see `read_tools`. `builtin_tools`: of browser, python. `current_date`: YYYY-MM-DD.
    Raises ValueError naming the message (by index) and key that cannot be rendered.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        what = "empty" if isinstance(messages, (list, tuple)) else f"a {type(messages).__name__}"
        raise ValueError(f"messages is {what}: a conversation is a list of at least one message")
    chat = [_checked_message(message, index) for index, message in enumerate(messages)]
    functions = read_tools(tools)
    system = system_content(current_date=current_date, reasoning_effort=reasoning_effort, model_identity=model_identity,
                            builtin_tools=builtin_tools, has_functions=bool(functions))
    rendered = [_encodable(Message("system", system), "model_identity")]
    opening = list(takewhile(lambda message: message["role"] in ("system", "developer"), chat))
    if opening:
        parts = [_text(message, "content", i) for i, message in enumerate(opening) if message.get("content", "") != ""]
        instructions = "\n\n".join(parts)
    if developer := developer_content(instructions or "", functions, form):
        rendered.append(_encodable(Message("developer", developer), "instructions or tools"))
    call: Message | None = None  # the last one, while no answer follows it
    call_id = None
    for index, message in list(enumerate(chat))[len(opening):]:
        parts = []
        if message["role"] == "user":
            parts = [Message("user", _text(message, "content", index))]
        elif message["role"] == "tool":
            parts = [_tool_result(message, index, call, call_id, form)]
        elif _is_answer(message):
            thought = _text(message, "thinking", index) if form == Form.library and message.get("thinking") else ""
            parts = [Message("assistant", thought, "analysis")] if thought else []
            parts.append(Message("assistant", _text(message, "content", index), "final"))
            call = None
        elif message["role"] == "assistant":
            thought, call = _read_tool_call(message, index, builtin_tools or (), form)
            parts = [Message("assistant", thought, "analysis")] if thought else []
            parts.append(call)
            call_id = message["tool_calls"][0].get("id")
        else:
            warnings.warn(
                f"messages[{index}] has role {message['role']!r} and is left out of the prompt, as in the hub's chat template: "
                "system and developer messages can only come first. Merge the instructions into one message",
                stacklevel=2,
            )
        rendered += [_encodable(part, f"messages[{index}]") for part in parts]
    return [message for message, is_kept in zip(rendered, kept_messages(rendered, form)) if is_kept]


def kept_messages(messages: list[Message], form: Form) -> list[bool]:
    """Which messages of a conversation stand in a prompt that continues it."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" and message.channel == "final"]
    if form == Form.hub:
        finished = answers[-1] if answers else -1
        return [index > finished or message.role != "assistant" or message.channel != "analysis" or message.recipient is not None
                for index, message in enumerate(messages)]
    last = next((message for message in messages[::-1] if message.role == "assistant"), None)
    first = answers[0] if answers and last.channel == "final" else -1
    return [index >= first or message.channel != "analysis" for index, message in enumerate(messages)]


def render_prompt(messages: Iterable[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids of messages, verbatim, that the model is to answer."""
    ids = [id for message in messages for id in render_message(message, tokenizer)]
    return ids + generation_prompt(tokenizer)


def render_message(message: Message, tokenizer: Tokenizer) -> list[int]:
    """Token ids of one message, verbatim, from <|start|> to <|end|> (<|call|> if an assistant writes to a recipient).

    Only `content_type` may begin with a control token, <|constrain|>; everywhere else spelled control tokens stay text.
    """
    if message.role not in ROLES:
        raise ValueError(f"message role {message.role!r} is not one of {', '.join(ROLES)}")
    if (message.role == "tool") != (message.name is not None):
        raise ValueError(f"a tool message needs `name` (such as functions.f), no other has one; got {message!r:.200}")
    author = message.name if message.role == "tool" else message.role
    recipient = "" if message.recipient in (None, "all") else f" to={message.recipient}"
    ids = [tokenizer.start, *tokenizer.encode(author + recipient)]
    ids += [] if message.channel is None else [tokenizer.channel]
    channel, content_type = message.channel or "", message.content_type
    if content_type is not None and content_type.startswith(CONSTRAIN):
        constraint = tokenizer.encode(content_type.removeprefix(CONSTRAIN))
        ids += [*tokenizer.encode(f"{channel} "), tokenizer.constrain, *constraint]
    else:
        ids += tokenizer.encode(channel if content_type is None else f"{channel} {content_type}")
    is_call = message.role == "assistant" and message.recipient is not None
    parts = [message.content] if isinstance(message.content, str) else message.content
    content = [id for part in parts for id in tokenizer.encode(part)]
    return [*ids, tokenizer.message, *content, tokenizer.call if is_call else tokenizer.end]


def generation_prompt(tokenizer: Tokenizer) -> list[int]:
    """`<|start|>assistant`: a completion continues it with the channel of its choice, so it begins with <|channel|>."""
    return [tokenizer.start, *tokenizer.encode("assistant")]


def system_content(*, current_date: str, reasoning_effort: str, model_identity: str = MODEL_IDENTITY,
                   builtin_tools: Sequence[str] | None = None, has_functions: bool = False) -> str:
    """Text of the system message."""
    try:
        is_date = date.fromisoformat(current_date).isoformat() == current_date
    except (TypeError, ValueError):
        is_date = False
    if not is_date:
        raise ValueError(f"current_date is {current_date!r}; it must be a date as YYYY-MM-DD")
    if reasoning_effort not in REASONING_EFFORTS:
        raise ValueError(f"reasoning_effort is {reasoning_effort!r}; allowed: {', '.join(REASONING_EFFORTS)}")
    if not isinstance(model_identity, str):
        raise ValueError(f"model_identity is {model_identity!r:.80}; it must be a string")
    return system_sections(model_identity, KNOWLEDGE_CUTOFF, current_date, reasoning_effort, CHANNELS,
                           builtin_sections(builtin_tools), has_functions=has_functions)


def system_sections(identity: str | None, cutoff: str | None, current_date: str | None, effort: str | None,
                    channels: Sequence[str] | None, tools: Sequence[str], *, has_functions: bool) -> str:
    """Text of a system message, without the parts that are None or empty, as the library can write it."""
    head = [identity, cutoff and f"Knowledge cutoff: {cutoff}", current_date and f"Current date: {current_date}"]
    calls = "\nCalls to these tools must go to the commentary channel: 'functions'." if has_functions else ""
    sections = [
        "\n".join(line for line in head if line is not None), effort and f"Reasoning: {effort}",
        "\n\n".join(["# Tools", *tools]) if tools else "",
        f"# Valid channels: {', '.join(channels)}. Channel must be included for every message.{calls}" if channels else ""]
    return "\n\n".join(section for section in sections if section)


def developer_content(instructions: str, functions: Sequence[Mapping[str, Any]], form: Form = Form.hub) -> str:
    """Text of the developer message, "" if empty: instructions (the user's "system prompt") and function schemas."""
    if form == Form.library:
        parts = [f"# Instructions\n\n{instructions}"] if instructions else []
        own = [{**function, "name": function["name"].removeprefix("functions."),
                "parameters": from_json(function.get("parameters"), "parameters")} for function in functions]
        return "\n\n".join([*parts, *([tools_section([{"name": "functions", "tools": own}])] if own else [])])
    text = f"# Instructions\n\n{instructions}\n\n" if instructions else ""
    return text + (f"# Tools\n\n{declare_functions(functions)}" if functions else "")


def read_template_kwargs(value: Any) -> dict[str, Any]:
    """Keywords of `harmony_messages` from a `chat_template_kwargs` column: an object or its JSON text, nulls left out.

    Raises ValueError for a key that the chat template does not know."""
    value = None if value == "" else from_json(value, "chat_template_kwargs")
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"chat_template_kwargs is a {type(value).__name__}; it must be an object or its JSON text")
    unknown = [key for key, setting in value.items() if setting is not None and key not in TEMPLATE_KWARGS]
    if unknown:
        raise ValueError(
            f"chat_template_kwargs has {', '.join(map(repr, unknown))}, which gpt-oss's chat template does not know; "
            f"allowed: {', '.join(TEMPLATE_KWARGS)}"
        )
    return {key: setting for key, setting in value.items() if setting is not None}


def _checked_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message without its None values, its role known, content parts joined, its reasoning under `thinking`."""
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{index}] must be a mapping with role and content, got {message!r:.80}")
    checked = {key: value for key, value in message.items() if value is not None}
    role = checked.get("role")
    if role not in ROLES:
        raise ValueError(f"messages[{index}] has role {role!r}; allowed: {', '.join(ROLES)}")
    if "function_call" in checked:
        raise ValueError(f"messages[{index}].function_call is an API's old form of a call; write it as tool_calls")
    if "tool_calls" in checked and not checked["tool_calls"]:
        del checked["tool_calls"]  # an empty list in every row is how data sets with uniform columns say "no call"
    for alias in ("reasoning_content", "reasoning"):
        if alias in checked:
            checked.setdefault("thinking", checked[alias])
    for key in ("content", "thinking"):
        value, where = checked.get(key), f"messages[{index}].{key}"
        # a tool's result may be any list; one of nothing but text parts is how APIs give a text
        if isinstance(value, (list, tuple)) and (role != "tool" or (value and all(map(_is_text, value)))):
            value = checked[key] = "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))
        if role == "assistant" and isinstance(value, str) and SPELLED_HEADER.search(value):
            raise ValueError(
                f"{where} spells harmony control tokens; pass the reasoning alone as 'thinking' and the answer alone as 'content'"
            )
    return checked


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and "tool_calls" not in message


def _is_text(part: Any) -> bool:
    is_part = isinstance(part, Mapping) and part.get("type") in ("text", "input_text", "output_text")
    return is_part and isinstance(part.get("text"), str)


def _part(part: Any, where: str) -> str:
    if not _is_text(part):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ValueError(f'{where} is a part of type {kind!r}: the model reads text only, {{"type": "text", "text": ...}}')
    return part["text"]


def _text(message: Mapping[str, Any], key: str, index: int) -> str:
    if not isinstance(message.get(key), str):
        raise ValueError(
            f"messages[{index}].{key} (role {message['role']}) must be a string, got {message.get(key)!r:.80}; a list "
            "of text parts is one too"
        )
    return message[key]


def _encodable(message: Message, where: str) -> Message:
    for key, text in vars(message).items():
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} cannot be encoded: the {message.role} message's {key} holds half of a surrogate pair, "
                             f"{text[error.start]!a}, at character {error.start}") from error
    return message


def _read_tool_call(message: Mapping[str, Any], index: int, builtin_tools: Sequence[str], form: Form) -> tuple[str, Message]:
    """The analysis before the call ("" if none) and the call as a message."""
    where = f"messages[{index}].tool_calls"
    calls = message["tool_calls"]
    if not isinstance(calls, (list, tuple)) or not isinstance(calls[0], Mapping):
        raise ValueError(f"{where} must be a list of mappings, got {calls!r:.80}")
    if len(calls) > 1:
        warnings.warn(f"{where} has {len(calls)} calls and only the first is rendered, as in the hub's chat template: make one "
                      "message of each call", stacklevel=3)
    if message.get("content") and message.get("thinking"):
        raise ValueError(f"messages[{index}] has content, thinking and tool_calls; give the analysis as thinking alone")
    key = "content" if message.get("content") else "thinking"
    thought = _text(message, key, index) if message.get(key) else ""
    recipient, channel, content_type, content = read_call(calls[0], builtin_tools, f"{where}[0]",
                                                          keeps_text=form == Form.library)
    return thought, Message("assistant", content, channel, recipient, content_type)


def _tool_result(message: Mapping[str, Any], index: int, call: Message | None, call_id: object, form: Form) -> Message:
    """The result of the last call; if it names a call, that must be this one."""
    if call is None:
        raise ValueError(f"messages[{index}] has role 'tool', but no assistant message before it has tool_calls")
    if "content" not in message:
        raise ValueError(f"messages[{index}] has role 'tool' but no content: give the result, any JSON value")
    answered = message.get("tool_call_id")
    if None not in (answered, call_id) and answered != call_id:
        raise ValueError(f"messages[{index}].tool_call_id is {answered!r:.80}, but the call before it has id {call_id!r:.80}")
    namespace, _, function = call.recipient.partition(".")
    if message.get("name", function) not in (call.recipient, function, namespace):
        raise ValueError(f"messages[{index}].name is {message['name']!r:.80}, but the call before it is {call.recipient}")
    content = message["content"]
    if isinstance(content, str) and (namespace != "functions" or form == Form.library):
        text = content  # built-in tools answer in plain text in both forms
    else:
        text = to_json(content, f"messages[{index}].content")
    return Message("tool", text, call.channel, recipient="assistant", name=call.recipient)
