"""A run's folder belongs to one process, which notices when it is taken away."""

import os
import re
import signal
import time

import pytest
from child_process import fork_python

from grpo.run.checkpoint import SaveError
from grpo.run.lock import RunInUseError, lock_run


def test_a_second_process_cannot_take_a_run_until_the_first_is_gone(entry_points, tmp_path, tmp_path_factory):
    code = "import sys, time; from grpo.run.lock import lock_run; lock = lock_run(sys.argv[1]); " \
           "lock.__enter__(); print('locked', flush=True); time.sleep(60)"
    process = fork_python(entry_points, tmp_path_factory.mktemp("code"), code, tmp_path)
    try:
        while process.output_text() != "locked\n":
            assert not process.error_text()
            time.sleep(0.001)
        with pytest.raises(RunInUseError, match=rf"{tmp_path} is in use by process {process.pid} on .* choose another"):
            lock_run(tmp_path).__enter__()
    finally:
        process.send(signal.SIGKILL)
        process.wait()
    with lock_run(tmp_path):
        with pytest.raises(RunInUseError, match=f"process {os.getpid()}"):
            lock_run(tmp_path).__enter__()
    with lock_run(tmp_path):
        pass


def test_a_lock_on_a_folder_that_holds_nothing_else_leaves_nothing(tmp_path):
    with lock_run(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    with lock_run(tmp_path / "run"):
        (tmp_path / "run/config.yaml").write_text("seed: 1")
    assert (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize("what", ["moved", "replaced", "deleted"])
def test_a_lock_notices_that_its_folder_is_no_longer_in_its_place(tmp_path, what):
    run_dir = tmp_path / "run"
    with lock_run(run_dir) as lock:
        lock.check_in_place()
        if what == "deleted":
            (run_dir / ".lock").unlink()
            run_dir.rmdir()
        else:
            run_dir.rename(tmp_path / "moved away")
        if what == "replaced":
            run_dir.mkdir()
        place = "" if what == "deleted" else f"; it is now {tmp_path / 'moved away'}"
        with pytest.raises(SaveError, match=re.escape(str(run_dir)) + f" was moved, replaced or deleted .*{place}"):
            lock.check_in_place()
