"""Brings the experts' rows back to the tokens, in forward and backward:

    y = combine(experts(x), weights) + residual        dx = combine(experts' backward(dy, x, weights))

Nothing sends tokens to the experts: their products read the rows of x through routing.tokens. The sum has no atomics: a token's
experts are added in the order in which it chose them (slot order).

Shapes: T tokens, A experts per token, R = T * A routed rows, D model width.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.device import cdiv, is_triton, launch, next_power_of_2, overlap_constants, wait_for_launch_before
from kernels.experts.sorting import Routing


def combine(rows: torch.Tensor, weights: torch.Tensor | None, routing: Routing,
            residual: torch.Tensor | None) -> torch.Tensor:
    """Each token's rows [R, D], times the gate weights [T, A], summed in slot order in fp32: [T, D]; plus the residual [T, D]
    if it is given. weights may be None on a GPU only. On a GPU without gradient."""
    if is_triton(rows):
        return sum_rows(rows, weights, routing.inverse, residual)
    return combine_reference(rows, weights, routing, residual)


def copy_rows(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Copies each token's row for each of its experts, [T, D] -> [R, D] in expert order. The reference, with gradient; on a GPU
    products read rows through routing.tokens, or forward.routed_rows copies them."""
    per_token = routing.indices.shape[1]
    copies = x.unsqueeze(1).expand(-1, per_token, -1).flatten(0, 1)  # [R, D]; a token's gradient is a sum in slot order
    return copies.index_select(0, routing.order)


def combine_reference(rows: torch.Tensor, weights: torch.Tensor, routing: Routing, residual: torch.Tensor | None) -> torch.Tensor:
    of_tokens = rows.index_select(0, routing.inverse.flatten()).unflatten(0, routing.inverse.shape).float()  # [T, A, D]
    y = (of_tokens * weights.unsqueeze(-1)).sum(1).to(rows.dtype if residual is None else residual.dtype)
    return y if residual is None else residual + y


@triton.jit
def _sum_rows_kernel(rows_ptr, weights_ptr, inverse_ptr, residual_ptr, y_ptr, stride_rows, stride_residual,
                     WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
                     HAS_RESIDUAL: tl.constexpr, OVERLAPS: tl.constexpr):
    """Sums a token's rows in slot order in fp32: the experts' outputs, or the gradients of what they were given."""
    wait_for_launch_before(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(PER_TOKEN):
        row = tl.load(inverse_ptr + token * PER_TOKEN + slot).to(tl.int64)
        values = tl.load(rows_ptr + row * stride_rows + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            values *= tl.load(weights_ptr + token * PER_TOKEN + slot)
        total += values
    y = total.to(y_ptr.dtype.element_ty)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * stride_residual + cols, mask=mask, other=0.0)
        y = (residual.to(tl.float32) + y.to(tl.float32)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * WIDTH + cols, y, mask=mask)


def sum_rows(rows: torch.Tensor, weights: torch.Tensor | None, inverse: torch.Tensor,
             residual: torch.Tensor | None) -> torch.Tensor:
    """Sums each token's rows [R, D] in slot order in fp32, times the gate weights [T, A] (contiguous, fp32) if given: [T, D] in
    the rows' dtype. With a residual [T, D], of the rows' dtype or wider, the sum is rounded to the residual's dtype, added to
    it, and returned in that dtype. Triton only, no gradient."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (num_tokens, per_token), width = inverse.shape, rows.shape[1]
    y = torch.empty((num_tokens, width), dtype=rows.dtype if residual is None else residual.dtype, device=rows.device)
    stride_residual = 0
    if residual is not None:
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
        stride_residual = residual.stride(0)
    if y.numel():
        block = min(next_power_of_2(width), 1024)
        launch(
            _sum_rows_kernel, (num_tokens, cdiv(width, block)),
            rows, weights, inverse, residual, y, rows.stride(0), stride_residual, WIDTH=width, PER_TOKEN=per_token,
            BLOCK=block, HAS_WEIGHTS=weights is not None, HAS_RESIDUAL=residual is not None, num_warps=4,
            **overlap_constants(rows, num_tokens))
    return y
