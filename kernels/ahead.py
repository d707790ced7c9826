"""Kernels compiled before they are needed, in parallel and without a GPU: what launches would compile is recorded (Recording),
then compiled into Triton's cache on disk, where launches find it.

Launches are recorded by running code on "meta" tensors (kernels/device.py). Triton's own functions turn arguments into what a
kernel is compiled for, so the keys of the cache are those of a launch.
"""
import ctypes
import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton
from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import ASTSource, make_backend
from triton.compiler.compiler import get_cache_invalidating_env_vars
from triton.runtime import JITFunction
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import create_function_from_signature

from kernels.device import FP_FUSION, Gpu, launch_key, recording


class KernelVariant(NamedTuple):
    """A kernel and what it is compiled for."""

    source: ASTSource
    target: GPUTarget
    options: dict

    @property
    def name(self) -> str:
        return self.source.name

    def cache_key(self) -> str:
        """The name of its folder in Triton's cache."""
        backend = make_backend(self.target)
        key = get_cache_key(self.source, backend, backend.parse_options(self.options),
                            env_vars=get_cache_invalidating_env_vars())
        return hashlib.sha256(key.encode()).hexdigest()

    def is_cached(self) -> bool:
        return is_cached(self.name, self.cache_key())

    def compile(self) -> None:
        compiled = compile_kernel(self.source, target=self.target, options=self.options)
        if hasattr(nvidia, "make_launcher") and _has_driver():
            # Triton 3.6 and before: a function in C for each signature, kept in the same cache
            nvidia.CudaLauncher(self.source, compiled.metadata)


@cache
def _has_driver() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1") is not None
    except OSError:
        return False


def is_cached(name: str, cache_key: str) -> bool:
    file = f"{name[:150]}.json"
    return file in (get_cache_manager(cache_key).get_group(file) or {})


def compiler() -> tuple[str, ...]:
    """What compiles, apart from the sources; it is quick to find out."""
    return triton.__version__, *map(str, sorted(get_cache_invalidating_env_vars().items()))


def cache_folder() -> Path:
    return Path(knobs.cache.dir)


class Recording:
    """The variants that launches inside `with` would compile for a GPU, each once."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self._target = gpu, GPUTarget("cuda", gpu.capability, 32)
        self.launches: dict[tuple, KernelVariant] = {}  # by kernel and launch_key

    @contextmanager
    def on(self) -> Iterator["Recording"]:
        with recording(self.gpu, self._record):
            yield self

    def variants(self) -> list[KernelVariant]:
        """In the order of the first launches. Several launch keys may be one variant."""
        return list({variant.cache_key(): variant for variant in self.launches.values()}.values())

    def _record(self, kernel: JITFunction, arguments: tuple, constants: dict) -> None:
        key = kernel, *launch_key(kernel, arguments, constants)
        if key not in self.launches:
            self.launches[key] = variant_of(kernel, self._target, arguments, constants)


def variant_of(kernel: JITFunction, target: GPUTarget, arguments: tuple, constants: dict) -> KernelVariant:
    """What kernel[grid](*arguments, **constants) compiles on that GPU; follows JITFunction.run of Triton 3.6 and 3.7."""
    backend = make_backend(target)
    settings = FP_FUSION | constants | {"debug": kernel.debug or knobs.runtime.debug,
                                        "instrumentation_mode": knobs.compilation.instrumentation_mode}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, **settings)
    options, signature, constexprs, attributes = kernel._pack_args(backend, settings, bound, specialization, options)
    return KernelVariant(ASTSource(kernel, signature, constexprs, attributes), target, options.__dict__)


_VARIANTS: list[KernelVariant] = []  # those of compile_all, which its processes inherit


def _compile(index: int) -> str | None:
    """Returns what went wrong."""
    try:
        if index == 0 and _has_driver():
            nvidia.CudaUtils()  # compiles functions in C that every launch needs
        _VARIANTS[index].compile()
    except Exception as error:  # whatever it is: the launch that needs the kernel will tell the whole
        return f"{_VARIANTS[index].name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def compile_all(variants: list[KernelVariant], *, num_processes: int, progress: Callable[[int, int], None]) -> list[str]:
    """Compiles variants that are not in Triton's cache. Returns what went wrong; those are compiled when they are needed.
    progress(done, all) is called after each. Processes are forked: this one must not have used a GPU."""
    _VARIANTS[:] = [variant for variant in variants if not variant.is_cached()]
    failures, count = [], len(_VARIANTS)
    if not count:
        return failures
    progress(0, count)
    pool = ProcessPoolExecutor(min(num_processes, count), mp_context=multiprocessing.get_context("fork"))
    try:
        for done, future in enumerate(as_completed([pool.submit(_compile, index) for index in range(count)]), start=1):
            failures += [future.result()] if future.result() else []
            progress(done, count)
    finally:
        pool.shutdown(cancel_futures=True)
    return failures
