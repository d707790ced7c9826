"""A run's folder belongs to one process at a time."""
import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from grpo.run.checkpoint import SaveError, clean_stale

LOCK = ".lock"


class RunInUseError(ValueError):
    """Another process holds the run."""


class RunLock:
    """A run's folder, while this process holds it."""

    def __init__(self, run_dir: Path, folder: int | None) -> None:
        """folder: its descriptor; None: another rank of the run holds and writes it."""
        self.run_dir = run_dir
        self._folder = folder

    def check_in_place(self) -> None:
        """Raises SaveError where the folder no longer lies at its path: whoever moved it would look for the rest of the run
        there, and this process would make a second one."""
        try:
            if os.path.samestat(os.fstat(self._folder), os.stat(self.run_dir)):
                return
            what = "another folder has its place"
        except OSError as error:
            what = error.strerror
        place = ""
        with contextlib.suppress(OSError):  # Linux knows where an open folder is
            place = f"; it is now {os.readlink(f'/proc/self/fd/{self._folder}')}"
        raise SaveError(f"the run's folder {self.run_dir} was moved, replaced or deleted ({what}){place}. Nothing is saved any "
                        "more: put it back and resume from its last checkpoint")


@contextlib.contextmanager
def lock_run(run_dir: str | Path) -> Iterator[RunLock]:
    """Holds the run for this process (creating its folder), after cleaning up what a killed one left (`clean_stale`). A folder
    that holds nothing but the lock at the end, since a start failed, is removed.

    Raises RunInUseError naming the process that has it. The kernel drops the lock with the process, so a killed run
    leaves none behind (its file stays and means nothing)."""
    run_dir = Path(run_dir)
    with contextlib.ExitStack() as opened:
        while (folder := _try_lock(run_dir, opened)) is None:
            pass  # a start that failed removed the folder between two of our calls
        clean_stale(run_dir)
        try:
            yield RunLock(run_dir, folder)
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(folder) == [LOCK]:
                    os.unlink(LOCK, dir_fd=folder)
                    os.rmdir(run_dir)


def _try_lock(run_dir: Path, opened: contextlib.ExitStack) -> int | None:
    """The descriptor of the folder, which `opened` closes with that of the lock."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as attempt:
        folder = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        attempt.callback(os.close, folder)
        descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=folder)
        attempt.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
            raise RunInUseError(f"run {run_dir} is in use by {owner}: wait for it, stop it, or choose another "
                                "name=") from error
        if os.path.samestat(os.fstat(descriptor), os.stat(run_dir / LOCK)):
            owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, owner.encode(), 0)
            opened.enter_context(attempt.pop_all())
            return folder
    return None
