"""Checks, then times, the experts of few tokens (kernels/experts/few_rows.py) and the dense products beside them
(kernels/linear_few_rows.py) at gpt-oss-20b's sizes on one GPU.

    python scripts/bench_moe_decode.py [--quick] [--seconds 200]

First every path against the training forward, bit for bit, at 1 to 512 tokens; then every candidate tile of the packed
projections and of LoRA's first factors in CUDA graphs that go through the weights of several layers, so that the L2 cache does
not help; then the whole operation with the winners. Prints a JSON line per case, tables, and the block tables to paste into
kernels/experts/few_rows.py. GB/s counts the bytes of the experts touched, once; of_copy is the fraction of a large copy in the
same run. Candidates are compiled by several processes at a time."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton
from timing import Report, copy_gb_per_s

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import device as launch_module  # noqa: E402
from kernels.device import gpu_family  # noqa: E402
from kernels.experts import few_rows as module  # noqa: E402
from kernels.experts.few_rows import DecodeBlocks, decode_projection, low_rank_rows, moe_decode  # noqa: E402
from kernels.experts.forward import moe_forward  # noqa: E402
from kernels.experts.gemm import grouped_gemm  # noqa: E402
from kernels.experts.sorting import make_routing  # noqa: E402
from kernels.packed import fragments as fragments_module  # noqa: E402
from kernels.packed.fragments import dequantize_fragments, from_fragments, to_fragments_  # noqa: E402
from kernels.packed.mxfp4 import dequantize_experts  # noqa: E402
from kernels.packed.weights import Mxfp4Fragments, Projection  # noqa: E402

WIDTH, NUM_EXPERTS, PER_TOKEN, RANK, LAYERS = 2880, 32, 4, 16, 6
LORA_LAYERS = 14  # LoRA's first factors of so many layers exceed the L2 cache
SWIGLU, SCALE, SCRATCH_BYTES = (1.702, 7.0), 2.0, 1_100_000_000
BATCHES = (32, 128, 1, 8, 512, 64, 256)  # in this order, should the time run out
# routed rows per expert up to which a measured batch's winner serves: between it and the next batch
LIMITS = {1: 0.4, 8: 2, 32: 6, 64: 11, 128: 23, 256: 45, 512: 64}
TOKENS_OF = {1: (16,), 8: (16,), 32: (16, 32), 64: (16, 32), 128: (16, 32, 64), 256: (32, 64), 512: (32, 64, 128)}
CANDIDATES = [DecodeBlocks(*sizes) for sizes in (
    (64, 16, 64, 4, 4), (64, 16, 64, 4, 6), (64, 16, 64, 4, 8), (64, 16, 128, 4, 3), (64, 16, 128, 4, 4), (64, 16, 128, 4, 6),
    (64, 16, 256, 4, 2), (64, 16, 256, 4, 3), (64, 16, 256, 4, 4), (128, 16, 64, 4, 3), (128, 16, 64, 4, 4), (128, 16, 64, 4, 6),
    (128, 16, 64, 8, 6), (256, 16, 64, 8, 4), (256, 16, 128, 8, 3),
    (128, 16, 128, 8, 3), (128, 16, 128, 8, 4), (128, 16, 256, 8, 2), (128, 16, 256, 8, 3), (128, 16, 128, 4, 3),
    (64, 32, 64, 4, 4), (64, 32, 64, 4, 6), (64, 32, 128, 4, 3), (64, 32, 128, 4, 4), (128, 32, 64, 4, 4), (128, 32, 64, 8, 4),
    (128, 32, 64, 4, 3), (128, 32, 64, 4, 6), (128, 32, 128, 8, 3), (128, 32, 128, 8, 4), (128, 32, 256, 8, 2),
    (256, 32, 64, 8, 4), (256, 32, 128, 8, 3), (256, 64, 128, 8, 2), (128, 32, 128, 4, 3),
    (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4),
    (128, 64, 128, 8, 2), (128, 64, 128, 8, 3), (256, 64, 64, 8, 3), (256, 64, 64, 8, 4),
    (64, 16, 256, 4, 5), (64, 16, 512, 4, 2), (64, 16, 512, 4, 3), (128, 16, 256, 4, 2), (128, 16, 256, 4, 3),
    (128, 16, 128, 4, 5), (64, 32, 256, 4, 2), (64, 32, 256, 4, 3), (128, 32, 128, 4, 4), (128, 32, 256, 4, 2),
    (128, 64, 128, 4, 2), (128, 64, 128, 4, 3), (256, 64, 128, 8, 3), (64, 128, 128, 4, 2), (128, 128, 64, 4, 3),
    (64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 8, 2), (256, 128, 64, 8, 3),
    (128, 64, 64, 8, 4, 32), (128, 64, 64, 8, 3, 32), (128, 64, 64, 4, 4, 32), (64, 64, 64, 4, 4, 32), (128, 64, 64, 8, 4, 64),
    (128, 32, 128, 4, 3, 16), (128, 32, 64, 4, 4, 16), (128, 32, 64, 4, 4, 32), (64, 32, 128, 4, 3, 16), (128, 16, 128, 4, 3, 16),
)]  # fmt: skip
LOW_RANK_CANDIDATES = [DecodeBlocks(*sizes) for sizes in (
    (16, 16, 64, 4, 4), (16, 16, 64, 4, 8), (16, 16, 64, 2, 6), (16, 16, 128, 4, 3), (16, 16, 128, 4, 5), (16, 16, 128, 2, 4),
    (16, 16, 256, 4, 3), (16, 16, 256, 8, 3), (16, 32, 64, 4, 6), (16, 32, 128, 4, 4), (64, 16, 64, 4, 4), (64, 16, 64, 4, 8),
    (64, 16, 128, 4, 2), (64, 16, 128, 4, 4), (64, 32, 64, 4, 6),
)]  # fmt: skip
# a layer's dense products: inputs, outputs
LINEARS = {"qkv": (2880, 5120), "o_proj": (4096, 2880), "LoRA A of qkv": (2880, 3 * RANK)}
LINEAR_CANDIDATES = [DecodeBlocks(*sizes) for sizes in (
    (16, 16, 128, 4, 6), (16, 16, 256, 4, 4), (16, 16, 256, 4, 5), (32, 16, 128, 4, 4), (32, 16, 128, 4, 6), (32, 16, 256, 4, 4),
    (64, 16, 64, 4, 6), (64, 16, 128, 4, 4), (32, 32, 128, 4, 5), (64, 32, 64, 4, 5), (64, 32, 128, 4, 4), (32, 64, 128, 4, 4),
    (64, 64, 64, 4, 5), (64, 64, 128, 4, 4), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4), (128, 128, 64, 8, 4),
    (64, 16, 128, 4, 6), (64, 16, 128, 4, 8), (64, 16, 256, 4, 3), (64, 16, 256, 4, 4), (64, 16, 256, 8, 4), (32, 16, 256, 4, 6),
    (32, 16, 512, 4, 3), (32, 16, 512, 4, 4), (32, 16, 256, 2, 5), (32, 16, 128, 2, 8), (32, 16, 128, 4, 8), (16, 16, 512, 4, 4),
    (16, 16, 512, 2, 4), (128, 16, 128, 4, 4), (64, 32, 128, 4, 6), (64, 32, 256, 4, 3), (64, 64, 128, 4, 3),
)]  # fmt: skip
SIZES = {"gate_up": 2 * WIDTH, "down": WIDTH}
REPORT = Report()
BEST: list[dict] = []  # the winners
RUN = {"GB/s": 0.0, "deadline": float("inf")}


def random_projection(size_out: int) -> Projection:
    """A layer's weights: random codes, products of the size of their inputs. In fragment order any codes are weights."""
    scales = torch.randint(119, 123, (NUM_EXPERTS, size_out, WIDTH // 32), device="cuda", dtype=torch.uint8)
    blocks = torch.randint(0, 256, (*scales.shape, 16), device="cuda", dtype=torch.uint8)
    bias = torch.randn(NUM_EXPERTS, size_out, device="cuda").bfloat16()
    return Projection(None, blocks, scales, bias, True)


def random_lora() -> tuple[torch.Tensor, ...]:
    shapes = ((RANK, WIDTH), (2 * WIDTH, RANK), (RANK, WIDTH), (WIDTH, RANK))
    return tuple(torch.randn(NUM_EXPERTS, *shape, device="cuda") * (WIDTH**-0.5 if shape[0] == RANK else 0.1) for shape in shapes)


class Batch:
    """Tokens routed uniformly at random, and the expert bytes that a projection of so many outputs reads."""

    def __init__(self, num_tokens: int) -> None:
        torch.manual_seed(num_tokens)
        indices = torch.rand(num_tokens, NUM_EXPERTS, device="cuda").topk(PER_TOKEN).indices
        self.routing = make_routing(indices, num_experts=NUM_EXPERTS)
        self.touched = indices.unique().numel()
        self.x, self.residual = torch.randn(2, num_tokens, WIDTH, device="cuda").bfloat16()
        self.act = torch.randn(num_tokens * PER_TOKEN, WIDTH, device="cuda").bfloat16()
        self.weights = torch.softmax(torch.randn(num_tokens, PER_TOKEN, device="cuda"), -1)
        self.num_tokens, self.num_rows = num_tokens, num_tokens * PER_TOKEN

    def expert_bytes(self, size_out: int) -> int:
        return self.touched * size_out * WIDTH * 17 // 32


def project(batch: Batch, name: str, projection: Projection, blocks: DecodeBlocks | None) -> torch.Tensor:
    offsets = batch.routing.offsets_device
    if name == "gate_up":
        return decode_projection(batch.x, projection, offsets, gather=batch.routing.tokens, swiglu=SWIGLU, blocks=blocks)
    return decode_projection(batch.act, projection, offsets, blocks=blocks)


def low_rank(batch: Batch, lora_A: torch.Tensor, blocks: DecodeBlocks | None) -> torch.Tensor:
    routing = batch.routing
    return low_rank_rows(batch.x, lora_A, routing.offsets_device, scale=SCALE, gather=routing.tokens, blocks=blocks)


def linear_layers(name: str, num_layers: int) -> list[Projection]:
    """Weights of a dense product; LoRA's are fp32 masters."""
    (size_in, size_out), is_lora = LINEARS[name], name.startswith("LoRA")
    weights = [torch.randn(size_out, size_in, device="cuda") * size_in**-0.5 for _ in range(num_layers)]
    return [Projection((weight if is_lora else weight.bfloat16()).T[None], None, None, None, False) for weight in weights]


def linear_input(name: str, num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, LINEARS[name][0], device="cuda").bfloat16()


def linear(x: torch.Tensor, projection: Projection, blocks: DecodeBlocks | None) -> torch.Tensor:
    return decode_projection(x, projection, None, blocks=blocks)


def graph_microseconds(calls: list) -> float:
    """Median time of one call, from replays of a graph of all."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for turn in range(24):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
        if turn == 3:
            times.clear()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in times)
    return times[len(times) // 2] / len(calls) * 1e3


# -------------------------------------------------------------------------------------------------------- compile beforehand


def compile_part(part: int, num_parts: int) -> None:
    """Launches every num_parts-th candidate once, which leaves its machine code in Triton's cache."""
    batch = Batch(4)
    for name, size_out in SIZES.items():
        projection = random_projection(size_out)
        for blocks in CANDIDATES[part::num_parts]:
            try:
                project(batch, name, projection, blocks)
            except Exception as error:  # noqa: BLE001  (a candidate that does not fit must not end the run)
                REPORT("compile", of=name, blocks=blocks, error=f"{type(error).__name__}: {str(error)[:200]}")
        del projection
    for name in LINEARS:
        (projection, *_), x = linear_layers(name, 1), linear_input(name, 4)
        for blocks in LINEAR_CANDIDATES[part::num_parts]:
            REPORT.guarded("compile", linear, x, projection, blocks)
    lora_A = torch.randn(NUM_EXPERTS, RANK, WIDTH, device="cuda")
    for blocks in LOW_RANK_CANDIDATES[part::num_parts]:
        low_rank(batch, lora_A, blocks)
    torch.cuda.synchronize()


def start_compilers() -> list[subprocess.Popen]:
    num_parts = max(1, min(12, (os.cpu_count() or 2) - 2))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([sys.executable, __file__, "--compile-part", str(part), str(num_parts)], env=environment)
            for part in range(num_parts)]


# ------------------------------------------------------------------------------------------------------------------- checks


def same_bits(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    kinds = {2: torch.int16, 4: torch.int32}
    return bool(((ours.view(kinds[ours.element_size()]) == expected.view(kinds[expected.element_size()]))
                 | (ours.isnan() & expected.isnan())).all())


def check_dequantization() -> None:
    """Every byte under every scale."""
    codes = torch.arange(256, device="cuda", dtype=torch.uint8).repeat(256, 1).view(1, 256, 16, 16)
    scales = torch.arange(256, device="cuda", dtype=torch.uint8).view(1, 256, 1).repeat(1, 1, 16)
    codes, scales = codes.contiguous(), scales.contiguous()
    for dtype in (torch.bfloat16, torch.float32):
        expected = dequantize_experts(codes, scales, torch.empty(1, 256, 512, dtype=dtype, device="cuda"))
        for is_asm in (False, True) if dtype == torch.bfloat16 else (False,):
            rows = slice(0, 128) if is_asm else slice(0, 256)
            blocks, factors = codes[:, rows].clone(), scales[:, rows].clone()
            to_fragments_(blocks, factors)
            back = from_fragments(blocks, factors)
            ours = dequantize_fragments(blocks, factors, torch.full_like(expected[:, rows], torch.nan), is_asm=is_asm)
            REPORT("dequantize: errors", dtype=str(dtype), is_asm=is_asm,
                   same_bits=same_bits(ours, expected[:, rows].contiguous()),
                   inverse=torch.equal(back[0], codes[:, rows]) and torch.equal(back[1], scales[:, rows]))


def check_bits(quick: bool) -> bool:
    """Whether the whole operation equals the training forward; prints each case."""
    gate_up, down = random_projection(2 * WIDTH), random_projection(WIDTH)
    dense = [Projection(module.dequantized(part, torch.bfloat16).contiguous(), None, None, part.bias, False)
             for part in (gate_up, down)]
    lora = random_lora()
    settings = dict(lora_scale=SCALE, alpha=SWIGLU[0], limit=SWIGLU[1])
    all_same = True
    for num_tokens in (1, 32, 512) if quick else (1, 7, 8, 32, 128, 512):
        batch = Batch(num_tokens)
        for adapters in (lora, None):
            held = [Mxfp4Fragments(part.blocks, part.scales, part.bias, True) for part in (gate_up, down)]
            expected, _ = moe_forward(batch.x, batch.weights, batch.routing, *held, batch.residual, lora=adapters, keeps_h=False,
                                      scratch_bytes=SCRATCH_BYTES, **settings)
            same, forms = {}, {"assembly": (gate_up, down), "dense": dense}
            if num_tokens in (8, 128):  # the same tiles, but each has to be compiled
                forms["arithmetic"] = [part._replace(unpacks_by_asm=False) for part in (gate_up, down)]
            for form, pair in forms.items():
                try:
                    y = moe_decode(batch.x, batch.weights, batch.routing, *pair, batch.residual, lora=adapters, **settings)
                except Exception as error:  # noqa: BLE001
                    same |= {form: False, f"{form}, error": f"{type(error).__name__}: {str(error)[:300]}"}
                    continue
                same[form] = torch.equal(y, expected)
                if not same[form]:
                    same[f"{form}, part that differs"] = round((y != expected).float().mean().item(), 5)
                    same[f"{form}, relative error"] = ((y - expected).float().norm() / expected.float().norm()).item()
            all_same &= all(same[form] for form in forms)
            REPORT("moe_decode equals training", tokens=num_tokens, has_lora=adapters is not None, **same)
    return all_same


def check_overlap(family: str) -> bool:
    """Whether launches that do not wait for each other give the same bits, over and over."""
    gate_up, down, lora = random_projection(2 * WIDTH), random_projection(WIDTH), random_lora()
    all_same = True
    for num_tokens in (1, 32, 512):
        batch = Batch(num_tokens)
        for adapters in (lora, None):
            ys = {}
            for families in ((), (family,)):
                launch_module.OVERLAP_FAMILIES = families
                ys[families] = [moe_decode(batch.x, batch.weights, batch.routing, gate_up, down, batch.residual, lora=adapters,
                                           lora_scale=SCALE, alpha=SWIGLU[0], limit=SWIGLU[1]) for _ in range(30)]
            same = all(torch.equal(y, ys[()][0]) for y in ys[(family,)])
            all_same &= same
            REPORT("overlapping launches", tokens=num_tokens, has_lora=adapters is not None, same_bits=same)
    launch_module.OVERLAP_FAMILIES = ()
    return all_same


# ------------------------------------------------------------------------------------------------------------------ timings


def measure_copy() -> None:
    RUN["GB/s"] = copy_gb_per_s()
    REPORT("copy", GB_per_s=round(RUN["GB/s"]), gpu=torch.cuda.get_device_name(), torch=torch.__version__,
           triton=triton.__version__)


def rates(us: float, num_bytes: float, flops: float) -> dict[str, float]:
    rate = num_bytes / us / 1e3
    return {"us": round(us, 2), "GB/s": round(rate), "of_copy": round(rate / RUN["GB/s"], 3),
            "TFLOP/s": round(flops / us / 1e6, 1)}


def tune(name: str, batch: Batch, calls_of, candidates: list[DecodeBlocks], expected: torch.Tensor, num_bytes: float,
         flops: float) -> DecodeBlocks | None:
    """The fastest candidate. expected: what training computes for the first call."""
    found, differing = [], []
    for blocks in candidates:
        if time.time() > RUN["deadline"]:
            break
        try:
            calls = calls_of(blocks)
            if not torch.equal(calls[0](), expected):
                differing.append(blocks)
            found.append((graph_microseconds(calls), blocks))
        except Exception as error:  # noqa: BLE001
            REPORT(name, tokens=batch.num_tokens, blocks=blocks, error=f"{type(error).__name__}: {str(error)[:120]}")
    found.sort()
    if not found:
        return None
    BEST.append({"what": name, "tokens": batch.num_tokens, "experts": batch.touched, "blocks": found[0][1],
                 **rates(found[0][0], num_bytes, flops)})
    REPORT(**BEST[-1], differ_from_training=differing, then=[[round(us, 2), blocks] for us, blocks in found[1:]])
    return found[0][1]


def training_projection(batch: Batch, name: str, projection: Projection) -> torch.Tensor:
    weight, offsets = module.dequantized(projection, torch.bfloat16), batch.routing.offsets_device
    if name == "gate_up":
        return grouped_gemm(batch.x, weight, offsets, gather=batch.routing.tokens, bias=projection.bias, swiglu=SWIGLU)
    return grouped_gemm(batch.act, weight, offsets, bias=projection.bias)


def time_dequantization() -> None:
    """One layer's gate_up."""
    projection = random_projection(2 * WIDTH)
    blocks, scales = projection.blocks, projection.scales
    out = torch.empty(NUM_EXPERTS, 2 * WIDTH, WIDTH, dtype=torch.bfloat16, device="cuda")
    calls = {"checkpoint order": lambda: dequantize_experts(blocks, scales, out),
             "fragments, arithmetic": lambda: dequantize_fragments(blocks, scales, out, is_asm=False),
             "fragments, assembly": lambda: dequantize_fragments(blocks, scales, out, is_asm=True)}
    for groups in (4, 8):
        fragments_module.DEQUANTIZE_GROUPS = groups
        for name, call in calls.items():
            us = graph_microseconds([call] * 2)
            rate = (out.nbytes + blocks.nbytes + scales.nbytes) / us / 1e3
            REPORT("dequantize", order=name, groups=groups, us=round(us, 1), **{"GB/s": round(rate)})
    fragments_module.DEQUANTIZE_GROUPS = 4


def tune_packed(layers: dict[str, list[Projection]], batches: tuple[int, ...]) -> dict[int, dict[str, DecodeBlocks | None]]:
    winners = {}
    for num_tokens in batches:
        batch = Batch(num_tokens)
        candidates = [blocks for blocks in CANDIDATES if blocks.tokens in TOKENS_OF[num_tokens]]
        winners[num_tokens] = {
            name: tune(name, batch, lambda blocks: [lambda layer=layer: project(batch, name, layer, blocks)  # noqa: B023
                                                    for layer in layers[name]],  # noqa: B023
                       candidates, training_projection(batch, name, layers[name][0]), batch.expert_bytes(size_out),
                       2 * batch.num_rows * size_out * WIDTH)
            for name, size_out in SIZES.items()}
    return winners


def tune_low_rank() -> None:
    layers = [torch.randn(NUM_EXPERTS, RANK, WIDTH, device="cuda") for _ in range(LORA_LAYERS)]
    for num_tokens in (1, 32, 128, 512):
        batch = Batch(num_tokens)
        tune("LoRA A", batch, lambda blocks: [lambda layer=layer: low_rank(batch, layer, blocks) for layer in layers],  # noqa: B023
             LOW_RANK_CANDIDATES, grouped_gemm(batch.x, layers[0].transpose(1, 2), batch.routing.offsets_device,
                                               gather=batch.routing.tokens, scale=SCALE),
             batch.touched * RANK * WIDTH * 4, 2 * batch.num_rows * RANK * WIDTH)


def tune_linear() -> None:
    """Dense products: what to put into kernels/linear_few_rows.py. Rows under 64 are another instruction's than training's on
    some GPUs: differ_from_training must be empty for those that are taken."""
    for name, (size_in, size_out) in LINEARS.items():
        is_lora = name.startswith("LoRA")
        layers = linear_layers(name, 120 if is_lora else LAYERS)
        for num_tokens in (1, 16, 32, 64, 128, 512):
            batch, x = Batch(num_tokens), linear_input(name, num_tokens)
            candidates = [blocks for blocks in LINEAR_CANDIDATES if blocks.tokens <= max(16, num_tokens)]
            tune(name, batch, lambda blocks: [lambda layer=layer: linear(x, layer, blocks) for layer in layers],  # noqa: B023
                 candidates, grouped_gemm(x, layers[0].dense, None), size_in * size_out * (4 if is_lora else 2),
                 2 * num_tokens * size_in * size_out)


def time_whole(layers: dict[str, list[Projection]], batches: tuple[int, ...]) -> None:
    loras = [random_lora() for _ in range(LAYERS)]
    settings = dict(lora_scale=SCALE, alpha=SWIGLU[0], limit=SWIGLU[1])
    for num_tokens in batches:
        batch = Batch(num_tokens)
        num_bytes, flops = batch.expert_bytes(3 * WIDTH), 6 * batch.num_rows * WIDTH * WIDTH
        for has_lora in (False, True):
            calls = [lambda index=index: moe_decode(
                batch.x, batch.weights, batch.routing, layers["gate_up"][index], layers["down"][index], batch.residual,  # noqa: B023
                lora=loras[index] if has_lora else None, **settings) for index in range(LAYERS)]  # noqa: B023
            REPORT("moe_decode", tokens=num_tokens, overlaps=bool(launch_module.OVERLAP_FAMILIES), experts=batch.touched,
                   has_lora=has_lora, **rates(graph_microseconds(calls), num_bytes, flops))


def table_of(winners: dict[int, dict[str, DecodeBlocks | None]]) -> tuple:
    """The winners as rows of moe_decode._PACKED, neighbours that agree merged."""
    rows = []
    for num_tokens, best in sorted(winners.items()):
        row = (LIMITS[num_tokens], best["gate_up"], best["down"])
        if None in row:
            continue
        if rows and rows[-1][1:] == row[1:]:
            rows.pop()
        rows.append(row)
    return tuple(rows)


def print_tables(family: str, table: tuple) -> None:
    """The best of every batch, and what to paste."""
    print(f"\n{'':8} {'tokens':>6} {'experts':>7} {'us':>8} {'GB/s':>6} {'of copy':>8} {'TFLOP/s':>8}  blocks")
    for row in sorted(BEST, key=lambda row: (row["what"], row["tokens"])):
        print(f"{row['what']:8} {row['tokens']:6} {row['experts']:7} {row['us']:8.2f} {row['GB/s']:6} {row['of_copy']:8.3f} "
              f"{row['TFLOP/s']:8.1f}  {tuple(row['blocks'])}")
    print(f'\n    "{family}": (')
    for limit, wide, narrow in table:
        print(f"        ({limit}, DecodeBlocks{tuple(wide)}, DecodeBlocks{tuple(narrow)}),")
    print("    ),", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer batches")
    parser.add_argument("--compile-part", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=200, help="begin no further candidate after so long")
    arguments = parser.parse_args()
    if arguments.compile_part:
        return compile_part(*arguments.compile_part)
    began = time.time()
    RUN["deadline"] = began + arguments.seconds
    compilers = start_compilers()
    check_dequantization()
    all_same = check_bits(arguments.quick)
    REPORT("checks", all_bits_equal=all_same, seconds=round(time.time() - began))
    for compiler in compilers:
        compiler.wait()
    REPORT("compiled", seconds=round(time.time() - began))
    measure_copy()
    time_dequantization()
    batches = (1, 32, 512) if arguments.quick else BATCHES
    layers = {name: [random_projection(size_out) for _ in range(LAYERS)] for name, size_out in SIZES.items()}
    winners = tune_packed(layers, batches)
    tune_low_rank()
    tune_linear()
    table = table_of(winners)
    family = gpu_family(layers["gate_up"][0].blocks)
    print_tables(family, table)
    if table:
        module._PACKED[family] = table
    REPORT("the whole, with the winners", seconds=round(time.time() - began))
    time_whole(layers, batches)
    try:
        REPORT("overlap", bits_equal=check_overlap(family))
        launch_module.OVERLAP_FAMILIES = (family,)
        time_whole(layers, batches)
    except Exception as error:  # noqa: BLE001
        REPORT("overlap", error=f"{type(error).__name__}: {str(error)[:300]}")
    print_tables(family, table)
    REPORT("checks", all_bits_equal=all_same, seconds=round(time.time() - began))


if __name__ == "__main__":
    main()
