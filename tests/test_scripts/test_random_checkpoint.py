"""scripts/random_checkpoint.py: what it writes loads, and has the published sizes."""

import sys

import pytest
import torch
from paths import ROOT
from tiny_models import load, logits_of

from models.chat.tokenizer import Tokenizer


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import random_checkpoint

    return random_checkpoint


@pytest.mark.parametrize("form", ["mxfp4", "nf4"])
def test_a_random_checkpoint_loads_and_stays_finite_and_its_tokenizer_round_trips(form, script, tmp_path, monkeypatch):
    out = tmp_path / "tiny"
    arguments = [out, "--size", "tiny", "--experts", form, "--device", "cpu", "--max-shard-bytes", "2e7"]
    monkeypatch.setattr(sys, "argv", ["random_checkpoint.py", *map(str, arguments)])
    script.main()
    model = load(out)
    assert model.expert_format.name == form and len(list(out.glob("*.safetensors"))) > 1
    logits = logits_of(model, torch.arange(24).view(2, 12))
    assert torch.isfinite(logits).all() and 0.3 < logits.std().item() < 3
    tokenizer = Tokenizer.load(out)
    text = "hello world, ¿qué tal? 🙂\n\n\tdef f(x): return x ** 2"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.stop_ids == (200002, 200012, 199999) and tokenizer.start == 200006


@pytest.mark.parametrize("size, num_bytes, num_tensors", [("20b", 13_761_264_768, 459), ("120b", 65_248_815_744, 687)])
def test_random_checkpoints_have_the_published_sizes(script, size, num_bytes, num_tensors):
    plan = script.tensor_plan(script.model_config(size), form="mxfp4", seed=0, device=torch.device("cpu"))
    assert (sum(tensor.num_bytes for tensor in plan), len(plan)) == (num_bytes, num_tensors)
