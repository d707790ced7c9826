"""The architecture of a gpt-oss checkpoint, read from its config.json.

Two layouts are understood: Hugging Face (`model_type: gpt_oss`) and the `original/` folder of OpenAI's release
(github.com/openai/gpt-oss, ModelConfig). A missing `rope_scaling.truncate` means true, as transformers reads it; the published
checkpoints say false.
"""
from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

# OpenAI's name of each field -> ours
ORIGINAL_NAMES = {
    "num_hidden_layers": "num_hidden_layers", "num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit", "head_dim": "head_dim", "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads", "sliding_window": "sliding_window",
    "initial_context_length": "initial_context_length", "rope_theta": "rope_theta"}
ORIGINAL_ROPE_NAMES = {"rope_scaling_factor": "factor", "rope_ntk_alpha": "beta_slow", "rope_ntk_beta": "beta_fast"}


def _count(largest: float = math.inf, default: Any = MISSING) -> Any:
    """A positive integer. No gpt-oss model has more than `largest`: beyond it memory or time would run out before a tensor is
    compared with the files."""
    return field(default=default, metadata={"largest": largest})


def _positive(default: float) -> Any:
    """A finite number above 0."""
    return field(default=default, metadata={"is_positive": True})


def _range_problems(config: Any, prefix: str = "") -> list[str]:
    problems = []
    for own in fields(config):
        name, value = prefix + own.name, vars(config)[own.name]
        if "largest" in own.metadata:
            if type(value) is not int or value < 1:
                problems.append(f"{name}={value!r} must be a positive integer")
            elif value > own.metadata["largest"]:
                problems.append(f"{name}={value} is more than {own.metadata['largest']}, which no gpt-oss model has")
        elif "is_positive" in own.metadata and (type(value) not in (int, float) or not 0 < value < math.inf):
            problems.append(f"{name}={value!r} must be a number above 0")
    return problems


@dataclass
class YarnScaling:
    factor: float = _positive(32.0)
    beta_fast: float = _positive(32.0)
    beta_slow: float = _positive(1.0)
    original_max_position_embeddings: int = _positive(4096)
    truncate: bool = False


@dataclass
class GptOssConfig:
    vocab_size: int = _count(2**24)
    hidden_size: int = _count(2**20)
    intermediate_size: int = _count(2**20)
    num_hidden_layers: int = _count(1024)
    num_attention_heads: int = _count(2**16)
    num_key_value_heads: int = _count()
    head_dim: int = _count(2**16)
    num_local_experts: int = _count(2**16)
    sliding_window: int = _count()  # keys visible on windowed layers, the query's own included
    num_experts_per_tok: int = _count()
    layer_types: list[str] = field(default_factory=list)  # "sliding_attention" | "full_attention"; [] means alternating_layers()
    rms_norm_eps: float = _positive(1e-5)
    swiglu_limit: float = _positive(7.0)
    swiglu_alpha: float = _positive(1.702)
    max_position_embeddings: int = _count(default=131072)
    initial_context_length: int = _count(default=4096)
    rope_theta: float = _positive(150000.0)
    rope_scaling: YarnScaling = field(default_factory=YarnScaling)
    eos_token_id: int | list[int] = 200002
    pad_token_id: int | None = 199999
    raw: dict = field(default_factory=dict)  # config.json as read

    def __post_init__(self) -> None:
        problems = _range_problems(self) + _range_problems(self.rope_scaling, "rope_scaling.")
        if type(self.rope_scaling.truncate) is not bool:
            problems.append(f"rope_scaling.truncate={self.rope_scaling.truncate!r} must be true or false")
        if self.layer_types and not isinstance(self.layer_types, list):
            problems.append(f"layer_types={self.layer_types!r} must be a list")
        if not all(type(token) is int for token in self.stop_ids):
            problems.append(f"eos_token_id={self.eos_token_id!r} must be an integer or a list of integers")
        if self.pad_token_id is not None and type(self.pad_token_id) is not int:
            problems.append(f"pad_token_id={self.pad_token_id!r} must be an integer")
        if not problems:
            self.layer_types = self.layer_types or self.alternating_layers()
            problems = self._contradictions()
        if problems:
            raise ValueError("model config: " + "; ".join(problems))

    def alternating_layers(self) -> list[str]:
        """Windowed and full layers by turns, the first one windowed, as in the published models."""
        return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(self.num_hidden_layers)]

    def _contradictions(self) -> list[str]:
        unknown = sorted({str(kind) for kind in self.layer_types} - {"sliding_attention", "full_attention"})
        rules = {
            f"num_attention_heads={self.num_attention_heads} is not a multiple of num_key_value_heads={self.num_key_value_heads}":
                self.num_attention_heads % self.num_key_value_heads,
            f"head_dim={self.head_dim} must be even (rotary halves)": self.head_dim % 2,
            f"num_experts_per_tok={self.num_experts_per_tok} must lie in 1..num_local_experts={self.num_local_experts}":
                self.num_experts_per_tok > self.num_local_experts,
            f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}":
                len(self.layer_types) != self.num_hidden_layers,
            f"layer_types holds {unknown}; allowed: sliding_attention, full_attention": unknown}
        return [problem for problem, is_broken in rules.items() if is_broken]

    @property
    def stop_ids(self) -> list[int]:
        return list(self.eos_token_id) if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    @property
    def q_width(self) -> int:
        """Width of the queries of all heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys of all heads, or of the values."""
        return self.num_key_value_heads * self.head_dim

    def is_windowed(self, layer: int) -> bool:
        return self.layer_types[layer] == "sliding_attention"

    @staticmethod
    def from_hf(raw: dict) -> GptOssConfig:
        """Reads Hugging Face's config.json, where null says the same as no key; raises ValueError naming missing or unsupported
        keys."""
        source, raw = raw, _without_nulls(raw)
        if raw.get("model_type") != "gpt_oss":
            raise ValueError(f"config.json: model_type={raw.get('model_type')!r}; only 'gpt_oss' is supported")
        if "experts_per_token" in raw:
            raw.setdefault("num_experts_per_tok", raw["experts_per_token"])
        if missing := [key for key in REQUIRED if key not in raw]:
            raise ValueError(f"config.json: missing keys {missing} (or null); fetch the file again")
        for key in ("quantization_config", "rope_scaling", "rope_parameters"):
            if not isinstance(raw.get(key) or {}, dict):
                raise ValueError(f"config.json: {key}={raw[key]!r} must be an object")
        if raw.get("tie_word_embeddings", False):
            raise ValueError("config.json: tie_word_embeddings=true; gpt-oss has an untied lm_head")
        if raw.get("attention_bias", True) is not True:
            raise ValueError("config.json: attention_bias=false; gpt-oss has biases on q, k, v and o")
        # transformers 5 renames rope_scaling to rope_parameters and moves rope_theta into it
        rope = _without_nulls(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
        if (kind := rope.get("rope_type", rope.get("type", "yarn"))) != "yarn":
            raise ValueError(f"config.json: rope_type={kind!r}; only 'yarn' is supported")
        # each replaces the concentration that gpt-oss computes from the factor
        if given := [key for key in ("attention_factor", "mscale", "mscale_all_dim") if key in rope]:
            raise ValueError(f"config.json: {given} of the rope scaling are not supported; gpt-oss has none")
        known = {name: rope[name] for name in YarnScaling.__dataclass_fields__ if name in rope}
        scaling = YarnScaling(**{"truncate": bool(rope), **known})
        if "rope_theta" in rope:
            raw.setdefault("rope_theta", rope["rope_theta"])
        read = set(ARCHITECTURE_FIELDS) - {"rope_scaling", "pad_token_id"}
        values = {key: value for key, value in raw.items() if key in read}
        return GptOssConfig(**values, rope_scaling=scaling, pad_token_id=raw.get("pad_token_id"), raw=source)

    @staticmethod
    def from_original(raw: dict) -> GptOssConfig:
        """Reads `original/config.json` (field names of OpenAI's ModelConfig)."""
        raw = _without_nulls(raw)
        if missing := [key for key, ours in ORIGINAL_NAMES.items() if ours in REQUIRED and key not in raw]:
            raise ValueError(f"original config.json: missing keys {missing} (or null); fetch the file again")
        values = {ours: raw[key] for key, ours in ORIGINAL_NAMES.items() if key in raw}
        values |= {key: raw[key] for key in ("eos_token_id", "pad_token_id") if key in raw}
        scaling = {ours: raw[key] for key, ours in ORIGINAL_ROPE_NAMES.items() if key in raw}
        if "initial_context_length" in raw:
            scaling["original_max_position_embeddings"] = raw["initial_context_length"]
        return GptOssConfig(**values, rope_scaling=YarnScaling(**scaling))

    @staticmethod
    def from_architecture(architecture: dict) -> GptOssConfig:
        """Builds a config for a model initialised from scratch; unknown or missing fields are a ValueError."""
        _check_known("model.architecture", architecture, ARCHITECTURE_FIELDS)
        if missing := sorted(set(REQUIRED) - set(architecture)):
            raise ValueError(f"model.architecture: missing keys {missing}")
        values, known = dict(architecture), list(YarnScaling.__dataclass_fields__)
        if (scaling := values.pop("rope_scaling", None)) is not None:
            if not isinstance(scaling, dict):
                raise ValueError(f"model.architecture.rope_scaling={scaling!r} must hold {known}")
            _check_known("model.architecture.rope_scaling", scaling, known)
            values["rope_scaling"] = YarnScaling(**scaling)
        return GptOssConfig(**values)

    @property
    def quantization(self) -> dict:
        """The quantization_config of the config.json that was read, {} where there is none."""
        return self.raw.get("quantization_config") or {}

    def to_hf(self, *, quantization: dict) -> dict:
        """config.json in the hub's schema (readable by transformers 4.55+ and vLLM), unknown keys of the source kept, with this
        quantization_config unless it is {}."""
        theta = int(self.rope_theta) if float(self.rope_theta).is_integer() else self.rope_theta
        written = {
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
            "tie_word_embeddings": False, **{key: vars(self)[key] for key in REQUIRED},
            "experts_per_token": self.num_experts_per_tok,
            "layer_types": list(self.layer_types), "rms_norm_eps": self.rms_norm_eps,
            "swiglu_limit": self.swiglu_limit, "max_position_embeddings": self.max_position_embeddings,
            "initial_context_length": self.initial_context_length, "rope_theta": theta,
            "rope_scaling": dict(sorted({"rope_type": "yarn", **vars(self.rope_scaling)}.items())),
            "eos_token_id": self.eos_token_id, "pad_token_id": self.pad_token_id, "torch_dtype": "bfloat16"}
        if self.swiglu_alpha != 1.702:  # not a key of the hub: written where results need it
            written["swiglu_alpha"] = self.swiglu_alpha
        defaults = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
                    "output_router_logits": False, "router_aux_loss_coef": 0.9, "use_cache": True}
        dropped = ("quantization_config", "rope_parameters", "dtype")
        kept = {key: value for key, value in self.raw.items() if key not in dropped}
        return {**defaults, **kept, **written, **({"quantization_config": quantization} if quantization else {})}

    def to_original(self) -> dict:
        """config.json of the original layout. Raises ValueError where the model has a property that layout has no field for."""
        scaling = self.rope_scaling
        kept = {
            "layer_types (sliding on even layers)": self.layer_types == self.alternating_layers(),
            "rms_norm_eps=1e-5": self.rms_norm_eps == 1e-5,
            "rope_scaling.truncate=false": not scaling.truncate,
            "swiglu_alpha=1.702": self.swiglu_alpha == 1.702,
            "original_max_position_embeddings=initial_context_length":
                scaling.original_max_position_embeddings == self.initial_context_length}
        if broken := [rule for rule, holds in kept.items() if not holds]:
            raise ValueError(f"the original layout assumes {', '.join(broken)}, which this model does not keep; use the Hugging "
                             "Face layout")
        return {key: vars(self)[ours] for key, ours in ORIGINAL_NAMES.items()} | {
            key: vars(scaling)[ours] for key, ours in ORIGINAL_ROPE_NAMES.items()}


REQUIRED = [own.name for own in fields(GptOssConfig) if own.default is MISSING and own.default_factory is MISSING]
ARCHITECTURE_FIELDS = [own.name for own in fields(GptOssConfig) if own.name != "raw"]


def _check_known(key: str, given: dict, known: list[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{key}: unknown keys {unknown}; allowed: {sorted(known)}")


def _without_nulls(content: dict) -> dict:
    return {key: value for key, value in content.items() if value is not None}


def read_config(folder: str | Path) -> GptOssConfig:
    """Reads FOLDER/config.json in either layout; raises ValueError naming the file."""
    path = Path(folder) / "config.json"
    from models.formats.files import read_json  # not at the top: it imports torch, and a bad setting fails before

    raw = read_json(path)
    try:
        return GptOssConfig.from_original(raw) if "num_experts" in raw and "model_type" not in raw else \
            GptOssConfig.from_hf(raw)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def released(name: str) -> GptOssConfig | None:
    """The architecture of openai/gpt-oss-20b or openai/gpt-oss-120b, as published; None for other names."""
    sizes = {"openai/gpt-oss-20b": (24, 32), "openai/gpt-oss-120b": (36, 128)}
    if name not in sizes:
        return None
    layers, experts = sizes[name]
    return GptOssConfig(vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=layers,
                        num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=experts, sliding_window=128,
                        num_experts_per_tok=4, raw={"quantization_config": {"quant_method": "mxfp4"}})
