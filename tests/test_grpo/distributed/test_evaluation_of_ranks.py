"""Evaluations of 2 and 4 ranks on the CPU, by gloo: the same result, written once, and one message where a rank fails."""

import json
import re

import pytest
from paths import FIXTURES
from started_ranks import at_call, run_ranks

EVALUATION = ("+model=tiny", "+env=carry", "env._target_=spread.Spread", "max_prompts=5", "num_samples=2", "max_new_tokens=6",
              "distributed.timeout=60")
ANSWERS = ("+model=gpt_oss_20b", f"model.path={FIXTURES / 'tiny_mxfp4'}", f"model.tokenizer={FIXTURES / 'tokenizer_brief'}",
           "max_new_tokens=6", "num_samples=2", "distributed.timeout=60")
STOP = "os.kill(os.getpid(), signal.SIGTERM)"


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
    words = (*ANSWERS, f"prompts={tmp_path / 'asked.csv'}")
    alone = entry_points.run("grpo.generate", *words, f"output={tmp_path / 'alone.jsonl'}")
    assert alone.code == 0, alone.err
    ended = run_ranks(entry_points, "grpo.generate", 2, *words, f"output={tmp_path / 'shared.jsonl'}")
    assert ended.codes == [0, 0], ended.errors
    assert (tmp_path / "shared.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert len((tmp_path / "alone.jsonl").read_text().splitlines()) == 6 and ended.out == ["", ""]


def stop_at(folder, calls: tuple[int, int], *, stopped: tuple[int, ...], how: str = STOP) -> dict[int, str]:
    """What two ranks run first: each waits at a model call of its own until the other is at its; then `stopped` get a signal, by
    the code `how`."""
    def action(rank):
        own, other = str(folder / f"at_{rank}"), str(folder / f"at_{1 - rank}")
        meet = f"open({own!r}, 'w').close(); any(os.path.exists({other!r}) or time.sleep(0.01) for _ in iter(int, 1))"
        return f"{meet}; {how}" if rank in stopped else meet

    patience = "ranks.GRACE_SECONDS = 60.0\n"  # a busy machine may be slower than others want to wait
    return {rank: patience + at_call("grpo.rollout.session.Session.poll", calls[rank], action(rank)) for rank in range(2)}


@pytest.mark.parametrize("stopped, name", [((0, 1), "SIGTERM"), ((1,), "a signal to another rank")])  # torchrun sends it to all
def test_answers_that_are_finished_when_a_signal_comes_are_kept_and_one_process_goes_on(entry_points, tmp_path, stopped, name):
    (tmp_path / "asked.csv").write_text("question\n" + "".join(f"{number}+2\n" for number in range(10)))
    whole, output, part = (tmp_path / name for name in ("whole.jsonl", "answers.jsonl", "answers.jsonl.partial"))
    words = (*ANSWERS, f"prompts={tmp_path / 'asked.csv'}")
    assert entry_points.run("grpo.generate", *words, f"output={whole}").code == 0
    lines = whole.read_text().splitlines()

    # a prompt takes six calls: rank 0 has finished two of its five, and rank 1 three
    ended = run_ranks(entry_points, "grpo.generate", 2, *words, f"output={output}",
                      before=stop_at(tmp_path, (14, 20), stopped=stopped))
    assert ended.codes == [75, 75], ended.errors
    head, *kept = part.read_text().splitlines()
    assert json.loads(head)["partial"] == f"{len(kept)} of 20 answers" and not output.exists()
    assert ended.message.startswith(f"stopped: {name}: {len(kept)} of 20 answers were finished") and str(part) in ended.message
    assert kept == [line for line in lines if line in kept]
    assert {json.loads(line)["row"] for line in kept} >= {0, 2, 1, 3, 5}

    again = entry_points.run("grpo.generate", *words, f"output={output}")
    assert again.code == 0 and "of 10 rows were answered before" in again.err
    assert output.read_bytes() == whole.read_bytes() and not part.exists()


def test_rank_0_keeps_its_own_answers_where_another_rank_is_lost(entry_points, tmp_path):
    (tmp_path / "asked.csv").write_text("question\n" + "".join(f"{number}+2\n" for number in range(6)))
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    words = (*ANSWERS, f"prompts={tmp_path / 'asked.csv'}", f"output={output}")
    before = stop_at(tmp_path, (10, 3), stopped=(1,), how=STOP.replace("TERM", "KILL"))
    ended = run_ranks(entry_points, "grpo.generate", 2, *words, before=before)
    assert ended.codes == [1, -9] and "rank 1" in ended.message and "was killed" in ended.message
    head, *kept = part.read_text().splitlines()
    assert f"(rank 0 had {len(kept)} of 12 answers; what is finished is in {part}" in ended.errors[0]
    assert {json.loads(line)["row"] for line in kept} in ({0}, {0, 2}, {0, 2, 4}) and not output.exists()
    again = entry_points.run("grpo.generate", *words)
    assert again.code == 0 and "of 6 rows were answered before" in again.err and output.read_text().count("\n") == 12


@pytest.mark.parametrize("calls, num_whole, found", [
    ((10, 3), 0, {"greedy_accuracy"}), ((20, 20), 1, {"greedy_accuracy", "avg@2"})])
def test_results_of_prompts_that_are_finished_when_a_signal_comes_are_kept(evaluate, tmp_path, calls, num_whole, found):
    output, part = tmp_path / "result.json", tmp_path / "result.json.partial"
    # six calls for each of rank 0's three prompts and rank 1's two: the first time rank 1 has finished none
    ended = evaluate(2, f"output={output}", before=stop_at(tmp_path, calls, stopped=(1,)))
    assert ended.codes == [75, 75], ended.errors
    result = json.loads(part.read_text())
    counts = re.match(r"a signal to another rank: (\d) of 5 prompts were finished, (\d) of them greedily;", result["partial"])
    assert int(counts[1]) >= num_whole and int(counts[2]) >= 1 and not output.exists()
    assert {name for name in result if name in ("greedy_accuracy", "avg@2")} == found
    assert ended.out[0].startswith("partial ") and ended.out[1] == "" and str(part) in ended.message


@pytest.mark.parametrize("program, words", [
    ("generate", ("+model=tiny", "model.tokenizer=a/b", "prompt=1+2")), ("explain", ("run=x", "step=1"))])
def test_what_one_process_does_is_refused_by_several(entry_points, program, words):
    ended = run_ranks(entry_points, f"grpo.{program}", 2, *words)
    assert ended.codes == [2, 2]
    assert all("is the work of one process, and 2 were started" in text for text in ended.errors)
