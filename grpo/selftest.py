"""python -m grpo.train +experiment=selftest: whether this machine and this code compute what they should, PASS or FAIL.

What the machine is and reaches, measured; the tests that hold kernels, gradients, sampler, update and plans, check by check;
beside them the experiment's run, whose curve must lie within its bands (selftest.bands). Exit code 0 or 1, or that of the run.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch

from grpo.config import ConfigError, TrainConfig, run_folder
from grpo.configuration.sweeps import PREEMPTED
from grpo.distributed.place import check_alone
from models.config import released
from models.expert_store import layer_bytes
from models.experts import FORMATS
from models.memory_plan import embedding_parameters, rest_parameters
from models.rates import copy_rate, product_rate

ROOT = Path(__file__).resolve().parent.parent
_CHECK_SECONDS = 600  # for the tests of a check
# share of reading each touched weight once at the measured speed of copies that decoding reached on an H200, by rows
_REACHED = {1: 0.43, 8: 0.61, 32: 0.66, 128: 0.55}


# A program that ends the process groups it was told, less those told as negative, once nobody can tell it more
_GUARD = """
import os, signal, sys
numbers = {int(line) for line in sys.stdin}
for number in numbers:
    if number > 0 and -number not in numbers:
        try:
            os.killpg(number, signal.SIGKILL)
        except ProcessLookupError:
            pass
"""


class Check(NamedTuple):
    name: str
    files: tuple[str, ...]  # under tests/
    needs_gpu: bool = False
    only: str = ""  # which of their tests, as pytest's -k has it


CHECKS = (
    Check("goldens: logits, log-probs, gradients of transformers", (
        "test_models/test_gpt_oss.py", "test_models/test_lora.py", "test_models/test_yarn.py")),
    Check("kernels against float64", (
        "test_kernels/attention/test_packed.py", "test_kernels/attention/test_decode.py", "test_kernels/experts/test_gemm.py",
        "test_kernels/experts/test_sorting.py", "test_kernels/head/test_log_probs.py", "test_kernels/packed/test_mxfp4.py",
        "test_kernels/packed/test_nf4.py", "test_kernels/test_norm.py", "test_kernels/test_rope.py",
        "test_kernels/test_swiglu.py", "test_kernels/test_linear.py")),
    Check("sampler = trainer", (
        "test_grpo/rollout/test_shared_prompts.py", "test_grpo/test_exactness.py", "test_grpo/test_batch.py")),
    Check("gradients of every estimator, by enumeration", ("test_grpo/test_policy_gradient.py",)),
    Check("the update, restated", ("test_grpo/test_update.py",)),
    Check("the KL's reference, through runs and resumes", ("test_grpo/test_kl.py",)),
    Check("losses, advantages, optimizer", (
        "test_grpo/test_losses.py", "test_grpo/test_advantages.py", "test_grpo/test_optim.py", "test_grpo/test_groups.py")),
    Check("plans of memory, the warm-up's cache, limits of keys", (
        "test_models/test_memory_plan.py", "test_models/test_offload.py", "test_grpo/test_warmup.py",
        "test_grpo/configuration/test_config.py")),
    Check("on the GPU: goldens, a run", ("test_grpo/test_gpu.py",), True, "goldens or on_cuda"),
    Check("on the GPU: sampler = trainer", ("test_grpo/test_gpu.py",), True,
          "sampled_log_probs or kept_sets or preempted or rows_that_park or by_a_graph"),
    Check("on the GPU: batches, graphs, streamed experts", ("test_grpo/test_gpu.py",), True,
          "any_batch or shows_in_the_next or steps_between or wait_for_each_other"),
    Check("on the GPU: attention in training", ("test_kernels/attention/test_packed_triton.py",), True),
    Check("on the GPU: attention in decoding", ("test_kernels/attention/test_decode_triton.py",), True),
    Check("on the GPU: experts", (
        "test_kernels/experts/test_forward_triton.py", "test_kernels/packed/test_mxfp4_triton.py"), True),
    Check("on the GPU: log-probs", ("test_kernels/head/test_log_probs_triton.py",), True),
    Check("on the GPU: draws, optimizer", (
        "test_kernels/head/test_sampling_triton.py", "test_kernels/test_adamw.py"), True),
)


def run_selftest(config: TrainConfig, run_training: Callable[[TrainConfig], int]) -> int:
    """All three parts; the run goes on beside the checks, in a folder that is deleted at the end. Returns the exit code. Raises
    ConfigError where a band is no band, the tests are not beside the code, or several processes were started."""
    check_alone("grpo.train +experiment=selftest")
    for name, ends in config.selftest.bands.items():
        is_pair = isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
        if not re.fullmatch(r".+@\d+", name) or not is_pair or ends[0] > ends[1]:
            raise ConfigError(f"selftest.bands.{name} = {ends}: write METRIC@STEP: [LEAST, LARGEST]")
    if not (ROOT / "tests").is_dir():
        raise ConfigError("selftest: the tests are not installed with the package; run it in a checkout of the repository")
    print(*hardware_report(), sep="\n", flush=True)
    checks = [check for check in CHECKS if torch.cuda.is_available() or not check.needs_gpu]
    with running(checks) as report, tempfile.TemporaryDirectory() as folder:
        config = replace(config, output_dir=folder)
        code = run_training(config)
        if code == PREEMPTED:
            return code
        failures = report()
        if code != 0:
            return code
        lines = (run_folder(config) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    failures += check_bands([json.loads(line) for line in lines], config.selftest.bands)
    print(f"selftest FAIL: {'; '.join(failures)}" if failures else "selftest PASS", flush=True)
    return 1 if failures else 0


@contextmanager
def running(checks: list[Check]) -> Iterator[Callable[[], list[str]]]:
    """Inside the `with`, the checks' tests run, as many at a time as there are cores. What it yields waits for them, prints a
    line for each check and what failed in it, and returns the names of those that failed. At the end, at Ctrl-C and at SIGTERM
    none begins any more and those that run are ended; so they are if this process goes without a word."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    width, lock = max(len(check.name) for check in checks), Lock()
    pool = ThreadPoolExecutor(max_workers=min(cores, 16))
    guard = subprocess.Popen([sys.executable, "-c", _GUARD], stdin=subprocess.PIPE, text=True, start_new_session=True)

    def tell(number: int) -> None:
        with lock:
            if not guard.stdin.closed:
                print(number, file=guard.stdin, flush=True)

    @contextmanager
    def begin(command: list[str]) -> Iterator[subprocess.Popen]:
        with lock:  # so that none begins after the others were ended
            if guard.stdin.closed:
                raise InterruptedError
            # in a session of its own: its tests' programs are ended with it
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                       start_new_session=True)
            print(process.pid, file=guard.stdin, flush=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            tell(-process.pid)

    def report() -> list[str]:
        failed = []
        for check in checks:
            passed, detail = futures[check].result()
            print(f"{'PASS' if passed else 'FAIL'}  {check.name:{width}}  {detail}", flush=True)
            failed += [] if passed else [check.name]
        return failed

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        # those of the GPU begin first: they wait for kernels to compile
        futures = {check: pool.submit(_run, check, begin) for check in sorted(checks, key=lambda check: not check.needs_gpu)}
        yield report
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        with lock:
            guard.stdin.close()
        guard.wait()
        signal.signal(signal.SIGTERM, before)


def _run(check: Check, begin: Callable[[list[str]], AbstractContextManager[subprocess.Popen]]) -> tuple[bool, str]:
    """Whether a check's tests pass, and in words how many did or which did not."""
    started = time.perf_counter()
    with begin([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-m",
                "gpu" if check.needs_gpu else "not gpu and not slow", "-k", check.only,
                *(f"tests/{file}" for file in check.files)]) as process:
        try:
            output = process.communicate(timeout=_CHECK_SECONDS)[0]
        except subprocess.TimeoutExpired:
            return False, f"not done after {_CHECK_SECONDS} s"
    seconds, lines = time.perf_counter() - started, output.strip().splitlines() or ["no output"]
    count = re.search(r"(\d+) passed", lines[-1])
    if process.returncode == 0 and count:
        return True, f"{count[1]} tests, {seconds:.0f} s"
    return False, "\n      ".join([lines[-1], *(line for line in lines if line.startswith(("FAILED", "ERROR", "E ")))][:12])


def check_bands(metrics: list[dict], bands: dict[str, list[float]]) -> list[str]:
    """Prints each band with what was measured, the last value of its step; returns the names of those that it lies outside of, or
    that were not measured."""
    outside = []
    for name, (low, high) in bands.items():
        metric, _, step = name.rpartition("@")
        values = [line[metric] for line in metrics if line.get("step") == int(step) and line.get(metric) is not None]
        inside = bool(values) and low <= values[-1] <= high
        measured = f"{values[-1]:.3f}" if values else "not measured"
        print(f"{'PASS' if inside else 'FAIL'}  {metric} at step {step}: {measured}, expected {low:g} to {high:g}", flush=True)
        outside += [] if inside else [name]
    return outside


def hardware_report() -> list[str]:
    """What this machine is and reaches, in lines; on a GPU also what decoding gpt-oss should reach there."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    lines = [f"python {sys.version.split()[0]}, torch {torch.__version__}, {cores} cores, {threads} threads"]
    if not torch.cuda.is_available():
        product, copy = _rates(torch.device("cpu"), torch.float32)
        return [*lines, f"CPU: float32 products {product / 1e9:,.0f} GFLOP/s, copies {copy / 1e9:.1f} GB/s (read and written)"]
    for index in range(torch.cuda.device_count()):
        device, gpu = torch.device("cuda", index), torch.cuda.get_device_properties(index)
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        product, copy = _rates(device, dtype)
        lines.append(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
                     f"{gpu.total_memory / 1e9:.1f} GB: {str(dtype).removeprefix('torch.')} products "
                     f"{product / 1e12:,.0f} TFLOP/s, copies {copy / 1e9:,.0f} GB/s (read and written)")
        speeds = {rows: share * decode_ceiling(rows, copy) for rows, share in _REACHED.items()}
        lines.append("  gpt-oss-20b in MXFP4 should sample about " + ", ".join(
            f"{speed:,.0f} tokens/s with {rows} row{'s' * (rows > 1)}" for rows, speed in speeds.items())
            + " (the shares of reading its weights once a step that an H200 reached)")
    return lines


def decode_ceiling(rows: int, bytes_per_second: float) -> float:
    """Tokens per second of gpt-oss-20b in MXFP4 where a step only reads each touched weight once: all of attention and head, and
    the experts that a choice of 4 of 32 for each row touches, in the mean of choices that are independent."""
    config, dtype = released("openai/gpt-oss-20b"), torch.bfloat16
    dense = (rest_parameters(config) + embedding_parameters(config)) * dtype.itemsize
    experts = config.num_hidden_layers * layer_bytes(config, FORMATS["mxfp4"], dtype)
    touched = 1 - (1 - config.num_experts_per_tok / config.num_local_experts) ** rows
    return rows * bytes_per_second / (dense + experts * touched)


def _rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP per second of products, and bytes per second of copies, read and written ones together."""
    return product_rate(device, dtype), 2 * copy_rate(device, 1 << (30 if device.type == "cuda" else 26))


if __name__ == "__main__":  # an end in silence would look like PASS
    sys.exit(__doc__.partition("\n")[0])
