"""What ranks other than 0 have in the place of a run's metrics: it writes nothing, and rank 0 prints its warnings."""
from collections.abc import Callable
from types import SimpleNamespace


class SilentMetrics:
    """The methods of grpo.record.metrics.Metrics. notes: a list that takes the warnings."""

    def __init__(self, notes: list[str]) -> None:
        self.notes, self.wandb = notes, SimpleNamespace(run_id=None)

    def warn(self, text: str) -> None:
        self.notes.append(text)

    def notice(self, text: str) -> bool:
        return True  # it is as good as shown: rank 0 shows its own

    def progress(self, activity: str) -> Callable[[int, int], None]:
        return lambda finished, total: None

    def has_eval(self, step: int) -> bool:
        return False  # rank 0 decides

    def print(self, *renderables: object) -> None: ...

    def set_status(self, status: str) -> None: ...

    def truncate_after(self, step: int) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_warmup(self, warmup_step: int, metrics: dict[str, float], *, num_steps: int, prints_line: bool) -> None: ...

    def log_eval(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_completions(self, step: int, completions: list[dict]) -> None: ...

    def sync(self) -> None: ...

    def finish(self, exit_reason: str) -> None: ...

    def print_final(self, next_commands: list[str]) -> None: ...
