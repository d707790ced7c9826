"""gpt-oss: one definition for training (packed sequences), prefill and decode.

Block: x += attention(norm(x)); x += experts(norm(x)). No query-key norm, no logit cap, no embedding scale
(openai/gpt-oss, gpt_oss/torch/model.py). Departures: router logits, attention scores, softmax, SwiGLU, gate weighting and
head logits are fp32 whatever the weights' dtype, and so is the residual stream of a float16 model (kernels/device.py: it passes
float16's range). Parameter names are those of the Hugging Face checkpoint.

Shapes: T packed tokens, S sequences, B decoded sequences, D model width, H query heads, K key-value heads, V vocabulary.
"""
from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.attention.decode import SharedPrefixes, decode_attention
from kernels.attention.packed import attention
from kernels.attention.plan import AttentionPlan
from kernels.device import is_triton, to_device
from kernels.embedding import embedding
from kernels.experts.sorting import route
from kernels.head.draw import draw, head_logits
from kernels.head.log_probs import log_probs
from kernels.linear import lora_linear
from kernels.norm import add_rms_norm, rms_norm
from kernels.rope import rope_qk, rotate
from kernels.router import router_logits
from models.config import GptOssConfig
from models.experts import Bf16Experts, Mxfp4Experts, Nf4Experts
from models.frozen_block import Attend, Choose, DecodeStep, TrainingPass, run_block, train_block
from models.kv_cache import PAGE_TOKENS, KVCache
from models.memory_plan import SCRATCH_BYTES, MemoryBudget
from models.routing_record import RoutingRecord, RoutingReplay
from models.yarn import concentration, cos_sin, inverse_frequencies


@dataclass
class KeptSets:
    """The ids a sampling filter kept, row by row; an empty row means the full vocabulary."""

    ids: torch.Tensor  # [N] int32
    offsets: torch.Tensor  # [T + 1] int64: row t keeps ids[offsets[t]:offsets[t + 1]]

    @staticmethod
    def of_counts(ids: torch.Tensor, counts: torch.Tensor) -> KeptSets:
        """Rows one after the other in ids, of counts [T] int64 ids each."""
        return KeptSets(ids, F.pad(counts.cumsum(0), (1, 0)))

    def select(self, rows: torch.Tensor) -> KeptSets:
        """The given rows [n], in their order."""
        starts, counts = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(offsets[-1]), device=rows.device) - torch.repeat_interleave(offsets[:-1], counts)
        return KeptSets(self.ids[torch.repeat_interleave(starts, counts) + within], offsets)


class RMSNorm(nn.Module):
    def __init__(self, config: GptOssConfig, **factory) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size, **factory), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, eps=self.eps, dtype=self.weight.dtype)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of residual + x, and residual + x itself."""
        return add_rms_norm(x, residual, self.weight, eps=self.eps)


class Linear(nn.Module):
    """A dense projection that may carry an adapter (models/lora.py attaches it)."""

    def __init__(self, size_in: int, size_out: int, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in, **factory), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size_out, **factory), requires_grad=False)
        self.register_parameter("lora_A", None)  # [r, in] fp32
        self.register_parameter("lora_B", None)  # [out, r] fp32
        self.lora_scale, self.adapter_enabled = 0.0, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapter = (self.lora_A, self.lora_B) if self.adapter_enabled else (None, None)
        return lora_linear(x, self.weight, self.bias, *adapter, scale=self.lora_scale)


class Router(Linear):
    """Logits of the experts, fp32 whatever the dtype of x and the weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = router_logits(x, self.weight, self.bias)
        if self.lora_A is None or not self.adapter_enabled:
            return logits
        low_rank = lora_linear(x.float(), self.lora_A, None, None, None, scale=1.0)
        return logits + self.lora_scale * lora_linear(low_rank, self.lora_B, None, None, None, scale=1.0)


class Attention(nn.Module):
    def __init__(self, config: GptOssConfig, layer: int, **factory) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window = config.sliding_window if config.is_windowed(layer) else 0  # 0: none
        width, head_dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(width, config.num_attention_heads * head_dim, **factory)
        self.k_proj = Linear(width, config.num_key_value_heads * head_dim, **factory)
        self.v_proj = Linear(width, config.num_key_value_heads * head_dim, **factory)
        self.o_proj = Linear(config.num_attention_heads * head_dim, width, **factory)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads, **factory), requires_grad=False)
        self._fused: tuple[torch.Tensor, torch.Tensor] | None = None

    def fused_qkv(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [P, D] and bias [P] of queries, keys and values side by side. The first call moves the three projections'
        parameters into them, as views: one copy is held, under both names."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if self._fused is None or self._fused[0].data_ptr() != self.q_proj.weight.data_ptr():
            self._fused = (torch.cat([p.weight.data for p in projections]), torch.cat([p.bias.data for p in projections]))
            sizes = [p.weight.shape[0] for p in projections]
            for projection, weight, bias in zip(projections, *(tensor.split(sizes) for tensor in self._fused)):
                projection.weight.data, projection.bias.data = weight, bias
        return self._fused

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, H, head_dim]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K, head_dim]
        q, k = rope_qk(q, k, cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(attend(self.layer, q, k, v, self.sinks).flatten(1))


class MixtureOfExperts(nn.Module):
    def __init__(self, config: GptOssConfig, experts: str, **factory) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.router = Router(config.hidden_size, config.num_local_experts, **factory)
        kind = Bf16Experts if experts == "bf16" else Mxfp4Experts if experts == "mxfp4" else Nf4Experts
        self.experts = kind(config, **factory)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, choose: Choose | None) -> torch.Tensor:
        """residual plus the weighted sum of the experts of x, those that `choose` names or the router's own."""
        logits = self.router(x)
        indices = None if choose is None else choose(logits)
        weights, routing = route(logits, experts_per_token=self.experts_per_token, indices=indices)
        return self.experts.mix(x, weights, routing, residual)


class Block(nn.Module):
    def __init__(self, config: GptOssConfig, layer: int, experts: str, **factory) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, **factory)
        self.self_attn = Attention(config, layer, **factory)
        self.post_attention_layernorm = RMSNorm(config, **factory)
        self.mlp = MixtureOfExperts(config, experts, **factory)

    def forward(self, x: torch.Tensor, compute: Callable[[Block, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The block's output for x [T, D], computed as the caller says: by compose() or models/frozen_block.py. Being a call of
        the module either way, it is seen by its hooks."""
        return compute(self, x)

    def compose(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend,
                choose: Choose | None) -> torch.Tensor:
        """By autograd over the single operations: on the CPU, and for the gradients of a base that trains. On a GPU a forward
        by models/frozen_block.py gives the same bits."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        normed, x = self.post_attention_layernorm.add(attended, x)
        return self.mlp(normed, x, choose)

    def trains_base(self) -> bool:
        """Whether a weight or bias of a projection, of the router or of the experts trains."""
        attn = self.self_attn
        linears = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, self.mlp.router)
        return self.mlp.experts.trains_base() or any(
            parameter.requires_grad for linear in linears for parameter in (linear.weight, linear.bias))


class Embedding(nn.Module):
    def __init__(self, size: int, width: int, **factory) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width, **factory), requires_grad=False)


class Decoder(nn.Module):
    def __init__(self, config: GptOssConfig, experts: str, **factory) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(Block(config, i, experts, **factory) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, **factory)


class GptOss(nn.Module):
    """The policy. Base weights start frozen; models/lora.py decides what trains.

    `experts` is the format they are held in, "bf16" (dense, in `dtype`), "mxfp4" or "nf4" (packed). Parameters are left
    uninitialised: load a checkpoint (models/checkpoint.py) or call init_weights. `activation_checkpointing` recomputes
    layers in the backward; on a GPU with a frozen base, layers keep what fits into `memory_gb` (1e9 bytes) instead, if it is
    given, and `host_gb` of pinned host memory take the input embedding and more of what layers keep."""

    def __init__(self, config: GptOssConfig, *, dtype: torch.dtype, device: torch.device | str, experts: str,
                 activation_checkpointing: bool = False, memory_gb: float | None = None, host_gb: float = 0.0) -> None:
        super().__init__()
        if experts not in ("bf16", "mxfp4", "nf4"):
            raise ValueError(f"experts={experts!r}; allowed: bf16, mxfp4, nf4")
        factory = {"device": device, "dtype": dtype}
        self.config, self.dtype, self.expert_format = config, dtype, experts
        self.activation_checkpointing = activation_checkpointing
        self.memory = MemoryBudget(config, recomputes=activation_checkpointing, memory_gb=memory_gb, host_gb=host_gb)
        # a plain attribute: it follows from the config, so no checkpoint holds it, and a model on "meta" has it too
        self.inv_freq = inverse_frequencies(config, torch.device("cpu"))
        self.model = Decoder(config, experts, **factory)
        self.lm_head = Embedding(config.vocab_size, config.hidden_size, **factory)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def init_weights(self, seed: int) -> None:
        """Random weights for a tiny model trained from scratch: linear N(0, 0.7 / sqrt(fan_in)), experts
        N(0, 0.5 / sqrt(fan_in)), embedding N(0, 0.5), head N(0, 0.02); norms 1, biases and sinks 0."""
        if self.expert_format != "bf16":
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

    def trains_base(self) -> bool:
        """Whether that is so of any block."""
        return any(block.trains_base() for block in self.model.layers)

    @contextmanager
    def exchanged(self, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        """Inside, the parameters of these names hold these tensors, copied to the model's device. They are exchanged and not
        overwritten: what they held, weights fused from them included, stays at its address, which CUDA graphs hold."""
        parameters = dict(self.named_parameters())
        own = {name: parameters[name].data for name in tensors}
        attentions = [block.self_attn for block in self.model.layers
                      if f"model.layers.{block.self_attn.layer}.self_attn.q_proj.weight" in tensors]  # all three projections then
        fused = [attention._fused for attention in attentions]
        try:
            for attention in attentions:
                attention._fused = None
            for name, tensor in tensors.items():
                parameters[name].data = tensor.to(own[name].device)
            yield
        finally:
            for name, tensor in own.items():
                parameters[name].data = tensor
            for attention, weights in zip(attentions, fused):
                attention._fused = weights

    @property
    def adapter_is_enabled(self) -> bool:
        """False inside adapter_disabled()."""
        return self.model.layers[0].self_attn.q_proj.adapter_enabled

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside, the model computes as if it carried no adapter."""
        carriers = [module for module in self.modules() if isinstance(module, (Linear, Bf16Experts, Mxfp4Experts, Nf4Experts))]
        for module in carriers:
            module.adapter_enabled = False
        try:
            yield
        finally:
            for module in carriers:
                module.adapter_enabled = True

    def _hidden(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend, plan: AttentionPlan | None,
                routing: RoutingRecord | RoutingReplay | None, *, decode: DecodeStep | None = None) -> torch.Tensor:
        """Final-norm hidden states [T, D] of tokens [T] at positions [T] of their sequences, which attend as `attend` says
        or, where there is a gradient, by `plan`. decode: how few tokens attend, as run_block takes it."""
        self.inv_freq = self.inv_freq.to(tokens.device)  # copied once, on the first call
        cos, sin = cos_sin(positions, self.inv_freq, concentration(self.config))
        x = embedding(tokens, self.model.embed_tokens.weight)
        x = x.float() if self.dtype == torch.float16 else x
        blocks, is_training = self.model.layers, torch.is_grad_enabled()
        chooses = [None if routing is None else partial(routing.choose, layer) for layer in range(len(blocks))]
        if not is_triton(x) or (is_training and self.trains_base()):
            for block, choose in zip(blocks, chooses):
                compute = partial(Block.compose, cos=cos, sin=sin, attend=attend, choose=choose)
                if is_training and self.activation_checkpointing:
                    compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
                x = block(x, compute)
        elif plan is None or not is_training:
            run = partial(run_block, cos=cos, sin=sin, attend=attend, scratch_bytes=SCRATCH_BYTES, decode=decode)
            for block, choose in zip(blocks, chooses):
                x = block(x, partial(run, choose=choose))
        else:
            trainable = self.trainable_parameters()
            of_layers = [[] for _ in blocks]
            for name, parameter in trainable.items():
                if name.startswith("model.layers."):
                    of_layers[int(name.split(".", 3)[2])].append(parameter)
            places = self.memory.plan(x, plan, trainable.values(), dtype=self.dtype, is_packed=self.expert_format != "bf16")
            run = TrainingPass(cos, sin, plan, places.scratch_bytes, self.memory.store, places.max_pending_bytes,
                               self.memory.after_backward)
            for block, layer, parameters, choose in zip(blocks, places.layers, of_layers, chooses):
                x = block(x, partial(train_block, run=run, plan=layer, parameters=parameters, choose=choose))
        return self.model.norm(x)

    def _packed_attend(self, plan: AttentionPlan) -> Attend:
        scale = self.config.head_dim ** -0.5

        def attend(layer, q, k, v, sinks):
            return attention(q, k, v, sinks, cu_seqlens=plan.cu_seqlens, window=self.model.layers[layer].self_attn.window,
                             scale=scale, plan=plan)

        return attend

    def _packed_hidden(self, tokens: torch.Tensor, cu_seqlens: list[int], prefixes: list[int] | None,
                       routing: RoutingReplay | None) -> torch.Tensor:
        plan = AttentionPlan(cu_seqlens, prefixes=prefixes)
        positions = packed_positions(cu_seqlens, tokens.device, prefixes)
        return self._hidden(tokens, positions, self._packed_attend(plan), plan, routing)

    def logits(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """All logits [T, V] fp32 of packed sequences; for comparisons, at sizes where they fit."""
        hidden = self._packed_hidden(tokens, cu_seqlens.tolist(), None, None)
        return hidden.float() @ self.lm_head.weight.float().T

    def log_probs(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor, *, temperature: float, mask: torch.Tensor,
                  kept: KeptSets | None = None, prefixes: list[int] | None = None,
                  routing: RoutingReplay | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs [T] of the tokens where mask [T] is true, each given its sequence so far, and the entropy [T] of the
        distribution each was drawn from (full vocabulary); fp32 nats at `temperature`, 0 elsewhere. Differentiable.
        cu_seqlens and mask are wanted on the host, which waits for them where they are on a GPU, and for nothing else.
        `kept` renormalises over the sets a sampling filter left. `prefixes` [S]: the sequence, itself whole, that each sequence
        continues, -1 for none: a prompt computed once for all its completions. The first token of a sequence that continues
        none has no log-prob. `routing` sends tokens through recorded experts and counts where the router would not have."""
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: log-probs need a temperature above 0")
        bounds, rows = cu_seqlens.tolist(), mask.cpu().nonzero().squeeze(1)  # [N]
        before = previous_rows(bounds, prefixes)[rows]
        assert (before >= 0).all(), "mask is true on the first token of a sequence"
        rows, before = to_device(rows, tokens.device), to_device(before, tokens.device)
        hidden = self._packed_hidden(tokens, bounds, prefixes, routing)
        # a prompt's last row occurs once per completion: on a GPU the gradient of index_select would add those with atomics, in
        # any order, that of indexing adds them in one
        hidden = hidden.index_select(0, before) if prefixes is None else hidden[before]
        kept = kept.select(rows) if kept is not None else None
        chosen, entropy = log_probs(hidden, self.lm_head.weight, tokens[rows], temperature=temperature,
                                    kept_ids=kept and kept.ids, kept_offsets=kept and kept.offsets)
        if chosen.requires_grad:
            chosen.register_hook(self.memory.before_backward)
        zeros = torch.zeros(len(tokens), dtype=torch.float32, device=tokens.device)
        return zeros.index_copy(0, rows, chosen), zeros.index_copy(0, rows, entropy)

    def new_cache(self, num_slots: int, max_len: int, num_pages: int | None = None) -> KVCache:
        """An empty cache for `num_slots` sequences of up to `max_len` tokens, with pages for all of them at that length unless
        `num_pages` says how many. Slots get theirs by KVCache.reserve."""
        num_pages = num_slots * KVCache.pages_for(max_len) if num_pages is None else num_pages
        return KVCache(self.config, num_slots=num_slots, max_len=max_len, num_pages=num_pages, device=self.device,
                       dtype=self.dtype)

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor, cache: KVCache, slots: torch.Tensor, *,
                record: RoutingRecord | None = None) -> torch.Tensor:
        """Runs packed prompts tokens [T] and fills slots [S] of the cache, which must have pages for them, and the `record` of
        their experts. Returns the logits [S, V] fp32 after each."""
        return self.head(self.prefill_hidden(tokens, cu_seqlens, cache, slots, record=record))

    @torch.no_grad()
    def prefill_hidden(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor, cache: KVCache, slots: torch.Tensor, *,
                       prefixes: list[int] | None = None, record: RoutingRecord | None = None) -> torch.Tensor:
        """As prefill, but returns the final hidden states [S, D] that the logits come from.

        `prefixes` [S]: the sequence that each one continues, in the same slot and at most one of them, -1 for none; as in
        log_probs, a prompt's keys are then added up before the others. Returned are the states after the sequences that no
        other continues, in their order."""
        bounds = cu_seqlens.tolist()
        prefixes = prefixes or [-1] * (len(bounds) - 1)
        lengths = torch.tensor(bounds).diff()
        continued = torch.tensor(prefixes)
        totals = lengths + torch.where(continued >= 0, lengths[continued], 0)
        if totals.max() > cache.max_len:
            raise ValueError(f"a prompt of {totals.max()} tokens does not fit a cache of {cache.max_len} per sequence")
        cache.flush()
        positions = packed_positions(bounds, tokens.device, prefixes)
        is_last = torch.ones(len(prefixes), dtype=torch.bool)
        for sequence, prefix in enumerate(prefixes):
            if prefix >= 0:
                totals[prefix], is_last[prefix] = totals[sequence], False
        counts, totals = to_device(lengths, tokens.device), to_device(totals, tokens.device)
        token_slots, token_totals = (x.repeat_interleave(counts, output_size=len(tokens)) for x in (slots, totals))
        packed = self._packed_attend(AttentionPlan(bounds, prefixes=prefixes))
        # a ring keeps the last entries only; which tokens those are depends on the ring's length alone
        last = {length: (positions >= token_totals - length).nonzero().squeeze(1) for length in set(cache.lengths)}

        def attend(layer, q, k, v, sinks):
            rows = last[cache.lengths[layer]]
            cache.write(layer, k[rows], v[rows], token_slots[rows], positions[rows])
            return packed(layer, q, k, v, sinks)

        ends = to_device(torch.tensor(bounds[1:])[is_last], tokens.device)
        return self._hidden(tokens, positions, attend, None, record, decode=DecodeStep(_rotate_in_place, attend))[ends - 1]

    @torch.no_grad()
    def prefill_piece(self, tokens: torch.Tensor, start: int, cache: KVCache, slot: int, *, prefix_len: int = 0,
                      record: RoutingRecord | None = None) -> torch.Tensor:
        """Runs tokens [n], the next of a sequence of which the slot holds the first `start`, and fills the slot, which must have
        pages for them, and the `record` of their experts. Returns the final hidden state [1, D] after the last.

        A sequence in pieces of any lengths gives what it gives in one, on a GPU bit for bit where attention runs by Triton.
        `prefix_len`: how many of the sequence's first tokens, those of this piece included, are counted apart: a prompt whose
        keys are added up before the others, as by prefill_hidden's prefixes; 0 for none."""
        end, device = start + len(tokens), tokens.device
        if end > cache.max_len:
            raise ValueError(f"a prompt of {end} tokens does not fit a cache of {cache.max_len} per sequence")
        cache.flush()
        positions = torch.arange(start, end, device=device)
        slots = torch.full_like(positions, slot)
        spans = {length: piece_plan(start, end, length, prefix_len) for length in set(cache.lengths)}

        def attend(layer, q, k, v, sinks):
            first, plan = spans[cache.lengths[layer]]
            # read first: a ring's new entries replace some that the piece's first tokens see
            earlier_k, earlier_v = cache.read(layer, slot, first, start)
            lost = max(len(k) - cache.lengths[layer], 0)
            cache.write(layer, k[lost:], v[lost:], slots[lost:], positions[lost:])
            return self._packed_attend(plan)(layer, q, torch.cat((earlier_k, k)), torch.cat((earlier_v, v)), sinks)

        return self._hidden(tokens, positions, attend, None, record, decode=DecodeStep(_rotate_in_place, attend))[-1:]

    @torch.no_grad()
    def decode_step(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache, slots: torch.Tensor, *,
                    record: RoutingRecord | None = None, prefix_lens: torch.Tensor | None = None) -> torch.Tensor:
        """Appends one token to each of B sequences: tokens [B] at positions [B] of slots [B]; fills the `record` of their
        experts. Returns logits [B, V] fp32. Rows at a position below 0 are idle: they touch no slot, their logits mean nothing.
        On a GPU attention and cache wait for no value, so nothing checks that slots have pages for positions: the caller must.
        `prefix_lens` [B]: see decode_attention."""
        return self.head(self.decode_hidden(tokens, positions, cache, slots, record=record, prefix_lens=prefix_lens))

    @torch.no_grad()
    def decode_hidden(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache, slots: torch.Tensor, *,
                      record: RoutingRecord | None = None, prefix_lens: torch.Tensor | None = None,
                      shared: SharedPrefixes | None = None, longest: int = 0) -> torch.Tensor:
        """As decode_step, but returns the final hidden states [B, D] that the logits come from. `shared`, `longest`: see
        decode_attention; layers with a window have no use for them."""
        if not positions.is_cuda and int(positions.max()) >= cache.max_len:
            raise ValueError(f"position {int(positions.max())} does not fit a cache of {cache.max_len} tokens per sequence")
        cache.flush()  # does nothing in a graph: who replays one flushes before

        def attend_stored(layer, q, k, v, sinks):
            return decode_attention(q, cache.keys[layer], cache.values[layer], sinks, slots=slots, positions=positions,
                                    window=self.model.layers[layer].self_attn.window, scale=self.config.head_dim ** -0.5,
                                    prefix_lens=prefix_lens, page_table=cache.table_of(layer),
                                    shared=shared if cache.is_paged[layer] else None,
                                    longest=longest if cache.is_paged[layer] else 0)

        def attend(layer, q, k, v, sinks):
            cache.write(layer, k, v, slots, positions)
            return attend_stored(layer, q, k, v, sinks)

        def store(layer, q, k, v, cos, sin):
            cache.rotate_and_write(layer, q, k, v, cos, sin, slots, positions)

        return self._hidden(tokens, positions, attend, None, record, decode=DecodeStep(store, attend_stored))

    @torch.no_grad()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] fp32 of final hidden states [B, D]."""
        return head_logits(hidden, self.lm_head.weight)

    @torch.no_grad()
    def score(self, hidden: torch.Tensor, tokens: torch.Tensor, *, temperature: float, kept: KeptSets) -> torch.Tensor:
        """The log-probs [B] fp32, nats, of tokens [B] after hidden [B, D], renormalised over what each row keeps: those that
        log_probs computes for the same hidden state, on a GPU bit for bit."""
        return log_probs(hidden, self.lm_head.weight, tokens, temperature=temperature, kept_ids=kept.ids,
                         kept_offsets=kept.offsets)[0]

    @torch.no_grad()
    def draw(self, hidden: torch.Tensor, words: torch.Tensor | None, *, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws a token from the whole vocabulary at `temperature` for each of hidden [B, D], by the noise of words [B, 2] int32
        (kernels/head/sampling.py), or takes the most likely one where words is None. Returns the tokens [B] and their log-probs
        [B] fp32, nats: those that log_probs computes for the same hidden state, bit for bit."""
        return draw(hidden, self.lm_head.weight, words, temperature=temperature)


def _rotate_in_place(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """What a prefill of few tokens does before it attends: the attention stores keys and values itself."""
    rotate(q, k, cos, sin, backward=False, out=(q, k))


def packed_positions(cu_seqlens: list[int], device: torch.device, prefixes: list[int] | None = None) -> torch.Tensor:
    """Position of each packed token in its own sequence, its prefix counted: [T] int64."""
    bounds = torch.tensor(cu_seqlens)
    lengths = bounds.diff()
    starts = bounds[:-1]
    if prefixes is not None:
        continued = torch.tensor(prefixes)
        starts = starts - torch.where(continued >= 0, lengths[continued], 0)
    return to_device(torch.arange(cu_seqlens[-1]) - torch.repeat_interleave(starts, lengths), device)


def piece_plan(start: int, end: int, length: int, prefix_len: int) -> tuple[int, AttentionPlan]:
    """For a piece start .. end of a sequence and a layer that keeps the last `length` tokens: the first position whose key the
    piece's attention takes, and its plan from there on. Tiles of keys lie as in the whole sequence, so what is left out is whole
    tiles, counted from its start or from the prefix's end. Keys taken that the layer has lost are hidden from every query."""
    kept = max(start - length, 0)
    origin = prefix_len if prefix_len <= kept else 0
    first = origin + (kept - origin) // PAGE_TOKENS * PAGE_TOKENS
    if first < prefix_len < end:
        return first, AttentionPlan([0, prefix_len - first, end - first], prefixes=[-1, 0], first_query=start - first)
    return first, AttentionPlan([0, end - first], first_query=start - first)


def previous_rows(cu_seqlens: list[int], prefixes: list[int] | None = None) -> torch.Tensor:
    """The row of the token before each packed token, -1 where there is none: [T] int64. Before a continuation's first token
    stands the last one of its prefix."""
    rows = torch.arange(cu_seqlens[-1]) - 1
    bounds = list(zip(cu_seqlens, cu_seqlens[1:]))
    for (start, end), prefix in zip(bounds, prefixes or [-1] * len(bounds)):
        if start < end:
            rows[start] = -1 if prefix == -1 or bounds[prefix][0] == bounds[prefix][1] else bounds[prefix][1] - 1
    return rows
