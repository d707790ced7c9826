"""MXFP4 packing against a table written out by hand and against transformers' own dequantisation (golden fixture)."""


import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.packed.mxfp4 import dequantize, quantize

# OCP MX specification 1.0, table of E2M1: codes 0..15
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def all_codes_and_scales():
    """Every byte under every scale: blocks [256 scales, 16 blocks, 16 bytes], scales [256, 16]."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    return blocks, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_byte_under_every_scale_has_its_value(dtype):
    blocks, scales = all_codes_and_scales()
    weights = dequantize(blocks, scales, dtype)
    assert weights.shape == (256, 512) and weights.dtype == dtype
    expected = torch.empty(256, 512, dtype=torch.float64)
    for byte in range(256):
        for scale in range(256):
            factor = float("nan") if scale == 255 else 2.0 ** (scale - 127)
            expected[scale, 2 * byte] = E2M1[byte & 15] * factor
            expected[scale, 2 * byte + 1] = E2M1[byte >> 4] * factor
    torch.testing.assert_close(weights, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_negative_zero_keeps_its_sign():
    blocks = torch.full((1, 1, 16), 0x80, dtype=torch.uint8)  # low nibble +0, high nibble -0
    weights = dequantize(blocks, torch.full((1, 1), 127, dtype=torch.uint8), torch.bfloat16)
    assert torch.signbit(weights[0]).tolist() == [False, True] * 16


def test_float16_is_the_rounded_value_even_where_the_scale_does_not_exist():
    blocks = torch.full((1, 1, 16), 0x77, dtype=torch.uint8)  # 6
    scale = torch.tensor([[127 + 13]], dtype=torch.uint8)
    assert dequantize(blocks, scale, torch.float16)[0, 0].item() == 49152.0
    tiny = torch.tensor([[127 - 26]], dtype=torch.uint8)  # 2^-26 is 0 in float16, 6 * 2^-26 is not
    assert dequantize(blocks, tiny, torch.float16)[0, 0].item() == 2.0**-23  # 1.5 subnormal steps, ties to even


def test_dequantised_experts_equal_the_golden_ones():
    golden = load_file(FIXTURES / "tiny_mxfp4/golden.safetensors")["dequant.model.layers.1.mlp.experts.gate_up_proj"]
    tensors = {}
    for path in sorted((FIXTURES / "tiny_mxfp4").glob("model-*.safetensors")):
        tensors |= load_file(path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    weights = dequantize(tensors[name + "_blocks"], tensors[name + "_scales"], torch.float32)  # [E, out, in]
    assert weights.shape[1] != weights.shape[2]
    assert torch.equal(weights.transpose(1, 2), golden)


def test_values_on_the_grid_survive_a_round_trip_exactly():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 7, 5, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 250, (3, 7, 5), generator=generator, dtype=torch.uint8)
    blocks[0, 0, 0] = 0x11  # largest code 1: stored with a smaller scale
    blocks[0, 0, 1] = 0x80  # only zeros, of both signs
    weights = dequantize(blocks, scales, torch.float32)
    again = dequantize(*quantize(weights), torch.float32)
    assert torch.equal(again, weights)
    assert torch.equal(torch.signbit(again), torch.signbit(weights))


def test_bytes_survive_where_each_block_uses_its_range():
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (4, 6, 16), generator=generator, dtype=torch.uint8)
    blocks[..., 5] = 0x76  # a 6 and a 4 in every block
    scales = torch.randint(1, 250, (4, 6), generator=generator, dtype=torch.uint8)
    again_blocks, again_scales = quantize(dequantize(blocks, scales, torch.bfloat16))
    assert torch.equal(again_blocks, blocks) and torch.equal(again_scales, scales)


def test_rounding_goes_to_the_nearest_code_and_ties_to_the_even_one():
    block = torch.zeros(1, 32)
    block[0, :14] = torch.tensor([6, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, -0.75, -2.6, 0.74, 4.99])
    blocks, scales = quantize(block)
    assert scales.tolist() == [[127]]
    expected = [6, 0, 0.5, 1, 1, 2, 2, 4, 4, 6, -1, -3, 0.5, 4]
    assert dequantize(blocks, scales, torch.float32)[0, :14].tolist() == expected


def test_the_largest_value_of_a_block_never_saturates():
    block = torch.zeros(3, 32)
    block[0, 0], block[1, 0], block[2, 0] = 6.0, 6.01, 3.0
    blocks, scales = quantize(block)
    assert scales.flatten().tolist() == [127, 128, 126]
    assert dequantize(blocks, scales, torch.float32)[:, 0].tolist() == [6.0, 6.0, 3.0]
    weights = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    error = (dequantize(*quantize(weights), torch.float32) - weights).unflatten(-1, (-1, 32))
    scale = torch.exp2(quantize(weights)[1].float() - 127)
    assert (error.abs() <= scale[..., None]).all()  # the widest gap of the grid is 2, so half a gap is one scale


def test_weights_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match="multiple"):
        quantize(torch.zeros(2, 48))
    with pytest.raises(ValueError, match="NaN"):
        quantize(torch.tensor([[float("nan")] * 32]))
