"""What is left of a run: its summary and its report page, all from the files of the run.

    python -m grpo.report RUN_DIR                      rebuild report.html of a run, also of one that was killed
    python -m grpo.report FOLDER [FOLDER ...]          print a table of the runs at or below these folders, best first
        --columns optim.lr,eval/reward    of these keys and metrics
        --csv FILE                        and write all of them

`metrics.jsonl` is the source of truth: one JSON object a line with `step` and any metrics of that step. Numbers that
JSON cannot hold (NaN, infinities) are written as null and read back as NaN. Lines that are no records are passed over.
"""

import argparse
import base64
import html
import json
import math
import sys
from pathlib import Path

from grpo.record.plots import headline, is_lower_better, plots, series
from models.formats.atomic import write_text

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
TRAIN_METRICS = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "kl",
    "grad_norm",
    "sampling/log_prob_diff/max",
)


def parse_record(line: bytes) -> dict | None:
    """The record that a line of metrics.jsonl or completions.jsonl holds, a JSON object with a whole number as `step`; None for
    any other line. A person or a tool may have added lines, and a kill may have cut one short: they are passed over."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, numbers of thousands of digits, nested without end
        return None
    is_record = isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**63
    return row if is_record else None


def read_records(path: Path) -> list[dict]:
    """The records of a file in their order ([] when there is none), without a last line that was cut short."""
    if not path.exists():
        return []
    rows = (parse_record(line) for line in path.read_bytes().split(b"\n")[:-1])
    return [row for row in rows if row is not None]


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Returns the records of metrics.jsonl with null read back as NaN; values that are no numbers are left out."""
    rows = read_records(run_dir / METRICS_FILE)
    return [{name: math.nan if value is None else value for name, value in row.items()
             if value is None or _is_number(value)} for row in rows]


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _record(steps: list[float], values: list[float], name: str) -> dict:
    """First, last and best of a metric; among equals the earliest step is the best. NaN is never the best."""
    finite = [index for index, value in enumerate(values) if math.isfinite(value)]
    sign = -1 if is_lower_better(name) else 1
    best = max(finite, key=lambda index: (sign * values[index], -index)) if finite else 0
    points = {"first": 0, "last": len(values) - 1, "best": best}
    return {key: {"value": _json_number(values[index]), "step": steps[index]} for key, index in points.items()}


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def summarize(run_dir: Path, *, run_name: str, exit_reason: str, total_steps: int, config: dict) -> dict:
    """Returns the contents of summary.json, computed from metrics.jsonl.

    `eval` and `train` map a metric to its first, last and best {value, step}; `num_tokens` counts the prompt and completion
    tokens of all steps; `seconds` is wall time over all sessions of the run; memory is in GB (1e9 bytes).
    """
    rows = read_metrics(run_dir)
    eval_names = dict.fromkeys(name for row in rows for name in row if name.startswith("eval/"))
    train_names = [name for name in TRAIN_METRICS if any(name in row for row in rows)]
    part_names = dict.fromkeys(name for row in rows for name in row if name.startswith("rewards/"))
    peaks = [row["memory/peak_gb"] for row in rows if math.isfinite(row.get("memory/peak_gb", math.nan))]
    return {
        "run_name": run_name,
        "exit_reason": exit_reason,
        "steps": max((row["step"] for row in rows if "reward" in row or "loss" in row), default=0),
        "total_steps": total_steps,
        "num_tokens": int(max((row["num_tokens"] for row in rows if "num_tokens" in row), default=0)),
        "seconds": max((row["time/total"] for row in rows if "time/total" in row), default=0.0),
        "peak_memory_gb": max(peaks) if peaks else None,
        "eval": {name: _record(*series(rows, name), name) for name in eval_names},
        "train": {name: _record(*series(rows, name), name) for name in [*train_names, *part_names]},
        "config": config,
    }


def question_of(prompt: str) -> str:
    """The content of the last user message of a prompt in harmony; all of a prompt that has none. With a system message and
    instructions in front, the question is what tells two prompts apart."""
    before, start, rest = prompt.rpartition("<|start|>user<|message|>")
    return rest.partition("<|end|>")[0] if start else prompt


def before_after_samples(run_dir: Path, *, limit: int) -> list[dict]:
    """Returns up to `limit` of {"prompt", "before", "after"}, each side {"step", "completion", "reward"} or None.

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
        if row["step"] == first_step and is_before:
            before.setdefault(row["prompt"], row)
        if row["step"] == last_step and not (is_before and last_step == first_step):
            after.setdefault(row["prompt"], row)
    both = [prompt for prompt in before if prompt in after]
    both.sort(key=lambda prompt: _reward(before[prompt]) - _reward(after[prompt]))
    prompts = both or [prompt for pair in zip(before, after, strict=False) for prompt in pair] or list(before or after)
    return [
        {"prompt": prompt, "before": _side(before.get(prompt)), "after": _side(after.get(prompt))}
        for prompt in prompts[:limit]
    ]


def _reward(row: dict) -> float:
    return row["reward"] if _is_number(row.get("reward")) else 0.0


def _side(row: dict | None) -> dict | None:
    if row is None:
        return None
    reward = row["reward"] if _is_number(row.get("reward")) else None
    return {"step": row["step"], "completion": row["completion"], "reward": reward}


STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; background: #f6f7f9; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 34px 0 10px; }
.muted { color: #667080; } .reason { padding: 1px 9px; border-radius: 10px; background: #e4e8ee; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0; }
.tile { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 8px 14px; }
.tile b { display: block; font-size: 19px; } .tile span { color: #667080; font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 14px; }
figure { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; margin: 0; padding: 8px; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: #667080; font-size: 13px; padding: 2px 6px; }
.sample { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 10px 14px; margin: 0 0 12px; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 12px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; margin: 4px 0; }
.sides pre { background: #f6f7f9; padding: 8px; border-radius: 6px; max-height: 360px; overflow: auto; }
.good { color: #20744a; font-weight: 600; } .bad { color: #b03427; font-weight: 600; }
table { border-collapse: collapse; background: #fff; font-size: 14px; }
th, td { border: 1px solid #e2e5ea; padding: 4px 12px; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { background: #eef0f4; } .wide { overflow-x: auto; }
"""


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _tiles(summary: dict) -> str:
    peak = summary["peak_memory_gb"]
    tiles = [
        (f"{summary['steps']} of {summary['total_steps']}", "steps"),
        (f"{summary['num_tokens']:,}", "tokens"),
        (_duration(summary["seconds"]), "wall time"),
        ("not logged" if peak is None else f"{_number(peak)} GB", "peak memory"),
    ]
    for name in headline(summary["eval"])[:4]:
        record = summary["eval"][name]
        tiles.append((f"{_number(record['first']['value'])} → {_number(record['last']['value'])}", name))
    return "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(k)}</span></div>' for value, k in tiles
    )


def _sample_html(sample: dict) -> str:
    sides = []
    for when in ("before", "after"):
        side = sample[when]
        if side is None:
            continue
        reward = math.nan if side["reward"] is None else side["reward"]
        kind = "good" if reward > 0 else "bad"
        sides.append(
            f'<div>{when}, step {side["step"]}: <span class="{kind}">reward {_number(reward)}</span>'
            f"<pre>{html.escape(side['completion'])}</pre></div>"
        )
    return (
        f'<div class="sample"><pre>{html.escape(question_of(sample["prompt"]))}</pre>'
        f"<details><summary>whole prompt</summary><pre>{html.escape(sample['prompt'])}</pre></details>"
        f'<div class="sides">{"".join(sides)}</div></div>'
    )


def _table_html(summary: dict) -> str:
    lines = [
        "<tr><th>metric</th>"
        + "".join(f"<th>{when}</th><th>at step</th>" for when in ("first", "last", "best"))
        + "</tr>"
    ]
    for group in ("eval", "train"):
        for name, record in summary[group].items():
            cells = [html.escape(name)]
            for key in ("first", "last", "best"):
                has_best = group == "eval" or name == "reward"
                shown = key != "best" or has_best
                cells += [_number(record[key]["value"]), str(record[key]["step"])] if shown else ["", ""]
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def write_report(run_dir: Path, summary: dict) -> Path:
    """Writes report.html, one file that needs nothing beside it, and returns its path. Texts of the run are escaped."""
    figures = []
    for name, (png, caption) in plots(read_metrics(run_dir)).items():
        data = base64.b64encode(png).decode("ascii")
        figures.append(
            f'<figure id="{name}"><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    samples = before_after_samples(run_dir, limit=4)
    sample_html = (
        "".join(_sample_html(sample) for sample in samples) or '<p class="muted">No completions were logged.</p>'
    )
    config_text = json.dumps(summary["config"], indent=2, ensure_ascii=False) if summary["config"] else ""
    if not config_text and (run_dir / "config.yaml").exists():
        config_text = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
    table = (
        _table_html(summary) if summary["eval"] or summary["train"] else '<p class="muted">No metrics were logged.</p>'
    )
    name = html.escape(summary["run_name"])
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{STYLE}</style></head><body><main>
<h1>{name}</h1>
<div class="muted">GRPO run, ended: <span class="reason">{html.escape(summary["exit_reason"])}</span></div>
<div class="tiles">{_tiles(summary)}</div>
<h2>Curves</h2><div class="plots">{"".join(figures) or '<p class="muted">No metrics were logged.</p>'}</div>
<h2>The same prompts before and after</h2>{sample_html}
<h2>First, last, best</h2>{table}
<h2>Configuration</h2>
<details><summary>as resolved for this run</summary><pre>{html.escape(config_text)}</pre></details>
<p class="muted">Beside this page: {METRICS_FILE} (every metric of every step), {COMPLETIONS_FILE}, {SUMMARY_FILE}.</p>
</main></body></html>
"""
    path = run_dir / REPORT_FILE
    write_text(path, page)
    return path


def rebuild_report(run_dir: Path) -> Path:
    """Rewrites report.html of a run from its files; numbers come from metrics.jsonl, so a killed run gets one as well.

    Raises ValueError when the folder holds no run.
    """
    if not (run_dir / METRICS_FILE).exists():
        raise ValueError(
            f"{run_dir} holds no {METRICS_FILE}: give the folder of a run, or of a sweep with runs below it"
        )
    old = read_summary(run_dir)
    summary = summarize(
        run_dir,
        run_name=old["run_name"] if old else run_dir.resolve().name,
        exit_reason=old["exit_reason"] if old else "unknown (still running, or killed)",
        total_steps=old["total_steps"] if old else 0,
        config=old["config"] if old else {},
    )
    if not old:
        summary["total_steps"] = summary["steps"]
    return write_report(run_dir, summary)


def read_summary(run_dir: Path) -> dict | None:
    path = run_dir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it to rebuild without it") from error


def main(arguments: list[str]) -> int:
    from grpo.record.run_table import RunTable, find_runs  # which reads summaries through this file

    parser = argparse.ArgumentParser(prog="python -m grpo.report", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER",
                        help="a run: rebuild its report; others: a table of runs")
    parser.add_argument("--columns", metavar="KEY,...", help="keys of the config and metrics that the table shows")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every key that differs and every metric there")
    options = parser.parse_args(arguments)
    try:
        if len(options.folders) == 1 and (options.folders[0] / METRICS_FILE).exists():
            print(rebuild_report(options.folders[0]))
            return 0
        runs = RunTable([run_dir for folder in options.folders for run_dir in find_runs(folder)])
        print(runs.text(options.columns.split(",") if options.columns else None))
        if options.csv is not None:
            write_text(options.csv, runs.csv())
            print(options.csv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
