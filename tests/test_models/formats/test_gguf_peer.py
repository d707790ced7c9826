"""llama.cpp's converter takes a merged export. GRPO_LLAMA_CPP names a folder of llama.cpp, GRPO_PEER_PYTHON a Python with
transformers; skipped without."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

from grpo.run.export_files import write_model
from grpo.run.model_card import Origin
from models.formats.hugging_face import load_model
from models.lora import LoraConfig, attach_lora

# the converter knows a tokenizer by a hash of what it does to a text; the fixture's is small and has another one
CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base, convert_hf_to_gguf, gguf, numpy, torch
from safetensors.torch import save_file
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-4o"
sys.argv[1:] = [sys.argv[2], "--outfile", "out.gguf", "--outtype", "f32"]
convert_hf_to_gguf.main()
read = {tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader("out.gguf").tensors}
save_file(read, "out.safetensors")
"""


@pytest.mark.parametrize("form, experts", [("tiny_bf16", "bf16"), ("tiny_mxfp4", "bf16"), ("tiny_mxfp4", "as_loaded")])
def test_llama_cpp_converts_a_merged_export(tmp_path, form, experts):
    llama, python = os.environ.get("GRPO_LLAMA_CPP"), os.environ.get("GRPO_PEER_PYTHON")
    if llama is None or python is None or not (Path(llama) / "convert_hf_to_gguf.py").exists():
        pytest.skip("set GRPO_LLAMA_CPP to a folder of llama.cpp and GRPO_PEER_PYTHON to a Python with transformers")
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / form, base)
    for path in (FIXTURES / "tokenizer_compact").iterdir():
        shutil.copyfile(path, base / path.name)
    model = load_model(base, device="cpu", dtype=torch.float32)
    attach_lora(model, LoraConfig(rank=2, alpha=4.0, targets=["q_proj", "o_proj"]), seed=0)
    for parameter in model.trainable_parameters().values():
        parameter.data.add_(0.05)
    write_model(model, tmp_path / "out", Origin(str(base), base), merge_lora=True, experts=experts, dtype=torch.bfloat16)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", CONVERT, llama, tmp_path / "out"], cwd=tmp_path, env=environment | {
        "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    read = load_file(tmp_path / "out.safetensors")
    merged = load_model(tmp_path / "out", device="cpu", dtype=torch.float32, experts="bf16").state_dict()
    gate_up, down = (merged[f"model.layers.1.mlp.experts.{name}"].transpose(1, 2) for name in ("gate_up_proj", "down_proj"))
    expected = {"ffn_gate_exps.weight": gate_up[:, ::2], "ffn_up_exps.weight": gate_up[:, 1::2], "ffn_down_exps.weight": down,
                "attn_sinks.weight": merged["model.layers.1.self_attn.sinks"],
                "attn_output.weight": merged["model.layers.1.self_attn.o_proj.weight"]}
    for name, tensor in expected.items():
        torch.testing.assert_close(read[f"blk.1.{name}"].view(tensor.shape), tensor.contiguous(), rtol=0, atol=0)
