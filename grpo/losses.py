"""Policy losses and the statistics that go with them.

A loss maps one micro-batch, as `LossInputs`, to a scalar to minimise. Each divides by a count of the whole optimizer step, never
by one of the micro-batch, so summing losses and gradients over micro-batches gives the same result for any split, packing or
order.

With A the advantage, o_i the trained tokens of sequence i, B the sequences of the optimizer step, and
    ratio r = exp(log pi - log pi_old),   surrogate J = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A):
    grpo      -1/B sum_i 1/|o_i| sum_t J     DeepSeekMath, arXiv 2402.03300, eq. 3 (its KL term: grpo/kl.py)
    dr_grpo   -1/(B L) sum_i sum_t J         Dr. GRPO, arXiv 2503.20783; L is a constant length in tokens
    dapo      -1/sum_i |o_i| sum_i sum_t J   DAPO, arXiv 2503.14476, eq. 8 (clip_high > clip_low: "clip-higher")
When `old_log_probs` are the detached `log_probs` themselves (one update per batch) r is exactly 1, nothing is clipped,
and the gradient is REINFORCE's, A grad log pi.

Departure from the papers: log-ratios are clamped to +-20 before the exponential.

Statistics are sums over a micro-batch, which `reduce_stats` adds up. CONTRACT says what a user's own loss must return.

Shapes: T packed tokens of a micro-batch, N completions of the whole GRPO step.
"""
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch

from grpo.batch import Completion, Prompt, RolloutBatch, Segment, pack
from grpo.config import ConfigError

CONTRACT = (
    "A loss is called as loss(inputs), a grpo.losses.LossInputs, with the other keys of its YAML as keywords. It returns (loss, "
    "stats): a scalar tensor that depends on inputs.log_probs, and a dict of scalars to log, each a sum over the micro-batch's "
    "trained tokens (a maximum where the name ends in /max), {} for none")
MAX_LOG_RATIO = 20.0  # nats; exp(20) = 5e8 is still far from overflow when summed in fp32


@dataclass
class LossInputs:
    """What a loss gets for one micro-batch.

    [T]: one entry for each packed token, those of prompts and of an environment included. `loss_mask` is true for tokens that the
    policy sampled; log-probs and entropy are 0 elsewhere. [N]: one entry for each completion of the GRPO step, those of other
    minibatches and micro-batches included, so a loss can compute its own baseline: `(rewards - rewards.mean())[sequence_ids]` is
    [T]. Counts are of one optimizer step (one minibatch): a loss divides by one of them."""

    log_probs: torch.Tensor  # [T] fp32 nats, of the policy as it is now: the gradient goes through them
    # [T] fp32 nats, of the full vocabulary. A loss that uses it gets its gradient (except for float16 models); the backward then
    # computes the logits a second time. Other losses cost no more
    entropy: torch.Tensor
    old_log_probs: torch.Tensor  # [T] fp32 nats, of the policy before the step's first update, or the sampler's; no gradient
    sampler_log_probs: torch.Tensor  # [T] fp32 nats, as recorded when the token was drawn
    ref_log_probs: torch.Tensor | None  # [T] fp32 nats, of the reference of the KL penalty; None without one (grpo/kl.py)
    # [T] fp32 nats, KL(policy, reference) over the full vocabulary, with its gradient; None unless kl.estimator is full
    full_kl: torch.Tensor | None
    advantages: torch.Tensor  # [T] fp32, that of the token's completion, times its weight (grpo/corrections.py)
    loss_mask: torch.Tensor  # [T] bool
    sequence_ids: torch.Tensor  # [T] int64, the completion that a token belongs to: an index into each [N]
    sequence_lengths: torch.Tensor  # [N] int64, trained tokens
    rewards: torch.Tensor  # [N] fp32, raw; NaN without one
    group_ids: torch.Tensor  # [N] int64, equal within a group
    num_policy_tokens: int  # trained tokens of the optimizer step
    num_sequences: int  # completions of the optimizer step
    num_prompts: int  # prompts of the optimizer step, each with one or more of its completions
    max_new_tokens: int  # longest completion allowed, in tokens
    # [N] float64 nats: log-prob of each completion before the update, and the reference's; with optim.sums_log_probs only
    old_sums: torch.Tensor | None = None
    ref_sums: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: RolloutBatch, log_probs: torch.Tensor, entropy: torch.Tensor, *, old_log_probs: torch.Tensor,
           max_new_tokens: int, full_kl: torch.Tensor | None = None) -> "LossInputs":
        """The inputs for a micro-batch. log_probs, entropy, full_kl (of the policy now), old_log_probs: [T] fp32 nats."""
        assert log_probs.shape == entropy.shape == old_log_probs.shape == batch.loss_mask.shape, (
            log_probs.shape, entropy.shape, old_log_probs.shape, batch.loss_mask.shape)
        return cls(
            log_probs=log_probs, entropy=entropy, old_log_probs=old_log_probs.detach(), max_new_tokens=max_new_tokens,
            sampler_log_probs=batch.sampler_log_probs, ref_log_probs=batch.ref_log_probs, full_kl=full_kl,
            advantages=batch.advantages, loss_mask=batch.loss_mask,
            sequence_ids=batch.sequence_ids, sequence_lengths=batch.sequence_lengths,
            rewards=batch.rewards, group_ids=batch.group_ids, num_policy_tokens=batch.num_policy_tokens,
            num_sequences=batch.num_sequences, num_prompts=batch.num_prompts, old_sums=batch.old_sums, ref_sums=batch.ref_sums)


def grpo(inputs: LossInputs, *, clip_low: float, clip_high: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over sequences of the mean over a sequence's tokens: a token of a long completion weighs less.

    Returns the scalar loss and the sums of `reduce_stats`."""
    surrogate, stats = _surrogate(inputs, clip_low, clip_high)
    lengths = inputs.sequence_lengths.clamp(min=1)[inputs.sequence_ids]  # [T]
    return -(surrogate / lengths).sum() / inputs.num_sequences, stats


def dr_grpo(inputs: LossInputs, *, clip_low: float, clip_high: float,
            length_normalizer: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over tokens, divided by (number of sequences x `length_normalizer` tokens): no bias by length.

    `length_normalizer` is usually the longest completion allowed. Returns the scalar loss and the sums of `reduce_stats`."""
    if not 0 < length_normalizer < math.inf:
        raise ConfigError(f"loss.length_normalizer = {length_normalizer}: must be a positive number of tokens; "
                          "rollout.max_new_tokens is the usual choice")
    surrogate, stats = _surrogate(inputs, clip_low, clip_high)
    return -surrogate.sum() / (inputs.num_sequences * length_normalizer), stats


def dapo(inputs: LossInputs, *, clip_low: float, clip_high: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over all trained tokens of the optimizer step: every token weighs the same.

    Returns the scalar loss and the sums of `reduce_stats`."""
    surrogate, stats = _surrogate(inputs, clip_low, clip_high)
    return -surrogate.sum() / inputs.num_policy_tokens, stats


def _surrogate(inputs: LossInputs, clip_low: float, clip_high: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped surrogate per token, to maximise, zero where the mask is false; and its statistics. [T]"""
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ConfigError(f"loss.clip_low = {clip_low}, loss.clip_high = {clip_high}: the ratio is kept within "
                          "[1 - clip_low, 1 + clip_high], so 0 <= clip_low <= 1 and clip_high >= 0 (DAPO: 0.2 and 0.28)")
    mask, advantages = inputs.loss_mask, inputs.advantages
    # masked before the exponential, so that values outside the mask, even NaN, reach neither value nor gradient
    log_ratio = torch.where(mask, inputs.log_probs - inputs.old_log_probs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.where(mask, torch.minimum(ratio * advantages, clipped * advantages), 0.0)
    with torch.no_grad():
        stats = {
            "clip_ratio/low": (mask & (advantages < 0) & (ratio < 1 - clip_low)).sum(),
            "clip_ratio/high": (mask & (advantages > 0) & (ratio > 1 + clip_high)).sum(),
            "approx_kl": torch.where(mask, _k3(log_ratio), 0.0).sum(),  # KL(pi_old || pi), estimated under pi_old
            "ratio/mean": torch.where(mask, ratio, 0.0).sum(),
            "ratio/max": torch.where(mask, ratio, 0.0).max(),
        }
    return surrogate, stats


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(x) - x - 1 >= 0 with x clamped: under samples of q, with x = log p - log q, an estimate of KL(q || p)."""
    x = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(x) - x


def token_stats(inputs: LossInputs) -> dict[str, torch.Tensor]:
    """Sums over the trained tokens: entropy (nats) and how far the trainer's log-probs are from the sampler's.

    `sampling/log_prob_diff` is |log pi - log pi_sampler| in nats, before any correction, `sampling/kl` the k3 estimate
    of KL(pi_sampler || pi) in nats. Before the first update of a batch both should be 0, up to the numerics of two
    passes."""
    mask = inputs.loss_mask
    with torch.no_grad():
        difference = torch.where(mask, inputs.log_probs - inputs.sampler_log_probs, 0.0)
        return {
            "num_tokens": mask.sum(),
            "entropy": torch.where(mask, inputs.entropy, 0.0).sum(),
            "sampling/log_prob_diff/mean": difference.abs().sum(),
            "sampling/log_prob_diff/max": difference.abs().max(),
            "sampling/kl": _k3(difference).sum(),
        }


def reduce_stats(stats: list[dict[str, torch.Tensor]], *, num_updates: int) -> dict[str, float]:
    """Statistics of all micro-batches of a step -> metrics of the step.

    `loss` is already divided by its normaliser: summed over micro-batches, averaged over the step's `num_updates`. A
    name that ends in `/max` is a maximum. Everything else is a sum over tokens, divided by the sum of `num_tokens`."""
    values: dict[str, float] = {}
    for part in stats:
        for name, value in part.items():
            is_max = name.endswith("/max")
            values[name] = max(values.get(name, -math.inf), float(value)) if is_max else values.get(name, 0.0) + float(value)
    num_tokens = values.pop("num_tokens")
    return {name: value if name.endswith("/max") else value / num_updates if name == "loss"
            else value / num_tokens if num_tokens else 0.0 for name, value in values.items()}


def try_loss(loss_fn: Callable, path: str, *, group_size: int, max_new_tokens: int, has_reference: bool,
             has_full_kl: bool = False, has_sums: bool = False) -> None:
    """Calls the loss that `path` names on two made-up groups. Raises ConfigError if it fails or breaks CONTRACT."""
    segments = [Segment([1, 2], "prompt"), Segment([3, 4], "policy", [-1.0, -2.0])]
    completions = [Completion(Prompt(group, [1, 2], {}), sample, segments, "stop", reward=float(sample))
                   for group in range(2) for sample in range(group_size)]
    batch = pack(completions, [sample - (group_size - 1) / 2 for _ in range(2) for sample in range(group_size)])
    batch.ref_log_probs = 1.2 * batch.sampler_log_probs if has_reference else None
    if has_sums:
        batch.old_sums = torch.full((2 * group_size,), -3.0, dtype=torch.float64)
        batch.ref_sums = 1.2 * batch.old_sums
    log_probs = (1.1 * batch.sampler_log_probs).requires_grad_()
    try:
        inputs = LossInputs.of(batch, log_probs, torch.ones_like(log_probs), old_log_probs=batch.sampler_log_probs,
                               full_kl=torch.ones_like(log_probs) if has_full_kl else None, max_new_tokens=max_new_tokens)
        checked_loss(loss_fn(inputs), path)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"loss._target_ = {path!r}: raised {type(error).__name__}: {error}. {CONTRACT}") from error


def checked_loss(returned: object, path: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns what a loss returned, unchanged. Raises ConfigError if it breaks CONTRACT."""
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    loss, stats = returned if is_pair else (None, None)
    wrong = "" if is_pair else f"what it returned is {_kind(returned)}, no pair"
    is_scalar = isinstance(loss, torch.Tensor) and loss.ndim == 0
    if is_pair and not (is_scalar and loss.requires_grad):
        wrong = f"its loss is {'a scalar that does not depend on inputs.log_probs' if is_scalar else _kind(loss)}"
    elif is_pair and not isinstance(stats, dict):
        wrong = f"its stats are {_kind(stats)}"
    elif is_pair:
        bad = [(name, value) for name, value in stats.items() if not isinstance(name, str) or not (
            isinstance(value, numbers.Real) or isinstance(value, torch.Tensor) and value.ndim == 0)]
        wrong = f"stats[{bad[0][0]!r}] is {_kind(bad[0][1])}" if bad else ""
    if wrong:
        raise ConfigError(f"loss._target_ = {path!r}: {wrong}. {CONTRACT}")
    return loss, stats


def _kind(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"of type {type(value).__name__}"
