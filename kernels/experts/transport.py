"""What lies around the experts: tokens go to them, and their rows come back. Forward and backward pass the same two doors:

    y = combine(experts(dispatch(x)), weights) + residual        dx = combine(experts' backward(dispatch(dy)))

This transport is the identity: one process holds all experts. Nothing is copied on the way there, since the experts' products
read the rows of x through routing.tokens. Where several GPUs share the experts, dispatch and combine are where rows travel:
the experts then get rows of other GPUs with a Routing of their own, and combine sums at the token's owner.

Shapes: T tokens, A experts per token, R = T * A routed rows, D model width.
"""
from __future__ import annotations

import torch

from kernels.device import is_triton
from kernels.experts import sorting
from kernels.experts.sorting import Routing


def dispatch(x: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing]:
    """The rows that the experts of this process read, and which expert takes which."""
    return x, routing


def combine(rows: torch.Tensor, weights: torch.Tensor | None, routing: Routing,
            residual: torch.Tensor | None) -> torch.Tensor:
    """Each token's rows [R, D] summed in slot order in fp32: [T, D]. Times the gate weights [T, A] and plus the residual [T, D]
    where they are given. On a GPU without gradient."""
    if is_triton(rows):
        return sorting.sum_rows(rows, weights, routing.inverse, residual)
    return sorting.combine(rows, weights, routing, residual=residual)
