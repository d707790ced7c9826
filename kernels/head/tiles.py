"""Logits of hidden states, computed tile by tile of the vocabulary, and sums over each tile. Scoring (log_probs.py) and drawing
(draw.py) share them, so equal hidden states give equal bits in both.

For each token and tile of the vocabulary _partials_kernel stores the maximum, the sum of probabilities relative to it and the sum
of weighted logits; _reduce_kernel adds these up in the order of the vocabulary. Maxima are rounded up to whole powers of two,
so a change of reference scales every term exactly. Exponentials and logarithms are base 2 inside, nats outside.

Shapes: N tokens, D model width, V vocabulary, C columns of a range of the vocabulary.
"""
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dense import product
from kernels.device import (
    aligned_rows,
    cdiv,
    check_served,
    gpu_family,
    is_gpu,
    launch,
    measured,
    num_multiprocessors,
    product_path,
    unmeasured,
)

LN2 = tl.constexpr(math.log(2))
NEVER = tl.constexpr(-1e30)  # a logit of probability 0; finite, so that differences are never NaN
# most powers of two by which a stored probability may exceed its reference: sums of 2^18 of them stay finite
MAX_EXCESS = {torch.bfloat16: 64.0, torch.float32: 64.0, torch.float16: 4.0}

# tokens and vocabulary rows of a product, width of a step; TILE columns are reduced at a time (the whole or half of BN);
# persistent programs overlap a product's end with the next one's start
_BLOCKS = {
    "hopper": measured(dict(BM=128, BN=256, BK=64, TILE=128, num_warps=8, num_stages=3, IS_PERSISTENT=True, USE_TMA=True)),
    "blackwell": unmeasured(dict(BM=128, BN=128, BK=64, TILE=64, num_warps=8, num_stages=3, IS_PERSISTENT=False, USE_TMA=True)),
    "ampere": unmeasured(dict(BM=128, BN=128, BK=64, TILE=64, num_warps=8, num_stages=3, IS_PERSISTENT=False, USE_TMA=False)),
    "consumer": unmeasured(dict(BM=128, BN=128, BK=32, TILE=64, num_warps=8, num_stages=3, IS_PERSISTENT=False, USE_TMA=False)),
    "turing": unmeasured(dict(BM=16, BN=128, BK=16, TILE=128, num_warps=4, num_stages=1, IS_PERSISTENT=False, USE_TMA=False)),
    "interpreter": unmeasured(dict(BM=16, BN=32, BK=16, TILE=16, num_warps=4, num_stages=1, IS_PERSISTENT=True, USE_TMA=False)),
}
# smaller blocks with marks of kept columns, and in the gradient's kernel, where larger ones would spill registers
_SMALL_PARTS = {"hopper": measured(dict(BN=128, TILE=64))}
# draws of at most 64 rows: half the rows in a tile leave room for one more step in flight. Threads have the same columns of a row
# as in the larger tile, so sums have the same bits
_FEW_ROWS = {"hopper": measured(dict(BM=64, num_warps=4, num_stages=4))}
_FLOAT32_BLOCKS = dict(BM=64, BN=64, BK=32, TILE=64, num_warps=4, num_stages=2, IS_PERSISTENT=False, USE_TMA=False)


@triton.jit
def logits_tile(hidden, weight, row, column, num_rows, num_columns, width, stride_hidden, stride_weight,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, IS_EVEN: tl.constexpr, USE_TMA: tl.constexpr):
    """Products [BM, BN] fp32 of the hidden states from `row` with the head's rows from `column`, the width ascending."""
    products = tl.zeros((BM, BN), dtype=tl.float32)
    if USE_TMA:
        for k in range(0, width, BK):
            products = tl.dot(hidden.load([row, k]), weight.load([column, k]).T, products)
    else:
        rows, columns, ks = row + tl.arange(0, BM), column + tl.arange(0, BN), tl.arange(0, BK)
        hidden_at = hidden + rows.to(tl.int64)[:, None] * stride_hidden + ks[None, :]
        weight_at = weight + columns.to(tl.int64)[None, :] * stride_weight + ks[:, None]
        for k in range(0, width, BK):
            row_mask, column_mask = (rows < num_rows)[:, None], (columns < num_columns)[None, :]
            if not IS_EVEN:
                row_mask = row_mask & (ks < width - k)[None, :]
                column_mask = column_mask & (ks < width - k)[:, None]
            x = tl.load(hidden_at + k, mask=row_mask, other=0.0)
            w = tl.load(weight_at + k, mask=column_mask, other=0.0)
            products = tl.dot(x, w, products, input_precision="ieee")
    return products


@triton.jit
def part_of(products, PART: tl.constexpr, TILE: tl.constexpr):
    """Columns PART * TILE to (PART + 1) * TILE of a product that is one or two tiles wide."""
    if products.shape[1] == TILE:
        return products
    else:
        left, right = products.reshape(products.shape[0], 2, TILE).permute(0, 2, 1).split()
        if PART == 0:
            return left
        else:
            return right


@triton.jit
def store_tile(products, logits, rows, row_mask, column, num_columns, stride_logits):
    columns = column + tl.arange(0, products.shape[1])
    at = logits + rows[:, None] * stride_logits + columns[None, :]
    tl.store(at, products, mask=row_mask[:, None] & (columns < num_columns)[None, :])


@triton.jit
def _score_tile(products, rows, row_mask, column, targets, reference, maxima, sums, dots, kept_maxima, kept_sums, target_logits,
                other_sums, scratch, scale, max_excess, vocab, stride_scratch, HAS_KEPT: tl.constexpr, STORES: tl.constexpr):
    """Stores the sums of one tile of the vocabulary: products [BM, TILE], from `column` on."""
    TILE: tl.constexpr = products.shape[1]
    columns = column + tl.arange(0, TILE)
    row_mask = row_mask & (column + tl.zeros_like(rows) < vocab)  # the last tile may be half outside
    target = tl.load(targets + rows, mask=row_mask, other=-1).to(tl.int32)
    is_target = columns[None, :] == target[:, None]
    has_target = row_mask & (target >= column) & (target < column + TILE)
    z = tl.where((columns < vocab)[None, :], products * scale, NEVER)
    tl.store(target_logits + rows, tl.sum(tl.where(is_target, z, 0.0), 1), mask=has_target)
    at = rows * tl.cdiv(vocab, TILE) + column // TILE
    maximum = tl.ceil(tl.max(z, 1))
    p = tl.exp2(z - maximum[:, None])
    tl.store(maxima + at, maximum, mask=row_mask)
    tl.store(sums + at, tl.sum(p, 1), mask=row_mask)
    tl.store(dots + at, tl.sum(p * (z - maximum[:, None]), 1), mask=row_mask)
    if HAS_KEPT or STORES:
        scratch_at = scratch + rows[:, None] * stride_scratch + columns[None, :]
        mask = row_mask[:, None] & (columns < vocab)[None, :]
    if HAS_KEPT:
        is_kept = tl.load(scratch_at, mask=mask, other=0.0) > 0
        maximum = tl.ceil(tl.max(tl.where(is_kept, z, NEVER), 1))
        p = tl.where(is_kept, tl.exp2(tl.minimum(z - maximum[:, None], 0.0)), 0.0)
        tl.store(kept_maxima + at, maximum, mask=row_mask)
        tl.store(kept_sums + at, tl.sum(p, 1), mask=row_mask)
    if STORES:
        p = tl.where(is_target, 0.0, p)
        tl.store(other_sums + rows, tl.sum(p, 1), mask=has_target)
        wanted = tl.load(reference + rows, mask=row_mask, other=0.0)
        used = tl.where(maximum - wanted > max_excess, maximum, wanted)
        p *= tl.exp2(maximum - used)[:, None]
        tl.store(scratch_at, p.to(scratch.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _partials_kernel(hidden, weight, logits, targets, reference, maxima, sums, dots, kept_maxima, kept_sums, target_logits,
                     other_sums, scratch, scale, max_excess, num_rows, vocab, width, stride_hidden, stride_weight,
                     stride_logits, stride_scratch, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                     TILE: tl.constexpr, IS_EVEN: tl.constexpr, USE_TMA: tl.constexpr, IS_PERSISTENT: tl.constexpr,
                     HAS_LOGITS: tl.constexpr, HAS_KEPT: tl.constexpr, STORES: tl.constexpr,
                     KEEPS_LOGITS: tl.constexpr):
    """For each token and TILE columns of the vocabulary: maximum, sum and weighted sum. STORES: also writes probabilities into
    the scratch. HAS_KEPT: the scratch first has the marks of kept columns. Logits are computed here, and stored if
    KEEPS_LOGITS; or, if HAS_LOGITS, read."""
    num_row_tiles = tl.cdiv(num_rows, BM)
    num_tiles = num_row_tiles * tl.cdiv(vocab, BN)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_PERSISTENT):
        # neighbouring programs share a tile of the head
        row, column = (tile % num_row_tiles) * BM, (tile // num_row_tiles) * BN
        rows = row + tl.arange(0, BM)
        row_mask, rows = rows < num_rows, rows.to(tl.int64)
        if HAS_LOGITS:
            columns = column + tl.arange(0, BN)
            mask = row_mask[:, None] & (columns < vocab)[None, :]
            products = tl.load(logits + rows[:, None] * stride_logits + columns[None, :], mask=mask, other=0.0)
        else:
            products = logits_tile(hidden, weight, row, column, num_rows, vocab, width, stride_hidden, stride_weight,
                                    BM, BN, BK, IS_EVEN, USE_TMA)
        # tile by tile, so that a product's logits and probabilities are not in registers at once
        for part in tl.static_range(BN // TILE):
            logits_part = part_of(products, part, TILE)
            _score_tile(logits_part, rows, row_mask, column + part * TILE, targets, reference, maxima, sums, dots, kept_maxima,
                        kept_sums, target_logits, other_sums, scratch, scale, max_excess, vocab, stride_scratch, HAS_KEPT, STORES)
            if KEEPS_LOGITS:
                store_tile(logits_part, logits, rows, row_mask, column + part * TILE, vocab, stride_logits)


@triton.jit
def _reduce_kernel(targets, reference, maxima, sums, dots, kept_maxima, kept_sums, target_logits, other_sums, scratch,
                   log_probs, entropy, lse, kept_lse, target_factor, sum_factor, max_excess, vocab, num_tiles,
                   stride_scratch, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, HAS_KEPT: tl.constexpr,
                   STORES: tl.constexpr):
    """Adds up a token's tiles; one program per token."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    mask = tiles < num_tiles
    at = row * num_tiles + tiles
    tile_max = tl.load(maxima + at, mask=mask, other=NEVER)
    maximum = tl.max(tile_max, 0)
    weight = tl.exp2(tile_max - maximum)
    tile_sum = tl.load(sums + at, mask=mask, other=0.0)
    total = tl.sum(tile_sum * weight, 0)
    dot = tl.sum(weight * (tl.load(dots + at, mask=mask, other=0.0) + (tile_max - maximum) * tile_sum), 0)
    tl.store(lse + row, maximum + tl.log2(total))
    tl.store(entropy + row, (tl.log2(total) - dot / total) * LN2)
    if HAS_KEPT:
        tile_max = tl.load(kept_maxima + at, mask=mask, other=NEVER)
        maximum = tl.max(tile_max, 0)
        weight = tl.exp2(tile_max - maximum)
        tile_sum = tl.load(kept_sums + at, mask=mask, other=0.0)
        total = tl.sum(tile_sum * weight, 0)
    normalizer = maximum + tl.log2(total)
    tl.store(kept_lse + row, normalizer)
    tl.store(log_probs + row, (tl.load(target_logits + row) - normalizer) * LN2)
    if STORES:
        # without the chosen token: 1 - p_y keeps its digits where p_y is near 1
        others = tl.where(tiles == tl.load(targets + row) // TILE, tl.load(other_sums + row), tile_sum)
        tl.store(target_factor + row, tl.sum(others * weight, 0) / total)
        wanted = tl.load(reference + row)
        largest = tl.max(tl.where(tile_max - wanted > max_excess, tile_max, wanted), 0)
        tl.store(sum_factor + row, tl.exp2(largest - maximum) / total)
        if largest > wanted:
            for block in range(0, vocab, BLOCK):
                columns = block + tl.arange(0, BLOCK)
                inside = columns < vocab
                maximum_at = maxima
                if HAS_KEPT:
                    maximum_at = kept_maxima
                tile_max_at = tl.load(maximum_at + row * num_tiles + columns // TILE, mask=inside, other=NEVER)
                used = tl.where(tile_max_at - wanted > max_excess, tile_max_at, wanted)
                p_at = scratch + row * stride_scratch + columns
                p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32) * tl.exp2(used - largest)
                tl.store(p_at, p.to(scratch.dtype.element_ty), mask=inside)


def head_blocks(hidden: torch.Tensor, weight: torch.Tensor, *, small_parts: bool = False, fits_rows: bool = False,
                draws: bool = False) -> dict:
    """Block sizes and options for products of hidden states with a head. fits_rows: they may depend on the number of rows; only
    for plain products, since sums over a tile depend on its layout, and scores must have the same bits in any batch. draws: a
    draw of few rows takes a smaller tile, whose layout adds a row up in the same order."""
    family = gpu_family(hidden)
    blocks = dict(_BLOCKS[family].blocks)
    if weight.dtype == torch.float32 and is_gpu(hidden):
        blocks = dict(_FLOAT32_BLOCKS)
    elif small_parts and family in _SMALL_PARTS:
        blocks |= _SMALL_PARTS[family].blocks
    num_rows, width = hidden.shape
    if draws and num_rows <= 64 and family in _FEW_ROWS and weight.dtype != torch.float32:
        blocks |= _FEW_ROWS[family].blocks
    if fits_rows and num_rows <= 64:  # the head is read once, whatever the tile
        blocks |= dict(BM=max(16, triton.next_power_of_2(num_rows)), BN=min(blocks["BN"], 128))
    aligned = width * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0 and hidden.data_ptr() % 16 == 0
    blocks["USE_TMA"] = blocks["USE_TMA"] and aligned
    return blocks | dict(IS_EVEN=width % blocks["BK"] == 0)


def operands(hidden: torch.Tensor, weight: torch.Tensor, blocks: dict) -> tuple:
    """Both as the kernels take them: tensor descriptors, or the tensors."""
    if not blocks["USE_TMA"]:
        return hidden, weight
    return (TensorDescriptor.from_tensor(hidden, [blocks["BM"], blocks["BK"]]),
            TensorDescriptor.from_tensor(weight, [blocks["BN"], blocks["BK"]]))


def grid_of(num_rows: int, num_columns: int, blocks: dict, hidden: torch.Tensor) -> tuple[int]:
    num_tiles = cdiv(num_rows, blocks["BM"]) * cdiv(num_columns, blocks["BN"])
    return (min(num_tiles, num_multiprocessors(hidden)) if blocks["IS_PERSISTENT"] else num_tiles,)


def path_of(hidden: torch.Tensor, weight: torch.Tensor) -> str:
    """The path that serves these tensors: "triton" or "library"."""
    if hidden.dtype != weight.dtype:
        raise ValueError(f"log_probs: hidden states are {hidden.dtype}, the head {weight.dtype}; they must be equal")
    path = "library" if weight.dtype == torch.float16 else product_path(hidden)
    check_served("log_probs", {"hidden": hidden, "weight": weight}, dtypes=tuple(MAX_EXCESS), tensor_cores=path == "triton")
    return path


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b with fp32 sums, rounded to out's dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # in the interpreter
        out.copy_(product(a, b))


class TileSums(NamedTuple):
    """The tiles' sums for each token: [N, tiles] fp32 each, the last two [N]. Without a filter kept_* are not read."""

    maxima: torch.Tensor
    sums: torch.Tensor
    dots: torch.Tensor
    kept_maxima: torch.Tensor
    kept_sums: torch.Tensor
    target_logits: torch.Tensor  # base 2
    other_sums: torch.Tensor  # of the target's tile, without the target


def score_tiles(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None,
                scratch: torch.Tensor | None, logits: torch.Tensor | None, *, blocks: dict, scale: float, has_kept: bool,
                stores: bool, keeps_logits: bool) -> TileSums:
    """The tiles' sums for targets [N], of logits times `scale` (base 2, divided by the temperature). scratch [N, V]: with
    has_kept it has the marks of kept columns, with `stores` it gets probabilities relative to 2^reference. logits [N, V] fp32
    are written if keeps_logits, else read if given."""
    (num_rows, width), vocab = hidden.shape, weight.shape[0]
    tiles = aligned_rows(5 if has_kept else 3, num_rows, cdiv(vocab, blocks["TILE"]), dtype=torch.float32, device=hidden.device)
    of_rows = aligned_rows(2, num_rows, dtype=torch.float32, device=hidden.device)
    sums = TileSums(*tiles[:3], *tiles[-2:], *of_rows)
    stride_scratch, stride_logits = (0 if room is None else room.stride(0) for room in (scratch, logits))
    launch(_partials_kernel, grid_of(num_rows, vocab, blocks, hidden), *operands(hidden, weight, blocks), logits, targets,
           reference, *sums, scratch, scale, MAX_EXCESS[weight.dtype], num_rows, vocab, width, hidden.stride(0), weight.stride(0),
           stride_logits, stride_scratch, HAS_LOGITS=logits is not None and not keeps_logits, HAS_KEPT=has_kept, STORES=stores,
           KEEPS_LOGITS=keeps_logits, **blocks)
    return sums


def add_up_tiles(targets: torch.Tensor, reference: torch.Tensor | None, sums: TileSums, scratch: torch.Tensor | None,
                 outputs: list[torch.Tensor], *, vocab: int, tile: int, max_excess: float, has_kept: bool, stores: bool) -> None:
    """Fills outputs, [N] fp32 each: log_probs and entropy in nats, lse and kept_lse in base 2. If probabilities were stored, also
    target_factor and sum_factor, and rescales the scratch to one reference for each row."""
    num_rows, num_tiles = sums.maxima.shape
    launch(_reduce_kernel, (num_rows,), targets, reference, *sums, scratch, *outputs, max_excess, vocab, num_tiles,
           0 if scratch is None else scratch.stride(0), TILE=tile, TILES=triton.next_power_of_2(num_tiles), BLOCK=1024,
           HAS_KEPT=has_kept, STORES=stores)
