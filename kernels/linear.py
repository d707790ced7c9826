"""Dense projection with an unmerged low-rank update: y = x W^T + b + scale * (x A^T) B^T (LoRA, arXiv 2106.09685).

A and B may be kept in fp32 (master weights); they are cast to x's dtype at use.
"""
import torch
import torch.nn.functional as F


def lora_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_A: torch.Tensor,
                lora_B: torch.Tensor, *, scale: float) -> torch.Tensor:
    """x [T, in], weight [out, in], lora_A [r, in], lora_B [out, r] -> [T, out] in x's dtype."""
    low_rank = F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight, bias) + scale * low_rank
