"""Ranks that share the experts: each holds some, and all of a group do the same work (models/expert_share.py).

What they do between exchanges must be the same to the last pass. So what may differ by chance from rank to rank is refused: tools
that answer when they like, and retries after memory was refused.
"""
import torch

from grpo.config import ConfigError, Train, TrainConfig
from grpo.distributed.ranks import Ranks
from grpo.distributed.shards import Divided
from grpo.environment import Environment
from models.adam_state import BLOCK, can_divide
from models.config import GptOssConfig
from models.expert_share import ExpertShare, check_division_of_experts
from models.gpt_oss import GptOss


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
    if config.warmup is not None:
        raise ConfigError(f"{key}: a warm-up is the work of ranks that have all experts; set warmup=null, {advice}")


def expert_share(ranks: Ranks | None, config: TrainConfig, architecture: GptOssConfig, env: Environment) -> ExpertShare | None:
    """The experts of this rank, None for all. Raises ValueError."""
    num_sharers = config.distributed.expert_parallel
    if ranks is None or num_sharers == 1:
        return None
    check_division_of_experts(num_sharers, architecture.num_local_experts)
    if hasattr(env, "episode"):
        raise ConfigError(f"distributed.expert_parallel = {num_sharers}: the environment {type(env).__name__} has tools, whose "
                          "answers do not come to all ranks at the same time; set distributed.expert_parallel=1")
    return ExpertShare(ranks.sharer, num_sharers, ranks.fill_in_experts)


def least_of_all(ranks: Ranks, sizes: list[int]) -> list[int]:
    """The least of each that any rank has. Ranks that share experts plan their memory alike, to sample in the same batches."""
    return [min(values) for values in zip(*ranks.exchange("the memory", sizes))]


class ExpertAdapters(Divided):
    """Each rank has and updates the adapters of its own experts, and keeps the optimizer's state for them."""

    def __init__(self, ranks: Ranks, policy: GptOss, *, moments: str) -> None:
        super().__init__(ranks, place=ranks.sharer, num_places=ranks.num_sharers)
        self._policy, self.parameters = policy, policy.trainable_parameters()
        divided = [name for name in self.parameters if policy.divides(name)]
        if moments != "fp32" and not all(can_divide(self.parameters[name], 1) for name in divided):
            raise ConfigError(f"optim.moments = {moments!r}: the adapters of a rank's experts do not fill blocks of {BLOCK} "
                              "elements, which have a scale each; set optim.moments=fp32, another model.lora.rank, or "
                              "distributed.expert_parallel=1")
        # of the blocks and draws of a state in 8 bits
        self.starts = {name: self.place * self.parameters[name].numel() * (moments != "fp32") for name in divided}

    def gather(self) -> None:
        """Does nothing: experts stay where they are."""

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        return self._policy.whole(name, part)


def whole_tensors(policy: GptOss, tensors: dict[str, torch.Tensor], *, keeps: bool) -> dict[str, torch.Tensor]:
    """Parameters of the policy, or of its reference, as one process has them, in host memory; {} unless `keeps`. All ranks that
    share experts call it."""
    found = {}
    for name, tensor in tensors.items():
        whole = policy.whole(name, tensor.detach().to(policy.device))
        if keeps:
            found[name] = whole.cpu()
    return found
