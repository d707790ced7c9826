"""What is longer than a prefill and so prefilled in chunks: who runs meanwhile, what gives way, and that nothing else changes."""

import pytest
from rollout_problem import (
    assert_equal,
    gigabytes,
    indices,
    make_config,
    make_prompts,
    make_scheduler,
    sample,
    spied_calls,
)

from grpo.rollout.sampling import SamplingParams
from grpo.rollout.scheduler import Scheduler
from grpo.rollout.session import Interrupted, Sampler


@pytest.fixture(scope="module")
def model(lively_model):
    return lively_model(make_config(), head_factor=20.0)


@pytest.mark.parametrize("window, shares_prompts", [(8, False), (8, True), (100, True), (128, False), (600, False)])
def test_chunks_change_no_completion(lively_model, window, shares_prompts):
    """Rings that wrap within a chunk, between chunks and never; ends of prompts before, at and after those of chunks."""
    model = lively_model(make_config(window), head_factor=20.0)
    prompts = make_prompts([63, 64, 65, 200, 300])
    settings = {"shares_prompts": shares_prompts, "num_samples": 2, "records_routing": True}
    expected, whole = sample(model, prompts, **settings)
    for max_prefill_tokens in (64, 50):
        actual, stats = sample(model, prompts, max_prefill_tokens=max_prefill_tokens, **settings)
        assert_equal(actual, expected)
        assert stats.prefill_tokens == whole.prefill_tokens == 692


def test_members_beyond_the_batch_wait_with_a_prompt_prefilled_in_chunks(model):
    settings = {"num_samples": 5, "stop_ids": (3, 17), "top_p": 0.9}
    expected, _ = sample(model, make_prompts([150, 130]), **settings)
    actual, stats = sample(model, make_prompts([150, 130]), max_prefill_tokens=64, max_batch=3, **settings)
    assert_equal(actual, expected)
    assert stats.prefill_tokens == 280


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_preempted_completions_resume_in_chunks(model, shares_prompts):
    """Their chunks end within prompts, within completions, and cross the end of prompts."""
    prompts = make_prompts([50, 30, 45])
    settings = {"num_samples": 2, "shares_prompts": shares_prompts, "max_new_tokens": 90, "records_routing": True}
    expected, _ = sample(model, prompts, **settings)
    actual, stats = sample(model, prompts, cache_gb=gigabytes(6, 8), max_prefill_tokens=40, **settings)
    assert_equal(actual, expected)
    assert stats.num_preemptions >= 2


@pytest.fixture(scope="module")
def undisturbed(model):
    """Prompts, settings and completions."""
    prompts, settings = make_prompts([190, 50, 130, 64, 7, 101]), {"num_samples": 2, "max_new_tokens": 80}
    return prompts, settings, sample(model, prompts, **settings)[0]


@pytest.mark.parametrize("num_pages, max_prefill_tokens, sync_steps", [(8, 16, 8), (9, 64, 1), (12, 100, 8)])
def test_any_cache_and_any_chunks_give_the_results_of_a_whole_cache_and_whole_prompts(model, undisturbed, num_pages,
                                                                                      max_prefill_tokens, sync_steps):
    prompts, settings, expected = undisturbed
    actual, stats = sample(model, prompts, cache_gb=gigabytes(6, num_pages), sync_steps=sync_steps,
                           max_prefill_tokens=max_prefill_tokens, **settings)
    assert_equal(actual, expected)
    assert stats.num_preemptions > 0


def test_a_prompt_that_gives_way_between_chunks_begins_again(model):
    """The first completion needs more pages than were left for it when the second prompt began, 376 steps before that ends."""
    settings = {"max_new_tokens": 250}
    expected, whole = sample(model, make_prompts([200, 190]), **settings)
    actual, stats = sample(model, make_prompts([200, 190]), cache_gb=gigabytes(2, 9), max_prefill_tokens=4, sync_steps=8,
                           **settings)
    assert_equal(actual, expected)
    assert stats.num_preemptions > 0 and whole.prefill_tokens == 390 < stats.prefill_tokens < 390 + 190, stats


def test_live_rows_decode_between_chunks(model, monkeypatch):
    calls = spied_calls(monkeypatch)
    sample(model, make_prompts([150, 140, 10]), max_prefill_tokens=64, num_samples=2, max_new_tokens=5)
    assert calls == [("prefill", 64), ("prefill", 64), ("prefill", 22),
                     ("prefill", 64), ("decode", 2), ("prefill", 64), ("decode", 2),
                     ("prefill", 12), ("prefill", 10),
                     ("decode", 6), ("decode", 6), ("decode", 4), ("decode", 4)]


def test_should_stop_is_asked_between_chunks(model):
    asked = []

    def stop_at_the_third_question():
        asked.append(1)
        return len(asked) == 3

    sampler, prompts = Sampler(model, (), max_batch=4, seed=7, max_prefill_tokens=64), make_prompts([300])
    params, settings = SamplingParams(max_new_tokens=12), {"step": 3, "num_samples": 1}
    with pytest.raises(Interrupted, match=r"while sampling \(0 of 1 completions were finished\)"):
        sampler.generate(prompts, params, should_stop=stop_at_the_third_question, **settings)
    assert sampler._decoder.cache.num_free_pages < sampler._decoder.cache.num_pages  # two chunks are in
    assert_equal(sampler.generate(prompts, params, **settings), sample(model, prompts)[0])


def admit(scheduler: Scheduler) -> list[int]:
    """Admits groups at once that are no longer than 100 tokens, and begins to prefill a longer one in chunks."""
    admitted = scheduler.admit_groups(100)
    for group, members in admitted:
        scheduler.share(group, members)
        for row in members:
            row.num_new = 1
    if not admitted:
        scheduler.begin_chunked(100)
    return indices(row for _, members in admitted for row in members)


def end_chunked(scheduler: Scheduler) -> list[int]:
    scheduler.chunked.row.num_held = scheduler.chunked.num_tokens
    group, members = scheduler.end_chunked()
    if group is not None:
        scheduler.share(group, members)
    for row in members:
        row.num_new += 1
    return indices(members)


def test_chunks_hold_a_slot_and_all_their_pages_and_admit_members_at_their_end():
    scheduler = make_scheduler([200, 60], num_rows=2, num_pages=20, width=3)
    assert admit(scheduler) == [] and scheduler.chunked.num_tokens == 200
    assert scheduler.cache.num_free_pages == 20 - 4 and scheduler.live == [] and not scheduler.is_done
    assert end_chunked(scheduler) == [0, 1] and scheduler.chunked is None
    assert indices(scheduler.live) == [0, 1] and indices(scheduler.partial_group.waiting) == [2] and len(scheduler.groups) == 1
    assert scheduler.cache.num_free_pages == 20 - 4 - 2  # the tails of the second row and of the prompt slot
    assert len({row.slot for row in scheduler.live}) == 2


def test_chunks_give_way_to_live_rows_and_begin_again_with_their_tokens():
    scheduler = make_scheduler([60, 200], num_rows=3, num_pages=7, limit=300)
    assert admit(scheduler) == [0] and admit(scheduler) == [] and scheduler.chunked.row.index == 1
    scheduler.chunked.row.num_held = 100
    scheduler.live[0].num_new = 70  # 3 pages: those left are two
    assert scheduler.make_room(1) == [] and scheduler.chunked is not None
    scheduler.live[0].num_new = 134
    assert scheduler.make_room(1) == [] and scheduler.chunked is None and scheduler.num_preemptions == 1
    assert indices(scheduler.live) == [0] and scheduler.cache.num_free_pages == 7 - 4
    assert admit(scheduler) == [] and scheduler.chunked is None  # no room for 4 pages and one to grow into for each
    scheduler.live[0].finish_reason = "stop"
    scheduler.retire()
    assert admit(scheduler) == [] and scheduler.chunked.row.num_held == 0
    assert end_chunked(scheduler) == [1] and scheduler.groups == []


def test_a_request_that_resumes_in_chunks_gives_way_too_and_stays_before_others():
    scheduler = make_scheduler([60, 60, 60, 10], num_rows=3, num_pages=8, limit=300)
    assert [admit(scheduler) for _ in range(3)] == [[0], [1], [2]]
    for row in scheduler.live:
        row.num_new = 100  # 160 tokens with the one to be fed, 3 pages each
    assert indices(scheduler.make_room(1)) == [2] and indices(scheduler.returning) == [2]
    scheduler.live[1].finish_reason = "stop"
    scheduler.retire()
    assert scheduler.resume(100) == [] and scheduler.begin_chunked(100)
    assert scheduler.chunked.row.index == 2 and scheduler.chunked.num_tokens == 160 and scheduler.cache.num_free_pages == 2
    scheduler.live[0].num_new = 262  # 6 pages
    assert scheduler.make_room(1) == [] and scheduler.chunked is None and scheduler.num_preemptions == 2
    assert indices(scheduler.live) == [0] and indices(scheduler.returning) == [2] and scheduler.cache.num_free_pages == 2
    assert admit(scheduler) == [] and scheduler.chunked is None
    scheduler.live[0].finish_reason = "stop"
    scheduler.retire()
    assert scheduler.begin_chunked(100) and end_chunked(scheduler) == [2]
    assert indices(scheduler.live) == [2] and scheduler.live[0].num_new == 101 and scheduler.returning == []


def test_a_group_whose_tails_find_no_page_after_the_last_chunk_starts_one_member():
    scheduler = make_scheduler([60, 200], num_rows=3, num_pages=8, limit=300, width=2)
    scheduler.groups[0].waiting.pop()
    assert admit(scheduler) == [0] and admit(scheduler) == [] and scheduler.chunked.row.index == 2
    scheduler.live[0].num_new = 133
    assert scheduler.make_room(1) == [] and scheduler.cache.num_free_pages == 0
    assert end_chunked(scheduler) == [2] and indices(scheduler.groups[0].waiting) == [3] and scheduler.partial_group is None
