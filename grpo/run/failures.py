"""How an entry point ends when something goes wrong: the exit code of each kind of failure, and its one message."""
import contextlib
import errno
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo.config import RESUMABLE_KEYS, ConfigError, TrainConfig, flatten, key_matches, to_dict
from grpo.configuration.launch import CONFIG_ERROR, FAILED, PREEMPTED, speaks_for_node
from grpo.distributed.ranks import RankFault, Ranks
from grpo.envs.data_files import DataError
from grpo.optim import NonFiniteError
from grpo.out_of_memory import StillOutOfMemory, is_out_of_memory
from grpo.rewards.functions import RewardError
from grpo.rewards.user_code import UserCodeFault
from grpo.rollout.session import Interrupted
from grpo.run.checkpoint import LoadError, SaveError
from grpo.run.lock import RunInUseError
from models.formats.atomic import free_bytes
from models.formats.files import CheckpointError

DATA_ERROR, ENV_ERROR, OUT_OF_MEMORY, DIVERGED, DEAD = 3, 4, 5, 6, 7

class DeadRun(RuntimeError):
    """So many steps in a row had nothing to learn from that the run ends (rollout.max_dead_steps)."""


# Kind of error, reason, exit code, and whether its message is enough; if not, a file gets the traceback. The first kind that fits
# is used. ValueError: by this project's rule its message names the key or file and what to do.
KINDS: list[tuple[type | tuple[type, ...], str, int, bool]] = [
    (Interrupted, "interrupted", PREEMPTED, True),
    (DeadRun, "nothing to learn", DEAD, True),
    ((NonFiniteError, FloatingPointError), "diverged", DIVERGED, True),
    (DataError, "bad data", DATA_ERROR, True),
    (RewardError, "environment failed", ENV_ERROR, True),
    (UserCodeFault, "environment failed", ENV_ERROR, False),
    ((ConfigError, CheckpointError, LoadError, RunInUseError), "configuration", CONFIG_ERROR, True),
    (ValueError, "configuration", CONFIG_ERROR, False),
    ((SaveError, OSError), "disk", FAILED, True),
    (BaseException, "failed", FAILED, False)]
# Key that decides how much memory is needed -> how to change it.
MEMORY_KEYS = {"optim.max_tokens": "lower", "rollout.max_batch": "lower", "max_batch": "lower", "rollout.cache_gb": "lower",
               "model.memory_gb": "lower", "max_new_tokens": "lower", "model.host_gb": "raise",
               "model.activation_checkpointing": "set to true"}
# The same where the least sizes of micro-batch, cache and prefill did not fit.
LEAST_KEYS = {"rollout.max_new_tokens": "lower", "max_new_tokens": "lower", "model.lora.rank": "lower",
              "model.lora.targets": "name fewer in", "model.memory_gb": "raise", "model.host_gb": "raise"}


@dataclass
class Failure:
    reason: str  # as summary.json's exit_reason
    code: int  # exit code
    message: str


def describe_failure(error: BaseException, *, config: object, log: Path | None, is_started: bool = False) -> Failure:
    """The message and exit code for an error. If the message may not be enough, the traceback is written to `log`, if that is
    given and its folder exists. config: of the entry point. is_started: a ValueError may come from anywhere."""
    if isinstance(error, RankFault):
        return Failure(error.reason, error.code, str(error))
    if is_out_of_memory(error):
        return Failure("out of memory", OUT_OF_MEMORY, describe_out_of_memory(error, config))
    reason, code, is_clear = next(found for kind, *found in KINDS if isinstance(error, kind))
    message = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and log is not None:
        hint = "" if "resume=true" in message else ": free some space, then go on with resume=true"
        message += f"; {free_bytes(log.parent):,} bytes are free in {log.parent}{hint}"
    elif reason == "failed" or not message:
        message = f"{type(error).__name__}: {message}"
    message += "".join(f", {note}" for note in vars(error).get("__notes__", ()))
    is_clear = is_clear or (isinstance(error, ValueError) and not is_started)
    if log is not None and log.parent.is_dir() and not is_clear:
        with contextlib.suppress(OSError):  # a full disk must not hide the message
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            message += f" [details in {log}]"
    return Failure(reason, code, message)


def settle(ranks: Ranks | None, failure: Failure) -> Failure:
    """How the run ends on all ranks, after this one has told the others how it ends here."""
    if ranks is None:
        return failure
    fault = ranks.settle(failure.message, reason=failure.reason, code=failure.code, is_stopped=failure.code == PREEMPTED)
    return failure if fault is None else Failure(fault.reason, fault.code, str(fault))


def end(failure: Failure | None, ranks: Ranks | None, *, report: Callable[[Failure], object]) -> int:
    """Lets one process of all report a settled failure, lets the other ranks go, and returns the exit code."""
    if failure is not None and (speaks_for_node() if ranks is None else ranks.speaks()):
        report(failure)
    if ranks is not None:
        ranks.leave()
    return 0 if failure is None else failure.code


def describe_out_of_memory(error: BaseException, config: object) -> str:
    """Says how much memory was asked for, with which settings, and which to change."""
    is_gpu = "CUDA" in str(error) or "CUBLAS" in str(error) or "GPU" in str(error)
    keys = LEAST_KEYS if isinstance(error, StillOutOfMemory) else MEMORY_KEYS
    settings = {key: value for key, value in flatten(to_dict(config)).items() if key in keys and value is not True
                and (is_gpu or key not in ("model.memory_gb", "model.host_gb"))}
    if keys is MEMORY_KEYS and settings.get("model.memory_gb") is not None:
        del settings["model.memory_gb"]  # a limit is there already
    changes = {key: f"set {key} (now null)" if value is None else f"{keys[key]} {key} (now {value})"
               for key, value in settings.items() if value is not None or keys[key] == "lower"}  # null: all that is there
    lines = str(error).splitlines() or [type(error).__name__]
    where, hint = "GPU" if is_gpu else "host", ""
    if isinstance(config, TrainConfig):
        resumable = [key for key in changes if key_matches(key, RESUMABLE_KEYS)]
        hint = ("; these keys may change on resume" if len(resumable) == len(changes)
                else f"; on resume only {', '.join(resumable)} may change" if resumable
                else "; a run resumes with none of these changes")
    return f"out of {where} memory: {lines[0].rstrip('.')}. To need less, {', '.join(changes.values())}{hint}"
