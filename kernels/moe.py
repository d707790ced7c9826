"""The routed experts as one operation on a GPU: gather, gate_up, clamped SwiGLU, down, weighted sum; LoRA on a frozen base.

y_t = sum_k w_tk (act(x_t W1_e + b1_e) W2_e + b2_e), e the k-th expert of t, each W with its unmerged LoRA. The backward is given
x, the gate weights and the routing, and the pre-activation h where memory allows; h is otherwise computed again. Nothing after
h is needed again: with g = dy_t W2_e^T (LoRA included), the gate weight's gradient is <dy, y_r> = <g, act> + <dy_t, b2_e>
(arXiv 2512.14080, SonicMoE, extended by the bias), so the down projection's output is neither kept nor recomputed. Packed
weights are dequantised into a scratch of bounded size, some experts at a time. LoRA's gradients come in fp32. No atomics.

Shapes: T tokens, A experts per token, R = T * A routed rows, D model width, F expert width, E experts, r rank.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.grouped_gemm import grouped_gemm
from kernels.grouped_outer import grouped_outer
from kernels.launch import is_triton
from kernels.mxfp4 import dequantize_experts
from kernels.routing import Routing, sum_rows
from kernels.swiglu import clamped_swiglu_grad


@dataclass
class ExpertWeights:
    """One projection: dense [E, in, out], or packed blocks [E, out, in/32, 16] and scales [E, out, in/32] uint8."""

    dense: torch.Tensor | None
    blocks: torch.Tensor | None
    scales: torch.Tensor | None
    bias: torch.Tensor  # [E, out]
    scratch_bytes: int  # of dequantised weights held at once


@triton.jit
def _activation_grad_kernel(grad_ptr, h_ptr, weights_ptr, slots_ptr, dots_ptr, alpha, limit, WIDTH: tl.constexpr,
                            BLOCK: tl.constexpr):
    """A routed row: g and h come in; w dh replaces h, the activation replaces g, <g, act> goes to the row's slot."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    weight = tl.load(weights_ptr + slot)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        mask = cols < WIDTH
        grad = tl.load(grad_ptr + row * WIDTH + cols, mask=mask, other=0.0).to(tl.float32)
        pairs = first * 2 + tl.arange(0, 2 * BLOCK)
        h = tl.load(h_ptr + row * 2 * WIDTH + pairs, mask=pairs < 2 * WIDTH, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(h, (BLOCK, 2)))
        grad_gate, grad_up, activation = clamped_swiglu_grad(grad, gate, up, alpha, limit)
        activation = activation.to(grad_ptr.dtype.element_ty)  # as the down projection saw it
        total += tl.where(mask, grad * activation.to(tl.float32), 0.0)
        tl.store(grad_ptr + row * WIDTH + cols, activation, mask=mask)
        grad_h = tl.reshape(tl.join(grad_gate, grad_up), (2 * BLOCK,)) * weight
        tl.store(h_ptr + row * 2 * WIDTH + pairs, grad_h.to(h_ptr.dtype.element_ty), mask=pairs < 2 * WIDTH)
    tl.store(dots_ptr + slot, tl.sum(total, 0))


def activation_grad(grad: torch.Tensor, h: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, *, alpha: float,
                    limit: float) -> torch.Tensor:
    """grad [R, F], the gradient of the unweighted activation, becomes the activation; h [R, 2F] becomes its gradient times the
    gate weight; returns <grad, activation> as [T, A] fp32."""
    dots = torch.empty_like(weights)
    width = grad.shape[1]
    if grad.shape[0]:
        _activation_grad_kernel[(grad.shape[0],)](grad, h, weights, order, dots, alpha, limit, WIDTH=width,
                                                  BLOCK=min(triton.next_power_of_2(width), 1024), num_warps=4)
    return dots


def _project(weights: ExpertWeights, x: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor, *, is_transposed: bool,
             gather: torch.Tensor | None = None, low_rank: torch.Tensor | None = None, lora_up: torch.Tensor | None = None,
             swiglu: tuple[float, float] | None = None, pre_activation: torch.Tensor | None = None) -> torch.Tensor:
    """grouped_gemm through W or, transposed, W^T, packed weights dequantised some experts at a time. lora_up [E, r, out]."""
    bias = None if is_transposed else weights.bias
    if weights.dense is not None:
        dense = weights.dense.transpose(1, 2) if is_transposed else weights.dense
        return grouped_gemm(x, dense, offsets, gather=gather, bias=bias, low_rank=low_rank, lora_up=lora_up, swiglu=swiglu,
                            pre_activation=pre_activation, out=out)
    num_experts, size_out, num_blocks = weights.scales.shape
    chunk = max(1, min(num_experts, weights.scratch_bytes // (size_out * num_blocks * 32 * x.element_size())))
    scratch = x.new_empty(chunk, size_out, num_blocks * 32)
    for first in range(0, num_experts, chunk):
        part = slice(first, min(first + chunk, num_experts))
        dense = dequantize_experts(weights.blocks[part], weights.scales[part], scratch[:part.stop - first])  # [e, out, in]
        grouped_gemm(x, dense if is_transposed else dense.transpose(1, 2), offsets[first:part.stop + 1],
                     gather=gather, bias=None if bias is None else bias[part], low_rank=low_rank,
                     lora_up=None if lora_up is None else lora_up[part], swiglu=swiglu, pre_activation=pre_activation, out=out)
    return out


class _Moe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, residual, routing, gate_up, down, A1, B1, A2, B2, scale, alpha, limit, keeps_h,
                is_recomputing):
        weights = weights.contiguous()
        num_rows, has_lora = routing.tokens.shape[0], A1 is not None
        width = down.bias.shape[1]
        h = None
        y = torch.empty_like(residual)
        if not is_recomputing:  # a repeated forward is asked for what the backward needs, and y is not
            act, h, _ = _pre_activation(x, routing, gate_up, A1, B1, scale, swiglu=(alpha, limit), keeps_h=keeps_h)
            low_rank = grouped_gemm(act, A2.transpose(1, 2), routing.offsets_device, scale=scale) if has_lora else None
            rows = _project(down, act, routing.offsets_device, x.new_empty(num_rows, width), is_transposed=False,
                            low_rank=low_rank, lora_up=B2.transpose(1, 2) if has_lora else None)
            y = sum_rows(rows, weights, routing.inverse, residual)
        ctx.save_for_backward(x, weights, h, A1, B1, A2, B2)
        ctx.routing, ctx.gate_up, ctx.down, ctx.scale, ctx.alpha, ctx.limit = routing, gate_up, down, scale, alpha, limit
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weights, h, A1, B1, A2, B2 = ctx.saved_tensors
        routing, gate_up, down, scale = ctx.routing, ctx.gate_up, ctx.down, ctx.scale
        offsets, tokens, has_lora = routing.offsets_device, routing.tokens, A1 is not None
        grad = grad.contiguous()
        num_rows, inner = tokens.shape[0], gate_up.bias.shape[1] // 2
        low_rank_x = None
        if h is None:
            _, h, low_rank_x = _pre_activation(x, routing, gate_up, A1, B1, scale, swiglu=None, keeps_h=True)
        elif has_lora:
            low_rank_x = grouped_gemm(x, A1.transpose(1, 2), offsets, gather=tokens, scale=scale)
        row_weights = weights.flatten()[routing.order.long()]  # [R] fp32
        # through the down projection, before the gate weight
        grad_low_rank = grouped_gemm(grad, B2, offsets, gather=tokens, scale=scale) if has_lora else None  # [R, r]
        act = _project(down, grad, offsets, x.new_empty(num_rows, inner), is_transposed=True, gather=tokens,
                       low_rank=grad_low_rank, lora_up=A2)
        grad_weights = activation_grad(act, h, weights, routing.order, alpha=ctx.alpha, limit=ctx.limit)
        grad_weights += (grad.float() @ down.bias.float().T).gather(1, routing.indices)
        grads = [None] * 4  # of A1, B1, A2, B2
        if has_lora:
            low_rank = grouped_gemm(act, A2.transpose(1, 2), offsets, scale=scale)  # [R, r]
            grads[2], grads[3] = torch.empty_like(A2), torch.empty_like(B2)
            grouped_outer(grad, low_rank, offsets, grads[3], gather=tokens, row_scale=row_weights)
            grouped_outer(act, grad_low_rank, offsets, grads[2].transpose(1, 2), row_scale=row_weights)
        del act
        grad_h, grad_low_rank = h, None
        if has_lora:
            grad_low_rank = grouped_gemm(grad_h, B1, offsets, scale=scale)  # [R, r]
            grads[0], grads[1] = torch.empty_like(A1), torch.empty_like(B1)
            grouped_outer(grad_h, low_rank_x, offsets, grads[1])
            grouped_outer(x, grad_low_rank, offsets, grads[0].transpose(1, 2), gather=tokens)
        if not ctx.needs_input_grad[0]:
            return (None, grad_weights, grad, None, None, None, *grads, None, None, None, None, None)
        grad_rows = _project(gate_up, grad_h, offsets, x.new_empty(num_rows, x.shape[1]), is_transposed=True,
                             low_rank=grad_low_rank, lora_up=A1)
        grad_x = sum_rows(grad_rows, None, routing.inverse, None)
        return (grad_x, grad_weights, grad, None, None, None, *grads, None, None, None, None, None)


def _pre_activation(x, routing, gate_up, A1, B1, scale, *, swiglu, keeps_h):
    """Activation, h and x A1^T scale: the first projection, with the activation where `swiglu` is given and h where kept."""
    offsets, tokens, num_rows, width = routing.offsets_device, routing.tokens, routing.tokens.shape[0], gate_up.bias.shape[1]
    low_rank = lora_up = None
    if A1 is not None:
        low_rank = grouped_gemm(x, A1.transpose(1, 2), offsets, gather=tokens, scale=scale)  # [R, r]
        lora_up = B1.transpose(1, 2)
    h = x.new_empty(num_rows, width) if keeps_h else None
    if swiglu is None:
        _project(gate_up, x, offsets, h, is_transposed=False, gather=tokens, low_rank=low_rank, lora_up=lora_up)
        return None, h, low_rank
    act = x.new_empty(num_rows, width // 2)
    _project(gate_up, x, offsets, act, is_transposed=False, gather=tokens, low_rank=low_rank, lora_up=lora_up, swiglu=swiglu,
             pre_activation=h)
    return act, h, low_rank


def moe(x: torch.Tensor, weights: torch.Tensor, routing: Routing, gate_up: ExpertWeights, down: ExpertWeights,
        residual: torch.Tensor, *, lora: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None,
        lora_scale: float, alpha: float, limit: float, keeps_h: bool, is_recomputing: bool) -> torch.Tensor:
    """residual [T, D] plus the experts of x [T, D] with gate weights [T, A] fp32 -> [T, D], expert weights frozen.

    lora: A [E, r, D] and B [E, 2F, r] of gate_up, A [E, r, F] and B [E, D, r] of down, fp32. keeps_h holds the pre-activation
    (R * 2F elements) for the backward. is_recomputing: the call repeats a forward whose output is known and only needs what the
    backward asks for; it returns memory that was not written. Triton only."""
    assert is_triton(x), "moe: the reference composes dispatch, grouped_linear, swiglu and combine"
    A1, B1, A2, B2 = lora or (None, None, None, None)
    return _Moe.apply(x, weights, residual, routing, gate_up, down, A1, B1, A2, B2, lora_scale, alpha, limit, keeps_h,
                      is_recomputing)
