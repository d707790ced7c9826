"""Times rollouts on one GPU: steady decoding, prefill and a whole GRPO step, and compares every log-prob with the trainer's.

    python scripts/random_checkpoint.py /dev/shm/gpt-oss-20b --size 20b --dtype mxfp4
    python scripts/bench_rollout.py --checkpoint /dev/shm/gpt-oss-20b

One JSON line per case. decode: `batch` sequences with prompts of 512 random tokens, temperature 1, sampling and log-probs
included; tokens_per_s is the slope between a short and a long rollout, so that prefill, compilation and capture stay out;
roofline_fraction compares it with the bytes a step must read at the bandwidth of a copy measured first (weights of the experts
that uniform routing touches, everything else once, keys and values at the mean context). prefill: prompts a second. grpo_step:
rollout, log-probs, backward and optimizer of 8 completions of 512 tokens, one prompt of 220. max_log_prob_diff: of the sampler's
and the trainer's log-probs over all tokens sampled, nats; 0 is bit equality.
"""

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from bench_train import TARGETS, load_policy, set_memory
from timing import copy_gb_per_s

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.batch import Prompt, micro_batches, pack  # noqa: E402
from grpo.optim import Optimizer  # noqa: E402
from grpo.rollout import Sampler  # noqa: E402
from models.config import GptOssConfig  # noqa: E402

CASES = ("decode", "prefill", "grpo_step")
BATCHES = (1, 8, 32, 128, 512)
PROMPT_LEN, SHORT, LONG = 512, 16, 144
MAX_TOKEN = 199_998


def random_prompts(count: int, length: int, *, seed: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [Prompt(i, torch.randint(0, MAX_TOKEN, (length,), generator=generator).tolist(), {}) for i in range(count)]


def bytes_per_step(config: GptOssConfig, batch: int, context: float) -> float:
    """The least that one decode step of packed experts and bf16 else reads."""
    width, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    touched = experts * (1 - (1 - config.num_experts_per_tok / experts) ** batch)
    q_width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    packed = touched * 3 * width * inner * 17 / 32
    dense = 2 * (width * (q_width + 2 * kv_width) + q_width * width + width * experts)
    keys = 0.0
    for layer in range(config.num_hidden_layers):
        keys += min(context, config.sliding_window) if config.is_windowed(layer) else context
    return config.num_hidden_layers * (packed + dense) + 2 * width * config.vocab_size + batch * keys * 2 * kv_width * 2


def log_prob_difference(policy, completions, *, shares_prompts: bool) -> float:
    batch = pack(completions, [0.0] * len(completions)).to(policy.device)
    worst = 0.0
    for micro in micro_batches(batch, 32_768, share_prompts=shares_prompts):
        with torch.no_grad():
            log_probs, _ = policy.log_probs(micro.tokens, micro.cu_seqlens, temperature=1.0, mask=micro.loss_mask,
                                            prefixes=micro.prefixes)
        worst = max(worst, (log_probs - micro.sampler_log_probs)[micro.loss_mask].abs().max().item())
    return worst


def timed(function):
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def decode_case(policy, batch: int, bandwidth: float) -> dict:
    sampler = Sampler(policy, [], max_batch=batch, seed=0, max_len=PROMPT_LEN + LONG)
    prompts = random_prompts(batch, PROMPT_LEN, seed=batch)

    def rollout(count: int, step: int):
        return sampler.generate(prompts, step=step, num_samples=1, max_new_tokens=count, temperature=1.0)

    rollout(SHORT, 0)
    _, short = timed(lambda: rollout(SHORT, 1))
    completions, long = timed(lambda: rollout(LONG, 1))
    rate = batch * (LONG - SHORT) / (long - short)
    least = bytes_per_step(policy.config, batch, PROMPT_LEN + (SHORT + LONG) / 2) / bandwidth
    return {"tokens_per_s": round(rate), "ms_per_step": round(1e3 * batch / rate, 3),
            "roofline_fraction": round(rate * least / batch, 3),
            "max_log_prob_diff": log_prob_difference(policy, completions[:64], shares_prompts=False)}


def prefill_case(policy, batch: int) -> dict:
    sampler = Sampler(policy, [], max_batch=batch, seed=0, max_len=PROMPT_LEN + 1)
    prompts = random_prompts(batch, PROMPT_LEN, seed=batch)
    run = lambda: sampler.generate(prompts, step=0, num_samples=1, max_new_tokens=1, temperature=1.0)  # noqa: E731
    run()
    _, seconds = timed(run)
    return {"tokens_per_s": round(batch * PROMPT_LEN / seconds), "seconds": round(seconds, 4)}


def grpo_step_case(policy, group: int, length: int) -> dict:
    sampler = Sampler(policy, [], max_batch=group, seed=0, max_len=220 + length, shares_prompts=True)
    optimizer = Optimizer(policy.trainable_parameters(), lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                          warmup_steps=0, schedule="constant", decay_steps=None, final_lr_ratio=1.0, max_grad_norm=1.0,
                          total_steps=100)
    set_memory(policy, None)

    def step(index: int) -> dict:
        prompts = random_prompts(1, 220, seed=index)
        completions, rollout = timed(lambda: sampler.generate(prompts, step=index, num_samples=group, max_new_tokens=length,
                                                              temperature=1.0))
        start = time.perf_counter()
        sampler.rest()
        batch = pack(completions, [float(i % 2) - 0.5 for i in range(group)]).to(policy.device)
        micro, = micro_batches(batch, 1 << 20, share_prompts=True)
        log_probs, _ = policy.log_probs(micro.tokens, micro.cu_seqlens, temperature=1.0, mask=micro.loss_mask,
                                        prefixes=micro.prefixes)
        difference = (log_probs.detach() - micro.sampler_log_probs)[micro.loss_mask].abs().max()
        optimizer.backward(-(log_probs * micro.advantages).sum() / micro.num_completion_tokens)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return {"seconds": round(rollout + time.perf_counter() - start, 3), "rollout_s": round(rollout, 3),
                "max_log_prob_diff": difference.item()}

    step(0)
    return step(1)


def run_cases(policy, lora: str, batches: list[int], only: list[str], bandwidth: float) -> None:
    cases = [("decode", batch, partial(decode_case, policy, batch, bandwidth)) for batch in batches]
    cases.append(("prefill", 32, partial(prefill_case, policy, 32)))
    if lora != "none":
        cases.append(("grpo_step", 8, partial(grpo_step_case, policy, 8, 512)))
    for what, batch, function in cases:
        if what not in only:
            continue
        line = {"what": what, "batch": batch, "lora": lora}
        try:
            line |= function()
        except Exception as error:  # noqa: BLE001  (the other cases are worth their time)
            line["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        print(json.dumps(line | {"gpu": torch.cuda.get_device_name()}), flush=True)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a gpt-oss checkpoint")
    parser.add_argument("--lora", nargs="+", choices=["none", *TARGETS], default=["all", "none"], help="what carries adapters")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="of decode")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    bandwidth = 1e9 * copy_gb_per_s()
    print(json.dumps({"what": "copy", "GB_per_s": round(bandwidth / 1e9), "gpu": torch.cuda.get_device_name(),
                      "torch": torch.__version__}), flush=True)
    for lora in arguments.lora:
        policy = load_policy(arguments.checkpoint, lora="all" if lora == "none" else lora)
        with policy.adapter_disabled() if lora == "none" else nullcontext():
            run_cases(policy, lora, arguments.batches, arguments.only, bandwidth)
        del policy
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
