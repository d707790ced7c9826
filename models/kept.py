"""What a layer's forward leaves for its backward on a GPU: on the GPU, in host memory, or to be computed again, as the plan of
the layer says (models/memory_plan.py).

Shapes: T tokens.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

import torch

from kernels.experts.sorting import Routing
from models.host_store import HostStore, HostTensor
from models.memory_plan import LOOKAHEAD, LayerPlan, Place


class Kept:
    """Tensors of one layer by name, and the choice of experts."""

    def __init__(self, plan: LayerPlan, scratch_bytes: int) -> None:
        self.plan, self.scratch_bytes = plan, scratch_bytes  # bytes: of dequantised experts held at once
        self.tensors: dict[str, torch.Tensor | HostTensor] = {}
        self.routing: Routing | None = None

    def recomputes(self, name: str) -> bool:
        return self.plan[name] == Place.again

    def keep(self, tensors: dict[str, torch.Tensor | None]) -> None:
        self.tensors |= {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def take(self, name: str) -> torch.Tensor | None:
        """The tensor of that name, for good; None where it was not kept."""
        tensor = self.tensors.pop(name, None)
        return tensor.get() if isinstance(tensor, HostTensor) else tensor

    def host_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values() if isinstance(tensor, HostTensor))

    def fetch(self) -> None:
        """Starts the way back of what is in host memory."""
        for tensor in self.tensors.values():
            if isinstance(tensor, HostTensor):
                tensor.fetch()


@dataclass
class TrainingPass:
    """What all layers of one forward and backward share."""

    plans: list[LayerPlan]
    parameters: list[list[torch.nn.Parameter]]  # what trains in each layer
    scratch_bytes: int
    store: HostStore | None
    max_pending_bytes: int  # on their way to the host, or back, at once
    at_end: Callable[[torch.device], None]  # called when the backward has run
    kept: dict[int, Kept] = field(default_factory=dict)  # by layer, until its backward has run

    def new(self, layer: int) -> Kept:
        """For a layer's forward."""
        return Kept(self.plans[layer], self.scratch_bytes)

    def put(self, layer: int, kept: Kept) -> None:
        """At the end of the forward of a layer: what its plan says goes, or goes to host memory."""
        if kept.recomputes("attended"):
            kept.tensors.pop("lse", None)
        for name, place in kept.plan.items():
            if place == Place.again:
                kept.tensors.pop(name, None)
            elif place == Place.host:
                kept.tensors[name] = self.store.put(kept.tensors[name], max_pending_bytes=self.max_pending_bytes)
        self.kept[layer] = kept

    def take(self, layer: int) -> Kept:
        """What a layer's forward has left, and starts the way back of what the next LOOKAHEAD layers of the backward want, as
        many of them as may be on their way at once and at least one."""
        kept = self.kept.pop(layer)
        if self.store is None:
            return kept
        self.store.settle()  # what is still on its way out: the first time, since the forward did not wait
        num_bytes = 0
        for before in range(layer - 1, max(layer - LOOKAHEAD, 0) - 1, -1):
            num_bytes += self.kept[before].host_bytes()
            if num_bytes > self.max_pending_bytes and num_bytes > self.kept[before].host_bytes():
                break
            self.kept[before].fetch()
        return kept
