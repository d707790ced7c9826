"""Checkpoints that bitsandbytes packed as NF4, expert by expert, under the Hugging Face names of the model's own tensors.

Such a file (unsloth's `*-unsloth-bnb-4bit`) holds a matrix per expert: experts.gate_up_projs.E.weight and down_projs.E.weight,
[out * in / 2, 1] uint8, with a bias [out] each. Beside every packed weight lie .absmax, .quant_map and
.quant_state.bitsandbytes__nf4 (a JSON object as bytes); with double quantisation absmax is uint8 itself, and .nested_absmax and
.nested_quant_map say of what. Any dense projection may be packed too, which its quant_state shows: those are dequantised when
they are read. The router is called router.linear there.

Experts become one tensor a projection: codes [E, out, in / 2] and absmax [E, out * in / 64] fp32 (kernels/packed/nf4.py).

Source: bitsandbytes, functional.py (QuantState.as_dict, dequantize_4bit); unsloth's checkpoints of gpt-oss-20b.
"""
import json
import math
from dataclasses import dataclass
from functools import partial

import torch

from kernels.packed.nf4 import BLOCK_SIZE, CODE, dequantize_nf4_reference
from kernels.packed.weights import Nf4
from models.config import GptOssConfig
from models.formats.files import CheckpointError, DerivedTensor, Stored, StoredTensor, read_all

_STATE = ".quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class _PackedMatrix:
    """A packed matrix [out, in] and its further tensors: state, absmax, quant_map and, with double quantisation, nested_absmax
    and nested_quant_map."""

    weight: StoredTensor
    beside: dict[str, StoredTensor]
    shape: tuple[int, int]


def _stack(tensors: list[StoredTensor]) -> torch.Tensor:
    return torch.stack(read_all(tensors))


def _codes(matrices: list[_PackedMatrix]) -> torch.Tensor:
    """[E, out, in / 2] uint8."""
    return _stack([matrix.weight for matrix in matrices]).view(len(matrices), matrices[0].shape[0], -1)


def _absmax(matrices: list[_PackedMatrix]) -> torch.Tensor:
    """[E, out * in / 64] fp32. Reads all of it at once, so that each file is opened once."""
    read = iter(read_all([stored for matrix in matrices for stored in matrix.beside.values()]))
    return torch.stack([_absmax_of(matrix, {part: next(read) for part in matrix.beside}) for matrix in matrices])


def _absmax_of(matrix: _PackedMatrix, beside: dict[str, torch.Tensor]) -> torch.Tensor:
    """absmax [out * in / 64] fp32 from a matrix's further tensors. Raises CheckpointError if they are not NF4 of its size."""
    name, path = matrix.weight.name, matrix.weight.path
    described = json.loads(bytes(beside["state"].tolist()))
    found = {key: described.get(key) for key in ("quant_type", "blocksize", "shape")}
    wanted = {"quant_type": "nf4", "blocksize": BLOCK_SIZE, "shape": list(matrix.shape)}
    if found != wanted:
        raise CheckpointError(f"{path}: {name} is packed as {found}, expected {wanted}; fetch a checkpoint of this model in NF4")
    if beside["quant_map"].tolist() != torch.tensor(CODE).tolist():
        raise CheckpointError(f"{path}: {name}.quant_map is not NF4's; fetch a checkpoint in NF4")
    absmax, num_blocks = beside["absmax"], math.prod(matrix.shape) // BLOCK_SIZE
    if "nested_absmax" in beside:
        factors = beside["nested_absmax"].repeat_interleave(described["nested_blocksize"])[:absmax.numel()]
        absmax = beside["nested_quant_map"][absmax.long().flatten()] * factors + described["nested_offset"]
    if absmax.numel() != num_blocks:
        raise CheckpointError(f"{path}: {name}.absmax has {absmax.numel()} blocks, expected {num_blocks}; fetch the checkpoint "
                              "again")
    return absmax.float().flatten()


def _dense(matrix: _PackedMatrix) -> torch.Tensor:
    """[out, in] fp32."""
    return dequantize_nf4_reference(_codes([matrix])[0], _absmax([matrix])[0], torch.float32)


def is_bitsandbytes(tensors: dict[str, StoredTensor], config: GptOssConfig) -> bool:
    return config.quantization.get("quant_method") == "bitsandbytes" or any(name.endswith(_STATE) for name in tensors)


def unpacked_names(tensors: dict[str, StoredTensor], config: GptOssConfig) -> dict[str, Stored]:
    """The stored tensors under the model's names. Tensors that are not part of a complete packed tensor keep their names, and
    so are reported as unused. Raises CheckpointError for a packed weight that lacks one of its parts or has another size."""
    remaining, renamed = dict(tensors), {}
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    shapes = {"gate_up": (2 * inner, width), "down": (width, inner), "o_proj": (width, config.num_attention_heads * head),
              "q_proj": (config.num_attention_heads * head, width), "k_proj": (config.num_key_value_heads * head, width),
              "v_proj": (config.num_key_value_heads * head, width)}

    def take(name: str, kind: str) -> _PackedMatrix:
        nested = ["nested_absmax", "nested_quant_map"]
        is_nested = any(f"{name}.{part}" in remaining for part in nested)
        names = {part: f"{name}.{part}" for part in ["absmax", "quant_map", *(nested if is_nested else [])]}
        names["state"] = name + _STATE
        if missing := [stored for stored in names.values() if stored not in remaining]:
            raise CheckpointError(f"{remaining[name].path}: {name} is packed, but {missing} are not there; fetch the checkpoint "
                                  "again")
        weight, shape = remaining.pop(name), shapes[kind]
        if weight.dtype != "U8" or 2 * math.prod(weight.shape) != math.prod(shape):
            raise CheckpointError(f"{weight.path}: {name} is {weight.dtype} {list(weight.shape)}, expected U8 of "
                                  f"{math.prod(shape) // 2:,} bytes for {list(shape)}; config.json is of another model")
        return _PackedMatrix(weight, {part: remaining.pop(stored) for part, stored in names.items()}, shape)

    for layer in range(config.num_hidden_layers):
        for kind in ("gate_up", "down"):
            stem = f"model.layers.{layer}.mlp.experts.{kind}_proj"
            biases, weights = ([f"{stem}s.{expert}.{part}" for expert in range(config.num_local_experts)]
                               for part in ("bias", "weight"))
            if all(name in remaining for name in biases):
                parts = [remaining.pop(name) for name in biases]
                renamed[f"{stem}_bias"] = DerivedTensor(parts[0].path, parts[0].dtype, (len(parts), *parts[0].shape),
                                                        partial(_stack, parts))
            if all(name in remaining for name in weights):
                matrices = [take(name, kind) for name in weights]
                path, (size_out, size_in) = matrices[0].weight.path, shapes[kind]
                (codes, _), (absmax, _) = Nf4.stored(len(matrices), size_in, size_out)
                renamed[f"{stem}_codes"] = DerivedTensor(path, "U8", codes, partial(_codes, matrices))
                renamed[f"{stem}_absmax"] = DerivedTensor(path, "F32", absmax, partial(_absmax, matrices))
    for name in [name.removesuffix(_STATE) for name in list(remaining) if name.endswith(_STATE)]:
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind in shapes and name in remaining:
            matrix = take(name, kind)
            renamed[name] = DerivedTensor(matrix.weight.path, "F32", matrix.shape, partial(_dense, matrix))
    for name, stored in remaining.items():
        renamed[name.replace(".mlp.router.linear.", ".mlp.router.")] = stored
    return renamed
