"""Runs the tests of one file that are marked `interpreter`, in a process of their own.

Triton decides when a kernel is decorated whether it is interpreted, so one process cannot do both. A server process imports
torch and Triton once, and forks a child for each file. Mark tests with
`@pytest.mark.interpreter` (or a class or module of them) and let one plain test of the file call
run_interpreter_tests(__file__). tests/test_kernels/conftest.py leaves marked tests out of a normal run, and keeps only
them where TRITON_INTERPRET=1; to run one by hand: TRITON_INTERPRET=1 pytest tests/test_kernels/test_x_triton.py -k name.
There, public functions run the kernels on CPU tensors (kernels.device.is_triton). Use float32: the interpreter's bfloat16
is silently wrong."""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache

SERVER = r"""
import json, os, sys
import numpy, pytest, safetensors.torch, torch, triton.language, triton.runtime.interpreter

for line in sys.stdin:
    command = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.environ.clear()
        os.environ.update(command["environment"])
        os.chdir(command["folder"])
        descriptor = os.open(command["output"], os.O_WRONLY)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 70
        try:
            code = int(pytest.main(command["arguments"]))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
SETTINGS = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # pytest rewrites every file of a plugin's package


@cache
def _server() -> subprocess.Popen:
    """Ends with this process, which closes its input."""
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=os.environ | SETTINGS)


def run_interpreter_tests(file: str) -> None:
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        arguments = ["-q", "--no-header", "-p", "no:cacheprovider", file]
        command = {"arguments": arguments, "environment": os.environ | SETTINGS, "folder": os.getcwd(), "output": output.name}
        server = _server()
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        code, text = int(server.stdout.readline()), output.read()
    assert code == 0, f"in the interpreter, which ended with code {code}:\n{text[-8000:]}"
    passed = re.search(r"(\d+) passed", text)
    assert passed and int(passed.group(1)) > 0, f"no interpreter test ran:\n{text[-2000:]}"


def save_time() -> None:
    """Leaves out work of Triton's interpreter that changes no result; most of its time goes into such things, not numbers."""
    from triton.runtime import interpreter

    # overflow is computed in int64 after each operation on integers, but looked at in debug mode only
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    plain_dtype, dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = plain_dtype(dtype)
        return dtypes[name]

    interpreter._get_np_dtype = numpy_dtype

    # every call of a function by a kernel patches triton.language again, which the launch and the first call have done
    first_call = interpreter.InterpretedFunction.__call__

    def call(self, *arguments, **settings):
        if self.fn not in self.rewritten_fn:
            return first_call(self, *arguments, **settings)
        try:
            return self.rewritten_fn[self.fn](*arguments, **settings)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
