"""The rules of the tree, held by walking its syntax: who imports whom, sizes, and habits that are kept out."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from paths import ROOT

PACKAGES = ("kernels", "models", "grpo")
PRODUCT = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
FORBIDDEN_PACKAGES = {"kernels": {"models", "grpo"}, "models": {"grpo"}, "grpo": {"kernels"}}
HYDRA_FILES = {"grpo/config.py", *(f"grpo/configuration/{name}.py" for name in ("command_line", "launch", "processes", "sweeps"))}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "manager", "base", "common", "misc"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """(module, line) of every import, those inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), node.lineno))
    return found


def import_violations(name: str, source: str) -> list[str]:
    tree, package = ast.parse(source), name.split("/")[0]
    top_level = {
        module for node in tree.body for module, _ in imports(node) if isinstance(node, ast.Import | ast.ImportFrom)
    }
    broken = []
    for module, line in imports(tree):
        root = module.split(".")[0]
        allowed = {
            "hydra": name in HYDRA_FILES,
            "omegaconf": name in HYDRA_FILES,
            "wandb": name == "grpo/record/wandb_run.py" and module not in top_level,
            "triton": package == "kernels",
            "transformers": False,
            "peft": False,
            "datasets": name == "grpo/envs/data_sources.py" and module not in top_level,
            "pyarrow": name in ("grpo/envs/data_sources.py", "grpo/envs/data_files.py") and module not in top_level,
            "": False,  # relative
        }
        if root in FORBIDDEN_PACKAGES[package] or not allowed.get(root, True):
            broken.append(f"{name}:{line} imports {module}")
    return broken


def test_imports_run_from_kernels_to_models_to_grpo_and_stay_in_their_files():
    assert len(PRODUCT) > 10
    assert [problem for path in PRODUCT for problem in import_violations(name_of(path), path.read_text())] == []


@pytest.mark.parametrize(
    "name, source",
    [
        ("grpo/losses.py", "def f():\n    from kernels.swiglu import swiglu"),
        ("models/lora.py", "import grpo.batch"),
        ("kernels/rope.py", "from models import yarn"),
        ("grpo/optim.py", "from omegaconf import OmegaConf"),
        ("grpo/record/wandb_run.py", "import wandb"),
        ("grpo/train.py", "def f():\n    import wandb"),
        ("models/experts.py", "import triton.language as tl"),
        ("grpo/train.py", "from .config import to_typed"),
    ],
)
def test_a_planted_import_is_caught(name, source):
    assert len(import_violations(name, source)) == 1


def test_of_the_scripts_only_the_comparison_imports_transformers_and_not_at_its_top():
    for path in SCRIPTS:
        tree = ast.parse(path.read_text())
        found = {module.split(".")[0] for module, _ in imports(tree)} & {"transformers", "peft"}
        assert not found or path.name == "compare_layers.py", f"{name_of(path)} imports {found}"
        at_top = {module for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for module, _ in imports(node)}
        assert "transformers" not in at_top, name_of(path)  # tests import its functions


def test_sampling_and_losses_do_not_know_each_other():
    for name, others in {"rollout/session": ("losses", "train", "optim"), "losses": ("rollout", "train")}.items():
        modules = {module for module, _ in imports(ast.parse((ROOT / f"grpo/{name}.py").read_text()))}
        assert not [module for module in modules for other in others if f"{module}.".startswith(f"grpo.{other}.")], name


def test_init_files_export_nothing():
    for path in PRODUCT:
        if path.name != "__init__.py":
            continue
        tree = ast.parse(path.read_text())
        names = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        assert not names & {"__all__", "__version__"}, name_of(path)
        own = [module for module, _ in imports(tree) if module.split(".")[0] == name_of(path).split("/")[0]]
        assert own == [], f"{name_of(path)} re-exports {own}"
    assert imports(ast.parse((ROOT / "kernels/__init__.py").read_text())) == []


def test_files_and_functions_stay_short():
    too_long = []
    for path in PRODUCT + SCRIPTS:
        source = path.read_text()
        num_lines = len(source.splitlines())
        too_long += [f"{name_of(path)}: {num_lines} lines"] if num_lines >= 600 else []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and not any(
                "jit" in ast.unparse(item) for item in node.decorator_list
            ):
                length = node.end_lineno - node.lineno + 1
                too_long += [f"{name_of(path)}:{node.lineno} {node.name}: {length} lines"] if length >= 80 else []
    assert too_long == []


def test_file_names_say_what_they_hold():
    assert [name_of(path) for path in PRODUCT + SCRIPTS if path.stem.strip("_") in VAGUE_NAMES] == []


def habit_violations(name: str, source: str) -> list[str]:
    broken = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            broken.append(f"{name}:{node.lineno} bare except")
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "getattr"
            and len(node.args) == 3
        ):
            broken.append(f"{name}:{node.lineno} getattr with a default")
        elif isinstance(node, ast.FunctionDef) and node.args.kwarg is not None and (node.args.kwarg.arg, name) not in (
            ("factory", name),  # torch's word for device and dtype
            ("constants", "kernels/device.py"),  # a kernel's constexprs, by the kernel's names
        ):
            broken.append(f"{name}:{node.lineno} {node.name} takes **{node.args.kwarg.arg}")
        elif isinstance(node, ast.Global):
            broken.append(f"{name}:{node.lineno} global {', '.join(node.names)}")
    return broken


def test_no_bare_except_no_getattr_default_no_kwargs_no_globals():
    assert [problem for path in PRODUCT for problem in habit_violations(name_of(path), path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept:\n    pass",
        "x = getattr(a, 'b', None)",
        "def f(**kwargs): g(**kwargs)",
        "def f():\n    global x",
    ],
)
def test_a_planted_habit_is_caught(source):
    assert len(habit_violations("grpo/x.py", source)) == 1


def test_no_unfinished_business_and_no_paths_of_one_machine():
    pattern = re.compile(r"\b(TODO|FIXME|XXX)\b|(?<![\w.])/(home|root|work|Users)/")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    names = [name for name in listed if name and (ROOT / name).is_file()] or [
        name_of(path) for path in PRODUCT + SCRIPTS
    ]
    skipped = ("tests/fixtures/", "tests/test_layout.py", "LICENSE")
    texts = {name: (ROOT / name).read_text(errors="ignore") for name in names if not name.startswith(skipped)}
    found = [f"{name}: {match.group()}" for name, text in texts.items() for match in pattern.finditer(text)]
    assert found == []


def test_tests_are_no_packages():
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert not (ROOT / "tests/kernels").exists()


def test_version_stays_clear_of_the_index_package_called_kernels():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert tuple(int(part) for part in project["version"].split(".")) < (0, 18)
    names = {re.split(r"[<>=!~\[ ]", item)[0].lower() for item in project["dependencies"]}
    assert "kernels" not in names and "transformers" not in names


def test_an_entry_point_without_its_environment_says_how_to_activate_it():
    result = subprocess.run([sys.executable, "-S", "-m", "grpo.train"], cwd=ROOT, capture_output=True, text=True)  # no packages
    assert result.returncode == 1
    assert "No module named 'torch' in" in result.stderr and ". .venv/bin/activate" in result.stderr, result.stderr


@pytest.mark.parametrize("words", [["-c", "import grpo"], ["-m", "grpo.port"], ["-m", "grpo.report"]])
def test_what_needs_no_torch_does_not_ask_for_it(words):
    result = subprocess.run([sys.executable, "-S", *words], cwd=ROOT, capture_output=True, text=True)
    assert "torch" not in result.stderr and (words[0] == "-m" or result.returncode == 0), result.stderr


def test_a_foreign_package_called_kernels_is_refused_with_its_path(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("__version__ = '0.10.0'\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import models.config"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError" in result.stderr and str(tmp_path / "kernels/__init__.py") in result.stderr
