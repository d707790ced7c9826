"""Writes a gpt-oss checkpoint with random weights in the Hugging Face layout, tokenizer included.

    python scripts/random_checkpoint.py OUT --size 20b --dtype mxfp4 --device cuda      (13.8 GB; put OUT on a RAM disk)

For timing, memory and loading at real sizes without a download: tensor names, shapes, dtypes and config.json are those
of the published 20b and 120b checkpoints (`--dtype nf4`: of bitsandbytes' packing, a matrix per expert); `tiny` has the
same structure with small layers, and hidden != intermediate so that a missing transpose shows. Every tensor is drawn from
(seed, its place in the model), so the weights depend on neither --device's memory nor the shard size; they do differ
between cpu and cuda.

Scales keep activations finite and of order one through all layers: matrices have rms 1/sqrt(inputs), embeddings 1,
biases 0.02.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.configuration.command_line import Once  # noqa: E402
from kernels.packed.nf4 import BLOCK_SIZE as NF4_BLOCK_SIZE  # noqa: E402
from kernels.packed.nf4 import CODE as NF4_CODE  # noqa: E402
from models.chat.tokenizer import Tokenizer  # noqa: E402
from models.config import GptOssConfig  # noqa: E402
from models.experts import FORMATS  # noqa: E402
from models.formats.files import TensorToWrite, atomic_folder, write_shards  # noqa: E402

_REAL = dict(hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8, head_dim=64)
SIZES = {
    "20b": dict(num_hidden_layers=24, num_local_experts=32, **_REAL),
    "120b": dict(num_hidden_layers=36, num_local_experts=128, **_REAL),
    "tiny": dict(num_hidden_layers=4, num_local_experts=8, hidden_size=64, intermediate_size=96, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32),
}
VOCAB_SIZE = 201088
SPECIAL_TOKENS = {199998: "<|startoftext|>", 199999: "<|endoftext|>", 200002: "<|return|>", 200003: "<|constrain|>",
                  200005: "<|channel|>", 200006: "<|start|>", 200007: "<|end|>", 200008: "<|message|>", 200012: "<|call|>",
                  200018: "<|endofprompt|>"}  # fmt: skip
# a few words at the ids they have in o200k_harmony, so that prompts are about as long as real ones around their headers
WORDS = {"assistant": 173781, "analysis": 35644, "final": 17196, "hello": 24912, "Ġworld": 2375, "Ġcode": 3490}
NF4_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
              "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}  # fmt: skip
NESTED_SIZE = 256  # absmax that share a scale of their own
E2M1_RMS = math.sqrt((0.5**2 + 1 + 1.5**2 + 2**2 + 3**2 + 4**2 + 6**2) / 8)


def model_config(size: str, *, num_layers: int | None = None) -> GptOssConfig:
    sizes = SIZES[size] if num_layers is None else SIZES[size] | {"num_hidden_layers": num_layers}
    return GptOssConfig.from_architecture(dict(sizes, vocab_size=VOCAB_SIZE, num_experts_per_tok=4, sliding_window=128,
                                               eos_token_id=200002, pad_token_id=199999))


def _normal(shape: tuple[int, ...], generator: torch.Generator, *, std: float) -> torch.Tensor:
    """Normal bf16 values on the CPU, drawn some rows of dimension 0 at a time so that fp32 copies stay small."""
    result = torch.empty(shape, dtype=torch.bfloat16)
    for part in result.split(max(1, 2**26 * shape[0] // math.prod(shape))):
        noise = torch.empty(part.shape, dtype=torch.float32, device=generator.device)
        part.copy_(noise.normal_(0.0, std, generator=generator))
    return result


def _codes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Uniform random bytes: every one of the 16 codes equally often."""
    words = torch.empty(-(-math.prod(shape) // 8), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[: math.prod(shape)].view(shape).cpu()


def _scale_bytes(shape: tuple[int, ...], generator: torch.Generator, *, num_inputs: int) -> torch.Tensor:
    """Two neighbouring scales around the one that gives uniform codes an rms of 1 / sqrt(inputs)."""
    exponent = math.floor(math.log2(1 / math.sqrt(num_inputs) / E2M1_RMS)) + 127
    scales = torch.randint(exponent, exponent + 2, shape, generator=generator, device=generator.device)
    return scales.to(torch.uint8).cpu()


def _nf4_parts(outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    """What stands beside a packed matrix's codes and absmax, by what its name gets. The rms of the weights is about
    1 / sqrt(inputs)."""
    num_blocks = outputs * inputs // NF4_BLOCK_SIZE
    absmax = 1 / math.sqrt(inputs) / math.sqrt(sum(value**2 for value in NF4_CODE) / 16)
    state = {"quant_type": "nf4", "blocksize": NF4_BLOCK_SIZE, "dtype": "bfloat16", "shape": [outputs, inputs],
             "nested_blocksize": NESTED_SIZE, "nested_dtype": "float32", "nested_offset": absmax}
    described = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    nested = torch.full((-(-num_blocks // NESTED_SIZE),), 0.2 * absmax)
    return {".quant_map": torch.tensor(NF4_CODE), ".nested_absmax": nested, ".nested_quant_map": torch.linspace(-1, 1, 256),
            ".quant_state.bitsandbytes__nf4": described}


def tensor_plan(config: GptOssConfig, *, form: str, seed: int, device: torch.device) -> list[TensorToWrite]:
    """Every tensor of the checkpoint in the published order: layers sorted as text, then the big tables."""
    hidden, width, num_experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    q_width, kv_width = config.q_width, config.kv_width
    plan = []

    def add(name: str, tensor_bytes: int, make: Callable[[], torch.Tensor]) -> None:
        plan.append(TensorToWrite(name, tensor_bytes, make))

    def drawn(name: str, shape: tuple[int, ...], draw: Callable, *, bytes_each: int) -> None:
        seed_here = seed * 1_000_003 + len(plan)
        add(name, math.prod(shape) * bytes_each, lambda: draw(shape, torch.Generator(device=device).manual_seed(seed_here)))

    def normal(name: str, *shape: int, std: float) -> None:
        drawn(name, shape, partial(_normal, std=std), bytes_each=2)

    def codes(name: str, *shape: int) -> None:
        drawn(name, shape, _codes, bytes_each=1)

    def ones(name: str) -> None:
        add(name, 2 * hidden, partial(torch.ones, hidden, dtype=torch.bfloat16))

    def linear(name: str, outputs: int, inputs: int) -> None:
        normal(name + ".weight", outputs, inputs, std=1 / math.sqrt(inputs))
        normal(name + ".bias", outputs, std=0.02)

    def experts(name: str, outputs: int, inputs: int) -> None:
        if form == "nf4":
            parts = _nf4_parts(outputs, inputs)
            for expert in range(num_experts):
                one = f"{name}s.{expert}"
                codes(one + ".weight", outputs * inputs // 2, 1)
                codes(one + ".weight.absmax", outputs * inputs // NF4_BLOCK_SIZE)
                for suffix, value in parts.items():
                    add(one + ".weight" + suffix, value.nbytes, value.clone)
                normal(one + ".bias", outputs, std=0.02)
            return
        if form == "mxfp4":
            scales = num_experts, outputs, inputs // 32
            codes(name + "_blocks", *scales, 16)
            drawn(name + "_scales", scales, partial(_scale_bytes, num_inputs=inputs), bytes_each=1)
        else:
            normal(name, num_experts, inputs, outputs, std=1 / math.sqrt(inputs))
        normal(name + "_bias", num_experts, outputs, std=0.02)

    for layer in sorted(range(config.num_hidden_layers), key=str):
        prefix = f"model.layers.{layer}."
        ones(prefix + "input_layernorm.weight")
        experts(prefix + "mlp.experts.down_proj", hidden, width)
        experts(prefix + "mlp.experts.gate_up_proj", 2 * width, hidden)
        linear(prefix + ("mlp.router.linear" if form == "nf4" else "mlp.router"), num_experts, hidden)
        ones(prefix + "post_attention_layernorm.weight")
        for name, outputs, inputs in (("k", kv_width, hidden), ("o", hidden, q_width), ("q", q_width, hidden),
                                      ("v", kv_width, hidden)):
            linear(f"{prefix}self_attn.{name}_proj", outputs, inputs)
        normal(prefix + "self_attn.sinks", config.num_attention_heads, std=1.0)
    normal("lm_head.weight", config.vocab_size, hidden, std=1 / math.sqrt(hidden))
    normal("model.embed_tokens.weight", config.vocab_size, hidden, std=1.0)
    ones("model.norm.weight")
    return plan


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer, harmony specials at their real ids; the other ids up to 199997 are unused fillers."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | WORDS
    taken = set(vocab.values())
    vocab |= {f"filler{i}": i for i in range(199998) if i not in taken}
    specials = {i: SPECIAL_TOKENS.get(i, f"<|reserved_{i}|>") for i in range(199998, 200019)}
    vocab |= {content: i for i, content in specials.items()}
    backend = Backend(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials.values()])
    Tokenizer(backend, name="of a random checkpoint", source=None).save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.register("action", None, Once)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--size", choices=list(SIZES), required=True)
    parser.add_argument("--dtype", "--experts", dest="experts", choices=list(FORMATS), default="mxfp4",
                        help="form of the expert weights; all other tensors are bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where random numbers are drawn (default: cuda where there is one; it is far faster)")
    parser.add_argument("--layers", type=int, help="fewer (or more) layers than the size has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-bytes", type=float, default=5e9)
    arguments = parser.parse_args()

    config = model_config(arguments.size, num_layers=arguments.layers)
    plan = tensor_plan(config, form=arguments.experts, seed=arguments.seed, device=torch.device(arguments.device))
    num_bytes = sum(tensor.num_bytes for tensor in plan)
    try:
        quantization = NF4_CONFIG if arguments.experts == "nf4" else FORMATS[arguments.experts].quantization or {}
        files = {"config.json": config.to_hf(quantization=quantization),
                 "generation_config.json": {"bos_token_id": 199998, "do_sample": True, "pad_token_id": 199999,
                                            "eos_token_id": [200002, 199999, 200012]}}
        with atomic_folder(arguments.out, num_bytes=num_bytes + 2**24, files=files) as folder:
            write_shards(folder, plan, max_shard_bytes=arguments.max_shard_bytes)
            write_tokenizer(folder)
    except ValueError as error:
        sys.exit(f"random_checkpoint: {error}")
    print(f"{arguments.out}: {len(plan)} tensors, {num_bytes:,} bytes of weights")


if __name__ == "__main__":
    main()
