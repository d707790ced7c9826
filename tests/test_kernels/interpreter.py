"""Runs kernels in Triton's interpreter, for tests marked `interpreter` (tests/test_kernels/conftest.py).

Triton decides when a kernel is decorated whether it is interpreted. Here kernels are decorated for a GPU, so that other tests of
the same process compile them; for the time of an interpreter test every kernel stands for its interpreted twin, and
TRITON_INTERPRET=1 in the environment lets public functions run kernels on CPU tensors (kernels.device.is_triton). Use float32:
the interpreter's bfloat16 is silently wrong."""

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import triton.language as tl
from paths import ROOT
from triton.runtime import JITFunction, interpreter

twin_of = functools.cache(interpreter.InterpretedFunction)  # of the plain function that a kernel decorates


# where the interpreter puts functions of its own
LANGUAGE = (tl, tl.core, tl.math, tl.dtype, tl.tensor, tl.core.tensor_descriptor_base)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Here kernels of this project, of its tests and of Triton's own library are interpreted."""
    before = [(part, dict(vars(part))) for part in LANGUAGE]
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch)
        try:
            yield
        finally:
            for part, attributes in before:
                for name in set(vars(part)) - set(attributes):
                    delattr(part, name)
                for name, value in attributes.items():
                    if vars(part)[name] is not value:
                        setattr(part, name, value)


def interpret(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("TRITON_INTERPRET", "1")
    save_time(patch)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name.startswith("triton.language") or file.startswith(str(ROOT)):
            for attribute, kernel in list(vars(module).items()):
                if isinstance(kernel, JITFunction):
                    patch.setattr(module, attribute, twin_of(kernel.fn))


def save_time(patch: pytest.MonkeyPatch) -> None:
    """Leaves out work of Triton's interpreter that changes no result; most of its time goes into such things, not numbers."""
    # overflow is computed in int64 after each operation on integers, but looked at in debug mode only
    patch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False))

    plain_dtype, dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = plain_dtype(dtype)
        return dtypes[name]

    patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)

    # every value makes objects for its type and shape, which are those of many others
    remember(patch, tl.block_type, lambda element_ty, shape: (element_ty.name, *map(tl.core._unwrap_if_constexpr, shape)),
             lambda made, element_ty, shape: vars(made).update(element_ty=element_ty))
    remember(patch, tl.tensor, lambda handle, type: type.name,
             lambda made, handle, type: vars(made).update(handle=handle, type=type, dtype=type.scalar))
    plain_unwrap, unwrapped = tl.core._unwrap_if_constexpr, frozenset((int, float, bool, tl.tensor, tl.dtype, type(None)))
    patch.setattr(tl.core, "_unwrap_if_constexpr", lambda value: value if type(value) in unwrapped else plain_unwrap(value))

    # each launch, and each call of a function by a kernel, puts functions of the interpreter into triton.language: once is enough
    function = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})  # sees all of the language
    interpreter._patch_lang(function)
    patch.setattr(interpreter, "_patch_lang", lambda _: types.SimpleNamespace(restore=lambda: None))


def remember(patch: pytest.MonkeyPatch, owner: type, key_of: Callable, fill: Callable) -> None:
    """From now on a new object gets the attributes of the first with its key; `fill` sets those that are its own."""
    plain, known = owner.__init__, {}

    def initialize(made, *arguments):
        key = key_of(*arguments)
        if (attributes := known.get(key)) is None:
            plain(made, *arguments)
            known[key] = dict(vars(made))
        else:
            vars(made).update(attributes)
            fill(made, *arguments)

    patch.setattr(owner, "__init__", initialize)
