"""Times the attention kernels at gpt-oss shapes (64 query heads, 8 key-value heads, width 64) on one GPU, over block sizes,
and measures each variant's error against float64 first.

    python scripts/bench_attention.py            (about 90 seconds; one JSON line per case, a table last)

TFLOP/s count the visible pairs only: 4 D per pair and head forward; backward 10 D (five products) over the time of both
kernels, which compute seven; alone, dq counts its 6 D and dkv its 8 D. `fraction` is of a large bf16 product in the same run.
Block sizes read queries x keys x warps x stages, with d where whole tiles come through tensor descriptors,
r where keys and values stay in registers.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Report, measure_ceilings, milliseconds, relative_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels.attention.packed import (  # noqa: E402
    AttentionPlan,
    Blocks,
    attention,
    blocks_for,
    dkv_triton,
    dq_triton,
    forward_triton,
)
from kernels.device import gpu_family  # noqa: E402

HEADS, KV_HEADS, WIDTH, WINDOW = 64, 8, 64, 128
SCALE = WIDTH**-0.5
FLOPS_PER_PAIR = {"forward": 4 * WIDTH, "dq": 6 * WIDTH, "dkv": 8 * WIDTH, "backward": 10 * WIDTH}
CANDIDATES = {  # (kernel, windowed) -> block sizes beside the default
    ("forward", False): [(128, 64, 8, 3, True), (64, 64, 4, 3, False), (64, 64, 4, 3, True), (128, 64, 4, 2, False),
                         (128, 64, 4, 2, True), (64, 128, 4, 2, False), (128, 128, 8, 2, False), (128, 128, 8, 2, True),
                         (128, 64, 8, 4, False)],
    ("dq", False): [(64, 64, 4, 3, False), (64, 64, 4, 2, False), (128, 64, 8, 2, False), (128, 64, 8, 2, True),
                    (64, 32, 4, 3, False), (128, 128, 8, 2, False)],
    ("dkv", False): [(64, 64, 4, 3, True), (64, 64, 4, 3, False), (64, 64, 4, 3, False, True), (32, 64, 4, 2, False),
                     (64, 128, 8, 2, False), (64, 128, 8, 2, True), (32, 128, 8, 2, False), (64, 64, 8, 2, False)],
    ("forward", True): [(64, 64, 4, 2, False), (128, 64, 8, 3, False), (64, 32, 4, 3, False), (128, 64, 4, 2, False)],
    ("dq", True): [(64, 64, 4, 3, False), (128, 64, 8, 2, False), (64, 32, 4, 3, False)],
    ("dkv", True): [(32, 64, 4, 2, False), (64, 128, 8, 2, False), (32, 128, 8, 2, False), (64, 64, 8, 2, False)],
}
PACKINGS = {"1 x 2048": [2048], "4 x 2048": [2048] * 4, "1 x 8192": [8192], "1 x 32768": [32768],
            "64 of 100 to 900": [100 + 800 * (7 * index % 64) // 63 for index in range(64)]}
REPORT = Report()


def short(blocks: Blocks) -> str:
    return "x".join(map(str, blocks[:4])) + "d" * blocks.descriptor + "r" * blocks.in_registers


class Case:
    """Inputs of one packing, and what the kernels pass each other."""

    def __init__(self, lengths: list[int], windowed: bool) -> None:
        bounds = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
        generator = torch.Generator("cuda").manual_seed(bounds[-1])

        def random(heads):
            return torch.randn(bounds[-1], heads, WIDTH, generator=generator, device="cuda").bfloat16()

        self.q, self.k, self.v, self.dout = random(HEADS), random(KV_HEADS), random(KV_HEADS), random(HEADS)
        self.sinks = torch.randn(HEADS, generator=generator, device="cuda").bfloat16()
        self.window, self.plan = WINDOW if windowed else 0, AttentionPlan(bounds)
        reach = WINDOW if windowed else bounds[-1]
        self.pairs = HEADS * sum(min(row + 1, reach) for length in lengths for row in range(length))
        self.default = blocks_for(gpu_family(self.q), torch.bfloat16, windowed=windowed, width=WIDTH)
        self.out, self.lse = self.run("forward", self.default.forward)
        self.row_stats = self.run("dq", self.default.dq)[2]

    def run(self, kernel: str, blocks: Blocks) -> tuple[torch.Tensor, ...]:
        settings = {"window": self.window, "scale": SCALE, "blocks": blocks}
        if kernel == "forward":
            return forward_triton(self.q, self.k, self.v, self.sinks, self.plan, **settings)
        if kernel == "dq":
            return dq_triton(self.q, self.k, self.v, self.sinks, self.out, self.dout, self.lse, self.plan, **settings)
        return dkv_triton(self.q, self.k, self.v, self.dout, self.row_stats, self.plan, **settings)

    def time(self, kernel: str, blocks: Blocks) -> tuple[float, float]:
        """Milliseconds, and TFLOP/s."""
        elapsed = milliseconds(lambda: self.run(kernel, blocks))
        return elapsed, FLOPS_PER_PAIR[kernel] * self.pairs / elapsed / 1e9


def exact(case: Case, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """The plain formula of a single sequence in `dtype`: what each kernel should return, and in bf16 what eager code does."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (case.q, case.k, case.v, case.sinks)]
    q, k, v, sinks = leaves
    k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(0, 1) for tensor in (k, v))
    distance = torch.arange(len(q), device="cuda")[:, None] - torch.arange(len(q), device="cuda")
    hidden = (distance < 0) | (distance >= case.window) if case.window else distance < 0
    scores = (q.transpose(0, 1) @ k.transpose(1, 2) * SCALE).masked_fill(hidden, float("-inf"))
    scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(q), 1)), dim=-1)
    out = (torch.softmax(scores, dim=-1)[..., :-1] @ v).transpose(0, 1)
    out.backward(case.dout.to(dtype))
    q, k, v, sinks = (leaf.grad for leaf in leaves)
    return {"forward": [out.detach()], "dq": [q, sinks], "dkv": [k, v]}


def compare_blocks(windowed: bool, check: Case, timed: Case, ceiling_tflops: float) -> dict[str, Blocks]:
    """Each candidate's error and time; the fastest right one of each kernel."""
    expected, eager, best = exact(check, torch.float64), exact(check, torch.bfloat16), {}
    for kernel in ("forward", "dq", "dkv"):
        default = timed.default._asdict()[kernel]
        limits = [2 * relative_error(rough, right) for rough, right in zip(eager[kernel], expected[kernel])]
        fastest = None

        def measure(blocks, kernel=kernel, limits=limits):
            ours = check.run(kernel, blocks)
            errors = [relative_error(mine, right) for mine, right in zip(ours, expected[kernel])]
            is_right = all(found <= limit for found, limit in zip(errors, limits))
            repeats = all(torch.equal(*pair) for pair in zip(ours, check.run(kernel, blocks)))
            elapsed, tflops = timed.time(kernel, blocks)
            REPORT(kernel, windowed=windowed, blocks=short(blocks), tokens=len(timed.q), ms=round(elapsed, 4),
                   tflops=round(tflops, 1), fraction=round(tflops / ceiling_tflops, 3), errors=[f"{e:.2e}" for e in errors],
                   eager_errors=[f"{limit / 2:.2e}" for limit in limits], is_right=is_right, repeats=repeats)
            return elapsed if is_right and repeats else None

        for blocks in [default, *(Blocks(*sizes) for sizes in CANDIDATES[kernel, windowed])]:
            elapsed = REPORT.guarded(f"{kernel} {short(blocks)} windowed={windowed}", measure, blocks)
            if elapsed is not None and (fastest is None or elapsed < fastest):
                fastest, best[kernel] = elapsed, blocks
    return best


def time_packing(name: str, lengths: list[int], windowed: bool, best: dict[str, Blocks], ceiling_tflops: float) -> None:
    case = Case(lengths, windowed)
    for label, blocks in (("default", case.default._asdict()), ("best", case.default._asdict() | best)):
        times = {kernel: case.time(kernel, blocks[kernel])[0] for kernel in ("forward", "dq", "dkv")}
        times["backward"] = times["dq"] + times["dkv"]
        rates = {kernel: FLOPS_PER_PAIR[kernel] * case.pairs / elapsed / 1e9 for kernel, elapsed in times.items()}
        REPORT("packing", packing=name, windowed=windowed, choice=label, ms={k: round(t, 4) for k, t in times.items()},
               tflops={k: round(rate, 1) for k, rate in rates.items()},
               fraction={k: round(rate / ceiling_tflops, 3) for k, rate in rates.items()})


def time_public(name: str, lengths: list[int], windowed: bool) -> None:
    """The public function with its host work, forward and backward, as a layer calls it."""
    case = Case(lengths, windowed)
    leaves = [tensor.requires_grad_() for tensor in (case.q, case.k, case.v, case.sinks)]

    def step():
        out = attention(*leaves, cu_seqlens=case.plan.cu_seqlens, window=case.window, scale=SCALE, plan=case.plan)
        torch.autograd.grad(out, leaves, case.dout)

    REPORT("attention, forward + backward", packing=name, windowed=windowed, ms=round(milliseconds(step), 4))


def time_torch(length: int) -> None:
    """torch's scaled_dot_product_attention, which has neither sinks nor packing, at the same shape."""
    case = Case([length], False)
    q, k, v, dout = (tensor.transpose(0, 1)[None].detach().requires_grad_() for tensor in (case.q, case.k, case.v, case.dout))

    def forward():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    out = forward()
    for kernel, function in (("forward", forward),
                             ("backward", lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))):
        elapsed = milliseconds(function)
        REPORT("torch sdpa", kernel=kernel, tokens=length, ms=round(elapsed, 4),
               tflops=round(FLOPS_PER_PAIR[kernel] * case.pairs / elapsed / 1e9, 1))


def print_table() -> None:
    print(f"\n{'packing':18} {'layer':9} {'blocks':8} {'forward':>16} {'dq':>16} {'dkv':>16} {'backward':>16}   ms, TFLOP/s")
    for line in REPORT.lines:
        if line["what"] == "packing":
            cells = [f"{elapsed:8.3f} {line['tflops'][kernel]:7.0f}" for kernel, elapsed in line["ms"].items()]
            layer = "windowed" if line["windowed"] else "full"
            print(f"{line['packing']:18} {layer:9} {line['choice']:8} " + " ".join(f"{cell:>16}" for cell in cells))


def main() -> None:
    tflops, _ = measure_ceilings(REPORT)
    best = {}
    for windowed in (False, True):
        check, timed = Case([1000], windowed), Case([8192], windowed)
        best[windowed] = REPORT.guarded("blocks", compare_blocks, windowed, check, timed, tflops) or {}
        REPORT("best", windowed=windowed, **{kernel: short(blocks) for kernel, blocks in best[windowed].items()})
    for windowed in (False, True):
        for name, lengths in PACKINGS.items():
            REPORT.guarded(f"{name} windowed={windowed}", time_packing, name, lengths, windowed, best[windowed], tflops)
        for name in ("1 x 2048", "1 x 8192"):
            REPORT.guarded(f"public {name}", time_public, name, PACKINGS[name], windowed)
    REPORT.guarded("torch sdpa", time_torch, 8192)
    print_table()


if __name__ == "__main__":
    main()
