"""Whole runs with reward functions that disturb the process, fork, or hang."""

import json

import pytest
from paths import FIXTURES

REWARDS = """
import os, sys, time

def even(completions, completion_ids, **columns):
    return [sum(ids) % 7 / 7 for ids in completion_ids]

def disturbing(completions, completion_ids, **columns):
    import torch
    values = even(completions, completion_ids)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(3)
    torch.set_grad_enabled(False)
    os.chdir("/")
    if os.fork() == 0:
        sys.exit()
    return values

def hanging(row, text):
    if hanging.marker not in os.listdir("."):
        open(hanging.marker, "w").close()
        time.sleep(1000)
    return len(text) % 5

hanging.marker = "has_hung"
"""


@pytest.fixture
def run(entry_points, tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)

    def run(name, *overrides):
        result = entry_points.run(
            "grpo.train", "experiment=gpt_oss_20b_lora", "wandb.mode=disabled", "eval.at_start=false",
            "eval.at_end=false", f"name={name}", "device=cpu", "dtype=float32", "threads=1",
            f"model.path={FIXTURES / 'tiny_mxfp4'}", f"model.tokenizer={FIXTURES / 'tokenizer_brief'}", "model.lora.rank=2",
            f"env.path={FIXTURES / 'arithmetic.jsonl'}", "env.match=none", "rollout.prompts_per_step=2",
            "rollout.group_size=4", "rollout.max_new_tokens=4", "steps=2", *overrides, folder=tmp_path, writes_report=False)
        assert result.code == 0, result.err
        lines = [json.loads(line) for line in (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        return lines, (tmp_path / f"runs/{name}/adapter/adapter_model.safetensors").read_bytes()

    return run


def test_a_reward_that_changes_the_process_and_forks_gives_the_run_of_one_that_does_not(run):
    plain, weights = run("plain", "env.rewards=mine.py:even")
    disturbed, same_weights = run("disturbed", "env.rewards={fn: mine.py:disturbing, name: even}")
    assert [line["step"] for line in disturbed] == [1, 2]  # once each: a forked child takes no step
    names = [name for name in plain[1] if not name.startswith(("time/", "memory/")) and not name.endswith("_per_s")]
    assert plain[1]["grad_norm"] > 0
    assert [[line[name] for name in names] for line in disturbed] == [[line[name] for name in names] for line in plain]
    assert weights == same_weights


def test_a_completion_whose_reward_hangs_is_left_out_and_the_run_goes_on(run):
    lines, _ = run("limited", "env.rewards=mine.py:hanging", "env.reward_timeout=3", "env.reward_workers=2",
                   "env.dry_run=false")
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["reward/errors"] for line in lines] == [1, 0]
