"""LoRA adapters as PEFT stores them (adapter_config.json, adapter_model.safetensors), in, out and merged.

File layout, checked against peft 0.21: attention and router tensors `lora_A.weight` [r, in], `lora_B.weight` [out, r].
On experts one pair of tensors holds all of them: A [E * r, in] is expert-major (row e * r + k), B [out, r * E] is
rank-major (column k * E + e). `mlp.experts.base_layer.*` is gate_up_proj, `mlp.experts.*` down_proj; vLLM asserts that
both are there, so both are always written. An adapter from elsewhere that has one of them only leaves the other
without effect (B = 0).

Trained norms and sinks have no place in that layout that other tools accept next to LoRA: they go to
trained_weights.safetensors beside the adapter, under their Hugging Face names. `load_adapter` reads them back; PEFT
and vLLM ignore the file, so serve such a model from a merged export (scripts/export.py) instead.

Shapes: E experts, r rank.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from models.experts import PROJECTIONS
from models.gpt_oss import GptOss
from models.lora import TARGETS, LoraConfig, attach_lora
from models.tensor_files import (
    CheckpointError,
    atomic_folder,
    list_file,
    read_json,
    shortened,
    write_json,
    write_tensors,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TRAINED_NAME = "trained_weights.safetensors"
ATTENTION = TARGETS[:4]
_EXPERT_KEYS = {"gate_up_proj": "mlp.experts.base_layer", "down_proj": "mlp.experts"}
# settings that change what an adapter computes and that this project's LoRA does not have
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "modules_to_save",
    "exclude_modules",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
)


def attached_config(model: GptOss) -> LoraConfig | None:
    """The adapter a model carries, read off its tensors; None without one and without trainable norms or sinks."""
    block = model.model.layers[0]
    modules = {name: getattr(block.self_attn, name) for name in ATTENTION} | {"router": block.mlp.router}
    found = {name: (module.lora_A, module.lora_scale) for name, module in modules.items() if module.lora_A is not None}
    if block.mlp.experts.gate_up_proj_lora_A is not None:
        found["experts"] = (block.mlp.experts.gate_up_proj_lora_A, block.mlp.experts.lora_scale)
    train_sinks, train_norms = block.self_attn.sinks.requires_grad, block.input_layernorm.weight.requires_grad
    if not found and not train_sinks and not train_norms:
        return None
    lora_A, scale = next(iter(found.values())) if found else (torch.empty(1, 1), 1.0)
    rank = lora_A.shape[-2]
    return LoraConfig(
        rank=rank, alpha=round(scale * rank, 9), targets=list(found), train_sinks=train_sinks, train_norms=train_norms
    )


def has_expert_adapter(model: GptOss, name: str | None = None) -> bool:
    """Whether an adapter changes any expert weight, or the one of Hugging Face name `name`; B = 0 changes nothing."""
    suffix = "_lora_B" if name is None else f"{name}_lora_B"
    return any(
        bool(tensor.any())
        for key, tensor in model.state_dict().items()
        if ".mlp.experts." in key and key.endswith(suffix)
    )


def merged_weight(model: GptOss, name: str, weight: torch.Tensor, *, expert: int | None = None) -> torch.Tensor:
    """weight + (alpha / r) B A in fp32, or `weight` itself where no adapter changes it.

    name: Hugging Face name of the tensor. weight: [out, in], or [in, out] of one `expert`.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    parameters = dict(module.named_parameters(recurse=False))
    key = "lora_" if expert is None else f"{leaf}_lora_"
    if (expert is None and leaf != "weight") or key + "A" not in parameters:
        return weight
    lora_A, lora_B = parameters[key + "A"].detach().float(), parameters[key + "B"].detach().float()
    if expert is None:
        return weight.float() + module.lora_scale * (lora_B @ lora_A)
    return weight.float() + module.lora_scale * (lora_B[expert] @ lora_A[expert]).T


def save_adapter(
    model: GptOss, folder: str | Path, *, base_model: str | None = None, only_experts: bool = False
) -> None:
    """Writes the model's adapter (fp32) and its trained norms and sinks; replaces an adapter already in the folder.

    base_model: folder or hub id of the base, for tools that look it up. only_experts: leaves the attention and router
    out. Raises ValueError for a model without an adapter and CheckpointError where the folder cannot be written.
    """
    config = attached_config(model)
    if config is None:
        raise ValueError("save_adapter: the model carries no adapter")
    if only_experts:
        config = LoraConfig(rank=config.rank, alpha=config.alpha, targets=["experts"])
    tensors = peft_tensors(model, config.targets, read=lambda parameter: parameter)
    trained = {
        name: parameter.detach().cpu()
        for name, parameter in model.trainable_parameters().items()
        if not only_experts and "lora_" not in name and name.endswith(("norm.weight", ".sinks"))
    }
    num_bytes = sum(tensor.nbytes for tensor in [*tensors.values(), *trained.values()])
    files = (CONFIG_NAME, WEIGHTS_NAME, TRAINED_NAME)
    with atomic_folder(Path(folder), num_bytes=num_bytes + 2**20, replaceable=files) as temporary:
        write_tensors(temporary / WEIGHTS_NAME, tensors)
        if trained:
            write_tensors(temporary / TRAINED_NAME, trained)
        write_json(temporary / CONFIG_NAME, _peft_config(config, base_model))


def _peft_config(config: LoraConfig, base_model: str | None) -> dict:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if "experts" in config.targets else []
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
        "target_modules": [name for name in config.targets if name in ATTENTION],
        "target_parameters": parameters or None,
    }


def _peft_key(layer: int, module: str, side: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"


def peft_tensors(
    model: GptOss, targets: list[str], *, read: Callable[[torch.nn.Parameter], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`read` of each adapter parameter (itself, its gradient) under PEFT's names, in its layout, fp32 on the CPU."""
    tensors = {}
    for layer, block in enumerate(model.model.layers):
        for target in targets:
            if target == "experts":
                for name in PROJECTIONS:
                    lora_A = read(block.mlp.experts.get_parameter(f"{name}_lora_A"))  # [E, r, in]
                    lora_B = read(block.mlp.experts.get_parameter(f"{name}_lora_B"))  # [E, out, r]
                    tensors[_peft_key(layer, _EXPERT_KEYS[name], "A")] = lora_A.flatten(0, 1)  # [E * r, in]
                    tensors[_peft_key(layer, _EXPERT_KEYS[name], "B")] = lora_B.permute(1, 2, 0).flatten(
                        1
                    )  # [out, r * E]
                continue
            path = "mlp.router" if target == "router" else f"self_attn.{target}"
            for side in "AB":
                tensors[_peft_key(layer, path, side)] = read(block.get_parameter(f"{path}.lora_{side}"))
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """What an adapter in PEFT form targets, with which rank and scale.

    alpha is such that the scale is alpha / rank; for use_rslora adapters that is lora_alpha * sqrt(rank). Raises
    CheckpointError naming the file and the setting for anything this project's LoRA does not compute.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    content = read_json(path)
    if content.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type={content.get('peft_type')!r}; only LORA is supported")
    set_here = {key: content[key] for key in _UNSUPPORTED if content.get(key)}
    set_here |= {"bias": content["bias"]} if content.get("bias", "none") != "none" else {}
    if set_here:
        raise CheckpointError(f"{path}: {set_here} not supported; train the adapter without these settings")
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise CheckpointError(
            f"{path}: r={rank!r} and lora_alpha={alpha!r} must be a positive integer and a positive number"
        )
    targets = _attention_targets(path, content.get("target_modules")) + _parameter_targets(path, content)
    trained = list(list_file(folder / TRAINED_NAME)) if (folder / TRAINED_NAME).exists() else []
    return LoraConfig(
        rank=rank,
        alpha=alpha * math.sqrt(rank) if content.get("use_rslora") else alpha,
        targets=targets,
        train_sinks=any(name.endswith(".sinks") for name in trained),
        train_norms=any(name.endswith("norm.weight") for name in trained),
    )


def _attention_targets(path: Path, modules: list[str] | str | None) -> list[str]:
    if modules == "all-linear":
        return list(ATTENTION)  # what PEFT takes it to mean for gpt-oss: the head is left out
    if modules is not None and not isinstance(modules, list):
        raise CheckpointError(f"{path}: target_modules={modules!r}; give a list out of {list(ATTENTION)}")
    if unknown := sorted(set(modules or []) - set(ATTENTION)):
        raise CheckpointError(
            f"{path}: target_modules {unknown} not supported; allowed: {list(ATTENTION)} "
            "(experts and router go into target_parameters)"
        )
    return [name for name in ATTENTION if name in (modules or [])]


def _expert_halves(content: dict) -> list[str]:
    return [
        name
        for name in PROJECTIONS
        if any(f".{parameter}".endswith(f".{name}") for parameter in content.get("target_parameters") or [])
    ]


def _parameter_targets(path: Path, content: dict) -> list[str]:
    targets = (
        {"router"}
        if any(f".{parameter}".endswith(".router.weight") for parameter in content.get("target_parameters") or [])
        else set()
    )
    known = tuple(f".{name}" for name in PROJECTIONS) + (".router.weight",)
    if unknown := [name for name in content.get("target_parameters") or [] if not f".{name}".endswith(known)]:
        raise CheckpointError(
            f"{path}: target_parameters {unknown} not supported; allowed: mlp.experts.gate_up_proj, "
            "mlp.experts.down_proj, mlp.router.weight"
        )
    targets |= {"experts"} if _expert_halves(content) else set()
    return [name for name in TARGETS if name in targets]


def load_adapter(model: GptOss, folder: str | Path) -> None:
    """Reads an adapter into a model, attaching one of its rank, alpha and targets where the model carries none yet.

    Trained norms and sinks beside the adapter replace the model's. Raises CheckpointError naming what differs between
    the adapter the model carries and the one in the folder, and every missing, unused and misshapen tensor.
    """
    folder = Path(folder)
    wanted = read_adapter_config(folder)
    held = attached_config(model)
    if held is None:
        attach_lora(model, wanted, seed=0)
    else:
        _check_same(folder, held, wanted)
    if not (folder / WEIGHTS_NAME).exists():
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME}: not found; adapters are read from safetensors, not from .bin files"
        )
    stored = {name: found.read() for name, found in list_file(folder / WEIGHTS_NAME).items()}
    halves = _expert_halves(read_json(folder / CONFIG_NAME))
    expected = {}  # key in the file -> (parameter, the file's tensor in the parameter's layout)
    for layer in range(len(model.model.layers)):
        expected |= _expected_in_layer(model, layer, wanted.targets, halves)
    missing = [key for key in expected if key not in stored]
    unused = [key for key in stored if key not in expected]
    misshapen = [
        f"{key} is {list(stored[key].shape)}, expected {list(shape)}"
        for key, (_, shape) in expected.items()
        if key in stored and tuple(stored[key].shape) != shape
    ]
    if missing or unused or misshapen:
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME}: does not fit the model: missing: {shortened(missing)}; not used: "
            f"{shortened(unused)}; wrong shape: {shortened(misshapen)}"
        )
    with torch.no_grad():
        for key, (parameter, _) in expected.items():
            parameter.copy_(_from_peft(stored[key], parameter, is_B=key.endswith("lora_B.weight")))
    _load_trained(model, folder / TRAINED_NAME)


def _check_same(folder: Path, held: LoraConfig, wanted: LoraConfig) -> None:
    different = []
    if held.rank != wanted.rank:
        different.append(f"rank: {held.rank} in the model, {wanted.rank} in the adapter")
    if not math.isclose(held.alpha, wanted.alpha, rel_tol=1e-6):
        different.append(f"alpha: {held.alpha} in the model, {wanted.alpha} in the adapter")
    if set(held.targets) != set(wanted.targets):
        different.append(f"targets: {sorted(held.targets)} in the model, {sorted(wanted.targets)} in the adapter")
    if different:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: not the adapter this model was set up for: {'; '.join(different)}; "
            "set model.lora to the adapter's values"
        )


def _expected_in_layer(
    model: GptOss, layer: int, targets: list[str], halves: list[str]
) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    """PEFT key -> (parameter, shape in the file) of one layer."""
    block, expected = model.model.layers[layer], {}
    for target in targets:
        if target != "experts":
            path = "mlp.router" if target == "router" else f"self_attn.{target}"
            for side in "AB":
                parameter = block.get_parameter(f"{path}.lora_{side}")
                expected[_peft_key(layer, path, side)] = (parameter, tuple(parameter.shape))
            continue
        for name in halves:
            # with one half alone there is a single wrapper, and no base_layer in its key
            path = _EXPERT_KEYS[name] if len(halves) == 2 else "mlp.experts"
            lora_A = block.mlp.experts.get_parameter(f"{name}_lora_A")
            lora_B = block.mlp.experts.get_parameter(f"{name}_lora_B")
            (num, rank, size_in), size_out = lora_A.shape, lora_B.shape[1]
            expected[_peft_key(layer, path, "A")] = (lora_A, (num * rank, size_in))
            expected[_peft_key(layer, path, "B")] = (lora_B, (size_out, rank * num))
        for name in set(PROJECTIONS) - set(halves):
            with torch.no_grad():
                block.mlp.experts.get_parameter(f"{name}_lora_B").zero_()
    return expected


def _from_peft(stored: torch.Tensor, parameter: torch.Tensor, *, is_B: bool) -> torch.Tensor:
    """A tensor of the file in the layout of its parameter."""
    if parameter.ndim == 2:
        return stored
    if not is_B:
        return stored.view(parameter.shape)
    num, size_out, rank = parameter.shape
    return stored.view(size_out, rank, num).permute(2, 0, 1)


def _load_trained(model: GptOss, path: Path) -> None:
    if not path.exists():
        return
    parameters = dict(model.named_parameters())
    stored = list_file(path)
    wrong = [
        name for name, found in stored.items() if name not in parameters or found.shape != tuple(parameters[name].shape)
    ]
    if wrong:
        raise CheckpointError(f"{path}: tensors that do not fit the model: {shortened(wrong)}")
    with torch.no_grad():
        for name, found in stored.items():
            parameters[name].copy_(found.read())
