"""A small model's rollouts and schedulers, for the tests of who runs when."""

import random

import pytest
import torch

from grpo.batch import Prompt
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.scheduler import Group, RolloutRow, Scheduler
from grpo.rollout.session import Sampler
from models.config import GptOssConfig
from models.gpt_oss import GptOss
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


def sample(model, prompts, *, cache_gb=None, max_batch=64, max_prefill_tokens=16384, shares_prompts=False, sync_steps=1,
           stop_ids=(), num_samples=1, max_new_tokens=12, **settings):
    sampler = Sampler(model, stop_ids, max_batch=max_batch, seed=7, shares_prompts=shares_prompts, cache_gb=cache_gb,
                      max_prefill_tokens=max_prefill_tokens)
    sampler.sync_steps = sync_steps
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


def make_rows(lengths_and_limits: list[tuple[int, int]], *, width=1) -> list[RolloutRow]:
    return [RolloutRow(index * width + i, index, Prompt(index, [1] * length, {}), i, 0, limit)
            for index, (length, limit) in enumerate(lengths_and_limits) for i in range(width)]


def make_scheduler(lengths: list[int], *, num_rows: int, num_pages: int, limit=100, width=1) -> Scheduler:
    """Groups of prompts of these lengths, in the order of admission."""
    rows = make_rows([(length, limit) for length in lengths], width=width)
    cache = KVCache(make_config(), num_slots=num_rows + 1, max_len=MAX_LEN, num_pages=num_pages, device=torch.device("cpu"),
                    dtype=torch.float32)
    scheduler = Scheduler(cache, num_rows=num_rows)
    for index, length in enumerate(lengths):
        scheduler.add([Group(length, rows[index * width:(index + 1) * width])])
    return scheduler


def indices(rows) -> list[int]:
    return [row.index for row in rows]


def reply_to(completion) -> list[int]:
    """What an environment answers: 1 to 30 tokens, that depend on the row and on how often it was answered."""
    rng = random.Random(f"{completion.prompt.id} {completion.sample} {len(completion.segments)}")
    return [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 12, 30]))]


def converse(model, prompts, *, park_ids=(5, 6, 7), delay=0, reply=reply_to, max_batch=64, max_prefill_tokens=16384,
             shares_prompts=False, cache_gb=None, sync_steps=1, stop_ids=(3,), num_samples=1, max_new_tokens=120, **settings):
    """Completions whose rows park, and are answered `delay` model calls later, or when nothing else runs; and the statistics."""
    sampler = Sampler(model, stop_ids, max_batch=max_batch, seed=7, shares_prompts=shares_prompts, cache_gb=cache_gb,
                      max_prefill_tokens=max_prefill_tokens)
    sampler.sync_steps = sync_steps
    params, parked, num_calls = SamplingParams(max_new_tokens=max_new_tokens, park_ids=park_ids, **settings), [], 0
    with sampler.open(params, step=3) as session:
        session.submit(prompts, num_samples)
        while session.is_running or parked:
            parked += [(num_calls + delay, row) for row in session.poll() if row.is_parked]
            due = [row for when, row in parked if when <= num_calls or not session.is_running]
            parked = [(when, row) for when, row in parked if row not in due]
            for row in due:
                answer = reply(session.completion(row))
                if len(answer) <= row.room:
                    session.continue_with(row, answer)
                else:
                    session.finish(row, "length")
            num_calls += 1
        return session.drain(), session.stats


def spied_calls(monkeypatch) -> list[tuple[str, int]]:
    """From now on, each call of the model: its method and the number of its tokens."""
    calls = []

    def spy_on(name):
        function = getattr(GptOss, name)

        def spy(self, tokens, *arguments, **settings):
            calls.append((name, len(tokens)))
            return function(self, tokens, *arguments, **settings)

        monkeypatch.setattr(GptOss, name, spy)

    for name in ("prefill", "decode"):
        spy_on(name)
    return calls
