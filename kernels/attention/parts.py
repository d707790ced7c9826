"""Attention's sums over keys, tile by tile and part by part: what training, prefill and decoding share, and the bits with them.

Without a window, maximum, sum and output of every part of so many keys (keys_of_part) are computed apart, each from the sink's
score on, and the parts are added in their order. So a decode step may read the parts of a sequence by many programs
(kernels/attention/decode.py). With a window all keys are one part. The sum is that of the weights, 2 to the power of scores minus
the maximum; the output that of weights times values, which the sum divides at the very end.

Parts and key tiles are counted from the start of the keys: of the sequence, or of its prefix and then of what follows it. A part
or a tile that a query does not see changes neither its maximum nor its sum nor its output, since the sink keeps the maximum
finite: its weights are 0 and the factor on what was before is 1.

Shapes: D head width.
"""
import torch
import triton
import triton.language as tl


def keys_of_part(dtype: torch.dtype, window: int) -> int:
    """The number of keys whose maximum, sum and output are computed apart, a multiple of every tile of keys; 0 with a window.
    float32 is there for comparisons: with fewer keys to a part, short sequences have several, too."""
    return 0 if window else 64 if dtype == torch.float32 else 256


@triton.jit
def sink_scores(sinks):
    """The scores in base 2, fp32, of sinks [any] in nats, of any dtype. A sink of minus infinity is none: the softmax is over the
    keys alone. Its score is one below that of every key, which takes no probability and keeps the maximum finite."""
    scores = sinks.to(tl.float32) * 1.4426950408889634
    return tl.where(scores < -1e38, -1e38, scores)  # no maximum, which need not keep NaN


@triton.jit
def is_visible(rows, cols, col_end, window, WINDOWED: tl.constexpr):
    """[rows, cols] bool; rows are counted from the start of the keys' sequence or prefix."""
    visible = (cols <= rows) & (cols < col_end)
    if WINDOWED:
        visible = visible & (cols > rows - window)
    return visible


@triton.jit
def load_rows(pointer, stride, first, end, BLOCK: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
              RING: tl.constexpr = 0, PAGE: tl.constexpr = 0, page=0, next_page=None, new=None, stride_new=0, split=0):
    """Rows first .. first + BLOCK of one head: [BLOCK, D]. If MASKED, rows from `end` on are zeros; else all rows must exist.
    With RING, row p is at p % RING; with PAGE, at p % PAGE of `page`, and rows beyond that page are in `next_page` (None: there
    are none). With `new`, rows from `split` on are not there: row p is at new + p * stride_new."""
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, D)
    if RING > 0:
        pointers = pointer + ((first + rows) % RING)[:, None] * stride + dims[None, :]
    elif PAGE > 0:
        # a missing page reads as page 0: its rows are not used, but the addresses are valid
        place = tl.maximum(page, 0) * PAGE + first % PAGE
        if next_page is not None:
            next_place = (tl.maximum(next_page, 0) - 1) * PAGE + first % PAGE
            places = tl.where(first % PAGE + rows < PAGE, place, next_place) + rows
            # in this order an address takes one multiplication and addition if the stride is a constant
            pointers = pointer + dims[None, :] + places.to(tl.int64)[:, None] * stride
        else:
            pointers = pointer + place.to(tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    else:
        pointers = pointer + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    if new is not None:
        is_new, is_row = (first + rows >= split)[:, None], (first + rows < end)[:, None]
        new_pointers = new + (first + rows).to(tl.int64)[:, None] * stride_new + dims[None, :]
        return tl.where(is_new, tl.load(new_pointers, mask=is_row & is_new, other=0.0),
                        tl.load(pointers, mask=is_row & (is_new == 0), other=0.0))
    if MASKED:
        return tl.load(pointers, mask=(first + rows < end)[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def key_range(row, key_start, key_end, window, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For the query tile that starts at `row`: the start of its first key tile, the end of the tiles that all its queries see
    completely, and the end of the keys that any of them sees. Tiles are counted from key_start."""
    first = key_start
    if WINDOWED:
        first = key_start + tl.maximum(row - window + 1 - key_start, 0) // BLOCK_N * BLOCK_N
        whole_end = first  # few tiles, most of them at an edge: all are masked
    else:
        whole_end = key_start + (tl.minimum(row + 1, key_end) - key_start) // BLOCK_N * BLOCK_N
    return first, whole_end, tl.minimum(row + BLOCK_M, key_end)


@triton.jit
def add_part(total, total_max, total_sum, acc, row_max, row_sum, is_complete):
    """Output, maximum and sum of the parts so far and, if it is complete, of one more part. Of two products that are added a
    compiler may round either one first; here it is always the part's. A part that is not complete has the factor 0."""
    new_max = tl.where(is_complete, tl.maximum(total_max, row_max), total_max)
    shrink, part_shrink = tl.exp2(total_max - new_max), tl.where(is_complete, tl.exp2(row_max - new_max), 0.0)
    total_sum = tl.fma(total_sum, shrink, row_sum * part_shrink)
    total = tl.fma(total, shrink[:, None], acc * part_shrink[:, None])
    return total, new_max, total_sum


@triton.jit
def no_keys(sink, D: tl.constexpr, PART: tl.constexpr):
    """What forward_tiles goes on with before the first key: the parts so far, which have the sink, and an empty part; or, if PART
    is 0 and all keys are one part, that part with the sink."""
    zeros = tl.zeros([sink.shape[0], D], tl.float32)
    ones = tl.full([sink.shape[0]], 1.0, tl.float32)
    if PART > 0:
        return zeros, sink, ones, zeros, sink, tl.zeros_like(sink)
    else:
        return zeros, sink, ones, zeros, sink, ones


@triton.jit
def all_keys(total, total_max, total_sum, acc, row_max, row_sum, PART: tl.constexpr):
    """Output, maximum and sum of all keys that forward_tiles has seen."""
    if PART > 0:
        return add_part(total, total_max, total_sum, acc, row_max, row_sum, True)
    else:
        return acc, row_max, row_sum


@triton.jit
def forward_tiles(total, total_max, total_sum, acc, row_max, row_sum, sink, q, k, v, k_tiles, v_tiles, stride_k, stride_v, column,
                  rows, key_start, first, last, key_end, scale_log2, window, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
                  DESCRIPTOR: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, BRANCH: tl.constexpr,
                  RING: tl.constexpr = 0, PAGE: tl.constexpr = 0, pages=None, ALIGNED: tl.constexpr = True, new_k=None,
                  new_v=None, stride_new_k=0, stride_new_v=0, split=0):
    """Goes on with the parts so far (total, total_max, total_sum) and the newest part (acc, row_max, row_sum), which is not among
    them yet. sink: the rows' scores of the sink, with which a part begins, at key_start and every PART keys after it; PART 0: all
    these keys belong to the newest part. BRANCH: only tiles that begin a part add the one before; with few rows a branch costs
    more than it saves, since loads and products do not move over it.

    PAGE, pages: the key of position p is in page pages[p // PAGE] (load_rows); ALIGNED: no tile has keys of two pages. new_k,
    new_v, split: where keys and values of positions from `split` on are."""
    page, next_page = 0, None
    if PAGE > 0:
        page = tl.load(pages + first // PAGE, mask=first < last, other=0)
        if not ALIGNED:
            next_page = tl.load(pages + tl.minimum(first + BLOCK_N - 1, key_end - 1) // PAGE, mask=first < last, other=0)
    for start in tl.range(first, last, BLOCK_N):
        if PART > 0:
            begins = (start - key_start) % PART == 0
            if not BRANCH:
                total, total_max, total_sum = add_part(total, total_max, total_sum, acc, row_max, row_sum, begins)
                row_max = tl.where(begins, sink, row_max)
            elif begins:
                total, total_max, total_sum = add_part(total, total_max, total_sum, acc, row_max, row_sum, True)
                acc, row_max, row_sum = tl.zeros_like(acc), sink, tl.zeros_like(row_sum)
        if DESCRIPTOR and not MASKED:
            k_tile = k_tiles.load([start, column])  # [BLOCK_N, D]
        else:
            k_tile = load_rows(k, stride_k, start, key_end, BLOCK_N, D, MASKED, RING, PAGE, page, next_page, new_k, stride_new_k,
                               split)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            cols = start + tl.arange(0, BLOCK_N)
            scores = tl.where(is_visible(rows[:, None], cols[None, :], key_end, window, WINDOWED), scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        if PART > 0 and not BRANCH:
            shrink = tl.where(begins, 0.0, shrink)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if DESCRIPTOR and not MASKED:
            v_tile = v_tiles.load([start, column])
        else:
            v_tile = load_rows(v, stride_v, start, key_end, BLOCK_N, D, MASKED, RING, PAGE, page, next_page, new_v, stride_new_v,
                               split)
        if PAGE > 0:
            # one tile ahead, so that loads of keys need not wait for it
            page = tl.load(pages + tl.minimum(start + BLOCK_N, key_end - 1) // PAGE)
            if not ALIGNED:
                next_page = tl.load(pages + tl.minimum(start + 2 * BLOCK_N - 1, key_end - 1) // PAGE)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        row_max = new_max
    return total, total_max, total_sum, acc, row_max, row_sum
