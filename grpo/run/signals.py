"""SIGTERM, SIGINT and SIGHUP: the first signal asks the run to stop after the current model call, micro-batch or step; a second
SIGTERM or SIGINT ends the process at once."""

import contextlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self, TextIO

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class GracefulStop:
    """`with GracefulStop(resume_hint) as stop:` handles the signals inside the block and puts the old handlers back
    after.

    Called, it says whether a stop was asked for: `stop()` is what a loop polls between steps and micro-batches, and a
    sampler takes as `should_stop`. The first signal prints what happens next and `resume_hint` (a command line); the
    second leaves with code 128 + signal number without saving: what was saved before stands. A terminal that closes may send
    SIGHUP several times, which counts as once; under nohup, which ignores it, it stays ignored. In a thread other than the
    main one nothing is handled: Python sets handlers in the main thread only, and what a signal does is that thread's to say."""

    def __init__(self, resume_hint: str, *, keeps: str = "saves", is_silent: bool = False) -> None:
        """keeps: what happens at the next safe moment. is_silent: another process says what happens next."""
        self.resume_hint, self.keeps, self.is_silent = resume_hint, keeps, is_silent
        self.signal_name: str | None = None
        self.show: Callable[[str], bool] | None = None  # of a live display: takes the text instead of the terminal, if it can
        self._previous: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python and cannot be put back from it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.signal_name is not None and number == signal.SIGHUP:
            return
        if self.signal_name is not None:
            text = f"{name} again: leaving now, without saving. Resume from what was saved before: {self.resume_hint}"
            if not self.is_silent:
                _write(sys.stderr, f"\n{text}\n")
            if os.isatty(1):
                _write(sys.stdout, "\x1b[?25h")  # the live display hides the cursor
            os._exit(128 + number)
        self.signal_name = name
        text = f"{name}: {self.keeps} at the next safe moment; again: leaves at once"
        if not self.is_silent and (self.show is None or not self.show(text)):
            _write(sys.stderr, f"\n{text}. Resume with: {self.resume_hint}\n")


_masks = threading.local()  # what a thread blocked before it forked


def _block_signals() -> None:
    """Until a forked child has handlers of its own: a signal that came before was lost in it, and who waits for its end hung."""
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _restore_python_handlers() -> None:
    """A forked child (a pool's worker, say) must end when it is told to, and knows nothing of this run's steps."""
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if inspect.ismethod(handler) and isinstance(handler.__self__, GracefulStop):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _unblock_signals()


# Once for the process, since it cannot be undone; a child of a process that handles no signals finds nothing to do.
os.register_at_fork(before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_restore_python_handlers)


def _write(stream: TextIO, text: str) -> None:
    # os.write: print may be in the middle of a line, and its buffer's lock is not re-entrant; a terminal or a pipe that
    # the same signal closed must not end the run
    with contextlib.suppress(OSError, ValueError):
        os.write(stream.fileno(), text.encode())
