"""YaRN frequencies of gpt-oss (arXiv 2309.00071; openai/gpt-oss, gpt_oss/torch/model.py: RotaryEmbedding).

Frequencies interpolate between theta^(-2i/D) and the same divided by the factor; the ramp's ends are not rounded when
`truncate` is false. inv_freq is built in fp32, as transformers and the official code do, so that tables match theirs.
"""
import math

import torch

from models.config import GptOssConfig


def inverse_frequencies(config: GptOssConfig) -> torch.Tensor:
    """Radians per position for each rotated pair: [head_dim / 2] fp32, on the CPU: devices may differ in a power's last bit."""
    scaling, dim = config.rope_scaling, config.head_dim
    low, high = (dim * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi))
                 / (2 * math.log(config.rope_theta)) for rotations in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of zero width
    base = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (1.0 / (scaling.factor * base)) * ramp + (1.0 / base) * (1 - ramp)


def concentration(config: GptOssConfig) -> float:
    """Factor on cos and sin: 0.1 ln(factor) + 1, so that q.k grows by its square."""
    factor = config.rope_scaling.factor
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def cos_sin(positions: torch.Tensor, inv_freq: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, head_dim / 2] fp32 of positions [T], times the concentration `scale`."""
    angles = positions.float().unsqueeze(1) * inv_freq
    return angles.cos() * scale, angles.sin() * scale
