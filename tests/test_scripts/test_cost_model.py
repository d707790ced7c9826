"""The model of a step on N GPUs: its pieces by hand, and what it says of one GPU against whole steps that were measured."""

import itertools

import pytest
from paths import ROOT


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import cost_model

    return cost_model


@pytest.fixture
def plain(cost):
    """A GPU whose decode step takes a second, whatever the rows, and which trains 1,000 tokens a second."""
    return cost.Gpu({1: 1.0, 1000: 1000.0}, 1e30, 1000.0, 1.0, 0.0, 10, 8, 1.0, 1.0, 0.5, 8e9, 4e9, 1e30)


def test_decode_steps_lie_on_a_line_between_the_measured_numbers_of_rows(cost):
    assert cost.step_seconds({1: 100.0, 3: 100.0}, 2) == pytest.approx(0.02)
    assert cost.step_seconds({1: 100.0, 3: 100.0}, 3) == pytest.approx(0.03)
    with pytest.raises(AssertionError, match="4 rows: measured are 1 to 3"):
        cost.step_seconds({1: 100.0, 3: 100.0}, 4)


@pytest.mark.parametrize("lengths, rows, expected", [
    ([5, 3], 2, 3 * 100 + 2 * 1),
    ([5, 3], 1, 8 * 1),
    ([2, 4, 4], 2, 4 * 100 + 2 * 1),  # the third begins after 2 steps and ends after 6
    ([2, 3, 7, 1], 2, 4 * 100 + 5 * 1),  # 2 and 3; 7 from 2 to 9; 1 from 3 to 4; then 7 alone
])
def test_a_completion_that_ends_makes_room_for_the_next(cost, lengths, rows, expected):
    assert cost.decode_seconds(lengths, rows, {1: 1.0, 2: 100.0}) == expected


def test_the_slowest_of_two_parts_takes_half_as_long_again_as_the_mean_one(cost, plain, monkeypatch):
    monkeypatch.setattr(cost, "TRIALS", 4000)
    batch = cost.Batch(2, group=1, max_new=100_000, mean=512)
    slowest, mean, tokens, _ = cost.predict_rollout(plain, cost.Layout(2), cost.Links(), batch)
    assert mean == pytest.approx(512, rel=0.04) and tokens == pytest.approx(2 * mean)
    assert slowest == pytest.approx(1.5 * 512, rel=0.04)  # the largest of two exponential lengths


def test_remote_ranks_are_those_of_all_choices_of_four_experts(cost):
    for sharers in (2, 4, 8):
        choices = list(itertools.combinations(range(8), 4))
        counted = sum(len({expert * sharers // 8 for expert in choice} - {0}) for choice in choices) / len(choices)
        assert cost.remote_ranks(8, sharers) == pytest.approx(counted)


def test_traffic_of_divided_experts(cost):
    gpu = cost.GPUS["120b"]
    found = {sharers: cost.expert_traffic(gpu, cost.Layout(8, sharers, True)) for sharers in (2, 4, 8)}
    # a row is 5.76 kB: 0.94, 2.07 and 2.92 remote ranks, and 4 outputs of which 1/2, 3/4 and 7/8 are elsewhere
    assert found == pytest.approx({2: 5.76e3 * (0.940 + 2), 4: 5.76e3 * (2.070 + 3), 8: 5.76e3 * (2.923 + 3.5)}, rel=1e-3)


def test_gradients_cross_the_slower_of_two_links(cost):
    links = cost.Links(nvlink=100e9, network=10e9, node=8, launch=1e-3, peer=1e-4)
    size = 2.0**30  # 32 all-to-alls
    assert cost.all_to_all(size, cost.Layout(1), links) == 0
    assert cost.all_to_all(size, cost.Layout(2), links) == pytest.approx(size / 2 / 100e9 + 32 * 1.2e-3)
    assert cost.all_to_all(size, cost.Layout(16), links) == pytest.approx(size / 2 / 10e9 + 32 * 2.6e-3)
    # groups of 8 that share experts: every other part is on another node
    assert cost.all_to_all(size, cost.Layout(16, 8), links) == pytest.approx(size / 2 / 10e9 + 32 * 1.2e-3)


@pytest.mark.parametrize("is_even, seconds", [(False, 2 * 25.0), (True, 2 * 100 / 6)])
def test_micro_batches_go_in_rounds(cost, plain, is_even, seconds):
    batch = cost.Batch(10, prompt_len=1000, micro_batch=30_000, is_even=is_even)
    update, _ = cost.predict_update(plain, cost.Layout(3), cost.Links(), batch, 90_000)  # 100,000 trained: 4 micro-batches
    assert update == pytest.approx(seconds)


def test_ranks_that_share_rows_divide_only_the_products_of_experts(cost, plain):
    batch, links = cost.Batch(1, prompt_len=0, micro_batch=10_000), cost.Links(nvlink=1e30, launch=0.0)
    seconds = [cost.predict_update(plain, layout, links, batch, 10_000)[0]
               for layout in (cost.Layout(1), cost.Layout(2, 2), cost.Layout(2, 2, True))]
    assert seconds == pytest.approx([10.0, 7.5, 5.0])


def test_completions_go_to_all_ranks(cost):
    links = cost.Links(host=1e6, store=1e-3, pickled=10.0, pickle=1e-4)
    assert cost.gather_completions(1, 1000, 1000, links) == 0
    assert cost.gather_completions(4, 1000, 3000, links) == pytest.approx(16e-3 + 3 * 1000 * 10 / 1e6 + 0.3)


@pytest.mark.parametrize("prompt_len, group, max_new, measured", [(354, 8, 1694, 7.2), (354, 16, 670, 3.5), (512, 8, 512, 2.2)])
def test_whole_steps_on_one_gpu_are_predicted_within_six_percent(cost, prompt_len, group, max_new, measured):
    batch = cost.Batch(1, group, prompt_len, max_new, mean=None)
    assert cost.predict(cost.GPUS["20b"], cost.Layout(1), batch, cost.Links()).seconds == pytest.approx(measured, rel=0.06)


def test_the_command_prints_a_line_for_each_number_of_gpus(cost, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cost_model.py", "--gpus", "1,2", "--mean", "none"])
    cost.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| 1", "| 2"] and 1.9 < float(rows[1][8]) < 2
