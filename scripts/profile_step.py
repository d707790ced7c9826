"""Where the time of one training step goes: every kernel with its share, and the share of time the GPU stands idle.

    python scripts/profile_step.py --checkpoint /dev/shm/gpt-oss-20b --case 4x2048@18 --lora all

Two consecutive steps are recorded after a warm-up (scripts/bench_train.py has the step), the last part of which the profiler
sees already: its own start takes some 40 ms. Figures are per step. Idle is the time between the first kernel's start and the last
one's end in which no kernel, copy or fill ran. The profiler itself slows a step that waits for the host; `--trace FILE` keeps the
timeline for a trace viewer.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from bench_train import TARGETS, load_policy, parse_case, random_batch, set_memory, train_step

GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
STEPS = 2


def record(policy, batch: dict[str, torch.Tensor], trace: Path) -> None:
    """Writes the timeline of STEPS steps."""
    for _ in range(2):
        train_step(policy, batch)
    with torch.profiler.profile(schedule=torch.profiler.schedule(wait=0, warmup=1, active=STEPS, repeat=1),
                                on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace))) as profiler:
        for number in range(1 + STEPS):
            for parameter in policy.trainable_parameters().values():
                parameter.grad = None
            train_step(policy, batch)
            if policy.device.type == "cuda" and number in (0, STEPS):  # nothing of another step is on the timeline
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a gpt-oss checkpoint")
    parser.add_argument("--lora", choices=list(TARGETS), default="all")
    parser.add_argument("--case", type=parse_case, default=parse_case("4x2048"), metavar="BATCHxLENGTH[@GB]",
                        help="default: 4x2048; scripts/bench_train.py says what it means")
    parser.add_argument("--host-gb", type=float, default=48.0,
                        help="pinned host memory for embedding and activations (default: 48)")
    parser.add_argument("--rows", type=int, default=40, help="kernels listed (default: 40)")
    parser.add_argument("--trace", type=Path, help="keep the timeline in this file")
    arguments = parser.parse_args()
    policy = load_policy(arguments.checkpoint, lora=arguments.lora, host_gb=arguments.host_gb)
    batch, length, memory_gb = arguments.case
    set_memory(policy, memory_gb)
    with tempfile.TemporaryDirectory() as folder:
        trace = arguments.trace or Path(folder) / "trace.json"
        record(policy, random_batch(policy, batch, length), trace)
        span, idle, table = summarize(json.loads(trace.read_text())["traceEvents"])
    print(f"{torch.cuda.get_device_name()}, {batch}x{length}, budget {memory_gb} GB, lora {arguments.lora}: "
          f"{span / STEPS / 1e3:.1f} ms per step, idle {idle / span:.1%}")
    print(f"{'ms':>9} {'share':>6} {'count':>6}  kernel")
    for name, count, time in table[:arguments.rows]:
        print(f"{time / STEPS / 1e3:9.3f} {time / span:6.1%} {count / STEPS:6.0f}  {name[:110]}")
    rest = sum(time for _, _, time in table[arguments.rows:])
    print(f"{rest / STEPS / 1e3:9.3f} {rest / span:6.1%} {'':6}  {len(table[arguments.rows:])} others")
    print(json.dumps({"what": "profile", "lora": arguments.lora, "batch": batch, "length": length, "memory_gb": memory_gb,
                      "gpu": torch.cuda.get_device_name(), "ms": round(span / STEPS / 1e3, 2), "idle": round(idle / span, 4),
                      "kernels": {name[:60]: round(time / span, 4) for name, _, time in table[:12]}}))


if __name__ == "__main__":
    main()
