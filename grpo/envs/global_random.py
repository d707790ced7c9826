"""Python's and numpy's global random generators, which environments that others wrote draw from: one user at a time."""

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class RevocableLock:
    """A reentrant lock that can be taken away from a thread which does not come back. Threads go by their native ids."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: int | None = None
        self._depth, self._waiting = 0, set()

    def __enter__(self) -> None:
        thread_id = threading.get_native_id()
        with self._changed:
            self._waiting.add(thread_id)
            try:
                self._changed.wait_for(lambda: self._owner in (None, thread_id))
            finally:
                self._waiting.remove(thread_id)
            self._owner, self._depth = thread_id, self._depth + 1

    def __exit__(self, *_) -> None:
        with self._changed:
            if self.is_mine and self._depth > 1:
                self._depth -= 1
            else:
                self.take_from(threading.get_native_id())

    @property
    def is_mine(self) -> bool:
        return self._owner == threading.get_native_id()

    def is_awaited_by(self, thread_id: int) -> bool:
        with self._changed:
            return thread_id in self._waiting

    def take_from(self, thread_id: int) -> None:
        """Lets another thread have the lock, if this one has it."""
        with self._changed:
            if self._owner == thread_id:
                self._owner, self._depth = None, 0
                self._changed.notify_all()


HELD = RevocableLock()  # while the generators are a session's


def seed_all(seed: int | bytes) -> None:
    """Seeds them; hold HELD."""
    random.seed(seed)
    if "numpy" in sys.modules:
        key = seed if isinstance(seed, int) else int.from_bytes(seed[:4], "big")
        sys.modules["numpy"].random.seed(key % 2**32)


class OwnRandom:
    """The global generators as one session sees them, whatever other sessions and threads draw in between."""

    def __init__(self, seed: int) -> None:
        with HELD:
            before = _states()
            seed_all(seed)
            self._states = _states()
            _restore(before)

    @contextmanager
    def held(self) -> Iterator[None]:
        with HELD:
            before = _states()
            _restore(self._states)
            try:
                yield
            finally:
                if HELD.is_mine:  # it was not taken away meanwhile
                    self._states = _states()
                    _restore(before)


def _states() -> tuple:
    return random.getstate(), sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None


def _restore(states: tuple) -> None:
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])
