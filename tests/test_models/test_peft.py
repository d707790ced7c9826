"""Adapters in PEFT's layout against a fixture that peft wrote, and by hand where it has no such case."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import load_model
from models.lora import LoraConfig, attach_lora
from models.peft_format import (
    attached_config,
    load_adapter,
    merged_weight,
    peft_tensors,
    read_adapter_config,
    save_adapter,
)
from models.tensor_files import CheckpointError

FIXTURES = Path(__file__).parent.parent / "fixtures"
BF16, LORA = FIXTURES / "tiny_bf16", FIXTURES / "tiny_bf16_lora"
PREFIX = "base_model.model.model.layers."


def base_model():
    return load_model(BF16, device="cpu", dtype=torch.float32)


def logits_of(model, ids):
    bounds = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
    with torch.no_grad():
        return model.logits(ids.flatten(), bounds).view(*ids.shape, -1)


def adapter_copy(tmp_path, *, settings=None, change=None):
    """The fixture's adapter with other settings and tensors."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    content = json.loads((LORA / "adapter_config.json").read_text()) | (settings or {})
    (folder / "adapter_config.json").write_text(json.dumps(content))
    tensors = load_file(LORA / "adapter_model.safetensors")
    if change is not None:
        tensors = change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def filled(model, seed=0):
    """Random values in everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.trainable_parameters().values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_the_fixtures_adapter_gives_its_golden_logits():
    model, golden = base_model(), load_file(LORA / "golden.safetensors")
    load_adapter(model, LORA)
    torch.testing.assert_close(logits_of(model, golden["input_ids"]), golden["logits"], rtol=0, atol=1e-4)
    with model.adapter_disabled():
        assert (logits_of(model, golden["input_ids"]) - golden["logits"]).abs().max() > 1


def test_an_adapter_read_and_saved_again_is_byte_identical(tmp_path):
    model = base_model()
    load_adapter(model, LORA)
    save_adapter(model, tmp_path / "out", base_model="openai/gpt-oss-tiny")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", LORA))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "out", LORA))
    for key in (
        "r",
        "lora_alpha",
        "peft_type",
        "bias",
        "use_rslora",
        "use_dora",
        "modules_to_save",
        "lora_dropout",
        "base_model_name_or_path",
    ):
        assert ours[key] == theirs[key], key
    assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"])
    assert ours["target_parameters"] == theirs["target_parameters"]
    assert ours["task_type"] == "CAUSAL_LM"
    assert not (tmp_path / "out/trained_weights.safetensors").exists()


def test_expert_tensors_are_expert_major_in_A_and_rank_major_in_B():
    model = base_model()
    attach_lora(model, LoraConfig(rank=3, alpha=6.0, targets=["experts"]), seed=0)
    filled(model)
    experts = model.model.layers[1].mlp.experts
    tensors = peft_tensors(model, ["experts"], read=lambda parameter: parameter)
    A = tensors[f"{PREFIX}1.mlp.experts.base_layer.lora_A.weight"]  # gate_up_proj
    B = tensors[f"{PREFIX}1.mlp.experts.base_layer.lora_B.weight"]
    assert A.shape == (8 * 3, 64) and B.shape == (192, 3 * 8)
    assert torch.equal(A[5 * 3 + 2], experts.gate_up_proj_lora_A[5, 2])
    assert torch.equal(B[:, 2 * 8 + 5], experts.gate_up_proj_lora_B[5, :, 2])
    assert torch.equal(tensors[f"{PREFIX}1.mlp.experts.lora_A.weight"][7 * 3], experts.down_proj_lora_A[7, 0])
    assert torch.equal(tensors[f"{PREFIX}1.mlp.experts.lora_B.weight"][:, 8 + 7], experts.down_proj_lora_B[7, :, 1])


def test_merged_weights_follow_the_formula_of_the_file_layout():
    model, tensors = base_model(), load_file(LORA / "adapter_model.safetensors")
    load_adapter(model, LORA)
    name, expert = "model.layers.2.mlp.experts.down_proj", 5
    weight = model.state_dict()[name][expert]  # [in, out]
    A = tensors[f"{PREFIX}2.mlp.experts.lora_A.weight"].view(8, 4, 96)[expert]
    B = tensors[f"{PREFIX}2.mlp.experts.lora_B.weight"].view(64, 4, 8)[:, :, expert]
    torch.testing.assert_close(merged_weight(model, name, weight, expert=expert), weight + 8 / 4 * (B @ A).T)
    name = "model.layers.0.self_attn.k_proj.weight"
    A, B = (tensors[f"{PREFIX}0.self_attn.k_proj.lora_{side}.weight"] for side in "AB")
    weight = model.state_dict()[name]
    torch.testing.assert_close(merged_weight(model, name, weight), weight + 8 / 4 * B @ A)
    untouched = model.state_dict()["model.layers.0.self_attn.k_proj.bias"]
    assert merged_weight(model, "model.layers.0.self_attn.k_proj.bias", untouched) is untouched


def test_router_norms_and_sinks_come_back(tmp_path):
    config = LoraConfig(rank=2, alpha=3.0, targets=["v_proj", "router"], train_sinks=True, train_norms=True)
    model = base_model()
    attach_lora(model, config, seed=1)
    filled(model)
    save_adapter(model, tmp_path / "out")
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert torch.equal(stored[f"{PREFIX}3.mlp.router.lora_B.weight"], model.model.layers[3].mlp.router.lora_B)
    assert len(stored) == 4 * 2 * 2
    trained = load_file(tmp_path / "out/trained_weights.safetensors")
    assert len(trained) == 4 * 3 + 1 and "model.norm.weight" in trained
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_parameters"] == ["mlp.router.weight"]
    assert read_adapter_config(tmp_path / "out") == config
    again = base_model()
    load_adapter(again, tmp_path / "out")
    ids = torch.arange(30).view(2, 15)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert (logits_of(base_model(), ids) - logits_of(model, ids)).abs().max() > 0.1
    assert again.trainable_parameters().keys() == model.trainable_parameters().keys()
    assert attached_config(again) == config


def test_rank_stabilised_scaling_divides_by_the_root_of_the_rank(tmp_path):
    folder = adapter_copy(tmp_path, settings={"use_rslora": True})
    assert read_adapter_config(folder).alpha == pytest.approx(8 * math.sqrt(4))
    model = base_model()
    load_adapter(model, folder)
    assert model.model.layers[0].self_attn.q_proj.lora_scale == pytest.approx(8 / math.sqrt(4))
    assert model.model.layers[0].mlp.experts.lora_scale == pytest.approx(4.0)
    save_adapter(model, tmp_path / "out")  # as plain scaling, alpha / r
    content = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert content["lora_alpha"] == pytest.approx(16) and not content["use_rslora"]


@pytest.mark.parametrize("half, other", [("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")])
def test_an_adapter_on_one_expert_projection_leaves_the_other_without_effect(tmp_path, half, other):
    inner = {"gate_up_proj": ".mlp.experts.base_layer.lora_", "down_proj": ".mlp.experts.lora_"}

    def only_half(tensors):
        kept = {name: tensor for name, tensor in tensors.items() if inner[other] not in name}
        return {
            name.replace(".base_layer", ""): tensor for name, tensor in kept.items()
        }  # as peft names a single wrapper

    folder = adapter_copy(tmp_path, settings={"target_parameters": [f"mlp.experts.{half}"]}, change=only_half)
    model, whole = base_model(), base_model()
    load_adapter(model, folder)
    load_adapter(whole, LORA)
    ours, reference = model.model.layers[1].mlp.experts, whole.model.layers[1].mlp.experts
    assert torch.equal(ours.get_parameter(f"{half}_lora_B"), reference.get_parameter(f"{half}_lora_B"))
    assert torch.equal(ours.get_parameter(f"{half}_lora_A"), reference.get_parameter(f"{half}_lora_A"))
    assert not ours.get_parameter(f"{other}_lora_B").any()
    assert ours.get_parameter(f"{other}_lora_A").any()  # or it could never train
    save_adapter(model, tmp_path / "out")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert written.keys() == load_file(LORA / "adapter_model.safetensors").keys()  # both halves, as vLLM asserts
    assert not written[f"{PREFIX}1{inner[other]}B.weight"].any()


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "r=0"),
        ({"r": "4"}, "r='4'"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"\['lm_head'\]"),
        ({"target_modules": ".*"}, "target_modules"),
        ({"target_parameters": ["mlp.experts.gate_up_proj_bias"]}, "gate_up_proj_bias"),
    ],
)
def test_settings_that_would_change_the_result_are_refused_by_name(tmp_path, settings, named):
    folder = adapter_copy(tmp_path, settings=settings)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: .*{named}"):
        load_adapter(base_model(), folder)


def test_all_linear_means_the_attention_projections(tmp_path):
    folder = adapter_copy(tmp_path, settings={"target_modules": "all-linear", "target_parameters": None})
    assert read_adapter_config(folder).targets == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_an_adapter_whose_settings_differ_from_the_models_is_refused():
    model = base_model()
    attach_lora(model, LoraConfig(rank=8, alpha=16.0, targets=["q_proj"]), seed=0)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(model, LORA)
    message = str(caught.value)
    assert (
        "rank: 8 in the model, 4 in the adapter" in message and "alpha: 16.0 in the model, 8 in the adapter" in message
    )
    assert "targets: ['q_proj'] in the model" in message


def test_tensors_that_do_not_fit_are_listed_together(tmp_path):
    missing, misshapen = f"{PREFIX}0.self_attn.q_proj.lora_A.weight", f"{PREFIX}1.self_attn.q_proj.lora_A.weight"

    def change(tensors):
        del tensors[missing]
        return tensors | {misshapen: torch.zeros(4, 65), "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}

    with pytest.raises(CheckpointError) as caught:
        load_adapter(base_model(), adapter_copy(tmp_path, change=change))
    message = str(caught.value)
    assert f"missing: {missing};" in message and f"{misshapen} is [4, 65], expected [4, 64]" in message
    assert "not used: base_model.model.lm_head.lora_A.weight;" in message


def test_missing_and_truncated_files_are_named(tmp_path):
    folder = adapter_copy(tmp_path)
    with open(folder / "adapter_model.safetensors", "rb+") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: .*truncated or damaged"):
        load_adapter(base_model(), folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: not found"):
        load_adapter(base_model(), folder)
    with pytest.raises(CheckpointError, match="adapter_config.json: not found"):
        load_adapter(base_model(), tmp_path)


def test_saving_replaces_an_adapter_and_nothing_else(tmp_path):
    model = base_model()
    attach_lora(model, LoraConfig(rank=2, alpha=4.0, targets=["q_proj"], train_norms=True), seed=0)
    save_adapter(model, tmp_path / "out")
    filled(model)
    model.model.norm.weight.requires_grad_(False)
    save_adapter(model, tmp_path / "out")
    again = base_model()
    load_adapter(again, tmp_path / "out")
    assert torch.equal(again.model.layers[0].self_attn.q_proj.lora_B, model.model.layers[0].self_attn.q_proj.lora_B)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out/README.md").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and holds README.md"):
        save_adapter(model, tmp_path / "out")
    with pytest.raises(ValueError, match="carries no adapter"):
        save_adapter(base_model(), tmp_path / "other")


def test_an_adapter_loads_over_a_packed_base(tmp_path):
    """The same adapter on packed and on dequantised experts gives the same function."""
    packed, dense = (
        load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32, experts=form)
        for form in ("mxfp4", "bf16")
    )
    attach_lora(packed, LoraConfig(rank=2, alpha=4.0, targets=["experts", "o_proj"]), seed=0)
    filled(packed)
    save_adapter(packed, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    load_adapter(dense, tmp_path / "copy")
    ids = torch.arange(30).view(2, 15)
    torch.testing.assert_close(logits_of(dense, ids), logits_of(packed, ids), rtol=0, atol=1e-4)
