"""Full training whose weights, gradients and optimizer state are divided over the ranks, by torch's FSDP2 (fully_shard).

Each rank keeps 1/N of every large parameter, of its gradient and of its optimizer state; small ones are whole on all ranks. In
the update a layer's weights are gathered when its forward or backward begins, and dropped when that ends. While sampling, all
weights are whole on every rank, since decoding would gather them for each token, and the parts are freed.

FSDP2 gathers weights; gradients are added here, since its own reduction rounds after each round of micro-batches and knows no
order. After a layer's backward a rank gets its part of the layer's gradients from all ranks (an all-to-all, which moves as many
bytes as a reduce-scatter), while the layer before goes through its backward, and adds them in the order of the micro-batches; a
gradient's norm is that of the whole, gathered for it. So weights have the bits of one process.

A pass waits for all ranks at every layer. So all take equally many: in an update's last round, a rank without a micro-batch
repeats another one's, and its gradients are left out. What happens to one rank in a pass (memory that is refused, a loss that is
not finite) ends the run.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from grpo.config import ConfigError, Train, TrainConfig
from grpo.distributed.ranks import Ranks
from grpo.distributed.settings import Reduction
from grpo.optim import Optimizer
from models.adam_state import can_divide
from models.gpt_oss import GptOss
from models.offload import GATHERED_LAYERS


def check_shards(config: TrainConfig) -> None:
    """Raises ConfigError for settings with which ranks cannot divide a model."""
    if not config.distributed.shard:
        return
    key, advice = "distributed.shard = True", "or set distributed.shard=false"
    if config.model.train != Train.full:
        raise ConfigError(f"{key}: divides what trains in full, and model.train = {str(config.model.train)!r} trains an adapter, "
                          f"which is small; set model.train=full, {advice}")
    if config.distributed.reduction != Reduction.ordered:
        raise ConfigError(f"{key}: its gradients are added in order; set distributed.reduction=ordered (now "
                          f"{str(config.distributed.reduction)!r}), {advice}")


class Divided:
    """What trains, if the ranks of a group divide its gradients and optimizer state. parameters: name -> what this rank updates,
    its part of a parameter or a whole one; starts: name -> the element that such a part begins with. gather(): makes all weights
    whole on all ranks; whole(): what ranks have parts of. All of the group call them."""

    divides_weights = False  # too
    parameters: dict[str, torch.nn.Parameter]
    starts: dict[str, int]
    optimizer: Optimizer | None = None  # of `parameters`, which gets the gradients

    def __init__(self, ranks: Ranks, *, place: int, num_places: int) -> None:
        """place: of this rank in the group."""
        self.ranks, self.place, self.num_places = ranks, place, num_places

    def gather(self) -> None:
        raise NotImplementedError

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """The whole of a gradient, or of state of the optimizer, of the parameter of this name."""
        raise NotImplementedError

    def step(self) -> float:
        """The optimizer's step. It gathers, so none may begin it again after an error. All call it."""
        with self.ranks.collective("the optimizer's step"):
            return self.optimizer.step()

    def whole_state(self, *, keeps: bool) -> dict[str, torch.Tensor]:
        """The optimizer's state as one process has it, in host memory; {} unless `keeps`. All call it."""
        found = {}
        with self.ranks.collective("gathering the optimizer's state"):
            for key, tensor in self.optimizer.state_dict().items():
                tensor = self.whole(key.partition(".")[2], tensor)
                if keeps:
                    found[key] = tensor.cpu()
        return found

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Gives the optimizer this rank's part of the state of one process."""
        self.optimizer.load_state_dict({
            key: tensor.chunk(self.num_places)[self.place] if key.partition(".")[2] in self.starts else tensor
            for key, tensor in state.items()})


class Shards(Divided):
    """A policy's trained parameters, divided over all ranks: as for training passes. Other passes need gather(), and training
    passes after it release()."""

    divides_weights = True

    def __init__(self, ranks: Ranks, policy: GptOss) -> None:
        from torch.distributed.device_mesh import init_device_mesh  # here: they take a second to import
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        super().__init__(ranks, place=ranks.rank, num_places=ranks.num_ranks)
        self.num_gradients = 0  # of ranks whose gradients count in this round
        self._mesh = init_device_mesh(policy.device.type, (ranks.num_ranks,))
        blocks = list(policy.model.layers)
        self._divided = [name for name, parameter in policy.trainable_parameters().items()
                         if can_divide(parameter, ranks.num_ranks)]
        whole = {parameter for name, parameter in policy.named_parameters() if name not in self._divided}
        for module in (*blocks, policy):  # the head is needed right after the forward
            fully_shard(module, mesh=self._mesh, reshard_after_forward=module is not policy, ignored_params=whole)
            module.gathers = True
        for block in blocks:
            register_fsdp_forward_method(block, "forward_with_grad")
        for block, following in zip(blocks, blocks[1:]):  # the host may wait within a layer, so the next one is gathered before
            block.set_modules_to_forward_prefetch([following])
        register_fsdp_forward_method(policy, "packed_hidden")
        self._policy, self._modules = policy, [*blocks, policy]
        layers = [f"model.layers.{number}." for number in range(len(blocks))]
        self._names = [[name for name in self._divided if name.startswith(layer)] for layer in layers]  # that a module gathers
        self._names.append([name for name in self._divided if not name.startswith(tuple(layers))])
        sizes = [[parameter.nbytes for parameter in block.parameters()] for block in blocks]
        policy.memory.gathered_bytes = (GATHERED_LAYERS + 2) * max(map(sum, sizes))  # 2: gradients sent and received
        self._group_of, self._groups, self._made, self._sent = {}, {}, {}, []
        for name in policy.trainable_parameters():
            self._join(name)
        for module, names in zip(self._modules, self._names):
            module.unshard()  # only now there are parameters that are whole; they stay the same ones
            for name in names:
                policy.get_parameter(name).register_post_accumulate_grad_hook(self._receiver(name))
            module.reshard()
        for name in self._group_of.keys() - set(self._divided):
            policy.get_parameter(name).register_post_accumulate_grad_hook(self._receiver(name))
        self.parameters = {name: torch.nn.Parameter(parameter.detach().to_local() if name in self._divided else parameter)
                           for name, parameter in policy.trainable_parameters().items()}
        self.starts = {name: ranks.rank * self.parameters[name].numel() for name in self._divided}

    def _join(self, name: str) -> None:
        """Gradients of a layer are exchanged together, in the order of its parameters: the backward may bring them in any."""
        layer = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name
        self._groups.setdefault(layer, []).append(name)
        self._group_of[name] = self._groups[layer]

    def gather(self) -> None:
        """Also frees this rank's parts, which the whole weights have."""
        with self.ranks.collective("gathering the weights"):
            for module, names in zip(self._modules, self._names):
                module.unshard()
                for name in names:
                    self.parameters[name].untyped_storage().resize_(0)

    @torch.no_grad()
    def release(self) -> None:
        """Keeps this rank's parts of what gather() brought: from here on a pass with gradient gathers layer by layer, and others
        cannot run."""
        for module, names in zip(self._modules, self._names):
            for name in names:
                part = self.parameters[name]
                part.untyped_storage().resize_(part.nbytes)
                part.copy_(self._policy.get_parameter(name).chunk(self.num_places)[self.place])
            module.reshard()

    def _receiver(self, name: str) -> Callable[[torch.Tensor], None]:
        def receive(parameter: torch.Tensor) -> None:
            self._made[name], parameter.grad = parameter.grad, None  # FSDP2 finds none to reduce
            group = self._group_of[name]
            if all(member in self._made for member in group):
                self.add_sent()
                for member in group:
                    self._send(member, self._made.pop(member))

        return receive

    def _send(self, name: str, gradient: torch.Tensor) -> None:
        """Starts to exchange a gradient, while the layer before goes through its backward."""
        size, gradient = self.ranks.num_ranks, gradient.contiguous().view(-1)
        received = gradient.new_empty(size, gradient.numel() // size if name in self._divided else gradient.numel())
        if name in self._divided:
            work = dist.all_to_all_single(received.view(-1), gradient, async_op=True)
        else:
            work = dist.all_gather(list(received), gradient, async_op=True)
        self._sent.append((name, gradient, received, work))  # the gradient too: it must stay until then

    def add_sent(self) -> None:
        """Adds what was exchanged, of the ranks whose micro-batches count, in their order, to the optimizer's gradients."""
        for name, _, received, work in self._sent:
            work.wait()
            self.optimizer.add(name, received[:self.num_gradients])
        self._sent.clear()

    @torch.no_grad()
    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, Shard

        if name not in self._divided:
            return part
        return DTensor.from_local(part, self._mesh, [Shard(0)], run_check=False).full_tensor()


def train_sharded(shards: Shards, work: list[Any], train: Callable[[Any], Any], *,
                  should_stop: Callable[[], bool]) -> tuple[list[Any], bool]:
    """Leaves the sum of the gradients of all micro-batches in the optimizers of the ranks, in the order of the micro-batches.
    work, train, results: as of train_together (grpo/distributed/gradients.py), but nothing is refused."""
    ranks, trained = shards.ranks, []
    for first in range(0, len(work), ranks.num_ranks):
        shards.num_gradients = min(ranks.num_ranks, len(work) - first)
        with ranks.collective("a training pass"):
            own = train(work[first + min(ranks.rank, shards.num_gradients - 1)])
            shards.add_sent()
        found = ranks.exchange("the micro-batches", (own, should_stop()))
        if any(is_stopped for _, is_stopped in found):
            return trained, True
        trained += [part for part, _ in found[:shards.num_gradients]]
    return trained, False
