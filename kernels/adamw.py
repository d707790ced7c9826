"""AdamW's update of one parameter (Loshchilov and Hutter, arXiv 1711.05101), with moments in fp32 or in 8 bits.

With g the gradient times `scale`, m and v the moments, t the number of the update:
    m = m + (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2,  w = w (1 - lr decay) - lr / c1 * m / (sqrt(v / c2) + eps),
    c_i = 1 - beta_i^t.

8 bits: a code for each element and an fp32 absmax for each block of 256 (8-bit optimizers, arXiv 2110.02861). The codes are a
dynamic map like that paper's, with a finer grid in higher decades. With j = code + 1 = 2^i f, 1 <= f < 2, a code stands for
    y = 10^(i - L) (9 f - 8) times the block's absmax; code 0 stands for 0; the largest code stands for 1.
m: L = 7, a sign and 7 bits, from 1e-6 to 1. v: the root r = sqrt(v) is stored, with L = 8 and no sign, from 1e-7 to 1.
Two departures. The paper stores v, which has twice the decades of its root: where the gradients in a block differ by more than
three decades its v is 0 while m is not, and m / eps is a thousand times the right update. For the same reason an r above 0 never
gets code 0. And codes are rounded stochastically, not to nearest: most updates change a moment by less than half a step
of the grid, and it would stay where it is.
Measured: the sum of 300 to 400 updates against that with fp32 moments (rms, relative). Noisy gradients whose scales in a block
spread by e^0.5: 4 % (to nearest 3 %, the paper's codes 2 %), by e^2: 12 % (12 %; the paper's update is hundreds of times too
large). Gradients that fall smoothly: 1 to 5 % (to nearest 4 to 20 %).

A bf16 weight without an fp32 master loses updates below half its last bit, 2^-9 of its size, to rounding: at lr 1e-6 a weight of
0.02 never moves. Two ways out:
    stochastic    rounds up with the probability that makes the expectation exact. The error of a sum of n updates of size d is a
                  random walk: about sqrt(n d u), u the weight's last bit.
    compensated   a second bf16 tensor holds what rounding took (Kahan), 2 bytes a weight. The error of an update is at most 2^-18
                  of the weight, always in the same direction where updates are equal.

Random bits are a hash of the RNG key (seed, update, parameter) and the element's number.

Shapes: n elements of a parameter, flat; B = n / 256 blocks, rounded up.
"""
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.device import cdiv, check_served, is_triton, launch
from kernels.head.sampling import as_pairs, key_sums, mix_sums, signed

BLOCK = 256  # elements that share an absmax
_LEVELS, _ROOT_LEVELS = tl.constexpr(7), tl.constexpr(8)  # L of m and of r
_ID_MULTIPLIER, _MULTIPLIER_1, _MULTIPLIER_2 = tl.constexpr(0x9E3779B9), tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B)
_ROWS = 4  # blocks of a program


class AdamNumbers(NamedTuple):
    """The numbers of one update."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float  # of the gradient
    num_updates: int  # with this one

    def factors(self) -> tuple[float, float, float]:
        """1 - lr decay, lr / c1 and sqrt(c2)."""
        return (1 - self.lr * self.weight_decay, self.lr / (1 - self.beta1 ** self.num_updates),
                (1 - self.beta2 ** self.num_updates) ** 0.5)


class Moments8(NamedTuple):
    """Both moments in 8 bits."""

    m: torch.Tensor  # [n] uint8
    m_absmax: torch.Tensor  # [B] fp32
    root: torch.Tensor  # [n] uint8
    root_absmax: torch.Tensor  # [B] fp32


@lru_cache(maxsize=1)  # all parameters of an update together: one by one they take longer than their updates
def rng_keys(seed: int, update: int, num_parameters: int) -> list[tuple[int, int]]:
    """The RNG keys of parameters 0, 1, ...: two int32 each."""
    keys = torch.tensor([[seed, update, parameter] for parameter in range(num_parameters)])
    return [tuple(pair) for pair in as_pairs(mix_sums(key_sums(keys))).tolist()]


# ---- reference


def _grid(levels: int, device: torch.device) -> torch.Tensor:
    """y of each code, [2^levels] fp32."""
    j = torch.arange(1, 2**levels + 1, dtype=torch.float32, device=device)
    f, exponent = torch.frexp(j)
    y = torch.tensor([10.0 ** (i - levels) for i in range(levels + 1)], device=device)[exponent - 1] * (18 * f - 8)
    y[0] = 0
    return y


def _encode(y: torch.Tensor, levels: int, random: torch.Tensor) -> torch.Tensor:
    """The codes of y in [0, 1] as int32, rounded up where the fraction exceeds `random`, of 16 bits."""
    knots = torch.tensor([10.0 ** (i - levels) for i in range(1, levels)], device=y.device)
    i = torch.bucketize(y, knots, right=True)
    up = torch.tensor([10.0 ** (levels - i) for i in range(levels)], device=y.device)[i]
    step = torch.tensor([2.0**i / 9 for i in range(levels)], device=y.device)[i]
    j = ((y * up + 8) * step).clamp(min=1)
    low = j.floor()
    return (low + (j - low > (random + 0.5) * 2.0**-16)).clamp(max=2.0**levels).int() - 1


def _blocks(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


def _relative(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n] relative to its blocks' absmax [B], and the latter."""
    absmax = _blocks(x.abs()).amax(1)
    return x / _each(absmax.where(absmax > 0, 1.0), len(x)), absmax


def _each(absmax: torch.Tensor, size: int) -> torch.Tensor:
    return absmax.repeat_interleave(BLOCK)[:size]


def dequantize(moments: Moments8) -> tuple[torch.Tensor, torch.Tensor]:
    """m and r [n] fp32."""
    size, device = len(moments.m), moments.m.device
    m = _grid(_LEVELS.value, device)[(moments.m & 127).int()]
    m = torch.where(moments.m > 127, -m, m) * _each(moments.m_absmax, size)
    return m, _grid(_ROOT_LEVELS.value, device)[moments.root.int()] * _each(moments.root_absmax, size)


def quantize(m: torch.Tensor, root: torch.Tensor, random: torch.Tensor) -> Moments8:
    """random [n] int32: 16 bits for each of m and r."""
    (y, m_absmax), (z, root_absmax) = _relative(m), _relative(root)
    codes = _encode(y.abs(), _LEVELS.value, random & 0xFFFF) + 128 * (y < 0)
    roots = _encode(z, _ROOT_LEVELS.value, random >> 16 & 0xFFFF)
    return Moments8(codes.to(torch.uint8), m_absmax, torch.where(z > 0, roots.clamp(min=1), 0).to(torch.uint8), root_absmax)


def random_bits(size: int, first: int, key: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two times [size] int32 for the elements from `first` on: a hash (Wellons' lowbias32, as in kernels/head/sampling.py), and
    that mixed once more."""
    bits = torch.arange(first, first + size, dtype=torch.int32, device=device) * signed(_ID_MULTIPLIER.value) ^ key[0]
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * signed(_MULTIPLIER_1.value) + key[1]
    bits = (bits ^ (bits >> 15 & 0x1FFFF)) * signed(_MULTIPLIER_2.value)
    bits ^= bits >> 16 & 0xFFFF
    more = (bits ^ (bits >> 15 & 0x1FFFF)) * signed(_MULTIPLIER_1.value)
    return bits, more ^ (more >> 16 & 0xFFFF)


def round_bf16(x: torch.Tensor, random: torch.Tensor | None) -> torch.Tensor:
    """x [n] fp32 with the digits of bf16: to nearest, ties to even, or stochastically by the lower 16 bits of `random` [n]."""
    bits = x.view(torch.int32)
    bump = (bits >> 16 & 1) + 0x7FFF if random is None else random & 0xFFFF
    return (bits + bump & ~0xFFFF).view(torch.float32)


def adamw_reference(weight: torch.Tensor, grad: torch.Tensor, moments: Moments8 | tuple[torch.Tensor, torch.Tensor],
                    compensation: torch.Tensor | None, numbers: AdamNumbers, *, first: int, key: tuple[int, int]) -> None:
    decay, step_size, root_correction = numbers.factors()
    if not isinstance(moments, Moments8) and weight.dtype == torch.float32:
        exp_avg, exp_avg_sq = moments
        root = torch.empty_like(weight)  # the only allocation: from here on nothing can fail
        # the operations of torch.optim.AdamW in its order, so that it agrees bit for bit
        grad.mul_(numbers.scale)
        weight.mul_(decay)
        exp_avg.lerp_(grad, 1 - numbers.beta1)
        exp_avg_sq.mul_(numbers.beta2).addcmul_(grad, grad, value=1 - numbers.beta2)
        torch.sqrt(exp_avg_sq, out=root)
        weight.addcdiv_(exp_avg, root.div_(root_correction).add_(numbers.eps), value=-step_size)
        return
    g = grad.float() * numbers.scale
    m, v = moments if not isinstance(moments, Moments8) else dequantize(moments)
    v = v * v if isinstance(moments, Moments8) else v
    m = m + (g - m) * (1 - numbers.beta1)
    v = v * numbers.beta2 + g * g * (1 - numbers.beta2)
    root = v.double().sqrt().float()  # the nearest fp32 number; the root in fp32 has other last bits on some processors
    value = weight.float() if compensation is None else weight.float() + compensation.float()
    value = value * decay - m / (root * (1 / root_correction) + numbers.eps) * step_size
    random, more = random_bits(len(weight), first, key, weight.device)
    stored = quantize(m, root, more) if isinstance(moments, Moments8) else (m, v)
    rounded = value if weight.dtype == torch.float32 else round_bf16(value, random if compensation is None else None)
    rest = None if compensation is None else round_bf16(value - rounded, None)
    # everything is computed: from here on nothing can fail
    for tensor, new in zip(moments, stored):
        tensor.copy_(new)
    weight.copy_(rounded)
    if compensation is not None:
        compensation.copy_(rest)


# ---- kernel


@triton.jit
def _decode_codes(codes, LEVELS: tl.constexpr):
    bits = (codes + 1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    f = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    power = tl.zeros_like(f)
    for i in tl.static_range(LEVELS + 1):
        power = tl.where(exponent == i, 10.0 ** (i - LEVELS), power)
    return tl.where(codes == 0, 0.0, power * (f * 9 - 8))


@triton.jit
def _encode_codes(y, random, LEVELS: tl.constexpr):
    up, step = tl.full(y.shape, 10.0**LEVELS, tl.float32), tl.full(y.shape, 1 / 9, tl.float32)
    for i in tl.static_range(1, LEVELS):
        is_above = y >= 10.0 ** (i - LEVELS)
        up = tl.where(is_above, 10.0 ** (LEVELS - i), up)
        step = tl.where(is_above, 2.0**i / 9, step)
    j = tl.maximum((y * up + 8) * step, 1.0)
    low = tl.floor(j)
    above = j - low > ((random & 0xFFFF).to(tl.float32) + 0.5) * (2.0**-16)
    return tl.minimum(low + above.to(tl.float32), 2.0**LEVELS).to(tl.int32) - 1


@triton.jit
def _relative_to_absmax(x):
    absmax = tl.max(tl.abs(x), 1)
    return tl.div_rn(x, tl.where(absmax > 0, absmax, 1.0)[:, None] + tl.zeros_like(x)), absmax


@triton.jit
def _round_bits(value, bump):
    return ((value.to(tl.int32, bitcast=True) + bump) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _nearest_bf16(value):
    return _round_bits(value, ((value.to(tl.int32, bitcast=True) >> 16) & 1) + 0x7FFF)


@triton.jit(do_not_specialize=("num_elements", "first", "key_1", "key_2"))
def _adamw8_kernel(weight_ptr, grad_ptr, m_ptr, m_absmax_ptr, root_ptr, root_absmax_ptr, compensation_ptr, num_elements, first,
                   key_1, key_2, scale, beta_1, rest_1, beta_2, rest_2, eps, decay, step_size, root_factor,
                   ROUNDING: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """ROUNDING: exact (fp32 weights), stochastic or compensated."""
    blocks = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    elements = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, is_block = elements < num_elements, blocks * BLOCK < num_elements
    g = tl.load(grad_ptr + elements, mask=inside, other=0.0).to(tl.float32) * scale
    codes = tl.load(m_ptr + elements, mask=inside, other=0).to(tl.int32)
    m = _decode_codes(codes & 127, _LEVELS)
    m = tl.where(codes > 127, -m, m) * tl.load(m_absmax_ptr + blocks, mask=is_block, other=0.0)[:, None]
    root = _decode_codes(tl.load(root_ptr + elements, mask=inside, other=0).to(tl.int32), _ROOT_LEVELS)
    root = root * tl.load(root_absmax_ptr + blocks, mask=is_block, other=0.0)[:, None]
    m = m + (g - m) * rest_1
    root = tl.sqrt_rn(root * root * beta_2 + g * g * rest_2)
    value = tl.load(weight_ptr + elements, mask=inside, other=0.0).to(tl.float32)
    if ROUNDING == "compensated":
        value += tl.load(compensation_ptr + elements, mask=inside, other=0.0).to(tl.float32)
    value = value * decay - tl.div_rn(m, root * root_factor + eps) * step_size
    rounded = value
    bits = (first + elements).to(tl.uint32) * _ID_MULTIPLIER ^ key_1.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 16)) * _MULTIPLIER_1 + key_2.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 15)) * _MULTIPLIER_2
    bits = bits ^ (bits >> 16)
    more = (bits ^ (bits >> 15)) * _MULTIPLIER_1
    more = more ^ (more >> 16)
    if ROUNDING == "stochastic":
        rounded = _round_bits(value, bits.to(tl.int32, bitcast=True) & 0xFFFF)
    if ROUNDING == "compensated":
        rounded = _nearest_bf16(value)
        rest = _nearest_bf16(value - rounded)
        tl.store(compensation_ptr + elements, rest.to(compensation_ptr.dtype.element_ty), mask=inside)
    tl.store(weight_ptr + elements, rounded.to(weight_ptr.dtype.element_ty), mask=inside)
    y, absmax = _relative_to_absmax(m)
    tl.store(m_absmax_ptr + blocks, absmax, mask=is_block)
    codes = _encode_codes(tl.abs(y), more, _LEVELS) + tl.where(y < 0, 128, 0)
    tl.store(m_ptr + elements, codes.to(tl.uint8), mask=inside)
    y, absmax = _relative_to_absmax(root)
    tl.store(root_absmax_ptr + blocks, absmax, mask=is_block)
    codes = tl.where(y > 0, tl.maximum(_encode_codes(y, more >> 16, _ROOT_LEVELS), 1), 0)
    tl.store(root_ptr + elements, codes.to(tl.uint8), mask=inside)


def adamw(weight: torch.Tensor, grad: torch.Tensor, moments: Moments8 | tuple[torch.Tensor, torch.Tensor],
          compensation: torch.Tensor | None, numbers: AdamNumbers, *, first: int, key: tuple[int, int]) -> None:
    """Updates weight [n] fp32 or bf16, moments (8 bits, or m and v [n] fp32) and compensation [n] bf16 in place; overwrites grad
    [n] fp32 or bf16. All flat and contiguous; if they are a part of a parameter, it begins with element number `first`, which is
    a multiple of BLOCK. A bf16 weight without compensation is rounded stochastically, as are moments in 8 bits, by `key`.

    An error, such as one for want of memory, comes before anything is changed."""
    assert first % BLOCK == 0 and weight.ndim == 1 and weight.dtype in (torch.float32, torch.bfloat16), (first, weight.dtype)
    assert compensation is None or weight.dtype == torch.bfloat16, weight.dtype
    if not (is_triton(weight) and isinstance(moments, Moments8)):
        adamw_reference(weight, grad, moments, compensation, numbers, first=first, key=key)
        return
    check_served("adamw", {"weight": weight, "grad": grad}, dtypes=(torch.float32, torch.bfloat16), tensor_cores=False)
    (decay, step_size, root_correction), beta1, beta2 = numbers.factors(), numbers.beta1, numbers.beta2
    rounding = "exact" if weight.dtype == torch.float32 else "stochastic" if compensation is None else "compensated"
    launch(_adamw8_kernel, (cdiv(len(weight), BLOCK * _ROWS),), weight, grad, *moments, compensation, len(weight), first,
           *key, numbers.scale, beta1, 1 - beta1, beta2, 1 - beta2, numbers.eps, decay, step_size,
           1 / root_correction, ROUNDING=rounding, BLOCK=BLOCK, ROWS=_ROWS, num_warps=4, enable_fp_fusion=False)
