"""Every operation of gpt-oss on this GPU at real sizes, against the roofline and against PyTorch: where time is lost.

    python scripts/bench_kernels.py [--size 20b] [--only norm,"experts few"] [--tokens 8192] [--rows 1 8 32 128 512] [--json FILE]
    python scripts/bench_kernels.py --list                                        (the table of cases: what each computes)

One JSON line per case: ms, the median on the GPU without what the host takes, the L2 cache empty (few rows: by CUDA graphs that
go through the weights of several layers); TFLOP/s and GB/s of the useful work; roofline_ms, the larger of useful operations over
the rate of an 8192^3 product and useful bytes over that of a 2 GiB copy, both measured first; fraction = roofline_ms / ms;
lost_ms = ms - roofline_ms. Useful bytes are every input once and every output once, gathered or not; useful operations those of
products alone (attention: of visible pairs). peak_gb is the most memory allocated, in 1e9 bytes. peer_ms and times_peer =
peer_ms / ms: the same computation by eager PyTorch or a library (`peer` says which; --no-peers leaves them out). relative_error
is against the peer's result; is_right says whether it is within what rounding explains, and a case that is not right makes the
exit code 1. A table comes last, most time lost first.

--blocks 128x256x64x8x8x4x1x0 ... also times the chosen cases with other block sizes, in the order of the fields of
AttentionBlocks, GemmBlocks, OuterBlocks or DecodeBlocks of their kernel, and says whether the bits are those of the default.
--size tiny is for trying the script without a GPU, in Triton's interpreter.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import torch
from timing import Ceilings, Report, call_milliseconds, free_memory, measure_ceilings, relative_error, with_peak_gb

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def rates(work, ms: float, ceilings: Ceilings) -> dict:
    """What a line says of work that took `ms`."""
    products_ms, moves_ms = work.flops / ceilings.tflops / 1e9, work.num_bytes / ceilings.gb_per_s / 1e6
    least = max(products_ms, moves_ms)
    return {"ms": round(ms, 4), "roofline_ms": round(least, 4), "lost_ms": round(ms - least, 4), "fraction": round(least / ms, 3),
            "bound": "compute" if products_ms > moves_ms else "memory", "TFLOP/s": round(work.flops / ms / 1e9, 1),
            "GB/s": round(work.num_bytes / ms / 1e6, 1)}


def results(found: object) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found)


def largest_error(ours: object, theirs: object) -> float:
    """The largest relative error of the results."""
    pairs = list(zip(results(ours), results(theirs), strict=True))
    assert all(one.shape == other.shape for one, other in pairs), [(one.shape, other.shape) for one, other in pairs]
    return max(relative_error(one, other) for one, other in pairs)


def measure(case, sizes, ceilings: Ceilings, *, with_peers: bool, blocks: list[str]) -> list[dict]:
    """Lines of one case: its own, and one for each of the other block sizes."""
    torch.manual_seed(0)
    work, line = case.make(), {}
    found, line["peak_gb"] = with_peak_gb(work.result or work.calls[0])
    ours = [tensor.detach().clone() for tensor in results(found)]
    compares = with_peers and work.peer is not None
    if compares:  # before anything is timed: some calls work in place
        try:
            error = largest_error(ours, (work.expected or work.peer)())
            line |= {"relative_error": error, "is_right": error <= TOLERANCE[sizes.dtype]}
        except Exception as error:  # what is timed is the other; a peer may want more memory than there is
            compares, line["peer_error"] = False, f"{type(error).__name__}: {str(error)[:300]}"
    line |= rates(work, call_milliseconds(work.calls), ceilings)
    if compares:
        peer_ms = call_milliseconds([work.peer])
        line |= {"peer": case.peer, "peer_ms": round(peer_ms, 4), "times_peer": round(peer_ms / line["ms"], 2)}
    lines = [line]
    for text in blocks if work.blocks else ():
        chosen = work.blocks(*map(int, text.split("x")))
        calls = [partial(call, blocks=chosen) for call in work.calls]
        has_same_bits = all(map(torch.equal, results(calls[0]()), ours))
        lines.append({"blocks": text, "has_same_bits": has_same_bits, **rates(work, call_milliseconds(calls), ceilings)})
    return lines


def table(lines: list[dict]) -> list[str]:
    """The lines that were timed, most time lost first, as text; those that failed last."""
    rows = [f"{'case':48} {'ms':>9} {'TFLOP/s':>8} {'GB/s':>7} {'least ms':>9} {'fraction':>8} {'lost ms':>8} {'bound':8} "
            f"{'times peer':>10}"]
    for line in sorted((line for line in lines if "lost_ms" in line), key=lambda line: -line["lost_ms"]):
        tflops = f"{line['TFLOP/s']:.0f}" if line["TFLOP/s"] else ""
        peer = "failed" if "peer_error" in line else line.get("peer", "")
        notes = f"{line.get('times_peer', ''):>10} {peer} {line.get('blocks', '')}".rstrip()
        wrong = "" if line.get("is_right", True) else f"  WRONG by {line['relative_error']:.2g}"
        rows.append(f"{line['what']:48} {line['ms']:9.4f} {tflops:>8} {line['GB/s']:7.0f} {line['roofline_ms']:9.4f} "
                    f"{line['fraction']:8.3f} {line['lost_ms']:8.4f} {line['bound']:8} {notes}{wrong}")
    return rows + [f"{line['what']:48} failed: {line['error'][:80]}" for line in lines if "error" in line]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["20b", "120b", "tiny"], default="20b")
    parser.add_argument("--only", help="cases whose names begin so, with commas between")
    parser.add_argument("--list", action="store_true", help="print the table of cases and time none")
    parser.add_argument("--tokens", type=int, help="of training (default: 8192)")
    parser.add_argument("--rows", type=int, nargs="+", help="of decode steps (default: 1 8 32 128 512)")
    parser.add_argument("--blocks", nargs="+", default=[], metavar="SIZES", help="block sizes to try beside the default")
    parser.add_argument("--no-peers", action="store_true", help="neither times nor compares with PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all lines there, too")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.list:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    import expert_cases
    import kernel_cases

    sizes = kernel_cases.sizes_of(options.size, device, tokens=options.tokens, rows=options.rows)
    cases = kernel_cases.cases_of(sizes) + expert_cases.cases_of(sizes)
    if options.only:
        names = tuple(name.strip() for name in options.only.split(","))
        cases = [case for case in cases if case.name.startswith(names)]
        if not cases:
            parser.error(f"--only {options.only}: no case begins so; --list shows them all")
    if options.list:
        print("\n".join(f"{case.name:48} {case.computes:58} {case.peer}".rstrip() for case in cases))
        return 0
    if device == "cpu" and options.size != "tiny":
        parser.error("needs a CUDA GPU; --size tiny tries the script without one")
    report = Report()
    ceilings = measure_ceilings(report)
    for case in cases:
        measured = partial(measure, case, sizes, ceilings, with_peers=not options.no_peers, blocks=options.blocks)
        for line in report.guarded(case.name, measured) or []:
            report(case.name, size=options.size, tokens=sizes.tokens, **line)
        free_memory()
    print("\n" + "\n".join(table(report.lines)))
    report.write(options.json)
    return int(any("error" in line or not line.get("is_right", True) for line in report.lines))


if __name__ == "__main__":
    sys.exit(main())
