"""The kernel benchmark: its counts of work, its table, and every case once in Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

# runs the cases of every group at tiny sizes: "cuda" means the CPU, where the interpreter serves the kernels
IN_THE_INTERPRETER = """
import sys
sys.path[:0] = ["scripts", "tests/test_kernels"]
import torch
from interpreter import save_time
save_time()
from torch.overrides import TorchFunctionMode

class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), settings=None):
        settings = settings or {}
        return function(*arguments, **settings | ({"device": "cpu"} if settings.get("device") == "cuda" else {}))

generator = torch.Generator
torch.Generator = lambda device="cpu": generator("cpu")
import bench_attention, bench_elementwise, bench_grouped_gemm, bench_log_probs
bench_elementwise.WIDTH = bench_grouped_gemm.WIDTH = bench_log_probs.WIDTH = 64
bench_elementwise.EXPERTS = bench_grouped_gemm.NUM_EXPERTS = 4
bench_elementwise.PER_TOKEN = bench_grouped_gemm.EXPERTS_PER_TOKEN = 2
bench_elementwise.HEADS = bench_attention.HEADS = 4
bench_elementwise.KV_HEADS = bench_attention.KV_HEADS = 2
inputs = bench_log_probs.inputs
bench_log_probs.inputs = lambda num_tokens: inputs(num_tokens, vocab=96)
import bench_kernels
bench_kernels.LENGTHS = (20, 40)
bench_kernels.PROJECTIONS = (("q", 64, 96), ("k, v", 64, 32), ("o", 96, 64))
bench_kernels.device_milliseconds = lambda function: (function(), 1.0)[1]
with OnCpu():
    for group in bench_kernels.CASES:
        bench_kernels.REPORT.guarded(group, bench_kernels.time_group, group, 40, bench_kernels.Ceilings(700.0, 4000.0))
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


def test_the_roofline_is_the_slower_of_products_and_memory(scripts):
    from bench_kernels import Case, Ceilings, result

    ceilings = Ceilings(tflops=500.0, gb_per_s=4000.0)
    # 1e12 operations take 2 ms at 500 TFLOP/s, 4e9 bytes 1 ms at 4,000 GB/s
    line = result(Case("x", 1e12, 4e9, print), 2.5, ceilings)
    assert (line["roofline_ms"], line["lost_ms"], line["fraction"], line["bound"]) == (2.0, 0.5, 0.8, "compute")
    assert (line["TFLOP/s"], line["GB/s"]) == (400.0, 1600.0)
    line = result(Case("x", 1e12, 16e9, print), 5.0, ceilings)
    assert (line["roofline_ms"], line["lost_ms"], line["fraction"], line["bound"]) == (4.0, 1.0, 0.8, "memory")


def test_the_table_starts_with_the_most_time_lost_and_ends_with_failures(scripts):
    from bench_kernels import table

    def line(what, ms, least):
        return {"what": what, "ms": ms, "roofline_ms": least, "lost_ms": ms - least, "fraction": least / ms, "bound": "memory",
                "TFLOP/s": 0.0, "GB/s": 100.0}

    lines = [{"what": "broken", "error": "RuntimeError: no"}, line("slow but near", 9.0, 8.8), line("quick, far", 1.0, 0.1),
             {"what": "ceilings", "tflops": 700}, line("fine", 0.5, 0.5)]
    rows = table(lines)
    assert [row.split("  ")[0] for row in rows[1:]] == ["quick, far", "slow but near", "fine", "broken"]


def test_work_of_products_and_attention_at_20b_shapes(scripts):
    from bench_attention import FLOPS_PER_PAIR
    from bench_kernels import attention_bytes, grouped_flops, pair_flops, size_of

    assert FLOPS_PER_PAIR == {"forward": 256, "dq": 384, "dkv": 512, "backward": 640}
    assert pair_flops("dq", 10) == 3840
    # 32,768 rows through gate_up with LoRA of rank 16: 2 (2880 * 5760 + 16 * 5760) operations a row
    assert grouped_flops(32_768, 2880, 5760, 16) == 32_768 * 33_361_920
    # a token: 64 * 64 bf16 values are 8,192 bytes, 8 * 64 are 1,024, a fp32 statistic of 64 heads is 256
    assert attention_bytes("forward", 1) == 2 * 8192 + 2 * 1024 + 256
    assert attention_bytes("dq", 2) == 2 * (4 * 8192 + 2 * 1024 + 3 * 256)
    assert attention_bytes("dkv", 1) == 2 * 8192 + 4 * 1024 + 2 * 256
    assert size_of(torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(2)) == 38


def test_a_failing_case_becomes_a_line_and_the_run_goes_on(scripts, capsys):
    from timing import Report

    report = Report()
    assert report.guarded("division", lambda a, b: a / b, 1, 0) is None
    assert report.guarded("division", lambda a, b: a / b, 6, b=3) == 2
    report("done", ms=1.5)
    assert report.lines == [{"what": "division", "error": "ZeroDivisionError: division by zero"}, {"what": "done", "ms": 1.5}]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == report.lines


def test_relative_errors(scripts):
    from timing import relative_error

    exact = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(exact, torch.zeros(2)) == torch.inf
    assert relative_error(torch.tensor([3.0, torch.nan]), exact) == torch.inf


def test_every_case_runs():
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", IN_THE_INTERPRETER], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in lines if "error" in line] == []
    assert {line["group"] for line in lines} >= {"norm", "products", "low_rank", "attention", "log_probs", "weight_gradients"}
    assert len(lines) > 50
