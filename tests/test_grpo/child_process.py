"""Starts Python code in a process of its own, which a test kills or sends signals to: a new interpreter, or a fork that has
imported torch already."""

import os
import subprocess
import sys

from paths import ROOT


def run_python(code, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment, **options)


def fork_python(entry_points, folder, code, *arguments):
    """The code as a module in this folder."""
    (folder / "forked_code.py").write_text(code)
    return entry_points.start("forked_code", *arguments, path=(folder,))
