"""The formats of experts' weights: what a checkpoint stores, how it becomes dense, what kernels take.

    Dense           weight [E, I, O], in the model's dtype; the only format that trains
    Mxfp4           blocks [E, O, I / 32, 16] and scales [E, O, I / 32] uint8 (mxfp4.py)
    Mxfp4Fragments  the same bytes permuted into the layout of the tensor cores (fragments.py), which the kernels take
    Nf4             codes [E, O, I / 2] uint8 and absmax [E, O * I / 64] fp32 (nf4.py)

An object holds one projection of all experts. Class attributes and static methods describe the format itself. Weights called
`dense` are [E, O, I], output features first.

Shapes: E experts, O output features, I input features.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from kernels.packed import mxfp4, nf4
from kernels.packed.fragments import (
    can_permute,
    dequantize_fragments,
    from_fragments,
    is_foldable,
    to_fragments_,
    unpacks_by_asm,
)


class Projection(NamedTuple):
    """Weights as the kernels for few rows take them: weight [E, I, O], or blocks and scales in fragment layout. unpacks_by_asm:
    the result of fragments.unpacks_by_asm for them."""

    weight: torch.Tensor | None
    blocks: torch.Tensor | None
    scales: torch.Tensor | None
    bias: torch.Tensor | None  # [E, O]
    unpacks_by_asm: bool


class ExpertWeights:
    """The interface of a format. A subclass is a dataclass of its tensors, in the order of `suffixes`, and the bias [E, O]."""

    name: ClassVar[str]  # its name in model.experts=
    description: ClassVar[str]  # completes "the checkpoint holds ..."
    suffixes: ClassVar[tuple[str, ...]]  # of the tensors' names: they follow the projection's name
    quant_method: ClassVar[str | None] = None  # quantization_config.quant_method of a checkpoint
    quantization: ClassVar[dict | None] = None  # quantization_config of a checkpoint that is packed here; None: none
    is_packed: ClassVar[bool] = True  # frozen, and dequantised at each use
    is_written: ClassVar[bool] = True  # exports can be in this format
    serves_few_rows: ClassVar[bool] = True  # it has few_rows()

    bias: torch.Tensor | None

    @property
    def dense(self) -> torch.Tensor | None:
        """The weights [E, O, I] as a view; None if they are packed."""
        return None

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, O and I."""
        raise NotImplementedError

    @staticmethod
    def stored(num_experts: int, size_in: int, size_out: int) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and dtype of each tensor of a checkpoint, None for the model's dtype."""
        raise NotImplementedError

    @staticmethod
    def check(quantization: dict, hidden_size: int, intermediate_size: int) -> None:
        """Raises ValueError for a quantization_config or sizes that the format does not support."""

    @staticmethod
    def unpack(*tensors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weights [O, I] of one expert, from its tensors as stored."""
        raise NotImplementedError

    @staticmethod
    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inverse of unpack, with rounding."""
        raise NotImplementedError

    @staticmethod
    def arranged(projections: list[ExpertWeights]) -> list[ExpertWeights]:
        """The same weights, in the same memory, in the layout that the Triton kernels take. May wait for the device."""
        return projections

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors, in the order of `suffixes`."""
        return tuple(vars(self).values())[:len(self.suffixes)]

    def settings(self) -> tuple[bool, ...]:
        """The constructor's arguments after the tensors and the bias."""
        return tuple(vars(self).values())[len(self.suffixes) + 1:]

    def as_stored(self, expert: int) -> tuple[torch.Tensor, ...]:
        """The tensors of one expert as a checkpoint stores them; new tensors or views."""
        return tuple(tensor.detach()[expert] for tensor in self.tensors())

    def dequantize(self, experts: slice, out: torch.Tensor) -> torch.Tensor:
        """Writes the weights of some experts into out [e, O, I], contiguous, and returns it. Packed formats only."""
        raise NotImplementedError

    def few_rows(self, x: torch.Tensor, offsets: torch.Tensor) -> Projection:
        """The weights for the kernels for few rows, for rows of x with offsets [E + 1]."""
        raise NotImplementedError


@dataclass
class Dense(ExpertWeights):
    weight: torch.Tensor
    bias: torch.Tensor | None

    name, description, suffixes = "bf16", "dense ones", ("",)
    is_packed = False

    @property
    def dense(self) -> torch.Tensor:
        return self.weight.transpose(1, 2)

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.dense.shape)

    @staticmethod
    def stored(num_experts: int, size_in: int, size_out: int) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        return [((num_experts, size_in, size_out), None)]

    @staticmethod
    def unpack(*tensors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return tensors[0].to(dtype).T

    @staticmethod
    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (weight.T,)

    def few_rows(self, x: torch.Tensor, offsets: torch.Tensor) -> Projection:
        return Projection(self.weight, None, None, self.bias, False)


@dataclass
class Mxfp4(ExpertWeights):
    blocks: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor

    name, description, suffixes = "mxfp4", "packed ones (MXFP4)", ("_blocks", "_scales")
    quant_method = "mxfp4"
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
    serves_few_rows = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.scales.shape[:2], mxfp4.BLOCK_SIZE * self.scales.shape[2]

    @staticmethod
    def stored(num_experts: int, size_in: int, size_out: int) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        scales = (num_experts, size_out, size_in // mxfp4.BLOCK_SIZE)
        return [((*scales, mxfp4.BLOCK_SIZE // 2), torch.uint8), (scales, torch.uint8)]

    @staticmethod
    def check(quantization: dict, hidden_size: int, intermediate_size: int) -> None:
        if hidden_size % mxfp4.BLOCK_SIZE or intermediate_size % mxfp4.BLOCK_SIZE:
            raise ValueError(f"model config: MXFP4 needs hidden_size={hidden_size} and intermediate_size={intermediate_size} to "
                             f"be multiples of {mxfp4.BLOCK_SIZE}")

    @staticmethod
    def unpack(*tensors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return mxfp4.dequantize(*tensors, dtype)

    @staticmethod
    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return mxfp4.quantize(weight)

    @staticmethod
    def arranged(projections: list[Mxfp4]) -> list[ExpertWeights]:
        if not all(can_permute(projection.blocks) for projection in projections):
            return projections
        are_foldable = all(is_foldable(projection.scales) for projection in projections)
        for projection in projections:
            to_fragments_(projection.blocks, projection.scales)
        return [Mxfp4Fragments(projection.blocks, projection.scales, projection.bias, are_foldable) for projection in projections]

    def dequantize(self, experts: slice, out: torch.Tensor) -> torch.Tensor:
        return mxfp4.dequantize_experts(self.blocks[experts], self.scales[experts], out)


@dataclass
class Mxfp4Fragments(Mxfp4):
    is_foldable: bool  # the result of fragments.is_foldable for the scales

    # names of their own: bytes in one layout are never read or loaded as the other
    suffixes = ("_block_fragments", "_scale_fragments")
    serves_few_rows = True

    @staticmethod
    def arranged(projections: list[ExpertWeights]) -> list[ExpertWeights]:
        return projections

    def as_stored(self, expert: int) -> tuple[torch.Tensor, ...]:
        part = slice(expert, expert + 1)
        return tuple(tensor[0] for tensor in from_fragments(self.blocks[part], self.scales[part]))

    def dequantize(self, experts: slice, out: torch.Tensor) -> torch.Tensor:
        is_asm = unpacks_by_asm(out, is_foldable=self.is_foldable)
        return dequantize_fragments(self.blocks[experts], self.scales[experts], out, is_asm=is_asm)

    def few_rows(self, x: torch.Tensor, offsets: torch.Tensor) -> Projection:
        return Projection(None, self.blocks, self.scales, self.bias, unpacks_by_asm(x, is_foldable=self.is_foldable))


@dataclass
class Nf4(ExpertWeights):
    codes: torch.Tensor
    absmax: torch.Tensor
    bias: torch.Tensor

    name, description, suffixes = "nf4", "packed ones (NF4)", ("_codes", "_absmax")
    quant_method = "bitsandbytes"
    quantization = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    is_written = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.codes.shape[:2], 2 * self.codes.shape[2]

    @staticmethod
    def stored(num_experts: int, size_in: int, size_out: int) -> list[tuple[tuple[int, ...], torch.dtype | None]]:
        return [((num_experts, size_out, size_in // 2), torch.uint8),
                ((num_experts, size_out * size_in // nf4.BLOCK_SIZE), torch.float32)]

    @staticmethod
    def check(quantization: dict, hidden_size: int, intermediate_size: int) -> None:
        if (kind := quantization.get("bnb_4bit_quant_type")) != "nf4":
            raise ValueError(f"config.json: quantization_config.bnb_4bit_quant_type={kind!r}; of bitsandbytes' formats nf4 is "
                             "supported")
        if hidden_size * intermediate_size % nf4.BLOCK_SIZE:
            raise ValueError(f"model config: NF4 needs hidden_size={hidden_size} times intermediate_size={intermediate_size} to "
                             f"be a multiple of {nf4.BLOCK_SIZE}")

    @staticmethod
    def unpack(*tensors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        codes, absmax = tensors
        return nf4.dequantize_nf4(codes, absmax, torch.empty(len(codes), 2 * codes.shape[1], dtype=dtype, device=codes.device))

    @staticmethod
    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return nf4.quantize_nf4(weight)

    def dequantize(self, experts: slice, out: torch.Tensor) -> torch.Tensor:
        return nf4.dequantize_nf4(self.codes[experts], self.absmax[experts], out)

    def few_rows(self, x: torch.Tensor, offsets: torch.Tensor) -> Projection:
        """Dense weights of the experts that have rows; those of other experts are not written, and not read."""
        dense = nf4.dequantize_nf4(self.codes, self.absmax, x.new_empty(self.shape), offsets=offsets)
        return Projection(dense.transpose(1, 2), None, None, self.bias, False)
