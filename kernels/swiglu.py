"""Clamped SwiGLU on interleaved rows: g = h[0::2], u = h[1::2];
y = min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + 1).

The gate is clamped on its upper side only; gradients pass at the limit itself and are 0 beyond
(openai/gpt-oss, gpt_oss/torch/model.py: swiglu). Computed in fp32, rounded once. With G, U the clamped values and
s = sigmoid(alpha G):
    dg = dy (U + 1) s (1 + alpha G (1 - s)) [g <= limit],  du = dy G s [|u| <= limit].
Only h is saved; the backward can give the activation again beside dh, from the same read.

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
    """The activation of raw gate and up values in fp32, NaN kept; other kernels may call it in their epilogues."""
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
def _load_pairs(h_ptr, first, left, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Gate and up in fp32 of the pairs from `first`. Pairs of 16-bit values come as one 32-bit word each, gate in its low half:
    no thread needs another's half."""
    if h_ptr.dtype.element_ty == tl.int32:
        pairs = tl.arange(0, BLOCK)
        words = tl.load(h_ptr + first + pairs, mask=pairs < left, other=0)
        gate = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        up = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        both = tl.arange(0, 2 * BLOCK)
        h = tl.load(h_ptr + 2 * first + both, mask=both < 2 * left, other=0.0)
        gate, up = tl.split(tl.reshape(h, [BLOCK, 2]))
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def _store_pairs(h_ptr, first, left, gate, up, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    if h_ptr.dtype.element_ty == tl.int32:
        pairs = tl.arange(0, BLOCK)
        low = gate.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = up.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(h_ptr + first + pairs, low | high, mask=pairs < left)
    else:
        both = tl.arange(0, 2 * BLOCK)
        h = tl.reshape(tl.join(gate, up), [2 * BLOCK])
        tl.store(h_ptr + 2 * first + both, h.to(DTYPE), mask=both < 2 * left)


@triton.jit
def _swiglu_kernel(h_ptr, y_ptr, alpha, limit, num_pairs, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pairs = tl.arange(0, BLOCK)
    left = num_pairs - first
    gate, up = _load_pairs(h_ptr, first, left, y_ptr.dtype.element_ty, BLOCK)
    y = clamped_swiglu(gate, up, alpha, limit)
    tl.store(y_ptr + first + pairs, y.to(y_ptr.dtype.element_ty), mask=pairs < left)


@triton.jit
def _swiglu_grad_kernel(grad_ptr, h_ptr, grad_h_ptr, y_ptr, alpha, limit, num_pairs, BLOCK: tl.constexpr,
                        WITH_ACTIVATION: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pairs = tl.arange(0, BLOCK)
    left = num_pairs - first
    gate, up = _load_pairs(h_ptr, first, left, grad_ptr.dtype.element_ty, BLOCK)
    grad = tl.load(grad_ptr + first + pairs, mask=pairs < left, other=0.0).to(tl.float32)
    grad_gate, grad_up, y = clamped_swiglu_grad(grad, gate, up, alpha, limit)
    _store_pairs(grad_h_ptr, first, left, grad_gate, grad_up, grad_ptr.dtype.element_ty, BLOCK)
    if WITH_ACTIVATION:
        tl.store(y_ptr + first + pairs, y.to(y_ptr.dtype.element_ty), mask=pairs < left)


def _packed(h: torch.Tensor) -> torch.Tensor:
    """Contiguous rows of pairs as the kernels take them: 16-bit pairs as 32-bit words."""
    return h.view(torch.int32) if h.element_size() == 2 else h


def _aligned(h: torch.Tensor) -> torch.Tensor:
    """h contiguous, and starting on a whole pair."""
    h = h.contiguous()
    return h if h.storage_offset() % 2 == 0 else h.clone()


def _activate(h: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    h = _aligned(h)
    y = torch.empty((*h.shape[:-1], h.shape[-1] // 2), dtype=h.dtype, device=h.device)
    if y.numel():
        launch(_swiglu_kernel, (cdiv(y.numel(), BLOCK),), _packed(h), y, alpha, limit, y.numel(), BLOCK=BLOCK,
               num_warps=NUM_WARPS)
    return y


def swiglu_backward(grad: torch.Tensor, h: torch.Tensor, *, alpha: float, limit: float,
                    with_activation: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient of h [R, 2F] from that of the activation, grad [R, F], both in h's dtype, and the activation [R, F] again
    where it is asked for. Triton only: on the CPU autograd differentiates the reference."""
    h, grad = _aligned(h), grad.contiguous()
    assert grad.numel() * 2 == h.numel(), f"gradient {grad.shape} does not fit h {h.shape}"
    assert grad.dtype == h.dtype, f"gradient {grad.dtype} and h {h.dtype} differ"
    grad_h = torch.empty_like(h)
    y = torch.empty_like(grad) if with_activation else None
    if grad.numel():
        launch(
            _swiglu_grad_kernel, (cdiv(grad.numel(), BLOCK),),
            grad, _packed(h), _packed(grad_h), y, alpha, limit, grad.numel(), BLOCK=BLOCK,
            WITH_ACTIVATION=with_activation, num_warps=NUM_WARPS)
    return grad_h, y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, alpha, limit):
        ctx.save_for_backward(h)
        ctx.alpha, ctx.limit = alpha, limit
        return _activate(h, alpha, limit)

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return swiglu_backward(grad, h, alpha=ctx.alpha, limit=ctx.limit, with_activation=False)[0], None, None


def swiglu(h: torch.Tensor, *, alpha: float, limit: float) -> torch.Tensor:
    """Activates h [R, 2F] (gate and up interleaved) to [R, F] in h's dtype."""
    if not is_triton(h):
        return swiglu_reference(h, alpha, limit)
    check_served("swiglu", {"h": h}, dtypes=DTYPES, tensor_cores=False)
    return _SwiGLU.apply(h, alpha, limit)
