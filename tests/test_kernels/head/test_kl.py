"""KL(p || q) over the whole vocabulary, and its gradient, against float64 autograd: the reference, and the kernels in the
interpreter, ahead of time for every GPU, and on a GPU beside the same formula in eager bf16."""

import math

import pytest
import torch
from aot import ARCHITECTURES, check_fits, compile_for

import kernels.head.kl
from kernels.device import family_of, unmeasured
from kernels.head.kl import (
    _BLOCKS,
    _FLOAT32_BLOCKS,
    _kl_gradient_kernel,
    _kl_partials_kernel,
    _kl_reduce_kernel,
    kl_divergence,
)


def inputs(num_tokens, width, vocab, *, spread=2.0, distance=0.3, own_head=True, dtype=torch.float32, device="cpu") -> list:
    """Hidden states and heads of a policy and of a reference near it; one head for both unless own_head."""
    made = dict(generator=torch.Generator(device).manual_seed(num_tokens + width + vocab), device=device)
    hidden = spread * torch.randn(num_tokens, width, **made)
    weight = torch.randn(vocab, width, **made) / width**0.5
    ref_hidden = hidden + distance * torch.randn(hidden.shape, **made)
    ref_weight = weight + distance * torch.randn(weight.shape, **made) / width**0.5
    tensors = [tensor.to(dtype) for tensor in (hidden, weight, ref_hidden, ref_weight)]
    return tensors if own_head else [*tensors[:3], tensors[1]]


def plain(hidden, weight, ref_hidden, ref_weight, *, temperature) -> torch.Tensor:
    """In the inputs' dtype."""
    log_p = torch.log_softmax(hidden @ weight.T / temperature, -1)
    log_q = torch.log_softmax(ref_hidden @ ref_weight.T / temperature, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def gradients(function, tensors, *, trains_head, temperature, **settings) -> list[torch.Tensor]:
    """KL and the gradients of a weighted sum of it."""
    hidden, weight = tensors[0].clone().requires_grad_(), tensors[1].clone().requires_grad_(trains_head)
    has_one_head = tensors[3] is tensors[1] and not trains_head
    kl = function(hidden, weight, tensors[2], weight if has_one_head else tensors[3], temperature=temperature, **settings)
    factors = torch.randn(len(hidden), generator=torch.Generator().manual_seed(1)).to(hidden.device)
    (kl * factors.to(kl.dtype)).sum().backward()
    return [kl.detach(), hidden.grad, *([weight.grad] if trains_head else [])]


def compare(*shape, trains_head=False, own_head=True, spread=2.0, distance=0.3, temperature=0.7, **settings) -> None:
    tensors = inputs(*shape, own_head=own_head, spread=spread, distance=distance)
    ours = gradients(kl_divergence, tensors, trains_head=trains_head, temperature=temperature, **settings)
    exact = gradients(plain, [tensor.double() for tensor in tensors], trains_head=trains_head, temperature=temperature)
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5)


def test_numbers_worked_out_by_hand():
    # p = (1/8, 2/8, 5/8), q = (1/3, 1/3, 1/3): KL = log 3 - entropy of p; at temperature 1/2 p = (1/30, 4/30, 25/30)
    weight, ref_weight = torch.tensor([[1.0], [2.0], [5.0]]).log(), torch.zeros(3, 1)
    for temperature, p in ((1.0, (1 / 8, 2 / 8, 5 / 8)), (0.5, (1 / 30, 4 / 30, 25 / 30))):
        kl = kl_divergence(torch.ones(1, 1), weight, torch.ones(1, 1), ref_weight, temperature=temperature)
        assert kl.item() == pytest.approx(math.log(3) + sum(x * math.log(x) for x in p), abs=1e-6)


def check_everywhere() -> None:
    compare(17, 40, 127)
    compare(17, 40, 127, own_head=False, temperature=1.6)
    compare(9, 24, 63, trains_head=True)
    compare(1, 16, 1)
    tensors = inputs(5, 16, 40, distance=0.0)
    assert torch.equal(kl_divergence(*tensors, temperature=0.7), torch.zeros(5))  # equal distributions: exactly 0
    hidden = tensors[0][:0].requires_grad_()
    kl_divergence(hidden, tensors[1], hidden, tensors[1], temperature=1.0).sum().backward()
    assert hidden.grad.shape == (0, 16)


def test_values_and_gradients_equal_those_of_autograd(monkeypatch):
    check_everywhere()
    monkeypatch.setattr(kernels.head.kl, "MAX_LOGITS", 8 * 127)  # in chunks of 4 tokens
    compare(17, 40, 127)


@pytest.mark.interpreter
def test_the_kernels_values_and_gradients_equal_those_of_autograd(poisoned):
    check_everywhere()


@pytest.mark.interpreter
def test_a_small_scratch_gives_the_same_in_chunks_and_ranges(poisoned):
    compare(19, 16, 200, scratch_bytes=5 * 200 * 4)
    compare(19, 16, 200, trains_head=True, scratch_bytes=5 * 200 * 4)


@pytest.mark.interpreter
def test_near_distributions_keep_their_digits(poisoned):
    # KL of about 1e-5 nats where log-sum-exps are near 10: subtracted when rounded, they would leave one digit
    tensors = inputs(8, 32, 300, spread=8.0, distance=1e-3)
    ours = gradients(kl_divergence, tensors, trains_head=False, temperature=1.0)
    exact = gradients(plain, [tensor.double() for tensor in tensors], trains_head=False, temperature=1.0)
    assert 0 < exact[0].max() < 1e-4
    assert (ours[0].double() - exact[0]).abs().max() < 3e-7
    assert (ours[1].double() - exact[1]).norm() < 1e-3 * exact[1].norm()


@pytest.mark.interpreter
def test_huge_logits_stay_finite(poisoned):
    kl, grad = gradients(kl_divergence, inputs(6, 16, 60, spread=1e4), trains_head=False, temperature=0.5)
    assert kl.isfinite().all() and grad.isfinite().all() and kl.max() > 1


@pytest.mark.interpreter
def test_descriptors_and_one_head_give_the_same_bits_and_a_row_does_not_depend_on_its_batch(poisoned, monkeypatch):
    tensors = inputs(35, 48, 127, own_head=False)
    pointers = gradients(kl_divergence, tensors, trains_head=False, temperature=0.7)
    copied = gradients(kl_divergence, [*tensors[:3], tensors[1].clone()], trains_head=False, temperature=0.7)
    monkeypatch.setitem(_BLOCKS, "interpreter", unmeasured(_BLOCKS["interpreter"].blocks | dict(USE_TMA=True)))
    described = gradients(kl_divergence, tensors, trains_head=False, temperature=0.7)
    for ours in (copied, described):
        assert all(torch.equal(one, other) for one, other in zip(ours, pointers))
    row = [tensors[0][20:21], tensors[1], tensors[2][20:21], tensors[1]]
    assert torch.equal(kl_divergence(*row, temperature=0.7), pointers[0][20:21])


@pytest.mark.interpreter
def test_float16_and_mixed_dtypes_are_refused():
    tensors = inputs(2, 16, 16, dtype=torch.float16)
    with pytest.raises(ValueError, match="underflow"):
        kl_divergence(*tensors, temperature=1.0)
    with pytest.raises(ValueError, match="must be equal"):
        kl_divergence(tensors[0], *inputs(2, 16, 16)[1:], temperature=1.0)


MMA = {"ampere": "HMMA", "consumer": "HMMA", "hopper": "HGMMA", "blackwell": "UTCHMMA"}


def compiled(kernel, arch, *, own_head, dtype="bf16"):
    blocks = dict(_FLOAT32_BLOCKS if dtype == "fp32" else _BLOCKS[family_of(arch)].blocks)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    constants = blocks | dict(IS_EVEN=True) | ({} if own_head else dict(ref_weight=None))
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in ("hidden", "weight", "ref_hidden", "ref_weight"):
            shape = [blocks["BM" if name.endswith("hidden") else "BN"], blocks["BK"]]
            signature[name] = f"tensordesc<{dtype}{shape}>".replace(" ", "") if blocks["USE_TMA"] else f"*{dtype}"
        elif name.startswith(("stride", "num_", "width", "vocab")):
            signature[name] = "i32"
        else:
            signature[name] = {"grad_logits": f"*{dtype}", "scale": "fp32", "temperature": "fp32"}.get(name, "*fp32")
    divisible = tuple(name for name, kind in signature.items() if kind[0] == "*" or name.startswith(("stride", "width")))
    return compile_for(kernel, signature, constants, arch, **options, divisible=divisible, enable_fp_fusion=False)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", [_kl_partials_kernel, _kl_gradient_kernel], ids=lambda kernel: kernel.fn.__name__)
def test_products_compile_without_spills_on_tensor_cores(arch, kernel):
    for own_head in (False, True) if arch in (80, 90) else (True,):
        resources = compiled(kernel, arch, own_head=own_head)
        check_fits(resources, arch)
        assert MMA[family_of(arch)] in resources.mma


def test_float32_products_and_the_sum_of_tiles_compile_without_spills():
    for kernel in (_kl_partials_kernel, _kl_gradient_kernel):
        check_fits(compiled(kernel, 90, own_head=True, dtype="fp32"), 90)
    signature = {name: "i32" if name == "num_tiles" else "*fp32" for name in _kl_reduce_kernel.arg_names if name != "TILES"}
    check_fits(compile_for(_kl_reduce_kernel, signature, {"TILES": 4096}, 80, num_warps=4, num_stages=3,
                           enable_fp_fusion=False), 80)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 2880, 201_088), (1, 2880, 201_088), (129, 2880, 4_097), (63, 40, 127)], ids=str)
@pytest.mark.parametrize("own_head, trains_head", [(False, False), (True, False), (True, True)],
                         ids=["one_head", "two_heads", "head_trains"])
def test_bf16_error_is_at_most_twice_that_of_eager_bf16(shape, own_head, trains_head, poisoned):
    tensors = inputs(*shape, dtype=torch.bfloat16, device="cuda", own_head=own_head)
    choices = dict(trains_head=trains_head, temperature=0.9)
    ours, again = (gradients(kl_divergence, tensors, **choices) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(ours, again))
    eager = gradients(plain, tensors, **choices)
    exact = gradients(plain, [tensor.double() for tensor in tensors], **choices)
    for actual, rough, best in zip(ours, eager, exact, strict=True):
        assert (actual.double() - best).norm() <= 2 * (rough.double() - best).norm() + 1e-6 * best.norm()


@pytest.mark.gpu
def test_equal_distributions_have_no_kl_and_float32_agrees_on_the_gpu():
    tensors = inputs(300, 2880, 20_000, dtype=torch.bfloat16, device="cuda", distance=0.0)
    assert torch.equal(kl_divergence(*tensors, temperature=0.9), torch.zeros(300, device="cuda"))
    tensors = inputs(200, 96, 5_000, device="cuda")
    ours = gradients(kl_divergence, tensors, trains_head=True, temperature=0.7)
    exact = gradients(plain, [tensor.double() for tensor in tensors], trains_head=True, temperature=0.7)
    for actual, expected in zip(ours, exact, strict=True):
        assert (actual.double() - expected).norm() < 2e-5 * expected.norm()
