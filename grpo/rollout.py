"""The sampler: admits prompts, prefills each once, fans it out to its group, decodes live rows, retires finished ones.

A row is one completion being decoded and holds one slot of the KV cache. Only live rows are decoded: a row that
finishes leaves the batch at once and its slot goes to a waiting completion. Every draw is keyed by (seed, step, prompt
id, sample, position), so a completion does not depend on the other rows, on the order of admission or on a restart.

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
from grpo.sampling import Draw, check_settings, draw, greedy
from models.decoder import Decoder, can_decode_by_graph
from models.draw_key import key_words
from models.gpt_oss import GptOss
from models.routing_record import RoutingRecord, empty_routing

POSITION = 4  # column of the position in a sampling key


class Interrupted(Exception):
    """`should_stop` asked to end a rollout early; its completions are dropped and the step can be sampled again."""


@dataclass
class RolloutStats:
    num_completions: int = 0
    prefill_tokens: int = 0  # each prompt once, however large its group
    decode_tokens: int = 0  # rows fed to decode steps, summed over steps
    decode_steps: int = 0
    cache_bytes: int = 0
    seconds: float = 0.0


class Sampler:
    """Samples completions from `model` with its current weights; keeps nothing between calls but `last_stats`.

    stop_ids: token ids that end a completion (they are part of it). max_batch: rows decoded at once. max_len: the
    longest sequence in tokens, prompt included (default: the model's max_position_embeddings). max_prefill_tokens:
    prompts are prefilled together up to this many tokens; a longer prompt goes alone. shares_prompts: training computes a
    prompt once for its completions; attention on a GPU then adds up in the same order.

    On a GPU, draws from the whole vocabulary replay CUDA graphs (models/decoder.py); filters, greedy decoding and recorded
    routing take a step as it comes.
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
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_prefill_tokens", max_prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.model, self.stop_ids, self.seed = model, list(stop_ids), seed
        self.max_batch, self.max_prefill_tokens, self.shares_prompts = max_batch, max_prefill_tokens, shares_prompts
        self.max_len = model.config.max_position_embeddings if max_len is None else max_len
        self.last_stats = RolloutStats()

    def generate(
        self,
        prompts: list[Prompt],
        *,
        step: int,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        greedy: bool = False,
        records_routing: bool = False,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        """`num_samples` completions of every prompt, ordered by prompt (as given), then sample.

        A completion ends with a stop token ("stop"), or after max_new_tokens tokens or where its sequence reaches
        max_len ("length"). Log-probs are those of the distribution really drawn from (sampling.py); with `greedy`, the
        other settings do not apply and log-probs are at temperature 1. With `records_routing` segments hold the experts that
        their tokens went to; the last token of a completion was not fed to the model and has none. `should_stop` is asked
        between model calls.

        Raises ValueError for a setting out of range, a repeated prompt id, an empty prompt or one that does not fit;
        Interrupted when should_stop says so; FloatingPointError when the model's logits are not finite.
        """
        choose = _chooser(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, is_greedy=greedy)
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: must be at least 1")
        if not prompts:
            self.last_stats = RolloutStats()
            return []
        start = time.perf_counter()
        rollout = _Rollout(
            self,
            prompts,
            range(num_samples),
            step=step,
            max_new_tokens=max_new_tokens,
            choose=choose,
            records_routing=records_routing,
            plain_temperature=_plain_temperature(temperature, top_k=top_k, top_p=top_p, min_p=min_p, is_greedy=greedy),
        )
        for _ in rollout.run(should_stop):
            pass
        completions = rollout.completions()
        self.last_stats = rollout.stats
        if rollout.decoder is not None:
            del rollout  # its cache and graphs
            torch.cuda.empty_cache()  # graphs' memory serves nothing else until it is given back
        self.last_stats.seconds = time.perf_counter() - start
        return completions

    def stream(
        self,
        prompt: Prompt,
        *,
        step: int,
        max_new_tokens: int,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        greedy: bool = False,
        sample: int = 0,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[int]:
        """Yields the token ids of one completion as they are drawn, a final stop token included: the same ids as
        completion `sample` of `generate`. Raises as `generate` does."""
        choose = _chooser(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, is_greedy=greedy)
        start = time.perf_counter()
        samples = range(sample, sample + 1)
        plain_temperature = _plain_temperature(temperature, top_k=top_k, top_p=top_p, min_p=min_p, is_greedy=greedy)
        rollout = _Rollout(self, [prompt], samples, step=step, max_new_tokens=max_new_tokens, choose=choose,
                           plain_temperature=plain_temperature)
        for index, _ in enumerate(rollout.run(should_stop)):
            rollout.check_finite(index + 1)
            yield int(rollout.tokens[0, index])
        self.last_stats = rollout.stats
        self.last_stats.seconds = time.perf_counter() - start


@dataclass
class _Rows:
    """Live rows; `tokens` are the newest tokens, not yet in the cache."""

    items: Tensor  # [B] int64: which completion
    slots: Tensor  # [B] int64: its slot of the cache
    keys: Tensor  # [B, 5] int64: key of the next draw; column POSITION is the next token's position
    tokens: Tensor  # [B] int64
    num_new: Tensor  # [B] int64: tokens after the prompt
    limits: Tensor  # [B] int64: most tokens after the prompt

    def select(self, rows: Tensor) -> "_Rows":
        return _Rows(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def join(self, other: "_Rows") -> "_Rows":
        return _Rows(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in self.__dataclass_fields__))


class _Rollout:
    """The state of one generate() or stream() call."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: list[Prompt],
        samples: range,
        *,
        step: int,
        max_new_tokens: int,
        choose: Callable[[Tensor, Tensor], Draw],
        plain_temperature: float | None,  # of draws from the whole vocabulary, None where something else chooses
        records_routing: bool = False,
    ) -> None:
        _check_prompts(prompts, max_len=sampler.max_len, max_new_tokens=max_new_tokens)
        self.model, self.prompts, self.samples, self.choose = sampler.model, prompts, samples, choose
        self.max_prefill_tokens, self.shares_prompts = sampler.max_prefill_tokens, sampler.shares_prompts
        self.device = device = sampler.model.device
        self.stop_ids = torch.tensor(sampler.stop_ids, dtype=torch.int64, device=device)
        num_items, width = len(prompts) * len(samples), len(samples)
        lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts]).repeat_interleave(width)  # [N]
        limits = (sampler.max_len - lengths).clamp(max=max_new_tokens)  # [N]
        keys = [[sampler.seed, step, prompt.id, i, len(prompt.token_ids)] for prompt in prompts for i in samples]
        self.first_keys = torch.tensor(keys, dtype=torch.int64, device=device)  # [N, 5]
        self.limits = limits.to(device)
        # What was drawn, by completion; columns beyond a completion's end mean nothing.
        capacity = int(limits.max())
        self.tokens = torch.zeros(num_items, capacity, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(num_items, capacity, dtype=torch.float32, device=device)
        self.is_env = torch.zeros(num_items, capacity, dtype=torch.bool, device=device)
        self.num_new = torch.zeros(num_items, dtype=torch.int64, device=device)  # set when a completion ends
        self.is_stopped = torch.zeros(num_items, dtype=torch.bool, device=device)
        self.kept: list[list[list[int]]] | None = None  # per completion and drawn token; None without filters
        self.routing: Tensor | None = None  # [N, capacity, L, A] on the host; None where it is not recorded
        self.prompt_routing: list[Tensor] = []  # [tokens, L, A] on the host, of the prompts prefilled so far
        if records_routing:
            self.routing = empty_routing(num_items * capacity, self.model.config, "cpu").unflatten(0, (num_items, capacity))
        # A group that does not fit at once waits with its prompt in a spare slot: no prompt is prefilled twice.
        num_slots = min(sampler.max_batch, num_items)
        self.spare_slot = num_slots if num_slots < num_items else None
        self.free_slots = list(range(num_slots))[::-1]
        num_spare = 0 if self.spare_slot is None else 1
        self.cache = self.model.new_cache(num_slots=num_slots + num_spare, max_len=int((lengths + limits).max()))
        self.decoder = None
        if plain_temperature is not None and not records_routing and can_decode_by_graph(self.model):
            self.decoder = Decoder(self.model, self.cache, max_rows=num_slots, temperature=plain_temperature,
                                   counts_prompts_apart=self.shares_prompts)
        self.next_prompt = 0
        self.waiting_items: list[int] = []  # completions whose prompt is in the spare slot
        self.waiting_hidden = None  # [1, D], after that prompt
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        self.live = _Rows(empty, empty, empty.reshape(0, 5), empty, empty, empty)
        self.stats = RolloutStats(num_completions=num_items, cache_bytes=self.cache.num_bytes)

    def run(self, should_stop: Callable[[], bool] | None) -> Iterator[None]:
        """Runs to the end, yielding after every model call."""
        while True:
            if should_stop is not None and should_stop():
                raise Interrupted(
                    f"rollout stopped with {self._num_unfinished()} of {len(self.first_keys)} completions unfinished"
                )
            if self.waiting_items and self.free_slots:
                self._admit_waiting()
            elif self.next_prompt < len(self.prompts) and self.free_slots:
                self._admit_prompts()
            elif len(self.live.items) > 0:
                self._decode()
            else:
                return
            yield

    def _admit_prompts(self) -> None:
        """Prefills the next prompts, as many as slots and the token budget allow, and starts their completions."""
        batch, slots, num_tokens, width = [], [], 0, len(self.samples)
        while self.next_prompt < len(self.prompts) and self.free_slots:
            length = len(self.prompts[self.next_prompt].token_ids)
            if batch and num_tokens + length > self.max_prefill_tokens:
                break
            batch.append(self.next_prompt)
            slots.append([self.free_slots.pop() for _ in range(min(width, len(self.free_slots)))])
            num_tokens += length
            self.next_prompt += 1
        ids = [self.prompts[index].token_ids for index in batch]
        bounds = torch.tensor([0, *itertools.accumulate(len(x) for x in ids)], dtype=torch.int32, device=self.device)
        tokens = torch.tensor([token for x in ids for token in x], dtype=torch.int64, device=self.device)
        first_slots = torch.tensor([group[0] for group in slots], device=self.device)
        for slot in (group[0] for group in slots):
            self.cache.reserve(slot, self.cache.max_len)
        record = self._new_record(num_tokens)
        hidden = self.model.prefill_hidden(tokens, bounds, self.cache, first_slots, record=record)  # [P, D]
        if record is not None:
            self.prompt_routing += record.indices.cpu().split([len(x) for x in ids])
        self.stats.prefill_tokens += num_tokens

        items = []
        for index, group, prompt_ids in zip(batch, slots, ids, strict=True):
            targets = group[1:]
            if len(group) < width:  # only the last prompt: it took the last free slots
                targets = [*targets, self.spare_slot]
                self.waiting_items = list(range(index * width + len(group), (index + 1) * width))
                self.waiting_hidden = hidden[-1:].clone()
            if targets:
                self._fan_out(group[0], targets, len(prompt_ids))
            items += range(index * width, index * width + len(group))
        counts = torch.tensor([len(group) for group in slots], device=self.device)
        self._start(items, [slot for group in slots for slot in group], hidden.repeat_interleave(counts, dim=0))

    def _admit_waiting(self) -> None:
        """Starts completions of the prompt in the spare slot."""
        count = min(len(self.waiting_items), len(self.free_slots))
        items, self.waiting_items = self.waiting_items[:count], self.waiting_items[count:]
        slots = [self.free_slots.pop() for _ in range(count)]
        num_tokens = len(self.prompts[items[0] // len(self.samples)].token_ids)
        self._fan_out(self.spare_slot, slots, num_tokens)
        if not self.waiting_items:
            self.cache.release(self.spare_slot)
        self._start(items, slots, self.waiting_hidden.expand(count, -1))

    def _fan_out(self, source: int, targets: list[int], num_tokens: int) -> None:
        self.cache.fan_out(source, targets, num_tokens)
        for slot in targets:
            self.cache.reserve(slot, self.cache.max_len)

    def _start(self, items: list[int], slots: list[int], hidden: Tensor) -> None:
        """Draws the first token of completions whose prompt is in their slots; hidden [B, D]."""
        index = torch.tensor(items, device=self.device)
        zeros = torch.zeros_like(index)
        rows = _Rows(
            items=index,
            slots=torch.tensor(slots, device=self.device),
            keys=self.first_keys[index],
            tokens=zeros,
            num_new=zeros,
            limits=self.limits[index],
        )
        self.live = self.live.join(self._record(rows, self._draw(rows, hidden)))

    def _decode(self) -> None:
        """One token for every live row."""
        rows = self.live
        self.stats.decode_tokens += len(rows.items)
        self.stats.decode_steps += 1
        if self.decoder is None:
            result = self._draw(rows, self._feed(rows))
        else:
            positions = rows.keys[:, POSITION]
            self.cache.flush()
            result = Draw(*self.decoder.step(rows.tokens, positions - 1, rows.slots, positions - rows.num_new,
                                             key_words(rows.keys)))
        self.live = self._record(rows, result)

    def _feed(self, rows: _Rows) -> Tensor:
        """Feeds the rows' newest tokens to the model. Returns its final hidden states [B, D]."""
        record = self._new_record(len(rows.items))
        positions = rows.keys[:, POSITION]
        prefix_lens = positions - rows.num_new if self.shares_prompts else None
        hidden = self.model.decode_hidden(
            rows.tokens, positions - 1, self.cache, rows.slots, record=record, prefix_lens=prefix_lens
        )
        if record is not None:
            items, columns = torch.stack([rows.items, rows.num_new - 1]).cpu()
            self.routing[items, columns] = record.indices.cpu()
        return hidden

    def _new_record(self, num_tokens: int) -> RoutingRecord | None:
        return None if self.routing is None else RoutingRecord(num_tokens, self.model.config, self.device)

    def _draw(self, rows: _Rows, hidden: Tensor) -> Draw:
        """The next token of each row from hidden states [B, D]."""
        if self.decoder is None:
            return self.choose(self.model.head(hidden), rows.keys)
        return Draw(*self.model.draw(hidden, key_words(rows.keys), temperature=self.decoder.temperature))

    def _record(self, rows: _Rows, result: Draw) -> _Rows:
        """Records a token per row; returns the rows that go on, the slots of the others become free."""
        self.tokens[rows.items, rows.num_new] = result.tokens
        self.log_probs[rows.items, rows.num_new] = result.log_probs
        if (kept := result.kept) is not None:
            if self.kept is None:
                self.kept = [[] for _ in range(len(self.first_keys))]
            for item, ids in zip(rows.items.tolist(), kept, strict=True):
                self.kept[item].append(ids)
        rows.keys[:, POSITION] += 1
        rows.tokens, rows.num_new = result.tokens, rows.num_new + 1
        is_stopped = (rows.tokens[:, None] == self.stop_ids).any(dim=1)  # [B]
        is_finished = is_stopped | (rows.num_new >= rows.limits)
        if not is_finished.any():
            return rows
        finished = rows.items[is_finished]
        self.num_new[finished] = rows.num_new[is_finished]
        self.is_stopped[finished] = is_stopped[is_finished]
        free_slots = rows.slots[is_finished].tolist()
        for slot in free_slots:
            self.cache.release(slot)
        self.free_slots += free_slots
        return rows.select((~is_finished).nonzero().squeeze(1))

    def _extend(self, row: int, token_ids: list[int]) -> None:
        """Appends an environment's tokens to live row `row`, which then goes on sampling after them.

        They are fed one by one at the row's next positions and recorded as an `env` segment.
        """
        rows, index = self.live, torch.tensor([row], device=self.device)
        one = rows.select(index)  # a copy
        num_new = int(one.num_new)
        assert num_new + len(token_ids) < int(one.limits), (num_new, len(token_ids), int(one.limits))
        for token in token_ids:
            self._feed(one)
            one.tokens[0] = token
            one.keys[0, POSITION] += 1
            one.num_new += 1
        rows.tokens[index], rows.keys[index], rows.num_new[index] = one.tokens, one.keys, one.num_new
        written = slice(num_new, num_new + len(token_ids))
        self.tokens[rows.items[row], written] = torch.tensor(token_ids, device=self.device)
        self.is_env[rows.items[row], written] = True

    def _num_unfinished(self) -> int:
        return int((self.num_new == 0).sum())

    def check_finite(self, num_columns: int) -> None:
        """Raises FloatingPointError naming the first recorded log-prob that is not finite."""
        bad = (~self.log_probs[:, :num_columns].isfinite()).nonzero()
        if len(bad) > 0:
            item, column = bad[0].tolist()
            _, step, prompt_id, sample, position = self.first_keys[item].tolist()
            raise FloatingPointError(
                f"rollout: the log-prob of a sampled token is not finite (step {step}, prompt {prompt_id}, sample "
                f"{sample}, position {position + column}): the weights or activations hold NaN or infinity"
            )

    def completions(self) -> list[Completion]:
        """All completions, once every row has finished."""
        assert self._num_unfinished() == 0, f"{self._num_unfinished()} completions unfinished, expected 0"
        self.check_finite(self.tokens.shape[1])
        tokens, log_probs, is_env = self.tokens.tolist(), self.log_probs.tolist(), self.is_env.tolist()
        num_new, is_stopped, keys = self.num_new.tolist(), self.is_stopped.tolist(), self.first_keys.tolist()
        completions = []
        for item, key in enumerate(keys):
            prompt = self.prompts[item // len(self.samples)]
            kept = iter(self.kept[item]) if self.kept is not None else None
            routing = None if self.routing is None else self.prompt_routing[item // len(self.samples)]
            segments = [Segment(list(prompt.token_ids), "prompt", routing=routing)]
            for from_env, columns in itertools.groupby(range(num_new[item]), key=is_env[item].__getitem__):
                columns = list(columns)
                span = slice(columns[0], columns[-1] + 1)
                routing = None if self.routing is None else self.routing[item, span].clone()
                if from_env:
                    segments.append(Segment(tokens[item][span], "env", routing=routing))
                else:
                    kept_ids = None if kept is None else list(itertools.islice(kept, len(columns)))
                    segments.append(Segment(tokens[item][span], "policy", log_probs[item][span], kept_ids, routing))
            finish_reason = "stop" if is_stopped[item] else "length"
            completions.append(Completion(prompt, sample=key[3], segments=segments, finish_reason=finish_reason))
        return completions


def _chooser(
    *, temperature: float, top_k: int, top_p: float, min_p: float, is_greedy: bool
) -> Callable[[Tensor, Tensor], Draw]:
    if is_greedy:
        return lambda logits, keys: greedy(logits)
    check_settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def _plain_temperature(
    temperature: float, *, top_k: int, top_p: float, min_p: float, is_greedy: bool
) -> float | None:
    """The temperature of draws from the whole vocabulary, None where a filter or greedy decoding chooses."""
    return None if is_greedy or top_k or top_p < 1 or min_p > 0 else temperature


def _check_prompts(prompts: list[Prompt], *, max_len: int, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
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
