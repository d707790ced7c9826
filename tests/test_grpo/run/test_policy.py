"""Choice of the dtype by the GPU, which is pretended; what is checked before a base is read."""

import shutil

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import save_file
from tiny_models import BF16, load

from grpo.config import ConfigError, Dtype, Experts, ModelConfig, Train
from grpo.run.policy import check_sinks, check_trainable, select_dtype

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


@pytest.mark.parametrize("module, arguments", [
    ("grpo.train", ["+experiment=gpt_oss_20b_lora", "device=cpu", "dtype=float32", "output_dir={tmp}/runs", "name=x",
                    "env.path={fixtures}/arithmetic.jsonl", "wandb.mode=disabled"]),
    ("grpo.evaluate", ["+model=gpt_oss_20b", "+env=dataset", "env.path={fixtures}/arithmetic.jsonl"]),
    ("grpo.generate", ["+model=gpt_oss_20b", "prompt=hello"]),
])  # fmt: skip
def test_an_adapter_of_other_settings_is_refused_before_the_base_is_read(entry_points, tmp_path, module, arguments):
    base = tmp_path / "base"
    base.mkdir()
    for path in [FIXTURES / "tiny_bf16/config.json", *(FIXTURES / "tokenizer_compact").iterdir()]:
        shutil.copyfile(path, base / path.name)
    save_file({"none.of.its.weights": torch.zeros(1)}, base / "model.safetensors")
    arguments = [argument.format(tmp=tmp_path, fixtures=FIXTURES) for argument in arguments]
    done = entry_points.run(module, *arguments, f"model.path={base}", f"model.lora.adapter={FIXTURES / 'tiny_bf16_lora'}")
    assert done.code == 2, done.err
    assert "rank: 16 in the model, 4 in the adapter" in done.err and "set model.lora.rank=4 model.lora.alpha=8" in done.err
    assert not (tmp_path / "runs/x").exists()


def test_a_head_without_a_sink_is_refused_where_sinks_are_trained():
    policy = load(BF16)
    policy.model.layers[1].self_attn.sinks.data[1] = float("-inf")
    model = ModelConfig(path="folder", experts=Experts.auto, train=Train.full, activation_checkpointing=False)
    check_sinks(policy, model)  # they are frozen
    policy.model.layers[1].self_attn.sinks.requires_grad_()
    with pytest.raises(ConfigError, match=r"model.path = 'folder': sinks of layer 1 are not finite \(heads 1\), and this run"):
        check_sinks(policy, model)
