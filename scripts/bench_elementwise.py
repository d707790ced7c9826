"""Bandwidth of the memory-bound kernels: RMSNorm, RoPE, SwiGLU, router, sort, gather, combine, MXFP4 dequantisation.

    python scripts/bench_elementwise.py [--tokens 2048 8192 32768] [--only swiglu ...]

Shapes are those of gpt-oss-20b. Prints one JSON line per case: first the error of each operation against float64 beside that of
the same formula in eager bf16 (root mean square of the error over that of the exact result), then times. `fraction` is of the
bandwidth of a large copy measured in the same run; bytes are those that must move, so a cache can lift it above 1. Lines with
`config` try other block sizes; the default has the config of the kernels' files. A table comes last.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton
from timing import Report, measure_ceilings, milliseconds, relative_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels.experts.sorting as routing_kernels  # noqa: E402
import kernels.norm as norm  # noqa: E402
import kernels.packed.mxfp4 as mxfp4  # noqa: E402
import kernels.rope as rotary  # noqa: E402
import kernels.router as router  # noqa: E402
import kernels.swiglu as activation  # noqa: E402

WIDTH, EXPERTS, PER_TOKEN, HEADS, KV_HEADS, HEAD_DIM = 2880, 32, 4, 64, 8, 64
EPS, ALPHA, LIMIT = 1e-5, 1.702, 7.0
REPORT = Report()
# (what, config, bytes moved, function); config is empty for the default
Case = tuple[str, dict, int, Callable[[], object]]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def results_of(function: Callable, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Outputs and gradients of floating-point tensors, given in `dtype` or as they are; output gradients are the first input's
    values, tiled."""
    leaves = [tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    source = tensors[0].flatten()
    grads = [
        source.repeat(-(-output.numel() // len(source)))[: output.numel()].view(output.shape).to(output.dtype)
        for output in outputs
    ]
    torch.autograd.backward(outputs, grads)
    return [output.detach() for output in outputs] + [leaf.grad for leaf in leaves]


def report_errors(what: str, ours: Callable, plain: Callable, tensors: tuple[torch.Tensor, ...]) -> None:
    actual, eager, exact = (
        results_of(function, tensors, dtype)
        for function, dtype in ((ours, None), (plain, torch.bfloat16), (plain, torch.float64))
    )
    again = results_of(ours, tensors, None)
    errors, eager_errors = (
        [relative_error(one, best) for one, best in zip(results, exact)]
        for results in (actual, eager)
    )
    worst = max(((one.double() - best).abs().max() / best.abs().max()).item() for one, best in zip(actual, exact))
    REPORT(
        f"{what}: errors",
        shape=list(tensors[0].shape),
        rms_errors=errors,
        eager_rms_errors=eager_errors,
        max_error=worst,
        within_twice_eager=all(a <= 2 * b + 1e-9 for a, b in zip(errors, eager_errors)),
        same_bits_twice=all(map(torch.equal, actual, again)),
    )


def plain_norm(x, residual, weight):
    total = x + residual
    return total / torch.sqrt(total.square().mean(-1, keepdim=True) + EPS) * weight, total


def plain_swiglu(h):
    gate, up = h[..., 0::2].clamp(max=LIMIT), h[..., 1::2].clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(ALPHA * gate) * (up + 1)


def check_errors(num_tokens: int) -> None:
    x, residual, weight = normal(num_tokens, WIDTH), normal(num_tokens, WIDTH, seed=1), normal(WIDTH, seed=2)
    report_errors("add_rms_norm", partial(norm.add_rms_norm, eps=EPS), plain_norm, (x, residual, weight))
    cos, sin = tables(num_tokens)
    q, k = normal(num_tokens, HEADS, HEAD_DIM), normal(num_tokens, KV_HEADS, HEAD_DIM, seed=1)

    def rotate(x):
        (x1, x2), c, s = x.chunk(2, dim=-1), cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
        return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)

    report_errors("rope_qk", lambda q, k: rotary.rope_qk(q, k, cos, sin), lambda q, k: (rotate(q), rotate(k)), (q, k))
    report_errors(
        "swiglu",
        partial(activation.swiglu, alpha=ALPHA, limit=LIMIT),
        plain_swiglu,
        (3 * normal(num_tokens, 2 * WIDTH),),
    )
    weight, bias = normal(EXPERTS, WIDTH, seed=3) / WIDTH**0.5, normal(EXPERTS, seed=4)
    report_errors("router_logits", router.router_logits, lambda x, w, b: x @ w.T + b, (x, weight, bias))
    gates, routing = routing_kernels.route(
        normal(num_tokens, EXPERTS, dtype=torch.float32), experts_per_token=PER_TOKEN
    )
    rows = normal(num_tokens * PER_TOKEN, WIDTH, seed=5)
    inverse = routing.inverse.long()
    report_errors(
        "combine",
        lambda y, w, r: routing_kernels.combine(y, w, routing, residual=r),
        lambda y, w, r: (y[inverse] * w[..., None]).sum(1) + r,
        (rows, gates, residual),
    )
    report_errors("dispatch", lambda x: routing_kernels.dispatch(x, routing), lambda x: x[routing.tokens.long()], (x,))
    for size, experts in ((num_tokens, EXPERTS), (num_tokens, 128), (16 * num_tokens, EXPERTS), (100, EXPERTS)):
        logits = normal(size, experts).float()  # rounded to bf16: many ties
        indices = logits.argsort(dim=-1, descending=True, stable=True)[:, :PER_TOKEN]
        _, routing = routing_kernels.route(logits, experts_per_token=PER_TOKEN)
        order = indices.flatten().argsort(stable=True)
        offsets = [0, *torch.bincount(indices.flatten(), minlength=experts).cumsum(0).tolist()]
        REPORT(
            "route: choices, order and offsets as torch's",
            shape=[size, experts],
            same_choices=torch.equal(routing.indices, indices),
            same_order=torch.equal(routing.order.long(), order) and routing.offsets == offsets,
        )
    blocks, scales = packed(2)
    exact = mxfp4.dequantize_reference(blocks, scales, torch.bfloat16)
    same = torch.equal(mxfp4.dequantize(blocks, scales, torch.bfloat16), exact)
    REPORT("dequantize: errors", same_bits_as_reference=same)


def tables(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(num_tokens, device="cuda").unsqueeze(1) * 150000.0 ** (-torch.arange(32, device="cuda") / 32)
    return angles.cos(), angles.sin()


def packed(num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks and scales of gate_up."""
    shape = (num_experts, 2 * WIDTH, WIDTH // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device="cuda")
    return blocks, torch.randint(110, 130, shape, dtype=torch.uint8, device="cuda")


def norm_cases(num_tokens: int) -> Iterator[Case]:
    x, residual, grad, weight = (*(normal(num_tokens, WIDTH, seed=seed) for seed in range(3)), normal(WIDTH))
    row = 2 * WIDTH * num_tokens
    y, total, inv_rms = norm.norm_forward(x, residual, weight, EPS, x.dtype)
    yield "add_rms_norm", {}, 4 * row, lambda: norm.norm_forward(x, residual, weight, EPS, x.dtype)
    yield "rms_norm", {}, 2 * row, lambda: norm.norm_forward(x, None, weight, EPS, x.dtype)
    yield (
        "add_rms_norm backward",
        {},
        4 * row,
        lambda: norm.norm_backward(grad, residual, total, weight, inv_rms, False),
    )
    yield (
        "add_rms_norm backward, dweight",
        {},
        4 * row,
        lambda: norm.norm_backward(grad, residual, total, weight, inv_rms, True),
    )
    yield "rms_norm backward", {}, 3 * row, lambda: norm.norm_backward(grad, None, total, weight, inv_rms, False)
    grad_x = torch.empty_like(x)
    for warps in (4, 8, 16):
        yield (
            "add_rms_norm",
            {"warps": warps},
            4 * row,
            lambda warps=warps: norm._norm_kernel[(num_tokens,)](
                x,
                residual,
                weight,
                y,
                total,
                inv_rms,
                EPS,
                WIDTH,
                WIDTH,
                WIDTH=WIDTH,
                BLOCK=4096,
                HAS_RESIDUAL=True,
                num_warps=warps,
            ),
        )
        for rows in (1, 4):
            yield (
                "add_rms_norm backward",
                {"warps": warps, "rows": rows},
                4 * row,
                lambda warps=warps, rows=rows: norm._norm_grad_kernel[(triton.cdiv(num_tokens, rows),)](
                    grad,
                    residual,
                    total,
                    weight,
                    inv_rms,
                    grad_x,
                    None,
                    num_tokens,
                    rows,
                    WIDTH,
                    WIDTH,
                    WIDTH,
                    WIDTH=WIDTH,
                    BLOCK=4096,
                    HAS_TOTAL=True,
                    NEEDS_WEIGHT=False,
                    num_warps=warps,
                ),
            )


def rope_cases(num_tokens: int) -> Iterator[Case]:
    q, k, (cos, sin) = normal(num_tokens, HEADS, HEAD_DIM), normal(num_tokens, KV_HEADS, HEAD_DIM), tables(num_tokens)
    size = 2 * 2 * (q.numel() + k.numel()) + 8 * cos.numel()
    yield "rope_qk", {}, size, lambda: rotary.rotate(q, k, cos, sin, backward=False)
    yield "rope_qk backward", {}, size, lambda: rotary.rotate(q, k, cos, sin, backward=True)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    for warps in (2, 4, 8):
        yield (
            "rope_qk",
            {"warps": warps},
            size,
            lambda warps=warps: rotary._rope_kernel[(num_tokens,)](
                q,
                k,
                q_out,
                k_out,
                cos,
                sin,
                *q.stride()[:2],
                *k.stride()[:2],
                q.stride(0),
                k.stride(0),
                NUM_Q=HEADS,
                NUM_K=KV_HEADS,
                HALF=32,
                BLOCK_Q=64,
                BLOCK_K=8,
                BLOCK_HALF=32,
                BACKWARD=False,
                num_warps=warps,
            ),
        )


def swiglu_cases(num_tokens: int) -> Iterator[Case]:
    num_rows = num_tokens * PER_TOKEN
    h, grad = 3 * normal(num_rows, 2 * WIDTH), normal(num_rows, WIDTH, seed=1)
    y, grad_h, pairs = torch.empty_like(grad), torch.empty_like(h), num_rows * WIDTH
    backward = partial(activation.swiglu_backward, grad, h, alpha=ALPHA, limit=LIMIT)
    yield "swiglu", {}, 6 * pairs, lambda: activation._activate(h, ALPHA, LIMIT)
    yield "swiglu backward", {}, 10 * pairs, lambda: backward(with_activation=False)
    yield "swiglu backward and activation", {}, 12 * pairs, lambda: backward(with_activation=True)
    for block, warps in ((512, 4), (1024, 4), (2048, 4), (2048, 8), (4096, 8)):
        grid, config = (triton.cdiv(pairs, block),), {"block": block, "warps": warps}
        yield (
            "swiglu",
            config,
            6 * pairs,
            lambda grid=grid, block=block, warps=warps: activation._swiglu_kernel[grid](
                activation._packed(h), y, ALPHA, LIMIT, pairs, BLOCK=block, num_warps=warps
            ),
        )
        yield (
            "swiglu backward",
            config,
            10 * pairs,
            lambda grid=grid, block=block, warps=warps: activation._swiglu_grad_kernel[grid](
                grad,
                activation._packed(h),
                activation._packed(grad_h),
                None,
                ALPHA,
                LIMIT,
                pairs,
                BLOCK=block,
                WITH_ACTIVATION=False,
                num_warps=warps,
            ),
        )


def router_cases(num_tokens: int) -> Iterator[Case]:
    x, weight, bias = normal(num_tokens, WIDTH), normal(EXPERTS, WIDTH, seed=1) / WIDTH**0.5, normal(EXPERTS)
    logits = router.router_logits(x, weight, bias)
    grad = torch.randn_like(logits)
    size = 2 * x.numel() + 4 * logits.numel()
    grad_x = torch.empty_like(x)
    yield "router_logits", {}, size, lambda: router.router_logits(x, weight, bias)
    yield "router_logits", {"library": "fp32"}, size, lambda: router.router_logits_reference(x, weight, bias)
    context = type("Context", (), {"saved_tensors": (x, weight), "needs_input_grad": (True, False, False)})()
    yield "router_logits backward", {}, size, lambda: router._RouterLogits.backward(context, grad)
    for block_t, block_k, warps, stages in (
        (64, 64, 4, 4),
        (64, 64, 4, 6),
        (64, 128, 4, 4),
        (128, 64, 4, 4),
        (32, 128, 4, 4),
    ):
        config = {"tokens": block_t, "k": block_k, "warps": warps, "stages": stages}
        yield (
            "router_logits",
            config,
            size,
            lambda c=config: router._router_logits_kernel[(triton.cdiv(num_tokens, c["tokens"]), 1)](
                x,
                weight,
                bias,
                logits,
                num_tokens,
                WIDTH,
                WIDTH,
                NUM_EXPERTS=EXPERTS,
                WIDTH=WIDTH,
                BLOCK_T=c["tokens"],
                BLOCK_E=32,
                BLOCK_K=c["k"],
                PRECISION="ieee",
                num_warps=c["warps"],
                num_stages=c["stages"],
            ),
        )
    for block_t, block_n, warps, stages in (
        (64, 64, 4, 1),
        (64, 128, 4, 1),
        (64, 128, 8, 1),
        (128, 64, 4, 1),
        (128, 64, 8, 1),
    ):
        config = {"tokens": block_t, "n": block_n, "warps": warps, "stages": stages}
        yield (
            "router_logits backward",
            config,
            size,
            lambda c=config: router._router_grad_kernel[
                (triton.cdiv(num_tokens, c["tokens"]), triton.cdiv(WIDTH, c["n"]))
            ](
                grad,
                weight,
                grad_x,
                num_tokens,
                WIDTH,
                NUM_EXPERTS=EXPERTS,
                WIDTH=WIDTH,
                BLOCK_T=c["tokens"],
                BLOCK_E=32,
                BLOCK_N=c["n"],
                ADDS=False,
                PRECISION="tf32x3",
                num_warps=c["warps"],
                num_stages=c["stages"],
            ),
        )


def choice_cases(num_tokens: int) -> Iterator[Case]:
    logits = normal(num_tokens, EXPERTS, dtype=torch.float32)
    gates, routing = routing_kernels.route(logits, experts_per_token=PER_TOKEN)
    indices, grad, route = routing.indices, torch.rand_like(gates), routing_kernels._Route
    context = type("Context", (), {"saved_tensors": (gates, indices), "num_experts": EXPERTS})()
    yield "top-k and softmax", {}, 4 * logits.numel(), lambda: route.apply(logits, None, PER_TOKEN)
    yield "top-k and softmax backward", {}, 4 * logits.numel(), lambda: route.backward(context, grad, None)
    yield (
        "sort by expert",
        {},
        20 * indices.numel(),
        lambda: routing_kernels.make_routing(indices, num_experts=EXPERTS),
    )


def row_cases(num_tokens: int) -> Iterator[Case]:
    logits = normal(num_tokens, EXPERTS, dtype=torch.float32)
    gates, routing = routing_kernels.route(logits, experts_per_token=PER_TOKEN)
    row = 2 * WIDTH * num_tokens
    x, rows = normal(num_tokens, WIDTH), normal(num_tokens * PER_TOKEN, WIDTH, seed=1)
    yield "dispatch", {}, (1 + PER_TOKEN) * row, lambda: routing_kernels.dispatch(x, routing)
    yield (
        "dispatch backward",
        {},
        (1 + PER_TOKEN) * row,
        lambda: routing_kernels.sum_rows(rows, None, routing.inverse, None),
    )
    yield (
        "combine and residual",
        {},
        (2 + PER_TOKEN) * row,
        lambda: routing_kernels.combine(rows, gates, routing, residual=x),
    )
    both = (1 + 2 * PER_TOKEN) * row
    yield (
        "combine backward",
        {},
        both,
        lambda: routing_kernels.combine_backward(x, rows, gates, routing.inverse, needs_weights=True),
    )
    y, grad_rows, grad_gates = torch.empty_like(x), torch.empty_like(rows), torch.empty_like(gates)
    for block, warps in ((512, 2), (1024, 4), (2048, 8), (4096, 8), (1024, 8)):
        grid, config = (num_tokens, triton.cdiv(WIDTH, block)), {"block": block, "warps": warps}
        yield (
            "dispatch",
            config,
            (1 + PER_TOKEN) * row,
            lambda g=grid, b=block, w=warps: routing_kernels._dispatch_kernel[g](
                x, routing.inverse, grad_rows, WIDTH, WIDTH=WIDTH, PER_TOKEN=PER_TOKEN, BLOCK=b, num_warps=w
            ),
        )
        yield (
            "combine and residual",
            config,
            (2 + PER_TOKEN) * row,
            lambda g=grid, b=block, w=warps: routing_kernels._sum_rows_kernel[g](
                rows,
                gates,
                routing.inverse,
                x,
                y,
                WIDTH,
                WIDTH,
                WIDTH=WIDTH,
                PER_TOKEN=PER_TOKEN,
                BLOCK=b,
                HAS_WEIGHTS=True,
                HAS_RESIDUAL=True,
                num_warps=w,
            ),
        )
        yield (
            "combine backward",
            config,
            both,
            lambda b=block, w=warps: routing_kernels._combine_grad_kernel[(num_tokens,)](
                x,
                rows,
                gates,
                routing.inverse,
                grad_rows,
                grad_gates,
                WIDTH,
                WIDTH,
                WIDTH=WIDTH,
                PER_TOKEN=PER_TOKEN,
                BLOCK=b,
                BLOCK_A=PER_TOKEN,
                NEEDS_WEIGHTS=True,
                num_warps=w,
            ),
        )


def dequantize_cases(num_tokens: int) -> Iterator[Case]:
    """One layer's gate_up; the number of tokens does not matter."""
    blocks, scales = packed(EXPERTS)
    out = torch.empty(EXPERTS, 2 * WIDTH, WIDTH, dtype=torch.bfloat16, device="cuda")
    size = blocks.numel() + scales.numel() + 2 * out.numel()
    yield "dequantize gate_up", {}, size, lambda: mxfp4.dequantize_experts(blocks, scales, out)
    words = blocks.view(torch.int32)
    for block, warps in ((128, 4), (256, 4), (512, 4), (512, 8), (1024, 4), (1024, 8), (2048, 8)):
        yield (
            "dequantize gate_up",
            {"words": block, "warps": warps},
            size,
            lambda b=block, w=warps: mxfp4._dequantize_kernel[(triton.cdiv(words.numel(), b),)](
                words, scales, out, words.numel(), BLOCK_WORDS=b, num_warps=w
            ),
        )


CASES = {
    "norm": norm_cases,
    "rope": rope_cases,
    "swiglu": swiglu_cases,
    "router": router_cases,
    "choice": choice_cases,
    "rows": row_cases,
    "dequantize": dequantize_cases,
}


def time_cases(name: str, num_tokens: int, ceiling: float, *, tries_configs: bool) -> None:
    for what, config, num_bytes, function in CASES[name](num_tokens):
        if tries_configs or not config:
            REPORT.guarded(f"{what} {config}", time_case, what, config, num_bytes, function, num_tokens, ceiling)


def time_case(what: str, config: dict, num_bytes: int, function: Callable, num_tokens: int, ceiling: float) -> None:
    with torch.no_grad():
        ms = milliseconds(function, warmup=5, rep=30)
    rate = num_bytes / ms / 1e6
    REPORT(what, tokens=num_tokens, config=config, ms=round(ms, 4), gb_per_s=round(rate, 1), fraction=round(rate / ceiling, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[2048, 8192, 32768],
        help="the largest is also tried in other configurations",
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    _, ceiling = measure_ceilings(REPORT)
    REPORT.guarded("errors", check_errors, 2048)  # the timings are worth having all the same
    for name in arguments.only:
        for num_tokens in sorted(arguments.tokens, reverse=True)[: 1 if name == "dequantize" else None]:
            REPORT.guarded(name, time_cases, name, num_tokens, ceiling, tries_configs=num_tokens == max(arguments.tokens))
            torch.cuda.empty_cache()
    print(f"\n{'operation':<34}{'tokens':>8}{'ms':>9}{'GB/s':>9}{'of copy':>9}  config")
    for line in (line for line in REPORT.lines if "ms" in line):
        config = " ".join(f"{key}={value}" for key, value in line["config"].items()) or "default"
        print(
            f"{line['what']:<34}{line['tokens']:>8}{line['ms']:>9.4f}{line['gb_per_s']:>9.0f}{line['fraction']:>9.2f}  {config}"
        )


if __name__ == "__main__":
    main()
