"""The jobs of a sweep side by side: `hydra/launcher=processes`, configs/hydra/launcher/processes.yaml.

Each job runs in a process of its own, which sees one GPU (CUDA_VISIBLE_DEVICES) and writes what it says to a file in
hydra.sweep.dir. A process that ends gives its place to the next job. A job that fails, or whose process is killed, is reported
at once, and the others go on. SIGTERM, SIGINT or SIGHUP is passed on to all jobs as SIGTERM: they save and end, and no further
one starts. If this process is killed, they do the same. Processes are new interpreters (multiprocessing's `spawn`), since one
forked after CUDA has started cannot use it.
"""
import contextlib
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobRuntime, JobStatus, run_job, setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict

from grpo.config import ConfigError, shown
from grpo.configuration.command_line import as_typed
from grpo.configuration.sweeps import FAILED, PREEMPTED, JobResult, outcome
from grpo.record.terminal import clean, one_line, print_error
from grpo.record.wandb_run import end_soon

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MAX_SHOWN = 300  # characters of a failed job's last line


@dataclass
class RunningJob:
    """A job of the sweep, and its process."""

    number: int
    overrides: list[str]
    log: Path
    place: int
    process: multiprocessing.Process
    receiver: Connection

    @property
    def name(self) -> str:
        return f"job {self.number} ({clean(shlex.join(map(as_typed, self.overrides)), 'utf-8')})"


class ProcessLauncher:
    """What a sweeper asks to run its jobs; Hydra's Launcher but for the base class, which must lie in `hydra_plugins`."""

    def __init__(self, hydra_context: Any, task_function: Callable, config: DictConfig) -> None:
        self.context, self.function, self.config = hydra_context, task_function, config
        self.gpus = visible_gpus()
        self.num_processes = checked_number(config.hydra.launcher.num_processes, len(self.gpus))
        self.running: list[RunningJob] = []
        self.is_stopped = False  # by a signal: no further job starts

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """The results of the jobs, in their order."""
        setup_globals()
        folder = Path(str(self.config.hydra.sweep.dir))  # before the jobs' configs are made, which then have the same time in it
        folder.mkdir(parents=True, exist_ok=True)
        configs = [self._config(list(overrides), initial_job_idx + index) for index, overrides in enumerate(job_overrides)]
        results: dict[int, JobReturn] = {}
        waiting = list(enumerate(configs, initial_job_idx))
        with self._forwarding():
            while self.running or waiting:
                while waiting and len(self.running) < self.num_processes and self._start(*waiting[0], folder):
                    waiting.pop(0)
                if self.is_stopped and not self.running:
                    results |= {number: returned(overrides_of(config), outcome(PREEMPTED)) for number, config in waiting}
                    break
                ended = wait([job.process.sentinel for job in self.running])
                for job in [job for job in self.running if job.process.sentinel in ended]:
                    results[job.number] = self._end(job)
        return [results[number] for number in sorted(results)]

    def _config(self, overrides: list[str], number: int) -> DictConfig:
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _start(self, number: int, config: DictConfig, folder: Path) -> bool:
        """False after a signal."""
        place = min(set(range(self.num_processes)) - {job.place for job in self.running})
        receiver, sender = multiprocessing.Pipe(duplex=False)
        log = folder / f"{number}.log"
        process = multiprocessing.get_context("spawn").Process(
            target=run_in_process, args=(log.absolute(), sender, self.context, self.function, config))
        gpu = self.gpus[place % len(self.gpus)] if self.gpus else None
        job = RunningJob(number, overrides_of(config), log, place, process, receiver)
        with signals_blocked(), gpu_of_processes(gpu):  # a signal waits until the process is listed
            if self.is_stopped:
                return False
            process.start()
            self.running.append(job)
        sender.close()
        print(f"{job.name}{'' if gpu is None else f' on GPU {gpu}'}: {shown(log)}", flush=True)
        return True

    def _end(self, job: RunningJob) -> JobReturn:
        job.process.join()
        self.running.remove(job)
        with job.receiver:
            try:
                value = job.receiver.recv()
            except EOFError:  # it ended before it could say how
                value = outcome(PREEMPTED if self.is_stopped else FAILED)
                code = job.process.exitcode
                if not self.is_stopped:
                    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                    print_error("error", f"{job.name} {how}, without a result; see {shown(job.log)}")
                    return returned(job.overrides, value)
        if not isinstance(value, JobResult):  # Hydra could not run it
            return returned(job.overrides, RuntimeError(value))
        self.is_stopped = self.is_stopped or value.code == PREEMPTED
        if value.code in (0, PREEMPTED):
            print(f"{job.name} {'was stopped' if value.code else 'finished'}", flush=True)
        else:
            print_error("error", f"{job.name} ended with exit code {value.code}: {last_line(job.log)}; see {shown(job.log)}")
        return returned(job.overrides, value)

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._forward) for number in FORWARDED
                    if signal.getsignal(number) != signal.SIG_IGN}  # as under nohup
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _: object) -> None:
        if self.is_stopped and number == signal.SIGHUP:  # a terminal that closes sends several
            return
        text = "the jobs leave without saving" if self.is_stopped else "the jobs save and end; again: they leave at once"
        self.is_stopped = True
        with contextlib.suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())
        for job in self.running:
            if job.process.exitcode is None:
                os.kill(job.process.pid, signal.SIGTERM)


def checked_number(number: Any, num_gpus: int) -> int:
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise ConfigError(f"hydra.launcher.num_processes = {number!r}: must be an integer of at least 1, or null for one process "
                          "for each GPU")
    return number or max(1, num_gpus)


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # the command line is read without it

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    number = torch.cuda.device_count()
    return named[:number] if named else [str(index) for index in range(number)]


@contextlib.contextmanager
def gpu_of_processes(gpu: str | None) -> Iterator[None]:
    """Processes that start inside the block see this GPU alone; None: what this one sees."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif gpu is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Signals wait for the end of the block; processes that start inside it have them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def overrides_of(config: DictConfig) -> list[str]:
    return list(OmegaConf.to_container(config.hydra.overrides.task))


def returned(overrides: list[str], value: JobResult | Exception) -> JobReturn:
    result = JobReturn(overrides=overrides, status=JobStatus.COMPLETED if isinstance(value, JobResult) else JobStatus.FAILED)
    result.return_value = value
    return result


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return one_line(next((line for line in reversed(lines) if line.strip()), "it said nothing"), MAX_SHOWN)


# ---- in a job's process


def run_in_process(log: Path, sender: Connection, hydra_context: Any, task_function: Callable, config: DictConfig) -> None:
    """Runs the job and sends its result, or a text where Hydra could not run it."""
    os.setsid()  # a Ctrl-C of the terminal comes by way of the sweep's process, once
    for number in (signal.SIGINT, signal.SIGHUP):  # those that came before are dropped
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_IGN)
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    sys.stdout.reconfigure(line_buffering=True)
    setup_globals()
    JobRuntime.instance().set("name", config.hydra.job.name)
    result = run_job(hydra_context=hydra_context, task_function=task_function, config=config, job_dir_key="hydra.sweep.dir",
                     job_subdir_key="hydra.sweep.subdir")
    value = result._return_value
    with sender, contextlib.suppress(BrokenPipeError):  # the sweep's process was killed
        sender.send(value if isinstance(value, JobResult) else f"{type(value).__name__}: {value}")
    end_soon(0)


def _end_with_the_sweep() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
