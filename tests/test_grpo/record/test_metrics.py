"""Metrics: the two JSONL files, resume, console and wandb."""

import io
import json
import math
import os
import pty
import random
import re
import select
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from paths import ROOT
from rich.console import Console

import grpo.record.wandb_run
from grpo.config import WandbConfig
from grpo.record.console import Display, clean, format_duration, format_number, sparkline, step_line
from grpo.record.metrics import Metrics
from grpo.report import read_metrics

FULL = {
    "reward": 0.5,
    "reward_std": 0.25,
    "completions/mean_length": 24.0,
    "completions/max_length": 31,
    "completions/clipped_ratio": 0.125,
    "entropy": 0.03125,
    "kl": 0.0,
    "grad_norm": 0.75,
    "lr": 3e-4,
    "tokens_per_s": 1234.0,
    "memory/peak_gb": 1.5,
    "time/step": 2.0,
    "time/rollout": 1.0,
}


def make(run_dir: Path, *, mode: str = "disabled", console: bool = False, **keywords) -> Metrics:
    settings = WandbConfig(mode=mode, project="test")
    return Metrics(
        run_dir, wandb=settings, config={"seed": 0}, run_name="r", total_steps=6, console=console, **keywords
    )


def run_steps(metrics: Metrics, first: int, last: int) -> None:
    """A made-up run: every value depends on the step alone, as in a run that resumes exactly."""
    if first == 1:
        metrics.log_warmup(1, {"loss": 2.0}, num_steps=2, prints_line=True)
        metrics.log_warmup(2, {"loss": 1.5}, num_steps=2, prints_line=True)
        metrics.log_eval(0, {"greedy": 0.25})
    for step in range(first, last + 1):
        metrics.log(step, {"reward": 1 / step, "time/step": random.random(), "num_tokens": 10 * step})
        if step % 2 == 0:
            metrics.log_eval(step, {"greedy": step / 6, "time/eval": random.random()})
            metrics.log_completions(step, [{"prompt": "p\n", "completion": f"é \ud800 {step}", "reward": math.nan}] * 2)


def untimed(run_dir: Path) -> bytes:
    """Both files of a run without the values that differ between runs."""
    lines = []
    for row in map(json.loads, (run_dir / "metrics.jsonl").read_bytes().splitlines()):
        kept = {name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))}
        lines.append(json.dumps({name: value for name, value in kept.items() if not name.endswith("_per_s")}))
    return "\n".join(lines).encode() + (run_dir / "completions.jsonl").read_bytes()


def strict_json(line: str) -> dict:
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_line_holds_the_step_first_and_the_values_exactly(tmp_path):
    metrics = make(tmp_path)
    metrics.log(3, {"reward": 0.1, "num_tokens": 7})
    row = strict_json((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert list(row)[0] == "step" and row["step"] == 3 and row["reward"] == 0.1 and row["num_tokens"] == 7


def test_non_finite_numbers_become_null_and_are_read_back_as_nan(tmp_path):
    metrics = make(tmp_path)
    metrics.log(1, {"kl": math.nan, "grad_norm": math.inf, "loss": -math.inf, "reward": 1.0})
    metrics.log_completions(1, [{"prompt": "a", "completion": "b", "reward": math.nan, "parts": {"x": math.inf}}])
    row = strict_json((tmp_path / "metrics.jsonl").read_text())
    assert (row["kl"], row["grad_norm"], row["loss"], row["reward"]) == (None, None, None, 1.0)
    assert math.isnan(read_metrics(tmp_path)[0]["grad_norm"])
    completion = strict_json((tmp_path / "completions.jsonl").read_text())
    assert completion == {"step": 1, "prompt": "a", "completion": "b", "reward": None, "parts": {"x": None}}


def test_numbers_of_torch_are_taken_and_texts_refused_by_name(tmp_path):
    import torch

    metrics = make(tmp_path)
    metrics.log(1, {"loss": torch.tensor(0.5), "num_tokens": torch.tensor([3])})
    assert read_metrics(tmp_path)[0]["loss"] == 0.5 and read_metrics(tmp_path)[0]["num_tokens"] == 3
    with pytest.raises(ValueError, match="'kl'.*str"):
        metrics.log(1, {"kl": "small"})


def test_lone_surrogates_in_completions_survive(tmp_path):
    make(tmp_path).log_completions(2, [{"prompt": "ü", "completion": "\ud83d x"}])
    row = strict_json((tmp_path / "completions.jsonl").read_text(encoding="utf-8"))
    assert row == {"step": 2, "prompt": "ü", "completion": "\ud83d x"}


def test_a_run_killed_at_any_byte_and_resumed_equals_one_never_stopped(tmp_path):
    whole = tmp_path / "whole"
    run_steps(make(whole), 1, 6)
    expected = untimed(whole)
    contents = {name: (whole / name).read_bytes() for name in ("metrics.jsonl", "completions.jsonl")}
    rng = random.Random(0)
    for trial in range(30):
        checkpoint = rng.choice([2, 4, 5])
        killed = tmp_path / f"killed_{trial}"
        killed.mkdir()
        for name, data in contents.items():
            kept = sum(len(x) + 1 for x in data.splitlines() if json.loads(x)["step"] <= checkpoint)
            (killed / name).write_bytes(data[: rng.randint(kept, len(data))])
        metrics = make(killed, is_resumed_from_step=checkpoint)
        run_steps(metrics, checkpoint + 1, 6)
        assert untimed(killed) == expected, f"trial {trial}, checkpoint of step {checkpoint}"


def test_truncation_before_the_first_step_empties_both_files(tmp_path):
    metrics = make(tmp_path)
    run_steps(metrics, 1, 2)
    metrics.truncate_after(-1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"" == (tmp_path / "completions.jsonl").read_bytes()
    metrics.log_eval(0, {"greedy": 0.5})
    assert [row["eval/greedy"] for row in read_metrics(tmp_path)] == [0.5]


def test_a_line_cut_short_does_not_swallow_the_next_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    make(tmp_path).log(2, {"reward": 0.75})
    assert [(row["step"], row["reward"]) for row in read_metrics(tmp_path)] == [(1, 0.5), (2, 0.75)]


def test_truncation_leaves_whole_lines_only(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.5}')
    make(tmp_path).truncate_after(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "reward": 0.5}\n'


FOREIGN = [b"# a note\n", b"\n", b'{"reward": 1}\n', b'{"step": 2, "rew\n', b"\xff\xfe\n", b"[4]\n", b"a\rb\n"]


def test_what_a_resume_takes_out_is_kept_beside_and_lines_of_others_stay_where_they_are(tmp_path):
    records = [json.dumps({"step": step, "reward": step / 4}).encode() + b"\n" for step in (1, 2, 3, 4)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([*FOREIGN, *records[:2], *FOREIGN, records[2], *FOREIGN, records[3], b'{"step": 5']))
    make(tmp_path, is_resumed_from_step=2)
    assert path.read_bytes() == b"".join([*FOREIGN, *records[:2], *FOREIGN, *FOREIGN])
    assert (tmp_path / "metrics.jsonl.cut-1").read_bytes() == b"".join([*records[2:], b'{"step": 5'])
    metrics = make(tmp_path, is_resumed_from_step=2)  # nothing to take out
    metrics.log(3, {"reward": 0.5})
    make(tmp_path, is_resumed_from_step=1)
    assert (tmp_path / "metrics.jsonl.cut-2").read_bytes().startswith(records[1] + b'{"step": 3')
    assert sorted(path.name for path in tmp_path.glob("metrics.jsonl*")) == [
        *("metrics.jsonl", "metrics.jsonl.cut-1", "metrics.jsonl.cut-2")]


def test_a_line_added_during_a_run_swallows_no_line_of_it_and_ends_nothing(tmp_path):
    metrics = make(tmp_path)
    metrics.log(1, {"reward": 0.25})
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"".join(FOREIGN) + b"# no newline")
    metrics.log(2, {"reward": 0.5})
    metrics.log_completions(2, [{"prompt": "p", "completion": "c", "reward": 0.5}])
    assert metrics.finish("finished")["steps"] == 2
    assert [row["reward"] for row in read_metrics(tmp_path)] == [0.25, 0.5]
    assert metrics.samples()[0]["after"]["completion"] == "c"
    assert b"# no newline\n" in (tmp_path / "metrics.jsonl").read_bytes()


def test_a_file_that_an_editor_replaced_or_somebody_deleted_gets_the_lines_that_follow(tmp_path):
    metrics, path = make(tmp_path), tmp_path / "metrics.jsonl"
    metrics.log(1, {"reward": 0.25})
    (tmp_path / "copy").write_bytes(path.read_bytes() + b"# edited\n")
    (tmp_path / "copy").replace(path)
    metrics.log(2, {"reward": 0.5})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    path.unlink()
    metrics.log(3, {"reward": 0.75})
    assert [row["step"] for row in read_metrics(tmp_path)] == [3]


def test_files_that_end_before_the_checkpoint_are_reported(tmp_path, capsys):
    run_steps(make(tmp_path), 1, 2)
    make(tmp_path, console=True, is_resumed_from_step=5)
    assert "ends at step 2 but the checkpoint is of step 5" in capsys.readouterr().out


def test_an_evaluation_repeated_after_a_resume_is_recorded_once(tmp_path):
    run_steps(make(tmp_path), 1, 6)
    metrics = make(tmp_path, is_resumed_from_step=6)
    assert metrics.has_eval(6) and not metrics.has_eval(5)
    metrics.log_eval(6, {"greedy": 1.0, "time/eval": 3.0})
    metrics.log_eval(6, {"greedy": 1.0, "pass@4": 0.5})
    last = [row for row in read_metrics(tmp_path) if row["step"] == 6 and "reward" not in row]
    assert last[0].pop("time/eval") < 1  # of the first evaluation
    assert last == [{"step": 6, "eval/greedy": 1.0}, {"step": 6, "eval/pass@4": 0.5}]


def test_wall_time_goes_on_across_sessions(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "time/total": 1000.0}\n')
    metrics = make(tmp_path, is_resumed_from_step=1)
    metrics.log(2, {"reward": 0.5})
    assert 1000.0 <= read_metrics(tmp_path)[1]["time/total"] < 1100.0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file_and_what_to_do(tmp_path):
    from grpo.record.metrics import _JsonlFile

    with pytest.raises(OSError, match="resume=true") as caught:
        _JsonlFile(Path("/dev/full")).append([{"step": 1}])
    assert caught.value.filename == "/dev/full"


def test_plain_lines_name_what_matters(capsys, tmp_path):
    metrics = make(tmp_path, console=True)
    metrics.log(2, FULL)
    metrics.log_eval(
        2, {"mean_length": 7.0, "is_odd": 0.5, "accuracy": 0.75, "accuracy/ci95": 0.03125, "time/eval": 2.5}
    )
    metrics.log_completions(2, [{"prompt": "1+1", "completion": "two\n2", "reward": 1.0}])
    step, evaluation, sample = capsys.readouterr().out.splitlines()
    assert step == (
        "step 2/6  reward 0.500 ± 0.250  length 24.0 (max 31), 12% cut  entropy 0.031  kl 0.000  grad 0.750  "
        "lr 3.0e-04  speed 1,234 tok/s  mem 1.500 GB  took 2.000 s  left 0:08"
    )
    assert evaluation == "eval 2/6  accuracy 0.750 ± 0.031  mean_length 7.000"
    assert sample == "sample 2/6  reward 1.000  '1+1' -> 'two\\\\n2'"


def test_plain_line_leaves_out_what_was_not_logged():
    assert step_line(7, 100, {"reward": math.nan}, math.nan) == "step   7/100  reward nan  left ?"
    groups = {"reward": 0.5, "groups/live": 0, "groups/dropped": 2}
    assert step_line(7, 100, groups, 1.0) == "step   7/100  reward 0.500, live 0/2  left 0:01"
    assert step_line(7, 100, {**groups, "groups/dropped": 0}, 1.0) == "step   7/100  reward 0.500  left 0:01"


def test_numbers_and_durations_read_well():
    assert [format_number(x) for x in (0, 0.5, 12.34, 123.4, 12345.6, 3e-5, -2.0, math.inf)] == [
        *("0.000", "0.500", "12.3", "123", "12,346", "3.0e-05", "-2.000", "inf")
    ]
    assert [format_duration(x) for x in (0, 59.6, 61, 3600 * 25 + 62)] == ["0:00", "1:00", "1:01", "25:01:02"]


def test_sparkline_rises_with_the_values_and_averages_neighbours():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, ascii_only=False) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2, ascii_only=False) == "▁█"
    assert sparkline([3.0, math.nan, 3.0], 8, ascii_only=True) == "~~"
    assert sparkline([], 8, ascii_only=True) == ""


def panel_of(display: Display, width: int) -> list[str]:
    output = io.StringIO()
    display.console = Console(file=output, width=width, height=24, force_terminal=False)
    display.console.print(display.render())
    return output.getvalue().splitlines()


def test_the_panel_fits_80_by_24_with_nothing_cut():
    display = Display("r", 100, is_enabled=False)
    names = ("eval/greedy_accuracy", "eval/greedy_accuracy/ci95", "eval/avg@1", "eval/avg@1/ci95")
    display.eval(0, dict(zip(names, (0.348, 0.058, 0.484, 0.061))))
    display.step(57, {
        "reward": 0.842, "reward_std": 0.438, "completions/mean_length": 812.9, "completions/max_length": 1024,
        "completions/clipped_ratio": 0.21, "entropy": 0.035, "kl": 0.012, "grad_norm": 0.342, "clip_ratio/low": 0.01,
        "clip_ratio/high": 0.02, "lr": 2.8e-4, "tokens_per_s": 16738, "memory/peak_gb": 78.9, "time/step": 101.4,
        "time/rollout": 60.84, "time/reward": 1.014, "time/update": 39.546})
    display.eval(57, dict(zip(names, (0.91, 0.035, 0.742, 0.05))))
    prompt = "<|start|>user<|message|>14+49<|end|><|start|>assistant"
    display.completion(57, {"prompt": prompt, "completion": "63" * 300, "reward": 1})
    assert display.notice("SIGTERM: saves at the next safe moment; again: leaves at once") is False  # no live panel here
    lines = panel_of(display, 80)
    text = " ".join(" ".join(line.strip("│╭╰ ") for line in lines).split())
    assert len(lines) <= 23 and {len(line) for line in lines} == {78}
    for part in ("16,738 tok/s", "101 s/step", "memory 78.9 GB", "(rollout 60%, reward 1%, update 39%)", "clipped 1%/2%",
                 "lr 2.8e-04", "greedy_accuracy 0.910 ± 0.035 (from 0.348)", "avg@1 0.742 ± 0.050 (from 0.484)",
                 "prompt 14+49", "SIGTERM: saves at the next safe moment; again: leaves at once"):
        assert part in text, (part, text)


def test_the_curve_of_the_rewards_stands_apart_from_their_text():
    display = Display("r", 10, is_enabled=False)
    for step, spread in ((1, 0.1), (2, 0.0)):
        display.step(step, {"reward": step - 1.0, "reward_std": spread, "groups/live": 0, "groups/dropped": 4})
    assert any("1.000 ± 0.000, live 0/4  ▁█ " in line for line in panel_of(display, 80))


def test_what_was_first_evaluated_after_updates_is_not_called_before(tmp_path, capsys):
    metrics = make(tmp_path, console=True)
    for step in (1, 2):
        metrics.log(step, {"reward": step / 4})
    metrics.log_eval(2, {"greedy_accuracy": 0.875, "greedy_accuracy/ci95": 0.0625})
    metrics.log_completions(2, [{"prompt": "p", "completion": "learnt", "reward": 1.0, "split": "eval"}])
    summary = metrics.finish("finished")
    capsys.readouterr()
    metrics.print_final(summary, metrics.samples(), [])
    lines = [line.replace(" ", "") for line in capsys.readouterr().out.splitlines()]
    assert "│eval/greedy_accuracy││0.875±0.062│0.875@2│" in lines and "│reward│0.250│0.500││" in lines
    assert "after[1.000]learnt" in lines and not any(line.startswith("before") for line in lines)


def test_long_work_is_counted_in_a_line_every_half_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("grpo.record.console.time.monotonic", lambda: now[0])
    count = Display("r", 10, is_enabled=True).progress("evaluating")
    for seconds, finished in ((1, 1), (29, 31), (40, 64), (69, 100), (71, 128)):
        now[0] = seconds
        count(finished, 256)
    assert capsys.readouterr().out.splitlines() == ["evaluating 64/256, left 2:00", "evaluating 128/256, left 1:11"]


def test_control_characters_of_completions_never_reach_the_terminal():
    assert clean("a\x1b[2Jb\r\u202ec\n", "utf-8") == "a\\x1b[2Jb\\r\\u202ec\n"
    assert clean("ü ± 界", "ascii") == "? +- ?"


def test_time_left_counts_the_steps_that_remain(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("grpo.record.console.time.monotonic", lambda: now[0])
    display = Display("r", 10, is_enabled=False)
    for step in (1, 2, 3):
        now[0] += 4.0
        display.step(step, {"time/step": 4.0})
    assert display.seconds_left() == 4.0 * 7


def test_warmup_steps_may_be_left_out_and_keep_the_names_of_timing(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("grpo.record.console.time.monotonic", lambda: now[0])
    metrics = make(tmp_path, console=True)
    for step in (1, 11, 21):
        metrics.log_warmup(step, {"loss": 2.0, "time/step": 0.5}, num_steps=41, prints_line=step > 1)
        now[0] += 5.0
    assert read_metrics(tmp_path)[1] == {"step": 0, "warmup/step": 11, "warmup/loss": 2.0, "time/step": 0.5}
    # 0.5 s a step: 30 left, then 20
    assert capsys.readouterr().out.splitlines() == [
        *("warm-up 11/41  loss 2.000  left 0:15", "warm-up 21/41  loss 2.000  left 0:10")
    ]


SCRIPT = """
import sys, time
from pathlib import Path
from grpo.config import WandbConfig
from grpo.record.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]), wandb=WandbConfig(mode=sys.argv[2], project="test"), config={"seed": 0},
                  run_name="carry [bold]run", total_steps=4)
try:
    metrics.log_warmup(1, {"loss": 2.0}, num_steps=1, prints_line=True)
    metrics.log_eval(0, {"greedy": 0.25})
    hostile = "[/bold] \\x1b]0;owned\\x07 \\u754c first"
    metrics.log_completions(0, [{"prompt": "1+1", "completion": hostile, "reward": 0.0, "token_ids": [1, 2]}])
    for step in range(1, 5):
        metrics.log(step, {"reward": step / 4, "reward_std": 0.1, "entropy": 0.5, "num_tokens": 10, "time/step": 0.1})
    metrics.log_eval(4, {"greedy": 0.875})
    metrics.log_completions(4, [{"prompt": "1+1", "completion": "second", "reward": 1.0, "token_ids": [5]}])
    print("a line of the loop")
finally:
    summary = metrics.finish("finished")
metrics.print_final(summary, metrics.samples(), ["python -m grpo.generate run=" + "x" * 100])
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "LC_", "FORCE_COLOR"))}
    return {**kept, "PYTHONPATH": str(ROOT), "NETRC": "/nonexistent", **changes}


def test_output_that_is_no_terminal_and_not_utf8_gets_plain_ascii_lines(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "disabled"],
        env=environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
    text = result.stdout.decode("ascii")
    assert "step 4/4  reward 1.000 +- 0.100" in text and "\x1b" not in text
    assert "sample 0/4  reward 0.000  '1+1' -> '[/bold]" in text
    assert "eval/greedy" in text and "0.250" in text and "0.875 @ 4" in text
    assert text.endswith("next:\n  python -m grpo.generate run=" + "x" * 100 + "\n")


@pytest.mark.parametrize("columns", [40, 100])
def test_a_terminal_gets_the_live_panel_and_lines_of_the_loop_above_it(tmp_path, columns):
    parent, child = pty.openpty()
    variables = environment(COLUMNS=str(columns), LINES="40", TERM="xterm", PYTHONIOENCODING="utf-8")
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "disabled"], stdout=child, env=variables)
    os.close(child)
    output = b""
    while select.select([parent], [], [], 60)[0]:
        try:
            chunk = os.read(parent, 1 << 16)
        except OSError:  # how Linux says that the other end is closed
            break
        output += chunk
        if not chunk:
            break
    os.close(parent)
    assert process.wait(timeout=600) == 0
    text = output.decode()
    assert "\x1b]0;owned" not in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")
    panel = plain[plain.rindex("╭") : plain.rindex("╰")]
    assert "carry [bold]run" in panel and "train 4/4" in panel
    assert "1.000 ± 0.100" in panel and "greedy 0.875 (from 0.250)" in panel
    assert "[1.000] second" in panel
    assert max(len(line) for line in panel.splitlines()) <= columns
    assert "a line of the loop\n" in plain
    assert "before [0.000]" in plain and "after  [1.000] second" in plain


def test_a_closed_output_does_not_stop_the_run(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", SCRIPT.replace('print("a line of the loop")', "")] + [str(tmp_path), "disabled"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    os.close(writer)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 4


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
        make(tmp_path / name, mode="auto").finish("finished")
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
    make(tmp_path, mode="online", console=True).finish("finished")
    assert wandb.modes == ["offline"]
    assert capsys.readouterr().out.count("warning: wandb.mode=online but no API key") == 1


def test_disabled_never_touches_wandb(fake_wandb, tmp_path):
    wandb = fake_wandb("init offline", "init online")
    metrics = make(tmp_path, mode="disabled")
    metrics.log(1, {"reward": 1.0})
    metrics.finish("finished")
    assert wandb.modes == [] and metrics.wandb_id is None


def test_values_go_to_wandb_over_our_own_step(fake_wandb, tmp_path):
    wandb = fake_wandb()
    metrics = make(tmp_path, mode="offline", wandb_id="abc123")
    metrics.log_warmup(1, {"loss": 2.0}, num_steps=2, prints_line=True)
    metrics.log(1, {"kl": math.inf})
    metrics.log_eval(1, {"greedy": 0.5})
    metrics.finish("interrupted")
    assert ("*", "step") in wandb.defined and ("warmup/*", "warmup/step") in wandb.defined
    assert wandb.arguments["id"] == metrics.wandb_id == "abc123" and wandb.arguments["resume"] == "allow"
    assert wandb.lines[0] == {"step": 0, "warmup/step": 1, "warmup/loss": 2.0}
    assert (wandb.lines[1]["step"], wandb.lines[1]["kl"]) == (1, math.inf)
    assert wandb.lines[2] == {"step": 1, "eval/greedy": 0.5}
    assert wandb.exit_code == 1 and wandb.summary["exit_reason"] == "interrupted"


def log_three_steps(run_dir: Path, *, has_completions: bool) -> dict:
    metrics = make(run_dir, mode="auto", console=True)
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
    metrics = make(tmp_path, mode="offline", console=True)
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
    make(tmp_path, mode="auto").finish("finished")
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
    metrics = make(tmp_path, mode="auto", console=True)
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
    assert [len(data) for data in rows] == [1, 1]  # each log holds its new rows only
    assert rows[1] == [[4, "1+1", "second", 1]]
