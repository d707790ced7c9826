"""Triton's grouped products: in the interpreter against float64 and the goldens, compiled for every GPU, and on a GPU in bf16."""

import itertools

import pytest
import torch
from grouped_products import outcome
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.experts.gemm import GemmBlocks, grouped_gemm
from kernels.experts.outer import CHUNK_ROWS, MAX_ROWS_UNSPLIT, grouped_outer, grouped_row_sum
from kernels.swiglu import swiglu

GOLDEN = load_file(FIXTURES / "kernels.safetensors")
OFFSETS = ([0, 5, 5, 70, 71], [0, 0, 0, 0, 63], [0, 32, 64, 96, 127], [0, 1, 1, 1, 1])  # tiles of 32 rows


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def owners(offsets):
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), torch.tensor(offsets).diff())


def product(x, weight, offsets):
    """x_r W_e in float64, from a batched product over rows."""
    owner = owners(offsets).to(x.device)
    return torch.einsum("rk,rkn->rn", x.double(), weight.double()[owner])


def int32(offsets, device="cpu"):
    return torch.tensor(offsets, dtype=torch.int32, device=device)


def assert_near(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * max(1.0, expected.abs().max().item()))


@pytest.mark.interpreter
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("in_contiguous", [False, True])
@pytest.mark.parametrize("size_in, size_out", [(32, 40), (40, 96)])
def test_rows_times_their_experts_weights_in_both_layouts(offsets, in_contiguous, size_in, size_out):
    x, weight = normal(offsets[-1], size_in), normal(4, size_in, size_out, seed=1)
    bias = normal(4, size_out, seed=2)
    given = weight.transpose(1, 2).contiguous().transpose(1, 2) if in_contiguous else weight
    out = torch.full((offsets[-1], size_out), torch.nan)
    grouped_gemm(x, given, int32(offsets), bias=bias, out=out)
    assert_near(out, product(x, weight, offsets) + bias.double()[owners(offsets)])


@pytest.mark.interpreter
@pytest.mark.parametrize("persistent, use_tma", list(itertools.product([False, True], repeat=2)))
def test_every_schedule_and_way_of_loading_gives_the_same_products(persistent, use_tma):
    """Bits are compared on a GPU: the interpreter's products have other last bits for other tiles on some processors."""
    offsets = OFFSETS[0]
    x, weight = normal(offsets[-1], 64), normal(4, 64, 48, seed=1)
    plain = grouped_gemm(x, weight, int32(offsets), blocks=GemmBlocks(16, 16, 32, 1, 4, 2, False, False))
    other = grouped_gemm(x, weight, int32(offsets), blocks=GemmBlocks(32, 16, 32, 2, 4, 2, use_tma, persistent))
    expected = product(x, weight, offsets)
    assert_near(plain, expected)
    assert_near(other, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("rank", [3, 16, 70])
def test_low_rank_steps_gather_and_bias_join_one_product(rank):
    offsets = OFFSETS[0]
    tokens, weight, bias = normal(20, 40), normal(4, 40, 48, seed=1), normal(4, 48, seed=2)
    gather = torch.randint(0, 20, (71,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    low_rank, up = normal(71, rank, seed=4), normal(4, 48, rank, seed=5)
    ours = grouped_gemm(tokens, weight, int32(offsets), gather=gather, bias=bias, low_rank=low_rank,
                        lora_up=up.transpose(1, 2))
    expected = product(tokens[gather.long()], weight, offsets) + product(low_rank, up.transpose(1, 2), offsets)
    assert_near(ours, expected + bias.double()[owners(offsets)])


@pytest.mark.interpreter
def test_the_fused_activation_equals_the_separate_one_and_keeps_its_input():
    offsets = OFFSETS[0]
    x, weight, bias = normal(71, 40), normal(4, 40, 72, seed=1), normal(4, 72, seed=2)
    before, out = torch.full((71, 72), torch.nan), torch.full((71, 36), torch.nan)
    grouped_gemm(x, weight, int32(offsets), bias=bias, swiglu=(1.702, 7.0), pre_activation=before, out=out)
    h = grouped_gemm(x, weight, int32(offsets), bias=bias)
    assert (h.abs() > 7).any() and torch.equal(before, h)
    torch.testing.assert_close(out, swiglu(h, alpha=1.702, limit=7.0), rtol=1e-6, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("transposed", [False, True])
def test_outer_products_of_each_experts_rows(offsets, transposed):
    a, b, gates = normal(90, 40), normal(offsets[-1], 35, seed=1), normal(offsets[-1], seed=2)
    gather = torch.randint(0, 90, (offsets[-1],), generator=torch.Generator().manual_seed(3))
    out = torch.full((4, 35, 40) if transposed else (4, 40, 35), torch.nan)
    out = out.transpose(1, 2) if transposed else out
    sums = torch.full((4, 35), torch.nan)
    grouped_outer(a, b, int32(offsets), out, gather=gather, row_scale=gates)
    grouped_row_sum(b, int32(offsets), sums)
    for expert, (start, end) in enumerate(zip(offsets, offsets[1:])):
        rows, scaled = a[gather].double()[start:end], gates.double()[start:end, None]
        assert_near(out[expert], rows.T @ (b.double()[start:end] * scaled))
        assert_near(sums[expert], b.double()[start:end].sum(0))


@pytest.mark.interpreter
@pytest.mark.parametrize("offsets", [None, [0, 2 * CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 1, MAX_ROWS_UNSPLIT + 40]])
def test_chunks_of_long_experts_add_up(offsets):
    num_rows = MAX_ROWS_UNSPLIT + 40
    a, b = normal(num_rows, 5), normal(num_rows, 2, seed=1)
    bounds = offsets or [0, num_rows]
    out = torch.full((len(bounds) - 1, 5, 2), torch.nan)
    grouped_outer(a, b, None if offsets is None else int32(offsets), out)
    for expert, (start, end) in enumerate(zip(bounds, bounds[1:])):
        assert_near(out[expert], a.double()[start:end].T @ b.double()[start:end])


def leaves_of(offsets, *, size_in, size_out, rank, dtype=torch.float32, device="cpu", scale=1.0):
    given = {
        "x": normal(offsets[-1], size_in, dtype=dtype), "weight": normal(4, size_in, size_out, seed=1, dtype=dtype) * scale,
        "bias": normal(4, size_out, seed=2, dtype=dtype), "lora_A": normal(4, rank, size_in, seed=3) * scale,
        "lora_B": normal(4, size_out, rank, seed=4),
    }  # fmt: skip
    return {name: tensor.to(device).requires_grad_() for name, tensor in given.items()}


def merged(given, offsets, lora_scale):
    """x (W + s A^T B^T) + b in float64, and the leaves its gradient goes to."""
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    weight = leaves["weight"] + lora_scale * torch.einsum("erk,enr->ekn", leaves["lora_A"], leaves["lora_B"])
    owner = owners(offsets).to(weight.device)
    return torch.einsum("rk,rkn->rn", leaves["x"], weight[owner]) + leaves["bias"][owner], leaves


@pytest.mark.interpreter
@pytest.mark.parametrize("offsets", OFFSETS)
def test_output_and_every_gradient_with_lora_equal_those_of_the_merged_weight(offsets):
    given = leaves_of(offsets, size_in=40, size_out=24, rank=3)
    expected, leaves = merged(given, offsets, 0.5)
    grad = normal(*expected.shape, seed=5)
    expected.backward(grad.double())
    ours = outcome(given, int32(offsets), grad, 0.5)
    assert_near(ours["y"], expected)
    for name, leaf in leaves.items():
        assert_near(ours[name], leaf.grad)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", ["top2of8", "top4of8_starved", "one_token"])
def test_grouped_products_reproduce_the_golden_mixtures(case):
    data = {name.removeprefix(f"moe.{case}."): tensor for name, tensor in GOLDEN.items() if name.startswith(f"moe.{case}.")}
    indices, num_experts = data["topk_idx"].long(), data["w1"].shape[0]
    order = indices.flatten().argsort(stable=True)
    offsets = int32([0, *indices.flatten().bincount(minlength=num_experts).cumsum(0).tolist()])
    token = (order // indices.shape[1]).int()
    w1, w2 = (data[name].float().transpose(1, 2) for name in ("w1", "w2"))  # golden: [E, out, in]
    act = grouped_gemm(data["x"].float(), w1, offsets, gather=token, bias=data["b1"].float(), swiglu=(1.702, 7.0))
    y = grouped_gemm(act, w2, offsets, bias=data["b2"].float()) * data["topk_weight"].float().flatten()[order, None]
    combined = torch.zeros(len(indices), y.shape[1]).index_add_(0, token.long(), y)
    assert_near(combined, data["y"].double(), 1e-5)


@pytest.mark.interpreter
def test_strided_rows_and_no_rows():
    offsets = OFFSETS[0]
    x, weight = normal(71, 40), normal(4, 40, 24, seed=1)
    strided = x.T.contiguous().T
    assert torch.equal(grouped_gemm(strided, weight, int32(offsets)), grouped_gemm(x, weight, int32(offsets)))
    assert grouped_gemm(x[:0], weight, int32([0] * 5)).shape == (0, 24)
    out = torch.full((4, 40, 24), torch.nan)
    assert (grouped_outer(x[:0], normal(0, 24), int32([0] * 5), out) == 0).all()


def test_shapes_that_do_not_fit_are_refused_by_name():
    x, weight = normal(7, 6), normal(3, 6, 4)
    with pytest.raises(ValueError, match=r"x \[7, 6\] and weight \[3, 4, 6\]"):
        grouped_gemm(x, weight.transpose(1, 2), int32([0, 1, 2, 7]))
    with pytest.raises(ValueError, match="3 experts without offsets"):
        grouped_gemm(x, weight, None)
    with pytest.raises(ValueError, match=r"bias is \[3, 5\], not \[3, 4\]"):
        grouped_gemm(x, weight, int32([0, 1, 2, 7]), bias=normal(3, 5))


def test_the_cpu_reference_of_the_functional_interface_agrees_with_float64():
    offsets = OFFSETS[0]
    tokens, weight, bias = normal(20, 40), normal(4, 40, 48, seed=1), normal(4, 48, seed=2)
    gather = torch.randint(0, 20, (71,), generator=torch.Generator().manual_seed(3))
    low_rank, up = normal(71, 3, seed=4), normal(4, 3, 48, seed=5)
    ours = grouped_gemm(tokens, weight, int32(offsets), gather=gather, bias=bias, low_rank=low_rank, lora_up=up,
                        scale=0.5)
    expected = 0.5 * (product(tokens[gather], weight, offsets) + product(low_rank, up, offsets))
    assert_near(ours, expected + bias.double()[owners(offsets)])
    out = torch.full((4, 40, 48), torch.nan)
    grouped_outer(tokens, ours, int32(offsets), out, gather=gather)
    assert_near(out[2], tokens[gather[5:70]].double().T @ ours[5:70].double())


def by_expert(function, offsets):
    return torch.cat([function(expert, slice(start, end)) for expert, (start, end) in enumerate(zip(offsets, offsets[1:]))])


def lora_by_expert(leaves, offsets, scale):
    """The formula expert by expert, in the leaves' dtype."""
    x, weight, bias, down, up = (leaves[name] for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    return by_expert(lambda e, rows: x[rows] @ weight[e] + bias[e] + scale * (x[rows] @ down[e].T @ up[e].T), offsets)


def assert_at_most_twice_the_error_of_eager(ours, eager, exact):
    for name, target in exact.items():
        assert ours[name].isfinite().all(), name
        error, allowed = (ours[name].double() - target).norm(), 2 * (eager[name].double() - target).norm()
        assert error <= allowed, f"{name}: {error} against {allowed}"


def poison_gpu_memory():
    """Leaves NaN in the blocks that the next allocations get."""
    del [torch.full((1 << 26,), torch.nan, device="cuda") for _ in range(4)][:]


GPU_SHAPES = [([0, 300, 300, 1100, 2048], 2880, 5760, 16), ([0, 1, 64, 191, 1024], 5760, 2880, 8), (OFFSETS[0], 40, 24, 3),
              (OFFSETS[3], 2880, 64, 64), ([0, 6000, 6000, 6001, 12000], 64, 2880, 16)]


@pytest.mark.gpu
@pytest.mark.parametrize("in_contiguous", [False, True])
@pytest.mark.parametrize("offsets, size_in, size_out, rank", GPU_SHAPES)
def test_bf16_errors_are_at_most_twice_those_of_eager_bf16_and_bits_repeat(offsets, size_in, size_out, rank, in_contiguous):
    options = dict(size_in=size_in, size_out=size_out, rank=rank, dtype=torch.bfloat16, device="cuda", scale=size_in**-0.5)
    grad = normal(offsets[-1], size_out, seed=7, dtype=torch.bfloat16, device="cuda")
    results = {}
    for name, dtype in (("exact", torch.float64), ("eager", torch.bfloat16)):
        leaves = {key: leaf.detach().to(dtype).requires_grad_() for key, leaf in leaves_of(offsets, **options).items()}
        y = lora_by_expert(leaves, offsets, 0.5)
        y.backward(grad.to(dtype))
        results[name] = {"y": y.detach()} | {key: leaf.grad for key, leaf in leaves.items()}
    for name in ("ours", "again"):
        leaves = leaves_of(offsets, **options)
        if in_contiguous:
            leaves["weight"] = leaves["weight"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        poison_gpu_memory()
        results[name] = outcome(leaves, int32(offsets, "cuda"), grad, 0.5)
    assert_at_most_twice_the_error_of_eager(results["ours"], results["eager"], results["exact"])
    for name, tensor in results["ours"].items():
        assert torch.equal(tensor, results["again"][name]), name


@pytest.mark.gpu
def test_gathered_rows_and_fused_activation_in_bf16():
    offsets, width, inner = [0, 300, 300, 1100, 2048], 2880, 2880
    x = normal(1000, width, dtype=torch.bfloat16, device="cuda")
    w1, w2 = (normal(4, 2880, size, seed=size, dtype=torch.bfloat16, device="cuda") * 0.05 for size in (2 * inner, width))
    bias = normal(4, 2 * inner, seed=2, dtype=torch.bfloat16, device="cuda")
    gather = torch.randint(0, 1000, (2048,), generator=torch.Generator().manual_seed(4), dtype=torch.int32).cuda()
    results = {}
    for name, dtype in (("exact", torch.float64), ("eager", torch.bfloat16)):
        rows = x[gather.long()].to(dtype)
        h = by_expert(lambda e, part: rows[part] @ w1[e].to(dtype) + bias[e].to(dtype), offsets)  # noqa: B023
        gate, up = h[:, 0::2].clamp(max=7), h[:, 1::2].clamp(-7, 7)
        act = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        y = by_expert(lambda e, part: act[part] @ w2[e].to(dtype), offsets)  # noqa: B023
        results[name] = {"h": h, "act": act, "y": y}
    poison_gpu_memory()
    h = torch.full((2048, 2 * inner), torch.nan, dtype=torch.bfloat16, device="cuda")
    act = grouped_gemm(x, w1, int32(offsets, "cuda"), gather=gather, bias=bias, swiglu=(1.702, 7.0), pre_activation=h)
    assert torch.equal(act, swiglu(h, alpha=1.702, limit=7.0))
    results["ours"] = {"h": h, "act": act, "y": grouped_gemm(act, w2, int32(offsets, "cuda"))}
    assert_at_most_twice_the_error_of_eager(results["ours"], results["eager"], results["exact"])


@pytest.mark.gpu
def test_a_rows_bits_depend_neither_on_tiles_nor_on_its_neighbours():
    offsets = [0, 300, 300, 1100, 2048]
    x, weight = (normal(*shape, seed=1, dtype=torch.bfloat16, device="cuda") for shape in ((2048, 2880), (4, 2880, 640)))
    y = grouped_gemm(x, weight, int32(offsets, "cuda"))
    alone = grouped_gemm(x[400:401], weight, int32([0, 0, 0, 1, 1], "cuda"))
    assert torch.equal(y[400:401], alone)
    for blocks in (GemmBlocks(64, 64, 64, 1, 4, 3, False, False), GemmBlocks(128, 128, 32, 4, 8, 3, True, True)):
        assert torch.equal(y, grouped_gemm(x, weight, int32(offsets, "cuda"), blocks=blocks)), blocks


@pytest.mark.gpu
def test_fp32_tensors_keep_fp32_accuracy_on_a_gpu():
    offsets = OFFSETS[0]
    given = leaves_of(offsets, size_in=96, size_out=192, rank=4, device="cuda")
    expected, leaves = merged(given, offsets, 0.5)
    grad = normal(*expected.shape, seed=5, device="cuda")
    expected.backward(grad.double())
    ours = outcome(given, int32(offsets, "cuda"), grad, 0.5)
    assert_near(ours["y"], expected)
    for name, leaf in leaves.items():
        assert_near(ours[name], leaf.grad)
