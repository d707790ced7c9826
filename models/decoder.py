"""Rows being decoded: their state on the device, and steps of all of them, on a GPU as CUDA graphs that never wait for the host.

A step feeds every row's newest token to the model, draws the next one, stores it, and advances the row (kernels/head/advance.py).
A row that ends between two syncs, by a stop id or its limit, is idle for the remaining steps; the host sees it at the next sync.

A step of a model has about 600 small launches; replayed as one graph they cost the host nothing. There is one graph for each
bucket of batch sizes. The first step of a bucket runs normally (kernels are compiled) and is then captured. A bucket's rows
beyond the batch are idle: they write to no slot. Steps read copies of the adapters, made at reset (models/adapter_copies.py).
Prefills of few tokens are graphs too, for buckets of numbers of tokens, from a bucket's second time on: the host needs several
times as long for their launches as the GPU for the work.

Shapes: B rows, R rows that there is room for, D model width, V vocabulary.
"""
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.attention.decode import SharedPrefixes, part_bytes, rows_per_tile
from kernels.attention.parts import keys_of_part
from kernels.device import MAX_FEW_ROWS, cdiv, next_power_of_2, product_path, to_device
from kernels.head.advance import IDLE, Rows, advance, next_rng_keys
from kernels.head.sampling import as_pairs, key_sums
from models.adapter_copies import AdapterCopies
from models.config import GptOssConfig
from models.gpt_oss import GptOss
from models.keys import NUM_SECTIONS, PrefillChunk, last_rows, prompt_numbers
from models.kv_cache import KVCache
from models.routing_record import RoutingRecord

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
PREFILL_BUCKETS = (32, *range(64, MAX_FEW_ROWS + 1, 64))  # tokens; for more, the host needs no longer than the GPU
# the fields that a sync copies, adjacent in Rows
_SYNCED = slice(Rows._fields.index("tokens"), Rows._fields.index("is_stopped") + 1)
# shorter prefixes are not read once for all: they come from the L2 cache, which is faster than another launch
_SHARED_TOKENS = 1024
# each part of a row's keys has a program of its own in steps of up to _PARTS_ROWS rows, and of up to _LONG_PARTS_ROWS if one of
# them has more than _LONG_TOKENS tokens
_PARTS_ROWS, _LONG_PARTS_ROWS, _LONG_TOKENS = 24, 64, 2048
# graphs of such steps are for rows of up to _SHORT_PARTS tokens, or up to a multiple of _MANY_PARTS or of a quarter of a power of
# two: each value needs a graph, but programs for parts that no row has cost time
_SHORT_PARTS, _MANY_PARTS = 1024, 4096
# most rows times those tokens: what the programs store of all parts then takes 208 MB in gpt-oss
_PARTS_TOKENS = 24 * 131_072
_ALIGNMENT = 2  # rows: every state then starts at a multiple of 16 bytes, for which kernels are compiled

# (hidden [B, D], their rows) -> tokens [B] int64 and their log-probs [B] fp32
DrawTokens = Callable[[torch.Tensor, Rows], tuple[torch.Tensor, torch.Tensor]]


class CaptureLock:
    """Keeps a thread that computes beside the sampler's from asking anything of CUDA while a graph is captured, which could end
    the capture. It computes a part at a time, and a capture that waits comes before its next part: a plain lock would mostly
    return to the thread that has just let go of it."""

    def __init__(self) -> None:
        self._lock, self._no_capture = threading.Lock(), threading.Event()
        self._no_capture.set()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """For the one thread that captures."""
        self._no_capture.clear()
        try:
            with self._lock:
                yield
        finally:
            self._no_capture.set()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """For a part of another thread's work."""
        self._no_capture.wait()
        with self._lock:
            yield


CAPTURES = CaptureLock()


class PlainDraw(NamedTuple):
    """A draw from the whole vocabulary. Training computes the same bits for its log-probs at `temperature`."""

    temperature: float
    is_greedy: bool  # the most likely token instead of a drawn one


class KeyReading(NamedTuple):
    """How steps read the keys of full layers. The bits do not depend on it."""

    shares: bool  # a prompt is read once for a tile of rows that share it
    longest: int  # above 0: each part of a row has a program, and no row has more tokens than this


_ROW_BY_ROW = KeyReading(shares=False, longest=0)


def _may_read_parts(num_rows: int, longest: int) -> bool:
    return num_rows <= _PARTS_ROWS or num_rows <= _LONG_PARTS_ROWS and longest > _LONG_TOKENS


def bucket_of(num_rows: int) -> int:
    """The smallest bucket for `num_rows` rows; above the largest, a multiple of 128."""
    return next((bucket for bucket in BUCKETS if bucket >= num_rows), cdiv(num_rows, 128) * 128)


def parts_bytes(config: GptOssConfig, dtype: torch.dtype, *, num_rows: int, longest: int) -> int:
    """The most that steps of up to `num_rows` rows of up to `longest` tokens store of parts of attention."""
    rows = min(bucket_of(num_rows), _LONG_PARTS_ROWS)
    tokens = min(rows * _parts_tokens(longest), _PARTS_TOKENS)
    num_parts = tokens // keys_of_part(dtype, 0) + rows  # a prefix may end within a part
    return num_parts * part_bytes(config.num_attention_heads, config.head_dim)


def _parts_tokens(longest: int) -> int:
    """The tokens of a graph whose rows have at most `longest`."""
    step = max(_MANY_PARTS, next_power_of_2(longest) // 4)
    return _SHORT_PARTS if longest <= _SHORT_PARTS else cdiv(longest, step) * step


def can_decode_by_graph(model: GptOss) -> bool:
    """Whether steps of this model can be captured: on a GPU, through Triton, with experts that serve few tokens."""
    weight = model.lm_head.weight
    return weight.is_cuda and product_path(weight) == "triton" and model.serves_few_rows


def share_prefixes(prompts: list[int], *, size: int, num_tiles: int) -> list[tuple[int, int]]:
    """The largest tiles, at most `num_tiles`, of neighbouring rows with the same prompt: (first row, number of rows), the number
    from 2 to `size`. Rows with a prompt below 0 are in none."""
    tiles, first = [], 0
    for row in range(1, len(prompts) + 1):
        if row == len(prompts) or prompts[row] != prompts[first] or row - first == size:
            if row - first > 1 and prompts[first] >= 0:
                tiles.append((first, row - first))
            first = row
    return sorted(sorted(tiles, key=lambda tile: -tile[1])[:num_tiles])


@dataclass
class NewRow:
    """A sequence whose prompt and `num_new` further tokens are in its slot."""

    item: int  # the caller's number for it
    slot: int
    prompt_len: int  # tokens
    num_new: int
    limit: int  # most tokens after the prompt
    place: int  # index of its first token after the prompt in `tokens` and `log_probs` of the decoder
    key: tuple[int, int, int, int]  # seed, step, prompt id, sample


class Decoder:
    """Up to `max_rows` rows over a cache, and their drawn `tokens` int64 and `log_probs` fp32, one-dimensional, with
    cache.max_len elements for each slot. Cache and weights must keep their addresses while its graphs are used.
    counts_prompts_apart: attention sums a prompt's keys before all others, as in training with shared prompts, and log-probs
    have the bits of that training; otherwise those of whole sequences."""

    def __init__(self, model: GptOss, cache: KVCache, *, max_rows: int, stop_ids: list[int], counts_prompts_apart: bool) -> None:
        self.model, self.cache, self.max_rows = model, cache, max_rows
        self._adapters = AdapterCopies(model)
        self.num_rows = 0
        self._counts_prompts_apart, device = counts_prompts_apart, model.device
        self._table = _empty_table(bucket_of(max_rows), device)
        self._synced = torch.zeros(self._table[_SYNCED].shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        # the copy into _synced has been made
        self._is_copied = torch.cuda.Event() if device.type == "cuda" else None
        self._has_copy = False  # the next sync reads what is copied already
        self.num_ahead = 0  # steps that rows have taken since that copy
        self.tokens = torch.zeros(cache.num_slots * cache.max_len, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(cache.num_slots * cache.max_len, dtype=torch.float32, device=device)
        self._stop_ids = torch.tensor(stop_ids or [-1], dtype=torch.int64, device=device)
        config = model.config
        self._tile_rows = rows_per_tile(config.num_attention_heads // config.num_key_value_heads)
        self._tiles = torch.zeros(self._num_tiles(self._table.shape[1]), 2, dtype=torch.int32, device=device)
        self._is_shared = torch.zeros(self._table.shape[1], dtype=torch.int32, device=device)
        self._shared: list[tuple[int, int]] = []  # the content of those two
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, object]] = {}  # each with what it returns
        self._pool = None  # of memory that all graphs share: one runs at a time
        self._prompts: dict[int, torch.Tensor] = {}  # by bucket: the numbers that its prefills read

    def reset(self, stop_ids: list[int]) -> None:
        """Drops all rows and their pages. From now on rows end with these ids, and steps use the adapters as they are now. An
        equal number of ids keeps the graphs."""
        self.wait()
        self._adapters.refresh()
        stop_ids = torch.tensor(stop_ids or [-1], dtype=torch.int64, device=self.model.device)
        if len(stop_ids) == len(self._stop_ids):
            self._stop_ids.copy_(stop_ids)  # in place: graphs hold its address
        else:
            self._stop_ids = stop_ids
            self.drop_graphs()
        self._table[Rows._fields.index("positions")] = IDLE
        self.num_rows = 0
        for slot in range(self.cache.num_slots):
            self.cache.release(slot)

    def drop_graphs(self) -> None:
        """Frees the graphs' memory. They are captured again when needed."""
        self.wait()
        self._graphs.clear()
        self._pool = None

    def wait(self) -> None:
        """Until no step runs that was taken ahead: it uses the cache and the graphs."""
        if self.num_ahead and self._table.is_cuda:
            torch.cuda.current_stream(self._table.device).synchronize()
        self._has_copy, self.num_ahead = False, 0

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor, chunks: list[PrefillChunk], *,
                records: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """GptOss.prefill of tokens [T] on the host, by a graph where they are few. With `records` also the experts [T, L, A],
        until the next call."""
        model, count, device = self.model, len(tokens), self.model.device
        size = next((bucket for bucket in PREFILL_BUCKETS if bucket >= count), 0)
        if not size or 2 * len(chunks) >= NUM_SECTIONS[0] or not can_decode_by_graph(model):
            record = RoutingRecord(count, model.config, device) if records else None
            hidden = model.prefill(to_device(tokens, device), chunks, self.cache, record=record)
            return hidden, None if record is None else record.indices
        numbers = torch.cat([F.pad(tokens, (0, size - count)), prompt_numbers(chunks, self.cache, num_rows=size)])
        self.cache.flush()
        is_first = size not in self._prompts
        held = self._prompts.setdefault(size, torch.empty_like(numbers, device=device)).copy_(to_device(numbers, device))

        def feed() -> tuple[torch.Tensor, torch.Tensor | None]:
            record = RoutingRecord(size, model.config, device) if records else None
            hidden = model.prefill_rows(held[:size], held[size:], self.cache, None, is_prefixed=self._counts_prompts_apart,
                                        record=record)
            return hidden, None if record is None else record.indices

        key = ("prefill", size, model.adapter_is_enabled, records)
        hidden, indices = feed() if is_first else self._replay(key, feed)
        return hidden[last_rows(chunks, device)], None if indices is None else indices[:count]

    @torch.no_grad()
    def admit(self, new: list[NewRow], hidden: torch.Tensor, draw: DrawTokens) -> None:
        """Draws the next token of new sequences, from the final hidden states [n, D] of their newest tokens. They become the last
        rows; those that end with this token are idle."""
        items, slots, prompt_lens, num_new, limits, places = torch.tensor(
            [(row.item, row.slot, row.prompt_len, row.num_new, row.limit, row.place) for row in new]).unbind(1)
        positions, sums = prompt_lens + num_new - 1, key_sums(torch.tensor([row.key for row in new], dtype=torch.int64))
        rows = Rows(tokens=torch.zeros_like(items), positions=positions, num_new=num_new, is_stopped=torch.zeros_like(items),
                    slots=slots, prompt_lens=prompt_lens, limits=limits, places=places, key_sums=sums,
                    rng_keys=next_rng_keys(sums, positions), items=items)
        count, start, device = len(new), self.num_rows, self.model.device
        assert start + count <= self._table.shape[1], (start, count, self._table.shape)
        table = torch.stack(rows)
        fresh = _empty_table(count, device)
        fresh[:, :count] = to_device(table, device)
        self._advance(Rows(*fresh[:, :count]), hidden, draw)
        self._table[:, start:start + count] = fresh[:, :count]
        self.num_rows += count

    @torch.no_grad()
    def step(self, draw: DrawTokens, prompts: list[tuple[int, int]], *, longest: int, by_graph: bool,
             records: bool) -> torch.Tensor | None:
        """One step of all rows, with `draw` outside any graph. by_graph: a graph computes the hidden states; the cache must be
        flushed. prompts, longest: as in run. With `records`, returns the experts [B, L, A], until the next step."""
        num_rows = bucket_of(self.num_rows) if by_graph else self.num_rows
        reading = self._reading(prompts, num_rows, longest) if by_graph else _ROW_BY_ROW

        def feed() -> tuple[torch.Tensor, torch.Tensor | None]:
            record = RoutingRecord(num_rows, self.model.config, self.model.device) if records else None
            hidden = self._feed(Rows(*self._table[:, :num_rows]), record, reading)
            return hidden, None if record is None else record.indices

        key = ("hidden", num_rows, self.model.adapter_is_enabled, reading, records)
        hidden, indices = self._replay(key, feed) if by_graph else feed()
        self._advance(Rows(*self._table[:, :self.num_rows]), hidden[:self.num_rows], draw)
        return None if indices is None else indices[:self.num_rows]

    @torch.no_grad()
    def run(self, num_steps: int, plain: PlainDraw, prompts: list[tuple[int, int]], *, longest: int) -> None:
        """Takes `num_steps` steps of all rows by a graph; nothing waits, and the cache must be flushed. prompts: for every row,
        its prompt's number and length; neighbouring rows read a long prompt once. longest: the most tokens that a row will
        have."""
        bucket = bucket_of(self.num_rows)
        reading, rows = self._reading(prompts, bucket, longest), Rows(*self._table[:, :bucket])
        for _ in range(num_steps):
            self._replay((plain, bucket, self.model.adapter_is_enabled, reading), lambda: self._step(rows, plain, reading))

    @torch.no_grad()
    def rehearse(self, num_rows: int, plain: PlainDraw, *, longest: int) -> None:
        """Takes a step of `num_rows` idle rows, without a graph, for each way of reading keys that they may need."""
        readings = [_ROW_BY_ROW]
        if _may_read_parts(num_rows, longest):  # fewest and most programs, which may have different kernels
            most = min(_parts_tokens(longest), _PARTS_TOKENS // num_rows)
            readings += [KeyReading(shares=False, longest=tokens) for tokens in sorted({_SHORT_PARTS, most})]
        if num_rows > _PARTS_ROWS and self._counts_prompts_apart and longest > _SHARED_TOKENS:
            readings.append(KeyReading(shares=True, longest=0))
        for reading in readings:
            self._step(Rows(*self._table[:, :num_rows]), plain, reading)

    def plain_draw(self, plain: PlainDraw) -> DrawTokens:
        return lambda hidden, rows: self.model.draw(hidden, None if plain.is_greedy else as_pairs(rows.rng_keys),
                                                    temperature=plain.temperature)

    def look_ahead(self, step: Callable[[], object]) -> None:
        """The next sync tells of the rows as they are now. Then takes a step, which runs while the host learns and prepares."""
        self._copy()
        step()
        self._has_copy, self.num_ahead = True, 1

    def _copy(self) -> None:
        self._synced.copy_(self._table[_SYNCED], non_blocking=True)  # all columns: only then it is a single copy
        if self._is_copied is not None:
            self._is_copied.record(torch.cuda.current_stream(self._table.device))
        self._has_copy, self.num_ahead = False, 0

    def sync(self) -> tuple[list[int], list[bool], list[int], list[bool]]:
        """For every row: its newest token, whether it continues, its number of tokens after the prompt, whether a stop id ended
        it. Waits for the steps, but not for one that was taken ahead."""
        if not self._has_copy:
            self._copy()
        if self._is_copied is not None:
            self._is_copied.synchronize()
        self._has_copy = False
        tokens, positions, num_new, is_stopped = self._synced[:, :self.num_rows]
        return tokens.tolist(), (positions != IDLE).tolist(), num_new.tolist(), (is_stopped != 0).tolist()

    def fetch(self, spans: list[tuple[int, int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Parts first .. end of `tokens` and `log_probs`, on the host: of rows as the last sync told of them. Waits for the steps
        before it."""
        lengths = [end - first for first, end in spans]
        places = torch.cat([torch.arange(first, end) for first, end in spans])
        with self._beside_the_next_step():
            places = to_device(places, self.tokens.device)
            drawn = [column[places].cpu().split(lengths) for column in (self.tokens, self.log_probs)]
        return list(zip(*drawn, strict=True))

    @contextmanager
    def _beside_the_next_step(self) -> Iterator[None]:
        """What is done within does not wait for a step that was taken ahead."""
        if self._is_copied is None:
            yield
            return
        stream = fetching_stream(self._table.device)
        stream.wait_event(self._is_copied)
        with torch.cuda.stream(stream):
            yield

    def compact(self, rows: list[int]) -> None:
        """Keeps these rows, in this order. Their keys and values stay in their slots."""
        index = to_device(torch.tensor(rows, dtype=torch.int64), self.model.device)
        self._table[:, :len(rows)] = self._table[:, index]
        self._table[Rows._fields.index("positions"), len(rows):self.num_rows] = IDLE
        self.num_rows = len(rows)

    def _num_tiles(self, num_rows: int) -> int:
        """The number of tiles of shared prefixes in a step of `num_rows` rows: twice as many as full tiles would need."""
        return 2 * cdiv(num_rows, self._tile_rows)

    def _reading(self, prompts: list[tuple[int, int]], num_rows: int, longest: int) -> KeyReading:
        """The reading for a graph of `num_rows` rows, none of which will have more than `longest` tokens."""
        if num_rows > _PARTS_ROWS and self._share(prompts, self._num_tiles(num_rows)):
            return KeyReading(shares=True, longest=0)
        tokens = _parts_tokens(longest)
        if _may_read_parts(num_rows, longest) and num_rows * tokens <= _PARTS_TOKENS:
            return KeyReading(shares=False, longest=tokens)
        return _ROW_BY_ROW

    def _share(self, prompts: list[tuple[int, int]], num_tiles: int) -> bool:
        """Updates the device's tiles of shared prefixes. Returns whether there are any."""
        if not self._counts_prompts_apart:
            return False
        shared = share_prefixes([prompt if length >= _SHARED_TOKENS else -1 for prompt, length in prompts], size=self._tile_rows,
                                num_tiles=num_tiles)
        if shared and shared != self._shared:
            device = self._tiles.device
            rows = [row for first, count in shared for row in range(first, first + count)]
            self._tiles.zero_()[:len(shared)] = to_device(torch.tensor(shared, dtype=torch.int32), device)
            self._is_shared.zero_()[to_device(torch.tensor(rows), device)] = 1
            self._shared = shared
        return bool(shared)

    def _feed(self, rows: Rows, record: RoutingRecord | None, reading: KeyReading) -> torch.Tensor:
        num_rows, shared = len(rows.tokens), None
        if reading.shares:
            shared = SharedPrefixes(self._tiles[:self._num_tiles(num_rows)], self._is_shared[:num_rows])
        with self._adapters.in_place():
            return self.model.decode(rows.tokens, rows.positions, self.cache, rows.slots, record=record, shared=shared,
                                     prefix_lens=rows.prompt_lens if self._counts_prompts_apart else None,
                                     longest=reading.longest)

    def _step(self, rows: Rows, plain: PlainDraw, reading: KeyReading) -> None:
        self._advance(rows, self._feed(rows, None, reading), self.plain_draw(plain))

    def _advance(self, rows: Rows, hidden: torch.Tensor, draw: DrawTokens) -> None:
        advance(rows, *draw(hidden, rows), all_tokens=self.tokens, all_log_probs=self.log_probs, stop_ids=self._stop_ids)

    def _replay(self, key: tuple, function: Callable[[], object]) -> object:
        """Returns the function's result by replaying the graph of that key. The first call runs the function, which compiles
        kernels, and captures it for the next."""
        if key in self._graphs:
            graph, result = self._graphs[key]
            self.model.expert_store.settle()
            graph.replay()
            return result
        result, graph = function(), torch.cuda.CUDAGraph()
        with CAPTURES.capturing(), torch.cuda.graph(graph, pool=self._pool, stream=first_served_stream(self.model.device),
                                                    capture_error_mode="thread_local"):
            captured = function()
        self._pool, self._graphs[key] = graph.pool(), (graph, captured)
        return result


@cache
def first_served_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of sampling: where training runs beside it, the GPU starts its small kernels first. Graphs captured on it keep
    that order."""
    return torch.cuda.Stream(device, priority=-1)


@cache
def fetching_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of fetch(), which the host waits for: beside training, too, the GPU starts its kernels first."""
    return torch.cuda.Stream(device, priority=-1)


def _empty_table(num_rows: int, device: torch.device) -> torch.Tensor:
    """[fields of Rows, at least num_rows] int64, all rows idle."""
    table = torch.zeros(len(Rows._fields), cdiv(num_rows, _ALIGNMENT) * _ALIGNMENT, dtype=torch.int64, device=device)
    table[Rows._fields.index("positions")] = IDLE
    return table
