"""The program of a zygote: a small Python process that forks a confined child for each call of model-written code.

It runs as `python -I -S zygote.py DESCRIPTOR` with an empty environment, imports only the standard library, and knows nothing but
its settings: a call's code, inputs and results pass between the child and the trainer on a socket of their own, so that no child
finds another call's data in memory that it inherits. On the control socket (messages keep their bounds):
    to the zygote    the settings, JSON: layers, modules, memory (bytes), filter (a BPF program, hex)
    from it          {"layers": those in place, "problems": layer -> why not}
    to the zygote    a call: seconds of CPU time that its child may use, with the call's socket attached; or KILL
    from it          RESULT: the child's wait status and its CPU seconds, once it has ended
On a call's socket the child first writes a line end, which says that it is confined. It reads {"code", "function", "calls"}, a
line of JSON, and writes a line with {"values"} or {"error"} or {"violation"}, and {"notes", "printed"}. Further lines, until the
end of the stream, are further calls of the function, each answered likewise; for each line the code runs anew.
"""

import ctypes
import functools
import gc
import importlib
import importlib.machinery
import io
import itertools
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import types
from collections.abc import Iterator

KILL, READY = b"kill", b"\n"
CALL, RESULT = struct.Struct("=d"), struct.Struct("=id")
NOBODY = 65534
MOST_PRINTED, MOST_ERROR = 10_000, 300  # characters
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38  # linux/prctl.h
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000  # linux/sched.h
CAPABILITY_VERSION = 0x20080522  # linux/capability.h
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # the same numbers on every processor
KEPT = ("encodings", "tracemalloc")  # that Python itself may ask for while code runs
OPENINGS = ("open", "os.listdir", "os.scandir")  # audit events: files are reached for, which the layers refuse


def main(descriptor: int) -> None:
    control = socket.socket(fileno=descriptor)
    settings = json.loads(control.recv(1 << 20))
    loaded = {name: importlib.import_module(name) for name in settings["modules"]}
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    libc.syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
    libc.syscall.restype = ctypes.c_long
    problems = {}
    for name, enter in LAYERS.items():
        try:
            if name in settings["layers"]:
                enter(libc)
        except OSError as error:
            problems[name] = os.strerror(error.errno) if error.errno else str(error)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    layers = [name for name in settings["layers"] if name not in problems]
    control.send(json.dumps({"layers": layers, "problems": problems}).encode())
    program = ctypes.create_string_buffer(bytes.fromhex(settings["filter"]))
    confine = Confinement(libc, program, layers, settings["memory"])
    refused = hide_modules(loaded)
    gc.collect()
    gc.freeze()
    serve(control, confine, refused)


# --- layers of the zygote, which its children inherit -----------------------------------------------------------------


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def enter_namespaces(libc) -> None:
    """No network but a loopback of its own, and no shared memory of others. Without root that takes a user namespace."""
    user = 0 if os.getuid() == 0 else CLONE_NEWUSER
    checked(libc.unshare(CLONE_NEWNET | CLONE_NEWIPC | user))


def drop_user(libc) -> None:
    """Root becomes nobody; anybody else stays who they are, without the capabilities that a user namespace gives."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    checked(libc.capset(struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24)))


def restrict_files(libc) -> None:
    """Landlock (linux/landlock.h): no access to any file; from version 4 on no TCP, from 6 on no signals to processes outside."""
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    version = checked(libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1))
    files = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1  # rights that the version knows
    attributes = struct.pack("=QQQ", files, 3, 3)[:8 if version < 4 else 16 if version < 6 else 24]
    ruleset = checked(libc.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0))
    checked(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0, 0))
    os.close(ruleset)


LAYERS = {"namespaces": enter_namespaces, "user": drop_user, "landlock": restrict_files}  # in the order that they can be entered


# --- layers of a child ------------------------------------------------------------------------------------------------


class Confinement:
    """What a child does to itself before it reads its call."""

    def __init__(self, libc, program: ctypes.Array, layers: list[str], memory: int):
        self.prctl, self.layers, self.memory, self.zygote = libc.prctl, layers, memory, os.getpid()
        self.program = program  # which the pointer below does not keep alive
        num_instructions = (len(program) - 1) // 8
        self.filter = ctypes.create_string_buffer(struct.pack("HP", num_instructions, ctypes.addressof(program)))

    def __call__(self, descriptor: int, seconds: float) -> None:
        """Keeps /dev/null as 0 to 2 and the call's socket. Raises OSError if a layer that held in the zygote does not here."""
        os.closerange(3, descriptor)
        os.closerange(descriptor + 1, descriptor + 64)
        os.setsid()
        checked(self.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        if os.getppid() != self.zygote:
            os._exit(1)
        if "limits" in self.layers:
            cpu = int(seconds) + 2
            for limit, value in ((resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, self.memory), (resource.RLIMIT_FSIZE, 0),
                                 (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_MEMLOCK, 0),
                                 (resource.RLIMIT_NOFILE, 0)):  # those that are open stay; no number is left for another
                resource.setrlimit(limit, (value, value))
        checked(self.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        if "seccomp" in self.layers:
            checked(self.prctl(PR_SET_SECCOMP, 2, ctypes.addressof(self.filter), 0, 0))


class Refusal:
    """The only finder of modules: it finds those that are hidden, for the standard library's own imports, and no others. Keeps a
    list of what the code asked for: [kind of violation, name]."""

    def __init__(self, loaded: dict, hidden: dict):
        self.notes: list[list[str]] = []
        self.hidden = hidden
        self.hides_resource = "resource" not in loaded  # which the zygote's wait4 looks up
        self.watches_files = "os" not in loaded
        self.library = os.path.dirname(os.__file__)

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(("<frozen", self.library)):
            return importlib.machinery.ModuleSpec(name, self) if name in self.hidden else None
        if name.partition(".")[0] not in KEPT:
            self.notes.append(["import", name])
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self.hidden[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """It has been executed."""

    def watch(self, event: str, arguments: tuple) -> None:
        """A hook for audit events (PEP 578)."""
        if event in OPENINGS and not str(arguments[0]).startswith(("<", self.library)):  # tracebacks look there
            self.notes.append(["call", f"{event} {arguments[0]}"])


def hide_modules(loaded: dict) -> Refusal:
    """Leaves to import: the modules of `loaded`, and what they need that is private or part of them."""
    roots = {name.partition(".")[0] for name in loaded} | {"builtins", "warnings", "resource", *KEPT}
    own = {"_ctypes", "_socket", "_signal", "_posixsubprocess"}
    hidden = {}
    for name in list(sys.modules):
        root = name.partition(".")[0]
        if root not in roots and (not root.startswith("_") or root in own):
            hidden[name] = sys.modules.pop(name)
    refusal = Refusal(loaded, hidden)
    sys.meta_path[:] = [refusal]
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    sys.argv = [""]
    return refusal


# --- calls ------------------------------------------------------------------------------------------------------------


def serve(control: socket.socket, confine: Confinement, refusal: Refusal) -> None:
    """Forks a child for each call, one at a time, until the control socket ends."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        if not descriptors:  # a KILL that came after its child's end
            continue
        seconds, = CALL.unpack(message)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                control.close()
                confine(descriptors[0], seconds)
                answer(descriptors[0], refusal)
                status = 0
            finally:
                os._exit(status)
        os.close(descriptors[0])
        ended = os.pidfd_open(pid)
        ready = select.poll()
        ready.register(ended, select.POLLIN)
        ready.register(control, select.POLLIN)
        if ended not in dict(ready.poll()):  # the trainer wants it killed, or has ended itself
            os.kill(pid, signal.SIGKILL)
            is_over = not control.recv(64)
        else:
            is_over = False
        os.close(ended)
        _, status, usage = os.wait4(pid, 0)
        if is_over:
            return
        control.send(RESULT.pack(status, usage.ru_utime + usage.ru_stime))


class Printed(io.StringIO):
    """Keeps the first MOST_PRINTED characters."""

    def write(self, text: str) -> int:
        super().write(text[:max(MOST_PRINTED - self.tell(), 0)])
        return len(text)


def answer(descriptor: int, refusal: Refusal) -> None:
    """The child's work: says that it is confined, reads calls, runs them, writes what came out."""
    if refusal.hides_resource:
        del sys.modules["resource"]
    os.write(descriptor, READY)
    lines = map(json.loads, read_lines(descriptor))
    request = next(lines)
    if refusal.watches_files:
        sys.addaudithook(refusal.watch)
    for calls in itertools.chain([request["calls"]], lines):
        sys.stdout = sys.stderr = printed = Printed()
        result = run(request["code"], request["function"], calls)
        notes = json.dumps({"notes": refusal.notes[:10], "printed": printed.getvalue()})
        message = memoryview(f"{result[:-1]}, {notes[1:]}\n".encode())
        while message:
            message = message[os.write(descriptor, message):]


def read_lines(descriptor: int) -> Iterator[bytes]:
    """Each line as soon as it is whole, until the end of the stream."""
    waiting = b""
    while part := os.read(descriptor, 1 << 20):
        *whole, waiting = (waiting + part).split(b"\n")
        yield from whole


@functools.cache
def compiled(code: str) -> types.CodeType:
    return compile(code, "<candidate>", "exec")


def run(code: str, function: str, calls: list[list]) -> str:
    """The results of a function that the code defines, or the reason why there are none, as a JSON object."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = sys.modules["__main__"] = module
    try:
        exec(compiled(code), module.__dict__)
        values = [module.__dict__[function](*arguments) for arguments in calls]
    except MemoryError:
        return json.dumps({"violation": "memory"})
    except BaseException as error:
        text = f"no function {function}" if isinstance(error, KeyError) and function not in module.__dict__ else str(error)
        return json.dumps({"error": f"{type(error).__name__}: {text}"[:MOST_ERROR]})
    try:
        return f'{{"values": {json.dumps(values, allow_nan=False)}}}'
    except MemoryError:
        return json.dumps({"violation": "memory"})
    except (TypeError, ValueError, RecursionError) as error:
        return json.dumps({"violation": "non_finite" if "float" in str(error) else "type"})


if __name__ == "__main__":
    main(int(sys.argv[1]))
