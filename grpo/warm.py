"""Compiles the kernels of a run into Triton's cache, on all cores, so that its first step need not:

    python -m grpo.warm [gpu=H100] +experiment=gpt_oss_20b_lora [KEY=VALUE ...]

gpu: L4, 4090, A100-40, A100-80, H100, H200 or B200, which need not be here; by default the GPU that is. The other words are
those of grpo.train. Of a checkpoint config.json alone is read; the sizes of openai/gpt-oss-20b and -120b are known without it.
A run does the same by itself while it loads; it finds what was compiled here if Triton's cache (TRITON_CACHE_DIR, else
~/.triton/cache) and the versions of Triton, PyTorch and this program are the same.
"""
import sys

import torch

from grpo.config import ConfigError, Dtype
from grpo.configuration.command_line import refuse_repeats
from grpo.configuration.launch import CONFIG_ERROR, INTERRUPTED, load_config
from grpo.plan import architecture_of
from grpo.record.terminal import print_error
from grpo.run.compilation import Compilation, describe_failures, rehearsal_of
from grpo.run.memory import prompt_len_of
from models.rehearsal import GPUS, Gpu, can_rehearse, compile_beside, gpu_here


def main(words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    try:
        return warm(words)
    except ValueError as error:
        print_error("config error", str(error))
        return CONFIG_ERROR
    except KeyboardInterrupt:
        print_error("stopped", "what was compiled is kept; the same command goes on")
        return INTERRUPTED


def warm(words: list[str]) -> int:
    """Returns the exit code, 1 if a kernel could not be compiled. Raises ConfigError for bad keys."""
    refuse_repeats([word for word in words if word.startswith("gpu=")])
    gpu = chosen_gpu(next((word.removeprefix("gpu=") for word in words if word.startswith("gpu=")), None))
    config = load_config("train", [word for word in words if not word.startswith("gpu=")])
    dtype = {Dtype.float32: torch.float32, Dtype.float16: torch.float16}.get(config.dtype, torch.bfloat16)
    architecture = architecture_of(config)
    prompt_len = prompt_len_of(config, max_len=architecture.max_position_embeddings)
    plan = rehearsal_of(config, architecture, prompt_len=prompt_len, dtype=dtype)
    compilation = Compilation(compile_beside(plan, gpu))
    if compilation.process is None:
        print("all kernels are compiled")
        return 0
    seconds = compilation.wait(show, lambda: False)
    print(f"{max(0, compilation.num_compiled - len(compilation.failures))} kernels compiled, {seconds:.1f} s")
    if compilation.failures:
        print(describe_failures(compilation.failures), file=sys.stderr)
    return 1 if compilation.failures else 0


def show(done: int, count: int) -> None:
    if sys.stdout.isatty():
        print(f"\rcompiling kernels {done}/{count}", end="\n" if done == count else "", flush=True)
    elif done % 20 == 0 or done == count:
        print(f"compiling kernels {done}/{count}", flush=True)


def chosen_gpu(name: str | None) -> Gpu:
    if name is not None and name not in GPUS:
        raise ConfigError(f"gpu = {name!r}: give one of {', '.join(GPUS)}, or leave it out for the GPU of this machine")
    if name is None and not torch.cuda.is_available():
        raise ConfigError(f"gpu: torch sees none here; name the one to compile for: gpu={'|'.join(GPUS)}")
    gpu = gpu_here(torch.device("cuda", 0)) if name is None else GPUS[name]
    if not can_rehearse(gpu):
        raise ConfigError(f"gpu: of compute capability {gpu.capability / 10:.1f}, or GRPO_PRODUCTS is set: there the vendor's "
                          "library computes products, and little is compiled")
    return gpu


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
