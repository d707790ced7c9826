"""OpenAI's `original/` checkpoint layout, as a renaming of the Hugging Face one.

q, k and v are one matrix there, rows q | k | v; everything else is the same tensor under another name, packed experts
byte for byte. Dense experts, which OpenAI's own files never hold, are taken as `mlp1_weight`/`mlp2_weight` [E, out,
in], the orientation their code computes with. Source: openai/gpt-oss, gpt_oss/torch/{weights,model}.py.
"""

import dataclasses

import torch

from models.config import GptOssConfig
from models.formats.files import DerivedTensor, Stored, StoredTensor, TensorToWrite

_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "unembedding.weight": "lm_head.weight",
    "norm.scale": "model.norm.weight",
}
_BLOCK = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.sinks": "self_attn.sinks",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_weight": "mlp.experts.gate_up_proj",
    "mlp.mlp1_weight.blocks": "mlp.experts.gate_up_proj_blocks",
    "mlp.mlp1_weight.scales": "mlp.experts.gate_up_proj_scales",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_weight": "mlp.experts.down_proj",
    "mlp.mlp2_weight.blocks": "mlp.experts.down_proj_blocks",
    "mlp.mlp2_weight.scales": "mlp.experts.down_proj_scales",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
}
_DENSE_EXPERTS = ("mlp.mlp1_weight", "mlp.mlp2_weight")


def is_original(tensors: dict[str, StoredTensor]) -> bool:
    return "embedding.weight" in tensors or any(name.startswith("block.") for name in tensors)


def to_hugging_face(tensors: dict[str, StoredTensor], config: GptOssConfig) -> dict[str, Stored]:
    """The stored tensors under Hugging Face names, qkv as three ranges of rows; unknown names are kept as they are."""
    q_end = config.num_attention_heads * config.head_dim
    k_end = q_end + config.num_key_value_heads * config.head_dim
    renamed = {}
    for name, stored in tensors.items():
        block, _, part = name.partition(".")[2].partition(".")  # "block.3.attn.sinks" -> "3", "attn.sinks"
        prefix = f"model.layers.{block}."
        if name in _TOP:
            renamed[_TOP[name]] = stored
        elif name.startswith("block.") and part in _DENSE_EXPERTS and len(stored.shape) == 3:
            num, size_out, size_in = stored.shape
            renamed[prefix + _BLOCK[part]] = DerivedTensor(
                stored.path, stored.dtype, (num, size_in, size_out), lambda stored=stored: stored.read().transpose(1, 2)
            )
        elif name.startswith("block.") and part in _BLOCK:
            renamed[prefix + _BLOCK[part]] = stored
        elif name.startswith("block.") and part in ("attn.qkv.weight", "attn.qkv.bias"):
            ranges = {"q": (0, q_end), "k": (q_end, k_end), "v": (k_end, max(k_end, stored.shape[0]))}
            for projection, (first, end) in ranges.items():
                renamed[f"{prefix}self_attn.{projection}_proj.{part.rpartition('.')[2]}"] = DerivedTensor(
                    stored.path, stored.dtype, (end - first, *stored.shape[1:]),
                    lambda stored=stored, first=first, end=end: stored.read()[first:end],
                )
        else:
            renamed[name] = stored
    return renamed


def from_hugging_face(plan: list[TensorToWrite], config: GptOssConfig) -> list[TensorToWrite]:
    """The tensors of a Hugging Face export as those of the original layout: q, k and v joined, the others renamed."""
    by_name = {tensor.name: tensor for tensor in plan}
    renamed = [dataclasses.replace(by_name.pop(theirs), name=ours) for ours, theirs in _TOP.items()]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [by_name.pop(f"{prefix}self_attn.{projection}_proj.{kind}") for projection in "qkv"]
            renamed.append(TensorToWrite(f"block.{layer}.attn.qkv.{kind}", sum(part.num_bytes for part in parts),
                                         lambda parts=parts: torch.cat([part.make() for part in parts])))
        for ours, theirs in _BLOCK.items():
            if (tensor := by_name.pop(prefix + theirs, None)) is None:
                continue  # experts are either dense or packed
            if ours in _DENSE_EXPERTS:
                tensor = dataclasses.replace(tensor, make=lambda make=tensor.make: make().transpose(1, 2))
            renamed.append(dataclasses.replace(tensor, name=f"block.{layer}.{ours}"))
    assert not by_name, f"tensors without a name in the original layout: {sorted(by_name)}"
    return renamed
