"""Run state on disk: save, load, prune. What it holds is the caller's; weights for others go through
models/formats/hugging_face.py.

    <run_dir>/checkpoints/step_000040/tensors.safetensors   trained parameters, optimizer state
                                      state.json            everything else: step, cursors, best values
                                      manifest.json         bytes and SHA-256 of the two files above

A checkpoint is written into a folder of another name, flushed to the disk and renamed, so that under its final name it
is whole whenever the process is killed; the manifest finds what a disk did to it later.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT_VERSION = 2  # 2: the state says what the run is made of
_NAME = re.compile(r"step_(\d{6,})")
_LEFTOVER = re.compile(r"(step_\d{6,})\.(tmp|old|gone)-\d+")


class SaveError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are untouched."""


class LoadError(ValueError):
    """Checkpoints are there and none of them is whole."""


class CheckpointFallbackWarning(UserWarning):
    """A damaged checkpoint was passed over for an older one."""


@dataclass
class RunState:
    step: int  # steps finished
    tensors: dict[str, torch.Tensor]  # on the CPU
    state: dict  # as JSON gives it back: tuples are lists, keys are strings


def save_run(run_dir: str | Path, *, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> Path:
    """Writes the checkpoint of `step` finished steps, then deletes all but the `keep` newest up to it; returns its
    folder.

    tensors: any dtypes and devices, written exactly. state: JSON (floats survive exactly). Raises ValueError for keep <
    2 (the newest may be the one a disk damages) and SaveError, which names the path and the free space, when the disk
    does not take it; nothing that was there before is touched then."""
    if keep < 2:
        raise ValueError(f"checkpoint.keep={keep}: must be at least 2, so that a damaged checkpoint has a predecessor")
    root = Path(run_dir) / "checkpoints"
    final = root / _name(step)
    temporary = root / f"{final.name}.tmp-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        temporary.mkdir()
        _write(temporary, step, tensors, state)
        _publish(temporary, final)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise SaveError(f"cannot save {final}: {error} ({_free(root)}). Earlier checkpoints are untouched; free some "
                        "space or lower checkpoint.keep, then resume") from error
    _prune(root, step, keep)
    return final


def load_run(run_dir: str | Path, *, step: int | None = None) -> RunState | None:
    """The newest whole checkpoint of a run, or that of `step`; None if it has none at all.

    A newer one that does not match its manifest is passed over with a CheckpointFallbackWarning that names it and the
    damage. Raises LoadError if there are checkpoints and none is whole: starting afresh is the user's decision.
    Also raises it for a `step` that is not there or damaged."""
    root = Path(run_dir) / "checkpoints"
    damage: list[str] = []
    found = _checkpoints(root)
    if step is not None and found:
        if step not in dict(found):
            raise LoadError(f"step = {step}: no such checkpoint in {root}; there are {[number for number, _ in found]}")
        found = [(step, dict(found)[step])]
    for _, folder in reversed(found):
        problem = _verify(folder)
        if problem is None:
            if damage:
                warnings.warn(f"resuming from {folder.name}, because " + "; ".join(damage), CheckpointFallbackWarning,
                              stacklevel=2)
            return _read(folder)
        damage.append(f"{folder} is damaged ({problem})")
    if damage:
        raise LoadError(f"no usable checkpoint in {root}: " + "; ".join(damage)
                        + ". Restore one from a copy, or start again under another name=")
    return None


def clean_stale(run_dir: str | Path) -> list[Path]:
    """Deletes what a killed process left half-written; for the holder of the lock only. Returns the paths."""
    root = Path(run_dir) / "checkpoints"
    removed = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = root / match[1]
        try:
            if match[2] == "old" and not os.path.lexists(final):
                os.replace(path, final)  # killed between the two renames of a replacement
            else:
                remove(path)
                removed.append(path)
        except OSError as error:
            warnings.warn(f"cannot delete {path}, left by a killed process: {error}", stacklevel=2)
    return removed


def remove(path: Path) -> None:
    """Deletes a folder, a file or a link (never what it leads to), if there is one. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder), oldest first; half-written ones have other names."""
    found = [(int(match[1]), path) for path in (root.iterdir() if root.is_dir() else [])
             if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def _write(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict) -> None:
    safetensors.torch.save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                                folder / TENSORS)
    (folder / STATE).write_text(json.dumps({"step": step, "state": state}, indent=1) + "\n")
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
             for name in (TENSORS, STATE)}
    (folder / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "step": step, "files": files},
                                              indent=1) + "\n")
    for name in (TENSORS, STATE, MANIFEST):
        _fsync(folder / name)
    _fsync(folder)


def _publish(temporary: Path, final: Path) -> None:
    """Gives the folder its final name; one that has it (the same step saved again) makes room first."""
    old = final.with_name(f"{final.name}.old-{os.getpid()}")
    if os.path.lexists(final):
        os.replace(final, old)
    try:
        os.replace(temporary, final)
    except OSError:
        if os.path.lexists(old):
            os.replace(old, final)
        raise
    _fsync(final.parent)
    with contextlib.suppress(OSError):
        remove(old)


def _prune(root: Path, step: int, keep: int) -> None:
    # newer ones than this step are damaged (or it would not be the newest): they must not count among those kept
    for _, folder in [item for item in _checkpoints(root) if item[0] <= step][:-keep]:
        gone = folder.with_name(f"{folder.name}.gone-{os.getpid()}")
        try:
            os.replace(folder, gone)
            remove(gone)
        except OSError as error:
            warnings.warn(f"cannot delete the old checkpoint {folder}: {error}", stacklevel=3)


def _verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format_version"] != FORMAT_VERSION:
            return f"{MANIFEST} has format_version {manifest['format_version']}, this code reads {FORMAT_VERSION}"
        if folder.name != _name(manifest["step"]):
            return f"it was saved as {_name(manifest['step'])}: give it that name again"
        for name in (TENSORS, STATE):
            expected, path = manifest["files"][name], folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} does not match the SHA-256 in its manifest"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is not readable: {type(error).__name__} {error}"
    return None


def _read(folder: Path) -> RunState:
    document = json.loads((folder / STATE).read_text())
    return RunState(step=document["step"], tensors=safetensors.torch.load_file(folder / TENSORS),
                    state=document["state"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(path: Path) -> str:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return f"{shutil.disk_usage(existing).free:,} bytes free in {existing}"
