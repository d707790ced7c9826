"""NF4: the code's values against their definition, every byte in the interpreter and on a GPU, and compiled for every GPU."""

import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for, half

from kernels.packed.nf4 import (
    BLOCK_WORDS,
    CODE,
    NUM_WARPS,
    _dequantize_nf4_kernel,
    dequantize_nf4,
    dequantize_nf4_reference,
)


def every_byte(device="cpu"):
    """Codes [3, 4, 192]: each byte, in an order of its own per matrix, in rows of 384 elements; absmax [3, 24] of mixed sizes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randperm(256, generator=generator).repeat(3) for _ in range(3)]).to(torch.uint8).view(3, 4, 192)
    absmax = torch.rand(3, 24, generator=generator) * torch.tensor([1e-3, 1.0, 300.0])[:, None]
    return codes.to(device), absmax.to(device)


def expected_weights(codes, absmax) -> torch.Tensor:
    """One element after the other: the high nibble of a byte first, 64 elements of a matrix to an absmax. fp32."""
    matrices = []
    for matrix, factors in zip(codes.flatten(1).tolist(), absmax.tolist()):
        nibbles = [nibble for byte in matrix for nibble in (byte // 16, byte % 16)]
        values = torch.tensor([CODE[nibble] for nibble in nibbles])
        matrices.append(values * torch.tensor([factors[i // 64] for i in range(len(nibbles))]))
    return torch.stack(matrices).view(*codes.shape[:2], 2 * codes.shape[2])


def dequantized(codes, absmax, dtype):
    return dequantize_nf4(codes, absmax, torch.empty(*codes.shape[:2], 2 * codes.shape[2], dtype=dtype, device=codes.device))


def test_the_code_is_that_of_the_paper():
    """Quantiles of the normal distribution, eight on the right and seven on the left of 0, scaled to 1 (QLoRA, section 3; the
    offset is that of bitsandbytes, functional.py: create_normal_map)."""
    sides = [torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1]) for n in (9, 8)]
    values = torch.cat([sides[0], torch.zeros(1), -sides[1]]).sort().values
    torch.testing.assert_close(torch.tensor(CODE, dtype=torch.float64), values / values.max(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_gives_each_element_its_value(dtype):
    codes, absmax = every_byte()
    assert torch.equal(dequantize_nf4_reference(codes, absmax, dtype), expected_weights(codes, absmax).to(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows, width", [(4, 192), (64, 12), (1, 768)])  # blocks within a row, and over several
def test_every_byte_has_its_value_to_the_bit(dtype, rows, width, poisoned):
    codes, absmax = every_byte()
    codes = codes.view(3, rows, width)
    assert torch.equal(dequantized(codes, absmax, dtype), expected_weights(codes, absmax).to(dtype))


@pytest.mark.interpreter
def test_some_experts_of_many_fill_a_part_of_the_last_program():
    codes, absmax = (tensor.repeat(3, *[1] * (tensor.ndim - 1)) for tensor in every_byte())
    assert torch.equal(dequantized(codes[2:7], absmax[2:7], torch.float32), expected_weights(codes[2:7], absmax[2:7]))


def check_experts_without_rows(device):
    codes, absmax = (tensor.repeat(2, *[1] * (tensor.ndim - 1)).to(device) for tensor in every_byte())
    out = torch.full((6, 4, 384), 7.0, device=device)
    dequantize_nf4(codes, absmax, out, offsets=torch.tensor([0, 0, 2, 2, 3, 3, 9], dtype=torch.int32, device=device))
    expected = expected_weights(codes.cpu(), absmax.cpu())
    for expert, has_rows in enumerate([False, True, False, True, False, True]):
        assert torch.equal(out[expert].cpu(), expected[expert] if has_rows else torch.full((4, 384), 7.0)), expert


@pytest.mark.interpreter
def test_experts_without_rows_are_left_alone():
    check_experts_without_rows("cpu")


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernel_fits_every_gpu(arch):
    signature = {"words_ptr": "*i32", "absmax_ptr": "*fp32", "code_ptr": "*fp32", "offsets_ptr": "*i32", "out_ptr": half(arch),
                 "num_words": "i32"}
    for has_offsets in (False, True):
        constexprs = {"BLOCK_WORDS": BLOCK_WORDS, "HAS_OFFSETS": has_offsets}
        check_fits(compile_for(_dequantize_nf4_kernel, signature, constexprs, arch, num_warps=NUM_WARPS, num_stages=3), arch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_has_its_value_to_the_bit_on_a_gpu(dtype, poisoned):
    codes, absmax = every_byte("cuda")
    assert torch.equal(dequantized(codes, absmax, dtype).cpu(), expected_weights(codes.cpu(), absmax.cpu()).to(dtype))


@pytest.mark.gpu
def test_experts_without_rows_are_left_alone_on_a_gpu():
    check_experts_without_rows("cuda")


@pytest.mark.gpu
def test_a_layer_of_the_real_size_has_the_references_bits_on_a_gpu():
    generator = torch.Generator("cuda").manual_seed(1)
    codes = torch.randint(0, 256, (32, 2880, 1440), generator=generator, dtype=torch.uint8, device="cuda")
    absmax = torch.rand(32, 2880 * 45, generator=generator, device="cuda")
    ours = dequantized(codes, absmax, torch.bfloat16)
    for expert in (0, 17, 31):
        assert torch.equal(ours[expert], dequantize_nf4_reference(codes[expert], absmax[expert], torch.bfloat16))
