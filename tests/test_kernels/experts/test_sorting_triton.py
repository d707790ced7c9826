"""The routing kernels: in the interpreter against goldens, hand-made cases and float64, ahead of time for every GPU, and on a
GPU."""

import itertools

import pytest
import torch
from aot import ALL_ARCHITECTURES, ARCHITECTURES, check_fits, compile_for, half, stream
from paths import FIXTURES
from safetensors.torch import load_file

import kernels.experts.sorting
from kernels.device import family_of
from kernels.experts.few_sorting import _route_few_kernel, can_route_few, few_blocks, route_few
from kernels.experts.sorting import (
    _count_kernel,
    _route_blocks,
    _route_grad_kernel,
    choose_experts,
    make_routing,
    route,
    route_backward,
    route_kernel,
    sort_kernel,
)
from kernels.experts.transport import _sum_rows_kernel, sum_rows
from kernels.router import (
    _router_grad_kernel,
    router_backward,
    router_blocks,
    router_grad_blocks,
    router_logits,
    router_logits_kernel,
)

GOLDEN = load_file(FIXTURES / "kernels.safetensors")


def normal(*shape, seed=0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def choices(num_tokens, per_token, num_experts, device="cpu", skew=0.0) -> torch.Tensor:
    """Distinct experts for each token; with skew the low ones are chosen more often."""
    scores = normal(num_tokens, num_experts) - skew * torch.arange(num_experts)
    return scores.topk(per_token, dim=-1).indices.to(device)


def assert_sorted(routing, indices, num_experts):
    """Everything about the order, from Python's own stable sort."""
    per_token, flat = indices.shape[1], indices.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda pair: flat[pair])
    assert routing.order.tolist() == order
    assert routing.tokens.tolist() == [pair // per_token for pair in order]
    assert [order[row] for row in routing.inverse.flatten().tolist()] == list(range(len(flat)))
    assert routing.offsets == [sum(expert < bound for expert in flat) for bound in range(num_experts + 1)]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ("top2of8", "top4of8_starved", "one_token"))
def test_logits_choices_and_weights_match_the_golden_ones(case, poisoned):
    data = {
        name: GOLDEN[f"moe.{case}.{name}"]
        for name in ("x", "router_w", "router_b", "router_logits", "topk_idx", "topk_weight")
    }
    logits = router_logits(data["x"].float(), data["router_w"].float(), data["router_b"].float())
    torch.testing.assert_close(logits, data["router_logits"], rtol=1e-5, atol=1e-5)
    weights, routing = route(logits, experts_per_token=data["topk_idx"].shape[1])
    assert torch.equal(routing.indices, data["topk_idx"].long())
    torch.testing.assert_close(weights, data["topk_weight"], rtol=2e-5, atol=1e-6)
    assert torch.equal(choose_experts(logits, experts_per_token=data["topk_idx"].shape[1]), data["topk_idx"].long())


@pytest.mark.interpreter
@pytest.mark.parametrize("num_tokens, num_experts, width", [(1, 1, 1), (17, 5, 63), (33, 40, 96)])
def test_router_logits_and_their_gradient_equal_float64(num_tokens, num_experts, width, poisoned):
    x, weight, bias = normal(num_tokens, width), normal(num_experts, width, seed=1), normal(num_experts, seed=2)
    grad, others = normal(num_tokens, num_experts, seed=3), normal(num_tokens, width, seed=4)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(router_logits(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
    grad_x = others.clone()  # that of the experts, to which the router's is added
    router_backward(grad, weight, grad_x)
    torch.testing.assert_close(grad_x.double(), others.double() + grad.double() @ weight.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "num_tokens, num_experts, per_token", [(1, 1, 1), (5, 3, 3), (9, 32, 4), (2, 127, 8), (3, 1024, 4), (70, 33, 2)]
)
def test_weights_and_gradient_equal_a_renormalised_softmax(num_tokens, num_experts, per_token, poisoned):
    logits, grad = 3 * normal(num_tokens, num_experts), normal(num_tokens, per_token, seed=1)
    theirs = logits.double().requires_grad_()
    weights, routing = route(logits, experts_per_token=per_token)
    everything = torch.softmax(theirs, dim=-1)
    picked, indices = everything.topk(per_token)
    expected = picked / picked.sum(-1, keepdim=True)
    expected.backward(grad.double())
    assert torch.equal(routing.indices, indices)
    torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=1e-7)
    ours = route_backward(grad, weights, routing.indices, num_experts)
    torch.testing.assert_close(ours.double(), theirs.grad, rtol=1e-5, atol=1e-6)
    assert_sorted(routing, indices, num_experts)


@pytest.mark.interpreter
def test_ties_go_to_the_lower_expert_and_zeros_of_both_signs_tie(poisoned):
    logits = torch.tensor(
        [[1.0, 2.0, 2.0, 2.0, 0.0], [0.0] * 5, [-0.0, 0.0, -1.0, -0.0, 0.0], [-3.0, -2.0, -2.5, -2.0, -4.0]]
    )
    weights, routing = route(logits, experts_per_token=3)
    assert routing.indices.tolist() == [[1, 2, 3], [0, 1, 2], [0, 1, 3], [1, 3, 2]]
    torch.testing.assert_close(weights[:3], torch.full((3, 3), 1 / 3))


@pytest.mark.interpreter
def test_extreme_logits_are_ordered_and_nan_reaches_the_weights(poisoned):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[-inf, 3e38, -3e38, 1e-45], [-inf, -inf, 5.0, -inf], [0.0, nan, 1.0, 2.0]])
    weights, routing = route(logits, experts_per_token=2)
    assert routing.indices.tolist() == [[1, 3], [2, 0], [1, 3]]
    assert weights[:2].tolist() == [[1.0, 0.0], [1.0, 0.0]] and torch.isnan(weights[2]).all()


@pytest.mark.interpreter
def test_a_replayed_choice_keeps_its_order_and_takes_weights_from_the_new_logits(poisoned):
    logits, indices = normal(7, 6), choices(7, 3, 6).flip(1).contiguous()
    weights, routing = route(logits, experts_per_token=3, indices=indices)
    plain = logits.double().requires_grad_()
    expected = torch.softmax(plain.gather(1, indices), dim=-1)
    grad = normal(7, 3, seed=1)
    expected.backward(grad.double())
    assert torch.equal(routing.indices, indices)
    torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(route_backward(grad, weights, indices, 6).double(), plain.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "num_tokens, per_token, num_experts, skew",
    [(1, 1, 3, 0), (63, 2, 8, 0), (127, 4, 32, 3), (129, 4, 32, 0.2), (20, 8, 300, 0)],
)
@pytest.mark.parametrize("small", [0, 10**9])
def test_the_sort_is_stable_whether_one_program_or_many_do_it(
    num_tokens, per_token, num_experts, skew, small, poisoned, monkeypatch
):
    monkeypatch.setattr(kernels.experts.sorting, "SMALL_SORT", small)
    monkeypatch.setattr(kernels.experts.sorting, "MAX_CHUNKS", 3)
    indices = choices(num_tokens, per_token, num_experts, skew=skew)
    assert_sorted(make_routing(indices, num_experts=num_experts), indices, num_experts)


@pytest.mark.interpreter
@pytest.mark.parametrize("num_tokens, per_token, num_experts, width",
                         [(1, 4, 32, 60), (16, 2, 5, 33), (17, 1, 3, 96), (64, 4, 32, 40), (100, 4, 32, 40)])
def test_one_launch_routes_few_tokens_as_three_do(num_tokens, per_token, num_experts, width, poisoned):
    x, weight, bias = normal(num_tokens, width), normal(num_experts, width, seed=1), normal(num_experts, seed=2)
    logits = check_route_few(x, weight, bias, per_token)
    # last bits of the interpreter's products depend on the tile and on the processor
    torch.testing.assert_close(logits, router_logits(x, weight, bias), rtol=1e-5, atol=1e-5)


def check_route_few(x, weight, bias, per_token) -> torch.Tensor:
    """Asserts that one launch does with its logits what two others do. Returns them."""
    logits, weights, routing = route_few(x, weight, bias, experts_per_token=per_token)
    expected_weights, expected = route(logits, experts_per_token=per_token)
    assert torch.equal(weights, expected_weights)
    for name in ("indices", "order", "tokens", "inverse", "offsets_device"):
        assert torch.equal(getattr(routing, name), getattr(expected, name)), name
    return logits


@pytest.mark.interpreter
@pytest.mark.parametrize("num_tokens, per_token, width", [(1, 1, 1), (5, 3, 63), (3, 4, 1100), (4, 8, 130)])
@pytest.mark.parametrize("has_weights, has_residual", [(True, True), (True, False), (False, False)])
def test_a_tokens_rows_are_summed_by_their_weights(num_tokens, per_token, width, has_weights, has_residual, poisoned):
    routing = make_routing(choices(num_tokens, per_token, 9), num_experts=9)
    rows, residual = normal(num_tokens * per_token, width), normal(num_tokens, width, seed=1)
    weights = normal(num_tokens, per_token, seed=2) if has_weights else None
    y = sum_rows(rows, weights, routing.inverse, residual if has_residual else None)
    factors = weights.double() if has_weights else torch.ones(num_tokens, per_token, dtype=torch.float64)
    expected = residual.double() * has_residual
    expected.index_add_(0, routing.tokens, rows.double() * factors.flatten()[routing.order.long()][:, None])
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.interpreter
def test_strided_inputs_and_no_tokens(poisoned):
    weights, routing = route(normal(8, 12).T[:, ::2], experts_per_token=2)
    rows, residual = normal(24, 5), normal(12, 5, seed=1)
    padded = torch.cat((rows, rows), dim=1)[:, :5]
    assert torch.equal(sum_rows(padded, weights, routing.inverse, residual.T.contiguous().T),
                       sum_rows(rows, weights, routing.inverse, residual))
    weights, routing = route(torch.empty(0, 4), experts_per_token=2)
    assert routing.offsets == [0] * 5
    assert sum_rows(torch.empty(0, 3), weights, routing.inverse, None).shape == (0, 3)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_either_dtype_are_summed_into_a_float32_stream(dtype, poisoned):
    weights, routing = route(normal(7, 5), experts_per_token=3)
    rows, residual = normal(21, 40, seed=1).to(dtype), normal(7, 40, seed=2) * 1e5
    y = sum_rows(rows, weights, routing.inverse, residual)
    expected = residual.double() + (rows.double()[routing.inverse.long()] * weights.double().unsqueeze(-1)).sum(1)
    assert y.dtype == torch.float32
    assert (y.double() - expected).abs().max() <= 1e-7 * expected.abs().max()


@pytest.mark.interpreter
def test_more_experts_than_the_kernel_takes_are_refused():
    with pytest.raises(ValueError, match="1025"):
        route(torch.zeros(1, 1025), experts_per_token=2)


def pointers(kind, *names):
    return {f"{name}_ptr": kind for name in names}


def elementwise_cases(num_experts, per_token, arch):
    """kernel, signature, constexprs at gpt-oss shapes."""
    integer = {"num_tokens": "i32"}
    experts = {"NUM_EXPERTS": num_experts, "PER_TOKEN": per_token}
    yield (
        route_kernel,
        pointers("*fp32", "logits", "weights") | pointers("*i64", "indices") | integer | {"stride_logits": "i32"},
        experts | _route_blocks(num_experts) | {"BLOCK_A": per_token, "REPLAY": False},
    )
    yield (
        _route_grad_kernel,
        pointers("*fp32", "grad", "weights", "grad_logits") | pointers("*i64", "indices") | integer,
        experts | _route_blocks(num_experts),
    )
    sizes = {"num_rows": "i32", "chunk_size": "i32"}
    tile = 4096 // num_experts
    blocks = {"NUM_EXPERTS": num_experts, "BLOCK_R": tile, "BLOCK_E": num_experts}
    yield _count_kernel, pointers("*i64", "experts") | pointers("*i32", "counts") | sizes, blocks
    outputs = pointers("*i64", "experts") | pointers("*i32", "counts", "order", "tokens", "inverse", "offsets")
    yield (
        sort_kernel,
        outputs | sizes | {"num_chunks": "i32"},
        blocks | {"PER_TOKEN": per_token, "BLOCK_C": tile, "IS_SINGLE": False},
    )
    row = {"WIDTH": 2880, "PER_TOKEN": per_token, "BLOCK": 1024}
    inverse = pointers("*i32", "inverse")
    yield (
        _sum_rows_kernel,
        pointers(stream(arch), "rows", "residual", "y")
        | pointers("*fp32", "weights")
        | inverse
        | {"stride_rows": "i32", "stride_residual": "i32"},
        row | {"HAS_WEIGHTS": True, "HAS_RESIDUAL": True},
    )
    yield (
        _sum_rows_kernel,
        pointers(half(arch), "rows", "y") | inverse | {"stride_rows": "i32"},
        row | {"weights_ptr": None, "residual_ptr": None, "stride_residual": 0, "HAS_WEIGHTS": False, "HAS_RESIDUAL": False},
    )


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_kernels_fit_every_gpu(arch):
    for kernel, signature, constexprs in elementwise_cases(32, 4, arch):
        check_fits(compile_for(kernel, signature, constexprs, arch, num_warps=4, num_stages=3), arch)


def test_kernels_fit_at_128_experts_and_8_per_token():
    for kernel, signature, constexprs in elementwise_cases(128, 8, 90):
        check_fits(compile_for(kernel, signature, constexprs, 90, num_warps=4, num_stages=3), 90)


@pytest.mark.parametrize("num_experts", [32, 128])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_router_products_fit_every_gpu_and_use_its_tensor_cores(arch, num_experts):
    sizes = {"NUM_EXPERTS": num_experts, "WIDTH": 2880}
    strides = {"num_tokens": "i32", "stride_weight": "i32"}
    forward = pointers("*bf16", "x", "weight", "bias") | pointers("*fp32", "logits") | strides | {"stride_x": "i32"}
    backward = pointers("*bf16", "weight", "grad_x") | pointers("*fp32", "grad") | strides
    cases = (
        *((router_logits_kernel, forward, router_blocks(family_of(arch), num_experts, 2, num_tokens),
           {"PRECISION": "ieee", "LINES": 64, "OVERLAPS": arch == 90 and num_tokens == 1})
          for num_tokens in (1, 8192)),
        (_router_grad_kernel, backward, router_grad_blocks(family_of(arch), num_experts), {"PRECISION": "tf32x3"}),
    )
    for kernel, signature, blocks, flags in cases:
        options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
        resources = compile_for(kernel, signature, sizes | blocks | flags, arch, **options)
        check_fits(resources, arch)
        assert resources.has_mma


# the largest for each GPU, the others for those with the least memory of their kind of products
@pytest.mark.parametrize("arch, num_tokens, num_experts", [
    *((arch, 32, 128) for arch in ARCHITECTURES), *itertools.product((86, 90, 100), (1, 64, 128), (32,))])
def test_the_routing_of_few_tokens_fits_every_gpu(arch, num_tokens, num_experts):
    assert can_route_few(num_tokens, num_experts, 4)
    blocks = few_blocks(family_of(arch), num_tokens, num_experts, 4, 2)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    signature = dict.fromkeys(("x", "weight", "bias"), "*bf16") | dict.fromkeys(("logits", "gate_weights"), "*fp32")
    signature |= dict.fromkeys(("order", "tokens", "inverse", "offsets"), "*i32") | {"indices": "*i64"}
    signature |= dict.fromkeys(("num_tokens", "num_rows", "chunk_size", "stride_x", "stride_weight"), "i32")
    sizes = {"NUM_EXPERTS": num_experts, "WIDTH": 2880, "PER_TOKEN": 4, "LINES": 64, "BLOCK_A": 4, "PRECISION": "ieee",
             "HAS_LOGITS": num_tokens > 64, "OVERLAPS": arch == 90}
    resources = compile_for(_route_few_kernel, signature, sizes | blocks, arch, **options)
    check_fits(resources, arch)
    assert resources.has_mma == (num_tokens <= 64)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens, num_experts", [(1, 32), (7, 32), (16, 32), (17, 32), (64, 32), (65, 32), (128, 32),
                                                     (16, 128), (32, 128), (5, 4), (64, 8)])
def test_one_launch_routes_few_tokens_as_three_do_on_the_gpu(num_tokens, num_experts):
    given = normal(num_tokens, 2880), normal(num_experts, 2880, seed=1) / 2880**0.5, normal(num_experts, seed=2)
    given = [tensor.to("cuda", torch.bfloat16) for tensor in given]
    assert torch.equal(check_route_few(*given, min(4, num_experts)), router_logits(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens, num_experts", [(1, 32), (8191, 32), (2048, 128)])
def test_router_logits_are_as_good_as_fp32_and_the_same_in_any_batch(num_tokens, num_experts, poisoned):
    given = [normal(num_tokens, 2880), normal(num_experts, 2880, seed=1) / 2880**0.5, normal(num_experts, seed=2)]
    x, weight, bias = (tensor.to("cuda", torch.bfloat16) for tensor in given)
    grad = normal(num_tokens, num_experts, seed=3, device="cuda")
    logits, grad_x = router_logits(x, weight, bias), torch.zeros_like(x)
    router_backward(grad, weight, grad_x)
    exact, eager = ([x.to(dtype) @ weight.to(dtype).T + bias.to(dtype), grad.to(dtype) @ weight.to(dtype)]
                    for dtype in (torch.float64, torch.bfloat16))
    assert (logits.double() - exact[0]).abs().max() <= 2e-5 * exact[0].abs().max()
    for ours, rough, right in zip((logits, grad_x), eager, exact):
        assert (ours.double() - right).norm() <= 2 * (rough.double() - right).norm() + 1e-9 * right.norm()
    for rows in (1, 17, 64, 512, 513, 1500):  # up to 512 take tiles of their own
        assert torch.equal(router_logits(x[:rows], weight, bias), logits[:rows])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "num_tokens, num_experts, per_token",
    [(1, 32, 4), (128, 32, 4), (129, 128, 4), (8191, 32, 4), (32768, 128, 4), (50, 1024, 8), (7, 5, 3)],
)
def test_choices_and_order_equal_the_reference_on_a_gpu(num_tokens, num_experts, per_token, poisoned):
    logits = normal(num_tokens, num_experts, device="cuda").bfloat16().float()  # many ties
    weights, routing = route(logits, experts_per_token=per_token)
    values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    assert torch.equal(routing.indices, indices[:, :per_token])
    torch.testing.assert_close(weights, torch.softmax(values[:, :per_token].double(), -1).float(), rtol=2e-6, atol=1e-7)
    order = torch.argsort(routing.indices.flatten(), stable=True)
    assert torch.equal(routing.order.long(), order) and torch.equal(routing.tokens.long(), order // per_token)
    assert torch.equal(routing.inverse.flatten()[order].long(), torch.arange(num_tokens * per_token, device="cuda"))
    counts = torch.bincount(routing.indices.flatten().cpu(), minlength=num_experts)
    assert routing.offsets == [0, *counts.cumsum(0).tolist()]
    _, again = route(logits, experts_per_token=per_token)
    assert torch.equal(again.order, routing.order)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens, width", [(1, 2880), (4096, 2880), (63, 127)])
def test_sums_of_rows_stay_within_twice_the_errors_of_eager_bf16(num_tokens, width, poisoned):
    weights, routing = route(normal(num_tokens, 32, device="cuda"), experts_per_token=4)
    rows, residual = (normal(size * num_tokens, width, seed=size, dtype=torch.bfloat16, device="cuda") for size in (4, 1))

    def plain(dtype, has_weights):
        of_tokens = rows.to(dtype)[routing.inverse.long()]
        return (of_tokens * weights.to(dtype)[..., None]).sum(1) + residual.to(dtype) if has_weights else of_tokens.sum(1)

    for has_weights in (True, False):
        arguments = (rows, weights, routing.inverse, residual) if has_weights else (rows, None, routing.inverse, None)
        ours, exact, eager = sum_rows(*arguments), plain(torch.float64, has_weights), plain(torch.bfloat16, has_weights)
        assert (ours.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + 1e-9 * exact.norm()
        assert torch.equal(sum_rows(*arguments), ours)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [32, 96, 130, 2880])
def test_router_logits_have_the_same_bits_among_few_and_many_tokens(width):
    x, weight, bias = normal(3000, width), normal(4, width, seed=1) / width**0.5, normal(4, seed=2)
    x, weight, bias = (tensor.to("cuda", torch.bfloat16) for tensor in (x, weight, bias))
    many = router_logits(x, weight, bias)
    for count in (1, 16, 64, 512):
        assert torch.equal(router_logits(x[:count], weight, bias), many[:count]), count
