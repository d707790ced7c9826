"""Grouped products: a whole mixture of experts against float64 goldens with every gradient, and MXFP4 against dense."""


import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.experts.gemm import grouped_linear
from kernels.experts.sorting import route
from kernels.experts.transport import combine_reference, copy_rows
from kernels.packed.mxfp4 import dequantize
from kernels.packed.weights import Dense, Mxfp4
from kernels.swiglu import swiglu

GOLDEN = load_file(FIXTURES / "kernels.safetensors")
CASES = ("top2of8", "top4of8_starved", "one_token")
WEIGHTS = ("x", "router_w", "router_b", "w1", "b1", "w2", "b2")


def golden(case: str) -> dict[str, torch.Tensor]:
    prefix = f"moe.{case}."
    return {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}


def mixture(x, router_w, router_b, w1, b1, w2, b2, *, experts_per_token):
    """Golden weights are [E, out, in]; ours are [E, in, out]."""
    weights, routing = route(x.float() @ router_w.float().T + router_b.float(), experts_per_token=experts_per_token)
    h = grouped_linear(copy_rows(x, routing), Dense(w1.transpose(1, 2), b1), routing.offsets)
    y = grouped_linear(swiglu(h, alpha=1.702, limit=7.0), Dense(w2.transpose(1, 2), b2), routing.offsets)
    return combine_reference(y, weights, routing, None)


@pytest.mark.parametrize("case", CASES)
def test_a_mixture_of_experts_and_all_its_gradients_match_the_golden_ones(case):
    data = golden(case)
    leaves = {name: data[name].float().requires_grad_() for name in WEIGHTS}
    y = mixture(**leaves, experts_per_token=data["topk_idx"].shape[1])
    y.backward(data["do"].float())
    torch.testing.assert_close(y, data["y"], rtol=1e-5, atol=1e-5 * data["y"].abs().max().item())
    for name, leaf in leaves.items():
        expected = data[f"d{name}"]
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item(), msg=f"d{name}")


def test_an_expert_without_tokens_gets_zero_gradients():
    data = golden("top4of8_starved")
    starved = 5
    assert not (data["topk_idx"] == starved).any()
    leaves = {name: data[name].float().requires_grad_() for name in WEIGHTS}
    mixture(**leaves, experts_per_token=4).backward(data["do"].float())
    for name in ("w1", "b1", "w2", "b2", "router_w", "router_b"):
        busy = [expert for expert in range(8) if expert != starved]
        assert (leaves[name].grad[starved] == 0).all() and (leaves[name].grad[busy] != 0).any(), name


def eager_bf16(data: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same formula token by token, every intermediate in bf16."""
    rows = []
    for x, experts, weights in zip(data["x"], data["topk_idx"], data["topk_weight"].bfloat16()):
        total = torch.zeros_like(x)
        for expert, weight in zip(experts, weights):
            h = data["w1"][expert] @ x + data["b1"][expert]
            gate, up = h[0::2].clamp(max=7), h[1::2].clamp(-7, 7)
            total = total + weight * (data["w2"][expert] @ (gate * torch.sigmoid(gate * 1.702) * (up + 1)) + data["b2"][expert])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_bf16_error_is_at_most_twice_that_of_eager_bf16(case):
    data = golden(case)
    y = mixture(**{name: data[name] for name in WEIGHTS}, experts_per_token=data["topk_idx"].shape[1])
    assert y.dtype == torch.bfloat16
    exact = data["y"].double()
    assert (y.double() - exact).norm() <= 2 * (eager_bf16(data).double() - exact).norm()


def packed(num_experts=3, size_out=12, size_in=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (num_experts, size_out, size_in // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 129, (num_experts, size_out, size_in // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales, torch.randn(num_experts, size_out, generator=generator)


@pytest.mark.parametrize("offsets", [[0, 5, 5, 9], [0, 0, 0, 9], [0, 9, 9, 9], [0, 0, 0, 0], [0, 1, 2, 3]])
def test_packed_experts_equal_their_dequantised_weights_in_value_and_gradient(offsets):
    blocks, scales, bias = packed()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(offsets[-1], 64, generator=generator)
    grad = torch.randn(offsets[-1], 12, generator=generator)
    ours_x, ours_bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    y = grouped_linear(ours_x, Mxfp4(blocks, scales, ours_bias), offsets)
    y.backward(grad)
    their_x, their_bias = x.double().requires_grad_(), bias.double().requires_grad_()
    weight = dequantize(blocks, scales, torch.float64)  # [E, out, in]
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(offsets).diff())
    expected = torch.einsum("rk,rnk->rn", their_x, weight[owner]) + their_bias[owner]
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours_x.grad.double(), their_x.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours_bias.grad.double(), their_bias.grad, rtol=1e-5, atol=1e-5)


def test_neither_rows_nor_dequantised_weights_are_kept_for_the_backward_of_packed_ones():
    blocks, scales, bias = packed()
    y = grouped_linear(torch.randn(4, 64, requires_grad=True), Mxfp4(blocks, scales, bias), [0, 2, 3, 4])
    assert y.grad_fn.saved_tensors == () and y.grad_fn.packed.blocks is blocks


@pytest.mark.parametrize("offsets", [[0, 4, 4, 7], [0, 0, 0, 0]])
def test_dense_experts_without_bias_in_value_and_gradient(offsets):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(offsets[-1], 6, generator=generator), torch.randn(3, 6, 4, generator=generator)
    grad = torch.randn(offsets[-1], 4, generator=generator)
    ours = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    theirs = [tensor.double().requires_grad_() for tensor in (x, weight)]
    y = grouped_linear(ours[0], Dense(ours[1], None), offsets)
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(offsets).diff())
    expected = torch.einsum("rk,rkn->rn", theirs[0], theirs[1][owner])
    y.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, leaf in zip(ours, theirs):
        torch.testing.assert_close(mine.grad.double(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_strided_rows_weights_and_gradients_give_the_same_values():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((7, 6), (3, 6, 4), (3, 4)))
    results = []
    for strided in (False, True):
        leaves = [tensor.clone() for tensor in (x, weight, bias)]
        if strided:
            leaves = [leaves[0].T.contiguous().T, leaves[1].transpose(1, 2).contiguous().transpose(1, 2),
                      torch.stack((bias, bias), dim=-1)[..., 0]]
            assert not any(leaf.is_contiguous() for leaf in leaves)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = grouped_linear(leaves[0], Dense(*leaves[1:]), [0, 3, 3, 7])
        (y.sum(0) * torch.arange(1.0, 5.0)).sum().backward()  # an expanded, strided gradient
        results.append([y, *(leaf.grad for leaf in leaves)])
    for plain, other in zip(*results):
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-6)


def test_packed_experts_in_bf16_stay_within_twice_the_error_of_eager_bf16():
    blocks, scales, bias = packed()
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    offsets, bias = [0, 4, 4, 9], bias.bfloat16()
    owner = torch.tensor([0] * 4 + [2] * 5)
    exact = torch.einsum("rk,rnk->rn", x.double(), dequantize(blocks, scales, torch.float64)[owner]) + bias.double()[owner]
    weight = dequantize(blocks, scales, torch.bfloat16)[owner]
    eager = torch.einsum("rk,rnk->rn", x, weight) + bias[owner]
    ours = grouped_linear(x, Mxfp4(blocks, scales, bias), offsets)
    assert (ours.double() - exact).norm() <= 2 * (eager.double() - exact).norm()
