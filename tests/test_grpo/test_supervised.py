"""Losses on completions of data against numbers by hand, and against DPO written out over whole sequences in float64."""

import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from grpo.batch import Completion, Prompt, Segment, pack
from grpo.config import ConfigError
from grpo.configuration.launch import load_config
from grpo.loss_contract import try_loss
from grpo.losses import LossInputs
from grpo.recorded import check_recorded, held_out_metrics, sums_of
from grpo.supervised import dpo, sft

LENGTHS = [(2, 3), (4, 1), (1, 2)]  # tokens of the chosen and the rejected completion of each pair


def packed():
    completions = [
        Completion(Prompt(number, [1, 2], {}), sample, [Segment([1, 2], "prompt"), Segment([3] * n, "policy", [0.0] * n)],
                   "stop", reward=1.0 - sample)
        for number, lengths in enumerate(LENGTHS) for sample, n in enumerate(lengths)]
    return pack(completions, [1.0, -1.0] * len(LENGTHS))


def drawn(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.where(batch.loss_mask, -3 * torch.rand(len(batch.tokens), generator=generator), 0.0)


def inputs_of(batch, log_probs):
    return LossInputs.of(batch, log_probs, torch.zeros_like(log_probs), old_log_probs=log_probs.detach(), max_new_tokens=9)


def test_sft_is_the_mean_over_all_trained_tokens():
    batch = packed()
    log_probs = torch.where(batch.loss_mask, -2.0, math.nan).requires_grad_()
    loss, _ = sft(inputs_of(batch, log_probs))
    assert loss.item() == pytest.approx(2.0)
    loss.backward()
    assert torch.equal(log_probs.grad, torch.where(batch.loss_mask, -1 / 13, 0.0))


def restated(batch, log_probs, ref, *, beta, smoothing=0.0):
    """Equation 7 over whole completions, pair by pair."""
    owned = [(batch.sequence_ids == i) & batch.loss_mask for i in range(6)]
    gains = torch.stack([(log_probs - ref)[place].sum() for place in owned])
    margins = [beta * (gains[2 * i] - gains[2 * i + 1]) for i in range(3)]
    return sum(-(1 - smoothing) * F.logsigmoid(m) - smoothing * F.logsigmoid(-m) for m in margins) / 3


@pytest.mark.parametrize("rows", [[[0, 1, 2, 3, 4, 5]], [[0], [1], [2], [3], [4], [5]], [[5, 0, 3], [1, 4, 2]]],
                         ids=["whole", "one by one", "pairs torn apart"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_has_the_papers_value_and_gradient_in_any_split(rows, smoothing):
    batch = packed()
    values, ref = drawn(batch, 1), drawn(batch, 2)
    batch.old_sums, batch.ref_sums = sums_of(batch, values), sums_of(batch, ref)
    exact = values.double().requires_grad_()
    expected = restated(batch, exact, ref.double(), beta=0.4, smoothing=smoothing)
    expected.backward()
    total, gradient = 0.0, torch.zeros_like(values)
    for part in rows:
        micro = batch.select(part)
        log_probs = values[micro.token_index].requires_grad_()
        loss, stats = dpo(inputs_of(micro, log_probs), beta=0.4, label_smoothing=smoothing)
        loss.backward()
        total += loss.item()
        gradient[micro.token_index] = log_probs.grad
    assert total == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-5, atol=1e-9)


def test_a_pair_that_is_no_different_from_the_reference_costs_ln_2_and_pulls_by_half_of_beta():
    batch = packed()
    values = drawn(batch, 1)
    batch.old_sums = batch.ref_sums = sums_of(batch, values)
    log_probs = values.requires_grad_()
    loss, stats = dpo(inputs_of(batch, log_probs), beta=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and stats["preference/accuracy"].item() == 0
    chosen = batch.loss_mask & (batch.rewards[batch.sequence_ids] == 1)
    torch.testing.assert_close(log_probs.grad[chosen], torch.full((7,), -0.1 / 2 / 3))


def test_dpo_says_what_it_needs():
    batch = packed()
    with pytest.raises(ConfigError, match="optim.sums_log_probs=true"):
        dpo(inputs_of(batch, drawn(batch, 1).requires_grad_()), beta=0.1)
    with pytest.raises(ConfigError, match="loss.beta = 0"):
        dpo(inputs_of(batch, drawn(batch, 1).requires_grad_()), beta=0)
    try_loss(partial(dpo, beta=0.1), "dpo", group_size=2, max_new_tokens=9, has_reference=True, has_sums=True)


@pytest.mark.parametrize("words, is_data, message", [
    (["loss=sft"], False, "loss._target_ = 'grpo.supervised.sft': learns from data"),
    (["loss=dpo", "optim.sums_log_probs=true"], False, "loss._target_ = 'grpo.supervised.dpo': learns from data"),
    (["loss=sft", "kl.coefficient=0.1", "kl.place=reward"], True, "kl.place = 'reward': data have no reward"),
    (["loss=reinforce", "advantage.whiten=tokens"], True, "advantage.whiten = 'tokens': the advantages of data are 1"),
    (["loss=sft", "entropy.top_fraction=0.2"], True, "entropy.top_fraction = 0.2: weighs advantages"),
    (["loss=sft", "corrections.weight=mask"], True, "corrections = on: weighs advantages"),
    (["loss=sft", "curriculum.retire_at=0.9"], True, "curriculum.retire_at, .*: about completions that are sampled"),
    (["loss=sft", "rollout.oversampling=2", "optim.mask_truncated=true"], True,
     "rollout.oversampling, optim.mask_truncated: about"),
    (["loss=dapo", "rollout.overlong_buffer=4"], True, "rollout.overlong_buffer: about"),
    (["loss=dapo", "rollout.replay_routing=true"], True, "rollout.replay_routing: about"),
    (["loss=dapo", "corrections.weight=mask"], True, None), (["loss=sft", "kl.coefficient=0.1"], True, None),
    (["loss=dapo"], False, None)])
def test_losses_of_data_and_sampled_completions_are_kept_apart(words, is_data, message):
    config = load_config("train", ["+experiment=smoke", "name=x", *words])
    env = SimpleNamespace(recorded_completions=None) if is_data else SimpleNamespace()
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        check_recorded(env, config)


def test_held_out_loss_is_of_what_is_chosen_and_accuracy_of_gains_over_the_reference():
    batch = packed()
    log_probs, ref = torch.zeros(len(batch.tokens)), torch.zeros(len(batch.tokens))
    values = [(-1.0, -3.0), (-1.0, -2.0), (-1.0, -1.0), (-1.0, -5.0), (-2.0, -2.5), (-9.0, -8.0)]
    for completion, (value, reference) in enumerate(values):
        place = (batch.sequence_ids == completion) & batch.loss_mask
        log_probs[place], ref[place] = value, reference
    metrics = held_out_metrics(batch, log_probs, ref)
    # gains: 2 x 2 > 1 x 3 in the first pair, 0 < 4 in the second, 0.5 > -2 in the third
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["loss"] == pytest.approx((2 * 1 + 4 * 1 + 1 * 2) / 7)
    assert metrics["perplexity"] == pytest.approx(math.exp(8 / 7))
