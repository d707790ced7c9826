"""A block with a frozen base on a GPU: forward and backward as two plain functions around the kernels.

The same forward serves training and prefill, and those forwards of a base that trains which want no gradient; decode steps, and
prefills of as few tokens, run kernels made for those, which give the same bits: they read each weight once, packed, where the
others unpack a layer first. In training it keeps for the backward what the plan of the layer says, on the GPU or in host memory
(models/memory_plan.py), and the backward computes the rest again with the same kernels; the choice of experts is always kept.
Against autograd and its checkpointing this saves most of the host's work per layer, and it decides about every activation by
itself. Adapters may be on any projection, the router and the experts; sinks and norms may train.

Queries, keys and values are one product whose weights lie side by side; their adapters are slices of one low-rank row.

The residual stream (x, middle, the output, and their gradients) may be fp32 beside a float16 model; products take its gradient
rounded to the model's dtype.

Shapes: T packed tokens, D model width, H query heads, K key-value heads, P = (H + 2 K) * head width, r LoRA's rank, G adapted
projections of a product, E experts, A experts per token.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Callable, NamedTuple

import torch

from kernels.attention.packed import attention_backward, attention_forward
from kernels.attention.plan import AttentionPlan
from kernels.device import product_path
from kernels.experts.few_sorting import can_route_few, route_few
from kernels.experts.forward import MoeKept, moe_backward, moe_forward
from kernels.experts.gemm import grouped_gemm
from kernels.experts.outer import grouped_outer
from kernels.experts.sorting import Routing, make_routing, route_backward, route_forward
from kernels.linear import project
from kernels.linear_few_rows import decode_linear
from kernels.norm import norm_backward, norm_forward
from kernels.rope import rotate
from kernels.router import router_backward
from models.host_store import HostStore, HostTensor
from models.memory_plan import LOOKAHEAD, NAMES, LayerPlan, Place

# up to so many, products are bound by the reading of their weights; their bits were compared on a GPU up to here
MAX_DECODE_TOKENS = 512

# (layer, q, k, v, sinks) -> attention output; what differs between training, prefill and decode
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# (layer, q, k, v, cos, sin): rotates q and k in place; in a decode step it also stores k and v where its attention looks for them
Store = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
# router logits [T, E] -> experts [T, A] of a layer
Choose = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Adapter:
    """LoRA on a product of one or more projections side by side."""

    A: torch.Tensor  # [G * r, in] fp32
    B: torch.Tensor  # [out, r] fp32; rows of columns without an adapter are not read
    groups: torch.Tensor | None  # [out] int32: which slice of the low-rank row a column takes; None with one projection
    scale: float
    carriers: list[tuple[torch.nn.Module, slice]]  # each adapted projection and its columns


@dataclass
class Kept:
    """What one block's forward leaves for its backward. Of x and NAMES, what the plan dropped is missing."""

    tensors: dict[str, torch.Tensor | HostTensor]
    lse: torch.Tensor | None  # [H, T] fp32, beside attended
    adapter_qkv: Adapter | None
    adapter_o: Adapter | None
    low_rank_qkv: torch.Tensor | None  # [T, G r]
    low_rank_o: torch.Tensor | None  # [T, r]
    weights: torch.Tensor  # [T, A] fp32
    routing: Routing
    moe: MoeKept

    def host_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values() if isinstance(tensor, HostTensor))

    def fetch(self) -> None:
        """Starts the way back of what is in host memory."""
        for tensor in self.tensors.values():
            if isinstance(tensor, HostTensor):
                tensor.fetch()

    def take(self, name: str) -> torch.Tensor | None:
        tensor = self.tensors.pop(name, None)
        return tensor.get() if isinstance(tensor, HostTensor) else tensor


@dataclass
class TrainingPass:
    """What all blocks of one forward and backward share."""

    cos: torch.Tensor  # [T, head width / 2] fp32
    sin: torch.Tensor
    attention: AttentionPlan
    scratch_bytes: int  # of dequantised experts held at once
    store: HostStore | None
    max_pending_bytes: int  # on their way to the host, or back, at once
    at_end: Callable[[torch.device], None]  # called when the backward has run
    kept: dict[int, Kept] = field(default_factory=dict)  # by layer, until its backward has run

    def fetch_before(self, layer: int) -> None:
        """Starts the way back of what the next LOOKAHEAD layers of the backward want, as many of them as may be on their way at
        once and at least one."""
        if self.store is None:
            return
        self.store.settle()  # what is still on its way out: the first time, since the forward did not wait
        num_bytes = 0
        for before in range(layer - 1, max(layer - LOOKAHEAD, 0) - 1, -1):
            num_bytes += self.kept[before].host_bytes()
            if num_bytes > self.max_pending_bytes and num_bytes > self.kept[before].host_bytes():
                break
            self.kept[before].fetch()


@cache
def _groups(sizes: tuple[int, ...], has_adapter: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    """For each column of projections side by side, the number of its projection among those with an adapter, or -1."""
    numbers = [sum(has_adapter[:i]) if has else -1 for i, has in enumerate(has_adapter)]
    return torch.tensor(numbers, dtype=torch.int32).repeat_interleave(torch.tensor(sizes)).to(device)


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Rows of all tensors [n, width], one below the other: a view where they lie so in memory (models/lora.py sees to it), else a
    copy."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        follows = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and tensor.storage_offset() == end
        if not (follows and tensor.is_contiguous()):
            return torch.cat(tensors)
        end += tensor.numel()
    return first.detach().as_strided((sum(map(len, tensors)), first.shape[1]), first.stride(), first.storage_offset())


def _adapter_of(*modules: torch.nn.Module) -> Adapter | None:
    """The adapter of projections side by side, None where none of them carries one that is switched on."""
    sizes = tuple(module.weight.shape[0] for module in modules)
    has_adapter = tuple(module.lora_A is not None and module.adapter_enabled for module in modules)
    ends = [sum(sizes[:i + 1]) for i in range(len(sizes))]
    carriers = [(module, slice(end - size, end)) for module, size, end, has in zip(modules, sizes, ends, has_adapter) if has]
    if not carriers:
        return None
    first = carriers[0][0]
    if len(modules) == 1:
        return Adapter(first.lora_A, first.lora_B, None, first.lora_scale, carriers)
    kinds = {(module.lora_A.shape[0], module.lora_scale) for module, _ in carriers}
    if len(kinds) > 1:
        raise ValueError(f"adapters on q_proj, k_proj and v_proj of a layer differ in rank and scale ({sorted(kinds)}); on a GPU "
                         "they must agree")
    if all(has_adapter):
        B = _joined([module.lora_B for module, _ in carriers])
    else:
        B = torch.empty(ends[-1], first.lora_A.shape[0], dtype=torch.float32, device=first.lora_A.device)
        for module, columns in carriers:
            B[columns] = module.lora_B
    return Adapter(_joined([module.lora_A for module, _ in carriers]), B, _groups(sizes, has_adapter, first.lora_A.device),
                   first.lora_scale, carriers)


def _project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
             adapter: Adapter | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [T, in] W^T + b with its adapter in the same accumulator -> [T, out]; and the low-rank rows [T, G r]."""
    if adapter is None:
        return project(x, weight, bias, None, None, scale=1.0)
    return project(x, weight, bias, adapter.A, adapter.B, scale=adapter.scale, lora_groups=adapter.groups)


def _project_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, low_rank: torch.Tensor | None,
                      adapter: Adapter | None, grads: dict[torch.nn.Parameter, torch.Tensor], *,
                      needs_x: bool) -> torch.Tensor | None:
    """The gradient of x [T, in]; those of the adapter's A and B go to `grads`."""
    low_rank_grad = None
    if adapter is not None:
        rank = adapter.B.shape[1]
        parts = [grouped_gemm(grad[:, columns], module.lora_B[None], None, scale=adapter.scale)
                 for module, columns in adapter.carriers]  # [T, r] each
        low_rank_grad = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        grad_A = torch.empty_like(adapter.A)
        grouped_outer(x, low_rank_grad, None, grad_A.T[None])
        for group, (module, columns) in enumerate(adapter.carriers):
            part = slice(group * rank, (group + 1) * rank)
            grads[module.lora_A] = grad_A[part]
            grads[module.lora_B] = torch.empty_like(module.lora_B)
            grouped_outer(grad[:, columns], low_rank[:, part], None, grads[module.lora_B][None])
    if not needs_x:
        return None
    return grouped_gemm(grad, weight[None], None, low_rank=low_rank_grad, lora_up=None if adapter is None else adapter.A[None])


def _norm(norm, x: torch.Tensor,
          residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """norm_forward by the block's own norm: normed rows have the model's dtype, whatever the stream's."""
    return norm_forward(x, residual, norm.weight, norm.eps, norm.weight.dtype)


def _queries_keys_values(block, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views [T, heads, head width] of the product [T, P]."""
    attn = block.self_attn
    widths = [projection.weight.shape[0] for projection in (attn.q_proj, attn.k_proj, attn.v_proj)]
    return tuple(part.unflatten(1, (-1, attn.head_dim)) for part in qkv.split(widths, 1))


def _qkv(block, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
         adapter: Adapter | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotated queries and keys, and values, side by side [T, P]; and the low-rank rows of their adapters."""
    attn = block.self_attn
    qkv, low_rank = _project(normed, *attn.fused_qkv(), adapter)
    q, k, _ = _queries_keys_values(block, qkv)
    rotate(q, k, cos, sin, backward=False, out=(q, k))
    return qkv, low_rank


def _route(block, normed: torch.Tensor, choose: Choose | None) -> tuple[torch.Tensor, Routing]:
    logits = block.mlp.router(normed)
    weights, indices = route_forward(logits, None if choose is None else choose(logits), block.mlp.experts_per_token)
    return weights, make_routing(indices, num_experts=logits.shape[1])


def _decode_route(block, normed: torch.Tensor, choose: Choose | None) -> tuple[torch.Tensor, Routing]:
    """_route, bit for bit."""
    router, per_token = block.mlp.router, block.mlp.experts_per_token
    adapts = router.lora_A is not None and router.adapter_enabled
    if choose is not None or adapts or not can_route_few(len(normed), len(router.weight), per_token):
        return _route(block, normed, choose)
    return route_few(normed, router.weight, router.bias, experts_per_token=per_token)[1:]


def _moe_settings(block) -> dict:
    experts = block.mlp.experts
    return {"lora": experts.lora_tensors(), "lora_scale": experts.lora_scale, "alpha": experts.alpha, "limit": experts.limit}


def _forward(block, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend, scratch_bytes: int, *,
             keeps_h: bool, choose: Choose | None) -> tuple[torch.Tensor, Kept]:
    """The block's output [T, D], and every intermediate that a backward could use (h only where asked for)."""
    attn, experts = block.self_attn, block.mlp.experts
    normed, _, _ = _norm(block.input_layernorm, x)
    adapter_qkv, adapter_o = _adapter_of(attn.q_proj, attn.k_proj, attn.v_proj), _adapter_of(attn.o_proj)
    qkv, low_rank_qkv = _qkv(block, normed, cos, sin, adapter_qkv)
    attended = attend(attn.layer, *_queries_keys_values(block, qkv), attn.sinks).flatten(1)
    projected, low_rank_o = _project(attended, attn.o_proj.weight, attn.o_proj.bias, adapter_o)
    normed, middle, _ = _norm(block.post_attention_layernorm, projected, x)
    del projected
    weights, routing = _route(block, normed, choose)
    y, moe = moe_forward(normed, weights, routing, experts.held("gate_up_proj", scratch_bytes),
                         experts.held("down_proj", scratch_bytes), middle, keeps_h=keeps_h, **_moe_settings(block))
    # x without its history, which leads back to what earlier layers keep: a forward without a backward would never be freed
    tensors = {"x": x.detach(), "qkv": qkv, "attended": attended, "middle": middle} | ({} if moe.h is None else {"h": moe.h})
    moe.h = None
    return y, Kept(tensors, None, adapter_qkv, adapter_o, low_rank_qkv, low_rank_o, weights, routing, moe)


def _decode_project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
    """_project's product, bit for bit."""
    if adapter is None:
        return decode_linear(x, weight, bias)
    return decode_linear(x, weight, bias, lora_A=adapter.A, lora_B=adapter.B, lora_groups=adapter.groups,
                         lora_scale=adapter.scale)


def _decode(block, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend, store: Store,
            choose: Choose | None) -> torch.Tensor:
    """_forward's output, bit for bit, by the kernels for few tokens."""
    attn = block.self_attn
    normed, _, _ = _norm(block.input_layernorm, x)
    qkv = _decode_project(normed, *attn.fused_qkv(), _adapter_of(attn.q_proj, attn.k_proj, attn.v_proj))
    q, k, v = _queries_keys_values(block, qkv)
    store(attn.layer, q, k, v, cos, sin)
    attended = attend(attn.layer, q, k, v, attn.sinks).flatten(1)
    projected = _decode_project(attended, attn.o_proj.weight, attn.o_proj.bias, _adapter_of(attn.o_proj))
    normed, middle, _ = _norm(block.post_attention_layernorm, projected, x)
    return block.mlp.experts.decode(normed, *_decode_route(block, normed, choose), middle)


def _decodes(block, x: torch.Tensor) -> bool:
    """Whether the kernels for few tokens serve the block: not beside a float32 residual stream, which float16 has."""
    return (len(x) <= MAX_DECODE_TOKENS and product_path(x) == "triton" and x.dtype == block.self_attn.o_proj.weight.dtype
            and block.mlp.experts.can_decode())


class DecodeStep(NamedTuple):
    """How a forward by the kernels for few tokens attends. They give the bits of other forwards for up to MAX_DECODE_TOKENS. They
    read nothing back to the host and their grids depend on T alone: once a call has gone before, a CUDA graph can hold one."""

    store: Store
    attend: Attend  # after it


def run_block(block, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend, *, scratch_bytes: int,
              choose: Choose | None, decode: DecodeStep | None) -> torch.Tensor:
    """The block's output [T, D] for x [T, D], without gradient. decode: where it is given, and the kernels for few tokens serve
    the block, they do, and attend as it says instead."""
    if decode is not None and _decodes(block, x):
        return _decode(block, x, cos, sin, decode.attend, decode.store, choose)
    return _forward(block, x, cos, sin, attend, scratch_bytes, keeps_h=False, choose=choose)[0]


def _attention_settings(block, run: TrainingPass) -> dict:
    attn = block.self_attn
    return {"plan": run.attention, "window": attn.window, "scale": attn.head_dim ** -0.5}


def _forward_in_training(block, x: torch.Tensor, run: TrainingPass, plan: LayerPlan,
                         choose: Choose | None) -> torch.Tensor:
    layer, lse = block.self_attn.layer, None

    def attend(layer, q, k, v, sinks):
        nonlocal lse
        out, lse = attention_forward(q, k, v, sinks, **_attention_settings(block, run))
        return out

    y, kept = _forward(block, x, run.cos, run.sin, attend, run.scratch_bytes, keeps_h=plan["h"] != Place.again, choose=choose)
    kept.lse = lse if plan["attended"] != Place.again else None
    for name in [name for name, place in plan.items() if place == Place.again]:
        kept.tensors.pop(name, None)
    for name in [name for name, place in plan.items() if place == Place.host]:
        kept.tensors[name] = run.store.put(kept.tensors[name], max_pending_bytes=run.max_pending_bytes)
    run.kept[layer] = kept
    return y


def _backward(block, grad: torch.Tensor, run: TrainingPass, grads: dict[torch.nn.Parameter, torch.Tensor], *,
              needs_x: bool) -> torch.Tensor | None:
    """The gradient of x from that of the block's output, [T, D] each; those of what trains go to `grads`."""
    attn, moe, kept = block.self_attn, block.mlp, run.kept.pop(block.self_attn.layer)
    run.fetch_before(attn.layer)
    x, qkv, attended, middle, h = (kept.take(name) for name in ("x", *NAMES))
    norm1, norm2 = block.input_layernorm, block.post_attention_layernorm
    settings = _attention_settings(block, run)
    # what the forward did not keep
    normed, _, inv_rms = _norm(norm1, x)
    adapter_qkv, adapter_o = kept.adapter_qkv, kept.adapter_o
    if qkv is None:
        qkv, _ = _qkv(block, normed, run.cos, run.sin, adapter_qkv)
    q, k, v = _queries_keys_values(block, qkv)
    if attended is None:
        out, kept.lse = attention_forward(q, k, v, attn.sinks, **settings)
        attended = out.flatten(1)
    if middle is None:
        projected, _ = _project(attended, attn.o_proj.weight, attn.o_proj.bias, adapter_o)
        normed2, middle, inv_rms2 = _norm(norm2, projected, x)
        del projected
    else:
        normed2, _, inv_rms2 = _norm(norm2, middle)
    # experts and router
    kept.moe.h, h = h, None
    grad_normed, grad_weights, lora_grads = moe_backward(
        grad, normed2, kept.weights, kept.routing, moe.experts.held("gate_up_proj", run.scratch_bytes),
        moe.experts.held("down_proj", run.scratch_bytes), kept.moe, **_moe_settings(block))
    if lora_grads is not None:
        grads.update(zip(moe.experts.lora_tensors(), lora_grads))
    grad_logits = route_backward(grad_weights, kept.weights, kept.routing.indices, moe.router.weight.shape[0])
    router_backward(grad_logits, moe.router.weight, grad_normed, adds=True)
    _router_adapter_backward(moe.router, grad_logits, normed2, grad_normed, grads)
    grad_middle, grad_weight = norm_backward(grad_normed, grad, middle, norm2.weight, inv_rms2, norm2.weight.requires_grad)
    if norm2.weight.requires_grad:
        grads[norm2.weight] = grad_weight
    del grad, grad_normed, normed2, middle, grad_logits
    # attention
    grad_attended = _project_backward(grad_middle.to(attended.dtype), attended, attn.o_proj.weight, kept.low_rank_o, adapter_o,
                                      grads, needs_x=True)
    grad_qkv = torch.empty_like(qkv)
    grad_q, grad_k, grad_v = _queries_keys_values(block, grad_qkv)
    *_, grad_sinks = attention_backward(q, k, v, attn.sinks, attended.view_as(q), kept.lse, grad_attended.view_as(q),
                                        grads=(grad_q, grad_k, grad_v), **settings)
    if attn.sinks.requires_grad:
        grads[attn.sinks] = grad_sinks.sum(0).to(attn.sinks.dtype)
    del attended, grad_attended, qkv, q, k, v
    rotate(grad_q, grad_k, run.cos, run.sin, backward=True, out=(grad_q, grad_k))
    needs_normed = needs_x or norm1.weight.requires_grad
    grad_normed = _project_backward(grad_qkv, normed, attn.fused_qkv()[0], kept.low_rank_qkv, adapter_qkv, grads,
                                    needs_x=needs_normed)
    if not needs_normed:
        return None
    grad_x, grad_weight = norm_backward(grad_normed, grad_middle, x, norm1.weight, inv_rms, norm1.weight.requires_grad)
    if norm1.weight.requires_grad:
        grads[norm1.weight] = grad_weight
    return grad_x


def _router_adapter_backward(router, grad_logits: torch.Tensor, normed: torch.Tensor, grad_normed: torch.Tensor,
                             grads: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    """LoRA on the router, in fp32: its gradients go to `grads`, its share of the input's is added to grad_normed."""
    if router.lora_A is None or not router.adapter_enabled:
        return
    x, grad_up = normed.float(), router.lora_scale * grad_logits  # [T, D], [T, E]
    grad_low_rank = grad_up @ router.lora_B  # [T, r]
    grads[router.lora_A] = grad_low_rank.T @ x
    grads[router.lora_B] = grad_up.T @ (x @ router.lora_A.T)
    grad_normed += (grad_low_rank @ router.lora_A).to(grad_normed.dtype)


class _FrozenBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block, run, plan, choose, *parameters):
        ctx.block, ctx.run, ctx.parameters = block, run, parameters
        return _forward_in_training(block, x, run, plan, choose)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads = {}
        grad_x = _backward(ctx.block, grad.contiguous(), ctx.run, grads, needs_x=ctx.needs_input_grad[0])
        if not ctx.run.kept:
            ctx.run.at_end(grad.device)
        return grad_x, None, None, None, None, *(grads.get(parameter) for parameter in ctx.parameters)


def train_block(block, x: torch.Tensor, run: TrainingPass, plan: LayerPlan, parameters: list[torch.nn.Parameter], *,
                choose: Choose | None) -> torch.Tensor:
    """The block's output [T, D] for x [T, D]; gradients reach x and `parameters`, what trains in the block."""
    return _FrozenBlock.apply(x, block, run, plan, choose, *parameters)
