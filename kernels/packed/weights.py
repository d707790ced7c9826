"""One projection of all experts in each form and layout that its weights are held in.

    Dense           weight [E, I, O], of the model's dtype, the only one that trains
    Mxfp4           blocks [E, O, I / 32, 16] and scales [E, O, I / 32] uint8, as in a checkpoint (mxfp4.py)
    Mxfp4Fragments  the same bytes in another order (fragments.py)
    Nf4             codes [E, O, I / 2] uint8 and absmax [E, O * I / 64] fp32 (nf4.py)

Each has `bias` [E, O]; `dense`, the weights [E, O, I] where they are held so, else None; `shape`: E, O and I. Where it
`serves_few_rows`, few_rows() gives what the kernels for few rows take, for rows of x with offsets [E + 1]; the packed ones have
dequantize().

Shapes: E experts, O output features, I input features.
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.packed.fragments import dequantize_fragments, unpacks_by_asm
from kernels.packed.mxfp4 import BLOCK_SIZE, dequantize_experts
from kernels.packed.nf4 import dequantize_nf4


class Projection(NamedTuple):
    """Weights as the kernels for few rows take them: dense [E, I, O], or blocks and scales in fragment order. unpacks_by_asm:
    what fragments.unpacks_by_asm said of them."""

    dense: torch.Tensor | None
    blocks: torch.Tensor | None
    scales: torch.Tensor | None
    bias: torch.Tensor | None  # [E, O]
    unpacks_by_asm: bool


class Dense(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None
    serves_few_rows = True

    @property
    def dense(self) -> torch.Tensor:
        return self.weight.transpose(1, 2)

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.dense.shape)

    def few_rows(self, x: torch.Tensor, offsets: torch.Tensor) -> Projection:
        return Projection(self.weight, None, None, self.bias, False)


class Mxfp4(NamedTuple):
    blocks: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor
    dense, serves_few_rows = None, False

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.scales.shape[:2], BLOCK_SIZE * self.scales.shape[2]

    def dequantize(self, experts: slice, out: torch.Tensor) -> torch.Tensor:
        """Writes the weights of some experts into out [e, O, I], contiguous, and returns it."""
        return dequantize_experts(self.blocks[experts], self.scales[experts], out)


class Mxfp4Fragments(NamedTuple):
    blocks: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor
    folds: bool  # what fragments.is_foldable said of the scales
    dense, serves_few_rows = None, True
    shape = Mxfp4.shape

    def dequantize(self, experts: slice, out: torch.Tensor) -> torch.Tensor:
        is_asm = unpacks_by_asm(out, is_foldable=self.folds)
        return dequantize_fragments(self.blocks[experts], self.scales[experts], out, is_asm=is_asm)

    def few_rows(self, x: torch.Tensor, offsets: torch.Tensor) -> Projection:
        return Projection(None, self.blocks, self.scales, self.bias, unpacks_by_asm(x, is_foldable=self.folds))


class Nf4(NamedTuple):
    codes: torch.Tensor
    absmax: torch.Tensor
    bias: torch.Tensor
    dense, serves_few_rows = None, True

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.codes.shape[:2], 2 * self.codes.shape[2]

    def dequantize(self, experts: slice, out: torch.Tensor) -> torch.Tensor:
        return dequantize_nf4(self.codes[experts], self.absmax[experts], out)

    def few_rows(self, x: torch.Tensor, offsets: torch.Tensor) -> Projection:
        """Dense weights of the experts that have rows; of the others nothing is written or read."""
        dense = dequantize_nf4(self.codes, self.absmax, x.new_empty(self.shape), offsets=offsets)
        return Projection(dense.transpose(1, 2), None, None, self.bias, False)


Packed = Mxfp4 | Mxfp4Fragments | Nf4
ExpertWeights = Dense | Packed
