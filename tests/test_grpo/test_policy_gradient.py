"""Policy gradients through a gpt-oss model so small that every completion, and every group of them, can be enumerated.

Vocabulary 0, 1, 2 with 0 as the stop token and at most two tokens after the prompt: 7 completions. Exact gradients come
from closed forms over the probabilities that plain softmax over `GptOss.logits` gives, never from the losses.
"""
from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from grpo.advantages import group_advantages
from grpo.batch import Completion, Prompt, Segment, micro_batches, pack
from grpo.kl import kl_penalty
from grpo.losses import LossInputs, ppo
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from models.config import GptOssConfig
from models.gpt_oss import GptOss
from models.lora import set_full_training

PROMPT = [2, 1]
VARIABLE = [[0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]  # stop at 0
FIXED = [list(pair) for pair in itertools.product(range(3), repeat=2)]  # 0 does not stop
TEMPERATURE = 0.7
NO_CLIP = dict(clip_low=0.2, clip_high=0.28)  # inactive while the old log-probs are the policy's own
LENGTH = 5.0
NORMALIZERS = {"grpo": "sequence", "dr_grpo": LENGTH, "dapo": "token"}
LOSSES = {name: partial(ppo, normalizer=normalizer, **NO_CLIP) for name, normalizer in NORMALIZERS.items()}


def tiny_model(vocab_size=3, seed=0):
    config = GptOssConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                          num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=3,
                          num_experts_per_tok=2, sliding_window=2, layer_types=["sliding_attention", "full_attention"])
    model = GptOss(config, dtype=torch.float32, device="cpu", experts="bf16")
    model.init_weights(seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():  # a policy far enough from uniform
        model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape, generator=generator) * 0.3)
    set_full_training(model)
    return model


def reward(tokens):
    return 1.0 + 2.0 * (tokens[-1] == 0) - 0.7 * len(tokens) + 0.4 * tokens[0] * tokens[-1]


def completions_of(space, prompt_id=0):
    return [Completion(Prompt(prompt_id, PROMPT, {}), i, [Segment(PROMPT, "prompt"),
            Segment(tokens, "policy", [0.0] * len(tokens))], "stop") for i, tokens in enumerate(space)]


def flat_gradient(scalar, model):
    gradients = torch.autograd.grad(scalar, list(model.trainable_parameters().values()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def exact_log_probs(model, space):
    """Log-probability of each whole completion by the textbook: softmax(logits / T), token by token. [N]"""
    result = []
    for tokens in space:
        sequence = torch.tensor(PROMPT + tokens)
        logits = model.logits(sequence, torch.tensor([0, len(sequence)], dtype=torch.int32))
        table = torch.log_softmax(logits / TEMPERATURE, dim=-1)
        result.append(sum(table[len(PROMPT) - 1 + i, token] for i, token in enumerate(tokens)))
    return torch.stack(result)


def trained_log_probs(model, space):
    """For each completion, the trainer's log-probs of its packed sequence. list of [T_i]"""
    batch = pack(completions_of(space), [0.0] * len(space))
    log_probs, _ = model.log_probs(batch.tokens, batch.cu_seqlens, temperature=TEMPERATURE, mask=batch.loss_mask)
    return list(log_probs.split(batch.cu_seqlens.diff().tolist()))


def inputs_of(batch, log_probs, old_log_probs):
    return LossInputs.of(batch, log_probs, torch.zeros_like(log_probs), old_log_probs=old_log_probs, max_new_tokens=2)


def group_loss(loss_fn, log_probs, space, group, *, scale, old_log_probs=None):
    """The loss of a step that consists of one group (indices into the completions)."""
    completions = completions_of([space[i] for i in group])
    rewards = [reward(space[i]) for i in group]
    batch = pack(completions, group_advantages(rewards, [0] * len(group), baseline="group", scale=scale))
    packed = torch.cat([log_probs[i] for i in group])
    old = packed.detach() if old_log_probs is None else torch.cat([old_log_probs[i] for i in group])
    return loss_fn(inputs_of(batch, packed, old))[0]


def exact_objective(name, log_p, space, group_size, *, scale="none"):
    """A scalar whose gradient is the exact expectation of the loss's gradient for one group of `group_size`.

    E[sum_i A_i w_i grad log p_i] with A_i = R_i - mean: for weights w of the completion alone this is
    (G - 1) (grad E[w R] - E[R] grad E[w]); the second term is the bias by length that grpo's 1/|o| brings."""
    p = log_p.exp()
    rewards = torch.tensor([reward(tokens) for tokens in space])
    lengths = torch.tensor([float(len(tokens)) for tokens in space])
    if name != "dapo":
        weight = 1 / lengths if name == "grpo" else torch.full_like(lengths, 1 / LENGTH)
        mean_reward = (p * rewards).sum().detach()
        return -((p * weight * rewards).sum() - mean_reward * (p * weight).sum()) * (group_size - 1) / group_size
    # dapo's denominator couples the group: for a pair, -(A_a l_a + A_b l_b) / (|a| + |b|) with A_a = (R_a - R_b) / 2,
    # or, divided by the sample standard deviation |R_a - R_b| / sqrt 2, its sign / sqrt 2
    assert group_size == 2, group_size
    gap = rewards[:, None] - rewards[None, :]
    advantage = gap.sign() / 2 ** 0.5 if scale == "group" else gap / 2
    joint = (p[:, None] * p[None, :]).detach()
    pair = advantage * (log_p[:, None] - log_p[None, :]) / (lengths[:, None] + lengths[None, :])
    return -(joint * pair).sum()


def assert_gradients_close(actual, expected, tolerance):
    scale = expected.norm()
    assert scale > 1e-3, scale
    error = ((actual - expected).norm() / scale).item()
    assert error < tolerance, (error, tolerance)


@pytest.mark.parametrize("space", [VARIABLE, FIXED], ids=["variable", "fixed"])
def test_the_completions_are_all_there_are(space):
    with torch.no_grad():
        assert exact_log_probs(tiny_model(), space).exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("space", [VARIABLE, FIXED], ids=["variable", "fixed"])
@pytest.mark.parametrize("name, group_size", [("grpo", 3), ("dr_grpo", 3), ("dapo", 2)])
def test_the_expected_gradient_over_all_groups_is_the_exact_one(name, group_size, space):
    model = tiny_model()
    log_p = exact_log_probs(model, space)
    p = log_p.detach().exp()
    log_probs = trained_log_probs(model, space)
    expectation = sum(p[list(group)].prod() * group_loss(LOSSES[name], log_probs, space, group, scale="none")
                      for group in itertools.product(range(len(space)), repeat=group_size))
    exact = flat_gradient(exact_objective(name, log_p, space, group_size), model)
    assert_gradients_close(flat_gradient(expectation, model), exact, 1e-5)


def test_the_expected_gradient_with_standardised_advantages_is_the_exact_one():
    model = tiny_model()
    log_p = exact_log_probs(model, VARIABLE)
    p = log_p.detach().exp()
    log_probs = trained_log_probs(model, VARIABLE)
    expectation = sum(p[a] * p[b] * group_loss(LOSSES["dapo"], log_probs, VARIABLE, (a, b), scale="group")
                      for a in range(7) for b in range(7))
    exact = flat_gradient(exact_objective("dapo", log_p, VARIABLE, 2, scale="group"), model)
    assert_gradients_close(flat_gradient(expectation, model), exact, 2e-5)  # STD_EPS / smallest gap is 5e-6


@pytest.mark.parametrize("name", LOSSES)
def test_with_completions_of_one_length_every_loss_climbs_the_expected_reward(name):
    """-(G - 1) / G grad E[R], divided by the length (grpo, dapo) or by the constant (dr_grpo)."""
    model = tiny_model()
    log_p = exact_log_probs(model, FIXED)
    p = log_p.detach().exp()
    log_probs = trained_log_probs(model, FIXED)
    expectation = sum(p[a] * p[b] * group_loss(LOSSES[name], log_probs, FIXED, (a, b), scale="none")
                      for a in range(9) for b in range(9))
    climb = flat_gradient((log_p.exp() * torch.tensor([reward(tokens) for tokens in FIXED])).sum(), model)
    assert_gradients_close(flat_gradient(expectation, model), -climb / 2 / (LENGTH if name == "dr_grpo" else 2), 1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_monte_carlo_gradient_converges_to_the_exact_one(name):
    """Groups of two drawn from the policy; the mean over N of them nears the exact gradient as 1 / sqrt N."""
    model = tiny_model()
    log_p = exact_log_probs(model, VARIABLE)
    p = log_p.detach().exp()
    log_probs = trained_log_probs(model, VARIABLE)
    exact = flat_gradient(exact_objective(name, log_p, VARIABLE, 2), model)
    # the gradient of each possible step, by the chain rule through the packed log-probs: [49, P]
    gradients = torch.stack([flat_gradient(group_loss(LOSSES[name], log_probs, VARIABLE, divmod(i, 7),
                                                      scale="none"), model) for i in range(49)])
    probabilities = (p[:, None] * p[None, :]).flatten()
    deviation = (probabilities @ (gradients - exact).square().sum(1)).sqrt()  # of one group's gradient
    generator = torch.Generator().manual_seed(5)
    for num_groups in (1_000, 100_000, 4_000_000):
        draws = torch.multinomial(p.double(), 2 * num_groups, replacement=True, generator=generator).view(-1, 2)
        counts = torch.bincount(draws[:, 0] * 7 + draws[:, 1], minlength=49)
        error = ((counts.float() / num_groups) @ gradients - exact).norm()
        assert error < 3 * deviation / num_groups ** 0.5, (num_groups, error, deviation)
    assert error < 0.01 * exact.norm(), (error, exact.norm())


def test_a_large_step_of_really_sampled_groups_nears_its_exact_gradient():
    """Sampler to gradient: with many groups the normalisers near their means, so each loss has a closed form."""
    model, num_groups, group_size = tiny_model(), 1500, 2
    prompts = [Prompt(i, PROMPT, {}) for i in range(num_groups)]
    completions = Sampler(model, [0], max_batch=2 * num_groups, seed=0).generate(
        prompts, SamplingParams(max_new_tokens=2, temperature=TEMPERATURE), step=0, num_samples=group_size)
    rewards = [reward(completion.completion_ids) for completion in completions]
    batch = pack(completions, group_advantages(rewards, [completion.prompt.id for completion in completions],
                                               baseline="group", scale="none"))
    log_probs, _ = model.log_probs(batch.tokens, batch.cu_seqlens, temperature=TEMPERATURE, mask=batch.loss_mask)
    assert (log_probs - batch.sampler_log_probs).abs().max() < 1e-5

    log_p = exact_log_probs(model, VARIABLE)
    mean_length = (log_p.detach().exp() * torch.tensor([float(len(tokens)) for tokens in VARIABLE])).sum()
    climb = flat_gradient((log_p.exp() * torch.tensor([reward(tokens) for tokens in VARIABLE])).sum(), model)
    limits = {"dapo": -climb / 2 / mean_length, "dr_grpo": -climb / 2 / LENGTH,
              "grpo": flat_gradient(exact_objective("grpo", log_p, VARIABLE, 2), model)}
    for name, limit in limits.items():
        loss, _ = LOSSES[name](inputs_of(batch, log_probs, batch.sampler_log_probs))
        assert_gradients_close(flat_gradient(loss, model), limit, 0.1)


@pytest.mark.parametrize("name", LOSSES)
def test_off_policy_ratios_correct_the_gradient_of_single_tokens(name):
    """Groups drawn from an older policy: while nothing is clipped, r makes their expectation that of the new."""
    model, older = tiny_model(), tiny_model(seed=9)
    space = [[0], [1], [2]]
    p_old = exact_log_probs(older, space).detach().exp()
    log_p = exact_log_probs(model, space)
    log_probs, old = trained_log_probs(model, space), [part.detach() for part in trained_log_probs(older, space)]
    assert (log_p.exp() / p_old - 1).abs().max() > 0.2
    wide = dict(clip_low=1.0, clip_high=1e6)
    loss_fn = partial(ppo, normalizer=1.0 if name == "dr_grpo" else NORMALIZERS[name], **wide)
    expectation = sum(p_old[a] * p_old[b] * group_loss(loss_fn, log_probs, space, (a, b), scale="none",
                                                       old_log_probs=old) for a in range(3) for b in range(3))
    climb = flat_gradient((log_p.exp() * torch.tensor([reward(tokens) for tokens in space])).sum(), model)
    assert_gradients_close(flat_gradient(expectation, model), -climb / 2, 1e-5)


def random_batch(model):
    """Twelve completions in groups of three, some with tokens of an environment inside, several tokens off policy."""
    generator = torch.Generator().manual_seed(11)

    def draw(count):
        return torch.randint(0, model.config.vocab_size, (count,), generator=generator).tolist()

    completions = []
    for i in range(12):
        prompt = Prompt(i // 3, draw(2 + i % 4), {})
        segments = [Segment(prompt.token_ids, "prompt")]
        for turn in range(1 + i % 2):
            count = 1 + (5 * i + turn) % 7
            log_probs = (-1.5 + torch.randn(count, generator=generator)).tolist()
            segments += ([Segment(draw(3), "env")] if turn else []) + [Segment(draw(count), "policy", log_probs)]
        completions.append(Completion(prompt, i % 3, segments, "stop"))
    return completions, torch.randn(12, generator=generator).tolist()


def step_gradient(model, loss_fn, micros):
    for parameter in model.parameters():
        parameter.grad = None
    for micro in micros:
        log_probs, _ = model.log_probs(micro.tokens, micro.cu_seqlens, temperature=TEMPERATURE, mask=micro.loss_mask)
        micro.ref_log_probs = micro.sampler_log_probs - 0.1 * micro.loss_mask
        inputs = inputs_of(micro, log_probs, micro.sampler_log_probs)
        loss, _ = loss_fn(inputs)
        penalty, _ = kl_penalty(inputs, coefficient=0.1, estimator="k3")
        (loss + penalty).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_step_is_the_same_for_any_split_order_and_packing(name):
    model = tiny_model(vocab_size=11)
    completions, advantages = random_batch(model)
    batch = pack(completions, advantages)
    whole = step_gradient(model, LOSSES[name], [batch])
    order = [7, 0, 11, 3, 9, 1, 5, 10, 2, 8, 4, 6]
    reordered = pack([completions[i] for i in order], [advantages[i] for i in order])
    splits = {
        "one by one": [batch.select([row]) for row in range(12)],
        "uneven": [batch.select(rows) for rows in ([4], [0, 1, 2, 3], [11, 5, 6, 10, 7, 9, 8])],
        "budget of 30": micro_batches(batch, max_tokens=30),
        "other order": [reordered],
        "other order, budget of 45": micro_batches(reordered, max_tokens=45)[::-1],
    }
    for split, micros in splits.items():
        assert split == "other order" or len(micros) > 1
        error = ((step_gradient(model, LOSSES[name], micros) - whole).norm() / whole.norm()).item()
        assert error < 1e-6, (split, error)


def test_a_normaliser_counted_per_micro_batch_would_be_seen():
    """The check above has teeth: recounting in each micro-batch moves the gradient by far more than its tolerance."""
    model = tiny_model(vocab_size=11)
    batch = pack(*random_batch(model))
    whole = step_gradient(model, LOSSES["dapo"], [batch])
    recounted = [replace(micro, num_policy_tokens=int(micro.loss_mask.sum()))
                 for micro in micro_batches(batch, max_tokens=30)]
    assert (step_gradient(model, LOSSES["dapo"], recounted) - whole).norm() > 0.1 * whole.norm()
