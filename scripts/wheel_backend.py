"""How pip builds this project (PEP 517): setuptools, over a copy of the tree in which `grpo` is the only top-level package.

In a checkout `kernels` and `models` lie beside `grpo`. Installed under these common names they would overwrite others'
packages, Hugging Face's `kernels` first of all, and two of one name cannot be imported in one process. So a wheel holds them
as `grpo.kernels` and `grpo.models`, every import of them rewritten; the YAML as grpo/configs; and the scripts that a user
needs as `grpo.export` and `grpo.random_checkpoint`. The archive of the sources holds the same tree. An editable install is
setuptools' own and leaves the tree as it is.
"""

import ast
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import build_editable, prepare_metadata_for_build_editable  # noqa: F401  (hooks that pip calls)

ROOT = Path(__file__).resolve().parent.parent
MOVED = ("kernels", "models")
SCRIPTS = ("export.py", "random_checkpoint.py")
FINDS_CHECKOUT = "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))"  # a line of each script
PYPROJECT_EDITS = (
    (r'^build-backend = .*\nbackend-path = .*$', 'build-backend = "setuptools.build_meta"'),
    (r"^packages = .*$", 'packages.find = {include = ["grpo*"], namespaces = false}\npackage-data.grpo = ["configs/**/*.yaml"]'),
)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with staged_tree([wheel_directory, metadata_directory]) as (wheels, metadata):
        return build_meta.build_wheel(wheels, config_settings, metadata)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    with staged_tree([metadata_directory]) as (metadata,):
        return build_meta.prepare_metadata_for_build_wheel(metadata, config_settings)


def build_sdist(sdist_directory, config_settings=None):
    with staged_tree([sdist_directory]) as (sdists,):
        return build_meta.build_sdist(sdists, config_settings)


@contextlib.contextmanager
def staged_tree(folders: list[str | None]) -> Iterator[list[str | None]]:
    """Works in a copy of the tree in its installed form. Gives `folders` as absolute paths."""
    absolute, before = [folder and os.path.abspath(folder) for folder in folders], os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        stage(Path(name))
        os.chdir(name)
        try:
            yield absolute
        finally:
            os.chdir(before)


def stage(folder: Path) -> None:
    """Writes the tree in its installed form into an empty folder."""
    places = {"grpo": "grpo", **{package: f"grpo/{package}" for package in MOVED}}
    sources = {path: folder / place / path.relative_to(ROOT / package)
               for package, place in places.items() for path in (ROOT / package).rglob("*.py")}
    sources |= {ROOT / "scripts" / name: folder / "grpo" / name for name in SCRIPTS}
    for source, target in sources.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(installed_form(source), encoding="utf-8")
    shutil.copytree(ROOT / "configs", folder / "grpo" / "configs")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for pattern, replacement in PYPROJECT_EDITS:
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert count == 1, f"pyproject.toml: {count} lines match {pattern}"
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")


def installed_form(path: Path) -> str:
    """The file's text with `kernels` and `models` imported from `grpo`. Raises ValueError for an import that binds their bare
    names (`import kernels.head.draw`): it cannot be rewritten in its place."""
    text = path.read_text(encoding="utf-8").replace(FINDS_CHECKOUT, "")
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in MOVED:
            before, after = lines[node.lineno - 1][:node.col_offset], lines[node.lineno - 1][node.col_offset:]
            lines[node.lineno - 1] = before + re.sub(r"^from\s+", "from grpo.", after)
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[0] in MOVED for alias in node.names):
            raise ValueError(f"{path}:{node.lineno}: write `from PACKAGE import MODULE`; a wheel has these packages inside grpo")
    return "\n".join(lines)
