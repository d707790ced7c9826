"""Random episodes (of the slow tests a thousand) of 1 to 6 turns, with calls right and wrong, results, users who go on: which
tokens are trained on, with which log-probs, whatever happened to their rows."""

import random
from itertools import chain, product

import pytest
import torch
from harmony import encode_with_special
from rollout_problem import assert_equal
from scripted_turns import CALL, TOKENIZER, Env, Player, Tools, make_model

from grpo.batch import micro_batches, pack
from grpo.losses import LossInputs, ppo
from grpo.rollout.scheduler import Scheduler

NUM_SAMPLES = 4
ENDS = ["<|channel|>final<|message|>{}<|return|>"] * 3 + ["<|channel|>analysis<|message|>{}<|return|>"]


class Game(Tools):
    """Short results; the user goes on after every other answer."""

    def e(self, t: str) -> str:
        """Repeats."""
        return t * 3

    def user_turn(self, answer: str) -> str | None:
        return "on" if answer in "02468" else None


class GameEnv(Env):
    has_user_turns = True

    def episode(self, prompt, sample):
        return Game(prompt, sample)


def random_scripts(num_prompts: int) -> dict[tuple[int, int], list[str]]:
    rng = random.Random(0)
    calls = [CALL.replace("echo", "e").replace("{}", '{"t":"a"}'), CALL.replace("echo", "e"), CALL.replace("echo", "refuse"),
             "<|channel|>commentary<|message|>?<|call|>", "<|channel|>x<|channel|>y<|call|>"]
    scripts = {}
    for key in ((prompt, sample) for prompt in range(num_prompts) for sample in range(NUM_SAMPLES)):
        turns, num_turns, is_over = [], rng.randint(1, 6), False
        while not is_over:
            thought = rng.choice(["", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"])
            goes_on = len(turns) + 1 < num_turns
            if goes_on and rng.random() < 0.7:
                turns.append(thought + rng.choice(calls))
                continue
            end, answer = (ENDS[0], rng.choice("02468")) if goes_on else (rng.choice(ENDS), rng.choice("13579"))
            turns.append(thought + end.format(answer))
            is_over = not goes_on
        scripts[key] = turns
    return scripts


@pytest.fixture(scope="module")
def model(lively_model):
    return make_model(lively_model, num_hidden_layers=1, layer_types=["full_attention"], num_experts_per_tok=1, hidden_size=16,
                      intermediate_size=16, num_attention_heads=1, num_key_value_heads=1)


@pytest.fixture(scope="module", params=[60, pytest.param(250, marks=pytest.mark.slow)])
def scripts(request):
    return random_scripts(request.param)


@pytest.fixture(scope="module")
def episodes(model, scripts):
    """All of them, undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        return Player(model, patch)(scripts, env=GameEnv(), max_batch=200)[0]


def test_exactly_the_sampled_tokens_are_trained_on(scripts, episodes):
    for completion in episodes:
        sampled = [id for text in scripts[completion.prompt.id, completion.sample] for id in encode_with_special(TOKENIZER, text)]
        assert completion.finish_reason == "stop" and completion.episode.failure is None
        assert [id for id, is_own in zip(completion.completion_ids, completion.is_policy) if is_own] == sampled
    assert {sum(segment.source == "policy" for segment in one.segments) for one in episodes} == {1, 2, 3, 4, 5, 6}
    assert {len(one.sequences) for one in episodes} >= {1, 2, 3, 4}
    batch = pack(episodes, [0.0] * len(episodes))
    parts = [segment for completion in episodes for segment in completion.segments]
    assert batch.loss_mask.tolist() == list(chain(*([part.source == "policy"] * len(part.token_ids) for part in parts)))
    assert batch.num_sequences == len(scripts) < batch.num_rows and batch.num_prompts == len(scripts) // NUM_SAMPLES


def test_the_samplers_log_probs_are_the_trainers(model, episodes):
    largest = {1.0: 0.0, 0.9: 0.0}  # by the trainer's temperature; the sampler's is 1
    with torch.no_grad():
        for micro, temperature in product(micro_batches(pack(episodes, [0.0] * len(episodes)), 16_384), largest):
            log_probs, _ = model.log_probs(micro.tokens, micro.cu_seqlens, temperature=temperature, mask=micro.host_mask)
            difference = (log_probs - micro.sampler_log_probs)[micro.loss_mask].abs().max().item()
            largest[temperature] = max(largest[temperature], difference)
    assert largest[1.0] <= 1e-5 < 1e-2 < largest[0.9]


def test_what_stands_at_other_tokens_changes_no_loss_and_no_gradient(episodes):
    batch = pack(episodes, [float(index % 3 - 1) for index in range(len(episodes))])
    generator = torch.Generator().manual_seed(0)
    own, noise = (torch.randn(len(batch.tokens), generator=generator).abs().neg() for _ in range(2))
    found = []
    for other in (torch.zeros(len(own)), noise):
        log_probs = torch.where(batch.loss_mask, own, other).requires_grad_()
        old = torch.where(batch.loss_mask, batch.sampler_log_probs, other)
        inputs = LossInputs.of(batch, log_probs, own.abs(), old_log_probs=old, max_new_tokens=400)
        loss, _ = ppo(inputs, normalizer="sequence", clip_low=0.2, clip_high=0.2)
        loss.backward()
        found.append((loss.item(), log_probs.grad))
    assert found[0][0] == found[1][0] != 0 and torch.equal(found[0][1], found[1][1])
    assert (found[0][1][~batch.loss_mask] == 0).all()


def test_parked_preempted_and_resumed_rows_are_those_of_undisturbed_episodes(model, scripts, episodes, monkeypatch):
    """As on a GPU, where rows are decoded while tools run; with few slots, chunks of prefill, and rows that lose their pages."""
    rng, make_room = random.Random(1), Scheduler.make_room

    def disturb(scheduler, num_steps):
        preempted = make_room(scheduler, num_steps)
        if len(scheduler.live) > 1 and rng.random() < 0.2:
            if scheduler.chunked is not None:  # it loses its pages before live rows do
                scheduler._drop_chunked()
            preempted.append(scheduler.live.pop())
            scheduler._preempt(preempted[-1])
        if rng.random() < 0.5:
            scheduler._evict(scheduler.parked)
        return preempted

    monkeypatch.setattr(Scheduler, "make_room", disturb)
    monkeypatch.setattr("grpo.rollout.turns.overlaps", lambda device: True)
    chosen = {key: turns for key, turns in scripts.items() if key[0] < 12}
    found, stats = Player(model, monkeypatch)(chosen, env=GameEnv(), max_batch=24, max_prefill_tokens=48)
    assert stats.num_preemptions > 10
    assert_equal(found, episodes[:len(found)])
