"""Reading config.json in both layouts and in transformers 5's spelling, its errors, and writing it back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from paths import FIXTURES

from kernels.packed.weights import Mxfp4
from models.config import GptOssConfig, YarnScaling, read_config
from models.formats.hugging_face import read_checkpoint_config

# the fields of OpenAI's ModelConfig at the size of tests/fixtures/tiny_mxfp4
ORIGINAL = {
    "num_hidden_layers": 4, "num_experts": 4, "experts_per_token": 2, "vocab_size": 384, "hidden_size": 96,
    "intermediate_size": 64, "swiglu_limit": 7.0, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "sliding_window": 8, "initial_context_length": 4096, "rope_theta": 150000.0, "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0,
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "num_local_experts", "sliding_window", "num_experts_per_tok")


def hub(name: str = "tiny_bf16") -> dict:
    return json.loads((FIXTURES / name / "config.json").read_text())


def write(folder: Path, content: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_hugging_face_layout():
    config = read_config(FIXTURES / "tiny_bf16")
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (512, 64, 96)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 8, 2, 16)
    assert (config.num_local_experts, config.num_experts_per_tok, config.sliding_window) == (8, 2, 8)
    assert [config.is_windowed(layer) for layer in range(4)] == [True, False, True, False]
    assert config.rope_scaling == YarnScaling(32.0, 32.0, 1.0, 4096, truncate=False)
    assert (config.rope_theta, config.swiglu_limit, config.swiglu_alpha, config.rms_norm_eps) == (150000, 7.0, 1.702, 1e-5)
    assert config.stop_ids == [2] and config.pad_token_id == 0 and config.quantization == {}
    assert read_config(FIXTURES / "tiny_mxfp4").quantization["quant_method"] == "mxfp4"


def test_original_layout_says_the_same_as_the_hub_layout(tmp_path):
    original = read_config(write(tmp_path, ORIGINAL))
    ours, theirs = (dict(config.__dict__, raw=None, eos_token_id=None, pad_token_id=None)
                    for config in (original, read_config(FIXTURES / "tiny_mxfp4")))
    assert ours == theirs
    assert original.stop_ids == [200002] and original.pad_token_id == 199999


def test_original_layout_names_beta_and_alpha_the_other_way_round():
    config = GptOssConfig.from_original(ORIGINAL | {"rope_ntk_beta": 16.0, "rope_ntk_alpha": 2.0, "rope_scaling_factor": 8.0,
                                                    "initial_context_length": 1024})
    assert config.rope_scaling == YarnScaling(8.0, beta_fast=16.0, beta_slow=2.0, original_max_position_embeddings=1024,
                                              truncate=False)
    assert config.initial_context_length == 1024


def test_rope_parameters_of_transformers_5():
    raw = hub()
    rope = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta") * 2, "factor": 16.0}
    config = GptOssConfig.from_hf(raw | {"rope_parameters": rope, "swiglu_alpha": 1.5})
    assert config.rope_theta == 300000 and config.rope_scaling.factor == 16.0 and config.rope_scaling.truncate is False
    assert config.swiglu_alpha == 1.5


def test_a_missing_truncate_is_true():
    raw = hub()
    del raw["rope_scaling"]["truncate"]
    assert GptOssConfig.from_hf(raw).rope_scaling.truncate is True


def test_either_name_of_experts_per_token_and_a_list_of_stop_ids():
    raw = hub()
    del raw["num_experts_per_tok"]
    assert GptOssConfig.from_hf(raw | {"experts_per_token": 4}).num_experts_per_tok == 4
    assert GptOssConfig.from_hf(raw | {"eos_token_id": [5, 7]}).stop_ids == [5, 7]


def test_layers_alternate_from_a_windowed_one_where_types_are_missing():
    raw = hub()
    del raw["layer_types"]
    assert GptOssConfig.from_hf(raw).layer_types == ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key, tmp_path):
    raw = hub()
    del raw[key]
    raw.pop("experts_per_token", None)
    with pytest.raises(ValueError, match=f"config.json: config.json: missing keys .*'{key}'"):
        read_config(write(tmp_path, raw))


@pytest.mark.parametrize("key", REQUIRED)
def test_null_in_a_needed_key_is_refused_by_its_name(key, tmp_path):
    raw = hub() | {key: None}
    raw.pop("experts_per_token", None)
    with pytest.raises(ValueError, match=f"missing keys .*'{key}'.* \\(or null\\)"):
        read_config(write(tmp_path, raw))


@pytest.mark.parametrize("key", sorted(set(hub()) - {*REQUIRED, "model_type"}))
def test_null_in_any_other_key_says_the_same_as_no_key(key):
    without = {name: value for name, value in hub().items() if name != key}
    assert replace(GptOssConfig.from_hf(without | {key: None}), raw={}) == replace(GptOssConfig.from_hf(without), raw={})


def test_the_nulls_that_transformers_writes_are_read():
    """bos, eos and pad of a model that was saved without a tokenizer: it stops at the published id and has no padding."""
    config = GptOssConfig.from_hf(hub() | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    assert (config.stop_ids, config.pad_token_id) == ([200002], None)
    rope = hub()["rope_scaling"] | {"beta_fast": None, "attention_factor": None}
    assert GptOssConfig.from_hf(hub() | {"rope_scaling": rope}).rope_scaling.beta_fast == 32.0
    assert GptOssConfig.from_original(ORIGINAL | {"swiglu_limit": None}).swiglu_limit == 7.0


@pytest.mark.parametrize("key", ["num_experts", "head_dim", "sliding_window"])
def test_a_missing_key_of_the_original_layout_is_named(key):
    with pytest.raises(ValueError, match=f"missing keys \\['{key}'\\] "):
        GptOssConfig.from_original({name: value for name, value in ORIGINAL.items() if name != key})


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llama"}, "model_type='llama'"),
    ({"quantization_config": "mxfp4"}, "quantization_config='mxfp4' must be an object"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=true"),
    ({"attention_bias": False}, "attention_bias=false"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.0}}, "attention_factor"),
    ({"rope_scaling": [32.0]}, "rope_scaling=\\[32.0\\] must be an object"),
    ({"rope_scaling": {"factor": "32"}}, "rope_scaling.factor='32' must be a number above 0"),
    ({"num_attention_heads": 7}, "num_attention_heads=7 is not a multiple of num_key_value_heads=2"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a positive integer"),
    ({"num_hidden_layers": "4", "layer_types": None}, "num_hidden_layers='4' must be a positive integer"),
    ({"hidden_size": 64.0}, "hidden_size=64.0 must be a positive integer"),
    ({"head_dim": 15}, "head_dim=15 must be even"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must lie in 1..num_local_experts=8"),
    ({"num_hidden_layers": 5}, "layer_types has 4 entries for num_hidden_layers=5"),
    ({"layer_types": ["sliding_attention", "chunked_attention"] * 2}, "chunked_attention"),
    ({"swiglu_limit": "7"}, "swiglu_limit='7' must be a number above 0"),
    ({"rope_theta": float("inf")}, "rope_theta=inf must be a number above 0"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05 must be a number above 0"),
    ({"eos_token_id": "<|return|>"}, r"eos_token_id='<\|return\|>'"),
    ({"pad_token_id": 1.5}, "pad_token_id=1.5"),
    ({"num_hidden_layers": 10**7, "layer_types": None}, "num_hidden_layers=10000000 is more than 1024"),
    ({"num_local_experts": 10**9}, "num_local_experts=1000000000 is more than"),
    ({"vocab_size": 4 * 10**9}, "vocab_size=4000000000 is more than"),
])
def test_what_cannot_be_served_is_refused_with_file_key_and_value(change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        read_config(write(tmp_path, hub() | change))
    assert str(tmp_path / "config.json") in str(raised.value)


@pytest.mark.parametrize("change, message", [
    ({"quantization_config": {"quant_method": "awq"}},
     r"quantization_config.quant_method='awq'; supported: mxfp4, bitsandbytes \(NF4\), or none"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}}, "bnb_4bit_quant_type='fp4'"),
    ({"hidden_size": 48, "quantization_config": {"quant_method": "mxfp4"}}, "hidden_size=48 .* multiples of 32"),
])
def test_a_format_of_experts_that_is_not_there_is_refused_with_file_key_and_value(change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        read_checkpoint_config(write(tmp_path, hub() | change))
    assert str(tmp_path / "config.json") in str(raised.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="config.json: not found"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss",')
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        read_config(tmp_path)


def test_the_hub_config_is_written_back_as_it_was():
    raw = hub()
    written = GptOssConfig.from_hf(raw).to_hf(quantization={})
    assert written == raw
    raw = hub("tiny_mxfp4")
    assert GptOssConfig.from_hf(raw).to_hf(quantization=raw["quantization_config"]) == raw
    assert "quantization_config" not in GptOssConfig.from_hf(raw).to_hf(quantization={})


def test_transformers_5_spelling_is_written_in_the_hub_schema():
    raw = hub()
    rope = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    written = GptOssConfig.from_hf(raw | {"rope_parameters": rope, "dtype": "bfloat16"}).to_hf(quantization={})
    assert written == hub()


def test_unknown_keys_and_a_dense_model_packed_later():
    written = GptOssConfig.from_hf(hub() | {"my_note": [1]}).to_hf(quantization=Mxfp4.quantization)
    assert written["my_note"] == [1]
    assert written["quantization_config"] == hub("tiny_mxfp4")["quantization_config"]


def test_values_survive_writing_and_reading():
    config = GptOssConfig.from_architecture({
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 5,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"], "rms_norm_eps": 1e-6, "swiglu_limit": 5.0,
        "swiglu_alpha": 1.5, "max_position_embeddings": 512, "initial_context_length": 128, "rope_theta": 10000.5,
        "rope_scaling": {"factor": 4.0, "truncate": True, "beta_fast": 16.0, "beta_slow": 2.0,
                         "original_max_position_embeddings": 128},
        "eos_token_id": [3, 4], "pad_token_id": None})
    again = GptOssConfig.from_hf(json.loads(json.dumps(config.to_hf(quantization={}))))
    assert dict(again.__dict__, raw=None) == dict(config.__dict__, raw=None)


def test_an_architecture_names_unknown_and_missing_keys():
    fields = {key: hub()[key] for key in REQUIRED}
    assert GptOssConfig.from_architecture(fields).layer_types == ["sliding_attention", "full_attention"] * 2
    with pytest.raises(ValueError, match=r"model.architecture: unknown keys \['hiden_size'\]"):
        GptOssConfig.from_architecture(fields | {"hiden_size": 3})
    with pytest.raises(ValueError, match=r"model.architecture: missing keys \['head_dim'\]"):
        GptOssConfig.from_architecture({key: value for key, value in fields.items() if key != "head_dim"})
    with pytest.raises(ValueError, match=r"model.architecture.rope_scaling: unknown keys \['facter'\]"):
        GptOssConfig.from_architecture(fields | {"rope_scaling": {"facter": 2.0}})
    with pytest.raises(ValueError, match="model.architecture.rope_scaling='yarn'"):
        GptOssConfig.from_architecture(fields | {"rope_scaling": "yarn"})
