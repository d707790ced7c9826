"""The rotation kernel: in the interpreter against goldens and float64, ahead of time for every GPU, and on a GPU."""


import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for, half
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.rope import _rope_kernel, rotate_

GOLDEN = load_file(FIXTURES / "kernels.safetensors")


def normal(*shape, seed=0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def tables(num_tokens, half, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(num_tokens).unsqueeze(1) * 0.7 ** torch.arange(half)
    return (1.3 * angles.cos()).to(device), (1.3 * angles.sin()).to(device)


def rotate_plain(x, cos, sin):
    """Complex numbers x1 + i x2 times cos + i sin, in float64."""
    x1, x2 = x.double().chunk(2, dim=-1)
    turned = torch.complex(x1, x2) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def rotated(q, k, cos, sin, *, backward=False) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = q.clone(), k.clone()
    rotate_(q, k, cos, sin, backward=backward)
    return q, k


@pytest.mark.interpreter
def test_output_and_gradient_match_the_golden_ones():
    cos, sin = GOLDEN["rope.cos"], GOLDEN["rope.sin"]
    for name, result, backward in (("x", "y", False), ("do", "dx", True)):
        given = GOLDEN[f"rope.{name}"].float().contiguous()
        for ours in rotated(given, given, cos, sin, backward=backward):
            torch.testing.assert_close(ours, GOLDEN[f"rope.{result}"], rtol=1e-6, atol=2e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("num_tokens, num_q, num_k, width", [(1, 1, 1, 2), (5, 6, 2, 16), (3, 3, 3, 10), (2, 8, 1, 64)])
def test_queries_and_keys_turn_together_and_gradients_turn_back(num_tokens, num_q, num_k, width):
    q, k = normal(num_tokens, num_q, width), normal(num_tokens, num_k, width, seed=1)
    cos, sin = tables(num_tokens, width // 2)
    for backward, sign in ((False, 1), (True, -1)):
        for x, y in zip((q, k), rotated(q, k, cos, sin, backward=backward)):
            torch.testing.assert_close(y.double(), rotate_plain(x, cos, sign * sin), rtol=1e-6, atol=2e-6)


@pytest.mark.interpreter
def test_slices_of_a_fused_projection_turn_in_place_and_the_rest_stays():
    fused = normal(4, (6 + 2 + 2) * 8)
    before = fused.clone()
    q, k, v = (part.unflatten(1, (-1, 8)) for part in fused.split([48, 16, 16], dim=1))
    cos, sin = tables(4, 4)
    expected = rotated(q.contiguous(), k.contiguous(), cos, sin)
    rotate_(q, k, cos, sin, backward=False)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1]) and torch.equal(fused[:, 64:], before[:, 64:])
    rotate_(q[:0], k[:0], cos[:0], sin[:0], backward=False)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernel_fits_every_gpu(arch):
    signature = {"q_ptr": half(arch), "k_ptr": half(arch), "cos_ptr": "*fp32", "sin_ptr": "*fp32", "stride_q": "i32",
                 "stride_k": "i32"}
    sizes = {"NUM_Q": 64, "NUM_K": 8, "HALF": 32, "BLOCK_Q": 64, "BLOCK_K": 8, "BLOCK_HALF": 32, "BACKWARD": True}
    check_fits(compile_for(_rope_kernel, signature, sizes, arch, num_warps=4, num_stages=3), arch)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens, num_q, num_k, width", [(1, 64, 8, 64), (8191, 64, 8, 64), (63, 5, 3, 32)])
def test_bf16_errors_stay_within_twice_those_of_eager_bf16(num_tokens, num_q, num_k, width):
    q, k = (
        normal(num_tokens, heads, width, seed=heads, dtype=torch.bfloat16, device="cuda") for heads in (num_q, num_k)
    )
    cos, sin = tables(num_tokens, width // 2, "cuda")

    def eager(x, sin):
        x1, x2 = x.chunk(2, dim=-1)
        c, s = cos.bfloat16()[:, None], sin.bfloat16()[:, None]
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)

    for backward, sign in ((False, 1), (True, -1)):
        ours = rotated(q, k, cos, sin, backward=backward)
        for x, y in zip((q, k), ours):
            exact = rotate_plain(x, cos, sign * sin)
            assert (y.double() - exact).norm() <= 2 * (eager(x, sign * sin).double() - exact).norm()
        assert all(map(torch.equal, rotated(q, k, cos, sin, backward=backward), ours))
