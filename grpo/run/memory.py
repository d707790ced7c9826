"""From a config to a memory plan (models/memory_plan.py); what this machine has; and a GPU's memory kept as planned in a run."""
from dataclasses import replace
from pathlib import Path

import torch

from grpo.config import ConfigError, Experts, InferenceConfig, ModelConfig, Train, TrainConfig
from grpo.configuration.validate import is_evaluating
from models.config import GptOssConfig
from models.experts import stored_format
from models.memory_plan import (
    GPUS,
    DoesNotFit,
    Gpu,
    MemoryPlan,
    Needs,
    has_plan,
    largest,
    least_limit,
    plan,
)

DEFAULT_PROMPT_LEN = 512  # tokens, where neither the environment nor the command line says how long prompts are
# without model.memory_gb, the share of a GPU that a plan may fill: the driver hands memory out in blocks
_SHARE_OF_GPU = 0.98
UNLIMITED = 1 << 60  # bytes of host memory: a plan for another machine
# left of the host's free memory: for pages of files, for Python, for others
_HOST_SHARE, _HOST_MARGIN = 0.9, 2_000_000_000


# ---- what a run needs


def needs_of(config: TrainConfig, architecture: GptOssConfig, *, prompt_len: int, dtype: torch.dtype) -> Needs:
    """What a training run needs, for prompts of up to prompt_len tokens."""
    rollout, evaluation, optim = config.rollout, config.eval, config.optim
    eval_rows = evaluation.max_prompts * max(1, evaluation.num_samples) if is_evaluating(evaluation) else 0
    return replace(
        _needs_of_model(config.model, architecture, dtype=dtype),
        num_prompts=rollout.prompts_per_step, group_size=rollout.group_size, max_rows=rollout.max_batch, prompt_len=prompt_len,
        new_len=rollout.max_new_tokens, eval_rows=eval_rows, filters=_filters(rollout),
        cache_bytes=None if rollout.cache_gb is None else int(1e9 * rollout.cache_gb),
        max_tokens=optim.max_tokens, shares_prompts=optim.share_prompts, recomputes=config.model.activation_checkpointing)


def needs_of_inference(config: InferenceConfig, model: ModelConfig, architecture: GptOssConfig, *, max_rows: int,
                       dtype: torch.dtype) -> Needs:
    """What evaluation and chat need: nothing trains."""
    return replace(_needs_of_model(model, architecture, dtype=dtype),
                   num_prompts=max_rows, max_rows=max_rows, new_len=config.max_new_tokens, filters=_filters(config))


def _needs_of_model(model: ModelConfig, architecture: GptOssConfig, *, dtype: torch.dtype) -> Needs:
    is_full, lora = model.train == Train.full, model.lora
    needs = Needs(architecture, _expert_format(model, architecture), 1, 1, 1, DEFAULT_PROMPT_LEN, 1, dtype=dtype,
                  trains_all=is_full)
    return needs if is_full else replace(needs, lora_rank=lora.rank, lora_targets=tuple(lora.targets),
                                         trains_norms=lora.train_norms, trains_sinks=lora.train_sinks)


def _expert_format(model: ModelConfig, architecture: GptOssConfig) -> str:
    if model.experts != Experts.auto:
        return str(model.experts)
    if model.path is not None and not architecture.raw:  # OpenAI's layout, whose config.json does not name the format
        return "mxfp4"
    return stored_format(architecture.quantization, architecture).name


def _filters(settings: object) -> bool:
    return settings.top_k > 0 or settings.top_p < 1 or settings.min_p > 0


def prompt_len_of(config: TrainConfig, *, max_len: int) -> int:
    """The longest prompt that the environment's settings and the sequence lengths allow."""
    given = config.env.get("max_prompt_tokens")
    return max(1, min(max_len - config.rollout.max_new_tokens, given if isinstance(given, int) else DEFAULT_PROMPT_LEN))


# ---- what this machine has


def gpu_here(device: torch.device) -> Gpu:
    """The device as a plan takes it: rates of a GPU that is listed, else cautious ones."""
    name, num_bytes = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    known = {key: gpu for key, gpu in GPUS.items() if key.split("-")[0] in name.replace("-", " ").split()}
    nearest = min(known.values(), key=lambda gpu: abs(gpu.num_bytes - num_bytes), default=Gpu(num_bytes, 1e12, 25e9))
    return replace(nearest, num_bytes=num_bytes, has_tensor_cores=torch.cuda.get_device_capability(device) >= (8, 0))


def free_host_bytes() -> int:
    """Host memory that may be pinned: what is available, or what a control group (of a container) leaves, less a margin."""
    found = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    for limit, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
                        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes")):
        numbers = [*_lines(limit), *_lines(used)]
        if len(numbers) == 2 and numbers[0].isdigit():
            stat = dict(line.split() for line in _lines(str(Path(used).parent / "memory.stat")))
            cached = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))  # pages of files, given up when needed
            found.append(int(numbers[0]) - int(numbers[1]) + cached)
    return max(0, int(_HOST_SHARE * min(found, default=0)) - _HOST_MARGIN)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


# ---- the plan


def make_plan(needs: Needs, gpu: Gpu, model: ModelConfig, *, host_bytes: int) -> MemoryPlan:
    """The plan within model.memory_gb and model.host_gb, or what the GPU and the host have. Raises ConfigError with the nearest
    settings that fit."""
    limit = min(int(_SHARE_OF_GPU * gpu.num_bytes) if model.memory_gb is None else int(1e9 * model.memory_gb), gpu.num_bytes)
    host = min(host_bytes, int(1e9 * model.host_gb)) if model.host_gb else host_bytes
    try:
        return plan(needs, gpu, limit=limit, host_bytes=host)
    except DoesNotFit:
        raise ConfigError(_refusal(needs, gpu, model, limit=limit, host=host)) from None


# key, field of Needs, lowest value
_SMALLER = (("rollout.max_new_tokens", "new_len", 16), ("optim.max_tokens", "max_tokens", 1),
            ("rollout.group_size", "group_size", 2), ("model.lora.rank", "lora_rank", 1))


def _refusal(needs: Needs, gpu: Gpu, model: ModelConfig, *, limit: int, host: int) -> str:
    """What to say where no plan fits: the least memory for these settings, and the largest value of each setting that fits by
    itself."""
    least = least_limit(needs, gpu, host_bytes=host)
    ways = [] if least is None else [f"model.memory_gb={least / 1e9:.2f}" + (" on a larger GPU" if least > gpu.num_bytes else "")]
    if host < UNLIMITED and has_plan(needs, gpu, limit=limit, host_bytes=UNLIMITED):
        ways.append("more host memory")

    def fits(changed: dict) -> bool:
        return has_plan(replace(needs, **changed), gpu, limit=limit, host_bytes=host)

    for key, name, lowest in _SMALLER if needs.max_tokens else _SMALLER[:1]:
        value = largest(lambda value, name=name: fits({name: value}), vars(needs)[name])
        if lowest <= value < vars(needs)[name] and (name != "max_tokens" or value >= needs.sequence_len):
            ways.append(f"{key}={value} (now {vars(needs)[name]})")
    without = [target for target in needs.lora_targets if target != "experts"]
    if without and len(without) < len(needs.lora_targets) and fits({"lora_targets": without}):
        ways.append(f"model.lora.targets=[{','.join(without)}]")
    if not needs.recomputes and fits({"recomputes": True}):
        ways.append("model.activation_checkpointing=true")
    value = "null" if model.memory_gb is None else f"{model.memory_gb:g}"
    beside = "" if host >= UNLIMITED else f", with {host / 1e9:.1f} GB of host memory,"
    return (f"model.memory_gb = {value}: {limit / 1e9:.2f} GB of the GPU{beside} do not hold this "
            + (f"run; each of these alone fits: {'; '.join(ways)}" if ways else "run, whatever one setting is"))
