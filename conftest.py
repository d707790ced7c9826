"""Settings of every test: one thread, our own `kernels`, GPU tests only where there is a GPU."""

import os
import signal
from collections.abc import Callable

# before anything imports torch: threads that wait for each other by spinning make tiny tensors many times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")
# processes that tests start would compile the same modules again and again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import yaml

import models  # noqa: F401  (raises ImportError where another package named kernels hides ours)

if yaml.__with_libyaml__:  # libyaml reads the same in a third of the time
    yaml.SafeLoader = yaml.CSafeLoader

# processes inherit what nohup and a shell's background have ignored, but no handler; tests send them these signals
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-capability", type=int, metavar="N", help="GPU tests on a Hopper GPU with tables and tensor-core "
                     "instructions of another: 80 for compute capability 8.0 (A100), 89 for 8.9 (RTX 40)")


def pytest_configure(config: pytest.Config) -> None:
    capability = config.getoption("--as-capability")
    if capability is None:
        return
    from kernels import device

    # the code is generated as for that GPU, then assembled for the one that is here
    os.environ["TRITON_OVERRIDE_ARCH"] = f"sm{capability}"
    found = device.gpu_of_device
    device.gpu_of_device = lambda place: device.Gpu(capability, found(place).num_multiprocessors)


@pytest.fixture(scope="session")
def lively_model() -> Callable:
    """Makes a float32 model on the CPU whose logits are far from even and whose sinks and biases are not zero."""
    import torch

    from models.gpt_oss import GptOss

    def make(config, *, head_factor: float) -> GptOss:
        policy = GptOss(config, dtype=torch.float32, device="cpu", experts="bf16")
        policy.init_weights(seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in policy.named_parameters():
            if name == "lm_head.weight":
                parameter.data.mul_(head_factor)
            elif parameter.ndim == 1 and "norm" not in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return policy

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
