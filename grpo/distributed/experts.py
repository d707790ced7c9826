"""Ranks that share the experts: each holds some, and all of a group do the same work (models/expert_share.py).

What they do between exchanges must be the same to the last pass. So what may differ by chance from rank to rank is refused: tools
that answer when they like, and retries after memory was refused.
"""
from collections.abc import Callable

import torch

from grpo.config import ConfigError, Train, TrainConfig
from grpo.distributed.ranks import Ranks
from grpo.distributed.shards import Divided
from grpo.environment import Environment
from models.adam_state import can_divide
from models.config import GptOssConfig
from models.expert_share import ExpertShare
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


class ExpertAdapters(Divided):
    """The experts' adapters are whole on every rank, but it has gradients and optimizer state for those of its own experts only,
    and gets the others' after each update."""

    def __init__(self, ranks: Ranks, policy: GptOss, *, moments: str) -> None:
        super().__init__(ranks, place=ranks.sharer, num_places=ranks.num_sharers)
        trained = policy.trainable_parameters()
        self._own = policy.share.of(policy.config.num_local_experts)
        self._adapters = {name: parameter for name, parameter in trained.items() if ".mlp.experts." in name}
        if moments != "fp32" and not all(can_divide(parameter, self.num_places) for parameter in self._adapters.values()):
            raise ConfigError(f"optim.moments = {moments!r}: an expert's adapter is too small to be kept in blocks of its own; "
                              "set optim.moments=fp32, a larger model.lora.rank, or distributed.expert_parallel=1")
        self.parameters = {name: torch.nn.Parameter(parameter.detach()[self._own]) if name in self._adapters else parameter
                           for name, parameter in trained.items()}
        # of the blocks and draws of a state in 8 bits
        self.starts = {name: self.place * self.parameters[name].numel() * (moments != "fp32") for name in self._adapters}
        for name, parameter in self._adapters.items():
            parameter.register_post_accumulate_grad_hook(self._receiver(name))

    def _receiver(self, name: str) -> Callable[[torch.Tensor], None]:
        def receive(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            self.optimizer.add(name, [gradient[self._own].reshape(-1)])

        return receive

    @torch.no_grad()
    def gather(self) -> None:
        for name, parameter in self._adapters.items():
            parameter.copy_(self.whole(name, self.parameters[name]))

    @torch.no_grad()
    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        if name not in self._adapters:
            return part
        whole = part.new_zeros(self.num_places, *part.shape)
        whole[self.place] = part
        self.ranks.fill_in_experts(whole)
        return whole.flatten(0, 1)
