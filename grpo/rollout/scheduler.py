"""Which rows of a rollout run: slots, pages of the cache, admission, preemption. Knows no tensors.

A row is one completion, and runs in a slot of its own. Long prompts are admitted first (the lengths of completions are unknown):
they should not run alone at the end, and if pages run out, there are still many rows to move. A prompt is prefilled once for its
group. If a group has more members than there are free slots, the prompt slot keeps the prompt, and the other members start from
it later.

A row gets pages for the next few steps only. If pages run out, the row admitted last is preempted: it gives slot and pages back.
When there is room, its prompt and its tokens so far are prefilled again, and it continues with the same bits.

A parked row waits for its caller. It keeps slot and pages until others need them; parked rows lose theirs first.
Preempted rows and continued parked rows return in this order, before any group that has not started, so no row waits for ever.

A prompt or row that is too long for one prefill is prefilled in chunks, and live rows are decoded between them. It has a slot and
all of its pages from the first chunk, is admitted after the last one, and nothing else is admitted in between. If live rows need
its pages, it loses them, as the newest, and begins again later.
"""

from dataclasses import dataclass, field

from grpo.batch import Prompt, Segment
from models.keys import MOST_CHUNKS
from models.kv_cache import PAGE_TOKENS, KVCache


@dataclass
class RolloutStats:
    num_completions: int = 0
    # prompts (once for a group), appended tokens, and everything that is prefilled again after its pages were taken
    prefill_tokens: int = 0
    decode_tokens: int = 0  # drawn in decode steps
    decode_steps: int = 0  # of all live rows, but for one that was taken ahead of a prefill
    num_preemptions: int = 0
    cache_bytes: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class RolloutRow:
    """One completion, from its submission to its end. Numbers are tokens."""

    index: int  # among the rows of its session
    group: int  # the number of its group
    prompt: Prompt = field(repr=False)
    sample: int  # index within the group
    step: int  # of the run: a part of the key of its draws
    limit: int  # most tokens after the prompt
    num_new: int = 0  # tokens after the prompt, as of the last sync
    is_parked: bool = False  # it waits for its caller
    finish_reason: str | None = None  # None while it is not finished
    segments: list[Segment] = field(default_factory=list, repr=False)  # after the prompt; those already on the host
    slot: int | None = None  # None without a slot
    place: int = 0  # index of its first token after the prompt in the decoder's buffers
    num_held: int = 0  # for a row that does not run: how many of its tokens its slot holds

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def prompt_len(self) -> int:
        return len(self.prompt.token_ids)

    @property
    def completion_ids(self) -> list[int]:
        """The tokens after the prompt that are on the host."""
        return [token for segment in self.segments for token in segment.token_ids]

    @property
    def token_ids(self) -> list[int]:
        return self.prompt.token_ids + self.completion_ids

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + self.num_new

    @property
    def max_tokens(self) -> int:
        return self.prompt_len + self.limit

    @property
    def room(self) -> int:
        """How many tokens may be appended: at least one must be left to draw."""
        return self.limit - self.num_new - 1

    @property
    def is_growing(self) -> bool:
        """Whether it will need another page. Its last token is drawn, but never fed to the model."""
        return KVCache.pages_for(self.max_tokens - 1) > KVCache.pages_for(self.num_tokens)


@dataclass
class Group:
    """The completions of one prompt that have not started."""

    prompt_len: int  # tokens
    waiting: list[RolloutRow]


@dataclass
class ChunkedPrefill:
    """A prefill in chunks: of a group's prompt, into the slot of its first member, or of a row that returns. The group or row
    stays first in its queue, and is not live."""

    row: RolloutRow
    group: Group | None
    num_tokens: int
    is_due: bool = True  # whether the next chunk comes before other steps of live rows


class Scheduler:
    """At most `num_rows` rows run at once, in the first slots of the cache; the next slot, if there is one, is the prompt slot
    (grpo/rollout/cache_plan.py)."""

    def __init__(self, cache: KVCache, *, num_rows: int) -> None:
        self.live: list[RolloutRow] = []  # in the order of admission, which is that of the decoder's rows
        self.parked: list[RolloutRow] = []  # in the order of parking
        self.returning: list[RolloutRow] = []  # preempted or continued, in the order in which they go on
        self.groups: list[Group] = []  # in the order of admission
        self.partial_group: Group | None = None  # some of its members have started; its prompt is in the prompt slot
        self.chunked: ChunkedPrefill | None = None
        self.num_preemptions = 0
        self.take_cache(cache, num_rows=num_rows)

    def take_cache(self, cache: KVCache, *, num_rows: int) -> None:
        self.cache, self.num_rows = cache, num_rows
        self._free_slots, self._prompt_slot = list(range(num_rows))[::-1], num_rows

    def leave_cache(self) -> None:
        """Takes the slots and pages of all rows and prompts, before another cache comes."""
        for row in self.live[::-1]:
            self._preempt(row)
        self.live = []
        if self.chunked is not None:
            self._drop_chunked()
        for row in (*self.parked, *self.returning):
            if row.slot is not None:
                self._vacate(row)
        if self.partial_group is not None:
            self._drop_partial_group()
        self.cache = None

    def take_back(self, num_rows: int) -> None:
        """Preempts the live rows after the first `num_rows`, whose prefill has failed."""
        while len(self.live) > num_rows:
            self._preempt(self.live.pop())

    def add(self, groups: list[Group]) -> None:
        """Queues groups, the longest prompts first."""
        self.groups += sorted(groups, key=lambda group: (-group.prompt_len, group.waiting[0].prompt.id))

    @property
    def is_waiting(self) -> bool:
        """Whether anything waits for slots or pages."""
        return bool(self.returning or self.partial_group or self.groups)

    @property
    def is_done(self) -> bool:
        """Whether nothing can run: every row is finished or parked."""
        return not (self.live or self.is_waiting)

    # ---- admission

    def resume(self, max_tokens: int) -> list[RolloutRow]:
        """Returning rows that continue now, with pages for their tokens. The caller prefills the tokens that their slots do not
        hold, at most `max_tokens` together: either every row has all to prefill, or every row only its end, and then they are
        at most MOST_CHUNKS."""
        resumed, num_tokens = [], 0
        while self.returning:
            row = self.returning[0]
            num_tokens += row.num_tokens - row.num_held
            is_alike = not resumed or (row.num_held > 0) == (resumed[0].num_held > 0)
            if (num_tokens > max_tokens or not is_alike or row.num_held and len(resumed) == MOST_CHUNKS
                    or not self._has_room_to_return(row)):
                break
            self._start(self.returning.pop(0), row.num_tokens)
            resumed.append(row)
        return resumed

    def admit_partial_group(self) -> tuple[Group, list[RolloutRow]] | None:
        """Members of the partial group that start now, fanned out from the prompt slot."""
        group = self.partial_group
        if group is None or self.returning or not self._free_slots:
            return None
        has_tail = self._has_tail(group)
        count = min(len(group.waiting), len(self._free_slots))
        while count and not self._has_room(count * has_tail, group.waiting[:count]):
            count -= 1
        if count == 0:
            return None
        members, group.waiting = group.waiting[:count], group.waiting[count:]
        for row in members:
            self._start(row, 0)
        self._fan_out(self._prompt_slot, [row.slot for row in members], group.prompt_len)
        if not group.waiting:
            self.cache.release(self._prompt_slot)
            self.partial_group = None
        return group, members

    def admit_groups(self, max_tokens: int) -> list[tuple[Group, list[RolloutRow]]]:
        """The next groups, at most `max_tokens` together, each with the members that start now. The caller prefills the prompt
        into the slot of the first member, which has pages for it, and then calls `share`."""
        admitted, num_tokens, promised = [], 0, 0
        while self.groups and self._free_slots and not (self.returning or self.partial_group):
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

    def share(self, group: Group, members: list[RolloutRow]) -> None:
        """Fans a prefilled prompt out to all members that start, and to the prompt slot if some members wait."""
        targets = [row.slot for row in members[1:]]
        if group.waiting:
            targets.append(self._prompt_slot)
        if targets:
            self._fan_out(members[0].slot, targets, group.prompt_len)

    def begin_chunked(self, max_tokens: int) -> bool:
        """If the next group or row has more than `max_tokens` to prefill and there is room, gives it a slot and all of its pages.
        The caller prefills it in chunks and calls `end_chunked` after the last one. Returns whether it began."""
        num_slots = len(self._free_slots)
        if self.returning:
            row = self.returning[0]
            chunked = ChunkedPrefill(row, None, row.num_tokens)
            has_room = self._has_room_to_return(row)
        elif self.groups and self.partial_group is None and num_slots:
            group = self.groups[0]
            chunked = ChunkedPrefill(group.waiting[0], group, group.prompt_len)
            num_pages = KVCache.pages_for(group.prompt_len)
            has_room = (self._num_members(group, num_pages, num_slots) > 0
                        or not self.live and num_pages <= self.cache.num_free_pages)  # for one member, as in admit_groups
        else:
            return False
        if not has_room or chunked.num_tokens - chunked.row.num_held <= max_tokens:
            return False
        self._occupy(chunked.row, chunked.num_tokens)
        self.chunked = chunked
        return True

    def end_chunked(self) -> tuple[Group | None, list[RolloutRow]]:
        """Admits the group or row that was prefilled in chunks. Returns the group, for which the caller calls `share`, and the
        members that start now; or None and the row that returns."""
        chunked, self.chunked = self.chunked, None
        assert chunked.row.num_held == chunked.num_tokens, (chunked.row.num_held, chunked.num_tokens)
        if chunked.group is None:
            self.live.append(self.returning.pop(0))
            return None, [chunked.row]
        # the first member has its slot and pages; live rows may have taken those of the others
        group = chunked.group
        count = max(self._num_members(group, 0, 1 + len(self._free_slots)), 1)
        if self._has_tail(group) * min(count, len(group.waiting) - 1) > self.cache.num_free_pages:
            return self._begin_alone(group)
        return group, self._begin(self.groups.pop(0), count)

    # ---- rows that run, and rows that give way

    def make_room(self, num_steps: int) -> list[RolloutRow]:
        """Gives every live row pages for the next `num_steps` steps, the first admitted first. If pages run out, these lose
        theirs, in this order: parked rows, returning rows, the chunked prefill, the live rows admitted last. Returns the
        preempted live rows."""
        preempted, index = [], 0
        while index < len(self.live):
            row = self.live[index]
            if self.cache.reserve(row.slot, min(row.num_tokens - 1 + num_steps, row.max_tokens - 1)):
                index += 1
            elif self._evict(self.parked) or self._evict(self.returning):
                pass
            elif self.chunked is not None:
                self._drop_chunked()
            elif len(self.live) > 1:
                preempted.append(self.live.pop())
                self._preempt(preempted[-1])
            else:
                assert self.partial_group is not None, f"no page for {row} alone, of {self.cache.num_pages}"
                self._drop_partial_group()
        return preempted

    def make_way(self) -> bool:
        """If groups or rows wait, takes a parked row's slot and pages or, if nothing runs, a waiting row's. Returns whether."""
        if not self.is_waiting:
            return False
        if self._evict(self.parked) or not self.live and self._evict(self.returning[1:]):
            return True
        if self.live or self.partial_group is None:
            return False
        self._drop_partial_group()
        return True

    def retire(self) -> list[int] | None:
        """Takes slots and pages of finished rows; parked ones keep them. Returns the indices in `live` of the rows that continue,
        None if all do."""
        stays = [place for place, row in enumerate(self.live) if not (row.is_finished or row.is_parked)]
        if len(stays) == len(self.live):
            return None
        for row in self.live:
            if row.is_finished:
                self._vacate(row)
            elif row.is_parked:
                row.num_held = row.num_tokens - 1  # the newest token is not fed
                self.parked.append(row)
        self.live = [self.live[place] for place in stays]
        return stays

    def unpark(self, row: RolloutRow) -> None:
        """Queues a parked row to return, or takes its slot and pages if it is finished."""
        self.parked.remove(row)
        row.is_parked = False
        if not row.is_finished:
            self.returning.append(row)
        elif row.slot is not None:
            self._vacate(row)

    def _num_members(self, group: Group, num_pages: int, num_slots: int) -> int:
        """How many members can start in `num_slots` slots if prompts take `num_pages` pages."""
        count = min(len(group.waiting), num_slots)
        # each member except the first takes a page for the prompt's tail, and so does the prompt slot if members wait
        while count and not self._has_room(num_pages + self._has_tail(group) * min(count, len(group.waiting) - 1),
                                           group.waiting[:count]):
            count -= 1
        return count

    def _begin(self, group: Group, count: int) -> list[RolloutRow]:
        """Starts `count` members of a group, the first with pages for the prompt. If others wait, it is the partial group."""
        members, group.waiting = group.waiting[:count], group.waiting[count:]
        for index, row in enumerate(members):
            self._start(row, 0 if index else group.prompt_len)
        if group.waiting:
            self.partial_group = group
        return members

    def _begin_alone(self, group: Group) -> tuple[Group, list[RolloutRow]]:
        """Starts one member of a group whose others will need another prefill."""
        row = group.waiting.pop(0)
        self._start(row, group.prompt_len)
        return Group(group.prompt_len, []), [row]

    def _has_room(self, num_pages: int, new: list[RolloutRow]) -> bool:
        """Whether new rows can take `num_pages` pages and leave one for each row that grows; without those, new rows would soon
        be preempted. A row that runs alone may take the whole cache."""
        spare = self.cache.num_free_pages - num_pages
        if len(self.live) + len(new) == 1:
            return spare >= 0
        return spare >= sum(row.is_growing for row in (*self.live, *new))

    def _has_room_to_return(self, row: RolloutRow) -> bool:
        num_pages = KVCache.pages_for(row.num_tokens)
        if row.slot is not None:
            return self._has_room(num_pages - self.cache.num_pages_of(row.slot), [row])
        return bool(self._free_slots) and self._has_room(num_pages, [row])

    @staticmethod
    def _has_tail(group: Group) -> bool:
        """Whether the prompt ends within a page, which every member then copies."""
        return group.prompt_len % PAGE_TOKENS > 0

    def _occupy(self, row: RolloutRow, num_tokens: int) -> None:
        """Gives the row a slot, if it has none, and pages for `num_tokens` tokens."""
        if row.slot is None:
            row.slot = self._free_slots.pop()
        assert self.cache.reserve(row.slot, num_tokens), (row, num_tokens, self.cache.num_free_pages)

    def _start(self, row: RolloutRow, num_tokens: int) -> None:
        self._occupy(row, num_tokens)
        self.live.append(row)

    def _fan_out(self, source: int, targets: list[int], num_tokens: int) -> None:
        assert self.cache.fan_out(source, targets, num_tokens), (targets, num_tokens, self.cache.num_free_pages)

    def _preempt(self, row: RolloutRow) -> None:
        self._vacate(row)
        self.returning.insert(0, row)
        self.num_preemptions += 1

    def _evict(self, rows: list[RolloutRow]) -> bool:
        """Takes slot and pages of the last of these rows that has any. Returns whether one had."""
        held = [row for row in rows if row.slot is not None and (self.chunked is None or row is not self.chunked.row)]
        if held:
            self._vacate(held[-1])
            self.num_preemptions += 1
        return bool(held)

    def _vacate(self, row: RolloutRow) -> None:
        self.cache.release(row.slot)
        self._free_slots.append(row.slot)
        row.slot, row.num_held = None, 0

    def _drop_chunked(self) -> None:
        self._vacate(self.chunked.row)
        self.chunked = None
        self.num_preemptions += 1

    def _drop_partial_group(self) -> None:
        """Its prompt will need another prefill."""
        self.cache.release(self._prompt_slot)
        if self.partial_group.waiting:  # none, if memory was refused as the last ones began
            self.groups.insert(0, self.partial_group)
        self.partial_group = None
