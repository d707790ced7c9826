"""Rollouts to which memory is refused, wherever it is taken: they go on with less, and their completions are the same."""

import pytest
import torch
from refused_memory import REFUSAL, RefusingCalls
from rollout_problem import assert_equal, converse, gigabytes, make_config, make_prompts, sample

from grpo.out_of_memory import StillOutOfMemory
from grpo.rollout.cache_plan import Limits
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from models.gpt_oss import GptOss
from models.kv_cache import KVCache

pytestmark = pytest.mark.slow

PROMPTS = [70, 5, 130, 64, 33]
PLACES = [(GptOss, "new_cache"), (GptOss, "prefill"), (GptOss, "decode"), (GptOss, "draw"), (GptOss, "head"), (GptOss, "score"),
          (KVCache, "_copy")]
CASES = {
    "plain": (sample, {"num_samples": 3}),
    "few rows": (sample, {"num_samples": 3, "max_batch": 2, "stop_ids": (3, 9)}),
    "few pages": (sample, {"num_samples": 3, "cache_gb": gigabytes(4, 7), "sync_steps": 4, "max_new_tokens": 70}),
    "chunks": (sample, {"num_samples": 2, "max_prefill_tokens": 48, "shares_prompts": True}),
    "filters": (sample, {"num_samples": 2, "top_k": 5, "top_p": 0.9}),
    "routing": (sample, {"num_samples": 2, "records_routing": True, "max_batch": 3}),
    "replies": (converse, {"num_samples": 2, "max_batch": 4, "cache_gb": gigabytes(5, 12), "delay": 3})}


@pytest.fixture(scope="module")
def model() -> GptOss:
    model = GptOss(make_config(), dtype=torch.float32, device="cpu", experts="bf16")
    model.init_weights(seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_rollout_that_is_refused_memory_gives_the_same_completions(model, monkeypatch, capsys, name):
    run, settings = CASES[name]
    with monkeypatch.context() as patch:
        counting = RefusingCalls(patch, PLACES)
        expected, _ = run(model, make_prompts(PROMPTS), **settings)
    num_calls, places = counting.num_calls, set()
    for first in [*range(5), *range(5, num_calls, num_calls // 6 | 1)]:
        with monkeypatch.context() as patch:
            calls = RefusingCalls(patch, PLACES, {first, first + 3}.__contains__)
            completions, _ = run(model, make_prompts(PROMPTS), **settings)
        assert_equal(completions, expected)
        places |= set(calls.refused)
        assert "it went on with the same completions; from now on" in capsys.readouterr().err
    assert {"new_cache", "prefill", "decode"} < places
    assert ("score" in places) == (name == "filters")


@pytest.mark.parametrize("name, least", [("prefill", 64), ("decode", 1), ("new_cache", 2)])  # slots: a row's, and the prompt's
def test_a_rollout_that_is_never_given_memory_ends_with_the_least_that_was_tried(model, monkeypatch, name, least):
    sizes = []

    def refuse(*arguments, **settings):
        sizes.append(len(arguments[1]) if name != "new_cache" else arguments[1])
        raise torch.OutOfMemoryError(REFUSAL)

    monkeypatch.setattr(GptOss, name, refuse)
    expected = f"{REFUSAL}. The least that was tried is one row of 142 tokens, in a cache of 2.66e-05 GB, with prefills of "
    with pytest.raises(StillOutOfMemory, match=expected):
        sample(model, make_prompts(PROMPTS), num_samples=2)
    assert sizes[0] > sizes[-1] == least


def test_later_rollouts_begin_with_what_fitted_and_rows_that_need_more_get_it(model, monkeypatch):
    sampler, texts = Sampler(model, [], max_batch=8, seed=7), []
    sampler.warn = texts.append
    generate = sampler.generate
    params = SamplingParams(max_new_tokens=12)
    with monkeypatch.context() as patch:
        RefusingCalls(patch, [(GptOss, "prefill")], {0, 2}.__contains__)  # all 302 tokens, then 130 alone
        generate(make_prompts(PROMPTS), params, step=0, num_samples=2)
    assert len(texts) == 1 and "a prefill has at most 65 tokens" in texts[0]
    with monkeypatch.context() as patch:
        RefusingCalls(patch, [(GptOss, "decode")], {0}.__contains__)
        generate(make_prompts(PROMPTS), params, step=0, num_samples=2)
    limit = sampler.limits.cache_bytes
    assert len(texts) == 2 and sampler.last_stats.cache_bytes <= limit
    generate(make_prompts(PROMPTS), params, step=0, num_samples=2)
    assert sampler.last_stats.cache_bytes <= limit
    generate(make_prompts([400]), SamplingParams(max_new_tokens=90), step=0, num_samples=1)
    assert len(texts) == 2


@pytest.mark.parametrize("sync_steps", [1, 4])
def test_groups_that_come_after_a_refusal_get_a_cache_for_more_than_the_rows_that_ran_then(model, monkeypatch, sync_steps):
    """One row runs, whose cache has no slot for a prompt that others wait to start from."""
    prompts = make_prompts([130, 5, 33])
    expected, _ = sample(model, prompts, num_samples=2)
    sampler = Sampler(model, (), max_batch=3, seed=7)
    sampler.sync_steps = sync_steps
    with sampler.open(SamplingParams(max_new_tokens=12), step=3) as session:
        session.submit(prompts[:1], 1)
        with monkeypatch.context() as patch:
            RefusingCalls(patch, [(GptOss, "decode")], {0}.__contains__)
            session.poll(), session.poll()
        session.submit(prompts[1:], 2)
        assert_equal(session.drain(), [expected[0], *expected[2:]])


def test_a_long_row_that_takes_the_place_of_one_that_finished_before_a_refusal_gets_a_cache_that_holds_it(model, monkeypatch):
    """The cache after the refusal is for the rows that run then, which are shorter."""
    prompts = make_prompts([130, 5, 130])
    expected, _ = sample(model, prompts[1:], max_new_tokens=40)
    params = SamplingParams(max_new_tokens=40, park_ids=(sample(model, prompts[:1])[0][0].completion_ids[0],))
    with Sampler(model, (), max_batch=3, seed=7).open(params, step=3) as session:
        long, _ = session.submit(prompts[:2], 1)
        assert long in session.poll()
        session.finish(long, "user")
        with monkeypatch.context() as patch:
            RefusingCalls(patch, [(GptOss, "decode")], {0}.__contains__)
            session.poll()
        session.submit(prompts[2:], 1, most_new_tokens=40)
        while session.is_running:
            for row in session.poll():
                if row.is_parked:
                    session.continue_with(row, [])
        completions = session.drain()
    assert [len(completion.completion_ids) for completion in completions] == [1, 40, 40]
    assert_equal(completions[1:], expected)


def test_limits_fall_from_the_prefill_to_the_cache():
    limits = Limits(16384)
    sizes = {"cache_bytes": 1000, "least_bytes": 700, "longest": 9}
    with pytest.raises(StillOutOfMemory, match="Ranks that share experts .* do not try with less memory"):
        limits.lower("no", prefilled=3000, **sizes, is_alone=False)
    assert not limits.lower("no", prefilled=3000, **sizes) and limits.prefill_tokens == 1500
    assert not limits.lower("no", prefilled=100, **sizes) and limits.prefill_tokens == 64
    assert limits.lower("no", prefilled=64, **sizes) and limits.cache_bytes == 800
    assert limits.lower("no", prefilled=0, **sizes | {"cache_bytes": 790}) and limits.cache_bytes == 700
    for _ in range(3):
        assert limits.lower("no", prefilled=64, **sizes | {"cache_bytes": 700}) and limits.cache_bytes == 700
    with pytest.raises(StillOutOfMemory):
        limits.lower("no", prefilled=64, **sizes | {"cache_bytes": 700})
