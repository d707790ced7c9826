"""Out of memory is not the end: which errors mean it, and attempts that leave nothing behind when they fail so."""
import errno
import gc
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from grpo.record.terminal import tell
from models.decoder import CAPTURES

# Texts of out-of-memory errors of torch and its libraries, for errors without a type of their own.
MEMORY_TEXTS = ("DefaultCPUAllocator: can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
                "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")
T = TypeVar("T")


class StillOutOfMemory(torch.OutOfMemoryError):
    """Not even the least size fits; the message says what that is."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error says that memory was not enough, or is torch's own complaint while such an error was handled: the end of
    a graph's capture that failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return type(error) in (RuntimeError, torch.AcceleratorError) and (
        any(text in str(error) for text in MEMORY_TEXTS) or is_out_of_memory(error.__context__))


def attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
    """(what the function returns, None); if memory is not enough, (None, the error's first line). The error is then gone, and
    with it the tensors of the frames that it passed through; torch's unused memory is back with the GPU."""
    try:
        return function(), None
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, StillOutOfMemory) or not is_out_of_memory(error):
            raise
        if torch.cuda.is_initialized():
            with CAPTURES.computing():
                torch.cuda.synchronize()  # copies on other streams may still need what those frames hold
        refusal = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    free_unused()  # only here: while `error` has a name, it holds its frames
    return None, refusal


def attempt_twice(function: Callable[[], T]) -> T:
    """What the function returns. If memory is not enough, it is called once more, after torch's unused memory was freed: for
    functions that can be called again after they failed, and have no smaller size."""
    result, refusal = attempt(function)
    return result if refusal is None else function()


def free_unused() -> None:
    """Drops tensors that only wait for Python's garbage collection, and gives torch's unused memory back to the GPU. Not for
    inside CAPTURES.computing(), which it waits for, as attempt() does."""
    with CAPTURES.computing():
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def say(text: str) -> None:
    """For programs without a display of their own: what they print may be data."""
    tell(text, sys.stderr)
