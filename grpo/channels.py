"""Lengths and entropies by harmony's channels: how much the policy reasons, calls and answers, and how sure it is of each.

A token's channel is that of the message it belongs to, from <|channel|> to the token that closes it; headers before <|channel|>
have none. Shapes: T packed tokens.
"""
import torch

from models.chat.render import CHANNELS
from models.chat.tokenizer import Tokenizer

NO_CHANNEL = len(CHANNELS)


def channels_of(tokens: torch.Tensor, cu_seqlens: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """[T] uint8 on the host: the index in CHANNELS of each token's channel, else NO_CHANNEL. tokens: [T] int64, cu_seqlens:
    [S + 1], both on the host."""
    num = len(tokens)
    marks = torch.full((num,), -1)  # at the first token of a stretch: its channel
    marks[cu_seqlens[:-1][cu_seqlens.diff() > 0].long()] = NO_CHANNEL
    closes = (tokens == tokenizer.end) | (tokens == tokenizer.call) | (tokens == tokenizer.return_) | (tokens == tokenizer.start)
    after = closes.nonzero().flatten() + 1
    marks[after[after < num]] = NO_CHANNEL
    opens = (tokens == tokenizer.channel).nonzero().flatten()
    marks[opens] = NO_CHANNEL  # a channel that there is not
    for index, name in enumerate(CHANNELS):
        found = opens
        for offset, token in enumerate(tokenizer.encode(name), start=1):
            found = found[found + offset < num]
            found = found[tokens[found + offset] == token]
        marks[found] = index
    starts = torch.where(marks >= 0, torch.arange(num), 0).cummax(0).values
    return marks[starts].clamp(min=0).to(torch.uint8)


def channel_stats(entropy: torch.Tensor, mask: torch.Tensor, channels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over the trained tokens for `reduce_stats`: how many are in each channel, and their entropies in nats. entropy: [T]
    fp32; mask: [T] bool; channels: [T] uint8."""
    stats = {}
    for index, name in enumerate(CHANNELS):
        inside = mask & (channels == index)
        stats |= {f"channels/{name}/length": inside.sum(),
                  f"channels/{name}/entropy": torch.where(inside, entropy.detach(), 0.0).sum()}
    return stats


def channel_metrics(means: dict[str, float], *, num_tokens: int, num_completions: int) -> dict[str, float]:
    """Of the sums of `channel_stats` divided by the number of trained tokens, as reduce_stats gives them: the mean tokens of a
    completion in each channel, and the mean entropy of those tokens, where there are any."""
    metrics = {}
    for name in CHANNELS:
        share = means[f"channels/{name}/length"]
        metrics[f"channels/{name}/length"] = share * num_tokens / num_completions
        if share:
            metrics[f"channels/{name}/entropy"] = means[f"channels/{name}/entropy"] / share
    return metrics
