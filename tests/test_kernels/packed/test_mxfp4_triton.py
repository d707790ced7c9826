"""The MXFP4 kernel: every byte under every scale in the interpreter and on a GPU, and compiled for every GPU."""

import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for, half

from kernels.packed.mxfp4 import (
    BLOCK_WORDS,
    NUM_WARPS,
    _dequantize_kernel,
    dequantize,
    dequantize_experts,
    dequantize_reference,
)

# OCP MX specification 1.0, table of E2M1: codes 0..15
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def all_codes_and_scales(device="cpu"):
    """Every byte under every scale: blocks [256 scales, 16 blocks, 16 bytes], scales [256, 16]."""
    blocks = torch.arange(256, dtype=torch.uint8, device=device).view(16, 16).expand(256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8, device=device)[:, None].expand(256, 16).contiguous()
    return blocks, scales


def expected_weights() -> torch.Tensor:
    """Their values [256, 512] in float64, one by one."""
    rows = []
    for scale in range(256):
        factor = float("nan") if scale == 255 else 2.0 ** (scale - 127)
        rows.append([E2M1[code] * factor for byte in range(256) for code in (byte & 15, byte >> 4)])
    return torch.tensor(rows, dtype=torch.float64)


def assert_same_bits(actual, expected):
    assert torch.equal(torch.isnan(actual), torch.isnan(expected))
    same = actual.view(BITS[actual.dtype]) == expected.view(BITS[expected.dtype])
    assert (same | torch.isnan(expected)).all()


def random_experts(*shape, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 250, shape, generator=generator, dtype=torch.uint8)
    return blocks.to(device), scales.to(device)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # its bfloat16 loses subnormals
def test_every_byte_under_every_scale_has_its_value_to_the_bit(dtype):
    assert_same_bits(dequantize(*all_codes_and_scales(), dtype), expected_weights().to(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 127, 1), (0, 4, 2)])
def test_a_given_buffer_is_filled_whatever_its_size(shape):
    blocks, scales = random_experts(*shape)
    expected = dequantize_reference(blocks, scales, torch.float32)
    guarded = torch.full((expected.numel() + 40,), torch.nan)
    out = guarded[: expected.numel()].view(expected.shape)
    assert dequantize_experts(blocks, scales, out) is out
    assert_same_bits(out, expected)
    assert torch.isnan(guarded[expected.numel() :]).all()


@pytest.mark.interpreter
def test_some_of_the_experts_and_strided_blocks():
    blocks, scales = random_experts(4, 6, 3)
    expected = dequantize_reference(blocks, scales, torch.float32)
    out = torch.full((2, 6, 96), torch.nan)
    assert_same_bits(dequantize_experts(blocks[1:3], scales[1:3], out), expected[1:3])
    assert_same_bits(dequantize(blocks[:, ::2], scales[:, ::2], torch.float32), expected[:, ::2].contiguous())


@pytest.mark.interpreter
def test_a_dtype_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="float64"):
        dequantize(*random_experts(1, 1, 1), torch.float64)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernel_fits_every_gpu_and_keeps_subnormals(arch):
    signature = {"words_ptr": "*i32", "scales_ptr": "*u8", "out_ptr": half(arch), "num_words": "i32"}
    resources = compile_for(
        _dequantize_kernel,
        signature,
        {"BLOCK_WORDS": BLOCK_WORDS},
        arch,
        num_warps=NUM_WARPS,
        num_stages=3,
        divisible=tuple(signature),
    )
    check_fits(resources, arch)
    assert "STG.E.128" in resources.sass and "FMUL" in resources.sass
    assert "FMUL.FTZ" not in resources.sass  # would flush the code of 0.5, and small scales


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BITS)
def test_every_byte_under_every_scale_has_its_value_to_the_bit_on_a_gpu(dtype):
    assert_same_bits(dequantize(*all_codes_and_scales("cuda"), dtype).cpu(), expected_weights().to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(32, 5760, 90), (3, 127, 1)])
def test_experts_of_real_size_equal_the_reference(shape):
    blocks, scales = random_experts(*shape, device="cuda")
    out = torch.full((*shape[:-1], 32 * shape[-1]), torch.nan, dtype=torch.bfloat16, device="cuda")
    dequantize_experts(blocks, scales, out)
    for expert in range(shape[0]):
        assert_same_bits(out[expert], dequantize_reference(blocks[expert], scales[expert], torch.bfloat16))
