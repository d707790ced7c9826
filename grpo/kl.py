"""The KL penalty that keeps the policy near a reference, and the reference.

Departures from GRPO (arXiv 2402.03300): the penalty is averaged over the tokens of the step whatever the policy loss averages
over, and its exponential is bounded.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from grpo.batch import RolloutBatch
from grpo.config import ConfigError
from grpo.configuration.algorithm import Estimator, KlConfig
from grpo.losses import MAX_LOG_RATIO, LossInputs
from models.gpt_oss import GptOss

MAX_KL_WEIGHT = 10.0  # of pi / pi_sampler
MAX_REF_RATIO = 10.0  # above this pi_ref / pi, k3 continues along its tangent
REFERENCE = "reference."  # prefix of the reference's tensors in a run's checkpoint


@dataclass(frozen=True)
class Reference:
    """A frozen state of the policy: a copy of the trainable parameters, in host memory, which replace the policy's for a pass.
    The frozen base is not copied.

    tensors: by parameter name. If none is an adapter's, the reference is the model with its adapter off."""

    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, policy: GptOss, parameters: dict[str, torch.Tensor] | None = None) -> "Reference":
        """The policy as it is now. An adapter that adds nothing yet, since every B is zero, is left out.

        parameters: all that will change, by name; None: the trainable ones."""
        parameters = policy.trainable_parameters() if parameters is None else parameters
        adds = any(bool(parameter.any()) for name, parameter in parameters.items() if name.endswith("lora_B"))
        adds = adds if policy.share is None else policy.share.any(adds)
        return cls({name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()
                    if adds or not _is_adapter(name)})

    @classmethod
    def load(cls, tensors: dict[str, torch.Tensor], policy: GptOss) -> "Reference":
        """The reference from a checkpoint's tensors, as `state_dict` wrote it, or the policy's part of it."""
        return cls({name.removeprefix(REFERENCE): policy.own(name, tensor) for name, tensor in tensors.items()
                    if name.startswith(REFERENCE)})

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {REFERENCE + name: tensor for name, tensor in self.tensors.items()}

    @contextmanager
    def in_place_of(self, policy: GptOss) -> Iterator[None]:
        """Inside the `with`, the policy computes as the reference. For passes without gradients, while no forward of the policy
        waits for its backward."""
        has_adapter = any(_is_adapter(name) for name in self.tensors)
        with policy.exchanged(self.tensors), nullcontext() if has_adapter else policy.adapter_disabled():
            yield

    def head(self, policy: GptOss) -> torch.Tensor | None:
        """The reference's head on the policy's device; None if it is the policy's own."""
        head = self.tensors.get("lm_head.weight")
        return None if head is None else head.to(policy.device)


def _is_adapter(name: str) -> bool:
    return name.endswith(("lora_A", "lora_B"))


def check_estimator(kl: KlConfig, dtype: torch.dtype) -> None:
    """Raises ConfigError for an estimator that a model of this dtype cannot have."""
    if kl.is_full and dtype == torch.float16:
        raise ConfigError("kl.estimator = 'full': its gradient would underflow in float16, the dtype of this run; set "
                          "kl.estimator=k2, or dtype=bfloat16 on a GPU that has it")


def k1_to_go(batch: RolloutBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """k1 = log pi_sampler - log pi_ref in nats, on the host in float64: for each token [T] the sum over it and the trained tokens
    after it in its completion, and for each completion [N] the sum over all of its trained tokens."""
    mask, owners = batch.loss_mask.cpu(), batch.sequence_ids.cpu()
    gap = torch.where(mask, (batch.sampler_log_probs - batch.ref_log_probs).cpu().double(), 0.0)
    totals = torch.zeros(len(batch.rewards), dtype=torch.float64).index_add(0, owners, gap)
    before = gap.cumsum(0) - gap  # a completion's tokens are neighbours, in order
    starts = torch.full_like(totals, torch.inf).scatter_reduce(0, owners, torch.arange(len(gap)).double(), "amin").long()
    return totals[owners] - (before - before[starts[owners]]), totals


def kl_penalty(inputs: LossInputs, *, coefficient: float,
               estimator: Estimator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """coefficient times the mean over the step's tokens of the KL between policy and reference, or of an estimate of it.

    With d = log pi - log pi_ref on tokens sampled from pi, `estimator` is
        k1  value d (unbiased, can be negative).  Gradient d grad log pi, that of KL(pi || pi_ref): the plain
            derivative, grad log pi, is zero in expectation and thus noise, so the score-function form is used instead
        k2  value d^2/2 (biased, low variance).   Gradient d grad log pi: exactly that of KL(pi || pi_ref)
        k3  value exp(-d) + d - 1 (unbiased, >= 0, GRPO's).  Gradient (1 - exp(-d)) grad log pi: that of the *other*
            direction, KL(pi_ref || pi). Where pi_ref > 10 pi it goes on along its tangent: one token cannot explode the
            step, and is still pulled back (capping the value, as is common, would let go of it)
        full  KL(pi || pi_ref) itself, over the full vocabulary (no sampling filter), with its own gradient: no noise of the draw
    (arXiv 2510.01555, 2512.21852; J. Schulman, "Approximating KL divergence", 2020.) Each estimate is weighted by the
    detached ratio pi / pi_sampler (at most 10; 1 on policy), which keeps the above true after several updates on one
    batch (as in DeepSeek-V3.2, arXiv 2512.02556) up to the prefix, whose distribution stays the sampler's.

    Both log-probs of an estimate are of distributions over the same tokens, those that a sampling filter kept. Returns the scalar
    and {"kl": sum in nats}."""
    mask = inputs.loss_mask
    if estimator == Estimator.full:  # exact at each token's prefix, whichever token was drawn there: nothing to weight
        total = torch.where(mask, inputs.full_kl, 0.0).sum()
        return coefficient * total / inputs.num_policy_tokens, {"kl": total.detach()}
    difference = torch.where(mask, inputs.log_probs - inputs.ref_log_probs.detach(), 0.0)  # [T] nats
    if estimator == Estimator.k1:
        # value d; the bracket is zero in value and has the gradient d grad log pi
        score = difference.detach()
        penalty = score + score * (difference - score)
    elif estimator == Estimator.k2:
        penalty = difference.square() / 2
    else:
        knee = math.log(MAX_REF_RATIO)
        growth = torch.expm1((-difference).clamp(max=knee)) + MAX_REF_RATIO * (-difference - knee).clamp(min=0)
        penalty = growth + difference
    with torch.no_grad():
        drift = torch.where(mask, inputs.log_probs - inputs.sampler_log_probs, 0.0)
        weight = drift.clamp(-MAX_LOG_RATIO, math.log(MAX_KL_WEIGHT)).exp()
    total = torch.where(mask, weight * penalty, 0.0).sum()
    return coefficient * total / inputs.num_policy_tokens, {"kl": total.detach()}
