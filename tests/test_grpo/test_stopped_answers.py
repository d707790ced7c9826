"""Answers to the prompts of a file, of a model without an environment: on another day the same command goes on."""
import datetime
import signal
from types import SimpleNamespace

import pytest
from paths import FIXTURES

from grpo.configuration.launch import load_config
from grpo.generate import run_generation

MODEL = ("+model=gpt_oss_20b", f"model.path={FIXTURES / 'tiny_mxfp4'}", f"model.tokenizer={FIXTURES / 'tokenizer_brief'}",
         "max_new_tokens=4", "max_batch=1")


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """`answer(day, *words)`: the exit code of a command on that day. stops: it gets a signal after the first answer."""
    (tmp_path / "asked.csv").write_text("question\n1+1\n2+2\n3+3\n")

    def answer(day, *words, stops=False, output="answers.jsonl"):
        with monkeypatch.context() as patch:
            today = datetime.date(2026, 12, day)
            patch.setattr("grpo.generate.datetime", SimpleNamespace(date=SimpleNamespace(today=lambda: today)))
            patch.setattr("grpo.generate.join_sampler", lambda *_: lambda finished, total: (
                stops and finished == 1 and signal.raise_signal(signal.SIGTERM)))
            return run_generation(load_config(
                "generate", [*MODEL, *words, f"prompts={tmp_path / 'asked.csv'}", f"output={tmp_path / output}"]))

    return answer


@pytest.mark.parametrize("given", [(), ("current_date=2026-12-01",)])
def test_the_same_command_goes_on_on_another_day_with_the_date_of_the_prompts_before(answer, tmp_path, capsys, given):
    assert answer(1, output="whole.jsonl") == 0
    assert answer(1, stops=True) == 75
    capsys.readouterr()
    assert answer(2, *given) == 0
    assert "1 of 3 rows were answered before" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert answer(2, output="other.jsonl") == 0
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "whole.jsonl").read_bytes()


def test_other_prompts_than_those_of_the_stopped_command_are_refused(answer, tmp_path, capsys):
    assert answer(1, stops=True) == 75
    kept = (tmp_path / "answers.jsonl.partial").read_text()
    for word in ("current_date=2026-12-02", "reasoning_effort=high", "instructions=brief"):
        assert answer(1, word) == 2
        assert "holds answers of a stopped command with other prompts" in capsys.readouterr().err
    (tmp_path / "asked.csv").write_text("question\n1+1\n2+3\n3+3\n")
    assert answer(1) == 2
    assert (tmp_path / "answers.jsonl.partial").read_text() == kept
