"""Log-probability of chosen tokens and entropy of the whole distribution, from hidden states, without keeping logits.

z = W h / temperature; log p(y) = z_y - logsumexp_{i in kept} z_i; entropy = -sum_i p_i log p_i over the full vocabulary.
`kept` is the set a sampling filter left (empty: the whole vocabulary), so that the trainer scores under the distribution that was
sampled from. Logits are fp32 sums that never leave the kernel:
  dz_i += g_logp (1[i = y] - p_i^kept),  dz_i += -g_entropy p_i (log p_i + entropy).

With a frozen head the gradient of log p(y) is its factor times a direction known in the forward,
  dh = g_logp / temperature * ((1 - p_y) W_y - sum_{i != y} p_i W_i),
so the forward makes that sum too, from unnormalised probabilities in a bounded scratch, and the whole costs two matrix products
(logits, sum) instead of three. The chosen token stays out of the sum: at p_y near 1 the two terms would cancel in bf16.
A trainable head, or a loss that uses the entropy, has its logits recomputed in the backward, one range of the vocabulary at
a time (four products, three with a frozen head).

The log-sum-exp is a reduction in two levels: each tile of the vocabulary leaves its maximum, sum and sum of weighted logits per
token, and one program per token reduces these in the order of the vocabulary. Maxima are rounded up to whole powers of two:
then a change of reference scales every term exactly. Exponentials and logarithms are base 2 inside, nats outside.

The probabilities in the scratch are relative to a power of two near the chosen token's own (found by a dot product
beforehand), not to a maximum that is only known once all tiles are done: bf16 has the exponents of fp32, so that any
reference near the maximum keeps all its digits. Tiles 2^_MAX_EXCESS above it take their own maximum, and the row is rescaled.

Paths: "triton" forms logits in the kernel; "library" (kernels/device.py: product_path; and float16 anywhere) takes fp32 logits
from torch.mm. The sum is torch.mm in both.

Shapes: N tokens, D model width, V vocabulary, n tokens of a chunk, C columns of a range of the vocabulary.
"""
import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dense import linear, product
from kernels.device import (
    cdiv,
    check_served,
    gpu_family,
    is_triton,
    launch,
    measured,
    num_multiprocessors,
    product_path,
    unmeasured,
)

# logits held at once by the reference, in elements
_MAX_LOGITS = 1 << 27
SCRATCH_BYTES = 600_000_000  # what the kernels may hold at once: 1,408 tokens of gpt-oss in bf16
_LN2 = tl.constexpr(math.log(2))
_NEVER = tl.constexpr(-1e30)  # a logit of probability 0 that needs no care for infinities
# powers of two that a stored probability may exceed its reference by: sums of 2^18 of them stay finite
_MAX_EXCESS = {torch.bfloat16: 64.0, torch.float32: 64.0, torch.float16: 4.0}

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
# with marks of kept columns to read, or in the gradient's kernel, larger ones would spill registers
_SMALL_PARTS = {"hopper": measured(dict(BN=128, TILE=64))}
_FLOAT32_BLOCKS = dict(BM=64, BN=64, BK=32, TILE=64, num_warps=4, num_stages=2, IS_PERSISTENT=False, USE_TMA=False)


def head_logits_reference(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.dtype == torch.float32:
        return linear(hidden.float(), weight, None)
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)
    rows = 1 << 14  # an fp32 copy of the head is made piece by piece
    for start in range(0, weight.shape[0], rows):
        logits[:, start:start + rows] = linear(hidden.float(), weight[start:start + rows].float(), None)
    return logits


def _kept_mask(z: torch.Tensor, kept_ids: torch.Tensor, kept_offsets: torch.Tensor) -> torch.Tensor:
    """Mask [n, V]: true for the kept ids of each row, and everywhere in rows without a filter."""
    counts = kept_offsets[1:] - kept_offsets[:-1]
    mask = (counts == 0).unsqueeze(1).expand_as(z).clone()
    rows = torch.repeat_interleave(torch.arange(len(counts), device=z.device), counts)
    mask[rows, kept_ids[kept_offsets[0]:kept_offsets[-1]].long()] = True
    return mask


def _kept_log_probs(z: torch.Tensor, log_p: torch.Tensor, kept_ids: torch.Tensor | None, kept_offsets: torch.Tensor | None,
                    part: slice) -> torch.Tensor:
    """log p [n, V] of rows `part`, renormalised over what each row keeps; log_p itself where nothing is filtered."""
    if kept_ids is None:
        return log_p
    mask = _kept_mask(z, kept_ids, kept_offsets[part.start:part.start + z.shape[0] + 1])
    return torch.log_softmax(z.masked_fill(~mask, float("-inf")), dim=-1)


class _LogProbsReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, kept_ids, kept_offsets):
        chunk = max(1, _MAX_LOGITS // weight.shape[0])
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            z = head_logits_reference(hidden[part], weight).div_(temperature)
            # rounds as the sampler does: the maximum is taken off before the logarithm
            log_p = torch.log_softmax(z, dim=-1)
            kept_log_p = _kept_log_probs(z, log_p, kept_ids, kept_offsets, part)
            log_probs[part] = kept_log_p.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            entropy[part] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, entropy, kept_ids, kept_offsets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # an output nobody differentiates costs nothing
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy):
        hidden, weight, targets, entropy, kept_ids, kept_offsets = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            z = head_logits_reference(hidden[part], weight).div_(ctx.temperature)
            log_p = torch.log_softmax(z, dim=-1)
            grad_z = torch.zeros_like(z)
            if grad_entropy is not None:
                grad_z -= log_p.exp() * (log_p + entropy[part].unsqueeze(1)) * grad_entropy[part].unsqueeze(1)
            if grad_log_probs is not None:
                kept_log_p = _kept_log_probs(z, log_p, kept_ids, kept_offsets, part)
                grad_z -= kept_log_p.exp() * grad_log_probs[part].unsqueeze(1)
                grad_z.scatter_add_(1, targets[part].unsqueeze(1), grad_log_probs[part].unsqueeze(1))
            grad_z /= ctx.temperature
            if needs_hidden:
                grad_hidden[part] = (grad_z.to(weight.dtype) @ weight).to(hidden.dtype)
            if needs_weight:
                grad_weight += grad_z.T @ hidden[part].float()
        return (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None)


@triton.jit
def _logits_tile(hidden, weight, row, column, num_rows, num_columns, width, stride_hidden, stride_weight,
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
def _halves(x):
    """Left and right half of the columns."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _store_tile(products, logits, rows, row_mask, column, num_columns, stride_logits):
    columns = column + tl.arange(0, products.shape[1])
    at = logits + rows[:, None] * stride_logits + columns[None, :]
    tl.store(at, products, mask=row_mask[:, None] & (columns < num_columns)[None, :])


@triton.jit
def _reference_kernel(hidden, weight, targets, reference, scale, width, stride_hidden, stride_weight, BLOCK: tl.constexpr):
    """The power of two below the chosen token's unnormalised probability, for the row of this program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(hidden + row * stride_hidden + columns, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + tl.load(targets + row) * stride_weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(reference + row, tl.floor(tl.sum(x * w, 0) * scale))


@triton.jit
def _kept_kernel(ids, offsets, scratch, num_columns, first_column, stride_scratch, BLOCK: tl.constexpr):
    """Marks kept columns of a zeroed scratch row with 1: all of them where the row has no filter."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    at = scratch + row * stride_scratch
    if start == end:
        for block in range(0, num_columns, BLOCK):
            columns = block + tl.arange(0, BLOCK)
            tl.store(at + columns, 1.0, mask=columns < num_columns)
    else:
        for first in range(start, end, BLOCK):
            items = first + tl.arange(0, BLOCK)
            kept = tl.load(ids + items, mask=items < end, other=-1) - first_column
            tl.store(at + kept, 1.0, mask=(items < end) & (kept >= 0) & (kept < num_columns))


@triton.jit
def _score_tile(products, rows, row_mask, column, targets, reference, maxima, sums, dots, kept_maxima, kept_sums, target_logits,
                other_sums, scratch, scale, max_excess, vocab, stride_scratch, HAS_KEPT: tl.constexpr, STORES: tl.constexpr):
    """What one tile of the vocabulary, of products [BM, TILE] from `column` on, leaves of its tokens."""
    TILE: tl.constexpr = products.shape[1]
    columns = column + tl.arange(0, TILE)
    row_mask = row_mask & (column + tl.zeros_like(rows) < vocab)  # the last tile may be half outside
    target = tl.load(targets + rows, mask=row_mask, other=-1).to(tl.int32)
    is_target = columns[None, :] == target[:, None]
    has_target = row_mask & (target >= column) & (target < column + TILE)
    z = tl.where((columns < vocab)[None, :], products * scale, _NEVER)
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
        maximum = tl.ceil(tl.max(tl.where(is_kept, z, _NEVER), 1))
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


@triton.jit
def _partials_kernel(hidden, weight, logits, targets, reference, maxima, sums, dots, kept_maxima, kept_sums, target_logits,
                     other_sums, scratch, scale, max_excess, num_rows, vocab, width, stride_hidden, stride_weight,
                     stride_logits, stride_scratch, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                     TILE: tl.constexpr, IS_EVEN: tl.constexpr, USE_TMA: tl.constexpr, IS_PERSISTENT: tl.constexpr,
                     HAS_LOGITS: tl.constexpr, HAS_KEPT: tl.constexpr, STORES: tl.constexpr,
                     KEEPS_LOGITS: tl.constexpr):
    """Per token and TILE columns of the vocabulary: maximum, sum and weighted sum; and probabilities into the scratch (STORES),
    which holds the marks of kept columns before (HAS_KEPT). Logits are formed here, and stored (KEEPS_LOGITS), or read
    (HAS_LOGITS)."""
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
            products = _logits_tile(hidden, weight, row, column, num_rows, vocab, width, stride_hidden, stride_weight,
                                    BM, BN, BK, IS_EVEN, USE_TMA)
        # part by part, so that a tile's logits and probabilities need not be in registers at once
        if BN == TILE:
            _score_tile(products, rows, row_mask, column, targets, reference, maxima, sums, dots, kept_maxima, kept_sums,
                        target_logits, other_sums, scratch, scale, max_excess, vocab, stride_scratch, HAS_KEPT, STORES)
            if KEEPS_LOGITS:
                _store_tile(products, logits, rows, row_mask, column, vocab, stride_logits)
        else:
            tl.static_assert(BN == 2 * TILE)
            left, right = _halves(products)
            _score_tile(left, rows, row_mask, column, targets, reference, maxima, sums, dots, kept_maxima, kept_sums,
                        target_logits, other_sums, scratch, scale, max_excess, vocab, stride_scratch, HAS_KEPT, STORES)
            if KEEPS_LOGITS:
                _store_tile(left, logits, rows, row_mask, column, vocab, stride_logits)
            _score_tile(right, rows, row_mask, column + TILE, targets, reference, maxima, sums, dots, kept_maxima, kept_sums,
                        target_logits, other_sums, scratch, scale, max_excess, vocab, stride_scratch, HAS_KEPT, STORES)
            if KEEPS_LOGITS:
                _store_tile(right, logits, rows, row_mask, column + TILE, vocab, stride_logits)


@triton.jit
def _reduce_kernel(targets, reference, maxima, sums, dots, kept_maxima, kept_sums, target_logits, other_sums, scratch,
                   log_probs, entropy, lse, kept_lse, target_factor, sum_factor, max_excess, vocab, num_tiles,
                   stride_scratch, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, HAS_KEPT: tl.constexpr,
                   STORES: tl.constexpr):
    """Everything a token's tiles add up to; one program per token."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    mask = tiles < num_tiles
    at = row * num_tiles + tiles
    tile_max = tl.load(maxima + at, mask=mask, other=_NEVER)
    maximum = tl.max(tile_max, 0)
    weight = tl.exp2(tile_max - maximum)
    tile_sum = tl.load(sums + at, mask=mask, other=0.0)
    total = tl.sum(tile_sum * weight, 0)
    dot = tl.sum(weight * (tl.load(dots + at, mask=mask, other=0.0) + (tile_max - maximum) * tile_sum), 0)
    tl.store(lse + row, maximum + tl.log2(total))
    tl.store(entropy + row, (tl.log2(total) - dot / total) * _LN2)
    if HAS_KEPT:
        tile_max = tl.load(kept_maxima + at, mask=mask, other=_NEVER)
        maximum = tl.max(tile_max, 0)
        weight = tl.exp2(tile_max - maximum)
        tile_sum = tl.load(kept_sums + at, mask=mask, other=0.0)
        total = tl.sum(tile_sum * weight, 0)
    normalizer = maximum + tl.log2(total)
    tl.store(kept_lse + row, normalizer)
    tl.store(log_probs + row, (tl.load(target_logits + row) - normalizer) * _LN2)
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
                tile_max_at = tl.load(maximum_at + row * num_tiles + columns // TILE, mask=inside, other=_NEVER)
                used = tl.where(tile_max_at - wanted > max_excess, tile_max_at, wanted)
                p_at = scratch + row * stride_scratch + columns
                p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32) * tl.exp2(used - largest)
                tl.store(p_at, p.to(scratch.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_gradient_kernel(grad, target_factor, sum_factor, weighted_sum, weight, targets, grad_hidden, width,
                            temperature, stride_sum, stride_weight, stride_grad, BLOCK: tl.constexpr):
    """grad / temperature * (target_factor W_y - sum_factor * sum_{i != y} p_i W_i), one program per token."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    w = tl.load(weight + tl.load(targets + row) * stride_weight + columns, mask=mask, other=0.0).to(tl.float32)
    others = tl.load(weighted_sum + row * stride_sum + columns, mask=mask, other=0.0).to(tl.float32)
    direction = tl.load(target_factor + row) * w - tl.load(sum_factor + row) * others
    value = tl.load(grad + row) / temperature * direction
    tl.store(grad_hidden + row * stride_grad + columns, value.to(grad_hidden.dtype.element_ty), mask=mask)


@triton.jit
def _differentiate_tile(products, rows, row_mask, column, targets, lse, kept_lse, entropy, grad_log_probs, grad_entropy,
                        grad_logits, scale, temperature, first_column, num_columns, stride_grad, HAS_KEPT: tl.constexpr,
                        HAS_LOG_PROBS: tl.constexpr, HAS_ENTROPY: tl.constexpr):
    columns = column + tl.arange(0, products.shape[1])
    mask = row_mask[:, None] & (columns < num_columns)[None, :]
    at = grad_logits + rows[:, None] * stride_grad + columns[None, :]
    z = products * scale
    grad = tl.zeros_like(z)
    if HAS_ENTROPY:
        log2_p = z - tl.load(lse + rows, mask=row_mask, other=0.0)[:, None]
        factor = tl.load(grad_entropy + rows, mask=row_mask, other=0.0)[:, None]
        distance = log2_p * _LN2 + tl.load(entropy + rows, mask=row_mask, other=0.0)[:, None]
        grad -= factor * tl.exp2(log2_p) * distance
    if HAS_LOG_PROBS:
        factor = tl.load(grad_log_probs + rows, mask=row_mask, other=0.0)[:, None]
        target = tl.load(targets + rows, mask=row_mask, other=-1).to(tl.int32) - first_column
        p = tl.exp2(z - tl.load(kept_lse + rows, mask=row_mask, other=0.0)[:, None])
        if HAS_KEPT:
            p = tl.where(tl.load(at, mask=mask, other=0.0) > 0, p, 0.0)
        grad += factor * (tl.where(columns[None, :] == target[:, None], 1.0, 0.0) - p)
    tl.store(at, (grad / temperature).to(grad_logits.dtype.element_ty), mask=mask)


@triton.jit
def _logits_gradient_kernel(hidden, weight, targets, lse, kept_lse, entropy, grad_log_probs, grad_entropy, grad_logits, scale,
                            temperature, first_column, num_rows, num_columns, width, stride_hidden, stride_weight,
                            stride_grad, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr,
                            IS_EVEN: tl.constexpr, USE_TMA: tl.constexpr, IS_PERSISTENT: tl.constexpr,
                            HAS_KEPT: tl.constexpr, HAS_LOG_PROBS: tl.constexpr, HAS_ENTROPY: tl.constexpr):
    """Gradient of the logits (before the temperature) of a range of the vocabulary, over the marks of kept columns."""
    num_row_tiles = tl.cdiv(num_rows, BM)
    num_tiles = num_row_tiles * tl.cdiv(num_columns, BN)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_PERSISTENT):
        row, column = (tile % num_row_tiles) * BM, (tile // num_row_tiles) * BN
        products = _logits_tile(hidden, weight, row, column, num_rows, num_columns, width, stride_hidden, stride_weight,
                                BM, BN, BK, IS_EVEN, USE_TMA)
        rows = row + tl.arange(0, BM)
        row_mask, rows = rows < num_rows, rows.to(tl.int64)
        if BN == TILE:
            _differentiate_tile(products, rows, row_mask, column, targets, lse, kept_lse, entropy, grad_log_probs,
                                grad_entropy, grad_logits, scale, temperature, first_column, num_columns, stride_grad,
                                HAS_KEPT, HAS_LOG_PROBS, HAS_ENTROPY)
        else:
            left, right = _halves(products)
            _differentiate_tile(left, rows, row_mask, column, targets, lse, kept_lse, entropy, grad_log_probs, grad_entropy,
                                grad_logits, scale, temperature, first_column, num_columns, stride_grad, HAS_KEPT,
                                HAS_LOG_PROBS, HAS_ENTROPY)
            _differentiate_tile(right, rows, row_mask, column + TILE, targets, lse, kept_lse, entropy, grad_log_probs,
                                grad_entropy, grad_logits, scale, temperature, first_column, num_columns, stride_grad,
                                HAS_KEPT, HAS_LOG_PROBS, HAS_ENTROPY)


def _blocks(hidden: torch.Tensor, weight: torch.Tensor, *, small_parts: bool = False, fits_rows: bool = False) -> dict:
    """Block sizes and options for products of hidden states with a head. Sums over a tile depend on its layout: only products
    alone may choose by the number of rows (fits_rows), scores have the same bits in any batch."""
    family = gpu_family(hidden)
    blocks = dict(_BLOCKS[family].blocks)
    if weight.dtype == torch.float32 and hidden.is_cuda:
        blocks = dict(_FLOAT32_BLOCKS)
    elif small_parts and family in _SMALL_PARTS:
        blocks |= _SMALL_PARTS[family].blocks
    num_rows, width = hidden.shape
    if fits_rows and num_rows <= 64:  # the head is read once, whatever the tile
        blocks |= dict(BM=max(16, triton.next_power_of_2(num_rows)), BN=min(blocks["BN"], 128))
    aligned = width * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0 and hidden.data_ptr() % 16 == 0
    blocks["USE_TMA"] = blocks["USE_TMA"] and aligned
    return blocks | dict(IS_EVEN=width % blocks["BK"] == 0)


def _operands(hidden: torch.Tensor, weight: torch.Tensor, blocks: dict) -> tuple:
    """The kernels' view of both: descriptors for the copy engine, or the tensors."""
    if not blocks["USE_TMA"]:
        return hidden, weight
    return (TensorDescriptor.from_tensor(hidden, [blocks["BM"], blocks["BK"]]),
            TensorDescriptor.from_tensor(weight, [blocks["BN"], blocks["BK"]]))


def _grid(num_rows: int, num_columns: int, blocks: dict, hidden: torch.Tensor) -> tuple[int]:
    num_tiles = cdiv(num_rows, blocks["BM"]) * cdiv(num_columns, blocks["BN"])
    return (min(num_tiles, num_multiprocessors(hidden)) if blocks["IS_PERSISTENT"] else num_tiles,)


def _check(hidden: torch.Tensor, weight: torch.Tensor) -> str:
    """The path that serves these tensors: "triton" or "library"."""
    if hidden.dtype != weight.dtype:
        raise ValueError(f"log_probs: hidden states are {hidden.dtype}, the head {weight.dtype}; they must be equal")
    path = "library" if weight.dtype == torch.float16 else product_path(hidden)
    check_served("log_probs", {"hidden": hidden, "weight": weight}, dtypes=tuple(_MAX_EXCESS), tensor_cores=path == "triton")
    return path


def _mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b with fp32 sums, rounded to out's dtype."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # in the interpreter
        out.copy_(product(a, b))


def _num_rows(num_tokens: int, row_bytes: int, scratch_bytes: int) -> int:
    """Tokens of a chunk: as many as fit, in whole tiles of 128."""
    rows = scratch_bytes // row_bytes if row_bytes else 1 << 14
    return max(1, min(num_tokens, rows - rows % 128 if rows > 128 else rows))


def _mark_kept(scratch: torch.Tensor, kept_ids: torch.Tensor, kept_offsets: torch.Tensor, first_column: int) -> None:
    """scratch [n, C] becomes 1 at the kept ids among the columns from first_column on, 0 elsewhere."""
    scratch.zero_()
    launch(_kept_kernel, (scratch.shape[0],), kept_ids, kept_offsets, scratch, scratch.shape[1], first_column, scratch.stride(0),
           BLOCK=1024)


def _score_chunk(hidden, weight, targets, temperature, kept, scratch, logits, outputs, makes_sum) -> None:
    """Fills `outputs` (log_probs, entropy, lse, kept_lse, target_factor, sum_factor: [n] each) for the tokens of one chunk.
    scratch [n, V] is left with the other tokens' probabilities (makes_sum); logits [n, V] fp32 is room for the "library" path."""
    (num_rows, width), vocab, has_kept = hidden.shape, weight.shape[0], kept is not None
    blocks, scale = _blocks(hidden, weight, small_parts=has_kept), math.log2(math.e) / temperature
    num_tiles = cdiv(vocab, blocks["TILE"])
    maxima, sums, dots, kept_maxima, kept_sums = torch.empty(5, num_rows, num_tiles, dtype=torch.float32, device=hidden.device)
    reference, target_logits, other_sums = torch.empty(3, num_rows, dtype=torch.float32, device=hidden.device)
    max_excess, block = _MAX_EXCESS[weight.dtype], triton.next_power_of_2(width)
    if has_kept:
        _mark_kept(scratch, *kept, 0)
    if makes_sum:
        launch(_reference_kernel, (num_rows,), hidden, weight, targets, reference, scale, width, hidden.stride(0),
               weight.stride(0), BLOCK=block, num_warps=8)
    if logits is not None:
        _mm(hidden, weight.T, logits)
    stride_scratch, stride_logits = (0 if room is None else room.stride(0) for room in (scratch, logits))
    launch(
        _partials_kernel, _grid(num_rows, vocab, blocks, hidden),
        *_operands(hidden, weight, blocks), logits, targets, reference, maxima, sums, dots, kept_maxima, kept_sums,
        target_logits, other_sums, scratch, scale, max_excess, num_rows, vocab, width, hidden.stride(0), weight.stride(0),
        stride_logits, stride_scratch, HAS_LOGITS=logits is not None, HAS_KEPT=has_kept, STORES=makes_sum, KEEPS_LOGITS=False,
        **blocks)
    launch(
        _reduce_kernel, (num_rows,), targets, reference, maxima, sums, dots, kept_maxima, kept_sums, target_logits, other_sums,
        scratch, *outputs, max_excess, vocab, num_tiles, stride_scratch, TILE=blocks["TILE"],
        TILES=triton.next_power_of_2(num_tiles), BLOCK=1024, HAS_KEPT=has_kept, STORES=makes_sum)


def _recompute_gradients(ctx, grad_log_probs, grad_entropy) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the hidden states and of the head, from logits formed again, one range of the vocabulary at a time: a range's
    rows of the head's gradient are complete at once, and only that of the hidden states is summed over ranges."""
    hidden, weight, targets, kept_ids, kept_offsets, _, entropy, lse, kept_lse, _, _ = ctx.saved_tensors
    if weight.dtype == torch.float16:
        raise ValueError("log_probs: in float16 the gradients of the entropy and of the head would underflow; "
                         "use bfloat16 or float32")
    (num_tokens, width), vocab = hidden.shape, weight.shape[0]
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    grad_hidden = torch.zeros(num_tokens, width, dtype=torch.float32, device=hidden.device) if needs_hidden else None
    grad_weight = torch.zeros_like(weight) if needs_weight else None
    if grad_log_probs is None and grad_entropy is None or num_tokens == 0:
        return grad_hidden if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight
    grads = [None if grad is None else grad.contiguous() for grad in (grad_log_probs, grad_entropy)]
    blocks = _blocks(hidden, weight, small_parts=True)
    columns = ctx.scratch_bytes // (num_tokens * weight.element_size())
    columns = min(vocab, max(columns - columns % blocks["BN"], blocks["BN"]))
    scratch = torch.empty(num_tokens, columns, dtype=weight.dtype, device=hidden.device)
    for first in range(0, vocab, columns):
        part = weight[first:first + columns]
        grad_logits = scratch[:, :part.shape[0]]
        has_kept = kept_ids is not None and grads[0] is not None
        if has_kept:
            _mark_kept(grad_logits, kept_ids, kept_offsets, first)
        launch(
            _logits_gradient_kernel, _grid(num_tokens, part.shape[0], blocks, hidden),
            *_operands(hidden, part, blocks), targets, lse, kept_lse, entropy, *grads, grad_logits,
            math.log2(math.e) / ctx.temperature, ctx.temperature, first, num_tokens, part.shape[0], width, hidden.stride(0),
            weight.stride(0), grad_logits.stride(0), HAS_KEPT=has_kept, HAS_LOG_PROBS=grads[0] is not None,
            HAS_ENTROPY=grads[1] is not None, **blocks)
        if needs_hidden:
            grad_hidden += grad_logits @ part
        if needs_weight:
            torch.mm(grad_logits.T, hidden, out=grad_weight[first:first + columns])
    return grad_hidden if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, kept_ids, kept_offsets, makes_sum, scratch_bytes):
        path, has_kept, (num_tokens, width), vocab = _check(hidden, weight), kept_ids is not None, hidden.shape, weight.shape[0]
        # log_probs, entropy, lse, kept_lse (both base 2), target_factor, sum_factor
        outputs = [torch.empty(num_tokens, dtype=torch.float32, device=hidden.device) for _ in range(6)]
        sum_dtype = torch.float32 if path == "library" else weight.dtype  # float16 might overflow
        weighted_sum = torch.empty(num_tokens if makes_sum else 0, width, dtype=sum_dtype, device=hidden.device)
        has_scratch, has_logits = makes_sum or has_kept, path == "library"
        rows = _num_rows(num_tokens, vocab * (weight.element_size() * has_scratch + 4 * has_logits), scratch_bytes)
        scratch = torch.empty(rows, vocab, dtype=weight.dtype, device=hidden.device) if has_scratch else None
        logits = torch.empty(rows, vocab, dtype=torch.float32, device=hidden.device) if has_logits else None
        for start in range(0, num_tokens, rows):
            part = slice(start, min(start + rows, num_tokens))
            room, chunk_logits = (None if tensor is None else tensor[:part.stop - start] for tensor in (scratch, logits))
            kept = (kept_ids, kept_offsets[start:part.stop + 1]) if has_kept else None
            _score_chunk(hidden[part], weight, targets[part], temperature, kept, room, chunk_logits,
                         [output[part] for output in outputs], makes_sum)
            if makes_sum:
                _mm(room, weight, weighted_sum[part])
        ctx.save_for_backward(hidden, weight, targets, kept_ids, kept_offsets, weighted_sum, *outputs[1:])
        ctx.temperature, ctx.makes_sum, ctx.scratch_bytes = temperature, makes_sum, scratch_bytes
        ctx.set_materialize_grads(False)  # an output nobody differentiates costs nothing
        return outputs[0], outputs[1]

    @staticmethod
    def backward(ctx, grad_log_probs, grad_entropy):
        hidden, weight, targets, _, _, weighted_sum, _, _, _, target_factor, sum_factor = ctx.saved_tensors
        if grad_entropy is not None or not ctx.makes_sum:
            return *_recompute_gradients(ctx, grad_log_probs, grad_entropy), None, None, None, None, None, None
        grad_hidden = torch.empty_like(hidden)
        num_tokens, width = hidden.shape
        if num_tokens and grad_log_probs is not None:
            launch(
                _hidden_gradient_kernel, (num_tokens,), grad_log_probs.contiguous(), target_factor, sum_factor, weighted_sum,
                weight, targets, grad_hidden, width, ctx.temperature, weighted_sum.stride(0), weight.stride(0),
                grad_hidden.stride(0), BLOCK=triton.next_power_of_2(width))
        return grad_hidden, None, None, None, None, None, None, None


def log_probs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, temperature: float,
              kept_ids: torch.Tensor | None = None, kept_offsets: torch.Tensor | None = None,
              has_entropy_loss: bool = False, scratch_bytes: int = SCRATCH_BYTES) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [N, D], weight [V, D], targets [N] int64; kept_ids int32 with kept_offsets [N + 1] int64 (row n keeps
    kept_ids[kept_offsets[n]:kept_offsets[n + 1]]). Returns log-probs [N] and entropy [N], fp32 nats, both differentiable.

    has_entropy_loss announces that the entropy's gradient will be asked for (it may be all the same): the forward then
    saves itself the product that only the log-probs' gradient needs. scratch_bytes bounds the kernels' scratch on a GPU.
    A target outside the vocabulary gives an undefined result there. Raises ValueError for dtypes and GPUs without a path."""
    if not is_triton(hidden):
        return _LogProbsReference.apply(hidden, weight, targets, temperature, kept_ids, kept_offsets)
    makes_sum = torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad and not has_entropy_loss
    return _LogProbs.apply(hidden.contiguous(), weight.contiguous(), targets.contiguous(), float(temperature), kept_ids,
                           kept_offsets, makes_sum, scratch_bytes)
