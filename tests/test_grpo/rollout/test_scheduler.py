"""Who runs when: the scheduler by itself, and rollouts whose cache is too small for them against ones whose is not."""

import random
from functools import partial

import pytest
import torch
from rollout_problem import (
    MAX_LEN,
    assert_equal,
    gigabytes,
    indices,
    make_config,
    make_prompts,
    make_rows,
    make_scheduler,
    sample,
)

from grpo.rollout.cache_plan import plan_cache
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.scheduler import Scheduler
from grpo.rollout.session import Sampler
from models.decoder import Decoder
from models.gpt_oss import GptOss
from models.kv_cache import PAGE_TOKENS, KVCache, page_bytes, slot_bytes


@pytest.fixture(scope="module")
def model(lively_model):
    return lively_model(make_config(), head_factor=20.0)


def admit(scheduler: Scheduler) -> list[int]:
    admitted = scheduler.admit_groups(10_000)
    for group, members in admitted:
        scheduler.share(group, members)
        for row in members:
            row.num_new = 1
    return indices(row for _, members in admitted for row in members)


def test_groups_start_while_slots_and_a_page_to_grow_into_are_there():
    scheduler = make_scheduler([60, 60, 60, 60], num_rows=3, num_pages=5)
    assert admit(scheduler) == [0, 1]  # a page each, and one more for each
    assert scheduler.cache.num_free_pages == 3 and len(scheduler.groups) == 2
    scheduler = make_scheduler([60] * 4, num_rows=3, num_pages=50)
    assert admit(scheduler) == [0, 1, 2] and admit(scheduler) == []


def test_requests_that_never_need_another_page_leave_none_free():
    scheduler = make_scheduler([10] * 4, num_rows=4, num_pages=4, limit=PAGE_TOKENS - 9)  # the last token is not cached
    assert admit(scheduler) == [0, 1, 2, 3] and scheduler.cache.num_free_pages == 0
    assert scheduler.make_room(100) == []


def test_pages_come_for_the_next_steps_only():
    scheduler = make_scheduler([60], num_rows=1, num_pages=5, limit=200)
    admit(scheduler)
    row, = scheduler.live  # 60 tokens in the cache, the 61st to be fed
    for num_steps, num_pages in ((4, 1), (5, 2), (68, 2), (69, 3), (1000, 5)):
        assert scheduler.make_room(num_steps) == [] and scheduler.cache.num_free_pages == 5 - num_pages


def test_the_rows_admitted_last_are_preempted_and_come_back_before_others_in_their_order():
    scheduler = make_scheduler([60, 60, 60, 60], num_rows=3, num_pages=6)
    assert admit(scheduler) == [0, 1, 2]
    for row in scheduler.live:
        row.num_new = 70  # 129 tokens cached, 3 pages
    assert indices(scheduler.make_room(1)) == [2] and indices(scheduler.returning) == [2]
    assert indices(scheduler.live) == [0, 1] and scheduler.cache.num_free_pages == 0
    assert scheduler.resume(10_000) == [] and admit(scheduler) == []  # nobody passes the one that waits
    scheduler.live[0].finish_reason = "stop"
    assert scheduler.retire() == [1]
    assert indices(scheduler.resume(10_000)) == [2] and indices(scheduler.live) == [1, 2]
    scheduler.live[0].finish_reason = "stop"
    assert scheduler.retire() == [1] and admit(scheduler) == [3]


def test_rows_that_continue_behind_a_cache_return_as_many_at_a_time_as_one_launch_attends_for():
    scheduler = make_scheduler([10] * 70, num_rows=70, num_pages=140, limit=100)
    admit(scheduler)
    for row in scheduler.live:
        row.is_parked = True
    rows = list(scheduler.live)
    scheduler.retire()
    for row in rows:
        row.num_new += 5
        scheduler.unpark(row)
    assert [len(scheduler.resume(10_000)) for _ in range(3)] == [63, 7, 0]


def test_several_preempted_rows_resume_in_the_order_of_their_admission():
    scheduler = make_scheduler([60] * 4, num_rows=4, num_pages=8, limit=200)
    assert admit(scheduler) == [0, 1, 2, 3]
    for row in scheduler.live:
        row.num_new = 70
    assert indices(scheduler.make_room(1)) == [3, 2] and indices(scheduler.returning) == [2, 3]
    for row in scheduler.live:
        row.finish_reason = "stop"
    scheduler.retire()
    assert scheduler.resume(129) == []  # 130 tokens are longer than a prefill may be
    assert indices(scheduler.resume(259)) == [2]
    assert indices(scheduler.resume(10_000)) == [3]


def test_a_group_that_does_not_fit_waits_in_the_spare_slot_and_shares_whole_pages():
    scheduler = make_scheduler([70, 10], num_rows=2, num_pages=20, width=3)
    assert admit(scheduler) == [0, 1] and indices(scheduler.partial_group.waiting) == [2]
    assert scheduler.cache.num_free_pages == 20 - 1 - 3  # the first page once, the tails of two rows and of the prompt slot
    assert scheduler.admit_partial_group() is None
    scheduler.live[0].finish_reason = "stop"
    scheduler.retire()
    group, members = scheduler.admit_partial_group()
    assert indices(members) == [2] and scheduler.partial_group is None and scheduler.cache.num_free_pages == 20 - 1 - 2


def test_the_spare_slot_is_given_up_for_the_only_row_that_runs():
    scheduler = make_scheduler([70], num_rows=1, num_pages=3, limit=120, width=2)
    assert admit(scheduler) == [0] and scheduler.partial_group is not None and scheduler.cache.num_free_pages == 0
    assert scheduler.make_room(60) == []  # a third page for it alone
    assert scheduler.partial_group is None and [indices(group.waiting) for group in scheduler.groups] == [[1]]


def test_a_cache_for_all_is_no_larger_than_all_need_and_a_smaller_one_spends_what_it_may():
    config, dtype = make_config(), torch.float32
    per_page, per_slot = page_bytes(config, dtype), slot_bytes(config, dtype, max_len=MAX_LEN)
    rows = make_rows([(100, 100), (90, 10), (1, 59), (2, 8)])
    plan = partial(plan_cache, config, dtype, rows, max_len=MAX_LEN)

    def numbers(num_bytes, num_rows):
        shape = plan(num_bytes=num_bytes, num_rows=num_rows)
        return shape.num_rows, shape.num_slots, shape.num_pages

    assert numbers(1e12, 3) == (3, 4, 4 + 2 + 1 + 4)  # the prompt slot may hold the longest
    assert numbers(None, 9) == (4, 4, 8)
    assert numbers(4 * per_slot + 6.5 * per_page, 3) == (3, 4, 6)
    assert numbers(4 * per_slot + 5.5 * per_page, 3) == (2, 3, 5 + int((per_slot + per_page // 2) // per_page))
    assert numbers(2 * per_slot + 4 * per_page, 3) == (1, 2, 4)


def test_a_cache_that_does_not_hold_one_sequence_is_refused_with_what_would_do(model):
    prompts = make_prompts([100, 60])
    with pytest.raises(ValueError, match=r"rollout.cache_gb: .* one sequence of 150 tokens.* to (\S+) or more") as error:
        sample(model, prompts, cache_gb=gigabytes(1, 2), max_new_tokens=50)
    enough = float(str(error.value).split(" or more")[0].split()[-1])
    assert len(sample(model, prompts, cache_gb=enough, max_new_tokens=50)[0]) == 2


@pytest.mark.parametrize("sync_steps", [1, 5])
def test_rows_that_end_between_two_syncs_change_nothing(model, sync_steps):
    prompts = make_prompts([5, 40, 3, 17])
    settings = {"num_samples": 3, "stop_ids": (3, 17), "max_new_tokens": 40}
    expected, _ = sample(model, prompts, **settings)
    assert len({len(completion.completion_ids) for completion in expected}) > 4
    actual, stats = sample(model, prompts, sync_steps=sync_steps, max_batch=5, **settings)
    assert_equal(actual, expected)
    assert stats.decode_tokens == sum(len(completion.completion_ids) - 1 for completion in expected)


@pytest.mark.parametrize("max_new_tokens, expected", [(10, "sssss|ssss||"), (9, "sssss|sss|"), (5, "ssss|"), (6, "sssss||")])
def test_a_step_is_taken_ahead_of_a_sync_unless_all_rows_end_there(model, monkeypatch, max_new_tokens, expected):
    """Four steps (s) between syncs (|): the first token is drawn with the prompt, after which the first sync comes."""
    calls = []
    for name, sign in (("step", "s"), ("sync", "|")):
        call = getattr(Decoder, name)
        monkeypatch.setattr(Decoder, name, lambda *arguments, call=call, sign=sign, **settings:
                            (calls.append(sign), call(*arguments, **settings))[1])
    completions, stats = sample(model, make_prompts([5, 8]), sync_steps=4, max_new_tokens=max_new_tokens)
    assert "".join(calls) == "|" + expected and stats.decode_steps == max_new_tokens - 1
    assert [len(completion.completion_ids) for completion in completions] == [max_new_tokens] * 2


def test_members_of_a_group_share_their_prompts_pages_and_write_into_their_own(model):
    """Prompts that end at a page's end, within a page and within a later one; each sample is that of a lone stream."""
    prompts = make_prompts([64, 70, 130])
    completions, _ = sample(model, prompts, num_samples=3, max_new_tokens=15)
    lone = Sampler(model, (), max_batch=1, seed=7)
    for completion in completions:
        tokens = lone.stream(completion.prompt, SamplingParams(max_new_tokens=15), step=3, sample=completion.sample)
        assert completion.completion_ids == list(tokens)


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_preempted_completions_go_on_with_the_same_tokens_and_log_probs(model, shares_prompts):
    prompts = make_prompts([50, 30, 45])
    settings = {"num_samples": 2, "shares_prompts": shares_prompts, "max_new_tokens": 90}
    expected, free = sample(model, prompts, **settings)
    actual, stats = sample(model, prompts, cache_gb=gigabytes(6, 8), **settings)
    assert_equal(actual, expected)
    assert free.num_preemptions == 0 and stats.num_preemptions >= 2
    assert stats.prefill_tokens > free.prefill_tokens == 125
    assert stats.decode_tokens < free.decode_tokens  # a resumed completion's next token comes from its prefill


def test_kept_sets_and_routing_survive_a_preemption(model):
    settings = {"top_p": 0.9, "records_routing": True, "max_new_tokens": 100}
    prompts = make_prompts([50, 45, 40])
    expected, _ = sample(model, prompts, **settings)
    actual, stats = sample(model, prompts, cache_gb=gigabytes(3, 6), **settings)
    assert stats.num_preemptions > 0
    assert_equal(actual, expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert all(torch.equal(a.routing, b.routing) for a, b in zip(ours.segments, theirs.segments, strict=True))


def test_a_tenth_of_the_pages_finishes_everything_with_the_results_of_a_whole_cache(model):
    rng = random.Random(1)
    prompts = make_prompts([rng.randint(1, 60) for _ in range(15)])
    settings = {"num_samples": 2, "stop_ids": (3,), "max_new_tokens": 120}  # random lengths through the stop id
    expected, _ = sample(model, prompts, **settings)
    num_pages = sum(2 * KVCache.pages_for(len(prompt.token_ids) + 120) for prompt in prompts)
    actual, stats = sample(model, prompts, cache_gb=gigabytes(30, num_pages // 10), sync_steps=8, **settings)
    assert [(c.prompt.id, c.sample) for c in actual] == [(p, s) for p in range(15) for s in range(2)]
    assert_equal(actual, expected)
    assert stats.num_preemptions > 0
    assert len({len(completion.completion_ids) for completion in expected}) > 8


def test_members_wait_beside_a_long_prompt_though_every_request_has_a_row(model):
    # 440 tokens and the copy of their last page fill the cache's 8 pages: the second member has none to grow into
    config, prompts, settings = make_config(), make_prompts([440, 1]), {"num_samples": 2, "max_new_tokens": 20}
    size = 5 * slot_bytes(config, torch.float32, max_len=MAX_LEN) + 8 * page_bytes(config, torch.float32)
    rows = make_rows([(440, 20), (1, 20)], width=2)
    shape = plan_cache(config, torch.float32, rows, num_bytes=size, num_rows=64, max_len=MAX_LEN)
    assert (shape.num_rows, shape.num_slots, shape.num_pages) == (4, 5, 8)
    assert_equal(sample(model, prompts, cache_gb=size / 1e9, **settings)[0], sample(model, prompts, **settings)[0])


def test_a_group_runs_together_where_its_long_prompt_fits_once(model):
    config, prompts, settings = make_config(), make_prompts([440]), {"num_samples": 4, "max_new_tokens": 20}
    # 6 whole pages of the prompt; its tail and another page for each completion
    size = 5 * slot_bytes(config, torch.float32, max_len=MAX_LEN) + (6 + 4 * 2) * page_bytes(config, torch.float32)
    shape = plan_cache(config, torch.float32, make_rows([(440, 20)], width=4), num_bytes=size, num_rows=64, max_len=MAX_LEN)
    assert (shape.num_rows, shape.num_slots, shape.num_pages) == (4, 5, 14)
    completions, stats = sample(model, prompts, cache_gb=size / 1e9, **settings)
    assert stats.prefill_tokens == 440 and stats.num_preemptions == 0
    assert_equal(completions, sample(model, prompts, **settings)[0])


def test_the_longest_prompts_are_admitted_first(model, monkeypatch):
    lengths, prefill = [], GptOss.prefill

    def spy(self, tokens, chunks, *arguments, **settings):
        lengths.append([chunk.end - chunk.start for chunk in chunks])
        return prefill(self, tokens, chunks, *arguments, **settings)

    monkeypatch.setattr(GptOss, "prefill", spy)
    completions, _ = sample(model, make_prompts([5, 9, 30, 9]), max_batch=2, max_new_tokens=3)
    assert lengths == [[30, 9], [9, 5]]
    assert [completion.prompt.id for completion in completions] == [0, 1, 2, 3]


def test_a_later_rollout_takes_the_cache_that_suffices_and_offload_gives_it_back(model):
    sampler = Sampler(model, (), max_batch=4, seed=7)
    settings, params = {"step": 0, "num_samples": 2}, SamplingParams(max_new_tokens=20)
    prompts = make_prompts([20, 30])
    first = sampler.generate(prompts, params, **settings)
    decoder = sampler._decoder
    assert_equal(sampler.generate(prompts, params, **settings), first)
    assert sampler._decoder is decoder
    sampler.generate(prompts, SamplingParams(max_new_tokens=100), **settings)  # longer sequences than it holds
    assert sampler._decoder is not decoder
    sampler.offload()
    assert sampler._decoder is None
    assert_equal(sampler.generate(prompts, params, **settings), first)


def test_a_stream_that_is_left_open_keeps_its_rows_to_itself(model):
    sampler, prompts = Sampler(model, (), max_batch=4, seed=7), make_prompts([20, 30])
    alone = list(sampler.stream(prompts[0], SamplingParams(max_new_tokens=20), step=0))
    stream = sampler.stream(prompts[0], SamplingParams(max_new_tokens=20), step=0)
    tokens = [next(stream) for _ in range(5)]
    sampler.generate(prompts, SamplingParams(max_new_tokens=20), step=1, num_samples=2)
    assert tokens + list(stream) == alone
