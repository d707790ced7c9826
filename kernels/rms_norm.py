"""RMSNorm: y = x * rsqrt(mean(x^2) + eps) * weight, computed in fp32 with one rounding at the end.

Unlike Llama's, the weight multiplies before the cast (openai/gpt-oss, gpt_oss/torch/model.py).
"""
import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x_f32 = x.float()
    inv_rms = torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + eps)
    return (x_f32 * inv_rms * weight.float()).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalises x [..., D] by its root mean square; weight [D]. Returns x's dtype."""
    return rms_norm_reference(x, weight, eps)
