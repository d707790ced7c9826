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
