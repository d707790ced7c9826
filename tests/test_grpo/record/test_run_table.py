"""Tables of several runs against values worked out by hand."""

import csv
import io
import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from grpo.record import run_table
from grpo.record.run_table import RunTable, find_runs, mean_half_width, sweep_summary
from grpo.report import main


def write_run(folder: Path, config: dict, evals: dict[str, float], exit_reason: str = "finished") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    record = {name: {when: {"value": value, "step": 2} for when in ("first", "last", "best")} for name, value in evals.items()}
    summary = {"exit_reason": exit_reason, "steps": 2, "seconds": 0.0, "eval": record, "config": {"name": folder.name, **config}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_sweep(folder: Path) -> None:
    for index, (lr, seed, score) in enumerate(((1e-4, 0, 0.5), (1e-4, 1, 0.7), (3e-4, 0, 0.8), (3e-4, 1, 1.0))):
        config = {"seed": seed, "optim": {"lr": lr, "betas": [0.9, 0.99]}}
        write_run(folder / f"r{index}", config, {"eval/greedy": score, "eval/greedy/ci95": 0.25})
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "metrics.jsonl").write_text("")


def lines_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_runs_are_sorted_best_first_with_the_keys_that_differ_and_intervals(tmp_path):
    write_sweep(tmp_path)
    lines = lines_of(RunTable(find_runs(tmp_path)).text())
    assert lines[0] == ["run", "seed", "optim.lr", "exit_reason", "steps", "seconds", "eval/greedy"]
    assert [line[0] for line in lines[2:7]] == ["r3", "r2", "r1", "r0", "unfinished"]
    assert lines[2][1:] == ["1", "0.0003", "finished", "2", "0", "1 ± 0.25"]
    assert lines[6][3] == "no summary.json" and lines[6][6] == ""


def test_seeds_are_averaged_with_student_s_interval(tmp_path):
    write_sweep(tmp_path)
    text = RunTable(find_runs(tmp_path)).text()
    assert "Means over seeds" in text
    lines = lines_of(text.partition("Means over seeds")[2])
    assert lines[0] == ["optim.lr", "seeds", "eval/greedy"]
    # of 0.8 and 1.0: the standard deviation is 0.141421, / sqrt(2) * 12.706
    assert lines[2] == ["0.0003", "2", "0.9 ± 1.271"] and lines[3] == ["0.0001", "2", "0.6 ± 1.271"]


@pytest.mark.parametrize("values, expected", [
    ([1.0, 2.0, 3.0], 4.303 / 3**0.5),
    ([float(value) for value in range(11)], 2.2281 * 11**0.5 / 11**0.5),  # ten degrees of freedom; variance 11
    ([0.0, 1.0] * 15 + [0.5], 2.0423 * 0.5 / 31**0.5),  # thirty
])
def test_intervals_over_seeds_are_those_of_published_quantiles(values, expected):
    assert mean_half_width(values) == pytest.approx(expected, rel=2e-3)  # of the expansion at 10


def test_runs_of_different_kinds_show_few_columns_and_name_the_others(tmp_path):
    write_run(tmp_path / "a", {"env": {"digits": 2}, **{f"key{i}": 0 for i in range(7)}}, {"eval/greedy": 0.5})
    write_run(tmp_path / "b", {"env": {"path": "x"}, **{f"key{i}": 1 for i in range(7)}}, {"eval/greedy": 0.7})
    text = RunTable(find_runs(tmp_path)).text()
    assert lines_of(text)[0] == ["run", "key0", "key1", "key2", "key3", "key4", "exit_reason", "steps", "seconds", "eval/greedy"]
    assert "4 more keys differ: env.digits, key5, key6, env.path" in text


def test_columns_are_chosen_on_the_command_line_and_an_unknown_one_is_named(tmp_path, capsys):
    write_sweep(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([str(tmp_path), "--columns", "optim.lr"]) == 0
    assert lines_of(capsys.readouterr().out)[0] == ["run", "optim.lr"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before  # prints, writes nothing
    assert main([str(tmp_path), "--columns", "optim.lrr"]) == 2
    assert "optim.lrr: no such column; there are run, seed, optim.lr, exit_reason" in capsys.readouterr().err


def test_options_are_heeded_for_one_run_too_and_a_column_may_be_equal_in_all(tmp_path, capsys):
    write_run(tmp_path / "a", {"seed": 0, "optim": {"lr": 0.5}}, {"eval/greedy": 0.5})
    (tmp_path / "a/metrics.jsonl").touch()
    assert main([str(tmp_path / "a"), "--columns", "optim.lr", "--csv", str(tmp_path / "a.csv")]) == 0
    assert lines_of(capsys.readouterr().out)[:3:2] == [["run", "optim.lr"], ["a", "0.5"]]
    assert (tmp_path / "a.csv").read_text().startswith("run,exit_reason,")  # of the config what differs
    assert not (tmp_path / "a/report.html").exists()


@pytest.mark.parametrize("option, name, said", [
    ("--csv", "a", "is a folder"), ("--plot", "none/x.svg", "its folder is not there")])
def test_a_file_that_cannot_be_written_is_named_before_the_table_is_made(tmp_path, capsys, option, name, said):
    write_run(tmp_path / "a", {"seed": 0}, {"eval/greedy": 0.5})
    assert main([str(tmp_path), option, str(tmp_path / name)]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: {option} {tmp_path / name}: {said}; name a file in a folder that exists\n" and not shown.out


def test_everything_is_written_where_csv_says(tmp_path, capsys):
    write_sweep(tmp_path / "runs")
    assert main([str(tmp_path / "runs"), "--csv", str(tmp_path / "all.csv")]) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    assert [row["eval/greedy"] for row in rows] == ["1.0", "0.8", "0.7", "0.5", ""]
    assert rows[0]["eval/greedy/ci95"] == "0.25"


def test_a_sweep_leaves_its_table_as_text_and_as_csv(tmp_path):
    write_sweep(tmp_path)
    path = sweep_summary(tmp_path, [tmp_path / "r0", tmp_path / "r2"])
    assert [line[0] for line in lines_of(path.read_text())[2:]] == ["r2", "r0"]
    assert (tmp_path / "sweep_summary.csv").read_text().startswith("run,optim.lr,exit_reason,")


def write_variants(folder: Path) -> None:
    """Two settings of two seeds, whose base follows the seed: rewards 0.2 and 0.4, then 0.6 and 0.8."""
    for seed in (0, 1):
        for alpha in (8, 16):
            run = write_run(folder / f"a{alpha}-seed{seed}", {"seed": seed, "model": {"path": f"warm-{seed}", "alpha": alpha}},
                            {"eval/greedy": 0.1 * alpha / 8 + 0.5 * seed})
            lines = [{"step": step, "reward": 0.2 * (seed + 1) + 0.4 * (step - 1)} for step in (1, 2)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_key_that_follows_from_the_seed_does_not_keep_seeds_apart(tmp_path):
    write_variants(tmp_path)
    lines = lines_of(RunTable(find_runs(tmp_path)).text().partition("Means over seeds")[2])
    assert lines[0] == ["model.alpha", "seeds", "eval/greedy"]
    # 0.1 and 0.6: 12.706 * 0.353553 / sqrt(2)
    assert lines[2:] == [["16", "2", "0.45 ± 3.176"], ["8", "2", "0.35 ± 3.176"]]


def test_curves_are_means_over_seeds_in_a_band(tmp_path, monkeypatch, capsys):
    write_variants(tmp_path)
    drawn, bands = [], []
    plot, fill_between = Axes.plot, Axes.fill_between
    monkeypatch.setattr(Axes, "plot", lambda axes, *values, **style: [drawn.append((style["label"], *values)),
                                                                      plot(axes, *values, **style)][1])
    monkeypatch.setattr(Axes, "fill_between", lambda axes, *values, **style: [bands.append(values),
                                                                              fill_between(axes, *values, **style)][1])
    assert main([str(tmp_path), "--plot", str(tmp_path / "curves.svg")]) == 0
    assert (tmp_path / "curves.svg").read_bytes().startswith(b"<?xml")
    assert drawn[0] == ("16", [1, 2], pytest.approx([0.3, 0.7])) and drawn[1][0] == "8"  # the panel of the reward
    assert bands[0] == ([1, 2], pytest.approx([0.2, 0.6]), pytest.approx([0.4, 0.8]))
    assert main([str(tmp_path), "--plot", str(tmp_path / "curves.doc")]) == 2
    assert "'doc' is not supported" in capsys.readouterr().err


def test_runs_that_did_not_finish_are_not_drawn(tmp_path, capsys):
    write_run(tmp_path / "a", {"seed": 0}, {"eval/greedy": 0.5}, "interrupted")
    assert main([str(tmp_path), str(tmp_path), "--plot", str(tmp_path / "x.svg")]) == 2
    assert "draws finished runs" in capsys.readouterr().err


def test_variants_that_differ_in_more_keys_than_are_shown_go_by_what_their_names_have_of_their_own(tmp_path, monkeypatch):
    for index, name in enumerate("dapo gspo rloo cispo sapo gmpo opo".split()):
        for seed in (0, 1):
            keys = {key: index for key in "abcdef"}
            write_run(tmp_path / f"losses-{name}-seed{seed}", {"seed": seed, **keys}, {"eval/greedy": 0.1 * index + 0.2 * seed})
    table = RunTable(find_runs(tmp_path))
    lines = lines_of(table.text().partition("Means over seeds")[2])
    assert lines[0] == ["runs", "seeds", "eval/greedy"]
    assert [line[0] for line in lines[2:]] == ["opo", "gmpo", "sapo", "cispo", "rloo", "gspo", "dapo"]
    # of 0.6 and 0.8: the standard deviation is 0.141421, / sqrt(2) * 12.706
    assert lines[2][2] == "0.7 ± 1.271"
    drawn, errorbar = [], Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda axes, *values, **style: [drawn.append((values[0], style["xerr"])),
                                                                          errorbar(axes, *values, **style)][1])
    assert b"gmpo" in table.plot("svg")
    assert drawn[-1] == (pytest.approx(0.7), pytest.approx(1.2706)) and len(drawn) == 7


@pytest.mark.parametrize("name, labels", [("losses-{}-s{}", ["cispo", "bnpo", "dapo"]),
                                          ("run{}{}", ["runcispo0", "runbnpo0", "rundapo0"])])
def test_variants_that_only_a_key_of_their_own_tells_apart_go_by_their_names(tmp_path, monkeypatch, name, labels):
    ppo = [("dapo", {"_target_": "ppo", "clip_high": 0.28}), ("bnpo", {"_target_": "ppo", "clip_high": 0.2})]
    for index, (loss, keys) in enumerate([*ppo, ("cispo", {"_target_": "cispo", "max_ratio": 5.0})]):
        for seed in (0, 1):
            score = 0.1 * index + 0.01 * seed
            write_run(tmp_path / name.format(loss, seed), {"seed": seed, "loss": keys}, {"eval/greedy": score})
    table, drawn = RunTable(find_runs(tmp_path)), []
    lines = lines_of(table.text().partition("Means over seeds")[2])
    assert [line[:2] for line in lines] == [["runs", "seeds"], lines[1][:2], *([label, "2"] for label in labels)]
    monkeypatch.setattr(run_table, "comparison", lambda curves, *_, **__: drawn.extend(curves) or b"")
    table.plot("svg")
    assert drawn == labels  # and none stands for two
