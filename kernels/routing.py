"""Routing of tokens to experts: top-k of the router's logits, then softmax over the k values only.

Equal to a softmax over all experts, top-k, renormalised. Ties go to the lower expert index. The gather of tokens into
expert order and the weighted sum back use no atomics: the backward of each is a gather, and sums run in slot order.

Shapes: T tokens, E experts, A experts per token, R = T * A routed rows, D model width.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Routing:
    indices: torch.Tensor  # [T, A] int64, descending logit
    order: torch.Tensor  # [R] int64: routed row in expert order -> token * A + slot
    inverse: torch.Tensor  # [T, A] int64: token, slot -> routed row in expert order
    offsets: list[int]  # [E + 1] on the host: expert e owns rows offsets[e]:offsets[e + 1]


def route(logits: torch.Tensor, *, experts_per_token: int) -> tuple[torch.Tensor, Routing]:
    """Picks experts for logits [T, E] fp32. Returns the gate weights [T, A] fp32 and the routing."""
    values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    indices = indices[:, :experts_per_token]  # [T, A]
    weights = torch.softmax(values[:, :experts_per_token], dim=-1)
    return weights, make_routing(indices, num_experts=logits.shape[-1])


def make_routing(indices: torch.Tensor, *, num_experts: int) -> Routing:
    """Sorts the choices indices [T, A] by expert, tokens in ascending order within an expert."""
    flat = indices.reshape(-1)  # [R]
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(flat, minlength=num_experts)
    offsets = [0, *counts.cumsum(0).tolist()]
    return Routing(indices, order, inverse.view_as(indices), offsets)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, order, inverse):
        ctx.save_for_backward(inverse)
        return x_TD[order // inverse.shape[1]]

    @staticmethod
    def backward(ctx, grad_RD):
        (inverse,) = ctx.saved_tensors
        return grad_RD[inverse].float().sum(1).to(grad_RD.dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, weights, order, inverse):
        ctx.save_for_backward(y_RD, weights, order, inverse)
        return (y_RD[inverse].float() * weights.unsqueeze(-1)).sum(1).to(y_RD.dtype)

    @staticmethod
    def backward(ctx, grad_TD):
        y_RD, weights, order, inverse = ctx.saved_tensors
        token = order // inverse.shape[1]
        grad_y = (grad_TD[token].float() * weights.reshape(-1)[order].unsqueeze(-1)).to(y_RD.dtype)
        grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_weights = (y_RD[inverse].float() * grad_TD.float().unsqueeze(1)).sum(-1)  # [T, A]
        return grad_y, grad_weights, None, None


def dispatch(x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Copies each token to its experts' rows: [T, D] -> [R, D] in expert order."""
    return _Dispatch.apply(x_TD, routing.order, routing.inverse)


def combine(y_RD: torch.Tensor, weights: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Sums the experts' outputs by gate weight [T, A] in slot order, in fp32: [R, D] -> [T, D]."""
    return _Combine.apply(y_RD, weights, routing.order, routing.inverse)
