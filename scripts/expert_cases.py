"""The cases of scripts/bench_kernels.py about experts: router, choice and sort, and products of many rows and of few.

Shapes: T tokens, D model width, E experts, A experts per token, R = T A routed rows, r LoRA's rank.
"""

from functools import cache, partial
from types import SimpleNamespace

import torch
from kernel_cases import LORA_SCALE, Case, Sizes, Work, case, leaf, size_of

from kernels.experts.few_rows import decode_projection, few_rows_forward, low_rank_rows
from kernels.experts.few_sorting import can_route_few, route_few
from kernels.experts.few_tiles import DecodeBlocks
from kernels.experts.forward import activation_grad
from kernels.experts.gemm import GemmBlocks, grouped_gemm
from kernels.experts.outer import OuterBlocks, grouped_outer
from kernels.experts.sorting import Routing, make_routing, make_routing_reference, route, route_reference
from kernels.experts.transport import combine as combine_rows
from kernels.experts.transport import combine_reference, sum_rows
from kernels.packed.mxfp4 import dequantize_reference
from kernels.packed.nf4 import dequantize_nf4_reference
from kernels.packed.weights import ExpertWeights, Mxfp4, Mxfp4Fragments, Nf4
from kernels.router import router_backward, router_forward, router_logits_reference
from kernels.swiglu import swiglu_reference

ACTIVATION = {"alpha": 1.702, "limit": 7.0}
MAX_LAYERS = 6  # of packed experts, whose weights a case of few rows goes through


def routed(s: Sizes, num_tokens: int) -> SimpleNamespace:
    """Tokens routed uniformly at random: x and residual [T, D], gates [T, A] fp32, routing; expert_of [R]; rows: R."""
    num, per_token = s.config.num_local_experts, s.config.num_experts_per_tok
    indices = torch.rand(num_tokens, num, device=s.device).topk(per_token).indices
    routing = make_routing(indices, num_experts=num)
    return SimpleNamespace(
        x=s.normal(num_tokens, s.config.hidden_size), residual=s.normal(num_tokens, s.config.hidden_size), routing=routing,
        gates=torch.softmax(torch.randn(num_tokens, per_token, device=s.device), -1), offsets=routing.offsets_device,
        expert_of=indices.flatten()[routing.order.long()], tokens=routing.tokens.long(), rows=num_tokens * per_token,
        touched=indices.unique().numel())


def router_tensors(s: Sizes, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width, num = s.config.hidden_size, s.config.num_local_experts
    return s.normal(num_tokens, width), s.normal(num, width, scale=width**-0.5), s.normal(num)


def eager_route(s: Sizes, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gate weights, and parts_of the routing."""
    gates, indices = route_reference(logits, s.config.num_experts_per_tok, None)
    return gates, *parts_of(make_routing_reference(indices, s.config.num_local_experts))


def parts_of(routing: Routing) -> tuple[torch.Tensor, ...]:
    return routing.indices, routing.order, routing.offsets_device


def router(s: Sizes) -> Work:
    """Logits in fp32"""
    x, weight, bias = router_tensors(s, s.tokens)
    return Work([lambda: router_forward(x, weight, bias)], 0, size_of(x) + 4 * s.tokens * len(weight),
                lambda: router_logits_reference(x, weight, bias))


def router_gradient(s: Sizes) -> Work:
    """Added to the gradient of x"""
    x, weight, _ = router_tensors(s, s.tokens)
    grad = torch.randn(s.tokens, len(weight), device=s.device)

    def add_to(grad_x: torch.Tensor) -> torch.Tensor:
        router_backward(grad, weight, grad_x)
        return grad_x

    return Work([lambda: add_to(x)], 0, 2 * size_of(x) + size_of(grad), lambda: (x.float() + grad @ weight.float()).to(x.dtype),
                result=lambda: add_to(x.clone()))


def route_rows(s: Sizes) -> Work:
    """Choice, gate weights and sort by expert"""
    logits = torch.randn(s.tokens, s.config.num_local_experts, device=s.device)

    def call():
        gates, routing = route(logits, experts_per_token=s.config.num_experts_per_tok)
        return gates, *parts_of(routing)

    return Work([call], 0, size_of(logits) + 28 * s.tokens * s.config.num_experts_per_tok, lambda: eager_route(s, logits))


def sort_rows(s: Sizes) -> Work:
    """The sort by expert alone"""
    indices, num = routed(s, s.tokens).routing.indices, s.config.num_local_experts
    return Work([lambda: parts_of(make_routing(indices, num_experts=num))], 0, 20 * indices.numel(),
                lambda: parts_of(make_routing_reference(indices, num)))


def route_few_rows(s: Sizes, num_rows: int) -> Work:
    """Logits, choice and sort"""
    layers = [router_tensors(s, num_rows) for _ in range(s.max_layers)]

    def call(x, weight, bias):
        _, gates, routing = route_few(x, weight, bias, experts_per_token=s.config.num_experts_per_tok)
        return gates, *parts_of(routing)

    return Work([partial(call, *layer) for layer in layers], 0, size_of(*layers[0]),
                lambda: eager_route(s, router_logits_reference(*layers[0])))


def combine(s: Sizes, *, is_backward: bool) -> Work:
    """Rows of each token summed; with gate weights and the residual"""
    d = routed(s, s.tokens)
    rows = s.normal(d.rows, s.config.hidden_size)
    gates, residual = (None, None) if is_backward else (d.gates, d.residual)
    factors = torch.ones_like(d.gates) if is_backward else d.gates
    return Work([lambda: sum_rows(rows, gates, d.routing.inverse, residual)], 0,
                size_of(rows, d.x) + (0 if is_backward else size_of(d.x)),
                lambda: combine_reference(rows, factors, d.routing, residual))


def swiglu(h: torch.Tensor) -> torch.Tensor:
    return swiglu_reference(h, **ACTIVATION)


def swiglu_gradient(s: Sizes) -> Work:
    """Activation, its gradient and that of the gate weights"""
    d, inner = routed(s, s.tokens), s.config.intermediate_size
    grad, h, order = s.normal(d.rows, inner), 3 * s.normal(d.rows, 2 * inner), d.routing.order
    row_gates = d.gates.flatten()[order.long()][:, None]  # [R, 1]

    def call(grad, h):
        return grad, h, activation_grad(grad, h, d.gates, order, **ACTIVATION, dots=torch.zeros_like(d.gates))

    def eager():
        with torch.enable_grad():
            source = leaf(h)
            activation = swiglu(source)
            (grad_h,) = torch.autograd.grad(activation, source, (grad.float() * row_gates).to(grad.dtype))
        dots = torch.zeros_like(d.gates).flatten()
        dots[order.long()] = (grad.float() * activation.float()).sum(1)
        return activation.detach(), grad_h, dots.view_as(d.gates)

    kept = grad.clone(), h.clone()
    return Work([lambda: call(grad, h)], 0, 2 * size_of(grad, h) + 2 * size_of(d.gates) + size_of(order), eager,
                result=lambda: call(*(tensor.clone() for tensor in kept)))


def packed_weights(s: Sizes, layout: type[ExpertWeights], size_in: int, size_out: int) -> ExpertWeights:
    """Random codes, products of the size of their inputs. Any bytes are weights in every layout."""
    num, bias = s.config.num_local_experts, s.normal(s.config.num_local_experts, size_out)
    (codes, _), (scales, _) = layout.stored(num, size_in, size_out)
    codes = s.below(256, *codes).to(torch.uint8)
    if layout is Nf4:
        return Nf4(codes, 2 * torch.rand(scales, device=s.device) * size_in**-0.5, bias)
    scales = (119 + s.below(4, *scales)).to(torch.uint8)
    return Mxfp4(codes, scales, bias) if layout is Mxfp4 else Mxfp4Fragments(codes, scales, bias, True)


def unpacked(s: Sizes, weights: ExpertWeights) -> torch.Tensor:
    """[E, out, in] in the model's dtype, by eager PyTorch."""
    reference = dequantize_nf4_reference if isinstance(weights, Nf4) else dequantize_reference
    return torch.stack([reference(*weights.as_stored(expert), s.dtype) for expert in range(len(weights.bias))])


def dequantize(s: Sizes, layout: type[ExpertWeights]) -> Work:
    """Gate_up of a layer"""
    weights = packed_weights(s, layout, s.config.hidden_size, 2 * s.config.intermediate_size)
    out = torch.empty(weights.shape, dtype=s.dtype, device=s.device)
    return Work([lambda: weights.dequantize(slice(None), out)], 0, size_of(*weights.tensors(), out), lambda: unpacked(s, weights))


def expert_lora(s: Sizes) -> tuple[torch.Tensor, ...]:
    """A [E, r, in] and B [E, out, r] of gate_up and of down, fp32."""
    width, inner = s.config.hidden_size, s.config.intermediate_size
    pairs = [(s.normal(s.config.num_local_experts, s.rank, size_in, scale=size_in**-0.5, dtype=torch.float32),
              s.normal(s.config.num_local_experts, size_out, s.rank, scale=0.1, dtype=torch.float32))
             for size_in, size_out in ((width, 2 * inner), (inner, width))]
    return pairs[0] + pairs[1]


def grouped(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The library's: rows [R, in] in expert order by weight [E, in, out]."""
    return torch._grouped_mm(rows, weight.to(rows.dtype), offs=offsets[1:])


def eager_experts(d: SimpleNamespace, dense: list[torch.Tensor], biases: list[torch.Tensor],
                  lora: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
    """All experts of d.x; of gate_up and down each a weight [E, in, out] and a bias [E, out]."""

    def projected(rows: torch.Tensor, index: int) -> torch.Tensor:
        y = grouped(rows, dense[index], d.offsets) + biases[index][d.expert_of]
        if lora is None:
            return y
        A, B = (tensor.transpose(1, 2) for tensor in lora[2 * index:2 * index + 2])
        return y + grouped(LORA_SCALE * grouped(rows, A, d.offsets), B, d.offsets)

    return combine_reference(projected(swiglu(projected(d.x[d.tokens], 0)), 1), d.gates, d.routing, d.residual)


def expert_flops(s: Sizes, num_rows: int, *, has_lora: bool) -> float:
    """Of gate_up and down for so many routed rows."""
    width, inner = s.config.hidden_size, s.config.intermediate_size
    return 2.0 * num_rows * (3 * width * inner + (s.rank * (2 * width + 3 * inner) if has_lora else 0))


def widths(s: Sizes, name: str) -> tuple[int, int]:
    """Inputs and outputs of gate_up or down."""
    width, inner = s.config.hidden_size, s.config.intermediate_size
    return (width, 2 * inner) if name == "gate_up" else (inner, width)


def product(s: Sizes, name: str, side: str = "W", *, back: bool = False, gathers: bool = False, has_lora: bool = False,
            activates: bool = False, keeps_h: bool = False) -> Work:
    """Rows by their expert's weights, by LoRA's A, or back through these or its B"""
    # has_lora: LoRA's second product joins the accumulator, and forwards the bias
    d, num, (size_in, size_out) = routed(s, s.tokens), s.config.num_local_experts, widths(s, name)
    size_in, size_out = {"W": (size_in, size_out), "A": (size_in, s.rank), "B": (s.rank, size_out)}[side]
    weight = s.normal(num, size_out, size_in, scale=size_in**-0.5, dtype=None if side == "W" else torch.float32)
    weight = weight if back else weight.transpose(1, 2)  # [E, in, out] of this product
    size_in, size_out = weight.shape[1:]
    x, low_rank = s.normal(s.tokens if gathers else d.rows, size_in), s.normal(d.rows, s.rank)
    up = s.normal(num, s.rank, size_out, scale=0.1, dtype=torch.float32)
    options = {"low_rank": low_rank, "lora_up": up} if has_lora else {}
    options |= {"gather": d.routing.tokens} if gathers else {}
    options |= {"bias": s.normal(num, size_out)} if has_lora and not back else {}
    options |= {"swiglu": tuple(ACTIVATION.values())} if activates else {}
    options |= {} if side == "W" else {"scale": LORA_SCALE}
    h = s.normal(d.rows, size_out) if keeps_h else None
    out = s.normal(d.rows, size_out // 2 if activates else size_out)

    def call(blocks=None):
        grouped_gemm(x, weight, d.offsets, **options, pre_activation=h, out=out, blocks=blocks)
        return (out, h) if keeps_h else out

    def eager():
        y = options.get("scale", 1) * grouped(x[d.tokens] if gathers else x, weight, d.offsets)
        if has_lora:
            y = y + grouped(low_rank, up, d.offsets) + (0 if back else options["bias"][d.expert_of])
        return (swiglu(y), y) if keeps_h else swiglu(y) if activates else y

    moved = [x, weight, out] + ([low_rank, up] if has_lora else []) + ([h] if keeps_h else [])
    return Work([call], 2.0 * d.rows * size_out * (size_in + s.rank * has_lora), size_of(*moved), eager, blocks=GemmBlocks)


def gradient(s: Sizes, size_a: int, size_b: int, *, gathers: bool = False, scales: bool = False, is_lora: bool = True) -> Work:
    """Sums over an expert's rows: gradients of LoRA's A and B, or of weights"""
    d = routed(s, s.tokens)
    a, b = s.normal(s.tokens if gathers else d.rows, size_a), s.normal(d.rows, size_b)
    out = torch.empty(s.config.num_local_experts, size_a, size_b, device=s.device, dtype=torch.float32 if is_lora else s.dtype)
    scale, gather = d.gates.flatten()[d.routing.order.long()] if scales else None, d.routing.tokens if gathers else None

    def eager():
        rows, scaled = a[d.tokens] if gathers else a, b if scale is None else (b * scale[:, None]).to(b.dtype)
        return torch._grouped_mm(rows.T, scaled, offs=d.offsets[1:])

    return Work([lambda blocks=None: grouped_outer(a, b, d.offsets, out, gather=gather, row_scale=scale, blocks=blocks)],
                2.0 * d.rows * size_a * size_b, size_of(a, b, out), eager, blocks=OuterBlocks)


def packed_layers(s: Sizes, d: SimpleNamespace, *names: str) -> tuple[list[list[ExpertWeights]], float]:
    """Gate_up, down or both of as many layers as a graph goes through, and the bytes of one layer's experts that have rows."""

    def one() -> list[ExpertWeights]:
        return [packed_weights(s, Mxfp4Fragments, *widths(s, name)) for name in names]

    first = one()
    num_bytes = sum(size_of(*weights.tensors()) for weights in first) * d.touched / s.config.num_local_experts
    return [first, *(one() for _ in range(min(s.num_layers(num_bytes), MAX_LAYERS) - 1))], num_bytes


def few_projection(s: Sizes, num_rows: int, name: str) -> Work:
    """Gate_up with its activation, or down, from packed weights"""
    d, (size_in, size_out) = routed(s, num_rows), widths(s, name)
    layers, num_bytes = packed_layers(s, d, name)
    is_first, (first,) = name == "gate_up", layers[0]
    x = d.x if is_first else s.normal(d.rows, size_in)
    options = {"gather": d.routing.tokens, "swiglu": tuple(ACTIVATION.values())} if is_first else {}
    dense = cache(lambda: unpacked(s, first).transpose(1, 2))

    def eager():
        y = grouped(x[d.tokens] if is_first else x, dense(), d.offsets) + first.bias[d.expert_of]
        return swiglu(y) if is_first else y

    return Work([lambda blocks=None, layer=layer: decode_projection(x, layer.few_rows(x, d.offsets), d.offsets, blocks=blocks,
                                                                    **options) for (layer,) in layers],
                2.0 * d.rows * size_in * size_out, num_bytes + size_of(x), eager, blocks=DecodeBlocks)


def few_low_rank(s: Sizes, num_rows: int) -> Work:
    """Gathered rows by LoRA's A, as in a short prefill (decode steps: in W's launch)"""
    d = routed(s, num_rows)
    shape, options = (s.config.num_local_experts, s.rank, d.x.shape[1]), {"scale": LORA_SCALE, "gather": d.routing.tokens}
    layers = [s.normal(*shape, dtype=torch.float32) for _ in range(s.max_layers)]
    return Work([lambda blocks=None, A=A: low_rank_rows(d.x, A, d.offsets, blocks=blocks, **options) for A in layers],
                2.0 * d.rows * d.x.shape[1] * s.rank, size_of(layers[0][0]) * d.touched,
                lambda: LORA_SCALE * grouped(d.x[d.tokens], layers[0].transpose(1, 2), d.offsets), blocks=DecodeBlocks)


def few_whole(s: Sizes, num_rows: int, *, has_lora: bool) -> Work:
    """All of a layer's experts from packed weights, with LoRA as in a short prefill"""
    d = routed(s, num_rows)
    pairs, num_bytes = packed_layers(s, d, "gate_up", "down")
    loras = [expert_lora(s) if has_lora else None for _ in pairs]
    dense = cache(lambda: [unpacked(s, weights).transpose(1, 2) for weights in pairs[0]])

    def call(pair, lora):
        few = (weights.few_rows(d.x, d.offsets) for weights in pair)
        rows = few_rows_forward(d.x, d.routing, *few, lora=lora, lora_scale=LORA_SCALE, **ACTIVATION)
        return combine_rows(rows, d.gates, d.routing, d.residual)

    return Work([partial(call, *layer) for layer in zip(pairs, loras)], expert_flops(s, d.rows, has_lora=has_lora),
                num_bytes + (size_of(*loras[0]) * d.touched / s.config.num_local_experts if has_lora else 0),
                lambda: eager_experts(d, dense(), [weights.bias for weights in pairs[0]], loras[0]))


def cases_of(s: Sizes) -> list[Case]:
    """The rows of the table that are about experts."""
    width, inner, library, row = s.config.hidden_size, s.config.intermediate_size, "torch._grouped_mm", partial(case, s)
    found = [
        row("router", "eager", router),
        row("router backward", "eager", router_gradient),
        row("route", "eager", route_rows),
        row("route sort alone", "eager", sort_rows),
        row("combine", "eager", combine, is_backward=False),
        row("combine backward of dispatch", "eager", combine, is_backward=True),
        row("swiglu backward", "eager", swiglu_gradient),
        row("dequantize MXFP4", "eager", dequantize, Mxfp4),
        row("dequantize MXFP4 fragments", "eager", dequantize, Mxfp4Fragments),
        row("dequantize NF4", "eager", dequantize, Nf4),
        row("experts gate_up plain", library, product, "gate_up"),
        row("experts gate_up", library, product, "gate_up", gathers=True, has_lora=True, activates=True),
        row("experts gate_up keeps h", library, product, "gate_up", gathers=True, has_lora=True, activates=True, keeps_h=True),
        row("experts down", library, product, "down", has_lora=True),
        row("experts down backward", library, product, "down", back=True, gathers=True, has_lora=True),
        row("experts gate_up backward", library, product, "gate_up", back=True, has_lora=True),
        row("experts LoRA x A1", library, product, "gate_up", "A", gathers=True),
        row("experts LoRA act A2", library, product, "down", "A"),
        row("experts LoRA dh B1", library, product, "gate_up", "B", back=True),
        row("experts LoRA dy B2", library, product, "down", "B", back=True, gathers=True),
        row("experts LoRA dA1", library, gradient, width, s.rank, gathers=True),
        row("experts LoRA dB1", library, gradient, 2 * inner, s.rank),
        row("experts LoRA dA2", library, gradient, inner, s.rank, scales=True),
        row("experts LoRA dB2", library, gradient, width, s.rank, gathers=True, scales=True),
        row("experts dW gate_up", library, gradient, width, 2 * inner, is_lora=False),
        row("experts dW down", library, gradient, inner, width, is_lora=False),
    ]
    for rows in s.rows:
        if can_route_few(rows, s.config.num_local_experts, s.config.num_experts_per_tok):
            found.append(row(f"route few {rows}", "eager", route_few_rows, rows))
        found += [
            row(f"experts few gate_up {rows}", library, few_projection, rows, "gate_up"),
            row(f"experts few down {rows}", library, few_projection, rows, "down"),
            row(f"experts few LoRA x A1 {rows}", library, few_low_rank, rows),
            row(f"experts few whole {rows}", library, few_whole, rows, has_lora=False),
            row(f"experts few whole LoRA {rows}", library, few_whole, rows, has_lora=True),
        ]
    return found
