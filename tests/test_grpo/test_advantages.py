"""Group advantages against numbers worked out by hand."""
from __future__ import annotations

import math

import pytest

from grpo.advantages import group_advantages, zero_variance_groups


def test_advantage_is_the_reward_minus_the_mean_of_its_group():
    # groups 7: mean 0.5; 3: mean 4
    advantages = group_advantages([1.0, 3.0, 0.0, 5.0], [7, 3, 7, 3], baseline="group", scale="none")
    assert advantages == [0.5, -1.0, -0.5, 1.0]


def test_one_winner_of_four_by_sample_standard_deviation():
    # mean 1/4, deviations 3/4 and -1/4, sum of squares 12/16, sample variance 1/4, std 1/2
    advantages = group_advantages([1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0], baseline="group", scale="group")
    assert advantages == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=5e-6)
    assert advantages[0] == pytest.approx(0.75 / (0.5 + 1e-6), rel=1e-14)


def test_zero_variance_groups_get_exactly_zero_and_are_found_by_their_range():
    # 0.1 + 0.2 and 0.3 differ in the last bit only; a mean strictly between 0 and 1 does not make a group informative
    rewards, ids = [0.1 + 0.2, 0.3, 0.4, 0.6, 1.0, 1.0], [5, 5, 2, 2, 9, 9]
    assert rewards[0] != rewards[1]
    assert zero_variance_groups(rewards, ids) == [5, 9]
    advantages = group_advantages(rewards, ids, baseline="group", scale="group")
    assert advantages[:2] == [0.0, 0.0] and advantages[4:] == [0.0, 0.0]
    assert advantages[2] == pytest.approx(-math.sqrt(0.5), rel=1e-5) and advantages[3] == -advantages[2]


def test_advantages_do_not_depend_on_the_order_of_completions():
    rewards, ids = [0.1, 0.7, 0.3, 1.1, 0.9, 0.2], [0, 0, 1, 0, 1, 1]
    forward = group_advantages(rewards, ids, baseline="group", scale="group")
    order = [4, 0, 5, 3, 2, 1]
    shuffled = group_advantages([rewards[i] for i in order], [ids[i] for i in order], baseline="group", scale="group")
    assert shuffled == [forward[i] for i in order]


@pytest.mark.parametrize("rewards, ids, message", [
    ([1.0, 0.0, 0.5], [0, 0, 1], "group 1 has one completion"),
    ([1.0, float("nan")], [0, 0], "completion 1 .* nan"),
    ([1.0, float("inf")], [0, 0], "completion 1 .* inf"),
    ([1.0], [0, 0], "1 rewards but 2 group ids"),
])
def test_unusable_rewards_are_refused(rewards, ids, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, ids, baseline="group", scale="none")
