"""The experts of few tokens: in the interpreter against a composition in float64, compiled for every GPU, and on a GPU bit for
bit against the training forward."""

import re

import pytest
import torch
import triton
from aot import ARCHITECTURES, check_fits, check_starts, compile_for, product_loops
from moe_problem import ALPHA, LIMIT, SCALE, composed, moe_decode, moe_forward, problem

import kernels.device
from kernels.device import family_of, gpu_family
from kernels.experts import few_rows
from kernels.experts.few_rows import FOR_ALL, FOR_LOW_RANK, decode_projection, moe_decode_kernel
from kernels.experts.few_tiles import _PACKED, DecodeBlocks, choose_decode_blocks, low_rank_steps, mma_of
from kernels.experts.sorting import make_routing
from kernels.packed.fragments import ASM_FAMILIES, chunk_of, to_fragments_, unpacks_by_asm
from kernels.packed.mxfp4 import dequantize
from kernels.packed.weights import Dense, Projection


def operands(indices, packed, t, form, *, has_lora):
    """Positional arguments and lora of moe_decode. form: packed, or dense with inputs or outputs contiguous."""
    projections = []
    for pair, bias in zip(packed, ("b1", "b2")):
        if form == "packed":
            blocks, scales = (tensor.clone() for tensor in pair)
            to_fragments_(blocks, scales)
            projections.append(Projection(None, blocks, scales, t[bias], unpacks_by_asm(t["x"], is_foldable=True)))
        else:
            dense = dequantize(*pair, t["x"].dtype).transpose(1, 2)
            projections.append(Projection(dense.contiguous() if form == "dense" else dense, None, None, t[bias], False))
    routing = make_routing(indices, num_experts=packed[0][0].shape[0])
    lora = tuple(t[name] for name in ("A1", "B1", "A2", "B2")) if has_lora else None
    return (t["x"], t["weights"], routing, *projections, t["residual"]), lora


def with_lora(lora, x, *, in_one_launch):
    """Settings of moe_decode. In one launch, LoRA is in x's dtype."""
    settings = {"lora": lora, "lora_scale": SCALE, "alpha": ALPHA, "limit": LIMIT}
    if not in_one_launch:
        return settings
    ready = torch.zeros(2, dtype=torch.int32, device=x.device)
    return settings | {"lora": [tensor.to(x.dtype) for tensor in lora], "ready": ready}


def relative_error(sizes, form, has_lora, *, in_one_launch=False):
    indices, packed, tensors = problem(*sizes)
    expected = composed(indices, packed, tensors, has_lora=has_lora)
    arguments, lora = operands(indices, packed, {name: value.float() for name, value in tensors.items()}, form, has_lora=has_lora)
    y = moe_decode(*arguments, **with_lora(lora, arguments[0], in_one_launch=in_one_launch))
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("has_lora, in_one_launch", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("sizes", [(1, 4, 2, 96, 64, 4), (7, 5, 3, 64, 96, 4), (75, 4, 2, 160, 48 * 2, 20)])
def test_packed_experts(sizes, has_lora, in_one_launch):
    assert relative_error(sizes, "packed", has_lora, in_one_launch=in_one_launch) <= 3e-6


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned", "ordered_products")
def test_one_launch_has_the_bits_of_two_and_counts_every_program_that_may_have_work(monkeypatch):
    monkeypatch.setattr(few_rows, "low_rank_steps", lambda *_, **__: (32, 2))  # the interpreter adds up within a step first
    indices, packed, tensors = problem(20, 4, 2, 64, 32, 17)
    t = {name: value.float() for name, value in tensors.items()}
    arguments, lora = operands(indices, packed, t, "packed", has_lora=True)
    settings = [with_lora(lora, t["x"], in_one_launch=in_one_launch) for in_one_launch in (True, False)]
    one, two = (moe_decode(*arguments, **options) for options in settings)
    assert one.isfinite().all() and torch.equal(one, two)
    assert settings[0]["ready"].tolist() == 2 * [(40 // 16 + 4) * 2]  # at most 6 tiles of 16 rows, each with 2 of 16 ranks


@pytest.mark.interpreter
def test_a_launch_cannot_wait_for_low_rank_rows_that_it_computes():
    x, A, B = (torch.ones(1, 16, 16) for _ in range(3))
    options = {"lora_A": A, "lora_up": B, "ready": torch.zeros(1, dtype=torch.int32), "scale": 1.0}
    with pytest.raises(AssertionError, match="the launch before computes no low_rank"):
        decode_projection(x[0], Projection(torch.ones(1, 16, 16), None, None, None, False), None, waits=FOR_LOW_RANK, **options)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", ["dense", "dense by rows"])
def test_dense_experts(form):
    assert relative_error((7, 5, 3, 64, 96, 4), form, True) <= 3e-6
    assert relative_error((7, 5, 3, 64, 96, 4), form, True, in_one_launch=True) <= 3e-6
    assert relative_error((19, 4, 2, 96, 32, 4), form, False) <= 3e-6


def test_blocks_leave_a_last_step_that_is_a_power_of_two():
    for num_in in (32, 64, 96, 160, 192, 224, 288, 2880, 4096):
        for num_rows in (4, 128, 2048):
            for family in ("ampere", "consumer", "hopper", "blackwell", "interpreter"):
                blocks = choose_decode_blocks(family, torch.bfloat16, num_rows, 32, num_in, 5760, is_packed=True)
                tail = num_in % blocks.inner
                assert tail & (tail - 1) == 0 and blocks.inner % chunk_of(num_in) == 0 and blocks.inner <= num_in
                assert family not in ASM_FAMILIES or blocks.rows * (tail or blocks.inner) >= 256 * blocks.num_warps


@pytest.mark.parametrize("blocks, num_in, is_packed, steps", [
    (DecodeBlocks(64, 16, 256, 4, 3), 2880, True, (128, 6)),  # 3 stages of 256 inputs: 64 rows of 5 bits, 16 tokens of 16
    (DecodeBlocks(64, 16, 128, 4, 6), 2880, False, (128, 12)),  # 15 would fit
    (DecodeBlocks(16, 16, 16, 4, 2), 8, False, (16, 2)),  # a matrix instruction takes 16 inputs
])
def test_steps_of_low_rank_rows_take_the_shared_memory_of_those_of_the_weight(blocks, num_in, is_packed, steps):
    assert low_rank_steps(blocks, num_in, torch.bfloat16, is_packed=is_packed) == steps


def compile_decode(arch, *, num_rows, num_in=2880, num_out=5760, num_experts=32, rank=0, is_packed=True, is_asm=True,
                   in_contiguous=True, weight_kind="bf16", flags=(), blocks=None, waits=None, in_one_launch=False):
    blocks = blocks or choose_decode_blocks(family_of(arch), torch.bfloat16, num_rows, num_experts, num_in, num_out,
                                            is_packed=is_packed)
    signature = {name: "i32" for name in moe_decode_kernel.arg_names if name.startswith(("stride", "num_"))} | {
        "x": "*bf16", "weight": ("*i16" if is_asm else "*i32") if is_packed else f"*{weight_kind}", "scales": "*i32",
        "out": "*bf16", "offsets": "*i32", "gather": "*i32", "bias": "*bf16", "low_rank": "*bf16", "lora_A": "*bf16",
        "lora_up": "*bf16" if in_one_launch else "*fp32", "ready": "*i32", "rank": "i32", "slice_rank": "i32",
        "lora_groups": "*i32", "scale": "fp32", "alpha": "fp32", "limit": "fp32", "one": "fp32",
    }  # fmt: skip
    rank_block = max(16, min(64, triton.next_power_of_2(rank)))
    constexprs = {
        "NUM_IN": num_in, "EXPERTS": triton.next_power_of_2(num_experts), "ROWS": blocks.rows, "TOKENS": blocks.tokens,
        "MORE": blocks.more, "INNER": blocks.inner,
        "TAIL": num_in % blocks.inner if is_packed else 0, "CHUNK": chunk_of(num_in), "RANK": rank_block,
        "RANK_STEPS": triton.cdiv(rank, rank_block), "IS_PACKED": is_packed, "IS_ASM": is_packed and is_asm,
        "IN_CONTIGUOUS": in_contiguous, "EVEN_IN": num_in % blocks.inner == 0, "EVEN_OUT": num_out % blocks.rows == 0,
    }  # fmt: skip
    constexprs |= {f"HAS_{flag}": flag in flags for flag in ("GATHER", "BIAS", "SCALE", "SWIGLU", "LORA_GROUPS")}
    low = low_rank_steps(blocks, num_in, torch.bfloat16, is_packed=is_packed) if in_one_launch else (0, 0)
    constexprs |= {"HAS_OFFSETS": num_experts > 1, "IS_SLICED": False, "LOW_INNER": low[0], "LOW_STAGES": low[1], "SPINS": True}
    constexprs |= {"MMA": mma_of(family_of(arch), torch.bfloat16, blocks), "OVERLAPS": waits is not None, "WAITS": waits or 0}
    del signature["stride_up_rank"]
    constexprs["stride_up_rank"] = 1
    divisible = tuple(name for name, kind in signature.items() if kind.startswith("*") or name.startswith("stride"))
    sizes = {"num_out": num_out, "rank": rank, "num_experts": num_experts}
    divisible += tuple(name for name, size in sizes.items() if size and size % 16 == 0)
    return compile_for(moe_decode_kernel, signature, constexprs, arch, num_warps=blocks.num_warps,
                       num_stages=blocks.num_stages, divisible=divisible)


GATE_UP, DOWN = dict(flags=("GATHER", "BIAS", "SWIGLU")), dict(num_out=2880, flags=("BIAS",))
USES = {
    "gate_up of 1 token": GATE_UP | dict(num_rows=4, rank=16),
    "gate_up of 64 tokens": GATE_UP | dict(num_rows=256, rank=32),
    "gate_up of 256 tokens": GATE_UP | dict(num_rows=1024, rank=16, waits=2),
    "gate_up of 512 tokens": GATE_UP | dict(num_rows=2048, rank=64),
    "gate_up of 512 tokens, 128 experts": GATE_UP | dict(num_rows=2048, num_experts=128),
    "down of 32 tokens": DOWN | dict(num_rows=128, rank=16),
    "down of 512 tokens": DOWN | dict(num_rows=2048, rank=16),
    "arithmetic": GATE_UP | dict(num_rows=128, rank=16, is_asm=False),
    "dense gate_up of 32 tokens": GATE_UP | dict(num_rows=128, is_packed=False, in_contiguous=False),
    "dense down of 512 tokens": DOWN | dict(num_rows=2048, is_packed=False, in_contiguous=False),
    "gate_up after the sort": GATE_UP | dict(num_rows=4, waits=0),
    "gate_up beside LoRA A": GATE_UP | dict(num_rows=4, rank=16, waits=2),
    "down after gate_up": DOWN | dict(num_rows=128, waits=1),
    "gate_up of 1 token and LoRA A": GATE_UP | dict(num_rows=4, rank=16, waits=0, in_one_launch=True),
    "gate_up of 512 tokens and LoRA A": GATE_UP | dict(num_rows=2048, rank=16, in_one_launch=True),
    "down of 32 tokens and LoRA A": DOWN | dict(num_rows=128, rank=64, waits=1, in_one_launch=True),
    "LoRA A after gate_up": dict(num_rows=4, num_out=16, is_packed=False, weight_kind="fp32", flags=("SCALE",), waits=1),
    "LoRA A of rank 16": dict(num_rows=128, num_out=16, is_packed=False, weight_kind="fp32", flags=("GATHER", "SCALE")),
    "LoRA A of rank 64, 1 token": dict(num_rows=4, num_out=64, is_packed=False, weight_kind="fp32", flags=("SCALE",)),
    "LoRA A of rank 64": dict(num_rows=2048, num_out=64, is_packed=False, weight_kind="fp32", flags=("SCALE",)),
}  # fmt: skip


OVERLAPPING = (90, 100)


@pytest.mark.parametrize("arch, use", [(arch, use) for arch in ARCHITECTURES for use in USES
                                       if arch in OVERLAPPING or "waits" not in USES[use]])
def test_kernels_fit_every_gpu(arch, use):
    is_asm = USES[use].get("is_asm", True) and family_of(arch) in ASM_FAMILIES
    resources = compile_decode(arch, **USES[use] | {"is_asm": is_asm})
    check_fits(resources, arch)
    assert resources.has_mma
    if USES[use].get("in_one_launch"):
        check_starts(resources)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_low_rank_rows_are_stored_by_all_threads_before_they_are_counted_and_loaded_after_the_wait(arch):
    use = USES["gate_up of 512 tokens and LoRA A"] | {"is_asm": family_of(arch) in ASM_FAMILIES}
    stores, counts, waits = compile_decode(arch, **use).ptx.partition("atom.global.gpu.release.add")
    assert counts and stores.rindex("st.global") < stores.rindex("bar.sync")
    first, *others = waits.split("ld.acquire.gpu")
    assert "ld.acquire" not in first and others
    for following in others:
        zero = re.search(r"mov\.b32\s+(%r\d+), 0;", following)[1]  # what _wait_until returns
        assert re.search(rf"\s%rd\d+, {zero}\b", following)  # a part of addresses


def test_code_for_an_older_gpu_is_assembled_for_this_one(monkeypatch):
    """What `pytest --as-capability 80` runs on a Hopper GPU."""
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm80")
    blocks = choose_decode_blocks("ampere", torch.bfloat16, 4, 32, 2816, 5760, is_packed=True)
    resources = compile_decode(90, num_rows=4, num_in=2816, blocks=blocks)
    assert resources.mma == {"HMMA"} and ".target sm_90a" in resources.ptx


@pytest.mark.parametrize("rows_of_expert", [most for most, *_ in _PACKED["hopper"].blocks])
@pytest.mark.parametrize("use", [GATE_UP, DOWN], ids=["gate_up", "down"])
@pytest.mark.parametrize("in_one_launch", [False, True])
def test_every_tile_of_hopper_fits_with_lora(use, rows_of_expert, in_one_launch):
    waits, num_rows = FOR_ALL if in_one_launch else FOR_LOW_RANK, int(32 * rows_of_expert)
    check_fits(compile_decode(90, **use, num_rows=num_rows, rank=16, waits=waits, in_one_launch=in_one_launch), 90)


@pytest.mark.parametrize("use", ["gate_up of 1 token", "gate_up of 256 tokens", "gate_up of 512 tokens", "down of 512 tokens",
                                 "arithmetic"])
def test_unpacking_waits_until_the_tensor_cores_have_read_the_step_before(use):
    """wgmma reads unpacked weights from registers: none may be under way when the next ones are written there."""
    ttgir = compile_decode(90, **USES[use]).ttgir
    waits = re.findall(r"warp_group_dot_wait .*?pendings = (\d+)", ttgir)
    assert "warp_group_dot" in ttgir and waits and set(waits) == {"0"}, waits


def word_layouts(ttgir):
    """The layout of the first operand, the words' halves, of every inline assembly."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.\w+<(.*)>$", ttgir, re.MULTILINE))
    used = re.findall(r"elementwise_inline_asm.*? : tensor<[\dx]+xi16, (#\w+)>", ttgir)
    assert used, "no inline assembly"
    return [layouts[name] for name in used]


def neighbours_share_a_thread(layout):
    """Whether a thread's registers hold elements of the last dimension two by two."""
    if linear := re.search(r"register = \[\[(.*?)\]", layout):
        return linear.group(1) == "0, 0, 0, 0, 0, 1"
    sizes, order = (re.search(rf"{name} = \[(.*?)\]", layout).group(1).split(", ") for name in ("sizePerThread", "order"))
    return int(sizes[-1]) >= 2 and order[0] == "5"


MMA_SYNC = [arch for arch in ARCHITECTURES if family_of(arch) in ("ampere", "consumer")]
# rows, tokens, inputs of a step, warps, stages: in all but the first, a warp has as many words of scales as threads
MMA_SYNC_TILES = [(32, 16, 128, 2, 4), (16, 16, 256, 1, 4), (32, 16, 128, 1, 4), (32, 16, 256, 2, 4), (64, 16, 128, 2, 4)]


@pytest.mark.parametrize("arch", MMA_SYNC)
@pytest.mark.parametrize("use", ["gate_up of 1 token", "gate_up of 512 tokens", "down of 32 tokens", "arithmetic",
                                 "dense gate_up of 32 tokens", "LoRA A of rank 16"])
def test_an_instruction_multiplies_16_inputs_in_a_row(arch, use):
    """As in grouped_gemm, whose bits sums must have."""
    assert compile_decode(arch, **USES[use]).operand_widths == {2}


@pytest.mark.parametrize("arch, blocks", [*((90, blocks) for blocks in MMA_SYNC_TILES), (80, (16, 16, 256, 1, 4))])
def test_tiles_in_no_table_for_mma_sync(arch, blocks):
    resources = compile_decode(arch, **DOWN, num_rows=4, blocks=DecodeBlocks(*blocks))
    assert resources.operand_widths == {2}
    for layout in word_layouts(resources.ttgir):
        assert neighbours_share_a_thread(layout), layout


@pytest.mark.parametrize("arch", MMA_SYNC)
def test_weights_of_few_tokens_stay_in_the_thread_that_unpacked_them(arch):
    """As on Hopper. For 32 tokens or more two warps share weights, which pass shared memory."""
    loop = max(product_loops(compile_decode(arch, **GATE_UP, num_rows=4, rank=16).sass), key=len)
    assert not any(re.search(r"\b(STS|STSM|SHFL)\b", text) for text in loop)
    assert len(loop) * 32 * 4 / (64 * 64) <= 4.0, f"{len(loop)} instructions for 32 weights of a thread"


def test_a_thread_without_a_whole_word_is_refused():
    """Inline assembly would take its second half from another word."""
    x, offsets = torch.empty(4, 2880, dtype=torch.bfloat16, device="meta"), torch.empty(33, dtype=torch.int32, device="meta")
    blocks, scales = (torch.empty(32, 64, 90, *size, dtype=torch.uint8, device="meta") for size in ((16,), ()))
    launches = []
    with kernels.device.recording(kernels.device.Gpu(80, 108), lambda *launched: launches.append(launched)):
        decode_projection(x, Projection(None, blocks, scales, None, True), offsets, blocks=DecodeBlocks(16, 16, 64, 4, 2))
        with pytest.raises(AssertionError, match="too many warps"):
            decode_projection(x, Projection(None, blocks, scales, None, True), offsets, blocks=DecodeBlocks(16, 16, 64, 8, 2))
        decode_projection(x, Projection(None, blocks, scales, None, False), offsets, blocks=DecodeBlocks(16, 16, 64, 8, 2))
    assert len(launches) == 2


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if family_of(arch) in ASM_FAMILIES])
@pytest.mark.parametrize("use", ["gate_up of 1 token", "gate_up of 512 tokens", "down of 32 tokens"])
def test_inline_assembly_is_given_both_halves_of_one_word(arch, use):
    """It takes elements two by two in the order of a thread's registers, which Triton chooses."""
    for layout in word_layouts(compile_decode(arch, **USES[use]).ttgir):
        assert neighbours_share_a_thread(layout), layout


@pytest.mark.parametrize("blocks, budget", [((64, 16, 64, 4, 4), 4.7), ((64, 16, 128, 4, 4), 3.7), ((128, 16, 64, 4, 4), 3.6),
                                            ((128, 32, 64, 4, 4), 3.6), ((128, 64, 64, 4, 3), 4.0)])
def test_instructions_per_weight_on_hopper(blocks, budget):
    """13 instructions unpack 8 weights, 2 more make their factors; the rest is loads, addresses and waits. At 4.3 TB/s there are
    4.1 issue slots per weight. The operand must not pass shared memory, which would show as stores."""
    blocks = DecodeBlocks(*blocks)
    resources = compile_decode(90, **GATE_UP, num_rows=4, rank=16, blocks=blocks)
    loop = max(product_loops(resources.sass), key=len)
    per_weight = len(loop) * 32 * blocks.num_warps / (blocks.rows * blocks.inner)
    assert per_weight <= budget
    assert not any(re.search(r"\b(STS|STSM|LDSM|SHFL)\b", text) for text in loop)
    assert sum("HGMMA" in text for text in loop) == blocks.inner // 16 * blocks.rows // (16 * blocks.num_warps)


def on_gpu(sizes, has_lora, dtype=torch.bfloat16):
    indices, packed, tensors = problem(*sizes)
    fp32 = ("weights", "A1", "B1", "A2", "B2")
    t = {name: value.to("cuda", torch.float32 if name in fp32 else dtype) for name, value in tensors.items()}
    packed = [tuple(tensor.cuda() for tensor in pair) for pair in packed]
    return indices.cuda(), packed, t


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", ["packed", "packed by arithmetic", "dense", "dense by rows"])
@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 32, 128, 256, 512])
def test_decode_equals_the_training_forward_bit_for_bit(num_tokens, has_lora, form):
    indices, packed, t = on_gpu((num_tokens, 32, 4, 2880, 2880, 16), has_lora)
    arguments, lora = operands(indices, packed, t, form.split(" by arithmetic")[0], has_lora=has_lora)
    if form == "packed by arithmetic":
        arguments = tuple(item._replace(unpacks_by_asm=False) if isinstance(item, Projection) else item for item in arguments)
    settings = dict(lora=lora, lora_scale=SCALE, alpha=ALPHA, limit=LIMIT)
    x, weights, routing, *_, residual = arguments
    dense = (Dense(dequantize(*pair, x.dtype).transpose(1, 2), t[bias]) for pair, bias in zip(packed, ("b1", "b2")))
    expected, _ = moe_forward(x, weights, routing, *dense, residual, scratch_bytes=0, keeps_h=False, **settings)
    for in_one_launch in (False, True) if has_lora else (False,):
        y = moe_decode(*arguments, **with_lora(lora, x, in_one_launch=in_one_launch))
        assert torch.equal(y, expected), f"{(y != expected).float().mean():.2%} of the values differ"


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("blocks", MMA_SYNC_TILES)
def test_no_tile_changes_a_bit(blocks):
    indices, packed, t = on_gpu((8, 32, 4, 2880, 2880, 16), False)
    (x, _, routing, gate_up, *_), _ = operands(indices, packed, t, "packed", has_lora=False)
    for is_asm in (gate_up.unpacks_by_asm, False):
        y, other = (decode_projection(x, gate_up._replace(unpacks_by_asm=is_asm), routing.offsets_device, gather=routing.tokens,
                                      blocks=choice) for choice in (None, DecodeBlocks(*blocks)))
        assert torch.equal(y, other), f"{(y != other).float().mean():.2%} of the values differ"


@pytest.mark.gpu
@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 64])
def test_overlapping_launches_change_no_bit(num_tokens, has_lora, monkeypatch):
    indices, packed, t = on_gpu((num_tokens, 32, 4, 2880, 2880, 16), has_lora)
    if gpu_family(t["x"]) not in ("hopper", "blackwell"):
        pytest.skip("launches overlap on compute capability 9.0 and later")
    arguments, lora = operands(indices, packed, t, "packed", has_lora=has_lora)
    ys = []
    for families in ((), (gpu_family(t["x"]),)):
        monkeypatch.setattr(kernels.device, "OVERLAP_FAMILIES", families)
        for in_one_launch in (False, True) if has_lora else (False,):
            ys += [moe_decode(*arguments, **with_lora(lora, arguments[0], in_one_launch=in_one_launch)) for _ in range(20)]
    assert all(torch.equal(y, ys[0]) for y in ys)


@pytest.mark.gpu
def test_error_is_that_of_rounding():
    indices, packed, t = on_gpu((64, 8, 4, 2880, 2880, 16), True)
    exact = {name: value.double() for name, value in t.items()}
    expected = composed(indices, packed, exact, has_lora=True)
    eager = composed(indices, packed, {name: value.to(torch.bfloat16) for name, value in t.items()}, has_lora=True)
    arguments, lora = operands(indices, packed, t, "packed", has_lora=True)
    y = moe_decode(*arguments, lora=lora, lora_scale=SCALE, alpha=ALPHA, limit=LIMIT)
    ours, theirs = (((value.double() - expected).norm() / expected.norm()).item() for value in (y, eager))
    assert ours <= 2 * theirs, (ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [4, 128])
def test_a_graph_replays_for_another_routing(num_experts):
    """Launches depend on shapes alone: new choices of experts, same number of tokens."""
    indices, packed, t = on_gpu((5, num_experts, 2, 96, 64, 8), False)
    arguments, _ = operands(indices, packed, t, "packed", has_lora=False)
    _, weights, routing, gate_up, *_ = arguments
    static = {name: getattr(routing, name).clone() for name in ("tokens", "offsets_device")}

    def run():
        return decode_projection(t["x"], gate_up, static["offsets_device"], gather=static["tokens"], swiglu=(ALPHA, LIMIT))

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    other = make_routing(indices.flip(0).roll(1, 1), num_experts=num_experts)
    for name, tensor in static.items():
        tensor.copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(y, run())
