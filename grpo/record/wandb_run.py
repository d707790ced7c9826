"""wandb behind a queue: a run hands over what it logs and goes on, whatever wandb's network, service and code do.

A daemon thread takes from the queue and makes each call in a thread of its own, which it leaves behind after a deadline. No
failure is more than one warning for each kind of call, shown at the run's next line.
"""

import contextlib
import inspect
import json
import netrc
import os
import queue
import secrets
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from grpo.config import WandbConfig
from grpo.record.terminal import flush_standard_streams

QUEUE_LEN = 10_000  # lines that wait for wandb before further ones are left out
INIT_SECONDS = 60  # of each try to start
CALL_SECONDS = 30  # of other calls
FINISH_SECONDS = 20  # that the end of a run waits for all that is left
EXIT_SECONDS = 10  # that the process may take to end after its last line


class WandbRun:
    """The wandb side of a run.

    Steps are our own metric `step`, because wandb refuses steps that go back, and an offline run that goes on under the
    same id starts counting anew.

    Args:
        config: the resolved configuration as JSON holds it.
        wandb_id: the wandb run to go on with; None starts a new one.
        warn: takes the text of a warning, in the thread of the run.
    """

    def __init__(self, run_dir: Path, settings: WandbConfig, *, config: dict, run_name: str, wandb_id: str | None,
                 warn: Callable[[str], None]):
        self.run_id: str | None = None
        self.hint = ""  # where the run is to be seen, or how to upload it
        self._run = None  # of wandb; belongs to the thread
        self._tables: dict[str, object] = {}
        self._columns: dict[str, list[str]] = {}  # of each table
        self._warn = warn
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._failed: set[str] = set()
        self._jobs: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(QUEUE_LEN)
        mode = _resolve_mode(settings.mode)
        if mode == "disabled":
            return
        self.run_id = wandb_id or secrets.token_hex(4)
        if mode == "online" and not _has_wandb_key():
            self._warn("warning: wandb.mode=online but no API key is set (wandb login, or WANDB_API_KEY): logging offline")
            mode = "offline"
        arguments = {
            "project": settings.project, "entity": settings.entity, "group": settings.group, "tags": list(settings.tags),
            "name": run_name, "id": self.run_id, "resume": "allow", "dir": str(run_dir), "config": config,
            "reinit": "finish_previous"}
        self._thread = threading.Thread(target=self._work, args=(mode, arguments), name="wandb", daemon=True)
        self._thread.start()

    def log(self, line: dict[str, float]) -> None:
        self._put("log", lambda: self._run.log(line))

    def log_table(self, name: str, step: int, rows: list[dict]) -> None:
        """Appends rows to a table, whose columns are those of its first row without its token ids."""
        self._put("table", lambda: self._append(name, step, rows))

    def finish(self, summary: dict) -> None:
        """Waits for wandb to take what is left, but not longer than FINISH_SECONDS."""
        if self.run_id is None:
            return
        deadline = time.monotonic() + FINISH_SECONDS
        with contextlib.suppress(queue.Full):
            self._jobs.put(("finish", lambda: self._finish(summary)), timeout=FINISH_SECONDS)
            self._jobs.put(None, timeout=max(deadline - time.monotonic(), 0))
            self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            self._note("finish", f"has not finished after {FINISH_SECONDS} s", "its files keep what it did not upload")
        self._show_warnings()

    def _put(self, what: str, job: Callable[[], None]) -> None:
        self._show_warnings()
        if self.run_id is None or not self._thread.is_alive():
            return
        try:
            self._jobs.put_nowait((what, job))
        except queue.Full:
            self._note("queue", "takes lines too slowly", "some are left out")

    def _show_warnings(self) -> None:
        while not self._warnings.empty():
            self._warn(self._warnings.get())

    def _note(self, what: str, problem: str, consequence: str) -> None:
        if what not in self._failed:
            self._failed.add(what)
            self._warnings.put(f"warning: wandb {problem}; {consequence}")

    # ---- in the thread

    def _work(self, mode: str, arguments: dict) -> None:
        consequence = "logging offline instead" if mode == "online" else "the run goes on without"
        self._call(f"{mode} init", lambda: self._init(mode, arguments), INIT_SECONDS, consequence)
        if self._run is None and mode == "online" and sys.modules.get("wandb") is not None:
            # without it wandb finds the run of the failed try: "run ID is in use"
            self._call("teardown", sys.modules["wandb"].teardown, CALL_SECONDS)
            self._call("offline init", lambda: self._init("offline", arguments), INIT_SECONDS)
        while self._run is not None and (job := self._jobs.get()) is not None:
            if not self._call(*job, CALL_SECONDS):
                self._run = None

    def _call(self, what: str, function: Callable[[], None], seconds: float,
              consequence: str = "the run goes on without") -> bool:
        """Calls the function in a thread; any failure is one warning for each `what`. False if it did not return."""
        outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def guarded() -> None:
            try:
                function()
                outcome.put(None)
            except BaseException as error:  # SystemExit too: it must not pass for a thread that hangs
                outcome.put(error)

        threading.Thread(target=guarded, name=f"wandb {what}", daemon=True).start()
        try:
            error = outcome.get(timeout=seconds)
        except queue.Empty:
            self._note(what, f"{what} failed (no answer in {seconds} s)", consequence)
            return False
        if error is not None:
            reason = str(error).strip().split("\n")[0]
            self._note(what, f"{what} failed ({type(error).__name__}: {reason})", consequence)
        return True

    def _init(self, mode: str, arguments: dict) -> None:
        import wandb

        can_give_up = "finish_timeout" in inspect.signature(wandb.Settings).parameters
        patience = {"finish_timeout": FINISH_SECONDS} if can_give_up else {}
        settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS / 2, **patience)
        run = wandb.init(mode=mode, settings=settings, **arguments)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        run.define_metric("warmup/step")
        run.define_metric("warmup/*", step_metric="warmup/step")
        self.hint = run.url if mode == "online" else f"offline; upload with: wandb sync {Path(run.dir).parent}"
        self._run = run

    def _append(self, name: str, step: int, rows: list[dict]) -> None:
        import wandb

        appends = "log_mode" in inspect.signature(wandb.Table.__init__).parameters
        columns = self._columns.setdefault(name, [column for column in rows[0] if column != "token_ids"])
        if name not in self._tables or not appends:
            kind = {"log_mode": "INCREMENTAL"} if appends else {}
            self._tables[name] = wandb.Table(columns=columns, allow_mixed_types=True, **kind)
        for row in rows:
            cells = (row.get(column) for column in columns)
            texts = (json.dumps(cell, ensure_ascii=False) if isinstance(cell, (dict, list)) else cell for cell in cells)
            self._tables[name].add_data(*texts)
        self._run.log({name: self._tables[name], "step": step})

    def _finish(self, summary: dict) -> None:
        for name, record in summary["eval"].items():
            self._run.summary[f"best/{name}"] = record["best"]["value"]
        self._run.summary["exit_reason"] = summary["exit_reason"]
        self._run.finish(exit_code=0 if summary["exit_reason"] == "finished" else 1)


def end_soon(code: int) -> int:
    """Returns the exit code. From now on the process lives EXIT_SECONDS at most: hooks that wandb leaves for the end of the
    process wait for its service."""
    flush_standard_streams()
    if "wandb" in sys.modules:
        timer = threading.Timer(EXIT_SECONDS, os._exit, (code,))
        timer.daemon = True  # the process does not wait for it
        timer.start()
    return code


def _has_wandb_key() -> bool:
    """Whether wandb can log in without asking: a key in the environment, or an entry for its server in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")  # without a home it stays as it is, and is not there
    try:
        return netrc.netrc(path).authenticators(urllib.parse.urlsplit(server).hostname or server) is not None
    except (OSError, ValueError, KeyError, netrc.NetrcParseError):  # KeyError: of a user without a name
        return False


def _resolve_mode(mode: str) -> str:
    """`auto`: what WANDB_MODE says, else online with a key, else offline."""
    asked = os.environ.get("WANDB_MODE", "") if mode == "auto" else str(mode)
    if asked in ("online", "offline", "disabled"):
        return asked
    return "online" if _has_wandb_key() else "offline"
