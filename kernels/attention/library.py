"""Attention by the vendor's products, for GPUs whose tensor cores Triton does not drive: chunks of queries against the keys that
they see, and fp32 between the products.

Formula, gradients and prefixes are those of kernels/attention/packed.py. The backward computes a chunk's scores again, so scratch
does not grow with the length. A windowed chunk takes only keys in its window, so its cost grows linearly with the length. Chunks
run one after the other and add to the gradients of the keys in that order: two runs give the same bits. A query's bits may depend
on its chunk's shape, and so on its neighbours.

With top_i = max_j s_ij, p_ij = exp(s_ij - top_i) share_i and share_i = exp(top_i - lse_i). The forward computes it, without lse's
rounding, as sigmoid(l_i - sink) / sum_j exp(s_ij - top_i), l_i = top_i + log(sum_j exp(s_ij - top_i)). So the largest element
of a half-precision operand is 1, however large the sink is, and the share is applied in fp32. Gradients of scores are small: an
exact power of two moves them to the top of float16's range for the products.

Shapes: T packed tokens, Q queries (T, or the last of them), H query heads, K key-value heads, G = H / K, D head width, n queries
of a chunk, m keys that it sees.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from kernels.attention.plan import AttentionPlan
from kernels.dense import product

MAX_SCORES = 1 << 23  # scores of a chunk, in elements: about 200 MB with all tensors of that size
_MIN_CHUNK = 64  # queries of a windowed chunk, for windows too short to fill a product


class Chunk(NamedTuple):
    queries: slice  # rows of q
    keys: list[slice]  # rows of k and v, a part of the prefix and a part of the sequence, in order of position
    lead: int  # position of the first query minus position of the first key


def chunks(plan: AttentionPlan, num_heads: int, window: int) -> Iterator[Chunk]:
    """Covers every query of the packed sequences, in order."""
    for sequence, (start, end) in enumerate(plan.bounds):
        prefix = -1 if plan.prefixes is None else plan.prefixes[sequence]
        prefix_start, prefix_end = plan.bounds[prefix] if prefix != -1 else (start, start)
        prefix_len = prefix_end - prefix_start
        if window:
            size = max(window, _MIN_CHUNK)
            size = min(size, MAX_SCORES // (num_heads * (size + window)))
        else:
            size = MAX_SCORES // (num_heads * (prefix_len + end - start)) if end > start else 1
        for first in range(max(start, plan.first_query), end, max(size, 1)):
            last = min(first + max(size, 1), end)
            position = prefix_len + first - start
            seen = max(position - window + 1, 0) if window else 0  # position of the first key
            keys = [slice(prefix_start + seen, prefix_end)] if seen < prefix_len else []
            keys.append(slice(start + max(seen - prefix_len, 0), last))
            yield Chunk(slice(first - plan.first_query, last - plan.first_query), keys, position - seen)


def _by_key_head(x: torch.Tensor, num_kv: int) -> torch.Tensor:
    """Rows of all query heads [n, H, D] as [K, G * n, D]."""
    return x.unflatten(1, (num_kv, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_token(x: torch.Tensor, group: int) -> torch.Tensor:
    """[K, G * n, D] as [n, H, D]."""
    return x.unflatten(1, (group, -1)).permute(2, 0, 1, 3).flatten(1, 2)


def _rows(x: torch.Tensor, parts: list[slice]) -> torch.Tensor:
    """The rows of k or v that a chunk sees: [K, m, D]."""
    return (x[parts[0]] if len(parts) == 1 else torch.cat([x[part] for part in parts])).transpose(0, 1)


def _scores(q: torch.Tensor, k: torch.Tensor, lead: int, window: int, group: int, scale: float) -> torch.Tensor:
    """q [K, G * n, D] and k [K, m, D] -> [K, G, n, m] fp32, minus infinity where a query does not see the key."""
    scores = product(q, k.transpose(1, 2)).mul_(scale).unflatten(1, (group, -1))
    num_queries, num_keys = scores.shape[2:]
    distance = (torch.arange(num_queries, device=q.device).unsqueeze(1) + lead) - torch.arange(num_keys, device=q.device)
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    return scores.masked_fill_(hidden, float("-inf"))


def _centred(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | float]:
    """x [K, rows, columns] fp32 in `dtype`, times a power of two that prevents underflow in float16; and its inverse."""
    if dtype != torch.float16:
        return x.to(dtype), 1.0
    exponent = torch.frexp(x.abs().amax((1, 2), keepdim=True)).exponent
    shift = (12 - exponent).clamp(-100, 100)  # magnitudes below 2^12
    # from the bits of a float, which is exact; a library's exp2 need not be
    factor, undo = ((127 + sign * shift).int().bitwise_left_shift(23).view(torch.float32) for sign in (1, -1))
    return (x * factor).to(dtype), undo


def _add_rows(total: torch.Tensor, parts: list[slice], rows: torch.Tensor) -> None:
    """Adds rows [K, m, D] to the parts of total [T, K, D] that they belong to."""
    rows = rows.transpose(0, 1)
    for part, own in zip(parts, rows.split([part.stop - part.start for part in parts])):
        total[part] += own


def library_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, plan: AttentionPlan, *, window: int,
                    scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [Q, H, D] and lse [H, Q] fp32, nats, the sink included. No gradient."""
    (num_queries, num_heads, width), num_kv = q.shape, k.shape[1]
    group = num_heads // num_kv
    out = torch.empty((num_queries, num_heads, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_kv, group, num_queries), dtype=torch.float32, device=q.device)
    sink = sinks.float().view(num_kv, group, 1)
    for queries, keys, lead in chunks(plan, num_heads, window):
        weights = _scores(_by_key_head(q[queries], num_kv), _rows(k, keys), lead, window, group, scale)
        top = weights.amax(-1)  # [K, G, n]
        total = weights.sub_(top.unsqueeze(-1)).exp_().sum(-1)
        without_sink = top + total.log()
        lse[:, :, queries] = torch.logaddexp(without_sink, sink)
        share = torch.sigmoid(without_sink - sink) / total
        attended = product(weights.flatten(1, 2).to(v.dtype), _rows(v, keys)) * share.flatten(1).unsqueeze(-1)
        out[queries] = _by_token(attended, group)
    return out, lse.view(num_heads, num_queries)


def library_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, out: torch.Tensor,
                     lse: torch.Tensor, dout: torch.Tensor, plan: AttentionPlan, *, window: int, scale: float,
                     grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
                     ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, written into `grads` (any strides) if given, and the sinks' gradient [1, H] fp32."""
    num_heads, num_kv = q.shape[1], k.shape[1]
    group = num_heads // num_kv
    dq, dk_out, dv_out = grads or (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    dsinks = torch.zeros(num_kv, group, dtype=torch.float32, device=q.device)
    lse, sink = lse.view(num_kv, group, -1), sinks.float().view(num_kv, group, 1)
    for queries, keys, lead in chunks(plan, num_heads, window):
        q_rows, dout_rows = _by_key_head(q[queries], num_kv), _by_key_head(dout[queries], num_kv)
        k_rows, v_rows = _rows(k, keys), _rows(v, keys)
        chunk_lse = lse[:, :, queries]  # [K, G, n]
        delta = (dout_rows.float() * _by_key_head(out[queries], num_kv).float()).sum(-1, keepdim=True)  # [K, G * n, 1]
        dsinks -= ((sink - chunk_lse).exp_() * delta.view(num_kv, group, -1)).sum(-1)
        weights = _scores(q_rows, k_rows, lead, window, group, scale).flatten(1, 2)  # [K, G * n, m]
        top = weights.amax(-1, keepdim=True)
        share = (top - chunk_lse.flatten(1).unsqueeze(-1)).exp_()
        weights.sub_(top).exp_()
        shared, unit = _centred(dout_rows.float() * share, q.dtype)
        _add_rows(dv, keys, product(weights.to(v.dtype).transpose(1, 2), shared).mul_(unit))
        dscores = product(dout_rows, v_rows.transpose(1, 2)).sub_(delta).mul_(weights).mul_(share)
        dscores, unit = _centred(dscores, q.dtype)
        unit = unit * scale
        dq[queries] = _by_token(product(dscores, k_rows).mul_(unit), group)
        _add_rows(dk, keys, product(dscores.transpose(1, 2), q_rows).mul_(unit))
    return dq, dk_out.copy_(dk), dv_out.copy_(dv), dsinks.view(1, num_heads)
