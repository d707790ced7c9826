"""The metrics of a run for TensorBoard, beside wandb: `tensorboard --logdir runs`. Needs the extra of that name."""
import math
from pathlib import Path

from grpo.config import ConfigError


class TensorBoardRun:
    """Writes each metric as a scalar at its step, into RUN/tensorboard. A resumed run first takes out what came after its
    checkpoint."""

    def __init__(self, run_dir: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(f"log.tensorboard = True: cannot be imported ({error}); pip install -e '.[tensorboard]' (or "
                              "pip install tensorboard), or set log.tensorboard=false") from error
        self._make = SummaryWriter
        self._folder = run_dir / "tensorboard"
        self._writer = None

    def truncate_after(self, step: int) -> None:
        self._writer = self._make(log_dir=str(self._folder), purge_step=step + 1)

    def log(self, line: dict[str, float]) -> None:
        """A line of metrics.jsonl. Steps of the warm-up come before step 0."""
        if self._writer is None:
            self.truncate_after(-1)
        if "warmup/step" in line:
            return  # before step 0; metrics.jsonl has them
        for name, value in line.items():
            if name != "step" and math.isfinite(value):
                self._writer.add_scalar(name, value, line["step"])

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
