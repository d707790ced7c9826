"""The whole model in float16, on either kind of products: in the interpreter and on a GPU, with a stream beyond its range."""

from functools import cache

import pytest
import torch
from paths import FIXTURES

from models.formats.hugging_face import load_model
from models.lora import LoraConfig, attach_lora

FIXTURE = FIXTURES / "tiny_mxfp4"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "experts", "router"]
NUM_TOKENS, LOSS_SCALE = 1e6, 2.0**20  # what a loss is divided by, and what brings its gradients back into float16's range
CASES = [("library", 0), ("library", 14), ("", 14)]  # GRPO_PRODUCTS, and the power of two of down projections


def log_probs_and_gradients(dtype, device, *, boost, loss_scale):
    """Of a windowed and a full layer, with down projections 2^boost times as large; and the largest number of the last
    residual stream."""
    model = load_model(FIXTURE, device=device, dtype=dtype)
    model.model.layers = model.model.layers[:2]
    attach_lora(model, LoraConfig(rank=4, alpha=8.0, targets=TARGETS), seed=0)
    generator, peaks = torch.Generator().manual_seed(1), []
    for name, parameter in model.trainable_parameters().items():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(device)
    for block in model.model.layers:
        for name, buffer in block.mlp.experts.named_buffers():
            if name.startswith("down_proj_scale"):  # in either layout of packed weights
                buffer += boost
    model.model.norm.register_forward_hook(lambda module, inputs, output: peaks.append(inputs[0].abs().max().item()))
    tokens = torch.randint(0, model.config.vocab_size, (40,), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones(40, dtype=torch.bool)
    mask[[0, 15]] = False
    log_probs, _ = model.log_probs(tokens, torch.tensor([0, 15, 40], device=device), temperature=1.0, mask=mask.to(device))
    weights = torch.randn(40, generator=torch.Generator().manual_seed(3)).to(device)
    ((log_probs * weights).sum() / NUM_TOKENS * loss_scale).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.trainable_parameters().values()])
    return log_probs.detach(), gradients / loss_scale, peaks[0]


@cache  # for either kind of products
def in_float32(device, boost):
    with pytest.MonkeyPatch.context() as patch:  # on the CPU by the references, which autograd differentiates
        patch.delenv("TRITON_INTERPRET", raising=False)
        return log_probs_and_gradients(torch.float32, device, boost=boost, loss_scale=1.0)


def check(device, boost):
    exact, exact_gradients, peak = in_float32(device, boost)
    ours, gradients, _ = log_probs_and_gradients(torch.float16, device, boost=boost, loss_scale=LOSS_SCALE)
    assert (peak > 65504) == (boost > 0)
    assert (ours - exact).abs().max() <= 0.15  # nats, of log-probs down to -20
    assert (gradients - exact_gradients).norm() <= 0.05 * exact_gradients.norm()


@pytest.mark.interpreter
@pytest.mark.parametrize("products, boost", CASES)
def test_float16_follows_float32_beyond_its_own_range(products, boost, monkeypatch):
    monkeypatch.setenv("GRPO_PRODUCTS", products)
    check("cpu", boost)


@pytest.mark.gpu
@pytest.mark.parametrize("products, boost", CASES)
def test_float16_on_a_gpu_follows_float32_beyond_its_own_range(products, boost, monkeypatch):
    monkeypatch.setenv("GRPO_PRODUCTS", products)
    check("cuda", boost)
