"""What a run prints: its lines, its end, and what reaches a pipe, a terminal and a closed output."""

import json
import math
import os
import pty
import re
import select
import subprocess
import sys

import pytest
from made_up_run import SCRIPT, environment, make_metrics, start_script

from grpo.record.console import Display, step_line
from grpo.record.summary import read_metrics
from grpo.record.terminal import clean, format_duration, format_number

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


def test_plain_lines_name_what_matters(capsys, tmp_path):
    metrics = make_metrics(tmp_path)
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


def test_what_was_first_evaluated_after_updates_is_not_called_before(tmp_path, capsys):
    metrics = make_metrics(tmp_path)
    for step in (1, 2):
        metrics.log(step, {"reward": step / 4})
    metrics.log_eval(2, {"greedy_accuracy": 0.875, "greedy_accuracy/ci95": 0.0625})
    metrics.log_completions(2, [{"prompt": "p", "completion": "learnt", "reward": 1.0, "split": "eval"}])
    metrics.finish("finished")
    capsys.readouterr()
    metrics.print_final([])
    lines = [line.replace(" ", "") for line in capsys.readouterr().out.splitlines()]
    assert "│eval/greedy_accuracy││0.875±0.062│0.875@2│" in lines and "│reward│0.250│0.500││" in lines
    assert "after[1.000]learnt" in lines and not any(line.startswith("before") for line in lines)


def test_long_work_is_counted_in_a_line_every_half_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("grpo.record.console.time.monotonic", lambda: now[0])
    count = Display("r", 10).progress("evaluating")
    for seconds, finished in ((1, 1), (29, 31), (40, 64), (69, 100), (71, 128)):
        now[0] = seconds
        count(finished, 256)
    assert capsys.readouterr().out.splitlines() == ["evaluating 64/256, left 2:00", "evaluating 128/256, left 1:11"]


def test_control_characters_of_completions_never_reach_the_terminal():
    assert clean("a\x1b[2Jb\r\u202ec\n", "utf-8") == "a\\x1b[2Jb\\r\\u202ec\n"
    assert clean("ü ± 界", "ascii") == "? +- ?"


def test_warmup_steps_may_be_left_out_and_keep_the_names_of_timing(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("grpo.record.console.time.monotonic", lambda: now[0])
    metrics = make_metrics(tmp_path)
    for step in (1, 11, 21):
        metrics.log_warmup(step, {"loss": 2.0, "time/step": 0.5}, num_steps=41, prints_line=step > 1)
        now[0] += 5.0
    assert read_metrics(tmp_path)[1] == {"step": 0, "warmup/step": 11, "warmup/loss": 2.0, "time/step": 0.5}
    # 0.5 s a step: 30 left, then 20
    assert capsys.readouterr().out.splitlines() == [
        *("warm-up 11/41  loss 2.000  left 0:15", "warm-up 21/41  loss 2.000  left 0:10")
    ]


def test_output_that_is_no_terminal_and_not_utf8_gets_plain_ascii_lines(entry_points, tmp_path):
    result = start_script(entry_points, tmp_path, "import sys; sys.stdout.reconfigure(encoding='ascii')").wait()
    assert result.code == 0 and result.out.isascii(), result.err
    text = result.out
    assert "step 4/4  reward 1.000 +- 0.100" in text and "\x1b" not in text
    assert "sample 0/4  reward 0.000  '1+1' -> '[/bold]" in text
    assert "eval/greedy" in text and "0.250" in text and "0.875 @ 4" in text
    assert text.endswith("next:\n  python -m grpo.generate run=" + "x" * 100 + "\n")


@pytest.mark.parametrize("columns", [40, 100])
def test_a_terminal_gets_the_live_panel_and_lines_of_the_loop_above_it(entry_points, tmp_path, columns):
    parent, child = pty.openpty()
    to_terminal = (f"import os, sys; os.dup2(os.open({os.ttyname(child)!r}, os.O_RDWR | os.O_NOCTTY), 1); "
                   "sys.stdout.reconfigure(encoding='utf-8', line_buffering=True)")
    command = start_script(entry_points, tmp_path, to_terminal, COLUMNS=str(columns), LINES="40", TERM="xterm")
    output = os.read(parent, 1 << 16)
    os.close(child)  # the script has opened it
    while select.select([parent], [], [], 60)[0]:
        try:
            chunk = os.read(parent, 1 << 16)
        except OSError:  # how Linux says that the other end is closed
            break
        output += chunk
        if not chunk:
            break
    os.close(parent)
    assert command.wait().code == 0
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


@pytest.mark.parametrize("first", ["", 'metrics.print("first")'])
def test_a_closed_output_does_not_stop_the_run(tmp_path, first):
    script = SCRIPT.replace('print("a line of the loop")', "").replace("try:", f"{first}\ntry:")
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", script, str(tmp_path), "disabled"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    os.close(writer)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 4


def test_a_steps_line_has_the_last_held_out_score_beside_the_reward():
    metrics = {"reward": 0.5, "completions/mean_length": 3.0}
    assert "reward 0.500  held out 0.250  length" in step_line(1, 9, metrics, 1.0, "0.250")
    assert "held out" not in step_line(1, 9, metrics, 1.0)
    display = Display("x", 9)
    display.restore([{"step": 1, "eval/greedy_accuracy": 0.5, "eval/greedy_accuracy/ci95": 0.1}, {"step": 2, "reward": 1.0}])
    assert display.held_out == "0.500"
