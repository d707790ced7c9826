"""Runs the tests of one file that are marked `interpreter`, in a process of their own.

Triton decides when a kernel is decorated whether it is interpreted, so one process cannot do both. Mark tests with
`@pytest.mark.interpreter` (or a class or module of them) and let one plain test of the file call
run_interpreter_tests(__file__). tests/test_kernels/conftest.py leaves marked tests out of a normal run, and keeps only
them where TRITON_INTERPRET=1; to run one by hand: TRITON_INTERPRET=1 pytest tests/test_kernels/test_x_triton.py -k name.
There, public functions run the kernels on CPU tensors (kernels.launch.is_triton). Use float32: the interpreter's bfloat16
is silently wrong."""

import os
import re
import subprocess
import sys


def run_interpreter_tests(file: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"in the interpreter:\n{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed.group(1)) > 0, f"no interpreter test ran:\n{result.stdout[-2000:]}"
