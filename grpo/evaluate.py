"""Held-out evaluation: avg@k, pass@k and greedy accuracy, with 95 % confidence intervals.

    python -m grpo.evaluate run=runs/NAME [step=N] [num_samples=8]
    python -m grpo.evaluate +model=gpt_oss_20b model.path=FOLDER +env=dataset env.path=FILE.jsonl

Under torchrun each process samples and scores some of the prompts; the result is that of one process. Stopped by a signal, it
prints the results of the prompts that were finished, and writes them to OUTPUT.partial.

pass@k is the unbiased estimate 1 - C(n - c, k) / C(n, k) for c correct of n samples (arXiv 2107.03374, eq. 1), averaged over
prompts. Intervals are over prompts, since samples of one prompt are not independent. All evaluations of a run draw with the
same keys, so that they differ by the policy only.
"""
import contextlib
import json
import math
import re
import statistics
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from grpo.batch import Completion, Prompt
from grpo.config import EvaluateConfig, GenerateConfig
from grpo.configuration.launch import PREEMPTED, is_sweep, launch
from grpo.distributed.ranks import RankFault, Ranks, join, leads
from grpo.distributed.rollout import all_scored, own_completions
from grpo.environment import (
    Environment,
    Score,
    check_methods,
    held_out_prompts,
    make_environment,
    make_sandbox,
)
from grpo.groups import length_metrics, reward_metrics, turn_metrics
from grpo.record.console import PROGRESS_SECONDS, progress_counter
from grpo.record.outputs import (
    files_of_checkpoint,
    files_of_env,
    keep_inputs,
    keep_part,
    save_output,
    writable_file,
)
from grpo.record.summary import is_interval
from grpo.record.terminal import clean, print_error, tell, with_interval
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Interrupted, Sampler
from grpo.rollout.turns import Turns, generator, until_stopped
from grpo.run.failures import describe_failure, end, settle
from grpo.run.policy import load_policy, prepare_device
from grpo.run.signals import GracefulStop

EVAL_STEP = -1  # in place of the step in sampling keys: no training step draws with it
# An environment's metrics of these names keep their `env/`: evaluation has its own.
RESERVED = re.compile(r"reward|mean_length|clipped_ratio|greedy_accuracy|(avg|pass)@.*|.*/ci95|(greedy|time|memory|eval)/.*")
Z95 = 1.959964


class Unfinished(Exception):
    """A signal stopped the work. text: what there is of the output, marked as partial."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


def evaluate(env: Environment, sampler: Sampler, prompts: list[Prompt], params: SamplingParams, *, num_samples: int, greedy: bool,
             should_stop: Callable[[], bool] | None = None, progress: Callable[[int, int], None] | None = None,
             turns: Turns | None = None, ranks: Ranks | None = None,
             keeps_finished: bool = False) -> tuple[dict[str, float], list[tuple[Completion, Score]]]:
    """Metrics by name (fractions, tokens), each accuracy with `.../ci95`, half the width of its interval; and what was
    scored, greedy completions first. `num_samples` 0 leaves sampling out, greedy=False greedy completions; `progress` is told how
    many of all completions are finished; `turns` lets the model call tools; `ranks` share the prompts. keeps_finished: where
    `should_stop` ends it, the results are those of the prompts that were finished until then; without, it raises Interrupted."""
    metrics: dict[str, float] = {}
    scored: list[tuple[Completion, Score]] = []
    total = len(prompts) * (greedy + num_samples)

    def sample(params: SamplingParams, count: int) -> list[tuple[Completion, Score]]:
        count_all = None if progress is None else lambda finished, _: progress(len(scored) + finished, total)
        make = until_stopped if keeps_finished else generator
        generate = partial(make(sampler, turns), params=params, step=EVAL_STEP, num_samples=count, should_stop=should_stop,
                           progress=count_all)
        completions = own_completions(ranks, sampler, generate, prompts)
        if keeps_finished:
            completions = of_whole_prompts(completions, count)
        return all_scored(ranks, env, prompts, completions)

    if greedy and (found := sample(replace(params, greedy=True), 1)):
        scored += found
        metrics |= _mean_with_interval("greedy_accuracy", _values(scored))
        metrics |= _details(scored, "greedy/")
    if num_samples and len(scored) == greedy * len(prompts) and (sampled := sample(params, num_samples)):
        rows = [_values(sampled[i:i + num_samples]) for i in range(0, len(sampled), num_samples)]
        metrics |= _mean_with_interval(f"avg@{num_samples}", [statistics.fmean(row) for row in rows if row])
        for k in (2**power for power in range(1, num_samples.bit_length())):
            shares = [pass_at_k(len(row), sum(value >= 1 for value in row), k) for row in rows if len(row) >= k]
            metrics |= _mean_with_interval(f"pass@{k}", shares)
        metrics |= _details(sampled, "")
        scored += sampled
    num_unscored = len(scored) - len(_values(scored))
    return metrics | ({"unscored": num_unscored} if num_unscored else {}), scored


def of_whole_prompts(completions: list[Completion], num_samples: int) -> list[Completion]:
    """The completions of the prompts that have all of theirs."""
    counts = Counter(completion.prompt.id for completion in completions)
    return [completion for completion in completions if counts[completion.prompt.id] == num_samples]


def _values(scored: list[tuple[Completion, Score]]) -> list[float]:
    """Correctness if the environment judges it, else the reward. A completion with neither is left out."""
    values = [verdict.reward if verdict.is_correct is None else float(verdict.is_correct) for _, verdict in scored]
    return [value for value in values if value is not None]


def _details(scored: list[tuple[Completion, Score]], prefix: str) -> dict[str, float]:
    rewards = reward_metrics(scored)
    lengths = length_metrics([completion for completion, _ in scored])
    picked = {"reward": rewards["reward"], "mean_length": lengths["completions/mean_length"],
              "clipped_ratio": lengths["completions/clipped_ratio"]}
    picked |= {name: value for name, value in rewards.items() if name.startswith("sandbox/")}
    picked |= {name: value for name, value in turn_metrics([completion for completion, _ in scored]).items()
               if not name.startswith("time/")}
    for name, value in rewards.items():
        if name.startswith("env/"):
            own_name = name.removeprefix("env/")
            picked[name if RESERVED.fullmatch(own_name) else own_name] = value
    return {prefix + name: value for name, value in picked.items()}


def _mean_with_interval(name: str, values: list[float]) -> dict[str, float]:
    if not values:
        return {name: math.nan}
    return {name: statistics.fmean(values), f"{name}/ci95": half_width(values)}


def half_width(values: list[float]) -> float:
    """Half the width of the mean's 95 % interval. Values in [0, 1]: Wilson's interval (E. B. Wilson, JASA 22, 1927) with their
    own variance in place of p(1 - p), which it is for zeros and ones; so neither one value nor many equal ones look certain.
    Other values, rewards say: 1.96 standard errors, NaN for a single one."""
    n = len(values)
    if all(0 <= value <= 1 for value in values):
        return Z95 / (1 + Z95**2 / n) * math.sqrt(statistics.pvariance(values) / n + Z95**2 / (4 * n**2))
    return Z95 * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k samples drawn from n, of which c are correct, hold a correct one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def results_table(result: dict[str, object]) -> str:
    """A line for each entry: numbers with three or four digits, accuracies with half the width of their interval."""
    shown = {name: with_interval(result, name) if isinstance(value, float) else str(value)
             for name, value in result.items() if not is_interval(name)}
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def print_results(result: dict[str, object], config: EvaluateConfig) -> None:
    """Prints the table. Raises OSError where it cannot, and there is no `output` to write."""
    text = clean(results_table(result), sys.stdout.encoding)
    if config.output is None:
        print(text, flush=True)
    else:
        tell(text, sys.stdout)


def show_progress(activity: str) -> Callable[[int, int], None]:
    """Counts on stderr: in place on a terminal, else a line every half a minute."""
    form, every = ("\r\x1b[K{}\r", 0.5) if sys.stderr.isatty() else ("{}\n", PROGRESS_SECONDS)
    return progress_counter(activity, lambda text: tell(form.format(text), sys.stderr, end=""), every=every)


def run_evaluation(config: EvaluateConfig) -> int:
    """Evaluates a run or a checkpoint, prints a table of the metrics, writes them as JSON where `output` says. Of several ranks
    rank 0 does both. Returns the exit code."""
    return run_shared(config, report_of)


def run_shared(config: EvaluateConfig | GenerateConfig, work: Callable[[Any, Ranks | None, contextlib.ExitStack], str]) -> int:
    """Runs `work(config, ranks, held)`, on all ranks where torchrun started several; rank 0 writes what it returns to `output`.
    held: what is entered there, as a GracefulStop, is left after that: no signal comes between the work and its file. Returns
    the exit code: a failure ends all with one message."""
    ranks = failure = None
    with contextlib.ExitStack() as held:
        try:
            ranks = join(config, is_sweep=is_sweep())
            keep_inputs(config.output, {"model.path": [] if config.model is None else files_of_checkpoint(config.model.path)})
            output = None if config.output is None or not leads(ranks) else writable_file(config.output)
            if ranks is not None:
                ranks.begin(config, prepare_device(config)[0])
            try:
                text = work(config, ranks, held)
            except Unfinished as stop:
                try:
                    kept = keep_part(output, stop.text)
                except OSError as error:
                    raise OSError(f"{stop}; {error}") from None
                raise Interrupted(f"{stop}{kept}") from None
            if output is not None:
                save_output(output, text)
        except Exception as error:
            failure = describe_failure(error, log=None, config=config)
            if failure.reason == "failed" and not isinstance(error, RankFault):
                failure.message = traceback.format_exc()
            own, failure = failure, settle(ranks, failure)
            if leads(ranks) and own.reason in ("interrupted", "disk") and own.message not in failure.message:
                note(own.message)  # where what is finished lies, though another rank's failure is what ends all
        return end(failure, ranks, report=lambda failure: print_error("stopped" if failure.code == PREEMPTED else "error",
                                                                      failure.message))


def join_sampler(ranks: Ranks | None, sampler: Sampler, activity: str) -> Callable[[int, int], None] | None:
    """The progress of a sampler that works for these ranks, of which rank 0 alone shows it and warnings."""
    if ranks is not None:
        ranks.show = note if leads(ranks) else None
    if not leads(ranks):
        sampler.warn = ranks.notes.append
        return None
    return show_progress(activity)


def stop_signal(stop: GracefulStop) -> str:
    """The signal that ended the work of this process, or of all ranks."""
    return stop.signal_name or "a signal to another rank"


def report_of(config: EvaluateConfig, ranks: Ranks | None, held: contextlib.ExitStack) -> str:
    result = measure(config, ranks, held)
    if leads(ranks):
        print_results(result, config)
    return json.dumps(result, indent=2) + "\n"


def measure(config: EvaluateConfig, ranks: Ranks | None, held: contextlib.ExitStack) -> dict[str, object]:
    """What was evaluated, on how many prompts, and the metrics. held: as of run_shared."""
    loaded = load_policy(config, config.env, max_batch=config.max_batch)
    progress = join_sampler(ranks, loaded.sampler, "evaluating")
    trained = loaded.trained
    env_settings = config.env or trained.env
    keep_inputs(config.output, files_of_env(env_settings))
    what = {"model": config.model.path} if trained is None else {"run": config.run, "step": loaded.step}
    env = make_environment(env_settings, loaded.tokenizer, seed=config.seed, total_steps=0,
                           sandbox=make_sandbox(env_settings, config.sandbox.mode), chat_form=config.turns.form)
    check_methods(env, ("eval_prompts", "score"))
    prompts = held_out_prompts(env, max_prompts=config.max_prompts, max_len=loaded.sampler.max_len,
                               vocab_size=loaded.policy.config.vocab_size)
    params, turns = SamplingParams.of(config), Turns.of(env, loaded.tokenizer, config.turns)
    run = partial(evaluate, env, loaded.sampler, prompts, params, num_samples=config.num_samples, greedy=config.greedy,
                  progress=progress, turns=turns, ranks=ranks)
    stop = held.enter_context(GracefulStop("the same command, which starts again", is_silent=not leads(ranks),
                                           keeps="keeps the results of finished prompts and ends"))
    metrics, scored = run(should_stop=stop if ranks is None else ranks.watch(stop), keeps_finished=True)
    result = {**what, "num_prompts": len(prompts), **metrics}
    if len(scored) < len(prompts) * (config.greedy + config.num_samples):
        raise unfinished(stop, result, scored, config, prints=leads(ranks))
    return result


def unfinished(stop: GracefulStop, result: dict[str, object], scored: list[tuple[Completion, Score]],
               config: EvaluateConfig, *, prints: bool) -> Unfinished:
    """The end of an evaluation that a signal stopped. prints: the results of the prompts that were finished."""
    counts = Counter(completion.prompt.id for completion, _ in scored)
    num_whole = sum(count == config.greedy + config.num_samples for count in counts.values())
    done = f"{stop_signal(stop)}: {num_whole} of {result['num_prompts']} prompts were finished"
    done += f", {len(counts)} of them greedily" * (config.greedy and config.num_samples > 0)
    text = ""
    if scored:
        result = {"partial": f"{done}; short completions finish first, so these numbers are not those of all", **result}
        if prints:
            print_results(result, config)
        text = json.dumps(result, indent=2) + "\n"
    return Unfinished(f"{done}; the same command starts again, with max_prompts=N for fewer prompts", text)


def note(text: str) -> None:
    tell(clean(text, sys.stderr.encoding), sys.stderr)


if __name__ == "__main__":
    sys.exit(launch("evaluate", run_evaluation))
