"""What a run will launch, found out without weights and without a GPU: a model on "meta" goes through the passes of rollout and
training, one layer of each kind, while launches are recorded (kernels/ahead.py).

What a kernel is compiled for depends on a batch only through thresholds on its numbers of tokens and rows, so a few lengths stand
for all. tests/test_models/test_rehearsal.py compares them with many others.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kernels.ahead import Recording, Variant
from kernels.device import Gpu
from models.config import GptOssConfig
from models.decoder import BUCKETS, Decoder, PlainDraw, bucket_of
from models.gpt_oss import GptOss
from models.keys import PrefillChunk
from models.kv_cache import PAGE_TOKENS
from models.lora import LoraConfig, attach_lora, set_full_training
from models.offload import SCRATCH_BYTES, LayerPlan, Place, TrainingPass, everything

# tokens of a prefill: at least one length between any two thresholds of few rows (kernels/device.py: MAX_FEW_ROWS) and of many
_FEW_TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 88, 128, 184, 256, 360, 512)
_MANY_TOKENS = (600, 2000)
# tokens of a micro-batch
_TRAINED_TOKENS = (100, 600, 2000, 8192)


@dataclass
class Rehearsal:
    """The settings of a run that decide what it launches."""

    config: GptOssConfig
    dtype: torch.dtype
    experts: str  # one of models/experts.py's FORMATS
    lora: LoraConfig | None  # None: everything trains
    activation_checkpointing: bool
    max_rows: int  # decoded at once
    max_len: int  # tokens of a sequence
    num_stop_ids: int
    draws: list[PlainDraw]
    shares_prompts: bool
    scores: bool  # log-probs without gradient: of a reference, or before several updates


def variants(plan: Rehearsal, gpu: Gpu) -> list[Variant]:
    """What the run compiles on this GPU, in the order of its launches."""
    recording = Recording(gpu)
    with recording.on():
        rehearse(build(plan), plan)
    return recording.variants()


def build(plan: Rehearsal) -> GptOss:
    """The model on "meta", with one layer of each kind. Launches must be recorded."""
    kinds = sorted(set(plan.config.layer_types), reverse=True)
    config = replace(plan.config, num_hidden_layers=len(kinds), layer_types=kinds)
    model = GptOss(config, dtype=plan.dtype, device="meta", experts=plan.experts)
    for block in model.model.layers:
        block.mlp.experts.arrange()
    if plan.lora is None:
        set_full_training(model)
    else:
        attach_lora(model, plan.lora, seed=0)
    return model


def rehearse(model: GptOss, plan: Rehearsal) -> None:
    """Launches all that the run will."""
    rehearse_rollout(model, plan)
    rehearse_training(model, plan)
    if plan.config.num_local_experts > 32:  # fewer experts are dequantised at once where memory is short
        rehearse_training(model, plan, scratch_bytes=SCRATCH_BYTES // 2)


def rehearse_rollout(model: GptOss, plan: Rehearsal, *, few: tuple[int, ...] = _FEW_TOKENS,
                     many: tuple[int, ...] = _MANY_TOKENS) -> None:
    """Prefill and decode steps of every number of rows that a rollout can have."""
    cache = model.new_cache(plan.max_rows + 1, plan.max_len, num_pages=1 + max(many) // PAGE_TOKENS)
    decoder = Decoder(model, cache, max_rows=plan.max_rows, stop_ids=[0] * plan.num_stop_ids,
                      counts_prompts_apart=plan.shares_prompts)
    for num_tokens in (*few, *many):
        end = min(num_tokens, plan.max_len)
        cache.reserve(0, end)
        chunks = [PrefillChunk(0, 0, end, end if plan.shares_prompts else 0)]
        model.prefill(torch.zeros(end, dtype=torch.int64, device="meta"), chunks, cache)
    for num_rows in sorted({bucket for bucket in BUCKETS if bucket < plan.max_rows} | {bucket_of(plan.max_rows)}):
        for draw in plan.draws:
            decoder.rehearse(num_rows, draw, longest=plan.max_len)


class _Memory:
    """Plans the same for every batch, as models/offload.py: MemoryBudget plans by what is free."""

    def __init__(self, layers: list[LayerPlan], scratch_bytes: int) -> None:
        self.layers, self.scratch_bytes = layers, scratch_bytes

    def plan(self, *_, dtype: torch.dtype, is_packed: bool, rank: int) -> TrainingPass:
        return TrainingPass(self.layers, self.scratch_bytes, 0, None, lambda device: None)

    def before_backward(self, grad: torch.Tensor) -> None:
        pass


def rehearse_training(model: GptOss, plan: Rehearsal, *, lengths: tuple[int, ...] = _TRAINED_TOKENS,
                      scratch_bytes: int = SCRATCH_BYTES) -> None:
    """Forward and backward of micro-batches, with activations kept and computed again."""
    prefixes = [-1, 0, 0] if plan.shares_prompts else None
    for place in (Place.gpu, Place.recompute)[:1 + plan.activation_checkpointing]:
        model.memory = _Memory([everything(place)] * len(model.model.layers), scratch_bytes)
        for length in lengths:
            bounds = torch.tensor([0, length // 4, length // 2, length])
            mask = torch.ones(length, dtype=torch.bool)
            mask[bounds[:1 if plan.shares_prompts else -1]] = False
            tokens = torch.zeros(length, dtype=torch.int64, device="meta")
            settings = {"temperature": 1.0, "mask": mask, "prefixes": prefixes}
            model.log_probs(tokens, bounds, **settings)[0].sum().backward()
            if plan.scores:
                with torch.no_grad():
                    model.log_probs(tokens, bounds, **settings)
