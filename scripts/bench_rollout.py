"""Times rollouts on one GPU: steady decoding, prefill, whole GRPO steps, start-up; compares every log-prob with the trainer's;
measures what memory rollouts leave behind.

    python scripts/random_checkpoint.py /dev/shm/gpt-oss-20b --size 20b --dtype mxfp4
    python scripts/bench_rollout.py --checkpoint /dev/shm/gpt-oss-20b [--only exact memory] [--lora all]

One JSON line per case. Prompts are random tokens, temperature 1, the adapter's B is not zero.
decode: `batch` sequences with prompts of 512 tokens (--prompts), sampling and log-probs included; tokens_per_s is the slope
between a short and a long rollout, the better of two each, so that prefill, compilation and capture stay out. roofline_fraction
compares it with the least time of a step on this GPU: for experts, dense projections, attention and head each, what they read at
the bandwidth of a copy or what they compute at the rate of an 8192^3 bf16 product, both measured first, whichever takes longer
(weights of the experts that uniform routing touches, everything else once, keys and values at the mean context);
bandwidth_fraction counts the reading alone.
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
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from random_policy import TARGETS, load_policy, random_prompts
from rollout_cases import (
    compare_log_probs,
    exact_case,
    grpo_step_case,
    memory_case,
    process_seconds,
    requests_case,
    start_up_case,
    timed,
    training_gb,
)
from timing import Ceilings, Report, measure_ceilings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.rollout.sampling import SamplingParams  # noqa: E402
from grpo.rollout.session import Sampler  # noqa: E402
from models.config import GptOssConfig  # noqa: E402

ALWAYS = ("decode", "prefill", "grpo_step")
CASES = (*ALWAYS, "grpo_step_large", "exact", "exact_whole", "memory", "requests", "start_up")
BATCHES = (1, 8, 32, 128, 512)
PROMPT_LEN, SHORT, LONG = 512, 16, 144


class Stage(NamedTuple):
    """The least that a decode step does in one kind of operation."""

    num_bytes: float  # read
    flops: float


def decode_stages(config: GptOssConfig, batch: int, context: float) -> list[Stage]:
    """Experts, dense projections and router, attention, head of one step over packed experts and bf16 else."""
    width, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    layers, expert = config.num_hidden_layers, 3 * width * inner
    touched = experts * (1 - (1 - config.num_experts_per_tok / experts) ** batch)
    q_width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    dense = width * (q_width + 2 * kv_width) + q_width * width + width * experts
    keys = sum(min(context, config.sliding_window) if config.is_windowed(layer) else context for layer in range(layers))
    return [Stage(layers * touched * expert * 17 / 32, layers * 2 * batch * config.num_experts_per_tok * expert),
            Stage(layers * 2 * dense, layers * 2 * batch * dense),
            Stage(batch * keys * 2 * kv_width * 2, batch * keys * 2 * q_width * 2),
            Stage(2 * width * config.vocab_size, 2 * batch * width * config.vocab_size)]


def least_seconds(stages: list[Stage], ceilings: Ceilings) -> float:
    return sum(max(stage.num_bytes / ceilings.gb_per_s / 1e9, stage.flops / ceilings.tflops / 1e12) for stage in stages)


def decode_case(policy, batch: int, prompt_len: int, ceilings: Ceilings) -> dict:
    sampler = Sampler(policy, [], max_batch=batch, seed=0, max_len=prompt_len + LONG)
    prompts = random_prompts(policy, [prompt_len] * batch, seed=batch)

    def rollout(count: int, step: int):
        return sampler.generate(prompts, SamplingParams(max_new_tokens=count), step=step, num_samples=1)

    rollout(LONG, 0)  # takes the cache, compiles and captures
    seconds = {}
    for count in (SHORT, LONG):  # the better of two: the prefill of long prompts, which differs, takes longer than the decoding
        tries = [timed(partial(rollout, count, 1)) for _ in range(2)]
        completions, seconds[count] = tries[0][0], min(took for _, took in tries)
    sampler.offload()
    rate = batch * (LONG - SHORT) / (seconds[LONG] - seconds[SHORT])
    stages = decode_stages(policy.config, batch, prompt_len + (SHORT + LONG) / 2)
    reading = sum(stage.num_bytes for stage in stages) / ceilings.gb_per_s / 1e9
    return {"prompt_len": prompt_len, "tokens_per_s": round(rate), "ms_per_step": round(1e3 * batch / rate, 3),
            "roofline_fraction": round(rate * least_seconds(stages, ceilings) / batch, 3),
            "bandwidth_fraction": round(rate * reading / batch, 3),
            "max_log_prob_diff": compare_log_probs(policy, completions[:64], shares_prompts=False)["max_log_prob_diff"]}


def prefill_case(policy, batch: int, ceilings: Ceilings) -> dict:
    sampler = Sampler(policy, [], max_batch=batch, seed=0, max_len=PROMPT_LEN + 1)
    prompts = random_prompts(policy, [PROMPT_LEN] * batch, seed=batch)
    for _ in range(2):  # the first compiles
        _, seconds = timed(lambda: sampler.generate(prompts, SamplingParams(max_new_tokens=1), step=0, num_samples=1))
    sampler.offload()
    # a prompt's average token sees half of it; the head takes its last one alone, which is little
    experts, dense, attention, _ = decode_stages(policy.config, 1, PROMPT_LEN / 2)
    least = batch * PROMPT_LEN * (experts.flops + dense.flops + attention.flops) / ceilings.tflops / 1e12
    return {"tokens_per_s": round(batch * PROMPT_LEN / seconds), "seconds": round(seconds, 4),
            "roofline_fraction": round(least / seconds, 3)}


def report_case(report: Report, what: str, batch: int, lora: str, function: Callable[[], dict]) -> None:
    try:
        found = function()
    except Exception as error:  # noqa: BLE001  (the other cases are worth their time)
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    report(what, batch=batch, lora=lora, **found, gpu=torch.cuda.get_device_name())
    torch.cuda.empty_cache()


def run_cases(report: Report, policy, lora: str, arguments: argparse.Namespace, ceilings: Ceilings) -> None:
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
        torch.cuda.empty_cache()
    report.write(arguments.json)


if __name__ == "__main__":
    main()
