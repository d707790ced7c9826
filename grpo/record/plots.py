"""The plots of a run's report and of several runs, drawn from the lines of metrics.jsonl (matplotlib, no display needed)."""

import io
import math
import statistics
from collections.abc import Callable, Iterable

from grpo.record.summary import headline_first, is_lower_better, series

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = COLORS = ("#2563a8", "#d97706", "#2e8b57", "#c0392b", "#7d5ba6", "#8a8f98")
PHASE_COLORS = (BLUE, GREEN, ORANGE, PURPLE, RED, "#5bb0ba", "#b5892e", "#c77fb0")
PHASES = ("time/rollout", "time/reward", "time/update")  # first, so that a color means the same thing in every run
STYLE = {
    **{"figure.figsize": (6.2, 3.1), "figure.dpi": 120, "figure.constrained_layout.use": True, "savefig.dpi": "figure"},
    **{"axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.labelsize": 9},
    **{"xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False},
    **{"axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False},
    "text.parse_math": False,  # a metric's name may hold dollar signs
}
Rows = list[dict[str, float]]


def _add_legend(axes, *, min_entries: int = 2) -> None:
    num_entries = len(axes.get_legend_handles_labels()[1])
    if num_entries >= min_entries:
        axes.legend(loc="best", ncols=1 if num_entries < 4 else 2)


def _fill_around(axes, rows: Rows, name: str, width_name: str, color: str, alpha: float, label: str | None = None) -> None:
    """A band of the metric plus and minus another one, where both were logged at the same steps."""
    (steps, values), (width_steps, widths) = series(rows, name), series(rows, width_name)
    if width_steps == steps:
        low, high = ([value + sign * width for value, width in zip(values, widths)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=color, alpha=alpha, linewidth=0, label=label)


def _draw_lines(axes, rows: Rows, lines: Iterable[tuple[str, str, str]]) -> None:
    """One line for each (metric, label, color) that was logged."""
    drawn = [(*series(rows, name), label, color) for name, label, color in lines if any(name in row for row in rows)]
    for index, (steps, values, label, color) in enumerate(drawn):
        style = "-" if index == 0 else "--"  # a line drawn over an equal one stays readable
        axes.plot(steps, values, style, color=color, linewidth=1.6, label=label, marker="." if len(steps) < 15 else None)
    finite = [value for _, values, _, _ in drawn for value in values if math.isfinite(value)]
    if finite and min(finite) >= 0:  # from zero, so that a jitter does not look like a trend
        axes.set_ylim(0, 1.08 * max(finite) if max(finite) > 0 else 0.1)
    _add_legend(axes)


def _draw_reward(axes, rows: Rows) -> None:
    steps, rewards = series(rows, "reward")
    if not steps:
        return
    axes.plot(steps, rewards, color=BLUE, linewidth=1.8, label="mean over the batch")
    _fill_around(axes, rows, "reward", "reward_std", BLUE, 0.15, "± reward_std")
    held_out, dropped = series(rows, "eval/reward"), series(rows, "frac_reward_zero_std")
    if held_out[0]:
        axes.plot(*held_out, "o", color=ORANGE, markersize=4.5, label="held out (sampled)")
    if dropped[0]:
        axes.plot(*dropped, ":", color=GREY, linewidth=1, label="groups without spread")
    _add_legend(axes)


def _draw_eval(axes, rows: Rows) -> None:
    names = headline_first(dict.fromkeys(name for row in rows for name in row if name.startswith("eval/")))
    scores = [name for name in names if not is_lower_better(name) and not name.endswith(("reward", "length"))
              and all(0 <= value <= 1 for value in series(rows, name)[1] if math.isfinite(value))]
    for name, color in zip(scores, COLORS):
        axes.plot(*series(rows, name), color=color, marker="o", markersize=3.5, label=name.removeprefix("eval/"))
        _fill_around(axes, rows, name, f"{name}/ci95", color, 0.12)
    axes.set_ylim(-0.03, 1.03)
    _add_legend(axes, min_entries=1)


def _draw_lengths(axes, rows: Rows) -> None:
    steps, means = series(rows, "completions/mean_length")
    if not steps:
        return
    handles = axes.plot(steps, means, color=BLUE, linewidth=1.8, label="mean length")
    (low_steps, low), (high_steps, high) = (series(rows, f"completions/{end}_length") for end in ("min", "max"))
    if low_steps == high_steps == steps:
        handles.append(axes.fill_between(steps, low, high, color=BLUE, alpha=0.13, linewidth=0, label="min to max"))
    axes.set_ylim(0, 1.3 * max(high or means))  # room for the legend
    cut_steps, cut = series(rows, "completions/clipped_ratio")
    if cut_steps:
        right = axes.twinx()
        percent = [100 * share for share in cut]
        handles += right.plot(cut_steps, percent, color=RED, linewidth=1.2, label="cut off (right)")
        right.set_ylim(-1, 130)
        right.set_yticks([0, 25, 50, 75, 100])
        right.set_ylabel("% cut off at the limit", color=RED)
        right.tick_params(colors=RED)
        right.grid(False)
        right.spines["right"].set_visible(True)
    axes.legend(handles=handles, loc="upper left", ncols=3)


def _draw_time(axes, rows: Rows) -> None:
    timed = [row for row in rows if "time/step" in row and "warmup/step" not in row]
    names = {name for row in timed for name in row if name.startswith("time/")} - {"time/step", "time/total", "time/tools"}
    if not names:
        return
    names = sorted(names, key=lambda name: (PHASES.index(name) if name in PHASES else len(PHASES), name))
    parts = [[row.get(name, 0.0) for row in timed] for name in names]
    parts.append([max(row["time/step"] - sum(row.get(name, 0.0) for name in names), 0.0) for row in timed])
    colors = [PHASE_COLORS[index % len(PHASE_COLORS)] for index in range(len(names))] + ["#c9ccd1"]
    labels = [name.removeprefix("time/") for name in names] + ["other"]
    axes.stackplot([row["step"] for row in timed], *parts, labels=labels, colors=colors, linewidth=0, alpha=0.85)
    axes.set_ylim(0, 1.3 * max(row["time/step"] for row in timed))  # room for the legend
    axes.legend(loc="upper left", ncols=4)


def _draw_grad_norm(axes, rows: Rows) -> None:
    from matplotlib.ticker import LogFormatter

    steps, values = series(rows, "grad_norm")
    if not steps:
        return
    axes.plot(steps, values, color=BLUE, linewidth=1.5)
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if positive and max(positive) > 50 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # the usual one writes powers as formulas
    else:
        axes.set_ylim(bottom=0)


def plots(rows: Rows) -> dict[str, tuple[bytes, str]]:
    """Returns {name: (PNG, caption)} for every plot whose metrics were logged."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = {}
    with rc_context(STYLE):
        for name, title, unit, draw, caption in _contents(rows):
            axes = Figure().add_subplot()
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylabel(unit)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
            draw(axes, rows)
            if axes.has_data():
                buffer = io.BytesIO()
                axes.figure.savefig(buffer, format="png")
                drawn[name] = (buffer.getvalue(), caption)
    return drawn


def comparison(curves: dict[str, list[Rows]], names: list[str], *, title: str, scores: dict[str, tuple[float, float]],
               file_format: str) -> bytes:
    """A panel for each of the metrics `names`, with a line for each label of `curves`: the mean over its runs, in a band from the
    lowest to the highest. Of more curves than there are colors, without bands, but with a panel of `scores`: for each label the
    last value of the last metric and half of its interval. title: of the legend. file_format: a suffix that matplotlib knows,
    such as svg."""
    is_crowded = len(curves) > len(COLORS)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "figure.figsize": (4.6 * len(names), 3.1), "svg.hashsalt": "grpo", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.6 * (len(names) + is_crowded), max(3.1, 0.22 * len(curves))))
        panels = figure.subplots(1, len(names) + is_crowded, squeeze=False)[0]
        for axes, name in zip(panels, names):
            for index, (label, runs) in enumerate(curves.items()):
                values: dict[float, list[float]] = {}
                for rows in runs:
                    for step, value in zip(*series(rows, name)):
                        values.setdefault(step, []).append(value)
                steps, color = sorted(values), COLORS[index % len(COLORS)]
                style = ("-", "--", ":", "-.")[index // len(COLORS) % 4]
                means = [statistics.fmean(values[step]) for step in steps]
                axes.plot(steps, means, linestyle=style, color=color, linewidth=1.5, label=label)
                if not is_crowded:
                    axes.fill_between(steps, *([end(values[step]) for step in steps] for end in (min, max)), color=color,
                                      alpha=0.15, linewidth=0)
            axes.set_title(name)
            axes.set_xlabel("step")
        if is_crowded:
            for place, (label, (mean, half)) in enumerate(reversed(scores.items())):
                panels[-1].errorbar(mean, place, xerr=half, fmt="o", color=COLORS[list(curves).index(label) % len(COLORS)],
                                    markersize=4, capsize=2)
            panels[-1].set_yticks(range(len(scores)), list(reversed(scores)))
            panels[-1].set_title(f"{names[-1]}, last step, 95 %")
            panels[0].legend(fontsize=6, ncols=2)
        else:
            panels[-1].legend(title=title, title_fontsize=8, loc="lower right")
        buffer = io.BytesIO()
        panels[0].figure.savefig(buffer, format=file_format, metadata={"Date": None} if file_format == "svg" else None)
        return buffer.getvalue()


def _contents(rows: Rows) -> list[tuple[str, str, str, Callable[..., None], str]]:
    """(name, title, unit, what draws it, caption) of each plot."""
    warmup = [{**row, "step": row["warmup/step"]} for row in rows if "warmup/step" in row]
    parts = dict.fromkeys(name for row in rows for name in row if name.startswith("rewards/") and name.endswith("/mean"))
    part_lines = [(name, name.split("/")[1], COLORS[index % len(COLORS)]) for index, name in enumerate(parts)]
    kinds = [name for name in dict.fromkeys(name for row in rows for name in row) if name.startswith("sandbox/violations/")
             and any(row.get(name, 0) > 0 for row in rows)]
    violation_lines = [(name, name.split("/")[-1], COLORS[index % len(COLORS)]) for index, name in enumerate(kinds)]
    clip_lines = [("clip_ratio/low", "below 1 - low", BLUE), ("clip_ratio/high", "above 1 + high", ORANGE)]
    gap_lines = [("sampling/log_prob_diff/max", "max", RED), ("sampling/log_prob_diff/mean", "mean", BLUE)]

    def lines(*shown: tuple[str, str, str], of: Rows = rows) -> Callable[..., None]:
        return lambda axes, _: _draw_lines(axes, of, shown)

    return [
        ("reward", "Reward", "reward", _draw_reward,
         "Mean reward of the batch with one standard deviation; share of groups whose rewards are all equal."),
        ("eval", "Held-out evaluation", "score", _draw_eval,
         "Scores on held-out prompts, which are never trained on, with 95 % intervals."),
        ("reward_parts", "Reward parts", "reward", lines(*part_lines if len(part_lines) > 1 else ()),
         "Mean of each part of the reward."),
        ("entropy", "Entropy", "nats per token", lines(("entropy", "entropy", BLUE)),
         "Entropy of the next-token distribution, mean over completion tokens. A fall to zero ends exploration."),
        ("kl", "KL to the reference", "nats per token", lines(("kl", "kl", BLUE)),
         "Estimated KL divergence of the policy from the reference (the adapter switched off)."),
        ("lengths", "Completion length and truncation", "tokens", _draw_lengths,
         "Completion lengths, and the share cut off at the length limit."),
        ("turns", "Tools", "per completion", lines(("turns/mean", "turns", BLUE), ("calls/mean", "calls", GREEN),
                                                   ("calls/failed", "share of calls that failed", RED)),
         "Turns and calls of a completion, and the share of calls that were answered by an error."),
        ("violations", "Violations of the sandbox's rules", "share of completions", lines(*violation_lines),
         "Share of the completions whose code broke a rule of the sandbox, by kind."),
        ("grad_norm", "Gradient norm (before clipping)", "L2 norm", _draw_grad_norm,
         "L2 norm of the whole gradient before clipping."),
        ("clip", "Clip fraction", "share of tokens", lines(*clip_lines),
         "Share of completion tokens whose probability ratio was clipped. Zero when each batch gets one update."),
        ("time", "Time per step", "seconds", _draw_time, "Where the wall time of a step goes."),
        ("sampling_gap", "Sampler against trainer", "nats", lines(*gap_lines),
         "Absolute difference between log-probs recorded while sampling and computed in training: rounding only."),
        ("speed", "Throughput", "tokens per second", lines(("tokens_per_s", "tokens_per_s", BLUE)),
         "Tokens of the step over its wall time."),
        ("lr", "Learning rate", "", lines(("lr", "lr", BLUE)), "Learning rate after the schedule."),
        ("warmup", "Supervised warm-up", "nats per token", lines(("warmup/loss", "loss", BLUE), of=warmup),
         "Cross-entropy of the supervised warm-up before GRPO, by warm-up step."),
    ]
