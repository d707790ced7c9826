"""Reward functions: found by the name in the config, built if it names a class or a factory, and called.

A reward function is plain Python, named as `package.module:function`, `package.module.function` or
`path/to/file.py:function`; after the colon it may be an attribute's path (`judge.score`). grpo/rewards/forms.py has the
signatures. A class, or a function without any parameter of a completion (a factory), is called once with its `kwargs`, and
returns the reward function.

A value is a number or bool, None (not applicable: left out of the sum) or a dict with `score` and further entries: numbers
become metrics, the rest goes to the log of completions. Functions run with the process protected (grpo/rewards/user_code.py), and
async ones in one event loop, which lasts as long as the process does.
"""

import importlib.util
import inspect
import math
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from grpo.rewards.forms import Sample, Signature, TrainerState
from grpo.rewards.user_code import UserCodeFault, call_user_code, event_loop, import_user_code
from grpo.rewards.values import describe_error, loggable, to_number


class RewardError(UserCodeFault):
    """A reward function failed; the message names the function and the row."""


@dataclass
class Result:
    """One reward function's result for one completion. `value` is None if it is not applicable or there is an `error`."""

    value: float | None
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)


def load_function(path: str, *, key: str) -> Callable:
    """The object that a config value names: `package.module:function`, `package.module.function` or `file.py:function`.

    Raises ValueError naming `key` if the module, file or function cannot be found or the module fails to import."""
    if path.endswith(".py"):
        raise ValueError(f"{key}={path!r}: names a file and nothing in it; write {path}:NAME")
    module_name, _, function_name = path.rpartition(":" if ":" in path else ".")
    names = function_name.split(".")
    if not module_name or not all(name.isidentifier() for name in names):
        raise ValueError(f"{key}={path!r}: expected package.module:function, package.module.function or file.py:function")
    try:
        module = _import_file(Path(module_name).expanduser()) if module_name.endswith(".py") else import_user_code(module_name)
    except Exception as error:  # the boundary to the user's code
        raise ValueError(f"{key}={path!r}: cannot import {module_name}: {describe_error(error)}") from error
    function = module
    for name in names:  # getattr, and not the module's dict: modules may make their attributes when they are asked for
        function = call_user_code(f"the import of {path}", partial(getattr, function, name))
        if isinstance(function, AttributeError):
            known = sorted(name for name, value in vars(module).items() if (inspect.isfunction(value) or inspect.isclass(value))
                           and value.__module__ == module.__name__ and name[0] != "_")
            raise ValueError(f"{key}={path!r}: {module_name} has no {function_name!r}; it defines: "
                             f"{', '.join(known) or 'none'}")
        if isinstance(function, BaseException):
            raise ValueError(f"{key}={path!r}: cannot import {function_name}: {describe_error(function)}") from function
    if not callable(function):
        raise ValueError(f"{key}={path!r}: {function_name!r} is a {type(function).__name__}, no function")
    return function


def _import_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        hint = "" if path.is_absolute() else "; a relative path starts at the working directory"
        raise FileNotFoundError(f"no such file: {path.absolute()}{hint}")
    name = "reward_file_" + re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up there
    outcome = call_user_code(f"the import of {path}", partial(spec.loader.exec_module, module))
    if isinstance(outcome, BaseException):
        del sys.modules[name]
        how = "fails" if isinstance(outcome, Exception) else "ends Python"
        raise ImportError(f"{path} {how} while it is imported: {describe_error(outcome)}") from outcome
    return module


class Reward:
    """Calls one reward function with what its parameters name. `weight` 0 makes it a metric only. `function` may be a class or a
    factory, which `kwargs` build then.

    Raises ValueError naming `key` if a required parameter is nothing that a completion or the data's columns can fill."""

    def __init__(self, function: Callable, *, key: str, name: str, weight: float, kwargs: dict, columns: set[str],
                 has_answer: bool):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"{key}: weight={weight!r} must be a finite number")
        if not isinstance(kwargs, dict) or not all(isinstance(parameter, str) for parameter in kwargs):
            raise ValueError(f"{key}: kwargs={kwargs!r}: expected names with values, {{threshold: 0.5}}")
        self.key, self.name, self.weight = key, name, float(weight)
        signature = self._read(function, kwargs)
        if inspect.isclass(function) or (signature.form is None and not signature.unfilled):
            function, kwargs = self._build(function, signature, kwargs), {}
            signature = self._read(function, kwargs)
        if signature.form is None:
            raise ValueError(
                f"{key}: the parameters of {name!r} ({_listed(signature.named)}) name no "
                "completion; expected completions (a batch), solution_str, completion, or row and text; a class or a "
                "function that makes the reward function gets its own parameters from kwargs")
        self.function, self.signature, self.kwargs = function, signature, dict(kwargs)
        self._check_parameters(columns, has_answer)

    def _read(self, function: Callable, kwargs: dict) -> Signature:
        try:
            return Signature(function, set(kwargs))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.key}: the signature of {self.name!r} cannot be read: {error}; wrap it in a "
                             "function") from error

    def _build(self, factory: Callable, signature: Signature, kwargs: dict) -> Callable:
        """The function that a class or factory builds from the config's kwargs."""
        self._check_kwargs(signature, kwargs)
        made = call_user_code(f"reward {self.name!r}", partial(factory, **kwargs))
        if isinstance(made, BaseException):
            raise ValueError(f"{self.key}: {self.name!r} fails when it is called with its kwargs {kwargs}: "
                             f"{describe_error(made)}") from made
        if not callable(made):
            raise ValueError(
                f"{self.key}: {self.name!r} names no completion among its parameters, so that it was called once with its "
                f"kwargs to make a reward function; it made a {type(made).__name__}")
        return made

    def _check_kwargs(self, signature: Signature, kwargs: dict) -> None:
        unknown = [name for name in kwargs if name not in signature.named and not signature.takes_rest]
        if unknown:
            raise ValueError(f"{self.key}: kwargs {', '.join(map(repr, unknown))}: {self.name!r} has no such parameter; it "
                             f"takes {_listed(signature.named)}")

    def _check_parameters(self, columns: set[str], has_answer: bool) -> None:
        signature, standard = self.signature, self.signature.standard_names(columns, has_answer=has_answer)
        available = (standard | columns | ({"answer"} if has_answer else set())) & signature.named  # no name fills others
        missing = sorted(signature.unfilled - available)
        if missing:
            raise ValueError(
                f"{self.key}: nothing to call {self.name!r} with for its parameter {', '.join(map(repr, missing))}; "
                f"known names are {', '.join(sorted(standard))} and the columns "
                f"{', '.join(sorted(columns)) or '(none)'}; others come from kwargs in the config")
        self._check_kwargs(signature, self.kwargs)

    @property
    def is_batch(self) -> bool:
        """Whether one call scores many completions."""
        return self.signature.form in ("batch", "verl batch")

    def __call__(self, samples: list[Sample], *, state: TrainerState, retries: int) -> list[Result]:
        """One Result per sample. A call that raises is made `retries` times more; its exception, or a value that is no
        number, becomes the sample's `error`. A batch function that raises or returns a list of another length fails every
        sample. Raises UserCodeFault for what cannot be put back after the call."""
        if not samples:
            return []
        if self.is_batch:
            return self._call_batch(samples, state, retries)
        calls = [lambda sample=sample: self.function(**(self.signature.values_of(sample) | self.kwargs)) for sample in samples]
        return [self._to_result(outcome) for outcome in self._outcomes(calls, retries)]

    def _call_batch(self, samples: list[Sample], state: TrainerState, retries: int) -> list[Result]:
        metrics: dict[str, object] = {}
        extra: dict[str, list] = {}

        def log_metric(name: str, value: object) -> None:
            metrics[str(name)] = value

        def log_extra(column: str, values: list) -> None:
            if len(values) != len(samples):
                raise ValueError(f"log_extra({column!r}) got {len(values)} values for {len(samples)} completions")
            extra[str(column)] = list(values)

        def call() -> object:
            metrics.clear()
            extra.clear()
            callbacks = {"trainer_state": state, "log_metric": log_metric, "log_extra": log_extra}
            return self.function(**(self.signature.values_of_all(samples, callbacks) | self.kwargs))

        [outcome] = self._outcomes([call], retries)
        if isinstance(outcome, BaseException):
            return [Result(None, describe_error(outcome)) for _ in samples]
        if hasattr(outcome, "tolist"):  # arrays and tensors
            outcome = outcome.tolist()
        if not isinstance(outcome, (list, tuple)) or len(outcome) != len(samples):
            found = f"{len(outcome)} values" if isinstance(outcome, (list, tuple)) else f"a {type(outcome).__name__}"
            return [Result(None, f"returned {found} for {len(samples)} completions; expected a list with one value each")
                    for _ in samples]
        results = [self._to_result(value) for value in outcome]
        for i, result in enumerate(results):
            for name, value in metrics.items():
                _note(result, name, value)
            result.extra |= {column: loggable(values[i]) for column, values in extra.items()}
        return results

    def _outcomes(self, calls: list[Callable[[], object]], retries: int) -> list[object]:
        """What each call returned, awaited where it has to be, or raised in its last try."""
        who = f"reward {self.name!r}"
        outcomes: list[object] = [None] * len(calls)
        pending = list(range(len(calls)))
        for _ in range(retries + 1):
            for i in pending:
                outcomes[i] = call_user_code(who, calls[i])
            awaited = [i for i in pending if inspect.isawaitable(outcomes[i])]
            if awaited:
                finished = call_user_code(who, lambda awaited=awaited: event_loop().run([outcomes[i] for i in awaited]))
                for place, i in enumerate(awaited):
                    outcomes[i] = finished if isinstance(finished, BaseException) else finished[place]
            pending = [i for i in pending if isinstance(outcomes[i], BaseException)]
        return outcomes

    def _to_result(self, outcome: object) -> Result:
        if isinstance(outcome, BaseException):
            return Result(None, describe_error(outcome))
        entries = outcome if isinstance(outcome, dict) else {"score": outcome}
        if "score" not in entries:
            return Result(None, f"returned a dict without 'score' (keys: {', '.join(map(str, outcome)) or 'none'})")
        number, problem = to_number(entries["score"])
        result = Result(number, None if problem is None else f"returned {problem}")
        for entry, value in entries.items():
            if entry != "score":
                _note(result, f"{self.name}/{entry}", value)
        return result


def load_reward(path: str, *, key: str, columns: set[str], has_answer: bool, name: str | None = None, weight: float = 1.0,
                kwargs: dict | None = None) -> Reward:
    """The function that `path` names, ready to be called; see Reward."""
    return Reward(load_function(path, key=key), key=key, name=name or re.split(r"[:.]", path)[-1], weight=weight,
                  kwargs=kwargs or {}, columns=columns, has_answer=has_answer)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _note(result: Result, name: str, value: object) -> None:
    """A number is a metric; anything else, except None, is an entry of the log."""
    number, problem = to_number(value)
    if number is not None:
        result.metrics[name] = number
    elif problem is not None:
        result.extra[name] = loggable(value)
