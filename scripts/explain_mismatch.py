"""Finds where the log-prob recorded while sampling parts from the trainer's: the first token, layer and operation.

    python scripts/explain_mismatch.py --checkpoint FOLDER --lora-rank 16 --prompt-lens 16 220 700 --max-new-tokens 256
    python scripts/explain_mismatch.py --run runs/NAME          # its newest checkpoint, its prompts and settings

Samples completions, takes the log-probs of all their tokens from the training forward, and compares them bit for bit. Where one
differs, both paths run again on that completion: the sampler's as prefill of the prompt and a decode step per recorded token,
beside the other completions of its batch, but without CUDA graphs and with LoRA's x A^T in launches of its own (in a rollout the
launches of W compute it); the trainer's on the same micro-batch. Every operation's result is noted in the functions that the
product itself calls, and compared row by row. Prints where the first difference is and a table of the operations of that layer at
that token. Exit code: 0 where no log-prob differs, else 1.
"""
from __future__ import annotations

import argparse
import os
import sys
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from random_policy import load_policy, random_prompts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo.rollout.sampling  # noqa: E402
import kernels.experts.few_rows  # noqa: E402
import kernels.experts.forward  # noqa: E402
import kernels.head.draw  # noqa: E402
import kernels.linear  # noqa: E402
import models.block  # noqa: E402
import models.keys  # noqa: E402
from grpo.batch import Completion, Prompt, RolloutBatch, micro_batches, pack  # noqa: E402
from grpo.config import ConfigError, read_saved_config  # noqa: E402
from grpo.environment import make_environment  # noqa: E402
from grpo.rollout.sampling import SamplingParams, choose, filtered_log_probs  # noqa: E402
from grpo.rollout.session import Sampler  # noqa: E402
from grpo.run.checkpoint import load_run  # noqa: E402
from grpo.run.policy import build_model, load_parameters  # noqa: E402
from grpo.update import make_replay  # noqa: E402
from kernels.experts.sorting import Routing  # noqa: E402
from kernels.head.advance import IDLE  # noqa: E402
from models.chat.tokenizer import Tokenizer  # noqa: E402
from models.decoder import bucket_of, can_decode_by_graph  # noqa: E402
from models.experts import RoutedExperts  # noqa: E402
from models.formats.files import CheckpointError  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402
from models.keys import PrefillChunk  # noqa: E402

LOG_PROB = "log-prob of the next token"


# ------------------------------------------------------------------------------------------------------------------- recording


class Recorder:
    """Rows of the results of operations, by layer (the head counts as one more) and operation, in the order they come in.

    The methods note_... take the result, the arguments and the keywords of a call of the function that they are named after.
    Shapes: T rows of a model call, R routed rows, A experts per token."""

    def __init__(self, model: GptOss) -> None:
        self.head = len(model.model.layers)
        self.rows: torch.Tensor | None = None  # of the model call under way that are of interest, by position
        self.found: dict[tuple[int, str], list[torch.Tensor]] = {}
        self.layer, self.routing, self.low_rank = self.head, None, None  # of the call under way

    def keep(self, operation: str, value: torch.Tensor) -> None:
        """value [T, ...]"""
        self.keep_rows(operation, value.detach()[self.rows])

    def keep_routed(self, operation: str, value: torch.Tensor) -> None:
        """value [R, ...] in expert order; kept as [rows, A, ...]."""
        self.keep_rows(operation, value.detach()[self.routing.inverse[self.rows].long()])

    def keep_rows(self, operation: str, rows: torch.Tensor) -> None:
        self.found.setdefault((self.layer, operation), []).append(rows.clone())

    def keep_log_probs(self, values: torch.Tensor) -> None:
        self.layer = self.head
        self.keep_rows(LOG_PROB, values)

    def note_input(self, layer: int, _, arguments: tuple) -> None:
        self.layer = layer
        self.keep("input", arguments[0])

    def note_output(self, operation: str, _, __, result: torch.Tensor) -> None:
        self.layer = self.head if operation == "final norm" else self.layer
        self.keep(operation, result)

    def note_add_norm(self, result: tuple[torch.Tensor, ...], *_, **__) -> None:
        self.keep("stream after attention", result[1])
        self.keep("post-attention norm", result[0])

    def hold_low_rank(self, result: torch.Tensor, *_, **__) -> None:
        self.low_rank = result

    def note_linear(self, result: tuple[torch.Tensor, torch.Tensor | None], modules: list, *_, **__) -> None:
        name = "o_proj" if len(modules) == 1 else "queries, keys and values"
        low_rank = self.low_rank if result[1] is None else result[1]
        if low_rank is not None:
            self.keep(f"low-rank rows of {name}", low_rank)
        self.keep(name, result[0])
        self.low_rank = None

    def note_rotated(self, result: tuple[torch.Tensor, torch.Tensor, torch.Tensor], *_, **__) -> None:
        for operation, value in zip(("rotated queries", "rotated keys", "values"), result):
            self.keep(operation, value)

    def note_rotate_and_write(self, _, *in_place, **__) -> None:
        self.note_rotated(in_place[:3])

    def note_attend(self, result: torch.Tensor, *_, **__) -> None:
        self.keep("attention", result)

    def note_route(self, result: tuple[torch.Tensor, Routing], *_, **__) -> None:
        self.routing = result[1]
        self.keep("chosen experts", result[1].indices)
        self.keep("gate weights", result[0])

    def note_route_few(self, result: tuple[torch.Tensor, torch.Tensor, Routing], *_, **__) -> None:
        self.keep("router logits", result[0])
        self.note_route(result[1:])

    def note_experts_project(self, result: torch.Tensor, _, name: str, *__) -> None:
        self.keep_routed({"gate_up_proj": "gate and up", "down_proj": "down"}[name], result)

    def note_experts_low_rank(self, result: torch.Tensor, *_, scale: float | None = None, gather: torch.Tensor | None = None,
                              **__) -> None:
        if scale is not None:
            self.keep_routed("low-rank rows of " + ("down" if gather is None else "gate_up"), result)

    def note_experts(self, result: torch.Tensor, *_, scale: float | None = None, swiglu: tuple | None = None, **__) -> None:
        if scale is None:
            self.keep_routed("down" if swiglu is None else "activation of gate_up", result)


def watched(function: Callable, note: Callable) -> Callable:
    def call(*arguments, **settings):
        result = function(*arguments, **settings)
        note(result, *arguments, **settings)
        return result

    return call


@contextmanager
def observed(model: GptOss, recorder: Recorder) -> Iterator[None]:
    """Inside, what the model computes goes to the recorder. Nothing in the product knows of it: functions and methods of modules
    are replaced, and hooks are added."""
    block, keys, few_rows, forward = models.block, models.keys, kernels.experts.few_rows, kernels.experts.forward
    notes = [
        (block.RMSNorm, "add", recorder.note_add_norm), (block, "linear", recorder.note_linear),
        (block, "route", recorder.note_route), (block, "route_few", recorder.note_route_few),
        (keys, "rotated", recorder.note_rotated), (keys, "rotate_and_write", recorder.note_rotate_and_write),
        (kernels.linear, "low_rank_rows", recorder.hold_low_rank), (RoutedExperts, "project", recorder.note_experts_project),
        (forward, "grouped_gemm", recorder.note_experts_low_rank), (forward, "_project", recorder.note_experts),
        (few_rows, "low_rank_rows", recorder.note_experts_low_rank), (few_rows, "decode_projection", recorder.note_experts),
        *((owner, "attend", recorder.note_attend)
          for owner in (keys.PackedKeys, keys.PromptKeys, keys.CachedKeys)),
    ]  # fmt: skip
    modules = [(model.model.norm, "final norm")]
    for layer in model.model.layers:
        modules += [(layer.input_layernorm, "input norm"), (layer.mlp.router, "router logits"), (layer, "block output")]
    with ExitStack() as stack:
        for owner, name, note in notes:
            stack.enter_context(patch.object(owner, name, watched(getattr(owner, name), note)))
        for index, layer in enumerate(model.model.layers):
            stack.callback(layer.register_forward_pre_hook(partial(recorder.note_input, index)).remove)
        for module, operation in modules:
            stack.callback(module.register_forward_hook(partial(recorder.note_output, operation)).remove)
        yield


# ------------------------------------------------------------------------------------------------------------------ both paths


@dataclass
class Settings:
    num_samples: int
    params: SamplingParams
    max_batch: int
    max_tokens: int  # of a micro-batch
    shares_prompts: bool
    seed: int
    step: int = 0
    stop_ids: list[int] = field(default_factory=list)


def trainer_log_probs(model: GptOss, micro: RolloutBatch, settings: Settings) -> torch.Tensor:
    """[T] fp32, by the forward that a step trains with."""
    with torch.set_grad_enabled(bool(model.trainable_parameters())):
        log_probs, _ = model.log_probs(micro.tokens, micro.cu_seqlens, temperature=settings.params.temperature,
                                       mask=micro.host_mask, kept=micro.kept, prefixes=micro.prefixes, record=make_replay(micro))
    return log_probs.detach()


def split(batch: RolloutBatch, settings: Settings) -> list[RolloutBatch]:
    return micro_batches(batch, settings.max_tokens, share_prompts=settings.shares_prompts)


def differing_tokens(model: GptOss, batch: RolloutBatch, settings: Settings) -> tuple[list[int], float]:
    """Where in the batch log-probs differ, ascending, and by how much at most (nats)."""
    places, worst = [], 0.0
    for micro in split(batch, settings):
        difference = (trainer_log_probs(model, micro, settings) - micro.sampler_log_probs)[micro.loss_mask].abs()
        places += micro.token_index[micro.loss_mask][difference != 0].tolist()
        worst = max(worst, difference.max().item())
    return sorted(places), worst


def run_trainer(model: GptOss, batch: RolloutBatch, settings: Settings, recorder: Recorder, *, start: int, prompt_len: int,
                num_positions: int) -> None:
    """Records the first positions of the sequence that stands at `start` of the batch, in the micro-batch it trains in."""
    micro = next(micro for micro in split(batch, settings) if (micro.token_index == start + prompt_len).any())
    bounds, row = micro.cu_seqlens.tolist(), int((micro.token_index == start + prompt_len).nonzero()[0])
    sequence = bisect(bounds, row) - 1
    rows = list(range(bounds[sequence], bounds[sequence + 1]))
    if micro.prefixes is not None and micro.prefixes[sequence] >= 0:
        prefix = micro.prefixes[sequence]
        rows = list(range(bounds[prefix], bounds[prefix + 1])) + rows
    rows = torch.tensor(rows, device=model.device)
    recorder.rows = rows[:num_positions]
    with observed(model, recorder):
        log_probs = trainer_log_probs(model, micro, settings)
    recorder.keep_log_probs(log_probs[rows[prompt_len:num_positions + 1]])


def sampler_log_probs(model: GptOss, hidden: torch.Tensor, tokens: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The log-probs [B] that the sampler records where it draws `tokens` [B]: its own functions, with the draw made for them."""
    if can_decode_by_graph(model) and settings.params.plain is not None and not settings.params.records_routing:
        rng_keys = torch.zeros(len(tokens), 2, dtype=torch.int32, device=model.device)
        with patch.object(kernels.head.draw, "draw_tokens", lambda *_, **__: tokens):
            return model.draw(hidden, rng_keys, temperature=settings.params.temperature)[1]
    keys = torch.zeros(len(tokens), 5, dtype=torch.int64, device=model.device)
    keys[:, 0] = tokens

    def certain(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
        return torch.zeros(len(keys), vocab_size, device=keys.device).scatter_(1, keys[:, :1], torch.inf)

    with patch.object(grpo.rollout.sampling, "gumbel_noise", certain):
        result = choose(model.head(hidden), keys, settings.params)
    if result.kept_ids is None:
        return result.log_probs
    return filtered_log_probs(model, hidden, result, temperature=settings.params.temperature)


@torch.no_grad()
def run_sampler(model: GptOss, completions: list[Completion], settings: Settings, recorder: Recorder, *, index: int,
                num_positions: int) -> None:
    """Records the first positions of completions[index], decoded beside its neighbours from its recorded tokens."""
    first = index // settings.max_batch * settings.max_batch
    together = completions[first:first + settings.max_batch]
    sequences = [completion.prompt.token_ids + completion.completion_ids for completion in together]
    prompts = {completion.prompt.id: completion.prompt.token_ids for completion in together}
    owners = [list(prompts).index(completion.prompt.id) for completion in together]  # [B]
    cache = model.new_cache(len(together), max(map(len, sequences)))

    def on_device(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=model.device)

    def note_head(hidden: torch.Tensor, rows: list[int], num_new: int) -> None:
        lengths = [len(together[row].prompt.token_ids) for row in rows]
        tokens = [sequences[row][length + num_new] for row, length in zip(rows, lengths)]
        log_probs = sampler_log_probs(model, hidden[:len(rows)], on_device(tokens), settings)
        recorder.keep_log_probs(log_probs[rows.index(index - first)].reshape(1))

    bounds = [0, *accumulate(map(len, prompts.values()))]
    start = bounds[owners[index - first]]
    prompt_len = len(completions[index].prompt.token_ids)
    recorder.rows = torch.arange(start, start + prompt_len, device=model.device)
    slots = [owners.index(prompt) for prompt in range(len(prompts))]  # where each prompt is prefilled
    for slot, ids in zip(slots, prompts.values()):
        cache.reserve(slot, len(ids))
    with observed(model, recorder):
        hidden = model.prefill(on_device([token for ids in prompts.values() for token in ids]),
                               [PrefillChunk(slot, 0, len(ids)) for slot, ids in zip(slots, prompts.values())], cache)
    for prompt, slot in enumerate(slots):
        cache.fan_out(slot, [row for row, owner in enumerate(owners) if owner == prompt and row != slot],
                      bounds[prompt + 1] - bounds[prompt])
    for row, sequence in enumerate(sequences):
        cache.reserve(row, len(sequence))
    note_head(hidden[owners], list(range(len(together))), 0)
    for num_new in range(num_positions - prompt_len):
        rows = [row for row, completion in enumerate(together) if num_new + 1 < len(completion.completion_ids)]
        positions = [len(together[row].prompt.token_ids) + num_new for row in rows]
        tokens = [sequences[row][position] for row, position in zip(rows, positions)]
        idle = [0] * (bucket_of(len(rows)) - len(rows) if can_decode_by_graph(model) else 0)
        prefix_lens = on_device([position - num_new for position in positions] + idle) if settings.shares_prompts else None
        recorder.rows = on_device([rows.index(index - first)])
        with observed(model, recorder):
            hidden = model.decode(on_device(tokens + idle), on_device(positions + [IDLE] * len(idle)), cache,
                                  on_device(rows + idle), prefix_lens=prefix_lens)
        note_head(hidden, rows, num_new + 1)


@dataclass
class Finding:
    """How one operation's results compare at the first token where any differ."""

    layer: int
    operation: str
    num_differing: int
    num_elements: int
    max_abs: float


def differing_bits(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """[n, elements of a row] bool for results [n, ...]."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), (ours.shape, ours.dtype, theirs.shape, theirs.dtype)
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    return (ours.contiguous().view(same_size) != theirs.contiguous().view(same_size)).reshape(len(ours), -1)


def compare(trainer: Recorder, sampler: Recorder, num_positions: int) -> tuple[int, list[Finding]] | None:
    """The first position at which an operation's bits differ, and all operations of the first layer that differs there. None
    where none does."""
    assert trainer.found.keys() == sampler.found.keys(), f"one path alone has {trainer.found.keys() ^ sampler.found.keys()}"
    pairs = {key: (torch.cat(parts), torch.cat(sampler.found[key])) for key, parts in trainer.found.items()}
    offsets = {key: num_positions - len(ours) for key, (ours, _) in pairs.items()}  # positions before the first that is recorded
    differs = {key: differing_bits(*pair) for key, pair in pairs.items()}
    firsts = {key: offsets[key] + int(rows.any(1).int().argmax()) for key, rows in differs.items() if rows.any()}
    if not firsts:
        return None
    position = min(firsts.values())
    layer = next(layer for (layer, _), first in firsts.items() if first == position)
    findings = []
    for key, (ours, theirs) in pairs.items():
        row = position - offsets[key]
        if key[0] == layer and row >= 0:
            gap = (ours[row].double() - theirs[row].double()).abs().max().item()
            findings.append(Finding(*key, int(differs[key][row].sum()), differs[key].shape[1], gap))
    return position, findings


def explain(model: GptOss, completions: list[Completion], batch: RolloutBatch, settings: Settings, *, index: int,
            position: int) -> tuple[int, list[Finding]] | None:
    """Runs both paths on completions[index] up to the token at `position` of its sequence, and compares them."""
    trainer, sampler = Recorder(model), Recorder(model)
    prompt_len = len(completions[index].prompt.token_ids)
    run_trainer(model, batch, settings, trainer, start=int(batch.cu_seqlens[index]), prompt_len=prompt_len,
                num_positions=position)
    run_sampler(model, completions, settings, sampler, index=index, num_positions=position)
    return compare(trainer, sampler, position)


def check(model: GptOss, prompts: list[Prompt], settings: Settings) -> int:
    """Samples, compares, explains and prints. Returns the exit code."""
    sampler = Sampler(model, settings.stop_ids, max_batch=settings.max_batch, seed=settings.seed,
                      shares_prompts=settings.shares_prompts)
    completions = sampler.generate(prompts, settings.params, step=settings.step, num_samples=settings.num_samples)
    batch = pack(completions, [0.0] * len(completions)).to(model.device)
    places, worst = differing_tokens(model, batch, settings)
    what = f"{batch.num_policy_tokens} tokens of {len(completions)} completions"
    if not places:
        print(f"no difference: the log-probs of {what} are the trainer's bit for bit")
        return 0
    index = int(batch.sequence_ids[places[0]])
    position = places[0] - int(batch.cu_seqlens[index])
    completion = completions[index]
    print(f"{len(places)} of {what} differ, by {worst:.3g} nats at most\n"
          f"first: prompt {completion.prompt.id}, sample {completion.sample}, position {position} (the prompt has "
          f"{len(completion.prompt.token_ids)} tokens)")
    found = explain(model, completions, batch, settings, index=index, position=position)
    if found is None:
        print("both paths agree in every operation when they run again on this completion: what differs comes from the rollout "
              "around them (CUDA graphs, pages of the cache, rows that come and go, LoRA in the launches of W)")
        return 1
    at, findings = found
    source = next(finding for finding in findings if finding.num_differing)
    layer = "head" if source.layer == len(model.model.layers) else f"layer {source.layer}"
    print(f"first operation: position {at}, {layer}, {source.operation}: {source.num_differing} of {source.num_elements} "
          f"elements differ, by {source.max_abs:.3g} at most\n")
    print(f"{layer:32}{'':9}{'differing':>20}{'max abs':>12}")
    for finding in findings:
        differing = f"{finding.num_differing} of {finding.num_elements}"
        print(f"{finding.operation:32}{'differs' if finding.num_differing else 'equal':9}{differing:>20}{finding.max_abs:>12.3g}")
    return 1


def random_case(arguments: argparse.Namespace) -> tuple[GptOss, list[Prompt], Settings]:
    """A checkpoint, with an adapter that is not zero where asked for, and random prompts."""
    model = load_policy(arguments.checkpoint, lora="all", rank=arguments.lora_rank, device=arguments.device,
                        dtype=getattr(torch, arguments.dtype))
    params = SamplingParams(max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature)
    return model, random_prompts(model, arguments.prompt_lens, seed=arguments.seed), Settings(
        arguments.num_samples, params, arguments.max_batch, arguments.max_tokens, arguments.shares_prompts, arguments.seed)


def run_case(arguments: argparse.Namespace) -> tuple[GptOss, list[Prompt], Settings]:
    """A run's policy at a checkpoint, or as it started where it has none, and what the next step samples."""
    config = read_saved_config(arguments.run / "config.yaml")
    if config.threads:
        torch.set_num_threads(config.threads)
    rollout, tokenizer = config.rollout, Tokenizer.load(arguments.run / "tokenizer")
    state = load_run(arguments.run, step=arguments.step)
    model = build_model(config.model, tokenizer, seed=config.seed, device=torch.device(arguments.device),
                        dtype=getattr(torch, arguments.dtype))
    if state is not None:
        load_parameters(model, state.tensors, str(arguments.run))
    step = 0 if state is None else state.step
    env = make_environment(config.env, tokenizer, seed=config.seed, total_steps=config.steps, chat_form=config.turns.form)
    prompts = env.prompts(step, num_prompts=rollout.prompts_per_step, attempt=0)
    params = replace(SamplingParams.of(rollout), records_routing=rollout.replay_routing)
    return model, prompts, Settings(rollout.group_size, params, rollout.max_batch, config.optim.max_tokens,
                                    config.optim.share_prompts, config.seed, step, tokenizer.stop_ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="folder of a gpt-oss checkpoint; prompts are random tokens")
    source.add_argument("--run", type=Path, help="folder of a run: policy, prompts and settings of its next step")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the newest)")
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16" if has_gpu else "float32")
    of_checkpoint = parser.add_argument_group("with --checkpoint")
    of_checkpoint.add_argument("--lora-rank", type=int, default=0, help="of a random adapter on attention and experts; 0: none")
    of_checkpoint.add_argument("--prompt-lens", type=int, nargs="+", default=[7, 40, 150], help="tokens of each prompt")
    of_checkpoint.add_argument("--num-samples", type=int, default=2, help="completions of each prompt")
    of_checkpoint.add_argument("--max-new-tokens", type=int, default=64)
    of_checkpoint.add_argument("--max-batch", type=int, default=64, help="completions decoded together")
    of_checkpoint.add_argument("--max-tokens", type=int, default=16_384, help="of a micro-batch of the trainer")
    of_checkpoint.add_argument("--temperature", type=float, default=1.0)
    of_checkpoint.add_argument("--shares-prompts", action="store_true", help="the trainer computes a group's prompt once")
    of_checkpoint.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        model, prompts, settings = (random_case if arguments.run is None else run_case)(arguments)
        return check(model, prompts, settings)
    except (CheckpointError, ConfigError, ValueError) as error:
        print(f"explain_mismatch: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
