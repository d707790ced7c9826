"""The experts as one operation: in the interpreter and on a GPU against a composition in float64, goldens included."""

import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for, half
from moe_problem import ALPHA, LIMIT, SCALE, composed, moe_backward, moe_forward, normal, problem
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.experts.forward import _activation_grad_kernel, _bias_dots_kernel, _routed_rows_kernel, routed_rows
from kernels.experts.sorting import make_routing
from kernels.packed.fragments import to_fragments_
from kernels.packed.weights import Dense, Mxfp4, Mxfp4Fragments

GOLDEN = load_file(FIXTURES / "kernels.safetensors")


def leaves(tensors, dtype, device, names):
    """Copies in `dtype`; in mixed precision (bfloat16) gate weights and adapters stay fp32."""
    fp32 = ("weights", "A1", "B1", "A2", "B2")
    made = {name: tensor.detach().clone().to(device, torch.float32 if name in fp32 and dtype == torch.bfloat16 else dtype)
            for name, tensor in tensors.items()}
    return {name: tensor.requires_grad_(name in names) for name, tensor in made.items()}


def run(indices, packed, t, grad, *, has_lora, keeps_h, num_experts, num_dequantized=2, order="checkpoint"):
    """Output and gradients by name, with so many experts of the first projection dequantised at a time."""
    if order == "fragments":
        packed = [tuple(tensor.clone() for tensor in pair) for pair in packed]
        for pair in packed:
            to_fragments_(*pair)
    scratch = num_dequantized * t["b1"].shape[1] * t["x"].shape[1] * t["x"].element_size()
    form, settings = (Mxfp4Fragments, (True,)) if order == "fragments" else (Mxfp4, ())
    gate_up, down = (form(*pair, t[bias], *settings) for pair, bias in zip(packed, ("b1", "b2")))
    routing, x, weights = make_routing(indices, num_experts=num_experts), t["x"], t["weights"]
    lora = (t["A1"], t["B1"], t["A2"], t["B2"]) if has_lora else None
    settings = {"lora": lora, "lora_scale": SCALE, "alpha": ALPHA, "limit": LIMIT, "scratch_bytes": scratch}
    y, kept = moe_forward(x, weights, routing, gate_up, down, t["residual"], keeps_h=keeps_h, **settings)
    assert (kept.h is not None) == keeps_h
    grad_x, grad_weights, lora_grads, _ = moe_backward(grad, x, weights, routing, gate_up, down, kept, needs_base=False,
                                                       **settings)
    return {"y": y, "x": grad_x, "weights": grad_weights} | dict(zip(("A1", "B1", "A2", "B2"), lora_grads or ()))


def errors_of(sizes, *, has_lora, keeps_h, dtype, device, num_dequantized=2, order="checkpoint"):
    """Name -> (our error, that of the composition in eager `dtype`), both relative to float64."""
    indices, packed, tensors = problem(*sizes)
    grad = normal(*tensors["x"].shape, seed=12)
    names = ["x", "weights"] + (["A1", "B1", "A2", "B2"] if has_lora else [])
    # inputs as the operation sees them, so that only its own rounding counts
    seen = {name: value.double() for name, value in leaves(tensors, dtype, device, []).items()}
    indices, grad = indices.to(device), grad.to(device, dtype)
    packed = [tuple(tensor.to(device) for tensor in pair) for pair in packed]

    def outcome(t, y):
        y.backward(grad.to(y.dtype))
        return {"y": y.detach(), **{name: t[name].grad for name in names}}

    exact = leaves(seen, torch.float64, device, names)
    eager = {name: value.detach().to(dtype).requires_grad_(name in names) for name, value in seen.items()}
    ours = leaves(seen, dtype, device, [])
    expected = outcome(exact, composed(indices, packed, exact, has_lora=has_lora))
    in_eager = outcome(eager, composed(indices, packed, eager, has_lora=has_lora))
    mine = run(indices, packed, ours, grad, has_lora=has_lora, keeps_h=keeps_h, num_experts=sizes[1],
               num_dequantized=num_dequantized, order=order)
    assert set(mine) == set(expected)
    return {name: tuple(((actual[name].double() - expected[name]).norm() / expected[name].norm()).item()
                        for actual in (mine, in_eager)) for name in expected}


@pytest.mark.interpreter
@pytest.mark.parametrize("has_lora, keeps_h, order", [(True, False, "checkpoint"), (True, True, "fragments"),
                                                      (False, False, "fragments")])
def test_the_composition_and_every_gradient(has_lora, keeps_h, order):
    errors = errors_of((9, 5, 2, 32, 32, 4), has_lora=has_lora, keeps_h=keeps_h, dtype=torch.float32, device="cpu", order=order)
    assert all(ours <= 3e-6 for ours, _ in errors.values()), errors


@pytest.mark.interpreter
def test_weights_dequantised_once_serve_the_activation_and_the_gradient():
    errors = errors_of((9, 5, 2, 32, 64, 4), has_lora=True, keeps_h=False, dtype=torch.float32, device="cpu", num_dequantized=5)
    assert all(ours <= 3e-6 for ours, _ in errors.values()), errors


@pytest.mark.interpreter
def test_dense_experts_agree_with_the_golden():
    case = {name.split(".")[2]: tensor for name, tensor in GOLDEN.items() if name.startswith("moe.top4of8_starved.")}
    x, weights = case["x"].float(), case["topk_weight"].float()
    dense = [case[name].float().transpose(1, 2).contiguous() for name in ("w1", "w2")]
    gate_up, down = (Dense(weight, case[bias].float()) for weight, bias in zip(dense, ("b1", "b2")))
    routing = make_routing(case["topk_idx"].long(), num_experts=len(dense[0]))
    # the golden dx also has the router's part: gradients are compared with float64 and, whole, through the model
    y, _ = moe_forward(x, weights, routing, gate_up, down, torch.zeros_like(x), lora=None, lora_scale=0.0, alpha=ALPHA,
                       limit=LIMIT, scratch_bytes=0, keeps_h=True)
    torch.testing.assert_close(y, case["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
def test_routed_rows_are_the_tokens_in_expert_order_times_their_gate_weights(poisoned):
    x, weights = normal(3, 70, seed=0).float(), normal(3, 2, seed=1).float()
    routing = make_routing(torch.tensor([[4, 1], [1, 0], [4, 2]]), num_experts=5)
    # expert 0: token 1; expert 1: tokens 0 and 1; expert 2: token 2; expert 4: tokens 0 and 2
    tokens, slots = [1, 0, 1, 2, 0, 2], [1, 1, 0, 1, 0, 0]
    assert torch.equal(routed_rows(x, None, routing), x[tokens])
    assert torch.equal(routed_rows(x, weights, routing), x[tokens] * weights[tokens, slots][:, None])


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
@pytest.mark.parametrize("has_weights", [False, True])
def test_the_routed_rows_compile_without_spills(arch, has_weights):
    signature = {"x_ptr": half(arch), "weights_ptr": "*fp32", "inverse_ptr": "*i32", "rows_ptr": half(arch), "stride_x": "i32"}
    check_fits(compile_for(_routed_rows_kernel, signature, {"WIDTH": 2880, "PER_TOKEN": 4, "BLOCK": 1024,
                                                            "HAS_WEIGHTS": has_weights}, arch, num_warps=4, num_stages=3), arch)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_activation_gradient_compiles_without_spills(arch):
    signature = {"grad_ptr": half(arch), "h_ptr": half(arch), "weights_ptr": "*fp32", "slots_ptr": "*i32", "dots_ptr": "*fp32",
                 "offsets_ptr": "*i32", "num_experts": "i32", "alpha": "fp32", "limit": "fp32"}
    pointers = tuple(name for name in signature if name.endswith("_ptr"))
    for is_part in (False, True):
        check_fits(compile_for(_activation_grad_kernel, signature, {"WIDTH": 2880, "BLOCK": 1024, "IS_PART": is_part}, arch,
                               num_warps=4, num_stages=3, divisible=pointers), arch)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_products_with_the_bias_compile_without_spills(arch):
    halves = {"grad_ptr": half(arch), "bias_ptr": half(arch)}
    signature = halves | {"indices_ptr": "*i64", "dots_ptr": "*fp32", "stride_grad": "i32", "first_expert": "i32",
                          "num_experts": "i32"}
    check_fits(compile_for(_bias_dots_kernel, signature, {"WIDTH": 2880, "PER_TOKEN": 4, "BLOCK": 4096}, arch, num_warps=8,
                           num_stages=3), arch)


@pytest.mark.gpu
@pytest.mark.parametrize("has_lora, keeps_h", [(True, False), (True, True), (False, False)])
def test_real_widths_in_bf16(has_lora, keeps_h):
    errors = errors_of((333, 8, 4, 2880, 2880, 16), has_lora=has_lora, keeps_h=keeps_h, dtype=torch.bfloat16, device="cuda")
    assert all(ours <= 2 * eager for ours, eager in errors.values()), errors


@pytest.mark.gpu
def test_two_runs_give_the_same_bits_whatever_the_order_of_packed_weights():
    indices, packed, tensors = problem(777, 8, 4, 2880, 2880, 16)
    grad = normal(777, 2880, seed=12)
    packed = [tuple(tensor.cuda() for tensor in pair) for pair in packed]
    results = []
    for order in ("checkpoint", "fragments"):
        t = leaves(tensors, torch.bfloat16, "cuda", [])
        results.append(run(indices.cuda(), packed, t, grad.to("cuda", torch.bfloat16), has_lora=True, keeps_h=False,
                           num_experts=8, order=order))
    assert len(results[0]) == 7 and all(torch.equal(results[0][name], results[1][name]) for name in results[0])
