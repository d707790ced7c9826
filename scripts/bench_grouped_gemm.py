"""Checks, then times, the grouped products of gpt-oss-20b's experts and its dense projections with LoRA on one GPU.

    python scripts/bench_grouped_gemm.py [--quick]

Prints a JSON line per case: what, shape, ms (median), TFLOP/s or GB/s of the useful work, the fraction of a ceiling measured in
the same run (an 8192^3 bf16 product, a large copy), relative error against float64; a table comes last."""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
import triton
from timing import Report, measure_ceilings, milliseconds, relative_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels.device import gpu_family  # noqa: E402
from kernels.experts.gemm import Blocks, choose_blocks, grouped_gemm  # noqa: E402
from kernels.experts.outer import OuterBlocks, choose_outer_blocks, grouped_outer, grouped_row_sum  # noqa: E402
from kernels.linear import Adapter, project, project_backward  # noqa: E402

WIDTH, NUM_EXPERTS, EXPERTS_PER_TOKEN, RANK = 2880, 32, 4, 16
SWIGLU = (1.702, 7.0)
CEILINGS = {"TFLOP/s": 0.0, "GB/s": 0.0}
REPORT = Report()
# rows, cols, inner, group, warps, stages, tensor descriptors, persistent, flatten
GEMM_CANDIDATES = [
    Blocks(128, 256, 64, 8, 8, 4, True, False), Blocks(128, 256, 64, 8, 8, 3, True, False),
    Blocks(128, 256, 64, 8, 8, 4, False, False), Blocks(128, 256, 64, 8, 8, 3, True, True),
    Blocks(128, 256, 64, 8, 8, 3, True, True, True), Blocks(128, 256, 64, 8, 8, 4, True, True, True),
    Blocks(128, 256, 64, 16, 8, 4, True, False), Blocks(256, 128, 64, 4, 8, 4, True, False),
    Blocks(256, 128, 64, 4, 8, 3, True, True, True), Blocks(128, 128, 64, 8, 8, 4, True, False),
    Blocks(128, 128, 64, 8, 4, 3, True, False), Blocks(128, 128, 128, 8, 8, 2, True, False),
]  # fmt: skip
SMALL_CANDIDATES = [
    Blocks(64, 128, 64, 8, 4, 4, True, False), Blocks(64, 256, 64, 8, 4, 4, True, False),
    Blocks(64, 256, 64, 8, 8, 4, True, False), Blocks(128, 128, 64, 8, 8, 4, True, False),
]  # fmt: skip
SKINNY_CANDIDATES = [
    Blocks(64, 16, 64, 1, 4, 3, False, False), Blocks(64, 16, 64, 1, 4, 5, False, False),
    Blocks(64, 16, 64, 1, 4, 8, False, False), Blocks(128, 16, 64, 1, 4, 4, False, False),
    Blocks(128, 16, 64, 1, 8, 4, False, False), Blocks(64, 16, 32, 1, 4, 8, False, False),
]  # fmt: skip
THIN_OUTER_CANDIDATES = [
    OuterBlocks(128, 16, 64, 4, 4), OuterBlocks(128, 16, 64, 4, 3), OuterBlocks(128, 16, 128, 4, 3),
    OuterBlocks(64, 16, 128, 4, 4), OuterBlocks(256, 16, 64, 8, 4), OuterBlocks(128, 16, 32, 4, 6),
]  # fmt: skip
WIDE_OUTER_CANDIDATES = [
    OuterBlocks(128, 256, 64, 8, 4), OuterBlocks(128, 256, 64, 8, 3), OuterBlocks(128, 128, 64, 4, 3),
    OuterBlocks(128, 128, 64, 8, 4), OuterBlocks(256, 128, 64, 8, 4),
]  # fmt: skip


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, device="cuda", dtype=torch.float32) * scale).to(dtype)


class Experts:
    """Random tensors of one layer at T tokens, routed uniformly at random."""

    def __init__(self, num_tokens: int) -> None:
        choices = torch.rand(num_tokens, NUM_EXPERTS, device="cuda").topk(EXPERTS_PER_TOKEN).indices
        order = choices.flatten().argsort(stable=True)
        counts = choices.flatten().bincount(minlength=NUM_EXPERTS)
        self.offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
        self.bounds = self.offsets.tolist()
        self.gather = (order // EXPERTS_PER_TOKEN).int()
        self.num_tokens, self.num_rows = num_tokens, len(order)
        self.x = normal(num_tokens, WIDTH)
        self.gates = torch.rand(self.num_rows, device="cuda")


def weights() -> dict[str, torch.Tensor]:
    e, d = NUM_EXPERTS, WIDTH
    made = {"gate_up": normal(e, 2 * d, d, scale=d**-0.5), "down": normal(e, d, d, scale=d**-0.5)}  # [E, out, in]
    for name, size_out in (("gate_up", 2 * d), ("down", d)):
        made[f"{name}_bias"] = normal(e, size_out)
        made[f"{name}_A"] = normal(e, RANK, d, scale=d**-0.5, dtype=torch.float32)
        made[f"{name}_B"] = normal(e, size_out, RANK, scale=0.1, dtype=torch.float32)
    return made


def report(what: str, shape: str, **fields) -> None:
    REPORT(what, shape=shape, **fields)


def measure(what: str, shape: str, function, *, flops: float = 0.0, num_bytes: float = 0.0, **fields) -> None:
    """Times function(); a failure is printed and the run goes on."""
    try:
        ms = milliseconds(function, warmup=8, rep=40)
    except Exception as error:  # noqa: BLE001  (a candidate that does not fit must not end the run)
        report(what, shape, error=f"{type(error).__name__}: {str(error)[:150]}", **fields)
        return
    unit = "TFLOP/s" if flops else "GB/s"
    rate = flops / ms / 1e9 if flops else num_bytes / ms / 1e6
    report(what, shape, ms=round(ms, 4), **{unit: round(rate, 1), "of_ceiling": round(rate / CEILINGS[unit], 3)}, **fields)


def describe(blocks: Blocks | OuterBlocks | None) -> str:
    if blocks is None:
        return "default"
    flags = [name for name in ("use_tma", "persistent", "flatten") if isinstance(blocks, Blocks) and blocks._asdict()[name]]
    return "x".join(str(int(value)) for value in blocks[:6]) + "".join(f" {flag}" for flag in flags)


# ------------------------------------------------------------------------------------------------------------------- checks


def check(what: str, make, exact: torch.Tensor, eager: torch.Tensor | None) -> None:
    """The error of make() against float64, that of eager bf16 beside it, and whether two runs agree in every bit."""
    try:
        ours, again = make().clone(), make()
        report(f"check {what}", str(list(exact.shape)), error_f64=f"{relative_error(ours, exact):.2e}",
               eager_error=None if eager is None else f"{relative_error(eager, exact):.2e}", same_bits=torch.equal(ours, again))
    except Exception as error:  # noqa: BLE001
        report(f"check {what}", str(list(exact.shape)), error=f"{type(error).__name__}: {str(error)[:300]}")


def formulas(data: Experts, w: dict[str, torch.Tensor], grad: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """gate_up with LoRA, its activation and every gradient, expert by expert in one dtype."""
    x, grad = data.x[data.gather.long()].to(dtype), grad.to(dtype)
    found = {name: [] for name in ("low", "grad_low", "h", "dx", "dA", "dB", "dW", "db")}
    for e, (start, end) in enumerate(itertools.pairwise(data.bounds)):
        weight, bias, down, up = (w[name][e].to(dtype) for name in ("gate_up", "gate_up_bias", "gate_up_A", "gate_up_B"))
        rows, grad_rows = x[start:end], grad[start:end]
        low, grad_low = 2.0 * (rows @ down.T), 2.0 * (grad_rows @ up)
        values = (low, grad_low, rows @ weight.T + bias + low @ up.T, grad_rows @ weight + grad_low @ down,
                  (grad_low.T @ rows)[None], (grad_rows.T @ low)[None], (rows.T @ grad_rows)[None], grad_rows.sum(0)[None])
        for name, value in zip(found, values):
            found[name].append(value)
    found = {name: torch.cat(parts) for name, parts in found.items()}
    gate, up = found["h"][:, 0::2].clamp(max=SWIGLU[1]), found["h"][:, 1::2].clamp(-SWIGLU[1], SWIGLU[1])
    return found | {"act": gate * torch.sigmoid(SWIGLU[0] * gate) * (up + 1)}


def check_everything(w: dict[str, torch.Tensor]) -> None:
    data = Experts(1000)
    rows, grad = data.x[data.gather.long()], normal(data.num_rows, 2 * WIDTH)
    low = grouped_gemm(data.x, w["gate_up_A"].transpose(1, 2), data.offsets, gather=data.gather, scale=2.0)
    grad_low = grouped_gemm(grad, w["gate_up_B"], data.offsets, scale=2.0)
    exact, eager = (formulas(data, w, grad, dtype) for dtype in (torch.float64, torch.bfloat16))
    lora = dict(low_rank=low, lora_up=w["gate_up_B"].transpose(1, 2))
    forward = dict(gather=data.gather, bias=w["gate_up_bias"], **lora)
    nk = w["gate_up"].transpose(1, 2)
    check("x A", lambda: grouped_gemm(data.x, w["gate_up_A"].transpose(1, 2), data.offsets, gather=data.gather, scale=2.0),
          exact["low"], eager["low"])
    check("dy B", lambda: grouped_gemm(grad, w["gate_up_B"], data.offsets, scale=2.0), exact["grad_low"], eager["grad_low"])
    for blocks in (None, *GEMM_CANDIDATES, *SMALL_CANDIDATES):
        check(f"gate_up gathered, lora [{describe(blocks)}]",
              lambda: grouped_gemm(data.x, nk, data.offsets, blocks=blocks, **forward), exact["h"], eager["h"])  # noqa: B023
    check("gate_up, rows in order", lambda: grouped_gemm(rows, nk, data.offsets, bias=w["gate_up_bias"], **lora), exact["h"],
          eager["h"])
    check("gate_up, [E, in, out]", lambda: grouped_gemm(rows, nk.contiguous(), data.offsets, bias=w["gate_up_bias"], **lora),
          exact["h"], eager["h"])
    check("gate_up + swiglu", lambda: grouped_gemm(data.x, nk, data.offsets, swiglu=SWIGLU, **forward), exact["act"],
          eager["act"])
    for blocks in (None, *GEMM_CANDIDATES):
        check(f"dx of gate_up, lora [{describe(blocks)}]",
              lambda: grouped_gemm(grad, w["gate_up"], data.offsets, low_rank=grad_low, lora_up=w["gate_up_A"], blocks=blocks),  # noqa: B023
              exact["dx"], eager["dx"])
    out_A, out_B = torch.empty_like(w["gate_up_A"]), torch.empty_like(w["gate_up_B"])
    out_W, out_b = normal(NUM_EXPERTS, WIDTH, 2 * WIDTH), torch.empty_like(w["gate_up_bias"])
    check("dA", lambda: grouped_outer(data.x, grad_low, data.offsets, out_A.transpose(1, 2), gather=data.gather).transpose(1, 2),
          exact["dA"], eager["dA"])
    check("dB", lambda: grouped_outer(grad, low, data.offsets, out_B), exact["dB"], eager["dB"])
    check("dW", lambda: grouped_outer(data.x, grad, data.offsets, out_W, gather=data.gather), exact["dW"], eager["dW"])
    check("db", lambda: grouped_row_sum(grad, data.offsets, out_b), exact["db"], eager["db"])
    others = (None, *GEMM_CANDIDATES[:3], SMALL_CANDIDATES[0])
    same = [grouped_gemm(data.x, nk, data.offsets, blocks=blocks, **forward) for blocks in others]
    report("check bits across tiles", "", same_bits=all(torch.equal(same[0], other) for other in same[1:]))


# ------------------------------------------------------------------------------------------------------------------ timings


def time_experts(num_tokens: int, w: dict[str, torch.Tensor], *, sweep: bool) -> None:
    data = Experts(num_tokens)
    r, d, shape = data.num_rows, WIDTH, f"T={num_tokens}"
    x, act, grad_h, grad_y = data.x, normal(r, d), normal(r, 2 * d), normal(num_tokens, d)
    rows = x[data.gather.long()]
    h, y, low = (torch.empty(r, size, dtype=torch.bfloat16, device="cuda") for size in (2 * d, d, RANK))
    low.normal_()
    up1, up2 = w["gate_up_B"].transpose(1, 2), w["down_B"].transpose(1, 2)
    nk1, nk2 = w["gate_up"].transpose(1, 2), w["down"].transpose(1, 2)
    flops1, flops2 = 4 * r * d * d, 2 * r * d * d
    lora1, lora2 = dict(low_rank=low, lora_up=up1), dict(low_rank=low, lora_up=up2)
    # where the default stands
    measure("torch._grouped_mm gate_up, rows in order", shape,
            lambda: torch._grouped_mm(rows, nk1, offs=data.offsets[1:]), flops=flops1)
    measure("torch._grouped_mm down", shape, lambda: torch._grouped_mm(act, nk2, offs=data.offsets[1:]), flops=flops2)
    measure("gather rows (index_select)", shape, lambda: torch.index_select(x, 0, data.gather, out=rows), num_bytes=4 * r * d)
    both = dict(gather=data.gather, bias=w["gate_up_bias"])
    measure("gate_up plain, gathered", shape, lambda: grouped_gemm(x, nk1, data.offsets, out=h, **both), flops=flops1)
    measure("gate_up plain, rows in order", shape, lambda: grouped_gemm(rows, nk1, data.offsets, out=h), flops=flops1)
    measure("gate_up + lora, gathered", shape, lambda: grouped_gemm(x, nk1, data.offsets, out=h, **both, **lora1), flops=flops1)
    measure("gate_up + lora + swiglu, gathered", shape,
            lambda: grouped_gemm(x, nk1, data.offsets, out=y, swiglu=SWIGLU, **both, **lora1), flops=flops1)
    measure("gate_up + lora + swiglu, both written, gathered", shape,
            lambda: grouped_gemm(x, nk1, data.offsets, out=y, swiglu=SWIGLU, pre_activation=h, **both, **lora1), flops=flops1)
    measure("gate_up [E, in, out] layout", shape, lambda: grouped_gemm(rows, nk1_dense(w), data.offsets, out=h), flops=flops1)
    measure("down + lora", shape, lambda: grouped_gemm(act, nk2, data.offsets, out=y, bias=w["down_bias"], **lora2), flops=flops2)
    measure("dx of gate_up + lora", shape,
            lambda: grouped_gemm(grad_h, w["gate_up"], data.offsets, out=y, low_rank=low, lora_up=w["gate_up_A"]), flops=flops1)
    measure("dx of down + lora, gathered gradient, gate weights", shape,
            lambda: grouped_gemm(grad_y, w["down"], data.offsets, gather=data.gather, out=y, row_scale=data.gates, low_rank=low,
                                 lora_up=w["down_A"]), flops=flops2)
    out16 = torch.empty(r, RANK, dtype=torch.bfloat16, device="cuda")
    measure("x A, gathered", shape, lambda: grouped_gemm(x, w["gate_up_A"].transpose(1, 2), data.offsets, gather=data.gather,
                                                         scale=2.0, out=out16), num_bytes=2 * r * d)
    down16 = w["gate_up_A"].bfloat16().transpose(1, 2)
    measure("x A, gathered, A in bf16", shape,
            lambda: grouped_gemm(x, down16, data.offsets, gather=data.gather, scale=2.0, out=out16), num_bytes=2 * r * d)
    measure("x A, rows in order", shape,
            lambda: grouped_gemm(act, w["down_A"].transpose(1, 2), data.offsets, scale=2.0, out=out16), num_bytes=2 * r * d)
    measure("dy B of gate_up", shape, lambda: grouped_gemm(grad_h, w["gate_up_B"], data.offsets, scale=2.0, out=out16),
            num_bytes=4 * r * d)
    out_A, out_B = torch.empty_like(w["gate_up_A"]).transpose(1, 2), torch.empty_like(w["gate_up_B"])
    measure("dA, gathered", shape, lambda: grouped_outer(x, low, data.offsets, out_A, gather=data.gather), num_bytes=2 * r * d)
    measure("dA, rows in order", shape, lambda: grouped_outer(act, low, data.offsets, out_A), num_bytes=2 * r * d)
    measure("dB of gate_up", shape, lambda: grouped_outer(grad_h, low, data.offsets, out_B), num_bytes=4 * r * d)
    if num_tokens == 8192:
        grad_W = torch.empty(NUM_EXPERTS, d, 2 * d, dtype=torch.bfloat16, device="cuda")
        measure("dW of gate_up, gathered", shape, lambda: grouped_outer(x, grad_h, data.offsets, grad_W, gather=data.gather),
                flops=flops1)
        measure("db of gate_up", shape, lambda: grouped_row_sum(grad_h, data.offsets, torch.empty_like(w["gate_up_bias"])),
                num_bytes=4 * r * d)
    if not sweep:
        return
    candidates = GEMM_CANDIDATES if num_tokens > 4096 else [*SMALL_CANDIDATES, *GEMM_CANDIDATES[:1]]
    for blocks in candidates:
        option, name = dict(blocks=blocks), f"[{describe(blocks)}]"
        measure(f"gate_up + lora, gathered {name}", shape,
                lambda: grouped_gemm(x, nk1, data.offsets, out=h, **both, **lora1, **option), flops=flops1)  # noqa: B023
        measure(f"dx of gate_up + lora {name}", shape,
                lambda: grouped_gemm(grad_h, w["gate_up"], data.offsets, out=y, low_rank=low, lora_up=w["gate_up_A"],
                                     **option), flops=flops1)  # noqa: B023
        if blocks.persistent or blocks.rows == 256 or num_tokens <= 4096:
            measure(f"gate_up plain, rows in order {name}", shape,
                    lambda: grouped_gemm(rows, nk1, data.offsets, out=h, **option), flops=flops1)  # noqa: B023
        if blocks.cols <= 128 or num_tokens <= 4096:
            measure(f"down + lora {name}", shape,
                    lambda: grouped_gemm(act, nk2, data.offsets, out=y, bias=w["down_bias"], **lora2, **option), flops=flops2)  # noqa: B023
    if num_tokens <= 4096:
        return
    sweep_thin(shape, data, w, x, grad_h, low, {"x A": out16, "A": out_A, "B": out_B, "W": grad_W})


def sweep_thin(shape: str, data, w: dict[str, torch.Tensor], x, grad_h, low, outputs: dict[str, torch.Tensor]) -> None:
    """Candidates of the low-rank products and of the weight gradients."""
    r, d, flops1 = data.num_rows, WIDTH, 4 * data.num_rows * WIDTH * WIDTH
    out16, out_A, out_B, grad_W = outputs["x A"], outputs["A"], outputs["B"], outputs["W"]
    for blocks in SKINNY_CANDIDATES:
        measure(f"x A, gathered [{describe(blocks)}]", shape,
                lambda: grouped_gemm(x, w["gate_up_A"].transpose(1, 2), data.offsets, gather=data.gather, scale=2.0, out=out16,
                                     blocks=blocks), num_bytes=2 * r * d)  # noqa: B023
        measure(f"dy B of gate_up [{describe(blocks)}]", shape,
                lambda: grouped_gemm(grad_h, w["gate_up_B"], data.offsets, scale=2.0, out=out16, blocks=blocks),  # noqa: B023
                num_bytes=4 * r * d)
    for blocks in THIN_OUTER_CANDIDATES:
        measure(f"dA, gathered [{describe(blocks)}]", shape,
                lambda: grouped_outer(x, low, data.offsets, out_A, gather=data.gather, blocks=blocks), num_bytes=2 * r * d)  # noqa: B023
        measure(f"dB of gate_up [{describe(blocks)}]", shape,
                lambda: grouped_outer(grad_h, low, data.offsets, out_B, blocks=blocks), num_bytes=4 * r * d)  # noqa: B023
    for blocks in WIDE_OUTER_CANDIDATES:
        measure(f"dW of gate_up, gathered [{describe(blocks)}]", shape,
                lambda: grouped_outer(x, grad_h, data.offsets, grad_W, gather=data.gather, blocks=blocks), flops=flops1)  # noqa: B023


def nk1_dense(w: dict[str, torch.Tensor]) -> torch.Tensor:
    """gate_up as [E, in, out] in memory, made once."""
    if "gate_up_dense" not in w:
        w["gate_up_dense"] = w["gate_up"].transpose(1, 2).contiguous()
    return w["gate_up_dense"]


def time_dense(num_tokens: int) -> None:
    """A projection with LoRA: ours, and eager by autograd."""
    for name, size_in, size_out in (("q", 2880, 4096), ("k", 2880, 512), ("o", 4096, 2880)):
        shape, flops = f"T={num_tokens} {name}", 2 * num_tokens * size_in * size_out
        x, weight, bias = normal(num_tokens, size_in), normal(size_out, size_in, scale=size_in**-0.5), normal(size_out)
        down = normal(RANK, size_in, scale=size_in**-0.5, dtype=torch.float32).requires_grad_()
        up = normal(size_out, RANK, scale=0.1, dtype=torch.float32).requires_grad_()
        grad, adapter = normal(num_tokens, size_out), Adapter(down.detach(), up.detach(), None, [slice(0, size_out)], 2.0)

        def eager(x=x, weight=weight, bias=bias, down=down, up=up):
            base = torch.nn.functional.linear(x, weight, bias)
            return base + 2.0 * (x @ down.to(x.dtype).T @ up.to(x.dtype).T)

        def ours(x=x, weight=weight, bias=bias, adapter=adapter):
            return project(x, weight, bias, adapter, keeps_low_rank=True)

        exact = x.double() @ (weight.double() + 2.0 * up.detach().double() @ down.detach().double()).T + bias.double()
        check(f"{name}_proj", lambda: ours()[0], exact, eager().detach())  # noqa: B023
        del exact
        measure("dense base alone", shape, lambda: torch.nn.functional.linear(x, weight, bias), flops=flops)  # noqa: B023
        for variant, function in (("ours", ours), ("eager", eager)):
            measure(f"dense + lora forward, {variant}", shape, function, flops=flops)
        output, (_, low_rank) = eager(x=x.requires_grad_()), ours(x=x.detach())
        for variant, function in (
                ("ours", lambda: project_backward(grad, x.detach(), weight, low_rank, adapter, needs_x=True,  # noqa: B023
                                                  needs_base=False)),
                ("eager", lambda: torch.autograd.grad(output, (x, down, up), grad, retain_graph=True))):  # noqa: B023
            measure(f"dense + lora backward, {variant}", shape, function, flops=flops)


def time_launch(w: dict[str, torch.Tensor]) -> None:
    """Host time of a call, which bounds short steps."""
    data = Experts(16)
    nk1, rows = w["gate_up"].transpose(1, 2), data.x[data.gather.long()]
    low = grouped_gemm(rows, w["gate_up_A"].transpose(1, 2), data.offsets, scale=2.0)
    calls = {
        "gate_up + lora": lambda: grouped_gemm(rows, nk1, data.offsets, bias=w["gate_up_bias"], low_rank=low,
                                               lora_up=w["gate_up_B"].transpose(1, 2)),
        "x A": lambda: grouped_gemm(rows, w["gate_up_A"].transpose(1, 2), data.offsets, scale=2.0),
    }  # fmt: skip
    for name, function in calls.items():
        function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            function()
        report("host time of a call", name, microseconds=round((time.perf_counter() - start) * 1e4, 1))
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="checks and the default sizes only, no candidates")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_grouped_gemm.py needs a CUDA GPU")
    started = time.time()
    torch.manual_seed(0)
    family = gpu_family(torch.empty(0, device="cuda"))
    report("gpu", torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
           default=describe(choose_blocks(family, torch.bfloat16, 32768, NUM_EXPERTS, WIDTH, 2 * WIDTH)),
           outer=describe(choose_outer_blocks(family, torch.bfloat16, 2 * WIDTH)))
    CEILINGS["TFLOP/s"], CEILINGS["GB/s"] = measure_ceilings(REPORT)
    w = weights()
    check_everything(w)
    for num_tokens in (8192, 2048, 32768):
        time_experts(num_tokens, w, sweep=not arguments.quick and num_tokens <= 8192)
        torch.cuda.empty_cache()
    for num_tokens in (8192, 2048):
        time_dense(num_tokens)
    time_launch(w)
    print(f"\n{'what':<86} {'shape':<12} {'ms':>9} {'rate':>8} {'of ceiling':>10}   ({time.time() - started:.0f} s)")
    for result in REPORT.lines:
        rate = result.get("TFLOP/s", result.get("GB/s"))
        if "error" in result:
            print(f"{result['what']:<86} {result['shape']:<12} {result['error'][:60]}")
        elif "ms" in result:
            print(f"{result['what']:<86} {result['shape']:<12} {result['ms']:>9.4f} {rate:>8} {result['of_ceiling']:>10}")
        elif result["what"].startswith("check"):
            print(f"{result['what']:<86} {result.get('error_f64', ''):>12} eager {result.get('eager_error')} "
                  f"same bits {result['same_bits']}")


if __name__ == "__main__":
    main()
