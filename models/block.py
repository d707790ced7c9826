"""A layer of gpt-oss: x += attention(norm(x)); x += experts(norm(x)). One forward for training, prefill and decode, one backward.

On the CPU autograd differentiates Block.forward, through the references. On a GPU the same functions run kernels that autograd
does not see, and Block.backward computes the gradients. Which kernel runs depends on the number of rows and the layout of the
weights; the bits do not. Block.backward calls the same functions again for whatever the forward did not keep
(models/offload.py); the choice of experts is always kept. Adapters and base weights may train in any combination.

A mixture of experts needs several times the memory of the rest of its layer, and its tokens are independent: more than
CHUNK_TOKENS run in chunks of that many, in the forward and in the backward, whatever memory there is. The forward's bits are
those of all tokens at once (not if the library multiplies). Each chunk gives gradients of the parameters in their dtype; their
sum is fp32, rounded at the end.

The residual stream (x, middle, the output, and their gradients) is fp32 in a float16 model; products take its gradient rounded to
the model's dtype.

Shapes: T packed tokens, D model width, H query heads, K key-value heads, P = (H + 2 K) * head width, A experts per token.
"""
from __future__ import annotations

import torch
from torch import nn

from kernels.device import is_few
from kernels.experts.few_sorting import can_route_few, route_few
from kernels.experts.sorting import Routing, route, route_backward
from kernels.linear import Gradients, linear, linear_backward
from kernels.norm import add_rms_norm, norm_backward, norm_forward, rms_norm
from kernels.packed.weights import ExpertWeights
from models.config import GptOssConfig
from models.expert_share import ExpertShare
from models.experts import RoutedExperts
from models.keys import Keys, PackedKeys, rotated
from models.offload import Kept, TrainingPass, chunks_of
from models.projections import Linear, Router, linears
from models.routing_record import RoutingRecord, RoutingReplay


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

    def recompute(self, x: torch.Tensor,
                  residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """For the backward, on a GPU: the norm of x, None and inv_rms [T] for backward(); with a residual, the norm of residual
        + x, that sum and inv_rms."""
        return norm_forward(x, residual, self.weight, self.eps, self.weight.dtype)

    def backward(self, grad: torch.Tensor, grad_total: torch.Tensor, x: torch.Tensor, inv_rms: torch.Tensor, grads: Gradients,
                 *, in_place: bool = False) -> torch.Tensor:
        """The gradient of x, including grad_total, which comes from the residual stream; in place of that if asked."""
        grad_x, grad_weight = norm_backward(grad, grad_total, x, self.weight, inv_rms, self.weight.requires_grad,
                                            in_place=in_place)
        if grad_weight is not None:
            grads[self.weight] = grad_weight
        return grad_x


class Attention(nn.Module):
    def __init__(self, config: GptOssConfig, layer: int, **factory) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window = config.sliding_window if config.is_windowed(layer) else 0  # 0: none
        width = config.hidden_size
        self.widths = [config.q_width, config.kv_width, config.kv_width]
        self.q_proj, self.k_proj, self.v_proj = linears(width, self.widths, **factory)
        (self.o_proj,) = linears(config.q_width, [width], **factory)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads, **factory), requires_grad=False)

    def qkv(self) -> list[Linear]:
        """The projections that are computed as one product."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views [T, heads, head width] of queries, keys and values in their product [T, P]."""
        return tuple(part.unflatten(1, (-1, self.head_dim)) for part in qkv.split(self.widths, 1))

    def settings(self) -> dict[str, float]:
        """The keyword arguments of the attention kernels."""
        return {"window": self.window, "scale": self.head_dim ** -0.5}


class MixtureOfExperts(nn.Module):
    def __init__(self, config: GptOssConfig, layer: int, expert_format: type[ExpertWeights], *,
                 experts_device: torch.device | str, share: ExpertShare | None, **factory) -> None:
        super().__init__()
        self.layer, self.experts_per_token = layer, config.num_experts_per_tok
        (router,) = linears(config.hidden_size, [config.num_local_experts], **factory)
        self.router = Router(router.weight, router.bias)
        self.experts = RoutedExperts(config, expert_format, weights_device=experts_device, share=share, **factory)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, rows: slice, record: RoutingRecord | RoutingReplay | None,
                kept: Kept | None) -> torch.Tensor:
        """residual [T, D] plus the experts' outputs for x [T, D]: tokens `rows` of the layer's. kept: of this chunk."""
        weights, routing = self.route(x, rows, record, kept)
        if kept is not None:
            kept.keep({"weights": weights})
            kept.routing = routing
        return self.experts(x, weights, routing, residual, kept)

    def route(self, x: torch.Tensor, rows: slice, record: RoutingRecord | RoutingReplay | None,
              kept: Kept | None) -> tuple[torch.Tensor, Routing]:
        """Gate weights [T, A] fp32 and the routing of x [T, D]."""
        router = self.router
        if (kept is None and record is None and is_few(x) and not router.has_adapter()
                and can_route_few(len(x), len(router.weight), self.experts_per_token)):
            return route_few(x, router.weight, router.bias, experts_per_token=self.experts_per_token)[1:]
        logits = router(x)
        indices = None if record is None else record.choose(self.layer, logits, rows)
        return route(logits, experts_per_token=self.experts_per_token, indices=indices)

    def backward(self, grad: torch.Tensor, x: torch.Tensor, kept: Kept, grads: Gradients) -> torch.Tensor:
        """The gradient of x [T, D], the norm's output. grad: the gradient of the layer's output."""
        weights, routing = kept.take("weights"), kept.routing
        grad_x, grad_weights = self.experts.backward(grad, x, weights, routing, kept, grads)
        grad_logits = route_backward(grad_weights, weights, routing.indices, len(self.router.weight))
        self.router.backward(grad_logits, x, grad_x, grads)
        return grad_x


class Block(nn.Module):
    def __init__(self, config: GptOssConfig, layer: int, expert_format: type[ExpertWeights], *,
                 experts_device: torch.device | str, share: ExpertShare | None, **factory) -> None:
        super().__init__()
        self.gathers = False  # its hooks gather its weights, for passes with gradient alone (grpo/distributed/shards.py)
        self.input_layernorm = RMSNorm(config, **factory)
        self.self_attn = Attention(config, layer, **factory)
        self.post_attention_layernorm = RMSNorm(config, **factory)
        self.mlp = MixtureOfExperts(config, layer, expert_format, experts_device=experts_device, share=share, **factory)

    def forward(self, x: torch.Tensor, keys: Keys, record: RoutingRecord | RoutingReplay | None,
                kept: Kept | None = None) -> torch.Tensor:
        """The layer's output [T, D]. record: records or replays the choice of experts. kept: gets what the backward needs."""
        attn = self.self_attn
        normed = self.input_layernorm(x)
        qkv, low_rank_qkv = linear(attn.qkv(), normed, keeps_low_rank=kept is not None)  # [T, P]
        del normed
        attended = keys.attend(attn, qkv, kept)  # [T, H * head width]
        del qkv
        projected, low_rank_o = linear([attn.o_proj], attended, keeps_low_rank=kept is not None)
        del attended
        normed, middle = self.post_attention_layernorm.add(projected, x)
        del projected
        if kept is not None:
            # detached: x's graph would keep earlier layers' tensors alive if no backward follows
            kept.keep({"x": x.detach(), "middle": middle, "low_rank_qkv": low_rank_qkv, "low_rank_o": low_rank_o})
        parts = []
        for rows in chunks_of(len(x)):
            parts.append(self.mlp(normed[rows], middle[rows], rows, record, None if kept is None else kept.new_chunk()))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forward_with_grad(self, x: torch.Tensor, keys: PackedKeys, record: RoutingReplay | None,
                          training_pass: TrainingPass) -> torch.Tensor:
        """forward() on a GPU, with gradients of x and of the layer's trainable parameters."""
        trainable = (parameter for parameter in self.parameters() if parameter.requires_grad)
        return _Trained.apply(x, self, keys, record, training_pass, *trainable)

    def backward(self, grad: torch.Tensor, keys: PackedKeys, kept: Kept, grads: Gradients, *,
                 needs_x: bool) -> torch.Tensor | None:
        """Returns the gradient of x [T, D]; puts those of trainable parameters into `grads`. grad [T, D]: of the output; it is
        overwritten."""
        attn, norm = self.self_attn, self.input_layernorm
        x, qkv, attended, lse = (kept.take(name) for name in ("x", "qkv", "attended", "lse"))
        # what the forward did not keep
        if qkv is None:
            qkv, _ = linear(attn.qkv(), norm.recompute(x)[0], keeps_low_rank=True)
            rotated(attn, qkv, keys.angles)
        if attended is None:
            attended, lse = keys.attend_rotated(attn, qkv)
        # experts: `grad` becomes the gradient of middle
        self._backward_in_chunks(grad, x, attended, kept, grads)
        # attention
        grad_attended = linear_backward([attn.o_proj], grad.to(attended.dtype), attended, kept.take("low_rank_o"), grads,
                                        needs_x=True)
        grad_qkv, grad_sinks = keys.backward(attn, grad_attended, qkv, attended, lse)
        if attn.sinks.requires_grad:
            grads[attn.sinks] = grad_sinks.sum(0).to(attn.sinks.dtype)
        del attended, grad_attended, qkv, lse
        needs_normed = needs_x or norm.weight.requires_grad
        normed, _, inv_rms = norm.recompute(x)
        grad_normed = linear_backward(attn.qkv(), grad_qkv, normed, kept.take("low_rank_qkv"), grads, needs_x=needs_normed)
        del grad_qkv, normed
        return norm.backward(grad_normed, grad, x, inv_rms, grads) if needs_normed else None

    def _backward_in_chunks(self, grad: torch.Tensor, x: torch.Tensor, attended: torch.Tensor, kept: Kept,
                            grads: Gradients) -> None:
        """The backward from the output to middle: grad [T, D] of the one becomes that of the other, in place. Adds the chunks'
        gradients of trainable parameters in fp32, and puts the sums, in the parameters' dtype, into `grads`."""
        norm, middle, chunks, sums = self.post_attention_layernorm, kept.take("middle"), chunks_of(len(x)), {}
        for rows, chunk in zip(chunks, kept.chunks, strict=True):
            if middle is None:
                projected, _ = linear([self.self_attn.o_proj], attended[rows], keeps_low_rank=True)
                normed, residual, inv_rms = norm.recompute(projected, x[rows])
                del projected
            else:
                residual = middle[rows]
                normed, _, inv_rms = norm.recompute(residual)
            own: Gradients = {}
            grad_normed = self.mlp.backward(grad[rows], normed, chunk, own)
            norm.backward(grad_normed, grad[rows], residual, inv_rms, own, in_place=True)
            del normed, residual, grad_normed
            for parameter, part in own.items():
                if parameter in sums:
                    sums[parameter] += part
                else:
                    sums[parameter] = part if len(chunks) == 1 else part.float()
        grads |= {parameter: total.to(parameter.dtype) for parameter, total in sums.items()}


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, block, keys, record, training_pass, *parameters):
        ctx.block, ctx.keys, ctx.training_pass, ctx.parameters = block, keys, training_pass, parameters
        layer = block.self_attn.layer
        kept = training_pass.new(layer)
        y = (block.forward if block.gathers else block)(x, keys, record, kept)
        training_pass.put(layer, kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        kept, grads = ctx.training_pass.take(ctx.block.self_attn.layer), {}
        grad_x = ctx.block.backward(grad.contiguous(), ctx.keys, kept, grads, needs_x=ctx.needs_input_grad[0])
        if not ctx.training_pass.kept:
            ctx.training_pass.at_end(grad.device)
        return grad_x, None, None, None, None, *(grads.get(parameter) for parameter in ctx.parameters)
