"""Linear layers of many experts on rows sorted by expert: y_r = x_r W_e + b_e for the expert e that owns row r.

One kernel serves the forward, the gradient of the rows and the low-rank products of LoRA (arXiv 2106.09685). It takes weights as
[E, in, out] with either of the last two dimensions contiguous, so a frozen [E, out, in] tensor is a transposed view in the
forward and itself in the backward. Expert offsets stay on the device: the grid is an upper bound of the number of tiles, and
each program finds its expert. Sums over `in` run in ascending order and are never split. LoRA is added in further steps of the
same accumulator, y_r = x_r W_e + (s x_r A_e^T) B_e^T, so there is one rounding. If one product serves several projections side
by side (queries, keys, values), each column has the number of its slice of the low-rank row. outer.py has the gradients of
weights.

The library's path (kernels/device.py: product_path) computes one expert at a time. So does the reference, grouped_linear, which
dequantises frozen packed weights in the forward and again in the backward, so no dequantised copy stays in memory.

Shapes: R routed rows, E experts, K in, N out, r LoRA's rank.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dense import linear, product
from kernels.device import (
    cdiv,
    check_served,
    gpu_family,
    launch,
    measured,
    next_power_of_2,
    num_multiprocessors,
    product_path,
    unmeasured,
)
from kernels.experts.tiles import owner_of_tile, tiles_of_experts
from kernels.packed.weights import Dense, ExpertWeights
from kernels.swiglu import clamped_swiglu
from kernels.swiglu import swiglu as activate

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.no_grad()
def _grouped_gemm_by_expert(x, weight, offsets, gather, bias, low_rank, lora_up, lora_groups, scale, swiglu,
                            pre_activation, out):
    """The library's path, and the reference: one expert at a time, with fp32 sums and one rounding. Each call reads the offsets
    on the host, so the GPU waits there once; its products are long, and the library has no kernel for all experts."""
    bounds = [0, out.shape[0]] if offsets is None else offsets.tolist()
    for expert, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if start == end:
            continue
        part = slice(start, end)
        y = product(x[part] if gather is None else x[gather[part].long()], weight[expert].to(x.dtype))
        if low_rank is not None:
            up = lora_up[expert].to(x.dtype)
            if lora_groups is not None:  # block-diagonal
                slices = torch.arange(low_rank.shape[1], device=x.device) // up.shape[0]
                up = up.repeat(low_rank.shape[1] // up.shape[0], 1).masked_fill(slices[:, None] != lora_groups[None, :], 0.0)
            y += product(low_rank[part], up)
        if scale is not None:
            y *= scale
        if bias is not None:
            y += bias[expert]
        if swiglu is None:
            out[part] = y
            continue
        h = y.to(out.dtype)
        if pre_activation is not None:
            pre_activation[part] = h
        out[part] = activate(h, alpha=swiglu[0], limit=swiglu[1])
    return out


def _weight_of(weight: torch.Tensor | None, packed: ExpertWeights | None, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] of one expert."""
    if packed is None:
        return weight[expert].T
    out = torch.empty(1, *packed.shape[1:], dtype=dtype, device=packed.bias.device)
    return packed.dequantize(slice(expert, expert + 1), out)[0]


class _ReferenceLinear(torch.autograd.Function):
    """With weight [E, K, N], or with frozen packed weights, which the backward dequantises again."""

    @staticmethod
    def forward(ctx, x, weight, packed, bias, offsets):
        ctx.save_for_backward(*((x, weight) if packed is None else ()))
        ctx.packed, ctx.offsets, ctx.has_bias = packed, offsets, bias is not None
        ctx.num_in = x.shape[1]
        num_experts, ctx.num_out = (len(weight), weight.shape[2]) if packed is None else packed.shape[:2]
        ctx.num_experts, y = num_experts, x.new_empty(x.shape[0], ctx.num_out)
        for expert, (start, end) in enumerate(zip(offsets, offsets[1:])):
            if start < end:
                y[start:end] = linear(x[start:end], _weight_of(weight, packed, expert, x.dtype),
                                      None if bias is None else bias[expert])
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors or (None, None)
        needs_x, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = grad.new_empty(grad.shape[0], ctx.num_in) if needs_x else None
        grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
        grad_bias = grad.new_zeros(ctx.num_experts, ctx.num_out) if needs_bias and ctx.has_bias else None
        for expert, (start, end) in enumerate(zip(ctx.offsets, ctx.offsets[1:])):
            if start == end:
                continue
            grad_rows = grad[start:end]
            if needs_x:
                torch.mm(grad_rows, _weight_of(weight, ctx.packed, expert, grad.dtype), out=grad_x[start:end])
            if needs_weight:
                torch.mm(x[start:end].T, grad_rows, out=grad_weight[expert])
            if grad_bias is not None:
                grad_bias[expert] = grad_rows.sum(0)
        return grad_x, grad_weight, None, grad_bias, None


class GemmBlocks(NamedTuple):
    """Sizes of a tile and how its loop is compiled. None of them changes a result's bits."""

    rows: int
    cols: int
    inner: int  # step along K
    group: int  # row tiles that share a pass over the weight, for the L2 cache
    num_warps: int
    num_stages: int
    use_tma: bool  # tensor descriptors instead of pointers, where alignment and layout allow
    persistent: bool  # one program per multiprocessor that walks over the tiles, instead of a program per tile
    flatten: bool = False  # with persistent: load the next tile's operands while this one is stored


# family -> blocks at more than 128 rows per expert; `inner` divides 2880, gpt-oss's width
_WIDE = {
    "ampere": unmeasured(GemmBlocks(128, 128, 64, 8, 8, 3, False, False)),
    "consumer": unmeasured(GemmBlocks(128, 128, 32, 8, 8, 3, False, False)),
    "hopper": measured(GemmBlocks(128, 256, 64, 8, 8, 4, True, False)),
    "blackwell": unmeasured(GemmBlocks(128, 128, 64, 8, 8, 4, True, False)),
    "interpreter": unmeasured(GemmBlocks(32, 32, 32, 2, 4, 2, True, True)),
}
# family -> stages of x A, which reads x once and is bound by memory
_STAGES_TO_RANK = {"ampere": unmeasured(5), "consumer": unmeasured(3), "hopper": measured(5), "blackwell": unmeasured(5)}
# lanes that search a tile's expert, at least: any number of experts up to it, as a scratch holds them, is one compilation
_LEAST_EXPERTS = 32
_FP32 = GemmBlocks(64, 64, 32, 8, 8, 2, False, False)  # no tensor cores: for fixtures and checks


def choose_blocks(family: str, dtype: torch.dtype, num_rows: int, num_experts: int, num_in: int, num_out: int) -> GemmBlocks:
    if family == "interpreter":
        return _WIDE[family].blocks
    inner = max(16, min(64, next_power_of_2(num_in)))
    if num_out <= 64 or (num_out <= 256 and 8 * num_out <= num_in):
        blocks = GemmBlocks(64, max(16, next_power_of_2(num_out)), inner, 1, 4, _STAGES_TO_RANK[family].blocks, False, False)
        if dtype == torch.float32:
            return blocks._replace(inner=min(inner, 32), num_stages=2)
        if blocks.cols > 64:  # of fp32 masters: 4 + 32 KB a step at 256 columns
            return blocks._replace(inner=min(inner, 32), num_stages=blocks.num_stages - 1)
        return blocks
    if dtype == torch.float32:
        return _FP32
    if num_in <= 64:  # (x A) B: writes y once, bound by memory on every family
        return GemmBlocks(128, 128, inner, 8, 8, 2, False, False)
    blocks = _WIDE[family].blocks
    if num_rows <= 128 * num_experts:
        blocks = blocks._replace(rows=64, cols=128, num_warps=4, num_stages=min(blocks.num_stages + 1, 4))
    return blocks


@triton.jit(do_not_specialize=["num_rows", "num_experts"], do_not_specialize_on_alignment=["offsets"])
def grouped_gemm_kernel(
    x, weight, out, pre_activation, offsets, gather, bias, low_rank, lora_up, lora_groups,
    num_rows, num_experts, num_in, num_out, rank, slice_rank, scale, alpha, limit,
    stride_x, stride_weight_expert, stride_weight, stride_up_expert, stride_up_rank, stride_up_out,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, RANK: tl.constexpr,
    RANK_STEPS: tl.constexpr, GROUP: tl.constexpr, IN_CONTIGUOUS: tl.constexpr, EVEN_IN: tl.constexpr,
    X_TMA: tl.constexpr, WEIGHT_TMA: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SWIGLU: tl.constexpr,
    HAS_PRE_ACTIVATION: tl.constexpr, HAS_LORA_GROUPS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS x COLS per turn of the outer loop; x and weight are pointers or tensor descriptors."""
    dtype: tl.constexpr = x.dtype if X_TMA else x.dtype.element_ty
    col_tiles = tl.cdiv(num_out, COLS)
    row_tiles_of = tiles_of_experts(offsets, num_rows, num_experts, ROWS, EXPERTS, HAS_OFFSETS)
    ends_of = tl.cumsum(row_tiles_of, 0)
    inner = tl.arange(0, INNER)

    for tile in tl.range(tl.program_id(0), tl.sum(row_tiles_of, 0) * col_tiles, tl.num_programs(0), flatten=FLATTEN):
        # expert by expert; in an expert, GROUP row tiles go through all columns before the next ones
        expert, within, start, end = owner_of_tile(tile, row_tiles_of, ends_of, offsets, num_rows, col_tiles, EXPERTS,
                                                   HAS_OFFSETS)
        first_row_tile = within // (GROUP * col_tiles) * GROUP
        group_rows = tl.minimum(tl.cdiv(end - start, ROWS) - first_row_tile, GROUP)
        within = within % (GROUP * col_tiles)
        first_row = start + (first_row_tile + within % group_rows) * ROWS
        first_col = within // group_rows * COLS
        rows = first_row + tl.arange(0, ROWS)
        cols = first_col + tl.arange(0, COLS)
        is_row = rows < end
        is_col = cols < num_out

        if not X_TMA:
            if HAS_GATHER:
                source = tl.load(gather + rows, mask=is_row, other=0)
            else:
                source = tl.where(is_row, rows, 0)  # results of rows past the end are not stored
            x_pointers = x + source.to(tl.int64)[:, None] * stride_x + inner[None, :]
        if not WEIGHT_TMA:
            weight_base = weight + expert.to(tl.int64) * stride_weight_expert
            if IN_CONTIGUOUS:
                weight_pointers = weight_base + cols.to(tl.int64)[None, :] * stride_weight + inner[:, None]
            else:
                weight_pointers = weight_base + inner.to(tl.int64)[:, None] * stride_weight + cols[None, :]

        acc = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(0, num_in, INNER):
            if X_TMA:
                a = x.load([first_row, k])  # rows of the next expert are not stored
            elif EVEN_IN:
                a = tl.load(x_pointers)
            else:
                a = tl.load(x_pointers, mask=(inner < num_in - k)[None, :], other=0.0)
            if WEIGHT_TMA:
                if IN_CONTIGUOUS:
                    b = weight.load([expert * num_out + first_col, k]).T
                else:
                    b = weight.load([expert * num_in + k, first_col])
            elif EVEN_IN:
                b = tl.load(weight_pointers, mask=is_col[None, :], other=0.0)
            else:
                b = tl.load(weight_pointers, mask=is_col[None, :] & (inner < num_in - k)[:, None], other=0.0)
            acc = tl.dot(a, b.to(dtype), acc, input_precision="ieee")
            if not X_TMA:
                x_pointers += INNER
            if not WEIGHT_TMA:
                if IN_CONTIGUOUS:
                    weight_pointers += INNER
                else:
                    weight_pointers += INNER * tl.cast(stride_weight, tl.int64)

        for step in tl.static_range(RANK_STEPS):
            ranks = step * RANK + tl.arange(0, RANK)
            low = tl.load(low_rank + rows.to(tl.int64)[:, None] * rank + ranks[None, :],
                          mask=is_row[:, None] & (ranks < rank)[None, :], other=0.0)
            up_pointers = lora_up + expert.to(tl.int64) * stride_up_expert
            up_mask = (ranks < rank)[:, None] & is_col[None, :]
            if HAS_LORA_GROUPS:
                own = tl.load(lora_groups + cols, mask=is_col, other=-1)
                up_mask = up_mask & ((ranks // slice_rank)[:, None] == own[None, :])
                ranks = ranks % slice_rank
            up_pointers += ranks[:, None] * stride_up_rank + cols[None, :] * stride_up_out
            up = tl.load(up_pointers, mask=up_mask, other=0.0)
            acc = tl.dot(low, up.to(dtype), acc, input_precision="ieee")

        if HAS_SCALE:
            acc = acc * scale
        if HAS_BIAS:
            acc += tl.load(bias + expert.to(tl.int64) * num_out + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
        y = acc.to(out.dtype.element_ty)
        row_starts = rows.to(tl.int64)[:, None] * num_out
        if HAS_SWIGLU:
            if HAS_PRE_ACTIVATION:
                tl.store(pre_activation + row_starts + cols[None, :], y, mask=is_row[:, None] & is_col[None, :])
            # from the rounded values, so that fused and separate activations agree bit for bit
            gate, up = tl.split(tl.reshape(y.to(tl.float32), (ROWS, COLS // 2, 2)))
            half_cols = first_col // 2 + tl.arange(0, COLS // 2)
            tl.store(out + row_starts // 2 + half_cols[None, :],
                     clamped_swiglu(gate, up, alpha, limit).to(out.dtype.element_ty),
                     mask=is_row[:, None] & (half_cols < num_out // 2)[None, :])
        else:
            tl.store(out + row_starts + cols[None, :], y, mask=is_row[:, None] & is_col[None, :])


def _check(x, weight, offsets, num_rows, optional: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]]) -> None:
    """Raises ValueError for shapes that do not fit together; `optional` maps a name to its tensor and the shape it must have."""
    if weight.dim() != 3 or x.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"grouped_gemm: x {list(x.shape)} and weight {list(weight.shape)}; give [rows, in] and [E, in, out]")
    if offsets is None and weight.shape[0] != 1:
        raise ValueError(f"grouped_gemm: {weight.shape[0]} experts without offsets; give offsets [E + 1]")
    if offsets is not None and offsets.shape != (weight.shape[0] + 1,):
        raise ValueError(f"grouped_gemm: offsets {list(offsets.shape)} for {weight.shape[0]} experts; give [E + 1]")
    for name, (tensor, shape) in optional.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"grouped_gemm: {name} is {list(tensor.shape)}, not {list(shape)}")


def _tma_serves(matrix: torch.Tensor, boxes: tuple[int, int]) -> bool:
    """Whether a tensor descriptor can read a contiguous [rows, columns] matrix in boxes of this size."""
    inner_bytes = boxes[1] * matrix.element_size()
    return (matrix.data_ptr() % 16 == 0 and matrix.shape[1] * matrix.element_size() % 16 == 0 and inner_bytes >= 16
            and max(boxes) <= 256)


def grouped_gemm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None, *,
                 gather: torch.Tensor | None = None, bias: torch.Tensor | None = None,
                 low_rank: torch.Tensor | None = None, lora_up: torch.Tensor | None = None,
                 lora_groups: torch.Tensor | None = None, scale: float | None = None,
                 swiglu: tuple[float, float] | None = None, pre_activation: torch.Tensor | None = None,
                 out: torch.Tensor | None = None, blocks: GemmBlocks | None = None) -> torch.Tensor:
    """(x_r W_e + low_rank_r U_e) * scale + b_e for every routed row r of expert e, rounded once to out's dtype.

    x [R, K] in expert order, or with gather [R] (int32 or int64) any [T, K] whose row gather[r] belongs to routed row r.
    weight [E, K, N], K or N contiguous, cast to x's dtype (LoRA's fp32 masters). offsets [E + 1] int32 on x's device; without
    it one expert owns all rows. bias [E, N]; low_rank [R, r] in x's dtype with lora_up [E, r, N], any strides, joins the
    accumulator (it must already be scaled). With lora_groups [N] int32, low_rank is several slices of r side by side, and column
    n uses only slice lora_groups[n], or none if that is -1.
    Without `out` the result has x's dtype; a float32 `out` can hold values that float16 cannot.
    swiglu = (alpha, limit) returns the clamped activation [R, N / 2] of interleaved gate and up columns; its rounded input goes
    to pre_activation [R, N] if given. No gradient: callers build autograd Functions from this.
    Raises ValueError for shapes that do not fit and for dtypes and GPUs that the kernel cannot serve."""
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    num_experts, num_in, num_out = weight.shape
    rank = 0 if low_rank is None else low_rank.shape[1]
    slice_rank = rank if lora_groups is None else lora_up.shape[1]
    out_shape = (num_rows, num_out if swiglu is None else num_out // 2)
    _check(x, weight, offsets, num_rows, {
        "bias": (bias, (num_experts, num_out)), "low_rank": (low_rank, (num_rows, rank)), "out": (out, out_shape),
        "lora_up": (lora_up, (num_experts, slice_rank, num_out)), "lora_groups": (lora_groups, (num_out,)),
        "pre_activation": (pre_activation, (num_rows, num_out)),
    })  # fmt: skip
    assert (low_rank is None) == (lora_up is None), "low_rank and lora_up come together"
    assert pre_activation is None or swiglu is not None, "pre_activation is for swiglu"
    path = product_path(x)
    if path != "reference":
        check_served("grouped_gemm", {"x": x, "weight": weight}, dtypes=DTYPES, tensor_cores=path == "triton")
    if out is None:
        out = x.new_empty(out_shape)
    if path != "triton":
        return _grouped_gemm_by_expert(x, weight, offsets, gather, bias, low_rank, lora_up, lora_groups, scale, swiglu,
                                       pre_activation, out)
    assert out.is_contiguous() and (pre_activation is None or pre_activation.is_contiguous())
    if num_rows == 0 or num_out == 0:
        return out

    x = x if x.stride(1) == 1 else x.contiguous()
    in_contiguous = weight.stride(1) == 1
    if not in_contiguous and weight.stride(2) != 1:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    if low_rank is not None:
        low_rank = low_rank.contiguous()
    blocks = blocks or choose_blocks(gpu_family(x), x.dtype, num_rows, num_experts, num_in, num_out)
    matrix = weight.transpose(1, 2) if in_contiguous else weight  # last dimension contiguous
    weight_box = (blocks.cols, blocks.inner) if in_contiguous else (blocks.inner, blocks.cols)
    weight_tma = (blocks.use_tma and matrix.is_contiguous() and weight.dtype == x.dtype
                  and _tma_serves(matrix.flatten(0, 1), weight_box)
                  and (in_contiguous or num_in % blocks.inner == 0))  # a box must not reach into the next expert's rows
    x_tma = (blocks.use_tma and gather is None and x.is_contiguous() and _tma_serves(x, (blocks.rows, blocks.inner)))
    col_tiles = cdiv(num_out, blocks.cols)
    num_tiles = (num_rows // blocks.rows + min(num_experts, num_rows)) * col_tiles  # at most: a part tile per expert
    grid = min(num_tiles, num_multiprocessors(x)) if blocks.persistent else num_tiles
    rank_block = max(16, min(64, next_power_of_2(rank)))
    up_strides = (0, 0, 0) if lora_up is None else lora_up.stride()
    alpha, limit = (0.0, 0.0) if swiglu is None else swiglu
    launch(
        grouped_gemm_kernel, (grid,), TensorDescriptor.from_tensor(x, [blocks.rows, blocks.inner]) if x_tma else x,
        TensorDescriptor.from_tensor(matrix.flatten(0, 1), list(weight_box)) if weight_tma else weight,
        out, pre_activation, offsets, gather, bias, low_rank, lora_up, lora_groups,
        num_rows, num_experts, num_in, num_out, rank, slice_rank, 1.0 if scale is None else scale, alpha, limit,
        x.stride(0), weight.stride(0), weight.stride(2 if in_contiguous else 1), *up_strides,
        EXPERTS=1 if offsets is None else max(next_power_of_2(num_experts), _LEAST_EXPERTS),
        ROWS=blocks.rows, COLS=blocks.cols, INNER=blocks.inner,
        RANK=rank_block, RANK_STEPS=cdiv(rank, rank_block), GROUP=blocks.group, IN_CONTIGUOUS=in_contiguous,
        EVEN_IN=num_in % blocks.inner == 0, X_TMA=x_tma, WEIGHT_TMA=weight_tma, HAS_OFFSETS=offsets is not None,
        HAS_GATHER=gather is not None, HAS_BIAS=bias is not None, HAS_SCALE=scale is not None,
        HAS_SWIGLU=swiglu is not None, HAS_PRE_ACTIVATION=pre_activation is not None, HAS_LORA_GROUPS=lora_groups is not None,
        FLATTEN=blocks.flatten,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    return out


def grouped_linear(x: torch.Tensor, weights: ExpertWeights, offsets: list[int], *, lora_A: torch.Tensor | None = None,
                   lora_B: torch.Tensor | None = None, lora_scale: float | None = None) -> torch.Tensor:
    """The reference, with gradients of x, LoRA, biases and dense weights: x [R, K] in expert order, offsets [E + 1] -> [R, N] in
    x's dtype. lora_A [E, r, K] and lora_B [E, N, r], fp32 or x's dtype like their gradients, add lora_scale (x A^T) B^T."""
    weight, packed = (weights.weight, None) if isinstance(weights, Dense) else (None, weights)
    y = _ReferenceLinear.apply(x, weight, packed, weights.bias, offsets)
    if lora_A is None:
        return y
    low_rank = _ReferenceLinear.apply(x, lora_A.to(x.dtype).transpose(1, 2), None, None, offsets)  # [R, r]
    return y + lora_scale * _ReferenceLinear.apply(low_rank, lora_B.to(x.dtype).transpose(1, 2), None, None, offsets)
