"""Dense projection with an unmerged low-rank update: y = x W^T + b + scale * (x A^T) B^T (LoRA, arXiv 2106.09685).

A and B may be kept in fp32 (master weights); they are cast to x's dtype at use. On a GPU the forward is grouped_gemm, which adds
the update to the same fp32 sum: its bits are those of a block with a frozen base, and of decode steps. The backward's products
are the vendor's, which has one more rounding in the gradient of x than a fused sum. Gradients of A and B, sums over tokens that
can pass float16's range, stay in fp32 until they are rounded to their own dtype.

Shapes: T tokens, K in, N out, r LoRA's rank.
"""
import torch

from kernels.dense import linear, product
from kernels.device import is_triton
from kernels.experts.gemm import grouped_gemm


def _lora_linear_reference(x, weight, bias, lora_A, lora_B, scale):
    y = linear(x, weight, bias)
    return y if lora_A is None else y + scale * linear(linear(x, lora_A.to(x.dtype), None), lora_B.to(x.dtype), None)


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_A: torch.Tensor | None,
            lora_B: torch.Tensor | None, *, scale: float,
            lora_groups: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What lora_linear gives on a GPU, without gradient, and the low-rank rows scale * x A^T [T, r], None without an adapter.
    lora_groups: as in grouped_gemm, where A holds the first factors of several projections side by side."""
    bias = None if bias is None else bias[None]
    if lora_A is None:
        return grouped_gemm(x, weight.T[None], None, bias=bias), None
    low_rank = grouped_gemm(x, lora_A.T[None], None, scale=scale)
    return grouped_gemm(x, weight.T[None], None, bias=bias, low_rank=low_rank, lora_up=lora_B.T[None],
                        lora_groups=lora_groups), low_rank


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scale):
        y, low_rank = project(x, weight, bias, lora_A, lora_B, scale=scale)
        ctx.save_for_backward(x, weight, lora_A, lora_B, low_rank)
        ctx.scale, ctx.has_bias = scale, bias is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, lora_A, lora_B, low_rank = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = grad_low_rank = grad_A = grad_B = None
        if lora_A is not None and (needs_x or needs_A):
            grad_low_rank = grad @ lora_B.to(grad.dtype)  # [T, r]
        if needs_x:
            grad_x = grad @ weight
            if lora_A is not None:
                grad_x.addmm_(grad_low_rank, lora_A.to(grad.dtype), alpha=ctx.scale)
        if needs_A:
            grad_A = product(grad_low_rank.T, x).to(lora_A.dtype) * ctx.scale
        if needs_B:
            grad_B = product(grad.T, low_rank).to(lora_B.dtype)
        grad_weight = grad.T @ x if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias and ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None


def lora_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_A: torch.Tensor | None,
                lora_B: torch.Tensor | None, *, scale: float) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] or none, lora_A [r, K] and lora_B [N, r] or neither -> [T, N] in x's dtype."""
    if not is_triton(x):
        return _lora_linear_reference(x, weight, bias, lora_A, lora_B, scale)
    return _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scale)
