"""The two forms of an object that answers a completion's calls: TRL's environments, whose public methods are the tools, and
OpenEnv's ResourceSession (initial_messages, list_tools, call_tool, verify, close). Both are known by their methods alone.

`run` calls a function of the object and waits for what it returns, if that is awaitable.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grpo.rewards.values import to_number
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
        reward = self.run(self.owner.get_reward) if hasattr(self.owner, "get_reward") else None
        if hasattr(reward, "__float__"):
            checked(reward, "get_reward() returned")
        return reward


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
        self.last_reward = self.last_reward if reward is None else checked(reward, f"{tool['name']} gave the reward")
        if result.error is not None:
            raise ValueError(result.error)
        return "" if result.data is None else result.data

    def user_turn(self, answer: str) -> object:
        """As MethodForm's; not a part of OpenEnv's form."""
        return self.run(partial(self.session.user_turn, answer)) if hasattr(self.session, "user_turn") else None

    def reward(self, transcript: Callable[[], list[dict]]) -> Verdict:
        messages = [*self.session.initial_messages(), *transcript()]
        result = self.run(partial(self.session.verify, messages))
        verdict = Verdict(self.last_reward, dict(result.metrics or {}))
        if result.env_reward is not None:
            verdict.reward = checked(result.env_reward, "verify() gave the reward")
        for name, value in verdict.metrics.items():
            if isinstance(value, (int, float)) and value == value:  # NaN is not measured
                checked(value, f"verify() gave the metric {name!r}:")
        return verdict


def checked(value: object, what: str) -> float:
    """The number that a value is. Raises TypeError for what is none, is not finite or is too large: an object's fault, which
    costs its completion, where the same value in `score` would end the run."""
    number, problem = to_number(value)
    if number is None:
        raise TypeError(f"{what} {problem}")
    return number


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
