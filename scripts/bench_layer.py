"""Times training of one gpt-oss-20b layer on one GPU, with LoRA and in full, and checks all gradients at a small size.

    python scripts/bench_layer.py [--tokens 2048 8192] [--only timings] [--json FILE]

Timed: forward and backward of a model of one layer (full or windowed attention) and a vocabulary of 512, so that embedding and
head are below 1% of the work. lora: packed experts, adapters of rank 16 on attention and experts; full: dense bf16 experts, every
weight trainable. tflops counts the products with weights (forward, for inputs and, in full, for weights) and attention (two
products forward, five backward); fraction is of an 8192^3 bf16 product in the same run. peak_gb is the most memory allocated, in
1e9 bytes.

Errors: a model of two layers (windowed, full), 4 experts of which one has no token, on the GPU in bf16 and in float32, against
the same bf16 weights in float64 on the CPU; one JSON line per kind of parameter with ||g - exact|| / ||exact||, and the error of
the same model's PyTorch path in bf16 on the CPU for scale. What the references keep in fp32 (norms, rotation, softmax, SwiGLU,
head) stays in fp32 there, so that errors below 1e-6 mean nothing. Experts are assigned beforehand, by a bonus on their logits:
rounding must not choose others.
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch
from bench_train import flops_per_token, random_batch, train_step
from random_checkpoint import model_config
from random_policy import attach_random_lora
from timing import Report, measure_ceilings, median_ms, relative_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.config import GptOssConfig  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402
from models.lora import set_full_training  # noqa: E402

REPORT = Report()
KINDS = {"full": "full_attention", "windowed": "sliding_attention"}
ROUTE_BONUS = 16.0  # on the logits of assigned experts: more than logits can differ by


def layer_config(kind: str) -> GptOssConfig:
    """One layer of gpt-oss-20b."""
    return replace(model_config("20b", num_layers=1), layer_types=[KINDS[kind]], vocab_size=512)


def small_config() -> GptOssConfig:
    """Widths that no block size divides, model and expert width different so that a missing transpose shows."""
    return replace(model_config("tiny", num_layers=2), hidden_size=160, intermediate_size=224, num_attention_heads=8,
                   head_dim=64, num_local_experts=4, num_experts_per_tok=2, vocab_size=384, sliding_window=32)


def random_model(config: GptOssConfig, *, trains: str, dtype: torch.dtype, device: str, seed: int = 0) -> GptOss:
    """Fully trainable or with an adapter, matrices with rms 1 / sqrt(inputs), drawn on its device: weights depend on device and
    dtype."""
    model = GptOss(config, dtype=dtype, device=device, experts="bf16" if trains == "full" else "mxfp4")
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.1, generator=generator)
            elif name.endswith(("bias", "sinks")):
                parameter.normal_(0.0, 0.1, generator=generator)
            else:  # [out, in], experts [E, in, out], embeddings [V, D]
                inputs = 1 if name == "model.embed_tokens.weight" else parameter.shape[1]
                parameter.normal_(0.0, inputs**-0.5, generator=generator)
        for name, buffer in model.named_buffers():
            if buffer.dtype == torch.uint8:  # codes, and scales around the one that gives them that rms
                buffer.random_(*((119, 123) if name.endswith("scales") else (0, 256)), generator=generator)
    if trains == "full":
        set_full_training(model)
        return model
    for block in model.model.layers:
        block.mlp.experts.arrange()
    attach_random_lora(model, "all", 16)
    return model


# ------------------------------------------------------------------------------------------------------------------- errors


def assign_experts(model: GptOss, num_tokens: int) -> None:
    """Fixes each token's experts, at random, none of them the last one; the router's gradient stays what it is."""
    experts, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
    generator = torch.Generator().manual_seed(num_tokens)
    for block in model.model.layers:
        choices = torch.rand(num_tokens, experts - 1, generator=generator).topk(chosen).indices
        bonus = torch.zeros(num_tokens, experts).scatter_(1, choices, ROUTE_BONUS).to(model.device)
        block.mlp.router.register_forward_hook(lambda _, __, logits, bonus=bonus: logits + bonus.to(logits.dtype))


def gradients(config: GptOssConfig, source: dict[str, torch.Tensor], lengths: list[int], *, dtype: torch.dtype,
              device: str) -> dict[str, torch.Tensor]:
    """Gradients of all weights, float64 on the CPU, of sum_t c_t log p_t with c_t normal."""
    model = GptOss(config, dtype=dtype, device=device, experts="bf16")
    model.load_state_dict(source)
    set_full_training(model)
    num_tokens = sum(lengths)
    assign_experts(model, num_tokens)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (num_tokens,), generator=generator)
    factors = torch.randn(num_tokens, generator=generator)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    mask = torch.ones(num_tokens, dtype=torch.bool)
    mask[bounds[:-1].long()] = False
    tokens, factors, bounds, mask = (tensor.to(device) for tensor in (tokens, factors, bounds, mask))
    log_probs, _ = model.log_probs(tokens, bounds, temperature=1.0, mask=mask)
    (log_probs * factors).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: parameter.grad.double().cpu() for name, parameter in model.named_parameters()}


def by_kind(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of all layers together, flat, under their name with the layer left open."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        kinds.setdefault(kind, []).append(tensor.flatten())
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}


def check_gradients(lengths: list[int], device: str) -> None:
    config = small_config()
    source = random_model(config, trains="full", dtype=torch.bfloat16, device="cpu").state_dict()
    exact = by_kind(gradients(config, source, lengths, dtype=torch.float64, device="cpu"))
    eager = by_kind(gradients(config, source, lengths, dtype=torch.bfloat16, device="cpu"))
    for dtype in (torch.bfloat16, torch.float32):
        ours = REPORT.guarded(f"gradients in {dtype}", gradients, config, source, lengths, dtype=dtype, device=device)
        for kind, value in exact.items() if ours is not None else ():
            found = relative_error(by_kind(ours)[kind], value)
            reference = relative_error(eager[kind], value)
            REPORT("gradient", parameter=kind, dtype=str(dtype).removeprefix("torch."), relative_error=found,
                   reference_bf16_error=reference, ok=found <= (2 * reference if dtype == torch.bfloat16 else 1e-4))


# ------------------------------------------------------------------------------------------------------------------ timings


def time_layer(trains: str, kind: str, num_tokens: int, peak_tflops: float) -> None:
    config = layer_config(kind)
    model = random_model(config, trains=trains, dtype=torch.bfloat16, device="cuda")
    batch = random_batch(model, 1, num_tokens)

    def forward() -> torch.Tensor:
        return model.log_probs(batch["tokens"], batch["cu_seqlens"], temperature=1.0, mask=batch["mask"])[0]

    torch.cuda.reset_peak_memory_stats()
    ms = median_ms(lambda: train_step(model, batch), warmup=3, iterations=10)
    peak = torch.cuda.max_memory_allocated() / 1e9
    model.zero_grad()
    forward_ms = median_ms(forward, warmup=2, iterations=10)
    rate = flops_per_token(config, num_tokens, trains_base=trains == "full") * num_tokens / ms / 1e9
    REPORT("layer", trains=trains, attention=kind, tokens=num_tokens, ms=round(ms, 3), forward_ms=round(forward_ms, 3),
           backward_ms=round(ms - forward_ms, 3), tflops=round(rate, 1), fraction=round(rate / peak_tflops, 3),
           peak_gb=round(peak, 2))


def print_table() -> None:
    print(f"\n{'trains':6} {'attention':10} {'tokens':>6} {'ms':>8} {'forward':>8} {'backward':>8} {'TFLOP/s':>8} "
          f"{'fraction':>8} {'GB':>7}")
    for line in REPORT.lines:
        if line["what"] == "layer" and "ms" in line:
            print(f"{line['trains']:6} {line['attention']:10} {line['tokens']:6} {line['ms']:8.3f} {line['forward_ms']:8.3f} "
                  f"{line['backward_ms']:8.3f} {line['tflops']:8.0f} {line['fraction']:8.3f} {line['peak_gb']:7.2f}")
    found = {(line["parameter"], line["dtype"]): line for line in REPORT.lines if line["what"] == "gradient"}
    if found:
        print(f"\n{'gradient of':52} {'bf16':>9} {'CPU bf16':>9} {'float32':>9}")
    for parameter in dict.fromkeys(name for name, _ in found):
        lines = [found.get((parameter, dtype)) for dtype in ("bfloat16", "float32")]
        cells = [f"{line['relative_error']:9.2e}" if line else f"{'failed':>9}" for line in lines]
        scale = next(line["reference_bf16_error"] for line in lines if line)
        wrong = "" if all(line and line["ok"] for line in lines) else "  <- not ok"
        print(f"{parameter:52} {cells[0]} {scale:9.2e} {cells[1]}{wrong}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="lengths timed (default: 2048 8192)")
    parser.add_argument("--only", choices=["timings", "errors"], help="one part instead of both")
    parser.add_argument("--trains", choices=["lora", "full"], help="time one instead of both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all lines there, too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_layer: needs a CUDA GPU")
    if arguments.only != "errors":
        peak_tflops = measure_ceilings(REPORT).tflops
        modes = [arguments.trains] if arguments.trains else ["lora", "full"]
        for mode, kind, num_tokens in itertools.product(modes, KINDS, arguments.tokens):
            REPORT.guarded("layer", time_layer, mode, kind, num_tokens, peak_tflops)
            torch.cuda.empty_cache()
    if arguments.only != "timings":
        REPORT.guarded("gradients", check_gradients, [77, 130, 64], "cuda")
    print_table()
    REPORT.write(arguments.json)


if __name__ == "__main__":
    main()
