"""Runs of two GPUs that hold a model's experts together, by NCCL: the bytes of one GPU."""

import json

import pytest
import torch
from started_ranks import ADAPTER, RUN, launch_alone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
SETTINGS = (*RUN, *ADAPTER, "device=cuda", "dtype=bfloat16")


def launch(num_ranks, folder, modules, *arguments):
    """A finished run's folder. One rank is started without torchrun."""
    launch_alone(num_ranks, modules, *SETTINGS, f"output_dir={folder}", *arguments)
    return folder / "run"


def metrics(run_dir):
    """The lines without what depends on the clock and on the memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items()
             if not name.startswith(("time/", "memory/")) and not name.endswith("_per_s")} for line in lines]


def assert_equal_runs(run, other):
    assert metrics(run) == metrics(other)
    for file in ("completions.jsonl", "adapter/adapter_model.safetensors", "checkpoints/step_000010/tensors.safetensors"):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file


def test_two_gpus_that_share_experts_have_the_bytes_of_one(modules, tmp_path):
    one = launch(1, tmp_path / "one", modules)
    assert all(line.get("sampling/log_prob_diff/max", 0.0) == 0.0 for line in metrics(one))
    two = launch(2, tmp_path / "two", modules, "distributed.expert_parallel=2")
    assert_equal_runs(two, one)


def test_a_run_of_two_gpus_that_share_experts_goes_on_with_one(modules, tmp_path):
    one = launch(1, tmp_path / "one", modules)
    launch(2, tmp_path / "two", modules, "distributed.expert_parallel=2", "steps=4")
    assert_equal_runs(launch(1, tmp_path / "two", modules, "resume=true"), one)
