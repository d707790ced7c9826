"""Rows being decoded, and which graph serves a batch. Graphs are tested on a GPU, with whole rollouts: test_grpo/test_gpu.py."""

import threading

import pytest
import torch
from paths import FIXTURES

from models.config import released
from models.decoder import (
    BUCKETS,
    CaptureLock,
    Decoder,
    KeyReading,
    NewRow,
    PlainDraw,
    bucket_of,
    can_decode_by_graph,
    parts_bytes,
    share_prefixes,
)
from models.formats.hugging_face import load_model
from models.keys import PrefillChunk


def test_a_batch_takes_the_smallest_bucket_that_holds_it():
    assert [bucket_of(count) for count in (1, 2, 3, 8, 9, 33, 128, 129, 512)] == [1, 2, 4, 8, 16, 48, 128, 192, 512]
    assert [bucket_of(count) for count in (513, 640, 641)] == [640, 640, 768]
    assert all(bucket_of(bucket) == bucket for bucket in BUCKETS)


def test_neighbours_with_the_same_prompt_share_it_by_the_tile():
    prompts = [7] * 3 + [2] + [5] * 10 + [-1] * 4 + [7] * 2
    assert share_prefixes(prompts, size=4, num_tiles=9) == [(0, 3), (4, 4), (8, 4), (12, 2), (18, 2)]
    assert share_prefixes(prompts, size=4, num_tiles=3) == [(0, 3), (4, 4), (8, 4)]  # the largest
    assert share_prefixes([3, 1, 3, 1], size=4, num_tiles=9) == share_prefixes([], size=4, num_tiles=9) == []
    assert share_prefixes([0, 0], size=1, num_tiles=9) == []


def test_a_capture_that_waits_comes_before_the_next_part_of_a_thread_that_computes_all_the_time():
    lock, asked, parts, is_done = CaptureLock(), threading.Event(), [], threading.Event()

    def compute():
        while not is_done.is_set():
            with lock.computing():
                parts.append(asked.is_set())

    class Asked(threading.Event):
        def clear(self):  # a capture asks
            super().clear()
            asked.set()

    lock._no_capture = Asked()
    lock._no_capture.set()
    thread = threading.Thread(target=compute)
    thread.start()
    try:
        while not parts:
            pass
        for _ in range(20):
            asked.clear()
            parts.clear()
            with lock.capturing():
                num_before = len(parts)
                assert sum(parts) <= 3  # of the last time, one that runs, and one that has just begun to wait for the lock
                assert not is_done.wait(0.001) and len(parts) == num_before
    finally:
        is_done.set()
        thread.join()


def test_the_cpu_has_no_graphs():
    assert not can_decode_by_graph(load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32))


@pytest.fixture(scope="module")
def model():
    return load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32)


def idle_decoder(model, **settings) -> Decoder:
    """Of up to 512 rows, none of which is there."""
    return Decoder(model, model.new_cache(1, 64), max_rows=512, stop_ids=[], **settings)


@pytest.mark.parametrize("counts_prompts_apart", [False, True])
@pytest.mark.parametrize("num_rows, longest, tokens", [
    (1, 5, 1024), (24, 1024, 1024), (24, 1025, 4096), (8, 4096, 4096), (8, 4097, 8192), (8, 17_000, 24_576),
    (24, 131_072, 131_072),
    (32, 1024, 0), (32, 2048, 0), (32, 2049, 4096), (64, 4097, 8192), (64, 49_152, 49_152), (64, 49_153, 0), (96, 8192, 0)])
def test_few_rows_are_read_by_parts_and_more_where_one_is_long(model, num_rows, longest, tokens, counts_prompts_apart):
    decoder = idle_decoder(model, counts_prompts_apart=counts_prompts_apart)
    prompts = [(0, min(1023, longest - 1))] * num_rows  # too short to be read once for all
    assert decoder._reading(prompts, num_rows, longest) == KeyReading(shares=False, longest=tokens)


def test_more_rows_read_a_long_prompt_that_they_share_once(model):
    decoder = idle_decoder(model, counts_prompts_apart=True)
    once = KeyReading(shares=True, longest=0)
    assert [decoder._reading([(0, 1024)] * 25, rows, longest=1025) for rows in (32, 96)] == [once, once]
    assert decoder._reading([(0, 1024)] * 24, 24, longest=1025) == KeyReading(shares=False, longest=4096)
    assert decoder._reading([(0, 4000)] * 25, 32, longest=5000) == once
    assert decoder._reading([(row, 4000) for row in range(25)], 32, longest=5000) == KeyReading(shares=False, longest=8192)
    apart = idle_decoder(model, counts_prompts_apart=False)
    assert apart._reading([(0, 4000)] * 25, 32, longest=5000) == KeyReading(shares=False, longest=8192)


@pytest.mark.parametrize("counts_prompts_apart", [False, True])
@pytest.mark.parametrize("max_len", [1024, 1025, 2048, 2049, 131_072])
def test_every_way_of_reading_keys_is_rehearsed(model, max_len, counts_prompts_apart, monkeypatch):
    decoder, rehearsed = idle_decoder(model, counts_prompts_apart=counts_prompts_apart), []
    monkeypatch.setattr(Decoder, "_step", lambda self, rows, plain, reading: rehearsed.append(reading))
    for bucket in BUCKETS:
        rehearsed.clear()
        decoder.rehearse(bucket, PlainDraw(1.0, True), longest=max_len)
        ways = {(reading.shares, reading.longest > 0) for reading in rehearsed}
        by_parts = [reading.longest for reading in rehearsed if reading.longest]  # fewer and more programs may differ in kernels
        for longest in {2, 1024, 1025, 2048, 2049, 60_000, 131_072}:
            if longest <= max_len:
                for prompts in ([(0, longest - 1)] * bucket, [(row, longest - 1) for row in range(bucket)]):
                    reading = decoder._reading(prompts, bucket, longest)
                    assert (reading.shares, reading.longest > 0) in ways, (bucket, longest, reading)
                    assert not reading.longest or min(by_parts) <= reading.longest <= max(by_parts), (bucket, longest, reading)


def test_what_parts_of_attention_take_is_bounded():
    config, settings = released("openai/gpt-oss-20b"), {"dtype": torch.bfloat16}
    part = 64 * 66 * 4  # output, maximum and sum of 64 heads; one more in each row, where a prefix may end
    assert parts_bytes(config, num_rows=1, longest=1024, **settings) == 5 * part
    assert parts_bytes(config, num_rows=3, longest=1025, **settings) == 4 * 17 * part  # as 4 rows of 4,096 tokens
    assert parts_bytes(config, num_rows=24, longest=131_072, **settings) == 24 * 513 * part
    assert parts_bytes(config, num_rows=64, longest=131_072, **settings) == (24 * 512 + 64) * part < 209e6
    assert parts_bytes(config, num_rows=512, longest=2049, **settings) == 64 * 17 * part


def scripted(*steps: list[int]):
    """Draws the given tokens, a list for each step."""
    tokens = iter(steps)
    return lambda hidden, rows: ((drawn := torch.tensor(next(tokens))), -drawn.float())


def make_decoder(model, prompts: list[list[int]], *, limits: list[int], stop_ids: list[int]) -> tuple:
    """A decoder, rows to admit whose prompts are in slots 2, 1, 0, and the hidden states after those."""
    cache = model.new_cache(3, 64)
    slots = [2, 1, 0][:len(prompts)]
    for slot in slots:
        assert cache.reserve(slot, 64)
    decoder = Decoder(model, cache, max_rows=3, stop_ids=stop_ids, counts_prompts_apart=False)
    new = [NewRow(item=i, slot=slot, prompt_len=len(prompt), num_new=0, limit=limit, place=64 * slot, key=(7, 3, i, 0))
           for i, (slot, prompt, limit) in enumerate(zip(slots, prompts, limits, strict=True))]
    chunks = [PrefillChunk(slot, 0, len(prompt)) for slot, prompt in zip(slots, prompts)]
    hidden = model.prefill(torch.tensor(sum(prompts, [])), chunks, cache)
    return decoder, new, hidden


def test_rows_store_what_they_draw_and_end_with_a_stop_id_or_at_their_limit(model):
    decoder, new, hidden = make_decoder(model, [[5, 6], [7], [8, 9, 10]], limits=[9, 3, 9], stop_ids=[1])
    decoder.admit(new, hidden, scripted([20, 21, 22]))
    for drawn in ([30, 31, 1], [40, 1, 99], [1, 99, 99]):  # the last two have ended when they "draw" 99
        decoder.step(scripted(drawn), [], longest=0, by_graph=False, records=False)
    assert decoder.sync() == ([1, 1, 1], [False] * 3, [4, 3, 2], [True, True, True])
    drawn = decoder.fetch([(row.place, row.place + count) for row, count in zip(new, (4, 3, 2))])
    assert [tokens.tolist() for tokens, _ in drawn] == [[20, 30, 40, 1], [21, 31, 1], [22, 1]]
    assert drawn[1][1].tolist() == [-21, -31, -1] and 99 not in decoder.tokens


def test_a_limit_ends_a_row_without_a_stop_and_may_do_so_at_once(model):
    decoder, new, hidden = make_decoder(model, [[5, 6], [7]], limits=[1, 2], stop_ids=[])
    decoder.admit(new, hidden, scripted([20, 21]))
    assert decoder.sync() == ([20, 21], [False, True], [1, 1], [False, False])
    decoder.step(scripted([30, 31]), [], longest=0, by_graph=False, records=False)
    assert decoder.sync() == ([20, 31], [False, False], [1, 2], [False, False])
    drawn = decoder.fetch([(new[0].place, new[0].place + 1), (new[1].place, new[1].place + 2)])
    assert [tokens.tolist() for tokens, _ in drawn] == [[20], [21, 31]]


def test_a_sync_tells_of_the_rows_before_the_step_that_was_taken_ahead(model):
    decoder, new, hidden = make_decoder(model, [[5, 6], [7]], limits=[9, 3], stop_ids=[1])
    decoder.admit(new, hidden, scripted([20, 21]))
    for drawn in ([30, 31], [1, 41]):
        decoder.look_ahead(lambda drawn=drawn: decoder.step(scripted(drawn), [], longest=0, by_graph=False, records=False))
        assert decoder.num_ahead == 1
        if drawn[0] == 30:
            assert decoder.sync() == ([20, 21], [True, True], [1, 1], [False, False])
    assert decoder.sync() == ([30, 31], [True, True], [2, 2], [False, False])
    assert decoder.sync() == ([1, 41], [False, False], [3, 3], [True, False]) and decoder.num_ahead == 0


def test_after_a_wait_a_sync_tells_of_the_rows_as_they_are(model):
    decoder, new, hidden = make_decoder(model, [[5, 6]], limits=[9], stop_ids=[1])
    decoder.admit(new, hidden, scripted([20]))
    decoder.look_ahead(lambda: decoder.step(scripted([30]), [], longest=0, by_graph=False, records=False))
    decoder.wait()
    assert decoder.num_ahead == 0 and decoder.sync() == ([30], [True], [2], [False])


def test_rows_that_move_to_the_front_go_on_from_their_own_slots_with_their_own_draws(model):
    """What compacted rows compute and draw is what they would have without it."""
    results = []
    for compacts in (False, True):
        decoder, new, hidden = make_decoder(model, [[5, 6], [7], [8, 9, 10]], limits=[2, 9, 9], stop_ids=[])
        draw = decoder.plain_draw(PlainDraw(1.0, False))
        decoder.admit(new, hidden, draw)
        for _ in range(5):
            decoder.step(draw, [], longest=0, by_graph=False, records=False)
            live = [row for row, goes_on in enumerate(decoder.sync()[1]) if goes_on]
            if compacts and len(live) < decoder.num_rows:
                decoder.compact(live[::-1])
        assert decoder.num_rows == (2 if compacts else 3)
        results.append([part for row in new[1:] for part in decoder.fetch([(row.place, row.place + 6)])[0]])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_reset_forgets_rows_and_frees_their_pages(model):
    decoder, new, hidden = make_decoder(model, [[5, 6], [7]], limits=[9, 9], stop_ids=[])
    decoder.admit(new, hidden, scripted([20, 21]))
    decoder.reset([5])
    assert decoder.num_rows == 0 and decoder.sync() == ([], [], [], [])
    assert decoder.cache.num_free_pages == decoder.cache.num_pages
