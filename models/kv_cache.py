"""Key-value cache of the sampler: one slot per sequence, linear on full layers, a ring on windowed layers.

A windowed layer keeps `sliding_window` entries: the key of position p stands at p % sliding_window.

Shapes: N slots, L entries (the longest sequence, or the window), K key-value heads, D head width.
"""
from __future__ import annotations

import torch

from kernels import cache_write
from models.config import GptOssConfig


class KVCache:
    def __init__(self, config: GptOssConfig, *, num_slots: int, max_len: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        self.num_slots, self.max_len = num_slots, max_len  # slots; tokens per slot
        self.lengths = [min(config.sliding_window, max_len) if config.is_windowed(layer) else max_len
                        for layer in range(config.num_hidden_layers)]
        shape = (config.num_key_value_heads, config.head_dim)
        self.keys = [torch.zeros(num_slots, length, *shape, device=device, dtype=dtype) for length in self.lengths]
        self.values = [torch.zeros_like(keys) for keys in self.keys]  # [N, L, K, D] per layer

    @property
    def num_bytes(self) -> int:
        return sum(2 * keys.numel() * keys.element_size() for keys in self.keys)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Stores k, v [T, K, D] of tokens at `positions` [T] of `slots` [T]. No (slot, entry) pair may occur twice; rows at a
        position below 0 are skipped."""
        cache_write.write(k, v, self.keys[layer], self.values[layer], slots, positions)

    def copy_slot(self, source: int, targets: torch.Tensor, num_tokens: int | None = None) -> None:
        """Copies the first `num_tokens` (default: all) entries of slot `source` into the slots `targets` [n]."""
        for cache in (self.keys, self.values):
            for layer, entries in enumerate(cache):
                count = self.lengths[layer] if num_tokens is None else min(num_tokens, self.lengths[layer])
                entries[targets, :count] = entries[source, :count].clone()  # index_put refuses views of itself
