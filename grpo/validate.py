"""Checks of a configuration across its fields: ranges, contradictions, folders that must exist.

They run before torch is imported or anything is loaded; every complaint names the key, its value and what is allowed.
"""

import math
import re
import typing
from pathlib import Path

from grpo.config import (
    ConfigError,
    EvalConfig,
    EvaluateConfig,
    Experts,
    GenerateConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    Train,
    TrainConfig,
    WarmupConfig,
    describe_type,
    fits,
    unknown_key,
)
from models.config import GptOssConfig

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "experts", "router")
_PACKED = (Experts.mxfp4, Experts.nf4)


class Problems:
    """Collects every complaint about a config, so that one run of the command shows them all."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def require(self, is_fine: bool, key: str, value: object, allowed: str) -> None:
        if not is_fine:
            self.lines.append(f"{key} = {value!r}: {allowed}")

    def finish(self) -> None:
        if self.lines:
            raise ConfigError("\n".join(self.lines))


def validate(config: TrainConfig) -> None:
    """Raises ConfigError listing every value that is out of range or contradicts another, before anything is loaded."""
    problems = Problems()
    need = problems.require
    need(
        bool(re.fullmatch(r"[\w.+=-]+", config.name)) and not config.name.startswith("."),
        "name",
        config.name,
        "a folder name of letters, digits and _ . + = -; choose one with name=NAME",
    )
    need(0 <= config.seed < 2**63, "seed", config.seed, "must lie in 0..2^63-1")
    need(config.steps >= 1, "steps", config.steps, "must be at least 1 GRPO step")
    need(config.threads >= 0, "threads", config.threads, "must be 0 (torch's choice) or a number of CPU threads")
    check_model(config.model, problems)
    check_sampling(config.rollout, "rollout.", problems)
    check_rollout_and_optim(config, problems)
    check_adamw(config.optim, "optim", problems)
    for key, node in (("env", config.env), ("loss", config.loss)):
        need("_target_" in node, f"{key}._target_", None, f"required; choose a file of configs/{key} with {key}=NAME")
    check_loss(config.loss, problems)
    need(config.kl.coefficient >= 0, "kl.coefficient", config.kl.coefficient, "must be 0 (off) or positive")
    need(
        config.kl.coefficient <= 0 or config.model.train == Train.lora,
        "kl.coefficient",
        config.kl.coefficient,
        "the reference policy is the model with its adapter off, so a KL penalty needs model.train=lora; "
        "set kl.coefficient=0 with model.train=full",
    )
    if config.warmup is not None:
        check_warmup(config.warmup, problems)
    evaluation = config.eval
    need(evaluation.every >= 0, "eval.every", evaluation.every, "must be 0 (never in between) or a number of steps")
    need(evaluation.num_samples >= 0, "eval.num_samples", evaluation.num_samples, "must be 0 (greedy only) or positive")
    need(
        evaluation.num_samples > 0 or evaluation.greedy or not is_evaluating(evaluation),
        "eval.num_samples",
        0,
        "nothing to measure with eval.greedy=false; set eval.num_samples=1 or eval.greedy=true",
    )
    need(
        evaluation.temperature > 0,
        "eval.temperature",
        evaluation.temperature,
        "must be > 0; greedy is eval.greedy=true",
    )
    need(evaluation.max_prompts >= 1, "eval.max_prompts", evaluation.max_prompts, "must be at least 1 prompt")
    need(config.checkpoint.every >= 0, "checkpoint.every", config.checkpoint.every, "must be 0 (end only) or steps")
    need(
        config.checkpoint.keep >= 2,
        "checkpoint.keep",
        config.checkpoint.keep,
        "must be at least 2: the newest one may be the one that a crash cut short",
    )
    need(config.log.completions_every >= 0, "log.completions_every", config.log.completions_every, "must be 0 or steps")
    need(config.log.num_completions >= 0, "log.num_completions", config.log.num_completions, "must be 0 or more")
    problems.finish()


def validate_inference(config: EvaluateConfig | GenerateConfig) -> None:
    """The checks of `grpo.evaluate` and `grpo.generate`; raises ConfigError like `validate`."""
    problems = Problems()
    need = problems.require
    need(
        (config.run is None) != (config.model is None),
        "run",
        config.run,
        "give either run=runs/NAME or a model group such as model=gpt_oss_20b, and not both",
    )
    need(config.step is None or config.run is not None, "step", config.step, "a step needs run=runs/NAME")
    if config.model is not None:
        check_model(config.model, problems)
    check_sampling(config, "", problems)
    if isinstance(config, EvaluateConfig):
        need(config.run is not None or config.env is not None, "env", None, "required without run=; e.g. +env=dataset")
        need(config.num_samples >= 0, "num_samples", config.num_samples, "must be 0 (greedy only) or positive")
        need(config.num_samples > 0 or config.greedy, "num_samples", 0, "nothing to measure with greedy=false")
        need(config.max_prompts >= 1, "max_prompts", config.max_prompts, "must be at least 1 prompt")
        need(config.max_batch >= 1, "max_batch", config.max_batch, "must be at least 1 completion")
    need(config.threads >= 0, "threads", config.threads, "must be 0 (torch's choice) or a number of CPU threads")
    problems.finish()


def is_evaluating(evaluation: EvalConfig) -> bool:
    return evaluation.every > 0 or evaluation.at_start or evaluation.at_end


def check_model(model: ModelConfig, problems: Problems) -> None:
    need = problems.require
    need(
        (model.path is None) != (model.architecture is None),
        "model.path",
        model.path,
        "give a checkpoint (model.path: local folder or hub id) or an architecture to initialise "
        "(model.path=null with model.architecture), and not both",
    )
    if model.path is not None:
        need(
            Path(model.path).expanduser().is_dir() or is_hub_id(model.path),
            "model.path",
            model.path,
            "no such folder, nor a hub id of the form organisation/name; set model.path=FOLDER",
        )
    if model.tokenizer is not None:
        need(
            Path(model.tokenizer).expanduser().exists() or is_hub_id(model.tokenizer),
            "model.tokenizer",
            model.tokenizer,
            "no such file or folder, nor a hub id; set model.tokenizer=FOLDER",
        )
    if model.architecture is not None:
        check_architecture(model.architecture)
        need(
            model.experts not in _PACKED,
            "model.experts",
            str(model.experts),
            "packed experts come from a checkpoint only; set model.experts=bf16 with model.architecture",
        )
    need(model.memory_gb is None or model.memory_gb > 0, "model.memory_gb", model.memory_gb,
         "must be > 0 (1e9 bytes), or null")
    need(model.host_gb >= 0, "model.host_gb", model.host_gb, "must be >= 0 (1e9 bytes)")
    need(model.host_gb == 0 or model.train == Train.lora, "model.host_gb", model.host_gb,
         "host memory serves runs with a frozen base; set model.host_gb=0 or model.train=lora")
    if model.train == Train.full:
        need(
            model.lora is None,
            "model.lora",
            "settings",
            "contradict model.train=full; set model.lora=null or model.train=lora",
        )
        need(
            model.experts not in _PACKED,
            "model.experts",
            str(model.experts),
            "packed experts cannot be trained in full; set model.experts=bf16 or model.train=lora",
        )
    need(
        model.train != Train.lora or model.lora is not None,
        "model.lora",
        None,
        "required by model.train=lora; set model.lora.rank and the other keys, or model.train=full",
    )
    if model.lora is not None:
        lora = model.lora
        need(lora.rank >= 1, "model.lora.rank", lora.rank, "must be at least 1")
        need(lora.alpha > 0, "model.lora.alpha", lora.alpha, "must be > 0 (the update is scaled by alpha / rank)")
        need(
            bool(lora.targets)
            and set(lora.targets) <= set(LORA_TARGETS)
            and len(set(lora.targets)) == len(lora.targets),
            "model.lora.targets",
            lora.targets,
            f"must be distinct names among {', '.join(LORA_TARGETS)}",
        )
        if lora.adapter is not None:
            need(Path(lora.adapter).expanduser().is_dir(), "model.lora.adapter", lora.adapter, "no such folder")


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None and not Path(name).exists()


def check_architecture(architecture: dict) -> None:
    hints = typing.get_type_hints(GptOssConfig)
    allowed = [name for name in hints if name not in ("raw", "is_mxfp4", "is_nf4")]
    for name, value in architecture.items():
        if name not in allowed:
            raise unknown_key(f"model.architecture.{name}", allowed)
        if not fits(value, hints[name]):
            raise ConfigError(
                f"model.architecture.{name} = {value!r} ({type(value).__name__}): expected {describe_type(hints[name])}"
            )
    try:
        # the tokenizer's size is not known yet; any positive number passes
        GptOssConfig.from_architecture({"vocab_size": 1, **architecture})
    except ValueError as error:
        raise ConfigError(f"model.architecture: {error}") from error


def check_sampling(sampling: RolloutConfig | EvaluateConfig | GenerateConfig, prefix: str, problems: Problems) -> None:
    need = problems.require
    need(sampling.max_new_tokens >= 1, prefix + "max_new_tokens", sampling.max_new_tokens, "must be at least 1 token")
    need(
        0 < sampling.temperature < float("inf"),
        prefix + "temperature",
        sampling.temperature,
        "must be > 0: rollouts are sampled, and log-probs are those at this temperature; 1.0 is usual",
    )
    need(sampling.top_k >= 0, prefix + "top_k", sampling.top_k, "must be 0 (off) or a number of tokens to keep")
    need(0 < sampling.top_p <= 1, prefix + "top_p", sampling.top_p, "must lie in (0, 1]; 1 is off")
    need(0 <= sampling.min_p < 1, prefix + "min_p", sampling.min_p, "must lie in [0, 1); 0 is off")


def check_rollout_and_optim(config: TrainConfig, problems: Problems) -> None:
    need, rollout, optim = problems.require, config.rollout, config.optim
    need(rollout.prompts_per_step >= 1, "rollout.prompts_per_step", rollout.prompts_per_step, "must be at least 1")
    need(
        rollout.group_size >= 2,
        "rollout.group_size",
        rollout.group_size,
        "must be at least 2: an advantage is a reward against the others of its group; 8 or 16 is usual",
    )
    need(rollout.max_batch >= 1, "rollout.max_batch", rollout.max_batch, "must be at least 1 completion")
    need(rollout.cache_gb is None or rollout.cache_gb > 0, "rollout.cache_gb", rollout.cache_gb,
         "must be above 0 (1e9 bytes), or null for a share of the GPU's free memory")
    need(rollout.refill_rounds >= 0, "rollout.refill_rounds", rollout.refill_rounds, "must be 0 (off) or more")
    need(optim.minibatches >= 1, "optim.minibatches", optim.minibatches, "must be at least 1 update")
    need(
        optim.minibatches <= rollout.prompts_per_step,
        "optim.minibatches",
        optim.minibatches,
        f"must not exceed rollout.prompts_per_step ({rollout.prompts_per_step}); lower it or sample more prompts",
    )
    need(optim.epochs >= 1, "optim.epochs", optim.epochs, "must be at least 1 pass over a batch")
    need(
        optim.max_tokens > rollout.max_new_tokens,
        "optim.max_tokens",
        optim.max_tokens,
        f"must hold a prompt and rollout.max_new_tokens ({rollout.max_new_tokens}); raise it",
    )
    need(
        optim.decay_steps is None or optim.decay_steps >= 1,
        "optim.decay_steps",
        optim.decay_steps,
        "must be at least 1 update, or null for all after the warm-up",
    )


def check_adamw(optim: OptimConfig | WarmupConfig, key: str, problems: Problems) -> None:
    need = problems.require
    need(0 < optim.lr < float("inf"), f"{key}.lr", optim.lr, "must be > 0")
    need(
        len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas),
        f"{key}.betas",
        optim.betas,
        "must be two numbers in [0, 1), such as [0.9,0.99]",
    )
    need(optim.weight_decay >= 0, f"{key}.weight_decay", optim.weight_decay, "must be 0 or more")
    need(optim.warmup_steps >= 0, f"{key}.warmup_steps", optim.warmup_steps, "must be 0 or more")
    need(0 <= optim.final_lr_ratio <= 1, f"{key}.final_lr_ratio", optim.final_lr_ratio, "must lie in [0, 1]")
    need(optim.max_grad_norm > 0, f"{key}.max_grad_norm", optim.max_grad_norm, "must be > 0; 1.0 is usual")
    if isinstance(optim, OptimConfig):
        need(optim.eps > 0, f"{key}.eps", optim.eps, "must be > 0; 1e-8 is usual")
        scale = optim.loss_scale
        need(
            scale is None or scale > 0 and math.frexp(scale)[0] == 0.5,
            f"{key}.loss_scale",
            scale,
            "must be null or a power of two, such as 65536",
        )


def check_warmup(warmup: WarmupConfig, problems: Problems) -> None:
    need = problems.require
    check_adamw(warmup, "warmup", problems)
    need(warmup.steps >= 1, "warmup.steps", warmup.steps, "must be at least 1; no warm-up is warmup=null")
    need(warmup.batch_size >= 1, "warmup.batch_size", warmup.batch_size, "must be at least 1 demonstration")
    need(0 <= warmup.decay_fraction <= 1, "warmup.decay_fraction", warmup.decay_fraction, "must lie in [0, 1]")


def check_loss(loss: dict, problems: Problems) -> None:
    """The ranges of the keywords that the losses here share; `bind` checks their names and types."""
    for name, high, allowed in (
        ("clip_low", 1.0, "must lie in (0, 1]"),
        ("clip_high", float("inf"), "must be > 0"),
        ("length_normalizer", float("inf"), "must be > 0; rollout.max_new_tokens is usual"),
    ):
        value = loss.get(name)
        if isinstance(value, (int, float)):
            problems.require(0 < value <= high, f"loss.{name}", value, allowed)
