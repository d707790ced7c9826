"""What a run will launch, found out without weights and without a GPU: a model on "meta" goes through the passes of rollout and
training, one layer of each kind, while launches are recorded (kernels/ahead.py).

compile_beside() starts a process that rehearses and compiles, on all cores, while this one loads the weights.

What a kernel is compiled for depends on a batch only through thresholds on its numbers of tokens and rows, so a few lengths stand
for all. tests/test_models/test_rehearsal.py compares them with many others.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kernels import ahead
from kernels.ahead import KernelVariant, Recording
from kernels.device import Gpu, gpu_of_device, take_compilations
from kernels.embedding import gather_rows
from kernels.head.log_probs import log_probs
from models.adam_state import AdamState, gradient_dtype
from models.config import GptOssConfig
from models.decoder import BUCKETS, Decoder, PlainDraw, bucket_of
from models.expert_share import ExpertShare
from models.gpt_oss import GptOss, HeadStates, KeptSets
from models.keys import MOST_CHUNKS, PrefillChunk
from models.kv_cache import PAGE_TOKENS
from models.lora import LoraConfig, attach_lora, set_full_training
from models.offload import SCRATCH_BYTES, LayerPlan, Place, TrainingPass, everything

# tokens of a prefill: at least one length between any two thresholds of few rows (kernels/device.py: MAX_FEW_ROWS) and of many
_FEW_TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 88, 128, 184, 256, 360, 512)
_MANY_TOKENS = (600, 2000)
# tokens of a micro-batch
_TRAINED_TOKENS = (100, 600, 2000, 8192)


# by the names of models/memory_plan.py: GPU_SPECS
GPUS = {"T4": Gpu(75, 40), "L4": Gpu(89, 58), "4090": Gpu(89, 128), "A100-40": Gpu(80, 108), "A100-80": Gpu(80, 108),
        "H100": Gpu(90, 132), "H200": Gpu(90, 132), "B200": Gpu(100, 148)}


@dataclass
class Rehearsal:
    """The settings of a run that decide what it launches."""

    config: GptOssConfig
    dtype: torch.dtype
    experts: str  # one of models/experts.py's FORMATS
    lora: LoraConfig | None  # None: everything trains
    activation_checkpointing: bool
    max_rows: int  # decoded at once
    max_len: int  # tokens of a sequence that the cache has room for
    draws: list[PlainDraw]
    filters: bool  # draws from a part of the vocabulary, too
    shares_prompts: bool
    scores: bool  # log-probs without gradient: of a reference, or before several updates
    moments: str = "fp32"  # how the optimizer keeps its state (models/adam_state.py)
    weights: str = "master"
    full_kl: bool = False  # the KL to a reference over the whole vocabulary
    entropy_loss: bool = False  # the loss has the entropy's gradient, at least in some steps
    num_sharers: int = 1  # processes that hold the experts together


def variants(plan: Rehearsal, gpu: Gpu) -> list[KernelVariant]:
    """What the run compiles on this GPU, in the order of its launches."""
    recording = Recording(gpu)
    with recording.on():
        rehearse(build(plan), plan)
    return recording.variants()


def build(plan: Rehearsal) -> GptOss:
    """The model on "meta", with one layer of each kind. Launches must be recorded."""
    kinds = sorted(set(plan.config.layer_types), reverse=True)
    config = replace(plan.config, num_hidden_layers=len(kinds), layer_types=kinds)
    share = None if plan.num_sharers == 1 else ExpertShare(0, plan.num_sharers, lambda rows: None)
    model = GptOss(config, dtype=plan.dtype, device="meta", experts=plan.experts, share=share)
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
    if plan.entropy_loss:
        rehearse_entropy(model)
    if plan.moments != "fp32":  # the others' operations are PyTorch's
        rehearse_update(model, plan)


def rehearse_update(model: GptOss, plan: Rehearsal) -> None:
    """The optimizer's update of every trained parameter."""
    params = model.trainable_parameters()
    state = AdamState(params, plan.moments, plan.weights, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, seed=0, on_host=False,
                      in_order=True, starts={})
    for index, piece in enumerate(state.pieces):
        param = params[piece.name]
        grad = torch.empty_like(param, dtype=gradient_dtype(param.dtype, plan.weights))
        state.update(index, grad, lr=1.0, scale=1.0, num_updates=1)


def rehearse_entropy(model: GptOss) -> None:
    """The gradients of log-probs and entropy together; the other gradients are those of every training."""
    weight = model.lm_head.weight
    hidden = torch.empty(128, weight.shape[1], dtype=weight.dtype, device="meta", requires_grad=True)
    tokens = torch.zeros(128, dtype=torch.int64, device="meta")
    sum(log_probs(hidden, weight, tokens, temperature=1.0, has_entropy_loss=True)).sum().backward()


def rehearse_rollout(model: GptOss, plan: Rehearsal, *, few: tuple[int, ...] = _FEW_TOKENS,
                     many: tuple[int, ...] = _MANY_TOKENS) -> None:
    """Prefill and decode steps of every number of rows that a rollout can have."""
    max_len = plan.max_len
    num_slots = max(plan.max_rows, -(-max((*few, *many)) // max_len)) + 1
    cache = model.new_cache(num_slots, max_len, num_pages=num_slots + max((*few, *many)) // PAGE_TOKENS)
    decoder = Decoder(model, cache, max_rows=plan.max_rows, stop_ids=[0],
                      counts_prompts_apart=plan.shares_prompts)
    for num_tokens in (*few, *many):
        ends = [max_len] * (num_tokens // max_len) + [num_tokens % max_len] * (num_tokens % max_len > 0)
        chunks = [PrefillChunk(slot, 0, end, end if plan.shares_prompts else 0) for slot, end in enumerate(ends)]
        model.prefill(torch.zeros(num_tokens, dtype=torch.int64, device="meta"), chunks, cache)
    for num_tokens, length in itertools.product(many, (400, 30) if max_len > 1 else ()):  # few and many short chunks
        parts = torch.empty(num_tokens).split(min(length, max_len - 1))[:MOST_CHUNKS]
        chunks = [PrefillChunk(0, 1, 1 + len(part), int(plan.shares_prompts)) for part in parts]
        model.prefill(torch.zeros(sum(map(len, parts)), dtype=torch.int64, device="meta"), chunks, cache)
    for num_rows in sorted({bucket for bucket in BUCKETS if bucket < plan.max_rows} | {bucket_of(plan.max_rows)}):
        for draw in plan.draws or [PlainDraw(1.0, True)]:
            decoder.rehearse(num_rows, draw, longest=plan.max_len)
    gather_rows(torch.zeros(8, dtype=torch.int64, device="meta"), model.model.embed_tokens.weight)  # it may be in host memory
    if plan.filters:
        rehearse_filters(model, plan.max_rows)


def rehearse_filters(model: GptOss, max_rows: int) -> None:
    """Draws from a part of the vocabulary, and the log-probs and gradients of what was drawn."""
    weight = model.lm_head.weight
    for num_rows in (*(1 << bits for bits in range(max_rows.bit_length())), max_rows):
        model.head(torch.empty(num_rows, weight.shape[1], dtype=weight.dtype, device="meta"))
    hidden = torch.empty(max_rows, weight.shape[1], dtype=weight.dtype, device="meta", requires_grad=True)
    tokens, offsets = (torch.zeros(count, dtype=torch.int64, device="meta") for count in (max_rows, max_rows + 1))
    kept = KeptSets(torch.zeros(64, dtype=torch.int32, device="meta"), offsets)
    model.score(hidden, tokens, temperature=1.0, kept=kept)
    log_probs(hidden, weight, tokens, temperature=1.0, kept_ids=kept.ids, kept_offsets=kept.offsets)[0].sum().backward()


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
            reference = None
            if plan.full_kl:
                head = model.lm_head.weight  # the reference's own, if it trains
                states = torch.empty(int(mask.sum()), head.shape[1], dtype=head.dtype, device="meta")
                reference = HeadStates(states, torch.empty_like(head) if head.requires_grad else head)
            scores = model.scores(tokens, bounds, **settings, reference=reference)
            sum(values.sum() for values in (scores.log_probs, scores.kl) if values is not None).backward()
            if plan.scores:
                with torch.no_grad():
                    model.log_probs(tokens, bounds, **settings)


# ---- compiled by another process


def can_rehearse(gpu: Gpu) -> bool:
    """Whether Triton computes products there (kernels/device.py: product_path)."""
    return gpu.capability >= 80 and not os.environ.get("GRPO_PRODUCTS")


def gpu_here(device: torch.device) -> Gpu:
    return gpu_of_device(device)


def compiled_meanwhile() -> list[tuple[str, float]]:
    """The kernels that launches of this process compiled since the last call, each with its seconds."""
    return take_compilations()


def _list_file(plan: Rehearsal, gpu: Gpu) -> Path:
    """Where the list of what was compiled for this plan is kept: in Triton's cache, until sources or compiler change."""
    digest = hashlib.sha256(repr((plan, gpu, torch.__version__, ahead.compiler())).encode())
    for folder in (Path(__file__).parent, Path(ahead.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return ahead.cache_folder() / f"rehearsed-{digest.hexdigest()[:32]}.json"


def is_compiled(plan: Rehearsal, gpu: Gpu) -> bool:
    """Whether everything of an earlier rehearsal of the same is still in Triton's cache; takes some milliseconds."""
    try:
        return all(ahead.is_cached(*pair) for pair in json.loads(_list_file(plan, gpu).read_text()))
    except (OSError, ValueError):
        return False


def compile_beside(plan: Rehearsal, gpu: Gpu) -> subprocess.Popen | None:
    """Starts a process that compiles what the run will launch; None if all is compiled. Its output is a line of JSON for each
    kernel that it has compiled, [done, all], and at the end the list of what went wrong."""
    if is_compiled(plan, gpu):
        return None
    # its own session: Ctrl-C is for the run. No GPU: forked processes could not use it
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "-c", f"from {__name__} import serve; serve()"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, bufsize=0, start_new_session=True, env=environment)
    pickle.dump((plan, gpu), process.stdin)
    process.stdin.close()
    return process


def serve() -> None:
    """What that process does."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print is no report

    def report(message: object) -> None:
        print(json.dumps(message), file=output, flush=True)

    plan, gpu = pickle.load(sys.stdin.buffer)
    found = variants(plan, gpu)
    try:
        failures = ahead.compile_all(found, num_processes=len(os.sched_getaffinity(0)), progress=lambda *counts: report(counts))
        if not failures:
            _list_file(plan, gpu).write_text(json.dumps([(variant.name, variant.cache_key()) for variant in found]))
    except OSError as error:
        failures = [f"Triton's cache, {ahead.cache_folder()}: {error.strerror}; TRITON_CACHE_DIR names another folder"]
    report(failures)
