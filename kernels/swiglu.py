"""Clamped SwiGLU on interleaved rows: g = h[0::2], u = h[1::2];
y = min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + 1).

The gate is clamped on its upper side only; gradients pass at the limit itself and are 0 beyond
(openai/gpt-oss, gpt_oss/torch/model.py: swiglu). Computed in fp32, rounded once. With G, U the clamped values and
s = sigmoid(alpha G):
    dg = dy (U + 1) s (1 + alpha G (1 - s)) [g <= limit],  du = dy G s [|u| <= limit].
Triton kernels that compute h or its gradient call clamped_swiglu and clamped_swiglu_grad; swiglu() serves the CPU and products of
the vendor's library.

Shapes: R routed rows, F expert width.
"""
import torch
import triton
import triton.language as tl

from kernels.device import cdiv, check_served, is_triton, launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK, NUM_WARPS = 1024, 4  # pairs per program


def swiglu_reference(h: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate = h[..., 0::2].float().clamp(max=limit)
    up = h[..., 1::2].float().clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(h.dtype)


@triton.jit
def clamped_swiglu(gate, up, alpha, limit):
    """The activation of raw gate and up values in fp32; NaN stays NaN."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    sigmoid = 1.0 / (1.0 + tl.exp2(gate * (-1.4426950408889634 * alpha)))  # log2(e)
    return gate * sigmoid * (up + 1.0)


@triton.jit
def clamped_swiglu_grad(grad, gate, up, alpha, limit):
    """Gradients of raw gate and up values in fp32, and the activation, the same bits as clamped_swiglu's."""
    clamped_gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    clamped_up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    sigmoid = 1.0 / (1.0 + tl.exp2(clamped_gate * (-1.4426950408889634 * alpha)))
    scaled = grad * sigmoid
    grad_gate = scaled * (clamped_up + 1.0) * (1.0 + alpha * clamped_gate * (1.0 - sigmoid))
    grad_up = scaled * clamped_gate
    activation = clamped_gate * sigmoid * (clamped_up + 1.0)
    return tl.where(gate <= limit, grad_gate, 0.0), tl.where(clamped_up == up, grad_up, 0.0), activation


@triton.jit
def _swiglu_kernel(h_ptr, y_ptr, alpha, limit, num_pairs, BLOCK: tl.constexpr):
    """Pairs of 16-bit values come as one 32-bit word each, gate in its low half: no thread needs another's half."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pairs = tl.arange(0, BLOCK)
    left = num_pairs - first
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if h_ptr.dtype.element_ty == tl.int32:
        words = tl.load(h_ptr + first + pairs, mask=pairs < left, other=0)
        gate = (words & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        up = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        both = tl.arange(0, 2 * BLOCK)
        h = tl.load(h_ptr + 2 * first + both, mask=both < 2 * left, other=0.0)
        gate, up = tl.split(tl.reshape(h, [BLOCK, 2]))
    y = clamped_swiglu(gate.to(tl.float32), up.to(tl.float32), alpha, limit)
    tl.store(y_ptr + first + pairs, y.to(dtype), mask=pairs < left)


def swiglu(h: torch.Tensor, *, alpha: float, limit: float) -> torch.Tensor:
    """Activates h [R, 2F] (gate and up interleaved) to [R, F] in h's dtype. On a GPU without gradient."""
    if not is_triton(h):
        return swiglu_reference(h, alpha, limit)
    check_served("swiglu", {"h": h}, dtypes=DTYPES, tensor_cores=False)
    h = h.contiguous()
    h = h if h.storage_offset() % 2 == 0 else h.clone()  # must start on a whole pair
    y = torch.empty((*h.shape[:-1], h.shape[-1] // 2), dtype=h.dtype, device=h.device)
    if y.numel():
        pairs = h.view(torch.int32) if h.element_size() == 2 else h
        launch(_swiglu_kernel, (cdiv(y.numel(), BLOCK),), pairs, y, alpha, limit, y.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)
    return y
