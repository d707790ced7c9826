"""Losses and KL against numbers worked out by hand and against exact expectations over a small vocabulary."""
from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from grpo.batch import Completion, Prompt, Segment, micro_batches, pack
from grpo.config import ConfigError
from grpo.kl import kl_penalty
from grpo.loss_contract import try_loss
from grpo.losses import LossInputs, ppo, reduce_stats, token_stats

CLIP = dict(clip_low=0.2, clip_high=0.28)
dapo, grpo = (partial(ppo, normalizer=normalizer) for normalizer in ("token", "sequence"))
LOSSES = {name: partial(ppo, normalizer=normalizer, **CLIP)
          for name, normalizer in {"grpo": "sequence", "dr_grpo": "constant", "dapo": "token"}.items()}

# Two completions. The ratios of the first (advantage 1): 1.5, above 1.28, and 0.5, where min(r A, clip A) = r A.
# Of the second (advantage -1): 0.5, below 0.8, then 2, 1 and 1, where min(r A, clip A) = r A.
RATIOS = [[1.5, 0.5], [0.5, 2.0, 1.0, 1.0]]
SURROGATE = [[1.28, 0.5], [-0.8, -2.0, -1.0, -1.0]]
SLOPE = [[0.0, 0.5], [0.0, -2.0, -1.0, -1.0]]  # d surrogate / d log pi: r A where not clipped


def completion(num_policy, *, prompt_id=0, sample=0, env_after=0, log_prob=-1.0):
    segments = [Segment([1, 2], "prompt"), Segment([3] * num_policy, "policy", [log_prob] * num_policy)]
    if env_after:
        segments += [Segment([4] * env_after, "env"), Segment([5], "policy", [log_prob])]
    return Completion(Prompt(prompt_id, [1, 2], {}), sample, segments, "stop")


@pytest.fixture
def batch():
    # the second completion has 2 tokens of the environment before its last: prompt 2, policy 3, env 2, policy 1
    return pack([completion(2), completion(3, sample=1, env_after=2)], [1.0, -1.0])


def with_ratios(batch):
    """log_probs whose ratios to the old ones (-1 everywhere) are RATIOS; NaN wherever nothing was sampled."""
    log_probs = torch.full(batch.tokens.shape, math.nan)
    log_probs[batch.loss_mask] = torch.tensor([r for row in RATIOS for r in row]).log() - 1
    return log_probs.requires_grad_()


def inputs_of(batch, log_probs, *, old=None, entropy=None):
    """Of a batch; the old log-probs are the sampler's unless given."""
    old = batch.sampler_log_probs if old is None else old
    return LossInputs.of(batch, log_probs, torch.zeros_like(log_probs) if entropy is None else entropy, old_log_probs=old,
                         max_new_tokens=10)


def scattered(batch, values):
    result = torch.zeros(batch.tokens.shape)
    result[batch.loss_mask] = torch.tensor([value for row in values for value in row])
    return result


@pytest.mark.parametrize("name, weights, expected", [
    ("dapo", (1 / 6, 1 / 6), 3.02 / 6),  # -(1.78 - 4.8) / 6 tokens
    ("grpo", (1 / 4, 1 / 8), 0.155),  # -(1.78 / 2 - 4.8 / 4) / 2 sequences
    ("dr_grpo", (1 / 20, 1 / 20), 0.151),  # -(1.78 - 4.8) / (2 sequences * 10)
])
def test_value_gradient_and_clipping_are_those_worked_out_by_hand(batch, name, weights, expected):
    log_probs = with_ratios(batch)
    loss, stats = LOSSES[name](inputs_of(batch, log_probs))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    slopes = [[-slope * weight for slope in row] for row, weight in zip(SLOPE, weights)]
    torch.testing.assert_close(log_probs.grad, scattered(batch, slopes), rtol=1e-6, atol=0)
    assert stats["clip_ratio/low"].item() == 1 and stats["clip_ratio/high"].item() == 1
    assert stats["ratio/max"].item() == pytest.approx(2.0) and stats["ratio/mean"].item() == pytest.approx(6.5)
    # sum of r - 1 - ln r = 0.5 - ln 1.5 - 0.5 * 2 + 2 ln 2 + 1 - ln 2
    assert stats["approx_kl"].item() == pytest.approx(0.5 - math.log(1.5) + math.log(2), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_get_zero_gradient_whatever_stands_there(batch, name):
    log_probs = with_ratios(batch)  # NaN outside the mask
    old = batch.sampler_log_probs.masked_fill(~batch.loss_mask, math.inf)
    poisoned = replace(batch, advantages=batch.advantages.masked_fill(~batch.loss_mask, math.nan))
    loss, stats = LOSSES[name](inputs_of(poisoned, log_probs, old=old))
    loss.backward()
    assert math.isfinite(loss.item()) and all(math.isfinite(value) for value in stats.values())
    assert (log_probs.grad[~batch.loss_mask] == 0).all()
    assert (log_probs.grad[batch.loss_mask] != 0).sum() == 4  # two of the six are clipped


@pytest.mark.parametrize("name, weights", [("dapo", (1 / 6, 1 / 6)), ("grpo", (1 / 4, 1 / 8)),
                                           ("dr_grpo", (1 / 20, 1 / 20))])
def test_with_its_own_log_probs_as_old_the_gradient_is_that_of_reinforce(batch, name, weights):
    log_probs = with_ratios(batch)
    loss, stats = LOSSES[name](inputs_of(batch, log_probs, old=log_probs))
    loss.backward()
    expected = scattered(batch, [[-1.0 * weights[0]] * 2, [1.0 * weights[1]] * 4])
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-6, atol=0)
    assert stats["clip_ratio/low"] == 0 and stats["clip_ratio/high"] == 0
    assert stats["ratio/max"] == 1 and stats["ratio/mean"] == 6 and stats["approx_kl"] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_step_in_any_split_and_order(name):
    generator = torch.Generator().manual_seed(3)
    completions = [completion(1 + i % 4, prompt_id=i // 2, sample=i % 2, env_after=i % 3) for i in range(8)]
    batch = pack(completions, torch.randn(8, generator=generator).tolist())
    shift = torch.randn(batch.tokens.shape, generator=generator, dtype=torch.float64) * 0.5
    batch = replace(batch, sampler_log_probs=torch.where(batch.loss_mask, shift - 1, 0.0),
                    advantages=batch.advantages.double())

    def step(micros):
        leaf = torch.zeros(8, 20, dtype=torch.float64, requires_grad=True)  # a log-prob for each (sequence, position)
        total = 0.0
        for rows, micro in micros:
            lengths = micro.cu_seqlens.diff().tolist()
            log_probs = torch.cat([leaf[row, :length] - 1 for row, length in zip(rows, lengths)])
            loss, _ = LOSSES[name](inputs_of(micro, log_probs))
            loss.backward()
            total += loss.item()
        return total, leaf.grad

    value, gradient = step([(range(8), batch)])
    assert value != 0
    for split in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[5], [3, 0, 7], [1, 2, 4, 6]],
                  [[i] for i in (7, 2, 5, 0, 1, 3, 4, 6)]):
        other_value, other = step([(rows, batch.select(rows)) for rows in split])
        assert other_value == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(other, gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_an_absurd_log_ratio_stays_finite(batch, name):
    log_probs = scattered(batch, [[500.0, -500.0], [500.0, -500.0, 0.0, 0.0]]).requires_grad_()
    loss, stats = LOSSES[name](inputs_of(batch, log_probs, old=torch.zeros_like(log_probs)))
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(log_probs.grad).all()
    assert stats["ratio/max"].item() == pytest.approx(math.exp(20), rel=1e-5)


def test_repeated_updates_on_one_batch_stop_at_the_clip_bounds():
    """One prompt, one token, two answers with advantages 1 and -1: the ratios leave 1, are clipped, then rest."""
    logits = torch.zeros(3, requires_grad=True)
    batch = pack([completion(1, log_prob=-math.log(3)), completion(1, sample=1, log_prob=-math.log(3))], [1.0, -1.0])
    history = []
    for _ in range(60):
        log_probs = torch.zeros(6).index_put((torch.tensor([2, 5]),), logits.log_softmax(0)[:2])
        loss, stats = dapo(inputs_of(batch, log_probs), clip_low=0.2, clip_high=0.28)
        (gradient,) = torch.autograd.grad(loss, logits)
        history.append((log_probs.detach()[[2, 5]] + math.log(3)).exp().tolist()
                       + [stats["clip_ratio/high"].item(), stats["clip_ratio/low"].item(), gradient.abs().max().item()])
        logits = (logits - 0.02 * gradient).detach().requires_grad_()
    assert history[0][:4] == [pytest.approx(1.0), pytest.approx(1.0), 0, 0]
    good, bad, high, low, gradient = history[-1]
    assert 1.28 < good < 1.29 and 0.77 < bad < 0.80  # beyond the bounds by less than a step
    assert (high, low, gradient) == (1, 1, 0.0)
    assert history[-2][:2] == [good, bad]


# d = log pi - log pi_ref; the loss averages over 6 tokens and multiplies by the coefficient 0.3
DIFFERENCES = [[0.5, -1.0], [0.0, 2.0, -0.25, 1.0]]


@pytest.mark.parametrize("estimator, value, slope", [
    ("k1", lambda d: d, lambda d: d),
    ("k2", lambda d: d * d / 2, lambda d: d),
    ("k3", lambda d: math.exp(-d) + d - 1, lambda d: 1 - math.exp(-d)),
])
def test_kl_values_and_gradients_are_those_of_their_formulas(batch, estimator, value, slope):
    log_probs = scattered(batch, DIFFERENCES) - 2
    log_probs[~batch.loss_mask] = math.nan
    log_probs.requires_grad_()
    on_policy = replace(batch, sampler_log_probs=log_probs.detach(), ref_log_probs=torch.full_like(log_probs, -2.0))
    penalty, stats = kl_penalty(inputs_of(on_policy, log_probs), coefficient=0.3, estimator=estimator)
    total = sum(value(d) for row in DIFFERENCES for d in row)
    assert stats["kl"].item() == pytest.approx(total, rel=1e-5)
    assert penalty.item() == pytest.approx(0.3 * total / 6, rel=1e-5)
    penalty.backward()
    expected = scattered(batch, [[0.05 * slope(d) for d in row] for row in DIFFERENCES])
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("is_on_policy", [True, False])
def test_expected_kl_gradient_is_the_exact_one(estimator, is_on_policy):
    """Over all 5 tokens, weighted by the sampler's probabilities: k1 and k2 follow KL(pi || ref), k3 KL(ref || pi)."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits, sampler_logits = (torch.randn(3, 5, generator=generator) / 2).unbind()
    sampler = (logits if is_on_policy else sampler_logits).log_softmax(0)
    ref = ref_logits.log_softmax(0)

    exact = logits.clone().requires_grad_()
    policy = exact.log_softmax(0)
    kl = (ref.exp() * (ref - policy)).sum() if estimator == "k3" else (policy.exp() * (policy - ref)).sum()
    kl.backward()

    estimated = logits.clone().requires_grad_()
    expectation = 0.0
    for token in range(5):
        one = pack([completion(1, log_prob=sampler[token].item())], [0.0])
        log_probs = torch.zeros(3).index_put((torch.tensor([2]),), estimated.log_softmax(0)[token])
        one.ref_log_probs = torch.tensor([0.0, 0.0, ref[token]])
        penalty, stats = kl_penalty(inputs_of(one, log_probs), coefficient=1.0, estimator=estimator)
        expectation = expectation + sampler[token].exp() * penalty
    expectation.backward()
    assert exact.grad.abs().max() > 0.05
    torch.testing.assert_close(estimated.grad, exact.grad, rtol=1e-4, atol=1e-6)
    if estimator != "k2":  # k1 and k3 are unbiased estimates of KL(pi || ref)
        policy = logits.log_softmax(0)
        assert expectation.item() == pytest.approx((policy.exp() * (policy - ref)).sum().item(), rel=1e-4)


def test_one_absurd_token_cannot_explode_the_kl(batch):
    log_probs = scattered(batch, [[-300.0, 0.0], [0.0, 0.0, 0.0, 300.0]]).requires_grad_()
    on_policy = replace(batch, sampler_log_probs=log_probs.detach(), ref_log_probs=torch.zeros_like(log_probs))
    penalty, stats = kl_penalty(inputs_of(on_policy, log_probs), coefficient=1.0, estimator="k3")
    penalty.backward()
    # d = -300: 9 + 10 (300 - ln 10) - 300, with slope 1 - 10; d = 300: 300 - 1, with slope 1
    assert stats["kl"].item() == pytest.approx(2709 - 10 * math.log(10) + 299, rel=1e-6)
    expected = scattered(batch, [[-9 / 6, 0.0], [0.0, 0.0, 0.0, 1 / 6]])
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-6, atol=1e-7)


def test_token_stats_and_their_reduction_over_micro_batches(batch):
    differences = [[0.1, -0.2], [0.0, 0.0, 0.6, -0.3]]
    log_probs = scattered(batch, differences) + batch.sampler_log_probs
    entropy = scattered(batch, [[1.0, 2.0], [3.0, 0.5, 0.5, 5.0]]).masked_fill(~batch.loss_mask, math.nan)
    parts = []
    offsets = batch.cu_seqlens.tolist()
    for row in (0, 1):
        micro, span = batch.select([row]), slice(offsets[row], offsets[row + 1])
        inputs = inputs_of(micro, log_probs[span], old=log_probs[span], entropy=entropy[span])
        loss, stats = dapo(inputs, clip_low=0.2, clip_high=0.2)
        parts.append({"loss": loss, **stats, **token_stats(inputs)})
    metrics = reduce_stats(parts, num_updates=1)
    assert metrics["entropy"] == pytest.approx(12 / 6)
    assert metrics["sampling/log_prob_diff/mean"] == pytest.approx(1.2 / 6, rel=1e-5)
    assert metrics["sampling/log_prob_diff/max"] == pytest.approx(0.6, rel=1e-5)
    k3 = sum(math.exp(d) - 1 - d for row in differences for d in row)
    assert metrics["sampling/kl"] == pytest.approx(k3 / 6, rel=1e-4)
    assert metrics["ratio/mean"] == 1 and metrics["ratio/max"] == 1
    assert metrics["loss"] == pytest.approx(-(2 - 4) / 6)  # A times ratio 1: -(1 + 1 - 4) / 6
    assert reduce_stats(parts + parts, num_updates=2) == pytest.approx(metrics)


def test_the_token_budget_only_changes_rounding(batch):
    log_probs = with_ratios(batch).detach()
    whole, _ = dapo(inputs_of(batch, log_probs), **CLIP)
    bounds = batch.cu_seqlens.tolist()
    split = 0.0
    for micro in micro_batches(batch, max_tokens=8):
        assert micro.num_rows == 1
        row = 0 if len(micro.tokens) == bounds[1] else 1
        part, _ = dapo(inputs_of(micro, log_probs[bounds[row]:bounds[row + 1]]), **CLIP)
        split += part.item()
    assert split == pytest.approx(whole.item(), rel=1e-6)


def attempt(loss_fn, path, *, group_size=2, has_reference=False):
    try_loss(loss_fn, path, group_size=group_size, max_new_tokens=10, has_reference=has_reference)


@pytest.mark.parametrize("loss_fn, message", [
    (partial(dapo, clip_low=-0.1, clip_high=0.2), "loss.clip_low = -0.1"),
    (partial(dapo, clip_low=1.5, clip_high=0.2), "loss.clip_low = 1.5"),
    (partial(grpo, clip_low=0.2, clip_high=-0.2), "loss.clip_high = -0.2"),
    (partial(ppo, clip_low=0.2, clip_high=0.2, normalizer=0), "loss.normalizer = 0"),
    (partial(ppo, clip_low=0.2, clip_high=0.2, normalizer=math.inf), "loss.normalizer = inf"),
    (partial(ppo, clip_low=0.2, clip_high=0.2, normalizer="tokens"), "loss.normalizer = 'tokens': must be one of token, seq"),
])
def test_bad_coefficients_are_refused_by_key_before_a_run(loss_fn, message):
    with pytest.raises(ConfigError, match=message):
        attempt(loss_fn, "grpo.losses.ppo")


def test_the_ends_of_the_coefficients_ranges_are_inside():
    attempt(partial(dapo, clip_low=0, clip_high=0), "grpo.losses.ppo")
    attempt(partial(dapo, clip_low=1, clip_high=math.inf), "grpo.losses.ppo")


def reinforce(inputs):
    """With a baseline of its own: the mean reward of the other completions of the group."""
    is_same = inputs.group_ids[:, None] == inputs.group_ids[None, :]
    others = is_same & ~torch.eye(len(inputs.rewards), dtype=torch.bool)
    baseline = (others * inputs.rewards).sum(1) / others.sum(1)
    advantages = (inputs.rewards - baseline)[inputs.sequence_ids]
    terms = torch.where(inputs.loss_mask, -advantages * inputs.log_probs, 0.0)
    return terms.sum() / inputs.num_policy_tokens, {"surprise": -inputs.log_probs.detach()[inputs.loss_mask].sum()}


@pytest.mark.parametrize("share_prompts", [False, True])
def test_a_loss_of_ones_own_has_rewards_and_groups_of_the_whole_step_in_any_micro_batch(share_prompts):
    attempt(reinforce, "mine.reinforce", group_size=3)
    completions = [completion(1 + i % 3, prompt_id=7 + i // 3, sample=i % 3) for i in range(6)]
    for item, reward in zip(completions, [1.0, 0.0, 2.0, 5.0, 5.0, 2.0]):
        item.reward = reward
    batch = pack(completions, [0.0] * 6)
    # minus the mean of the group's other two; 12 trained tokens
    expected = [[-gap / 12] * (1 + i % 3) for i, gap in enumerate([0.0, -1.5, 1.5, 1.5, 1.5, -3.0])]
    gradient, value = torch.zeros(len(batch.tokens)), 0.0
    micros = micro_batches(batch, 9, share_prompts=share_prompts)
    assert len(micros) > 1
    for micro in micros:
        log_probs = micro.sampler_log_probs.clone().requires_grad_()
        loss, _ = reinforce(inputs_of(micro, log_probs))
        loss.backward()
        gradient[micro.token_index[micro.loss_mask]] += log_probs.grad[micro.loss_mask]
        value += loss.item()
    torch.testing.assert_close(gradient, scattered(batch, expected))
    assert value == pytest.approx(-sum(x for row in expected for x in row))  # every log-prob is -1


def returning(result):
    return lambda inputs: result(inputs.log_probs)


@pytest.mark.parametrize("loss_fn, problem", [
    (returning(lambda x: x.sum()), "what it returned is a tensor of shape [], no pair"),
    (returning(lambda x: None), "what it returned is of type NoneType, no pair"),
    (returning(lambda x: (x.sum(), {}, 3)), "what it returned is of type tuple, no pair"),
    (returning(lambda x: (x, {})), "its loss is a tensor of shape [16]"),
    (returning(lambda x: (1.5, {})), "its loss is of type float"),
    (returning(lambda x: (x.detach().sum(), {})), "its loss is a scalar that does not depend on inputs.log_probs"),
    (lambda inputs: (inputs.entropy.sum(), {}), "its loss is a scalar that does not depend on inputs.log_probs"),
    (returning(lambda x: (x.sum(), None)), "its stats are of type NoneType"),
    (returning(lambda x: (x.sum(), {"a": x})), "stats['a'] is a tensor of shape [16]"),
    (returning(lambda x: (x.sum(), {"a": "b"})), "stats['a'] is of type str"),
    (returning(lambda x: (x.sum(), {"a": 1.0, "step": 2.0})), "stats['step'] has a name that the run logs itself"),
    (lambda inputs: (inputs.log_probs[inputs.advantages.mul_(0) == 0].sum(), {}), "it changed inputs.advantages in place"),
    (lambda inputs, step: (inputs.log_probs.sum() * step.entropy.add_(1).sum(), {}), "it changed step.entropy in place"),
    (lambda log_probs, batch: (log_probs.sum(), {}), "raised TypeError"),
    (lambda inputs: (inputs.log_prob.sum(), {}), "raised AttributeError"),
    (returning(lambda x: 1 / 0), "raised ZeroDivisionError: division by zero"),
    (returning(lambda x: sys.exit("enough")), "raised SystemExit: enough"),
])
def test_a_loss_that_breaks_the_contract_is_refused_with_what_it_must_do(loss_fn, problem):
    with pytest.raises(ConfigError) as caught:
        attempt(loss_fn, "mine.py:loss")
    assert str(caught.value).startswith(f"loss._target_ = 'mine.py:loss': {problem}")
    assert "A loss is called as loss(inputs), a grpo.losses.LossInputs" in str(caught.value)


def test_the_trial_has_all_that_a_loss_may_ask_of_a_run():
    seen = []

    def loss_fn(inputs):
        seen.append(inputs)
        return (inputs.log_probs - inputs.ref_log_probs + inputs.entropy)[inputs.loss_mask].sum(), {}

    attempt(loss_fn, "mine.py:loss", group_size=3, has_reference=True)
    [inputs] = seen
    assert (inputs.num_policy_tokens, inputs.num_sequences, inputs.num_prompts, inputs.max_new_tokens) == (12, 6, 2, 10)
    assert inputs.sequence_lengths.tolist() == [2] * 6 and inputs.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert inputs.rewards.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ConfigError, match="raised TypeError"):  # there is none without a KL penalty
        attempt(loss_fn, "mine.py:loss")
