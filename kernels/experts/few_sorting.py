"""From hidden states to sorted choices of experts in one launch, for few tokens: the router's logits, their top-k with gate
weights, and the sort by expert. Above MAX_TOKENS the logits are a launch of their own.

One program runs the kernels of kernels/router.py and sorting.py one after the other, with the same bits.

Shapes: T tokens, E experts, A experts per token, D model width.
"""
import torch
import triton
import triton.language as tl

from kernels.device import (
    aligned_rows,
    cdiv,
    gpu_family,
    launch,
    measured,
    next_power_of_2,
    overlap_constants,
    unmeasured,
)
from kernels.experts.sorting import SMALL_SORT, Routing, route_kernel, sort_kernel
from kernels.router import router_forward, router_logits_kernel

MAX_TOKENS, MAX_EXPERTS = 64, 128  # of a router's product in one program
_TILE = 4096  # tokens times experts of the top-k, in one tile
_SORT_TILE = 8192  # choices times experts, as long as registers hold them
# family -> the most inputs of a step of the router's product: as shared memory holds them or, if measured, as steps are fastest
_MAX_INNER = {"ampere": unmeasured(512), "consumer": unmeasured(256), "hopper": measured(256), "blackwell": unmeasured(512)}


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _route_few_kernel(x, weight, bias, logits, indices, gate_weights, order, tokens, inverse, offsets, num_tokens, num_rows,
                      chunk_size, stride_x, stride_weight, NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
                      PER_TOKEN: tl.constexpr, ROUTER_T: tl.constexpr, ROUTER_E: tl.constexpr,
                      ROUTER_K: tl.constexpr, LINES: tl.constexpr,
                      BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_R: tl.constexpr,
                      PRECISION: tl.constexpr, HAS_LOGITS: tl.constexpr, OVERLAPS: tl.constexpr):
    if not HAS_LOGITS:
        router_logits_kernel(x, weight, bias, logits, num_tokens, stride_x, stride_weight, NUM_EXPERTS, WIDTH, ROUTER_T,
                              ROUTER_E, ROUTER_K, LINES, PRECISION, OVERLAPS)
        tl.debug_barrier()  # what other threads have stored is read from here on
    route_kernel(logits, indices, gate_weights, num_tokens, NUM_EXPERTS, NUM_EXPERTS, PER_TOKEN, BLOCK_T, BLOCK_E, BLOCK_A,
                  False, HAS_LOGITS and OVERLAPS)
    tl.debug_barrier()
    sort_kernel(indices, indices, order, tokens, inverse, offsets, num_rows, chunk_size, 1, NUM_EXPERTS, PER_TOKEN, BLOCK_R, 1,
                 BLOCK_E, True, False)


def few_blocks(family: str, num_tokens: int, num_experts: int, per_token: int, itemsize: int) -> dict[str, int]:
    """Block sizes of the router's product (all experts and tokens in one tile, few steps along the width) and of the sort."""
    block_e, num_rows = next_power_of_2(num_experts), num_tokens * per_token
    block_t = max(16, next_power_of_2(num_tokens))
    block_r = min(max(_SORT_TILE // block_e, 4), max(next_power_of_2(num_rows), 16))
    blocks = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_R": block_r, "num_warps": 4 if num_tokens <= MAX_TOKENS else 8}
    rows, columns = (16 if num_tokens <= 16 else 64), max(block_e, 16)
    if itemsize == 4 or family == "interpreter":
        return blocks | {"ROUTER_T": rows, "ROUTER_E": columns, "ROUTER_K": 32, "num_stages": 2}
    inner = min(512 if rows + columns <= 48 else 128, _MAX_INNER[family].blocks)
    return blocks | {"ROUTER_T": rows, "ROUTER_E": columns, "ROUTER_K": inner, "num_stages": 3}


def can_route_few(num_tokens: int, num_experts: int, experts_per_token: int) -> bool:
    """Whether one program can route `num_tokens` tokens."""
    return (num_experts <= MAX_EXPERTS and next_power_of_2(num_tokens) * next_power_of_2(num_experts) <= _TILE
            and num_tokens * experts_per_token <= SMALL_SORT)


def route_few(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *,
              experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor, Routing]:
    """The router's logits [T, E] fp32 for x [T, D], weight [E, D] and bias [E]; gate weights [T, A] fp32; and the routing. Triton
    only, no gradient; can_route_few must be true."""
    (num_tokens, width), num_experts, device = x.shape, weight.shape[0], x.device
    assert can_route_few(num_tokens, num_experts, experts_per_token) and num_tokens > 0, (num_tokens, num_experts)
    assert x.dtype == weight.dtype and x.stride(1) == 1 and weight.stride(1) == 1, (x.dtype, weight.dtype, x.stride())
    num_rows, has_logits = num_tokens * experts_per_token, num_tokens > MAX_TOKENS
    if has_logits:
        logits = router_forward(x, weight, bias)
    else:
        logits = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=device)
    gate_weights = torch.empty((num_tokens, experts_per_token), dtype=torch.float32, device=device)
    indices = torch.empty((num_tokens, experts_per_token), dtype=torch.int64, device=device)
    order, tokens = aligned_rows(2, num_rows, dtype=torch.int32, device=device)
    inverse = torch.empty((num_tokens, experts_per_token), dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    blocks = few_blocks(gpu_family(x), num_tokens, num_experts, experts_per_token, x.element_size())
    launch(_route_few_kernel, (1,), x, weight, bias, logits, indices, gate_weights, order, tokens, inverse, offsets, num_tokens,
           num_rows, blocks["BLOCK_R"] * cdiv(num_rows, blocks["BLOCK_R"]), x.stride(0), weight.stride(0),
           NUM_EXPERTS=num_experts, WIDTH=width, PER_TOKEN=experts_per_token, LINES=next_power_of_2(cdiv(width, 64)),
           BLOCK_A=next_power_of_2(experts_per_token), PRECISION="ieee", HAS_LOGITS=has_logits, **blocks,
           **overlap_constants(x, num_tokens))
    return logits, gate_weights, Routing(indices, order, tokens, inverse, offsets)
