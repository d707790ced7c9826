"""Checkpoints in and out: golden fixtures, byte equality of what nothing touched, and damaged files."""

import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file, save_file
from tiny_models import BF16, LORA, MXFP4, fill_trainable, golden, load, logits_of

from models.formats.files import CheckpointError, StoredTensor
from models.formats.hugging_face import save_model, save_original, tokenizer_files
from models.formats.peft import load_adapter
from models.lora import TARGETS, LoraConfig, attach_lora, set_full_training


def stored_tensors(folder):
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        if path.name != "golden.safetensors":
            tensors |= load_file(path)
    return tensors


def same_bytes(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [
        name for name in ours if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ]
    assert different == []


def rewrite(folder, file, change):
    """Applies `change` to the tensors of one file and keeps index and headers consistent."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: place for name, place in index["weight_map"].items() if place != file}
    index["weight_map"] = kept | dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---- reading


@pytest.mark.parametrize("folder", [BF16, MXFP4])
def test_every_loaded_tensor_equals_the_stored_one(folder):
    state, stored = load(folder).state_dict(), stored_tensors(folder)
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


@pytest.mark.filterwarnings("ignore:.*rounded them by")
def test_experts_packed_while_loading_equal_those_packed_by_an_export(tmp_path):
    save_model(load(BF16), tmp_path / "packed", merge_lora=False, experts="mxfp4")
    loaded = load(BF16, experts="mxfp4")
    assert loaded.expert_format.name == "mxfp4"
    same_bytes(loaded.state_dict(), load(tmp_path / "packed").state_dict())


def test_experts_are_packed_as_nf4_while_loading_with_the_error_stated():
    with pytest.warns(UserWarning, match="packing experts into NF4 rounded them by") as caught:
        packed = load(BF16, experts="nf4")
    errors, sizes = 0.0, 0.0
    for block, dense in zip(packed.model.layers, load(BF16).model.layers):
        for leaf in ("gate_up_proj", "down_proj"):
            wanted = dense.mlp.experts.state_dict()[leaf].transpose(1, 2)  # [E, out, in]
            codes, absmax = (block.mlp.experts.state_dict()[leaf + suffix] for suffix in ("_codes", "_absmax"))
            # an absmax is the largest magnitude of 64 elements of a matrix
            assert torch.equal(absmax, wanted.reshape(len(wanted), -1, 64).abs().amax(2))
            values = torch.stack([block.mlp.experts.dense(leaf, expert) for expert in range(len(wanted))])
            errors, sizes = errors + (values - wanted).square().sum().item(), sizes + wanted.square().sum().item()
            assert codes.shape == (*wanted.shape[:2], wanted.shape[2] // 2)
    assert f"by {(errors / sizes) ** 0.5:.2%}" in str(caught[0].message)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*rounded them by")
@pytest.mark.parametrize("experts", ["mxfp4", "nf4"])
def test_experts_packed_on_a_gpu_have_the_bytes_of_those_packed_on_the_cpu(experts):
    models = [load(BF16, experts=experts, dtype=torch.bfloat16, device=device) for device in ("cpu", "cuda")]
    for blocks in zip(*(model.model.layers for model in models)):
        for leaf, expert in (("gate_up_proj", 0), ("gate_up_proj", 7), ("down_proj", 3)):
            ours, theirs = (block.mlp.experts.as_stored(leaf, expert) for block in blocks)
            assert all(torch.equal(here, there.cpu()) for here, there in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("experts, width, message", [
    ("mxfp4", 80, "experts=mxfp4: model config: MXFP4 needs hidden_size=64 and intermediate_size=80 to be multiples of 32"),
    ("nf4", 81, "experts=nf4: model config: NF4 needs hidden_size=64 times intermediate_size=81")])
def test_experts_whose_width_is_no_whole_number_of_blocks_are_not_packed(tmp_path, experts, width, message):
    config = json.loads((BF16 / "config.json").read_text()) | {"intermediate_size": width}
    if experts == "nf4":
        config["hidden_size"] = 60
        message = message.replace("64", "60")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message + ".*use experts=bf16"):
        load(tmp_path, experts=experts)


def test_layers_that_straddle_shards_load_to_the_golden_logits():
    index = json.loads((MXFP4 / "model.safetensors.index.json").read_text())["weight_map"]
    files = {
        index[f"model.layers.1.{name}"]
        for name in (
            "input_layernorm.weight",
            "mlp.experts.down_proj_blocks",
            "self_attn.v_proj.weight",
            "mlp.experts.gate_up_proj_bias",
        )
    }
    files |= {index[f"model.layers.2.{name}"] for name in ("input_layernorm.weight", "self_attn.v_proj.weight")}
    assert len(files) > 1  # else the fixture would not show it
    expected = golden(MXFP4)
    torch.testing.assert_close(logits_of(load(MXFP4), expected["input_ids"]), expected["logits"], rtol=0, atol=1e-4)


def test_dequantised_experts_equal_the_golden_ones_and_give_the_same_logits():
    expected = golden(MXFP4)
    dense = load(MXFP4, experts="bf16")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(dense.state_dict()[name], expected[f"dequant.{name}"])
    packed_logits = logits_of(load(MXFP4), expected["input_ids"])
    torch.testing.assert_close(logits_of(dense, expected["input_ids"]), packed_logits, rtol=0, atol=1e-5)


def test_at_most_one_tensor_of_the_files_is_alive_at_a_time(monkeypatch):
    read, alive, most = StoredTensor.read, [], 0

    def counting_read(self):
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        tensor = read(self)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(StoredTensor, "read", counting_read)
    load(MXFP4)
    assert len(alive) == len(stored_tensors(MXFP4)) and most == 0


# ---- writing


def test_an_mxfp4_export_is_byte_identical_and_split_at_the_shard_size(tmp_path):
    save_model(load(MXFP4), tmp_path / "out", merge_lora=False, max_shard_bytes=100_000)
    same_bytes(stored_tensors(tmp_path / "out"), stored_tensors(MXFP4))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    sizes = {
        path.name: sum(tensor.nbytes for tensor in load_file(path).values())
        for path in (tmp_path / "out").glob("*.safetensors")
    }
    assert set(index["weight_map"].values()) == set(sizes) and len(sizes) > 5
    assert index["metadata"]["total_size"] == sum(sizes.values()) == 613888  # as the fixture's own index says
    assert max(sizes.values()) <= 100_000


def test_a_dense_export_of_packed_experts_has_the_published_names_and_the_same_function(tmp_path):
    expected = golden(MXFP4)
    save_model(load(MXFP4), tmp_path / "out", merge_lora=False, experts="bf16")
    stored = stored_tensors(tmp_path / "out")
    assert stored["model.layers.0.mlp.experts.down_proj"].shape == (4, 64, 96)  # [E, in, out]
    assert not any(name.endswith(("_blocks", "_scales")) for name in stored)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    torch.testing.assert_close(
        logits_of(load(tmp_path / "out"), expected["input_ids"]), expected["logits"], rtol=0, atol=1e-4
    )


def test_exported_config_keeps_the_hub_schema(tmp_path):
    save_model(load(MXFP4), tmp_path / "packed", merge_lora=False)
    save_model(load(MXFP4), tmp_path / "dense", merge_lora=False, experts="bf16")
    packed, dense = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("packed", "dense"))
    assert packed == json.loads((MXFP4 / "config.json").read_text())
    assert "quantization_config" not in dense
    assert dense["rope_theta"] == 150000 and dense["rope_scaling"]["truncate"] is False
    assert dense["torch_dtype"] == "bfloat16" and "rope_parameters" not in dense
    assert dense["experts_per_token"] == dense["num_experts_per_tok"] == 2


def test_packing_dense_experts_that_are_on_the_grid_keeps_their_values(tmp_path):
    dense = load(MXFP4, experts="bf16")
    with pytest.warns(UserWarning, match=r"rounded them by 0\.00%"):
        save_model(dense, tmp_path / "out", merge_lora=False, experts="mxfp4")
    again = load(tmp_path / "out")
    assert again.expert_format.name == "mxfp4"
    same_bytes(load(tmp_path / "out", experts="bf16").state_dict(), dense.state_dict())


def test_tokenizer_files_are_copied_verbatim_and_generation_stops_at_their_ids(tmp_path):
    tokenizer = FIXTURES / "tokenizer_compact"
    beside = {path.name: path for path in tokenizer_files(tokenizer)}
    save_model(load(BF16), tmp_path / "out", merge_lora=False, beside=beside)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tokenizer / name).read_bytes()
    ids = {
        token["content"]: token["id"]
        for token in json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
    }
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written["eos_token_id"] == [ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"]]
    with pytest.raises(CheckpointError, match="no tokenizer.json"):
        tokenizer_files(tmp_path)


def test_the_weights_of_a_full_training_run_come_back_bit_by_bit(tmp_path):
    model = load(BF16)
    set_full_training(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-4 * torch.ones_like(parameter))  # no longer bf16 numbers
    save_model(model, tmp_path / "out", merge_lora=False, dtype=model.dtype)
    same_bytes(load(tmp_path / "out").state_dict(), model.state_dict())
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"


# ---- adapters merged


def test_a_merged_export_gives_the_adapters_golden_logits(tmp_path):
    model, expected = load(BF16), golden(LORA)
    load_adapter(model, LORA)
    save_model(model, tmp_path / "out", merge_lora=True, dtype=torch.float32)
    merged = logits_of(load(tmp_path / "out"), expected["input_ids"])
    torch.testing.assert_close(merged, expected["logits"], rtol=0, atol=1e-4)
    save_model(model, tmp_path / "base", merge_lora=False)
    same_bytes(stored_tensors(tmp_path / "base"), stored_tensors(BF16))


@pytest.mark.parametrize("experts", ["bf16", "as_loaded"])
def test_merging_into_a_packed_base_loses_nothing(tmp_path, experts):
    model, ids = load(MXFP4), golden(MXFP4)["input_ids"]
    attach_lora(model, LoraConfig(rank=3, alpha=6.0, targets=list(TARGETS)), seed=0)
    fill_trainable(model, ends_in="lora_B")
    expected = logits_of(model, ids)
    assert (expected - logits_of(load(MXFP4), ids)).abs().max() > 1
    if experts == "bf16":
        save_model(model, tmp_path / "out", merge_lora=True, experts="bf16", dtype=torch.float32)
        again = load(tmp_path / "out")
    else:
        with pytest.warns(UserWarning, match="expert_adapter"):
            save_model(model, tmp_path / "out", merge_lora=True, dtype=torch.float32)
        written, base = stored_tensors(tmp_path / "out"), stored_tensors(MXFP4)
        packed = {name for name in base if name.endswith(("_blocks", "_scales"))}
        assert len(packed) == 16
        same_bytes({name: written[name] for name in packed}, {name: base[name] for name in packed})
        again = load(tmp_path / "out")
        load_adapter(again, tmp_path / "out/expert_adapter")
    torch.testing.assert_close(logits_of(again, ids), expected, rtol=0, atol=2e-4)


def test_requantising_merged_experts_warns_with_the_size_of_the_loss(tmp_path):
    model = load(MXFP4)
    attach_lora(model, LoraConfig(rank=3, alpha=6.0, targets=["experts"]), seed=0)
    fill_trainable(model, ends_in="lora_B")
    with pytest.warns(UserWarning, match="packing experts into MXFP4") as caught:
        save_model(model, tmp_path / "out", merge_lora=True, experts="mxfp4")
    lost, changed = (float(number) for number in re.findall(r"by ([\d.]+)%", str(caught[0].message)))
    dense, rounded = load(MXFP4, experts="bf16").state_dict(), load(tmp_path / "out", experts="bf16").state_dict()
    save_model(model, tmp_path / "exact", merge_lora=True, experts="bf16", dtype=torch.float32)
    exact = load(tmp_path / "exact").state_dict()
    names = [name for name in dense if name.endswith(("gate_up_proj", "down_proj"))]
    size = sum(exact[name].square().sum() for name in names)
    error = sum((rounded[name] - exact[name]).square().sum() for name in names)
    change = sum((dense[name] - exact[name]).square().sum() for name in names)
    assert lost == pytest.approx(100 * (error / size).sqrt().item(), abs=0.01)
    assert changed == pytest.approx(100 * (change / size).sqrt().item(), abs=0.01)


def test_packed_experts_whose_adapter_is_still_zero_stay_as_they_are(tmp_path):
    model = load(MXFP4)
    attach_lora(model, LoraConfig(rank=2, alpha=4.0, targets=["experts", "q_proj"]), seed=0)
    save_model(model, tmp_path / "out", merge_lora=True, experts="mxfp4")
    same_bytes(stored_tensors(tmp_path / "out"), stored_tensors(MXFP4))


# ---- OpenAI's original layout


@pytest.mark.parametrize("folder", [BF16, MXFP4])
def test_the_original_layout_holds_the_same_bits(tmp_path, folder):
    model = load(folder)
    save_original(model, tmp_path / "original", merge_lora=False)
    stored, theirs = stored_tensors(tmp_path / "original"), stored_tensors(folder)
    qkv = torch.cat([theirs[f"model.layers.2.self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(stored["block.2.attn.qkv.weight"], qkv)
    assert torch.equal(stored["unembedding.weight"], theirs["lm_head.weight"])
    assert torch.equal(stored["block.3.mlp.norm.scale"], theirs["model.layers.3.post_attention_layernorm.weight"])
    if folder == MXFP4:
        name = "model.layers.1.mlp.experts.down_proj"
        assert torch.equal(stored["block.1.mlp.mlp2_weight.blocks"], theirs[f"{name}_blocks"])
        assert torch.equal(stored["block.1.mlp.mlp2_weight.scales"], theirs[f"{name}_scales"])
    else:
        name = "model.layers.1.mlp.experts.down_proj"
        assert torch.equal(stored["block.1.mlp.mlp2_weight"], theirs[name].transpose(1, 2))
    again = load(tmp_path)  # a folder without weights of its own: its original/ is read
    same_bytes(again.state_dict(), model.state_dict())
    ids = golden(folder)["input_ids"]
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    save_model(again, tmp_path / "back", merge_lora=False)
    same_bytes(stored_tensors(tmp_path / "back"), theirs)


def test_original_shards_without_an_index_are_read(tmp_path):
    save_original(load(MXFP4), tmp_path / "out", merge_lora=False, max_shard_bytes=150_000)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names[0] == f"model--00001-of-{len(names):05d}.safetensors" and len(names) > 3
    same_bytes(load(tmp_path / "out").state_dict(), load(MXFP4).state_dict())


def test_original_config_has_the_fields_of_the_published_one(tmp_path):
    save_original(load(MXFP4), tmp_path / "out", merge_lora=False)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "num_hidden_layers": 4,
        "num_experts": 4,
        "experts_per_token": 2,
        "vocab_size": 384,
        "hidden_size": 96,
        "intermediate_size": 64,
        "swiglu_limit": 7.0,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
        "initial_context_length": 4096,
        "rope_theta": 150000,
        "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1.0,
        "rope_ntk_beta": 32.0,
    }


def test_a_model_the_original_layout_cannot_describe_is_refused(tmp_path):
    model = load(BF16)
    model.config.layer_types = ["full_attention"] * 4
    with pytest.raises(CheckpointError, match="layer_types"):
        save_original(model, tmp_path / "out", merge_lora=False)
    assert not (tmp_path / "out").exists()


# ---- damaged or unsuitable files


def test_all_problems_of_the_tensors_are_listed_in_one_message(damaged):
    file = "model-00000-of-00002.safetensors"

    def change(tensors):
        del tensors["lm_head.weight"]
        tensors["extra.weight"] = torch.zeros(2)
        tensors["model.layers.0.mlp.experts.down_proj_blocks"] = tensors[
            "model.layers.0.mlp.experts.down_proj_blocks"
        ].float()
        tensors["model.layers.0.self_attn.sinks"] = torch.zeros(5)

    rewrite(damaged, file, change)
    with pytest.raises(CheckpointError) as caught:
        load(damaged)
    message = str(caught.value)
    assert "missing (1): lm_head.weight" in message
    assert f"not used by the model (1): extra.weight ({file})" in message
    assert "model.layers.0.self_attn.sinks is [5], expected [4]" in message
    assert "down_proj_blocks is F32, expected U8" in message


def test_a_transposed_expert_tensor_is_refused(tmp_path):
    shutil.copytree(BF16, tmp_path / "checkpoint")
    tensors = load_file(BF16 / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    (tmp_path / "checkpoint/model.safetensors").unlink()
    save_file(tensors, tmp_path / "checkpoint/model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"{name} is [8, 64, 96], expected [8, 96, 64]")):
        load(tmp_path / "checkpoint")


def test_a_config_of_the_other_expert_form_is_named(damaged):
    config = json.loads((damaged / "config.json").read_text())
    del config["quantization_config"]
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="correct quantization_config"):
        load(damaged)
    with pytest.raises(ValueError, match="allowed: auto, bf16, mxfp4, nf4"):
        load(BF16, experts="fp8")


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama"}', '{"model_type": "gpt_oss"}'])
def test_a_malformed_config_is_named(damaged, content):
    (damaged / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        load(damaged)
