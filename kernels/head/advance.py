"""From drawn tokens to the state of the next decode step, without the host.

A live row stores the drawn token, takes it as its newest token, and gets the RNG key of the next draw (sampling.py). It ends with
a stop id or at its limit, and is then idle, at position -1: neither this kernel nor a decode step writes anything for it, and its
`num_new` and `is_stopped` stay as they are.

Shapes: B rows.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.device import cdiv, is_triton, launch
from kernels.head.sampling import POSITION_MULTIPLIER, mix_sum, mix_sums, signed

IDLE = -1  # position of a row that is empty or has ended
_BLOCK = 128


class Rows(NamedTuple):
    """Each [B] int64, with unit stride."""

    tokens: torch.Tensor  # the newest token, not yet in the cache
    positions: torch.Tensor  # of that token in its sequence, or IDLE
    num_new: torch.Tensor  # tokens after the prompt
    is_stopped: torch.Tensor  # 1 if a stop id has ended the row
    slots: torch.Tensor  # of the cache
    prompt_lens: torch.Tensor  # tokens
    limits: torch.Tensor  # most tokens after the prompt
    places: torch.Tensor  # index of the first token after the prompt in the output buffers
    key_sums: torch.Tensor  # of all parts of the RNG key except the position (sampling.py)
    rng_keys: torch.Tensor  # of the next draw
    items: torch.Tensor  # the caller's name of the row


def next_rng_keys(key_sums: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RNG keys [B] int64 of draws after `positions` [B]."""
    return mix_sums(key_sums + (positions + 1) * signed(POSITION_MULTIPLIER.value, 64))


def advance_reference(rows, tokens, log_probs, all_tokens, all_log_probs, stop_ids):
    live = (rows.positions >= 0).nonzero().squeeze(1)
    drawn, num_new = tokens[live], rows.num_new[live]
    places = rows.places[live] + num_new
    all_tokens[places], all_log_probs[places] = drawn, log_probs[live]
    is_stopped = (drawn.unsqueeze(1) == stop_ids).any(dim=1)
    is_finished = is_stopped | (num_new + 1 >= rows.limits[live])
    positions = rows.positions[live] + 1
    rows.tokens[live], rows.num_new[live], rows.is_stopped[live] = drawn, num_new + 1, is_stopped.long()
    rows.rng_keys[live] = next_rng_keys(rows.key_sums[live], positions)
    rows.positions[live] = positions.masked_fill(is_finished, IDLE)


@triton.jit(do_not_specialize=["num_stop_ids", "num_rows"])
def _advance_kernel(tokens_ptr, positions_ptr, num_new_ptr, is_stopped_ptr, limits_ptr, places_ptr, key_sums_ptr, rng_keys_ptr,
                    drawn_ptr, log_probs_ptr, all_tokens_ptr, all_log_probs_ptr, stop_ids_ptr, num_stop_ids, num_rows,
                    BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions_ptr + row, mask=row < num_rows, other=-1)
    is_live = position >= 0
    drawn = tl.load(drawn_ptr + row, mask=is_live, other=0)
    num_new = tl.load(num_new_ptr + row, mask=is_live, other=0)
    place = tl.load(places_ptr + row, mask=is_live, other=0) + num_new
    tl.store(all_tokens_ptr + place, drawn, mask=is_live)
    tl.store(all_log_probs_ptr + place, tl.load(log_probs_ptr + row, mask=is_live, other=0.0), mask=is_live)
    is_stopped = tl.zeros([BLOCK], tl.int64)
    for index in range(num_stop_ids):
        is_stopped = tl.where(drawn == tl.load(stop_ids_ptr + index), 1, is_stopped)
    num_new += 1
    position += 1
    is_finished = (is_stopped != 0) | (num_new >= tl.load(limits_ptr + row, mask=is_live, other=0))
    tl.store(tokens_ptr + row, drawn, mask=is_live)
    tl.store(num_new_ptr + row, num_new, mask=is_live)
    tl.store(is_stopped_ptr + row, is_stopped, mask=is_live)
    tl.store(positions_ptr + row, tl.where(is_finished, -1, position), mask=is_live)
    key_sum = tl.load(key_sums_ptr + row, mask=is_live, other=0).to(tl.uint64, bitcast=True)
    rng_key = mix_sum(key_sum + (position + 1).to(tl.uint64, bitcast=True) * POSITION_MULTIPLIER)
    tl.store(rng_keys_ptr + row, rng_key.to(tl.int64, bitcast=True), mask=is_live)


def advance(rows: Rows, tokens: torch.Tensor, log_probs: torch.Tensor, *, all_tokens: torch.Tensor, all_log_probs: torch.Tensor,
            stop_ids: torch.Tensor) -> None:
    """Updates rows [B] with the tokens [B] int64 and log_probs [B] fp32 that they drew, after their newest tokens were fed to the
    model.

    Both are stored in all_tokens int64 and all_log_probs fp32, one-dimensional, at `places + num_new`; no two live rows may write
    to one index. stop_ids [n] int64. A row that continues has the next position, the drawn token as its newest, and the RNG key
    of the next draw. Waits for nothing; a CUDA graph can capture it."""
    shapes = {name: (tensor.shape, tensor.dtype, tensor.stride()) for name, tensor in rows._asdict().items()}
    assert set(shapes.values()) == {(tokens.shape, torch.int64, (1,))}, (shapes, tokens.shape)
    assert tokens.dtype == all_tokens.dtype == stop_ids.dtype == torch.int64, (tokens.dtype, all_tokens.dtype, stop_ids.dtype)
    assert log_probs.dtype == all_log_probs.dtype == torch.float32, (log_probs.dtype, all_log_probs.dtype)
    assert log_probs.shape == tokens.shape, (log_probs.shape, tokens.shape)
    if not is_triton(tokens):
        advance_reference(rows, tokens, log_probs, all_tokens, all_log_probs, stop_ids)
        return
    if len(tokens):
        launch(_advance_kernel, (cdiv(len(tokens), _BLOCK),), rows.tokens, rows.positions, rows.num_new, rows.is_stopped,
               rows.limits, rows.places, rows.key_sums, rows.rng_keys, tokens.contiguous(), log_probs.contiguous(), all_tokens,
               all_log_probs, stop_ids, len(stop_ids), len(tokens), BLOCK=_BLOCK, num_warps=4)
