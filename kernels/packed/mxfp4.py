"""MXFP4 (OCP microscaling 4-bit floats) to and from floating point, in the layout of the published gpt-oss checkpoints.

A block is 32 consecutive input elements of one output row: 16 bytes of codes and one scale byte.

    value = e2m1(code) * 2^(scale - 127)
    element 2j is the LOW nibble of byte j, element 2j + 1 the HIGH nibble
    e2m1: bit 3 is the sign, bits 0..2 index the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 (code 8 is -0.0)

Scale byte 255 is NaN (OCP MX 1.0, E8M0); the published checkpoints do not use it. Every other value is exact in
bfloat16 and float32 except 2^127 times 2 and more, which overflows to infinity.

The kernel unpacks 8 codes of a 32-bit word at a time: the three low bits of a code, moved to exponent and mantissa of an fp32,
are magnitude * 2^-126 exactly (0.5 as a subnormal), so two exact products, by 2^126 and by the scale, give the value.

Source: OCP Microscaling Formats (MX) Specification 1.0; nibble order and the [..., out, in / 32, 16] layout as in
openai/gpt-oss, gpt_oss/torch/weights.py.

Shapes: ... any leading dimensions (experts), O output features, I input features, N = I / 32 blocks of a row.
"""

import torch
import triton
import triton.language as tl

from kernels.device import cdiv, is_triton, launch

BLOCK_SIZE = 32  # elements that share one scale
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_WORDS, NUM_WARPS = 512, 4  # words of 8 codes per program


def _byte_values(device: torch.device) -> torch.Tensor:
    """The two elements of each of the 256 bytes, low nibble first: [256, 2] fp32."""
    codes = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES), dtype=torch.float32, device=device)  # [16]
    return torch.stack([codes.repeat(16), codes.repeat_interleave(16)], dim=1)


def _scale_values(device: torch.device) -> torch.Tensor:
    """2^(scale - 127) of each of the 256 scale bytes: [256] fp32, the last one NaN."""
    exponents = torch.arange(256, dtype=torch.float64, device=device) - 127
    values = torch.exp2(exponents).to(torch.float32)  # 2^-127 is a subnormal, exact
    values[255] = torch.nan
    return values


def dequantize_reference(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Needs 4 bytes of working memory per byte of `blocks`, besides the result; convert expert by expert if that is too much."""
    work_dtype = torch.float32 if dtype == torch.float16 else dtype  # 2^(scale - 127) itself may not exist in float16
    table = _byte_values(blocks.device).to(work_dtype)
    values = torch.nn.functional.embedding(blocks.int(), table)  # [..., O, N, 16, 2]
    factors = _scale_values(blocks.device).to(work_dtype)
    values *= torch.nn.functional.embedding(scales.int(), factors[:, None])[..., None]  # [..., O, N, 1, 1]
    return values.flatten(-3).to(dtype)


@triton.jit
def e2m1_to_fp32(codes):
    """The values of 4-bit codes (int32, higher bits 0) in fp32."""
    bits = ((codes & 8) << 28) | ((codes & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def e8m0_to_fp32(scales):
    """2^(scale - 127) of scale bytes in fp32; 0 stands for the subnormal 2^-127 and 255 for NaN."""
    scales = scales.to(tl.int32)
    bits = tl.where(scales == 0, 1 << 22, tl.where(scales == 255, 0x7FC00000, scales << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _dequantize_kernel(words_ptr, scales_ptr, out_ptr, num_words, BLOCK_WORDS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK_WORDS
    index = tl.arange(0, BLOCK_WORDS)
    mask = index < num_words - first
    words = tl.load(words_ptr + first + index, mask=mask, other=0)
    scales = tl.load(scales_ptr + (first // 4) + index // 4, mask=mask, other=0)  # 4 words share a scale
    slots = tl.arange(0, 8)
    codes = (words[:, None] >> (4 * slots)[None, :]) & 15  # [BLOCK_WORDS, 8], the low nibble of the low byte first
    values = e2m1_to_fp32(codes) * e8m0_to_fp32(scales)[:, None]
    offsets = 8 * index[:, None] + slots[None, :]
    tl.store(out_ptr + 8 * first + offsets, values.to(out_ptr.dtype.element_ty), mask=mask[:, None])


def dequantize_experts(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes the weights of packed blocks [..., O, N, 16] uint8 with scales [..., O, N] uint8 into out [..., O, I], contiguous,
    fp32, bf16 or fp16, and returns it. Memory besides `out`: none on a GPU."""
    assert blocks.dtype == scales.dtype == torch.uint8, f"blocks {blocks.dtype}, scales {scales.dtype}: both must be uint8"
    assert blocks.shape == (*scales.shape, BLOCK_SIZE // 2), f"blocks {blocks.shape} do not fit scales {scales.shape}"
    shape = (*scales.shape[:-1], scales.shape[-1] * BLOCK_SIZE)
    assert out.shape == shape and out.is_contiguous(), f"out {out.shape}, strides {out.stride()}: contiguous {shape} needed"
    if not is_triton(blocks):
        return out.copy_(dequantize_reference(blocks, scales, out.dtype))
    if out.dtype not in KERNEL_DTYPES:
        raise ValueError(f"dequantize: dtype {out.dtype}; on a GPU one of {', '.join(map(str, KERNEL_DTYPES))}")
    assert blocks.device == scales.device == out.device, f"blocks, scales, out: {blocks.device}, {scales.device}, {out.device}"
    num_words = blocks.numel() // 4
    if num_words:
        words = blocks.contiguous().view(torch.int32)
        launch(_dequantize_kernel, (cdiv(num_words, BLOCK_WORDS),), words, scales.contiguous(), out, num_words,
               BLOCK_WORDS=BLOCK_WORDS, num_warps=NUM_WARPS)
    return out


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights that packed blocks stand for.

    blocks: [..., O, N, 16] uint8, two elements a byte. scales: [..., O, N] uint8.
    Returns [..., O, I] of `dtype`, contiguous, on the device of `blocks`: output rows first, so a matrix applies as
    x @ w.T (the bf16 checkpoint form is the transpose, [..., I, O]). float16 holds only part of the range: small values
    round to 0. float64 on the CPU only.
    """
    shape = (*blocks.shape[:-2], blocks.shape[-2] * BLOCK_SIZE)
    return dequantize_experts(blocks, scales, torch.empty(shape, dtype=dtype, device=blocks.device))


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs weights into MXFP4: the inverse of `dequantize`, with rounding.

    weight: [..., O, I] floating point, finite, I a multiple of 32.
    Returns blocks [..., O, N, 16] uint8 and scales [..., O, N] uint8.

    Rounding: the scale of a block is the smallest power of two at which its largest magnitude is at most 6
    (2^ceil(log2(amax / 6)), the "round up" rule: nothing saturates), then each element goes to the nearest code, ties
    to the even code. Values that are already on a block's grid come back exactly, though a block whose largest code
    was at most 3 is stored with a smaller scale and so with other bytes. An all-zero block has scale byte 0.
    """
    num_inputs = weight.shape[-1]
    if num_inputs % BLOCK_SIZE != 0:
        raise ValueError(f"MXFP4 packs blocks of {BLOCK_SIZE} inputs: {num_inputs} of {weight.shape} is no multiple")
    if not torch.isfinite(weight).all():
        raise ValueError("MXFP4 cannot hold infinite or NaN weights")
    values = weight.float().contiguous().unflatten(-1, (-1, BLOCK_SIZE))  # [..., O, N, 32]
    magnitudes = values.abs()
    amax = magnitudes.amax(-1)  # [..., O, N]
    # amax = fraction * 2^exponent, fraction in [0.5, 1), and 6 = 0.75 * 2^3: exact, where log2(amax / 6) would round
    fraction, exponent = torch.frexp(amax)
    shift = torch.where(fraction <= 0.75, exponent - 3, exponent - 2)
    scales = torch.where(amax > 0, (shift + 127).clamp(0, 254), 0).to(torch.uint8)
    magnitudes = magnitudes * torch.exp2(127.0 - scales.double()).float()[..., None]

    grid = torch.tensor(MAGNITUDES, dtype=torch.float32, device=weight.device)
    midpoints = (grid[:-1] + grid[1:]) / 2  # [7]; midpoint i lies between codes i and i + 1
    # bucketize sends a midpoint to the lower code; where the upper one is even, move the boundary just below it
    midpoints[1::2] = torch.nextafter(midpoints[1::2], torch.zeros_like(midpoints[1::2]))
    codes = torch.bucketize(magnitudes, midpoints, out_int32=True).to(torch.uint8)
    codes |= torch.signbit(values).to(torch.uint8) << 3
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)  # [..., O, N, 16]
    return blocks.contiguous(), scales
