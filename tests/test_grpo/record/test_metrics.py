"""metrics.jsonl and completions.jsonl: what a run writes, what a resume keeps."""

import json
import math
import random
from pathlib import Path

import pytest
from made_up_run import make_metrics

from grpo.record.jsonl import JsonlFile
from grpo.record.metrics import Metrics
from grpo.record.summary import before_after_samples, read_metrics


def run_steps(metrics: Metrics, first: int, last: int) -> None:
    """A made-up run: every value depends on the step alone, as in a run that resumes exactly."""
    if first == 1:
        metrics.log_warmup(1, {"loss": 2.0}, num_steps=2, prints_line=True)
        metrics.log_warmup(2, {"loss": 1.5}, num_steps=2, prints_line=True)
        metrics.log_eval(0, {"greedy": 0.25})
    for step in range(first, last + 1):
        metrics.log(step, {"reward": 1 / step, "time/step": random.random(), "num_tokens": 10 * step})
        if step % 2 == 0:
            metrics.log_eval(step, {"greedy": step / 6, "time/eval": random.random()})
            metrics.log_completions(step, [{"prompt": "p\n", "completion": f"é \ud800 {step}", "reward": math.nan}] * 2)


def untimed(run_dir: Path) -> bytes:
    """Both files of a run without the values that differ between runs."""
    lines = []
    for row in map(json.loads, (run_dir / "metrics.jsonl").read_bytes().splitlines()):
        kept = {name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))}
        lines.append(json.dumps({name: value for name, value in kept.items() if not name.endswith("_per_s")}))
    return "\n".join(lines).encode() + (run_dir / "completions.jsonl").read_bytes()


def strict_json(line: str) -> dict:
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_line_holds_the_step_first_and_the_values_exactly(tmp_path):
    metrics = make_metrics(tmp_path)
    metrics.log(3, {"reward": 0.1, "num_tokens": 7})
    row = strict_json((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert list(row)[0] == "step" and row["step"] == 3 and row["reward"] == 0.1 and row["num_tokens"] == 7


def test_non_finite_numbers_become_null_and_are_read_back_as_nan(tmp_path):
    metrics = make_metrics(tmp_path)
    metrics.log(1, {"kl": math.nan, "grad_norm": math.inf, "loss": -math.inf, "reward": 1.0})
    metrics.log_completions(1, [{"prompt": "a", "completion": "b", "reward": math.nan, "parts": {"x": math.inf}}])
    row = strict_json((tmp_path / "metrics.jsonl").read_text())
    assert (row["kl"], row["grad_norm"], row["loss"], row["reward"]) == (None, None, None, 1.0)
    assert math.isnan(read_metrics(tmp_path)[0]["grad_norm"])
    completion = strict_json((tmp_path / "completions.jsonl").read_text())
    assert completion == {"step": 1, "prompt": "a", "completion": "b", "reward": None, "parts": {"x": None}}


def test_numbers_of_torch_are_taken_and_texts_refused_by_name(tmp_path):
    import torch

    metrics = make_metrics(tmp_path)
    metrics.log(1, {"loss": torch.tensor(0.5), "num_tokens": torch.tensor([3])})
    assert read_metrics(tmp_path)[0]["loss"] == 0.5 and read_metrics(tmp_path)[0]["num_tokens"] == 3
    with pytest.raises(ValueError, match="'kl'.*str"):
        metrics.log(1, {"kl": "small"})


def test_lone_surrogates_in_completions_survive(tmp_path):
    make_metrics(tmp_path).log_completions(2, [{"prompt": "ü", "completion": "\ud83d x"}])
    row = strict_json((tmp_path / "completions.jsonl").read_text(encoding="utf-8"))
    assert row == {"step": 2, "prompt": "ü", "completion": "\ud83d x"}


def test_a_run_killed_at_any_byte_and_resumed_equals_one_never_stopped(tmp_path):
    whole = tmp_path / "whole"
    run_steps(make_metrics(whole), 1, 6)
    expected = untimed(whole)
    contents = {name: (whole / name).read_bytes() for name in ("metrics.jsonl", "completions.jsonl")}
    rng = random.Random(0)
    for trial in range(30):
        checkpoint = rng.choice([2, 4, 5])
        killed = tmp_path / f"killed_{trial}"
        killed.mkdir()
        for name, data in contents.items():
            kept = sum(len(x) + 1 for x in data.splitlines() if json.loads(x)["step"] <= checkpoint)
            (killed / name).write_bytes(data[: rng.randint(kept, len(data))])
        metrics = make_metrics(killed, resumed_after=checkpoint)
        run_steps(metrics, checkpoint + 1, 6)
        assert untimed(killed) == expected, f"trial {trial}, checkpoint of step {checkpoint}"


def test_truncation_before_the_first_step_empties_both_files(tmp_path):
    metrics = make_metrics(tmp_path)
    run_steps(metrics, 1, 2)
    metrics.truncate_after(-1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"" == (tmp_path / "completions.jsonl").read_bytes()
    metrics.log_eval(0, {"greedy": 0.5})
    assert [row["eval/greedy"] for row in read_metrics(tmp_path)] == [0.5]


def test_a_line_cut_short_does_not_swallow_the_next_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    make_metrics(tmp_path).log(2, {"reward": 0.75})
    assert [(row["step"], row["reward"]) for row in read_metrics(tmp_path)] == [(1, 0.5), (2, 0.75)]


def test_truncation_leaves_whole_lines_only(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.5}')
    make_metrics(tmp_path).truncate_after(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "reward": 0.5}\n'


FOREIGN = [b"# a note\n", b"\n", b'{"reward": 1}\n', b'{"step": 2, "rew\n', b"\xff\xfe\n", b"[4]\n", b"a\rb\n"]


def test_what_a_resume_takes_out_is_kept_beside_and_lines_of_others_stay_where_they_are(tmp_path):
    records = [json.dumps({"step": step, "reward": step / 4}).encode() + b"\n" for step in (1, 2, 3, 4)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([*FOREIGN, *records[:2], *FOREIGN, records[2], *FOREIGN, records[3], b'{"step": 5']))
    make_metrics(tmp_path, resumed_after=2)
    assert path.read_bytes() == b"".join([*FOREIGN, *records[:2], *FOREIGN, *FOREIGN])
    assert (tmp_path / "metrics.jsonl.cut-1").read_bytes() == b"".join([*records[2:], b'{"step": 5'])
    metrics = make_metrics(tmp_path, resumed_after=2)  # nothing to take out
    metrics.log(3, {"reward": 0.5})
    make_metrics(tmp_path, resumed_after=1)
    assert (tmp_path / "metrics.jsonl.cut-2").read_bytes().startswith(records[1] + b'{"step": 3')
    assert sorted(path.name for path in tmp_path.glob("metrics.jsonl*")) == [
        *("metrics.jsonl", "metrics.jsonl.cut-1", "metrics.jsonl.cut-2")]


def test_a_line_added_during_a_run_swallows_no_line_of_it_and_ends_nothing(tmp_path):
    metrics = make_metrics(tmp_path)
    metrics.log(1, {"reward": 0.25})
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b"".join(FOREIGN) + b"# no newline")
    metrics.log(2, {"reward": 0.5})
    metrics.log_completions(2, [{"prompt": "p", "completion": "c", "reward": 0.5}])
    assert metrics.finish("finished")["steps"] == 2
    assert [row["reward"] for row in read_metrics(tmp_path)] == [0.25, 0.5]
    assert before_after_samples(tmp_path, limit=1)[0]["after"]["completion"] == "c"
    assert b"# no newline\n" in (tmp_path / "metrics.jsonl").read_bytes()


def test_a_file_that_an_editor_replaced_or_somebody_deleted_gets_the_lines_that_follow(tmp_path):
    metrics, path = make_metrics(tmp_path), tmp_path / "metrics.jsonl"
    metrics.log(1, {"reward": 0.25})
    (tmp_path / "copy").write_bytes(path.read_bytes() + b"# edited\n")
    (tmp_path / "copy").replace(path)
    metrics.log(2, {"reward": 0.5})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    path.unlink()
    metrics.log(3, {"reward": 0.75})
    assert [row["step"] for row in read_metrics(tmp_path)] == [3]


def test_files_that_end_before_the_checkpoint_are_reported(tmp_path, capsys):
    run_steps(make_metrics(tmp_path), 1, 2)
    make_metrics(tmp_path, resumed_after=5)
    assert "ends at step 2 but the checkpoint is of step 5" in capsys.readouterr().out


def test_an_evaluation_repeated_after_a_resume_is_recorded_once(tmp_path):
    run_steps(make_metrics(tmp_path), 1, 6)
    metrics = make_metrics(tmp_path, resumed_after=6)
    assert metrics.has_eval(6) and not metrics.has_eval(5)
    metrics.log_eval(6, {"greedy": 1.0, "time/eval": 3.0})
    metrics.log_eval(6, {"greedy": 1.0, "pass@4": 0.5})
    last = [row for row in read_metrics(tmp_path) if row["step"] == 6 and "reward" not in row]
    assert last[0].pop("time/eval") < 1  # of the first evaluation
    assert last == [{"step": 6, "eval/greedy": 1.0}, {"step": 6, "eval/pass@4": 0.5}]


def test_wall_time_goes_on_across_sessions(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "time/total": 1000.0}\n')
    metrics = make_metrics(tmp_path, resumed_after=1)
    metrics.log(2, {"reward": 0.5})
    assert 1000.0 <= read_metrics(tmp_path)[1]["time/total"] < 1100.0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file_and_what_to_do(tmp_path):
    with pytest.raises(OSError, match="resume=true") as caught:
        JsonlFile(Path("/dev/full")).append([{"step": 1}])
    assert caught.value.filename == "/dev/full"
