"""Dense projection, and one with an unmerged low-rank update: y = x W^T + b + scale * (x A^T) B^T (LoRA,
arXiv 2106.09685).

A and B may be kept in fp32 (master weights); they are cast to x's dtype at use.
"""
import torch
import torch.nn.functional as F

# for fewer rows, BLAS libraries choose kernels that sum in another order: a token would depend on how many run beside it
_MIN_ROWS = 8


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, in] times weight [out, in] plus bias [out] or none -> [T, out], rounded in the same way for any small T."""
    num_rows = x.shape[0]
    if num_rows >= _MIN_ROWS:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, _MIN_ROWS - num_rows)), weight, bias)[:num_rows]


def lora_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_A: torch.Tensor,
                lora_B: torch.Tensor, *, scale: float) -> torch.Tensor:
    """x [T, in], weight [out, in], lora_A [r, in], lora_B [out, r] -> [T, out] in x's dtype."""
    low_rank = linear(linear(x, lora_A.to(x.dtype), None), lora_B.to(x.dtype), None)
    return linear(x, weight, bias) + scale * low_rank
