"""Mixture-of-experts weights in the formats a checkpoint can hold: bf16 (or fp32) tensors, packed MXFP4 and packed NF4.

The classes share constructor and forward and name their parameters as the checkpoint does. LoRA on experts is one A and one B for
each expert, never merged, whatever the format of the base.

Shapes: E experts, T tokens, A experts per token, R routed rows, D model width, F expert width.
"""
from __future__ import annotations

import torch
from torch import nn

from kernels.device import is_triton
from kernels.experts.few_rows import Projection, moe_decode
from kernels.experts.forward import ExpertWeights
from kernels.experts.gemm import grouped_linear, grouped_linear_packed
from kernels.experts.sorting import Routing, combine, dispatch
from kernels.packed import nf4
from kernels.packed.fragments import can_permute, from_fragments, is_foldable, to_fragments_, unpacks_by_asm
from kernels.packed.mxfp4 import dequantize
from kernels.swiglu import swiglu
from models.config import GptOssConfig

PROJECTIONS = ("gate_up_proj", "down_proj")
PACKED_SUFFIXES = {"checkpoint": ("_blocks", "_scales"), "fragments": ("_block_fragments", "_scale_fragments"),
                   "nf4": ("_codes", "_absmax")}  # by order (kernels/packed/weights.py)


class _Experts(nn.Module):
    """Biases, LoRA and the activation; a subclass holds the weights and projects rows with them."""

    def __init__(self, config: GptOssConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        num, width, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.sizes = {"gate_up_proj": (width, 2 * inner), "down_proj": (inner, width)}  # (in, out)
        self.gate_up_proj_bias = nn.Parameter(torch.empty(num, 2 * inner, device=device, dtype=dtype), False)
        self.down_proj_bias = nn.Parameter(torch.empty(num, width, device=device, dtype=dtype), False)
        for name in PROJECTIONS:
            self.register_parameter(f"{name}_lora_A", None)  # [E, r, in] fp32
            self.register_parameter(f"{name}_lora_B", None)  # [E, out, r] fp32
        self.lora_scale, self.adapter_enabled = 0.0, True

    def _lora(self, name: str) -> dict[str, torch.Tensor | float | None]:
        """The adapter of a projection as grouped_linear takes it."""
        if not self.adapter_enabled:
            return {}
        return {"lora_A": self._parameters[f"{name}_lora_A"], "lora_B": self._parameters[f"{name}_lora_B"],
                "lora_scale": self.lora_scale}

    def forward(self, x: torch.Tensor, offsets: torch.Tensor | list[int]) -> torch.Tensor:
        """x [R, D] in expert order, offsets [E + 1] (int32 on x's device, or a list) -> [R, D]."""
        h = self.project("gate_up_proj", x, offsets)  # [R, 2F], gate and up interleaved
        return self.project("down_proj", swiglu(h, alpha=self.alpha, limit=self.limit), offsets)

    def lora_tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """A and B of gate_up, A and B of down; None without an adapter or with it switched off."""
        if self.gate_up_proj_lora_A is None or not self.adapter_enabled:
            return None
        return self.gate_up_proj_lora_A, self.gate_up_proj_lora_B, self.down_proj_lora_A, self.down_proj_lora_B

    def trains_base(self) -> bool:
        return any(parameter.requires_grad for name, parameter in self._parameters.items()
                   if parameter is not None and "lora" not in name)

    def mix(self, x: torch.Tensor, weights: torch.Tensor, routing: Routing, residual: torch.Tensor) -> torch.Tensor:
        """residual [T, D] plus the experts of x [T, D] weighted by the gate weights [T, A], with gradients of everything."""
        offsets = routing.offsets_device if is_triton(x) else routing.offsets
        return combine(self(dispatch(x, routing), offsets), weights, routing, residual=residual)

    def can_decode(self) -> bool:
        """Whether decode() serves these weights."""
        return True

    def decode(self, x: torch.Tensor, weights: torch.Tensor, routing: Routing, residual: torch.Tensor) -> torch.Tensor:
        """What mix gives, for few tokens and without gradients: the bits of moe_forward, from the weights as they are
        held. Triton only, and only where can_decode()."""
        return moe_decode(x, weights, routing, *(self._for_decode(name, x, routing) for name in PROJECTIONS), residual,
                          lora=self.lora_tensors(), lora_scale=self.lora_scale, alpha=self.alpha, limit=self.limit)


class Bf16Experts(_Experts):
    """Dense weights [E, in, out] in the model's dtype; trainable."""

    def __init__(self, config: GptOssConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__(config, device=device, dtype=dtype)
        for name, (size_in, size_out) in self.sizes.items():
            weight = torch.empty(config.num_local_experts, size_in, size_out, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def project(self, name: str, x: torch.Tensor, offsets: torch.Tensor | list[int]) -> torch.Tensor:
        return grouped_linear(x, self._parameters[name], self._parameters[f"{name}_bias"], offsets, **self._lora(name))

    def held(self, name: str, scratch_bytes: int) -> ExpertWeights:
        """The weights as the GPU's forward and backward take them."""
        return ExpertWeights(self._parameters[name], None, None, self._parameters[f"{name}_bias"], scratch_bytes, "checkpoint",
                             False)

    def _for_decode(self, name: str, x: torch.Tensor, routing: Routing) -> Projection:
        return Projection(self._parameters[name], None, None, self._parameters[f"{name}_bias"], False)


class _PackedExperts(_Experts):
    """Frozen weights as a checkpoint packs them, dequantised where they are used; `order` says how
    (kernels/packed/weights.py)."""

    order: str
    folds = False  # what mxfp4_fragments.is_foldable said

    def _hold(self, name: str, *tensors: torch.Tensor) -> None:
        for suffix, tensor in zip(PACKED_SUFFIXES[self.order], tensors):
            self.register_buffer(name + suffix, tensor)

    def _packed(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Both tensors in the order they are held in."""
        return tuple(self._buffers[name + suffix] for suffix in PACKED_SUFFIXES[self.order])

    def project(self, name: str, x: torch.Tensor, offsets: torch.Tensor | list[int]) -> torch.Tensor:
        return grouped_linear_packed(x, *self._packed(name), self._parameters[f"{name}_bias"], offsets, order=self.order,
                                     folds=self.folds, **self._lora(name))

    def held(self, name: str, scratch_bytes: int) -> ExpertWeights:
        """The weights as the GPU's forward and backward take them; at most scratch_bytes dequantised at once."""
        return ExpertWeights(None, *self._packed(name), self._parameters[f"{name}_bias"], scratch_bytes, self.order, self.folds)


class Mxfp4Experts(_PackedExperts):
    """Packed weights, uint8, frozen: blocks [E, out, in/32, 16] and scales [E, out, in/32].

    `order` is how they lie: as in a checkpoint or, after to_fragments(), permuted in place for the tensor cores
    (kernels/packed/fragments.py). The buffers are named after it, NAME_blocks and NAME_scales or NAME_block_fragments and
    NAME_scale_fragments, so that bytes in one order are never read or loaded as the other. packed() gives the checkpoint's."""

    def __init__(self, config: GptOssConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.order, self.folds = "checkpoint", False
        for name, (size_in, size_out) in self.sizes.items():
            shape = (config.num_local_experts, size_out, size_in // 32)
            blocks = torch.empty(*shape, 16, device=device, dtype=torch.uint8)
            self._hold(name, blocks, torch.empty(shape, device=device, dtype=torch.uint8))

    def to_fragments(self) -> None:
        """Permutes the weights in place, where their sizes allow, and finds out how they unpack (`folds`). For loading: waits for
        the device."""
        assert self.order == "checkpoint", f"packed weights are in the order {self.order} already"
        pairs = {name: self._packed(name) for name in PROJECTIONS}
        if not all(can_permute(blocks) for blocks, _ in pairs.values()):
            return
        self.folds = all(is_foldable(scales) for _, scales in pairs.values())
        for name, pair in pairs.items():
            for suffix in PACKED_SUFFIXES[self.order]:
                del self._buffers[name + suffix]
            to_fragments_(*pair)
        self.order = "fragments"
        for name, pair in pairs.items():
            self._hold(name, *pair)

    def packed(self, name: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks [out, in/32, 16] and scales [out, in/32] of one expert as a checkpoint holds them; new tensors or views."""
        part = slice(expert, expert + 1)
        blocks, scales = (tensor[part] for tensor in self._packed(name))
        if self.order == "fragments":
            blocks, scales = from_fragments(blocks, scales)
        return blocks[0], scales[0]

    def dense(self, name: str, expert: int) -> torch.Tensor:
        """[out, in] fp32 of one expert."""
        return dequantize(*self.packed(name, expert), torch.float32)

    def can_decode(self) -> bool:
        return self.order == "fragments"

    def _for_decode(self, name: str, x: torch.Tensor, routing: Routing) -> Projection:
        return Projection(None, *self._packed(name), self._parameters[f"{name}_bias"],
                          unpacks_by_asm(x, is_foldable=self.folds))


class Nf4Experts(_PackedExperts):
    """Packed weights, frozen: codes [E, out, in/2] uint8 and absmax [E, out * in/64] fp32 (kernels/packed/nf4.py)."""

    order = "nf4"

    def __init__(self, config: GptOssConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__(config, device=device, dtype=dtype)
        for name, (size_in, size_out) in self.sizes.items():
            codes = torch.empty(config.num_local_experts, size_out, size_in // 2, device=device, dtype=torch.uint8)
            absmax = torch.empty(len(codes), size_out * size_in // nf4.BLOCK_SIZE, device=device, dtype=torch.float32)
            self._hold(name, codes, absmax)

    def dense(self, name: str, expert: int) -> torch.Tensor:
        """[out, in] fp32 of one expert."""
        codes, absmax = (tensor[expert] for tensor in self._packed(name))
        return nf4.dequantize_nf4(codes, absmax, absmax.new_empty(codes.shape[0], 2 * codes.shape[1]))

    def _for_decode(self, name: str, x: torch.Tensor, routing: Routing) -> Projection:
        """Dense weights of the experts that have tokens; of the others nothing is written or read."""
        codes, absmax = self._packed(name)
        dense = x.new_empty(*codes.shape[:2], 2 * codes.shape[2])  # [E, out, in]
        nf4.dequantize_nf4(codes, absmax, dense, offsets=routing.offsets_device)
        return Projection(dense.transpose(1, 2), None, None, self._parameters[f"{name}_bias"], False)
