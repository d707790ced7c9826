"""GRPO on gpt-oss: python -m grpo.train +experiment=NAME [KEY=VALUE ...]

One process samples groups of completions, scores them and trains on them. `train` is the algorithm; the rest of the file starts,
saves, resumes and ends a run. Everything random is keyed by (seed, step, prompt, sample), so a step can be repeated from the
weights before it and a checkpoint needs no state of generators.

Exit codes: 0 finished, 1 disk or an error of this program, 2 configuration or checkpoint, 3 data, 4 environment or reward,
5 out of memory, 6 diverged (non-finite numbers), 75 stopped by a signal and resumable.
"""
from __future__ import annotations

import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from grpo.batch import RolloutBatch, micro_batches, minibatches, pack
from grpo.checkpoint import RunInUseError, RunState, SaveError, load_run, lock_run, save_run
from grpo.config import (
    ConfigError,
    OldLogProbs,
    TrainConfig,
    bind,
    check_resumable,
    read_saved_config,
    save_config,
    to_dict,
)
from grpo.evaluate import evaluate
from grpo.exactness import allowed_difference, describe_mismatch, differences
from grpo.failures import describe_failure
from grpo.groups import Groups, collect, completion_record, held_out_prompts, make_environment
from grpo.launch import PREEMPTED, launch
from grpo.losses import kl_penalty, reduce_stats, token_stats
from grpo.metrics import Metrics
from grpo.optim import Optimizer, check_finite, loss_scale_for
from grpo.policy import (
    build_model,
    build_tokenizer,
    check_trainable,
    load_parameters,
    parameter_tensors,
    select_device,
    select_dtype,
)
from grpo.rollout import Interrupted, Sampler
from grpo.signals import GracefulStop
from grpo.warmup import check_demonstrations, warm_up
from models.checkpoint import save_model
from models.gpt_oss import GptOss
from models.lora import count_active_parameters, count_parameters, describe_trainable
from models.peft_format import save_adapter
from models.routing_record import RoutingReplay
from models.tokenizer import Tokenizer

OPTIM = "optim."  # prefix of optimizer tensors in a run's checkpoint


@dataclass
class Run:
    """The state of a training run."""

    config: TrainConfig
    run_dir: Path
    policy: GptOss
    tokenizer: Tokenizer
    env: object
    loss_fn: Callable
    sampler: Sampler
    metrics: Metrics
    should_stop: Callable[[], bool]
    optimizer: Optimizer | None = None  # once the weights are there
    step: int = 0  # steps finished
    saved_step: int = -1  # steps finished at the newest checkpoint
    has_warned: bool = False  # that sampler and trainer differ
    is_between_steps: bool = True  # false while weights hold part of a step's updates


def train(run: Run) -> None:
    """Takes the remaining GRPO steps. Raises rollout.Interrupted at the first safe moment after a stop signal."""
    config, metrics = run.config, run.metrics
    while run.step < config.steps:
        started = time.perf_counter()
        metrics.set_status("sampling")
        groups = collect(run.env, run.sampler, config, run.step, run.should_stop)
        run.sampler.rest()  # rollout and update need not fit into memory together
        updated = time.perf_counter()
        metrics.set_status("updating")
        stats = update(run, groups)
        run.step += 1
        run.is_between_steps = True
        finished = time.perf_counter()
        stats |= {"time/update": finished - updated, "time/step": finished - started,
                  "tokens_per_s": sum(completion.num_tokens for completion, _ in groups.scored) / (finished - started),
                  "memory/peak_gb": peak_memory_gb(run.policy.device)}
        metrics.log(run.step, {**groups.metrics, **stats})
        if config.log.completions_every and (run.step % config.log.completions_every == 0 or run.step == 1):
            metrics.log_completions(run.step, [completion_record(run.tokenizer, run.env, completion, score, split="train")
                                               for completion, score in groups.scored[:config.log.num_completions]])
        evaluate_if_due(run)
        if config.checkpoint.every and run.step % config.checkpoint.every == 0:
            save(run)
        if run.should_stop() and run.step < config.steps:
            raise Interrupted(f"after step {run.step} of {config.steps}")


def update(run: Run, groups: Groups) -> dict[str, float]:
    """Packs the live groups and makes the step's updates. Returns the metrics of the update."""
    optim = run.config.optim
    if not groups.completions:  # nothing to learn from: no gradient, no update
        return {"loss": 0.0, "grad_norm": 0.0, "lr": run.optimizer.lr, "num_tokens": 0, "update/tokens": 0}
    batch = pack(groups.completions, groups.advantages).to(run.policy.device)
    num_updates = min(optim.minibatches, batch.num_rows) * optim.epochs
    if num_updates > 1 and optim.old_log_probs == OldLogProbs.trainer:
        batch.old_log_probs = score_batch(run, batch)
    allowed = allowed_difference(run.policy)
    stats, sampling_stats, found, replays, grad_norms, num_packed, num_whole = [], [], [], [], [], 0, 0
    for epoch in range(optim.epochs):
        seed = hash((run.config.seed, run.step, epoch))  # of integers: the same in every process
        for part in minibatches(batch, optim.minibatches, seed=seed):
            num_whole += len(part.tokens)
            for micro in micro_batches(part, optim.max_tokens, share_prompts=optim.share_prompts):
                num_packed += len(micro.tokens)
                routing = make_replay(micro)
                log_probs, entropy = policy_log_probs(run, micro, routing)
                loss, micro_stats = loss_and_stats(run, log_probs, micro, num_updates)
                check_finite(loss, step=run.step, what="loss", name="the policy")
                run.optimizer.backward(loss)
                stats.append(micro_stats)
                if not grad_norms:  # after an update the policy is no longer the one that sampled
                    sampling_stats.append(token_stats(log_probs, entropy, micro))
                    found.append(differences(log_probs, micro, allowed=allowed))
                    replays += [routing] if routing is not None else []
                if run.is_between_steps and run.should_stop():
                    run.optimizer.zero_grad()
                    raise Interrupted(f"step {run.step + 1} abandoned before its update")
            lr = run.optimizer.lr
            grad_norms.append(run.optimizer.step())
            run.is_between_steps = False
            run.optimizer.zero_grad()
    sampling = reduce_stats(sampling_stats, num_updates=1)
    if not run.has_warned:
        warning = describe_mismatch(found, batch, groups.completions, step=run.step + 1, run_dir=run.run_dir, allowed=allowed,
                                    largest=sampling["sampling/log_prob_diff/max"])
        if warning is not None:
            run.metrics.warn(warning)
            run.has_warned = True
    return {**sampling, **reduce_stats(stats, num_updates=num_updates),
            "grad_norm": max(grad_norms), "lr": lr, "update/tokens": num_packed,
            "update/frac_tokens_shared": 1 - num_packed / num_whole, **routing_metrics(replays)}


def policy_log_probs(run: Run, micro: RolloutBatch, routing: RoutingReplay | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [T] of the sampled tokens and entropy [T] of the policy as it is now, in nats."""
    return run.policy.log_probs(micro.tokens, micro.cu_seqlens, mask=micro.host_mask, kept=micro.kept, prefixes=micro.prefixes,
                                routing=routing, temperature=run.config.rollout.temperature)


def make_replay(micro: RolloutBatch) -> RoutingReplay | None:
    """A replay of what the sampler recorded, for one forward and its backward."""
    return None if micro.routing is None else RoutingReplay(micro.routing)


def routing_metrics(replays: list[RoutingReplay]) -> dict[str, float]:
    """The share of the recorded choices of an expert that the trainer's router would have made otherwise."""
    if not replays:
        return {}
    num_choices = sum(int(replay.num_choices) for replay in replays)
    return {"routing/flips": sum(int(replay.num_flips) for replay in replays) / num_choices}


def loss_and_stats(run: Run, log_probs: torch.Tensor, micro: RolloutBatch, num_updates: int,
                   ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy loss, with the KL penalty where it is on, and statistics of one micro-batch."""
    if run.config.optim.old_log_probs == OldLogProbs.sampler:
        old_log_probs = micro.sampler_log_probs
    else:  # with one update the policy still is what it was at the start: the ratio is exactly 1
        old_log_probs = log_probs.detach() if num_updates == 1 else micro.old_log_probs
    loss, stats = run.loss_fn(log_probs, micro, old_log_probs=old_log_probs)
    kl = run.config.kl
    if kl.coefficient > 0:
        with torch.no_grad(), run.policy.adapter_disabled():
            # the reference routes for itself: it is the model without the adapter, not that model on another's routes
            ref_log_probs, _ = policy_log_probs(run, micro, None)
        penalty, kl_stats = kl_penalty(log_probs, ref_log_probs, micro, coefficient=kl.coefficient,
                                       estimator=str(kl.estimator))
        loss, stats = loss + penalty, stats | kl_stats | {"loss": stats["loss"] + penalty.detach()}
    return loss, stats


@torch.no_grad()
def score_batch(run: Run, batch: RolloutBatch) -> torch.Tensor:
    """Log-probs [T] of the policy as it is now, for the ratios of several updates; `batch` as `pack` made it."""
    optim, log_probs = run.config.optim, torch.zeros_like(batch.sampler_log_probs)
    for micro in micro_batches(batch, optim.max_tokens, share_prompts=optim.share_prompts):
        log_probs[micro.token_index] = policy_log_probs(run, micro, make_replay(micro))[0]
    return log_probs


def evaluate_if_due(run: Run) -> None:
    """Evaluates where the schedule says so and no evaluation of this step is on record."""
    settings, config = run.config.eval, run.config
    is_due = (settings.at_start if run.step == 0 else settings.at_end if run.step == config.steps
              else settings.every > 0 and run.step % settings.every == 0)
    if not is_due or run.metrics.has_eval(run.step):
        return
    started = time.perf_counter()
    run.metrics.set_status("evaluating")
    prompts = held_out_prompts(run.env, max_prompts=settings.max_prompts)
    result, scored = evaluate(
        run.env, run.sampler, prompts, num_samples=settings.num_samples, temperature=settings.temperature,
        greedy=settings.greedy, max_new_tokens=config.rollout.max_new_tokens, top_k=config.rollout.top_k,
        top_p=config.rollout.top_p, min_p=config.rollout.min_p, should_stop=run.should_stop)
    run.metrics.log_eval(run.step, {**result, "time/eval": time.perf_counter() - started})
    run.metrics.log_completions(run.step, [completion_record(run.tokenizer, run.env, completion, score, split="eval")
                                           for completion, score in scored[:config.log.num_completions]])


def save(run: Run) -> None:
    """A checkpoint of the finished steps, metrics on disk first."""
    if run.saved_step == run.step:
        return
    run.metrics.set_status("saving")
    run.metrics.sync()
    tensors = parameter_tensors(run.policy)
    tensors |= {OPTIM + name: tensor for name, tensor in run.optimizer.state_dict().items()}
    save_run(run.run_dir, step=run.step, tensors=tensors, state={"wandb_id": run.metrics.wandb_id},
             keep=run.config.checkpoint.keep)
    run.saved_step = run.step


def export_policy(run: Run) -> Path:
    """What others load at the end of a run: a PEFT adapter, or a Hugging Face checkpoint of a fully trained model."""
    is_lora = run.config.model.lora is not None
    folder = run.run_dir / ("adapter" if is_lora else "model")
    shutil.rmtree(folder, ignore_errors=True)  # of fewer steps, where a finished run went on
    if is_lora:
        save_adapter(run.policy, folder, base_model=run.config.model.path)
    else:
        save_model(run.policy, folder, merge_lora=False, tokenizer_folder=run.run_dir / "tokenizer", dtype=run.policy.dtype)
    return folder


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of the process in GB (1e9 bytes): reserved by torch on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def start(config: TrainConfig, run_dir: Path, should_stop: Callable[[], bool]) -> tuple[Run, RunState | None]:
    """Builds the run; with it the checkpoint to go on from, if there is one. Cheap checks come before the model is loaded."""
    device = select_device(config.device)
    dtype = select_dtype(config.dtype, device)
    check_trainable(config.model, dtype)
    if config.threads:
        torch.set_num_threads(config.threads)
    loss_fn = bind(config.loss, "loss")
    tokenizer = build_tokenizer(config.model, config.env)
    env = make_environment(config.env, tokenizer, seed=config.seed)
    if config.warmup is not None:
        check_demonstrations(env)
    state = load_run(run_dir) if config.resume else None
    save_config(config, run_dir / "config.yaml")
    tokenizer.save(run_dir / "tokenizer")
    policy = build_model(config.model, tokenizer, seed=config.seed, device=device, dtype=dtype)
    sampler = Sampler(policy, tokenizer.stop_ids, max_batch=config.rollout.max_batch, seed=config.seed,
                      shares_prompts=config.optim.share_prompts, cache_gb=config.rollout.cache_gb)
    metrics = Metrics(run_dir, wandb=config.wandb, config=to_dict(config), run_name=config.name, total_steps=config.steps,
                      wandb_id=state.state["wandb_id"] if state else None)
    return Run(config, run_dir, policy, tokenizer, env, loss_fn, sampler, metrics, should_stop), state


def prepare_weights(run: Run, state: RunState | None) -> None:
    """The weights that training goes on from, those of the checkpoint or of the warm-up, and their optimizer."""
    config = run.config
    # -1: lines of a run killed before its first checkpoint
    run.metrics.truncate_after(state.step if state else -1)
    run.metrics.print(describe(config, run.run_dir, run.policy, resumed_step=state.step if state else None))
    if state is not None:
        load_parameters(run.policy, state.tensors, str(run.run_dir))
    elif config.warmup is not None:
        warm_up(run.policy, run.env, config, run.metrics, run.should_stop)
    optimizer = make_optimizer(config, run.policy)  # now: its fp32 masters are copies of the weights
    if state is not None:
        optimizer.load_state_dict({name.removeprefix(OPTIM): tensor for name, tensor in state.tensors.items()
                                   if name.startswith(OPTIM)})
        run.step = run.saved_step = state.step
    run.optimizer = optimizer


def make_optimizer(config: TrainConfig, policy: GptOss) -> Optimizer:
    optim = config.optim
    return Optimizer(
        policy.trainable_parameters(), lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps,
        weight_decay=optim.weight_decay, warmup_steps=optim.warmup_steps, schedule=str(optim.schedule),
        decay_steps=optim.decay_steps, final_lr_ratio=optim.final_lr_ratio, max_grad_norm=optim.max_grad_norm,
        total_steps=config.steps * optim.minibatches * optim.epochs,
        loss_scale=loss_scale_for(policy.dtype, optim.loss_scale))


def describe(config: TrainConfig, run_dir: Path, policy: GptOss, *, resumed_step: int | None) -> str:
    """The first lines of a run."""
    rollout, num_threads = config.rollout, torch.get_num_threads()
    device = f"CPU, {num_threads} thread{'s' if num_threads > 1 else ''}"
    if policy.device.type == "cuda":
        device = torch.cuda.get_device_name(policy.device)
    return "\n".join([
        f"run      {config.name} in {run_dir}, " + ("new" if resumed_step is None else f"resumed after step {resumed_step}"),
        f"device   {device}, {str(policy.dtype).removeprefix('torch.')}, experts {policy.expert_format}, "
        f"torch {torch.__version__}",
        f"model    {config.model.path or 'from scratch'}: {count_parameters(policy):,} parameters, "
        f"{count_active_parameters(policy):,} active per token",
        f"env      {config.env['_target_']}",
        f"batch    {rollout.prompts_per_step} prompts x {rollout.group_size} completions of at most {rollout.max_new_tokens} "
        f"tokens, {config.steps} steps",
        "trains", describe_trainable(policy)])


def claim_run_dir(config: TrainConfig, run_dir: Path) -> None:
    """Makes the run's folder. Raises ConfigError where another run lives in it or a resume does not fit."""
    saved = run_dir / "config.yaml"
    has_checkpoints = any((run_dir / "checkpoints").glob("step_*"))
    if has_checkpoints and not config.resume:
        raise ConfigError(f"name = {config.name!r}: {run_dir} holds a run with checkpoints; continue it with resume=true, "
                          "or choose another name=")
    if config.resume and has_checkpoints and saved.exists():
        check_resumable(read_saved_config(saved), config)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir = {config.output_dir!r}: cannot make {run_dir} ({error.strerror}); choose a folder that "
                          "can be written") from error


def resume_command(config: TrainConfig) -> str:
    """The command line that continues this run; of a sweep, all its runs (finished ones have nothing left to do)."""
    words = [argument for argument in sys.argv[1:] if argument.lstrip("+").partition("=")[0] not in ("name", "resume")]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        words += [argument for argument in sys.argv[1:] if argument.lstrip("+").startswith("name=")]
    else:
        words.append(f"name={config.name}")
    return "python -m grpo.train " + " ".join(shlex.quote(word) for word in [*words, "resume=true"])


def run_training(config: TrainConfig) -> int:
    """One run from start to end. Returns its exit code; every failure ends in one message."""
    run, failure = None, None
    run_dir = Path(config.output_dir).expanduser() / config.name
    try:
        claim_run_dir(config, run_dir)
        with lock_run(run_dir), GracefulStop(resume_command(config)) as should_stop:
            claim_run_dir(config, run_dir)  # another process may have finished it meanwhile
            try:
                run, state = start(config, run_dir, should_stop)
                prepare_weights(run, state)
                evaluate_if_due(run)
                if config.checkpoint.every:
                    save(run)
                train(run)
                save(run)
                exported = export_policy(run)
            except BaseException as error:
                failure = describe_failure(error, log=run_dir / "error.log", is_started=run is not None)
                failure.message += keep_finished_steps(run, error)
            finally:
                if run is not None:
                    summary = run.metrics.finish("finished" if failure is None else failure.reason)
        if failure is None:
            run.metrics.print_final(summary, run.metrics.samples(), next_commands(run, exported))
    except (ConfigError, RunInUseError, OSError) as error:
        failure = describe_failure(error, log=None, is_started=False)
    finally:
        run = state = None  # a sweep's next job needs the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if failure is None:
        return 0
    label = "error"
    if failure.code == PREEMPTED:
        label, failure.message = "stopped", f"{failure.message}; resume with: {resume_command(config)}"
    print(f"{label}: {failure.message}", file=sys.stderr)
    return failure.code


def keep_finished_steps(run: Run | None, error: BaseException) -> str:
    """Saves the steps that had finished when something else went wrong. Returns what to tell about it."""
    if run is None or run.optimizer is None or not run.is_between_steps or isinstance(error, (SaveError, OSError)):
        return ""
    if run.step == 0 and (run.config.warmup is None or not isinstance(error, Interrupted)):
        return ""  # nothing was learnt yet
    if not all(parameter.isfinite().all() for parameter in run.policy.trainable_parameters().values()):
        return ""
    try:
        save(run)
    except (SaveError, OSError) as failure:
        return f"; and {failure}"
    return f"; saved after step {run.step}"


def next_commands(run: Run, exported: Path) -> list[str]:
    """What to type after a finished run."""
    others = [word for word in sys.argv[1:] if word.lstrip("+").partition("=")[0] not in ("name", "resume", "seed")]
    return [f"python -m grpo.generate run={run.run_dir}", f"python -m grpo.evaluate run={run.run_dir} num_samples=8",
            "python -m grpo.train " + " ".join(shlex.quote(word) for word in [*others, f"seed={run.config.seed + 1}"]),
            f"ls {exported}    # the trained weights, for transformers, PEFT and vLLM"]


if __name__ == "__main__":
    sys.exit(launch("train", run_training))
