"""The fingerprint of a rollout and a training step: the same again, and what changes where something does."""

import pytest
import torch
from paths import FIXTURES, ROOT

SIZES = {"count": 6, "prompt_lens": (3, 20), "max_new_tokens": 12, "micro_batch": 4}
DIGESTS = ("tokens", "log_probs", "gradients")


@pytest.fixture
def bits(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bits

    return bits


@pytest.fixture
def policy(bits):
    return bits.load(FIXTURES / "tiny_mxfp4", "cpu", torch.float32)


def test_the_same_policy_has_the_same_bits_and_the_trainers_log_probs(bits, policy):
    first, again = (bits.measure(policy, **SIZES) for _ in range(2))
    assert [first[name] for name in DIGESTS] == [again[name] for name in DIGESTS]
    assert first["max_log_prob_diff"] < 1e-5 and first["completions"] == 6
    assert 1 <= first["min_len"] < first["max_len"] <= 12 and first["num_tokens"] >= 6


def test_one_changed_weight_shows_in_the_log_probs_and_gradients(bits, policy):
    first = bits.measure(policy, **SIZES)
    with torch.no_grad():
        policy.lm_head.weight[5] *= 1.0005
    changed = bits.measure(policy, **SIZES)
    assert first["tokens"] == changed["tokens"]
    assert first["log_probs"] != changed["log_probs"] and first["gradients"] != changed["gradients"]


def test_digests_tell_bits_apart(bits):
    assert bits.sha256([torch.tensor([0.0])]) != bits.sha256([torch.tensor([-0.0])])
    # of four zero bytes, by another program
    assert bits.sha256([torch.tensor([0.0])]).startswith("df3f619804a92fdb4057192dc43dd748")


def test_a_trainer_that_differs_is_seen(bits, policy, monkeypatch):
    log_probs = policy.log_probs
    monkeypatch.setattr(policy, "log_probs", lambda *some, **others: [x + 0.25 for x in log_probs(*some, **others)])
    assert bits.measure(policy, **SIZES)["max_log_prob_diff"] == pytest.approx(0.25, abs=1e-5)
