"""Attention of one new token per sequence over its key-value cache, with sinks and grouped queries.

The formula is that of kernels/attention.py with a single query row. A ring cache of a windowed layer holds its keys in any
order: attention does not depend on it.
"""
import torch

from kernels.attention import _attend


def decode_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, sinks: torch.Tensor, *,
                     slots: torch.Tensor, num_keys: torch.Tensor, max_keys: int, scale: float) -> torch.Tensor:
    """q [B, H, D]; caches [slots, L, K, D]; sequence b reads entries 0..num_keys[b]-1 of slots[b]; max_keys bounds num_keys.
    Returns [B, H, D] in q's dtype."""
    k = k_cache[:, :max_keys][slots]  # [B, max_keys, K, D]
    v = v_cache[:, :max_keys][slots]
    visible = torch.arange(max_keys, device=q.device) < num_keys.unsqueeze(1)  # [B, max_keys]
    # entries past num_keys were never written by this sequence: they must not turn 0 * inf into NaN
    v = v.masked_fill(~visible[:, :, None, None], 0.0)
    return _attend(q.unsqueeze(1), k, v, sinks, visible[:, None, None, None, :], scale).squeeze(1).to(q.dtype)
