"""The size of a rollout's cache of keys and values: rows, slots and pages; and what becomes smaller where memory is refused."""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from grpo.out_of_memory import StillOutOfMemory
from grpo.rollout.scheduler import RolloutRow
from models.config import GptOssConfig
from models.decoder import Decoder
from models.kv_cache import PAGE_TOKENS, KVCache, page_bytes, slot_bytes

# Where memory is refused, a prefill becomes half as large, but no smaller than this number of tokens; a cache becomes smaller by
# this factor; with the least sizes, a rollout is begun again so many times, since memory that lay unused has been freed
_LEAST_PREFILL, _SHRINKS, _LAST_TRIES = 64, 0.8, 3


@dataclass
class CacheShape:
    num_rows: int  # that can run at once
    num_slots: int
    num_pages: int


@dataclass
class Limits:
    """What the calls of the model in rollouts may take. Completions do not depend on it."""

    prefill_tokens: int
    cache_bytes: float = math.inf  # unless a row needs more
    change: str | None = None  # of which the run was not told yet
    num_last_tries: int = 0  # of this rollout, with the least sizes

    def lower(self, refusal: str, *, prefilled: int, cache_bytes: int, least_bytes: int, longest: int,
              is_alone: bool = True) -> bool:
        """After memory was refused: lowers the tokens of a prefill, if it was one, of `prefilled` tokens; else the size of the
        cache, which had `cache_bytes`. Returns whether it is the cache's. Raises StillOutOfMemory where the least sizes, a cache
        of least_bytes for one row of `longest` tokens, fail again and again; and at once if the process is not alone: others
        take part in each call of the model, and would not take a smaller one."""
        if not is_alone:
            raise StillOutOfMemory(f"{refusal}. Ranks that share experts (distributed.expert_parallel) do not try with less "
                                   "memory: set a smaller rollout.cache_gb or rollout.max_batch")
        if is_prefill := prefilled > _LEAST_PREFILL:
            self.prefill_tokens = max(prefilled // 2, _LEAST_PREFILL)
        elif cache_bytes > least_bytes:
            self.cache_bytes = max(int(_SHRINKS * cache_bytes), least_bytes)
        elif self.num_last_tries < _LAST_TRIES:
            self.num_last_tries, self.cache_bytes = self.num_last_tries + 1, least_bytes
        else:
            raise StillOutOfMemory(f"{refusal}. The least that was tried is one row of {longest:,} tokens, in a cache of "
                                   f"{least_bytes / 1e9:.3g} GB, with prefills of at most {self.prefill_tokens:,} tokens")
        what = (f"a prefill has at most {self.prefill_tokens:,} tokens" if is_prefill
                else f"the cache has at most {self.cache_bytes / 1e9:.3g} GB")
        self.change = f"out of memory in a rollout ({refusal}): it went on with the same completions; from now on {what}"
        return not is_prefill

    def take_change(self) -> str | None:
        """The newest change, once."""
        change, self.change = self.change, None
        return change


def bytes_of(shape: CacheShape, config: GptOssConfig, dtype: torch.dtype, *, max_len: int) -> int:
    return shape.num_slots * slot_bytes(config, dtype, max_len=max_len) + shape.num_pages * page_bytes(config, dtype)


def least_bytes(config: GptOssConfig, dtype: torch.dtype, rows: list[RolloutRow], *, max_len: int) -> int:
    """The smallest cache in which these rows can run, one at a time."""
    num_pages = max(KVCache.pages_for(row.max_tokens) for row in rows)
    return bytes_of(CacheShape(1, 1 + (len(rows) > 1), num_pages), config, dtype, max_len=max_len)


def plan_cache(config: GptOssConfig, dtype: torch.dtype, rows: list[RolloutRow], *, num_bytes: float | None, num_rows: int,
               max_len: int) -> CacheShape:
    """The cache for rows with sequences of up to `max_len` tokens, `num_rows` of them at once, within `num_bytes` (None: no
    limit).

    It is never larger than those rows need at full length. Raises ValueError if the longest row alone does not fit."""
    per_page = page_bytes(config, dtype)
    pages = sorted((KVCache.pages_for(row.max_tokens) for row in rows), reverse=True)

    def shape(num_rows: int, num_pages: int) -> CacheShape:
        # a prompt slot: if pages are too few for a whole group, members wait even if each has a row
        return CacheShape(num_rows, num_rows + (len(rows) > 1), num_pages)

    def size(shape: CacheShape) -> int:
        return bytes_of(shape, config, dtype, max_len=max_len)

    num_rows = min(num_rows, len(rows))
    is_all = num_rows == len(rows)
    whole = CacheShape(num_rows, num_rows + (not is_all), sum(pages[:num_rows]) + (not is_all) * pages[0])
    if num_bytes is None or size(whole) <= num_bytes:
        return whole
    least = least_bytes(config, dtype, rows, max_len=max_len)
    if least > num_bytes:
        longest = max(row.max_tokens for row in rows)
        raise ValueError(
            f"rollout.cache_gb: a cache of {num_bytes / 1e9:.3g} GB does not hold one sequence of {longest} tokens, which "
            f"takes {least / 1e9:.3g} GB: set rollout.cache_gb to {1.01 * least / 1e9:.3g} or more (null: what is free) or "
            "lower rollout.max_new_tokens")
    # rows need pages for their prompts, whole ones once for a group, and each row one more; without them its slot would only use
    # memory
    shortest, width = min(row.prompt_len for row in rows), max(Counter(row.group for row in rows).values())
    num_shared = shortest // PAGE_TOKENS
    num_own = KVCache.pages_for(shortest) - num_shared + 1
    while num_rows > 1:
        least = max(pages[0], -(-num_rows // width) * num_shared + num_rows * num_own)
        if size(shape(num_rows, least)) <= num_bytes:
            break
        num_rows -= 1
    fitting = shape(num_rows, pages[0])
    fitting.num_pages += int((num_bytes - size(fitting)) // per_page)
    return fitting


def suffices(decoder: Decoder, shape: CacheShape, *, longest: int) -> bool:
    """Whether the decoder's cache is large enough and its memory, if it was offloaded, can be taken again; takes it."""
    cache = decoder.cache
    if (decoder.max_rows < shape.num_rows or cache.num_slots < shape.num_slots or cache.num_pages < shape.num_pages
            or cache.max_len < longest):
        return False
    try:
        cache.reload()
    except torch.OutOfMemoryError:
        return False
    return True
