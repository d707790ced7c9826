"""Compares our forward and backward pass with golden tensors that another implementation made; prints one JSON line.

    python scripts/compare_logits.py CHECKPOINT GOLDEN [--adapter FOLDER] [--device cpu] [--dtype float32]

CHECKPOINT: a folder or hub id. GOLDEN: a safetensors file, or a folder that holds golden.safetensors, with any of the
tensors described in tests/fixtures/README.md; what is absent is left out of the result. --adapter: a PEFT adapter,
for golden tensors made with one (without it their gradients are left out).

Result (differences are largest absolute ones, in logits or nats):
  logits_max_abs, packed_max_abs, pad_left_max_abs, pad_right_max_abs    rows alone; end to end; without their padding
  router_max_abs, route_flips    router logits; tokens whose set of experts differs in any layer
  logits_max_abs_same_routes     as logits_max_abs over the other tokens: the figure to read in bfloat16
  logprob_max_abs, entropy_max_abs    over all temperatures, and per temperature with _t<temperature>
  greedy_equal, gen_logprob_max_abs   prefill and decode with the KV cache over the golden continuation
  dequant_max_abs                dense experts made from packed ones
  objective_rel                  sum of next-token log-probs at T=1
  grad_max_rel, grad_max_rel_tensor   its gradient: max |g - golden| / max |golden| of the worst tensor
Golden gradients of packed experts are those of the dequantised tensors, so on an MXFP4 checkpoint these figures come
from a model loaded with experts=bf16, and grad_packed_max_rel(_tensor) from the packed one, over what trains there.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.formats.files import CheckpointError, list_file  # noqa: E402
from models.formats.hugging_face import load_model  # noqa: E402
from models.formats.peft import load_adapter, peft_tensors  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402
from models.keys import PrefillChunk  # noqa: E402

PEFT_PREFIX = "base_model."


def read_golden(path: Path) -> dict[str, torch.Tensor]:
    file = path / "golden.safetensors" if path.is_dir() else path
    names = list_file(file)  # raises with the file's name
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def packed(rows: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids end to end [T], and their bounds [B + 1]."""
    bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return torch.cat(tuple(rows)).to(device), bounds.to(device, torch.int32)


def packed_logits(model: GptOss, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits [T, V] fp32 on the CPU of rows of ids, run as one packed batch."""
    with torch.enable_grad():  # as in training, where no kernel for few rows takes the place of a router that has hooks
        return model.logits(*packed(rows, model.device)).detach().float().cpu()


def packed_log_probs(model: GptOss, rows: Sequence[torch.Tensor], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropy [T] of all tokens but the first of each row, where both are 0, run as one packed batch; nats."""
    tokens, bounds = packed(rows, model.device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[bounds[:-1].long()] = False
    return model.log_probs(tokens, bounds, temperature=temperature, mask=mask)


def chosen_experts(logits: torch.Tensor, experts_per_token: int) -> torch.Tensor:
    """Router logits [..., E] -> the experts [..., A] that they choose, ascending."""
    return logits.topk(experts_per_token).indices.sort().values


def max_abs(ours: torch.Tensor, golden: torch.Tensor) -> float:
    """Largest absolute difference; infinite where ours is not finite."""
    difference = (ours.float().cpu() - golden.float()).abs()
    return difference.nan_to_num(nan=torch.inf).max().item() if difference.numel() else 0.0


def compare_rows(model: GptOss, golden: dict[str, torch.Tensor]) -> dict:
    """Logits of all rows in one packed batch, and what the routers said on the way."""
    routers = {int(name.rpartition(".")[2]): tensor for name, tensor in golden.items() if name.startswith("router_logits.")}
    if "logits" not in golden and not routers:
        return {}
    ids, seen = golden["input_ids"], []
    if "position_ids" in golden and not torch.equal(golden["position_ids"], torch.arange(ids.shape[-1]).expand_as(ids)):
        raise ValueError("position_ids: only positions 0, 1, 2 ... of each row are supported")
    hooks = [block.mlp.router.register_forward_hook(lambda _, __, output: seen.append(output.detach().float().cpu()))
             for block in model.model.layers]
    # one batch, as the golden's: products of other sizes round otherwise
    logits = packed_logits(model, list(ids)).view(*ids.shape, -1)  # [B, L, V]
    for hook in hooks:
        hook.remove()
    result = {"logits_max_abs": max_abs(logits, golden["logits"])} if "logits" in golden else {}
    if routers:
        pairs = [(seen[layer].view(*ids.shape, -1), expected) for layer, expected in routers.items()]  # [B, L, E] each
        routes = [[chosen_experts(some, model.config.num_experts_per_tok) for some in pair] for pair in pairs]
        flipped = torch.stack([(ours != expected).any(-1) for ours, expected in routes]).any(0)  # [B, L]
        result |= {"router_max_abs": max(max_abs(*pair) for pair in pairs), "route_flips": int(flipped.sum())}
        if "logits" in golden:
            result["logits_max_abs_same_routes"] = max_abs(logits[~flipped], golden["logits"][~flipped])
    return result


def compare_packed(model: GptOss, golden: dict[str, torch.Tensor]) -> dict:
    result = {}
    if "packed.logits" in golden:
        bounds = golden["packed.cu_seqlens"].long()
        rows = golden["packed.input_ids"].split(bounds.diff().tolist())
        result["packed_max_abs"] = max_abs(packed_logits(model, rows), golden["packed.logits"])
    for side in ("pad_left", "pad_right"):
        if f"{side}.logits" in golden:
            masks = golden[f"{side}.attention_mask"].bool()
            rows = [row[mask] for row, mask in zip(golden[f"{side}.input_ids"], masks)]
            result[f"{side}_max_abs"] = max_abs(packed_logits(model, rows), golden[f"{side}.logits"][masks])
    return result


def log_probs(model: GptOss, ids: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [B, L - 1] of ids[:, 1:], and the entropy [B, L] of the distribution after each of the ids [B, L]; nats."""
    longer = torch.cat([ids, ids[:, :1]], dim=1)  # one more token, whatever it is, asks for the last distribution
    chosen, entropy = (found.view_as(longer)[:, 1:] for found in packed_log_probs(model, list(longer), temperature))
    return chosen[:, :-1], entropy


def compare_log_probs(model: GptOss, golden: dict[str, torch.Tensor]) -> dict:
    result, temperatures = {}, {name.partition("_t")[2] for name in golden if name.startswith(("logprobs_t", "entropy_t"))}
    with torch.no_grad():
        found = {text: log_probs(model, golden["input_ids"], float(text)) for text in sorted(temperatures)}
    for index, (kind, key) in enumerate((("logprobs", "logprob"), ("entropy", "entropy"))):
        each = {f"{key}_max_abs_t{text}": max_abs(values[index], golden[f"{kind}_t{text}"])
                for text, values in found.items() if f"{kind}_t{text}" in golden}
        result |= each | ({f"{key}_max_abs": max(each.values())} if each else {})
    return result


def compare_generation(model: GptOss, golden: dict[str, torch.Tensor]) -> dict:
    """Prefill, then decode over the golden continuation: the greedy choice at each step, and the log-probs at T=1."""
    if "gen.greedy_ids" not in golden:
        return {}
    prompts, expected = (golden[f"gen.{name}_ids"].to(model.device) for name in ("prompt", "greedy"))  # [B, P], [B, N]
    (num_rows, prompt_len), num_new = prompts.shape, expected.shape[1]
    cache = model.new_cache(num_rows, prompt_len + num_new)
    for row in range(num_rows):
        cache.reserve(row, cache.max_len)
    slots = torch.arange(num_rows, device=model.device)
    chunks = [PrefillChunk(row, 0, prompt_len) for row in range(num_rows)]
    steps = [model.head(model.prefill(prompts.flatten(), chunks, cache))]
    for step in range(num_new - 1):
        hidden = model.decode(expected[:, step], torch.full_like(slots, prompt_len + step), cache, slots)
        steps.append(model.head(hidden))
    logits = torch.stack(steps, dim=1)  # [B, N, V]
    result = {"greedy_equal": bool(torch.equal(logits.argmax(-1), expected))}
    if "gen.logprobs_t1" in golden:
        chosen = logits.log_softmax(-1).gather(-1, expected[..., None])[..., 0]
        result["gen_logprob_max_abs"] = max_abs(chosen, golden["gen.logprobs_t1"])
    return result


def compare_gradients(model: GptOss, golden: dict[str, torch.Tensor]) -> dict:
    """Gradients of the golden objective, over the tensors this model can train; {} where golden holds none of them."""
    wanted = {name.removeprefix("grad."): tensor for name, tensor in golden.items() if name.startswith("grad.")}
    parameters = dict(model.named_parameters())
    base = {name: parameter for name, parameter in parameters.items() if name in wanted}
    has_adapter = model.adapter is not None and any(name.startswith(PEFT_PREFIX) for name in wanted)
    if not base and not has_adapter:
        return {}
    for parameter in base.values():
        parameter.requires_grad_(True)
    total = log_probs(model, golden["input_ids"], 1.0)[0].sum()
    total.backward()
    ours = {name: parameter.grad for name, parameter in base.items()}
    if has_adapter:
        ours |= peft_tensors(model, model.adapter.targets, read=lambda parameter: parameter.grad)
    compared = {name: max_abs(ours[name], tensor) / max(tensor.abs().max().item(), 1e-30)
                for name, tensor in wanted.items() if name in ours}
    worst = max(compared, key=compared.get)
    result = {"grad_max_rel": compared[worst], "grad_max_rel_tensor": worst, "grad_num_tensors": len(compared),
              "grad_not_compared": sorted(set(wanted) - set(compared))}
    if "objective" in golden:
        expected = golden["objective"].item()
        result["objective_rel"] = abs(total.item() - expected) / abs(expected)
    return result


def compare_dequantized(model: GptOss, golden: dict[str, torch.Tensor]) -> dict:
    parameters = dict(model.named_parameters())
    each = [max_abs(parameters[name.removeprefix("dequant.")].detach(), tensor)
            for name, tensor in golden.items() if name.startswith("dequant.")]
    return {"dequant_max_abs": max(each)} if each else {}


def compare(checkpoint: str, golden: dict[str, torch.Tensor], *, adapter: str | None, device: str, dtype: torch.dtype) -> dict:
    """All comparisons that the golden tensors allow. Raises ValueError where there are none."""

    def load(experts: str) -> GptOss:
        model = load_model(checkpoint, device=device, dtype=dtype, experts=experts)
        if adapter is not None:
            load_adapter(model, adapter)
        return model

    model = load("auto")
    result = {"experts": model.expert_format.name}
    for part in (compare_rows, compare_packed, compare_log_probs, compare_generation):
        result |= part(model, golden)
    gradients = compare_gradients(model, golden)
    if model.expert_format.is_packed:
        result |= {name.replace("grad_", "grad_packed_", 1): value for name, value in gradients.items()
                   if name in ("grad_max_rel", "grad_max_rel_tensor", "grad_num_tensors")}
        del model
        model = load("bf16")
        gradients = compare_gradients(model, golden)
    result |= {"experts_grad": model.expert_format.name, **gradients} if gradients else {}
    result |= compare_dequantized(model, golden)
    if len(result) == 1:
        raise ValueError(f"nothing to compare in the golden file; it holds {sorted(golden)[:20]}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("golden", type=Path)
    parser.add_argument("--adapter", help="folder of a PEFT adapter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    try:
        result = compare(arguments.checkpoint, read_golden(arguments.golden), adapter=arguments.adapter, device=arguments.device,
                         dtype=getattr(torch, arguments.dtype))
    except (CheckpointError, ValueError) as error:
        sys.exit(f"compare_logits: {error}")
    print(json.dumps({key: str(value) if key == "golden" else value for key, value in vars(arguments).items()} | result))


if __name__ == "__main__":
    main()
