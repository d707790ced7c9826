"""RMSNorm against float64 goldens, forward and every gradient, and its single rounding."""


import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.norm import rms_norm

GOLDEN = load_file(FIXTURES / "kernels.safetensors")
CASES = ("h64_small", "h2880")
EPS = 1e-5


def golden(case: str) -> dict[str, torch.Tensor]:
    prefix = f"rmsnorm.{case}."
    return {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_match_the_golden_ones(case):
    data = golden(case)
    x, w = data["x"].float().requires_grad_(), data["w"].float().requires_grad_()
    y = rms_norm(x, w, eps=EPS)
    y.backward(data["do"].float())
    torch.testing.assert_close(y, data["y"], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, data["dx"], rtol=2e-5, atol=2e-6 * data["dx"].abs().max().item())
    torch.testing.assert_close(w.grad, data["dw"], rtol=2e-5, atol=2e-6 * data["dw"].abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_bf16_rounds_once_after_the_weight(case):
    data = golden(case)
    assert torch.equal(rms_norm(data["x"], data["w"], eps=EPS), data["y_bf16"])
    x_f32 = data["x"].float()
    normalized = x_f32 * torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + EPS)
    rounded_twice = normalized.bfloat16() * data["w"]  # Llama's order
    assert not torch.equal(rounded_twice, data["y_bf16"]), "the golden case cannot tell one rounding from two"


def test_eps_stands_inside_the_root():
    # mean(x^2) = 3e-5, so the denominator is sqrt(4e-5)
    x = torch.full((1, 4), 3e-5**0.5)
    assert rms_norm(x, torch.full((4,), 2.0), eps=EPS)[0, 0].item() == pytest.approx(2.0 * (3e-5 / 4e-5) ** 0.5, rel=1e-6)
    assert rms_norm(torch.zeros(1, 4), torch.ones(4), eps=EPS).tolist() == [[0.0] * 4]


def test_any_leading_shape_and_stride():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 5, generator=generator), torch.randn(12, generator=generator)[::2]
    rows = torch.stack([rms_norm(column.contiguous(), w.contiguous(), eps=EPS) for column in x.T])
    torch.testing.assert_close(rms_norm(x.T, w, eps=EPS), rows, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rms_norm(x.T[None, :, None], w, eps=EPS)[0, :, 0], rows, rtol=1e-6, atol=1e-7)
    assert rms_norm(torch.empty(0, 6), w, eps=EPS).shape == (0, 6)
