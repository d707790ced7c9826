"""Nodes of a training configuration about its prompts and what a run keeps and writes; grpo/config.py has the others."""
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Dict, List, Optional

from grpo.configuration.fields import REQUIRED, number


class WandbMode(StrEnum):
    auto = "auto"  # online with a key, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"  # the other keys are of no account


@dataclass
class CurriculumConfig:
    """Which prompts are sampled, by their pass rate: the share of a group's completions that are correct, over the prompt's last
    `window` groups. On if a prompt may rest or there are candidates; then checkpoints hold the pass rates."""

    window: int = number("[1, inf)", default=2)  # groups
    # a prompt rests from this pass rate on, if it has had `window` groups; null: none does
    retire_at: Optional[float] = number("(0, 1]", "null for never; 0.9 is ScaleRL's", default=None)
    # a prompt rests after so many groups in a row without a correct completion; null: none does
    retire_unsolved: Optional[int] = number("[1, inf)", "null for never", default=None)
    # prompts drawn / prompts needed: of those drawn, the ones nearest to `target` are sampled; new prompts come first
    candidates: float = number("[1, 64]", "1 takes them as they come", default=1.0)
    target: float = number("[0, 1]", "a pass rate; 0.5 gives the most gradient", default=0.5)

    @property
    def is_on(self) -> bool:
        return self.retire_at is not None or self.retire_unsolved is not None or self.candidates > 1


@dataclass
class CheckpointConfig:
    every: int = number("[0, inf)", "0 is at the end only")  # steps
    keep: int = number("[2, inf)", "the newest one may be the one that a crash cut short")  # newest ones kept
    # held-out metric, such as eval/greedy_accuracy: the checkpoint of its best evaluation is saved, and kept; null: none. Of
    # losses, errors and their like the smallest value is the best
    best: Optional[str] = None


@dataclass
class LogConfig:
    completions_every: int = number("[0, inf)", "0 is never")  # steps
    # of a step that writes some: the first ones, and as many that look like reward hacking
    num_completions: int = number("[0, inf)")
    tensorboard: bool = False  # also writes the metrics for TensorBoard, into the run's folder (the extra of that name)


@dataclass
class WandbConfig:
    mode: WandbMode = REQUIRED
    project: str = REQUIRED
    entity: Optional[str] = None
    group: Optional[str] = None
    tags: List[str] = field(default_factory=list)


@dataclass
class SelftestConfig:
    """A run whose machine and code are checked first, and whose curve is checked afterwards (grpo/selftest.py)."""

    bands: Dict[str, Any] = field(default_factory=dict)  # METRIC@STEP: [the least, the largest value that passes]
