"""The two forms of an object that answers a completion's calls: TRL's environments, whose public methods are the tools, and
OpenEnv's ResourceSession (initial_messages, list_tools, call_tool, verify, close). Both are known by their methods alone.

`run` calls a function of the object and waits for what it returns, if that is awaitable.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from models.chat.functions import public_methods, read_arguments, read_object

PROTOCOL = ("reset", "get_reward", "user_turn", "close")  # public methods that are no tools
SESSION = ("initial_messages", "list_tools", "call_tool", "verify", "close")  # methods of a ResourceSession
MOST_NESTED = 16  # references within references of a schema
Run = Callable[[Callable[[], object]], object]


@dataclass
class Verdict:
    """What a ResourceSession's verify() says."""

    reward: float
    metrics: dict[str, Any] = field(default_factory=dict)


class MethodForm:
    """TRL's. The reward is get_reward()'s; None without that method."""

    def __init__(self, owner: object, run: Run) -> None:
        self.owner, self.run = owner, run

    def tools(self) -> dict[str, Callable]:
        return public_methods(self.owner, without=PROTOCOL)

    def call(self, tool: Callable, arguments: str) -> object:
        """The result of one of `tools`. Raises ValueError with a text for the model."""
        return self.run(partial(tool, **read_arguments(tool, arguments)))

    def user_turn(self, answer: str) -> object:
        """What the user says to an answer; None ends the episode."""
        return self.run(partial(self.owner.user_turn, answer)) if hasattr(self.owner, "user_turn") else None

    def reward(self, transcript: Callable[[], list[dict]]) -> object:
        return self.run(self.owner.get_reward) if hasattr(self.owner, "get_reward") else None


class ResourceForm:
    """OpenEnv's. Its calls end with the first result that says `done`. The reward is verify()'s; if that gives none, the last one
    that a result had."""

    def __init__(self, session: object, run: Run) -> None:
        self.session, self.run = session, run
        self.is_done, self.last_reward = False, 0.0

    @staticmethod
    def fits(owner: object) -> bool:
        return all(hasattr(owner, method) for method in SESSION)

    def tools(self) -> dict[str, dict]:
        return {schema["name"]: schema for schema in tool_schemas(self.run(self.session.list_tools))}

    def call(self, tool: dict, arguments: str) -> object:
        """As MethodForm's."""
        values = read_object(tool["name"], tool["parameters"], arguments)
        if self.is_done:
            raise ValueError("the episode is over")
        result = self.run(partial(self.session.call_tool, tool["name"], values))
        self.is_done = bool(result.done)
        reward = (result.metadata or {}).get("reward")
        if reward is None and isinstance(result.data, dict):
            reward = result.data.get("reward")
        self.last_reward = self.last_reward if reward is None else float(reward)
        if result.error is not None:
            raise ValueError(result.error)
        return "" if result.data is None else result.data

    def user_turn(self, answer: str) -> object:
        """As MethodForm's; not a part of OpenEnv's form."""
        return self.run(partial(self.session.user_turn, answer)) if hasattr(self.session, "user_turn") else None

    def reward(self, transcript: Callable[[], list[dict]]) -> Verdict:
        messages = [*self.session.initial_messages(), *transcript()]
        result = self.run(partial(self.session.verify, messages))
        return Verdict(self.last_reward if result.env_reward is None else float(result.env_reward), dict(result.metrics or {}))


def tool_schemas(tools: list) -> list[dict[str, Any]]:
    """{name, description, parameters} of tools as OpenEnv and MCP list them, references in their schemas resolved."""
    found = []
    for tool in tools:
        listed = tool if isinstance(tool, dict) else tool.model_dump(by_alias=True)
        schema = listed.get("inputSchema") or listed.get("input_schema") or {}
        found.append({"name": listed["name"], "description": listed.get("description") or "",
                      "parameters": _resolved(schema, schema.get("$defs", {}))})
    return found


def _resolved(schema: Any, named: dict, depth: int = 0) -> Any:
    if depth > MOST_NESTED:
        return {}
    if isinstance(schema, list):
        return [_resolved(item, named, depth) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        target = named.get(schema["$ref"].rpartition("/")[2], {})
        schema, depth = target | {key: value for key, value in schema.items() if key != "$ref"}, depth + 1
    return {key: _resolved(value, named, depth) for key, value in schema.items() if key not in ("$defs", "title")}
