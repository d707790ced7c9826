"""Copies the weights of the experts that have rows from pinned host memory: y_e = W_e where offsets_e < offsets_(e + 1).

Few rows touch few experts: 8 rows of gpt-oss-120b about 29 of 128. The kernel reads host memory over the bus, as embedding.py.

Shapes: E experts.
"""
import torch
import triton
import triton.language as tl

from kernels.device import cdiv, launch

_PROGRAMS, _BLOCK = 32, 4096  # programs of an expert, and words that each copies at once


@triton.jit
def _fetch_kernel(source, target, offsets, num_words, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    if tl.load(offsets + expert) < tl.load(offsets + expert + 1):
        start = expert.to(tl.int64) * num_words
        for first in range(tl.program_id(1) * BLOCK, num_words, PROGRAMS * BLOCK):
            words = first + tl.arange(0, BLOCK)
            mask = words < num_words
            tl.store(target + start + words, tl.load(source + start + words, mask=mask, other=0), mask=mask)


def fetch_routed(source: torch.Tensor, target: torch.Tensor, offsets: torch.Tensor) -> None:
    """Copies source [E, ...] to target [E, ...], both contiguous, of experts that have rows; others' part of target stays as it
    is. source: in pinned host memory, a whole number of 32-bit words per expert; offsets [E + 1]: of the experts' rows, with
    target on the GPU. Triton only."""
    num_words, rest = divmod(source[0].nbytes, 4)
    assert rest == 0 and source.is_contiguous() and target.is_contiguous(), (source.shape, source.stride(), target.stride())
    programs = min(_PROGRAMS, cdiv(num_words, _BLOCK))
    launch(_fetch_kernel, (len(source), programs), source.view(-1).view(torch.int32), target.view(-1).view(torch.int32), offsets,
           num_words, PROGRAMS=programs, BLOCK=_BLOCK, num_warps=8)
