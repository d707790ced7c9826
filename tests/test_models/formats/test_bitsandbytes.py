"""Checkpoints packed as NF4, a matrix per expert: read to the bit, trained on, sampled from, and what is wrong with damaged
ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BF16, load, logits_of

from grpo.batch import Prompt
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from models.formats.files import CheckpointError
from models.formats.hugging_face import save_model
from models.lora import LoraConfig, attach_lora, set_full_training

# QLoRA's values to the digits that single precision needs
CODE = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.079580300, 0.16093020,
        0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]  # fmt: skip
STATE = ".quant_state.bitsandbytes__nf4"
PACKED_DENSE = ("q_proj", "o_proj")  # of layer 0
QUANTIZATION = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}  # fmt: skip


def pack(weight: torch.Tensor, *, nested: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What stands for a matrix [out, in] in a file, by what its name gets, and the values [out, in] that it stands for."""
    blocks = weight.float().reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored = {".absmax": absmax, ".quant_map": torch.tensor(CODE)}
    if nested:
        offset, quant_map = float(absmax.mean()), torch.linspace(-1, 1, 256)
        groups = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        scale = groups.abs().amax(1)
        index = (groups / scale[:, None] * 127.5 + 127.5).round().clamp(0, 255).flatten()[:len(absmax)].long()
        absmax = quant_map[index] * scale.repeat_interleave(256)[:len(absmax)] + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        stored |= {".absmax": index.to(torch.uint8), ".nested_absmax": scale, ".nested_quant_map": quant_map}
    index = (blocks[:, :, None] / absmax[:, None, None] - torch.tensor(CODE)).abs().argmin(2)
    values = torch.tensor(CODE)[index] * absmax[:, None]
    nibbles = index.flatten().view(-1, 2)
    stored[""] = (16 * nibbles[:, :1] + nibbles[:, 1:]).to(torch.uint8)  # [n, 1]
    stored[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return stored, values.view(weight.shape)


def write_pair(folder: Path, *, nested: bool) -> tuple[Path, Path]:
    """The tiny bf16 checkpoint packed as NF4, and the same weights as a dense float32 checkpoint."""
    packed, dense = {}, {}
    for name, tensor in load_file(BF16 / "model.safetensors").items():
        stem, _, part = name.rpartition(".")
        if ".mlp.experts." in name:
            kind = part.replace("_bias", "").replace("_proj", "_projs")
            for expert, own in enumerate(tensor):
                if part.endswith("_bias"):
                    packed[f"{stem}.{kind}.{expert}.bias"] = own.clone()
                    continue
                stored, values = pack(own.T, nested=nested)
                packed |= {f"{stem}.{kind}.{expert}.weight{suffix}": value for suffix, value in stored.items()}
                dense.setdefault(name, []).append(values.T)
            dense[name] = torch.stack(dense[name]) if name in dense else tensor.float()
        elif name.startswith("model.layers.0.") and part == "weight" and stem.endswith(PACKED_DENSE):
            stored, dense[name] = pack(tensor, nested=nested)
            packed |= {f"{name}{suffix}": value for suffix, value in stored.items()}
        else:
            packed[name.replace("mlp.router.", "mlp.router.linear.")], dense[name] = tensor, tensor.float()
    config = json.loads((BF16 / "config.json").read_text())
    for form, tensors, quantization in (("nf4", packed, {"quantization_config": QUANTIZATION}), ("dense", dense, {})):
        path = folder / form
        path.mkdir(parents=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config | quantization))
    return folder / "nf4", folder / "dense"


@pytest.fixture(scope="module", params=[True, False], ids=["nested", "plain"])
def pair(request, tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), nested=request.param)


IDS = torch.arange(7, 31)[None]


def test_every_weight_is_what_its_codes_stand_for(pair):
    packed, dense = load(pair[0]), load(pair[1])
    assert packed.expert_format.name == "nf4" and dense.expert_format.name == "bf16"
    expected = dense.state_dict()
    for name, tensor in packed.state_dict().items():
        if not name.endswith(("_codes", "_absmax")):
            assert torch.equal(tensor, expected[name]), name
    for layer, block in enumerate(packed.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            for expert, weight in enumerate(expected[f"model.layers.{layer}.mlp.experts.{name}"]):
                assert torch.equal(block.mlp.experts.dense(name, expert), weight.T), (layer, name, expert)


def test_packed_and_dense_on_loading_the_model_is_the_same(pair):
    expected = logits_of(load(pair[1]), IDS)
    torch.testing.assert_close(logits_of(load(pair[0]), IDS), expected, rtol=1e-5, atol=1e-5)
    dense = load(pair[0], experts="bf16")
    torch.testing.assert_close(logits_of(dense, IDS), expected, rtol=0, atol=0)
    set_full_training(dense)
    with pytest.raises(ValueError, match="holds them packed as NF4"):
        set_full_training(load(pair[0]))


def test_in_bfloat16_a_weight_is_rounded_once(pair):
    packed, dense = load(pair[0], experts="bf16", dtype=torch.bfloat16), load(pair[1])
    ours, theirs = (model.model.layers[0].mlp.experts.down_proj for model in (packed, dense))
    assert torch.equal(ours, theirs.bfloat16())


def test_dense_projections_alone_may_be_packed(pair, tmp_path):
    def unpack_experts(tensors, config):
        dense = load_file(pair[1] / "model.safetensors")
        for name in [name for name in tensors if ".mlp.experts." in name]:
            del tensors[name]
        tensors |= {name: tensor for name, tensor in dense.items() if ".mlp.experts." in name}

    model = load(damaged(pair, tmp_path, unpack_experts))
    assert model.expert_format.name == "bf16" and torch.equal(logits_of(model, IDS), logits_of(load(pair[1]), IDS))


def trained(model):
    """Gradients of adapters, B not zero, from log-probs of two sequences."""
    attach_lora(model, LoraConfig(3, 6.0, ["q_proj", "experts"]), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=generator)
    mask = torch.ones(20, dtype=torch.bool)
    mask[[0, 12]] = False
    log_probs, _ = model.log_probs(torch.arange(20), torch.tensor([0, 12, 20]), temperature=1.0, mask=mask)
    (log_probs * torch.randn(20, generator=generator)).sum().backward()
    return {name: parameter.grad for name, parameter in model.trainable_parameters().items()}


def test_adapters_train_on_packed_experts_as_on_dense_ones(pair):
    ours, theirs = trained(load(pair[0])), trained(load(pair[1]))
    assert ours.keys() == theirs.keys() and any(".experts." in name for name in ours)
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm()
        assert error <= 3e-6, (name, error)  # products in another order of memory: some elements nearly cancel


def sampled(model, count=3):
    sampler = Sampler(model, [], max_batch=4, seed=0, max_len=64)
    prompt = Prompt(0, [5, 6, 7, 8, 9], {})
    return sampler.generate([prompt], SamplingParams(max_new_tokens=12), step=0, num_samples=count)


def test_the_sampler_draws_what_it_draws_from_dense_experts(pair):
    for ours, theirs in zip(sampled(load(pair[0])), sampled(load(pair[1]))):
        assert ours.completion_ids == theirs.completion_ids
        torch.testing.assert_close(torch.tensor(ours.segments[1].log_probs), torch.tensor(theirs.segments[1].log_probs),
                                   rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_sampled_log_probs_are_the_trainers_bit_for_bit(pair):
    model = load(pair[0], dtype=torch.bfloat16, device="cuda")
    trained_bits = []
    for completion in sampled(model):
        ids = torch.tensor([5, 6, 7, 8, 9, *completion.completion_ids], device="cuda")
        mask = torch.arange(len(ids), device="cuda") >= 5
        with torch.no_grad():
            log_probs, _ = model.log_probs(ids, torch.tensor([0, len(ids)], device="cuda"), temperature=1.0, mask=mask)
        trained_bits.append(torch.equal(log_probs[5:].cpu(), torch.tensor(completion.segments[1].log_probs)))
    assert all(trained_bits)


def test_experts_go_out_as_other_formats(pair, tmp_path):
    model = load(pair[0])
    with pytest.raises(CheckpointError, match="NF4 are read, not written.*--experts bf16 or mxfp4"):
        save_model(model, tmp_path / "same", merge_lora=False)
    assert not (tmp_path / "same").exists()
    save_model(model, tmp_path / "out", merge_lora=False, experts="bf16", dtype=torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert torch.equal(logits_of(load(tmp_path / "out"), IDS), logits_of(load(pair[1]), IDS))
    with pytest.warns(UserWarning, match="packing experts into MXFP4"):
        save_model(model, tmp_path / "mxfp4", merge_lora=False, experts="mxfp4")
    assert load(tmp_path / "mxfp4").expert_format.name == "mxfp4"
    assert json.loads((tmp_path / "mxfp4/config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"


def damaged(pair, tmp_path, change) -> Path:
    """A copy whose tensors and config `change` has altered in place."""
    folder = tmp_path / "damaged"
    shutil.copytree(pair[0], folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


WEIGHT = "model.layers.1.mlp.experts.down_projs.3.weight"


def set_state(tensors, **changes):
    state = json.loads(bytes(tensors[WEIGHT + STATE].tolist())) | changes
    tensors[WEIGHT + STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("change, message", [
    (lambda tensors, config: tensors.pop(WEIGHT + ".absmax"), r"down_projs\.3\.weight is packed, but .*absmax'\] are not there"),
    (lambda tensors, config: tensors.update({WEIGHT: tensors[WEIGHT][:-1]}),
     r"down_projs\.3\.weight is U8 .* config.json is of another"),
    (lambda tensors, config: set_state(tensors, quant_type="fp4"), r"down_projs\.3\.weight is packed as .*'fp4'"),
    (lambda tensors, config: set_state(tensors, blocksize=128), r"packed as .*'blocksize': 128"),
    (lambda tensors, config: tensors[WEIGHT + ".quant_map"].mul_(0.5), r"down_projs\.3\.weight\.quant_map is not NF4's"),
    (lambda tensors, config: tensors.update({WEIGHT + ".absmax": tensors[WEIGHT + ".absmax"][:-1]}),
     r"absmax has 95 blocks, expected 96"),
    (lambda tensors, config: [tensors.pop(name) for name in list(tensors) if name.startswith(WEIGHT)],
     r"missing \(2\): .*layers\.1\.mlp\.experts\.down_proj_"),
    (lambda tensors, config: config["quantization_config"].update(bnb_4bit_quant_type="fp4"), r"bnb_4bit_quant_type='fp4'"),
    (lambda tensors, config: config.pop("quantization_config"),
     r"the experts are dense ones, the files hold packed ones \(NF4\)"),
])  # fmt: skip
def test_what_is_wrong_with_a_checkpoint_is_named(pair, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        load(damaged(pair, tmp_path, change))


def test_a_form_that_the_checkpoint_does_not_hold_is_refused(pair):
    with pytest.raises(CheckpointError, match=r"experts=mxfp4, but the checkpoint holds packed ones \(NF4\).*--experts mxfp4"):
        load(pair[0], experts="mxfp4")


@pytest.mark.filterwarnings("ignore:.*rounded them by 0.00%")
def test_dense_weights_on_the_grid_are_packed_into_the_bytes_that_they_come_from(tmp_path):
    packed, dense = (load(folder, experts="nf4").state_dict() for folder in write_pair(tmp_path, nested=False))
    assert packed.keys() == dense.keys() and all(torch.equal(tensor, dense[name]) for name, tensor in packed.items())
