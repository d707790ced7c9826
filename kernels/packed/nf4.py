"""NF4 (4-bit NormalFloat, QLoRA, arXiv 2305.14314) to and from floating point, in the packing of bitsandbytes.

A block is 64 consecutive elements of a matrix [O, I], its rows one after the other: 32 bytes of codes and one fp32 absmax. If I
is no multiple of 64, a block may have elements of two rows.

    value = CODE[code] * absmax, in fp32, rounded once
    element 2j is the HIGH nibble of byte j, element 2j + 1 the LOW (MXFP4 has them the other way round)

Source: bitsandbytes, functional.py (code values, nibbles); formats with double quantisation are resolved when a checkpoint is
read (models/formats/bitsandbytes.py).

Shapes: ... any leading dimensions (experts), O output features, I input features.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from kernels.device import cdiv, is_triton, launch

BLOCK_SIZE = 64  # elements that share one absmax
CODE = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_WORDS, NUM_WARPS = 512, 4  # words of 8 codes per program


@cache
def _code_values(device: torch.device) -> torch.Tensor:
    return torch.tensor(CODE, dtype=torch.float32, device=device)  # [16]


def dequantize_nf4_reference(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    nibbles = torch.stack([codes >> 4, codes & 15], -1).flatten(-2)  # [..., O, I]
    values = torch.nn.functional.embedding(nibbles.int(), _code_values(codes.device)[:, None])
    scaled = values.reshape(*absmax.shape, BLOCK_SIZE) * absmax[..., None]
    return scaled.to(dtype).view(nibbles.shape)


@triton.jit
def _dequantize_nf4_kernel(words_ptr, absmax_ptr, code_ptr, offsets_ptr, out_ptr, num_words, BLOCK_WORDS: tl.constexpr,
                           HAS_OFFSETS: tl.constexpr):
    """num_words words of each matrix; with offsets only of experts that have rows."""
    matrix, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_WORDS
    if HAS_OFFSETS:
        if tl.load(offsets_ptr + matrix + 1) == tl.load(offsets_ptr + matrix):
            return
    first = matrix * num_words + start
    index = tl.arange(0, BLOCK_WORDS)
    mask = index < num_words - start
    words = tl.load(words_ptr + first + index, mask=mask, other=0)
    absmax = tl.load(absmax_ptr + first // 8 + index // 8, mask=mask, other=0.0)  # 8 words share one
    slots = tl.arange(0, 8)
    shifts = 8 * (slots // 2) + 4 * (1 - slots % 2)  # the high nibble of the low byte first
    values = tl.load(code_ptr + ((words[:, None] >> shifts[None, :]) & 15)) * absmax[:, None]  # [BLOCK_WORDS, 8]
    offsets = 8 * index[:, None] + slots[None, :]
    tl.store(out_ptr + 8 * first + offsets, values.to(out_ptr.dtype.element_ty), mask=mask[:, None])


def dequantize_nf4(codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor, *,
                   offsets: torch.Tensor | None = None) -> torch.Tensor:
    """Writes the weights of codes [..., O, I / 2] uint8 with absmax [..., O * I / 64] fp32 into out [..., O, I], contiguous,
    fp32, bf16 or fp16, and returns it. Memory besides `out`: none on a GPU.

    offsets [E + 1] int32: only experts of [E, O, I] that own a routed row are written; Triton only."""
    assert codes.dtype == torch.uint8 and absmax.dtype == torch.float32, f"codes {codes.dtype}, absmax {absmax.dtype}"
    assert absmax.shape == (*codes.shape[:-2], 2 * codes.shape[-2] * codes.shape[-1] // BLOCK_SIZE), (codes.shape, absmax.shape)
    assert 2 * codes.shape[-2] * codes.shape[-1] % BLOCK_SIZE == 0, f"{codes.shape}: not a whole number of blocks"
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    assert out.shape == shape and out.is_contiguous(), f"out {out.shape}, strides {out.stride()}: contiguous {shape} needed"
    assert offsets is None or codes.ndim == 3 and offsets.shape == (len(codes) + 1,), "offsets are those of codes' experts"
    if not is_triton(codes):
        assert offsets is None, "the reference dequantises all experts"
        return out.copy_(dequantize_nf4_reference(codes, absmax, out.dtype))
    if out.dtype not in KERNEL_DTYPES:
        raise ValueError(f"dequantize_nf4: dtype {out.dtype}; on a GPU one of {', '.join(map(str, KERNEL_DTYPES))}")
    assert codes.device == absmax.device == out.device, f"codes, absmax, out: {codes.device}, {absmax.device}, {out.device}"
    num_words, num_matrices = codes.shape[-2] * codes.shape[-1] // 4, codes.shape[:-2].numel()
    if num_words and num_matrices:
        words = codes.contiguous().view(torch.int32)
        launch(_dequantize_nf4_kernel, (cdiv(num_words, BLOCK_WORDS), num_matrices), words, absmax.contiguous(),
               _code_values(codes.device), offsets, out, num_words, BLOCK_WORDS=BLOCK_WORDS, HAS_OFFSETS=offsets is not None,
               num_warps=NUM_WARPS)
    return out


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs weights into NF4: the inverse of `dequantize_nf4`, with rounding.

    weight: [..., O, I] floating point, finite, I even and O * I a multiple of 64.
    Returns codes [..., O, I / 2] uint8 and absmax [..., O * I / 64] fp32, the largest magnitude of each block. Each element goes
    to the nearest value of the code; if two are equally near, to the lower one. A block of zeros has absmax 0.
    """
    size_out, size_in = weight.shape[-2:]
    if size_in % 2 or size_out * size_in % BLOCK_SIZE:
        raise ValueError(f"NF4 packs two elements of a row into a byte and {BLOCK_SIZE} of a matrix into a block: a matrix of "
                         f"{size_out} x {size_in} is no whole number of them")
    if not torch.isfinite(weight).all():
        raise ValueError("NF4 cannot hold infinite or NaN weights")
    values = weight.float().contiguous().view(*weight.shape[:-2], -1, BLOCK_SIZE)
    absmax = values.abs().amax(-1)  # [..., O * I / 64]
    scaled = values / torch.where(absmax > 0, absmax, 1.0)[..., None]
    code = _code_values(weight.device)
    nibbles = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    nibbles = nibbles.view(*weight.shape[:-1], size_in // 2, 2)
    return (nibbles[..., 0] << 4 | nibbles[..., 1]).contiguous(), absmax
