"""Where each activation waits for the backward: on the GPU, in host memory, or nowhere, to be computed again.

A block's backward needs its input x, the rotated queries, keys and values (qkv), the attention's output (attended), the residual
stream between attention and experts (middle) and the experts' pre-activations (h). Only x is indispensable. A memory budget is
spent where a byte saves most time; what does not fit goes to host memory if there is some, as long as the copies keep up with
the computation. The choice changes no bit of the result: what is computed again comes from the same kernels.

Sizes in bytes, times in seconds.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Iterable

import torch

from kernels.attention.plan import AttentionPlan
from models.config import GptOssConfig
from models.host_store import HostStore, transfer_rate

NAMES = ("qkv", "attended", "middle", "h")
# products with experts' weights and dense ones run at about this share of the GPU's peak, attention at this one
_PRODUCT_RATE, _ATTENTION_RATE = 0.75, 0.5
# beside a forward that keeps the GPU's memory busy, copies to the host reach about this share of what they do alone (38 of 55
# GB/s on an H200); and of the time that a forward takes here, which is without norms and routing, they may use so much
_COPY_SHARE, _FORWARD_SHARE = 0.69, 1.15
# what the allocator reserves beyond what is allocated: of the budget, until steps have shown it (0.2 to 0.9 of 18 to 24 GB), and
# of the largest tensor, which does not fit into any hole (0.6 to 0.8 of it from 16,384 tokens on)
_MARGIN, _HOLES = 0.04, 0.6
# the share of the budget that steps should come to reserve, and how far the margin goes for it
_FULL, _LEAST_MARGIN, _MOST_MARGIN = 0.99, 0.01, 0.15
# of the budget: tensors from this size on leave holes, larger than the margin, that a backward's tensors do not fit into
_LARGE = 0.05
LOOKAHEAD = 2  # layers whose activations are on their way back while one runs backwards
SCRATCH_BYTES = 1_100_000_000  # of dequantised weights of a projection held at once on a GPU: all of one in gpt-oss-20b


class Place(Enum):
    gpu = "gpu"
    host = "host"
    again = "again"  # computed again


LayerPlan = dict[str, Place]  # of "x" and NAMES


@dataclass
class Pass:
    """What a plan depends on."""

    num_tokens: int
    full_pairs: int  # pairs of query and visible key, of a layer without a window
    windowed_pairs: int
    element_size: int
    stream_size: int  # of an element of the residual stream: x and middle
    is_packed: bool  # experts are dequantised for each use
    keeps_h: bool  # all layers keep their h
    scratch_bytes: int  # of a projection's experts, dequantised at once


@dataclass
class Plan:
    layers: list[LayerPlan]
    scratch_bytes: int
    max_pending_bytes: int  # on their way to the host at once


def everything(place: Place) -> LayerPlan:
    """x on the GPU, all else in one place."""
    return {"x": Place.gpu} | {name: place for name in NAMES}


def bytes_of(config: GptOssConfig, run: Pass) -> dict[str, int]:
    """Size of each activation of a layer."""
    q_width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    stream = run.stream_size * config.hidden_size
    per_token = {"x": stream, "qkv": run.element_size * (q_width + 2 * kv_width), "middle": stream,
                 "attended": run.element_size * q_width + 4 * config.num_attention_heads,  # with lse
                 "h": run.element_size * 2 * config.intermediate_size * config.num_experts_per_tok}
    return {name: run.num_tokens * size for name, size in per_token.items()}


def seconds_of(config: GptOssConfig, run: Pass, peak_flops: float, *, windowed: bool) -> dict[str, float]:
    """Time to compute each activation again."""
    q_width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    pairs = run.windowed_pairs if windowed else run.full_pairs
    product, attention = _PRODUCT_RATE * peak_flops, _ATTENTION_RATE * peak_flops
    rows, width, inner = run.num_tokens, config.hidden_size, config.intermediate_size
    dequantized = config.num_local_experts * 2 * inner * width * run.element_size * run.is_packed
    return {"qkv": 2 * rows * width * (q_width + 2 * kv_width) / product,
            "attended": 4 * q_width * pairs / attention,
            "middle": 2 * rows * width * q_width / product,
            "h": 4 * rows * config.num_experts_per_tok * width * inner / product + dequantized / (peak_flops / 200)}


def scratch(config: GptOssConfig, run: Pass) -> int:
    """Dequantised weights alive at once: all of gate_up, if the scratch holds them and h is computed again, beside a part of
    down; else a part of either."""
    if not run.is_packed:
        return 0
    down = config.num_local_experts * config.intermediate_size * config.hidden_size * run.element_size
    down_part, gate_up = min(down, run.scratch_bytes), 2 * down
    return gate_up + down_part if gate_up <= run.scratch_bytes and not run.keeps_h else min(gate_up, run.scratch_bytes)


def workspace(config: GptOssConfig, run: Pass) -> int:
    """Memory that the backward of one layer cannot do without, beside what layers keep."""
    sizes = bytes_of(config, run)
    rows = run.num_tokens * config.num_experts_per_tok * run.element_size
    width = config.intermediate_size  # the activation, and in its place the rows of the input's gradient
    if config.intermediate_size != config.hidden_size:
        width += config.hidden_size
    layer = sizes["qkv"] + sizes["attended"] + sizes["h"] + rows * width + 6 * sizes["x"] + scratch(config, run)
    return layer + 100_000_000  # workspaces of the library


def forward_workspace(config: GptOssConfig, run: Pass) -> int:
    """The same for the forward of one layer."""
    sizes = bytes_of(config, run)
    rows = run.num_tokens * config.num_experts_per_tok * run.element_size
    layer = sizes["qkv"] + sizes["attended"] + sizes["h"] + 4 * sizes["x"]
    layer += rows * (config.intermediate_size + config.hidden_size)
    # nothing is computed again: never two projections' weights at once
    return layer + scratch(config, replace(run, keeps_h=True)) + 100_000_000


def most_held(plans: list[LayerPlan], sizes: dict[str, int], *, gradients: int, pending: int) -> tuple[int, int]:
    """The most that stands beside the workspace of the layer that runs, in the forward and in the backward: what the layers
    before it keep, what is on its way (at most `pending`, or one layer's), and the gradients of the layers that are done."""
    num_layers = len(plans)
    gpu, host = ([sum(sizes[name] for name, where in plan.items() if where == place) for plan in plans]
                 for place in (Place.gpu, Place.host))
    forward = backward = 0
    for layer in range(num_layers):
        kept = sum(gpu[:layer])
        forward = max(forward, kept + min(pending, sum(host[max(0, layer - 3):layer])))
        back = host[max(0, layer - LOOKAHEAD):layer]
        done = gradients * (num_layers - layer) // num_layers
        backward = max(backward, kept + min(sum(back), max(pending, *back[-1:], 0)) + done)
    return forward, backward


def plan_layers(config: GptOssConfig, run: Pass, *, gpu_bytes: int, host_bytes: int, host_rate: float, pending: float,
                peak_flops: float) -> list[LayerPlan]:
    """A plan per layer. gpu_bytes: what all layers together may keep there, inputs included; host_bytes at host_rate likewise, of
    which `pending` may be on their way at once.

    Inputs are kept come what may, on the GPU if the host has no room for them."""
    sizes = bytes_of(config, run)
    layers = range(config.num_hidden_layers)
    of_kinds = [seconds_of(config, run, peak_flops, windowed=windowed) for windowed in (False, True)]
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
    # the last layers' come back first: the first layers' go to the host, as much as has no room on the GPU, and no faster than
    # copies are done (`pending` may wait for theirs); what then still has no room, whatever the wait
    excess = sum(sizes[name] for _, name in chosen) - gpu_bytes
    plans = [everything(Place.again) for _ in layers]
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
    """An order of the layers in which any first few are far apart, so that copies of large tensors do not queue up: by the
    bits of the layer's number, reversed."""
    bits = max(1, (num_layers - 1).bit_length())
    return int(f"{layer:0{bits}b}"[::-1], 2)


class MemoryBudget:
    """How much GPU and host memory (1e9 bytes) a model may use, and the plans that follow from it.

    recomputes: whether layers may compute activations again; without it all of them stay on the GPU. memory_gb: of the GPU, in
    all; None: 85 % of what it has. host_gb: of pinned host memory."""

    def __init__(self, config: GptOssConfig, *, recomputes: bool, memory_gb: float | None, host_gb: float) -> None:
        self.config, self.recomputes, self.memory_gb = config, recomputes, memory_gb
        self.host_bytes = int(host_gb * 1e9)
        self.store: HostStore | None = None
        self._host_rate = 0.0  # to the host, bytes per second
        self._product_rate: float | None = None  # of products, FLOP per second
        self._largest_bytes = 0  # of what the newest plan's layers make for their backward
        self._margin, self._least_margin = _MARGIN, _LEAST_MARGIN  # shares of the budget
        self._is_tight = False  # whether the newest plan keeps less than everything on the GPU

    def claim_host(self, num_bytes: int) -> bool:
        """Takes host memory for something else than activations; False where there is not enough."""
        if num_bytes > self.host_bytes:
            return False
        self.host_bytes -= num_bytes
        return True

    def plan(self, x: torch.Tensor, attention: AttentionPlan, trainable: Iterable[torch.nn.Parameter], *,
             dtype: torch.dtype, is_packed: bool) -> Plan:
        """For a forward and backward of the embedded tokens x [T, D], in the residual stream's dtype, by a model of `dtype`."""
        layers = self.config.num_hidden_layers
        run = Pass(len(x), *visible_pairs(attention, self.config.sliding_window), dtype.itemsize, x.element_size(), is_packed,
                   True, SCRATCH_BYTES)
        if x.is_cuda and self._product_rate is None:
            # whatever the plan: the library's first product takes a workspace for good, in each thread, which after a forward's
            # activations would lie between them, and divide the memory of later ones
            self._product_rate = product_rate(x.device, dtype)
            _backward_once(x.device, dtype)
        if not self.recomputes:
            return Plan([everything(Place.gpu)] * layers, SCRATCH_BYTES, 0)
        if not x.is_cuda:
            return Plan([everything(Place.again)] * layers, SCRATCH_BYTES, 0)
        if self.host_bytes > 0 and self.store is None:
            self.store, self._host_rate = HostStore(self.host_bytes, x.device), transfer_rate(x.device)
        budget = self._budget(x.device)
        if torch.cuda.memory_reserved(x.device) > budget:  # whoever took it: nothing of it is needed but what is allocated
            torch.cuda.empty_cache()
        sizes = bytes_of(self.config, run)
        self._largest_bytes = max(sizes.values())
        # on their way to the host in the forward, or back one layer ahead of the backward
        pending = sum(sizes.values()) - sizes["qkv"] if self.store is not None else 0
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trainable if parameter.grad is None)
        free = int(budget - max(self._margin * budget, _HOLES * self._largest_bytes)) - torch.cuda.memory_allocated(x.device)
        if free - workspace(self.config, run) - gradients < layers * sum(sizes.values()):
            run.keeps_h = False
        # gradients grow as what layers keep goes: only what they exceed it by is extra
        wanted = gradients if layers * sizes["x"] <= self.host_bytes else max(gradients, layers * sizes["x"])
        while free - workspace(self.config, run) < wanted and run.scratch_bytes > 1 << 26:
            run.scratch_bytes //= 2
        plans = self._fit(run, free, gradients=gradients, pending=pending)
        self._is_tight = any(place != Place.gpu for plan in plans for place in plan.values())
        if self.store is not None:
            self.store.reserve(sum(sizes[name] for plan in plans for name, place in plan.items() if place == Place.host))
        return Plan(plans, run.scratch_bytes, pending)

    def _budget(self, device: torch.device) -> float:
        return self.memory_gb * 1e9 if self.memory_gb else 0.85 * torch.cuda.get_device_properties(device).total_memory

    def before_backward(self, grad: torch.Tensor) -> None:
        """A hook for the gradient that a backward begins with. Its tensors have other sizes than the forward's: holes between
        those that stay would be held beside new memory, 7 of 60 GB for a sequence of 131,072 tokens. Giving them back
        costs some 20 ms: done only where tensors are large."""
        if not (grad.is_cuda and self.recomputes):
            return
        reserved, budget = torch.cuda.memory_reserved(grad.device), self._budget(grad.device)
        if reserved > budget:
            self.learn(reserved, budget)  # what the forward took: the end of the backward will not show it
        if reserved > budget or self._largest_bytes > _LARGE * budget:
            torch.cuda.empty_cache()

    def after_backward(self, device: torch.device) -> None:
        """To be called once all layers have run backwards."""
        if device.type == "cuda" and self.recomputes:
            self.learn(torch.cuda.memory_reserved(device), self._budget(device))

    def learn(self, reserved: int, budget: float) -> None:
        """Fits the margin to what PyTorch has reserved (bytes) in a step of the newest plan. What a budget needs beyond what is
        allocated depends on the shapes and on what the process did before; a step above the budget also costs its time, since
        the cache is then emptied in each. A margin that was too small is not tried again."""
        excess = reserved / budget - _FULL
        if reserved > budget:
            self._margin = self._least_margin = min(self._margin + excess, _MOST_MARGIN)
        elif self._is_tight:
            self._margin = max(self._margin + excess / 2, self._least_margin)

    def _fit(self, run: Pass, free: int, *, gradients: int, pending: int) -> list[LayerPlan]:
        """The plan that keeps most on the GPU while neither forward nor backward ever takes more than `free`."""
        sizes, room = bytes_of(self.config, run), max(0, free)
        while True:
            plans = plan_layers(self.config, run, gpu_bytes=room, host_bytes=self.host_bytes, host_rate=self._host_rate,
                                pending=pending, peak_flops=self._product_rate)
            forward, backward = most_held(plans, sizes, gradients=gradients, pending=pending)
            excess = max(forward + forward_workspace(self.config, run), backward + workspace(self.config, run)) - free
            if excess <= 0 or room == 0:
                return plans
            held = sum(sizes[name] for plan in plans for name, place in plan.items() if place == Place.gpu)
            room = max(0, min(room, held) - excess)  # of room beyond what is held, nothing would change


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


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP per second of a matrix product, once the GPU's clocks have risen."""
    size, times = 4096, 20
    a = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(times):
        torch.mm(a, a, out=out)
    events[0].record()
    for _ in range(times):
        torch.mm(a, a, out=out)
    events[1].record()
    torch.cuda.synchronize(device)
    return times * 2 * size**3 / (events[0].elapsed_time(events[1]) / 1e3)
