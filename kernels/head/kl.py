"""KL divergence between two next-token distributions over the whole vocabulary, from hidden states, without keeping logits.

p = softmax(W h / temperature), q = softmax(W' h' / temperature); with d_i = (W h - W' h')_i / temperature and its mean under p,
  KL(p || q) = sum_i p_i (log p_i - log q_i) = mean d - logsumexp(W h / temperature) + logsumexp(W' h' / temperature),
  dKL / dz_i = p_i (d_i - mean d)   with z = W h / temperature.
q is a frozen reference and gets no gradient. Often W' is W, and h' the same model's hidden state without its adapter.

Both products are computed tile by tile of the vocabulary, and again in the backward, which writes the gradient of the logits for
one range of the vocabulary at a time (gradients_by_ranges): five products in all, six if the head trains, where log-probs alone
take two. Equal inputs give exactly 0. Where the distributions are near each other, KL is a small difference of larger numbers: d
is that of the very logits whose log-sum-exps are taken, and those are subtracted before they are rounded.

Shapes: N tokens, D model width, V vocabulary, C columns of a range of the vocabulary.
"""
import math

import torch
import triton
import triton.language as tl

from kernels.device import aligned_rows, cdiv, gpu_family, is_gpu, is_triton, launch, unmeasured
from kernels.head.log_probs import MAX_LOGITS, SCRATCH_BYTES, gradients_by_ranges, head_logits_reference, rows_of_chunks
from kernels.head.tiles import LN2, NEVER, grid_of, operands, path_of

# as in tiles.py, for two products at once; sums are over BN columns
_BLOCKS = {
    "hopper": unmeasured(dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3, IS_PERSISTENT=True, USE_TMA=True)),
    "blackwell": unmeasured(dict(BM=128, BN=64, BK=64, num_warps=8, num_stages=3, IS_PERSISTENT=False, USE_TMA=True)),
    "ampere": unmeasured(dict(BM=128, BN=64, BK=64, num_warps=8, num_stages=2, IS_PERSISTENT=False, USE_TMA=False)),
    "consumer": unmeasured(dict(BM=128, BN=64, BK=32, num_warps=8, num_stages=2, IS_PERSISTENT=False, USE_TMA=False)),
    "interpreter": unmeasured(dict(BM=16, BN=32, BK=16, num_warps=4, num_stages=1, IS_PERSISTENT=True, USE_TMA=False)),
}
_FLOAT32_BLOCKS = dict(BM=64, BN=32, BK=32, num_warps=4, num_stages=2, IS_PERSISTENT=False, USE_TMA=False)


class _KlReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, temperature):
        chunk = max(1, MAX_LOGITS // (2 * weight.shape[0]))
        kl, mean = (torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, len(kl), chunk):
            part = slice(start, start + chunk)
            z, ref_z = (head_logits_reference(states[part], head).div_(temperature)
                        for states, head in ((hidden, weight), (ref_hidden, ref_weight)))
            lse, ref_lse = z.logsumexp(-1), ref_z.logsumexp(-1)
            mean[part] = ((z - lse.unsqueeze(1)).exp() * (z - ref_z)).sum(-1)
            kl[part] = mean[part] - (lse - ref_lse)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, mean)
        ctx.temperature, ctx.chunk = temperature, chunk
        return kl

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, ref_hidden, ref_weight, mean = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(grad), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            z, ref_z = (head_logits_reference(states[part], head).div_(ctx.temperature)
                        for states, head in ((hidden, weight), (ref_hidden, ref_weight)))
            grad_z = torch.softmax(z, -1) * (z - ref_z - mean[part].unsqueeze(1)) * grad[part].unsqueeze(1) / ctx.temperature
            if needs_hidden:
                grad_hidden[part] = (grad_z.to(weight.dtype) @ weight).to(hidden.dtype)
            if needs_weight:
                grad_weight += grad_z.T @ hidden[part].float()
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


@triton.jit
def _both_products(hidden, weight, ref_hidden, ref_weight, row, column, num_rows, num_columns, width, stride_hidden,
                   stride_weight, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, IS_EVEN: tl.constexpr,
                   USE_TMA: tl.constexpr):
    """Products [BM, BN] fp32 of the hidden states from `row` with the head's rows from `column`, and the reference's, the width
    ascending. ref_weight is None where both have one head: its tile is then read once."""
    products = tl.zeros((BM, BN), dtype=tl.float32)
    ref_products = tl.zeros((BM, BN), dtype=tl.float32)
    if USE_TMA:
        for k in range(0, width, BK):
            w = weight.load([column, k])
            products = tl.dot(hidden.load([row, k]), w.T, products)
            if ref_weight is not None:
                w = ref_weight.load([column, k])
            ref_products = tl.dot(ref_hidden.load([row, k]), w.T, ref_products)
    else:
        rows, columns, ks = row + tl.arange(0, BM), column + tl.arange(0, BN), tl.arange(0, BK)
        hidden_at = rows.to(tl.int64)[:, None] * stride_hidden + ks[None, :]
        weight_at = columns.to(tl.int64)[None, :] * stride_weight + ks[:, None]
        for k in range(0, width, BK):
            row_mask, column_mask = (rows < num_rows)[:, None], (columns < num_columns)[None, :]
            if not IS_EVEN:
                row_mask = row_mask & (ks < width - k)[None, :]
                column_mask = column_mask & (ks < width - k)[:, None]
            w = tl.load(weight + weight_at + k, mask=column_mask, other=0.0)
            x = tl.load(hidden + hidden_at + k, mask=row_mask, other=0.0)
            products = tl.dot(x, w, products, input_precision="ieee")
            if ref_weight is not None:
                w = tl.load(ref_weight + weight_at + k, mask=column_mask, other=0.0)
            x = tl.load(ref_hidden + hidden_at + k, mask=row_mask, other=0.0)
            ref_products = tl.dot(x, w, ref_products, input_precision="ieee")
    return products, ref_products


@triton.jit(do_not_specialize=["num_rows"])
def _kl_partials_kernel(hidden, weight, ref_hidden, ref_weight, maxima, sums, dots, ref_maxima, ref_sums, scale, num_rows, vocab,
                        width, stride_hidden, stride_weight, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                        IS_EVEN: tl.constexpr, USE_TMA: tl.constexpr, IS_PERSISTENT: tl.constexpr):
    """For each token and BN columns of the vocabulary: maximum and sum of both distributions, and sum of d under the policy's."""
    num_row_tiles, num_column_tiles = tl.cdiv(num_rows, BM), tl.cdiv(vocab, BN)
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0), flatten=IS_PERSISTENT):
        # neighbouring programs share a tile of the head
        row, column = (tile % num_row_tiles) * BM, (tile // num_row_tiles) * BN
        products, ref_products = _both_products(hidden, weight, ref_hidden, ref_weight, row, column, num_rows, vocab, width,
                                                stride_hidden, stride_weight, BM, BN, BK, IS_EVEN, USE_TMA)
        rows = row + tl.arange(0, BM)
        row_mask = rows < num_rows
        at = rows.to(tl.int64) * num_column_tiles + column // BN
        inside = (column + tl.arange(0, BN) < vocab)[None, :]
        ref_z = tl.where(inside, ref_products * scale, NEVER)
        maximum = tl.ceil(tl.max(ref_z, 1))
        tl.store(ref_maxima + at, maximum, mask=row_mask)
        tl.store(ref_sums + at, tl.sum(tl.exp2(ref_z - maximum[:, None]), 1), mask=row_mask)
        z = tl.where(inside, products * scale, NEVER)
        maximum = tl.ceil(tl.max(z, 1))
        p = tl.exp2(z - maximum[:, None])
        tl.store(maxima + at, maximum, mask=row_mask)
        tl.store(sums + at, tl.sum(p, 1), mask=row_mask)
        tl.store(dots + at, tl.sum(p * (z - ref_z), 1), mask=row_mask)  # of the rounded logits that the sums are of


@triton.jit
def _log_sum(maxima, sums, at, mask):
    """The row's maximum, its sum relative to 2^maximum, and the factors [TILES] that bring tiles to that maximum."""
    tile_max = tl.load(maxima + at, mask=mask, other=NEVER)
    maximum = tl.max(tile_max, 0)
    factors = tl.exp2(tile_max - maximum)
    return maximum, tl.sum(factors * tl.load(sums + at, mask=mask, other=0.0), 0), factors


@triton.jit
def _kl_reduce_kernel(maxima, sums, dots, ref_maxima, ref_sums, kl, lse, mean, num_tiles, TILES: tl.constexpr):
    """Adds up a token's tiles in the order of the vocabulary; one program per token."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    mask = tiles < num_tiles
    at = row * num_tiles + tiles
    maximum, total, factors = _log_sum(maxima, sums, at, mask)
    ref_maximum, ref_total, _ = _log_sum(ref_maxima, ref_sums, at, mask)
    mean_difference = tl.sum(factors * tl.load(dots + at, mask=mask, other=0.0), 0) / total
    tl.store(lse + row, maximum + tl.log2(total))
    tl.store(mean + row, mean_difference)
    # maxima are whole numbers, so their difference is exact, and the logarithm of a ratio near 1 keeps its digits; a GPU's
    # plain division may be off by a unit in the last place, of equal sums too
    tl.store(kl + row, (mean_difference - (maximum - ref_maximum) - tl.log2(tl.div_rn(total, ref_total))) * LN2)


@triton.jit(do_not_specialize=["num_rows"])
def _kl_gradient_kernel(hidden, weight, ref_hidden, ref_weight, lse, mean, grad_kl, grad_logits, scale, temperature, num_rows,
                        num_columns, width, stride_hidden, stride_weight, stride_grad, BM: tl.constexpr, BN: tl.constexpr,
                        BK: tl.constexpr, IS_EVEN: tl.constexpr, USE_TMA: tl.constexpr, IS_PERSISTENT: tl.constexpr):
    """Gradient of the policy's logits (before the temperature) of a range of the vocabulary."""
    num_row_tiles = tl.cdiv(num_rows, BM)
    for tile in tl.range(tl.program_id(0), num_row_tiles * tl.cdiv(num_columns, BN), tl.num_programs(0), flatten=IS_PERSISTENT):
        row, column = (tile % num_row_tiles) * BM, (tile // num_row_tiles) * BN
        products, ref_products = _both_products(hidden, weight, ref_hidden, ref_weight, row, column, num_rows, num_columns, width,
                                                stride_hidden, stride_weight, BM, BN, BK, IS_EVEN, USE_TMA)
        rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
        row_mask, rows = rows < num_rows, rows.to(tl.int64)
        z = products * scale
        p = tl.exp2(z - tl.load(lse + rows, mask=row_mask, other=0.0)[:, None])
        distance = z - ref_products * scale - tl.load(mean + rows, mask=row_mask, other=0.0)[:, None]
        factor = tl.load(grad_kl + rows, mask=row_mask, other=0.0) * (LN2 / temperature)
        tl.store(grad_logits + rows[:, None] * stride_grad + columns[None, :],
                 (factor[:, None] * p * distance).to(grad_logits.dtype.element_ty),
                 mask=row_mask[:, None] & (columns < num_columns)[None, :])


def _blocks_of(tensors: list[torch.Tensor]) -> dict:
    """Block sizes and options for the hidden states and heads of both."""
    hidden, width = tensors[0], tensors[0].shape[1]
    is_float32 = hidden.dtype == torch.float32 and is_gpu(hidden)
    blocks = dict(_FLOAT32_BLOCKS if is_float32 else _BLOCKS[gpu_family(hidden)].blocks)
    aligned = width * hidden.element_size() % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    blocks["USE_TMA"] = blocks["USE_TMA"] and aligned
    # a fused multiply-add would not round the logits as d has them
    return blocks | dict(IS_EVEN=width % blocks["BK"] == 0, enable_fp_fusion=False)


def _operands(hidden, weight, ref_hidden, ref_weight, blocks: dict) -> tuple:
    """All four as the kernels take them; None for the reference's head where it is the policy's."""
    ref_hidden, other = operands(ref_hidden, weight if ref_weight is None else ref_weight, blocks)
    return *operands(hidden, weight, blocks), ref_hidden, None if ref_weight is None else other


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, temperature, scratch_bytes):
        (num_tokens, width), vocab, scale = hidden.shape, weight.shape[0], math.log2(math.e) / temperature
        blocks = _blocks_of([tensor for tensor in (hidden, weight, ref_hidden, ref_weight) if tensor is not None])
        kl, lse, mean = (torch.empty(num_tokens, dtype=torch.float32, device=hidden.device) for _ in range(3))
        num_tiles = cdiv(vocab, blocks["BN"])
        rows = rows_of_chunks(num_tokens, 5 * 4 * num_tiles, scratch_bytes)
        for start in range(0, num_tokens, rows):
            part = slice(start, min(start + rows, num_tokens))
            states, ref_states = hidden[part], ref_hidden[part]
            sums = aligned_rows(5, len(states), num_tiles, dtype=torch.float32, device=hidden.device)
            launch(_kl_partials_kernel, grid_of(len(states), vocab, blocks, hidden),
                   *_operands(states, weight, ref_states, ref_weight, blocks), *sums, scale, len(states), vocab, width,
                   hidden.stride(0), weight.stride(0), **blocks)
            launch(_kl_reduce_kernel, (len(states),), *sums, kl[part], lse[part], mean[part], num_tiles,
                   TILES=triton.next_power_of_2(num_tiles), enable_fp_fusion=False)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, lse, mean)
        ctx.temperature, ctx.scratch_bytes = temperature, scratch_bytes
        return kl

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, ref_hidden, ref_weight, lse, mean = ctx.saved_tensors
        (num_tokens, width), grad, scale = hidden.shape, grad.contiguous(), math.log2(math.e) / ctx.temperature
        blocks = _blocks_of([tensor for tensor in (hidden, weight, ref_hidden, ref_weight) if tensor is not None])

        def differentiate(grad_logits, part, first):
            ref_part = None if ref_weight is None else ref_weight[first:first + part.shape[0]]
            launch(_kl_gradient_kernel, grid_of(num_tokens, part.shape[0], blocks, hidden),
                   *_operands(hidden, part, ref_hidden, ref_part, blocks), lse, mean, grad, grad_logits, scale, ctx.temperature,
                   num_tokens, part.shape[0], width, hidden.stride(0), weight.stride(0), grad_logits.stride(0), **blocks)

        grads = gradients_by_ranges(hidden, weight, ctx.needs_input_grad, differentiate, multiple=blocks["BN"],
                                    scratch_bytes=ctx.scratch_bytes)
        return *grads, None, None, None, None


def kl_divergence(hidden: torch.Tensor, weight: torch.Tensor, ref_hidden: torch.Tensor, ref_weight: torch.Tensor, *,
                  temperature: float, scratch_bytes: int = SCRATCH_BYTES) -> torch.Tensor:
    """KL(p || q) [N] fp32, nats, over the whole vocabulary at `temperature`, for hidden states [N, D] and heads [V, D] of the
    policy and of a reference. Differentiable by the policy's; the reference gets no gradient. ref_weight may be `weight` itself.
    scratch_bytes bounds the kernels' scratch on a GPU. Raises ValueError for dtypes and GPUs without a path, float16 among
    them: its gradients would underflow."""
    assert hidden.shape == ref_hidden.shape and weight.shape == ref_weight.shape, (
        hidden.shape, ref_hidden.shape, weight.shape, ref_weight.shape)
    if not is_triton(hidden):
        return _KlReference.apply(hidden, weight, ref_hidden.detach(), ref_weight.detach(), float(temperature))
    if weight.dtype == torch.float16:
        raise ValueError("kl_divergence: in float16 its gradient would underflow; use bfloat16 or float32")
    path_of(hidden, weight), path_of(ref_hidden, ref_weight)
    other = None if ref_weight is weight or ref_weight.data_ptr() == weight.data_ptr() else ref_weight.detach().contiguous()
    return _Kl.apply(hidden.contiguous(), weight.contiguous(), ref_hidden.detach().contiguous(), other, float(temperature),
                     scratch_bytes)
