"""Hidden states to logits, and to drawn tokens and their log-probs in one pass over the head.

draw() keeps the logits beside the tiles' sums (tiles.py), draws tokens from them (sampling.py), and computes log-probs by the
same reduction as training: equal hidden states give equal bits in both. It serves draws on a GPU from the whole vocabulary;
filters, and the CPU's rollouts, use head_logits() and grpo/rollout/sampling.py.

Shapes: B rows, D model width, V vocabulary.
"""
import math

import torch
import triton
import triton.language as tl

from kernels.device import aligned_rows, is_triton, launch
from kernels.head.log_probs import head_logits_reference, log_probs
from kernels.head.sampling import draw_tokens
from kernels.head.tiles import (
    add_up_tiles,
    grid_of,
    head_blocks,
    logits_tile,
    multiply,
    operands,
    part_of,
    path_of,
    score_tiles,
    store_tile,
)


@triton.jit(do_not_specialize=["num_rows"])
def _logits_kernel(hidden, weight, logits, num_rows, num_columns, width, stride_hidden, stride_weight, stride_logits,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr, IS_EVEN: tl.constexpr,
                   USE_TMA: tl.constexpr, IS_PERSISTENT: tl.constexpr):
    num_row_tiles = tl.cdiv(num_rows, BM)
    num_tiles = num_row_tiles * tl.cdiv(num_columns, BN)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=IS_PERSISTENT):
        row, column = (tile % num_row_tiles) * BM, (tile // num_row_tiles) * BN
        products = logits_tile(hidden, weight, row, column, num_rows, num_columns, width, stride_hidden, stride_weight,
                                BM, BN, BK, IS_EVEN, USE_TMA)
        rows = row + tl.arange(0, BM)
        row_mask, rows = rows < num_rows, rows.to(tl.int64)
        for part in tl.static_range(BN // TILE):
            store_tile(part_of(products, part, TILE), logits, rows, row_mask, column + part * TILE, num_columns, stride_logits)


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [N, D], weight [V, D] -> logits [N, V] fp32, with fp32 products and sums; no gradient."""
    if not is_triton(hidden):
        return head_logits_reference(hidden, weight)
    path, hidden, weight = path_of(hidden, weight), hidden.detach().contiguous(), weight.detach().contiguous()
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device=hidden.device)
    if path == "library":
        multiply(hidden, weight.T, logits)
    elif hidden.shape[0] > 0:
        blocks = head_blocks(hidden, weight, fits_rows=True)
        launch(
            _logits_kernel, grid_of(*logits.shape, blocks, hidden), *operands(hidden, weight, blocks), logits, *logits.shape,
            hidden.shape[1], hidden.stride(0), weight.stride(0), logits.stride(0), **blocks)
    return logits


def _choose(logits: torch.Tensor, rng_keys: torch.Tensor | None, temperature: float) -> torch.Tensor:
    if rng_keys is None:
        return logits.argmax(dim=-1)  # the lowest id among equals
    return draw_tokens(logits, rng_keys, temperature=temperature)


def draw(hidden: torch.Tensor, weight: torch.Tensor, rng_keys: torch.Tensor | None, *,
         temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] int64 drawn from softmax(W h / temperature), and their log-probs [B] fp32, nats, for hidden [B, D] and the
    head's weight [V, D]. rng_keys [B, 2] int32 give the noise (sampling.py); None: the most likely tokens. Nothing waits for
    the host. No gradient. Raises what draw_tokens and log_probs raise."""
    hidden, weight, num_rows, vocab = hidden.detach(), weight.detach(), len(hidden), weight.shape[0]
    if not is_triton(hidden) or path_of(hidden, weight) == "library" or num_rows == 0:
        tokens = _choose(head_logits(hidden, weight), rng_keys, temperature)
        return tokens, log_probs(hidden, weight, tokens, temperature=temperature)[0]
    hidden, weight = hidden.contiguous(), weight.contiguous()
    blocks, scale = head_blocks(hidden, weight, draws=True), math.log2(math.e) / temperature
    logits = torch.empty(num_rows, vocab, dtype=torch.float32, device=hidden.device)
    undrawn = torch.zeros(num_rows, dtype=torch.int64, device=hidden.device)
    settings = {"has_kept": False, "stores": False}
    sums = score_tiles(hidden, weight, undrawn, None, None, logits, blocks=blocks, scale=scale, keeps_logits=True, **settings)
    tokens = _choose(logits, rng_keys, temperature)
    sums = sums._replace(target_logits=logits.gather(1, tokens[:, None]).squeeze(1) * scale)
    outputs = aligned_rows(6, num_rows, dtype=torch.float32, device=hidden.device)  # log-probs first
    add_up_tiles(tokens, None, sums, None, list(outputs), vocab=vocab, tile=blocks["TILE"], max_excess=0.0, **settings)
    return tokens, outputs[0]
