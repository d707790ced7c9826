import sys
from importlib.util import find_spec

# While `python -m` looks for an entry point: before its own import fails with the bare name. Configs, recipes and tables of runs
# need neither, in other programs too.
_is_trainer = sys.argv[:1] == ["-m"] and not {"grpo.port", "grpo.report"} & set(sys.orig_argv)
_missing = [name for name in ("torch", "hydra") if _is_trainer and find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"No module named {_missing[0]!r} in {sys.executable}: activate the environment first, `. .venv/bin/activate` in the "
        "checkout (`make quickstart` makes it), or install the checkout (pip install CHECKOUT)", name=_missing[0])
