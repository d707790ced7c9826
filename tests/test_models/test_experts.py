"""Packed experts in fragment order: everything that leaves the model is as it would be from the checkpoint's order."""


import pytest
import torch
from paths import FIXTURES

from kernels.packed.weights import Mxfp4, Mxfp4Fragments
from models.config import GptOssConfig
from models.experts import PROJECTIONS, RoutedExperts
from models.formats.hugging_face import load_model, save_model, save_original
from models.lora import LoraConfig, attach_lora, count_active_parameters, count_parameters

MXFP4 = FIXTURES / "tiny_mxfp4"


def load(*, in_fragments):
    model = load_model(MXFP4, device="cpu", dtype=torch.float32)
    if in_fragments:
        for block in model.model.layers:
            block.mlp.experts.arrange()
    return model


def written_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pair():
    """The same model in both orders."""
    stored, permuted = load(in_fragments=False), load(in_fragments=True)
    assert {block.mlp.experts.layout for block in permuted.model.layers} == {Mxfp4Fragments}
    return stored, permuted


def test_the_permutation_moves_bytes_and_as_stored_brings_them_back(pair):
    stored, permuted = (model.model.layers[1].mlp.experts for model in pair)
    for name in PROJECTIONS:
        blocks, scales = stored._buffers[f"{name}_blocks"], stored._buffers[f"{name}_scales"]
        fragments = permuted._buffers[f"{name}_block_fragments"]
        assert fragments.shape == blocks.shape and not torch.equal(fragments, blocks)
        for expert in range(len(blocks)):
            for experts in (stored, permuted):
                ours = experts.as_stored(name, expert)
                assert torch.equal(ours[0], blocks[expert]) and torch.equal(ours[1], scales[expert])


def test_the_permutation_happens_in_place():
    model = load(in_fragments=False)
    experts = model.model.layers[0].mlp.experts
    places = {experts._buffers[f"{name}{suffix}"].data_ptr() for name in PROJECTIONS for suffix in ("_blocks", "_scales")}
    experts.arrange()
    assert {buffer.data_ptr() for buffer in experts.buffers()} == places
    assert experts.weights("down_proj").is_foldable
    experts.arrange()  # they lie so already
    assert {buffer.data_ptr() for buffer in experts.buffers()} == places and experts.layout is Mxfp4Fragments


@pytest.mark.parametrize("settings", [{"experts": "as_loaded"}, {"experts": "bf16"}, {"experts": "mxfp4"},
                                      {"experts": "as_loaded", "max_shard_bytes": 100_000}])
def test_an_export_has_the_same_bytes_from_either_order(pair, settings, tmp_path):
    for name, model in zip(("stored", "permuted"), pair):
        save_model(model, tmp_path / name, merge_lora=False, **settings)
    assert written_files(tmp_path / "permuted") == written_files(tmp_path / "stored")


def test_the_original_layout_has_the_same_bytes_from_either_order(pair, tmp_path):
    for name, model in zip(("stored", "permuted"), pair):
        save_original(model, tmp_path / name, merge_lora=False)
    assert written_files(tmp_path / "permuted") == written_files(tmp_path / "stored")


@pytest.mark.filterwarnings("ignore:.*packing experts")
@pytest.mark.parametrize("form", ["bf16", "mxfp4"])
def test_a_merged_adapter_has_the_same_bytes_from_either_order(form, tmp_path):
    for in_fragments in (False, True):
        model = load(in_fragments=in_fragments)
        attach_lora(model, LoraConfig(3, 6.0, ["experts", "q_proj"]), seed=0)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.trainable_parameters().values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        save_model(model, tmp_path / str(in_fragments), merge_lora=True, experts=form)
    assert written_files(tmp_path / "True") == written_files(tmp_path / "False")


def test_no_order_loads_as_the_other(pair):
    for source, target in (pair, pair[::-1]):
        with pytest.raises(RuntimeError, match="gate_up_proj_block"):
            target.load_state_dict(source.state_dict())


def test_the_composition_computes_the_same_from_either_order(pair):
    tokens, bounds = torch.arange(9), torch.tensor([0, 9])
    with torch.no_grad():
        stored, permuted = (model.logits(tokens, bounds) for model in pair)
    assert torch.equal(stored, permuted)


def test_parameters_are_counted_in_either_order(pair):
    stored, permuted = pair
    assert count_parameters(permuted) == count_parameters(stored) > 0
    assert count_active_parameters(permuted) == count_active_parameters(stored)


def test_sizes_without_a_fragment_order_stay_as_stored():
    config = GptOssConfig.from_architecture({
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 4, "vocab_size": 48,
        "layer_types": ["full_attention"], "rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
        "max_position_embeddings": 256, "initial_context_length": 64, "rope_theta": 150000.0, "eos_token_id": 1,
        "pad_token_id": 0, "rope_scaling": {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                                            "original_max_position_embeddings": 64},
    })  # fmt: skip
    experts = RoutedExperts(config, Mxfp4, device="cpu", dtype=torch.float32)
    for name, tensor in list(experts._buffers.items()):
        experts._buffers[name] = tensor[:, :40] if "gate_up" in name else tensor[:, :24]  # no multiples of 16
    experts.arrange()
    assert experts.layout is Mxfp4 and not experts.layout.serves_few_rows
