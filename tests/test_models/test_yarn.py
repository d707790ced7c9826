"""YaRN tables against the three golden ones: float64, transformers and OpenAI's code in fp32."""

import math
from dataclasses import replace

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from models.config import GptOssConfig, YarnScaling
from models.yarn import concentration, cos_sin, inverse_frequencies

GOLDEN = load_file(FIXTURES / "kernels.safetensors")
POSITIONS = GOLDEN["rope.positions"]
# the published models' head width
CONFIG = GptOssConfig.from_architecture({
    "vocab_size": 8, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64, "num_local_experts": 1, "num_experts_per_tok": 1, "sliding_window": 8})


def exact_frequencies(scaling: YarnScaling, *, dim: int, theta: float) -> list[float]:
    """The ramp in Python's float64, one pair at a time (YaRN paper, section 3.2)."""
    ends = [dim / 2 * math.log(scaling.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta)
            for turns in (scaling.beta_fast, scaling.beta_slow)]
    if scaling.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], dim - 1)
    frequencies = []
    for pair in range(dim // 2):
        base = theta ** (-2 * pair / dim)
        keep = 1 - min(max((pair - low) / (high - low), 0.0), 1.0)
        frequencies.append(keep * base + (1 - keep) * base / scaling.factor)
    return frequencies


def test_frequencies_match_all_three_golden_tables():
    ours = inverse_frequencies(CONFIG)
    assert ours.dtype == torch.float32
    # a few last bits: processors differ in their powers
    for name in ("hf_inv_freq_f32", "official_inv_freq_f32", "inv_freq_f64"):
        torch.testing.assert_close(ours.double(), GOLDEN[f"rope.{name}"].double(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", ["hf", "official"])
def test_tables_equal_those_of_transformers_and_openai(name):
    cos, sin = cos_sin(POSITIONS, GOLDEN[f"rope.{name}_inv_freq_f32"], concentration(CONFIG))
    torch.testing.assert_close(cos, GOLDEN[f"rope.{name}_cos_f32"], rtol=0, atol=5e-7)
    torch.testing.assert_close(sin, GOLDEN[f"rope.{name}_sin_f32"], rtol=0, atol=5e-7)


def test_tables_follow_the_float64_ones_up_to_fp32_angles():
    cos, sin = cos_sin(POSITIONS, inverse_frequencies(CONFIG), concentration(CONFIG))
    # an angle has an error of position * 2^-24 or so
    tolerance = (1.35 * 3e-7 * POSITIONS.double() + 1e-6)[:, None]
    for ours, name in ((cos, "cos"), (sin, "sin")):
        assert ((ours.double() - GOLDEN[f"rope.{name}"].double()).abs() <= tolerance).all()
    near = POSITIONS < 4096
    assert (cos - GOLDEN["rope.cos"])[near].abs().max() < 5e-4


def test_the_concentration_grows_with_the_logarithm_of_the_factor():
    assert concentration(CONFIG) == pytest.approx(1.3465735902799727, abs=1e-15)
    assert concentration(CONFIG) == pytest.approx(GOLDEN["rope.concentration_f64"].item(), abs=1e-15)
    assert concentration(replace(CONFIG, rope_scaling=YarnScaling(factor=1.0))) == 1.0
    cos, sin = cos_sin(torch.tensor([0]), torch.ones(1), 1.5)
    assert cos.item() == 1.5 and sin.item() == 0.0


@pytest.mark.parametrize("scaling, dim, theta", [
    (YarnScaling(truncate=True), 64, 150000.0),
    (YarnScaling(truncate=False), 16, 150000.0),
    (YarnScaling(factor=4.0, beta_fast=8.0, beta_slow=2.0, original_max_position_embeddings=512), 32, 10000.0),
    (YarnScaling(original_max_position_embeddings=64), 16, 10000.0),  # the ramp starts below pair 0
])
def test_frequencies_follow_the_settings(scaling, dim, theta):
    config = replace(CONFIG, head_dim=dim, rope_theta=theta, rope_scaling=scaling)
    expected = torch.tensor(exact_frequencies(scaling, dim=dim, theta=theta), dtype=torch.float64)
    torch.testing.assert_close(inverse_frequencies(config).double(), expected, rtol=3e-6, atol=0)


def test_truncating_the_ramp_changes_frequencies():
    rounded = inverse_frequencies(replace(CONFIG, rope_scaling=YarnScaling(truncate=True)))
    change = (rounded / inverse_frequencies(CONFIG) - 1).abs()
    assert change.max() > 0.5 and (change > 1e-3).nonzero().flatten().tolist() == list(range(9, 18))
