"""Which keys and values the queries of a forward attend to, and where new ones go: one object for each kind of forward.

Each has attend(), which rotates queries and keys (on a GPU in place), stores keys and values for later tokens, and attends.
`attn` is a layer's Attention (models/block.py): its index, window, head width and sinks.

Shapes: T tokens, H query heads, K key-value heads, P = (H + 2 K) * head width, B decoded sequences.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.attention.cache import rotate_and_write
from kernels.attention.chunks import chunk_attention
from kernels.attention.decode import SharedPrefixes, decode_attention
from kernels.attention.packed import attention, attention_backward, attention_forward
from kernels.attention.plan import AttentionPlan
from kernels.device import is_triton, next_power_of_2, to_device
from kernels.rope import rope_reference, rotate_
from models.kv_cache import PAGE_TOKENS, KVCache
from models.offload import Kept

NUM_SECTIONS = 16, 128  # of packed chunks, at most two of each, and idle rows: few sizes, each is compiled
MOST_CHUNKS = 63  # in one launch behind a cache; whole sequences, which need no sections, may be more

Angles = tuple[torch.Tensor, torch.Tensor]  # cos and sin [T, head width / 2] fp32


def rotated(attn, qkv: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries [T, H, head width] and keys [T, K, head width] of the product qkv [T, P], and values; in place on a GPU."""
    q, k, v = attn.heads(qkv)
    if not is_triton(q):
        return rope_reference(q, *angles), rope_reference(k, *angles), v
    rotate_(q, k, *angles, backward=False)
    return q, k, v


class PackedKeys:
    """Whole sequences, packed: those of a training batch."""

    def __init__(self, angles: Angles, plan: AttentionPlan) -> None:
        self.angles, self.plan = angles, plan

    def attend(self, attn, qkv: torch.Tensor, kept: Kept | None) -> torch.Tensor:
        """The heads' outputs side by side [T, H * head width]. kept: as Block.forward has it."""
        if kept is None:
            return packed_attention(attn, *rotated(attn, qkv, self.angles), self.plan)
        rotated(attn, qkv, self.angles)
        attended, lse = self.attend_rotated(attn, qkv)
        kept.keep({"qkv": qkv, "attended": attended, "lse": lse})
        return attended

    def attend_rotated(self, attn, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What attend returns, for a product that is already rotated, and lse for backward."""
        out, lse = attention_forward(*attn.heads(qkv), attn.sinks, self.plan, **attn.settings())
        return out.flatten(1), lse

    def backward(self, attn, grad: torch.Tensor, qkv: torch.Tensor, attended: torch.Tensor,
                 lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the product before the rotation [T, P], in the memory of qkv, and of the sinks, as parts [parts, H]
        fp32 to be summed. grad: of attend's result. Overwrites attended."""
        q, k, v = attn.heads(qkv)
        out = attended.view_as(q)
        *_, grad_sinks = attention_backward(q, k, v, attn.sinks, out, lse, grad.view_as(q), self.plan, grads=(out, k, v),
                                            **attn.settings())
        q.copy_(out)
        rotate_(q, k, *self.angles, backward=True)
        return qkv, grad_sinks


def packed_attention(attn, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """[queries, H * head width]"""
    return attention(q, k, v, attn.sinks, cu_seqlens=plan.cu_seqlens, plan=plan, **attn.settings()).flatten(1)


class PrefillChunk(NamedTuple):
    """Tokens `start` .. `end` of a sequence; a slot of the cache has the first `start`. prefix_len: length of the prompt if its
    keys are summed before all others, as training does with AttentionPlan's prefixes; else 0. The prompt may end inside this
    chunk."""

    slot: int
    start: int
    end: int
    prefix_len: int = 0


def prompt_numbers(chunks: list[PrefillChunk], cache: KVCache, *, num_rows: int) -> torch.Tensor:
    """Where packed rows of chunks are in their sequences and in the cache, as PromptKeys takes it: one tensor on the host, int64.
    Rows after those of the chunks are idle: they see only each other, and are stored nowhere. Raises ValueError for a chunk that
    does not fit."""
    longest = max(chunk.end for chunk in chunks)
    if longest > cache.max_len:
        raise ValueError(f"a prompt of {longest} tokens does not fit a cache of {cache.max_len} per sequence")
    num_used = sum(chunk.end - chunk.start for chunk in chunks)
    chunks, sections, row = [*chunks, PrefillChunk(0, 0, num_rows - num_used)], [], 0
    for slot, start, end, prefix_len in chunks:
        shift, is_after = start - row, prefix_len <= start
        sections.append((row, slot, shift, start, prefix_len if is_after else 0))
        if not is_after and prefix_len < end:
            sections.append((prefix_len - shift, slot, shift, start, prefix_len))
        row += end - start
    size = next((size for size in NUM_SECTIONS if size >= len(sections)), next_power_of_2(len(sections)))
    sections += [(num_rows, 0, 0, 0, 0)] * (size + 1 - len(sections))
    slots, starts, ends, _ = torch.tensor(chunks).T
    counts = ends - starts
    positions = torch.arange(num_rows) - (counts.cumsum(0) - ends).repeat_interleave(counts)
    columns = [positions, slots.repeat_interleave(counts)]
    for length in sorted(set(cache.lengths)):  # a ring drops all but a chunk's last tokens
        columns.append(positions.masked_fill(positions < (ends - length).repeat_interleave(counts), -1))
        columns[-1][num_used:] = -1
    columns = F.pad(torch.stack(columns), (0, num_rows % 2))  # all at multiples of 16 bytes, for which kernels are compiled
    return torch.cat([columns.flatten(), torch.tensor(sections).T.flatten()])


def last_rows(chunks: list[PrefillChunk], device: torch.device) -> torch.Tensor:
    """The row of each packed chunk's last token: [chunks]."""
    return to_device(torch.tensor([chunk.end - chunk.start for chunk in chunks]).cumsum(0) - 1, device)


class PromptKeys:
    """The next chunks of several sequences, packed; numbers: those of prompt_numbers, on the device. chunks: None if one launch
    is to attend for all of them, in a CUDA graph, too (where Triton computes products); is_prefixed: any may have a prefix. With
    chunks one call attends for all if all begin their sequences, else one call for each, with earlier keys and values from the
    cache: for other devices, and faster for thousands of tokens."""

    def __init__(self, numbers: torch.Tensor, angles_of: Callable[[torch.Tensor], Angles], cache: KVCache,
                 chunks: list[PrefillChunk] | None, *, num_rows: int, is_prefixed: bool) -> None:
        self.cache, self.chunks, self.is_prefixed = cache, chunks, is_prefixed
        lengths, width = sorted(set(cache.lengths)), num_rows + num_rows % 2
        positions, self.slots, *kept = numbers[:(2 + len(lengths)) * width].view(-1, width)[:, :num_rows]  # [T] each
        self.angles, self.kept = angles_of(positions), dict(zip(lengths, kept))  # positions to store, -1 for none
        self.sections = numbers[(2 + len(lengths)) * width:].view(5, -1)
        self.plan, self.spans = None, {}
        if chunks is not None and all(chunk.start == 0 for chunk in chunks):
            self.plan = whole_plan(chunks)
        elif chunks is not None:
            self.spans = {length: [chunk_plan(chunk.start, chunk.end, length, chunk.prefix_len) for chunk in chunks]
                          for length in lengths}

    def attend(self, attn, qkv: torch.Tensor, kept: None) -> torch.Tensor:
        q, k, v = rotated(attn, qkv, self.angles)
        cache, layer, length = self.cache, attn.layer, self.cache.lengths[attn.layer]
        if self.chunks is None:
            attended = chunk_attention(q, k, v, cache.keys[layer], cache.values[layer], attn.sinks, sections=self.sections,
                                       is_prefixed=self.is_prefixed, page_table=cache.table_of(layer),
                                       **attn.settings()).flatten(1)
        elif self.plan is not None:
            attended = packed_attention(attn, q, k, v, self.plan)
        else:
            parts, counts = [], [chunk.end - chunk.start for chunk in self.chunks]
            rows = zip(q.split(counts), k.split(counts), v.split(counts))
            for (queries, *new), chunk, (first, plan) in zip(rows, self.chunks, self.spans[length], strict=True):
                earlier = cache.read(layer, chunk.slot, first, chunk.start)
                parts.append(packed_attention(attn, queries, *map(torch.cat, zip(earlier, new)), plan))
            attended = torch.cat(parts)
        # written last: in a ring new entries replace keys that the chunk's first tokens still need
        cache.write(layer, k, v, self.slots, self.kept[length])
        return attended


class CachedKeys:
    """One new token for each of B sequences, at positions [B] of slots [B] of a cache. Nothing is read back to the host, so a
    call can be captured in a CUDA graph, after one normal call. Other arguments: see decode_attention; layers with a window
    ignore `shared` and `longest`."""

    def __init__(self, angles: Angles, cache: KVCache, slots: torch.Tensor, positions: torch.Tensor, *,
                 prefix_lens: torch.Tensor | None, shared: SharedPrefixes | None, longest: int) -> None:
        self.angles, self.cache, self.slots, self.positions = angles, cache, slots, positions
        self.prefix_lens, self.shared, self.longest = prefix_lens, shared, longest

    def attend(self, attn, qkv: torch.Tensor, kept: None) -> torch.Tensor:
        cache, layer = self.cache, attn.layer
        if is_triton(qkv):
            q, k, v = attn.heads(qkv)
            rotate_and_write(q, k, v, *self.angles, cache.keys[layer], cache.values[layer], self.slots, self.positions,
                             page_table=cache.table_of(layer))
        else:
            q, k, v = rotated(attn, qkv, self.angles)
            cache.write(layer, k, v, self.slots, self.positions)
        is_paged = cache.is_paged[layer]
        return decode_attention(q, cache.keys[layer], cache.values[layer], attn.sinks, slots=self.slots, positions=self.positions,
                                prefix_lens=self.prefix_lens, page_table=cache.table_of(layer),
                                shared=self.shared if is_paged else None, longest=self.longest if is_paged else 0,
                                **attn.settings()).flatten(1)


Keys = PackedKeys | PromptKeys | CachedKeys


def packed_positions(cu_seqlens: list[int], device: torch.device, prefixes: list[int] | None) -> torch.Tensor:
    """Position of each packed token in its sequence, with the prefix before it: [T] int64."""
    bounds = torch.tensor(cu_seqlens)
    lengths = bounds.diff()
    starts = bounds[:-1]
    if prefixes is not None:
        continued = torch.tensor(prefixes)
        starts = starts - torch.where(continued >= 0, lengths[continued], 0)
    return to_device(torch.arange(cu_seqlens[-1]) - torch.repeat_interleave(starts, lengths), device)


def whole_plan(chunks: list[PrefillChunk]) -> AttentionPlan:
    """For chunks that begin their sequences, packed."""
    cu_seqlens, prefixes = [0], []
    for chunk in chunks:
        begin = cu_seqlens[-1]
        if 0 < chunk.prefix_len < chunk.end:
            cu_seqlens.append(begin + chunk.prefix_len)
            prefixes += [-1, len(prefixes)]
        else:
            prefixes.append(-1)
        cu_seqlens.append(begin + chunk.end)
    return AttentionPlan(cu_seqlens, prefixes=prefixes)


def chunk_plan(start: int, end: int, length: int, prefix_len: int) -> tuple[int, AttentionPlan]:
    """For a chunk start .. end of a sequence and a layer that keeps the last `length` tokens: the first position whose key
    attention reads, and the plan from there on. Key tiles start where they start for the whole sequence (counted from its start
    or from the prefix's end), so only whole tiles are left out. The first tile may have keys that the ring has overwritten; the
    mask hides them."""
    kept = max(start - length, 0)
    origin = prefix_len if prefix_len <= kept else 0
    first = origin + (kept - origin) // PAGE_TOKENS * PAGE_TOKENS
    if first < prefix_len < end:
        return first, AttentionPlan([0, prefix_len - first, end - first], prefixes=[-1, 0], first_query=start - first)
    return first, AttentionPlan([0, end - first], first_query=start - first)
