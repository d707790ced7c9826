"""Pinned host memory for activations between a forward and its backward, with copies that run during the computation."""
from __future__ import annotations

import math
from collections import deque

import torch

from kernels.device import next_power_of_2
from models.arena import space_of

_SLAB = 1 << 30  # bytes; see pinned_bytes


def pinned_bytes(num_bytes: int) -> int:
    """What one pinned allocation of torch takes: a power of two."""
    return next_power_of_2(num_bytes) if num_bytes else 0


class HostTensor:
    """A tensor in the store. fetch() starts the copy back, get() returns it on the GPU. The store's memory is free again once all
    of its tensors are gone."""

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
        store.incoming.wait_stream(torch.cuda.current_stream(store.device))  # earlier work may still use this memory
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
    """At most `capacity` bytes of pinned host memory, allocated when first needed, for activations between a forward and its
    backward. A forward puts tensors in, layer by layer; the backward gets them back in the opposite order, each requested up to
    LOOKAHEAD layers ahead. Copies run on their own streams, during the computation. A tensor stays allocated until its copy out
    is done; the forward waits for the oldest copies if more than `max_pending_bytes` are being copied, or where it is told to."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.num_held = 0
        self.outgoing, self.incoming = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._slabs: list[torch.Tensor] = []  # of _SLAB bytes each
        self._used = 0  # bytes of the slabs, one after the other
        self._pending: deque[tuple[torch.Tensor, torch.cuda.Event, int]] = deque()  # with the layer
        self._pending_bytes = 0

    def abandon(self) -> None:
        """Makes the store usable after a pass that was aborted and whose tensors are gone."""
        torch.cuda.synchronize(self.device)
        self._pending.clear()
        self._pending_bytes = 0

    def reserve(self, num_bytes: int) -> bool:
        """Makes room for `num_bytes` more, for the next forward. Returns False if the system does not pin as much; the capacity
        is then what it has pinned."""
        assert num_bytes <= self.capacity, f"{num_bytes} bytes asked of a host store of {self.capacity}"
        if self.num_held == 0:
            self._used = 0
        while len(self._slabs) * _SLAB < min(self._used + num_bytes, self.capacity):
            try:
                self._slabs.append(torch.empty(_SLAB, dtype=torch.uint8, pin_memory=True))
            except RuntimeError:
                self.capacity = len(self._slabs) * _SLAB
                return False
        return True

    def _take(self, num_bytes: int) -> list[torch.Tensor] | None:
        """The next free bytes of the slabs, None if there are too few."""
        if self._used + num_bytes > len(self._slabs) * _SLAB:
            return None
        parts = []
        while num_bytes > 0:
            slab, first = divmod(self._used, _SLAB)
            parts.append(self._slabs[slab][first:first + num_bytes])
            num_bytes -= len(parts[-1])
            self._used += len(parts[-1])
        self._used = space_of(self._used)
        return parts

    def put(self, tensor: torch.Tensor, *, layer: int, max_pending_bytes: int) -> HostTensor | torch.Tensor:
        """Starts copying a layer's contiguous tensor out. Returns the tensor itself, which then stays on the GPU, if the store
        has no room because another batch's tensors are still in it."""
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
        self._pending.append((tensor, done, layer))
        self._pending_bytes += size
        while self._pending_bytes > max_pending_bytes:
            self._settle_oldest()
        return HostTensor(self, parts, tensor.shape, tensor.dtype)

    def settle(self, before: float = math.inf) -> None:
        """Makes the computation wait for every copy out so far of the layers before that one, and drops the tensors that were
        copied."""
        while self._pending and self._pending[0][-1] < before:
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        tensor, done, _ = self._pending.popleft()
        torch.cuda.current_stream(self.device).wait_event(done)
        self._pending_bytes -= tensor.numel() * tensor.element_size()
