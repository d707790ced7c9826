"""Copies of adapters that decode steps read. On a GPU with whole rollouts: test_grpo/test_gpu.py."""

from contextlib import nullcontext

import pytest
import torch
from paths import FIXTURES

from kernels.device import Gpu, recording
from kernels.head.advance import Rows
from models.adapter_copies import AdapterCopies
from models.config import GptOssConfig
from models.decoder import Decoder, KeyReading, NewRow, PlainDraw
from models.formats.hugging_face import load_model
from models.keys import PrefillChunk
from models.lora import TARGETS, LoraConfig, attach_lora
from models.rehearsal import Rehearsal, build


def adapted(dtype: torch.dtype = torch.bfloat16):
    model = load_model(FIXTURES / "tiny_bf16", device="cpu", dtype=dtype)
    attach_lora(model, LoraConfig(rank=4, alpha=8.0, targets=list(TARGETS)), seed=0)
    change(model, seed=1)
    return model


@torch.no_grad()
def change(model, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.trainable_parameters().values():
        parameter.normal_(0, 0.1, generator=generator)


def decoded(decoder: Decoder) -> list[torch.Tensor]:
    """The tokens and log-probs of a sequence that the decoder draws in 5 steps."""
    decoder.reset([])
    assert decoder.cache.reserve(0, 16)
    hidden = decoder.model.prefill(torch.tensor([5, 6, 7]), [PrefillChunk(0, 0, 3)], decoder.cache)
    draw = decoder.plain_draw(PlainDraw(1.0, False))
    decoder.admit([NewRow(item=0, slot=0, prompt_len=3, num_new=0, limit=9, place=0, key=(7, 3, 0, 0))], hidden, draw)
    for _ in range(5):
        decoder.step(draw, [], longest=0, by_graph=False, records=False)
    return [column[:6].clone() for column in (decoder.tokens, decoder.log_probs)]


def make_decoder(model) -> Decoder:
    return Decoder(model, model.new_cache(1, 16), max_rows=1, stop_ids=[], counts_prompts_apart=False)


def test_a_decoder_has_the_bits_of_the_masters_also_after_an_update(monkeypatch):
    model, found = adapted(), {}
    decoder, masters = make_decoder(model), make_decoder(model)
    monkeypatch.setattr(masters, "_adapters", AdapterCopies(adapted(torch.float32)))  # which has none
    owned = {name: (parameter, parameter.data_ptr()) for name, parameter in model.trainable_parameters().items()}
    for seed in (1, 2):
        change(model, seed=seed)
        found[seed] = decoded(decoder)
        for ours, theirs in zip(found[seed], decoded(masters), strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(found[1][1], found[2][1])
    for name, parameter in model.trainable_parameters().items():
        assert owned[name] == (parameter, parameter.data_ptr()) and parameter.dtype == torch.float32, name


def test_inside_the_with_the_model_has_rounded_adapters_side_by_side_as_before_and_the_routers_own():
    model = adapted()
    copies, attention = AdapterCopies(model), model.model.layers[1].self_attn
    expected = {name: parameter.bfloat16() for name, parameter in model.trainable_parameters().items() if ".router." not in name}
    change(model, seed=2)  # no refresh: they stay as they were
    with copies.in_place():
        present = model.trainable_parameters()
        assert all(present[name].dtype == torch.bfloat16 and torch.equal(present[name], expected[name]) for name in expected)
        assert all(present[name].dtype == torch.float32 for name in present.keys() - expected.keys())
        for side in ("lora_A", "lora_B"):
            first, second = (getattr(projection, side) for projection in attention.qkv()[:2])
            assert second.data_ptr() == first.data_ptr() + first.nbytes
    assert len(expected) == len(model.model.layers) * 12


def test_every_pass_starts_with_counters_of_zero_for_each_adapter_of_attention_and_experts():
    model = adapted()
    copies, layer = AdapterCopies(model), model.model.layers[1]
    carriers = [*layer.self_attn.qkv(), layer.self_attn.o_proj, layer.mlp.experts]
    for _ in range(2):
        with copies.in_place():
            found = [module.low_rank_ready for module in carriers]
            assert [counter.tolist() for counter in found] == [[0, 0]] * 5 and layer.mlp.router.low_rank_ready is None
            assert len({counter.data_ptr() for counter in found}) == 5
            found[0] += 3  # as a launch does
        assert all(module.low_rank_ready is None for module in carriers)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_launches_of_products_compute_low_rank_rows_too(is_enabled):
    """On a GPU: four products a layer, and no further launch for LoRA."""
    config = GptOssConfig(vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    lora = LoraConfig(16, 32.0, ["q_proj", "o_proj", "experts"])
    plan = Rehearsal(config=config, dtype=torch.bfloat16, experts="mxfp4", lora=lora, activation_checkpointing=False,
                     max_rows=1, max_len=64, draws=[], filters=False, shares_prompts=False, scores=False)
    launched = []
    with recording(Gpu(90, 132), lambda kernel, arguments, constants: launched.append((kernel.fn.__name__, constants))):
        model = build(plan)
        decoder = Decoder(model, model.new_cache(2, 64), max_rows=1, stop_ids=[0], counts_prompts_apart=False)
        with nullcontext() if is_enabled else model.adapter_disabled():
            decoder._step(Rows(*decoder._table[:, :1]), PlainDraw(1.0, False), KeyReading(shares=False, longest=0))
    products = [constants for name, constants in launched if name == "moe_decode_kernel"]
    assert len(products) == 4 * 2 and all((constants["LOW_INNER"] > 0) == is_enabled for constants in products)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_have_no_copies(dtype):
    model = adapted(dtype)
    with AdapterCopies(model).in_place():
        assert all(parameter.dtype == torch.float32 for parameter in model.trainable_parameters().values())
