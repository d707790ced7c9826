"""The margin of a memory budget, which follows what steps have reserved."""

import pytest

from models.memory_plan import MemoryBudget

BUDGET = 20_000_000_000


def budget(*, is_tight: bool) -> MemoryBudget:
    memory = MemoryBudget(None, recomputes=True, memory_gb=20.0, host_gb=0.0)
    memory._is_tight = is_tight
    return memory


def test_a_margin_begins_at_a_twenty_fifth_and_gives_half_of_what_steps_leave():
    memory = budget(is_tight=True)
    memory.learn(19_000_000_000, BUDGET)  # 4% below 99% of the budget
    assert memory._margin == pytest.approx(0.02)
    memory.learn(19_600_000_000, BUDGET)  # 1% below
    assert memory._margin == pytest.approx(0.015)
    memory.learn(10_000_000_000, BUDGET)
    assert memory._margin == 0.01  # at least


def test_a_step_above_the_budget_widens_the_margin_for_good():
    memory = budget(is_tight=True)
    memory.learn(20_400_000_000, BUDGET)  # 3% above 99% of the budget
    assert memory._margin == pytest.approx(0.07)
    memory.learn(15_000_000_000, BUDGET)
    assert memory._margin == pytest.approx(0.07)
    memory.learn(30_000_000_000, BUDGET)
    assert memory._margin == 0.15  # at most


def test_a_step_that_keeps_everything_on_the_gpu_teaches_only_excess():
    memory = budget(is_tight=False)
    memory.learn(5_000_000_000, BUDGET)
    assert memory._margin == 0.04
    memory.learn(20_200_000_000, BUDGET)
    assert memory._margin == pytest.approx(0.06)
