"""Rotary position embedding on half-split pairs: (x_i, x_{i + D/2}) rotate by the angle of position and frequency i.

o1 = x1 cos - x2 sin, o2 = x2 cos + x1 sin, in fp32, rounded once. cos and sin carry YaRN's concentration
(arXiv 2309.00071; models/yarn.py makes them). The gradient is the rotation by the negative angle, same concentration.

Queries and keys share a launch. The public functions return new tensors: in place would move as many bytes, and would
destroy projections or gradients that autograd may hand to somebody else as well. rotate() may be given its input as output.

Shapes: T tokens, H heads (rope_qk: H query heads, K key-value heads), D head width.
"""
import torch
import triton
import triton.language as tl

from kernels.device import check_served, is_triton, launch, next_power_of_2, overlap_constants, wait_for_launch_before

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 16384  # elements of a token's heads, held in one program's registers


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x.float().chunk(2, dim=-1)  # [T, heads, D/2] each
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, D/2]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


@triton.jit
def _rotated(x_ptrs, mask, cos, sin, HALF: tl.constexpr):
    """Both halves of the elements at x_ptrs and HALF further, rotated, fp32."""
    x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit
def _rotate(x_ptr, y_ptr, token, stride_token, stride_head, stride_y, cos, sin, NUM_HEADS: tl.constexpr, HALF: tl.constexpr,
            BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr):
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (heads < NUM_HEADS) & (cols < HALF)
    y1, y2 = _rotated(x_ptr + token * stride_token + heads * stride_head + cols, mask, cos, sin, HALF)
    y_ptrs = y_ptr + token * stride_y + heads * (HALF * 2) + cols
    tl.store(y_ptrs, y1.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptrs + HALF, y2.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, stride_q_token, stride_q_head, stride_k_token,
                 stride_k_head, stride_q_out, stride_k_out, NUM_Q: tl.constexpr, NUM_K: tl.constexpr, HALF: tl.constexpr,
                 BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BACKWARD: tl.constexpr,
                 OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)
    if BACKWARD:
        sin = -sin
    _rotate(q_ptr, q_out_ptr, token, stride_q_token, stride_q_head, stride_q_out, cos, sin, NUM_Q, HALF, BLOCK_Q, BLOCK_HALF)
    if NUM_K > 0:
        _rotate(k_ptr, k_out_ptr, token, stride_k_token, stride_k_head, stride_k_out, cos, sin, NUM_K, HALF, BLOCK_K, BLOCK_HALF)


def _num_warps(block: int) -> int:
    return 1 if block <= 512 else 4 if block <= 4096 else 8


def rotate(q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, *, backward: bool,
           out: tuple[torch.Tensor, torch.Tensor | None] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q [T, H, D] and k [T, K, D] (or None) rotated, forwards or back, into `out` (a token's heads dense; q and k themselves are
    allowed) or new tensors. Triton only, no gradient."""
    q = q if q.stride(2) == 1 else q.contiguous()
    k = k if k is None or k.stride(2) == 1 else k.contiguous()
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device), None if k is None else torch.empty(
            k.shape, dtype=k.dtype, device=k.device)
    q_out, k_out = out
    num_tokens, num_q, width = q.shape
    num_k = k.shape[1] if k is not None else 0
    assert q_out.stride()[1:] == (width, 1) and (k is None or k_out.stride()[1:] == (width, 1)), (q_out.stride(), k_out)
    strides_k = k.stride()[:2] if k is not None else (0, 0)
    block_q, block_half = next_power_of_2(num_q), next_power_of_2(width // 2)
    if num_tokens:
        launch(_rope_kernel, (num_tokens,), q, k, q_out, k_out, cos, sin, q.stride(0), q.stride(1), *strides_k, q_out.stride(0),
               k_out.stride(0) if k is not None else 0, NUM_Q=num_q, NUM_K=num_k, HALF=width // 2, BLOCK_Q=block_q,
               BLOCK_K=next_power_of_2(max(num_k, 1)), BLOCK_HALF=block_half, BACKWARD=backward,
               num_warps=_num_warps(block_q * block_half), **overlap_constants(q, num_tokens))
    return q_out, k_out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, None, cos, sin, backward=False)[0]

    @staticmethod
    def backward(ctx, grad):
        return rotate(grad, None, *ctx.saved_tensors, backward=True)[0], None, None


class _RopeQK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(q, k, cos, sin, backward=False)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        return *rotate(grad_q, grad_k, *ctx.saved_tensors, backward=True), None, None


def _check(x: torch.Tensor, others: dict[str, torch.Tensor], cos: torch.Tensor,
           sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, contiguous, after the checks that all kernels share."""
    check_served("rope", {"x": x, **others, "cos": cos, "sin": sin}, dtypes=DTYPES, tensor_cores=False)
    num_tokens, num_heads, width = x.shape
    assert cos.shape == sin.shape == (num_tokens, width // 2), f"cos {cos.shape} and sin {sin.shape} for x {x.shape}"
    assert cos.dtype == sin.dtype == torch.float32, f"cos {cos.dtype} and sin {sin.dtype}: both must be float32"
    if num_heads * width > MAX_WIDTH:
        raise ValueError(f"rope: {num_heads} heads of {width}; the Triton kernel takes up to {MAX_WIDTH} elements a token")
    return cos.contiguous(), sin.contiguous()


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [T, H, D] by cos, sin [T, D/2] fp32. Returns x's dtype."""
    if not is_triton(x):
        return rope_reference(x, cos, sin)
    return _Rope.apply(x, *_check(x, {}, cos, sin))


def rope_qk(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries q [T, H, D] and keys k [T, K, D] by cos, sin [T, D/2] fp32. Returns both in their dtypes; either may
    be a slice of one fused projection."""
    if not is_triton(q):
        return rope_reference(q, cos, sin), rope_reference(k, cos, sin)
    assert k.shape[::2] == q.shape[::2] and k.shape[1] <= q.shape[1], f"keys {k.shape} do not fit queries {q.shape}"
    return _RopeQK.apply(q, k, *_check(q, {"k": k}, cos, sin))
