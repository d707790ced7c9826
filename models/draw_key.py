"""The key of a draw, what its noise depends on beside the vocabulary id, and that noise.

Columns: seed, step, prompt id, sample, and the position of the drawn token in its sequence, where the prompt's first token is
position 0. How keys and ids are mixed is said in kernels/head/sampling.py.
"""
import torch

from kernels.head import sampling

POSITION = 4  # column


def mix_keys(keys: torch.Tensor) -> torch.Tensor:
    """The RNG keys [B, 2] int32 that a draw takes, of keys [B, 5] int64."""
    assert keys.shape[1] == POSITION + 1, keys.shape
    return sampling.as_pairs(sampling.mix_sums(sampling.key_sums(keys)))


def gumbel_noise(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, a pure function of (key, vocabulary id): [B, V] fp32 for keys [B, 5] int64."""
    return sampling.gumbel_noise_reference(mix_keys(keys), vocab_size)
