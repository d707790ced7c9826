"""Routing against goldens, ties, and the gather and weighted sum against dense float64 formulas."""


import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.experts.sorting import choose_experts, make_routing, route
from kernels.experts.transport import combine_reference, copy_rows

GOLDEN = load_file(FIXTURES / "kernels.safetensors")
CASES = ("top2of8", "top4of8_starved", "one_token")


@pytest.mark.parametrize("case", CASES)
def test_choices_and_weights_match_the_golden_ones(case):
    indices, expected = GOLDEN[f"moe.{case}.topk_idx"].long(), GOLDEN[f"moe.{case}.topk_weight"]
    weights, routing = route(GOLDEN[f"moe.{case}.router_logits"], experts_per_token=indices.shape[1])
    assert torch.equal(routing.indices, indices)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-7)


def test_weights_are_a_softmax_over_the_chosen_logits_and_carry_their_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    grad = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    ours, theirs = logits.float().requires_grad_(), logits.clone().requires_grad_()
    weights, routing = route(ours, experts_per_token=3)
    everything = torch.softmax(theirs, dim=-1)  # softmax over all, pick, renormalise
    picked = everything.gather(1, everything.topk(3).indices)
    expected = picked / picked.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-7)
    weights.backward(grad.float())
    expected.backward(grad)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)
    idle = torch.ones(9, 6, dtype=torch.bool).scatter(1, routing.indices, False)
    assert (ours.grad[idle] == 0).all() and (ours.grad[~idle] != 0).all()


def test_ties_go_to_the_lower_expert():
    _, routing = route(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0] * 5]), experts_per_token=2)
    assert routing.indices.tolist() == [[1, 2], [0, 1]]


def test_choosing_alone_gives_the_experts_of_route_without_a_gradient():
    logits = torch.tensor([[1.0, 2.0, 2.0, 3.0, 0.0], [0.0] * 5], requires_grad=True)
    indices = choose_experts(logits, experts_per_token=3)
    assert indices.tolist() == [[3, 1, 2], [0, 1, 2]] and not indices.requires_grad


def test_rows_are_sorted_by_expert_with_tokens_in_order():
    routing = make_routing(torch.tensor([[2, 0], [0, 3], [2, 3]]), num_experts=5)
    # expert 0: tokens 0, 1; expert 2: tokens 0, 2; expert 3: tokens 1, 2; experts 1 and 4 have none
    assert routing.offsets == [0, 2, 2, 4, 6, 6]
    assert (routing.order // 2).tolist() == [0, 1, 0, 2, 1, 2]
    assert routing.inverse.tolist() == [[2, 0], [1, 4], [3, 5]]
    assert copy_rows(torch.tensor([[10.0], [11.0], [12.0]]), routing).flatten().tolist() == [10, 11, 10, 12, 11, 12]


def test_combine_sums_each_token_by_its_own_weights():
    routing = make_routing(torch.tensor([[2, 0], [0, 3]]), num_experts=4)
    y = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])  # rows: expert 0 of tokens 0, 1; expert 2; expert 3
    weights = torch.tensor([[0.5, 0.25], [0.125, 2.0]])
    assert combine_reference(y, weights, routing, None).flatten().tolist() == [0.5 * 100 + 0.25 * 1, 0.125 * 10 + 2 * 1000]


@pytest.mark.parametrize("num_tokens, num_experts, experts_per_token", [(1, 4, 2), (37, 8, 4), (5, 3, 3), (6, 4, 1)])
def test_gradients_of_dispatch_and_combine_equal_those_of_one_hot_products(num_tokens, num_experts, experts_per_token):
    generator = torch.Generator().manual_seed(0)
    width = 5
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    x = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    scale = torch.randn(num_experts, width, generator=generator, dtype=torch.float64)  # expert e computes x * scale_e
    grad = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    weights, routing = route(logits, experts_per_token=experts_per_token)

    ours_x, ours_w = x.float().requires_grad_(), weights.clone().requires_grad_()
    owner = torch.repeat_interleave(torch.arange(num_experts), torch.tensor(routing.offsets).diff())
    y = combine_reference(copy_rows(ours_x, routing) * scale.float()[owner], ours_w, routing, None)
    y.backward(grad.float())

    their_x, their_w = x.clone().requires_grad_(), weights.double().requires_grad_()
    expected = torch.einsum("ta,taw,tw->tw", their_w, scale[routing.indices], their_x)
    expected.backward(grad)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours_x.grad.double(), their_x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours_w.grad.double(), their_w.grad, rtol=1e-5, atol=1e-6)


def test_bf16_rows_are_summed_in_fp32():
    routing = make_routing(torch.tensor([[0, 1, 2]]), num_experts=3)
    y = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert combine_reference(y, torch.ones(1, 3), routing, None).item() == 258.0  # 256 + 1 = 256 in bf16
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    copy_rows(x, routing).backward(y)
    assert x.grad.item() == 258.0


def test_strided_inputs():
    generator = torch.Generator().manual_seed(0)
    weights, routing = route(torch.randn(8, 12, generator=generator).T[:, ::2], experts_per_token=2)
    x = torch.randn(5, 12, generator=generator).T
    rows = copy_rows(x, routing)
    assert torch.equal(rows, copy_rows(x.contiguous(), routing))
    padded = torch.cat((rows, rows), dim=1)[:, :5]
    assert torch.equal(combine_reference(padded, weights, routing, None),
                       combine_reference(rows, weights.contiguous(), routing, None))
