"""The backward of several ranks: each takes some of an update's micro-batches, and their gradients are added.

`ordered`: the ranks go through the micro-batches in rounds, each rank one a round, and add the gradients in the order of the
micro-batches: ((g0 + g1) + g2) + ..., as one process does. The result has the same bits with any number of ranks. To that end
each rank adds up a part of the elements, and gets that part of the others' gradients after each round (an all-to-all, which moves
as many bytes as the gradient has); after the last round all get all parts.

`fast`: each rank adds the gradients of its micro-batches, and one all-reduce adds those sums.

Both move gradients only after an exchange, in which each rank says whether its micro-batch fitted into memory.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from grpo.distributed.ranks import Ranks
from grpo.distributed.settings import Reduction
from grpo.optim import Optimizer
from models.memory_plan import EXCHANGE_BYTES


class OrderedSum:
    """The sum of the gradients of micro-batches, of which this rank adds up the elements from bounds[part] to bounds[part + 1] of
    each buffer."""

    def __init__(self, ranks: Ranks, buffers: list[torch.Tensor]) -> None:
        self.ranks, self.buffers = ranks, buffers
        self.bounds = [[len(buffer) * part // ranks.num_parts for part in range(ranks.num_parts + 1)] for buffer in buffers]
        self.sums = [torch.zeros_like(buffer[bounds[ranks.part]:bounds[ranks.part + 1]])
                     for buffer, bounds in zip(buffers, self.bounds)]

    def add(self, num_gradients: int) -> None:
        """Adds the buffers of the first `num_gradients` ranks, in their order, and zeroes this rank's."""
        for buffer, bounds, total in zip(self.buffers, self.bounds, self.sums):
            longest = max(high - low for low, high in zip(bounds, bounds[1:]))
            step = EXCHANGE_BYTES // 2 // buffer.element_size() // self.ranks.num_parts
            for start in range(0, longest, step):
                self._add_chunk(buffer, bounds, total, num_gradients, start, step)
            buffer.zero_()

    def _add_chunk(self, buffer: torch.Tensor, bounds: list[int], total: torch.Tensor, num_gradients: int, start: int,
                   length: int) -> None:
        rank = self.ranks.part
        parts = [buffer[min(low + start, high):min(low + start + length, high)] for low, high in zip(bounds, bounds[1:])]
        own = total[start:start + length]
        received = own.new_empty(self.ranks.num_parts, len(own))
        dist.all_to_all_single(received.view(-1), torch.cat(parts), [len(parts[rank])] * self.ranks.num_parts,
                               [len(part) for part in parts], group=self.ranks.parts)
        for gradient in received[:num_gradients]:
            own += gradient

    def spread(self) -> None:
        """Leaves the whole sum in the buffers of all ranks."""
        for buffer, bounds, total in zip(self.buffers, self.bounds, self.sums):
            buffer[bounds[self.ranks.part]:bounds[self.ranks.part + 1]] = total
            for rank, (low, high) in enumerate(zip(bounds, bounds[1:])):
                dist.broadcast(buffer[low:high], group=self.ranks.parts, group_src=rank)


def train_together(ranks: Ranks, optimizer: Optimizer, work: list[Any], train: Callable[[Any], tuple[Any, str | None]], *,
                   reduction: Reduction, should_stop: Callable[[], bool]) -> tuple[list[Any], str | None, bool]:
    """Leaves the sum of the gradients of all micro-batches in the optimizer of every rank.

    work: the micro-batches; train: adds the gradient of one to the optimizer's, and returns what is left of it, to be sent to the
    other ranks, and a text if memory was refused. Returns (what is left of the micro-batches before the first refused one, its
    text or None, whether a rank was told to stop); after either, gradients are not to be used."""
    size = ranks.num_parts
    optimizer.allocate_gradients()
    is_ordered = reduction == Reduction.ordered
    buffers = optimizer.buffers
    total = OrderedSum(ranks, buffers) if is_ordered else None
    trained: list[Any] = []
    rounds = [list(range(first, min(first + size, len(work)))) for first in range(0, len(work), size)] if is_ordered else [
        list(range(len(work)))]
    for numbers in rounds:
        outcomes = {}
        for number in numbers[ranks.part::size]:
            outcomes[number] = train(work[number])
            if outcomes[number][1] is not None:
                break
        found = ranks.exchange("the micro-batches", (outcomes, should_stop(), sorted(optimizer.received)))
        outcomes = {number: outcome for part, _, _ in found for number, outcome in part.items()}
        refused = min((number for number, (_, refusal) in outcomes.items() if refusal is not None), default=None)
        if refused is not None:  # all before it were tried
            return [*trained, *(outcomes[number][0] for number in numbers if number < refused)], outcomes[refused][1], False
        if any(is_stopped for _, is_stopped, _ in found):
            return trained, None, True
        optimizer.received.update(name for _, _, names in found for name in names)
        trained += [outcomes[number][0] for number in numbers]
        with ranks.collective("the sum of the gradients"):
            if total is not None:
                total.add(len(numbers))
            else:
                for buffer in buffers:
                    dist.all_reduce(buffer, group=ranks.parts)
    if total is not None:
        with ranks.collective("the sum of the gradients"):
            total.spread()
    return trained, None, False
