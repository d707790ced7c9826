"""A projection of experts with LoRA, and all its gradients, made of the grouped kernels."""

import torch

from kernels.experts.gemm import grouped_gemm
from kernels.experts.outer import grouped_outer, grouped_row_sum


@torch.no_grad()
def outcome(given, offsets, grad, scale):
    """The output y and the gradients, by name, of x [R, K], weight [E, K, N], bias, lora_A and lora_B for the output's."""
    x, weight, bias, lora_A, lora_B = (given[name].detach() for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    low_rank = grouped_gemm(x, lora_A.transpose(1, 2), offsets, scale=scale)  # [R, r]
    y = grouped_gemm(x, weight, offsets, bias=bias, low_rank=low_rank, lora_up=lora_B.transpose(1, 2))
    grad_low_rank = grouped_gemm(grad, lora_B, offsets, scale=scale)  # [R, r]
    results = {"y": y, "x": grouped_gemm(grad, weight.transpose(1, 2), offsets, low_rank=grad_low_rank, lora_up=lora_A)}
    results |= {name: torch.full_like(tensor, torch.nan)  # in the order of memory of what it belongs to
                for name, tensor in (("weight", weight), ("bias", bias), ("lora_A", lora_A), ("lora_B", lora_B))}
    grouped_outer(x, grad, offsets, results["weight"])
    grouped_row_sum(grad, offsets, results["bias"])
    grouped_outer(x, grad_low_rank, offsets, results["lora_A"].transpose(1, 2))
    grouped_outer(grad, low_rank, offsets, results["lora_B"])
    return results
