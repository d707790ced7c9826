"""A small model's rollouts and schedules, for the tests of who runs when."""

import random

import pytest
import torch

from grpo.batch import Prompt
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.schedule import Group, Request, Schedule
from grpo.rollout.session import Sampler
from models.config import GptOssConfig
from models.kv_cache import KVCache, page_bytes, slot_bytes

VOCAB, WINDOW, MAX_LEN = 40, 8, 512


def make_config(window=WINDOW) -> GptOssConfig:
    return GptOssConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=window,
                        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=MAX_LEN)


def make_prompts(lengths: list[int]) -> list[Prompt]:
    rng = random.Random(0)
    return [Prompt(i, [rng.randrange(VOCAB) for _ in range(length)], {}) for i, length in enumerate(lengths)]


def gigabytes(num_rows: int, num_pages: int) -> float:
    """`cache_gb` for so many rows (and the spare slot) and pages."""
    config = make_config()
    size = (num_rows + 1) * slot_bytes(config, torch.float32, max_len=MAX_LEN) + num_pages * page_bytes(config, torch.float32)
    return size / 1e9


def sample(model, prompts, *, cache_gb=None, max_batch=64, max_prefill_tokens=16384, shares_prompts=False, look_steps=1,
           stop_ids=(), num_samples=1, max_new_tokens=12, **settings):
    sampler = Sampler(model, stop_ids, max_batch=max_batch, seed=7, shares_prompts=shares_prompts, cache_gb=cache_gb,
                      max_prefill_tokens=max_prefill_tokens)
    sampler.look_steps = look_steps
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=max_new_tokens, **settings), step=3,
                                   num_samples=num_samples)
    return completions, sampler.last_stats


def assert_equal(actual, expected) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.prompt.id, ours.sample, ours.finish_reason) == (theirs.prompt.id, theirs.sample, theirs.finish_reason)
        for segment, other in zip(ours.segments, theirs.segments, strict=True):
            assert (segment.source, segment.token_ids) == (other.source, other.token_ids)
            assert (segment.kept_ids is None) == (other.kept_ids is None)
            assert segment.kept_ids is None or all(map(torch.equal, segment.kept_ids, other.kept_ids))
            # a CPU's products may round by the number of rows
            assert segment.log_probs == (other.log_probs and pytest.approx(other.log_probs, abs=1e-5))
            assert (segment.routing is None) == (other.routing is None)
            assert segment.routing is None or torch.equal(segment.routing, other.routing)


def make_schedule(lengths: list[int], *, num_rows: int, num_pages: int, limit=100, width=1) -> Schedule:
    groups = []
    for index, length in enumerate(lengths):
        requests = [Request(index * width + i, index, length, limit, 0) for i in range(width)]
        groups.append(Group(index, length, requests))
    cache = KVCache(make_config(), num_slots=num_rows + 1, max_len=MAX_LEN, num_pages=num_pages, device=torch.device("cpu"),
                    dtype=torch.float32)
    return Schedule(groups, cache, num_rows=num_rows)


def items(requests) -> list[int]:
    return [request.item for request in requests]
