"""New keys and values in the cache: the reference, the interpreter, every GPU."""

import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for, half

from kernels.attention.cache import _rotate_and_write_kernel, _write_kernel, rotate_and_write, write, write_reference
from kernels.rope import rope_reference, rotate_

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


TABLE = torch.tensor([[4, -1, -1], [2, 9, -1], [-1, -1, -1], [7, 1, -1]], dtype=torch.int32)
PAGED_LIVE = [(0, 1, 0, 2, 0), (1, 3, 6, 7, 6), (2, 1, 7, 9, 0), (3, 3, 13, 1, 6), (4, 0, 5, 4, 5)]  # row, slot, position, place


def check_paged_writes(idle: list[tuple[int, int]]) -> None:
    """Pages of 7 tokens, those of slots and positions `idle` missing or not to be looked for."""
    slots, positions = torch.tensor([row[1:3] for row in PAGED_LIVE] + idle).unbind(1)  # not dense
    k, v = normal(len(slots), 3, 10), normal(len(slots), 3, 10, seed=3)
    keys, values = normal(10, 7, 3, 10, seed=1), normal(10, 7, 3, 10, seed=2)
    expected = keys.clone(), values.clone()
    write(k, v, keys, values, slots, positions, page_table=TABLE)
    for row, _, _, page, entry in PAGED_LIVE:
        expected[0][page, entry], expected[1][page, entry] = k[row], v[row]
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_rows_go_to_the_page_of_their_slot():
    check_paged_writes(idle=[(0, -1), (999, -3)])


def test_a_row_without_a_page_is_refused_on_the_cpu():
    with pytest.raises(AssertionError, match=r"no page for positions \[7\] of slots \[0\]"):
        check_paged_writes(idle=[(0, 7)])


def test_keys_are_rounded_to_the_dtype_of_the_cache():
    keys, values = (torch.zeros(1, 2, 1, 2, dtype=torch.bfloat16) for _ in range(2))
    k = torch.tensor([[[1.0, 1.0 + 2**-9]]])
    write(k, k + 1, keys, values, torch.tensor([0]), torch.tensor([3]))
    assert keys.flatten().tolist() == [0, 0, 1, 1] and values.flatten().tolist() == [0, 0, 2, 2]


@pytest.mark.interpreter
def test_the_kernel_writes_rows_to_their_entry_and_idle_rows_nowhere():
    check_plain_writes()


@pytest.mark.interpreter
def test_the_kernel_finds_pages_and_skips_rows_without_one():
    check_paged_writes(idle=[(0, -1), (999, -3), (0, 7), (2, 0), (1, 21), (3, 10_000)])  # the last two beyond the table


@pytest.mark.interpreter
@pytest.mark.parametrize("table", [None, TABLE])
def test_the_kernel_rotates_queries_and_keys_in_place_and_writes_what_it_rotated(table):
    fused, angles = normal(6, 5 + 9 * 10), normal(6, 5, seed=4)  # 5 query heads and 2 of keys and values, 10 wide
    q, k, v = (part.unflatten(1, (-1, 10)) for part in fused[:, 5:].split([50, 20, 20], dim=1))
    slots, positions = torch.tensor([1, 3, 1, 3, 0, 2]), torch.tensor([0, 6, 7, 13, -4, -1])
    if table is None:
        slots = torch.arange(6)
    keys, values = normal(10, 7, 2, 10, seed=1), normal(10, 7, 2, 10, seed=2)
    before, expected = fused.clone(), (keys.clone(), values.clone())
    rotated = [rope_reference(x, angles.cos(), angles.sin()) for x in (q, k)]
    write_reference(rotated[1], v, *expected, slots, positions, table)
    rotate_and_write(q, k, v, angles.cos(), angles.sin(), keys, values, slots, positions, page_table=table)
    for ours, theirs in zip((q, k, keys, values), (*rotated, *expected)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(fused[:, :5], before[:, :5]) and torch.equal(v, before[:, 75:].unflatten(1, (2, 10)))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernel_that_rotates_fits_every_gpu(arch, paged):
    signature = {f"{name}_ptr": half(arch) for name in ("q", "k", "v", "keys", "values")}
    signature |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    signature |= {"slots_ptr": "*i64", "positions_ptr": "*i64", "page_table_ptr": "*i32"}
    signature |= {"num_entries": "i32", "pages_per_slot": "i32"} | {f"stride_{name}": "i32" for name in ("q", "k", "v", "block")}
    constexprs = {"PAGED": paged, "NUM_Q": 64, "NUM_K": 8, "HALF": 32, "BLOCK_Q": 64, "BLOCK_K": 8, "BLOCK_HALF": 32}
    check_fits(compile_for(_rotate_and_write_kernel, signature, constexprs, arch, num_warps=4, num_stages=3), arch)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernel_fits_every_gpu(arch, paged):
    signature = {f"{name}_ptr": half(arch) for name in ("k", "v", "keys", "values")}
    signature |= {"slots_ptr": "*i64", "positions_ptr": "*i64", "page_table_ptr": "*i32"}
    signature |= {"num_entries": "i32", "pages_per_slot": "i32"} | {f"stride_{name}": "i32" for name in ("k", "v", "block")}
    constexprs = {"PAGED": paged, "SIZE": 512, "BLOCK": 512}
    check_fits(compile_for(_write_kernel, signature, constexprs, arch, num_warps=1, num_stages=3), arch)


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


@pytest.mark.gpu
def test_every_row_arrives_in_its_page_on_a_gpu():
    num_slots = 130
    k, v = (normal(num_slots, 8, 64, seed=seed, dtype=torch.bfloat16, device="cuda") for seed in (0, 1))
    table = torch.randperm(num_slots * 3).view(num_slots, 3).int().cuda()
    table[::3, 2] = -1
    slots, positions = torch.randperm(num_slots).cuda(), (torch.arange(num_slots) * 37 % 192).cuda()
    positions[::7] = -1
    keys, values = (torch.full((num_slots * 3, 64, 8, 64), 7.0, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    expected = keys.clone(), values.clone()
    pages = table[slots, positions.clamp(min=0) // 64].long()
    live = (positions >= 0) & (pages >= 0)
    expected[0][pages[live], positions[live] % 64] = k[live]
    expected[1][pages[live], positions[live] % 64] = v[live]
    write(k, v, keys, values, slots, positions, page_table=table)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 512])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_launch_gives_the_bits_of_rotation_and_write_on_a_gpu(num_tokens, paged, dtype):
    fused, angles = normal(num_tokens, 80 * 64, dtype=dtype, device="cuda"), normal(num_tokens, 32, seed=1, device="cuda")
    cos, sin = (1.3 * angles).cos() * 1.1, (1.3 * angles).sin() * 1.1
    table = torch.randperm(num_tokens * 3).view(num_tokens, 3).int().cuda() if paged else None
    slots, positions = torch.randperm(num_tokens).cuda(), (torch.arange(num_tokens) * 37 % 192).cuda()
    positions[3::7] = -1
    caches = [torch.full((num_tokens * 3, 64, 8, 64), 7.0, dtype=dtype, device="cuda") for _ in range(4)]
    parts = [[part.unflatten(1, (-1, 64)) for part in x.split([4096, 512, 512], dim=1)] for x in (fused, fused.clone())]
    (q, k, v), (other_q, other_k, other_v) = parts
    rotate_and_write(q, k, v, cos, sin, *caches[:2], slots, positions, page_table=table)
    rotate_(other_q, other_k, cos, sin, backward=False)
    write(other_k, other_v, *caches[2:], slots, positions, page_table=table)
    for ours, theirs in ((q, other_q), (k, other_k), (v, other_v), (caches[0], caches[2]), (caches[1], caches[3])):
        assert torch.equal(ours, theirs)
    assert (caches[0] != 7.0).any() and (caches[1] != 7.0).any()
