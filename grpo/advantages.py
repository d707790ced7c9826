"""Rewards of a group of completions -> advantages.

A = (R - baseline) / scale, as grpo/configuration/algorithm.py names both. With R_1..R_G the rewards of a group, mu their mean:
    group, group            (R_i - mu) / std      GRPO, arXiv 2402.03300; weighs nearly (un)solved prompts most
    group, none             R_i - mu              Dr. GRPO, arXiv 2503.20783; GPG, arXiv 2504.02546
    group, batch            (R_i - mu) / std of all rewards of the step                       arXiv 2508.08221
    group, mean             (R_i - mu) / mu       MaxRL, arXiv 2602.02710; 0 where mu is not positive
    leave_one_out, none     R_i - mean of the others' rewards = G / (G - 1) (R_i - mu)        RLOO, arXiv 2402.14740
    length_weighted, none   R_i - sum_j l_j R_j / sum_j l_j, l_j trained tokens               OPO, arXiv 2505.23585
    greedy, none            R_i - reward of the greedy completion                            ReMax, arXiv 2310.10505
    none, none              R_i                   REINFORCE; whitened over the step's tokens REINFORCE++, arXiv 2501.03262
    best_of_others, none    see `pass_at_k`       arXiv 2503.19595
Components (GDPO, arXiv 2601.05242): each part of the reward gets an advantage of its own, the weighted sum of which counts.
Groups are told apart by id, never by the prompt's text: two equal prompts are two groups.

Departures: the papers do not say which standard deviation; here it is that of a sample (n - 1 in the denominator, as most
trainers have it; sqrt(8/7) = 7% above the population's for 8 completions), plus STD_EPS. GPG's factor, completions / completions
of groups with a spread, is left out: groups without spread are dropped before, and losses count only what is left.
"""
import math
from collections.abc import Callable

import torch

from grpo.configuration.algorithm import Baseline, Scale

STD_EPS = 1e-6  # in units of reward
ZERO_VARIANCE_TOLERANCE = 1e-9  # in units of reward; covers the rounding of equal sums of reward parts
OF_THE_GROUP = (Baseline.group, Baseline.leave_one_out, Baseline.length_weighted, Baseline.best_of_others)


def group_advantages(rewards: list[float], group_ids: list[int], *, baseline: str, scale: str, k: int | None = None,
                     lengths: list[int] | None = None, greedy_rewards: dict[int, float] | None = None) -> list[float]:
    """One advantage for each reward, in the same order.

    baseline, scale: of Baseline and Scale. k: of best_of_others; None is the size of the group. lengths: trained tokens of each
    completion, for length_weighted. greedy_rewards: by group id, for greedy. With a baseline of the group, rewards equal within
    ZERO_VARIANCE_TOLERANCE give exactly 0 to their whole group; with any other, so does a standard deviation that is as small
    (it would make a million of a reward of 1). Independent of the order of the completions. Raises ValueError for a group of one
    (its advantage would always be 0) and for a non-finite reward."""
    advantages = [0.0] * len(rewards)
    batch_std = _std(rewards) if scale == Scale.batch and len(rewards) > 1 else 0.0
    for group_id, rows in _groups(rewards, group_ids).items():
        values = [rewards[row] for row in rows]
        if len(values) < 2:
            raise ValueError(f"group {group_id} has one completion; its advantage is always 0: rollout.group_size must "
                             "be at least 2")
        if baseline in OF_THE_GROUP and _is_constant(values):
            continue
        mean = math.fsum(values) / len(values)
        if baseline == Baseline.best_of_others:
            differences = pass_at_k(values, k=min(k or len(values), len(values)))
        else:
            own_lengths = [lengths[row] for row in rows] if lengths is not None else []
            greedy = (greedy_rewards or {}).get(group_id, math.nan)
            differences = [value - _baseline(baseline, values, i, mean, own_lengths, greedy) for i, value in enumerate(values)]
        factor = 1.0
        if scale in (Scale.group, Scale.batch):
            std = _std(values) if scale == Scale.group else batch_std
            factor = 1.0 / (std + STD_EPS) if std > ZERO_VARIANCE_TOLERANCE else 0.0
        elif scale == Scale.mean:
            factor = 1.0 / mean if mean > ZERO_VARIANCE_TOLERANCE else 0.0
        for row, difference in zip(rows, differences):
            advantages[row] = difference * factor
    return advantages


def _baseline(baseline: str, values: list[float], i: int, mean: float, lengths: list[int], greedy: float) -> float:
    if baseline == Baseline.group:
        return mean
    if baseline == Baseline.leave_one_out:
        return math.fsum(values[:i] + values[i + 1:]) / (len(values) - 1)
    if baseline == Baseline.length_weighted:
        total = sum(lengths)
        return math.fsum(length * value for length, value in zip(lengths, values)) / total if total else mean
    if baseline == Baseline.greedy:
        return greedy
    assert baseline == Baseline.none, baseline
    return 0.0


def pass_at_k(values: list[float], *, k: int) -> list[float]:
    """For each reward of a group of n, the mean over the sets S of k - 1 of the others of max(S and it) - max(S), 0 or more.

    k/n times the sum of these, each with grad log pi of its completion, is an unbiased estimate of the gradient of E[best of k]:
    pass@k where rewards are 0 and 1. With k = n (arXiv 2503.19595) only the best completion has one: best minus second best."""
    count = len(values)
    if not 2 <= k <= count:
        raise ValueError(f"advantage.k = {k}: must be at least 2 and at most the size of a group, here {count}")
    result = []
    for i, value in enumerate(values):
        others = sorted(values[:i] + values[i + 1:])
        # math.comb(rank, k - 2) of the sets have the other of this rank as their largest
        gains = [math.comb(rank, k - 2) * (value - other) for rank, other in enumerate(others) if other < value]
        result.append(math.fsum(gains) / math.comb(count - 1, k - 1))
    return result


def component_advantages(parts: list[dict[str, float]], of_rewards: Callable[[list[float]], list[float]], *,
                         weights: dict[str, float]) -> list[float]:
    """Weighted sum of the advantages of each part. of_rewards: their `group_advantages`. weights: of the parts that count; {}:
    all of them, 1 each.

    Raises ValueError for a part that a completion lacks."""
    weights = weights or {name: 1.0 for name in parts[0]} if parts else weights
    if parts and not weights:
        raise ValueError("advantage.components: the environment's rewards have no parts; set advantage.components=null")
    total = [0.0] * len(parts)
    for name, weight in weights.items():
        lacking = next((part for part in parts if name not in part), None)
        if lacking is not None:
            raise ValueError(f"advantage.components: a completion's reward has no part {name!r}; it has: "
                             f"{', '.join(lacking) or 'none'}")
        own = of_rewards([part[name] for part in parts])
        total = [before + weight * advantage for before, advantage in zip(total, own)]
    return total


def whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values where mask is true with mean 0 and (sample) standard deviation 1, up to STD_EPS; 0 elsewhere. values: [T] fp32."""
    count = mask.sum()
    masked = torch.where(mask, values, 0.0).double()  # a sum over 1e6 tokens in fp32 loses digits
    mean = masked.sum() / count
    centred = torch.where(mask, masked - mean, 0.0)
    std = (centred.square().sum() / (count - 1).clamp(min=1)).sqrt()
    return (centred / (std + STD_EPS)).to(values.dtype)


def zero_variance_groups(rewards: list[float], group_ids: list[int]) -> list[int]:
    """Ids of the groups whose largest and smallest reward differ by at most ZERO_VARIANCE_TOLERANCE, in order of
    appearance: they carry no gradient. Works for any reward, not only 0 and 1."""
    return [group_id for group_id, rows in _groups(rewards, group_ids).items()
            if _is_constant([rewards[row] for row in rows])]


def _std(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _groups(rewards: list[float], group_ids: list[int]) -> dict[int, list[int]]:
    """Group id -> rows."""
    if len(rewards) != len(group_ids):
        raise ValueError(f"{len(rewards)} rewards but {len(group_ids)} group ids")
    groups: dict[int, list[int]] = {}
    for row, group_id in enumerate(group_ids):
        if not math.isfinite(rewards[row]):
            raise ValueError(f"reward of completion {row} (group {group_id}) is {rewards[row]}: rewards must be finite")
        groups.setdefault(group_id, []).append(row)
    return groups


def _is_constant(values: list[float]) -> bool:
    return max(values) - min(values) <= ZERO_VARIANCE_TOLERANCE
