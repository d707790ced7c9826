"""The entropy bonus: a coefficient times the mean entropy of the step's tokens, which is subtracted from the loss.

Adaptive (arXiv 2505.22312, section 3.2): with the entropy e_k of step k and a target, the coefficient c_k grows by `step` after a
step with e_k < target and falls by it after another, and the bonus is on only while e_k <= target. Departure: e of the step
before counts, since that of step k is known only after its forward; the coefficient never falls below 0.
"""
from dataclasses import dataclass

import torch

from grpo.config import ConfigError
from grpo.configuration.algorithm import EntropyConfig
from grpo.losses import LossInputs, average


@dataclass
class EntropyBonus:
    """The coefficient of each step; its state is kept in checkpoints."""

    settings: EntropyConfig
    adapted: float  # the adaptive coefficient, whether the bonus is on or not
    last: float | None = None  # mean entropy of the last step with an update, nats

    @classmethod
    def of(cls, settings: EntropyConfig, state: dict | None = None) -> "EntropyBonus":
        """state: as `state` gave it, of the run that is resumed."""
        return cls(settings, **(state or {"adapted": settings.coefficient}))

    @property
    def state(self) -> dict:
        return {"adapted": self.adapted, "last": self.last}

    @property
    def coefficient(self) -> float:
        if self.settings.target is None:
            return self.settings.coefficient
        return self.adapted if self.last is not None and self.last <= self.settings.target else 0.0

    def observe(self, entropy: float) -> None:
        """After a step with an update: its mean entropy in nats."""
        if self.settings.target is not None:
            grows = entropy < self.settings.target
            self.adapted = max(0.0, self.adapted + (self.settings.step if grows else -self.settings.step))
        self.last = entropy


def check_entropy(settings: EntropyConfig, dtype: torch.dtype) -> None:
    """Raises ConfigError for a bonus that a model of this dtype cannot have."""
    if (settings.coefficient > 0 or settings.target is not None) and dtype == torch.float16:
        raise ConfigError(f"entropy.coefficient = {settings.coefficient}: the entropy's gradient would underflow in float16, the "
                          "dtype of this run; set entropy.coefficient=0 and entropy.target=null, or dtype=bfloat16 on a GPU that "
                          "has it")


def entropy_loss(inputs: LossInputs, coefficient: float) -> torch.Tensor:
    """Minus the coefficient times the mean entropy of the optimizer step's tokens, whatever the policy loss averages over."""
    return -coefficient * average(inputs, inputs.entropy, "token")
