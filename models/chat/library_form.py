"""Tools as `openai-harmony` declares them: in any namespace, in a TypeScript of its own, quirks included, because a model that is
served by way of that library reads them so."""

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

INDENT = "    "
KINDS = {"integer": "number", "number": "number", "boolean": "boolean"}


def tools_section(namespaces: Sequence[Mapping[str, Any]]) -> str:
    """The section of tools. namespaces: each with name, description (or null), and tools {name, description, parameters}."""
    ordered = sorted(namespaces, key=lambda space: space["name"].encode())
    return "\n\n".join(["# Tools", *map(_namespace, ordered)])


def _namespace(space: Mapping[str, Any]) -> str:
    lines, tools = [f"## {space['name']}\n"], space.get("tools") or []
    lines += [f"// {line}" if tools else line for line in _lines(space.get("description"))]
    if not tools:
        return "\n".join(lines)
    lines.append(f"namespace {space['name']} {{\n")
    for tool in tools:
        lines += [f"// {line}" for line in _lines(tool.get("description"))]
        schema = tool.get("parameters")
        arguments = "()" if schema is None else f"(_: {_type(schema, '')})"
        lines.append(f"type {tool['name']} = {arguments} => any;\n")
    return "\n".join([*lines, f"}} // namespace {space['name']}"])


def _lines(text: str | None) -> list[str]:
    """Lines, without their ends and without an empty one after the last end."""
    lines = [line.removesuffix("\r") for line in (text or "").split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def _type(schema: Any, indent: str) -> str:
    if not isinstance(schema, Mapping):
        return "any"
    if isinstance(schema.get("oneOf"), list):
        return "".join(f"\n{indent} | {_variant(variant, indent, is_described=True, spells_enum=False)}"
                       for variant in schema["oneOf"])
    kind = schema.get("type")
    if isinstance(kind, list) and (names := [name for name in kind if isinstance(name, str)]):
        return " | ".join("number" if name == "integer" else name for name in names)
    if kind == "object":
        return _object(schema, indent)
    if kind == "string":
        return " | ".join(f'"{value}"' for value in _list(schema, "enum") if isinstance(value, str)) or "string"
    if kind == "array":
        return f"{_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return KINDS.get(kind, "any") if isinstance(kind, str) else "any"


def _object(schema: Mapping[str, Any], indent: str) -> str:
    properties, required = schema.get("properties"), _list(schema, "required")
    text = "".join(f"{indent}// {line}\n" for line in [schema.get("description")] if isinstance(line, str)) + "{\n"
    for key, value in properties.items() if isinstance(properties, Mapping) else ():
        if value is not None:  # a table gives every row the union of all rows' keys
            text += _property(key + ("" if key in required else "?"), value if isinstance(value, Mapping) else {}, indent)
    return text + indent + "}"


def _property(name: str, schema: Mapping[str, Any], indent: str) -> str:
    text = f"{indent}// {schema['title']}\n{indent}//\n" if isinstance(schema.get("title"), str) else ""
    description = f"{indent}// {schema['description']}\n" if isinstance(schema.get("description"), str) else ""
    examples = "".join(f'{indent}// - "{value}"\n' for value in _list(schema, "examples") if isinstance(value, str))
    examples = f"{indent}// Examples:\n{examples}" if _list(schema, "examples") else ""
    default = f"default: {_default(schema, spells_enum=True)}" if "default" in schema else ""
    if isinstance(schema.get("oneOf"), list):
        said = [variant.get("description") if isinstance(variant, Mapping) else None for variant in schema["oneOf"]]
        text += examples + ("" if said and said[0] == schema.get("description") else description)  # said once, or not at all
        text += (f"{indent}// {default}\n" if default else "") + f"{indent}{name}:\n"
        for index, variant in enumerate(schema["oneOf"]):
            is_described = not description or index > 0 and said[index] != schema["description"]
            text += f"{indent} | {_variant(variant, indent, is_described=is_described, spells_enum=True)}\n"
        return text + f"{indent},\n"
    kind = _nullable(_type(schema, indent + INDENT), schema)
    return f"{text}{description}{examples}{indent}{name}: {kind},{' // ' + default if default else ''}\n"


def _variant(schema: Any, indent: str, *, is_described: bool, spells_enum: bool) -> str:
    fields = schema if isinstance(schema, Mapping) else {}
    comments = [fields["description"]] if is_described and isinstance(fields.get("description"), str) else []
    comments += [f"default: {_default(fields, spells_enum=spells_enum)}"] if "default" in fields else []
    return _nullable(_type(schema, indent + "   "), fields) + (f" // {' '.join(comments)}" if comments else "")


def _nullable(kind: str, schema: Mapping[str, Any]) -> str:
    return f"{kind} | null" if schema.get("nullable") is True and "null" not in kind else kind


def _default(schema: Mapping[str, Any], *, spells_enum: bool) -> str:
    """spells_enum: whether the default of an enum has no quotes; else it is JSON."""
    value, is_enum = schema["default"], bool(_list(schema, "enum"))
    if isinstance(value, str) and not (is_enum and not spells_enum):
        return value if is_enum else f'"{value}"'
    return _json(value)


def _list(schema: Mapping[str, Any], key: str) -> list:
    return value if isinstance(value := schema.get(key), list) else []


def _json(value: Any) -> str:
    """JSON as Rust's serde_json writes it: no spaces, and floats in its spelling."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_json(str(key))}:{_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_json, value)) + "]"
    return _float(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _float(value: float) -> str:
    """The shortest digits of a float; between 1e-5 and 1e16 without exponent."""
    if not math.isfinite(value):
        return "null"
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    digits = "".join(map(str, digits))
    exponent, digits = exponent + len(digits) - len(digits.rstrip("0")), digits.rstrip("0") or "0"
    point = len(digits) + exponent if value else 1  # digits before the point
    if 0 < point <= 16:
        whole = digits.ljust(point, "0")
        text = f"{whole[:point]}.{whole[point:] or '0'}"
    elif -5 < point <= 0:
        text = f"0.{'0' * -point}{digits}"
    else:
        text = f"{digits[0]}{'.' * (len(digits) > 1)}{digits[1:]}e{point - 1}"
    return "-" * sign + text
