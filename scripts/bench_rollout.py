"""Times rollouts on one GPU: steady decoding, prefill, whole GRPO steps, start-up; compares every log-prob with the trainer's;
measures what memory rollouts leave behind.

    python scripts/random_checkpoint.py /dev/shm/gpt-oss-20b --size 20b --dtype mxfp4
    python scripts/bench_rollout.py --checkpoint /dev/shm/gpt-oss-20b [--only exact memory] [--lora all]

One JSON line per case. Prompts are random tokens, temperature 1, the adapter's B is not zero.
decode: sampling and log-probs included; tokens_per_s follows from the median time of a step between two syncs of a rollout in
which all rows are decoded together, without the first of them, which compile and capture. roofline_fraction compares it with the
least time of a step on this GPU: for experts, dense projections, attention and head each, what they read at the bandwidth of a
copy or what they compute at the rate of an 8192^3 bf16 product, both measured first, whichever takes longer (weights of the
experts that uniform routing touches, everything else once, keys and values at the mean context); bandwidth_fraction counts the
reading alone.
compared: the number of completions whose log-probs are compared, at most 64, which have at most 2^18 tokens together.
prefill: tokens of prompts a second, and their share of what that product's rate allows.
grpo_step: seconds of rollout (prefill, decode), handover (memory given back), forward and backward, and optimizer of 8
completions of 512 tokens, one prompt of 220; grpo_step_large: of 8 prompts of 512, 16 completions of 2,048 each.
exact: 64 completions of up to 1,024 tokens, prompts of 16 to 1,500, 24 rows at once: max_log_prob_diff; the share of the experts
that the trainer's router would not have chosen, of 16 completions of up to 128 tokens, launch by launch; and whether completions
alone, among 128, and preempted for want of cache and resumed are the same to the last bit. The trainer computes prompts apart, as
it does where completions share them; exact_whole: it does not.
memory: the most that torch reserves in one and the same update, GB: before any rollout, after one, and after 200 steps of mixed
lengths; used_...: what the GPU says is in use after that update, memory that torch does not count included. Alone in a process.
requests: 4,096 of up to 4,096 x --scale new tokens through a cache that holds a tenth of them, against no bound.
start_up: imports, loading, and the first step of 8 x 512, with kernels compiled or read from Triton's cache; alone in a process.
max_log_prob_diff: of the sampler's and the trainer's log-probs over all tokens sampled, nats; 0 is bit equality.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from random_policy import TARGETS, load_policy, num_tokens, random_prompts, set_memory
from timing import Ceilings, Report, device_name, free_memory, measure_ceilings, timed

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

ALWAYS = ("decode", "prefill", "grpo_step")
CASES = (*ALWAYS, "grpo_step_large", "exact", "exact_whole", "memory", "requests", "start_up")
BATCHES = (1, 8, 32, 128, 512)
PROMPT_LEN, SHORT, LONG = 512, 16, 144
MICRO_TOKENS = 16_384  # in a micro-batch; one longer sequence goes alone
TRAINING_SHARE = 0.85  # of a GPU's memory
MOST_COMPARED, COMPARED_TOKENS = 64, 1 << 18  # completions of decode, and their tokens with their prompts


# ----------------------------------------------------------------------------------------------- sampling and training forward


def random_lengths(num: int, low: int, high: int, *, seed: int) -> list[int]:
    """Uniform in the logarithm: many short ones, some long."""
    draw = random.Random(seed)
    return [round(low * (high / low) ** draw.random()) for _ in range(num)]


def random_stop_ids(policy: GptOss, mean_len: float) -> list[int]:
    """So many ids that a policy that draws about uniformly, as one of random weights does, ends after mean_len tokens or so."""
    vocab = num_tokens(policy)
    return random.Random(1).sample(range(vocab), max(1, round(vocab / mean_len)))


def make_sampler(policy: GptOss, max_batch: int, max_len: int, *, stop_ids: list[int] | None = None, shares_prompts: bool = True,
                 cache_gb: float | None = None, max_prefill_tokens: int = MICRO_TOKENS) -> Sampler:
    return Sampler(policy, stop_ids or [], max_batch=max_batch, seed=0, max_len=max_len, shares_prompts=shares_prompts,
                   cache_gb=cache_gb, max_prefill_tokens=max_prefill_tokens)


def sample(sampler: Sampler, prompts: list[Prompt], max_new_tokens: int, *, step: int = 0, num_samples: int = 1,
           records_routing: bool = False) -> list[Completion]:
    params = SamplingParams(max_new_tokens=max_new_tokens, records_routing=records_routing)
    return sampler.generate(prompts, params, step=step, num_samples=num_samples)


def have_same_bits(ours: list[Completion], theirs: list[Completion]) -> bool:
    """Whether tokens and log-probs are equal."""
    found, expected = ([(one.completion_ids, one.segments[1].log_probs) for one in some] for some in (ours, theirs))
    return found == expected


def micro_log_probs(policy: GptOss, micro: RolloutBatch, routing: RoutingReplay | None = None) -> torch.Tensor:
    """[T], by the forward that trains."""
    return policy.log_probs(micro.tokens, micro.cu_seqlens, temperature=1.0, mask=micro.host_mask, prefixes=micro.prefixes,
                            record=routing)[0]


def compare_log_probs(policy: GptOss, completions: list[Completion], *, shares_prompts: bool,
                      replays: bool = False) -> dict[str, float]:
    """The sampler's log-probs against the trainer's; with replays, of completions that recorded their routing. The trainer keeps
    what fits into the GPU, however long the sequences are."""
    set_memory(policy, training_gb())
    batch = pack(completions, [0.0] * len(completions)).to(policy.device)
    differences, routings = [], []
    longest = max(completion.num_tokens for completion in completions)
    for micro in micro_batches(batch, max(MICRO_TOKENS, longest), share_prompts=shares_prompts):
        routings += [RoutingReplay(micro.routing)] if replays else []
        log_probs = micro_log_probs(policy, micro, routings[-1] if replays else None).detach()
        differences.append((log_probs - micro.sampler_log_probs)[micro.loss_mask].abs())
    difference = torch.cat(differences)
    found = {"max_log_prob_diff": difference.max().item(), "num_differing": int((difference != 0).sum()),
             "tokens": batch.num_policy_tokens}
    if replays:
        found |= {"route_flips": routing_metrics(routings)["routing/flips"],
                  "routes": sum(int(routing.num_choices) for routing in routings)}
    return found


def training_gb() -> float | None:
    """What training may take, in 1e9 bytes; without a GPU there is no bound."""
    return TRAINING_SHARE * torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else None


# ------------------------------------------------------------------------------------------------------- decoding and prefill


class Stage(NamedTuple):
    """The least that a decode step does in one kind of operation."""

    num_bytes: float  # read
    flops: float


def decode_stages(config: GptOssConfig, batch: int, context: float) -> list[Stage]:
    """Experts, dense projections and router, attention, head of one step over packed experts and bf16 else."""
    width, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    layers, expert = config.num_hidden_layers, 3 * width * inner
    touched = experts * (1 - (1 - config.num_experts_per_tok / experts) ** batch)
    q_width, kv_width = config.q_width, config.kv_width
    dense = width * (q_width + 2 * kv_width) + q_width * width + width * experts
    keys = sum(min(context, config.sliding_window) if config.is_windowed(layer) else context for layer in range(layers))
    return [Stage(layers * touched * expert * 17 / 32, layers * 2 * batch * config.num_experts_per_tok * expert),
            Stage(layers * 2 * dense, layers * 2 * batch * dense),
            Stage(batch * keys * 2 * kv_width * 2, batch * keys * 2 * q_width * 2),
            Stage(2 * width * config.vocab_size, 2 * batch * width * config.vocab_size)]


def least_seconds(stages: list[Stage], ceilings: Ceilings) -> float:
    return sum(max(stage.num_bytes / ceilings.gb_per_s / 1e9, stage.flops / ceilings.tflops / 1e12) for stage in stages)


def time_decoding(sampler: Sampler, prompts: list[Prompt]) -> tuple[list[Completion], float]:
    """A completion of LONG tokens for each prompt, and the median seconds of a decode step of all of them, from SHORT tokens on.
    Whole rollouts would not do: the prefill of long prompts takes longer than the decoding, and varies by more. Raises ValueError
    if some rows wait."""
    times, num_steps = [], 0
    with sampler.open(SamplingParams(max_new_tokens=LONG), step=1) as session:
        session.submit(prompts, 1)
        stats = session.stats
        while session.is_running:
            before, num_tokens, start = stats.decode_steps, stats.decode_tokens, time.perf_counter()
            session.poll()  # ends when its steps have, while the first of the next ones runs
            count, seconds = stats.decode_steps - before, time.perf_counter() - start
            if stats.decode_tokens - num_tokens != count * len(prompts):
                raise ValueError(f"{len(prompts)} rows are not decoded together: give fewer (--batches), the cache holds no more")
            if num_steps >= SHORT:
                times.append(seconds / count)
            num_steps += count
        return session.drain(), statistics.median(times)


def decode_case(policy: GptOss, batch: int, prompt_len: int, ceilings: Ceilings) -> dict:
    # a prompt longer than a prefill would come in chunks, between which the rows before it are decoded
    sampler = make_sampler(policy, batch, prompt_len + LONG, shares_prompts=False,
                           max_prefill_tokens=max(MICRO_TOKENS, prompt_len))
    completions, seconds = time_decoding(sampler, random_prompts(policy, [prompt_len] * batch, seed=batch))
    sampler.offload()
    rate = batch / seconds
    stages = decode_stages(policy.config, batch, prompt_len + (SHORT + LONG) / 2)
    reading = sum(stage.num_bytes for stage in stages) / ceilings.gb_per_s / 1e9
    compared = completions[:min(MOST_COMPARED, max(1, COMPARED_TOKENS // (prompt_len + LONG)))]
    return {"prompt_len": prompt_len, "tokens_per_s": round(rate), "ms_per_step": round(1e3 * seconds, 3),
            "roofline_fraction": round(rate * least_seconds(stages, ceilings) / batch, 3),
            "bandwidth_fraction": round(rate * reading / batch, 3), "compared": len(compared),
            "max_log_prob_diff": compare_log_probs(policy, compared, shares_prompts=False)["max_log_prob_diff"]}


def prefill_case(policy: GptOss, batch: int, ceilings: Ceilings) -> dict:
    sampler = make_sampler(policy, batch, PROMPT_LEN + 1, shares_prompts=False)
    prompts = random_prompts(policy, [PROMPT_LEN] * batch, seed=batch)
    for _ in range(2):  # the first compiles
        _, seconds = timed(lambda: sample(sampler, prompts, 1))
    sampler.offload()
    # a prompt's average token sees half of it; the head takes its last one alone, which is little
    experts, dense, attention, _ = decode_stages(policy.config, 1, PROMPT_LEN / 2)
    least = batch * PROMPT_LEN * (experts.flops + dense.flops + attention.flops) / ceilings.tflops / 1e12
    return {"tokens_per_s": round(batch * PROMPT_LEN / seconds), "seconds": round(seconds, 4),
            "roofline_fraction": round(least / seconds, 3)}


# ------------------------------------------------------------------------------------------------------------------- equal bits


def exact_case(policy: GptOss, *, num_prompts: int = 64, prompt_lens: tuple[int, int] = (16, 1500), max_new_tokens: int = 1024,
               max_batch: int = 24, large_batch: int = 128, num_alone: int = 3, num_recorded: int = 16,
               recorded_tokens: int = 128, shares_prompts: bool) -> dict:
    """Preemptions come from a cache that holds a third of the longest rows."""
    stop_ids = random_stop_ids(policy, 0.4 * max_new_tokens)
    prompts = random_prompts(policy, random_lengths(large_batch, *prompt_lens, seed=2), seed=3)
    max_len = prompt_lens[1] + max_new_tokens

    def sampled(some: list[Prompt], rows: int, *, num_tokens: int = max_new_tokens, records_routing: bool = False,
                cache_gb: float | None = None) -> tuple[list[Completion], int]:
        """Completions, and the number of preemptions."""
        sampler = make_sampler(policy, rows, max_len, stop_ids=stop_ids, shares_prompts=shares_prompts, cache_gb=cache_gb)
        completions = sample(sampler, some, num_tokens, records_routing=records_routing)
        sampler.offload()
        return completions, sampler.last_stats.num_preemptions

    (completions, _), seconds = timed(lambda: sampled(prompts[:num_prompts], max_batch))
    lengths = [completion.num_policy_tokens for completion in completions]
    found = compare_log_probs(policy, completions, shares_prompts=shares_prompts)
    recorded, _ = sampled(prompts[:num_recorded], max_batch, num_tokens=recorded_tokens, records_routing=True)
    routes = compare_log_probs(policy, recorded, shares_prompts=shares_prompts, replays=True)
    among, _ = sampled(prompts, large_batch)
    longest = sorted((completion.num_tokens for completion in completions), reverse=True)[:max_batch]
    one = PAGE_TOKENS * KVCache.pages_for(max_len)
    share, least = (cache_gb_of(policy.config, lens, bytes_per_number=policy.dtype.itemsize) for lens in (longest, [one, one]))
    preempted, num_preemptions = sampled(prompts[:num_prompts], max_batch, cache_gb=max(share / 3, least))
    by_length = sorted(range(num_prompts), key=lengths.__getitem__)
    alone = [by_length[i * (num_prompts - 1) // max(num_alone - 1, 1)] for i in range(num_alone)]  # the shortest to the longest
    return found | {
        "preempted_same_bits": have_same_bits(preempted, completions), "preemptions": num_preemptions,
        "route_flips": routes["route_flips"], "routes": routes["routes"],
        "recorded_same_tokens": all(one.completion_ids == other.completion_ids[:recorded_tokens]
                                    for one, other in zip(recorded, completions)),
        "alone_same_bits": all(have_same_bits(sampled([prompts[i]], 1)[0], [completions[i]]) for i in alone),
        "alone": len(alone), "large_batch": large_batch,
        "large_batch_same_bits": have_same_bits(among[:num_prompts], completions),
        "shares_prompts": shares_prompts, "max_batch": max_batch, "min_len": min(lengths), "max_len": max(lengths),
        "seconds": round(seconds, 2)}


def cache_gb_of(config: GptOssConfig, lengths: list[int], *, bytes_per_number: int) -> float:
    """Keys and values of so many sequences, in 1e9 bytes."""
    entries = sum(min(length, config.sliding_window) if config.is_windowed(layer) else length
                  for length in lengths for layer in range(config.num_hidden_layers))
    return 2 * config.num_key_value_heads * config.head_dim * bytes_per_number * entries / 1e9


def requests_case(policy: GptOss, *, num_requests: int = 4096, max_new_tokens: int = 4096,
                  prompt_lens: tuple[int, int] = (16, 256), max_batch: int = 512, share: float = 0.1) -> dict:
    """share: of all requests' keys and values, that the bounded cache holds."""
    stop_ids = random_stop_ids(policy, max_new_tokens / 6)
    prompts = random_prompts(policy, random_lengths(num_requests, *prompt_lens, seed=2), seed=3)

    def sampled(cache_gb: float | None) -> tuple[list[Completion], float, Sampler]:
        sampler = make_sampler(policy, max_batch, prompt_lens[1] + max_new_tokens, stop_ids=stop_ids, cache_gb=cache_gb)
        completions, seconds = timed(lambda: sample(sampler, prompts, max_new_tokens))
        sampler.offload()
        return completions, seconds, sampler

    free, free_s, _ = sampled(None)
    lengths = [completion.num_tokens for completion in free]
    cache_gb = share * cache_gb_of(policy.config, lengths, bytes_per_number=policy.dtype.itemsize)
    bound, bound_s, sampler = sampled(cache_gb)
    num_new, stats = [completion.num_policy_tokens for completion in bound], sampler.last_stats
    return {"requests": num_requests, "finished": len(bound), "different": len({completion.prompt.id for completion in bound}),
            "same_tokens": [c.completion_ids for c in bound] == [c.completion_ids for c in free],
            "same_bits": have_same_bits(bound, free), "tokens": sum(num_new), "min_new": min(num_new), "max_new": max(num_new),
            "cache_gb": round(cache_gb, 6), "cache_used_gb": round(stats.cache_bytes / 1e9, 6),
            "preemptions": stats.num_preemptions, "seconds": round(bound_s, 2), "unbounded_s": round(free_s, 2),
            "tokens_per_s": round(sum(num_new) / bound_s), "unbounded_tokens_per_s": round(sum(num_new) / free_s)}


# ------------------------------------------------------------------------------------------------------------- steps and memory


def make_optimizer(policy: GptOss) -> Optimizer:
    learning_rate = LearningRate(1e-6, warmup_steps=0, schedule="constant", decay_steps=None, final_lr_ratio=1.0,
                                 total_steps=10_000)
    return Optimizer(policy.trainable_parameters(), learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                     max_grad_norm=1.0)


def train_on(policy: GptOss, optimizer: Optimizer, completions: list[Completion], *,
             micro_tokens: int = MICRO_TOKENS) -> dict[str, float]:
    """An update with alternating advantages: seconds of forward and backward, and of the optimizer; the largest difference."""

    def forward_backward() -> list[torch.Tensor]:
        differences = []
        batch = pack(completions, [float(i % 2) - 0.5 for i in range(len(completions))]).to(policy.device)
        for micro in micro_batches(batch, micro_tokens, share_prompts=True):
            log_probs = micro_log_probs(policy, micro)
            differences.append((log_probs.detach() - micro.sampler_log_probs)[micro.loss_mask].abs().max())
            optimizer.backward(-(log_probs * micro.advantages).sum() / micro.num_policy_tokens)
        return differences

    differences, forward_backward_s = timed(forward_backward)
    _, optimizer_s = timed(optimizer.step)
    optimizer.zero_grad()
    return {"forward_backward_s": forward_backward_s, "optimizer_s": optimizer_s,
            "max_log_prob_diff": torch.stack(differences).max().item()}


@contextmanager
def prefill_clock(policy: GptOss) -> Iterator[list[float]]:
    """Inside, the seconds of each prefill of the policy are added to the list, which takes waiting for it."""
    prefill, seconds = policy.prefill, []

    def clocked(*arguments, **settings):
        hidden, took = timed(lambda: prefill(*arguments, **settings))
        seconds.append(took)
        return hidden

    with patch.object(policy, "prefill", clocked):
        yield seconds


def grpo_step_case(policy: GptOss, *, prompts: int, group: int, prompt_len: int, length: int, micro_tokens: int,
                   memory_gb: float | None) -> dict:
    """One step after one like it, in its phases. memory_gb: what training may take; None: nothing is recomputed."""
    sampler, optimizer = make_sampler(policy, prompts * group, prompt_len + length), make_optimizer(policy)
    set_memory(policy, memory_gb)
    for index in range(2):
        asked = random_prompts(policy, [prompt_len] * prompts, seed=index)
        with prefill_clock(policy) as clock:
            completions, rollout_s = timed(partial(sample, sampler, asked, length, step=index, num_samples=group))
        _, handover_s = timed(sampler.offload)
        update = train_on(policy, optimizer, completions, micro_tokens=micro_tokens)
    worst = update.pop("max_log_prob_diff")
    times = {"seconds": rollout_s + handover_s + sum(update.values()), "rollout_s": rollout_s, "prefill_s": sum(clock),
             "decode_s": rollout_s - sum(clock), "handover_s": handover_s} | update
    return {name: round(value, 3) for name, value in times.items()} | {
        "max_log_prob_diff": worst, "rollout_tokens_per_s": round(prompts * group * length / rollout_s), "prompts": prompts,
        "group": group, "prompt_len": prompt_len, "length": length}


def undrawn_completions(policy: GptOss, group: int, prompt_len: int, length: int) -> list[Completion]:
    """A group of random tokens that no rollout has drawn."""
    prompt, *rest_of = random_prompts(policy, [prompt_len] + [length] * group, seed=7)
    return [Completion(prompt, sample, [Segment(prompt.token_ids, "prompt"), Segment(part.token_ids, "policy", [0.0] * length)],
                       "length") for sample, part in enumerate(rest_of)]


def memory_case(policy: GptOss, *, group: int = 8, prompt_len: int = 512, length: int = 1024, num_steps: int = 200,
                short_lens: tuple[int, int] = (16, 256)) -> dict:
    """In 1e9 bytes; 0 without a GPU."""
    set_memory(policy, None)
    optimizer, fixed = make_optimizer(policy), undrawn_completions(policy, group, prompt_len, length)
    has_gpu = torch.cuda.is_available()

    def peak_of_update() -> tuple[float, float]:
        """The most that torch reserves, and what is in use after it by whoever it is, whether torch counts it or not."""
        if has_gpu:
            torch.cuda.reset_peak_memory_stats()
        train_on(policy, optimizer, fixed)
        free, total = torch.cuda.mem_get_info() if has_gpu else (0, 0)
        return torch.cuda.max_memory_reserved() / 1e9 if has_gpu else 0.0, (total - free) / 1e9

    peak_of_update()  # the optimizer's state comes with the first
    alone = peak_of_update()
    sampler = make_sampler(policy, 64, prompt_len + length)

    def sampled(step: int, prompt_len: int, length: int) -> list[Completion]:
        completions = sample(sampler, random_prompts(policy, [prompt_len], seed=step), length, step=step, num_samples=group)
        sampler.offload()
        return completions

    sampled(0, prompt_len, length)
    after = peak_of_update()
    lengths = random_lengths(2 * num_steps, *short_lens, seed=5)
    reserved = []
    for step in range(num_steps):
        train_on(policy, optimizer, sampled(1 + step, lengths[2 * step], lengths[2 * step + 1]))
        reserved.append(torch.cuda.memory_reserved() / 1e9 if has_gpu else 0.0)
    sampled(0, prompt_len, length)
    late = peak_of_update()
    found = {"training_alone": alone[0], "training_after_rollout": after[0], "difference": after[0] - alone[0],
             "training_after_steps": late[0], "growth": late[0] - after[0], "reserved_in_steps": max(reserved),
             "used_alone": alone[1], "used_after_rollout": after[1], "used_after_steps": late[1]}
    return {"steps": num_steps} | {f"{name}_gb": round(value, 3) for name, value in found.items()}


def process_seconds() -> float:
    """Since this process began."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, since the machine started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def start_up_case(checkpoint: Path, *, lora: str, imports_s: float, group: int = 8, prompt_len: int = 220, length: int = 512,
                  **settings) -> dict:
    """imports_s: what came before; settings: load_policy's."""
    kernel_cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    is_warm = kernel_cache.is_dir() and any(kernel_cache.iterdir())
    policy, load = timed(lambda: load_policy(checkpoint, lora=lora, **settings))
    set_memory(policy, None)
    optimizer, sampler = make_optimizer(policy), make_sampler(policy, group, prompt_len + length)
    prompts = random_prompts(policy, [prompt_len], seed=0)
    completions, rollout = timed(lambda: sample(sampler, prompts, length, num_samples=group))
    sampler.offload()
    _, update = timed(lambda: train_on(policy, optimizer, completions))
    parts = {"imports_s": imports_s, "load_s": load, "first_rollout_s": rollout, "first_update_s": update}
    found = {"seconds": sum(parts.values())} | parts
    return {name: round(value, 2) for name, value in found.items()} | {"kernel_cache": "warm" if is_warm else "cold"}


# ------------------------------------------------------------------------------------------------------------------ command line


def report_case(report: Report, what: str, batch: int, lora: str, function: Callable[[], dict]) -> None:
    about = {"batch": batch, "lora": lora, "gpu": device_name()}
    found = report.guarded(what, function, **about)
    if found is not None:
        report(what, **about, **found)
    free_memory()


def run_cases(report: Report, policy: GptOss, lora: str, arguments: argparse.Namespace, ceilings: Ceilings) -> None:
    cases = [("decode", batch, partial(decode_case, policy, batch, prompt_len, ceilings))
             for prompt_len in arguments.prompts for batch in arguments.batches]
    cases.append(("prefill", 32, partial(prefill_case, policy, 32, ceilings)))
    if lora != "none":
        cases += [
            ("grpo_step", 8, partial(grpo_step_case, policy, prompts=1, group=8, prompt_len=220, length=512,
                                     micro_tokens=1 << 20, memory_gb=None)),
            ("grpo_step_large", 128, partial(grpo_step_case, policy, prompts=8, group=16, prompt_len=512, length=2048,
                                             micro_tokens=32_768, memory_gb=training_gb())),
            ("exact", 24, partial(exact_case, policy, shares_prompts=True)),
            ("exact_whole", 24, partial(exact_case, policy, shares_prompts=False)),
            ("memory", 8, partial(memory_case, policy)),
            ("requests", 512, partial(requests_case, policy, max_new_tokens=round(4096 * arguments.scale))),
        ]
    for what, batch, function in cases:
        if what in arguments.only:
            report_case(report, what, batch, lora, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a gpt-oss checkpoint")
    parser.add_argument("--lora", nargs="+", choices=["none", *TARGETS], default=["all", "none"], help="what carries adapters")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="of decode")
    parser.add_argument("--prompts", nargs="+", type=int, default=[PROMPT_LEN],
                        help=f"lengths of prompts in decode, tokens (default: {PROMPT_LEN})")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(ALWAYS), help=f"default: {' '.join(ALWAYS)}")
    parser.add_argument("--scale", type=float, default=0.125, help="of the lengths of requests (default: 0.125)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all lines there, too")
    arguments, report = parser.parse_args(), Report()
    if "start_up" in arguments.only:
        if len(arguments.only) > 1:
            parser.error("--only start_up goes alone: it counts from the start of the process")
        report_case(report, "start_up", 8, arguments.lora[0],
                    partial(start_up_case, arguments.checkpoint, lora=arguments.lora[0], imports_s=process_seconds()))
        return report.write(arguments.json)
    ceilings = measure_ceilings(report)
    for lora in arguments.lora:
        policy = load_policy(arguments.checkpoint, lora="all" if lora == "none" else lora)
        with policy.adapter_disabled() if lora == "none" else nullcontext():
            run_cases(report, policy, lora, arguments, ceilings)
        del policy
        free_memory()
    report.write(arguments.json)


if __name__ == "__main__":
    main()
