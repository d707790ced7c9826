"""Hidden states to drawn tokens and their log-probs, in one pass over the head.

The logits' kernel is that of log_probs.py, which here leaves the logits beside its partial sums; tokens are drawn from them
(sampling.py), and the same reduction as in training makes the log-probs: equal hidden states give equal bits in both.

Shapes: B rows, D model width, V vocabulary.
"""
import math

import torch
import triton

from kernels.launch import cdiv, is_triton, launch
from kernels.log_probs import (
    _blocks,
    _check,
    _grid,
    _operands,
    _partials_kernel,
    _reduce_kernel,
    head_logits,
    log_probs,
)
from kernels.sampling import draw_tokens


def draw(hidden: torch.Tensor, weight: torch.Tensor, words: torch.Tensor, *,
         temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] int64 drawn from softmax(W h / temperature) for hidden [B, D] and the head's weight [V, D] by the noise of words
    [B, 2] int32 (sampling.py), and their log-probs [B] fp32, nats. Nothing waits for the host. No gradient. Raises what
    draw_tokens and log_probs raise."""
    hidden, weight, num_rows, vocab = hidden.detach(), weight.detach(), len(hidden), weight.shape[0]
    if not is_triton(hidden) or _check(hidden, weight) == "library" or num_rows == 0:
        tokens = draw_tokens(head_logits(hidden, weight), words, temperature=temperature)
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
    tokens = draw_tokens(logits, words, temperature=temperature)
    chosen = logits.gather(1, tokens[:, None]).squeeze(1) * scale
    launch(_reduce_kernel, (num_rows,), tokens, chosen, maxima, sums, dots, maxima, sums, chosen, chosen, None, *outputs, 0.0,
           vocab, num_tiles, 0, TILE=blocks["TILE"], TILES=triton.next_power_of_2(num_tiles), BLOCK=1024, HAS_KEPT=False,
           STORES=False)
    return tokens, outputs[0]
