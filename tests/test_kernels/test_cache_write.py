"""New keys and values in the cache: the reference, the interpreter, every GPU."""

import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for, half
from interpreter import run_interpreter_tests

from kernels.cache_write import _write_kernel, write

SLOTS, POSITIONS = torch.tensor([3, 0, 1, 4, -1]), torch.tensor([0, 6, 19, -1, -5])  # the last two are idle
LIVE = [(0, 3, 0), (1, 0, 6), (2, 1, 5)]  # row, slot, entry of a ring of 7


def normal(*shape, seed=0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def check_plain_writes() -> None:
    fused = normal(5, 7 + 2 * 3 * 10)
    k, v = (part.unflatten(1, (3, 10)) for part in fused[:, 7:].split(30, dim=1))  # strided rows, a width off every power of 2
    keys, values = normal(6, 7, 3, 10, seed=1), normal(6, 7, 3, 10, seed=2)
    expected = keys.clone(), values.clone()
    write(k, v, keys, values, SLOTS, POSITIONS)
    for row, slot, entry in LIVE:
        expected[0][slot, entry], expected[1][slot, entry] = k[row], v[row]
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_rows_go_to_their_entry_and_idle_rows_nowhere():
    check_plain_writes()


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


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernel_fits_every_gpu(arch):
    signature = {f"{name}_ptr": half(arch) for name in ("k", "v", "keys", "values")}
    signature |= {"slots_ptr": "*i64", "positions_ptr": "*i64", "num_entries": "i32"}
    signature |= {f"stride_{name}": "i32" for name in ("k", "v", "slot")}
    check_fits(compile_for(_write_kernel, signature, {"SIZE": 512, "BLOCK": 512}, arch, num_warps=1, num_stages=3), arch)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 128, 512])
@pytest.mark.parametrize("entries", [128, 4096])
def test_every_row_arrives_on_a_gpu(num_tokens, entries):
    k, v = (normal(num_tokens, 10, 8, 64, seed=seed, dtype=torch.bfloat16, device="cuda")[:, 1] for seed in (0, 1))  # strided
    slots = torch.randperm(num_tokens).cuda()
    positions = (torch.arange(num_tokens) * 37 % 4096).cuda()
    positions[num_tokens // 2 :: 5] = -1
    keys, values = (torch.full((num_tokens, entries, 8, 64), 7.0, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    expected = keys.clone(), values.clone()
    live = positions >= 0
    expected[0][slots[live], positions[live] % entries] = k[live]
    expected[1][slots[live], positions[live] % entries] = v[live]
    write(k, v, keys, values, slots, positions)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
