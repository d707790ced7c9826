"""The sampler: admits prompts, prefills each once, fans it out to its group, decodes live rows, retires finished ones.

A row is one completion being decoded and holds one slot of the KV cache. Its state lies on the device (models/decoder.py), which
takes several steps before the host looks: a row that has finished leaves the batch then, and its slot goes to a waiting
completion (schedule.py). Every draw is keyed by (seed, step, prompt id, sample, position), so a completion does not depend
on the other rows, on the order of admission, on the size of the cache or on a restart.

N completions of this rollout, B live rows, V vocabulary, P prompts in one prefill.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.batch import Completion, Prompt, Segment
from grpo.rollout.sampling import Draw, SamplingParams, choose
from grpo.rollout.schedule import CacheShape, Group, Pieces, Request, Schedule, plan_cache
from models.decoder import Decoder, NewRow, Rows, can_decode_by_graph
from models.draw_key import POSITION
from models.gpt_oss import GptOss, KeptSets
from models.keys import PrefillChunk
from models.routing_record import RoutingRecord, empty_routing

# Steps between two looks, at which the GPU waits for a copy, the host's bookkeeping and a launch. A row that finishes in between
# stays idle for 3.5 steps on average, 1% of a completion of 350 tokens. Where completions wait for its slot they start as much
# later, but together with others, which makes their prefill cheaper: more looks would not pay.
LOOK_STEPS = 8
# Of a GPU's free memory: the rest is for prefill, the head's logits and graphs.
CACHE_SHARE = 0.7


class Interrupted(Exception):
    """`should_stop` asked to end a rollout early; its completions are dropped and the step can be sampled again."""


@dataclass
class RolloutStats:
    num_completions: int = 0
    # each prompt once, however large its group; and what was preempted, a prompt in pieces included, as often as it begins again
    prefill_tokens: int = 0
    decode_tokens: int = 0  # drawn in decode steps
    decode_steps: int = 0
    num_preemptions: int = 0
    cache_bytes: int = 0
    seconds: float = 0.0


class Sampler:
    """Samples completions from `model` with its current weights.

    stop_ids: token ids that end a completion (they are part of it). max_batch: rows decoded at once. max_len: the
    longest sequence in tokens, prompt included (default: the model's max_position_embeddings). max_prefill_tokens:
    prompts are prefilled together up to this many tokens, which bounds the memory of activations; a longer one in pieces of as
    many, between which live rows are decoded. shares_prompts: training computes a prompt once for its completions; attention on
    a GPU then adds up in the same order. cache_gb: most memory of the KV cache, in 1e9 bytes; None: on a GPU a share of what is
    free when a rollout starts, and never more than its completions need. Completions that find no room wait. Results depend on
    none of max_batch, max_prefill_tokens and cache_gb.

    On a GPU, draws from the whole vocabulary and greedy decoding replay CUDA graphs of whole steps (models/decoder.py); filters
    and recorded routing, which the host looks at after every step, graphs of all but the draw. Cache and graphs serve later calls
    that they suffice for; rest() gives the cache's memory back.
    """

    def __init__(
        self,
        model: GptOss,
        stop_ids: list[int] | tuple[int, ...],
        *,
        max_batch: int,
        seed: int,
        max_len: int | None = None,
        max_prefill_tokens: int = 16384,
        shares_prompts: bool = False,
        cache_gb: float | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_prefill_tokens", max_prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.model, self.stop_ids, self.seed, self.cache_gb = model, list(stop_ids), seed, cache_gb
        self.max_batch, self.max_prefill_tokens, self.shares_prompts = max_batch, max_prefill_tokens, shares_prompts
        self.max_len = model.config.max_position_embeddings if max_len is None else max_len
        self.look_steps: int | None = None  # most steps between two looks; None: LOOK_STEPS of a graph, else 1
        self.last_stats = RolloutStats()
        self._decoder: Decoder | None = None  # of the last rollout, while none runs

    def rest(self) -> None:
        """Gives the cache's memory back, for training; that of graphs too, where the cache would come back elsewhere."""
        if self._decoder is not None and self._decoder.cache.can_rest:
            self._decoder.cache.rest()
        else:
            self._forget()

    def _forget(self) -> None:
        self._decoder = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()  # graphs' memory serves nothing else until it is given back

    def generate(
        self,
        prompts: list[Prompt],
        params: SamplingParams,
        *,
        step: int,
        num_samples: int,
        should_stop: Callable[[], bool] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """`num_samples` completions of every prompt, ordered by prompt (as given), then sample.

        A completion ends with a stop token ("stop"), or after max_new_tokens tokens or where its sequence reaches
        max_len ("length"). Log-probs are those of the distribution really drawn from (sampling.py). Where routing is recorded,
        the last token of a completion has none: it was not fed to the model. `should_stop` is asked between model calls (a run of
        decode steps counts as one), and `progress` told how many completions of how many are finished.

        Raises ValueError for a repeated prompt id, an empty prompt, one that does not fit, or a cache that does not hold one
        sequence; Interrupted when should_stop says so; FloatingPointError when the model's logits are not finite.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: must be at least 1")
        if not prompts:
            self.last_stats = RolloutStats()
            return []
        start = time.perf_counter()
        rollout = _Rollout(self, prompts, range(num_samples), params, step=step)
        try:
            for _ in rollout.run(should_stop):
                if progress is not None:
                    progress(sum(request.is_finished for request in rollout.requests), len(rollout.requests))
            completions = rollout.completions()
        finally:
            self._decoder = rollout.decoder
        self.last_stats = rollout.stats
        self.last_stats.seconds = time.perf_counter() - start
        return completions

    def stream(self, prompt: Prompt, params: SamplingParams, *, step: int, sample: int = 0,
               should_stop: Callable[[], bool] | None = None) -> Iterator[int]:
        """Yields the token ids of one completion as they are drawn, a final stop token included: the same ids as
        completion `sample` of `generate`. On a GPU they come a few at a time. Raises as `generate` does."""
        start = time.perf_counter()
        rollout = _Rollout(self, [prompt], range(sample, sample + 1), params, step=step)
        request, num_yielded = rollout.requests[0], 0
        try:
            for _ in rollout.run(should_stop):
                rollout.check_finite()
                new = rollout.decoder.tokens[request.place + num_yielded:request.place + request.num_new].tolist()
                num_yielded = request.num_new
                yield from new
        finally:
            self._decoder = rollout.decoder
        self.last_stats = rollout.stats
        self.last_stats.seconds = time.perf_counter() - start

    def take_decoder(self, requests: list[Request]) -> tuple[Decoder, int]:
        """A decoder for these requests, and how many of them it can run at once: the last rollout's, with its graphs, where it
        suffices, else a new one. The one place that allocates caches. Until the rollout hands it back, no other has it."""
        longest = max(request.prompt_len + request.limit for request in requests)
        # a power of two: the page table's width costs little, and a conversation that grows keeps its graphs
        max_len = min(self.max_len, 1 << (longest - 1).bit_length())
        plan = functools.partial(plan_cache, self.model.config, self.model.dtype, requests, num_rows=self.max_batch,
                                 max_len=max_len)
        shape = plan(num_bytes=None if self.cache_gb is None else 1e9 * self.cache_gb)
        num_outputs = requests[-1].place + requests[-1].limit
        decoder, self._decoder = self._decoder, None
        if decoder is not None and not (_suffices(decoder, shape, longest=longest, num_outputs=num_outputs) and _wakes(decoder)):
            decoder = None
        if decoder is None:
            self._forget()
            if self.cache_gb is None and self.model.device.type == "cuda":
                shape = plan(num_bytes=CACHE_SHARE * torch.cuda.mem_get_info(self.model.device)[0])
            cache = self.model.new_cache(shape.num_slots, max_len, shape.num_pages)
            decoder = Decoder(self.model, cache, max_rows=shape.num_rows, num_outputs=num_outputs, stop_ids=self.stop_ids,
                              counts_prompts_apart=self.shares_prompts)
        decoder.reset()
        return decoder, shape.num_rows


def _wakes(decoder: Decoder) -> bool:
    """Takes the cache's memory again; False where something else has it now."""
    try:
        decoder.cache.wake()
    except torch.OutOfMemoryError:
        return False
    return True


def _suffices(decoder: Decoder, shape: CacheShape, *, longest: int, num_outputs: int) -> bool:
    cache = decoder.cache
    return (decoder.max_rows >= shape.num_rows and cache.num_slots >= shape.num_slots and cache.num_pages >= shape.num_pages
            and cache.max_len >= longest and decoder.num_outputs >= num_outputs)


class _Rollout:
    """The state of one generate() or stream() call."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: list[Prompt],
        samples: range,
        params: SamplingParams,
        *,
        step: int,
    ) -> None:
        _check_prompts(prompts, max_len=sampler.max_len)
        self.model, self.prompts, self.samples, self.params = sampler.model, prompts, samples, params
        self.max_prefill_tokens, self.shares_prompts = sampler.max_prefill_tokens, sampler.shares_prompts
        self.device = device = sampler.model.device
        self.requests: list[Request] = []
        place = 0
        for index, prompt in enumerate(prompts):
            length = len(prompt.token_ids)
            limit = min(params.max_new_tokens, sampler.max_len - length)
            for _ in samples:
                self.requests.append(Request(len(self.requests), index, length, limit, place))
                place += limit
        num_items, width, capacity = len(self.requests), len(samples), max(request.limit for request in self.requests)
        keys = [[sampler.seed, step, prompt.id, i, len(prompt.token_ids)] for prompt in prompts for i in samples]
        self.keys, self.key_table = keys, torch.tensor(keys, dtype=torch.int64, device=device)  # [N, 5], of the first draws
        self.env_columns: list[set[int]] = [set() for _ in self.requests]  # of tokens that an environment gave
        self.kept: list[list[Tensor]] | None = None  # per completion and drawn token; None without filters
        self.routing: Tensor | None = None  # [N, capacity, L, A] on the host; None where it is not recorded
        self.prompt_routing: dict[int, Tensor] = {}  # [tokens, L, A] on the host, by index of the prompt
        if params.records_routing:
            self.routing = empty_routing(num_items * capacity, self.model.config, "cpu").unflatten(0, (num_items, capacity))
        # taken last: what was checked before must not cost the sampler its decoder
        self.decoder, num_rows = sampler.take_decoder(self.requests)
        self.cache = self.decoder.cache
        self.has_graphs = can_decode_by_graph(self.model)
        self.plain = params.plain if self.has_graphs else None  # None: the host draws
        self.has_whole_steps = self.plain is not None and not params.records_routing
        # else a look costs little beside a step, and idle rows as much as live ones; kept sets and routing are fetched anyway
        self.look_steps = LOOK_STEPS if self.has_whole_steps else 1
        if sampler.look_steps is not None and params.plain is not None and not params.records_routing:
            self.look_steps = sampler.look_steps
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index].token_ids), prompts[index].id))
        groups = [Group(index, len(prompts[index].token_ids), self.requests[index * width:(index + 1) * width])
                  for index in order]
        self.schedule = Schedule(groups, self.cache, num_rows=num_rows)
        self.stats = RolloutStats(num_completions=num_items, cache_bytes=self.cache.num_bytes)

    def run(self, should_stop: Callable[[], bool] | None) -> Iterator[None]:
        """Runs to the end, yielding after every model call; a run of decode steps counts as one."""
        schedule = self.schedule
        while not schedule.is_done:
            if should_stop is not None and should_stop():
                finished = sum(request.is_finished for request in self.requests)
                raise Interrupted(f"while sampling ({finished} of {len(self.requests)} completions were finished)")
            pieces = schedule.pieces
            if pieces is not None and (pieces.is_due or not schedule.live):
                self._prefill_piece(pieces)
            elif pieces is None and self._admit():
                pass
            elif schedule.live:
                self._decode()
            else:
                assert schedule.clear_for_one(), (schedule.preempted, schedule.groups, self.cache.num_free_pages)
                continue
            self._look()
            yield

    def _admit(self) -> bool:
        """Starts what finds room, or begins to prefill it in pieces. Returns whether anything did."""
        schedule = self.schedule
        if resumed := schedule.resume(self.max_prefill_tokens):
            self._resume(resumed)
        elif admitted := schedule.admit_standing():
            group, members = admitted
            self._start(members, group.hidden.expand(len(members), -1))
        elif admitted := schedule.admit_groups(self.max_prefill_tokens):
            self._admit_groups(admitted)
        elif schedule.begin_pieces(self.max_prefill_tokens):
            self._prefill_piece(schedule.pieces)
        else:
            return False
        return True

    def _admit_groups(self, admitted: list[tuple[Group, list[Request]]]) -> None:
        """Prefills prompts and starts their completions."""
        prompts = [self.prompts[group.prompt].token_ids for group, _ in admitted]
        hidden, routing = self._prefill([[ids] for ids in prompts], [members[0].slot for _, members in admitted])  # [P, D]
        for row, (group, members) in enumerate(admitted):
            self._share(group, members, hidden[row], None if routing is None else routing[row])
        counts = torch.tensor([len(members) for _, members in admitted], device=self.device)
        requests = [request for _, members in admitted for request in members]
        self._start(requests, hidden.repeat_interleave(counts, dim=0, output_size=len(requests)))

    def _share(self, group: Group, members: list[Request], hidden: Tensor, routing: Tensor | None) -> None:
        """Fans a prefilled prompt out, and keeps what its members need: the hidden state [D] after it, and its routing."""
        if routing is not None:
            self.prompt_routing[group.prompt] = routing
        self.schedule.share(group, members)
        group.hidden = hidden.clone() if group.waiting else None

    def _prefill_piece(self, pieces: Pieces) -> None:
        """Prefills the next piece; after the last one, its completions start."""
        request, start = pieces.request, pieces.num_done
        end = min(start + self.max_prefill_tokens, pieces.num_tokens)
        ids = (self.prompts[request.prompt].token_ids + self._drawn(request))[start:end]
        tokens = torch.tensor(ids, dtype=torch.int64, device=self.device)
        record = self._new_record(end - start)
        chunk = PrefillChunk(request.slot, start, end, request.prompt_len if self.shares_prompts else 0)
        hidden = self.model.prefill_chunks(tokens, [chunk], self.cache, record=record)  # [1, D]
        self.stats.prefill_tokens += end - start
        pieces.num_done, pieces.is_due = end, False
        if record is not None:
            pieces.routing.append(record.indices.cpu())
        if end < pieces.num_tokens:
            return
        routing = None if record is None else torch.cat(pieces.routing)
        group, members = self.schedule.end_pieces()
        if group is not None:
            self._share(group, members, hidden[0], routing)
        elif routing is not None:
            self.routing[request.item, :request.num_new] = routing[request.prompt_len:]
        self._start(members, hidden.expand(len(members), -1))

    def _resume(self, requests: list[Request]) -> None:
        """Prefills prompts and the tokens drawn after them, and goes on."""
        sequences = [[self.prompts[request.prompt].token_ids, self._drawn(request)] for request in requests]
        if not self.shares_prompts:
            sequences = [[prompt + drawn] for prompt, drawn in sequences]
        hidden, routing = self._prefill(sequences, [request.slot for request in requests])
        if routing is not None:
            for request, rows in zip(requests, routing, strict=True):
                self.routing[request.item, :request.num_new] = rows[request.prompt_len:]
        self._start(requests, hidden)

    def _prefill(self, sequences: list[list[list[int]]], slots: list[int]) -> tuple[Tensor, list[Tensor] | None]:
        """Prefills each sequence, given in parts of which each continues the first, into its slot. Returns the hidden states
        [n, D] after them, and where it is recorded the routing of each, on the host."""
        parts, prefixes, part_slots = [], [], []
        for sequence, slot in zip(sequences, slots, strict=True):
            prefixes += [-1] + [len(parts)] * (len(sequence) - 1)
            part_slots += [slot] * len(sequence)
            parts += sequence
        bounds = torch.tensor([0, *itertools.accumulate(map(len, parts))], dtype=torch.int32)
        tokens = torch.tensor([token for part in parts for token in part], dtype=torch.int64, device=self.device)
        record = self._new_record(len(tokens))
        hidden = self.model.prefill_hidden(tokens, bounds, self.cache, torch.tensor(part_slots, device=self.device),
                                           prefixes=prefixes, record=record)
        self.stats.prefill_tokens += len(tokens)
        lengths = [sum(map(len, sequence)) for sequence in sequences]
        return hidden, None if record is None else list(record.indices.cpu().split(lengths))

    def _start(self, requests: list[Request], hidden: Tensor) -> None:
        """Draws the next token of requests that are in their slots; hidden [n, D]."""
        new = [NewRow(item=request.item, slot=request.slot, prompt_len=request.prompt_len, num_new=request.num_new,
                      limit=request.limit, place=request.place, key=tuple(self.keys[request.item][:POSITION]))
               for request in requests]
        self.decoder.admit(new, hidden, self._draw)
        for request in requests:
            request.num_new += 1

    def _decode(self) -> None:
        """Some steps of all live rows, as many as fit before the next look."""
        if self.schedule.pieces is not None:
            self.schedule.pieces.is_due = True
        live = self.schedule.live
        num_steps = min(self.look_steps, max(request.limit - request.num_new for request in live))
        if self.schedule.make_room(num_steps):
            live = self.schedule.live
            self.decoder.compact(list(range(len(live))))
        self.stats.decode_steps += num_steps
        self.cache.flush()
        prompts = [(request.prompt, request.prompt_len) for request in live]
        longest = max(request.prompt_len + request.num_new for request in live) + num_steps
        if self.has_whole_steps:
            self.decoder.run(num_steps, self.plain, prompts, longest=longest)
            return
        for _ in range(num_steps):
            indices = self.decoder.step(self._draw, prompts, longest=longest, by_graph=self.has_graphs,
                                        records=self.routing is not None)
            if indices is not None:
                items = [request.item for request in live]
                self.routing[items, [request.num_new - 1 for request in live]] = indices.cpu()

    def _look(self) -> None:
        """Learns what has become of the live rows; those that finished leave."""
        for request, is_live, num_new, is_stopped in zip(self.schedule.live, *self.decoder.look(), strict=True):
            self.stats.decode_tokens += num_new - request.num_new
            request.num_new, request.is_stopped, request.is_finished = num_new, is_stopped, not is_live
        self.stats.num_preemptions = self.schedule.num_preemptions
        rows = self.schedule.retire()
        if rows is not None:
            self.decoder.compact(rows)

    def _new_record(self, num_tokens: int) -> RoutingRecord | None:
        return None if self.routing is None else RoutingRecord(num_tokens, self.model.config, self.device)

    def _draw(self, hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The next token of each row [B] and its log-prob [B], from hidden states [B, D]."""
        if self.plain is not None:
            return self.decoder.plain_draw(self.plain)(hidden, rows)
        keys = self.key_table[rows.items]
        keys[:, POSITION] = rows.positions + 1
        result = choose(self.model.head(hidden), keys, self.params)
        if result.kept_ids is None:
            return result.tokens, result.log_probs
        if self.kept is None:
            self.kept = [[] for _ in self.requests]
        for item, ids in zip(rows.items.tolist(), result.kept, strict=True):
            self.kept[item].append(ids)
        return result.tokens, filtered_log_probs(self.model, hidden, result, temperature=self.params.temperature)

    def _extend(self, item: int, token_ids: list[int]) -> None:
        """Appends an environment's tokens to a live completion, which then goes on sampling after them.

        They are fed one by one at the row's next positions and recorded as an `env` segment.
        """
        request = self.requests[item]
        row, first = self.schedule.live.index(request), request.num_new
        assert first + len(token_ids) < request.limit, (first, len(token_ids), request.limit)
        if not self.cache.reserve(request.slot, request.num_cached + len(token_ids)):
            raise ValueError(f"rollout.cache_gb: no room for {len(token_ids)} tokens of an environment; raise it")
        records = [self._new_record(1) for _ in token_ids]
        self.decoder.extend(row, token_ids, records)
        if self.routing is not None:
            fed = torch.cat([record.indices for record in records])
            self.routing[item, first - 1:first - 1 + len(token_ids)] = fed.cpu()
        self.env_columns[item] |= set(range(first, first + len(token_ids)))
        request.num_new += len(token_ids)

    def _drawn(self, request: Request) -> list[int]:
        return self.decoder.tokens[request.place:request.place + request.num_new].tolist()

    def check_finite(self) -> None:
        """Raises FloatingPointError naming the first recorded log-prob that is not finite."""
        is_finite = self.decoder.log_probs.isfinite().cpu()
        for request in self.requests:
            bad = (~is_finite[request.place:request.place + request.num_new]).nonzero()
            if len(bad) > 0:
                _, step, prompt_id, sample, position = self.keys[request.item]
                raise FloatingPointError(
                    f"rollout: the log-prob of a sampled token is not finite (step {step}, prompt {prompt_id}, sample "
                    f"{sample}, position {position + int(bad[0])}): the weights or activations hold NaN or infinity"
                )

    def completions(self) -> list[Completion]:
        """All completions, once every row has finished."""
        unfinished = [request.item for request in self.requests if not request.is_finished]
        assert not unfinished, f"completions {unfinished} unfinished, expected none"
        self.check_finite()
        num_outputs = self.requests[-1].place + self.requests[-1].limit
        tokens, log_probs = self.decoder.tokens[:num_outputs].cpu(), self.decoder.log_probs[:num_outputs].cpu()
        completions = []
        for request in self.requests:
            prompt, item = self.prompts[request.prompt], request.item
            kept = iter(self.kept[item]) if self.kept is not None else None
            routing = None if self.routing is None else self.prompt_routing[request.prompt]
            segments = [Segment(list(prompt.token_ids), "prompt", routing=routing)]
            for from_env, columns in itertools.groupby(range(request.num_new), key=self.env_columns[item].__contains__):
                columns = list(columns)
                start, end = columns[0], columns[-1] + 1
                routing = None if self.routing is None else self.routing[item, start:end].clone()
                ids = tokens[request.place + start:request.place + end].tolist()
                if from_env:
                    segments.append(Segment(ids, "env", routing=routing))
                else:
                    kept_ids = None if kept is None else list(itertools.islice(kept, len(columns)))
                    values = log_probs[request.place + start:request.place + end].tolist()
                    segments.append(Segment(ids, "policy", values, kept_ids, routing))
            finish_reason = "stop" if request.is_stopped else "length"
            sample = self.keys[item][POSITION - 1]
            completions.append(Completion(prompt, sample=sample, segments=segments, finish_reason=finish_reason))
        return completions


def filtered_log_probs(model: GptOss, hidden: Tensor, result: Draw, *, temperature: float) -> Tensor:
    """The log-probs [B] of a filtered draw after hidden [B, D], by the function that training computes them with."""
    sets = KeptSets.of_counts(result.kept_ids, result.kept_counts)
    return model.score(hidden, result.tokens, temperature=temperature, kept=sets)


def _check_prompts(prompts: list[Prompt], *, max_len: int) -> None:
    seen = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(
                f"prompt id {prompt.id} occurs twice: ids must be unique within a rollout, since equal "
                "ids would draw equal completions and merge two groups"
            )
        seen.add(prompt.id)
        length = len(prompt.token_ids)
        if length == 0:
            raise ValueError(f"prompt {prompt.id} has no tokens: a prompt needs at least one")
        if length >= max_len:
            raise ValueError(
                f"prompt {prompt.id} has {length} tokens, but a sequence may have {max_len} at most (max_len, "
                "by default the model's max_position_embeddings) and needs one for the completion: shorten "
                "the prompt or drop it"
            )
