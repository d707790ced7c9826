"""MXFP4 in fragment layout: against the definition, back again, and every byte under every scale through the kernels."""

import re

import pytest
import torch
from aot import ARCHITECTURES, check_fits, compile_for

from kernels.device import family_of
from kernels.packed.fragments import (
    ASM_FAMILIES,
    DEQUANTIZE_GROUPS,
    NUM_WARPS,
    UNPACK,
    _dequantize_fragments_kernel,
    chunk_of,
    dequantize_fragments,
    from_fragments,
    is_foldable,
    to_fragments_,
)
from kernels.packed.mxfp4 import dequantize

SHAPES = [(2, 16, 32), (1, 32, 64), (3, 48, 96), (2, 16, 192)]


def packed(num_experts, num_out, num_in, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (num_experts, num_out, num_in // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(0, 256, blocks.shape[:3], generator=generator, dtype=torch.uint8)


def every_byte_under_every_scale():
    """Row i has scale i: blocks [1, 256, 16, 16], scales [1, 256, 16]."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(1, 256, 16, 16)
    return blocks, torch.arange(256, dtype=torch.uint8).view(1, 256, 1).repeat(1, 1, 16)


def in_fragments(blocks, scales):
    blocks, scales = blocks.clone(), scales.clone()
    to_fragments_(blocks, scales)
    return blocks, scales


def assert_same_bits(actual, expected):
    kind = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    assert bool(((actual.view(kind) == expected.view(kind)) | (actual.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_way_back_is_exact(shape):
    pair = packed(*shape)
    moved = in_fragments(*pair)
    assert not torch.equal(moved[0], pair[0])
    back = from_fragments(*moved)
    assert torch.equal(back[0], pair[0]) and torch.equal(back[1], pair[1])


def test_a_code_lands_where_its_thread_unpacks_it():
    """Code 15 (-6) alone, at row 16 + 2g + h and input 64 + 16 step + 8r + 2c + o, and the one word that changes."""
    # code j = h + 2r of half o: the bits of the sign, of both exponent bits and of the mantissa
    bits = {(0, 0): 0x000081C0, (0, 1): 0x81C00000, (1, 0): 0x0000081C, (1, 1): 0x081C0000, (2, 0): 0x70000020,
            (2, 1): 0x00207000, (3, 0): 0x00020601, (3, 1): 0x06010002}
    for g, c, step, h, r, o in [(0, 0, 0, 0, 0, 0), (3, 1, 2, 0, 0, 1), (7, 3, 3, 1, 0, 0), (5, 2, 1, 1, 0, 1),
                                (1, 1, 1, 0, 1, 0), (2, 3, 0, 0, 1, 1), (6, 0, 2, 1, 1, 0), (4, 2, 3, 1, 1, 1)]:
        blocks, scales = torch.zeros(1, 32, 4, 16, dtype=torch.uint8), torch.zeros(1, 32, 4, dtype=torch.uint8)
        row, column = 16 + 2 * g + h, 64 + 16 * step + 8 * r + 2 * c + o
        blocks[0, row, column // 32, column % 32 // 2] = 15 << 4 * o
        scales[0, row, column // 32] = 7
        to_fragments_(blocks, scales)
        words = blocks.view(-1).view(torch.int32).long() & 0xFFFFFFFF
        word = ((1 * 2 + 1) * 32 + 4 * g + c) * 4 + step  # [row group, chunk, thread, step]
        assert words[word] == bits[h + 2 * r, o] and (words != 0).sum() == 1
        assert scales.view(-1)[((1 * 2 + 1) * 8 + g) * 4 + column % 64 // 32 * 2 + h] == 7


def run_unpack(word, even, odd):
    """The four results of UNPACK, by the meaning of its instructions on 32-bit integers; a product as [low, high] fp32."""
    values = {"$4": word, "$5": even, "$6": even, "$7": odd, "$8": odd}
    mask, results = 0xFFFFFFFF, {}

    def value(name):
        return values[name] if name in values else int(name, 0)

    def halves(pair):
        return torch.tensor([pair << 16 & mask, pair & 0xFFFF0000]).to(torch.uint32).view(torch.float32)

    for operation, target, *sources in re.findall(r"^([a-z]\S*) (\S+), ([^,;]+)(?:, ([^,;]+))?(?:, ([^,;]+))?(?:, ([^,;]+))?;",
                                                  UNPACK.value, re.MULTILINE):
        sources = [value(source) for source in sources if source]
        match operation:
            case "mov.b32":
                values[target] = sources[0]
            case "and.b32":
                values[target] = sources[0] & sources[1]
            case "shl.b32":
                values[target] = sources[0] << sources[1] & mask
            case "shf.l.wrap.b32":
                assert sources[0] == sources[1]
                values[target] = (sources[0] << sources[2] | sources[0] >> 32 - sources[2]) & mask
            case "lop3.b32":  # 0xEA: (a & b) | c
                assert sources[3] == 0xEA
                values[target] = sources[0] & sources[1] | sources[2]
            case "fma.rn.bf16x2":
                assert sources[2] == 0x80008000  # -0, -0
                results[target] = halves(sources[0]) * halves(sources[1])
            case _:
                raise AssertionError(operation)
    return torch.stack([results[f"${code}"] for code in range(4)])


def test_the_inline_assembly_unpacks_every_code():
    pair = packed(1, 16, 64, seed=1)
    pair[1].remainder_(129)
    expected = dequantize(*pair, torch.float32).view(8, 2, 4, 2, 4, 2)  # [g, h, step, r, c, o]
    blocks, scales = in_fragments(*pair)
    words = (blocks.view(-1).view(torch.int32).long() & 0xFFFFFFFF).view(8, 4, 4)  # [g, c, step]
    factors = ((scales.view(8, 2, 2).long() << 7) + 0x3F00) * 0x10001  # [g, block, h]
    for g in range(8):
        for c in range(4):
            for step in range(4):
                result = run_unpack(words[g, c, step].item(), *factors[g, step // 2].tolist())  # [h + 2r, o]
                assert_same_bits(result.view(2, 2, 2), expected[g, :, step, :, c].transpose(0, 1).contiguous())


def test_rows_that_fill_no_tile_are_refused():
    with pytest.raises(ValueError, match="16 output rows: 24"):
        to_fragments_(*packed(1, 24, 32))


def test_scales_above_two_do_not_fold():
    assert is_foldable(torch.tensor([0, 128], dtype=torch.uint8)) and not is_foldable(torch.tensor([129], dtype=torch.uint8))


def test_the_reference_unpacks_what_the_checkpoint_held():
    pair = packed(2, 32, 96)
    out = torch.empty(2, 32, 96)
    assert_same_bits(dequantize_fragments(*in_fragments(*pair), out, is_asm=False), dequantize(*pair, torch.float32))


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_unpacks_what_the_checkpoint_held(shape):
    pair = packed(*shape)
    expected = dequantize(*pair, torch.float32)
    assert_same_bits(dequantize_fragments(*in_fragments(*pair), torch.full_like(expected, torch.nan), is_asm=False), expected)


@pytest.mark.interpreter
def test_the_kernel_knows_every_byte_under_every_scale():
    pair = every_byte_under_every_scale()
    expected = dequantize(*pair, torch.float32)
    assert_same_bits(dequantize_fragments(*in_fragments(*pair), torch.full_like(expected, torch.nan), is_asm=False), expected)


@pytest.mark.parametrize("is_asm", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernel_fits_every_gpu(arch, is_asm):
    if is_asm and family_of(arch) not in ASM_FAMILIES:
        return
    signature = {"words": "*i16" if is_asm else "*i32", "scales": "*i32", "out": "*bf16", "num_groups": "i32",
                 "num_chunks": "i32"}
    constexprs = {"GROUPS": DEQUANTIZE_GROUPS, "CHUNK": chunk_of(2880), "IS_ASM": is_asm}
    check_fits(compile_for(_dequantize_fragments_kernel, signature, constexprs, arch, num_warps=NUM_WARPS, num_stages=3), arch)


def test_the_kernel_compiles_for_rows_of_one_chunk():
    """A launch passes the number 1 as a constant."""
    signature = {"words": "*i16", "scales": "*i32", "out": "*bf16", "num_groups": "i32"}
    constexprs = {"num_chunks": 1, "GROUPS": DEQUANTIZE_GROUPS, "CHUNK": 64, "IS_ASM": True}
    check_fits(compile_for(_dequantize_fragments_kernel, signature, constexprs, 90, num_warps=NUM_WARPS, num_stages=3), 90)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype, is_asm", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
def test_a_gpu_knows_every_byte_under_every_scale(dtype, is_asm):
    rows = slice(0, 128 if is_asm else 256)
    pair = tuple(tensor[:, rows].contiguous().cuda() for tensor in every_byte_under_every_scale())
    expected = dequantize(*pair, dtype)
    assert_same_bits(dequantize_fragments(*in_fragments(*pair), torch.full_like(expected, torch.nan), is_asm=is_asm), expected)
