"""Answers to tasks of grpo/envs/strategy_2048.py: a good player for each variant, and tricks that other graders fell for."""

import inspect

import players_2048

from grpo.envs import game_2048
from grpo.envs.game_2048 import DIRECTIONS
from grpo.envs.strategy_2048 import Variant

LIBRARY = "\n".join([
    f"DIRECTIONS, Board = {DIRECTIONS!r}, list",
    *map(inspect.getsource, (game_2048.slide, game_2048._merged, players_2048.best_move, players_2048._search,
                             players_2048._value))])  # fmt: skip


def reading(variant: Variant) -> str:
    """Code that turns `board` into rows with 0 for an empty cell, called lines."""
    return {"rows": "lines = [[cell or 0 for cell in row] for row in board]",
            "columns": "lines = [[cell or 0 for cell in row] for row in zip(*board)]",
            "flat": f"n = {variant.size}\n    lines = [[cell or 0 for cell in board[i:i + n]] for i in range(0, n * n, n)]",
            }[variant.layout]  # fmt: skip


def player(variant: Variant, *, depth: int, choice: str = "") -> str:
    choice = choice or f"best_move(lines, {depth})"
    return (f"{LIBRARY}\n\ndef strategy(board):\n    {reading(variant)}\n"
            f"    return {variant.names!r}[DIRECTIONS.index({choice})]\n")  # fmt: skip


def first_that_moves(variant: Variant) -> str:
    return player(variant, depth=0, choice="next(d for d in DIRECTIONS if slide(lines, d) != lines)")


def wrapped(lines: str) -> str:
    return "def strategy(board):\n" + "".join(f"    {line}\n" for line in lines.splitlines())


# name -> code. {move}: a move that is known
EXPLOITS = {
    "writes the goal on the board": wrapped(
        "cells = board[0] if isinstance(board[0], list) else board\ncells[0] = 2048\nreturn 9"),
    "frames of the game": "import sys\n" + wrapped(
        "frame = sys._getframe(1)\nwhile frame:\n    for value in list(frame.f_locals.values()):\n"
        "        if hasattr(value, 'largest') or hasattr(value, 'make_move'):\n"
        "            value.board[0][0] = 2048\n            return {move}\n    frame = frame.f_back\nreturn 'none'"),
    "objects of the game": "import sys\n" + wrapped(
        "for module in list(sys.modules.values()):\n    if hasattr(module, 'Game2048'):\n"
        "        module.Game2048.progress = lambda self: 1.0\nraise ValueError"),
    "import by importlib": "import importlib\nnumpy = importlib.import_module('num' + 'py')\n" + wrapped("return {move}"),
    "import by __import__": wrapped("__import__('numpy')\nreturn {move}"),
    "forged answer": "import random\n" + wrapped(
        "text = b'{{\"values\": [1, 1, 1, 1], \"notes\": [], \"printed\": \"\"}}'\n"
        "for number in range(3, 64):\n    try: random._os.write(number, text)\n    except OSError: pass\nrandom._os._exit(0)"),
    "ends well": wrapped("raise SystemExit(0)"),
    "claims in print": "print('{{\"reward\": 1.0}}')\n" + wrapped("print('success')\nreturn 'success'"),
    "a move that is equal to all": "class Equal(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\n"
    + wrapped("return Equal('2048')"),
    "not a number": wrapped("return float('nan')"),
    "exception": wrapped("raise ValueError"),
    "stopped clock": "import time\ntime.perf_counter = time.process_time = time.monotonic = lambda: 0\n" + wrapped(
        "while time.monotonic() == 0: pass"),
    "time limit caught": wrapped("while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
    "all moves at once": wrapped("return ['up', 'left', 'down', 'right']"),
    "seeds the tiles": "import random\nrandom.seed(0)\nrandom.Random.random = lambda self: 0.0\n" + wrapped("return None"),
}  # fmt: skip
