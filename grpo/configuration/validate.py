"""Checks of a configuration: ranges (each stands at its field in grpo/config.py), contradictions, folders that must exist.

They run before torch is imported or anything is loaded; every complaint names the key, its value and what is allowed.
"""

import dataclasses
import math
import os
import re
import typing
from pathlib import Path
from typing import Callable

from grpo.config import (
    ConfigError,
    EvalConfig,
    EvaluateConfig,
    Experts,
    GenerateConfig,
    ModelConfig,
    Train,
    TrainConfig,
    UnknownKey,
    describe_type,
)
from grpo.configuration.targets import fits
from models.config import ARCHITECTURE_FIELDS, GptOssConfig

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "experts", "router")
MAX_NAME_BYTES = 200  # file systems take 255, with what others put before and after it


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
        re.fullmatch(r"[\w+=-][\w.+=-]*", config.name) is not None and len(config.name.encode()) <= MAX_NAME_BYTES,
        "name",
        config.name,
        f"must be a folder name of letters, digits and _ . + = -, of at most {MAX_NAME_BYTES} bytes; choose one with "
        "name=NAME (++name= where it holds a ${...})",
    )
    need(
        "${" not in config.output_dir,
        "output_dir",
        config.output_dir,
        "is taken literally; write ++output_dir= where it holds a ${...}",
    )
    check_ranges(config, "", problems)
    check_threads(config.threads, problems)
    check_model(config.model, problems, reads_adapter=not config.resume)
    check_rollout_and_optim(config, problems)
    for key, node in (("env", config.env), ("loss", config.loss)):
        need("_target_" in node, f"{key}._target_", None, f"required; choose a file of configs/{key} with {key}=NAME")
    evaluation = config.eval
    need(
        evaluation.num_samples > 0 or evaluation.greedy or not is_evaluating(evaluation),
        "eval.num_samples",
        0,
        "nothing to measure with eval.greedy=false; set eval.num_samples=1 or eval.greedy=true",
    )
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
    check_ranges(config, "", problems)
    check_threads(config.threads, problems)
    if config.model is not None:
        check_model(config.model, problems, reads_adapter=True)
    if isinstance(config, EvaluateConfig):
        need(config.run is not None or config.env is not None, "env", None, "required without run=; e.g. +env=dataset")
        need(config.num_samples > 0 or config.greedy, "num_samples", 0, "nothing to measure with greedy=false")
    problems.finish()


def check_ranges(node: object, prefix: str, problems: Problems) -> None:
    """Every number against the interval of its field (`grpo.config.number`), those of nested nodes and of lists too."""
    for item in dataclasses.fields(node):
        value, key = getattr(node, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.", problems)
        elif "interval" in item.metadata:
            interval, hint = item.metadata["interval"], item.metadata["hint"]
            numbers = [entry for entry in (value if isinstance(value, list) else [value]) if entry is not None]
            wrong = [entry for entry in numbers if not lies_in(entry, interval)]
            problems.require(not wrong, key, value, describe_interval(interval, wrong) + (f": {hint}" if hint else ""))


def lies_in(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    if isinstance(value, int) and high == math.inf:
        high = 2.0**31
    is_above = value >= low if interval[0] == "[" else value > low
    return is_above and (value <= high if interval[-1] == "]" else value < high)


def describe_interval(interval: str, wrong: list[float]) -> str:
    """What is allowed, in words that fit the numbers that are not: "[1, inf)" is "must be at least 1"."""
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"must lie in {interval}"
    is_too_large = any(entry > float(low) for entry in wrong)
    most = "" if not is_too_large else " and less than 2^31" if isinstance(wrong[0], int) else " and finite"
    return f"must be {'at least' if interval[0] == '[' else '>'} {low}{most}"


def check_threads(threads: int, problems: Problems) -> None:
    most = max(64, 8 * (os.cpu_count() or 1))
    problems.require(threads <= most, "threads", threads, f"must be 0 (torch's choice) or at most {most} on this machine")


def is_evaluating(evaluation: EvalConfig) -> bool:
    return evaluation.every > 0 or evaluation.at_start or evaluation.at_end


def check_model(model: ModelConfig, problems: Problems, *, reads_adapter: bool) -> None:
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
            is_there(model.path, Path.is_dir) or is_hub_id(model.path),
            "model.path",
            model.path,
            "no such folder, nor a hub id of the form organisation/name; set model.path=FOLDER",
        )
    if model.tokenizer is not None:
        need(
            is_there(model.tokenizer, Path.exists) or is_hub_id(model.tokenizer),
            "model.tokenizer",
            model.tokenizer,
            "no such file or folder, nor a hub id; set model.tokenizer=FOLDER",
        )
    if model.architecture is not None:
        check_architecture(model.architecture)
        need(
            not is_packed(model.experts),
            "model.experts",
            str(model.experts),
            "packed experts come from a checkpoint only; set model.experts=bf16 with model.architecture",
        )
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
            not is_packed(model.experts),
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
        need(
            bool(lora.targets)
            and set(lora.targets) <= set(LORA_TARGETS)
            and len(set(lora.targets)) == len(lora.targets),
            "model.lora.targets",
            lora.targets,
            f"must be distinct names among {', '.join(LORA_TARGETS)}",
        )
        if lora.adapter is not None and reads_adapter:  # a checkpoint holds what became of it
            need(is_there(lora.adapter, Path.is_dir), "model.lora.adapter", lora.adapter, "no such folder")


def is_there(name: str, test: Callable[[Path], bool]) -> bool:
    """`test` of the path, false for what can be no path: names too long for the file system, `~nobody`."""
    try:
        return test(Path(name).expanduser())
    except (OSError, RuntimeError, ValueError):
        return False


def is_hub_id(name: str) -> bool:
    is_one = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None and len(name) <= 96  # the hub's limit
    return is_one and not is_there(name, Path.exists)


def is_packed(experts: Experts) -> bool:
    """Whether the word names a format of packed experts."""
    from models.experts import FORMATS  # not at the top: it imports torch, and a bad setting fails before

    return experts != Experts.auto and FORMATS[experts].is_packed


def check_architecture(architecture: dict) -> None:
    hints = typing.get_type_hints(GptOssConfig)
    for name, value in architecture.items():
        if name not in ARCHITECTURE_FIELDS:
            raise UnknownKey(f"model.architecture.{name}", ARCHITECTURE_FIELDS)
        if not fits(value, hints[name]):
            raise ConfigError(
                f"model.architecture.{name} = {value!r} ({type(value).__name__}): expected {describe_type(hints[name])}"
            )
    try:
        # the tokenizer's size is not known yet; any positive number passes
        GptOssConfig.from_architecture({"vocab_size": 1, **architecture})
    except ValueError as error:
        raise ConfigError(f"model.architecture: {error}") from error


def check_rollout_and_optim(config: TrainConfig, problems: Problems) -> None:
    need, rollout, optim = problems.require, config.rollout, config.optim
    need(
        optim.minibatches <= rollout.prompts_per_step,
        "optim.minibatches",
        optim.minibatches,
        f"must not exceed rollout.prompts_per_step ({rollout.prompts_per_step}); lower it or sample more prompts",
    )
    need(
        optim.max_tokens > rollout.max_new_tokens,
        "optim.max_tokens",
        optim.max_tokens,
        f"must hold a prompt and rollout.max_new_tokens ({rollout.max_new_tokens}); raise it",
    )
    for key, node in (("optim", optim), ("warmup", config.warmup)):
        if node is not None:
            need(len(node.betas) == 2, f"{key}.betas", node.betas, "must be two numbers in [0, 1), such as [0.9,0.99]")
    scale = optim.loss_scale
    need(
        scale is None or not 0 < scale < math.inf or math.frexp(scale)[0] == 0.5,
        "optim.loss_scale",
        scale,
        "must be null or a power of two, such as 65536",
    )
