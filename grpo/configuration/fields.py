"""Numeric fields of a configuration: each states its interval once, and `out_of_range` finds the values outside theirs."""
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import field
from typing import Any

REQUIRED = "???"  # OmegaConf's mark of a value that must be given


def number(interval: str, hint: str = "", *, default: Any = REQUIRED) -> Any:
    """A field for numbers in `interval`, such as "(0, 1]"; "inf" stands for any finite number, and for less than 2^31 where
    the field is an integer. `hint` ends the complaint about others, which `out_of_range` makes."""
    return field(default=default, metadata={"interval": interval, "hint": hint})


def out_of_range(node: object, prefix: str = "") -> Iterator[str]:
    """A complaint for each field of the dataclass whose numbers leave its interval, those of nested nodes and lists included."""
    for item in dataclasses.fields(node):
        value, key = getattr(node, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            yield from out_of_range(value, f"{key}.")
        elif "interval" in item.metadata:
            interval, hint = item.metadata["interval"], item.metadata["hint"]
            entries = value if isinstance(value, list) else [value]
            wrong = [entry for entry in entries if entry is not None and not lies_in(entry, interval)]
            if wrong:
                yield f"{key} = {value!r}: {describe_interval(interval, wrong)}" + (f": {hint}" if hint else "")


def lies_in(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    if isinstance(value, int) and high == math.inf:
        high = 2.0**31
    is_above = value >= low if interval[0] == "[" else value > low
    return is_above and (value <= high if interval[-1] == "]" else value < high)


def describe_interval(interval: str, wrong: list[float]) -> str:
    """What is allowed, in words that fit the numbers that are not: "[1, inf)" is "must be at least 1"."""
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"must lie in {interval}"
    if low == "-inf":
        return "must be finite"
    is_too_large = any(entry > float(low) for entry in wrong)
    most = "" if not is_too_large else " and less than 2^31" if isinstance(wrong[0], int) else " and finite"
    return f"must be {'at least' if interval[0] == '[' else '>'} {low}{most}"
