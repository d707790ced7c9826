"""The summary and the report page, against values worked out by hand."""

import base64
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_run import make_metrics

from grpo.record.plots import plots
from grpo.record.summary import before_after_samples, question_of, read_metrics, summarize
from grpo.report import main, rebuild_report

HOSTILE = "<script>alert('x')</script> </pre> & \"quoted\""
# Every greedy value, with its best in the middle; the loss falls; a value is missing at one step.
LINES = [
    {"step": 0, "warmup/step": 1, "warmup/loss": 2.0},
    {"step": 0, "warmup/step": 2, "warmup/loss": 1.0},
    {"step": 0, "eval/greedy": 0.25, "eval/loss": 3.0},
    {"step": 1, "reward": 0.5, "num_tokens": 100, "memory/peak_gb": 1.5, "time/total": 4.0, "entropy": 0.5},
    {"step": 2, "reward": 0.75, "num_tokens": 150, "memory/peak_gb": 2.5, "time/total": 9.0, "kl": None},
    {"step": 2, "eval/greedy": 0.875, "eval/loss": 1.0},
    {"step": 3, "reward": 0.625, "num_tokens": 175, "memory/peak_gb": 2.0, "time/total": 12.5},
    {"step": 3, "eval/greedy": 0.5, "eval/loss": None},
]


def write_run(folder: Path, lines: list[dict] = LINES, completions: list[dict] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if completions is not None:
        (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions))
    return folder


def summary_of(folder: Path, **changes) -> dict:
    arguments = {"run_name": "r", "exit_reason": "finished", "total_steps": 3} | changes
    return summarize(folder, **arguments)


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.text, self.images = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_summary_has_first_last_and_best_of_every_eval_metric(tmp_path):
    summary = summary_of(write_run(tmp_path))
    assert summary["eval"]["eval/greedy"] == {
        "first": {"value": 0.25, "step": 0},
        "last": {"value": 0.5, "step": 3},
        "best": {"value": 0.875, "step": 2},
    }
    assert summary["eval"]["eval/loss"]["best"] == {"value": 1.0, "step": 2}  # lower is better, and NaN never is
    assert summary["eval"]["eval/loss"]["last"] == {"value": None, "step": 3}


def test_summary_adds_up_steps_tokens_seconds_and_peak_memory(tmp_path):
    summary = summary_of(write_run(tmp_path))
    assert (summary["steps"], summary["num_tokens"], summary["seconds"]) == (3, 175, 12.5)
    assert summary["peak_memory_gb"] == 2.5 and summary["exit_reason"] == "finished"
    assert summary["train"]["reward"]["best"] == {"value": 0.75, "step": 2}


def test_the_earliest_of_equal_bests_is_named(tmp_path):
    run = write_run(tmp_path, [{"step": step, "eval/greedy": value} for step, value in ((0, 0.5), (5, 1.0), (10, 1.0))])
    assert summary_of(run)["eval"]["eval/greedy"]["best"] == {"value": 1.0, "step": 5}


def test_a_run_without_any_line_has_a_summary_and_a_report(tmp_path):
    metrics = make_metrics(tmp_path)
    summary = metrics.finish("out of memory")
    assert (summary["steps"], summary["eval"], summary["peak_memory_gb"]) == (0, {}, None)
    assert "out of memory" in Page((tmp_path / "report.html").read_text()).text
    assert metrics.finish("finished")["exit_reason"] == "out of memory"
    assert json.loads((tmp_path / "summary.json").read_text())["exit_reason"] == "out of memory"


def test_a_report_that_fails_is_a_warning_and_the_summary_stays(tmp_path, capsys):
    metrics = make_metrics(tmp_path)
    metrics.log(1, {"reward": 1.0})
    (tmp_path / "report.html.tmp").mkdir()
    metrics.finish("finished")
    assert f"rebuild it with: python -m grpo.report {tmp_path}" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 1


def test_texts_of_the_run_are_escaped_in_the_report(tmp_path):
    completions = [
        {"step": step, "prompt": f"p {HOSTILE}", "completion": f"{step} {HOSTILE}", "reward": step} for step in (0, 3)
    ]
    write_run(tmp_path, completions=completions)
    (tmp_path / "summary.json").write_text(
        json.dumps({**summary_of(tmp_path, run_name=HOSTILE, exit_reason=HOSTILE), "config": {"k": HOSTILE}})
    )
    text = rebuild_report(tmp_path).read_text()
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert page.text.count("alert('x')") == 8  # title, heading, exit reason, question, prompt, two completions, config
    assert "0 " + HOSTILE in page.text and "3 " + HOSTILE in page.text


def test_the_report_is_one_file_with_its_plots_inside(tmp_path):
    page = Page(rebuild_report(write_run(tmp_path)).read_text())
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    images = [base64.b64decode(source.split(",")[1]) for source in page.images]
    assert len(images) == 5  # reward, eval, entropy, kl, warm-up
    assert all(image.startswith(b"\x89PNG\r\n") and image.endswith(b"IEND\xaeB`\x82") for image in images)
    assert not re.search(r"(src|href)=[\"']?(http|//)", (tmp_path / "report.html").read_text())
    assert "0.25 → 0.5" in page.text


def test_every_promised_plot_is_drawn_when_its_metrics_are_logged():
    values = {
        **dict.fromkeys(("reward", "reward_std", "entropy", "kl", "grad_norm", "lr", "tokens_per_s"), 0.5),
        **dict.fromkeys(("completions/mean_length", "completions/min_length", "completions/max_length"), 8),
        **dict.fromkeys(("completions/clipped_ratio", "clip_ratio/low", "clip_ratio/high"), 0.0),
        **dict.fromkeys(("time/rollout", "time/reward", "time/update", "time/step"), 0.25),
    }
    drawn = plots([{"step": 1, **values}, {"step": 1, "eval/greedy": 0.5}, {"step": 2, **values, "kl": math.nan}])
    assert {"reward", "eval", "entropy", "kl", "lengths", "time", "grad_norm", "clip"} <= set(drawn)
    assert "kl" not in plots([{"step": 1, "reward": 0.5}])


def test_dollar_signs_in_a_metrics_name_are_no_formula():
    rows = [{"step": step, "reward": 0.5, "eval/$\\frac{$": 0.5, "eval/cost_$_of_$": 0.25} for step in range(3)]
    assert plots(rows)["eval"][0].startswith(b"\x89PNG")


def test_a_killed_run_gets_a_report_from_its_metrics(tmp_path):
    run = write_run(tmp_path / "killed")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "reward": 0.9')
    text = Page(rebuild_report(run).read_text()).text
    assert "killed" in text and "3 of 3" in text and "unknown (still running, or killed)" in text


# Lines that are no records of a run, in either file.
FOREIGN = [b"# a note\n", b"\n", b"   \n", b"{}\n", b'{"reward": 5.0}\n', b'{"step": \n', b"\xff\xfe not utf-8\n", b"[1, 2]\n",
           b"7\n", b'"text"\n', b"null\n", b'{"step": "3", "reward": 5}\n', b'{"step": null}\n',
           b'{"step": true}\n', b'{"step": 2.5}\n',
           b'{"step": -4}\n', b'{"step": 1' + b"0" * 5000 + b"}\n", b"[" * 100_000 + b"\n", b"a\rb\r\n",
           b'{"step": 3, "reward": "high"} {"step": 4}\n']


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    own = [b'{"step": 1, "reward": 0.25}\n', b'{"step": 2, "reward": null, "text": "x", "list": [1], "yes": true}\n']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*FOREIGN, own[0], *FOREIGN, own[1], *FOREIGN, b'{"step": 3, "rew']))
    first, second = read_metrics(tmp_path)
    assert first == {"step": 1, "reward": 0.25}
    assert second.keys() == {"step", "reward"} and math.isnan(second["reward"])


def test_a_report_is_made_of_files_with_foreign_lines(tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "completions.jsonl"):
        path = run / name
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        path.write_bytes(b"".join(foreign + line for foreign, line in itertools.zip_longest(FOREIGN, lines, fillvalue=b"")))
    with (run / "completions.jsonl").open("a") as file:
        file.write('{"step": 3, "prompt": 7, "completion": null}\n{"step": 3, "prompt": "p", "completion": "c", "reward": "x"}\n')
    text = Page(rebuild_report(run).read_text()).text
    assert "3 of 3" in text


def test_samples_pair_the_same_held_out_prompt_before_and_after(tmp_path):
    def row(step, split, prompt, completion, reward):
        return {"step": step, "split": split, "prompt": prompt, "completion": completion, "reward": reward}

    completions = [
        row(0, "eval", "same", "s0", 1.0),
        row(0, "eval", "better", "b0", 0.0),
        row(1, "train", "better", "not held out", 0.5),
        row(5, "eval", "better", "b5", 0.5),
        row(9, "eval", "same", "s9", 1.0),
        row(9, "eval", "better", "b9", 1.0),
        row(9, "train", "other", "o9", 1.0),
    ]
    samples = before_after_samples(write_run(tmp_path, completions=completions), limit=5)
    assert [sample["prompt"] for sample in samples] == ["better", "same"]
    assert samples[0]["before"] == {"step": 0, "completion": "b0", "reward": 0.0}
    assert samples[0]["after"] == {"step": 9, "completion": "b9", "reward": 1.0}


def test_a_sample_shows_its_turns_and_calls(tmp_path):
    made = [{"name": "functions.f", "arguments": HOSTILE, "result": "7", "failed": False},
            {"name": "g", "arguments": "{}", "result": "no tool", "failed": True}]
    row = {"split": "eval", "prompt": "p", "completion": "c", "reward": 1.0}
    lines = [*LINES, {"step": 3, "turns/mean": 1.5, "calls/mean": 0.5, "time/tools": 9.0, "time/step": 1.0}]
    run = write_run(tmp_path, lines=lines, completions=[
        {"step": 0, **row, "turns": 1, "calls": []}, {"step": 9, **row, "turns": 3, "calls": made}])
    page = Page(rebuild_report(run).read_text())
    assert "1 turn, 0 calls" in page.text and "3 turns, 2 calls" in page.text
    assert f"functions.f {HOSTILE} = 7" in page.text and "g {} failed: no tool" in page.text
    drawn = plots(read_metrics(run))
    assert "turns" in drawn and "time" not in drawn  # seconds of tools that run side by side are no part of a step's


def test_suspects_stand_in_the_report_with_their_reasons_the_newest_first(tmp_path):
    row = {"split": "train", "prompt": "<|start|>user<|message|>q<|end|>", "completion": "c", "reward": 0.5}
    run = write_run(tmp_path, completions=[
        {"step": step, **row, **({"suspicion": f"reason {step} {HOSTILE}"} if step != 5 else {})} for step in range(1, 11)])
    text = Page(rebuild_report(run).read_text()).text
    assert "9 are logged, the newest 8 are:" in text and "reason 1 " not in text
    assert text.index(f"reason 10 {HOSTILE}; train, step 10: reward 0.5") < text.index("reason 2 ") and "reason 5" not in text
    assert "0 are logged." in Page(rebuild_report(write_run(tmp_path, completions=[])).read_text()).text


def test_violations_are_drawn_by_kind_where_there_were_any():
    rows = [{"step": step, "sandbox/violations/time": 0.25 * step, "sandbox/violations/call": 0.0} for step in range(3)]
    assert "violations" in plots(rows) and "violations" not in plots(rows[:1])


def test_the_command_line_rebuilds_the_report_of_a_run(tmp_path, capsys):
    write_run(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists() and capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


def test_the_question_of_a_prompt_is_its_last_user_message():
    user = "<|start|>user<|message|>"
    assert question_of(f"<|start|>system<|message|>You are<|end|>{user}one<|end|><|start|>assistant<|channel|>final"
                       f"<|message|>1<|end|>{user}two\nlines<|end|><|start|>assistant") == "two\nlines"
    assert question_of("no messages") == "no messages"


def test_the_command_line_refuses_a_folder_without_runs_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} holds no run: neither summary.json nor metrics.jsonl below it\n"
    )


def test_an_option_with_two_values_is_refused_with_both(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--csv", "a.csv", "--columns", "reward", "--csv=b.csv"])
    assert "error: --csv is given twice, a.csv and b.csv: leave one out" in capsys.readouterr().err
