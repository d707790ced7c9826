"""The wheel: complete outside the checkout, and without effect on other packages called `kernels` or `models`."""

import ast
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

import pytest
from paths import FIXTURES, ROOT

pytest.importorskip("setuptools", minversion="77", reason="builds the wheel with setuptools 77 or later")
pytest.importorskip("pip", reason="installs the wheel with pip")

ARITHMETIC = FIXTURES / "arithmetic.jsonl"


def link_dependencies(folder: str) -> str:
    """The folder, with links to torch and the other packages that are installed here, but for this project."""
    for source in (Path(path) for path in sys.path if path.endswith("site-packages")):
        for path in source.iterdir():
            if not path.name.startswith(("grpo-", "__editable__", "__pycache__")) and path.suffix != ".pth":
                link = Path(folder, path.name)
                if not link.is_symlink():
                    link.symlink_to(path)
    return folder


DEPENDENCIES = tempfile.TemporaryDirectory()
PIP_WHEEL = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w")
ENVIRONMENT = {**os.environ, "PYTHONPATH": link_dependencies(DEPENDENCIES.name), "OMP_NUM_THREADS": "1",
               "PIP_DISABLE_PIP_VERSION_CHECK": "1", "MPLBACKEND": "Agg"}


def run(*command: object, cwd: Path) -> str:
    result = subprocess.run([str(word) for word in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP_WHEEL, folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


class Environment:
    """A virtual environment that sees the dependencies of the running one."""

    def __init__(self, folder: Path):
        self.folder, self.python = folder, folder / "venv/bin/python"
        venv.create(folder / "venv", with_pip=False, symlinks=True)

    def pip(self, *arguments: object) -> None:
        run(sys.executable, "-m", "pip", "--python", self.python, *arguments, cwd=self.folder)

    def install(self, *arguments: object) -> None:
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *arguments)

    def module(self, *arguments: object) -> str:
        return run(self.python, "-m", *arguments, cwd=self.folder)

    def code(self, text: str) -> str:
        return run(self.python, "-c", text, cwd=self.folder)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def foreign_kernels(tmp_path_factory) -> Path:
    """A wheel of another distribution with a top-level package `kernels`, as the index has one."""
    path = tmp_path_factory.mktemp("foreign") / "kernels-0.14.0-py3-none-any.whl"
    info = "kernels-0.14.0.dist-info"
    files = {"kernels/__init__.py": '__version__ = "0.14.0"\nfrom kernels.layer import LAYER\n',
             "kernels/layer.py": "LAYER = 1\n",
             f"{info}/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.14.0\n",
             f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
               for name, text in files.items()}
    record = "".join(f"{name},sha256={digests[name]},{len(text)}\n" for name, text in files.items())
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            archive.writestr(name, text)
    return path


def test_grpo_is_the_only_top_level_package_and_imports_its_others_from_inside(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.split("/")[0] for name in names} == {"grpo", "grpo-0.1.0.dist-info"}
        assert archive.read("grpo-0.1.0.dist-info/top_level.txt").split() == [b"grpo"]
        assert {"grpo/kernels/rope.py", "grpo/models/gpt_oss.py", "grpo/export.py"} <= set(names)
        for name in names:
            for node in ast.walk(ast.parse(archive.read(name))) if name.endswith(".py") else ():
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                    [node.module] if isinstance(node, ast.ImportFrom) else [])
                assert not {module.split(".")[0] for module in modules} & {"kernels", "models"}, f"{name}:{node.lineno}"


def test_a_wheel_carries_every_config(wheel):
    with zipfile.ZipFile(wheel) as archive:
        carried = {name: archive.read(name) for name in archive.namelist() if name.startswith("grpo/configs/")}
    assert carried == {f"grpo/{path.relative_to(ROOT)}": path.read_bytes() for path in (ROOT / "configs").rglob("*.yaml")}


def test_the_archive_of_the_sources_builds_the_same_wheel(wheel, tmp_path):
    build = "import wheel_backend as b, sys; print(b.build_sdist(sys.argv[1]))"
    archive = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); {build}", tmp_path,
                  cwd=ROOT).split()[-1]
    run(*PIP_WHEEL, tmp_path, tmp_path / archive, cwd=tmp_path)
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        assert {name: one.read(name) for name in one.namelist() if name.endswith((".py", ".yaml"))} == {
            name: other.read(name) for name in other.namelist() if name.endswith((".py", ".yaml"))}


def test_all_entry_points_run_from_a_wheel_outside_the_checkout(installed):
    assert "num_experts_per_tok" in installed.module("grpo.train", "--cfg", "job")
    smoke = ("experiment=smoke", "name=run", "eval.max_prompts=2", "rollout.max_new_tokens=4")
    assert "step 2/2" in installed.module("grpo.train", *smoke)
    run_dir = installed.folder / "runs/run"
    installed.module("grpo.evaluate", f"run={run_dir}", "num_samples=1", "max_prompts=2", "max_new_tokens=2", "output=eval.json")
    assert json.loads((installed.folder / "eval.json").read_text())["num_prompts"] == 2
    assert installed.module("grpo.generate", f"run={run_dir}", "prompt=1+1", "max_new_tokens=2").strip()
    installed.module("grpo.export", run_dir, "exported")
    assert (installed.folder / "exported/config.json").is_file()


THEIRS = "import kernels; assert (kernels.__version__, kernels.LAYER) == ('0.14.0', 1)"
OURS = "import grpo.models.config, grpo.kernels, grpo.config; assert 'grpo' in grpo.kernels.__file__"
VERSIONS = "from importlib.metadata import packages_distributions as p; assert p()['kernels'] == ['kernels']"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_a_wheel_and_a_foreign_kernels_neither_hide_nor_remove_each_other(wheel, foreign_kernels, tmp_path, order):
    environment = Environment(tmp_path)
    for path in (wheel, foreign_kernels) if order == "ours first" else (foreign_kernels, wheel):
        environment.install(path)
    environment.code(f"{THEIRS}; {OURS}; {VERSIONS}")  # one process, in both orders of importing
    environment.code(f"{OURS}; {THEIRS}")
    environment.pip("uninstall", "--yes", "kernels")
    environment.code(f"{OURS}; import importlib.util; assert importlib.util.find_spec('kernels') is None")
    environment.install(foreign_kernels)
    environment.pip("uninstall", "--yes", "grpo")
    environment.code(f"{THEIRS}; import importlib.util; assert importlib.util.find_spec('grpo') is None")


def test_an_editable_install_runs_from_any_folder(tmp_path):
    checkout = tmp_path / "checkout"
    for name in ("grpo", "kernels", "models", "configs", "scripts"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copyfile(ROOT / name, checkout / name)
    environment = Environment(tmp_path)
    environment.install("--editable", checkout)
    assert "num_experts_per_tok" in environment.module("grpo.train", "--cfg", "job")
    found = environment.code("import grpo.configuration.launch as g, kernels as k, models.config as m; "
                             "print(g.__file__, k.__file__, m.__file__)")
    names = ("grpo/configuration/launch.py", "kernels/__init__.py", "models/config.py")
    assert found.split() == [str(checkout / name) for name in names]


def test_an_import_that_a_wheel_cannot_rewrite_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import wheel_backend

    path = tmp_path / "module.py"
    path.write_text("from kernels.rope import (\n    rotate)\nif True:\n    from models import yarn\nimport torch.kernels\n")
    assert wheel_backend.installed_form(path) == (
        "from grpo.kernels.rope import (\n    rotate)\nif True:\n    from grpo.models import yarn\nimport torch.kernels\n")
    path.write_text("x = 1\nimport kernels.rope\n")
    with pytest.raises(ValueError, match="module.py:2: write `from PACKAGE import MODULE`"):
        wheel_backend.installed_form(path)
