"""Linear layers of many experts on rows sorted by expert: y_r = x_r W_e + b_e for the expert e that owns row r.

Two weight formats share the function's shape: dense [E, in, out] (transformers' layout), with gradients of everything, and
packed MXFP4, frozen, dequantised one expert at a time in the forward and again in the backward, so that no
dequantised copy outlives its use.

Shapes: R routed rows, E experts, K in, N out.
"""
import torch

from kernels.linear import linear
from kernels.mxfp4 import dequantize


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, offsets):
        ctx.save_for_backward(x, weight)
        ctx.offsets, ctx.has_bias = offsets, bias is not None
        y = x.new_empty(x.shape[0], weight.shape[2])
        for expert, (start, end) in enumerate(zip(offsets, offsets[1:])):
            if start < end:
                y[start:end] = linear(x[start:end], weight[expert].T, None if bias is None else bias[expert])
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
        grad_bias = grad.new_zeros(weight.shape[0], weight.shape[2]) if needs_bias and ctx.has_bias else None
        for expert, (start, end) in enumerate(zip(ctx.offsets, ctx.offsets[1:])):
            if start == end:
                continue
            grad_rows = grad[start:end]
            if needs_x:
                torch.mm(grad_rows, weight[expert].T, out=grad_x[start:end])
            if needs_weight:
                torch.mm(x[start:end].T, grad_rows, out=grad_weight[expert])
            if grad_bias is not None:
                grad_bias[expert] = grad_rows.sum(0)
        return grad_x, grad_weight, grad_bias, None


class _GroupedLinearMxfp4(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, blocks, scales, bias, offsets):
        ctx.save_for_backward(blocks, scales)
        ctx.offsets = offsets
        y = x.new_empty(x.shape[0], blocks.shape[1])
        for expert, (start, end) in enumerate(zip(offsets, offsets[1:])):
            if start < end:
                weight = dequantize(blocks[expert], scales[expert], x.dtype)  # [N, K]
                y[start:end] = linear(x[start:end], weight, bias[expert])
        return y

    @staticmethod
    def backward(ctx, grad):
        blocks, scales = ctx.saved_tensors
        needs_x, _, _, needs_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = grad.new_empty(grad.shape[0], blocks.shape[2] * 32) if needs_x else None
        grad_bias = grad.new_zeros(blocks.shape[0], blocks.shape[1]) if needs_bias else None
        for expert, (start, end) in enumerate(zip(ctx.offsets, ctx.offsets[1:])):
            if start < end and needs_x:
                torch.mm(grad[start:end], dequantize(blocks[expert], scales[expert], grad.dtype), out=grad_x[start:end])
            if start < end and needs_bias:
                grad_bias[expert] = grad[start:end].sum(0)
        return grad_x, None, None, grad_bias, None


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: list[int]) -> torch.Tensor:
    """x [R, K] in expert order, weight [E, K, N], bias [E, N] or none, offsets [E + 1] on the host -> [R, N] in x's dtype."""
    return _GroupedLinear.apply(x, weight, bias, offsets)


def grouped_linear_mxfp4(x: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor,
                         offsets: list[int]) -> torch.Tensor:
    """x [R, K] in expert order, blocks [E, N, K/32, 16] and scales [E, N, K/32] uint8, bias [E, N] -> [R, N] in x's dtype."""
    return _GroupedLinearMxfp4.apply(x, blocks, scales, bias, offsets)
