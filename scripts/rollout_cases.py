"""What scripts/bench_rollout.py measures beside steady decoding: bit equality, whole steps, memory, many requests, start-up.

Every function takes its sizes, so that a dry run on the CPU goes the same way as a measurement, and returns the keys of its JSON
line.
"""
from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from random_policy import load_policy, num_tokens, random_prompts, set_memory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.batch import Completion, Prompt, RolloutBatch, Segment, micro_batches, pack  # noqa: E402
from grpo.optim import LearningRate, Optimizer  # noqa: E402
from grpo.rollout.sampling import SamplingParams  # noqa: E402
from grpo.rollout.session import Sampler  # noqa: E402
from grpo.update import routing_metrics  # noqa: E402
from models.config import GptOssConfig  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402
from models.kv_cache import PAGE_TOKENS, KVCache  # noqa: E402
from models.routing_record import RoutingReplay  # noqa: E402

MICRO_TOKENS = 16_384  # in a micro-batch; one longer sequence goes alone
TRAINING_SHARE = 0.85  # of a GPU's memory


def random_lengths(count: int, low: int, high: int, *, seed: int) -> list[int]:
    """Uniform in the logarithm: many short ones, some long."""
    draw = random.Random(seed)
    return [round(low * (high / low) ** draw.random()) for _ in range(count)]


def random_stop_ids(policy: GptOss, mean_len: float, *, seed: int) -> list[int]:
    """So many ids that a policy that draws about uniformly, as one of random weights does, ends after mean_len tokens or so."""
    vocab = num_tokens(policy)
    return random.Random(seed).sample(range(vocab), max(1, round(vocab / mean_len)))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function):
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return result, time.perf_counter() - start


def micro_log_probs(policy: GptOss, micro: RolloutBatch, routing: RoutingReplay | None = None) -> torch.Tensor:
    """[T], by the forward that trains."""
    return policy.log_probs(micro.tokens, micro.cu_seqlens, temperature=1.0, mask=micro.host_mask, prefixes=micro.prefixes,
                            routing=routing)[0]


def compare_log_probs(policy: GptOss, completions: list[Completion], *, shares_prompts: bool,
                      replays: bool = False) -> dict[str, float]:
    """The sampler's log-probs against the trainer's; with replays, of completions that recorded their routing. The trainer keeps
    what fits into the GPU, however long the sequences are."""
    set_memory(policy, training_gb())
    batch = pack(completions, [0.0] * len(completions)).to(policy.device)
    worst, num_differing, routings = 0.0, 0, []
    longest = max(completion.num_tokens for completion in completions)
    for micro in micro_batches(batch, max(MICRO_TOKENS, longest), share_prompts=shares_prompts):
        routings += [RoutingReplay(micro.routing)] if replays else []
        log_probs = micro_log_probs(policy, micro, routings[-1] if replays else None).detach()
        difference = (log_probs - micro.sampler_log_probs)[micro.loss_mask].abs()
        worst, num_differing = max(worst, difference.max().item()), num_differing + int((difference != 0).sum())
    found = {"max_log_prob_diff": worst, "num_differing": num_differing, "tokens": batch.num_policy_tokens}
    if replays:
        found |= {"route_flips": routing_metrics(routings)["routing/flips"],
                  "routes": sum(int(routing.num_choices) for routing in routings)}
    return found


def training_gb() -> float | None:
    """What training may take, in 1e9 bytes; without a GPU there is no bound."""
    return TRAINING_SHARE * torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else None


def drawn(completion: Completion) -> tuple[list[int], list[float] | None]:
    return completion.completion_ids, completion.segments[1].log_probs


def exact_case(policy: GptOss, *, count: int = 64, prompt_lens: tuple[int, int] = (16, 1500), max_new_tokens: int = 1024,
               max_batch: int = 24, large_batch: int = 128, num_alone: int = 3, num_recorded: int = 16,
               recorded_tokens: int = 128, shares_prompts: bool) -> dict:
    """Completions of random lengths through fewer rows: log-probs and routes against the trainer's, then some of them alone, all
    of them among large_batch, and all of them through a cache that holds a third of the longest rows, so that rows are preempted
    and resume."""
    stop_ids = random_stop_ids(policy, 0.4 * max_new_tokens, seed=1)
    prompts = random_prompts(policy, random_lengths(large_batch, *prompt_lens, seed=2), seed=3)

    def sample(some: list[Prompt], rows: int, *, num_tokens: int = max_new_tokens, records: bool = False,
               cache_gb: float | None = None) -> list[Completion]:
        nonlocal num_preemptions
        sampler = Sampler(policy, stop_ids, max_batch=rows, seed=0, max_len=prompt_lens[1] + max_new_tokens,
                          shares_prompts=shares_prompts, cache_gb=cache_gb)
        completions = sampler.generate(some, SamplingParams(max_new_tokens=num_tokens, records_routing=records), step=0,
                                       num_samples=1)
        sampler.offload()
        num_preemptions = sampler.last_stats.num_preemptions
        return completions

    num_preemptions = 0  # of the newest sample
    completions, seconds = timed(lambda: sample(prompts[:count], max_batch))
    lengths = [completion.num_policy_tokens for completion in completions]
    found = compare_log_probs(policy, completions, shares_prompts=shares_prompts)
    recorded = sample(prompts[:num_recorded], max_batch, num_tokens=recorded_tokens, records=True)
    routes = compare_log_probs(policy, recorded, shares_prompts=shares_prompts, replays=True)
    among = sample(prompts, large_batch)
    longest = sorted((completion.num_tokens for completion in completions), reverse=True)[:max_batch]
    one = PAGE_TOKENS * KVCache.pages_for(prompt_lens[1] + max_new_tokens)
    share, least = (cache_gb_of(policy.config, lens, bytes_per_number=policy.dtype.itemsize) for lens in (longest, [one, one]))
    cache_gb = max(share / 3, least)
    preempted = sample(prompts[:count], max_batch, cache_gb=cache_gb)
    of_preempted = {"preempted_same_bits": [*map(drawn, preempted)] == [*map(drawn, completions)], "preemptions": num_preemptions}
    by_length = sorted(range(count), key=lengths.__getitem__)
    alone = [by_length[i * (count - 1) // max(num_alone - 1, 1)] for i in range(num_alone)]  # the shortest to the longest
    return found | of_preempted | {
        "route_flips": routes["route_flips"], "routes": routes["routes"],
        "recorded_same_tokens": all(one.completion_ids == other.completion_ids[:recorded_tokens]
                                    for one, other in zip(recorded, completions)),
        "alone_same_bits": all(drawn(sample([prompts[i]], 1)[0]) == drawn(completions[i]) for i in alone), "alone": len(alone),
        "large_batch": large_batch, "large_batch_same_bits": [*map(drawn, among[:count])] == [*map(drawn, completions)],
        "shares_prompts": shares_prompts, "max_batch": max_batch, "min_len": min(lengths), "max_len": max(lengths),
        "seconds": round(seconds, 2)}


def make_optimizer(policy: GptOss) -> Optimizer:
    learning_rate = LearningRate(1e-6, warmup_steps=0, schedule="constant", decay_steps=None, final_lr_ratio=1.0,
                                 total_steps=10_000)
    return Optimizer(policy.trainable_parameters(), learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                     max_grad_norm=1.0)


def train_on(policy: GptOss, optimizer: Optimizer, completions: list[Completion], *, micro_tokens: int) -> dict[str, float]:
    """An update with alternating advantages: seconds of forward and backward, and of the optimizer; the largest difference."""
    synchronize()
    start, worst = time.perf_counter(), []
    batch = pack(completions, [float(i % 2) - 0.5 for i in range(len(completions))]).to(policy.device)
    for micro in micro_batches(batch, micro_tokens, share_prompts=True):
        log_probs = micro_log_probs(policy, micro)
        worst.append((log_probs.detach() - micro.sampler_log_probs)[micro.loss_mask].abs().max())
        optimizer.backward(-(log_probs * micro.advantages).sum() / micro.num_policy_tokens)
    _, seconds = timed(optimizer.step)  # waits for the backward first
    optimizer.zero_grad()
    return {"forward_backward_s": round(time.perf_counter() - start - seconds, 3), "optimizer_s": round(seconds, 3),
            "max_log_prob_diff": torch.stack(worst).max().item()}


@contextmanager
def prefill_clock(policy: GptOss) -> Iterator[list[float]]:
    """Inside, the seconds of each prefill of the policy are added to the list, which takes waiting for it."""
    prefill, seconds = policy.prefill_hidden, []

    def clocked(*arguments, **settings):
        hidden, took = timed(lambda: prefill(*arguments, **settings))
        seconds.append(took)
        return hidden

    with patch.object(policy, "prefill_hidden", clocked):
        yield seconds


def grpo_step_case(policy: GptOss, *, prompts: int, group: int, prompt_len: int, length: int, micro_tokens: int,
                   memory_gb: float | None) -> dict:
    """One step after one like it, in its phases. memory_gb: what training may take; None: nothing is recomputed."""
    sampler = Sampler(policy, [], max_batch=prompts * group, seed=0, max_len=prompt_len + length, shares_prompts=True)
    optimizer = make_optimizer(policy)
    set_memory(policy, memory_gb)

    def step(index: int) -> dict:
        asked = random_prompts(policy, [prompt_len] * prompts, seed=index)
        with prefill_clock(policy) as clock:
            completions, rollout = timed(lambda: sampler.generate(asked, SamplingParams(max_new_tokens=length), step=index,
                                                                  num_samples=group))
        _, handover = timed(sampler.offload)
        update = train_on(policy, optimizer, completions, micro_tokens=micro_tokens)
        times = {"seconds": rollout + handover + update["forward_backward_s"] + update["optimizer_s"], "rollout_s": rollout,
                 "prefill_s": sum(clock), "decode_s": rollout - sum(clock), "handover_s": handover}
        return {name: round(value, 3) for name, value in times.items()} | update | {
            "rollout_tokens_per_s": round(prompts * group * length / rollout)}

    step(0)
    return step(1) | {"prompts": prompts, "group": group, "prompt_len": prompt_len, "length": length}


def memory_gb() -> tuple[float, float, float]:
    """GPU memory in 1e9 bytes: what torch holds, the most that it has held, and what is in use by whoever it is, whether torch
    counts it or not; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0, 0.0, 0.0
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_reserved() / 1e9, torch.cuda.max_memory_reserved() / 1e9, (total - free) / 1e9


def undrawn_completions(policy: GptOss, group: int, prompt_len: int, length: int) -> list[Completion]:
    """A group of random tokens that no rollout has drawn."""
    prompt, *rest_of = random_prompts(policy, [prompt_len] + [length] * group, seed=7)
    return [Completion(prompt, sample, [Segment(prompt.token_ids, "prompt"), Segment(part.token_ids, "policy", [0.0] * length)],
                       "length") for sample, part in enumerate(rest_of)]


def memory_case(policy: GptOss, *, group: int = 8, prompt_len: int = 512, length: int = 1024, num_steps: int = 200,
                short_lens: tuple[int, int] = (16, 256)) -> dict:
    """What torch reserves in one and the same update: before any rollout of this process, after one as large, and after steps of
    mixed lengths."""
    set_memory(policy, None)
    optimizer, fixed = make_optimizer(policy), undrawn_completions(policy, group, prompt_len, length)

    def peak_of_update() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        train_on(policy, optimizer, fixed, micro_tokens=MICRO_TOKENS)
        return memory_gb()[1:]

    peak_of_update()  # the optimizer's state comes with the first
    alone = peak_of_update()
    sampler = Sampler(policy, [], max_batch=64, seed=0, max_len=prompt_len + length, shares_prompts=True)

    def sample(step: int, prompt_len: int, length: int) -> list[Completion]:
        completions = sampler.generate(random_prompts(policy, [prompt_len], seed=step), SamplingParams(max_new_tokens=length),
                                       step=step, num_samples=group)
        sampler.offload()
        return completions

    sample(0, prompt_len, length)
    after = peak_of_update()
    lengths = random_lengths(2 * num_steps, *short_lens, seed=5)
    reserved = []
    for step in range(num_steps):
        completions = sample(1 + step, lengths[2 * step], lengths[2 * step + 1])
        train_on(policy, optimizer, completions, micro_tokens=MICRO_TOKENS)
        reserved.append(memory_gb()[0])
    sample(0, prompt_len, length)
    late = peak_of_update()
    found = {"training_alone": alone[0], "training_after_rollout": after[0], "difference": after[0] - alone[0],
             "training_after_steps": late[0], "growth": late[0] - after[0], "reserved_in_steps": max(reserved),
             "used_alone": alone[1], "used_after_rollout": after[1], "used_after_steps": late[1]}
    return {"steps": num_steps} | {f"{name}_gb": round(value, 3) for name, value in found.items()}


def cache_gb_of(config: GptOssConfig, lengths: list[int], *, bytes_per_number: int) -> float:
    """Keys and values of so many sequences, in 1e9 bytes."""
    entries = sum(min(length, config.sliding_window) if config.is_windowed(layer) else length
                  for length in lengths for layer in range(config.num_hidden_layers))
    return 2 * config.num_key_value_heads * config.head_dim * bytes_per_number * entries / 1e9


def requests_case(policy: GptOss, *, count: int = 4096, max_new_tokens: int = 4096, prompt_lens: tuple[int, int] = (16, 256),
                  max_batch: int = 512, share: float = 0.1) -> dict:
    """Requests of random lengths, without a bound on the cache and through one that holds a share of them all."""
    stop_ids = random_stop_ids(policy, max_new_tokens / 6, seed=1)
    prompts = random_prompts(policy, random_lengths(count, *prompt_lens, seed=2), seed=3)

    def sample(cache_gb: float | None) -> tuple[list[Completion], float, Sampler]:
        sampler = Sampler(policy, stop_ids, max_batch=max_batch, seed=0, max_len=prompt_lens[1] + max_new_tokens,
                          shares_prompts=True, cache_gb=cache_gb)
        completions, seconds = timed(lambda: sampler.generate(prompts, SamplingParams(max_new_tokens=max_new_tokens), step=0,
                                                              num_samples=1))
        sampler.offload()
        return completions, seconds, sampler

    free, free_s, _ = sample(None)
    lengths = [completion.num_tokens for completion in free]
    cache_gb = share * cache_gb_of(policy.config, lengths, bytes_per_number=policy.dtype.itemsize)
    bound, bound_s, sampler = sample(cache_gb)
    num_new = [completion.num_policy_tokens for completion in bound]
    stats = sampler.last_stats
    return {"requests": count, "finished": len(bound), "different": len({completion.prompt.id for completion in bound}),
            "same_tokens": [c.completion_ids for c in bound] == [c.completion_ids for c in free],
            "same_bits": [*map(drawn, bound)] == [*map(drawn, free)], "tokens": sum(num_new), "min_new": min(num_new),
            "max_new": max(num_new), "cache_gb": round(cache_gb, 6), "cache_used_gb": round(stats.cache_bytes / 1e9, 6),
            "preemptions": stats.num_preemptions, "seconds": round(bound_s, 2), "unbounded_s": round(free_s, 2),
            "tokens_per_s": round(sum(num_new) / bound_s), "unbounded_tokens_per_s": round(sum(num_new) / free_s)}


def process_seconds() -> float:
    """Since this process began."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, since the machine started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def start_up_case(checkpoint: Path, *, lora: str, imports_s: float, group: int = 8, prompt_len: int = 220, length: int = 512,
                  **settings) -> dict:
    """From the start of the process to the end of the first step. imports_s: what came before; settings: load_policy's."""
    kernel_cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    is_warm = kernel_cache.is_dir() and any(kernel_cache.iterdir())
    policy, load = timed(lambda: load_policy(checkpoint, lora=lora, **settings))
    set_memory(policy, None)
    optimizer = make_optimizer(policy)
    sampler = Sampler(policy, [], max_batch=group, seed=0, max_len=prompt_len + length, shares_prompts=True)
    prompts = random_prompts(policy, [prompt_len], seed=0)
    completions, rollout = timed(lambda: sampler.generate(prompts, SamplingParams(max_new_tokens=length), step=0,
                                                          num_samples=group))
    sampler.offload()
    _, update = timed(lambda: train_on(policy, optimizer, completions, micro_tokens=MICRO_TOKENS))
    parts = {"imports_s": imports_s, "load_s": load, "first_rollout_s": rollout, "first_update_s": update}
    found = {"seconds": sum(parts.values())} | parts
    return {name: round(value, 2) for name, value in found.items()} | {"kernel_cache": "warm" if is_warm else "cold"}
