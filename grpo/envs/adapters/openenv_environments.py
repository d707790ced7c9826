"""OpenEnv's Environment classes, in this process and without a server.

    env=resource_sessions env.environment=grpo.envs.adapters.openenv_environments:OpenEnvEnvironments \\
        "env.kwargs={environment: 'maze_env.server.maze_env_environment:MazeEnvironment'}"

The class must be importable (PYTHONPATH=OpenEnv/envs). Its action, a pydantic model, becomes the function `step`, the fields its
arguments; an observation is written as JSON. The package needs openenv, whose types it imports; this file does not.
"""

import inspect
import typing
from typing import Any

from grpo.envs.adapters.session import GameSession
from grpo.envs.global_random import OwnRandom
from grpo.rewards.functions import load_function
from models.chat.tools import to_json

REWARDS = ("sum", "last")


class OpenEnvEnvironments:
    """environment: the class, as module:Class or file.py:Class; settings: keywords of its constructor; reward: sum of all
    rewards, or the last; rules: a text for the prompt in place of the class's docstring."""

    def __init__(self, environment: str, settings: dict[str, Any] | None = None, reward: str = "sum",
                 rules: str | None = None) -> None:
        if reward not in REWARDS:
            raise ValueError(f"env.kwargs.reward={reward!r}: allowed: {', '.join(REWARDS)}")
        try:
            self.make = load_function(environment, key="env.kwargs.environment")
        except ValueError as error:
            hint = "; such classes need openenv: pip install -e '.[openenv]'" if "openenv" in str(error) else ""
            raise ValueError(f"{error}{hint}") from error
        self.settings, self.reward_of = settings or {}, reward
        self.action = typing.get_type_hints(self.make.step).get("action") if hasattr(self.make, "step") else None
        if not hasattr(self.action, "model_json_schema"):
            raise ValueError(f"env.kwargs.environment={environment!r}: its step() names no pydantic model as the type of "
                             "`action`; an OpenEnv Environment has step(self, action: SomeAction)")
        schema = self.action.model_json_schema()
        schema["properties"].pop("metadata", None)
        self.tool = {"name": "step", "description": inspect.cleandoc(vars(self.action).get("__doc__") or "Takes an action."),
                     "inputSchema": schema}
        self.rules = rules or inspect.cleandoc(vars(self.make).get("__doc__") or self.make.__name__)

    def create(self, task: object, seed: int = 0, episode_id: str | None = None) -> GameSession:
        game = _OpenEnvGame(self, seed)
        return GameSession(game, f"{self.rules}\n\n{to_json(game.first, 'the first observation')}", self.tool)


class _OpenEnvGame:
    def __init__(self, owner: OpenEnvEnvironments, seed: int) -> None:
        self.action, self.reward_of, self.random = owner.action, owner.reward_of, OwnRandom(seed)
        self.rewards: list[float] = []
        with self.random.held():
            self.env = owner.make(**owner.settings)
            parameters = inspect.signature(self.env.reset).parameters
            self.first = seen(self.env.reset(**({"seed": seed} if "seed" in parameters else {})))

    def step(self, arguments: dict) -> tuple[dict, bool]:
        action = self.action.model_validate(arguments)  # its error is a ValueError
        with self.random.held():
            observation = self.env.step(action)
        if observation.reward is not None:
            self.rewards.append(float(observation.reward))
        return seen(observation), bool(observation.done)

    def reward(self) -> tuple[float, dict]:
        return (sum(self.rewards) if self.reward_of == "sum" else (self.rewards or [0.0])[-1]), {}

    def close(self) -> None:
        self.env.close()


def seen(observation: Any) -> dict[str, Any]:
    """An observation without what is empty."""
    return {name: value for name, value in observation.model_dump(mode="json").items() if value not in (None, {})}
