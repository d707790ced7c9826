"""What the tests of the attention kernels share: compiling one ahead of time, and the formula in plain operations."""

import torch
import torch.nn.functional as F
from aot import compile_for

import kernels.attention.packed
from kernels.attention.packed import AttentionBlocks


def kernel_arguments(kind: str, dtype: str, blocks: AttentionBlocks, width: int, *, windowed: bool, prefixed: bool):
    tile_rows = blocks.queries if kind == "dkv" else blocks.keys
    whole = f"tensordesc<{dtype}[{tile_rows},{width}]>" if blocks.descriptor else f"*{dtype}"
    signature = {name: f"*{dtype}" for name in ("q", "k", "v")}
    constexprs = {"GROUP": 8, "WINDOWED": windowed, "DESCRIPTOR": blocks.descriptor, "D": width, "BLOCK_M": blocks.queries,
                  "BLOCK_N": blocks.keys}
    strides = dict.fromkeys(("stride_q", "stride_k", "stride_v", "stride_out"), "i32")
    rest = {"num_tokens": "i32", "scale_log2": "fp32", "window": "i32"}
    if kind == "dkv":
        signature |= {"q_tiles": whole, "dout_tiles": whole, "dout": f"*{dtype}", "row_stats": "*fp32",
                      "dk": f"*{dtype}", "dv": f"*{dtype}", "tiles": "*i32", "readers": "*i32"}
        signature |= strides | {"stride_dk": "i32", "num_kv_heads": "i32", "scale": "fp32"} | rest
        return signature, constexprs | {"IN_REGISTERS": blocks.in_registers}
    signature |= {"k_tiles": whole, "v_tiles": whole, "sinks": f"*{dtype}", "out": f"*{dtype}", "lse": "*fp32", "tiles": "*i32"}
    if kind == "forward":
        rest = {"num_queries": "i32", "first_query": "i32", "scale_log2": "fp32", "window": "i32"}
        constexprs["PART"] = 0 if windowed else 64 if dtype == "fp32" else 256
    else:
        signature |= {"dout": f"*{dtype}", "row_stats": "*fp32", "dsinks": "*fp32", "dq": f"*{dtype}", "scale": "fp32"}
        strides["stride_dq"] = "i32"
    return signature | strides | {"num_heads": "i32"} | rest, constexprs | {"PREFIXED": prefixed}


def compile_kernel(kind: str, arch: int, blocks: AttentionBlocks, *, dtype="bf16", width=64, windowed=False, prefixed=False):
    kernel = {"forward": kernels.attention.packed._forward_kernel, "dq": kernels.attention.packed._dq_kernel,
              "dkv": kernels.attention.packed._dkv_kernel}[kind]
    signature, constexprs = kernel_arguments(kind, dtype, blocks, width, windowed=windowed, prefixed=prefixed)
    divisible = tuple(name for name, type_ in signature.items() if type_.startswith("*") or name.startswith("stride"))
    return compile_for(kernel, signature, constexprs, arch, num_warps=blocks.warps, num_stages=blocks.stages,
                       divisible=divisible, max_registers=blocks.max_registers)


def without_sinks(q, k, v, *, cu_seqlens, window, scale) -> torch.Tensor:
    """Attention by PyTorch's own function, whose softmax is over the visible keys alone."""
    out = []
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        visible = (distance >= 0) & (distance < (window or end))
        heads = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        out.append(F.scaled_dot_product_attention(*heads, attn_mask=visible, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


def eager(q, k, v, sinks, *, cu_seqlens, window, scale) -> torch.Tensor:
    """The formula head by head in the inputs' dtype."""
    group = q.shape[1] // k.shape[1]
    out = []
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        distance = torch.arange(end - start, device=q.device)[:, None] - torch.arange(end - start, device=q.device)
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        heads = []
        for head in range(q.shape[1]):
            scores = (q[start:end, head] @ k[start:end, head // group].T * scale).masked_fill(hidden, float("-inf"))
            scores = torch.cat((scores, sinks[head].expand(end - start, 1)), dim=-1)
            heads.append(torch.softmax(scores, dim=-1)[:, :-1] @ v[start:end, head // group])
        out.append(torch.stack(heads, dim=1))
    return torch.cat(out)
