"""The dense projection for few tokens: in the interpreter against float64, compiled for every GPU, and on a GPU bit for bit
against grouped_gemm."""

import pytest
import torch
import triton
from aot import ARCHITECTURES, check_fits, check_starts, compile_for

from kernels.device import family_of
from kernels.experts import few_rows
from kernels.experts.few_rows import moe_decode_kernel
from kernels.experts.few_tiles import low_rank_steps
from kernels.experts.gemm import grouped_gemm
from kernels.linear import _LINEAR, Adapter, choose_linear_blocks, decode_linear

SCALE = 0.5


def problem(num_tokens, num_in, sizes, rank, adapted, *, dtype=torch.float32, device="cpu"):
    """x, weight, bias and LoRA of projections of `sizes` side by side, those in `adapted` with an adapter."""
    generator, total = torch.Generator().manual_seed(num_tokens), sum(sizes)
    shapes = {"x": (num_tokens, num_in), "weight": (total, num_in), "bias": (total,)}
    if adapted:
        shapes |= {"lora_A": (len(adapted) * rank, num_in), "lora_B": (total, rank)}
    made = {}
    for name, shape in shapes.items():
        std = num_in**-0.5 if name in ("weight", "lora_A") else 1.0
        made[name] = (torch.randn(shape, generator=generator) * std).to(device, torch.float32 if "lora" in name else dtype)
    if adapted:
        made["lora_scale"] = SCALE
    if len(sizes) > 1 and adapted:
        numbers = [adapted.index(i) if i in adapted else -1 for i in range(len(sizes))]
        made["lora_groups"] = torch.tensor(numbers, dtype=torch.int32).repeat_interleave(torch.tensor(sizes)).to(device)
    return made


def in_float64(t, sizes, rank, adapted):
    y = t["x"].double() @ t["weight"].double().T + t["bias"].double()
    for number, i in enumerate(adapted):
        columns = slice(sum(sizes[:i]), sum(sizes[:i + 1]))
        A = t["lora_A"][number * rank:(number + 1) * rank].double()
        y[:, columns] += SCALE * t["x"].double() @ A.T @ t["lora_B"][columns].double().T
    return y


def decoded(t, sizes, adapted, *, in_one_launch=False):
    if not adapted:
        return decode_linear(t["x"], t["weight"], t["bias"], None)
    columns = [slice(sum(sizes[:i]), sum(sizes[:i + 1])) for i in adapted]
    ready = torch.zeros(1, dtype=torch.int32, device=t["x"].device) if in_one_launch else None
    A, B = (t[name].to(t["x"].dtype) if in_one_launch else t[name] for name in ("lora_A", "lora_B"))
    if A.is_cuda:
        torch.cuda.synchronize()  # a launch may read B before the one before it is complete
    adapter = Adapter(A, B, t.get("lora_groups"), columns, t["lora_scale"], ready)
    return decode_linear(t["x"], t["weight"], t["bias"], adapter)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_tokens, num_in, sizes, rank, adapted", [
    (1, 96, (48, 16, 16), 3, (0, 1, 2)), (7, 70, (33, 8, 9), 4, (0, 2)), (37, 64, (40,), 5, (0,)), (17, 33, (20, 20), 4, ()),
    (0, 32, (16,), 2, (0,)), (5, 96, (64, 32, 32), 16, (0, 2)), (37, 70, (32, 64, 32), 32, (0, 1, 2)),
])
@pytest.mark.parametrize("in_one_launch", [False, True])
def test_a_product_with_its_adapters(num_tokens, num_in, sizes, rank, adapted, in_one_launch):
    t = problem(num_tokens, num_in, sizes, rank, adapted)
    if adapted and len(adapted) < len(sizes):  # rows of columns without an adapter are not read
        t["lora_B"][t["lora_groups"] < 0] = torch.nan
    y = decoded(t, sizes, adapted, in_one_launch=in_one_launch)
    torch.testing.assert_close(y.double(), in_float64(t, sizes, rank, adapted), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned", "ordered_products")
@pytest.mark.parametrize("num_tokens, num_in, sizes, rank, adapted", [
    (17, 150, (33, 8, 9), 17, (0, 2)), (16, 40, (32, 64, 32), 48, (0, 2)), (33, 33, (40,), 130, (0,)),
])
def test_one_launch_has_the_bits_of_two(num_tokens, num_in, sizes, rank, adapted, monkeypatch):
    monkeypatch.setattr(few_rows, "low_rank_steps", lambda *_, **__: (32, 2))  # the interpreter adds up within a step first
    t = problem(num_tokens, num_in, sizes, rank, adapted)
    one, two = (decoded(t, sizes, adapted, in_one_launch=in_one_launch) for in_one_launch in (True, False))
    assert one.isfinite().all() and torch.equal(one, two)


# in, out, rank, how many slices of it; "and A": the launch computes x A^T too
USES = {"qkv": (2880, 5120, 48, 3), "o_proj": (4096, 2880, 16, 1), "x A^T": (2880, 48, 0, 1), "qkv and A": (2880, 5120, 48, 3),
        "o_proj and A": (4096, 2880, 16, 1)}


@pytest.mark.parametrize("arch, num_tokens", [(arch, most) for arch in ARCHITECTURES
                                              for most, *_ in _LINEAR[family_of(arch)].blocks])
@pytest.mark.parametrize("use", USES)
def test_kernels_fit_every_gpu(arch, use, num_tokens):
    num_in, num_out, rank, num_slices = USES[use]
    is_low_rank, in_one_launch, has_groups = use == "x A^T", use.endswith("and A"), num_slices > 1
    blocks = choose_linear_blocks(family_of(arch), torch.bfloat16, num_tokens, num_in, num_out, is_low_rank=is_low_rank)
    signature = {name: "i32" for name in moe_decode_kernel.arg_names if name.startswith(("stride", "num_"))} | {
        "x": "*bf16", "weight": "*fp32" if is_low_rank else "*bf16", "scales": "*i32", "out": "*bf16", "offsets": "*i32",
        "gather": "*i32", "bias": "*bf16", "low_rank": "*bf16", "lora_A": "*bf16",
        "lora_up": "*bf16" if in_one_launch else "*fp32", "ready": "*i32", "lora_groups": "*i32", "rank": "i32",
        "slice_rank": "i32", "scale": "fp32", "alpha": "fp32", "limit": "fp32", "one": "fp32",
    }  # fmt: skip
    for name in ("num_experts", "stride_up_rank"):
        del signature[name]
    num_ranks = rank // num_slices
    low = low_rank_steps(blocks, num_in, torch.bfloat16, is_packed=False) if in_one_launch else (0, 0)
    rank_block = max(16, min(64, triton.next_power_of_2(num_ranks)))
    constexprs = {
        "num_experts": 1, "stride_up_rank": 1, "NUM_IN": num_in, "EXPERTS": 1, "ROWS": blocks.rows, "TOKENS": blocks.tokens,
        "MORE": 0, "INNER": blocks.inner, "TAIL": 0, "CHUNK": 32, "RANK": rank_block,
        "RANK_STEPS": triton.cdiv(num_ranks, rank_block),
        "IS_PACKED": False, "IS_ASM": False, "IN_CONTIGUOUS": True, "EVEN_IN": num_in % blocks.inner == 0,
        "EVEN_OUT": num_out % blocks.rows == 0, "HAS_OFFSETS": False, "HAS_GATHER": False, "HAS_BIAS": not is_low_rank,
        "HAS_SCALE": is_low_rank, "HAS_LORA_GROUPS": False, "HAS_SWIGLU": False, "IS_SLICED": has_groups,
        "LOW_INNER": low[0], "LOW_STAGES": low[1], "SPINS": True,
        "OVERLAPS": False, "MMA": "", "WAITS": 0,
    }  # fmt: skip
    divisible = tuple(name for name, kind in signature.items() if kind.startswith("*") or name.startswith("stride"))
    resources = compile_for(moe_decode_kernel, signature, constexprs, arch, num_warps=blocks.num_warps,
                            num_stages=blocks.num_stages, divisible=(*divisible, "num_out", "rank", "slice_rank"))
    check_fits(resources, arch)
    assert resources.has_mma
    if in_one_launch:
        check_starts(resources)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rank", [4, 16, 32])
@pytest.mark.parametrize("num_in, sizes, adapted", [(2880, (4096, 512, 512), (0, 1, 2)), (2880, (4096, 512, 512), (0, 2)),
                                                    (4096, (2880,), (0,)), (4096, (2880,), ())])
def test_bits_are_those_of_the_training_product(num_in, sizes, adapted, rank):
    for num_tokens in (1, 7, 16, 17, 32, 64, 128, 200, 512):
        t = problem(num_tokens, num_in, sizes, rank, adapted, dtype=torch.bfloat16, device="cuda")
        lora = {}
        if adapted:
            low_rank = grouped_gemm(t["x"], t["lora_A"].T[None], None, scale=SCALE)
            lora = {"low_rank": low_rank, "lora_up": t["lora_B"].T[None], "lora_groups": t.get("lora_groups")}
        expected = grouped_gemm(t["x"], t["weight"].T[None], None, bias=t["bias"][None], **lora)
        for in_one_launch in (False, True) if adapted else (False,):
            y = decoded(t, sizes, adapted, in_one_launch=in_one_launch)
            assert torch.equal(y, expected), f"{num_tokens} tokens: {(y != expected).float().mean():.2%} of the values differ"
