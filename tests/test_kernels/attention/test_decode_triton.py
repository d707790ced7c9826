"""The decode kernel: in the interpreter against the reference, its arithmetic beside the training kernel's in the code compiled
for every GPU, and on a GPU bit for bit against the training kernel's rows."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from aot import ARCHITECTURES, check_fits, compile_for, product_loops
from attention_problem import compile_kernel, eager
from row_arithmetic import row_updates

from kernels.attention.cache import write
from kernels.attention.decode import (
    _CROWDED,
    _PARTS_AT_ONCE,
    _PREFIX_STAGES,
    _STAGES,
    SharedPrefixes,
    _add_parts_kernel,
    _decode_kernel,
    _prefix_kernel,
    decode_attention,
    decode_attention_reference,
)
from kernels.attention.packed import AttentionPlan, attention, blocks_for
from kernels.attention.parts import forward_tiles, keys_of_part, load_rows, no_keys
from kernels.device import family_of


def random_cache(num_rows, length, *, heads=4, kv_heads=2, width=16, num_slots=None, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_slots = num_slots or num_rows
    shapes = {"q": (num_rows, heads, width), "keys": (num_slots, length, kv_heads, width),
              "values": (num_slots, length, kv_heads, width), "sinks": (heads,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def scattered(data, slots, positions, *, page) -> dict[str, torch.Tensor]:
    """The same with the keys and values of rows in pages of so many tokens, in any order amid NaN, and their table. Slots have
    no pages after their row's position."""
    num_slots, length, *shape = data["keys"].shape
    width = -(-length // page)
    numbers = torch.randperm(num_slots * width + 3, generator=torch.Generator().manual_seed(7))[:-3].view(num_slots, width)
    table = torch.full((num_slots, width), -1, dtype=torch.int32)
    pools = {name: torch.full((num_slots * width + 3, page, *shape), float("nan")) for name in ("keys", "values")}
    for slot, position in zip(slots.tolist(), positions.tolist()):
        if position >= 0:
            count = position // page + 1
            table[slot, :count] = numbers[slot, :count]
            for name, pool in pools.items():
                kept, num_after = data[name][slot, : position + 1], count * page - position - 1
                pages = F.pad(kept, (0, 0, 0, 0, 0, num_after), value=float("nan")).view(count, page, *shape)
                pool[numbers[slot, :count]] = pages
    return data | pools | {"page_table": table}


@pytest.mark.interpreter
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 2, 16), (8, 1, 64), (3, 1, 32), (2, 2, 128)])
def test_rows_of_any_length_match_the_reference(heads, kv_heads, width, poisoned):
    data = random_cache(7, 63, heads=heads, kv_heads=kv_heads, width=width, num_slots=9)
    positions, slots = torch.tensor([0, 14, 15, 16, 17, 47, 62]), torch.tensor([8, 0, 3, 5, 1, 2, 7])
    expected = decode_attention_reference(**data, slots=slots, positions=positions, scale=0.3)
    for slot, position in zip(slots, positions):  # nothing past a sequence is read
        data["keys"][slot, position + 1 :], data["values"][slot, position + 1 :] = float("nan"), float("nan")
    data["keys"][[4, 6]], data["values"][[4, 6]] = float("nan"), float("nan")
    out = decode_attention(**data, slots=slots, positions=positions, window=0, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("length", [1, 7, 16, 20, 40])
def test_rings_match_the_reference_however_often_they_wrapped(length, poisoned):
    data = random_cache(9, length)
    positions, slots = torch.tensor([0, 1, 6, 15, 19, 20, 39, 63, 1000]), torch.randperm(9)
    expected = decode_attention_reference(**data, slots=slots, positions=positions, scale=0.3)
    for slot, position in zip(slots, positions):
        data["keys"][slot, position + 1 :], data["values"][slot, position + 1 :] = float("nan"), float("nan")
    out = decode_attention(**data, slots=slots, positions=positions, window=length, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [0, 20])
def test_idle_rows_give_zeros_whatever_their_slot(window, poisoned):
    data = random_cache(4, 20)
    positions = torch.tensor([5, -1, 19, -7])
    out = decode_attention(**data, slots=torch.tensor([1, -1, 2, 999]), positions=positions, window=window, scale=0.3)
    assert (out[[1, 3]] == 0).all()
    live = decode_attention_reference(data["q"][[0, 2]], data["keys"], data["values"], data["sinks"], torch.tensor([1, 2]),
                                      positions[[0, 2]], 0.3)
    torch.testing.assert_close(out[[0, 2]], live, rtol=1e-5, atol=2e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [0, 24])
def test_counting_tiles_again_after_a_prefix_only_reorders_the_sums(window, poisoned):
    data = random_cache(6, window or 60)
    positions = torch.tensor([9, 40, 40, 59, 59, -1])
    settings = {"slots": torch.arange(6), "positions": positions, "window": window, "scale": 0.3}
    expected = decode_attention(**data, **settings)
    out = decode_attention(**data, **settings, prefix_lens=torch.tensor([0, 7, 40, 16, 33, 5]))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


POSITIONS = torch.tensor([0, 15, 16, 62, 63, 64, 65, 126, 127, 128, 190, -1])
PREFIX_LENS = torch.tensor([0, 7, 17, 40, 33, 64, 66, 63, 65, 1, 127, 5])  # the third and seventh end with the row, or after it


@pytest.mark.interpreter
@pytest.mark.parametrize("prefix_lens", [None, PREFIX_LENS, torch.full((12,), 61)], ids=["whole", "prefixed", "one_prefix"])
@pytest.mark.parametrize("page", [16, 32, 64])  # tiles have 16 keys
def test_pages_in_any_order_give_the_bits_of_one_stretch(page, prefix_lens, poisoned):
    data, slots = random_cache(12, 191, num_slots=14), torch.randperm(14, generator=torch.Generator().manual_seed(3))[:12]
    settings = {"slots": slots, "positions": POSITIONS, "window": 0, "scale": 0.3, "prefix_lens": prefix_lens}
    expected = decode_attention(**data, **settings)
    out = decode_attention(**scattered(data, slots, POSITIONS, page=page), **settings)
    assert torch.equal(out, expected) and out[:-1].abs().amax((1, 2)).min() > 0


@pytest.mark.interpreter
@pytest.mark.parametrize("prefix_lens", [None, PREFIX_LENS, torch.full((12,), 61)], ids=["whole", "prefixed", "one_prefix"])
@pytest.mark.parametrize("heads, kv_heads, width, page", [(4, 2, 16, 16), (8, 1, 32, 32), (3, 1, 64, 64)])
def test_many_programs_give_the_bits_of_one(heads, kv_heads, width, page, prefix_lens, poisoned, ordered_products):
    data = random_cache(12, 191, heads=heads, kv_heads=kv_heads, width=width, num_slots=14)
    slots = torch.randperm(14, generator=torch.Generator().manual_seed(3))[:12]
    settings = {"slots": slots, "positions": POSITIONS, "window": 0, "scale": 0.3, "prefix_lens": prefix_lens}
    paged = scattered(data, slots, POSITIONS, page=page)
    expected = decode_attention(**paged, **settings)
    for longest in (191, 512) if page == 16 else (191,):  # with 512, parts that no row has
        out = decode_attention(**paged, **settings, longest=longest)
        assert torch.equal(out, expected)
    assert out[:-1].abs().amax((1, 2)).min() > 0 and (out[-1] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("prompt, sink", [(0, None), (17, None), (64, None), (130, None), (130, float("-inf"))])
def test_rows_around_the_ends_of_parts_have_the_bits_of_training_in_every_way(prompt, sink, poisoned, ordered_products):
    lengths = [1, 63, 64, 65, 129]  # after the prompt; a part has 64 keys
    data, slots, positions = random_cache(5, 259, heads=2, kv_heads=1), torch.arange(5), prompt + torch.tensor(lengths) - 1
    if sink is not None:
        data["sinks"].fill_(sink)
    for name in ("keys", "values"):
        data[name][1:, :prompt] = data[name][0, :prompt].clone()
    bounds = [0] * (prompt > 0) + [prompt + sum(lengths[:count]) for count in range(6)]
    keys, values = (torch.cat([data[name][0, :prompt], *(data[name][row, prompt:prompt + length]
                                                         for row, length in enumerate(lengths))]) for name in ("keys", "values"))
    q, last = torch.randn(bounds[-1], 2, 16, generator=torch.Generator().manual_seed(1)), torch.tensor(bounds[-5:]) - 1
    plan = AttentionPlan(bounds, prefixes=[-1, 0, 0, 0, 0, 0] if prompt else None)
    expected = attention(q, keys, values, data["sinks"], cu_seqlens=bounds, window=0, scale=0.3, plan=plan)[last]
    assert expected.isfinite().all()
    paged = scattered(data | {"q": q[last]}, slots, positions, page=32)
    settings = {"slots": slots, "positions": positions, "window": 0, "scale": 0.3,
                "prefix_lens": torch.full((5,), prompt) if prompt else None}
    for way in ({}, {"longest": prompt + 129}, *([{"shared": tiles_of((0, 5), num_rows=5)}] if prompt else [])):
        assert torch.equal(decode_attention(**paged, **settings, **way), expected), way


@pytest.mark.interpreter
def test_shared_pages_serve_every_slot_that_names_them(poisoned):
    data = random_cache(3, 100)
    data["keys"][1:, :64], data["values"][1:, :64] = data["keys"][0, :64], data["values"][0, :64]
    positions = torch.tensor([99, 70, 64])
    settings = {"slots": torch.arange(3), "positions": positions, "window": 0, "scale": 0.3,
                "prefix_lens": torch.tensor([64, 64, 64])}
    paged = scattered(data, torch.arange(3), positions, page=32)
    for name in ("keys", "values"):
        paged[name][paged["page_table"][1:, :2].long()] = float("nan")
    paged["page_table"][1:, :2] = paged["page_table"][0, :2]
    assert torch.equal(decode_attention(**paged, **settings), decode_attention(**data, **settings))


def tiles_of(*tiles: tuple[int, int], num_rows: int) -> SharedPrefixes:
    is_shared = torch.zeros(num_rows, dtype=torch.int32)
    for first, count in tiles:
        is_shared[first : first + count] = 1
    return SharedPrefixes(torch.tensor(tiles, dtype=torch.int32), is_shared)


def grouped(groups, *, page, heads=4, kv_heads=2):
    """Rows of groups (the prompt's length, each member's tokens after it) and an idle one. The slots of a group have the same
    keys in their prompts. Returns what decode_attention takes."""
    prompts = torch.tensor([prompt for prompt, extras in groups for _ in extras] + [9])
    positions = torch.tensor([prompt + extra for prompt, extras in groups for extra in extras] + [-1])
    data, slots = random_cache(len(positions), 200, heads=heads, kv_heads=kv_heads), torch.arange(len(positions))
    first = 0
    for prompt, extras in groups:
        for name in ("keys", "values"):
            data[name][first : first + len(extras), :prompt] = data[name][first, :prompt].clone()
        first += len(extras)
    return scattered(data, slots, positions, page=page), {"slots": slots, "positions": positions, "window": 0, "scale": 0.3,
                                                         "prefix_lens": prompts}


@pytest.mark.interpreter
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 1), (8, 1)])
def test_a_prefix_read_once_for_its_rows_changes_no_bit(heads, kv_heads, poisoned, ordered_products):
    # prompts that end within a tile of keys, on its edge and on a page's; between them a row that shares none and an empty tile
    groups = [(70, [0, 1, 40]), (64, [5, 17, 90, 3]), (20, [2]), (33, [*range(9)]), (0, [7, 8])]
    paged, settings = grouped(groups, page=32, heads=heads, kv_heads=kv_heads)
    expected = decode_attention(**paged, **settings)
    shared = tiles_of((0, 3), (3, 4), (0, 0), (8, 8), (17, 2), num_rows=20)
    out = decode_attention(**paged, **settings, shared=shared)
    assert torch.equal(out, expected) and out[:-1].abs().amax((1, 2)).min() > 0


@pytest.mark.interpreter
def test_a_shared_prefix_is_read_from_the_pages_of_one_row(poisoned):
    paged, settings = grouped([(64, [1, 2, 3])], page=32)
    shared = tiles_of((0, 3), num_rows=4)
    expected = decode_attention(**paged, **settings)
    paged["page_table"][1:3, 1] = paged["page_table"][1:3, 2]  # the others' second page of the prompt: not even looked at
    assert torch.equal(decode_attention(**paged, **settings, shared=shared), expected)
    assert not torch.equal(decode_attention(**paged, **settings), expected)


@pytest.mark.interpreter
def test_a_row_that_became_idle_in_a_tile_gives_zeros_and_leaves_the_others_alone(poisoned):
    paged, settings = grouped([(64, [1, 2, 3])], page=32)
    expected = decode_attention(**paged, **settings)
    settings["positions"][0] = -1
    out = decode_attention(**paged, **settings, shared=tiles_of((0, 3), num_rows=4))
    assert torch.equal(out[1:], expected[1:]) and (out[0] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("longest", [0, 64])
@pytest.mark.parametrize("prefix_lens", [None, torch.tensor([5, 33, 0, 70])])
def test_idle_rows_and_rows_past_their_pages_leave_the_others_alone(prefix_lens, longest, poisoned):
    data, slots, positions = random_cache(4, 64), torch.arange(4), torch.tensor([40, 63, 20, 50])
    settings = {"slots": slots, "window": 0, "scale": 0.3, "prefix_lens": prefix_lens, "longest": longest}
    paged = scattered(data, slots, positions, page=32)
    expected = decode_attention(**paged, **settings, positions=positions)
    for name in ("keys", "values"):
        paged[name].nan_to_num_()
    # what stands after the table is no page
    paged["page_table"] = torch.cat((paged["page_table"], torch.full((2, 2), 1 << 30, dtype=torch.int32)))[:4]
    settings["slots"] = torch.tensor([0, 999, 2, 3])
    out = decode_attention(**paged, **settings, positions=torch.tensor([40, -1, 63, 200]))
    assert torch.equal(out[0], expected[0]) and (out[1] == 0).all()


@pytest.mark.interpreter
def test_slices_of_a_fused_projection_and_strided_numbers(poisoned):
    data = random_cache(3, 10)
    slots, positions = torch.stack((torch.arange(3), torch.tensor([3, 9, 0])), dim=1).unbind(1)  # not dense either
    settings = {"slots": slots, "positions": positions, "window": 0, "scale": 0.3}
    expected = decode_attention_reference(**data, slots=slots, positions=positions, scale=0.3)
    fused = torch.cat((torch.full((3, 5), float("nan")), data["q"].flatten(1), torch.full((3, 7), float("nan"))), dim=1)
    out = decode_attention(**data | {"q": fused[:, 5:-7].unflatten(1, (4, 16))}, **settings)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.interpreter
def test_what_the_kernel_cannot_serve_is_refused_with_the_reason():
    data = random_cache(1, 5, width=24)
    settings = {"slots": torch.tensor([0]), "positions": torch.tensor([3]), "window": 0, "scale": 1.0}
    with pytest.raises(ValueError, match="width 24"):
        decode_attention(**data, **settings)
    data = random_cache(1, 5)
    with pytest.raises(ValueError, match="one dtype"):
        decode_attention(**data | {"q": data["q"].half()}, **settings)


@triton.jit
def _visit_kernel(q, k, v, out, first, position, window, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """A row's output and sum from all tiles from `first` on."""
    rows = tl.zeros([BLOCK_H], tl.int32) + position
    q_tile = load_rows(q, D, 0, BLOCK_H, BLOCK_H, D, True)
    sink = tl.zeros([BLOCK_H], tl.float32)
    total, total_max, total_sum, acc, row_max, row_sum = no_keys(sink, D, 0)
    total, total_max, total_sum, acc, row_max, row_sum = forward_tiles(
        total, total_max, total_sum, acc, row_max, row_sum, sink, q_tile, k, v, k, v, D, D, 0, rows, 0, first, position + 40,
        position + 40, 0.4, window, True, True, False, D, BLOCK_N, 0, False)
    heads = tl.arange(0, BLOCK_H)
    tl.store(out + heads[:, None] * (D + 1) + tl.arange(0, D)[None, :], acc)
    tl.store(out + heads * (D + 1) + D, row_sum)


@pytest.mark.interpreter
def test_tiles_without_a_visible_key_change_no_bit():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 16, generator=generator) for rows in (16, 200, 200))
    results = []
    for first in (112, 64, 0):  # the window of 20 keys starts at 115; 36 keys after the row are hidden too
        out = torch.full((16, 17), float("nan"))
        _visit_kernel[(1,)](q, k, v, out, first, 134, 20, D=16, BLOCK_H=16, BLOCK_N=16)
        results.append(out)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]) and results[0].isfinite().all()


# bytes a thread may keep in memory: what loops need at start and end; on Blackwell, which nobody has measured, also within them
LOOP_INVARIANTS = 32
_, CROWDED = _CROWDED["hopper"].blocks


def compile_decode(arch: int, *, windowed: bool, dtype="bf16", width=64, prefixed=False, shares=False, by_part=False, ring=128,
                   page=64, stages=0):
    torch_dtype = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    blocks = blocks_for(family_of(arch), torch_dtype, windowed=windowed, width=width).forward
    signature = {name: f"*{dtype}" for name in ("q", "keys", "values", "sinks", "out")}
    signature |= {name: "*i64" for name in ("slots", "positions", "prefix_lens")} | {"page_table": "*i32"}
    signature |= {"scale_log2": "fp32", "window": "i32", "pages_per_slot": "i32", "states": "*fp32", "is_shared": "*i32"}
    signature |= dict.fromkeys(("stride_q", "stride_slot", "stride_out"), "i32")
    constexprs = {"STRIDE_KEY": 8 * width, "GROUP": 8, "WINDOWED": windowed, "PREFIXED": prefixed, "SHARES": shares,
                  "BY_PART": by_part, "RING": ring if windowed else 0, "PAGE": 0 if windowed else page, "D": width,
                  "BLOCK_H": 16, "BLOCK_N": blocks.keys, "PART": keys_of_part(torch_dtype, int(windowed))}
    return compile_for(_decode_kernel, signature, constexprs, arch, num_warps=1, num_stages=stages or _STAGES[windowed])


def compile_prefix(arch: int):
    blocks = blocks_for(family_of(arch), torch.bfloat16, windowed=False, width=64).forward
    signature = {name: "*bf16" for name in ("q", "keys", "values", "sinks")} | {"states": "*fp32"}
    signature |= {"page_table": "*i32", "tiles": "*i32", "slots": "*i64", "prefix_lens": "*i64", "scale_log2": "fp32"}
    signature |= dict.fromkeys(("stride_q", "pages_per_slot"), "i32")
    constexprs = {"STRIDE_KEY": 512, "GROUP": 8, "PAGE": 64, "D": 64, "ROWS": 8, "BLOCK_H": 8, "BLOCK_N": blocks.keys,
                  "PART": keys_of_part(torch.bfloat16, 0)}
    stages = _PREFIX_STAGES[family_of(arch)].blocks
    return compile_for(_prefix_kernel, signature, constexprs, arch, num_warps=4, num_stages=stages)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_of_shared_prefixes_fits_every_gpu(arch):
    resources = compile_prefix(arch)
    check_fits(resources, arch, max_stack=LOOP_INVARIANTS)
    assert resources.mma == {90: {"HGMMA"}, 100: {"UTCHMMA"}}.get(arch, {"HMMA"})


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
def test_a_row_of_a_shared_prefix_is_summed_in_the_order_of_the_training_kernel(arch):
    blocks = blocks_for(family_of(arch), torch.bfloat16, windowed=False, width=64).forward
    columns = blocks.keys // 4  # of a thread
    training = row_updates(compile_kernel("forward", arch, blocks, windowed=False).ptx, columns)
    assert row_updates(compile_prefix(arch).ptx, columns) == training


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_that_adds_parts_fits_every_gpu(arch):
    signature = {"sinks": "*bf16", "out": "*bf16", "states": "*fp32", "positions": "*i64", "prefix_lens": "*i64"}
    signature |= dict.fromkeys(("stride_out", "num_parts", "pages_per_slot"), "i32")
    constexprs = {"PREFIXED": True, "PAGE": 64, "D": 64, "PART": 256, "AT_ONCE": _PARTS_AT_ONCE}
    check_fits(compile_for(_add_parts_kernel, signature, constexprs, arch, num_warps=1, num_stages=1), arch)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_fits_every_gpu_several_times(windowed, arch):
    resources = compile_decode(arch, windowed=windowed)
    check_fits(resources, arch, max_stack=LOOP_INVARIANTS)
    loops = product_loops(resources.sass)
    assert loops and (arch == 100 or not any(line.startswith(("LDL", "STL")) for loop in loops for line in loop))
    assert resources.mma == {"HMMA"}
    assert resources.shared <= 52_000  # 4 programs of a multiprocessor and more; 2 of a consumer GPU's


@pytest.mark.parametrize("arch, settings", [(90, {"windowed": False, "prefixed": True}),
                                            (90, {"windowed": True, "prefixed": True}), (86, {"windowed": True, "ring": 100}),
                                            (80, {"windowed": False, "prefixed": True}),
                                            (90, {"windowed": False, "prefixed": True, "shares": True}),
                                            (86, {"windowed": False, "prefixed": True, "shares": True}),
                                            (86, {"windowed": False, "prefixed": True}), (90, {"windowed": False, "page": 0}),
                                            (90, {"windowed": False, "prefixed": True, "by_part": True}),
                                            (90, {"windowed": False, "prefixed": True, "stages": CROWDED}),
                                            (86, {"windowed": False, "by_part": True}),
                                            (120, {"windowed": False, "prefixed": True}),
                                            (86, {"windowed": False, "dtype": "fp16"}),
                                            (90, {"windowed": False, "width": 128}),
                                            (90, {"windowed": False, "dtype": "fp32", "width": 32})])
def test_other_dtypes_widths_rings_and_prefixes_fit_too(arch, settings):
    check_fits(compile_decode(arch, **settings), arch, max_stack=LOOP_INVARIANTS)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("arch", [80, 86, 90, 120])
def test_a_row_is_summed_in_the_order_of_the_training_kernel(arch, windowed):
    blocks = blocks_for(family_of(arch), torch.bfloat16, windowed=windowed, width=64).forward
    columns = blocks.keys // 4  # of a thread
    training = row_updates(compile_kernel("forward", arch, blocks, windowed=windowed).ptx, columns)
    decoding = row_updates(compile_decode(arch, windowed=windowed).ptx, columns)
    # their exponents, the sum and the factor; without a window also the sums with a part and its factor
    assert len(decoding) == columns + (2 if windowed else 4)
    if arch == 90 and not windowed:
        assert row_updates(compile_decode(arch, windowed=False, stages=CROWDED).ptx, columns) == decoding
    if arch == 120 and not windowed:  # training's sum of weights stands behind a jump, which row_updates does not follow
        assert training < decoding and len(training) == len(decoding) - 1
    else:
        assert training == decoding


def sequences(lengths, *, window, seed=0):
    """q, k, v and sinks of packed bf16 sequences on the GPU, their bounds, and what decode_attention takes of them but q: caches
    of their keys, in pages without a window, each in a slot of its own amid NaN; then the slots and last positions."""
    generator = torch.Generator().manual_seed(seed)
    bounds = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    inputs = {name: torch.randn(shape, generator=generator).to("cuda", torch.bfloat16) for name, shape in
              {"q": (bounds[-1], 64, 64), "k": (bounds[-1], 8, 64), "v": (bounds[-1], 8, 64), "sinks": (64,)}.items()}
    num_slots = len(lengths) + 2
    slots = torch.randperm(num_slots, generator=generator)[: len(lengths)].cuda()
    entries, width = window or max(lengths), -(-max(lengths) // 64)
    table = None
    if not window:
        table = torch.randperm(num_slots * width, generator=generator).int().view(num_slots, width)
        for slot, length in zip(slots.tolist(), lengths):
            table[slot, -(-length // 64):] = -1
        table = table.cuda()
    caches = [torch.full((num_slots, window, 8, 64) if window else (num_slots * width, 64, 8, 64), float("nan"),
                         dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    counts = torch.tensor(lengths, device="cuda")
    positions = torch.cat([torch.arange(length, device="cuda") for length in lengths])
    kept = (positions >= counts.repeat_interleave(counts) - entries).nonzero().squeeze(1)
    write(inputs["k"][kept], inputs["v"][kept], *caches, slots.repeat_interleave(counts)[kept], positions[kept], page_table=table)
    cached = {"keys": caches[0], "values": caches[1], "sinks": inputs["sinks"], "window": window, "page_table": table}
    return inputs, bounds, cached, slots, counts - 1


LENGTHS = [1, 63, 64, 65, 127, 128, 129, 700, 2049]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 128])
@pytest.mark.parametrize("lengths", [*([length] for length in LENGTHS), LENGTHS[:7], [*LENGTHS[2:], *LENGTHS[:2]] * 14 + [5, 33]],
                         ids=lambda lengths: f"{len(lengths)}x{lengths[0]}")
def test_rows_have_the_bits_of_the_training_kernel(lengths, window, poisoned):
    inputs, bounds, cached, slots, positions = sequences(lengths, window=window)
    expected = attention(**inputs, cu_seqlens=bounds, window=window, scale=0.125)
    last = torch.tensor(bounds[1:], device="cuda") - 1
    for longest in [0] if window else [0, max(lengths)]:
        out = decode_attention(inputs["q"][last], **cached, slots=slots, positions=positions, scale=0.125, longest=longest)
        assert torch.equal(out, expected[last]), longest


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.125, 2.0])
@pytest.mark.parametrize("window", [0, 128])
def test_every_position_of_a_sequence_has_the_bits_of_the_training_kernel(window, scale):
    inputs, bounds, cached, slots, _ = sequences([400], window=window)
    expected = attention(**inputs, cu_seqlens=bounds, window=window, scale=scale)
    positions = torch.arange(400, device="cuda")
    if not window:
        out = decode_attention(inputs["q"], **cached, slots=slots.expand(400), positions=positions, scale=scale)
        assert torch.equal(out, expected)
        return
    rings = [cached[name].fill_(float("nan")) for name in ("keys", "values")]
    for position in range(400):
        here = slice(position, position + 1)
        write(inputs["k"][here], inputs["v"][here], *rings, slots, positions[here])
        out = decode_attention(inputs["q"][here], **cached, slots=slots, positions=positions[here], scale=scale)
        assert torch.equal(out, expected[here]), position


@pytest.mark.gpu
@pytest.mark.parametrize("prompt", [1, 64, 100, 151, 256])
@pytest.mark.parametrize("window", [0, 128])
def test_continuations_of_a_prefix_have_the_bits_of_training_on_shared_prompts(window, prompt):
    lengths = [1, 64, 90, 333]
    inputs, bounds, *_ = sequences([prompt, *lengths], window=window)
    plan = AttentionPlan(bounds, prefixes=[-1, 0, 0, 0, 0])
    expected = attention(**inputs, cu_seqlens=bounds, window=window, scale=0.125, plan=plan)
    num_tokens = prompt + max(lengths)
    entries, table, shape = window or num_tokens, None, (4, window, 8, 64)
    if not window:  # in pages, of which all share those that the prompt fills
        width = -(-num_tokens // 64)
        table = torch.randperm(4 * width, generator=torch.Generator().manual_seed(1)).int().view(4, width).cuda()
        table[1:, : prompt // 64] = table[0, : prompt // 64]
        shape = (4 * width, 64, 8, 64)
    caches = [torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    for slot, (start, end) in enumerate(zip(bounds[1:], bounds[2:])):
        rows = torch.tensor([*range(prompt), *range(start, end)], device="cuda")[-entries:]
        positions = torch.arange(prompt + end - start, device="cuda")[-entries:]
        write(inputs["k"][rows], inputs["v"][rows], *caches, torch.full_like(positions, slot), positions, page_table=table)
    last = torch.tensor(bounds[2:], device="cuda") - 1
    prefix_lens = torch.full((4,), prompt, device="cuda")
    tiles = tiles_of((0, 4), num_rows=4)
    ways = [{}]
    if not window:
        ways += [{"shared": SharedPrefixes(tiles.tiles.cuda(), tiles.is_shared.cuda())}, {"longest": num_tokens}]
    for way in ways:
        out = decode_attention(inputs["q"][last], *caches, inputs["sinks"], slots=torch.arange(4, device="cuda"), window=window,
                               positions=prefix_lens + torch.tensor(lengths, device="cuda") - 1, scale=0.125,
                               prefix_lens=prefix_lens, page_table=table, **way)
        assert torch.equal(out, expected[last]), way


@pytest.mark.gpu
@pytest.mark.parametrize("prefix_len", [None, 4000])
@pytest.mark.parametrize("scale", [0.125, 1.0])
def test_many_programs_have_the_bits_of_one_for_long_sequences(scale, prefix_len, poisoned):
    generator, lengths = torch.Generator().manual_seed(0), [1, 4000, 4096, 9999, 40_000]
    keys, values = (torch.randn(625 * 2, 64, 8, 64, generator=generator).to("cuda", torch.bfloat16) for _ in range(2))
    q, sinks = torch.randn(5, 64, 64, generator=generator).to("cuda", torch.bfloat16), torch.randn(64, generator=generator).cuda()
    settings = {"slots": torch.arange(5, device="cuda"), "positions": torch.tensor(lengths, device="cuda") - 1, "window": 0,
                "page_table": torch.stack([torch.randperm(1250, generator=generator)[:625] for _ in lengths]).int().cuda(),
                "prefix_lens": None if prefix_len is None else torch.full((5,), prefix_len, device="cuda"), "scale": scale}
    expected = decode_attention(q, keys, values, sinks, **settings)
    for longest in (40_000, 65_536):
        out = decode_attention(q, keys, values, sinks, **settings, longest=longest)
        assert torch.equal(out, expected) and out.abs().amax((1, 2)).min() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [[(0, 2)], [(0, 8), (8, 7), (15, 3)], [(8 * i, 8) for i in range(16)]])
def test_on_a_gpu_a_prefix_read_once_for_its_rows_changes_no_bit(tiles):
    generator, num_rows = torch.Generator().manual_seed(len(tiles)), tiles[-1][0] + tiles[-1][1] + 3  # the last share none
    prompts, pages = torch.full((num_rows,), 64), torch.arange(num_rows * 27).view(num_rows, 27)
    keys, values = (torch.randn(num_rows * 27, 64, 8, 64, generator=generator).to("cuda", torch.bfloat16) for _ in range(2))
    for number, (first, count) in enumerate(tiles):
        length = [100, 64, 513, 1000][number % 4]
        prompts[first : first + count] = length
        for row in range(first + 1, first + count):  # whole pages are shared, and the tail copied
            pages[row, : length // 64] = pages[first, : length // 64]
            if length % 64:
                for cache in (keys, values):
                    cache[pages[row, length // 64], : length % 64] = cache[pages[first, length // 64], : length % 64]
    q = torch.randn(num_rows, 64, 64, generator=generator).to("cuda", torch.bfloat16)
    sinks = torch.randn(64, generator=generator).to("cuda", torch.bfloat16)
    positions = prompts + torch.randint(0, 700, (num_rows,), generator=generator)
    settings = {"slots": torch.arange(num_rows).cuda(), "positions": positions.cuda(), "window": 0, "scale": 0.125,
                "prefix_lens": prompts.cuda(), "page_table": pages.int().cuda()}
    expected = decode_attention(q, keys, values, sinks, **settings)
    shared = tiles_of(*tiles, (0, 0), num_rows=num_rows)
    out = decode_attention(q, keys, values, sinks, **settings,
                           shared=SharedPrefixes(shared.tiles.cuda(), shared.is_shared.cuda()))
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 128])
def test_error_is_at_most_twice_that_of_eager_bf16(window):
    inputs, bounds, cached, slots, positions = sequences([1, 65, 700, 1500], window=window)
    last = torch.tensor(bounds[1:], device="cuda") - 1
    out = decode_attention(inputs["q"][last], **cached, slots=slots, positions=positions, scale=0.125)
    settings = {"cu_seqlens": bounds, "window": window, "scale": 0.125}
    exact = eager(**{name: tensor.double() for name, tensor in inputs.items()}, **settings)[last]
    rough = eager(**inputs, **settings)[last]
    assert (out.double() - exact).norm() <= 2 * (rough.double() - exact).norm()


@pytest.mark.gpu
def test_a_cuda_graph_serves_other_rows_and_pages_than_it_was_captured_with():
    inputs, bounds, cached, slots, positions = sequences([1, 65, 700, 300], window=0)
    last = torch.tensor(bounds[1:], device="cuda") - 1
    q, k, v = (inputs[name][last] for name in "qkv")
    caches, table = (cached["keys"], cached["values"]), cached["page_table"]

    def step():
        write(k, v, *caches, slots, positions, page_table=table)
        return decode_attention(q, **cached, slots=slots, positions=positions, scale=0.125)

    expected = step()
    torch.cuda.set_sync_debug_mode("error")  # the host waits for nothing
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before = [cache.clone() for cache in caches]
    order = torch.tensor([2, 0, 3, 1], device="cuda")
    saved = slots.clone(), positions.clone(), q.clone(), k.clone(), v.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    assert torch.equal(out, expected)
    for tensor, old in zip((slots, positions, q, k, v), saved):
        tensor.copy_(old[order])
    positions[1] = -1
    table.copy_(table.flip(0))
    slots.copy_(len(table) - 1 - slots)
    graph.replay()
    expected = expected[order]
    expected[1] = 0
    assert torch.equal(out, expected)
    assert all(torch.equal(cache.nan_to_num(), old.nan_to_num()) for cache, old in zip(caches, before))
