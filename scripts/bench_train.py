"""Times the forward and backward of a LoRA training step, log-probs and entropy included, on one GPU.

    python scripts/random_checkpoint.py /dev/shm/gpt-oss-20b --size 20b --dtype mxfp4
    python scripts/bench_train.py --checkpoint /dev/shm/gpt-oss-20b --lora all attention

A case is BATCHxLENGTH, in which nothing is recomputed, or BATCHxLENGTH@GB: within so much GPU memory (1e9 bytes) layers keep what
fits, copy more of it to pinned host memory (--host-gb, which takes the input embedding too) and compute the rest again.

One JSON line per case. tokens_per_s: all tokens of the batch over the median time of the timed steps. peak_gb: the most
memory torch reserved, in 1e9 bytes, warm-up included. flop_fraction: the arithmetic of the step (products with the base's
weights, forward and for the gradient of their inputs, and causal attention forward and backward; neither LoRA's own nor
anything recomputed) over the rate of an 8192^3 bf16 product measured first. Tokens are random and every one but each sequence's
first is scored; the adapter's B is not zero, so that A has a gradient too.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # reserves what it needs, not segments of it

import torch
from timing import Report, measure_ceilings, median_ms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.config import GptOssConfig  # noqa: E402
from models.formats.hugging_face import load_model  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402
from models.lora import LoraConfig, attach_lora  # noqa: E402

# those within a budget first: a process that keeps everything leaves small tensors all over its memory
CASES = ("4x2048@18", "1x8192@18", "1x16384@20", "1x32768@24", "1x131072@60", "1x2048", "4x2048")
TARGETS = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
           "all": ["q_proj", "k_proj", "v_proj", "o_proj", "experts"]}
MAX_TOKEN = 199_998  # control tokens start here


class Case(NamedTuple):
    batch: int
    length: int
    memory_gb: float | None  # None: nothing is recomputed


def load_policy(checkpoint: Path, *, lora: str, rank: int = 16, host_gb: float = 0.0, device: str = "cuda",
                dtype: torch.dtype = torch.bfloat16) -> GptOss:
    """The model with an adapter as in the middle of a training run."""
    policy = load_model(checkpoint, device=device, dtype=dtype, host_gb=host_gb)
    attach_lora(policy, LoraConfig(rank=rank, alpha=2.0 * rank, targets=TARGETS[lora]), seed=0)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.01, generator=generator)
    return policy


def random_batch(policy: GptOss, batch: int, length: int) -> dict[str, torch.Tensor]:
    """`batch` packed sequences of `length` random tokens, with an advantage for each token; bounds and mask on the host."""
    device, num_tokens = policy.device, batch * length
    generator = torch.Generator(device).manual_seed(num_tokens)
    tokens = torch.randint(0, min(policy.config.vocab_size, MAX_TOKEN), (num_tokens,), generator=generator, device=device)
    mask = torch.ones(num_tokens, dtype=torch.bool)
    mask[::length] = False
    return {"tokens": tokens, "cu_seqlens": torch.arange(batch + 1, dtype=torch.int32) * length, "mask": mask,
            "advantages": torch.randn(num_tokens, generator=generator, device=device)}


def train_step(policy: GptOss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A policy gradient of one batch, entropy as a metric. Returns the mean entropy, on the device."""
    log_probs, entropy = policy.log_probs(batch["tokens"], batch["cu_seqlens"], temperature=1.0, mask=batch["mask"])
    loss = -(log_probs * batch["advantages"]).sum() / int(batch["mask"].sum())
    loss.backward()
    return entropy.detach().mean()


def flops_per_token(config: GptOssConfig, length: int, *, trains_base: bool = False) -> float:
    """Floating-point operations of a step, per token of a sequence of `length`: products with the base's weights forward, for
    the gradient of their inputs and, where the base trains, for their own."""
    width, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    layer = width * (q_width + 2 * kv_width) + q_width * width + width * config.num_local_experts
    layer += config.num_experts_per_tok * 3 * width * inner
    weights = config.num_hidden_layers * layer + width * config.vocab_size
    pairs = 0.0  # keys that an average token sees, summed over layers
    for index in range(config.num_hidden_layers):
        window = min(config.sliding_window, length) if config.is_windowed(index) else length
        pairs += (window * (window + 1) / 2 + (length - window) * window) / length
    attention = 2 * 2 * q_width * pairs  # scores and values
    return (3 if trains_base else 2) * 2 * weights + 3.5 * attention  # attention: two products forward, five backward


def set_memory(policy: GptOss, memory_gb: float | None) -> None:
    """From now on the policy trains within so much GPU memory, or recomputes nothing."""
    policy.memory.recomputes, policy.memory.memory_gb = memory_gb is not None, memory_gb


def run_case(policy: GptOss, case: Case, *, iterations: int) -> dict[str, float]:
    """Milliseconds, reserved and allocated peaks of one case."""
    set_memory(policy, case.memory_gb)
    for parameter in policy.trainable_parameters().values():
        parameter.grad = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batch = random_batch(policy, case.batch, case.length)

    def step() -> None:
        for parameter in policy.trainable_parameters().values():
            parameter.grad = None
        train_step(policy, batch)

    is_long = case.batch * case.length > 65_536
    ms = median_ms(step, warmup=1 if is_long else 2, iterations=1 if is_long else iterations)
    for name, parameter in policy.trainable_parameters().items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{name}: no finite gradient"
    return {"ms": ms, "peak_gb": torch.cuda.max_memory_reserved() / 1e9, "allocated_gb": torch.cuda.max_memory_allocated() / 1e9}


def parse_case(text: str) -> Case:
    sizes, _, memory_gb = text.partition("@")
    batch, length = sizes.split("x")
    return Case(int(batch), int(length), float(memory_gb) if memory_gb else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a gpt-oss checkpoint")
    parser.add_argument("--lora", nargs="+", choices=list(TARGETS), default=["all"], help="what carries adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--cases", nargs="+", type=parse_case, default=[parse_case(case) for case in CASES],
                        metavar="BATCHxLENGTH[@GB]", help=f"default: {' '.join(CASES)}")
    parser.add_argument("--host-gb", type=float, default=48.0,
                        help="pinned host memory for embedding and activations (default: 48)")
    parser.add_argument("--iterations", type=int, default=3, help="timed steps of a case (default: 3; 1 above 65,536 tokens)")
    arguments = parser.parse_args()
    peak_flops, gpu = 1e12 * measure_ceilings(Report()).tflops, torch.cuda.get_device_name()
    for lora in arguments.lora:
        policy = load_policy(arguments.checkpoint, lora=lora, rank=arguments.rank, host_gb=arguments.host_gb)
        for case in arguments.cases:
            line = {"what": "train", "lora": lora, "batch": case.batch, "length": case.length, "memory_gb": case.memory_gb}
            try:
                result = run_case(policy, case, iterations=arguments.iterations)
            except torch.OutOfMemoryError as error:
                print(json.dumps(line | {"error": str(error).split(". ")[0]}), flush=True)
                continue
            rate = case.batch * case.length / result["ms"] * 1e3
            line |= {"tokens_per_s": round(rate), "peak_gb": round(result["peak_gb"], 2),
                     "flop_fraction": round(rate * flops_per_token(policy.config, case.length) / peak_flops, 3),
                     "ms": round(result["ms"], 1), "allocated_gb": round(result["allocated_gb"], 2),
                     "host_gb": arguments.host_gb, "gpu": gpu}
            print(json.dumps(line), flush=True)
        del policy
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
