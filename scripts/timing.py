"""Timing on one GPU: medians, ceilings to hold them against, and a JSON line per result.

Ceilings belong to the run that uses them: GPUs of one name differ by some percent, and one GPU does from hour to hour.
"""

import json
import statistics
import traceback
from collections.abc import Callable

import torch
import triton

PRODUCT_SIZE, COPY_BYTES = 8192, 2**31
_FLUSH_BYTES = 2**28  # more than any L2 cache holds
_SLEEP_CYCLES = 600_000  # some 0.3 ms, in which the host prepares a call


class Report:
    """Prints each result as a JSON line and keeps it for the table at the end."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def __call__(self, what: str, **values) -> None:
        self.lines.append({"what": what, **values})
        print(json.dumps(self.lines[-1]), flush=True)

    def guarded(self, what: str, function: Callable, *arguments, **settings):
        """The result of one case; an error becomes a line of its own, and None."""
        try:
            return function(*arguments, **settings)
        except Exception as error:  # one failing case must not hide the others
            traceback.print_exc()
            self(what, error=f"{type(error).__name__}: {str(error)[:300]}")
        return None


def milliseconds(function: Callable[[], object], *, warmup: int = 10, rep: int = 60) -> float:
    """Median time of a call, the host's part included where the GPU waits for it; the L2 cache is emptied before each call.
    `warmup` and `rep`: time to spend, in milliseconds."""
    return triton.testing.do_bench(function, warmup=warmup, rep=rep, return_mode="median")


def device_milliseconds(function: Callable[[], object], *, rep: float = 40.0) -> float:
    """Median time of a call on the GPU alone: the GPU sleeps first, until the host has prepared the call (up to some 0.3 ms of
    it). The L2 cache is emptied before each call; `rep`: time to spend, in milliseconds."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def times(count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            flush.zero_()
            torch.cuda._sleep(_SLEEP_CYCLES)
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    function()  # compiles
    estimate = min(times(3))
    return statistics.median(times(max(3, min(100, int(rep / max(estimate, 1e-3))))))


def median_ms(function: Callable[[], object], *, warmup: int, iterations: int) -> float:
    """Median time of long calls, one after the other as in a run, with a warm cache."""
    for _ in range(warmup):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def product_tflops() -> float:
    """TFLOP/s of an 8192^3 bf16 product."""
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * PRODUCT_SIZE**3 / milliseconds(lambda: a @ b, warmup=25, rep=100) / 1e9


def copy_gb_per_s() -> float:
    """GB/s of a copy of 2 GiB, read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / milliseconds(lambda: target.copy_(source)) / 1e6


def measure_ceilings(report: Report) -> tuple[float, float]:
    """TFLOP/s and GB/s, reported beside the GPU's name and the versions."""
    tflops, bandwidth = product_tflops(), copy_gb_per_s()
    report("ceilings", gpu=torch.cuda.get_device_name(), tflops=round(tflops), GB_per_s=round(bandwidth),
           torch=torch.__version__, triton=triton.__version__)
    torch.cuda.empty_cache()
    return tflops, bandwidth


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """||ours - exact|| / ||exact||; 0 where both are zero, infinite where ours is not finite."""
    ours, exact = ours.detach().double(), exact.detach().double().to(ours.device)
    if not ours.isfinite().all():
        return torch.inf
    difference, size = (ours - exact).norm().item(), exact.norm().item()
    return difference / size if size else (torch.inf if difference else 0.0)
