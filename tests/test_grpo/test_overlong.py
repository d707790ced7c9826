"""DAPO's soft punishment of length, and that it counts before groups are compared."""

import pytest
from test_groups import config, live_ids, run

from grpo.overlong import soft_overlong_punishment


@pytest.mark.parametrize("length, expected", [
    (1, 0.0), (16384, 0.0), (18432, -0.5), (19456, -0.75), (20480, -1.0), (30000, -1.0)])
def test_it_falls_linearly_over_the_buffer(length, expected):
    assert soft_overlong_punishment(length, max_len=20480, buffer=4096) == expected


def test_equally_rewarded_completions_of_different_lengths_are_a_live_group():
    # of 5 tokens at most: a completion of 1 token lies before the buffer of 4 tokens, one of 2 is a quarter into it
    groups, _ = run({0: [1.0, 1.0], 1: [0.0, 1.0]}, prompts=2, refill=0, overlong=4, penalty=2.0)
    assert live_ids(groups) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert groups.advantages == [0.25, -0.25, -0.25, 0.25]
    assert groups.metrics["reward"] == 0.75  # the environment's
    assert groups.metrics["reward/overlong"] == -0.25
    assert [verdict.reward for _, verdict in groups.scored] == [1.0, 1.0, 0.0, 1.0]


def test_without_a_buffer_nothing_is_punished():
    groups, _ = run({0: [1.0, 1.0], 1: [0.0, 1.0]}, prompts=2, refill=0)
    assert live_ids(groups) == [(1, 0), (1, 1)] and "reward/overlong" not in groups.metrics
    assert config().rollout.overlong_buffer is None
