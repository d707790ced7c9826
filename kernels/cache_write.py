"""Writes the keys and values of new tokens into a slot cache, and rotates queries and keys on the way where asked to.

Token b of slot s at position p goes to entry p % L of slot s. The rotation is that of kernels/rope.py, by its own code: fp32,
one rounding. Nothing reaches the host, so a CUDA graph can hold the launch; rows of it that are idle, at a position below 0,
touch nothing.

Shapes: B tokens, N slots, L entries per slot, H query heads, K key-value heads, D head width, P = (H + 2 K) D.
"""
import torch
import triton
import triton.language as tl

from kernels.launch import check_served, is_triton, launch, next_power_of_2
from kernels.rope import DTYPES, MAX_WIDTH, _num_warps, _rotate, rope_reference


def write_reference(k, v, keys, values, slots, positions):
    rows = (positions >= 0).nonzero().squeeze(1)
    slots, entries = slots[rows], positions[rows] % keys.shape[1]
    keys[slots, entries], values[slots, entries] = k[rows].to(keys.dtype), v[rows].to(values.dtype)


@triton.jit
def _copy(x_ptr, y_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols, mask=cols < SIZE).to(y_ptr.dtype.element_ty), mask=cols < SIZE)


@triton.jit
def _write_kernel(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, slots_ptr, positions_ptr, stride_q, stride_k,
                  stride_v, stride_slot, stride_entry, num_entries, NUM_Q: tl.constexpr, NUM_K: tl.constexpr, HALF: tl.constexpr,
                  BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, ROTATES: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    if position >= 0:
        place = tl.load(slots_ptr + token).to(tl.int64) * stride_slot + position % num_entries * stride_entry
        if ROTATES:
            cols = tl.arange(0, BLOCK_HALF)[None, :]
            cos = tl.load(cos_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)
            sin = tl.load(sin_ptr + token * HALF + cols, mask=cols < HALF, other=0.0)
            _rotate(q_ptr, q_ptr, token, stride_q, HALF * 2, stride_q, cos, sin, NUM_Q, HALF, BLOCK_Q, BLOCK_HALF)
            _rotate(k_ptr, keys_ptr + place, token, stride_k, HALF * 2, 0, cos, sin, NUM_K, HALF, BLOCK_K, BLOCK_HALF)
        else:
            _copy(k_ptr + token * stride_k, keys_ptr + place, NUM_K * HALF * 2, BLOCK_K * BLOCK_HALF * 2)
        _copy(v_ptr + token * stride_v, values_ptr + place, NUM_K * HALF * 2, BLOCK_K * BLOCK_HALF * 2)


def _write_triton(q, k, v, cos, sin, keys, values, slots, positions, *, rotates: bool) -> None:
    """q, k and v [B, heads, D], a token's heads dense."""
    tensors = {"q": q, "k": k, "v": v, "keys": keys, "values": values}
    check_served("cache_write", tensors, dtypes=DTYPES, tensor_cores=False)
    assert slots.shape == positions.shape == (len(k),), (slots.shape, positions.shape, k.shape)
    assert all(x.stride()[1:] == (x.shape[2], 1) for x in (q, k, v)), [x.stride() for x in (q, k, v)]
    assert keys.is_contiguous() and values.is_contiguous(), (keys.stride(), values.stride())
    num_tokens, num_q, width = q.shape
    block_q, block_half = next_power_of_2(num_q), next_power_of_2(width // 2)
    if num_tokens:
        launch(_write_kernel, (num_tokens,), q, k, v, cos, sin, keys, values, slots.contiguous(), positions.contiguous(),
               q.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1), keys.shape[1], NUM_Q=num_q,
               NUM_K=k.shape[1], HALF=width // 2, BLOCK_Q=block_q, BLOCK_K=next_power_of_2(k.shape[1]),
               BLOCK_HALF=block_half, ROTATES=rotates, num_warps=_num_warps(block_q * block_half))


def write(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
          positions: torch.Tensor) -> None:
    """Stores k and v [B, K, D] of tokens at positions [B] of slots [B] in the caches [N, L, K, D]. No (slot, entry) pair may
    occur twice; rows at a position below 0 are skipped."""
    assert keys.shape == values.shape and k.shape == v.shape == (len(slots), *keys.shape[2:]), (k.shape, v.shape, keys.shape)
    if not is_triton(k):
        write_reference(k, v, keys, values, slots, positions)
        return
    k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (k, v))
    _write_triton(k, k, v, k, k, keys, values, slots, positions, rotates=False)


def rotate_and_write(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                     slots: torch.Tensor, positions: torch.Tensor) -> None:
    """Rotates the queries in qkv [B, P] in place by cos, sin [B, D/2] fp32, and stores the rotated keys and the values in the
    caches [N, L, K, D] at positions [B] of slots [B]; the keys in qkv itself stay as they are. No (slot, entry) pair may occur
    twice; rows at a position below 0 are left alone."""
    num_kv, width = keys.shape[2:]
    num_heads = qkv.shape[1] // width - 2 * num_kv
    assert qkv.stride(1) == 1 and qkv.shape == (len(slots), (num_heads + 2 * num_kv) * width), (qkv.shape, keys.shape)
    assert cos.shape == sin.shape == (len(qkv), width // 2), (cos.shape, sin.shape, qkv.shape)
    assert cos.dtype == sin.dtype == torch.float32, (cos.dtype, sin.dtype)
    q, k, v = (part.unflatten(1, (-1, width))
               for part in qkv.split([num_heads * width, num_kv * width, num_kv * width], dim=1))
    if not is_triton(qkv):
        live = (positions >= 0)[:, None, None]
        q.copy_(torch.where(live, rope_reference(q, cos, sin), q))
        write_reference(rope_reference(k, cos, sin), v, keys, values, slots, positions)
        return
    if num_heads * width > MAX_WIDTH:
        raise ValueError(f"rotate_and_write: {num_heads} heads of {width}; the Triton kernel takes up to {MAX_WIDTH} elements "
                         "a token")
    _write_triton(q, k, v, cos.contiguous(), sin.contiguous(), keys, values, slots, positions, rotates=True)
