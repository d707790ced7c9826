"""Corrections for the sampler's policy: against TRL's and verl's numbers, plain loops in float64, and exact expectations."""

import itertools
import math
import random
from functools import partial

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from grpo.batch import Completion, Prompt, Segment, micro_batches, pack
from grpo.config import ConfigError, CorrectionsConfig
from grpo.configuration.launch import load_config
from grpo.corrections import correct
from grpo.losses import LossInputs, ppo, reduce_stats

DAPO = partial(ppo, normalizer="token", clip_low=0.2, clip_high=0.28)


@pytest.fixture(scope="module")
def golden():
    return load_file(FIXTURES / "losses/corrections.safetensors")


def golden_inputs(golden) -> LossInputs:
    lengths, mask = golden["cu_seqlens"].diff(), golden["mask.no_truncated"].bool()
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    policy_lengths = torch.zeros_like(lengths).index_add_(0, ids, mask.long())
    return LossInputs(
        log_probs=golden["log_probs"].clone().requires_grad_(), entropy=torch.zeros(len(mask)),
        old_log_probs=golden["old_log_probs"], sampler_log_probs=golden["sampler_log_probs"], ref_log_probs=None,
        full_kl=None, advantages=golden["advantages"], loss_mask=mask, sequence_ids=ids, sequence_lengths=policy_lengths,
        rewards=torch.zeros(len(lengths)), group_ids=torch.arange(len(lengths)) // 4,
        group_lengths=policy_lengths, token_index=torch.arange(len(mask)), spans=list(enumerate(lengths.tolist())),
        num_policy_tokens=int(mask.sum()),
        num_sequences=len(lengths), num_prompts=6, max_new_tokens=24)


def weights_of(inputs: LossInputs, **settings) -> torch.Tensor:
    inputs.advantages = torch.ones_like(inputs.advantages)
    return correct(inputs, CorrectionsConfig(**settings))[0].advantages


@pytest.mark.parametrize("case, settings", [
    ("verl.token_tis", dict(weight="truncate", high=2.0)),
    ("verl.sequence_tis", dict(weight="truncate", level="sequence", high=2.0)),
    ("verl.token_icepop", dict(weight="mask", low=0.5, high=5.0)),
    ("verl.sequence_icepop", dict(weight="mask", level="sequence", low=0.5, high=5.0)),
    ("verl.seq_mean_k1", dict(geometric=[1 / 1.02, 1 / 0.97])),  # verl's bounds act on the inverse ratio
    ("verl.seq_mean_k3", dict(max_k3=0.0014)),
    ("trl.is_token_truncate.weights", dict(weight="truncate", high=3.0)),
    ("trl.is_token_mask.weights", dict(weight="mask", low=0.5, high=3.0)),
    ("trl.is_sequence_mask.weights", dict(weight="mask", level="sequence", high=3.0)),
    ("trl.is_sequence_truncate.weights", dict(weight="truncate", level="sequence", high=3.0))])
def test_weights_are_those_of_trl_and_verl(golden, case, settings):
    inputs = golden_inputs(golden)
    expected = golden[case].double() * inputs.loss_mask
    assert 1 < len(expected.unique())  # the case has something to see
    torch.testing.assert_close(weights_of(inputs, **settings), expected, rtol=3e-7, atol=1e-9)  # verl's are float32


@pytest.mark.parametrize("case, loss_fn, settings", [
    ("is_token_truncate", DAPO, dict(weight="truncate", high=3.0)),
    ("is_token_mask", DAPO, dict(weight="mask", low=0.5, high=3.0)),
    ("is_sequence_mask", DAPO, dict(weight="mask", level="sequence", high=3.0)),
    ("opsm_sampler", partial(ppo, normalizer="sequence", clip_low=0.2, clip_high=0.2),
     dict(weight="truncate", high=3.0, opsm_delta=0.02))])
def test_losses_and_gradients_with_corrections_are_trl_s(golden, case, loss_fn, settings):
    inputs = golden_inputs(golden)
    loss, _ = loss_fn(correct(inputs, CorrectionsConfig(**settings))[0])
    loss.backward()
    assert loss.item() == pytest.approx(golden[f"trl.{case}.loss"].item(), abs=1e-9)
    torch.testing.assert_close(inputs.log_probs.grad, golden[f"trl.{case}.grad"], rtol=1e-8, atol=1e-11)


def draw_completions() -> tuple[list[Completion], list[float]]:
    rng = random.Random(3)
    completions = []
    for group, sample in itertools.product(range(3), range(3)):
        segments = [Segment([1] * (2 + group), "prompt")]
        for turn in range(1 + sample % 2):
            segments += [Segment([2], "env")] if turn else []
            length = rng.randint(1, 6)
            segments.append(Segment([3] * length, "policy", [rng.uniform(-3, -0.1) for _ in range(length)]))
        completions.append(Completion(Prompt(group, [1] * (2 + group), {}), sample, segments, "stop"))
    return completions, [rng.gauss(0, 1) for _ in completions]


def restated(ratios, drift, advantage, settings) -> list[float]:
    """The weights of one sequence."""
    mean = sum(map(math.log, ratios)) / len(ratios)
    if settings.geometric is not None and not settings.geometric[0] <= math.exp(mean) <= settings.geometric[1]:
        return [0.0] * len(ratios)
    if settings.max_k3 is not None and sum(r - 1 - math.log(r) for r in ratios) / len(ratios) > settings.max_k3:
        return [0.0] * len(ratios)
    if settings.opsm_delta is not None and advantage < 0 and sum(drift) / len(drift) > settings.opsm_delta:
        return [0.0] * len(ratios)
    used = [math.prod(ratios)] * len(ratios) if settings.level == "sequence" else ratios
    if settings.weight == "truncate":
        return [min(max(r, settings.low), settings.high) for r in used]
    return [r if settings.weight == "none" or settings.low <= r <= settings.high else 0.0 for r in used] if (
        settings.weight == "mask") else [1.0] * len(ratios)


@pytest.mark.parametrize("share_prompts", [False, True], ids=["whole", "shared"])
@pytest.mark.parametrize("settings", [
    CorrectionsConfig(weight="truncate", low=0.7, high=1.2),
    CorrectionsConfig(weight="mask", level="sequence", low=0.4, high=1.5),
    CorrectionsConfig(weight="truncate", geometric=[0.9, 1.15], max_k3=0.06, opsm_delta=0.05),
    CorrectionsConfig(opsm_delta=0.0), CorrectionsConfig(max_k3=0.04)], ids=["tis", "sequence mis", "all", "opsm", "k3"])
def test_in_any_micro_batches_weights_and_metrics_are_those_of_loops(settings, share_prompts):
    completions, advantages = draw_completions()
    batch = pack(completions, advantages)
    generator = torch.Generator().manual_seed(1)
    batch.old_log_probs = torch.where(batch.loss_mask, batch.sampler_log_probs + 0.3 * torch.randn(
        batch.tokens.shape, generator=generator), 0.0)
    moves = 0.3 * torch.randn(batch.tokens.shape, generator=generator)
    log_probs = torch.where(batch.loss_mask, batch.old_log_probs + moves, 0.0)
    expected, ratios_of, gone, k3, weight_sum = [], [], 0, 0.0, 0.0
    for row, (start, end) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        own = [i for i in range(start, end) if batch.loss_mask[i]]
        log_ratios = [(batch.old_log_probs[i] - batch.sampler_log_probs[i]).item() for i in own]
        ratios, drift = [math.exp(x) for x in log_ratios], [(batch.sampler_log_probs[i] - log_probs[i]).item() for i in own]
        weights = dict(zip(own, restated(ratios, drift, advantages[row], settings)))
        expected += [weights.get(i, 0.0) * advantages[row] for i in range(start, end)]
        ratios_of.append(ratios)
        weight_sum += sum(weights.values())
        gone, k3 = gone + (not any(weights.values())), k3 + sum(r - 1 - math.log(r) for r in ratios) / len(ratios)
    for max_tokens in (12, 1000):
        found, stats = torch.zeros(len(batch.tokens)), []
        for micro in micro_batches(batch, max_tokens, share_prompts=share_prompts):
            inputs = LossInputs.of(micro, log_probs[micro.token_index].requires_grad_(), torch.zeros(len(micro.tokens)),
                                   old_log_probs=micro.old_log_probs, max_new_tokens=10)
            corrected, sums = correct(inputs, settings)
            assert not corrected.advantages.requires_grad
            found[micro.token_index] = corrected.advantages
            stats.append(sums | {"num_tokens": micro.loss_mask.sum()})
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-7)
        metrics, all_ratios = reduce_stats(stats, num_updates=1), [r for ratios in ratios_of for r in ratios]
        num_masked = sum(value == 0 for value, m in zip(expected, batch.loss_mask) if m)
        assert metrics == pytest.approx({
            "corrections/ratio/mean": sum(all_ratios) / len(all_ratios), "corrections/ratio/max": max(all_ratios),
            "corrections/inverse_ratio/max": 1 / min(all_ratios),
            "corrections/sequence_ratio/max": max(map(math.prod, ratios_of)), "corrections/sequence_k3": k3 / len(completions),
            "corrections/weight": weight_sum / len(all_ratios),
            "corrections/masked_tokens": num_masked / len(all_ratios),
            "corrections/masked_sequences": gone / len(completions)}, rel=1e-5)
        if settings.weight != "truncate" or settings.geometric:
            assert 0 < num_masked < len(all_ratios)


def test_ratios_beyond_all_bounds_leave_their_sequence_out(golden):
    inputs = golden_inputs(golden)
    inputs.sampler_log_probs = inputs.old_log_probs.clone()
    is_far = inputs.sequence_ids == 1
    inputs.sampler_log_probs[is_far] -= 30.0
    assert int((is_far & inputs.loss_mask).sum()) >= 6
    corrected, stats = correct(inputs, CorrectionsConfig(max_k3=0.01))
    assert torch.equal(corrected.advantages == 0, is_far | ~inputs.loss_mask | (inputs.advantages == 0))
    k3 = math.expm1(20) - 20  # of a token, whose log ratio is bounded
    mean = float(stats["corrections/sequence_k3"]) / inputs.num_policy_tokens
    assert mean == pytest.approx(k3 / inputs.num_sequences, rel=1e-6)


def test_on_policy_every_weight_is_one_and_without_a_correction_nothing_is_computed():
    completions, advantages = draw_completions()
    batch = pack(completions, advantages)
    log_probs = batch.sampler_log_probs.clone().requires_grad_()
    inputs = LossInputs.of(batch, log_probs, torch.zeros(len(log_probs)), old_log_probs=log_probs, max_new_tokens=10)
    settings = CorrectionsConfig(weight="truncate", geometric=[0.999, 1.001], max_k3=1e-3, opsm_delta=0.0)
    corrected, stats = correct(inputs, settings)
    assert torch.equal(corrected.advantages, inputs.advantages * batch.loss_mask)
    assert stats["corrections/masked_tokens"] == stats["corrections/masked_sequences"] == 0
    assert correct(inputs, CorrectionsConfig()) == (inputs, {})


@pytest.mark.parametrize("settings, is_exact", [
    (CorrectionsConfig(weight="truncate", level="sequence", high=1e6), True),
    (CorrectionsConfig(weight="truncate", high=1e6), False), (CorrectionsConfig(), False),
    (CorrectionsConfig(weight="truncate", level="sequence", high=1.1), False)], ids=["sequence", "token", "none", "truncated"])
def test_the_expected_gradient_is_the_policy_gradient_only_with_whole_sequence_ratios(settings, is_exact):
    """All 9 sequences of two tokens of three, the second token's distribution depending on the first: sum over them of the
    sampler's probability times the gradient of each one's loss, against that of the expected reward."""
    generator = torch.Generator().manual_seed(0)
    policy = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((3,), (3, 3))]
    sampler = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3))]

    def log_probs(tables, first, second):
        return torch.stack([tables[0].log_softmax(-1)[first], tables[1].log_softmax(-1)[first, second]])

    rewards = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    value, surrogate = 0.0, 0.0
    for first, second in itertools.product(range(3), range(3)):
        own, others = log_probs(policy, first, second), log_probs(sampler, first, second)
        value = value + own.sum().exp() * rewards[first, second]
        inputs = LossInputs(
            log_probs=own, entropy=torch.zeros(2), old_log_probs=own.detach(), sampler_log_probs=others, ref_log_probs=None,
            full_kl=None, advantages=rewards[first, second].expand(2), loss_mask=torch.ones(2, dtype=torch.bool),
            sequence_ids=torch.zeros(2, dtype=torch.int64), sequence_lengths=torch.tensor([2]), rewards=torch.zeros(1),
            group_ids=torch.zeros(1), group_lengths=torch.tensor([2]),
            token_index=torch.arange(2), spans=[(0, 2)],
            num_policy_tokens=1, num_sequences=1, num_prompts=1, max_new_tokens=2)
        loss, _ = DAPO(correct(inputs, settings)[0])
        surrogate = surrogate - others.sum().exp() * loss
    exact, expected = (torch.cat([grad.flatten() for grad in torch.autograd.grad(total, policy, retain_graph=True)])
                       for total in (value, surrogate))
    error = float((expected - exact).norm() / exact.norm())
    assert error < 1e-8 if is_exact else error > 0.05, error


@pytest.mark.parametrize("words, key", [
    (["corrections.geometric=[1.1,1.2]"], "corrections.geometric"), (["corrections.low=2"], "corrections.low"),
    (["corrections.weight=clip"], "corrections.weight"),
    (["corrections.weight=mask", "optim.old_log_probs=sampler"], "optim.old_log_probs")])
def test_settings_that_make_no_sense_are_refused(words, key):
    with pytest.raises(ConfigError, match=rf"(?m)^{key} = "):
        load_config("train", ["name=x", *words])
    load_config("train", ["name=x", "corrections.opsm_delta=0.0001", "optim.old_log_probs=sampler"])
