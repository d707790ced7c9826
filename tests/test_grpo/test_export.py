"""scripts/export.py on a run that trained an adapter: alone, merged, and refused requests."""

from functools import partial
from pathlib import Path

import pytest
import torch

from grpo.policy import load_run_policy
from models.checkpoint import load_model
from models.peft_format import load_adapter, read_adapter_config

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def run_dir(entry_points, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    lora = "+model.lora={rank:4,alpha:12,targets:[q_proj,experts,router],train_norms:true,train_sinks:true}"
    done = entry_points.run("grpo.train", "+experiment=smoke", f"output_dir={folder}", "name=adapted", "model.train=lora", lora,
                            "optim.lr=0.05", writes_report=False)
    assert done.code == 0, done.err
    return folder / "adapted"


@pytest.fixture
def export(entry_points):
    return partial(entry_points.run, "export", path=(ROOT / "scripts",))


def logits_of(model):
    with torch.no_grad():
        return model.logits(torch.arange(40), torch.tensor([0, 40], dtype=torch.int32))


def policy_of(run_dir):
    return load_run_policy(run_dir, step=None, device=torch.device("cpu"), dtype=torch.float32)[0]


def test_a_merged_export_is_the_policy_of_the_run(export, run_dir, tmp_path):
    done = export(run_dir, tmp_path / "out", "--merge", "--dtype", "float32")
    assert done.code == 0, done.err
    policy = policy_of(run_dir)
    merged = logits_of(load_model(tmp_path / "out", device="cpu", dtype=torch.float32))
    torch.testing.assert_close(merged, logits_of(policy), rtol=0, atol=1e-4)
    with policy.adapter_disabled():
        assert (logits_of(policy) - merged).abs().max() > 0.01  # the adapter was there to merge
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run_dir / "tokenizer" / name).read_bytes()


def test_an_export_without_merge_is_the_adapter_that_the_run_wrote(export, run_dir, tmp_path):
    done = export(run_dir, tmp_path / "out")
    assert done.code == 0, done.err
    assert read_adapter_config(tmp_path / "out") == read_adapter_config(run_dir / "adapter")
    for name in ("adapter_model.safetensors", "trained_weights.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (run_dir / "adapter" / name).read_bytes()
    policy = policy_of(run_dir)
    expected = logits_of(policy)
    for parameter in policy.trainable_parameters().values():
        parameter.data.fill_(0.5)
    assert not torch.equal(logits_of(policy), expected)
    load_adapter(policy, tmp_path / "out")
    assert torch.equal(logits_of(policy), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [(["--step", "99"], "99"), (["--experts", "bf16"], "add --merge"), (["--adapter", "x"], "a run has its own")],
)
def test_requests_that_make_no_sense_end_in_one_line(export, run_dir, tmp_path, arguments, message):
    done = export(run_dir, tmp_path / "out", *arguments)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
