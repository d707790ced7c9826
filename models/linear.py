"""Dense projections that may carry LoRA, and several of them as one product whose weights lie side by side.

On the CPU each is a product of its own, differentiated by autograd; on a GPU the functions of kernels/linear.py compute them.

Shapes: T tokens, r LoRA's rank, G adapted projections of a product, E experts.
"""
from __future__ import annotations

from functools import cache

import torch
from torch import nn

from kernels.device import is_triton
from kernels.linear import Adapter, adapter_backward, lora_linear, project, project_backward
from kernels.router import router_backward, router_logits

Gradients = dict[nn.Parameter, torch.Tensor]


class Linear(nn.Module):
    """A projection with weight [out, in] and bias [out]; models/lora.py attaches the adapter."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.register_parameter("lora_A", None)  # [r, in] fp32
        self.register_parameter("lora_B", None)  # [out, r] fp32
        self.lora_scale, self.adapter_enabled = 0.0, True

    def has_adapter(self) -> bool:
        """Whether it carries an adapter that is switched on."""
        return self.lora_A is not None and self.adapter_enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapter = (self.lora_A, self.lora_B) if self.has_adapter() else (None, None)
        return lora_linear(x, self.weight, self.bias, *adapter, scale=self.lora_scale)


def side_by_side(whole: torch.Tensor, sizes: list[int]) -> list[nn.Parameter]:
    """Frozen parameters of so many rows each that are views of one tensor: what takes them as one product needs no copy."""
    return [nn.Parameter(part, requires_grad=False) for part in whole.split(sizes)]


def linears(size_in: int, sizes_out: list[int], **factory) -> list[Linear]:
    """Projections of the same input whose weights and biases lie side by side."""
    weights, biases = (side_by_side(torch.empty(sum(sizes_out), *shape, **factory), sizes_out) for shape in ((size_in,), ()))
    return [Linear(weight, bias) for weight, bias in zip(weights, biases)]


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Rows of all tensors, one below the other: a view where they lie so in memory, as side_by_side makes them, else a copy."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        follows = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and tensor.storage_offset() == end
        if not (follows and tensor.is_contiguous()):
            return torch.cat(tensors).detach()
        end += tensor.numel()
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride(), first.storage_offset())


@cache
def _groups(sizes: tuple[int, ...], has_adapter: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    """For each column of projections side by side, the number of its projection among those with an adapter, or -1."""
    numbers = [sum(has_adapter[:i]) if has else -1 for i, has in enumerate(has_adapter)]
    return torch.tensor(numbers, dtype=torch.int32).repeat_interleave(torch.tensor(sizes)).to(device)


def adapter_of(modules: list[Linear]) -> Adapter | None:
    """The adapter of projections side by side, None where none of them carries one that is switched on. Raises ValueError where
    they differ in rank or scale."""
    carriers = [module for module in modules if module.has_adapter()]
    if not carriers:
        return None
    kinds = {(module.lora_A.shape[0], module.lora_scale) for module in carriers}
    if len(kinds) > 1:
        raise ValueError(f"adapters on q_proj, k_proj and v_proj of a layer differ in rank and scale ({sorted(kinds)}); on a GPU "
                         "they must agree")
    sizes = tuple(len(module.weight) for module in modules)
    ends = [sum(sizes[:i + 1]) for i in range(len(sizes))]
    columns = [slice(end - size, end) for module, size, end in zip(modules, sizes, ends) if module.has_adapter()]
    first, groups = carriers[0], None
    if len(modules) > 1:
        groups = _groups(sizes, tuple(module.has_adapter() for module in modules), first.lora_A.device)
    if len(carriers) == len(modules):
        B = joined([module.lora_B for module in carriers])
    else:
        B = torch.empty(ends[-1], first.lora_A.shape[0], dtype=torch.float32, device=first.lora_A.device)
        for module, part in zip(carriers, columns):
            B[part] = module.lora_B
    return Adapter(joined([module.lora_A for module in carriers]), B, groups, columns, first.lora_scale)


def linear(modules: list[Linear], x: torch.Tensor, *, keeps_low_rank: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The outputs [T, sum of out] of projections of x [T, in], side by side; and, on a GPU where they are asked for, the low-rank
    rows [T, G r] that linear_backward needs."""
    if not is_triton(x):
        return torch.cat([module(x) for module in modules], 1) if len(modules) > 1 else modules[0](x), None
    weight, bias = (joined([getattr(module, name) for module in modules]) for name in ("weight", "bias"))
    return project(x, weight, bias, adapter_of(modules), keeps_low_rank=keeps_low_rank)


def linear_backward(modules: list[Linear], grad: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor | None, grads: Gradients,
                    *, needs_x: bool) -> torch.Tensor | None:
    """The gradient of x [T, in], where it is needed, from that of linear's outputs; those of what trains go to `grads`."""
    result = project_backward(grad, x, joined([module.weight for module in modules]), low_rank, adapter_of(modules),
                              needs_x=needs_x, needs_base=any(trains_base(module) for module in modules))
    _note_adapters([module for module in modules if module.has_adapter()], result.A, result.Bs, grads)
    if result.weight is not None:
        sizes = [len(module.weight) for module in modules]
        for module, weight, bias in zip(modules, result.weight.split(sizes), result.bias.split(sizes)):
            grads |= {module.weight: weight, module.bias: bias}
    return result.x


def _note_adapters(carriers: list[Linear], grad_A: torch.Tensor | None, grad_Bs: list[torch.Tensor], grads: Gradients) -> None:
    for module, A, B in zip(carriers, () if grad_A is None else grad_A.split(len(carriers[0].lora_A)), grad_Bs):
        grads |= {module.lora_A: A, module.lora_B: B}


def trains_base(module: Linear) -> bool:
    return module.weight.requires_grad or module.bias.requires_grad


class Router(Linear):
    """Logits [T, E] of the experts, fp32 whatever the dtype of x and the weights; so is its adapter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = router_logits(x, self.weight, self.bias)
        if not self.has_adapter():
            return logits
        low_rank = self._product(x.float(), self.lora_A)  # [T, r]
        return logits + self.lora_scale * self._product(low_rank, self.lora_B)

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not is_triton(x):
            return lora_linear(x, weight, None, None, None, scale=1.0)
        return project(x, weight, None, None, keeps_low_rank=False)[0]

    def backward(self, grad: torch.Tensor, x: torch.Tensor, grad_x: torch.Tensor, grads: Gradients) -> None:
        """Adds the logits' share to grad_x [T, D], from their gradient [T, E] fp32; those of what trains go to `grads`. On a
        GPU."""
        router_backward(grad, self.weight, grad_x)
        if trains_base(self):
            grads |= {self.weight: (grad.T @ x.float()).to(self.weight.dtype), self.bias: grad.sum(0).to(self.bias.dtype)}
        adapter = adapter_of([self])
        if adapter is not None:
            x = x.float()
            low_rank_grad, grad_A, grad_Bs = adapter_backward(grad, x, adapter.scale * self._product(x, adapter.A), adapter)
            _note_adapters([self], grad_A, grad_Bs, grads)
            grad_x += self._product(low_rank_grad, adapter.A.T).to(grad_x.dtype)
