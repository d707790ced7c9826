"""Rewards of a group of completions -> advantages.

Group relative advantages (GRPO, arXiv 2402.03300): the reward minus the mean of its group, optionally divided by the
group's standard deviation. Dr. GRPO (arXiv 2503.20783) leaves the division out, because it weighs nearly solved and
nearly unsolved prompts most. Groups are told apart by id, never by the prompt's text: two equal prompts are two groups.

Departures: the paper does not say which standard deviation; here it is that of a sample (n - 1 in the denominator, as
most trainers have it; sqrt(8/7) = 7% above the population's for 8 completions), plus STD_EPS.
"""
import math

STD_EPS = 1e-6  # in units of reward
ZERO_VARIANCE_TOLERANCE = 1e-9  # in units of reward; covers the rounding of equal sums of reward parts


def group_advantages(rewards: list[float], group_ids: list[int], *, normalize_std: bool) -> list[float]:
    """One advantage for each reward, in the same order.

    Rewards equal within ZERO_VARIANCE_TOLERANCE give exactly 0 to their whole group. Independent of the order of the
    completions. Raises ValueError for a group of one (its advantage would always be 0) and for a non-finite reward."""
    advantages = [0.0] * len(rewards)
    for group_id, rows in _groups(rewards, group_ids).items():
        values = [rewards[row] for row in rows]
        if len(values) < 2:
            raise ValueError(f"group {group_id} has one completion; its advantage is always 0: rollout.group_size must "
                             "be at least 2")
        if _is_constant(values):
            continue
        mean = math.fsum(values) / len(values)
        scale = 1.0
        if normalize_std:
            variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
            scale = 1.0 / (math.sqrt(variance) + STD_EPS)
        for row, value in zip(rows, values):
            advantages[row] = (value - mean) * scale
    return advantages


def zero_variance_groups(rewards: list[float], group_ids: list[int]) -> list[int]:
    """Ids of the groups whose largest and smallest reward differ by at most ZERO_VARIANCE_TOLERANCE, in order of
    appearance: they carry no gradient. Works for any reward, not only 0 and 1."""
    return [group_id for group_id, rows in _groups(rewards, group_ids).items()
            if _is_constant([rewards[row] for row in rows])]


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
