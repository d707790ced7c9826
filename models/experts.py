"""Mixture-of-experts weights in the formats a checkpoint can hold: bf16 (or fp32) tensors, packed MXFP4 and packed NF4.

The classes share constructor and forward and name their parameters as the checkpoint does. LoRA on experts is one A and one B for
each expert, never merged, whatever the format of the base.

Shapes: E experts, T tokens, A experts per token, R routed rows, D model width, F expert width.
"""
from __future__ import annotations

import torch
from torch import nn

from kernels.device import is_few, is_triton
from kernels.experts.few_rows import moe_decode
from kernels.experts.forward import MoeKept, moe_backward, moe_forward
from kernels.experts.gemm import grouped_linear
from kernels.experts.sorting import Routing, combine, dispatch
from kernels.packed import nf4
from kernels.packed.fragments import can_permute, from_fragments, is_foldable, to_fragments_
from kernels.packed.mxfp4 import dequantize
from kernels.packed.weights import Dense, Mxfp4, Mxfp4Fragments, Nf4, Packed
from kernels.swiglu import swiglu
from models.config import GptOssConfig
from models.kept import Kept
from models.linear import Gradients
from models.memory_plan import SCRATCH_BYTES

PROJECTIONS = ("gate_up_proj", "down_proj")
PACKED_SUFFIXES = {Mxfp4: ("_blocks", "_scales"), Mxfp4Fragments: ("_block_fragments", "_scale_fragments"),
                   Nf4: ("_codes", "_absmax")}


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

    def forward(self, x: torch.Tensor, weights: torch.Tensor, routing: Routing, residual: torch.Tensor,
                kept: Kept | None = None) -> torch.Tensor:
        """residual [T, D] plus the experts of x [T, D] with gate weights [T, A] fp32. On a GPU without gradient; kept: takes what
        backward() needs."""
        if not is_triton(x):
            h = self.project("gate_up_proj", dispatch(x, routing), routing.offsets)  # [R, 2F], gate and up interleaved
            rows = self.project("down_proj", swiglu(h, alpha=self.alpha, limit=self.limit), routing.offsets)
            return combine(rows, weights, routing, residual=residual)
        projections = [self.weights(name) for name in PROJECTIONS]
        if kept is None and is_few(x) and self.serves_few_rows():
            few = (projection.few_rows(x, routing.offsets_device) for projection in projections)
            return moe_decode(x, weights, routing, *few, residual, **self._settings())
        y, moe = moe_forward(x, weights, routing, *projections, residual,
                             scratch_bytes=SCRATCH_BYTES if kept is None else kept.scratch_bytes,
                             keeps_h=kept is not None and not kept.recomputes("h"), **self._settings())
        if kept is not None:
            kept.keep({"h": moe.h, "low_rank_x": moe.low_rank_x, "low_rank_act": moe.low_rank_act})
        return y

    def backward(self, grad: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, routing: Routing, kept: Kept,
                 grads: Gradients) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of x [T, D] and of the gate weights [T, A] from that of forward's result, which is also the residual's;
        those of what trains go to `grads`."""
        moe = MoeKept(*(kept.take(name) for name in ("h", "low_rank_x", "low_rank_act")))
        grad_x, grad_weights, lora_grads, base_grads = moe_backward(
            grad, x, weights, routing, *(self.weights(name) for name in PROJECTIONS), moe,
            scratch_bytes=kept.scratch_bytes, needs_base=self.trains_base(), **self._settings())
        if lora_grads is not None:
            grads.update(zip(self.lora_tensors(), lora_grads))
        if base_grads is not None:
            names = (f"{name}{suffix}" for suffix in ("", "_bias") for name in PROJECTIONS)
            grads.update((self._parameters[name], grad) for name, grad in zip(names, base_grads) if grad is not None)
        return grad_x, grad_weights

    def _settings(self) -> dict:
        return {"lora": self.lora_tensors(), "lora_scale": self.lora_scale, "alpha": self.alpha, "limit": self.limit}

    def lora_tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """A and B of gate_up, A and B of down; None without an adapter or with it switched off."""
        if self.gate_up_proj_lora_A is None or not self.adapter_enabled:
            return None
        return self.gate_up_proj_lora_A, self.gate_up_proj_lora_B, self.down_proj_lora_A, self.down_proj_lora_B

    def trains_base(self) -> bool:
        return any(parameter.requires_grad for name, parameter in self._parameters.items()
                   if parameter is not None and "lora" not in name)

    def serves_few_rows(self) -> bool:
        """Whether kernels for few rows read these weights as they are held."""
        return all(self.weights(name).serves_few_rows for name in PROJECTIONS)

    def project(self, name: str, x: torch.Tensor, offsets: list[int]) -> torch.Tensor:
        """The reference: rows x [R, in] in expert order, offsets [E + 1] -> [R, out]."""
        return grouped_linear(x, self.weights(name), offsets, **self._lora(name))


class Bf16Experts(_Experts):
    """Dense weights [E, in, out] in the model's dtype; trainable."""

    def __init__(self, config: GptOssConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__(config, device=device, dtype=dtype)
        for name, (size_in, size_out) in self.sizes.items():
            weight = torch.empty(config.num_local_experts, size_in, size_out, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def weights(self, name: str) -> Dense:
        """A projection as the kernels take it."""
        return Dense(self._parameters[name], self._parameters[f"{name}_bias"])

    def dense(self, name: str, expert: int) -> torch.Tensor:
        """[out, in] fp32 of one expert."""
        return self._parameters[name].detach()[expert].float().T


class _PackedExperts(_Experts):
    """Frozen weights as a checkpoint packs them, dequantised where they are used; `layout` is how they lie, a class of
    kernels/packed/weights.py, and `settings` what it takes beside two tensors and the bias."""

    layout: type[Packed]
    settings: tuple[bool, ...] = ()

    def _hold(self, name: str, *tensors: torch.Tensor) -> None:
        for suffix, tensor in zip(PACKED_SUFFIXES[self.layout], tensors):
            self.register_buffer(name + suffix, tensor)

    def _packed(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Both tensors in the layout they are held in."""
        return tuple(self._buffers[name + suffix] for suffix in PACKED_SUFFIXES[self.layout])

    def weights(self, name: str) -> Packed:
        return self.layout(*self._packed(name), self._parameters[f"{name}_bias"], *self.settings)


class Mxfp4Experts(_PackedExperts):
    """Packed weights, uint8, frozen: blocks [E, out, in/32, 16] and scales [E, out, in/32].

    They lie as in a checkpoint or, after to_fragments(), permuted in place for the tensor cores (kernels/packed/fragments.py).
    The buffers are named after it, NAME_blocks and NAME_scales or NAME_block_fragments and NAME_scale_fragments, so that bytes
    in one layout are never read or loaded as the other. packed() gives the checkpoint's."""

    def __init__(self, config: GptOssConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.layout = Mxfp4
        for name, (size_in, size_out) in self.sizes.items():
            shape = (config.num_local_experts, size_out, size_in // 32)
            blocks = torch.empty(*shape, 16, device=device, dtype=torch.uint8)
            self._hold(name, blocks, torch.empty(shape, device=device, dtype=torch.uint8))

    def to_fragments(self) -> None:
        """Permutes the weights in place, where their sizes allow, and finds out how they unpack. For loading: waits for the
        device."""
        assert self.layout is Mxfp4, f"packed weights lie as {self.layout.__name__} already"
        pairs = {name: self._packed(name) for name in PROJECTIONS}
        if not all(can_permute(blocks) for blocks, _ in pairs.values()):
            return
        self.settings = (all(is_foldable(scales) for _, scales in pairs.values()),)
        for name, pair in pairs.items():
            for suffix in PACKED_SUFFIXES[Mxfp4]:
                del self._buffers[name + suffix]
            to_fragments_(*pair)
        self.layout = Mxfp4Fragments
        for name, pair in pairs.items():
            self._hold(name, *pair)

    def packed(self, name: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks [out, in/32, 16] and scales [out, in/32] of one expert as a checkpoint holds them; new tensors or views."""
        part = slice(expert, expert + 1)
        blocks, scales = (tensor[part] for tensor in self._packed(name))
        if self.layout is Mxfp4Fragments:
            blocks, scales = from_fragments(blocks, scales)
        return blocks[0], scales[0]

    def dense(self, name: str, expert: int) -> torch.Tensor:
        """[out, in] fp32 of one expert."""
        return dequantize(*self.packed(name, expert), torch.float32)


class Nf4Experts(_PackedExperts):
    """Packed weights, frozen: codes [E, out, in/2] uint8 and absmax [E, out * in/64] fp32 (kernels/packed/nf4.py)."""

    layout = Nf4

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


EXPERTS = {"bf16": Bf16Experts, "mxfp4": Mxfp4Experts, "nf4": Nf4Experts}
