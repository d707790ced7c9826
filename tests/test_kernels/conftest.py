"""Tests marked `interpreter` run their kernels in Triton's interpreter (interpreter.py); fixtures that tests of kernels share."""

from collections.abc import Iterator

import numpy
import pytest
import torch
from interpreter import interpreted


@pytest.fixture(autouse=True)
def kernels_of_marked_tests_are_interpreted(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.node.get_closest_marker("interpreter"):
        yield
        return
    with interpreted(), numpy.errstate(over="ignore", invalid="ignore"):  # kernels compute infinities and NaN on purpose
        yield


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
