"""Attention of one new token for few, long sequences: many programs share a sequence, with the sums of one program.

kernels/attention/decode.py reads a sequence's keys with one program per key-value head: maximum, sum and output change tile by
tile, and training adds in the same order. With few sequences most of a GPU waits for that chain, which grows with every token.
But most of the work needs no chain: the maximum before a tile can be computed in any order, and with it a tile's weights have the
same bits without the tiles before. So there are three steps:

    1. the largest score of every part of TILES tiles, in parallel;
    2. for every tile, in parallel, from the maximum of the parts and tiles before it: its weights, their sum, the new maximum;
    3. output and sum, tile by tile: out = out * 2^(old maximum - new) + weights V; slices of the head's width in parallel, which
       are independent.

A program of step 3 computes a slice of the products and one exponential a row. All sums have the order and the layouts of one
warp that they have in forward_tiles (kernels/attention/packed.py), and so the same bits. The price: two more launches, keys are
read twice, and weights are written and read (a sixteenth of keys and values with gpt-oss's 8 query heads).

Shapes: B sequences, N slots, M pages, W pages per slot, L entries per page, H query heads, K key-value heads, D head width,
R rows of a product: a key-value head's query heads, padded.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.attention.packed import load_rows
from kernels.device import cdiv, launch, next_power_of_2, overlap_constants, wait_for_launch_before

TILES = 4  # of a part
SLICE = 16  # of a head's width, the least that a product has
SCORE_STAGES, SUM_STAGES = 3, 6


@triton.jit
def _sequence(slots, positions, prefix_lens, page_table, sequence, pages_per_slot, PREFIXED: tl.constexpr, PAGE: tl.constexpr,
              BLOCK_N: tl.constexpr):
    """A sequence's number of keys, of keys in its prefix, of key tiles (0 if it is idle), and the pointer to its pages."""
    # the result of a row past its table is not used, but it must not read past the table
    num_keys = tl.minimum(tl.load(positions + sequence).to(tl.int32) + 1, pages_per_slot * PAGE)
    prefix = 0
    if PREFIXED:
        prefix = tl.minimum(tl.load(prefix_lens + sequence).to(tl.int32), num_keys)
    num_tiles = tl.cdiv(prefix, BLOCK_N) + tl.cdiv(num_keys - prefix, BLOCK_N)
    pages = page_table + tl.load(slots + sequence).to(tl.int64) * pages_per_slot
    return num_keys, prefix, num_tiles, pages


@triton.jit
def _tile_keys(tile, num_keys, prefix, PREFIXED: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's first key, and the end of the keys that it may have: the prefix's tiles come first."""
    start, end = tile * BLOCK_N, num_keys
    if PREFIXED:
        num_before = tl.cdiv(prefix, BLOCK_N)
        is_before = tile < num_before
        start = tl.where(is_before, start, prefix + (tile - num_before) * BLOCK_N)
        end = tl.where(is_before, prefix, end)
    return start, end


@triton.jit
def _tile_pages(pages, tile, num_tiles, num_keys, prefix, PREFIXED: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of a tile's first and last key, loaded one tile ahead so that loads of keys need not wait."""
    start, end = _tile_keys(tile, num_keys, prefix, PREFIXED, BLOCK_N)
    page = tl.load(pages + start // PAGE, mask=tile < num_tiles, other=0)
    next_page = page
    if PREFIXED:  # else tiles lie within pages
        next_page = tl.load(pages + (tl.minimum(start + BLOCK_N, end) - 1) // PAGE, mask=tile < num_tiles, other=0)
    return page, next_page


@triton.jit
def _tile_rows(pointer, page, next_page, start, end, STRIDE_KEY: tl.constexpr, PREFIXED: tl.constexpr, PAGE: tl.constexpr,
               D: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's keys or values [BLOCK_N, D], zeros from `end` on."""
    if PREFIXED:
        return load_rows(pointer, STRIDE_KEY, start, end, BLOCK_N, D, True, 0, PAGE, page, next_page)
    else:
        return load_rows(pointer, STRIDE_KEY, start, end, BLOCK_N, D, True, 0, PAGE, page)


@triton.jit
def _scores(q_tile, keys, page, next_page, tile, num_keys, prefix, STRIDE_KEY: tl.constexpr, PREFIXED: tl.constexpr,
            PAGE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Products [R, BLOCK_N] of the queries with a tile's keys, minus infinity beyond the last key."""
    start, end = _tile_keys(tile, num_keys, prefix, PREFIXED, BLOCK_N)
    k_tile = _tile_rows(keys, page, next_page, start, end, STRIDE_KEY, PREFIXED, PAGE, D, BLOCK_N)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    return tl.where((start + tl.arange(0, BLOCK_N) < end)[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=["pages_per_slot"])
def _part_max_kernel(q, keys, part_max, slots, positions, prefix_lens, page_table, stride_q, scale_log2, pages_per_slot,
                     STRIDE_KEY: tl.constexpr, GROUP: tl.constexpr, PREFIXED: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
                     BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    kv_head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_keys, prefix, num_tiles, pages = _sequence(slots, positions, prefix_lens, page_table, sequence, pages_per_slot, PREFIXED,
                                                   PAGE, BLOCK_N)
    first = tl.program_id(2) * TILES
    if first >= num_tiles:
        return
    q_tile = load_rows(q + sequence * stride_q + kv_head * GROUP * D, D, 0, GROUP, BLOCK_H, D, True)
    largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    page, next_page = _tile_pages(pages, first, num_tiles, num_keys, prefix, PREFIXED, PAGE, BLOCK_N)
    for tile in tl.range(first, tl.minimum(first + TILES, num_tiles)):
        scores = _scores(q_tile, keys + kv_head * D, page, next_page, tile, num_keys, prefix, STRIDE_KEY, PREFIXED, PAGE, D,
                         BLOCK_N)
        page, next_page = _tile_pages(pages, tile + 1, num_tiles, num_keys, prefix, PREFIXED, PAGE, BLOCK_N)
        largest = tl.maximum(largest, tl.max(scores, 1) * scale_log2)
    place = (sequence * tl.num_programs(0) + kv_head) * tl.num_programs(2) + tl.program_id(2)
    tl.store(part_max + place * BLOCK_H + tl.arange(0, BLOCK_H), largest)


@triton.jit(do_not_specialize=["pages_per_slot"])
def _weights_kernel(q, keys, sinks, part_max, weights, tile_max, tile_sum, slots, positions, prefix_lens, page_table, stride_q,
                    scale_log2, pages_per_slot, STRIDE_KEY: tl.constexpr, GROUP: tl.constexpr, PREFIXED: tl.constexpr,
                    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
                    OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    kv_head, sequence, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_keys, prefix, num_tiles, pages = _sequence(slots, positions, prefix_lens, page_table, sequence, pages_per_slot, PREFIXED,
                                                   PAGE, BLOCK_N)
    first = part * TILES
    if first >= num_tiles:
        return
    heads = tl.arange(0, BLOCK_H)
    q_tile = load_rows(q + sequence * stride_q + kv_head * GROUP * D, D, 0, GROUP, BLOCK_H, D, True)
    row_max = tl.load(sinks + kv_head * GROUP + heads, mask=heads < GROUP, other=0.0).to(tl.float32) * 1.4426950408889634
    place = (sequence * tl.num_programs(0) + kv_head) * tl.num_programs(2)
    for start in range(0, part, 32):
        parts = start + tl.arange(0, 32)
        before = tl.load(part_max + (place + parts)[:, None] * BLOCK_H + heads[None, :], mask=(parts < part)[:, None],
                         other=float("-inf"))
        row_max = tl.maximum(row_max, tl.max(before, 0))
    tile_max += place * TILES * BLOCK_H
    tile_sum += place * TILES * BLOCK_H
    weights += place * TILES * GROUP * BLOCK_N
    page, next_page = _tile_pages(pages, first, num_tiles, num_keys, prefix, PREFIXED, PAGE, BLOCK_N)
    for tile in tl.range(first, tl.minimum(first + TILES, num_tiles)):
        scores = _scores(q_tile, keys + kv_head * D, page, next_page, tile, num_keys, prefix, STRIDE_KEY, PREFIXED, PAGE, D,
                         BLOCK_N)
        page, next_page = _tile_pages(pages, tile + 1, num_tiles, num_keys, prefix, PREFIXED, PAGE, BLOCK_N)
        row_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        tile_weights = tl.exp2(scores * scale_log2 - row_max[:, None])
        tl.store(tile_max + tile * BLOCK_H + heads, row_max)
        tl.store(tile_sum + tile * BLOCK_H + heads, tl.sum(tile_weights, 1))
        tl.store(weights + tile * (GROUP * BLOCK_N) + (heads * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :],
                 tile_weights.to(weights.dtype.element_ty), mask=(heads < GROUP)[:, None])


@triton.jit
def _tile_numbers(tile_max, tile_sum, tile, num_tiles, BLOCK_H: tl.constexpr):
    """Maximum and sum of a tile [R]."""
    place = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    return (tl.load(tile_max + place, mask=tile < num_tiles, other=0.0),
            tl.load(tile_sum + place, mask=tile < num_tiles, other=0.0))


@triton.jit(do_not_specialize=["pages_per_slot", "num_parts"])
def _sum_kernel(values, sinks, out, weights, tile_max, tile_sum, slots, positions, prefix_lens, page_table, stride_out,
                pages_per_slot, num_parts, STRIDE_KEY: tl.constexpr, GROUP: tl.constexpr, PREFIXED: tl.constexpr,
                PAGE: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
                TILES: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    kv_head, column = tl.program_id(0) // (D // SLICE), tl.program_id(0) % (D // SLICE) * SLICE
    num_kv_heads, sequence = tl.num_programs(0) // (D // SLICE), tl.program_id(1).to(tl.int64)
    num_keys, prefix, num_tiles, pages = _sequence(slots, positions, prefix_lens, page_table, sequence, pages_per_slot, PREFIXED,
                                                   PAGE, BLOCK_N)
    heads, dims = tl.arange(0, BLOCK_H), tl.arange(0, SLICE)
    row_max = tl.load(sinks + kv_head * GROUP + heads, mask=heads < GROUP, other=0.0).to(tl.float32) * 1.4426950408889634
    row_sum = tl.full([BLOCK_H], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_H, SLICE], tl.float32)
    place = (sequence * num_kv_heads + kv_head) * num_parts * TILES
    tile_max += place * BLOCK_H
    tile_sum += place * BLOCK_H
    weights += place * GROUP * BLOCK_N
    values += kv_head * D + column
    largest, total = _tile_numbers(tile_max, tile_sum, 0, num_tiles, BLOCK_H)
    page, next_page = _tile_pages(pages, 0, num_tiles, num_keys, prefix, PREFIXED, PAGE, BLOCK_N)
    for tile in tl.range(0, num_tiles):
        start, end = _tile_keys(tile, num_keys, prefix, PREFIXED, BLOCK_N)
        tile_weights = tl.load(weights + tile * (GROUP * BLOCK_N) + (heads * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :],
                               mask=(heads < GROUP)[:, None], other=0.0)
        v_tile = _tile_rows(values, page, next_page, start, end, STRIDE_KEY, PREFIXED, PAGE, SLICE, BLOCK_N)
        page, next_page = _tile_pages(pages, tile + 1, num_tiles, num_keys, prefix, PREFIXED, PAGE, BLOCK_N)
        next_largest, next_total = _tile_numbers(tile_max, tile_sum, tile + 1, num_tiles, BLOCK_H)  # a tile ahead, too
        # `largest` is never below row_max; the maximum is taken because the compiler overlaps no iterations if a variable that
        # they pass on is only renamed
        new_max = tl.maximum(row_max, largest)
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + total
        acc = acc * shrink[:, None]
        acc = tl.dot(tile_weights, v_tile, acc, input_precision="ieee")
        row_max, largest, total = new_max, next_largest, next_total
    out += sequence * stride_out + kv_head * GROUP * D + column
    tl.store(out + heads[:, None] * D + dims[None, :], (acc / row_sum[:, None]).to(out.dtype.element_ty),
             mask=(heads < GROUP)[:, None])


def decode_attention_parts(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor, out: torch.Tensor, *,
                           slots: torch.Tensor, positions: torch.Tensor, prefixes: torch.Tensor, is_prefixed: bool,
                           page_table: torch.Tensor, longest: int, scale_log2: float, tile: int) -> None:
    """Writes decode_attention's result without a window to out [B, H, D], with the same bits. q [B, H, D], keys and values
    [M, L, K, D] in pages; prefixes [B]: its prefix_lens, ignored unless is_prefixed; no row has more than `longest` tokens; tile:
    keys of a tile. Triton only; decode_attention has checked the arguments."""
    num_rows, num_heads, width = q.shape
    page, num_kv_heads = keys.shape[1:3]
    group = num_heads // num_kv_heads
    num_parts = cdiv(cdiv(longest, tile) + 1, TILES)  # a prefix may end within a tile
    rows = max(16, next_power_of_2(group))
    part_max = q.new_empty((num_rows, num_kv_heads, num_parts, rows), dtype=torch.float32)
    tile_max, tile_sum = q.new_empty((2, num_rows, num_kv_heads, num_parts * TILES, rows), dtype=torch.float32)
    weights = q.new_empty((num_rows, num_kv_heads, num_parts * TILES, group, tile))
    of_rows = slots, positions, prefixes, page_table
    sizes = {"STRIDE_KEY": keys.stride(1), "GROUP": group, "PREFIXED": is_prefixed, "PAGE": page, "D": width,
             "BLOCK_H": rows, "BLOCK_N": tile, "TILES": TILES, "num_warps": 1} | overlap_constants(q, num_rows)
    of_queries = q.stride(0), scale_log2, page_table.shape[1]
    grid = num_kv_heads, num_rows, num_parts
    launch(_part_max_kernel, grid, q, keys, part_max, *of_rows, *of_queries, num_stages=SCORE_STAGES, **sizes)
    launch(_weights_kernel, grid, q, keys, sinks, part_max, weights, tile_max, tile_sum, *of_rows, *of_queries,
           num_stages=SCORE_STAGES, **sizes)
    launch(_sum_kernel, (num_kv_heads * (width // SLICE), num_rows), values, sinks, out, weights, tile_max, tile_sum, *of_rows,
           out.stride(0), page_table.shape[1], num_parts, SLICE=SLICE, num_stages=SUM_STAGES, **sizes)
