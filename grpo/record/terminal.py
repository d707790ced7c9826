"""The terminal: standard streams that may end with it, texts made safe to print, numbers and durations as a person reads them.

Model output is untrusted: every text that reaches the terminal goes through `clean`.
"""

import contextlib
import math
import os
import sys
from typing import TextIO


def hold_standard_streams() -> None:
    """Replaces closed standard streams by /dev/null: else prints could go into a file of the run."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if vars(sys)[name] is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115  (for the life of the process)


def flush_standard_streams() -> None:
    """Writes out what is buffered. Python would try again at its exit, and change the exit code where nobody reads any more."""
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)


def _flush(stream: TextIO) -> None:
    try:
        if not stream.closed:
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(text: str, stream: TextIO, *, end: str = "\n") -> None:
    """Prints what the work goes on without: nobody need read it, as in a terminal that was closed."""
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):
        _flush(stream)  # the other one may have to print what somebody must read, and must raise then


def clean(text: str, encoding: str) -> str:
    """Returns `text` safe to print: control and direction-changing characters become visible escapes, characters that
    `encoding` lacks become `?`. Newlines stay."""
    text = text if encoding.lower().startswith("utf") else text.replace("±", "+-")
    visible = "".join(char if char == "\n" or char.isprintable() else ascii(char)[1:-1] for char in text)
    return visible.encode(encoding, "replace").decode(encoding)


def print_error(label: str, message: str) -> None:
    """Prints `label: message` to stderr: the way out for every failure, whose text may come from data, graders or paths."""
    with contextlib.suppress(OSError, ValueError):  # a closed terminal or stream must not change how the program ends
        print(clean(f"{label}: {message}", sys.stderr.encoding or "utf-8"), file=sys.stderr, flush=True)


def one_line(text: str, limit: int) -> str:
    """Returns `text` on one line of at most `limit` characters: newlines shown as `\\n`, the middle cut out."""
    flat = text.replace("\n", "\\n")
    if len(flat) <= limit:
        return flat
    tail = limit // 3
    return f"{flat[: limit - tail - 5]} ... {flat[len(flat) - tail :]}"


def format_number(value: float) -> str:
    """Returns three or four significant digits, in the notation people read fastest at that size."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if 0 < size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:,.0f}"


def format_duration(seconds: float) -> str:
    """Returns `h:mm:ss`, or `m:ss` below one hour; `?` when it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def with_interval(metrics: dict[str, float], name: str) -> str:
    """Returns the value with half the width of its 95 % interval where that was logged."""
    width = f" ± {format_number(metrics[name + '/ci95'])}" if f"{name}/ci95" in metrics else ""
    return format_number(metrics[name]) + width
