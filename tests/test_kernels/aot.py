"""Compiles kernels for a GPU that is not there, and reads what the machine code needs from the cubin.

A launch passes pointers and strides that are multiples of 16 as such, and 1 as a constant; without the first the compiler
falls back to 2-byte loads, so compile_for marks them too. Give arguments that are 1 at run time as constexprs."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.device import SHARED_MEMORY, family_of

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
ALL_ARCHITECTURES = (75, *ARCHITECTURES)  # for kernels without matrix products
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_MMA = {"mma.sync": "HMMA", "wgmma.mma_async": "HGMMA", "tcgen05.mma": "UTCHMMA"}  # of PTX, of the machine


@dataclass(frozen=True)
class Resources:
    shared: int  # bytes per program
    stack: int  # bytes per thread; above 0 means spilled registers, which have nowhere else to go
    registers: int  # per thread
    tensor_memory: int  # columns per program, on sm_100
    warps: int  # per program
    cubin: bytes
    ptx: str
    ttgir: str  # Triton's own form, with the layout of every tensor

    @cached_property
    def sass(self) -> str:  # on demand: it takes as long as a quarter of the compilation
        return _dump(self.cubin, "-sass")

    @property
    def at_once(self) -> int:
        """At most so many programs of a launch run on one multiprocessor of sm_90 or sm_100 at a time, as far as registers and
        shared memory, 1 KB of it the system's, allow it."""
        return min(65_536 // (-(-self.registers // 8) * 8 * 32 * self.warps), 233_472 // (self.shared + 1024))

    @property
    def mma(self) -> frozenset[str]:
        """Tensor-core instructions, under the machine's names."""
        return frozenset(_MMA[name] for name in re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", self.ptx))

    @property
    def operand_widths(self) -> frozenset[int]:
        """Of every product by mma.sync: how many inputs in a row a thread holds of an operand. 2: an instruction multiplies 16
        inputs in a row; 4: parts of 32, so sums have other bits."""
        products = [line for line in self.ttgir.splitlines() if "= tt.dot " in line]
        return frozenset(int(width) for line in products for width in re.findall(r"kWidth = (\d+)", line))

    @property
    def has_mma(self) -> bool:
        return bool(self.mma)


def half(arch: int) -> str:
    """Pointers to the 16-bit type that models have on this GPU."""
    return "*bf16" if arch >= 80 else "*fp16"


def stream(arch: int) -> str:
    """Pointers to the residual stream, which does not fit float16."""
    return "*bf16" if arch >= 80 else "*fp32"


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout


def compile_for(fn, signature: dict[str, str], constexprs: dict[str, object], arch: int, *, num_warps: int, num_stages: int,
                divisible: tuple[str, ...] | None = None, enable_fp_fusion: bool = True, max_registers: int = 0) -> Resources:
    """Compiles a jitted kernel for compute capability `arch` (90 for 9.0).

    signature: type of every argument that is no constexpr, "*bf16", "*fp32", "i32", "fp32"; divisible: the arguments that
    are multiples of 16, by default all pointers and those whose name starts with "stride"; max_registers: of a thread, 0 for no
    bound."""
    if "OVERLAPS" in fn.arg_names:
        constexprs = {"OVERLAPS": False} | constexprs
    assert set(signature) | set(constexprs) == set(fn.arg_names), (sorted({*signature, *constexprs}), fn.arg_names)
    if divisible is None:
        divisible = tuple(name for name, kind in signature.items() if kind.startswith("*") or name.startswith("stride"))
    types = {name: signature.get(name, "constexpr") for name in fn.arg_names}
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn, types, constexprs, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    options |= {"maxnreg": max_registers} if max_registers else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    metadata = compiled.metadata
    return _read(compiled.asm["cubin"], metadata.shared, metadata.tmem_size or 0, metadata.num_warps, compiled.asm["ptx"],
                 compiled.asm["ttgir"])


@cache
def _read(cubin: bytes, shared: int, tensor_memory: int, warps: int, ptx: str, ttgir: str) -> Resources:
    usage = _dump(cubin, "--dump-resource-usage")
    count = {name: int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK")}
    return Resources(shared=shared, stack=count["STACK"], registers=count["REG"], tensor_memory=tensor_memory, warps=warps,
                     cubin=cubin, ptx=ptx, ttgir=ttgir)


def check_fits(resources: Resources, arch: int, *, max_stack: int = 0) -> None:
    """Asserts that a kernel stays within the shared memory of its GPU and spills no registers, or, where the caller says
    why, at most `max_stack` bytes of them per thread."""
    limit = SHARED_MEMORY[family_of(arch)]
    assert resources.shared <= limit, f"sm_{arch}: {resources.shared} bytes of shared memory, the limit is {limit}"
    assert resources.stack <= max_stack, f"sm_{arch}: spills ({resources.stack} bytes of stack)"


def check_starts(resources: Resources) -> None:
    """Asserts that programs on one multiprocessor of sm_100 have tensor memory together, of which there are 512 columns. A
    program waits for its own when it starts; if others held all of it, and waited for this one, none would go on."""
    columns = resources.at_once * resources.tensor_memory
    assert columns <= 512, f"{resources.at_once} programs at once take {columns} columns of tensor memory, there are 512"


def product_loops(sass: str) -> list[list[str]]:
    """The instructions of each innermost loop that multiplies on tensor cores."""
    lines = [(int(address, 16), re.sub(r"^@!?U?P\d+ ", "", text))
             for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)]
    loops = [(int(target[1], 16), address) for address, text in lines
             if (target := re.match(r"BRA.* 0x([0-9a-f]+)", text)) and int(target[1], 16) < address]
    innermost = [(first, last) for first, last in loops if not any(first <= a and b < last for a, b in loops)]
    bodies = [[text for address, text in lines if first <= address <= last] for first, last in innermost]
    return [body for body in bodies if any("MMA" in text.split()[0] for text in body)]
