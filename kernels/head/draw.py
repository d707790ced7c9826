"""Hidden states to logits, and to drawn tokens and their log-probs in one pass over the head.

draw() runs the kernel of log_probs.py, which here leaves the logits beside its partial sums; tokens are drawn from them
(sampling.py), and the same reduction as in training makes the log-probs: equal hidden states give equal bits in both.
head_logits() is for what needs nothing but logits. Both form them tile by tile as training does.

Shapes: B rows, D model width, V vocabulary.
"""
import math

import torch
import triton
import triton.language as tl

from kernels.device import cdiv, is_triton, launch
from kernels.head.log_probs import (
    _blocks,
    _check,
    _grid,
    _halves,
    _logits_tile,
    _mm,
    _operands,
    _partials_kernel,
    _reduce_kernel,
    _store_tile,
    head_logits_reference,
    log_probs,
)
from kernels.head.sampling import draw_tokens


@triton.jit
def _logits_kernel(hidden, weight, logits, num_rows, num_columns, width, stride_hidden, stride_weight, stride_logits,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr, IS_EVEN: tl.constexpr,
                   USE_TMA: tl.constexpr, IS_PERSISTENT: tl.constexpr):
    num_row_tiles = tl.cdiv(num_rows, BM)
    num_tiles = num_row_tiles * tl.cdiv(num_columns, BN)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_PERSISTENT):
        row, column = (tile % num_row_tiles) * BM, (tile // num_row_tiles) * BN
        products = _logits_tile(hidden, weight, row, column, num_rows, num_columns, width, stride_hidden, stride_weight,
                                BM, BN, BK, IS_EVEN, USE_TMA)
        rows = row + tl.arange(0, BM)
        row_mask, rows = rows < num_rows, rows.to(tl.int64)
        if BN == TILE:
            _store_tile(products, logits, rows, row_mask, column, num_columns, stride_logits)
        else:
            left, right = _halves(products)
            _store_tile(left, logits, rows, row_mask, column, num_columns, stride_logits)
            _store_tile(right, logits, rows, row_mask, column + TILE, num_columns, stride_logits)


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [N, D], weight [V, D] -> logits [N, V] fp32, with fp32 products and sums; no gradient."""
    if not is_triton(hidden):
        return head_logits_reference(hidden, weight)
    path, hidden, weight = _check(hidden, weight), hidden.detach().contiguous(), weight.detach().contiguous()
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)
    if path == "library":
        _mm(hidden, weight.T, logits)
    elif hidden.shape[0] > 0:
        blocks = _blocks(hidden, weight, fits_rows=True)
        launch(
            _logits_kernel, _grid(*logits.shape, blocks, hidden), *_operands(hidden, weight, blocks), logits, *logits.shape,
            hidden.shape[1], hidden.stride(0), weight.stride(0), logits.stride(0), **blocks)
    return logits


def _choose(logits: torch.Tensor, words: torch.Tensor | None, temperature: float) -> torch.Tensor:
    if words is None:
        return logits.argmax(dim=-1)  # of equal ones the lowest id
    return draw_tokens(logits, words, temperature=temperature)


def draw(hidden: torch.Tensor, weight: torch.Tensor, words: torch.Tensor | None, *,
         temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] int64 drawn from softmax(W h / temperature) for hidden [B, D] and the head's weight [V, D] by the noise of words
    [B, 2] int32 (sampling.py), the most likely ones without it, and their log-probs [B] fp32, nats. Nothing waits for the host.
    No gradient. Raises what draw_tokens and log_probs raise."""
    hidden, weight, num_rows, vocab = hidden.detach(), weight.detach(), len(hidden), weight.shape[0]
    if not is_triton(hidden) or _check(hidden, weight) == "library" or num_rows == 0:
        tokens = _choose(head_logits(hidden, weight), words, temperature)
        return tokens, log_probs(hidden, weight, tokens, temperature=temperature)[0]
    hidden, weight = hidden.contiguous(), weight.contiguous()
    blocks, scale = _blocks(hidden, weight), math.log2(math.e) / temperature
    num_tiles = cdiv(vocab, blocks["TILE"])
    logits = torch.empty(num_rows, vocab, dtype=torch.float32, device=hidden.device)
    maxima, sums, dots = torch.empty(3, num_rows, num_tiles, dtype=torch.float32, device=hidden.device)
    outputs = torch.empty(6, num_rows, dtype=torch.float32, device=hidden.device)  # as _score_chunk has them
    chosen = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    nothing = torch.zeros(num_rows, dtype=torch.int64, device=hidden.device)  # tokens, before they are drawn
    launch(_partials_kernel, _grid(num_rows, vocab, blocks, hidden), *_operands(hidden, weight, blocks), logits, nothing, chosen,
           maxima, sums, dots, maxima, sums, chosen, chosen, None, scale, 0.0, num_rows, vocab, hidden.shape[1], hidden.stride(0),
           weight.stride(0), logits.stride(0), 0, HAS_LOGITS=False, HAS_KEPT=False, STORES=False, KEEPS_LOGITS=True, **blocks)
    tokens = _choose(logits, words, temperature)
    chosen = logits.gather(1, tokens[:, None]).squeeze(1) * scale
    launch(_reduce_kernel, (num_rows,), tokens, chosen, maxima, sums, dots, maxima, sums, chosen, chosen, None, *outputs, 0.0,
           vocab, num_tiles, 0, TILE=blocks["TILE"], TILES=triton.next_power_of_2(num_tiles), BLOCK=1024, HAS_KEPT=False,
           STORES=False)
    return tokens, outputs[0]
