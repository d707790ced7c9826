"""scripts/next_run.py: `make quickstart` a second time goes on or starts anew, and never stops at a name that is taken."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from grpo.config import save_config
from grpo.configuration.launch import load_config

SCRIPT = ROOT / "scripts/next_run.py"
next_run = runpy.run_path(str(SCRIPT))["next_run"]
DEFAULT = "quickstart-carry-seed0"


def leave_run(output_dir: Path, name: str, *folders: str, overrides: tuple[str, ...] = ()) -> None:
    for folder in folders:
        (output_dir / name / "checkpoints" / folder).mkdir(parents=True)
    save_config(load_config("train", [f"output_dir={output_dir}", *overrides]), output_dir / name / "config.yaml")


def test_a_first_run_keeps_its_name(tmp_path):
    assert next_run([f"output_dir={tmp_path}"]) == []


def test_an_unfinished_run_is_resumed(tmp_path):
    leave_run(tmp_path, DEFAULT, "step_000000", "step_000059")
    assert next_run([f"output_dir={tmp_path}"]) == [f"name={DEFAULT}", "resume=true"]


def test_a_finished_run_is_kept_and_the_next_gets_a_number(tmp_path):
    leave_run(tmp_path, DEFAULT, "step_000050", "step_000060")
    assert next_run([f"output_dir={tmp_path}"]) == [f"name={DEFAULT}-2"]
    leave_run(tmp_path, f"{DEFAULT}-2", "step_000010")
    assert next_run([f"output_dir={tmp_path}"]) == [f"name={DEFAULT}-2", "resume=true"]


def test_more_steps_continue_a_finished_run(tmp_path):
    leave_run(tmp_path, DEFAULT, "step_000060")
    assert next_run([f"output_dir={tmp_path}", "steps=80"]) == [f"name={DEFAULT}", "resume=true"]


def test_a_run_of_another_configuration_is_left_alone(tmp_path):
    leave_run(tmp_path, DEFAULT, "step_000010", overrides=("optim.lr=1e-5",))
    assert next_run([f"output_dir={tmp_path}"]) == [f"name={DEFAULT}-2"]


def test_a_run_killed_in_its_first_save_starts_over_under_its_name(tmp_path):
    leave_run(tmp_path, DEFAULT, ".step_000000.tmp")
    assert next_run([f"output_dir={tmp_path}"]) == []


@pytest.mark.parametrize("arguments", [["name=mine"], ["resume=true"], ["-m", "seed=0,1"], ["stepz=3"]])
def test_what_decides_itself_or_will_be_refused_gets_nothing_added(tmp_path, arguments):
    leave_run(tmp_path, DEFAULT, "step_000010")
    assert next_run([f"output_dir={tmp_path}", *arguments]) == []


def test_the_script_prints_overrides_for_a_command_line(tmp_path):
    leave_run(tmp_path, "quickstart-carry-seed1", "step_000010", overrides=("seed=1",))
    result = subprocess.run([sys.executable, SCRIPT, f"output_dir={tmp_path}", "seed=1"], cwd=tmp_path, capture_output=True,
                            text=True, timeout=600)
    assert (result.returncode, result.stdout) == (0, "name=quickstart-carry-seed1 resume=true\n"), result.stderr
