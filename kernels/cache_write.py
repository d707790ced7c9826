"""Writes the keys and values of new tokens into a slot cache.

Token b of slot s at position p goes to entry p % L of slot s. Nothing reaches the host, so a CUDA graph can hold the launch; rows
of it that are idle, at a position below 0, touch nothing.

Shapes: B tokens, N slots, L entries per slot, K key-value heads, D head width.
"""
import torch
import triton
import triton.language as tl

from kernels.launch import check_served, is_triton, launch, next_power_of_2
from kernels.rope import DTYPES


def write_reference(k, v, keys, values, slots, positions):
    rows = (positions >= 0).nonzero().squeeze(1)
    slots, entries = slots[rows], positions[rows] % keys.shape[1]
    keys[slots, entries], values[slots, entries] = k[rows].to(keys.dtype), v[rows].to(values.dtype)


@triton.jit
def _write_kernel(k_ptr, v_ptr, keys_ptr, values_ptr, slots_ptr, positions_ptr, stride_k, stride_v, stride_slot, num_entries,
                  SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    if position >= 0:
        cols = tl.arange(0, BLOCK)
        mask = cols < SIZE
        place = tl.load(slots_ptr + token).to(tl.int64) * stride_slot + position % num_entries * SIZE + cols
        k = tl.load(k_ptr + token * stride_k + cols, mask=mask)
        v = tl.load(v_ptr + token * stride_v + cols, mask=mask)
        tl.store(keys_ptr + place, k.to(keys_ptr.dtype.element_ty), mask=mask)
        tl.store(values_ptr + place, v.to(values_ptr.dtype.element_ty), mask=mask)


def write(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
          positions: torch.Tensor) -> None:
    """Stores k and v [B, K, D] of tokens at positions [B] of slots [B] in the caches [N, L, K, D]. No (slot, entry) pair may
    occur twice; rows at a position below 0 are skipped."""
    assert keys.shape == values.shape and k.shape == v.shape == (len(slots), *keys.shape[2:]), (k.shape, v.shape, keys.shape)
    if not is_triton(k):
        write_reference(k, v, keys, values, slots, positions)
        return
    check_served("cache_write", {"k": k, "v": v, "keys": keys, "values": values}, dtypes=DTYPES, tensor_cores=False)
    assert slots.shape == positions.shape == (len(k),), (slots.shape, positions.shape, k.shape)
    assert keys.is_contiguous() and values.is_contiguous(), (keys.stride(), values.stride())
    k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (k, v))
    size = k.shape[1] * k.shape[2]
    if len(k):
        launch(_write_kernel, (len(k),), k, v, keys, values, slots.contiguous(), positions.contiguous(), k.stride(0), v.stride(0),
               keys.stride(0), keys.shape[1], SIZE=size, BLOCK=next_power_of_2(size), num_warps=1 if size <= 512 else 4)
