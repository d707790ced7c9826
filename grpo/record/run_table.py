"""Tables of several runs, of a sweep say: a line for each, best first, and means over the seeds of what else is equal.

`python -m grpo.report FOLDER` prints one.
"""

import csv
import io
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from grpo.config import flatten
from grpo.record.plots import comparison
from grpo.record.summary import (
    METRICS_FILE,
    SUMMARY_FILE,
    headline,
    headline_first,
    is_lower_better,
    read_metrics,
    read_summary,
)
from models.formats.atomic import write_text

MAX_KEYS = 5  # columns of a table for keys of the config, unless others are asked for
NAMES_OF_A_RUN = ("name", "output_dir", "resume")  # keys in which any two runs differ
# 97.5 % quantiles of Student's t with 1, 2, ... 9 degrees of freedom (R. A. Fisher, Statistical Methods, table IV)
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def find_runs(folder: Path) -> list[Path]:
    """Returns the folders of the runs at or below `folder`; raises ValueError when there is none."""
    run_dirs = sorted({path.parent for name in (SUMMARY_FILE, METRICS_FILE) for path in folder.rglob(name)})
    if not run_dirs:
        raise ValueError(f"{folder} holds no run: neither {SUMMARY_FILE} nor {METRICS_FILE} below it")
    return run_dirs


class RunTable:
    """The runs of a sweep with the keys of the config in which they differ and the last value of each eval metric, sorted by
    the first of the headline metrics, best first; runs that left no summary come last.

    `rows` have all `columns` (run, `keys`, exit_reason, steps, seconds, `evals`) and the keys in which the runs do not differ;
    None where a run has no such value."""

    def __init__(self, run_dirs: list[Path]) -> None:
        summaries = {run_dir: read_summary(run_dir) for run_dir in run_dirs}
        done = {run_dir: summary for run_dir, summary in summaries.items() if summary is not None}
        configs = {run_dir: flatten(summary["config"], "") if summary["config"] else {} for run_dir, summary in done.items()}
        keys = dict.fromkeys(key for config in configs.values() for key in config if key not in NAMES_OF_A_RUN)
        self.keys = [key for key in keys if len({json.dumps(config.get(key)) for config in configs.values()}) > 1
                     and not _follows_seed(key, list(configs.values()))]
        # a key that some runs lack tells apart environments or models, which the keys that all have tell too
        self.shared_keys = [key for key in self.keys if all(key in config for config in configs.values())]
        logged = list(dict.fromkeys(name for summary in done.values() for name in summary["eval"]))
        ordered = headline_first(logged)
        self.evals = ordered + [name for name in logged if name not in ordered]
        self.columns = ["run", *self.keys, "exit_reason", "steps", "seconds", *self.evals]
        self.rows = []
        for run_dir, summary in summaries.items():
            values: dict[str, object] = {"run": run_dir.resolve().name, "exit_reason": f"no {SUMMARY_FILE}"}
            if summary is not None:
                values |= configs[run_dir] | {
                    "exit_reason": summary["exit_reason"], "steps": summary["steps"], "seconds": round(summary["seconds"], 1)}
                values |= {name: record["last"]["value"] for name, record in summary["eval"].items()}
            self.rows.append({column: values.get(column) for column in (*self.columns, *keys)})
        self.rows.sort(key=self._rank)
        self._folders = {run_dir.resolve().name: run_dir for run_dir in summaries}

    def _rank(self, row: dict) -> float:
        value = row[self.evals[0]] if self.evals else 0.0
        return math.inf if value is None else value if self.evals and is_lower_better(self.evals[0]) else -value

    def text(self, columns: list[str] | None = None) -> str:
        """The runs as a Markdown table that reads as well on a terminal, and the means over seeds where seeds differ.

        Raises ValueError for a column that no run has."""
        unknown = [column for column in columns or () if column not in self.rows[0]]
        if unknown:
            raise ValueError(f"--columns {','.join(unknown)}: no such column; there are {', '.join(self.columns)}, and the keys "
                             "of the config")
        keys, scores = self.shared_keys[:MAX_KEYS], headline(self.evals)[:4]
        chosen = ["run", *columns] if columns else ["run", *keys, "exit_reason", "steps", "seconds", *scores]
        parts = [_markdown([{column: self._cell(row, column) for column in chosen} for row in self.rows])]
        left_out = [key for key in self.keys if key not in chosen]
        if left_out and not columns:
            parts.append(f"{len(left_out)} more keys differ: {', '.join(left_out[:8])}{', ...' if len(left_out) > 8 else ''}")
        told_by = [] if self._is_told_by_name() and not columns else columns or keys
        over_seeds = self._over_seeds([key for key in told_by if key in self.keys and key != "seed"],
                                      [name for name in (columns or scores) if name in self.evals])
        if over_seeds:
            parts.append("Means over seeds, with 95 % intervals (Student's t):\n\n" + _markdown(over_seeds))
        return "\n\n".join(parts)

    def _over_seeds(self, keys: list[str], scores: list[str]) -> list[dict[str, str]]:
        """A line for each variant, none if no variant has several seeds. keys: that tell variants apart; []: their names do."""
        variants = self._variants()
        if "seed" not in self.keys or not any(len(rows) > 1 for rows in variants):
            return []
        labels = [{"runs": label} if not keys else {} for label in self._labels(variants)]
        return [label | {key: _cell(rows[0][key]) for key in keys} | {"seeds": str(len(rows))}
                | {name: _mean([row[name] for row in rows if row[name] is not None]) for name in scores}
                for label, rows in zip(labels, variants)]

    def _is_told_by_name(self) -> bool:
        """Whether the keys that a table shows are too few to tell variants apart: then what differs in their names does."""
        keys, variants = [key for key in self.shared_keys if key != "seed"], self._variants()
        return len(keys) > MAX_KEYS or len({json.dumps([rows[0][key] for key in keys]) for rows in variants}) < len(variants)

    def _labels(self, variants: list[list[dict]]) -> list[str]:
        """A text for each variant: the values of its keys, or what its name has of its own."""
        if self._is_told_by_name():
            names = [[str(row["run"]).replace(f"seed{row.get('seed')}", "").split("-") for row in rows] for rows in variants]
            alike = [[word for word in first if word and all(word in other for other in others)] for first, *others in names]
            shared = set.intersection(*map(set, alike)) if len(names) > 1 else set()
            labels = ["-".join(word for word in name if word not in shared) for name in alike]
            is_told = all(labels) and len(set(labels)) == len(labels)
            return labels if is_told else [min(str(row["run"]) for row in rows) for rows in variants]
        keys = [key for key in self.shared_keys if key != "seed"]
        return [", ".join(_cell(rows[0][key]) for key in keys) or "all runs" for rows in variants]

    def _variants(self) -> list[list[dict]]:
        """The finished runs, those that differ only in their seed together; best first."""
        equal: dict[str, list[dict]] = defaultdict(list)
        for row in self.rows:
            if row["exit_reason"] == "finished":
                equal[json.dumps([row[key] for key in self.keys if key != "seed"])].append(row)
        return sorted(equal.values(), key=lambda rows: statistics.fmean(map(self._rank, rows)))

    def plot(self, file_format: str) -> bytes:
        """Curves of the training reward and of the first headline metric, a line for each variant of the finished runs. Raises
        ValueError if no run has finished."""
        if not (variants := self._variants()):
            raise ValueError("--plot draws finished runs, and there is none")
        labels, scores = self._labels(variants), {}
        curves = {label: [read_metrics(self._folders[row["run"]]) for row in rows] for label, rows in zip(labels, variants)}
        for name in self.evals[:1]:
            for label, rows in zip(labels, variants):
                values = [row[name] for row in rows if row[name] is not None]
                if values:
                    scores[label] = statistics.fmean(values), mean_half_width(values) if len(values) > 1 else 0.0
        title = "" if self._is_told_by_name() else ", ".join(key for key in self.shared_keys if key != "seed")
        return comparison(curves, ["reward", *self.evals[:1]], title=title, scores=scores, file_format=file_format)

    def _cell(self, row: dict, column: str) -> str:
        width = row.get(f"{column}/ci95")
        return _cell(row[column]) + (f" ± {_cell(width)}" if width else "")

    def csv(self) -> str:
        """All columns of all runs."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=self.columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return buffer.getvalue()


def _follows_seed(key: str, configs: list[dict]) -> bool:
    """Whether the key has one value for each seed, in more runs than there are seeds: it tells no more than the seed does."""
    pairs = {(config.get("seed"), json.dumps(config.get(key))) for config in configs}
    return key != "seed" and len(pairs) == len({seed for seed, _ in pairs}) < len(configs)


def sweep_summary(sweep_dir: Path, run_dirs: list[Path]) -> Path:
    """Writes sweep_summary.md (what `RunTable.text` shows) and sweep_summary.csv (everything); returns the path of the first."""
    runs = RunTable(run_dirs)
    write_text(sweep_dir / "sweep_summary.csv", runs.csv())
    note = "Eval metrics are the last values of each run; the best run by the first of them comes first."
    title = f"# {sweep_dir.resolve().name}: {len(runs.rows)} runs"
    write_text(sweep_dir / "sweep_summary.md", f"{title}\n\n{runs.text()}\n\n{note}\n")
    return sweep_dir / "sweep_summary.md"


def mean_half_width(values: list[float]) -> float:
    """Half the width of the 95 % interval of a mean of at least two values, by Student's t."""
    degrees = len(values) - 1
    z = statistics.NormalDist().inv_cdf(0.975)
    # beyond the table: the expansion in 1 / degrees (Abramowitz and Stegun, 26.7.5)
    expansion = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    t = T975[degrees - 1] if degrees <= len(T975) else expansion
    return t * statistics.stdev(values) / math.sqrt(len(values))


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    return _cell(statistics.fmean(values)) + (f" ± {_cell(mean_half_width(values))}" if len(values) > 1 else "")


def _markdown(rows: list[dict[str, str]]) -> str:
    """A table with aligned columns."""
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    lines = [columns, ["-" * width for width in widths], *([row[column] for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
