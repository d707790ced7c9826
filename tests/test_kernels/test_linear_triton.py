"""Triton's dense projection with LoRA: in the interpreter and on a GPU against the merged weight in float64."""

import pytest
import torch

from kernels.linear import Adapter, linear, linear_backward, project
from models.projections import Linear


def tensors(*, num_tokens, size_in, size_out, rank, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (num_tokens, size_in), "weight": (size_out, size_in), "bias": (size_out,), "lora_A": (rank, size_in),
              "lora_B": (size_out, rank)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("weight", "lora_A"):
        made[name] /= size_in**0.5
    made["lora_B"] *= 0.1
    return {name: tensor.to(device, torch.float32 if name.startswith("lora") else dtype).requires_grad_()
            for name, tensor in made.items()}


def merged(given, scale):
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items() if tensor is not None}
    weight = leaves["weight"] + (scale * leaves["lora_B"] @ leaves["lora_A"] if "lora_A" in leaves else 0)
    return leaves["x"] @ weight.T + leaves["bias"], leaves


def outcome(given, grad, scale):
    """The output and the gradients by name."""
    x, *parameters = (None if tensor is None else torch.nn.Parameter(tensor.detach()) for tensor in given.values())
    module, grads, x = Linear(*parameters[:2]), {}, x.detach()
    module.lora_A, module.lora_B, module.lora_scale = *parameters[2:], scale
    with torch.no_grad():
        y, low_rank = linear([module], x, keeps_low_rank=True)
        grad_x = linear_backward([module], grad, x, low_rank, grads, needs_x=True)
    return {"y": y, "x": grad_x} | {name: grads[parameter] for name, parameter in module.named_parameters()}


@pytest.mark.interpreter
@pytest.mark.parametrize("num_tokens, rank", [(1, 3), (63, 16), (33, 70), (1, None), (63, None)])
def test_output_and_every_gradient_equal_those_of_the_merged_weight(num_tokens, rank):
    given = tensors(num_tokens=num_tokens, size_in=40, size_out=24, rank=rank or 1)
    if rank is None:
        given["lora_A"] = given["lora_B"] = None
    expected, leaves = merged(given, 2.5)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(grad.double())
    ours = outcome(given, grad, 2.5)
    torch.testing.assert_close(ours.pop("y").double(), expected, rtol=1e-5, atol=1e-5)
    assert ours.keys() == leaves.keys()
    for name, leaf in leaves.items():
        torch.testing.assert_close(ours[name].double(), leaf.grad, rtol=1e-5, atol=2e-5, msg=name)


@pytest.mark.interpreter
def test_no_bias_no_tokens_and_strided_input():
    given = {name: tensor.detach() for name, tensor in tensors(num_tokens=7, size_in=40, size_out=24, rank=3).items()}
    x, weight, bias, down, up = given.values()
    adapter = Adapter(down, up, None, [slice(0, 24)], 1.0)
    for keeps_low_rank in (False, True):
        y, _ = project(x, weight, bias, adapter, keeps_low_rank=keeps_low_rank)
        bare, _ = project(x.T.contiguous().T, weight, None, adapter, keeps_low_rank=keeps_low_rank)
        torch.testing.assert_close(bare + bias, y)
        assert project(x[:0], weight, bias, adapter, keeps_low_rank=keeps_low_rank)[0].shape == (0, 24)


def eager(given, grad, scale):
    """The same formula with every tensor and every product in bf16: the output and the gradients by name."""
    leaves = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in given.items()}
    x, weight, bias, down, up = leaves.values()
    y = x @ weight.T + bias + scale * (x @ down.T @ up.T)
    y.backward(grad)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens, size_in, size_out, rank", [
    (2048, 2880, 4096, 16), (1000, 4096, 2880, 8), (1, 2880, 512, 64),
])  # fmt: skip
def test_bf16_error_is_at_most_twice_that_of_eager_bf16(num_tokens, size_in, size_out, rank):
    given = tensors(num_tokens=num_tokens, size_in=size_in, size_out=size_out, rank=rank, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn(num_tokens, size_out, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    expected, leaves = merged(given, 2.0)
    expected.backward(grad.double())
    exact = {"y": expected.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
    runs = [outcome(given, grad, 2.0) for _ in range(2)]
    theirs = eager(given, grad, 2.0)
    for name, target in exact.items():
        assert torch.equal(runs[0][name], runs[1][name]), name
        error, allowed = (runs[0][name].double() - target).norm(), 2 * (theirs[name].double() - target).norm()
        assert error <= allowed, f"{name}: {error} against {allowed}"
