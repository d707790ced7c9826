"""What the adapters share: sessions of the form of OpenEnv's ResourceSession over games and questions of other libraries."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol


@dataclass
class ToolResult:
    """A tool's result."""

    data: object = None
    done: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass
class Verified:
    """An episode's verdict."""

    env_reward: float | None
    metrics: dict[str, Any] = field(default_factory=dict)


class TextGame(Protocol):
    """What GameSession plays. A ValueError is told to the model."""

    def step(self, arguments: dict) -> tuple[object, bool]:
        """What the player sees after a move, and whether the game is over."""

    def reward(self) -> tuple[float, dict]:
        """The reward of the game so far, and metrics."""

    def close(self) -> None: ...


class GameSession:
    """A session in which one tool plays a game. `asked` is the prompt, the rules and what the player sees first."""

    def __init__(self, game: TextGame, asked: str, tool: dict[str, Any]) -> None:
        self.game, self.asked, self.tool = game, asked, tool
        self.num_moves, self.is_done = 0, False

    def initial_messages(self) -> list[dict]:
        return [{"role": "user", "content": self.asked}]

    def list_tools(self) -> list[dict]:
        return [self.tool]

    def call_tool(self, name: str, arguments: dict) -> ToolResult:
        seen, self.is_done = self.game.step(arguments)
        self.num_moves += 1
        return ToolResult(seen, self.is_done)

    def verify(self, transcript: list[dict], final_state: object = None) -> Verified:
        reward, metrics = self.game.reward()
        return Verified(reward, {"moves": self.num_moves, "finished": float(self.is_done)} | metrics)

    def close(self) -> None:
        self.game.close()


class QuestionSession:
    """A session without tools: a question, and a function that scores the final message ("" where there is none)."""

    def __init__(self, question: str, score: Callable[[str], tuple[float, dict]], *, system: str | None = None) -> None:
        self.question, self.score, self.system = question, score, system

    def initial_messages(self) -> list[dict]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.question}]

    def list_tools(self) -> list[dict]:
        return []

    def call_tool(self, name: str, arguments: dict) -> ToolResult:
        raise AssertionError(f"no tool {name}: there are none")

    def verify(self, transcript: list[dict], final_state: object = None) -> Verified:
        return Verified(*self.score(final_text(transcript)))

    def close(self) -> None:
        pass


def final_text(transcript: list[dict]) -> str:
    """The completion's final message; "" if it does not end with one."""
    last = transcript[-1]
    return last["content"] if last["role"] == "assistant" and "tool_calls" not in last else ""


def tool(name: str, description: str, argument: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A function of one argument, as MCP lists it."""
    return {"name": name, "description": description,
            "inputSchema": {"type": "object", "properties": {argument: schema}, "required": [argument]}}


def import_extra(module: str, extra: str) -> ModuleType:
    """A library that is not a dependency. Raises ValueError with the way to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"env.environment: this needs the package {module!r}, and there is no module {error.name!r}: "
                         f"pip install -e '.[{extra}]'") from error
