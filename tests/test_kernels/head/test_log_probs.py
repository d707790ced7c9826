"""Log-probs and entropy from hidden states against autograd of a plain float64 log-softmax."""

import math

import pytest
import torch

import kernels.head.log_probs
from kernels.head.draw import head_logits
from kernels.head.log_probs import log_probs

TOKENS, WIDTH, VOCAB = 11, 6, 23


def inputs(*, dtype=torch.float32, num_tokens=TOKENS, vocab=VOCAB) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(vocab, WIDTH, generator=generator).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (num_tokens,), generator=generator)


def kept_sets(targets: torch.Tensor, vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and offsets, and the same as a mask [N, V]: rows of 1, 2, 3 ... ids with the target among them, every third
    row unfiltered."""
    generator = torch.Generator().manual_seed(2)
    rows, mask = [], torch.ones(len(targets), vocab, dtype=torch.bool)
    for row, target in enumerate(targets.tolist()):
        if row % 3 == 2:
            rows.append([])
            continue
        others = [token for token in torch.randperm(vocab, generator=generator).tolist() if token != target]
        rows.append([*others[:row], target])
        mask[row] = False
        mask[row, rows[-1]] = True
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return torch.tensor([token for row in rows for token in row], dtype=torch.int32), offsets, mask


def plain(hidden, weight, targets, *, temperature, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """log-softmax in the inputs' dtype; entropy is always that of the full vocabulary."""
    logits = hidden @ weight.T / temperature
    kept = logits if mask is None else logits.masked_fill(~mask, float("-inf"))
    full = torch.log_softmax(logits, dim=-1)
    return torch.log_softmax(kept, -1).gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)


def compare(*, temperature, filtered, weights=(1.0, 1.0), tolerance=2e-5):
    """Both outputs, and the gradients of a weighted sum of both, against the plain formula."""
    hidden, weight, targets = inputs()
    ids, offsets, mask = kept_sets(targets) if filtered else (None, None, None)
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(TOKENS, generator=generator) * weight_ for weight_ in weights]
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    theirs = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    results = log_probs(*ours, targets, temperature=temperature, kept_ids=ids, kept_offsets=offsets)
    expected = plain(*theirs, targets, temperature=temperature, mask=mask)
    for result, value in zip(results, expected):
        torch.testing.assert_close(result.double(), value, rtol=1e-5, atol=tolerance)
    sum((result * factor).sum() for result, factor in zip(results, factors)).backward()
    sum((value * factor).sum() for value, factor in zip(expected, factors)).backward()
    for mine, leaf in zip(ours, theirs):
        torch.testing.assert_close(mine.grad.double(), leaf.grad, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.3)], ids=["log_probs", "entropy", "both"])
def test_values_and_gradients_equal_those_of_a_plain_log_softmax(temperature, filtered, weights):
    compare(temperature=temperature, filtered=filtered, weights=weights)


@pytest.mark.parametrize("rows", [1, 2, 4, 10, 11])
@pytest.mark.parametrize("filtered", [False, True])
def test_chunks_of_any_size_give_the_same_values_and_gradients(rows, filtered, monkeypatch):
    monkeypatch.setattr(kernels.head.log_probs, "MAX_LOGITS", rows * VOCAB)
    compare(temperature=0.7, filtered=filtered)


def test_logits_held_at_once_stay_within_the_limit(monkeypatch):
    shapes, plain_head = [], kernels.head.log_probs.head_logits_reference

    def measured(hidden, weight):
        shapes.append((hidden.shape[0], weight.shape[0]))
        return plain_head(hidden, weight)

    monkeypatch.setattr(kernels.head.log_probs, "MAX_LOGITS", 4 * VOCAB + 3)
    monkeypatch.setattr(kernels.head.log_probs, "head_logits_reference", measured)
    compare(temperature=1.0, filtered=False)
    assert shapes == [(4, VOCAB), (4, VOCAB), (3, VOCAB)] * 2  # forward, then again in the backward


def test_numbers_worked_out_by_hand():
    # logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [5.0]]).log()
    chosen, entropy = log_probs(hidden, weight, torch.tensor([1]), temperature=1.0)
    assert chosen.item() == pytest.approx(math.log(2 / 8), abs=1e-6)
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)), abs=1e-6)
    # temperature 1/2 squares: 1/30, 4/30, 25/30; kept 1 and 2: 4/29
    kept = {"kept_ids": torch.tensor([2, 1], dtype=torch.int32), "kept_offsets": torch.tensor([0, 2])}
    chosen, entropy = log_probs(hidden, weight, torch.tensor([1]), temperature=0.5, **kept)
    assert chosen.item() == pytest.approx(math.log(4 / 29), abs=1e-6)
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) for p in (1 / 30, 4 / 30, 25 / 30)), abs=1e-6)


def test_a_kept_set_of_one_has_log_prob_zero_and_no_gradient():
    hidden, weight, targets = inputs()
    hidden.requires_grad_()
    chosen, _ = log_probs(hidden, weight, targets, temperature=0.7, kept_ids=targets.int(), kept_offsets=torch.arange(TOKENS + 1))
    chosen.sum().backward()
    torch.testing.assert_close(chosen, torch.zeros(TOKENS), rtol=0, atol=1e-6)
    torch.testing.assert_close(hidden.grad, torch.zeros_like(hidden), rtol=0, atol=1e-6)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, targets = inputs()
    hidden.requires_grad_()
    log_probs(hidden, weight, targets, temperature=1.0)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_huge_logits_stay_finite():
    hidden, weight, targets = inputs()
    hidden = (hidden * 1e4).requires_grad_()
    chosen, entropy = log_probs(hidden, weight, targets, temperature=0.5)
    (chosen.sum() + entropy.sum()).backward()
    assert chosen.isfinite().all() and entropy.isfinite().all() and hidden.grad.isfinite().all()
    assert (entropy.abs() < 1e-3).all() and (chosen <= 0).all()


@pytest.mark.parametrize("filtered", [False, True])
def test_no_tokens_at_all(filtered):
    hidden, weight, targets = inputs(num_tokens=0)
    hidden.requires_grad_()
    kept = (torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)) if filtered else (None, None)
    chosen, entropy = log_probs(hidden, weight, targets, temperature=1.0, kept_ids=kept[0], kept_offsets=kept[1])
    (chosen.sum() + entropy.sum()).backward()
    assert chosen.shape == entropy.shape == (0,) and hidden.grad.shape == (0, WIDTH)


def test_strided_hidden_states_and_head():
    hidden, weight, targets = inputs()
    strided = [tensor.T.contiguous().T for tensor in (hidden, weight)]
    expected_values = log_probs(hidden, weight, targets, temperature=1.0)
    for result, expected in zip(log_probs(*strided, targets, temperature=1.0), expected_values):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_a_bf16_head_larger_than_one_range_has_fp32_logits():
    hidden, weight, _ = inputs(dtype=torch.bfloat16, vocab=40_000)
    logits = head_logits(hidden, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def test_bf16_error_is_at_most_twice_that_of_eager_bf16():
    hidden, weight, targets = inputs(dtype=torch.bfloat16)
    leaves = [[tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight)]
              for dtype in (torch.float64, torch.bfloat16)]
    exact, eager = (plain(*pair, targets, temperature=0.7) for pair in leaves)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    results = log_probs(*ours, targets, temperature=0.7)
    for result, value, rough in zip(results, exact, eager):
        assert (result.double() - value).norm() <= 2 * (rough.double() - value).norm()
    for outputs in (exact, eager, results):
        (outputs[0].sum() - 0.5 * outputs[1].sum()).backward()
    for mine, leaf, rough in zip(ours, *leaves):
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad.double() - leaf.grad).norm() <= 2 * (rough.grad.double() - leaf.grad).norm()
