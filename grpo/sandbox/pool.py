"""The sandbox of a run: its mode, the layers that are proven to hold, and a pool of zygotes."""

import os
import queue
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from grpo.sandbox.calls import MODULES, Outcome, Respond, SandboxError, Zygote, encode_call
from grpo.sandbox.self_test import held_layers

MOST_ZYGOTES = 4
REQUIRED = {"auto": ("seccomp", "limits"), "strict": ("seccomp", "landlock", "limits", "user"), "process": ()}

Item, Result = TypeVar("Item"), TypeVar("Result")


class SandboxRefused(ValueError):
    """The machine does not hold what `sandbox.mode` asks for; the message says what to do."""


class Sandbox:
    """Runs code that a model wrote.

    mode: auto, strict or process; off is refused
    num_zygotes: calls at a time; None: one for each core of the CPU, at most MOST_ZYGOTES
    modules: that the code may import

    Raises SandboxRefused, and SandboxError if no zygote starts."""

    def __init__(self, mode: str, *, num_zygotes: int | None = None, modules: Sequence[str] = MODULES):
        self.layers, self.problems = required_layers(mode)
        self.mode, self.modules = mode, modules
        self.num_zygotes = num_zygotes or max(1, min(MOST_ZYGOTES, len(os.sched_getaffinity(0))))
        self._zygotes: list[Zygote] = []
        self._idle: queue.SimpleQueue[Zygote | None] = queue.SimpleQueue()
        self.close = weakref.finalize(self, _close, self._zygotes)
        for zygote in self.map(lambda _: self._start(), range(self.num_zygotes)):
            self._idle.put(zygote)

    def call(self, code: str, function: str, calls: Sequence[Sequence], *, seconds: float) -> Outcome:
        """Runs `code`, then `function` on the arguments (JSON values) of each of the calls, all in one new process that may take
        `seconds`. Any thread may call it. Raises SandboxError if the sandbox fails twice."""
        return self._call(code, function, calls, None, seconds=seconds, cpu_seconds=seconds)

    def converse(self, code: str, function: str, calls: Sequence[Sequence], respond: Respond, *, seconds: float,
                 cpu_seconds: float) -> Outcome:
        """As `call`, but `respond` gets the values and returns the arguments of the next calls in the same process, or None at
        the end; it must not raise. The code runs anew for each of these rounds. Returns the outcome of the last one.

        seconds: wall time for a round; cpu_seconds: for all of them

        Raises SandboxError if the sandbox fails, at the first round twice."""
        return self._call(code, function, calls, respond, seconds=seconds, cpu_seconds=cpu_seconds)

    def _call(self, code: str, function: str, calls: Sequence[Sequence], respond: Respond | None, *, seconds: float,
              cpu_seconds: float) -> Outcome:
        request, pending, has_responded = encode_call(code, function, calls), len(calls), False

        def checked(values: list) -> Sequence[Sequence] | None:
            nonlocal pending, has_responded
            has_responded = True
            more = respond(values) if len(values) == pending else None
            pending = pending if more is None else len(more)
            return more

        zygote = self._idle.get()
        try:
            for is_last in (False, True):
                try:
                    zygote = zygote or self._start()
                    outcome = zygote.call(request, seconds=seconds, cpu_seconds=cpu_seconds, respond=respond and checked)
                    if outcome.values is not None and len(outcome.values) != pending:  # no code of ours wrote that
                        return Outcome(violation="output", detail=f"{len(outcome.values)} results of {pending} calls")
                    return outcome
                except BaseException as error:  # an interrupt, too, leaves a call unfinished in it
                    if zygote is not None:
                        self._zygotes.remove(zygote)
                        zygote.close()
                        zygote = None
                    if is_last or has_responded or not isinstance(error, SandboxError):
                        raise
        finally:
            self._idle.put(zygote)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """The function's result for each item, in their order, as many at a time as there are zygotes."""
        with ThreadPoolExecutor(self.num_zygotes) as threads:
            return list(threads.map(function, items))

    def describe(self) -> str:
        """The mode and the proven layers, for the first lines of a run."""
        without = "; not ".join(["", *(f"{name} ({reason})" for name, reason in self.problems.items())])
        unsafe = ", UNSAFE: model-written code is a process like any other here" if "seccomp" not in self.layers else ""
        return f"{self.mode}{unsafe}: {', '.join(self.layers) or 'no layer'} hold{without}"

    def _start(self) -> Zygote:
        """A new zygote, started by a thread that ends at once: so it is no child of the calling thread, which may be an episode's
        and must leave no process behind."""
        with ThreadPoolExecutor(1) as threads:
            zygote = threads.submit(Zygote, layers=self.layers, modules=self.modules).result()
        self._zygotes.append(zygote)
        return zygote


def _close(zygotes: list[Zygote]) -> None:
    for zygote in zygotes:
        zygote.close()
    zygotes.clear()


def required_layers(mode: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The layers that hold here, and the reasons why others do not. Raises SandboxRefused if the mode needs one of those."""
    if mode == "off":
        raise SandboxRefused("sandbox.mode = 'off': this task runs code that the model writes, and off runs none; set "
                             "sandbox.mode=auto, or choose another env")
    held, problems = held_layers()
    missing = [name for name in REQUIRED[mode] if name not in held]
    if missing:
        reasons = "; ".join(f"{name}: {problems[name]}" for name in missing)
        raise SandboxRefused(
            f"sandbox.mode = {mode!r}: model-written code cannot be confined here ({reasons}). That takes Linux on "
            "x86_64 or aarch64, and a container that allows seccomp and Landlock, as profiles of Docker and Kubernetes do. "
            "On a machine with nothing to lose, sandbox.mode=process runs the code with the layers that hold: it may then read "
            "files, use the network and end other processes of its user")
    return held, problems
