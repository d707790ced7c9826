"""How an entry point ends when something goes wrong: the exit code of each kind of failure, and its one message."""
from __future__ import annotations

import contextlib
import errno
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo.checkpoint import LoadError, RunInUseError, SaveError
from grpo.config import ConfigError
from grpo.envs.data_files import DataError
from grpo.launch import CONFIG_ERROR, FAILED, PREEMPTED
from grpo.optim import NonFiniteError
from grpo.rewards.functions import RewardError
from grpo.rewards.guests import GuestFault
from grpo.rollout import Interrupted
from models.checkpoint import CheckpointError

DATA_ERROR, ENV_ERROR, OUT_OF_MEMORY, DIVERGED = 3, 4, 5, 6

# The first kind that fits counts. ValueError: by this project's rule its message names the key or file and what to do.
KINDS: list[tuple[type | tuple[type, ...], str, int]] = [
    (Interrupted, "interrupted", PREEMPTED),
    ((NonFiniteError, FloatingPointError), "diverged", DIVERGED),
    (torch.OutOfMemoryError, "out of memory", OUT_OF_MEMORY),
    (DataError, "bad data", DATA_ERROR),
    (GuestFault, "environment failed", ENV_ERROR),
    ((ConfigError, CheckpointError, LoadError, RunInUseError, ValueError), "configuration", CONFIG_ERROR),
    ((SaveError, OSError), "disk", FAILED)]
# These say all there is to say; others leave a traceback in a file.
SELF_EXPLAINING = (Interrupted, NonFiniteError, FloatingPointError, torch.OutOfMemoryError, DataError, RewardError,
                   ConfigError, CheckpointError, LoadError, RunInUseError, SaveError, OSError)


@dataclass
class Failure:
    reason: str  # as summary.json's exit_reason
    code: int  # exit code
    message: str


def describe_failure(error: BaseException, *, log: Path | None, is_started: bool = False) -> Failure:
    """What to print and return for an error. Where the message may not suffice, its traceback is written to `log`, if that
    is given and its folder exists. is_started: everything is loaded, so that a ValueError may come from anywhere."""
    reason, code = next(((reason, code) for kind, reason, code in KINDS if isinstance(error, kind)), ("failed", FAILED))
    message = str(error)
    if reason == "out of memory":
        message = (f"out of GPU memory ({message.splitlines()[0]}); lower optim.max_tokens, rollout.max_batch or "
                   "model.memory_gb, raise model.host_gb, or set model.activation_checkpointing=true")
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and log is not None:
        hint = "" if "resume=true" in message else ": free some space, then go on with resume=true"
        message += f"; {shutil.disk_usage(log.parent).free:,} bytes are free in {log.parent}{hint}"
    elif reason == "failed" or not message:
        message = f"{type(error).__name__}: {message}"
    is_clear = isinstance(error, SELF_EXPLAINING) or (isinstance(error, ValueError) and not is_started)
    if log is not None and log.parent.is_dir() and not is_clear:
        with contextlib.suppress(OSError):  # a full disk must not hide the message
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            message += f" [details in {log}]"
    return Failure(reason, code, message)
