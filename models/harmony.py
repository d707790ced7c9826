"""Harmony, gpt-oss's chat format: conversations -> prompt ids, completion ids -> messages.

Rendering follows the chat template of the hub checkpoints (`chat_template.jinja` of openai/gpt-oss-20b), because that
is what other trainers and servers feed the model; it builds ids, not text, so that text from users never becomes a
control token. Where template and OpenAI's `openai-harmony` library differ, the template wins:

* instructions are followed by a blank line even without tools;
* a default ends in a comma inside its comment (`days?: number, // default: 3,`), and nested schemas have the
  template's own line breaks and spaces;
* analysis of every earlier turn is dropped (the library: only what stands before the first final message); while a tool
  call has no final message after it, its analysis stays;
* the training render (`add_generation_prompt=False`) keeps the last turn's analysis and ends in <|return|>;
* tool arguments and results are written as JSON: pass objects, a string comes out as a quoted JSON string;
* a call's recipient stands in the role part, its content type is `json` without <|constrain|>.

Departures from the template: special tokens spelled in content stay text; the date is an argument; a function without
description gets no comment line, and a default of an enum or oneOf that is no string is written as JSON (the template
fails on both); what it drops in silence (a second system message, a message's second call) is dropped with a warning.

Parsing follows the library's state machine and error texts, on ids: only control ids delimit, spelled ones do not.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.tokenizer import REPLACEMENT, Tokenizer

MODEL_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
CHANNELS = ("analysis", "commentary", "final")
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_EFFORTS = ("low", "medium", "high")
BUILTIN_TOOLS = ("browser", "python")
CONSTRAIN = "<|constrain|>"

BROWSER_SECTION = """## browser

// Tool for browsing.
// The `cursor` appears in brackets before each browsing display: `[{cursor}]`.
// Cite information from the tool using the following format:
// `【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.
// Do not quote more than 10 words directly from the tool output.
// sources=web (default: web)
namespace browser {

// Searches for information related to `query` and displays `topn` results.
type search = (_: {
query: string,
topn?: number, // default: 10
source?: string,
}) => any;

// Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, showing `num_lines` lines.
// Valid link ids are displayed with the formatting: `【{id}†.*】`.
// If `cursor` is not provided, the most recent page is implied.
// If `id` is a string, it is treated as a fully qualified URL associated with `source`.
// If `loc` is not provided, the viewport will be positioned at the beginning of the document or centered on the most \
relevant passage, if available.
// Use this function without `id` to scroll to a new location of an opened page.
type open = (_: {
id?: number | string, // default: -1
cursor?: number, // default: -1
loc?: number, // default: -1
num_lines?: number, // default: -1
view_source?: boolean, // default: false
source?: string,
}) => any;

// Finds exact matches of `pattern` in the current page, or the page given by `cursor`.
type find = (_: {
pattern: string,
cursor?: number, // default: -1
}) => any;

} // namespace browser"""

PYTHON_SECTION = """## python

Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. This tool \
should be used for internal reasoning, but not for code that is intended to be visible to the user (e.g. when creating \
plots, tables, or files).

When you send a message containing Python code to python, it will be executed in a stateful Jupyter notebook \
environment. python will respond with the output of the execution or time out after 120.0 seconds. The drive at \
'/mnt/data' can be used to save and persist user files. Internet access for this session is UNKNOWN. Depends on the \
cluster."""


class HarmonyError(ValueError):
    """Ids that are not well-formed harmony; the text is the library's."""


@dataclass
class Message:
    """One message. `recipient` is whom it calls or answers; `name` is a tool message's author (`functions.f`)."""

    role: str
    content: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None


@dataclass
class Parsed:
    """What a completion says: `error` is None iff the ids are well-formed; `messages` holds all that could be read."""

    messages: list[Message]
    error: str | None
    is_complete: bool  # well-formed and ended by the model itself, with <|return|> or <|call|>

    @property
    def final(self) -> str:
        """Content of the assistant's last final message, "" without one; also of a truncated one: see `is_complete`."""
        finals = self._contents("final")
        return finals[-1] if finals else ""

    @property
    def analysis(self) -> str:
        """Contents of the assistant's analysis messages, joined by newlines."""
        return "\n".join(self._contents("analysis"))

    def _contents(self, channel: str) -> list[str]:
        return [m.content for m in self.messages if m.role == "assistant" and m.channel == channel]


# ---- rendering -------------------------------------------------------------------------------------------------------


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    current_date: str,
    reasoning_effort: str = "medium",
    model_identity: str = MODEL_IDENTITY,
    tools: Sequence[Mapping[str, Any]] | None = None,
    builtin_tools: Sequence[str] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation, as the hub's chat template writes it.

    `messages`: dicts as transformers takes them. The first may be `system` or `developer` (both become the developer
    message); `user` has content; `assistant` has content and maybe `thinking` (or `reasoning_content`, `reasoning`), or
    has `tool_calls`; `tool` has content, any JSON value. Keys with value None are as absent.
    `tools`: function schemas, {"type": "function", "function": {...}} or bare. `builtin_tools`: of browser, python.
    `current_date`: YYYY-MM-DD. With `add_generation_prompt` the ids end in `<|start|>assistant`; without, a last
    assistant turn is rendered for training: with its analysis, ending in <|return|>.
    Raises ValueError naming the message and key that cannot be rendered.
    """
    if not messages:
        raise ValueError("messages is empty: a conversation needs at least one message")
    chat = [_checked_message(message, index) for index, message in enumerate(messages)]
    system = system_content(
        current_date=current_date,
        reasoning_effort=reasoning_effort,
        model_identity=model_identity,
        builtin_tools=builtin_tools,
        has_functions=bool(tools),
    )
    ids = render_message(Message("system", system), tokenizer)
    instructions = ""
    first = 0
    if chat[0]["role"] in ("system", "developer"):
        instructions = _text(chat[0], "content", 0) if chat[0].get("content", "") != "" else ""
        first = 1
    developer = developer_content(instructions, tools)
    if developer:
        ids += render_message(Message("developer", developer), tokenizer)

    called_function: str | None = None
    for index in range(first, len(chat)):
        message = chat[index]
        role = message["role"]
        if role == "user":
            ids += render_message(Message("user", _text(message, "content", index)), tokenizer)
        elif role == "tool":
            if called_function is None:
                raise ValueError(
                    f"messages[{index}] has role 'tool', but no assistant message before it has tool_calls"
                )
            if "content" not in message:
                raise ValueError(f"messages[{index}] has role 'tool' but no content: give the result, any JSON value")
            result = _to_json(message["content"], f"messages[{index}].content")
            answer = Message("tool", result, "commentary", recipient="assistant", name=f"functions.{called_function}")
            ids += render_message(answer, tokenizer)
        elif role == "assistant" and "tool_calls" in message:
            # Analysis is kept only while the turn it belongs to is unfinished.
            is_finished = any(m["role"] == "assistant" and "tool_calls" not in m for m in chat[index + 1 :])
            thought, call = _read_tool_call(message, index)
            if thought and not is_finished:
                ids += render_message(Message("assistant", thought, "analysis"), tokenizer)
            ids += render_message(call, tokenizer)
            called_function = call.recipient.removeprefix("functions.")
        elif role == "assistant":
            is_training_target = index == len(chat) - 1 and not add_generation_prompt
            if is_training_target and "thinking" in message:
                ids += render_message(Message("assistant", _text(message, "thinking", index), "analysis"), tokenizer)
            final = render_message(Message("assistant", _text(message, "content", index), "final"), tokenizer)
            ids += [*final[:-1], tokenizer.return_] if is_training_target else final
            called_function = None
        else:
            warnings.warn(
                f"messages[{index}] has role {role!r} and is left out of the prompt, as in the hub's chat template: "
                "only the first message may be system or developer. Merge the instructions into one message",
                stacklevel=2,
            )
    return ids + generation_prompt(tokenizer) if add_generation_prompt else ids


def render_message(message: Message, tokenizer: Tokenizer) -> list[int]:
    """Token ids of one message, verbatim, from <|start|> to <|end|> (<|call|> if an assistant writes to a recipient).

    Only `content_type` may begin with a control token, <|constrain|>; everywhere else spelled control tokens stay text.
    """
    if message.role not in ROLES:
        raise ValueError(f"message role {message.role!r} is not one of {', '.join(ROLES)}")
    if (message.role == "tool") != (message.name is not None):
        raise ValueError(f"a tool message needs `name` (such as functions.f), no other has one; got {message!r:.200}")
    author = message.name if message.role == "tool" else message.role
    recipient = "" if message.recipient is None else f" to={message.recipient}"
    ids = [tokenizer.start, *tokenizer.encode(author + recipient)]
    is_constrained = (message.content_type or "").startswith(CONSTRAIN)
    content_type = "" if message.content_type is None else f" {message.content_type.removeprefix(CONSTRAIN)}"
    plain, constrained = (content_type[:1], content_type[1:]) if is_constrained else (content_type, "")
    ids += [] if message.channel is None else [tokenizer.channel]
    ids += tokenizer.encode((message.channel or "") + plain)
    ids += [tokenizer.constrain, *tokenizer.encode(constrained)] if is_constrained else []
    is_call = message.role == "assistant" and message.recipient is not None
    return [*ids, tokenizer.message, *tokenizer.encode(message.content), tokenizer.call if is_call else tokenizer.end]


def generation_prompt(tokenizer: Tokenizer) -> list[int]:
    """`<|start|>assistant`: a completion continues it with the channel of its choice, so it begins with <|channel|>."""
    return [tokenizer.start, *tokenizer.encode("assistant")]


def completion_as_history(completion_ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """A completion's ids as they stand in a later prompt: <|return|>, which is output only, becomes <|end|>."""
    return [tokenizer.end if id == tokenizer.return_ else id for id in completion_ids]


def system_content(
    *,
    current_date: str | None,
    reasoning_effort: str | None,
    model_identity: str | None = MODEL_IDENTITY,
    knowledge_cutoff: str | None = KNOWLEDGE_CUTOFF,
    builtin_tools: Sequence[str] | None = None,
    channels: Sequence[str] = CHANNELS,
    has_functions: bool = False,
) -> str:
    """Text of the system message. A part given as None (or no channels) vanishes together with its blank line."""
    if current_date is not None and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", current_date):
        raise ValueError(f"current_date is {current_date!r}; it must be a date as YYYY-MM-DD")
    if reasoning_effort is not None and reasoning_effort not in REASONING_EFFORTS:
        raise ValueError(f"reasoning_effort is {reasoning_effort!r}; allowed: {', '.join(REASONING_EFFORTS)}")
    unknown = [tool for tool in builtin_tools or () if tool not in BUILTIN_TOOLS]
    if unknown:
        raise ValueError(
            f"builtin_tools has {unknown}; allowed: {', '.join(BUILTIN_TOOLS)}. Own functions go to `tools`"
        )
    head = [
        model_identity,
        None if knowledge_cutoff is None else f"Knowledge cutoff: {knowledge_cutoff}",
        None if current_date is None else f"Current date: {current_date}",
    ]
    sections = ["\n".join(line for line in head if line is not None)]
    if reasoning_effort is not None:
        sections.append(f"Reasoning: {reasoning_effort}")
    if builtin_tools:
        sections.append("# Tools")
        sections += [BROWSER_SECTION] if "browser" in builtin_tools else []
        sections += [PYTHON_SECTION] if "python" in builtin_tools else []
    if channels:
        line = f"# Valid channels: {', '.join(channels)}. Channel must be included for every message."
        if has_functions:
            line += "\nCalls to these tools must go to the commentary channel: 'functions'."
        sections.append(line)
    return "\n\n".join(section for section in sections if section)


def developer_content(instructions: str, tools: Sequence[Mapping[str, Any]] | None) -> str:
    """Text of the developer message, "" if empty: instructions (the user's "system prompt") and function tools."""
    text = f"# Instructions\n\n{instructions}\n\n" if instructions else ""
    if tools:
        functions = "".join(_function_declaration(tool, index) for index, tool in enumerate(tools))
        text += f"# Tools\n\n## functions\n\nnamespace functions {{\n\n{functions}}} // namespace functions"
    return text


def _checked_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message without its None values, its reasoning under `thinking`, its role known."""
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{index}] must be a mapping with role and content, got {message!r:.80}")
    checked = {key: value for key, value in message.items() if value is not None}
    role = checked.get("role")
    if role not in ROLES:
        raise ValueError(f"messages[{index}] has role {role!r}; allowed: {', '.join(ROLES)}")
    if "thinking" not in checked:
        for alias in ("reasoning_content", "reasoning"):
            if alias in checked:
                checked["thinking"] = checked[alias]
                break
    if "tool_calls" in checked and not checked["tool_calls"]:
        del checked["tool_calls"]  # an empty list in every row is how data sets with uniform columns say "no call"
    if role == "assistant":
        for key in ("content", "thinking"):
            text = checked.get(key)
            if isinstance(text, str) and re.search(r"<\|channel\|>(analysis|final)<\|message\|>", text):
                raise ValueError(
                    f"messages[{index}].{key} spells harmony control tokens; pass the reasoning alone as 'thinking' "
                    "and the answer alone as 'content'"
                )
    return checked


def _text(message: Mapping[str, Any], key: str, index: int) -> str:
    if not isinstance(message.get(key), str):
        raise ValueError(
            f"messages[{index}].{key} (role {message['role']}) must be a string, got {message.get(key)!r:.80}; "
            "join the text of content parts before rendering"
        )
    return message[key]


def _read_tool_call(message: Mapping[str, Any], index: int) -> tuple[str, Message]:
    """The analysis before the call ("" if none) and the call as a message."""
    where = f"messages[{index}].tool_calls"
    calls = message["tool_calls"]
    if not isinstance(calls, (list, tuple)) or not isinstance(calls[0], Mapping):
        raise ValueError(f"{where} must be a list of mappings, got {calls!r:.80}")
    if len(calls) > 1:
        warnings.warn(
            f"{where} has {len(calls)} calls and only the first is rendered, as in the hub's chat template: make one "
            "message of each call",
            stacklevel=3,
        )
    call = calls[0].get("function") or calls[0]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise ValueError(f"{where}[0] needs a function with name (string) and arguments (object), got {calls[0]!r:.99}")
    if message.get("content") and message.get("thinking"):
        raise ValueError(f"messages[{index}] has content, thinking and tool_calls; give the analysis as thinking alone")
    key = "content" if message.get("content") else "thinking"
    thought = _text(message, key, index) if message.get(key) else ""
    arguments = _to_json(call["arguments"], f"{where}[0].arguments")
    content_type = call.get("content_type", "json")
    return thought, Message("assistant", arguments, "commentary", f"functions.{call['name']}", content_type)


def _to_json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be written as JSON: {error}") from error


def _function_declaration(tool: Mapping[str, Any], index: int) -> str:
    function = tool.get("function") or tool if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'tools[{index}] must be {{"type": "function", "function": {{"name": ...}}}}, got {tool!r:.99}'
        )
    comment = "" if function.get("description") is None else f"// {function['description']}\n"
    schema = function.get("parameters") or {}
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not properties:
        return f"{comment}type {function['name']} = () => any;\n\n"
    lines = [_parameter(name, spec, schema.get("required") or ()) for name, spec in properties.items()]
    return f"{comment}type {function['name']} = (_: {{\n{''.join(lines)}}}) => any;\n\n"


def _parameter(name: str, spec: Any, required: Sequence[str]) -> str:
    schema = spec if isinstance(spec, Mapping) else {}
    comment = f"// {schema['description']}\n" if schema.get("description") else ""
    default = ""
    if "default" in schema:
        is_verbatim = isinstance(schema["default"], str) and bool(schema.get("enum") or schema.get("oneOf"))
        value = schema["default"] if is_verbatim else _to_json(schema["default"], f"default of tool parameter {name}")
        separator = "" if schema.get("oneOf") and not schema.get("enum") else ", "
        default = f"{separator}// default: {value}"
    return f"{comment}{name}{'' if name in required else '?'}: {_typescript_type(schema)}{default},\n"


def _typescript_type(schema: Any) -> str:
    """The template's spelling of a JSON schema, its stray spaces and all: the model must see what it sees elsewhere."""
    if not isinstance(schema, Mapping):
        return "any"
    kind = schema.get("type")
    nullable = " | null" if schema.get("nullable") else ""
    if kind == "array":
        return _array_element(schema.get("items")) + "[]" + nullable
    if isinstance(kind, (list, tuple)) and kind:
        return " | ".join(str(entry) for entry in kind)
    if schema.get("oneOf"):
        return " | \n".join(_variant(variant) for variant in schema["oneOf"])
    if kind == "string":
        if schema.get("enum"):
            return '"' + '" | "'.join(str(value) for value in schema["enum"]) + '"'
        return "string" + nullable
    if kind in ("number", "integer"):
        return "number"
    if kind == "boolean":
        return "boolean"
    if kind == "object":
        return _object(schema) if schema.get("properties") else "object"
    return "any"  # anyOf, allOf, $ref, const, null: the template knows none of them


def _array_element(items: Any) -> str:
    kind = items.get("type") if isinstance(items, Mapping) else None
    if kind == "string":
        return "string"  # its enum is not spelled
    element = _typescript_type(items)
    return "any" if element == "object | object" or len(element) > 50 else element


def _variant(variant: Any) -> str:
    text = _typescript_type(variant)
    if isinstance(variant, Mapping):
        if variant.get("description"):
            text += f"// {variant['description']}"
        if "default" in variant:
            text += f"{' ' * 20}// default: {_to_json(variant['default'], 'default of a oneOf variant')}"
    return text


def _object(schema: Mapping[str, Any]) -> str:
    required = schema.get("required") or ()
    fields = [
        f"{name}{'' if name in required else '?'}: \n{' ' * 16}{_typescript_type(spec)}"
        for name, spec in schema["properties"].items()
    ]
    return "{\n" + ", ".join(fields) + "}"


# ---- parsing ---------------------------------------------------------------------------------------------------------


def parse_completion(
    ids: Iterable[int], tokenizer: Tokenizer, *, role: str | None = "assistant", strict: bool = False
) -> Parsed:
    """Messages of sampled ids, read token by token; the default never raises on them, whatever the model wrote.

    `role` is the author that the prompt already named (`<|start|>assistant`); None if the ids begin with <|start|>.
    Malformed ids give `error` (the text that strict parsing raises) and all that can be read: words before a stop token
    that no <|message|> preceded are content; unknown header words and ids between messages are skipped; a message cut
    off in its header has no content and is left out. Truncation inside content is no error: the message closes at the
    end (`is_complete` is False). A trailing <|endoftext|> ends the ids like truncation. Invalid UTF-8 and ids without a
    token read as U+FFFD. As in the library, a lone header word is a recipient, with or without `to=`.
    `strict=True` raises HarmonyError (a ValueError) instead.
    """
    if role is not None and role not in ROLES:
        raise ValueError(f"role is {role!r}; allowed: {', '.join(ROLES)}, or None if the ids begin with <|start|>")
    ids = [int(id) for id in ids]
    while ids and ids[-1] == tokenizer.endoftext:
        ids.pop()
    error = None
    try:
        messages = _parse(ids, tokenizer, role, is_strict=True)
    except HarmonyError as problem:
        if strict:
            raise
        error = str(problem)
        messages = _parse(ids, tokenizer, role, is_strict=False)
    is_complete = error is None and bool(ids) and ids[-1] in (tokenizer.return_, tokenizer.call)
    return Parsed(messages, error, is_complete)


def _parse(ids: list[int], tokenizer: Tokenizer, role: str | None, *, is_strict: bool) -> list[Message]:
    closing = {tokenizer.end, tokenizer.return_, tokenizer.call}
    header_ends = {tokenizer.message} if is_strict else {tokenizer.message, *closing}
    messages: list[Message] = []
    position = 0
    is_first = True
    while True:
        if not is_first or role is None:
            if position >= len(ids):
                break
            if ids[position] != tokenizer.start:
                run = _token_run(ids, position, tokenizer)
                _problem(f"Unexpected token {run!r} while expecting start token", is_strict)
                position = _find(ids, {tokenizer.start}, position)
                is_first = False
                continue
            position += 1
        author = role if is_first else None
        is_first = False
        header_end = _find(ids, header_ends, position)
        if header_end == len(ids):
            _problem("Unexpected EOS while waiting for message header to complete", is_strict)
            break
        header_ids = ids[position:header_end]
        position = header_end + 1
        if ids[header_end] != tokenizer.message:
            # Closed before <|message|>: content only if the author was named in advance, as the library's lenient mode.
            if author is not None and header_ids:
                messages.append(_headless_message(header_ids, tokenizer, author))
            continue
        header = _parse_header(header_ids, tokenizer, author, is_strict=is_strict)
        content_end = _find(ids, closing, position)
        messages.append(replace(header, content=tokenizer.decode(ids[position:content_end], keep_special=True)))
        position = content_end + 1
    return messages


def _problem(text: str, is_strict: bool) -> None:
    if is_strict:
        raise HarmonyError(text)


def _find(ids: list[int], targets: set[int], position: int) -> int:
    """Index of the first id in `targets` from `position` on, len(ids) if there is none."""
    while position < len(ids) and ids[position] not in targets:
        position += 1
    return min(position, len(ids))


def _token_run(ids: list[int], position: int, tokenizer: Tokenizer) -> str:
    """The control token at `position`, or the ordinary text from there to the next control token."""
    if tokenizer.is_special(ids[position]):
        return tokenizer.decode(ids[position : position + 1], keep_special=True)
    end = position
    while end < len(ids) and not tokenizer.is_special(ids[end]):
        end += 1
    return tokenizer.decode(ids[position:end])


def _split_header(header_ids: list[int], tokenizer: Tokenizer) -> tuple[str | None, list[str]]:
    """The channel (None without a marker, "" if no name follows it) and the header's other words."""
    pieces: list[str | int] = []
    run: list[int] = []
    for id in [*header_ids, None]:
        if id is not None and not tokenizer.is_special(id):
            run.append(id)
            continue
        if run:
            pieces.append(tokenizer.decode(run))
            run = []
        if id is not None:
            pieces.append(id)
    channel = None
    if tokenizer.channel in pieces:
        at = pieces.index(tokenizer.channel)
        following = pieces[at + 1] if at + 1 < len(pieces) and isinstance(pieces[at + 1], str) else ""
        channel = re.match(r"[^\s<]*", following).group()
        pieces[at : at + (2 if following else 1)] = [following[len(channel) :]]
    # <|constrain|> begins a word; any other control token is spelled where it stands.
    text = ""
    for piece in pieces:
        text += " " if piece == tokenizer.constrain else ""
        text += piece if isinstance(piece, str) else tokenizer.decode([piece], keep_special=True)
    return channel, re.findall(r"[^ \t\n\r\f]+", text)


def _parse_header(header_ids: list[int], tokenizer: Tokenizer, role: str | None, *, is_strict: bool) -> Message:
    """A message without content. Forgiving: keeps what it understands of a malformed header."""
    channel, words = _split_header(header_ids, tokenizer)
    if any(REPLACEMENT in part for part in (channel or "", *words)):
        _problem("could not decode header", is_strict)
    if channel == "":
        _problem("channel marker present but no channel value found in header", is_strict)
    name = None
    if role is None:
        if not words:
            _problem("message header did not contain a role", is_strict)
        name = words[0] if words else "assistant"
        if name in ROLES:
            role = name
        elif len(words) > 1 or name.startswith("to="):
            role = "tool"
            words = words[1:]
        else:
            _problem(f"Unknown role: {name}", is_strict)
            role = name
    if words and words[0] == role:
        words = words[1:]
    recipient = content_type = None
    if words and (words[-1].startswith("to=") or len(words) == 1):
        recipient = words.pop().removeprefix("to=")
    elif words:
        content_type = words.pop()
        recipient = words.pop().removeprefix("to=")
    if words:
        _problem(f"unexpected tokens remaining in message header: {' '.join(words)!r}", is_strict)
    return Message(role, "", channel or None, recipient, content_type, name if role == "tool" else None)


def _headless_message(header_ids: list[int], tokenizer: Tokenizer, role: str) -> Message:
    """A message whose <|message|> is missing: the channel if there is one, all other words are content."""
    channel, words = _split_header(header_ids, tokenizer)
    if words and words[0] == role:
        words = words[1:]
    return Message(role, " ".join(words), channel or None)
