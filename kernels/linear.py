"""Dense projection with an unmerged low-rank update: y = x W^T + b + scale * (x A^T) B^T (LoRA, arXiv 2106.09685).

A and B may be kept in fp32 (master weights); they are cast to x's dtype at use. On a GPU every product is the vendor's GEMM (at
these widths it beats the narrow Triton kernels, scripts/bench_grouped_gemm.py), and the update accumulates in fp32 onto the
rounded base: one more rounding of y than a fused sum, as in the gradient of x. Gradients of A and B, sums over tokens that can
pass float16's range, stay in fp32 until they are rounded to their own dtype.

Shapes: T tokens, K in, N out, r LoRA's rank.
"""
import torch

from kernels.dense import linear, product
from kernels.launch import is_triton


def _lora_linear_reference(x, weight, bias, lora_A, lora_B, scale):
    low_rank = linear(linear(x, lora_A.to(x.dtype), None), lora_B.to(x.dtype), None)
    return linear(x, weight, bias) + scale * low_rank


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scale):
        down, up = lora_A.to(x.dtype), lora_B.to(x.dtype)
        low_rank = x @ down.T  # [T, r]
        ctx.save_for_backward(x, weight, lora_A, lora_B, low_rank)
        ctx.scale, ctx.has_bias = scale, bias is not None
        return linear(x, weight, bias).addmm_(low_rank, up.T, alpha=scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, lora_A, lora_B, low_rank = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = grad_A = grad_B = None
        if needs_x or needs_A:
            grad_low_rank = grad @ lora_B.to(grad.dtype)  # [T, r]
        if needs_x:
            grad_x = (grad @ weight).addmm_(grad_low_rank, lora_A.to(grad.dtype), alpha=ctx.scale)
        if needs_A:
            grad_A = product(grad_low_rank.T, x).to(lora_A.dtype) * ctx.scale
        if needs_B:
            grad_B = product(grad.T, low_rank).to(lora_B.dtype) * ctx.scale
        grad_weight = grad.T @ x if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias and ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None


def lora_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_A: torch.Tensor,
                lora_B: torch.Tensor, *, scale: float) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] or none, lora_A [r, K], lora_B [N, r] -> [T, N] in x's dtype."""
    if not is_triton(x):
        return _lora_linear_reference(x, weight, bias, lora_A, lora_B, scale)
    return _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scale)
