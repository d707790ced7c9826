"""What a layer's forward keeps for its backward on a GPU, and where: on the GPU or in host memory; the rest is computed again.

The backward needs the layer's input x, the rotated queries, keys and values (qkv), the attention's output (attended), the
residual stream between attention and experts (middle) and the experts' pre-activations (h). Only x cannot be computed again.
The memory budget goes to the tensors that save most time per byte; those that do not fit go to host memory, if there is some
and copies keep up with the computation. The choice changes no bit of the result: the same kernels compute a tensor again.

Sizes in bytes, times in seconds. Shapes: T tokens, D model width.
"""
from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from typing import NamedTuple

import torch

from kernels.attention.plan import AttentionPlan
from kernels.experts.sorting import Routing
from models.config import GptOssConfig
from models.host_store import HostStore, HostTensor
from models.rates import copy_rate, product_rate

NAMES = ("qkv", "attended", "middle", "h")
# shares of the GPU's peak that matrix products, and attention, reach
_PRODUCT_RATE, _ATTENTION_RATE = 0.75, 0.5
_FLOP_PER_BYTE = 200  # the GPU's memory moves a byte in about the time of this many operations at its peak
_LIBRARY_BYTES = 100_000_000  # workspaces of the vendor's library
# copies to the host during a forward reach this share of their speed alone (38 of 55 GB/s on an H200)
_COPY_SHARE = 0.69
# the estimated time of a forward leaves out norms and routing: the real one is this many times as long
_FORWARD_SHARE = 1.15
# memory reserved but not allocated: as a share of the budget, a first guess that learn() corrects (measured: 0.2 to 0.9 of 18 to
# 24 GB); and as a share of the largest tensor, which fits into no hole (measured: 0.6 to 0.8 from 16,384 tokens on)
_MARGIN, _HOLES = 0.04, 0.6
# learn() aims at this share of the budget reserved, with the margin between these two
_FULL, _LEAST_MARGIN, _MOST_MARGIN = 0.99, 0.01, 0.15
# share of the budget: larger tensors leave holes that a backward's tensors do not fit into and that exceed the margin
_LARGE = 0.05
_RETREAT = 0.7  # after a plan that did not fit, plans take this share of its bytes
# most tokens that go through the experts at once; the rest of a layer takes all tokens at once. At least as many as micro-batches
# commonly have: the bits of gradients depend on it, and so it does not follow the memory
CHUNK_TOKENS = 16_384
LOOKAHEAD = 2  # layers whose activations are copied back while one runs backwards
_COPYING = 3  # layers whose activations may still be copied out in the forward
# layers whose weights are there at once where processes divide the model: one runs, and the next one is gathered into a buffer
# that it is copied out of
GATHERED_LAYERS = 3
SCRATCH_BYTES = 1_100_000_000  # most bytes of dequantised weights at once on a GPU: holds one projection of gpt-oss-20b


class Place(Enum):
    gpu = "gpu"
    host = "host"
    recompute = "recompute"  # nowhere: the backward computes it again


LayerPlan = dict[str, Place]  # of "x" and NAMES


@dataclass
class Workload:
    """The batch and model that a plan is for."""

    num_tokens: int
    full_pairs: int  # pairs of query and visible key, in a layer without a window
    windowed_pairs: int  # in a layer with one
    element_size: int  # bytes
    stream_size: int  # bytes of an element of the residual stream: x and middle
    is_packed: bool  # experts are dequantised for each use
    keeps_h: bool  # all layers keep their h
    scratch_bytes: int  # most bytes of dequantised weights at once


def chunks_of(num_tokens: int) -> list[slice]:
    """The chunks of tokens that go through the experts together; one, if there are no tokens."""
    return [slice(first, min(first + CHUNK_TOKENS, num_tokens)) for first in range(0, max(num_tokens, 1), CHUNK_TOKENS)]


def everything(place: Place) -> LayerPlan:
    """x on the GPU, all else in one place."""
    return {"x": Place.gpu} | {name: place for name in NAMES}


def bytes_of(config: GptOssConfig, workload: Workload) -> dict[str, int]:
    """Size of each activation of a layer."""
    stream = workload.stream_size * config.hidden_size
    per_token = {"x": stream, "qkv": workload.element_size * (config.q_width + 2 * config.kv_width), "middle": stream,
                 "attended": workload.element_size * config.q_width + 4 * config.num_attention_heads,  # with lse
                 "h": workload.element_size * 2 * config.intermediate_size * config.num_experts_per_tok}
    return {name: workload.num_tokens * size for name, size in per_token.items()}


def always_kept(config: GptOssConfig, *, num_tokens: int, rank: int, element_size: int) -> int:
    """What every layer keeps on the GPU whatever its plan: the choice of experts, gate weights, and the low-rank rows of an
    adapter of this rank (0: none) on attention. h brings further low-rank rows, which are small beside it."""
    return num_tokens * (24 * config.num_experts_per_tok + 4 * rank * element_size)


def largest_tensor(config: GptOssConfig, workload: Workload) -> int:
    """Bytes of the largest tensor of a layer: of h a chunk has one."""
    of_a_chunk = bytes_of(config, replace(workload, num_tokens=min(workload.num_tokens, CHUNK_TOKENS)))
    return max((bytes_of(config, workload) | {"h": of_a_chunk["h"]}).values())


def seconds_of(config: GptOssConfig, workload: Workload, peak_flops: float, *, windowed: bool) -> dict[str, float]:
    """Time to compute each activation again."""
    pairs = workload.windowed_pairs if windowed else workload.full_pairs
    product, attention = _PRODUCT_RATE * peak_flops, _ATTENTION_RATE * peak_flops
    rows, width, inner = workload.num_tokens, config.hidden_size, config.intermediate_size
    dequantized = config.num_local_experts * 2 * inner * width * workload.element_size * workload.is_packed
    return {"qkv": 2 * rows * width * (config.q_width + 2 * config.kv_width) / product,
            "attended": 4 * config.q_width * pairs / attention,
            "middle": 2 * rows * width * config.q_width / product,
            "h": 4 * rows * config.num_experts_per_tok * width * inner / product + dequantized / (peak_flops / _FLOP_PER_BYTE)}


def scratch(config: GptOssConfig, workload: Workload) -> int:
    """Most bytes of dequantised weights at once: if h is computed again and the scratch can hold gate_up, all of gate_up and a
    part of down; else a part of one of them."""
    if not workload.is_packed:
        return 0
    down = config.num_local_experts * config.intermediate_size * config.hidden_size * workload.element_size
    down_part, gate_up = min(down, workload.scratch_bytes), 2 * down
    fits = gate_up <= workload.scratch_bytes
    return gate_up + down_part if fits and not workload.keeps_h else min(gate_up, workload.scratch_bytes)


def workspaces(config: GptOssConfig, workload: Workload) -> tuple[int, int]:
    """Memory that the forward and the backward of one layer need in addition to what other layers keep: of a layer that keeps
    everything or, if not all layers keep their h, nothing but x."""
    return layer_memory(config, workload, everything(Place.gpu if workload.keeps_h else Place.recompute))


def layer_memory(config: GptOssConfig, workload: Workload, plan: LayerPlan) -> tuple[int, int]:
    """Most memory that the forward and the backward of one layer need, with its input and all that it keeps
    (scripts/EXPERIMENTS.md: "What a layer holds" has the tensors in a table, in bytes per token)."""
    sizes, width, inner = bytes_of(config, workload), config.hidden_size, config.intermediate_size
    kept = {name: size * (plan[name] != Place.recompute) for name, size in sizes.items()}
    stream, attention = sizes["x"], sizes["qkv"] + sizes["attended"]
    narrow = workload.num_tokens * width * workload.element_size  # a norm's output or its gradient
    # of the experts, for one chunk of tokens
    chunk = replace(workload, num_tokens=min(workload.num_tokens, CHUNK_TOKENS))
    rows = chunk.num_tokens * config.num_experts_per_tok  # routed
    activation, chunk_narrow = rows * inner * workload.element_size, chunk.num_tokens * width * workload.element_size
    # forward: x, middle, the sum and the experts' input, their activation and their outputs in the stream's dtype. It computes
    # nothing again, so it never needs two projections' weights at once
    experts = (3 * stream + narrow + sum(kept[name] for name in ("qkv", "attended", "h")) + activation
               + rows * width * workload.stream_size + scratch(config, replace(workload, keeps_h=True)))
    forward = max(experts, stream + attention)
    # backward through the experts: x, grad, what attention's backward will need; of a chunk the norm's output and its gradient,
    # the activation, and the rows of the input's gradient, which take the activation's memory if they have its size
    chunk_sizes = bytes_of(config, chunk)
    experts = (2 * stream + attention + kept["middle"] + kept["h"] + 2 * chunk_narrow + activation
               + (rows * width * workload.element_size if inner != width else 0) + scratch(config, workload))
    experts += sum(chunk_sizes[name] for name in ("middle", "h") if not kept[name])
    # through attention: x, grad, its inputs, its output and that one's gradient, two more numbers for each head; then through the
    # norm before it
    through_attention = 2 * stream + attention + sizes["attended"] + 4 * config.num_attention_heads * workload.num_tokens
    through_norm = 3 * stream + 2 * narrow + sizes["qkv"]
    return forward + _LIBRARY_BYTES, max(experts, through_attention, through_norm) + _LIBRARY_BYTES


def most_held(plans: list[LayerPlan], sizes: dict[str, int], *, gradients: int, pending: int) -> tuple[int, int]:
    """Peak memory of the forward and of the backward, without the running layer's workspace: kept activations of earlier layers,
    copies in flight (at most `pending`, or one layer's) and gradients of finished layers."""
    num_layers = len(plans)
    gpu, host = ([sum(sizes[name] for name, where in plan.items() if where == place) for plan in plans]
                 for place in (Place.gpu, Place.host))
    forward = backward = 0
    for layer in range(num_layers):
        kept = sum(gpu[:layer])
        forward = max(forward, kept + min(pending, sum(host[max(0, layer - _COPYING):layer])))
        back = host[max(0, layer - LOOKAHEAD):layer]
        done = gradients * (num_layers - layer) // num_layers
        backward = max(backward, kept + min(sum(back), max(pending, *back[-1:], 0)) + done)
    return forward, backward


def plan_layers(config: GptOssConfig, workload: Workload, *, gpu_bytes: int, host_bytes: int, host_rate: float, pending: float,
                peak_flops: float) -> list[LayerPlan]:
    """A plan for each layer. All layers together, their inputs included, keep at most gpu_bytes on the GPU and host_bytes in host
    memory. Copies to the host run at host_rate, and at most `pending` bytes may queue for them. Inputs are always kept: on the
    GPU if the host has no room for them."""
    sizes = bytes_of(config, workload)
    layers = range(config.num_hidden_layers)
    of_kinds = [seconds_of(config, workload, peak_flops, windowed=windowed) for windowed in (False, True)]
    times = [of_kinds[config.is_windowed(layer)] for layer in layers]
    forward = sum(sum(time.values()) + time["h"] / 2 for time in times)  # with the down projection
    host_bytes = min(host_bytes, int(_COPY_SHARE * host_rate * _FORWARD_SHARE * forward))
    room = gpu_bytes + host_bytes - len(layers) * sizes["x"]
    chosen = {(layer, "x") for layer in layers}
    ranked = sorted(((times[layer][name] / sizes[name], name, layer) for layer in layers for name in NAMES),
                    key=lambda item: (-item[0], item[1], _spread(item[2], len(layers))))
    for _, name, layer in ranked:
        if sizes[name] <= room:
            chosen.add((layer, name))
            room -= sizes[name]
    # the backward needs the last layers first, so tensors of the first layers go to the host, as many as do not fit on the GPU.
    # First pass: only copies that do not queue beyond `pending`; second pass: the rest, even if the forward must wait
    excess = sum(sizes[name] for _, name in chosen) - gpu_bytes
    plans = [everything(Place.recompute) for _ in layers]
    for layer, name in chosen:
        plans[layer][name] = Place.gpu
    for limit in (pending, math.inf):
        waiting = 0.0
        for layer in layers[:-1]:
            for name in ("x", *NAMES):
                fits = excess > 0 and sizes[name] <= host_bytes and waiting + sizes[name] <= limit
                if fits and plans[layer][name] == Place.gpu:
                    plans[layer][name] = Place.host
                    excess, host_bytes, waiting = excess - sizes[name], host_bytes - sizes[name], waiting + sizes[name]
            time = sum(times[layer].values()) + times[layer]["h"] / 2
            waiting = max(0.0, waiting - _COPY_SHARE * _FORWARD_SHARE * host_rate * time)
    return plans


@cache
def _spread(layer: int, num_layers: int) -> int:
    """The layer's number with its bits reversed. Layers of the lowest ranks are far apart, so large copies do not queue up."""
    bits = max(1, (num_layers - 1).bit_length())
    return int(f"{layer:0{bits}b}"[::-1], 2)


class Kept:
    """Tensors of one layer by name, and for each chunk of its tokens those of the experts and the choice of them."""

    def __init__(self, plan: LayerPlan, scratch_bytes: int) -> None:
        self.plan, self.scratch_bytes = plan, scratch_bytes  # most bytes of dequantised weights at once
        self.tensors: dict[str, torch.Tensor | HostTensor] = {}
        self.chunks: list[Kept] = []
        self.routing: Routing | None = None  # of a chunk

    def new_chunk(self) -> Kept:
        """For the forward of the next chunk."""
        self.chunks.append(Kept(self.plan, self.scratch_bytes))
        return self.chunks[-1]

    def recomputes(self, name: str) -> bool:
        return self.plan.get("attended" if name == "lse" else name) == Place.recompute

    def keep(self, tensors: dict[str, torch.Tensor | None]) -> None:
        """Keeps the tensors that are not to be computed again."""
        self.tensors |= {name: tensor for name, tensor in tensors.items() if tensor is not None and not self.recomputes(name)}

    def take(self, name: str) -> torch.Tensor | None:
        """Removes and returns the tensor of that name; None if it was not kept."""
        tensor = self.tensors.pop(name, None)
        return tensor.get() if isinstance(tensor, HostTensor) else tensor

    def put(self, store: HostStore, layer: int, *, max_pending_bytes: int) -> None:
        """Starts copying the tensors that go to host memory."""
        for part in (self, *self.chunks):
            for name, tensor in part.tensors.items():
                if self.plan.get(name) == Place.host:
                    part.tensors[name] = store.put(tensor, layer=layer, max_pending_bytes=max_pending_bytes)

    def _on_host(self) -> list[HostTensor]:
        return [tensor for part in (self, *self.chunks) for tensor in part.tensors.values() if isinstance(tensor, HostTensor)]

    def host_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self._on_host())

    def fetch(self) -> None:
        """Starts the copies back of the tensors in host memory."""
        for tensor in self._on_host():
            tensor.fetch()


@dataclass
class TrainingPass:
    """What all layers of one forward and backward share."""

    layers: list[LayerPlan]
    scratch_bytes: int  # most bytes of dequantised weights at once
    max_pending_bytes: int  # most bytes that are being copied to the host, or back, at once
    store: HostStore | None
    at_end: Callable[[torch.device], None]  # called when the backward has run
    kept: dict[int, Kept] = field(default_factory=dict)  # by layer, until its backward has run

    def new(self, layer: int) -> Kept:
        """For a layer's forward."""
        return Kept(self.layers[layer], self.scratch_bytes)

    def put(self, layer: int, kept: Kept) -> None:
        """Ends a layer's forward: starts copying the tensors that go to host memory. While the next layer runs, the copies of at
        most _COPYING layers are in flight, as the plan counts them."""
        if self.store is not None:
            kept.put(self.store, layer, max_pending_bytes=self.max_pending_bytes)
            self.store.settle(before=layer + 1 - _COPYING)
        self.kept[layer] = kept

    def take(self, layer: int) -> Kept:
        """Returns what a layer's forward has kept. Starts the copies back for the next LOOKAHEAD layers of the backward: for as
        many as max_pending_bytes allows, and at least one."""
        kept = self.kept.pop(layer)
        if self.store is None:
            return kept
        self.store.settle()  # the first time some tensors are still being copied out, since the forward did not wait
        num_bytes = 0
        for before in range(layer - 1, max(layer - LOOKAHEAD, 0) - 1, -1):
            num_bytes += self.kept[before].host_bytes()
            if num_bytes > self.max_pending_bytes and num_bytes > self.kept[before].host_bytes():
                break
            self.kept[before].fetch()
        return kept


class NewestPlan(NamedTuple):
    layers: list[LayerPlan]
    workload: Workload
    gradients: int  # bytes
    pending: int  # bytes


class MemoryBudget:
    """How much GPU and host memory (1e9 bytes) a model may use, and the plans that follow from it.

    recomputes: whether layers may compute activations again; otherwise all activations stay on the GPU. memory_gb: GPU memory
    that the process may use; None: 85 % of the GPU. host_gb: pinned host memory."""

    def __init__(self, config: GptOssConfig, *, recomputes: bool, memory_gb: float | None, host_gb: float) -> None:
        self.config, self.recomputes, self.memory_gb = config, recomputes, memory_gb
        self.host_bytes = int(host_gb * 1e9)
        self.store: HostStore | None = None
        self._host_rate = 0.0  # to the host, bytes per second
        self._product_rate: float | None = None  # of products, FLOP per second
        self._largest_bytes = 0  # of the newest plan's activations
        self._margin, self._least_margin = _MARGIN, _LEAST_MARGIN  # shares of the budget
        self._is_tight = False  # whether the newest plan keeps less than everything on the GPU
        self._newest: NewestPlan | None = None
        self._most_bytes = sys.maxsize  # of a plan's activations and workspaces: less than what did not fit
        self.notes: list[str] = []
        self.gathered_bytes = 0  # of weights that a pass gathers, and of their gradients (grpo/distributed/shards.py)
        self.keeps_gradients = True  # false: the backward drops a parameter's gradient as soon as it is there

    def claim_host(self, num_bytes: int) -> bool:
        """Takes host memory for something else than activations; returns False if there is not enough."""
        if num_bytes > self.host_bytes:
            return False
        self.host_bytes -= num_bytes
        return True

    def plan(self, x: torch.Tensor, attention: AttentionPlan, trainable: Iterable[torch.nn.Parameter], *,
             dtype: torch.dtype, is_packed: bool, rank: int) -> TrainingPass:
        """The plan for a forward and backward of embedded tokens x [T, D], by a model of `dtype` with an adapter of this rank (0:
        none)."""
        layers = self.config.num_hidden_layers
        workload = Workload(len(x), *visible_pairs(attention, self.config.sliding_window), dtype.itemsize, x.element_size(),
                            is_packed, True, SCRATCH_BYTES)
        if x.is_cuda and self._product_rate is None:
            # cuBLAS allocates a permanent workspace at its first product in each thread. Do it now, before activations: among
            # them it would split the free memory of later ones
            self._product_rate = product_rate(x.device, dtype)
            _backward_once(x.device, dtype)
        if not self.recomputes:
            return self._pass([everything(Place.gpu)] * layers, SCRATCH_BYTES, 0)
        if not x.is_cuda:
            return self._pass([everything(Place.recompute)] * layers, SCRATCH_BYTES, 0)
        if self.host_bytes > 0 and self.store is None:
            self.store, self._host_rate = HostStore(self.host_bytes, x.device), copy_rate(x.device, 1 << 26, to_host=True)
        budget = self._budget(x.device)
        if torch.cuda.memory_reserved(x.device) > budget:  # only what is allocated is needed
            torch.cuda.empty_cache()
        sizes = bytes_of(self.config, workload)
        self._largest_bytes = largest_tensor(self.config, workload)
        # being copied: to the host in the forward, or back ahead of the backward
        pending = sum(sizes.values()) - sizes["qkv"] if self.store is not None else 0
        gradients = self.keeps_gradients * sum(
            parameter.numel() * parameter.element_size() for parameter in trainable if parameter.grad is None)
        free = int(budget - max(self._margin * budget, _HOLES * self._largest_bytes)) - torch.cuda.memory_allocated(x.device)
        # those of one layer at a time exist beside the buffer that they are added to; of several chunks their fp32 sums, too
        has_sums = len(x) > CHUNK_TOKENS
        free -= sum(parameter.numel() * (parameter.element_size() + 4 * has_sums) for parameter in trainable) // layers
        free -= layers * always_kept(self.config, num_tokens=len(x), rank=rank, element_size=dtype.itemsize)
        free = min(free - self.gathered_bytes, self._most_bytes)
        while True:
            plans, chosen = self._choose(workload, free, gradients=gradients, pending=pending)
            on_host = sum(sizes[name] for plan in plans for name, place in plan.items() if place == Place.host)
            if self.store is None or self.store.reserve(on_host):
                break
            self.host_bytes = self.store.capacity
            self.notes.append(f"model.host_gb: the system pins only {self.host_bytes / 1e9:.1f} GB of host memory for "
                              "activations; others are computed again")
        pending = self._allowed_pending(plans, chosen, free, gradients=gradients)
        self._is_tight = any(place != Place.gpu for plan in plans for place in plan.values())
        self._newest = NewestPlan(plans, chosen, gradients, pending)
        return self._pass(plans, chosen.scratch_bytes, pending)

    def _choose(self, workload: Workload, free: int, *, gradients: int, pending: int) -> tuple[list[LayerPlan], Workload]:
        """The plans for `free` bytes, and the workload with the scratch that goes with them."""
        sizes, layers = bytes_of(self.config, workload), self.config.num_hidden_layers
        if free - max(workspaces(self.config, workload)) - gradients < layers * sum(sizes.values()):
            workload = replace(workload, keeps_h=False)
        # kept activations are freed as gradients appear, so only the excess of gradients counts
        wanted = gradients if layers * sizes["x"] <= self.host_bytes else max(gradients, layers * sizes["x"])
        while free - max(workspaces(self.config, workload)) < wanted and workload.scratch_bytes > 1 << 26:
            workload = replace(workload, scratch_bytes=workload.scratch_bytes // 2)
        return self._fit(workload, free, gradients=gradients, pending=pending), workload

    def retreat(self) -> str | None:
        """The newest plan did not fit: later ones take fewer bytes. Returns what changes; None if there is no smaller plan for
        that batch."""
        if self.store is not None:
            self.store.abandon()
        if not self.recomputes:
            self.recomputes = True
            return "the backward computes again what does not fit"
        if self._newest is None:
            return None
        newest = self._newest
        self._most_bytes = int(_RETREAT * self._needed(newest.layers, newest.workload, newest.gradients, newest.pending))
        least, workload = self._choose(newest.workload, 0, gradients=newest.gradients, pending=newest.pending)
        if (least, workload.scratch_bytes) == (newest.layers, newest.workload.scratch_bytes):
            return None
        return f"a micro-batch's activations and workspaces take at most {self._most_bytes / 1e9:.2f} GB of the GPU"

    def take_notes(self) -> list[str]:
        """What the run should be told, once."""
        notes, self.notes = self.notes, []
        return notes

    def _pass(self, layers: list[LayerPlan], scratch_bytes: int, max_pending_bytes: int) -> TrainingPass:
        return TrainingPass(layers, scratch_bytes, max_pending_bytes, self.store, self.after_backward)

    def _budget(self, device: torch.device) -> float:
        return self.memory_gb * 1e9 if self.memory_gb else 0.85 * torch.cuda.get_device_properties(device).total_memory

    def before_backward(self, grad: torch.Tensor) -> None:
        """A hook for the gradient that a backward begins with. The backward's tensors have other sizes than the forward's, so the
        allocator would reserve new memory and keep the holes that the forward left: 7 of 60 GB for a sequence of 131,072 tokens.
        Giving them back takes about 20 ms, so it is done only if tensors are large."""
        if not (grad.is_cuda and self.recomputes):
            return
        reserved, budget = torch.cuda.memory_reserved(grad.device), self._budget(grad.device)
        if reserved > budget:
            self.learn(reserved, budget)  # the forward's peak, which cannot be seen after the backward
        if reserved > budget or self._largest_bytes > _LARGE * budget:
            torch.cuda.empty_cache()

    def after_backward(self, device: torch.device) -> None:
        """Called when all layers have run backwards."""
        if device.type == "cuda" and self.recomputes:
            self.learn(torch.cuda.memory_reserved(device), self._budget(device))

    def learn(self, reserved: int, budget: float) -> None:
        """Adapts the margin to the bytes that PyTorch reserved in a step of the newest plan. How much is reserved beyond what is
        allocated depends on the shapes and on what the process did before. A step above the budget is slower, since each then
        empties the cache. A margin that was too small is not tried again."""
        excess = reserved / budget - _FULL
        if reserved > budget:
            self._margin = self._least_margin = min(self._margin + excess, _MOST_MARGIN)
        elif self._is_tight:
            self._margin = max(self._margin + excess / 2, self._least_margin)

    def _fit(self, workload: Workload, free: int, *, gradients: int, pending: int) -> list[LayerPlan]:
        """The plan that keeps most on the GPU such that neither forward nor backward takes more than `free` bytes."""
        sizes, room = bytes_of(self.config, workload), max(0, free)
        while True:
            plans = plan_layers(self.config, workload, gpu_bytes=room, host_bytes=self.host_bytes, host_rate=self._host_rate,
                                pending=pending, peak_flops=self._product_rate)
            excess = self._needed(plans, workload, gradients, pending) - free
            if excess <= 0 or room == 0:
                return plans
            kept = sum(sizes[name] for plan in plans for name, place in plan.items() if place == Place.gpu)
            # less room changes nothing until it is below what is kept, by a tensor at least
            room = max(0, min(room, kept) - max(excess, min(sizes.values())))

    def _needed(self, plans: list[LayerPlan], workload: Workload, gradients: int, pending: int) -> int:
        """The most bytes that a forward and backward take."""
        held = most_held(plans, bytes_of(self.config, workload), gradients=gradients, pending=pending)
        different = {tuple(plan.values()): plan for plan in plans}.values()
        running = map(max, zip(*(layer_memory(self.config, workload, plan) for plan in different)))
        return max(map(sum, zip(held, running)))

    def _allowed_pending(self, plans: list[LayerPlan], workload: Workload, free: int, *, gradients: int) -> int:
        """Most bytes that are being copied at once: those of _COPYING layers, so that no tensor stays when its copy must be done;
        less, down to one layer's, if that does not fit into `free` bytes."""
        sizes = bytes_of(self.config, workload)
        host = [sum(sizes[name] for name, place in plan.items() if place == Place.host) for plan in plans]
        pending = max(sum(host[first:first + _COPYING]) for first in range(len(host)))
        while pending > max(host) and self._needed(plans, workload, gradients, pending) > free:
            pending = max(pending // 2, max(host))
        return pending


def visible_pairs(attention: AttentionPlan, window: int) -> tuple[int, int]:
    """Pairs of query and visible key in a batch, without and with a window."""
    full = windowed = 0
    for sequence, (start, end) in enumerate(attention.bounds):
        prefix = attention.prefixes[sequence] if attention.prefixes is not None else -1
        before = 0 if prefix == -1 else attention.bounds[prefix][1] - attention.bounds[prefix][0]
        length = end - start
        full += length * before + length * (length + 1) // 2
        short = min(length, max(0, window - before))  # queries that see everything before them
        windowed += short * before + short * (short + 1) // 2 + (length - short) * window
    return full, windowed


def _backward_once(device: torch.device, dtype: torch.dtype) -> None:
    """A product in autograd's thread for the device."""
    a = torch.ones(16, 16, device=device, dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        (a @ a).sum().backward()
