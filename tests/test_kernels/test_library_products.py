"""The path for GPUs whose tensor cores Triton does not drive: forced on the CPU in float32 and float16, and on another GPU in
float16, against float64."""

import pytest
import torch
from grouped_products import outcome

import kernels.device
from kernels.device import check_served, product_path
from kernels.experts.gemm import grouped_gemm
from kernels.experts.outer import grouped_outer, grouped_row_sum
from kernels.experts.sorting import make_routing
from kernels.experts.transport import combine_reference
from kernels.norm import add_rms_norm, rms_norm
from kernels.router import router_backward, router_logits
from kernels.swiglu import swiglu

OFFSETS = ([0, 5, 5, 70, 71], [0, 0, 0, 0, 63], [0, 32, 64, 96, 127], [0, 1, 1, 1, 1])


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.setenv("GRPO_PRODUCTS", "library")


def normal(*shape, seed=0, dtype=torch.float32, device="cpu", std=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).to(device, dtype)


def int32(offsets, device="cpu"):
    return torch.tensor(offsets, dtype=torch.int32, device=device)


def owners(offsets):
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), torch.tensor(offsets).diff())


def product(x, weight, offsets):
    """x_r W_e in float64, from a batched product over rows."""
    return torch.einsum("rk,rkn->rn", x.double(), weight.double()[owners(offsets).to(x.device)])


def assert_near(actual, expected, tolerance):
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), error


TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3}


def test_the_library_is_chosen_where_triton_has_no_tensor_cores_or_by_name(monkeypatch):
    x = torch.ones(1)
    assert product_path(x) == "library"
    monkeypatch.delenv("GRPO_PRODUCTS")
    assert product_path(x) == "reference"
    monkeypatch.setattr(kernels.device, "is_triton", lambda x: True)
    assert product_path(x) == "triton"
    monkeypatch.setattr(kernels.device, "gpu_family", lambda x: "turing")
    assert product_path(x) == "library"
    monkeypatch.setenv("GRPO_PRODUCTS", "cublas")
    with pytest.raises(ValueError, match="GRPO_PRODUCTS='cublas'; set it to library"):
        product_path(x)


def test_a_gpu_without_bf16_refuses_it_and_names_float16(monkeypatch):
    monkeypatch.setattr(kernels.device, "gpu_family", lambda x: "turing")
    x, weight = normal(3, 8, dtype=torch.bfloat16), normal(2, 8, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="x is bfloat16.*dtype=float16"):
        grouped_gemm(x, weight, int32([0, 1, 3]))
    with pytest.raises(ValueError, match="tensor-core path"):
        check_served("fused", {"x": x.half()}, dtypes=(torch.float16,), tensor_cores=True)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("offsets", OFFSETS)
def test_gather_bias_low_rank_and_scale_join_one_product(offsets, dtype, poisoned):
    num_rows = offsets[-1]
    tokens, weight, bias = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(((20, 40), (4, 40, 48), (4, 48))))
    low_rank, up = normal(num_rows, 3, seed=4, dtype=dtype), normal(4, 48, 3, seed=5)  # fp32 masters
    gather = torch.randint(0, 20, (num_rows,), generator=torch.Generator().manual_seed(3))
    out = torch.full((num_rows, 48), torch.nan, dtype=dtype)
    grouped_gemm(tokens, weight, int32(offsets), gather=gather.int(), bias=bias, low_rank=low_rank, lora_up=up.transpose(1, 2),
                 scale=0.5, out=out)
    expected = product(tokens[gather], weight, offsets) + product(low_rank, up.to(dtype).transpose(1, 2), offsets)
    assert_near(out, 0.5 * expected + bias.double()[owners(offsets)], TOLERANCES[dtype])


def test_a_range_of_experts_writes_its_own_rows_only():
    x, weight = normal(9, 8), normal(3, 8, 6, seed=1)
    out = torch.full((9, 6), torch.nan)
    grouped_gemm(x, weight[1:], int32([0, 2, 4, 9])[1:], out=out)
    assert out[:2].isnan().all()
    assert_near(out[2:], product(x, weight, [0, 2, 4, 9])[2:], 2e-6)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_columns_side_by_side_take_their_own_slice_of_the_low_rank_row(dtype, poisoned):
    """Three projections, the middle one without an adapter: its rows of B are not read. x is a slice of a wider buffer."""
    x = normal(9, 60, dtype=dtype)[:, 12:52]
    weight, bias = normal(1, 40, 48, seed=1, dtype=dtype), normal(1, 48, seed=2, dtype=dtype)
    low_rank, up = normal(9, 6, seed=3, dtype=dtype), normal(48, 3, seed=4)
    up[20:30] = torch.nan
    groups = torch.tensor([0] * 20 + [-1] * 10 + [1] * 18, dtype=torch.int32)
    y = grouped_gemm(x, weight, None, bias=bias, low_rank=low_rank, lora_up=up.T[None], lora_groups=groups)
    expected = x.double() @ weight[0].double() + bias[0].double()
    for columns, part in ((slice(0, 20), slice(0, 3)), (slice(30, 48), slice(3, 6))):
        expected[:, columns] += low_rank.double()[:, part] @ up[columns].to(dtype).double().T
    assert_near(y, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_routers_gradient_is_added_to_that_of_the_experts(dtype):
    grad, weight, others = normal(7, 5), normal(5, 40, seed=1, dtype=dtype), normal(7, 40, seed=2, dtype=dtype)
    grad_x = others.clone()
    router_backward(grad, weight, grad_x)
    assert_near(grad_x, others.double() + grad.double() @ weight.double(), TOLERANCES[dtype])


def test_the_fused_activation_keeps_the_row_before_it():
    offsets = OFFSETS[0]
    x, weight, bias = normal(71, 40), normal(4, 40, 72, seed=1), normal(4, 72, seed=2)
    before = torch.full((71, 72), torch.nan)
    out = grouped_gemm(x, weight, int32(offsets), bias=bias, swiglu=(1.702, 7.0), pre_activation=before)
    h = product(x, weight, offsets) + bias.double()[owners(offsets)]
    assert_near(before, h, 2e-6)
    gate, up = h[:, 0::2].clamp(max=7), h[:, 1::2].clamp(-7, 7)
    assert (h.abs() > 7).any()
    assert_near(out, gate * torch.sigmoid(1.702 * gate) * (up + 1), 2e-6)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("offsets", [*OFFSETS, None])
@pytest.mark.parametrize("transposed", [False, True])
def test_outer_products_and_sums_of_each_experts_rows(offsets, transposed, dtype):
    bounds = offsets or [0, 65]
    num_experts, num_rows = len(bounds) - 1, bounds[-1]
    a, b = normal(90, 40, dtype=dtype), normal(num_rows, 35, seed=1, dtype=dtype)
    gates, gather = normal(num_rows, seed=2), torch.randint(0, 90, (num_rows,), generator=torch.Generator().manual_seed(3))
    out = torch.full((num_experts, 35, 40) if transposed else (num_experts, 40, 35), torch.nan)
    out = out.transpose(1, 2) if transposed else out
    grouped_outer(a, b, None if offsets is None else int32(offsets), out, gather=gather, row_scale=gates)
    sums = torch.full((num_experts, 35), torch.nan)
    grouped_row_sum(b, int32(bounds), sums)
    for expert, (start, end) in enumerate(zip(bounds, bounds[1:])):
        rows, scaled = a[gather].double()[start:end], gates.double()[start:end, None]
        assert_near(out[expert], rows.T @ (b.double()[start:end] * scaled), TOLERANCES[dtype])
        assert_near(sums[expert], b.double()[start:end].sum(0), 2e-6)


def merged(given, offsets, lora_scale):
    """x (W + s A^T B^T) + b in float64, and the leaves its gradient goes to."""
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    weight = leaves["weight"] + lora_scale * torch.einsum("erk,enr->ekn", leaves["lora_A"], leaves["lora_B"])
    owner = owners(offsets).to(weight.device)
    return torch.einsum("rk,rkn->rn", leaves["x"], weight[owner]) + leaves["bias"][owner], leaves


def lora_leaves(offsets, *, size_in, size_out, rank, dtype=torch.float32, device="cpu"):
    std = size_in**-0.5
    given = {"x": normal(offsets[-1], size_in, dtype=dtype), "weight": normal(4, size_in, size_out, seed=1, dtype=dtype, std=std),
             "bias": normal(4, size_out, seed=2, dtype=dtype), "lora_A": normal(4, rank, size_in, seed=3, std=std),
             "lora_B": normal(4, size_out, rank, seed=4)}
    return {name: tensor.to(device).requires_grad_() for name, tensor in given.items()}


@pytest.mark.parametrize("offsets", OFFSETS)
def test_experts_with_lora_and_every_gradient_equal_the_merged_weight(offsets, poisoned):
    given = lora_leaves(offsets, size_in=64, size_out=24, rank=3)
    expected, leaves = merged(given, offsets, 0.5)
    grad = normal(*expected.shape, seed=5)
    expected.backward(grad.double())
    ours = outcome(given, int32(offsets), grad, 0.5)
    assert_near(ours["y"], expected, 2e-6)
    for name, leaf in leaves.items():
        assert_near(ours[name], leaf.grad, 2e-6)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_tokens", [1, 7, 63])
def test_router_logits_are_fp32_from_exact_products(num_tokens, dtype):
    given = [normal(num_tokens, 40, dtype=dtype), normal(5, 40, seed=1, dtype=dtype), normal(5, seed=2, dtype=dtype)]
    ours, exact = [tensor.requires_grad_() for tensor in given], [tensor.detach().double().requires_grad_() for tensor in given]
    logits, expected = router_logits(*ours), exact[0] @ exact[1].T + exact[2]
    grad = normal(num_tokens, 5, seed=3)
    logits.backward(grad)
    expected.backward(grad.double())
    assert logits.dtype == torch.float32
    assert_near(logits, expected, 2e-6)
    for mine, leaf in zip(ours, exact):
        assert mine.grad.dtype == dtype
        assert_near(mine.grad, leaf.grad, TOLERANCES[dtype])


def test_what_float16_cannot_hold_stays_in_float32():
    """The down projection, the weighted sum and the residual stream, each beyond 65504."""
    offsets, std = [0, 3, 8], 200.0
    act, weight = normal(8, 64, dtype=torch.float16, std=std), normal(2, 64, 32, seed=1, dtype=torch.float16, std=std)
    rows = grouped_gemm(act, weight, int32(offsets), out=torch.full((8, 32), torch.nan))
    expected = product(act, weight, offsets)
    assert expected.abs().max() > 1e5
    assert_near(rows, expected, 2e-6)
    routing = make_routing(torch.tensor([[0, 1], [0, 1], [0, 1], [1, 1]]), num_experts=2)
    gates, residual = torch.full((4, 2), 0.5), normal(4, 32, seed=2, std=1e5)
    y = combine_reference(rows, gates, routing, residual)
    assert y.dtype == torch.float32
    assert_near(y, residual.double() + expected[routing.inverse.long()].sum(1) / 2, 2e-6)
    # half rows beside a float32 residual are summed into it without a rounding between
    halves = combine_reference((rows / 1e3).half(), gates, routing, residual)
    assert_near(halves, residual.double() + (rows / 1e3).half().double()[routing.inverse.long()].sum(1) / 2, 2e-7)


@pytest.mark.parametrize("size", [1.0, 1e5])
def test_a_half_delta_joins_a_float32_stream_and_its_norm_is_half(size):
    x, residual = normal(5, 40, dtype=torch.float16), normal(5, 40, seed=1, std=size)
    weight = normal(40, seed=2, dtype=torch.float16)
    grads = normal(5, 40, seed=3, dtype=torch.float16), normal(5, 40, seed=4)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
    outputs = add_rms_norm(*leaves, eps=1e-5)
    assert [tensor.dtype for tensor in outputs] == [torch.float16, torch.float32]
    torch.autograd.backward(outputs, grads)
    exact = [tensor.double().requires_grad_() for tensor in (x, residual, weight)]
    total = exact[0] + exact[1]
    y = total / torch.sqrt(total.square().mean(-1, keepdim=True) + 1e-5) * exact[2]
    torch.autograd.backward([y, total], [grad.double() for grad in grads])
    assert_near(outputs[0], y, 1e-3)
    assert_near(outputs[1], total, 1e-6)
    assert_near(leaves[1].grad, exact[1].grad, 2e-6)
    for mine, leaf in zip(leaves, exact):
        assert mine.grad.dtype == mine.dtype
        assert_near(mine.grad, leaf.grad, 1e-3)
    alone = rms_norm(outputs[1].detach(), weight, eps=1e-5, dtype=torch.float16)
    assert torch.equal(alone, outputs[0])


def eager(x, weight, bias, lora_A, lora_B, offsets):
    """The formula expert by expert, every step in the arguments' dtype."""
    return torch.cat([x[a:b] @ weight[e] + bias[e] + 0.5 * (x[a:b] @ lora_A[e].T @ lora_B[e].T)
                      for e, (a, b) in enumerate(zip(offsets, offsets[1:]))])


def assert_at_most_twice_the_error_of_eager(ours, rough, exact):
    for name, target in exact.items():
        assert ours[name].isfinite().all(), name
        error, allowed = (ours[name].double() - target).norm(), 2 * (rough[name].double() - target).norm()
        assert error <= allowed + 1e-9 * target.norm(), f"{name}: {error} against {allowed}"


@pytest.mark.gpu
@pytest.mark.parametrize("offsets, size_in, size_out, rank", [
    ([0, 300, 300, 1100, 2048], 2880, 5760, 16), ([0, 1, 64, 191, 1024], 5760, 2880, 8), (OFFSETS[0], 40, 24, 3)])
def test_float16_experts_on_a_gpu_stay_within_twice_the_errors_of_eager_float16(offsets, size_in, size_out, rank, poisoned):
    options = dict(size_in=size_in, size_out=size_out, rank=rank, dtype=torch.float16, device="cuda")
    grad = normal(offsets[-1], size_out, seed=7, dtype=torch.float16, device="cuda")
    results = {}
    for name, dtype in (("exact", torch.float64), ("eager", torch.float16)):
        leaves = {key: leaf.detach().to(dtype).requires_grad_() for key, leaf in lora_leaves(offsets, **options).items()}
        y = eager(**leaves, offsets=offsets)
        y.backward(grad.to(dtype))
        results[name] = {"y": y.detach()} | {key: leaf.grad for key, leaf in leaves.items()}
    for name in ("ours", "again"):
        leaves = lora_leaves(offsets, **options)
        results[name] = outcome(leaves, int32(offsets, "cuda"), grad, 0.5)
    assert_at_most_twice_the_error_of_eager(results["ours"], results["eager"], results["exact"])
    assert all(torch.equal(tensor, results["again"][name]) for name, tensor in results["ours"].items())


@pytest.mark.gpu
def test_gathered_rows_fused_activation_and_a_float32_down_projection_on_a_gpu(poisoned):
    offsets, width = [0, 300, 300, 1100, 2048], 2880
    x = normal(1000, width, dtype=torch.float16, device="cuda")
    w1, w2 = (normal(4, width, size, seed=size, dtype=torch.float16, device="cuda", std=0.05) for size in (2 * width, width))
    gather = torch.randint(0, 1000, (2048,), generator=torch.Generator().manual_seed(4), dtype=torch.int32).cuda()
    results = {}
    for name, dtype in (("exact", torch.float64), ("eager", torch.float16)):
        parts = [slice(*pair) for pair in zip(offsets, offsets[1:])]
        rows = x[gather.long()].to(dtype)
        h = torch.cat([rows[part] @ w1[expert].to(dtype) for expert, part in enumerate(parts)])
        gate, up = h[:, 0::2].clamp(max=7), h[:, 1::2].clamp(-7, 7)
        act = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        y = torch.cat([act[part] @ w2[expert].to(dtype) for expert, part in enumerate(parts)])
        results[name] = {"h": h, "act": act, "y": y}
    h = torch.full((2048, 2 * width), torch.nan, dtype=torch.float16, device="cuda")
    act = grouped_gemm(x, w1, int32(offsets, "cuda"), gather=gather, swiglu=(1.702, 7.0), pre_activation=h)
    assert torch.equal(act, swiglu(h, alpha=1.702, limit=7.0))
    y = torch.full((2048, width), torch.nan, device="cuda")
    grouped_gemm(act, w2, int32(offsets, "cuda"), out=y)
    assert_at_most_twice_the_error_of_eager({"h": h, "act": act, "y": y}, results["eager"], results["exact"])
    beyond = grouped_gemm(act * 64, w2 * 64, int32(offsets, "cuda"), out=torch.empty_like(y))
    assert beyond.isfinite().all() and beyond.abs().max() > 65504


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2048])
def test_float16_router_logits_on_a_gpu_are_as_good_as_fp32(num_tokens, poisoned):
    given = [normal(num_tokens, 2880), normal(32, 2880, seed=1, std=2880**-0.5), normal(32, seed=2)]
    given = [tensor.to("cuda", torch.float16) for tensor in given]
    grad = normal(num_tokens, 32, seed=3, device="cuda")
    results = {}
    for name, dtype in (("ours", torch.float16), ("eager", torch.float16), ("exact", torch.float64)):
        leaves = [tensor.clone().to(dtype).requires_grad_() for tensor in given]
        logits = router_logits(*leaves) if name == "ours" else leaves[0] @ leaves[1].T + leaves[2]
        logits.backward(grad.to(logits.dtype))
        results[name] = dict(zip(("logits", "x", "weight", "bias"), (logits.detach(), *(leaf.grad for leaf in leaves))))
    assert_at_most_twice_the_error_of_eager(*(results[name] for name in ("ours", "eager", "exact")))
    assert_near(results["ours"]["logits"], results["exact"]["logits"], 2e-6)
