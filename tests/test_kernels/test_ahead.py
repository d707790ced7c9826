"""Kernels compiled ahead of a launch: under the key that the launch looks for."""

import copy
import types
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.ahead import Recording, compile_all, variant_of
from kernels.device import FP_FUSION, Gpu, launch
from kernels.embedding import _gather_kernel
from kernels.experts.gemm import grouped_gemm
from kernels.experts.sorting import make_routing
from kernels.norm import rms_norm

HOPPER = Gpu(90, 132)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of Triton's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def gpu(monkeypatch):
    """For Triton, a GPU of compute capability 9.0 that cannot launch."""
    target = GPUTarget("cuda", HOPPER.capability, 32)
    active = types.SimpleNamespace(get_current_device=lambda: "a test's", get_current_stream=lambda device: 0,
                                   get_current_target=lambda: target)
    monkeypatch.setattr(driver, "_active", active)
    return target


def on_meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def norm():
    rms_norm(on_meta(2000, 64), on_meta(64), eps=1e-5)


def dense_by_descriptors():
    grouped_gemm(on_meta(300, 128), on_meta(1, 256, 128).transpose(1, 2), None, bias=on_meta(1, 256))


def sort():
    make_routing(on_meta(40, 3, dtype=torch.int64), num_experts=8)


def recorded(function):
    """What a function launches: kernel, arguments and constants; and the variants."""
    recording, launches = Recording(HOPPER), []

    with pytest.MonkeyPatch.context() as patch:
        own = recording._record
        patch.setattr(recording, "_record", lambda *launch: (launches.append(launch), own(*launch)))
        with recording.on():
            function()
    return launches, recording.variants()


@pytest.mark.parametrize("function", [norm, dense_by_descriptors, sort])
def test_a_launch_finds_what_was_compiled_ahead(function, cache, gpu):
    """JITFunction.warmup does what a launch does up to the launch itself."""
    launches, variants = recorded(function)
    assert not any(variant.is_cached() for variant in variants)
    for variant in variants:
        triton.compile(variant.source, target=variant.target, options=variant.options)
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")}
    assert len(made) == len(variants) == len(launches) and all(variant.is_cached() for variant in variants)
    for kernel, arguments, constants in launches:
        kernel.run(*arguments, grid=(1,), warmup=True, **FP_FUSION | constants)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")} == made


def test_variants_differ_by_what_a_kernel_is_compiled_for(gpu):
    def key(num_rows, width, offset=0):
        x = on_meta(num_rows * width + offset)[offset:].view(num_rows, width)
        (variant,) = recorded(lambda: rms_norm(x, on_meta(width), eps=1e-5))[1]
        return variant.cache_key()

    assert key(1, 64) == key(17, 64) == key(1024, 64)
    assert len({key(1, 64), key(1025, 64), key(1, 128), key(1, 64, offset=1)}) == 4  # rows that overlap, width, alignment
    kernel, arguments, constants = recorded(lambda: rms_norm(on_meta(4, 64), on_meta(64), eps=1e-5))[0][0]
    others = [variant_of(kernel, GPUTarget("cuda", capability, 32), arguments, constants) for capability in (80, 90)]
    assert others[0].cache_key() != others[1].cache_key() == key(4, 64)


@pytest.mark.parametrize("default", ["0", "1"])
def test_whether_multiply_adds_are_fused_does_not_depend_on_tritons_default(monkeypatch, default):
    def options(**constants):
        recording = Recording(HOPPER)
        with recording.on():
            launch(_gather_kernel, (1,), on_meta(1, dtype=torch.int64), *2 * [on_meta(4, 8)], WIDTH=8, BLOCK=8, **constants)
        (variant,) = recording.variants()
        return variant.options["enable_fp_fusion"]

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    assert triton.knobs.language.default_fp_fusion is (default == "1")
    assert options() is True and options(enable_fp_fusion=False) is False


def test_what_fails_to_compile_is_named_and_the_rest_is_compiled(cache, capfd):
    _, variants = recorded(norm)
    source, counts = copy.copy(variants[0].source), []
    source.constants = source.constants | {(source.fn.arg_names.index("BLOCK"),): 3}  # must be a power of two
    broken = variants[0]._replace(source=source)
    failures = compile_all([broken, *variants], num_processes=1, progress=lambda done, count: counts.append((done, count)))
    assert len(failures) == 1 and failures[0].startswith("_norm_kernel: ")
    assert counts == [(0, 2), (1, 2), (2, 2)] and variants[0].is_cached()
    assert compile_all(variants, num_processes=1, progress=lambda *_: pytest.fail("nothing is left to compile")) == []
