"""The whole model on the path for GPUs whose tensor cores Triton does not drive, forced on the CPU, against goldens."""


import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from models.formats.hugging_face import load_model
from models.keys import PrefillChunk
from models.lora import TARGETS, LoraConfig, attach_lora

NAMES = ("tiny_bf16", "tiny_mxfp4")


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setenv("GRPO_PRODUCTS", "library")


def tokens_and_bounds() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 200, (60,), generator=torch.Generator().manual_seed(2)), torch.tensor([0, 25, 60])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_packed_sequences_match_the_golden_ones(name, library):
    golden = load_file(FIXTURES / name / "golden.safetensors")
    model = load_model(FIXTURES / name, device="cpu", dtype=torch.float32)
    logits = model.logits(golden["packed.input_ids"], golden["packed.cu_seqlens"])
    torch.testing.assert_close(logits, golden["packed.logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_log_probs_and_every_adapter_gradient_equal_those_of_the_references(name, monkeypatch):
    tokens, bounds = tokens_and_bounds()
    mask = torch.ones(60, dtype=torch.bool).index_fill(0, bounds[:-1], False)
    results = []
    for forced in ("", "library"):
        monkeypatch.setenv("GRPO_PRODUCTS", forced)
        model = load_model(FIXTURES / name, device="cpu", dtype=torch.float32)
        attach_lora(model, LoraConfig(rank=3, alpha=6.0, targets=list(TARGETS), train_sinks=True, train_norms=True), seed=0)
        generator = torch.Generator().manual_seed(1)
        for parameter_name, parameter in model.trainable_parameters().items():
            if "lora_B" in parameter_name:  # zero to begin with, which would leave A without a gradient
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        log_probs, _ = model.log_probs(tokens, bounds, temperature=0.9, mask=mask)
        (log_probs * torch.randn(60, generator=torch.Generator().manual_seed(3))).sum().backward()
        results.append({"log_probs": log_probs.detach()} | {n: p.grad for n, p in model.trainable_parameters().items()})
    for key, expected in results[0].items():
        assert expected.abs().max() > 0, key
        torch.testing.assert_close(results[1][key], expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item(), msg=key)


def test_sampler_and_trainer_agree(library):
    tokens, _ = tokens_and_bounds()
    model = load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32)
    row = tokens[:40]
    mask = torch.arange(40) > 0
    chosen, _ = model.log_probs(row, torch.tensor([0, 40]), temperature=0.7, mask=mask)
    cache, slot = model.new_cache(1, 40), torch.tensor([0])
    assert cache.reserve(0, 40)
    logits = model.head(model.prefill(row[:5], [PrefillChunk(0, 0, 5)], cache))
    for position in range(5, 40):
        sampled = torch.log_softmax(logits[0] / 0.7, dim=-1)[row[position]]
        assert abs(sampled - chosen[position]) <= 5e-5, position
        logits = model.head(model.decode(row[position:position + 1], torch.tensor([position]), cache, slot))
