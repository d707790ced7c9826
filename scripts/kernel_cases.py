"""What scripts/bench_kernels.py times: each operation of a gpt-oss layer and head, in the functions that the model calls, beside
the same computation by eager PyTorch or the vendor's libraries.

Shapes: T tokens, D model width, F expert width, E experts, A experts per token, R = T A routed rows, H query heads, K key-value
heads, r LoRA's rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from random_checkpoint import model_config
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
from kernels.head.log_probs import log_probs
from kernels.linear import linear, linear_backward
from kernels.norm import norm_backward, norm_forward
from kernels.rope import rotate_
from models.config import GptOssConfig
from models.kv_cache import PAGE_TOKENS
from models.projections import linears, side_by_side

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

    def num_layers(self, num_bytes: int) -> int:
        """How many layers' weights, of so many bytes each, a graph goes through."""
        return min(max(2, -(-GRAPH_BYTES // num_bytes)), self.max_layers)


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
    name: str  # starts with its group
    computes: str
    peer: str  # what it is compared with
    make: Callable[[], Work]


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


def eager_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype)


def norm(s: Sizes, *, adds: bool) -> Work:
    x, residual, weight = s.normal(s.tokens, s.config.hidden_size), None, s.normal(s.config.hidden_size)
    if not adds:
        return Work([lambda: norm_forward(x, None, weight, EPS, x.dtype)[0]], 0, 2 * size_of(x), lambda: eager_norm(x, weight))
    residual = torch.randn_like(x)
    return Work([lambda: norm_forward(x, residual, weight, EPS, x.dtype)[:2]], 0, 4 * size_of(x),
                lambda: (eager_norm(x + residual, weight), x + residual))


def norm_gradient(s: Sizes, *, adds: bool, trains: bool) -> Work:
    x, grad, grad_x = (s.normal(s.tokens, s.config.hidden_size) for _ in range(3))
    weight = s.normal(s.config.hidden_size)
    inv_rms = norm_forward(x, None, weight, EPS, x.dtype)[2]

    def eager(x, weight=weight):
        return (eager_norm(x, weight), x.clone()) if adds else eager_norm(x, weight)

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


def eager_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    (first, second), cos, sin = x.float().chunk(2, -1), cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def heads_of(s: Sizes, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [rows, heads, head width]."""
    heads = s.config.num_attention_heads, *(s.config.num_key_value_heads,) * 2
    return tuple(s.normal(num_rows, count, s.config.head_dim) for count in heads)


def rope(s: Sizes, *, backward: bool) -> Work:
    (q, k, _), (cos, sin) = heads_of(s, s.tokens), angles_of(s, s.tokens)
    sign = -1 if backward else 1

    def turned(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotate_(q, k, cos, sin, backward=backward)
        return q, k

    return Work([lambda: turned(q, k)], 0, 2 * size_of(q, k) + size_of(cos, sin),
                lambda: [eager_rotation(x, cos, sign * sin) for x in (q, k)], result=lambda: turned(q.clone(), k.clone()))


def embed(s: Sizes) -> Work:
    table, tokens = s.normal(s.config.vocab_size, s.config.hidden_size), s.below(s.config.vocab_size, s.tokens)
    held = table.cpu().pin_memory() if table.is_cuda else table
    return Work([lambda: gather_rows(tokens, held)], 0, 2 * s.tokens * size_of(table[0]), lambda: F.embedding(tokens, table))


# -------------------------------------------------------------------------------------------------------- dense projections


def projections(s: Sizes, name: str, *, has_lora: bool, trains_base: bool = False) -> list:
    """The modules of q, k and v, which are one product, or of o."""
    c = s.config
    q, kv = (heads * c.head_dim for heads in (c.num_attention_heads, c.num_key_value_heads))
    size_in, sizes_out = (c.hidden_size, [q, kv, kv]) if name == "q k v" else (q, [c.hidden_size])
    modules = linears(size_in, sizes_out, device=s.device, dtype=s.dtype)
    ranks = [s.rank] * len(modules)
    downs = side_by_side(s.normal(sum(ranks), size_in, scale=size_in**-0.5, dtype=torch.float32), ranks)
    ups = side_by_side(s.normal(sum(sizes_out), s.rank, scale=0.1, dtype=torch.float32), sizes_out)
    for module, down, up in zip(modules, downs, ups):
        module.weight.data.normal_(0, size_in**-0.5)
        module.bias.data.normal_()
        module.weight.requires_grad_(trains_base)
        module.bias.requires_grad_(trains_base)
        if has_lora:
            module.lora_A, module.lora_B, module.lora_scale = down, up, LORA_SCALE
    return modules


def eager_projections(x: torch.Tensor, *tensors: torch.Tensor, modules: list, has_lora: bool) -> torch.Tensor:
    """tensors: A and B of each module, or weight and bias, in place of its own."""
    parts = []
    for module, first, second in zip(modules, tensors[0::2], tensors[1::2]):
        if has_lora:
            low_rank = F.linear(x, first.to(x.dtype))
            parts.append(F.linear(x, module.weight, module.bias) + LORA_SCALE * F.linear(low_rank, second.to(x.dtype)))
        else:
            parts.append(F.linear(x, first, second))
    return torch.cat(parts, 1)


def trained(modules: list, *, has_lora: bool) -> list[torch.Tensor]:
    """What eager_projections takes."""
    return [tensor for module in modules
            for tensor in ((module.lora_A, module.lora_B) if has_lora else (module.weight, module.bias))]


def dense_forward(s: Sizes, name: str, *, has_lora: bool, num_rows: int | None = None) -> Work:
    """num_rows: of decode steps; without, of training."""
    count = 1
    if num_rows is not None:
        count = s.num_layers(size_of(*(module.weight for module in projections(s, name, has_lora=False))))
    layers = [projections(s, name, has_lora=has_lora) for _ in range(count)]
    x = s.normal(num_rows or s.tokens, layers[0][0].weight.shape[1])
    keeps = has_lora and num_rows is None
    calls = [lambda modules=modules: linear(modules, x, keeps_low_rank=keeps)[0] for modules in layers]
    tensors, weights = trained(layers[0], has_lora=has_lora), [module.weight for module in layers[0]]
    num_out = sum(map(len, weights))
    flops = 2.0 * len(x) * (sum(map(torch.numel, weights)) + (sum(map(torch.numel, tensors)) if has_lora else 0))
    return Work(calls, flops, size_of(x, *weights, *(tensors if has_lora else ())) + len(x) * num_out * s.dtype.itemsize,
                lambda: eager_projections(x, *tensors, modules=layers[0], has_lora=has_lora))


def dense_backward(s: Sizes, name: str, *, has_lora: bool) -> Work:
    """With LoRA, or of the weights themselves."""
    modules = projections(s, name, has_lora=has_lora, trains_base=not has_lora)
    tensors, weights = trained(modules, has_lora=has_lora), [module.weight for module in modules]
    x = s.normal(s.tokens, weights[0].shape[1])
    y, low_rank = linear(modules, x, keeps_low_rank=has_lora)
    grad = torch.randn_like(y)

    def call():
        grads = {}
        grad_x = linear_backward(modules, grad, x, low_rank, grads, needs_x=True)
        return grad_x, *(grads[tensor] for tensor in tensors)

    products, low = (2.0 * s.tokens * sum(map(torch.numel, some)) for some in (weights, tensors))
    return Work([call], products + (2 * low if has_lora else products), size_of(x, x, grad, *weights) + 2 * size_of(*tensors),
                backward_of(partial(eager_projections, modules=modules, has_lora=has_lora), [x, *tensors], [grad]))


# ---------------------------------------------------------------------------------------------------------------- attention


PACKED_PEERS = {"forward": "flex attention", "dq": "", "dkv": "", "backward": "flex attention"}
FLOPS_PER_PAIR = {"forward": 4, "dq": 6, "dkv": 8, "backward": 10}  # of head width; "backward" is of both its kernels


def visible_pairs(lengths: list[int], reach: int) -> int:
    """Pairs of a query and a key that it sees, itself included, at most `reach` back."""
    short = [min(length, reach) for length in lengths]
    return sum(part * (part + 1) // 2 + (length - part) * part for length, part in zip(lengths, short))


def attention_bytes(kernel: str, config: GptOssConfig, num_tokens: int, itemsize: int) -> int:
    """Bytes that an attention kernel must read and write; statistics are fp32."""
    wide, narrow = (itemsize * num_tokens * heads * config.head_dim
                    for heads in (config.num_attention_heads, config.num_key_value_heads))
    stats = 4 * num_tokens * config.num_attention_heads
    sizes = {"forward": 2 * wide + 2 * narrow + stats,  # q, k, v to out and lse
             "dq": 4 * wide + 2 * narrow + 3 * stats,  # q, k, v, out, dout, lse to dq and two statistics
             "dkv": 2 * wide + 4 * narrow + 2 * stats}  # q, k, v, dout, statistics to dk and dv
    return sizes["dq"] + sizes["dkv"] if kernel == "backward" else sizes[kernel]


def packed_peer(s: Sizes, lengths: list[int], window: int, scale: float) -> Callable:
    """Attention with sinks by flex_attention on a GPU, where it is compiled, by the eager reference elsewhere."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    if s.device == "cpu":
        return lambda q, k, v, sinks: attention_reference(q, k, v, sinks, bounds, window, scale)
    sequence = torch.arange(len(lengths), device=s.device).repeat_interleave(torch.tensor(lengths, device=s.device))

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
    lengths, window = s.packings[packing], s.config.sliding_window if is_windowed else 0
    plan, scale = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).tolist()), s.config.head_dim**-0.5
    (q, k, v), num_tokens = heads_of(s, sum(lengths)), sum(lengths)
    sinks, dout, settings = s.normal(q.shape[1]), torch.randn_like(q), {"window": window, "scale": scale}
    blocks_now = blocks_for(gpu_family(q), q.dtype, windowed=is_windowed, width=s.config.head_dim)
    flops = float(FLOPS_PER_PAIR[kernel] * s.config.head_dim * q.shape[1] * visible_pairs(lengths, window or num_tokens))
    num_bytes, attend = attention_bytes(kernel, s.config, num_tokens, s.dtype.itemsize), packed_peer(s, lengths, window, scale)
    if kernel == "forward":
        def forward(blocks=None):
            if blocks is None:
                return attention_forward(q, k, v, sinks, plan, **settings)[0]
            return forward_triton(q, k, v, sinks, plan, blocks=blocks, **settings)[0]
        return Work([forward], flops, num_bytes, lambda: attend(q, k, v, sinks), blocks=AttentionBlocks)
    out, lse = attention_forward(q, k, v, sinks, plan, **settings)
    if kernel == "backward":
        def backward():
            *grads, grad_sinks = attention_backward(q, k, v, sinks, out, lse, dout, plan, **settings)
            return *grads, grad_sinks.sum(0)
        return Work([backward], flops, num_bytes, backward_of(attend, [q, k, v, sinks], [dout]))

    def dq(blocks=None):
        return dq_triton(q, k, v, sinks, out, dout, lse, plan, blocks=blocks or blocks_now.dq, **settings)

    if kernel == "dq":
        return Work([dq], flops, num_bytes, blocks=AttentionBlocks)
    stats = dq()[2]
    return Work([lambda blocks=None: dkv_triton(q, k, v, dout, stats, plan, blocks=blocks or blocks_now.dkv, **settings)], flops,
                num_bytes, blocks=AttentionBlocks)


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
    """prompt_len: of a prompt that all rows share and read once for many of them."""
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
    """The forward; for_gradient: with the sums that the log-probs' gradient takes."""
    hidden, weight, targets = head_tensors(s, s.tokens)
    product = 2.0 * s.tokens * weight.numel()

    def call():
        with torch.set_grad_enabled(for_gradient):
            return log_probs(hidden.requires_grad_(for_gradient), weight, targets, temperature=TEMPERATURE)

    return Work([call], 2 * product if for_gradient else product, size_of(hidden, weight) + size_of(hidden) * for_gradient,
                lambda: eager_log_probs(hidden.detach(), weight, targets))


def head_gradient(s: Sizes, *, trains_head: bool = False, has_entropy_loss: bool = False) -> Work:
    """The backward; of the log-probs alone it takes the sums that the forward has made."""
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


def head_rows(s: Sizes, num_rows: int, *, draws: bool) -> Work:
    """Logits of a decode step's rows, or their tokens and log-probs."""
    hidden, weight, _ = head_tensors(s, num_rows)
    product, moved = 2.0 * num_rows * weight.numel(), size_of(hidden, weight)
    if not draws:
        return Work([lambda: head_logits(hidden, weight)], product, moved + 4 * num_rows * len(weight),
                    lambda: F.linear(hidden, weight).float())
    words = torch.randint(-(2**31), 2**31 - 1, (num_rows, 2), device=s.device, dtype=torch.int32)

    def eager():
        full = torch.log_softmax(F.linear(hidden, weight).float() / TEMPERATURE, -1)
        tokens = (full - torch.empty_like(full).exponential_().log()).argmax(-1)
        return full.gather(1, tokens[:, None])[:, 0]

    def expected():  # other noise draws other tokens; the log-probs of ours
        full = torch.log_softmax(F.linear(hidden, weight).float() / TEMPERATURE, -1)
        return full.gather(1, call()[0][:, None])[:, 0]

    def call():
        return draw(hidden, weight, words, temperature=TEMPERATURE)

    return Work([call], product, moved + 8 * num_rows * len(weight), eager, result=lambda: call()[1], expected=expected)


# -------------------------------------------------------------------------------------------------------------------- table


def cases_of(s: Sizes) -> list[Case]:
    """The rows of the table that are not about experts."""
    many = f"{s.tokens} tokens"

    def case(name: str, computes: str, peer: str, function: Callable, *arguments, **settings) -> Case:
        return Case(name, computes, peer, partial(function, s, *arguments, **settings))

    found = [
        case("embedding from host memory", many, "F.embedding on the GPU", embed),
        case("norm", many, "eager", norm, adds=False),
        case("norm of sum", f"{many}, residual + x and its norm", "eager", norm, adds=True),
        case("norm backward", many, "eager", norm_gradient, adds=False, trains=False),
        case("norm of sum backward", many, "eager", norm_gradient, adds=True, trains=False),
        case("norm of sum backward full", f"{many}, the weight's gradient too", "eager", norm_gradient, adds=True, trains=True),
        case("rope", f"{many}, queries and keys", "eager", rope, backward=False),
        case("rope backward", f"{many}, queries and keys", "eager", rope, backward=True),
        case("head log-probs", many, "eager", head, for_gradient=False),
        case("head log-probs for a gradient", f"{many}, with the sums of their gradient", "eager", head, for_gradient=True),
        case("head backward", f"{many}, hidden states", "eager", head_gradient),
        case("head backward with entropy", f"{many}, hidden states", "eager", head_gradient, has_entropy_loss=True),
        case("head backward full", f"{many}, hidden states and head", "eager", head_gradient, trains_head=True),
    ]
    for name in ("q k v", "o"):
        found += [
            case(f"dense {name}", many, "cuBLAS", dense_forward, name, has_lora=False),
            case(f"dense {name} LoRA", many, "cuBLAS", dense_forward, name, has_lora=True),
            case(f"dense {name} LoRA backward", f"{many}, x, A and B", "cuBLAS", dense_backward, name, has_lora=True),
            case(f"dense {name} full backward", f"{many}, x, weight and bias", "cuBLAS", dense_backward, name, has_lora=False),
        ]
        found += [case(f"dense {name}{' LoRA' * has_lora} few {rows}", f"{rows} rows", "cuBLAS", dense_forward, name,
                       has_lora=has_lora, num_rows=rows) for has_lora in (False, True) for rows in s.rows]
    found += [case(f"head {what} {rows}", f"{rows} rows", "eager", head_rows, rows, draws=what == "draw")
              for what in ("logits", "draw") for rows in s.rows]
    found += [case(f"attention {layer} {kernel} {packing}", f"packed sequences, {packing}", PACKED_PEERS[kernel],
                   packed_attention, packing, kernel, is_windowed=layer == "windowed")
              for layer in ("full", "windowed") for packing in s.packings for kernel in FLOPS_PER_PAIR]
    for rows, keys in s.contexts:
        name, computes = f"{rows} x {keys}", f"{rows} rows of {keys} keys"
        found.append(case(f"decode attention full {name}", computes, "SDPA without sinks", decode, rows, keys))
        if keys <= 1024:
            found.append(case(f"decode attention windowed {name}", computes, "SDPA without sinks", decode, rows, keys,
                              is_windowed=True))
        if rows <= 8:
            found.append(case(f"decode attention in parts {name}", computes, "SDPA without sinks", decode, rows, keys,
                              in_parts=True))
    return found + [case(f"decode attention shared {rows} x {prompt} + {after}", "a prompt and the keys after it",
                         "SDPA without sinks", decode, rows, prompt + after, prompt_len=prompt)
                    for rows, prompt, after in s.shared]
