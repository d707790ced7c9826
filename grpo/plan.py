"""Where a run's memory would go, without a GPU and without weights:

    python -m grpo.plan +experiment=gpt_oss_20b_lora gpu=4090 [gpus=N] [prompt_tokens=N] [KEY=VALUE ...]

gpu: T4, L4, 4090, A100-40, A100-80, H100, H200, B200, or a number of GB (1e9 bytes). The other words are those of grpo.train;
model.memory_gb caps a larger GPU, model.host_gb the host memory (null: as much as the plan wants). prompt_tokens: the longest
prompt; without it what the environment allows. gpus: how many of them train together; the table is of one. Without it as many as
share the experts (distributed.expert_parallel). Of a checkpoint config.json alone is read; the sizes of openai/gpt-oss-20b and
-120b are known without it. Exit code 2 where the run does not fit.
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch

from grpo.config import ConfigError, Dtype, ModelConfig, TrainConfig
from grpo.configuration.command_line import refuse_repeats
from grpo.configuration.launch import CONFIG_ERROR, load_config
from grpo.distributed.experts import check_sharing
from grpo.distributed.ranks import check_division
from grpo.distributed.shards import check_shards
from grpo.record.terminal import print_error
from grpo.run.memory import UNLIMITED, make_plan, needs_of, prompt_len_of
from grpo.run.policy import build_tokenizer, read_architecture
from models.config import GptOssConfig, read_config, released
from models.expert_share import check_division_of_experts
from models.memory_plan import GPU_SPECS, GpuSpec, table


def main(words: list[str]) -> int:
    if not words or "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    try:
        print(report(words))
    except ValueError as error:
        print_error("config error", str(error))
        return CONFIG_ERROR
    return 0


def report(words: list[str]) -> str:
    """What the command prints. Raises ValueError where the run does not fit, and for bad keys."""
    refuse_repeats([word for word in words if word.startswith(("gpu=", "gpus=", "prompt_tokens="))])
    own = dict(word.split("=", 1) for word in words if word.startswith(("gpu=", "gpus=", "prompt_tokens=")))
    config = load_config("train", [word for word in words if word.partition("=")[0] not in own])
    gpu = parse_gpu(own.get("gpu"))
    num_gpus = parse_num_gpus(own.get("gpus"), config)
    architecture = architecture_of(config)
    check_division_of_experts(config.distributed.expert_parallel, architecture.num_local_experts)
    max_len = architecture.max_position_embeddings
    prompt_len = (parse_count(own["prompt_tokens"], below=max_len) if "prompt_tokens" in own
                  else prompt_len_of(config, max_len=max_len))
    half = torch.bfloat16 if gpu.has_tensor_cores else torch.float16
    dtype = {Dtype.float32: torch.float32, Dtype.float16: torch.float16}.get(config.dtype, half)
    needs = needs_of(config, architecture, prompt_len=prompt_len, dtype=dtype, num_processes=num_gpus)
    plan = make_plan(needs, gpu, config.model, host_bytes=UNLIMITED)
    lengths = f"prompts of up to {prompt_len} tokens, completions of up to {config.rollout.max_new_tokens}"
    where = own["gpu"] if num_gpus == 1 else f"each of {num_gpus} {own['gpu']}"
    return "\n".join([f"{config.model.path or 'from scratch'}, experts {needs.experts}, on {where}; {lengths}",
                      table(plan, needs)])


def parse_gpu(name: str | None) -> GpuSpec:
    known = f"gpu=NAME with one of {', '.join(GPU_SPECS)}, or a number of GB (1e9 bytes)"
    if name is None:
        raise ConfigError(f"gpu: required; give {known}")
    if name in GPU_SPECS:
        return GPU_SPECS[name]
    try:
        size = float(name)
    except ValueError:
        size = 0.0
    if not 0 < size < 1000:
        hint = f"; {name} GB is no GPU's: if that is its name, give its memory" if size >= 1000 else ""
        raise ConfigError(f"gpu = {name!r}: give {known}{hint}")
    return replace(GPU_SPECS["L4"], num_bytes=int(1e9 * size), bandwidth=1e12)


def parse_num_gpus(text: str | None, config: TrainConfig) -> int:
    """How many GPUs train together. Raises ConfigError where so many cannot."""
    if text is not None and not (text.isdecimal() and int(text)):
        raise ConfigError(f"gpus = {text!r}: must be a number of GPUs, at least 1")
    check_shards(config)
    if text is None and config.distributed.shard:
        raise ConfigError("distributed.shard = True: give gpus=N, the number of GPUs that divide the model")
    num_gpus = config.distributed.expert_parallel if text is None else int(text)
    check_division(config, num_gpus)
    check_sharing(config, num_gpus)
    return num_gpus


def parse_count(text: str, *, below: int) -> int:
    if not text.isdecimal() or not 0 < int(text) < below:
        raise ConfigError(f"prompt_tokens = {text!r}: must be a number of tokens, at least 1 and below {below}, "
                          "where the model's sequences end")
    return int(text)


def architecture_of(config: TrainConfig) -> GptOssConfig:
    """The sizes of the model, from config.json alone."""
    model: ModelConfig = config.model
    if model.path is None:
        return read_architecture(model, build_tokenizer(model, config.env))
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return read_config(folder if (folder / "config.json").exists() else folder / "original")
    return released(model.path) or read_config(hub_folder(model.path))


def hub_folder(name: str) -> Path:
    """The folder with the config.json of a repository of the hub."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:  # the hub's own kinds, and those of the network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model.path = {name!r}: the hub did not deliver its config.json ({reason}); give a folder with that "
                          "file") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
