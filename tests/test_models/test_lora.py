"""Adapters: golden outputs and gradients, what trains, what is refused; and counts of parameters."""

import math

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.linear import adapter_of
from models.config import GptOssConfig
from models.formats.hugging_face import load_model
from models.formats.peft import load_adapter
from models.gpt_oss import GptOss
from models.lora import (
    LoraConfig,
    attach_lora,
    count_active_parameters,
    count_parameters,
    describe_trainable,
    set_full_training,
)

RANK = 3


def load(name: str = "tiny_bf16") -> GptOss:
    return load_model(FIXTURES / name, device="cpu", dtype=torch.float32)


def golden() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "tiny_bf16_lora/golden.safetensors")


def packed(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """[B, L] end to end, with a mask of all but first tokens."""
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[:, 0] = False
    cu_seqlens = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
    return {"tokens": ids.flatten(), "cu_seqlens": cu_seqlens, "mask": mask.flatten()}


def fill_B(model: GptOss, *, std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.trainable_parameters().items():
        if name.endswith("lora_B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


@torch.no_grad()
def test_logits_with_the_golden_adapter():
    model, data = load(), golden()
    load_adapter(model, FIXTURES / "tiny_bf16_lora")
    given = packed(data["input_ids"])
    logits = model.logits(given["tokens"], given["cu_seqlens"])
    torch.testing.assert_close(logits, data["logits"].flatten(0, 1), rtol=0, atol=1e-4)
    with model.adapter_disabled():
        plain = model.logits(given["tokens"], given["cu_seqlens"])
    assert torch.equal(plain, load().logits(given["tokens"], given["cu_seqlens"]))
    assert (plain - logits).abs().max() > 0.1
    assert torch.equal(model.logits(given["tokens"], given["cu_seqlens"]), logits)


def test_gradients_of_the_golden_adapter():
    model, data = load(), golden()
    load_adapter(model, FIXTURES / "tiny_bf16_lora")
    model.log_probs(**packed(data["input_ids"]), temperature=1.0)[0].sum().backward()
    parameters = model.trainable_parameters()
    compared = 0
    for layer in (1, 2):
        prefix = f"grad.base_model.model.model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            for side in "AB":
                ours = parameters[f"model.layers.{layer}.self_attn.{name}.lora_{side}"].grad
                theirs = data[f"{prefix}.self_attn.{name}.lora_{side}.weight"]
                assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), (layer, name, side)
                compared += 1
        # PEFT stacks experts: A [E * r, in] expert by expert; B [out, r * E] with the expert running fastest
        for name, module in (("gate_up_proj", "experts.base_layer"), ("down_proj", "experts")):
            ours_A = parameters[f"model.layers.{layer}.mlp.experts.{name}_lora_A"].grad  # [E, r, in]
            ours_B = parameters[f"model.layers.{layer}.mlp.experts.{name}_lora_B"].grad  # [E, out, r]
            theirs_A, theirs_B = (data[f"{prefix}.mlp.{module}.lora_{side}.weight"] for side in "AB")
            assert (ours_A.flatten(0, 1) - theirs_A).abs().max() <= 1e-4 * theirs_A.abs().max(), (layer, name)
            stacked = theirs_B.view(theirs_B.shape[0], ours_B.shape[2], ours_B.shape[0]).permute(2, 0, 1)
            assert (ours_B - stacked).abs().max() <= 1e-4 * theirs_B.abs().max(), (layer, name)
            compared += 2
    assert compared == 24


@pytest.mark.parametrize("name", ["tiny_bf16", "tiny_mxfp4"])
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_until_B_moves(name):
    given = packed(torch.arange(20).view(2, 10))
    model = load(name)
    before = model.logits(given["tokens"], given["cu_seqlens"])
    attach_lora(model, LoraConfig(RANK, 6.0, ["q_proj", "k_proj", "v_proj", "o_proj", "router", "experts"]), seed=0)
    assert torch.equal(model.logits(given["tokens"], given["cu_seqlens"]), before)
    fill_B(model)
    assert (model.logits(given["tokens"], given["cu_seqlens"]) - before).abs().max() > 0.01
    with model.adapter_disabled():
        assert torch.equal(model.logits(given["tokens"], given["cu_seqlens"]), before)


def test_the_adapter_comes_back_after_an_error():
    model = load()
    attach_lora(model, LoraConfig(RANK, 6.0, ["v_proj"]), seed=0)
    fill_B(model)
    given = packed(torch.arange(20).view(2, 10))
    with torch.no_grad():
        adapted = model.logits(given["tokens"], given["cu_seqlens"])
        with pytest.raises(RuntimeError), model.adapter_disabled():
            raise RuntimeError
        assert torch.equal(model.logits(given["tokens"], given["cu_seqlens"]), adapted)


@pytest.mark.parametrize("name", ["tiny_bf16", "tiny_mxfp4"])
@pytest.mark.parametrize("target, suffixes", [
    ("q_proj", ("self_attn.q_proj.lora_",)), ("k_proj", ("self_attn.k_proj.lora_",)), ("v_proj", ("self_attn.v_proj.lora_",)),
    ("o_proj", ("self_attn.o_proj.lora_",)), ("router", ("mlp.router.lora_",)),
    ("experts", ("mlp.experts.gate_up_proj_lora_", "mlp.experts.down_proj_lora_"))])
def test_each_target_trains_alone_in_every_layer(name, target, suffixes):
    model = load(name)
    attach_lora(model, LoraConfig(RANK, 6.0, [target]), seed=0)
    expected = {f"model.layers.{layer}.{suffix}{side}" for layer in range(4) for suffix in suffixes for side in "AB"}
    assert set(model.trainable_parameters()) == expected
    fill_B(model)
    ids = torch.randint(0, 384, (4, 20), generator=torch.Generator().manual_seed(0))
    model.log_probs(**packed(ids), temperature=1.0)[0].sum().backward()
    for key, parameter in model.named_parameters():
        if key in expected:
            assert parameter.dtype == torch.float32 and parameter.grad.isfinite().all() and parameter.grad.any(), key
        else:
            assert parameter.grad is None, key


def test_sinks_and_norms_train_when_asked():
    model = load()
    attach_lora(model, LoraConfig(RANK, 6.0, [], train_sinks=True, train_norms=True), seed=0)
    names = {f"model.layers.{layer}.{part}" for layer in range(4)
             for part in ("self_attn.sinks", "input_layernorm.weight", "post_attention_layernorm.weight")}
    assert set(model.trainable_parameters()) == names | {"model.norm.weight"}
    model.log_probs(**packed(torch.arange(40).view(2, 20)), temperature=1.0)[0].sum().backward()
    assert all(parameter.grad.any() for parameter in model.trainable_parameters().values())


@torch.no_grad()
def test_the_update_is_alpha_over_rank_times_B_times_A():
    given = packed(torch.arange(40).view(2, 20))
    model = load()
    attach_lora(model, LoraConfig(4, 10.0, ["o_proj", "experts", "router"]), seed=0)
    fill_B(model)
    merged, adapted = load(), dict(model.named_parameters())
    for name, parameter in merged.named_parameters():
        if name.endswith(("o_proj.weight", "router.weight")):
            module = name.removesuffix(".weight")
            parameter += 2.5 * adapted[f"{module}.lora_B"] @ adapted[f"{module}.lora_A"]
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # [E, in, out]
            parameter += 2.5 * torch.einsum("eor,eri->eio", adapted[f"{name}_lora_B"], adapted[f"{name}_lora_A"])
    logits = model.logits(given["tokens"], given["cu_seqlens"])
    torch.testing.assert_close(merged.logits(given["tokens"], given["cu_seqlens"]), logits, rtol=0, atol=1e-4)


def test_A_starts_kaiming_uniform_and_B_at_zero_by_seed():
    first, second, other = load(), load(), load()
    for model, seed in ((first, 7), (second, 7), (other, 8)):
        attach_lora(model, LoraConfig(8, 8.0), seed=seed)
    parameters = first.trainable_parameters()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, second.trainable_parameters()[name])
        if name.endswith("lora_B"):
            assert not parameter.any()
        else:
            bound = 1 / math.sqrt(parameter.shape[-1])  # in features are last: [r, in] and [E, r, in]
            assert parameter.abs().max() <= bound and parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert not torch.equal(parameter, other.trainable_parameters()[name])
    A = parameters["model.layers.0.mlp.experts.down_proj_lora_A"]
    assert A.shape == (8, 8, 96) and not torch.equal(A[0], A[1])


def test_an_adapter_of_an_unknown_projection_is_refused_before_anything_changes():
    model = load()
    with pytest.raises(AssertionError, match="gate_proj"):
        attach_lora(model, LoraConfig(4, 8.0, ["q_proj", "gate_proj"]), seed=0)
    assert not model.trainable_parameters()


@pytest.mark.parametrize("second", [["q_proj"], ["experts"], ["k_proj"]])
def test_a_second_adapter_is_refused_and_the_first_stays(second):
    model = load()
    attach_lora(model, LoraConfig(2, 4.0, ["q_proj", "experts"]), seed=0)
    before = set(model.trainable_parameters())
    with pytest.raises(ValueError, match="already carries an adapter"):
        attach_lora(model, LoraConfig(2, 4.0, second), seed=0)
    assert set(model.trainable_parameters()) == before


def test_full_training_reaches_every_tensor_and_refuses_packed_experts():
    model = load()
    set_full_training(model)
    assert set(model.trainable_parameters()) == set(model.state_dict())
    packed_model = load("tiny_mxfp4")
    with pytest.raises(ValueError, match="model.train=full .*model.experts=bf16"):
        set_full_training(packed_model)
    assert not packed_model.trainable_parameters()


def test_the_description_has_a_line_of_80_characters_per_product_with_count_shapes_and_size():
    model = load()
    attach_lora(model, LoraConfig(2, 4.0, ["q_proj", "experts"]), seed=0)
    lines = describe_trainable(model).splitlines()
    kinds = {line.split()[0]: line.split()[1:] for line in lines[:-1]}
    # 4 layers; hidden 64, 8 heads of 16; 8 experts of 96
    assert kinds == {
        "self_attn.q_proj": "4 x [2, 64] [128, 2] 1,536".split(),
        "mlp.experts.gate_up_proj": "4 x [8, 2, 64] [8, 192, 2] 16,384".split(),
        "mlp.experts.down_proj": "4 x [8, 2, 96] [8, 64, 2] 10,240".split(),
    }
    assert max(map(len, lines)) <= 80
    trainable = 512 + 1024 + 4096 + 12288 + 6144 + 4096
    assert lines[-1].split() == f"trainable parameters: {trainable:,} of {count_parameters(load()) + trainable:,}".split()


PUBLISHED = {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
             "num_key_value_heads": 8, "head_dim": 64, "num_experts_per_tok": 4, "sliding_window": 128}


@pytest.mark.parametrize("experts", ["bf16", "mxfp4"])
@pytest.mark.parametrize("num_layers, num_experts, total, billions_active", [
    (24, 32, 20_914_757_184, 3.61), (36, 128, 116_829_156_672, 5.13)])
def test_counts_of_the_published_sizes(experts, num_layers, num_experts, total, billions_active):
    config = GptOssConfig.from_architecture(PUBLISHED | {"num_hidden_layers": num_layers, "num_local_experts": num_experts})
    model = GptOss(config, dtype=torch.bfloat16, device="meta", experts=experts)
    assert count_parameters(model) == total
    active = count_active_parameters(model)
    assert round(active / 1e9, 2) == billions_active
    width, inner, heads, kv = 2880, 2880, 64 * 64, 8 * 64
    attention = width * heads + heads + 2 * (width * kv + kv) + heads * width + width + 64  # q, k and v, o, sinks
    expert = width * 2 * inner + 2 * inner + inner * width + width
    router = num_experts * width + num_experts
    by_hand = num_layers * (attention + router + 4 * expert + 2 * width) + width + width + 201088 * width
    assert active == by_hand  # the last three: the final norm, one row of the embedding, the head


def test_an_adapter_counts_by_the_experts_a_token_visits():
    model = load()
    total, active = count_parameters(model), count_active_parameters(model)
    attach_lora(model, LoraConfig(2, 4.0, ["q_proj", "experts"]), seed=0)
    attention, experts = 512 + 1024, 4096 + 12288 + 6144 + 4096
    assert count_parameters(model) == total + attention + experts
    assert count_active_parameters(model) == active + attention + experts * 2 // 8


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"]])
def test_adapters_of_queries_keys_and_values_are_one_tensor_without_a_copy(targets):
    model = load()
    attach_lora(model, LoraConfig(rank=RANK, alpha=6.0, targets=targets), seed=3)
    fill_B(model)
    attention = model.model.layers[1].self_attn
    modules = [getattr(attention, name) for name in targets]
    A = torch.cat([module.lora_A for module in modules])
    adapter = adapter_of(attention.qkv())
    assert adapter.A.data_ptr() == modules[0].lora_A.data_ptr() and torch.equal(adapter.A, A)
    with torch.no_grad():
        modules[-1].lora_A += 1.0
    assert torch.equal(adapter.A[-RANK:], A[-RANK:] + 1.0)
    modules[0].lora_A.data = modules[0].lora_A.data.clone()  # no longer beside the others
    assert torch.equal(adapter_of(attention.qkv()).A, torch.cat(
        [module.lora_A for module in modules]))
