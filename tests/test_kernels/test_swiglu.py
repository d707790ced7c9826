"""Clamped SwiGLU against float64 goldens and numbers worked out by hand."""

import math

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.swiglu import swiglu

GOLDEN = load_file(FIXTURES / "kernels.safetensors")
ALPHA, LIMIT = 1.702, 7.0


def one(gate: float, up: float, *, alpha: float = ALPHA, limit: float = LIMIT) -> tuple[float, float, float]:
    """Value, d gate, d up of a single pair."""
    h = torch.tensor([[gate, up]], requires_grad=True)
    y = swiglu(h, alpha=alpha, limit=limit)
    y.sum().backward()
    return y.item(), *h.grad[0].tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_output_and_gradient_match_the_golden_ones_on_and_around_the_limit():
    h = GOLDEN["swiglu.h"].float().requires_grad_()
    y = swiglu(h, alpha=ALPHA, limit=LIMIT)
    y.backward(GOLDEN["swiglu.do"].float())
    torch.testing.assert_close(y, GOLDEN["swiglu.y"], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(h.grad, GOLDEN["swiglu.dh"], rtol=5e-6, atol=2e-6)


def test_even_rows_are_gates_and_odd_rows_are_ups():
    assert one(1.0, 0.0)[0] == pytest.approx(sigmoid(1.702), rel=1e-6)  # 1 * sigmoid(1.702) * (0 + 1)
    assert one(0.0, 1.0)[0] == 0.0  # a closed gate
    assert one(2.0, 3.0)[0] == pytest.approx(2 * sigmoid(3.404) * 4, rel=1e-6)


def test_the_gate_is_clamped_above_only_and_the_up_on_both_sides():
    assert one(9.0, 0.0)[0] == pytest.approx(7 * sigmoid(7 * 1.702), rel=1e-6)
    assert one(-9.0, 0.0)[0] == pytest.approx(-9 * sigmoid(-9 * 1.702), rel=1e-5)
    assert one(1.0, 9.0)[0] == pytest.approx(sigmoid(1.702) * 8, rel=1e-6)
    assert one(1.0, -9.0)[0] == pytest.approx(sigmoid(1.702) * -6, rel=1e-6)


def test_the_gradient_passes_at_the_limit_and_is_zero_beyond():
    _, gate_at, up_at = one(7.0, 7.0)
    assert gate_at > 7.9 and up_at == pytest.approx(7 * sigmoid(7 * 1.702), rel=1e-6)
    assert one(1.0, -7.0)[2] == pytest.approx(sigmoid(1.702), rel=1e-6)
    assert one(7.01, 1.0)[1] == 0.0 and one(1.0, 7.01)[2] == 0.0 and one(1.0, -7.01)[2] == 0.0
    assert one(-7.01, 1.0)[1] != 0.0


def test_alpha_and_limit_are_those_asked_for():
    assert one(1.0, 5.0, alpha=1.0, limit=2.0)[0] == pytest.approx(sigmoid(1.0) * 3, rel=1e-6)


def test_bf16_is_computed_in_fp32_and_rounded_once():
    h = GOLDEN["swiglu.h"]
    y = swiglu(h, alpha=ALPHA, limit=LIMIT)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, swiglu(h.float(), alpha=ALPHA, limit=LIMIT).bfloat16())
    assert ((y.double() - GOLDEN["swiglu.y"].double()).abs() <= 2.0**-8 * GOLDEN["swiglu.y"].double().abs()).all()


def test_no_rows_and_strided_rows():
    assert swiglu(torch.empty(0, 8), alpha=ALPHA, limit=LIMIT).shape == (0, 4)
    h = GOLDEN["swiglu.h"].float()
    strided = torch.cat((h, h), dim=1)[:, : h.shape[1]]
    assert not strided.is_contiguous()
    assert torch.equal(swiglu(strided, alpha=ALPHA, limit=LIMIT), swiglu(h, alpha=ALPHA, limit=LIMIT))
