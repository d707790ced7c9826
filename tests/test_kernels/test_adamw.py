"""AdamW with 8-bit moments and bf16 weights: the reference against fp32 updates, the kernel against the reference."""

import math

import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for

import kernels.adamw
from kernels.adamw import (
    BLOCK,
    AdamNumbers,
    Moments8,
    _adamw8_kernel,
    _encode,
    _grid,
    adamw,
    dequantize,
    quantize,
    random_bits,
    rng_keys,
    round_bf16,
)


def rng_key(seed, update, parameter):
    return rng_keys(seed, update, parameter + 1)[parameter]


def numbers(num_updates=1, **changes):
    return AdamNumbers(**{"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "scale": 0.5,
                          "num_updates": num_updates, **changes})


def zeros8(size, device="cpu"):
    blocks = -(-size // BLOCK)
    codes, absmax = (lambda: torch.zeros(size, dtype=torch.uint8, device=device)), (lambda: torch.zeros(blocks, device=device))
    return Moments8(codes(), absmax(), codes(), absmax())


def gradients(size, seed, spread=2.0, device="cpu"):
    """Normal, each element with a scale of its own."""
    generator = torch.Generator().manual_seed(7)
    scales = torch.exp(spread * torch.randn(size, generator=generator))
    return (scales * torch.randn(size, generator=torch.Generator().manual_seed(seed))).to(device)


@pytest.mark.parametrize("levels", [7, 8])
def test_the_grid_has_its_decades_and_both_ends_and_its_own_points_keep_their_codes(levels):
    grid = _grid(levels, torch.device("cpu"))
    assert len(grid) == 2**levels and grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()
    for i in range(1, levels + 1):  # the decade that begins at code 2^i - 1 has 2^i steps of equal size
        assert grid[2**i - 1].item() == pytest.approx(10.0 ** (i - levels), rel=1e-6)
    assert grid[2 ** (levels - 1)].item() == pytest.approx(0.1 + 0.9 / 2 ** (levels - 1), rel=1e-6)
    middle = torch.tensor(0x8000)
    assert torch.equal(_encode(grid, levels, middle), torch.arange(2**levels, dtype=torch.int32))
    for share in (0.25, 0.75):  # a point at this share of a step goes up if the random share is smaller
        points = grid[1:-1] + share * grid.diff()[1:]
        for random, goes_up in ((share - 0.01, 1), (share + 0.01, 0)):
            codes = _encode(points, levels, torch.tensor(int(random * 65536)))
            assert torch.equal(codes, torch.arange(1, 2**levels - 1, dtype=torch.int32) + goes_up)


def bits(size, seed=0):
    return random_bits(size, 0, rng_key(seed, 0, 0), torch.device("cpu"))[1]


def test_moments_come_back_within_a_step_of_their_blocks_grid_and_right_in_expectation():
    m, root = gradients(1000, seed=0), gradients(1000, seed=1).abs()
    found = dequantize(quantize(m, root, bits(1000)))
    mean = [sum(parts) / 400 for parts in zip(*(dequantize(quantize(m, root, bits(1000, seed))) for seed in range(400)))]
    for exact, actual, average, levels in ((m, found[0], mean[0], 7), (root, found[1], mean[1], 8)):
        for start in range(0, 1000, BLOCK):
            part, got = exact[start:start + BLOCK], actual[start:start + BLOCK]
            largest = part.abs().max()
            assert (got.abs().max() - largest).abs() <= 1e-6 * largest  # the largest does not decay
            decade = 10.0 ** (part.abs() / largest).clamp(min=10.0**-levels).log10().floor().clamp(max=-1) * largest
            step = decade * 9 / 2 ** (torch.log10(decade / largest) + levels).round()
            assert ((got - part).abs() <= 1.001 * step).all()
            is_above = part.abs() > 2 * 10.0 ** (1 - levels) * largest  # below, the grid's ends round otherwise
            assert ((average[start:start + BLOCK] - part).abs() <= 0.13 * step)[is_above].all()  # 5 of sqrt(1 / 4 / 400)


def test_a_second_moment_above_zero_never_becomes_zero():
    root = torch.tensor([1.0, 1e-9, 0.0])
    found = dequantize(quantize(torch.zeros(3), root, bits(3)))[1]
    assert found[1].item() == pytest.approx(1e-7, rel=1e-5) and found[2] == 0


def path_error(gradient_of, steps):
    """The sum of updates with 8-bit moments against that with fp32 ones: rms, relative."""
    size, exact, rough = 4096, torch.zeros(4096), torch.zeros(4096)
    moments, moments8 = (torch.zeros(size), torch.zeros(size)), zeros8(size)
    for step in range(1, steps + 1):
        for weight, kept in ((exact, moments), (rough, moments8)):
            adamw(weight, gradient_of(weight, step), kept, None, numbers(step, lr=1e-2, weight_decay=0.0, scale=1.0), first=0,
                  key=rng_key(0, step, 0))
    return ((rough - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("spread, largest", [(0.5, 0.05), (2.0, 0.2)])
def test_paths_with_8_bits_stay_near_those_with_fp32_moments_where_gradients_are_noise(spread, largest):
    """The errors that the docstring of kernels/adamw.py states, with some room."""
    mean = 0.3 * gradients(4096, seed=999, spread=spread)
    assert 0 < path_error(lambda weight, step: mean + gradients(4096, seed=step, spread=spread), 300) < largest


def test_paths_with_8_bits_stay_near_those_with_fp32_moments_where_gradients_fall_smoothly():
    """Nothing but the rounding's own randomness moves the moments off their grid: to nearest, the error is several times this."""
    target, curvature = gradients(4096, seed=3, spread=0.5), gradients(4096, seed=4, spread=0.5).abs()
    assert 0 < path_error(lambda weight, step: curvature * (weight - target), 400) < 0.05


def test_an_update_of_1e_6_moves_a_bf16_weight_of_a_fiftieth_only_with_help():
    """In expectation right by stochastic rounding, to 2^-18 of the weight by compensation, not at all without either."""
    size, steps, lr = 20_000, 20, 1e-6
    start = torch.full((size,), 0.02).bfloat16()
    settings = dict(lr=lr, weight_decay=0.0, scale=1.0, beta1=0.0, beta2=0.0, eps=1e-12)  # each update moves by lr
    nearest, stochastic, compensated = start.clone(), start.clone(), start.clone()
    rest, moments = torch.zeros_like(start), [(torch.zeros(size), torch.zeros(size)) for _ in range(3)]
    for step in range(1, steps + 1):
        grad = torch.ones(size)
        adamw(stochastic, grad.clone(), moments[1], None, numbers(step, **settings), first=0, key=rng_key(0, step, 0))
        adamw(compensated, grad.clone(), moments[2], rest, numbers(step, **settings), first=0, key=(0, 0))
        nearest -= lr  # rounds to nearest
    unit = 2.0 ** -13  # the last bit of a bf16 weight in [2^-6, 2^-5)
    moved = (start.double() - stochastic.double())
    assert torch.equal(nearest, start)
    # its standard deviation is about sqrt(n d u); 5 of the mean's
    assert moved.mean().item() == pytest.approx(steps * lr, abs=5 * math.sqrt(steps * lr * unit / size))
    assert moved.std().item() == pytest.approx(math.sqrt(steps * lr * unit), rel=0.2)
    total = start.double() - compensated.double() - rest.double()
    assert (total - steps * lr).abs().max() <= steps * 0.02 * 2.0**-18


def stochastic(x, first, *key):
    return round_bf16(x, random_bits(len(x), first, rng_key(*key), x.device)[0])


def test_stochastic_rounding_has_the_expectation_of_its_argument_and_depends_on_key_and_place_alone():
    x = torch.full((100_000,), 1.0 + 0.3 * 2.0**-7)
    rounded = stochastic(x, 0, 3, 1, 5)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert (rounded > 1).float().mean().item() == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / 1e5))
    assert torch.equal(rounded[512:], stochastic(x[512:], 512, 3, 1, 5))
    for key in ((4, 1, 5), (3, 2, 5), (3, 1, 6)):  # independent: both agree with probability 0.3^2 + 0.7^2
        assert (stochastic(x, 0, *key) == rounded).float().mean().item() == pytest.approx(0.58, abs=0.01)


def test_the_random_bits_of_weights_and_moments_are_uniform_and_independent():
    first, more = random_bits(100_000, 0, rng_key(0, 0, 0), torch.device("cpu"))
    shares = torch.stack([part & 0xFFFF for part in (first, more, more >> 16)]).double() / 65536
    assert (shares.mean(1) - 0.5).abs().max() < 0.005 and (shares.var(1) - 1 / 12).abs().max() < 0.002
    assert (torch.corrcoef(shares) - torch.eye(3)).abs().max() < 0.02
    assert torch.corrcoef(torch.stack([shares[1, 1:], shares[1, :-1]]))[0, 1].abs() < 0.02


def test_rounding_to_nearest_is_that_of_bf16():
    x = torch.cat([gradients(5000, seed=0), torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 0.0])])
    assert torch.equal(round_bf16(x, None), x.bfloat16().float())


def run(device, dtype, rounding, *, size=1000, steps=3, kernel=True, first=BLOCK):
    """Weights, moments and compensation after some updates."""
    weight = gradients(size, seed=50, spread=0.1).to(device, dtype)
    compensation = torch.zeros_like(weight) if rounding == "compensated" else None
    moments = zeros8(size, device)
    for step in range(1, steps + 1):
        update = adamw if kernel else kernels.adamw.adamw_reference
        update(weight, gradients(size, seed=step, device=device).to(dtype), moments, compensation, numbers(step), first=first,
               key=rng_key(1, step, 2))
    return [weight, *moments, *([compensation] if rounding == "compensated" else [])]


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [1, 255, 1000, 1024])
def test_the_kernel_equals_the_reference_to_the_bit(size):
    for kernel, reference in zip(run("cpu", torch.float32, "exact", size=size),
                                 run("cpu", torch.float32, "exact", size=size, kernel=False), strict=True):
        assert torch.equal(kernel, reference)


@pytest.mark.interpreter
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_the_kernel_rounds_as_the_reference(rounding):
    """In fp32 tensors, whose values have the digits of bf16: the interpreter has no bf16."""
    size, moments = 700, (zeros8(700), zeros8(700))
    weights = [gradients(size, seed=50, spread=0.1).bfloat16() for _ in range(2)]
    rests = [torch.zeros(size, dtype=torch.bfloat16) for _ in range(2)]
    as_fp32 = weights[0].float()
    rest_fp32 = rests[0].float()
    for step in range(1, 4):
        grad, key, is_compensated = gradients(size, seed=step), rng_key(1, step, 2), rounding == "compensated"
        launch_kernel(as_fp32, grad.clone(), moments[0], rest_fp32 if is_compensated else None, numbers(step), key)
        kernels.adamw.adamw_reference(weights[1], grad.clone(), moments[1], rests[1] if is_compensated else None, numbers(step),
                                      first=BLOCK, key=key)
        assert torch.equal(as_fp32, weights[1].float()) and torch.equal(rest_fp32, rests[1].float())


def launch_kernel(weight, grad, moments, compensation, update, key):
    """adamw() refuses to round fp32 weights."""
    (decay, step_size, root_correction), betas = update.factors(), (update.beta1, update.beta2)
    kernels.adamw.launch(
        kernels.adamw._adamw8_kernel, (-(-len(weight) // 1024),), weight, grad, *moments, compensation, len(weight), BLOCK,
        *key, update.scale, betas[0], 1 - betas[0], betas[1], 1 - betas[1], update.eps, decay, step_size,
        1 / root_correction, ROUNDING="stochastic" if compensation is None else "compensated", BLOCK=BLOCK, ROWS=4, num_warps=4,
        enable_fp_fusion=False)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
@pytest.mark.parametrize("rounding", ["exact", "stochastic", "compensated"])
def test_the_kernel_fits_every_gpu(arch, rounding):
    weights = "*fp32" if rounding == "exact" or arch < 80 else "*bf16"
    signature = {"weight_ptr": weights, "grad_ptr": weights, "m_ptr": "*u8", "m_absmax_ptr": "*fp32", "root_ptr": "*u8",
                 "root_absmax_ptr": "*fp32"}
    constants = {"ROUNDING": rounding, "BLOCK": BLOCK, "ROWS": 4}
    if rounding == "compensated":
        signature["compensation_ptr"] = weights
    else:
        constants["compensation_ptr"] = None
    signature |= {name: "i32" for name in ("num_elements", "first", "key_1", "key_2")}
    signature |= {name: "fp32" for name in ("scale", "beta_1", "rest_1", "beta_2", "rest_2", "eps", "decay", "step_size",
                                            "root_factor")}
    found = compile_for(_adamw8_kernel, signature, constants, arch, num_warps=4, num_stages=3, enable_fp_fusion=False)
    check_fits(found, arch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, "exact"), (torch.bfloat16, "stochastic"),
                                             (torch.bfloat16, "compensated")])
@pytest.mark.parametrize("size", [1, 1000, 300_000])
def test_the_kernel_equals_the_reference_on_a_gpu_and_nearly_on_the_cpu(dtype, rounding, size):
    found = run("cuda", dtype, rounding, size=size)
    for kernel, reference in zip(found, run("cuda", dtype, rounding, size=size, kernel=False), strict=True):
        assert torch.equal(kernel, reference)
    for kernel, reference in zip(found, run("cpu", dtype, rounding, size=size, kernel=False), strict=True):
        # the CPU's square root is not always the nearest number, so a rounding may go the other way
        assert ((kernel.cpu().float() - reference.float()).abs() > 1e-6 * reference.float().abs()).float().mean() < 0.01
