"""GRPO on gpt-oss: python -m grpo.train +experiment=NAME [KEY=VALUE ...]

One process samples groups of completions, scores them and trains on them. `train` is the algorithm, grpo/update.py the update;
grpo/run/ starts, saves, resumes and ends a run. Every random number is keyed by (seed, step, prompt, sample), so a step can be
repeated from the weights before it, and a checkpoint holds no generator states.

Exit codes: 0 finished, 1 disk or an error of this program, 2 configuration or checkpoint, 3 data, 4 environment or reward,
5 out of memory, 6 diverged (non-finite numbers), 7 nothing to learn (rollout.max_dead_steps), 75 stopped by a signal and
resumable.
"""
import sys
import time
from functools import partial

import torch

from grpo.ahead import draw_and_update
from grpo.batch import Completion
from grpo.config import ConfigError, TrainConfig, run_folder
from grpo.configuration.launch import is_sweep, launch
from grpo.configuration.places import anchor_paths
from grpo.distributed.experts import check_sharing
from grpo.distributed.ranks import RankFault, join, leads
from grpo.distributed.shards import check_shards
from grpo.environment import Score, held_out_prompts
from grpo.evaluate import evaluate
from grpo.groups import Groups, completion_record
from grpo.kl import Reference
from grpo.record.suspects import find_suspects
from grpo.record.wandb_run import end_soon
from grpo.recorded import is_recorded
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Interrupted
from grpo.run.failures import DeadRun, describe_failure, end, settle
from grpo.run.finish import (
    export_policy,
    keep_finished_steps,
    next_commands,
    report_failure,
    resume_command,
    save,
    save_best,
)
from grpo.run.lock import RunInUseError
from grpo.run.signals import GracefulStop
from grpo.run.start import Run, await_kernels, hold_run, prepare_weights, start
from grpo.selftest import run_selftest
from grpo.update import evaluate_recorded
from models.rehearsal import compiled_meanwhile


def train(run: Run) -> None:
    """Takes the remaining GRPO steps. After a stop signal and the current model call, micro-batch or step, raises Interrupted."""
    config = run.config
    while run.step < config.steps:
        stats, groups = take_step(run)
        run.metrics.log(run.step, stats)
        if config.log.completions_every and (run.step % config.log.completions_every == 0 or run.step == 1):
            log_completions(run, groups.scored, split="train")
        evaluate_if_due(run)
        if config.checkpoint.every and run.step % config.checkpoint.every == 0:
            save(run)
        end_if_dead(run)
        if run.should_stop() and run.step < config.steps:
            raise Interrupted(f"after step {run.step} of {config.steps}")


def take_step(run: Run) -> tuple[dict[str, float], Groups]:
    """Draws or takes the next step's groups and trains on them. Returns the step's metrics and the groups."""
    started = time.perf_counter()
    groups, stats = draw_and_update(run)
    run.rollouts.pop(0)
    run.step, run.is_between_steps = run.step + 1, True
    if run.reference is not None and run.config.kl.refresh_every and run.step % run.config.kl.refresh_every == 0:
        run.reference = Reference.of(run.policy)
    if run.history is not None:
        run.history.record(groups.scored)
        stats |= run.history.metrics()
    finished = time.perf_counter()
    run.num_tokens += sum(completion.num_tokens for completion, _ in groups.scored)
    stats |= {"num_tokens": run.num_tokens, "time/step": finished - started,
              "tokens_per_s": sum(completion.num_tokens for completion, _ in groups.scored) / (finished - started),
              "time/compile": seconds_of_compilation(run), **run.memory.metrics()}
    if run.ranks is not None:
        stats["time/ranks"] = run.ranks.take_seconds_waited()
    run.memory.for_sampling(run.policy)
    return {**stats, **groups.metrics}, groups


def end_if_dead(run: Run) -> None:
    """Raises DeadRun after `rollout.max_dead_steps` steps in a row without a group to train on."""
    most, num_dead = run.config.rollout.max_dead_steps, run.steps_without_update
    if most is not None and num_dead >= most and run.step < run.config.steps:
        raise DeadRun(f"nothing was learnt in the last {num_dead} steps: no group had rewards that differ "
                      f"(rollout.max_dead_steps = {most}). Look at completions.jsonl: easier or harder prompts, another "
                      "reward or a longer rollout.max_new_tokens may help. resume=true with a higher limit goes on all the same")


def seconds_of_compilation(run: Run) -> float:
    """The seconds that launches spent on compiling kernels since the last call. After the first step there should be none; a line
    names them."""
    compiled = compiled_meanwhile()
    seconds = sum(seconds for _, seconds in compiled)
    if compiled and run.has_stepped:
        run.metrics.print(f"compiled {', '.join(name for name, _ in compiled)} in step {run.step}: {seconds:.1f} s")
    run.has_stepped = True
    return seconds


def evaluate_if_due(run: Run) -> None:
    """Evaluates if the schedule says so and this step has no evaluation on record."""
    settings, config = run.config.eval, run.config
    is_due = (settings.at_start if run.step == 0 else settings.at_end if run.step == config.steps
              else settings.every > 0 and run.step % settings.every == 0)
    if not is_due:
        return
    has_eval = run.metrics.has_eval(run.step)
    if has_eval if run.ranks is None else run.ranks.exchange("the evaluation", has_eval)[0]:
        return
    started = time.perf_counter()
    if is_recorded(run.env):
        if result := evaluate_recorded(run):
            run.metrics.log_eval(run.step, {**result, "time/eval": time.perf_counter() - started})
            save_best(run)
        return
    prompts = held_out_prompts(run.env, max_prompts=settings.max_prompts, max_len=run.sampler.max_len,
                               vocab_size=run.policy.config.vocab_size)
    result, scored = evaluate(
        run.env, run.sampler, prompts, SamplingParams.of(config.rollout, settings), num_samples=settings.num_samples,
        greedy=settings.greedy, should_stop=run.should_stop, progress=run.metrics.progress("evaluating"), turns=run.turns,
        ranks=run.ranks)
    run.metrics.log_eval(run.step, {**result, "time/eval": time.perf_counter() - started})
    log_completions(run, scored, split="eval")
    save_best(run)


def log_completions(run: Run, scored: list[tuple[Completion, Score]], *, split: str) -> None:
    """Writes the first `log.num_completions` of them to completions.jsonl, and as many that look like reward hacking."""
    if not leads(run.ranks):
        return
    limit = run.config.log.num_completions
    suspects = find_suspects(scored, run.metrics.history if split == "train" else [], limit=limit)
    records = {index: completion_record(run.tokenizer, run.env, *scored[index], split=split)
               for index in dict.fromkeys([*range(min(limit, len(scored))), *suspects])}
    for index, reason in suspects.items():
        records[index]["suspicion"] = reason
    run.metrics.log_completions(run.step, list(records.values()))


def run_training(config: TrainConfig) -> int:
    """One run from start to end. Returns its exit code; every failure ends in one message."""
    run, failure, ranks, exported = None, None, None, None
    anchor_paths(config)
    run_dir = run_folder(config)
    try:
        ranks = join(config, is_sweep=is_sweep())
        check_sharing(config, 1 if ranks is None else ranks.num_ranks)
        check_shards(config)
        with (hold_run(config, run_dir, ranks) as lock,
              GracefulStop(resume_command(config), is_silent=not leads(ranks)) as should_stop):
            try:
                run, state = start(config, lock, should_stop, ranks)
                should_stop.show = run.metrics.notice
                prepare_weights(run, state)
                state = None  # gigabytes
                await_kernels(run)
                evaluate_if_due(run)
                if config.checkpoint.every:
                    save(run)
                train(run)
                save(run)
                run.metrics.print(*run.memory.report())
                exported = export_policy(run)
            except BaseException as error:
                failure = settle(ranks, describe_failure(error, config=config, log=run_dir / "error.log",
                                                         is_started=run is not None))
                failure.message += keep_finished_steps(run, error)
            finally:
                if run is not None:
                    run.metrics.finish("finished" if failure is None else failure.reason)
        if failure is None and leads(ranks) and config.selftest is None:  # a selftest's folder goes when it ends
            run.metrics.print_final(next_commands(run, exported))
    except (ConfigError, RunInUseError, OSError, RankFault) as error:
        failure = settle(ranks, describe_failure(error, config=config, log=None))
    finally:
        run = state = None  # a sweep's next job needs the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return end(failure, ranks, report=partial(report_failure, config=config))


def main(config: TrainConfig) -> int:
    """A run, and what an experiment asks for around it. Returns the exit code."""
    if config.selftest is None:
        return run_training(config)
    try:
        return run_selftest(config, run_training)
    except ConfigError as error:
        return end(describe_failure(error, config=config, log=None), None, report=partial(report_failure, config=config))


if __name__ == "__main__":
    sys.exit(end_soon(launch("train", main)))
