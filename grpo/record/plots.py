"""The plots of a run's report, each a PNG drawn from the lines of metrics.jsonl (matplotlib, no display needed).

A plot whose metrics were not logged is left out.
"""

import io
import math
from collections.abc import Iterable

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2563a8", "#d97706", "#2e8b57", "#c0392b", "#7d5ba6", "#8a8f98"
# A metric whose name ends in one of these is better when it is lower; every other one when it is higher.
LOWER_IS_BETTER = ("loss", "error", "error_rate", "perplexity", "clipped_ratio", "kl")


def series(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Returns the steps and values at which metric `name` was logged."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def is_lower_better(name: str) -> bool:
    return name.split("/")[-1].endswith(LOWER_IS_BETTER)


def is_interval(name: str) -> bool:
    """Whether an eval metric is the half width of another one's 95 % interval, which is shown beside that one."""
    return name.endswith("/ci95")


def headline_first(names: Iterable[str]) -> list[str]:
    """Returns eval metrics without intervals: those that have one (the headline), other scores, then the rest."""
    names = list(names)
    words = ("accuracy", "avg@", "pass@")
    values = [name for name in names if not is_interval(name)]
    return sorted(values, key=lambda name: (f"{name}/ci95" not in names, not any(word in name for word in words)))


def headline(names: Iterable[str]) -> list[str]:
    """Returns the eval metrics that have an interval; the first four where none has."""
    names = list(names)
    ordered = headline_first(names)
    return [name for name in ordered if f"{name}/ci95" in names] or ordered[:4]


def _axes(title: str, unit: str):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.2, 3.1), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure) -> bytes:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a metric's name may hold dollar signs
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _start_at_zero(axes, values: list[float]) -> None:
    """Non-negative quantities are drawn from zero, so that a jitter does not look like a trend."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) >= 0:
        axes.set_ylim(0, 1.08 * max(finite) if max(finite) > 0 else 0.1)


def _legend(axes, num_entries: int) -> None:
    if num_entries > 1:
        axes.legend(fontsize=8, frameon=False, loc="best", ncols=1 if num_entries < 4 else 2)


def _plot_lines(rows, title: str, unit: str, lines: list[tuple[str, str, str]]) -> bytes | None:
    """One line for each (metric, label, color) that was logged; None when none was."""
    drawn = [(*series(rows, name), label, color) for name, label, color in lines if series(rows, name)[0]]
    if not drawn:
        return None
    figure, axes = _axes(title, unit)
    for index, (steps, values, label, color) in enumerate(drawn):
        style = "-" if index == 0 else "--"  # a line drawn over an equal one stays readable
        marker = "." if len(steps) < 15 else None
        axes.plot(steps, values, style, color=color, linewidth=1.6, label=label, marker=marker)
    _start_at_zero(axes, [value for _, values, _, _ in drawn for value in values])
    _legend(axes, len(drawn))
    return _png(figure)


def _plot_reward(rows) -> bytes | None:
    steps, rewards = series(rows, "reward")
    if not steps:
        return None
    figure, axes = _axes("Reward", "reward")
    axes.plot(steps, rewards, color=BLUE, linewidth=1.8, label="mean over the batch")
    spread_steps, spreads = series(rows, "reward_std")
    num_entries = 1
    if spread_steps == steps:
        low = [reward - spread for reward, spread in zip(rewards, spreads, strict=True)]
        high = [reward + spread for reward, spread in zip(rewards, spreads, strict=True)]
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0, label="± reward_std")
        num_entries += 1
    held_out_steps, held_out = series(rows, "eval/reward")
    if held_out_steps:
        axes.plot(held_out_steps, held_out, "o", color=ORANGE, markersize=4.5, label="held out (sampled)")
        num_entries += 1
    dead_steps, dead = series(rows, "frac_reward_zero_std")
    if dead_steps:
        axes.plot(dead_steps, dead, color=GREY, linewidth=1, linestyle=":", label="groups without spread")
        num_entries += 1
    _legend(axes, num_entries)
    return _png(figure)


def _plot_eval(rows) -> bytes | None:
    names = headline_first(dict.fromkeys(name for row in rows for name in row if name.startswith("eval/")))
    scores = [
        name
        for name in names
        if not is_lower_better(name) and not name.endswith(("reward", "length"))
        if all(0 <= value <= 1 for value in series(rows, name)[1] if math.isfinite(value))
    ]
    if not scores:
        return None
    colors = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
    figure, axes = _axes("Held-out evaluation", "score")
    for index, name in enumerate(scores[:6]):
        color, line_style = colors[index % len(colors)], "-" if index < len(colors) else "--"
        steps, values = series(rows, name)
        label = name.removeprefix("eval/")
        axes.plot(steps, values, line_style, color=color, marker="o", markersize=3.5, label=label)
        interval_steps, widths = series(rows, f"{name}/ci95")
        if interval_steps == steps:
            low = [value - width for value, width in zip(values, widths, strict=True)]
            high = [value + width for value, width in zip(values, widths, strict=True)]
            axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=8, frameon=False, loc="best", ncols=1 if len(scores) < 4 else 2)
    return _png(figure)


def _plot_lengths(rows) -> bytes | None:
    steps, means = series(rows, "completions/mean_length")
    if not steps:
        return None
    figure, axes = _axes("Completion length and truncation", "tokens")
    handles = axes.plot(steps, means, color=BLUE, linewidth=1.8, label="mean length")
    (low_steps, low), (high_steps, high) = (
        series(rows, "completions/min_length"),
        series(rows, "completions/max_length"),
    )
    if low_steps == steps and high_steps == steps:
        handles.append(axes.fill_between(steps, low, high, color=BLUE, alpha=0.13, linewidth=0, label="min to max"))
    axes.set_ylim(0, 1.3 * max(high or means))  # room for the legend
    cut_steps, cut = series(rows, "completions/clipped_ratio")
    if cut_steps:
        right = axes.twinx()
        handles += right.plot(
            cut_steps, [100 * share for share in cut], color=RED, linewidth=1.2, label="cut off (right)"
        )
        right.set_ylim(-1, 130)
        right.set_yticks([0, 25, 50, 75, 100])
        right.set_ylabel("% cut off at the limit", fontsize=9, color=RED)
        right.tick_params(labelsize=8, colors=RED)
        right.spines["top"].set_visible(False)
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="upper left", ncols=3)
    return _png(figure)


def _plot_time(rows) -> bytes | None:
    timed = [row for row in rows if "time/step" in row and "warmup/step" not in row]
    names = sorted({name for row in timed for name in row if name.startswith("time/")} - {"time/step", "time/total"})
    if not timed or not names:
        return None
    # Phases by how much they take, so that colors mean the same thing in every run that is dominated the same way.
    order = [name for name in ("time/rollout", "time/reward", "time/update") if name in names]
    order += [name for name in names if name not in order]
    parts = [[row.get(name, 0.0) for row in timed] for name in order]
    other = [max(row["time/step"] - sum(part[i] for part in parts), 0.0) for i, row in enumerate(timed)]
    figure, axes = _axes("Time per step", "seconds")
    colors = [BLUE, GREEN, ORANGE, PURPLE, RED, "#5bb0ba", "#b5892e", "#c77fb0"]
    colors = [colors[index % len(colors)] for index in range(len(order))] + ["#c9ccd1"]
    labels = [name.removeprefix("time/") for name in order] + ["other"]
    axes.stackplot([row["step"] for row in timed], *parts, other, labels=labels, colors=colors, linewidth=0, alpha=0.85)
    axes.set_ylim(0, 1.3 * max(row["time/step"] for row in timed))  # room for the legend
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=4)
    return _png(figure)


def _plot_grad_norm(rows) -> bytes | None:
    steps, values = series(rows, "grad_norm")
    if not steps:
        return None
    figure, axes = _axes("Gradient norm (before clipping)", "L2 norm")
    axes.plot(steps, values, color=BLUE, linewidth=1.5)
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if positive and max(positive) > 50 * min(positive):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    return _png(figure)


def plots(rows: list[dict[str, float]]) -> dict[str, tuple[bytes, str]]:
    """Returns {name: (PNG, caption)} for every plot whose metrics were logged."""
    warmup = [
        {"step": row["warmup/step"], **row} | {"step": row["warmup/step"]} for row in rows if "warmup/step" in row
    ]
    kl_lines = [("kl", "KL to the reference", BLUE)]
    gap_lines = [
        ("sampling/log_prob_diff/max", "max", RED),
        ("sampling/log_prob_diff/mean", "mean", BLUE),
    ]
    clip_lines = [("clip_ratio/low", "below 1 - low", BLUE), ("clip_ratio/high", "above 1 + high", ORANGE)]
    parts = dict.fromkeys(
        name for row in rows for name in row if name.startswith("rewards/") and name.endswith("/mean")
    )
    colors = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
    part_lines = [(name, name.split("/")[1], colors[index % len(colors)]) for index, name in enumerate(parts)]
    drawn = {
        "reward": (
            _plot_reward(rows),
            "Mean reward of the batch with one standard deviation; share of groups whose rewards are all equal.",
        ),
        "eval": (_plot_eval(rows), "Scores on held-out prompts, which are never trained on, with 95 % intervals."),
        "reward_parts": (
            _plot_lines(rows, "Reward parts", "reward", part_lines) if len(part_lines) > 1 else None,
            "Mean of each part of the reward.",
        ),
        "entropy": (
            _plot_lines(rows, "Entropy", "nats per token", [("entropy", "entropy", BLUE)]),
            "Entropy of the next-token distribution, mean over completion tokens. A fall to zero ends exploration.",
        ),
        "kl": (
            _plot_lines(rows, "KL to the reference", "nats per token", kl_lines),
            "Estimated KL divergence of the policy from the reference (the adapter switched off).",
        ),
        "lengths": (_plot_lengths(rows), "Completion lengths, and the share cut off at the length limit."),
        "grad_norm": (_plot_grad_norm(rows), "L2 norm of the whole gradient before clipping."),
        "clip": (
            _plot_lines(rows, "Clip fraction", "share of tokens", clip_lines),
            "Share of completion tokens whose probability ratio was clipped. Zero when each batch gets one update.",
        ),
        "time": (_plot_time(rows), "Where the wall time of a step goes."),
        "sampling_gap": (
            _plot_lines(rows, "Sampler against trainer", "nats", gap_lines),
            "Absolute difference between log-probs recorded while sampling and computed in training: rounding only.",
        ),
        "speed": (
            _plot_lines(rows, "Throughput", "tokens per second", [("tokens_per_s", "tokens/s", BLUE)]),
            "Tokens of the step over its wall time.",
        ),
        "lr": (_plot_lines(rows, "Learning rate", "", [("lr", "lr", BLUE)]), "Learning rate after the schedule."),
        "warmup": (
            _plot_lines(warmup, "Supervised warm-up", "nats per token", [("warmup/loss", "loss", BLUE)]),
            "Cross-entropy of the supervised warm-up before GRPO, by warm-up step.",
        ),
    }
    return {name: (png, caption) for name, (png, caption) in drawn.items() if png is not None}
