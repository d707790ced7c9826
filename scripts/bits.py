"""What a change must leave alone: the bits of one rollout and one training step, and how fast they are, as one JSON line.

    python scripts/bits.py --checkpoint /dev/shm/gpt-oss-20b > after.json
    git worktree add ../before COMMIT && cp scripts/bits.py ../before/scripts && cd ../before && python scripts/bits.py ...

Samples 64 completions of mixed lengths (random prompts; random stop ids end them) with an adapter on attention and experts, then
takes the gradient of a policy loss over them. tokens, log_probs and gradients are SHA-256: equal ones are equal to the last bit.
max_log_prob_diff is the largest difference between sampler and trainer, nats. Rates are those of a second time; first_step_s is
the first rollout and the first gradient, kernels compiled or read from Triton's cache. Older commits run it too: it needs little
of the product, and looks where that was before.
"""

import argparse
import hashlib
import importlib
import json
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.batch import Prompt  # noqa: E402
from models.lora import LoraConfig, attach_lora  # noqa: E402

MAX_TOKEN = 199_998  # control tokens start here


def find(name: str, *modules: str):
    """What the first of the modules that has it calls so."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return None


def sha256(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(checkpoint: Path, device: str, dtype: torch.dtype):
    policy = find("load_model", "models.formats.hugging_face", "models.checkpoint")(checkpoint, device=device, dtype=dtype)
    attach_lora(policy, LoraConfig(rank=16, alpha=32.0, targets=["q_proj", "k_proj", "v_proj", "o_proj", "experts"]), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(policy.trainable_parameters().items()):
            if name.endswith("lora_B"):
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    return policy


def timed(function):
    """The function's result, and its seconds."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def sample(policy, *, count: int, prompt_lens: tuple[int, int], max_new_tokens: int):
    """A function that samples: the same completions at each call."""
    draw, vocab, (low, high) = random.Random(0), min(policy.config.vocab_size, MAX_TOKEN), prompt_lens
    prompts = [Prompt(i, [draw.randrange(vocab) for _ in range(round(low * (high / low) ** draw.random()))], {})
               for i in range(count)]
    stop_ids = draw.sample(range(vocab), max(1, round(vocab / (0.4 * max_new_tokens))))
    sampler = find("Sampler", "grpo.rollout.session", "grpo.rollout")(policy, stop_ids, max_batch=24, seed=0,
                                                                      max_len=high + max_new_tokens)
    params = find("SamplingParams", "grpo.rollout.sampling")
    if params is None:
        return lambda: sampler.generate(prompts, step=0, num_samples=1, max_new_tokens=max_new_tokens, temperature=1.0)
    return lambda: sampler.generate(prompts, params(max_new_tokens=max_new_tokens), step=0, num_samples=1)


def num_tokens(completion) -> int:
    return len(completion.prompt.token_ids) + len(completion.completion_ids)


def train(policy, completions: list, micro_batch: int) -> tuple[list[torch.Tensor], float]:
    """Gradients of the adapter, by name, with advantages of either sign; and the largest difference of log-probs."""
    parameters, worst = policy.trainable_parameters(), 0.0
    for parameter in parameters.values():
        parameter.grad = None
    for start in range(0, len(completions), micro_batch):
        part = completions[start:start + micro_batch]
        tokens = torch.tensor([token for one in part for token in one.prompt.token_ids + one.completion_ids])
        bounds = torch.tensor([0, *map(num_tokens, part)]).cumsum(0).int()
        recorded = torch.tensor([value for one in part
                                 for value in [0.0] * len(one.prompt.token_ids) + one.segments[1].log_probs])
        mask = torch.tensor([i >= len(one.prompt.token_ids) for one in part for i in range(num_tokens(one))])
        advantages = torch.tensor([one.prompt.id % 2 - 0.5 for one in part]).repeat_interleave(bounds.diff()) * mask
        log_probs, _ = policy.log_probs(tokens.to(policy.device), bounds, temperature=1.0, mask=mask)
        worst = max(worst, (log_probs.detach().cpu() - recorded)[mask].abs().max().item())
        (-(log_probs * advantages.to(policy.device)).sum() / len(completions)).backward()
    return [parameters[name].grad for name in sorted(parameters)], worst


def measure(policy, *, count: int = 64, prompt_lens: tuple[int, int] = (16, 1500), max_new_tokens: int = 1024,
            micro_batch: int = 8) -> dict:
    rollout = sample(policy, count=count, prompt_lens=prompt_lens, max_new_tokens=max_new_tokens)
    _, first_rollout = timed(rollout)
    completions, rollout_s = timed(rollout)
    _, first_gradient = timed(lambda: train(policy, completions, micro_batch))
    (gradients, worst), train_s = timed(lambda: train(policy, completions, micro_batch))
    drawn = [completion.completion_ids for completion in completions]
    lengths = [len(ids) for ids in drawn]
    return {"tokens": sha256([torch.tensor(ids) for ids in drawn]),
            "log_probs": sha256([torch.tensor(completion.segments[1].log_probs) for completion in completions]),
            "gradients": sha256(gradients), "max_log_prob_diff": worst, "completions": len(completions),
            "num_tokens": sum(lengths), "min_len": min(lengths), "max_len": max(lengths),
            "decode_tokens_per_s": round(sum(lengths) / rollout_s),
            "train_tokens_per_s": round(sum(map(num_tokens, completions)) / train_s),
            "first_step_s": round(first_rollout + first_gradient, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a gpt-oss checkpoint")
    checkpoint, is_cuda = parser.parse_args().checkpoint, torch.cuda.is_available()
    policy = load(checkpoint, *(("cuda", torch.bfloat16) if is_cuda else ("cpu", torch.float32)))
    print(json.dumps(measure(policy) | {"gpu": torch.cuda.get_device_name() if is_cuda else "cpu", "torch": torch.__version__}))


if __name__ == "__main__":
    main()
