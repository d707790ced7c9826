"""Minesweeper, played with a tool: each call opens a cell and returns the board as it is seen then.

A board's first cell is open from the start, and from there logic alone finds all others, without a guess. The judge plays the
completion's calls again on a board of its own. The reward is half the share of the safe cells that were opened, and the other
half for all of them. A mine ends the game and takes nothing back: so neither stopping early nor a try that fails ever pays more
than going on. Messages, formats and calls that are refused earn nothing.
"""

import random
from collections.abc import Iterable

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from grpo.envs.drawn_tasks import DrawnTasks, check_ranges, replay
from models.chat.functions import function_schema
from models.chat.tokenizer import Tokenizer

FEWEST_CLOSED = 5  # safe cells that are left to open

Cell = tuple[int, int]  # row and column, from 0


class Minefield:
    """One game."""

    def __init__(self, height: int, width: int, mines: Iterable[Cell], first: Cell):
        self._height, self._width, self._mines = height, width, frozenset(mines)
        self._opened: set[Cell] = set()
        self._is_lost = False
        self._uncover(first)
        self._num_given = len(self._opened)

    def open(self, row: int, column: int) -> str:
        """Opens a cell and returns the board.

        Args:
            row: from 0, the topmost
            column: from 0, the leftmost
        """
        if self._is_over:
            raise ValueError("the game is over")
        if not (0 <= row < self._height and 0 <= column < self._width):
            raise ValueError(f"rows lie in 0..{self._height - 1} and columns in 0..{self._width - 1}")
        if (row, column) in self._opened:
            raise ValueError("this cell is open")
        if (row, column) in self._mines:
            self._is_lost = True
            return "A mine. The game is lost."
        self._uncover((row, column))
        return self._shown() + ("\nAll safe cells are open. The game is won." if self._is_won else "")

    @property
    def _is_won(self) -> bool:
        return len(self._opened) + len(self._mines) == self._height * self._width

    @property
    def _is_over(self) -> bool:
        return self._is_lost or self._is_won

    def _share(self) -> float:
        """Share of the safe cells, those given aside, that are open."""
        num_safe = self._height * self._width - len(self._mines)
        return (len(self._opened) - self._num_given) / (num_safe - self._num_given)

    def _around(self, cell: Cell) -> list[Cell]:
        row, column = cell
        return [(r, c) for r in range(max(row - 1, 0), min(row + 2, self._height))
                for c in range(max(column - 1, 0), min(column + 2, self._width)) if (r, c) != cell]

    def _number(self, cell: Cell) -> int:
        return sum(other in self._mines for other in self._around(cell))

    def _uncover(self, cell: Cell) -> None:
        """Opens a cell, and where it has no mine around it, those around."""
        waiting = [cell]
        while waiting:
            cell = waiting.pop()
            if cell not in self._opened:
                self._opened.add(cell)
                waiting += self._around(cell) if self._number(cell) == 0 else []

    def _shown(self) -> str:
        lines = ["  " + " ".join(map(str, range(self._width)))]
        for row in range(self._height):
            cells = [str(self._number((row, c))) if (row, c) in self._opened else "#" for c in range(self._width)]
            lines.append(f"{row} " + " ".join(cells))
        return "\n".join(lines)

    def _deduce(self) -> bool:
        """Opens what follows from the numbers, by each of them and by pairs whose cells contain each other's, until all is open.
        False if that does not suffice."""
        while not self._is_won:
            cells = {(row, column) for row in range(self._height) for column in range(self._width)}
            facts = {(frozenset(cells - self._opened), len(self._mines))}  # sets of cells, and how many mines are in them
            facts |= {(frozenset(self._around(cell)) - self._opened, self._number(cell)) for cell in self._opened}
            facts |= {(large - small, more - fewer) for large, more in facts for small, fewer in facts if small < large}
            mines = {cell for cells, number in facts if len(cells) == number for cell in cells}
            safe = {cell for cells, number in facts if number == len(cells & mines) for cell in cells - mines}
            if not safe:
                return False
            for cell in safe:
                self._uncover(cell)
        return True


class Minesweeper(DrawnTasks):
    """The environment.

    height, width, mines: of a board"""

    INSTRUCTIONS = ("Play Minesweeper with the function open, one cell a call, until the game is won or lost. A number on the "
                    "board counts the mines in the up to eight cells around; # is a closed cell. When the game is over, answer "
                    "with one word, won or lost.")
    TOOLS = (function_schema(Minefield(2, 2, [], (0, 0)).open),)

    def __init__(self, *, tokenizer: Tokenizer, seed: int, height: int, width: int, mines: int, held_out_fraction: float,
                 num_eval_prompts: int, reasoning_effort: str, current_date: str):
        super().__init__(tokenizer=tokenizer, seed=seed, held_out_fraction=held_out_fraction, num_eval_prompts=num_eval_prompts,
                         reasoning_effort=reasoning_effort, current_date=current_date)
        check_ranges({"height": (height, 4, 10), "width": (width, 4, 10), "mines": (mines, 2, height * width // 5)})
        self.height, self.width, self.num_mines = height, width, mines

    def draw(self, rng: random.Random) -> dict:
        cells = [(row, column) for row in range(self.height) for column in range(self.width)]
        while True:
            row = {"mines": rng.sample(cells, self.num_mines), "first": rng.choice(cells)}
            if row["first"] in row["mines"]:
                continue
            game, solved = self._game(row), self._game(row)
            num_closed = len(cells) - self.num_mines - game._num_given
            if game._number(row["first"]) == 0 and num_closed >= FEWEST_CLOSED and solved._deduce():
                board = game._shown()
                return {"question": f"The board has {self.num_mines} mines:\n{board}", **row}

    def identity(self, row: dict) -> str:
        return str(sorted(map(tuple, row["mines"])))

    def episode(self, prompt: Prompt, sample: int) -> Minefield:
        return self._game(prompt.row)

    def _game(self, row: dict) -> Minefield:
        return Minefield(self.height, self.width, map(tuple, row["mines"]), tuple(row["first"]))

    def score_one(self, completion: Completion) -> Score:
        game = self._game(completion.prompt.row)
        num_moves, num_refused = replay(game, completion)
        parts = {"opened": game._share(), "won": float(game._is_won)}
        metrics = {"moves": num_moves, "moves/refused": num_refused, "lost": float(game._is_lost)}
        return Score(0.5 * parts["opened"] + 0.5 * parts["won"], parts, metrics, game._is_won)
