"""The memory benchmark: its watch of the GPU, and the command of a case."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


@pytest.fixture
def bench_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench_memory

    return bench_memory


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nvidia-smi, which reports 100, 300 and 200 MiB and goes on with 150."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nimport time\nfor n in (100, 300, 200, *([150] * 100)):\n    print(n, flush=True)\n"
                       "    time.sleep(0.05)\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return program


def test_the_watch_keeps_the_most_and_ends_its_process(smi: Path, bench_memory) -> None:
    with bench_memory.GpuWatch() as watch:
        while watch.most < 300:
            assert watch._process.poll() is None
    assert watch.most == 300
    assert watch._process.returncode is not None


def test_a_case_names_budget_lengths_group_and_keys(smi: Path, tmp_path: Path, monkeypatch, bench_memory) -> None:
    commands = []

    def record(command: list[str], **_) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(bench_memory.subprocess, "run", record)
    settings = {"prompt_tokens": 354, "steps": 2, "timeout": 1}
    result = bench_memory.run_case("9.5:1024x4:model.lora.rank=8", Path("model"), tmp_path / "0", **settings)
    assert {"model.memory_gb=9.5", "model.lora.rank=8", "rollout.group_size=4", "rollout.max_new_tokens=670"} <= set(commands[0])
    assert result["exit"] == 2 and result["adapter"] is None and result["seconds"] == []
    bench_memory.run_case("free:1024x4", Path("model"), tmp_path / "1", **settings)
    assert not any(key.startswith("model.memory_gb") for key in commands[1])
    question = json.loads((tmp_path / "1/data.jsonl").read_text().splitlines()[0])["question"]
    assert len(question) == 354 - 235  # a token each; the rest is the chat's
