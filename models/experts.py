"""Mixture-of-experts weights in the formats a checkpoint can hold: bf16 (or fp32) tensors and packed MXFP4.

The classes share constructor and forward and name their parameters as the checkpoint does. LoRA on experts is one A and one B for
each expert, never merged, whatever the format of the base.

Shapes: E experts, T tokens, A experts per token, R routed rows, D model width, F expert width.
"""
from __future__ import annotations

import torch
from torch import nn

from kernels.grouped_gemm import grouped_linear, grouped_linear_mxfp4
from kernels.launch import is_triton
from kernels.moe import ExpertWeights
from kernels.routing import Routing, combine, dispatch
from kernels.swiglu import swiglu
from models.config import GptOssConfig

PROJECTIONS = ("gate_up_proj", "down_proj")


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
        return ExpertWeights(self._parameters[name], None, None, self._parameters[f"{name}_bias"], scratch_bytes)


class Mxfp4Experts(_Experts):
    """Packed weights: blocks [E, out, in/32, 16] and scales [E, out, in/32], uint8, frozen."""

    def __init__(self, config: GptOssConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__(config, device=device, dtype=dtype)
        for name, (size_in, size_out) in self.sizes.items():
            shape = (config.num_local_experts, size_out, size_in // 32)
            self.register_buffer(f"{name}_blocks", torch.empty(*shape, 16, device=device, dtype=torch.uint8))
            self.register_buffer(f"{name}_scales", torch.empty(shape, device=device, dtype=torch.uint8))

    def project(self, name: str, x: torch.Tensor, offsets: torch.Tensor | list[int]) -> torch.Tensor:
        return grouped_linear_mxfp4(x, self._buffers[f"{name}_blocks"], self._buffers[f"{name}_scales"],
                                    self._parameters[f"{name}_bias"], offsets, **self._lora(name))

    def held(self, name: str, scratch_bytes: int) -> ExpertWeights:
        """The weights as the GPU's forward and backward take them; at most scratch_bytes dequantised at once."""
        return ExpertWeights(None, self._buffers[f"{name}_blocks"], self._buffers[f"{name}_scales"],
                             self._parameters[f"{name}_bias"], scratch_bytes)
