"""Attention of one new token per sequence over its key-value cache, with sinks, a sliding window and grouped queries.

The formula is that of kernels/attention/packed.py with a single query row. A windowed layer's cache is a ring: the key of
position p is entry p % L of its slot. A full layer's cache may consist of pages: the key of position p is entry p % L of page
page_table[slot, p // L]. A tile counted from the start of the sequence is in one page, a tile counted from the end of a prefix
may be in two. The numbers of those pages are loaded one tile ahead. The bits do not depend on where a key is stored.

The Triton kernel gives a row the same bits as the forward kernel of kernels/attention/packed.py, on GPUs on which that kernel's
products are mma.sync or wgmma (sm_80 to sm_90, sm_120), in bf16 and fp16:
* it uses that kernel's loop (kernels/attention/parts.py) over the same parts and tiles, counted from the start of the sequence
  and, if training shares prompts, again from the end of the prefix (`prefix_lens`);
* only one sum's order depends on the layout, that of a row's weights. In both kernels a thread has columns 8 j + 2 (lane % 4) and
  the next one of its row, adds its own, and a butterfly adds those of four lanes. This holds as long as all warps are along the
  rows; 16 rows fill one warp.

There is one program of one warp for each sequence and key-value head, whose 8 query heads (in gpt-oss) are padded to the 16 rows
of the smallest product. It reads each key and value once, up to the sequence's position. With few sequences most of a GPU would
be idle: then each part of a sequence has a program of its own, and another launch adds the parts (`longest`).

If sequences share a prefix, another launch may first read it for several of them at once, 64 rows to a product (SharedPrefixes);
each sequence then continues with its own keys. Its sums keep their order, and so their bits.

Shapes: B sequences, N slots, M pages, W pages per slot, L entries per slot or page, H query heads, K key-value heads, D head
width.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.attention.packed import blocks_for
from kernels.attention.parts import add_part, all_keys, forward_tiles, keys_of_part, load_rows, no_keys, sink_scores
from kernels.attention.reference import attend
from kernels.device import (
    cdiv,
    check_served,
    gpu_family,
    launch,
    measured,
    next_power_of_2,
    num_multiprocessors,
    overlap_constants,
    product_path,
    unmeasured,
    wait_for_launch_before,
)

_LOG2_E = 1.4426950408889634
# stages of the loads, by windowed: 6 and 8 programs fit a Hopper multiprocessor's shared memory
_STAGES = {False: 3, True: 4}
# GPU family -> the most programs of a full layer, for each multiprocessor, that load with _STAGES, and the stages of more
# programs: each needs less shared memory then, so more of them run at once
_CROWDED = {"hopper": measured((6, 2))}
# parts whose loads do not wait for each other, in a program that adds parts
_PARTS_AT_ONCE = 8
# rows of a product with a shared prefix: 8 sequences of gpt-oss's 8 query heads
_PREFIX_ROWS = 64
# GPU family -> stages of its loads if a program has a multiprocessor's shared memory to itself: only stages hide the loads then
_PREFIX_STAGES = {"ampere": unmeasured(3), "consumer": unmeasured(3), "hopper": measured(8), "blackwell": unmeasured(8),
                  "interpreter": unmeasured(3)}


class SharedPrefixes(NamedTuple):
    """Rows with the same prefix, which is then read once for several of them."""

    tiles: torch.Tensor  # [N, 2] int32: first row and number of neighbouring rows of one prefix, at most rows_per_tile; 0: none
    is_shared: torch.Tensor  # [B] int32, 0 or 1: whether a row is in one of the tiles


def rows_per_tile(group: int) -> int:
    """The most sequences that read their prefix together; group: query heads of a key-value head."""
    return max(1, _PREFIX_ROWS // next_power_of_2(group))


def part_bytes(num_heads: int, width: int) -> int:
    """What decode_attention stores of a part of a row if it has `longest`: output, maximum and sum of each head, in fp32."""
    return 4 * num_heads * (width + 2)


def _stages(x: torch.Tensor, num_programs: int, *, windowed: bool) -> int:
    if not windowed and (crowded := _CROWDED.get(gpu_family(x))):
        most, stages = crowded.blocks
        return stages if num_programs > most * num_multiprocessors(x) else _STAGES[False]
    return _STAGES[windowed]


def _prefix_stages(x: torch.Tensor, num_programs: int) -> int:
    is_alone = num_programs <= 2 * num_multiprocessors(x) and x.element_size() == 2
    return _PREFIX_STAGES[gpu_family(x)].blocks if is_alone else _STAGES[False]


def decode_attention_reference(q, keys, values, sinks, slots, positions, scale, page_table=None):
    num_entries = keys.shape[1] * (1 if page_table is None else page_table.shape[1])
    num_keys = (positions + 1).clamp(min=0, max=num_entries)
    max_keys = max(int(num_keys.max()), 1)
    visible = torch.arange(max_keys, device=q.device) < num_keys.unsqueeze(1)  # [B, max_keys]
    if page_table is None:
        k, v = keys[:, :max_keys][slots], values[:, :max_keys][slots]  # [B, max_keys, K, D]
    else:
        pages = page_table[slots, : cdiv(max_keys, keys.shape[1])].long()
        is_missing = (pages < 0) & visible[:, :: keys.shape[1]]
        assert not is_missing.any(), f"no page for keys of slots {slots[is_missing.any(1)].tolist()} up to {positions.tolist()}"
        entries = pages.clamp(min=0).unsqueeze(2) * keys.shape[1] + torch.arange(keys.shape[1], device=q.device)
        entries = entries.flatten(1)[:, :max_keys]  # [B, max_keys]
        k, v = (cache.flatten(0, 1).index_select(0, entries.flatten()).unflatten(0, entries.shape) for cache in (keys, values))
    # the sequence never wrote entries from num_keys on: 0 * inf must not give NaN
    v = v.masked_fill(~visible[:, :, None, None], 0.0)
    return attend(q.unsqueeze(1), k, v, sinks, visible[:, None, None, None, :], scale).squeeze(1).to(q.dtype)


@triton.jit
def _decode_range(total, total_max, total_sum, acc, row_max, row_sum, sink, q, k, v, pages, stride_key, position, key_start, last,
                  key_end, scale_log2, window, WINDOWED: tl.constexpr, RING: tl.constexpr, PAGE: tl.constexpr,
                  ALIGNED: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr):
    first = key_start
    if WINDOWED:
        first = key_start + tl.maximum(position - window + 1 - key_start, 0) // BLOCK_N * BLOCK_N
    # all tiles are masked: one loop that always loads ahead costs only a few comparisons per tile
    rows = tl.zeros([BLOCK_H], tl.int32) + position
    return forward_tiles(total, total_max, total_sum, acc, row_max, row_sum, sink, q, k, v, k, v, stride_key, stride_key, 0, rows,
                         key_start, first, last, key_end, scale_log2, window, WINDOWED, True, False, D, BLOCK_N, PART, False,
                         RING, PAGE, pages, ALIGNED)


@triton.jit
def _store_sums(state, acc, row_max, row_sum, mask):
    """Output [rows, D], maximum and sum of rows to state [rows]: pointers to D + 2 numbers each."""
    D: tl.constexpr = acc.shape[1]
    tl.store(state[:, None] + tl.arange(0, D)[None, :], acc, mask=mask[:, None])
    tl.store(state + D, row_max, mask=mask)
    tl.store(state + D + 1, row_sum, mask=mask)


@triton.jit(do_not_specialize=["pages_per_slot"])
def _prefix_kernel(q, keys, values, sinks, states, tiles, slots, prefix_lens, page_table, stride_q, scale_log2, pages_per_slot,
                   STRIDE_KEY: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, OVERLAPS: tl.constexpr):
    """Reads a prefix once for up to ROWS sequences that share it. Writes the output so far, its maximum and its sum, from which
    _decode_kernel continues, to states [B, H, D + 2]."""
    wait_for_launch_before(OVERLAPS)
    first_head = tl.program_id(0) * GROUP
    first_row, num_rows = tl.load(tiles + tl.program_id(1) * 2), tl.load(tiles + tl.program_id(1) * 2 + 1)
    end = 0
    if num_rows > 0:
        end = tl.load(prefix_lens + first_row).to(tl.int32)
    pages = page_table + tl.load(slots + first_row).to(tl.int64) * pages_per_slot
    rows = tl.arange(0, ROWS * BLOCK_H)
    heads, dims = rows % BLOCK_H, tl.arange(0, D)
    is_head = (rows // BLOCK_H < num_rows) & (heads < GROUP)
    row = (first_row + rows // BLOCK_H).to(tl.int64)
    q_tile = tl.load(q + (row * stride_q + (first_head + heads) * D)[:, None] + dims[None, :], mask=is_head[:, None], other=0.0)
    sink = sink_scores(tl.load(sinks + first_head + heads, mask=heads < GROUP, other=0.0))
    total, total_max, total_sum, acc, row_max, row_sum = no_keys(sink, D, PART)
    keys += tl.program_id(0) * D
    values += tl.program_id(0) * D
    # every row sees the whole prefix: only a partial last tile needs a mask
    whole_end = end // BLOCK_N * BLOCK_N
    last = tl.zeros_like(rows) + end
    total, total_max, total_sum, acc, row_max, row_sum = forward_tiles(
        total, total_max, total_sum, acc, row_max, row_sum, sink, q_tile, keys, values, keys, values, STRIDE_KEY, STRIDE_KEY, 0,
        last, 0, 0, whole_end, end, scale_log2, 0, False, False, False, D, BLOCK_N, PART, True, 0, PAGE, pages, True)
    total, total_max, total_sum, acc, row_max, row_sum = forward_tiles(
        total, total_max, total_sum, acc, row_max, row_sum, sink, q_tile, keys, values, keys, values, STRIDE_KEY, STRIDE_KEY, 0,
        last, 0, whole_end, end, end, scale_log2, 0, False, True, False, D, BLOCK_N, PART, True, 0, PAGE, pages, True)
    total, total_max, total_sum = all_keys(total, total_max, total_sum, acc, row_max, row_sum, PART)
    state = states + (row * (tl.num_programs(0) * GROUP) + first_head + heads) * (D + 2)
    _store_sums(state, total, total_max, total_sum, is_head)


@triton.jit
def _sequence(positions, prefix_lens, sequence, pages_per_slot, PREFIXED: tl.constexpr, PAGE: tl.constexpr):
    """A sequence's number of keys, and of those in its prefix. An idle row has a position below 0, and no keys."""
    num_keys = tl.maximum(tl.load(positions + sequence).to(tl.int32) + 1, 0)
    if PAGE > 0:
        # the result of a row past its table is not used, but it must not read past the table
        num_keys = tl.minimum(num_keys, pages_per_slot * PAGE)
    prefix = 0
    if PREFIXED:
        prefix = tl.minimum(tl.load(prefix_lens + sequence).to(tl.int32), num_keys)
    return num_keys, prefix


@triton.jit(do_not_specialize=["window", "pages_per_slot"])
def _decode_kernel(q, keys, values, sinks, out, states, is_shared, slots, positions, prefix_lens, page_table, stride_q,
                   stride_slot, stride_out, scale_log2, window, pages_per_slot, STRIDE_KEY: tl.constexpr, GROUP: tl.constexpr,
                   WINDOWED: tl.constexpr, PREFIXED: tl.constexpr, SHARES: tl.constexpr, BY_PART: tl.constexpr,
                   RING: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
                   PART: tl.constexpr, OVERLAPS: tl.constexpr):
    """BY_PART: writes output, maximum and sum of one part, program_id(2), to states [B, parts, H, D + 2], for _add_parts_kernel.
    SHARES: goes on from what _prefix_kernel has written to states."""
    wait_for_launch_before(OVERLAPS)
    # the key-value heads of a sequence run side by side: their keys share pages of memory
    first_head = tl.program_id(0) * GROUP
    num_heads = tl.num_programs(0) * GROUP
    sequence = tl.program_id(1).to(tl.int64)
    num_keys, prefix = _sequence(positions, prefix_lens, sequence, pages_per_slot, PREFIXED, PAGE)
    position = num_keys - 1
    slot = tl.load(slots + sequence).to(tl.int64)
    pages = page_table + slot * pages_per_slot
    cache = slot * stride_slot + tl.program_id(0) * D
    if PAGE > 0:
        cache = tl.program_id(0) * D
    keys += cache
    values += cache
    heads, dims = tl.arange(0, BLOCK_H), tl.arange(0, D)
    is_head = heads < GROUP
    sink = sink_scores(tl.load(sinks + first_head + heads, mask=is_head, other=0.0))
    total, total_max, total_sum, acc, row_max, row_sum = no_keys(sink, D, PART)
    if BY_PART:
        first, end = tl.program_id(2) * PART, num_keys
        if PREFIXED:  # whose parts come first
            num_before = tl.cdiv(prefix, PART)
            is_before = tl.program_id(2) < num_before
            first = tl.where(is_before, first, prefix + (tl.program_id(2) - num_before) * PART)
            end = tl.where(is_before, prefix, end)
        if first < end:
            q_tile = load_rows(q + sequence * stride_q + first_head * D, D, 0, GROUP, BLOCK_H, D, True)
            total, total_max, total_sum, acc, row_max, row_sum = _decode_range(
                total, total_max, total_sum, acc, row_max, row_sum, sink, q_tile, keys, values, pages, STRIDE_KEY, position,
                first, tl.minimum(first + PART, end), end, scale_log2, window, False, 0, PAGE, not PREFIXED, D, BLOCK_H,
                BLOCK_N, 0)
            place = (sequence * tl.num_programs(2) + tl.program_id(2)) * num_heads + first_head + heads
            _store_sums(states + place * (D + 2), acc, row_max, row_sum, is_head)
    else:
        q_tile = load_rows(q + sequence * stride_q + first_head * D, D, 0, GROUP, BLOCK_H, D, True)
        if PREFIXED:
            end = prefix
            if SHARES:
                is_known = (tl.load(is_shared + sequence) != 0) & (position >= 0)
                end = tl.where(is_known, 0, prefix)
                known = is_known & is_head
                state = states + (sequence * num_heads + first_head + heads) * (D + 2)
                total = tl.load(state[:, None] + dims[None, :], mask=known[:, None], other=0.0)
                total_max = tl.load(state + D, mask=known, other=total_max)
                total_sum = tl.load(state + D + 1, mask=known, other=total_sum)
            total, total_max, total_sum, acc, row_max, row_sum = _decode_range(
                total, total_max, total_sum, acc, row_max, row_sum, sink, q_tile, keys, values, pages, STRIDE_KEY, position, 0,
                end, end, scale_log2, window, WINDOWED, RING, PAGE, True, D, BLOCK_H, BLOCK_N, PART)
        # tiles lie within pages if they are counted from position 0
        total, total_max, total_sum, acc, row_max, row_sum = _decode_range(
            total, total_max, total_sum, acc, row_max, row_sum, sink, q_tile, keys, values, pages, STRIDE_KEY, position, prefix,
            num_keys, num_keys, scale_log2, window, WINDOWED, RING, PAGE, not PREFIXED, D, BLOCK_H, BLOCK_N, PART)
        total, total_max, total_sum = all_keys(total, total_max, total_sum, acc, row_max, row_sum, PART)
        out += sequence * stride_out + first_head * D
        tl.store(out + heads[:, None] * D + dims[None, :], (total / total_sum[:, None]).to(out.dtype.element_ty),
                 mask=is_head[:, None])


@triton.jit(do_not_specialize=["num_parts", "pages_per_slot"])
def _add_parts_kernel(sinks, out, states, positions, prefix_lens, stride_out, num_parts, pages_per_slot, PREFIXED: tl.constexpr,
                      PAGE: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAPS: tl.constexpr):
    """Adds the parts of a sequence that _decode_kernel has written to states [B, num_parts, H, D + 2], for one head. The loads of
    AT_ONCE parts do not wait for each other."""
    wait_for_launch_before(OVERLAPS)
    heads, dims = tl.program_id(0) + tl.arange(0, 1), tl.arange(0, D)  # one head, with the axis that add_part expects
    num_heads = tl.num_programs(0)
    sequence = tl.program_id(1).to(tl.int64)
    num_keys, prefix = _sequence(positions, prefix_lens, sequence, pages_per_slot, PREFIXED, PAGE)
    num_used = tl.cdiv(prefix, PART) + tl.cdiv(num_keys - prefix, PART)
    total_max = sink_scores(tl.load(sinks + heads))
    total, total_sum = tl.zeros([1, D], tl.float32), tl.full([1], 1.0, tl.float32)
    states += (sequence * num_parts * num_heads + heads) * (D + 2)
    for first in tl.range(0, num_used, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            state, is_used = states + (first + i) * num_heads * (D + 2), first + i < num_used
            # a part that is not there changes nothing: its factor is 2 to the power of minus infinity
            acc = tl.load(state[:, None] + dims[None, :], mask=is_used, other=0.0)
            row_max = tl.load(state + D, mask=is_used, other=float("-inf"))
            row_sum = tl.load(state + D + 1, mask=is_used, other=0.0)
            total, total_max, total_sum = add_part(total, total_max, total_sum, acc, row_max, row_sum, True)
    tl.store(out + sequence * stride_out + heads[:, None] * D + dims[None, :],
             (total / total_sum[:, None]).to(out.dtype.element_ty))


def decode_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor, *, slots: torch.Tensor,
                     positions: torch.Tensor, window: int, scale: float, prefix_lens: torch.Tensor | None = None,
                     page_table: torch.Tensor | None = None, shared: SharedPrefixes | None = None,
                     longest: int = 0) -> torch.Tensor:
    """q [B, H, D] of new tokens at positions [B] of slots [B], whose keys and values are already in the caches; sinks [H];
    window 0 means none. The caches are [N, L, K, D], of N slots, with L at most the window if there is one; or, without a window,
    [M, L, K, D] of M pages, and page_table [N, W] int32 has the pages of each slot. Rows at a position below 0 are idle and give
    zeros. Without a window, positions must be below L, or W * L, and in pages that the slot has: nothing checks that on a GPU,
    where no value is read back. Returns [B, H, D] in q's dtype.

    prefix_lens [B]: length of each sequence's prefix that training computes once for several sequences (AttentionPlan, prefixes),
    0 for none. Without them the bits are those of training on whole sequences; on the CPU they change nothing. shared: rows whose
    prefixes are equal and are read once, in pages; those rows must have the whole prefix. longest: if above 0, no row has more
    tokens, and each part of a row has a program of its own. The bits depend on neither."""
    assert keys.shape == values.shape and (window == 0 or keys.shape[1] <= window), (keys.shape, values.shape, window)
    assert page_table is None or window == 0, (page_table.shape, window)
    assert shared is None or (page_table is not None and prefix_lens is not None), "shared prefixes need pages and prefix_lens"
    assert not longest or (page_table is not None and shared is None), "parts need pages, and do not go with shared prefixes"
    if product_path(q) != "triton":  # the reference consists of library products
        return decode_attention_reference(q, keys, values, sinks, slots, positions, scale, page_table)
    check_served("decode_attention", {"q": q, "keys": keys, "values": values},
                 dtypes=(torch.bfloat16, torch.float16, torch.float32), tensor_cores=True)
    num_rows, num_heads, width = q.shape
    num_kv_heads, group = keys.shape[2], num_heads // keys.shape[2]
    if width not in (16, 32, 64, 128) or q.dtype != keys.dtype:
        raise ValueError(f"decode_attention: q {q.dtype} of width {width}, keys {keys.dtype}; the Triton kernel takes one dtype "
                         "and a width of 16, 32, 64 or 128")
    assert slots.shape == positions.shape == (num_rows,), (slots.shape, positions.shape, q.shape)
    assert keys.is_contiguous() and values.is_contiguous(), (keys.stride(), values.stride())
    assert page_table is None or page_table.is_contiguous(), page_table.stride()
    q = q if q.stride()[1:] == (width, 1) else q.contiguous()
    positions = positions.contiguous()
    out = torch.empty((num_rows, num_heads, width), dtype=q.dtype, device=q.device)
    blocks = blocks_for(gpu_family(q), q.dtype, windowed=window > 0, width=width).forward
    page = 0 if page_table is None else keys.shape[1]
    assert page % blocks.keys == 0, (page, blocks.keys)
    if num_rows == 0:
        return out
    sinks, slots = sinks.contiguous(), slots.contiguous()
    prefixes = positions if prefix_lens is None else prefix_lens.contiguous()
    table, pages_per_slot = (positions, 0) if page_table is None else (page_table, page_table.shape[1])
    part, is_prefixed = keys_of_part(q.dtype, window), prefix_lens is not None
    overlap, states, is_shared, num_parts = overlap_constants(q, num_rows), None, None, 1
    if longest:
        num_parts = cdiv(longest, part) + is_prefixed  # a prefix may end within a part
    if longest or shared is not None:
        states = torch.empty((num_rows, num_parts, num_heads, width + 2), dtype=torch.float32, device=q.device)
    if shared is not None:
        is_shared, heads, rows = shared.is_shared, next_power_of_2(group), rows_per_tile(group)
        launch(_prefix_kernel, (num_kv_heads, len(shared.tiles)), q, keys, values, sinks, states, shared.tiles, slots, prefixes,
               table, q.stride(0), scale * _LOG2_E, pages_per_slot, STRIDE_KEY=keys.stride(1), GROUP=group, PAGE=page, D=width,
               ROWS=rows, BLOCK_H=heads, BLOCK_N=blocks.keys, PART=part, num_warps=max(1, rows * heads // 16),
               num_stages=_prefix_stages(q, num_kv_heads * len(shared.tiles)), **overlap)
    launch(_decode_kernel, (num_kv_heads, num_rows, num_parts), q, keys, values, sinks, out, states, is_shared, slots, positions,
           prefixes, table, q.stride(0), keys.stride(0), out.stride(0), scale * _LOG2_E, window, pages_per_slot,
           STRIDE_KEY=keys.stride(1), GROUP=group, WINDOWED=window > 0, PREFIXED=is_prefixed, SHARES=shared is not None,
           BY_PART=longest > 0, RING=keys.shape[1] if window else 0, PAGE=page, D=width, BLOCK_H=max(16, next_power_of_2(group)),
           BLOCK_N=blocks.keys, PART=part, num_warps=1,
           num_stages=_stages(q, num_kv_heads * num_rows * num_parts, windowed=window > 0), **overlap)
    if longest:
        launch(_add_parts_kernel, (num_heads, num_rows), sinks, out, states, positions, prefixes, out.stride(0), num_parts,
               pages_per_slot, PREFIXED=is_prefixed, PAGE=page, D=width, PART=part, AT_ONCE=_PARTS_AT_ONCE, num_warps=1,
               num_stages=1, **overlap)
    return out
