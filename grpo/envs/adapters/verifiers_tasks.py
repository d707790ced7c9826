"""Environments of verifiers v1, in this process: tasks that are scored by their trace alone, and games of several agents.

    env=resource_sessions env.environment=grpo.envs.adapters.verifiers_tasks:VerifiersTasks "env.kwargs={taskset: reverse_text}"

A plain task is one answer, scored by Task.score(). Of an environment with a run() of its own the policy is one agent: what
run() tells that agent is the prompt, and later the result of its call `reply`; a function of one's own is the others. What needs
a runtime (a process, a container, servers of tools, a judge) is refused by name.
"""

import asyncio
import inspect
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from grpo.envs.adapters.session import QuestionSession, ToolResult, Verified, import_extra, tool
from grpo.rewards.functions import load_function

REPLY = tool("reply", "Sends your next message.", "message", {"type": "string"})
ALONE = "SingleAgentEnv"  # verifiers' class for tasksets without an environment of their own


class VerifiersTasks:
    """taskset: its id, an importable package; settings: of the environment's configuration; num_tasks: of the first tasks that
    are used; agent: the policy's, null: each in turn; opponent: a function of a list of messages, as module:name or file.py:name,
    that returns the other agents' next message."""

    def __init__(self, taskset: str, settings: dict[str, Any] | None = None, num_tasks: int = 1000, agent: str | None = None,
                 opponent: str | None = None) -> None:
        self.library = import_extra("verifiers.v1", "verifiers")
        loaders = import_extra("verifiers.v1.utils.loaders", "verifiers")
        settings = settings or {}
        config = loaders.resolve_env_config(settings | {"taskset": settings.get("taskset", {}) | {"id": taskset}})
        self.env = loaders.load_environment(config)
        self.loaded = list(itertools.islice(self.env.taskset, num_tasks))
        if not self.loaded:
            raise ValueError(f"env.kwargs.taskset={taskset!r}: it has no tasks")
        self.is_alone = type(self.env).__name__ == ALONE
        if needs := self._needs(self.loaded[0]):
            raise ValueError(f"env.kwargs.taskset={taskset!r} needs a runtime, and there is none here: {', '.join(needs)}")
        names = list(self.env._agent_specs)
        if agent is not None and agent not in names:
            raise ValueError(f"env.kwargs.agent={agent!r}: allowed: {', '.join(names)}")
        if opponent is None and not self.is_alone and len(names) > 1:
            raise ValueError(f"env.kwargs.opponent: {taskset} has the agents {', '.join(names)}; the policy is one of them, so "
                             "name a function of a list of messages that returns the others' next message")
        self.agents = names if agent is None else [agent]
        self.opponent = None if opponent is None else load_function(opponent, key="env.kwargs.opponent")

    def tasks(self) -> list[dict]:
        return [{"index": index} for index in range(len(self.loaded))]

    def create(self, task: dict, seed: int = 0, episode_id: str | None = None) -> "QuestionSession | _AgentSession":
        index = task["index"]
        wanted = self.loaded[index]
        if not self.is_alone:
            return _AgentSession(self, wanted, self.agents[index % len(self.agents)])

        def score(answer: str) -> tuple[float, dict]:
            trace = _Trace(self.library, wanted)
            trace.add("user", wanted.data.prompt_text)
            trace.add("assistant", answer)
            asyncio.run(wanted.score(trace.trace))
            return trace.reward()

        return QuestionSession(wanted.data.prompt_text, score, system=wanted.data.system_prompt)

    def _needs(self, task: Any) -> list[str]:
        """What of the environment cannot be had without a runtime."""
        kind, base = type(task), self.library.Task
        needs = [f"{kind.__name__}.{name}()" for name in ("setup", "finalize", "stage_verifier")
                 if getattr(kind, name) is not getattr(base, name)]
        hooks = [*task.hooks("reward"), *task.hooks("metric")]
        needs += [f"{kind.__name__}.{hook.__name__}(runtime)" for hook in hooks
                  if (found := inspect.signature(hook).parameters.get("runtime")) and found.default is inspect.Parameter.empty]
        needs += [f"{kind.__name__}.NEEDS_CONTAINER"] if kind.NEEDS_CONTAINER else []
        needs += [f"the image {task.data.image}"] if task.data.image else []
        needs += ["its judges"] if task.config.judges else []
        needs += ["its tool servers"] if kind.toolsets(task.config) or self.env.taskset.toolsets(self.env.taskset.config) else []
        if not self.is_alone:
            root = next(parent for parent in type(self.env).__mro__ if parent.__name__ == "Env")
            needs += [f"{type(self.env).__name__}.{name}()" for name in ("finalize", "start", "stop")
                      if getattr(type(self.env), name) is not getattr(root, name)]
        return needs


class _Trace:
    """A trace of verifiers', made message by message."""

    def __init__(self, library: Any, task: Any) -> None:
        self.library = library
        recorded = library.TraceTask.model_construct(type=type(task).__name__, data=task.data)
        self.trace = library.Trace.model_construct(task=recorded, agent=library.AgentInfo.model_construct(config=None), nodes=[])

    def add(self, role: str, text: str) -> None:
        library, nodes = self.library, self.trace.nodes
        make = {"system": library.SystemMessage, "user": library.UserMessage, "assistant": library.AssistantMessage}
        nodes.append(library.MessageNode.model_construct(
            message=make[role](content=text), sampled=role == "assistant", parent=len(nodes) - 1 if nodes else None))

    def messages(self) -> list[dict]:
        return [{"role": node.message.role, "content": node.message.content} for node in self.trace.nodes]

    def reward(self) -> tuple[float, dict]:
        return float(self.trace.reward), {name: value for name, value in self.trace.metrics.items() if value is not None}


class _Seat:
    """An agent, as Env.run sees it: interaction(task) and turn(message)."""

    def __init__(self, session: "_AgentSession", name: str) -> None:
        self.session, self.is_policy, self.record = session, name == session.name, None

    @asynccontextmanager
    async def interaction(self, task: Any) -> AsyncIterator["_Seat"]:
        self.record = _Trace(self.session.owner.library, task)
        if task.data.system_prompt:
            self.record.add("system", task.data.system_prompt)
        yield self

    @property
    def trace(self) -> Any:
        return self.record.trace

    async def turn(self, message: str | None = None) -> Any:
        if message is not None:
            self.record.add("user", message)
        reply = await self.session.ask(message or "") if self.is_policy else self.session.owner.opponent(self.record.messages())
        segment = self.session.owner.library.Segment
        if reply is None:
            return segment(messages=[], terminated=True)
        self.record.add("assistant", reply)
        return segment(messages=[self.trace.nodes[-1].message])

    def run(self, task: Any) -> Any:
        raise ValueError("env.kwargs.taskset: its run() runs an agent's program, which needs a runtime; only agents that it "
                         "talks with (interaction) are supported")


class _AgentSession:
    """Env.run in an event loop of its own, which runs while the policy does not."""

    def __init__(self, owner: VerifiersTasks, task: Any, name: str) -> None:
        self.owner, self.name, self.seats = owner, name, {}
        self.loop, self.asks, self.waiting = asyncio.new_event_loop(), asyncio.Queue(), None
        self.running = self.loop.create_task(owner.env.run(task, self))
        try:
            self.first = self._next()
        except BaseException:
            self.loop.close()
            raise
        self.opening = self.seat.record.messages() if self.first is not None else []

    def __getattr__(self, name: str) -> _Seat:
        """The agents, by their names: a session is the `agents` of Env.run, too."""
        if name not in vars(self)["owner"].env._agent_specs:
            raise AttributeError(name)
        return self.seats.setdefault(name, _Seat(self, name))

    @property
    def seat(self) -> _Seat:
        return self.seats[self.name]

    async def ask(self, message: str) -> str | None:
        """The policy's reply; None if it gives none any more."""
        reply = self.loop.create_future()
        self.asks.put_nowait((message, reply))
        return await reply

    def initial_messages(self) -> list[dict]:
        return self.opening

    def list_tools(self) -> list[dict]:
        return [REPLY]

    def call_tool(self, name: str, arguments: dict) -> ToolResult:
        self.waiting.set_result(arguments["message"])
        seen = self._next()
        return ToolResult("The exchange is over.", True) if seen is None else ToolResult(seen)

    def verify(self, transcript: list[dict], final_state: object = None) -> Verified:
        while not self.running.done():
            self.waiting.set_result(None)
            self._next()
        return Verified(*self.seat.record.reward())

    def close(self) -> None:
        if not self.running.done():
            self.running.cancel()
            self.loop.run_until_complete(asyncio.wait([self.running]))
        self.loop.close()

    def _next(self) -> str | None:
        """Runs until the policy is asked, and gives what it is told; None at the end."""
        asked = self.loop.run_until_complete(self._asked())
        if asked is None:
            self.running.result()
            return None
        message, self.waiting = asked
        return message

    async def _asked(self) -> tuple | None:
        waits = asyncio.create_task(self.asks.get())
        await asyncio.wait([waits, self.running], return_when=asyncio.FIRST_COMPLETED)
        if waits.done():
            return waits.result()
        waits.cancel()
        return None
