"""Group advantages against numbers worked out by hand."""
from __future__ import annotations

import itertools
import math

import pytest
import torch

from grpo.advantages import component_advantages, group_advantages, pass_at_k, whitened, zero_variance_groups
from grpo.config import ConfigError
from grpo.configuration.launch import load_config


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


@pytest.mark.parametrize("baseline, scale, more, expected", [
    ("leave_one_out", "none", {}, [5 - 2.0, 1 - 4.0, 3 - 3.0]),
    ("length_weighted", "none", {"lengths": [1, 2, 1]}, [2.5, -1.5, 0.5]),  # (5 + 2 + 3) / 4
    ("group", "mean", {}, [2 / 3, -2 / 3, 0.0]), ("none", "none", {}, [5.0, 1.0, 3.0]),
    ("greedy", "none", {"greedy_rewards": {7: 4.0}}, [1.0, -3.0, -1.0]),
    ("best_of_others", "none", {}, [2.0, 0.0, 0.0]),  # best minus second best
    # best of two: 5 against 1 and 3, 3 against 1
    ("best_of_others", "none", {"k": 2}, [(4 + 2) / 2, 0.0, 2 / 2])])
def test_baselines_by_hand(baseline, scale, more, expected):
    assert group_advantages([5.0, 1.0, 3.0], [7, 7, 7], baseline=baseline, scale=scale, **more) == pytest.approx(expected)


def test_the_step_s_deviation_scales_all_groups_alike():
    own = group_advantages([0.0, 2.0, 5.0, 5.0, 4.0, 2.0], [0, 0, 1, 1, 2, 2], baseline="group", scale="batch")
    # mean 3, squares 9 + 1 + 4 + 4 + 1 + 1 = 20, / 5 = 4
    assert own == pytest.approx([-0.5, 0.5, 0.0, 0.0, 0.5, -0.5], rel=1e-5)


@pytest.mark.parametrize("baseline, scale", [("none", "group"), ("greedy", "group"), ("none", "batch"), ("greedy", "batch")])
def test_no_spread_to_divide_by_gives_no_advantage_where_the_baseline_is_not_the_group_s(baseline, scale):
    own = group_advantages([1.0] * 4, [0, 0, 1, 1], baseline=baseline, scale=scale, greedy_rewards={0: 0.0, 1: 1.0})
    assert own == [0.0] * 4  # and not 1 / STD_EPS


def test_a_mean_reward_that_is_not_positive_gives_no_advantage():
    assert group_advantages([1.0, -1.0, -2.0, 0.5], [0, 0, 1, 1], baseline="group", scale="mean") == [0.0] * 4


def test_whitening_is_over_the_masked_tokens():
    own = whitened(torch.tensor([1.0, 9.0, 3.0, 5.0]), torch.tensor([True, False, True, True]))
    torch.testing.assert_close(own, torch.tensor([-1.0, 0.0, 0.0, 1.0]), rtol=1e-5, atol=1e-6)  # mean 3, deviation 2


def test_components_are_added_up_by_weight_and_a_missing_one_is_named():
    parts = [{"right": 1.0, "short": 0.0}, {"right": 0.0, "short": 8.0}]

    def of_rewards(rewards):
        return group_advantages(rewards, [0, 0], baseline="group", scale="none")

    assert component_advantages(parts, of_rewards, weights={}) == [0.5 - 4.0, -0.5 + 4.0]
    assert component_advantages(parts, of_rewards, weights={"right": 2.0}) == [1.0, -1.0]
    with pytest.raises(ValueError, match="has no part 'rigt'; it has: right, short"):
        component_advantages(parts, of_rewards, weights={"rigt": 1.0})


@pytest.mark.parametrize("k", [2, 3])
def test_pass_at_k_has_the_gradient_of_the_best_of_k(k):
    """Over all groups of four draws from four outcomes: k/4 sum A grad log p has the expectation grad E[best of k]."""
    rewards = [0.0, 1.0, 0.3, 1.0]
    logits = torch.tensor([0.2, -0.4, 0.6, -1.0], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    best = sum(log_p[list(draw)].sum().exp() * max(rewards[x] for x in draw) for draw in itertools.product(range(4), repeat=k))
    (exact,) = torch.autograd.grad(best, logits, retain_graph=True)
    surrogate = 0.0
    for draw in itertools.product(range(4), repeat=4):
        advantages = pass_at_k([rewards[x] for x in draw], k=k)
        weight = log_p[list(draw)].sum().exp().detach()
        surrogate = surrogate + weight * k / 4 * sum(a * log_p[x] for a, x in zip(advantages, draw))
    (expected,) = torch.autograd.grad(surrogate, logits)
    assert exact.abs().max() > 0.02
    torch.testing.assert_close(expected, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("baseline, factor", [
    ("group", 2 / 3), ("leave_one_out", 1.0), ("none", 1.0), ("greedy", 1.0), ("length_weighted", None)])
def test_the_expected_gradient_is_that_of_the_expected_reward(baseline, factor):
    """Over all groups of three draws: the group's mean shrinks it by (G - 1) / G, a baseline weighted by lengths is biased, all
    others give it as it is."""
    rewards, lengths = [0.0, 1.0, 0.3, -0.5], [1, 4, 2, 3]
    logits = torch.tensor([0.2, -0.4, 0.6, -1.0], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_p.exp() * log_p.new_tensor(rewards)).sum(), logits, retain_graph=True)
    surrogate = 0.0
    for draw in itertools.product(range(4), repeat=3):
        advantages = group_advantages([rewards[x] for x in draw], [0] * 3, baseline=baseline, scale="none",
                                      lengths=[lengths[x] for x in draw], greedy_rewards={0: 0.3})
        surrogate = surrogate + log_p[list(draw)].sum().exp().detach() * sum(a * log_p[x] for a, x in zip(advantages, draw)) / 3
    (expected,) = torch.autograd.grad(surrogate, logits)
    if factor is not None:
        torch.testing.assert_close(expected, factor * exact, rtol=1e-10, atol=1e-12)
    else:
        assert (expected - exact).norm() > 0.01 * exact.norm()
        assert torch.cosine_similarity(expected, exact, dim=0) > 0.9


@pytest.mark.parametrize("words, key", [
    (["advantage.k=3"], "advantage.k"), (["loss=pass_at_k", "advantage.k=17"], "advantage.k"),
    (["kl.coefficient=0.1", "kl.place=reward", "optim.mask_truncated=true"], "kl.place"),
    (["kl.coefficient=0.1", "kl.place=reward", "advantage.components={}"], "kl.place"),
    (["kl.coefficient=0.1", "kl.place=reward_to_go"], "kl.place"),
    (["loss=rloo", "kl.coefficient=0.1", "kl.place=reward_to_go", "advantage.whiten=sequences"], "kl.place"),
    (["loss=pass_at_k", "kl.coefficient=0.1", "kl.place=reward_to_go"], "kl.place"),
    (["loss=max_rl", "kl.coefficient=0.1", "kl.place=reward"], "kl.place"),
    (["loss=dppo_tv", "corrections.weight=truncate"], "corrections.weight")])
def test_settings_that_contradict_each_other_are_refused(words, key):
    with pytest.raises(ConfigError, match=rf"(?m)^{key} = "):
        load_config("train", ["name=x", *words])


@pytest.mark.parametrize("words", [
    ["loss=reinforce_plus_plus", "kl.coefficient=0.1"], ["loss=rloo", "kl.coefficient=0.1", "kl.place=reward_to_go"],
    ["loss=max_rl", "kl.coefficient=0.1"], ["loss=dppo_kl", "corrections.opsm_delta=0.1", "corrections.max_k3=0.1"]])
def test_their_neighbours_are_not(words):
    load_config("train", ["name=x", "+experiment=smoke", *words])
