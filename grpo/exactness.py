"""Whether the sampler's log-probs must be the trainer's bit for bit, and what to say where they were not.

T packed tokens of a micro-batch.
"""
from __future__ import annotations

import shlex
from pathlib import Path

import torch

from grpo.batch import Completion, RolloutBatch
from models.decoder import can_decode_by_graph
from models.gpt_oss import GptOss

_NONE = torch.iinfo(torch.int64).max


def is_exact(policy: GptOss, batch: RolloutBatch) -> bool:
    """Whether sampler and trainer are made to agree to the last bit on a batch, before the first update. On a GPU: a frozen base
    whose decode steps are captured (models/decoder.py), draws from the whole vocabulary, no recorded routing, not float16, whose
    logits are a library's. On the CPU: float32 on one thread, since with more a library's sum can depend on the rows' number."""
    if policy.device.type == "cuda":
        is_plain = batch.kept is None and batch.routing is None
        return is_plain and policy.dtype != torch.float16 and can_decode_by_graph(policy)
    return policy.dtype == torch.float32 and torch.get_num_threads() == 1


def differences(log_probs: torch.Tensor, micro: RolloutBatch) -> torch.Tensor:
    """[2] int64, on the device: how many of the trained tokens have another log-prob [T] than the sampler recorded, and which of
    the batch that was packed is the first (the largest integer where none)."""
    differs = micro.loss_mask & (log_probs.detach() != micro.sampler_log_probs)
    return torch.stack([differs.sum(), torch.where(differs, micro.token_index, _NONE).min()])


def describe_mismatch(found: list[torch.Tensor], batch: RolloutBatch, completions: list[Completion], *, step: int, largest: float,
                      run_dir: Path) -> str | None:
    """The warning for what `differences` found in the micro-batches of a batch packed from `completions`; None where it found
    nothing. largest: of the differences, nats."""
    counts, firsts = torch.stack(found).cpu().unbind(1)
    if not counts.any():
        return None
    place = int(firsts.min())
    row = int(batch.sequence_ids[place])
    completion, position = completions[row], place - int(batch.cu_seqlens[row])
    return (
        f"warning: in step {step} the sampler's log-probs are not the trainer's, which they must be on policy: "
        f"{int(counts.sum()):,} of {batch.num_completion_tokens:,} tokens differ, by {largest:.3g} nats at most. The first is at "
        f"position {position} of prompt {completion.prompt.id}, sample {completion.sample} (its prompt has "
        f"{len(completion.prompt.token_ids)} tokens). Said once a run; sampling/log_prob_diff is logged in every step. The layer "
        f"and the operation are found by\n  python scripts/explain_mismatch.py --run {shlex.quote(str(run_dir))}")
