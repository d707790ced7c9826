"""Which completions of a rollout run: slots, pages of the cache, admission, preemption. Touches no tensor but through the cache.

A completion is decoded in a slot of its own. The longest prompts are admitted first (completion lengths are unknown): what is
long should not be left for the end, and pages that are too few are met while there is most to rearrange. A prompt is prefilled
once for its group. Members that find no slot wait with their prompt in a spare slot, from which they are fanned out.

Pages are handed out for the next few steps only. Where they run out, the row admitted last is preempted: it gives its pages back
and is prefilled again, prompt and tokens so far, when there is room; it then goes on with the same bits. Rows that were
preempted go before all others, in the order of their admission, so that nobody is passed over for ever.

What is too long for one prefill is prefilled in pieces, between which live rows are decoded. It has a slot and all of its pages
from the beginning, is admitted after the last piece, and nothing else is admitted meanwhile. Where live rows need its pages it
gives way, being the last that came, and begins again later.
"""

from dataclasses import dataclass, field

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


@dataclass
class Pieces:
    """What is being prefilled in pieces: a group's prompt, into the slot of its first member, or a request that resumes. It
    stays the first of those that wait, and is not live."""

    request: Request
    group: Group | None
    num_tokens: int
    num_done: int = 0  # tokens in the slot
    is_due: bool = True  # whether the next piece comes before other steps of live rows
    routing: list[Tensor] = field(default_factory=list)  # of those tokens, on the host, where it is recorded


class Schedule:
    """groups: one for each prompt, in the order of admission; num_rows: rows that run at once, each in one of the first slots of
    the cache; the slot after them is the spare one, if members of a group may have to wait (plan_cache)."""

    def __init__(self, groups: list[Group], cache: KVCache, *, num_rows: int) -> None:
        self.cache, self.groups = cache, groups
        self.live: list[Request] = []  # in the order of admission, which is that of the decoder's rows
        self.preempted: list[Request] = []  # in the order of admission
        self.standing: Group | None = None  # its prompt is in the spare slot
        self.pieces: Pieces | None = None
        self.num_preemptions = 0
        self._free_slots, self._spare_slot = list(range(num_rows))[::-1], num_rows

    @property
    def is_done(self) -> bool:
        return not (self.live or self.preempted or self.standing or self.groups)

    def resume(self, max_tokens: int) -> list[Request]:
        """Preempted requests that run again, with pages for what they had: to be prefilled, together at most `max_tokens`."""
        resumed, num_tokens = [], 0
        while self.preempted and self._free_slots:
            request = self.preempted[0]
            length = request.num_cached + 1
            if num_tokens + length > max_tokens or not self._has_room(KVCache.pages_for(length), [request]):
                break
            self._start(self.preempted.pop(0), length)
            resumed.append(request)
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
            self._start(request, 0)
        self._fan_out(self._spare_slot, [request.slot for request in members], group.prompt_len)
        if not group.waiting:
            self.cache.release(self._spare_slot)
            self.standing = None
        return group, members

    def admit_groups(self, max_tokens: int) -> list[tuple[Group, list[Request]]]:
        """The next groups, each with the members that start now: the prompt is to be prefilled into the slot of the first, which
        has pages for it; then `share` is to be called. Together at most `max_tokens`."""
        admitted, num_tokens, promised = [], 0, 0
        while self.groups and self._free_slots and not (self.preempted or self.standing):
            group = self.groups[0]
            if num_tokens + group.prompt_len > max_tokens:
                break
            pages = KVCache.pages_for(group.prompt_len)
            count = self._num_members(group, promised + pages, len(self._free_slots))
            if count == 0:
                if not self.live and pages <= self.cache.num_free_pages:  # too few to keep the prompt for the others
                    admitted.append(self._begin_alone(group))
                break
            members = self._begin(self.groups.pop(0), count)
            promised += self._has_tail(group) * (len(members) - 1 + bool(group.waiting))
            admitted.append((group, members))
            num_tokens += group.prompt_len
        return admitted

    def begin_pieces(self, max_tokens: int) -> bool:
        """Gives what comes next, where it is longer than `max_tokens` and finds room, a slot and pages for all of it: it is to be
        prefilled in pieces, and then `end_pieces` to be called. Returns whether it did."""
        num_slots = len(self._free_slots)
        if self.preempted:
            pieces = Pieces(self.preempted[0], None, self.preempted[0].num_cached + 1)
        elif self.groups and self.standing is None:
            pieces = Pieces(self.groups[0].waiting[0], self.groups[0], self.groups[0].prompt_len)
        else:
            return False
        if num_slots == 0 or pieces.num_tokens <= max_tokens:
            return False
        num_pages = KVCache.pages_for(pieces.num_tokens)
        if pieces.group is None:
            has_room = self._has_room(num_pages, [pieces.request])
        else:
            has_room = (self._num_members(pieces.group, num_pages, num_slots) > 0
                        or not self.live and num_pages <= self.cache.num_free_pages)  # for one member, as in admit_groups
        if has_room:
            self._occupy(pieces.request, pieces.num_tokens)
            self.pieces = pieces
        return has_room

    def end_pieces(self) -> tuple[Group | None, list[Request]]:
        """Admits what has been prefilled in pieces. Returns the group, for which `share` is to be called, and the members that
        start now; or None and the request that resumes."""
        pieces, self.pieces = self.pieces, None
        assert pieces.num_done == pieces.num_tokens, (pieces.num_done, pieces.num_tokens)
        if pieces.group is None:
            self.live.append(self.preempted.pop(0))
            return None, [pieces.request]
        # the first member has its slot and pages; live rows may have taken those that others were to get
        group = pieces.group
        count = max(self._num_members(group, 0, 1 + len(self._free_slots)), 1)
        if self._has_tail(group) * min(count, len(group.waiting) - 1) > self.cache.num_free_pages:
            return self._begin_alone(group)
        return group, self._begin(self.groups.pop(0), count)

    def _num_members(self, group: Group, num_pages: int, num_slots: int) -> int:
        """How many members can start in so many slots, where `num_pages` are to be taken for prompts."""
        count = min(len(group.waiting), num_slots)
        # all that start but the first, and the spare slot where some do not, take a page for the prompt's tail
        while count and not self._has_room(num_pages + self._has_tail(group) * min(count, len(group.waiting) - 1),
                                           group.waiting[:count]):
            count -= 1
        return count

    def _begin(self, group: Group, count: int) -> list[Request]:
        """Starts members of a group, the first with pages for the prompt; those that are left wait in the spare slot."""
        members, group.waiting = group.waiting[:count], group.waiting[count:]
        for index, request in enumerate(members):
            self._start(request, 0 if index else group.prompt_len)
        if group.waiting:
            self.standing = group
        return members

    def _begin_alone(self, group: Group) -> tuple[Group, list[Request]]:
        """Starts one member of a group whose others will need another prefill."""
        request = group.waiting.pop(0)
        self._start(request, group.prompt_len)
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
        preempted for it, the last of `live`; before them, what is prefilled in pieces gives way."""
        num_before, index = len(self.live), 0
        while index < len(self.live):
            request = self.live[index]
            if self.cache.reserve(request.slot, min(request.num_cached + num_steps, request.max_cached)):
                index += 1
            elif self.pieces is not None:
                self._vacate(self.pieces.request)
                self.pieces = None
                self.num_preemptions += 1
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

    def _occupy(self, request: Request, num_tokens: int) -> None:
        """Gives the request a slot, if it has none, with pages for so many tokens."""
        if request.slot is None:
            request.slot = self._free_slots.pop()
        assert self.cache.reserve(request.slot, num_tokens), (request, num_tokens, self.cache.num_free_pages)

    def _start(self, request: Request, num_tokens: int) -> None:
        self._occupy(request, num_tokens)
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
