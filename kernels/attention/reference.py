"""The definition of packed.py in plain PyTorch: what the CPU runs, and what tests compare the kernels with.

Shapes: as in packed.py; S sequences, L their tokens.
"""
import torch
import torch.nn.functional as F

# scores held at once, in elements
_MAX_SCORES = 1 << 26


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, visible: torch.Tensor,
           scale: float) -> torch.Tensor:
    """q [S, Lq, H, D], k and v [S, Lk, K, D], visible [Lq, Lk] bool or [S, 1, 1, Lk] -> [S, Lq, H, D].

    Scores are fp32; softmax and weighted sum have twice the digits of q's dtype. With only fp32, sums would depend on the
    number of keys in a tensor, and log-probs of sampler and trainer would differ. For the same reason queries and keys are
    padded for their product: libraries sum the last odd rows and columns in another order."""
    num_seqs, q_len, num_heads, width = q.shape
    precision = torch.float64 if q.dtype == torch.float32 else torch.float32
    num_kv = k.shape[2]
    group = num_heads // num_kv
    q = q.float().transpose(1, 2).reshape(num_seqs, num_kv, group * q_len, width)
    k, v = k.float().transpose(1, 2), v.float().transpose(1, 2)  # [S, K, Lk, D]
    num_rows, num_keys = group * q_len, k.shape[2]
    products = F.pad(q, (0, 0, 0, max(0, 8 - num_rows))) @ F.pad(k, (0, 0, 0, -num_keys % 16)).transpose(-1, -2)
    scores = (products[:, :, :num_rows, :num_keys] * scale).reshape(num_seqs, num_kv, group, q_len, num_keys)
    scores = scores.masked_fill(~visible, float("-inf"))
    sink = sinks.float().view(num_kv, group, 1, 1).expand(num_seqs, -1, -1, q_len, 1)
    # the sink as one more column, so that rounding follows the definition
    probabilities = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1, dtype=precision)[..., :-1]
    out = probabilities.reshape(num_seqs, num_kv, group * q_len, -1) @ v.to(precision)  # [S, K, G * Lq, D]
    return out.view(num_seqs, num_heads, q_len, width).transpose(1, 2)


def _long_sequence(q, k, v, sinks, window, scale):
    """One sequence [L, heads, D] in chunks of queries; a windowed chunk reads only the keys it can see."""
    length = q.shape[0]
    # a chunk sees window - 1 keys before its own: chunks much longer than the window would score mostly hidden pairs
    chunk = min(length, max(window, 128)) if window else length
    chunk = max(1, min(chunk, _MAX_SCORES // (q.shape[1] * (min(length, chunk + window) if window else length))))
    outputs = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        first = max(0, start - window + 1) if window else 0
        distance = (torch.arange(start, end, device=q.device).unsqueeze(1)
                    - torch.arange(first, end, device=q.device).unsqueeze(0))  # i - j
        visible = (distance >= 0) & (distance < window) if window else distance >= 0
        outputs.append(attend(q[None, start:end], k[None, first:end], v[None, first:end], sinks, visible, scale)[0])
    return torch.cat(outputs)


def _continued(cu_seqlens, prefixes):
    """Row numbers that put each sequence's prefix before it, the new bounds, and the new indices of the packed rows."""
    rows, bounds, own = [], [0], []
    for start, end, prefix in zip(cu_seqlens, cu_seqlens[1:], prefixes):
        prefix_rows = range(cu_seqlens[prefix], cu_seqlens[prefix + 1]) if prefix != -1 else range(0)
        own += range(len(rows) + len(prefix_rows), len(rows) + len(prefix_rows) + end - start)
        rows += [*prefix_rows, *range(start, end)]
        bounds.append(len(rows))
    return rows, bounds, own


def attention_reference(q, k, v, sinks, cu_seqlens, window, scale, prefixes=None, first_query=0):
    if first_query:
        # rows without queries get one whose output is dropped
        q = F.pad(q, (0, 0, 0, 0, first_query, 0))
        return attention_reference(q, k, v, sinks, cu_seqlens, window, scale, prefixes)[first_query:]
    if prefixes is not None:
        rows, bounds, own = _continued(cu_seqlens, prefixes)
        return attention_reference(q[rows], k[rows], v[rows], sinks, bounds, window, scale)[own]
    num_heads, outputs = q.shape[1], []
    bounds = list(zip(cu_seqlens, cu_seqlens[1:]))
    while bounds:
        # as many neighbouring sequences as fit are padded to one length
        longest, count = 0, 0
        for start, end in bounds:
            padded = max(longest, end - start)
            if count and padded * padded * (count + 1) * num_heads > _MAX_SCORES:
                break
            longest, count = padded, count + 1
        group, bounds = bounds[:count], bounds[count:]
        if count == 1:
            start, end = group[0]
            outputs.append(_long_sequence(q[start:end], k[start:end], v[start:end], sinks, window, scale))
            continue
        column = torch.arange(longest).unsqueeze(0)  # [1, L]
        starts, ends = torch.tensor(group).unsqueeze(-1).unbind(1)  # [S, 1] each
        index = torch.minimum(starts + column, ends - 1).to(q.device)  # [S, L]; padding repeats the last token
        distance = column.T - column
        visible = ((distance >= 0) & (distance < window) if window else distance >= 0).to(q.device)
        padded = attend(q[index], k[index], v[index], sinks, visible, scale)  # [S, L, H, D]
        outputs.append(padded[(column < ends - starts).to(q.device)])
    return torch.cat(outputs).to(q.dtype)
