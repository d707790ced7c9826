"""Gymnasium environments that can be read: those that render as text, or whose observations are text or few numbers.

    env=resource_sessions env.environment=grpo.envs.adapters.gymnasium_games:GymnasiumGames "env.kwargs={game: FrozenLake-v1}"

An action is a call of `act`; the reward is the sum of all rewards. Actions must be Discrete or Text.
"""

import inspect
import re
from typing import Any

from grpo.envs.adapters.session import GameSession, import_extra, tool

LATER_SECTIONS = re.compile(r"^[ \t]*## (Starting|Reward|Episode|Information|Argument|Version|Reference)", re.MULTILINE)
HIGHLIGHTED, COLOR = re.compile(r"\x1b\[[\d;]+m(.*?)\x1b\[0m", re.DOTALL), re.compile(r"\x1b\[[\d;]*m")


class GymnasiumGames:
    """game: its id; modules: to import before, which register it; settings: keywords of gymnasium.make; rules: a text for the
    prompt in place of the first sections of the class's docstring."""

    def __init__(self, game: str, modules: list[str] | None = None, settings: dict[str, Any] | None = None,
                 rules: str | None = None) -> None:
        self.library = import_extra("gymnasium", "gymnasium")
        for module in modules or []:
            import_extra(module, "gymnasium")
        self.game, self.settings = game, dict(settings or {})
        try:
            spec = self.library.spec(game)
            probe = self.library.make(spec, **self.settings)
        except self.library.error.Error as error:
            raise ValueError(f"env.kwargs.game={game!r}: {error}") from error
        if "ansi" in (probe.metadata.get("render_modes") or []):
            self.settings.setdefault("render_mode", "ansi")
        self.rules = rules or LATER_SECTIONS.split(inspect.getdoc(type(probe.unwrapped)) or game)[0].strip()
        self.tool = self._tool(probe.action_space)
        probe.close()

    def create(self, task: object, seed: int = 0, episode_id: str | None = None) -> GameSession:
        env = self.library.make(self.game, **self.settings)
        observation, _ = env.reset(seed=seed)
        game = _GymnasiumGame(env)
        return GameSession(game, f"{self.rules}\n\n{game.read(observation)}", self.tool)

    def _tool(self, space: object) -> dict[str, Any]:
        spaces = self.library.spaces
        if isinstance(space, spaces.Discrete):
            start = int(space.start)
            action = {"type": "integer", "enum": list(range(start, start + int(space.n)))}
        elif isinstance(space, spaces.Text):
            action = {"type": "string"}
        else:
            raise ValueError(f"env.kwargs.game={self.game!r}: its actions are {space}; only Discrete and Text ones can be calls")
        return tool("act", "Takes an action.", "action", action)


class _GymnasiumGame:
    def __init__(self, env: object) -> None:
        self.env, self.total = env, 0.0

    def read(self, observation: object) -> str:
        rendered = self.env.render() if self.env.render_mode == "ansi" else None
        return str(observation) if rendered is None else COLOR.sub("", HIGHLIGHTED.sub(r"[\1]", str(rendered)))

    def step(self, arguments: dict) -> tuple[str, bool]:
        observation, reward, is_terminated, is_truncated, _ = self.env.step(arguments["action"])
        self.total += float(reward)
        is_done = bool(is_terminated or is_truncated)
        return self.read(observation) + ("\nThe game is over." if is_done else ""), is_done

    def reward(self) -> tuple[float, dict]:
        return self.total, {}

    def close(self) -> None:
        self.env.close()
