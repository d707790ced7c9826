"""Products by the vendor's library: dense projections y = x W^T + b, which round in the same way for any number of rows, and
products that return their fp32 sums."""
import torch
import torch.nn.functional as F

# for fewer rows (on some CPUs up to 15) BLAS libraries choose kernels that sum in another order: a token's bits would depend on
# the number of rows
_MIN_ROWS = 16


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, in] times weight [out, in] plus bias [out] or none -> [T, out], rounded in the same way for any small T."""
    num_rows = x.shape[0]
    if num_rows >= _MIN_ROWS:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, _MIN_ROWS - num_rows)), weight, bias)[:num_rows]


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of two matrices, or of two batches of them, of one dtype: summed and returned in fp32.

    So sums neither overflow nor are partly added in half precision (PyTorch's allow_fp16_reduced_precision_reduction). Round the
    result once, after everything has been added."""
    assert a.dtype == b.dtype and a.dim() == b.dim(), (a.dtype, b.dtype, a.shape, b.shape)
    if a.is_cuda and a.dtype != torch.float32:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
