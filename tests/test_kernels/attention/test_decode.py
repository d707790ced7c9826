"""One new token over a cache: goldens, rings in any order, pages, unwritten entries."""

import json

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.attention.decode import decode_attention
from kernels.attention.packed import attention

GOLDEN = load_file(FIXTURES / "kernels.safetensors")
META = json.loads((FIXTURES / "kernels_meta.json").read_text())


def golden(case: str) -> dict[str, torch.Tensor]:
    return {name: GOLDEN[f"attn.{case}.{name}"].float() for name in ("q", "k", "v", "sinks", "o")}


def test_a_long_cache_matches_the_golden_output():
    data, meta = golden("decode_full"), META["attn.decode_full"]
    # the keys stand in slot 2 of 3, with room after them that holds rubbish
    caches = [torch.full((3, 140, 2, 64), float("nan")) for _ in range(2)]
    for cache, name in zip(caches, ("k", "v")):
        cache[2, :131] = data[name]
    out = decode_attention(data["q"], *caches, data["sinks"], slots=torch.tensor([2]), positions=torch.tensor([130]),
                           window=0, scale=meta["scale"])
    torch.testing.assert_close(out, data["o"], rtol=1e-5, atol=2e-6)


def test_a_ring_of_window_entries_matches_the_golden_output():
    data, meta = golden("decode_win128"), META["attn.decode_win128"]
    window = meta["window"]
    caches = [torch.full((3, window, 2, 64), float("nan")) for _ in range(2)]
    for row in range(3):  # row i stands at position 197 + i and sees the window that ends there
        seen = torch.arange(meta["q_offset"] + row - window + 1, meta["q_offset"] + row + 1)
        for cache, name in zip(caches, ("k", "v")):
            cache[row, seen % window] = data[name][seen]
    out = decode_attention(data["q"], *caches, data["sinks"], slots=torch.arange(3),
                           positions=meta["q_offset"] + torch.arange(3), window=window, scale=meta["scale"])
    torch.testing.assert_close(out, data["o"], rtol=1e-5, atol=2e-6)


def random_cache(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, sinks = torch.randn(3, 4, 8, generator=generator), torch.randn(4, generator=generator)
    k, v = torch.randn(5, 16, 2, 8, generator=generator), torch.randn(5, 16, 2, 8, generator=generator)
    return [tensor.to(dtype) for tensor in (q, k, v, sinks)]


SLOTS, NUM_KEYS = torch.tensor([4, 0, 2]), torch.tensor([1, 16, 7])


def expected_rows(q, k, v, sinks):
    """Each row as the last token of a sequence of its own, through kernels/attention/packed.py."""
    rows = []
    for row, (slot, num_keys) in enumerate(zip(SLOTS.tolist(), NUM_KEYS.tolist())):
        queries = torch.cat((q.new_zeros(num_keys - 1, 4, 8), q[row : row + 1]))
        rows.append(attention(queries, k[slot, :num_keys], v[slot, :num_keys], sinks, cu_seqlens=[0, num_keys], window=0,
                              scale=0.5)[-1])
    return torch.stack(rows)


def test_rows_of_different_lengths_read_their_own_slots():
    q, k, v, sinks = random_cache()
    out = decode_attention(q, k, v, sinks, slots=SLOTS, positions=NUM_KEYS - 1, window=0, scale=0.5)
    torch.testing.assert_close(out, expected_rows(q, k, v, sinks), rtol=1e-5, atol=1e-6)


TABLE = torch.tensor([[3, 0, 8, 5], [-1, -1, -1, -1], [1, 6, -1, -1], [-1, -1, -1, -1], [9, -1, -1, -1]], dtype=torch.int32)


def test_pages_of_any_order_give_the_bits_of_one_stretch():
    q, k, v, sinks = random_cache()
    pools = [torch.full((10, 4, 2, 8), float("nan")) for _ in range(2)]
    for slot, num_keys in zip(SLOTS.tolist(), NUM_KEYS.tolist()):
        for position in range(num_keys):
            for pool, cache in zip(pools, (k, v)):
                pool[TABLE[slot, position // 4], position % 4] = cache[slot, position]
    for rows in (torch.tensor([0, 1, 2]), torch.tensor([2, 0])):
        settings = {"slots": SLOTS[rows], "positions": NUM_KEYS[rows] - 1, "window": 0, "scale": 0.5}
        out = decode_attention(q[rows], *pools, sinks, page_table=TABLE, **settings)
        assert torch.equal(out, decode_attention(q[rows], k, v, sinks, **settings))


def test_a_row_without_a_page_of_its_keys_is_refused_on_the_cpu():
    q, k, v, sinks = random_cache()
    with pytest.raises(AssertionError, match=r"no page for keys of slots \[2\]"):
        decode_attention(q, k[:, :4], v[:, :4], sinks, slots=SLOTS, positions=torch.tensor([3, 15, 8]), window=0, scale=0.5,
                         page_table=TABLE.clamp(max=4))


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
def test_entries_beyond_a_sequence_are_never_read(rubbish):
    q, k, v, sinks = random_cache()
    clean = decode_attention(q, k, v, sinks, slots=SLOTS, positions=NUM_KEYS - 1, window=0, scale=0.5)
    for slot, num_keys in zip(SLOTS.tolist(), NUM_KEYS.tolist()):
        k[slot, num_keys:], v[slot, num_keys:] = rubbish, rubbish
    k[[1, 3]], v[[1, 3]] = rubbish, rubbish  # slots of nobody
    out = decode_attention(q, k, v, sinks, slots=SLOTS, positions=NUM_KEYS - 1, window=0, scale=0.5)
    assert torch.equal(out, clean)


def test_the_order_of_entries_and_of_rows_does_not_matter():
    q, k, v, sinks = random_cache()
    q = q[1:2]
    settings = {"positions": torch.tensor([15]), "window": 0, "scale": 0.5}
    shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    straight = decode_attention(q, k, v, sinks, slots=torch.tensor([0]), **settings)
    shuffled = decode_attention(q, k[:, shuffle], v[:, shuffle], sinks, slots=torch.tensor([0]), **settings)
    torch.testing.assert_close(shuffled, straight, rtol=1e-5, atol=1e-6)

    q, k, v, sinks = random_cache()
    order = torch.tensor([2, 0, 1])
    out = decode_attention(q, k, v, sinks, slots=SLOTS, positions=NUM_KEYS - 1, window=0, scale=0.5)
    other = decode_attention(q[order], k, v, sinks, slots=SLOTS[order], positions=NUM_KEYS[order] - 1, window=0,
                             scale=0.5)
    torch.testing.assert_close(other, out[order], rtol=1e-6, atol=1e-6)


def test_room_after_the_longest_row_changes_nothing():
    q, k, v, sinks = random_cache()
    positions = torch.tensor([0, 4, 2])
    out, longer = (decode_attention(q, k[:, :length], v[:, :length], sinks, slots=SLOTS, positions=positions, window=0, scale=0.5)
                   for length in (5, 16))
    torch.testing.assert_close(longer, out, rtol=1e-6, atol=1e-6)


def test_idle_rows_give_zeros_and_leave_the_others_alone():
    q, k, v, sinks = random_cache()
    k[0], v[0] = float("nan"), float("nan")
    for positions, idle in (([3, -1, 2], [1]), ([-1, -1, -1], [0, 1, 2])):
        out = decode_attention(q, k, v, sinks, slots=SLOTS, positions=torch.tensor(positions), window=0, scale=0.5)
        assert (out[idle] == 0).all()
    alone = decode_attention(q[:1], k, v, sinks, slots=SLOTS[:1], positions=torch.tensor([3]), window=0, scale=0.5)
    both = decode_attention(q, k, v, sinks, slots=SLOTS, positions=torch.tensor([3, -1, 2]), window=0, scale=0.5)
    torch.testing.assert_close(both[:1], alone, rtol=1e-6, atol=1e-6)


def test_bf16_is_computed_in_fp32_and_rounded_once():
    q, k, v, sinks = random_cache(torch.bfloat16)
    out = decode_attention(q, k, v, sinks, slots=SLOTS, positions=NUM_KEYS - 1, window=0, scale=0.5)
    exact = expected_rows(q.double(), k.double(), v.double(), sinks.double())
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()
