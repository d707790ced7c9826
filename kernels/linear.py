"""Dense projection, and one with an unmerged low-rank update: y = x W^T + b + scale * (x A^T) B^T (LoRA,
arXiv 2106.09685).

A and B may be kept in fp32 (master weights); they are cast to x's dtype at use.

On a GPU the wide product is the vendor's GEMM and the narrow ones are the grouped kernels with a single expert: the update,
with the bias, is written first and the GEMM accumulates onto it in fp32. Beside the one rounding of y, only the update itself is
rounded to x's dtype, relative to its own size; adding it to a finished y would round y twice. The gradient of x is made alike.

Shapes: T tokens, K in, N out, r LoRA's rank.
"""
import torch

from kernels.dense import linear
from kernels.grouped_gemm import grouped_gemm
from kernels.grouped_outer import grouped_outer
from kernels.launch import check_served, is_triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _lora_linear_reference(x, weight, bias, lora_A, lora_B, scale):
    low_rank = linear(linear(x, lora_A.to(x.dtype), None), lora_B.to(x.dtype), None)
    return linear(x, weight, bias) + scale * low_rank


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scale):
        low_rank = grouped_gemm(x, lora_A.T[None], None, scale=scale)  # [T, r]
        y = grouped_gemm(low_rank, lora_B.T[None], None, bias=None if bias is None else bias[None])
        ctx.save_for_backward(x, weight, lora_A, lora_B, low_rank)
        ctx.scale, ctx.has_bias = scale, bias is not None
        return y.addmm_(x, weight.T)

    @staticmethod
    def backward(ctx, grad):
        x, weight, lora_A, lora_B, low_rank = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = grad_A = grad_B = grad_low_rank = None
        if needs_x or needs_A:
            grad_low_rank = grouped_gemm(grad, lora_B[None], None, scale=ctx.scale)  # [T, r]
        if needs_x:
            grad_x = grouped_gemm(grad_low_rank, lora_A[None], None).addmm_(grad, weight)
        if needs_A:
            grad_A = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
            grouped_outer(x, grad_low_rank, None, grad_A.T[None])
        if needs_B:
            grad_B = torch.empty_like(lora_B, memory_format=torch.contiguous_format)
            grouped_outer(grad, low_rank, None, grad_B[None])
        grad_weight = grad.T @ x if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias and ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None


def lora_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_A: torch.Tensor,
                lora_B: torch.Tensor, *, scale: float) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] or none, lora_A [r, K], lora_B [N, r] -> [T, N] in x's dtype."""
    if not is_triton(x):
        return _lora_linear_reference(x, weight, bias, lora_A, lora_B, scale)
    check_served("lora_linear", {"x": x, "weight": weight}, dtypes=DTYPES, tensor_cores=True)
    return _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scale)
