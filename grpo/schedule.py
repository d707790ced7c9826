"""Which completions of a rollout run: slots, pages of the cache, admission, preemption. Touches no tensor but through the cache.

A completion is decoded in a slot of its own. The longest prompts are admitted first (completion lengths are unknown): what is
long should not be left for the end, and pages that are too few are met while there is most to rearrange. A prompt is prefilled
once for its group. Members that find no slot wait with their prompt in a spare slot, from which they are fanned out.

Pages are handed out for the next few steps only. Where they run out, the row admitted last is preempted: it gives its pages back
and is prefilled again, prompt and tokens so far, when there is room; it then goes on with the same bits. Rows that were
preempted go before all others, in the order of their admission, so that nobody is passed over for ever.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import GptOssConfig
from models.kv_cache import PAGE_TOKENS, KVCache, page_bytes, slot_bytes


@dataclass
class Request:
    """One completion."""

    item: int  # its place among the results
    prompt: int  # index
    prompt_len: int  # tokens
    limit: int  # most tokens after the prompt
    place: int  # of its first token in the output buffers
    num_new: int = 0  # tokens after the prompt, as far as the host knows
    is_stopped: bool = False  # by a stop id
    is_finished: bool = False
    slot: int | None = None  # where it has one

    @property
    def num_cached(self) -> int:
        """Tokens that the cache must hold before the next step: all but the newest."""
        return self.prompt_len + self.num_new - 1

    @property
    def max_cached(self) -> int:
        """The most tokens that the cache must hold: the last one of all is drawn, but not fed."""
        return self.prompt_len + self.limit - 1

    @property
    def is_growing(self) -> bool:
        """Whether it will need another page."""
        return KVCache.pages_for(self.max_cached) > KVCache.pages_for(self.num_cached + 1)


@dataclass
class Group:
    """The completions of one prompt that have not started."""

    prompt: int
    prompt_len: int
    waiting: list[Request]
    hidden: Tensor | None = None  # [D], after the prompt, while it is in the spare slot


class Schedule:
    """groups: one for each prompt, in the order of admission; num_rows: rows that run at once, each in one of the first slots of
    the cache; the slot after them is the spare one, if members of a group may have to wait (plan_cache)."""

    def __init__(self, groups: list[Group], cache: KVCache, *, num_rows: int) -> None:
        self.cache, self.groups = cache, groups
        self.live: list[Request] = []  # in the order of admission, which is that of the decoder's rows
        self.preempted: list[Request] = []  # in the order of admission
        self.standing: Group | None = None  # its prompt is in the spare slot
        self.num_preemptions = 0
        self._free_slots, self._spare_slot = list(range(num_rows))[::-1], num_rows

    @property
    def is_done(self) -> bool:
        return not (self.live or self.preempted or self.standing or self.groups)

    def resume(self, max_tokens: int) -> list[Request]:
        """Preempted requests that run again, with pages for what they had: to be prefilled, together at most `max_tokens` or
        else one."""
        resumed, num_tokens = [], 0
        while self.preempted and self._free_slots:
            request = self.preempted[0]
            length = request.num_cached + 1
            if resumed and num_tokens + length > max_tokens or not self._has_room(KVCache.pages_for(length), [request]):
                break
            self._start(request)
            assert self.cache.reserve(request.slot, length), (request, self.cache.num_free_pages)
            resumed.append(self.preempted.pop(0))
            num_tokens += length
        return resumed

    def admit_standing(self) -> tuple[Group, list[Request]] | None:
        """Members of the group whose prompt stands in the spare slot, fanned out from there."""
        group = self.standing
        if group is None or self.preempted or not self._free_slots:
            return None
        has_tail = self._has_tail(group)
        count = min(len(group.waiting), len(self._free_slots))
        while count and not self._has_room(count * has_tail, group.waiting[:count]):
            count -= 1
        if count == 0:
            return None
        members, group.waiting = group.waiting[:count], group.waiting[count:]
        for request in members:
            self._start(request)
        self._fan_out(self._spare_slot, [request.slot for request in members], group.prompt_len)
        if not group.waiting:
            self.cache.release(self._spare_slot)
            self.standing = None
        return group, members

    def admit_groups(self, max_tokens: int) -> list[tuple[Group, list[Request]]]:
        """The next groups, each with the members that start now: the prompt is to be prefilled into the slot of the first, which
        has pages for it; then `share` is to be called. Together at most `max_tokens`, or else one."""
        admitted, num_tokens, promised = [], 0, 0
        while self.groups and self._free_slots and not (self.preempted or self.standing):
            group = self.groups[0]
            if admitted and num_tokens + group.prompt_len > max_tokens:
                break
            pages, has_tail = KVCache.pages_for(group.prompt_len), self._has_tail(group)
            count = min(len(group.waiting), len(self._free_slots))
            # all that start but the first, and the spare slot where some do not, take a page for the prompt's tail
            while count and not self._has_room(promised + pages + has_tail * min(count, len(group.waiting) - 1),
                                               group.waiting[:count]):
                count -= 1
            if count == 0:
                if not self.live and pages <= self.cache.num_free_pages:  # too few to keep the prompt for the others
                    admitted.append(self._begin_alone(group))
                break
            self.groups.pop(0)
            members, group.waiting = group.waiting[:count], group.waiting[count:]
            for request in members:
                self._start(request)
            assert self.cache.reserve(members[0].slot, group.prompt_len), (group, self.cache.num_free_pages)
            promised += has_tail * (count - 1 + bool(group.waiting))
            admitted.append((group, members))
            num_tokens += group.prompt_len
            if group.waiting:
                self.standing = group
        return admitted

    def _begin_alone(self, group: Group) -> tuple[Group, list[Request]]:
        """Starts one member of a group whose others will need another prefill."""
        request = group.waiting.pop(0)
        self._start(request)
        assert self.cache.reserve(request.slot, group.prompt_len), (group, self.cache.num_free_pages)
        return Group(group.prompt, group.prompt_len, []), [request]

    def share(self, group: Group, members: list[Request]) -> None:
        """Fans a prompt out, once it is prefilled, to all members that start and to the spare slot where some do not."""
        targets = [request.slot for request in members[1:]]
        if group.waiting:
            targets.append(self._spare_slot)
        if targets:
            self._fan_out(members[0].slot, targets, group.prompt_len)

    def make_room(self, num_steps: int) -> int:
        """Gives every live request pages for the next `num_steps` steps, the first admitted first. Returns how many were
        preempted for it: the last of `live`."""
        num_before, index = len(self.live), 0
        while index < len(self.live):
            request = self.live[index]
            if self.cache.reserve(request.slot, min(request.num_cached + num_steps, request.max_cached)):
                index += 1
            elif len(self.live) > 1:
                self._preempt(self.live.pop())
            else:
                assert self.standing is not None, f"no page for {request} alone, of {self.cache.num_pages}"
                self._drop_standing()
        return num_before - len(self.live)

    def retire(self) -> list[int] | None:
        """Takes slots and pages of finished requests. Returns the rows that go on, None where all do."""
        if not any(request.is_finished for request in self.live):
            return None
        for request in self.live:
            if request.is_finished:
                self._vacate(request)
        rows = [row for row, request in enumerate(self.live) if not request.is_finished]
        self.live = [self.live[row] for row in rows]
        return rows

    def clear_for_one(self) -> bool:
        """Where nothing runs and what waits finds no room, gives the spare slot's pages up. Returns whether it had any."""
        if self.standing is None or self.live:
            return False
        self._drop_standing()
        return True

    def _has_room(self, num_pages: int, new: list[Request]) -> bool:
        """Whether so many pages can go to new requests and leave one for each that grows: without it, what is admitted would soon
        be preempted. A request that is alone has the whole cache."""
        spare = self.cache.num_free_pages - num_pages
        if len(self.live) + len(new) == 1:
            return spare >= 0
        return spare >= sum(request.is_growing for request in (*self.live, *new))

    @staticmethod
    def _has_tail(group: Group) -> bool:
        """Whether the prompt ends within a page, which every member then copies."""
        return group.prompt_len % PAGE_TOKENS > 0

    def _start(self, request: Request) -> None:
        request.slot = self._free_slots.pop()
        self.live.append(request)

    def _fan_out(self, source: int, targets: list[int], num_tokens: int) -> None:
        assert self.cache.fan_out(source, targets, num_tokens), (targets, num_tokens, self.cache.num_free_pages)

    def _preempt(self, request: Request) -> None:
        self._vacate(request)
        self.preempted.insert(0, request)
        self.num_preemptions += 1

    def _vacate(self, request: Request) -> None:
        self.cache.release(request.slot)
        self._free_slots.append(request.slot)
        request.slot = None

    def _drop_standing(self) -> None:
        """Its group waits for another prefill."""
        self.cache.release(self._spare_slot)
        self.standing.hidden = None
        self.groups.insert(0, self.standing)
        self.standing = None


@dataclass
class CacheShape:
    num_rows: int  # that can run at once
    num_slots: int
    num_pages: int


def plan_cache(config: GptOssConfig, dtype: torch.dtype, requests: list[Request], *, num_bytes: float | None, num_rows: int,
               max_len: int) -> CacheShape:
    """A cache of sequences of up to `max_len` tokens, for requests of which `num_rows` may run at once, within `num_bytes`
    (None: no bound).

    Never more than those rows take at full length. Raises ValueError where the longest request would not fit alone."""
    per_page, per_slot = page_bytes(config, dtype), slot_bytes(config, dtype, max_len=max_len)
    longest = max(request.prompt_len + request.limit for request in requests)
    pages = sorted((KVCache.pages_for(request.prompt_len + request.limit) for request in requests), reverse=True)

    def shape(rows: int, num_pages: int) -> CacheShape:
        # pages too few for a whole group leave members waiting even where every request has a row
        return CacheShape(rows, rows + (len(requests) > 1), num_pages)

    def size(shape: CacheShape) -> int:
        return shape.num_slots * per_slot + shape.num_pages * per_page

    num_rows = min(num_rows, len(requests))
    is_all = num_rows == len(requests)
    whole = CacheShape(num_rows, num_rows + (not is_all), sum(pages[:num_rows]) + (not is_all) * pages[0])
    if num_bytes is None or size(whole) <= num_bytes:
        return whole
    least = size(shape(1, pages[0]))
    if least > num_bytes:
        raise ValueError(
            f"rollout.cache_gb: a cache of {num_bytes / 1e9:.3g} GB does not hold one sequence of {longest} tokens, which "
            f"takes {least / 1e9:.3g} GB: set rollout.cache_gb to {1.01 * least / 1e9:.3g} or more (null: what is free) or "
            "lower rollout.max_new_tokens")
    # rows whose prompt and first page after it find no room would only hold rings
    per_row = 1 + KVCache.pages_for(min(request.prompt_len for request in requests))
    while num_rows > 1 and size(shape(num_rows, max(pages[0], num_rows * per_row))) > num_bytes:
        num_rows -= 1
    fitting = shape(num_rows, pages[0])
    fitting.num_pages += int((num_bytes - size(fitting)) // per_page)
    return fitting
