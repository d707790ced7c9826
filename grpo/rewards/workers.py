"""Worker processes that can be killed: a function, named by a string, called on items with a time limit for each.

A worker is a new Python process (it does not import the caller's main module, nor torch unless the function does) in its own
session: a terminal's Ctrl-C goes to the trainer alone. Pickled messages use a socket that only the worker's Python has, so the
function's prints go where the trainer's go. A worker dies with its parent.
"""

import contextlib
import ctypes
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait

from grpo.rewards.functions import load_function
from grpo.rewards.values import describe_error

MOST_WORKERS = 16  # of a call whose items hold each other up
START_LIMIT = 300.0  # seconds for a worker's imports and its setup, which may be the first to read a library from disk
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerError(RuntimeError):
    """Workers cannot start: the function or its setup cannot be imported, or fails."""


@dataclass
class WorkerOutcome:
    """The result of one item: `value`, or the reason why there is none."""

    value: object = None
    error: str | None = None
    is_timeout: bool = False  # the item ran over its own time limit
    signal: str | None = None  # name of the signal that ended the worker's process during the item, if any: "SIGKILL"


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    deadline: float  # monotonic seconds: of the item in hand, or of the start
    is_ready: bool = False
    item: int | None = None  # index of the item in hand


class Workers:
    """Up to `num_workers` processes that call `function(item)`. They start with the first map() and stay for the next ones, until
    the thread that started them ends.

    function: `package.module:function` or `path/to/file.py:function`, see grpo/rewards/functions.py
    timeout: seconds for one item; a worker past it is killed, with all processes of its group, and replaced
    setup: a function named likewise, called with `setup_arguments` when a worker starts, outside any item's time
    patience: seconds without an outcome, after which as many workers again start for the items that wait, up to MOST_WORKERS in
        all and for the rest of the call"""

    def __init__(self, function: str, *, num_workers: int, timeout: float, setup: str | None = None,
                 setup_arguments: tuple = (), patience: float = math.inf):
        assert num_workers >= 1 and timeout > 0, (num_workers, timeout)
        self.function, self.num_workers, self.timeout, self.setup = function, num_workers, timeout, setup
        self.setup_arguments, self.patience = setup_arguments, patience
        self._workers: list[_Worker] = []
        self._owner = os.getpid()

    def map(self, items: list, *, budget: float | None = None) -> list[WorkerOutcome]:
        """One WorkerOutcome per item, in order; an idle worker takes the next item. Not to be called from two threads at once.

        budget: seconds for the whole call, from the start of the first worker on; items without a value by then get an error

        An exception of the function, a value that cannot be pickled, a worker that dies or runs out of time is the error of that
        item alone. Raises WorkerError if no worker can start."""
        if self._owner != os.getpid():  # this is a forked copy of the owner, whose workers are not ours to use
            self._workers, self._owner = [], os.getpid()
        outcomes: list[WorkerOutcome | None] = [None] * len(items)
        waiting = deque(range(len(items)))
        ends, stalls = math.inf, time.monotonic() + self.patience
        for worker in [worker for worker in self._workers if worker.is_ready and worker.connection.poll()]:
            self._replace(worker)  # an idle worker says nothing: one that can be heard has ended
        while len(self._workers) < min(self.num_workers, len(items)):
            self._workers.append(self._start())
        try:
            while num_open := len(waiting) + self._num_busy():
                for worker in self._workers:
                    if worker.is_ready and worker.item is None and waiting:
                        if ends == math.inf and budget is not None:
                            ends = time.monotonic() + budget
                        self._hand_out(worker, waiting.popleft(), items, outcomes)
                self._receive(outcomes, min(ends, stalls))
                is_stalled = time.monotonic() >= stalls
                num_left = len(waiting) + self._num_busy()
                is_moving = num_left < num_open or not all(worker.is_ready for worker in self._workers)
                if is_stalled and not is_moving:
                    num_more = min(len(self._workers), len(waiting), MOST_WORKERS - len(self._workers))
                    self._workers += [self._start() for _ in range(num_more)]
                if is_stalled or is_moving:
                    stalls = time.monotonic() + self.patience
                if time.monotonic() >= ends:
                    break
        finally:  # a worker with an item in hand would answer the next call
            for worker in [worker for worker in self._workers if worker.item is not None]:
                self._replace(worker)
            while len(self._workers) > self.num_workers:
                _kill(self._workers.pop())
        late = f"not finished within the {budget} s of the whole call"
        return [WorkerOutcome(error=late) if outcome is None else outcome for outcome in outcomes]

    def close(self) -> None:
        """Kills the workers; a later map() starts new ones."""
        while self._workers and self._owner == os.getpid():
            _kill(self._workers.pop())

    def _num_busy(self) -> int:
        return sum(worker.item is not None for worker in self._workers)

    def _hand_out(self, worker: _Worker, index: int, items: list, outcomes: list) -> None:
        try:
            message = pickle.dumps(items[index])
        except Exception as error:  # pickling calls the classes of the item
            outcomes[index] = WorkerOutcome(error=f"cannot be sent to a worker: {type(error).__name__}: {error}")
            return
        worker.item, worker.deadline = index, time.monotonic() + self.timeout
        with contextlib.suppress(OSError):  # it died; _receive finds the end of its stream
            worker.connection.send_bytes(message)

    def _receive(self, outcomes: list, ends: float) -> None:
        """Waits for messages until the next deadline and notes their outcomes and those of workers past their deadline."""
        busy = [worker for worker in self._workers if worker.item is not None or not worker.is_ready]
        until = min([worker.deadline for worker in busy] + [ends])
        patience = min(max(0.0, until - time.monotonic()), START_LIMIT)
        heard = set(wait([worker.connection for worker in busy], patience)) if busy else set()
        for worker in busy:
            if worker.connection in heard:
                outcome = _read(worker)
            elif time.monotonic() >= worker.deadline:
                error = (f"ran over its limit of {self.timeout:g} s; its worker was killed" if worker.is_ready
                         else f"no sign of it within {START_LIMIT:g} s")
                outcome = WorkerOutcome(error=error, is_timeout=True)
            else:
                continue
            if worker.is_ready:
                outcomes[worker.item] = outcome
            elif outcome.error is not None:
                self.close()
                setup = f" (setup {self.setup})" if self.setup else ""
                raise WorkerError(f"a worker process for {self.function}{setup} cannot start: {outcome.error}")
            worker.item, worker.is_ready = None, True
            if outcome.is_timeout or worker.process.returncode is not None:
                self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        _kill(worker)
        self._workers[self._workers.index(worker)] = self._start()  # at once: it is warm when it is needed

    def _start(self) -> _Worker:
        ours, theirs = Pipe()
        arguments = (theirs.fileno(), os.getpid(), self.function, self.setup)
        code = f"import sys; sys.path[:] = {sys.path!r}; from grpo.rewards.workers import serve; serve(*{arguments!r})"
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", code],  # unbuffered: what it printed is seen though it is killed
            stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            env={"OMP_NUM_THREADS": "1", **os.environ})  # several workers of all threads each would only wait
        theirs.close()
        with contextlib.suppress(OSError):  # it has died already, which its stream's end will tell
            ours.send_bytes(pickle.dumps(self.setup_arguments))
        return _Worker(process, ours, deadline=time.monotonic() + START_LIMIT)


def _read(worker: _Worker) -> WorkerOutcome:
    """A worker's message about its item or its start, or how it died."""
    try:
        message = worker.connection.recv_bytes()
    except (EOFError, OSError):
        status = _kill(worker)
        name = signal.Signals(-status).name if status < 0 else None
        how = f"signal {name}" if name else f"exit status {status}"
        return WorkerOutcome(error=f"{'its worker' if worker.is_ready else 'it'} died with {how}", signal=name)
    try:
        return WorkerOutcome(*pickle.loads(message))
    except Exception as problem:  # a class that only the worker can import, say
        return WorkerOutcome(error=f"returned a value that cannot be read here: {type(problem).__name__}: {problem}")


def _kill(worker: _Worker) -> int:
    """Ends a worker and its group; returns its exit status, minus the signal if one ended it."""
    worker.connection.close()
    if worker.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):  # before it is waited for: its id may be another's afterwards
            os.killpg(worker.process.pid, signal.SIGKILL)
    return worker.process.wait()


def serve(fd: int, parent: int, function: str, setup: str | None) -> None:
    """A worker's life: reports its start, then one (value, error) for each item that it reads, until its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this took effect
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # ignored ones are inherited
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    connection = Connection(fd)
    os.set_inheritable(fd, False)
    os.register_at_fork(after_in_child=connection.close)  # so that the worker's death is always the end of its stream

    called = None

    def start(setup_arguments: tuple) -> None:
        nonlocal called
        called = load_function(function, key="function")
        if setup is not None:
            load_function(setup, key="setup")(*setup_arguments)

    def attempt(call: Callable[[object], object], message: bytes) -> bytes:
        try:
            return pickle.dumps((call(pickle.loads(message)), None))
        except BaseException as error:  # the boundary to the user's code
            return pickle.dumps((None, describe_error(error)))

    connection.send_bytes(attempt(start, connection.recv_bytes()))
    while called is not None:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):  # nobody is left to ask
            return
        connection.send_bytes(attempt(called, message))
