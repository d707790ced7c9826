"""Times log-probs and entropy from hidden states at gpt-oss shapes on one GPU, and measures their error against float64.

    python scripts/bench_log_probs.py            (about a minute; one JSON line per case, a table last)

`fraction` is of the rate of a large bf16 product (or, for `GB_per_s`, of a large copy) in the same run. TFLOP/s count the
products named: 2 for log-probs with a frozen head, forward and backward.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from timing import Report, measure_ceilings, milliseconds, relative_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels.head.log_probs as module  # noqa: E402
from kernels.device import gpu_family, num_multiprocessors  # noqa: E402
from kernels.head.draw import head_logits  # noqa: E402
from kernels.head.log_probs import log_probs  # noqa: E402

WIDTH, VOCAB = 2880, 201_088
REPORT = Report()


def case(what: str, function, *arguments, **settings) -> None:
    REPORT.guarded(what, function, what, *arguments, **settings)
    torch.cuda.empty_cache()


def inputs(num_tokens: int, *, dtype=torch.bfloat16, vocab: int = VOCAB, spread: float = 2.0) -> tuple[torch.Tensor, ...]:
    """Hidden states whose logits have a standard deviation of `spread` nats, so that probabilities are uneven as real ones."""
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator, device="cuda") * spread
    weight = torch.randn(vocab, WIDTH, generator=generator, device="cuda") / math.sqrt(WIDTH)
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator, device="cuda")
    return hidden.to(dtype), weight.to(dtype), targets


def kept_sets(targets: torch.Tensor, num_kept: int) -> dict:
    others = torch.randint(0, VOCAB, (len(targets), num_kept - 1), device="cuda")
    ids = torch.cat([others, targets[:, None]], 1).flatten().int()
    return {"kept_ids": ids, "kept_offsets": torch.arange(len(targets) + 1, device="cuda") * num_kept}


def plain(hidden, weight, targets, *, temperature):
    logits = hidden @ weight.T / temperature
    full = torch.log_softmax(logits, dim=-1)
    return full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)


def results(function, tensors, weights, trains_head, temperature=0.9) -> list[torch.Tensor]:
    hidden, weight, targets = tensors
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_(trains_head)]
    outputs = function(*leaves, targets, temperature=temperature)
    factors = torch.randn(2, len(targets), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    loss = sum((out * factor.to(out.dtype)).sum() * scale for out, factor, scale in zip(outputs, factors, weights) if scale)
    loss.backward()
    return [out.detach() for out in outputs] + [leaf.grad for leaf in leaves if leaf.requires_grad]


def errors(what: str, num_tokens: int, spread: float, *, weights=(1.0, 0.0), trains_head=False, likely=False) -> None:
    """Relative error of every output and gradient against float64, ours and that of eager bf16; and equality of two runs."""
    hidden, weight, targets = inputs(num_tokens, spread=spread)
    if likely:  # chosen tokens of probability near 1
        hidden = hidden + (20 * weight[targets].float() / weight[targets].float().square().sum(1, keepdim=True)).bfloat16()
    tensors = (hidden, weight, targets)
    ours = results(log_probs, tensors, weights, trains_head)
    again = results(log_probs, tensors, weights, trains_head)
    same = all(torch.equal(a, b) for a, b in zip(ours, again))
    exact = results(plain, (hidden.double(), weight.double(), targets), weights, trains_head)
    eager = results(plain, tensors, weights, trains_head)
    names = ("log_probs", "entropy", "grad_hidden", "grad_head")
    ratios = {}
    for name, a, b, c in zip(names, ours, eager, exact):
        error, rough = (relative_error(x, c) for x in (a, b))
        ratios[name] = {"error": float(f"{error:.3g}"), "eager": float(f"{rough:.3g}"), "ok": error <= 2 * rough}
    REPORT(what, tokens=num_tokens, **ratios, identical_runs=same)


def step(what: str, num_tokens: int, tflops: float, *, passes: int = 2, weights=(1.0, 0.0), trains_head=False, num_kept=0,
         blocks: dict | None = None, force_library=False, scratch_bytes=module.SCRATCH_BYTES, grad=True, **settings) -> None:
    """Forward and backward as a training step has them."""
    hidden, weight, targets = inputs(num_tokens)
    family = gpu_family(hidden)
    saved, check = module._BLOCKS[family], module._check
    module._BLOCKS[family] = saved | (blocks or {})
    if force_library:
        module._check = lambda hidden, weight: "cublas"
    hidden.requires_grad_(grad)
    weight.requires_grad_(trains_head)
    kept = kept_sets(targets, num_kept) if num_kept else {}
    factors = torch.randn(num_tokens, device="cuda")

    def run():
        chosen, entropy = log_probs(hidden, weight, targets, temperature=0.9, scratch_bytes=scratch_bytes, **kept, **settings)
        if grad:
            hidden.grad = weight.grad = None
            sum((out * factors).sum() * scale for out, scale in zip((chosen, entropy), weights) if scale).backward()

    try:
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
        ms = milliseconds(run)
    finally:
        module._BLOCKS[family], module._check = saved, check
    rate = passes * 2 * num_tokens * WIDTH * VOCAB / ms / 1e9
    REPORT(what, tokens=num_tokens, ms=round(ms, 3), tokens_per_s=round(num_tokens / ms * 1e3), passes=passes,
           tflops=round(rate), fraction=round(rate / tflops, 3), extra_gb=round(peak / 1e9, 2))


def scores(what: str, num_tokens: int, tflops: float, *, blocks: dict | None = None, library=False, makes_sum=True) -> None:
    """The first product of a chunk alone, with its reduction."""
    hidden, weight, targets = inputs(num_tokens)
    family = gpu_family(hidden)
    saved = module._BLOCKS[family]
    module._BLOCKS[family] = saved | (blocks or {})
    outputs = [torch.empty(num_tokens, device="cuda") for _ in range(6)]
    scratch = torch.empty(num_tokens, VOCAB, dtype=torch.bfloat16, device="cuda") if makes_sum else None
    logits = torch.empty(num_tokens, VOCAB, device="cuda") if library else None

    def run():
        module._score_chunk(hidden, weight, targets, 0.9, None, scratch, logits, outputs, makes_sum)

    try:
        run()
        exact = plain(hidden[:64].double(), weight.double(), targets[:64], temperature=0.9)
        error = max((ours[:64].double() - value).abs().max().item() for ours, value in zip(outputs, exact))
        assert error < 1e-3, f"off by {error} nats"
        ms = milliseconds(run)
    finally:
        module._BLOCKS[family] = saved
    rate = 2 * num_tokens * WIDTH * VOCAB / ms / 1e9
    REPORT(what, tokens=num_tokens, blocks=blocks or {}, ms=round(ms, 3), tflops=round(rate), fraction=round(rate / tflops, 3),
           max_error_nats=float(f"{error:.2g}"))


@triton.jit
def product_kernel(a, b, out, num_rows, num_columns, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    num_row_tiles = tl.cdiv(num_rows, BM)
    num_tiles = num_row_tiles * tl.cdiv(num_columns, BN)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row, column = (tile % num_row_tiles) * BM, (tile // num_row_tiles) * BN
        sums = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, depth, BK):
            sums = tl.dot(a.load([row, k]), b.load([k, column]), sums)
        out.store([row, column], sums.to(tl.bfloat16))


def weighted_sum(what: str, num_tokens: int, tflops: float, *, blocks: tuple | None = None) -> None:
    """The second product: probabilities [n, V] with the head [V, D], by the library or (blocks) by Triton."""
    weight = inputs(1)[1]
    probabilities = torch.rand(num_tokens, VOCAB, device="cuda").square_().bfloat16()
    out = torch.empty(num_tokens, WIDTH, dtype=torch.bfloat16, device="cuda")

    def run():
        if blocks is None:
            torch.mm(probabilities, weight, out=out)
            return
        bm, bn, bk, num_warps, num_stages = blocks
        tensors = [triton.tools.tensor_descriptor.TensorDescriptor.from_tensor(tensor, shape) for tensor, shape in
                   ((probabilities, [bm, bk]), (weight, [bk, bn]), (out, [bm, bn]))]
        tiles = triton.cdiv(num_tokens, bm) * triton.cdiv(WIDTH, bn)
        product_kernel[(min(tiles, num_multiprocessors(out)),)](*tensors, num_tokens, WIDTH, VOCAB, BM=bm, BN=bn, BK=bk,
                                                               num_warps=num_warps, num_stages=num_stages)

    run()
    exact = probabilities[:64].double() @ weight.double()
    error = relative_error(out[:64], exact)
    assert error < 1e-2, f"relative error {error}"
    ms = milliseconds(run)
    rate = 2 * num_tokens * WIDTH * VOCAB / ms / 1e9
    REPORT(what, tokens=num_tokens, blocks=blocks, ms=round(ms, 3), tflops=round(rate), fraction=round(rate / tflops, 3),
           error=float(f"{error:.2g}"))


def decode(what: str, num_rows: int, bandwidth: float) -> None:
    hidden, weight, _ = inputs(512)
    part = hidden[:num_rows].contiguous()
    logits = head_logits(part, weight)
    error = ((logits.double() - part.double() @ weight.double().T).norm() / logits.double().norm()).item()
    ms = milliseconds(lambda: head_logits(part, weight))
    rate = (weight.numel() * 2 + logits.numel() * 4) / ms / 1e6
    library = torch.mm(part, weight.T, out_dtype=torch.float32)
    REPORT(what, tokens=num_rows, ms=round(ms, 3), GB_per_s=round(rate), fraction=round(rate / bandwidth, 3),
           error=float(f"{error:.2g}"), same_bits_as_batch_512=torch.equal(logits, head_logits(hidden, weight)[:num_rows]),
           same_bits_as_library=torch.equal(logits, library))


def batch_invariance(what: str) -> None:
    """Whether a token's log-prob and entropy have the same bits in any batch."""
    hidden, weight, targets = inputs(300)
    with torch.no_grad():
        many = log_probs(hidden, weight, targets, temperature=0.9)
        same = {}
        for count in (1, 7, 33, 64, 129):
            few = log_probs(hidden[:count], weight, targets[:count], temperature=0.9)
            same[count] = [torch.equal(one, all_[:count]) for one, all_ in zip(few, many)]
    REPORT(what, same_bits_log_probs_entropy=same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="errors and the default configuration only")
    arguments = parser.parse_args()
    tflops, bandwidth = measure_ceilings(REPORT)
    case("error", errors, 256, 2.0)
    case("error, odd", errors, 129, 4.0)
    case("error, likely tokens", errors, 256, 0.5, likely=True)
    case("error, entropy too", errors, 129, 2.0, weights=(1.0, 0.3))
    case("error, head trains", errors, 127, 2.0, weights=(1.0, 0.3), trains_head=True)
    case("batch invariance", batch_invariance)
    for num_tokens in (2048, 8192, 32768):
        case("step", step, num_tokens, tflops)
    case("step, no gradient", step, 8192, tflops, grad=False, passes=1)
    case("step, entropy loss", step, 8192, tflops, passes=3, weights=(1.0, 0.3), has_entropy_loss=True)
    case("step, head trains", step, 8192, tflops, passes=4, trains_head=True)
    case("step, kept sets of 64", step, 8192, tflops, num_kept=64)
    for num_rows in (1, 8, 32, 128, 512):
        case("head logits", decode, num_rows, bandwidth)
    if not arguments.quick:
        compare_variants(tflops)
    print(f"\n{'what':34} {'tokens':>6} {'ms':>8} {'TFLOP/s':>8} {'GB/s':>6} {'fraction':>8}  configuration")
    for line in REPORT.lines:
        if "ms" in line:
            print(f"{line['what']:34} {line['tokens']:6} {line['ms']:8.3f} {line.get('tflops', ''):>8} "
                  f"{line.get('GB_per_s', ''):>6} {line['fraction']:8.3f}  {line.get('blocks') or ''}")
        elif "error" in line and isinstance(line["error"], str):
            print(f"{line['what']:34} {line['error'][:80]}")


def compare_variants(tflops: float) -> None:
    reading = dict(BM=16, BN=128, TILE=128, num_warps=4, IS_PERSISTENT=False)  # nothing but a pass over fp32 logits
    case("scores: library fp32 logits", scores, 1408, tflops, library=True, blocks=reading)
    for blocks in ({}, dict(IS_PERSISTENT=False), dict(num_stages=4), dict(USE_TMA=False, IS_PERSISTENT=False),
                   dict(BN=128, TILE=64, num_warps=4, IS_PERSISTENT=False), dict(BN=128, TILE=128, num_stages=4),
                   dict(BM=256, BN=128, TILE=64, num_warps=8, IS_PERSISTENT=False)):
        case("scores", scores, 1408, tflops, blocks=blocks)
    case("scores, nothing kept", scores, 1408, tflops, makes_sum=False)
    for num_tokens in (704, 1024, 1408, 1536, 2048, 2816):
        case("sum: library", weighted_sum, num_tokens, tflops)
    for blocks in ((128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (64, 256, 64, 4, 4)):
        case("sum: triton", weighted_sum, 1408, tflops, blocks=blocks)
    case("step: library logits", step, 8192, tflops, force_library=True, blocks=reading,
            scratch_bytes=1_800_000_000)
    for megabytes in (300, 420, 830, 1140):
        case(f"step: scratch {megabytes} MB", step, 8192, tflops, scratch_bytes=megabytes * 1_000_000)


if __name__ == "__main__":
    main()
