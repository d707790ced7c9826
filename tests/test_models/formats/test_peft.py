"""Adapters in PEFT's layout against a fixture that peft wrote, and by hand where it has no such case."""

import json
import math
import re
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BF16, LORA, MXFP4, fill_trainable, golden, load, logits_of

from models.formats.files import CheckpointError
from models.formats.peft import (
    check_adapter,
    load_adapter,
    merged_weight,
    peft_tensors,
    read_adapter_config,
    save_adapter,
)
from models.lora import LoraConfig, attach_lora

PREFIX = "base_model.model.model.layers."


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


def test_the_fixtures_adapter_gives_its_golden_logits():
    model, expected = load(BF16), golden(LORA)
    load_adapter(model, LORA)
    torch.testing.assert_close(logits_of(model, expected["input_ids"]), expected["logits"], rtol=0, atol=1e-4)
    with model.adapter_disabled():
        assert (logits_of(model, expected["input_ids"]) - expected["logits"]).abs().max() > 1


def test_an_adapter_read_and_saved_again_is_byte_identical(tmp_path):
    model = load(BF16)
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
    model = load(BF16)
    attach_lora(model, LoraConfig(rank=3, alpha=6.0, targets=["experts"]), seed=0)
    fill_trainable(model)
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
    model, tensors = load(BF16), load_file(LORA / "adapter_model.safetensors")
    load_adapter(model, LORA)
    name, expert = "model.layers.2.mlp.experts.down_proj", 5
    weight = model.state_dict()[name][expert].T  # [out, in]
    A = tensors[f"{PREFIX}2.mlp.experts.lora_A.weight"].view(8, 4, 96)[expert]
    B = tensors[f"{PREFIX}2.mlp.experts.lora_B.weight"].view(64, 4, 8)[:, :, expert]
    torch.testing.assert_close(merged_weight(model, name, weight, expert=expert), weight + 8 / 4 * B @ A)
    name = "model.layers.0.self_attn.k_proj.weight"
    A, B = (tensors[f"{PREFIX}0.self_attn.k_proj.lora_{side}.weight"] for side in "AB")
    weight = model.state_dict()[name]
    torch.testing.assert_close(merged_weight(model, name, weight), weight + 8 / 4 * B @ A)
    untouched = model.state_dict()["model.layers.0.self_attn.k_proj.bias"]
    assert merged_weight(model, "model.layers.0.self_attn.k_proj.bias", untouched) is untouched


def test_router_norms_and_sinks_come_back(tmp_path):
    config = LoraConfig(rank=2, alpha=3.0, targets=["v_proj", "router"], train_sinks=True, train_norms=True)
    model = load(BF16)
    attach_lora(model, config, seed=1)
    fill_trainable(model)
    save_adapter(model, tmp_path / "out")
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert torch.equal(stored[f"{PREFIX}3.mlp.router.lora_B.weight"], model.model.layers[3].mlp.router.lora_B)
    assert len(stored) == 4 * 2 * 2
    trained = load_file(tmp_path / "out/trained_weights.safetensors")
    assert len(trained) == 4 * 3 + 1 and "model.norm.weight" in trained
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_parameters"] == ["mlp.router.weight"]
    assert read_adapter_config(tmp_path / "out") == config
    again = load(BF16)
    load_adapter(again, tmp_path / "out")
    ids = torch.arange(30).view(2, 15)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert (logits_of(load(BF16), ids) - logits_of(model, ids)).abs().max() > 0.1
    assert again.trainable_parameters().keys() == model.trainable_parameters().keys()
    assert again.adapter == config


def test_rank_stabilised_scaling_divides_by_the_root_of_the_rank(tmp_path):
    folder = adapter_copy(tmp_path, settings={"use_rslora": True})
    assert read_adapter_config(folder).alpha == pytest.approx(8 * math.sqrt(4))
    model = load(BF16)
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
    model, whole = load(BF16), load(BF16)
    with pytest.warns(UserWarning, match=f"holds nothing for {other} in layers 0, 1, 2, 3:"):
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
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
        ({"rank_pattern": {"(": 8}}, r"'\('"),
        ({"layers_to_transform": "1"}, "layers_to_transform"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "r=0"),
        ({"r": "4"}, "r='4'"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"\['lm_head'\]"),
        ({"target_modules": ".*"}, "target_modules"),
        ({"target_modules": ["embed_tokens"]}, r"\['model.embed_tokens'\]"),
        ({"target_modules": "("}, "regular expression"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'.*path_initial_model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights.*merge_and_unload"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"init_lora_weights": "of 2031"}, "init_lora_weights"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"setting_of_2031": {"a": 1}}, "setting_of_2031"),
        ({"target_parameters": ["mlp.experts.gate_up_proj_bias"]}, "gate_up_proj_bias"),
    ],
)
def test_settings_that_would_change_the_result_are_refused_by_name(tmp_path, settings, named):
    folder = adapter_copy(tmp_path, settings=settings)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: .*{named}"):
        load_adapter(load(BF16), folder)


def only(*parts, layers=(0, 1, 2, 3)):
    """Of an adapter's tensors those whose names hold one of `parts`, in some layers."""
    starts = tuple(f"{PREFIX}{layer}." for layer in layers)
    return lambda tensors: {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(starts) and any(part in name for part in parts)
    }


UNSLOTH_REGEX = (
    "(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    ".*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
)


@pytest.mark.parametrize(
    "modules",
    [
        "all-linear",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        UNSLOTH_REGEX,
        r".*self_attn\.[qkvo]_proj",
        None,
    ],
)
def test_targets_are_those_of_the_tensors_however_the_settings_spell_them(tmp_path, modules):
    settings = {"target_modules": modules, "target_parameters": None, "setting_of_2031": None}
    folder = adapter_copy(tmp_path, settings=settings, change=only("self_attn"))
    assert read_adapter_config(folder).targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    model, whole = load(BF16), load(BF16)
    load_adapter(model, folder)
    load_adapter(whole, LORA)
    name = "model.layers.3.self_attn.v_proj.lora_B"
    assert torch.equal(model.get_parameter(name), whole.get_parameter(name))


def test_experts_of_some_layers_load_and_the_others_start_without_effect(tmp_path):
    """The recipe of OpenAI's cookbook names the experts layer by layer."""
    parameters = [f"{layer}.mlp.experts.{name}" for layer in (1, 3) for name in ("gate_up_proj", "down_proj")]
    experts = only("experts", layers=(1, 3))
    settings = {"target_parameters": parameters}
    folder = adapter_copy(tmp_path, settings=settings, change=lambda all: only("self_attn")(all) | experts(all))
    model, whole = load(BF16), load(BF16)
    with pytest.warns(UserWarning, match="nothing for gate_up_proj in layers 0, 2; down_proj in layers 0, 2:"):
        load_adapter(model, folder)
    load_adapter(whole, LORA)
    for layer, block in enumerate(whole.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            if layer not in (1, 3):
                block.mlp.experts.get_parameter(f"{name}_lora_B").data.zero_()
    ids = torch.arange(30).view(2, 15)
    torch.testing.assert_close(logits_of(model, ids), logits_of(whole, ids), rtol=0, atol=0)
    untouched = model.model.layers[0].mlp.experts
    assert untouched.gate_up_proj_lora_A.any() and untouched.gate_up_proj_lora_A.requires_grad  # or it could never train


def test_ranks_and_alphas_of_single_modules_load_into_one_rank(tmp_path):
    """By hand: q of layer 1 has rank 2 and alpha 12, so 6 B A where a module of the rest has 8 / 4 B A."""
    q, key = "model.layers.1.self_attn.q_proj", f"{PREFIX}1.self_attn.q_proj.lora_"

    def change(tensors):
        return tensors | {
            f"{key}A.weight": tensors[f"{key}A.weight"][:2],
            f"{key}B.weight": tensors[f"{key}B.weight"][:, :2].contiguous(),
        }

    settings = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {r"layers\.1\..*\.q_proj": 12}}
    folder = adapter_copy(tmp_path, settings=settings, change=change)
    assert (read_adapter_config(folder).rank, read_adapter_config(folder).alpha) == (4, 8)
    model, tensors = load(BF16), load_file(folder / "adapter_model.safetensors")
    load_adapter(model, folder)
    weight = model.get_parameter(f"{q}.weight")
    wanted = weight + 6 * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
    torch.testing.assert_close(merged_weight(model, f"{q}.weight", weight), wanted, rtol=0, atol=1e-6)
    assert model.get_parameter(f"{q}.lora_A")[2:].any() and not model.get_parameter(f"{q}.lora_B")[:, 2:].any()
    other = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.get_parameter(f"{other}.lora_B"), tensors[f"{PREFIX}0.self_attn.q_proj.lora_B.weight"])


def test_a_pair_of_matrices_for_each_expert_goes_to_its_expert(tmp_path):
    """As models that hold experts one by one (bitsandbytes' packing) name them."""
    A, B = torch.randn(4, 96), torch.randn(64, 4)
    key = f"{PREFIX}2.mlp.experts.down_projs.5.lora_"
    settings = {"target_modules": r".*down_projs\.5", "target_parameters": None}
    folder = adapter_copy(
        tmp_path, settings=settings, change=lambda tensors: {f"{key}A.weight": A, f"{key}B.weight": B}
    )
    model = load(BF16)
    with pytest.warns(UserWarning, match="down_proj in layers 0, 1, 3; 63 of 64 expert matrices"):
        load_adapter(model, folder)
    experts = model.model.layers[2].mlp.experts
    assert torch.equal(experts.down_proj_lora_A[5], A) and torch.equal(experts.down_proj_lora_B[5], B)
    assert not experts.down_proj_lora_B[:5].any() and not experts.gate_up_proj_lora_B.any()


@pytest.mark.parametrize(
    "settings, present",
    [
        ({"target_modules": ["q_proj", "v_proj"]}, True),
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1, 2]}, False),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 3, "layers_pattern": "layers"}, True),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.3.self_attn.v_proj"]}, False),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.3\..*v_proj"}, False),
        ({"target_modules": r".*\.3\.self_attn\.v_proj"}, True),
    ],
)
def test_a_tensor_that_the_settings_choose_must_be_in_the_file(tmp_path, settings, present):
    """v of layer 3 is cut off."""
    def change(tensors):
        return only("q_proj", "v_proj", layers=(0, 1, 2))(tensors) | only("q_proj", layers=(3,))(tensors)

    folder = adapter_copy(tmp_path, settings={"target_parameters": None, **settings}, change=change)
    if present:
        with pytest.raises(CheckpointError, match="missing: model.layers.3.self_attn.v_proj;"):
            load_adapter(load(BF16), folder)
    else:
        with pytest.warns(UserWarning, match="nothing for v_proj in layers 3:"):
            load_adapter(load(BF16), folder)


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path):
    def change(tensors):
        return tensors | {name.replace(".3.", ".4."): tensor.clone() for name, tensor in tensors.items() if ".3.self" in name}

    with pytest.raises(CheckpointError, match=r"not used: .*layers\.4\.self_attn.*The base has 4 layers"):
        load_adapter(load(BF16), adapter_copy(tmp_path, change=change))


def test_a_pickled_adapter_is_refused_with_the_way_to_convert_it(tmp_path, monkeypatch):
    folder = adapter_copy(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_model.bin is not read; convert it with: (.*) in that folder") as caught:
        load_adapter(load(BF16), folder)
    command = str(caught.value).partition("convert it with: ")[2].removesuffix(" in that folder")
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(folder)
    exec(code, {})
    load_adapter(load(BF16), folder)


def test_an_adapter_whose_settings_differ_from_the_models_is_refused():
    model = load(BF16)
    attach_lora(model, LoraConfig(rank=8, alpha=16.0, targets=["q_proj"]), seed=0)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(model, LORA)
    message = str(caught.value)
    assert (
        "rank: 8 in the model, 4 in the adapter" in message and "alpha: 16 in the model, 8 in the adapter" in message
    )
    assert "targets: ['q_proj'] in the model" in message
    assert "set model.lora.rank=4 model.lora.alpha=8 model.lora.targets=[q_proj,k_proj,v_proj,o_proj,experts]" in message


def test_an_adapter_that_targets_and_holds_nothing_is_refused_by_its_folder(tmp_path):
    folder = adapter_copy(tmp_path, settings={"target_modules": [], "target_parameters": []}, change=lambda tensors: {})
    message = f"^{re.escape(str(folder))}: the adapter targets nothing and holds no norms or sinks, so nothing would train"
    with pytest.raises(CheckpointError, match=message):
        check_adapter(folder, LoraConfig(rank=4, alpha=8.0))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(load(BF16), folder)


def test_tensors_that_do_not_fit_are_listed_together(tmp_path):
    missing, misshapen = f"{PREFIX}0.self_attn.q_proj.lora_A.weight", f"{PREFIX}1.self_attn.q_proj.lora_A.weight"

    def change(tensors):
        del tensors[missing]
        return tensors | {misshapen: torch.zeros(4, 65), "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}

    with pytest.raises(CheckpointError) as caught:
        load_adapter(load(BF16), adapter_copy(tmp_path, change=change))
    message = str(caught.value)
    assert f"missing: {missing};" in message and f"{misshapen} is [4, 65], expected [4, 64]" in message
    assert "not used: base_model.model.lm_head.lora_A.weight;" in message


def test_missing_and_truncated_files_are_named(tmp_path):
    folder = adapter_copy(tmp_path)
    with open(folder / "adapter_model.safetensors", "rb+") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: .*truncated or damaged"):
        load_adapter(load(BF16), folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: not found"):
        load_adapter(load(BF16), folder)
    with pytest.raises(CheckpointError, match="adapter_config.json: not found"):
        load_adapter(load(BF16), tmp_path)


def test_saving_replaces_an_adapter_and_nothing_else(tmp_path):
    model = load(BF16)
    attach_lora(model, LoraConfig(rank=2, alpha=4.0, targets=["q_proj"], train_norms=True), seed=0)
    save_adapter(model, tmp_path / "out")
    fill_trainable(model)
    model.model.norm.weight.requires_grad_(False)
    save_adapter(model, tmp_path / "out")
    again = load(BF16)
    load_adapter(again, tmp_path / "out")
    assert torch.equal(again.model.layers[0].self_attn.q_proj.lora_B, model.model.layers[0].self_attn.q_proj.lora_B)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out/README.md").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and holds README.md"):
        save_adapter(model, tmp_path / "out")
    with pytest.raises(ValueError, match="carries no adapter"):
        save_adapter(load(BF16), tmp_path / "other")


def test_an_adapter_loads_over_a_packed_base(tmp_path):
    """The same adapter on packed and on dequantised experts gives the same function."""
    packed, dense = load(MXFP4), load(MXFP4, experts="bf16")
    attach_lora(packed, LoraConfig(rank=2, alpha=4.0, targets=["experts", "o_proj"]), seed=0)
    fill_trainable(packed)
    save_adapter(packed, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    load_adapter(dense, tmp_path / "copy")
    ids = torch.arange(30).view(2, 15)
    torch.testing.assert_close(logits_of(dense, ids), logits_of(packed, ids), rtol=0, atol=1e-4)
