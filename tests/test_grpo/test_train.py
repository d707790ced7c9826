"""A run from end to end: the files it writes, what they hold, what it prints, and that the parameters move."""

import json
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from paths import FIXTURES
from safetensors import safe_open
from safetensors.torch import load_file

import grpo.train
from grpo.configuration.launch import load_config

STEP_METRICS = {
    "reward", "reward_std", "rewards/exact_match/mean", "rewards/format/mean", "rewards/format/std", "reward/errors",
    "frac_reward_zero_std", "groups/dropped", "groups/live", "groups/surplus", "groups/unscored",
    "advantages/mean", "advantages/std", "advantages/min", "advantages/max", "channels/analysis/length", "channels/final/length",
    "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/clipped_ratio", "entropy", "clip_ratio/low", "clip_ratio/high", "loss", "grad_norm", "lr",
    "sampling/log_prob_diff/mean", "sampling/log_prob_diff/max", "num_tokens", "time/rollout", "time/reward", "time/update",
    "update/tokens", "update/trained_tokens", "update/frac_tokens_shared",
    "time/step", "time/total", "tokens_per_s", "memory/peak_gb"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def smoke(entry_points, spread_folder, folder):
    """The folder of a finished `+experiment=smoke` with rewards that differ, and what it printed."""
    result = entry_points.run("grpo.train", "+experiment=smoke", "steps=3", "name=smoke", f"output_dir={folder}",
                              "env._target_=spread.Spread", path=(spread_folder,))
    assert result.code == 0, result.err
    return folder / "smoke", result


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_these_files(smoke):
    run_dir, _ = smoke
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/step_00000{step}/{name}" for step in (2, 3)
                   for name in ("tensors.safetensors", "state.json", "manifest.json")}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    model = {"README.md", "config.json", "generation_config.json", "model.safetensors"} | tokenizer
    assert files == {".lock", "config.yaml", "metrics.jsonl", "completions.jsonl", "summary.json", "report.html"} | (
        checkpoints | {f"tokenizer/{name}" for name in tokenizer} | {f"model/{name}" for name in model})


def test_every_step_is_a_line_with_these_metrics(smoke):
    steps = [row for row in rows(smoke[0] / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    total = 0
    for row in steps:
        missing = STEP_METRICS - row.keys()
        assert not missing, missing
        assert all(math.isfinite(value) for value in row.values())
        assert row["groups/live"] == 2 and row["groups/dropped"] == 0 and row["frac_reward_zero_std"] == 0
        assert row["grad_norm"] > 0
        assert 0 < row["entropy"] < math.log(75)  # nats; the vocabulary has at most 75 tokens
        assert row["sampling/log_prob_diff/max"] < 1e-5  # sampler and trainer agree
        assert row["clip_ratio/low"] == row["clip_ratio/high"] == 0  # one update: the ratio is exactly 1
        completion_tokens = round(8 * row["completions/mean_length"])
        assert row["update/trained_tokens"] == completion_tokens < row["update/tokens"]
        assert row["update/tokens"] == row["num_tokens"] - total  # prompts and completions of this step
        total = row["num_tokens"]
    assert [row["lr"] for row in steps][0] == pytest.approx(3e-4)


def test_the_reward_is_the_mean_over_the_completions(smoke):
    run_dir, _ = smoke
    completions = [row for row in rows(run_dir / "completions.jsonl") if row["split"] == "train" and row["step"] == 2]
    step = next(row for row in rows(run_dir / "metrics.jsonl") if row["step"] == 2 and "reward" in row)
    first = [row["prompt_id"] for row in completions].count(completions[0]["prompt_id"])
    assert first == 4  # log.num_completions of quickstart: the first of 2 groups of 4; suspects of the other may follow
    for row in completions:
        assert row["reward"] == pytest.approx(row["sample"] / 4 + row["num_tokens"] / 100)
        assert row["num_tokens"] == len(row["token_ids"]) <= 32
    assert step["completions/min_length"] <= min(row["num_tokens"] for row in completions)
    # samples 0..3 of each group give 0.375 on average
    assert step["reward"] == pytest.approx(0.375 + step["completions/mean_length"] / 100)


def test_the_log_has_the_first_completions_and_suspects_among_all_others(monkeypatch):
    monkeypatch.setattr(grpo.train, "completion_record", lambda tokenizer, env, *pair, split: {"pair": pair, "split": split})
    seen = []
    run = SimpleNamespace(step=7, ranks=None, tokenizer=None, env=None,
                          config=SimpleNamespace(log=SimpleNamespace(num_completions=2)),
                          metrics=SimpleNamespace(history=["lines"], log_completions=lambda *given: seen.append(given)))

    def suspects(scored, history, *, limit):
        seen.append((len(scored), history, limit))
        return {5: "late", 1: "early"}

    monkeypatch.setattr(grpo.train, "find_suspects", suspects)
    grpo.train.log_completions(run, [(i, i) for i in range(6)], split="train")
    grpo.train.log_completions(run, [(0, 0), (1, 1), *[(5, 5)] * 4], split="eval")

    def expected(split):
        return [{"pair": (i, i), "split": split, **({"suspicion": why} if why else {})}
                for i, why in ((0, None), (1, "early"), (5, "late"))]

    assert seen == [(6, ["lines"], 2), (7, expected("train")), (6, [], 2), (7, expected("eval"))]


def test_warm_up_and_evaluations_are_on_record(smoke):
    lines = rows(smoke[0] / "metrics.jsonl")
    warmup = [row for row in lines if "warmup/step" in row]
    assert [row["warmup/step"] for row in warmup] == [1, 4] and all(row["step"] == 0 for row in warmup)
    assert warmup[0]["warmup/loss"] == pytest.approx(math.log(75), abs=0.5)  # an untrained model: uniform
    assert warmup[1]["warmup/loss"] < warmup[0]["warmup/loss"]
    evaluations = [row for row in lines if "eval/avg@1" in row]
    assert [row["step"] for row in evaluations] == [0, 1, 2, 3]
    assert all({"eval/greedy_accuracy", "eval/greedy_accuracy/ci95", "eval/avg@1/ci95"} <= row.keys() for row in evaluations)


def test_the_summary_and_the_last_lines_say_how_it_went_and_what_to_do_next(smoke, entry_points, spread_folder):
    run_dir, result = smoke
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["exit_reason"] == "finished" and summary["steps"] == 3
    assert summary["eval"]["eval/greedy_accuracy"].keys() >= {"first", "last", "best"}
    assert summary["seconds"] > 0 and summary["peak_host_memory_gb"] > 0.1
    assert "<img" in (run_dir / "report.html").read_text()
    assert str(run_dir / "report.html") in result.out
    num_parameters = sum(tensor.numel() for tensor in load_file(run_dir / "model/model.safetensors").values())
    assert f"model    from scratch: {num_parameters:,} parameters" in result.out
    commands = re.findall(r"^\s+python -m (grpo\.\w+) (.*)$", result.out, flags=re.MULTILINE)
    assert [name for name, _ in commands] == ["grpo.generate", "grpo.evaluate", "grpo.train"]
    name, arguments = commands[1]
    evaluation = entry_points.run(name, *shlex.split(arguments), "max_prompts=4", path=(spread_folder,))
    assert evaluation.code == 0, evaluation.err
    assert re.search(r"^step +3$", evaluation.out, re.MULTILINE)


def test_parameters_move_and_the_exported_model_is_the_last_checkpoint(smoke):
    run_dir, _ = smoke
    before, after = (load_file(run_dir / f"checkpoints/step_00000{step}/tensors.safetensors") for step in (2, 3))
    exported = load_file(run_dir / "model/model.safetensors")
    parameters = {name.removeprefix("param."): tensor for name, tensor in after.items() if name.startswith("param.")}
    assert parameters.keys() == exported.keys()
    for name, tensor in exported.items():
        assert tensor.equal(parameters[name]), name
        assert not tensor.equal(before["param." + name]) or "embed" in name, name


def test_lora_trains_the_adapter_of_a_packed_checkpoint_and_exports_it(entry_points, folder):
    result = entry_points.run(
        "grpo.train", "+experiment=gpt_oss_20b_lora", "name=lora", "device=cpu", "dtype=float32", "threads=1", "steps=2",
        f"model.path={FIXTURES / 'tiny_mxfp4'}", f"model.tokenizer={FIXTURES / 'tokenizer_brief'}", "model.lora.rank=2",
        f"env.path={FIXTURES / 'arithmetic.jsonl'}", "env.match=none",
        "env.rewards=[{fn: lengths_reward.spread}]", "rollout.prompts_per_step=2", "rollout.group_size=2",
        "rollout.max_new_tokens=4", "eval.at_start=false", "eval.max_prompts=2", "wandb.mode=disabled", "optim.warmup_steps=0",
        f"output_dir={folder}", path=(write_reward(folder),))
    assert result.code == 0, result.err
    assert "experts mxfp4" in result.out
    adapter = load_file(folder / "lora/adapter/adapter_model.safetensors")
    halves = {name.rpartition("lora_")[2]: tensor for name, tensor in adapter.items() if "layers.0.self_attn.q_proj" in name}
    assert halves["A.weight"].shape == (2, 96) and halves["B.weight"].shape == (128, 2)
    assert halves["B.weight"].abs().max() > 0  # B starts at zero
    config = json.loads((folder / "lora/adapter/adapter_config.json").read_text())
    assert config["r"] == 2 and config["base_model_name_or_path"] == str(FIXTURES / "tiny_mxfp4")
    with safe_open(folder / "lora/checkpoints/step_000002/tensors.safetensors", framework="pt") as file:
        assert all("lora_" in name for name in file.keys() if name.startswith("param."))


def write_reward(folder: Path) -> Path:
    (folder / "lengths_reward.py").write_text(
        "def spread(completions, completion_ids, **columns):\n    return [sum(ids) % 7 / 7 for ids in completion_ids]\n")
    return folder


def test_the_same_seed_gives_the_same_run_and_another_seed_another(entry_points, spread_folder, folder, smoke):
    def run(name, seed):
        result = entry_points.run("grpo.train", "+experiment=smoke", "steps=1", f"name={name}", f"seed={seed}",
                                  f"output_dir={folder}", "env._target_=spread.Spread", "eval.at_end=false",
                                  path=(spread_folder,), writes_report=False)
        assert result.code == 0, result.err
        first = [row for row in rows(folder / name / "completions.jsonl") if row["step"] == 1 and row["split"] == "train"]
        return first, load_file(folder / name / "model/model.safetensors")

    (same, weights), (again, weights_again), (other, _) = run("a", 0), run("b", 0), run("c", 1)
    assert same == again
    assert all(tensor.equal(weights_again[name]) for name, tensor in weights.items())
    assert [row["token_ids"] for row in same] != [row["token_ids"] for row in other]


SPARSE = """
from spread import Spread
class Sparse(Spread):
    def score(self, completions):
        scores = super().score(completions)
        for score in scores:
            score.reward = None if self.seed else 0.5
        return scores
"""


@pytest.mark.parametrize("seed, reward", [(0, 0.5), (1, None)], ids=["equal", "none"])
def test_a_run_that_learns_nothing_from_rewards_says_so(entry_points, spread_folder, tmp_path, seed, reward):
    (tmp_path / "sparse.py").write_text(SPARSE)
    done = entry_points.run("grpo.train", "+experiment=smoke", "name=run", f"output_dir={tmp_path}", f"seed={seed}",
                            "env._target_=sparse.Sparse", "eval.at_end=false", path=(spread_folder, tmp_path),
                            writes_report=False)
    assert done.code == 0, done.err
    assert "no step made an update: what is exported has learnt nothing from rewards" in done.out + done.err
    for row in rows(tmp_path / "run/metrics.jsonl"):
        if "reward" in row:
            assert (row["reward"], row["loss"], row["groups/live"], row["groups/dropped"]) == (reward, None, 0, 2)


LOSS = """
import torch
def reinforce(inputs, *, scale: float):
    advantages = (inputs.rewards - inputs.rewards.mean())[inputs.sequence_ids]
    terms = torch.where(inputs.loss_mask, -scale * advantages * inputs.log_probs, 0.0)
    return terms.sum() / inputs.num_policy_tokens, {"spread": scale * inputs.loss_mask.sum()}
def wrong(inputs):
    return inputs.log_probs.mean()
def before(log_probs, batch, *, old_log_probs):
    return log_probs.mean(), {}
"""


def test_a_loss_of_ones_own_trains_and_a_wrong_one_is_refused_before_the_model_loads(entry_points, spread_folder, tmp_path):
    (tmp_path / "losses.py").write_text(LOSS)

    def run(name, *arguments):
        return entry_points.run("grpo.train", "+experiment=smoke", f"name={name}", f"output_dir={tmp_path}", "steps=1",
                                "env._target_=spread.Spread", "eval.at_start=false", "eval.at_end=false", "loss=user",
                                f"loss._target_={tmp_path}/losses.py:{name}", *arguments,
                                path=(spread_folder,), writes_report=False)

    done = run("reinforce", "++loss.scale=2.0")
    assert done.code == 0, done.err
    step = next(row for row in rows(tmp_path / "reinforce/metrics.jsonl") if "reward" in row)
    assert step["spread"] == pytest.approx(2.0) and step["grad_norm"] > 0
    done = run("wrong")
    assert done.code == 2 and "losses.py:wrong': what it returned is a tensor of shape []" in done.err
    assert "model    " not in done.out
    done = run("before")
    assert done.code == 2
    assert "losses.py:before': before(log_probs, batch, old_log_probs) must be before(inputs, *, KEYWORDS)" in done.err


@pytest.mark.parametrize("own, expected", [((None, None, None), (3, 0.9, 0.1)), ((0, 1.0, 0.0), (0, 1.0, 0.0))])
def test_evaluation_has_filters_of_its_own_or_those_of_rollouts(monkeypatch, own, expected):
    config = load_config("train", ["name=x", "rollout.top_k=3", "rollout.top_p=0.9", "rollout.min_p=0.1"])
    config.eval.top_k, config.eval.top_p, config.eval.min_p = own
    seen = []
    monkeypatch.setattr(grpo.train, "evaluate", lambda env, sampler, prompts, params, **_: seen.append(params) or ({}, []))
    monkeypatch.setattr(grpo.train, "held_out_prompts", lambda *_, **__: [])
    metrics = MagicMock(has_eval=lambda step: False)
    grpo.train.evaluate_if_due(SimpleNamespace(config=config, step=0, env=None, sampler=MagicMock(), policy=MagicMock(),
                                               should_stop=None, metrics=metrics, turns=None, ranks=None))
    assert [(params.top_k, params.top_p, params.min_p) for params in seen] == [expected]
