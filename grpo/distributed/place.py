"""Which rank this process is, as torchrun's variables or, without them, those of srun say."""
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from grpo.config import ConfigError

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, NUM_PORTS = 20000, 10000  # of those that jobs of SLURM use, by the job's number


@dataclass(frozen=True)
class RankPlace:
    rank: int
    num_ranks: int
    local_rank: int  # on this node
    num_local: int  # ranks on this node
    address: str  # of the store, which rank 0's node has
    port: int
    is_torchrun: bool

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()})"


def find_place(variables: Mapping[str, str]) -> RankPlace | None:
    """None for a process that was started alone. Raises ConfigError for variables that contradict each other."""
    if "RANK" in variables and "WORLD_SIZE" in variables:
        missing = [name for name in TORCHRUN if name not in variables]
        if missing:
            raise ConfigError(f"RANK and WORLD_SIZE are set, as torchrun sets them, but not {', '.join(missing)}: start the run "
                              "with torchrun --nproc-per-node N -m grpo.train, or unset RANK and WORLD_SIZE to run alone")
        rank, num_ranks, port = (_number(variables, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local_rank = _number(variables, "LOCAL_RANK") if "LOCAL_RANK" in variables else rank
        num_local = _number(variables, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in variables else num_ranks
        place = RankPlace(rank, num_ranks, local_rank, num_local, variables["MASTER_ADDR"], port, True)
    elif int(variables.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in variables:  # a batch script has none of a step
        rank, num_ranks, local_rank = (_number(variables, name)
                                       for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
        num_local = int(variables.get("SLURM_STEP_TASKS_PER_NODE", str(num_ranks)).partition("(")[0].partition(",")[0])
        address = variables.get("MASTER_ADDR") or first_host(variables.get("SLURM_STEP_NODELIST", "localhost"))
        port = int(variables.get("MASTER_PORT") or FIRST_PORT + int(variables.get("SLURM_JOB_ID", "0")) % NUM_PORTS)
        place = RankPlace(rank, num_ranks, local_rank, num_local, address, port, False)
    else:
        return None
    if not 0 <= place.rank < place.num_ranks:
        raise ConfigError(f"RANK = {place.rank}: must lie in 0..{place.num_ranks - 1}, below WORLD_SIZE ({place.num_ranks})")
    return place


def check_alone(program: str) -> None:
    """Raises ConfigError where several processes were started for what one does."""
    place = find_place(os.environ)
    if place is not None and place.num_ranks > 1:
        raise ConfigError(f"{program} is the work of one process, and {place.num_ranks} were started: start it with python -m "
                          f"{program}; several share the prompts of grpo.evaluate, and of grpo.generate prompts=FILE")


def first_host(nodes: str) -> str:
    """The first name of a list of nodes as SLURM writes it: gpu[03-05,09],login1 is gpu03."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return "localhost" if match is None else match[1] + (match[2] or "")


def _number(variables: Mapping[str, str], name: str) -> int:
    try:
        return int(variables[name])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{name} = {variables.get(name)!r}: must be an integer; start the run with torchrun --nproc-per-node N "
                          "-m grpo.train") from error
