"""What every kernel shares: marks on tuned sizes, and how a kernel is launched."""

import ast
import importlib
import pkgutil
import threading
from pathlib import Path

import pytest
import torch

import kernels.device
from kernels.device import (
    Gpu,
    Tuned,
    aligned_rows,
    launch,
    num_multiprocessors,
    recording,
    room_for_this_thread,
    take_compilations,
)

FAMILIES = {"ampere", "consumer", "hopper", "blackwell"}


# what only some families do otherwise
ONLY_SOME = {"kernels.attention.decode._CROWDED", "kernels.head.tiles._FEW_ROWS", "kernels.head.tiles._SMALL_PARTS"}


def tables() -> dict[str, dict[str, Tuned]]:
    """Every table of sizes by GPU family, under module and name."""
    found = {}
    for module in pkgutil.walk_packages(kernels.__path__, "kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, dict) and any(isinstance(entry, Tuned) for entry in value.values()):
                found[f"{module.name}.{name}"] = value
    return found


def test_every_size_by_gpu_family_says_whether_it_was_measured():
    found = tables()
    assert {name.split(".")[1] for name in found} == {"attention", "experts", "head", "linear", "router"}
    for name, table in found.items():
        assert all(isinstance(entry, Tuned) for entry in table.values()), name
        assert FAMILIES <= set(table) or name in ONLY_SOME, name
        measured = {family for family, entry in table.items() if entry.is_measured}
        assert measured == ({"hopper"} if name != "kernels.head.kl._BLOCKS" else set()), name


class _Kernel:
    """Stands for a kernel: keeps what it is launched with."""

    arg_names = ["x", "BLOCK"]

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.__dict__.update(constants)


def test_a_launch_says_whether_multiply_adds_are_fused():
    kernel = _Kernel()
    launch(kernel, (1,), torch.ones(1), BLOCK=2)
    assert kernel.enable_fp_fusion is True
    launch(kernel, (1,), torch.ones(1), BLOCK=2, enable_fp_fusion=False)
    assert kernel.enable_fp_fusion is False


def direct_launches(tree: ast.AST, *, is_kernels: bool) -> list[str]:
    """Calls of something[...], where that may be a kernel, and what compiles kernels without a launch."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            name = ast.unparse(node.func.value)
            if name.endswith("kernel") or is_kernels and name not in ("dict", "list", "set"):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Attribute) and (is_kernels and node.attr == "warmup" or ast.unparse(node) == "triton.compile"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triton"):
            found += [ast.unparse(node) for alias in node.names if alias.name == "compile"]
    return found


def test_every_kernel_is_launched_or_compiled_where_fused_multiply_adds_are_set():
    root = Path(kernels.device.__file__).parent.parent
    found = {str(path.relative_to(root)): calls for folder in ("kernels", "models", "grpo", "scripts")
             for path in sorted((root / folder).rglob("*.py")) if path != Path(kernels.device.__file__)  # its launch() sets them
             if (calls := direct_launches(ast.parse(path.read_text()), is_kernels=folder == "kernels"))}
    assert found == {"kernels/ahead.py": ["from triton import compile as compile_kernel"], "kernels/linear.py": ["modules[0](x)"]}


@pytest.mark.parametrize("source", ["_norm_kernel[(3,)](x, BLOCK=2)", "(a if b else c)[grid](x)", "kernel[grid](x, **constants)",
                                    "kernel.warmup(x, grid=(1,))", "triton.compile(source)",
                                    "from triton.compiler import compile as c"])
def test_a_planted_launch_is_found(source):
    assert len(direct_launches(ast.parse(source), is_kernels=True)) == 1


def test_what_takes_long_at_its_first_launch_was_compiled(monkeypatch):
    """What is in Triton's cache is read in some milliseconds."""
    monkeypatch.setattr(kernels.device, "_COMPILATIONS", [("_norm_kernel", 0.02), ("_dq_kernel", 1.3)])
    assert take_compilations() == [("_dq_kernel", 1.3)] and take_compilations() == []


def test_tensors_of_one_allocation_are_aligned_for_any_number_of_rows():
    for num_rows, dtype in ((1, torch.float32), (3, torch.int32), (5, torch.bfloat16)):
        tensors = aligned_rows(3, num_rows, 7, dtype=dtype, device=torch.device("meta"))
        assert tensors.shape == (3, num_rows, 7) and all(tensor.is_contiguous() for tensor in tensors)
        assert [tensor.data_ptr() % 16 for tensor in tensors] == [0, 0, 0]


def test_persistent_grids_of_other_threads_leave_room_and_this_one_s_do_not():
    x, found = torch.empty(1, device="meta"), []
    with recording(Gpu(90, 132), lambda *_: None):
        with room_for_this_thread(1 / 6):
            found.append(num_multiprocessors(x))
            other = threading.Thread(target=lambda: found.append(num_multiprocessors(x)))
            other.start()
            other.join()
        found.append(num_multiprocessors(x))
    assert found == [132, 110, 132]
