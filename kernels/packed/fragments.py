"""MXFP4 weights in the layout that tensor cores take: the checkpoint's bits, permuted in place.

The unit is a tile of 16 output rows x C inputs (C = 64, or 32 where the width is no multiple of 64). Thread (g, c), g < 8, c < 4,
of a warp holds of each 16 x 16 step of the MMA's weight operand (mma.m16n8k16 and wgmma.m64nNk16 alike) 8 elements:
    row 2g + h, input 8r + 2c + o,  h, r, o in {0, 1}          (MMA row 8h + g holds row 2g + h of the 16: see below)
and they are one 32-bit word here. Bytes are in the order [E, O / 16, I / C, g, c, C / 16 steps, 4], so a thread loads the words
of a whole tile at once, and scales in the order [E, O / 16, I / C, g, C / 32, h]. Putting rows 2g and 2g + 1 on MMA rows g and
8 + g leaves gate and up of gpt-oss, which alternate, in one thread's accumulators.

Inside a word the codes lie so that few instructions make bfloat16 pairs (o = 0 low, o = 1 high) of them: bits S at 15 and EEM at
8..6 of a half are value * 2^-126 as a bfloat16. Code j = h + 2r goes to the halves of rotate_left(word, ROTATIONS[j]); only the
last one needs two rotations. 9 instructions give 8 weights, 4 more multiply them by 2^(scale - 1), which takes back 2^-126 and
needs scale <= 128 (a factor of at most 2; the published checkpoints stay far below). Other scales take the arithmetic form.

The order of the values in an MMA step stays the checkpoint's, so products are bit for bit those of dequantised weights.

Shapes: E experts, O output features (a multiple of 16), I inputs (a multiple of 32), N = I / 32 blocks of a row.
"""

import torch
import triton
import triton.language as tl

from kernels.device import cdiv, gpu_family, is_triton, launch
from kernels.packed.mxfp4 import BLOCK_SIZE, KERNEL_DTYPES, dequantize_reference, e8m0_to_fp32

ASM_FAMILIES = ("ampere", "consumer", "hopper")
ROWS = 16  # rows of a tile
MAX_FOLDED_SCALE = 128  # 2^126 times the scale is a finite bfloat16 up to here
# left rotations that bring sign, exponent and mantissa of code j = h + 2r to their places
ROTATIONS = ((0, 0, 0), (4, 4, 4), (10, 10, 10), (30, 30, 6))
DEQUANTIZE_GROUPS, NUM_WARPS = 4, 4  # groups of 16 rows per program

# $0..$3: bfloat16 pairs of codes 0..3; $4: word; $5 = $6, $7 = $8: factors of rows h = 0 and 1. Adding -0 keeps the sign of 0.
UNPACK = tl.constexpr("""{
.reg .b32 t, u, z;
mov.b32 z, 0x80008000;
and.b32 t, $4, 0x81C081C0;
fma.rn.bf16x2 $0, t, $5, z;
shl.b32 t, $4, 4;
and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 $1, t, $7, z;
shf.l.wrap.b32 t, $4, $4, 10;
and.b32 t, t, 0x81C081C0;
fma.rn.bf16x2 $2, t, $5, z;
shf.l.wrap.b32 t, $4, $4, 30;
and.b32 t, t, 0x81808180;
shl.b32 u, $4, 6;
lop3.b32 t, u, 0x00400040, t, 0xEA;
fma.rn.bf16x2 $3, t, $7, z;
}""")


def chunk_of(num_in: int) -> int:
    """Inputs of a tile."""
    return 64 if num_in % 64 == 0 else 32


def is_foldable(scales: torch.Tensor) -> bool:
    """Whether 2^126 can be folded into every scale. For loading: waits for the device. Scales without memory count as the
    published ones, which can."""
    return scales.is_meta or scales.numel() == 0 or int(scales.max()) <= MAX_FOLDED_SCALE


def unpacks_by_asm(x: torch.Tensor, *, is_foldable: bool) -> bool:
    """Whether packed weights are unpacked by inline assembly to x's dtype on its GPU; is_foldable: what is_foldable() says of all
    scales."""
    return is_foldable and x.dtype == torch.bfloat16 and gpu_family(x) in ASM_FAMILIES


def can_permute(blocks: torch.Tensor) -> bool:
    """Whether packed blocks [..., O, N, 16] have a fragment layout: O is a multiple of 16."""
    return blocks.shape[-3] % ROWS == 0


def _sources(code: int, half: int) -> list[int]:
    """The positions in the word of bits 3 (sign), 2, 1 and 0 of code j of a half."""
    rotations = ROTATIONS[code]
    targets = zip((15, 8, 7, 6), (rotations[0], rotations[1], rotations[1], rotations[2]))
    return [(target + 16 * half - rotation) % 32 for target, rotation in targets]


def _word_tables(device: torch.device) -> torch.Tensor:
    """The bits that each of the 256 bytes, two codes, sets in a word as code j of both halves: [4, 256] int64."""
    byte = torch.arange(256, device=device)
    tables = torch.zeros(4, 256, dtype=torch.int64, device=device)
    for code in range(4):
        for half in range(2):
            for bit, source in zip((3, 2, 1, 0), _sources(code, half)):
                tables[code] |= (byte >> (4 * half + bit) & 1) << source
    return tables


def _pack_expert(blocks: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """[O, N, 16] uint8 of one expert -> the words of its fragments as bytes, same shape."""
    num_out, num_blocks, _ = blocks.shape
    chunk = chunk_of(num_blocks * BLOCK_SIZE)
    # [O / 16, g, h, I / C, step, r, c]
    pairs = blocks.reshape(num_out // ROWS, 8, 2, num_blocks * BLOCK_SIZE // chunk, chunk // 16, 2, 4).int()
    words = torch.zeros((), dtype=torch.int64, device=blocks.device)
    for h in range(2):
        for r in range(2):
            words = words | tables[h + 2 * r][pairs[:, :, h, :, :, r]]
    words = words.permute(0, 2, 1, 4, 3)  # [O / 16, I / C, g, c, step]
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()
    return words.view(torch.uint8).view(blocks.shape)


def _unpack_expert(blocks: torch.Tensor) -> torch.Tensor:
    num_out, num_blocks, _ = blocks.shape
    chunk = chunk_of(num_blocks * BLOCK_SIZE)
    words = blocks.contiguous().view(torch.int32).long()
    words = words.view(num_out // ROWS, num_blocks * BLOCK_SIZE // chunk, 8, 4, chunk // 16)
    pairs = torch.zeros((*words.shape, 2, 2), dtype=torch.int64, device=blocks.device)  # [..., h, r]
    for h in range(2):
        for r in range(2):
            for half in range(2):
                for bit, source in zip((3, 2, 1, 0), _sources(h + 2 * r, half)):
                    pairs[..., h, r] |= (words >> source & 1) << (4 * half + bit)
    # [O / 16, I / C, g, c, step, h, r] -> [O / 16, g, h, I / C, step, r, c]
    return pairs.permute(0, 2, 5, 1, 4, 6, 3).to(torch.uint8).reshape(blocks.shape)


def _permute_scales(scales: torch.Tensor, is_inverse: bool) -> torch.Tensor:
    """[O, N] of one expert, [O / 16, g, h, I / C, C / 32] <-> [O / 16, I / C, g, C / 32, h]."""
    num_out, num_blocks = scales.shape
    num_chunks = num_blocks * BLOCK_SIZE // chunk_of(num_blocks * BLOCK_SIZE)
    if is_inverse:
        return scales.reshape(num_out // ROWS, num_chunks, 8, -1, 2).permute(0, 2, 4, 1, 3).reshape(scales.shape)
    return scales.reshape(num_out // ROWS, 8, 2, num_chunks, -1).permute(0, 3, 1, 4, 2).reshape(scales.shape)


def _check(blocks: torch.Tensor, scales: torch.Tensor) -> None:
    assert blocks.dtype == scales.dtype == torch.uint8, f"blocks {blocks.dtype}, scales {scales.dtype}: both must be uint8"
    assert blocks.dim() == 4 and blocks.shape == (*scales.shape, BLOCK_SIZE // 2), f"{blocks.shape} and {scales.shape}"
    if not can_permute(blocks):
        raise ValueError(f"MXFP4 fragments hold {ROWS} output rows: {blocks.shape[1]} of {list(blocks.shape)} is no multiple")


def to_fragments_(blocks: torch.Tensor, scales: torch.Tensor) -> None:
    """Brings blocks [E, O, N, 16] and scales [E, O, N] uint8 from the checkpoint's layout into fragment layout, in place.

    Works expert by expert: about 20 bytes of working memory per byte of one expert. Raises ValueError unless 16 divides O."""
    _check(blocks, scales)
    if blocks.is_meta:
        return
    tables = _word_tables(blocks.device)
    for expert in range(blocks.shape[0]):
        blocks[expert].copy_(_pack_expert(blocks[expert], tables))
        scales[expert].copy_(_permute_scales(scales[expert], False))


def from_fragments(blocks: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales in the checkpoint's layout, as new tensors: the exact inverse of to_fragments_, for export."""
    _check(blocks, scales)
    out_blocks, out_scales = torch.empty_like(blocks), torch.empty_like(scales)
    for expert in range(blocks.shape[0]):
        out_blocks[expert] = _unpack_expert(blocks[expert])
        out_scales[expert] = _permute_scales(scales[expert], True)
    return out_blocks, out_scales


@triton.jit
def _rotate(words, LEFT: tl.constexpr):
    return (words << LEFT) | ((words >> (32 - LEFT)) & ((1 << LEFT) - 1))


@triton.jit
def _pair_factors(scales, H: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """2^(scale - 1) of rows 2g + h as a pair of bfloat16, for both halves of a word: [GROUPS, CHUNKS, 8, 4, CHUNK / 16, 2].
    The pair is joined last, so that one thread holds it: the compiler may lay words out as it lays out factors, and the assembly
    needs both halves of a word in one thread."""
    factors = ((scales >> (8 * H)) & 255) * 0x00800080 + 0x3F003F00
    if CHUNK == 64:
        factors = tl.join(factors, ((scales >> (16 + 8 * H)) & 255) * 0x00800080 + 0x3F003F00)
    factors = tl.reshape(factors, (GROUPS, CHUNKS, 8, 1, CHUNK // 32, 1))
    factors = tl.broadcast_to(factors, (GROUPS, CHUNKS, 8, 4, CHUNK // 32, 2))
    factors = tl.reshape(factors, (GROUPS, CHUNKS, 8, 4, CHUNK // 16))
    return tl.join(factors, factors)


@triton.jit
def _halves(pairs):
    """Both halves of words of bfloat16 bits, value * 2^-126, as fp32 values: [..., 2]."""
    low = (pairs << 16).to(tl.float32, bitcast=True)
    high = (pairs & -65536).to(tl.float32, bitcast=True)
    return tl.join(low, high) * 8.507059173023462e37  # 2^126


@triton.jit
def _row_factors(scales, H: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """The scales of rows 2g + h in fp32, for every word: [GROUPS, CHUNKS, 8, 4, CHUNK / 16, 1]."""
    factors = e8m0_to_fp32((scales >> (8 * H)) & 255)
    if CHUNK == 64:
        factors = tl.join(factors, e8m0_to_fp32((scales >> (16 + 8 * H)) & 255))
    factors = tl.reshape(factors, (GROUPS, CHUNKS, 8, 1, CHUNK // 32, 1, 1))
    factors = tl.broadcast_to(factors, (GROUPS, CHUNKS, 8, 4, CHUNK // 32, 2, 1))
    return tl.reshape(factors, (GROUPS, CHUNKS, 8, 4, CHUNK // 16, 1))


@triton.jit
def unpack_fragments(words, scales, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
                     IS_ASM: tl.constexpr, IN_MMA_ORDER: tl.constexpr):
    """Weights [16 * GROUPS, CHUNKS * CHUNK] of a tile: bfloat16 with IS_ASM, DTYPE otherwise; MMA row 8h + g or, without
    IN_MMA_ORDER, row 2g + h.

    words: [GROUPS, CHUNKS * 4 * CHUNK] int16 with IS_ASM, [GROUPS, CHUNKS * 2 * CHUNK] int32 otherwise. scales: the
    [GROUPS, CHUNKS * 8] words of C / 32 * 2 bytes, as int32. IS_ASM needs scales up to 128, the other form takes all."""
    if IS_ASM:
        even = _pair_factors(scales, 0, GROUPS, CHUNKS, CHUNK)
        odd = _pair_factors(scales, 1, GROUPS, CHUNKS, CHUNK)
        words = tl.reshape(words, (GROUPS, CHUNKS, 8, 4, CHUNK // 16, 2))
        # a call takes both halves of a word; the halves of what it returns are o = 0 and 1
        codes = tl.inline_asm_elementwise(UNPACK, "=r,=r,=r,=r,r,r,r,r,r", [words, even, odd], is_pure=True, pack=2,
                                          dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16))
        values = tl.join(tl.join(codes[0], codes[1]), tl.join(codes[2], codes[3]))
    else:
        words = tl.reshape(words, (GROUPS, CHUNKS, 8, 4, CHUNK // 16))
        mask: tl.constexpr = 0x81C081C0 - (1 << 32)
        last = (_rotate(words, 30) & (0x81808180 - (1 << 32))) | ((words << 6) & 0x00400040)
        even = _row_factors(scales, 0, GROUPS, CHUNKS, CHUNK)
        odd = _row_factors(scales, 1, GROUPS, CHUNKS, CHUNK)
        near = tl.join(_halves(words & mask) * even, _halves((words << 4) & mask) * odd)
        far = tl.join(_halves(_rotate(words, 10) & mask) * even, _halves(last) * odd)
        values = tl.join(near, far).to(DTYPE)
    # [GROUPS, CHUNKS, g, c, step, o, h, r]
    if IN_MMA_ORDER:
        values = tl.permute(values, (0, 6, 2, 1, 4, 7, 3, 5))
    else:
        values = tl.permute(values, (0, 2, 6, 1, 4, 7, 3, 5))
    return tl.reshape(values, (16 * GROUPS, CHUNKS * CHUNK))


@triton.jit(do_not_specialize=["num_groups"])
def _dequantize_fragments_kernel(words, scales, out, num_groups, num_chunks, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
                                 IS_ASM: tl.constexpr):
    """16 * GROUPS rows of CHUNK inputs; words and scales as unpack_fragments takes them."""
    chunk = tl.program_id(0) % num_chunks
    first_group = (tl.program_id(0) // num_chunks).to(tl.int64) * GROUPS
    groups = first_group + tl.arange(0, GROUPS)
    size: tl.constexpr = CHUNK * 4 if IS_ASM else CHUNK * 2
    tiles = (groups * num_chunks + chunk)[:, None]
    is_group = (groups < num_groups)[:, None]
    tile_words = tl.load(words + tiles * size + tl.arange(0, size)[None, :], mask=is_group, other=0)
    tile_scales = tl.load(scales + tiles * 8 + tl.arange(0, 8)[None, :], mask=is_group, other=0).to(tl.int32)
    dtype: tl.constexpr = out.dtype.element_ty
    values = unpack_fragments(tile_words, tile_scales, GROUPS, 1, CHUNK, dtype, IS_ASM, False)
    rows = first_group * 16 + tl.arange(0, 16 * GROUPS)
    num_in = tl.cast(num_chunks * CHUNK, tl.int64)  # num_chunks may be 1, which the compiler takes for a constant
    tl.store(out + rows[:, None] * num_in + chunk * CHUNK + tl.arange(0, CHUNK)[None, :], values,
             mask=(rows < num_groups * 16)[:, None])


def word_views(blocks: torch.Tensor, scales: torch.Tensor, is_asm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales in fragment layout with the element types that the kernels load."""
    chunk = chunk_of(blocks.shape[-2] * BLOCK_SIZE)
    words, scales = blocks.view(-1), scales.view(-1)
    return words.view(torch.int16 if is_asm else torch.int32), scales.view(torch.int32 if chunk == 64 else torch.int16)


def dequantize_fragments(blocks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, *, is_asm: bool) -> torch.Tensor:
    """Writes the weights of blocks [E, O, N, 16] and scales [E, O, N] in fragment layout into out [E, O, I], contiguous, fp32,
    bf16 or fp16, and returns it: the bits of mxfp4.dequantize_experts on the checkpoint's layout. is_asm unpacks by inline
    assembly: bf16 on a GPU and scales up to 128 only (is_foldable)."""
    _check(blocks, scales)
    num_experts, num_out, num_blocks = scales.shape
    shape = (num_experts, num_out, num_blocks * BLOCK_SIZE)
    assert out.shape == shape and out.is_contiguous(), f"out {out.shape}, strides {out.stride()}: contiguous {shape} needed"
    assert not is_asm or out.dtype == torch.bfloat16, f"inline assembly unpacks to bfloat16, not {out.dtype}"
    if not is_triton(blocks):
        return out.copy_(dequantize_reference(*from_fragments(blocks, scales), out.dtype))
    if out.dtype not in KERNEL_DTYPES:
        raise ValueError(f"dequantize: dtype {out.dtype}; on a GPU one of {', '.join(map(str, KERNEL_DTYPES))}")
    assert blocks.is_contiguous() and scales.is_contiguous()
    chunk = chunk_of(shape[2])
    num_groups, num_chunks = num_experts * num_out // ROWS, shape[2] // chunk
    words, scale_words = word_views(blocks, scales, is_asm)
    if out.numel():
        launch(_dequantize_fragments_kernel, (cdiv(num_groups, DEQUANTIZE_GROUPS) * num_chunks,),
               words, scale_words, out, num_groups, num_chunks, GROUPS=DEQUANTIZE_GROUPS, CHUNK=chunk, IS_ASM=is_asm,
               num_warps=NUM_WARPS)
    return out
