"""Activations that wait for the backward in pinned host memory, copied out and back beside the computation.

A forward puts tensors in, layer by layer; the backward gets them back in the opposite order, each asked for one layer ahead.
Copies run on streams of their own. A tensor that is on its way out stays allocated until its copy is done; the forward waits
for the oldest copies once more than `max_pending_bytes` are on their way, so that what it keeps alive is bounded.
"""
from __future__ import annotations

from collections import deque

import torch

_ALIGNMENT = 256  # bytes
_PIECE = 1 << 30  # bytes; a multiple of the alignment


class HostTensor:
    """A tensor in the store; fetch() starts its way back, get() returns it on the GPU. Frees its place when dropped."""

    def __init__(self, store: HostStore, parts: list[torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        self._store, self._parts, self._shape, self._dtype = store, parts, shape, dtype
        self.num_bytes = shape.numel() * dtype.itemsize
        self._fetched: torch.Tensor | None = None
        self._is_back: torch.cuda.Event | None = None
        store.num_held += 1

    def __del__(self) -> None:
        self._store.num_held -= 1

    def fetch(self) -> None:
        if self._fetched is not None:
            return
        store = self._store
        self._fetched = torch.empty(self._shape, dtype=self._dtype, device=store.device)
        store.incoming.wait_stream(torch.cuda.current_stream(store.device))  # who had this memory before may still use it
        with torch.cuda.stream(store.incoming):
            for part, target in zip(self._parts, _as_bytes(self._fetched).split([len(part) for part in self._parts])):
                target.copy_(part, non_blocking=True)
            self._is_back = store.incoming.record_event()

    def get(self) -> torch.Tensor:
        self.fetch()
        torch.cuda.current_stream(self._store.device).wait_event(self._is_back)
        fetched, self._fetched = self._fetched, None
        return fetched


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


class HostStore:
    """At most `capacity` bytes of pinned host memory, taken when first needed."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.num_held = 0
        self.outgoing, self.incoming = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pieces: list[torch.Tensor] = []  # of _PIECE bytes each: a power of two, which pinned allocations are rounded to
        self._used = 0  # bytes of the pieces, one after the other
        self._pending: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._pending_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Makes room for so much more, to be put in by the next forward."""
        assert num_bytes <= self.capacity, f"{num_bytes} bytes asked of a host store of {self.capacity}"
        if self.num_held == 0:
            self._used = 0
        while len(self._pieces) * _PIECE < min(self._used + num_bytes, self.capacity):
            try:
                self._pieces.append(torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True))
            except RuntimeError as error:
                raise RuntimeError(f"model.host_gb: the system refuses to pin another {_PIECE / 1e9:.1f} GB of host memory "
                                   f"({str(error).splitlines()[0]}); set a smaller model.host_gb") from error

    def _take(self, num_bytes: int) -> list[torch.Tensor] | None:
        """The next bytes of the pieces, None where there are too few."""
        if self._used + num_bytes > len(self._pieces) * _PIECE:
            return None
        parts = []
        while num_bytes > 0:
            piece, first = divmod(self._used, _PIECE)
            parts.append(self._pieces[piece][first:first + num_bytes])
            num_bytes -= len(parts[-1])
            self._used += len(parts[-1])
        self._used = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        return parts

    def put(self, tensor: torch.Tensor, *, max_pending_bytes: int) -> HostTensor | torch.Tensor:
        """Starts copying a contiguous tensor out. Where the store has no room (another batch's tensors are still in it) the
        tensor itself comes back, to be kept where it is."""
        assert tensor.is_contiguous(), tensor.stride()
        size = tensor.numel() * tensor.element_size()
        parts = self._take(size)
        if parts is None:
            return tensor
        self.outgoing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outgoing):
            for part, source in zip(parts, _as_bytes(tensor).split([len(part) for part in parts])):
                part.copy_(source, non_blocking=True)
            done = self.outgoing.record_event()
        self._pending.append((tensor, done))
        self._pending_bytes += size
        while self._pending_bytes > max_pending_bytes:
            self._settle_oldest()
        return HostTensor(self, parts, tensor.shape, tensor.dtype)

    def settle(self) -> None:
        """Lets the computation go on only after every copy so far, and lets go of the tensors copied."""
        while self._pending:
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        tensor, done = self._pending.popleft()
        torch.cuda.current_stream(self.device).wait_event(done)
        self._pending_bytes -= tensor.numel() * tensor.element_size()


def transfer_rate(device: torch.device) -> float:
    """Measured bytes per second from the GPU to pinned host memory."""
    size = 1 << 26
    source, target = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, pin_memory=True)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    target.copy_(source, non_blocking=True)
    events[0].record()
    target.copy_(source, non_blocking=True)
    events[1].record()
    torch.cuda.synchronize(device)
    return size / (events[0].elapsed_time(events[1]) / 1e3)
