"""Writes the keys and values of new tokens into a cache of slots or of pages.

Token b of slot s at position p goes to entry p % L: of slot s, or of page page_table[s, p // L]. Nothing reaches the host, so a
CUDA graph can hold the launch; rows of it that are idle, at a position below 0, touch nothing, nor do rows without a page.

Shapes: B tokens, N slots or pages, L entries per slot or page, K key-value heads, D head width, S slots, W pages per slot.
"""
import torch
import triton
import triton.language as tl

from kernels.launch import check_served, is_triton, launch, next_power_of_2, overlap_constants, wait_for_launch_before
from kernels.rope import DTYPES


def write_reference(k, v, keys, values, slots, positions, page_table=None):
    rows = (positions >= 0).nonzero().squeeze(1)
    slots, positions, num_entries = slots[rows], positions[rows], keys.shape[1]
    blocks = slots if page_table is None else page_table[slots, positions // num_entries].long()
    assert (blocks >= 0).all(), f"no page for positions {positions[blocks < 0].tolist()} of slots {slots[blocks < 0].tolist()}"
    entries = positions % num_entries
    keys[blocks, entries], values[blocks, entries] = k[rows].to(keys.dtype), v[rows].to(values.dtype)


@triton.jit(do_not_specialize=["pages_per_slot"])
def _write_kernel(k_ptr, v_ptr, keys_ptr, values_ptr, slots_ptr, positions_ptr, page_table_ptr, stride_k, stride_v, stride_block,
                  num_entries, pages_per_slot, PAGED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
                  OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    if position >= 0:
        cols = tl.arange(0, BLOCK)
        mask = cols < SIZE
        block = tl.load(slots_ptr + token).to(tl.int64)
        if PAGED:
            column = position // num_entries
            block = tl.load(page_table_ptr + block * pages_per_slot + column, mask=column < pages_per_slot, other=-1).to(tl.int64)
            mask = mask & (block >= 0)
        place = block * stride_block + position % num_entries * SIZE + cols
        k = tl.load(k_ptr + token * stride_k + cols, mask=mask)
        v = tl.load(v_ptr + token * stride_v + cols, mask=mask)
        tl.store(keys_ptr + place, k.to(keys_ptr.dtype.element_ty), mask=mask)
        tl.store(values_ptr + place, v.to(values_ptr.dtype.element_ty), mask=mask)


def write(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
          positions: torch.Tensor, *, page_table: torch.Tensor | None = None) -> None:
    """Stores k and v [B, K, D] of tokens at positions [B] of slots [B] in the caches [N, L, K, D]: of slots without page_table,
    of pages with page_table [S, W] int32. No (slot, entry) pair may occur twice; rows at a position below 0 are skipped. A row
    whose slot has no page there is refused on the CPU and skipped on a GPU, where no value reaches the host."""
    assert keys.shape == values.shape and k.shape == v.shape == (len(slots), *keys.shape[2:]), (k.shape, v.shape, keys.shape)
    if not is_triton(k):
        write_reference(k, v, keys, values, slots, positions, page_table)
        return
    check_served("cache_write", {"k": k, "v": v, "keys": keys, "values": values}, dtypes=DTYPES, tensor_cores=False)
    assert slots.shape == positions.shape == (len(k),), (slots.shape, positions.shape, k.shape)
    assert keys.is_contiguous() and values.is_contiguous(), (keys.stride(), values.stride())
    assert page_table is None or page_table.is_contiguous(), page_table.stride()
    k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (k, v))
    size = k.shape[1] * k.shape[2]
    positions = positions.contiguous()
    if len(k):
        launch(_write_kernel, (len(k),), k, v, keys, values, slots.contiguous(), positions,
               positions if page_table is None else page_table, k.stride(0), v.stride(0), keys.stride(0), keys.shape[1],
               0 if page_table is None else page_table.shape[1], PAGED=page_table is not None, SIZE=size,
               BLOCK=next_power_of_2(size), num_warps=1 if size <= 512 else 4,
               **overlap_constants(k, len(k)))
