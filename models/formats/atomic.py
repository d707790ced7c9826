"""Files and folders that are whole under their final name, whenever the process is killed and however full the disk is.

What is being written has another name beside the final one until it is complete: NAME.tmp for a file, .NAME.tmp for a folder.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_file(path: Path, *, suffix: str = ".tmp") -> Iterator[Path]:
    """Gives a path to write to. The file there becomes `path` when the block ends well, and is deleted otherwise.

    suffix: of the temporary name; different for each process if several may write the same file at once.
    """
    partial = path.with_name(path.name + suffix)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file at once, in UTF-8; a lone surrogate becomes its escape."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder to fill. When the block ends well, its files are synced to the disk and it replaces `path`;
    otherwise it is deleted, and `path` stays. For one process at a time."""
    partial = _beside(path, "tmp")
    try:
        recover(path)
        partial.mkdir()
        yield partial
        for item in [*partial.rglob("*"), partial]:
            sync(item)
        if os.path.lexists(path):
            os.replace(path, _beside(path, "old"))
        os.replace(partial, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            recover(path)


def remove_at_once(path: Path) -> None:
    """Deletes a folder so that no incomplete folder ever has its name. Raises OSError."""
    gone = _beside(path, "gone")
    os.replace(path, gone)
    remove(gone)


def recover(path: Path) -> None:
    """Cleans up after a process that was killed while it wrote or deleted `path`. Raises OSError."""
    partial, old, gone = (_beside(path, kind) for kind in ("tmp", "old", "gone"))
    if os.path.lexists(old) and not os.path.lexists(path):
        os.replace(old, path)  # killed between the two renames of an exchange
    for leftover in (partial, old, gone):
        remove(leftover)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def name_of_leftover(name: str) -> str | None:
    """The final name of a file or folder that a killed process left under `name`; None if `name` is not of that form."""
    stem, _, kind = name.removeprefix(".").rpartition(".")
    return stem if name.startswith(".") and kind in ("tmp", "old", "gone") else None


def remove(path: Path) -> None:
    """Deletes a folder, a file or a link (never its target), if it exists. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Of the disk on which `path` lies or would lie."""
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())).free
