"""New keys and values in the cache, rotated on the way: the reference, the interpreter, every GPU, and the bits of rope."""

import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for, half
from interpreter import run_interpreter_tests

from kernels.cache_write import _write_kernel, rotate_and_write, write
from kernels.rope import rope_qk

SLOTS, POSITIONS = torch.tensor([3, 0, 1, 4, -1]), torch.tensor([0, 6, 19, -1, -5])  # the last two are idle
LIVE = [(0, 3, 0), (1, 0, 6), (2, 1, 5)]  # row, slot, entry of a ring of 7


def normal(*shape, seed=0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def tables(num_tokens, half, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(num_tokens).unsqueeze(1) * 0.7 ** torch.arange(half)
    return (1.3 * angles.cos()).to(device), (1.3 * angles.sin()).to(device)


def check_plain_writes() -> None:
    fused = normal(5, 7 + 2 * 3 * 10)
    k, v = (part.unflatten(1, (3, 10)) for part in fused[:, 7:].split(30, dim=1))  # strided rows, a width off every power of 2
    keys, values = normal(6, 7, 3, 10, seed=1), normal(6, 7, 3, 10, seed=2)
    expected = keys.clone(), values.clone()
    write(k, v, keys, values, SLOTS, POSITIONS)
    for row, slot, entry in LIVE:
        expected[0][slot, entry], expected[1][slot, entry] = k[row], v[row]
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def check_rotated_writes(num_heads, num_kv, width) -> None:
    qkv = normal(5, (num_heads + 2 * num_kv) * width)
    sizes = [num_heads * width, num_kv * width, num_kv * width]
    q, k, v = (part.unflatten(1, (-1, width)) for part in qkv.clone().split(sizes, dim=1))
    cos, sin = tables(5, width // 2)
    keys, values = normal(6, 7, num_kv, width, seed=1), normal(6, 7, num_kv, width, seed=2)
    expected = keys.clone(), values.clone()
    rotated_q, rotated_k = rope_qk(q, k, cos, sin)
    rotate_and_write(qkv, cos, sin, keys, values, SLOTS, POSITIONS)
    for row, slot, entry in LIVE:
        expected[0][slot, entry], expected[1][slot, entry] = rotated_k[row], v[row]
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
    assert torch.equal(qkv[:3, : sizes[0]].unflatten(1, (-1, width)), rotated_q[:3])
    assert torch.equal(qkv[3:, : sizes[0]].unflatten(1, (-1, width)), q[3:])  # idle
    assert torch.equal(qkv[:, sizes[0] :], torch.cat((k.flatten(1), v.flatten(1)), dim=1))


def test_rows_go_to_their_entry_and_idle_rows_nowhere():
    check_plain_writes()


@pytest.mark.parametrize("num_heads, num_kv, width", [(6, 2, 10), (8, 1, 64), (1, 1, 2)])
def test_queries_turn_in_place_and_turned_keys_go_to_the_cache(num_heads, num_kv, width):
    check_rotated_writes(num_heads, num_kv, width)


def test_keys_are_rounded_to_the_dtype_of_the_cache():
    keys, values = (torch.zeros(1, 2, 1, 2, dtype=torch.bfloat16) for _ in range(2))
    k = torch.tensor([[[1.0, 1.0 + 2**-9]]])
    write(k, k + 1, keys, values, torch.tensor([0]), torch.tensor([3]))
    assert keys.flatten().tolist() == [0, 0, 1, 1] and values.flatten().tolist() == [0, 0, 2, 2]


def test_the_interpreter_agrees():
    run_interpreter_tests(__file__)


@pytest.mark.interpreter
def test_the_kernel_writes_rows_to_their_entry_and_idle_rows_nowhere():
    check_plain_writes()


@pytest.mark.interpreter
@pytest.mark.parametrize("num_heads, num_kv, width", [(6, 2, 10), (8, 1, 64), (1, 1, 2)])
def test_the_kernel_turns_as_rope_does(num_heads, num_kv, width):
    check_rotated_writes(num_heads, num_kv, width)


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernel_fits_every_gpu(arch, rotates):
    signature = {f"{name}_ptr": half(arch) for name in ("q", "k", "v", "keys", "values")}
    signature |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "slots_ptr": "*i64", "positions_ptr": "*i64", "num_entries": "i32"}
    signature |= {f"stride_{name}": "i32" for name in ("q", "k", "v", "slot", "entry")}
    sizes = {"NUM_Q": 64, "NUM_K": 8, "HALF": 32, "BLOCK_Q": 64, "BLOCK_K": 8, "BLOCK_HALF": 32, "ROTATES": rotates}
    check_fits(compile_for(_write_kernel, signature, sizes, arch, num_warps=4, num_stages=3), arch)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 128, 512])
@pytest.mark.parametrize("entries", [128, 4096])
def test_the_bits_are_those_of_rope(num_tokens, entries):
    qkv = normal(num_tokens, 80 * 64, dtype=torch.bfloat16, device="cuda")
    q, k, v = (part.unflatten(1, (-1, 64)) for part in qkv.clone().split([4096, 512, 512], dim=1))
    cos, sin = tables(num_tokens, 32, "cuda")
    slots = torch.randperm(num_tokens).cuda()
    positions = (torch.arange(num_tokens) * 37 % 4096).cuda()
    positions[num_tokens // 2 :: 5] = -1
    keys, values = (torch.full((num_tokens, entries, 8, 64), 7.0, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    expected = keys.clone(), values.clone()
    rotated_q, rotated_k = rope_qk(q, k, cos, sin)
    live = positions >= 0
    expected[0][slots[live], positions[live] % entries] = rotated_k[live]
    expected[1][slots[live], positions[live] % entries] = v[live]
    rotate_and_write(qkv, cos, sin, keys, values, slots, positions)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
    assert torch.equal(qkv[:, :4096].unflatten(1, (-1, 64)), torch.where(live[:, None, None], rotated_q, q))
    for cache in (keys, values):
        cache.fill_(7.0)
    write(rotated_k, v, keys, values, slots, positions)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
