"""The one Metrics object of a run: console, metrics.jsonl, completions.jsonl, wandb, and at the end summary and report.

`metrics.jsonl` is the source of truth: one object a line, `step` first. Training metrics, evaluations and the
supervised warm-up (`step` 0, `warmup/step`) are lines of their own.

A step's lines are logged before its checkpoint is saved (log, log_eval, log_completions, sync, then save): then
`truncate_after(step)` on resume puts both files back to what they were at that checkpoint, and a resumed run's files
end equal to those of a run that never stopped. What it takes out is kept in `metrics.jsonl.cut-1` and so on; lines of
others stay. Timing metrics, which differ, start with `time/` or `memory/` or end in `_per_s`.

Keys of a completion that the console, the report and the final samples use: `prompt` and `completion` (text), `reward`,
`split` ("train" or "eval"), and `suspicion` (why it looks like reward hacking); any other key is recorded as it is.
"""

import json
import resource
import shlex
import time
from collections import defaultdict
from pathlib import Path

import torch

from grpo.config import WandbConfig, shown
from grpo.record.console import Display, final_renderables
from grpo.record.jsonl import JsonlFile, json_safe
from grpo.record.summary import (
    COMPLETIONS_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    before_after_samples,
    read_metrics,
    series,
    summarize,
    summarize_metric,
)
from grpo.record.tensorboard_run import TensorBoardRun
from grpo.record.wandb_run import WandbRun
from grpo.report import write_report
from models.formats.atomic import write_text


class Metrics:
    """Everything a run reports. One object a run; `finish` belongs into a `finally`.

    Args:
        run_dir: the run's folder; made when missing.
        wandb: its mode, project, entity, group and tags.
        config: the resolved configuration as plain containers; shown in the report, kept in summary.json and by wandb.
        total_steps: GRPO steps of the whole run.
        wandb_id: the wandb run to go on with; None starts a new one.
        provenance: command, commit, versions and device, for summary.json.
    """

    def __init__(self, run_dir: str | Path, *, wandb: WandbConfig, config: dict, run_name: str, total_steps: int,
                 wandb_id: str | None = None, provenance: dict | None = None, tensorboard: bool = False):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.run_name = run_name
        self.config = json_safe(config)
        self.provenance = provenance or {}
        self.total_steps = total_steps
        self.display = Display(run_name, total_steps)
        self.print, self.warn, self.notice = self.display.print, self.display.warn, self.display.notice
        self.set_status, self.progress = self.display.set_status, self.display.progress
        self.tensorboard = TensorBoardRun(self.run_dir) if tensorboard else None
        self.wandb = WandbRun(self.run_dir, wandb, config=self.config, run_name=run_name, wandb_id=wandb_id, warn=self.print)
        self.history: list[dict[str, float]] = []  # the lines of metrics.jsonl
        self.summary: dict | None = None
        self._start_time = time.monotonic()
        self._earlier_seconds = 0.0
        self._eval_names: defaultdict[int, set[str]] = defaultdict(set)  # by step
        self._metrics_file = JsonlFile(self.run_dir / METRICS_FILE)
        self._completions_file = JsonlFile(self.run_dir / COMPLETIONS_FILE)

    def truncate_after(self, step: int) -> None:
        """Takes the records of later steps (of all, with -1), and a last line that a kill cut short, out of both files."""
        self._metrics_file.truncate_after(step)
        self._completions_file.truncate_after(step)
        self.history = rows = read_metrics(self.run_dir)
        self._earlier_seconds = max(series(rows, "time/total")[1], default=0.0)
        if self.tensorboard is not None:
            self.tensorboard.truncate_after(step)
        self._eval_names.clear()
        for row in rows:
            self._eval_names[row["step"]].update(name for name in row if name.startswith("eval/"))
        last_step = max((row["step"] for row in rows), default=0)
        if last_step < step:
            self.print(f"warning: {self._metrics_file.path} ends at step {last_step} but the checkpoint is of step {step}: "
                       "the lines between are lost")
        self.display.restore(rows)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of training step `step` (finished steps, so the first is 1)."""
        metrics = {name: _plain_number(value, name) for name, value in metrics.items()}
        metrics["time/total"] = round(self._earlier_seconds + time.monotonic() - self._start_time, 3)
        self._metrics_file.append([{"step": step, **metrics}])
        self.history.append({"step": step, **metrics})
        self.display.step(step, metrics)
        self._log({"step": step, **metrics})

    def log_warmup(self, warmup_step: int, metrics: dict[str, float], *, num_steps: int, prints_line: bool) -> None:
        """Records a step of the supervised warm-up as `warmup/<name>` (timing keeps its name).

        Steps may be left out. Without a terminal a line is printed only when `prints_line`.
        """
        metrics = _prefixed("warmup/", metrics)
        line = {"step": 0, "warmup/step": warmup_step, **metrics}
        self._metrics_file.append([line])
        self.display.warmup(warmup_step, num_steps, metrics, prints_line=prints_line)
        self._log(line)

    def _log(self, line: dict[str, float]) -> None:
        self.wandb.log(line)
        if self.tensorboard is not None:
            self.tensorboard.log(line)

    def best(self, name: str) -> dict | None:
        """The {"step", "value"} of the best evaluation on record by the metric `name`, the earliest among equals; None without
        one. It follows from metrics.jsonl alone, so a resumed run finds the same."""
        found = summarize_metric(read_metrics(self.run_dir), name)
        return None if found is None or found["best"]["value"] is None else found["best"]

    def eval_names(self, step: int) -> list[str]:
        return sorted(name for name in self._eval_names[step] if name.startswith("eval/"))

    def has_eval(self, step: int) -> bool:
        """Whether an evaluation at this step is on record, perhaps from before a resume."""
        return bool(self._eval_names[step])

    def log_eval(self, step: int, metrics: dict[str, float]) -> None:
        """Records held-out metrics as `eval/<name>` (timing keeps its name). What is on record for the step already is
        not written again: a run resumed at its last step may repeat the last evaluation."""
        metrics = _prefixed("eval/", metrics)
        known = self._eval_names[step]
        new = {name: value for name, value in metrics.items() if name not in known}
        if any(name.startswith("eval/") for name in new):
            self._metrics_file.append([{"step": step, **new}])
            self.history.append({"step": step, **new})
            self._log({"step": step, **new})
        known.update(new)
        self.display.eval(step, metrics)

    def log_completions(self, step: int, completions: list[dict]) -> None:
        """Appends completions to completions.jsonl and to wandb's tables, and shows the first one."""
        if not completions:
            return
        rows = [{"step": step, **completion} for completion in completions]
        self._completions_file.append(rows)
        self.display.completion(step, completions[0])
        rows = json_safe(rows)
        self.wandb.log_table("completions", step, rows)
        if suspects := [row for row in rows if "suspicion" in row]:
            self.wandb.log_table("suspects", step, suspects)

    def sync(self) -> None:
        """Returns when both files are on disk; called before a checkpoint is saved, so that they reach as far."""
        self._metrics_file.sync()
        self._completions_file.sync()

    def finish(self, exit_reason: str) -> dict:
        """Ends the display, writes summary.json and report.html, closes wandb, and returns the summary.

        A second call changes nothing. A summary or report that cannot be written is a warning: `python -m grpo.report`
        makes it again from metrics.jsonl. `exit_reason` is "finished" for a run that took all its steps.
        """
        if self.summary is not None:
            return self.summary
        self.display.stop()
        self._metrics_file.close()
        self._completions_file.close()
        summary = summarize(self.run_dir, run_name=self.run_name, exit_reason=exit_reason, total_steps=self.total_steps)
        summary |= {"peak_host_memory_gb": peak_memory_gb(torch.device("cpu")), "wandb_id": self.wandb.run_id, **self.provenance}
        self.summary = {**summary, "config": self.config}
        try:
            text = json.dumps(self.summary, indent=2, allow_nan=False, ensure_ascii=False)
            write_text(self.run_dir / SUMMARY_FILE, text + "\n")
            write_report(self.run_dir, self.summary)
        except Exception as error:  # fonts, disk, ...: nothing here may hide how the run ended
            command = shlex.join(["python", "-m", "grpo.report", str(shown(self.run_dir))])
            self.print(f"warning: no report ({type(error).__name__}: {error}); rebuild it with: {command}")
        if self.tensorboard is not None:
            self.tensorboard.finish()
        self.wandb.finish(self.summary)
        return self.summary

    def print_final(self, next_commands: list[str]) -> None:
        """Prints values and samples before and after, where the report is, and what to type next; after `finish`."""
        summary, folder = self.summary, shown(self.run_dir)
        seconds = f"{summary['seconds']:.0f} s" if summary["seconds"] < 600 else f"{summary['seconds'] / 60:.0f} min"
        self.print("", f"{summary['run_name']}: {summary['exit_reason']} after {summary['steps']} steps, {seconds}", "")
        self.print(*final_renderables(summary, before_after_samples(self.run_dir, limit=3), encoding=self.display.encoding))
        self.print("", f"report   {folder / 'report.html'}", f"metrics  {folder / METRICS_FILE}")
        if self.wandb.hint:
            self.print(f"wandb    {self.wandb.hint}")
        if next_commands:
            self.print("", "next:", *(f"  {command}" for command in next_commands))


def _plain_number(value: object, name: str) -> float | int:
    """A Python number for Python, numpy and one-element torch numbers."""
    try:
        return int(value) if isinstance(value, int) else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name!r} must be a number, got {type(value).__name__} {value!r}") from error


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """Timing metrics keep their names: those are how a comparison of two runs knows them."""
    kept = (prefix, "time/", "memory/")
    return {name if name.startswith(kept) else prefix + name: _plain_number(value, name) for name, value in metrics.items()}


def peak_memory_gb(device: torch.device) -> float:
    """The peak memory of this process in GB (1e9 bytes): reserved by torch on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
