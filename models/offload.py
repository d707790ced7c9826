"""What a layer's forward leaves for its backward on a GPU, and where it waits: on the GPU, in host memory, or nowhere, to be
computed again.

The backward needs the layer's input x, the rotated queries, keys and values (qkv), the attention's output (attended), the
residual stream between attention and experts (middle) and the experts' pre-activations (h). Only x is indispensable. A memory
budget is spent where a byte saves most time; what does not fit goes to host memory if there is some, as long as the copies keep
up with the computation. The choice changes no bit of the result: what is computed again comes from the same kernels.

Sizes in bytes, times in seconds. Shapes: T tokens, D model width.
"""
from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache

import torch

from kernels.attention.plan import AttentionPlan
from kernels.experts.sorting import Routing
from models.config import GptOssConfig

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
_ALIGNMENT = 256  # bytes between the starts of tensors in host memory
_SLAB = 1 << 30  # bytes; a power of two, which pinned allocations are rounded to


class Place(Enum):
    gpu = "gpu"
    host = "host"
    again = "again"  # computed again


LayerPlan = dict[str, Place]  # of "x" and NAMES


@dataclass
class Workload:
    """What a plan depends on."""

    num_tokens: int
    full_pairs: int  # pairs of query and visible key, of a layer without a window
    windowed_pairs: int
    element_size: int
    stream_size: int  # of an element of the residual stream: x and middle
    is_packed: bool  # experts are dequantised for each use
    keeps_h: bool  # all layers keep their h
    scratch_bytes: int  # of a projection's experts, dequantised at once


def everything(place: Place) -> LayerPlan:
    """x on the GPU, all else in one place."""
    return {"x": Place.gpu} | {name: place for name in NAMES}


def bytes_of(config: GptOssConfig, run: Workload) -> dict[str, int]:
    """Size of each activation of a layer."""
    q_width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    stream = run.stream_size * config.hidden_size
    per_token = {"x": stream, "qkv": run.element_size * (q_width + 2 * kv_width), "middle": stream,
                 "attended": run.element_size * q_width + 4 * config.num_attention_heads,  # with lse
                 "h": run.element_size * 2 * config.intermediate_size * config.num_experts_per_tok}
    return {name: run.num_tokens * size for name, size in per_token.items()}


def seconds_of(config: GptOssConfig, run: Workload, peak_flops: float, *, windowed: bool) -> dict[str, float]:
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


def scratch(config: GptOssConfig, run: Workload) -> int:
    """Dequantised weights alive at once: all of gate_up, if the scratch holds them and h is computed again, beside a part of
    down; else a part of either."""
    if not run.is_packed:
        return 0
    down = config.num_local_experts * config.intermediate_size * config.hidden_size * run.element_size
    down_part, gate_up = min(down, run.scratch_bytes), 2 * down
    return gate_up + down_part if gate_up <= run.scratch_bytes and not run.keeps_h else min(gate_up, run.scratch_bytes)


def workspaces(config: GptOssConfig, run: Workload) -> tuple[int, int]:
    """Memory that the forward and the backward of one layer cannot do without, beside what layers keep."""
    sizes, width, inner = bytes_of(config, run), config.hidden_size, config.intermediate_size
    rows = run.num_tokens * config.num_experts_per_tok * run.element_size
    both = sizes["qkv"] + sizes["attended"] + sizes["h"] + 100_000_000  # with workspaces of the library
    # nothing is computed again in the forward: never two projections' weights at once
    forward = both + rows * (inner + width) + 4 * sizes["x"] + scratch(config, replace(run, keeps_h=True))
    # in the backward the rows of the input's gradient take the activation's place, where they have its size
    backward = both + rows * (inner if inner == width else inner + width) + 6 * sizes["x"] + scratch(config, run)
    return forward, backward


def most_held(plans: list[LayerPlan], sizes: dict[str, int], *, gradients: int, pending: int) -> tuple[int, int]:
    """The most memory in use beside the running layer's workspace, in the forward and in the backward: what the layers before it
    keep, what is being copied (at most `pending`, or one layer's), and the gradients of the layers that are done."""
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


def plan_layers(config: GptOssConfig, run: Workload, *, gpu_bytes: int, host_bytes: int, host_rate: float, pending: float,
                peak_flops: float) -> list[LayerPlan]:
    """A plan for each layer. All layers together, their inputs included, keep at most gpu_bytes on the GPU and host_bytes in host
    memory. Copies go there at host_rate, and at most `pending` bytes may wait for theirs. Inputs are always kept: on the GPU if
    the host has no room for them."""
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
    """A rank of the layer by the reversed bits of its number. Layers of the lowest ranks are far apart, so that copies of large
    tensors do not queue up."""
    bits = max(1, (num_layers - 1).bit_length())
    return int(f"{layer:0{bits}b}"[::-1], 2)


class HostTensor:
    """A tensor in the store. fetch() starts the copy back, get() returns it on the GPU. Dropping it frees its place."""

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
    """At most `capacity` bytes of pinned host memory, taken when first needed, for activations on their way from a forward to its
    backward. A forward puts tensors in, layer by layer; the backward gets them back in the opposite order, each asked for one
    layer ahead. Copies run beside the computation, on streams of their own. A tensor that is on its way out stays allocated until
    its copy is done; the forward waits for the oldest copies once more than `max_pending_bytes` are on their way."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.num_held = 0
        self.outgoing, self.incoming = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._slabs: list[torch.Tensor] = []  # of _SLAB bytes each
        self._used = 0  # bytes of the slabs, one after the other
        self._pending: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._pending_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Makes room for `num_bytes` more, which the next forward puts in."""
        assert num_bytes <= self.capacity, f"{num_bytes} bytes asked of a host store of {self.capacity}"
        if self.num_held == 0:
            self._used = 0
        while len(self._slabs) * _SLAB < min(self._used + num_bytes, self.capacity):
            try:
                self._slabs.append(torch.empty(_SLAB, dtype=torch.uint8, pin_memory=True))
            except RuntimeError as error:
                raise RuntimeError(f"model.host_gb: the system refuses to pin another {_SLAB / 1e9:.1f} GB of host memory "
                                   f"({str(error).splitlines()[0]}); set a smaller model.host_gb") from error

    def _take(self, num_bytes: int) -> list[torch.Tensor] | None:
        """The next bytes of the slabs, None where there are too few."""
        if self._used + num_bytes > len(self._slabs) * _SLAB:
            return None
        parts = []
        while num_bytes > 0:
            slab, first = divmod(self._used, _SLAB)
            parts.append(self._slabs[slab][first:first + num_bytes])
            num_bytes -= len(parts[-1])
            self._used += len(parts[-1])
        self._used = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        return parts

    def put(self, tensor: torch.Tensor, *, max_pending_bytes: int) -> HostTensor | torch.Tensor:
        """Starts copying a contiguous tensor out. Returns the tensor itself where the store has no room, because another batch's
        tensors are still in it: it is then kept where it is."""
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
        """Makes the computation wait for every copy so far, and drops the tensors that were copied."""
        while self._pending:
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        tensor, done = self._pending.popleft()
        torch.cuda.current_stream(self.device).wait_event(done)
        self._pending_bytes -= tensor.numel() * tensor.element_size()


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
        """Starts the copies back of what is in host memory."""
        for tensor in self.tensors.values():
            if isinstance(tensor, HostTensor):
                tensor.fetch()


@dataclass
class TrainingPass:
    """What all layers of one forward and backward share."""

    layers: list[LayerPlan]
    scratch_bytes: int  # of dequantised experts held at once
    max_pending_bytes: int  # on their way to the host, or back, at once
    store: HostStore | None
    at_end: Callable[[torch.device], None]  # called when the backward has run
    kept: dict[int, Kept] = field(default_factory=dict)  # by layer, until its backward has run

    def new(self, layer: int) -> Kept:
        """For a layer's forward."""
        return Kept(self.layers[layer], self.scratch_bytes)

    def put(self, layer: int, kept: Kept) -> None:
        """Ends a layer's forward: drops what its plan computes again, and starts copying what it sends to host memory."""
        if kept.recomputes("attended"):
            kept.tensors.pop("lse", None)
        for name, place in kept.plan.items():
            if place == Place.again:
                kept.tensors.pop(name, None)
            elif place == Place.host:
                kept.tensors[name] = self.store.put(kept.tensors[name], max_pending_bytes=self.max_pending_bytes)
        self.kept[layer] = kept

    def take(self, layer: int) -> Kept:
        """Returns what a layer's forward has left. Starts the copies back for the next LOOKAHEAD layers of the backward: for as
        many as max_pending_bytes allows, and at least one."""
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


class MemoryBudget:
    """How much GPU and host memory (1e9 bytes) a model may use, and the plans that follow from it.

    recomputes: whether layers may compute activations again; otherwise all activations stay on the GPU. memory_gb: all that the
    process may use of the GPU; None: 85 % of what it has. host_gb: pinned host memory."""

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
             dtype: torch.dtype, is_packed: bool) -> TrainingPass:
        """For a forward and backward of the embedded tokens x [T, D], in the residual stream's dtype, by a model of `dtype`."""
        layers = self.config.num_hidden_layers
        run = Workload(len(x), *visible_pairs(attention, self.config.sliding_window), dtype.itemsize, x.element_size(), is_packed,
                   True, SCRATCH_BYTES)
        if x.is_cuda and self._product_rate is None:
            # whatever the plan: the library's first product takes a workspace for good, in each thread, which after a forward's
            # activations would lie between them, and divide the memory of later ones
            self._product_rate = product_rate(x.device, dtype)
            _backward_once(x.device, dtype)
        if not self.recomputes:
            return self._pass([everything(Place.gpu)] * layers, SCRATCH_BYTES, 0)
        if not x.is_cuda:
            return self._pass([everything(Place.again)] * layers, SCRATCH_BYTES, 0)
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
        if free - workspaces(self.config, run)[1] - gradients < layers * sum(sizes.values()):
            run.keeps_h = False
        # gradients grow as what layers keep goes: only what they exceed it by is extra
        wanted = gradients if layers * sizes["x"] <= self.host_bytes else max(gradients, layers * sizes["x"])
        while free - workspaces(self.config, run)[1] < wanted and run.scratch_bytes > 1 << 26:
            run.scratch_bytes //= 2
        plans = self._fit(run, free, gradients=gradients, pending=pending)
        self._is_tight = any(place != Place.gpu for plan in plans for place in plan.values())
        if self.store is not None:
            self.store.reserve(sum(sizes[name] for plan in plans for name, place in plan.items() if place == Place.host))
        return self._pass(plans, run.scratch_bytes, pending)

    def _pass(self, layers: list[LayerPlan], scratch_bytes: int, max_pending_bytes: int) -> TrainingPass:
        return TrainingPass(layers, scratch_bytes, max_pending_bytes, self.store, self.after_backward)

    def _budget(self, device: torch.device) -> float:
        return self.memory_gb * 1e9 if self.memory_gb else 0.85 * torch.cuda.get_device_properties(device).total_memory

    def before_backward(self, grad: torch.Tensor) -> None:
        """A hook for the gradient that a backward begins with. The backward's tensors have other sizes than the forward's. The
        allocator would hold the holes that the forward leaves beside new memory: 7 of 60 GB for a sequence of 131,072 tokens.
        Giving them back costs some 20 ms, so it is done only where tensors are large."""
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

    def _fit(self, run: Workload, free: int, *, gradients: int, pending: int) -> list[LayerPlan]:
        """The plan that keeps most on the GPU while neither forward nor backward ever takes more than `free`."""
        sizes, room = bytes_of(self.config, run), max(0, free)
        while True:
            plans = plan_layers(self.config, run, gpu_bytes=room, host_bytes=self.host_bytes, host_rate=self._host_rate,
                                pending=pending, peak_flops=self._product_rate)
            held = most_held(plans, sizes, gradients=gradients, pending=pending)
            excess = max(map(sum, zip(held, workspaces(self.config, run)))) - free
            if excess <= 0 or room == 0:
                return plans
            kept = sum(sizes[name] for plan in plans for name, place in plan.items() if place == Place.gpu)
            room = max(0, min(room, kept) - excess)  # of room beyond what is kept, nothing would change


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


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    """Measured time of a second call on a GPU, once its clocks have risen."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    function()
    events[0].record()
    function()
    events[1].record()
    torch.cuda.synchronize(device)
    return events[0].elapsed_time(events[1]) / 1e3


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP per second of a matrix product."""
    size, times = 4096, 20
    a = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(times):
            torch.mm(a, a, out=out)

    return times * 2 * size**3 / _seconds(multiply, device)


def transfer_rate(device: torch.device) -> float:
    """Measured bytes per second from the GPU to pinned host memory."""
    size = 1 << 26
    source, target = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return size / _seconds(lambda: target.copy_(source, non_blocking=True), device)
