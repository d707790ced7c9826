"""wandb beside a run: whatever it does, the run goes on and ends with its own exit code."""

import json
import math
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from made_up_run import SCRIPT, environment, make_metrics
from paths import ROOT

import grpo.record.wandb_run
from grpo.record.summary import read_metrics


class FakeWandb(types.ModuleType):
    """Records what a run sends; fails, or never returns, where it is told to."""

    def __init__(self, failing: set[str], hanging: set[str] = frozenset()):
        super().__init__("wandb")
        self.failing, self.hanging, self.modes, self.lines, self.defined = failing, hanging, [], [], []
        self.is_torn_down, self.exit_code = False, None
        self.url, self.dir, self.summary = "https://host/run", "/tmp/x/files", {}

    def _meet(self, what, error):
        if what in self.hanging:
            threading.Event().wait()
        if what in self.failing:
            raise error

    def Settings(self, silent, console, init_timeout, finish_timeout):
        return {"silent": silent, "console": console}

    def init(self, **arguments):
        self.modes.append(arguments["mode"])
        self.arguments = arguments
        self._meet(f"init {arguments['mode']}", ConnectionError("no route to host\nmany more lines"))
        if len(self.modes) > 1 and not self.is_torn_down:
            raise RuntimeError(f"run ID {arguments['id']} is in use")
        return self

    def teardown(self):
        self.is_torn_down = True

    def define_metric(self, name, step_metric=None):
        self.defined.append((name, step_metric))

    def log(self, line):
        self._meet("log", RuntimeError("server error"))
        self.lines.append(line)

    def finish(self, exit_code):
        self.exit_code = exit_code
        self._meet("finish", BrokenPipeError("gone"))


@pytest.fixture
def fake_wandb(monkeypatch):
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", "/nonexistent")

    def install(*failing: str, hanging: tuple[str, ...] = ()) -> FakeWandb:
        module = FakeWandb(set(failing), set(hanging))
        monkeypatch.setitem(sys.modules, "wandb", module)
        for name in ("INIT_SECONDS", "CALL_SECONDS") if hanging else ():
            monkeypatch.setattr(grpo.record.wandb_run, name, 2.0)
        return module

    return install


def test_auto_is_online_with_a_key_and_offline_without(fake_wandb, monkeypatch, tmp_path):
    def mode_of(name: str) -> list[str]:
        wandb = fake_wandb()
        make_metrics(tmp_path / name, mode="auto").finish("finished")
        return wandb.modes

    assert mode_of("a") == ["offline"]
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert mode_of("b") == ["online"]
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert mode_of("c") == ["online"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert mode_of("d") == ["offline"]


def test_online_without_a_key_logs_offline_with_a_warning(fake_wandb, tmp_path, capsys):
    wandb = fake_wandb()
    make_metrics(tmp_path, mode="online").finish("finished")
    assert wandb.modes == ["offline"]
    assert capsys.readouterr().out.count("warning: wandb.mode=online but no API key") == 1


def test_disabled_never_touches_wandb(fake_wandb, tmp_path):
    wandb = fake_wandb("init offline", "init online")
    metrics = make_metrics(tmp_path, mode="disabled")
    metrics.log(1, {"reward": 1.0})
    metrics.finish("finished")
    assert wandb.modes == [] and metrics.wandb.run_id is None


def test_values_go_to_wandb_over_our_own_step(fake_wandb, tmp_path):
    wandb = fake_wandb()
    metrics = make_metrics(tmp_path, mode="offline", wandb_id="abc123")
    metrics.log_warmup(1, {"loss": 2.0}, num_steps=2, prints_line=True)
    metrics.log(1, {"kl": math.inf})
    metrics.log_eval(1, {"greedy": 0.5})
    metrics.finish("interrupted")
    assert ("*", "step") in wandb.defined and ("warmup/*", "warmup/step") in wandb.defined
    assert wandb.arguments["id"] == metrics.wandb.run_id == "abc123" and wandb.arguments["resume"] == "allow"
    assert wandb.lines[0] == {"step": 0, "warmup/step": 1, "warmup/loss": 2.0}
    assert (wandb.lines[1]["step"], wandb.lines[1]["kl"]) == (1, math.inf)
    assert wandb.lines[2] == {"step": 1, "eval/greedy": 0.5}
    assert wandb.exit_code == 1 and wandb.summary["exit_reason"] == "interrupted"


def test_suspects_have_a_table_of_their_own(fake_wandb, tmp_path):
    wandb, tables = fake_wandb(), []

    class Table:
        def __init__(self, columns, allow_mixed_types):
            self.columns, self.rows = columns, []
            tables.append(self)

        def add_data(self, *cells):
            self.rows.append(cells)

    wandb.Table = Table
    metrics = make_metrics(tmp_path, mode="offline")
    honest = {"prompt": "p", "completion": "c", "reward": 0.0}
    metrics.log_completions(1, [honest])
    metrics.log_completions(2, [honest, {**honest, "suspicion": "why"}])
    metrics.finish("finished")
    logged = [(line["step"], name, line[name].columns, line[name].rows)
              for line in wandb.lines for name in line if name != "step"]
    columns, row = ["step", "prompt", "completion", "reward"], ("p", "c", 0.0)
    assert logged == [
        (1, "completions", columns, [(1, *row)]), (2, "completions", columns, [(2, *row), (2, *row)]),
        (2, "suspects", [*columns, "suspicion"], [(2, *row, "why")])]


def log_three_steps(run_dir: Path, *, has_completions: bool) -> dict:
    metrics = make_metrics(run_dir, mode="auto")
    for step in range(1, 4):
        metrics.log(step, {"reward": float(step)})
        metrics.log_completions(step, [{"prompt": "p", "completion": "c", "reward": 0.0}] * has_completions)
    return metrics.finish("finished")


def test_every_failure_of_wandb_is_one_warning_and_the_run_goes_on(fake_wandb, monkeypatch, tmp_path, capsys):
    wandb = fake_wandb("init online", "log", "finish")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    summary = log_three_steps(tmp_path, has_completions=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert wandb.modes == ["online", "offline"] and wandb.is_torn_down  # or the second would find its id in use
    assert [line.split(" (")[0] for line in lines] == [
        *("warning: wandb online init failed", "warning: wandb log failed", "warning: wandb table failed"),
        "warning: wandb finish failed",
    ]
    assert lines[0].endswith("no route to host); logging offline instead")
    assert summary["steps"] == 3 and len(read_metrics(tmp_path)) == 3


@pytest.mark.parametrize("hanging, warned", [
    (("init online",), ["online init"]), (("init online", "init offline"), ["online init", "offline init"]),
    (("log",), ["log"]), (("finish",), ["finish"])])
def test_a_wandb_that_never_answers_is_left_behind(fake_wandb, monkeypatch, tmp_path, capsys, hanging, warned):
    wandb = fake_wandb(hanging=hanging)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    summary = log_three_steps(tmp_path, has_completions=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert [line.split(" failed (no answer")[0] for line in lines] == [f"warning: wandb {what}" for what in warned]
    assert summary["steps"] == 3 and len(read_metrics(tmp_path)) == 3
    if hanging == ("init online",):
        assert [line["step"] for line in wandb.lines if "reward" in line] == [1, 2, 3] and wandb.exit_code == 0


def test_a_full_queue_leaves_lines_out_and_says_so_once(fake_wandb, monkeypatch, tmp_path, capsys):
    fake_wandb(hanging=("log",))
    monkeypatch.setattr(grpo.record.wandb_run, "CALL_SECONDS", 60.0)
    monkeypatch.setattr(grpo.record.wandb_run, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(grpo.record.wandb_run, "QUEUE_LEN", 2)
    metrics = make_metrics(tmp_path, mode="offline")
    for step in range(1, 9):
        metrics.log(step, {"reward": 0.5})
    metrics.finish("finished")
    printed = capsys.readouterr().out
    assert printed.count("wandb takes lines too slowly") == 1 and printed.count("wandb has not finished") == 1
    assert len(read_metrics(tmp_path)) == 8


def test_a_user_without_a_home_and_a_name_gets_an_offline_run(fake_wandb, monkeypatch, tmp_path):
    wandb = fake_wandb()
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("NETRC")

    def nameless(*_):
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("pwd.getpwuid", nameless)
    make_metrics(tmp_path, mode="auto").finish("finished")
    assert wandb.modes == ["offline"]


# A wandb whose calls return, but which keeps the process from ending.
CLINGING = """
import atexit, sys, threading
from pathlib import Path
class Run:
    dir, url, summary = "/tmp/x/files", "", {}
    def __getattr__(self, name):
        return lambda *arguments, **keywords: None
def Settings(silent, console, init_timeout): return None
def Table(**keywords): return Run()
def teardown(): pass
def init(**arguments):
    threading.Thread(target=threading.Event().wait).start()
    atexit.register(threading.Event().wait)
    return Run()
"""


def test_a_run_ends_with_its_exit_code_although_wandb_holds_on_to_the_process(tmp_path):
    (tmp_path / "wandb.py").write_text(CLINGING)
    code = ("import runpy, sys, grpo.record.wandb_run\n"
            "grpo.record.wandb_run.EXIT_SECONDS = 0.5\n"
            "runpy.run_module('grpo.train', run_name='__main__', alter_sys=True)")
    arguments = ["+experiment=smoke", "name=run", f"output_dir={tmp_path}", "wandb.mode=offline", "steps=1", "warmup=null",
                 "eval.at_start=false", "eval.every=0", "eval.at_end=false"]
    for added, expected in ((), 0), (("resume=false",), 2):  # the second finds the name taken
        result = subprocess.run([sys.executable, "-c", code, *arguments, *added], capture_output=True, text=True, timeout=600,
                                env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"), check=False)
        assert result.returncode == expected, result.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["exit_reason"] == "finished"


def test_a_missing_wandb_is_one_warning(fake_wandb, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics = make_metrics(tmp_path, mode="auto")
    metrics.log(1, {"reward": 1.0})
    metrics.finish("finished")
    assert capsys.readouterr().out.count("warning: wandb") == 1


def test_real_wandb_offline_records_metrics_and_a_table_that_appends(tmp_path):
    pytest.importorskip("wandb")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "auto"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stdout + result.stderr
    run_id = json.loads((tmp_path / "summary.json").read_text())["wandb_id"]
    folder = next((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert f"wandb sync {folder}" in result.stdout
    data = (folder / f"run-{run_id}.wandb").read_bytes()
    assert b"eval/greedy" in data and b"0.875" in data and b"warmup/loss" in data
    tables = [json.loads(path.read_text()) for path in (folder / "files/media/table").glob("completions_*.json")]
    rows = sorted([table["data"] for table in tables])
    assert tables[0]["columns"] == ["step", "prompt", "completion", "reward"]
    (suspects,) = (folder / "files/media/table").glob("suspects_*.json")
    assert json.loads(suspects.read_text())["data"] == [[4, "1+2", "trick", 1.0, "a reason"]]
    assert [len(data) for data in rows] == [1, 2]  # each log holds its new rows only
    assert rows[1] == [[4, "1+1", "second", 1], [4, "1+2", "trick", 1]]
