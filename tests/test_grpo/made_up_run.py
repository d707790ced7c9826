"""A run without a model: its metrics object, and a whole one as a script."""

import os
from pathlib import Path

from paths import ROOT

from grpo.config import WandbConfig
from grpo.record.metrics import Metrics


def make_metrics(run_dir: Path, *, mode: str = "disabled", resumed_after: int | None = None,
                 wandb_id: str | None = None) -> Metrics:
    """resumed_after: the finished steps of the checkpoint that the run goes on from."""
    metrics = Metrics(run_dir, wandb=WandbConfig(mode=mode, project="test"), config={"seed": 0}, run_name="r", total_steps=6,
                      wandb_id=wandb_id)
    if resumed_after is not None:
        metrics.truncate_after(resumed_after)
    return metrics


SCRIPT = """
import sys, time
from pathlib import Path
from grpo.config import WandbConfig
from grpo.record.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]), wandb=WandbConfig(mode=sys.argv[2], project="test"), config={"seed": 0},
                  run_name="carry [bold]run", total_steps=4)
try:
    metrics.log_warmup(1, {"loss": 2.0}, num_steps=1, prints_line=True)
    metrics.log_eval(0, {"greedy": 0.25})
    hostile = "[/bold] \\x1b]0;owned\\x07 \\u754c first"
    metrics.log_completions(0, [{"prompt": "1+1", "completion": hostile, "reward": 0.0, "token_ids": [1, 2]}])
    for step in range(1, 5):
        metrics.log(step, {"reward": step / 4, "reward_std": 0.1, "entropy": 0.5, "num_tokens": 10, "time/step": 0.1})
    metrics.log_eval(4, {"greedy": 0.875})
    metrics.log_completions(4, [{"prompt": "1+1", "completion": "second", "reward": 1.0, "token_ids": [5]},
                                {"prompt": "1+2", "completion": "trick", "reward": 1.0, "suspicion": "a reason"}])
    print("a line of the loop")
finally:
    metrics.finish("finished")
metrics.print_final(["python -m grpo.generate run=" + "x" * 100])
"""


def start_script(entry_points, folder: Path, before: str, **environment: str):
    """The script in a fork of the server of entry points, which need not import all that it needs."""
    (folder / "made_up_script.py").write_text(SCRIPT)
    return entry_points.start("made_up_script", folder, "disabled", before=before, path=(folder,), **environment)


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "LC_", "FORCE_COLOR"))}
    return {**kept, "PYTHONPATH": str(ROOT), "NETRC": "/nonexistent", **changes}
