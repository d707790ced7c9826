"""Rotary position embedding on half-split pairs: (x_i, x_{i + D/2}) rotate by the angle of position and frequency i.

o1 = x1 cos - x2 sin, o2 = x2 cos + x1 sin, in fp32, rounded once. cos and sin carry YaRN's concentration
(arXiv 2309.00071; models/yarn.py makes them). The gradient is the rotation by the negative angle, same concentration.

On the CPU autograd differentiates the reference. On a GPU one launch rotates queries and keys, or their gradients, in place.

Shapes: T tokens, H query heads, K key-value heads, D head width.
"""
import torch
import triton
import triton.language as tl

from kernels.device import launch, next_power_of_2, overlap_constants, wait_for_launch_before

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] rotated by cos, sin [T, D / 2] fp32, in x's dtype."""
    x1, x2 = x.float().chunk(2, dim=-1)  # [T, heads, D / 2] each
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, D / 2]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


@triton.jit
def rotated(x_ptrs, mask, cos, sin, HALF: tl.constexpr):
    """The pairs (element at x_ptrs, element HALF further), rotated: both halves in fp32."""
    x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def rotate_heads(x_ptr, token, stride_token, cos, sin, NUM_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
                 BLOCK_HALF: tl.constexpr):
    """Rotates a token's heads, which lie side by side, in place."""
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (heads < NUM_HEADS) & (cols < HALF)
    x_ptrs = x_ptr + token * stride_token + (heads * (HALF * 2) + cols)
    y1, y2 = rotated(x_ptrs, mask, cos, sin, HALF)
    tl.store(x_ptrs, y1.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(x_ptrs + HALF, y2.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(q_ptr, k_ptr, cos_ptr, sin_ptr, stride_q, stride_k, NUM_Q: tl.constexpr, NUM_K: tl.constexpr,
                 HALF: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr,
                 BACKWARD: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)
    if BACKWARD:
        sin = -sin
    rotate_heads(q_ptr, token, stride_q, cos, sin, NUM_Q, HALF, BLOCK_Q, BLOCK_HALF)
    rotate_heads(k_ptr, token, stride_k, cos, sin, NUM_K, HALF, BLOCK_K, BLOCK_HALF)


def rotate_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backward: bool) -> None:
    """Rotates queries q [T, H, D] and keys k [T, K, D] in place by cos, sin [T, D / 2] fp32; with `backward`, their gradients the
    other way. A token's heads are contiguous; q and k may be slices of one product. Triton only, no gradient."""
    (num_tokens, num_q, width), num_k = q.shape, k.shape[1]
    assert q.stride()[1:] == k.stride()[1:] == (width, 1), (q.stride(), k.stride())
    block_q, block_half = next_power_of_2(num_q), next_power_of_2(width // 2)
    size = block_q * block_half
    if num_tokens:
        launch(_rope_kernel, (num_tokens,), q, k, cos, sin, q.stride(0), k.stride(0), NUM_Q=num_q, NUM_K=num_k, HALF=width // 2,
               BLOCK_Q=block_q, BLOCK_K=next_power_of_2(num_k), BLOCK_HALF=block_half, BACKWARD=backward,
               num_warps=1 if size <= 512 else 4 if size <= 4096 else 8, **overlap_constants(q, num_tokens))
