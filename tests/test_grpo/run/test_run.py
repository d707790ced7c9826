"""A run's life: where its folder is, what a resume refuses, what it survives, and what it leaves behind."""

import copy
import json
import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paths import FIXTURES, ROOT
from safetensors.torch import load_file

from grpo.config import ConfigError, run_folder
from grpo.configuration.launch import load_config
from grpo.configuration.places import anchor_paths
from grpo.run.checkpoint import load_run, save_run
from grpo.run.identity import check_same, identify

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
    (tmp_path / "base/config.json").touch()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = load_config("train", ["+experiment=gpt_oss_20b_lora", "model.path=base", "model.tokenizer=openai/gpt-oss-20b",
                                   "model.lora.adapter=adapter", "env.path=rows.jsonl", "name=x", "output_dir=out"])
    anchor_paths(config)
    assert config.model.path == str(tmp_path / "base") and config.model.lora.adapter == str(tmp_path / "adapter")
    assert config.model.tokenizer == "openai/gpt-oss-20b" and config.env["path"] == str(tmp_path / "rows.jsonl")
    assert run_folder(config) == tmp_path / "out" / "x"


def test_files_of_code_become_absolute_and_a_run_stays_the_same_wherever_they_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lib").mkdir()
    for name in ("mine.py", "lib/other.py"):
        (tmp_path / name).write_text("")
    config = load_config("train", ["+experiment=gpt_oss_20b_lora", "name=x", "loss=user", "loss._target_=lib/other.py:f",
                                   "env.rewards=[{fn: mine.py:a, weight: 2}, lib/other.py:b.c, gone.py:d, package.module:e]"])
    before, tokenizer = copy.deepcopy(config), SimpleNamespace(fingerprint=lambda: "")
    anchor_paths(config)
    assert config.loss["_target_"] == f"{tmp_path}/lib/other.py:f"
    assert config.env["rewards"] == [{"fn": f"{tmp_path}/mine.py:a", "weight": 2}, f"{tmp_path}/lib/other.py:b.c", "gone.py:d",
                                     "package.module:e"]
    for item in (before, config):
        item.model.path = None  # a base has a digest
    made_of = identify(config, tokenizer, None)
    assert made_of["settings"]["loss._target_"] == "other.py:f" and made_of == identify(before, tokenizer, None)
    earlier = made_of | {"settings": made_of["settings"] | {"loss._target_": "lib/other.py:f"}}
    check_same(earlier, made_of, source=tmp_path)
    made_of["settings"]["loss._target_"] = "other.py:g"
    with pytest.raises(ConfigError, match="loss._target_: 'other.py:f' when the run started, 'other.py:g' now"):
        check_same(earlier, made_of, source=tmp_path)


def test_the_commands_printed_at_the_end_are_quoted_for_the_shell(start, tmp_path):
    result = start(*SMOKE, "output_dir=my runs", "steps=1")
    assert result.code == 0, result.err
    commands = [shlex.split(line, comments=True) for line in result.out[result.out.index("next:"):].splitlines()[1:]]
    assert commands[0] == ["python", "-m", "grpo.generate", "run=my runs/run"]
    assert commands[1][3] == "run=my runs/run" and "output_dir=my runs" in commands[2]
    assert commands[3] == ["ls", "my runs/run/model"]


LORA = ("+experiment=gpt_oss_20b_lora", "name=run", "output_dir=out", "device=cpu", "dtype=float32", "threads=1", "steps=1",
        "model.path=base", "model.tokenizer=vocabulary", "model.lora.rank=2", "env.path=rows.jsonl", "env.match=none",
        "env.rewards=[{fn: spread_reward.spread}]", "rollout.prompts_per_step=2", "rollout.group_size=2",
        "rollout.max_new_tokens=4", "eval.at_start=false", "eval.at_end=false", "eval.every=0", "wandb.mode=disabled",
        "checkpoint.every=1", "optim.warmup_steps=0", "optim.schedule=linear")


@pytest.fixture(scope="module")
def stopped(entry_points, tmp_path_factory):
    """A folder with a base, a tokenizer, rows, and a LoRA run of one step on them in out/run."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "spread_reward.py").write_text(
        "def spread(completions, completion_ids, **columns):\n    return [sum(ids) % 7 / 7 for ids in completion_ids]\n")
    shutil.copytree(FIXTURES / "tiny_mxfp4", folder / "base")
    shutil.copytree(FIXTURES / "tokenizer_brief", folder / "vocabulary")
    shutil.copy(FIXTURES / "arithmetic.jsonl", folder / "rows.jsonl")
    result = entry_points.run("grpo.train", *LORA, folder=folder, path=(folder,), writes_report=False)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def resume(entry_points, stopped, tmp_path):
    """Goes on with a copy of that run, by one step more."""
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)

    def run(*arguments):
        return entry_points.run("grpo.train", *LORA, "steps=2", "resume=true", *arguments, folder=folder, path=(folder,),
                                writes_report=False)

    return folder, run


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip_a_weight(folder: Path) -> None:
    path = folder / "base/model-00000-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def lose_the_config(folder: Path) -> None:
    (folder / "out/run/config.yaml").unlink()


def rename_the_checkpoint(folder: Path) -> None:
    for path in folder.glob("out/run/checkpoints/*"):
        path.rename(path.with_name("step_000007")) if path.name == "step_000001" else shutil.rmtree(path)


def go_on_to_step_7(folder: Path) -> None:
    state = load_run(folder / "out/run")
    save_run(folder / "out/run", step=7, tensors=state.tensors, state=state.state, keep=2)


@pytest.mark.parametrize("change, arguments, message", [
    (go_on_to_step_7, (), "steps = 2: the run in out/run has done 7 steps already. steps=7 ends it there, more go on"),
    (flip_a_weight, (), "base model: model-00000-of-00002.safetensors is not what it was when the run started"),
    (lambda folder: edit(folder / "base/config.json", '"rms_norm_eps": 1e-05', '"rms_norm_eps": 2e-05'), (),
     "base model: config.json is not what it was when the run started"),
    (lambda folder: edit(folder / "rows.jsonl", '"answer": "', '"answer": "1'), (), "data: rows is not what it was"),
    (lambda folder: edit(folder / "vocabulary/tokenizer.json", "{", "{ "), (), "tokenizer: vocabulary is not what it was"),
    (lose_the_config, ("rollout.group_size=3",), "rollout.group_size: 2 when the run started, 3 now"),
    (lose_the_config, ("seed=1",), "seed: 0 when the run started, 1 now"),
    (lambda folder: None, ("optim.lr=0.5",), "optim.lr: "),
    (rename_the_checkpoint, (), "step_000007 is damaged (it was saved as step_000001"),
])
def test_a_resume_on_something_else_is_refused_and_says_what_differs(resume, change, arguments, message):
    folder, run = resume
    change(folder)
    summary = (folder / "out/run/summary.json").read_bytes()
    result = run(*arguments)
    assert result.code == 2 and message in result.err, result.err
    assert (folder / "out/run/summary.json").read_bytes() == summary
    assert "Traceback" not in result.err
    assert not (folder / "out/run/checkpoints/step_000002").exists()


def test_a_checkpoint_of_another_run_is_refused_and_named(resume, entry_points):
    folder, run = resume
    other = entry_points.run("grpo.train", *LORA, "seed=1", "steps=2", "name=other", folder=folder, path=(folder,),
                             writes_report=False)
    assert other.code == 0, other.err
    shutil.copytree(folder / "out/other/checkpoints/step_000002", folder / "out/run/checkpoints/step_000002")
    result = run()
    assert result.code == 2 and "out/run/checkpoints/step_000002" in result.err, result.err
    assert "seed: 1 when the run started, 0 now" in result.err


def test_a_base_and_data_that_moved_and_a_lost_or_damaged_config_do_not_hinder_a_resume(resume):
    folder, run = resume
    (folder / "base").rename(folder / "moved")
    (folder / "rows.jsonl").rename(folder / "questions.jsonl")
    (folder / "out/run/config.yaml").write_text("seed: [0")
    result = run("model.path=moved", "env.path=questions.jsonl")
    assert result.code == 0, result.err
    assert (folder / "out/run/checkpoints/step_000002").is_dir()


def test_what_may_change_on_resume_is_said_when_it_does(resume):
    _, run = resume
    result = run("optim.schedule=constant")
    assert result.code == 2 and "optim.schedule: 'linear' when the run started, 'constant' now" in result.err, result.err
    result = run("rollout.max_batch=3")
    assert result.code == 0, result.err
    changed, = (line for line in result.out.splitlines() if line.startswith("changed on resume: "))
    assert "rollout.max_batch 64 -> 3, steps 1 -> 2" in changed
    assert "the learning rate follows the linear schedule of 2 steps from here on" in result.out


def test_resuming_a_run_that_is_not_there_is_refused_with_the_names_of_those_that_are(start, tmp_path):
    for name in ("alpha", "carry-seed0", "carry-seed1"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "config.yaml").write_text("")
    (tmp_path / "out" / "no-run").mkdir()
    result = start(*SMOKE, "name=carry-sed0", "resume=true")
    assert result.code == 2 and "there is no such run" in result.err, result.err
    assert "holds carry-seed0, carry-seed1, alpha; did you mean name=carry-seed0?" in result.err
    assert not (tmp_path / "out/carry-sed0").exists()


def test_a_run_that_saved_nothing_starts_from_the_beginning_and_says_so(start, tmp_path):
    assert start(*SMOKE).code == 0
    shutil.rmtree(tmp_path / "out/run/checkpoints")
    result = start(*SMOKE, "resume=true")
    assert result.code == 0, result.err
    assert "from the beginning: no checkpoint had been saved" in result.out
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/run/metrics.jsonl").read_text().splitlines()
             if "grad_norm" in line and "warmup/step" not in line]
    assert steps == [1, 2]


BROKEN = """
from grpo.envs.carry import Carry

class Broken(Carry):
    def __init__(self, **keywords):
        super().__init__(**keywords)
        raise ValueError("env.digits = 2: no")
"""


def test_a_name_that_is_taken_says_whether_anything_would_be_lost(start, tmp_path):
    (tmp_path / "out/run/checkpoints/step_000000").mkdir(parents=True)
    result = start(*SMOKE)
    assert result.code == 2, result.err
    assert "out/run holds a run that has saved no step; resume=true goes on with it from step 0" in result.err
    (tmp_path / "out/run/checkpoints/step_000002").mkdir()
    result = start(*SMOKE)
    assert result.code == 2 and "out/run holds a run with checkpoints; continue it with resume=true" in result.err, result.err


def test_a_start_that_fails_leaves_no_folder(start, tmp_path):
    (tmp_path / "broken_env.py").write_text(BROKEN)
    result = start("name=run", "output_dir=out", "env._target_=broken_env.Broken", path=(tmp_path,))
    assert result.code == 2 and "env.digits = 2: no" in result.err, result.err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 300, "ä" * 150, "a/b", "a b", ".hidden", "..", "a\x1b[2Jb", "a\nb"])
def test_a_name_that_makes_no_folder_is_refused_before_anything_is_made(start, tmp_path, name):
    result = start("output_dir=out", "name=" + json.dumps(name, ensure_ascii=False))
    assert result.code == 2 and "\x1b" not in result.err, result.err
    assert not (tmp_path / "out").exists()


# An environment that does something to the run's folder when it is asked for the prompts of the second step.
MEDDLING = """
import os
from pathlib import Path
from types import SimpleNamespace
import spread

class Meddling(spread.Spread):
    def prompts(self, step, **keywords):
        if step == 1:
            exec(os.environ["MEDDLE"], {"run": Path("out/run"), "os": os, "Path": Path})
        return super().prompts(step, **keywords)
"""


@pytest.fixture
def meddle(start, tmp_path):
    (tmp_path / "meddling.py").write_text(MEDDLING)

    def run(code, *arguments):
        return start(*SMOKE, "env._target_=meddling.Meddling", *arguments, path=(tmp_path,), MEDDLE=code)

    return run


def test_a_run_whose_folder_is_moved_away_ends_with_its_place_and_makes_no_second_folder(meddle, tmp_path):
    result = meddle("run.rename('out/away')")
    assert result.code == 1 and f"it is now {tmp_path / 'out/away'}" in result.err, result.err
    assert "Traceback" not in result.err and not (tmp_path / "out/run").exists()
    assert [path.name for path in sorted((tmp_path / "out/away/checkpoints").iterdir())] == ["step_000000", "step_000001"]


def test_a_link_where_the_export_or_the_tokenizer_belongs_is_replaced_and_not_followed(meddle, start, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/keep.txt").write_text("mine")
    result = meddle("(run / 'model').symlink_to(Path('mine').absolute())")
    assert result.code == 0, result.err
    assert (tmp_path / "out/run/model/model.safetensors").is_file() and not (tmp_path / "out/run/model").is_symlink()
    shutil.rmtree(tmp_path / "out/run/tokenizer")
    (tmp_path / "out/run/tokenizer").symlink_to(tmp_path / "mine")
    result = start(*SMOKE, "env._target_=meddling.Meddling", "steps=3", "resume=true", path=(tmp_path,), MEDDLE="")
    assert result.code == 0, result.err
    assert (tmp_path / "out/run/tokenizer/tokenizer.json").is_file()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["keep.txt"]


def test_checkpoints_that_are_no_folder_are_refused_at_the_start(start, tmp_path):
    (tmp_path / "out/run").mkdir(parents=True)
    (tmp_path / "out/run/checkpoints").symlink_to(tmp_path / "nowhere")
    result = start(*SMOKE)
    assert result.code == 2 and "out/run/checkpoints is no folder, nor a link to one" in result.err, result.err


def test_weights_that_are_not_finite_are_never_saved(meddle, tmp_path):
    spoil = ("import gc, torch\nfrom grpo.optim import Optimizer\n"
             "step = Optimizer.step\n"
             "def spoiled(self):\n    norm = step(self)\n"
             "    next(iter(self._state.tensors.values())).flatten()[0] = float('inf')\n"
             "    return norm\n"
             "Optimizer.step = spoiled\n")
    result = meddle(spoil)
    assert result.code == 6 and "step 2: optim.exp_avg." in result.err and "not finite" in result.err, result.err
    assert [path.name for path in sorted((tmp_path / "out/run/checkpoints").iterdir())] == ["step_000000", "step_000001"]


def test_a_terminal_that_closes_costs_no_step_and_not_the_exit_code(tmp_path):
    """A real terminal: when its other end closes, the kernel sends SIGHUP and every further write fails."""
    parent, child = pty.openpty()
    arguments = ["+experiment=smoke", "steps=100000", "name=run", f"output_dir={tmp_path}", "warmup=null", "eval.at_start=false",
                 "eval.every=0", "checkpoint.every=0"]
    code = ("import fcntl, runpy, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); "
            "runpy.run_module('grpo.train', {}, '__main__', True)")
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=child, stdout=child, stderr=child, cwd=ROOT,
                               start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"})
    os.close(child)
    metrics = tmp_path / "run/metrics.jsonl"
    try:
        while process.poll() is None and (not metrics.exists() or b'"step": 2' not in metrics.read_bytes()):
            if select.select([parent], [], [], 0.01)[0]:
                os.read(parent, 1 << 16)
        os.close(parent)
        assert process.wait(timeout=600) == 75
    finally:
        process.kill()  # a run that missed the signal would go on after the tests
    last_step = max(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    assert last_step >= 2 and (tmp_path / f"run/checkpoints/step_{last_step:06d}").is_dir()


HOSTILE = """
import spread

class Hostile(spread.Spread):
    def score(self, completions):
        raise KeyError("\\x1b]0;owned\\x07 \\x1b[2J")
"""


def test_control_characters_in_a_failure_are_printed_as_escapes(start, tmp_path):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    result = start(*SMOKE, "env._target_=hostile.Hostile", path=(tmp_path,))
    assert result.code == 4 and "owned" in result.err, result.err
    assert "\x1b" not in result.err + result.out and "\x07" not in result.err


LATE = """
from grpo.losses import reinforce

def late(inputs, *, normalizer):
    late.calls += 1
    if late.calls > 1:  # the first call is the trial before the run
        raise KeyError("late")
    return reinforce(inputs, normalizer=normalizer)

late.calls = 0
"""


def test_a_loss_that_raises_within_a_run_is_named(start, tmp_path):
    (tmp_path / "own.py").write_text(LATE)
    result = start(*SMOKE, "loss=reinforce", f"loss._target_={tmp_path}/own.py:late")
    assert result.code == 1 and f"KeyError: 'late', raised in loss._target_ = {tmp_path}/own.py:late" in result.err, result.err


def test_the_summary_says_what_was_run_with_what(start, tmp_path):
    result = start(*SMOKE, "seed=3")
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "out/run/summary.json").read_text())
    assert shlex.split(summary["command"])[:4] == ["python", "-m", "grpo.train", "+experiment=smoke"]
    assert "seed=3" in summary["command"] and summary["seed"] == 3 and summary["device"] == "CPU"
    assert summary["versions"].keys() == {"grpo", "python", "torch", "triton"}
    assert summary["versions"]["torch"] == torch.__version__
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (summary["commit"] or "").rstrip("+") == commit
    assert summary["seconds"] > 0


SECOND = ("name=second", "model.lora.adapter=out/first/adapter", "kl.coefficient=0.1", "optim.lr=0.01", "optim.schedule=constant")


@pytest.fixture(scope="module")
def continued(entry_points, stopped, tmp_path_factory):
    """A copy of the stopped run's folder with two more: `first` trains norms and sinks too, `second` begins with its adapter,
    trains the adapter alone, and is held to where it began."""
    folder = tmp_path_factory.mktemp("continued") / "folder"
    shutil.copytree(stopped, folder)
    for arguments in (("name=first", "model.lora.train_norms=true", "model.lora.train_sinks=true", "optim.lr=0.05"),
                      SECOND, (*SECOND, "name=never-stopped", "steps=2")):
        result = entry_points.run("grpo.train", *LORA, *arguments, folder=folder, path=(folder,), writes_report=False)
        assert result.code == 0, result.err
    return folder


def use(entry_points, folder: Path) -> tuple[dict, str, bytes, dict[str, torch.Tensor]]:
    """What evaluation, export, resume and generation make of the run `second` in a folder."""
    def run(module, *arguments):
        result = entry_points.run(module, *arguments, folder=folder, path=(folder, ROOT), writes_report=False)
        assert result.code == 0, result.err
        return result

    run("grpo.evaluate", "run=out/second", "num_samples=2", "max_prompts=3", "max_new_tokens=4", "device=cpu",
        "output=result.json")
    answer = run("grpo.generate", "run=out/second", "prompt=1+1", "max_new_tokens=4", "greedy=true", "device=cpu").out
    run("scripts.export", "out/second", "exported", "--device", "cpu", "--merge", "--dtype", "float32", "--experts", "bf16")
    run("grpo.train", *LORA, *SECOND, "steps=2", "resume=true")
    exported = load_file(folder / "exported/model.safetensors")
    tensors = (folder / "out/second/checkpoints/step_000002/tensors.safetensors").read_bytes()
    return json.loads((folder / "result.json").read_text()), answer, tensors, exported


def test_a_run_needs_the_adapter_that_it_began_with_no_more(entry_points, continued, tmp_path):
    trained = load_file(continued / "out/first/adapter/trained_weights.safetensors")
    base = {name: tensor for path in continued.glob("base/model-*.safetensors") for name, tensor in load_file(path).items()}
    assert any((tensor - base[name].float()).abs().max() > 1e-3 for name, tensor in trained.items())  # it matters
    never_stopped = (continued / "out/never-stopped/checkpoints/step_000002/tensors.safetensors").read_bytes()
    answers = []
    for what in ("there", "gone", "another"):
        folder = tmp_path / what
        shutil.copytree(continued, folder)
        if what != "there":
            shutil.rmtree(folder / "out/first/adapter")
        if what == "another":
            shutil.copytree(folder / "out/run/adapter", folder / "out/first/adapter")
        *answer, tensors, exported = use(entry_points, folder)
        answers.append(answer)
        assert tensors == never_stopped, what
        assert all(exported[name].equal(tensor.float()) for name, tensor in trained.items()), what
    assert answers[1:] == answers[:1] * 2
