"""The routed experts for few tokens, where time goes into reading the weights: packed MXFP4 is read once for each expert that has
tokens, and unpacked in registers.

    y_t = residual_t + sum_k w_tk (act(x_t W1_e + b1_e) W2_e + b2_e),  e the k-th expert of t, each W with its unmerged LoRA

The weights are the M side of a matrix instruction (MMA) and a few tokens its N side, so no tile is mostly padding. Each output is
one sum over the inputs in ascending order, then over LoRA's rank, as in grouped_gemm; bias, rounding and activation follow in the
same order. So the bits are those of the training forward (forward.py) on dequantised weights, for every tile size and whatever
other tokens are in the batch. For this, the inputs of one output are never split over programs.

Packed weights are in fragment layout (kernels/packed/fragments.py): a thread's 32-bit word is its part of an MMA operand, and
needs no shared memory between unpacking and the tensor core. Two ways of unpacking give the same bits: inline assembly, for
bfloat16 on some GPUs with scales up to 128, and arithmetic in fp32 otherwise. The same kernel takes dense weights, and LoRA's
first factors.

LoRA's first product, low_rank = scale * x A^T rounded to x's dtype, is a launch of its own before that of W. Or, if the caller
has a counter for it, W's launch has a few more programs, its first: they compute low_rank while the others multiply with W and
then wait for the counter before they add LoRA. That saves a launch, and weights are asked for before x is there.

Expert offsets stay on the device and grids depend on the number of tokens alone, so a CUDA graph can replay the launches.
Programs without work exit at once.

If launches overlap (kernels/device.py), a launch of x A^T and that of W run at the same time: the latter waits just before it
adds LoRA. A launch that needs nothing but x from the one before (FOR_X) starts loading its first weights, then waits for x.

Shapes: T tokens, A experts per token, R = T * A routed rows, D model width, F expert width, E experts, r rank, K in, N out.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.device import (
    cdiv,
    check_served,
    gpu_family,
    launch,
    next_power_of_2,
    overlap_constants,
    prefetch,
    wait_for_launch_before,
)
from kernels.experts.few_tiles import DecodeBlocks, choose_decode_blocks, low_rank_steps, mma_of
from kernels.experts.gemm import DTYPES
from kernels.experts.sorting import Routing
from kernels.experts.tiles import owner_of_tile, tiles_of_experts
from kernels.packed.fragments import ROWS, chunk_of, unpack_fragments, word_views
from kernels.packed.weights import Projection
from kernels.swiglu import clamped_swiglu

# inputs that the launch before may write, if launches overlap: any; x; low_rank
FOR_ALL, FOR_X, FOR_LOW_RANK = 0, 1, 2
PREFETCH = tl.constexpr(512)  # inputs whose weights are prefetched before the wait for x


@triton.jit
def _packed_tile(words, scales, group_stride, scale_stride, k, is_group, GROUPS: tl.constexpr, INNER: tl.constexpr,
                 CHUNK: tl.constexpr, IS_ASM: tl.constexpr, EVEN_OUT: tl.constexpr):
    """Words and scales of GROUPS groups of 16 rows, INNER inputs from k."""
    per_input: tl.constexpr = 4 if IS_ASM else 2
    groups = tl.arange(0, GROUPS)[:, None]
    word_pointers = words + k * per_input + groups * group_stride + tl.arange(0, INNER * per_input)[None, :]
    scale_pointers = scales + k // CHUNK * 8 + groups * scale_stride + tl.arange(0, INNER // CHUNK * 8)[None, :]
    if EVEN_OUT:
        return tl.load(word_pointers), tl.load(scale_pointers).to(tl.int32)
    return (tl.load(word_pointers, mask=is_group[:, None], other=0),
            tl.load(scale_pointers, mask=is_group[:, None], other=0).to(tl.int32))


@triton.jit
def _sources(gather, rows, is_row, HAS_GATHER: tl.constexpr):
    """The rows of x that these routed rows take."""
    if HAS_GATHER:
        return tl.load(gather + rows, mask=is_row, other=0)
    else:
        return tl.where(is_row, rows, 0)


@triton.jit
def _lora_up(lora_up, lora_groups, expert, features, step, num_out, num_ranks, slice_rank, stride_expert, stride_rank, stride_out,
             RANK: tl.constexpr, HAS_GROUPS: tl.constexpr):
    """[features, RANK] of LoRA's second factor."""
    ranks = step * RANK + tl.arange(0, RANK)
    mask = (ranks < num_ranks)[None, :] & (features < num_out)[:, None]
    if HAS_GROUPS:
        own = tl.load(lora_groups + features, mask=features < num_out, other=-1)
        mask = mask & ((ranks // slice_rank)[None, :] == own[:, None])
        ranks = ranks % slice_rank
    pointers = lora_up + expert * stride_expert + ranks[None, :] * stride_rank + features[:, None] * stride_out
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _operand(a, MMA: tl.constexpr):
    """Returns unpacked weights, and for mma.sync hides from the compiler that tl.join made them. If Triton 3.6 or 3.7 finds a
    tl.join behind an operand, it gives each thread 4 inputs in a row instead of 2. An instruction then multiplies parts of 32
    inputs, not 16 in a row: sums have other bits than grouped_gemm's, and unpacked weights move to other threads. The compiler
    does not look behind an instruction that may have side effects, even an empty one."""
    if MMA == "mma.sync":
        return tl.inline_asm_elementwise("", "=r,0", [a], dtype=a.dtype, is_pure=False, pack=2)
    return a


@triton.jit
def _when_multiplied(acc, MMA: tl.constexpr):
    """Returns the sum after the tensor cores have read the operands of its last product. wgmma reads unpacked weights from
    registers while the program continues, and Triton 3.6 and 3.7 let the next step's unpacking overwrite them too early. Any use
    of the sum makes the program wait, even an empty instruction."""
    if MMA == "wgmma":
        return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def _packed_sums(
    x, sources, is_row, more_sources, is_more, weight_base, scale_base, first, num_out, stride_x,
    NUM_IN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, MORE: tl.constexpr, INNER: tl.constexpr, TAIL: tl.constexpr,
    CHUNK: tl.constexpr, IS_ASM: tl.constexpr, EVEN_OUT: tl.constexpr, MMA: tl.constexpr, OVERLAPS: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """Sums over all inputs for ROWS features: [ROWS, TOKENS] and, from the same weights, [ROWS, MORE] (0: the first again)."""
    dtype: tl.constexpr = x.dtype.element_ty
    GROUPS: tl.constexpr = ROWS // 16
    per_input: tl.constexpr = 4 if IS_ASM else 2
    is_group = first + 16 * tl.arange(0, GROUPS) < num_out
    group_stride = NUM_IN * per_input
    scale_stride = NUM_IN // CHUNK * 8
    inner = tl.arange(0, INNER)
    x_rows = x + sources.to(tl.int64)[None, :] * stride_x
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    if MORE:
        more_rows = x + more_sources.to(tl.int64)[None, :] * stride_x
        more = tl.zeros((ROWS, MORE), tl.float32)
    main = NUM_IN - TAIL
    if OVERLAPS and WAITS == 1:  # PREFETCH inputs of a row group, 128 bytes at a time
        line: tl.constexpr = 16 * per_input
        lines = tl.minimum(tl.arange(0, PREFETCH // 16), NUM_IN // 16 - 1) * line
        groups = tl.minimum(tl.arange(0, GROUPS), (num_out - first) // 16 - 1) * group_stride
        prefetch(weight_base + groups[:, None] + lines[None, :])
        wait_for_launch_before(OVERLAPS)
    if TAIL:  # loaded before the loop, so that nothing waits for it after the loop
        tail_words, tail_scales = _packed_tile(weight_base, scale_base, group_stride, scale_stride, main, is_group, GROUPS,
                                               TAIL, CHUNK, IS_ASM, EVEN_OUT)
        tail_x = tl.load(x_rows + main + tl.arange(0, TAIL)[:, None], mask=is_row[None, :], other=0.0)
        if MORE:
            more_tail_x = tl.load(more_rows + main + tl.arange(0, TAIL)[:, None], mask=is_more[None, :], other=0.0)
    for k in range(0, main, INNER):
        tile_words, tile_scales = _packed_tile(weight_base, scale_base, group_stride, scale_stride, k, is_group, GROUPS,
                                               INNER, CHUNK, IS_ASM, EVEN_OUT)
        b = tl.load(x_rows + k + inner[:, None], mask=is_row[None, :], other=0.0)
        if MORE:
            more_b = tl.load(more_rows + k + inner[:, None], mask=is_more[None, :], other=0.0)
        a = _operand(unpack_fragments(tile_words, tile_scales, GROUPS, INNER // CHUNK, CHUNK, dtype, IS_ASM, True), MMA)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if MORE:
            more = _when_multiplied(tl.dot(a, more_b, more, input_precision="ieee"), MMA)
        acc = _when_multiplied(acc, MMA)
    if TAIL:
        a = _operand(unpack_fragments(tail_words, tail_scales, GROUPS, TAIL // CHUNK, CHUNK, dtype, IS_ASM, True), MMA)
        acc = tl.dot(a, tail_x, acc, input_precision="ieee")
        if MORE:
            more = tl.dot(a, more_tail_x, more, input_precision="ieee")
    if not MORE:
        more = acc
    return acc, more


@triton.jit
def _dense_sum(
    x, sources, is_row, weight_base, features, num_out, stride_x, stride_weight,
    NUM_IN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
    IN_CONTIGUOUS: tl.constexpr, EVEN_IN: tl.constexpr, OVERLAPS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    inner = tl.arange(0, INNER)
    x_pointers = x + sources.to(tl.int64)[None, :] * stride_x + inner[:, None]
    is_feature = features < num_out
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    if IN_CONTIGUOUS:
        weight_pointers = weight_base + features.to(tl.int64)[:, None] * stride_weight + inner[None, :]
        if OVERLAPS and WAITS == 1:  # PREFETCH inputs of a row, 32 at a time: a line holds 32 of fp32
            lines = tl.minimum(tl.arange(0, PREFETCH // 32) * 32, NUM_IN - 1)
            clamped = tl.minimum(features, num_out - 1).to(tl.int64)
            prefetch(weight_base + clamped[:, None] * stride_weight + lines[None, :])
    else:
        weight_pointers = weight_base + inner.to(tl.int64)[None, :] * stride_weight + features[:, None]
    if WAITS == 1:
        wait_for_launch_before(OVERLAPS)
    for k in tl.range(0, NUM_IN, INNER, num_stages=STAGES):
        if EVEN_IN:
            b = tl.load(x_pointers, mask=is_row[None, :], other=0.0)
            a = tl.load(weight_pointers, mask=is_feature[:, None], other=0.0)
        else:
            is_in = inner < NUM_IN - k
            b = tl.load(x_pointers, mask=is_row[None, :] & is_in[:, None], other=0.0)
            a = tl.load(weight_pointers, mask=is_feature[:, None] & is_in[None, :], other=0.0)
        acc = tl.dot(a.to(dtype), b, acc, input_precision="ieee")
        x_pointers += INNER
        if IN_CONTIGUOUS:
            weight_pointers += INNER
        else:
            weight_pointers += INNER * tl.cast(stride_weight, tl.int64)
    return acc


@triton.jit
def _finish(
    acc, rows, is_row, first, features, expert, out, bias, low_rank, lora_up, lora_groups, up, num_out, rank, num_ranks,
    slice_rank, scale, alpha, limit, stride_up_expert, stride_up_rank, stride_up_out,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr, RANK_STEPS: tl.constexpr,
    IS_PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_LORA_GROUPS: tl.constexpr,
    HAS_SWIGLU: tl.constexpr,
):  # fmt: skip
    """Adds LoRA and bias to the sums of these rows, and stores them or their activation."""
    for step in tl.static_range(RANK_STEPS):
        ranks = step * RANK + tl.arange(0, RANK)
        low = tl.load(low_rank + rows.to(tl.int64)[None, :] * rank + ranks[:, None],
                      mask=is_row[None, :] & (ranks < num_ranks)[:, None], other=0.0)
        if RANK_STEPS > 1 or RANK > 16:
            up = _lora_up(lora_up, lora_groups, expert, features, step, num_out, num_ranks, slice_rank, stride_up_expert,
                          stride_up_rank, stride_up_out, RANK, HAS_LORA_GROUPS)
        acc = tl.dot(up.to(DTYPE), low, acc, input_precision="ieee")
    if HAS_SCALE:
        acc = acc * scale
    if HAS_BIAS:
        acc += tl.load(bias + expert * num_out + features, mask=features < num_out, other=0.0).to(tl.float32)[:, None]
    y = acc.to(out.dtype.element_ty)
    if IS_PACKED:
        y = tl.permute(tl.reshape(y, (ROWS // 16, 2, 8, TOKENS)), (0, 2, 1, 3))  # [group, g, h, token]
    row_starts = rows.to(tl.int64)[None, :] * num_out
    if HAS_SWIGLU:
        # from the rounded values, so that fused and separate activations agree bit for bit
        pairs = tl.reshape(y, (ROWS // 16, 8, 2, TOKENS)).to(tl.float32)
        gate, linear = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        act = tl.reshape(clamped_swiglu(gate, linear, alpha, limit).to(out.dtype.element_ty), (ROWS // 2, TOKENS))
        half = first // 2 + tl.arange(0, ROWS // 2)
        tl.store(out + row_starts // 2 + half[:, None], act, mask=is_row[None, :] & (half < num_out // 2)[:, None])
    else:
        natural = first + tl.arange(0, ROWS)  # output features in the order in which they lie in memory
        tl.store(out + row_starts + natural[:, None], tl.reshape(y, (ROWS, TOKENS)),
                 mask=is_row[None, :] & (natural < num_out)[:, None])


@triton.jit
def _low_rank_tile(
    tile, x, lora_A, low_rank, ready, offsets, gather, num_rows, num_experts, rank, scale, one, stride_x,
    NUM_IN: tl.constexpr, EXPERTS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    HAS_GATHER: tl.constexpr, OVERLAPS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """low_rank = scale * x A^T, 16 ranks for 16 rows of one expert. Counts itself in `ready` when that is stored, or without work
    at once."""
    SIZE: tl.constexpr = 16
    token_tiles_of = tiles_of_experts(offsets, num_rows, num_experts, SIZE, EXPERTS, HAS_OFFSETS)
    rank_tiles = tl.cdiv(rank, SIZE)
    if tile < tl.sum(token_tiles_of, 0) * rank_tiles:
        expert, within, start, end = owner_of_tile(tile, token_tiles_of, tl.cumsum(token_tiles_of, 0), offsets, num_rows,
                                                   rank_tiles, EXPERTS, HAS_OFFSETS)
        token_tiles = tl.cdiv(end - start, SIZE)
        ranks = within // token_tiles * SIZE + tl.arange(0, SIZE)
        rows = start + within % token_tiles * SIZE + tl.arange(0, SIZE)
        is_row = rows < end
        sources = _sources(gather, rows, is_row, HAS_GATHER)
        acc = _dense_sum(x, sources, is_row, lora_A + expert.to(tl.int64) * rank * NUM_IN, ranks, rank, stride_x, NUM_IN, NUM_IN,
                         SIZE, SIZE, INNER, STAGES, True, NUM_IN % INNER == 0, OVERLAPS, WAITS)
        if NUM_IN <= INNER:  # as in moe_decode_kernel
            acc = acc * one
        tl.store(low_rank + rows.to(tl.int64)[None, :] * rank + ranks[:, None], (acc * scale).to(low_rank.dtype.element_ty),
                 mask=is_row[None, :] & (ranks < rank)[:, None])
    tl.debug_barrier()  # every thread has stored
    tl.atomic_add(ready, 1, sem="release", scope="gpu")


@triton.jit
def _wait_until(ready, count, SPINS: tl.constexpr):
    """Waits until `count` programs have counted themselves in `ready`, and returns 0. What they stored is read through pointers
    to which this 0 was added: then no load comes too early. Every thread waits for itself, since an acquire is a thread's own."""
    if SPINS:
        return tl.inline_asm_elementwise("""{
            .reg .pred waits;
            .reg .b32 seen;
            again:
            ld.acquire.gpu.global.b32 seen, [$1];
            setp.lt.s32 waits, seen, $2;
            @waits bra again;
            mov.b32 $0, 0;
        }""", "=r,l,r", [ready.to(tl.int64), count], dtype=tl.int32, is_pure=False, pack=1)
    return 0  # the interpreter runs one program after the other


@triton.jit(do_not_specialize=["num_rows", "num_low"], do_not_specialize_on_alignment=["ready"])
def moe_decode_kernel(
    x, weight, scales, out, offsets, gather, bias, low_rank, lora_A, lora_up, lora_groups, ready,
    num_rows, num_low, num_experts, num_out, rank, slice_rank, scale, alpha, limit, one,
    stride_x, stride_weight_expert, stride_weight, stride_up_expert, stride_up_rank, stride_up_out,
    NUM_IN: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, MORE: tl.constexpr,
    INNER: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr, RANK_STEPS: tl.constexpr,
    IS_PACKED: tl.constexpr, IS_ASM: tl.constexpr, IN_CONTIGUOUS: tl.constexpr, EVEN_IN: tl.constexpr, EVEN_OUT: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, HAS_GATHER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_LORA_GROUPS: tl.constexpr, IS_SLICED: tl.constexpr, HAS_SWIGLU: tl.constexpr, LOW_INNER: tl.constexpr,
    LOW_STAGES: tl.constexpr, SPINS: tl.constexpr, MMA: tl.constexpr, OVERLAPS: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """ROWS output features of one expert for TOKENS of its rows, and for MORE further ones if it has them. Packed weights:
    words and scales as unpack_fragments takes them; the last TAIL inputs are a step of their own. Dense weights: stride_weight
    is the stride of the dimension that is not contiguous. WAITS: FOR_ALL, FOR_X or FOR_LOW_RANK. LoRA's groups: a tile may have
    features of several (HAS_LORA_GROUPS), or has those of one (IS_SLICED). With LOW_INNER the first num_low programs compute
    low_rank, for which the others wait at their end; programs start in the order of their numbers, so none of the first waits for
    a place that one of the others holds, or on sm_100 for tensor memory: all programs that a multiprocessor has room for have
    theirs."""
    if WAITS == 0:
        wait_for_launch_before(OVERLAPS)
    tile = tl.program_id(0)
    if LOW_INNER:
        if tile < num_low:
            _low_rank_tile(tile, x, lora_A, low_rank, ready, offsets, gather, num_rows, num_experts, rank, scale, one, stride_x,
                           NUM_IN, EXPERTS, LOW_INNER, LOW_STAGES, HAS_OFFSETS, HAS_GATHER, OVERLAPS, WAITS)
            return
        tile -= num_low
    token_tiles_of = tiles_of_experts(offsets, num_rows, num_experts, TOKENS + MORE, EXPERTS, HAS_OFFSETS)
    ends_of = tl.cumsum(token_tiles_of, 0)
    feature_tiles = tl.cdiv(num_out, ROWS)
    if tile >= tl.sum(token_tiles_of, 0) * feature_tiles:
        return
    # an expert's tiles with the same weights follow each other, for the L2 cache
    expert, within, start, end = owner_of_tile(tile, token_tiles_of, ends_of, offsets, num_rows, feature_tiles, EXPERTS,
                                               HAS_OFFSETS)
    token_tiles = tl.cdiv(end - start, TOKENS + MORE)
    first = within // token_tiles * ROWS
    first_row = start + within % token_tiles * (TOKENS + MORE)
    rows = first_row + tl.arange(0, TOKENS)
    is_row = rows < end
    sources = _sources(gather, rows, is_row, HAS_GATHER)
    expert = expert.to(tl.int64)
    features = first + tl.arange(0, ROWS)
    if IS_PACKED:  # in the order of the accumulator: row 8h + g of a group holds feature 2g + h
        index = tl.arange(0, ROWS)
        features = first + index // 16 * 16 + index % 8 * 2 + index // 8 % 2
    num_ranks = rank
    if IS_SLICED:  # the tile's part of low-rank rows, and none of B without an adapter
        own_slice = tl.load(lora_groups + first)
        num_ranks = tl.where(own_slice < 0, 0, slice_rank)
        low_rank += tl.maximum(own_slice, 0) * slice_rank
    up = None
    if RANK_STEPS == 1 and RANK == 16:  # loaded before the loop, as the tail is; a larger rank would not fit into registers
        up = _lora_up(lora_up, lora_groups, expert, features, 0, num_out, num_ranks, slice_rank, stride_up_expert,
                      stride_up_rank, stride_up_out, RANK, HAS_LORA_GROUPS)
    more_rows, more_sources, is_more = rows, sources, is_row
    if IS_PACKED:
        per_input: tl.constexpr = 4 if IS_ASM else 2
        group = (expert * num_out + first) // 16
        weight_base = weight + group * NUM_IN * per_input
        scale_base = scales + group * (NUM_IN // CHUNK * 8)
        if MORE:
            more_rows = first_row + TOKENS + tl.arange(0, MORE)
            is_more = more_rows < end
            more_sources = _sources(gather, more_rows, is_more, HAS_GATHER)
            if first_row + TOKENS < end:
                acc, more = _packed_sums(x, sources, is_row, more_sources, is_more, weight_base, scale_base, first, num_out,
                                         stride_x, NUM_IN, ROWS, TOKENS, MORE, INNER, TAIL, CHUNK, IS_ASM, EVEN_OUT, MMA,
                                         OVERLAPS, WAITS)
                if NUM_IN - TAIL <= INNER:  # as below
                    acc, more = acc * one, more * one
                if WAITS == 2:
                    wait_for_launch_before(OVERLAPS)
                if LOW_INNER:
                    low_rank += _wait_until(ready, num_low, SPINS)
                _finish(acc, rows, is_row, first, features, expert, out, bias, low_rank, lora_up, lora_groups, up, num_out, rank,
                        num_ranks, slice_rank, scale, alpha, limit, stride_up_expert, stride_up_rank, stride_up_out,
                        x.dtype.element_ty, ROWS, TOKENS, RANK, RANK_STEPS, IS_PACKED, HAS_BIAS, HAS_SCALE, HAS_LORA_GROUPS,
                        HAS_SWIGLU)
                _finish(more, more_rows, is_more, first, features, expert, out, bias, low_rank, lora_up, lora_groups, up, num_out,
                        rank, num_ranks, slice_rank, scale, alpha, limit, stride_up_expert, stride_up_rank, stride_up_out,
                        x.dtype.element_ty, ROWS, MORE, RANK, RANK_STEPS, IS_PACKED, HAS_BIAS, HAS_SCALE, HAS_LORA_GROUPS,
                        HAS_SWIGLU)
                return
        acc, _ = _packed_sums(x, sources, is_row, more_sources, is_more, weight_base, scale_base, first, num_out, stride_x,
                              NUM_IN, ROWS, TOKENS, 0, INNER, TAIL, CHUNK, IS_ASM, EVEN_OUT, MMA, OVERLAPS, WAITS)
    else:
        acc = _dense_sum(x, sources, is_row, weight + expert * stride_weight_expert, features, num_out, stride_x, stride_weight,
                         NUM_IN, ROWS, TOKENS, INNER, None, IN_CONTIGUOUS, EVEN_IN, OVERLAPS, WAITS)
    if NUM_IN - TAIL <= INNER:  # if one step covers all inputs, the compiler would start the sum with the bias: other bits
        acc = acc * one
    if WAITS == 2:
        wait_for_launch_before(OVERLAPS)
    if LOW_INNER:
        low_rank += _wait_until(ready, num_low, SPINS)
    _finish(acc, rows, is_row, first, features, expert, out, bias, low_rank, lora_up, lora_groups, up, num_out, rank, num_ranks,
            slice_rank, scale, alpha, limit, stride_up_expert, stride_up_rank, stride_up_out, x.dtype.element_ty, ROWS, TOKENS,
            RANK, RANK_STEPS, IS_PACKED, HAS_BIAS, HAS_SCALE, HAS_LORA_GROUPS, HAS_SWIGLU)


def _shape_of(projection: Projection) -> tuple[int, int, int]:
    """E, K, N."""
    if projection.weight is not None:
        return projection.weight.shape
    num_experts, num_out, num_blocks = projection.scales.shape
    return num_experts, num_blocks * 32, num_out


def decode_projection(x: torch.Tensor, projection: Projection, offsets: torch.Tensor | None, *,
                      gather: torch.Tensor | None = None, low_rank: torch.Tensor | None = None,
                      lora_A: torch.Tensor | None = None, lora_up: torch.Tensor | None = None,
                      lora_groups: torch.Tensor | None = None, is_sliced: bool = False, ready: torch.Tensor | None = None,
                      scale: float | None = None, swiglu: tuple[float, float] | None = None, waits: int = FOR_ALL,
                      num_parts: int = 1, out: torch.Tensor | None = None, blocks: DecodeBlocks | None = None) -> torch.Tensor:
    """grouped_gemm's result for few rows, from packed or dense weights: (x_r W_e + low_rank_r U_e) * scale + b_e for each row r
    of expert e, rounded once to x's dtype; with swiglu = (alpha, limit) the clamped activation of that, [R, N / 2].

    x [R, K] in expert order or, with gather [R] int32, any [T, K]; offsets [E + 1] int32 on x's device, or None if one expert
    owns every row; low_rank [R, r] in x's dtype with lora_up [E, r, N] and lora_groups as in grouped_gemm. Instead of low_rank,
    lora_A [E, r, K] in x's dtype, contiguous, and ready [1] int32, 0 and for this launch alone: the launch computes
    low_rank = scale * x A^T too, and `scale` multiplies nothing else. is_sliced: no tile has features of two of lora_groups.
    waits: the inputs that the launch before this one may write (FOR_ALL, FOR_X, FOR_LOW_RANK); earlier launches must have written
    the others. num_parts: as of a Routing; rows of other parts' experts are not written. out: for the result. Triton only. Raises
    ValueError for dtypes and GPUs that the kernel cannot serve."""
    num_experts, num_in, num_out = _shape_of(projection)
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    rank = low_rank.shape[1] if low_rank is not None else 0 if lora_A is None else lora_A.shape[1]
    is_packed, is_asm, bias = projection.weight is None, projection.unpacks_by_asm, projection.bias
    slice_rank = rank if lora_groups is None else lora_up.shape[1]
    assert x.shape[1] == num_in, f"x {x.shape}: {num_in} inputs needed"
    assert num_experts == 1 if offsets is None else offsets.shape == (num_experts + 1,), f"offsets of {num_experts} experts"
    assert bias is None or bias.shape == (num_experts, num_out), f"bias {bias.shape}: {(num_experts, num_out)} needed"
    assert (low_rank is None and lora_A is None) == (lora_up is None), "low_rank or lora_A come together with lora_up"
    assert low_rank is None or low_rank.is_contiguous() and lora_A is None
    assert waits != FOR_LOW_RANK or low_rank is not None, "the launch before computes no low_rank: wait for x or for all"
    assert (lora_A is None) == (ready is None), "lora_A and ready come together"
    assert lora_A is None or lora_A.shape == (num_experts, rank, num_in) and lora_A.is_contiguous(), f"lora_A {lora_A.shape}"
    assert lora_A is None or lora_A.dtype == x.dtype, f"lora_A {lora_A.dtype}: x's dtype {x.dtype} needed"
    assert lora_up is None or lora_up.shape == (num_experts, slice_rank, num_out), f"lora_up {lora_up.shape}"
    assert lora_groups is None or lora_groups.shape == (num_out,), f"lora_groups {lora_groups.shape}: ({num_out},) needed"
    assert not is_asm or x.dtype == torch.bfloat16, f"inline assembly unpacks to bfloat16, x is {x.dtype}"
    check_served("moe_decode", {"x": x}, dtypes=DTYPES, tensor_cores=True)
    out = x.new_empty((num_rows, num_out if swiglu is None else num_out // 2)) if out is None else out
    if num_rows == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    blocks = blocks or choose_decode_blocks(gpu_family(x), x.dtype, num_rows / num_parts, num_experts, num_in, num_out,
                                            is_packed=is_packed)
    scales, strides, in_contiguous, tail, chunk = None, (0, 0), True, 0, 32
    if is_packed:
        weight, scales = word_views(projection.blocks, projection.scales, is_asm)
        chunk = chunk_of(num_in)
        tail = num_in % blocks.inner
        assert num_out % ROWS == 0 and blocks.inner % chunk == 0 and tail & (tail - 1) == 0, f"{blocks} for {num_in}, {num_out}"
        # inline assembly takes both halves of a word, 8 weights, from one thread: each thread needs a whole word at every step
        assert not is_asm or blocks.rows * (tail or blocks.inner) >= 256 * blocks.num_warps, f"{blocks}, {tail}: too many warps"
    else:
        weight = projection.weight
        in_contiguous = weight.stride(1) == 1
        assert in_contiguous or weight.stride(2) == 1, f"strides {weight.stride()}: in or out must be contiguous"
        strides = (weight.stride(0), weight.stride(2 if in_contiguous else 1))
    low_inner, low_stages, num_low = 0, 0, 0
    if lora_A is not None:
        low_rank = x.new_empty((num_rows, rank))
        low_inner, low_stages = low_rank_steps(blocks, num_in, x.dtype, is_packed=is_packed)
        num_low = (num_rows // 16 + min(num_experts, num_rows)) * cdiv(rank, 16)  # at most, as below
    num_ranks = slice_rank if is_sliced else rank
    rank_block = max(16, min(64, next_power_of_2(num_ranks)))
    up_strides = (0, 0, 0) if lora_up is None else lora_up.stride()
    alpha, limit = (0.0, 0.0) if swiglu is None else swiglu
    token_tiles = num_rows // (blocks.tokens + blocks.more) + min(num_experts, num_rows)  # at most: a part tile per expert
    launch(
        moe_decode_kernel, (num_low + token_tiles * cdiv(num_out, blocks.rows),),
        x, weight, scales, out, offsets, gather, bias, low_rank, lora_A, lora_up, lora_groups, ready, num_rows, num_low,
        num_experts, num_out, rank, slice_rank, 1.0 if scale is None else scale, alpha, limit, 1.0, x.stride(0), *strides,
        *up_strides,
        NUM_IN=num_in, EXPERTS=next_power_of_2(num_experts), ROWS=blocks.rows, TOKENS=blocks.tokens, MORE=blocks.more,
        INNER=blocks.inner, TAIL=tail, CHUNK=chunk, RANK=rank_block, RANK_STEPS=cdiv(num_ranks, rank_block),
        IS_PACKED=is_packed, IS_ASM=is_asm, IN_CONTIGUOUS=in_contiguous, EVEN_IN=num_in % blocks.inner == 0,
        EVEN_OUT=num_out % blocks.rows == 0, HAS_OFFSETS=offsets is not None, HAS_GATHER=gather is not None,
        HAS_BIAS=bias is not None, HAS_SCALE=scale is not None and lora_A is None,
        HAS_LORA_GROUPS=lora_groups is not None and not is_sliced, IS_SLICED=is_sliced, HAS_SWIGLU=swiglu is not None,
        LOW_INNER=low_inner, LOW_STAGES=low_stages, SPINS=gpu_family(x) != "interpreter",
        MMA=mma_of(gpu_family(x), x.dtype, blocks), WAITS=waits, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        **overlap_constants(x, num_rows),
    )  # fmt: skip
    return out


def low_rank_rows(x: torch.Tensor, lora_A: torch.Tensor, offsets: torch.Tensor | None, *, scale: float,
                  gather: torch.Tensor | None = None, waits: int = FOR_ALL, num_parts: int = 1,
                  blocks: DecodeBlocks | None = None) -> torch.Tensor:
    """scale * x_r A_e^T for each row r of expert e, [R, r] in x's dtype; lora_A [E, r, K], the rest as in decode_projection."""
    projection = Projection(lora_A.transpose(1, 2), None, None, None, False)
    return decode_projection(x, projection, offsets, gather=gather, scale=scale, waits=waits, num_parts=num_parts, blocks=blocks)


def few_rows_forward(x: torch.Tensor, routing: Routing, gate_up: Projection, down: Projection, *,
                     lora: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None, lora_scale: float, alpha: float,
                     limit: float, ready: torch.Tensor | None = None) -> torch.Tensor:
    """The experts' outputs [R, D], in expert order, for x [T, D] routed to them; zeros for rows of other parts. Triton only, no
    gradient.

    gate_up [E, D, 2F], gate and up interleaved, and down [E, F, D] are Projections. lora: A [E, r, D] and B [E, 2F, r] of
    gate_up, A [E, r, F] and B [E, D, r] of down, fp32 masters or x's dtype. ready [2] int32, 0 and for one call: with it A is in
    x's dtype, and x A^T computed in W's launch."""
    offsets, tokens, num_parts = routing.offsets_device, routing.tokens, routing.num_parts
    rows = routing.new_rows(x, down.bias.shape[1])  # first: zeroing is a launch that does not overlap
    products = ((gate_up, FOR_ALL, {"gather": tokens, "swiglu": (alpha, limit)}),  # the launch before is the sort
                (down, FOR_X, {"gather": None, "out": rows}))
    for number, (projection, waits, options) in enumerate(products):
        if lora is not None:
            lora_A, lora_B = lora[2 * number:2 * number + 2]
            options["lora_up"] = lora_B.transpose(1, 2)
        if lora is not None and ready is not None:
            options |= {"lora_A": lora_A, "scale": lora_scale, "ready": ready[number:number + 1]}
        elif lora is not None:
            options["low_rank"] = low_rank_rows(x, lora_A, offsets, scale=lora_scale, gather=options["gather"], waits=waits,
                                                num_parts=num_parts)
            waits = FOR_LOW_RANK
        x = decode_projection(x, projection, offsets, waits=waits, num_parts=num_parts, **options)
    return x
