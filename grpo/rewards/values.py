"""Converts values from the user's code: to finite floats, and to entries for the log."""

import json
import math
import numbers
import traceback
from pathlib import Path

# Rewards, their parts and metrics. Squares and sums of what is within it are far from overflow, in fp32 too.
MAX_MAGNITUDE = 1e9


def to_number(value: object) -> tuple[float | None, str | None]:
    """(number, None) for a number (Python's, numpy's, Fraction, Decimal, bool, tensors and arrays of one value), (None, None) for
    None, and (None, the reason) for everything else, for NaN and for magnitudes over MAX_MAGNITUDE."""
    if value is None:
        return None, None
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    if isinstance(value, (str, bytes)) or is_complex or not hasattr(value, "__float__"):
        return None, f"a {type(value).__name__} ({shorten(value)}); expected a number, bool or None"
    try:
        number = float(value.item() if hasattr(value, "item") else value)  # arrays and tensors of one value, of any shape
    except Exception as error:  # of any class: complex-like, huge integers, tensors of many values
        return None, f"{shorten(value)}, which is no number: {error}"
    if not math.isfinite(number):
        return None, f"{number}, which is not finite"
    if abs(number) > MAX_MAGNITUDE:
        return None, f"{number:g}; magnitudes up to {MAX_MAGNITUDE:g} are allowed: scale it"
    return number, None


def loggable(value: object) -> object:
    """The value if JSON can hold it, else its text: the log of completions is JSON."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))  # a copy: whose code may change its own later
    except Exception:  # of any class; nesting without end
        return _text(value)[:500]


def describe_error(error: BaseException) -> str:
    """Type, text and place of an exception, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:  # of any class's __str__
        text = "(its text cannot be made)"
    return f"{type(error).__name__}: {text}{place}"


def shorten(value: object, length: int = 60) -> str:
    """A text, or another value's repr, cut to about `length` characters and quoted."""
    text = _text(value)
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def _text(value: object) -> str:
    try:
        return value if isinstance(value, str) else repr(value)
    except Exception as error:  # of any class's __repr__
        return f"<{type(value).__name__} without repr: {type(error).__name__}>"
