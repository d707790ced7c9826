"""How far the sampler's log-probs may be from the trainer's, and the warning if they are farther.

T packed tokens of a micro-batch.
"""
import math
import shlex
from pathlib import Path

import torch

from grpo.batch import Completion, RolloutBatch
from models.decoder import can_decode_by_graph
from models.gpt_oss import GptOss

FLOAT32_ROUNDING = 1e-3  # nats; seen: 4e-6
_NONE = torch.iinfo(torch.int64).max


def allowed_difference(policy: GptOss) -> float:
    """The largest difference, in nats, that sampler and trainer may have before the first update; infinity if none is known. 0
    on a GPU if the kernels promise it: for a model whose decode steps are captured (models/decoder.py), except in float16, whose
    residual stream those kernels do not serve."""
    if policy.device.type == "cuda" and policy.dtype != torch.float16 and can_decode_by_graph(policy):
        return 0.0
    return FLOAT32_ROUNDING if policy.dtype == torch.float32 else math.inf


def differences(log_probs: torch.Tensor, micro: RolloutBatch, *, allowed: float) -> torch.Tensor:
    """[2] int64, on the device: the number of trained tokens whose log-prob [T] is farther than `allowed` from the sampler's,
    and the index of the first one in the packed batch (the largest integer if there is none)."""
    differs = micro.loss_mask & ((log_probs.detach() - micro.sampler_log_probs).abs() > allowed)
    return torch.stack([differs.sum(), torch.where(differs, micro.token_index, _NONE).min()])


def describe_mismatch(found: list[torch.Tensor], batch: RolloutBatch, completions: list[Completion], *, step: int,
                      largest: float, allowed: float, run_dir: Path) -> str | None:
    """The warning for what `differences` found in the micro-batches of a batch packed from `completions`; None if it found
    nothing. largest: the largest difference, in nats."""
    counts, firsts = torch.stack(found).cpu().unbind(1)
    if not counts.any():
        return None
    place = int(firsts.min())
    row = int(torch.searchsorted(batch.cu_seqlens, place, right=True)) - 1
    completion, position = completions[batch.owners[row]], place - int(batch.cu_seqlens[row])
    return (
        f"warning: in step {step} the sampler's log-probs are not the trainer's, as on policy they must be: "
        f"{int(counts.sum()):,} of {batch.num_policy_tokens:,} tokens differ, by up to {largest:.3g} nats where {allowed:g} "
        f"is allowed. The first is at position {position} of prompt {completion.prompt.id}, sample {completion.sample} (its "
        f"prompt has {len(completion.prompt.token_ids)} tokens). Said once a run; sampling/log_prob_diff is logged every step. "
        f"The layer and the operation are found by\n  python scripts/explain_mismatch.py --run {shlex.quote(str(run_dir))}")
