"""Draws follow the distribution they claim, and their noise is a sound pure function of the key."""

import math

import pytest
import torch

from grpo.config import EvalConfig, RolloutConfig
from grpo.rollout.sampling import Draw, SamplingParams, draw, greedy, gumbel_noise
from kernels.head.sampling import draw_tokens_reference
from models.draw_key import mix_keys

M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def lists(kept):
    return [ids.tolist() for ids in kept]


def make_keys(num_rows, *, seed=0, step=0, prompt=0, sample=0, position=0):
    """[num_rows, 5]; give a tensor or a number for each column."""
    keys = torch.zeros(num_rows, 5, dtype=torch.int64)
    for column, value in enumerate((seed, step, prompt, sample, position)):
        keys[:, column] = value
    return keys


def chi_square_p_value(counts, probs):
    """Upper tail of the chi-square statistic of observed counts against expected probabilities."""
    expected = probs.double() * counts.sum()
    statistic = ((counts.double() - expected) ** 2 / expected).sum()
    half_freedom = torch.tensor((len(probs) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half_freedom, statistic / 2).item()


def uniforms(keys, vocab_size):
    """The uniform numbers behind the noise: exp(-exp(-g))."""
    return torch.exp(-torch.exp(-gumbel_noise(keys, vocab_size).double()))


def python_noise(key, vocab_id):
    """The documented hash in Python integers and float64."""
    multipliers = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xABC98388FB8FAC03, 0x8CB92BA72F3D8DD7, 0xF1357AEA2E62A9C5)
    word = sum(k * m for k, m in zip(key, multipliers, strict=True)) & M64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & M64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & M64
    word ^= word >> 31
    bits = ((vocab_id * 0x9E3779B9) & M32) ^ (word & M32)
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D + (word >> 32)) & M32
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & M32
    bits ^= (bits >> 16) ^ (0xFFFF0000 if bits >> 31 else 0)
    w = min(((bits & 0x7FFFFFFF) + 0.5) / 2**31, 1 - 2.0**-24)
    return -math.log(-math.log1p(-w))


def test_noise_equals_the_documented_hash_in_python_integers():
    keys = torch.tensor([[0, 0, 0, 0, 0], [1, 2, 3, 4, 5], [2**40, 100000, 7, 63, 131071], [-3, 5, -1, 2, 9]])
    noise = gumbel_noise(keys, 77)
    expected = torch.tensor([[python_noise(key, v) for v in range(77)] for key in keys.tolist()])
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("column", range(5))
def test_noise_is_uniform_and_independent_along_every_key_column(column):
    keys = make_keys(4096, seed=3, step=11, prompt=5, sample=2, position=70)
    keys[:, column] = torch.arange(4096)
    u = uniforms(keys, 64)
    flat = torch.full((64,), 1 / 64)
    assert chi_square_p_value((u.flatten() * 64).long().bincount(minlength=64), flat) > 1e-3
    # Pairs (u, neighbour) on an 8 x 8 grid: neighbours along the column, along the vocabulary, and both.
    for left, right in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:]), (u[:-1, :-1], u[1:, 1:]), (u[:-1, 1:], u[1:, :-1])):
        cells = (left * 8).long() * 8 + (right * 8).long()
        assert chi_square_p_value(cells.flatten().bincount(minlength=64), flat) > 1e-3
    # Every id on its own, so that no id is favoured: 64 tests, hence the lower bound.
    for v in range(64):
        assert chi_square_p_value((u[:, v] * 16).long().bincount(minlength=16), torch.full((16,), 1 / 16)) > 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kernels_reference_has_the_same_draws(temperature):
    keys = make_keys(40, seed=-5, step=2**40, prompt=torch.arange(40) % 3, sample=7, position=torch.arange(40))
    rng_keys = mix_keys(keys)
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0)) * 4
    tokens = draw(logits, keys, temperature=temperature).tokens
    assert torch.equal(draw_tokens_reference(logits, rng_keys, temperature), tokens) and len(tokens.unique()) > 20


def test_rows_whose_keys_swap_two_columns_get_different_noise():
    a = gumbel_noise(make_keys(1, prompt=3, sample=4), 1000)
    b = gumbel_noise(make_keys(1, prompt=4, sample=3), 1000)
    assert (a == b).sum() == 0


def test_noise_has_the_mean_and_variance_of_a_gumbel_distribution():
    noise = gumbel_noise(make_keys(50, position=torch.arange(50)), 20_000).double()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=5e-3)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=2e-2)
    # The tail decides the draws: P(g > 8) = 1 - exp(-exp(-8)), 335.4 of a million (standard deviation 18.3).
    assert abs((noise > 8).sum().item() - 335.4) < 4 * 18.3
    assert noise.isfinite().all()


def test_winner_of_a_large_flat_vocabulary_is_uniform():
    keys = make_keys(800, position=torch.arange(800))
    tokens = draw(torch.zeros(800, 20_000), keys, temperature=1.0).tokens
    assert chi_square_p_value((tokens // 1000).bincount(minlength=20), torch.full((20,), 1 / 20)) > 1e-3
    assert len(tokens.unique()) > 750  # 800 of 20,000 drawn evenly: 784 distinct on average


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_draws_follow_the_tempered_softmax(temperature):
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, -2.0, 0.3])
    probs = torch.tensor([math.exp(x / temperature) for x in logits.tolist()], dtype=torch.float64)
    probs /= probs.sum()
    keys = make_keys(20_000, seed=1, sample=torch.arange(20_000) % 16, position=torch.arange(20_000) // 16)
    result = draw(logits.expand(20_000, 7), keys, temperature=temperature)
    assert chi_square_p_value(result.tokens.bincount(minlength=7), probs) > 1e-3
    torch.testing.assert_close(result.log_probs.double(), probs.log()[result.tokens], rtol=0, atol=1e-6)
    assert result.kept is None


# Probabilities 0.4, 0.3, 0.15, 0.1, 0.05 at ids 3, 0, 4, 1, 2.
PROBS = [0.3, 0.1, 0.05, 0.4, 0.15]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [0, 3]),
        ({"top_k": 1}, [3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.65}, [0, 3]),  # 0.4 < 0.65 <= 0.4 + 0.3
        ({"top_p": 0.75}, [0, 3, 4]),  # 0.7 < 0.75 <= 0.85
        ({"top_p": 0.01}, [3]),
        ({"min_p": 0.3}, [0, 3, 4]),  # at least 0.12
        ({"min_p": 0.9}, [3]),
        ({"top_k": 3, "top_p": 0.81}, [0, 3]),  # top-k renormalises: 0.4 / 0.85 + 0.3 / 0.85 = 0.82 (0.7 without)
        ({"top_p": 0.75, "min_p": 0.5}, [0, 3]),  # min-p: at least 0.2
        ({"top_p": 0.98, "min_p": 0.2}, [0, 1, 3, 4]),
        # In vLLM's order min-p would leave 0.4, 0.3, 0.15 and 0.7 / 0.85 = 0.82 would end top-p at two tokens.
        ({"top_p": 0.8, "min_p": 0.3}, [0, 3, 4]),
    ],
)
def test_filters_keep_the_sets_computed_by_hand_and_draws_follow_them(settings, kept):
    logits = torch.tensor(PROBS).log() + 3.0
    result = draw(logits.expand(5000, 5), make_keys(5000, position=torch.arange(5000)), temperature=1.0, **settings)
    mass = sum(PROBS[i] for i in kept)
    probs = torch.tensor([PROBS[i] / mass if i in kept else 0.0 for i in range(5)], dtype=torch.float64)
    assert lists(result.kept) == [kept] * 5000
    counts = result.tokens.bincount(minlength=5)
    assert counts[[i for i in range(5) if i not in kept]].sum() == 0
    if len(kept) > 1:
        assert chi_square_p_value(counts[kept], probs[kept]) > 1e-3
    torch.testing.assert_close(result.log_probs.double(), probs.log()[result.tokens], rtol=0, atol=1e-6)


def test_filters_act_on_the_tempered_distribution():
    # At temperature 0.5 the probabilities are the squares: 0.16 of 0.285 = 0.561, then 0.09 of 0.285 = 0.316.
    result = draw(torch.tensor([PROBS]).log(), make_keys(1), temperature=0.5, top_p=0.6)
    assert lists(result.kept) == [[0, 3]]
    assert lists(draw(torch.tensor([PROBS]).log(), make_keys(1), temperature=0.5, top_p=0.55).kept) == [[3]]


def test_each_row_gets_its_own_kept_set():
    logits = torch.tensor([[0.0, 5.0, 0.0, 0.0], [9.0, 0.0, 9.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    assert lists(draw(logits, make_keys(3), temperature=1.0, top_p=0.6).kept) == [[1], [0, 2], [3]]


def test_ties_with_the_kth_logit_are_kept_and_top_p_orders_ties_by_id():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert lists(draw(logits, make_keys(1), temperature=1.0, top_k=2).kept) == [[0, 1, 2]]
    assert lists(draw(torch.zeros(1, 8), make_keys(1), temperature=1.0, top_p=0.3).kept) == [[0, 1, 2]]


def test_masked_logits_are_never_drawn_nor_kept():
    logits = torch.tensor([0.0, -math.inf, 1.0, -math.inf]).expand(500, 4)
    keys = make_keys(500, position=torch.arange(500))
    assert set(draw(logits, keys, temperature=1.0).tokens.tolist()) == {0, 2}
    assert lists(draw(logits, keys, temperature=1.0, top_p=0.9999999).kept) == [[0, 2]] * 500


def test_a_draw_does_not_depend_on_the_other_rows_or_on_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(33, 50, generator=generator) * 3
    keys = make_keys(33, prompt=torch.arange(33) % 4, sample=torch.arange(33) // 4, position=9)
    together = draw(logits, keys, temperature=0.8, top_p=0.9)
    order = torch.randperm(33, generator=generator)
    shuffled = draw(logits[order], keys[order], temperature=0.8, top_p=0.9)
    assert torch.equal(shuffled.tokens, together.tokens[order])
    assert torch.equal(shuffled.log_probs, together.log_probs[order])
    monkeypatch.setattr("grpo.rollout.sampling._MAX_BLOCK_ELEMENTS", 200)
    in_blocks = draw(logits, keys, temperature=0.8, top_p=0.9)
    assert torch.equal(in_blocks.tokens, together.tokens)
    assert torch.equal(in_blocks.log_probs, together.log_probs)
    assert lists(in_blocks.kept) == lists(together.kept)


def test_every_key_column_changes_the_draws():
    logits = torch.zeros(64, 1000)
    base = draw(logits, make_keys(64, position=torch.arange(64)), temperature=1.0).tokens
    for name in ("seed", "step", "prompt", "sample"):
        other = draw(logits, make_keys(64, **{name: 1}, position=torch.arange(64)), temperature=1.0).tokens
        assert (other == base).sum() <= 2  # 0.064 expected by chance


def test_greedy_takes_the_largest_logit_with_its_log_prob_at_temperature_one():
    result = greedy(torch.tensor([PROBS, [0.2, 0.2, 0.2, 0.2, 0.2]]).log() - 7.0)
    assert result.tokens.tolist() == [3, 0]
    assert result.log_probs.tolist() == pytest.approx([math.log(0.4), math.log(0.2)], abs=1e-6)
    assert result.kept is None


def test_kept_ids_split_into_rows_by_count_and_can_be_empty_lists_between_others():
    result = Draw(torch.zeros(3), torch.zeros(3), torch.tensor([4, 5, 6]), torch.tensor([2, 0, 1]))
    assert lists(result.kept) == [[4, 5], [], [6]]


@pytest.mark.parametrize("name, value", [("max_new_tokens", 0), ("max_new_tokens", 2.0),
                                         ("max_new_tokens", True), ("temperature", 0.0), ("temperature", math.inf), ("top_k", -1),
                                         ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.0)])
def test_a_parameter_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        SamplingParams(**({"max_new_tokens": 1} | {name: value}))


def test_evaluations_of_a_run_take_the_rollouts_parameters_where_they_set_none():
    rollout = RolloutConfig(max_new_tokens=9, temperature=0.9, top_k=5, top_p=0.8, min_p=0.1)
    evaluation = EvalConfig(temperature=0.6, top_k=0, min_p=0.2)
    assert SamplingParams.of(rollout) == SamplingParams(max_new_tokens=9, temperature=0.9, top_k=5, top_p=0.8, min_p=0.1)
    assert SamplingParams.of(rollout, evaluation) == SamplingParams(max_new_tokens=9, temperature=0.6, top_p=0.8, min_p=0.2)
