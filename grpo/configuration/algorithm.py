"""The settings of the algorithm that go with any loss: advantages, entropy, KL. Part of the schema in grpo/config.py."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Dict, Optional

from grpo.configuration.fields import REQUIRED, number


class Baseline(StrEnum):
    """What is subtracted from a reward."""

    group = "group"  # the mean of the group (GRPO)
    leave_one_out = "leave_one_out"  # the mean of the group's other rewards (RLOO)
    length_weighted = "length_weighted"  # the mean of the group, each weighted by its trained tokens (OPO)
    best_of_others = "best_of_others"  # see grpo.advantages.pass_at_k: rewards the best of `k` completions
    greedy = "greedy"  # the reward of the prompt's greedy completion, which is sampled too (ReMax)
    none = "none"  # nothing (REINFORCE)


class Scale(StrEnum):
    """What the difference is divided by."""

    group = "group"  # the standard deviation of the group's rewards (GRPO)
    batch = "batch"  # that of all the step's rewards
    mean = "mean"  # the mean reward of the group (MaxRL)
    none = "none"  # 1 (Dr. GRPO)


class Whiten(StrEnum):
    """Mean 0 and standard deviation 1 over the step, at last."""

    sequences = "sequences"  # each completion counts once
    tokens = "tokens"  # each trained token counts once (REINFORCE++)
    none = "none"


class Estimator(StrEnum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"
    full = "full"  # no estimate: over the whole vocabulary, by a second product with the head


class KlReference(StrEnum):
    start = "start"  # the policy as GRPO starts: with the adapter it was given, after a warm-up
    base = "base"  # the model before both, with the checkpoint's norms and sinks


class KlPlace(StrEnum):
    loss = "loss"  # a term of the loss, by `estimator`
    reward = "reward"  # k1, summed over a completion's tokens, lowers its reward
    reward_to_go = "reward_to_go"  # likewise, but a token's advantage is lowered only by the k1 of it and the tokens after it


@dataclass
class AdvantageConfig:
    """A completion's advantage: (reward - baseline) / scale (grpo/advantages.py)."""

    baseline: Baseline = REQUIRED
    scale: Scale = REQUIRED
    whiten: Whiten = Whiten.none
    k: Optional[int] = number("[2, inf)", "null is rollout.group_size", default=None)  # of baseline=best_of_others
    # parts of the reward by name, with weights: each has an advantage of its own, and these are added up (GDPO). {}: all parts,
    # weight 1; null: the reward is one number
    components: Optional[Dict[str, float]] = None


@dataclass
class EntropyConfig:
    # the loss per nat of entropy (mean over the step's tokens) that is given back
    coefficient: float = number("[0, inf)", "0 is off", default=0.0)
    # adaptive: only while the last step's entropy was below `target` is there a bonus; its coefficient grows by `step` after each
    # such step, and falls by as much after any other
    target: Optional[float] = number("(0, inf)", "in nats, or null for a constant coefficient", default=None)
    step: float = number("(0, inf)", default=0.005)
    # only this share of the step's tokens, those with the largest entropy, has a policy loss; 1 is off. Needs one more forward
    top_fraction: float = number("(0, 1]", "1 is off, 0.2 is usual", default=1.0)


@dataclass
class KlConfig:
    # loss or reward per nat; 0 skips the reference pass, and then estimator (full is refused) and place are of no account
    coefficient: float = number("[0, inf)", "0 is off")
    estimator: Estimator = REQUIRED
    reference: KlReference = KlReference.start  # the policy that the penalty measures the distance to
    # the reference becomes the policy of that moment every so many steps
    refresh_every: Optional[int] = number("[1, inf)", "null is never", default=None)
    place: KlPlace = KlPlace.loss

    @property
    def is_in_loss(self) -> bool:
        """Whether the loss has a penalty."""
        return self.coefficient > 0 and self.place == KlPlace.loss

    @property
    def is_in_reward(self) -> bool:
        """Whether it lowers rewards."""
        return self.coefficient > 0 and self.place != KlPlace.loss

    @property
    def is_full(self) -> bool:
        """Whether the loss has the KL over the whole vocabulary."""
        return self.is_in_loss and self.estimator == Estimator.full
