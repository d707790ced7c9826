"""Key-value cache of the sampler: pages that sequences share on full layers, a ring per slot on windowed layers.

A slot has one sequence. On a full layer the token at position p of slot s is in page page_table[s, p // PAGE_TOKENS], entry
p % PAGE_TOKENS; all full layers use one table. The host knows each slot's pages, in plain lists; flush() copies changes to the
device's table. Sequences with the same beginning share whole pages, counted by reference; a page that is not full belongs to one
slot, so shared pages are never written. On GPUs that can, the memory of keys and values is given back between two rollouts, and
taken again at the same addresses. A windowed layer keeps min(sliding_window, max_len) entries of each slot: the key of position p
is at p modulo that number.

Shapes: N slots, M pages, W pages per slot, L entries of a ring, K key-value heads, D head width.
"""
import math

import torch

from kernels.attention import cache as cache_write
from kernels.device import to_device
from models.arena import Arena, has_arenas, space_of
from models.config import GptOssConfig

PAGE_TOKENS = 64  # a multiple of every key tile of kernels/attention/decode.py


def _token_bytes(config: GptOssConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's key and value in one layer."""
    return 2 * config.kv_width * dtype.itemsize


def page_bytes(config: GptOssConfig, dtype: torch.dtype) -> int:
    """Bytes of one page, over all full layers."""
    num_full = sum(not config.is_windowed(layer) for layer in range(config.num_hidden_layers))
    return num_full * PAGE_TOKENS * _token_bytes(config, dtype)


def slot_bytes(config: GptOssConfig, dtype: torch.dtype, *, max_len: int) -> int:
    """Bytes of one slot's rings, over all windowed layers."""
    num_windowed = sum(map(config.is_windowed, range(config.num_hidden_layers)))
    return num_windowed * min(config.sliding_window, max_len) * _token_bytes(config, dtype)


class KVCache:
    """num_pages: pages of each full layer; slots start without pages."""

    def __init__(self, config: GptOssConfig, *, num_slots: int, max_len: int, num_pages: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        self.num_slots, self.max_len, self.num_pages = num_slots, max_len, num_pages  # slots; tokens per slot; pages
        self.is_paged = [not config.is_windowed(layer) for layer in range(config.num_hidden_layers)]
        # how many tokens of a sequence each layer keeps
        self.lengths = [max_len if paged else min(config.sliding_window, max_len) for paged in self.is_paged]
        heads = config.num_key_value_heads, config.head_dim
        shapes = [(num_pages, PAGE_TOKENS, *heads) if paged else (num_slots, length, *heads)
                  for paged, length in zip(self.is_paged, self.lengths)]
        self._arena = None
        if has_arenas(device):
            self._arena = Arena(2 * sum(space_of(math.prod(shape) * dtype.itemsize) for shape in shapes), device,
                                content="the sampler's cache", advice="lower rollout.cache_gb")
            self._arena.take()
        # per layer [M, PAGE_TOKENS, K, D] or [N, L, K, D]
        self.keys, self.values = ([self._new(shape, device, dtype) for shape in shapes] for _ in range(2))
        # -1: no page. It is only written in place, since graphs hold its address
        self.page_table = torch.full((num_slots, self.pages_for(max_len)), -1, dtype=torch.int32, device=device)  # [N, W]
        self._pages: list[list[int]] = [[] for _ in range(num_slots)]  # of each slot, in the order of its tokens
        self._num_users = [0] * num_pages  # slots that refer to a page
        self._free = list(range(num_pages))[::-1]
        self._changed: dict[int, int] = {}  # entry of the flat table -> page, not yet on the device

    def _new(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if self._arena is not None:
            return self._arena.tensor(shape, dtype)
        return torch.zeros(shape, device=device, dtype=dtype)

    @property
    def can_offload(self) -> bool:
        """Whether the memory of keys and values can be given back."""
        return self._arena is not None

    def offload(self) -> None:
        """Gives the memory of keys and values back; their content is lost, and nothing may use them until reload()."""
        self._arena.give_back()

    def reload(self) -> None:
        """Takes the memory again, filled with zeros. Raises torch.OutOfMemoryError if there is not enough."""
        if self._arena is not None:
            self._arena.take()

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def num_pages_of(self, slot: int) -> int:
        return len(self._pages[slot])

    @staticmethod
    def pages_for(num_tokens: int) -> int:
        """The number of pages for `num_tokens` tokens of one sequence."""
        return -(-num_tokens // PAGE_TOKENS)

    def table_of(self, layer: int) -> torch.Tensor | None:
        """The page table, as the kernels take it, if the layer is paged; None if it has rings."""
        return self.page_table if self.is_paged[layer] else None

    def reserve(self, slot: int, num_tokens: int) -> bool:
        """Makes sure that the slot has pages for its first `num_tokens` tokens. Returns False, and changes nothing, if too few
        are free. Raises ValueError above max_len."""
        if num_tokens > self.max_len:
            raise ValueError(f"{num_tokens} tokens do not fit a cache of {self.max_len} per sequence")
        pages = self._pages[slot]
        num_missing = self.pages_for(num_tokens) - len(pages)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            self._append(slot, self._free.pop())
        return True

    def fan_out(self, source: int, targets: list[int], num_tokens: int) -> bool:
        """Gives `targets`, slots without pages, the first `num_tokens` tokens of slot `source`. Whole pages are shared. A last
        page that is not full and the rings are copied now, since every target appends to its own. Returns False, and changes
        nothing, if too few pages are free."""
        num_whole, num_left = divmod(num_tokens, PAGE_TOKENS)
        pages = self._pages[source]
        assert len(pages) >= self.pages_for(num_tokens), f"slot {source} has {len(pages)} pages, {num_tokens} tokens need more"
        taken = [slot for slot in targets if self._pages[slot] or slot == source]
        assert not taken, f"targets {targets} of slot {source}: {taken} are not empty"
        assert len(set(targets)) == len(targets), f"targets {targets}: {len(set(targets))} different ones"
        num_copies = len(targets) if num_left else 0
        if num_copies > len(self._free):
            return False
        copies = [self._free.pop() for _ in range(num_copies)]
        for row, slot in enumerate(targets):
            for page in pages[:num_whole] + copies[row:row + 1]:
                self._append(slot, page)
        slots_and_pages = self._upload([targets, copies or targets])
        for layer, is_paged in enumerate(self.is_paged):
            if is_paged and num_left:
                self._copy(layer, pages[num_whole], slots_and_pages[1], num_left)
            elif not is_paged:
                self._copy(layer, source, slots_and_pages[0], min(num_tokens, self.lengths[layer]))
        return True

    def release(self, slot: int) -> None:
        """Takes the slot's pages; those that no other slot uses are free again."""
        pages, self._pages[slot] = self._pages[slot], []
        first = slot * self.page_table.shape[1]
        for column, page in enumerate(pages):
            self._changed[first + column] = -1
            self._num_users[page] -= 1
            if self._num_users[page] == 0:
                self._free.append(page)

    def flush(self) -> None:
        """Updates the device's page table, in one copy that the host does not wait for. Call it before a launch that reads the
        table, outside of graphs."""
        if not self._changed:
            return
        entries, pages = self._upload([list(self._changed), list(self._changed.values())])
        self.page_table.view(-1).scatter_(0, entries, pages.int())
        self._changed.clear()

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Stores k, v [T, K, D] of tokens at `positions` [T] of `slots` [T], which must have pages for them. No (slot, entry)
        pair may occur twice; rows at a position below 0 are skipped."""
        cache_write.write(k, v, self.keys[layer], self.values[layer], slots, positions, page_table=self.table_of(layer))

    def read(self, layer: int, slot: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values [end - first, K, D] of positions first .. end of a slot, whose pages must be flushed. A
        ring must have been written up to `end`; positions that it no longer has get the entries of later ones."""
        assert self.pages_for(end) <= len(self._pages[slot]), f"slot {slot} has {len(self._pages[slot])} pages, not {end} tokens"
        positions = torch.arange(first, end, device=self.page_table.device)
        if self.is_paged[layer]:
            entries = self.page_table[slot, positions // PAGE_TOKENS].long() * PAGE_TOKENS + positions % PAGE_TOKENS
            return self.keys[layer].flatten(0, 1)[entries], self.values[layer].flatten(0, 1)[entries]
        entries = positions % self.lengths[layer]
        return self.keys[layer][slot, entries], self.values[layer][slot, entries]

    def _append(self, slot: int, page: int) -> None:
        pages = self._pages[slot]
        self._changed[slot * self.page_table.shape[1] + len(pages)] = page
        pages.append(page)
        self._num_users[page] += 1

    def _upload(self, numbers: list[list[int]]) -> torch.Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int64), self.page_table.device)

    def _copy(self, layer: int, source: int, targets: torch.Tensor, num_entries: int) -> None:
        """Copies the first entries of page or ring `source` into `targets` [n]."""
        for cache in (self.keys[layer], self.values[layer]):
            cache[targets, :num_entries] = cache[source, :num_entries].clone()  # index_put refuses views of itself
