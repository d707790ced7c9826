"""Checks for contradictions between keys of a configuration, and of things outside it: folders that must exist, this machine.

The range of a number stands at its field in grpo/config.py. All checks run before torch is imported or anything is loaded;
every complaint names the key, its value and what is allowed.
"""

import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from grpo.config import (
    LORA_TARGETS,
    ConfigError,
    EvalConfig,
    EvaluateConfig,
    Experts,
    GenerateConfig,
    InferenceConfig,
    InFlight,
    ModelConfig,
    OldLogProbs,
    Train,
    TrainConfig,
    UnknownKey,
    WeightKind,
    describe_type,
)
from grpo.configuration.algorithm import Baseline, Estimator, KlPlace, Scale, Whiten
from grpo.configuration.fields import out_of_range
from grpo.configuration.inert import inert_problems
from grpo.configuration.targets import dotted_target, fits
from models.config import ARCHITECTURE_FIELDS, GptOssConfig

MAX_NAME_BYTES = 200  # file systems take 255, with what others put before and after it
UNPACKED = (Experts.auto, Experts.bf16)  # all others are packed; models.experts knows too, but imports torch
Problem = tuple[str, object, str]  # key, its value, what is allowed


def validate(config: TrainConfig) -> None:
    """Raises ConfigError listing every value that is out of range or contradicts another, before anything is loaded."""
    model = model_problems(config.model, reads_adapter=not config.resume)
    refuse(config, chain(run_problems(config), thread_problems(config.threads), model, step_problems(config),
                         advantage_problems(config), best_problems(config), inert_problems(config)))


def validate_inference(config: InferenceConfig) -> None:
    """The checks of `grpo.evaluate` and `grpo.generate`; raises ConfigError like `validate`."""
    model = model_problems(config.model, reads_adapter=True) if config.model is not None else ()
    refuse(config, chain(inference_problems(config), thread_problems(config.threads), model))


def refuse(config: object, problems: Iterable[Problem]) -> None:
    lines = [*out_of_range(config), *(f"{key} = {value!r}: {allowed}" for key, value, allowed in problems)]
    if lines:
        raise ConfigError("\n".join(lines))


def run_problems(config: TrainConfig) -> Iterator[Problem]:
    if not re.fullmatch(r"[\w+=-][\w.+=-]*", config.name) or len(config.name.encode()) > MAX_NAME_BYTES:
        yield "name", config.name, (
            f"must be a folder name of letters, digits and _ . + = -, of at most {MAX_NAME_BYTES} bytes; choose one with "
            "name=NAME (++name= where it holds a ${...})")
    if "${" in config.output_dir:
        yield "output_dir", config.output_dir, "is taken literally; write ++output_dir= where it holds a ${...}"
    for key, node in (("env", config.env), ("loss", config.loss)):
        if "_target_" not in node:
            yield f"{key}._target_", None, f"required; choose a file of configs/{key} with {key}=NAME"


def thread_problems(threads: int) -> Iterator[Problem]:
    most = max(64, 8 * (os.cpu_count() or 1))
    if threads > most:
        yield "threads", threads, f"must be 0 (torch's choice) or at most {most} on this machine"


def model_problems(model: ModelConfig, *, reads_adapter: bool) -> Iterator[Problem]:
    if (model.path is None) == (model.architecture is None):
        yield "model.path", model.path, (
            "give a checkpoint (model.path: local folder or hub id) or an architecture to initialise "
            "(model.path=null with model.architecture), and not both")
    if model.path is not None and not is_there(model.path, Path.is_dir) and not is_hub_id(model.path):
        yield "model.path", model.path, "no such folder, nor a hub id of the form organisation/name; set model.path=FOLDER"
    elif model.path is not None and is_there(model.path, lacks_checkpoint):
        exported = f"{model.path}/model"
        hint = f", as {exported}, which this run exported" if is_there(exported, Path.is_dir) else ""
        yield "model.path", model.path, f"a folder without config.json, which every checkpoint has; name one with it{hint}"
    if model.tokenizer is not None and not is_there(model.tokenizer, Path.exists) and not is_hub_id(model.tokenizer):
        yield "model.tokenizer", model.tokenizer, "no such file or folder, nor a hub id; set model.tokenizer=FOLDER"
    if model.architecture is not None:
        check_architecture(model.architecture)
        if model.experts not in UNPACKED:
            yield "model.experts", str(model.experts), (
                "packed experts come from a checkpoint only; set model.experts=bf16 with model.architecture")
    if model.train == Train.lora:
        if model.lora is None:
            yield "model.lora", None, (
                "required by model.train=lora; set model.lora.rank and the other keys, or model.train=full")
    else:
        if model.lora is not None:
            yield "model.lora", "settings", "contradict model.train=full; set model.lora=null or model.train=lora"
        if model.experts not in UNPACKED:
            yield "model.experts", str(model.experts), (
                "packed experts cannot be trained in full; set model.experts=bf16 or model.train=lora")
    if model.lora is not None:
        targets, adapter = model.lora.targets, model.lora.adapter
        if not targets or not set(targets) <= set(LORA_TARGETS) or len(set(targets)) < len(targets):
            yield "model.lora.targets", targets, f"must be distinct names among {', '.join(LORA_TARGETS)}"
        if adapter is not None and reads_adapter and not is_there(adapter, Path.is_dir):  # a checkpoint holds what became of it
            yield "model.lora.adapter", adapter, "no such folder"


def lacks_checkpoint(path: Path) -> bool:
    """Whether it is a folder with no checkpoint in either layout."""
    return path.is_dir() and not any((path / name).exists() for name in ("config.json", "original/config.json"))


def is_there(name: str, test: Callable[[Path], bool]) -> bool:
    """`test` of the path, false for what can be no path: names too long for the file system, `~nobody`."""
    try:
        return test(Path(name).expanduser())
    except (OSError, RuntimeError, ValueError):
        return False


def is_hub_id(name: str) -> bool:
    is_one = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None and len(name) <= 96  # the hub's limit
    return is_one and not is_there(name, Path.exists)


def check_architecture(architecture: dict) -> None:
    """Raises ConfigError for fields that there are not, of another type, or that contradict each other."""
    hints = typing.get_type_hints(GptOssConfig)
    for name, value in architecture.items():
        if name not in ARCHITECTURE_FIELDS:
            raise UnknownKey(f"model.architecture.{name}", ARCHITECTURE_FIELDS)
        if not fits(value, hints[name]):
            expected = describe_type(hints[name])
            raise ConfigError(f"model.architecture.{name} = {value!r} ({type(value).__name__}): expected {expected}")
    try:
        # the tokenizer's size is not known yet; any positive number passes
        GptOssConfig.from_architecture({"vocab_size": 1, **architecture})
    except ValueError as error:
        raise ConfigError(f"model.architecture: {error}") from error


def step_problems(config: TrainConfig) -> Iterator[Problem]:
    rollout, optim, evaluation = config.rollout, config.optim, config.eval
    if optim.minibatches > rollout.prompts_per_step:
        yield "optim.minibatches", optim.minibatches, (
            f"must not exceed rollout.prompts_per_step ({rollout.prompts_per_step}); lower it or sample more prompts")
    if optim.replay_routing and rollout.replay_routing:
        yield "optim.replay_routing", True, (
            "rollout.replay_routing=true already fixes the experts, to the sampler's choice: set one of the two to false")
    if optim.replay_routing and optim.minibatches * optim.epochs == 1:
        yield "optim.replay_routing", True, (
            "a step makes one update, which needs no replay: set optim.minibatches or optim.epochs above 1, or leave it off")
    if optim.in_backward and optim.max_grad_norm is not None:
        yield "optim.in_backward", True, (
            f"a parameter is updated before the norm of all gradients is known: set optim.max_grad_norm=null (now "
            f"{optim.max_grad_norm:g}), or optim.in_backward=false")
    yield from correction_problems(config)
    if rollout.in_flight == InFlight.switch:
        yield from in_flight_problems(config)
    if config.kl.estimator == Estimator.full and config.kl.place != KlPlace.loss:
        yield "kl.estimator", "full", (
            f"its gradient is one of the loss, and a reward (kl.place={config.kl.place}) is lowered by k1: set kl.place=loss, or "
            "another kl.estimator")
    elif config.kl.estimator == Estimator.full and not config.kl.is_full:
        yield "kl.estimator", "full", (
            "changes nothing without kl.coefficient above 0, and no KL is measured: set that, or leave it at k3")
    if config.kl.refresh_every is not None and not config.needs_reference:
        yield "kl.refresh_every", config.kl.refresh_every, (
            "no reference is there to renew: set kl.coefficient above 0, or kl.refresh_every=null")
    if optim.sums_log_probs and optim.minibatches * optim.epochs > 1:
        yield "optim.sums_log_probs", True, (
            f"the log-probs before the update are those of one update: set optim.minibatches=1 (now {optim.minibatches}) and "
            f"optim.epochs=1 (now {optim.epochs})")
    if rollout.overlong_buffer is not None and rollout.overlong_buffer > rollout.max_new_tokens:
        yield "rollout.overlong_buffer", rollout.overlong_buffer, (
            f"the last tokens before rollout.max_new_tokens ({rollout.max_new_tokens}) cannot be more than these; lower it")
    for key, node in (("optim", optim), ("warmup", config.warmup)):
        if node is not None and len(node.betas) != 2:
            yield f"{key}.betas", node.betas, "must be two numbers in [0, 1), such as [0.9,0.99]"
    scale = optim.loss_scale
    if scale is not None and 0 < scale < math.inf and math.frexp(scale)[0] != 0.5:
        yield "optim.loss_scale", scale, "must be null or a power of two, such as 65536"
    if is_evaluating(evaluation) and evaluation.num_samples == 0 and not evaluation.greedy:
        yield "eval.num_samples", 0, "nothing to measure with eval.greedy=false; set eval.num_samples=1 or eval.greedy=true"


def in_flight_problems(config: TrainConfig) -> Iterator[Problem]:
    key = "rollout.in_flight"
    if config.rollout.max_staleness < 2:
        yield key, "switch", (f"with rollout.max_staleness={config.rollout.max_staleness} one policy draws a completion in any "
                              "case: set rollout.max_staleness=2 or more, or rollout.in_flight=keep")
    if config.rollout.replay_routing:
        yield key, "switch", ("the experts on record would be several policies': set rollout.replay_routing=false, or "
                              "rollout.in_flight=keep")
    if config.curriculum.is_on:
        yield key, "switch", ("a curriculum would choose other prompts when a rollout is refilled than when it was begun: set "
                              "curriculum.retire_at=null, retire_unsolved=null and candidates=1, or rollout.in_flight=keep")


def correction_problems(config: TrainConfig) -> Iterator[Problem]:
    corrections = config.corrections
    bounds = corrections.geometric
    if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] <= 1 <= bounds[1] < math.inf):
        yield "corrections.geometric", bounds, "must be null or two ratios around 1, such as [0.99,1.01]"
    if corrections.weighs and config.optim.old_log_probs == OldLogProbs.sampler:
        yield "optim.old_log_probs", "sampler", (
            "the loss then takes its ratio to the sampler itself, which corrections.weight, geometric and max_k3 would count "
            "again: set optim.old_log_probs=trainer, or leave those off")
    if corrections.weight != WeightKind.none and dotted_target(config.loss) == "grpo.losses.dppo":
        yield "corrections.weight", str(corrections.weight), (
            "dppo weighs by the ratio to the sampler itself, which would count twice: set corrections.weight=none, or choose "
            "another loss")


def advantage_problems(config: TrainConfig) -> Iterator[Problem]:
    advantage, kl = config.advantage, config.kl
    if advantage.k is not None and advantage.baseline != Baseline.best_of_others:
        yield "advantage.k", advantage.k, "belongs to advantage.baseline=best_of_others: set that, or advantage.k=null"
    if advantage.k is not None and advantage.k > config.rollout.group_size:
        yield "advantage.k", advantage.k, f"must not exceed rollout.group_size ({config.rollout.group_size})"
    if kl.is_in_reward:
        if config.optim.mask_truncated:
            yield "kl.place", str(kl.place), (
                "the KL of completions that are not trained on is not computed: set optim.mask_truncated=false or kl.place=loss")
        if advantage.components is not None:
            yield "kl.place", str(kl.place), (
                "lowers a reward of one number: set advantage.components=null or kl.place=loss")
        if kl.place == KlPlace.reward_to_go and advantage.scale != Scale.none:
            yield "kl.place", "reward_to_go", (
                f"is in units of reward, which advantage.scale={advantage.scale} changes: set advantage.scale=none or "
                "kl.place=reward")
        if kl.place == KlPlace.reward_to_go and (
                advantage.whiten == Whiten.sequences or advantage.baseline == Baseline.best_of_others):
            yield "kl.place", "reward_to_go", (
                f"takes advantages that follow the reward one to one, which advantage.whiten={advantage.whiten} with "
                f"advantage.baseline={advantage.baseline} are not: set kl.place=reward, or advantage.whiten=tokens or none with "
                "another baseline")
        if advantage.scale == Scale.mean:
            yield "kl.place", str(kl.place), (
                "the mean of lowered rewards, which advantage.scale=mean divides by, may come near 0 from either side: set "
                "kl.place=loss, or another advantage.scale")


def best_problems(config: TrainConfig) -> Iterator[Problem]:
    """Which other metrics evaluations have is known once there is one."""
    key, best = "checkpoint.best", config.checkpoint.best
    if best is not None and not best.startswith("eval/"):
        yield key, best, "must be null or a metric of evaluations, eval/NAME, such as eval/greedy_accuracy"
    elif best is not None and not is_evaluating(config.eval):
        yield key, best, "the run makes no evaluation: set eval.every above 0, eval.at_end=true, or checkpoint.best=null"


def is_evaluating(evaluation: EvalConfig) -> bool:
    return evaluation.every > 0 or evaluation.at_start or evaluation.at_end


def inference_problems(config: InferenceConfig) -> Iterator[Problem]:
    if (config.run is None) == (config.model is None):
        yield "run", config.run, "give either run=runs/NAME or a model group such as model=gpt_oss_20b, and not both"
    if config.step is not None and config.run is None:
        yield "step", config.step, "a step needs run=runs/NAME"
    if isinstance(config, GenerateConfig):
        if config.model is not None and config.model.path is None and config.model.tokenizer is None:
            yield "model.path", None, "a model without a checkpoint has no tokenizer: set model.path=FOLDER"
        if config.prompts is not None and config.prompt is not None:
            yield "prompt", config.prompt, "give one question (prompt=) or a file of them (prompts=), and not both"
        if (config.prompts is None) != (config.output is None):
            yield "output", config.output, "goes with prompts=FILE, whose answers it gets: give both, or neither"
        if config.prompts is None and config.num_samples > 1:
            yield "num_samples", config.num_samples, "goes with prompts=FILE: a chat has one answer to a question"
    if isinstance(config, EvaluateConfig):
        if config.run is None and config.env is None:
            yield "env", None, "required without run=; e.g. +env=dataset"
        if config.env is not None and "_target_" not in config.env:
            yield "env", config.env, "names no environment: choose one with +env=NAME, or leave env out for the run's own"
        if config.num_samples == 0 and not config.greedy:
            yield "num_samples", 0, "nothing to measure with greedy=false"
