"""What a device reaches, measured: matrix products, and copies."""
import time
from collections.abc import Callable

import torch

_CALLS = 20  # that are timed, after as many that raise a GPU's clocks


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a matrix product."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, a, out=out), device)


def copy_rate(device: torch.device, num_bytes: int, *, to_host: bool = False) -> float:
    """Bytes per second of a copy within the device, or to pinned host memory."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) if to_host else torch.empty_like(source)
    return num_bytes / _seconds(lambda: target.copy_(source, non_blocking=True), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, in the mean."""
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(_CALLS):
            call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / _CALLS
