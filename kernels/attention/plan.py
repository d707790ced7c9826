"""Which tiles of queries meet which tiles of keys in a packed batch: the work list of the attention kernels.

Shapes: S sequences.
"""
from __future__ import annotations

import torch

from kernels.device import to_device


class AttentionPlan:
    """Which tiles of queries meet which tiles of keys in one packed batch: made once, read by every layer.

    cu_seqlens [S + 1]: bounds of the sequences. prefixes [S]: the index of the sequence that sequence s continues, -1 for none.
    The queries of a continuation see the whole prefix, as if it came directly before them, then their own sequence: a prompt is
    computed once for all of its completions (its gradient is their sum). A prefix continues no other sequence. first_query: the
    row of the first query, where q begins; rows before it are only keys. Forward only.

    Tile lists are made for a block size when a kernel first asks, heaviest tiles first, and kept on the device."""

    def __init__(self, cu_seqlens: list[int], *, prefixes: list[int] | None = None, first_query: int = 0) -> None:
        bounds = list(zip(cu_seqlens, cu_seqlens[1:]))
        if not bounds or cu_seqlens[0] != 0 or any(start > end for start, end in bounds):
            raise ValueError(f"cu_seqlens={cu_seqlens}: must start at 0 and never fall")
        if prefixes is not None:
            if len(prefixes) != len(bounds):
                raise ValueError(f"{len(prefixes)} prefixes for {len(bounds)} sequences: one each, -1 for none")
            for sequence, prefix in enumerate(prefixes):
                if prefix != -1 and not (0 <= prefix < len(bounds) and prefixes[prefix] == -1):
                    raise ValueError(f"sequence {sequence} continues {prefix}; a prefix is a sequence that continues none")
        if not 0 <= first_query <= cu_seqlens[-1]:
            raise ValueError(f"first_query={first_query}: must be a row of {cu_seqlens[-1]}, or their number")
        self.cu_seqlens, self.bounds, self.first_query = cu_seqlens, bounds, first_query
        self.prefixes = prefixes if prefixes is not None and any(prefix != -1 for prefix in prefixes) else None
        self._tensors: dict[tuple, tuple[torch.Tensor, ...]] = {}

    def query_tiles(self, block: int, device: torch.device) -> torch.Tensor:
        """[tiles, 5] int32: first query, end and start of its sequence, start and end of its prefix."""
        if ("queries", block, device) not in self._tensors:
            tiles = []
            for sequence, (start, end) in enumerate(self.bounds):
                prefix = self.prefixes[sequence] if self.prefixes is not None else -1
                prefix_start, prefix_end = self.bounds[prefix] if prefix != -1 else (start, start)
                tiles += [(first, end, start, prefix_start, prefix_end)
                          for first in range(max(start, self.first_query), end, block)]
            tiles.sort(key=lambda tile: tile[2] - tile[0] + tile[3] - tile[4])  # minus the keys before the tile
            self._tensors["queries", block, device] = (_int_table(tiles, 5, device),)
        return self._tensors["queries", block, device][0]

    def key_tiles(self, block: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """[tiles, 4] int32: first key, end of its sequence, first and end of its readers; and the readers [R, 3] int32: first
        and end of a sequence whose queries see those keys, and the offset from a query's row to its position among the keys."""
        if ("keys", block, device) not in self._tensors:
            readers, tiles, work = [], [], {}
            for sequence, (start, end) in enumerate(self.bounds):
                if start == end:
                    continue
                first_reader = len(readers)
                readers.append((start, end, 0))
                continued = 0
                for other, prefix in enumerate(self.prefixes or []):
                    if prefix == sequence:
                        readers.append((*self.bounds[other], end - self.bounds[other][0]))
                        continued += self.bounds[other][1] - self.bounds[other][0]
                for first in range(start, end, block):
                    work[first] = end - first + continued  # queries that see the tile
                    tiles.append((first, end, first_reader, len(readers)))
            tiles.sort(key=lambda tile: -work[tile[0]])
            self._tensors["keys", block, device] = (_int_table(tiles, 4, device), _int_table(readers, 3, device))
        return self._tensors["keys", block, device]


def _int_table(rows: list[tuple[int, ...]], width: int, device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(rows, dtype=torch.int32).view(-1, width), device)
