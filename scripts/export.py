"""Writes a trained run or a checkpoint for other tools: Hugging Face or OpenAI's original layout, or a PEFT adapter.

    python scripts/export.py runs/NAME OUT --merge [--experts bf16]     one model, the adapter added to the weights
    python scripts/export.py runs/NAME OUT                              a LoRA run's adapter alone; a full run's model
    python scripts/export.py runs/NAME OUT --push ORG/NAME [--private]  and uploads it to the Hugging Face hub
    python scripts/export.py CHECKPOINT OUT --experts bf16              another form of the experts
    python scripts/export.py CHECKPOINT OUT --adapter FOLDER --merge
    python scripts/export.py CHECKPOINT OUT --layout original

--experts: as_loaded keeps packed (MXFP4) experts byte for byte and, when merging, puts their adapter into
OUT/expert_adapter; bf16 writes dense ones; mxfp4 packs, which rounds dense or merged weights (a warning says how
much). --dtype float32 keeps what bfloat16 would round; small changes of a bf16 weight can vanish in a merge. OUT must
not exist or be empty. It gets tokenizer, chat template, generation_config.json and a model card (README.md); the last
line says what was left out. For GGUF, merge with --experts bf16 and run llama.cpp's convert_hf_to_gguf.py on OUT.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.config import read_saved_config  # noqa: E402
from grpo.configuration.command_line import Once  # noqa: E402
from grpo.run.export_files import write_adapter, write_model, write_original  # noqa: E402
from grpo.run.hub import check_push, push  # noqa: E402
from grpo.run.model_card import Origin  # noqa: E402
from grpo.run.policy import load_run_policy  # noqa: E402
from models.formats.files import checkpoint_folder  # noqa: E402
from models.formats.hugging_face import load_model  # noqa: E402
from models.formats.peft import load_adapter  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402


def load_source(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[GptOss, Origin]:
    """The model to export and where it comes from."""
    source, device = Path(arguments.source).expanduser(), torch.device(arguments.device)
    tokenizer = arguments.tokenizer and Path(arguments.tokenizer).expanduser()
    if (source / "config.yaml").exists():
        if arguments.adapter is not None:
            raise ValueError("--adapter goes with a checkpoint; a run has its own")
        lora = read_saved_config(source / "config.yaml").model.lora
        if lora is not None and (lora.train_norms or lora.train_sinks) and not arguments.merge:
            dtype = torch.float32  # trained norms and sinks go beside the adapter as they are
        model, _, config, state = load_run_policy(source, step=arguments.step, device=device, dtype=dtype)
        return model, Origin(config.model.path, tokenizer or source / "tokenizer", config, source, state.step,
                             base_id=arguments.base, name=arguments.push)
    if arguments.step is not None:
        raise ValueError(f"--step goes with a run; {source} has no config.yaml")
    model = load_model(arguments.source, device=device, dtype=dtype, experts="auto")
    if arguments.adapter is not None:
        load_adapter(model, arguments.adapter)
    folder = checkpoint_folder(arguments.source)
    found = folder if (folder / "tokenizer.json").exists() else None
    return model, Origin(arguments.source, tokenizer or found, base_id=arguments.base, name=arguments.push)


def export(arguments: argparse.Namespace) -> str:
    """Writes OUT and returns what it holds and leaves out, in words."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    if arguments.layout == "original" and arguments.dtype != "bfloat16":
        raise ValueError("--layout original is bfloat16: leave --dtype out")
    model, origin = load_source(arguments, dtype)
    has_adapter = model.adapter is not None and bool(model.adapter.targets)
    if arguments.merge and not has_adapter:
        raise ValueError("--merge: there is no adapter to merge; leave it out")
    if has_adapter and not arguments.merge:
        if arguments.layout != "hf" or arguments.experts != "as_loaded":
            raise ValueError("--layout and --experts change a whole model: add --merge, or leave them out for the adapter")
        return write_adapter(model, arguments.out, origin) + " (--merge writes the whole model)"
    settings = {"merge_lora": arguments.merge, "experts": arguments.experts, "max_shard_bytes": arguments.max_shard_bytes}
    if arguments.layout == "original":
        return write_original(model, arguments.out, origin, **settings)
    return write_model(model, arguments.out, origin, dtype=dtype, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.register("action", None, Once)
    parser.add_argument("source", help="folder of a run, folder of a checkpoint, or hub id")
    parser.add_argument("out", type=Path)
    parser.add_argument("--merge", action="store_true", help="add the adapter to the weights")
    parser.add_argument("--experts", choices=["as_loaded", "bf16", "mxfp4"], default="as_loaded")
    parser.add_argument("--layout", choices=["hf", "original"], default="hf")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--adapter", help="folder of a PEFT adapter, with a checkpoint as source")
    parser.add_argument("--step", type=int, help="checkpoint of the run; default: the newest")
    parser.add_argument("--tokenizer", help="folder whose tokenizer files are copied; default: the source's")
    parser.add_argument("--base", metavar="ORG/NAME", help="hub id of the base, where it was loaded from another folder")
    parser.add_argument("--push", metavar="ORG/NAME", help="upload OUT to the hub as this repository")
    parser.add_argument("--private", action="store_true", help="of a repository that --push makes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-shard-bytes", type=float, default=5e9)
    arguments = parser.parse_args()
    if arguments.private and arguments.push is None:
        parser.error("--private goes with --push")
    try:
        if arguments.push is not None:
            check_push(arguments.push)
        print(f"{arguments.out}: {export(arguments)}", flush=True)
        if arguments.push is not None:
            print(f"uploaded to {push(arguments.out, arguments.push, private=arguments.private)}")
    except ValueError as error:
        sys.exit(f"export: {error}")


if __name__ == "__main__":
    main()
