"""Writing a strategy for 2048: the model answers with a function, which the sandbox runs and which plays several games.

The games belong to this process. In each step the function's process gets the boards as values and returns a move for each;
nothing else of it comes back. The code runs anew in each step, and its process ends with the games. The tiles are drawn here, by
a seed that neither the prompt nor the function knows.

A task asks for one of 48 functions: boards of 3 x 3 or 4 x 4, as rows, columns or one list, with 0 or None for an empty cell, and
moves by one of four sets of names. So no one answer fits many tasks, and some are held out. The reward is the mean, over the
games, of the square of the largest tile (grpo/envs/game_2048.py: from 0 for the first ones to 1 for the goal). A move that
changes nothing, or an unknown one, ends a game with what it has; an exception ends all of them. Whatever violates the sandbox's
rules, or takes too long, earns 0 and is counted by its kind.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass

from grpo.batch import Completion
from grpo.environment import Score
from grpo.envs.code_answers import RefusedAnswer, code_of, refuse_violation, violation_metrics
from grpo.envs.drawn_tasks import DrawnTasks, check_ranges
from grpo.envs.game_2048 import DIRECTIONS, Board, Game2048
from grpo.sandbox.calls import SandboxError
from grpo.sandbox.pool import Sandbox
from models.chat.tokenizer import Tokenizer

GOALS = {3: (64, 50), 4: (128, 100)}  # by the side of the board: the tile to reach, and the most moves
LAYOUTS = {
    "rows": "a list of {size} rows from top to bottom, each a list of {size} cells from left to right",
    "columns": "a list of {size} columns from left to right, each a list of {size} cells from top to bottom",
    "flat": "a list of {cells} cells, row by row from top to bottom, each row from left to right"}
NAMES = (DIRECTIONS, ("U", "D", "L", "R"), ("north", "south", "west", "east"), (0, 1, 2, 3))  # of DIRECTIONS, in their order


@dataclass(frozen=True)
class Variant:
    size: int
    layout: str
    empty: int | None
    names: tuple[str | int, ...]

    def question(self) -> str:
        goal, most_moves = GOALS[self.size]
        layout = LAYOUTS[self.layout].format(size=self.size, cells=self.size**2)
        moves = ", ".join(f"{name!r} ({direction})" for name, direction in zip(self.names, DIRECTIONS))
        return (
            f"Write a Python function `strategy(board)` that plays 2048 with {self.size} x {self.size} cells. `board` is {layout}"
            f"; an empty cell is {self.empty!r}. It returns the next move: {moves}. A move slides all tiles as far as they go; "
            "two equal tiles that meet become one of their sum; then a 2, or seldom a 4, appears in an empty cell. A move that "
            f"changes nothing ends the game. The aim is a tile of {goal} within {most_moves} moves. Nothing is remembered from "
            "one move to the next. Only the standard library may be imported; files, network, threads and other processes are "
            "out of reach. Answer with one ```python code block that holds the function and what it needs, and with nothing else "
            "in code blocks.")

    def view(self, board: Board) -> list:
        """The board as the function sees it."""
        lines = [[tile or self.empty for tile in line] for line in board]
        if self.layout == "flat":
            return [tile for line in lines for tile in line]
        return lines if self.layout == "rows" else [list(line) for line in zip(*lines)]

    def direction(self, move: object) -> str | None:
        """What a move of the function means; None for an unknown one. Raises RefusedAnswer for another type."""
        kind = type(self.names[0])
        if type(move) is not kind:
            raise RefusedAnswer(f"violation: a move is no {kind.__name__}", "type")
        return DIRECTIONS[self.names.index(move)] if move in self.names else None


VARIANTS = [Variant(*values) for values in itertools.product(GOALS, LAYOUTS, (0, None), NAMES)]


class Strategy2048(DrawnTasks):
    """The environment.

    num_games: that a function plays
    step_seconds: wall time for one step of all games
    seconds: CPU time for all steps (the system ends the process within two more)
    held_out_fraction: share of the variants that is kept for evaluation"""

    def __init__(self, *, tokenizer: Tokenizer, seed: int, sandbox: Sandbox | None, num_games: int, step_seconds: float,
                 seconds: float, held_out_fraction: float, reasoning_effort: str, current_date: str):
        ranked = sorted(range(len(VARIANTS)), key=lambda index: hashlib.sha256(repr(VARIANTS[index]).encode()).digest())
        self.held_out = set(ranked[:max(1, round(held_out_fraction * len(VARIANTS)))])
        super().__init__(tokenizer=tokenizer, seed=seed, held_out_fraction=held_out_fraction, reasoning_effort=reasoning_effort,
                         num_eval_prompts=len(self.held_out), current_date=current_date)
        check_ranges({"num_games": (num_games, 1, 64), "step_seconds": (step_seconds, 0.05, 60), "seconds": (seconds, 0.1, 600)})
        self.sandbox, self.num_games, self.step_seconds, self.seconds = sandbox, num_games, step_seconds, seconds

    def draw(self, rng: random.Random) -> dict:
        index = rng.randrange(len(VARIANTS))
        return {"question": VARIANTS[index].question(), "variant": index}

    def is_held_out(self, row: dict) -> bool:
        return row["variant"] in self.held_out

    def score(self, completions: list[Completion]) -> list[Score]:
        """See the module. A completion that the sandbox itself failed on gets no reward."""
        return self.sandbox.map(self.score_one, completions)

    def score_one(self, completion: Completion) -> Score:
        variant = VARIANTS[completion.prompt.row["variant"]]
        games: list[Game2048] = []
        metrics, extra, is_refused = violation_metrics([]), {}, False
        try:
            code = code_of(self.parse(completion).final)
            games += self._games(completion, variant)
            if (problem := self._play(variant, code, games)) is not None:
                extra["problem"] = problem
        except RefusedAnswer as refused:
            metrics, extra, is_refused = violation_metrics([refused.violation]), {"refused": str(refused)}, True
        except SandboxError as error:
            return Score(None, {}, {}, None, {"refused": f"no verdict: {error}"})
        progress = 0.0 if is_refused else sum(game.progress() for game in games) / len(games)
        if games:
            metrics |= {"moves": sum(game.num_moves for game in games) / len(games),
                        "largest_tile": sum(game.largest for game in games) / len(games)}
        return Score(progress, {"progress": progress}, metrics, progress == 1.0, extra)

    def _games(self, completion: Completion, variant: Variant) -> list[Game2048]:
        digest = hashlib.sha256(repr(completion.completion_ids).encode()).hexdigest()
        rng = random.Random(f"2048 games {self.seed} {completion.prompt.id} {completion.sample} {digest}")
        return [Game2048(rng.getrandbits(64), variant.size, *GOALS[variant.size]) for _ in range(self.num_games)]

    def _play(self, variant: Variant, code: str, games: list[Game2048]) -> str | None:
        """Plays the games to their ends. Returns what ended some of them early, if anything did."""
        playing, problems, refusals = list(games), [], []

        def step(moves: list) -> list[list] | None:
            """Makes a move in each game. Returns the boards of those that go on, each the arguments of a call; None for none."""
            try:
                directions = [variant.direction(move) for move in moves]
            except RefusedAnswer as refused:
                refusals.append(refused)
                return None
            for game, move, direction in list(zip(playing, moves, directions)):
                try:
                    if direction is None:
                        raise ValueError(f"{move!r:.40} is no move")
                    game.make_move(direction)
                except ValueError as error:
                    problems.append(str(error))
                    playing.remove(game)
            playing[:] = [game for game in playing if not game.is_over]
            return [[variant.view(game.board)] for game in playing] or None

        outcome = self.sandbox.converse(code, "strategy", [[variant.view(game.board)] for game in playing], step,
                                        seconds=self.step_seconds, cpu_seconds=self.seconds)
        refuse_violation(outcome, outcome.violation or ("time" if outcome.cpu_seconds > self.seconds else None))
        for refused in refusals:
            raise refused
        if outcome.error is not None:
            return f"error: {outcome.error}"
        return problems[-1] if problems else None
