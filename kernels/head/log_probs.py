"""Log-probability of chosen tokens and entropy of the whole distribution, from hidden states, without keeping logits.

z = W h / temperature; log p(y) = z_y - logsumexp_{i in kept} z_i; entropy = -sum_i p_i log p_i over the full vocabulary.
`kept` is the set that a sampling filter kept (empty: the whole vocabulary), so the trainer scores under the distribution that was
sampled from. Logits are fp32 sums inside the kernel and are not stored:
  dz_i += g_logp (1[i = y] - p_i^kept),  dz_i += -g_entropy p_i (log p_i + entropy).

With a frozen head the gradient of log p(y) is its factor times a direction known in the forward,
  dh = g_logp / temperature * ((1 - p_y) W_y - sum_{i != y} p_i W_i),
so the forward also computes that sum, from unnormalised probabilities in a bounded scratch, and the whole costs two matrix
products (logits, sum) instead of three. The chosen token is not in the sum: at p_y near 1 the two terms would cancel in bf16.
With a trainable head, or a loss that uses the entropy, the backward computes the logits again, one range of the vocabulary at a
time (four products, three with a frozen head).

The log-sum-exp is a reduction in two levels, tile by tile of the vocabulary (tiles.py).

A row's maximum is known only after all its tiles. So the probabilities in the scratch are relative to a power of two near the
chosen token's own probability, which a dot product finds first. Any reference near the maximum keeps all digits, since bf16 has
the exponents of fp32. A tile more than 2^MAX_EXCESS above it uses its own maximum, and the row is rescaled at the end.

Paths: "triton" computes logits in the kernel; "library" (kernels/device.py: product_path; and float16 everywhere) takes fp32
logits from torch.mm. Both compute the sum by torch.mm.

Shapes: N tokens, D model width, V vocabulary, n tokens of a chunk, C columns of a range of the vocabulary.
"""
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kernels.dense import linear
from kernels.device import is_triton, launch
from kernels.head.tiles import (
    LN2,
    MAX_EXCESS,
    add_up_tiles,
    grid_of,
    head_blocks,
    logits_tile,
    multiply,
    operands,
    part_of,
    path_of,
    score_tiles,
)

# most logits that the reference has in memory at once, in elements
MAX_LOGITS = 1 << 27
SCRATCH_BYTES = 600_000_000  # of the kernels' scratch: 1,408 tokens of gpt-oss in bf16


def head_logits_reference(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.dtype == torch.float32:
        return linear(hidden.float(), weight, None)
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)
    rows = 1 << 14  # of the head, of which an fp32 copy is made at a time
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
    """log p [n, V] of rows `part`, renormalised over each row's kept set; log_p itself without a filter."""
    if kept_ids is None:
        return log_p
    mask = _kept_mask(z, kept_ids, kept_offsets[part.start:part.start + z.shape[0] + 1])
    return torch.log_softmax(z.masked_fill(~mask, float("-inf")), dim=-1)


class _LogProbsReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, kept_ids, kept_offsets):
        chunk = max(1, MAX_LOGITS // weight.shape[0])
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            z = head_logits_reference(hidden[part], weight).div_(temperature)
            # rounds as the sampler does, which subtracts the maximum before the logarithm
            log_p = torch.log_softmax(z, dim=-1)
            kept_log_p = _kept_log_probs(z, log_p, kept_ids, kept_offsets, part)
            log_probs[part] = kept_log_p.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            entropy[part] = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, entropy, kept_ids, kept_offsets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # an output that no loss uses costs nothing
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
    """Marks kept columns of a zeroed scratch row with 1; all columns if the row has no filter."""
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
        distance = log2_p * LN2 + tl.load(entropy + rows, mask=row_mask, other=0.0)[:, None]
        grad -= factor * tl.exp2(log2_p) * distance
    if HAS_LOG_PROBS:
        factor = tl.load(grad_log_probs + rows, mask=row_mask, other=0.0)[:, None]
        target = tl.load(targets + rows, mask=row_mask, other=-1).to(tl.int32) - first_column
        p = tl.exp2(z - tl.load(kept_lse + rows, mask=row_mask, other=0.0)[:, None])
        if HAS_KEPT:
            p = tl.where(tl.load(at, mask=mask, other=0.0) > 0, p, 0.0)
        grad += factor * (tl.where(columns[None, :] == target[:, None], 1.0, 0.0) - p)
    tl.store(at, (grad / temperature).to(grad_logits.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _logits_gradient_kernel(hidden, weight, targets, lse, kept_lse, entropy, grad_log_probs, grad_entropy, grad_logits, scale,
                            temperature, first_column, num_rows, num_columns, width, stride_hidden, stride_weight,
                            stride_grad, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr,
                            IS_EVEN: tl.constexpr, USE_TMA: tl.constexpr, IS_PERSISTENT: tl.constexpr,
                            HAS_KEPT: tl.constexpr, HAS_LOG_PROBS: tl.constexpr, HAS_ENTROPY: tl.constexpr):
    """Gradient of the logits (before the temperature) of a range of the vocabulary; it replaces the marks of kept columns."""
    num_row_tiles = tl.cdiv(num_rows, BM)
    num_tiles = num_row_tiles * tl.cdiv(num_columns, BN)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_PERSISTENT):
        row, column = (tile % num_row_tiles) * BM, (tile // num_row_tiles) * BN
        products = logits_tile(hidden, weight, row, column, num_rows, num_columns, width, stride_hidden, stride_weight,
                                BM, BN, BK, IS_EVEN, USE_TMA)
        rows = row + tl.arange(0, BM)
        row_mask, rows = rows < num_rows, rows.to(tl.int64)
        for part in tl.static_range(BN // TILE):
            _differentiate_tile(part_of(products, part, TILE), rows, row_mask, column + part * TILE, targets, lse, kept_lse,
                                entropy, grad_log_probs, grad_entropy, grad_logits, scale, temperature, first_column,
                                num_columns, stride_grad, HAS_KEPT, HAS_LOG_PROBS, HAS_ENTROPY)


def rows_of_chunks(num_tokens: int, row_bytes: int, scratch_bytes: int) -> int:
    """The number of tokens in a chunk: as many as fit, in whole tiles of 128."""
    rows = scratch_bytes // row_bytes if row_bytes else 1 << 14
    return max(1, min(num_tokens, rows - rows % 128 if rows > 128 else rows))


def _mark_kept(scratch: torch.Tensor, kept_ids: torch.Tensor, kept_offsets: torch.Tensor, first_column: int) -> None:
    """Sets scratch [n, C] to 1 at the kept ids among the columns from first_column on, to 0 elsewhere."""
    scratch.zero_()
    launch(_kept_kernel, (scratch.shape[0],), kept_ids, kept_offsets, scratch, scratch.shape[1], first_column, scratch.stride(0),
           BLOCK=1024)


def _score_chunk(hidden, weight, targets, temperature, kept, scratch, logits, outputs, makes_sum) -> None:
    """Fills `outputs` (log_probs, entropy, lse, kept_lse, target_factor, sum_factor: [n] each) for the tokens of one chunk.
    With makes_sum, scratch [n, V] gets the other tokens' probabilities; logits [n, V] fp32 is scratch for the "library" path."""
    has_kept, scale, (num_rows, width) = kept is not None, math.log2(math.e) / temperature, hidden.shape
    blocks, reference = head_blocks(hidden, weight, small_parts=has_kept), None
    if has_kept:
        _mark_kept(scratch, *kept, 0)
    if makes_sum:
        reference = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
        launch(_reference_kernel, (num_rows,), hidden, weight, targets, reference, scale, width, hidden.stride(0),
               weight.stride(0), BLOCK=triton.next_power_of_2(width), num_warps=8)
    if logits is not None:
        multiply(hidden, weight.T, logits)
    sums = score_tiles(hidden, weight, targets, reference, scratch, logits, blocks=blocks, scale=scale, has_kept=has_kept,
                       stores=makes_sum, keeps_logits=False)
    add_up_tiles(targets, reference, sums, scratch, outputs, vocab=weight.shape[0], tile=blocks["TILE"],
                 max_excess=MAX_EXCESS[weight.dtype], has_kept=has_kept, stores=makes_sum)


def gradients_by_ranges(hidden: torch.Tensor, weight: torch.Tensor, needs_grad: tuple[bool, ...], differentiate: Callable, *,
                        multiple: int, scratch_bytes: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the hidden states [N, D] and of the head [V, D], each where needs_grad asks for it, from those of the logits:
    one range of the vocabulary at a time, a multiple of `multiple` columns. differentiate(grad_logits [N, C], head [C, D], first)
    writes them for the columns from `first` on. Only the gradient of the hidden states is summed over ranges: a range gives its
    rows of the head's gradient completely."""
    (num_tokens, width), vocab = hidden.shape, weight.shape[0]
    needs_hidden, needs_weight = needs_grad[:2]
    grad_hidden = torch.zeros(num_tokens, width, dtype=torch.float32, device=hidden.device) if needs_hidden else None
    grad_weight = torch.zeros_like(weight) if needs_weight else None
    columns = scratch_bytes // (max(num_tokens, 1) * weight.element_size())
    columns = min(vocab, max(columns - columns % multiple, multiple))
    scratch = torch.empty(num_tokens, columns, dtype=weight.dtype, device=hidden.device)
    for first in range(0, vocab if num_tokens else 0, columns):
        part = weight[first:first + columns]
        grad_logits = scratch[:, :part.shape[0]]
        differentiate(grad_logits, part, first)
        if needs_hidden:
            grad_hidden += grad_logits @ part
        if needs_weight:
            torch.mm(grad_logits.T, hidden, out=grad_weight[first:first + columns])
    return grad_hidden if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def _recompute_gradients(ctx, grad_log_probs, grad_entropy) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the hidden states and of the head, from logits computed again."""
    hidden, weight, targets, kept_ids, kept_offsets, _, entropy, lse, kept_lse, _, _ = ctx.saved_tensors
    if weight.dtype == torch.float16:
        raise ValueError("log_probs: in float16 the gradients of the entropy and of the head would underflow; "
                         "use bfloat16 or float32")
    num_tokens, width = hidden.shape
    grads = [None if grad is None else grad.contiguous() for grad in (grad_log_probs, grad_entropy)]
    if grads == [None, None]:
        return tuple(torch.zeros_like(tensor) if needs else None for tensor, needs in zip((hidden, weight), ctx.needs_input_grad))
    blocks, has_kept = head_blocks(hidden, weight, small_parts=True), kept_ids is not None and grads[0] is not None

    def differentiate(grad_logits: torch.Tensor, part: torch.Tensor, first: int) -> None:
        if has_kept:
            _mark_kept(grad_logits, kept_ids, kept_offsets, first)
        launch(
            _logits_gradient_kernel, grid_of(num_tokens, part.shape[0], blocks, hidden),
            *operands(hidden, part, blocks), targets, lse, kept_lse, entropy, *grads, grad_logits,
            math.log2(math.e) / ctx.temperature, ctx.temperature, first, num_tokens, part.shape[0], width, hidden.stride(0),
            weight.stride(0), grad_logits.stride(0), HAS_KEPT=has_kept, HAS_LOG_PROBS=grads[0] is not None,
            HAS_ENTROPY=grads[1] is not None, **blocks)

    return gradients_by_ranges(hidden, weight, ctx.needs_input_grad, differentiate, multiple=blocks["BN"],
                               scratch_bytes=ctx.scratch_bytes)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, kept_ids, kept_offsets, makes_sum, scratch_bytes):
        path, has_kept, (num_tokens, width), vocab = path_of(hidden, weight), kept_ids is not None, hidden.shape, weight.shape[0]
        # log_probs, entropy, lse, kept_lse (both base 2), target_factor, sum_factor
        outputs = [torch.empty(num_tokens, dtype=torch.float32, device=hidden.device) for _ in range(6)]
        sum_dtype = torch.float32 if path == "library" else weight.dtype  # float16 might overflow
        weighted_sum = torch.empty(num_tokens if makes_sum else 0, width, dtype=sum_dtype, device=hidden.device)
        has_scratch, has_logits = makes_sum or has_kept, path == "library"
        rows = rows_of_chunks(num_tokens, vocab * (weight.element_size() * has_scratch + 4 * has_logits), scratch_bytes)
        scratch = torch.empty(rows, vocab, dtype=weight.dtype, device=hidden.device) if has_scratch else None
        logits = torch.empty(rows, vocab, dtype=torch.float32, device=hidden.device) if has_logits else None
        for start in range(0, num_tokens, rows):
            part = slice(start, min(start + rows, num_tokens))
            room, chunk_logits = (None if tensor is None else tensor[:part.stop - start] for tensor in (scratch, logits))
            kept = (kept_ids, kept_offsets[start:part.stop + 1]) if has_kept else None
            _score_chunk(hidden[part], weight, targets[part], temperature, kept, room, chunk_logits,
                         [output[part] for output in outputs], makes_sum)
            if makes_sum:
                multiply(room, weight, weighted_sum[part])
        ctx.save_for_backward(hidden, weight, targets, kept_ids, kept_offsets, weighted_sum, *outputs[1:])
        ctx.temperature, ctx.makes_sum, ctx.scratch_bytes = temperature, makes_sum, scratch_bytes
        ctx.set_materialize_grads(False)  # an output that no loss uses costs nothing
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

    has_entropy_loss: the backward will need the entropy's gradient, so the forward leaves out the product that only the
    log-probs' gradient needs; without it the entropy's gradient is right, too, only slower. scratch_bytes bounds the kernels'
    scratch on a GPU, where a target outside the vocabulary gives an undefined result. Raises ValueError for dtypes and GPUs
    without a path."""
    if not is_triton(hidden):
        return _LogProbsReference.apply(hidden, weight, targets, temperature, kept_ids, kept_offsets)
    makes_sum = torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad and not has_entropy_loss
    return _LogProbs.apply(hidden.contiguous(), weight.contiguous(), targets.contiguous(), float(temperature), kept_ids,
                           kept_offsets, makes_sum, scratch_bytes)
