"""Answers to the prompts of a file, of a model without an environment: on another day the same command goes on."""
import datetime
import signal
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from paths import FIXTURES

from grpo.configuration.launch import load_config
from grpo.distributed.ranks import RankFault
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


def test_a_date_that_was_given_must_be_given_again(answer, capsys):
    assert answer(1, "current_date=2020-01-01", stops=True) == 75
    assert answer(1) == 2
    assert "other prompts, weights or settings (current_date is one)" in capsys.readouterr().err
    assert answer(2, "current_date=2020-01-01") == 0


def test_other_prompts_than_those_of_the_stopped_command_are_refused(answer, tmp_path, capsys):
    assert answer(1, stops=True) == 75
    kept = (tmp_path / "answers.jsonl.partial").read_text()
    for word in ("current_date=2026-12-02", "reasoning_effort=high", "instructions=brief"):
        assert answer(1, word) == 2
        assert "holds answers of a stopped command with other prompts" in capsys.readouterr().err
    (tmp_path / "asked.csv").write_text("question\n1+1\n2+3\n3+3\n")
    assert answer(1) == 2
    assert (tmp_path / "answers.jsonl.partial").read_text() == kept


class RankZero:
    """Rank 0 of two, of which the other has no prompts and fails in the exchange of the answers, with `error`."""
    rank, part, num_parts, num_ranks = 0, 0, 1, 2
    fault = RankFault("rank 1 was killed", reason="failed", code=1, rank=1, is_lost=True)

    def __init__(self, error: Exception | None = None, *, others: dict | None = None) -> None:
        """others: of an exchange, the value that the other rank has, where it is not rank 0's."""
        self.error, self.notes, self.others = error, [], {"the answers": []} if others is None else others

    def begin(self, config, device) -> None:
        pass

    def watch(self, stop):
        return stop

    def exchange(self, what, value):
        if what == "the answers" and self.error is not None:
            raise self.error
        return [value, self.others.get(what, value)]

    def settle(self, message, **_) -> RankFault:
        return self.fault

    def speaks(self) -> bool:
        return True

    def leave(self) -> None:
        pass


@pytest.mark.parametrize("error", [RankZero.fault, RuntimeError("Connection closed by peer")])
def test_rank_0_keeps_its_own_answers_however_another_rank_is_found_lost(answer, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr("grpo.evaluate.join", lambda *_, **__: RankZero(error))
    assert answer(1) == 1
    part = tmp_path / "answers.jsonl.partial"
    said = capsys.readouterr().err
    assert f"(rank 0 had 3 of 3 answers; what is finished is in {part}" in said and "error: rank 1 was killed" in said
    assert part.read_text().count("\n") == 4


def test_where_another_rank_is_lost_and_no_disk_has_room_one_learns_both(answer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("grpo.evaluate.join", lambda *_, **__: RankZero(RankZero.fault))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("grpo.record.outputs.new_file", Mock(side_effect=OSError(28, "No space left on device")))
    assert answer(1) == 1
    said = capsys.readouterr().err
    assert "answers.jsonl.partial cannot be written (No space left on device)" in said and "error: rank 1 was killed" in said


def test_where_another_rank_is_lost_after_its_answers_have_come_one_learns_where_all_are(answer, tmp_path, monkeypatch, capsys):
    """The signal stands for what rank 0 hears of the failure, by which it stops."""
    monkeypatch.setattr("grpo.evaluate.join", lambda *_, **__: RankZero())
    assert answer(1, stops=True) == 1
    said = capsys.readouterr().err
    assert f"what is finished is in {tmp_path / 'answers.jsonl.partial'}" in said and "error: rank 1 was killed" in said


def test_a_file_of_prompts_that_is_another_on_another_node_is_refused(answer, tmp_path, monkeypatch, capsys):
    ranks = RankZero(others={"the rows of a stopped command": ("another digest", [])})
    monkeypatch.setattr("grpo.evaluate.join", lambda *_, **__: ranks)
    monkeypatch.setattr(ranks, "settle", lambda message, *, code, **_: RankFault(
        message, reason="bad data", code=code, rank=0, is_lost=False))
    assert answer(1) == 3
    assert "rank 1 has other prompts than rank 0" in capsys.readouterr().err and not list(tmp_path.glob("answers*"))
