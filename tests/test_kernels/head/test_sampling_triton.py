"""The draw's kernels: in the interpreter against grpo/rollout/sampling.py, ahead of time for every GPU, and on a GPU.

Statistics of draws are tested in tests/test_grpo/rollout/test_sampling.py, where the noise is compared to the reference's too."""

import math
import re

import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for

from grpo.rollout.sampling import draw, gumbel_noise
from kernels.head.sampling import _CHUNK, _chunk_kernel, _row_kernel, draw_tokens, draw_tokens_reference
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
                       {"CHUNK": _CHUNK["gpu"], "HAS_LIBDEVICE": True}, arch, num_warps=8, num_stages=3,
                       divisible=(*POINTERS, "vocab_size", "stride_logits"), enable_fp_fusion=False)


def row_resources(arch, block):
    return compile_for(_row_kernel, POINTERS | NUMBERS | {"tokens_ptr": "*i64"}, {"BLOCK": block, "HAS_LIBDEVICE": True},
                       arch, num_warps=1, num_stages=3, enable_fp_fusion=False)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernels_fit_every_gpu_and_read_each_logit_once(arch):
    chunk = chunk_resources(arch)
    check_fits(chunk, arch)
    assert chunk.registers <= 64  # four programs on a multiprocessor of 65,536
    assert len(re.findall(r"\bLDG\.E\.128\b", chunk.sass)) == _CHUNK["gpu"] // (8 * 32 * 4)  # four logits at a time
    for block in (1, 64):
        check_fits(row_resources(arch, block), arch)


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_no_product_is_contracted_with_the_subtraction(arch):
    # libdevice's multiply-adds flush subnormals (FFMA.FTZ); the others are the reciprocal's, as many for 2 scores as for 16
    kernels = row_resources(arch, 64), row_resources(arch, 256), chunk_resources(arch)
    counts = {len(re.findall(r"\bFFMA ", kernel.sass)) for kernel in kernels}
    assert len(counts) == 1 and counts.pop() > 0


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
