"""Sweeps side by side: what they leave is what a sweep one after the other leaves, whatever happens to one of the jobs."""

import os
import re
import signal
from pathlib import Path

import pytest

SIDE_BY_SIDE = ("-m", "hydra/launcher=processes", "hydra.launcher.num_processes=2")
# Two jobs that meet: a pipe opens only when its other end is open too. One job fails, one is killed.
TASK = """
import os, signal
if config.seed < 2 and os.path.exists("meeting"):
    os.close(os.open("meeting", os.O_WRONLY if config.seed else os.O_RDONLY))
print("ran", config.name, "on GPU", os.environ.get("CUDA_VISIBLE_DEVICES"))
run_dir = run_folder(config)
run_dir.mkdir(parents=True)
record = {key: {"value": config.seed / 8, "step": 1} for key in ("first", "last", "best")}
(run_dir / "summary.json").write_text(json.dumps({
    "run_name": config.name, "exit_reason": "finished", "steps": 1, "seconds": 1.0, "config": to_dict(config), "train": {},
    "eval": {"eval/greedy_accuracy": record, "eval/reward": record}}))
if config.seed == 3:
    os.kill(os.getpid(), signal.SIGKILL)
if config.seed == 2:
    raise RuntimeError("broken")
return 0
"""
STOPPABLE = """
import os, signal
from grpo.run.signals import GracefulStop
told, tell = os.pipe()
os.set_blocking(tell, False)
signal.set_wakeup_fd(tell)
with GracefulStop("again") as stop:
    pipe = os.open("meeting", os.O_WRONLY)
    os.write(pipe, b"began ")
    os.read(told, 1)
    if stop():
        os.write(pipe, f"{config.seed} saved ".encode())
return 75
"""


@pytest.fixture
def meeting(tmp_path):
    os.mkfifo(tmp_path / "meeting")
    return tmp_path / "meeting"


def logs(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("sweeps/*/*.log")}


def test_jobs_run_together_each_on_a_gpu_and_leave_the_table_of_a_sweep_in_one_process(launched, tmp_path, meeting):
    gpus = "import grpo.configuration.processes as processes; processes.visible_gpus = lambda: ['4', '5']"
    together = launched(*SIDE_BY_SIDE, "seed=0,1,2", task=TASK, before=gpus)
    meeting.unlink()
    (tmp_path / "runs").rename(tmp_path / "together")
    in_turn = launched("-m", "seed=0,1,2", task=TASK)
    assert together.code == in_turn.code == 1, together.err
    said = logs(tmp_path / "together")
    assert sorted(said) == ["0.log", "1.log", "2.log"]
    assert {said[f"{job}.log"].splitlines()[0] for job in (0, 1)} == {
        "ran quickstart-carry-seed0 on GPU 4", "ran quickstart-carry-seed1 on GPU 5"}
    for name in ("sweep_summary.md", "sweep_summary.csv"):
        assert (tmp_path / "runs" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()
    assert re.match(r"error: job 2 .*seed=2\) ended with exit code 1: RuntimeError: broken; see .*/2.log", together.err)
    assert together.err.endswith(in_turn.err[in_turn.err.index("sweep: 1 of 3 runs failed"):])
    assert "Traceback" in said["2.log"] and "Traceback" not in together.err


def test_a_job_that_is_killed_is_named_and_the_others_go_on(launched, tmp_path):
    result = launched(*SIDE_BY_SIDE, "hydra.launcher.num_processes=1", "seed=3,0", task=TASK)
    assert result.code == 1 and (tmp_path / "runs/quickstart-carry-seed0/summary.json").is_file()
    assert re.search(r"error: job 0 .*seed=3\) was ended by SIGKILL, without a result; see runs/sweeps/.*/0.log", result.err)
    assert "sweep: 1 of 2 runs failed" in result.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_reaches_all_jobs_once_and_no_further_one_starts(launched, tmp_path, meeting, number):
    command = launched(*SIDE_BY_SIDE, "seed=0,1,2", task=STOPPABLE, waits=False)
    with meeting.open("rb", buffering=0) as pipe:
        said = b""
        while said.count(b"began") < 2:
            said += pipe.read(100)
        command.send(number)
        result = command.wait(60)
        while part := pipe.read(100):  # until both have closed it
            said += part
    assert sorted(re.findall(rb"\d saved", said)) == [b"0 saved", b"1 saved"]
    assert [text.count("SIGTERM") for text in logs(tmp_path / "runs").values()] == [1, 1]
    if number == signal.SIGINT:
        assert result.code == 75 and "SIGINT: the jobs save and end" in result.err
        assert "stopped: the sweep, 0 of 3 runs finished; resume with: " in result.err


def test_a_number_of_processes_below_one_is_refused_before_a_folder_is_made(launched, tmp_path):
    result = launched("-m", "hydra/launcher=processes", "hydra.launcher.num_processes=0", "seed=0,1")
    assert result.code == 2
    assert result.err.startswith("config error: hydra.launcher.num_processes = 0: must be an integer of at least 1, or null ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_runs_side_by_side_have_the_bytes_of_runs_one_after_the_other(entry_points, tmp_path):
    words = ("-m", "experiment=smoke", "seed=0,1", "device=cpu", "threads=1")
    for name, launcher in (("together", SIDE_BY_SIDE[1:]), ("serial", ())):
        result = entry_points.run("grpo.train", *words, *launcher, f"output_dir={tmp_path / name}")
        assert result.code == 0, result.err
    files = sorted(path.relative_to(tmp_path / "serial") for path in tmp_path.glob("serial/*/checkpoints/**/*.safetensors"))
    assert len(files) >= 4
    for file in files:
        assert (tmp_path / "together" / file).read_bytes() == (tmp_path / "serial" / file).read_bytes(), file
