"""Reads a run's files: its metrics and samples, its summary, and which of its evaluations come first."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from grpo.record.jsonl import json_safe, read_records

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
SUMMARY_FILE = "summary.json"
TRAIN_METRICS = (
    *("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio"),
    *("turns/mean", "calls/share", "calls/failed", "episodes/failed"),
    *("entropy", "kl", "grad_norm", "sampling/log_prob_diff/max"),
)
# A metric whose name ends in one of these is better when it is lower; every other one when it is higher.
LOWER_IS_BETTER = ("loss", "error", "error_rate", "perplexity", "clipped_ratio", "kl", "failed")


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
    """Returns the eval metrics that have an interval; if none has, the first four."""
    names = list(names)
    ordered = headline_first(names)
    return [name for name in ordered if f"{name}/ci95" in names] or ordered[:4]


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Returns the records of metrics.jsonl with null read back as NaN; values that are no numbers are left out."""
    rows = read_records(run_dir / METRICS_FILE)
    return [{name: math.nan if value is None else value for name, value in row.items()
             if value is None or _is_number(value)} for row in rows]


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def series(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Returns the steps and values at which metric `name` was logged."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def summarize(run_dir: Path, *, run_name: str, exit_reason: str, total_steps: int) -> dict:
    """Returns what summary.json says of metrics.jsonl.

    `eval` and `train` map a metric to its first, last and best {value, step}; `num_tokens` counts the prompt and completion
    tokens of all steps; `seconds` is wall time over all sessions of the run; memory is in GB (1e9 bytes).
    """
    rows = read_metrics(run_dir)
    logged = dict.fromkeys(name for row in rows for name in row)
    train = [name for name in TRAIN_METRICS if name in logged] + [name for name in logged if name.startswith("rewards/")]
    peaks = [value for value in series(rows, "memory/peak_gb")[1] if math.isfinite(value)]
    return {
        "run_name": run_name,
        "exit_reason": exit_reason,
        "steps": max((row["step"] for row in rows if "reward" in row or "loss" in row), default=0),
        "total_steps": total_steps,
        "num_tokens": int(max(series(rows, "num_tokens")[1], default=0)),
        "seconds": max(series(rows, "time/total")[1], default=0.0),
        "peak_memory_gb": max(peaks, default=None),
        "eval": {name: summarize_metric(rows, name) for name in logged if name.startswith("eval/")},
        "train": {name: summarize_metric(rows, name) for name in train},
    }


def summarize_metric(rows: list[dict[str, float]], name: str) -> dict | None:
    """The {value, step} of the metric's first, last and best value; None if it was never logged. Among equals the earliest step
    is the best; NaN never is."""
    steps, values = series(rows, name)
    if not values:
        return None
    finite = [index for index, value in enumerate(values) if math.isfinite(value)]
    sign = -1 if is_lower_better(name) else 1
    best = max(finite, key=lambda index: (sign * values[index], -index)) if finite else 0
    points = {"first": 0, "last": len(values) - 1, "best": best}
    return {key: {"value": json_safe(values[index]), "step": steps[index]} for key, index in points.items()}


def read_summary(run_dir: Path) -> dict | None:
    """The contents of summary.json; None without one. Raises ValueError where it cannot be read."""
    path = run_dir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it to rebuild without it") from error


def question_of(prompt: str) -> str:
    """The content of the last user message of a prompt in harmony; all of a prompt that has none. With a system message and
    instructions in front, the question is what tells two prompts apart."""
    before, start, rest = prompt.rpartition("<|start|>user<|message|>")
    return rest.partition("<|end|>")[0] if start else prompt


def suspects_of(run_dir: Path) -> list[dict]:
    """The logged completions that look like reward hacking (grpo/record/suspects.py), the newest first."""
    return [row for row in reversed(read_records(run_dir / COMPLETIONS_FILE))
            if all(isinstance(row.get(key), str) for key in ("prompt", "completion", "suspicion"))]


def before_after_samples(run_dir: Path, *, limit: int) -> list[dict]:
    """Returns up to `limit` of {"prompt", "before", "after"}, each side {"step", "completion", "reward"} or None; with tools, a
    side has "turns" and "calls" too.

    Before is what the policy wrote ahead of its first update, after is the last step in completions.jsonl: held-out completions
    (split "eval") where there are any, and of the prompts seen on both sides those whose reward rose most.
    """
    rows = [row for row in read_records(run_dir / COMPLETIONS_FILE)
            if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)]
    evals = [row for row in rows if row.get("split") == "eval"]
    rows = evals or rows
    if not rows:
        return []
    first_step, last_step = rows[0]["step"], rows[-1]["step"]
    is_before = first_step <= (0 if evals else 1)  # a step's own completions are sampled ahead of its update
    before, after = {}, {}
    for row in rows:
        side = {"step": row["step"], "completion": row["completion"],
                "reward": row["reward"] if _is_number(row.get("reward")) else None}
        side |= {name: row[name] for name in ("turns", "calls") if name in row}
        if row["step"] == first_step and is_before:
            before.setdefault(row["prompt"], side)
        if row["step"] == last_step and not (is_before and last_step == first_step):
            after.setdefault(row["prompt"], side)
    both = [prompt for prompt in before if prompt in after]
    both.sort(key=lambda prompt: (before[prompt]["reward"] or 0.0) - (after[prompt]["reward"] or 0.0))
    prompts = both or [prompt for pair in zip(before, after, strict=False) for prompt in pair] or list(before or after)
    return [{"prompt": prompt, "before": before.get(prompt), "after": after.get(prompt)} for prompt in prompts[:limit]]
