"""Which path serves a tensor, and what the kernels know about a GPU.

CUDA tensors run the Triton kernels, CPU tensors the PyTorch references. In Triton's interpreter (TRITON_INTERPRET=1 in the
environment when the kernels are imported) CPU tensors run the kernels too. Tensors on the device "meta", which have no memory,
stand for those of a GPU that need not be there: inside `with recording(...)` launches are recorded, so that kernels can be
compiled before they are needed (ahead.py).

Block sizes are in tables beside each kernel, by GPU family: GPUs with the same tensor cores and shared memory have one entry.
Every entry says whether it was measured (Tuned). Kernels that only move memory (norm, rope, swiglu, the sort, unpacking) have one
size for every family.

Triton does not drive the tensor cores of GPUs below compute capability 8.0 (T4). There the vendor's library computes matrix
products, and Triton or PyTorch the rest. `product_path` chooses. To test that path, GRPO_PRODUCTS=library in the environment
chooses it on any other GPU and on the CPU.

Those GPUs have no bfloat16 either, so a model is float16 there. Two tensors of gpt-oss exceed float16's 65504: the residual
stream, in which a few channels of a few tokens grow large, and the down projection's output, which makes them grow. Both are kept
in float32: grouped_gemm writes into an `out` of any dtype, sum_rows and combine return the residual's dtype, add_rms_norm takes a
float32 residual with a float16 x, and rms_norm returns the dtype that it is asked for. All other tensors are outputs of a norm, a
clamped activation or attention, and stay far below.
"""
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# compute capability -> family; a newer GPU that is not listed gets the sizes that fit everywhere, those of "consumer"
_FAMILIES = {
    80: "ampere", 87: "ampere",  # A100
    86: "consumer", 89: "consumer", 120: "consumer", 121: "consumer",  # RTX 30, 40, 50, L4: mma.sync, small shared memory
    90: "hopper",  # H100, H200: wgmma
    100: "blackwell", 103: "blackwell", 110: "blackwell",  # B200: tcgen05
}
# bytes of shared memory one program may use
SHARED_MEMORY = {"turing": 65_536, "ampere": 166_912, "consumer": 101_376, "hopper": 232_448, "blackwell": 232_448}


class Tuned(NamedTuple):
    """An entry of a table: what a kernel is launched with on one GPU family."""

    blocks: Any
    is_measured: bool  # the fastest on a GPU of the family (Hopper: H200); if false, only known to compile and to fit


def measured(blocks: Any) -> Tuned:
    return Tuned(blocks, True)


def unmeasured(blocks: Any) -> Tuned:
    return Tuned(blocks, False)


# families on which launches for few rows overlap (programmatic dependent launch): a launch starts while the one before it ends,
# and waits before it reads the other's results. Without overlap a GPU idles for 1 to 2 us between two launches
OVERLAP_FAMILIES = ("hopper",)
MAX_OVERLAPPING_ROWS = 1024  # launches for more rows are too long to gain anything
# up to this many rows, a product costs as much as reading its weights; tests compare bits with the many-rows kernels up to here
MAX_FEW_ROWS = 512


class Gpu(NamedTuple):
    """What launches depend on."""

    capability: int  # 90 for 9.0
    num_multiprocessors: int


_RECORDINGS: list[tuple[Gpu, Callable]] = []  # the innermost last


@contextmanager
def recording(gpu: Gpu, record: Callable) -> Iterator[None]:
    """Inside the `with`, tensors on "meta" count as tensors of this GPU, and launch() calls record(kernel, arguments, constants)
    instead of compiling and launching."""
    _RECORDINGS.append((gpu, record))
    try:
        yield
    finally:
        _RECORDINGS.pop()


def is_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda or x.is_meta


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_triton(x: torch.Tensor) -> bool:
    """Whether x is served by Triton kernels rather than by the PyTorch references."""
    return is_gpu(x) or is_interpreted()


def product_path(x: torch.Tensor) -> str:
    """What computes matrix products with x: "reference" (CPU), "triton" or "library"; see the head of this file.

    Raises ValueError for a GRPO_PRODUCTS that is neither unset nor "library"."""
    forced = os.environ.get("GRPO_PRODUCTS")
    if forced not in (None, "", "library"):
        raise ValueError(f"GRPO_PRODUCTS={forced!r}; set it to library, or unset it and the GPU decides")
    if forced or gpu_family(x) == "turing":
        return "library"
    return "triton" if is_triton(x) else "reference"


def family_of(capability: int) -> str:
    """The family of a compute capability written as an integer, 90 for 9.0: a key of SHARED_MEMORY."""
    return _FAMILIES.get(capability, "consumer" if capability >= 80 else "turing")


def gpu_family(x: torch.Tensor) -> str:
    """The family of x's GPU; "interpreter" for CPU tensors."""
    return family_of(_gpu_of(x).capability) if is_gpu(x) else "interpreter"


def num_multiprocessors(x: torch.Tensor) -> int:
    """Multiprocessors of x's GPU that a persistent grid of this thread may fill; 2 in the interpreter."""
    if not is_gpu(x):
        return 2
    count = _gpu_of(x).num_multiprocessors
    if _ROOMS and threading.get_ident() != _ROOMS[-1][0]:
        count -= int(_ROOMS[-1][1] * count)
    return count


_ROOMS: list[tuple[int, float]] = []  # a thread, and the share of the multiprocessors that others leave to it; the innermost last


@contextmanager
def room_for_this_thread(share: float) -> Iterator[None]:
    """Inside the `with`, persistent grids that other threads launch leave this share of the multiprocessors free. Such a grid
    runs for milliseconds and holds all that it fills: small kernels of another stream would wait for it to end, whatever their
    priority. No bit depends on it: programs take tiles in turn, and each tile is computed alone."""
    _ROOMS.append((threading.get_ident(), share))
    try:
        yield
    finally:
        _ROOMS.pop()


def _gpu_of(x: torch.Tensor) -> Gpu:
    if x.is_cuda:
        return gpu_of_device(x.device)
    assert _RECORDINGS, "a tensor on meta stands for a GPU's only while launches are recorded"
    return _RECORDINGS[-1][0]


@cache
def gpu_of_device(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on a device. For a GPU it is pinned first: a copy from unpinned memory makes the host wait until the GPU has
    done all earlier work."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes 5 us on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, 1 for n = 0; triton.next_power_of_2 takes ten times as long."""
    return 1 << max(0, n - 1).bit_length()


def aligned_rows(count: int, num_rows: int, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`count` uninitialised tensors [num_rows, ...] in one allocation, each at a multiple of 16 bytes for any number of rows:
    otherwise kernels would be compiled for several alignments."""
    return torch.empty(count, cdiv(num_rows, 16 // dtype.itemsize) * (16 // dtype.itemsize), *shape, dtype=dtype,
                       device=device)[:, :num_rows]


def _trait(argument: object) -> object:
    """The properties of a runtime argument that a kernel is compiled for: at least those that Triton specialises on."""
    kind = type(argument)
    if kind is int:
        return (argument & 15 == 0) + 2 * (argument == 1) + 4 * (-(2**31) <= argument < 2**31)
    if argument is None or kind is float:
        return kind
    if kind is TensorDescriptor:
        return argument.base.dtype, *argument.block_shape
    if isinstance(argument, torch.Tensor):
        return argument.dtype if argument.data_ptr() & 15 == 0 else (argument.dtype,)
    raise TypeError(f"launch: an argument of {kind}; give tensors, descriptors, ints, floats or None")


def _trait_without_alignment(argument: object) -> object:
    """The same for an argument in do_not_specialize_on_alignment."""
    if type(argument) is int:
        return 2 * (argument == 1) + 4 * (-(2**31) <= argument < 2**31)
    return argument.dtype if isinstance(argument, torch.Tensor) else _trait(argument)


def _type(argument: object) -> object:
    """The same for an argument in do_not_specialize: lengths and counts, which change from batch to batch."""
    if type(argument) is int:
        return -(2**31) <= argument < 2**31
    return argument.dtype if isinstance(argument, torch.Tensor) else _trait(argument)


_TRAITS: dict[int, tuple[Callable[[object], object], ...]] = {}  # by a kernel's id: Triton computes its hash at every look-up


def _traits_of(kernel: JITFunction) -> tuple[Callable[[object], object], ...]:
    """For each parameter of a kernel, the function that gives the properties of its argument."""
    if (traits := _TRAITS.get(id(kernel))) is not None:
        return traits
    traits = tuple(_type if parameter.do_not_specialize else _trait_without_alignment if parameter.do_not_specialize_on_alignment
                   else _trait for parameter in kernel.params)
    return _TRAITS.setdefault(id(kernel), traits)


def launch_key(kernel: JITFunction, arguments: tuple, constants: dict) -> tuple:
    """Equal for launches of one kernel on one GPU that run the same machine code."""
    return *constants.items(), *[trait(argument) for trait, argument in zip(_traits_of(kernel), arguments)]


FP_FUSION = {"enable_fp_fusion": True}
_COMPILED: dict[tuple, object] = {}  # kernels that launch() compiled, by everything that they were compiled for
_COMPILATIONS: list[tuple[str, float]] = []  # the names of those kernels, and the seconds that each took
_COMPILE_SECONDS = 0.1  # a kernel that is in Triton's cache takes less


def take_compilations() -> list[tuple[str, float]]:
    """The kernels that launches have compiled since the last call, with the seconds of each."""
    taken = [(name, seconds) for name, seconds in _COMPILATIONS if seconds > _COMPILE_SECONDS]
    _COMPILATIONS.clear()
    return taken


def _constexprs(kernel, arguments: tuple, constants: dict) -> tuple:
    names = kernel.arg_names[len(arguments):]
    missing = [name for name in names if name not in constants]
    assert not missing, f"launch of {kernel}: no value for {missing}; defaults do not count"
    return tuple(constants[name] for name in names)


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Does kernel[grid](*arguments, **constants) in 6 to 12 us of host time instead of 20 to 100: after the first launch it calls
    the compiled kernel directly. arguments: all runtime arguments, in order; constants: the constexprs and the compiler's options
    (num_warps, num_stages). Products and sums become fused multiply-adds unless enable_fp_fusion is false: bits depend on it, so
    it is set here, not by Triton's default or environment variable."""
    if not isinstance(kernel, JITFunction):  # interpreted
        _constexprs(kernel, arguments, constants)
        kernel[grid](*arguments, **FP_FUSION | constants)
        return
    if _RECORDINGS:
        _constexprs(kernel, arguments, constants)
        _RECORDINGS[-1][1](kernel, arguments, constants)
        return
    key = (id(kernel), torch.cuda.current_device(), *launch_key(kernel, arguments, constants))
    found = _COMPILED.get(key)
    if found is None:
        constexprs, started = _constexprs(kernel, arguments, constants), time.perf_counter()
        _COMPILED[key] = kernel[grid](*arguments, **FP_FUSION | constants), constexprs
        _COMPILATIONS.append((kernel.fn.__name__, time.perf_counter() - started))
        return
    compiled, constexprs = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *constexprs)


def is_few(x: torch.Tensor) -> bool:
    """Whether kernels for few rows serve x [rows, width]. They give the same bits as the kernels for many rows. Never in float16,
    whose routed rows are float32."""
    return len(x) <= MAX_FEW_ROWS and x.dtype != torch.float16 and product_path(x) == "triton"


def can_overlap(x: torch.Tensor, num_rows: int) -> bool:
    return num_rows <= MAX_OVERLAPPING_ROWS and gpu_family(x) in OVERLAP_FAMILIES


def overlap_constants(x: torch.Tensor, num_rows: int) -> dict[str, bool]:
    """The constants that launch() needs for a kernel that calls wait_for_launch_before(OVERLAPS), for `num_rows` rows of x."""
    return {"OVERLAPS": True, "launch_pdl": True} if can_overlap(x, num_rows) else {"OVERLAPS": False}


@triton.jit
def prefetch(pointers):
    """Starts loading the lines of global memory that hold these elements into the L2 cache."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1];\nmov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32,
                              is_pure=False, pack=1)


@triton.jit
def wait_for_launch_before(OVERLAPS: tl.constexpr):
    """Waits until every launch before this one is complete, then lets the next one start. So when a launch starts, all launches
    are complete except the one directly before it. Call this before reading another launch's results and before any write."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def check_served(operation: str, tensors: dict[str, torch.Tensor], *, dtypes: tuple[torch.dtype, ...],
                 tensor_cores: bool) -> None:
    """Raises ValueError, with the reason, if a kernel cannot serve these tensors: several devices, a dtype that it does not have,
    bfloat16 on a GPU without it, or (`tensor_cores`: products in Triton) a GPU whose tensor cores Triton does not drive."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, the others on {device}; move them to one device")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{operation}: {name} is {tensor.dtype}; the kernel takes {', '.join(map(str, dtypes))}")
    if gpu_family(next(iter(tensors.values()))) != "turing":
        return
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            raise ValueError(f"{operation}: {name} is bfloat16, which GPUs of compute capability below 8.0 do not compute in; "
                             "use a model in float16 (dtype=float16, or auto)")
    if tensor_cores:
        raise ValueError(f"{operation}: this GPU has compute capability below 8.0, where Triton has no tensor-core path, and "
                         "this operation no other; use a GPU of capability 8.0 or later")
