"""The unmerged low-rank update against the merged weight in float64."""

import pytest
import torch

from kernels.dense import linear
from kernels.linear import lora_linear

SCALE = 2.5


def tensors(*, dtype=torch.float32, rank=3, num_tokens=7, size_in=10, size_out=6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (num_tokens, size_in), "weight": (size_out, size_in), "bias": (size_out,), "lora_A": (rank, size_in),
              "lora_B": (size_out, rank)}
    made = {name: torch.randn(shape, generator=generator).to(dtype).requires_grad_() for name, shape in shapes.items()}
    # master copies stay fp32
    return made | {name: made[name].detach().float().requires_grad_() for name in ("lora_A", "lora_B")}


def merged(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """y = x (W + scale B A)^T + b in float64, and the leaves its gradient goes to."""
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    weight = leaves["weight"] + SCALE * leaves["lora_B"] @ leaves["lora_A"]
    return leaves["x"] @ weight.T + leaves["bias"], leaves


def test_output_and_every_gradient_equal_those_of_the_merged_weight():
    given = tensors()
    y, (expected, leaves) = lora_linear(*given.values(), scale=SCALE), merged(given)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    expected.backward(grad.double())
    for name, leaf in leaves.items():
        torch.testing.assert_close(given[name].grad.double(), leaf.grad, rtol=1e-5, atol=2e-5, msg=name)


def test_the_update_is_multiplied_by_the_scale():
    x, weight, down, up = torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), 3.0), torch.full((1, 1), 5.0)
    assert lora_linear(x, weight, None, down, up, scale=0.5).item() == 1 + 0.5 * 15
    assert lora_linear(x, weight, torch.ones(1), down, up, scale=2.0).item() == 1 + 1 + 2 * 15


def test_masters_get_fp32_gradients_under_bf16_activations():
    given = tensors(dtype=torch.bfloat16)
    y = lora_linear(*given.values(), scale=SCALE)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and given["x"].grad.dtype == torch.bfloat16
    assert given["lora_A"].grad.dtype == given["lora_B"].grad.dtype == torch.float32


@pytest.mark.parametrize("num_tokens", [1, 63])
def test_bf16_error_is_at_most_twice_that_of_eager_bf16(num_tokens):
    given = tensors(dtype=torch.bfloat16, num_tokens=num_tokens, size_in=96, size_out=64)
    exact = merged(given)[0].detach()
    x, weight, bias, down, up = (given[name].detach().bfloat16() for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    eager = x @ weight.T + bias + SCALE * (x @ down.T @ up.T)
    ours = lora_linear(*(tensor.detach() for tensor in given.values()), scale=SCALE)
    assert (ours.double() - exact).norm() <= 2 * (eager.double() - exact).norm()


def test_no_tokens_and_strided_input():
    given = {name: tensor.detach() for name, tensor in tensors().items()}
    assert lora_linear(given["x"][:0], *list(given.values())[1:], scale=SCALE).shape == (0, 6)
    strided = given["x"].T.contiguous().T
    assert not strided.is_contiguous()
    torch.testing.assert_close(lora_linear(strided, *list(given.values())[1:], scale=SCALE),
                               lora_linear(*given.values(), scale=SCALE), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("size_in, size_out", [(64, 128), (96, 64), (128, 64), (16, 40)])
def test_a_row_does_not_depend_on_how_many_run_beside_it(size_in, size_out):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(32, size_in, generator=generator), torch.randn(size_out, size_in, generator=generator)
    everything = linear(x, weight, weight[:, 0])
    for num_rows in (0, 1, 2, 3, 5, 8, 9, 31):
        torch.testing.assert_close(linear(x[:num_rows], weight, weight[:, 0]), everything[:num_rows], rtol=1e-7, atol=1e-6)


def test_few_rows_and_many_equal_the_float64_product_with_their_gradients():
    for num_rows in (1, 7, 8, 9):
        generator = torch.Generator().manual_seed(num_rows)
        leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((num_rows, 5), (3, 5), (3,))]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        y, expected = linear(*leaves), exact[0] @ exact[1].T + exact[2]
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
        y.square().sum().backward()
        expected.square().sum().backward()
        for mine, leaf in zip(leaves, exact):
            torch.testing.assert_close(mine.grad.double(), leaf.grad, rtol=1e-5, atol=1e-5)
