"""The rotation against float64 goldens, forward and gradient."""

import math

import torch
from paths import FIXTURES
from safetensors.torch import load_file

from kernels.rope import rope_reference

GOLDEN = load_file(FIXTURES / "kernels.safetensors")


def test_output_and_gradient_match_the_golden_ones():
    x = GOLDEN["rope.x"].float().requires_grad_()
    y = rope_reference(x, GOLDEN["rope.cos"], GOLDEN["rope.sin"])
    y.backward(GOLDEN["rope.do"].float())
    torch.testing.assert_close(y, GOLDEN["rope.y"], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(x.grad, GOLDEN["rope.dx"], rtol=1e-6, atol=2e-6)


def test_pairs_are_a_half_apart_and_turn_counterclockwise():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4)  # pairs (1, 3) and (2, 4)
    angle = torch.tensor([[math.pi / 2, math.pi]])
    y = rope_reference(x, angle.cos(), angle.sin())
    torch.testing.assert_close(y.flatten(), torch.tensor([-3.0, -2.0, 1.0, -4.0]), rtol=0, atol=1e-6)


def test_products_depend_on_the_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 8, generator=generator).expand(6, 1, 8) for _ in range(2))
    angle = torch.arange(6.0).unsqueeze(1) * torch.tensor([1.0, 0.3, 0.1, 0.01])
    q, k = (rope_reference(x, angle.cos(), angle.sin()).squeeze(1) for x in (q, k))
    scores = q @ k.T
    for offset in range(-5, 6):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert abs(scores[2, 0] - scores[0, 2]) > 0.1  # ahead is not behind


def test_bf16_rotates_in_fp32_and_rounds_once():
    y = rope_reference(GOLDEN["rope.x"], GOLDEN["rope.cos"], GOLDEN["rope.sin"])
    assert y.dtype == torch.bfloat16
    x1, x2 = GOLDEN["rope.x"].double().chunk(2, dim=-1)
    cos, sin = GOLDEN["rope.cos"].double()[:, None], GOLDEN["rope.sin"].double()[:, None]
    exact = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    # half a step of 8 significant bits
    assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()


def test_a_strided_view_gives_the_same_bits():
    x = GOLDEN["rope.x"].float()
    strided = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not strided.is_contiguous()
    assert torch.equal(rope_reference(strided, GOLDEN["rope.cos"], GOLDEN["rope.sin"]),
                       rope_reference(x, GOLDEN["rope.cos"], GOLDEN["rope.sin"]))
