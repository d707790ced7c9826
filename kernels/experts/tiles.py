"""Which expert's rows a program takes: rows in expert order are cut into tiles, each with rows of one expert only.

Offsets stay on the device, so a grid is an upper bound of the number of tiles, and each program finds its own.

Shapes: E experts; EXPERTS, the power of two that holds them.
"""
import triton
import triton.language as tl


@triton.jit
def tiles_of_experts(offsets, num_rows, num_experts, SIZE: tl.constexpr, EXPERTS: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """Each expert's number of tiles of SIZE rows [EXPERTS]; without offsets [E + 1] the first expert owns every row."""
    experts = tl.arange(0, EXPERTS)
    if HAS_OFFSETS:
        starts = tl.load(offsets + experts, mask=experts < num_experts, other=0)
        ends = tl.load(offsets + 1 + experts, mask=experts < num_experts, other=0)
        return (ends - starts + SIZE - 1) // SIZE
    else:
        return tl.where(experts == 0, tl.cdiv(num_rows, SIZE), 0)


@triton.jit
def owner_of_tile(tile, tiles_of, ends_of, offsets, num_rows, PER_TILE, EXPERTS: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """The expert of a program's tile, the tile's number within the expert, and the expert's first row and end. Each tile of rows
    takes PER_TILE programs; ends_of: the running sums of tiles_of."""
    expert = tl.sum((ends_of * PER_TILE <= tile).to(tl.int32), 0)
    within = tile - tl.sum(tl.where(tl.arange(0, EXPERTS) < expert, tiles_of, 0), 0) * PER_TILE
    if HAS_OFFSETS:
        start = tl.load(offsets + expert)
        end = tl.load(offsets + expert + 1)
    else:
        start = 0
        end = num_rows
    return expert, within, start, end
