"""The settings of a run of several processes: the node `distributed` of grpo/config.py."""
from dataclasses import dataclass
from enum import StrEnum

from grpo.configuration.fields import number


class Reduction(StrEnum):
    """How the gradients of the ranks are added."""

    ordered = "ordered"  # in the order of the micro-batches: the same bits with any number of ranks, one process included
    fast = "fast"  # by one all-reduce an update: the same bits for the same number of ranks


@dataclass
class WaitConfig:
    """What every program of several processes has."""

    # seconds that a rank waits for the others before the run ends: longer than the slowest call of a reward or tool
    timeout: float = number("(0, 604800]", "seconds; 1800 is usual", default=1800.0)


@dataclass
class DistributedConfig(WaitConfig):
    """A run of several processes, one for each GPU, that torchrun or srun start. Of one process only `micro_batches` counts."""

    reduction: Reduction = Reduction.ordered
    # an update has a multiple of this many micro-batches, of about equal length, on any number of ranks, so that each rank gets
    # as many; 0: as optim.max_tokens gives them (`fast`: a multiple of the number of ranks)
    micro_batches: int = number("[0, inf)", "0 is off", default=0)
    # so many ranks side by side hold the experts together, each some, and do the same work; the groups of them share it
    expert_parallel: int = number("[1, 1024]", "1: every rank has all experts", default=1)
    # full training: each rank keeps its part of weights, gradients and optimizer state (FSDP2)
    shard: bool = False
