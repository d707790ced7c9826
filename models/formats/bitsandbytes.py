"""Checkpoints that bitsandbytes packed as NF4, expert by expert, under the Hugging Face names of the model's own tensors.

Such a file (unsloth's `*-unsloth-bnb-4bit`) holds a matrix per expert: experts.gate_up_projs.E.weight and down_projs.E.weight,
[out * in / 2, 1] uint8, with a bias [out] each. Beside every packed weight lie .absmax, .quant_map and
.quant_state.bitsandbytes__nf4 (a JSON object as bytes); with double quantisation absmax is uint8 itself, and .nested_absmax and
.nested_quant_map say of what. Any dense projection may be packed too, which its quant_state shows: those are dequantised when
they are read. The router is called router.linear there.

Experts become one tensor a projection: codes [E, out, in / 2] and absmax [E, out * in / 64] fp32 (kernels/packed/nf4.py).

Source: bitsandbytes, functional.py (QuantState.as_dict, dequantize_4bit); unsloth's checkpoints of gpt-oss-20b.
"""
from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.packed.nf4 import BLOCK_SIZE, CODE, dequantize_nf4_reference
from models.config import GptOssConfig
from models.formats.files import CheckpointError, StoredTensor, read_all

_STATE = ".quant_state.bitsandbytes__nf4"
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up|down)_projs\.(\d+)\.(weight|bias)")


@dataclass(frozen=True)
class _Packed:
    """A packed matrix [out, in]."""

    weight: StoredTensor
    state: StoredTensor
    absmax: StoredTensor
    quant_map: StoredTensor
    nested: tuple[StoredTensor, StoredTensor] | None  # absmax and map of absmax
    shape: tuple[int, int]

    def parts(self) -> list[StoredTensor]:
        return [self.state, self.absmax, self.quant_map, *(self.nested or ())]

    def factors(self, state: torch.Tensor, absmax: torch.Tensor, quant_map: torch.Tensor, *nested: torch.Tensor) -> torch.Tensor:
        """absmax [out * in / 64] fp32 from the parts read."""
        name, path = self.weight.name, self.weight.path
        described = json.loads(bytes(state.tolist()))
        found = {key: described.get(key) for key in ("quant_type", "blocksize", "shape")}
        wanted = {"quant_type": "nf4", "blocksize": BLOCK_SIZE, "shape": list(self.shape)}
        if found != wanted:
            raise CheckpointError(f"{path}: {name} is packed as {found}, expected {wanted}; fetch a checkpoint of this model "
                                  "in NF4")
        if quant_map.tolist() != torch.tensor(CODE).tolist():
            raise CheckpointError(f"{path}: {name}.quant_map is not NF4's; fetch a checkpoint in NF4")
        if nested:
            size = described["nested_blocksize"]
            groups = nested[0].repeat_interleave(size)[:absmax.numel()]
            absmax = nested[1][absmax.long().flatten()] * groups + described["nested_offset"]
        if absmax.numel() * BLOCK_SIZE != self.shape[0] * self.shape[1]:
            raise CheckpointError(f"{path}: {name}.absmax has {absmax.numel()} blocks, expected "
                                  f"{self.shape[0] * self.shape[1] // BLOCK_SIZE}; fetch the checkpoint again")
        return absmax.float().flatten()


@dataclass(frozen=True)
class Derived:
    """A tensor made of stored ones; `kind` says how. Used like a StoredTensor."""

    name: str
    kind: str  # "codes" | "absmax" | "dense" | "stack"
    parts: tuple[_Packed | StoredTensor, ...]
    shape: tuple[int, ...]
    dtype: str  # safetensors' name

    @property
    def path(self) -> Path:
        first = self.parts[0]
        return first.weight.path if isinstance(first, _Packed) else first.path

    def read(self) -> torch.Tensor:
        if self.kind == "stack":
            return torch.stack(read_all(self.parts))
        if self.kind == "codes":
            return torch.stack([codes.view(part.shape[0], -1) for part, codes in
                                zip(self.parts, read_all([part.weight for part in self.parts]))])
        tensors = iter(read_all([stored for part in self.parts for stored in part.parts()]))
        factors = [part.factors(*(next(tensors) for _ in part.parts())) for part in self.parts]
        if self.kind == "absmax":
            return torch.stack(factors)
        (part,), (absmax,) = self.parts, factors
        return dequantize_nf4_reference(part.weight.read().view(part.shape[0], -1), absmax, torch.float32)


def is_bitsandbytes(tensors: dict[str, StoredTensor], config: GptOssConfig) -> bool:
    return config.quantization.get("quant_method") == "bitsandbytes" or any(name.endswith(_STATE) for name in tensors)


def unpacked_names(tensors: dict[str, StoredTensor], config: GptOssConfig) -> dict[str, StoredTensor | Derived]:
    """The stored tensors under the model's names. What does not belong to a whole packed tensor keeps its own, and so is reported
    as missing and unused. Raises CheckpointError for a packed weight that lacks one of its parts or has another size."""
    remaining, renamed = dict(tensors), {}
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    shapes = {"gate_up": (2 * inner, width), "down": (width, inner), "o_proj": (width, config.num_attention_heads * head),
              "q_proj": (config.num_attention_heads * head, width), "k_proj": (config.num_key_value_heads * head, width),
              "v_proj": (config.num_key_value_heads * head, width)}

    def take(name: str, kind: str) -> _Packed:
        names = {part: f"{name}.{part}" for part in ("absmax", "quant_map")} | {"state": name + _STATE}
        nested = [f"{name}.nested_{part}" for part in ("absmax", "quant_map")]
        is_nested = any(part in remaining for part in nested)
        wanted = [*names.values(), *(nested if is_nested else ())]
        if missing := [part for part in wanted if part not in remaining]:
            raise CheckpointError(f"{remaining[name].path}: {name} is packed, but {missing} are not there; fetch the checkpoint "
                                  "again")
        parts = {part: remaining.pop(stored) for part, stored in names.items()}
        weight, shape = remaining.pop(name), shapes[kind]
        if weight.dtype != "U8" or 2 * math.prod(weight.shape) != shape[0] * shape[1]:
            raise CheckpointError(f"{weight.path}: {name} is {weight.dtype} {list(weight.shape)}, expected U8 of "
                                  f"{shape[0] * shape[1] // 2:,} bytes for {list(shape)}; config.json is of another model")
        return _Packed(weight, **parts, nested=tuple(remaining.pop(part) for part in nested) if is_nested else None, shape=shape)

    experts: dict[str, dict[int, str]] = {}  # of a projection's weights or biases -> by expert
    for name in tensors:
        if match := _EXPERT.fullmatch(name):
            prefix, kind, expert, part = match.groups()
            experts.setdefault(f"{prefix}{kind}_proj.{part}", {})[int(expert)] = name
    for target, names in experts.items():
        if sorted(names) != list(range(config.num_local_experts)):
            continue
        stem, _, part = target.rpartition(".")
        ordered = [names[expert] for expert in range(config.num_local_experts)]
        if part == "bias":
            stored = tuple(remaining.pop(name) for name in ordered)
            renamed[f"{stem}_bias"] = Derived(f"{stem}_bias", "stack", stored, (len(stored), *stored[0].shape), stored[0].dtype)
            continue
        parts = tuple(take(name, stem.rpartition(".")[2].removesuffix("_proj")) for name in ordered)
        out, size_in = parts[0].shape
        renamed[f"{stem}_codes"] = Derived(f"{stem}_codes", "codes", parts, (len(parts), out, size_in // 2), "U8")
        shape = (len(parts), out * size_in // BLOCK_SIZE)
        renamed[f"{stem}_absmax"] = Derived(f"{stem}_absmax", "absmax", parts, shape, "F32")
    for name in [name.removesuffix(_STATE) for name in list(remaining) if name.endswith(_STATE)]:
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind in shapes and name in remaining:
            part = take(name, kind)
            renamed[name] = Derived(name, "dense", (part,), part.shape, "F32")
    for name, stored in remaining.items():
        renamed[name.replace(".mlp.router.linear.", ".mlp.router.")] = stored
    return renamed
