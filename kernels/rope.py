"""Rotary position embedding on half-split pairs: (x_i, x_{i + D/2}) rotate by the angle of position and frequency i.

o1 = x1 cos - x2 sin, o2 = x2 cos + x1 sin, in fp32, rounded once. cos and sin carry YaRN's concentration
(arXiv 2309.00071; models/yarn.py makes them).
"""
import torch


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x.float().chunk(2, dim=-1)  # [T, heads, D/2] each
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, D/2]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [T, heads, D] by cos, sin [T, D/2] fp32. Returns x's dtype."""
    return rope_reference(x, cos, sin)
