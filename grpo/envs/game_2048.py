"""2048, played with a tool: each call slides the tiles and returns the board.

The judge plays the completion's calls again on a board of its own, with the same tiles: those follow from the prompt's seed and
the number of moves made, and nothing in the prompt tells it. The reward grows with the square of the largest tile, from 0 for the
first ones to 1 for the goal: half the goal is worth a quarter, for moves in any fixed order come that far. Moves that change
nothing are refused and earn nothing.
"""

import random
from typing import Literal

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from grpo.envs.drawn_tasks import DrawnTasks, check_ranges, replay
from models.chat.functions import function_schema
from models.chat.tokenizer import Tokenizer

DIRECTIONS = ("up", "down", "left", "right")
FIRST_TILE = 4  # the largest that appears by itself

Board = list[list[int]]  # rows; 0 is an empty cell


def slide(board: Board, direction: str) -> Board:
    """The board after a move, without a new tile: tiles slide, and pairs of equal ones that meet merge, each once."""
    lines = board if direction in ("left", "right") else [list(line) for line in zip(*board)]
    if direction in ("right", "down"):
        lines = [_merged(line[::-1])[::-1] for line in lines]
    else:
        lines = [_merged(line) for line in lines]
    return lines if direction in ("left", "right") else [list(line) for line in zip(*lines)]


def _merged(line: list[int]) -> list[int]:
    """A line slid to its beginning."""
    tiles, merged = [tile for tile in line if tile], []
    while tiles:
        tile = tiles.pop(0)
        if tiles and tiles[0] == tile:
            tile += tiles.pop(0)
        merged.append(tile)
    return merged + [0] * (len(line) - len(merged))


class Game2048:
    """One game: a square board with two tiles. It ends with the goal, without a move left, or after `most_moves`."""

    def __init__(self, seed: int, size: int, goal: int, most_moves: int):
        self._rng, self.goal, self._most_moves, self.num_moves = random.Random(f"2048 tiles {seed}"), goal, most_moves, 0
        self.board: Board = [[0] * size for _ in range(size)]
        self._add_tile()
        self._add_tile()

    def make_move(self, direction: str) -> None:
        """Raises ValueError for a move that changes nothing."""
        slid = slide(self.board, direction)
        if slid == self.board:
            raise ValueError(f"{direction} moves no tile")
        self.board, self.num_moves = slid, self.num_moves + 1
        self._add_tile()

    @property
    def largest(self) -> int:
        return max(map(max, self.board))

    @property
    def is_over(self) -> bool:
        return (self.largest >= self.goal or self.num_moves >= self._most_moves
                or all(slide(self.board, direction) == self.board for direction in DIRECTIONS))

    def progress(self) -> float:
        """From 0 for the first tiles to 1 for the goal, squared."""
        return min(max((self.largest - FIRST_TILE) / (self.goal - FIRST_TILE), 0.0), 1.0) ** 2

    def _add_tile(self) -> None:
        empty = [(row, column) for row, line in enumerate(self.board) for column, tile in enumerate(line) if tile == 0]
        row, column = self._rng.choice(empty)
        self.board[row][column] = 4 if self._rng.random() < 0.1 else 2

    def shown(self) -> str:
        width = len(str(self.largest))
        return "\n".join(" ".join(str(tile or ".").rjust(width) for tile in line) for line in self.board)


class MoveTool:
    """The tool of one completion."""

    def __init__(self, game: Game2048):
        self.game = game

    def move(self, direction: Literal["up", "down", "left", "right"]) -> str:
        """Slides the tiles and returns the board."""
        if self.game.is_over:
            raise ValueError("the game is over")
        self.game.make_move(direction)
        if self.game.largest >= self.game.goal:
            return f"{self.game.shown()}\nThe goal of {self.game.goal} is reached."
        return self.game.shown() + ("\nThe game is over." if self.game.is_over else "")


class Play2048(DrawnTasks):
    """The environment.

    size: side of the board
    goal: the tile to reach, a power of 2
    most_moves: of a game"""

    INSTRUCTIONS = ("Play 2048 with the function move, one move a call, until the game is over. A move slides all tiles as far "
                    "as they go; two equal tiles that meet become one of their sum; then a 2, or seldom a 4, appears in an empty "
                    "cell. When the game is over, answer with its largest tile.")
    TOOLS = (function_schema(MoveTool(Game2048(0, 3, 64, 1)).move),)

    def __init__(self, *, tokenizer: Tokenizer, seed: int, size: int, goal: int, most_moves: int, held_out_fraction: float,
                 num_eval_prompts: int, reasoning_effort: str, current_date: str):
        super().__init__(tokenizer=tokenizer, seed=seed, held_out_fraction=held_out_fraction, num_eval_prompts=num_eval_prompts,
                         reasoning_effort=reasoning_effort, current_date=current_date)
        check_ranges({"size": (size, 2, 6), "goal": (goal, 8, 2048), "most_moves": (most_moves, 1, 2000)})
        if goal & (goal - 1):
            raise ValueError(f"env.goal={goal}: must be a power of 2")
        self.rules = (size, goal, most_moves)

    def draw(self, rng: random.Random) -> dict:
        seed = rng.getrandbits(48)
        size, goal, most_moves = self.rules
        board = Game2048(seed, *self.rules).shown()
        return {"question": f"Reach a tile of {goal} within {most_moves} moves. The board:\n{board}", "game_seed": seed}

    def identity(self, row: dict) -> str:
        return str(row["game_seed"])

    def episode(self, prompt: Prompt, sample: int) -> MoveTool:
        return MoveTool(Game2048(prompt.row["game_seed"], *self.rules))

    def score_one(self, completion: Completion) -> Score:
        tool = self.episode(completion.prompt, completion.sample)
        num_moves, num_refused = replay(tool, completion)
        game = tool.game
        metrics = {"moves": num_moves, "moves/refused": num_refused, "largest_tile": game.largest}
        is_won = game.progress() == 1.0
        return Score(game.progress(), {"progress": game.progress()}, metrics, is_won)
