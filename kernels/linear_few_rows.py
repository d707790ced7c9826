"""A dense projection for few tokens, where reading the weight is the cost: y = x W^T + b + (s x A^T) B^T, with LoRA
(arXiv 2106.09685).

moe_decode's kernel with one expert that owns every row: the weight is the MMA's M side and is read once for up to 64 tokens, in
tiles of so few rows that every multiprocessor streams some of it. Each output is one sum over the inputs in ascending order,
then over LoRA's rank: the bits of grouped_gemm, for every tile size. Several projections side by side keep adapters of their
own as in grouped_gemm: each column names its slice of the low-rank row.

Shapes: T tokens, K in, N out, r LoRA's rank, G adapted projections of a product.
"""
import torch

from kernels.device import gpu_family, is_triton
from kernels.experts.few_rows import (
    FOR_LOW_RANK,
    FOR_X,
    DecodeBlocks,
    Projection,
    blocks_of,
    decode_projection,
    fit_blocks,
    low_rank_rows,
)

# family -> (at most so many tokens, blocks where out is wider than in, other blocks), the last for all above. Tiles under 64 rows
# are mma.sync's on every GPU
_LINEAR = {
    "ampere": ((16, DecodeBlocks(32, 16, 128, 4, 5), DecodeBlocks(32, 16, 128, 4, 5)),
               (32, DecodeBlocks(32, 32, 128, 4, 4), DecodeBlocks(32, 32, 128, 4, 4)),
               (128, DecodeBlocks(64, 64, 64, 4, 4), DecodeBlocks(64, 64, 64, 4, 4)),
               (512, DecodeBlocks(128, 64, 64, 4, 3), DecodeBlocks(128, 64, 64, 4, 3))),
    "consumer": ((16, DecodeBlocks(32, 16, 128, 4, 4), DecodeBlocks(32, 16, 128, 4, 4)),
                 (32, DecodeBlocks(32, 32, 128, 4, 3), DecodeBlocks(32, 32, 128, 4, 3)),
                 (512, DecodeBlocks(64, 64, 64, 4, 3), DecodeBlocks(64, 64, 64, 4, 3))),
    "hopper": ((16, DecodeBlocks(64, 16, 128, 4, 6), DecodeBlocks(64, 16, 128, 4, 8)),
               (32, DecodeBlocks(64, 32, 128, 4, 6), DecodeBlocks(64, 16, 128, 4, 8)),
               (64, DecodeBlocks(64, 64, 128, 4, 4), DecodeBlocks(64, 32, 128, 4, 4)),
               (128, DecodeBlocks(64, 64, 64, 4, 5), DecodeBlocks(64, 64, 128, 4, 4)),
               (512, DecodeBlocks(128, 64, 64, 8, 4), DecodeBlocks(128, 64, 64, 8, 4))),
    "blackwell": ((16, DecodeBlocks(128, 16, 64, 4, 6), DecodeBlocks(128, 16, 64, 4, 6)),
                  (512, DecodeBlocks(128, 64, 64, 4, 5), DecodeBlocks(128, 64, 64, 4, 5))),
    "interpreter": ((16, DecodeBlocks(16, 16, 32, 4, 2), DecodeBlocks(16, 16, 32, 4, 2)),
                    (512, DecodeBlocks(32, 32, 32, 4, 2), DecodeBlocks(32, 32, 32, 4, 2))),
}  # fmt: skip
# x A^T, at most so many tokens: few programs that each run through all inputs, in fp32 masters twice the bytes. What counts is
# how many bytes a program has asked for at once
_LOW_RANK = {
    "ampere": ((512, DecodeBlocks(16, 16, 128, 4, 6)),),
    "consumer": ((512, DecodeBlocks(16, 16, 128, 4, 4)),),
    "hopper": ((32, DecodeBlocks(16, 16, 512, 2, 4)), (512, DecodeBlocks(32, 32, 256, 4, 4))),
    "blackwell": ((512, DecodeBlocks(16, 16, 256, 4, 5)),),
    "interpreter": ((512, DecodeBlocks(16, 16, 32, 4, 2)),),
}


def choose_linear_blocks(family: str, dtype: torch.dtype, num_tokens: int, num_in: int, num_out: int, *,
                         is_low_rank: bool) -> DecodeBlocks:
    table = (_LOW_RANK if is_low_rank else _LINEAR)[family]
    return fit_blocks(blocks_of(table, num_tokens, num_in, num_out), family, dtype, num_in)


def decode_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, lora_A: torch.Tensor | None = None,
                  lora_B: torch.Tensor | None = None, lora_groups: torch.Tensor | None = None,
                  lora_scale: float | None = None) -> torch.Tensor:
    """x [T, K] times weight [N, K] plus bias [N] -> [T, N] in x's dtype. Triton only, no gradient.

    lora_A [G r, K] and lora_B [N, r], fp32 masters or x's dtype, add lora_scale (x A^T) B^T. With lora_groups [N] int32, column n
    takes slice lora_groups[n] of the low-rank row alone, none where it is -1; without, G is 1. Raises ValueError for dtypes and
    GPUs that the kernel cannot serve."""
    assert is_triton(x), "decode_linear: elsewhere kernels.linear serves"
    family, (num_tokens, num_in) = gpu_family(x), x.shape
    blocks = choose_linear_blocks(family, x.dtype, num_tokens, num_in, len(weight), is_low_rank=False)
    projection = Projection(weight.T[None], None, None, bias[None], False)
    if lora_A is None:
        return decode_projection(x, projection, None, waits=FOR_X, blocks=blocks)
    low_rank_blocks = choose_linear_blocks(family, x.dtype, num_tokens, num_in, len(lora_A), is_low_rank=True)
    low_rank = low_rank_rows(x, lora_A[None], None, scale=lora_scale, waits=FOR_X, blocks=low_rank_blocks)
    return decode_projection(x, projection, None, low_rank=low_rank, lora_up=lora_B.T[None], lora_groups=lora_groups,
                             waits=FOR_LOW_RANK, blocks=blocks)
