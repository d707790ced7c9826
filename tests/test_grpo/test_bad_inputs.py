"""Bad inputs through the real entry points: each ends soon, with its exit code and one message that says what to do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paths import FIXTURES, ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHARD = "model-00001-of-00002.safetensors"  # of tiny_mxfp4
INDEX = "model.safetensors.index.json"

SMOKE = ("experiment=smoke", "name=run", "warmup=null", "rollout.max_new_tokens=8", "eval.at_start=false", "eval.at_end=false",
         "eval.every=0")
LORA = ("experiment=gpt_oss_20b_lora", "name=run", "device=cpu", "dtype=float32", "threads=1", "steps=2",
        "model.path={fixtures}/tiny_mxfp4", "model.tokenizer={fixtures}/tokenizer_brief", "model.lora.rank=2",
        "env.path={fixtures}/arithmetic.jsonl", "rollout.prompts_per_step=2", "rollout.group_size=2",
        "rollout.max_new_tokens=4", "eval.at_start=false", "eval.at_end=false", "wandb.mode=disabled")

ENVIRONMENTS = '''
from grpo.envs.carry import Carry
from grpo.environment import Score

class Varied(Carry):
    """Rewards that differ within each group."""
    def score(self, completions):
        return [Score(0.1 * c.sample, {}, {}, False) for c in completions]

class Longer(Varied):
    def prompts(self, step, **keywords):
        prompts = super().prompts(step, **keywords)
        if step == 1:
            prompts[0].token_ids = [1] * 200_000
        return prompts

class RaisesInBuild(Carry):
    def __init__(self, **keywords):
        super().__init__(**keywords)
        open("/nonexistent/problems.txt")

class RaisesInPrompts(Varied):
    def prompts(self, step, **keywords):
        if step == 1:
            raise KeyError("problem 7")
        return super().prompts(step, **keywords)

class RaisesInScore(Varied):
    def score(self, completions):
        return [1 / 0 for _ in completions]

class RaisesInEvaluation(Varied):
    def eval_prompts(self):
        raise RuntimeError("no held-out problems")

class NanReward(Varied):
    calls = 0
    def score(self, completions):
        scores = super().score(completions)
        self.calls += 1
        if self.calls == 2:
            scores[3].reward = float("nan")
        return scores

class TextReward(Varied):
    def score(self, completions):
        return [Score("good", {}, {}, True) for _ in completions]

class TooFewScores(Varied):
    def score(self, completions):
        return super().score(completions)[1:]

class PlainNumbers(Varied):
    def score(self, completions):
        return [1.0 for _ in completions]

class NoPrompts(Varied):
    def prompts(self, step, **keywords):
        return []

class NoDemonstrations:
    build_tokenizer = staticmethod(Carry.build_tokenizer)
    def __init__(self, *, tokenizer, seed, digits, format_reward, fault_rate, keep_no_carry, held_out_fraction,
                 num_eval_prompts):
        pass

class Locked(Varied):
    def score(self, completions):
        import pathlib, time
        pathlib.Path("locked").touch()
        time.sleep(60)

calls = [0]

def raises(completions, answer, **columns):
    calls[0] += 1
    if calls[0] > 1:  # the first call is the trial at start
        raise ValueError("grader fell over")
    return [0.5 for _ in completions]

def raises_at_start(completions, **columns):
    raise ValueError("grader fell over")

def is_nan(completions, **columns):
    return [float("nan") for _ in completions]

def wants_column(completions, difficulty):
    return [0.0 for _ in completions]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with broken checkpoints, tokenizers, data files and environments; what is not broken is a link."""
    folder = tmp_path_factory.mktemp("bad_inputs")
    (folder / "environments.py").write_text(ENVIRONMENTS)
    rows = [{"question": f"What is {i} + 2?", "answer": str(i + 2)} for i in range(8)]
    text = [json.dumps(row) for row in rows]
    (folder / "bad_line.jsonl").write_text("\n".join([*text[:3], '{"question": "What is', *text[3:]]))
    (folder / "empty.jsonl").write_text("")
    (folder / "not_utf8.jsonl").write_bytes(text[0].encode() + b'\n{"question": "caf\xe9", "answer": "1"}\n')
    (folder / "no_answer.jsonl").write_text("\n".join([*text[:4], '{"question": "What is 1 + 1?"}']))
    (folder / "data.txt").write_text("\n".join(text))
    (folder / "a_file").write_text("")
    break_checkpoints(folder)
    break_tokenizers(folder)
    write_experiments(folder)
    return folder


def break_checkpoints(folder: Path) -> None:
    def copy(name: str, source: str = "tiny_mxfp4", without: tuple = ()) -> Path:
        target = folder / name
        target.mkdir()
        for path in (FIXTURES / source).iterdir():
            if path.name not in without and not path.name.startswith("golden"):
                shutil.copyfile(path, target / path.name)
        return target

    def edit_shard(target: Path, change) -> None:
        tensors = load_file(target / SHARD)
        change(tensors)
        save_file(tensors, target / SHARD)
        index = json.loads((target / INDEX).read_text())
        kept = {name: file for name, file in index["weight_map"].items() if file != SHARD or name in tensors}
        index["weight_map"] = kept | {name: SHARD for name in tensors}
        (target / INDEX).write_text(json.dumps(index))

    def edit_config(name: str, **changes) -> None:
        config = json.loads((FIXTURES / "tiny_mxfp4/config.json").read_text())
        kept = {key: value for key, value in (config | changes).items() if value is not None}
        (copy(name) / "config.json").write_text(json.dumps(kept))

    with safe_open(FIXTURES / "tiny_mxfp4" / SHARD, framework="pt") as file:
        names = sorted(file.keys())
    sinks = next(name for name in names if name.endswith("sinks"))
    blocks = next(name for name in names if name.endswith("_blocks"))
    copy("missing_shard", without=(SHARD,))
    truncated = copy("truncated") / SHARD
    truncated.write_bytes(truncated.read_bytes()[:-100])
    (copy("garbled_shard") / SHARD).write_bytes(b"\x00" * 4096)
    edit_shard(copy("wrong_shape"), lambda tensors: tensors.update({sinks: torch.zeros(3)}))
    edit_shard(copy("wrong_dtype"), lambda tensors: tensors.update({blocks: tensors[blocks].bfloat16()}))
    edit_shard(copy("unused"), lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.zeros(2)}))
    edit_shard(copy("missing_tensor"), lambda tensors: tensors.pop(sinks))
    edit_shard(copy("not_finite"), lambda tensors: tensors.update({sinks: torch.full_like(tensors[sinks], torch.nan)}))
    (copy("bad_config_json") / "config.json").write_text('{"num_hidden_layers": 4,')
    (copy("bad_index") / INDEX).write_text('{"weight_map": []}')
    copy("no_config", without=("config.json",))
    edit_config("config_without_layers", num_hidden_layers=None)
    edit_config("other_sizes", num_local_experts=8)
    edit_config("other_model", model_type="llama")
    adapter = copy("other_adapter", "tiny_bf16_lora")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in list(weights.items())[1:]}, adapter / "adapter_model.safetensors")


def break_tokenizers(folder: Path) -> None:
    source = json.loads((FIXTURES / "tokenizer_compact/tokenizer.json").read_text())
    for name in ("no_harmony", "bad_tokenizer", "no_tokenizer"):
        (folder / name).mkdir()
    source["added_tokens"] = [token for token in source["added_tokens"] if token["content"] != "<|channel|>"]
    source["model"]["vocab"].pop("<|channel|>", None)
    (folder / "no_harmony/tokenizer.json").write_text(json.dumps(source))
    (folder / "bad_tokenizer/tokenizer.json").write_text('{"version": "1.0", "model": {}}')


def write_experiments(folder: Path) -> None:
    (folder / "experiment").mkdir()
    head = "# @package _global_\ndefaults:\n  - smoke\n  - _self_\n"
    (folder / "experiment/typo.yaml").write_text(f"{head}optim:\n  learning_rate: 1.0\n")
    (folder / "experiment/not_yaml.yaml").write_text(f"{head}optim: [\n")


# arguments after `python -m grpo.train`, exit code, parts of the message; tests/test_grpo/configuration/ has those of the schema
CONFIG = [
    ("optim.lrr=1e-4", 2, ["optim.lrr", "did you mean optim.lr?"]),
    ("env.digit=2", 2, ["unknown key env.digit", "did you mean env.digits?"]),
    ("+loss.clip=0.1", 2, ["unknown key loss.clip", "clip_low"]),
    ("losss=grpo", 2, ["unknown key losss", "did you mean loss?"]),
    ("env.digits=two", 2, ["env.digits = 'two' (str)", "an integer"]),
    ("env._target_=grpo.envs.carry.Cary", 2, ["env._target_ = 'grpo.envs.carry.Cary'", "did you mean grpo.envs.carry.Carry?"]),
    ("env._target_=nowhere.Env", 2, ["env._target_ = 'nowhere.Env'", "cannot import nowhere"]),
    ("model.architecture.num_key_value_heads=3", 2, ["model.architecture", "num_key_value_heads"]),
    ("device=cuda", 2, ["device = 'cuda'", "set device=cpu"]),
    ("env.digits=1", 2, ["env.digits=1: must lie in 2..9"]),
    ("output_dir={folder}/a_file", 2, ["output_dir = ", "a_file", "choose a folder"]),
    ("name=../elsewhere", 2, ["name = '../elsewhere'", "choose one with name=NAME"]),
]
MODEL = [
    ("model.lora.rnk=2", 2, ["model.lora.rnk", "did you mean model.lora.rank?"]),
    ("model.lora.targets=[q_proj,v_prj]", 2, ["model.lora.targets", "v_prj", "among q_proj"]),
    ("model.train=full", 2, ["model.lora", "model.train=full"]),
    ("model.train=full model.lora=null", 2, ["model.train", "MXFP4", "model.experts=bf16"]),
    ("model.path={folder}/nowhere", 2, ["model.path", "nowhere", "no such folder"]),
    ("model.path={folder}/experiment", 2, ["model.path", "/experiment': a folder without config.json"]),
    ("model.path={folder}/missing_shard", 2, [SHARD, "fetch"]),
    ("model.path={folder}/truncated", 2, [SHARD, "truncated", "fetch it again"]),
    ("model.path={folder}/garbled_shard", 2, [SHARD, "fetch it again"]),
    ("model.path={folder}/wrong_shape", 2, ["wrong_shape", "sinks is [3], expected [4]"]),
    ("model.path={folder}/wrong_dtype", 2, ["wrong_dtype", "_blocks is BF16, expected U8"]),
    ("model.path={folder}/unused", 2, ["unused", "not used by the model (1): model.layers.0.extra.weight"]),
    ("model.path={folder}/missing_tensor", 2, ["missing_tensor", "missing (1): ", "sinks"]),
    ("model.path={folder}/bad_config_json", 2, ["bad_config_json/config.json", "not valid JSON", "fetch the file again"]),
    ("model.path={folder}/bad_index", 2, [INDEX, "weight_map", "fetch the file again"]),
    ("model.path={folder}/no_config", 2, ["/no_config': a folder without config.json, which every checkpoint has"]),
    ("model.path={folder}/config_without_layers", 2, ["config_without_layers", "num_hidden_layers"]),
    ("model.path={folder}/other_sizes", 2, ["other_sizes", "config.json", "expected [8"]),
    ("model.path={folder}/other_model", 2, ["other_model", "model_type", "llama"]),
    ("model.path={folder}/not_finite", 6, ["not finite", "weights"]),
    ("model.tokenizer=null", 2, ["no tokenizer at", "tiny_mxfp4/tokenizer.json", "model.tokenizer"]),
    ("model.tokenizer={folder}/no_harmony", 2, ["no_harmony/tokenizer.json", "lacks the harmony tokens <|channel|>"]),
    ("model.tokenizer={folder}/bad_tokenizer", 2, ["bad_tokenizer/tokenizer.json", "Copy it again"]),
    ("model.tokenizer={fixtures}/tokenizer_real_ids", 2, ["model.tokenizer", "384"]),
    ("model.lora.adapter={fixtures}/tiny_bf16_lora", 2, ["adapter_config.json", "rank", "set model.lora"]),
    ("model.path={fixtures}/tiny_bf16 model.lora.rank=4 model.lora.alpha=8 model.lora.adapter={folder}/other_adapter", 2,
     ["other_adapter", "missing: base_model"]),
    ("model.lora.adapter={folder}/experiment", 2, ["adapter_config.json", "not found"]),
]
DATA = [
    ("env.path={folder}/nowhere.jsonl", 3, ["nowhere.jsonl", "env.path names no file that is there"]),
    ("env.path={folder}/bad_line.jsonl", 3, ["bad_line.jsonl:4", "not valid JSON"]),
    ("env.path={folder}/empty.jsonl", 3, ["empty.jsonl", "no rows"]),
    ("env.path={folder}/not_utf8.jsonl", 3, ["not_utf8.jsonl:2", "UTF-8"]),
    ("env.path={folder}/no_answer.jsonl", 3, ["no_answer.jsonl:5", "answer"]),
    ("env.path={folder}/data.txt", 3, ["data.txt", "must end in .jsonl"]),
    ("env.answer_key=solution", 3, ["arithmetic.jsonl", "solution", "answer"]),
    ("env.question_template='{{problem}} ?'", 3, ["problem", "question"]),
    ("env.max_prompt_tokens=5", 3, ["arithmetic.jsonl:1", "tokens", "max_prompt_tokens"]),
    ("env.match=numerical", 2, ["env.match='numerical'", "must be one of exact, numeric, math, none"]),
    ("env.rewards=[{{fn: environments.nothing}}]", 2, ["env.rewards[0].fn", "nothing"]),
    ("env.rewards=[{{fn: environments.wants_column}}]", 2, ["wants_column", "difficulty", "question"]),
    ("env.rewards=[{{fn: environments.raises_at_start}}]", 4, ["raises_at_start", "grader fell over", "arithmetic.jsonl:"]),
    ("env.rewards=[{{fn: environments.raises}}]", 4, ["raises", "grader fell over", "arithmetic.jsonl:"]),
    ("env.rewards=[{{fn: environments.is_nan}}]", 4, ["is_nan", "nan", "arithmetic.jsonl:"]),
]
ENVIRONMENT = [
    ("RaisesInBuild", 4, ["cannot be built", "FileNotFoundError", "environments.py:"]),
    ("RaisesInPrompts", 4, ["RaisesInPrompts.prompts raised KeyError: 'problem 7'", "environments.py:"]),
    ("RaisesInScore", 4, ["RaisesInScore.score raised ZeroDivisionError", "environments.py:"]),
    ("RaisesInEvaluation", 4, ["RaisesInEvaluation.eval_prompts raised RuntimeError", "environments.py:"]),
    ("NanReward", 4, ["NanReward.score gave the reward nan to sample", "must be finite numbers"]),
    ("TextReward", 4, ["TextReward.score gave the reward 'good'", "must be finite numbers"]),
    ("TooFewScores", 4, ["returned 7 scores for 8 completions"]),
    ("PlainNumbers", 4, ["PlainNumbers.score returned", "float", "grpo.environment.Score"]),
    ("NoPrompts", 4, ["NoPrompts.prompts returned no prompts"]),
]


@pytest.fixture
def train(entry_points, folder, tmp_path):
    def run(base, arguments, before="", **options):
        words = [word.format(folder=folder, fixtures=FIXTURES) for word in base]
        extra = [arguments.format(folder=folder, fixtures=FIXTURES)] if "{{" in arguments else [
            word.format(folder=folder, fixtures=FIXTURES) for word in arguments.split()]
        if not any(word.startswith("output_dir=") for word in extra):
            words.append(f"output_dir={tmp_path}")
        keys = {word.partition("=")[0] for word in extra}
        words = [word for word in words if word.partition("=")[0] not in keys]
        return entry_points.run("grpo.train", *words, *extra, path=(folder,), before=before, writes_report=False,
                                **options)

    return run


def check(result, code: int, parts: list[str]) -> None:
    assert result.code == code, (result.code, result.err)
    assert "Traceback" not in result.err
    messages = [line for line in result.err.splitlines() if line.startswith(("error: ", "config error: "))]
    assert len(messages) == 1, result.err
    for part in parts:
        assert part in result.err, (part, result.err)


@pytest.mark.parametrize("arguments, code, parts", CONFIG, ids=[row[0].split()[0] for row in CONFIG])
def test_a_bad_setting_ends_in_one_message(train, arguments, code, parts):
    check(train(SMOKE, arguments), code, parts)


@pytest.mark.parametrize("arguments, code, parts", MODEL + DATA, ids=[row[0].split()[-1][:40] for row in MODEL + DATA])
def test_a_bad_file_ends_in_one_message(train, arguments, code, parts):
    check(train(LORA, arguments), code, parts)


def test_a_warm_up_on_an_environment_without_demonstrations_is_refused(train):
    warmup = ("warmup={{steps: 2, batch_size: 2, lr: 1e-3, betas: [0.9, 0.99], weight_decay: 0, warmup_steps: 0, "
              "decay_fraction: 0, final_lr_ratio: 1, max_grad_norm: 1}}")
    result = train([*SMOKE, "env._target_=environments.NoDemonstrations"], warmup)
    check(result, 2, ["warmup", "NoDemonstrations has no demonstrations", "set warmup=null"])


@pytest.mark.parametrize("name, code, parts", ENVIRONMENT, ids=[row[0] for row in ENVIRONMENT])
def test_a_faulty_environment_ends_in_one_message_and_finished_steps_are_saved(train, tmp_path, name, code, parts):
    settings = "steps=4 checkpoint.every=0 eval.every=3"
    check(train(SMOKE, f"env._target_=environments.{name} {settings}"), code, parts)
    finished = {"RaisesInPrompts": 1, "RaisesInEvaluation": 3, "NanReward": 1}.get(name, 0)
    saved = sorted(path.name for path in tmp_path.glob("run/checkpoints/*"))
    assert saved == ([f"step_{finished:06d}"] if finished else [])
    assert "ZeroDivisionError" in (tmp_path / "run/error.log").read_text() or name != "RaisesInScore"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_sequence_that_is_too_long_ends_in_one_message_and_finished_steps_are_saved(train, tmp_path):
    result = train(SMOKE, "env._target_=environments.Longer steps=30 rollout.prompts_per_step=1")
    check(result, 4, ["Longer.prompts", "a prompt has 200000 tokens: the model's sequences end at"])
    assert names(tmp_path / "run/checkpoints") == ["step_000000", "step_000001"]


@pytest.fixture(scope="module")
def finished(entry_points, folder, tmp_path_factory):
    """A run of two steps."""
    output_dir = tmp_path_factory.mktemp("finished")
    result = entry_points.run("grpo.train", *SMOKE, f"output_dir={output_dir}", writes_report=False)
    assert result.code == 0, result.err
    return output_dir / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def test_a_run_whose_name_is_taken_is_refused_and_untouched(train, finished):
    before = contents(finished)
    check(train(SMOKE, f"output_dir={finished.parent}"), 2, ["name = 'run'", "resume=true", "choose another name="])
    assert contents(finished) == before


def test_a_resume_with_another_config_is_refused_and_the_run_untouched(train, finished):
    before = contents(finished)
    result = train(SMOKE, f"output_dir={finished.parent} resume=true optim.lr=1e-5 steps=3 loss=grpo")
    check(result, 2, ["optim.lr: 0.0003 when the run started, 1e-05 now", "loss.", "name=NEW_NAME"])
    assert "steps" not in result.err.replace("finished steps", "")
    assert contents(finished) == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(train, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_000002/tensors.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    result = train(SMOKE, "resume=true")
    assert result.code == 0 and "step_000002" in result.err and "SHA-256" in result.err
    assert "resumed after step 1" in result.out
    assert contents(tmp_path / "run/checkpoints") == contents(finished / "checkpoints")


def test_a_run_without_a_whole_checkpoint_is_refused_and_untouched(train, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("*/state.json"):
        path.unlink()
    before = contents(tmp_path / "run")
    check(train(SMOKE, "resume=true"), 2, ["no usable checkpoint", "step_000002", "state.json is missing", "another name="])
    assert contents(tmp_path / "run") == before


def test_a_run_held_by_a_live_process_is_refused(entry_points, train, folder, tmp_path):
    environment = "env._target_=environments.Locked"
    holder = entry_points.start("grpo.train", *SMOKE, environment, f"output_dir={tmp_path}", path=(folder,), folder=ROOT,
                                before=f"import os; os.chdir({str(tmp_path)!r})")
    try:
        for _ in range(3000):
            if (tmp_path / "locked").exists():
                break
            time.sleep(0.01)
        check(train(SMOKE, f"{environment} resume=true"), 2, [f"in use by process {holder.pid}", "choose another name="])
    finally:
        holder.send(signal.SIGKILL)
        holder.wait()


def test_a_full_disk_ends_in_one_message_and_earlier_checkpoints_stay_whole(train, entry_points, tmp_path):
    # Writes fail as on a full disk from the moment that the third checkpoint is written.
    limit = """
import grpo.run.checkpoint, resource
original, calls = grpo.run.checkpoint._write, [0]
def write(*arguments):
    calls[0] += 1
    if calls[0] == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return original(*arguments)
grpo.run.checkpoint._write = write
"""
    arguments = [*SMOKE, "steps=4", "checkpoint.every=1", "env._target_=environments.Varied"]
    result = train(arguments, "checkpoint.keep=9", before=limit)
    check(result, 1, ["step_000002", "bytes free", "Earlier checkpoints are untouched", "resume"])
    assert names(tmp_path / "run/checkpoints") == ["step_000000", "step_000001"]
    result = train(arguments, "checkpoint.keep=9 resume=true")
    assert result.code == 0 and "resumed after step 1" in result.out, result.err


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="mounting a small disk needs root on Linux")
@pytest.mark.parametrize("num_bytes", [8_192, 100_000, 11_000_000, 30_000_000])
def test_a_small_disk_fills_up_without_harm(train, tmp_path, num_bytes):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        arguments = [*SMOKE, "steps=4", "checkpoint.every=1", "env._target_=environments.Varied", "checkpoint.keep=9"]
        result = train(arguments, "")
        check(result, 1, ["free"])
        for path in tmp_path.glob("run/checkpoints/*"):
            assert names(path) == ["manifest.json", "state.json", "tensors.safetensors"]
            assert load_file(path / "tensors.safetensors")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("name, part", [("typo", "unknown key optim.learning_rate"), ("not_yaml", 'not_yaml.yaml", line')])
def test_a_bad_experiment_file_ends_in_one_message(entry_points, folder, tmp_path, name, part):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copyfile(folder / f"experiment/{name}.yaml", tmp_path / f"configs/experiment/{name}.yaml")
    other_configs = ("import grpo.configuration.launch as module, pathlib; "
                     f"module.CONFIG_DIR = pathlib.Path({str(tmp_path / 'configs')!r})")
    check(entry_points.run("grpo.train", f"experiment={name}", f"output_dir={tmp_path}", before=other_configs), 2, [part])


def test_a_model_that_no_hub_delivers_is_named(train):
    result = train(LORA, "model.path=nobody-at-all/no-such-model", HF_HUB_OFFLINE="1")
    check(result, 2, ["nobody-at-all/no-such-model", "check the spelling"])


EVALUATE = [
    (["run={folder}/nowhere"], 2, ["nowhere", "no such"]),
    (["run={finished}", "step=7"], 2, ["step = 7", "there are [1, 2]"]),
    (["run={finished}", "num_sample=4"], 2, ["did you mean num_samples?"]),
    (["run={finished}", "temperature=0"], 2, ["temperature = 0.0"]),
    (["run={finished}", "max_prompts=2", "output={folder}/a_file/x.json"], 2, ["a_file/x.json", "cannot be written"]),
    (["run={finished}", "env._target_=environments.RaisesInEvaluation", "+env=carry"], 4, ["RaisesInEvaluation.eval_prompts"]),
    (["model=gpt_oss_20b", "model.path={folder}/truncated", "env=dataset", "env.path={folder}/empty.jsonl", "device=cpu",
      "model.tokenizer={fixtures}/tokenizer_compact"], 2, ["truncated"]),
    (["model=gpt_oss_20b", "model.path={fixtures}/tiny_mxfp4", "env=dataset", "env.path={folder}/empty.jsonl", "device=cpu",
      "model.tokenizer={fixtures}/tokenizer_compact"], 3, ["empty.jsonl: holds no rows"]),
    ([], 2, ["run", "model"]),
]
GENERATE = [
    (["run={folder}/nowhere", "prompt=hello"], 2, ["nowhere", "no such"]),
    (["run={finished}", "promt=hello"], 2, ["did you mean prompt?"]),
    (["model=gpt_oss_20b", "model.path={folder}/missing_shard", "device=cpu", "prompt=hello",
      "model.tokenizer={fixtures}/tokenizer_compact"], 2, [SHARD]),
]


@pytest.mark.parametrize("entry_point, arguments, code, parts", [("evaluate", *row) for row in EVALUATE]
                         + [("generate", *row) for row in GENERATE])
def test_bad_inputs_of_evaluation_and_chat_end_in_one_message(entry_points, folder, finished, entry_point, arguments, code,
                                                              parts):
    words = [word.format(folder=folder, finished=finished, fixtures=FIXTURES) for word in arguments]
    check(entry_points.run(f"grpo.{entry_point}", *words, path=(folder,)), code, parts)


def test_a_typo_ends_in_one_message_in_a_fresh_interpreter():
    result = subprocess.run([sys.executable, "-m", "grpo.train", "optim.lrr=1"], cwd=ROOT, capture_output=True, text=True,
                            timeout=600)
    assert result.returncode == 2
    assert result.stdout == "" and "did you mean optim.lr?" in result.stderr and "Traceback" not in result.stderr
