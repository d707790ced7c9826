"""Each ported recipe runs a step with a tiny model, all in one process."""

import json
import subprocess
import sys

import pytest
from paths import ROOT
from test_port import DATA, RECIPES, place

pytestmark = pytest.mark.slow

# fewer and shorter completions; what the recipe says of loss, advantages, KL, corrections and data stays
SMALL = ("device=cpu", "dtype=float32", "threads=1", "steps=1", "model.lora.rank=2", "rollout.prompts_per_step=4",
         "rollout.group_size=2", "rollout.max_new_tokens=6", "rollout.refill_rounds=0", "rollout.max_staleness=0",
         "env.match=none", "env.rewards=[{fn: my_rewards.py:spread}]", "optim.mask_truncated=false", "eval.every=0",
         "eval.at_start=false", "eval.at_end=false", "checkpoint.every=0", "log.completions_every=0", "wandb.mode=disabled")
REWARDS = """
import zlib

def spread(completions, completion_ids, **columns):
    return [zlib.crc32(repr(ids).encode()) % 11 / 10 for ids in completion_ids]
"""
PROGRAM = """
import json, sys
from grpo.configuration.launch import load_config
from grpo.train import run_training
for words in json.load(sys.stdin):
    config = load_config("train", words)
    assert run_training(config) == 0, words
"""


def test_ten_recipes_run(tmp_path):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    jobs = []
    for path in RECIPES:
        buffer = ["rollout.overlong_buffer=4"] if path.stem == "verl_dapo" else []
        jobs.append([*place(path, tmp_path), *DATA, *SMALL, *buffer, f"name={path.stem}", f"output_dir={tmp_path / 'runs'}"])
    result = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps(jobs), cwd=tmp_path, capture_output=True, text=True,
                            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    for path in RECIPES:
        rows = [json.loads(line) for line in (tmp_path / "runs" / path.stem / "metrics.jsonl").read_text().splitlines()]
        step, = [row for row in rows if "grad_norm" in row]
        assert step["grad_norm"] > 0, path.name
