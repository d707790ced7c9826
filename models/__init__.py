from pathlib import Path

import kernels

# The package index has an unrelated package of this name, which hides ours where it comes first on sys.path.
_ours = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
if kernels.__file__ is None or Path(kernels.__file__).resolve() != _ours:
    raise ImportError(
        f"the package `kernels` comes from {kernels.__file__}, but this project needs its own, {_ours}; "
        "remove the other one (pip uninstall kernels) or use an environment of its own (make quickstart makes one)"
    )
