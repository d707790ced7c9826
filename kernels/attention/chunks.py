"""Attention of the next tokens of several sequences, in one launch: they see what a cache has of their sequences, and each other.
The cache need not have their own keys and values.

The loop over keys and the sizes of its tiles are those of the forward kernel of packed.py, so a query gets the bits that it gets
in the whole sequence. The grid depends on the number of rows alone, and what differs from call to call is read on the device: a
CUDA graph serves any sections.

A section is a run of rows of one sequence, all in its prefix or all after it. Sections are int64 [5, S + 1], their columns in the
order of the rows: first row; slot; position of row 0 if the sequence went back so far; first position that is not in the cache;
length of the prefix whose keys are summed before the others (AttentionPlan), else 0. The last column has the number of rows.
Sections at the end may be empty.

Shapes: T rows, S sections, a power of two, H query heads, K key-value heads, D head width; caches as in decode.py.
"""
import torch
import triton
import triton.language as tl

from kernels.attention.packed import blocks_for
from kernels.attention.parts import all_keys, forward_tiles, key_range, keys_of_part, load_rows, no_keys, sink_scores
from kernels.device import check_served, gpu_family, launch, overlap_constants, wait_for_launch_before
from kernels.experts.tiles import owner_of_tile, tiles_of_experts

_LOG2_E = 1.4426950408889634


@triton.jit
def _chunk_range(total, total_max, total_sum, acc, row_max, row_sum, sink, q, keys, values, k, v, pages, stride_k, stride_v,
                 position, split, key_start, key_end, scale_log2, window, STRIDE_KEY: tl.constexpr, WINDOWED: tl.constexpr,
                 RING: tl.constexpr, PAGE: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, PART: tl.constexpr):
    """For the queries from `position` on: the keys key_start .. key_end of their sequence, those before `split` from the cache,
    key p of the others at k + p * stride_k."""
    positions = position + tl.arange(0, BLOCK_M)
    first, whole_end, last = key_range(position, key_start, key_end, window, WINDOWED, BLOCK_M, BLOCK_N)
    if not WINDOWED:  # all queries see the tiles in the cache
        whole_end = key_start + tl.maximum(tl.minimum(split, key_end) - key_start, 0) // BLOCK_N * BLOCK_N
        total, total_max, total_sum, acc, row_max, row_sum = forward_tiles(
            total, total_max, total_sum, acc, row_max, row_sum, sink, q, keys, values, keys, values, STRIDE_KEY, STRIDE_KEY, 0,
            positions, key_start, first, whole_end, key_end, scale_log2, window, WINDOWED, False, False, D, BLOCK_N, PART, True,
            RING, PAGE, pages, ALIGNED)
    return forward_tiles(total, total_max, total_sum, acc, row_max, row_sum, sink, q, keys, values, keys, values, STRIDE_KEY,
                         STRIDE_KEY, 0, positions, key_start, whole_end, last, key_end, scale_log2, window, WINDOWED, True, False,
                         D, BLOCK_N, PART, True, RING, PAGE, pages, ALIGNED, k, v, stride_k, stride_v, split)


@triton.jit(do_not_specialize=["window", "num_rows", "pages_per_slot"])
def _attend_chunks_kernel(q, k, v, keys, values, sinks, out, sections, page_table, stride_q, stride_k, stride_v, stride_out,
                          stride_slot, num_heads, num_rows, pages_per_slot, scale_log2, window, STRIDE_KEY: tl.constexpr,
                          SECTIONS: tl.constexpr, GROUP: tl.constexpr, WINDOWED: tl.constexpr, PREFIXED: tl.constexpr,
                          RING: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                          PART: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    head, tile = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    tiles_of = tiles_of_experts(sections, num_rows, SECTIONS, BLOCK_M, SECTIONS, True)
    ends_of = tl.cumsum(tiles_of, 0)
    if tile < tl.sum(tiles_of, 0):
        section, within, start, end = owner_of_tile(tile, tiles_of, ends_of, sections, num_rows, 1, SECTIONS, True)
        sections += SECTIONS + 1 + section
        slot = tl.load(sections)
        shift = tl.load(sections + (SECTIONS + 1)).to(tl.int32)
        split = tl.load(sections + 2 * (SECTIONS + 1)).to(tl.int32)
        row, end = (start + within * BLOCK_M).to(tl.int32), end.to(tl.int32)
        pages = page_table + slot * pages_per_slot
        column = head // GROUP * D
        keys += column
        values += column
        if PAGE == 0:
            keys += slot * stride_slot
            values += slot * stride_slot
        k += column - shift.to(tl.int64) * stride_k
        v += column - shift.to(tl.int64) * stride_v
        q_tile = load_rows(q + head * D, stride_q, row, end, BLOCK_M, D, True)
        sink = tl.zeros([BLOCK_M], tl.float32) + sink_scores(tl.load(sinks + head))
        total, total_max, total_sum, acc, row_max, row_sum = no_keys(sink, D, PART)
        first = 0
        if PREFIXED:
            first = tl.load(sections + 3 * (SECTIONS + 1)).to(tl.int32)
            total, total_max, total_sum, acc, row_max, row_sum = _chunk_range(
                total, total_max, total_sum, acc, row_max, row_sum, sink, q_tile, keys, values, k, v, pages, stride_k, stride_v,
                row + shift, split, 0, first, scale_log2, window, STRIDE_KEY, WINDOWED, RING, PAGE, True, D, BLOCK_M, BLOCK_N,
                PART)
        total, total_max, total_sum, acc, row_max, row_sum = _chunk_range(
            total, total_max, total_sum, acc, row_max, row_sum, sink, q_tile, keys, values, k, v, pages, stride_k, stride_v,
            row + shift, split, first, end + shift, scale_log2, window, STRIDE_KEY, WINDOWED, RING, PAGE, not PREFIXED, D,
            BLOCK_M, BLOCK_N, PART)
        total, total_max, total_sum = all_keys(total, total_max, total_sum, acc, row_max, row_sum, PART)
        rows, dims = row + tl.arange(0, BLOCK_M), tl.arange(0, D)
        tl.store(out + rows.to(tl.int64)[:, None] * stride_out + head * D + dims[None, :],
                 (total / total_sum[:, None]).to(out.dtype.element_ty), mask=(rows < end)[:, None])


def chunk_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                    sinks: torch.Tensor, *, sections: torch.Tensor, is_prefixed: bool, window: int, scale: float,
                    page_table: torch.Tensor | None) -> torch.Tensor:
    """q [T, H, D] against k and v [T, K, D] and, before them, the caches of their sections, pages or without a page_table rings
    of at most `window` keys; sinks [H]; window 0 means none. is_prefixed: sections may have prefixes. Returns [T, H, D] in q's
    dtype; rows in no section are undefined. Triton only, no gradient."""
    check_served("chunk_attention", {"q": q, "k": k, "v": v, "keys": keys, "values": values}, tensor_cores=True,
                 dtypes=(torch.bfloat16, torch.float16, torch.float32))
    (num_rows, num_heads, width), num_sections = q.shape, sections.shape[1] - 1
    assert q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype, (q.dtype, k.dtype, keys.dtype)
    assert all(x.stride()[1:] == (width, 1) for x in (q, k, v)), (q.stride(), k.stride(), v.stride())
    assert keys.is_contiguous() and values.is_contiguous() and sections.is_contiguous() and sections.dtype == torch.int64
    assert (page_table is None) == (window > 0) and num_sections & (num_sections - 1) == 0, (window, num_sections)
    blocks = blocks_for(gpu_family(q), q.dtype, windowed=window > 0, width=width).forward
    page, table = (0, sections) if page_table is None else (keys.shape[1], page_table)
    assert page % blocks.keys == 0, (page, blocks.keys)
    out = torch.empty((num_rows, num_heads, width), dtype=q.dtype, device=q.device)
    num_tiles = num_rows // blocks.queries + num_sections  # at most: a part tile per section
    launch(_attend_chunks_kernel, (num_tiles * num_heads,), q, k, v, keys, values, sinks, out, sections, table, q.stride(0),
           k.stride(0), v.stride(0), out.stride(0), keys.stride(0), num_heads, num_rows,
           0 if page_table is None else page_table.shape[1], scale * _LOG2_E, window, STRIDE_KEY=keys.stride(1),
           SECTIONS=num_sections, GROUP=num_heads // keys.shape[2], WINDOWED=window > 0, PREFIXED=is_prefixed,
           RING=0 if page else keys.shape[1], PAGE=page, D=width, BLOCK_M=blocks.queries, BLOCK_N=blocks.keys,
           PART=keys_of_part(q.dtype, window), num_warps=blocks.warps, num_stages=blocks.stages, **overlap_constants(q, num_rows))
    return out
