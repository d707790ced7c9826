"""The rollout benchmark at tiny sizes on the CPU: each case goes through and gives its keys."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from paths import FIXTURES, ROOT

FOLDER = FIXTURES / "tiny_mxfp4"


@pytest.fixture
def policy(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from random_policy import load_policy

    return load_policy(FOLDER, lora="all", rank=2, device="cpu", dtype=torch.float32)


def test_the_same_completions_come_alone_and_in_any_batch_with_the_trainers_log_probs(policy):
    from bench_rollout import exact_case

    found = exact_case(policy, num_prompts=8, prompt_lens=(3, 30), max_new_tokens=16, max_batch=3, large_batch=12,
                       shares_prompts=True)
    assert found["max_log_prob_diff"] == found["num_differing"] == found["route_flips"] == 0
    assert found["recorded_same_tokens"] and found["alone_same_bits"] and found["large_batch_same_bits"]
    assert found["preempted_same_bits"]
    assert found["alone"] == 3 and 1 <= found["min_len"] < found["max_len"] <= 16 and 8 < found["tokens"] <= 128
    # every layer and slot of every token but the last of each completion; a prompt counts once
    assert found["routes"] % (policy.config.num_hidden_layers * policy.config.num_experts_per_tok) == 0 < found["routes"]


def test_another_trainer_is_seen(policy, monkeypatch):
    import bench_rollout
    from random_policy import random_prompts

    original = bench_rollout.micro_log_probs
    monkeypatch.setattr(bench_rollout, "micro_log_probs", lambda *arguments: original(*arguments) - 0.5)
    sampler = bench_rollout.Sampler(policy, [], max_batch=4, seed=0)
    completions = sampler.generate(random_prompts(policy, [5, 9], seed=0),
                                   bench_rollout.SamplingParams(max_new_tokens=3), step=0, num_samples=2)
    found = bench_rollout.compare_log_probs(policy, completions, shares_prompts=True)
    assert found == {"max_log_prob_diff": pytest.approx(0.5, abs=1e-5), "num_differing": 12, "tokens": 12}


def test_prompts_longer_than_a_micro_batch_are_compared(policy, monkeypatch):
    import bench_rollout
    from random_policy import random_prompts

    monkeypatch.setattr(bench_rollout, "MICRO_TOKENS", 8)
    monkeypatch.setattr(bench_rollout, "training_gb", lambda: 1.5)
    sampler = bench_rollout.Sampler(policy, [], max_batch=2, seed=0)
    completions = sampler.generate(random_prompts(policy, [12, 20], seed=0),
                                   bench_rollout.SamplingParams(max_new_tokens=3), step=0, num_samples=1)
    found = bench_rollout.compare_log_probs(policy, completions, shares_prompts=False)
    assert found["tokens"] == 6 and found["max_log_prob_diff"] < 1e-5
    assert policy.memory.recomputes and policy.memory.memory_gb == 1.5  # a long sequence's activations need not all fit


def test_prompts_longer_than_a_prefill_are_decoded_together(policy, monkeypatch):
    import bench_rollout

    for name, value in {"MICRO_TOKENS": 8, "SHORT": 2, "LONG": 6, "COMPARED_TOKENS": 40}.items():
        monkeypatch.setattr(bench_rollout, name, value)
    seconds = [0.0] * 3 + [9.0, 9.0, 0.5, 0.25, 0.25]  # three prefills and five steps, two of which are left out
    times = chain.from_iterable((0.0, value) for value in seconds)
    monkeypatch.setattr(bench_rollout, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    found = bench_rollout.decode_case(policy, 3, 12, bench_rollout.Ceilings(1.0, 1.0))
    assert found["tokens_per_s"] == 12 and found["ms_per_step"] == 250  # three rows
    assert found["compared"] == 2 and found["max_log_prob_diff"] < 1e-5  # of 18 tokens each
    assert next(times, None) is None


def test_rows_that_wait_for_others_are_not_timed(policy):
    import bench_rollout
    from random_policy import random_prompts

    sampler = bench_rollout.make_sampler(policy, 1, 20)
    with pytest.raises(ValueError, match="2 rows are not decoded together"):
        bench_rollout.time_decoding(sampler, random_prompts(policy, [4, 4], seed=0))


def test_a_step_is_timed_in_its_phases(policy):
    from bench_rollout import grpo_step_case

    before = {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}
    found = grpo_step_case(policy, prompts=2, group=2, prompt_len=9, length=6, micro_tokens=40, memory_gb=None)
    phases = [found[name] for name in ("prefill_s", "decode_s", "handover_s", "forward_backward_s", "optimizer_s")]
    assert min(phases) >= 0 and sum(phases) == pytest.approx(found["seconds"], abs=0.005)
    assert found["max_log_prob_diff"] < 1e-5 and found["rollout_tokens_per_s"] > 0
    assert any(not parameter.equal(before[name]) for name, parameter in policy.trainable_parameters().items())
    assert "prefill" not in vars(policy)


def test_memory_is_measured_over_steps_of_mixed_lengths(policy):
    from bench_rollout import memory_case

    found = memory_case(policy, group=2, prompt_len=9, length=6, num_steps=4, short_lens=(2, 8))
    assert found["steps"] == 4
    assert [value for name, value in found.items() if name.endswith("_gb")] == [0.0] * 9  # without a GPU


def test_requests_through_a_small_cache_are_those_of_a_large_one(policy):
    from bench_rollout import requests_case

    found = requests_case(policy, num_requests=12, max_new_tokens=70, prompt_lens=(2, 9), max_batch=12, share=0.5)
    assert found["requests"] == found["finished"] == found["different"] == 12 and found["same_tokens"]
    assert 1 <= found["min_new"] < found["max_new"] <= 70
    assert 0 < found["cache_used_gb"] <= found["cache_gb"]


def test_the_cache_of_sequences_by_hand(policy):
    from bench_rollout import cache_gb_of

    # layers 0 and 2 keep 8 of 20 tokens, 1 and 3 all; 2 heads of 32, keys and values, 4 bytes
    assert policy.config.sliding_window == 8
    assert cache_gb_of(policy.config, [20, 5], bytes_per_number=4) * 1e9 == 2 * 2 * 32 * 4 * (2 * (8 + 20) + 4 * 5)


def test_start_up_counts_from_the_start_of_the_process(policy):
    from bench_rollout import process_seconds, start_up_case

    imports = process_seconds()
    assert 0 < imports < 3600
    found = start_up_case(FOLDER, lora="all", imports_s=2.0, group=2, prompt_len=5, length=4, device="cpu", dtype=torch.float32)
    parts = found["imports_s"] + found["load_s"] + found["first_rollout_s"] + found["first_update_s"]
    assert found["seconds"] == pytest.approx(parts, abs=0.03) and found["kernel_cache"] in ("warm", "cold")


def test_lengths_and_stop_ids_are_spread_as_asked(policy):
    from bench_rollout import random_lengths, random_stop_ids

    lengths = random_lengths(400, 16, 1500, seed=2)
    assert 16 <= min(lengths) < 20 and 1200 < max(lengths) <= 1500
    assert sum(length < 155 for length in lengths) == pytest.approx(200, abs=40)  # the geometric mean
    assert len(set(random_stop_ids(policy, 40.0))) == round(policy.config.vocab_size / 40)


@pytest.mark.parametrize("batch, milliseconds", [(1, 0.87), (8, 2.17), (32, 3.11), (128, 3.77), (512, 8.0)])
def test_the_roofline_of_a_decode_step_is_that_of_a_count_by_hand(monkeypatch, batch, milliseconds):
    """gpt-oss-20b at 1,024 tokens, 4.3 TB/s and 790 TFLOP/s: experts 13.22 MB each, 2.44 GB of everything else, 24.6 KB a token
    and 3.15 MB of rings a sequence; at 512 rows products set the pace."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench_rollout import decode_stages, least_seconds
    from random_checkpoint import model_config
    from timing import Ceilings

    stages = decode_stages(model_config("20b"), batch, 1024)
    assert 1e3 * least_seconds(stages, Ceilings(tflops=790, gb_per_s=4300)) == pytest.approx(milliseconds, rel=0.02)
