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
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.formats.files import CheckpointError, list_file  # noqa: E402
from models.formats.hugging_face import load_model  # noqa: E402
from models.formats.peft import load_adapter, peft_tensors  # noqa: E402
from models.gpt_oss import GptOss  # noqa: E402

PEFT_PREFIX = "base_model."


def read_golden(path: Path) -> dict[str, torch.Tensor]:
    file = path / "golden.safetensors" if path.is_dir() else path
    names = list_file(file)  # raises with the file's name
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def packed_logits(model: GptOss, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [L, V] fp32 on the CPU of each row of ids, the rows run as one packed batch."""
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    cu_seqlens = lengths.cumsum(0).to(model.device, torch.int32)
    with torch.enable_grad():  # as in training, where no kernel for few rows takes the place of a router that has hooks
        logits = model.logits(torch.cat(rows).to(model.device), cu_seqlens)
    return list(logits.detach().float().cpu().split(lengths[1:].tolist()))


def max_abs(ours: torch.Tensor, golden: torch.Tensor) -> float:
    """Largest absolute difference; infinite where ours is not finite."""
    difference = (ours.float().cpu() - golden.float()).abs()
    return difference.nan_to_num(nan=torch.inf).max().item() if difference.numel() else 0.0


def check_positions(golden: dict[str, torch.Tensor], ids: torch.Tensor, name: str) -> None:
    if name in golden and not torch.equal(golden[name], torch.arange(ids.shape[-1]).expand_as(ids)):
        raise ValueError(f"{name}: only positions 0, 1, 2 ... of each row are supported")


def compare_rows(model: GptOss, golden: dict[str, torch.Tensor]) -> dict:
    """Logits of all rows in one packed batch, and what the routers said on the way."""
    if "logits" not in golden and "router_logits.0" not in golden:
        return {}
    ids = golden["input_ids"]
    check_positions(golden, ids, "position_ids")
    seen = [[] for _ in model.model.layers]
    hooks = [block.mlp.router.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output.float().cpu()))
             for kept, block in zip(seen, model.model.layers)]
    # one batch, as the golden's: products of other sizes round otherwise
    logits = torch.stack(packed_logits(model, list(ids)))  # [B, L, V]
    for hook in hooks:
        hook.remove()
    result = {"logits_max_abs": max_abs(logits, golden["logits"])} if "logits" in golden else {}
    routers = {int(name.rpartition(".")[2]): tensor for name, tensor in golden.items() if name.startswith("router_logits.")}
    if routers:
        top = model.config.num_experts_per_tok
        flipped = torch.zeros(ids.shape, dtype=torch.bool)
        worst = 0.0
        for layer, expected in routers.items():
            ours = torch.cat(seen[layer]).view(*ids.shape, -1)  # [B, L, E]
            worst = max(worst, max_abs(ours, expected))
            flipped |= (ours.topk(top).indices.sort().values != expected.topk(top).indices.sort().values).any(-1)
        result |= {"router_max_abs": worst, "route_flips": int(flipped.sum())}
        if "logits" in golden:
            result["logits_max_abs_same_routes"] = max_abs(logits[~flipped], golden["logits"][~flipped])
    return result


def compare_packed(model: GptOss, golden: dict[str, torch.Tensor]) -> dict:
    result = {}
    if "packed.logits" in golden:
        bounds = golden["packed.cu_seqlens"].long()
        rows = list(golden["packed.input_ids"].split((bounds[1:] - bounds[:-1]).tolist()))
        result["packed_max_abs"] = max_abs(torch.cat(packed_logits(model, rows)), golden["packed.logits"])
    for side in ("pad_left", "pad_right"):
        if f"{side}.logits" in golden:
            masks = golden[f"{side}.attention_mask"].bool()
            rows = [row[mask] for row, mask in zip(golden[f"{side}.input_ids"], masks)]
            result[f"{side}_max_abs"] = max_abs(torch.cat(packed_logits(model, rows)), golden[f"{side}.logits"][masks])
    return result


def log_probs(model: GptOss, ids: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [B, L - 1] of ids[:, 1:], and the entropy [B, L] of the distribution after each of the ids [B, L]; nats."""
    def run(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, L'] tokens -> log-prob and entropy [B, L' - 1] of all but the first of each row, run as one packed batch."""
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, 0] = False
        bounds = torch.arange(0, tokens.numel() + 1, tokens.shape[1], dtype=torch.int32)
        chosen, entropy = model.log_probs(tokens.flatten().to(model.device), bounds.to(model.device),
                                          temperature=temperature, mask=mask.flatten().to(model.device))
        return chosen.view_as(tokens)[:, 1:], entropy.view_as(tokens)[:, 1:]

    chosen, entropy = run(ids)
    with torch.no_grad():  # one more token, whatever it is, asks for the last distribution
        _, longer = run(torch.cat([ids, ids[:, :1]], dim=1))
    return chosen, torch.cat([entropy, longer[:, -1:]], dim=1)


def compare_log_probs(model: GptOss, golden: dict[str, torch.Tensor]) -> dict:
    result = {}
    names = sorted({name.partition("_t")[2] for name in golden if name.startswith(("logprobs_t", "entropy_t"))})
    with torch.no_grad():
        for name in names:
            chosen, entropy = log_probs(model, golden["input_ids"], float(name))
            for kind, key, values in (("logprobs", "logprob", chosen), ("entropy", "entropy", entropy)):
                if f"{kind}_t{name}" in golden:
                    result[f"{key}_max_abs_t{name}"] = max_abs(values, golden[f"{kind}_t{name}"])
    for key in ("logprob", "entropy"):
        each = [value for name, value in result.items() if name.startswith(f"{key}_max_abs_t")]
        result |= {f"{key}_max_abs": max(each)} if each else {}
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
    cu_seqlens = torch.arange(0, (num_rows + 1) * prompt_len, prompt_len, dtype=torch.int32, device=model.device)
    logits, steps = model.prefill(prompts.flatten(), cu_seqlens, cache, slots), []
    for step in range(num_new):
        steps.append(logits)
        if step + 1 < num_new:
            logits = model.decode_step(expected[:, step], torch.full_like(slots, prompt_len + step), cache, slots)
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
    objective = total.item()
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
        result["objective_rel"] = abs(objective - expected) / abs(expected)
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
