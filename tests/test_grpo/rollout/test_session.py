"""The sampler against a loop without cache or batch, against the trainer's log-probs, and its scheduling."""

import random

import pytest
import torch

from grpo.batch import Prompt, pack
from grpo.rollout.sampling import SamplingParams, draw
from grpo.rollout.session import Interrupted, Sampler
from models.config import GptOssConfig
from models.expert_store import Placement
from models.gpt_oss import GptOss

VOCAB = 40
NO_STOP = ()


@pytest.fixture(scope="module")
def model(lively_model):
    """A windowed layer (window 8) and a full one; lively logits, sinks and biases."""
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=64,
    )
    return lively_model(config, head_factor=15.0)


def make_prompts(num_prompts, *, lengths=(1, 12), seed=0):
    rng = random.Random(seed)
    return [
        Prompt(id=i, token_ids=[rng.randrange(VOCAB) for _ in range(rng.randint(*lengths))], row={})
        for i in range(num_prompts)
    ]


def generate(
    model,
    prompts,
    *,
    stop_ids=NO_STOP,
    max_batch=64,
    seed=7,
    max_prefill_tokens=16384,
    step=3,
    num_samples=1,
    max_new_tokens=20,
    temperature=1.0,
    **settings,
):
    sampler = Sampler(model, stop_ids, max_batch=max_batch, seed=seed, max_prefill_tokens=max_prefill_tokens)
    completions = sampler.generate(
        prompts, SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, **settings), step=step,
        num_samples=num_samples,
    )
    return completions, sampler.last_stats


def by_key(completions):
    return {(c.prompt.id, c.sample): c for c in completions}


def assert_same_completions(actual, expected):
    actual, expected = by_key(actual), by_key(expected)
    assert actual.keys() == expected.keys()
    for key, completion in expected.items():
        assert actual[key].completion_ids == completion.completion_ids, key
        assert actual[key].finish_reason == completion.finish_reason, key
        log_probs = [segment.log_probs for segment in completion.segments[1:]]
        for ours, theirs in zip([s.log_probs for s in actual[key].segments[1:]], log_probs, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def full_logits(model, token_ids):
    """[V]: logits after the last token, by the training forward, without a cache."""
    with torch.no_grad():
        return model.logits(torch.tensor(token_ids), torch.tensor([0, len(token_ids)], dtype=torch.int32))[-1]


def sample_without_cache(model, prompt, sample, *, stop_ids, max_new_tokens, seed=7, step=3, **settings):
    ids, new = list(prompt.token_ids), []
    while len(new) < max_new_tokens and not (new and new[-1] in stop_ids):
        key = torch.tensor([[seed, step, prompt.id, sample, len(ids)]])
        new.append(draw(full_logits(model, ids)[None], key, **settings).tokens.item())
        ids.append(new[-1])
    return new


def trainer_log_probs(model, completions, temperature):
    batch = pack(completions, [0.0] * len(completions))
    with torch.no_grad():
        log_probs, _ = model.log_probs(
            batch.tokens, batch.cu_seqlens, temperature=temperature, mask=batch.loss_mask, kept=batch.kept
        )
    return batch, log_probs


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9}])
def test_completions_equal_a_loop_of_full_forwards_without_cache(model, settings):
    stop_ids = (3, 8, 17)
    prompts = make_prompts(4)
    completions, _ = generate(model, prompts, stop_ids=stop_ids, num_samples=3, max_new_tokens=24, **settings)
    assert [(c.prompt.id, c.sample) for c in completions] == [(p, s) for p in range(4) for s in range(3)]
    for completion in completions:
        expected = sample_without_cache(
            model, completion.prompt, completion.sample, stop_ids=stop_ids, max_new_tokens=24, **settings
        )
        assert completion.completion_ids == expected
        assert completion.finish_reason == ("stop" if expected[-1] in stop_ids else "length")
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert max(len(c.completion_ids) for c in completions) == 24  # three times around the ring of the windowed layers


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.7, "top_k": 10, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_sampler_log_probs_equal_the_trainers(model, settings):
    completions, _ = generate(model, make_prompts(6), stop_ids=(3,), num_samples=4, max_new_tokens=30, **settings)
    batch, log_probs = trainer_log_probs(model, completions, settings["temperature"])
    assert (batch.kept is not None) == ("top_p" in settings)
    torch.testing.assert_close(batch.sampler_log_probs, log_probs, rtol=0, atol=1e-5)
    assert log_probs[batch.loss_mask].std() > 0.5  # not a trivial agreement of constants


def test_log_probs_belong_to_the_filtered_distribution_and_kept_sets_hold_the_token(model):
    completions, _ = generate(model, make_prompts(3), num_samples=2, temperature=1.0, top_p=0.5)
    for completion in completions:
        policy = completion.segments[1]
        assert len(policy.kept_ids) == len(policy.log_probs) == len(policy.token_ids) == 20
        for t, (token, log_prob, kept) in enumerate(
            zip(policy.token_ids, policy.log_probs, policy.kept_ids, strict=True)
        ):
            probs = full_logits(model, completion.prompt.token_ids + policy.token_ids[:t]).double().softmax(-1)
            assert token in kept
            assert 0.5 - 1e-5 <= probs[kept].sum() and probs[kept].sum() - probs[kept].min() < 0.5 + 1e-5
            assert log_prob == pytest.approx((probs[token] / probs[kept].sum()).log().item(), abs=1e-5)


def test_a_completion_is_the_same_alone_in_a_batch_of_16_and_admitted_in_another_order(model):
    prompts = make_prompts(8)
    settings = {"stop_ids": (3, 17), "num_samples": 2, "max_new_tokens": 16}
    together, _ = generate(model, prompts, max_batch=16, **settings)
    assert len({len(c.completion_ids) for c in together}) > 3  # rows do leave the batch at different steps
    alone = [c for prompt in prompts for c in generate(model, [prompt], max_batch=1, **settings)[0]]
    assert_same_completions(alone, together)
    assert_same_completions(generate(model, prompts[::-1], max_batch=16, **settings)[0], together)
    assert_same_completions(generate(model, prompts[::-1], max_batch=3, **settings)[0], together)
    assert_same_completions(generate(model, prompts, max_batch=5, max_prefill_tokens=1, **settings)[0], together)


@pytest.mark.parametrize("max_batch", [1, 2, 3, 7, 12, 100])
def test_groups_larger_than_the_batch_finish_and_every_prompt_is_prefilled_once(model, max_batch):
    prompts = make_prompts(3, lengths=(4, 20))
    settings = {"stop_ids": (3, 17), "num_samples": 5, "max_new_tokens": 12}
    completions, stats = generate(model, prompts, max_batch=max_batch, **settings)
    assert [(c.prompt.id, c.sample) for c in completions] == [(p, s) for p in range(3) for s in range(5)]
    assert_same_completions(completions, generate(model, prompts, max_batch=15, **settings)[0])
    assert stats.num_completions == 15
    assert stats.prefill_tokens == sum(len(p.token_ids) for p in prompts)
    # The first token of a completion comes from the prefill, every other one from a decode step.
    assert stats.decode_tokens == sum(len(c.completion_ids) - 1 for c in completions)


def test_finished_rows_leave_the_batch_and_waiting_ones_take_their_slots(model, monkeypatch):
    sizes, prefills = [], []
    decode, prefill = GptOss.decode, GptOss.prefill

    def spy_decode(self, tokens, positions, cache, slots, **settings):
        assert len(slots.unique()) == len(slots)
        sizes.append(len(tokens))
        return decode(self, tokens, positions, cache, slots, **settings)

    def spy_prefill(self, tokens, chunks, cache, **settings):
        prefills.append(len(tokens))
        return prefill(self, tokens, chunks, cache, **settings)

    monkeypatch.setattr(GptOss, "decode", spy_decode)
    monkeypatch.setattr(GptOss, "prefill", spy_prefill)
    prompts = make_prompts(10, lengths=(6, 6))
    completions, stats = generate(model, prompts, stop_ids=(3, 17), max_batch=4, max_prefill_tokens=12)
    lengths = [len(c.completion_ids) for c in completions]
    assert prefills[:2] == [12, 12]  # four slots, but at most two prompts of six tokens at a time
    assert sum(prefills) == 60
    assert sum(sizes) == sum(lengths) - 10
    assert max(sizes) == 4 and stats.decode_steps == len(sizes)
    # The batch stays full while prompts wait: only the last four rows can run in a smaller one.
    tail = next(i for i, size in enumerate(sizes) if size < 4)
    assert sum(sizes[:tail]) >= sum(lengths) - 10 - 3 * 20
    assert sizes[tail:] == sorted(sizes[tail:], reverse=True)


def test_a_long_prompt_wraps_the_ring_in_prefill_and_fan_out(model):
    prompts = make_prompts(2, lengths=(29, 31))
    completions, _ = generate(model, prompts, num_samples=3, max_new_tokens=15)
    for completion in completions:
        assert completion.completion_ids == sample_without_cache(
            model, completion.prompt, completion.sample, stop_ids=(), max_new_tokens=15, temperature=1.0
        )


def test_stop_token_is_the_last_token_and_carries_a_log_prob(model):
    prompts = make_prompts(8)
    free, _ = generate(model, prompts, max_new_tokens=20)
    stop = free[0].completion_ids[4]
    stopped, _ = generate(model, prompts, stop_ids=(stop,), max_new_tokens=20)
    for before, after in zip(free, stopped, strict=True):
        ids = before.completion_ids
        expected = ids[: ids.index(stop) + 1] if stop in ids else ids
        assert after.completion_ids == expected
        assert after.finish_reason == ("stop" if stop in ids else "length")
        assert len(after.segments[1].log_probs) == len(expected)
    assert stopped[0].finish_reason == "stop"


def test_a_stop_token_at_the_length_limit_counts_as_stop(model):
    prompt = make_prompts(1)[0]
    first = generate(model, [prompt], max_new_tokens=1)[0][0]
    assert len(first.completion_ids) == 1 and first.finish_reason == "length"
    assert generate(model, [prompt], max_new_tokens=1, stop_ids=first.completion_ids)[0][0].finish_reason == "stop"


def test_max_len_ends_a_completion_where_the_sequence_is_full(model):
    prompts = make_prompts(2, lengths=(10, 10)) + [Prompt(id=9, token_ids=[1] * 15, row={})]
    completions = Sampler(model, NO_STOP, max_batch=4, seed=7, max_len=16).generate(prompts, SamplingParams(max_new_tokens=20),
                                                                                    step=3, num_samples=1)
    assert [len(c.completion_ids) for c in completions] == [6, 6, 1]
    assert {c.finish_reason for c in completions} == {"length"}
    longer, _ = generate(model, prompts)
    assert completions[0].completion_ids == longer[0].completion_ids[:6]


@pytest.mark.parametrize("change", [{"seed": 8}, {"step": 4}])
def test_seed_and_step_change_completions_and_equal_ones_repeat_them(model, change):
    prompts = make_prompts(4)
    base, _ = generate(model, prompts, num_samples=2)
    assert_same_completions(generate(model, prompts, num_samples=2)[0], base)
    other, _ = generate(model, prompts, num_samples=2, **change)
    assert sum(a.completion_ids == b.completion_ids for a, b in zip(base, other, strict=True)) == 0


def test_samples_of_a_group_and_equal_prompts_with_other_ids_differ(model):
    twins = [Prompt(id=0, token_ids=[5, 6, 7], row={}), Prompt(id=1, token_ids=[5, 6, 7], row={})]
    completions, _ = generate(model, twins, num_samples=8)
    assert len({tuple(c.completion_ids) for c in completions}) == 16


def test_greedy_takes_the_most_likely_token_with_log_probs_at_temperature_one(model):
    prompts = make_prompts(3)
    completions, _ = generate(model, prompts, greedy=True, temperature=0.3, num_samples=2, max_new_tokens=10)
    for completion in completions:
        ids = list(completion.prompt.token_ids)
        for token, log_prob in zip(completion.completion_ids, completion.segments[1].log_probs, strict=True):
            expected = full_logits(model, ids).log_softmax(-1)
            assert token == expected.argmax().item()
            assert log_prob == pytest.approx(expected.max().item(), abs=1e-5)
            ids.append(token)
        assert completion.segments[1].kept_ids is None


@pytest.mark.parametrize("sample", [0, 2])
def test_stream_yields_the_tokens_of_generate(model, sample):
    prompt = make_prompts(3)[2]
    completions, _ = generate(model, [prompt], num_samples=3, stop_ids=(3, 17), max_new_tokens=30, top_p=0.95)
    sampler = Sampler(model, (3, 17), max_batch=4, seed=7)
    tokens = sampler.stream(prompt, SamplingParams(max_new_tokens=30, top_p=0.95), step=3, sample=sample)
    assert list(tokens) == completions[sample].completion_ids
    assert sampler.last_stats.prefill_tokens == len(prompt.token_ids)


def test_stream_yields_each_token_before_the_next_model_call(model):
    asked = []
    stream = Sampler(model, NO_STOP, max_batch=1, seed=7).stream(make_prompts(1)[0], SamplingParams(max_new_tokens=5), step=0,
                                                                 should_stop=lambda: asked.append(1))
    next(stream)
    assert len(asked) == 1
    next(stream)
    assert len(asked) == 2


def test_should_stop_ends_the_rollout_with_interrupted_and_the_next_one_is_unaffected(model):
    prompts = make_prompts(4)
    sampler = Sampler(model, NO_STOP, max_batch=8, seed=7)
    asked = []

    def stop_at_the_fifth_question():
        asked.append(1)
        return len(asked) == 5

    params, settings = SamplingParams(max_new_tokens=20), {"step": 3, "num_samples": 2}
    with pytest.raises(Interrupted, match=r"while sampling \(0 of 8 completions were finished\)"):
        sampler.generate(prompts, params, should_stop=stop_at_the_fifth_question, **settings)
    assert len(asked) == 5
    again = sampler.generate(prompts, params, should_stop=lambda: False, **settings)
    assert_same_completions(again, generate(model, prompts, num_samples=2)[0])


def test_no_prompts_give_no_completions(model):
    assert generate(model, [])[0] == []


@pytest.mark.parametrize(
    ("prompt_ids", "settings", "message"),
    [
        ([[1] * 64], {}, "prompt 0 has 64 tokens, but a sequence may have 64"),
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1], [2, VOCAB]], {}, rf"token ids \[{VOCAB}\] for prompt 1: must be integers and must lie in \[0, {VOCAB}\)"),
        ([None], {}, "token ids for prompt 0: expected a list of integers, found NoneType"),
        ([[1]], {"park_ids": (3, VOCAB)}, rf"token ids \[{VOCAB}\] for park_ids"),
        ([[1]], {"park_ids": (3.0,)}, r"token ids \[3.0\] for park_ids"),
        ([[1]], {"park_ids": 3}, "token ids for park_ids: expected a list of integers, found int"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"num_samples": 0}, "num_samples=0"),
        ([[1]], {"max_batch": 0}, "max_batch=0"),
    ],
)
def test_bad_requests_are_refused_by_name(model, prompt_ids, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [Prompt(id=i, token_ids=ids, row={}) for i, ids in enumerate(prompt_ids)], **settings)


def test_repeated_prompt_ids_are_refused(model):
    with pytest.raises(ValueError, match="prompt id 4 occurs twice"):
        generate(model, [Prompt(id=4, token_ids=[1], row={}), Prompt(id=4, token_ids=[2], row={})])


def test_logits_that_are_not_finite_stop_the_rollout_naming_where(model, monkeypatch):
    decode = GptOss.decode

    def broken(self, tokens, positions, cache, slots, **settings):
        hidden = decode(self, tokens, positions, cache, slots, **settings)
        if positions[1] == 8:
            hidden[1, 5] = float("nan")
        return hidden

    monkeypatch.setattr(GptOss, "decode", broken)
    prompts = make_prompts(2, lengths=(5, 5))
    with pytest.raises(FloatingPointError, match="step 3, prompt 1, sample 0, position 9"):
        generate(model, prompts, greedy=False)


def test_experts_that_stream_in_the_update_only_are_there_for_a_rollout(model):
    other = GptOss(model.config, dtype=torch.float32, device="cpu", experts="bf16", placement=Placement(0, 2))
    other.load_state_dict(model.state_dict())
    sampler, prompts = Sampler(other, NO_STOP, max_batch=64, seed=7), make_prompts(3)
    for _ in range(2):
        completions = sampler.generate(prompts, SamplingParams(max_new_tokens=9, temperature=1.0), step=3, num_samples=1)
        assert other.expert_store.is_sampling
        sampler.offload()
        assert not other.expert_store.is_sampling
    expected, _ = generate(model, prompts, max_new_tokens=9)
    assert [c.completion_ids for c in completions] == [c.completion_ids for c in expected]
