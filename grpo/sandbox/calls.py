"""Calls of model-written code: a zygote (grpo/sandbox/zygote.py) forks a confined process for each of them.

The code gets a call's inputs and returns values. Only the caller, in this process, knows what the right answer is, how long the
call took and what it is worth. Whatever the code does ends in an Outcome; a SandboxError is the sandbox's own failure, and says
nothing about the code.
"""

import contextlib
import json
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.sandbox.seccomp import build_filter
from grpo.sandbox.zygote import CALL, KILL, MOST_ERROR, MOST_PRINTED, READY, RESULT

LAYERS = ("seccomp", "landlock", "limits", "user", "namespaces")
MODULES = (
    "abc", "array", "ast", "base64", "binascii", "bisect", "calendar", "cmath", "codecs", "collections", "collections.abc",
    "contextlib", "copy", "copyreg", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "__future__",
    "graphlib", "hashlib", "heapq", "io", "itertools", "json", "keyword", "linecache", "math", "numbers", "operator",
    "pprint", "random", "re", "reprlib", "statistics", "string", "_strptime", "struct", "sys", "textwrap", "time",
    "traceback", "types", "typing", "unicodedata", "weakref", "zlib", "encodings.ascii", "encodings.latin_1",
    "encodings.utf_16", "encodings.utf_8")
VIOLATIONS = {
    "import": "it imports a module outside the standard ones that are allowed",
    "call": "it reached for files, the network, other processes or privileges",
    "time": "it ran over its time limit",
    "memory": "it ran over its memory limit",
    "output": "it returned too much, or what is no answer",
    "crash": "its process ended without an answer",
    "non_finite": "it returned NaN or an infinity",
    "type": "it returned something else than the asked types"}
MEMORY = 512 << 20  # bytes of address space
MOST_OUTPUT = 1 << 20  # bytes
MOST_DEPTH = 32  # of lists in lists
PATIENCE = 60.0  # seconds that a zygote may take to start, and to report a child's end
END = b"\n"  # of a message on a call's socket
ZYGOTE = Path(__file__).with_name("zygote.py")

Respond = Callable[[list], Sequence[Sequence] | None]


class SandboxError(RuntimeError):
    """The sandbox itself failed: a zygote cannot start, or does not answer."""


@dataclass
class Outcome:
    """What came of one call. One of `values`, `error` and `violation` is set."""

    values: list | None = None  # what the function returned for each of the calls: JSON values, all numbers finite
    error: str | None = None  # the exception that the code raised
    violation: str | None = None  # a key of VIOLATIONS
    detail: str = ""  # of a violation
    cpu_seconds: float = 0.0  # of its process, as the kernel counts them
    wall_seconds: float = 0.0  # by this process's clock
    printed: str = ""


class Zygote:
    """One zygote process. `layers` are those in place, `problems` the reasons why others are not."""

    def __init__(self, *, layers: Sequence[str], modules: Sequence[str]):
        try:
            program = build_filter().hex()
        except OSError as error:
            raise SandboxError(str(error)) from error
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(ZYGOTE), str(theirs.fileno())], pass_fds=[theirs.fileno()], env={}, cwd="/",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        self.control.settimeout(PATIENCE)
        settings = {"layers": list(layers), "modules": list(modules), "memory": MEMORY, "filter": program}
        try:
            self.control.send(json.dumps(settings).encode())
            report = self.control.recv(1 << 16)
            if not report:
                raise OSError("it ended while it started")
        except OSError as error:
            self.close()
            raise SandboxError(f"the sandbox's process cannot start: {error}") from error
        report = json.loads(report)
        self.layers, self.problems = report["layers"], report["problems"]

    def call(self, request: bytes, *, seconds: float, cpu_seconds: float | None = None,
             respond: Respond | None = None) -> Outcome:
        """One round of calls; or several, one after the other, in one process: `respond` gets the values of a round and returns
        the arguments of the next one's calls, or None at the end, and must not raise. The outcome is that of the last round.

        seconds: wall time for a round; cpu_seconds: for all of them, None: as `seconds`

        Raises SandboxError if the zygote fails; it is of no use then."""
        try:
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    socket.send_fds(self.control, [CALL.pack(cpu_seconds or seconds)], [theirs.fileno()])
                started = time.monotonic()
                deadline = started + seconds
                received, stopped = exchange(ours, request, deadline, is_last=respond is None)
                is_confined = received.startswith(READY)  # else the code has not begun
                while respond is not None and stopped is None and received.endswith(END):
                    values = judge(received, None, 0).values
                    calls = None if values is None else respond(values)
                    deadline = time.monotonic() + seconds
                    more, stopped = exchange(ours, b"" if calls is None else encode(calls), deadline, is_last=calls is None)
                    received, respond = (more, respond) if calls is not None else (received + more, None)
                is_closed_early = stopped is None and not self._is_over(deadline)
                stopped = "time" if is_closed_early else stopped
                wall_seconds = time.monotonic() - started
                if stopped is not None:
                    self.control.send(KILL)
                status, cpu_seconds = RESULT.unpack(self.control.recv(RESULT.size))
        except (OSError, struct.error) as error:
            self.close()
            raise SandboxError(f"the sandbox's process failed: {type(error).__name__}: {error}") from error
        if not is_confined:
            self.close()
            raise SandboxError(f"a call's process could not be confined (status {status})")
        outcome = judge(received, stopped, status)
        outcome.cpu_seconds, outcome.wall_seconds = cpu_seconds, wall_seconds
        return outcome

    def _is_over(self, deadline: float) -> bool:
        """Whether the child ends before the deadline."""
        return bool(select.select([self.control], [], [], max(deadline - time.monotonic(), 0.001))[0])

    def close(self) -> None:
        """Ends the process, and with it a child that it has."""
        self.control.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def encode_call(code: str, function: str, calls: Sequence[Sequence]) -> bytes:
    return encode({"code": code, "function": function, "calls": calls})


def encode(message: object) -> bytes:
    return json.dumps(message, allow_nan=False).encode() + END


def exchange(connection: socket.socket, request: bytes, deadline: float, *, is_last: bool) -> tuple[bytes, str | None]:
    """Sends the request and reads the answer's line, the last time until the child closes its end. Returns what came, and "time"
    or "output" if it must be stopped for that."""
    received = bytearray()
    try:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended; its status says why
            connection.sendall(request)
            if is_last:
                connection.shutdown(socket.SHUT_WR)
        while is_last or not (received.endswith(END) and received != READY):
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            part = connection.recv(1 << 18)
            received += part
            if not part or len(received) > MOST_OUTPUT:
                return bytes(received), "output" if part else None
        return bytes(received), None
    except TimeoutError:
        return bytes(received), "time"
    except ConnectionResetError:
        return bytes(received), None


def judge(received: bytes, stopped: str | None, status: int) -> Outcome:
    """What a call's bytes and its process's end amount to. Nothing in the bytes is trusted to be more than values."""
    if stopped is not None:
        return Outcome(violation=stopped)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        kind = {signal.SIGSYS: "call", signal.SIGXCPU: "time", signal.SIGKILL: "memory",
                signal.SIGSEGV: "memory"}.get(number, "crash")  # a recursion in C, as by lru_cache, that fills the stack
        return Outcome(violation=kind, detail=signal.strsignal(number) or str(number))
    if status != 0:
        return Outcome(violation="crash", detail=f"exit code {os.waitstatus_to_exitcode(status)}")
    if not received.strip():
        return Outcome(violation="crash", detail="it left without a word")
    try:
        answer = json.loads(received)
        check_values(answer, MOST_DEPTH)
        outcome = Outcome(printed=str(answer["printed"])[:MOST_PRINTED])
        if answer["notes"]:
            kind, name = answer["notes"][0]
            outcome.violation, outcome.detail = known(kind), str(name)[:200]
        elif "violation" in answer:
            outcome.violation = known(answer["violation"])
        elif "error" in answer:
            outcome.error = str(answer["error"])[:MOST_ERROR]
        elif isinstance(answer["values"], list):
            outcome.values = answer["values"]
        else:
            raise ValueError("no list of values")
        return outcome
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        kind = "non_finite" if isinstance(error, NonFinite) else "output"
        return Outcome(violation=kind, detail=str(error)[:200])


def known(kind: object) -> str:
    return kind if kind in list(VIOLATIONS) else "output"


class NonFinite(ValueError):
    """A number that is NaN or infinite."""


def check_values(value: object, depth: int) -> None:
    """Raises ValueError for values nested deeper than `depth` and for text that UTF-8 cannot write, NonFinite for NaN and
    infinities."""
    if isinstance(value, str):
        value.encode()
    if isinstance(value, float) and not math.isfinite(value):
        raise NonFinite(f"{value} is not finite")
    if isinstance(value, (list, dict)):
        if depth == 0:
            raise ValueError("the answer is nested too deep")
        for item in value if isinstance(value, list) else (*value, *value.values()):
            check_values(item, depth - 1)
