"""What scripts/bench_kernels.py times: each operation of a gpt-oss layer and head, in the functions that the model calls, beside
the same computation by eager PyTorch or the vendor's libraries.

Shapes: T tokens, D model width, F expert width, E experts, A experts per token, R = T A routed rows, H query heads, K key-value
heads, r LoRA's rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, product
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench_train import flops_per_token, random_batch, train_step
from random_checkpoint import model_config
from random_policy import attach_random_lora
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels.attention.decode import SharedPrefixes, decode_attention, decode_attention_reference, rows_per_tile
from kernels.attention.packed import (
    AttentionBlocks,
    attention_backward,
    attention_forward,
    blocks_for,
    dkv_triton,
    dq_triton,
    forward_triton,
)
from kernels.attention.plan import AttentionPlan
from kernels.attention.reference import attention_reference
from kernels.device import gpu_family
from kernels.embedding import gather_rows
from kernels.head.draw import draw, head_logits
from kernels.head.kl import kl_divergence
from kernels.head.log_probs import log_probs
from kernels.linear import linear, linear_backward
from kernels.norm import add_rms_norm_reference, norm_backward, norm_forward, rms_norm_reference
from kernels.rope import rope_reference, rotate_
from models.config import GptOssConfig
from models.gpt_oss import GptOss
from models.kv_cache import PAGE_TOKENS
from models.lora import set_full_training
from models.offload import visible_pairs
from models.projections import Linear, linears, side_by_side

LAYER_TYPES = {"full": "full_attention", "windowed": "sliding_attention"}
EPS, LORA_SCALE, TEMPERATURE = 1e-5, 2.0, 0.9
GRAPH_BYTES = 2**28  # that a graph of few rows should read: more than any L2 cache holds


@dataclass
class Sizes:
    """What one model's operations are timed at."""

    config: GptOssConfig
    dtype: torch.dtype
    device: str
    tokens: int  # of training
    rows: tuple[int, ...]  # of decode steps
    packings: dict[str, list[int]]  # name -> lengths of packed sequences
    contexts: list[tuple[int, int]]  # decoded rows, keys of each
    shared: list[tuple[int, int, int]]  # decoded rows, keys of the prompt they share, keys after it
    max_layers: int = 24  # whose weights a case of few rows goes through
    rank: int = 16

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(dtype or self.dtype)

    def below(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, device=self.device)

    def num_layers(self, num_bytes: float) -> int:
        """How many layers' weights, of so many bytes each, a graph goes through."""
        return min(max(2, math.ceil(GRAPH_BYTES / num_bytes)), self.max_layers)


def sizes_of(name: str, device: str, *, tokens: int | None = None, rows: list[int] | None = None) -> Sizes:
    """Those of 20b, of 120b, or tiny ones in fp32 whose widths differ, so that a missing transpose shows."""
    if name == "tiny":
        config = replace(model_config("tiny"), vocab_size=96, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
                         intermediate_size=32, head_dim=16)
        return Sizes(config, torch.float32, device, tokens or 12, tuple(rows or (3,)), {"2 of 5 and 9": [5, 9]},
                     [(2, 70)], [(3, 64, 5)], max_layers=1, rank=4)
    packings = {"1 x 2048": [2048], "4 x 2048": [2048] * 4, "1 x 8192": [8192], "1 x 32768": [32768],
                "64 of 100 to 900": [100 + 800 * (7 * index % 64) // 63 for index in range(64)]}
    contexts = [(1, 1024), (8, 1024), (32, 1024), (128, 1024), (512, 1024), (8, 8192), (4, 32768), (1, 8192), (1, 32768),
                (1, 131072)]
    return Sizes(model_config(name), torch.bfloat16, device, tokens or 8192, tuple(rows or (1, 8, 32, 128, 512)), packings,
                 contexts, [(128, 1024, 512), (64, 8192, 512)])


Call = Callable[[], object]


@dataclass
class Work:
    """One operation on tensors that lie ready."""

    calls: list[Callable[..., object]]  # the operation; several: on the weights of several layers
    flops: float  # of its products alone; attention: of visible pairs
    num_bytes: float  # every input and output once
    peer: Call | None = None  # the same as the first call
    result: Call | None = None  # what is compared with the peer's, where the call itself works in place
    expected: Call | None = None  # to compare with, where the peer computes something else
    blocks: type | None = None  # what the calls take as `blocks`


class Case(NamedTuple):
    """A row of the table."""

    name: str  # starts with its group
    computes: str
    peer: str  # what it is compared with
    make: Callable[[], Work]


def case(s: Sizes, name: str, peer: str, function: Callable, *arguments, **settings) -> Case:
    """A row that a function of this docstring makes."""
    return Case(name, function.__doc__.splitlines()[0], peer, partial(function, s, *arguments, **settings))


def size_of(*tensors: torch.Tensor) -> int:
    """Bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def backward_of(function: Callable, inputs: list[torch.Tensor], grads: list[torch.Tensor]) -> Call:
    """The eager backward of a function of these inputs; its forward runs once, at the first call."""
    graph = cache(lambda: (leaves := [leaf(tensor) for tensor in inputs], function(*leaves)))

    def backward():
        leaves, outputs = graph()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    return backward


# ---------------------------------------------------------------------------------------------- norm, rotation, embedding


def norm(s: Sizes, *, adds: bool) -> Work:
    """The norm of x, or residual + x and its norm"""
    x, residual, weight = *(s.normal(s.tokens, s.config.hidden_size) for _ in range(2)), s.normal(s.config.hidden_size)
    if not adds:
        return Work([lambda: norm_forward(x, None, weight, EPS, x.dtype)[0]], 0, 2 * size_of(x),
                    lambda: rms_norm_reference(x, weight, EPS, x.dtype))
    return Work([lambda: norm_forward(x, residual, weight, EPS, x.dtype)[:2]], 0, 4 * size_of(x),
                lambda: add_rms_norm_reference(x, residual, weight, EPS))


def norm_gradient(s: Sizes, *, adds: bool, trains: bool) -> Work:
    """Gradients of x and, in full training, of the weight"""
    x, grad, grad_x = (s.normal(s.tokens, s.config.hidden_size) for _ in range(3))
    weight = s.normal(s.config.hidden_size)
    inv_rms = norm_forward(x, None, weight, EPS, x.dtype)[2]

    def eager(x, weight=weight):
        normed = rms_norm_reference(x, weight, EPS, x.dtype)
        return (normed, x.clone()) if adds else normed

    def call():
        found = norm_backward(grad, grad_x if adds else None, x, weight, inv_rms, trains)
        return found if trains else found[:1]

    peer = backward_of(eager, [x, weight] if trains else [x], [grad, grad_x] if adds else [grad])
    return Work([call], 0, (4 if adds else 3) * size_of(x), peer)


def angles_of(s: Sizes, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [rows, head width / 2]"""
    half = s.config.head_dim // 2
    angles = torch.arange(num_rows, device=s.device)[:, None] * 150000.0 ** (-torch.arange(half, device=s.device) / half)
    return angles.cos(), angles.sin()


def heads_of(s: Sizes, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [rows, heads, head width]."""
    heads = s.config.num_attention_heads, *(s.config.num_key_value_heads,) * 2
    return tuple(s.normal(num_rows, count, s.config.head_dim) for count in heads)


def rope(s: Sizes, *, backward: bool) -> Work:
    """Rotation of queries and keys"""
    (q, k, _), (cos, sin) = heads_of(s, s.tokens), angles_of(s, s.tokens)
    sign = -1 if backward else 1

    def turned(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotate_(q, k, cos, sin, backward=backward)
        return q, k

    return Work([lambda: turned(q, k)], 0, 2 * size_of(q, k) + size_of(cos, sin),
                lambda: [rope_reference(x, cos, sign * sin) for x in (q, k)], result=lambda: turned(q.clone(), k.clone()))


def embed(s: Sizes) -> Work:
    """Rows from pinned host memory"""
    table, tokens = s.normal(s.config.vocab_size, s.config.hidden_size), s.below(s.config.vocab_size, s.tokens)
    held = table.cpu().pin_memory() if table.is_cuda else table
    return Work([lambda: gather_rows(tokens, held)], 0, 2 * s.tokens * size_of(table[0]), lambda: F.embedding(tokens, table))


# -------------------------------------------------------------------------------------------------------- dense projections


def projections(s: Sizes, name: str, *, has_lora: bool) -> list[Linear]:
    """The modules of q, k and v, which are one product, or of o; with LoRA, or trainable themselves."""
    c = s.config
    q, kv = c.q_width, c.kv_width
    size_in, sizes_out = (c.hidden_size, [q, kv, kv]) if name == "q k v" else (q, [c.hidden_size])
    modules, ranks = linears(size_in, sizes_out, device=s.device, dtype=s.dtype), [s.rank] * len(sizes_out)
    downs = side_by_side(s.normal(sum(ranks), size_in, scale=size_in**-0.5, dtype=torch.float32), ranks)
    ups = side_by_side(s.normal(sum(sizes_out), s.rank, scale=0.1, dtype=torch.float32), sizes_out)
    for module, down, up in zip(modules, downs, ups):
        module.weight.data.normal_(0, size_in**-0.5)
        module.bias.data.normal_()
        if has_lora:
            module.lora_A, module.lora_B, module.lora_scale = down, up, LORA_SCALE
        for tensor in trained([module]):
            tensor.requires_grad_()
    return modules


def trained(modules: list[Linear]) -> list[torch.Tensor]:
    return [tensor for module in modules
            for tensor in ((module.lora_A, module.lora_B) if module.has_adapter() else (module.weight, module.bias))]


def eager_projections(modules: list[Linear], x: torch.Tensor) -> torch.Tensor:
    """By the library, each module alone."""
    return torch.cat([module(x) for module in modules], 1)


def dense(s: Sizes, name: str, *, has_lora: bool, num_rows: int | None = None) -> Work:
    """A projection, with LoRA in the same sum"""
    first = projections(s, name, has_lora=has_lora)
    weights, adapters = [module.weight for module in first], trained(first) if has_lora else []
    count = 1 if num_rows is None else s.num_layers(size_of(*weights))
    layers = [first, *(projections(s, name, has_lora=has_lora) for _ in range(count - 1))]
    x, keeps = s.normal(num_rows or s.tokens, weights[0].shape[1]), has_lora and num_rows is None
    calls = [lambda modules=modules: linear(modules, x, keeps_low_rank=keeps)[0] for modules in layers]
    num_bytes = size_of(x, *weights, *adapters) + len(x) * sum(map(len, weights)) * s.dtype.itemsize
    return Work(calls, 2.0 * len(x) * sum(map(torch.numel, [*weights, *adapters])), num_bytes,
                torch.no_grad()(lambda: eager_projections(first, x)))


def dense_backward(s: Sizes, name: str, *, has_lora: bool) -> Work:
    """Gradients of x and of A and B, or of weight and bias"""
    modules = projections(s, name, has_lora=has_lora)
    tensors, weights = trained(modules), [module.weight for module in modules]
    x = s.normal(s.tokens, weights[0].shape[1])
    y, low_rank = linear(modules, x, keeps_low_rank=has_lora)
    grad, source = torch.randn_like(y), leaf(x)
    eager = cache(lambda: eager_projections(modules, source))

    def call():
        grads = {}
        grad_x = linear_backward(modules, grad, x, low_rank, grads, needs_x=True)
        return grad_x, *(grads[tensor] for tensor in tensors)

    products, low = (2.0 * s.tokens * sum(map(torch.numel, some)) for some in (weights, tensors))
    return Work([call], products + (2 * low if has_lora else products), size_of(x, x, grad, *weights) + 2 * size_of(*tensors),
                lambda: torch.autograd.grad(eager(), [source, *tensors], grad, retain_graph=True))


# ---------------------------------------------------------------------------------------------------------------- attention


PACKED_PEERS = {"forward": "flex attention", "dq": "", "dkv": "", "backward": "flex attention"}
FLOPS_PER_PAIR = {"forward": 4, "dq": 6, "dkv": 8, "backward": 10}  # of head width; "backward" is of both its kernels


def packed_peer(s: Sizes, bounds: list[int], window: int, scale: float) -> Callable:
    """Attention with sinks by flex_attention on a GPU, where it is compiled, by the eager reference elsewhere."""
    if s.device == "cpu":
        return lambda q, k, v, sinks: attention_reference(q, k, v, sinks, bounds, window, scale)
    sequence = torch.bucketize(torch.arange(bounds[-1], device=s.device), torch.tensor(bounds, device=s.device), right=True)

    def is_visible(_, __, query, key):
        is_near = query - key < (window or bounds[-1])
        return (sequence[query] == sequence[key]) & (query >= key) & is_near

    mask = cache(lambda: create_block_mask(is_visible, None, None, bounds[-1], bounds[-1], device=s.device, _compile=True))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q, k, v, sinks):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, lse = compiled(q, k, v, block_mask=mask(), scale=scale, enable_gqa=True, return_lse=True)
        return (out * torch.sigmoid(lse - sinks[:, None].float())[..., None]).to(q.dtype)[0].transpose(0, 1)

    return attend


def packed_attention(s: Sizes, packing: str, kernel: str, *, is_windowed: bool) -> Work:
    """Packed sequences, with sinks"""
    lengths, window, heads = s.packings[packing], s.config.sliding_window if is_windowed else 0, s.config.num_attention_heads
    bounds, settings = [0, *accumulate(lengths)], {"window": window, "scale": s.config.head_dim**-0.5}
    (q, k, v), sinks, plan = heads_of(s, sum(lengths)), s.normal(heads), AttentionPlan(bounds)
    dout, attend = torch.randn_like(q), packed_peer(s, bounds, **settings)
    default = blocks_for(gpu_family(q), q.dtype, windowed=is_windowed, width=s.config.head_dim)
    out, lse = attention_forward(q, k, v, sinks, plan, **settings)
    stats = torch.empty(heads, len(q), 2, device=s.device)  # fp32

    def forward(blocks=default.forward):
        return forward_triton(q, k, v, sinks, plan, blocks=blocks, **settings)[0]

    def dq(blocks=default.dq):
        return dq_triton(q, k, v, sinks, out, dout, lse, plan, blocks=blocks, **settings)

    def dkv(blocks=default.dkv):
        return dkv_triton(q, k, v, dout, dq_stats(), plan, blocks=blocks, **settings)

    def backward():
        *grads, grad_sinks = attention_backward(q, k, v, sinks, out, lse, dout, plan, **settings)
        return *grads, grad_sinks.sum(0)

    dq_stats = cache(lambda: dq()[2])
    bytes_dq, bytes_dkv = size_of(q, k, v, out, dout, lse, q, stats), size_of(q, k, v, dout, stats, k, v)
    call, peer, num_bytes = {
        "forward": (forward, lambda: attend(q, k, v, sinks), size_of(q, k, v, out, lse)),
        "dq": (dq, None, bytes_dq), "dkv": (dkv, None, bytes_dkv),
        "backward": (backward, backward_of(attend, [q, k, v, sinks], [dout]), bytes_dq + bytes_dkv),
    }[kernel]
    flops = float(FLOPS_PER_PAIR[kernel] * s.config.head_dim * heads * visible_pairs(plan, window)[is_windowed])
    return Work([call], flops, num_bytes, peer, blocks=None if kernel == "backward" else AttentionBlocks)


def paged_cache(s: Sizes, num_rows: int, num_keys: int) -> SimpleNamespace:
    """Random pages of keys and values, in any order, whose sequences all have so many tokens."""
    per_row = -(-num_keys // PAGE_TOKENS)
    shape = num_rows * per_row, PAGE_TOKENS, s.config.num_key_value_heads, s.config.head_dim
    table = torch.randperm(shape[0], device=s.device).view(num_rows, per_row).int()
    return SimpleNamespace(keys=s.normal(*shape), values=s.normal(*shape), table=table,
                           slots=torch.arange(num_rows, device=s.device),
                           positions=torch.full((num_rows,), num_keys - 1, device=s.device))


def decode(s: Sizes, num_rows: int, num_keys: int, *, is_windowed: bool = False, in_parts: bool = False,
           prompt_len: int = 0) -> Work:
    """A new token of each row over its cached keys, with sinks"""
    (q, _, _), sinks, scale = heads_of(s, num_rows), s.normal(s.config.num_attention_heads), s.config.head_dim**-0.5
    c = paged_cache(s, num_rows, num_keys)
    if is_windowed:
        shape = num_rows, min(s.config.sliding_window, num_keys), *c.keys.shape[2:]
        c.keys, c.values, c.table = s.normal(*shape), s.normal(*shape), None
    options = {"slots": c.slots, "positions": c.positions, "scale": scale, "page_table": c.table,
               "window": s.config.sliding_window if is_windowed else 0, "longest": num_keys if in_parts else 0}
    if prompt_len:
        c.table[:, :prompt_len // PAGE_TOKENS] = c.table[0, :prompt_len // PAGE_TOKENS].clone()
        size = rows_per_tile(q.shape[1] // c.keys.shape[2])
        tiles = [(first, min(size, num_rows - first)) for first in range(0, num_rows, size)]
        options["shared"] = SharedPrefixes(torch.tensor(tiles, dtype=torch.int32, device=s.device),
                                           torch.ones(num_rows, dtype=torch.int32, device=s.device))
        options["prefix_lens"] = torch.full((num_rows,), prompt_len, device=s.device)

    def by_row(cache_tensor):  # [B, K, keys, head width]
        picked = cache_tensor if c.table is None else cache_tensor[c.table.long()].flatten(1, 2)[:, :num_keys]
        return picked.transpose(1, 2).contiguous()

    rows = cache(lambda: (q[:, :, None], by_row(c.keys), by_row(c.values)))
    seen = c.keys.shape[1] if is_windowed else num_keys
    num_read = num_rows * seen - (num_rows - 1) * prompt_len
    num_bytes = 2 * num_read * c.keys.shape[2] * c.keys.shape[3] * s.dtype.itemsize + 2 * size_of(q)
    return Work([lambda: decode_attention(q, c.keys, c.values, sinks, **options)], 4.0 * seen * q.numel(), num_bytes,
                lambda: F.scaled_dot_product_attention(*rows(), scale=scale, enable_gqa=True),
                expected=lambda: decode_attention_reference(q, c.keys, c.values, sinks, c.slots, c.positions, scale, c.table))


# --------------------------------------------------------------------------------------------------------------------- head


def head_tensors(s: Sizes, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states whose logits have a standard deviation of 2 nats, so that probabilities are as uneven as real ones."""
    width, vocab = s.config.hidden_size, s.config.vocab_size
    return 2 * s.normal(num_rows, width), s.normal(vocab, width, scale=width**-0.5), s.below(vocab, num_rows)


def eager_log_probs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    full = torch.log_softmax(F.linear(hidden, weight).float() / TEMPERATURE, -1)
    return full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)


def head(s: Sizes, *, for_gradient: bool) -> Work:
    """Log-probs and entropy; for a gradient, with the sums that it takes"""
    hidden, weight, targets = head_tensors(s, s.tokens)
    product = 2.0 * s.tokens * weight.numel()

    def call():
        with torch.set_grad_enabled(for_gradient):
            return log_probs(hidden.requires_grad_(for_gradient), weight, targets, temperature=TEMPERATURE)

    return Work([call], 2 * product if for_gradient else product, size_of(hidden, weight) + size_of(hidden) * for_gradient,
                lambda: eager_log_probs(hidden.detach(), weight, targets))


def head_gradient(s: Sizes, *, trains_head: bool = False, has_entropy_loss: bool = False) -> Work:
    """Gradients of hidden states and, in full training, of the head"""
    hidden, weight, targets = head_tensors(s, s.tokens)
    leaves = [leaf(hidden), *([leaf(weight)] if trains_head else [])]
    grads = [torch.randn(s.tokens, device=s.device) for _ in range(2 if has_entropy_loss else 1)]
    found = log_probs(leaves[0], leaves[1] if trains_head else weight, targets, temperature=TEMPERATURE,
                      has_entropy_loss=has_entropy_loss)[:len(grads)]

    def eager(hidden, weight=weight):
        return eager_log_probs(hidden, weight, targets)[:len(grads)]

    product, num_products = 2.0 * s.tokens * weight.numel(), 3 if trains_head else 2 if has_entropy_loss else 0
    num_bytes = 3 * size_of(hidden) + (size_of(weight) if num_products else 0) + (size_of(weight) if trains_head else 0)
    return Work([lambda: torch.autograd.grad(found, leaves, grads, retain_graph=True)], num_products * product, num_bytes,
                backward_of(eager, leaves, grads))


def head_kl(s: Sizes, *, is_backward: bool) -> Work:
    """KL to a reference with the same head over the whole vocabulary; the gradient computes both logits again"""
    hidden, weight, _ = head_tensors(s, s.tokens)
    reference, grads = hidden + 0.3 * s.normal(*hidden.shape), [torch.randn(s.tokens, device=s.device)]
    leaves, product = [leaf(hidden)], 2.0 * s.tokens * weight.numel()

    def eager(hidden):
        log_p, log_q = (torch.log_softmax(F.linear(states, weight).float() / TEMPERATURE, -1) for states in (hidden, reference))
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def call(states):
        return kl_divergence(states, weight, reference, weight, temperature=TEMPERATURE)

    if not is_backward:
        return Work([lambda: call(hidden)], 2 * product, size_of(hidden, reference, weight), lambda: eager(hidden))
    found = call(leaves[0])
    return Work([lambda: torch.autograd.grad([found], leaves, grads, retain_graph=True)], 3 * product,
                size_of(hidden, reference, weight, weight) + size_of(hidden), backward_of(eager, leaves, grads))


def head_rows(s: Sizes, num_rows: int, *, draws: bool) -> Work:
    """Logits, or drawn tokens and their log-probs"""
    hidden, weight, _ = head_tensors(s, num_rows)
    product, moved = 2.0 * num_rows * weight.numel(), size_of(hidden, weight)
    if not draws:
        return Work([lambda: head_logits(hidden, weight)], product, moved + 4 * num_rows * len(weight),
                    lambda: F.linear(hidden, weight).float())
    rng_keys = torch.randint(-(2**31), 2**31 - 1, (num_rows, 2), device=s.device, dtype=torch.int32)

    def call():
        return draw(hidden, weight, rng_keys, temperature=TEMPERATURE)

    def eager():
        full = torch.log_softmax(F.linear(hidden, weight).float() / TEMPERATURE, -1)
        return full.gather(1, (full - torch.empty_like(full).exponential_().log()).argmax(-1, keepdim=True))[:, 0]

    return Work([call], product, moved + 8 * num_rows * len(weight), eager, result=lambda: call()[1],
                expected=lambda: eager_log_probs(hidden, weight, call()[0])[0])  # other noise draws other tokens


# -------------------------------------------------------------------------------------------------------------------- layer


def layer(s: Sizes, kind: str, *, trains_base: bool, with_backward: bool) -> Work:
    """A model of one layer with a small vocabulary: LoRA on packed experts, or everything trains"""
    config = replace(s.config, num_hidden_layers=1, layer_types=[LAYER_TYPES[kind]], vocab_size=min(s.config.vocab_size, 512))
    model = GptOss(config, dtype=s.dtype, device=s.device, experts="bf16" if trains_base else "mxfp4")
    for name, parameter in model.named_parameters():
        is_narrow = parameter.ndim == 1 or "embed" in name
        parameter.data.normal_(name.endswith("norm.weight"), 0.02 if is_narrow else parameter.shape[1] ** -0.5)
    for name, buffer in model.named_buffers():
        if buffer.dtype == torch.uint8:  # codes, and scales around the one that gives them that rms
            buffer.random_(*((119, 123) if name.endswith("scales") else (0, 256)))
    if trains_base:
        set_full_training(model)
    else:
        model.model.layers[0].mlp.experts.arrange()
        attach_random_lora(model, "all", s.rank)
    batch = random_batch(model, 1, s.tokens)

    def forward():
        return model.log_probs(batch["tokens"], batch["cu_seqlens"], temperature=1.0, mask=batch["mask"])[0]

    flops = s.tokens * flops_per_token(config, s.tokens, trains_base=trains_base, with_backward=with_backward)
    num_bytes = size_of(*model.parameters(), *model.buffers()) * (2 if with_backward and trains_base else 1)
    return Work([lambda: train_step(model, batch)] if with_backward else [forward], flops, num_bytes)


# -------------------------------------------------------------------------------------------------------------------- table


def cases_of(s: Sizes) -> list[Case]:
    """The rows of the table that are not about experts."""
    row, layers = partial(case, s), ("windowed",) if s.device == "cpu" else ("full", "windowed")
    found = [
        row("embedding", "F.embedding on the GPU", embed),
        row("norm", "eager", norm, adds=False),
        row("norm of sum", "eager", norm, adds=True),
        row("norm backward", "eager", norm_gradient, adds=False, trains=False),
        row("norm of sum backward", "eager", norm_gradient, adds=True, trains=False),
        row("norm of sum backward full", "eager", norm_gradient, adds=True, trains=True),
        row("rope", "eager", rope, backward=False),
        row("rope backward", "eager", rope, backward=True),
        row("head log-probs", "eager", head, for_gradient=False),
        row("head log-probs for a gradient", "eager", head, for_gradient=True),
        row("head backward", "eager", head_gradient),
        row("head backward with entropy", "eager", head_gradient, has_entropy_loss=True),
        row("head backward full", "eager", head_gradient, trains_head=True),
        row("head KL", "eager", head_kl, is_backward=False),
        row("head KL backward", "eager", head_kl, is_backward=True),
    ]
    found += [row(f"head {what} {rows}", "eager", head_rows, rows, draws=what == "draw")
              for what, rows in product(("logits", "draw"), s.rows)]
    found += [row(f"layer {kind} {'full training' if trains_base else 'LoRA'} {part}", "", layer, kind, trains_base=trains_base,
                  with_backward=part == "step")
              for kind, trains_base, part in product(layers, (False, True), ("forward", "step"))]
    for name, has_lora in product(("q k v", "o"), (False, True)):
        label = f"dense {name}{' LoRA' * has_lora}"
        found += [row(label, "cuBLAS", dense, name, has_lora=has_lora),
                  row(f"{label} backward", "cuBLAS", dense_backward, name, has_lora=has_lora)]
        found += [row(f"{label} few {rows}", "cuBLAS", dense, name, has_lora=has_lora, num_rows=rows) for rows in s.rows]
    found += [row(f"attention {layer} {kernel} {packing}", PACKED_PEERS[kernel], packed_attention, packing, kernel,
                  is_windowed=layer == "windowed")
              for layer, packing, kernel in product(("full", "windowed"), s.packings, FLOPS_PER_PAIR)]
    kinds = {"full": {}, "windowed": {"is_windowed": True}, "in parts": {"in_parts": True}}
    for (rows, keys), (kind, settings) in product(s.contexts, kinds.items()):
        if not (kind == "windowed" and keys > 1024 or kind == "in parts" and rows > 8):
            found.append(row(f"decode attention {kind} {rows} x {keys}", "SDPA without sinks", decode, rows, keys, **settings))
    found += [row(f"decode attention shared {rows} x {prompt} + {after}", "SDPA without sinks", decode, rows, prompt + after,
                  prompt_len=prompt) for rows, prompt, after in s.shared]
    return found
