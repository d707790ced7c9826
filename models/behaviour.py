"""A copy of the policy that samples while the policy itself trains: two versions side by side.

The copy shares every frozen tensor, packed experts included, and has its own of what trains, at fixed addresses, since CUDA
graphs hold them.
"""
import copy
from contextlib import AbstractContextManager

import torch
from torch import nn

from kernels.device import room_for_this_thread
from models.gpt_oss import GptOss

# share of the multiprocessors that training leaves to decoding beside it: decode steps read more than they compute, and a part
# of the multiprocessors reads nearly as fast as all (other shares were not tried: scripts/EXPERIMENTS.md has what this one gave)
ROOM = 1 / 6


class BehaviourCopy:
    """`model` computes as `policy` did at the last refresh(). For a policy whose experts do not stream from host memory: the
    slots that they stream through serve one pass at a time."""

    def __init__(self, policy: GptOss) -> None:
        assert not policy.expert_store.placement.num_streamed_update, "experts that stream have no second reader"
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # own storage, the policy's; as flat bytes
        storages: dict[int, torch.Tensor] = {}  # by address, of those that have a copy: tensors that lie side by side stay so
        shared = [policy.config, policy.memory, policy.expert_store, policy.inv_freq, *policy.buffers()]
        memo = {id(item): item for item in shared}
        for parameter in policy.parameters():
            memo[id(parameter)] = self._copied(parameter, storages) if parameter.requires_grad else parameter
        self.model = copy.deepcopy(policy, memo)
        self.refresh()

    def _copied(self, parameter: nn.Parameter, storages: dict[int, torch.Tensor]) -> nn.Parameter:
        source = parameter.detach().untyped_storage()
        if source.data_ptr() not in storages:
            flat = torch.empty(0, dtype=torch.uint8, device=parameter.device).set_(source)
            storages[source.data_ptr()] = torch.empty_like(flat)
            self._pairs.append((storages[source.data_ptr()], flat))
        own = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        own.set_(storages[source.data_ptr()].untyped_storage(), parameter.storage_offset(), parameter.shape, parameter.stride())
        return nn.Parameter(own, requires_grad=False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the copy the policy as it is now. On a GPU it waits for all streams, before and after: any may read it."""
        self._wait()
        for own, source in self._pairs:
            own.copy_(source)
        self._wait()

    def with_room(self) -> AbstractContextManager:
        """For a `with`: training in other threads leaves this one some of the GPU."""
        return room_for_this_thread(ROOM)

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
