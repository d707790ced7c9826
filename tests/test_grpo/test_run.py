"""A run's life: where its folder is, what a resume refuses, what it survives, and what it leaves behind."""

import shlex
from pathlib import Path

import pytest

from grpo.config import anchor_paths, run_folder
from grpo.launch import load_config

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"

# An environment that walks away while it scores.
WANDERING = """
import os
from grpo.envs.carry import Carry

class Wandering(Carry):
    def score(self, completions):
        os.makedirs("elsewhere", exist_ok=True)
        os.chdir("elsewhere")
        return super().score(completions)
"""


@pytest.fixture
def start(entry_points, spread_folder, tmp_path):
    """Runs `grpo.train +experiment=smoke name=run` in tmp_path, its folder being out/run there."""

    def run(*arguments, path=(), experiment="smoke", writes_report=False, **options):
        return entry_points.run(
            "grpo.train", f"+experiment={experiment}", *arguments, folder=tmp_path, path=(spread_folder, *path),
            writes_report=writes_report, PYTHONPATH=str(ROOT), **options)

    return run


SMOKE = ("name=run", "output_dir=out", "env._target_=spread.Spread", "eval.at_start=false", "eval.every=0", "eval.at_end=false")


def test_a_run_stays_in_one_folder_when_its_environment_changes_the_working_directory(start, tmp_path):
    (tmp_path / "wandering.py").write_text(WANDERING)
    result = start(*SMOKE, "env._target_=wandering.Wandering", path=(tmp_path,))
    assert result.code == 0, result.err
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("metrics.jsonl")] == [Path("out/run/metrics.jsonl")]
    assert (tmp_path / "out/run/checkpoints/step_000002").is_dir() and (tmp_path / "out/run/summary.json").is_file()


def test_relative_paths_of_local_files_become_absolute_and_hub_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = load_config("train", ["+experiment=gpt_oss_20b_lora", "model.path=base", "model.tokenizer=openai/gpt-oss-20b",
                                   "model.lora.adapter=adapter", "env.path=rows.jsonl", "name=x", "output_dir=out"])
    anchor_paths(config)
    assert config.model.path == str(tmp_path / "base") and config.model.lora.adapter == str(tmp_path / "adapter")
    assert config.model.tokenizer == "openai/gpt-oss-20b" and config.env["path"] == str(tmp_path / "rows.jsonl")
    assert run_folder(config) == tmp_path / "out" / "x"


def test_the_commands_printed_at_the_end_are_quoted_for_the_shell(start, tmp_path):
    result = start(*SMOKE, "output_dir=my runs", "steps=1")
    assert result.code == 0, result.err
    commands = [shlex.split(line, comments=True) for line in result.out[result.out.index("next:"):].splitlines()[1:]]
    assert commands[0] == ["python", "-m", "grpo.generate", "run=my runs/run"]
    assert commands[1][3] == "run=my runs/run" and "output_dir=my runs" in commands[2]
    assert commands[3] == ["ls", "my runs/run/model"]
