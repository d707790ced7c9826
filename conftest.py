"""Settings of every test: one thread, our own `kernels`, GPU tests only where there is a GPU."""

import os

# before anything imports torch: threads that wait for each other by spinning make tiny tensors many times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import models  # noqa: F401  (raises ImportError where another package named kernels hides ours)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
