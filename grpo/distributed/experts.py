"""Ranks that share the experts: each holds some, and all of a group do the same work (models/expert_share.py).

What they do between exchanges must be the same to the last pass. So what may differ by chance from rank to rank is refused: tools
that answer when they like, and retries after memory was refused.
"""
from grpo.config import ConfigError, Train, TrainConfig
from grpo.distributed.ranks import Ranks
from grpo.environment import Environment
from models.config import GptOssConfig
from models.expert_share import ExpertShare


def check_sharing(config: TrainConfig, num_ranks: int) -> None:
    """Raises ConfigError for settings with which ranks cannot share experts."""
    num_sharers = config.distributed.expert_parallel
    if num_sharers == 1:
        return
    key, advice = f"distributed.expert_parallel = {num_sharers}", "or set distributed.expert_parallel=1"
    if num_ranks % num_sharers:
        raise ConfigError(f"{key}: the number of processes must be a multiple of it, and is {num_ranks}; start with "
                          f"torchrun --nproc-per-node {num_sharers}, {advice}")
    if config.model.train == Train.full or config.model.path is None:
        raise ConfigError(f"{key}: only the frozen experts of a checkpoint can be shared; set model.path and "
                          f"model.train=lora, {advice}")


def expert_share(ranks: Ranks | None, config: TrainConfig, architecture: GptOssConfig, env: Environment) -> ExpertShare | None:
    """The experts of this rank, None for all. Raises ConfigError."""
    num_sharers, num_experts = config.distributed.expert_parallel, architecture.num_local_experts
    if ranks is None or num_sharers == 1:
        return None
    key = f"distributed.expert_parallel = {num_sharers}"
    if num_experts % num_sharers:
        raise ConfigError(f"{key}: must divide the {num_experts} experts of a layer")
    if hasattr(env, "episode"):
        raise ConfigError(f"{key}: the environment {type(env).__name__} has tools, whose answers do not come to all ranks at the "
                          "same time; set distributed.expert_parallel=1")
    return ExpertShare(ranks.sharer, num_sharers, ranks.fill_in_experts)


def least_of_all(ranks: Ranks, sizes: list[int]) -> list[int]:
    """The least of each that any rank has. Ranks that share experts plan their memory alike, to sample in the same batches."""
    return [min(values) for values in zip(*ranks.exchange("the memory", sizes))]
