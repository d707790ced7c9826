"""Writes adapters with PEFT and what they compute; a process of its own, started by test_peft_peer.py.

    python peer_adapters.py JOBS.json OUT

JOBS: {"base": folder, "input_ids": [[...]], "adapters": {name: {"type": config class, "settings": its arguments,
"convert": of a start that changes the base, whether to save it as plain LoRA, "save": arguments of save_pretrained}}}.
OUT/NAME is the adapter, its tensors random; OUT/log_probs.safetensors the log-probs of each that PEFT could make and load
again, as it computes after loading; OUT/refused.json why PEFT could not make others.
"""

import json
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

# transformers would import a distribution named `kernels` of the right version; that name may be this project's
transformers.utils.import_utils.is_kernels_available = lambda *_, **__: False
transformers.utils.is_kernels_available = lambda *_, **__: False


def load_base(folder: str):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def make(base: str, ids: torch.Tensor, job: dict, folder: Path) -> torch.Tensor:
    torch.manual_seed(0)
    model = peft.get_peft_model(load_base(base), getattr(peft, job["type"])(**job["settings"]))
    if job.get("convert"):
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "start")
        model.peft_config["default"].init_lora_weights = job["settings"]["init_lora_weights"]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    model.eval()
    with torch.no_grad():
        trained = model(ids).logits.log_softmax(-1)
    extra = {"path_initial_model_for_weight_conversion": str(folder / "start")} if job.get("convert") else {}
    model.save_pretrained(folder, **extra, **job.get("save", {}))
    loaded = peft.PeftModel.from_pretrained(load_base(base), folder)
    with torch.no_grad():
        found = loaded(ids).logits.log_softmax(-1)
    assert job.get("convert") or (found - trained).abs().max() < 1e-3, "PEFT itself does not get back what it saved"
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    log_probs, refused = {}, {}
    for name, job in jobs["adapters"].items():
        try:
            log_probs[name] = make(jobs["base"], torch.tensor(jobs["input_ids"]), job, out / name).contiguous()
        except Exception as error:  # noqa: BLE001  (the other adapters are worth their time)
            refused[name] = f"{type(error).__name__}: {error}"
    save_file(log_probs, out / "log_probs.safetensors")
    (out / "refused.json").write_text(json.dumps(refused))
