"""The first signal asks a run to stop, the second ends it at once."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from child_process import run_python
from paths import ROOT

from grpo.run.signals import SIGNALS, GracefulStop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_the_loop_to_stop_and_old_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with GracefulStop("python -m x resume=true") as stop:
        assert stop() is False
        signal.raise_signal(number)
        assert stop() is True and stop.signal_name == signal.Signals(number).name
    assert signal.getsignal(number) is before
    assert "Resume with: python -m x resume=true" in capfd.readouterr().err


def test_the_second_signal_leaves_at_once():
    code = """
import time
from grpo.run.signals import GracefulStop
with GracefulStop("make resume") as stop:
    print("ready", flush=True)
    while not stop():
        time.sleep(0.01)
    print("stopping", flush=True)
    time.sleep(10_000)
"""
    process = run_python(code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.count("make resume") == 2 and "without saving" in errors


def test_a_hangup_counts_once_however_often_it_comes_and_stays_ignored_under_nohup(capfd):
    with GracefulStop("python -m x resume=true") as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert stop() and stop.signal_name == "SIGHUP"
    assert capfd.readouterr().err.count("SIGHUP") == 1
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulStop("python -m x resume=true") as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_signals_are_left_to_the_main_one():
    before, stopped = [signal.getsignal(number) for number in SIGNALS], []

    def work():
        with GracefulStop("python -m x resume=true") as stop:
            assert [signal.getsignal(number) for number in SIGNALS] == before
            stopped.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert stopped == [False] and [signal.getsignal(number) for number in SIGNALS] == before


def test_what_a_signal_says_never_lands_in_a_file_that_got_the_number_of_a_closed_stream(tmp_path):
    code = """
import os, signal, sys
from grpo.record.terminal import hold_standard_streams
from grpo.run.signals import GracefulStop
hold_standard_streams()
file = open(sys.argv[1], "w")
assert file.fileno() > 2
with GracefulStop("make resume"):
    signal.raise_signal(signal.SIGTERM)
print("to nobody", flush=True)
print("to nobody", file=sys.stderr, flush=True)
file.write("mine")
"""
    command = f'exec "{sys.executable}" -c "$1" "$2" <&- >&- 2>&-'
    result = subprocess.run(["sh", "-c", command, "sh", code, tmp_path / "file"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_a_forked_child_does_not_lose_a_signal_that_comes_before_it_has_its_own_handlers():
    code = """
import os, signal
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))  # registered first, so it runs before ours
from grpo.run.signals import GracefulStop
with GracefulStop("resume") as stop:
    child = os.fork()
    if child == 0:
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop(), signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
    process = run_python(code)
    out, _ = process.communicate(timeout=60)
    assert out == f"{-signal.SIGTERM:d} False set()\n"
