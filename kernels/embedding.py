"""Rows of the input embedding, which may be in pinned host memory: y_t = W[token_t].

Only a few rows of a frozen embedding are read at a time, so it need not take GPU memory (1.16 GB in gpt-oss): the kernel reads
pinned host memory over the bus, at 51 GB/s on an H200's PCIe 5.

Shapes: T tokens, V vocabulary, D model width.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.device import launch, next_power_of_2


@triton.jit
def _gather_kernel(tokens_ptr, weight_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row)
    cols = tl.arange(0, BLOCK)
    mask = cols < WIDTH
    tl.store(out_ptr + row * WIDTH + cols, tl.load(weight_ptr + token * WIDTH + cols, mask=mask, other=0.0), mask=mask)


def gather_rows(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The rows weight[tokens] [T, D] on the tokens' device; weight [V, D] contiguous, on it or in pinned host memory. Triton
    only, no gradient; a token outside the vocabulary reads memory that is not the embedding's."""
    num_tokens, width = len(tokens), weight.shape[1]
    out = torch.empty((num_tokens, width), dtype=weight.dtype, device=tokens.device)
    if num_tokens:
        launch(_gather_kernel, (num_tokens,), tokens.contiguous(), weight, out, WIDTH=width, BLOCK=next_power_of_2(width),
               num_warps=4)
    return out


def embedding(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """tokens [T] int64, weight [V, D] -> [T, D] on the tokens' device. The weight is on that device, and may train, or it is
    frozen in pinned host memory."""
    if weight.device == tokens.device:
        return F.embedding(tokens, weight)
    assert weight.is_pinned() and not weight.requires_grad, f"embedding on {weight.device}, tokens on {tokens.device}"
    return gather_rows(tokens, weight.detach())
