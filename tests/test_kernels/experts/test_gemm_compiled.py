"""The grouped kernels compiled for every GPU at gpt-oss-20b's shapes: shared memory, spills, tensor cores."""

import pytest
import torch
import triton
from aot import ARCHITECTURES, check_fits, compile_for, half

from kernels.device import family_of
from kernels.experts.gemm import choose_blocks, grouped_gemm_kernel
from kernels.experts.outer import (
    CHUNK_ROWS,
    choose_outer_blocks,
    compiled_stages,
    grouped_outer_kernel,
    grouped_row_sum_kernel,
    sum_chunks_kernel,
)

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
NUM_EXPERTS = 32


def compile_gemm(arch, *, num_in=2880, num_out=5760, num_rows=32768, dtype=torch.bfloat16, weight_dtype=None, rank=0,
                 in_contiguous=True, num_experts=NUM_EXPERTS, flags=()):
    kind, weight_kind = KINDS[dtype], KINDS[weight_dtype or dtype]
    blocks = choose_blocks(family_of(arch), dtype, num_rows, num_experts, num_in, num_out)
    x_tma = blocks.use_tma and "GATHER" not in flags
    weight_tma = blocks.use_tma and weight_dtype is None
    box = (blocks.cols, blocks.inner) if in_contiguous else (blocks.inner, blocks.cols)
    signature = {name: "i32" for name in grouped_gemm_kernel.arg_names if name.startswith(("stride", "num_"))} | {
        "x": f"tensordesc<{kind}[{blocks.rows},{blocks.inner}]>" if x_tma else f"*{kind}",
        "weight": f"tensordesc<{kind}[{box[0]},{box[1]}]>" if weight_tma else f"*{weight_kind}", "out": f"*{kind}",
        "pre_activation": f"*{kind}", "offsets": "*i32", "gather": "*i32", "bias": f"*{kind}", "low_rank": f"*{kind}",
        "lora_up": "*fp32", "lora_groups": "*i32", "rank": "i32", "slice_rank": "i32", "scale": "fp32",
        "alpha": "fp32", "limit": "fp32",
    }  # fmt: skip
    rank_block = max(16, min(64, triton.next_power_of_2(rank)))
    constexprs = {
        "EXPERTS": triton.next_power_of_2(num_experts), "ROWS": blocks.rows, "COLS": blocks.cols, "INNER": blocks.inner,
        "RANK": rank_block, "RANK_STEPS": triton.cdiv(rank, rank_block), "GROUP": blocks.group,
        "IN_CONTIGUOUS": in_contiguous, "EVEN_IN": num_in % blocks.inner == 0, "X_TMA": x_tma, "WEIGHT_TMA": weight_tma,
        "HAS_OFFSETS": num_experts > 1, "FLATTEN": blocks.flatten,
    }  # fmt: skip
    possible = "GATHER", "BIAS", "SCALE", "SWIGLU", "PRE_ACTIVATION", "LORA_GROUPS"
    constexprs |= {f"HAS_{flag}": flag in flags for flag in possible}
    del signature["stride_up_rank" if in_contiguous else "stride_up_out"]
    constexprs["stride_up_rank" if in_contiguous else "stride_up_out"] = 1
    divisible = tuple(name for name, type_ in signature.items() if type_.startswith("*") or name.startswith("stride"))
    sizes = {"num_in": num_in, "num_out": num_out, "rank": rank, "slice_rank": rank}
    divisible += tuple(name for name, size in sizes.items() if size and size % 16 == 0)
    return compile_for(grouped_gemm_kernel, signature, constexprs, arch, num_warps=blocks.num_warps,
                       num_stages=blocks.num_stages, divisible=divisible)


USES = {
    "gate_up": dict(rank=16, flags=("GATHER", "BIAS", "SWIGLU", "PRE_ACTIVATION")),
    "gate_up at rank 64": dict(rank=64, flags=("GATHER", "BIAS")),
    "gate_up of few rows": dict(rank=16, num_rows=2048, flags=("GATHER", "BIAS", "SWIGLU", "PRE_ACTIVATION")),
    "gate_up of 128 experts": dict(rank=16, num_experts=128, flags=("GATHER", "BIAS", "SWIGLU")),
    "down": dict(num_out=2880, rank=16, flags=("BIAS",)),
    "queries, keys and values": dict(num_out=5120, num_experts=1, num_rows=8192, rank=48, flags=("BIAS", "LORA_GROUPS")),
    "gradient of rows": dict(num_in=5760, num_out=2880, rank=16, in_contiguous=False),
    "gradient of gathered rows": dict(num_out=2880, rank=16, in_contiguous=False, flags=("GATHER",)),
    "gradient of few rows": dict(num_in=5760, num_out=2880, num_rows=2048, rank=16, in_contiguous=False),
    "fp16": dict(dtype=torch.float16, rank=16, flags=("BIAS",)),
    "x A of fp32 masters": dict(num_out=16, weight_dtype=torch.float32, flags=("GATHER", "SCALE")),
    "x A of three projections at rank 32": dict(num_out=96, num_experts=1, num_rows=8192, weight_dtype=torch.float32,
                                                flags=("SCALE",)),
    "x A at rank 128": dict(num_out=128, weight_dtype=torch.float32, flags=("GATHER", "SCALE")),
    "dy B at rank 256": dict(num_in=5760, num_out=256, weight_dtype=torch.float32, in_contiguous=False, flags=("SCALE",)),
    "x A at rank 64": dict(num_out=64, weight_dtype=torch.float32, flags=("SCALE",)),
    "dy B of fp32 masters": dict(num_in=5760, num_out=16, weight_dtype=torch.float32, in_contiguous=False, flags=("SCALE",)),
    "dense (x A) B": dict(num_in=16, num_out=4096, num_experts=1, weight_dtype=torch.float32, flags=("BIAS",)),
    "dense dy A": dict(num_in=16, num_out=2880, num_experts=1, weight_dtype=torch.float32, in_contiguous=False),
}  # fmt: skip


# the others on Hopper alone, for time
EVERYWHERE = ("gate_up", "down", "gradient of rows", "x A of fp32 masters", "dy B at rank 256")


@pytest.mark.parametrize("use, arch", [(use, arch) for use in USES for arch in ARCHITECTURES if arch == 90 or use in EVERYWHERE])
def test_grouped_gemm_fits_every_gpu_and_uses_its_tensor_cores(use, arch):
    resources = compile_gemm(arch, **USES[use])
    # Hopper's tiles of gate_up use every register; Triton 3.6, which they were timed with, spills none, later ones a few once per
    # tile, outside the loop over K
    later = arch == 90 and use.startswith("gate_up") and not triton.__version__.startswith("3.6.")
    check_fits(resources, arch, max_stack=96 if later else 0)
    assert resources.has_mma
    if arch == 90:
        assert resources.mma == {"HGMMA"}, resources.mma
    if resources.mma == {"HMMA"}:  # an instruction multiplies 16 inputs in a row, as for few rows
        assert resources.operand_widths == {2}


@pytest.mark.parametrize("arch", [86, 90])
def test_grouped_gemm_in_fp32_fits(arch):
    check_fits(compile_gemm(arch, dtype=torch.float32, num_in=96, num_out=64 * 3, rank=4, flags=("BIAS",)), arch)
    check_fits(compile_gemm(arch, dtype=torch.float32, num_in=96, num_out=4, flags=("SCALE",)), arch)


def compile_outer(arch, num_n, *, dtype=torch.bfloat16, chunk=0, gather=False, row_scale=False):
    kind, blocks = KINDS[dtype], choose_outer_blocks(family_of(arch), dtype, num_n)
    signature = {name: "i32" for name in grouped_outer_kernel.arg_names if name.startswith(("stride", "num_"))} | {
        "a": f"*{kind}", "b": f"*{kind}", "out": "*fp32", "offsets": "*i32", "gather": "*i32", "row_scale": "*fp32",
    }  # fmt: skip
    del signature["stride_out_n"]
    constexprs = {
        "stride_out_n": 1, "EXPERTS": NUM_EXPERTS, "M": blocks.m, "N": blocks.n, "ROWS": blocks.rows, "CHUNK": chunk,
        "HAS_OFFSETS": True, "HAS_GATHER": gather, "HAS_ROW_SCALE": row_scale,
    }  # fmt: skip
    divisible = tuple(name for name, type_ in signature.items() if type_.startswith("*") or name.startswith("stride"))
    return compile_for(grouped_outer_kernel, signature, constexprs, arch, num_warps=blocks.num_warps,
                       num_stages=compiled_stages(blocks, has_gather=gather), divisible=(*divisible, "num_m", "num_n"))


@pytest.mark.parametrize("options, arch", [
    *((dict(num_n=16, chunk=CHUNK_ROWS, gather=True), arch) for arch in ARCHITECTURES),
    *((dict(num_n=5760, gather=True), arch) for arch in ARCHITECTURES),
    (dict(num_n=64, chunk=CHUNK_ROWS, row_scale=True), 90), (dict(num_n=16), 90), (dict(num_n=2880, row_scale=True), 90),
])  # fmt: skip
def test_grouped_outer_fits_every_gpu_and_uses_its_tensor_cores(options, arch):
    resources = compile_outer(arch, **options)
    check_fits(resources, arch)
    assert resources.has_mma
    if arch == 90:
        assert resources.mma == {"HGMMA"}, resources.mma


@pytest.mark.parametrize("arch", [86, 90])
def test_sums_fit(arch):
    check_fits(compile_outer(arch, num_n=96, dtype=torch.float32), arch)
    signature = {"partial": "*fp32", "out": "*fp32", "offsets": "*i32", "num_rows": "i32", "num_experts": "i32", "size": "i32"}
    constexprs = {"EXPERTS": NUM_EXPERTS, "CHUNK": CHUNK_ROWS, "BLOCK": 1024, "HAS_OFFSETS": True}
    check_fits(compile_for(sum_chunks_kernel, signature, constexprs, arch, num_warps=4, num_stages=3), arch)


@pytest.mark.parametrize("arch", [75, 86, 90])
def test_sums_of_rows_fit(arch):
    signature = {"x": half(arch), "out": half(arch), "offsets": "*i32", "width": "i32", "stride_x": "i32"}
    check_fits(compile_for(grouped_row_sum_kernel, signature, {"ROWS": 32, "COLS": 128}, arch, num_warps=4, num_stages=3), arch)
