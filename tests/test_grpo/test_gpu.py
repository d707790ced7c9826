"""The same code on a CUDA device: goldens, sampling and a run from start to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.batch import Prompt, pack
from grpo.rollout import Sampler
from models.checkpoint import load_model

ROOT = Path(__file__).parent.parent.parent
FIXTURES = ROOT / "tests/fixtures"

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("folder", ["tiny_bf16", "tiny_mxfp4"])
def test_the_goldens_agree_on_cuda(folder):
    command = [sys.executable, ROOT / "scripts/compare_logits.py", FIXTURES / folder, FIXTURES / folder / "golden.safetensors",
               "--device", "cuda"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["logits_max_abs"] <= 1e-4 and result["packed_max_abs"] <= 1e-4, result
    assert result["logprob_max_abs"] <= 5e-5 and result["grad_max_rel"] <= 1e-4, result
    assert result["greedy_equal"] is True


def sample(device, dtype):
    model = load_model(FIXTURES / "tiny_mxfp4", device=device, dtype=dtype)
    sampler = Sampler(model, [1], max_batch=16, seed=3)
    prompts = [Prompt(i, list(range(5 + i, 12 + 2 * i)), {}) for i in range(4)]
    completions = sampler.generate(prompts, step=2, num_samples=4, max_new_tokens=20, temperature=0.7)
    return model, completions


def test_a_completion_is_the_same_on_cuda_and_cpu():
    (_, on_cuda), (_, on_cpu) = sample("cuda", torch.float32), sample("cpu", torch.float32)
    assert [c.completion_ids for c in on_cuda] == [c.completion_ids for c in on_cpu]


def test_sampler_and_trainer_agree_on_cuda():
    model, completions = sample("cuda", torch.float32)
    batch = pack(completions, [0.0] * len(completions)).to(model.device)
    with torch.no_grad():
        log_probs, _ = model.log_probs(batch.tokens, batch.cu_seqlens, temperature=0.7, mask=batch.loss_mask)
    assert (log_probs - batch.sampler_log_probs)[batch.loss_mask].abs().max() <= 5e-5


def test_a_run_trains_on_cuda(tmp_path):
    (tmp_path / "reward.py").write_text(
        "def even(completions, completion_ids, **columns):\n"
        "    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]\n"
    )
    command = [
        sys.executable, "-m", "grpo.train", "+experiment=smoke", "device=cuda", "wandb.mode=disabled", "name=gpu",
        f"output_dir={tmp_path}", "warmup=null", "env=dataset", "env.path=tests/fixtures/arithmetic.jsonl",
        "env.held_out_fraction=0.25", "env.match=none", "env.answer_key=null", "model.tokenizer=tests/fixtures/tokenizer_compact",
        f'env.rewards=[{{fn: "{tmp_path}/reward.py:even"}}]',
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "gpu/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "sampling/log_prob_diff/max" in line]
    assert len(steps) == 2 and all(line["sampling/log_prob_diff/max"] <= 5e-5 for line in steps), steps
    assert all(line["grad_norm"] > 0 for line in steps)
