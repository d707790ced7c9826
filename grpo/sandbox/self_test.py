"""Which layers of the sandbox hold on this machine, found out by attacks: each layer alone must refuse its share of them."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from grpo.sandbox.calls import LAYERS, MODULES, SandboxError, Zygote, encode_call

EXPOSED = ("os", "socket", "ctypes", "signal")  # that the attacks need and model-written code cannot import
SECONDS = 10.0  # far more than an attack takes, whether it is stopped or not

# Layer -> the bodies of functions that return if the layer lets them. {parent}: the number of this process.
ATTACKS = {
    "seccomp": (
        "open('/proc/self/status').read()",
        "os.open('/dev/null', os.O_WRONLY)",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "os._exit(0) if os.fork() == 0 else os.wait()",
        "os.kill({parent}, 0)",
        "assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
        "assert ctypes.CDLL(None).unshare(0) == 0",
        "assert ctypes.CDLL(None).syscall(425, 0, 0) == 0 or ctypes.get_errno() != 1"),  # io_uring_setup
    "landlock": ("open('/proc/self/status').read()", "os.open('/dev/null', os.O_WRONLY)", "os.listdir('/')"),
    "limits": ("bytearray(1 << 31)", "os.open('/dev/null', os.O_WRONLY)"),
    "user": ("assert os.getuid() == 0",),
    "namespaces": ("assert os.readlink('/proc/self/ns/net') == '{network}'",)}


@cache
def held_layers() -> tuple[tuple[str, ...], dict[str, str]]:
    """The layers that refuse all of their attacks, and for the others the reason. Tested once in a process."""
    with ThreadPoolExecutor(len(LAYERS)) as threads:
        reasons = dict(zip(LAYERS, threads.map(test_layer, LAYERS)))
    held = tuple(name for name in LAYERS if reasons[name] is None)
    return held, {name: reason for name, reason in reasons.items() if reason is not None}


def test_layer(layer: str) -> str | None:
    """The reason why the layer does not hold, or None."""
    zygote = None
    try:
        places = {"parent": os.getpid(), "network": os.readlink("/proc/self/ns/net")}
        zygote = Zygote(layers=[layer], modules=[*MODULES, *EXPOSED])
        if layer in zygote.problems:
            return zygote.problems[layer]
        honest = zygote.call(encode_call("def f(a, b): return a * b", "f", [[6, 7]]), seconds=10.0)
        if honest.values != [42]:
            return f"honest code fails in it: {honest.error or honest.violation} {honest.detail}"
        for attack in ATTACKS[layer]:
            code = f"import {', '.join(EXPOSED)}\ndef f():\n    {attack.format(**places)}\n    return 'reached'"
            outcome = zygote.call(encode_call(code, "f", [[]]), seconds=SECONDS)
            if outcome.values is not None or outcome.violation == "time":
                return f"it does not stop {attack}"
    except (SandboxError, OSError) as error:
        return str(error)
    finally:
        if zygote is not None:
            zygote.close()
    return None
