"""Causal attention of packed sequences with a learned sink per head, an optional sliding window and grouped queries.

p_ij = exp(s_ij - m) / (sum_j exp(s_ij - m) + exp(sink_h - m)) for the visible j, s_ij = scale * q_i . k_j: the sink takes
probability but has no value (openai/gpt-oss, gpt_oss/torch/model.py: sdpa). That is plain attention times sigmoid(lse - sink).
With a window W, i sees j iff 0 <= i - j < W: W keys, its own included. A sink of minus infinity is none: the softmax is over the
visible keys alone, and the sink's gradient is 0.

Gradients, with lse_i = log(sum_j exp(s_ij) + exp(sink_h)), P_ij = exp(s_ij - lse_i) and delta_i = do_i . o_i:
dv_j = sum_i P_ij do_i, ds_ij = P_ij (do_i . v_j - delta_i), dq_i = scale sum_j ds_ij k_j, dk_j = scale sum_i ds_ij q_i, and
dsink_h = -sum_i exp(sink_h - lse_i) delta_i (FlashAttention-2, arXiv 2307.08691, algorithm 2, with the sink in lse).

The kernels: a program of forward or dq takes one tile of queries of one head; a program of dk and dv takes one tile of keys of
one key-value head, for every query head that reads it. That is seven products instead of the five of a fused backward, but no
atomics: two runs give the same bits. The host computes once per batch which tiles meet (AttentionPlan); a windowed layer visits
only the tiles in its window.

The forward can also take the last queries only (AttentionPlan, first_query), if the earlier keys of a sequence are in a cache:
they get the same bits as in the whole sequence (kernels/attention/parts.py).

Shapes: T packed tokens, Q queries (T, or the last of them), H query heads, K key-value heads, D head width; query head h reads
key-value head h // (H / K).
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention.library import library_backward, library_forward
from kernels.attention.parts import (
    all_keys,
    forward_tiles,
    is_visible,
    key_range,
    keys_of_part,
    load_rows,
    no_keys,
    sink_scores,
)
from kernels.attention.plan import AttentionPlan
from kernels.attention.reference import attention_reference
from kernels.device import check_served, gpu_family, launch, measured, product_path, unmeasured

_LOG2_E = 1.4426950408889634


class AttentionBlocks(NamedTuple):
    queries: int  # rows of a query tile
    keys: int  # rows of a key tile
    warps: int
    stages: int
    descriptor: bool  # whether whole tiles are loaded through tensor descriptors (TMA on Hopper and later)
    in_registers: bool = False  # dk and dv: whether the tiles of keys and values stay in registers
    max_registers: int = 0  # of a thread; 0: as many as the compiler takes


class KernelBlocks(NamedTuple):
    forward: AttentionBlocks
    dq: AttentionBlocks
    dkv: AttentionBlocks


@triton.jit
def _in_registers(tile, D: tl.constexpr):
    """The same tile, [rows, D], as the result of a product, and so in registers, for products with it on the left. A loaded
    tile is in shared memory, where wgmma would read it again at every step."""
    dims = tl.arange(0, D)
    identity = (dims[:, None] == dims[None, :]).to(tile.dtype)
    return tl.dot(tile, identity, input_precision="ieee").to(tile.dtype)


@triton.jit
def _forward_range(total, total_max, total_sum, acc, row_max, row_sum, sink, q, k, v, k_tiles, v_tiles, stride_k, stride_v,
                   column, row, key_start, key_end, scale_log2, window, WINDOWED: tl.constexpr, DESCRIPTOR: tl.constexpr,
                   D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr):
    rows = row + tl.arange(0, BLOCK_M)
    first, whole_end, last = key_range(row, key_start, key_end, window, WINDOWED, BLOCK_M, BLOCK_N)
    if not WINDOWED:
        total, total_max, total_sum, acc, row_max, row_sum = forward_tiles(
            total, total_max, total_sum, acc, row_max, row_sum, sink, q, k, v, k_tiles, v_tiles, stride_k, stride_v, column, rows,
            key_start, first, whole_end, key_end, scale_log2, window, WINDOWED, False, DESCRIPTOR, D, BLOCK_N, PART, True)
    return forward_tiles(total, total_max, total_sum, acc, row_max, row_sum, sink, q, k, v, k_tiles, v_tiles, stride_k, stride_v,
                         column, rows, key_start, whole_end, last, key_end, scale_log2, window, WINDOWED, True, DESCRIPTOR, D,
                         BLOCK_N, PART, True)


@triton.jit(do_not_specialize=["window", "num_queries", "first_query"])
def _forward_kernel(q, k, v, k_tiles, v_tiles, sinks, out, lse, tiles, stride_q, stride_k, stride_v, stride_out, num_heads,
                    num_queries, first_query, scale_log2, window, GROUP: tl.constexpr, WINDOWED: tl.constexpr,
                    PREFIXED: tl.constexpr, PART: tl.constexpr, DESCRIPTOR: tl.constexpr, D: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows count keys; q, out and lse begin at row first_query."""
    # the query heads of a tile run side by side and share its keys in L2
    head = tl.program_id(0) % num_heads
    tile = tiles + tl.program_id(0) // num_heads * 5
    first, end, start = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    column = head // GROUP * D
    k += column
    v += column
    query = first - first_query
    q_tile = load_rows(q + head * D, stride_q, query, end - first_query, BLOCK_M, D, True)
    # the sink is one more score, whose value is 0
    sink = tl.zeros([BLOCK_M], tl.float32) + sink_scores(tl.load(sinks + head))
    total, total_max, total_sum, acc, row_max, row_sum = no_keys(sink, D, PART)
    if PREFIXED:
        prefix_start, prefix_end = tl.load(tile + 3), tl.load(tile + 4)
        total, total_max, total_sum, acc, row_max, row_sum = _forward_range(
            total, total_max, total_sum, acc, row_max, row_sum, sink, q_tile, k, v, k_tiles, v_tiles, stride_k, stride_v, column,
            first - start + prefix_end, prefix_start, prefix_end, scale_log2, window, WINDOWED, DESCRIPTOR, D, BLOCK_M, BLOCK_N,
            PART)
    total, total_max, total_sum, acc, row_max, row_sum = _forward_range(
        total, total_max, total_sum, acc, row_max, row_sum, sink, q_tile, k, v, k_tiles, v_tiles, stride_k, stride_v, column,
        first, start, end, scale_log2, window, WINDOWED, DESCRIPTOR, D, BLOCK_M, BLOCK_N, PART)
    total, total_max, total_sum = all_keys(total, total_max, total_sum, acc, row_max, row_sum, PART)
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    inside = first + rows < end
    out += query.to(tl.int64) * stride_out + head * D
    tl.store(out + rows[:, None] * stride_out + dims[None, :], (total / total_sum[:, None]).to(out.dtype.element_ty),
             mask=inside[:, None])
    lse += head.to(tl.int64) * num_queries + query
    tl.store(lse + rows, (total_max + tl.log2(total_sum)) * 0.6931471805599453, mask=inside)


@triton.jit
def _dq_tiles(dq, q, do, lse_log2, delta, k, v, k_tiles, v_tiles, stride_k, stride_v, column, rows, first, last, key_end,
              scale_log2, window, WINDOWED: tl.constexpr, MASKED: tl.constexpr, DESCRIPTOR: tl.constexpr, D: tl.constexpr,
              BLOCK_N: tl.constexpr):
    for start in tl.range(first, last, BLOCK_N):
        if DESCRIPTOR and not MASKED:
            k_tile = k_tiles.load([start, column])  # [BLOCK_N, D]
            v_tile = v_tiles.load([start, column])
        else:
            k_tile = load_rows(k, stride_k, start, key_end, BLOCK_N, D, MASKED)
            v_tile = load_rows(v, stride_v, start, key_end, BLOCK_N, D, MASKED)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        dweights = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
        weights = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        if MASKED:
            cols = start + tl.arange(0, BLOCK_N)
            weights = tl.where(is_visible(rows[:, None], cols[None, :], key_end, window, WINDOWED), weights, 0.0)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def _dq_range(dq, q, do, lse_log2, delta, k, v, k_tiles, v_tiles, stride_k, stride_v, column, row, key_start, key_end,
              scale_log2, window, WINDOWED: tl.constexpr, DESCRIPTOR: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):
    rows = row + tl.arange(0, BLOCK_M)
    first, whole_end, last = key_range(row, key_start, key_end, window, WINDOWED, BLOCK_M, BLOCK_N)
    if not WINDOWED:
        dq = _dq_tiles(dq, q, do, lse_log2, delta, k, v, k_tiles, v_tiles, stride_k, stride_v, column, rows, first, whole_end,
                       key_end, scale_log2, window, WINDOWED, False, DESCRIPTOR, D, BLOCK_N)
    return _dq_tiles(dq, q, do, lse_log2, delta, k, v, k_tiles, v_tiles, stride_k, stride_v, column, rows, whole_end, last,
                     key_end, scale_log2, window, WINDOWED, True, DESCRIPTOR, D, BLOCK_N)


@triton.jit(do_not_specialize=["window", "num_tokens"])
def _dq_kernel(q, k, v, k_tiles, v_tiles, sinks, out, dout, lse, row_stats, dsinks, dq, tiles, stride_q, stride_k, stride_v,
               stride_out, stride_dq, num_heads, num_tokens, scale, scale_log2, window, GROUP: tl.constexpr,
               WINDOWED: tl.constexpr, PREFIXED: tl.constexpr, DESCRIPTOR: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr):
    """Also writes, for the kernel of dk and dv, each query's (lse in base 2, delta): [H, T, 2]; and each tile's part of the
    sinks' gradient [tiles, H]."""
    head = tl.program_id(0) % num_heads
    tile = tiles + tl.program_id(0) // num_heads * 5
    first, end, start = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    column = head // GROUP * D
    k += column
    v += column
    q_tile = load_rows(q + head * D, stride_q, first, end, BLOCK_M, D, True)
    dout_tile = load_rows(dout + head * D, stride_out, first, end, BLOCK_M, D, True)
    out_tile = load_rows(out + head * D, stride_out, first, end, BLOCK_M, D, True)
    rows = tl.arange(0, BLOCK_M)
    inside = first + rows < end
    per_row = head.to(tl.int64) * num_tokens + first
    lse_tile = tl.load(lse + per_row + rows, mask=inside, other=0.0)
    delta_tile = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)  # [BLOCK_M]
    lse_log2 = lse_tile * 1.4426950408889634
    tl.store(row_stats + (per_row + rows) * 2, lse_log2, mask=inside)
    tl.store(row_stats + (per_row + rows) * 2 + 1, delta_tile, mask=inside)
    # rows past the end have delta 0
    sink_weights = tl.exp2(tl.where(inside, tl.load(sinks + head).to(tl.float32) - lse_tile, 0.0) * 1.4426950408889634)
    tl.store(dsinks + tl.program_id(0), -tl.sum(sink_weights * delta_tile, 0))
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    if PREFIXED:
        prefix_start, prefix_end = tl.load(tile + 3), tl.load(tile + 4)
        acc = _dq_range(acc, q_tile, dout_tile, lse_log2, delta_tile, k, v, k_tiles, v_tiles, stride_k, stride_v, column,
                        first - start + prefix_end, prefix_start, prefix_end, scale_log2, window, WINDOWED, DESCRIPTOR, D,
                        BLOCK_M, BLOCK_N)
    acc = _dq_range(acc, q_tile, dout_tile, lse_log2, delta_tile, k, v, k_tiles, v_tiles, stride_k, stride_v, column, first,
                    start, end, scale_log2, window, WINDOWED, DESCRIPTOR, D, BLOCK_M, BLOCK_N)
    dims = tl.arange(0, D)
    dq += first.to(tl.int64) * stride_dq + head * D
    tl.store(dq + rows[:, None] * stride_dq + dims[None, :], (acc * scale).to(dq.dtype.element_ty),
             mask=inside[:, None])


@triton.jit
def _dkv_tiles(dk, dv, k_tile, v_tile, q, dout, q_tiles, dout_tiles, row_stats, stride_q, stride_out, first_head, cols, first,
               end, shift, from_tile, num_visits, last_tile, edge_tiles, num_tokens, scale_log2, window,
               GROUP: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, DESCRIPTOR: tl.constexpr, D: tl.constexpr,
               BLOCK_M: tl.constexpr):
    """Visits `num_visits` query tiles of each query head of the group: from_tile and those after it, except that visit
    number edge_tiles goes to last_tile. One loop over heads and tiles, so that loads run ahead across heads."""
    head, visit = first_head, 0
    for _ in tl.range(0, GROUP * num_visits):
        tile = from_tile + visit
        if MASKED:
            tile = tl.where(visit < edge_tiles, tile, last_tile)
        row = first + tile * BLOCK_M
        if DESCRIPTOR and not MASKED:
            q_tile = q_tiles.load([row, head * D])  # [BLOCK_M, D]
            dout_tile = dout_tiles.load([row, head * D])
        else:
            q_tile = load_rows(q + head * D, stride_q, row, end, BLOCK_M, D, MASKED)
            dout_tile = load_rows(dout + head * D, stride_out, row, end, BLOCK_M, D, MASKED)
        rows = row + tl.arange(0, BLOCK_M)
        # one load for both: alone, each would be too small for the compiler to spread over the threads
        stats = row_stats + (tl.cast(head, tl.int64) * num_tokens + row) * 2
        stats = stats + tl.arange(0, BLOCK_M)[:, None] * 2 + tl.arange(0, 2)[None, :]
        if MASKED:
            stats_tile = tl.load(stats, mask=(rows < end)[:, None], other=0.0)
        else:
            stats_tile = tl.load(stats)
        lse_tile, delta_tile = tl.split(stats_tile)  # [BLOCK_M] each
        # keys on the first axis, so that weights and dscores are the left operands of the sums over queries
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
        weights = tl.exp2(scores * scale_log2 - lse_tile[None, :])
        if MASKED:
            visible = (cols[:, None] <= (rows + shift)[None, :]) & (rows < end)[None, :]
            if WINDOWED:
                visible = visible & (cols[:, None] > (rows + shift - window)[None, :])
            weights = tl.where(visible, weights, 0.0)
        dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
        dscores = weights * (dweights - delta_tile[None, :])
        dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
        # counted, not divided: a division takes as many instructions as loads do
        visit += 1
        head = tl.where(visit == num_visits, head + 1, head)
        visit = tl.where(visit == num_visits, 0, visit)
    return dk, dv


@triton.jit(do_not_specialize=["window", "num_tokens"])
def _dkv_kernel(q, k, v, q_tiles, dout_tiles, dout, row_stats, dk, dv, tiles, readers, stride_q, stride_k, stride_v,
                stride_out, stride_dk, num_kv_heads, num_tokens, scale, scale_log2, window, GROUP: tl.constexpr,
                WINDOWED: tl.constexpr, DESCRIPTOR: tl.constexpr, IN_REGISTERS: tl.constexpr, D: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    kv_head = tl.program_id(0) % num_kv_heads
    tile = tiles + tl.program_id(0) // num_kv_heads * 4
    first, end, first_reader, last_reader = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    cols = first + tl.arange(0, BLOCK_N)
    last_key = tl.minimum(first + BLOCK_N, end) - 1
    k_tile = load_rows(k + kv_head * D, stride_k, first, end, BLOCK_N, D, True)
    v_tile = load_rows(v + kv_head * D, stride_v, first, end, BLOCK_N, D, True)
    if IN_REGISTERS:
        k_tile = _in_registers(k_tile, D)
        v_tile = _in_registers(v_tile, D)
    dk_acc = tl.zeros([BLOCK_N, D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, D], tl.float32)
    for reader in tl.range(first_reader, last_reader):
        shift = tl.load(readers + reader * 3 + 2)
        row = tl.maximum(tl.load(readers + reader * 3), first - shift)
        row_end = tl.load(readers + reader * 3 + 1)
        if WINDOWED:
            row_end = tl.minimum(row_end, last_key + window - shift)
        num_rows = tl.maximum(row_end - row, 0)
        num_tiles = tl.cdiv(num_rows, BLOCK_M)
        if WINDOWED:
            edge_tiles, num_masked = num_tiles, num_tiles  # few tiles, most of them at an edge: all are masked
        else:
            # tiles on the diagonal, then the last one if it is partial; those between are seen whole
            edge_tiles = tl.minimum(tl.cdiv(tl.maximum(last_key - shift - row, 0), BLOCK_M), num_tiles)
            num_masked = edge_tiles + ((edge_tiles < num_tiles) & (num_rows % BLOCK_M > 0)).to(tl.int32)
        dk_acc, dv_acc = _dkv_tiles(dk_acc, dv_acc, k_tile, v_tile, q, dout, q_tiles, dout_tiles, row_stats, stride_q,
                                    stride_out, kv_head * GROUP, cols, row, row_end, shift, 0, num_masked, num_tiles - 1,
                                    edge_tiles, num_tokens, scale_log2, window, GROUP, WINDOWED, True, DESCRIPTOR, D, BLOCK_M)
        if not WINDOWED:
            dk_acc, dv_acc = _dkv_tiles(dk_acc, dv_acc, k_tile, v_tile, q, dout, q_tiles, dout_tiles, row_stats, stride_q,
                                        stride_out, kv_head * GROUP, cols, row, row_end, shift, edge_tiles,
                                        num_tiles - num_masked, num_tiles - 1, edge_tiles, num_tokens, scale_log2, window,
                                        GROUP, WINDOWED, False, DESCRIPTOR, D, BLOCK_M)
    rows = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, D)
    offset = first.to(tl.int64) * stride_dk + kv_head * D
    offsets = rows[:, None] * stride_dk + dims[None, :]
    inside = (cols < end)[:, None]
    tl.store(dk + offset + offsets, (dk_acc * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + offset + offsets, dv_acc.to(dv.dtype.element_ty), mask=inside)


# family -> sizes for 2-byte dtypes up to width 64, without a window and with one; scripts/bench_kernels.py --blocks tries others.
# Hopper's forward: with 128 registers two programs share a multiprocessor, though they keep the sums of two parts
_FULL = {
    "ampere": unmeasured(KernelBlocks(AttentionBlocks(128, 64, 8, 3, False), AttentionBlocks(128, 32, 8, 2, False),
                                      AttentionBlocks(32, 128, 8, 2, False))),
    "consumer": unmeasured(KernelBlocks(AttentionBlocks(128, 32, 8, 2, False), AttentionBlocks(64, 32, 4, 2, False),
                                        AttentionBlocks(32, 64, 4, 2, False))),
    "hopper": measured(KernelBlocks(AttentionBlocks(128, 64, 8, 3, False, max_registers=128), AttentionBlocks(64, 64, 4, 3, True),
                                    AttentionBlocks(64, 64, 4, 3, True, in_registers=True))),
    "blackwell": unmeasured(KernelBlocks(AttentionBlocks(128, 64, 8, 3, False), AttentionBlocks(64, 64, 4, 3, False),
                                         AttentionBlocks(64, 64, 8, 2, False))),
}
_WINDOWED = {
    "ampere": unmeasured(KernelBlocks(AttentionBlocks(64, 32, 4, 2, False), AttentionBlocks(64, 32, 4, 2, False),
                                      AttentionBlocks(32, 64, 4, 2, False))),
    "consumer": unmeasured(KernelBlocks(AttentionBlocks(64, 32, 4, 2, False), AttentionBlocks(64, 32, 4, 2, False),
                                        AttentionBlocks(32, 64, 4, 2, False))),
    "hopper": measured(KernelBlocks(AttentionBlocks(64, 32, 4, 3, False), AttentionBlocks(64, 32, 4, 3, False),
                                    AttentionBlocks(64, 64, 4, 3, False))),
    "blackwell": unmeasured(KernelBlocks(AttentionBlocks(64, 64, 4, 3, False), AttentionBlocks(64, 64, 4, 2, False),
                                         AttentionBlocks(64, 64, 8, 2, False))),
}
# wider heads on every family, unmeasured
_WIDE_BLOCKS = KernelBlocks(AttentionBlocks(64, 32, 4, 2, False), AttentionBlocks(64, 32, 4, 2, False),
                            AttentionBlocks(32, 64, 8, 2, False))
# float32 has no tensor cores at full precision: it is there for comparisons, and for the interpreter
_FLOAT32_BLOCKS = KernelBlocks(AttentionBlocks(32, 16, 4, 1, False), AttentionBlocks(32, 16, 4, 1, False),
                               AttentionBlocks(16, 32, 4, 1, False))


def blocks_for(family: str, dtype: torch.dtype, *, windowed: bool, width: int) -> KernelBlocks:
    """Block sizes for a GPU family (kernels.device.gpu_family), a dtype and a head width."""
    if family == "interpreter" or dtype == torch.float32:
        return _FLOAT32_BLOCKS
    return _WIDE_BLOCKS if width > 64 else (_WINDOWED if windowed else _FULL)[family].blocks


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] with a token's heads contiguous and rows aligned to 16 bytes, as the kernels' loads need them."""
    aligned = x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] and aligned else x.contiguous()


def _tiles_of(x: torch.Tensor, rows: int, blocks: AttentionBlocks) -> TensorDescriptor | torch.Tensor:
    """A tensor descriptor for whole tiles of x; x itself if the kernels use pointers."""
    if not blocks.descriptor:
        return x
    return TensorDescriptor(x, [x.shape[0], x.shape[1] * x.shape[2]], [x.stride(0), 1], [rows, x.shape[2]])


def _constants(q: torch.Tensor, k: torch.Tensor, window: int, blocks: AttentionBlocks) -> dict[str, int]:
    """The constants of all three kernels."""
    limit = {"maxnreg": blocks.max_registers} if blocks.max_registers else {}
    return {"GROUP": q.shape[1] // k.shape[1], "WINDOWED": window > 0, "DESCRIPTOR": blocks.descriptor, "D": q.shape[2],
            "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys, "num_warps": blocks.warps, "num_stages": blocks.stages} | limit


def forward_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, plan: AttentionPlan, *, window: int,
                   scale: float, blocks: AttentionBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [Q, H, D] and lse [H, Q] fp32, nats, the sink included."""
    num_queries, num_heads, width = q.shape
    out = torch.empty((num_queries, num_heads, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_queries), dtype=torch.float32, device=q.device)
    tiles = plan.query_tiles(blocks.queries, q.device)
    launch(
        _forward_kernel, (len(tiles) * num_heads,), q, k, v, _tiles_of(k, blocks.keys, blocks),
        _tiles_of(v, blocks.keys, blocks), sinks, out, lse, tiles, q.stride(0), k.stride(0), v.stride(0), out.stride(0),
        num_heads, num_queries, plan.first_query, scale * _LOG2_E, window,
        PREFIXED=plan.prefixes is not None, PART=keys_of_part(q.dtype, window), **_constants(q, k, window, blocks))
    return out, lse


def dq_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, out: torch.Tensor, dout: torch.Tensor,
              lse: torch.Tensor, plan: AttentionPlan, *, window: int, scale: float, blocks: AttentionBlocks,
              dq: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq [T, H, D] (in the given tensor, if any); [tiles, H] fp32, whose sum over tiles is the sinks' gradient; and [H, T, 2]
    fp32 for dkv_triton: lse in base 2, and delta."""
    num_tokens, num_heads, width = q.shape
    dq = torch.empty((num_tokens, num_heads, width), dtype=q.dtype, device=q.device) if dq is None else dq
    row_stats = torch.empty((num_heads, num_tokens, 2), dtype=torch.float32, device=q.device)
    tiles = plan.query_tiles(blocks.queries, q.device)
    dsinks = torch.empty((len(tiles), num_heads), dtype=torch.float32, device=q.device)
    launch(
        _dq_kernel, (len(tiles) * num_heads,), q, k, v, _tiles_of(k, blocks.keys, blocks), _tiles_of(v, blocks.keys, blocks),
        sinks, out, dout, lse, row_stats, dsinks, dq, tiles, q.stride(0), k.stride(0), v.stride(0), out.stride(0), dq.stride(0),
        num_heads, num_tokens, scale, scale * _LOG2_E, window,
        PREFIXED=plan.prefixes is not None, **_constants(q, k, window, blocks))
    return dq, dsinks, row_stats


def dkv_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, row_stats: torch.Tensor,
               plan: AttentionPlan, *, window: int, scale: float, blocks: AttentionBlocks,
               out: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv [T, K, D], written into `out` (both with one row stride) if given."""
    num_tokens, num_kv_heads, width = k.shape
    dk, dv = out or (torch.empty((num_tokens, num_kv_heads, width), dtype=k.dtype, device=k.device) for _ in range(2))
    assert dk.stride() == dv.stride(), (dk.stride(), dv.stride())
    tiles, readers = plan.key_tiles(blocks.keys, k.device)
    launch(
        _dkv_kernel, (len(tiles) * num_kv_heads,), q, k, v, _tiles_of(q, blocks.queries, blocks),
        _tiles_of(dout, blocks.queries, blocks), dout, row_stats, dk, dv, tiles, readers, q.stride(0), k.stride(0), v.stride(0),
        dout.stride(0), dk.stride(0), num_kv_heads, num_tokens, scale, scale * _LOG2_E, window,
        IN_REGISTERS=blocks.in_registers, **_constants(q, k, window, blocks))
    return dk, dv


def attention_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, plan: AttentionPlan, *,
                      window: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [Q, H, D] and lse [H, Q] fp32, nats, of tensors aligned as _rows() makes them. By the kernels or the library
    (kernels/device.py: product_path), no gradient."""
    if product_path(q) == "library":
        return library_forward(q, k, v, sinks, plan, window=window, scale=scale)
    blocks = blocks_for(gpu_family(q), q.dtype, windowed=window > 0, width=q.shape[2])
    return forward_triton(q, k, v, sinks, plan, window=window, scale=scale, blocks=blocks.forward)


def attention_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, out: torch.Tensor,
                       lse: torch.Tensor, dout: torch.Tensor, plan: AttentionPlan, *, window: int, scale: float,
                       grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, written into `grads` if given, and parts [parts, H] fp32 whose sum is the sinks' gradient. `grads` may be
    out, k and v: nobody reads what a program overwrites, and it has read that before. By the kernels or the library, as
    attention_forward."""
    assert plan.first_query == 0, f"keys without queries have no gradient here: {plan.first_query} rows before the first query"
    settings = {"window": window, "scale": scale}
    if product_path(q) == "library":
        return library_backward(q, k, v, sinks, out, lse, dout, plan, grads=grads, **settings)
    blocks = blocks_for(gpu_family(q), q.dtype, windowed=window > 0, width=q.shape[2])
    dq, dsinks, row_stats = dq_triton(q, k, v, sinks, out, dout, lse, plan, blocks=blocks.dq,
                                      dq=None if grads is None else grads[0], **settings)
    dk, dv = dkv_triton(q, k, v, dout, row_stats, plan, blocks=blocks.dkv, out=None if grads is None else grads[1:], **settings)
    return dq, dk, dv, dsinks


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, plan, window, scale):
        q, k, v, sinks = _rows(q), _rows(k), _rows(v), sinks.contiguous()
        out, lse = attention_forward(q, k, v, sinks, plan, window=window, scale=scale)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan, ctx.window, ctx.scale = plan, window, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        saved = ctx.saved_tensors  # once: checkpointing computes them again for each access
        dq, dk, dv, dsinks = attention_backward(*saved, dout.contiguous(), ctx.plan, window=ctx.window,
                                                scale=ctx.scale)
        return dq, dk, dv, dsinks.sum(0).to(saved[3].dtype), None, None, None


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, path: str) -> None:
    check_served("attention", {"q": q, "k": k, "v": v}, dtypes=(torch.bfloat16, torch.float16, torch.float32),
                 tensor_cores=path == "triton")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; the kernels take one dtype")
    if path == "triton" and q.shape[2] not in (16, 32, 64, 128):
        raise ValueError(f"attention: head width {q.shape[2]}; the Triton kernel takes 16, 32, 64 or 128")
    assert sinks.device == q.device, (sinks.device, q.device)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, *, cu_seqlens: list[int],
              window: int, scale: float, plan: AttentionPlan | None = None) -> torch.Tensor:
    """Attention within each packed sequence. q [Q, H, D], k and v [T, K, D], sinks [H]; cu_seqlens [S + 1] on the host;
    window 0 means none; scale above 0. Returns [Q, H, D] in q's dtype; gradients reach q, k, v and the sinks.

    `plan` is AttentionPlan(cu_seqlens), made once for all layers; it may have prefixes, which other sequences continue. Q is T
    unless the plan has a first_query; then there is no gradient."""
    plan = AttentionPlan(cu_seqlens) if plan is None else plan
    assert plan.cu_seqlens == cu_seqlens, (plan.cu_seqlens, cu_seqlens)
    assert cu_seqlens[-1] == plan.first_query + q.shape[0] == k.shape[0] == v.shape[0], (
        cu_seqlens[-1], plan.first_query, q.shape, k.shape, v.shape)
    path = product_path(q)
    if path == "reference":
        return attention_reference(q, k, v, sinks, cu_seqlens, window, scale, prefixes=plan.prefixes,
                                   first_query=plan.first_query)
    _check(q, k, v, sinks, path)
    assert scale > 0, scale
    if not torch.is_grad_enabled():
        return attention_forward(_rows(q), _rows(k), _rows(v), sinks.contiguous(), plan, window=window, scale=scale)[0]
    return _Attention.apply(q, k, v, sinks, plan, window, scale)
