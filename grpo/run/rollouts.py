"""Rollouts that were drawn ahead of the steps that train on them, and their form in a run's checkpoint.

A checkpoint holds them whole, rewards included: they are neither drawn nor scored again. `write` turns their records into JSON
and tensors, `read` turns those back into equal records. An object that occurs twice is written once.
"""
from dataclasses import dataclass, fields, is_dataclass

import torch

from grpo.batch import Completion, Episode, Prompt, Segment, ToolCall
from grpo.config import ConfigError
from grpo.environment import Score
from grpo.groups import Groups
from grpo.rollout.in_flight import BegunRollout

ROLLOUTS = "rollouts."  # prefix of their tensors in a run's checkpoint
_LEAST = 8  # numbers: longer lists of one type become tensors


@dataclass
class Rollout:
    """What a step trains on, and the policy that drew it."""

    step: int  # that trains on it: the number of steps finished before
    version: int  # of the policy, of several the oldest: the number of steps finished when the rollout was drawn or begun
    groups: Groups


_RECORDS = {kind.__name__: kind
            for kind in (Rollout, BegunRollout, Groups, Completion, Prompt, Segment, Episode, ToolCall, Score)}
_LEFT_OUT = {("Episode", "reward")}  # any object: what a score was made of, which is there
_NUMBERS = {int: torch.int64, float: torch.float64}


def write(rollouts: list[Rollout | BegunRollout]) -> tuple[dict, dict[str, torch.Tensor]]:
    """JSON and tensors for `read`. Raises ConfigError for a value that no checkpoint can hold."""
    writer = _Writer()
    places = [writer.value(rollout, "a rollout") for rollout in rollouts]
    return {"rollouts": places, "records": writer.records}, writer.tensors


def read(document: dict, tensors: dict[str, torch.Tensor]) -> list[Rollout | BegunRollout]:
    """The rollouts that `write` gave. tensors: those with the prefix ROLLOUTS, and perhaps others."""
    records: list = []

    def value(item: object) -> object:
        if not isinstance(item, dict):
            return [value(entry) for entry in item] if isinstance(item, list) else item
        (kind, content), = item.items()
        if kind == "record":
            return records[content]
        if kind == "tuple":
            return tuple(value(entry) for entry in content)
        if kind == "dict":
            return {value(key): value(entry) for key, entry in content}
        tensor = tensors[ROLLOUTS + str(content[0] if kind == "parts" else content)]
        return list(tensor.split(content[1])) if kind == "parts" else tensor.tolist() if kind == "numbers" else tensor

    for name, content in document["records"]:
        records.append(_RECORDS[name](**{key: value(item) for key, item in content.items()}))
    return [value(place) for place in document["rollouts"]]


class _Writer:
    def __init__(self) -> None:
        self.records: list = []  # [class, {field: value}], each after those that it refers to
        self.tensors: dict[str, torch.Tensor] = {}
        self._places: dict[int, object] = {}  # by id, of what lives as long as the rollouts

    def value(self, item: object, where: str) -> object:
        kind = type(item)
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        if is_dataclass(item) or kind is torch.Tensor:
            if id(item) not in self._places:
                self._places[id(item)] = self._record(item, where) if is_dataclass(item) else {"tensor": self._put(item)}
            return self._places[id(item)]
        if kind is tuple:
            return {"tuple": [self.value(entry, where) for entry in item]}
        if kind is dict:
            return {"dict": [[self.value(key, where), self.value(entry, f"{where}, under {key!r}")]
                             for key, entry in item.items()]}
        if kind is not list:
            raise ConfigError(f"rollout.max_staleness: {where} has a value of type {kind.__name__}, which a checkpoint cannot "
                              "hold (it holds numbers, texts, lists and mappings); convert it in the environment, or set "
                              "rollout.max_staleness=0")
        kinds = set(map(type, item)) if len(item) >= _LEAST else set()
        if len(kinds) == 1 and kinds <= _NUMBERS.keys() and all(abs(number) < 2**63 for number in item if kinds == {int}):
            return {"numbers": self._put(torch.tensor(item, dtype=_NUMBERS[kinds.pop()]))}
        if kinds == {torch.Tensor} and all(part.ndim == 1 and part.dtype == item[0].dtype for part in item):
            return {"parts": [self._put(torch.cat(item)), [len(part) for part in item]]}
        return [self.value(entry, where) for entry in item]

    def _record(self, item: object, where: str) -> dict:
        name = type(item).__name__
        assert _RECORDS.get(name) is type(item), f"{where}: no record of a rollout is a {name}"
        where = f"the row of prompt {item.id}" if name == "Prompt" else f"a {name}" if name == "Score" else where
        content = {field.name: self.value(getattr(item, field.name), where) for field in fields(item)
                   if (name, field.name) not in _LEFT_OUT}
        self.records.append([name, content])
        return {"record": len(self.records) - 1}

    def _put(self, tensor: torch.Tensor) -> int:
        number = len(self.tensors)
        self.tensors[ROLLOUTS + str(number)] = tensor
        return number
