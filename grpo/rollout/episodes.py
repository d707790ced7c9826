"""The environment's side of completions with tools: one object for each completion, of a form in grpo/rollout/episode_forms.py.

An object lives in a thread of its own, in which all of its code runs, coroutines too, beside the decoding of other completions.
A thread that does not come back is given up. Processes that an episode leaves behind are killed: Linux lists the children of
each thread.
"""

import asyncio
import inspect
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from grpo.batch import ToolCall
from grpo.envs.global_random import HELD
from grpo.rollout.episode_forms import MethodForm, ResourceForm
from models.chat.tools import to_json

MOST_CHARACTERS = 1_000_000  # of a result; more is a fault of the environment
MOST_ERROR = 1000  # characters of an exception's text in messages
_GRACE = 0.25  # seconds for processes that are about to end


class EpisodeFault(Exception):
    """Why an episode has no reward."""


@dataclass
class UserTurn:
    """What the user says to an answer."""

    text: str


class EpisodeThread:
    """One episode's object and its thread. One job at a time; `replies` gets (this, its outcome: a value or an exception)."""

    def __init__(self, index: int, make: Callable[[], object], replies: queue.SimpleQueue, *, writes_json: bool) -> None:
        self.index, self.started, self._make, self._writes_json = index, 0.0, make, writes_json
        self.is_in_tool = False  # within a call of a tool, with arguments that the model chose
        self._num_calls = 0
        self._object: object = None
        self._form: MethodForm | ResourceForm | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._replies, self._pid, self._thread_id = replies, os.getpid(), 0
        threading.Thread(target=self._serve, name="episode", daemon=True).start()

    def call(self, name: str, arguments: str) -> None:
        """Calls a tool; the outcome is a ToolCall."""
        self._begin(lambda: self._call(name, arguments))

    def end(self, transcript: Callable[[], list[dict]]) -> None:
        """Asks for the reward, if the object gives one, and closes it; the outcome is the reward. transcript: makes the
        completion's messages."""
        self._begin(partial(self._end, transcript))

    def reply(self, answer: str, transcript: Callable[[], list[dict]]) -> None:
        """Asks for the user's next turn; the outcome is a UserTurn, or as that of end() if there is none."""
        self._begin(partial(self._reply, answer, transcript))

    def leave(self) -> None:
        """Lets the thread end after its job, and kills the processes that it has."""
        if self._thread_id:
            kill_children_of(self._thread_id)
        self.give_up()
        self._jobs.put(None)

    def give_up(self) -> None:
        """Lets other episodes draw random numbers, if its job holds the generators and does not end."""
        HELD.take_from(self._thread_id)

    def is_late(self, limit: float) -> bool:
        """Whether its job takes longer than `limit` seconds, in which it did not wait for another episode's random draws."""
        if HELD.is_awaited_by(self._thread_id):
            self.started = time.monotonic()
        return time.monotonic() - self.started > limit

    def _begin(self, job: Callable[[], object]) -> None:
        self.started = time.monotonic()
        self._jobs.put(job)

    def _serve(self) -> None:
        self._thread_id = threading.get_native_id()
        while (job := self._jobs.get()) is not None:
            try:
                outcome = job()
            except BaseException as error:  # the boundary to the user's code
                outcome = error
            if os.getpid() != self._pid:  # the user's code forked here
                os._exit(0)
            self._replies.put((self, outcome))
        with suppress(BaseException):  # of an episode that has failed
            self._close()
        if self._loop is not None:
            self._loop.close()

    def _call(self, name: str, arguments: str) -> ToolCall:
        form = self._opened()
        tools = form.tools()
        namespace, _, function = name.rpartition(".")
        is_code = name == "python" and callable(tools.get(name))  # harmony's own: the message is code, the result plain text
        if not is_code and (namespace != "functions" or function not in tools):
            there = ", ".join(f"functions.{tool}" for tool in tools)
            return ToolCall(name, arguments, f"no tool {name!r}; there are: {there or 'none'}", True)
        self.is_in_tool, self._num_calls = True, self._num_calls + 1
        try:
            result = self._run(partial(tools[name], arguments)) if is_code else form.call(tools[function], arguments)
            made = ToolCall(name, arguments, _limited(str(result), name) if is_code else self._text(result, name), False)
        except EpisodeFault:
            raise
        except ValueError as error:  # of the arguments, or the tool's way to refuse what the model asked for
            made = ToolCall(name, arguments, _limited(text_of(error), name), True)
        except Exception as error:  # the model chose the arguments: what they lead to is a result, and no way out of the episode
            text = _limited(f"{type(error).__name__}: {text_of(error)}", name)
            made = ToolCall(name, arguments, text, True, describe(error))
        self.is_in_tool = False
        return made

    def _text(self, result: object, name: str) -> str:
        if isinstance(result, str):
            _limited(result, name)
            if not self._writes_json:
                return result
        try:
            return _limited(to_json(result, name), name)
        except ValueError:  # an object that JSON does not know
            return _limited(str(result), name)

    def _reply(self, answer: str, transcript: Callable[[], list[dict]]) -> object:
        text = self._opened().user_turn(answer)
        if text is None:
            return self._end(transcript)
        if not isinstance(text, str):
            raise EpisodeFault(f"user_turn() returned a {type(text).__name__}; it must return a text, or None to end")
        return UserTurn(_limited(text, "user_turn"))

    def _end(self, transcript: Callable[[], list[dict]]) -> object:
        form = self._opened()
        try:
            reward = form.reward(transcript)
        finally:
            self._close()
        if left := kill_children_of(self._thread_id):
            self.is_in_tool = self._num_calls > 0
            raise EpisodeFault(f"left {len(left)} processes running ({', '.join(map(str, left))}), which were killed; end them "
                               "in get_reward() or close()")
        return reward

    def _close(self) -> None:
        episode, self._object = self._object, None
        if hasattr(episode, "close"):
            self._run(episode.close)

    def _opened(self) -> MethodForm | ResourceForm:
        if self._object is None:
            self._object = self._run(self._make)
            self._form = (ResourceForm if ResourceForm.fits(self._object) else MethodForm)(self._object, self._run)
        return self._form

    def _run(self, function: Callable[[], object]) -> object:
        result = function()
        if not inspect.isawaitable(result):
            return result
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(result)


def _limited(text: str, name: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise EpisodeFault(f"{name} returned {len(text):,} characters; at most {MOST_CHARACTERS:,} are allowed")
    return text


def describe(error: BaseException) -> str:
    """What an episode raised, and where."""
    if isinstance(error, EpisodeFault):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {text_of(error)[:MOST_ERROR]} ({place.filename}:{place.lineno})"


def text_of(error: BaseException) -> str:
    """Its text, which is the user's code too and may raise."""
    try:
        return str(error)
    except Exception:
        return "(its text cannot be read)"


def kill_children_of(thread_id: int) -> list[int]:
    """Kills the processes that a thread of this process has started, and those that they have. Returns the ids of the thread's
    own that did not end within _GRACE. Where Linux does not list the children of threads, nothing is found."""
    children = _children(f"/proc/self/task/{thread_id}")
    alive, deadline = [], time.monotonic() + _GRACE
    for child in children:
        with suppress(OSError):
            while (is_alive := os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.005)
            if is_alive:
                alive.append(child)
                _kill_tree(child)
        with suppress(OSError):  # somebody else has waited for it
            os.waitpid(child, 0)
    return alive


def _kill_tree(pid: int) -> None:
    below = [child for task in Path(f"/proc/{pid}/task").glob("*") for child in _children(str(task))]
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in below:
        _kill_tree(child)


def _children(task: str) -> list[int]:
    with suppress(OSError):
        return [int(word) for word in Path(task, "children").read_text().split()]
    return []
