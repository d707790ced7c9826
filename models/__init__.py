from pathlib import Path

from kernels import __file__ as kernels_file

# The package index has an unrelated package of this name, which hides ours where it comes first on sys.path.
_ours = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
if kernels_file is None or Path(kernels_file).resolve() != _ours:
    raise ImportError(
        f"the package `kernels` comes from {kernels_file}, but a checkout of this project needs its own, {_ours}; run from the "
        "checkout's folder, or install the project's wheel (pip install CHECKOUT), which has its packages inside `grpo`"
    )
