"""Choice of the dtype by the GPU, which is pretended."""

import pytest
import torch

from grpo.config import ConfigError, Dtype, Experts, ModelConfig, Train
from grpo.policy import check_trainable, select_dtype

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """Pretends a GPU of a compute capability."""

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")

    return pretend


@pytest.mark.parametrize("capability, expected", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)])
def test_auto_is_float16_where_a_gpu_has_no_bfloat16(gpu, capability, expected):
    gpu(*capability)
    assert select_dtype(Dtype.auto, CUDA) == expected
    assert select_dtype(Dtype.auto, CPU) == torch.float32


def test_named_dtypes_are_taken_where_the_device_computes_in_them(gpu):
    gpu(7, 5)
    assert select_dtype(Dtype.float16, CUDA) == torch.float16 and select_dtype(Dtype.float32, CUDA) == torch.float32
    with pytest.raises(ConfigError, match=r"dtype = 'bfloat16': Tesla T4 has none .*set dtype=float16"):
        select_dtype(Dtype.bfloat16, CUDA)
    with pytest.raises(ConfigError, match="dtype = 'float16': for GPUs; on the CPU set dtype=float32"):
        select_dtype(Dtype.float16, CPU)
    assert select_dtype(Dtype.bfloat16, CPU) == torch.bfloat16
    gpu(9, 0)
    assert select_dtype(Dtype.float16, CUDA) == torch.float16


def test_float16_trains_adapters_only():
    settings = dict(path=None, experts=Experts.auto, activation_checkpointing=False)
    check_trainable(ModelConfig(train=Train.lora, **settings), torch.float16)
    check_trainable(ModelConfig(train=Train.full, **settings), torch.bfloat16)
    with pytest.raises(ConfigError, match="model.train = 'full': .*set model.train=lora"):
        check_trainable(ModelConfig(train=Train.full, **settings), torch.float16)
