"""Writes a trained run or a checkpoint for other tools: Hugging Face or OpenAI's original layout, or a PEFT adapter.

    python scripts/export.py runs/NAME OUT --merge [--experts bf16]     one model, the adapter added to the weights
    python scripts/export.py runs/NAME OUT                              a LoRA run's adapter alone; a full run's model
    python scripts/export.py CHECKPOINT OUT --experts bf16              another form of the experts
    python scripts/export.py CHECKPOINT OUT --adapter FOLDER --merge
    python scripts/export.py CHECKPOINT OUT --layout original

--experts: as_loaded keeps packed (MXFP4) experts byte for byte and, when merging, puts their adapter into
OUT/expert_adapter; bf16 writes dense ones; mxfp4 packs, which rounds dense or merged weights (a warning says how
much). --dtype float32 keeps what bfloat16 would round; small changes of a bf16 weight can vanish in a merge. OUT must
not exist or be empty.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.config import read_saved_config  # noqa: E402
from grpo.policy import load_run_policy  # noqa: E402
from models.checkpoint import checkpoint_folder, load_model, save_model, save_original  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402
from models.peft_format import attached_config, load_adapter, save_adapter  # noqa: E402


def load_source(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[GptOss, Path | None, str]:
    """The model to export, the folder of its tokenizer if it has one, and the name of its base."""
    source, device = Path(arguments.source).expanduser(), torch.device(arguments.device)
    if (source / "config.yaml").exists():
        if arguments.adapter is not None:
            raise ValueError("--adapter goes with a checkpoint; a run has its own")
        lora = read_saved_config(source / "config.yaml").model.lora
        if lora is not None and (lora.train_norms or lora.train_sinks) and not arguments.merge:
            dtype = torch.float32  # trained norms and sinks go beside the adapter as they are
        model, _, config, _ = load_run_policy(source, step=arguments.step, device=device, dtype=dtype)
        return model, source / "tokenizer", config.model.path or str(source)
    if arguments.step is not None:
        raise ValueError(f"--step goes with a run; {source} has no config.yaml")
    model = load_model(arguments.source, device=device, dtype=dtype, experts="auto")
    if arguments.adapter is not None:
        load_adapter(model, arguments.adapter)
    folder = checkpoint_folder(arguments.source)
    return model, folder if (folder / "tokenizer.json").exists() else None, str(arguments.source)


def export(arguments: argparse.Namespace) -> str:
    """Writes OUT and returns what it holds, in words."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    model, tokenizer_folder, base_model = load_source(arguments, dtype)
    has_adapter = (config := attached_config(model)) is not None and bool(config.targets)
    if arguments.merge and not has_adapter:
        raise ValueError("--merge: there is no adapter to merge; leave it out")
    if has_adapter and not arguments.merge:
        if arguments.layout != "hf" or arguments.experts != "as_loaded":
            raise ValueError(
                "--layout and --experts change a whole model: add --merge, or leave them out for the adapter"
            )
        save_adapter(model, arguments.out, base_model=base_model)
        return "a PEFT adapter (--merge writes the whole model)"
    if arguments.layout == "original":
        if arguments.experts not in ("as_loaded", model.expert_format) or arguments.dtype != "bfloat16":
            raise ValueError(
                "--layout original keeps the form of the experts and is bfloat16: leave --experts and --dtype out"
            )
        save_original(model, arguments.out, merge_lora=arguments.merge, max_shard_bytes=arguments.max_shard_bytes)
        return "a model in OpenAI's original layout" + (
            "" if model.expert_format == "mxfp4" else " (dense experts: OpenAI's own loader reads packed ones only)"
        )
    save_model(
        model,
        arguments.out,
        merge_lora=arguments.merge,
        experts=arguments.experts,
        dtype=dtype,
        tokenizer_folder=arguments.tokenizer or tokenizer_folder,
        max_shard_bytes=arguments.max_shard_bytes,
    )
    return "a model in Hugging Face layout" + (
        ""
        if tokenizer_folder or arguments.tokenizer
        else ", without a tokenizer: the source has none (--tokenizer FOLDER adds one)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a run, folder of a checkpoint, or hub id")
    parser.add_argument("out", type=Path)
    parser.add_argument("--merge", action="store_true", help="add the adapter to the weights")
    parser.add_argument("--experts", choices=["as_loaded", "bf16", "mxfp4"], default="as_loaded")
    parser.add_argument("--layout", choices=["hf", "original"], default="hf")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--adapter", help="folder of a PEFT adapter, with a checkpoint as source")
    parser.add_argument("--step", type=int, help="checkpoint of the run; default: the newest")
    parser.add_argument("--tokenizer", help="folder whose tokenizer files are copied; default: the source's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-shard-bytes", type=float, default=5e9)
    arguments = parser.parse_args()
    try:
        written = export(arguments)
    except ValueError as error:
        sys.exit(f"export: {error}")
    print(f"{arguments.out}: {written}")


if __name__ == "__main__":
    main()
