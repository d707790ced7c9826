"""What a run shows while it trains: a live panel on a terminal, one plain line per step everywhere else.

Model output is untrusted: every text that reaches the terminal goes through `clean`, and is put into rich `Text`
objects, which are never parsed as markup.
"""

import atexit
import contextlib
import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo.record.plots import headline, headline_first
from grpo.report import question_of

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-~=+*#"
MAX_PANEL_WIDTH = 110
STEPS_FOR_TIME_LEFT = 10
PROGRESS_SECONDS = 30.0  # between two lines where there is no live panel
END_METRICS = ("reward", "reward_std", "completions/mean_length", "completions/clipped_ratio", "entropy", "kl")


def clean(text: str, encoding: str) -> str:
    """Returns `text` safe to print: control and direction-changing characters become visible escapes, characters that
    `encoding` lacks become `?`. Newlines stay."""
    text = text if encoding.lower().startswith("utf") else text.replace("±", "+-")
    visible = "".join(char if char == "\n" or char.isprintable() else ascii(char)[1:-1] for char in text)
    return visible.encode(encoding, "replace").decode(encoding)


def print_error(label: str, message: str) -> None:
    """Prints `label: message` to stderr: the way out for every failure, whose text may come from data, graders or paths."""
    with contextlib.suppress(OSError, ValueError):  # a closed terminal or stream must not change how the program ends
        print(clean(f"{label}: {message}", sys.stderr.encoding or "utf-8"), file=sys.stderr, flush=True)


def format_number(value: float) -> str:
    """Returns three or four significant digits, in the notation people read fastest at that size."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1e-3 or value == 0:
        return f"{value:.3f}"
    return f"{value:.1e}"


def format_duration(seconds: float) -> str:
    """Returns `h:mm:ss`, or `m:ss` below one hour; `?` when it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress_counter(activity: str, show: Callable[[str], None], *, every: float) -> Callable[[int, int], None]:
    """Returns what takes (finished, all) counts of completions as often as they come, and shows them every so many seconds."""
    started = shown = time.monotonic()

    def count(finished: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= every:
            shown = now
            left = (now - started) / finished * (total - finished) if finished else math.nan
            show(f"{activity} {finished}/{total}, left {format_duration(left)}")

    return count


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


def _part(metrics: dict[str, float], name: str, label: str, unit: str = "") -> str | None:
    """None where it was not logged, or is NaN: a step without a live group has no gradient."""
    value = metrics.get(name, math.nan)
    return None if math.isnan(value) else f"{label} {format_number(value)}{unit}"


def _percent(metrics: dict[str, float], name: str) -> str | None:
    return f"{100 * metrics[name]:.0f}%" if name in metrics else None


def _reward_text(metrics: dict[str, float]) -> str | None:
    if "reward" not in metrics:
        return None
    spread = f" ± {format_number(metrics['reward_std'])}" if "reward_std" in metrics else ""
    dropped, live = metrics.get("groups/dropped", 0), metrics.get("groups/live", 0)
    groups = f", live {live}/{live + dropped}" if dropped else ""  # groups that teach something
    return f"{format_number(metrics['reward'])}{spread}{groups}"


def _length_text(metrics: dict[str, float]) -> str | None:
    if "completions/mean_length" not in metrics:
        return None
    text = f"{metrics['completions/mean_length']:.1f}"
    if "completions/max_length" in metrics:
        text += f" (max {metrics['completions/max_length']:.0f})"
    if "completions/clipped_ratio" in metrics:
        text += f", {_percent(metrics, 'completions/clipped_ratio')} cut"
    return text


def step_line(step: int, total_steps: int, metrics: dict[str, float], seconds_left: float) -> str:
    """Returns the plain line of a training step; metrics that were not logged are left out."""
    reward, length = _reward_text(metrics), _length_text(metrics)
    parts = [
        f"step {step:>{len(str(total_steps))}}/{total_steps}",
        reward and f"reward {reward}",
        length and f"length {length}",
        _part(metrics, "entropy", "entropy"),
        _part(metrics, "kl", "kl"),
        _part(metrics, "grad_norm", "grad"),
        _part(metrics, "lr", "lr"),
        _part(metrics, "tokens_per_s", "speed", " tok/s"),
        _part(metrics, "memory/peak_gb", "mem", " GB"),
        _part(metrics, "time/step", "took", " s"),
        f"left {format_duration(seconds_left)}",
    ]
    return "  ".join(part for part in parts if part)


def _short_name(name: str) -> str:
    return name.removeprefix("eval/")


def with_interval(metrics: dict[str, float], name: str) -> str:
    """Returns the value with half the width of its 95 % interval where that was logged."""
    width = f" ± {format_number(metrics[name + '/ci95'])}" if f"{name}/ci95" in metrics else ""
    return format_number(metrics[name]) + width


def _shown(evals: dict) -> list[str]:
    """The eval metrics that lines and the final table have room for; files and report have all of them."""
    shown = headline(evals)
    others = ("eval/reward", "eval/mean_length", "eval/clipped_ratio")
    return shown + [name for name in others if name in evals and name not in shown]


def one_line(text: str, limit: int) -> str:
    """Returns `text` on one line of at most `limit` characters: newlines shown as `\\n`, the middle cut out."""
    flat = text.replace("\n", "\\n")
    if len(flat) <= limit:
        return flat
    tail = limit // 3
    return f"{flat[: limit - tail - 5]} ... {flat[len(flat) - tail :]}"


class Display:
    """The console of one run. It never raises because of the terminal: a closed pipe or a lost session silences it."""

    def __init__(self, run_name: str, total_steps: int, *, is_enabled: bool):
        self.console = Console(highlight=False)
        self.run_name = run_name
        self.total_steps = total_steps
        self.is_enabled = is_enabled
        self.is_live = (
            is_enabled and self.console.is_terminal and sys.stdout.isatty() and not self.console.is_dumb_terminal
        )
        self.encoding = self.console.encoding
        self.ascii_only = not self.encoding.lower().startswith("utf")
        self.live: Live | None = None
        self.start_time = time.monotonic()
        self.step_times: deque[tuple[int, float]] = deque(maxlen=STEPS_FOR_TIME_LEFT + 1)
        self.phase, self.phase_step, self.phase_total = "train", 0, total_steps
        self.status = ""
        self.notice_text: str | None = None
        self.metrics: dict[str, float] = {}
        self.rewards: list[float] = []
        self.entropies: list[float] = []
        self.losses: list[float] = []
        self.first_eval: dict[str, float] = {}
        self.last_eval: dict[str, float] = {}
        self.last_eval_step = 0
        self.sample: dict | None = None

    def restore(self, lines: list[dict]) -> None:
        """Takes over the metric lines of a resumed run, so that curves and first evaluations go on where they were."""
        for line in lines:
            self._record(line["step"], {name: value for name, value in line.items() if name != "step"})
            self.phase_step = line["step"]

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if self.phase != "train":
            self._enter("train", self.total_steps)
        self._take_step(step, metrics)
        self._record(step, metrics)
        self.status = ""
        self._show(lambda: step_line(step, self.total_steps, metrics, self.seconds_left()))

    def warmup(self, step: int, num_steps: int, metrics: dict[str, float], *, prints_line: bool) -> None:
        if self.phase != "warm-up":
            self._enter("warm-up", num_steps)
        self._take_step(step, metrics)
        self._record(0, metrics)
        if self.is_live or prints_line:
            shown = {
                name.removeprefix("warmup/"): value for name, value in metrics.items() if name.startswith("warmup/")
            }
            values = "  ".join(f"{name} {format_number(value)}" for name, value in shown.items())
            self._show(lambda: f"warm-up {step}/{num_steps}  {values}  left {format_duration(self.seconds_left())}")

    def eval(self, step: int, metrics: dict[str, float]) -> None:
        self._record(step, metrics)
        evals = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        values = "  ".join(f"{_short_name(name)} {with_interval(evals, name)}" for name in _shown(evals))
        self._show(lambda: f"eval {step}/{self.total_steps}  {values}")

    def completion(self, step: int, sample: dict) -> None:
        self.sample = sample
        self._show(
            lambda: (
                f"sample {step}/{self.total_steps}  reward {format_number(_reward_of(sample))}  "
                f"{one_line(_text_of(sample, 'prompt'), 100)!r} -> {one_line(_text_of(sample, 'completion'), 200)!r}"
            )
        )

    def set_status(self, status: str) -> None:
        self.status = status
        if self.is_live:
            self._show(lambda: "")

    def progress(self, activity: str) -> Callable[[int, int], None]:
        """Returns what takes (finished, all) counts: the panel's status shows them, else a line every half a minute."""
        self.set_status(activity)
        if self.is_live:
            return progress_counter(activity, self.set_status, every=0.5)
        return progress_counter(activity, lambda text: self._show(lambda: text), every=PROGRESS_SECONDS)

    def print(self, *renderables: object) -> None:
        """Prints renderables or plain strings (never parsed as markup), unbroken by the width of the terminal."""
        if not self.is_enabled:
            return
        try:
            for item in renderables:
                item = Text(clean(item, self.encoding)) if isinstance(item, str) else item
                self.console.print(item, soft_wrap=isinstance(item, Text))
        except OSError:
            self.is_enabled = self.is_live = False

    def warn(self, text: str) -> None:
        """Prints text in red, apart from the lines around it."""
        self.print("", Text(clean(text, self.encoding), style="bold red"), "")

    def notice(self, text: str) -> bool:
        """Keeps a line in the live panel from now on; False where there is none. Safe in a signal's handler: the panel is not
        drawn here, since what else writes to the terminal beside it leaves half a panel behind."""
        self.notice_text = text
        return self.live is not None

    def stop(self) -> None:
        if self.live is None:
            return
        live, self.live = self.live, None
        atexit.unregister(self.stop)
        self.status, self.is_live = "", False
        try:
            live.stop()
        except OSError:
            self.is_enabled = False

    def seconds_left(self) -> float:
        """Returns the time left in the phase by the mean of the last steps, evaluations between them included; NaN
        before the first step."""
        if len(self.step_times) < 2:
            return math.nan
        (first_step, first_time), (last_step, last_time) = self.step_times[0], self.step_times[-1]
        return (last_time - first_time) / max(last_step - first_step, 1) * (self.phase_total - self.phase_step)

    def _enter(self, phase: str, num_steps: int) -> None:
        self.phase, self.phase_total = phase, num_steps
        self.step_times.clear()

    def _take_step(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        if not self.step_times and "time/step" in metrics:
            self.step_times.append((step - 1, now - metrics["time/step"]))
        self.phase_step = step
        self.step_times.append((step, now))

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        evals = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if evals:
            self.first_eval = evals | self.first_eval
            self.last_eval = self.last_eval | evals
            self.last_eval_step = step
        self.metrics = self.metrics | metrics
        if "reward" in metrics:
            self.rewards.append(metrics["reward"])
        if "entropy" in metrics:
            self.entropies.append(metrics["entropy"])
        if "warmup/loss" in metrics:
            self.losses.append(metrics["warmup/loss"])

    def _show(self, plain_line) -> None:
        if not self.is_enabled:
            return
        try:
            if not self.is_live:
                print(clean(plain_line(), self.encoding), flush=True)
            elif self.live is None:
                self.live = Live(get_renderable=self.render, console=self.console, refresh_per_second=2)
                atexit.register(self.stop)  # a run that dies on its way to `finish` must not leave the cursor hidden
                self.live.start(refresh=True)
            else:
                self.live.refresh()
        except OSError:
            self.is_enabled = self.is_live = False

    def render(self) -> Panel:
        """Returns the live panel at the terminal's present width and height."""
        width = min(self.console.width - 2, MAX_PANEL_WIDTH)  # room for the ^C that a terminal echoes behind the panel
        room = max(width - 15, 10)
        rows = [
            ("progress", self._progress(room)),
            ("loss", self._warmup_loss(room)),
            ("reward", self._with_spark(_reward_text(self.metrics), self.rewards, room)),
            ("eval", self._evals(room)),
            ("length", self._line(_length_text(self.metrics))),
            ("policy", self._policy(room)),
            ("speed", self._speed(room)),
            ("signal", self._line(self.notice_text, style="bold yellow")),
        ]
        if self.sample is not None and self.console.height >= 18:
            num_lines = 2 if self.console.height >= 24 else 1
            rows += [
                ("prompt", self._sample_text("prompt", room, 1)),
                ("sample", self._sample_text("completion", room, num_lines)),
            ]
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, style="dim", width=8)
        grid.add_column(ratio=1)
        for label, content in rows:
            if content is not None:
                grid.add_row(label, content)
        title = Text(clean(self.run_name, self.encoding))
        return Panel(grid, title=title, title_align="left", width=width, border_style="cyan")

    def _line(self, text: str | None, style: str = "") -> Text | None:
        if text is None:
            return None
        return Text(clean(text, self.encoding), style=style, no_wrap=True, overflow="crop")

    def _progress(self, room: int) -> Text:
        elapsed = time.monotonic() - self.start_time
        times = f" elapsed {format_duration(elapsed)}, left {format_duration(self.seconds_left())}"
        count = f"{self.phase} {self.phase_step}/{self.phase_total} "
        status = f" | {self.status}" if self.status else ""
        bar_width = min(40, room - len(count) - len(times) - len(status))
        text = Text(count, no_wrap=True, overflow="crop", style="bold")
        if bar_width >= 4:
            done = bar_width * self.phase_step // max(self.phase_total, 1)
            full, empty = ("=", ".") if self.ascii_only else ("━", "─")
            text.append(full * done, style="green")
            text.append(empty * (bar_width - done), style="dim")
        text.append(times, style="not bold")
        text.append(clean(status, self.encoding), style="not bold dim")
        return text

    def _warmup_loss(self, room: int) -> Text | None:
        if self.phase != "warm-up" or not self.losses:
            return None
        return self._with_spark(format_number(self.losses[-1]), self.losses, room)

    def _with_spark(self, text: str | None, values: list[float], room: int) -> Text | None:
        if text is None:
            return None
        line = self._line(f"{text:<15}  ")
        line.append(sparkline(values, min(40, room - len(line.plain)), ascii_only=self.ascii_only), style="green")
        return line

    def _evals(self, room: int) -> Text | None:
        """Each evaluated value now, and at the first evaluation in brackets."""
        if not self.last_eval:
            return None
        parts = [f"step {self.last_eval_step}:"]
        for name in headline_first(self.last_eval):
            part = f"{_short_name(name)} {with_interval(self.last_eval, name)}"
            if self.last_eval_step > 0 and name in self.first_eval:
                part += f" (from {format_number(self.first_eval[name])})"
            parts.append(part)
        return self._parts(parts, room, style="bold")

    def _parts(self, parts: list[str | None], room: int, style: str = "") -> Text | None:
        """The parts that are there side by side, none cut, as many as fit on two lines."""
        lines = [""]
        for part in filter(None, parts):
            longer = f"{lines[-1]}  {part}".strip()
            if len(longer) <= room or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(part)
        return self._line("\n".join(lines[:2]), style) if lines[0] else None

    def _policy(self, room: int) -> Text | None:
        clip = [_percent(self.metrics, f"clip_ratio/{side}") for side in ("low", "high")]
        parts = [
            _part(self.metrics, "entropy", "entropy"),
            _part(self.metrics, "kl", "kl"),
            _part(self.metrics, "grad_norm", "grad"),
            f"clipped {clip[0]}/{clip[1]}" if None not in clip else None,
            _part(self.metrics, "lr", "lr"),
        ]
        return self._parts(parts, room)

    def _speed(self, room: int) -> Text | None:
        metrics = self.metrics
        split = []
        if metrics.get("time/step", 0) > 0:
            for name in ("rollout", "reward", "update"):
                if f"time/{name}" in metrics:
                    split.append(f"{name} {100 * metrics[f'time/{name}'] / metrics['time/step']:.0f}%")
        parts = [
            _part(metrics, "tokens_per_s", "", " tok/s"),
            _part(metrics, "time/step", "", " s/step"),
            _part(metrics, "memory/peak_gb", "memory", " GB"),
            f"({', '.join(split)})" if split else None,
        ]
        return self._parts([part and part.strip() for part in parts], room)

    def _sample_text(self, field: str, room: int, num_lines: int) -> Text:
        text = Text(no_wrap=True, overflow="crop")
        if field == "completion":
            reward = _reward_of(self.sample)
            text.append(f"[{format_number(reward)}] ", style="bold green" if reward > 0 else "bold red")
        text.append(one_line(clean(_text_of(self.sample, field), self.encoding), room * num_lines - len(text)))
        # Cut by hand: rich would move a completion without spaces to the next line as one long word.
        return Text("\n").join(text.divide(range(room, len(text), room)))


def _reward_of(sample: dict) -> float:
    reward = sample.get("reward")
    return math.nan if reward is None else float(reward)


def _text_of(sample: dict, field: str) -> str:
    text = str(sample.get(field, ""))
    return question_of(text) if field == "prompt" else text


def final_renderables(summary: dict, samples: list[dict], *, encoding: str) -> list[object]:
    """Returns the before/after table and the samples that a run prints at its end."""
    table = Table(title=None, title_justify="left")
    for column in ("metric", "before", "after", "best"):
        table.add_column(column, justify="left" if column == "metric" else "right", overflow="fold")
    for group in ("eval", "train"):
        for name in (
            _shown(summary[group]) if group == "eval" else [name for name in END_METRICS if name in summary[group]]
        ):
            record, width = summary[group][name], summary[group].get(f"{name}/ci95")
            has_best = group == "eval" and not name.endswith("mean_length")
            best_text = f"{_value(record['best'])} @ {record['best']['step']}" if has_best else ""
            cells = [name]
            for when in ("first", "last"):
                is_after = group == "eval" and when == "first" and record[when]["step"] > 0  # no evaluation at the start
                cells.append("" if is_after else _value(record[when]) + (f" ± {_value(width[when])}" if width else ""))
            cells.append(best_text)
            table.add_row(*(Text(clean(cell, encoding)) for cell in cells))
    renderables: list[object] = [table] if table.row_count else []
    for sample in samples:
        lines = [Text("\n" + clean(one_line(question_of(sample["prompt"]), 300), encoding), style="bold")]
        for when in ("before", "after"):
            if sample[when] is not None:
                reward = _reward_of(sample[when])
                line = Text(f"  {when:<6} [{format_number(reward)}] ", style="green" if reward > 0 else "red")
                line.append(clean(one_line(sample[when]["completion"], 500), encoding), style="default")
                lines.append(line)
        renderables += lines
    return renderables


def _value(record: dict) -> str:
    return "nan" if record["value"] is None else format_number(record["value"])
