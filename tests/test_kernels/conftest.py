"""Interpreter tests run where TRITON_INTERPRET=1, and nothing else of this folder does (see interpreter.py)."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from interpreter import save_time

FOLDER = Path(__file__).parent

if os.environ.get("TRITON_INTERPRET") == "1":
    save_time()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    left_out = [item for item in items if FOLDER in item.path.parents
                and (item.get_closest_marker("interpreter") is not None) != interpreted]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def ordered_products(monkeypatch) -> None:
    """Products of Triton's interpreter are sums in ascending order, as on a GPU: numpy's library adds up in another one for other
    shapes and, on some CPUs, for other places of a row."""

    def matmul(a, b, dtype):
        total = numpy.zeros((a.shape[0], b.shape[1]), dtype)
        for k in range(a.shape[1]):
            total += a[:, k, None] * b[None, k]
        return total

    monkeypatch.setattr(numpy, "matmul", matmul)
