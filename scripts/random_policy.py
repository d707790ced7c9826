"""A policy and prompts for measuring: a checkpoint with an adapter as in the middle of a run, and random tokens."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.batch import Prompt  # noqa: E402
from models.formats.hugging_face import load_model  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402
from models.lora import LoraConfig, attach_lora  # noqa: E402

TARGETS = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
           "all": ["q_proj", "k_proj", "v_proj", "o_proj", "experts"]}
MAX_TOKEN = 199_998  # control tokens start here


def load_policy(checkpoint: Path, *, lora: str, rank: int = 16, host_gb: float = 0.0, device: str = "cuda",
                dtype: torch.dtype = torch.bfloat16) -> GptOss:
    """The model with an adapter on one of TARGETS, whose B is not zero, so that A has a gradient too; without one at rank 0."""
    policy = load_model(checkpoint, device=device, dtype=dtype, host_gb=host_gb)
    if rank:
        attach_random_lora(policy, lora, rank)
    return policy


def attach_random_lora(policy: GptOss, lora: str, rank: int) -> None:
    attach_lora(policy, LoraConfig(rank=rank, alpha=2.0 * rank, targets=TARGETS[lora]), seed=0)
    generator = torch.Generator(policy.device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.01, generator=generator)


def random_prompts(policy: GptOss, lengths: list[int], *, seed: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [Prompt(i, torch.randint(0, num_tokens(policy), (length,), generator=generator).tolist(), {})
            for i, length in enumerate(lengths)]


def num_tokens(policy: GptOss) -> int:
    """The tokens of the vocabulary that are not control tokens."""
    return min(policy.config.vocab_size, MAX_TOKEN)


def set_memory(policy: GptOss, memory_gb: float | None) -> None:
    """From now on the policy trains within so much GPU memory (1e9 bytes), or recomputes nothing."""
    policy.memory.recomputes, policy.memory.memory_gb = memory_gb is not None, memory_gb
