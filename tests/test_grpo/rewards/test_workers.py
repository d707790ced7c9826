"""Killable workers: each item's value or error, in order, whatever the function does to its process."""

import os
import select
import signal
import subprocess
import sys

import pytest
from paths import ROOT

from grpo.rewards.workers import WorkerError, WorkerOutcome, Workers

LONG = 100.0  # seconds; a limit that no test reaches

FUNCTIONS = """
import os, signal, subprocess, sys, threading, time

prepared = []

def prepare():
    prepared.append("ready")

def prepare_with(*arguments):
    prepared.extend(arguments)

def fail_to_prepare():
    raise OSError("no judge here")

class Odd:
    pass

def work(item):
    kind, value = item
    if kind == "echo":
        return value
    if kind == "hang":
        if value:
            open(value, "w").write(str(os.getpid()))
        time.sleep(1000)
    if kind == "spin in C":
        return 9 ** (9 ** 9)
    if kind == "hang with a child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        open(value, "w").write(str(child.pid))
        time.sleep(1000)
    if kind == "hold the stream and die":
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(7)
    if kind == "die":
        os._exit(value)
    if kind == "kill itself":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        sys.exit(value)
    if kind == "raise":
        raise KeyError(value)
    if kind == "print":
        print(value); print(value, file=sys.stderr); os.write(1, b"raw bytes\\n")
        return value
    if kind == "open":
        open(value, "w").close()
    if kind == "wait for":
        while not os.path.exists(value):
            time.sleep(0.01)
        return "seen"
    if kind == "read":
        return sys.stdin.read()
    if kind == "odd":
        return Odd()
    if kind == "lambda":
        return lambda: 0
    if kind == "seen":
        import __main__
        return {
            "torch": "torch" in sys.modules,
            "main": getattr(__main__, "__file__", None),
            "prepared": list(prepared),
            "group": os.getpgid(0) == os.getpid() == os.getsid(0),
            "interrupt": signal.getsignal(signal.SIGINT) == signal.SIG_DFL,
            "hang up": signal.getsignal(signal.SIGHUP) == signal.SIG_DFL,
            "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "threads": threading.active_count(),
            "pid": os.getpid(),
        }
"""


@pytest.fixture
def make(tmp_path):
    (tmp_path / "judge.py").write_text(FUNCTIONS)
    made = []

    def make(function="work", *, num_workers=1, timeout=LONG, setup=None, **options):
        setup = f"{tmp_path}/judge.py:{setup}" if setup else None
        path = f"{tmp_path}/judge.py:{function}"
        made.append(Workers(path, num_workers=num_workers, timeout=timeout, setup=setup, **options))
        return made[-1]

    yield make
    for workers in made:
        workers.close()


def ended(pid):
    """Waits until the process is gone; its parent may be another process."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], LONG)[0])
    finally:
        os.close(fd)


def pid_in(path):
    return int(path.read_text())


def test_values_come_in_the_order_of_the_items(make):
    big = "x" * 1_000_000  # more than a pipe holds
    items = [("echo", i) for i in range(20)] + [("echo", big)]
    assert make(num_workers=2).map(items) == [WorkerOutcome(value) for _, value in items]


def test_no_items_start_no_process(make):
    workers = make()
    assert workers.map([]) == [] and workers._workers == []


def test_workers_stay_for_the_next_call(make):
    workers = make(setup="prepare")
    first, second = (workers.map([("seen", None)])[0].value for _ in range(2))
    assert first == second


def test_a_worker_is_a_clean_interpreter_in_a_session_of_its_own_with_default_signals(make):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        seen = make(setup="prepare").map([("seen", None)])[0].value
    finally:
        signal.signal(signal.SIGHUP, previous)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    assert seen.pop("pid") != os.getpid()
    assert seen == {
        "torch": False,
        "main": None,
        "prepared": ["ready"],
        "group": True,
        "interrupt": True,
        "hang up": True,
        "blocked": [],
        "threads": 1,
    }


def test_what_the_function_prints_goes_where_the_trainer_prints(make, capfd):
    workers = make()
    assert workers.map([("print", "hello"), ("read", None), ("echo", 1)]) == [
        WorkerOutcome("hello"), WorkerOutcome(""), WorkerOutcome(1)]
    captured = capfd.readouterr()
    assert captured.out == "hello\nraw bytes\n" and captured.err == "hello\n"


@pytest.mark.parametrize("hanging", [("hang", None), ("spin in C", None)])
def test_an_item_past_its_limit_is_an_error_of_its_own(make, hurried, hanging):
    hurried(lambda item: item == hanging)
    outcomes = make().map([("echo", 1), hanging, ("echo", 2)])
    assert [outcome.value for outcome in outcomes] == [1, None, 2]
    assert outcomes[1].is_timeout and outcomes[1].error == "ran over its limit of 100 s; its worker was killed"


def test_the_limit_is_that_of_each_item(make):
    [outcome] = make(timeout=0.2).map([("hang", None)])
    assert outcome.is_timeout and outcome.error == "ran over its limit of 0.2 s; its worker was killed"


def test_an_item_that_takes_long_keeps_others_waiting_for_the_patience_alone(make, tmp_path):
    workers = make(patience=0.1)  # of one worker, which waits for what the items after it do
    names = [str(tmp_path / name) for name in "abc"]
    items = [*(("wait for", name) for name in names), *(("open", name) for name in names)]
    assert [outcome.value for outcome in workers.map(items)] == ["seen"] * 3 + [None] * 3
    assert len(workers._workers) == 1


def test_a_setup_is_called_with_its_arguments(make):
    assert make(setup="prepare_with", setup_arguments=("judge", {"temperature": float("inf")})).map([("seen", None)])[
        0
    ].value["prepared"] == ["judge", {"temperature": float("inf")}]


def test_processes_that_the_function_started_die_with_its_worker(make, tmp_path):
    [outcome] = make(timeout=5.0).map([("hang with a child", str(tmp_path / "child"))])
    assert outcome.is_timeout and ended(pid_in(tmp_path / "child"))


@pytest.mark.parametrize(
    ("item", "words", "name"),
    [
        (("die", 3), "its worker died with exit status 3", None),
        (("kill itself", None), "its worker died with signal SIGKILL", "SIGKILL"),
        (("hold the stream and die", None), "its worker died with exit status 7", None),
    ],
)
def test_a_worker_that_dies_is_an_error_of_its_item_alone(make, item, words, name):
    outcomes = make().map([("echo", 1), item, ("echo", 2)])
    assert outcomes == [WorkerOutcome(1), WorkerOutcome(error=words, signal=name), WorkerOutcome(2)]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (("raise", "k"), "KeyError: 'k' (judge.py:"),
        (("exit", 3), "SystemExit: 3 (judge.py:"),
        (("lambda", None), "Can't pickle"),
        (("odd", None), "returned a value that cannot be read here: ModuleNotFoundError"),
        (("echo", lambda: 0), "cannot be sent to a worker: PicklingError"),
    ],
)
def test_what_fails_inside_a_worker_leaves_the_worker_alive(make, item, words):
    workers = make()
    before, failed, after = workers.map([("seen", None), item, ("seen", None)])
    assert before.value["pid"] == after.value["pid"]
    assert failed.value is None and words in failed.error and not failed.is_timeout and failed.signal is None


def test_the_budget_of_a_call_ends_it_and_the_next_call_gets_its_own_answers(make):
    workers = make(num_workers=2)
    outcomes = workers.map([("echo", 0), *[("hang", None)] * 2, ("echo", 3)], budget=0.5)
    assert outcomes[0] == WorkerOutcome(0)
    assert [outcome.error for outcome in outcomes[1:]] == ["not finished within the 0.5 s of the whole call"] * 3
    assert workers.map([("echo", 4)]) == [WorkerOutcome(4)]


def test_an_interrupted_call_leaves_no_answers_to_the_next(make, tmp_path, monkeypatch):
    workers = make()
    workers.map([("echo", 0)])

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grpo.rewards.workers.wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            workers.map([("echo", 1)])
    assert workers.map([("echo", 2)]) == [WorkerOutcome(2)]


def test_an_idle_worker_that_was_killed_is_replaced(make):
    workers = make()
    [before] = workers.map([("seen", None)])
    os.kill(before.value["pid"], signal.SIGKILL)
    os.waitid(os.P_PID, before.value["pid"], os.WEXITED | os.WNOWAIT)
    [after] = workers.map([("seen", None)])
    assert after.error is None and after.value["pid"] != before.value["pid"]


@pytest.mark.parametrize(
    ("function", "setup", "words"),
    [
        ("wrok", None, "has no 'wrok'"),
        ("work", "fail_to_prepare", r"setup .*judge.py:fail_to_prepare\) cannot start: OSError: no judge here"),
    ],
)
def test_a_worker_that_cannot_start_is_an_error_of_the_whole_call(make, function, setup, words):
    workers = make(function, num_workers=2, setup=setup)
    with pytest.raises(WorkerError, match=words):
        workers.map([("echo", 1), ("echo", 2)])
    assert workers._workers == []


def test_closing_kills_the_workers_and_a_later_call_starts_new_ones(make):
    workers = make()
    [before] = workers.map([("seen", None)])
    workers.close()
    assert ended(before.value["pid"])
    assert workers.map([("echo", 1)]) == [WorkerOutcome(1)]


def test_a_forked_copy_has_workers_of_its_own(make):
    workers = make()
    [before] = workers.map([("seen", None)])
    child = os.fork()
    if child == 0:
        try:
            [inside] = workers.map([("seen", None)])
            workers.close()
            os._exit(0 if inside.error is None and inside.value["pid"] != before.value["pid"] else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert workers.map([("seen", None)])[0].value["pid"] == before.value["pid"]


def test_workers_die_with_their_parent_though_they_are_busy(tmp_path):
    (tmp_path / "judge.py").write_text(FUNCTIONS)
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from grpo.rewards.workers import Workers\n"
        f"workers = Workers({str(tmp_path / 'judge.py')!r} + ':work', num_workers=1, timeout=1000)\n"
        f"workers.map([('print', 'started'), ('hang', {str(tmp_path / 'worker')!r})])"
    )
    os.mkfifo(tmp_path / "worker")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    worker = pid_in(tmp_path / "worker")  # blocks until the worker hangs
    parent.kill()
    parent.wait()
    assert ended(worker)
