"""Rows that park and are continued with an environment's tokens: what they compute, who gives way, what callers may do."""

import pytest
import torch
from rollout_problem import (
    VOCAB,
    assert_equal,
    converse,
    gigabytes,
    indices,
    make_config,
    make_prompts,
    make_scheduler,
    reply_to,
    sample,
    spied_calls,
)

from grpo.batch import Prompt, pack
from grpo.rollout.sampling import SamplingParams, draw
from grpo.rollout.scheduler import RolloutRow, Scheduler
from grpo.rollout.session import Sampler

LENGTHS = [50, 30, 64, 7]
BRIEF = {"num_samples": 2, "max_new_tokens": 90}


@pytest.fixture(scope="module")
def model(lively_model):
    return lively_model(make_config(), head_factor=20.0)


@pytest.fixture(scope="module")
def expected(model):
    completions, stats = converse(model, make_prompts(LENGTHS), **BRIEF)
    assert stats.num_preemptions == 0
    return completions


def sources(completion) -> list[str]:
    return [segment.source for segment in completion.segments]


def test_completions_are_those_of_a_loop_of_full_forwards_without_cache(model, expected):
    """Its replies, its draws at their positions after them, its ends."""
    assert max(len(completion.segments) for completion in expected) >= 6
    assert {completion.finish_reason for completion in expected} == {"stop", "length"}
    for completion in expected[::2]:
        ids = list(completion.prompt.token_ids)
        for segment in completion.segments[1:]:
            if segment.source == "env":
                ids += segment.token_ids
                continue
            for token in segment.token_ids:
                key = torch.tensor([[7, 3, completion.prompt.id, completion.sample, len(ids)]])
                with torch.no_grad():
                    logits = model.logits(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))[-1:]
                assert draw(logits, key, temperature=1.0).tokens.item() == token
                ids.append(token)
            is_last = segment is completion.segments[-1]
            assert is_last or segment.token_ids[-1] in (5, 6, 7)
            assert not {3, 5, 6, 7} & set(segment.token_ids[:-1])


def test_log_probs_are_the_trainers_and_the_environments_tokens_are_not_trained_on(model, expected):
    batch = pack(expected, [0.0] * len(expected))
    with torch.no_grad():
        log_probs, _ = model.log_probs(batch.tokens, batch.cu_seqlens, temperature=1.0, mask=batch.loss_mask)
    torch.testing.assert_close(batch.sampler_log_probs, log_probs, rtol=0, atol=1e-5)
    num_env = sum(len(segment.token_ids) for completion in expected for segment in completion.segments if segment.source == "env")
    num_prompt = sum(len(completion.prompt.token_ids) for completion in expected)
    assert num_env > 80 and int((~batch.loss_mask).sum()) == num_env + num_prompt
    assert not batch.sampler_log_probs[~batch.loss_mask].any()


@pytest.mark.parametrize("changes", [
    {"max_batch": 1}, {"max_batch": 5}, {"delay": 9}, {"delay": 10_000}, {"max_batch": 4, "delay": 25}, {"sync_steps": 8},
    {"max_prefill_tokens": 10}, {"max_prefill_tokens": 25, "delay": 3, "max_batch": 6}, {"shares_prompts": True}], ids=str)
def test_neither_batch_nor_delay_nor_chunks_change_a_completion(model, expected, changes):
    assert_equal(converse(model, make_prompts(LENGTHS), **BRIEF, **changes)[0], expected)


@pytest.mark.parametrize("changes", [{}, {"delay": 40}, {"max_prefill_tokens": 16, "delay": 4, "shares_prompts": True},
                                     {"sync_steps": 8}, {"sync_steps": 8, "shares_prompts": True}], ids=str)
def test_rows_that_lose_their_pages_while_they_are_parked_or_run_go_on_with_the_same_bits(model, expected, changes):
    actual, stats = converse(model, make_prompts(LENGTHS), cache_gb=gigabytes(8, 4), **BRIEF, **changes)
    assert_equal(actual, expected)
    assert stats.num_preemptions > 1, stats


@pytest.mark.parametrize("window", [8, 100, 600])
def test_replies_longer_and_shorter_than_rings_leave_them_as_the_whole_sequence_does(lively_model, window):
    model = lively_model(make_config(window), head_factor=20.0)
    completions, _ = converse(model, make_prompts([3, 90]), num_samples=4, max_new_tokens=200)
    batch = pack(completions, [0.0] * len(completions))
    with torch.no_grad():
        log_probs, _ = model.log_probs(batch.tokens, batch.cu_seqlens, temperature=1.0, mask=batch.loss_mask)
    torch.testing.assert_close(batch.sampler_log_probs, log_probs, rtol=0, atol=1e-5)
    assert sum(sources(completion).count("env") for completion in completions) > 6


def test_kept_sets_and_recorded_experts_lie_at_their_tokens(model):
    settings = {"top_p": 0.9, "records_routing": True, **BRIEF}
    completions, _ = converse(model, make_prompts(LENGTHS), **settings)
    small, stats = converse(model, make_prompts(LENGTHS), cache_gb=gigabytes(8, 4), max_prefill_tokens=20, **settings)
    assert stats.num_preemptions > 0
    assert_equal(small, completions)
    for completion in completions:
        for segment in completion.segments:
            assert len(segment.routing) == len(segment.token_ids)
            assert (segment.kept_ids is not None) == (segment.source == "policy")
            if segment.source == "policy":
                assert all(token in kept for token, kept in zip(segment.token_ids, segment.kept_ids, strict=True))
        routing = torch.cat([segment.routing for segment in completion.segments])
        assert (routing[:-1] != 255).all() and (routing[-1] == 255).all()
    batch = pack(completions, [0.0] * len(completions))
    with torch.no_grad():
        log_probs, _ = model.log_probs(batch.tokens, batch.cu_seqlens, temperature=1.0, mask=batch.loss_mask, kept=batch.kept)
    torch.testing.assert_close(batch.sampler_log_probs, log_probs, rtol=0, atol=1e-5)


def test_appended_tokens_of_several_rows_are_prefilled_in_one_call_after_the_token_that_was_not_fed(model, monkeypatch):
    calls = spied_calls(monkeypatch)
    sampler = Sampler(model, (), max_batch=4, seed=7)
    with sampler.open(SamplingParams(max_new_tokens=60, park_ids=tuple(range(VOCAB))), step=3) as session:
        rows = session.submit(make_prompts([20, 30]), 1)
        assert set(session.poll()) == set(rows) and all(row.is_parked for row in rows) and session.poll() == []
        session.continue_with(rows[0], [1, 2, 3])
        session.continue_with(rows[1], [4] * 20)
        assert session.is_running and set(session.poll()) == set(rows)
        session.continue_with(rows[1], [])
        assert session.poll() == rows[1:]
    assert calls == [("prefill", 50), ("prefill", 4 + 21), ("prefill", 1)]
    assert sampler.last_stats.prefill_tokens == 76 and sampler.last_stats.decode_steps == 0


def test_a_reply_longer_than_a_prefill_comes_in_chunks_between_which_others_are_decoded(model, monkeypatch):
    calls = spied_calls(monkeypatch)
    params = SamplingParams(max_new_tokens=120, park_ids=(5, 6, 7))
    with Sampler(model, (), max_batch=4, seed=7, max_prefill_tokens=32).open(params, step=3) as session:
        session.submit(make_prompts([12, 9, 8]), 1)
        parked = []
        while session.is_running and not parked:
            parked = session.poll()
        calls.clear()
        session.continue_with(*parked, [8] * 34)
        for _ in range(4):
            session.poll()
    assert calls == [("prefill", 32), ("decode", 2), ("prefill", 3), ("decode", 3)]


# ---- who gives way


def start(scheduler: Scheduler) -> list[RolloutRow]:
    """Admits what finds room, each row with one token."""
    rows = scheduler.resume(10_000)
    for group, members in [] if rows else scheduler.admit_groups(10_000):
        scheduler.share(group, members)
        rows += members
    for row in rows:
        row.num_new += 1
    return rows


def park(scheduler: Scheduler, row: RolloutRow) -> None:
    row.is_parked = True
    scheduler.retire()


def test_a_parked_row_keeps_its_pages_and_goes_on_from_them():
    scheduler = make_scheduler([100, 60], num_rows=2, num_pages=9, limit=200)
    first, second = start(scheduler)
    first.num_new = 40
    assert scheduler.make_room(1) == []
    park(scheduler, first)
    assert indices(scheduler.live) == [1] and first.num_held == 139 and first.slot is not None
    assert scheduler.cache.num_free_pages == 9 - 3 - 1 and not scheduler.is_waiting
    first.num_new += 60  # appended
    scheduler.unpark(first)
    assert scheduler.resume(60) == []  # 61 tokens, with the newest, are longer than a prefill may be
    assert scheduler.resume(61) == [first] and indices(scheduler.live) == [1, 0]
    assert scheduler.cache.num_free_pages == 9 - 4 - 1 and scheduler.num_preemptions == 0


def test_parked_rows_give_way_before_live_ones_the_last_first():
    scheduler = make_scheduler([60] * 4, num_rows=4, num_pages=8, limit=300)
    rows = start(scheduler)
    for row in rows:
        row.num_new = 60  # two pages each
    assert scheduler.make_room(1) == [] and scheduler.cache.num_free_pages == 0
    park(scheduler, rows[2])
    park(scheduler, rows[0])
    rows[1].num_new = 70
    assert scheduler.make_room(1) == [] and indices(scheduler.live) == [1, 3]
    assert rows[0].slot is None and rows[0].num_held == 0 and rows[2].slot is not None
    scheduler.unpark(rows[2])  # continued, not prefilled yet: it is the next to give way
    rows[1].num_new, rows[3].num_new = 200, 70
    assert scheduler.make_room(1) == [] and rows[2].slot is None and scheduler.num_preemptions == 2
    assert indices(scheduler.returning) == [2] and scheduler.cache.num_free_pages == 0
    rows[1].num_new = 262
    assert scheduler.make_room(1) == [rows[3]] and indices(scheduler.returning) == [3, 2]


def test_a_parked_row_gives_its_slot_to_one_that_waits_and_returns_before_others():
    scheduler = make_scheduler([60] * 3, num_rows=1, num_pages=20)
    first, = start(scheduler)
    park(scheduler, first)
    assert start(scheduler) == [] and scheduler.make_way() and first.slot is None
    second, = start(scheduler)
    assert not scheduler.make_way()
    scheduler.unpark(first)
    assert start(scheduler) == [] and not scheduler.make_way()  # a live row does not give way
    second.finish_reason = "stop"
    scheduler.retire()
    assert start(scheduler) == [first] and indices(scheduler.groups[0].waiting) == [2]


def test_rows_that_wait_for_one_another_do_not_wait_for_ever():
    scheduler = make_scheduler([60] * 3, num_rows=3, num_pages=6, limit=300)
    rows = start(scheduler)
    for row in rows:
        row.num_new = 60
    assert scheduler.make_room(1) == []
    for row in rows:
        park(scheduler, row)
    for row in rows:
        row.num_new += 60
        scheduler.unpark(row)
    assert scheduler.resume(1000) == [] and scheduler.make_way() and rows[2].slot is None  # each needs a third page
    assert scheduler.resume(1000) == rows[:1]


def test_a_row_that_its_caller_ends_gives_its_pages_back():
    scheduler = make_scheduler([60], num_rows=1, num_pages=4)
    row, = start(scheduler)
    park(scheduler, row)
    row.finish_reason = "abandoned"
    scheduler.unpark(row)
    assert scheduler.cache.num_free_pages == 4 and scheduler.is_done and row.slot is None


# ---- prompts that come later


@pytest.fixture(scope="module")
def at_once(model):
    """Prompts, and completions of all together."""
    prompts = make_prompts([5, 9, 130, 40, 61])
    return prompts, converse(model, prompts, num_samples=2)[0]


@pytest.mark.parametrize("settings", [{}, {"max_batch": 2}, {"cache_gb": gigabytes(5, 9)}, {"max_prefill_tokens": 20}], ids=str)
def test_prompts_submitted_while_others_run_change_nothing(model, at_once, settings):
    """Later ones are longer than the first cache holds, and more than it has rows for."""
    prompts, expected = at_once
    sampler = Sampler(model, (3,), **({"max_batch": 8, "seed": 7} | settings))
    with sampler.open(SamplingParams(max_new_tokens=120, park_ids=(5, 6, 7)), step=3) as session:
        later, num_calls = [prompts[2:3], prompts[3:]], 0
        session.submit(prompts[:2], 2)
        while session.is_running or later:
            for row in session.poll():
                if row.is_parked:
                    answer = reply_to(session.completion(row))
                    session.continue_with(row, answer) if len(answer) <= row.room else session.finish(row, "length")
            num_calls += 1
            if later and (num_calls % 5 == 0 or not session.is_running):
                session.submit(later.pop(0), 2)
        completions = session.drain()
    assert_equal(completions, expected)
    assert sampler.last_stats.num_completions == 10


def test_prompts_that_a_cache_holds_leave_it_and_its_rows_alone(model):
    with Sampler(model, (), max_batch=8, seed=7).open(SamplingParams(max_new_tokens=20), step=3) as session:
        session.submit(make_prompts([30]), 4)
        session.poll()
        decoder = session._decoder
        while not any(row.is_finished for row in session.rows):
            session.poll()
        session.submit([Prompt(9, [1, 2, 3], {})], 2)
        assert len(session.drain()) == 6 and session._decoder is decoder and session.stats.num_preemptions == 0


# ---- what callers may do


def one_parked(model, *, max_new_tokens=20, stop_ids=()):
    session = Sampler(model, stop_ids, max_batch=2, seed=7).open(
        SamplingParams(max_new_tokens=max_new_tokens, park_ids=tuple(range(VOCAB))), step=3)
    row, = session.submit(make_prompts([6]), 1)
    session.poll()
    return session, row


def test_a_parked_row_may_be_ended_for_a_reason_of_its_caller(model):
    session, row = one_parked(model)
    assert session.completion(row).finish_reason == "parked"
    session.finish(row, "tool failed")
    completion, = session.drain()
    assert completion.finish_reason == "tool failed" and sources(completion) == ["prompt", "policy"]
    with pytest.raises(ValueError, match="is not parked"):
        session.continue_with(row, [1])
    with pytest.raises(ValueError, match="is not parked"):
        session.finish(row, "again")


def test_a_park_id_parks_though_it_is_a_stop_id(model):
    session, row = one_parked(model, stop_ids=range(VOCAB))
    assert row.is_parked and not row.is_finished


def test_a_row_that_parks_without_room_to_go_on_ends_for_its_length(model):
    session, row = one_parked(model, max_new_tokens=3)
    assert row.room == 1
    session.continue_with(row, [1])  # and the third is drawn
    assert session.drain()[0].finish_reason == "length"
    session, row = one_parked(model, max_new_tokens=3)
    session.continue_with(row, [])  # the second draw parks, but for one appended token there is no other to draw
    assert session.drain()[0].finish_reason == "length"
    session, row = one_parked(model, max_new_tokens=1)
    assert row.finish_reason == "length"


def test_what_cannot_be_appended_is_refused_and_the_row_stays_parked(model):
    session, row = one_parked(model)
    with pytest.raises(ValueError, match=r"19 tokens for RolloutRow\(.*room for 18"):
        session.continue_with(row, [1] * 19)
    with pytest.raises(ValueError, match=rf"token ids \[{VOCAB}, -1\] .* must lie in \[0, {VOCAB}\)"):
        session.continue_with(row, [1, VOCAB, -1])
    with pytest.raises(ValueError, match="1 of 1 rows are parked"):
        session.drain()
    session.continue_with(row, [1] * 18)
    assert session.drain()[0].finish_reason == "length"


@pytest.mark.parametrize("token_ids", [[True], [1.0], [None], ["1"], [torch.tensor(1)], torch.tensor([1]), None, "ab", 3])
def test_what_are_no_token_ids_is_refused_and_the_row_stays_parked(model, token_ids):
    session, row = one_parked(model)
    with pytest.raises(ValueError, match="token ids .*integers"):
        session.continue_with(row, token_ids)
    assert row.is_parked and row.num_new == 1 and sources(session.completion(row)) == ["prompt", "policy"]
    session.continue_with(row, [1] * 18)
    assert session.drain()[0].finish_reason == "length"


@pytest.mark.parametrize("reason", ["", None, 3, True])
def test_a_reason_that_is_no_word_is_refused_and_the_row_stays_parked(model, reason):
    session, row = one_parked(model)
    with pytest.raises(ValueError, match=f"reason={reason!r} to finish"):
        session.finish(row, reason)
    assert row.is_parked and not row.is_finished


def test_a_row_of_another_session_is_refused_and_neither_session_changes(model):
    session, row = one_parked(model)
    other, own = one_parked(model)
    for act in (lambda: other.continue_with(row, [1]), lambda: other.finish(row, "length"), lambda: other.completion_ids(row)):
        with pytest.raises(ValueError, match="is a row of another session"):
            act()
    assert row.is_parked and own.is_parked and not other.is_running
    for each, its in ((session, row), (other, own)):
        each.finish(its, "length")
        assert len(each.drain()[0].completion_ids) == 1


def test_a_session_that_has_ended_says_so_and_takes_nothing_from_its_sampler(model):
    session, row = one_parked(model)
    with session:
        session.submit([Prompt(9, [1, 2], {})], 1)
    decoder = session._sampler._decoder
    for act in (session.poll, session.drain, lambda: session.completion_ids(row), lambda: session.continue_with(row, [1]),
                lambda: session.finish(row, "length"), lambda: session.submit(make_prompts([3]), 1),
                lambda: session.submit([], 1)):
        with pytest.raises(ValueError, match="the session has ended"):
            act()
    assert session._sampler._decoder is decoder is not None and row.is_parked


def test_a_row_that_still_runs_has_no_completion_yet(model):
    session = Sampler(model, (), max_batch=2, seed=7).open(SamplingParams(max_new_tokens=5), step=3)
    row, = session.submit(make_prompts([6]), 1)
    with pytest.raises(ValueError, match=r"RolloutRow\(.* has neither finished nor parked: poll\(\)"):
        session.completion(row)


def test_a_partial_completion_keeps_what_it_had_when_its_row_goes_on(model):
    session, row = one_parked(model)
    before = session.completion(row)
    session.continue_with(row, [])
    session.poll()
    assert len(before.completion_ids) == 1 and len(session.completion(row).completion_ids) == 2
    assert sources(session.completion(row)) == ["prompt", "policy"]


def test_a_prompt_id_of_an_earlier_submission_is_refused(model):
    session, _ = one_parked(model)
    with pytest.raises(ValueError, match="prompt id 0 occurs twice"):
        session.submit(make_prompts([3]), 1)


def test_a_session_without_prompts_has_nothing_to_run(model):
    with Sampler(model, (), max_batch=2, seed=7).open(SamplingParams(max_new_tokens=3), step=0) as session:
        assert session.submit([], 3) == [] and session.poll() == [] and session.drain() == []


def test_a_sampler_parks_in_one_session_and_stops_in_the_next(model):
    """The ids of the last session do not stay in the decoder that both use."""
    sampler, prompts = Sampler(model, (3,), max_batch=8, seed=7), make_prompts(LENGTHS)
    with sampler.open(SamplingParams(max_new_tokens=12, park_ids=(5, 6)), step=3) as session:
        session.submit(prompts, 1)
        while session.is_running:
            session.poll()
    decoder = sampler._decoder
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=12), step=3, num_samples=1)
    assert sampler._decoder is decoder
    assert_equal(completions, sample(model, prompts, stop_ids=(3,))[0])
