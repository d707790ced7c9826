"""grpo.generate of runs and checkpoints: what the model is given, whole calls, files of prompts. Chats: test_conversation.py."""
from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from harmony import encode_with_special
from on_terminal import shown
from paths import FIXTURES, ROOT

from grpo.batch import Completion, Prompt, Segment
from grpo.config import ConfigError, read_saved_config, save_config
from grpo.configuration.launch import load_config
from grpo.envs.carry import Carry
from grpo.envs.data_sources import read_rows
from grpo.generate import (
    GENERATE_STEP,
    answer_record,
    files_of_weights,
    load_conversation,
    read_questions,
    run_generation,
)
from grpo.record.outputs import write_output
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from grpo.run.checkpoint import save_run
from grpo.run.identity import digest_files
from grpo.run.policy import build_model, build_tokenizer, parameter_tensors
from models.chat.render import harmony_messages, render_prompt

COMPACT = FIXTURES / "tokenizer_compact"
DATE = "2025-08-05"
CARRY_SETTINGS = {"digits": 2, "format_reward": 0.1, "fault_rate": 0.75, "keep_no_carry": 0.35, "held_out_fraction": 0.2,
                  "num_eval_prompts": 4}


def make_run(folder: Path, *overrides: str) -> Path:
    """The folder of a run with checkpoints after steps 0 and 1 (weights of another seed), without training it."""
    config = load_config("train", ["+experiment=smoke", "name=run", f"output_dir={folder}", *overrides])
    tokenizer = build_tokenizer(config.model, config.env)
    run_dir = folder / "run"
    run_dir.mkdir()
    save_config(config, run_dir / "config.yaml")
    tokenizer.save(run_dir / "tokenizer")
    for step in (0, 1):
        policy = build_model(config.model, tokenizer, seed=step, device=torch.device("cpu"), dtype=torch.float32)
        with torch.no_grad():
            policy.lm_head.weight.mul_(40.0)  # lively logits
        save_run(run_dir, step=step, tensors=parameter_tensors(policy, config.model), state={"wandb_id": None}, keep=2)
    return run_dir


@pytest.fixture(scope="module")
def carry_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("carry"))


@pytest.fixture(scope="module")
def dataset_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("dataset"), "env=dataset", "env.path=gone.jsonl", "env.instructions=Be brief.",
                    f"model.tokenizer={COMPACT}", "model.architecture.max_position_embeddings=512", "warmup=null")


# ---- what the model is given


def test_a_run_of_the_carry_task_gets_the_prompt_of_its_environment(carry_run):
    chat = load_conversation(load_config("generate", [f"run={carry_run}"]))
    env = Carry(tokenizer=chat.tokenizer, seed=0, **CARRY_SETTINGS)
    prompt = next(prompt for prompt in env.eval_prompts() if prompt.row["question"])
    assert chat.render(prompt.row["question"]) == prompt.token_ids
    assert chat.tokenizer.decode(chat.render("14+49"), keep_special=True) == (
        "<|start|>user<|message|>14+49<|end|><|start|>assistant")


def test_a_run_on_a_data_set_keeps_its_instructions_effort_and_date(dataset_run, compact):
    def rendered(*overrides):
        config = load_config("generate", [f"run={dataset_run}", *overrides])
        return load_conversation(config).render("hi")

    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert rendered() == render_prompt(
        harmony_messages(messages, reasoning_effort="low", current_date=DATE), compact)
    messages[0]["content"] = "Be long."
    assert rendered("reasoning_effort=high", "current_date=2024-01-02", "instructions=Be long.") == render_prompt(
        harmony_messages(messages, reasoning_effort="high", current_date="2024-01-02"), compact)


def test_a_checkpoint_gets_medium_effort_and_no_instructions(compact):
    chat = load_conversation(load_config("generate", [
        "model=gpt_oss_20b", f"model.path={FIXTURES / 'tiny_mxfp4'}", f"model.tokenizer={COMPACT}",
        f"current_date={DATE}"]))
    asked = harmony_messages([{"role": "user", "content": "hi"}], current_date=DATE, reasoning_effort="medium")
    assert chat.render("hi") == render_prompt(asked, compact)


# ---- whole calls


def expected_text(run_dir: Path, question: str, *, step: int, greedy: bool, seed: int, capsys) -> str:
    """What a view shows of the completion that the batch sampler draws for the same key."""
    chat = load_conversation(load_config("generate", [f"run={run_dir}", f"step={step}"]))
    env = Carry(tokenizer=chat.tokenizer, seed=0, **CARRY_SETTINGS)
    sampler = Sampler(chat.sampler.model, chat.tokenizer.stop_ids, max_batch=4, seed=seed)
    completion, = sampler.generate([Prompt(0, env.encode_prompt(question), {})],
                                   SamplingParams(max_new_tokens=20, temperature=0.8, greedy=greedy), step=GENERATE_STEP,
                                   num_samples=1)
    capsys.readouterr()
    return shown(chat.tokenizer, completion.completion_ids, capsys)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_prompt_prints_what_the_sampler_draws(carry_run, capsys, greedy):
    outputs = []
    for step in (0, 1):
        config = load_config("generate", [f"run={carry_run}", f"step={step}", "prompt=14+49", f"greedy={greedy}", "seed=3",
                                          "temperature=0.8", "max_new_tokens=20"])
        assert run_generation(config) == 0
        outputs.append(capsys.readouterr().out)
        assert outputs[-1] == expected_text(carry_run, "14+49", step=step, greedy=greedy, seed=3, capsys=capsys)
    assert outputs[0] != outputs[1]


def test_lines_of_a_pipe_are_answered_one_by_one_and_a_bad_one_costs_a_message(carry_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("14+49\n\n  Ü\n10+20\n"))
    assert run_generation(load_config("generate", [f"run={carry_run}", "max_new_tokens=5"])) == 0
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines() if line.startswith("> ")] == ["> 14+49", "> Ü", "> 10+20"]
    assert "error: " in captured.err and "'Ü'" in captured.err


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["run=nowhere"], "nowhere/config.yaml: no such file"),
        (["run={run}", "step=7"], "step = 7: no such checkpoint"),
        (["run={run}", "instructions=hi"], "instructions = 'hi': this run's environment renders its own prompts"),
        (["run={run}", "prompt=1É"], "no token for 'É'"),
        (["run={run}", "prompt=" + "1" * 300], "306 tokens, but a sequence may have 256 at most"),
    ],
)
def test_mistakes_end_in_one_message_and_exit_code_2(carry_run, capsys, overrides, expected):
    overrides = [item.replace("{run}", str(carry_run)) for item in overrides]
    if not any(item.startswith("prompt=") for item in overrides):
        overrides.append("prompt=1+1")
    assert run_generation(load_config("generate", overrides)) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0]
    assert captured.out == "" and "Traceback" not in captured.err


def test_the_prompts_of_a_file_are_answered_in_its_order_each_as_if_it_were_alone(carry_run, tmp_path):
    questions = ["1+1", "14+49", "38+27"]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in questions))
    words = [f"run={carry_run}", "max_new_tokens=20", f"prompts={tmp_path / 'asked.jsonl'}",
             f"output={tmp_path / 'answers.jsonl'}"]
    assert run_generation(load_config("generate", [*words, "num_samples=2"])) == 0
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(record["row"], record["sample"], record["prompt"]) for record in records] == [
        (row, sample, text) for row, text in enumerate(questions) for sample in range(2)]
    chat = load_conversation(load_config("generate", words))
    alone = Sampler(chat.sampler.model, chat.tokenizer.stop_ids, max_batch=1, seed=0).generate(
        [Prompt(1, chat.render("14+49"), {})], SamplingParams(max_new_tokens=20), step=GENERATE_STEP, num_samples=2)
    texts = [chat.tokenizer.decode(completion.completion_ids, keep_special=True) for completion in alone]
    assert [record["completion"] for record in records[2:4]] == texts and texts[0] != texts[1]
    assert [record["num_tokens"] for record in records[2:4]] == [len(completion.completion_ids) for completion in alone]


def stop_after(monkeypatch, count: int, number: signal.Signals) -> None:
    """Has this process get a signal when so many completions are finished."""
    def progress(finished, total):
        if finished == count:
            monkeypatch.undo()  # once
            signal.raise_signal(number)

    monkeypatch.setattr("grpo.generate.join_sampler", lambda *_: progress)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_answers_that_are_finished_when_a_signal_comes_are_kept_and_the_same_command_goes_on(
        carry_run, tmp_path, monkeypatch, capsys, number):
    questions = ["1+1", "14+49", "38+27"]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in questions))
    words = [f"run={carry_run}", "max_new_tokens=9", f"prompts={tmp_path / 'asked.jsonl'}", "num_samples=2", "max_batch=1"]
    whole, output, part = (tmp_path / name for name in ("whole.jsonl", "answers.jsonl", "answers.jsonl.partial"))
    assert run_generation(load_config("generate", [*words, f"output={whole}"])) == 0
    lines = whole.read_text().splitlines(keepends=True)

    stop_after(monkeypatch, 3, number)
    assert run_generation(load_config("generate", [*words, f"output={output}"])) == 75
    said = capsys.readouterr().err
    assert f"{number.name}: 3 of 6 answers were finished; the same command goes on" in said
    assert str(part) in said and not output.exists()
    head, *kept = part.read_text().splitlines(keepends=True)
    assert json.loads(head)["partial"] == "3 of 6 answers"
    assert len(kept) == 3 and kept == [line for line in lines if line in kept]

    assert run_generation(load_config("generate", [*words, "seed=5", f"output={output}"])) == 2  # other answers
    assert "holds answers of a stopped command with other prompts, weights or settings" in capsys.readouterr().err
    assert run_generation(load_config("generate", [*words, f"output={output}"])) == 0
    assert "1 of 3 rows were answered before" in capsys.readouterr().err
    assert output.read_text() == whole.read_text() and not part.exists()


def test_a_disk_that_is_full_when_a_signal_comes_leaves_what_was_kept_before(carry_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "asked.jsonl").write_text("".join(f'{{"question": "{number}+2"}}\n' for number in range(10, 14)))
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    words = [f"run={carry_run}", "max_new_tokens=9", f"prompts={tmp_path / 'asked.jsonl'}", "max_batch=1", f"output={output}"]
    stop_after(monkeypatch, 2, signal.SIGINT)
    assert run_generation(load_config("generate", words)) == 75
    before = part.read_text()

    stop_after(monkeypatch, 1, signal.SIGINT)
    with pytest.MonkeyPatch.context() as disk:
        disk.setattr(Path, "write_bytes", Mock(side_effect=OSError(28, "No space left on device")))
        assert run_generation(load_config("generate", words)) == 1
    assert part.read_text() == before and not output.exists()
    assert re.search(rf"^error: SIGINT: 3 of 4 answers were finished;.*; {part} cannot be written \(No space left on device\), "
                     "and what is there stays; .*: make room, and start it again$", capsys.readouterr().err, re.MULTILINE)

    assert run_generation(load_config("generate", words)) == 0
    assert "2 of 4 rows were answered before" in capsys.readouterr().err and output.read_text().count("\n") == 4


def test_stopped_answers_know_weights_in_a_folder_of_their_own(tmp_path):
    """A download may have its tensors in `original/` alone."""
    shutil.copytree(FIXTURES / "tiny_bf16", tmp_path / "original", ignore=lambda *_: {"config.json", "golden.safetensors"})
    config = SimpleNamespace(run=None, model=SimpleNamespace(path=str(tmp_path), lora=None))
    expected = digest_files(FIXTURES / "tiny_bf16")
    del expected["config.json"]
    assert files_of_weights(config, step=None) == expected != {}


def test_a_signal_that_comes_while_the_answers_are_read_loses_none(carry_run, tmp_path, monkeypatch):
    def record(*arguments):
        monkeypatch.undo()  # once
        signal.raise_signal(signal.SIGINT)
        return answer_record(*arguments)

    monkeypatch.setattr("grpo.generate.answer_record", record)
    (tmp_path / "asked.jsonl").write_text('{"question": "1+1"}\n{"question": "14+49"}\n')
    words = [f"run={carry_run}", "max_new_tokens=3", f"prompts={tmp_path / 'asked.jsonl'}", f"output={tmp_path / 'out'}"]
    assert run_generation(load_config("generate", words)) == 0
    assert (tmp_path / "out").read_text().count("\n") == 2


@pytest.mark.parametrize("is_stopped, code, name", [(True, 75, "out.partial"), (False, 0, "out")])
def test_a_hangup_that_comes_while_the_file_is_written_ends_nothing(carry_run, tmp_path, monkeypatch, is_stopped, code, name):
    """A terminal that closes may send several."""
    def write(path, content):
        signal.raise_signal(signal.SIGHUP)
        return write_output(path, content)

    (tmp_path / "asked.jsonl").write_text('{"question": "1+1"}\n{"question": "14+49"}\n')
    words = [f"run={carry_run}", "max_new_tokens=3", f"prompts={tmp_path / 'asked.jsonl'}", f"output={tmp_path / 'out'}"]
    if is_stopped:
        stop_after(monkeypatch, 1, signal.SIGHUP)
    own = Mock()  # instead of the end of this process
    before = signal.signal(signal.SIGHUP, own)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("grpo.record.outputs.write_output", write)
            assert run_generation(load_config("generate", [*words, "max_batch=1"])) == code
        own.assert_not_called()
        assert signal.getsignal(signal.SIGHUP) is own  # again, after the command
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / name).read_text().count("\n") == 2


def test_a_terminal_that_is_closed_costs_no_answers(carry_run, tmp_path, leave_readers):
    leave_readers()
    (tmp_path / "asked.jsonl").write_text('{"question": "1+1"}\n')
    words = [f"run={carry_run}", "max_new_tokens=3", f"prompts={tmp_path / 'asked.jsonl'}", f"output={tmp_path / 'out'}"]
    assert run_generation(load_config("generate", words)) == 0
    assert (tmp_path / "out").read_text().count("\n") == 1


def test_a_program_may_answer_the_prompts_of_a_file_in_a_thread(carry_run, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"question": "1+1"}\n')
    words = [f"run={carry_run}", "max_new_tokens=3", f"prompts={tmp_path / 'asked.jsonl'}", f"output={tmp_path / 'out'}"]
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(run_generation, load_config("generate", words)).result() == 0
    assert (tmp_path / "out").read_text().count("\n") == 1


def test_prompts_of_a_file_are_answered_with_an_older_checkpoint_where_the_newest_is_damaged(carry_run, tmp_path):
    shutil.copytree(carry_run, tmp_path / "run")
    (tmp_path / "run/checkpoints/step_000001/manifest.json").unlink()
    (tmp_path / "asked.jsonl").write_text('{"question": "1+1"}\n')
    words = [f"run={tmp_path / 'run'}", "max_new_tokens=3", f"prompts={tmp_path / 'asked.jsonl'}", f"output={tmp_path / 'out'}"]
    with pytest.warns(UserWarning, match="resuming from step_000000"):
        assert run_generation(load_config("generate", words)) == 0
    assert (tmp_path / "out").read_text().count("\n") == 1


def test_conversations_of_a_file_are_rendered_with_their_history(dataset_run, compact, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "ha"}]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": messages, "id": 7}) + "\n")
    rows = read_rows(str(tmp_path / "asked.jsonl"), "prompts", subset=None, split=None)
    (place, question), = read_questions(list(rows), takes_messages=True)
    assert place.endswith("asked.jsonl:1")
    chat = load_conversation(load_config("generate", [f"run={dataset_run}"]))
    expected = harmony_messages([{"role": "developer", "content": "Be brief."}, *messages], reasoning_effort="low",
                                current_date=DATE)
    assert chat.render(question) == render_prompt(expected, compact)
    ids = encode_with_special(
        compact, "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>he<|return|>")
    completion = Completion(Prompt(0, [1], {}), 0, [Segment([1], "prompt"), Segment(ids, "policy")], "stop")
    answer = answer_record(compact, question, completion)
    assert (answer["answer"], answer["prompt"], answer["num_tokens"]) == ("he", messages, len(ids))


def test_the_questions_are_not_written_over_by_their_answers(carry_run, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "1+1"}\n')
    assert run_generation(load_config("generate", [f"run={carry_run}", f"prompts={asked}", f"output={asked}"])) == 2
    assert f"output = '{asked}': is the file that prompts reads, which would be lost" in capsys.readouterr().err
    assert asked.read_text() == '{"prompt": "1+1"}\n'


@pytest.mark.parametrize("row, expected", [
    ('{"query_text": "1+1"}', "asked.jsonl:1: no prompt in its columns (query_text); one of prompt, question, "),
    ('{"prompt": [{"role": "user", "content": "1+1"}]}', "asked.jsonl:1: prompt is a list; it must be text: this run"),
    ('{"prompt": "1É"}', "asked.jsonl:1: "),
    ('{"prompt": "%s"}' % ("1" * 300), "asked.jsonl:1: a prompt of 306 tokens; the model takes at most 255"),
])
def test_a_row_that_cannot_be_asked_is_named_and_nothing_is_written(carry_run, tmp_path, capsys, row, expected):
    (tmp_path / "asked.jsonl").write_text(row + "\n")
    words = [f"run={carry_run}", f"prompts={tmp_path / 'asked.jsonl'}", f"output={tmp_path / 'answers.jsonl'}"]
    assert run_generation(load_config("generate", words)) == 3
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0] and not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize("name, expected", [
    ("none.jsonl", "none.jsonl: prompts names no file that is there; a relative"),
    ("asked.txt", "asked.txt: prompts must end in .jsonl"),
    ("empty.jsonl", "empty.jsonl: holds no rows; prompts needs at least one")])
def test_a_file_of_prompts_without_rows_is_refused_before_the_model_loads(tmp_path, capsys, monkeypatch, name, expected):
    monkeypatch.setattr("grpo.generate.load_policy", None)
    (tmp_path / "asked.txt").write_text("1+1")
    (tmp_path / "empty.jsonl").write_text("\n")
    words = ["+model=tiny", "model.tokenizer=a/b", f"prompts={tmp_path / name}", f"output={tmp_path / 'answers.jsonl'}"]
    assert run_generation(load_config("generate", words)) == 3
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0] and "env." not in errors[0]


@pytest.mark.parametrize("words, expected", [
    (["prompts=x.jsonl"], "output = None: goes with prompts=FILE"), (["output=x.jsonl"], "output = 'x.jsonl': goes with prompts"),
    (["prompts=x.jsonl", "output=y.jsonl", "prompt=1+1"], "prompt = '1+1': give one question"),
    (["prompts=x.jsonl", "output=y.jsonl", "num_samples=0"], "num_samples = 0")])
def test_keys_of_a_file_of_prompts_go_together(words, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config("generate", ["+model=tiny", *words])


def test_weights_that_are_not_finite_end_with_the_exit_code_of_a_diverged_run(tmp_path, capsys):
    run_dir = make_run(tmp_path)
    chat = load_conversation(load_config("generate", [f"run={run_dir}"]))
    model = read_saved_config(run_dir / "config.yaml").model
    tensors = {name: tensor * float("nan") for name, tensor in parameter_tensors(chat.sampler.model, model).items()}
    save_run(run_dir, step=2, tensors=tensors, state={"wandb_id": None}, keep=2)
    assert run_generation(load_config("generate", [f"run={run_dir}", "prompt=1+1"])) == 6
    assert "error: rollout: the log-prob of a sampled token is not finite" in capsys.readouterr().err


def test_the_command_line_answers_a_prompt(carry_run):
    result = subprocess.run([sys.executable, "-m", "grpo.generate", f"run={carry_run}", "prompt=14+49", "max_new_tokens=3"],
                            cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stdout.strip()
    assert "step 1 of 2" in result.stderr and "Traceback" not in result.stderr
