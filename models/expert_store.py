"""Experts of some layers lie in pinned host memory and are copied to the GPU when their layer runs.

A layer that streams has its weights, in the layout that the kernels take, at home in host memory. A pass visits the layers in
order, in the backward from the last to the first. Two slots on the GPU take turns: while one streamed layer computes from its
slot, the next one is copied into the other. Copies run on a stream of their own; the computation waits for them by events, and
the host waits for nothing. So CUDA graphs can capture a forward: it begins with copies of its own, and waits for all that it has
started. The kernels read the same bytes at another address, so no bit of a result changes.

A pass of few rows copies, by a kernel in the computation's own stream, only the experts that have some, unless these are nearly
all: a decode step of 8 rows of gpt-oss-120b touches about 29 of 128.

There are two phases. While sampling, the layers that stream in the update only lie on the GPU, at the same addresses each time,
since graphs hold them (models/arena.py); the update has that memory.

On the CPU the same copies run without streams, for tests.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.experts.fetch import fetch_routed
from kernels.packed.weights import ExpertWeights
from models.arena import Arena, has_arenas, space_of
from models.config import GptOssConfig
from models.host_store import pinned_bytes

NUM_SLOTS = 2
_MOST_SLAB = 1 << 33  # bytes of one allocation of host memory, unless a layer is larger


@dataclass
class Placement:
    """The number of layers whose experts stream from host memory in each phase. Those that stream while sampling stream in the
    update too. They are spread evenly over the depth, so that copies overlap with other layers' computation."""

    num_streamed_sampling: int = 0
    num_streamed_update: int = 0

    def layers(self, num_layers: int, *, is_sampling: bool) -> list[int]:
        """The layers that stream. Raises ValueError for numbers that do not fit."""
        sampling, update = self.num_streamed_sampling, self.num_streamed_update
        if not 0 <= sampling <= update <= num_layers:
            raise ValueError(f"num_streamed_sampling={sampling}, num_streamed_update={update}: of {num_layers} layers, 0 to "
                             f"{num_layers} can stream in the update, and no more than those while sampling")
        layers = _spread(update, num_layers)
        return [layers[i] for i in _spread(sampling, update)] if is_sampling else layers

    def host_bytes(self, layer_bytes: int) -> int:
        """Bytes of pinned host memory."""
        return sum(pinned_bytes(count * layer_bytes) for count in slabs(self.num_streamed_update, layer_bytes))


def layer_bytes(config: GptOssConfig, weight_format: type[ExpertWeights], dtype: torch.dtype) -> int:
    """Bytes of the weights of one layer's experts, without biases and adapters."""
    width, inner = config.hidden_size, config.intermediate_size
    return sum(space_of(torch.Size(shape).numel() * (own or dtype).itemsize) for sizes in ((width, 2 * inner), (inner, width))
               for shape, own in weight_format.stored(config.num_local_experts, *sizes))


def slabs(num_layers: int, layer_bytes: int) -> list[int]:
    """How many layers each allocation of host memory holds. Pinned allocations are rounded up to a power of two, so those numbers
    are chosen that fill one best."""
    counts = []
    while num_layers:
        fits = [count for count in range(1, num_layers + 1) if count == 1 or count * layer_bytes <= _MOST_SLAB]
        counts.append(max(fits, key=lambda count: (count * layer_bytes / pinned_bytes(count * layer_bytes), count)))
        num_layers -= counts[-1]
    return counts


def _spread(count: int, total: int) -> list[int]:
    """`count` of the numbers 0 .. total - 1, evenly spaced."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


class ExpertStore:
    """The weights of the experts that stream, each layer's as one tensor of bytes. It starts in the phase of the update."""

    def __init__(self, placement: Placement, num_layers: int, layer_bytes: int, device: torch.device) -> None:
        """Raises ValueError for numbers that do not fit, and if the system does not pin that much memory."""
        self.placement, self.device, self.layer_bytes, self.is_sampling = placement, device, layer_bytes, False
        has_gpu, can_return = device.type == "cuda", device.type == "cpu" or has_arenas(device)
        self._streamed_update = placement.layers(num_layers, is_sampling=False)
        # without arenas, what leaves the GPU cannot come back to its address: then the same layers stream in both phases
        self._streamed_sampling = placement.layers(num_layers, is_sampling=can_return)
        self._homes: dict[int, torch.Tensor] = {}  # by layer, in host memory
        remaining = iter(self._streamed_update)
        for count in slabs(len(self._streamed_update), layer_bytes):
            slab = _host_memory(count * layer_bytes, is_pinned=has_gpu)
            self._homes |= zip([next(remaining) for _ in range(count)], slab.split(layer_bytes))
        self._returning = [layer for layer in self._streamed_update if layer not in self._streamed_sampling]
        self._arena: Arena | None = None
        self._returned: dict[int, torch.Tensor] = {}  # by layer: where they lie on the GPU while sampling
        self._slots: list[torch.Tensor] = []  # allocated when first needed
        self._contents: list[int | None] = [None] * NUM_SLOTS  # the layer that each slot holds, or that is being copied there
        self._arrivals: list[torch.cuda.Event | None] = [None] * NUM_SLOTS
        if has_gpu and self._homes:
            self._copies = torch.cuda.Stream(device)
            self._launch = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def _streamed(self) -> list[int]:
        """The layers that stream in this phase."""
        return self._streamed_sampling if self.is_sampling else self._streamed_update

    def home(self, layer: int) -> torch.Tensor | None:
        """The host memory of a layer that streams in some phase, None for others."""
        return self._homes.get(layer)

    # ---- phases

    def for_sampling(self) -> None:
        """Brings those layers back to the GPU that stream in the update only; does nothing while sampling. Raises
        torch.OutOfMemoryError, and leaves everything as for the update, if there is not enough memory."""
        if self.is_sampling or not self._homes:
            return
        self.settle()
        self._contents = [None] * NUM_SLOTS
        if not self._streamed_sampling:
            self._slots.clear()
        if self._returning:
            self._take_back()
        self.is_sampling = True

    def for_update(self) -> None:
        """Frees the GPU memory of the layers that stream in the update only; does nothing in the update. Graphs must not be
        replayed until for_sampling()."""
        if not self.is_sampling:
            return
        self.settle()
        self._contents = [None] * NUM_SLOTS
        self.is_sampling = False
        if self._arena is not None:
            self._arena.give_back()
        else:
            self._returned.clear()

    def _take_back(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # arenas take the driver's memory: what the update used must not count twice
            if self._arena is None:
                self._arena = Arena(len(self._returning) * self.layer_bytes, self.device, advice="set a smaller model.memory_gb",
                                    content=f"the experts of {len(self._returning)} layers for sampling")
            self._arena.take()
        for layer in self._returning:
            if layer not in self._returned:
                self._returned[layer] = (torch.empty(self.layer_bytes, dtype=torch.uint8) if self._arena is None else
                                         self._arena.tensor((self.layer_bytes,), torch.uint8))
            self._returned[layer].copy_(self._homes[layer], non_blocking=True)

    def settle(self) -> None:
        """Lets the computation wait for copies that a pass which failed has left on their way. Call it before a graph is
        replayed: the graph's own copies do not wait for those. Does nothing in a capture."""
        if self.device.type == "cuda" and self._homes and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.device).wait_stream(self._copies)

    # ---- passes

    def begin(self, *, copies_routed: bool) -> None:
        """Starts a forward: the first streamed layers are copied to the slots, unless they are still there. copies_routed: its
        layers will ask for arrive_routed()."""
        if not self._streamed:
            return
        if self.is_sampling or copies_routed:  # graphs replayed meanwhile have changed the slots
            self._contents = [None] * NUM_SLOTS
        if copies_routed:
            self.settle()
            return
        for layer in self._streamed[:NUM_SLOTS]:
            self._fetch(layer)

    def arrive(self, layer: int, step: int) -> torch.Tensor:
        """The weights of a layer that has a home, on the GPU. They stay until the pass's next streamed layer arrives, which is
        copied meanwhile: the next in the order of layers (step 1), the one before (-1), or none (0)."""
        if self.is_sampling and layer in self._returned:
            return self._returned[layer]
        place = self._streamed.index(layer)
        self._fetch(layer)
        if step and 0 <= place + step < len(self._streamed):
            self._fetch(self._streamed[place + step])
        slot = place % NUM_SLOTS
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(self._arrivals[slot])
            # a kernel may start while the launch before it ends (kernels/device.py): let that be a launch that has waited
            self._launch.add_(1)
        return self._slots[slot]

    def arrive_routed(self, layer: int, offsets: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """As arrive(), but of the layer's `tensors` [E, ...] only experts that have rows, by offsets [E + 1]; others are
        undefined. The computation itself copies them: nothing goes on meanwhile."""
        if self.is_sampling and layer in self._returned:
            return self._returned[layer]
        self._make_slots()
        slot = self._streamed.index(layer) % NUM_SLOTS
        if self._contents[slot] == layer:  # it is there, or on its way
            return self.arrive(layer, 1)
        self._contents[slot] = None
        for source, target in zip(*(views(memory, tensors) for memory in (self._homes[layer], self._slots[slot]))):
            fetch_routed(source, target, offsets)
        if self.device.type == "cuda":
            self._launch.add_(1)  # as in arrive()
        return self._slots[slot]

    def write_back(self, layer: int) -> None:
        """Copies what arrive() returned, changed, to the layer's home. Waits for the copy."""
        self._homes[layer].copy_(self._slots[self._streamed.index(layer) % NUM_SLOTS])

    def _fetch(self, layer: int) -> None:
        """Starts copying a layer into its slot, unless it is there."""
        self._make_slots()
        slot = self._streamed.index(layer) % NUM_SLOTS
        if self._contents[slot] == layer:
            return
        self._contents[slot] = None
        if self.device.type == "cuda":
            self._copies.wait_stream(torch.cuda.current_stream(self.device))  # earlier work may still read the slot
            with torch.cuda.stream(self._copies):
                self._slots[slot].copy_(self._homes[layer], non_blocking=True)
                self._arrivals[slot] = self._copies.record_event()
        else:
            self._slots[slot].copy_(self._homes[layer])
        self._contents[slot] = layer

    def _make_slots(self) -> None:
        if not self._slots:
            self._slots = [torch.empty(self.layer_bytes, dtype=torch.uint8, device=self.device)
                           for _ in self._streamed_update[:NUM_SLOTS]]


def views(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Parts of a layer's bytes, one after the other, with the shapes and dtypes of `tensors`."""
    parts, start = [], 0
    for tensor in tensors:
        parts.append(buffer[start:start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += space_of(tensor.nbytes)
    return parts


def _host_memory(num_bytes: int, *, is_pinned: bool) -> torch.Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
    except RuntimeError as error:
        raise ValueError(f"model.host_gb: the system refuses to pin {num_bytes / 1e9:.1f} GB of host memory for experts "
                         f"({str(error).splitlines()[0]}); free some, or set a smaller model.host_gb, so that fewer layers stream"
                         ) from error
