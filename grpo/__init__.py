import sys
from importlib.util import find_spec

_missing = [name for name in ("torch", "hydra") if find_spec(name) is None]
if _missing:  # before an entry point's own import fails with the bare name
    raise ModuleNotFoundError(
        f"No module named {_missing[0]!r} in {sys.executable}: activate the environment first, `. .venv/bin/activate` in the "
        "checkout (`make quickstart` makes it), or install the checkout (pip install CHECKOUT)", name=_missing[0])
