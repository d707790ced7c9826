"""Keys that were set and can change nothing, since another key switches them off: refused, so that nobody believes they acted.

Keys whose default stands in the YAML are not among them; the comments of grpo/config.py say when those are of no account. Of
kl.estimator, which files of configs/loss set too, grpo/configuration/validate.py refuses the choice that none of them makes."""
import dataclasses
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple

from grpo.config import LrSchedule, TrainConfig, WeightKind
from grpo.configuration.targets import dotted_target


class Dependent(NamedTuple):
    key: str
    acts: Callable[[TrainConfig], bool]
    needs: str  # what lets it act


def _draws_evaluations(config: TrainConfig) -> bool:
    """Or has none at all, which is no reason to empty eval of its other keys."""
    evaluation = config.eval
    return evaluation.num_samples > 0 or not (evaluation.every > 0 or evaluation.at_start or evaluation.at_end)


def _may_use_sums(config: TrainConfig) -> bool:
    return not dotted_target(config.loss).startswith(("grpo.losses.", "grpo.supervised.sft"))


DEPENDENT = (
    *(Dependent(f"corrections.{name}", lambda config: config.corrections.weight != WeightKind.none,
                "corrections.weight=truncate or mask") for name in ("level", "low", "high")),
    Dependent("entropy.step", lambda config: config.entropy.target is not None, "an entropy.target"),
    Dependent("kl.reference", lambda config: config.needs_reference, "kl.coefficient above 0"),
    Dependent("rollout.overlong_penalty", lambda config: config.rollout.overlong_buffer is not None, "rollout.overlong_buffer"),
    Dependent("optim.decay_steps", lambda config: config.optim.schedule != LrSchedule.constant,
              "optim.schedule=linear or cosine"),
    Dependent("optim.whole_prompts", lambda config: config.optim.minibatches > 1, "optim.minibatches above 1"),
    Dependent("optim.sums_log_probs", _may_use_sums, "loss=dpo, or a loss of your own that uses them"),
    Dependent("curriculum.window", lambda config: config.curriculum.retire_at is not None or config.curriculum.candidates > 1,
              "curriculum.retire_at, or curriculum.candidates above 1"),
    Dependent("curriculum.target", lambda config: config.curriculum.candidates > 1, "curriculum.candidates above 1"),
    *(Dependent(f"eval.{name}", _draws_evaluations, "eval.num_samples above 0")
      for name in ("top_k", "top_p", "min_p")),
)


def inert_problems(config: TrainConfig) -> Iterator[tuple[str, object, str]]:
    """Key, its value, what is allowed; as grpo/configuration/validate.py has them."""
    for key, acts, needs in DEPENDENT:
        node_name, name = key.split(".")
        node = getattr(config, node_name)
        value = getattr(node, name)
        default = next(field.default for field in dataclasses.fields(node) if field.name == name)
        if value != default and not acts(config):
            left = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            given = str(value) if isinstance(value, StrEnum) else value
            yield key, given, f"changes nothing without {needs}: set that, or leave it at {left}"
