"""Python methods as a model's tools: schemas, declarations, arguments."""

import json
from typing import Any, Literal, Optional

import pytest

from models.chat.functions import function_schema, public_methods, read_arguments
from models.chat.tools import declare_functions


class Game:
    def reset(self, **row) -> str:
        return "begin"

    def guess(self, word: str, count: Optional[int] = None, mode: Literal["fast", "slow"] = "fast",
              places: list[int] = ()) -> str:
        """
        Makes a guess.

        Args:
            word: The word, in brackets (e.g., '[crane]'):
                five letters.
            count: How often
        Returns:
            The feedback.
        """

    async def wait(self) -> None:
        """Waits."""

    @staticmethod
    def ratio(x: float, y: int | float, also: Any = None) -> float:
        """Divides."""

    def _hidden(self) -> None:
        """Not a tool."""


def test_public_methods_are_tools_in_their_order():
    class Child(Game):
        def extra(self) -> None:
            """More."""

    assert list(public_methods(Child(), without=("reset",))) == ["guess", "wait", "ratio", "extra"]


def test_a_schema_is_that_of_transformers():
    """The expected one was printed by transformers 5.24's get_json_schema; it demands descriptions of `mode` and `places` too."""
    assert function_schema(Game().guess) == {
        "name": "guess", "description": "Makes a guess.", "parameters": {"type": "object", "properties": {
            "word": {"type": "string", "description": "The word, in brackets (e.g., '[crane]'): five letters."},
            "count": {"type": "integer", "nullable": True, "description": "How often"},
            "mode": {"type": "string", "enum": ["fast", "slow"]}, "places": {"type": "array", "items": {"type": "integer"}}},
            "required": ["word"]}}


def _nested(pair: tuple[int, str], rates: dict[str, float], mixed: str | int | None, either: int | list[int],
            choice: Literal["a", 1, None] = "a"):
    """Takes what has parts."""


def test_types_with_parts_have_the_schemas_of_transformers():
    """Printed by its get_json_schema, but for the descriptions."""
    assert function_schema(_nested)["parameters"]["properties"] == {
        "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]},
        "rates": {"type": "object", "additionalProperties": {"type": "number"}},
        "mixed": {"type": ["integer", "string"], "nullable": True},
        "either": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
        "choice": {"type": ["string", "integer", "null"], "enum": ["a", 1, None]}}


@pytest.mark.parametrize("changes, message", [
    ({}, None), ({"choice": None}, None), ({"pair": [1, 2]}, "array with string at place 1"), ({"pair": [1]}, "array of 2 items"),
    ({"rates": {"x": "y"}}, "object of number"), ({"either": [1]}, None), ({"either": ["a"]}, "integer or array of integer"),
    ({"choice": "b"}, 'one of "a", 1, null')])
def test_the_parts_of_arguments_are_checked(changes, message):
    arguments = {"pair": [1, "a"], "rates": {"x": 1}, "mixed": None, "either": 3} | changes
    if message is None:
        assert read_arguments(_nested, json.dumps(arguments)) == arguments
    else:
        with pytest.raises(ValueError, match=f"must be {message}"):
            read_arguments(_nested, json.dumps(arguments))


def test_a_function_is_declared_as_the_hub_template_does():
    functions = public_methods(Game(), without=("reset",)).values()
    text = declare_functions([function_schema(function) for function in functions])
    assert "// Makes a guess.\ntype guess = (_: {\n// The word" in text
    assert "type wait = () => any;" in text and "y: integer | number,\nalso?: any,\n" in text


@pytest.mark.parametrize("text, arguments", [
    ('{"word": "x"}', {"word": "x"}), ('{"word": "x", "count": null}', {"word": "x", "count": None}),
    ('{"word": "x", "count": 3, "places": [1, 2], "mode": "slow"}',
     {"word": "x", "count": 3, "places": [1, 2], "mode": "slow"})])
def test_arguments_that_fit_are_read(text, arguments):
    assert read_arguments(Game().guess, text) == arguments


@pytest.mark.parametrize("text, message", [
    ("", "missing word"), ("[1, 2", "no JSON"), ("[1]", "must be a JSON object"), ('{"word": "x", "z": 1}', "unknown z"),
    ('{"word": 1}', "argument word of guess must be string"), ('{"word": "x", "count": true}', "must be integer"),
    ('{"word": "x", "count": 1.5}', "must be integer"), ('{"word": "x", "places": [1, "a"]}', "must be array of integer"),
    ('{"word": "x", "mode": "x"}', 'must be one of "fast", "slow"'), ('{"word": NaN}', "NaN is no number of JSON"),
    ('{"word": ' + "[" * 100_000, "no JSON"), ('{"word": "x", "count": ' + "9" * 5000 + "}", "no JSON")])
def test_arguments_that_do_not_fit_are_refused_with_a_text_for_the_model(text, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_arguments(Game().guess, text)


def test_numbers_may_be_whole_and_any_takes_all():
    text = json.dumps({"x": 1, "y": 2.5, "also": [{}]})
    assert read_arguments(Game().ratio, text) == {"x": 1, "y": 2.5, "also": [{}]}


@pytest.mark.parametrize("make, message", [
    (lambda: type("A", (), {"f": lambda self: None}), "no docstring"),
    (lambda: _method(lambda self, x: None), "x has no type hint"),
    (lambda: _method(lambda self, *x: None), r"\*x cannot be an argument"),
    (lambda: _method(_typed), "has the type .*bytes")])
def test_a_tool_that_cannot_be_described_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        function_schema(make()().f)


def _typed(self, x: bytes):
    """Takes bytes."""


def _method(function):
    function.__doc__ = "Does something."
    return type("A", (), {"f": function})
