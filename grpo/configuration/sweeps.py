"""Sweeps: the jobs of a command line, told apart before the first starts, and what became of them.

Hydra's sweeper draws the jobs and its launcher runs them, in this process (basic) or in others (processes, submitit). All that
comes back is each job's return value, a `JobResult`: exit codes and the table are made from these.
"""

import contextlib
import itertools
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus

from grpo.config import ConfigError, EvalConfig
from grpo.configuration.command_line import as_typed, quoted
from grpo.configuration.suggestions import near
from grpo.record.run_table import sweep_summary
from grpo.record.summary import SUMMARY_FILE, headline_first, read_summary

OWN_LAUNCHER = "grpo.configuration.processes.ProcessLauncher"
MAX_CHECKED = 100  # jobs of a sweep that are composed before the first one starts
# exit codes
FAILED = 1
PREEMPTED = 75  # a run that saved itself on a signal


class JobResult(float):
    """What a job returns to its sweeper: the number that it is judged by, nan without one; with it how the job ended."""

    code: int  # exit code
    run_dir: Path | None  # folder of a training run

    def __float__(self) -> float:
        if math.isnan(self):  # Optuna's sweeper counts the trial as failed, and goes on
            raise ValueError(f"the job has no value to judge it by (exit code {self.code})")
        return super().__float__()


def outcome(code: int, value: float = math.nan, run_dir: Path | None = None) -> JobResult:
    result = JobResult(value)
    result.code, result.run_dir = code, run_dir
    return result


def replace_params(overrides: list[str], params: dict[str, Any]) -> list[str]:
    """The overrides, those of keys that the experiment's `hydra.sweeper.params` vary put in their place there: values of the
    command line replace the experiment's, and do not multiply with them."""
    kept, replaced = [], []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") in params:
            replaced.append(f"{key.lstrip('+')}: {quoted(value)}")
        else:
            kept.append(override)
    return kept + ([f"++hydra.sweeper.params={{{', '.join(replaced)}}}"] if replaced else [])


def jobs_of(overrides: list[Override], params: dict[str, Any], *, is_grid: bool) -> list[list[str]]:
    """The overrides of each job, Hydra's settings left out. params: the experiment's, where `overrides` do not replace them. Of a
    sweeper that draws values (is_grid false): two jobs, with the first and the last value of every key."""
    for override in overrides:
        if override.key_or_group == "hydra.sweeper.params":
            params = {**params, **{str(key): value for key, value in override.value().items()}}
    swept = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    choices = [values_of(override) for override in swept + overrides
               if not override.key_or_group.startswith(("hydra.", "hydra/"))]
    if is_grid:
        return [list(job) for job in itertools.product(*choices)]
    return [[values[0] for values in choices], [values[-1] for values in choices]]


def values_of(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if override.is_discrete_sweep():
        if GlobalHydra.instance().is_initialized():
            override.config_loader = GlobalHydra.instance().config_loader()  # glob(*) is of the files of a group
        values = list(override.sweep_string_iterator())
    else:  # an interval
        values = [override.value().start, override.value().end]
    if not values:
        raise ConfigError(f"{override.input_line}: no file of configs/{override.key_or_group} matches")
    return [f"{override.get_key_element()}={value}" for value in values]


def check_names(names: list[str], jobs: list[list[str]]) -> None:
    """Raises ConfigError where two jobs have one name, and so one folder."""
    seen: dict[str, list[str]] = {}
    for name, job in zip(names, jobs):
        if name in seen:
            differing = [as_typed(word) for word in (*seen[name], *job) if word not in seen[name] or word not in job]
            if not differing:
                raise ConfigError(f"{' '.join(map(as_typed, job))}: two jobs of the sweep have these same settings; give each "
                                  "value of a key once")
            raise ConfigError(
                f"name = {name!r}: two jobs of the sweep would share it ({' '.join(differing)}); leave name out, or hold every "
                "swept key in it, as in '++name=lr-${optim.lr}-seed${seed}'"
            )
        seen[name] = job


@contextlib.contextmanager
def recorded_results() -> Iterator[list[JobReturn]]:
    """A list that every launcher made inside the block adds its jobs' results to, in this process, whichever sweeper asks it:
    sweepers such as Optuna's hand on none."""
    results: list[JobReturn] = []
    instantiate = Plugins.instantiate_launcher

    def instantiate_recording(self: Plugins, hydra_context: Any, task_function: Callable, config: Any) -> SimpleNamespace:
        if config.hydra.launcher.get("_target_") == OWN_LAUNCHER:  # Hydra takes classes from packages of its own only
            from grpo.configuration.processes import ProcessLauncher  # imports this module

            launcher = ProcessLauncher(hydra_context, task_function, config)
        else:
            launcher = instantiate(self, hydra_context=hydra_context, task_function=task_function, config=config)

        def launch(job_overrides: Any, initial_job_idx: int) -> Any:
            returned = launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
            results.extend(returned)
            return returned

        return SimpleNamespace(launch=launch)

    Plugins.instantiate_launcher = instantiate_recording
    try:
        yield results
    finally:
        Plugins.instantiate_launcher = instantiate


def end_sweep(results: list[JobReturn], *, command: str) -> int:
    """Prints which jobs failed, of training runs their table, and what continues a sweep that a signal stopped. command: train,
    evaluate or generate. Returns the first exit code that is not 0."""
    codes = []
    for result in results:
        has_ended = result.status == JobStatus.COMPLETED and isinstance(result._return_value, JobResult)
        if not has_ended:  # Hydra could not run it: its own error
            print(f"error: {type(result._return_value).__name__}: {result._return_value}", file=sys.stderr)
        codes.append(result._return_value.code if has_ended else FAILED)
    failed = [f"  {shlex.join(map(as_typed, result.overrides or []))}: exit code {code}"
              for result, code in zip(results, codes) if code not in (0, PREEMPTED)]
    if failed and len(results) > 1:
        print(f"sweep: {len(failed)} of {len(results)} runs failed", *failed, sep="\n", file=sys.stderr)
    runs = [result._return_value.run_dir for result in results if isinstance(result._return_value, JobResult)]
    finished = list(dict.fromkeys(run for run in runs if run is not None and (run / SUMMARY_FILE).is_file()))
    if len(results) > 1 and finished:
        table = sweep_summary(finished[0].parent, finished)
        print(table.read_text(encoding="utf-8"), f"sweep: {table}", sep="\n")
    if PREEMPTED in codes:  # finished jobs of it have nothing left to do
        words = [word for word in sys.argv[1:] if not word.startswith("resume=")]
        words, how = ([*words, "resume=true"], "resume") if command == "train" else (words, "start again")
        print(f"stopped: the sweep, {codes.count(0)} of {len(codes)} runs finished; {how} with: "
              f"python -m grpo.{command} {shlex.join(words)}", file=sys.stderr)
    return next((code for code in codes if code), 0)


# ---- what a job is judged by


# metrics that no environment names, so that the settings say whether they are there
OF_EVERY_ENVIRONMENT = re.compile(r"(greedy/)?(reward|mean_length|clipped_ratio)|greedy_accuracy|(avg|pass)@\d+")


def check_objective(key: str, value: str | None, evaluation: EvalConfig, *, prefix: str = "",
                    measured: list[str] | None = None) -> None:
    """Raises ConfigError where the key's value is no metric that is measured; before that is known, where it looks like a slip of
    one that the settings promise, or like one that they exclude. null is none. prefix: what `key` has before a metric's name."""
    if value is None:
        return
    name = value.removeprefix(prefix)
    samples = evaluation.num_samples
    powers = [2**i for i in range(1, 20) if 2**i <= samples]
    known = ["reward", "mean_length", "clipped_ratio", f"avg@{samples}", *(f"pass@{k}" for k in powers)] if samples else []
    known += ["greedy_accuracy", "greedy/reward", "greedy/mean_length", "greedy/clipped_ratio"] if evaluation.greedy else []
    if measured is not None:
        known = measured
    close = near(name, known)
    if name not in known and (measured is not None or close or OF_EVERY_ENVIRONMENT.fullmatch(name)):
        hint = f"; did you mean {prefix}{close[0]}?" if close else "."
        raise ConfigError(f"{key} = {value!r}: no metric that the evaluation reports{hint} There are "
                          f"{', '.join(prefix + other for other in known)}")


def objective_of(run_dir: Path, evaluation: EvalConfig) -> float:
    """The last value of the run's metric `eval.objective`; null: of the first that its evaluations report, greedy accuracy
    where there is one. nan for a run that evaluates nothing."""
    measured = read_summary(run_dir)["eval"]
    if not measured:
        return math.nan
    check_objective("eval.objective", evaluation.objective, evaluation,
                    measured=[name.removeprefix("eval/") for name in measured])
    name = f"eval/{evaluation.objective}" if evaluation.objective else headline_first(list(measured))[0]
    value = measured[name]["last"]["value"]
    return math.nan if value is None else float(value)
