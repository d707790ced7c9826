"""From a config to a memory plan (models/memory_plan.py); what this machine has; and a GPU's memory kept as planned in a run."""
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from grpo.config import ConfigError, Experts, InferenceConfig, InFlight, ModelConfig, Train, TrainConfig
from grpo.configuration.validate import is_evaluating
from grpo.record.metrics import peak_memory_gb
from grpo.rollout.session import Sampler
from models.arena import has_arenas
from models.config import GptOssConfig
from models.experts import stored_format
from models.gpt_oss import GptOss
from models.memory_plan import (
    CONTEXT_BYTES,
    GPU_SPECS,
    MODULE_BYTES,
    DoesNotFit,
    GpuSpec,
    MemoryPlan,
    Needs,
    cache_bytes,
    has_plan,
    largest,
    least_limit,
    plan,
    weight_bytes,
)

DEFAULT_PROMPT_LEN = 512  # tokens, where neither the environment nor the command line says how long prompts are
# modules that are loaded while a phase runs, beside those that were there when it began
_LATE_MODULES = 50_000_000
# without model.memory_gb, the share of a GPU that a plan may fill: the driver hands memory out in blocks
_SHARE_OF_GPU = 0.98
UNLIMITED = 1 << 60  # bytes of host memory: a plan for another machine
# left of the host's free memory: for pages of files, for Python, for others
_HOST_SHARE, _HOST_MARGIN = 0.9, 2_000_000_000


# ---- what a run needs


def needs_of(config: TrainConfig, architecture: GptOssConfig, *, prompt_len: int, dtype: torch.dtype,
             num_processes: int = 1) -> Needs:
    """What each process of a training run needs, for prompts of up to prompt_len tokens."""
    rollout, evaluation, optim, distributed = config.rollout, config.eval, config.optim, config.distributed
    eval_rows = evaluation.max_prompts * max(1, evaluation.num_samples) if is_evaluating(evaluation) else 0
    if rollout.in_flight == InFlight.switch:  # the completions of so many steps are decoded together
        eval_rows = max(eval_rows, rollout.max_staleness * rollout.prompts_per_step * rollout.group_size)
    return replace(
        _needs_of_model(config.model, architecture, dtype=dtype),
        num_prompts=rollout.prompts_per_step, group_size=rollout.group_size, max_rows=rollout.max_batch, prompt_len=prompt_len,
        new_len=rollout.max_new_tokens, eval_rows=eval_rows, filters=_filters(rollout),
        cache_bytes=None if rollout.cache_gb is None else int(1e9 * rollout.cache_gb),
        max_tokens=optim.max_tokens, shares_prompts=optim.share_prompts, recomputes=config.model.activation_checkpointing,
        moments=str(optim.moments), weights=str(optim.weights), in_backward=optim.in_backward, minibatches=optim.minibatches,
        samples_beside=rollout.max_staleness > 0, full_kl=config.kl.is_full, num_sharers=distributed.expert_parallel,
        num_ranks=max(1, num_processes // distributed.expert_parallel), num_shards=num_processes if distributed.shard else 1)


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
    """The longest prompt that the environment's settings and the model allow: where completions may be as long as the model's
    sequences, they end where those do."""
    given = config.env.get("max_prompt_tokens")
    return max(1, min(max_len - 1, given if isinstance(given, int) else DEFAULT_PROMPT_LEN))


# ---- what this machine has


def spec_of_gpu(device: torch.device) -> GpuSpec:
    """The device as a plan takes it: rates of a GPU that is listed, else cautious ones."""
    name, num_bytes = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    known = {key: gpu for key, gpu in GPU_SPECS.items() if key.split("-")[0] in name.replace("-", " ").split()}
    nearest = min(known.values(), key=lambda gpu: abs(gpu.num_bytes - num_bytes), default=GpuSpec(num_bytes, 1e12, 25e9))
    return replace(nearest, num_bytes=num_bytes, has_tensor_cores=torch.cuda.get_device_capability(device) >= (8, 0))


def free_host_bytes() -> int:
    """Host memory that may be pinned: what is available, or what a control group (of a container) leaves, less a margin."""
    found = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    for folder, limit, used in (("/sys/fs/cgroup", "memory.max", "memory.current"),
                                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")):
        numbers = [*_lines(f"{folder}/{limit}"), *_lines(f"{folder}/{used}")]
        if len(numbers) == 2 and numbers[0].isdigit():
            stat = dict(line.split() for line in _lines(f"{folder}/memory.stat"))
            cached = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))  # pages of files, given up when needed
            found.append(int(numbers[0]) - int(numbers[1]) + cached)
    return max(0, int(_HOST_SHARE * min(found, default=0)) - _HOST_MARGIN)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


# ---- the plan


def make_plan(needs: Needs, gpu: GpuSpec, model: ModelConfig, *, host_bytes: int) -> MemoryPlan:
    """The plan within model.memory_gb and model.host_gb, or what the GPU and the host have. Raises ConfigError with the nearest
    settings that fit."""
    limit = min(int(_SHARE_OF_GPU * gpu.num_bytes) if model.memory_gb is None else int(1e9 * model.memory_gb), gpu.num_bytes)
    host = host_bytes if model.host_gb is None else min(host_bytes, int(1e9 * model.host_gb))
    try:
        return plan(needs, gpu, limit=limit, host_bytes=host)
    except DoesNotFit:
        raise ConfigError(_refusal(needs, gpu, model, limit=limit, host=host)) from None


# key, field of Needs, lowest value
_SMALLER = (("rollout.max_new_tokens", "new_len", 16), ("optim.max_tokens", "max_tokens", 1),
            ("rollout.group_size", "group_size", 2), ("model.lora.rank", "lora_rank", 1))


def _refusal(needs: Needs, gpu: GpuSpec, model: ModelConfig, *, limit: int, host: int) -> str:
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
    row_mb = math.ceil(cache_bytes(needs, 1) / 1e6)
    if needs.cache_bytes is not None and fits({"cache_bytes": row_mb * 1_000_000}):
        ways.append(f"rollout.cache_gb={row_mb / 1e3:g} (now {needs.cache_bytes / 1e9:g})")
    without = [target for target in needs.lora_targets if target != "experts"]
    if without and len(without) < len(needs.lora_targets) and fits({"lora_targets": without}):
        ways.append(f"model.lora.targets=[{','.join(without)}]")
    if needs.trains_all and needs.num_ranks > needs.num_shards and fits({"num_shards": needs.num_ranks}):
        ways.append("distributed.shard=true")
    if needs.samples_beside and fits({"samples_beside": False}):
        ways.append("rollout.max_staleness=0")
    if not needs.recomputes and fits({"recomputes": True}):
        ways.append("model.activation_checkpointing=true")
    value = "null" if model.memory_gb is None else f"{model.memory_gb:g}"
    beside = "" if host >= UNLIMITED else f", with {host / 1e9:.1f} GB of host memory,"
    weights = weight_bytes(needs)
    reason = (f" (while sampling each GPU has all weights, {weights / 1e9:.2f} GB, however many train together)"
              if needs.trains_all and weights > limit else "")  # or one would look for the number of GPUs that is enough
    return (f"model.memory_gb = {value}: {limit / 1e9:.2f} GB of the GPU{beside} do not hold this run{reason}"
            + (f"; each of these alone fits: {'; '.join(ways)}" if ways else ", whatever one setting is"))


def summary(plan: MemoryPlan, num_layers: int) -> str:
    """The plan in a line or two."""
    phases = {"sampling": plan.sampling} | ({"update": plan.update} if plan.update else {})
    parts = [f"{name} {phase.peak / 1e9:.2f}" for name, phase in phases.items()]
    lines = [f"memory   {', '.join(parts)} of {plan.limit / 1e9:.2f} GB; {plan.num_rows} rows decoded at once"]
    if plan.host_bytes:
        lines.append(f"         host: {', '.join(f'{name} {size / 1e9:.2f}' for name, size in plan.host.items() if size)} GB")
    if plan.placement.num_streamed_update:
        streamed = " and ".join(f"{phase.num_streamed} in {name}" for name, phase in phases.items())
        lines.append(f"         experts of {streamed} of {num_layers} layers are streamed")
    return "\n".join(lines)


class GpuMemory:
    """Keeps a process's GPU memory as planned from phase to phase, and measures what each phase takes: torch's, the context and
    modules beside it, and the sampler's cache. On a CPU, without a plan, it does nothing."""

    def __init__(self, plan: MemoryPlan | None, device: torch.device, *, others: int, limits_torch: bool) -> None:
        """others: bytes that other processes take. limits_torch: torch must end at the plan's limit, not at the GPU's."""
        self.plan, self.device, self._others, self._limits_torch = plan, device, others, limits_torch
        self.peaks: dict[str, int] = {}  # of each phase, bytes
        self._most = 0  # bytes at once, at any time
        self._is_shared = False  # sampling and updates run at the same time, and keep what they have
        self._phase, self._cache_bytes = "", 0 if plan is None else plan.sampling.lines["cache"]
        if plan is not None:  # of a sweep's jobs, each has a limit of its own
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            self._allow_torch(plan.limit - CONTEXT_BYTES)

    def for_sampling(self, policy: GptOss) -> None:
        """Call it before sampling. Brings back to the GPU what the update had no room for."""
        if self.plan is None or self._phase == "sampling":
            return
        self.measure()
        self._phase = "sampling"
        if self._is_shared:
            return
        if self._limits_torch:
            torch.cuda.empty_cache()
        placement, in_arenas = self.plan.placement, 0
        if has_arenas(self.device):
            returning = placement.num_streamed_update - placement.num_streamed_sampling
            in_arenas = self._cache_bytes + returning * policy.expert_store.layer_bytes
        self._allow_torch(self.plan.limit - self._beside_torch() - in_arenas)
        policy.expert_store.for_sampling()
        if self.plan.samples_beside:  # from now on each phase has what the other one leaves
            self._is_shared = True
            room = self.plan.limit - self._beside_torch() - in_arenas - self.plan.sampling.lines["prefill and logits"]
            policy.memory.memory_gb = room / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)  # again: what the phase before had reserved is no part of this one

    def for_update(self, policy: GptOss, sampler: Sampler | None) -> None:
        """Call it before training. Frees the cache, and experts that are streamed in the update: all memory is then torch's."""
        if self.plan is None or self._phase == "update":
            if sampler is not None and not self._is_shared:
                sampler.offload()
            return
        self.measure()
        self._phase = "update"
        if self._is_shared:
            return
        if sampler is not None:
            sampler.offload()
        policy.expert_store.for_update()
        room = self.plan.limit - self._beside_torch()
        self._allow_torch(room)
        policy.memory.memory_gb = room / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)

    def cache_became(self, num_bytes: int) -> None:
        """Gives torch what the sampler's cache leaves of its planned size, for good. Called where memory was refused."""
        if self.plan is None or not has_arenas(self.device) or num_bytes >= self._cache_bytes:
            return
        total = torch.cuda.get_device_properties(self.device).total_memory
        allowed = torch.cuda.get_per_process_memory_fraction(self.device) * total
        self._allow_torch(int(allowed) + self._cache_bytes - num_bytes)
        self._cache_bytes = num_bytes

    def sampler_settings(self, cache_gb: float | None = None) -> dict[str, float | int]:
        """Keywords of the Sampler: the size of its cache, as configured or planned, and most tokens of a prefill."""
        if self.plan is None:
            return {"cache_gb": cache_gb}
        return {"cache_gb": self.plan.cache_bytes / 1e9, "max_prefill_tokens": self.plan.prefill_tokens}

    def measure(self) -> None:
        """Adds the peak since the phase began to `peaks`. Without a limit torch keeps, while sampling, what the update has
        reserved: then only what sampling uses counts as its own."""
        if self._phase:
            reserved, beside = torch.cuda.max_memory_reserved(self.device), self._measured_beside()
            used = reserved if self._limits_torch or self._phase == "update" else torch.cuda.max_memory_allocated(self.device)
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), used + beside)
            self._most = max(self._most, reserved + beside)
        torch.cuda.reset_peak_memory_stats(self.device)

    def metrics(self) -> dict[str, float]:
        """Peak so far and what was planned, GB."""
        if self.plan is None:
            return {"memory/peak_gb": peak_memory_gb(self.device)}
        self.measure()
        planned = max(phase.peak for phase in (self.plan.sampling, self.plan.update) if phase)
        return {"memory/peak_gb": self._most / 1e9, "memory/planned_gb": planned / 1e9}

    def report(self) -> list[str]:
        """A line with the planned and the measured peak of each phase."""
        if self.plan is None:
            return []
        self.measure()
        planned = {"sampling": self.plan.sampling, "update": self.plan.update}
        return ["memory   " + "; ".join(f"{name}: planned {planned[name].peak / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB"
                                        for name, peak in self.peaks.items() if planned[name])]

    def _measured_beside(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - self._others - torch.cuda.memory_reserved(self.device)

    def _beside_torch(self) -> int:
        """Context and modules, those that are still to be loaded too; call it while no cache is there."""
        return max(self._measured_beside() + _LATE_MODULES, CONTEXT_BYTES + MODULE_BYTES)

    def _allow_torch(self, num_bytes: int) -> None:
        if self._limits_torch:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, num_bytes / total)), self.device)


def unplanned(device: torch.device) -> GpuMemory:
    return GpuMemory(None, device, others=0, limits_torch=False)


def gpu_memory(needs: Needs, model: ModelConfig, device: torch.device, *, num_local: int = 1,
               agree: Callable[[list[int]], list[int]] | None = None) -> GpuMemory:
    """Plans the memory of a policy that is about to be loaded. num_local: processes that share the host's free memory. agree: for
    processes that must have the same plan, makes what is free on each what is free on all. Raises ConfigError where it does not
    fit."""
    torch.empty(1, device=device)  # makes the context
    free, total = torch.cuda.mem_get_info(device)
    others = max(0, total - free - torch.cuda.memory_reserved(device) - CONTEXT_BYTES)
    gpu = spec_of_gpu(device)
    sizes = [gpu.num_bytes - others, free_host_bytes() // num_local]
    num_bytes, host_bytes = sizes if agree is None else agree(sizes)
    plan = make_plan(needs, replace(gpu, num_bytes=num_bytes), model, host_bytes=host_bytes)
    return GpuMemory(plan, device, others=others, limits_torch=model.memory_gb is not None)
