"""Corrections for tokens that another policy sampled: an older one (rollout.max_staleness), or one that computes differently.

With rho_t = exp(log pi_old - log pi_sampler) of a trained token, pi_old the trainer's policy at the start of the step's updates:
    truncate   weight min(max(rho, low), high)           TIS, fengyao.notion.site/off-policy-rl (low = 0)
    mask       weight rho where low <= rho <= high, else 0   MIS, arXiv 2512.23075 (low = 0); IcePop, arXiv 2510.18855 (0.5, 5)
    geometric  sequences are left out unless low <= exp(mean_t log rho_t) <= high
    max_k3     sequences are left out if mean_t (rho_t - 1 - log rho_t) is larger
    opsm       sequences with A < 0 are left out if mean_t (log pi_sampler - log pi) is larger, pi the policy as it is now;
               DeepSeek-V3.2, arXiv 2512.02556
A sequence is all that the policy sampled in a completion. `level: sequence` takes the product of its rho_t instead, one weight
for all of its tokens, whose spread grows with the length: long sequences hit the bounds first. All of them may be combined; a
sequence that any of them leaves out has weight 0.

With these weights a loss that clips around pi_old is decoupled PPO (arXiv 2110.00641): the ratio pi / pi_old is clipped, and
pi_old / pi_sampler weighs it.

The weights have no gradient. They multiply the advantages, so every loss that is proportional to its advantage for any weight
>= 0 is weighted by them; terms without an advantage (KL penalty, entropy) are not. Counts stay those of the whole step: a token
that is left out counts in the denominator, and its sequence in a sequence's ratio (as in TRL; a count of what is left would
hide how much is gone). What is logged, and what each bound is compared with, are the ratios before any cap.

Shapes: T packed tokens of a micro-batch.
"""
from dataclasses import replace

import torch

from grpo.config import CorrectionsConfig, RatioLevel, WeightKind
from grpo.losses import MAX_LOG_RATIO, LossInputs

_ONE = 2.0**32  # fixed point: sums of integers have the same bits in any order, on any device
LARGEST = 1e30  # of a product of ratios; infinite in fp32 a little above


@torch.no_grad()
def correct(inputs: LossInputs, settings: CorrectionsConfig) -> tuple[LossInputs, dict[str, torch.Tensor]]:
    """The inputs with weighted advantages, and statistics for reduce_stats. Without a correction, the same inputs and {}."""
    if not settings.is_on:
        return inputs, {}
    mask, lengths = inputs.loss_mask, inputs.sequence_lengths.clamp(min=1)[inputs.sequence_ids]
    log_ratio = torch.where(mask, inputs.old_log_probs - inputs.sampler_log_probs, 0.0)
    log_ratio = log_ratio.double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # [T] nats
    total = _sums(log_ratio, inputs)  # [T] of the token's sequence, like the next ones
    k3 = _sums(torch.expm1(log_ratio) - log_ratio, inputs) / lengths
    ratio, geometric = log_ratio.exp(), (total / lengths).exp()
    product = total.exp().clamp(max=LARGEST)
    used = product if settings.level == RatioLevel.sequence else ratio
    weight = torch.ones_like(used)
    if settings.weight == WeightKind.truncate:
        weight = used.clamp(settings.low, settings.high)
    elif settings.weight == WeightKind.mask:
        weight = torch.where((used >= settings.low) & (used <= settings.high), used, 0.0)
    is_left_out = torch.zeros_like(mask)
    if settings.geometric is not None:
        low, high = settings.geometric
        is_left_out |= (geometric < low) | (geometric > high)
    if settings.max_k3 is not None:
        is_left_out |= k3 > settings.max_k3
    if settings.opsm_delta is not None:
        gap = torch.where(mask, inputs.sampler_log_probs - inputs.log_probs.detach(), 0.0).double()
        drift = _sums(gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), inputs) / lengths
        is_left_out |= (inputs.advantages < 0) & (drift > settings.opsm_delta)
    weight = torch.where(is_left_out | ~mask, 0.0, weight)
    # one for each sequence, as a part of its tokens; reduce_stats divides by tokens
    per_sequence = torch.where(mask, inputs.num_policy_tokens / (inputs.num_sequences * lengths.double()), 0.0)
    is_gone = mask & (_sums((weight > 0).double(), inputs) == 0)
    stats = {"corrections/ratio/mean": torch.where(mask, ratio, 0.0).sum(),
             "corrections/ratio/max": torch.where(mask, ratio, 0.0).max(),
             "corrections/inverse_ratio/max": torch.where(mask, 1 / ratio, 0.0).max(),
             "corrections/sequence_ratio/max": torch.where(mask, product, 0.0).max(),
             "corrections/sequence_k3": (per_sequence * k3).sum(),
             "corrections/weight": weight.sum(),
             "corrections/masked_tokens": (mask & (weight == 0)).sum(),
             "corrections/masked_sequences": (per_sequence * is_gone).sum()}
    return replace(inputs, advantages=(inputs.advantages * weight).to(inputs.advantages.dtype)), stats


def _sums(values: torch.Tensor, inputs: LossInputs) -> torch.Tensor:
    """[T] float64: at each token the sum of `values` [T], 0 where the mask is false, over its completion, all of which a
    micro-batch has, unless memory does not hold it. Equal for any packing, and on a GPU at each run."""
    whole = values.trunc()  # apart: a few values of exp(MAX_LOG_RATIO) in fixed point are more than 64 bits
    sums = torch.zeros(2, len(inputs.sequence_lengths), dtype=torch.int64, device=values.device)
    sums.index_add_(1, inputs.sequence_ids, torch.stack([whole, ((values - whole) * _ONE).round()]).long())
    return (sums[0].double() + sums[1].double() / _ONE)[inputs.sequence_ids]
