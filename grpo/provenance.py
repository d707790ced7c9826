"""What made a run: the command, the code's commit, the versions of what computes, and the device; kept in summary.json."""
from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
from pathlib import Path

import torch

from grpo.launch import typed_words

ROOT = Path(__file__).resolve().parent.parent


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
    if not (ROOT / ".git").exists():
        return None
    try:
        commit, changes = (subprocess.run(["git", "-C", str(ROOT), *words], stdin=subprocess.DEVNULL, capture_output=True,
                                          text=True, timeout=10, check=True).stdout.strip()
                           for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]))
    except (OSError, subprocess.SubprocessError):  # no git here, or a repository that it does not trust
        return None
    return commit + ("+" if changes else "")
