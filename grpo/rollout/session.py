"""The sampler, and its sessions: prompts come in, rows are decoded together, completions come out.

A row is one completion while it is sampled. Its state is on the device (models/decoder.py), which takes several steps between two
syncs with the host. At a sync, finished rows leave the batch and waiting ones take their slots (grpo/rollout/scheduler.py). A row
also leaves the batch when it draws one of `park_ids`: it is parked until its caller appends an environment's tokens and continues
it, or ends it. Other rows are decoded meanwhile.

    params = SamplingParams(max_new_tokens=512, park_ids=(tokenizer.call,))
    with sampler.open(params, step=step) as session:
        session.submit(prompts, num_samples=8)
        while session.is_running:
            for row in session.poll():  # rows that finished or parked in this model call
                if row.is_parked:
                    reply = answer(session.completion(row))
                    if len(reply) <= row.room:
                        session.continue_with(row, reply)
                    else:
                        session.finish(row, "length")
        completions = session.drain()

Replies may also come later, and more prompts at any time. Every draw is keyed by (seed, step, prompt id, sample, position), so a
completion depends neither on the other rows nor on when it was admitted, parked, continued or preempted, nor on the size of the
cache.

N rows of a session, B live ones, V vocabulary, P prompts in one prefill, L layers, A experts per token.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from grpo.batch import Completion, Prompt, Segment, check_ids, check_prompts
from grpo.out_of_memory import attempt, attempt_twice, free_unused, say
from grpo.rollout.cache_plan import CacheShape, Limits, bytes_of, least_bytes, plan_cache, suffices
from grpo.rollout.sampling import SamplingParams, choose, filtered_log_probs
from grpo.rollout.scheduler import Group, RolloutRow, RolloutStats, Scheduler
from models.decoder import Decoder, NewRow, Rows, can_decode_by_graph
from models.gpt_oss import GptOss
from models.keys import PrefillChunk
from models.kv_cache import KVCache
from models.routing_record import empty_routing

# Decode steps between two syncs. While the host learns of them and prepares the next ones, the GPU takes the first of those. A
# row that finishes stays idle for 4.5 steps on average, 1% of a completion of 450 tokens. Waiting completions start that much
# later, but together with others, which makes their prefill cheaper: more syncs would not pay.
SYNC_STEPS = 8
# The cache's share of a GPU's free memory; the rest is for prefill, the head's logits and graphs.
CACHE_SHARE = 0.7


class Interrupted(Exception):
    """`should_stop` asked to end a rollout early; its completions are dropped and the step can be sampled again."""


class Sampler:
    """Samples completions from `model` with its current weights.

    stop_ids: token ids that end a completion (they are part of it). max_batch: most rows decoded at once. max_len: the longest
    sequence in tokens, prompt included (default: the model's max_position_embeddings). max_prefill_tokens: most tokens in one
    prefill, which bounds the memory of activations; longer prompts are prefilled in chunks, and live rows are decoded between
    them. shares_prompts: training computes a prompt once for its completions; attention on a GPU then sums in the same order.
    cache_gb: largest size of the KV cache, in 1e9 bytes; None: on a GPU a share of the memory that is free when a rollout starts,
    but never more than its completions need. Completions that do not fit wait. Results do not depend on max_batch,
    max_prefill_tokens or cache_gb. Where a GPU's memory does not suffice all the same, prefills or the cache become smaller for
    good, and `warn` is called with a text about it.

    On a GPU, greedy decoding and draws without filters replay CUDA graphs of whole steps (models/decoder.py). Filters and
    recorded routing, which the host needs after every step, replay graphs that end before the draw. Later rollouts use the same
    cache and graphs if they are large enough; offload() gives the cache's memory back.
    """

    def __init__(self, model: GptOss, stop_ids: list[int] | tuple[int, ...], *, max_batch: int, seed: int,
                 max_len: int | None = None, max_prefill_tokens: int = 16384, shares_prompts: bool = False,
                 cache_gb: float | None = None, warn: Callable[[str], None] = say) -> None:
        for name, value in (("max_batch", max_batch), ("max_prefill_tokens", max_prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.model, self.stop_ids, self.seed, self.cache_gb = model, list(stop_ids), seed, cache_gb
        self.max_batch, self.shares_prompts, self.limits, self.warn = max_batch, shares_prompts, Limits(max_prefill_tokens), warn
        self.max_len = model.config.max_position_embeddings if max_len is None else max_len
        self.on_cache: Callable[[int], None] = lambda num_bytes: None  # called for a cache that takes another's place
        self.sync_steps: int | None = None  # for tests: steps between two syncs; None: SYNC_STEPS with whole-step graphs, else 1
        self.last_stats = RolloutStats()
        self._decoder: Decoder | None = None  # of the last rollout, while none runs

    def offload(self) -> None:
        """Gives the cache's memory back, for training, and that of experts which stream then; also the graphs' memory, if the
        cache cannot return to its addresses."""
        self.model.expert_store.for_update()
        if self._decoder is not None and self._decoder.cache.can_offload:
            self._decoder.cache.offload()
        else:
            self.forget()

    def open(self, params: SamplingParams, *, step: int, should_stop: Callable[[], bool] | None = None,
             progress: Callable[[int, int], None] | None = None) -> "Session":
        """A session that draws completions as `params` say, for a `with` statement.

        `should_stop` is called before each model call (the decode steps up to a sync are one call); if it returns true, poll()
        raises Interrupted. `progress` is called after each with the number of finished completions and of all."""
        return Session(self, params, step=step, should_stop=should_stop, progress=progress)

    def generate(self, prompts: list[Prompt], params: SamplingParams, *, step: int, num_samples: int,
                 should_stop: Callable[[], bool] | None = None,
                 progress: Callable[[int, int], None] | None = None) -> list[Completion]:
        """`num_samples` completions of every prompt, ordered by prompt (as given), then sample. Raises as a session does."""
        with self.open(params, step=step, should_stop=should_stop, progress=progress) as session:
            session.submit(prompts, num_samples)
            return session.drain()

    def stream(self, prompt: Prompt, params: SamplingParams, *, step: int, sample: int = 0,
               should_stop: Callable[[], bool] | None = None) -> Iterator[int]:
        """Yields the token ids of one completion as they are drawn, a final stop token included: the same ids as
        completion `sample` of `generate`. On a GPU they come a few at a time. Raises as a session does."""
        with self.open(params, step=step, should_stop=should_stop) as session:
            row, = session.submit([prompt], 1, first_sample=sample)
            num_yielded = 0
            while session.is_running:
                session.poll()
                new = session.completion_ids(row)[num_yielded:]
                num_yielded += len(new)
                yield from new

    def take_decoder(self, rows: list[RolloutRow], stop_ids: list[int]) -> tuple[Decoder, int]:
        """A decoder for these rows, and how many rows it can run at once: the last rollout's, with its graphs, if it is large
        enough, else a new one. Only here are caches allocated. The session owns the decoder until it hands it back."""
        shape = self.plan(rows)
        attempt_twice(self.model.expert_store.for_sampling)
        decoder, self._decoder = self._decoder, None
        if decoder is None or not suffices(decoder, shape, longest=max(row.max_tokens for row in rows)):
            decoder = None  # the new one needs the memory
            self.forget()
            decoder, shape = self._new_decoder(rows, stop_ids)
        decoder.reset(stop_ids)
        return decoder, shape.num_rows

    def _new_decoder(self, rows: list[RolloutRow], stop_ids: list[int]) -> tuple[Decoder, CacheShape]:
        """A decoder with the largest cache for these rows that the memory allows."""
        def allocate(shape: CacheShape) -> Decoder:
            cache = self.model.new_cache(shape.num_slots, self._max_len_of(rows), shape.num_pages)
            return Decoder(self.model, cache, max_rows=shape.num_rows, stop_ids=stop_ids,
                           counts_prompts_apart=self.shares_prompts)
        while True:
            is_first = self.model.device.type == "cuda" and self.limits.cache_bytes == math.inf
            shape = self.plan(rows, CACHE_SHARE * torch.cuda.mem_get_info(self.model.device)[0] if is_first else None)
            decoder, refusal = attempt(partial(allocate, shape))
            if refusal is None:
                return decoder, shape
            self.retreat(rows, refusal, prefilled=0, cache_bytes=bytes_of(
                shape, self.model.config, self.model.dtype, max_len=self._max_len_of(rows)))

    def retreat(self, rows: list[RolloutRow], refusal: str, *, prefilled: int, cache_bytes: int) -> bool:
        """Limits.lower, for these rows."""
        return self.limits.lower(refusal, prefilled=prefilled, cache_bytes=cache_bytes, least_bytes=self._least_bytes(rows),
                                 longest=max(row.max_tokens for row in rows), is_alone=self.model.share is None)

    def plan(self, rows: list[RolloutRow], num_bytes: float | None = None) -> CacheShape:
        """The cache for these rows, within cache_gb or, if that is None, `num_bytes`. Raises ValueError if a row does not fit."""
        num_bytes = num_bytes if self.cache_gb is None else 1e9 * self.cache_gb
        if self.limits.cache_bytes < math.inf:
            num_bytes = min(math.inf if num_bytes is None else num_bytes, max(self.limits.cache_bytes, self._least_bytes(rows)))
        return plan_cache(self.model.config, self.model.dtype, rows, num_bytes=num_bytes, num_rows=self.max_batch,
                          max_len=self._max_len_of(rows))

    def _least_bytes(self, rows: list[RolloutRow]) -> int:
        return least_bytes(self.model.config, self.model.dtype, rows, max_len=self._max_len_of(rows))

    def _max_len_of(self, rows: list[RolloutRow]) -> int:
        # a power of two: the page table's width costs little, and a conversation that grows keeps its graphs
        return min(self.max_len, 1 << (max(row.max_tokens for row in rows) - 1).bit_length())

    def forget(self) -> bool:
        """Gives the memory of cache and graphs back. Returns whether there was any."""
        had_any, self._decoder = self._decoder is not None, None
        free_unused()  # else nothing but graphs could use the graphs' memory
        return had_any


class Session:
    """Rows of one rollout, from their prompts to their completions (Sampler.open).

    A completion ends with a stop token ("stop"); or when it has max_new_tokens tokens, an environment's included, or its sequence
    has the sampler's max_len tokens ("length"); or when its caller says so. A row that draws a park token but has no room to
    continue ends there ("length"). Log-probs are those of the distribution drawn from (grpo/rollout/sampling.py).
    Raises FloatingPointError when the model's logits are not finite."""

    def __init__(self, sampler: Sampler, params: SamplingParams, *, step: int, should_stop: Callable[[], bool] | None,
                 progress: Callable[[int, int], None] | None) -> None:
        check_ids("park_ids", params.park_ids, vocab_size=sampler.model.config.vocab_size)
        self.params, self.rows, self.stats, self._has_ended = params, [], RolloutStats(), False
        self._sampler, self._model, self._device, self._step = sampler, sampler.model, sampler.model.device, step
        self._should_stop, self._progress, self._start_time = should_stop, progress, time.perf_counter()
        sampler.limits.num_last_tries = 0
        self._decoder: Decoder | None = None  # from the first prompts to the end
        self._scheduler: Scheduler | None = None
        self._stop_ids = list(dict.fromkeys([*sampler.stop_ids, *params.park_ids]))
        self._has_full_cache = False  # the cache is already as large as max_batch and memory allow
        self._prompt_ids: set[int] = set()
        self._num_finished = 0
        self._num_prefilling = 0  # tokens of the prefill that runs
        self._partial_hidden: Tensor | None = None  # [D], after the prompt of the partial group
        self._kept: dict[int, list[Tensor]] = {}  # by row: kept ids of drawn tokens that its segments do not have yet
        self._routing: Tensor | None = None  # [N, capacity, L, A] on the host; None if it is not recorded
        self._prompt_routing: list[Tensor] = []  # of each group [tokens, L, A] on the host
        self._has_graphs = can_decode_by_graph(self._model)
        self._plain = params.plain if self._has_graphs else None  # drawn by kernels/head/draw.py; None: by choose()
        self._has_whole_steps = self._plain is not None and not params.records_routing
        # without whole-step graphs a sync after each step is cheap, and idle rows would cost as much as live ones
        self._sync_steps = SYNC_STEPS if self._has_whole_steps else 1
        if sampler.sync_steps is not None and params.plain is not None and not params.records_routing:
            self._sync_steps = sampler.sync_steps
        self._looks_ahead = self._sync_steps > 1

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        """Hands cache and graphs back to the sampler, for later rollouts."""
        if self._decoder is not None:
            self._decoder.wait()  # the caller may give the cache's memory back
            self._sampler._decoder, self._decoder = self._decoder, None
        if change := self._sampler.limits.take_change():
            self._sampler.warn(change)
        self._has_ended = True
        self.stats.seconds = time.perf_counter() - self._start_time
        self._sampler.last_stats = self.stats

    @property
    def is_running(self) -> bool:
        """Whether any row is neither finished nor parked."""
        return self._scheduler is not None and not self._scheduler.is_done

    # ---- what callers do

    def submit(self, prompts: list[Prompt], num_samples: int, *, first_sample: int = 0,
               most_new_tokens: int | None = None) -> list[RolloutRow]:
        """Queues `num_samples` completions of every prompt, beside the rows that run. Returns their rows, by prompt, then sample.
        `most_new_tokens` is for rows that take the place of finished ones, no shorter, for which the cache was planned.

        Raises ValueError for a prompt id that the session already has, an empty prompt, one that does not fit, a token id outside
        the vocabulary, or a cache that does not hold one sequence."""
        self._check_open()
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: must be at least 1")
        for prompt in prompts:
            check_ids(f"prompt {prompt.id}", prompt.token_ids, vocab_size=self._model.config.vocab_size)
        check_prompts(prompts, max_len=self._sampler.max_len, taken=self._prompt_ids)
        if not prompts:
            return []
        capacity, numbers = min(self.params.max_new_tokens, self._sampler.max_len), itertools.count(len(self.rows))
        most = capacity if most_new_tokens is None else most_new_tokens
        rows = [RolloutRow(next(numbers), group, prompt, sample, self._step,
                           min(most, self._sampler.max_len - len(prompt.token_ids)))
                for group, prompt in enumerate(prompts, start=len(self._prompt_ids))
                for sample in range(first_sample, first_sample + num_samples)]
        self.queue(rows, grows=most_new_tokens is None)
        self._prompt_ids |= {prompt.id for prompt in prompts}
        if self.params.records_routing:
            new = empty_routing(len(rows) * capacity, self._model.config, "cpu").unflatten(0, (len(rows), capacity))
            self._routing = new if self._routing is None else torch.cat([self._routing, new])
            self._prompt_routing += [empty_routing(len(prompt.token_ids), self._model.config, "cpu") for prompt in prompts]
        return rows

    def queue(self, rows: list[RolloutRow], *, grows: bool = True) -> None:
        """Queues rows, whose indices and groups follow those that the session has. Rows with tokens, which another session has
        drawn, are prefilled as they are and go on. grows: the cache becomes large enough for them beside the others; else it does
        so only where it does not hold them alone. Raises ValueError for a cache that does not hold one sequence."""
        self._check_open()
        if grows or not self._cache_holds(rows):
            self._make_cache_hold(rows)
        self.rows += rows
        self._scheduler.returning += [row for row in rows if row.num_new]
        waiting = itertools.groupby((row for row in rows if not row.num_new), key=lambda row: row.group)
        self._scheduler.add([Group(members[0].prompt_len, members) for members in (list(members) for _, members in waiting)])
        self.stats.num_completions = len(self.rows)

    def poll(self) -> list[RolloutRow]:
        """Makes one model call, if anything can run: a prefill, or the decode steps up to the next sync. Returns the rows that
        finished or parked in it, in no particular order."""
        self._check_open()
        if not self.is_running:
            return []
        if self._should_stop is not None and self._should_stop():
            raise Interrupted(f"while sampling ({self._num_finished} of {len(self.rows)} completions were finished)")
        _, refusal = attempt(self._call_model)
        if refusal is not None:
            self._settle()
        left = self._sync()
        if refusal is not None:
            self._retreat(refusal)
        if self._progress is not None:
            self._progress(self._num_finished, len(self.rows))
        return left

    def continue_with(self, row: RolloutRow, token_ids: list[int]) -> None:
        """Appends an environment's tokens to a parked row, as a segment of their own, and lets the row continue. They are
        prefilled together with those of other rows. Raises ValueError for a row that is not this session's or not parked, more
        tokens than row.room, or an id outside the vocabulary."""
        self._check_parked(row)
        check_ids(str(row), token_ids, vocab_size=self._model.config.vocab_size)
        if len(token_ids) > row.room:
            raise ValueError(f"{len(token_ids)} tokens for {row}: it has room for {row.room} and one to be drawn; finish it")
        if token_ids:
            row.segments.append(Segment(list(token_ids), "env"))
            row.num_new += len(token_ids)
        self._scheduler.unpark(row)

    def finish(self, row: RolloutRow, reason: str) -> None:
        """Ends a parked row, with this reason. Raises ValueError for a row that is not this session's or not parked."""
        self._check_parked(row)
        if not isinstance(reason, str) or not reason:
            raise ValueError(f"reason={reason!r} to finish {row}: must be a word, such as \"length\"")
        row.finish_reason = reason
        self._num_finished += 1
        self._scheduler.unpark(row)

    def drain(self) -> list[Completion]:
        """Runs to the end. Returns all rows' completions, in the order of submission. Raises ValueError if rows stay parked."""
        self._check_open()
        while self.is_running:
            self.poll()
        if parked := [row for row in self.rows if row.is_parked]:
            raise ValueError(f"{len(parked)} of {len(self.rows)} rows are parked, {parked[0]} first: continue or finish them")
        return [self.completion(row) for row in self.rows]

    def completion(self, row: RolloutRow) -> Completion:
        """A finished row as a completion, or a parked one with its tokens so far ("parked"). If routing is recorded, the last
        token of a completion has none, because it was not fed to the model. Raises ValueError for a row that still runs."""
        if not (row.is_finished or row.is_parked):
            raise ValueError(f"{row} has neither finished nor parked: poll() until it has")
        is_recorded = self._routing is not None
        prompt_routing = self._prompt_routing[row.group] if is_recorded else None
        segments = [Segment(list(row.prompt.token_ids), "prompt", routing=prompt_routing)]
        start = 0
        for part in row.segments:
            end = start + len(part.token_ids)
            # copies: the lists of a parked row may still grow
            log_probs, kept_ids = (None if values is None else list(values) for values in (part.log_probs, part.kept_ids))
            routing = self._routing[row.index, start:end].clone() if is_recorded else None
            segments.append(Segment(list(part.token_ids), part.source, log_probs, kept_ids, routing))
            start = end
        return Completion(row.prompt, row.sample, segments, row.finish_reason or "parked")

    def completion_ids(self, row: RolloutRow) -> list[int]:
        """The tokens that a row has after its prompt."""
        self._check_own(row)
        self._fetch([row])
        return row.completion_ids

    def _check_open(self) -> None:
        if self._has_ended:
            raise ValueError("the session has ended, with its `with` statement; open another one")

    def _check_own(self, row: RolloutRow) -> None:
        self._check_open()
        if not any(row is own for own in self.rows[row.index:row.index + 1]):
            raise ValueError(f"{row} is a row of another session")

    def _check_parked(self, row: RolloutRow) -> None:
        self._check_own(row)
        if not row.is_parked:
            raise ValueError(f"{row} is not parked")

    # ---- model calls

    def _call_model(self) -> None:
        scheduler = self._scheduler
        while True:
            chunked = scheduler.chunked
            if chunked is not None and (chunked.is_due or not scheduler.live):
                return self._prefill_next_chunk()
            if chunked is None and self._admit():
                return None
            if chunked is not None or not scheduler.make_way():
                return self._decode()

    def _settle(self) -> None:
        """After a call that was refused memory: the decoder's rows are the live ones again, with the steps that were taken."""
        self._decoder.drop_graphs()
        free_unused()
        self._scheduler.take_back(self._decoder.num_rows)
        self._decoder.compact(list(range(len(self._scheduler.live))))

    def _retreat(self, refusal: str) -> None:
        """Goes on with smaller prefills or a smaller cache. Every row gives its slot up, and is prefilled again."""
        if not (rows := [row for row in self.rows if not row.is_finished]):
            return
        self._fetch(rows)
        self._kept.clear()  # of draws that came to nothing
        self._scheduler.leave_cache()
        if self._sampler.retreat(rows, refusal, prefilled=self._num_prefilling, cache_bytes=self._decoder.cache.num_bytes):
            self._take_cache(rows, is_full=False)
        else:
            self._decoder.reset(self._stop_ids)
            self._scheduler.take_cache(self._decoder.cache, num_rows=self._scheduler.num_rows)

    def _admit(self) -> bool:
        """Starts rows for which there is room, or begins a chunked prefill. Returns whether it did either."""
        scheduler, max_tokens = self._scheduler, self._sampler.limits.prefill_tokens
        if resumed := scheduler.resume(max_tokens):
            hidden = self._prefill(resumed, [row.num_tokens for row in resumed])
            self._start(resumed, hidden)
        elif admitted := scheduler.admit_partial_group():
            _, members = admitted
            self._start(members, self._partial_hidden.expand(len(members), -1))
        elif admitted := scheduler.admit_groups(max_tokens):
            first = [members[0] for _, members in admitted]
            hidden = self._prefill(first, [row.num_tokens for row in first])  # [P, D]
            for (group, members), state in zip(admitted, hidden, strict=True):
                self._share(group, members, state)
            counts = torch.tensor([len(members) for _, members in admitted], device=self._device)
            rows = [row for _, members in admitted for row in members]
            self._start(rows, hidden.repeat_interleave(counts, dim=0, output_size=len(rows)))
        elif scheduler.begin_chunked(max_tokens):
            self._prefill_next_chunk()
        else:
            return False
        return True

    def _share(self, group: Group, members: list[RolloutRow], hidden: Tensor) -> None:
        """Fans a prefilled prompt out, and keeps the hidden state [D] of its last token for members that wait."""
        self._scheduler.share(group, members)
        if group.waiting:
            self._partial_hidden = hidden.clone()

    def _prefill_next_chunk(self) -> None:
        """Prefills the next chunk of the chunked prefill; after the last one, its completions start."""
        chunked = self._scheduler.chunked
        row, chunked.is_due = chunked.row, False
        hidden = self._prefill([row], [min(row.num_held + self._sampler.limits.prefill_tokens, chunked.num_tokens)])
        if row.num_held < chunked.num_tokens:
            return
        group, members = self._scheduler.end_chunked()
        if group is not None:
            self._share(group, members, hidden[0])
        self._start(members, hidden.expand(len(members), -1))

    def _prefill(self, rows: list[RolloutRow], ends: list[int]) -> Tensor:
        """Prefills each row from the first token that its slot does not hold up to its end in `ends`. Returns the hidden states
        [n, D] of the last tokens."""
        chunks = [PrefillChunk(row.slot, row.num_held, end, row.prompt_len if self._sampler.shares_prompts else 0)
                  for row, end in zip(rows, ends, strict=True)]
        parts = [row.token_ids[row.num_held:end] for row, end in zip(rows, ends)]
        tokens = torch.tensor(list(itertools.chain(*parts)), dtype=torch.int64)
        self._num_prefilling = len(tokens)
        hidden, indices = self._decoder.prefill(tokens, chunks, records=self._routing is not None)
        self._keep_routing(rows, [row.num_held for row in rows], [len(part) for part in parts], indices)
        self.stats.prefill_tokens += len(tokens)
        self._num_prefilling = 0
        for row, end in zip(rows, ends):
            row.num_held = end
        return hidden

    def _start(self, rows: list[RolloutRow], hidden: Tensor) -> None:
        """Draws the next token of rows that are in their slots; hidden [n, D]."""
        for row in rows:
            row.place = row.slot * self._decoder.cache.max_len
        new = [NewRow(item=row.index, slot=row.slot, prompt_len=row.prompt_len, num_new=row.num_new, limit=row.limit,
                      place=row.place, key=self._key(row)) for row in rows]
        self._decoder.admit(new, hidden, self._draw)
        for row in rows:
            row.num_new += 1

    def _decode(self) -> None:
        """Takes the decode steps of all live rows up to the next sync."""
        scheduler, decoder = self._scheduler, self._decoder
        if scheduler.chunked is not None:
            scheduler.chunked.is_due = True
        num_steps = min(self._sync_steps, max(row.limit - row.num_new for row in scheduler.live))
        if preempted := scheduler.make_room(num_steps + self._looks_ahead):
            self._fetch(preempted)
            decoder.compact(list(range(len(scheduler.live))))
        live = scheduler.live
        self.stats.decode_steps += num_steps
        decoder.cache.flush()
        longest = min(max(row.num_tokens for row in live) + num_steps + self._looks_ahead, max(row.max_tokens for row in live))
        take = partial(self._take_steps, live, [(row.group, row.prompt_len) for row in live], longest)
        take(num_steps - decoder.num_ahead)
        if self._looks_ahead and any(row.limit - row.num_new > num_steps for row in live):
            decoder.look_ahead(partial(take, 1))

    def _take_steps(self, live: list[RolloutRow], prompts: list[tuple[int, int]], longest: int, num_steps: int) -> None:
        if self._has_whole_steps:
            return self._decoder.run(num_steps, self._plain, prompts, longest=longest)
        for _ in range(num_steps):
            indices = self._decoder.step(self._draw, prompts, longest=longest, by_graph=self._has_graphs,
                                         records=self._routing is not None)
            if indices is not None:
                self._routing[[row.index for row in live], [row.num_new - 1 for row in live]] = indices.cpu()

    def _draw(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The next token of each row [B] and its log-prob [B], from hidden states [B, D]."""
        if self._plain is not None:
            return self._decoder.plain_draw(self._plain)(hidden, rows)
        indices = rows.items.tolist()
        keys = torch.tensor([self._key(self.rows[index]) for index in indices], device=self._device)  # [B, 4]
        keys = torch.cat([keys, (rows.positions + 1).unsqueeze(1)], dim=1)
        result = choose(self._model.head(hidden), keys, self.params)
        if result.kept_ids is None:
            return result.tokens, result.log_probs
        for index, ids in zip(indices, result.kept, strict=True):
            self._kept.setdefault(index, []).append(ids)
        return result.tokens, filtered_log_probs(self._model, hidden, result, temperature=self.params.temperature)

    # ---- what the host learns

    def _sync(self) -> list[RolloutRow]:
        """Fetches the state of the live rows. Returns those that finished or parked, which leave the batch."""
        left = []
        for row, token, goes_on, num_new, is_stopped in zip(self._scheduler.live, *self._decoder.sync(), strict=True):
            self.stats.decode_tokens += num_new - row.num_new
            row.num_new = num_new
            if goes_on:
                continue
            left.append(row)
            is_park_token = token in self.params.park_ids
            if is_park_token and row.room > 0:
                row.is_parked = True
            else:
                row.finish_reason = "stop" if is_stopped and not is_park_token else "length"
                self._num_finished += 1
        self._fetch(left)
        self.stats.num_preemptions = self._scheduler.num_preemptions
        stays = self._scheduler.retire()
        if stays is not None:
            attempt_twice(partial(self._decoder.compact, stays))
        return left

    def _fetch(self, rows: list[RolloutRow]) -> None:
        """Copies drawn tokens into the rows' segments. Raises FloatingPointError if a log-prob is not finite; it says which."""
        rows = [row for row in rows if row.num_new > len(row.completion_ids)]
        if not rows:
            return
        starts = [len(row.completion_ids) for row in rows]
        spans = [(row.place + start, row.place + row.num_new) for row, start in zip(rows, starts)]
        drawn = attempt_twice(partial(self._decoder.fetch, spans))
        for row, start, (tokens, log_probs) in zip(rows, starts, drawn, strict=True):
            if bad := [index for index, value in enumerate(log_probs.tolist()) if not math.isfinite(value)]:
                raise FloatingPointError(
                    f"rollout: the log-prob of a sampled token is not finite (step {row.step}, prompt {row.prompt.id}, sample "
                    f"{row.sample}, position {row.prompt_len + start + bad[0]}): the weights or activations hold NaN or infinity")
            if not row.segments or row.segments[-1].source != "policy":
                row.segments.append(Segment([], "policy", [], None if self.params.plain is not None else []))
            segment = row.segments[-1]
            segment.token_ids += tokens.tolist()
            segment.log_probs += log_probs.tolist()
            if segment.kept_ids is not None:
                segment.kept_ids += self._kept.pop(row.index)[:len(tokens)]

    def _keep_routing(self, rows: list[RolloutRow], starts: list[int], lengths: list[int], recorded: Tensor | None) -> None:
        """Keeps the recorded experts of packed tokens: of each row `lengths` tokens, from its token number `starts` on."""
        if recorded is None:
            return
        for row, start, indices in zip(rows, starts, recorded.cpu().split(lengths), strict=True):
            num_prompt = min(max(row.prompt_len - start, 0), len(indices))
            self._prompt_routing[row.group][start:start + num_prompt] = indices[:num_prompt]
            first = start + num_prompt - row.prompt_len
            if num_prompt < len(indices):
                self._routing[row.index, first:first + len(indices) - num_prompt] = indices[num_prompt:]

    def _make_cache_hold(self, new: list[RolloutRow]) -> None:
        """Takes a cache for the first rows, and a larger one if later rows need it: running rows are then preempted."""
        rows = [row for row in self.rows if not row.is_finished] + new
        if self._decoder is None:
            self._decoder, num_rows = self._sampler.take_decoder(rows, self._stop_ids)
            self._scheduler = Scheduler(self._decoder.cache, num_rows=num_rows)
            self.stats.cache_bytes = self._decoder.cache.num_bytes
        elif not self._cache_holds(rows):
            # plan for max_batch + 1 rows of the longest length: one more than can run, so that there is a prompt slot
            rows += [max(rows, key=lambda row: row.max_tokens)] * (self._sampler.max_batch + 1 - len(rows))
            self._sampler.plan(rows)  # before anything is given up
            self._fetch(self._scheduler.live)
            self._scheduler.leave_cache()
            self._take_cache(rows, is_full=True)

    def _take_cache(self, rows: list[RolloutRow], *, is_full: bool) -> None:
        """Another cache for these rows, in the place of the one that they have left."""
        self._decoder.wait()
        self._decoder, self._has_full_cache = None, is_full
        self._decoder, num_rows = self._sampler.take_decoder(rows, self._stop_ids)
        self._scheduler.take_cache(self._decoder.cache, num_rows=num_rows)
        self.stats.cache_bytes = self._decoder.cache.num_bytes
        self._sampler.on_cache(self.stats.cache_bytes)

    def _cache_holds(self, rows: list[RolloutRow]) -> bool:
        """Whether each of these rows fits into the present cache, and all at once unless that cache is already the largest."""
        cache, pages = self._decoder.cache, [KVCache.pages_for(row.max_tokens) for row in rows]
        if max(row.max_tokens for row in rows) > cache.max_len or max(pages) > cache.num_pages:
            return False
        return self._has_full_cache or (len(rows) <= self._scheduler.num_rows and sum(pages) <= cache.num_pages)

    def _key(self, row: RolloutRow) -> tuple[int, int, int, int]:
        """The RNG key of a row's draws, without the position."""
        return self._sampler.seed, row.step, row.prompt.id, row.sample
