"""Gradients of grouped linear layers' weights: sums of outer products over the rows of each expert, and sums of the rows.

G_e = sum over the rows r of expert e of a_r^T b_r. This is dW for a_r = x_r and b_r = dy_r, and the gradient of LoRA's A or B if
one side is the low-rank row. One program owns each element and adds rows in ascending order, so results do not depend on
scheduling. A low-rank product with many rows would have few, long programs: its rows are cut into chunks of fixed length, whose
fp32 sums are added in ascending order.

Shapes: R routed rows, E experts, M and N the widths of a and b.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.dense import product
from kernels.device import (
    cdiv,
    check_served,
    gpu_family,
    is_triton,
    launch,
    measured,
    next_power_of_2,
    product_path,
    unmeasured,
)
from kernels.experts.tiles import owner_of_tile, tiles_of_experts

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# rows of a partial sum, with several experts and with one; the result's bits depend on them
CHUNK_ROWS, CHUNK_ROWS_DENSE = 2048, 512
MAX_ROWS_UNSPLIT = 8192  # up to this many rows one program can take an expert that has all of them


class OuterBlocks(NamedTuple):
    m: int
    n: int
    rows: int
    num_warps: int
    num_stages: int  # steps in flight


def compiled_stages(blocks: OuterBlocks, *, has_gather: bool) -> int:
    """The compiler's num_stages: a load whose address is loaded too counts twice."""
    return 2 * blocks.num_stages - 1 if has_gather else blocks.num_stages


# family -> blocks of a wide product (dW); rows per step divide both chunk sizes
_WIDE = {
    "ampere": unmeasured(OuterBlocks(128, 128, 64, 8, 3)),
    "consumer": unmeasured(OuterBlocks(128, 128, 32, 8, 3)),
    "hopper": measured(OuterBlocks(128, 256, 64, 8, 4)),
    "blackwell": unmeasured(OuterBlocks(128, 256, 64, 8, 4)),
    "interpreter": unmeasured(OuterBlocks(32, 32, 32, 4, 2)),
}
# family -> stages with LoRA's rank as n, where a is read once and memory is the bound
_STAGES_OF_RANK = {"ampere": unmeasured(4), "consumer": unmeasured(3), "hopper": measured(4), "blackwell": unmeasured(4)}


def choose_outer_blocks(family: str, dtype: torch.dtype, num_n: int) -> OuterBlocks:
    if family == "interpreter":
        return _WIDE[family].blocks
    n = max(16, min(64, next_power_of_2(num_n)))
    if dtype == torch.float32:
        return OuterBlocks(64, n, 32, 4, 2)
    return OuterBlocks(128, n, 64, 4, _STAGES_OF_RANK[family].blocks) if num_n <= 64 else _WIDE[family].blocks


@triton.jit(do_not_specialize=["num_rows"])
def grouped_outer_kernel(
    a, b, out, offsets, gather, row_scale, num_rows, num_experts, num_m, num_n,
    stride_a, stride_b, stride_out_expert, stride_out_m, stride_out_n,
    EXPERTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, HAS_GATHER: tl.constexpr, HAS_ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """One M x N tile of one expert, or with CHUNK > 0 of one chunk of an expert's rows (then out is indexed by chunk)."""
    m_tiles = tl.cdiv(num_m, M)
    n_tiles = tl.cdiv(num_n, N)
    tile = tl.program_id(0) % (m_tiles * n_tiles)
    part = tl.program_id(0) // (m_tiles * n_tiles)
    if CHUNK > 0:
        chunks_of = tiles_of_experts(offsets, num_rows, num_experts, CHUNK, EXPERTS, HAS_OFFSETS)
        ends_of = tl.cumsum(chunks_of, 0)
        if part >= tl.sum(chunks_of, 0):  # the grid is an upper bound
            return
        _, within, start, end = owner_of_tile(part, chunks_of, ends_of, offsets, num_rows, 1, EXPERTS, HAS_OFFSETS)
        start += within * CHUNK
        end = tl.minimum(end, start + CHUNK)
    elif HAS_OFFSETS:
        start = tl.load(offsets + part)
        end = tl.load(offsets + part + 1)
    else:
        start = 0
        end = num_rows

    ms = tile % m_tiles * M + tl.arange(0, M)
    ns = tile // m_tiles * N + tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    for row in range(start, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        is_row = rows < end
        if HAS_GATHER:
            source = tl.load(gather + rows, mask=is_row, other=0)
        else:
            source = rows
        x = tl.load(a + source.to(tl.int64)[:, None] * stride_a + ms[None, :],
                    mask=is_row[:, None] & (ms < num_m)[None, :], other=0.0)
        y = tl.load(b + rows.to(tl.int64)[:, None] * stride_b + ns[None, :],
                    mask=is_row[:, None] & (ns < num_n)[None, :], other=0.0)
        if HAS_ROW_SCALE:
            y = (y.to(tl.float32) * tl.load(row_scale + rows, mask=is_row, other=0.0)[:, None]).to(y.dtype)
        acc = tl.dot(tl.trans(x), y, acc, input_precision="ieee")
    pointers = out + part.to(tl.int64) * stride_out_expert
    pointers += ms.to(tl.int64)[:, None] * stride_out_m + ns.to(tl.int64)[None, :] * stride_out_n
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(ms < num_m)[:, None] & (ns < num_n)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def sum_chunks_kernel(partial, out, offsets, num_rows, num_experts, size,
                      EXPERTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """out[e] = the sum of the expert's chunks in ascending order; a chunk has `size` elements, in out's memory order."""
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    chunks_of = tiles_of_experts(offsets, num_rows, num_experts, CHUNK, EXPERTS, HAS_OFFSETS)
    first = tl.sum(tl.where(experts < expert, chunks_of, 0), 0)
    count = tl.sum(tl.where(experts == expert, chunks_of, 0), 0)
    elements = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_element = elements < size
    acc = tl.zeros((BLOCK,), tl.float32)
    pointers = partial + first.to(tl.int64) * size + elements
    for _ in range(count):
        acc += tl.load(pointers, mask=is_element, other=0.0)
        pointers += size
    tl.store(out + expert.to(tl.int64) * size + elements, acc.to(out.dtype.element_ty), mask=is_element)


@triton.jit
def grouped_row_sum_kernel(x, out, offsets, width, stride_x, ROWS: tl.constexpr, COLS: tl.constexpr):
    expert = tl.program_id(0)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for row in range(start, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        values = tl.load(x + rows.to(tl.int64)[:, None] * stride_x + cols[None, :],
                         mask=(rows < end)[:, None] & (cols < width)[None, :], other=0.0)
        acc += values.to(tl.float32)
    tl.store(out + expert.to(tl.int64) * width + cols, tl.sum(acc, 0).to(out.dtype.element_ty), mask=cols < width)


@torch.no_grad()
def _grouped_outer_by_expert(a, b, offsets, gather, row_scale, out):
    """The library's path, and the reference. Reads the offsets on the host once a call."""
    bounds = [0, b.shape[0]] if offsets is None else offsets.tolist()
    for expert, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if start == end:
            out[expert].zero_()
            continue
        part = slice(start, end)
        rows = a[part] if gather is None else a[gather[part].long()]
        scaled = b[part] if row_scale is None else (b[part] * row_scale[part, None]).to(b.dtype)
        out[expert] = product(rows.T, scaled)
    return out


def grouped_outer(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None, out: torch.Tensor, *,
                  gather: torch.Tensor | None = None, row_scale: torch.Tensor | None = None,
                  blocks: OuterBlocks | None = None) -> torch.Tensor:
    """out_e = sum over the rows r of expert e of a_r^T (row_scale_r b_r), accumulated in fp32; zero for an expert without rows.

    a [R, M], or with gather [R] any [T, M] whose row gather[r] belongs to routed row r; b [R, N] in a's dtype (put the narrow
    side here); offsets [E + 1] int32 on a's device, without it one expert owns all rows; row_scale [R] fp32. out [E, M, N] is
    written in its dtype, dense for each expert in either order, so LoRA's A takes grad.transpose(1, 2)."""
    num_rows, num_n = b.shape
    num_experts, num_m = out.shape[0], a.shape[1]
    if out.shape[1:] != (num_m, num_n) or (offsets is not None and offsets.shape != (num_experts + 1,)):
        raise ValueError(f"grouped_outer: out is {list(out.shape)}, offsets {None if offsets is None else list(offsets.shape)} "
                         f"for a {list(a.shape)} and b {list(b.shape)}; give [E, {num_m}, {num_n}] and [E + 1]")
    assert (gather is not None or a.shape[0] == num_rows) and (offsets is not None or num_experts == 1)
    path = product_path(a)
    if path != "reference":
        check_served("grouped_outer", {"a": a, "b": b, "out": out}, dtypes=DTYPES, tensor_cores=path == "triton")
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    if path != "triton":
        return _grouped_outer_by_expert(a, b, offsets, gather, row_scale, out)
    assert out.is_contiguous() or out.transpose(1, 2).is_contiguous(), out.stride()
    a = a if a.stride(1) == 1 else a.contiguous()
    b = b if b.stride(1) == 1 else b.contiguous()
    blocks = blocks or choose_outer_blocks(gpu_family(a), a.dtype, num_n)
    tiles = cdiv(num_m, blocks.m) * cdiv(num_n, blocks.n)
    chunk_rows, max_rows = (CHUNK_ROWS_DENSE, CHUNK_ROWS_DENSE) if offsets is None else (CHUNK_ROWS, MAX_ROWS_UNSPLIT)
    is_split = num_n <= 64 and num_rows > max_rows
    chunk = chunk_rows if is_split else 0
    parts = num_rows // chunk_rows + min(num_experts, num_rows) if is_split else num_experts
    size = num_m * num_n
    target = out.new_empty(parts * size, dtype=torch.float32) if is_split else out
    experts = next_power_of_2(num_experts)
    launch(
        grouped_outer_kernel, (parts * tiles,),
        a, b, target, offsets, gather, row_scale, num_rows, num_experts, num_m, num_n,
        a.stride(0), b.stride(0), size, out.stride(1), out.stride(2),
        EXPERTS=experts, M=blocks.m, N=blocks.n, ROWS=blocks.rows, CHUNK=chunk, HAS_OFFSETS=offsets is not None,
        HAS_GATHER=gather is not None, HAS_ROW_SCALE=row_scale is not None,
        num_warps=blocks.num_warps, num_stages=compiled_stages(blocks, has_gather=gather is not None),
    )  # fmt: skip
    if is_split:
        launch(
            sum_chunks_kernel, (num_experts, cdiv(size, 1024)),
            target, out, offsets, num_rows, num_experts, size, EXPERTS=experts, CHUNK=chunk, BLOCK=1024,
            HAS_OFFSETS=offsets is not None, num_warps=4)
    return out


def grouped_row_sum(x: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the sum of each expert's rows, in fp32 and rounded once, to out [E, N]: the gradient of a bias.

    x [R, N] in expert order; offsets [E + 1] int32 on its device."""
    if not is_triton(x):  # no product: the kernel serves every GPU
        for expert, (start, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
            out[expert] = x[start:end].float().sum(0)
        return
    check_served("grouped_row_sum", {"x": x, "out": out}, dtypes=DTYPES, tensor_cores=False)
    assert out.is_contiguous() and out.shape == (offsets.shape[0] - 1, x.shape[1]), (out.shape, out.stride(), x.shape)
    x = x if x.stride(1) == 1 else x.contiguous()
    launch(grouped_row_sum_kernel, (out.shape[0], cdiv(x.shape[1], 128)), x, out, offsets, x.shape[1], x.stride(0), ROWS=32,
           COLS=128, num_warps=4, num_stages=3)
