"""Roofline table of the training kernels at gpt-oss-20b shapes on one GPU: where time is lost.

    python scripts/bench_kernels.py [--tokens 8192] [--only norm attention ...]      (about a minute, compilation included)

One JSON line per call: ms (median on the GPU, without what the host takes; the L2 cache is emptied first), TFLOP/s and GB/s of
the useful work, roofline_ms = the larger of useful operations over the rate of an 8192^3 bf16 product and useful bytes over that
of a 2 GiB copy, both measured first, fraction = roofline_ms / ms, lost_ms = ms - roofline_ms. Useful bytes are every input once
and every output once, gathered or not; useful operations are those of the products alone (attention: visible pairs only). The
table comes last, most time lost first. A layer makes each call about once, a step the log-probs once. Other block sizes are tried
by bench_elementwise.py, bench_grouped_gemm.py, bench_attention.py and bench_log_probs.py, whose inputs these are.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import bench_attention
import bench_elementwise
import bench_grouped_gemm
import bench_log_probs
import torch
from timing import Report, device_milliseconds, measure_ceilings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels.experts.forward import activation_grad  # noqa: E402
from kernels.experts.gemm import grouped_gemm  # noqa: E402
from kernels.experts.outer import grouped_outer, grouped_row_sum  # noqa: E402
from kernels.head.log_probs import log_probs  # noqa: E402
from kernels.linear import Adapter, project, project_backward  # noqa: E402

WIDTH, EXPERTS, RANK = bench_grouped_gemm.WIDTH, bench_grouped_gemm.NUM_EXPERTS, bench_grouped_gemm.RANK
HEADS, KV_HEADS, HEAD_DIM = bench_attention.HEADS, bench_attention.KV_HEADS, bench_attention.WIDTH
LENGTHS = (2048, 8192)  # of the sequences that attention is timed at
PROJECTIONS = (("q", 2880, 4096), ("k, v", 2880, 512), ("o", 4096, 2880))  # name, in, out
LORA_SCALE = 2.0
REPORT = Report()


class Case(NamedTuple):
    what: str
    flops: float
    num_bytes: float
    function: Callable[[], object]


class Ceilings(NamedTuple):
    tflops: float
    gb_per_s: float


def roofline_ms(flops: float, num_bytes: float, ceilings: Ceilings) -> float:
    """The least time of that work, in milliseconds."""
    return max(flops / ceilings.tflops / 1e9, num_bytes / ceilings.gb_per_s / 1e6)


def result(case: Case, ms: float, ceilings: Ceilings) -> dict:
    """What a line says of a case that took `ms`."""
    least = roofline_ms(case.flops, case.num_bytes, ceilings)
    is_compute = case.flops / ceilings.tflops / 1e9 == least
    return {"ms": round(ms, 4), "roofline_ms": round(least, 4), "lost_ms": round(ms - least, 4), "fraction": round(least / ms, 3),
            "bound": "compute" if is_compute else "memory", "TFLOP/s": round(case.flops / ms / 1e9, 1),
            "GB/s": round(case.num_bytes / ms / 1e6, 1)}


def size_of(*tensors: torch.Tensor) -> int:
    """Bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def pair_flops(kernel: str, pairs: int) -> float:
    """Operations of an attention kernel over `pairs` visible pairs of query and key, heads counted."""
    return bench_attention.FLOPS_PER_PAIR[kernel] * pairs


def attention_bytes(kernel: str, num_tokens: int) -> int:
    """Bytes that an attention kernel must read and write, bf16 with fp32 statistics."""
    wide, narrow, stats = 2 * num_tokens * HEADS * HEAD_DIM, 2 * num_tokens * KV_HEADS * HEAD_DIM, 4 * num_tokens * HEADS
    return {"forward": 2 * wide + 2 * narrow + stats,  # q, k, v to out and lse
            "dq": 4 * wide + 2 * narrow + 3 * stats,  # q, k, v, out, dout, lse to dq and two statistics
            "dkv": 2 * wide + 4 * narrow + 2 * stats}[kernel]  # q, k, v, dout, statistics to dk and dv


def grouped_flops(num_rows: int, num_in: int, num_out: int, rank: int = 0) -> float:
    """Operations of a product of rows with their experts' weights, and of the second half of its LoRA."""
    return 2.0 * num_rows * (num_in * num_out + rank * num_out)


def elementwise_cases(name: str) -> Callable[[int], Iterator[Case]]:
    """The default configurations of a group of bench_elementwise."""

    def cases(num_tokens: int) -> Iterator[Case]:
        for what, config, num_bytes, function in bench_elementwise.CASES[name](num_tokens):
            if not config:
                yield Case(what, 0.0, num_bytes, function)

    return cases


def activation_cases(num_tokens: int) -> Iterator[Case]:
    """The activation, alone (full fine-tuning) and as the experts' backward has it."""
    yield from elementwise_cases("swiglu")(num_tokens)
    data = bench_grouped_gemm.Experts(num_tokens)
    grad, h = bench_grouped_gemm.normal(data.num_rows, WIDTH), bench_grouped_gemm.normal(data.num_rows, 2 * WIDTH)
    weights = data.gates.view(num_tokens, -1)
    order, dots = torch.randperm(data.num_rows, device="cuda").int(), torch.zeros_like(weights)
    yield Case("activation gradient, gate weights", 0.0, 2 * size_of(grad, h) + 2 * size_of(weights) + size_of(order),
               lambda: activation_grad(grad, h, weights, order, alpha=bench_elementwise.ALPHA, limit=bench_elementwise.LIMIT,
                                       dots=dots))


class ExpertInputs:
    """Tensors of one layer's experts at T tokens: weights as a dequantised checkpoint has them, [E, out, in]."""

    def __init__(self, num_tokens: int) -> None:
        normal = bench_grouped_gemm.normal
        self.data, self.weights = bench_grouped_gemm.Experts(num_tokens), bench_grouped_gemm.weights()
        rows = self.data.num_rows
        self.x, self.grad = self.data.x, normal(num_tokens, WIDTH)
        self.act, self.h = normal(rows, WIDTH), normal(rows, 2 * WIDTH)
        self.rows, self.low = torch.empty_like(self.act), normal(rows, RANK)


def product_cases(num_tokens: int) -> Iterator[Case]:
    """The experts' products with frozen weights, LoRA in the accumulator."""
    i, r, d = ExpertInputs(num_tokens), num_tokens * bench_grouped_gemm.EXPERTS_PER_TOKEN, WIDTH
    w, offsets, gather, low = i.weights, i.data.offsets, i.data.gather, i.low
    W1, W2, A1, B1, A2, B2 = (w[name] for name in ("gate_up", "down", "gate_up_A", "gate_up_B", "down_A", "down_B"))
    up1, up2 = B1.transpose(1, 2), B2.transpose(1, 2)
    flops1, flops2 = grouped_flops(r, d, 2 * d, RANK), grouped_flops(r, d, d, RANK)
    flops1_back, flops2_back = grouped_flops(r, 2 * d, d, RANK), grouped_flops(r, d, d, RANK)
    first = dict(gather=gather, bias=w["gate_up_bias"], low_rank=low, lora_up=up1, swiglu=bench_grouped_gemm.SWIGLU, out=i.rows)
    moved = size_of(i.x, W1, B1, low, i.rows)
    yield Case("gate_up: gather, LoRA, SwiGLU", flops1, moved,
               lambda: grouped_gemm(i.x, W1.transpose(1, 2), offsets, **first))
    yield Case("gate_up: gather, LoRA, SwiGLU, h kept", flops1, moved + size_of(i.h),
               lambda: grouped_gemm(i.x, W1.transpose(1, 2), offsets, pre_activation=i.h, **first))
    second = dict(bias=w["down_bias"], low_rank=low, lora_up=up2, out=i.rows)
    yield Case("down: LoRA", flops2, size_of(i.act, W2, B2, low, i.rows),
               lambda: grouped_gemm(i.act, W2.transpose(1, 2), offsets, **second))
    yield Case("down backward: gather, LoRA", flops2_back, size_of(i.grad, W2, A2, low, i.rows),
               lambda: grouped_gemm(i.grad, W2, offsets, gather=gather, low_rank=low, lora_up=A2, out=i.rows))
    yield Case("gate_up backward: LoRA", flops1_back, size_of(i.h, W1, A1, low, i.rows),
               lambda: grouped_gemm(i.h, W1, offsets, low_rank=low, lora_up=A1, out=i.rows))


def low_rank_cases(num_tokens: int) -> Iterator[Case]:
    """LoRA's narrow products of the experts, and its gradients."""
    i, r, d = ExpertInputs(num_tokens), num_tokens * bench_grouped_gemm.EXPERTS_PER_TOKEN, WIDTH
    w, offsets, gather, low, out = i.weights, i.data.offsets, i.data.gather, i.low, torch.empty_like(i.low)
    A1, B1, A2, B2 = (w[name] for name in ("gate_up_A", "gate_up_B", "down_A", "down_B"))
    narrow, wide = 2.0 * r * d * RANK, 4.0 * r * d * RANK
    yield Case("LoRA x A1: gather", narrow, size_of(i.x, A1, out),
               lambda: grouped_gemm(i.x, A1.transpose(1, 2), offsets, gather=gather, scale=LORA_SCALE, out=out))
    yield Case("LoRA act A2", narrow, size_of(i.act, A2, out),
               lambda: grouped_gemm(i.act, A2.transpose(1, 2), offsets, scale=LORA_SCALE, out=out))
    yield Case("LoRA dh B1", wide, size_of(i.h, B1, out), lambda: grouped_gemm(i.h, B1, offsets, scale=LORA_SCALE, out=out))
    yield Case("LoRA dy B2: gather", narrow, size_of(i.grad, B2, out),
               lambda: grouped_gemm(i.grad, B2, offsets, gather=gather, scale=LORA_SCALE, out=out))
    grads = {name: torch.empty_like(w[name]) for name in ("gate_up_A", "gate_up_B", "down_A", "down_B")}
    grad_A1, grad_A2 = grads["gate_up_A"].transpose(1, 2), grads["down_A"].transpose(1, 2)
    grad_B1, grad_B2, scales = grads["gate_up_B"], grads["down_B"], i.data.gates
    yield Case("LoRA dA1: gather", narrow, size_of(i.x, low, A1),
               lambda: grouped_outer(i.x, low, offsets, grad_A1, gather=gather))
    yield Case("LoRA dB1", wide, size_of(i.h, low, B1), lambda: grouped_outer(i.h, low, offsets, grad_B1))
    yield Case("LoRA dA2: row weights", narrow, size_of(i.act, low, A2, scales),
               lambda: grouped_outer(i.act, low, offsets, grad_A2, row_scale=scales))
    yield Case("LoRA dB2: gather, row weights", narrow, size_of(i.grad, low, B2, scales),
               lambda: grouped_outer(i.grad, low, offsets, grad_B2, gather=gather, row_scale=scales))


def weight_gradient_cases(num_tokens: int) -> Iterator[Case]:
    """Gradients of dense experts' weights and biases: full fine-tuning."""
    i, r, d = ExpertInputs(num_tokens), num_tokens * bench_grouped_gemm.EXPERTS_PER_TOKEN, WIDTH
    offsets = i.data.offsets
    grad_1 = torch.empty(EXPERTS, d, 2 * d, dtype=torch.bfloat16, device="cuda")
    grad_2 = torch.empty(EXPERTS, d, d, dtype=torch.bfloat16, device="cuda")
    bias = torch.empty(EXPERTS, 2 * d, dtype=torch.bfloat16, device="cuda")
    yield Case("gate_up dW", grouped_flops(r, d, 2 * d), size_of(i.act, i.h, grad_1),
               lambda: grouped_outer(i.act, i.h, offsets, grad_1))
    yield Case("down dW", grouped_flops(r, d, d), size_of(i.act, i.rows, grad_2),
               lambda: grouped_outer(i.act, i.rows, offsets, grad_2))
    yield Case("gate_up db", 0.0, size_of(i.h, bias), lambda: grouped_row_sum(i.h, offsets, bias))


def dense_cases(num_tokens: int) -> Iterator[Case]:
    """Projections of the attention with LoRA."""
    normal = bench_grouped_gemm.normal
    for name, size_in, size_out in PROJECTIONS:
        x, grad = normal(num_tokens, size_in), normal(num_tokens, size_out)
        weight, bias = normal(size_out, size_in, scale=size_in**-0.5), normal(size_out)
        down = normal(RANK, size_in, scale=size_in**-0.5, dtype=torch.float32)
        up = normal(size_out, RANK, scale=0.1, dtype=torch.float32)
        adapter = Adapter(down, up, None, [slice(0, size_out)], LORA_SCALE)
        flops, low_flops = 2.0 * num_tokens * size_in * size_out, 2.0 * num_tokens * RANK * (size_in + size_out)

        def forward(x=x, weight=weight, bias=bias, adapter=adapter):
            return project(x, weight, bias, adapter, keeps_low_rank=True)

        y, low_rank = forward()

        def backward(grad=grad, x=x, weight=weight, low_rank=low_rank, adapter=adapter):
            return project_backward(grad, x, weight, low_rank, adapter, needs_x=True, needs_base=False)

        yield Case(f"{name} projection with LoRA", flops + low_flops, size_of(x, weight, y, down, up), forward)
        yield Case(f"{name} projection with LoRA, backward", flops + 2 * low_flops,
                   size_of(x, x, grad, weight) + 2 * size_of(down, up), backward)


def attention_cases(num_tokens: int) -> Iterator[Case]:
    for windowed in (False, True):
        for length in LENGTHS:
            count = max(1, num_tokens // length)
            case = bench_attention.Case([length] * count, windowed)
            layer = "windowed" if windowed else "full"
            for kernel, blocks in case.default._asdict().items():
                yield Case(f"attention {layer} {kernel}, {count} x {length}", pair_flops(kernel, case.pairs),
                           attention_bytes(kernel, count * length),
                           lambda case=case, kernel=kernel, blocks=blocks: case.run(kernel, blocks))


def log_prob_cases(num_tokens: int) -> Iterator[Case]:
    hidden, weight, targets = bench_log_probs.inputs(num_tokens)
    product = 2.0 * num_tokens * WIDTH * bench_log_probs.VOCAB
    factors = torch.randn(num_tokens, device="cuda")

    def score() -> torch.Tensor:
        return log_probs(hidden, weight, targets, temperature=1.0)[0]

    yield Case("log-probs, no gradient", product, size_of(hidden, weight), score)
    hidden.requires_grad_()
    yield Case("log-probs, gradient's sum", 2 * product, 2 * size_of(hidden) + size_of(weight), score)
    chosen = score()
    # each token's row of the head, its hidden state's gradient, and the sum
    yield Case("log-probs backward", 0.0, 3 * size_of(hidden),
               lambda: torch.autograd.grad(chosen, hidden, factors, retain_graph=True))
    weight.requires_grad_()
    trained = score()
    yield Case("log-probs backward, head trains", 3 * product, 2 * size_of(hidden) + 2 * size_of(weight),
               lambda: torch.autograd.grad(trained, (hidden, weight), factors, retain_graph=True))


CASES = {
    "norm": elementwise_cases("norm"),
    "rope": elementwise_cases("rope"),
    "router": elementwise_cases("router"),
    "choice": elementwise_cases("choice"),
    "rows": elementwise_cases("rows"),
    "dequantize": elementwise_cases("dequantize"),
    "activation": activation_cases,
    "products": product_cases,
    "low_rank": low_rank_cases,
    "weight_gradients": weight_gradient_cases,
    "dense": dense_cases,
    "attention": attention_cases,
    "log_probs": log_prob_cases,
}


def time_group(group: str, num_tokens: int, ceilings: Ceilings) -> None:
    for case in CASES[group](num_tokens):
        REPORT.guarded(case.what, time_case, group, case, num_tokens, ceilings)


def time_case(group: str, case: Case, num_tokens: int, ceilings: Ceilings) -> None:
    REPORT(case.what, group=group, tokens=num_tokens, **result(case, device_milliseconds(case.function), ceilings))


def table(lines: list[dict]) -> list[str]:
    """The lines that were timed, most time lost first, as text; those that failed last."""
    rows = [f"{'what':44} {'ms':>9} {'TFLOP/s':>8} {'GB/s':>7} {'least ms':>9} {'fraction':>8} {'lost ms':>8}  bound"]
    for line in sorted((line for line in lines if "lost_ms" in line), key=lambda line: -line["lost_ms"]):
        tflops = f"{line['TFLOP/s']:.0f}" if line["TFLOP/s"] else ""
        rows.append(f"{line['what']:44} {line['ms']:9.4f} {tflops:>8} {line['GB/s']:7.0f} {line['roofline_ms']:9.4f} "
                    f"{line['fraction']:8.3f} {line['lost_ms']:8.4f}  {line['bound']}")
    return rows + [f"{line['what']:44} failed: {line['error'][:80]}" for line in lines if "error" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_kernels: needs a CUDA GPU")
    torch.manual_seed(0)
    ceilings = Ceilings(*measure_ceilings(REPORT))
    for group in arguments.only:
        REPORT.guarded(group, time_group, group, arguments.tokens, ceilings)
        torch.cuda.empty_cache()
    print("\n" + "\n".join(table(REPORT.lines)))


if __name__ == "__main__":
    main()
