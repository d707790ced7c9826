"""Several processes hold a model together: each has some of every layer's experts, and all else whole.

All of them make the same passes over the same tokens. In each layer a process computes the rows of its experts, gets the rows of
the others', and adds them up as a process with all experts does. So every product sees the same rows in the same order, sums have
the same order, and forward and backward have the bits of one process, whatever the number of processes. The backward is the
mirror image: the gradients of the experts' outputs are everywhere already, those of their inputs are gathered.

Of adapters a process has those of its experts, too, and so their gradients.

Shapes: R routed rows in expert order, E experts, D model width.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.experts.sorting import Routing


def check_division_of_experts(num_ranks: int, num_experts: int) -> None:
    """Raises ValueError where so many processes cannot have equal shares of a layer's experts."""
    if num_experts % num_ranks:
        raise ValueError(f"distributed.expert_parallel = {num_ranks}: must divide the {num_experts} experts of a layer")


@dataclass(frozen=True)
class ExpertShare:
    """Which experts this process has. fill_in: writes into a tensor, which has the same shape on all processes, what others have
    there; each element is zero on all but one."""

    rank: int
    num_ranks: int
    fill_in: Callable[[torch.Tensor], None]

    def of(self, num_experts: int) -> slice:
        size = num_experts // self.num_ranks
        return slice(self.rank * size, (self.rank + 1) * size)

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """[E, ...] of parts [E/N, ...]; all processes call it, each with its own."""
        whole = part.new_zeros(self.num_ranks, *part.shape)
        whole[self.rank] = part
        self.fill_in(whole)
        return whole.flatten(0, 1)

    def any(self, claim: bool) -> bool:
        """Whether a claim is true on any process; all call it."""
        claims = torch.zeros(self.num_ranks, dtype=torch.uint8)
        claims[self.rank] = claim
        self.fill_in(claims)
        return bool(claims.any())

    def routing(self, whole: Routing) -> Routing:
        """Of this process's experts, on a GPU: of all rows it computes theirs, and leaves the others as they are."""
        return whole.part(self.of(len(whole.offsets_device) - 1), self.num_ranks)

    def dispatch(self, rows: torch.Tensor, offsets: list[int]) -> tuple[torch.Tensor, list[int]]:
        """The rows of this process's experts, of all rows [R, D], and where each of its experts' begin: of offsets [E + 1]."""
        part = self.of(len(offsets) - 1)
        own = offsets[part.start:part.stop + 1]
        return _Dispatch.apply(rows, self, own[0], own[-1]), [offset - own[0] for offset in own]

    def gather(self, rows: torch.Tensor, offsets: list[int]) -> torch.Tensor:
        """The rows [R, D] of all experts, of which this process has computed its own."""
        part = self.of(len(offsets) - 1)
        return _Gather.apply(rows, self, offsets[part.start], offsets[part.stop], offsets[-1])


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, share, start, end):
        ctx.share, ctx.start, ctx.end, ctx.num_rows = share, start, end, len(rows)
        return rows[start:end].clone()

    @staticmethod
    def backward(ctx, grad):
        return _filled(grad, ctx.share, ctx.start, ctx.end, ctx.num_rows), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, share, start, end, num_rows):
        ctx.start, ctx.end = start, end
        return _filled(rows, share, start, end, num_rows)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.start:ctx.end], None, None, None, None


def _filled(own: torch.Tensor, share: ExpertShare, start: int, end: int, num_rows: int) -> torch.Tensor:
    rows = own.new_zeros(num_rows, own.shape[1])
    rows[start:end] = own
    share.fill_in(rows)
    return rows
