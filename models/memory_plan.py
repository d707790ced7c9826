"""Where everything lies before anything is loaded: a GPU's memory, byte by byte, while sampling and in the update.

`plan` takes what a run needs (`Needs`) and a limit on all of the process's GPU memory, context and modules included, and moves
things to pinned host memory in the order of what that costs in time:
  1. the input embedding: a few rows cross the bus for each batch of tokens;
  2. prefill in small chunks, which need no scratch for dequantised weights;
  3. the optimizer's state: it crosses the bus twice in an update;
  4. in the update: layers' inputs, then the experts of some layers. They cross the bus twice in a micro-batch, beside products
     that take longer;
  5. while sampling: fewer rows at once, or the experts of some layers, whichever makes a rollout shorter. A streamed layer,
     or those of its experts that few rows need, crosses the bus in every decode step, so few rows are often better.
Streamed layers take turns in two slots of one layer each. What layers keep for the backward in the memory that is left is the
business of models/offload.py, at run time.

Pure arithmetic: nothing here touches a GPU. Sizes in bytes, times in seconds.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from kernels.device import MAX_FEW_ROWS
from kernels.head.log_probs import SCRATCH_BYTES as HEAD_SCRATCH_BYTES
from models.adam_state import OptimizerBytes, optimizer_bytes
from models.config import GptOssConfig
from models.decoder import parts_bytes
from models.expert_store import NUM_SLOTS, Placement, layer_bytes
from models.experts import FORMATS
from models.host_store import pinned_bytes
from models.kv_cache import KVCache, page_bytes, slot_bytes
from models.offload import (
    GATHERED_LAYERS,
    SCRATCH_BYTES,
    Place,
    Workload,
    always_kept,
    bytes_of,
    everything,
    largest_tensor,
    layer_memory,
    most_held,
    scratch,
    workspaces,
)

# Beside torch: the CUDA context, and what modules (kernels, the vendor's libraries) take once all of them have run. Measured on
# an H200 (torch 2.11) after a training step: 0.55 and 0.32 GB. Other GPUs have fewer multiprocessors, and contexts no larger.
CONTEXT_BYTES, MODULE_BYTES = 550_000_000, 320_000_000
EXCHANGE_BYTES = 1 << 26  # of the buffers, two at most, in which ranks exchange gradients
MAX_PREFILL_TOKENS, FEW_PREFILL_TOKENS = 16_384, MAX_FEW_ROWS
# memory that torch reserves and cannot use: of all that it holds; as a share of the largest activation (as in models/offload.py)
_UNUSED, _UNUSED_IN_UPDATE, _HOLES = 0.01, 0.025, 0.6
_LEAST_SCRATCH = 1 << 26
_OF_SAMPLING = ("cache", "prefill and logits", "copy of what trains")  # what an update has not where nothing is sampled beside it
_LAUNCHES = 1e-3  # least time of a decode step


@dataclass(frozen=True)
class GpuSpec:
    num_bytes: int  # that CUDA reports in all: nvidia-smi's number less what the driver keeps for itself
    bandwidth: float  # of its memory, bytes per second
    host_rate: float  # of copies from pinned host memory, bytes per second
    has_tensor_cores: bool = True  # that Triton drives: without, sampling dequantises weights as training does


def _gib(number: float) -> int:
    return int(number * 2**30)


# memory as torch reports it; rates as their makers give them (H200: measured)
GPU_SPECS = {
    "T4": GpuSpec(_gib(14.74), 0.32e12, 12e9, has_tensor_cores=False),
    "L4": GpuSpec(_gib(22.16), 0.30e12, 25e9),
    "4090": GpuSpec(_gib(23.64), 1.0e12, 25e9),
    "A100-40": GpuSpec(_gib(39.39), 1.5e12, 25e9),
    "A100-80": GpuSpec(_gib(79.15), 2.0e12, 25e9),
    "H100": GpuSpec(_gib(79.10), 3.3e12, 55e9),
    "H200": GpuSpec(_gib(139.72), 4.2e12, 55e9),
    "B200": GpuSpec(_gib(178.35), 8.0e12, 55e9)}


@dataclass
class Needs:
    """What a plan is for: the model, what trains, and the sizes of batches. Lengths in tokens."""

    config: GptOssConfig
    experts: str  # their format, a key of models.experts.FORMATS
    num_prompts: int  # of a step
    group_size: int  # completions of each
    max_rows: int  # decoded at once
    prompt_len: int
    new_len: int
    eval_rows: int = 0  # completions of an evaluation
    dtype: torch.dtype = torch.bfloat16
    filters: bool = False  # draws are filtered, so the logits are stored
    cache_bytes: int | None = None  # most of the cache; None: no limit of its own
    lora_rank: int = 0  # 0: no adapter
    lora_targets: Sequence[str] = ()
    trains_norms: bool = False
    trains_sinks: bool = False
    trains_all: bool = False
    max_tokens: int = 0  # most in a micro-batch, unless one sequence has more; 0: nothing trains
    minibatches: int = 1  # updates of a step
    shares_prompts: bool = False  # a micro-batch has a group's prompt once
    recomputes: bool = True  # layers may compute activations again
    moments: str = "fp32"  # how the optimizer keeps its state (models/adam_state.py)
    weights: str = "master"
    in_backward: bool = False  # an update from one micro-batch keeps no gradients
    num_ranks: int = 1  # processes that add their gradients
    num_sharers: int = 1  # processes that hold the experts together; none of them streams
    num_shards: int = 1  # processes that divide weights, gradients and state of full training
    full_kl: bool = False  # the loss has the KL to a reference over the whole vocabulary
    samples_beside: bool = False  # sampling goes on during the update, from a copy of what trains

    @property
    def expert_layer_bytes(self) -> int:
        return layer_bytes(self.config, FORMATS[self.experts], self.dtype) // self.num_sharers

    @property
    def sequence_len(self) -> int:
        return min(self.prompt_len + self.new_len, self.config.max_position_embeddings)

    @property
    def num_rows(self) -> int:
        """Completions of the largest rollout."""
        return max(self.num_prompts * self.group_size, self.eval_rows)

    @property
    def minibatch_tokens(self) -> int:
        copies = 1 if self.shares_prompts else self.group_size
        step = self.num_prompts * (copies * self.prompt_len + self.group_size * self.new_len)
        return max(self.sequence_len, -(-step // self.minibatches))

    @property
    def micro_tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return min(max(self.sequence_len, self.max_tokens), self.minibatch_tokens)

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients of all parameters are there at once."""
        return not (self.in_backward and self.micro_tokens == self.minibatch_tokens)


@dataclass
class Phase:
    """The GPU's memory at the peak of one phase."""

    lines: dict[str, int]  # what takes it -> bytes
    num_streamed: int = 0  # layers whose experts are streamed

    @property
    def peak(self) -> int:
        return sum(self.lines.values())


@dataclass
class MemoryPlan:
    limit: int  # of everything on the GPU
    embedding_on_host: bool
    state_on_host: bool  # the optimizer's
    prefill_tokens: int  # most in one prefill
    num_rows: int  # that the cache holds at full length
    cache_bytes: int  # most that the cache may take
    seconds: float  # of decoding a rollout, by the cost model
    sampling: Phase
    update: Phase | None  # None: nothing trains
    host: dict[str, int]  # what takes pinned host memory -> bytes
    samples_beside: bool  # both phases at once: each one's lines have what the other one takes too

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def placement(self) -> Placement:
        sampling = self.sampling.num_streamed
        return Placement(sampling, self.update.num_streamed if self.update else sampling)


class DoesNotFit(ValueError):
    """No placement keeps the needs within the limits."""


# ---- sizes of the model


def rest_parameters(config: GptOssConfig) -> int:
    """Attention, norms, sinks, routers and the experts' biases, of all layers."""
    width, q_width, kv_width = config.hidden_size, config.q_width, config.kv_width
    attention = (width + 1) * (q_width + 2 * kv_width) + (q_width + 1) * width + config.num_attention_heads
    router, biases = (width + 1) * config.num_local_experts, config.num_local_experts * (2 * config.intermediate_size + width)
    return config.num_hidden_layers * (attention + 2 * width + router + biases) + width


def embedding_parameters(config: GptOssConfig) -> int:
    """The input embedding, or the head: they are of one size."""
    return config.vocab_size * config.hidden_size


def lora_parameters(config: GptOssConfig, rank: int, targets: Sequence[str], *, num_sharers: int = 1) -> int:
    """num_sharers: counts the adapters of 1/num_sharers of the experts."""
    width, inner, q_width, kv_width = config.hidden_size, config.intermediate_size, config.q_width, config.kv_width
    experts = config.num_local_experts
    sizes = {"q_proj": width + q_width, "k_proj": width + kv_width, "v_proj": width + kv_width, "o_proj": q_width + width,
             "router": width + experts, "experts": experts // num_sharers * (width + 2 * inner + inner + width)}
    return config.num_hidden_layers * rank * sum(sizes[target] for target in targets)


def weight_bytes(needs: Needs) -> int:
    """All weights but adapters: what full training has on each GPU while sampling, however many divide the update."""
    matrices = rest_parameters(needs.config) + 2 * embedding_parameters(needs.config)
    return matrices * needs.dtype.itemsize + needs.config.num_hidden_layers * needs.expert_layer_bytes


def cache_bytes(needs: Needs, num_rows: int) -> int:
    """The cache in which so many of the rows run at once, at full length."""
    config, dtype, length = needs.config, needs.dtype, needs.sequence_len
    num_slots = num_rows + (num_rows < needs.num_rows)  # a prompt whose completions wait has a slot of its own
    return num_slots * (slot_bytes(config, dtype, max_len=length) + KVCache.pages_for(length) * page_bytes(config, dtype))


# ---- one phase


@dataclass(frozen=True)
class _Homes:
    """What may lie elsewhere, at no or little cost."""

    embedding_on_host: bool
    state_on_host: bool
    prefill_tokens: int


def _weights(needs: Needs, homes: _Homes, num_streamed: int) -> dict[str, int]:
    """What both phases hold."""
    config, size, layers = needs.config, needs.dtype.itemsize, needs.config.num_hidden_layers
    per_layer, matrix = needs.expert_layer_bytes, embedding_parameters(config) * size
    lines = {"context and modules": CONTEXT_BYTES + MODULE_BYTES,
             "attention and the rest": rest_parameters(config) * size,
             "head": matrix,
             "embedding": 0 if homes.embedding_on_host else matrix,
             "experts": (layers - num_streamed) * per_layer,
             "expert slots": min(NUM_SLOTS, num_streamed) * per_layer,
             "LoRA": lora_parameters(config, needs.lora_rank, needs.lora_targets, num_sharers=needs.num_sharers) * 4,
             "LoRA for decoding": _copied_lora(needs)}
    if needs.max_tokens:
        lines["optimizer"] = 0 if homes.state_on_host else state_bytes(needs)
    return lines


def _copied_lora(needs: Needs) -> int:
    """models/adapter_copies.py."""
    targets = [target for target in needs.lora_targets if target != "router"]
    return (needs.dtype == torch.bfloat16) * 2 * lora_parameters(needs.config, needs.lora_rank, targets,
                                                                 num_sharers=needs.num_sharers)


def trained_sizes(needs: Needs) -> tuple[list[int], list[int]]:
    """Elements of trained parameters in fp32 (LoRA), and in the model's dtype; small ones of a layer as one."""
    config, layers = needs.config, needs.config.num_hidden_layers
    if needs.trains_all:
        experts = config.num_local_experts * config.hidden_size * config.intermediate_size
        return [], [rest_parameters(config), *2 * [embedding_parameters(config)], *layers * [2 * experts, experts]]
    norms = needs.trains_norms * (2 * layers + 1) * config.hidden_size
    sinks = needs.trains_sinks * layers * config.num_attention_heads
    adapter = lora_parameters(config, needs.lora_rank, needs.lora_targets, num_sharers=needs.num_sharers)
    return [adapter // layers] * layers if adapter else [], [size for size in (norms, sinks) if size]


def optimizer_needs(needs: Needs) -> OptimizerBytes:
    fp32, others = trained_sizes(needs)
    parts = [optimizer_bytes(fp32, torch.float32, needs.moments, needs.weights),
             optimizer_bytes(others, needs.dtype, needs.moments, needs.weights)]
    return OptimizerBytes(*(sum(pair) for pair in zip(*parts)))


def state_bytes(needs: Needs) -> int:
    optimizer = optimizer_needs(needs)
    return (optimizer.moments + optimizer.masters) // needs.num_shards


def _divided(needs: Needs, lines: dict[str, int]) -> dict[str, int]:
    """The lines of an update where processes divide the weights: this one's part of them, the layers that are being gathered, and
    embedding and head, which stay during a pass."""
    if needs.num_shards == 1:
        return lines
    config, size = needs.config, needs.dtype.itemsize
    parts = {name: lines[name] // needs.num_shards for name in ("attention and the rest", "head", "embedding", "experts")}
    layer = needs.expert_layer_bytes + rest_parameters(config) * size // config.num_hidden_layers
    return lines | parts | {"gathered weights": GATHERED_LAYERS * layer + 2 * embedding_parameters(config) * size}


def _gradient_bytes(needs: Needs, optimizer: OptimizerBytes) -> int:
    """All, and those of the layer that has just run backwards, which autograd adds to them; with several processes what is on its
    way, and this one's part of the sum."""
    own, layer = needs.keeps_gradients * optimizer.gradients, optimizer.gradients // needs.config.num_hidden_layers
    if needs.num_shards > 1:
        return own // needs.num_shards + 3 * layer  # one is made while another one is exchanged
    return own + layer + (needs.num_ranks > 1) * (optimizer.gradients // needs.num_ranks + EXCHANGE_BYTES)


def _plan_sampling(needs: Needs, homes: _Homes, gpu: GpuSpec, limit: int, most_streamed: int) -> tuple[float, int, int, Phase]:
    """The fastest way to sample: its seconds, rows at once, bytes that the cache may take, and the phase. Raises DoesNotFit."""
    best, wanted = None, min(needs.num_rows, needs.max_rows)
    for num_streamed in range(most_streamed + 1):
        lines = _weights(needs, homes, num_streamed) | {"prefill and logits": _sampling_workspace(needs, homes, gpu, wanted)}
        lines["unused by torch"] = int(_UNUSED * _torch_bytes(lines))
        room = limit - sum(lines.values())
        room = room if needs.cache_bytes is None else min(room, needs.cache_bytes)
        num_rows = largest(lambda number, room=room: cache_bytes(needs, number) <= room, wanted)
        seconds = _rollout_seconds(needs, gpu, num_rows, num_streamed) if num_rows else math.inf
        if num_rows and (best is None or seconds < best[0]):
            best = seconds, num_rows, room, Phase(lines | {"cache": cache_bytes(needs, num_rows)}, num_streamed)
    if best is None:
        raise DoesNotFit("sampling")
    return best


def _torch_bytes(lines: dict[str, int]) -> int:
    return sum(size for name, size in lines.items() if name not in ("context and modules", "cache"))


def largest(fits: Callable[[int], bool], highest: int) -> int:
    """The largest number up to `highest` that fits, where all smaller ones fit too; 0 if none does."""
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _sampling_workspace(needs: Needs, homes: _Homes, gpu: GpuSpec, num_rows: int) -> int:
    tokens = min(homes.prefill_tokens, max(needs.num_prompts, needs.eval_rows) * needs.prompt_len)
    tokens = max(tokens, min(num_rows, needs.max_rows))
    dequantizes = FORMATS[needs.experts].is_packed and (tokens > MAX_FEW_ROWS or not gpu.has_tensor_cores)
    layer = workspaces(needs.config, replace(_workload(needs, SCRATCH_BYTES), num_tokens=tokens, is_packed=dequantizes))[0]
    logits = 4 * needs.config.vocab_size * num_rows
    parts = parts_bytes(needs.config, needs.dtype, num_rows=min(num_rows, needs.max_rows), longest=needs.sequence_len)
    return layer + parts + logits * (4 if needs.filters else 2)  # logits: in graphs and outside


def _rollout_seconds(needs: Needs, gpu: GpuSpec, num_rows: int, num_streamed: int) -> float:
    """A simple model of the time to decode: a step reads the weights of the experts that its tokens go to, all other weights and
    the cache, and waits for the streamed layers where those take longer."""
    config, size = needs.config, needs.dtype.itemsize
    per_layer = needs.expert_layer_bytes
    touched = 1 - (1 - config.num_experts_per_tok / config.num_local_experts) ** num_rows
    read = touched * config.num_hidden_layers * per_layer + (rest_parameters(config) + embedding_parameters(config)) * size
    read += cache_bytes(needs, num_rows)
    computing, copying = _LAUNCHES + read / gpu.bandwidth, num_streamed * per_layer / gpu.host_rate
    step = max(computing, copying)  # whole layers are copied ahead; experts that have rows, when these are known
    if gpu.has_tensor_cores:
        step = min(step, computing + touched * copying)
    return needs.num_rows / num_rows * needs.new_len * step


def _workload(needs: Needs, scratch_bytes: int) -> Workload:
    """full_pairs and windowed_pairs matter for times only, which are not asked for."""
    size = needs.dtype.itemsize
    return Workload(num_tokens=needs.micro_tokens, full_pairs=0, windowed_pairs=0, element_size=size,
                    stream_size=4 if needs.dtype == torch.float16 else size, is_packed=FORMATS[needs.experts].is_packed,
                    keeps_h=True, scratch_bytes=scratch_bytes)


def _pass_moment(needs: Needs, kept: Place, x: Place, scratch_bytes: int) -> dict[str, int]:
    """The peak of a micro-batch beside weights, gradients and state, if layers keep everything in one place and their inputs in
    another: in the forward, at the head or in the backward."""
    config, workload = needs.config, replace(_workload(needs, scratch_bytes), keeps_h=kept == Place.gpu)
    sizes, plans = bytes_of(config, workload), [everything(kept) | {"x": x}] * config.num_hidden_layers
    pending = sum(sizes.values()) - sizes["qkv"] if x == Place.host else 0
    small = config.num_hidden_layers * always_kept(config, num_tokens=workload.num_tokens, rank=needs.lora_rank,
                                                   element_size=workload.element_size)
    held = [small + kept_bytes for kept_bytes in most_held(plans, sizes, gradients=0, pending=pending)]
    dequantized = scratch(config, replace(workload, keeps_h=True)), scratch(config, workload)
    moments = [{"kept activations": kept_bytes, "a layer's workspace": space - weights, "scratch of weights": weights}
               for kept_bytes, space, weights in zip(held, layer_memory(config, workload, plans[0]), dequantized)]
    whole = sum(sizes[name] for name, place in plans[0].items() if place == Place.gpu) * len(plans)
    moments.append({"kept activations": small + whole + 4 * sizes["x"], "scratch of the head": min(
        HEAD_SCRATCH_BYTES, needs.micro_tokens * config.vocab_size * needs.dtype.itemsize)})
    if needs.full_kl:  # the reference's states, and gradients of the policy's: in fp32, rounded, and those of log-probs
        moments[-1]["reference of the KL"] = 4 * sizes["x"] + needs.trains_all * (
            embedding_parameters(config) * needs.dtype.itemsize)
    return max(moments, key=lambda lines: sum(lines.values()))


def _plan_update(needs: Needs, homes: _Homes, limit: int, host_bytes: int, streamed: Sequence[int],
                 is_last: bool) -> tuple[int, Phase]:
    """Bytes of activations in host memory, and the phase. streamed: the numbers of streamed layers to choose from. is_last: all
    else has been tried. Raises DoesNotFit."""
    layers = needs.config.num_hidden_layers
    optimizer = optimizer_needs(needs)
    sizes = bytes_of(needs.config, _workload(needs, SCRATCH_BYTES))
    inputs, whole = layers * sizes["x"], layers * sum(sizes.values())

    def phase(kept: Place, x: Place, num_streamed: int, scratch_bytes: int) -> Phase:
        lines = _divided(needs, _weights(needs, homes, num_streamed))
        lines["gradients"] = _gradient_bytes(needs, optimizer)
        parts = [_pass_moment(needs, kept, x, scratch_bytes),
                 {"scratch of the optimizer": optimizer.scratch + homes.state_on_host * optimizer.buffers}]
        for part in [max(parts, key=lambda part: sum(part.values()))] if needs.keeps_gradients else parts:
            lines |= part
        torch_bytes = _torch_bytes(lines)
        lines["unused by torch"] = int(_UNUSED * torch_bytes if kept == Place.gpu else max(
            _UNUSED_IN_UPDATE * torch_bytes, _HOLES * largest_tensor(needs.config, _workload(needs, SCRATCH_BYTES))))
        return Phase(lines, num_streamed)

    tries = [(Place.gpu, Place.gpu, streamed[0], SCRATCH_BYTES)]
    x = Place.host if inputs <= host_bytes and not needs.trains_all else Place.gpu
    if needs.recomputes:
        tries += [(Place.recompute, Place.gpu, streamed[0], SCRATCH_BYTES)]
    if needs.recomputes and is_last:
        tries += [(Place.recompute, x, streamed[0], SCRATCH_BYTES)]
        tries += [(Place.recompute, x, number, SCRATCH_BYTES // 2) for number in streamed]
        tries += [(Place.recompute, x, streamed[-1], SCRATCH_BYTES >> halvings)
                  for halvings in range(2, (SCRATCH_BYTES // _LEAST_SCRATCH).bit_length())]
    for kept, x, num_streamed, scratch_bytes in tries:
        found = phase(kept, x, num_streamed, scratch_bytes)
        if found.peak <= limit:
            if kept != Place.gpu:  # layers keep what there is room for
                kept_bytes = found.lines.get("kept activations", 0)
                found.lines["kept activations"] = kept_bytes + min(limit - found.peak, max(0, whole - kept_bytes))
            return inputs if x == Place.host else 0, found
    raise DoesNotFit("update")


# ---- the plan


def plan(needs: Needs, gpu: GpuSpec, *, limit: int, host_bytes: int) -> MemoryPlan:
    """The placement that costs least time such that neither phase takes more than `limit` bytes of the GPU, nor both more than
    host_bytes of pinned host memory. Where sampling goes on beside the update, both are on the GPU at once, and as many rows are
    decoded together as that leaves room for. Raises DoesNotFit."""
    embedding, state = not needs.trains_all, needs.max_tokens > 0  # whether they can lie in host memory
    ladder = [_Homes(False, False, MAX_PREFILL_TOKENS), _Homes(embedding, False, MAX_PREFILL_TOKENS),
              _Homes(embedding, False, FEW_PREFILL_TOKENS), _Homes(embedding, state, FEW_PREFILL_TOKENS)]
    ladder = [homes for homes in dict.fromkeys(ladder) if sum(_host(needs, homes).values()) <= host_bytes]
    wanted = min(needs.num_rows, needs.max_rows)
    tries = [(needs, homes, homes == ladder[-1]) for homes in ladder]
    if needs.samples_beside:  # fewer rows only where no placement has room for more
        most = math.inf if needs.cache_bytes is None else needs.cache_bytes
        tries = [(replace(needs, cache_bytes=min(most, cache_bytes(needs, wanted >> halvings))), homes, homes != ladder[0])
                 for halvings in range(wanted.bit_length()) for homes in ladder]
    problem = DoesNotFit("host memory")
    for part, homes, is_last in tries:
        try:
            found = _plan_with(part, homes, gpu, limit, host_bytes, is_last=is_last)
        except DoesNotFit as error:
            problem = error
            continue
        if needs.samples_beside or is_last or found.num_rows == wanted:
            return found
    raise problem


def _host(needs: Needs, homes: _Homes) -> dict[str, int]:
    embedding = pinned_bytes(embedding_parameters(needs.config) * needs.dtype.itemsize)
    return {"embedding": homes.embedding_on_host * embedding, "optimizer": homes.state_on_host * state_bytes(needs)}


def _plan_with(needs: Needs, homes: _Homes, gpu: GpuSpec, limit: int, host_bytes: int, *, is_last: bool) -> MemoryPlan:
    per_layer, layers = needs.expert_layer_bytes, needs.config.num_hidden_layers
    host = _host(needs, homes)
    free = host_bytes - sum(host.values())
    inputs = layers * bytes_of(needs.config, _workload(needs, SCRATCH_BYTES))["x"]  # of the update, which may go there too
    # the slots serve one pass at a time
    may_stream = is_last and not (needs.trains_all or needs.num_sharers > 1 or needs.samples_beside)
    room = free - inputs * needs.recomputes if may_stream else 0
    most = largest(lambda number: Placement(0, number).host_bytes(per_layer) <= room, layers)
    fp32, others = trained_sizes(needs)
    copied = {"copy of what trains": needs.samples_beside * (4 * sum(fp32) + needs.dtype.itemsize * sum(others))}
    seconds, num_rows, cache_room, sampling = _plan_sampling(needs, homes, gpu, limit - sum(copied.values()), most)
    sampling.lines |= copied
    update, activations, num_streamed = None, 0, sampling.num_streamed
    if needs.max_tokens:  # what streams while sampling streams in the update too
        beside = {name: sampling.lines[name] for name in _OF_SAMPLING if needs.samples_beside}
        free -= Placement(0, most).host_bytes(per_layer)
        activations, update = _plan_update(needs, homes, limit - sum(beside.values()), free, range(num_streamed, most + 1),
                                           is_last)
        update.lines |= beside
        num_streamed = update.num_streamed
    host |= {"experts": Placement(0, num_streamed).host_bytes(per_layer), "activations": activations}
    return MemoryPlan(limit, homes.embedding_on_host, homes.state_on_host, homes.prefill_tokens, num_rows, cache_room, seconds,
                      sampling, update, host, needs.samples_beside)


def least_limit(needs: Needs, gpu: GpuSpec, *, host_bytes: int) -> int | None:
    """The smallest limit, to 10 MB, for which there is a plan; None if there is none for any."""
    step = 10_000_000

    def fits(number: int) -> bool:
        return has_plan(needs, gpu, limit=number * step, host_bytes=host_bytes)

    highest = 200_000
    return None if not fits(highest) else step * (1 + largest(lambda number: not fits(number), highest))


def has_plan(needs: Needs, gpu: GpuSpec, *, limit: int, host_bytes: int) -> bool:
    try:
        plan(needs, gpu, limit=limit, host_bytes=host_bytes)
    except DoesNotFit:
        return False
    return True


def table(found: MemoryPlan, needs: Needs) -> str:
    """The plan as lines of text: GB on the GPU in both phases, then host memory."""
    phases = [found.sampling] + ([found.update] if found.update else [])
    names = list(dict.fromkeys(name for phase in phases for name in phase.lines))
    names.append(names.pop(names.index("unused by torch")))
    rows = [("GPU memory in GB", "sampling", "update"[:6 * len(phases) - 6])]
    rows += [(name, *(f"{phase.lines.get(name, 0) / 1e9:.3f}" for phase in phases)) for name in names
             if any(phase.lines.get(name) for phase in phases)]
    rows.append((f"in all, of {found.limit / 1e9:.2f}", *(f"{phase.peak / 1e9:.2f}" for phase in phases)))
    rows.append((f"layers streamed, of {needs.config.num_hidden_layers}", *(str(phase.num_streamed) for phase in phases)))
    lines = [f"  {row[0]:<26}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    on_host = [f"{name} {size / 1e9:.2f}" for name, size in found.host.items() if size]
    micro = f", in a micro-batch {needs.micro_tokens:,}" if found.update else ""
    lines.append(f"  rows decoded at once: {found.num_rows}; tokens: in a prefill {found.prefill_tokens:,}{micro}")
    lines.append(f"  pinned host memory in GB: {', '.join(on_host)}; in all {found.host_bytes / 1e9:.2f}" if on_host else
                 "  pinned host memory: none")
    return "\n".join(lines)
