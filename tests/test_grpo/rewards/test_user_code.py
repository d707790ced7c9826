"""Foreign code in the trainer's process: what it changes is put back, its children never run the trainer's code, and its
coroutines share one event loop."""

import asyncio
import builtins
import concurrent.futures
import functools
import gc
import io
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings

import pytest
import torch
from paths import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from grpo.environment import EnvironmentFault, calling
from grpo.rewards import user_code
from grpo.rewards.user_code import (
    UserCodeFault,
    call_user_code,
    event_loop,
    import_user_code,
    is_users_interrupt,
    protected,
)
from grpo.run.signals import GracefulStop

FORK = multiprocessing.get_context("fork")


def delete_folder():
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def working_folder():
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def lower_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))


# what the user's code does, and how the state that it changes is read
CHANGES = {
    "chdir": (lambda: os.chdir("/"), os.getcwd),
    "folder gone": (delete_folder, working_folder),
    "umask": (lambda: os.umask(0o111), lambda: [os.umask(mask := os.umask(0o077)), mask][1]),
    "SIGTERM": (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGTERM)),
    "SIGINT": (lambda: signal.signal(signal.SIGINT, lambda *_: None), lambda: signal.getsignal(signal.SIGINT)),
    "SIGALRM": (lambda: signal.signal(signal.SIGALRM, lambda *_: None), lambda: signal.getsignal(signal.SIGALRM)),
    "alarm": (lambda: signal.alarm(1000), lambda: signal.getitimer(signal.ITIMER_REAL)),
    "blocked": (
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]),
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []),
    ),
    "limit": (lower_files, lambda: resource.getrlimit(resource.RLIMIT_NOFILE)),
    "GPU hidden": (
        lambda: os.environ.__setitem__("CUDA_VISIBLE_DEVICES", "7"),
        lambda: os.environ.get("CUDA_VISIBLE_DEVICES"),
    ),
    "wandb off": (lambda: os.environ.__setitem__("WANDB_MODE", "disabled"), lambda: os.environ.get("WANDB_MODE")),
    "home gone": (lambda: os.environ.pop("HOME"), lambda: os.environ.get("HOME")),
    "stdout": (lambda: setattr(sys, "stdout", io.StringIO()), lambda: sys.stdout),
    "argv": (lambda: sys.argv.append("--judge"), lambda: list(sys.argv)),
    "os.replace": (lambda: setattr(os, "replace", None), lambda: os.replace),
    "os.kill": (lambda: delattr(os, "kill"), lambda: vars(os).get("kill")),
    "shutil.rmtree": (lambda: setattr(shutil, "rmtree", None), lambda: shutil.rmtree),
    "Popen": (lambda: setattr(subprocess, "Popen", None), lambda: subprocess.Popen),
    "open": (lambda: setattr(builtins, "open", None), lambda: builtins.open),
    "clock": (lambda: setattr(time, "monotonic", lambda: 0.0), lambda: time.monotonic),
    "warnings": (lambda: warnings.simplefilter("error"), lambda: list(warnings.filters)),
    "recursion": (lambda: sys.setrecursionlimit(5000), sys.getrecursionlimit),
    "gc": (gc.disable, gc.isenabled),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), lambda: torch.ones(1).dtype),
    "tensor type": (lambda: torch.set_default_tensor_type(torch.DoubleTensor), lambda: torch.ones(1).dtype),
    "device": (lambda: torch.set_default_device("meta"), lambda: torch.ones(1).device),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads),
    "grad": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "no_grad": (lambda: torch.no_grad().__enter__(), torch.is_grad_enabled),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
    "anomaly": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "tf32": (
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: torch.backends.cuda.matmul.fp32_precision,
    ),
    "oneDNN": (lambda: torch._C._set_mkldnn_enabled(False), lambda: torch.backends.mkldnn.enabled),
    "denormals": (lambda: torch.set_flush_denormal(True), lambda: float(torch.tensor(1e-40) * 0.5)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("raises", [False, True])
def test_what_user_code_changes_is_put_back_whether_it_returns_or_raises(name, raises):
    change, read = CHANGES[name]
    before = read()

    def call():
        change()
        assert read() != before, "the change did nothing: this test proves nothing"
        if raises:
            raise KeyError("x")
        return "value"

    outcome = call_user_code("reward 'r'", call)
    assert isinstance(outcome, KeyError) if raises else outcome == "value"
    assert read() == before


def test_the_current_gpu_is_put_back(monkeypatch):
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device))
    monkeypatch.setattr(user_code, "_settings", user_code._settings.__wrapped__)  # the table holds set_device itself
    call_user_code("reward 'judge'", lambda: torch.cuda.set_device(1))
    assert current == [0]


def test_methods_of_an_environment_are_user_code_too():
    with calling(object(), "score"):
        torch.set_default_dtype(torch.float64)
    assert torch.get_default_dtype() == torch.float32


def test_what_cannot_be_put_back_ends_the_run_with_its_name():
    mode = torch.inference_mode()
    words = "reward 'judge' changed the inference mode of this process, which cannot be put back"
    with pytest.raises(UserCodeFault, match=words):
        call_user_code("reward 'judge'", mode.__enter__)
    mode.__exit__(None, None, None)
    with pytest.raises(UserCodeFault, match="environment object.score changed the inference mode"):
        with calling(object(), "score"):
            mode.__enter__()
    mode.__exit__(None, None, None)
    device = torch.device("meta")
    with pytest.raises(UserCodeFault, match="reward 'judge' changed the stack of torch function modes"):
        call_user_code("reward 'judge'", device.__enter__)
    device.__exit__(None, None, None)
    mode = FakeTensorMode()
    words = "reward 'judge' changed the stack of torch dispatch modes"
    with pytest.raises(UserCodeFault, match=words), calling(object(), "score"):
        call_user_code("reward 'judge'", mode.__enter__)
    mode.__exit__(None, None, None)


@pytest.mark.parametrize("close", ["sys.stdout.close()", "os.close(1)", "sys.stderr.close()", "os.close(2)"])
def test_user_code_that_closes_a_standard_stream_is_named_and_no_file_gets_its_number(close, tmp_path):
    code = (f"import os, sys; sys.path[:0] = [{str(ROOT)!r}]\n"
            "from grpo.record.terminal import print_error\n"
            "from grpo.rewards.user_code import UserCodeFault, call_user_code\n"
            "from grpo.record.terminal import flush_standard_streams\n"
            f"def call(): {close}\n"
            "try:\n    call_user_code('reward x', call)\n"
            f"except UserCodeFault as fault:\n    open({str(tmp_path / 'fault')!r}, 'w').write(str(fault))\n"
            "print_error('error', 'at the end')\nflush_standard_streams()\n"
            f"os._exit(100 + os.open({str(tmp_path / 'file')!r}, os.O_CREAT))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode >= 103, done.stderr
    assert "reward x changed the standard streams of this process" in (tmp_path / "fault").read_text()
    assert ("error: at the end" in done.stderr) == ("2" not in close and "stderr" not in close)


def test_random_generators_go_on():
    torch.manual_seed(0)
    draws = [call_user_code("reward 'r'", lambda: torch.rand(1).item()) for _ in range(2)]
    assert draws[0] != draws[1]


class FunctionTimedOut(BaseException):
    """As func_timeout has it."""


@pytest.mark.parametrize("error", [FunctionTimedOut(), SystemExit(2), GeneratorExit(), StopIteration(), asyncio.CancelledError(),
                                   KeyError()])
def test_exceptions_of_any_kind_are_outcomes(error):
    def call():
        raise error

    assert call_user_code("reward 'r'", call) is error
    with pytest.raises(EnvironmentFault, match=f"environment object.score raised {type(error).__name__}"):
        with calling(object(), "score"):
            raise error


def test_a_keyboard_interrupt_is_the_users_only_where_the_signal_raises_it(request):
    def call():
        raise KeyboardInterrupt

    # a shell that runs this in the background ignores the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert is_users_interrupt(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        call_user_code("reward 'r'", call)
    with GracefulStop("resume"):  # in a run, the signal only asks it to stop
        assert isinstance(call_user_code("reward 'r'", call), KeyboardInterrupt)


def test_a_module_that_exits_while_it_is_imported_is_an_import_error(tmp_path, monkeypatch):
    (tmp_path / "exits_at_import.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="exits_at_import ends Python while it is imported"):
        import_user_code("exits_at_import")


# --- forked children --------------------------------------------------------------------------------------------------


def raise_key_error():
    raise KeyError("child")


@pytest.mark.parametrize(
    "leave, code",
    [(sys.exit, 0), (lambda: sys.exit(3), 3), (lambda: sys.exit("text"), 1), (raise_key_error, 1), (lambda: None, 0)],
)
def test_a_forked_child_never_returns_from_user_code(leave, code):
    parent = os.getpid()

    def call():
        child = os.fork()
        if child == 0:
            leave()
        return child

    with protected("an environment that calls a reward"):
        child = call_user_code("reward 'r'", call)
        if os.getpid() != parent:
            os._exit(99)  # what this test is about
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_a_child_forked_by_a_coroutine_ends_too():
    async def call():
        child = os.fork()
        if child == 0:
            sys.exit(5)
        return child

    [child] = event_loop().run([call()])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


def wait_for_ever(connection=None):
    if connection is not None:
        connection.send("started")
    while True:
        time.sleep(1000)


def test_terminate_ends_a_process_that_a_reward_forked_during_a_run():
    ours, theirs = FORK.Pipe()
    with GracefulStop("resume") as stop:
        process = FORK.Process(target=wait_for_ever, args=(theirs,))
        process.start()
        try:
            assert ours.recv() == "started"
            process.terminate()
            process.join(60)
            assert process.exitcode == -signal.SIGTERM
        finally:
            process.kill()
        assert not stop()


def test_a_pool_with_busy_workers_ends():
    with GracefulStop("resume"):
        with FORK.Pool(2) as pool:
            pool.apply(os.getpid)
            pool.apply_async(wait_for_ever)
        pool.join()


def test_a_plain_fork_has_pythons_handlers_and_the_parent_keeps_its_own():
    with GracefulStop("resume") as stop:
        child = os.fork()
        if child == 0:
            numbers = (signal.SIGTERM, signal.SIGHUP)
            is_default = all(signal.getsignal(number) == signal.SIG_DFL for number in numbers)
            os._exit(0 if is_default and signal.getsignal(signal.SIGINT) is signal.default_int_handler else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()


def test_an_executors_workers_can_be_killed_by_its_owner():
    with GracefulStop("resume"):
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=FORK) as executor:
            pid = executor.submit(os.getpid).result()
            waiting = executor.submit(wait_for_ever)
            os.kill(pid, signal.SIGTERM)
            with pytest.raises(concurrent.futures.process.BrokenProcessPool):
                waiting.result(60)


# --- coroutines -------------------------------------------------------------------------------------------------------


class Client:
    """Bound to the loop of its first use, as an HTTP client with open connections is."""

    def __init__(self):
        self.loop = None

    async def post(self) -> float:
        loop = asyncio.get_running_loop()
        self.loop = self.loop or loop
        if self.loop is not loop or loop.is_closed():
            raise RuntimeError("Event loop is closed")
        await asyncio.sleep(0)
        return 1.0


def test_one_event_loop_serves_all_calls():
    client = Client()
    assert [event_loop().run([client.post(), client.post()]) for _ in range(2)] == [[1.0, 1.0]] * 2


def test_what_a_coroutine_raises_is_its_outcome_alone():
    async def fails(error):
        raise error

    exits, timed_out, value = event_loop().run([fails(SystemExit(1)), fails(FunctionTimedOut()), Client().post()])
    assert isinstance(exits, SystemExit) and isinstance(timed_out, FunctionTimedOut) and value == 1.0


def test_a_task_that_exits_does_not_end_the_loop():
    async def exits():
        sys.exit(1)

    async def call():
        await asyncio.create_task(exits())

    [outcome] = event_loop().run([call()])
    assert isinstance(outcome, SystemExit)
    assert event_loop().run([Client().post()]) == [1.0]


def test_a_forked_child_has_a_loop_of_its_own():
    event_loop().run([Client().post()])
    child = os.fork()
    if child == 0:
        os._exit(0 if event_loop().run([Client().post()]) == [1.0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert event_loop().run([Client().post()]) == [1.0]


def test_the_loop_ends_with_the_process_and_cancels_what_still_runs():
    code = """
import asyncio
from grpo.rewards.user_code import event_loop

async def background():
    try:
        await asyncio.sleep(1000)
    finally:
        print("closed", flush=True)

tasks = []

async def call():
    tasks.append(asyncio.create_task(background()))
    await asyncio.sleep(0)

event_loop().run([call()])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout, result.stderr) == (0, "closed\n", "")


def test_partials_of_coroutine_functions_are_awaited():
    async def judge(weight):
        return weight

    assert event_loop().run([functools.partial(judge, weight=2.0)()]) == [2.0]
