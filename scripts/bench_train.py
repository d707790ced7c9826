"""Times the forward and backward of a LoRA training step, log-probs and entropy included, on one GPU.

    python scripts/random_checkpoint.py /dev/shm/gpt-oss-20b --size 20b --dtype mxfp4
    python scripts/bench_train.py --checkpoint /dev/shm/gpt-oss-20b --lora all attention [--json FILE]
    python scripts/bench_train.py --checkpoint /dev/shm/gpt-oss-20b --cases 4x2048@18 --profile 40 [--trace FILE]

A case is BATCHxLENGTH, in which nothing is recomputed, or BATCHxLENGTH@GB: within so much GPU memory (1e9 bytes) layers keep what
fits, copy more of it to pinned host memory (--host-gb, which takes the input embedding too) and compute the rest again.

One JSON line per case. tokens_per_s: all tokens of the batch over the median time of the timed steps. peak_gb: the most
memory torch reserved, in 1e9 bytes, warm-up included. flop_fraction: the arithmetic of the step (products with the base's
weights, forward and for the gradient of their inputs, and causal attention forward and backward; neither LoRA's own nor
anything recomputed) over the rate of an 8192^3 bf16 product measured first. Tokens are random and every one but each sequence's
first is scored; the adapter's B is not zero, so that A has a gradient too.

--profile N: instead, where the time of a step goes. Two consecutive steps are recorded after a warm-up, the last part of which
the profiler sees already: its own start takes some 40 ms. Figures are per step: the N longest kernels with their shares, and
idle, the time between the first kernel's start and the last one's end in which no kernel, copy or fill ran. The profiler itself
slows a step that waits for the host; --trace keeps the timeline of the last case for a trace viewer.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # reserves what it needs, not segments of it

import torch
from random_policy import TARGETS, load_policy, num_tokens, set_memory
from timing import Report, device_name, measure_ceilings, median_ms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.config import GptOssConfig  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402

# those within a budget first: a process that keeps everything leaves small tensors all over its memory
CASES = ("4x2048@18", "1x8192@18", "1x16384@20", "1x32768@24", "1x131072@60", "1x2048", "4x2048")
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
PROFILED_STEPS = 2


class Case(NamedTuple):
    batch: int
    length: int
    memory_gb: float | None  # None: nothing is recomputed


def parse_case(text: str) -> Case:
    sizes, _, memory_gb = text.partition("@")
    batch, length = sizes.split("x")
    return Case(int(batch), int(length), float(memory_gb) if memory_gb else None)


def random_batch(policy: GptOss, batch: int, length: int) -> dict[str, torch.Tensor]:
    """`batch` packed sequences of `length` random tokens, with an advantage for each token; bounds and mask on the host."""
    device, count = policy.device, batch * length
    generator = torch.Generator(device).manual_seed(count)
    tokens = torch.randint(0, num_tokens(policy), (count,), generator=generator, device=device)
    mask = torch.ones(count, dtype=torch.bool)
    mask[::length] = False
    return {"tokens": tokens, "cu_seqlens": torch.arange(batch + 1, dtype=torch.int32) * length, "mask": mask,
            "advantages": torch.randn(count, generator=generator, device=device)}


def train_step(policy: GptOss, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A policy gradient of one batch, entropy as a metric, in place of the gradients before. Returns the mean entropy, on the
    device."""
    for parameter in policy.trainable_parameters().values():
        parameter.grad = None
    log_probs, entropy = policy.log_probs(batch["tokens"], batch["cu_seqlens"], temperature=1.0, mask=batch["mask"])
    loss = -(log_probs * batch["advantages"]).sum() / int(batch["mask"].sum())
    loss.backward()
    return entropy.detach().mean()


def flops_per_token(config: GptOssConfig, length: int, *, trains_base: bool = False, with_backward: bool = True) -> float:
    """Floating-point operations of a step, per token of a sequence of `length`: products with the base's weights forward, for
    the gradient of their inputs and, where the base trains, for their own; or of its forward alone."""
    width, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.q_width, config.kv_width
    layer = width * (q_width + 2 * kv_width) + q_width * width + width * config.num_local_experts
    layer += config.num_experts_per_tok * 3 * width * inner
    weights = config.num_hidden_layers * layer + width * config.vocab_size
    pairs = 0.0  # keys that an average token sees, summed over layers
    for index in range(config.num_hidden_layers):
        window = min(config.sliding_window, length) if config.is_windowed(index) else length
        pairs += (window * (window + 1) / 2 + (length - window) * window) / length
    attention = 2 * 2 * q_width * pairs  # scores and values
    if not with_backward:
        return 2 * weights + attention
    return (3 if trains_base else 2) * 2 * weights + 3.5 * attention  # attention: two products forward, five backward


def time_case(policy: GptOss, case: Case, iterations: int, peak_tflops: float) -> dict[str, float]:
    batch = random_batch(policy, case.batch, case.length)
    torch.cuda.reset_peak_memory_stats()
    is_long = case.batch * case.length > 65_536
    ms = median_ms(lambda: train_step(policy, batch), warmup=1 if is_long else 2, iterations=1 if is_long else iterations)
    for name, parameter in policy.trainable_parameters().items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{name}: no finite gradient"
    rate = case.batch * case.length / ms * 1e3
    return {"tokens_per_s": round(rate), "peak_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
            "flop_fraction": round(rate * flops_per_token(policy.config, case.length) / peak_tflops / 1e12, 3),
            "ms": round(ms, 1), "allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}


# ------------------------------------------------------------------------------------------------------------------ profile


def record(policy: GptOss, batch: dict[str, torch.Tensor], trace: Path) -> None:
    """Writes the timeline of PROFILED_STEPS steps."""
    for _ in range(2):
        train_step(policy, batch)
    with torch.profiler.profile(schedule=torch.profiler.schedule(wait=0, warmup=1, active=PROFILED_STEPS, repeat=1),
                                on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace))) as profiler:
        for number in range(1 + PROFILED_STEPS):
            train_step(policy, batch)
            if policy.device.type == "cuda" and number in (0, PROFILED_STEPS):  # nothing of another step is on the timeline
                torch.cuda.synchronize()
            profiler.step()


def summarize(events: list[dict]) -> tuple[float, float, list[tuple[str, int, float]]]:
    """Span and idle time of a timeline's GPU events, and (name, count, time) of every kernel, longest first; microseconds."""
    gpu = sorted((event for event in events if event.get("cat") in GPU_CATEGORIES), key=lambda event: event["ts"])
    assert gpu, "the timeline holds no GPU events"
    kernels: dict[str, list[float]] = defaultdict(list)
    idle, end = 0.0, gpu[0]["ts"]
    for event in gpu:
        kernels[event["name"]].append(event["dur"])
        idle += max(0.0, event["ts"] - end)
        end = max(end, event["ts"] + event["dur"])
    table = [(name, len(times), sum(times)) for name, times in kernels.items()]
    return end - gpu[0]["ts"], idle, sorted(table, key=lambda row: -row[2])


def profile_case(policy: GptOss, case: Case, num_rows: int, trace: Path | None) -> dict:
    """Prints the table of a case's kernels, and returns its summary."""
    with tempfile.TemporaryDirectory() as folder:
        file = trace or Path(folder) / "trace.json"
        record(policy, random_batch(policy, case.batch, case.length), file)
        span, idle, table = summarize(json.loads(file.read_text())["traceEvents"])
    print(f"{'ms':>9} {'share':>6} {'count':>6}  kernel")
    others = f"{max(len(table) - num_rows, 0)} others", "", sum(time for _, _, time in table[num_rows:])
    for name, count, time in [*table[:num_rows], others]:
        print(f"{time / PROFILED_STEPS / 1e3:9.3f} {time / span:6.1%} {count and count // PROFILED_STEPS:>6}  {name[:110]}")
    return {"ms": round(span / PROFILED_STEPS / 1e3, 2), "idle": round(idle / span, 4),
            "kernels": {name[:60]: round(time / span, 4) for name, _, time in table[:12]}}


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
    parser.add_argument("--profile", type=int, metavar="N", help="list the N longest kernels instead")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="with --profile: keep the timeline of the last case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all lines there, too")
    arguments = parser.parse_args()
    report, what = Report(), "train" if arguments.profile is None else "profile"
    peak_tflops = measure_ceilings(report).tflops
    for lora in arguments.lora:
        policy = load_policy(arguments.checkpoint, lora=lora, rank=arguments.rank, host_gb=arguments.host_gb)
        for case in arguments.cases:
            set_memory(policy, case.memory_gb)
            policy.zero_grad()
            torch.cuda.empty_cache()
            try:
                found = (time_case(policy, case, arguments.iterations, peak_tflops) if what == "train" else
                         profile_case(policy, case, arguments.profile, arguments.trace))
            except torch.OutOfMemoryError as error:
                found = {"error": str(error).split(". ")[0]}
            report(what, lora=lora, **case._asdict(), **found, host_gb=arguments.host_gb, gpu=device_name())
        del policy
        torch.cuda.empty_cache()
    report.write(arguments.json)


if __name__ == "__main__":
    main()
