"""Losses and advantages against numbers that TRL 1.16 and verl 0.9.1 gave for the same tensors, in float64, gradients included.

Where they differ from ours by intent:
  TRL: STD_EPS is 1e-4 (ours 1e-6); GMPO gives completions without a trained token the ratio 1, which moves the value by a
       constant; a KL penalty's weight pi / pi_old has a gradient (k3's then is k2's: compared with our k2); bnpo counts a
       micro-batch only; its RLOO trainer clips the product of a sequence's ratios (ours is REINFORCE: the same on policy).
  verl: dual clip is always on; CISPO's bounds are 1 -+ epsilon (ours: a cap, the paper's); GPG's alpha counts rewards that are
       not 0; DPPO's anchor is old_log_prob (ours is the sampler); whitening has an epsilon of 1e-8 in the root.
"""
from functools import partial

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from grpo.advantages import STD_EPS, component_advantages, group_advantages, whitened
from grpo.configuration.algorithm import EntropyConfig
from grpo.entropy import EntropyBonus, entropy_loss
from grpo.kl import kl_penalty
from grpo.losses import (
    LossInputs,
    StepTokens,
    cispo,
    clip_cov,
    dppo,
    dro,
    gmpo,
    gspo,
    kl_cov,
    ppo,
    reinforce,
    sapo,
    top_entropy,
    vespo,
)

LENGTH = 24  # TRL's max_completion_length; verl's loss_scale_factor is 32
DAPO = partial(ppo, normalizer="token", clip_low=0.2, clip_high=0.28)
GRPO = partial(ppo, normalizer="sequence", clip_low=0.2, clip_high=0.28)
DUAL = partial(ppo, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
GSPO = partial(gspo, clip_low=3e-4, clip_high=4e-4)
SAPO = partial(sapo, normalizer="sequence", temperature_positive=1.0, temperature_negative=1.05)
VESPO = partial(vespo, normalizer="token", k_positive=2.0, lambda_positive=3.0, k_negative=3.0, lambda_negative=2.0)
ALL, TOOL, BY_TOKEN = {"mask": "all"}, {"mask": "no_truncated_tool"}, {"advantages": "advantages_token"}
ON_POLICY, AT_OLD = {"old": "log_probs"}, {"sampler": "old_log_probs"}

CASES = [
    ("trl.grpo_all", partial(ppo, normalizer="sequence", clip_low=0.2, clip_high=0.2), ALL),
    ("trl.grpo_trunc", GRPO, {}), ("trl.bnpo_trunc", DAPO, {}),
    ("trl.dr_grpo_trunc", partial(ppo, normalizer="constant", clip_low=0.2, clip_high=0.28), {}),
    ("trl.dapo_trunc", DAPO, {}), ("trl.dapo_on_policy", DAPO, ON_POLICY),
    ("trl.cispo_cap", partial(cispo, normalizer="token", max_ratio=5.0), {}),
    ("verl.cispo.tokmean.global", partial(cispo, normalizer="token", min_ratio=0.8, max_ratio=1.2), {}),
    ("trl.sapo", SAPO, {}), ("trl.vespo", VESPO, {}), ("trl.gspo", partial(GSPO, normalizer="sequence"), {}),
    ("trl.luspo_seq", partial(gspo, normalizer=1, clip_low=0.2, clip_high=0.28), {}),
    ("trl.luspo_token", partial(ppo, normalizer=1, clip_low=0.2, clip_high=0.28), {}),
    ("trl.delta_grpo", partial(GRPO, max_ratio=4.0), {}),
    ("trl.tool_mask_grpo", GRPO, TOOL), ("trl.per_token_adv_dapo", DAPO, BY_TOKEN),
    ("trl.gspo_dapo_agg", partial(GSPO, normalizer="token"), {}),
    ("verl.vanilla.tokmean.global", partial(DUAL, normalizer="token"), {}),
    ("verl.vanilla.sm-toksum.global", partial(DUAL, normalizer=1), {}),
    ("verl.vanilla.sm-tokmean.global", partial(DUAL, normalizer="sequence"), {}),
    ("verl.vanilla.sm-toksum-norm.global", partial(DUAL, normalizer=32), {}),
    ("verl.gspo.tokmean.global", partial(GSPO, normalizer="token"), {}), ("verl.sapo.sm-tokmean.global", SAPO, {}),
    ("verl.gpg.tokmean.global", partial(reinforce, normalizer="token"), {}),
    ("verl.gpg.tool_tokadv", partial(reinforce, normalizer="token"), TOOL | BY_TOKEN),
    ("verl.clip_cov.tokmean.global",
     partial(clip_cov, normalizer="token", clip_low=0.2, clip_high=0.28, share=1.0, cov_low=0.3, cov_high=5.0), {}),
    ("verl.kl_cov.tokmean.global", partial(kl_cov, normalizer="token", share=0.05, coefficient=0.1), {}),
    ("verl.geo_mean.tokmean.local_all", partial(gmpo, normalizer="sequence", clip_low=0.4, clip_high=0.4), ALL),
    ("verl.dppo_tv.tokmean.global",
     partial(dppo, normalizer="token", divergence="tv", clip_low=0.2, clip_high=0.2, max_ratio=3.0), AT_OLD),
    ("verl.dppo_kl.tokmean.global",
     partial(dppo, normalizer="token", divergence="kl", clip_low=0.05, clip_high=0.05, max_ratio=3.0), AT_OLD),
    ("verl.dro.tokmean.global", partial(dro, normalizer="token", beta=0.1), {}),
    ("verl.dro.sm-toksum.global", partial(dro, normalizer=1, beta=0.1), {}),
]


@pytest.fixture(scope="module")
def golden():
    return load_file(FIXTURES / "losses/losses.safetensors")


def inputs_of(golden, *, mask="no_truncated", old="old_log_probs", sampler="old_log_probs",
              advantages="advantages") -> tuple[LossInputs, StepTokens]:
    lengths, mask = golden["cu_seqlens"].diff(), golden[f"mask.{mask}"].bool()
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    trained = torch.zeros_like(lengths).index_add_(0, ids, mask.long())
    log_probs, entropy = (golden[name].clone().requires_grad_() for name in ("log_probs", "entropies"))
    inputs = LossInputs(
        log_probs=log_probs, entropy=entropy, old_log_probs=golden[old], sampler_log_probs=golden[sampler],
        ref_log_probs=golden["ref_log_probs"], full_kl=None, advantages=golden[advantages], loss_mask=mask, sequence_ids=ids,
        sequence_lengths=trained, rewards=golden["rewards"], group_ids=golden["group_ids"],
        group_lengths=torch.zeros(6, dtype=torch.int64).index_add_(0, golden["group_ids"], trained)[golden["group_ids"]],
        token_index=torch.arange(len(mask)), spans=list(enumerate(lengths.tolist())), num_policy_tokens=int(mask.sum()),
        num_sequences=len(lengths), num_prompts=6, max_new_tokens=LENGTH)
    return inputs, StepTokens(log_probs.detach(), entropy.detach(), golden[old], golden[advantages], mask, int(mask.sum()), 0)


def assert_is(golden, case, loss, log_probs, *, offset=0.0):
    (gradient,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
    assert golden[f"{case}.grad"].abs().max() > 1e-4
    assert loss.item() + offset == pytest.approx(golden[f"{case}.loss"].item(), abs=1e-6)
    torch.testing.assert_close(gradient, golden[f"{case}.grad"], rtol=1e-6, atol=2e-8)


@pytest.mark.parametrize("case, loss_fn, settings", CASES, ids=[case for case, _, _ in CASES])
def test_values_and_gradients_are_those_of_trl_and_verl(golden, case, loss_fn, settings):
    inputs, step = inputs_of(golden, **settings)
    takes_step = loss_fn.func in (clip_cov, kl_cov)
    loss, _ = loss_fn(inputs, step=step) if takes_step else loss_fn(inputs)
    assert_is(golden, case, loss, inputs.log_probs)


def test_gmpo_is_trl_s_but_for_the_constant_of_completions_without_a_token(golden):
    inputs, _ = inputs_of(golden)
    loss, _ = gmpo(inputs, normalizer="sequence", clip_low=0.4, clip_high=0.4)
    gone = golden["advantages_seq"][inputs.sequence_lengths == 0]
    assert len(gone) == 4
    assert_is(golden, "trl.gmpo", loss, inputs.log_probs, offset=-gone.sum().item() / 24)


def test_only_the_tokens_of_largest_entropy_are_those_of_trl(golden):
    inputs, step = inputs_of(golden)
    inputs.advantages = inputs.advantages * top_entropy(step, 0.2)
    assert_is(golden, "trl.entropy_quantile_dapo", DAPO(inputs)[0], inputs.log_probs)


def test_the_entropy_bonus_is_trl_s(golden):
    inputs, _ = inputs_of(golden)
    loss = DAPO(inputs)[0] + entropy_loss(inputs, EntropyBonus.of(EntropyConfig(0.01)).coefficient)
    assert_is(golden, "trl.entropy_bonus", loss, inputs.log_probs)
    (gradient,) = torch.autograd.grad(loss, inputs.entropy)
    torch.testing.assert_close(gradient, golden["trl.entropy_bonus.grad_entropy"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("estimator, case", [("k3", "trl.kl_on_policy_bias_false"), ("k2", "trl.kl_on_policy_bias_true")])
def test_a_kl_penalty_on_policy_has_trl_s_gradient(golden, estimator, case):
    inputs, _ = inputs_of(golden, old="log_probs", sampler="log_probs")
    penalty, _ = kl_penalty(inputs, coefficient=0.04, estimator=estimator)
    loss = partial(ppo, normalizer="token", clip_low=0.2, clip_high=0.2)(inputs)[0] + penalty
    (gradient,) = torch.autograd.grad(loss, inputs.log_probs, retain_graph=True)
    torch.testing.assert_close(gradient, golden[f"{case}.grad"], rtol=1e-6, atol=1e-9)
    if estimator == "k3":
        assert loss.item() == pytest.approx(golden[f"{case}.loss"].item(), abs=1e-9)


# ---- advantages; verl's are per token and 0 where the mask is


def of_rewards(golden, **settings):
    return group_advantages(golden["rewards"].tolist(), golden["group_ids"].tolist(), **settings)


def by_token(golden, values, mask):
    inputs, _ = inputs_of(golden, mask=mask)
    return torch.tensor(values, dtype=torch.float64)[inputs.sequence_ids] * inputs.loss_mask


@pytest.mark.parametrize("case, scale, tolerance", [("group", "group", 3e-4), ("batch", "batch", 3e-4), ("none", "none", 1e-12)])
def test_advantages_are_trl_s_up_to_the_epsilon_of_the_deviation(golden, case, scale, tolerance):
    own, theirs = of_rewards(golden, baseline="group", scale=scale), golden[f"trl.adv_scale_{case}.advantages_seq"]
    is_usual = golden["group_ids"] != 3  # the rewards of group 3 are so near that 1e-4 counts
    torch.testing.assert_close(torch.tensor(own, dtype=torch.float64)[is_usual], theirs[is_usual], rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("case, mask, settings", [
    ("grpo", "no_truncated", dict(baseline="group", scale="group")),
    ("grpo_nostd", "no_truncated", dict(baseline="group", scale="none")),
    ("rloo_contig_all", "all", dict(baseline="leave_one_out", scale="none")),
    ("opo", "no_truncated", dict(baseline="length_weighted", scale="none")),
    ("passk_nostd", "no_truncated", dict(baseline="best_of_others", scale="none")),
    ("passk_std", "no_truncated", dict(baseline="best_of_others", scale="group")),
    ("remax", "no_truncated", dict(baseline="greedy", scale="none"))])
def test_advantages_are_verl_s(golden, case, mask, settings):
    lengths = inputs_of(golden, mask=mask)[0].sequence_lengths.tolist()
    if settings["baseline"] == "greedy":  # verl has one for each completion: one group of two each, twice the same
        doubled = [reward for reward in golden["rewards"].tolist() for _ in range(2)]
        ids = [row for row in range(24) for _ in range(2)]
        own = group_advantages(doubled, ids, **settings, greedy_rewards=dict(enumerate(golden["greedy_rewards"].tolist())))[::2]
    else:
        own = of_rewards(golden, lengths=lengths, **settings)
    expected = golden[f"verl.adv.{case}.advantages"]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(by_token(golden, own, mask), expected, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("case, mask, baseline", [
    ("rpp_gamma1_outcome", "all", "none"), ("rpp_baseline", "no_truncated", "group")])
def test_whitened_advantages_are_verl_s(golden, case, mask, baseline):
    own = by_token(golden, of_rewards(golden, baseline=baseline, scale="none"), mask)
    own = whitened(own, golden[f"mask.{mask}"].bool())
    torch.testing.assert_close(own, golden[f"verl.adv.{case}.advantages"], rtol=2e-6, atol=1e-7)


def test_advantages_of_components_are_trl_s(golden):
    names, usual = ("a", "b", "c"), golden["group_ids"] != 3
    parts = [dict(zip(names, row)) for row in golden["rewards_multi"].tolist()]
    ids = golden["group_ids"].tolist()
    total = component_advantages(parts, partial(group_advantages, group_ids=ids, baseline="group", scale="group"),
                                 weights=dict(zip(names, (1.0, 0.5, 2.0))))
    own = whitened(torch.tensor(total, dtype=torch.float64), torch.ones(24, dtype=torch.bool))
    # their 1e-4 in the deviations of group 3 moves its sum, and by that the whitening of all
    torch.testing.assert_close(own[usual], golden["trl.adv_norm_then_sum.advantages_seq"][usual], rtol=0.02, atol=0.02)
    assert STD_EPS < 1e-4
