"""Which channel a token belongs to, and the means over each."""

import math

import pytest
import torch
from harmony import encode_with_special
from paths import FIXTURES

from grpo.channels import NO_CHANNEL, channel_metrics, channel_stats, channels_of
from grpo.losses import reduce_stats
from models.chat.tokenizer import Tokenizer

ANALYSIS, COMMENTARY, FINAL = range(3)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(FIXTURES / "tokenizer_compact")


def labelled(tokenizer, *texts):
    parts = [encode_with_special(tokenizer, text) for text in texts]
    lengths = torch.tensor([0, *map(len, parts)])
    return channels_of(torch.tensor(sum(parts, [])), lengths.cumsum(0), tokenizer).split(lengths[1:].tolist())


def test_a_message_has_its_channel_from_its_header_to_its_close(tokenizer):
    messages = ["<|start|>assistant", "<|channel|>analysis<|message|>so<|end|>", "<|start|>assistant to=functions.f",
                "<|channel|>commentary json<|message|>{}<|call|>", "<|start|>assistant", "<|channel|>final<|message|>4<|return|>"]
    found, = labelled(tokenizer, "".join(messages))
    lengths = [len(encode_with_special(tokenizer, message)) for message in messages]
    wanted = [NO_CHANNEL, ANALYSIS, NO_CHANNEL, COMMENTARY, NO_CHANNEL, FINAL]
    assert found.tolist() == [channel for channel, length in zip(wanted, lengths) for _ in range(length)]


def test_a_channel_ends_with_its_sequence_and_an_unknown_one_is_none(tokenizer):
    cut, plain, unknown = labelled(tokenizer, "<|channel|>final<|message|>4", "4", "<|channel|>fin<|message|>4")
    assert set(cut.tolist()) == {FINAL} and set(plain.tolist()) == set(unknown.tolist()) == {NO_CHANNEL}


def test_means_are_over_the_trained_tokens_of_a_channel():
    channels = torch.tensor([ANALYSIS, ANALYSIS, ANALYSIS, FINAL, NO_CHANNEL], dtype=torch.uint8)
    entropy, mask = torch.tensor([1.0, 2.0, math.nan, 0.5, 9.0]), torch.tensor([True, True, False, True, True])
    stats = [{**channel_stats(entropy, mask, channels), "num_tokens": mask.sum()},
             {**channel_stats(entropy[:1], mask[:1], channels[:1]), "num_tokens": mask[:1].sum()}]
    metrics = channel_metrics(reduce_stats(stats, num_updates=1), num_tokens=5, num_completions=2)
    assert metrics == pytest.approx({"channels/analysis/length": 1.5, "channels/analysis/entropy": 4 / 3,
                                     "channels/commentary/length": 0.0, "channels/final/length": 0.5,
                                     "channels/final/entropy": 0.5})
