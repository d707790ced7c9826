"""The SwiGLU kernel, and the gradient that the experts' backward takes: in the interpreter against goldens and float64, ahead of
time for every GPU, and on a GPU."""


import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for, half
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.experts.forward import activation_grad
from kernels.swiglu import BLOCK, NUM_WARPS, _swiglu_kernel, swiglu

GOLDEN = load_file(FIXTURES / "kernels.safetensors")
ALPHA, LIMIT = 1.702, 7.0


def normal(*shape, seed=0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return (4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def plain(h):
    """The formula as it reads, in the dtype of h."""
    gate, up = h[..., 0::2].clamp(max=LIMIT), h[..., 1::2].clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(ALPHA * gate) * (up + 1)


def value_and_gradient(function, h, grad):
    leaf = h.detach().clone().requires_grad_()
    y = function(leaf)
    y.backward(grad)
    return y.detach(), leaf.grad


def ours(h):
    return swiglu(h, alpha=ALPHA, limit=LIMIT)


def gradient_and_value(h, grad):
    """The gradient of h [R, 2F] and the activation again, as the experts' backward gets them for gate weights of 1."""
    num_rows, (h, grad) = len(h), (h.clone(), grad.clone())
    ones, rows = torch.ones(num_rows, 1, device=h.device), torch.arange(num_rows, dtype=torch.int32, device=h.device)
    activation_grad(grad, h, ones, rows, alpha=ALPHA, limit=LIMIT, dots=torch.zeros_like(ones))
    return h, grad


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.float16, 2e-3)])
def test_output_and_gradient_match_the_golden_ones_on_and_around_the_limit(dtype, tolerance, poisoned):
    data = {name: GOLDEN[f"swiglu.{name}"] for name in ("h", "do", "y", "dh")}  # float16 takes the path of packed pairs
    assert dtype == torch.float32 or data["h"].half().bfloat16().equal(data["h"])
    h, y = data["h"].to(dtype).contiguous(), ours(data["h"].to(dtype))
    grad, again = gradient_and_value(h, data["do"].to(dtype))
    assert torch.equal(again, y)
    torch.testing.assert_close(y.float(), data["y"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.float(), data["dh"], rtol=tolerance, atol=tolerance)


@pytest.mark.interpreter
@pytest.mark.parametrize("num_rows, width", [(1, 1), (3, 63), (17, 127), (2, BLOCK)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_odd_sizes_and_the_gradient(num_rows, width, dtype, poisoned):
    h, grad = normal(num_rows, 2 * width, dtype=dtype), normal(num_rows, width, seed=1, dtype=dtype)
    y, (grad_h, again) = ours(h), gradient_and_value(h, grad)
    expected_y, expected_grad = value_and_gradient(plain, h.double(), grad.double())
    tolerance = {"rtol": 2e-6, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(y.double(), expected_y, **tolerance)
    torch.testing.assert_close(grad_h.double(), expected_grad, **tolerance)
    assert torch.equal(again, y)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_rows_strided_rows_and_rows_that_start_on_half_a_pair(dtype, poisoned):
    h = normal(5, 12, dtype=dtype)
    strided = torch.cat((h, h), dim=1)[:, :12]
    shifted = torch.cat((h.new_zeros(1), h.flatten()))[1:].view(5, 12)
    for given in (strided, shifted):
        assert torch.equal(ours(given), ours(h))
    assert ours(h[:0]).shape == (0, 6)


@pytest.mark.interpreter
def test_nan_comes_through_and_infinities_are_clamped():
    nan, inf = float("nan"), float("inf")
    y = ours(torch.tensor([[nan, 1.0, 1.0, nan, inf, 1.0, 1.0, -inf]]))[0]
    assert torch.isnan(y[:2]).all()
    torch.testing.assert_close(y[2:], plain(torch.tensor([7.0, 1.0, 1.0, -7.0])))


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernel_fits_every_gpu_and_moves_16_bytes_at_a_time(arch):
    signature = {"h_ptr": "*i32", "y_ptr": half(arch), "alpha": "fp32", "limit": "fp32", "num_pairs": "i32"}
    resources = compile_for(_swiglu_kernel, signature, {"BLOCK": BLOCK}, arch, num_warps=NUM_WARPS, num_stages=3,
                            divisible=("h_ptr", "y_ptr", "num_pairs"))
    check_fits(resources, arch)
    assert "LDG.E.128" in resources.sass and "STG.E.128" in resources.sass and "LDG.E.U16" not in resources.sass


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows, width", [(8192, 2880), (1, 2880), (63, 127)])
def test_bf16_errors_stay_within_twice_those_of_eager_bf16(num_rows, width, poisoned):
    h = normal(num_rows, 2 * width, dtype=torch.bfloat16, device="cuda")
    grad = normal(num_rows, width, seed=1, dtype=torch.bfloat16, device="cuda")
    exact = value_and_gradient(plain, h.double(), grad.double())
    (grad_h, again), eager = gradient_and_value(h, grad), value_and_gradient(plain, h, grad)
    results = ours(h), grad_h
    for actual, other, expected in zip(results, eager, exact):
        assert (actual.double() - expected).norm() <= 2 * (other.double() - expected).norm()
    assert torch.equal(again, results[0]) and torch.equal(gradient_and_value(h, grad)[0], grad_h)
