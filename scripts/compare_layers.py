"""Compares the first layers of a checkpoint, forward and backward, with transformers' GptOss in float32 on the same weights.

    python scripts/random_checkpoint.py OUT --size 20b --layers 2            (3.3 GB; a whole checkpoint serves as well)
    python scripts/compare_layers.py --checkpoint OUT [--layers 2] [--tokens 512 389 771] [--device cuda]

Runs: `bf16` is our model in bf16 with the checkpoint's own experts (packed MXFP4 stay packed), `float32` our model in float32
with dense dequantised experts, `transformers bf16` the other implementation in bf16: what an error of bf16 looks like. Ours take
all sequences as one packed batch, transformers takes them one at a time (eager attention, eager experts).

One JSON line per run and quantity: relative_error is ||a - b|| / ||b|| against transformers in float32, over all tokens;
relative_error_same_routes over the tokens whose experts are the reference's in every layer (rounding flips near-ties, and a
flipped token is another function); max_abs in the quantity's unit. Quantities: the hidden state after each layer and after the
final norm, logits, log-probs of the tokens (nats), and the gradient at the embeddings of sum_t c_t log p_t, c_t normal. A table
comes last. Needs transformers.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from compare_logits import chosen_experts, packed, packed_log_probs
from random_checkpoint import SPECIAL_TOKENS
from timing import Report, free_memory, relative_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.config import GptOssConfig, read_config  # noqa: E402
from models.formats.files import CheckpointError, TensorToWrite, list_tensors, write_json, write_shards  # noqa: E402
from models.formats.hugging_face import load_model  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402

REPORT = Report()
REFERENCE = "transformers float32"
Quantities = dict[str, torch.Tensor]  # each with the packed tokens first


def first_layers(checkpoint: Path, num_layers: int, folder: Path) -> Path:
    """A checkpoint with the first layers only, written into `folder`; the checkpoint itself where it has no more."""
    config = read_config(checkpoint)
    if config.num_hidden_layers < num_layers:
        raise ValueError(f"--layers {num_layers}: {checkpoint} has {config.num_hidden_layers}")
    if config.num_hidden_layers == num_layers:
        return checkpoint

    plan = []
    for name, stored in list_tensors(checkpoint, allow_unindexed=False).items():
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < num_layers:
            plan.append(TensorToWrite(name, stored.read().nbytes, stored.read))
    write_shards(folder, plan, max_shard_bytes=1e11)
    config = replace(config, num_hidden_layers=num_layers, layer_types=config.layer_types[:num_layers])
    write_json(folder / "config.json", config.to_hf(quantization=config.quantization))
    return folder


def random_tokens(lengths: list[int], config: GptOssConfig, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed tokens [T], no control tokens, and the factors [T] of their log-probs, 0 on each sequence's first."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(0, min(config.vocab_size, min(SPECIAL_TOKENS)), (sum(lengths),), generator=generator)
    factors = torch.randn(sum(lengths), generator=generator)
    for part in factors.split(lengths):
        part[0] = 0.0
    return tokens.to(device), factors.to(device)


@contextmanager
def captured(model: torch.nn.Module) -> Iterator[SimpleNamespace]:
    """Inside, hidden states [T, D] by name and router logits [T, E] by layer are recorded, and the embeddings become a leaf that
    gets a gradient. Both implementations name their parts alike, so that one set of hooks serves both."""
    found, layers = SimpleNamespace(states={}, routers={}, embeddings=None), model.model.layers

    def make_leaf(_, arguments: tuple) -> tuple:
        found.embeddings = arguments[0].detach().requires_grad_()
        return (found.embeddings, *arguments[1:])

    def keep(place: dict, name: str | int, _, __, output) -> None:
        output = output[0] if isinstance(output, tuple) else output
        place[name] = output.detach().flatten(0, -2).float()

    handles = [layers[0].register_forward_pre_hook(make_leaf),
               model.model.norm.register_forward_hook(partial(keep, found.states, "final norm"))]
    for index, layer in enumerate(layers):
        handles += [layer.register_forward_hook(partial(keep, found.states, f"layer {index}")),
                    layer.mlp.router.register_forward_hook(partial(keep, found.routers, index))]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def run_ours(model: GptOss, tokens: torch.Tensor, factors: torch.Tensor, lengths: list[int]) -> tuple[Quantities, torch.Tensor]:
    """Every quantity of one packed batch, and the experts chosen [layers, T, A]."""
    rows = tokens.split(lengths)
    with captured(model) as capture:
        log_probs, _ = packed_log_probs(model, rows, 1.0)
        (log_probs * factors).sum().backward()
    with torch.no_grad():
        logits = model.logits(*packed(rows, model.device))
    return quantities(capture, logits, log_probs), routes_of(capture, model)


def run_transformers(model: torch.nn.Module, tokens: torch.Tensor, factors: torch.Tensor,
                     lengths: list[int]) -> tuple[Quantities, torch.Tensor]:
    """The same, one sequence after the other."""
    parts: list[Quantities] = []
    routes: list[torch.Tensor] = []
    for ids, weights in zip(tokens.split(lengths), factors.split(lengths)):
        with captured(model) as capture:
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()  # [L, V]
            log_probs = F.pad(torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[1:, None])[:, 0], (1, 0))
            (log_probs * weights).sum().backward()
        parts.append(quantities(capture, logits, log_probs))
        routes.append(routes_of(capture, model))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, torch.cat(routes, dim=1)


def quantities(capture: SimpleNamespace, logits: torch.Tensor, log_probs: torch.Tensor) -> Quantities:
    return capture.states | {"logits": logits.detach(), "log-probs": log_probs.detach(),
                             "gradient at embeddings": capture.embeddings.grad.flatten(0, -2).float()}


def routes_of(capture: SimpleNamespace, model: torch.nn.Module) -> torch.Tensor:
    return torch.stack([chosen_experts(logits, model.config.num_experts_per_tok) for logits in capture.routers.values()])


def build_transformers(folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype, device: str) -> torch.nn.Module:
    """transformers' model on our dequantised weights, which it shares where the dtype is theirs."""
    import transformers

    # it would import a distribution named `kernels` of the right version; that name is this project's
    transformers.utils.import_utils.is_kernels_available = lambda *_, **__: False
    transformers.utils.is_kernels_available = lambda *_, **__: False
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = None
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its tables are no weights
    return model.eval().requires_grad_(False)


def same_routes(routes: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[T]: whether a token's experts [layers, T, A] are the expected ones in every layer."""
    return (routes == expected).all(-1).all(0)


def compare(run: str, found: tuple[Quantities, torch.Tensor], reference: tuple[Quantities, torch.Tensor]) -> None:
    """Reports each quantity of one run against the reference."""
    (ours, routes), (exact, expected) = found, reference
    same = same_routes(routes, expected)
    REPORT("routes", run=run, tokens=len(same), flipped=int((~same).sum()))
    for name, value in exact.items():
        REPORT(name, run=run, relative_error=relative_error(ours[name], value),
               relative_error_same_routes=relative_error(ours[name][same], value[same]),
               max_abs=(ours[name] - value).abs().max().item())


def compare_all(folder: Path, lengths: list[int], device: str) -> None:
    config = read_config(folder)
    if max(lengths) <= 2 * config.sliding_window:
        raise ValueError(f"--tokens {lengths}: one must be above {2 * config.sliding_window}, twice the sliding window")
    tokens, factors = random_tokens(lengths, config, device)

    batch = tokens, factors, lengths
    dense = load_model(folder, device=device, dtype=torch.float32, experts="bf16")
    weights = {name: parameter.detach() for name, parameter in dense.named_parameters()}
    reference = run_transformers(build_transformers(folder, weights, torch.float32, device), *batch)
    REPORT("reference", run=REFERENCE, sequences=lengths, window=config.sliding_window, layers=config.layer_types,
           norms={name: value.norm().item() for name, value in reference[0].items()})
    runs = {"float32": lambda: run_ours(dense, *batch),
            "transformers bf16": lambda: run_transformers(build_transformers(folder, weights, torch.bfloat16, device), *batch),
            "bf16": lambda: run_ours(load_model(folder, device=device, dtype=torch.bfloat16, experts="auto"), *batch)}
    for run, evaluate in runs.items():
        result = REPORT.guarded(run, evaluate)
        if result is not None:
            compare(run, result, reference)
        del result
        gc.collect()
        free_memory()


def print_table() -> None:
    runs = ("bf16", "transformers bf16", "float32")
    print("\nrelative error against transformers in float32: all tokens, and those with the same experts")
    print(f"{'quantity':24}" + "".join(f"{run:>26}" for run in runs))
    for name in dict.fromkeys(line["what"] for line in REPORT.lines if "relative_error" in line):
        cells = {line["run"]: f"{line['relative_error']:.2e} {line['relative_error_same_routes']:.2e}"
                 for line in REPORT.lines if line["what"] == name and "relative_error" in line}
        print(f"{name:24}" + "".join(f"{cells.get(run, 'failed'):>26}" for run in runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a gpt-oss checkpoint, Hugging Face layout")
    parser.add_argument("--layers", type=int, default=2, help="layers compared, from the first (default: 2)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 389, 771], help="lengths of the packed sequences, at "
                        "least one above twice the sliding window (default: 512 389 771)")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    try:
        import transformers
    except ImportError as error:
        sys.exit(f"compare_layers: transformers cannot be imported ({error}); install it, or use a Python that has it")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    REPORT("versions", torch=torch.__version__, transformers=transformers.__version__, device=device)
    torch.set_float32_matmul_precision("highest")
    try:
        with tempfile.TemporaryDirectory() as folder:
            compare_all(first_layers(arguments.checkpoint, arguments.layers, Path(folder)), arguments.tokens, arguments.device)
    except (CheckpointError, ValueError) as error:
        sys.exit(f"compare_layers: {error}")
    print_table()


if __name__ == "__main__":
    main()
