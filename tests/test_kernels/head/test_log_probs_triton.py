"""The log-prob kernels: in the interpreter against autograd of a plain float64 log-softmax, ahead of time for every GPU, and on
a GPU against float64 and the same formula in eager bf16."""

import re

import pytest
import torch
from aot import ARCHITECTURES, check_fits, compile_for

import kernels.device
import kernels.head.log_probs
from kernels.device import family_of, unmeasured
from kernels.head.draw import _logits_kernel, draw, head_logits
from kernels.head.log_probs import (
    _hidden_gradient_kernel,
    _kept_kernel,
    _logits_gradient_kernel,
    _reference_kernel,
    log_probs,
)
from kernels.head.sampling import draw_tokens
from kernels.head.tiles import (
    _BLOCKS,
    _FEW_ROWS,
    _FLOAT32_BLOCKS,
    _SMALL_PARTS,
    _partials_kernel,
    _reduce_kernel,
    path_of,
)

TARGETS_ONLY, ENTROPY_TOO = (1.0, 0.0), (1.0, 0.3)


def inputs(num_tokens, width, vocab, *, dtype=torch.float32, device="cpu", spread=1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(num_tokens + width + vocab)
    hidden = torch.randn(num_tokens, width, generator=generator, device=device) * spread
    weight = torch.randn(vocab, width, generator=generator, device=device) / width**0.5
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator, device=device)
    return hidden.to(dtype), weight.to(dtype), targets


def kept_sets(targets, vocab) -> tuple[dict, torch.Tensor]:
    """Every third row unfiltered, the others of 2, 3, 4 ... ids in no order with the target among them; and as a mask [N, V]."""
    generator = torch.Generator().manual_seed(2)
    rows, mask = [], torch.ones(len(targets), vocab, dtype=torch.bool)
    for row, target in enumerate(targets.tolist()):
        others = torch.randperm(vocab, generator=generator)[:row + 1].tolist() if row % 3 != 2 else []
        rows.append([] if row % 3 == 2 else list(dict.fromkeys([*others, target])))
        if rows[-1]:
            mask[row] = False
            mask[row, rows[-1]] = True
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return {"kept_ids": ids.to(targets.device), "kept_offsets": offsets.to(targets.device)}, mask.to(targets.device)


def plain(hidden, weight, targets, *, temperature, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """log-softmax in the inputs' dtype; entropy is always that of the full vocabulary."""
    logits = hidden @ weight.T / temperature
    kept = logits if mask is None else logits.masked_fill(~mask, float("-inf"))
    full = torch.log_softmax(logits, dim=-1)
    return torch.log_softmax(kept, -1).gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)


def gradients(function, hidden, weight, targets, *, weights, trains_head, **settings) -> list[torch.Tensor]:
    """Log-probs, entropy and the gradients of a weighted sum of both, that of the head where it trains."""
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_(trains_head)]
    outputs = function(*leaves, targets, **settings)
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(len(targets), generator=generator).to(hidden.device) * weight_ for weight_ in weights]
    sum((output * factor.to(output.dtype)).sum() for output, factor, scale in zip(outputs, factors, weights) if scale).backward()
    return [*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


def compare(num_tokens, width, vocab, *, filtered=False, weights=TARGETS_ONLY, trains_head=False, temperature=0.7, spread=3.0,
            **settings) -> None:
    tensors = inputs(num_tokens, width, vocab, spread=spread)
    kept, mask = kept_sets(tensors[2], vocab) if filtered else ({}, None)
    choices = dict(weights=weights, trains_head=trains_head, temperature=temperature)
    ours = gradients(log_probs, *tensors, **choices, **kept, **settings)
    exact = gradients(plain, tensors[0].double(), tensors[1].double(), tensors[2], mask=mask, **choices)
    assert len(ours) == 4 if trains_head else len(ours) == 3
    for actual, expected in zip(ours, exact):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(1, 16, 32), (17, 40, 127), (35, 24, 63), (16, 48, 1)], ids=str)
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("weights", [TARGETS_ONLY, ENTROPY_TOO, (0.0, 1.0)], ids=["log_probs", "both", "entropy"])
def test_values_and_gradients_equal_those_of_a_plain_log_softmax(shape, filtered, weights, poisoned):
    compare(*shape, filtered=filtered, weights=weights)


@pytest.mark.interpreter
@pytest.mark.parametrize("filtered", [False, True])
def test_a_trainable_head_gets_its_gradient(filtered, poisoned):
    compare(17, 24, 70, filtered=filtered, weights=ENTROPY_TOO, trains_head=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("weights", [TARGETS_ONLY, ENTROPY_TOO], ids=["log_probs", "both"])
def test_a_small_scratch_gives_the_same_in_chunks(filtered, weights, poisoned, monkeypatch):
    sizes, empty = [], torch.empty

    def measured(*shape, dtype=None, **settings):
        sizes.append(torch.Size(shape).numel() * dtype.itemsize)
        return empty(*shape, dtype=dtype, **settings)

    monkeypatch.setattr(torch, "empty", measured)
    compare(19, 16, 200, filtered=filtered, weights=weights, scratch_bytes=5 * 200 * 4)
    assert max(sizes) <= 5 * 200 * 4


@pytest.mark.interpreter
def test_an_announced_entropy_loss_changes_nothing_but_the_route(poisoned):
    compare(17, 16, 70, weights=ENTROPY_TOO, has_entropy_loss=True)
    compare(17, 16, 70, weights=TARGETS_ONLY, has_entropy_loss=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("filtered", [False, True])
def test_logits_far_above_the_chosen_token_are_rescaled(filtered, poisoned):
    # 2^64 above the chosen token a tile takes its own maximum: spread makes most rows do so
    compare(12, 16, 100, filtered=filtered, spread=100.0)


@pytest.mark.interpreter
def test_the_gradient_of_a_nearly_certain_token_keeps_its_digits(poisoned):
    hidden, weight, _ = inputs(4, 16, 40)
    targets = torch.arange(4)
    hidden = 25 * weight[:4] / weight[:4].square().sum(1, keepdim=True)
    choices = dict(weights=TARGETS_ONLY, trains_head=False, temperature=1.0)
    ours = gradients(log_probs, hidden, weight, targets, **choices)
    exact = gradients(plain, hidden.double(), weight.double(), targets, **choices)
    assert exact[0].abs().max() < 1e-3  # nats: probabilities above 0.999
    assert (ours[2].double() - exact[2]).norm() < 1e-4 * exact[2].norm()


@pytest.mark.interpreter
def test_library_products_serve_gpus_without_tensor_cores(poisoned, monkeypatch):
    assert path_of(*inputs(2, 16, 16)[:2]) == "triton"
    monkeypatch.setenv("GRPO_PRODUCTS", "library")
    assert path_of(*inputs(2, 16, 16)[:2]) == "library"
    compare(17, 24, 70, scratch_bytes=10_000)
    compare(17, 24, 70, filtered=True)
    compare(17, 24, 70, weights=ENTROPY_TOO)


@pytest.mark.interpreter
def test_bf16_without_bf16_arithmetic_and_mixed_dtypes_are_refused(monkeypatch):
    hidden, weight, targets = inputs(2, 16, 16)
    with pytest.raises(ValueError, match="bfloat16"):
        log_probs(hidden.bfloat16(), weight, targets, temperature=1.0)
    monkeypatch.setattr(kernels.device, "gpu_family", lambda x: "turing")
    with pytest.raises(ValueError, match="float16"):
        log_probs(hidden.bfloat16(), weight.bfloat16(), targets, temperature=1.0)


@pytest.mark.interpreter
def test_the_entropy_gradient_in_float16_is_refused():
    hidden, weight, targets = inputs(2, 16, 16, dtype=torch.float16)
    _, entropy = log_probs(hidden.requires_grad_(), weight, targets, temperature=1.0)
    with pytest.raises(ValueError, match="underflow"):
        entropy.sum().backward()


@pytest.mark.interpreter
def test_float16_probabilities_stay_finite(poisoned):
    hidden, weight, targets = inputs(12, 16, 100, dtype=torch.float16, spread=30.0)
    choices = dict(weights=TARGETS_ONLY, trains_head=False, temperature=1.0)
    ours = gradients(log_probs, hidden, weight, targets, **choices)
    exact = gradients(plain, hidden.double(), weight.double(), targets, **choices)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-4)
    assert (ours[2].double() - exact[2]).norm() < 2e-3 * exact[2].norm()


@pytest.mark.interpreter
def test_no_gradient_and_no_tokens():
    hidden, weight, targets = inputs(5, 16, 40)
    with torch.no_grad():
        chosen, entropy = log_probs(hidden.requires_grad_(), weight, targets, temperature=0.7)
    for actual, expected in zip((chosen, entropy), plain(hidden.double(), weight.double(), targets, temperature=0.7)):
        torch.testing.assert_close(actual.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    empty = hidden.detach()[:0].requires_grad_()
    chosen, entropy = log_probs(empty, weight, targets[:0], temperature=0.7)
    (chosen.sum() + entropy.sum()).backward()
    assert chosen.shape == entropy.shape == (0,) and empty.grad.shape == (0, 16)


@pytest.mark.interpreter
def test_strided_hidden_states_and_head():
    hidden, weight, targets = inputs(17, 24, 70)
    strided = [tensor.T.contiguous().T for tensor in (hidden, weight)]
    for ours, expected in zip(log_probs(*strided, targets, temperature=1.0), log_probs(hidden, weight, targets, temperature=1.0)):
        assert torch.equal(ours, expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
def test_head_logits_of_any_number_of_rows(num_tokens, poisoned):
    hidden, weight, _ = inputs(num_tokens, 40, 127)
    torch.testing.assert_close(head_logits(hidden, weight).double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
def test_descriptors_give_the_same_bits_as_pointers(poisoned, monkeypatch):
    tensors, choices = inputs(35, 48, 127), dict(weights=ENTROPY_TOO, trains_head=True, temperature=0.7)
    pointers = gradients(log_probs, *tensors, **choices)
    monkeypatch.setitem(_BLOCKS, "interpreter", unmeasured(_BLOCKS["interpreter"].blocks | dict(USE_TMA=True)))
    for ours, expected in zip(gradients(log_probs, *tensors, **choices), pointers):
        assert torch.equal(ours, expected)


@pytest.mark.interpreter
def test_a_row_does_not_depend_on_its_batch(poisoned):
    hidden, weight, targets = inputs(35, 48, 127)
    together = log_probs(hidden, weight, targets, temperature=0.7)
    for row in (0, 16, 34):
        alone = log_probs(hidden[row:row + 1], weight, targets[row:row + 1], temperature=0.7)
        assert all(torch.equal(one, many[row:row + 1]) for one, many in zip(alone, together))


def check_draw(hidden, weight, *, temperature, rows) -> None:
    """Tokens are those of the logits, log-probs those of log_probs, in any batch, bit for bit."""
    generator = torch.Generator().manual_seed(9)
    rng_keys = torch.randint(-(1 << 31), (1 << 31) - 1, (len(hidden), 2), generator=generator).to(hidden.device, torch.int32)
    tokens, drawn = draw(hidden, weight, rng_keys, temperature=temperature)
    assert torch.equal(tokens, draw_tokens(head_logits(hidden, weight), rng_keys, temperature=temperature))
    assert len(tokens.unique()) > len(tokens) // 2
    assert torch.equal(drawn, log_probs(hidden, weight, tokens, temperature=temperature)[0])
    for part in rows:
        alone = draw(hidden[part], weight, rng_keys[part], temperature=temperature)
        assert torch.equal(alone[0], tokens[part]) and torch.equal(alone[1], drawn[part])
    likely, values = draw(hidden, weight, None, temperature=temperature)
    assert torch.equal(likely, head_logits(hidden, weight).argmax(1))
    assert torch.equal(values, log_probs(hidden, weight, likely, temperature=temperature)[0]) and (values >= drawn).all()


@pytest.mark.interpreter
def test_drawn_tokens_have_the_log_probs_of_training(poisoned):
    hidden, weight, _ = inputs(35, 48, 127)
    check_draw(hidden, weight, temperature=0.7, rows=(slice(0, 1), slice(16, 35), slice(0, 0)))


def compiled(kernel, flags, arch, *, small_parts=False, dtype="bf16", few_rows=False, blocks=None):
    """A kernel as the launches of this GPU family would have it, or with these blocks."""
    family = family_of(arch)
    blocks = blocks or (_FLOAT32_BLOCKS if dtype == "fp32" else _BLOCKS[family].blocks)
    if dtype != "fp32" and small_parts and family in _SMALL_PARTS:
        blocks = blocks | _SMALL_PARTS[family].blocks
    blocks = dict(blocks) | (dict(BM=16, BN=min(blocks["BN"], 128)) if few_rows else {})
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    scalars = dict(targets="*i64", scratch=f"*{dtype}", grad_logits=f"*{dtype}", scale="fp32", temperature="fp32",
                   max_excess="fp32")
    constants = dict(KEEPS_LOGITS=False, IS_EVEN=True) | blocks | flags
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in ("hidden", "weight"):
            shape = [blocks["BM" if name == "hidden" else "BN"], blocks["BK"]]
            signature[name] = f"tensordesc<{dtype}{shape}>".replace(" ", "") if blocks["USE_TMA"] else f"*{dtype}"
        elif name.startswith(("stride", "num_", "width", "vocab", "first_")):
            signature[name] = "i32"
        else:
            signature[name] = scalars.get(name, "*fp32")
    divisible = tuple(name for name, kind in signature.items() if kind[0] == "*" or name.startswith(("stride", "width")))
    return compile_for(kernel, signature, constants, arch, **options, divisible=divisible)


PLAIN = dict(HAS_LOGITS=False, HAS_KEPT=False, STORES=True, logits=None, kept_maxima=None, kept_sums=None, stride_logits=0)
DRAWN = dict(HAS_LOGITS=False, HAS_KEPT=False, STORES=False, KEEPS_LOGITS=True, scratch=None, stride_scratch=0)
FILTERED = dict(HAS_LOGITS=False, HAS_KEPT=True, STORES=True, logits=None, stride_logits=0)
MMA = {"ampere": "HMMA", "consumer": "HMMA", "hopper": "HGMMA", "blackwell": "UTCHMMA"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("variant", ["plain", "drawn", "filtered", "gradient", "few_rows"])
def test_products_compile_without_spills_on_tensor_cores(arch, variant):
    resources = {
        "plain": lambda: compiled(_partials_kernel, PLAIN, arch),
        "drawn": lambda: compiled(_partials_kernel, DRAWN, arch),
        "filtered": lambda: compiled(_partials_kernel, FILTERED, arch, small_parts=True),
        "gradient": lambda: compiled(_logits_gradient_kernel, dict(HAS_KEPT=True, HAS_LOG_PROBS=True, HAS_ENTROPY=True), arch,
                                     small_parts=True),
        "few_rows": lambda: compiled(_logits_kernel, {}, arch, few_rows=True),
    }[variant]()
    check_fits(resources, arch)
    assert MMA[family_of(arch)] in resources.mma or variant == "few_rows" and resources.has_mma


def test_draws_of_few_rows_add_a_row_up_in_the_order_of_training():
    """Which thread has which columns of a row; the warps of both tiles lie along the rows."""
    layouts = []
    for few in (False, True):
        blocks = _BLOCKS["hopper"].blocks | (_FEW_ROWS["hopper"].blocks if few else {})
        resources = compiled(_partials_kernel, DRAWN, 90, blocks=blocks)
        check_fits(resources, 90)
        pattern = r'"tt.reduce".*?axis = 1.*?\}\) : \(tensor<\d+x128xf32, (#\w+)>\)'
        name, = set(re.findall(pattern, resources.ttgir, re.S))
        layout = re.search(rf"^{name} = .*?(register = .*), warp = (.*), block = ", resources.ttgir, re.M)
        assert re.fullmatch(r"\[(\[\d+, 0\](, )?)+\]", layout[2])
        layouts.append(layout[1])
    assert layouts[0] == layouts[1]


@pytest.mark.parametrize("arch", [80, 90])
def test_head_logits_of_many_rows_compile_without_spills(arch):
    check_fits(compiled(_logits_kernel, {}, arch), arch)


@pytest.mark.parametrize("arch", [75, 90])
def test_float32_and_library_logits_compile_without_spills(arch):
    if arch == 75:
        for flags in (PLAIN, FILTERED):
            flags = {name: value for name, value in flags.items() if name not in ("logits", "stride_logits")}
            check_fits(compiled(_partials_kernel, flags | {"HAS_LOGITS": True}, arch, dtype="fp16"), arch)
    else:
        check_fits(compiled(_partials_kernel, PLAIN, arch, dtype="fp32"), arch)


ROW_KERNELS = {
    _reduce_kernel: dict(TILE=64, TILES=4096, BLOCK=1024, HAS_KEPT=True, STORES=True),
    _reference_kernel: dict(BLOCK=4096),
    _hidden_gradient_kernel: dict(BLOCK=4096),
    _kept_kernel: dict(BLOCK=1024),
}


@pytest.mark.parametrize("arch", [75, 80, 90, 100])
@pytest.mark.parametrize("kernel", ROW_KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_passes_over_rows_compile_without_spills(kernel, arch):
    half = "*bf16" if arch >= 80 else "*fp16"
    types = dict(targets="*i64", ids="*i32", offsets="*i64", scale="fp32", temperature="fp32", max_excess="fp32")
    types |= dict.fromkeys(("hidden", "weight", "scratch", "grad_hidden", "weighted_sum"), half)
    signature = {name: "i32" if name.startswith(("stride", "num_", "vocab", "width", "first_")) else types.get(name, "*fp32")
                 for name in kernel.arg_names if name not in ROW_KERNELS[kernel]}
    num_warps = 8 if kernel is _reference_kernel else 4
    check_fits(compile_for(kernel, signature, ROW_KERNELS[kernel], arch, num_warps=num_warps, num_stages=3), arch)


def relative_errors(ours, eager, exact) -> list[tuple[float, float]]:
    return [tuple(((values.double() - best).norm() / best.norm()).item() for values in pair)
            for *pair, best in zip(ours, eager, exact)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 2880, 201_088), (1, 2880, 201_088), (129, 2880, 4_097), (63, 40, 127)], ids=str)
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("weights, trains_head", [(TARGETS_ONLY, False), (ENTROPY_TOO, False), (ENTROPY_TOO, True)],
                         ids=["log_probs", "both", "head_trains"])
def test_bf16_error_is_at_most_twice_that_of_eager_bf16(shape, filtered, weights, trains_head, poisoned):
    tensors = inputs(*shape, dtype=torch.bfloat16, device="cuda", spread=2.0)
    kept, mask = kept_sets(tensors[2], shape[2]) if filtered else ({}, None)
    choices = dict(weights=weights, trains_head=trains_head, temperature=0.9)
    ours = gradients(log_probs, *tensors, **choices, **kept)
    again = gradients(log_probs, *tensors, **choices, **kept)
    assert all(torch.equal(one, other) for one, other in zip(ours, again))
    eager = gradients(plain, *tensors, **choices, mask=mask)
    exact = gradients(plain, tensors[0].double(), tensors[1].double(), tensors[2], **choices, mask=mask)
    for error, rough in relative_errors(ours, eager, exact):
        assert error <= 2 * rough + 1e-6


@pytest.mark.gpu
def test_a_token_has_the_same_bits_in_any_batch_with_and_without_a_gradient():
    hidden, weight, targets = inputs(700, 2880, 201_088, dtype=torch.bfloat16, device="cuda", spread=2.0)
    with torch.no_grad():
        together = log_probs(hidden, weight, targets, temperature=0.9)
    for first, count in ((0, 1), (3, 7), (100, 64), (200, 65), (300, 400)):
        rows = slice(first, first + count)
        for needs_gradient in (False, True):
            part = hidden[rows].clone().requires_grad_(needs_gradient)
            ours = log_probs(part, weight, targets[rows].contiguous(), temperature=0.9)
            assert torch.equal(ours[0].detach(), together[0][rows]), (first, count, needs_gradient)


@pytest.mark.gpu
def test_drawn_tokens_have_the_log_probs_of_training_on_the_gpu():
    hidden, weight, _ = inputs(512, 2880, 201_088, dtype=torch.bfloat16, device="cuda", spread=2.0)
    check_draw(hidden, weight, temperature=0.9, rows=(slice(0, 1), slice(7, 39), slice(100, 357)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float16, 2e-3)])
def test_float32_and_float16_on_the_gpu(dtype, tolerance, poisoned):
    tensors = inputs(200, 96, 5_000, dtype=dtype, device="cuda", spread=3.0)
    choices = dict(weights=TARGETS_ONLY, trains_head=False, temperature=0.7)
    ours = gradients(log_probs, *tensors, **choices)
    exact = gradients(plain, tensors[0].double(), tensors[1].double(), tensors[2], **choices)
    for actual, expected in zip(ours, exact):
        assert (actual.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.gpu
def test_library_products_agree_on_the_gpu(poisoned, monkeypatch):
    tensors = inputs(200, 2880, 4_097, dtype=torch.bfloat16, device="cuda", spread=2.0)
    choices = dict(weights=TARGETS_ONLY, trains_head=False, temperature=0.7)
    ours = gradients(log_probs, *tensors, **choices)
    monkeypatch.setenv("GRPO_PRODUCTS", "library")
    for actual, expected in zip(gradients(log_probs, *tensors, **choices), ours):
        assert (actual.double() - expected.double()).norm() < 1e-2 * expected.double().norm()


@pytest.mark.gpu
def test_scratch_stays_within_its_bound():
    hidden, weight, targets = inputs(4096, 2880, 20_000, dtype=torch.bfloat16, device="cuda")
    hidden.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    log_probs(hidden, weight, targets, temperature=1.0, scratch_bytes=20_000_000)
    saved = 4096 * 2880 * 2  # the sum that the backward needs
    assert torch.cuda.max_memory_allocated() - before < 20_000_000 + saved + 8_000_000
