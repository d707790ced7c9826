"""A run's report page, made from its files alone, and tables of several runs.

    python -m grpo.report RUN_DIR                      rebuild report.html of a run, also of one that was killed (no options)
    python -m grpo.report FOLDER [FOLDER ...]          print a table of the runs at or below these folders, best first
        --columns optim.lr,eval/reward    of these keys and metrics
        --csv FILE                        and write all of them
        --plot FILE.svg                   and draw their curves, means over seeds (.svg, .png or .pdf)
"""

import argparse
import base64
import json
import math
import sys
from html import escape
from pathlib import Path

from grpo.configuration.command_line import Once
from grpo.record.outputs import keep_run_files, write_output
from grpo.record.plots import plots
from grpo.record.run_table import RunTable, find_runs
from grpo.record.summary import (
    COMPLETIONS_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    before_after_samples,
    headline,
    question_of,
    read_metrics,
    read_summary,
    summarize,
    suspects_of,
)
from models.formats.atomic import write_text

REPORT_FILE = "report.html"
MOST_SUSPECTS = 8  # shown
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


def write_report(run_dir: Path, summary: dict) -> Path:
    """Writes report.html, one file that needs nothing beside it, and returns its path. Texts of the run are escaped."""
    nothing = '<p class="muted">No metrics were logged.</p>'
    figures = "".join(
        f'<figure id="{name}"><img alt="{escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for name, (png, caption) in plots(read_metrics(run_dir)).items())
    samples = "".join(_sample(sample["prompt"], {f"{when}, step {side['step']}": side for when in ("before", "after")
                                                 if (side := sample[when]) is not None})
                      for sample in before_after_samples(run_dir, limit=4))
    suspects = suspects_of(run_dir)
    shown = "".join(_sample(row["prompt"], {f"{row['suspicion']}; {row.get('split')}, step {row['step']}": row})
                    for row in suspects[:MOST_SUSPECTS])
    config = json.dumps(summary["config"], indent=2, ensure_ascii=False) if summary["config"] else ""
    if not config and (run_dir / "config.yaml").exists():
        config = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
    name = escape(summary["run_name"])
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{STYLE}</style></head><body><main>
<h1>{name}</h1>
<div class="muted">GRPO run, ended: <span class="reason">{escape(summary["exit_reason"])}</span></div>
<div class="tiles">{_tiles(summary)}</div>
<h2>Curves</h2><div class="plots">{figures or nothing}</div>
<h2>The same prompts before and after</h2>{samples or '<p class="muted">No completions were logged.</p>'}
<h2>What looks like reward hacking</h2>
<p class="muted">Completions to read first; a suspicion is no proof. {len(suspects)} are logged{
    f", the newest {MOST_SUSPECTS} are" if len(suspects) > MOST_SUSPECTS else ""}{":" if suspects else "."}</p>{shown}
<h2>First, last, best</h2>{_table(summary) if summary["eval"] or summary["train"] else nothing}
<h2>Configuration</h2>
<details><summary>as resolved for this run</summary><pre>{escape(config)}</pre></details>
<p class="muted">Beside this page: {METRICS_FILE} (every metric of every step), {COMPLETIONS_FILE}, {SUMMARY_FILE}.</p>
</main></body></html>
"""
    write_text(run_dir / REPORT_FILE, page)
    return run_dir / REPORT_FILE


def _tiles(summary: dict) -> str:
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    hours, minutes_left = divmod(minutes, 60)
    peak = summary["peak_memory_gb"]
    tiles = [
        (f"{summary['steps']} of {summary['total_steps']}", "steps"),
        (f"{summary['num_tokens']:,}", "tokens"),
        (f"{hours} h {minutes_left} min" if hours else f"{minutes} min {seconds} s", "wall time"),
        ("not logged" if peak is None else f"{_number(peak)} GB", "peak memory"),
    ]
    for name in headline(summary["eval"])[:4]:
        first, last = (_number(summary["eval"][name][when]["value"]) for when in ("first", "last"))
        tiles.append((f"{first} → {last}", name))
    return "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles)


def _sample(prompt: str, completions: dict[str, dict]) -> str:
    """A prompt and completions of it, each with its title."""
    sides = []
    for title, side in completions.items():
        reward = side["reward"] if isinstance(side.get("reward"), (int, float)) else None
        kind = "good" if (reward or 0) > 0 else "bad"
        sides.append(f'<div>{escape(title)}: <span class="{kind}">reward {_number(reward)}</span>'
                     f"{_calls(side)}<pre>{escape(side['completion'])}</pre></div>")
    return (f'<div class="sample"><pre>{escape(question_of(prompt))}</pre>'
            f"<details><summary>whole prompt</summary><pre>{escape(prompt)}</pre></details>"
            f'<div class="sides">{"".join(sides)}</div></div>')


def _calls(side: dict) -> str:
    """The turns and calls of a completion with tools, as the log has them."""
    calls = side.get("calls")
    if not isinstance(calls, list):
        return ""
    lines = [f"{call.get('name')} {call.get('arguments')} {'failed: ' if call.get('failed') else '= '}{call.get('result')}"
             for call in calls if isinstance(call, dict)]
    words = ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in (
        (side.get("turns"), "turn"), (len(lines), "call")))
    return f", {escape(words)}" + "".join(f"<pre>{escape(line)}</pre>" for line in lines)


def _table(summary: dict) -> str:
    rows = ["<th>metric</th>" + "".join(f"<th>{when}</th><th>at step</th>" for when in ("first", "last", "best"))]
    for name, record in [*summary["eval"].items(), *summary["train"].items()]:
        shown = ("first", "last", "best") if name in summary["eval"] or name == "reward" else ("first", "last")
        cells = [cell for when in shown for cell in (_number(record[when]["value"]), str(record[when]["step"]))]
        cells += [""] * (6 - len(cells))
        rows.append("".join(f"<td>{cell}</td>" for cell in [escape(name), *cells]))
    return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def rebuild_report(run_dir: Path) -> Path:
    """Rewrites report.html of a run from its files; numbers come from metrics.jsonl, so a killed run gets one as well."""
    known = read_summary(run_dir) or {
        "run_name": run_dir.resolve().name, "exit_reason": "unknown (still running, or killed)", "total_steps": 0, "config": {}}
    summary = summarize(run_dir, **{key: known[key] for key in ("run_name", "exit_reason", "total_steps")})
    return write_report(run_dir, {**summary, "total_steps": known["total_steps"] or summary["steps"], "config": known["config"]})


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m grpo.report", description=__doc__.partition("\n")[0])
    parser.register("action", None, Once)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER",
                        help="a run, without options: rebuild its report; else a table of runs")
    parser.add_argument("--columns", metavar="KEY,...", help="keys of the config and metrics that the table shows")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every key that differs and every metric there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw reward and first metric of the runs there")
    options = parser.parse_args(arguments)
    has_options = any(option is not None for option in (options.columns, options.csv, options.plot))
    try:
        for name, path in (("--csv", options.csv), ("--plot", options.plot)):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise ValueError(f"{name} {path}: {'is a folder' if path.is_dir() else 'its folder is not there'}; name a file "
                                 "in a folder that exists")
        if len(options.folders) == 1 and (options.folders[0] / METRICS_FILE).exists() and not has_options:
            print(rebuild_report(options.folders[0]))
            return 0
        if options.csv is not None and options.csv == options.plot:
            raise ValueError(f"--csv and --plot are one file, {options.csv}; give each its own")
        run_dirs = [run_dir for folder in options.folders for run_dir in find_runs(folder)]
        for name, path in (("--csv ", options.csv), ("--plot ", options.plot)):
            if path is not None:
                keep_run_files(path, name, known={run_dir.resolve() for run_dir in run_dirs})
        runs = RunTable(run_dirs)
        text = runs.text(options.columns.split(",") if options.columns else None)
        # all before the first is written
        contents = {path: make() for path, make in (
            (options.csv, runs.csv),
            (options.plot, lambda: runs.plot(options.plot.suffix.removeprefix(".")))) if path is not None}
        print(text)
        for path, content in contents.items():
            write_output(path, content)
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
