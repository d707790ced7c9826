"""The experts that tokens went to: recorded while sampling, replayed in training ("R3", arXiv 2510.11370).

If sampler and trainer round differently, the router may decide a near tie differently, and a token then runs through other
weights. A replay sends it through the recorded experts; the trainer's router computes their gate weights, and so keeps its
gradient. Departure from the paper: a token without a record (the last of a completion, never fed to the sampler) is routed by
the trainer and not left out of the loss; its log-prob depends only on the tokens before it.

The layers (models/block.py) call `choose` of either class for the experts to take.

Shapes: T tokens, n of them at a time, L layers, A experts per token, E experts.
"""
import torch

from kernels.experts.sorting import choose_experts
from models.config import GptOssConfig


def empty_routing(num_tokens: int, config: GptOssConfig, device: torch.device | str) -> torch.Tensor:
    """[num_tokens, L, A] with no record yet; uint8 if there are few enough experts, else int16."""
    dtype = torch.uint8 if config.num_local_experts <= torch.iinfo(torch.uint8).max else torch.int16
    shape = (num_tokens, config.num_hidden_layers, config.num_experts_per_tok)
    return torch.full(shape, no_record(dtype), dtype=dtype, device=device)


def zero_routing(num_tokens: int, config: GptOssConfig, device: torch.device | str) -> torch.Tensor:
    """[num_tokens, L, A] of zeros, to be filled."""
    return torch.zeros_like(empty_routing(num_tokens, config, device))


def no_record(dtype: torch.dtype) -> int:
    """The number that means "not recorded": the largest, which no expert has."""
    return torch.iinfo(dtype).max


class RoutingRecord:
    """Fills `indices` [T, L, A] with the choices of one prefill or decode step."""

    def __init__(self, num_tokens: int, config: GptOssConfig, device: torch.device | str) -> None:
        self.indices = empty_routing(num_tokens, config, device)

    def choose(self, layer: int, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """The experts [n, A] int64 of a layer, for the router's logits [n, E] fp32 of the tokens `rows`."""
        own = choose_experts(logits, experts_per_token=self.indices.shape[2])
        self.indices[rows, layer] = own.to(self.indices.dtype)
        return own


class RoutingReplay:
    """Replays `recorded` [T, L, A] in one forward and the backward's repetition of it."""

    def __init__(self, recorded: torch.Tensor) -> None:
        self.recorded = recorded
        # recorded choices (token, layer, k-th expert): all of them, and those that the trainer's router would not have made
        self.num_choices = torch.zeros((), dtype=torch.int64, device=recorded.device)
        self.num_flips = torch.zeros_like(self.num_choices)
        self._chosen: dict[tuple[int, int], torch.Tensor] = {}  # by layer and first token

    def choose(self, layer: int, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """The experts [n, A] int64 of a layer for the tokens `rows`: the recorded ones, and the trainer's own for tokens without
        a record. A second call, when the backward computes the layer again, returns the same."""
        if (layer, rows.start) in self._chosen:
            return self._chosen[layer, rows.start].long()
        recorded = self.recorded[rows, layer]
        is_recorded = recorded[:, :1] != no_record(recorded.dtype)  # [T, 1]
        own = choose_experts(logits, experts_per_token=recorded.shape[1])
        is_flip = is_recorded & (own.unsqueeze(2) != recorded.unsqueeze(1)).all(2)  # [T, A], as sets
        self.num_choices += is_recorded.sum() * recorded.shape[1]
        self.num_flips += is_flip.sum()
        chosen = torch.where(is_recorded, recorded.long(), own)
        self._chosen[layer, rows.start] = chosen.to(recorded.dtype)
        return chosen
