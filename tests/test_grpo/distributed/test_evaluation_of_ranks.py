"""Evaluations of 2 and 4 ranks on the CPU, by gloo: the same result, written once, and one message where a rank fails."""

import json
import re

import pytest
from paths import FIXTURES
from started_ranks import at_call, run_ranks

EVALUATION = ("+model=tiny", "+env=carry", "env._target_=spread.Spread", "max_prompts=5", "num_samples=2", "max_new_tokens=6",
              "distributed.timeout=60")


@pytest.fixture
def evaluate(entry_points, modules):
    def run(num_ranks, *arguments, **options):
        return run_ranks(entry_points, "grpo.evaluate", num_ranks, *EVALUATION, *arguments, path=(modules,), **options)

    return run


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_write_and_print_what_one_process_does(evaluate, entry_points, modules, tmp_path, num_ranks):
    alone = entry_points.run("grpo.evaluate", *EVALUATION, f"output={tmp_path / 'alone.json'}", path=(modules,))
    assert alone.code == 0, alone.err
    expected = (tmp_path / "alone.json").read_bytes()
    assert len({value for name, value in json.loads(expected).items() if "reward" in name or "@" in name}) > 3
    output = tmp_path / "shared.json"
    ended = evaluate(num_ranks, f"output={output}")
    assert ended.codes == [0] * num_ranks, ended.errors
    assert output.read_bytes() == expected
    assert ended.out == [alone.out] + [""] * (num_ranks - 1)


@pytest.mark.parametrize("action, code, message", [
    ("raise KeyError('no such answer')", 4, r"error: rank 1 \(.*\): environment Spread.score raised KeyError"),
    ("os.kill(os.getpid(), signal.SIGKILL)", -9, r"error: rank 1 \(.*\) ended without a word: it was killed")])
def test_a_rank_that_fails_ends_all_with_one_message_and_no_result(evaluate, tmp_path, action, code, message):
    ended = evaluate(2, f"output={tmp_path / 'result.json'}", before={1: at_call("spread.judge", 1, action)})
    assert ended.codes == [max(code, 1), code]
    assert re.match(message, ended.message)
    assert not (tmp_path / "result.json").exists() and ended.out == ["", ""]


def test_an_output_that_only_rank_0_cannot_write_ends_all(evaluate, tmp_path):
    ended = evaluate(2, own={0: (f"output={tmp_path / 'missing' / 'result.json'}",), 1: (f"output={tmp_path / 'result.json'}",)})
    assert ended.codes == [2, 2]
    assert "rank 0" in ended.message and "cannot be written" in ended.message


def test_answers_to_the_prompts_of_a_file_are_those_of_one_process(entry_points, tmp_path):
    (tmp_path / "asked.csv").write_text("question\n1+2\n30+41\n5+5\n")
    words = ("+model=gpt_oss_20b", f"model.path={FIXTURES / 'tiny_mxfp4'}", f"model.tokenizer={FIXTURES / 'tokenizer_brief'}",
             f"prompts={tmp_path / 'asked.csv'}", "max_new_tokens=6", "num_samples=2", "distributed.timeout=60")
    alone = entry_points.run("grpo.generate", *words, f"output={tmp_path / 'alone.jsonl'}")
    assert alone.code == 0, alone.err
    ended = run_ranks(entry_points, "grpo.generate", 2, *words, f"output={tmp_path / 'shared.jsonl'}")
    assert ended.codes == [0, 0], ended.errors
    assert (tmp_path / "shared.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert len((tmp_path / "alone.jsonl").read_text().splitlines()) == 6 and ended.out == ["", ""]


@pytest.mark.parametrize("program, words", [
    ("generate", ("+model=tiny", "model.tokenizer=a/b", "prompt=1+2")), ("explain", ("run=x", "step=1"))])
def test_what_one_process_does_is_refused_by_several(entry_points, program, words):
    ended = run_ranks(entry_points, f"grpo.{program}", 2, *words)
    assert ended.codes == [2, 2]
    assert all("is the work of one process, and 2 were started" in text for text in ended.errors)
