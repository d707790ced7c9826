"""What a run is made of: the settings that shape its steps, its base model, tokenizer and data, as its checkpoints record them;
the command, code, versions and device that made it, for summary.json; and the settings of steps before a resume changed some.

A resume on anything else would end in weights that no single command gives, so it is refused. Where files lie is not part of
it: a base, a data file or a file of code that moved is the same.
"""
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path

import torch

from grpo.config import ConfigError, TrainConfig, flatten, read_saved_config, save_config, settings_of_steps, to_dict
from grpo.configuration.launch import typed_words
from grpo.configuration.places import without_folders
from grpo.environment import calling
from grpo.record.run_table import NAMES_OF_A_RUN
from models.chat.tokenizer import Tokenizer
from models.formats.files import list_tensors, weights_folder

CHECKOUT = Path(__file__).resolve().parent.parent.parent
WHOLE_BYTES = 1 << 26  # files up to this size are read whole
SLICE_BYTES, NUM_SLICES = 4096, 4  # read of each tensor of larger ones
# What lies there has a digest, or (of an adapter to start from) is part of every checkpoint.
PLACES = ("model.path", "model.tokenizer", "model.lora.adapter")


def identify(config: TrainConfig, tokenizer: Tokenizer, env) -> dict[str, dict]:
    """{"settings": key -> value, "base model": file -> digest, "tokenizer" and "data": name -> digest}; "data" is empty for an
    environment without a `fingerprint()`."""
    data = {}
    if hasattr(env, "fingerprint"):
        with calling(env, "fingerprint"):
            data = {"rows": str(env.fingerprint())}
    settings = {key: without_folders(value) for key, value in settings_of_steps(config).items()
                if key not in PLACES and not (data and key.startswith("env.") and key.endswith("path"))}
    found = {"settings": settings, "base model": digest_base(config.model.path),
             "tokenizer": {"vocabulary": tokenizer.fingerprint()}, "data": data}
    return json.loads(json.dumps(found, default=str))  # as a checkpoint gives it back


def differing_keys(one: dict[str, dict], other: dict[str, dict]) -> list[tuple[str, str]]:
    """(kind, key) of what differs between two records as identify() makes them, for the kinds of `other`."""
    return [(kind, key) for kind, items in other.items() for key in sorted(one[kind].keys() | items.keys())
            if one[kind].get(key) != items.get(key)]


def check_same(recorded: dict[str, dict], found: dict[str, dict], *, source: Path) -> None:
    """Raises ConfigError listing what differs between a checkpoint's record and the run that would continue it, except for
    RESUMABLE_KEYS (grpo/config.py)."""
    recorded = recorded | {"settings": without_folders(recorded["settings"])}  # earlier versions kept them
    differing = []
    for kind, key in differing_keys(recorded, found):
        before, now = recorded[kind], found[kind]
        if kind == "settings":
            differing.append(f"{key}: {before.get(key)!r} when the run started, {now.get(key)!r} now")
        else:
            change = "new" if key not in before else "gone" if key not in now else "not what it was when the run started"
            differing.append(f"{kind}: {key} is {change}")
    if differing:
        raise ConfigError(f"resume=true: this is not the run that {source} is a checkpoint of:\n  " + "\n  ".join(differing)
                          + "\nGive the same values and files, or start another run with name=NEW_NAME resume=false")


def keep_earlier_settings(run_dir: Path, config: TrainConfig, *, step: int) -> None:
    """For a resume from the checkpoint of `step` with `config`, before it replaces the folder's config.yaml: keeps that one as
    config_until_STEP.yaml, if it made steps and has other settings."""
    kept = earlier_settings(run_dir)
    for later in [other for other in kept if other > step]:  # of steps that are made again now
        kept.pop(later).unlink()
    try:
        before = read_saved_config(run_dir / "config.yaml")
    except ConfigError:  # gone or damaged
        return
    old, new = (flatten(without_folders(to_dict(item))) for item in (before, config))
    if step > 0 and step not in kept and any(old.get(key) != new.get(key) for key in old.keys() | new.keys()
                                             if key not in (*NAMES_OF_A_RUN, *PLACES)):
        save_config(before, run_dir / f"config_until_{step:06d}.yaml")


def earlier_settings(run_dir: Path) -> dict[int, Path]:
    """Last step -> the config of it and of the steps before, back to that of the entry before; of later steps, config.yaml is."""
    return dict(sorted((int(match[1]), path) for path in run_dir.glob("config_until_*.yaml")
                       if (match := re.fullmatch(r"config_until_(\d{6,})\.yaml", path.name))))


def digest_base(model_path: str | None) -> dict[str, str]:
    """digest_files of the weights that `model.path` names, a folder or a hub id; empty without one."""
    return {} if model_path is None else digest_files(weights_folder(model_path))


def digest_files(folder: Path) -> dict[str, str]:
    """File name -> digest of a checkpoint's config and tensor files."""
    paths = {tensor.path for tensor in list_tensors(folder, allow_unindexed=True).values()} | {folder / "config.json"}
    return {path.name: digest_file(path) for path in sorted(paths) if path.exists()}


def digest_file(path: Path) -> str:
    """SHA-256 over the size and all bytes of a small file; of a large tensor file, over its header and slices of every tensor:
    a few milliseconds a gigabyte, and training changes nearly every weight of a tensor."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        header_len = int.from_bytes(file.read(8), "little")
        header = file.read(header_len)
        digest.update(header)
        for start, end in (entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"):
            stride = max(end - start - SLICE_BYTES, 0) / (NUM_SLICES - 1)
            for index in range(NUM_SLICES):
                file.seek(8 + header_len + start + round(index * stride))
                digest.update(file.read(SLICE_BYTES))
        return digest.hexdigest()


def digest_code(checkout: Path | None = None) -> str:
    """Of all source files of this program, and their names. An installed package has `kernels` and `models` within `grpo`; what
    lies beside it then is others'."""
    grpo, digest = (checkout or CHECKOUT) / "grpo", hashlib.sha256()
    folders = [grpo, *(grpo.parent / name for name in ("kernels", "models") if not (grpo / name).is_dir())]
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(f"{path.relative_to(grpo.parent)} {digest_file(path)}\n".encode())
    return digest.hexdigest()[:16]


def provenance(*, seed: int, device: torch.device) -> dict:
    """{"command", "commit" (None outside a git checkout; with "+" where files differ from it), "versions", "device", "seed"}."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"command": shlex.join(["python", "-m", "grpo.train", *typed_words()]), "commit": find_commit(),
            "versions": {"grpo": version_of("grpo"), "python": platform.python_version(), "torch": torch.__version__,
                         "triton": version_of("triton")}, "device": device_name, "seed": seed}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_commit() -> str | None:
    if not (CHECKOUT / ".git").exists():
        return None
    try:
        commit, changes = (subprocess.run(["git", "-C", str(CHECKOUT), *words], stdin=subprocess.DEVNULL, capture_output=True,
                                          text=True, timeout=10, check=True).stdout.strip()
                           for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]))
    except (OSError, subprocess.SubprocessError):  # no git here, or a repository that it does not trust
        return None
    return commit + ("+" if changes else "")
