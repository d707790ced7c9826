"""The architecture of a gpt-oss checkpoint, read from its config.json.

Two layouts are understood: Hugging Face (`model_type: gpt_oss`) and the `original/` folder of OpenAI's release
(github.com/openai/gpt-oss, ModelConfig). A missing `rope_scaling.truncate` means true, as transformers reads it; the published
checkpoints say false.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

# hub config.json schema; extra keys of a checkpoint are kept in GptOssConfig.raw and written back
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "num_local_experts", "sliding_window")
# far above any model: beyond them memory or time runs out before a tensor is compared with the files
_LARGEST = {"num_hidden_layers": 1024, "num_local_experts": 2**16, "num_attention_heads": 2**16, "head_dim": 2**16,
            "hidden_size": 2**20, "intermediate_size": 2**20, "vocab_size": 2**24}
_MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                              "model.embed_tokens", "lm_head"]}


@dataclass
class YarnScaling:
    factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 4096
    truncate: bool = False


@dataclass
class GptOssConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    sliding_window: int  # keys visible on windowed layers, the query's own included
    layer_types: list[str]  # "sliding_attention" | "full_attention"
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    max_position_embeddings: int = 131072
    initial_context_length: int = 4096
    rope_theta: float = 150000.0
    rope_scaling: YarnScaling = field(default_factory=YarnScaling)
    eos_token_id: int | list[int] = 200002
    pad_token_id: int | None = 199999
    is_mxfp4: bool = False
    is_nf4: bool = False
    raw: dict = field(default_factory=dict)  # config.json as read

    def __post_init__(self) -> None:
        sizes = (*_REQUIRED, "num_experts_per_tok", "max_position_embeddings", "initial_context_length")
        problems = [f"{name}={value!r} must be a positive integer" for name in sizes
                    if type(value := self.__dict__[name]) is not int or value < 1]
        problems += [f"{name}={self.__dict__[name]} is more than {largest}, which no gpt-oss model has"
                     for name, largest in _LARGEST.items() if not problems and self.__dict__[name] > largest]
        positive = {name: self.__dict__[name] for name in ("rms_norm_eps", "swiglu_limit", "swiglu_alpha", "rope_theta")}
        positive |= {f"rope_scaling.{name}": self.rope_scaling.__dict__[name] for name in
                     ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")}
        problems += [f"{name}={value!r} must be a number above 0" for name, value in positive.items()
                     if type(value) not in (int, float) or not 0 < value < math.inf]
        if type(self.rope_scaling.truncate) is not bool:
            problems.append(f"rope_scaling.truncate={self.rope_scaling.truncate!r} must be true or false")
        if not isinstance(self.layer_types, list):
            problems.append(f"layer_types={self.layer_types!r} must be a list")
        if not all(type(token) is int for token in self.stop_ids):
            problems.append(f"eos_token_id={self.eos_token_id!r} must be an integer or a list of integers")
        if self.pad_token_id is not None and type(self.pad_token_id) is not int:
            problems.append(f"pad_token_id={self.pad_token_id!r} must be an integer")
        problems = problems or self._contradictions()
        if problems:
            raise ValueError("model config: " + "; ".join(problems))

    def _contradictions(self) -> list[str]:
        problems = []
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                            f"num_key_value_heads={self.num_key_value_heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim} must be even (rotary halves)")
        if self.num_experts_per_tok > self.num_local_experts:
            problems.append(f"num_experts_per_tok={self.num_experts_per_tok} must lie in 1..num_local_experts="
                            f"{self.num_local_experts}")
        if len(self.layer_types) != self.num_hidden_layers:
            problems.append(f"layer_types has {len(self.layer_types)} entries for num_hidden_layers="
                            f"{self.num_hidden_layers}")
        if unknown := sorted({str(kind) for kind in self.layer_types} - {"sliding_attention", "full_attention"}):
            problems.append(f"layer_types holds {unknown}; allowed: sliding_attention, full_attention")
        if self.is_mxfp4 and (self.hidden_size % 32 or self.intermediate_size % 32):
            problems.append(f"MXFP4 needs hidden_size={self.hidden_size} and intermediate_size="
                            f"{self.intermediate_size} to be multiples of 32")
        if self.is_nf4 and self.hidden_size * self.intermediate_size % 64:
            problems.append(f"NF4 needs hidden_size={self.hidden_size} times intermediate_size="
                            f"{self.intermediate_size} to be a multiple of 64")
        return problems

    @property
    def stored_experts(self) -> str:
        """How a checkpoint of this config holds its experts."""
        return "mxfp4" if self.is_mxfp4 else "nf4" if self.is_nf4 else "bf16"

    @property
    def stop_ids(self) -> list[int]:
        return list(self.eos_token_id) if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    def is_windowed(self, layer: int) -> bool:
        return self.layer_types[layer] == "sliding_attention"

    @staticmethod
    def from_hf(raw: dict) -> GptOssConfig:
        """Reads Hugging Face's config.json, where null says the same as no key; raises ValueError naming missing or unsupported
        keys."""
        source, raw = raw, _without_nulls(raw)
        if raw.get("model_type") != "gpt_oss":
            raise ValueError(f"config.json: model_type={raw.get('model_type')!r}; only 'gpt_oss' is supported")
        experts_per_token = raw.get("num_experts_per_tok", raw.get("experts_per_token"))
        missing = [key for key in _REQUIRED if key not in raw]
        missing += ["num_experts_per_tok"] if experts_per_token is None else []
        if missing:
            raise ValueError(f"config.json: missing keys {missing} (or null); fetch the file again")
        for key in ("quantization_config", "rope_scaling", "rope_parameters"):
            if not isinstance(raw.get(key) or {}, dict):
                raise ValueError(f"config.json: {key}={raw[key]!r} must be an object")
        method = (raw.get("quantization_config") or {}).get("quant_method")
        if method not in (None, "mxfp4", "bitsandbytes"):
            raise ValueError(f"config.json: quantization_config.quant_method={method!r}; supported: mxfp4, bitsandbytes "
                             "(NF4), or none")
        if method == "bitsandbytes" and (kind := raw["quantization_config"].get("bnb_4bit_quant_type")) != "nf4":
            raise ValueError(f"config.json: quantization_config.bnb_4bit_quant_type={kind!r}; of bitsandbytes' formats nf4 "
                             "is supported")
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
        optional = ("rms_norm_eps", "swiglu_limit", "swiglu_alpha", "max_position_embeddings", "eos_token_id",
                    "initial_context_length")
        return GptOssConfig(
            **{key: raw[key] for key in _REQUIRED}, **{key: raw[key] for key in optional if key in raw},
            num_experts_per_tok=experts_per_token, rope_scaling=scaling, is_mxfp4=method == "mxfp4",
            pad_token_id=raw.get("pad_token_id"), is_nf4=method == "bitsandbytes", raw=source,
            rope_theta=raw.get("rope_theta", rope.get("rope_theta", 150000.0)),
            layer_types=raw.get("layer_types") or _alternating(raw["num_hidden_layers"]))

    @staticmethod
    def from_original(raw: dict) -> GptOssConfig:
        """Reads `original/config.json` (field names of OpenAI's ModelConfig). Its checkpoints store experts as MXFP4."""
        raw = _without_nulls(raw)
        needed = ("num_hidden_layers", "num_experts", "experts_per_token", "vocab_size", "hidden_size",
                  "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads", "sliding_window")
        if missing := [key for key in needed if key not in raw]:
            raise ValueError(f"original config.json: missing keys {missing} (or null); fetch the file again")
        context = raw.get("initial_context_length", 4096)
        scaling = YarnScaling(factor=raw.get("rope_scaling_factor", 32.0), beta_fast=raw.get("rope_ntk_beta", 32.0),
                              beta_slow=raw.get("rope_ntk_alpha", 1.0), original_max_position_embeddings=context,
                              truncate=False)
        return GptOssConfig(
            vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw["num_key_value_heads"], head_dim=raw["head_dim"],
            num_local_experts=raw["num_experts"], num_experts_per_tok=raw["experts_per_token"],
            sliding_window=raw["sliding_window"], layer_types=_alternating(raw["num_hidden_layers"]),
            swiglu_limit=raw.get("swiglu_limit", 7.0), rope_theta=raw.get("rope_theta", 150000.0),
            rope_scaling=scaling, initial_context_length=context, is_mxfp4=True,
            eos_token_id=raw.get("eos_token_id", 200002), pad_token_id=raw.get("pad_token_id", 199999))

    @staticmethod
    def from_architecture(fields: dict) -> GptOssConfig:
        """Builds a config for a model initialised from scratch; unknown or missing fields are a ValueError."""
        allowed = set(GptOssConfig.__dataclass_fields__) - {"raw", "is_mxfp4", "is_nf4"}
        if unknown := sorted(set(fields) - allowed):
            raise ValueError(f"model.architecture: unknown keys {unknown}; allowed: {sorted(allowed)}")
        needed = (set(_REQUIRED) | {"num_experts_per_tok"}) - set(fields)
        if needed:
            raise ValueError(f"model.architecture: missing keys {sorted(needed)}")
        values = dict(fields)
        values.setdefault("layer_types", _alternating(values["num_hidden_layers"]))
        if (scaling := values.pop("rope_scaling", None)) is not None:
            if not isinstance(scaling, dict):
                raise ValueError(f"model.architecture.rope_scaling={scaling!r} must hold "
                                 f"{list(YarnScaling.__dataclass_fields__)}")
            if unknown := sorted(set(scaling) - set(YarnScaling.__dataclass_fields__)):
                raise ValueError(f"model.architecture.rope_scaling: unknown keys {unknown}; allowed: "
                                 f"{sorted(YarnScaling.__dataclass_fields__)}")
            values["rope_scaling"] = YarnScaling(**scaling)
        return GptOssConfig(**values)

    def to_hf(self, *, is_mxfp4: bool) -> dict:
        """config.json in the hub's schema (readable by transformers 4.55+ and vLLM), unknown keys of the source kept."""
        scaling = {"beta_fast": self.rope_scaling.beta_fast, "beta_slow": self.rope_scaling.beta_slow,
                   "factor": self.rope_scaling.factor,
                   "original_max_position_embeddings": self.rope_scaling.original_max_position_embeddings,
                   "rope_type": "yarn", "truncate": self.rope_scaling.truncate}
        theta = int(self.rope_theta) if float(self.rope_theta).is_integer() else self.rope_theta
        written = {
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
            "tie_word_embeddings": False, **{key: self.__dict__[key] for key in _REQUIRED},
            "num_experts_per_tok": self.num_experts_per_tok, "experts_per_token": self.num_experts_per_tok,
            "layer_types": list(self.layer_types), "rms_norm_eps": self.rms_norm_eps,
            "swiglu_limit": self.swiglu_limit, "max_position_embeddings": self.max_position_embeddings,
            "initial_context_length": self.initial_context_length, "rope_theta": theta, "rope_scaling": scaling,
            "eos_token_id": self.eos_token_id, "pad_token_id": self.pad_token_id, "torch_dtype": "bfloat16"}
        if self.swiglu_alpha != 1.702:  # not a key of the hub: written where results need it
            written["swiglu_alpha"] = self.swiglu_alpha
        defaults = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
                    "output_router_logits": False, "router_aux_loss_coef": 0.9, "use_cache": True}
        dropped = ("quantization_config", "rope_parameters", "dtype")
        kept = {key: value for key, value in self.raw.items() if key not in dropped}
        given = self.raw.get("quantization_config") if self.is_mxfp4 else None
        quantization = {"quantization_config": given or _MXFP4} if is_mxfp4 else {}
        return {**defaults, **kept, **written, **quantization}


def _without_nulls(content: dict) -> dict:
    return {key: value for key, value in content.items() if value is not None}


def _alternating(num_layers: int) -> list[str]:
    if type(num_layers) is not int or num_layers > _LARGEST["num_hidden_layers"]:
        return []  # GptOssConfig says what is wrong with it
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)]


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
