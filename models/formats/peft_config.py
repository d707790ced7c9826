"""PEFT's adapter_config.json: which settings are refused, and the rank, scale and choice of modules of the others.

Names are those of Hugging Face's model without PEFT's prefix: modules such as model.layers.0.self_attn.q_proj, parameters such
as model.layers.0.mlp.experts.gate_up_proj. How PEFT matches them: peft 0.21, tuners/tuners_utils.py and utils/other.py.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from models.formats.files import CheckpointError, read_json

CONFIG_NAME = "adapter_config.json"
# settings that are read here, and settings that do not say what stored tensors compute
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias",
         "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"}  # fmt: skip
_WITHOUT_EFFECT = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
                   "lora_dropout", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config",
                   "lora_dtype", "lorap_lr_ratio",
                   "loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # fmt: skip
# setting -> type of a value that is no list, type of a list's entries, both in words
_KINDS = {"target_modules": (str, str, "text or a list"), "exclude_modules": (str, str, "text or a list"),
          "layers_pattern": (str, str, "text or a list"), "layers_to_transform": (int, int, "a number or a list"),
          "target_parameters": ((), str, "a list")}
_KEEPS_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # ways to start that leave the base as it is
_ADAPTED = (".gate_up_proj", ".down_proj", ".router.weight", *(f".{name}_proj.weight" for name in "qkvo"))
_MERGE = "merge it into its base with PEFT (merge_and_unload, then save_pretrained) and use the result as model.path"
_REASONS = {
    "modules_to_save": "whole modules trained beside the adapter are not read",
    "trainable_token_indices": "trained rows of the embedding are not read",
    "layer_replication": "it repeats layers of the base",
    "bias": "biases that trained with the adapter are not read",
}


@dataclass(frozen=True)
class PeftSettings:
    """An adapter's settings, checked."""

    path: Path
    content: dict

    @property
    def rank(self) -> int:
        return self.content["r"]

    def rank_of(self, name: str) -> int:
        return self._by_pattern("rank_pattern", name, self.rank)

    def scale_of(self, name: str) -> float:
        """The factor by which PEFT multiplies B A."""
        alpha, rank = self._by_pattern("alpha_pattern", name, self.content["lora_alpha"]), self.rank_of(name)
        return alpha / math.sqrt(rank) if self.content.get("use_rslora") else alpha / rank

    def selects(self, module: str) -> bool:
        """Whether target_modules chooses a module."""
        targets, excluded = self.content.get("target_modules"), self.content.get("exclude_modules")
        if excluded and (re.fullmatch(excluded, module) if isinstance(excluded, str) else _ends_in(module, excluded)):
            return False
        if isinstance(targets, str):
            return ".self_attn." in module if targets.lower() == "all-linear" else bool(re.fullmatch(targets, module))
        return _ends_in(module, targets or []) and self._selects_layer(module)

    def selects_parameter(self, name: str) -> bool:
        """Whether target_parameters chooses a parameter."""
        return _ends_in(name, self.content.get("target_parameters") or [])

    def _selects_layer(self, module: str) -> bool:
        layers, patterns = self.content.get("layers_to_transform"), self.content.get("layers_pattern") or r"[^.]*"
        if layers is None or layers == []:
            return True
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(found[1]) in (layers if isinstance(layers, list) else [layers])
        return False

    def _by_pattern(self, key: str, name: str, default: float) -> float:
        for pattern, value in (self.content.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        return default


def _ends_in(name: str, targets: list[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def read_settings(folder: Path) -> PeftSettings:
    """The settings in FOLDER/adapter_config.json.

    Raises CheckpointError naming the file, the setting and a way out for everything that an adapter of this project does not
    compute: a setting that nobody here knows too, unless its value is empty.
    """
    path = folder / CONFIG_NAME
    content = read_json(path)
    if content.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type={content.get('peft_type')!r}; only LORA is supported: {_MERGE}")
    refused = {key: value for key, value in content.items() if value and key not in _READ | _WITHOUT_EFFECT}
    refused |= {"bias": content["bias"]} if content.get("bias", "none") not in ("none", None) else {}
    if refused:
        shown = ", ".join(f"{key}={value!r:.80}" for key, value in refused.items())
        why = "; ".join(_REASONS[key] for key in refused if key in _REASONS) or "it would change what the adapter computes"
        raise CheckpointError(f"{path}: {shown} not supported ({why}); train the adapter without, or {_MERGE}")
    start = content.get("init_lora_weights", True)
    if str(start).lower() not in _KEEPS_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights={start!r} is not known to leave the base's weights as they are, and the adapter does not "
            "hold the changed ones. Convert it where it was trained, with PEFT's save_pretrained(FOLDER, "
            f"path_initial_model_for_weight_conversion=FOLDER of the untrained adapter), or {_MERGE}"
        )
    settings = PeftSettings(path, content)
    _check_values(path, content)
    _check_targets(settings)
    return settings


def _is_positive(value: object, *, integer: bool) -> bool:
    return type(value) in ((int,) if integer else (int, float)) and 0 < value < math.inf


def _check_values(path: Path, content: dict) -> None:
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not _is_positive(rank, integer=True) or not _is_positive(alpha, integer=False):
        raise CheckpointError(f"{path}: r={rank!r} and lora_alpha={alpha!r} must be a positive integer and a positive number")
    for key, integer in (("rank_pattern", True), ("alpha_pattern", False)):
        pattern = content.get(key) or {}
        if not isinstance(pattern, dict) or not all(_is_positive(v, integer=integer) for v in pattern.values()):
            what = "positive integers" if integer else "positive numbers"
            raise CheckpointError(f"{path}: {key}={pattern!r:.200} must map names to {what}; correct it")
    for key, (single, entry, kinds) in _KINDS.items():
        value = content.get(key)
        is_list = isinstance(value, list) and all(isinstance(each, entry) for each in value)
        if value is not None and not is_list and not isinstance(value, single):
            raise CheckpointError(f"{path}: {key}={value!r:.200} must be {kinds}; correct it")
    patterns = [content.get(key) for key in ("target_modules", "exclude_modules") if isinstance(content.get(key), str)]
    for pattern in [*patterns, *(content.get("rank_pattern") or {}), *(content.get("alpha_pattern") or {})]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{path}: {pattern!r} is no regular expression ({error}); correct it") from None


def _check_targets(settings: PeftSettings) -> None:
    modules, parameters = (settings.content.get(key) for key in ("target_modules", "target_parameters"))
    allowed = "of gpt-oss, adapters are read on q_proj, k_proj, v_proj, o_proj, mlp.experts.* and mlp.router.weight"
    if outside := [name for name in ("lm_head", "model.embed_tokens") if settings.selects(name)]:
        raise CheckpointError(
            f"{settings.path}: target_modules={modules!r:.200} reaches {outside}, which is not supported; {allowed}. Train "
            f"without, or {_MERGE}"
        )
    if outside := [name for name in parameters or [] if not f".{name}".endswith(_ADAPTED)]:
        raise CheckpointError(
            f"{settings.path}: target_parameters {outside} not supported; {allowed}. Train without, or {_MERGE}"
        )
