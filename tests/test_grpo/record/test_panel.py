"""The live panel at the sizes of real terminals."""

import io
import math

from rich.console import Console

from grpo.record.console import Display
from grpo.record.panel import sparkline


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
    display = Display("r", 100)
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
    display = Display("r", 10)
    for step, spread in ((1, 0.1), (2, 0.0)):
        display.step(step, {"reward": step - 1.0, "reward_std": spread, "groups/live": 0, "groups/dropped": 4})
    assert any("1.000 ± 0.000, live 0/4  ▁█ " in line for line in panel_of(display, 80))


def test_time_left_counts_the_steps_that_remain(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("grpo.record.panel.time.monotonic", lambda: now[0])
    display = Display("r", 10)
    for step in (1, 2, 3):
        now[0] += 4.0
        display.step(step, {"time/step": 4.0})
    assert display.panel.seconds_left() == 4.0 * 7
