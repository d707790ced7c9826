"""What a run prints: a live panel on a terminal, one plain line per step everywhere else, and its results at the end."""

import atexit
import contextlib
import math
import sys
import time
from collections.abc import Callable
from functools import partial

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo.record.panel import RunPanel, length_text, part, reward_of, reward_text
from grpo.record.summary import headline, question_of
from grpo.record.terminal import clean, format_duration, format_number, one_line, with_interval

PROGRESS_SECONDS = 30.0  # between two lines where there is no live panel
CLOSED = (OSError, SystemExit)  # what a write to a terminal or pipe that is gone raises; the second is rich's
END_METRICS = ("reward", "reward_std", "completions/mean_length", "completions/clipped_ratio", "entropy", "kl")


def progress_counter(activity: str, show: Callable[[str], None], *, every: float) -> Callable[[int, int], None]:
    """Returns a function of (finished, all) counts of completions that shows them once in some seconds."""
    started = shown = time.monotonic()

    def count(finished: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= every:
            shown = now
            left = (now - started) / finished * (total - finished) if finished else math.nan
            show(f"{activity} {finished}/{total}, left {format_duration(left)}")

    return count


def step_line(step: int, total_steps: int, metrics: dict[str, float], seconds_left: float, held_out: str = "") -> str:
    """Returns the plain line of a training step; metrics that were not logged are left out. held_out: the score of the last
    evaluation, beside the reward: a reward that rises alone is no success."""
    reward, length = reward_text(metrics), length_text(metrics)
    parts = [
        f"step {step:>{len(str(total_steps))}}/{total_steps}",
        reward and f"reward {reward}" or part(metrics, "loss", "loss"),
        held_out and f"held out {held_out}",
        length and f"length {length}",
        part(metrics, "entropy", "entropy"),
        part(metrics, "kl", "kl"),
        part(metrics, "grad_norm", "grad"),
        part(metrics, "lr", "lr"),
        part(metrics, "tokens_per_s", "speed", " tok/s"),
        part(metrics, "memory/peak_gb", "mem", " GB"),
        part(metrics, "time/step", "took", " s"),
        f"left {format_duration(seconds_left)}",
    ]
    return "  ".join(item for item in parts if item)


def _main_evals(evals: dict) -> list[str]:
    """The eval metrics in lines and in the final table; files and report have all of them."""
    shown = headline(evals)
    others = ("eval/reward", "eval/mean_length", "eval/clipped_ratio")
    return shown + [name for name in others if name in evals and name not in shown]


class Display:
    """The console of one run. It never raises because of the terminal: a closed pipe or a lost session silences it."""

    def __init__(self, run_name: str, total_steps: int):
        self.console = Console(highlight=False)
        self.total_steps = total_steps
        self.is_closed = False
        self.is_live = self.console.is_terminal and sys.stdout.isatty() and not self.console.is_dumb_terminal
        self.encoding = self.console.encoding
        self.panel = RunPanel(run_name, total_steps, encoding=self.encoding)
        self.live: Live | None = None
        self.held_out = ""  # score of the last evaluation

    def restore(self, lines: list[dict]) -> None:
        """Reads the metric lines of a resumed run, so that curves and first evaluations continue."""
        for line in lines:
            self.panel.record(line["step"], line)
            self.panel.phase_step = line["step"]
            self._remember(line)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.panel.advance("train", step, self.total_steps, metrics)
        self.panel.record(step, metrics)
        self.panel.status = ""
        self._show(step_line(step, self.total_steps, metrics, self.panel.seconds_left(), self.held_out))

    def warmup(self, step: int, num_steps: int, metrics: dict[str, float], *, prints_line: bool) -> None:
        self.panel.advance("warm-up", step, num_steps, metrics)
        self.panel.record(0, metrics)
        if self.is_live or prints_line:
            values = "  ".join(f"{name.removeprefix('warmup/')} {format_number(value)}"
                               for name, value in metrics.items() if name.startswith("warmup/"))
            self._show(f"warm-up {step}/{num_steps}  {values}  left {format_duration(self.panel.seconds_left())}")

    def eval(self, step: int, metrics: dict[str, float]) -> None:
        self.panel.record(step, metrics)
        self._remember(metrics)
        evals = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        values = "  ".join(f"{name.removeprefix('eval/')} {with_interval(evals, name)}" for name in _main_evals(evals))
        self._show(f"eval {step}/{self.total_steps}  {values}")

    def _remember(self, metrics: dict[str, float]) -> None:
        names = _main_evals({name: value for name, value in metrics.items() if name.startswith("eval/")})
        if names:
            self.held_out = format_number(metrics[names[0]])

    def completion(self, step: int, sample: dict) -> None:
        self.panel.sample = sample
        prompt, completion = question_of(str(sample.get("prompt", ""))), str(sample.get("completion", ""))
        self._show(f"sample {step}/{self.total_steps}  reward {format_number(reward_of(sample))}  "
                   f"{one_line(prompt, 100)!r} -> {one_line(completion, 200)!r}")

    def set_status(self, status: str) -> None:
        self.panel.status = status
        if self.is_live:
            self._show("")

    def progress(self, activity: str) -> Callable[[int, int], None]:
        """Returns a function of (finished, all) counts: the panel's status shows them, or a line every half a minute."""
        self.set_status(activity)
        if self.is_live:
            return progress_counter(activity, self.set_status, every=0.5)
        return progress_counter(activity, self._show, every=PROGRESS_SECONDS)

    def print(self, *renderables: object) -> None:
        """Prints renderables or plain strings (never parsed as markup), unbroken by the width of the terminal."""
        for item in renderables:
            item = Text(clean(item, self.encoding)) if isinstance(item, str) else item
            self._write(partial(self.console.print, item, soft_wrap=isinstance(item, Text)))

    def warn(self, text: str) -> None:
        """Prints text in red, apart from the lines around it."""
        self.print("", Text(clean(text, self.encoding), style="bold red"), "")

    def notice(self, text: str) -> bool:
        """Keeps a line in the live panel from now on; returns False without a panel. Safe in a signal's handler: it does not
        draw the panel, since other output at that moment could leave half a panel behind."""
        self.panel.notice = text
        return self.live is not None

    def stop(self) -> None:
        if self.live is None:
            return
        live, self.live = self.live, None
        atexit.unregister(self.stop)
        self.panel.status, self.is_live = "", False
        with contextlib.suppress(*CLOSED):
            live.stop()

    def render(self) -> Panel:
        """Returns the live panel at the terminal's present width and height."""
        return self.panel.render(self.console.width, self.console.height)

    def _show(self, line: str) -> None:
        """Prints the line, or draws the panel anew in its place."""
        if not self.is_live:
            self._write(partial(print, clean(line, self.encoding), flush=True))
        elif self.live is not None:
            self._write(self.live.refresh)
        elif not self.is_closed:
            self.live = Live(get_renderable=self.render, console=self.console, refresh_per_second=2)
            atexit.register(self.stop)  # a run that dies on its way to `finish` must not leave the cursor hidden
            self._write(partial(self.live.start, refresh=True))

    def _write(self, write: Callable[[], object]) -> None:
        if not self.is_closed:
            try:
                write()
            except CLOSED:
                self.is_closed = True


def final_renderables(summary: dict, samples: list[dict], *, encoding: str) -> list[object]:
    """Returns the table of values before and after, and the samples, that a run prints at its end."""
    evals, train = summary["eval"], summary["train"]
    rows = [_end_row(name, evals[name], evals.get(f"{name}/ci95")) for name in _main_evals(evals)]
    rows += [[name, _value(train[name]["first"]), _value(train[name]["last"]), ""] for name in END_METRICS if name in train]
    table = Table()
    for column in ("metric", "before", "after", "best"):
        table.add_column(column, justify="left" if column == "metric" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell, encoding)) for cell in row))
    renderables: list[object] = [table] if rows else []
    for sample in samples:
        renderables.append(Text("\n" + clean(one_line(question_of(sample["prompt"]), 300), encoding), style="bold"))
        for when in ("before", "after"):
            if sample[when] is not None:
                reward = reward_of(sample[when])
                line = Text(f"  {when:<6} [{format_number(reward)}] ", style="green" if reward > 0 else "red")
                renderables.append(line.append(clean(one_line(sample[when]["completion"], 500), encoding), style="default"))
    return renderables


def _end_row(name: str, record: dict, width: dict | None) -> list[str]:
    first, last = (_value(record[when]) + (f" ± {_value(width[when])}" if width else "") for when in ("first", "last"))
    has_first = record["first"]["step"] == 0  # else there was no evaluation at the start
    best = "" if name.endswith("mean_length") else f"{_value(record['best'])} @ {record['best']['step']}"
    return [name, first if has_first else "", last, best]


def _value(record: dict) -> str:
    return "nan" if record["value"] is None else format_number(record["value"])
