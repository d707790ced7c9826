"""Tools as harmony writes them: what the system message says of the built-in ones, functions declared in TypeScript, calls.

Function declarations and calls of functions follow the hub's chat template. The template knows no call of a built-in tool
(it makes `functions.python` of one), so those have the form of OpenAI's `openai-harmony`: recipient `python` or
`browser.search`, channel analysis, content type `code`, results as they are.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

BUILTIN_TOOLS = ("browser", "python")
BROWSER_FUNCTIONS = ("browser.find", "browser.open", "browser.search")

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


def from_json(value: Any, where: str) -> Any:
    """What a JSON text says; any other value as it is. Raises ValueError naming `where`."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is text that is no JSON ({error}): {value[:80]!r}") from error


def to_json(value: Any, where: str) -> str:
    """JSON text as the template's `tojson` writes it. Raises ValueError naming `where`."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be written as JSON: {error}") from error


# ---- calls -----------------------------------------------------------------------------------------------------------


def read_call(call: Any, builtin_tools: Sequence[str], where: str, *, keeps_text: bool = False) -> tuple[str, str, str, str]:
    """(recipient, channel, content type, content) of a tool call as APIs return it.

    `arguments` are an object or its JSON text, which is read so that it is not encoded twice; null and "" stand for {}.
    Python's may also be the code itself. keeps_text: JSON text stays as it is. Raises ValueError naming `where`.
    """
    function = _function_of(call)
    if function is None or "arguments" not in function:
        raise ValueError(f"{where} needs a function with name (one word) and arguments (object), got {call!r:.99}")
    name, arguments = function["name"], function["arguments"]
    tool = name.split(".")[0]
    is_builtin = tool in builtin_tools
    recipient = name if is_builtin else f"functions.{name.removeprefix('functions.')}"
    if is_builtin and name not in ("python", *BROWSER_FUNCTIONS):
        raise ValueError(f"{where} calls {name!r} of builtin_tools; allowed: python, {', '.join(BROWSER_FUNCTIONS)}")
    channel, content_type = ("analysis", "code") if is_builtin else ("commentary", "json")
    content = (_read_code if recipient == "python" else _read_arguments)(arguments, f"{where}.arguments")
    if keeps_text and recipient != "python" and isinstance(arguments, str) and arguments:
        content = arguments
    return recipient, channel, str(function.get("content_type") or content_type), content


def _function_of(tool: Any) -> Mapping[str, Any] | None:
    """The function of a schema or call {"type": "function", "function": {...}} or {...}; None if it has no name."""
    function = tool.get("function") or tool if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return function if isinstance(name, str) and name and not re.search(r"\s", name) else None


def _read_arguments(arguments: Any, where: str) -> str:
    arguments = {} if arguments is None or arguments == "" else from_json(arguments, where)
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where} is a {type(arguments).__name__}; it must be an object or its JSON text")
    return to_json(arguments, where)


def _read_code(arguments: Any, where: str) -> str:
    code = arguments
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        try:
            code = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    if isinstance(code, Mapping) and list(code) == ["code"] and isinstance(code["code"], str):
        return code["code"]
    if not isinstance(arguments, str):
        raise ValueError(f'{where} of python must be {{"code": "..."}}, its JSON text or the code, got {arguments!r:.99}')
    return arguments


# ---- declarations ----------------------------------------------------------------------------------------------------


def builtin_sections(builtin_tools: Sequence[str] | None) -> list[str]:
    """What the system message says of the built-in tools. Raises ValueError for other tools."""
    if builtin_tools is None:
        return []
    if not isinstance(builtin_tools, (list, tuple)) or any(tool not in BUILTIN_TOOLS for tool in builtin_tools):
        raise ValueError(
            f"builtin_tools is {builtin_tools!r:.99}; allowed: {', '.join(BUILTIN_TOOLS)}, in a list. Own functions go to "
            "`tools`"
        )
    sections = {"browser": BROWSER_SECTION, "python": PYTHON_SECTION}
    return [text for tool, text in sections.items() if tool in builtin_tools]


def read_tools(tools: Any) -> list[Mapping[str, Any]]:
    """Function schemas {name, description, parameters} of `tools`: a list of {"type": "function", "function": {...}}, of
    bare schemas or of the JSON text of either, or the JSON text of such a list; None and "" are no tools. Raises ValueError."""
    tools = None if tools == "" else from_json(tools, "tools")
    if tools is None:
        return []
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"tools is a {type(tools).__name__}; it must be a list of function schemas or its JSON text")
    functions = []
    for index, tool in enumerate(tools):
        tool = from_json(tool, f"tools[{index}]")
        function = _function_of(tool)
        if function is None:
            raise ValueError(f'tools[{index}] must be {{"type": "function", "function": {{"name": ONE_WORD}}}}, got {tool!r:.99}')
        functions.append(function)
    return functions


def declare_functions(functions: Sequence[Mapping[str, Any]]) -> str:
    """The namespace `functions` of a developer message. Raises ValueError for a schema that is none."""
    declarations = []
    for index, function in enumerate(functions):
        try:
            declarations.append(_function_declaration(function))
        except (TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"tools[{index}] ({function['name']}) has parameters that are no JSON schema: {error}") from error
    return f"## functions\n\nnamespace functions {{\n\n{''.join(declarations)}}} // namespace functions"


def _function_declaration(function: Mapping[str, Any]) -> str:
    comment = "" if function.get("description") is None else f"// {function['description']}\n"
    name = function["name"].removeprefix("functions.")
    schema = from_json(function.get("parameters"), "parameters")
    others = [key for key, value in function.items() if isinstance(value, Mapping) and "properties" in value]
    if schema is None and others:
        raise ValueError(f"they are under {others[0]!r}, and must be under 'parameters'")
    if schema and not isinstance(schema, Mapping):
        raise TypeError(f"they are a {type(schema).__name__}")
    properties = _properties(schema) if schema else {}
    if not properties:
        return f"{comment}type {name} = () => any;\n\n"
    lines = [_parameter(key, spec, schema.get("required") or ()) for key, spec in properties.items()]
    return f"{comment}type {name} = (_: {{\n{''.join(lines)}}}) => any;\n\n"


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not null: a table gives every row the union of all rows' keys."""
    return {name: spec for name, spec in (schema.get("properties") or {}).items() if spec is not None}


def _parameter(name: str, spec: Any, required: Sequence[str]) -> str:
    schema = spec if isinstance(spec, Mapping) else {}
    comment = f"// {schema['description']}\n" if schema.get("description") else ""
    default = ""
    if "default" in schema:
        is_verbatim = isinstance(schema["default"], str) and bool(schema.get("enum") or schema.get("oneOf"))
        value = schema["default"] if is_verbatim else to_json(schema["default"], f"default of tool parameter {name}")
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
        return _object(schema) if _properties(schema) else "object"
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
            text += f"{' ' * 20}// default: {to_json(variant['default'], 'default of a oneOf variant')}"
    return text


def _object(schema: Mapping[str, Any]) -> str:
    required = schema.get("required") or ()
    fields = [
        f"{name}{'' if name in required else '?'}: \n{' ' * 16}{_typescript_type(spec)}"
        for name, spec in _properties(schema).items()
    ]
    return "{\n" + ", ".join(fields) + "}"


