"""gpt-oss: one definition for training (packed sequences), prefill and decode.

Layers are those of models/block.py: no query-key norm, no logit cap, no embedding scale (openai/gpt-oss,
gpt_oss/torch/model.py). Departures: router logits, attention scores, softmax, SwiGLU, gate weighting and head logits are fp32
whatever the weights' dtype, and so is the residual stream of a float16 model (kernels/device.py: it passes float16's range).
Parameter names are those of the Hugging Face checkpoint.

Shapes: T packed tokens, S sequences, B decoded sequences, D model width, V vocabulary.
"""
from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.attention.decode import SharedPrefixes
from kernels.attention.plan import AttentionPlan
from kernels.device import MAX_FEW_ROWS, is_triton, product_path, to_device
from kernels.embedding import embedding
from kernels.head.draw import draw, head_logits
from kernels.head.kl import kl_divergence
from kernels.head.log_probs import log_probs
from kernels.packed.weights import ExpertWeights
from models.block import Block, RMSNorm
from models.config import GptOssConfig
from models.expert_share import ExpertShare, check_division_of_experts
from models.expert_store import ExpertStore, Placement, layer_bytes
from models.experts import FORMATS, RoutedExperts
from models.keys import (
    Angles,
    CachedKeys,
    Keys,
    PackedKeys,
    PrefillChunk,
    PromptKeys,
    last_rows,
    packed_positions,
    prompt_numbers,
)
from models.kv_cache import KVCache
from models.offload import MemoryBudget
from models.projections import Linear
from models.routing_record import RoutingRecord, RoutingReplay
from models.yarn import concentration, cos_sin, inverse_frequencies


@dataclass
class KeptSets:
    """The ids that a sampling filter kept, row by row; an empty row means the full vocabulary."""

    ids: torch.Tensor  # [N] int32
    offsets: torch.Tensor  # [T + 1] int64: row t keeps ids[offsets[t]:offsets[t + 1]]

    @staticmethod
    def of_counts(ids: torch.Tensor, counts: torch.Tensor) -> KeptSets:
        """Rows one after the other in ids, of counts [T] int64 ids each."""
        return KeptSets(ids, F.pad(counts.cumsum(0), (1, 0)))

    def select(self, rows: torch.Tensor) -> KeptSets:
        """The given rows [n], in their order."""
        starts, counts = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        shifts = torch.repeat_interleave(starts - (counts.cumsum(0) - counts), counts)  # from where ids go to where they are
        return KeptSets.of_counts(self.ids[torch.arange(len(shifts), device=rows.device) + shifts], counts)


class Scores(NamedTuple):
    """What GptOss.scores returns: [T] fp32 nats, 0 for tokens without a score."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor | None  # None without a reference
    hidden: torch.Tensor | None  # [N, D] the states before the N scored tokens, which the head turns into logits; if asked for


class HeadStates(NamedTuple):
    """A reference's distributions of the scored tokens, as what its head computes them from."""

    hidden: torch.Tensor  # [N, D], on the device or on the host
    weight: torch.Tensor  # [V, D], the head's; it may be the policy's own


class Embedding(nn.Module):
    def __init__(self, size: int, width: int, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width, **factory), requires_grad=False)


class Backbone(nn.Module):
    def __init__(self, config: GptOssConfig, expert_format: type[ExpertWeights], store: ExpertStore, share: ExpertShare | None,
                 **factory) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(Block(config, i, expert_format, **factory, share=share,
                                          experts_device=factory["device"] if store.home(i) is None else "meta")
                                    for i in range(config.num_hidden_layers))
        for i, block in enumerate(self.layers):
            block.mlp.experts.place(store, i)
        self.norm = RMSNorm(config, **factory)


class GptOss(nn.Module):
    """The policy. Base weights start frozen; models/lora.py decides what trains.

    `experts` names the format that experts are held in, one of models/experts.py's FORMATS. Parameters are left uninitialised:
    load a checkpoint (models/formats/hugging_face.py) or call init_weights. `activation_checkpointing` computes layers again in
    the backward; on a GPU, layers still keep what fits into `memory_gb` (1e9 bytes; None: 85 % of the GPU) and into `host_gb` of
    pinned host memory, where the input embedding goes first. `placement`: which layers' experts stream from host memory; call
    expert_store.for_sampling() and for_update() between the two. `share`: which experts this process has; None: all. The base is
    frozen then, and its experts do not stream."""

    def __init__(self, config: GptOssConfig, *, dtype: torch.dtype, device: torch.device | str, experts: str,
                 activation_checkpointing: bool = False, memory_gb: float | None = None, host_gb: float = 0.0,
                 placement: Placement | None = None, share: ExpertShare | None = None) -> None:
        super().__init__()
        if experts not in FORMATS:
            raise ValueError(f"experts={experts!r}; allowed: {', '.join(FORMATS)}")
        if share is not None:
            check_division_of_experts(share.num_ranks, config.num_local_experts)
        if share is not None and placement not in (None, Placement()):
            raise ValueError(f"placement={placement}: a share of the experts does not stream")
        factory = {"device": device, "dtype": dtype}
        self.config, self.dtype, self.expert_format = config, dtype, FORMATS[experts]
        self.activation_checkpointing = activation_checkpointing
        self.adapter = None  # the LoraConfig of models/lora.py that is attached
        self.memory = MemoryBudget(config, recomputes=activation_checkpointing, memory_gb=memory_gb, host_gb=host_gb)
        # a plain attribute: it follows from the config, so no checkpoint holds it, and a model on "meta" has it too
        self.inv_freq = inverse_frequencies(config)
        self.expert_store = ExpertStore(placement or Placement(), config.num_hidden_layers,
                                        layer_bytes(config, self.expert_format, dtype), torch.device(device))
        self.share, self.gathers = share, False  # gathers: see Block
        self.model = Backbone(config, self.expert_format, self.expert_store, share, **factory)
        self.lm_head = Embedding(config.vocab_size, config.hidden_size, **factory)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def init_weights(self, seed: int) -> None:
        """Random weights for a tiny model trained from scratch: linear N(0, 0.7 / sqrt(fan_in)), experts
        N(0, 0.5 / sqrt(fan_in)), embedding N(0, 0.5), head N(0, 0.02); norms 1, biases and sinks 0."""
        if self.expert_format.is_packed:
            raise ValueError("init_weights: packed experts cannot be initialised; use experts='bf16'")
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            std = None
            if name == "model.embed_tokens.weight":
                std = 0.5
            elif name == "lm_head.weight":
                std = 0.02
            elif name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
                std = 0.5 * parameter.shape[1] ** -0.5
            elif parameter.ndim == 2 and name.endswith(".weight"):
                std = 0.7 * parameter.shape[1] ** -0.5
            with torch.no_grad():
                if std is None:
                    parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def divides(self, name: str) -> bool:
        """Whether other processes hold parts of the parameter of this name, or of what is named after it."""
        return self.share is not None and ".mlp.experts." in name

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A parameter, its gradient or state, as a single process has it. All processes that share experts call it."""
        return self.share.whole(part) if self.divides(name) else part

    def own(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What this process has of it: a copy of a part, or the whole."""
        return whole[self.share.of(len(whole))].clone() if self.divides(name) else whole

    def whole_shape(self, name: str) -> list[int]:
        first, *rest = self.get_parameter(name).shape
        return [first * self.share.num_ranks if self.divides(name) else first, *rest]

    @contextmanager
    def exchanged(self, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        """Inside the `with`, the named parameters have these tensors as data, copied to the model's device. Their own tensors
        are not overwritten and stay at their addresses, which CUDA graphs use."""
        parameters = dict(self.named_parameters())
        own = {name: parameters[name].data for name in tensors}
        try:
            for name, tensor in tensors.items():
                parameters[name].data = tensor.to(own[name].device)
            yield
        finally:
            for name, tensor in own.items():
                parameters[name].data = tensor

    def retreat(self) -> str | None:
        """Makes later passes with gradients need less memory, with the same bits, after one that was aborted for lack of memory
        and that left nothing behind but what its backward has added to gradients. Returns what changes; None if they already need
        as little as they can."""
        if self.device.type == "cuda":
            return self.memory.retreat()
        if self.activation_checkpointing:
            return None
        self.activation_checkpointing = True
        return "the backward computes each layer again"

    @property
    def serves_few_rows(self) -> bool:
        """Whether decode steps on a GPU have kernels of their own for the experts, as these are laid out."""
        return all(block.mlp.experts.layout.serves_few_rows for block in self.model.layers)

    @property
    def adapter_is_enabled(self) -> bool:
        """False inside adapter_disabled()."""
        return self.model.layers[0].self_attn.q_proj.adapter_enabled

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside the `with`, the model computes without its adapter."""
        carriers = [module for module in self.modules() if isinstance(module, (Linear, RoutedExperts))]
        for module in carriers:
            module.adapter_enabled = False
        try:
            yield
        finally:
            for module in carriers:
                module.adapter_enabled = True

    def _angles(self, positions: torch.Tensor) -> Angles:
        self.inv_freq = self.inv_freq.to(positions.device)  # copied once, on the first call
        return cos_sin(positions, self.inv_freq, concentration(self.config))

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        x = embedding(tokens, self.model.embed_tokens.weight)
        return x.float() if self.dtype == torch.float16 else x

    def _hidden(self, tokens: torch.Tensor, keys: Keys, record: RoutingRecord | RoutingReplay | None) -> torch.Tensor:
        """Final-norm hidden states [T, D] of tokens [T]. Without gradient on a GPU."""
        x, call = self._embedded(tokens), Block.__call__
        if self.gathers and not torch.is_grad_enabled():
            call = Block.forward
        self.expert_store.begin(copies_routed=any(block.mlp.experts.copies_routed(x) for block in self.model.layers))
        if self.activation_checkpointing and torch.is_grad_enabled():
            call = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for block in self.model.layers:
            x = call(block, x, keys, record)
        return self.model.norm(x)

    def packed_hidden(self, tokens: torch.Tensor, cu_seqlens: list[int], prefixes: list[int] | None,
                       record: RoutingReplay | None) -> torch.Tensor:
        angles = self._angles(packed_positions(cu_seqlens, tokens.device, prefixes))
        keys = PackedKeys(angles, AttentionPlan(cu_seqlens, prefixes=prefixes))
        if not (is_triton(tokens) and torch.is_grad_enabled()):
            return self._hidden(tokens, keys, record)
        self.expert_store.begin(copies_routed=False)
        x, trainable = self._embedded(tokens), self.trainable_parameters().values()
        training_pass = self.memory.plan(x, keys.plan, trainable, dtype=self.dtype, is_packed=self.expert_format.is_packed,
                                         rank=0 if self.adapter is None else self.adapter.rank)
        for block in self.model.layers:
            x = block.forward_with_grad(x, keys, record, training_pass)
        return self.model.norm(x)

    def logits(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """All logits [T, V] fp32 of packed sequences; for comparisons, at sizes where they fit."""
        hidden = self.packed_hidden(tokens, cu_seqlens.tolist(), None, None)
        return hidden.float() @ self.lm_head.weight.float().T

    def log_probs(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor, *, temperature: float, mask: torch.Tensor,
                  kept: KeptSets | None = None, prefixes: list[int] | None = None,
                  record: RoutingReplay | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probs [T] and the entropy [T] of scores()."""
        scores = self.scores(tokens, cu_seqlens, temperature=temperature, mask=mask, kept=kept, prefixes=prefixes, record=record)
        return scores.log_probs, scores.entropy

    def scores(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor, *, temperature: float, mask: torch.Tensor,
               kept: KeptSets | None = None, prefixes: list[int] | None = None, record: RoutingReplay | None = None,
               reference: HeadStates | None = None, keeps_hidden: bool = False, has_entropy_loss: bool = False) -> Scores:
        """Log-probs of the tokens where mask [T] is true, each given its sequence so far, the entropy of the distribution each
        was drawn from, and its KL divergence from the reference's, if there is one (both over the full vocabulary); at
        `temperature`. All are differentiable. cu_seqlens and mask should be on the host: it waits for them if they are on a GPU,
        and for nothing else. `kept`
        renormalises log-probs over the sets that a sampling filter kept. `prefixes` [S]: the sequence that each sequence
        continues, -1 for none: so a prompt is computed once for all its completions; a prefix continues no other. The first token
        of a sequence without prefix has no log-prob. `record` sends tokens through recorded experts, and counts those that the
        router would not have chosen. has_entropy_loss: the loss will have the entropy's gradient; it costs less if announced."""
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: log-probs need a temperature above 0")
        bounds, rows = cu_seqlens.tolist(), mask.cpu().nonzero().squeeze(1)  # [N]
        before = previous_rows(bounds, prefixes)[rows]
        assert (before >= 0).all(), "mask is true on the first token of a sequence"
        rows, before = to_device(rows, tokens.device), to_device(before, tokens.device)
        hidden = self.packed_hidden(tokens, bounds, prefixes, record)
        # a prompt's last row occurs once per completion: on a GPU the gradient of index_select would add them with atomics, in
        # any order; that of indexing adds them in a fixed one
        hidden = hidden.index_select(0, before) if prefixes is None else hidden[before]
        kept = kept.select(rows) if kept is not None else None
        scored = list(log_probs(hidden, self.lm_head.weight, tokens[rows], temperature=temperature,
                                kept_ids=kept and kept.ids, kept_offsets=kept and kept.offsets,
                                has_entropy_loss=has_entropy_loss))
        if reference is not None:
            scored.append(kl_divergence(hidden, self.lm_head.weight, to_device(reference.hidden, tokens.device),
                                        reference.weight, temperature=temperature))
        if scored[0].requires_grad:
            scored[0].register_hook(self.memory.before_backward)
        zeros = torch.zeros(len(tokens), dtype=torch.float32, device=tokens.device)
        scored = [zeros.index_copy(0, rows, values) for values in scored]
        return Scores(*scored[:2], scored[2] if reference is not None else None, hidden.detach() if keeps_hidden else None)

    def new_cache(self, num_slots: int, max_len: int, num_pages: int | None = None) -> KVCache:
        """An empty cache for `num_slots` sequences of up to `max_len` tokens, with pages for all of them at that length unless
        `num_pages` says how many. Slots get theirs by KVCache.reserve."""
        num_pages = num_slots * KVCache.pages_for(max_len) if num_pages is None else num_pages
        return KVCache(self.config, num_slots=num_slots, max_len=max_len, num_pages=num_pages, device=self.device,
                       dtype=self.dtype)

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor, chunks: list[PrefillChunk], cache: KVCache, *,
                record: RoutingRecord | None = None) -> torch.Tensor:
        """Runs packed tokens [T], the next ones of sequences in different slots. Fills the slots, which must have pages for
        them, and the `record` of their experts. Returns the final hidden states [chunks, D] of each chunk's last token.

        A sequence gives the same result in chunks of any lengths, on a GPU bit for bit if attention runs by Triton."""
        numbers = to_device(prompt_numbers(chunks, cache, num_rows=len(tokens)), tokens.device)
        cache.flush()
        longest, has_earlier = max(chunk.end - chunk.start for chunk in chunks), any(chunk.start for chunk in chunks)
        by_one_launch = product_path(tokens) == "triton" and has_earlier and longest <= MAX_FEW_ROWS
        hidden = self.prefill_rows(tokens, numbers, cache, None if by_one_launch else chunks, record=record,
                                   is_prefixed=any(chunk.prefix_len for chunk in chunks))
        return hidden[last_rows(chunks, tokens.device)]

    @torch.no_grad()
    def prefill_rows(self, tokens: torch.Tensor, numbers: torch.Tensor, cache: KVCache, chunks: list[PrefillChunk] | None, *,
                     is_prefixed: bool, record: RoutingRecord | None) -> torch.Tensor:
        """The final hidden states [T, D] of tokens [T] that `numbers` describes (prompt_numbers), both on the device. chunks,
        is_prefixed: as PromptKeys has them; without chunks a CUDA graph can capture it. The cache must be flushed."""
        keys = PromptKeys(numbers, self._angles, cache, chunks, num_rows=len(tokens), is_prefixed=is_prefixed)
        return self._hidden(tokens, keys, record)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache, slots: torch.Tensor, *,
               record: RoutingRecord | None = None, prefix_lens: torch.Tensor | None = None,
               shared: SharedPrefixes | None = None, longest: int = 0) -> torch.Tensor:
        """Appends one token to each of B sequences: tokens [B] at positions [B] of slots [B]; fills the `record` of their
        experts. Returns the final hidden states [B, D]. Rows at a position below 0 are idle: they write to no slot, and their
        states are not to be used. On a GPU no value is read back, so the caller must make sure that slots have pages for the
        positions. `prefix_lens` [B], `shared`, `longest`: see decode_attention; layers with a window ignore the last two."""
        if positions.device.type == "cpu" and int(positions.max()) >= cache.max_len:
            raise ValueError(f"position {int(positions.max())} does not fit a cache of {cache.max_len} tokens per sequence")
        cache.flush()  # does nothing in a graph: the caller flushes before a replay
        keys = CachedKeys(self._angles(positions), cache, slots, positions, prefix_lens=prefix_lens, shared=shared,
                          longest=longest)
        return self._hidden(tokens, keys, record)

    @torch.no_grad()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] fp32 of final hidden states [B, D]."""
        return head_logits(hidden, self.lm_head.weight)

    @torch.no_grad()
    def score(self, hidden: torch.Tensor, tokens: torch.Tensor, *, temperature: float, kept: KeptSets) -> torch.Tensor:
        """The log-probs [B] fp32, nats, of tokens [B] after hidden [B, D], renormalised over each row's kept set. log_probs
        computes the same for the same hidden state, on a GPU bit for bit."""
        return log_probs(hidden, self.lm_head.weight, tokens, temperature=temperature, kept_ids=kept.ids,
                         kept_offsets=kept.offsets)[0]

    @torch.no_grad()
    def draw(self, hidden: torch.Tensor, rng_keys: torch.Tensor | None, *,
             temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws a token from the whole vocabulary at `temperature` for each of hidden [B, D], by the noise of RNG keys [B, 2]
        int32 (kernels/head/sampling.py), or takes the most likely one where rng_keys is None. Returns the tokens [B] and their
        log-probs [B] fp32, nats: those that log_probs computes for the same hidden state, bit for bit."""
        return draw(hidden, self.lm_head.weight, rng_keys, temperature=temperature)


def previous_rows(cu_seqlens: list[int], prefixes: list[int] | None) -> torch.Tensor:
    """The row of the token before each packed token, -1 if there is none: [T] int64. The token before a continuation's first
    one is the last of its prefix."""
    rows = torch.arange(cu_seqlens[-1]) - 1
    bounds = list(zip(cu_seqlens, cu_seqlens[1:]))
    for (start, end), prefix in zip(bounds, prefixes or [-1] * len(bounds)):
        if start < end:
            rows[start] = -1 if prefix == -1 or bounds[prefix][0] == bounds[prefix][1] else bounds[prefix][1] - 1
    return rows
