"""The cache: pages and rings, who holds which page, and decoding past the window and over pages against full recomputation."""

import pytest
import torch

from models.config import GptOssConfig
from models.gpt_oss import GptOss
from models.keys import PrefillChunk
from models.kv_cache import PAGE_TOKENS, KVCache, page_bytes, slot_bytes

WINDOW = 4


@pytest.fixture(scope="module")
def config() -> GptOssConfig:
    return GptOssConfig.from_architecture({
        "vocab_size": 30, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW})


@pytest.fixture(scope="module")
def model(config, lively_model) -> GptOss:
    return lively_model(config, head_factor=20.0)


def make_cache(config, *, num_slots=4, max_len=200, num_pages=8, dtype=torch.float32) -> KVCache:
    return KVCache(config, num_slots=num_slots, max_len=max_len, num_pages=num_pages, device=torch.device("cpu"), dtype=dtype)


def table(cache: KVCache) -> list[list[int]]:
    cache.flush()
    return cache.page_table.tolist()


def fill(cache: KVCache) -> None:
    """Gives every entry of every layer a number of its own."""
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values)):
        keys.copy_(torch.arange(keys.numel()).view_as(keys) + layer * 1e6)
        values.copy_(-keys)


def test_windowed_layers_hold_a_window_per_slot_and_full_layers_pages(config):
    cache = make_cache(config, dtype=torch.bfloat16)
    assert [tuple(keys.shape) for keys in cache.keys] == [(4, WINDOW, 2, 8), (8, 64, 2, 8), (4, WINDOW, 2, 8)]
    assert cache.lengths == [WINDOW, 200, WINDOW] and cache.page_table.shape == (4, 4)
    # keys and values, 2 heads of 8, 2 bytes; one full and two windowed layers
    assert cache.num_bytes == 8 * 2 * 64 * 2 * 8 * 2 + 4 * 2 * 2 * WINDOW * 2 * 8 * 2
    assert make_cache(config, max_len=3).lengths == [3, 3, 3]


@pytest.mark.parametrize("num_tokens, pages", [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_a_slot_gets_the_pages_of_its_tokens_and_keeps_those_it_has(config, num_tokens, pages):
    assert PAGE_TOKENS == 64 and KVCache.pages_for(num_tokens) == pages
    cache = make_cache(config)
    assert cache.reserve(1, num_tokens) and cache.num_free_pages == 8 - pages
    before = table(cache)
    assert [page >= 0 for page in before[1]] == [True] * pages + [False] * (4 - pages)
    assert before[0] == before[2] == before[3] == [-1] * 4
    assert cache.reserve(1, max(0, num_tokens - 64)) and cache.reserve(1, num_tokens) and table(cache) == before
    assert cache.reserve(1, 200) and cache.num_free_pages == 4
    assert table(cache)[1][:pages] == before[1][:pages]


def test_no_page_belongs_to_two_slots_that_share_nothing(config):
    cache = make_cache(config)
    for slot, num_tokens in ((0, 130), (3, 64), (2, 200)):
        assert cache.reserve(slot, num_tokens)
    pages = [page for row in table(cache) for page in row if page >= 0]
    assert sorted(pages) == list(range(8)) and cache.num_free_pages == 0


def test_too_few_free_pages_change_nothing(config):
    cache = make_cache(config)
    assert cache.reserve(0, 150) and cache.reserve(1, 200)
    fill(cache)
    before, contents = table(cache), [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    assert not cache.reserve(2, 65)
    assert not cache.fan_out(0, [2, 3], 150)
    assert table(cache) == before and cache.num_free_pages == 1
    assert all(map(torch.equal, contents, (*cache.keys, *cache.values)))
    assert cache.reserve(2, 64)  # the last one is still to be had
    cache.release(2)
    assert cache.fan_out(0, [2], 150) and cache.num_free_pages == 0


def test_more_tokens_than_a_sequence_may_have_are_refused(config):
    with pytest.raises(ValueError, match="201 tokens do not fit a cache of 200"):
        make_cache(config).reserve(0, 201)


@pytest.mark.parametrize("num_tokens, num_whole, num_left", [(3, 0, 3), (63, 0, 63), (64, 1, 0), (65, 1, 1), (150, 2, 22)])
def test_a_fan_out_shares_whole_pages_and_copies_the_last(config, num_tokens, num_whole, num_left):
    cache = make_cache(config)
    assert cache.reserve(2, num_tokens)
    fill(cache)
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    num_free = cache.num_free_pages
    assert cache.fan_out(2, [3, 0], num_tokens)
    assert cache.num_free_pages == num_free - (2 if num_left else 0)
    rows = table(cache)
    tails = []
    for slot in (0, 3):
        assert rows[slot][:num_whole] == rows[2][:num_whole]
        assert [page >= 0 for page in rows[slot]] == [page >= 0 for page in rows[2]]
        tails += rows[slot][num_whole:num_whole + 1] if num_left else []
    source = rows[2][num_whole]
    assert len({*tails, source}) == len(tails) + 1  # nobody's last page is another's
    for old, new in zip(before, (*cache.keys, *cache.values)):
        expected = old.clone()
        if len(old) == 8:
            expected[tails, :num_left] = old[source, :num_left]
        else:
            count = min(num_tokens, WINDOW)
            expected[[0, 3], :count] = old[2, :count]
        assert torch.equal(new, expected)


def test_what_one_sequence_appends_after_a_fan_out_no_other_sees(config):
    cache = make_cache(config)
    assert cache.reserve(0, 70) and cache.fan_out(0, [1, 2], 70)
    cache.flush()
    for slot in range(3):
        k = torch.full((1, 2, 8), float(slot + 1))
        cache.write(1, k, -k, torch.tensor([slot]), torch.tensor([70]))
    pages = cache.page_table[:3, 1].long()
    assert cache.keys[1][pages, 6, 0, 0].tolist() == [1, 2, 3]
    assert cache.values[1][pages, 6, 1, 7].tolist() == [-1, -2, -3]
    assert cache.keys[1].count_nonzero() == 3 * 16


def test_a_shared_page_is_free_when_its_last_slot_releases_it(config):
    cache = make_cache(config)
    assert cache.reserve(0, 130) and cache.fan_out(0, [1, 2], 130)
    shared = table(cache)[0][:2]
    assert cache.num_free_pages == 8 - 2 - 3
    cache.release(0)
    assert cache.num_free_pages == 4 and table(cache)[0] == [-1] * 4
    cache.release(2)
    assert cache.num_free_pages == 5 and table(cache)[1][:2] == shared
    assert cache.reserve(0, 200) and not set(shared) & set(table(cache)[0])  # others still read them
    cache.release(0)
    cache.release(1)
    cache.release(3)  # has none
    assert cache.num_free_pages == 8 and table(cache) == [[-1] * 4] * 4
    assert cache.reserve(1, 200) and cache.reserve(2, 200)
    assert sorted(table(cache)[1] + table(cache)[2]) == list(range(8))


def test_a_slot_with_pages_or_one_named_twice_is_no_target(config):
    cache = make_cache(config)
    assert cache.reserve(0, 10) and cache.reserve(1, 10)
    for targets in ([2, 1], [0], [2, 2]):
        with pytest.raises(AssertionError, match="targets"):
            cache.fan_out(0, targets, 10)
    with pytest.raises(AssertionError, match="slot 2 has 0 pages"):
        cache.fan_out(2, [3], 10)


def test_the_table_changes_at_a_flush_and_stays_where_it_is(config):
    cache = make_cache(config)
    address = cache.page_table.data_ptr()
    assert cache.reserve(0, 200)
    assert (cache.page_table == -1).all()
    cache.flush()
    first = cache.page_table[0].tolist()
    cache.release(0)
    assert cache.reserve(3, 64) and cache.reserve(0, 10)
    assert cache.page_table[0].tolist() == first
    assert table(cache)[0][1:] == table(cache)[3][1:] == [-1] * 3 and cache.page_table.data_ptr() == address


def test_a_ring_keeps_position_p_at_p_modulo_its_length(config):
    cache = make_cache(config)
    assert cache.reserve(1, 70)
    cache.flush()
    for position in range(67):
        k = torch.full((1, 2, 8), float(position))
        for layer in range(3):
            cache.write(layer, k, -k, torch.tensor([1]), torch.tensor([position]))
    assert cache.keys[0][1, :, 0, 0].tolist() == [64, 65, 66, 63]
    assert cache.values[2][1, :, 1, 7].tolist() == [-64, -65, -66, -63]
    pages = cache.page_table[1, :2].long()
    assert cache.keys[1][pages, :, 0, 0].flatten().tolist() == [*range(67), *[0] * 61]
    assert not any(cache.keys[layer][[0, 2, 3]].any() for layer in (0, 2))


def test_what_was_written_is_read_back_in_the_order_of_positions(config):
    cache = make_cache(config)
    assert cache.reserve(2, 1) and cache.reserve(0, 150) and cache.reserve(2, 150)  # pages that are not in order
    cache.flush()
    k = torch.randn(150, 2, 8, generator=torch.Generator().manual_seed(0))
    for layer, length in enumerate(cache.lengths):
        last = max(150 - length, 0)
        cache.write(layer, k[last:], -k[last:], torch.full((150 - last,), 2), torch.arange(last, 150))
        for first in (max(last, 60), 148, 150):
            keys, values = cache.read(layer, 2, first, 150)
            assert torch.equal(keys, k[first:]) and torch.equal(values, -k[first:])
    ring = cache.is_paged.index(False)  # of 4 entries: position 145 is where 149 is now
    assert torch.equal(cache.read(ring, 2, 144, 150)[0], k[[148, 149, 146, 147, 148, 149]])
    with pytest.raises(AssertionError, match="slot 2 has 3 pages, not 193 tokens"):
        cache.read(0, 2, 0, 193)


def test_a_token_without_a_page_is_refused_on_the_cpu(config):
    cache = make_cache(config)
    assert cache.reserve(0, 64)
    cache.flush()
    k = torch.ones(2, 2, 8)
    with pytest.raises(AssertionError, match=r"no page for positions \[64\] of slots \[0\]"):
        cache.write(1, k, k, torch.tensor([0, 0]), torch.tensor([63, 64]))


def test_the_bytes_of_pages_and_rings(config):
    # two windowed layers and one full; keys and values of 2 heads of 8 in 2 bytes
    assert slot_bytes(config, torch.bfloat16, max_len=200) == 2 * 2 * WINDOW * 2 * 8 * 2
    assert page_bytes(config, torch.bfloat16) == 2 * 64 * 2 * 8 * 2


@torch.no_grad()
@pytest.mark.parametrize("prompt_lengths", [[1, 3, 4], [5, 2, 9], [4, 4, 4]])
def test_decoding_past_the_window_equals_full_recomputation(model, prompt_lengths):
    generator = torch.Generator().manual_seed(3)
    total = 14  # more than three times around the ring
    rows = torch.randint(0, 30, (3, total), generator=generator)
    expected = [model.logits(row, torch.tensor([0, total])) for row in rows]
    cache = model.new_cache(num_slots=5, max_len=total)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))  # what an earlier sequence left behind must not matter
    slots = torch.tensor([4, 0, 2])
    assert all(cache.reserve(slot, total) for slot in slots.tolist())
    prompts = [row[:length] for row, length in zip(rows, prompt_lengths)]
    chunks = [PrefillChunk(slot, 0, length) for slot, length in zip(slots.tolist(), prompt_lengths)]
    logits = model.head(model.prefill(torch.cat(prompts), chunks, cache))
    for row, length in enumerate(prompt_lengths):
        torch.testing.assert_close(logits[row], expected[row][length - 1], rtol=1e-5, atol=2e-5)
    positions = torch.tensor(prompt_lengths)
    while (alive := (positions < total).nonzero().flatten()).numel():
        tokens = rows[alive, positions[alive]]
        logits = model.head(model.decode(tokens, positions[alive], cache, slots[alive]))
        for row, result in zip(alive.tolist(), logits):
            torch.testing.assert_close(result, expected[row][positions[row]], rtol=1e-5, atol=2e-5)
        positions[alive] += 1


@torch.no_grad()
@pytest.mark.parametrize("prompt_len", [6, 62, 64, 66])
def test_copies_of_a_prompt_go_on_independently(model, prompt_len):
    prompt = torch.randint(0, 30, (prompt_len,), generator=torch.Generator().manual_seed(4))
    cache = model.new_cache(num_slots=3, max_len=prompt_len + 4, num_pages=6)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    assert cache.reserve(2, 1) and cache.reserve(0, prompt_len)
    cache.release(2)  # so that pages are not in order
    model.prefill(prompt, [PrefillChunk(0, 0, prompt_len)], cache)
    assert cache.fan_out(0, [1, 2], prompt_len)
    ends = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    for step in range(4):
        assert all(cache.reserve(slot, prompt_len + step + 1) for slot in range(3))  # pages as they are needed
        logits = model.head(model.decode(ends[:, step], torch.full((3,), prompt_len + step), cache, torch.arange(3)))
    for row, end in enumerate(ends):
        expected = model.logits(torch.cat((prompt, end)), torch.tensor([0, prompt_len + 4]))[-1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=2e-5)


def test_what_does_not_fit_is_refused(model):
    cache = model.new_cache(num_slots=1, max_len=5)
    slot = torch.tensor([0])
    with pytest.raises(ValueError, match="a prompt of 6 tokens does not fit a cache of 5"):
        model.prefill(torch.zeros(6, dtype=torch.int64), [PrefillChunk(0, 0, 6)], cache)
    with pytest.raises(ValueError, match="position 5 does not fit a cache of 5"):
        model.decode(torch.tensor([1]), torch.tensor([5]), cache, slot)
