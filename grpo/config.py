"""The configuration of a run: its dataclass schema with units, and the typed conversion.

YAML under `configs/` holds values, this file holds types. `grpo/configuration/` composes the one into the other for the entry
points and checks the result. Nothing here imports torch, so a bad configuration fails in a second. After `to_typed`, code
sees dataclasses only.
"""

import dataclasses
import functools
import inspect
import os
import re
import typing
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.configuration.algorithm import AdvantageConfig, EntropyConfig, KlConfig
from grpo.configuration.fields import number
from grpo.configuration.nodes import CheckpointConfig, CurriculumConfig, LogConfig, SelftestConfig, WandbConfig
from grpo.configuration.suggestions import suggest
from grpo.distributed.settings import DistributedConfig, WaitConfig
from models.chat.form import Form
from models.formats.atomic import write_text


class Device(StrEnum):
    auto = "auto"  # cuda where there is one, else cpu
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    auto = "auto"  # on cuda bfloat16, or float16 where the GPU has no bfloat16; on cpu float32
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"  # GPUs only; trains adapters only


class Experts(StrEnum):
    auto = "auto"  # what the checkpoint holds
    mxfp4 = "mxfp4"  # this one and the next pack dense experts while they are loaded
    nf4 = "nf4"
    bf16 = "bf16"  # unpacks packed ones


class Train(StrEnum):
    lora = "lora"
    full = "full"


class LrSchedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Moments(StrEnum):
    fp32 = "fp32"
    int8 = "int8"  # 8 bits and an absmax for each 256 elements: a quarter of the memory


class WeightUpdates(StrEnum):
    """How updates of bf16 weights, each smaller than a weight's last bit, add up; fp32 weights (LoRA) need none of it."""

    master = "master"  # in an fp32 copy
    stochastic = "stochastic"  # by stochastic rounding, in no more memory
    compensated = "compensated"  # in a second bf16 tensor of what rounding took


class OldLogProbs(StrEnum):
    sampler = "sampler"  # the log-probs recorded while sampling
    trainer = "trainer"  # a pass of the policy before its first update on the batch


class WeightKind(StrEnum):
    none = "none"
    truncate = "truncate"  # the ratio, kept within low and high
    mask = "mask"  # the ratio, 0 outside of low and high


class RatioLevel(StrEnum):
    token = "token"
    sequence = "sequence"  # the product over the sequence's tokens


class InFlight(StrEnum):
    """Which policy draws the rest of a completion when the policy has moved (grpo/rollout/in_flight.py)."""

    keep = "keep"  # the one that began it
    switch = "switch"  # the newest one


class SandboxMode(StrEnum):
    auto = "auto"  # refuses to start where the kernel cannot confine model-written code
    strict = "strict"  # refuses where any of the layers against files, system calls, memory and root is missing
    process = "process"  # unsafe: a process of its own, and the layers that there are
    off = "off"  # runs no model-written code: refuses tasks that need it


class ReasoningEffort(StrEnum):
    low = "low"
    medium = "medium"
    high = "high"


# (interval, hint) of what several parts set
SEED = ("[0, 9223372036854775807]", "")
TOP_K = ("[0, inf)", "the number of tokens to keep; 0 is off")
TOP_P = ("(0, 1]", "1 is off")
MIN_P = ("[0, 1)", "0 is off")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "experts", "router")


@dataclass
class LoraSettings:
    rank: int = number("[1, inf)")
    alpha: float = number("(0, inf)", "the update is scaled by alpha / rank")
    targets: List[str] = MISSING  # distinct, among LORA_TARGETS
    train_sinks: bool = MISSING
    train_norms: bool = MISSING
    adapter: Optional[str] = None  # PEFT folder to start from; null: fresh (B = 0)


@dataclass
class ModelConfig:
    path: Optional[str] = MISSING  # local folder or hub id; null: initialise `architecture` from the seed
    tokenizer: Optional[str] = None  # folder or tokenizer.json; null: the checkpoint's, or the environment's tiny one
    # fields of models.config.GptOssConfig, for a model without a checkpoint; vocab_size, eos_token_id and pad_token_id
    # are the tokenizer's where they are left out
    architecture: Optional[Dict[str, Any]] = None
    experts: Experts = MISSING
    train: Train = MISSING
    activation_checkpointing: bool = MISSING  # recompute layers in the backward: less memory, same numbers
    # most GPU memory of the process, the CUDA context included (1e9 bytes; null: what the GPU has), and most pinned host memory
    # for what the GPU does not hold (null: what is free). Where everything lies is planned before the model is loaded (python -m
    # grpo.plan). With activation_checkpointing layers keep for the backward what there is room for
    memory_gb: Optional[float] = number("(0, inf)", "in 1e9 bytes, or null", default=None)
    host_gb: Optional[float] = number("[0, inf)", "in 1e9 bytes, or null", default=None)
    lora: Optional[LoraSettings] = None


@dataclass
class CorrectionsConfig:
    """Weights of tokens by how likely the trainer's policy samples them, against the sampler's (grpo/corrections.py). Where
    rollout.max_staleness is 0 these ratios are 1, up to what a CPU rounds."""

    weight: WeightKind = WeightKind.none
    level: RatioLevel = RatioLevel.token
    low: float = number("[0, 1]", "0 is none; IcePop: 0.5", default=0.0)  # ratios
    high: float = number("[1, inf)", "2 is usual; IcePop: 5", default=2.0)
    # a sequence is left out unless the geometric mean of its ratios is within [low, high], such as [0.99,1.01]; null: none is
    geometric: Optional[List[float]] = None
    # a sequence is left out if the mean of its tokens' ratio - 1 - log ratio is larger; null: none is
    max_k3: Optional[float] = number("(0, inf)", "in nats, or null; 0.001 to 0.01 is usual", default=None)
    # a sequence with a negative advantage is left out if the policy has become less likely by more (mean over tokens); null: none
    opsm_delta: Optional[float] = number("[0, inf)", "in nats, or null; 0.0001 is usual", default=None)

    @property
    def weighs(self) -> bool:
        """Whether anything but OPSM is on."""
        return self.weight != WeightKind.none or self.geometric is not None or self.max_k3 is not None

    @property
    def is_on(self) -> bool:
        return self.weighs or self.opsm_delta is not None


@dataclass
class RolloutConfig:
    prompts_per_step: int = number("[1, inf)")
    # completions of each prompt
    group_size: int = number("[2, inf)", "an advantage is a reward against the others of its group; 8 or 16 is usual")
    max_new_tokens: int = number("[1, inf)")  # tokens
    temperature: float = number("(0, inf)", "rollouts are sampled, and log-probs are those at this temperature; 1.0 is usual")
    top_k: int = number(*TOP_K)
    top_p: float = number(*TOP_P)
    min_p: float = number(*MIN_P)
    max_batch: int = number("[1, inf)")  # completions decoded together; does not change what is sampled
    # largest size of the KV cache, 1e9 bytes; completions that do not fit wait. null: on a GPU a share of the memory that is free
    # when a rollout starts, but never more than its completions need
    cache_gb: Optional[float] = number("(0, inf)", "in 1e9 bytes, or null for a share of the GPU's free memory", default=None)
    refill_rounds: int = number("[0, inf)", "0 is off")  # most further draws of prompts, to replace groups with equal rewards
    # prompts sampled at a time / prompts still needed, rounded up; the first ones with different rewards are trained on
    oversampling: float = number("[1, 16]", "1 is off", default=1.0)
    # DAPO's soft punishment, added to a reward before its group is compared: it falls linearly from 0 to -overlong_penalty over
    # the last overlong_buffer tokens before max_new_tokens. null is off
    overlong_buffer: Optional[int] = number("[1, inf)", "in tokens, or null for off", default=None)
    overlong_penalty: float = number("(0, inf)", "in units of reward; 1 is DAPO's", default=1.0)
    # the run ends (exit code 7) after this many steps in a row without a group to train on; null: never
    max_dead_steps: Optional[int] = number("[1, inf)", "null for never", default=None)
    # a step trains on completions that the policy of so many steps before has sampled; 0: its own. They come with `corrections`.
    # Of fewer at a run's start, and where a finished run goes on with more steps, whose rollouts were not drawn ahead
    max_staleness: int = number("[0, 64]", "0 is off", default=0)
    # with max_staleness of at least 2: keep, a completion is drawn by one policy; switch, it goes on under each newer one, which
    # draws the next max_new_tokens / max_staleness tokens. The completions of max_staleness steps are then decoded together
    in_flight: InFlight = InFlight.keep
    replay_routing: bool = False  # the update sends every token through the experts that the sampler chose for it


@dataclass
class TurnsConfig:
    """Limits of completions in which the model calls tools; of no account in an environment without tools."""

    max_turns: int = number("[1, inf)", default=8)  # the model's turns; a call that ends the last one is not answered
    max_result_tokens: int = number("[1, inf)", default=1024)  # tokens of a call's result; the rest is cut off
    # time for a call; an environment that takes longer is given up, and its completion drops out of its group
    call_seconds: float = number("(0, inf)", default=60.0)
    # reward of a completion whose tool hangs, exits, returns too much or leaves processes in a call that the model made; null:
    # it drops out of its group, which a model can use to avoid a bad reward if its arguments can do that
    failed_call_reward: Optional[float] = number("(-inf, inf)", "or null", default=None)
    form: Form = Form.hub


@dataclass
class OptimConfig:
    """AdamW, its schedule, and how a batch becomes updates. A GRPO step makes minibatches x epochs updates; warmup_steps and
    decay_steps count updates."""

    lr: float = number("(0, inf)")
    betas: List[float] = number("[0, 1)")
    eps: float = number("(0, inf)", "1e-8 is usual")
    weight_decay: float = number("[0, inf)")
    warmup_steps: int = number("[0, inf)")  # updates with linearly rising lr
    schedule: LrSchedule = MISSING
    # number of last updates in which lr falls
    decay_steps: Optional[int] = number("[1, inf)", "null for all after the warm-up", default=None)
    final_lr_ratio: float = number("[0, 1]")  # lr of the last update / lr; of no account with schedule=constant
    # global L2 norm that gradients are scaled down to
    max_grad_norm: Optional[float] = number("(0, inf)", "1.0 is usual, null is off")
    # Adam's moments, and how bf16 weights are updated; kernels/adamw.py states the error of each choice
    moments: Moments = Moments.fp32
    weights: WeightUpdates = WeightUpdates.master
    # update each parameter as soon as the backward has its gradient, which then needs no memory. Needs max_grad_norm=null; an
    # update from several micro-batches keeps its gradients all the same
    in_backward: bool = False
    # tokens in one micro-batch: bounds activation memory; does not change the gradient. A longer sequence is one of its own
    max_tokens: int = number("[1, inf)")
    # a micro-batch has a group's prompt once, before all its completions: fewer tokens, the same gradient
    share_prompts: bool = False
    minibatches: int = number("[1, inf)")  # updates each epoch
    whole_prompts: bool = False  # a minibatch has all completions of its prompts
    # updates after the first send every token through the experts that the policy chose before it ("R2"); gate weights are new
    replay_routing: bool = False
    epochs: int = number("[1, inf)")  # passes over a batch
    old_log_probs: OldLogProbs = MISSING
    # a pass before the update gives the loss the log-prob of each completion, and the reference's: for losses over whole groups,
    # such as dpo. A step then makes one update
    sums_log_probs: bool = False
    mask_truncated: bool = False  # completions cut off by rollout.max_new_tokens count in their group, but are not trained on
    # power of two that multiplies the loss before the backward, so that float16 gradients do not underflow; null: the constant of
    # grpo/optim.py for float16, 1 for other dtypes. Lower it when gradients overflow
    loss_scale: Optional[float] = number("(0, inf)", "null for the dtype's own", default=None)


@dataclass
class WarmupConfig:
    """Supervised steps on the environment's demonstrations, before GRPO."""

    steps: int = number("[1, inf)", "no warm-up is warmup=null")
    batch_size: int = number("[1, inf)")  # demonstrations
    lr: float = number("(0, inf)")
    betas: List[float] = number("[0, 1)")
    weight_decay: float = number("[0, inf)")
    warmup_steps: int = number("[0, inf)")
    decay_fraction: float = number("[0, 1]")  # share of the steps, the last ones, in which lr falls linearly
    final_lr_ratio: float = number("[0, 1]")
    max_grad_norm: float = number("(0, inf)", "1.0 is usual")
    cache_dir: Optional[str] = None  # keeps the result, so that a rerun starts at GRPO; null: no cache


@dataclass
class EvalConfig:
    every: int = number("[0, inf)", "0 is never in between")  # steps
    num_samples: int = number("[0, inf)", "0 is greedy only")  # k of avg@k and pass@k
    temperature: float = number("(0, inf)", "greedy is eval.greedy=true")  # of no account with num_samples=0
    # null, for these three: as in rollout
    top_k: Optional[int] = number(*TOP_K, default=None)
    top_p: Optional[float] = number(*TOP_P, default=None)
    min_p: Optional[float] = number(*MIN_P, default=None)
    greedy: bool = MISSING
    max_prompts: int = number("[1, inf)")  # held-out prompts
    at_start: bool = MISSING
    at_end: bool = MISSING
    # metric whose last value a sweeper such as Optuna's optimises: greedy_accuracy, reward, avg@4, ...; null: the first
    objective: Optional[str] = None


@dataclass
class SandboxConfig:
    mode: SandboxMode = SandboxMode.auto  # of the processes that run code that the model writes (grpo/sandbox/)


@dataclass
class TrainConfig:
    name: str = MISSING  # the run's folder is output_dir/name
    seed: int = number(*SEED)  # initial weights, prompts and samples
    steps: int = number("[1, inf)")  # GRPO steps
    device: Device = MISSING
    dtype: Dtype = MISSING
    threads: int = number("[0, inf)")  # CPU threads; 0: torch's choice
    model: ModelConfig = field(default_factory=ModelConfig)
    env: Dict[str, Any] = MISSING  # _target_: a class; the other keys are its keywords
    loss: Dict[str, Any] = MISSING  # _target_: a function; the other keys are its keywords
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    corrections: CorrectionsConfig = field(default_factory=CorrectionsConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    warmup: Optional[WarmupConfig] = None
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    selftest: Optional[SelftestConfig] = None  # null: an ordinary run
    output_dir: str = "runs"
    resume: bool = False  # continue output_dir/name from its newest checkpoint

    @property
    def needs_reference(self) -> bool:
        return self.kl.coefficient > 0 or self.optim.sums_log_probs


@dataclass
class InferenceConfig:
    """What evaluation and chat have in common."""

    run: Optional[str] = None  # run folder: its model, weights and environment; null: `model` below
    step: Optional[int] = number("[0, inf)", default=None)  # the run's checkpoint of that step; null: the newest
    model: Optional[ModelConfig] = None
    seed: int = number(*SEED)
    device: Device = MISSING
    dtype: Dtype = MISSING
    threads: int = number("[0, inf)")  # CPU threads; 0: torch's choice
    greedy: bool = MISSING
    temperature: float = number("(0, inf)", "greedy is greedy=true")
    top_k: int = number(*TOP_K)
    top_p: float = number(*TOP_P)
    min_p: float = number(*MIN_P)
    max_new_tokens: int = number("[1, inf)")  # tokens
    turns: TurnsConfig = field(default_factory=TurnsConfig)


@dataclass
class EvaluateConfig(InferenceConfig):
    env: Optional[Dict[str, Any]] = None  # null: the run's
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    num_samples: int = number("[0, inf)", "0 is greedy only")  # k of avg@k and pass@k
    max_prompts: int = number("[1, inf)")  # held-out prompts
    max_batch: int = number("[1, inf)")  # completions decoded together, by each process
    distributed: WaitConfig = field(default_factory=WaitConfig)
    output: Optional[str] = None  # JSON file for the result; null: print only


@dataclass
class GenerateConfig(InferenceConfig):
    prompt: Optional[str] = None  # null, and no `prompts`: read lines from the terminal and chat
    prompts: Optional[str] = None  # a file of rows, each with a question (text) or a conversation (messages) of its own
    output: Optional[str] = None  # JSON lines with the answers to `prompts`
    num_samples: int = number("[1, inf)", default=1)  # answers to each of `prompts`
    max_batch: int = number("[1, inf)", default=64)  # completions of `prompts` decoded together, by each process
    distributed: WaitConfig = field(default_factory=WaitConfig)
    # null, for these three: as the run's environment has it; else none, medium, today
    instructions: Optional[str] = None  # developer message
    reasoning_effort: Optional[ReasoningEffort] = None
    current_date: Optional[str] = None  # YYYY-MM-DD, in the system message


# ---- errors


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, its value, what is allowed and what to do."""


class UnknownKey(ConfigError):
    """A key that its node lacks; `typed` goes on below it. `keys`: all there are, for suggestions from elsewhere; `origin`: where
    the key comes from, if not from the command line. Whoever knows them fills them in. `also`: names unknown beside it."""

    def __init__(self, key: str, allowed: list[str], *, typed: str | None = None, also: list[str] | None = None) -> None:
        self.key, self.typed, self.allowed, self.origin = key, typed or key, sorted(set(allowed)), ""
        self.parent, _, self.name = key.rpartition(".")
        self.also = [f"{self.parent}.{name}" for name in also or []]
        self.siblings = [f"{self.parent}.{name}" if self.parent else name for name in self.allowed]
        self.keys = self.siblings

    def __str__(self) -> str:
        others = [key for key in self.keys if key != self.key]
        siblings = self.siblings if self.typed == self.key else []
        # of a path into another trainer's tree, what is above its last part is no slip of the fingers for a key elsewhere
        meant = suggest(self.typed, others, siblings) or suggest(self.key, others if siblings else self.siblings, self.siblings)
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        origin = f" ({self.origin})" if self.origin else ""
        where = f" in {self.parent}" if self.parent else ""
        return f"unknown key {self.key}{origin}{hint or '.'} Allowed{where}: {', '.join(self.allowed)}"


# ---- from YAML to dataclasses

structured = functools.cache(OmegaConf.structured)  # defaults of a schema, which a merge copies and leaves as they are


def to_typed(cfg: DictConfig, schema: type = TrainConfig) -> Any:
    """The composed config as an instance of `schema`. Raises ConfigError for unknown keys (those added with `+` too),
    values of the wrong type, interpolations that lead nowhere and required values left out."""
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}; give it a value or fix the ${{...}}") from error
    try:
        typed = OmegaConf.merge(structured(schema), escaped(values))
    except OmegaConfBaseException as error:
        key = str(error.full_key or "") or key_of_wrong_kind(schema, values)
        raise ConfigError(wrong_type(schema, values, key)) from error
    missing = sorted(OmegaConf.missing_keys(typed))
    if missing:
        raise ConfigError(f"{', '.join(missing)}: required, no value given; set with `{missing[0]}=VALUE` or in the YAML")
    return OmegaConf.to_object(typed)


def wrong_type(schema: type, values: dict, key: str) -> str:
    """The message for a value of a wrong type. Raises UnknownKey where the key is what is wrong."""
    expected, value = describe_type(type_at(schema, key)), value_at(values, key)
    return f"{key} = {value!r} ({type(value).__name__}): expected {expected}"


def key_of_wrong_kind(schema: type, values: dict) -> str:
    """The first key that holds a mapping or a list where the schema has another kind, or the other way round; empty without one.
    OmegaConf names no key for these."""
    for name, hint in typing.get_type_hints(schema).items():
        value, node = values.get(name), dataclass_of(hint)
        containers = {dict} if node else {typing.get_origin(option) for option in (hint, *typing.get_args(hint))} & {dict, list}
        if value is not None and {type(value)} & {dict, list} != containers:
            return name
        inner = key_of_wrong_kind(node, value) if node and value else ""
        if inner:
            return f"{name}.{inner}"
    return ""


def escaped(node: Any) -> Any:
    """The node with `${` in its strings marked as text: it has been resolved once and must not be a second time."""
    if isinstance(node, dict):
        return {key: escaped(value) for key, value in node.items()}
    if isinstance(node, list):
        return [escaped(value) for value in node]
    if isinstance(node, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", node)
    return node


def type_at(schema: type, key: str) -> Any:
    """The type of the value at a key such as `optim.betas[0]`; None below a mapping that takes any keys. Raises UnknownKey where
    the schema has no such key."""
    kind: Any = schema
    walked: list[str] = []
    for part in filter(None, re.split(r"[.\[]", key)):
        node = dataclass_of(kind)
        if node is None and typing.get_origin(kind) is list:
            if not part.rstrip("]").isdecimal():
                raise ConfigError(f"{key}: {'.'.join(walked)} is a list; set the whole of it, as {'.'.join(walked)}=[A,B]")
            return typing.get_args(kind)[0]
        if node is None:
            return None
        hints = typing.get_type_hints(node)
        walked.append(part)
        if part not in hints:
            raise UnknownKey(".".join(walked), list(hints), typed=key)
        kind = hints[part]
    return kind


def dataclass_of(hint: Any) -> type | None:
    """The dataclass in `X` or `Optional[X]`, None for anything else."""
    for option in typing.get_args(hint) or (hint,):
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return option
    return None


def value_at(node: Any, key: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", key):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def describe_type(hint: Any) -> str:
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) in (list, dict):
        kind = "list" if typing.get_origin(hint) is list else "mapping"
        return f"a {kind}" if options[-1] is Any else f"a {kind}, each entry {describe_type(options[-1])}"
    if options:
        return f"{describe_type(options[0])}, or null" if len(options) < len(typing.get_args(hint)) else str(hint)
    if inspect.isclass(hint) and issubclass(hint, StrEnum):
        return "one of " + ", ".join(hint.__members__)
    if dataclass_of(hint):
        return f"a mapping with the keys {', '.join(typing.get_type_hints(hint))}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(hint, str(hint))


# ---- a run's folder and its saved config

# Keys that may differ between a saved run and the command that resumes it. They do not change what a step computes, except that
# `steps` moves the learning rates of linear and cosine schedules.
RESUMABLE_KEYS = (
    *("name", "output_dir", "resume", "steps", "eval", "checkpoint", "log", "wandb", "sandbox"),
    # memory: these may change how numbers are rounded
    *("rollout.max_batch", "rollout.cache_gb", "optim.max_tokens", "optim.share_prompts", "optim.in_backward", "distributed"),
    *("model.activation_checkpointing", "model.memory_gb", "model.host_gb"),
    "rollout.max_dead_steps",
    "optim.loss_scale",  # to lower it after an overflow; the gradients do not depend on it
    # how reward functions are called, not what they return: to go on after a judge was down
    *("env.reward_timeout", "env.reward_workers", "env.reward_retries", "env.max_error_rate"),
    "warmup.cache_dir",  # a cached warm-up has the same bits as a new one
)


def run_folder(config: TrainConfig) -> Path:
    """output_dir/name, absolute: code that changes the working directory must not split a run over two folders."""
    return Path(os.path.expanduser(config.output_dir)).absolute() / config.name


def shown(path: Path) -> Path:
    """The path as one would type it: relative where it lies below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def to_dict(config: Any) -> dict:
    """The config as plain dicts, lists, strings and numbers."""
    return dataclasses.asdict(config, dict_factory=lambda pairs: {
        key: str(value) if isinstance(value, StrEnum) else value for key, value in pairs})


def save_config(config: Any, path: Path) -> None:
    """Writes YAML that `read_saved_config` reads back to an equal config."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(escaped(to_dict(config)))))


def read_saved_config(path: Path) -> TrainConfig:
    """The config of a run, from the config.yaml in its folder. Raises ConfigError naming the file."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected the folder of a run, as in runs/NAME")
    try:
        cfg = OmegaConf.load(path)
        if not isinstance(cfg, DictConfig):
            raise ConfigError("holds no settings")
        return to_typed(cfg)
    except (ConfigError, OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(f"{path} cannot be read: {reason}; the run's own command with resume=true writes it again") from error


def settings_of_steps(config: TrainConfig) -> dict[str, Any]:
    """Key -> value of the settings that shape a run's steps: all but RESUMABLE_KEYS."""
    return {key: value for key, value in flatten(to_dict(config)).items() if not key_matches(key, RESUMABLE_KEYS)}


def flatten(node: dict, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of all that is no mapping or an empty one."""
    found = {}
    for name, value in node.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + str(name): value}
    return found


def key_matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(key == pattern or key.startswith(pattern + ".") for pattern in patterns)
