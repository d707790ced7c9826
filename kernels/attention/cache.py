"""Writes the keys and values of new tokens into a cache of slots or of pages.

Token b of slot s at position p goes to entry p % L of slot s, or of page page_table[s, p // L]. Nothing is read back to the host,
so a CUDA graph can capture the launch. Idle rows, at a position below 0, and rows without a page write nothing.

A decode step rotates its queries and keys (rope.py) in the same launch.

Shapes: B tokens, N slots or pages, L entries per slot or page, H query heads, K key-value heads, D head width, S slots, W pages
per slot.
"""
import torch
import triton
import triton.language as tl

from kernels.device import check_served, is_triton, launch, next_power_of_2, overlap_constants, wait_for_launch_before
from kernels.rope import DTYPES, rotate_heads, rotated


def write_reference(k, v, keys, values, slots, positions, page_table=None):
    rows = (positions >= 0).nonzero().squeeze(1)
    slots, positions, num_entries = slots[rows], positions[rows], keys.shape[1]
    blocks = slots if page_table is None else page_table[slots, positions // num_entries].long()
    assert (blocks >= 0).all(), f"no page for positions {positions[blocks < 0].tolist()} of slots {slots[blocks < 0].tolist()}"
    entries = positions % num_entries
    keys[blocks, entries], values[blocks, entries] = k[rows].to(keys.dtype), v[rows].to(values.dtype)


@triton.jit
def _place(slots_ptr, position, page_table_ptr, token, stride_block, num_entries, pages_per_slot, PAGED: tl.constexpr,
           SIZE: tl.constexpr):
    """The offset in the cache at which a token's SIZE elements go, and whether they are to be written."""
    block = tl.load(slots_ptr + token).to(tl.int64)
    is_live = position >= 0
    if PAGED:
        column = position // num_entries
        block = tl.load(page_table_ptr + block * pages_per_slot + column, mask=is_live & (column < pages_per_slot),
                        other=-1).to(tl.int64)
        is_live = is_live & (block >= 0)
    return block * stride_block + position % num_entries * SIZE, is_live


@triton.jit(do_not_specialize=["pages_per_slot"])
def _write_kernel(k_ptr, v_ptr, keys_ptr, values_ptr, slots_ptr, positions_ptr, page_table_ptr, stride_k, stride_v, stride_block,
                  num_entries, pages_per_slot, PAGED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
                  OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    if position >= 0:
        start, is_live = _place(slots_ptr, position, page_table_ptr, token, stride_block, num_entries, pages_per_slot, PAGED,
                                SIZE)
        cols = tl.arange(0, BLOCK)
        mask = (cols < SIZE) & is_live
        k = tl.load(k_ptr + token * stride_k + cols, mask=mask)
        v = tl.load(v_ptr + token * stride_v + cols, mask=mask)
        tl.store(keys_ptr + start + cols, k.to(keys_ptr.dtype.element_ty), mask=mask)
        tl.store(values_ptr + start + cols, v.to(values_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pages_per_slot"])
def _rotate_and_write_kernel(q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, cos_ptr, sin_ptr, slots_ptr, positions_ptr,
                             page_table_ptr, stride_q, stride_k, stride_v, stride_block, num_entries, pages_per_slot,
                             PAGED: tl.constexpr, NUM_Q: tl.constexpr, NUM_K: tl.constexpr, HALF: tl.constexpr,
                             BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_launch_before(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)
    start, is_live = _place(slots_ptr, position, page_table_ptr, token, stride_block, num_entries, pages_per_slot, PAGED,
                            NUM_K * 2 * HALF)
    heads = tl.arange(0, BLOCK_K)[:, None]
    places = heads * (2 * HALF) + cols
    mask = (heads < NUM_K) & (cols < HALF)
    y1, y2 = rotated(k_ptr + token * stride_k + places, mask, cos, sin, HALF)
    v1 = tl.load(v_ptr + token * stride_v + places, mask=mask, other=0.0)
    v2 = tl.load(v_ptr + token * stride_v + places + HALF, mask=mask, other=0.0)
    y1, y2 = y1.to(k_ptr.dtype.element_ty), y2.to(k_ptr.dtype.element_ty)
    tl.store(k_ptr + token * stride_k + places, y1, mask=mask)
    tl.store(k_ptr + token * stride_k + places + HALF, y2, mask=mask)
    mask = mask & is_live
    tl.store(keys_ptr + start + places, y1, mask=mask)
    tl.store(keys_ptr + start + places + HALF, y2, mask=mask)
    tl.store(values_ptr + start + places, v1, mask=mask)
    tl.store(values_ptr + start + places + HALF, v2, mask=mask)
    rotate_heads(q_ptr, token, stride_q, cos, sin, NUM_Q, HALF, BLOCK_Q, BLOCK_HALF)


def _check(tensors: dict[str, torch.Tensor], slots: torch.Tensor, positions: torch.Tensor,
           page_table: torch.Tensor | None) -> None:
    """Checks the tensors of both launches: k, v, keys, values and q, if there is one."""
    check_served("cache_write", tensors, dtypes=DTYPES, tensor_cores=False)
    k, keys, values = tensors["k"], tensors["keys"], tensors["values"]
    assert slots.shape == positions.shape == (len(k),), (slots.shape, positions.shape, k.shape)
    assert keys.is_contiguous() and values.is_contiguous(), (keys.stride(), values.stride())
    assert page_table is None or page_table.is_contiguous(), page_table.stride()


def write(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
          positions: torch.Tensor, *, page_table: torch.Tensor | None = None) -> None:
    """Stores k and v [B, K, D] of tokens at positions [B] of slots [B] in the caches [N, L, K, D]; N counts slots or, with
    page_table [S, W] int32, pages. No (slot, entry) pair may occur twice; rows at a position below 0 are skipped. A row whose
    slot has no page for its position is an error on the CPU and skipped on a GPU, where no value is read back to the host."""
    assert keys.shape == values.shape and k.shape == v.shape == (len(slots), *keys.shape[2:]), (k.shape, v.shape, keys.shape)
    if not is_triton(k):
        write_reference(k, v, keys, values, slots, positions, page_table)
        return
    _check({"k": k, "v": v, "keys": keys, "values": values}, slots, positions, page_table)
    k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (k, v))
    size = k.shape[1] * k.shape[2]
    positions = positions.contiguous()
    if len(k):
        launch(_write_kernel, (len(k),), k, v, keys, values, slots.contiguous(), positions,
               positions if page_table is None else page_table, k.stride(0), v.stride(0), keys.stride(0), keys.shape[1],
               0 if page_table is None else page_table.shape[1], PAGED=page_table is not None, SIZE=size,
               BLOCK=next_power_of_2(size), num_warps=1 if size <= 512 else 4,
               **overlap_constants(k, len(k)))


def rotate_and_write(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor,
                     values: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, *,
                     page_table: torch.Tensor | None = None) -> None:
    """Rotates q [B, H, D] and k [B, K, D] in place by cos, sin [B, D / 2] fp32, as rope.rotate_ does, and stores k and v [B, K,
    D] as write does. All have the caches' dtype. Triton only."""
    (num_tokens, num_q, width), num_k = q.shape, k.shape[1]
    assert keys.shape == values.shape and k.shape == v.shape == (len(slots), *keys.shape[2:]), (k.shape, v.shape, keys.shape)
    assert q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype, (q.dtype, k.dtype, keys.dtype)
    assert all(x.stride()[1:] == (width, 1) for x in (q, k, v)), (q.stride(), k.stride(), v.stride())
    assert cos.shape == sin.shape == (num_tokens, width // 2) and cos.is_contiguous() and sin.is_contiguous(), cos.shape
    _check({"q": q, "k": k, "v": v, "keys": keys, "values": values}, slots, positions, page_table)
    positions = positions.contiguous()
    block_q, block_half = next_power_of_2(num_q), next_power_of_2(width // 2)
    if num_tokens:
        launch(_rotate_and_write_kernel, (num_tokens,), q, k, v, keys, values, cos, sin, slots.contiguous(), positions,
               positions if page_table is None else page_table, q.stride(0), k.stride(0), v.stride(0), keys.stride(0),
               keys.shape[1], 0 if page_table is None else page_table.shape[1], PAGED=page_table is not None, NUM_Q=num_q,
               NUM_K=num_k, HALF=width // 2, BLOCK_Q=block_q, BLOCK_K=next_power_of_2(num_k), BLOCK_HALF=block_half,
               num_warps=1 if block_q * block_half <= 512 else 4, **overlap_constants(q, num_tokens))
