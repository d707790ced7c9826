"""Policy losses and the statistics that go with them.

A loss maps one micro-batch, as `LossInputs`, to a scalar to minimise: minus the average of an objective J for each token. With A
the advantage, pi the policy, sg[] without gradient, and per token
    ratio r = exp(log pi - log pi_old),   of a sequence s = exp(mean over its trained tokens of log r), w = product of its r:
    ppo        min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)                      GRPO, arXiv 2402.03300, eq. 3
               clip_high > clip_low: DAPO, arXiv 2503.14476, eq. 8; max_ratio: the first r is at most that (two-sided,
               arXiv 2505.07291); dual_clip: for A < 0, J >= dual_clip A (arXiv 1912.09729)
    gspo       ppo with s pi / sg[pi] for r                                          GSPO-token, arXiv 2507.18071, eq. 13
    cispo      sg[min(r, max_ratio)] A log pi                                        arXiv 2506.13585, eq. 4
    sapo       A 4 / tau sigmoid(tau (r - 1)), tau by the sign of A                  arXiv 2511.20347
    gmpo       A exp(mean over the sequence of log r, clipped to [-clip_low, clip_high] on the side that A pushes to)
                                                                                     arXiv 2507.20673
    vespo      sg[w^k exp(lambda (1 - w))] A log pi, k and lambda by the sign of A   arXiv 2602.10693
    dppo       sg[min(r, max_ratio)] A log pi, 0 where A pushes on what has moved by more than clip_low or clip_high; r is to the
               sampler here                                                          arXiv 2602.04879
    reinforce  A log pi                                                              what RLOO, ReMax, GPG, OPO, MaxRL use
    dro        A log pi - beta / 2 (log r)^2                                         arXiv 2405.19107
    clip_cov   ppo, 0 for a random share of the tokens whose covariance of A and log pi lies in a band     arXiv 2505.22617
    kl_cov     r A - coefficient |log r| for the share of the tokens with the largest covariance, else r A    the same
and `average` divides by what `normalizer` names, always of the whole optimizer step, so that losses and gradients of
micro-batches add up to the same for any split, packing or order. With o_i the trained tokens of sequence i, B sequences, P
prompts:
    token      sum / sum_i |o_i|               every token weighs the same (DAPO)
    sequence   1/B sum_i 1/|o_i| sum_t         every sequence weighs the same (GRPO)
    prompt     1/P sum_p (sum over p's completions and tokens) / their tokens (arXiv 2510.13786)
    constant   sum / (B max_new_tokens)        no bias by length (Dr. GRPO, arXiv 2503.20783); a number stands for max_new_tokens
The names of configs/loss are these functions with a normalizer and an advantage.

When `old_log_probs` are the detached `log_probs` themselves (one update per batch) r is exactly 1, nothing is clipped, and the
gradient of all of them but gmpo's and vespo's normalisation is REINFORCE's, A grad log pi.

Departure from the papers: log-ratios are clamped to +-20 before the exponential.

Shapes: T packed tokens of a micro-batch, N completions of the whole GRPO step.
"""
import math
from dataclasses import dataclass

import torch

from grpo.batch import RolloutBatch
from grpo.config import ConfigError

MAX_LOG_RATIO = 20.0  # nats; exp(20) = 5e8 is still far from overflow when summed in fp32
NORMALIZERS = ("token", "sequence", "prompt", "constant")
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]  # the scalar loss, and sums for `reduce_stats`


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
    group_lengths: torch.Tensor  # [N] int64, trained tokens of all of the group's completions in the optimizer step
    token_index: torch.Tensor  # [T] int64, a token's place in StepTokens
    spans: list[tuple[int, int]]  # of the micro-batch, in order: a completion (or its prompt, where it is shared) and its tokens
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
        """The inputs for a micro-batch. log_probs, entropy, full_kl (of the policy now), old_log_probs: [T] fp32 nats.

        What stands where the mask is false, even NaN, reaches neither value nor gradient of a loss."""
        assert log_probs.shape == entropy.shape == old_log_probs.shape == batch.loss_mask.shape, (
            log_probs.shape, entropy.shape, old_log_probs.shape, batch.loss_mask.shape)
        log_probs, entropy, old_log_probs, sampler_log_probs, advantages = (
            torch.where(batch.loss_mask, values, 0.0) for values in (
                log_probs, entropy, old_log_probs.detach(), batch.sampler_log_probs, batch.advantages))
        return cls(
            log_probs=log_probs, entropy=entropy, old_log_probs=old_log_probs, max_new_tokens=max_new_tokens,
            sampler_log_probs=sampler_log_probs, ref_log_probs=batch.ref_log_probs, full_kl=full_kl, advantages=advantages,
            loss_mask=batch.loss_mask, sequence_ids=batch.sequence_ids, sequence_lengths=batch.sequence_lengths,
            rewards=batch.rewards, group_ids=batch.group_ids, group_lengths=batch.group_lengths, token_index=batch.token_index,
            spans=list(zip(batch.owners, batch.lengths)), num_policy_tokens=batch.num_policy_tokens,
            num_sequences=batch.num_sequences, num_prompts=batch.num_prompts, old_sums=batch.old_sums, ref_sums=batch.ref_sums)


@dataclass
class StepTokens:
    """What a loss with a parameter `step` gets besides: the tokens of the whole optimizer step, for what must be chosen among all
    of them, whatever the micro-batch. It costs a forward pass more, before the update.

    [T']: the tokens of the GRPO step as they were packed; a micro-batch's are at `inputs.token_index`. Values of tokens that are
    not trained in this optimizer step mean nothing. No gradients."""

    log_probs: torch.Tensor  # [T'] fp32 nats, of the policy before this optimizer step
    entropy: torch.Tensor  # [T'] fp32 nats, likewise
    old_log_probs: torch.Tensor  # [T'] fp32 nats
    advantages: torch.Tensor  # [T'] fp32
    loss_mask: torch.Tensor  # [T'] bool, trained in this optimizer step
    num_tokens: int  # of them
    seed: int  # for random choices: of this optimizer step only


def average(inputs: LossInputs, objective: torch.Tensor, normalizer: str | float) -> torch.Tensor:
    """The scalar that a loss is minus of: the sum over a micro-batch's tokens by the step's normalizer.

    objective: [T], of any value where the mask is false. normalizer: of NORMALIZERS or a number of tokens, see above."""
    if normalizer not in NORMALIZERS if isinstance(normalizer, str) else not 0 < normalizer < math.inf:
        raise ConfigError(f"loss.normalizer = {normalizer!r}: must be one of {', '.join(NORMALIZERS)} (which is "
                          "rollout.max_new_tokens), or a positive number of tokens in its place")
    objective = torch.where(inputs.loss_mask, objective, 0.0)
    if normalizer == "token":
        return objective.sum() / inputs.num_policy_tokens
    if normalizer == "sequence":
        return (objective / inputs.sequence_lengths.clamp(min=1)[inputs.sequence_ids]).sum() / inputs.num_sequences
    if normalizer == "prompt":
        return (objective / inputs.group_lengths.clamp(min=1)[inputs.sequence_ids]).sum() / inputs.num_prompts
    length = inputs.max_new_tokens if normalizer == "constant" else normalizer
    return objective.sum() / (inputs.num_sequences * length)


def sequence_mean(inputs: LossInputs, values: torch.Tensor) -> torch.Tensor:
    """For each token the mean of `values` [T] over the trained tokens of its sequence. [T]"""
    parts = torch.where(inputs.loss_mask, values, 0.0).split([length for _, length in inputs.spans])
    totals: dict[int, torch.Tensor] = {}
    for (completion, _), part in zip(inputs.spans, parts):  # no index_add: on a GPU it adds in any order
        totals[completion] = totals[completion] + part.sum() if completion in totals else part.sum()
    sums = torch.cat([totals[completion].expand(length) for completion, length in inputs.spans])
    return sums / inputs.sequence_lengths.clamp(min=1)[inputs.sequence_ids]


# ---- the losses


def ppo(inputs: LossInputs, *, normalizer: str | float, clip_low: float, clip_high: float, max_ratio: float | None = None,
        dual_clip: float | None = None) -> Result:
    """PPO's clipped surrogate. max_ratio and dual_clip: null is off."""
    surrogate, stats = _clipped(inputs, _log_ratio(inputs), clip_low, clip_high, max_ratio=max_ratio, dual_clip=dual_clip)
    return -average(inputs, surrogate, normalizer), stats


def gspo(inputs: LossInputs, *, normalizer: str | float, clip_low: float, clip_high: float) -> Result:
    """PPO's surrogate with the ratio of the whole sequence, per token of it: the geometric mean of the tokens' ratios.

    Its value is that of the sequence, its gradient goes to each token by the token's own advantage (GSPO-token). Where all tokens
    of a sequence have one advantage, value and gradient are those of GSPO, arXiv 2507.18071, eq. 5."""
    own = _log_ratio(inputs)
    log_ratio = sequence_mean(inputs, own.detach()) + (own - own.detach())
    surrogate, stats = _clipped(inputs, log_ratio, clip_low, clip_high)
    return -average(inputs, surrogate, normalizer), stats


def cispo(inputs: LossInputs, *, normalizer: str | float, max_ratio: float, min_ratio: float = 0.0) -> Result:
    """REINFORCE by a detached ratio within [min_ratio, max_ratio], the bounds themselves: no token loses its gradient."""
    _check_cap(max_ratio)
    if not 0 <= min_ratio <= 1:
        raise ConfigError(f"loss.min_ratio = {min_ratio}: must lie in [0, 1]: it is the least ratio itself; 0 is off")
    ratio = _log_ratio(inputs).detach().exp()
    objective = ratio.clamp(min_ratio, max_ratio) * inputs.advantages * inputs.log_probs
    return -average(inputs, objective, normalizer), _ratio_stats(inputs) | {
        "clip_ratio/high": (inputs.loss_mask & (ratio > max_ratio)).sum()}


def sapo(inputs: LossInputs, *, normalizer: str | float, temperature_positive: float, temperature_negative: float) -> Result:
    """A soft gate in the place of the clip: at r = 1 the gradient is that of REINFORCE, and it falls to both sides."""
    if not (temperature_positive > 0 and temperature_negative > 0):
        raise ConfigError(f"loss.temperature_positive = {temperature_positive}, loss.temperature_negative = "
                          f"{temperature_negative}: must both be > 0 (the paper: 1.0 and 1.05)")
    ratio = _log_ratio(inputs).exp()
    temperature = _by_sign(inputs.advantages > 0, temperature_positive, temperature_negative, like=ratio)
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return -average(inputs, gate * inputs.advantages, normalizer), _ratio_stats(inputs)


def gmpo(inputs: LossInputs, *, normalizer: str | float, clip_low: float, clip_high: float) -> Result:
    """The geometric mean of a sequence's ratios, clipped token by token in nats: at most clip_high where A > 0, at least
    -clip_low where A < 0."""
    _check_bounds(clip_low, clip_high, math.inf, "the log-ratio is kept within [-clip_low, clip_high] nats, so both must be >= 0 "
                  "(the paper: 0.4)")
    own, advantages = _log_ratio(inputs), inputs.advantages
    clipped = torch.where(advantages > 0, own.clamp(max=clip_high), own.clamp(min=-clip_low))
    objective = sequence_mean(inputs, clipped).exp() * advantages
    with torch.no_grad():
        stats = _ratio_stats(inputs) | _clip_stats(inputs, own < -clip_low, own > clip_high)
    return -average(inputs, objective, normalizer), stats


def vespo(inputs: LossInputs, *, normalizer: str | float, k_positive: float, lambda_positive: float, k_negative: float,
          lambda_negative: float) -> Result:
    """REINFORCE by a detached weight that is 1 at w = 1, the ratio of the whole sequence, and falls to both sides."""
    for name, value in (("k_positive", k_positive), ("lambda_positive", lambda_positive), ("k_negative", k_negative),
                        ("lambda_negative", lambda_negative)):
        if not 0 <= value < math.inf:
            raise ConfigError(f"loss.{name} = {value}: must be >= 0, or the weight grows without bound (the paper: 2 and 3)")
    with torch.no_grad():
        total = sequence_mean(inputs, _log_ratio(inputs)) * inputs.sequence_lengths[inputs.sequence_ids]
        log_weight, is_positive = total.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), inputs.advantages >= 0
        power = _by_sign(is_positive, k_positive, k_negative, like=total)
        rate = _by_sign(is_positive, lambda_positive, lambda_negative, like=total)
        weight = (power * log_weight + rate * (1 - log_weight.exp())).exp()
    return -average(inputs, weight * inputs.advantages * inputs.log_probs, normalizer), _ratio_stats(inputs)


def dppo(inputs: LossInputs, *, normalizer: str | float, divergence: str, clip_low: float, clip_high: float,
         max_ratio: float) -> Result:
    """REINFORCE by a detached ratio to the sampler, without the tokens that A pushes further from it than the trust region.

    divergence: of the token against all others, "tv" |p - p_sampler| or "kl" (nats); clip_low and clip_high are the most of it
    below and above the sampler's probability."""
    if divergence not in ("tv", "kl"):
        raise ConfigError(f"loss.divergence = {divergence!r}: must be tv or kl")
    _check_bounds(clip_low, clip_high, math.inf, "must both be >= 0 (the paper: 0.2 for tv, 0.05 for kl)")
    _check_cap(max_ratio)
    advantages = inputs.advantages
    with torch.no_grad():
        ratio = (inputs.log_probs - inputs.sampler_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        new, old = inputs.log_probs.exp(), inputs.sampler_log_probs.exp()
        distance = (new - old).abs() if divergence == "tv" else _binary_kl(old, new)
        low, high = (new < old) & (distance > clip_low), (new > old) & (distance > clip_high)
        is_kept = ~torch.where(advantages > 0, high, low)
        stats = _ratio_stats(inputs) | _clip_stats(inputs, low, high)
    objective = is_kept * ratio.clamp(max=max_ratio) * advantages * inputs.log_probs
    return -average(inputs, objective, normalizer), stats


def _binary_kl(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """KL in nats between "this token" and "another one" under two probabilities of it."""
    tiny = 1e-8  # as large as a rounding error of 1 - p
    return old * ((old + tiny) / (new + tiny)).log() + (1 - old) * ((1 - old + tiny) / (1 - new + tiny)).log()


def reinforce(inputs: LossInputs, *, normalizer: str | float) -> Result:
    """A log pi: no ratio and no clip, so that only one update per batch is on policy."""
    return -average(inputs, inputs.advantages * inputs.log_probs, normalizer), _ratio_stats(inputs)


def dro(inputs: LossInputs, *, normalizer: str | float, beta: float) -> Result:
    """A log pi, with a quadratic penalty on the log-ratio in the place of a clip."""
    if not 0 < beta < math.inf:
        raise ConfigError(f"loss.beta = {beta}: must be > 0; 0.1 is usual")
    objective = inputs.advantages * inputs.log_probs - beta / 2 * _log_ratio(inputs).square()
    return -average(inputs, objective, normalizer), _ratio_stats(inputs)


def clip_cov(inputs: LossInputs, step: StepTokens, *, normalizer: str | float, clip_low: float, clip_high: float, share: float,
             cov_low: float, cov_high: float) -> Result:
    """PPO's surrogate without a random `share` of the step's tokens, drawn among those that are not clipped and whose covariance
    of advantage and log-prob lies between cov_low and cov_high."""
    _check_share(share)
    if not cov_low < cov_high:
        raise ConfigError(f"loss.cov_low = {cov_low}, loss.cov_high = {cov_high}: no token lies between them; cov_low must be "
                          "below cov_high (the paper: 1 and 5)")
    surrogate, stats = _clipped(inputs, _log_ratio(inputs), clip_low, clip_high)
    ratio = (step.log_probs - step.old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    is_clipped = ratio * step.advantages > ratio.clamp(1 - clip_low, 1 + clip_high) * step.advantages
    covariance = _covariance(step)
    candidates = step.loss_mask & ~is_clipped & (covariance > cov_low) & (covariance < cov_high)
    draws = torch.rand(len(candidates), generator=torch.Generator().manual_seed(step.seed)).to(candidates.device)
    is_dropped = _largest(torch.where(candidates, draws, -1.0), max(1, int(share * step.num_tokens))) & candidates
    is_dropped = is_dropped[inputs.token_index]
    stats["cov/chosen"] = (is_dropped & inputs.loss_mask).sum()
    return -average(inputs, torch.where(is_dropped, 0.0, surrogate), normalizer), stats


def kl_cov(inputs: LossInputs, step: StepTokens, *, normalizer: str | float, share: float, coefficient: float) -> Result:
    """r A, with a penalty on the log-ratio for the `share` of the step's tokens whose covariance of advantage and log-prob is
    largest."""
    _check_share(share)
    if not 0 <= coefficient < math.inf:
        raise ConfigError(f"loss.coefficient = {coefficient}: must be >= 0, or the ratio is driven away from 1; 1 is the paper's")
    chosen = _largest(torch.where(step.loss_mask, _covariance(step), -math.inf), max(1, int(share * step.num_tokens)))
    chosen, log_ratio = chosen[inputs.token_index], _log_ratio(inputs)
    objective = log_ratio.exp() * inputs.advantages - torch.where(chosen, coefficient * log_ratio.abs(), 0.0)
    return -average(inputs, objective, normalizer), _ratio_stats(inputs) | {"cov/chosen": (chosen & inputs.loss_mask).sum()}


# ---- what they share


def _log_ratio(inputs: LossInputs) -> torch.Tensor:
    """log pi - log pi_old. [T]"""
    return (inputs.log_probs - inputs.old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _by_sign(is_positive: torch.Tensor, positive: float, negative: float, *, like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, negative).masked_fill(is_positive, positive)


def _clipped(inputs: LossInputs, log_ratio: torch.Tensor, clip_low: float, clip_high: float, *, max_ratio: float | None = None,
             dual_clip: float | None = None) -> Result:
    """PPO's clipped surrogate for each token [T], zero where the mask is false; and its statistics."""
    _check_bounds(clip_low, clip_high, 1, "the ratio is kept within [1 - clip_low, 1 + clip_high], so 0 <= clip_low <= 1 and "
                  "clip_high >= 0 (DAPO: 0.2 and 0.28)")
    mask, advantages, ratio = inputs.loss_mask, inputs.advantages, log_ratio.exp()
    first = ratio
    if max_ratio is not None:
        if max_ratio <= 1 + clip_high:
            raise ConfigError(f"loss.max_ratio = {max_ratio}: must be > 1 + loss.clip_high = {1 + clip_high:g}; 4 is usual, null "
                              "is off")
        first = ratio.clamp(max=max_ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(first * advantages, clipped * advantages)
    if dual_clip is not None:
        if dual_clip <= 1:
            raise ConfigError(f"loss.dual_clip = {dual_clip}: must be > 1; 3 is usual, null is off")
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    with torch.no_grad():
        stats = _ratio_stats(inputs, log_ratio) | _clip_stats(inputs, ratio < 1 - clip_low, ratio > 1 + clip_high)
    return torch.where(mask, surrogate, 0.0), stats


@torch.no_grad()
def _clip_stats(inputs: LossInputs, low: torch.Tensor, high: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens on the wrong side of a bound that A pushes further."""
    mask, advantages = inputs.loss_mask, inputs.advantages
    return {"clip_ratio/low": (mask & (advantages < 0) & low).sum(), "clip_ratio/high": (mask & (advantages > 0) & high).sum()}


@torch.no_grad()
def _ratio_stats(inputs: LossInputs, log_ratio: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    log_ratio = _log_ratio(inputs) if log_ratio is None else log_ratio
    mask, ratio = inputs.loss_mask, log_ratio.exp()
    return {
        "approx_kl": torch.where(mask, _k3(log_ratio), 0.0).sum(),  # KL(pi_old || pi), estimated under pi_old
        "ratio/mean": torch.where(mask, ratio, 0.0).sum(),
        "ratio/max": torch.where(mask, ratio, 0.0).max()}


def _covariance(step: StepTokens) -> torch.Tensor:
    """(A - mean A) (log pi - mean log pi), the means over the step's trained tokens. [T']"""
    def centred(values: torch.Tensor) -> torch.Tensor:
        return values - torch.where(step.loss_mask, values, 0.0).sum() / step.num_tokens
    return centred(step.advantages) * centred(step.log_probs)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Whether a value is one of the `count` largest; of equal ones the first count. [T'] bool"""
    order = values.argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(values, dtype=torch.bool).index_fill(0, order, True)


def top_entropy(step: StepTokens, share: float) -> torch.Tensor:
    """1 for the `share` of the step's trained tokens with the largest entropy, those equal to the least of them too, else 0. [T']

    arXiv 2506.01939: what is below the quantile 1 - share of the whole batch has no policy gradient, but counts in averages."""
    entropy = torch.where(step.loss_mask, step.entropy, math.inf)  # what is not trained comes last
    rank = math.ceil((1 - share) * (step.num_tokens - 1) - 1e-9)  # of the least that is kept
    threshold = entropy.sort().values[rank]
    return (step.loss_mask & (step.entropy >= threshold)).to(step.entropy.dtype)


def _check_bounds(clip_low: float, clip_high: float, most: float, allowed: str) -> None:
    if not (0 <= clip_low <= most and clip_high >= 0):
        raise ConfigError(f"loss.clip_low = {clip_low}, loss.clip_high = {clip_high}: {allowed}")


def _check_cap(max_ratio: float) -> None:
    if not max_ratio >= 1:
        raise ConfigError(f"loss.max_ratio = {max_ratio}: must be >= 1: it is the largest ratio itself, not a distance to 1")


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigError(f"loss.share = {share}: must lie in (0, 1]; the paper takes 2e-4 of the tokens")


# ---- statistics


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
