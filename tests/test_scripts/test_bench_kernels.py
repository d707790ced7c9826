"""The kernel benchmark: its counts of work, its table, and every case once in Triton's interpreter, against its peer."""

import json
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

# every case at tiny sizes; then one whose kernel is off by a thousandth, and other block sizes
IN_THE_INTERPRETER = """
import os, sys
sys.path[:0] = ["scripts", "tests", "tests/test_kernels"]
os.environ["TRITON_INTERPRET"] = "1"
import pytest
from interpreter import save_time
save_time(pytest.MonkeyPatch())
import bench_kernels
all_right = bench_kernels.main(["--size", "tiny", "--json", sys.argv[1] + "/all.json"])
import kernel_cases
rotate_ = kernel_cases.rotate_
kernel_cases.rotate_ = lambda q, k, *angles, **settings: (rotate_(q, k, *angles, **settings), q.mul_(1.001))
is_wrong = bench_kernels.main(["--size", "tiny", "--only", "rope backward,norm of", "--json", sys.argv[1] + "/wrong.json"])
bench_kernels.main(["--size", "tiny", "--only", "experts LoRA act A2", "--blocks", "32x32x32x1x4x1x1x1", "--no-peers",
                    "--json", sys.argv[1] + "/blocks.json"])
sys.exit(10 * all_right + is_wrong)
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The exit codes' sum, and the lines of the three runs without their ceilings."""
    folder = tmp_path_factory.mktemp("bench")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", IN_THE_INTERPRETER, folder], cwd=ROOT, env=environment, capture_output=True,
                          text=True)
    assert (folder / "blocks.json").exists(), done.stderr[-3000:]
    return done.returncode, *(json.loads((folder / f"{name}.json").read_text())[1:] for name in ("all", "wrong", "blocks"))


@pytest.mark.slow
def test_every_case_computes_what_its_peer_does(measured):
    code, lines, _, _ = measured
    assert [line for line in lines if "error" in line or not line.get("is_right", True)] == [] and code // 10 == 0
    unchecked = {line["what"] for line in lines if "is_right" not in line}
    assert unchecked == {"layer windowed LoRA forward", "layer windowed LoRA step", "layer windowed full training forward",
                         "layer windowed full training step", *(f"attention {layer} {kernel} 2 of 5 and 9" for kernel in
                                                                ("dq", "dkv") for layer in ("full", "windowed"))}
    groups = {line["what"].split()[0] for line in lines}
    assert groups == {"attention", "combine", "decode", "dense", "dequantize", "embedding", "experts", "head", "layer", "norm",
                      "rope", "route", "router", "swiglu"}
    assert len(lines) > 60


@pytest.mark.slow
def test_a_kernel_that_is_off_by_a_thousandth_is_wrong(measured):
    code, _, lines, _ = measured
    assert {line["what"]: line["is_right"] for line in lines} == {
        "norm of sum": True, "norm of sum backward": True, "norm of sum backward full": True, "rope backward": False}
    assert lines[-1]["relative_error"] == pytest.approx(1e-3, rel=0.01) and code % 10 == 1


@pytest.mark.slow
def test_other_block_sizes_are_a_line_of_their_own(measured):
    default, other = measured[3]
    assert "blocks" not in default and other["blocks"] == "32x32x32x1x4x1x1x1" and other["has_same_bits"] is True
    assert "peer" not in default


def test_the_roofline_is_the_slower_of_products_and_memory(scripts):
    from bench_kernels import rates
    from kernel_cases import Work
    from timing import Ceilings

    ceilings = Ceilings(tflops=500.0, gb_per_s=4000.0)
    # 1e12 operations take 2 ms at 500 TFLOP/s, 4e9 bytes 1 ms at 4,000 GB/s
    line = rates(Work([], 1e12, 4e9), 2.5, ceilings)
    assert (line["roofline_ms"], line["lost_ms"], line["fraction"], line["bound"]) == (2.0, 0.5, 0.8, "compute")
    assert (line["TFLOP/s"], line["GB/s"]) == (400.0, 1600.0)
    line = rates(Work([], 1e12, 16e9), 5.0, ceilings)
    assert (line["roofline_ms"], line["lost_ms"], line["fraction"], line["bound"]) == (4.0, 1.0, 0.8, "memory")


def test_the_table_starts_with_the_most_time_lost_and_ends_with_failures(scripts):
    from bench_kernels import table

    def line(what, ms, least, **others):
        return {"what": what, "ms": ms, "roofline_ms": least, "lost_ms": ms - least, "fraction": least / ms, "bound": "memory",
                "TFLOP/s": 0.0, "GB/s": 100.0, **others}

    lines = [{"what": "broken", "error": "RuntimeError: no"}, line("slow but near", 9.0, 8.8), line("quick, far", 1.0, 0.1),
             {"what": "ceilings", "tflops": 700}, line("fine", 0.5, 0.5, is_right=False, relative_error=0.5)]
    rows = table(lines)
    assert [row.split("  ")[0] for row in rows[1:]] == ["quick, far", "slow but near", "fine", "broken"]
    assert rows[3].endswith("WRONG by 0.5")


def test_work_of_products_and_attention_at_20b_shapes(scripts):
    from kernel_cases import FLOPS_PER_PAIR, size_of

    assert FLOPS_PER_PAIR == {"forward": 4, "dq": 6, "dkv": 8, "backward": 10}
    assert size_of(torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(2)) == 38


@pytest.mark.parametrize("size, num_experts", [("20b", 32), ("120b", 128)])
def test_the_table_has_the_cases_of_a_model(scripts, capsys, size, num_experts):
    import bench_kernels
    from kernel_cases import sizes_of

    assert sizes_of(size, "cpu").config.num_local_experts == num_experts
    assert bench_kernels.main(["--size", size, "--list", "--only", "attention full forward,experts few whole LoRA"]) == 0
    names = [line[:48].strip() for line in capsys.readouterr().out.splitlines()]
    assert "attention full forward 1 x 32768" in names
    assert names[-5:] == [f"experts few whole LoRA {rows}" for rows in (1, 8, 32, 128, 512)]


def test_a_graph_goes_through_whole_layers_though_few_rows_touch_a_part_of_their_experts(scripts):
    from kernel_cases import sizes_of

    sizes = sizes_of("20b", "cpu")
    bytes_of_four = 4 * (5760 + 2880) * 2880 * 17 / 32  # experts; 17 bytes for 32 weights
    counts = [sizes.num_layers(num_bytes) for num_bytes in (bytes_of_four, 8 * bytes_of_four, 1000.5)]
    assert counts == [6, 2, 24] and {type(count) for count in counts} == {int}


def test_a_failing_case_becomes_a_line_and_the_run_goes_on(scripts, capsys):
    from timing import Report

    report = Report()
    assert report.guarded("division", lambda: 1 / 0, size=3) is None
    assert report.guarded("division", lambda: 6 / 3) == 2
    report("done", ms=1.5)
    failed = {"what": "division", "size": 3, "error": "ZeroDivisionError: division by zero"}
    assert report.lines == [failed, {"what": "done", "ms": 1.5}]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == report.lines


def test_relative_errors(scripts):
    from timing import relative_error

    exact = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(exact, torch.zeros(2)) == torch.inf
    assert relative_error(torch.tensor([3.0, torch.nan]), exact) == torch.inf
