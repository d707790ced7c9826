"""Clamped SwiGLU on interleaved rows: g = h[0::2], u = h[1::2];
y = min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, -limit, limit) + 1).

The gate is clamped on its upper side only; gradients pass at the limit itself and are 0 beyond
(openai/gpt-oss, gpt_oss/torch/model.py: swiglu). Computed in fp32, rounded once.
"""
import torch


def swiglu_reference(h: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate = h[..., 0::2].float().clamp(max=limit)
    up = h[..., 1::2].float().clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(h.dtype)


def swiglu(h: torch.Tensor, *, alpha: float, limit: float) -> torch.Tensor:
    """Activates h [R, 2F] (gate and up interleaved) to [R, F] in h's dtype."""
    return swiglu_reference(h, alpha, limit)
