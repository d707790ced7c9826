"""Dense projections with an unmerged low-rank update: y = x W^T + b + scale * (x A^T) B^T (LoRA, arXiv 2106.09685).

A and B are fp32 master weights, cast to x's dtype at use. Several projections of the same input may be one product, with their
weights side by side; each adapted projection then has its own slice of the low-rank row.

On a GPU the update is added to the same fp32 sum as the base's product. Many rows use grouped_gemm. Few rows (kernels/device.py:
is_few), where time goes into reading the weight, use the kernel of kernels/experts/few_rows.py with one expert that owns every
row: the weight is the MMA's M side and is read once for up to 64 tokens, in tiles small enough that every multiprocessor gets
one. In decode steps the same launch computes x A^T (Adapter.ready). Each output is one sum over the inputs in ascending order,
then over LoRA's rank: all ways and all tile sizes give the same bits. The backward is linear_backward. Its gradients of A and B,
sums over tokens that can exceed float16's range, stay in fp32; the library computes those of W and b (full fine-tuning). On the
CPU autograd differentiates lora_linear.

Shapes: T tokens, K in, N out, r LoRA's rank, G adapted projections of a product.
"""
from __future__ import annotations

from functools import cache
from typing import NamedTuple, Protocol

import torch

from kernels.dense import linear as dense_linear
from kernels.device import gpu_family, is_few, is_triton, measured, unmeasured
from kernels.experts.few_rows import (
    FOR_ALL,
    FOR_LOW_RANK,
    FOR_X,
    Projection,
    decode_projection,
    low_rank_rows,
)
from kernels.experts.few_tiles import DecodeBlocks, blocks_of, fit_blocks
from kernels.experts.gemm import grouped_gemm
from kernels.experts.outer import grouped_outer

Gradients = dict[torch.nn.Parameter, torch.Tensor]

# family -> entries (max tokens, blocks if out > in, blocks otherwise); with two items the same blocks serve both; the last entry
# also serves more tokens. Tiles of less than 64 rows use mma.sync on every GPU
_LINEAR = {
    "ampere": unmeasured(((16, DecodeBlocks(32, 16, 128, 4, 5)),
                          (32, DecodeBlocks(32, 32, 128, 4, 4)),
                          (128, DecodeBlocks(64, 64, 64, 4, 4)),
                          (512, DecodeBlocks(128, 64, 64, 4, 3)))),
    "consumer": unmeasured(((16, DecodeBlocks(32, 16, 128, 4, 4)),
                            (32, DecodeBlocks(32, 32, 128, 4, 3)),
                            (512, DecodeBlocks(64, 64, 64, 4, 3)))),
    "hopper": measured(((16, DecodeBlocks(64, 16, 128, 4, 6), DecodeBlocks(64, 16, 256, 4, 5)),
                        (32, DecodeBlocks(64, 32, 128, 4, 6), DecodeBlocks(64, 16, 128, 4, 8)),
                        (64, DecodeBlocks(64, 64, 128, 4, 4), DecodeBlocks(64, 32, 128, 4, 4)),
                        (128, DecodeBlocks(128, 64, 64, 8, 5), DecodeBlocks(64, 64, 128, 4, 4)),
                        (512, DecodeBlocks(128, 64, 64, 8, 4)))),
    "blackwell": unmeasured(((16, DecodeBlocks(128, 16, 64, 4, 6)),
                             (512, DecodeBlocks(128, 64, 64, 4, 5)))),
    "interpreter": unmeasured(((16, DecodeBlocks(16, 16, 32, 4, 2)),
                               (512, DecodeBlocks(32, 32, 32, 4, 2)))),
}  # fmt: skip
# the same for x A^T: few programs, each of which reads all inputs, and A in fp32, twice the bytes. Speed depends on how many
# bytes a program loads at once
_LOW_RANK = {
    "ampere": unmeasured(((512, DecodeBlocks(16, 16, 128, 4, 6)),)),
    "consumer": unmeasured(((512, DecodeBlocks(16, 16, 128, 4, 4)),)),
    "hopper": measured(((32, DecodeBlocks(16, 16, 512, 2, 4)), (512, DecodeBlocks(32, 32, 256, 4, 4)))),
    "blackwell": unmeasured(((512, DecodeBlocks(16, 16, 256, 4, 5)),)),
    "interpreter": unmeasured(((512, DecodeBlocks(16, 16, 32, 4, 2)),)),
}


class Adapter(NamedTuple):
    """The LoRA of one product, which may be several projections side by side."""

    A: torch.Tensor  # [G r, K] fp32; without gradient also x's dtype, like B
    B: torch.Tensor  # [N, r]; rows of columns without an adapter are not read
    groups: torch.Tensor | None  # [N] int32: a column's slice of the low-rank row, -1 for none; None for one projection
    columns: list[slice]  # of each adapted projection
    scale: float
    ready: torch.Tensor | None = None  # [1] int32, 0 and for one product: decode_projection's, with A in x's dtype


def lora_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_A: torch.Tensor | None,
                lora_B: torch.Tensor | None, *, scale: float) -> torch.Tensor:
    """The reference. x [T, K], weight [N, K], bias [N] or none, lora_A [r, K] and lora_B [N, r] or neither -> [T, N]."""
    y = dense_linear(x, weight, bias)
    return y if lora_A is None else y + scale * dense_linear(dense_linear(x, lora_A.to(x.dtype), None), lora_B.to(x.dtype), None)


def choose_linear_blocks(family: str, dtype: torch.dtype, num_tokens: int, num_in: int, num_out: int, *,
                         is_low_rank: bool) -> DecodeBlocks:
    table = (_LOW_RANK if is_low_rank else _LINEAR)[family].blocks
    return fit_blocks(blocks_of(table, num_tokens, num_in, num_out), family, dtype, num_in)


def decode_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
    """project() for few rows x [T, K]: weight [N, K], bias [N] -> [T, N] in x's dtype. Triton only, no gradient. Raises
    ValueError for dtypes and GPUs that the kernel cannot serve."""
    assert is_triton(x), "elsewhere lora_linear serves"
    family, (num_tokens, num_in) = gpu_family(x), x.shape
    blocks = choose_linear_blocks(family, x.dtype, num_tokens, num_in, len(weight), is_low_rank=False)
    projection = Projection(weight.T[None], None, None, bias[None], False)
    if adapter is None:
        return decode_projection(x, projection, None, waits=FOR_X, blocks=blocks)
    num_out, lora = len(weight), {"lora_up": adapter.B.T[None], "lora_groups": adapter.groups}
    slice_rank, ends = adapter.B.shape[1], [end for columns in adapter.columns for end in (columns.start, columns.stop)]
    lora["is_sliced"] = (adapter.groups is not None and slice_rank % 16 == 0
                         and all(end % blocks.rows == 0 for end in ends if end < num_out))
    if adapter.ready is not None:
        has_all = sum(columns.stop - columns.start for columns in adapter.columns) == num_out
        return decode_projection(x, projection, None, lora_A=adapter.A[None], ready=adapter.ready, scale=adapter.scale,
                                 waits=FOR_X if has_all else FOR_ALL, blocks=blocks, **lora)  # else adapter_of just wrote B
    low_rank_blocks = choose_linear_blocks(family, x.dtype, num_tokens, num_in, len(adapter.A), is_low_rank=True)
    low_rank = low_rank_rows(x, adapter.A[None], None, scale=adapter.scale, waits=FOR_X, blocks=low_rank_blocks)
    return decode_projection(x, projection, None, low_rank=low_rank, waits=FOR_LOW_RANK, blocks=blocks, **lora)


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapter: Adapter | None, *,
            keeps_low_rank: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [T, K] times weight [N, K] plus bias [N] or none, with its adapter: [T, N], without gradient. If there is an adapter and
    keeps_low_rank, also the low-rank rows scale * x A^T [T, G r], for the backward."""
    if is_few(x) and bias is not None and not keeps_low_rank:
        return decode_linear(x, weight, bias, adapter), None
    bias = None if bias is None else bias[None]
    if adapter is None:
        return grouped_gemm(x, weight.T[None], None, bias=bias), None
    low_rank = grouped_gemm(x, adapter.A.T[None], None, scale=adapter.scale)
    return grouped_gemm(x, weight.T[None], None, bias=bias, low_rank=low_rank, lora_up=adapter.B.T[None],
                        lora_groups=adapter.groups), low_rank


class LinearModule(Protocol):
    """A projection of a model, with weight [N, K], bias [N] and its LoRA."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter
    lora_A: torch.nn.Parameter | None  # [r, K] fp32
    lora_B: torch.nn.Parameter | None  # [N, r] fp32
    lora_scale: float
    low_rank_ready: torch.Tensor | None  # Adapter.ready

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def has_adapter(self) -> bool: ...

    def trains_base(self) -> bool: ...


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensors joined along their rows, without gradient: a view if they are adjacent in memory, else a copy."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or not tensor.is_contiguous():
            return torch.cat(tensors).detach()
        end += tensor.nbytes
    if len(tensors) == 1:
        return first.detach()
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():  # memory of others that happens to follow
        return torch.cat(tensors).detach()
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride(), first.storage_offset())


@cache
def _columns(sizes: tuple[int, ...], has_adapter: tuple[bool, ...],
             device: torch.device) -> tuple[torch.Tensor | None, list[slice]]:
    """Adapter.groups and Adapter.columns of projections side by side."""
    ends = [sum(sizes[:i + 1]) for i in range(len(sizes))]
    columns = [slice(end - size, end) for size, end, has in zip(sizes, ends, has_adapter) if has]
    if len(sizes) == 1:
        return None, columns
    numbers = [sum(has_adapter[:i]) if has else -1 for i, has in enumerate(has_adapter)]
    return torch.tensor(numbers, dtype=torch.int32).repeat_interleave(torch.tensor(sizes)).to(device), columns


def adapter_of(modules: list[LinearModule]) -> Adapter | None:
    """The adapter of projections side by side, None without an enabled one. Raises ValueError if ranks or scales differ."""
    carriers = [module for module in modules if module.has_adapter()]
    if not carriers:
        return None
    kinds = {(module.lora_A.shape[0], module.lora_scale) for module in carriers}
    if len(kinds) > 1:
        raise ValueError(f"adapters on q_proj, k_proj and v_proj of a layer differ in rank and scale ({sorted(kinds)}); on a GPU "
                         "they must agree")  # no other projections are joined
    first, sizes = carriers[0], tuple(len(module.weight) for module in modules)
    groups, columns = _columns(sizes, tuple(module.has_adapter() for module in modules), first.lora_A.device)
    if len(carriers) == len(modules):
        B = joined([module.lora_B for module in carriers])
    else:
        B = torch.empty(sum(sizes), first.lora_A.shape[0], dtype=first.lora_B.dtype, device=first.lora_A.device)
        for module, part in zip(carriers, columns):
            B[part] = module.lora_B
    return Adapter(joined([module.lora_A for module in carriers]), B, groups, columns, first.lora_scale, first.low_rank_ready)


def linear(modules: list[LinearModule], x: torch.Tensor, *, keeps_low_rank: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The outputs [T, sum of out] of projections of x [T, in], side by side; and, on a GPU with keeps_low_rank, the low-rank rows
    [T, G r] that linear_backward needs."""
    if not is_triton(x):
        return torch.cat([module(x) for module in modules], 1) if len(modules) > 1 else modules[0](x), None
    weight, bias = (joined([getattr(module, name) for module in modules]) for name in ("weight", "bias"))
    return project(x, weight, bias, adapter_of(modules), keeps_low_rank=keeps_low_rank)


def adapter_backward(modules: list[LinearModule], adapter: Adapter, grad: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor,
                     grads: Gradients) -> torch.Tensor:
    """Returns the gradient of x A^T [T, G r]; puts those of A and B into `grads`. grad [T, N]: of the product's output."""
    parts = [grouped_gemm(grad[:, columns], adapter.B[columns][None], None, scale=adapter.scale) for columns in adapter.columns]
    low_rank_grad = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    grad_A, rank = torch.empty_like(adapter.A), adapter.B.shape[1]
    grouped_outer(x, low_rank_grad, None, grad_A.T[None])
    carriers = [module for module in modules if module.has_adapter()]
    for module, columns, own_A, own_low_rank in zip(carriers, adapter.columns, grad_A.split(rank), low_rank.split(rank, 1)):
        grad_B = torch.empty_like(adapter.B[columns])
        grouped_outer(grad[:, columns], own_low_rank, None, grad_B[None])
        grads |= {module.lora_A: own_A, module.lora_B: grad_B}
    return low_rank_grad


def linear_backward(modules: list[LinearModule], grad: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor | None,
                    grads: Gradients, *, needs_x: bool) -> torch.Tensor | None:
    """Returns the gradient of x [T, K] if needs_x; puts those of trainable parameters into `grads`. grad [T, N]: of outputs."""
    adapter, low_rank_grad, grad_x = adapter_of(modules), None, None
    if adapter is not None:
        low_rank_grad = adapter_backward(modules, adapter, grad, x, low_rank, grads)
    if needs_x:
        weight, lora_up = joined([module.weight for module in modules]), None if adapter is None else adapter.A[None]
        grad_x = grouped_gemm(grad, weight[None], None, low_rank=low_rank_grad, lora_up=lora_up)
    if any(module.trains_base() for module in modules):
        sizes = [len(module.weight) for module in modules]
        for module, weight, bias in zip(modules, (grad.T @ x).split(sizes), grad.sum(0).split(sizes)):
            grads |= {module.weight: weight, module.bias: bias}
    return grad_x
