"""Parameters of dense projections and their LoRA. The computation is linear and linear_backward of kernels/linear.py;
Linear.forward is the CPU's path.

Shapes: T tokens, r LoRA's rank, E experts.
"""
import torch
from torch import nn

from kernels.device import is_triton
from kernels.linear import Gradients, adapter_backward, adapter_of, lora_linear, project
from kernels.router import router_backward, router_logits


class Linear(nn.Module):
    """A projection with weight [out, in] and bias [out]; models/lora.py attaches the adapter."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.register_parameter("lora_A", None)  # [r, in] fp32
        self.register_parameter("lora_B", None)  # [out, r] fp32
        self.lora_scale, self.adapter_enabled = 0.0, True
        self.low_rank_ready: torch.Tensor | None = None  # kernels/linear.py: Adapter.ready

    def has_adapter(self) -> bool:
        """Whether it has an adapter that is enabled."""
        return self.lora_A is not None and self.adapter_enabled

    def trains_base(self) -> bool:
        return self.weight.requires_grad or self.bias.requires_grad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapter = (self.lora_A, self.lora_B) if self.has_adapter() else (None, None)
        return lora_linear(x, self.weight, self.bias, *adapter, scale=self.lora_scale)


def side_by_side(whole: torch.Tensor, sizes: list[int]) -> list[nn.Parameter]:
    """Splits `whole` into frozen parameters of `sizes` rows. They stay views, so linear() joins them without a copy."""
    return [nn.Parameter(part, requires_grad=False) for part in whole.split(sizes)]


def linears(size_in: int, sizes_out: list[int], **factory) -> list[Linear]:
    """Projections of the same input whose weights and biases lie side by side."""
    weights, biases = (side_by_side(torch.empty(sum(sizes_out), *shape, **factory), sizes_out) for shape in ((size_in,), ()))
    return [Linear(weight, bias) for weight, bias in zip(weights, biases)]


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
        """On a GPU: adds the router's part to grad_x [T, D], puts trainable parameters' into `grads`. grad [T, E] fp32."""
        router_backward(grad, self.weight, grad_x)
        if self.trains_base():
            grads |= {self.weight: (grad.T @ x.float()).to(self.weight.dtype), self.bias: grad.sum(0).to(self.bias.dtype)}
        adapter = adapter_of([self])
        if adapter is not None:
            x = x.float()
            low_rank_grad = adapter_backward([self], adapter, grad, x, adapter.scale * self._product(x, adapter.A), grads)
            grad_x += self._product(low_rank_grad, adapter.A.T).to(grad_x.dtype)
