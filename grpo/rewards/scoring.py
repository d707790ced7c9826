"""All reward functions of an environment: reads them from the config, calls them here or in worker processes, counts errors.

If a weighted reward function raises, exceeds its time or returns something that is no number, the completion gets no reward
(never silently 0): it is dropped from its group and counted. A function that fails too often stops the run.
"""

import difflib
import functools
import itertools
import math
import pickle
import warnings
import weakref
from collections import deque

from grpo.rewards.forms import Sample, TrainerState
from grpo.rewards.functions import Result, Reward, RewardError, load_reward
from grpo.rewards.values import shorten
from grpo.rewards.workers import WorkerError, Workers

WINDOW = 1000  # an error rate is taken over this many latest results of a function
FEWEST = 100  # and counts at least this many results, so that a first error is not a rate of 1
FEWEST_CALLS = 3  # if errors are allowed, this many calls must have failed: one call of a batch function has many results
CALLS = 16  # calls between two checks of the error rate
PATIENCE = 0.25  # after this share of the time limit further workers start for calls that wait behind hanging ones


class Scorer:
    """entries: `env.rewards`, a function's path, {fn, weight, name, kwargs} or a list of those
    columns: of the data's rows
    max_error_rate: share of the latest results of a function that may be errors
    timeout: seconds for one call in a worker, which is killed then; None: no limit
    num_workers: processes that call the functions; 0: this process does, unless there is a limit, which takes a worker
    retries: more tries of a call that raised

    Raises ValueError naming key and value for entries that cannot be used."""

    def __init__(self, entries: str | dict | list | None, *, columns: set[str], has_answer: bool, max_error_rate: float,
                 timeout: float | None, num_workers: int, retries: int):
        _check("max_error_rate", max_error_rate, 0 <= max_error_rate <= 1, "must lie in 0..1")
        _check("reward_timeout", timeout, timeout is None or timeout > 0, "must be seconds over 0, or null for no limit")
        _check("reward_workers", num_workers, num_workers >= 0, "must be a number of processes, 0 for none")
        _check("reward_retries", retries, retries >= 0, "must be a number of tries, 0 for none")
        self.max_error_rate, self.timeout, self.retries = max_error_rate, timeout, retries
        entries = _checked(entries)
        self.rewards = load_rewards(entries, columns, has_answer)
        self._description = pickle.dumps((entries, columns, has_answer))  # what a worker loads them from
        # of each latest result, the number of the call that failed; None: no error
        self._recent: list[deque[int | None]] = [deque(maxlen=WINDOW) for _ in self.rewards]
        self._num_calls = 0
        self._has_warned: set[int] = set()  # functions whose first error was told
        self._workers = None
        if self.rewards and (num_workers or timeout is not None):
            limit = timeout or math.inf
            self._workers = Workers(
                f"{__name__}:call_in_worker", num_workers=num_workers or 1, timeout=limit, patience=PATIENCE * limit,
                setup=f"{__name__}:load_in_worker", setup_arguments=(self._description,))
            weakref.finalize(self, self._workers.close)  # of a sweep's earlier run, say

    def results(self, samples: list[Sample], state: TrainerState) -> list[list[Result]]:
        """Results [reward][sample]. Raises RewardError, naming function and row, for a function that fails too often."""
        return [self._results_of(index, samples, state) for index in range(len(self.rewards))]

    def try_out(self, samples: list[Sample], state: TrainerState) -> None:
        """Calls every reward function once on made-up completions, so that a broken one stops the run before it starts.

        Raises RewardError naming function, row and cause."""
        for index, reward in enumerate(self.rewards):
            calls = [samples] if reward.is_batch else [[sample] for sample in samples]
            for sample, result in zip(samples, self._call(index, calls, state)):
                if result.error is not None:
                    raise RewardError(f"reward {reward.name!r} failed its dry run on row {sample.source}, called with the "
                                      f"completion {shorten(sample.text)}: {result.error}")

    def close(self) -> None:
        """Ends the workers; they start again when they are needed."""
        if self._workers is not None:
            self._workers.close()

    def _results_of(self, index: int, samples: list[Sample], state: TrainerState) -> list[Result]:
        reward = self.rewards[index]
        if self._workers is None:
            calls = [samples]
        elif reward.is_batch:  # a group of completions for each call: workers share them
            calls = [list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample.source)]
        else:
            calls = [[sample] for sample in samples]
        results: list[Result] = []
        for start in range(0, len(calls), CALLS):  # in parts: a function that always hangs stops the run soon
            part = calls[start : start + CALLS]
            found = self._call(index, part, state)
            self._check_rate(index, part, found)
            results += found
        return results

    def _call(self, index: int, calls: list[list[Sample]], state: TrainerState) -> list[Result]:
        """The results of the samples of these calls, in order."""
        reward = self.rewards[index]
        if self._workers is None:
            return [result for call in calls for result in reward(call, state=state, retries=self.retries)]
        items = [(self._description, index, call, state, self.retries) for call in calls]
        try:
            outcomes = self._workers.map(items)
        except WorkerError as error:
            raise RewardError(f"reward {reward.name!r}: {error}") from error
        results = []
        for call, outcome in zip(calls, outcomes):
            hint = " (env.reward_timeout)" if outcome.is_timeout else ""
            failed = [Result(None, f"{outcome.error}{hint}") for _ in call]
            results += failed if outcome.error is not None else outcome.value
        return results

    def _check_rate(self, index: int, calls: list[list[Sample]], results: list[Result]) -> None:
        reward, recent, rest = self.rewards[index], self._recent[index], iter(results)
        first = None
        for call in calls:
            self._num_calls += 1
            for sample in call:
                self._num_calls += not reward.is_batch  # then each completion has a call of its own
                result = next(rest)
                recent.append(None if result.error is None else self._num_calls)
                if result.error is not None and first is None:
                    first = sample, result.error
        if first is None:
            return
        sample, error = first
        what = f"on row {sample.source}: {error}; completion: {shorten(sample.text)}"
        failed = [number for number in recent if number is not None]
        is_frequent = len(failed) > self.max_error_rate * max(len(recent), FEWEST)
        if is_frequent and (self.max_error_rate == 0 or len(set(failed)) >= FEWEST_CALLS):
            raise RewardError(f"reward {reward.name!r} failed on {len(failed)} of its last {len(recent)} completions "
                              f"(max_error_rate={self.max_error_rate}); now {what}")
        if index not in self._has_warned:
            self._has_warned.add(index)
            warnings.warn(f"reward {reward.name!r} failed {what}. Completions on which it fails get no reward; the run stops "
                          f"once their share is above env.max_error_rate={self.max_error_rate}", stacklevel=2)


def _check(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ValueError(f"env.{name}={value!r}: {allowed}")


def _checked(entries: str | dict | list | None) -> list[dict]:
    """Every entry as {fn, weight, name, kwargs}, of which only `fn` must be there."""
    if isinstance(entries, (str, dict)):
        entries = [entries]
    checked = []
    for i, entry in enumerate(entries or []):
        key = f"env.rewards[{i}]"
        if isinstance(entry, str):
            entry = {"fn": entry}
        if not isinstance(entry, dict) or not isinstance(entry.get("fn"), str):
            raise ValueError(f"{key}={entry!r}: expected package.module:function, my_rewards.py:function or "
                             "{fn: one of them, weight: 1.0}")
        for name in entry:
            if name not in ("fn", "weight", "name", "kwargs"):
                near = difflib.get_close_matches(str(name), ("weight", "name", "kwargs"), n=1)
                raise ValueError(f"{key}.{name}: unknown key{f'; did you mean {near[0]}?' if near else ''} "
                                 "(allowed: fn, weight, name, kwargs)")
        checked.append(entry)
    return checked


def load_rewards(entries: list[dict], columns: set[str], has_answer: bool) -> list[Reward]:
    """The reward functions of checked entries."""
    return [load_reward(entry["fn"], key=f"env.rewards[{i}].fn", columns=columns, has_answer=has_answer,
                        **{name: value for name, value in entry.items() if name != "fn" and value is not None})
            for i, entry in enumerate(entries)]


# --- in a worker process -----------------------------------------------------------------------------------------------


@functools.cache
def load_in_worker(description: bytes) -> list[Reward]:
    return load_rewards(*pickle.loads(description))


def call_in_worker(item: tuple[bytes, int, list[Sample], TrainerState, int]) -> list[Result]:
    description, index, samples, state, retries = item
    return load_in_worker(description)[index](samples, state=state, retries=retries)
