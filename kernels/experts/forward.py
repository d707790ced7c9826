"""The experts' computation on a GPU, for many rows: gate_up, clamped SwiGLU, down, LoRA (few rows: few_rows.py). transport.py
brings rows here and back. Forward and backward are plain functions, which models/experts.py calls.

y_r = act(x_t W1_e + b1_e) W2_e + b2_e for the row r of token t at expert e, each W with its unmerged LoRA. The backward gets x,
the gate weights, the routing and, if memory allows, the pre-activation h; otherwise it computes h again. The output of the down
projection is neither kept nor computed again: with g = dy_t W2_e^T (LoRA included), the gate weight's gradient is
<dy_t, y_r> = <g, act> + <dy_t, b2_e> (arXiv 2512.14080, SonicMoE, extended by the bias). Packed weights are dequantised into a
scratch of bounded size, some experts at a time. LoRA's gradients are fp32. No atomics.

Shapes: T tokens, A experts per token, R = T * A routed rows, D model width, F expert width, E experts, r rank.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.device import cdiv, is_triton, launch, next_power_of_2
from kernels.experts.gemm import grouped_gemm
from kernels.experts.outer import grouped_outer, grouped_row_sum
from kernels.experts.sorting import Routing
from kernels.packed.weights import ExpertWeights
from kernels.swiglu import clamped_swiglu_grad


@triton.jit
def _bias_dots_kernel(grad_ptr, bias_ptr, indices_ptr, dots_ptr, stride_grad, first_expert, num_experts, WIDTH: tl.constexpr,
                      PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """<dy_t, b_e> for each expert e of the token of this program; 0 for experts of other parts."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    grad = tl.load(grad_ptr + token * stride_grad + cols, mask=mask, other=0.0).to(tl.float32)
    for slot in tl.static_range(PER_TOKEN):
        expert = tl.load(indices_ptr + token * PER_TOKEN + slot) - first_expert
        is_here = (expert >= 0) & (expert < num_experts)
        bias = tl.load(bias_ptr + expert * WIDTH + cols, mask=mask & is_here, other=0.0).to(tl.float32)
        tl.store(dots_ptr + token * PER_TOKEN + slot, tl.sum(grad * bias, 0))


def _bias_dots(grad: torch.Tensor, bias: torch.Tensor, routing: Routing) -> torch.Tensor:
    """<grad_t, bias_e> for the experts e of t: [T, A] fp32. 0 for experts of other parts."""
    indices = routing.indices
    (num_tokens, per_token), width = indices.shape, grad.shape[1]
    dots = torch.empty((num_tokens, per_token), dtype=torch.float32, device=grad.device)
    if num_tokens:
        launch(_bias_dots_kernel, (num_tokens,), grad, bias, indices, dots, grad.stride(0), routing.first_expert, len(bias),
               WIDTH=width, PER_TOKEN=per_token, BLOCK=next_power_of_2(width), num_warps=8 if width > 1024 else 4)
    return dots


@triton.jit
def _routed_rows_kernel(x_ptr, weights_ptr, inverse_ptr, rows_ptr, stride_x, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
                        BLOCK: tl.constexpr, HAS_WEIGHTS: tl.constexpr):
    """Reads each token once and writes it, times the gate weights, to all its rows."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < WIDTH
    x = tl.load(x_ptr + token * stride_x + cols, mask=mask, other=0.0)
    for slot in tl.static_range(PER_TOKEN):
        row = tl.load(inverse_ptr + token * PER_TOKEN + slot).to(tl.int64)
        values = x
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + token * PER_TOKEN + slot)
            values = (x.to(tl.float32) * weight).to(rows_ptr.dtype.element_ty)
        tl.store(rows_ptr + row * WIDTH + cols, values, mask=mask)


def routed_rows(x: torch.Tensor, weights: torch.Tensor | None, routing: Routing) -> torch.Tensor:
    """x [T, D] as rows in expert order [R, D], times the gate weights [T, A] fp32 if given."""
    (num_tokens, per_token), width = routing.inverse.shape, x.shape[1]
    rows = x.new_empty(num_tokens * per_token, width)
    block = min(next_power_of_2(width), 1024)
    if num_tokens:
        launch(_routed_rows_kernel, (num_tokens, cdiv(width, block)), x, weights, routing.inverse, rows, x.stride(0), WIDTH=width,
               PER_TOKEN=per_token, BLOCK=block, HAS_WEIGHTS=weights is not None, num_warps=4)
    return rows


@triton.jit
def _activation_grad_kernel(grad_ptr, h_ptr, weights_ptr, slots_ptr, dots_ptr, offsets_ptr, num_experts, alpha, limit,
                            WIDTH: tl.constexpr, BLOCK: tl.constexpr, IS_PART: tl.constexpr):
    """For a routed row: w dh replaces h, the activation replaces g, and <g, act> is added to the row's entry in dots. Leaves out
    rows of other parts' experts."""
    row = tl.program_id(0).to(tl.int64)
    if IS_PART:
        if (row < tl.load(offsets_ptr)) | (row >= tl.load(offsets_ptr + num_experts)):
            return
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
    tl.store(dots_ptr + slot, tl.load(dots_ptr + slot) + tl.sum(total, 0))


def activation_grad(grad: torch.Tensor, h: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, *, alpha: float,
                    limit: float, dots: torch.Tensor, part: torch.Tensor | None = None) -> torch.Tensor:
    """In place: grad [R, F], the gradient of the activation without the gate weight, becomes the activation; h [R, 2F] becomes
    h's gradient times the gate weight. Adds <grad, activation> to dots [T, A] fp32, and returns dots. part [E + 1]: the offsets
    of the experts whose rows to take; None: all rows."""
    width = grad.shape[1]
    if grad.shape[0]:
        num_experts = 0 if part is None else len(part) - 1
        launch(_activation_grad_kernel, (grad.shape[0],), grad, h, weights, order, dots, part, num_experts, alpha, limit,
               WIDTH=width, BLOCK=min(next_power_of_2(width), 1024), IS_PART=part is not None, num_warps=4)
    return dots


def _all_dense(weights: ExpertWeights, x: torch.Tensor, scratch_bytes: int) -> torch.Tensor | None:
    """The dequantised weights [E, out, in] of a packed projection if the scratch can hold all of them, else None."""
    if weights.dense is not None or math.prod(weights.shape) * x.element_size() > scratch_bytes:
        return None
    return weights.dequantize(slice(None), x.new_empty(weights.shape))


def _project(weights: ExpertWeights, x: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor, *, scratch_bytes: int,
             is_transposed: bool = False, dense: torch.Tensor | None = None, gather: torch.Tensor | None = None,
             low_rank: torch.Tensor | None = None, lora_up: torch.Tensor | None = None, swiglu: tuple[float, float] | None = None,
             pre_activation: torch.Tensor | None = None) -> torch.Tensor:
    """grouped_gemm with W or, if is_transposed, W^T. Packed weights are dequantised some experts at a time, unless `dense`
    [E, out, in] has all of them. lora_up [E, r, out]."""
    bias = None if is_transposed else weights.bias
    dense = weights.dense if dense is None else dense
    if dense is not None:
        return grouped_gemm(x, dense if is_transposed else dense.transpose(1, 2), offsets, gather=gather, bias=bias,
                            low_rank=low_rank, lora_up=lora_up, swiglu=swiglu, pre_activation=pre_activation, out=out)
    num_experts, size_out, size_in = weights.shape
    chunk = max(1, min(num_experts, scratch_bytes // (size_out * size_in * x.element_size())))
    chunk = num_experts if chunk == num_experts else 1 << (chunk.bit_length() - 1)  # few sizes: each is compiled
    scratch = x.new_empty(chunk, size_out, size_in)
    for first in range(0, num_experts, chunk):
        part = slice(first, min(first + chunk, num_experts))
        dense = weights.dequantize(part, scratch[:part.stop - first])  # [e, out, in]
        grouped_gemm(x, dense if is_transposed else dense.transpose(1, 2), offsets[first:part.stop + 1],
                     gather=gather, bias=None if bias is None else bias[part], low_rank=low_rank,
                     lora_up=None if lora_up is None else lora_up[part], swiglu=swiglu, pre_activation=pre_activation, out=out)
    return out


@dataclass
class MoeKept:
    """What local_forward keeps for local_backward."""

    h: torch.Tensor | None  # [R, 2F], the pre-activation; None: local_backward computes it
    # kept with h, else computed again
    low_rank_x: torch.Tensor | None  # [R, r]: scale x A1^T
    low_rank_act: torch.Tensor | None  # [R, r]: scale act A2^T


Lora = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

BaseGrads = list[torch.Tensor | None]  # of the weights of gate_up and down (None if packed), and of their biases


def local_forward(x: torch.Tensor, routing: Routing, gate_up: ExpertWeights, down: ExpertWeights, *, dtype: torch.dtype,
                  lora: Lora | None, lora_scale: float, alpha: float, limit: float, scratch_bytes: int,
                  keeps_h: bool) -> tuple[torch.Tensor, MoeKept]:
    """The outputs [R, D] of this process's experts in `dtype`, in expert order, for x [T, D]; zeros for rows of other parts; and
    what local_backward needs.

    lora: A [E, r, D] and B [E, 2F, r] of gate_up, A [E, r, F] and B [E, D, r] of down, fp32. scratch_bytes: most bytes of
    dequantised weights at once. Triton only, no gradient."""
    assert is_triton(x), "the reference composes grouped_linear and swiglu"
    offsets, num_rows, width = routing.offsets_device, routing.tokens.shape[0], down.bias.shape[1]
    A1, B1, A2, B2 = lora or (None,) * 4
    low_rank_x = low_rank_act = None
    if lora is not None:
        low_rank_x = grouped_gemm(x, A1.transpose(1, 2), offsets, gather=routing.tokens, scale=lora_scale)
    h = x.new_empty(num_rows, gate_up.bias.shape[1]) if keeps_h else None
    act = _project(gate_up, x, offsets, x.new_empty(num_rows, gate_up.bias.shape[1] // 2), gather=routing.tokens,
                   low_rank=low_rank_x, lora_up=None if lora is None else B1.transpose(1, 2), swiglu=(alpha, limit),
                   pre_activation=h, scratch_bytes=scratch_bytes)
    if lora is not None:
        low_rank_act = grouped_gemm(act, A2.transpose(1, 2), offsets, scale=lora_scale)
    # in the residual stream's dtype: values can exceed float16's 65504
    rows = _project(down, act, offsets, routing.new_rows(x, width, dtype), low_rank=low_rank_act,
                    lora_up=None if lora is None else B2.transpose(1, 2), scratch_bytes=scratch_bytes)
    return rows, MoeKept(h, low_rank_x, low_rank_act) if keeps_h else MoeKept(None, None, None)


def local_backward(grad: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, routing: Routing, gate_up: ExpertWeights,
                   down: ExpertWeights, kept: MoeKept, *, lora: Lora | None, lora_scale: float, alpha: float, limit: float,
                   scratch_bytes: int, needs_base: bool) -> tuple[torch.Tensor, torch.Tensor, Lora | None, BaseGrads | None]:
    """grad [T, D]: the gradient of combine's result. Returns the gradients of the routed rows of x [R, D] in expert order, of the
    gate weights [T, A] (both zeros for other parts), of LoRA's tensors (fp32) and, if needs_base, of the base. Computes what was
    not kept; overwrites a kept h. Triton only."""
    assert routing.num_parts == 1 or not needs_base, "only frozen experts are divided"
    grad = grad.to(x.dtype)  # once for all products
    offsets, tokens = routing.offsets_device, routing.tokens
    num_rows, inner = tokens.shape[0], gate_up.bias.shape[1] // 2
    A1, B1, A2, B2 = lora or (None,) * 4
    h, low_rank_x, low_rank_act, kept.h, dense = kept.h, kept.low_rank_x, kept.low_rank_act, None, None
    if lora is not None and low_rank_x is None:
        low_rank_x = grouped_gemm(x, A1.transpose(1, 2), offsets, gather=tokens, scale=lora_scale)
    if h is None:
        h = x.new_empty(num_rows, 2 * inner)
        dense = _all_dense(gate_up, x, scratch_bytes)  # the input's gradient needs it again
        _project(gate_up, x, offsets, h, gather=tokens, low_rank=low_rank_x, dense=dense, scratch_bytes=scratch_bytes,
                 lora_up=None if lora is None else B1.transpose(1, 2))
    grad_low_rank = None if lora is None else grouped_gemm(grad, B2, offsets, gather=tokens, scale=lora_scale)  # [R, r]
    # `act` first holds the gradient of the activation without the gate weight; activation_grad replaces it by the activation
    act = _project(down, grad, offsets, x.new_empty(num_rows, inner), is_transposed=True, gather=tokens,
                   low_rank=grad_low_rank, lora_up=A2, scratch_bytes=scratch_bytes)
    grad_weights = activation_grad(act, h, weights, routing.order, alpha=alpha, limit=limit,
                                   dots=_bias_dots(grad, down.bias, routing), part=None if routing.num_parts == 1 else offsets)
    lora_grads = base_grads = None
    if needs_base:  # from here on h holds the gradient of h
        base_grads = [None if part.dense is None else torch.empty_like(part.weight) for part in (gate_up, down)]
        base_grads += [torch.empty_like(part.bias) for part in (gate_up, down)]
        # wide products are faster on rows in expert order
        if base_grads[0] is not None:
            grouped_outer(routed_rows(x, None, routing), h, offsets, base_grads[0])
        rows = routed_rows(grad, weights, routing)
        if base_grads[1] is not None:
            grouped_outer(act, rows, offsets, base_grads[1])
        grouped_row_sum(h, offsets, base_grads[2])
        grouped_row_sum(rows, offsets, base_grads[3])
        del rows
    if lora is not None:
        row_weights = weights.flatten()[routing.order]  # [R] fp32
        lora_grads = tuple(torch.empty_like(tensor) for tensor in lora)
        if low_rank_act is None:  # activation_grad's activation has the bits of the forward's
            low_rank_act = grouped_gemm(act, A2.transpose(1, 2), offsets, scale=lora_scale)
        grouped_outer(grad, low_rank_act, offsets, lora_grads[3], gather=tokens, row_scale=row_weights)
        grouped_outer(act, grad_low_rank, offsets, lora_grads[2].transpose(1, 2), row_scale=row_weights)
        grad_low_rank = grouped_gemm(h, B1, offsets, scale=lora_scale)  # [R, r]
        grouped_outer(h, low_rank_x, offsets, lora_grads[1])
        grouped_outer(x, grad_low_rank, offsets, lora_grads[0].transpose(1, 2), gather=tokens)
    # the activation is no longer needed: if the widths agree, its memory takes the gradient of x's rows
    out = act if x.shape[1] == inner and routing.num_parts == 1 else routing.new_rows(x, x.shape[1])
    grad_rows = _project(gate_up, h, offsets, out, is_transposed=True, low_rank=grad_low_rank, lora_up=A1, dense=dense,
                         scratch_bytes=scratch_bytes)
    return grad_rows, grad_weights, lora_grads, base_grads
