"""The size of a rollout's cache of keys and values: rows, slots and pages."""

from collections import Counter
from dataclasses import dataclass

import torch

from grpo.rollout.scheduler import RolloutRow
from models.config import GptOssConfig
from models.kv_cache import PAGE_TOKENS, KVCache, page_bytes, slot_bytes


@dataclass
class CacheShape:
    num_rows: int  # that can run at once
    num_slots: int
    num_pages: int


def plan_cache(config: GptOssConfig, dtype: torch.dtype, rows: list[RolloutRow], *, num_bytes: float | None, num_rows: int,
               max_len: int) -> CacheShape:
    """The cache for rows with sequences of up to `max_len` tokens, `num_rows` of them at once, within `num_bytes` (None: no
    limit).

    It is never larger than those rows need at full length. Raises ValueError if the longest row alone does not fit."""
    per_page, per_slot = page_bytes(config, dtype), slot_bytes(config, dtype, max_len=max_len)
    longest = max(row.max_tokens for row in rows)
    pages = sorted((KVCache.pages_for(row.max_tokens) for row in rows), reverse=True)

    def shape(num_rows: int, num_pages: int) -> CacheShape:
        # a prompt slot: if pages are too few for a whole group, members wait even if each has a row
        return CacheShape(num_rows, num_rows + (len(rows) > 1), num_pages)

    def size(shape: CacheShape) -> int:
        return shape.num_slots * per_slot + shape.num_pages * per_page

    num_rows = min(num_rows, len(rows))
    is_all = num_rows == len(rows)
    whole = CacheShape(num_rows, num_rows + (not is_all), sum(pages[:num_rows]) + (not is_all) * pages[0])
    if num_bytes is None or size(whole) <= num_bytes:
        return whole
    least = size(shape(1, pages[0]))
    if least > num_bytes:
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
