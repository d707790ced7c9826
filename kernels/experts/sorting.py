"""Routing of tokens to experts: top-k of the router's logits, then softmax over the k values only.

Equal to a softmax over all experts, top-k, renormalised. Ties go to the lower expert index.
    w = softmax(chosen logits),  dlogit_k = w_k (dw_k - sum_j w_j dw_j)

A stable counting sort puts tokens into expert order: first a histogram of each chunk of choices, then every chunk adds up the
histograms before it and ranks its own choices. Nothing waits for the host.

Shapes: T tokens, E experts, A experts per token, R = T * A routed rows, D model width, C chunks.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.device import (
    cdiv,
    check_served,
    is_triton,
    launch,
    next_power_of_2,
    overlap_constants,
    wait_for_launch_before,
)

MAX_EXPERTS, MAX_EXPERTS_PER_TOKEN = 1024, 8
SORT_TILE = 4096  # choices times experts that a program ranks at once
SMALL_SORT = 512  # up to this many choices, one program sorts alone
MAX_CHUNKS = 128


@dataclass
class Routing:
    indices: torch.Tensor  # [T, A] int64, descending logit
    order: torch.Tensor  # [R] int32: routed row in expert order -> token * A + slot
    tokens: torch.Tensor  # [R] int32: routed row in expert order -> token
    inverse: torch.Tensor  # [T, A] int32: token, slot -> routed row in expert order
    offsets_device: torch.Tensor  # [E + 1] int32: expert e owns rows offsets_device[e]:offsets_device[e + 1]
    num_parts: int = 1  # that the experts are divided into; offsets_device is that of one part, the others' rows are not computed
    first_expert: int = 0  # of this part

    def part(self, experts: slice, num_parts: int) -> Routing:
        """For some experts, which stand side by side. Rows stay where they are."""
        return replace(self, offsets_device=self.offsets_device[experts.start:experts.stop + 1], num_parts=num_parts,
                       first_expert=experts.start)

    def new_rows(self, like: torch.Tensor, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory for all rows [R, width]: zeros where other parts' rows are added later."""
        make = like.new_empty if self.num_parts == 1 else like.new_zeros
        return make(len(self.tokens), width, dtype=dtype)

    @property
    def offsets(self) -> list[int]:
        """offsets_device on the host. Waits for the device: for references and tests."""
        return self.offsets_device.tolist()


def route_reference(logits: torch.Tensor, experts_per_token: int,
                    indices: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if indices is not None:
        return torch.softmax(logits.gather(1, indices), dim=-1), indices
    values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    return torch.softmax(values[:, :experts_per_token], dim=-1), indices[:, :experts_per_token]


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(logits_ptr, indices_ptr, weights_ptr, num_tokens, stride_logits, NUM_EXPERTS: tl.constexpr,
                  PER_TOKEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr,
                  REPLAY: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.arange(0, BLOCK_A)
    is_token = tokens < num_tokens
    is_slot = is_token[:, None] & (slots < PER_TOKEN)[None, :]
    pairs = tokens[:, None] * PER_TOKEN + slots[None, :]
    if REPLAY:
        chosen = tl.load(indices_ptr + pairs, mask=is_slot, other=0)
        values = tl.load(logits_ptr + tokens[:, None] * stride_logits + chosen, mask=is_slot, other=float("-inf"))
    else:
        experts = tl.arange(0, BLOCK_E)
        logits = tl.load(logits_ptr + tokens[:, None] * stride_logits + experts[None, :],
                         mask=is_token[:, None] & (experts < NUM_EXPERTS)[None, :], other=float("-inf"))
        # one integer orders by logit, then by lower index: the float's bits made monotonous, above the index counted down
        logits = tl.where(logits == 0.0, 0.0, logits)  # -0 ties with 0
        bits = tl.where(logits != logits, 0x7FC00000, logits.to(tl.int32, bitcast=True))  # NaN first, as torch.sort
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        keys = (ordered.to(tl.int64) << 32) | (NUM_EXPERTS - 1 - experts)[None, :].to(tl.int64)
        lowest = -0x7FFFFFFFFFFFFFFF - 1
        keys = tl.where((experts < NUM_EXPERTS)[None, :], keys, lowest)
        best = tl.full([BLOCK_T, BLOCK_A], lowest, tl.int64)
        for slot in tl.static_range(PER_TOKEN):
            top = tl.max(keys, 1)
            best = tl.where((slots == slot)[None, :], top[:, None], best)
            keys = tl.where(keys == top[:, None], lowest, keys)
        tl.store(indices_ptr + pairs, NUM_EXPERTS - 1 - (best & 0xFFFFFFFF), mask=is_slot)
        ordered = (best >> 32).to(tl.int32)
        values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        values = tl.where((slots < PER_TOKEN)[None, :], values, float("-inf"))
    exponents = tl.exp(values - tl.max(values, 1)[:, None])
    total = tl.zeros([BLOCK_T], tl.float32)
    for slot in tl.static_range(PER_TOKEN):  # in slot order: tl.sum's order over slots differs between kernels and sizes
        total += tl.sum(tl.where((slots == slot)[None, :], exponents, 0.0), 1)
    tl.store(weights_ptr + pairs, exponents / total[:, None], mask=is_slot)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_grad_kernel(grad_ptr, weights_ptr, indices_ptr, grad_logits_ptr, num_tokens, NUM_EXPERTS: tl.constexpr,
                       PER_TOKEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    is_token = tokens < num_tokens
    mean = tl.zeros([BLOCK_T], tl.float32)
    for slot in tl.static_range(PER_TOKEN):
        grad = tl.load(grad_ptr + tokens * PER_TOKEN + slot, mask=is_token, other=0.0)
        mean += grad * tl.load(weights_ptr + tokens * PER_TOKEN + slot, mask=is_token, other=0.0)
    grad_logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for slot in tl.static_range(PER_TOKEN):
        grad = tl.load(grad_ptr + tokens * PER_TOKEN + slot, mask=is_token, other=0.0)
        weight = tl.load(weights_ptr + tokens * PER_TOKEN + slot, mask=is_token, other=0.0)
        chosen = tl.load(indices_ptr + tokens * PER_TOKEN + slot, mask=is_token, other=0).to(tl.int32)
        grad_logits = tl.where(chosen[:, None] == experts[None, :], (weight * (grad - mean))[:, None], grad_logits)
    tl.store(grad_logits_ptr + tokens[:, None] * NUM_EXPERTS + experts[None, :], grad_logits,
             mask=is_token[:, None] & (experts < NUM_EXPERTS)[None, :])


def _route_blocks(num_experts: int) -> dict[str, int]:
    block_e = next_power_of_2(num_experts)
    return {"BLOCK_T": max(512 // block_e, 1), "BLOCK_E": block_e}


def route_forward(logits: torch.Tensor, indices: torch.Tensor | None,
                  experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weights [T, A] fp32 and indices [T, A] for logits [T, E] fp32; None: chosen here. Triton only, no gradient."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_tokens, num_experts = logits.shape
    is_replay = indices is not None
    if not is_replay:
        indices = torch.empty((num_tokens, experts_per_token), dtype=torch.int64, device=logits.device)
    indices = indices.contiguous()
    weights = torch.empty((num_tokens, experts_per_token), dtype=torch.float32, device=logits.device)
    blocks = _route_blocks(num_experts)
    if num_tokens:
        launch(route_kernel, (cdiv(num_tokens, blocks["BLOCK_T"]),), logits, indices, weights, num_tokens,
               logits.stride(0), NUM_EXPERTS=num_experts, PER_TOKEN=experts_per_token,
               BLOCK_A=next_power_of_2(experts_per_token), REPLAY=is_replay, num_warps=4, **blocks,
               **overlap_constants(logits, num_tokens))
    return weights, indices


def route_backward(grad: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Gradient of the logits [T, E] fp32 from that of the gate weights [T, A]. Triton only."""
    num_tokens, per_token = weights.shape
    grad_logits = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=grad.device)
    blocks = _route_blocks(num_experts)
    if num_tokens:
        launch(_route_grad_kernel, (cdiv(num_tokens, blocks["BLOCK_T"]),), grad.contiguous(), weights, indices,
               grad_logits, num_tokens, NUM_EXPERTS=num_experts, PER_TOKEN=per_token, num_warps=4, **blocks)
    return grad_logits


def route(logits: torch.Tensor, *, experts_per_token: int,
          indices: torch.Tensor | None = None) -> tuple[torch.Tensor, Routing]:
    """Picks experts for logits [T, E] fp32. Returns the gate weights [T, A] fp32 and the routing.

    `indices` [T, A] int64 (each in 0..E-1) replays an earlier choice: only the weights are computed then."""
    if indices is not None:
        assert indices.shape == (logits.shape[0], experts_per_token), f"{indices.shape}, {logits.shape}, {experts_per_token}"
    weights, indices = _weigh(logits, indices, experts_per_token)
    return weights, make_routing(indices, num_experts=logits.shape[1])


@torch.no_grad()
def choose_experts(logits: torch.Tensor, *, experts_per_token: int) -> torch.Tensor:
    """The experts [T, A] int64 that `route` picks for logits [T, E] fp32, by descending logit."""
    return _weigh(logits, None, experts_per_token)[1]


def _weigh(logits: torch.Tensor, indices: torch.Tensor | None, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weights [T, A] and the experts they belong to."""
    num_experts = logits.shape[1]
    if not is_triton(logits):
        return route_reference(logits, experts_per_token, indices)
    check_served("route", {"logits": logits}, dtypes=(torch.float32,), tensor_cores=False)
    if num_experts > MAX_EXPERTS or experts_per_token > MAX_EXPERTS_PER_TOKEN:
        raise ValueError(f"route: {experts_per_token} of {num_experts} experts; the Triton kernel takes up to "
                         f"{MAX_EXPERTS_PER_TOKEN} of {MAX_EXPERTS}")
    return route_forward(logits, indices, experts_per_token)


def make_routing_reference(indices: torch.Tensor, num_experts: int) -> Routing:
    flat = indices.reshape(-1)  # [R]
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(flat, minlength=num_experts)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    tokens = order // indices.shape[1]
    return Routing(indices, order.int(), tokens.int(), inverse.view_as(indices).int(), offsets.int())


@triton.jit
def _histogram(experts_ptr, first, chunk_size, num_rows, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr):
    """How often rows first:first + chunk_size chose each expert, [BLOCK_E] int32."""
    experts = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, chunk_size, BLOCK_R):
        rows = first + start + tl.arange(0, BLOCK_R)
        chosen = tl.load(experts_ptr + rows, mask=rows < num_rows, other=BLOCK_E).to(tl.int32)
        counts += tl.sum((chosen[:, None] == experts[None, :]).to(tl.int32), 0)
    return counts


@triton.jit(do_not_specialize=["num_rows"])
def _count_kernel(experts_ptr, counts_ptr, num_rows, chunk_size, NUM_EXPERTS: tl.constexpr, BLOCK_R: tl.constexpr,
                  BLOCK_E: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    chunk = tl.program_id(0)
    counts = _histogram(experts_ptr, chunk.to(tl.int64) * chunk_size, chunk_size, num_rows, BLOCK_R, BLOCK_E)
    experts = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + chunk * NUM_EXPERTS + experts, counts, mask=experts < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_rows", "num_chunks"])
def sort_kernel(experts_ptr, counts_ptr, order_ptr, tokens_ptr, inverse_ptr, offsets_ptr, num_rows, chunk_size,
                 num_chunks, NUM_EXPERTS: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK_R: tl.constexpr,
                 BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, IS_SINGLE: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    chunk = tl.program_id(0)
    first = chunk.to(tl.int64) * chunk_size
    experts = tl.arange(0, BLOCK_E)
    before = tl.zeros([BLOCK_E], tl.int32)
    if IS_SINGLE:
        counts = _histogram(experts_ptr, first, chunk_size, num_rows, BLOCK_R, BLOCK_E)
    else:
        counts = tl.zeros([BLOCK_E], tl.int32)
        for start in range(0, num_chunks, BLOCK_C):
            chunks = start + tl.arange(0, BLOCK_C)
            tile = tl.load(counts_ptr + chunks[:, None] * NUM_EXPERTS + experts[None, :],
                           mask=(chunks < num_chunks)[:, None] & (experts < NUM_EXPERTS)[None, :], other=0)
            counts += tl.sum(tile, 0)
            before += tl.sum(tl.where((chunks < chunk)[:, None], tile, 0), 0)
    ends = tl.cumsum(counts, 0)
    if chunk == 0:
        tl.store(offsets_ptr + 1 + experts, ends, mask=experts < NUM_EXPERTS)
        tl.store(offsets_ptr + experts, tl.zeros([BLOCK_E], tl.int32), mask=experts == 0)
    next_row = ends - counts + before  # where the chunk's next choice of each expert goes
    for start in range(0, chunk_size, BLOCK_R):
        rows = first + start + tl.arange(0, BLOCK_R)
        mask = rows < num_rows
        chosen = tl.load(experts_ptr + rows, mask=mask, other=BLOCK_E).to(tl.int32)
        is_chosen = (chosen[:, None] == experts[None, :]).to(tl.int32)  # [BLOCK_R, BLOCK_E]
        rank = tl.cumsum(is_chosen, 0) - 1
        position = tl.sum(is_chosen * (rank + next_row[None, :]), 1)
        tl.store(inverse_ptr + rows, position, mask=mask)
        tl.store(order_ptr + position, rows.to(tl.int32), mask=mask)
        tl.store(tokens_ptr + position, (rows // PER_TOKEN).to(tl.int32), mask=mask)
        next_row += tl.sum(is_chosen, 0)


def make_routing(indices: torch.Tensor, *, num_experts: int) -> Routing:
    """Sorts the choices indices [T, A] by expert, tokens in ascending order within an expert."""
    if not is_triton(indices):
        return make_routing_reference(indices, num_experts)
    assert num_experts <= MAX_EXPERTS, f"{num_experts} experts, the sort takes up to {MAX_EXPERTS}"
    experts, num_rows = indices.contiguous(), indices.numel()
    assert num_rows < 2**31, f"{num_rows} routed rows do not fit 32-bit positions"
    order = torch.empty(num_rows, dtype=torch.int32, device=indices.device)
    tokens = torch.empty_like(order)
    inverse = torch.empty(indices.shape, dtype=torch.int32, device=indices.device)
    if num_rows == 0:
        offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=indices.device)
        return Routing(indices, order, tokens, inverse, offsets)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=indices.device)
    block_e = next_power_of_2(num_experts)
    block_r = min(max(SORT_TILE // block_e, 4), 128)
    is_single = num_rows <= SMALL_SORT
    chunk_size = block_r * cdiv(num_rows, block_r * (1 if is_single else MAX_CHUNKS))
    num_chunks = cdiv(num_rows, chunk_size)
    sizes = {"NUM_EXPERTS": num_experts, "BLOCK_R": block_r, "BLOCK_E": block_e, "num_warps": 4}
    sizes |= overlap_constants(indices, len(indices))
    counts = None
    if not is_single:
        counts = torch.empty((num_chunks, num_experts), dtype=torch.int32, device=indices.device)
        launch(_count_kernel, (num_chunks,), experts, counts, num_rows, chunk_size, **sizes)
    launch(sort_kernel, (num_chunks,), experts, counts, order, tokens, inverse, offsets, num_rows, chunk_size, num_chunks,
           PER_TOKEN=indices.shape[1], BLOCK_C=max(SORT_TILE // block_e, 4), IS_SINGLE=is_single, **sizes)
    return Routing(indices, order, tokens, inverse, offsets)
