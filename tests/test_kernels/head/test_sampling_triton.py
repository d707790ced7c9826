"""The draw's kernels: in the interpreter against grpo/rollout/sampling.py, ahead of time for every GPU, and on a GPU.

Statistics of draws are tested in tests/test_grpo/rollout/test_sampling.py, where the noise is compared to the reference's too."""

import math
import re

import numpy as np
import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for

from grpo.rollout.sampling import draw, gumbel_noise
from kernels.head.sampling import (
    _CHUNK,
    _THREADS,
    _chunk_kernel,
    _row_kernel,
    draw_tokens,
    draw_tokens_reference,
    gumbel_noise_reference,
)
from models.draw_key import mix_keys as make_rng_keys

CHUNK = _CHUNK["interpreter"]


def make_keys(num_rows, device="cpu") -> torch.Tensor:
    keys = torch.tensor([[-3, 2**40, 5, 2, 70]], device=device).repeat(num_rows, 1)
    keys[:, 4] += torch.arange(num_rows, device=device)
    return keys


def normal(*shape, scale=1.0, seed=0, device="cpu") -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_equal_but_for_near_ties(tokens, logits, keys, temperature) -> None:
    """The tokens are those that grpo.rollout.sampling draws, or score within 1e-5 of them in a few rows."""
    expected = draw(logits, keys, temperature=temperature).tokens
    assert tokens.dtype == torch.int64 and tokens.shape == expected.shape
    rows = (tokens != expected).nonzero().squeeze(1)
    assert len(rows) <= 2, (tokens[rows], expected[rows])
    for row in rows.tolist():
        scores = logits[row].double() / temperature + gumbel_noise(keys[row : row + 1], logits.shape[1])[0]
        gap = scores[expected[row]] - scores[tokens[row]]
        assert abs(gap) <= 1e-5, (row, tokens[row], expected[row], gap)


def noise_pairs(keys, vocab_size) -> list[tuple[int, int, int]]:
    """(row, lower id, higher id) of equal noise below -0.7, where it is equal only if w is, whoever takes the logarithms."""
    found = []
    for row, noise in enumerate(gumbel_noise(keys, vocab_size)):
        ordered, ids = noise.sort(stable=True)
        at = ((ordered[1:] == ordered[:-1]) & (ordered[1:] < -0.7)).nonzero().squeeze(1)
        found += [(row, int(ids[i]), int(ids[i + 1])) for i in at.tolist()]
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("vocab_size", [1, 127, CHUNK, CHUNK + 1, 5000])
def test_tokens_are_those_that_torch_draws(vocab_size, temperature, poisoned):
    keys, logits = make_keys(24), normal(24, vocab_size, scale=3.0) + 20
    tokens = draw_tokens(logits, make_rng_keys(keys), temperature=temperature)
    assert_equal_but_for_near_ties(tokens, logits, keys, temperature)
    assert vocab_size == 1 or len(tokens.unique()) > 5


@pytest.mark.interpreter
def test_large_logits_round_as_those_of_torch_relative_to_the_largest(poisoned):
    # at 30,000 a float's step is 1/512: noise added to it would tie half of the rows, and the lowest id would win
    keys, logits = make_keys(64), torch.full((64, 700), 30_000.0)
    tokens = draw_tokens(logits, make_rng_keys(keys), temperature=1.0)
    assert torch.equal(tokens, draw(logits, keys, temperature=1.0).tokens)


@pytest.mark.interpreter
def test_of_equal_scores_the_lowest_id_wins_within_a_chunk_and_across(poisoned):
    keys = make_keys(400)
    pairs = noise_pairs(keys, 5000)
    within = [pair for pair in pairs if pair[1] // CHUNK == pair[2] // CHUNK]
    across = [pair for pair in pairs if pair[1] // CHUNK != pair[2] // CHUNK]
    assert len(within) >= 2 and len(across) >= 8
    chosen = within[:4] + across[:8]
    logits = torch.full((len(chosen), 5000), -math.inf)
    for place, (_, low, high) in enumerate(chosen):
        logits[place, [low, high]] = 1.5
    rng_keys = make_rng_keys(keys[[row for row, _, _ in chosen]])
    assert draw_tokens(logits, rng_keys, temperature=1.0).tolist() == [low for _, low, _ in chosen]


@pytest.mark.interpreter
def test_masked_logits_are_never_drawn_even_where_whole_chunks_are_masked(poisoned):
    keys, logits = make_keys(24), torch.full((24, 4 * CHUNK - 5), -math.inf)
    logits[:, 2 * CHUNK + 3 : 2 * CHUNK + 40 : 2] = normal(24, 19)
    tokens = draw_tokens(logits, make_rng_keys(keys), temperature=1.0)
    assert torch.equal(tokens, draw(logits, keys, temperature=1.0).tokens)
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    logits[:, -1] = 3.0e38  # far above the rest, in a chunk after theirs
    assert (draw_tokens(logits, make_rng_keys(keys), temperature=1.0) == logits.shape[1] - 1).all()


def winners_by_scoring_every_id(logits, rng_keys, temperature) -> list[int]:
    """Tokens of logits [B, CHUNK], one chunk, with the interpreter's arithmetic but without bounds."""
    first, second = (column[:, None] for column in rng_keys.numpy().view(np.uint32).T)
    bits = (np.arange(logits.shape[1]) * 0x9E3779B9 % 2**32).astype(np.uint32) ^ first
    bits = (bits ^ bits >> np.uint32(16)) * np.uint32(0x7FEB352D) + second
    bits = ((bits ^ bits >> np.uint32(15)) * np.uint32(0x846CA68B)).view(np.int32)
    h = (bits ^ bits >> 16) & 0x7FFFFFFF
    w = np.minimum((h.astype(np.float32) + np.float32(0.5)) * np.float32(2**-31), np.float32(1 - 2**-24))
    s = logits.numpy() * (np.float32(1) / np.float32(temperature))
    with np.errstate(all="ignore"):
        rest = 1 - w
        log1p = np.where(rest == 1, w, np.log(rest) * (w / np.where(rest == 1, np.float32(1), rest - 1)))
        largest = np.where(np.isnan(s), -np.inf, s).max(axis=1, keepdims=True)
        scores = s - np.where(largest == -np.inf, np.float32(0), largest) - np.log(log1p)
    assert scores.dtype == np.float32
    return np.where(np.isnan(scores), np.inf, scores).argmax(axis=1).tolist()


def rows_to_prune() -> torch.Tensor:
    """[42, CHUNK]: logits that are equal, flat, peaked, tied, large and mostly masked."""
    logits = normal(42, CHUNK)
    for start, scale in ((0, 0.0), (6, 0.5), (12, 3.0), (18, 10.0)):
        logits[start : start + 6] *= scale
    logits[24:30] = (2 * logits[24:30]).round()
    logits[30:36] += 30_000.0
    logits[36:42][normal(6, CHUNK, seed=1) < 1.5] = -math.inf
    return logits


@pytest.mark.interpreter
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ids_without_exact_noise_could_not_have_won(temperature, poisoned):
    logits, rng_keys = rows_to_prune(), make_rng_keys(make_keys(42))
    tokens = draw_tokens(logits, rng_keys, temperature=temperature)
    assert tokens.tolist() == winners_by_scoring_every_id(logits, rng_keys, temperature)


@pytest.mark.interpreter
def test_an_id_wins_that_does_not_have_the_highest_bound_of_its_thread(poisoned):
    keys, logits = make_keys(500), torch.full((500, CHUNK), -40.0)
    logits[:, :4] = 0.5 * normal(500, 4)  # ids of one thread
    noise = gumbel_noise(keys, 4).double()
    w = -torch.expm1(-torch.exp(-noise))
    rows = ((logits[:, :4] - w.log()).argmax(1) != (logits[:, :4] + noise).argmax(1)).nonzero().squeeze(1)
    assert len(rows) >= 8
    rows = rows[:16]
    rng_keys = make_rng_keys(keys[rows])
    tokens = draw_tokens(logits[rows], rng_keys, temperature=1.0)
    assert tokens.tolist() == winners_by_scoring_every_id(logits[rows], rng_keys, 1.0)


@pytest.mark.interpreter
def test_an_id_whose_score_is_just_below_its_bound_wins_though_another_of_its_thread_is_scored_first(poisoned):
    """Id 1 wins by 1e-4. With h = 20,000 its score is 3e-5 below its bound; that of id 0 is 0.1 or more below a higher one."""
    h, rows = 20_000, []
    for first in range(1000, 1064):
        mixed = h * pow(0x846CA68B, -1, 2**32) % 2**32  # makes the hash of id 1 h, step by step backwards
        mixed ^= mixed >> 15 ^ mixed >> 30
        bits = 0x9E3779B9 ^ first
        second = (mixed - (bits ^ bits >> 16) * 0x7FEB352D) % 2**32
        rows.append([first, second - (second >> 31 << 32)])
    rng_keys = torch.tensor(rows, dtype=torch.int32)
    noise = gumbel_noise_reference(rng_keys, 2).double()
    assert (noise[:, 1] - math.log(2**31 / (h + 0.5))).abs().max() < 2e-5
    rng_keys, noise = (tensor[(noise[:, 0] > -0.9) & (noise[:, 0] < 1.6)] for tensor in (rng_keys, noise))  # w is 0.2 to 0.9
    assert len(noise) >= 32
    logits = torch.full((len(noise), CHUNK), -40.0)
    logits[:, 0], logits[:, 1] = (noise[:, 1] - noise[:, 0] - 1e-4).float(), 0.0
    assert (draw_tokens(logits, rng_keys, temperature=1.0) == 1).all()


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
def test_the_lowest_hash_has_no_finite_bound_but_wins_by_its_score_alone(poisoned):
    first, inf, lowest = 0x1234567, math.inf, 1  # of thread 0, as ids 0, 2, 3 and 64
    bits = lowest * 0x9E3779B9 % 2**32 ^ first
    second = -(bits ^ bits >> 16) * 0x7FEB352D % 2**32  # makes the hash of id 1 zero: its noise is 22.18
    rng_keys = torch.tensor([[first, second - (second >> 31 << 32)]] * 6, dtype=torch.int32)
    logits = normal(6, CHUNK)
    logits[1, lowest], logits[1, 3] = -30.0, 30.0
    logits[2] = -inf
    logits[3], logits[3, 3] = -inf, -5.0
    logits[4, lowest], logits[4, [64, 300]] = -inf, math.nan
    logits[5, lowest], logits[5, [64, 300]] = -inf, inf
    assert draw_tokens(logits, rng_keys, temperature=1.0).tolist() == [lowest, 3, 0, 3, 64, 64]


def rows_with_infinities_and_nan() -> tuple[torch.Tensor, list[int]]:
    """logits [6, V] and what is drawn from each row."""
    logits, inf, nan = normal(6, 2 * CHUNK + 9), math.inf, math.nan
    logits[0, CHUNK + 7] = logits[0, CHUNK + 90] = nan
    logits[1], logits[1, CHUNK + 4] = -inf, nan
    logits[2, 2 * CHUNK + 8] = logits[2, 2 * CHUNK + 5] = inf
    logits[3] = -inf
    logits[4] = nan
    logits[5, 1], logits[5, 0] = nan, inf
    return logits, [CHUNK + 7, CHUNK + 4, 2 * CHUNK + 5, 0, 0, 0]


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
def test_the_first_nan_or_infinity_wins_and_rows_without_a_logit_give_id_0(poisoned):
    logits, expected = rows_with_infinities_and_nan()
    assert draw_tokens(logits, make_rng_keys(make_keys(6)), temperature=0.5).tolist() == expected


def test_the_reference_treats_infinities_and_nan_as_the_kernel():
    logits, expected = rows_with_infinities_and_nan()
    assert draw_tokens_reference(logits, make_rng_keys(make_keys(6)), 0.5).tolist() == expected


@pytest.mark.interpreter
def test_a_row_draws_alone_whatever_the_strides(poisoned):
    rng_keys, logits = make_rng_keys(make_keys(9)), normal(9, 1300, scale=2.0)
    tokens = draw_tokens(logits, rng_keys, temperature=0.9)
    order = torch.tensor([4, 0, 8, 2])
    wide = torch.full((4, 1500), math.inf)
    wide[:, 100:1400] = logits[order]
    assert torch.equal(draw_tokens(wide[:, 100:1400], rng_keys[order], temperature=0.9), tokens[order])
    columns = logits.T.contiguous().T
    assert torch.equal(draw_tokens(columns, rng_keys.T.contiguous().T, temperature=0.9), tokens)
    assert draw_tokens(logits[:0], rng_keys[:0], temperature=0.9).shape == (0,)


def test_a_temperature_of_zero_and_other_dtypes_are_refused():
    rng_keys = make_rng_keys(make_keys(2))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            draw_tokens(torch.zeros(2, 5), rng_keys, temperature=temperature)
    with pytest.raises(ValueError, match="logits is torch.float64"):
        draw_tokens(torch.zeros(2, 5, dtype=torch.float64), rng_keys, temperature=1.0)


POINTERS = {"logits_ptr": "*fp32", "rng_keys_ptr": "*i32", "largest_ptr": "*fp32", "winners_ptr": "*i32"}
NUMBERS = {"temperature": "fp32", "num_chunks": "i32", "stride_logits": "i32"}


def chunk_resources(arch):
    return compile_for(_chunk_kernel, POINTERS | NUMBERS | {"vocab_size": "i32"},
                       {"CHUNK": _CHUNK["gpu"], "THREADS": _THREADS["gpu"], "HAS_LIBDEVICE": True}, arch,
                       num_warps=_THREADS["gpu"] // 32, num_stages=3,
                       divisible=(*POINTERS, "vocab_size", "stride_logits"), enable_fp_fusion=False)


def row_resources(arch, block):
    return compile_for(_row_kernel, POINTERS | NUMBERS | {"tokens_ptr": "*i64"}, {"BLOCK": block, "HAS_LIBDEVICE": True},
                       arch, num_warps=1, num_stages=3, enable_fp_fusion=False)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernels_fit_every_gpu_and_read_each_logit_once(arch):
    chunk = chunk_resources(arch)
    check_fits(chunk, arch)
    assert chunk.registers <= 80  # six programs on a multiprocessor of 65,536
    assert len(re.findall(r"\bLDG\.E\.128\b", chunk.sass)) == _CHUNK["gpu"] // (_THREADS["gpu"] * 4)  # four logits at a time
    assert chunk.ptx.count("lg2.approx.ftz.f32") == _CHUNK["gpu"] // _THREADS["gpu"]  # the exact noise has none
    for block in (1, 64):
        check_fits(row_resources(arch, block), arch)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_no_product_is_contracted_with_the_subtraction(arch):
    # libdevice's multiply-adds flush subnormals (FFMA.FTZ); the others are the reciprocal's, as many for 2 scores as for 8, and
    # one for the bound of each logit, on sm_100 two at a time
    short, long, chunk = (len(re.findall(r"\bFFMA ", kernel.sass)) + 2 * len(re.findall(r"\bFFMA2 ", kernel.sass))
                          for kernel in (row_resources(arch, 64), row_resources(arch, 256), chunk_resources(arch)))
    assert short == long == chunk - _CHUNK["gpu"] // _THREADS["gpu"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows, vocab_size, temperature", [
    (512, 201_088, 1.0), (512, 201_088, 0.7), (1, 201_088, 1.0), (64, 5000, 1.3), (300, 127, 1.0), (5, 1, 1.0)
])
def test_gpu_draws_are_those_of_torch_up_to_near_ties(num_rows, vocab_size, temperature, poisoned):
    keys = make_keys(num_rows, "cuda")
    logits = normal(num_rows, vocab_size, scale=3.0, device="cuda") + 20
    rng_keys = make_rng_keys(keys)
    tokens = draw_tokens(logits, rng_keys, temperature=temperature)
    assert_equal_but_for_near_ties(tokens, logits, keys, temperature)
    assert torch.equal(draw_tokens(logits, rng_keys, temperature=temperature), tokens)
    half = num_rows // 2
    assert torch.equal(draw_tokens(logits[half:], rng_keys[half:], temperature=temperature), tokens[half:])


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 10.0])
def test_gpu_winners_of_one_chunk_are_those_of_torch_to_the_bit(scale, poisoned):
    logits, rng_keys = normal(4000, _CHUNK["gpu"], scale=scale, device="cuda"), make_rng_keys(make_keys(4000, "cuda"))
    logits[2000:, 4:] -= 40.0  # four ids of one thread compete
    tokens = draw_tokens(logits, rng_keys, temperature=0.9)
    assert torch.equal(tokens, draw_tokens_reference(logits, rng_keys, 0.9))


@pytest.mark.gpu
def test_gpu_rows_with_infinities_and_nan(poisoned):
    logits, expected = rows_with_infinities_and_nan()
    rng_keys = make_rng_keys(make_keys(6))
    assert draw_tokens(logits.cuda(), rng_keys.cuda(), temperature=0.5).tolist() == expected
    wide = torch.full((6, 20_000), -math.inf)  # with the same rows in other chunks
    wide[:, 12_000 : 12_000 + logits.shape[1]] = logits
    expected = [token + 12_000 if row != 3 else 0 for row, token in enumerate(expected)]
    assert draw_tokens(wide.cuda(), rng_keys.cuda(), temperature=0.5).tolist() == expected


@pytest.mark.gpu
def test_a_cuda_graph_draws_from_what_its_inputs_hold(poisoned):
    keys, logits = make_keys(16, "cuda"), normal(16, 20_000, device="cuda")
    rng_keys = make_rng_keys(keys)
    draw_tokens(logits, rng_keys, temperature=1.0)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = draw_tokens(logits, rng_keys, temperature=1.0)
    for seed in (1, 2):
        logits.copy_(normal(16, 20_000, seed=seed, device="cuda"))
        keys[:, 4] += 1000
        rng_keys.copy_(make_rng_keys(keys))
        graph.replay()
        assert torch.equal(tokens, draw_tokens(logits, rng_keys, temperature=1.0))
