"""The live panel of a run: what it knows of the run, and how that is drawn at any size of the terminal.

Texts are put into rich `Text` objects, which are never parsed as markup.
"""

import itertools
import math
import textwrap
import time
from collections import deque

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo.record.summary import headline_first, question_of
from grpo.record.terminal import clean, format_duration, format_number, one_line, with_interval

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-~=+*#"
MAX_WIDTH = 110
LABEL_WIDTH = 8
STEPS_FOR_TIME_LEFT = 10
NO_BREAK = "\u00a0"  # holds a part together where a line is broken


def sparkline(values: list[float], width: int, *, ascii_only: bool) -> str:
    """Returns at most `width` characters for the finite values, oldest first; neighbours are averaged when there are
    more values than characters. The lowest value is the lowest block; a constant series is drawn in the middle."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    num_points = min(width, len(finite))
    edges = [index * len(finite) // num_points for index in range(num_points + 1)]
    means = [sum(finite[start:end]) / (end - start) for start, end in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    if high - low < 1e-12:
        return blocks[3] * num_points
    return "".join(blocks[min(7, int((mean - low) / (high - low) * 8))] for mean in means)


def part(metrics: dict[str, float], name: str, label: str, unit: str = "") -> str | None:
    """`label value unit`; None if the metric was not logged or is NaN, as a gradient norm in a step without update."""
    value = metrics.get(name, math.nan)
    return None if math.isnan(value) else f"{label} {format_number(value)}{unit}".strip()


def reward_text(metrics: dict[str, float]) -> str | None:
    if "reward" not in metrics:
        return None
    spread = f" ± {format_number(metrics['reward_std'])}" if "reward_std" in metrics else ""
    dropped, live = metrics.get("groups/dropped", 0), metrics.get("groups/live", 0)
    groups = f", live {live}/{live + dropped}" if dropped else ""  # groups that teach something
    return f"{format_number(metrics['reward'])}{spread}{groups}"


def length_text(metrics: dict[str, float]) -> str | None:
    if "completions/mean_length" not in metrics:
        return None
    text = f"{metrics['completions/mean_length']:.1f}"
    if "completions/max_length" in metrics:
        text += f" (max {metrics['completions/max_length']:.0f})"
    if "completions/clipped_ratio" in metrics:
        text += f", {100 * metrics['completions/clipped_ratio']:.0f}% cut"
    return text


def reward_of(sample: dict) -> float:
    reward = sample.get("reward")
    return math.nan if reward is None else float(reward)


class RunPanel:
    """The state of a run while it trains. A metric keeps its value until it is logged again."""

    def __init__(self, run_name: str, total_steps: int, *, encoding: str):
        self.run_name = run_name
        self.encoding = encoding
        self.ascii_only = not encoding.lower().startswith("utf")
        self.start_time = time.monotonic()
        self.step_times: deque[tuple[int, float]] = deque(maxlen=STEPS_FOR_TIME_LEFT + 1)
        self.phase, self.phase_step, self.phase_total = "train", 0, total_steps
        self.status = ""  # what the run is doing within a step
        self.notice: str | None = None
        self.metrics: dict[str, float] = {}
        self.curves: dict[str, list[float]] = {"reward": [], "warmup/loss": []}
        self.first_eval: dict[str, float] = {}
        self.last_eval: dict[str, float] = {}
        self.last_eval_step = 0
        self.sample: dict | None = None

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Takes over a line of metrics.jsonl: of a step, an evaluation or a step of the warm-up."""
        evals = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if evals:
            self.first_eval = evals | self.first_eval
            self.last_eval = self.last_eval | evals
            self.last_eval_step = step
        self.metrics = self.metrics | metrics
        for name, curve in self.curves.items():
            if name in metrics:
                curve.append(metrics[name])

    def advance(self, phase: str, step: int, num_steps: int, metrics: dict[str, float]) -> None:
        """Takes the time of a step of "train" or "warm-up"."""
        if phase != self.phase:
            self.phase, self.phase_total = phase, num_steps
            self.step_times.clear()
        now = time.monotonic()
        if not self.step_times and "time/step" in metrics:
            self.step_times.append((step - 1, now - metrics["time/step"]))
        self.phase_step = step
        self.step_times.append((step, now))

    def seconds_left(self) -> float:
        """Returns the time left in the phase by the mean of the last steps, evaluations between them included; NaN
        before the first step."""
        if len(self.step_times) < 2:
            return math.nan
        (first_step, first_time), (last_step, last_time) = self.step_times[0], self.step_times[-1]
        return (last_time - first_time) / max(last_step - first_step, 1) * (self.phase_total - self.phase_step)

    def render(self, width: int, height: int) -> Panel:
        """Returns the panel for a terminal of `width` columns and `height` rows."""
        width = min(width - 2, MAX_WIDTH)  # room for the ^C that a terminal echoes behind the panel
        room = max(width - 15, 10)
        metrics = self.metrics
        rows = [
            ("progress", self._progress(room)),
            ("loss", self._curve("warmup/loss", part(metrics, "warmup/loss", ""), room) if self.phase == "warm-up" else None),
            ("reward", self._curve("reward", reward_text(metrics), room)),
            ("eval", self._parts(self._evals(), room, style="bold")),
            ("length", self._line(length_text(metrics) or "")),
            ("policy", self._parts(self._policy(), room)),
            ("speed", self._parts(self._speed(), room)),
            ("signal", self._line(self.notice or "", style="bold yellow")),
        ]
        if self.sample is not None and height >= 18:
            prompt = clean(question_of(str(self.sample.get("prompt", ""))), self.encoding)
            rows.append(("prompt", self._line(one_line(prompt, room))))
            rows.append(("sample", self._completion(room, 2 if height >= 24 else 1)))
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, style="dim", width=LABEL_WIDTH)
        grid.add_column(ratio=1)
        for label, content in rows:
            if content:
                grid.add_row(label, content)
        title = Text(clean(self.run_name, self.encoding))
        return Panel(grid, title=title, title_align="left", width=width, border_style="cyan")

    def _line(self, text: str, style: str = "") -> Text:
        return Text(clean(text, self.encoding), style=style, no_wrap=True, overflow="crop")

    def _progress(self, room: int) -> Text:
        elapsed = time.monotonic() - self.start_time
        times = f" elapsed {format_duration(elapsed)}, left {format_duration(self.seconds_left())}"
        status = f" | {self.status}" if self.status else ""
        text = self._line(f"{self.phase} {self.phase_step}/{self.phase_total} ", style="bold")
        bar_width = min(40, room - len(text) - len(times) - len(status))
        if bar_width >= 4:
            done = bar_width * self.phase_step // max(self.phase_total, 1)
            full, empty = ("=", ".") if self.ascii_only else ("━", "─")
            text.append(full * done, style="green").append(empty * (bar_width - done), style="dim")
        return text.append(times, style="not bold").append(clean(status, self.encoding), style="not bold dim")

    def _curve(self, name: str, text: str | None, room: int) -> Text | None:
        if text is None:
            return None
        line = self._line(f"{text:<15}  ")
        return line.append(sparkline(self.curves[name], min(40, room - len(line)), ascii_only=self.ascii_only), style="green")

    def _parts(self, parts: list[str | None], room: int, style: str = "") -> Text:
        """The non-empty parts side by side, as many whole ones as fit on two lines."""
        text = "  ".join(item.replace(" ", NO_BREAK) for item in parts if item)
        lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
        return self._line("\n".join(lines[:2]).replace(NO_BREAK, " "), style)

    def _evals(self) -> list[str]:
        """Each evaluated value now, and at the first evaluation in brackets."""
        parts = [f"step {self.last_eval_step}:"] if self.last_eval else []
        for name in headline_first(self.last_eval):
            is_later = self.last_eval_step > 0 and name in self.first_eval
            first = f" (from {format_number(self.first_eval[name])})" if is_later else ""
            parts.append(f"{name.removeprefix('eval/')} {with_interval(self.last_eval, name)}{first}")
        return parts

    def _policy(self) -> list[str | None]:
        metrics = self.metrics
        clipped = [f"{100 * metrics[name]:.0f}%" for name in ("clip_ratio/low", "clip_ratio/high") if name in metrics]
        return [part(metrics, "entropy", "entropy"), part(metrics, "kl", "kl"), part(metrics, "grad_norm", "grad"),
                f"clipped {'/'.join(clipped)}" if len(clipped) == 2 else None, part(metrics, "lr", "lr")]

    def _speed(self) -> list[str | None]:
        metrics = self.metrics
        shares = []
        if metrics.get("time/step", 0) > 0:
            shares = [f"{name} {100 * metrics[f'time/{name}'] / metrics['time/step']:.0f}%"
                      for name in ("rollout", "reward", "update") if f"time/{name}" in metrics]
        return [part(metrics, "tokens_per_s", "", " tok/s"), part(metrics, "time/step", "", " s/step"),
                part(metrics, "memory/peak_gb", "memory", " GB"), f"({', '.join(shares)})" if shares else None]

    def _completion(self, room: int, num_lines: int) -> Text:
        reward = reward_of(self.sample)
        text = self._line("").append(f"[{format_number(reward)}] ", style="bold green" if reward > 0 else "bold red")
        completion = clean(str(self.sample.get("completion", "")), self.encoding)
        text.append(one_line(completion, room * num_lines - len(text)))
        # Cut by hand: rich would move a completion without spaces to the next line as one long word.
        return Text("\n").join(text.divide(range(room, len(text), room)))
