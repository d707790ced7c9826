"""What others load of a trained policy: a PEFT adapter or a whole model, with tokenizer, generation settings and model card.

The end of a run and scripts/export.py write it here, each into one folder that is ready for the hub (grpo/run/hub.py).
"""

from collections.abc import Callable
from pathlib import Path

import torch

from grpo.run.model_card import Origin, model_card
from models.formats.hugging_face import keeps_expert_adapter, save_model, save_original, tokenizer_files, written_format
from models.formats.peft import save_adapter
from models.gpt_oss import GptOss


def write_adapter(policy: GptOss, folder: Path, origin: Origin, *,
                  read: Callable[[torch.nn.Parameter], torch.Tensor] = lambda parameter: parameter) -> str:
    """Writes the policy's adapter and returns in words what the folder holds and what it leaves out. read: as of save_adapter."""
    files, left_out = _files_beside(origin)
    config = policy.adapter
    if config.train_norms or config.train_sinks:
        left_out.append("trained norms and sinks (in trained_weights.safetensors, which PEFT and vLLM do not read; a merged "
                        "export holds them)")
    if origin.base is None:
        left_out.append("the base, weights drawn from a seed (--merge writes them too)")
    elif origin.name is not None and origin.base_id is None:
        left_out.append("a base that others can find (it was read from a folder; --base ORG/NAME names it)")
    files["README.md"] = model_card(origin, config, left_out, is_adapter=True, is_merged=False)
    save_adapter(policy, folder, base_model=origin.base_name, beside=files, read=read)
    return _in_words("a PEFT adapter", left_out)


def write_model(policy: GptOss, folder: Path, origin: Origin, *, merge_lora: bool, experts: str = "as_loaded",
                dtype: torch.dtype, max_shard_bytes: float = 5e9) -> str:
    """Writes the whole model in Hugging Face layout, arguments and result as those of hugging_face.save_model."""
    files, left_out = _files_beside(origin)
    if merge_lora and keeps_expert_adapter(policy, experts):
        left_out.append("the experts' adapter (in expert_adapter/, for PEFT on top of this model; --experts bf16 merges it)")
    files["README.md"] = model_card(origin, policy.adapter, left_out, is_adapter=False, is_merged=merge_lora)
    save_model(policy, folder, merge_lora=merge_lora, experts=experts, dtype=dtype, max_shard_bytes=max_shard_bytes,
               beside=files, name=origin.name)
    return _in_words("a model in Hugging Face layout", left_out)


def write_original(policy: GptOss, folder: Path, origin: Origin, *, merge_lora: bool, experts: str,
                   max_shard_bytes: float) -> str:
    """Writes the whole model in OpenAI's original layout; returns the same."""
    left_out = ["tokenizer and generation settings (that layout has none)"]
    card = model_card(origin, policy.adapter, left_out, is_adapter=False, is_merged=merge_lora)
    save_original(policy, folder, merge_lora=merge_lora, experts=experts, max_shard_bytes=max_shard_bytes,
                  beside={"README.md": card})
    dense = "" if written_format(policy, experts).is_packed else " (dense experts: OpenAI's own loader reads packed ones only)"
    return _in_words(f"a model in OpenAI's original layout{dense}", left_out)


def _files_beside(origin: Origin) -> tuple[dict[str, Path | str], list[str]]:
    """Tokenizer, chat template and generation_config.json, and what of them there is none."""
    files: dict[str, Path | str] = {path.name: path for path in tokenizer_files(origin.tokenizer_folder)}
    if (generation := origin.base_file("generation_config.json")) is not None:
        files[generation.name] = generation
    if "tokenizer.json" not in files:
        return files, ["a tokenizer (the source has none; --tokenizer FOLDER adds one)"]
    settings = files.get("tokenizer_config.json")
    has_template = "chat_template.jinja" in files or (settings and '"chat_template"' in settings.read_text(encoding="utf-8"))
    return files, [] if has_template else ["a chat template (the tokenizer brings none)"]


def _in_words(what: str, left_out: list[str]) -> str:
    return what + ("; left out: " + "; ".join(left_out) if left_out else "")
