import json
import re
import tempfile
from pathlib import Path

import pytest

from grpo.config import ConfigError
from grpo.explain import read_request
from grpo.record.outputs import (
    files_of_checkpoint,
    files_of_env,
    keep_inputs,
    keep_part,
    keep_run_files,
    save_output,
    writable_file,
    write_output,
)
from grpo.report import main


def test_checking_an_output_leaves_files_as_they_were(tmp_path):
    (tmp_path / "old.json").write_text("{}")
    assert writable_file(str(tmp_path / "old.json")).read_text() == "{}"
    assert not writable_file(str(tmp_path / "new.json")).exists()


@pytest.mark.parametrize("name, value", [("rows.jsonl", "{}/rows.jsonl"), ("rows.jsonl", ["other.jsonl", "{}/./rows.jsonl"]),
                                         ("rows.jsonl", "{}/*.jsonl"), ("link.json", "{}/rows.jsonl,other.jsonl")])
def test_an_input_is_never_written_over(tmp_path, name, value):
    (tmp_path / "rows.jsonl").write_text("mine")
    (tmp_path / "link.json").symlink_to(tmp_path / "rows.jsonl")
    (tmp_path / "result.json").write_text("{}")
    value = [part.format(tmp_path) for part in value] if isinstance(value, list) else value.format(tmp_path)
    with pytest.raises(ConfigError, match=f"^output = '{tmp_path}/{name}': is the file that env.path reads, which would be lost"):
        keep_inputs(str(tmp_path / name), {"env.path": value})
    for other in (None, str(tmp_path / "result.json"), str(tmp_path / "new.json")):
        keep_inputs(other, {"env.path": value, "env.eval_path": None, "env.path_length": 3})


def test_the_code_of_an_environment_is_an_input_too(tmp_path):
    (tmp_path / "rewards.py").write_text("mine")
    env = {"path": "rows.jsonl", "rewards": [{"fn": f"{tmp_path}/rewards.py:even", "weight": 2.0}]}
    with pytest.raises(ConfigError, match="is the file that env reads"):
        keep_inputs(str(tmp_path / "rewards.py"), files_of_env(env))


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_a_file_of_the_evaluated_model_is_never_written_over(tmp_path, name):
    for there in (name, "answers.json"):
        (tmp_path / there).write_text("mine")
    with pytest.raises(ConfigError, match="is the file that model.path reads"):
        keep_inputs(str(tmp_path / name), {"model.path": files_of_checkpoint(str(tmp_path))})
    keep_inputs(str(tmp_path / "answers.json"), {"model.path": files_of_checkpoint(str(tmp_path))})


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a run."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    record = {when: {"value": 0.5, "step": 1} for when in ("first", "last", "best")}
    (run_dir / "summary.json").write_text(json.dumps({
        "exit_reason": "finished", "steps": 1, "seconds": 0.0, "eval": {"eval/greedy": record}, "config": {"seed": 0}}))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    return run_dir


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("option", ["--csv", "--plot"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "../run/completions.jsonl", "checkpoints/x.svg"])
def test_a_table_is_never_written_over_a_file_of_a_run(run_dir, capsys, option, name):
    (run_dir / "checkpoints").mkdir()
    before = contents(run_dir)
    assert main([str(run_dir), option, str(run_dir / name)]) == 2
    shown = capsys.readouterr()
    own = name.removeprefix("../run/").removesuffix("/x.svg")
    assert shown.err == (f"error: {option} '{run_dir / name}': {own} is the run's own in {run_dir}, which must stay as it is; "
                         "give another name\n") and not shown.out
    assert contents(run_dir) == before


def test_a_run_of_which_little_is_left_is_known_as_one_that_the_table_reads(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    before = contents(run_dir)
    assert main([str(run_dir), "--csv", str(run_dir / "summary.json")]) == 2
    assert contents(run_dir) == before


def test_table_and_curves_are_both_written_or_neither(run_dir, tmp_path, capsys):
    csv, plot = tmp_path / "x.csv", tmp_path / "x.doc"  # of a kind that cannot be drawn
    assert main([str(run_dir), "--csv", str(csv), "--plot", str(plot)]) == 2
    assert main([str(run_dir), "--csv", str(csv), "--plot", str(csv)]) == 2
    assert "--csv and --plot are one file" in capsys.readouterr().err and not csv.exists()


def test_a_new_name_in_a_run_s_folder_may_be_written_and_written_again(run_dir):
    for _ in range(2):
        assert main([str(run_dir), "--csv", str(run_dir / "table.csv")]) == 0
    assert (run_dir / "table.csv").read_text().startswith("run,")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "config_until_000003.yaml", "model/answers.jsonl"])
def test_results_answers_and_pages_are_never_written_over_a_file_of_a_run(run_dir, name):
    with pytest.raises(ConfigError, match="output = .*is the run's own"):
        writable_file(str(run_dir / name))
    with pytest.raises(ConfigError, match="output = .*is the run's own"):
        read_request(["run=elsewhere", "step=1", f"output={run_dir / name}"])


def test_a_name_that_runs_use_is_free_where_there_is_no_run(tmp_path):
    (tmp_path / "summary.json").write_text("{}")  # the result of an earlier evaluation
    for name in ("summary.json", "report.html", "model/answers.jsonl"):
        keep_run_files(tmp_path / name, "output = ")


def test_a_file_of_one_s_own_is_not_where_a_stopped_command_leaves_what_is_finished(tmp_path):
    part = tmp_path / "result.json.partial"
    part.write_text("mine")
    with pytest.raises(ConfigError, match="result.json.partial, where a stopped command .* move it away"):
        writable_file(str(tmp_path / "result.json"))
    part.write_text('{\n  "partial": "1 of 2 prompts"\n}')
    assert writable_file(str(tmp_path / "result.json")) == tmp_path / "result.json"


@pytest.fixture
def fill(monkeypatch):
    """`fill(*folders)`: the disk with these folders has room for two bytes of a file."""
    write = Path.write_bytes

    def fill(*folders):
        def write_bytes(path, data):
            if not any(path.is_relative_to(folder) for folder in folders):
                return write(path, data)
            write(path, data[:2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    return fill


def test_an_output_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, fill):
    (tmp_path / "x.svg").write_bytes(b"old")
    fill(tmp_path)
    with pytest.raises(OSError, match="No space"):
        write_output(tmp_path / "x.svg", b"new one")
    assert contents(tmp_path) == {tmp_path / "x.svg": b"old"}


@pytest.mark.parametrize("is_stopped", [True, False])
def test_what_a_full_disk_cannot_take_is_kept_elsewhere_and_the_old_file_stays(tmp_path, fill, monkeypatch, is_stopped):
    output, elsewhere = tmp_path / "full" / "answers.jsonl", tmp_path / "elsewhere"
    for folder in (output.parent, elsewhere):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    path, save = (output.with_name("answers.jsonl.partial"), keep_part) if is_stopped else (output, save_output)
    path.write_text("old")
    fill(output.parent)
    with pytest.raises(OSError) as caught:
        save(output, "new\ud800")
    kept, = (path for path in elsewhere.rglob("*") if path.is_file())
    assert str(caught.value) == (f"{path} cannot be written (No space left on device), and what is there stays; what is finished "
                                 f"is in {kept}: move it to {path} once that can be written")
    assert kept.read_text() == "new\\ud800" and contents(output.parent) == {path: b"old"}


def test_what_a_device_cannot_take_is_kept_but_not_to_be_moved_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match="^/dev/full cannot be written .No space left on device.; what is finished is in .*/full$"):
        save_output(Path("/dev/full"), "new")
    assert [path.read_text() for path in tmp_path.rglob("full")] == ["new"]
    assert keep_part(Path("/dev/full"), "new") == "; nothing is kept, since /dev/full is a pipe or a device"


def test_where_no_disk_has_room_the_message_says_that_what_is_finished_is_lost(tmp_path, fill, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fill(tmp_path)
    message = (f"{tmp_path}/x.json.partial cannot be written (No space left on device); nor can temporary files, so what this "
               "command has finished is lost: make room, and start it again")
    with pytest.raises(OSError, match=re.escape(message)):
        keep_part(tmp_path / "x.json", "new")
    assert not list(tmp_path.iterdir())


def test_a_name_too_long_for_what_is_kept_on_the_way_is_refused_at_the_start(tmp_path):
    assert writable_file(str(tmp_path / ("x" * 240))) and not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="cannot be written .File name too long"):
        writable_file(str(tmp_path / ("x" * 250)))
    assert not list(tmp_path.iterdir())
