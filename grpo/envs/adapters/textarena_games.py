"""TextArena's games for one player, as they are registered: env.environment=grpo.envs.adapters.textarena_games:TextArenaGames.

    env=resource_sessions env.environment=grpo.envs.adapters.textarena_games:TextArenaGames "env.kwargs={game: Sudoku-v0}"

The prompt is the game's own, and a move is a call of `play`. TextArena's wrappers would repeat the whole history in every result,
so its `-raw` game is played, and a result is what the game said since the move before.
"""

from typing import Any

from grpo.envs.adapters.session import GameSession, import_extra, tool
from grpo.envs.global_random import OwnRandom

PLAY = tool("play", "Makes a move.", "move", {"type": "string", "description": "The move, written as the rules say."})


class TextArenaGames:
    """game: its id, such as FrozenLake-v0; settings: keywords of its class, which replace the registered ones."""

    def __init__(self, game: str, settings: dict[str, Any] | None = None) -> None:
        self.library = import_extra("textarena", "textarena")
        self.game, self.settings = game, settings or {}
        known = self.library.envs.registration.ENV_REGISTRY
        if f"{game}-raw" not in known:
            near = [name for name in known if name.split("-")[0].lower() == game.split("-")[0].lower() and "-raw" not in name]
            raise ValueError(f"env.kwargs.game={game!r}: textarena has no such game; near: {', '.join(near) or 'none'}")

    def create(self, task: object, seed: int = 0, episode_id: str | None = None) -> GameSession:
        game = _TextArenaGame(self, seed)
        return GameSession(game, game.observe(), PLAY)


class _TextArenaGame:
    def __init__(self, games: TextArenaGames, seed: int) -> None:
        self.kinds, self.random, self.outcome = games.library.core.ObservationType, OwnRandom(seed), None
        with self.random.held():
            self.env = games.library.make(f"{games.game}-raw", **games.settings)
            try:
                self.env.reset(num_players=1, seed=seed)
            except AssertionError as error:
                raise ValueError(f"env.kwargs.game={games.game!r}: it cannot be played by one player ({error})") from error

    def observe(self) -> str:
        """What the game said since the last time; the player's own words are left out."""
        _, messages = self.env.get_observation()
        return "\n".join(text for _, text, kind in messages if kind != self.kinds.PLAYER_ACTION).strip()

    def step(self, arguments: dict) -> tuple[str, bool]:
        move = arguments["move"]
        with self.random.held():
            is_done, _ = self.env.step(move if "[" in move or "]" in move else f"[{move}]")
            seen = self.observe()
            if is_done:
                rewards, info = self.env.close()
                self.outcome = float(rewards[0]), bool(info[0].get("invalid_move"))
                seen = "\n".join(filter(None, [seen, str(info[0].get("reason") or "The game is over.")]))
        return seen, bool(is_done)

    def reward(self) -> tuple[float, dict]:
        reward, is_invalid = self.outcome or (0.0, False)
        return reward, {"invalid_move": float(is_invalid)}

    def close(self) -> None:
        pass  # an unfinished game has nothing to close
