"""RMSNorm: y = x * rsqrt(mean(x^2) + eps) * weight, computed in fp32 with one rounding at the end.

Unlike in Llama, the weight multiplies before the cast (openai/gpt-oss, gpt_oss/torch/model.py). With xhat = x * inv_rms:
    dx = inv_rms * (weight * dy - xhat * mean(weight * dy * xhat)),  dweight = sum over rows of dy * xhat.
add_rms_norm first adds x to the residual stream, and normalises the stored (rounded) sum. A float16 model keeps that stream in
float32 (kernels/device.py): the sum is then float32 and y float16.

One program reduces a row, and its size depends on the width alone, so a row gets the same bits in any batch. dweight is computed
only if it is needed: each of up to 256 programs sums its rows in order, then those sums are added in order.

Shapes: R rows (any leading dimensions), D model width.
"""
import torch
import triton
import triton.language as tl

from kernels.device import (
    cdiv,
    check_served,
    is_triton,
    launch,
    next_power_of_2,
    overlap_constants,
    wait_for_launch_before,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 16384  # a row stays in one program's registers
NUM_PARTIALS = 256  # programs that share the rows if dweight is needed


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    x_f32 = x.float()
    inv_rms = torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + eps)
    return (x_f32 * inv_rms * weight.float()).to(dtype)


def add_rms_norm_reference(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor,
                           eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = residual + x
    return rms_norm_reference(total, weight, eps, x.dtype), total


@triton.jit
def _norm_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, inv_rms_ptr, eps, stride_x, stride_residual,
                 WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, OVERLAPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    wait_for_launch_before(OVERLAPS)
    x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual + cols, mask=mask, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * WIDTH + cols, x, mask=mask)
    x = x.to(tl.float32)
    inv_rms = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    tl.store(inv_rms_ptr + row, inv_rms)
    tl.store(y_ptr + row * WIDTH + cols, (x * inv_rms * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows_per_program"])
def _norm_grad_kernel(grad_ptr, grad_total_ptr, x_ptr, weight_ptr, inv_rms_ptr, grad_x_ptr, partial_ptr, num_rows,
                      rows_per_program, stride_grad, stride_total, stride_x, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                      HAS_TOTAL: tl.constexpr, NEEDS_WEIGHT: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    partial = tl.zeros([BLOCK], tl.float32)
    for i in range(0, rows_per_program):
        row = first + i
        inside = mask & (row < num_rows)
        grad = tl.load(grad_ptr + row * stride_grad + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
        inv_rms = tl.load(inv_rms_ptr + row, mask=row < num_rows, other=0.0)
        normed = x * inv_rms
        grad_normed = grad * weight
        shift = tl.sum(grad_normed * normed, 0) / WIDTH
        grad_x = inv_rms * (grad_normed - normed * shift)
        if HAS_TOTAL:
            grad_x += tl.load(grad_total_ptr + row * stride_total + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * WIDTH + cols, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if NEEDS_WEIGHT:
            partial += grad * normed
    if NEEDS_WEIGHT:
        tl.store(partial_ptr + program * WIDTH + cols, partial, mask=mask)


@triton.jit(do_not_specialize=["num_partials"])
def _sum_partials_kernel(partial_ptr, grad_weight_ptr, num_partials, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                         BLOCK_COLS: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    rows = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for first in range(0, num_partials, BLOCK_ROWS):
        mask = (first + rows < num_partials)[:, None] & (cols < WIDTH)[None, :]
        total += tl.load(partial_ptr + (first + rows)[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0)
    tl.store(grad_weight_ptr + cols, tl.sum(total, 0).to(grad_weight_ptr.dtype.element_ty), mask=cols < WIDTH)


def _num_warps(width: int) -> int:
    return 1 if width <= 512 else 4 if width <= 2048 else 8


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] as [R, D] whose rows are contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def norm_forward(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float,
                 dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """y in `dtype` and the sum in the residual's (None without one) [R, D], and inv_rms [R] fp32, of x [R, D]. Triton only, no
    gradient."""
    num_rows, width = x.shape
    y = torch.empty((num_rows, width), dtype=dtype, device=x.device)
    total = torch.empty((num_rows, width), dtype=residual.dtype, device=x.device) if residual is not None else None
    inv_rms = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        launch(_norm_kernel, (num_rows,), x, residual, weight, y, total, inv_rms, eps, x.stride(0),
               residual.stride(0) if residual is not None else 0, WIDTH=width, BLOCK=next_power_of_2(width),
               HAS_RESIDUAL=residual is not None, num_warps=_num_warps(width), **overlap_constants(x, num_rows))
    return y, total, inv_rms


def norm_backward(grad: torch.Tensor, grad_total: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor,
                  inv_rms: torch.Tensor, needs_weight: bool, *,
                  in_place: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of norm_forward: dx [R, D] in x's dtype, grad_total included, and dweight [D] if needed. in_place: dx takes
    grad_total's memory. Triton only."""
    num_rows, width = x.shape
    if in_place:
        assert grad_total.dtype == x.dtype and grad_total.is_contiguous(), (grad_total.dtype, x.dtype, grad_total.stride())
    grad_x = grad_total if in_place else torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return grad_x, torch.zeros_like(weight) if needs_weight else None
    rows_per_program = cdiv(num_rows, NUM_PARTIALS) if needs_weight else 1
    num_programs = cdiv(num_rows, rows_per_program)
    partial = torch.empty((num_programs, width), dtype=torch.float32, device=x.device) if needs_weight else None
    launch(
        _norm_grad_kernel, (num_programs,), grad, grad_total, x, weight, inv_rms, grad_x, partial, num_rows, rows_per_program,
        grad.stride(0), grad_total.stride(0) if grad_total is not None else 0, x.stride(0), WIDTH=width,
        BLOCK=next_power_of_2(width), HAS_TOTAL=grad_total is not None, NEEDS_WEIGHT=needs_weight,
        num_warps=_num_warps(width))
    if not needs_weight:
        return grad_x, None
    grad_weight = torch.empty(width, dtype=weight.dtype, device=x.device)
    launch(_sum_partials_kernel, (cdiv(width, 32),), partial, grad_weight, num_programs, WIDTH=width, BLOCK_ROWS=32,
           BLOCK_COLS=32, num_warps=4)
    return grad_x, grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        rows, weight = _rows(x), weight.contiguous()
        y, _, inv_rms = norm_forward(rows, None, weight, eps, dtype)
        ctx.save_for_backward(rows, weight, inv_rms)
        return y if y.shape == x.shape else y.view(x.shape)  # FSDP2 warns of a model whose output is a view

    @staticmethod
    def backward(ctx, grad):
        rows, weight, inv_rms = ctx.saved_tensors
        grad_x, grad_weight = norm_backward(_rows(grad), None, rows, weight, inv_rms, ctx.needs_input_grad[1])
        return grad_x.view(grad.shape), grad_weight, None, None


def _check(tensors: dict[str, torch.Tensor]) -> None:
    check_served("rms_norm", tensors, dtypes=DTYPES, tensor_cores=False)
    x, weight = tensors["x"], tensors["weight"]
    assert weight.shape == x.shape[-1:], f"weight {weight.shape} does not fit x {x.shape}"
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"rms_norm: rows of {x.shape[-1]}; the Triton kernel takes up to {MAX_WIDTH}")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Normalises x [..., D] by its root mean square; weight [D]. Returns `dtype`, by default x's; the gradient has x's."""
    dtype = x.dtype if dtype is None else dtype
    if not is_triton(x):
        return rms_norm_reference(x, weight, eps, dtype)
    _check({"x": x, "weight": weight})
    if not torch.is_grad_enabled():  # autograd would take the host as long as the launch
        return norm_forward(_rows(x), None, weight.contiguous(), eps, dtype)[0].view(x.shape)
    return _RMSNorm.apply(x, weight, eps, dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *,
                 eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds x to the residual stream and normalises the sum: x [..., D], residual [..., D] in x's dtype or fp32, weight [D].
    Returns rms_norm(residual + x) in x's dtype and residual + x in the residual's. On a GPU without gradient (norm_backward)."""
    assert x.shape == residual.shape, f"x {x.shape} and residual {residual.shape} differ"
    assert residual.dtype in (x.dtype, torch.float32), f"residual {residual.dtype} beside x {x.dtype}: x's dtype or float32"
    if not is_triton(x):
        return add_rms_norm_reference(x, residual, weight, eps)
    _check({"x": x, "residual": residual, "weight": weight})
    y, total, _ = norm_forward(_rows(x), _rows(residual), weight.contiguous(), eps, x.dtype)
    return y.view(x.shape), total.view(x.shape)
