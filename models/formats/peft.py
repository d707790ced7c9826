"""LoRA adapters as PEFT stores them (adapter_config.json, adapter_model.safetensors), in, out and merged.

File layout, checked against peft 0.21: attention and router tensors `lora_A.weight` [r, in], `lora_B.weight` [out, r].
On experts one pair of tensors holds all of them: A [E * r, in] is expert-major (row e * r + k), B [out, r * E] is
rank-major (column k * E + e). `mlp.experts.base_layer.*` is gate_up_proj, `mlp.experts.*` down_proj; vLLM asserts that
both are there, so both are always written.

Reading goes by the tensors in the file (peft_config.py has the settings): what it leaves out, a projection, layers,
experts, is without effect (B = 0).

Trained norms and sinks have no place in that layout that other tools accept next to LoRA: they go to
trained_weights.safetensors beside the adapter, under their Hugging Face names. `load_adapter` reads them back; PEFT
and vLLM ignore the file, so serve such a model from a merged export (scripts/export.py) instead.

Shapes: E experts, r rank.
"""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from models.block import Block
from models.experts import PROJECTIONS
from models.formats.files import (
    CheckpointError,
    StoredTensor,
    atomic_folder,
    list_file,
    misshapen_tensors,
    shortened,
    write_tensors,
)
from models.formats.peft_config import CONFIG_NAME, PeftSettings, read_settings
from models.gpt_oss import GptOss
from models.lora import TARGETS, LoraConfig, attach_lora

WEIGHTS_NAME = "adapter_model.safetensors"
TRAINED_NAME = "trained_weights.safetensors"
ATTENTION = TARGETS[:4]
# what an adapter can change in a layer -> its path there, and its path in an adapter's file
PATHS = {**{name: f"self_attn.{name}" for name in ATTENTION}, "router": "mlp.router",
         **{name: f"mlp.experts.{name}" for name in PROJECTIONS}}
_STORED_PATHS = PATHS | {"gate_up_proj": "mlp.experts.base_layer", "down_proj": "mlp.experts"}
# a tensor of an adapter in a gpt-oss layer; experts in one wrapper (two: the inner one is gate_up_proj) or matrix by matrix, as
# unsloth's NF4 models hold them, whose router is router.linear
_KEY = re.compile(r"(?P<key>base_model\.model\.model\.layers\.(?P<layer>\d+)\."
                  r"(?:self_attn\.(?P<attention>[qkvo]_proj)|mlp\.(?P<router>router)(?:\.linear)?"
                  r"|mlp\.experts(?:(?P<inner>\.base_layer)?|\.(?P<matrix>gate_up|down)_projs\.(?P<expert>\d+))))"
                  r"\.lora_(?P<side>[AB])\.weight")


def has_expert_adapter(model: GptOss, name: str | None = None) -> bool:
    """Whether an adapter changes any expert weight, or the one of Hugging Face name `name`; B = 0 changes nothing."""
    return any(bool(parameter.any()) for key, parameter in model.named_parameters()
               if ".mlp.experts." in key and key.endswith("_lora_B" if name is None else f"{name}_lora_B"))


def merged_weight(model: GptOss, name: str, weight: torch.Tensor, *, expert: int | None = None) -> torch.Tensor:
    """weight + (alpha / r) B A in fp32, or `weight` itself if no adapter changes it.

    name: Hugging Face name of the tensor. weight: [out, in], of one `expert` where the tensor holds all of them.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    parameters = dict(module.named_parameters(recurse=False))
    stem = "lora_" if expert is None else f"{leaf}_lora_"
    if (expert is None and leaf != "weight") or stem + "A" not in parameters:
        return weight
    lora_A, lora_B = (parameters[stem + side].detach() for side in "AB")
    if expert is not None:
        lora_A, lora_B = lora_A[expert], lora_B[expert]
    return weight.float() + module.lora_scale * (lora_B.float() @ lora_A.float())


def save_adapter(model: GptOss, folder: str | Path, *, base_model: str | None = None, only_experts: bool = False,
                 beside: dict[str, Path | str] | None = None,
                 read: Callable[[torch.nn.Parameter], torch.Tensor] = lambda parameter: parameter) -> None:
    """Writes the model's adapter (fp32) and its trained norms and sinks; replaces an adapter already in the folder.

    base_model: folder or hub id of the base, for tools that look it up. only_experts: leaves the attention and router
    out. beside: more files of the folder by name, copies of others or text. read: the whole of an adapter's parameter, where
    processes share experts. Raises ValueError for a model without an
    adapter and CheckpointError where the folder cannot be written.
    """
    config = model.adapter
    if config is None:
        raise ValueError("save_adapter: the model carries no adapter")
    if only_experts:
        config = LoraConfig(rank=config.rank, alpha=config.alpha, targets=["experts"])
    tensors = peft_tensors(model, config.targets, read=read)
    trained = {
        name: parameter.detach().cpu()
        for name, parameter in model.trainable_parameters().items()
        if not only_experts and "lora_" not in name and name.endswith(("norm.weight", ".sinks"))
    }
    num_bytes = sum(tensor.nbytes for tensor in [*tensors.values(), *trained.values()])
    files = {**(beside or {}), CONFIG_NAME: _peft_config(config, base_model)}
    replaceable = (CONFIG_NAME, WEIGHTS_NAME, TRAINED_NAME)
    with atomic_folder(Path(folder), num_bytes=num_bytes, files=files, replaceable=replaceable) as temporary:
        write_tensors(temporary / WEIGHTS_NAME, tensors)
        if trained:
            write_tensors(temporary / TRAINED_NAME, trained)


def _peft_config(config: LoraConfig, base_model: str | None) -> dict:
    parameters = [PATHS[name] for name in PROJECTIONS] if "experts" in config.targets else []
    parameters += ["mlp.router.weight"] if "router" in config.targets else []
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "target_modules": [name for name in ATTENTION if name in config.targets],
        "target_parameters": parameters or None,
    }


def _leaves(targets: list[str]) -> list[str]:
    return [leaf for target in targets for leaf in (PROJECTIONS if target == "experts" else (target,))]


def _adapter_of(block: Block, leaf: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of a projection, [E, r, in] and [E, out, r] of experts."""
    stem = f"{PATHS[leaf]}_lora_" if leaf in PROJECTIONS else f"{PATHS[leaf]}.lora_"
    return block.get_parameter(f"{stem}A"), block.get_parameter(f"{stem}B")


def peft_tensors(
    model: GptOss, targets: list[str], *, read: Callable[[torch.nn.Parameter], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`read` of each adapter parameter (itself, its gradient) under PEFT's names, in its layout, fp32 on the CPU."""
    tensors = {}
    for layer, block in enumerate(model.model.layers):
        for leaf in _leaves(targets):
            # laid out anew on the CPU: the GPU may have no memory left
            lora_A, lora_B = (read(parameter).detach().cpu() for parameter in _adapter_of(block, leaf))
            if leaf in PROJECTIONS:
                lora_A, lora_B = lora_A.flatten(0, 1), lora_B.permute(1, 2, 0).flatten(1)  # [E * r, in], [out, r * E]
            key = f"base_model.model.model.layers.{layer}.{_STORED_PATHS[leaf]}"
            tensors |= {f"{key}.lora_A.weight": lora_A, f"{key}.lora_B.weight": lora_B}
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Pair:
    """A and B of one wrapper in an adapter's file."""

    layer: int
    leaf: str  # q_proj, k_proj, v_proj, o_proj, router, gate_up_proj or down_proj
    expert: int | None  # of a pair that belongs to one expert alone
    name: str  # as PEFT's patterns see it
    rank: int
    scale: float  # of B A
    key: str  # in the file, without .lora_A.weight
    A: StoredTensor
    B: StoredTensor

    @property
    def target(self) -> str:
        return "experts" if self.leaf in PROJECTIONS else self.leaf


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """The targets, rank and scale of an adapter in PEFT form.

    rank: the largest of its modules. alpha: such that alpha / rank is the scale that PEFT gives a module of that rank
    without an entry in alpha_pattern. Raises CheckpointError naming the file and the setting for anything this project's
    LoRA does not compute.
    """
    settings = read_settings(Path(folder))
    return _lora_config(settings, _read_pairs(settings)[0])


def _lora_config(settings: PeftSettings, pairs: list[_Pair]) -> LoraConfig:
    folder = settings.path.parent
    rank = max((pair.rank for pair in pairs), default=settings.rank)
    targets = {pair.target for pair in pairs}
    trained = list(list_file(folder / TRAINED_NAME)) if (folder / TRAINED_NAME).exists() else []
    return LoraConfig(rank=rank,
                      alpha=settings.content["lora_alpha"] * (math.sqrt(rank) if settings.content.get("use_rslora") else 1),
                      targets=[name for name in TARGETS if name in targets],
                      train_sinks=any(name.endswith(".sinks") for name in trained),
                      train_norms=any(name.endswith("norm.weight") for name in trained))


def _read_pairs(settings: PeftSettings) -> tuple[list[_Pair], list[str], list[str]]:
    """The (A, B) pairs of an adapter's file, the names without their other half, and the names that fit no gpt-oss layer."""
    folder = settings.path.parent
    path = folder / WEIGHTS_NAME
    if not path.exists():
        is_pickle = (folder / "adapter_model.bin").exists()
        way = (
            "adapter_model.bin is not read; convert it with: python -c \"import torch; from safetensors.torch import "
            "save_file; save_file({k: v.contiguous() for k, v in torch.load('adapter_model.bin', weights_only=True).items()}, "
            f"'{WEIGHTS_NAME}')\" in that folder"
            if is_pickle
            else "an adapter's tensors are read from there; fetch the file"
        )
        raise CheckpointError(f"{path}: not found; {way}")
    stored = list_file(path)
    halves, foreign = {}, []
    for key, tensor in stored.items():
        if (found := _KEY.fullmatch(key)) is None:
            foreign.append(key)
        else:
            halves.setdefault(found["key"], (found, {}))[1][found["side"]] = tensor
    alone = [f"{key}.lora_{other}.weight" for key, (_, both) in halves.items() for other in {"A", "B"} - set(both)]
    pairs = []
    for key, (found, both) in halves.items():
        if len(both) == 2:
            leaf, name = _identify(settings, found, has_inner=f"{key}.base_layer" in halves)
            expert = None if found["expert"] is None else int(found["expert"])
            rank, scale = settings.rank_of(name), settings.scale_of(name)
            pairs.append(_Pair(int(found["layer"]), leaf, expert, name, rank, scale, key, both["A"], both["B"]))
    return pairs, alone, foreign


def _identify(settings: PeftSettings, found: re.Match, *, has_inner: bool) -> tuple[str, str]:
    """The tensor that a wrapper adapts, and the wrapper's name as PEFT's patterns see it."""
    if found["matrix"]:
        matrix = f"mlp.experts.{found['matrix']}_projs.{found['expert']}"
        return f"{found['matrix']}_proj", f"model.layers.{found['layer']}.{matrix}"
    leaf = found["attention"] or found["router"]
    if leaf is None:
        is_alone = not found["inner"] and not has_inner  # then nothing but the settings tells which it is
        gate_up_is_chosen, down_is_chosen = (_name_of(settings, found["layer"], name)[1] for name in PROJECTIONS)
        is_gate_up = found["inner"] or (is_alone and gate_up_is_chosen and not down_is_chosen)
        leaf = "gate_up_proj" if is_gate_up else "down_proj"
    return leaf, _name_of(settings, found["layer"], leaf)[0]


def _name_of(settings: PeftSettings, layer: int | str, leaf: str) -> tuple[str, bool]:
    """The name of a projection as PEFT's patterns see it, as a module or as a parameter, and whether the settings choose it."""
    module = f"model.layers.{layer}.{PATHS[leaf]}"
    if leaf in ATTENTION and settings.selects(module):
        return module, True
    parameter = module if leaf in PROJECTIONS else f"{module}.weight"
    is_chosen = settings.selects_parameter(parameter)
    return module if leaf in ATTENTION and not is_chosen else parameter, is_chosen


def load_adapter(model: GptOss, folder: str | Path) -> None:
    """Reads an adapter into a model. If the model has none yet, attaches one with its rank, alpha and targets.

    Where a module's rank or scale is not the model's (rank_pattern, alpha_pattern), B takes up the difference, and the rank
    that is left over starts with B = 0; so do targets that the file leaves out in some layers or experts, with a warning: they
    are without effect until they train. Trained norms and sinks beside the adapter replace the model's. Raises CheckpointError
    naming what differs between the adapter the model carries and the one in the folder, and every missing, unused and
    misshapen tensor.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    pairs, missing, foreign = _read_pairs(settings)
    foreign += [pair.key for pair in pairs if pair.layer >= len(model.model.layers)]
    pairs = [pair for pair in pairs if pair.layer < len(model.model.layers)]
    wanted = _lora_config(settings, pairs)
    if not missing:  # what the settings choose and the file does not hold: a file cut short would load without a word
        present = {pair.name for pair in pairs}
        named = [_name_of(settings, layer, leaf) for layer in range(len(model.model.layers)) for leaf in PATHS]
        missing = [name for name, is_chosen in named if is_chosen and name not in present]
    misshapen = [problem for pair in pairs for problem in _shape_problems(pair, model)]
    if missing or foreign or misshapen:
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME}: does not fit the model: missing: {shortened(missing)}; not used: "
            f"{shortened(foreign)}; wrong shape: {shortened(misshapen)}. The base has {len(model.model.layers)} layers; adapters "
            "are read on q_proj, k_proj, v_proj, o_proj, router and experts, by target_modules and target_parameters"
        )
    _check_holds_something(folder, wanted)
    if model.adapter is None:
        attach_lora(model, wanted, seed=0)
    else:
        _check_same(folder, model.adapter, wanted)
    _fill(model, pairs, wanted)
    if absent := _left_out(pairs, wanted.targets, model):
        warnings.warn(f"{folder}: holds nothing for {'; '.join(absent)}: there the adapter starts without effect", stacklevel=2)
    _load_trained(model, folder / TRAINED_NAME)


def check_adapter(folder: str | Path, held: LoraConfig) -> None:
    """Raises CheckpointError if an adapter's settings or the names in its file show that it cannot be read into a model that has
    `held`, or that there is nothing to read: a cheap check before the base is loaded."""
    wanted = read_adapter_config(folder)
    _check_holds_something(Path(folder), wanted)
    _check_same(Path(folder), held, wanted)


def _shape_problems(pair: _Pair, model: GptOss) -> list[str]:
    block, num_experts, rank = model.model.layers[pair.layer], model.config.num_local_experts, pair.rank
    if pair.target == "experts":
        size_in, size_out = block.mlp.experts.sizes[pair.leaf]
        if pair.expert is None:
            rank *= num_experts
        elif pair.expert >= num_experts:
            return [f"{pair.key} is of expert {pair.expert}, the model has {num_experts}"]
    else:
        size_out, size_in = block.get_submodule(PATHS[pair.leaf]).weight.shape
    stored = {tensor.name: tensor for tensor in (pair.A, pair.B)}
    return misshapen_tensors(stored, {pair.A.name: (rank, size_in), pair.B.name: (size_out, rank)})


@torch.no_grad()
def _fill(model: GptOss, pairs: list[_Pair], config: LoraConfig) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.zero_()
    for pair in pairs:
        lora_A, lora_B = _adapter_of(model.model.layers[pair.layer], pair.leaf)
        num_experts, own = model.config.num_local_experts, model.model.layers[pair.layer].mlp.experts.own
        if pair.expert is not None:
            if pair.expert not in own:
                continue
            lora_A, lora_B = lora_A[own.index(pair.expert)], lora_B[own.index(pair.expert)]
        stored_A, stored_B = pair.A.read().float(), pair.B.read().float()
        if lora_A.ndim == 3:  # all experts
            stored_A = stored_A.view(num_experts, pair.rank, -1)[own.start:own.stop]
            stored_B = stored_B.view(-1, pair.rank, num_experts).permute(2, 0, 1)[own.start:own.stop]
        lora_A[..., : pair.rank, :] = stored_A
        lora_B[..., : pair.rank] = stored_B * (pair.scale * config.rank / config.alpha)


def _left_out(pairs: list[_Pair], targets: list[str], model: GptOss) -> list[str]:
    """The layers that an adapter leaves out, for each projection it targets; single matrices if it has experts one by one."""
    said, num_layers = [], len(model.model.layers)
    for leaf in _leaves(targets):
        if absent := sorted(set(range(num_layers)) - {pair.layer for pair in pairs if pair.leaf == leaf}):
            said.append(f"{leaf} in layers {', '.join(map(str, absent))}")
    num_single = sum(pair.expert is not None for pair in pairs)
    num_all = len(PROJECTIONS) * num_layers * model.config.num_local_experts
    if 0 < num_single < num_all:
        said.append(f"{num_all - num_single} of {num_all} expert matrices")
    return said


def _check_holds_something(folder: Path, wanted: LoraConfig) -> None:
    if not (wanted.targets or wanted.train_norms or wanted.train_sinks):
        raise CheckpointError(f"{folder}: the adapter targets nothing and holds no norms or sinks, so nothing would train")


def _check_same(folder: Path, held: LoraConfig, wanted: LoraConfig) -> None:
    pairs = {"rank": (held.rank, wanted.rank), "alpha": (f"{held.alpha:g}", f"{wanted.alpha:g}"),
             "targets": (sorted(held.targets), sorted(wanted.targets))}
    different = [f"{key}: {ours} in the model, {theirs} in the adapter" for key, (ours, theirs) in pairs.items()
                 if ours != theirs]
    if different:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: not the adapter this model was set up for: {'; '.join(different)}; set "
            f"model.lora.rank={wanted.rank} model.lora.alpha={wanted.alpha:g} model.lora.targets=[{','.join(wanted.targets)}]"
        )


def _load_trained(model: GptOss, path: Path) -> None:
    if not path.exists():
        return
    parameters = dict(model.named_parameters())
    stored = list_file(path)
    wrong = [name for name in stored if name not in parameters]
    wrong += misshapen_tensors(stored, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    if wrong:
        raise CheckpointError(f"{path}: tensors that do not fit the model: {shortened(wrong)}")
    with torch.no_grad():
        for name, found in stored.items():
            parameters[name].copy_(found.read())
