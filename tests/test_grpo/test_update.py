"""The update against a restatement in plain loops: one completion and one token at a time, no packing, masks or micro-batches.

Compared are the gradient of every trained parameter in every update, the loss and all metrics. The sampler's log-probs differ
from the policy's, and the reference's from both, so that none can stand in for another.
"""

import copy
import itertools
import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from grpo.batch import Completion, Prompt, Segment, minibatches, pack
from grpo.config import ConfigError, CorrectionsConfig, LrSchedule, OldLogProbs
from grpo.configuration.algorithm import Estimator, KlConfig, KlReference
from grpo.configuration.launch import load_config
from grpo.groups import Groups
from grpo.kl import Reference
from grpo.losses import ppo
from grpo.rollout.session import Interrupted
from grpo.run.start import Run, make_optimizer
from grpo.update import update
from models.config import GptOssConfig
from models.gpt_oss import GptOss
from models.lora import LoraConfig, attach_lora, set_full_training

SEED, STEP, TEMPERATURE, LR = 5, 3, 0.7, 0.3
LOW, HIGH, COEFFICIENT = 0.2, 0.28, 0.3
NORMALIZERS = {"dapo": "token", "grpo": "sequence"}
DAPO = partial(ppo, normalizer="token", clip_low=LOW, clip_high=HIGH)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "router", "experts"]


class Sgd:
    """In the optimizer's place: keeps each update's gradients and takes steps of one length, so that the next update sees
    another policy."""

    def __init__(self, policy):
        self.params, self.gradients, self.lr = policy.trainable_parameters(), [], LR

    def allocate_gradients(self):
        pass

    is_updating = False

    def backward(self, loss, *, updates):
        assert not updates
        loss.backward()

    def zero_grad(self):
        for parameter in self.params.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self):
        self.gradients.append({name: parameter.grad.clone() for name, parameter in self.params.items()})
        for parameter in self.params.values():
            parameter -= self.lr * parameter.grad / norm(self.gradients[-1])
        return norm(self.gradients[-1])


def norm(gradients):
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


class Warnings(list):
    warn = list.append


def build_policy(*, trains: str) -> GptOss:
    config = GptOssConfig(vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2, sliding_window=4,
                          layer_types=["sliding_attention", "full_attention"])
    policy = GptOss(config, dtype=torch.float32, device="cpu", experts="bf16")
    policy.init_weights(seed=1)
    with torch.no_grad():
        policy.lm_head.weight.mul_(20)  # far enough from uniform
    if trains == "all":
        set_full_training(policy)
    else:
        trains_norms = trains == "adapter, norms and sinks"
        attach_lora(policy, LoraConfig(2, 4.0, TARGETS, train_sinks=trains_norms, train_norms=trains_norms), seed=2)
    return policy


@torch.no_grad()
def move(policy: GptOss, *, seed: int, size: float) -> None:
    """As training or a loaded adapter would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_parameters().values():
        parameter += size * torch.randn(parameter.shape, generator=generator)


def draw_completions(policy: GptOss) -> tuple[list[Completion], list[float]]:
    """Three groups of two, of many lengths, some with tokens of an environment inside."""
    rng = random.Random(7)

    def tokens(count):
        return [rng.randrange(13) for _ in range(count)]

    completions = []
    for group, sample in itertools.product(range(3), range(2)):
        prompt = Prompt(group, completions[-1].prompt.token_ids if sample else tokens(2 + group), {})
        segments = [Segment(prompt.token_ids, "prompt"), Segment(tokens(1 + (group + 2 * sample) % 5), "policy", [])]
        if sample == 1:
            segments += [Segment(tokens(2), "env"), Segment(tokens(3), "policy", [])]
        completion = Completion(prompt, sample, segments, "stop")
        log_probs = iter([log_prob.item() + rng.gauss(0, 0.3) for log_prob, *_ in score(policy, completion)])
        for segment in segments[1:]:
            segment.log_probs = [next(log_probs) for _ in segment.token_ids] if segment.source == "policy" else None
        completions.append(completion)
    return completions, [rng.gauss(0, 1) for _ in completions]


def score(policy: GptOss, completion: Completion) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Log-prob, entropy and all log-probs [V] at each of the policy's tokens, by a softmax over the logits of this sequence
    alone."""
    ids = [token for segment in completion.segments for token in segment.token_ids]
    sampled = [segment.source == "policy" for segment in completion.segments for _ in segment.token_ids]
    logits = policy.logits(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
    table = (logits / TEMPERATURE).log_softmax(-1)
    entropy = -(table.exp() * table).sum(-1)
    return [(table[i - 1, ids[i]], entropy[i - 1], table[i - 1]) for i in range(len(ids)) if sampled[i]]


def restate(policy, reference, completions, advantages, *, name, minibatches, epochs, old_log_probs, is_full):
    """The gradients of each update and the step's metrics."""
    num_updates, gradients, losses, tokens = minibatches * epochs, [], [], []
    with torch.no_grad():
        start = [[float(log_prob) for log_prob, *_ in score(policy, completion)] for completion in completions]
        held = [[(float(log_prob), table) for log_prob, _, table in score(reference, completion)] for completion in completions]
    sampled = [[x for segment in completion.segments for x in segment.log_probs or []] for completion in completions]
    for epoch in range(epochs):
        rows = list(range(len(completions)))
        if minibatches > 1:
            random.Random(hash((SEED, STEP, epoch))).shuffle(rows)
        for part in (rows[i::minibatches] for i in range(minibatches)):
            loss, num_tokens = torch.tensor(0.0), sum(len(start[row]) for row in part)
            for row in part:
                weight = 1 / num_tokens if name == "dapo" else 1 / (len(part) * len(start[row]))
                for t, (log_prob, entropy, table) in enumerate(score(policy, completions[row])):
                    value, advantage = log_prob.detach(), advantages[row]
                    old = sampled[row][t] if old_log_probs == "sampler" else start[row][t] if num_updates > 1 else value
                    ratio = (log_prob - old).exp()
                    clipped = min(max(ratio, torch.tensor(1 - LOW)), torch.tensor(1 + HIGH))
                    loss = loss - weight * min(ratio * advantage, clipped * advantage)
                    gap = log_prob - held[row][t][0]
                    k3 = (-gap).exp() - 1 + gap if gap > -math.log(10) else 9 + 10 * (-gap - math.log(10)) + gap  # its tangent
                    penalty = (value - sampled[row][t]).exp().clamp(max=10) * k3
                    if is_full:
                        penalty = (table.exp() * (table - held[row][t][1])).sum()
                    loss = loss + (COEFFICIENT * penalty / num_tokens if reference is not policy else 0)
                    tokens.append({"kl": penalty.item(), "ratio": ratio.item(), "low": advantage < 0 and ratio < 1 - LOW,
                                   "high": advantage > 0 and ratio > 1 + HIGH, "is_first": not gradients,
                                   "entropy": entropy.item(), "off": (value - sampled[row][t]).item()})
            names, parameters = zip(*policy.trainable_parameters().items())
            gradients.append(dict(zip(names, torch.autograd.grad(loss, parameters))))
            losses.append(loss.item())
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients[-1].values()):
                    parameter -= LR * gradient / norm(gradients[-1])
    first = [token for token in tokens if token["is_first"]]
    mean = {name: sum(token[name] for token in tokens) / len(tokens) for name in ("kl", "ratio", "low", "high")}
    return gradients, {
        "loss": sum(losses) / num_updates, "grad_norm": max(map(norm, gradients)), "lr": LR,
        "clip_ratio/low": float(mean["low"]), "clip_ratio/high": float(mean["high"]), "ratio/mean": mean["ratio"],
        "ratio/max": max(token["ratio"] for token in tokens),
        "approx_kl": sum(token["ratio"] - 1 - math.log(token["ratio"]) for token in tokens) / len(tokens),
        "entropy": sum(token["entropy"] for token in first) / len(first),
        "sampling/log_prob_diff/mean": sum(abs(token["off"]) for token in first) / len(first),
        "sampling/log_prob_diff/max": max(abs(token["off"]) for token in first),
        "sampling/kl": sum(math.exp(token["off"]) - 1 - token["off"] for token in first) / len(first),
        **({"kl": mean["kl"]} if reference is not policy else {})}


@pytest.fixture(scope="module")
def config():
    return load_config("train", ["+experiment=smoke", "name=test", f"seed={SEED}", f"rollout.temperature={TEMPERATURE}"])


# What the policy is held to -> what trains, and how far it is from the base when GRPO starts
REFERENCES = {
    "no penalty": ("adapter", 0.2), "a fresh adapter": ("adapter", 0.0), "a loaded adapter": ("adapter", 0.2),
    "trained norms": ("adapter, norms and sinks", 0.2), "the base": ("adapter, norms and sinks", 0.2),
    "full training": ("all", 0.0)}


def compare(config, tmp_path, *, held_to, name, minibatches, epochs, old_log_probs, share_prompts, max_tokens=40,
            estimator=Estimator.k3):
    trains, loaded = REFERENCES[held_to]
    policy = build_policy(trains=trains)
    base = copy.deepcopy(policy), Reference.of(policy)
    move(policy, seed=3, size=loaded)
    start = copy.deepcopy(policy), Reference.of(policy)
    held, reference = base if held_to == "the base" else start
    move(policy, seed=4, size=0.05)
    completions, advantages = draw_completions(policy)
    restated = copy.deepcopy(policy)
    gradients, metrics = restate(restated, restated if held_to == "no penalty" else held, completions, advantages, name=name,
                                 minibatches=minibatches, epochs=epochs, old_log_probs=old_log_probs,
                                 is_full=estimator == Estimator.full)

    settings = replace(
        config, kl=KlConfig(0.0 if held_to == "no penalty" else COEFFICIENT, estimator, KlReference.start),
        optim=replace(config.optim, minibatches=minibatches, epochs=epochs, old_log_probs=OldLogProbs(old_log_probs),
                      share_prompts=share_prompts, max_tokens=max_tokens))
    run = Run(settings, tmp_path, policy, None, None, partial(ppo, normalizer=NORMALIZERS[name], clip_low=LOW, clip_high=HIGH),
              None, Warnings(), lambda: False, optimizer=Sgd(policy), step=STEP,
              reference=None if held_to == "no penalty" else reference)
    measured = update(run, Groups(completions, advantages, []))
    assert len(run.optimizer.gradients) == len(gradients) == minibatches * epochs
    for own, expected in zip(run.optimizer.gradients, gradients):
        assert own.keys() == expected.keys()
        for key in own:
            error = float((own[key] - expected[key]).norm())  # of rounding: in fp32, over up to four updates
            assert error < 3e-4 * float(expected[key].norm()) + 1e-5 * norm(expected), (key, error)
    for key, value in metrics.items():
        assert measured[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    return measured


@pytest.mark.parametrize("share_prompts", [False, True], ids=["whole", "shared"])
@pytest.mark.parametrize("old_log_probs", ["trainer", "sampler"])
@pytest.mark.parametrize("minibatches, epochs", [(1, 1), (2, 2)], ids=["one update", "four updates"])
@pytest.mark.parametrize("held_to", REFERENCES)
def test_gradients_loss_and_metrics_are_those_restated(config, tmp_path, held_to, minibatches, epochs, old_log_probs,
                                                       share_prompts):
    measured = compare(config, tmp_path, held_to=held_to, name="dapo", minibatches=minibatches, epochs=epochs,
                       old_log_probs=old_log_probs, share_prompts=share_prompts)
    is_on_policy = old_log_probs == "trainer" and epochs == 1
    assert (measured["ratio/max"] == 1) == is_on_policy
    assert (measured["clip_ratio/low"] + measured["clip_ratio/high"] > 0) != is_on_policy  # the comparison has something to see
    assert (measured["update/frac_tokens_shared"] > 0) == share_prompts


@pytest.mark.parametrize("share_prompts", [False, True], ids=["whole", "shared"])
@pytest.mark.parametrize("max_tokens", [15, 1000])
def test_the_mean_over_sequences_is_the_restated_one_in_any_micro_batches(config, tmp_path, share_prompts, max_tokens):
    compare(config, tmp_path, held_to="trained norms", name="grpo", minibatches=2, epochs=1, old_log_probs="sampler",
            share_prompts=share_prompts, max_tokens=max_tokens)


@pytest.mark.parametrize("share_prompts", [False, True], ids=["whole", "shared"])
@pytest.mark.parametrize("held_to, epochs", [("a loaded adapter", 1), ("the base", 2), ("full training", 2)])
def test_the_full_kl_is_the_restated_one_in_any_micro_batches(config, tmp_path, held_to, epochs, share_prompts):
    for max_tokens in (15, 1000):
        measured = compare(config, tmp_path, held_to=held_to, name="dapo", minibatches=epochs, epochs=epochs,
                           estimator=Estimator.full, old_log_probs="sampler", share_prompts=share_prompts, max_tokens=max_tokens)
        assert measured["kl"] > 1e-3


def make_run(config, tmp_path, policy, *, optimizer, loss_fn=DAPO, **optim):
    settings = replace(config, optim=replace(config.optim, max_tokens=1000, **optim))
    return Run(settings, tmp_path, policy, None, None, loss_fn, None, Warnings(), lambda: False, optimizer=optimizer)


def test_the_schedule_follows_the_steps_whether_or_not_they_have_a_live_group(config, tmp_path):
    policy = build_policy(trains="adapter")
    settings = replace(config, steps=4, optim=replace(config.optim, lr=0.1, schedule=LrSchedule.linear, warmup_steps=0,
                                                      minibatches=2, epochs=2, final_lr_ratio=0.0))
    run = make_run(settings, tmp_path, policy, optimizer=make_optimizer(settings, policy))
    completions, advantages = draw_completions(policy)
    rates = []
    for run.step in range(4):
        groups = Groups([], [], []) if run.step % 2 else Groups(completions, advantages, [])
        rates.append(update(run, groups)["lr"])
    # 16 places, 4 of each step; an empty step shows its first one's rate, one with updates its last one's
    assert rates == pytest.approx([0.1 * (1 - place / 16) for place in (4, 5, 12, 13)])
    assert run.optimizer.num_updates == 8


def test_steps_without_a_live_group_have_no_loss_and_five_in_a_row_are_warned_of_once(config, tmp_path):
    policy = build_policy(trains="adapter")
    run = make_run(config, tmp_path, policy, optimizer=Sgd(policy))
    completions, advantages = draw_completions(policy)
    for run.step, is_live in enumerate([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]):
        run.metrics.clear()
        metrics = update(run, Groups(completions, advantages, []) if is_live else Groups([], [], []))
        assert math.isnan(metrics["loss"]) == math.isnan(metrics["grad_norm"]) == (not is_live)
        warned = [text for text in run.metrics if "nothing was learnt in the last 5 steps" in text]
        assert len(warned) == (run.step == 9)


@pytest.mark.parametrize("bounds, num_warnings", [([1.0, 1.0], 1), ([0.0, 1e9], 0)], ids=["nothing is left", "all is left"])
def test_corrections_that_leave_nothing_to_learn_are_warned_of_once(config, tmp_path, bounds, num_warnings):
    policy = build_policy(trains="adapter")
    settings = replace(config, corrections=CorrectionsConfig(geometric=bounds))
    run = make_run(settings, tmp_path, policy, optimizer=make_optimizer(settings, policy))
    for run.step in range(2):
        metrics = update(run, Groups(*draw_completions(policy), []), staleness=1)
        assert (metrics["corrections/masked_tokens"] == 1) == bool(num_warnings)
    assert [text.partition(",")[0] for text in run.metrics if "corrections" in text] == [
        "step 1: corrections give every token the weight 0"] * num_warnings


@pytest.mark.parametrize("is_live", [True, False])
def test_a_gradient_of_zero_is_warned_of_once(config, tmp_path, is_live):
    policy = build_policy(trains="adapter")
    run = make_run(config, tmp_path, policy, optimizer=make_optimizer(config, policy))
    completions, advantages = draw_completions(policy)
    for run.step in range(2):
        update(run, Groups(completions, advantages if is_live else [0.0] * len(advantages), []))
    assert [text[:25] for text in run.metrics if "the gradient is 0" in text] == ["step 1: the gradient is 0"] * (not is_live)


def test_a_loss_that_breaks_its_contract_in_the_middle_is_named(config, tmp_path):
    policy = build_policy(trains="adapter")
    run = make_run(config, tmp_path, policy, optimizer=Sgd(policy), loss_fn=lambda inputs: inputs.log_probs.sum())
    with pytest.raises(ConfigError, match=r"grpo.losses.ppo.*no pair. A loss is called as"):
        update(run, Groups(*draw_completions(policy), []))


def test_metrics_of_a_loss_are_means_over_its_tokens(config, tmp_path):
    def loss_fn(inputs):
        count = inputs.loss_mask.sum()
        stats = {"mine": 3.0 * count, "mine/max": len(inputs.loss_mask)}
        return inputs.log_probs.sum() / inputs.num_policy_tokens, stats

    policy = build_policy(trains="adapter")
    completions, advantages = draw_completions(policy)
    run = make_run(config, tmp_path, policy, optimizer=Sgd(policy), loss_fn=loss_fn)
    metrics = update(run, Groups(completions, advantages, []))
    assert metrics["mine"] == pytest.approx(3.0) and metrics["mine/max"] == sum(item.num_tokens for item in completions)
    assert metrics["loss"] < 0 and metrics["entropy"] < 3 and metrics["lr"] == LR
    assert metrics["update/trained_tokens"] == sum(item.num_policy_tokens for item in completions)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_a_loss_may_use_the_entropy_and_gets_its_gradient(config, tmp_path, share_prompts):
    policy = build_policy(trains="adapter")
    move(policy, seed=3, size=0.2)
    completions, advantages = draw_completions(policy)
    parameters = policy.trainable_parameters()
    scores = [pair for completion in completions for pair in score(policy, completion)]
    terms = torch.stack([-log_prob - 2 * entropy for log_prob, entropy, _ in scores])
    expected = dict(zip(parameters, torch.autograd.grad(terms.mean(), list(parameters.values()))))

    def loss_fn(inputs):
        return (-inputs.log_probs - 2 * inputs.entropy)[inputs.loss_mask].sum() / inputs.num_policy_tokens, {}

    run = make_run(config, tmp_path, policy, optimizer=Sgd(policy), share_prompts=share_prompts, loss_fn=loss_fn)
    assert update(run, Groups(completions, advantages, []))["loss"] == pytest.approx(terms.mean().item(), rel=1e-5)
    for name, gradient in run.optimizer.gradients[0].items():
        assert float((gradient - expected[name]).norm()) < 3e-4 * float(expected[name].norm()) + 1e-5 * norm(expected), name


def test_a_step_is_abandoned_before_its_first_update_and_finished_after_it(config, tmp_path):
    policy = build_policy(trains="adapter")
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    run = make_run(config, tmp_path, policy, optimizer=Sgd(policy), minibatches=2)
    run.should_stop = lambda: True
    groups = Groups(*draw_completions(policy), [])
    with pytest.raises(Interrupted, match="step 1 abandoned before its update"):
        update(run, groups)
    assert all(torch.equal(parameter, old) for parameter, old in zip(policy.parameters(), before))
    assert all(parameter.grad is None for parameter in policy.parameters()) and run.is_between_steps
    run.should_stop = lambda: len(run.optimizer.gradients) > 0
    update(run, groups)
    assert len(run.optimizer.gradients) == 2 and not run.is_between_steps


def test_a_forward_finds_the_gradients_memory_taken_and_nothing_holds_it_after_the_update(config, tmp_path, monkeypatch):
    policy = build_policy(trains="adapter")
    parameters, seen, original = policy.trainable_parameters(), [], policy.scores

    def scores(*args, **settings):
        seen.append(all(parameter.grad is not None for parameter in parameters.values()))
        return original(*args, **settings)

    monkeypatch.setattr(policy, "scores", scores)
    update(make_run(config, tmp_path, policy, optimizer=make_optimizer(config, policy)), Groups(*draw_completions(policy), []))
    assert seen and all(seen) and all(parameter.grad is None for parameter in parameters.values())


def recorded(calls, function):
    calls.append(function())


@pytest.mark.parametrize("trains", ["adapter", "all"])
def test_an_update_in_the_backward_has_the_bits_of_one_after_it_and_keeps_no_gradient(config, tmp_path, trains):
    found = []
    for in_backward in (False, True):
        policy = build_policy(trains=trains)
        move(policy, seed=3, size=0.2)
        settings = replace(config, optim=replace(config.optim, max_grad_norm=None, lr=0.01, in_backward=in_backward))
        run = make_run(settings, tmp_path, policy, optimizer=make_optimizer(settings, policy))
        run.should_stop = partial(bool, in_backward)  # too late: the update is begun
        allocated = []
        run.optimizer.allocate_gradients = partial(recorded, allocated, run.optimizer.allocate_gradients)
        metrics = update(run, Groups(*draw_completions(build_policy(trains=trains)), []))
        assert bool(allocated) != in_backward and run.optimizer.num_updates == 1 and not run.is_between_steps
        found.append((dict(policy.named_parameters()), run.optimizer.state_dict(), metrics["grad_norm"]))
    (weights, state, norm), (weights_in, state_in, norm_in) = found
    assert all(torch.equal(weights[name], weights_in[name]) for name in weights)
    assert all(torch.equal(state[name], state_in[name]) for name in state)
    assert norm_in == pytest.approx(norm, rel=1e-6) and norm > 0


def test_an_update_in_the_backward_of_several_micro_batches_is_made_after_them(config, tmp_path):
    weights = []
    for in_backward in (False, True):
        policy = build_policy(trains="all")
        settings = replace(config, optim=replace(config.optim, max_grad_norm=None, in_backward=in_backward))
        run = make_run(settings, tmp_path, policy, optimizer=make_optimizer(settings, policy))
        run.config.optim.max_tokens = 20
        update(run, Groups(*draw_completions(policy), []))
        weights.append(list(policy.parameters()))
    assert all(torch.equal(*pair) for pair in zip(*weights))


def spied_records(policy, monkeypatch):
    """The record of each forward of the policy from now on."""
    records, original = [], policy.scores

    def scores(*args, record, **settings):
        records.append(record)
        return original(*args, record=record, **settings)

    monkeypatch.setattr(policy, "scores", scores)
    return records


def own_choices(policy, completion):
    """[tokens, L, A] of a forward of one sequence, read where each layer's router answers."""
    found, ids = [], [token for segment in completion.segments for token in segment.token_ids]
    hooks = [block.mlp.router.register_forward_hook(lambda module, args, logits: found.append(logits.topk(2)[1]))
             for block in policy.model.layers]
    with torch.no_grad():
        policy.logits(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
    for hook in hooks:
        hook.remove()
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_later_updates_take_the_experts_of_the_policy_before_the_first_and_the_router_learns(config, tmp_path, monkeypatch,
                                                                                             share_prompts):
    gradients, chosen = [], []
    for replays in (False, True):
        policy = build_policy(trains="adapter")
        move(policy, seed=3, size=0.2)
        completions, advantages = draw_completions(policy)
        before = torch.cat([own_choices(policy, completion) for completion in completions])
        run = make_run(config, tmp_path, policy, optimizer=Sgd(policy), epochs=3, minibatches=1, replay_routing=replays,
                       share_prompts=share_prompts)
        run.optimizer.lr = 3.0  # far enough for the router to choose others
        with monkeypatch.context() as patched:
            records = spied_records(policy, patched)
            metrics = update(run, Groups(completions, advantages, []))
        gradients.append(run.optimizer.gradients)
        chosen.append([None if record is None else record.recorded for record in records[1:]])
        after = torch.cat([own_choices(policy, completion) for completion in completions])
        assert (before != after).any()
        assert metrics["update_1/ratio/max"] == 1 < metrics["update_3/ratio/max"]
    batch = pack(completions, advantages)
    micro = batch.select(list(range(len(completions))), share_prompts=share_prompts)
    assert chosen[0] == [None] * 3
    for recorded in chosen[1]:
        assert torch.equal(recorded.long().sort(-1)[0], before[micro.token_index].sort(-1)[0])
    plain, replayed = gradients
    assert all(torch.equal(plain[0][name], replayed[0][name]) for name in plain[0])  # the first update: nothing changes
    assert any(not torch.equal(plain[2][name], replayed[2][name]) for name in plain[2])
    routers = [name for name in plain[2] if "router.lora" in name]
    assert routers and all(replayed[2][name].abs().max() > 0 for name in routers)


def test_each_update_of_a_batch_has_metrics_of_its_own(config, tmp_path):
    policy = build_policy(trains="adapter")
    run = make_run(config, tmp_path, policy, optimizer=Sgd(policy), epochs=2, minibatches=2)
    completions, advantages = draw_completions(policy)
    metrics = update(run, Groups(completions, advantages, []))
    losses = [metrics[f"update_{number}/loss"] for number in (1, 2, 3, 4)]
    assert metrics["loss"] == pytest.approx(sum(losses) / 4) and len(set(losses)) == 4
    norms = [metrics[f"update_{number}/grad_norm"] for number in (1, 2, 3, 4)]
    assert norms == [norm(gradients) for gradients in run.optimizer.gradients] and metrics["grad_norm"] == max(norms)
    assert metrics["update_1/clip_ratio/low"] == metrics["update_1/clip_ratio/high"] == metrics["update_1/approx_kl"] == 0
    assert metrics["update_4/approx_kl"] > 0
    single = make_run(config, tmp_path, build_policy(trains="adapter"), optimizer=Sgd(policy))
    single.optimizer = Sgd(single.policy)
    assert not any(name.startswith("update_") for name in update(single, Groups(completions, advantages, [])))


def test_minibatches_of_whole_prompts_are_of_groups_in_an_order_drawn_from_the_step():
    completions, advantages = draw_completions(build_policy(trains="adapter"))
    batch = pack(completions, advantages)
    orders = []
    for seed in range(4):
        parts = minibatches(batch, 3, seed=seed, whole_prompts=True)
        assert [(part.num_prompts, part.num_sequences) for part in parts] == [(1, 2)] * 3
        assert [part.num_policy_tokens for part in parts] == [int(part.loss_mask.sum()) for part in parts]
        orders.append([part.prompts[0][0] for part in parts])
        assert sorted(orders[-1]) == [0, 1, 2]
        assert [part.prompts for part in minibatches(batch, 3, seed=seed, whole_prompts=True)] == [part.prompts for part in parts]
    assert len(set(map(tuple, orders))) > 1
    apart = minibatches(batch, 3, seed=1)
    assert any(len({number for number, _ in part.prompts}) > 1 for part in apart)
