"""The rotation kernel: in the interpreter against goldens and float64, ahead of time for every GPU, and on a GPU."""


import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for, half
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.rope import _rope_kernel, rope, rope_qk

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


def gradient_plain(grad, cos, sin):
    return rotate_plain(grad, cos, -sin)


@pytest.mark.interpreter
def test_output_and_gradient_match_the_golden_ones(poisoned):
    x = GOLDEN["rope.x"].float().requires_grad_()
    y = rope(x, GOLDEN["rope.cos"], GOLDEN["rope.sin"])
    y.backward(GOLDEN["rope.do"].float())
    torch.testing.assert_close(y, GOLDEN["rope.y"], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(x.grad, GOLDEN["rope.dx"], rtol=1e-6, atol=2e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("num_tokens, num_q, num_k, width", [(1, 1, 1, 2), (5, 6, 2, 16), (3, 3, 3, 10), (2, 8, 1, 64)])
def test_queries_and_keys_turn_together_and_gradients_turn_back(num_tokens, num_q, num_k, width, poisoned):
    q, k = normal(num_tokens, num_q, width).requires_grad_(), normal(num_tokens, num_k, width, seed=1).requires_grad_()
    grads = [normal(num_tokens, num_q, width, seed=2), normal(num_tokens, num_k, width, seed=3)]
    cos, sin = tables(num_tokens, width // 2)
    rotated = rope_qk(q, k, cos, sin)
    torch.autograd.backward(rotated, grads)
    for x, y, grad in zip((q, k), rotated, grads):
        torch.testing.assert_close(y.double(), rotate_plain(x.detach(), cos, sin), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(x.grad.double(), gradient_plain(grad, cos, sin), rtol=1e-6, atol=2e-6)


@pytest.mark.interpreter
def test_slices_of_a_fused_projection_and_strided_views(poisoned):
    fused = normal(4, (6 + 2 + 2) * 8)
    q, k, _ = fused.split([48, 16, 16], dim=1)
    q, k = q.unflatten(1, (6, 8)), k.unflatten(1, (2, 8))
    cos, sin = tables(4, 4)
    expected = rope(q.contiguous(), cos, sin), rope(k.contiguous(), cos, sin)
    assert all(map(torch.equal, rope_qk(q, k, cos, sin), expected))
    strided = q.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(rope(strided, cos, sin), expected[0])
    assert rope(q[:0], cos[:0], sin[:0]).shape == (0, 6, 8)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernel_fits_every_gpu(arch):
    signature = {f"stride_{name}_{axis}": "i32" for name in "qk" for axis in ("token", "head", "out")}
    signature |= {name: half(arch) for name in ("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr")} | {
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
    }
    sizes = {"NUM_Q": 64, "NUM_K": 8, "HALF": 32, "BLOCK_Q": 64, "BLOCK_K": 8, "BLOCK_HALF": 32, "BACKWARD": True}
    check_fits(compile_for(_rope_kernel, signature, sizes, arch, num_warps=4, num_stages=3), arch)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens, num_q, num_k, width", [(1, 64, 8, 64), (8191, 64, 8, 64), (63, 5, 3, 32)])
def test_bf16_errors_stay_within_twice_those_of_eager_bf16(num_tokens, num_q, num_k, width, poisoned):
    q, k = (
        normal(num_tokens, heads, width, seed=heads, dtype=torch.bfloat16, device="cuda") for heads in (num_q, num_k)
    )
    cos, sin = tables(num_tokens, width // 2, "cuda")

    def eager(x, sin):
        x1, x2 = x.chunk(2, dim=-1)
        c, s = cos.bfloat16()[:, None], sin.bfloat16()[:, None]
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)

    leaves = [x.clone().requires_grad_() for x in (q, k)]
    rotated = rope_qk(*leaves, cos, sin)
    torch.autograd.backward(rotated, [q.flip(0), k.flip(0)])
    for x, y, leaf in zip((q, k), rotated, leaves):
        exact, exact_grad = rotate_plain(x, cos, sin), gradient_plain(x.flip(0), cos, sin)
        assert (y.double() - exact).norm() <= 2 * (eager(x, sin).double() - exact).norm()
        assert (leaf.grad.double() - exact_grad).norm() <= 2 * (eager(x.flip(0), -sin).double() - exact_grad).norm()
    assert all(map(torch.equal, rope_qk(q, k, cos, sin), rotated))
    assert torch.equal(rope(q, cos, sin), rotated[0])
