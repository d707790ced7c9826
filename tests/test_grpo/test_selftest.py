"""The self-test: what fails is named, a band is checked at its step, and nothing passes that did not run."""

import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paths import ROOT

from grpo import selftest
from grpo.config import ConfigError
from grpo.configuration.launch import load_config
from grpo.selftest import Check, check_bands, decode_ceiling, hardware_report, run_selftest, running


@pytest.fixture
def checks(tmp_path, monkeypatch) -> list[Check]:
    """A check that passes, one with a failing test, one whose file is not there, one without tests, two that choose tests."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_right.py").write_text("def test_sum():\n    assert 1 + 1 == 2\n")
    (tests / "test_wrong.py").write_text("def test_sum():\n    assert 1 + 1 == 3\n\n\ndef test_fine():\n    pass\n")
    (tests / "test_none.py").write_text("")
    (tests / "test_some.py").write_text("def test_sum():\n    assert 1 + 1 == 2\n\n\ndef test_other():\n    assert False\n")
    monkeypatch.setattr(selftest, "ROOT", tmp_path)
    checks = [Check(name, (f"test_{name}.py",)) for name in ("right", "wrong", "gone", "none")]
    return [*checks, Check("some", ("test_some.py",), only="sum"), Check("mistyped", ("test_some.py",), only="product")]


def test_a_check_passes_only_if_its_tests_ran_and_passed(checks, capsys):
    with running(checks) as report:
        assert report() == ["wrong", "gone", "none", "mistyped"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PASS  right     1 tests") and any(line.startswith("PASS  some      1 tests") for line in lines)
    assert any("test_wrong.py::test_sum" in line for line in lines) and not any("test_fine" in line for line in lines)


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_checks_and_what_they_started(tmp_path, number):
    """In a program of its own: its check has a test that starts another program; more checks wait for a core."""
    tests, pids = tmp_path / "tests", tmp_path / "pids"
    tests.mkdir()
    (tests / "test_slow.py").write_text(f"""
import os, subprocess, time
def test_slow():
    child = subprocess.Popen(["sleep", "1000"])
    with open({str(pids)!r}, "a") as file:
        file.write(f"{{os.getpid()}} {{child.pid}}\\n")
    time.sleep(1000)
""")
    program = f"""
import os, pathlib, signal
from grpo import selftest
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
selftest.ROOT = pathlib.Path({str(tmp_path)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
with selftest.running([selftest.Check(str(i), ("test_slow.py",)) for i in range(3)]) as report:
    report()
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (pids.exists() and pids.read_text().endswith("\n")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) != 0
    lines, deadline = pids.read_text().splitlines(), time.monotonic() + 60
    while number == signal.SIGKILL and any(is_alive(int(pid)) for pid in lines[0].split()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(lines) == 1 and not any(is_alive(int(pid)) for pid in lines[0].split())


def test_a_run_that_is_stopped_ends_the_checks(checks, monkeypatch, capsys):
    config = load_config("train", ["+experiment=selftest"])
    monkeypatch.setattr(selftest, "CHECKS", checks)
    assert run_selftest(config, lambda config: selftest.PREEMPTED) == 75
    assert "PASS" not in capsys.readouterr().out


def test_every_file_of_a_check_is_there_and_every_name_is_of_a_test_in_it():
    for check in selftest.CHECKS:
        texts = [(ROOT / "tests" / file).read_text(encoding="utf-8") for file in check.files]
        for word in check.only.split(" or "):
            assert any(re.search(rf"def test_\w*{word}", text) for text in texts), (check, word)


def test_a_band_is_compared_with_the_last_value_of_its_step(capsys):
    metrics = [{"step": 0, "eval/avg@1": 0.3}, {"step": 10, "reward": 1.0}, {"step": 10, "eval/avg@1": 0.1},
               {"step": 10, "eval/avg@1": 0.8}]
    bands = {"eval/avg@1@0": [0.3, 0.3], "eval/avg@1@10": [0.5, 0.9], "reward@10": [0.0, 0.9], "eval/avg@1@20": [0.0, 1.0]}
    assert check_bands(metrics, bands) == ["reward@10", "eval/avg@1@20"]
    assert "eval/avg@1 at step 20: not measured" in capsys.readouterr().out


@pytest.mark.parametrize(("reached", "code", "verdict"), [(0.5, 0, "selftest PASS"), (0.4, 1, "selftest FAIL: wrong; reward@20")])
def test_the_verdict_names_what_failed(checks, monkeypatch, capsys, reached, code, verdict):
    config = load_config("train", ["+experiment=selftest"])
    config.selftest.bands = {"reward@20": [0.45, 1.0]}
    monkeypatch.setattr(selftest, "CHECKS", checks[:1] if code == 0 else checks[:2])
    monkeypatch.setattr(selftest, "hardware_report", lambda: ["a machine"])

    def run_training(config) -> int:
        folder = selftest.run_folder(config)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(f'{{"step": 20, "reward": {reached}}}\n')
        return 0

    assert run_selftest(config, run_training) == code
    assert capsys.readouterr().out.splitlines()[-1] == verdict


def test_a_run_in_a_folder_that_goes_names_no_files_and_commands(entry_points):
    quick = "selftest._run, selftest.hardware_report = lambda *_: (True, 'well'), lambda: ['a machine']"
    done = entry_points.run("grpo.train", "+experiment=smoke", "steps=1", "warmup=null", "eval.at_start=false",
                            "++selftest.bands={reward@1: [0, 2]}",  # of integers
                            before=f"import grpo.selftest as selftest\n{quick}", writes_report=False)
    assert done.code == 0 and "PASS  reward at step 1" in done.out, done.out + done.err
    assert "next:" not in done.out and "report.html" not in done.out


def test_a_run_that_ends_early_is_no_pass(checks, monkeypatch, capsys):
    config = load_config("train", ["+experiment=selftest"])
    monkeypatch.setattr(selftest, "CHECKS", checks[:1])
    assert run_selftest(config, lambda config: 6) == 6
    assert "PASS  right" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "ends"), [
    ("reward", [0.0, 1.0]), ("reward@x", [0.0, 1.0]), ("reward@3", [0.0]), ("reward@3", [1, 0]), ("reward@3", ["0", 1]),
    ("reward@3", 1.0)])
def test_a_band_that_is_none_is_refused(name, ends):
    config = load_config("train", ["+experiment=selftest"])
    config.selftest.bands[name] = ends
    with pytest.raises(ConfigError, match=f"selftest.bands.{name}"):
        run_selftest(config, lambda config: 0)


def test_several_processes_are_refused_before_each_runs_all_tests(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="selftest is the work of one process, and 2 were started: start it with python"):
        run_selftest(load_config("train", ["+experiment=selftest"]), lambda config: 0)


def test_the_ceiling_of_decoding_by_hand():
    """Attention and head have 2.45 GB, experts 24 * 0.423; one row touches 4 of 32 experts, very many rows touch all."""
    assert decode_ceiling(1, (2.45 + 24 * 0.423 / 8) * 1e12) == pytest.approx(1000.0, rel=2e-3)
    assert decode_ceiling(10_000, (2.45 + 24 * 0.423) * 1e12) == pytest.approx(10_000 * 1000.0, rel=2e-3)


def test_the_report_names_what_was_measured():
    text = "\n".join(hardware_report())
    assert torch.__version__ in text and ("GFLOP/s" in text or "TFLOP/s" in text)


def test_the_module_by_itself_says_which_command_runs_it():
    with pytest.raises(SystemExit, match=r"^python -m grpo.train \+experiment=selftest: whether this machine"):
        runpy.run_path(str(ROOT / "grpo/selftest.py"), run_name="__main__")
