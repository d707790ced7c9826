"""Files that a command writes where its user says: never over a run's own files or what the command reads, and whole or not at
all."""

import contextlib
import glob
import os
import tempfile
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from grpo.config import ConfigError, shown
from grpo.configuration.places import rename_code
from grpo.record.summary import COMPLETIONS_FILE, METRICS_FILE, SUMMARY_FILE
from models.formats.atomic import new_file

# What a run writes into its folder; of folders, everything in them.
FILES_OF_A_RUN = (METRICS_FILE, COMPLETIONS_FILE, SUMMARY_FILE, "config.yaml", "config_until_*.yaml", "report.html", "error.log",
                  ".lock", "checkpoints", "tokenizer", "adapter", "model", "tensorboard", "wandb")


def keep_run_files(path: Path, key: str, *, known: Collection[Path] = ()) -> None:
    """Raises ConfigError where `path`, which option or key `key` gives, is one of a run's own files or would lie among them. The
    run may be any; new names in its folder are allowed. known: folders of runs, however few of their files are there."""
    place = path.expanduser().parent.resolve() / path.name  # a link is replaced, and what it leads to stays
    for folder in place.parents:
        name = place.relative_to(folder).parts[0]
        if any(fnmatch(name, pattern) for pattern in FILES_OF_A_RUN) and (_is_run(folder) or folder in known):
            raise ConfigError(f"{key}{str(path)!r}: {name} is the run's own in {folder}, which must stay as it is; give another "
                              "name")


def _is_run(folder: Path) -> bool:
    # not summary.json alone: one may name the result of an evaluation so
    is_set_up = (folder / "config.yaml").exists() and any((folder / name).exists() for name in (SUMMARY_FILE, "checkpoints"))
    return is_set_up or (folder / METRICS_FILE).exists()


def keep_inputs(output: str | None, inputs: dict[str, Any]) -> None:
    """Raises ConfigError where `output` is a file that an input names (key -> path, list of paths or glob): it would be lost."""
    if output is None:
        return
    target = os.path.expanduser(output)
    for key, value in inputs.items():
        names = [part for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)
                 for part in (name, *map(str.strip, name.split(",")))]
        found = {path for name in map(os.path.expanduser, names) for path in (name, *glob.glob(name, recursive=True))}
        if any(os.path.exists(path) and os.path.exists(target) and os.path.samefile(path, target) for path in found):
            raise ConfigError(f"output = {output!r}: is the file that {key} reads, which would be lost; give another")


def files_of_env(env: dict[str, Any]) -> dict[str, Any]:
    """What an environment's settings name, for `keep_inputs`: data, and code of rewards, tools and the like."""
    code: list[str] = []
    rename_code(env, lambda path: code.append(path) or path)
    return {**{f"env.{key}": value for key, value in env.items() if key.endswith("path")}, "env": code}


def files_of_checkpoint(folder: str | None) -> list[str]:
    """Globs of the files that loading a model reads from a folder, for `keep_inputs`."""
    names = ("*config.json", "*.safetensors", "*.index.json", "tokenizer*", "special_tokens_map.json", "chat_template*")
    return [] if folder is None else [f"{glob.escape(folder)}/{name}" for name in names]


def writable_file(name: str) -> Path:
    """The path of `output`. Raises ConfigError where it cannot be written, since found out at the end the result would be lost,
    where it is a file of a run, and where a signal would have a file of somebody else's replaced."""
    path = Path(os.path.expanduser(name)).absolute()
    keep_run_files(path, "output = ")
    is_new, part = not os.path.lexists(path), part_of(path)
    try:
        if (is_new or path.is_file()) and os.path.lexists(part) and not _is_part(part):
            raise ConfigError(f"output = {name!r}: {shown(part)}, where a stopped command leaves what is finished, is no "
                              "such file; move it away, or give another output")
        if is_new or path.is_file() or path.is_dir():  # to open a pipe could wait for its reader
            path.open("ab").close()
        if is_new:
            path.unlink()
        if is_new or path.is_file():  # the longest name of a file that is made on the way
            longest = part.with_name(f"{part.name}.tmp")
            longest.open("ab").close()
            longest.unlink()
    except OSError as error:
        raise ConfigError(f"output = {name!r}: cannot be written ({error.strerror}); give a file in a folder that exists and "
                          "that you may write to") from error
    return path


def write_output(path: Path, content: str | bytes) -> None:
    """Writes a file at once, text in UTF-8 with a lone surrogate as its escape; into a pipe or a device as it is."""
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    if _is_stream(path):
        path.write_bytes(data)
        return
    with new_file(path) as partial:
        partial.write_bytes(data)


def part_of(output: Path) -> Path:
    """Where an interrupted command leaves what it has of `output`."""
    return output.with_name(f"{output.name}.partial")


def keep_part(output: Path | None, text: str) -> str:
    """Writes what there is of an output, which says so near its start, beside the output. Returns words about it. Raises OSError
    as save_output() does."""
    if output is None or not text:
        return ""
    if _is_stream(output):
        return f"; nothing is kept, since {shown(output)} is a pipe or a device"
    _write_or_keep_elsewhere(part_of(output), text)
    return f"; what is finished is in {shown(part_of(output))}, and {shown(output)} is not written"


def save_output(output: Path, text: str) -> None:
    """Writes an output that is complete, and deletes what an interrupted command left of it. Where it cannot be written, as on a
    full disk, the files there stay and the text is kept among temporary files, which may lie on another disk; then it raises
    OSError, which says what to do."""
    _write_or_keep_elsewhere(output, text)
    part = part_of(output)
    if _is_part(part):
        part.unlink()


def _write_or_keep_elsewhere(path: Path, text: str) -> None:
    try:
        write_output(path, text)
    except OSError as error:
        stays = ", and what is there stays" if path.is_file() else ""
        raise OSError(f"{shown(path)} cannot be written ({error.strerror}){stays}; {_keep_elsewhere(path, text)}") from error


def _keep_elsewhere(path: Path, text: str) -> str:
    """Writes what `path` cannot take into a new folder for temporary files. Returns words about it."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="unsaved-"))
        write_output(folder / path.name, text)
    except OSError:
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return "nor can temporary files, so what this command has finished is lost: make room, and start it again"
    where = f"what is finished is in {folder / path.name}"  # a stream's name must not be moved over
    return where if _is_stream(path) else f"{where}: move it to {shown(path)} once that can be written"


def _is_stream(path: Path) -> bool:
    """Whether it is a pipe, a device or the like, which is written into and stays."""
    return path.exists() and not path.is_file()


def _is_part(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:40].lstrip(b"{ \n").startswith(b'"partial"')
