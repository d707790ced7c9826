"""Our exports in transformers and our adapters in PEFT give our logits.

The peers run in one process of their own: the interpreter in GRPO_PEER_PYTHON, or this one, if it has transformers
and peft.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from paths import FIXTURES, ROOT
from safetensors import safe_open

from grpo.run.export_files import write_adapter, write_model
from grpo.run.model_card import Origin
from models.chat.tokenizer import Tokenizer
from models.formats.hugging_face import load_model, save_model, save_original, tokenizer_files
from models.formats.peft import load_adapter, save_adapter
from models.lora import LoraConfig, attach_lora

BF16, MXFP4 = FIXTURES / "tiny_bf16", FIXTURES / "tiny_mxfp4"
IDS = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT = "hello world, ¿qué tal? 🙂\n\n\tdef f(x): return x ** 2"
TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "experts": ["experts"],
    "everything": ["q_proj", "k_proj", "v_proj", "o_proj", "router", "experts"],
}


def load(folder):
    return load_model(folder, device="cpu", dtype=torch.float32)


def logits_of(model):
    bounds = torch.arange(0, IDS.numel() + 1, IDS.shape[1], dtype=torch.int32)
    with torch.no_grad():
        return model.logits(IDS.flatten(), bounds).view(*IDS.shape, -1)


def with_adapter(folder, targets):
    model = load(folder)
    attach_lora(model, LoraConfig(rank=3, alpha=6.0, targets=targets), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.trainable_parameters().values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.fixture(scope="module")
def peer_python():
    python = os.environ.get("GRPO_PEER_PYTHON", sys.executable)
    probe = "import importlib.util as u, sys; sys.exit(not (u.find_spec('transformers') and u.find_spec('peft')))"
    if subprocess.run([python, "-c", probe], cwd="/", capture_output=True).returncode:
        pytest.skip(f"{python} has no transformers and peft; set GRPO_PEER_PYTHON to one that has")
    return python


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Name -> (checkpoint, adapter or None, our logits)."""
    folder, made = tmp_path_factory.mktemp("exports"), {}
    tokenizer = {path.name: path for path in tokenizer_files(FIXTURES / "tokenizer_compact")}
    save_model(load(BF16), folder / "bf16", merge_lora=False, beside=tokenizer)
    made["bf16"] = (folder / "bf16", None, logits_of(load(BF16)))
    packed = load(MXFP4)
    save_model(packed, folder / "mxfp4", merge_lora=False, max_shard_bytes=100_000)
    made["mxfp4"] = (folder / "mxfp4", None, logits_of(packed))
    save_model(packed, folder / "dense", merge_lora=False, experts="bf16")
    made["mxfp4 as bf16"] = (folder / "dense", None, logits_of(packed))
    save_original(packed, folder / "original", merge_lora=False)
    save_model(load(folder / "original"), folder / "back", merge_lora=False)
    made["from original"] = (folder / "back", None, logits_of(packed))
    merged = with_adapter(MXFP4, TARGETS["everything"])
    save_model(merged, folder / "merged", merge_lora=True, experts="bf16", dtype=torch.float32)
    made["merged"] = (folder / "merged", None, logits_of(merged))
    for name, targets in TARGETS.items():
        model = with_adapter(BF16, targets)
        save_adapter(model, folder / name, base_model=str(BF16))
        made[f"adapter on {name}"] = (BF16, folder / name, logits_of(model))
    base = folder / "base"  # with what the hub's folders hold beside the weights
    shutil.copytree(BF16, base)
    for path in (FIXTURES / "tokenizer_compact").iterdir():
        shutil.copyfile(path, base / path.name)
    (base / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}<|call|>")
    (base / "generation_config.json").write_text('{"do_sample": true, "eos_token_id": [3, 5], "temperature": 0.75}')
    model, origin = with_adapter(base, TARGETS["experts"]), Origin(str(base), base)
    write_adapter(model, folder / "written adapter", origin)
    made["written adapter"] = (base, folder / "written adapter", logits_of(model))
    write_model(model, folder / "written", origin, merge_lora=True, dtype=torch.float32)
    made["written model"] = (folder / "written", None, logits_of(model))
    model = load(BF16)
    load_adapter(model, FIXTURES / "tiny_bf16_lora")
    made["fixture adapter"] = (BF16, FIXTURES / "tiny_bf16_lora", logits_of(model))
    subprocess.run(
        [sys.executable, ROOT / "scripts/random_checkpoint.py", folder / "random", "--size", "tiny", "--device", "cpu"],
        check=True,
        capture_output=True,
    )
    made["random"] = (folder / "random", None, logits_of(load(folder / "random")))
    return made


@pytest.fixture(scope="module")
def peer(peer_python, exports, tmp_path_factory):
    """Logits of each export in transformers, and what was said while loading."""
    folder = tmp_path_factory.mktemp("peer")
    jobs = [
        {
            "name": name,
            "checkpoint": str(checkpoint),
            "adapter": adapter and str(adapter),
            "input_ids": IDS.tolist(),
            "text": TEXT if ((adapter or checkpoint) / "tokenizer.json").exists() else None,
        }
        for name, (checkpoint, adapter, _) in exports.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [peer_python, ROOT / "tests/test_models/peer_logits.py", "jobs.json", "out.safetensors"],
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with safe_open(folder / "out.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["jobs"])


CHECKPOINTS = ["bf16", "mxfp4", "mxfp4 as bf16", "from original", "merged", "random", "written model"]
ADAPTERS = [*(f"adapter on {name}" for name in TARGETS), "fixture adapter", "written adapter"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_export_reloads_in_transformers_with_equal_logits(peer, exports, name):
    logits, said = peer
    assert said[name]["missing_keys"] == said[name]["unexpected_keys"] == said[name]["mismatched_keys"] == []
    torch.testing.assert_close(logits[name], exports[name][2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_loads_in_peft_with_equal_logits(peer, exports, name):
    logits, said = peer
    assert said[name]["adapter_warnings"] == []
    torch.testing.assert_close(logits[name], exports[name][2], rtol=0, atol=1e-4)
    assert (logits[name] - exports["bf16"][2]).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("name", ["bf16", "random"])
def test_the_exported_tokenizer_gives_the_same_ids_in_transformers(peer, exports, name):
    _, said = peer
    assert said[name]["text_ids"] == Tokenizer.load(exports[name][0]).encode(TEXT)


@pytest.mark.parametrize("name", ["written adapter", "written model"])
def test_tokenizer_chat_template_and_generation_settings_load_from_an_export(peer, exports, name):
    said = peer[1][name]
    folder = exports[name][1] or exports[name][0]
    assert said["text_ids"] == Tokenizer.load(folder).encode(TEXT)
    assert said["chat"] == "hello<|call|>"
    assert said["generation"]["eos_token_id"] == [3, 5] and said["generation"]["temperature"] == 0.75
    if name == "written adapter":
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert base == str(exports[name][0])
