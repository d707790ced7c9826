"""Tiles of the kernel for few rows (few_rows.py): for each GPU family, by the number of rows. None of them changes a bit.

Shapes: K in, N out.
"""
from typing import NamedTuple

import torch

from kernels.device import measured, next_power_of_2, unmeasured
from kernels.packed.fragments import chunk_of


class DecodeBlocks(NamedTuple):
    """Sizes of a tile and how its loop is compiled. None of them changes a result's bits."""

    rows: int  # of the weight: output features
    tokens: int
    inner: int  # step along K
    num_warps: int
    num_stages: int
    more: int = 0  # further tokens that a tile of packed weights takes if its expert has more than `tokens`


# family -> entries (max routed rows per expert, blocks if out > in, blocks otherwise); with two items the same blocks serve both;
# the last entry also serves more rows
_PACKED = {
    "ampere": unmeasured(((4, DecodeBlocks(64, 16, 64, 4, 5)),
                          (16, DecodeBlocks(64, 32, 64, 4, 4)),
                          (64, DecodeBlocks(64, 64, 64, 4, 3)))),
    "consumer": unmeasured(((4, DecodeBlocks(64, 16, 64, 4, 4)),
                            (16, DecodeBlocks(64, 32, 64, 4, 3)),
                            (64, DecodeBlocks(64, 64, 64, 4, 3)))),
    "hopper": measured(((0.4, DecodeBlocks(64, 16, 256, 4, 3), DecodeBlocks(64, 16, 256, 4, 5)),
                        (6, DecodeBlocks(128, 16, 128, 4, 4), DecodeBlocks(64, 16, 256, 4, 3)),
                        (11, DecodeBlocks(128, 16, 128, 4, 4)),
                        (23, DecodeBlocks(128, 32, 128, 4, 4), DecodeBlocks(128, 32, 64, 4, 4)),
                        (45, DecodeBlocks(128, 32, 128, 4, 3, 16), DecodeBlocks(128, 64, 64, 4, 4)),
                        (64, DecodeBlocks(128, 64, 64, 8, 4, 32)))),
    "blackwell": unmeasured(((4, DecodeBlocks(128, 16, 128, 4, 4)),
                             (16, DecodeBlocks(128, 32, 128, 4, 4)),
                             (64, DecodeBlocks(128, 64, 128, 4, 4)))),
    "interpreter": unmeasured(((2, DecodeBlocks(32, 16, 64, 4, 2), DecodeBlocks(16, 16, 32, 4, 2)),
                               (64, DecodeBlocks(64, 32, 32, 4, 2, 16), DecodeBlocks(32, 16, 64, 4, 2)))),
}  # fmt: skip
_DENSE = {
    "ampere": unmeasured(((8, DecodeBlocks(64, 16, 64, 4, 5)), (64, DecodeBlocks(64, 64, 64, 4, 4)))),
    "consumer": unmeasured(((8, DecodeBlocks(64, 16, 64, 4, 4)), (64, DecodeBlocks(64, 64, 64, 4, 3)))),
    "hopper": measured(((8, DecodeBlocks(64, 16, 64, 4, 6)), (64, DecodeBlocks(64, 64, 64, 4, 5)))),
    "blackwell": unmeasured(((8, DecodeBlocks(128, 16, 64, 4, 6)), (64, DecodeBlocks(128, 64, 64, 4, 5)))),
    "interpreter": unmeasured(((64, DecodeBlocks(32, 16, 32, 4, 2)),)),
}
# the same for LoRA's first factors (`rows` is a minimum): few programs, each of which reads all inputs
_LOW_RANK = {
    "ampere": unmeasured(((64, DecodeBlocks(16, 16, 128, 4, 4)),)),
    "consumer": unmeasured(((64, DecodeBlocks(16, 16, 128, 4, 3)),)),
    "hopper": measured(((4, DecodeBlocks(16, 16, 512, 2, 4)), (64, DecodeBlocks(16, 16, 128, 2, 4)))),
    "blackwell": unmeasured(((64, DecodeBlocks(16, 16, 128, 4, 4)),)),
    "interpreter": unmeasured(((64, DecodeBlocks(16, 16, 32, 4, 2)),)),
}


def blocks_of(table: tuple, amount: float, num_in: int, num_out: int) -> DecodeBlocks:
    """The blocks of a table's first entry whose maximum is at least `amount`, else of its last entry."""
    _, wide, *narrow = next((row for row in table if amount <= row[0]), table[-1])
    return narrow[0] if narrow and num_out <= num_in else wide


def fit_blocks(blocks: DecodeBlocks, family: str, dtype: torch.dtype, num_in: int) -> DecodeBlocks:
    """A table's blocks, made small enough for this dtype and `num_in` inputs."""
    if dtype == torch.float32 and family != "interpreter":  # no tensor cores: for fixtures and checks
        blocks = DecodeBlocks(min(blocks.rows, 64), min(blocks.tokens, 32), 32, 4, 2)
    return blocks._replace(inner=max(16, min(blocks.inner, next_power_of_2(num_in))))


def choose_decode_blocks(family: str, dtype: torch.dtype, num_rows: float, num_experts: int, num_in: int, num_out: int, *,
                         is_packed: bool) -> DecodeBlocks:
    is_low_rank = not is_packed and num_out <= 64
    table = _PACKED if is_packed else _LOW_RANK if is_low_rank else _DENSE
    blocks = blocks_of(table[family].blocks, num_rows / num_experts, num_in, num_out)
    if is_low_rank:
        rows = max(blocks.rows, next_power_of_2(num_out))
        inner = max(blocks.inner * blocks.rows // rows, min(blocks.inner, 128))  # the same number of bytes, if possible
        blocks = blocks._replace(rows=rows, inner=inner)
    blocks = fit_blocks(blocks, family, dtype, num_in)
    if not is_packed:
        return blocks
    inner, chunk = max(blocks.inner, chunk_of(num_in)), chunk_of(num_in)
    while inner > chunk and (inner > num_in or (num_in % inner) & (num_in % inner - 1)):
        inner //= 2  # the number of inputs of a shorter last step must be a power of two
    return blocks._replace(inner=inner)


def low_rank_steps(blocks: DecodeBlocks, num_in: int, dtype: torch.dtype, *, is_packed: bool) -> tuple[int, int]:
    """For a launch of these blocks that computes x A^T as well, in tiles of 16 ranks and 16 rows: the inputs of a step, and the
    number of stages, which together take about as much shared memory as W's. Many small stages have most bytes under way."""
    inner, weight_bits = max(16, min(128, next_power_of_2(num_in))), 5 if is_packed else 8 * dtype.itemsize  # scales included
    most = blocks.num_stages * blocks.inner * (blocks.rows * weight_bits // 8 + blocks.tokens * dtype.itemsize)  # bytes
    return inner, max(2, min(12, most // (inner * 32 * dtype.itemsize)))


def mma_of(family: str, dtype: torch.dtype, blocks: DecodeBlocks) -> str:
    """The instruction that multiplies packed weights: "wgmma", "mma.sync", or "" where the kernel need not know it."""
    if dtype == torch.float32 or family not in ("ampere", "consumer", "hopper"):
        return ""
    return "wgmma" if family == "hopper" and blocks.rows >= 64 and blocks.num_warps % 4 == 0 else "mma.sync"
