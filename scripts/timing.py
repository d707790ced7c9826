"""Timing on one GPU: medians, ceilings to hold them against, and a JSON line per result.

Ceilings belong to the run that uses them: GPUs of one name differ by some percent, and one GPU does from hour to hour. Without a
GPU the host's clock serves, so that a benchmark can be tried at tiny sizes; such times mean nothing.
"""

import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from models.formats.atomic import write_text

PRODUCT_SIZE, COPY_BYTES = 8192, 2**31
_FLUSH_BYTES = 2**28  # more than any L2 cache holds
_PART = 2**26  # elements that are compared in float64 at a time
_SLEEP_CYCLES = 600_000  # some 0.3 ms, in which the host prepares a call


class Report:
    """Prints each result as a JSON line and keeps it for the table at the end."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def __call__(self, what: str, **values) -> None:
        self.lines.append({"what": what, **values})
        print(json.dumps(self.lines[-1]), flush=True)

    def guarded(self, what: str, function: Callable, **about):
        """The result of one case; an error becomes a line of its own with the values of `about`, and None."""
        try:
            return function()
        except Exception as error:  # one failing case must not hide the others
            traceback.print_exc()
            self(what, **about, error=f"{type(error).__name__}: {str(error)[:300]}")
        return None

    def write(self, file: Path | None) -> None:
        """All lines as one JSON list, where a file is named."""
        if file is not None:
            write_text(file, json.dumps(self.lines, indent=1) + "\n")


class Ceilings(NamedTuple):
    tflops: float  # of a product
    gb_per_s: float  # of a copy, read and written


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def free_memory() -> None:
    """Gives unused memory back, before the next case."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(function: Callable) -> tuple[object, float]:
    """A result, and the seconds until it was there, on the GPU too."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if has_gpu:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def with_peak_gb(function: Callable) -> tuple[object, float]:
    """A result, and the most memory that was allocated until it was there, in 1e9 bytes; 0 without a GPU."""
    if not torch.cuda.is_available():
        return function(), 0.0
    torch.cuda.reset_peak_memory_stats()
    result = function()
    return result, round(torch.cuda.max_memory_allocated() / 1e9, 3)


def call_milliseconds(calls: list[Callable[[], object]], *, rep: float = 40.0) -> float:
    """Median time of a call. rep: time to spend, in milliseconds.

    A single call is timed on the GPU alone: the GPU sleeps first, until the host has prepared the call (up to some 0.3 ms of it),
    and the L2 cache is emptied. Several, the same operation on the weights of several layers, are replayed as one CUDA graph, as
    decode steps are; together they should read more than the L2 cache holds."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        calls[0]()
        return 1e3 * (time.perf_counter() - start)
    for call in calls:
        call()  # compiles
    return _device_milliseconds(calls[0], rep) if len(calls) == 1 else _graph_milliseconds(calls, rep)


def _device_milliseconds(call: Callable[[], object], rep: float) -> float:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def prepare() -> None:
        flush.zero_()
        torch.cuda._sleep(_SLEEP_CYCLES)

    estimate = min(_event_times(call, 3, prepare))
    return statistics.median(_event_times(call, max(3, min(100, int(rep / max(estimate, 1e-3)))), prepare))


def _graph_milliseconds(calls: list[Callable[[], object]], rep: float) -> float:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    estimate = min(_event_times(graph.replay, 4))
    return statistics.median(_event_times(graph.replay, max(5, min(50, int(rep / max(estimate, 1e-3)))))) / len(calls)


def _event_times(call: Callable[[], object], count: int, prepare: Callable[[], object] = lambda: None) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        prepare()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def median_ms(function: Callable[[], object], *, warmup: int, iterations: int) -> float:
    """Median time of long calls on a GPU, one after the other as in a run, with a warm cache."""
    for _ in range(warmup):
        function()
    return statistics.median(_event_times(function, iterations))


def _product_tflops(size: int, device: str, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / call_milliseconds([lambda: a @ b], rep=100) / 1e9


def _copy_gb_per_s(num_bytes: int, device: str) -> float:
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / call_milliseconds([lambda: target.copy_(source)]) / 1e6


def measure_ceilings(report: Report) -> Ceilings:
    """Of an 8192^3 bf16 product and a copy of 2 GiB (of small fp32 ones without a GPU), reported beside the versions."""
    if torch.cuda.is_available():
        found = Ceilings(_product_tflops(PRODUCT_SIZE, "cuda", torch.bfloat16), _copy_gb_per_s(COPY_BYTES, "cuda"))
    else:
        found = Ceilings(_product_tflops(64, "cpu", torch.float32), _copy_gb_per_s(2**16, "cpu"))
    report("ceilings", gpu=device_name(), tflops=round(found.tflops), GB_per_s=round(found.gb_per_s), torch=torch.__version__,
           triton=triton.__version__)
    free_memory()
    return found


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """||ours - exact|| / ||exact||; 0 where both are zero, infinite where ours is not finite."""
    if not ours.isfinite().all():
        return torch.inf
    difference = size = 0.0
    for one, other in zip(*(tensor.detach().flatten().split(_PART) for tensor in (ours, exact.to(ours.device)))):
        difference += (one.double() - other.double()).square().sum().item()
        size += other.double().square().sum().item()
    return (difference / size) ** 0.5 if size else (torch.inf if difference else 0.0)
