"""Packed weights of experts, whatever their format and order, to dense ones.

    order          packed                               factors
    "checkpoint"   MXFP4 blocks [E, O, I / 32, 16]      scales [E, O, I / 32] uint8       (mxfp4.py)
    "fragments"    the same bytes in another order                                        (mxfp4_fragments.py)
    "nf4"          codes [E, O, I / 2] uint8            absmax [E, O * I / 64] fp32       (nf4.py)

Shapes: E experts, O output features, I input features.
"""

import torch

from kernels.packed.fragments import dequantize_fragments, unpacks_by_asm
from kernels.packed.mxfp4 import BLOCK_SIZE, dequantize_experts
from kernels.packed.nf4 import dequantize_nf4


def packed_shape(packed: torch.Tensor, order: str) -> tuple[int, int, int]:
    """E, O, I."""
    num_experts, num_out = packed.shape[:2]
    return num_experts, num_out, packed.shape[2] * (2 if order == "nf4" else BLOCK_SIZE)


def dequantize_packed(packed: torch.Tensor, factors: torch.Tensor, out: torch.Tensor, *, order: str,
                      folds: bool) -> torch.Tensor:
    """Writes the weights into out [E, O, I], contiguous, and returns it. folds: what mxfp4_fragments.is_foldable said of scales
    in fragment order."""
    if order == "nf4":
        return dequantize_nf4(packed, factors, out)
    if order == "checkpoint":
        return dequantize_experts(packed, factors, out)
    assert order == "fragments", f"order {order!r} is none of checkpoint, fragments, nf4"
    return dequantize_fragments(packed, factors, out, is_asm=unpacks_by_asm(out, is_foldable=folds))
