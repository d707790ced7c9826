"""The sandbox: what each of its layers stops; what a call returns; modes; and that it outlives its processes."""

import contextlib
import ctypes
import os
import platform
import signal
import sys
import threading
from pathlib import Path

import pytest

from grpo.config import SandboxMode
from grpo.environment import make_environment, make_sandbox
from grpo.sandbox import pool, seccomp, self_test
from grpo.sandbox.calls import LAYERS, MODULES, VIOLATIONS, SandboxError, Zygote, encode_call, judge
from grpo.sandbox.pool import REQUIRED, Sandbox, SandboxRefused

sys.path.insert(0, str(Path(__file__).parent))
import attacks  # noqa: E402

PRODUCT = "def f(a, b): return a * b"
SEEN = "import sys\ndef f(): return [vars(sys).setdefault('seen', 0), vars(sys).update(seen=1)][0]"


@pytest.fixture(scope="module")
def sandbox():
    opened = Sandbox("auto", num_zygotes=2)
    yield opened
    opened.close()


def run(sandbox, code, *arguments, seconds=20.0):
    return sandbox.call(code, "f", [list(arguments)], seconds=seconds)


# --- layers -----------------------------------------------------------------------------------------------------------

REACHES = {  # what works where its layer is missing
    "seccomp": "os._exit(0) if os.fork() == 0 else os.wait()",
    "landlock": "os.listdir('/')",
    "limits": "os.open('/dev/null', os.O_WRONLY)",
    "user": "assert os.getuid() == 0",
    "namespaces": f"assert os.readlink('/proc/self/ns/net') == {os.readlink('/proc/self/ns/net')!r}",
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_alone_stops_what_happens_without_it(layer):
    if layer == "user" and os.getuid() != 0:
        pytest.skip("only root's number is dropped")
    code = f"import os\ndef f():\n    {REACHES[layer]}\n    return 'reached'"
    outcomes = []
    for layers in ((), (layer,)):
        zygote = Zygote(layers=layers, modules=[*MODULES, "os"])
        if zygote.problems:
            zygote.close()
            pytest.skip(f"this machine has no {layer}: {zygote.problems}")
        outcomes.append(zygote.call(encode_call(code, "f", [[]]), seconds=20.0))
        zygote.close()
    assert outcomes[0].values == ["reached"], outcomes[0]
    assert outcomes[1].values is None, outcomes[1]


def test_the_self_test_finds_a_layer_that_does_nothing(monkeypatch):
    allow_all = b"".join([seccomp.struct.pack("=HBBI", seccomp.RETURN, 0, 0, seccomp.ALLOW)])
    monkeypatch.setattr("grpo.sandbox.calls.build_filter", lambda: allow_all)
    assert self_test.test_layer("seccomp").startswith("it does not stop ")


@pytest.mark.parametrize("machine, architecture", [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_numbers_of_system_calls_are_those_of_libseccomp(machine, architecture):
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("no libseccomp here")
    resolve = library.seccomp_syscall_resolve_name_arch
    resolve.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    for table in (seccomp.ALLOWED, seccomp.FORBIDDEN):
        numbers = seccomp.numbers_of(table, machine)
        assert numbers == {name: resolve(architecture, name.encode()) for name in numbers}
        absent = seccomp.numbers_of(table, "x86_64").keys() - numbers.keys()
        assert [name for name in absent if resolve(architecture, name.encode()) >= 0] == []
    assert len(seccomp.numbers_of(seccomp.FORBIDDEN, machine)) > 60


def test_libseccomps_binding_writes_a_filter_that_stops_the_same(monkeypatch):
    binding = seccomp.find_binding()
    if binding is None:
        pytest.skip("neither seccomp nor pyseccomp is installed")
    program = seccomp.export(binding, platform.machine())
    assert program != seccomp.assemble(platform.machine())
    for each in (program, seccomp.assemble(platform.machine())):
        monkeypatch.setattr("grpo.sandbox.calls.build_filter", lambda each=each: each)
        assert self_test.test_layer("seccomp") is None


# --- calls ------------------------------------------------------------------------------------------------------------


def test_a_call_returns_values_seconds_and_what_was_printed(sandbox):
    outcome = sandbox.call(
        "def f(a, b):\n    print('a', a)\n    return [a * b, None, 'é', 0.5]", "f", [[6, 7], [2, 3]], seconds=20.0
    )
    assert outcome.values == [[42, None, "é", 0.5], [6, None, "é", 0.5]]
    assert outcome.printed == "a 6\na 2\n" and outcome.error is outcome.violation is None
    assert 0 < outcome.cpu_seconds < 20 and 0 < outcome.wall_seconds < 20


@pytest.mark.parametrize("name", attacks.BENIGN)
def test_honest_code_finds_the_standard_modules(sandbox, name):
    code, expected = attacks.BENIGN[name]
    outcome = run(sandbox, attacks.imports(exposed=False) + code)
    assert (outcome.values, outcome.error, outcome.violation, outcome.detail) == ([expected], None, None, "")


@pytest.mark.parametrize("module", MODULES)
def test_every_allowed_module_can_be_imported(sandbox, module):
    assert run(sandbox, f"def f():\n    import {module}\n    return 1").values == [1]


@pytest.mark.parametrize(
    "module", ["os", "ctypes", "socket", "numpy", "subprocess", "threading", "importlib", "posix", "signal"]
)
def test_other_modules_are_a_violation_even_if_the_error_is_caught(sandbox, module):
    outcome = run(sandbox, f"try:\n    import {module}\nexcept ImportError: pass\ndef f(): return 1")
    assert (outcome.violation, outcome.detail) == ("import", module)


def test_reaching_for_a_file_is_a_violation_even_if_the_error_is_caught(sandbox):
    outcome = run(sandbox, "def f():\n    try: open('/etc/passwd')\n    except OSError: return 1")
    assert (outcome.violation, outcome.detail) == ("call", "open /etc/passwd")


def test_what_python_does_on_its_own_is_no_violation(sandbox):
    code = (
        "import json, traceback, warnings\ndef f():\n    warnings.warn('careful')\n"
        "    try: json.loads('{')\n    except ValueError: traceback.print_exc()\n"
        "    try: compile('def f(:', '<x>', 'exec')\n    except SyntaxError: pass\n    return 'é'.encode('latin-1').hex()"
    )
    outcome = run(sandbox, code)
    assert (outcome.values, outcome.violation, outcome.detail) == (["e9"], None, "")
    assert "careful" in outcome.printed and "JSONDecodeError" in outcome.printed


@pytest.mark.parametrize(
    "code, error",
    [
        ("def f(): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def g(): return 1", "KeyError: no function f"),
        ("def f(: pass", "SyntaxError: invalid syntax (<candidate>, line 1)"),
        ("import sys\nsys.exit('bye')", "SystemExit: bye"),
        ("f = 3", "TypeError: 'int' object is not callable"),
    ],
)
def test_an_exception_is_an_error_and_no_violation(sandbox, code, error):
    outcome = run(sandbox, code)
    assert (outcome.error, outcome.violation, outcome.values) == (error, None, None)


def test_calls_do_not_see_each_other(sandbox):
    assert [run(sandbox, SEEN).values for _ in range(4)] == [[0]] * 4
    assert sandbox.call(SEEN, "f", [[], []], seconds=20.0).values == [0, 1]  # those of one process do


def test_cpu_seconds_are_the_childs(sandbox):
    busy = run(sandbox, "def f(): return sum(range(5_000_000))")
    idle = run(sandbox, "import time\ndef f(): time.sleep(0.3)")
    assert busy.cpu_seconds > 3 * idle.cpu_seconds
    assert idle.wall_seconds > 0.3 > idle.cpu_seconds


@pytest.mark.parametrize(
    "received, status, kind",
    [
        (b"\n{}", 0, "output"),
        (b"\n", 0, "crash"),
        (b"\n[1]", 0, "output"),
        (b"\n" + b"[" * 100_000, 0, "output"),
        (b'\n{"values": [NaN], "notes": [], "printed": ""}', 0, "non_finite"),
        (b'\n{"values": [1e999], "notes": [], "printed": ""}', 0, "non_finite"),
        (b'\n{"values": 3, "notes": [], "printed": ""}', 0, "output"),
        (b'\n{"values": ["\\ud800"], "notes": [], "printed": ""}', 0, "output"),
        (b'\n{"violation": "none of them", "notes": [], "printed": ""}', 0, "output"),
        (b"\nnot utf-8 \xff", 0, "output"),
        (b'\n{"values": [1], "notes": [], "printed": ""}', signal.SIGSYS, "call"),
        (b'\n{"values": [1], "notes": [], "printed": ""}', signal.SIGSEGV, "memory"),
        (b'\n{"values": [1], "notes": [], "printed": ""}', 1 << 8, "crash"),
    ],
)
def test_bytes_and_ends_that_are_no_answer_are_violations(received, status, kind):
    outcome = judge(received, None, int(status))
    assert (outcome.violation, outcome.values) == (kind, None)
    assert kind in VIOLATIONS


def test_results_of_calls_that_nobody_made_are_a_violation(sandbox):
    forged = """import random
def f():
    for number in range(3, 64):
        try: random._os.write(number, b'{"values": [1, 2], "notes": [], "printed": ""}')
        except OSError: pass
    random._os._exit(0)"""
    assert run(sandbox, forged).violation == "output"
    assert run(sandbox, forged.replace("[1, 2]", "[1]")).values == [1]  # as if f had returned it


DOUBLE = "count = 0\ndef f(n):\n    global count\n    count += 1\n    return [n * 2, count]"


def test_rounds_go_on_in_one_process_with_names_that_are_new_in_each(sandbox):
    seen = []

    def respond(values):
        seen.append(values)
        return [[values[0][0]]] if len(seen) < 4 else None

    outcome = sandbox.converse(DOUBLE, "f", [[3], [5]], respond, seconds=20.0, cpu_seconds=20.0)
    assert seen == [[[6, 1], [10, 2]], [[12, 1]], [[24, 1]], [[48, 1]]] and outcome.values == seen[-1]
    assert outcome.violation is outcome.error is None and 0 < outcome.cpu_seconds


@pytest.mark.parametrize(
    "line, violation, error",
    [
        ("import numpy", "import", None),
        ("while True: pass", "time", None),
        ("raise ValueError", None, "ValueError: "),
        ("import random; random._os._exit(0)", "crash", None),
        ("import random; random._os._exit(3)", "crash", None),
        ("import random; random._os.write(3, b'{}')", "output", None),
    ],
)
def test_what_happens_in_a_later_round_ends_all_of_them(sandbox, line, violation, error):
    code = f"def f(n):\n    if n == 2:\n        {line}\n    return n"
    seen = []
    outcome = sandbox.converse(
        code, "f", [[0]], lambda values: seen.append(values) or [[values[0] + 1]], seconds=1.0, cpu_seconds=20.0
    )
    assert (outcome.violation, outcome.error, seen) == (violation, error, [[0], [1]])
    assert run(sandbox, PRODUCT, 6, 7).values == [42]


def test_results_of_calls_that_nobody_made_end_the_rounds(sandbox):
    forged = """import random
def f():
    for number in range(3, 64):
        try: random._os.write(number, b'{"values": [1, 2], "notes": [], "printed": ""}\\n')
        except OSError: pass"""
    seen = []
    assert sandbox.converse(forged, "f", [[]], seen.append, seconds=20.0, cpu_seconds=20.0).violation == "output"
    assert seen == []


def test_a_zygote_that_dies_between_rounds_is_an_error_and_the_next_call_finds_another():
    sandbox = Sandbox("auto", num_zygotes=1)

    def respond(values):
        os.kill(sandbox._zygotes[0].process.pid, signal.SIGKILL)
        return [[1]]

    with pytest.raises(SandboxError):  # what has been answered cannot be asked again
        sandbox.converse("def f(n): return n", "f", [[0]], respond, seconds=20.0, cpu_seconds=20.0)
    assert run(sandbox, PRODUCT, 6, 7).values == [42]
    sandbox.close()


def test_what_cannot_be_written_as_json_is_refused_before_a_call(sandbox):
    with pytest.raises(ValueError):
        run(sandbox, PRODUCT, float("nan"), 1)


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_many_calls_at_a_time_keep_their_order_and_no_descriptors(sandbox):
    before = len(os.listdir("/proc/self/fd"))
    codes = [PRODUCT, "import socket\ndef f(a, b): return 1", "def f(a, b): return 1 / 0"]
    outcomes = sandbox.map(lambda i: run(sandbox, codes[i % 3], i, 7), range(90))
    assert [outcome.values for outcome in outcomes[::3]] == [[7 * i] for i in range(0, 90, 3)]
    assert {outcome.violation for outcome in outcomes[1::3]} == {"import"}
    assert {outcome.error for outcome in outcomes[2::3]} == {"ZeroDivisionError: division by zero"}
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_zygote_that_dies_is_replaced_and_its_call_made_again():
    sandbox = Sandbox("auto", num_zygotes=1)
    first = sandbox._zygotes[0].process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert run(sandbox, PRODUCT, 6, 7).values == [42]
    assert sandbox._zygotes[0].process.pid != first.pid and len(sandbox._zygotes) == 1
    sandbox.close()


def test_a_zygote_that_dies_during_a_call_takes_its_child_with_it():
    zygote = Zygote(layers=LAYERS, modules=MODULES)
    threading.Timer(0.2, os.kill, (zygote.process.pid, signal.SIGKILL)).start()
    with pytest.raises(SandboxError, match="the sandbox's process failed"):
        zygote.call(encode_call("def f():\n    while True: pass", "f", [[]]), seconds=30.0)
    listed = [Path(f"/proc/{name}/cmdline") for name in os.listdir("/proc") if name.isdigit()]
    ours = [
        path
        for path in listed
        if path.exists()
        and f"\0{zygote.process.args[-1]}\0".encode() in path.read_bytes()
        and b"zygote.py" in path.read_bytes()
        and f"PPid:\t{zygote.process.pid}" in (path.parent / "status").read_text()
    ]
    assert ours == []


def test_a_zygote_has_no_capabilities():
    zygote = Zygote(layers=("namespaces", "user"), modules=[*MODULES, "os"])
    listed = Path(f"/proc/{zygote.process.pid}/status").read_text().splitlines()
    zygote.close()
    assert [line for line in listed if line.startswith(("CapEff", "CapPrm")) and int(line.split()[1], 16)] == []


def test_closing_ends_the_processes():
    sandbox = Sandbox("auto", num_zygotes=2)
    processes = [zygote.process for zygote in sandbox._zygotes]
    assert [process.poll() for process in processes] == [None, None]
    sandbox.close()
    assert [process.poll() is not None for process in processes] == [True, True]


def test_a_zygote_starts_without_environment_and_descriptors_of_the_trainer(monkeypatch):
    monkeypatch.setenv("SECRET", "of the trainer")
    with contextlib.ExitStack() as opened:
        kept = [
            opened.enter_context(open(os.devnull)) for _ in range(200)
        ]  # the control socket's number is above theirs
        os.set_inheritable(kept[0].fileno(), True)
        zygote = Zygote(layers=(), modules=[*MODULES, "os"])
        code = (
            "import os\ndef f(): return [dict(os.environ), os.getcwd(), sorted(map(int, os.listdir('/proc/self/fd')))]"
        )
        environment, folder, descriptors = zygote.call(encode_call(code, "f", [[]]), seconds=20.0).values[0]
        zygote.close()
    assert "SECRET" not in environment and not set(environment) - {"LC_CTYPE"}
    assert folder == "/" and len(descriptors) == 5  # 0 to 2, the call's socket, and that of listdir


# --- modes ------------------------------------------------------------------------------------------------------------


def test_modes_of_the_configuration_are_those_of_the_sandbox():
    assert {str(mode) for mode in SandboxMode} == {*REQUIRED, "off"}


@pytest.mark.parametrize(
    "mode, held, is_refused",
    [
        ("auto", LAYERS, False),
        ("auto", ("seccomp", "limits"), False),
        ("auto", ("landlock", "limits", "user", "namespaces"), True),
        ("strict", LAYERS, False),
        ("strict", ("seccomp", "limits"), True),
        ("process", (), False),
        ("off", LAYERS, True),
    ],
)
def test_a_mode_refuses_where_a_layer_that_it_needs_is_missing(monkeypatch, mode, held, is_refused):
    problems = {name: "not permitted" for name in LAYERS if name not in held}
    monkeypatch.setattr(pool, "held_layers", lambda: (held, problems))
    if not is_refused:
        assert pool.required_layers(mode) == (held, problems)
        return
    with pytest.raises(SandboxRefused, match=f"^sandbox.mode = '{mode}': ") as refused:
        pool.required_layers(mode)
    assert "sandbox.mode=" in str(refused.value) and (mode == "off" or "not permitted" in str(refused.value))


def test_the_description_names_layers_and_calls_the_lack_of_seccomp_unsafe(monkeypatch):
    monkeypatch.setattr(pool, "held_layers", lambda: (("limits",), {"seccomp": "not permitted"}))
    sandbox = Sandbox("process", num_zygotes=1)
    assert sandbox.describe().startswith("process, UNSAFE")
    assert sandbox.describe().endswith(": limits hold; not seccomp (not permitted)")
    sandbox.close()


class WithSandbox:
    def __init__(self, *, tokenizer, seed, sandbox):
        self.sandbox = sandbox


class Without:
    def __init__(self, *, tokenizer, seed):
        pass


def test_an_environment_that_asks_for_a_sandbox_gets_one_and_others_start_none(monkeypatch):
    for kind in (WithSandbox, Without):
        monkeypatch.setattr(self_test, kind.__name__, kind, raising=False)
    nodes = [{"_target_": f"grpo.sandbox.self_test.{kind.__name__}"} for kind in (WithSandbox, Without)]
    assert make_sandbox(nodes[1], "off") is None
    with pytest.raises(SandboxRefused):
        make_sandbox(nodes[0], "off")
    sandbox = make_sandbox(nodes[0], "auto")
    assert make_environment(nodes[0], None, seed=0, total_steps=1, sandbox=sandbox).sandbox is sandbox
    sandbox.close()
