"""Which parameters train: LoRA adapters (arXiv 2106.09685) on attention, experts and router, or everything.

An adapter is never merged: y += (alpha / rank) * B (A x). On experts there is an A and a B for each expert. A starts
Kaiming-uniform (a = sqrt 5, as PEFT does), B at zero, both fp32 whatever the base.
"""
import math
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from models.experts import PROJECTIONS
from models.gpt_oss import GptOss
from models.projections import Linear, side_by_side

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "router", "experts")


@dataclass
class LoraConfig:
    rank: int
    alpha: float
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "experts"])
    train_sinks: bool = False
    train_norms: bool = False


def _pair(lead: tuple[int, ...], size_in: int, size_out: int, rank: int, generator: torch.Generator, device: torch.device,
          own: range | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """own: the experts that are here; all are drawn, so that the draws do not depend on it."""
    bound = math.sqrt(1.0 / size_in)  # Kaiming uniform with a = sqrt(5)
    down = (torch.rand(*lead, rank, size_in, generator=generator) * 2 - 1) * bound
    if own is not None and len(own) < len(down):
        down, lead = down[own.start:own.stop].clone(), (len(own),)
    return down.to(device), torch.zeros(*lead, size_out, rank, device=device)


def _attach(modules: list[Linear], config: LoraConfig, generator: torch.Generator) -> None:
    """Attaches adapters to projections of the same input, with their tensors side by side."""
    if not modules:
        return
    pairs = [_pair((), *module.weight.shape[::-1], config.rank, generator, module.weight.device) for module in modules]
    parts = [side_by_side(torch.cat(side), [len(tensor) for tensor in side]) for side in zip(*pairs)]
    for module, lora_A, lora_B in zip(modules, *parts):
        module.lora_A, module.lora_B = lora_A.requires_grad_(), lora_B.requires_grad_()
        module.lora_scale = config.alpha / config.rank


def attach_lora(model: GptOss, config: LoraConfig, *, seed: int) -> None:
    """Adds adapters to the targets of every layer and marks trainable parameters; all others stay frozen. Raises ValueError for a
    model that already has an adapter."""
    assert set(config.targets) <= set(TARGETS), f"targets {config.targets} of an adapter; there are {TARGETS}"
    if model.adapter is not None:
        raise ValueError("attach_lora: the model already carries an adapter")
    model.adapter = config
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same start on any device
    for block in model.model.layers:
        dense = {name: getattr(block.self_attn, name) for name in TARGETS[:4]} | {"router": block.mlp.router}
        for names in (TARGETS[:3], TARGETS[3:4], TARGETS[4:5]):
            _attach([dense[name] for name in names if name in config.targets], config, generator)
        experts = block.mlp.experts
        if "experts" in config.targets:
            for name in PROJECTIONS:
                pair = _pair((model.config.num_local_experts,), *experts.sizes[name], config.rank, generator, model.device,
                             experts.own)
                for side, tensor in zip("AB", pair):
                    setattr(experts, f"{name}_lora_{side}", nn.Parameter(tensor))
            experts.lora_scale = config.alpha / config.rank
        block.self_attn.sinks.requires_grad_(config.train_sinks)
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.requires_grad_(config.train_norms)
    model.model.norm.weight.requires_grad_(config.train_norms)


def set_full_training(model: GptOss) -> None:
    """Makes every parameter trainable; raises ValueError where the experts are packed (frozen by nature)."""
    if model.expert_format.is_packed:
        raise ValueError("model.train=full needs dense experts, this model holds them packed as "
                         f"{model.expert_format.name.upper()}: set model.experts=bf16 (dequantises on loading) or "
                         "model.train=lora")
    if streamed := model.expert_store.placement.num_streamed_update:
        raise ValueError(f"model.train=full: the experts of {streamed} layers stream from host memory, which only frozen ones "
                         "can: give the model more GPU memory (model.memory_gb), or set model.train=lora")
    if model.share is not None:
        raise ValueError("model.train=full: each process holds some of the experts, and only frozen ones can be divided so: set "
                         "model.train=lora, or distributed.expert_parallel=1")
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def describe_trainable(model: GptOss) -> str:
    """A line of at most 80 characters per product, norm or table that trains: its name within a layer, the number of layers,
    the shapes of its tensors (an adapter's A and B, weight and bias), the number of parameters in all layers. Of what processes
    share, the whole."""
    kinds: dict[str, list[list[int]]] = {}
    for name in model.trainable_parameters():
        kind = re.sub(r"[._](lora_[AB]|weight|bias)$", "", re.sub(r"^model\.(layers\.\d+\.)?", "", name))
        kinds.setdefault(kind, []).append(model.whole_shape(name))
    lines, total = [], 0
    for kind, group in kinds.items():
        shapes = list(dict.fromkeys(str(shape) for shape in group))
        num_each = len(group) // len(shapes)
        num_parameters = sum(math.prod(shape) for shape in group)
        total += num_parameters
        lines.append(f"  {kind:<24} {num_each:>3} x {' '.join(shapes):<31} {num_parameters:>13,}")
    return "\n".join([*lines, f"  trainable parameters: {total:,} of {count_parameters(model):,}"])


def _num_packed_weights(model: GptOss) -> int:
    """Gate, up and down of all experts; 0 where they are parameters."""
    config = model.config
    num_layers = config.num_hidden_layers * model.expert_format.is_packed
    return num_layers * config.num_local_experts * 3 * config.hidden_size * config.intermediate_size


def count_parameters(model: GptOss) -> int:
    """Parameters of the model, packed weights counted as the values they stand for."""
    return _num_packed_weights(model) + sum(math.prod(model.whole_shape(name)) for name, _ in model.named_parameters())


def count_active_parameters(model: GptOss) -> int:
    """Parameters that one token uses: everything but the experts it is not routed to and the other rows of the embedding."""
    config = model.config
    experts = _num_packed_weights(model)
    experts += sum(math.prod(model.whole_shape(name)) for name, _ in model.named_parameters() if ".mlp.experts." in name)
    embedding = config.vocab_size * config.hidden_size
    idle = experts * (config.num_local_experts - config.num_experts_per_tok) // config.num_local_experts
    return count_parameters(model) - idle - embedding + config.hidden_size
