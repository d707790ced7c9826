"""Logits of the router, a product with few columns: logits = x W^T + b in fp32, from exact products in any dtype.

The loop over inputs ascends and is never split, and every tile uses the same instructions: a token gets the same bits in any
batch. Few tokens use narrow tiles of experts, so that more programs share the wait for memory. The gradient dx = dlogits W
keeps the fp32 bits of dlogits; cuBLAS computes that of W and b (full fine-tuning only). On the library's path (kernels/device.py:
product_path) the reference runs, in fp32.

Shapes: T tokens, E experts, D model width.
"""
import torch
import triton
import triton.language as tl

from kernels.dense import linear
from kernels.device import (
    cdiv,
    check_served,
    gpu_family,
    launch,
    measured,
    next_power_of_2,
    overlap_constants,
    prefetch,
    product_path,
    unmeasured,
    wait_for_launch_before,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_TOKENS = 512


def router_logits_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return linear(x.float(), weight.float(), bias.float())


@triton.jit(do_not_specialize=["num_tokens"])
def router_logits_kernel(x_ptr, weight_ptr, bias_ptr, logits_ptr, num_tokens, stride_x, stride_weight,
                          NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
                          BLOCK_K: tl.constexpr, LINES: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    cols = tl.arange(0, BLOCK_K)
    if OVERLAPS:  # prefetches the tile's weights, in lines of 64 elements, before the wait for x
        lines = tl.arange(0, LINES) * 64
        rows = tl.minimum(experts, NUM_EXPERTS - 1)
        prefetch(weight_ptr + rows[:, None] * stride_weight + tl.minimum(lines, WIDTH - 1)[None, :])
    wait_for_launch_before(OVERLAPS)
    x_ptrs = x_ptr + tokens[:, None] * stride_x + cols[None, :]
    weight_ptrs = weight_ptr + experts[None, :] * stride_weight + cols[:, None]  # [BLOCK_K, BLOCK_E]
    is_token, is_expert = tokens < num_tokens, experts < NUM_EXPERTS
    # the sum begins with the bias: the compiler would move it there itself, but only if one step covers the width
    bias = tl.load(bias_ptr + experts, mask=is_expert, other=0.0).to(tl.float32)
    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32) + bias[None, :]
    for first in range(0, WIDTH, BLOCK_K):
        is_col = cols < WIDTH - first
        x = tl.load(x_ptrs + first, mask=is_token[:, None] & is_col[None, :], other=0.0)
        weight = tl.load(weight_ptrs + first, mask=is_expert[None, :] & is_col[:, None], other=0.0)
        logits = tl.dot(x, weight, logits, input_precision=PRECISION)
    tl.store(logits_ptr + tokens[:, None] * NUM_EXPERTS + experts[None, :], logits,
             mask=is_token[:, None] & is_expert[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _router_grad_kernel(grad_ptr, weight_ptr, grad_x_ptr, num_tokens, stride_weight, NUM_EXPERTS: tl.constexpr,
                        WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
                        PRECISION: tl.constexpr):
    """dx += dlogits W; PRECISION keeps the fp32 bits of dlogits."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token, is_col = tokens < num_tokens, cols < WIDTH
    grad_x = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for first in range(0, NUM_EXPERTS, BLOCK_E):
        experts = first + tl.arange(0, BLOCK_E)
        is_expert = experts < NUM_EXPERTS
        grad = tl.load(grad_ptr + tokens[:, None] * NUM_EXPERTS + experts[None, :],
                       mask=is_token[:, None] & is_expert[None, :], other=0.0)
        weight = tl.load(weight_ptr + experts[:, None] * stride_weight + cols[None, :],
                         mask=is_expert[:, None] & is_col[None, :], other=0.0).to(tl.float32)
        grad_x = tl.dot(grad, weight, grad_x, input_precision=PRECISION)
    pointers, mask = grad_x_ptr + tokens[:, None] * WIDTH + cols[None, :], is_token[:, None] & is_col[None, :]
    grad_x += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


# family -> tokens of a tile and steps in flight, for many tokens and for few; 64 are what wgmma and tcgen05 need
_MANY = {
    "ampere": unmeasured((64, 4)),
    "consumer": unmeasured((64, 3)),
    "hopper": measured((64, 4)),
    "blackwell": unmeasured((64, 4)),
}
_FEW = {
    "ampere": unmeasured((16, 8)),
    "consumer": unmeasured((16, 6)),
    "hopper": measured((64, 7)),
    "blackwell": unmeasured((64, 7)),
}


def router_blocks(family: str, num_experts: int, itemsize: int, num_tokens: int) -> dict[str, int]:
    """Blocks of the forward: a tile of weights and of tokens per stage, the K loop ascending and never split."""
    if family == "interpreter":
        return {"BLOCK_T": 16, "BLOCK_E": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    is_few = num_tokens <= FEW_TOKENS and itemsize == 2
    block_t, stages = (_FEW if is_few else _MANY)[family].blocks
    block_e, block_k = (16, 128) if is_few else (min(max(next_power_of_2(num_experts), 16), 128), 128 // itemsize)
    return {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_K": block_k, "num_warps": 4, "num_stages": stages}


def router_grad_blocks(family: str, num_experts: int) -> dict[str, int]:
    if family == "interpreter":
        return {"BLOCK_T": 16, "BLOCK_E": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    block_e = min(max(next_power_of_2(num_experts), 16), 32)
    return {"BLOCK_T": 64, "BLOCK_E": block_e, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}


def router_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Logits [T, E] fp32; x and weight with contiguous rows. Triton only, no gradient."""
    (num_tokens, width), num_experts = x.shape, weight.shape[0]
    logits = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=x.device)
    if num_tokens:
        blocks = router_blocks(gpu_family(x), num_experts, x.element_size(), num_tokens)
        grid = (cdiv(num_tokens, blocks["BLOCK_T"]), cdiv(num_experts, blocks["BLOCK_E"]))
        launch(router_logits_kernel, grid, x, weight, bias, logits, num_tokens, x.stride(0), weight.stride(0),
               NUM_EXPERTS=num_experts, WIDTH=width, LINES=next_power_of_2(cdiv(width, 64)), PRECISION="ieee", **blocks,
               **overlap_constants(x, num_tokens))
    return logits


def router_backward(grad: torch.Tensor, weight: torch.Tensor, grad_x: torch.Tensor) -> None:
    """Adds dx to grad_x [T, D], rounded once; grad [T, E] fp32: of the logits. By the kernel or, in fp32, the library."""
    if product_path(grad_x) == "library":
        grad_x.copy_((grad @ weight.float()).add_(grad_x))
        return
    num_tokens, num_experts, width = grad.shape[0], *weight.shape
    # bf16 weights are exact in TF32, so three TF32 products give what an fp32 one would
    precision = "ieee" if grad_x.dtype == torch.float32 else "tf32x3"
    if num_tokens:
        blocks = router_grad_blocks(gpu_family(grad_x), num_experts)
        grid = (cdiv(num_tokens, blocks["BLOCK_T"]), cdiv(width, blocks["BLOCK_N"]))
        launch(_router_grad_kernel, grid, grad, weight, grad_x, num_tokens, weight.stride(0), NUM_EXPERTS=num_experts,
               WIDTH=width, PRECISION=precision, **blocks)


def router_logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x [T, D] W^T + b with weight [E, D] and bias [E]: logits [T, E] in fp32, from exact products whatever the dtype."""
    path = product_path(x)
    if path == "reference":
        return router_logits_reference(x, weight, bias)
    check_served("router_logits", {"x": x, "weight": weight}, dtypes=DTYPES, tensor_cores=path == "triton")
    if path == "library":  # so few columns that fp32 costs nothing; autograd rounds dx once, from fp32
        return router_logits_reference(x, weight, bias)
    assert x.dtype == weight.dtype, f"x {x.dtype} and weight {weight.dtype} differ"
    assert x.shape[1] == weight.shape[1] and bias.shape == weight.shape[:1], f"{x.shape}, {weight.shape}, {bias.shape}"
    x, weight = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (x, weight))
    return router_forward(x, weight, bias.contiguous())
