"""Causal attention of packed sequences with a learned sink per head, an optional sliding window and grouped queries.

p_ij = exp(s_ij - m) / (sum_j exp(s_ij - m) + exp(sink_h - m)) for the visible j, s_ij = scale * q_i . k_j: the sink takes
probability and gives no value (openai/gpt-oss, gpt_oss/torch/model.py: sdpa). Equivalently the plain attention output times
sigmoid(lse - sink). With a window W, i sees j iff 0 <= i - j < W: W keys, its own included.

Shapes: T packed tokens, H query heads, K key-value heads, D head width; query head h reads key-value head h // (H / K).
"""
import torch

# scores held at once by the reference, in elements
_MAX_SCORES = 1 << 26


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, visible: torch.Tensor,
            scale: float) -> torch.Tensor:
    """q [S, Lq, H, D], k and v [S, Lk, K, D], visible [Lq, Lk] bool or [S, 1, 1, Lk] -> [S, Lq, H, D].

    Scores are fp32; softmax and weighted sum have twice the digits of q's dtype. With fp32 in both, the number of keys
    in a tensor would show in the sums, and log-probs of sampler and trainer would drift apart."""
    num_seqs, q_len, num_heads, width = q.shape
    precision = torch.float64 if q.dtype == torch.float32 else torch.float32
    num_kv = k.shape[2]
    group = num_heads // num_kv
    q = q.float().transpose(1, 2).reshape(num_seqs, num_kv, group * q_len, width)
    k, v = k.float().transpose(1, 2), v.float().transpose(1, 2)  # [S, K, Lk, D]
    scores = (q @ k.transpose(-1, -2) * scale).view(num_seqs, num_kv, group, q_len, -1)
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
        outputs.append(_attend(q[None, start:end], k[None, first:end], v[None, first:end], sinks, visible, scale)[0])
    return torch.cat(outputs)


def attention_reference(q, k, v, sinks, cu_seqlens, window, scale):
    num_heads, outputs = q.shape[1], []
    bounds = list(zip(cu_seqlens, cu_seqlens[1:]))
    while bounds:
        # neighbouring sequences are padded to one length as long as their scores fit
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
        padded = _attend(q[index], k[index], v[index], sinks, visible, scale)  # [S, L, H, D]
        outputs.append(padded[(column < ends - starts).to(q.device)])
    return torch.cat(outputs).to(q.dtype)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, *, cu_seqlens: list[int],
              window: int, scale: float) -> torch.Tensor:
    """Attention within each packed sequence. q [T, H, D], k and v [T, K, D], sinks [H]; cu_seqlens [S + 1] on the host;
    window 0 means none. Returns [T, H, D] in q's dtype; gradients reach q, k, v and the sinks."""
    return attention_reference(q, k, v, sinks, cu_seqlens, window, scale)
