"""Dense projection with an unmerged low-rank update: y = x W^T + b + scale * (x A^T) B^T (LoRA, arXiv 2106.09685).

A and B are fp32 master weights, cast to x's dtype at use. On a GPU the update joins the same fp32 sum as the base's product. Many
rows take grouped_gemm, few rows (kernels/device.py: is_few) the kernels that read each weight once; both give the same bits.
Several projections may be one product whose weights lie side by side: each adapted one then has its own slice of the low-rank
row. On the CPU autograd differentiates lora_linear; on a GPU the backward is project_backward. Its gradients of A and B, sums
over tokens that can pass float16's range, stay in fp32; those of W and b (full fine-tuning) are the library's.

Shapes: T tokens, K in, N out, r LoRA's rank, G adapted projections of a product.
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.dense import linear
from kernels.device import is_few
from kernels.experts.gemm import grouped_gemm
from kernels.experts.outer import grouped_outer
from kernels.linear_few_rows import decode_linear


class Adapter(NamedTuple):
    """LoRA on a product of one or more projections side by side."""

    A: torch.Tensor  # [G r, K] fp32
    B: torch.Tensor  # [N, r] fp32; rows of columns without an adapter are not read
    groups: torch.Tensor | None  # [N] int32: which slice of the low-rank row a column takes, -1 for none; None for one projection
    columns: list[slice]  # of each adapted projection
    scale: float


class ProjectionGrads(NamedTuple):
    x: torch.Tensor | None  # [T, K]
    weight: torch.Tensor | None  # [N, K]
    bias: torch.Tensor | None  # [N]
    A: torch.Tensor | None  # [G r, K]
    Bs: list[torch.Tensor]  # of each adapted projection


def lora_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_A: torch.Tensor | None,
                lora_B: torch.Tensor | None, *, scale: float) -> torch.Tensor:
    """The reference. x [T, K], weight [N, K], bias [N] or none, lora_A [r, K] and lora_B [N, r] or neither -> [T, N]."""
    y = linear(x, weight, bias)
    return y if lora_A is None else y + scale * linear(linear(x, lora_A.to(x.dtype), None), lora_B.to(x.dtype), None)


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapter: Adapter | None, *,
            keeps_low_rank: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [T, K] times weight [N, K] plus bias [N] or none, with its adapter: [T, N], without gradient; and, for project_backward,
    the low-rank rows scale * x A^T [T, G r] where there is an adapter and they are asked for."""
    if is_few(x) and bias is not None and not keeps_low_rank:
        lora = {} if adapter is None else {"lora_A": adapter.A, "lora_B": adapter.B, "lora_groups": adapter.groups,
                                           "lora_scale": adapter.scale}
        return decode_linear(x, weight, bias, **lora), None
    bias = None if bias is None else bias[None]
    if adapter is None:
        return grouped_gemm(x, weight.T[None], None, bias=bias), None
    low_rank = grouped_gemm(x, adapter.A.T[None], None, scale=adapter.scale)
    return grouped_gemm(x, weight.T[None], None, bias=bias, low_rank=low_rank, lora_up=adapter.B.T[None],
                        lora_groups=adapter.groups), low_rank


def adapter_backward(grad: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor,
                     adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """From the gradient [T, N] of a product with an adapter: that of x A^T [T, G r], of A [G r, K] and of each projection's B."""
    parts = [grouped_gemm(grad[:, columns], adapter.B[columns][None], None, scale=adapter.scale) for columns in adapter.columns]
    low_rank_grad = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    grad_A, grad_Bs, rank = torch.empty_like(adapter.A), [], adapter.B.shape[1]
    grouped_outer(x, low_rank_grad, None, grad_A.T[None])
    for group, columns in enumerate(adapter.columns):
        grad_Bs.append(torch.empty_like(adapter.B[columns]))
        grouped_outer(grad[:, columns], low_rank[:, group * rank:(group + 1) * rank], None, grad_Bs[-1][None])
    return low_rank_grad, grad_A, grad_Bs


def project_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, low_rank: torch.Tensor | None,
                     adapter: Adapter | None, *, needs_x: bool, needs_base: bool) -> ProjectionGrads:
    """The gradients of project from that of its result, grad [T, N]; of weight and bias where `needs_base`."""
    low_rank_grad = grad_A = grad_x = None
    grad_Bs = []
    if adapter is not None:
        low_rank_grad, grad_A, grad_Bs = adapter_backward(grad, x, low_rank, adapter)
    if needs_x:
        lora_up = None if adapter is None else adapter.A[None]
        grad_x = grouped_gemm(grad, weight[None], None, low_rank=low_rank_grad, lora_up=lora_up)
    grad_weight, grad_bias = (grad.T @ x, grad.sum(0)) if needs_base else (None, None)
    return ProjectionGrads(grad_x, grad_weight, grad_bias, grad_A, grad_Bs)
