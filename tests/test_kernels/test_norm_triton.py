"""The RMSNorm kernels: in the interpreter against goldens and float64, ahead of time for every GPU, and on a GPU."""


import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for, half, stream
from paths import FIXTURES
from safetensors.torch import load_file

import kernels.norm
from kernels.norm import (
    _norm_grad_kernel,
    _norm_kernel,
    _sum_partials_kernel,
    add_rms_norm,
    norm_backward,
    norm_forward,
    rms_norm,
)

GOLDEN = load_file(FIXTURES / "kernels.safetensors")
EPS = 1e-5


def normal(*shape, seed=0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def add_norm_plain(x, residual, weight):
    """The formula as it reads, in the dtype of its arguments."""
    total = x + residual
    return total / torch.sqrt(total.square().mean(-1, keepdim=True) + EPS) * weight, total


def plain_outcome(tensors, grads) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the formula, by autograd."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y, total = add_norm_plain(**leaves)
    torch.autograd.backward([y, total], grads)
    return {"y": y.detach(), "total": total.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def outcome(tensors, grads) -> dict[str, torch.Tensor]:
    """Outputs and gradients as a layer gets them from the kernels: one gradient serves x and the residual."""
    x, residual, weight = tensors.values()
    y, total, inv_rms = norm_forward(x, residual, weight, EPS, x.dtype)
    grad, grad_weight = norm_backward(*grads, total, weight, inv_rms, True)
    return {"y": y, "total": total, "x": grad.to(x.dtype), "residual": grad, "weight": grad_weight}


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ("h64_small", "h2880"))
def test_output_and_gradients_match_the_golden_ones(case, poisoned):
    data = {name: GOLDEN[f"rmsnorm.{case}.{name}"].float() for name in ("x", "w", "do", "y", "dx", "dw")}
    x, w = data["x"].requires_grad_(), data["w"].requires_grad_()
    y = rms_norm(x, w, eps=EPS)
    y.backward(data["do"])
    torch.testing.assert_close(y, data["y"], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, data["dx"], rtol=2e-5, atol=2e-6 * data["dx"].abs().max().item())
    torch.testing.assert_close(w.grad, data["dw"], rtol=2e-5, atol=2e-6 * data["dw"].abs().max().item())


@pytest.mark.interpreter
@pytest.mark.parametrize("num_rows, width", [(1, 1), (3, 63), (2, 127), (11, 5), (5, 600)])
def test_the_sum_its_norm_and_all_gradients_equal_float64(num_rows, width, poisoned, monkeypatch):
    monkeypatch.setattr(kernels.norm, "NUM_PARTIALS", 4)  # 11 rows are then 3, 3, 3 and 2
    tensors = {
        "x": normal(num_rows, width),
        "residual": normal(num_rows, width, seed=1),
        "weight": normal(width, seed=2),
    }
    grads = [normal(num_rows, width, seed=3), normal(num_rows, width, seed=4)]
    actual = outcome(tensors, grads)
    expected = plain_outcome({name: value.double() for name, value in tensors.items()}, [grad.double() for grad in grads])
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].double(), value, rtol=2e-5, atol=5e-6 * value.abs().max().item(), msg=name
        )


def mixed_errors(num_rows, width, device) -> None:
    """A float16 x beside a float32 stream that float16 could not hold, against float64."""
    tensors = {"x": normal(num_rows, width), "residual": normal(num_rows, width, seed=1) * 1e5, "weight": normal(width, seed=2)}
    tensors = {name: value.to(device, torch.float32 if name == "residual" else torch.float16) for name, value in tensors.items()}
    grads = [normal(num_rows, width, seed=3, dtype=torch.float16, device=device), normal(num_rows, width, seed=4, device=device)]
    actual = outcome(tensors, grads)
    expected = plain_outcome({name: value.double() for name, value in tensors.items()}, [grad.double() for grad in grads])
    for name, value in expected.items():
        dtype = torch.float32 if name in ("total", "residual") else torch.float16
        assert actual[name].dtype == dtype, name
        error = (actual[name].double() - value).norm()
        assert error <= (2e-6 if dtype == torch.float32 else 1e-3) * value.norm(), name
    alone = rms_norm(actual["total"], tensors["weight"], eps=EPS, dtype=torch.float16)
    assert torch.equal(alone, actual["y"])


@pytest.mark.interpreter
@pytest.mark.parametrize("num_rows, width", [(3, 63), (5, 600)])
def test_a_half_delta_joins_a_float32_stream(num_rows, width, poisoned):
    mixed_errors(num_rows, width, "cpu")


@pytest.mark.gpu
def test_a_half_delta_joins_a_float32_stream_on_a_gpu(poisoned):
    mixed_errors(2048, 2880, "cuda")


@pytest.mark.interpreter
def test_the_public_sum_and_norm_have_the_bits_of_the_layers_own(poisoned):
    x, residual, weight = normal(3, 20), normal(3, 20, seed=1), normal(40, seed=2)[::2]
    y, total, _ = norm_forward(x, residual, weight.contiguous(), EPS, x.dtype)
    for ours, expected in zip(add_rms_norm(x[:, None], residual[:, None], weight, eps=EPS), (y, total)):
        assert torch.equal(ours, expected[:, None])


@pytest.mark.interpreter
def test_strided_inputs_and_gradients_and_any_leading_shape(poisoned):
    x, weight, grad = normal(6, 5), normal(12)[::2], normal(6, 5, seed=1)
    results = []
    for given, w, given_grad in (
        (x.T, weight, grad.T),
        (x.T.contiguous(), weight.contiguous(), grad.T.contiguous()),
        (x.T[None, :, None], weight, grad.T[None, :, None]),
    ):
        leaf = given.detach().requires_grad_()
        y = rms_norm(leaf, w, eps=EPS)
        y.backward(given_grad)
        results.append((y.detach().reshape(5, 6), leaf.grad.reshape(5, 6)))
    for y, gradient in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(gradient, results[0][1])
    assert rms_norm(torch.empty(0, 6), weight, eps=EPS).shape == (0, 6)


@pytest.mark.interpreter
def test_a_frozen_weight_changes_nothing_else(poisoned, monkeypatch):
    monkeypatch.setattr(kernels.norm, "NUM_PARTIALS", 4)
    x, grad = normal(11, 7), normal(11, 7, seed=1)
    gradients = []
    for needs_grad in (False, True):
        leaf, weight = x.clone().requires_grad_(), normal(7, seed=2).requires_grad_(needs_grad)
        rms_norm(leaf, weight, eps=EPS).backward(grad)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.interpreter
def test_what_the_kernels_do_not_take_is_refused():
    with pytest.raises(ValueError, match="float64"):
        rms_norm(torch.ones(2, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), eps=EPS)
    with pytest.raises(ValueError, match="16384"):
        rms_norm(torch.ones(1, 16385), torch.ones(16385), eps=EPS)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_kernels_fit_every_gpu(arch):
    row = {"stride_x": "i32", "x_ptr": half(arch), "weight_ptr": half(arch), "inv_rms_ptr": "*fp32"}
    size = {"WIDTH": 2880, "BLOCK": 4096}
    forward = (
        row
        | {"residual_ptr": stream(arch), "y_ptr": half(arch), "total_ptr": stream(arch)}
        | {"eps": "fp32", "stride_residual": "i32"}
    )
    check_fits(compile_for(_norm_kernel, forward, size | {"HAS_RESIDUAL": True}, arch, num_warps=8, num_stages=3), arch)
    backward = row | {"grad_ptr": half(arch)} | {name: stream(arch) for name in ("x_ptr", "grad_total_ptr", "grad_x_ptr")}
    backward |= {name: "i32" for name in ("num_rows", "rows_per_program", "stride_grad", "stride_total")} | {
        "partial_ptr": "*fp32"
    }
    flags = {"HAS_TOTAL": True, "NEEDS_WEIGHT": True}
    check_fits(compile_for(_norm_grad_kernel, backward, size | flags, arch, num_warps=8, num_stages=3), arch)
    partials = {"partial_ptr": "*fp32", "grad_weight_ptr": half(arch), "num_partials": "i32"}
    blocks = {"WIDTH": 2880, "BLOCK_ROWS": 32, "BLOCK_COLS": 32}
    check_fits(compile_for(_sum_partials_kernel, partials, blocks, arch, num_warps=4, num_stages=3), arch)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows, width", [(1, 2880), (2048, 2880), (8191, 2880), (63, 127), (5, 64)])
def test_bf16_errors_stay_within_twice_those_of_eager_bf16(num_rows, width, poisoned):
    tensors = {
        "x": normal(num_rows, width),
        "residual": normal(num_rows, width, seed=1),
        "weight": normal(width, seed=2),
    }
    tensors = {name: tensor.to("cuda", torch.bfloat16) for name, tensor in tensors.items()}
    grads = [normal(num_rows, width, seed=seed, dtype=torch.bfloat16, device="cuda") for seed in (3, 4)]
    actual = outcome(tensors, grads)
    eager = plain_outcome(tensors, grads)
    exact = plain_outcome({name: value.double() for name, value in tensors.items()}, [grad.double() for grad in grads])
    for name, value in exact.items():
        error, eager_error = ((result[name].double() - value).norm() for result in (actual, eager))
        assert error <= 2 * eager_error + 1e-9 * value.norm(), f"{name}: {error} against {eager_error}"
    again = outcome(tensors, grads)
    assert all(torch.equal(actual[name], again[name]) for name in actual)


@pytest.mark.gpu
def test_a_row_gets_the_same_bits_in_any_batch():
    x, weight = (
        normal(500, 2880, dtype=torch.bfloat16, device="cuda"),
        normal(2880, dtype=torch.bfloat16, device="cuda"),
    )
    together = rms_norm(x, weight, eps=EPS)
    for rows in (1, 2, 16, 17):
        assert torch.equal(rms_norm(x[:rows], weight, eps=EPS), together[:rows])
    # the same sum, with its residual added first
    assert torch.equal(add_rms_norm(torch.zeros_like(x), x, weight, eps=EPS)[0], together)
