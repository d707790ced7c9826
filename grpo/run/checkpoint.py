"""A run's checkpoints on disk: save, load, prune. What they hold is the caller's; weights for others go through models/formats/.

    <run_dir>/checkpoints/step_000040/tensors.safetensors   trained parameters, optimizer state
                                      state.json            everything else: step, cursors, best values
                                      manifest.json         bytes and SHA-256 of the two files above

Under its final name a checkpoint is whole whenever the process is killed; the manifest finds what a disk did to it later.
"""
import hashlib
import json
import os
import re
import warnings
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from models.formats.atomic import free_bytes, name_of_leftover, new_folder, recover, remove_at_once

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT_VERSION = 2  # 2: the state says what the run is made of
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int32: "I32",
           torch.int16: "I16", torch.uint8: "U8", torch.float64: "F64", torch.bool: "BOOL"}  # safetensors' names
_NAME = re.compile(r"step_(\d{6,})")
_OLDER_LEFTOVER = re.compile(r"(step_\d{6,})\.(tmp|old|gone)-\d+")  # of versions that named them after their process


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


def save_run(run_dir: str | Path, *, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int,
             spared: int | None = None) -> Path:
    """Writes the checkpoint of `step` finished steps, then deletes all but the `keep` newest up to it and the one of step
    `spared`; returns its folder.

    tensors: any dtypes and devices, written exactly. state: JSON (floats survive exactly). Raises SaveError, which names the path
    and the free space, when the disk does not take it; nothing that was there before is touched then."""
    root = Path(run_dir) / "checkpoints"
    final = root / f"step_{step:06d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with new_folder(final) as folder:
            _write(folder, step, tensors, state)
    except (OSError, safetensors.SafetensorError) as error:
        raise SaveError(f"cannot save {final}: {error} ({free_bytes(root):,} bytes free in {root}). Earlier checkpoints are "
                        "untouched; free some space or lower checkpoint.keep, then resume") from error
    _prune(root, step, keep, spared)
    return final


def load_run(run_dir: str | Path, *, step: int | None = None) -> RunState | None:
    """The newest whole checkpoint of a run, or that of `step`; None if it has none at all.

    A newer one that does not match its manifest is passed over with a CheckpointFallbackWarning that names it and the damage.
    Raises LoadError if there are checkpoints and none is whole: starting afresh is the user's decision. Also raises it for a
    `step` that is not there or damaged."""
    root = Path(run_dir) / "checkpoints"
    damage: list[str] = []
    found = checkpoints_of(run_dir)
    if step is not None and found:
        if step not in found:
            raise LoadError(f"step = {step}: no such checkpoint in {root}; there are {list(found)}")
        found = {step: found[step]}
    for folder in reversed(found.values()):
        problem = damage_of(folder)
        if problem is None:
            if damage:
                warnings.warn(f"resuming from {folder.name}, because " + "; ".join(damage), CheckpointFallbackWarning,
                              stacklevel=2)
            document = json.loads((folder / STATE).read_text())
            return RunState(document["step"], safetensors.torch.load_file(folder / TENSORS), document["state"])
        damage.append(f"{folder} is damaged ({problem})")
    if damage:
        raise LoadError(f"no usable checkpoint in {root}: " + "; ".join(damage)
                        + ". Restore one from a copy, or start again under another name=")
    return None


def clean_stale(run_dir: str | Path) -> None:
    """Cleans up after a process that was killed while it saved; for the holder of the lock only."""
    root = Path(run_dir) / "checkpoints"
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        older = _OLDER_LEFTOVER.fullmatch(path.name)
        name = older[1] if older else name_of_leftover(path.name)
        if name is not None and _NAME.fullmatch(name):
            try:
                if older:
                    os.replace(path, root / f".{name}.{older[2]}")
                recover(root / name)
            except OSError as error:
                warnings.warn(f"cannot delete {path}, left by a killed process: {error}", stacklevel=2)


def checkpoints_of(run_dir: str | Path) -> dict[int, Path]:
    """Step -> folder, oldest first."""
    root = Path(run_dir) / "checkpoints"
    return dict(sorted((int(match[1]), path) for path in (root.iterdir() if root.is_dir() else [])
                       if (match := _NAME.fullmatch(path.name))))


def _write(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict) -> None:
    digests = {TENSORS: _write_tensors(folder / TENSORS, tensors)}
    (folder / STATE).write_text(json.dumps({"step": step, "state": state}, indent=1) + "\n")
    digests[STATE] = _sha256(folder / STATE)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in digests.items()}
    (folder / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "step": step, "files": files},
                                              indent=1) + "\n")


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Writes a safetensors file one tensor after the other, and returns its SHA-256. Beyond the tensors, host memory holds one of
    those that are on a GPU; the library's function would hold two copies of all."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so every tensor is aligned
    header, offset, digest = {}, 0, hashlib.sha256()
    for name in order:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        parts = (tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data for name in order)
        for part in chain((len(text).to_bytes(8, "little"), text), parts):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _prune(root: Path, step: int, keep: int, spared: int | None) -> None:
    # newer ones than this step are damaged (or it would not be the newest): they must not count among those kept
    for number, folder in [(number, folder) for number, folder in checkpoints_of(root.parent).items() if number <= step][:-keep]:
        if number == spared:
            continue
        try:
            remove_at_once(folder)
        except OSError as error:
            warnings.warn(f"cannot delete the old checkpoint {folder}: {error}", stacklevel=3)


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format_version"] != FORMAT_VERSION:
            return f"{MANIFEST} has format_version {manifest['format_version']}, this code reads {FORMAT_VERSION}"
        if folder.name != (name := f"step_{manifest['step']:06d}"):
            return f"it was saved as {name}: give it that name again"
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
