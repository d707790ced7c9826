"""From drawn tokens to the next step's rows: against a loop in Python integers, in the interpreter, for every GPU."""

import pytest
import torch
from aot import ALL_ARCHITECTURES, check_fits, compile_for

from kernels.head.advance import _BLOCK, IDLE, Rows, _advance_kernel, advance
from kernels.head.sampling import as_pairs, key_sums
from models.draw_key import mix_keys

STOP_IDS = [3, 17]
CAPACITY = 5  # tokens of a row in the output buffers


def make_rows(num_rows: int, device="cpu") -> tuple[Rows, torch.Tensor]:
    """Rows at various lengths, every fifth idle, and their keys [B, 4]."""
    generator = torch.Generator().manual_seed(num_rows)
    count = torch.arange(num_rows)
    keys = torch.stack([torch.full_like(count, -3), torch.full_like(count, 2**40), count // 4, count % 4], dim=1)
    num_new = torch.randint(0, CAPACITY - 1, (num_rows,), generator=generator)
    prompt_lens = 1 + torch.randint(0, 100_000, (num_rows,), generator=generator)
    positions = torch.where(count % 5 == 4, IDLE, prompt_lens + num_new - 1)
    limits = num_new + torch.randint(1, CAPACITY - 2, (num_rows,), generator=generator)
    limits = limits.clamp(max=CAPACITY)
    rows = Rows(tokens=count + 100, positions=positions, num_new=num_new, is_stopped=torch.zeros_like(count), slots=count + 7,
                prompt_lens=prompt_lens, limits=limits, places=count.flip(0) * CAPACITY, key_sums=key_sums(keys),
                rng_keys=count + 1, items=count + 9)
    return Rows(*(tensor.contiguous().to(device) for tensor in rows)), keys


def advance_in_python(rows: Rows, keys, drawn: list[int], log_probs: list[float]) -> tuple[list[dict], dict[int, tuple]]:
    """The rows after a step, and what was stored at which place."""
    after, stored = [], {}
    columns = {name: tensor.tolist() for name, tensor in rows._asdict().items()}
    for b in range(len(drawn)):
        row = {name: values[b] for name, values in columns.items()}
        if row["positions"] >= 0:
            stored[row["places"] + row["num_new"]] = (drawn[b], log_probs[b])
            row["num_new"] += 1
            row["tokens"] = drawn[b]
            row["is_stopped"] = int(drawn[b] in STOP_IDS)
            position = row["positions"] + 1
            is_finished = row["is_stopped"] or row["num_new"] >= row["limits"]
            row["positions"] = IDLE if is_finished else position
            key = torch.tensor([[*keys[b].tolist(), position + 1]])
            row["rng_keys"] = int(mix_keys(key).view(torch.int64))
        after.append(row)
    return after, stored


def check_steps(num_rows: int, device="cpu") -> None:
    rows, keys = make_rows(num_rows, device)
    generator = torch.Generator().manual_seed(1)
    all_tokens = torch.full((num_rows * CAPACITY,), -9, device=device)
    all_log_probs = torch.full((num_rows * CAPACITY,), 9.0, device=device)
    stop_ids = torch.tensor(STOP_IDS, device=device)
    expected_tokens, expected_log_probs = all_tokens.tolist(), all_log_probs.tolist()
    for _ in range(4):
        drawn = torch.randint(0, 24, (num_rows,), generator=generator)
        log_probs = -torch.rand(num_rows, generator=generator)
        after, stored = advance_in_python(rows, keys, drawn.tolist(), log_probs.tolist())
        for place, (token, log_prob) in stored.items():
            expected_tokens[place], expected_log_probs[place] = token, log_prob
        advance(rows, drawn.to(device), log_probs.to(device), all_tokens=all_tokens, all_log_probs=all_log_probs,
                stop_ids=stop_ids)
        for name, tensor in rows._asdict().items():
            assert tensor.tolist() == [row[name] for row in after], name
        assert all_tokens.tolist() == expected_tokens and all_log_probs.tolist() == expected_log_probs
    assert (rows.positions == IDLE).sum() > num_rows // 4 or num_rows == 1  # rows have ended


SIZES = [1, 7, _BLOCK, _BLOCK + 1]


@pytest.mark.parametrize("num_rows", SIZES)
def test_rows_advance_as_a_loop_in_python_says(num_rows):
    check_steps(num_rows)


def check_without_stop_ids() -> None:
    rows, _ = make_rows(3)
    drawn, log_probs = torch.tensor([3, 17, 0]), torch.zeros(3)
    advance(rows, drawn, log_probs, all_tokens=torch.zeros(15, dtype=torch.int64), all_log_probs=torch.zeros(15),
            stop_ids=torch.zeros(0, dtype=torch.int64))
    assert rows.is_stopped.tolist() == [0, 0, 0] and rows.tokens.tolist() == [3, 17, 0]


def test_without_stop_ids_only_the_limit_ends_a_row():
    check_without_stop_ids()


def test_words_are_those_of_the_whole_key():
    keys = torch.tensor([[5, -2, 2**62, 7, 9], [0, 1, 2, 3, 131_071]])
    rows, _ = make_rows(2)
    rows = rows._replace(key_sums=key_sums(keys[:, :4]), positions=keys[:, 4] - 2, num_new=torch.zeros(2, dtype=torch.int64),
                         limits=torch.full((2,), 5))
    advance(rows, torch.tensor([0, 0]), torch.zeros(2), all_tokens=torch.zeros(10, dtype=torch.int64),
            all_log_probs=torch.zeros(10), stop_ids=torch.tensor([1]))
    assert torch.equal(as_pairs(rows.rng_keys), mix_keys(keys))


@pytest.mark.interpreter
@pytest.mark.parametrize("num_rows", SIZES)
def test_the_kernel_advances_rows_as_a_loop_in_python_says(num_rows):
    check_steps(num_rows)


@pytest.mark.interpreter
def test_the_kernel_without_stop_ids():
    check_without_stop_ids()


@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
def test_the_kernel_fits_every_gpu(arch):
    names = ("tokens", "positions", "num_new", "is_stopped", "limits", "places", "key_sums", "rng_keys", "drawn", "all_tokens",
             "stop_ids")
    signature = {f"{name}_ptr": "*i64" for name in names} | {"log_probs_ptr": "*fp32", "all_log_probs_ptr": "*fp32"}
    signature |= {"num_stop_ids": "i32", "num_rows": "i32"}
    check_fits(compile_for(_advance_kernel, signature, {"BLOCK": _BLOCK}, arch, num_warps=4, num_stages=3), arch)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [*SIZES, 512])
def test_rows_advance_on_a_gpu(num_rows):
    check_steps(num_rows, "cuda")
