"""The start of a training run: its folder, its parts, and the weights that it starts from, also those of a checkpoint."""
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from grpo.config import (
    ConfigError,
    InFlight,
    LrSchedule,
    OldLogProbs,
    TrainConfig,
    flatten,
    key_matches,
    read_saved_config,
    save_config,
    shown,
    to_dict,
)
from grpo.configuration.algorithm import KlPlace, KlReference
from grpo.configuration.launch import is_sweep
from grpo.configuration.places import without_folders
from grpo.configuration.targets import bind, keyword_parameters, resolve_target
from grpo.curriculum import PromptHistory
from grpo.distributed.experts import ExpertAdapters, expert_share, least_of_all
from grpo.distributed.ranks import Ranks, leads
from grpo.distributed.shards import Divided, Shards
from grpo.distributed.silence import SilentMetrics
from grpo.entropy import EntropyBonus, check_entropy
from grpo.environment import (
    Environment,
    check_environment,
    longest_prompt,
    make_environment,
    make_sandbox,
    summary_of,
)
from grpo.kl import Reference, check_estimator
from grpo.loss_contract import try_loss
from grpo.optim import LearningRate, Optimizer, loss_scale_for
from grpo.record.metrics import Metrics
from grpo.record.run_table import NAMES_OF_A_RUN
from grpo.recorded import check_recorded
from grpo.rollout.in_flight import BegunRollout, tokens_due
from grpo.rollout.session import Sampler
from grpo.rollout.turns import Turns
from grpo.run.checkpoint import RunState, checkpoints_of, load_run
from grpo.run.compilation import Compilation, begin_compiling, describe_failures
from grpo.run.identity import PLACES, check_same, differing_keys, identify, keep_earlier_settings, provenance
from grpo.run.lock import RunLock, lock_run
from grpo.run.memory import GpuMemory, gpu_memory, needs_of, prompt_len_of, summary, unplanned
from grpo.run.policy import (
    build_model,
    build_tokenizer,
    check_initial_adapter,
    check_trainable,
    load_initial_adapter,
    load_parameters,
    parameters_of_run,
    prepare_device,
    read_architecture,
)
from grpo.run.rollouts import Rollout, read
from grpo.sandbox.pool import Sandbox
from grpo.token_record import UpdateObserver
from grpo.warmup import warm_up
from models.behaviour import BehaviourCopy
from models.chat.form import Form
from models.chat.tokenizer import Tokenizer
from models.formats.atomic import remove
from models.gpt_oss import GptOss
from models.lora import count_active_parameters, count_parameters, describe_trainable

OPTIM = "optim."  # prefix of optimizer tensors in a run's checkpoint


@dataclass
class Run:
    """The state of a training run."""

    config: TrainConfig
    run_dir: Path
    policy: GptOss
    tokenizer: Tokenizer
    env: Environment
    loss_fn: Callable
    sampler: Sampler
    metrics: Metrics
    should_stop: Callable[[], bool]
    lock: RunLock | None = None  # of its folder; None: nothing is saved
    made_of: dict[str, dict] = field(default_factory=dict)  # its record in checkpoints (grpo/run/identity.py)
    ranks: Ranks | None = None  # None: this process is alone
    turns: Turns | None = None  # with an environment that has tools
    sandbox: Sandbox | None = None  # of an environment that runs code that the model writes
    behaviour: BehaviourCopy | None = None  # the sampler's policy, where it samples while the policy trains
    memory: GpuMemory | None = None  # always, in a run that start() made
    compilation: Compilation | None = None  # of its kernels, in the background; None: there are none
    optimizer: Optimizer | None = None  # once the weights are loaded
    shards: Divided | None = None  # of what trains, where ranks divide it
    reference: Reference | None = None  # likewise, with a KL penalty
    history: PromptHistory | None = None  # of its prompts, with a curriculum
    entropy: EntropyBonus | None = None  # likewise, with an entropy bonus
    observer: UpdateObserver | None = None  # of updates, for grpo/explain.py
    step: int = 0  # steps finished
    rollouts: list[Rollout] = field(default_factory=list)  # drawn and not trained on: of the next step, the one after it, ...
    begun: list[BegunRollout] = field(default_factory=list)  # of the steps after those, with rollout.in_flight=switch
    num_tokens: int = 0  # of prompts and completions, in all of them
    steps_without_update: int = 0  # number of last steps in a row
    most_tokens: int = sys.maxsize  # of a micro-batch of several sequences: larger ones did not fit into memory
    saved_step: int = -1  # steps finished at the newest checkpoint
    has_stepped: bool = False  # in this process
    has_warned: bool = False  # that sampler and trainer differ
    has_warned_of_weights: bool = False  # that corrections or advantages leave nothing to learn
    is_between_steps: bool = True  # false while weights hold part of a step's updates


def start(config: TrainConfig, lock: RunLock, should_stop: Callable[[], bool],
          ranks: Ranks | None = None) -> tuple[Run, RunState | None]:
    """Builds the run. Returns it and the checkpoint to continue, if there is one. Cheap checks come before the model is loaded,
    and the folder gets its first file after that."""
    run_dir = lock.run_dir
    device, dtype = prepare_device(config)
    if ranks is not None:
        if samples_beside(config, device):
            raise ConfigError(f"rollout.max_staleness = {config.rollout.max_staleness}: several ranks do not sample while they "
                              "train; set rollout.max_staleness=0, or start one process")
        if config.rollout.in_flight == InFlight.switch:
            raise ConfigError("rollout.in_flight = 'switch': several ranks draw a completion by one policy; set "
                              "rollout.in_flight=keep, or start one process")
        should_stop = ranks.watch(should_stop)
        ranks.begin(config, device)
    check_trainable(config.model, dtype)
    check_estimator(config.kl, dtype)
    check_entropy(config.entropy, dtype)
    loss_fn = bind(config.loss, "loss")
    try_loss(loss_fn, config.loss["_target_"], group_size=config.rollout.group_size, max_new_tokens=config.rollout.max_new_tokens,
             has_reference=config.needs_reference, has_sums=config.optim.sums_log_probs,
             has_full_kl=config.kl.is_full)
    tokenizer = build_tokenizer(config.model, config.env)
    sandbox = make_sandbox(config.env, config.sandbox.mode)
    env = make_environment(config.env, tokenizer, seed=config.seed, total_steps=config.steps, sandbox=sandbox,
                           chat_form=config.turns.form)
    check_recorded(env, config)
    architecture = read_architecture(config.model, tokenizer)
    check_environment(env, config, max_len=architecture.max_position_embeddings, vocab_size=architecture.vocab_size)
    state = load_agreed(run_dir, ranks) if config.resume else None
    if state is None:
        check_initial_adapter(config.model)
    share = expert_share(ranks, config, architecture, env)
    made_of = identify(config, tokenizer, env)
    if ranks is not None:
        check_equal_files(ranks, made_of)
    if state is not None:
        check_same(state.state["made_of"], made_of, source=shown(run_dir / "checkpoints") / f"step_{state.step:06d}")
        check_steps_left(config, run_dir, done=state.step)
    changes = describe_changes(config, run_dir) if state is not None else []
    memory, compilation = unplanned(device), None
    if device.type == "cuda":
        prompt_len = longest_prompt(env) or prompt_len_of(config, max_len=architecture.max_position_embeddings)
        needs = needs_of(config, architecture, prompt_len=prompt_len, dtype=dtype,
                         num_processes=1 if ranks is None else ranks.num_ranks)
        memory = gpu_memory(needs, config.model, device, num_local=1 if ranks is None else ranks.place.num_local,
                            agree=None if share is None else partial(least_of_all, ranks))
        if ranks is None or ranks.local_rank == 0:  # others of its node share its files
            compilation = begin_compiling(config, architecture, prompt_len=prompt_len, device=device, dtype=dtype)
    policy = build_model(config.model, tokenizer, seed=config.seed, device=device, dtype=dtype, plan=memory.plan,
                         share=share)
    behaviour = BehaviourCopy(policy) if samples_beside(config, device) else None
    sampler = Sampler(policy if behaviour is None else behaviour.model, tokenizer.stop_ids, max_batch=config.rollout.max_batch,
                      seed=config.seed, shares_prompts=config.optim.share_prompts,
                      **memory.sampler_settings(config.rollout.cache_gb))
    metrics = open_record(config, run_dir, tokenizer, state, sandbox, device) if leads(ranks) else SilentMetrics(ranks.notes)
    if ranks is not None:
        ranks.show = metrics.warn if leads(ranks) else None
    sampler.warn, sampler.on_cache = metrics.warn, memory.cache_became
    metrics.print(*changes)
    turns = Turns.of(env, tokenizer, config.turns)
    history = PromptHistory(config.curriculum) if config.curriculum.is_on else None
    return Run(config, run_dir, policy, tokenizer, env, loss_fn, sampler, metrics, should_stop, lock, made_of, ranks, turns,
               sandbox, behaviour, memory, compilation, history=history), state


def samples_beside(config: TrainConfig, device: torch.device) -> bool:
    """Whether rollouts drawn ahead are sampled while the policy trains."""
    return config.rollout.max_staleness > 0 and device.type == "cuda"


def open_record(config: TrainConfig, run_dir: Path, tokenizer: Tokenizer, state: RunState | None, sandbox: Sandbox | None,
                device: torch.device) -> Metrics:
    """Writes the first files of the run's folder, and returns the record."""
    if state is not None:
        keep_earlier_settings(run_dir, config, step=state.step)
    save_config(config, run_dir / "config.yaml")
    if (run_dir / "tokenizer").is_symlink():  # another's folder must not be written into
        remove(run_dir / "tokenizer")
    tokenizer.save(run_dir / "tokenizer")
    return Metrics(run_dir, wandb=config.wandb, config=to_dict(config), run_name=config.name, total_steps=config.steps,
                   wandb_id=state.state["wandb_id"] if state else None, provenance=provenance(seed=config.seed, device=device)
                   | ({} if sandbox is None else {"sandbox": sandbox.describe()}), tensorboard=config.log.tensorboard)


@contextmanager
def hold_run(config: TrainConfig, run_dir: Path, ranks: Ranks | None) -> Iterator[RunLock]:
    """Holds the run's folder, as rank 0 does for all ranks. Raises as claim_run_dir and lock_run do."""
    if not leads(ranks):
        yield RunLock(run_dir, None)
        return
    claim_run_dir(config, run_dir)
    with lock_run(run_dir) as lock:
        claim_run_dir(config, run_dir)  # another process may have finished it meanwhile
        yield lock


def load_agreed(run_dir: Path, ranks: Ranks | None) -> RunState | None:
    """The newest whole checkpoint; with several ranks, on all the one that rank 0 finds."""
    if ranks is None:
        return load_run(run_dir)
    state = load_run(run_dir) if ranks.rank == 0 else None
    step = ranks.exchange("the checkpoint", state and state.step)[0]
    if step is None or ranks.rank == 0:
        return state
    state = load_run(run_dir, step=step)
    if state is None:
        raise ConfigError(f"output_dir: {ranks.place.name} finds no checkpoint in {run_dir}; the folder must be one that all "
                          "nodes share")
    return state


def check_equal_files(ranks: Ranks, made_of: dict[str, dict]) -> None:
    """Raises ConfigError if nodes have different files under one path: frozen weights are not compared later."""
    found = ranks.exchange("the files", {kind: items for kind, items in made_of.items() if kind != "settings"})
    differing = [f"{kind}: {key} of rank {rank} is not that of rank 0" for rank, other in enumerate(found)
                 for kind, key in differing_keys(found[0], other)]
    if differing:
        raise ConfigError("the ranks do not have the same files:\n  " + "\n  ".join(differing) + "\nGive all nodes the same "
                          "checkpoint, tokenizer and data")


def prepare_weights(run: Run, state: RunState | None) -> None:
    """Prepares the weights that training starts from, the checkpoint's or the warm-up's, and their optimizer."""
    config = run.config
    # -1: lines of a run killed before its first checkpoint
    run.metrics.truncate_after(state.step if state else -1)
    run.metrics.print(describe(config, run.run_dir, run.policy, run.env, resumed_step=state.step if state else None))
    if run.sandbox is not None:
        run.metrics.print(f"sandbox  {run.sandbox.describe()}")
    if run.memory.plan is not None:
        run.metrics.print(summary(run.memory.plan, run.policy.config.num_hidden_layers))
    if state is not None:
        load_parameters(run.policy, state.tensors, str(run.run_dir))
        run.reference = Reference.load(state.tensors, run.policy) if config.needs_reference else None
    else:
        if config.needs_reference and config.kl.reference == KlReference.base:
            run.reference = Reference.of(run.policy, parameters_of_run(run.policy, config.model))
        load_initial_adapter(run.policy, config.model)
        if config.warmup is not None:
            run.memory.for_update(run.policy, None)
            warm_up(run.policy, run.env, config, run.metrics, run.should_stop)
        if config.needs_reference and config.kl.reference == KlReference.start:
            run.reference = Reference.of(run.policy)
    # now: its fp32 masters are copies of the weights
    plan = run.memory.plan
    if config.distributed.shard and run.ranks is not None and run.ranks.num_ranks > 1:
        run.shards = Shards(run.ranks, run.policy)
    if run.policy.share is not None:
        run.shards = ExpertAdapters(run.ranks, run.policy, moments=str(config.optim.moments))
    optimizer = make_optimizer(config, run.policy, state_on_host=plan is not None and plan.state_on_host, shards=run.shards)
    if state is not None:
        load = optimizer.load_state_dict if run.shards is None else run.shards.load_state
        load({name.removeprefix(OPTIM): tensor for name, tensor in state.tensors.items() if name.startswith(OPTIM)})
        run.step, run.saved_step, run.num_tokens = state.step, state.step, state.state["num_tokens"]
        run.steps_without_update = state.state.get("steps_without_update", 0)
        if run.history is not None:
            run.history.rates = state.state["prompt_pass_rates"]
        if config.rollout.max_staleness:
            found = read(state.state["rollouts"], state.tensors)
            run.rollouts = [item for item in found if isinstance(item, Rollout)]
            run.begun = [item for item in found if isinstance(item, BegunRollout)]
    run.optimizer = optimizer
    if run.shards is not None:
        run.shards.gather()
    if config.entropy.coefficient > 0 or config.entropy.target is not None:
        run.entropy = EntropyBonus.of(config.entropy, state.state["entropy"] if state is not None else None)
    if run.behaviour is not None:
        run.behaviour.refresh()
    if run.ranks is not None:
        check_equal_weights(run)
    run.memory.for_sampling(run.policy)


def await_kernels(run: Run) -> None:
    """Returns when the kernels are compiled. Those that are not are compiled when they are needed."""
    if run.compilation is not None and run.compilation.process is not None:
        wait_for_kernels(run, run.compilation)
    if run.ranks is not None:
        run.ranks.exchange("the kernels")


def check_equal_weights(run: Run) -> None:
    """Raises if another rank starts from other weights: its GPU or its code computes otherwise."""
    common = own = 0  # own: of experts that ranks of the same place in their group have
    for place, (name, parameter) in enumerate(run.policy.trainable_parameters().items(), start=1):
        weight = place * int(parameter.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64))
        common, own = (common, own + weight) if run.policy.divides(name) else (common + weight, own)
    found = run.ranks.exchange("the weights", (common, own))
    for rank, sums in enumerate(found):
        like = rank % run.ranks.num_sharers
        if sums != (found[0][0], found[like][1]):
            raise RuntimeError(f"rank {rank} starts from other weights than ranks 0 and {like} (sums {sums}, {found[0]} and "
                               f"{found[like]}): its GPU, checkpoint or code is another one")


def wait_for_kernels(run: Run, compilation: Compilation) -> None:
    metrics, should_stop = run.metrics, run.should_stop if run.ranks is None else run.ranks.has_heard_stop
    seconds = compilation.wait(metrics.progress("compiling kernels"), should_stop)
    metrics.print(f"kernels  {compilation.num_compiled} compiled, {seconds:.0f} s after the start")
    if compilation.failures and not should_stop():
        metrics.warn(describe_failures(compilation.failures))


def divides_weights(run: Run) -> bool:
    """Whether ranks divide all that trains (grpo/distributed/shards.py)."""
    return run.shards is not None and run.shards.divides_weights


def make_optimizer(config: TrainConfig, policy: GptOss, *, state_on_host: bool = False,
                   shards: Divided | None = None) -> Optimizer:
    optim = config.optim
    of_shards = {} if shards is None else {"starts": shards.starts, "whole": shards.whole}
    learning_rate = LearningRate(
        optim.lr, optim.warmup_steps, str(optim.schedule), optim.decay_steps, optim.final_lr_ratio,
        total_steps=config.steps * optim.minibatches * optim.epochs)
    optimizer = Optimizer(
        policy.trainable_parameters() if shards is None else shards.parameters, learning_rate, betas=tuple(optim.betas),
        eps=optim.eps, weight_decay=optim.weight_decay,
        max_grad_norm=math.inf if optim.max_grad_norm is None else optim.max_grad_norm,
        loss_scale=loss_scale_for(policy.dtype, optim.loss_scale), moments=str(optim.moments), weights=str(optim.weights),
        state_on_host=state_on_host, in_backward=optim.in_backward, seed=config.seed, **of_shards)
    if shards is not None:
        shards.optimizer = optimizer
    return optimizer


def describe(config: TrainConfig, run_dir: Path, policy: GptOss, env: Environment, *, resumed_step: int | None) -> str:
    """The first lines of a run."""
    rollout, num_threads = config.rollout, torch.get_num_threads()
    device = f"CPU, {num_threads} thread{'s' if num_threads > 1 else ''}"
    if policy.device.type == "cuda":
        device = torch.cuda.get_device_name(policy.device)
    penalty = []
    if config.kl.coefficient > 0:
        whom = {KlReference.start: "the policy as GRPO starts", KlReference.base: "the base model"}[config.kl.reference]
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in policy.trainable_parameters().values())
        whom += "" if config.kl.refresh_every is None else f" (renewed every {config.kl.refresh_every} steps)"
        what = config.kl.estimator if config.kl.place == KlPlace.loss else f"k1 in the {str(config.kl.place).replace('_', ' ')}"
        penalty = [f"kl       {config.kl.coefficient:g} x {what} to {whom}, whose copy of what trains takes up to "
                   f"{num_bytes / 1e9:.3g} GB of host memory"]
    return "\n".join([
        f"run      {config.name} in {shown(run_dir)}, "
        + (f"resumed after step {resumed_step}" if resumed_step is not None
           else "from the beginning: no checkpoint had been saved" if config.resume else "new"),
        f"device   {device}, {str(policy.dtype).removeprefix('torch.')}, experts {policy.expert_format.name}, "
        f"torch {torch.__version__}",
        f"model    {config.model.path or 'from scratch'}: {count_parameters(policy):,} parameters, "
        f"{count_active_parameters(policy):,} active per token",
        f"env      {without_folders(config.env['_target_'])}" + (f", {about}" if (about := summary_of(env)) else ""),
        f"batch    {rollout.prompts_per_step} prompts x {rollout.group_size} completions of at most {rollout.max_new_tokens} "
        f"tokens, {config.steps} steps",
        *([] if not hasattr(env, "episode") else [
            f"turns    at most {config.turns.max_turns}, a call at most {config.turns.call_seconds:g} s and "
            f"{config.turns.max_result_tokens} tokens of result, written as the {config.turns.form} does"]),
        f"chat     prompts as {describe_form(config)}",
        *([] if not rollout.max_staleness else [
            f"ahead    a step trains on what the policy of {rollout.max_staleness} steps before sampled"
            + (f" and newer ones went on with, each for {tokens_due(rollout, rollout.max_staleness)} tokens, "
               if rollout.in_flight == InFlight.switch else ", ")
            + ("corrected for that" if config.corrections.weighs or config.optim.old_log_probs == OldLogProbs.sampler
               else "without a correction for that (corrections.weight=truncate would be one)")]),
        *penalty, "trains", describe_trainable(policy)])


def describe_form(config: TrainConfig) -> str:
    """How an environment's prompts are written."""
    writers = {Form.hub: "the hub's chat template writes them", Form.library: "openai-harmony writes them"}
    if "chat_form" in keyword_parameters(resolve_target(config.env["_target_"], "env")):
        return f"{writers[config.turns.form]} (turns.form={config.turns.form})"
    return f"{writers[Form.hub]}, or as the environment itself does: it takes no chat_form"


def claim_run_dir(config: TrainConfig, run_dir: Path) -> None:
    """Makes the run's folder. Raises ConfigError if it has another run, or no run to resume."""
    try:
        has_checkpoints = any((run_dir / "checkpoints").glob("step_*"))
        if has_checkpoints and not config.resume and list(checkpoints_of(run_dir)) == [0]:
            raise ConfigError(f"name = {config.name!r}: {run_dir} holds a run that has saved no step; resume=true goes on with "
                              "it from step 0. With other settings choose another name=, or delete that folder")
        if has_checkpoints and not config.resume:
            raise ConfigError(f"name = {config.name!r}: {run_dir} holds a run with checkpoints; continue it with resume=true, "
                              "or choose another name=")
        if config.resume and not is_sweep() and not has_checkpoints and not (run_dir / "config.yaml").exists():
            raise ConfigError(f"resume=true name={config.name}: there is no such run; {describe_runs(run_dir)}")
        run_dir.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(run_dir / "checkpoints") and not (run_dir / "checkpoints").is_dir():
            raise ConfigError(f"name = {config.name!r}: {run_dir / 'checkpoints'} is no folder, nor a link to one; move it away")
    except OSError as error:
        raise ConfigError(f"output_dir = {config.output_dir!r}: cannot make {run_dir} ({error.strerror}); choose a folder that "
                          "can be written") from error


def describe_runs(run_dir: Path) -> str:
    """The runs beside run_dir, those of a similar name first."""
    run_dirs = sorted((path.parent for path in run_dir.parent.glob("*/config.yaml")), key=lambda path: -path.stat().st_mtime)
    names = [path.name for path in run_dirs]
    near = difflib.get_close_matches(run_dir.name, names, n=3)
    listed = near + [name for name in names if name not in near]
    if not listed:
        return f"{run_dir.parent} holds none. Leave resume=true out to start one"
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    hint = f"; did you mean name={near[0]}?" if near else "."
    return f"{run_dir.parent} holds {', '.join(listed[:10])}{more}{hint} Leave resume=true out to start a new run"


def check_steps_left(config: TrainConfig, run_dir: Path, *, done: int) -> None:
    """Raises ConfigError for a resume whose `steps` are fewer than the checkpoint has: it would end at once, as a shorter run."""
    if config.steps < done:
        raise ConfigError(f"steps = {config.steps}: the run in {shown(run_dir)} has done {done} steps already. steps={done} ends "
                          "it there, more go on; grpo.evaluate, grpo.generate and scripts/export.py take an earlier checkpoint")


def describe_changes(config: TrainConfig, run_dir: Path) -> list[str]:
    """Lines about settings that may differ from the resumed run's and do."""
    try:
        before, now = (flatten(without_folders(to_dict(item))) for item in (read_saved_config(run_dir / "config.yaml"), config))
    except ConfigError:  # gone or damaged: the checkpoint knows what must not differ
        return []
    changed = [f"{key} {before.get(key)} -> {now.get(key)}" for key in sorted(before.keys() | now.keys())
               if before.get(key) != now.get(key) and not key_matches(key, (*NAMES_OF_A_RUN, *PLACES))]
    lines = [f"changed on resume: {', '.join(changed)}"] if changed else []
    if before.get("model.lora.adapter") != now.get("model.lora.adapter"):
        lines.append("model.lora.adapter is not read on resume: the checkpoint holds what became of it")
    if before["steps"] != now["steps"] and config.optim.schedule != LrSchedule.constant:
        lines.append(f"the learning rate follows the {config.optim.schedule} schedule of {now['steps']} steps from here on: it "
                     f"jumps from that of {before['steps']} steps")
    return lines
