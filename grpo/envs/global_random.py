"""Python's and numpy's global random generators, which environments that others wrote draw from: one user at a time."""

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HELD = threading.RLock()  # while the generators are a session's


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
                self._states = _states()
                _restore(before)


def _states() -> tuple:
    return random.getstate(), sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None


def _restore(states: tuple) -> None:
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])
