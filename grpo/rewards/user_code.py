"""Calls the user's code, reward functions and environments, in the trainer's process, and protects the process from it.

After every call the settings of `_settings` and `_torch_settings` are put back; a change that cannot be put back ends the run
with an error that names the code. Not put back: environment variables other than VARIABLES, import paths and the global random
generators, which this program does not use. While a call lasts its settings are those of the whole process, and of an update
that a GPU makes beside it (rollout.max_staleness): a function that sets the precision of products, say, belongs into a process of
its own (env.reward_workers).
"""

import asyncio
import atexit
import builtins
import functools
import gc
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from grpo.record.terminal import hold_standard_streams

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM, signal.SIGCHLD)
LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE,
          resource.RLIMIT_NPROC, resource.RLIMIT_STACK)
VARIABLES = (b"CUDA_", b"NVIDIA_", b"TORCH", b"PYTORCH_", b"TRITON_", b"WANDB_", b"HOME", b"TMPDIR")  # prefixes
CLOSING_SECONDS = 5.0  # at exit, for tasks that still run in the event loop


class UserCodeFault(Exception):  # no RuntimeError, which contextlib takes for its own where its cause is a StopIteration
    """A reward function or an environment failed, or changed something that the trainer cannot put back; the message names it."""


# --- the state that a call must not change ---------------------------------------------------------------------------


@contextmanager
def protected(who: str) -> Iterator[None]:
    """A context for the user's code: afterwards the process is as before. A child process forked inside ends with the block.

    Raises UserCodeFault naming `who` for a change that cannot be put back."""
    pid, raised = os.getpid(), None
    settings = _settings("torch" in sys.modules)
    before = [read() for _, read, _ in settings]
    try:
        yield
    except BaseException as error:
        raised = error
        raise
    finally:
        if os.getpid() != pid:
            _end_child(raised)
        for (name, read, write), value in zip(settings, before):
            try:
                with suppress(Exception):  # what cannot be read, as a working directory that was deleted, has changed
                    if read() == value:
                        continue
                write(value)
            except Exception as error:  # whatever a setter raises, the state is not what it was
                if not isinstance(raised, UserCodeFault):  # which names a function that this one called
                    raise UserCodeFault(f"{who} changed the {name} of this process, which cannot be put back ({error}); "
                                     "let it leave that alone, or do it in a process of its own") from error


def _end_child(error: BaseException | None) -> None:
    """Ends a forked child as Python would have ended it, without running any of the trainer's code."""
    code = 0
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        code = (error.code or 0) & 0xFF
    elif error is not None:
        code = 1
        os.write(2, "".join(traceback.format_exception(error)).encode())  # stderr's buffer may hold the parent's text
    os._exit(code)


@functools.cache
def _settings(has_torch: bool) -> list[tuple[str, Callable, Callable]]:
    """(name, how to read it, how to write it back) of each setting. Without torch in the process it is not imported."""
    def write_variables(before: dict) -> None:
        for name in {name for name in before.keys() | os.environb.keys() if name.startswith(VARIABLES)}:
            if name in before:
                os.environb[name] = before[name]
            else:
                os.environb.pop(name, None)

    def read_umask() -> int:
        mask = os.umask(0o077)  # there is no way to read it alone
        os.umask(mask)
        return mask

    def write_handlers(handlers: list) -> None:
        for number, handler in zip(HANDLED, handlers):
            if handler is not None and signal.getsignal(number) != handler:  # None: not installed from Python
                signal.signal(number, handler)

    def write_limits(limits: list) -> None:
        for number, limit in zip(LIMITS, limits):
            resource.setrlimit(number, limit)

    def is_closed(number: int, stream: object) -> bool:
        try:
            return (hasattr(stream, "closed") and stream.closed) or os.fstat(number) is None
        except OSError:
            return True

    def read_streams() -> tuple:
        return sys.stdout, sys.stderr, is_closed(1, sys.stdout), is_closed(2, sys.stderr)

    def write_streams(before: tuple) -> None:
        sys.stdout, sys.stderr = before[:2]
        if read_streams() != before:
            hold_standard_streams()  # a file of the run must not get their numbers
            raise RuntimeError("they are closed")

    def write_filters(filters: list) -> None:
        warnings.resetwarnings()
        warnings.filters[:] = filters

    settings = [
        *((f"functions of {module.__name__}", lambda module=module: vars(module).copy(), vars(module).update)
          for module in (builtins, os, shutil, subprocess, time)),
        ("working directory", os.getcwd, os.chdir),
        ("umask", read_umask, os.umask),
        ("handlers of signals", lambda: [signal.getsignal(number) for number in HANDLED], write_handlers),
        ("mask of signals", lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
         lambda mask: signal.pthread_sigmask(signal.SIG_SETMASK, mask)),
        ("alarm timer", lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0,
         lambda is_running: signal.setitimer(signal.ITIMER_REAL, 0)),
        ("limits of resources", lambda: [resource.getrlimit(number) for number in LIMITS], write_limits),
        ("environment variables", lambda: os.environ._data.copy(), write_variables),  # bytes: decoding all is slow
        ("standard streams", read_streams, write_streams),
        ("filters of warnings", lambda: warnings.filters[:], write_filters),
        ("arguments", lambda: list(sys.argv), lambda words: sys.argv.__setitem__(slice(None), words)),
        ("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
        ("garbage collection", gc.isenabled, lambda is_on: gc.enable() if is_on else gc.disable())]
    return settings + _torch_settings() if has_torch else settings


def _torch_settings() -> list[tuple[str, Callable, Callable]]:
    import torch
    import torch.utils._device

    matmul, mkldnn, tiny = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, sys.float_info.min

    def write_precision(values: tuple) -> None:
        torch.set_float32_matmul_precision("highest")  # the older interface, which keeps a record of its own
        torch.backends.fp32_precision, matmul.fp32_precision, mkldnn.fp32_precision = values

    def refuse(value: object) -> None:
        raise RuntimeError(f"it was {value}")

    def autocast(device: str) -> tuple[str, Callable, Callable]:
        return (f"autocast on {device}", lambda: torch.is_autocast_enabled(device),
                lambda is_on: torch.set_autocast_enabled(device, is_on))

    return [
        ("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        ("default device", lambda: torch.utils._device.CURRENT_DEVICE, torch.set_default_device),
        ("current GPU", lambda: torch.cuda.current_device() if torch.cuda.is_initialized() else 0, torch.cuda.set_device),
        ("number of threads", torch.get_num_threads, torch.set_num_threads),
        ("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
        ("inference mode", torch.is_inference_mode_enabled, refuse),
        ("stack of torch function modes", torch._C._len_torch_function_stack, refuse),
        ("stack of torch dispatch modes", torch._C._len_torch_dispatch_stack, refuse),
        autocast("cpu"), autocast("cuda"),
        ("anomaly detection", lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
         lambda values: torch.set_anomaly_enabled(*values)),
        ("deterministic algorithms",
         lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
         lambda values: torch.use_deterministic_algorithms(values[0], warn_only=values[1])),
        ("precision of matrix products",
         lambda: (torch.backends.fp32_precision, matmul.fp32_precision, mkldnn.fp32_precision), write_precision),
        ("reduced precision of bfloat16 products", *(functools.partial(access, matmul, "allow_bf16_reduced_precision_reduction")
                                                     for access in (getattr, setattr))),
        ("use of oneDNN", torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
        ("flushing of denormals", lambda: tiny / 2 == 0.0, torch.set_flush_denormal)]


# --- calling ----------------------------------------------------------------------------------------------------------


def call_user_code(who: str, call: Callable[[], object]) -> object:
    """Calls with the process protected. Returns the result, or the exception of any kind that was raised.

    Raises UserCodeFault (see `protected`), and KeyboardInterrupt if it comes from Ctrl-C."""
    try:
        with protected(who):
            return call()
    except UserCodeFault:
        raise
    except BaseException as error:  # user code: SystemExit and others that are not Exceptions, too
        if is_users_interrupt(error):
            raise
        return error


def is_users_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C raised it. A run handles that signal itself, so there a KeyboardInterrupt comes from the user's code."""
    return isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def import_user_code(name: str):
    """`importlib.import_module`, with the process protected. A module that ends Python, as by sys.exit(), is an ImportError
    naming it; what else an import raises is raised."""
    outcome = call_user_code(f"the import of {name}", lambda: importlib.import_module(name))
    if isinstance(outcome, Exception):
        raise outcome
    if isinstance(outcome, BaseException):
        raise ImportError(f"{name} ends Python while it is imported ({type(outcome).__name__}: {outcome})") from outcome
    return outcome


# --- coroutines -------------------------------------------------------------------------------------------------------


class EventLoop:
    """An event loop in its own thread, so that its objects (a client's connections, say) live from call to call."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="reward functions' event loop", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        while os.getpid() == self._pid:
            with suppress(SystemExit, KeyboardInterrupt):  # of a task that the user's code started: whoever awaits it sees it
                self._loop.run_forever()
                return

    def run(self, awaitables: list[Awaitable]) -> list[object]:
        """The value of each coroutine, or the exception that it raised."""

        async def finish(awaitable: Awaitable) -> object:
            raised = None
            try:
                outcome = await awaitable
            except BaseException as error:  # the boundary to the user's code
                outcome = raised = error
            if os.getpid() != self._pid:
                _end_child(raised)
            return outcome

        async def finish_all() -> list[object]:
            return await asyncio.gather(*(finish(awaitable) for awaitable in awaitables))

        return asyncio.run_coroutine_threadsafe(finish_all(), self._loop).result()

    def close(self) -> None:
        """Cancels the tasks that still run, and ends the thread."""
        if os.getpid() != self._pid or not self._thread.is_alive():
            return

        async def cancel_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._loop.shutdown_asyncgens()

        with suppress(TimeoutError):  # a task that will not end: the thread is a daemon
            asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result(CLOSING_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


def event_loop() -> EventLoop:
    """The one loop of this process, closed at its exit. Modules are imported once in a process, and so are their clients."""
    return _event_loop_of(os.getpid())  # a forked child has a loop of its own


@functools.lru_cache(maxsize=1)
def _event_loop_of(pid: int) -> EventLoop:
    loop = EventLoop()
    atexit.register(loop.close)
    return loop
