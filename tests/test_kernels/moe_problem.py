"""Inputs of the experts in float64, the experts composed one by one, and the kernels' parts put together as a layer does it, for
the tests of training and of decoding."""

import math
from functools import cache

import torch

from kernels.experts.few_rows import few_rows_forward
from kernels.experts.forward import local_backward, local_forward
from kernels.experts.transport import combine
from kernels.packed.mxfp4 import dequantize

ALPHA, LIMIT, SCALE = 1.702, 7.0, 0.5


def normal(*shape, seed, std=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std


@cache
def packed_weights(num_experts, width, inner):
    """Blocks and scales of both projections, in the checkpoint's layout."""
    generator, packed = torch.Generator().manual_seed(0), []
    for size, size_in in ((2 * inner, width), (width, inner)):
        exponent = 126 - round(math.log2(size_in**0.5))  # products of the size of their inputs
        scales = torch.randint(exponent - 1, exponent + 2, (num_experts, size, size_in // 32), generator=generator)
        blocks = torch.randint(0, 256, (*scales.shape, 16), generator=generator, dtype=torch.uint8)
        packed.append((blocks, scales.to(torch.uint8)))
    return packed


def problem(num_tokens, num_experts, per_token, width, inner, rank):
    """Inputs in float64 and packed weights; expert 0 gets no token."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([1 + torch.randperm(num_experts - 1, generator=generator)[:per_token] for _ in range(num_tokens)])
    tensors = {"x": normal(num_tokens, width, seed=3), "residual": normal(num_tokens, width, seed=4),
               "weights": torch.softmax(normal(num_tokens, per_token, seed=5), -1),
               "b1": normal(num_experts, 2 * inner, seed=6), "b2": normal(num_experts, width, seed=7),
               "A1": normal(num_experts, rank, width, seed=8, std=width**-0.5),
               "B1": normal(num_experts, 2 * inner, rank, seed=9),
               "A2": normal(num_experts, rank, inner, seed=10, std=inner**-0.5), "B2": normal(num_experts, width, rank, seed=11)}
    return indices, packed_weights(num_experts, width, inner), tensors


def composed(indices, packed, t, *, has_lora):
    """The operation expert by expert in the dtype of t, weights [E, out, in]."""
    w1, w2 = (dequantize(*pair, torch.float32).to(t["x"].dtype) for pair in packed)
    if has_lora:
        w1, w2 = w1 + SCALE * t["B1"] @ t["A1"], w2 + SCALE * t["B2"] @ t["A2"]
    y = t["residual"]
    for expert in range(len(w1)):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        h = t["x"][token] @ w1[expert].T + t["b1"][expert]
        gate, up = h[:, 0::2].clamp(max=LIMIT), h[:, 1::2].clamp(-LIMIT, LIMIT)
        out = (gate * torch.sigmoid(ALPHA * gate) * (up + 1)) @ w2[expert].T + t["b2"][expert]
        y = y.index_add(0, token, out * t["weights"][token, slot].unsqueeze(-1))
    return y


def moe_forward(x, weights, routing, gate_up, down, residual, **settings):
    """residual [T, D] plus the experts of x, and what moe_backward needs."""
    rows, kept = local_forward(x, routing, gate_up, down, dtype=residual.dtype, **settings)
    return combine(rows, weights, routing, residual), kept


def moe_backward(grad, x, weights, routing, gate_up, down, kept, **settings):
    """The gradients of x and of the gate weights, those of LoRA and of the base."""
    grad_rows, *others = local_backward(grad, x, weights, routing, gate_up, down, kept, **settings)
    return combine(grad_rows, None, routing, None), *others


def moe_decode(x, weights, routing, gate_up, down, residual, **settings):
    """moe_forward by the kernels for few rows."""
    return combine(few_rows_forward(x, routing, gate_up, down, **settings), weights, routing, residual)
