"""Dense projection on the vendor's library: y = x W^T + b, rounded alike however few rows there are."""
import torch
import torch.nn.functional as F

# for fewer rows, BLAS libraries choose kernels that sum in another order: a token would depend on how many run beside it
_MIN_ROWS = 8


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, in] times weight [out, in] plus bias [out] or none -> [T, out], rounded in the same way for any small T."""
    num_rows = x.shape[0]
    if num_rows >= _MIN_ROWS:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, _MIN_ROWS - num_rows)), weight, bias)[:num_rows]
