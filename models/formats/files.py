"""Checkpoint folders: found or downloaded, their tensors listed and read one at a time, new ones written whole."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.formats.atomic import free_bytes, new_folder

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint or adapter folder that cannot be read or written; the message names the file and what to do."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    name: str  # in the file
    dtype: str  # safetensors' name: BF16, F32, U8 ...
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor on the CPU, a view of the mapped file: copy it and drop it, so that its pages leave memory again.

        The file is opened for this tensor alone because a mapping that stays open keeps every page it has touched
        resident.
        """
        with _opened(self.path) as file:
            return file.get_tensor(self.name)


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor that is computed from stored ones when it is read."""

    path: Path  # of the first of them
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


Stored = StoredTensor | DerivedTensor


def read_all(tensors: Sequence[StoredTensor]) -> list[torch.Tensor]:
    """Reads tensors; opens each file once."""
    read = {}
    for path in {tensor.path for tensor in tensors}:
        with _opened(path) as file:
            read |= {(path, tensor.name): file.get_tensor(tensor.name) for tensor in tensors if tensor.path == path}
    return [read[tensor.path, tensor.name] for tensor in tensors]


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor of an export, made when its shard is written so that host memory holds one shard at most."""

    name: str
    num_bytes: int
    make: Callable[[], torch.Tensor]


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; fetch the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}; {path.stat().st_size} bytes on disk); "
                              "it is truncated or damaged: fetch it again") from None


def checkpoint_folder(source: str | Path) -> Path:
    """The local folder of a checkpoint given as a folder or as a Hugging Face hub id (organisation/name).

    A hub id is downloaded into the hub cache, Hugging Face layout only, unless it is there already. Raises
    CheckpointError where neither a folder nor a reachable repository has that name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    parts = str(source).split("/")
    if path.exists() or len(parts) != 2 or parts[0] in ("", ".", "..", "~") or not parts[1]:
        raise CheckpointError(f"{source}: no such folder; give a checkpoint folder or a hub id such as openai/gpt-oss-20b")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(
            str(source), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "README.md"],
            ignore_patterns=["original/*", "metal/*"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source}: no folder of that name here, and the hub did not deliver it ({reason}); "
                              "check the spelling, the network and (for private repositories) HF_TOKEN") from None


def weights_folder(source: str | Path) -> Path:
    """The folder with a checkpoint's tensors: its own, or its subfolder `original/` if it has no tensors itself."""
    folder = checkpoint_folder(source)
    has_tensors = any(folder.glob("*.safetensors")) or (folder / INDEX_NAME).exists()
    return folder / "original" if not has_tensors and (folder / "original").is_dir() else folder


def list_tensors(folder: Path, *, allow_unindexed: bool) -> dict[str, StoredTensor]:
    """Every tensor of a folder by name, from the files' headers; no data is read.

    The files are those of model.safetensors.index.json, else model.safetensors, else (allow_unindexed: OpenAI's
    original layout has shards without an index) all *.safetensors. Raises CheckpointError for an index, a file or a
    header that cannot be read, and where index and headers disagree.
    """
    index = folder / INDEX_NAME
    if index.exists():
        return _list_indexed(index)
    paths = [folder / SINGLE_NAME] if (folder / SINGLE_NAME).exists() else []
    if not paths and allow_unindexed:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        found = sorted(path.name for path in folder.iterdir())[:10]
        raise CheckpointError(
            f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is there (found {found}); fetch the missing file"
        )
    tensors = {}
    for path in paths:
        for name, stored in list_file(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name} is also in {tensors[name].path.name}; "
                                      "remove the file that does not belong to this checkpoint")
            tensors[name] = stored
    return tensors


def list_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: StoredTensor(path, name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
        }


def _list_indexed(index: Path) -> dict[str, StoredTensor]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f'{index}: "weight_map" must map tensor names to file names; fetch the file again')
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise CheckpointError(f"{index}: names files outside its folder: {shortened(outside, 5)}; fetch the file again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index}: lists files that are not there: {missing}; fetch them")
    in_files = {name: list_file(index.parent / name) for name in names}
    absent = [f"{tensor} in {name}" for tensor, name in weight_map.items() if tensor not in in_files[name]]
    unlisted = [
        f"{tensor} in {name}" for name, held in in_files.items() for tensor in held if weight_map.get(tensor) != name
    ]
    if absent or unlisted:
        raise CheckpointError(f"{index}: does not match its files; listed but absent: {shortened(absent)}; "
                              f"present but not listed: {shortened(unlisted)}; fetch index and files of one version")
    return {tensor: in_files[name][tensor] for tensor, name in weight_map.items()}


def misshapen_tensors(stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The problems with the shapes of expected tensors that are stored."""
    return [
        f"{name} is {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]


def shortened(names: list[str], limit: int = 20) -> str:
    shown = ", ".join(names[:limit]) or "none"
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises CheckpointError, with the file's name, if it is missing or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; fetch it") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}; fetch the file again")
    return content


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(
    target: Path, *, num_bytes: int, files: dict[str, Path | str | dict], replaceable: tuple[str, ...] = ()
) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well, and vanishes otherwise.

    num_bytes: of the tensors that will be written; with copied files and room for headers and small ones, they are
    compared with the free space first. files: written after them, by name: copies of others, text, JSON objects. A
    target that exists and is not empty is refused, unless every entry in it is named in `replaceable`: then it is
    exchanged for the new folder. Raises CheckpointError naming the path, also when the disk is full.
    """
    num_bytes += sum(file.stat().st_size for file in files.values() if isinstance(file, Path)) + 2**20
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: is a file; choose a folder")
    present = sorted(os.listdir(target)) if target.exists() else []
    if foreign := [name for name in present if name not in replaceable]:
        raise CheckpointError(f"{target}: exists and holds {shortened(foreign, 5)}; choose another folder or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = free_bytes(target.parent)
        if num_bytes > free:
            raise CheckpointError(f"{target}: needs {num_bytes:,} bytes, {free:,} are free; free some space")
        with new_folder(target) as folder:
            yield folder
            for name, content in files.items():
                if isinstance(content, Path):
                    shutil.copyfile(content, folder / name)
                elif isinstance(content, str):
                    (folder / name).write_text(content, encoding="utf-8")
                else:
                    write_json(folder / name, content)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: could not be written ({error}); {free_bytes(target):,} bytes are free there. "
                              "Nothing that was there before has changed") from error


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes one safetensors file, with the read permissions of its folder."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors creates files that only the owner can read


def write_shards(folder: Path, tensors: list[TensorToWrite], *, max_shard_bytes: float, is_original: bool = False) -> None:
    """Writes tensors in the order given: as model.safetensors if they fit into one file, else as shards with their index.

    is_original: shards are named as in OpenAI's original layout, which has no index.
    """
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    weight_map, stem = {}, "model-" if is_original else "model"
    for number, shard in enumerate(shards, 1):
        name = SINGLE_NAME if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        made = {tensor.name: tensor.make() for tensor in shard}
        sizes = {tensor.name: (made[tensor.name].nbytes, tensor.num_bytes) for tensor in shard}
        assert all(actual == planned for actual, planned in sizes.values()), f"bytes made and planned differ: {sizes}"
        write_tensors(folder / name, made)
        weight_map |= {tensor.name: name for tensor in shard}
        del made
    if len(shards) > 1 and not is_original:
        total_size = sum(tensor.num_bytes for tensor in tensors)
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
