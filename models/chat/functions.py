"""Python functions as functions that a model may call: schemas from type hints and docstrings, and arguments checked by them.

Schemas have the form that transformers' get_json_schema gives for the same function, so that a prompt reads alike; an argument
may lack a description here.
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array", tuple: "array"}
OF_KIND = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list,
           "null": type(None)}
SECTION = re.compile(r"^[ \t]*(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?)[ \t]*:?[ \t]*$", re.MULTILINE)
ENTRY = re.compile(r"^[ \t]*(\w+)[ \t]*(?:\([^)\n]*\))?[ \t]*:[ \t]*", re.MULTILINE)


def public_methods(owner: object, *, without: tuple[str, ...]) -> dict[str, Callable]:
    """An object's methods by name, in the order of their definition, without those of `without` and those of Python itself."""
    names = [name for kind in type(owner).__mro__[-2::-1] for name, value in vars(kind).items()
             if isinstance(value, (types.FunctionType, classmethod, staticmethod))]
    return {name: getattr(owner, name) for name in dict.fromkeys(names) if not name.startswith("_") and name not in without}


def function_schema(function: Callable) -> dict[str, Any]:
    """{name, description, parameters} of a function. Raises ValueError naming it if it has no docstring, an argument has no type,
    or a type is none that JSON has."""
    name = function.__name__
    text = inspect.getdoc(function)
    if not text:
        raise ValueError(f"{function.__qualname__} has no docstring, which tells the model what it does: give it one, or a name "
                         "that starts with _")
    description, described = _read_docstring(text)
    properties, required = {}, []
    for key, (parameter, schema) in _arguments(function).items():
        properties[key] = schema | ({"description": described[key]} if key in described else {})
        if parameter.default is inspect.Parameter.empty:
            required.append(key)
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    return {"name": name, "description": description, "parameters": parameters}


def read_arguments(function: Callable, text: str) -> dict[str, Any]:
    """The keyword arguments that a call's JSON text gives the function. Raises ValueError with a text for the model."""
    known = _arguments(function)
    required = [key for key, (parameter, _) in known.items() if parameter.default is inspect.Parameter.empty]
    parameters = {"properties": {key: schema for key, (_, schema) in known.items()}, "required": required}
    return read_object(function.__name__, parameters, text)


def read_object(name: str, parameters: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The arguments that a call's JSON text gives the function `name`, whose `parameters` are a JSON schema. Raises ValueError
    with a text for the model."""
    try:
        values = json.loads(text, parse_constant=_refuse_constant) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the arguments are no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("the arguments must be a JSON object")
    known = parameters.get("properties", {})
    missing = [key for key in parameters.get("required", ()) if key not in values]
    unknown = [key for key in values if key not in known and not parameters.get("additionalProperties")]
    if missing or unknown:
        what = [f"{word} {', '.join(keys)}" for word, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise ValueError(f"arguments of {name}: {'; '.join(what)}")
    for key, value in values.items():
        if (wanted := _misfit(value, known.get(key, {}))) is not None:
            raise ValueError(f"argument {key} of {name} must be {wanted}")
    return values


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _arguments(function: Callable) -> dict[str, tuple[inspect.Parameter, dict]]:
    """Each argument with the schema of its type."""
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise ValueError(f"{function.__qualname__}: a type hint cannot be read ({error})") from error
    found = {}
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise ValueError(f"{function.__qualname__}: {parameter} cannot be an argument of a call; name each of them")
        if key not in hints:
            raise ValueError(f"{function.__qualname__}: argument {key} has no type hint; give it one, such as {key}: str")
        found[key] = parameter, _schema_of(hints[key], f"{function.__qualname__}: argument {key}")
    return found


def _schema_of(hint: Any, where: str) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin is typing.Annotated:
        return _schema_of(args[0], where)
    if origin in (typing.Union, types.UnionType):
        schemas = [_schema_of(arg, where) for arg in args if arg is not type(None)]
        if all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
            schemas = [{"type": _one_or_all(sorted(schema["type"] for schema in schemas))}]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        return schema | ({"nullable": True} if type(None) in args else {})
    if origin is typing.Literal:
        kinds = ["null" if arg is None else KINDS.get(type(arg)) for arg in args]
        if None not in kinds:
            return {"type": _one_or_all(kinds), "enum": list(args)}
    if origin is tuple and args and ... not in args:
        return {"type": "array", "prefixItems": [_schema_of(arg, where) for arg in args]}
    if origin in (list, tuple, set) and args:
        return {"type": "array", "items": _schema_of(args[0], where)}
    if origin is dict and args:
        return {"type": "object", "additionalProperties": _schema_of(args[1], where)}
    if (kind := KINDS.get(origin or hint)) is not None:
        return {"type": kind}
    raise ValueError(f"{where} has the type {hint}; allowed: {', '.join(kind.__name__ for kind in KINDS)}, Literal, Any, and "
                     "lists and unions of them")


def _one_or_all(kinds: list[str]) -> str | list[str]:
    different = list(dict.fromkeys(kinds))
    return different if len(different) > 1 else different[0]


def _misfit(value: Any, schema: Mapping[str, Any]) -> str | None:
    """What the value should be; None if it is that."""
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema:
        wanted = [_misfit(value, choice) for choice in schema["anyOf"]]
        return None if None in wanted else " or ".join(wanted)
    kinds = schema.get("type")
    if kinds is None:
        return None
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not any(isinstance(value, OF_KIND.get(kind, object)) and (kind == "boolean" or not isinstance(value, bool))
               for kind in kinds):
        return " or ".join(kinds)
    if "enum" in schema and value not in schema["enum"]:
        return "one of " + ", ".join(json.dumps(choice) for choice in schema["enum"])
    if isinstance(value, list) and "prefixItems" in schema:
        places = schema["prefixItems"]
        if len(value) != len(places):
            return f"array of {len(places)} items"
        misfits = (f"array with {wanted} at place {place}" for place, (item, one) in enumerate(zip(value, places))
                   if (wanted := _misfit(item, one)) is not None)
        return next(misfits, None)
    if isinstance(value, list) and "items" in schema:
        inner = next((wanted for item in value if (wanted := _misfit(item, schema["items"])) is not None), None)
        return None if inner is None else f"array of {inner}"
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), Mapping) and "properties" not in schema:
        items = (_misfit(item, schema["additionalProperties"]) for item in value.values())
        inner = next((wanted for wanted in items if wanted is not None), None)
        return None if inner is None else f"object of {inner}"
    return None


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The description, and those of the arguments, of a docstring in Google's style."""
    pieces = SECTION.split(text)  # description, heading, body, heading, body, ...
    described = {}
    for heading, body in zip(pieces[1::2], pieces[2::2]):
        if heading in ("Args", "Arguments", "Parameters"):
            entries = ENTRY.split(inspect.cleandoc(body))  # "", name, text, name, text, ...
            described |= {name: " ".join(words.split()) for name, words in zip(entries[1::2], entries[2::2])}
    return pieces[0].strip(), described
