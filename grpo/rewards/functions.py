"""Reward functions, called by parameter name.

A reward function is plain Python, named in the config as `package.module:function`, `package.module.function` or
`path/to/file.py:function`. Its signature says how it is called (sync or async alike):
  batch   `f(completions, prompts, completion_ids, trainer_state, log_extra, log_metric, <column>, **kwargs) -> list`
          once per batch, columns as lists (TRL); `answers, infos, states, tasks` are lists too (verifiers, group)
  verl    `f(data_source, solution_str, ground_truth, extra_info=None) -> float | dict` once per completion
  single  `f(completion, prompt, answer, info, state, task) -> float` once per completion (verifiers)
  native  `f(row, text) -> float | dict` once per completion; also `thinking`, `is_truncated`, any column
A value is a float or bool, None (not applicable: left out of the sum) or a dict with `score` and further entries: numbers
become metrics, the rest goes to the log of completions. `text`, `solution_str` and a completion's content are the final
channel only, so an answer that stands in the reasoning earns nothing.

A row whose weighted reward function raised or returned something that is no finite number gets no reward at all (never
silently 0): it is dropped from its group and counted, and above `max_error_rate` the run stops.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

BATCH_NAMES = ("prompts", "completions", "completion_ids", "answers", "infos", "states", "tasks")
VERL_NAMES = ("data_source", "solution_str", "ground_truth", "extra_info")
SINGLE_NAMES = ("prompt", "completion", "answer", "info", "state", "task")
NATIVE_NAMES = ("row", "text", "thinking", "is_truncated")


class RewardError(ValueError):
    """A reward function failed; the message names the function and the row."""


@dataclass
class Sample:
    """All that a reward function may ask about one completion."""

    row: dict  # columns of the data row
    source: str  # "file:line" of the row
    prompt: str | list[dict]  # as the row has it: text, or messages
    text: str  # content of the final message; "" where the completion is cut off or has another fault (Parsed.final)
    thinking: str  # content of the analysis channel
    completion_ids: list[int]
    is_truncated: bool
    answer: object  # of the mapped column: text, or a list or dict as the data has it; None without one


@dataclass
class Result:
    """What one reward function said about one completion. `value` None: not applicable, or `error`."""

    value: float | None
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)


@dataclass
class TrainerState:
    """The part of the trainer's state that TRL-style functions are shown."""

    global_step: int


def load_function(path: str, *, key: str) -> Callable:
    """The function that a config value names: `package.module:function`, `package.module.function` or `file.py:function`.

    Raises ValueError naming `key` if the module, file or function cannot be found or the module fails to import."""
    module_name, colon, function_name = path.rpartition(":")
    if not colon:
        module_name, _, function_name = path.rpartition(".")
    if not module_name or not function_name.isidentifier():
        raise ValueError(
            f"{key}={path!r}: expected package.module:function, package.module.function or file.py:function"
        )
    try:
        if module_name.endswith(".py"):
            module = _import_file(Path(module_name).expanduser())
        else:
            module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"{key}={path!r}: cannot import {module_name}: {describe_error(error)}") from error
    functions = vars(module)
    if function_name not in functions:
        public = sorted(
            name
            for name, value in functions.items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
        )
        raise ValueError(
            f"{key}={path!r}: {module_name} has no {function_name!r}; its functions: {', '.join(public) or 'none'}"
        )
    if not callable(functions[function_name]):
        raise ValueError(
            f"{key}={path!r}: {function_name!r} is a {type(functions[function_name]).__name__}, no function"
        )
    return functions[function_name]


def _import_file(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path.absolute()}")
    name = "reward_file_" + re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_reward(
    path: str,
    *,
    key: str,
    columns: set[str],
    has_answer: bool,
    name: str | None = None,
    weight: float = 1.0,
    kwargs: dict | None = None,
) -> Reward:
    """The adapter of the function at `path`, its signature checked against the data's columns; see Reward."""
    function = load_function(path, key=key)
    default_name = re.split(r"[:.]", path)[-1]
    return Reward(
        function,
        key=key,
        name=name or default_name,
        weight=weight,
        kwargs=kwargs or {},
        columns=columns,
        has_answer=has_answer,
    )


class Reward:
    """Calls one reward function with what its parameters name. `weight` 0 makes it a metric only.

    Raises ValueError naming `key` if a required parameter is nothing that a completion or the data's columns can fill."""

    def __init__(
        self,
        function: Callable,
        *,
        key: str,
        name: str,
        weight: float,
        kwargs: dict,
        columns: set[str],
        has_answer: bool,
    ):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"{key}: weight={weight!r} must be a finite number")
        self.function, self.name, self.weight, self.kwargs = function, name, float(weight), dict(kwargs)
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{key}: the signature of {name!r} cannot be read: {error}; wrap it in a function"
            ) from error
        self.named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.takes_rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
        required = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        self.style = self._find_style(key)
        standard = {
            "batch": {*BATCH_NAMES, "trainer_state", "log_extra", "log_metric"},
            "verl": set(VERL_NAMES),
            "single": {*SINGLE_NAMES, *NATIVE_NAMES},
            "native": {*NATIVE_NAMES, "answer"},
        }[self.style]
        if not has_answer:
            standard -= {"answer", "answers", "ground_truth"}
        available = standard | columns | ({"answer"} if has_answer else set())
        positional_only = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        missing = [p for p in required if p not in available | set(self.kwargs) or p in positional_only]
        if missing:
            raise ValueError(
                f"{key}: nothing to call {name!r} with for its parameter {', '.join(map(repr, missing))}; "
                f"known names are {', '.join(sorted(standard))} and the columns "
                f"{', '.join(sorted(columns)) or '(none)'}; others come from kwargs in the config"
            )
        unknown = [k for k in self.kwargs if k not in self.named and not self.takes_rest]
        if unknown:
            raise ValueError(
                f"{key}: kwargs {', '.join(map(repr, unknown))}: {name!r} has no such parameter; it takes "
                f"{', '.join(sorted(self.named))}"
            )

    def _find_style(self, key: str) -> str:
        for style, names in (
            ("batch", BATCH_NAMES),
            ("verl", ("solution_str", "ground_truth")),
            ("single", ("completion", "prompt", "info", "state", "task")),
            ("native", (*NATIVE_NAMES, "answer")),
        ):
            if self.named.intersection(names):
                return style
        raise ValueError(
            f"{key}: the parameters of {self.name!r} ({', '.join(sorted(self.named)) or 'none'}) name no "
            "completion; expected completions (a batch), solution_str, completion, or row and text"
        )

    def __call__(self, samples: list[Sample], *, step: int) -> list[Result]:
        """One Result per sample. An exception or a value that is no finite number becomes its `error`; a batch function
        that raises or returns a list of another length fails every sample."""
        if not samples:
            return []
        if self.style == "batch":
            return self._call_batch(samples, step)
        outcomes: list[object] = []
        for sample in samples:
            try:
                outcomes.append(self.function(**self._select(self._single_values(sample))))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary to foreign code
                outcomes.append(error)
        if any(inspect.isawaitable(outcome) for outcome in outcomes):
            outcomes = asyncio.run(_gather(outcomes))
        return [_to_result(outcome, self.name) for outcome in outcomes]

    def _call_batch(self, samples: list[Sample], step: int) -> list[Result]:
        metrics: dict[str, float] = {}
        extra: dict[str, list] = {}

        def log_metric(name: str, value: float) -> None:
            metrics[name] = float(value)

        def log_extra(column: str, values: list) -> None:
            if len(values) != len(samples):
                raise ValueError(f"log_extra({column!r}) got {len(values)} values for {len(samples)} completions")
            extra[column] = list(values)

        values = self._batch_values(samples, step) | {"log_metric": log_metric, "log_extra": log_extra}
        try:
            outcome = self.function(**self._select(values))
            if inspect.isawaitable(outcome):
                [outcome] = asyncio.run(_gather([outcome]))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary to foreign code
            outcome = error
        if isinstance(outcome, BaseException):
            return [Result(None, describe_error(outcome)) for _ in samples]
        if hasattr(outcome, "tolist"):  # arrays and tensors
            outcome = outcome.tolist()
        if not isinstance(outcome, (list, tuple)) or len(outcome) != len(samples):
            found = f"{len(outcome)} values" if isinstance(outcome, (list, tuple)) else f"a {type(outcome).__name__}"
            return [
                Result(None, f"returned {found} for {len(samples)} completions; expected a list with one value each")
                for _ in samples
            ]
        results = [_to_result(value, self.name) for value in outcome]
        for i, result in enumerate(results):
            result.metrics |= {name: value for name, value in metrics.items() if math.isfinite(value)}
            result.extra |= {column: _loggable(values[i]) for column, values in extra.items()}
        return results

    def _select(self, values: dict) -> dict:
        """The values that the function names (all, if it takes **kwargs), and the config's kwargs."""
        chosen = values if self.takes_rest else {name: value for name, value in values.items() if name in self.named}
        return {**chosen, **self.kwargs}

    def _batch_values(self, samples: list[Sample], step: int) -> dict:
        # TRL keeps a column named like the prompt or completion to itself, and functions may pass **kwargs on
        names = dict.fromkeys(
            name
            for sample in samples
            for name in sample.row
            if name in self.named or name not in ("prompt", "completion")
        )
        values = {"answer": [sample.answer for sample in samples]} if "answer" in self.named else {}
        values |= {name: [copy.deepcopy(sample.row.get(name)) for sample in samples] for name in names}
        values |= {
            "prompts": [copy.deepcopy(sample.prompt) for sample in samples],
            "completions": [_completion(sample) for sample in samples],
            "completion_ids": [list(sample.completion_ids) for sample in samples],
            "trainer_state": TrainerState(global_step=step),
        }
        plurals = {
            f"{name}s": [self._single_values(sample).get(name) for sample in samples]
            for name in ("answer", "info", "state", "task")
            if f"{name}s" in self.named
        }
        return plurals | values

    def _single_values(self, sample: Sample) -> dict:
        row = copy.deepcopy(sample.row)
        info = row.get("info", row.get("extra_info")) or {}
        named = {"row": row, "text": sample.text, "thinking": sample.thinking, "is_truncated": sample.is_truncated}
        if self.style == "verl":
            standard = {
                "data_source": row.get("data_source", ""),
                "solution_str": sample.text,
                "ground_truth": sample.answer,
                "extra_info": row.get("extra_info") or {},
            }
        else:
            standard = {
                "prompt": copy.deepcopy(sample.prompt),
                "completion": _completion(sample),
                "info": info,
                "answer": sample.answer,
                "task": row.get("task", ""),
            }
            standard["state"] = dict(standard)
        if sample.answer is None:  # no answer column is mapped: a column of that name may still stand in
            standard = {name: value for name, value in standard.items() if name not in ("answer", "ground_truth")}
        if self.takes_rest:  # **kwargs gets the style's standard names, not every column
            rest = {"verl": standard, "single": standard, "native": {}, "batch": standard}[self.style]
            return rest | {name: value for name, value in (row | standard | named).items() if name in self.named}
        return row | standard | named


def score_with(rewards: list[Reward], samples: list[Sample], *, step: int, max_error_rate: float) -> list[list[Result]]:
    """Results [reward][sample]. Raises RewardError, naming function and row, if more than `max_error_rate` of the samples
    have an error."""
    results = [reward(samples, step=step) for reward in rewards]
    for reward, of_reward in zip(rewards, results):
        failed = [i for i, result in enumerate(of_reward) if result.error is not None]
        if len(failed) > max_error_rate * len(samples):
            first = failed[0]
            raise RewardError(
                f"reward {reward.name!r} failed on {len(failed)} of {len(samples)} completions (max_error_rate="
                f"{max_error_rate}); first on row {samples[first].source}: {of_reward[first].error}; completion: "
                f"{_short(samples[first].text)}"
            )
    return results


def try_rewards(rewards: list[Reward], samples: list[Sample]) -> None:
    """Calls every reward function once on made-up completions, so that a broken one stops the run before it starts.

    Raises RewardError naming function, row and cause."""
    for reward in rewards:
        for sample, result in zip(samples, reward(samples, step=0)):
            if result.error is not None:
                raise RewardError(
                    f"reward {reward.name!r} failed its dry run on row {sample.source}, called with the "
                    f"completion {_short(sample.text)}: {result.error}"
                )


async def _gather(outcomes: list) -> list:
    async def finish(outcome):
        return await outcome if inspect.isawaitable(outcome) else outcome

    return await asyncio.gather(*(finish(outcome) for outcome in outcomes), return_exceptions=True)


def _completion(sample: Sample) -> str | list[dict]:
    """In the form of the prompt: text for text, a message list for messages."""
    if isinstance(sample.prompt, str):
        return sample.text
    return [{"role": "assistant", "content": sample.text, "thinking": sample.thinking}]


def _to_result(outcome: object, name: str) -> Result:
    if isinstance(outcome, BaseException):
        return Result(None, describe_error(outcome))
    if not isinstance(outcome, dict):
        return _to_number(outcome)
    if "score" not in outcome:
        return Result(None, f"returned a dict without 'score' (keys: {', '.join(map(str, outcome)) or 'none'})")
    result = _to_number(outcome["score"])
    for entry, value in outcome.items():
        if entry == "score":
            continue
        number = _to_number(value)
        if number.value is None:
            result.extra[f"{name}/{entry}"] = _loggable(value)
        else:
            result.metrics[f"{name}/{entry}"] = number.value
    return result


def _to_number(value: object) -> Result:
    if value is None:
        return Result(None)
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        return Result(
            None, f"returned a {type(value).__name__} ({_short(value)}); expected a number, bool, None or dict"
        )
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # complex-like, huge ints, tensors of many
        return Result(None, f"returned {_short(value)}, which is no number: {error}")
    return Result(number) if math.isfinite(number) else Result(None, f"returned {number}, which is not finite")


def _loggable(value: object) -> object:
    """The value if JSON can hold it, else its text: the log of completions is JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return repr(value)[:500]
    return value


def describe_error(error: BaseException) -> str:
    """Type, text and place of an exception, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 60 else text[:57] + "...")
