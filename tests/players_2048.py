"""A good player of 2048 for tests: it looks one move and one tile ahead, and keeps large tiles in a corner."""

from grpo.envs.game_2048 import DIRECTIONS, slide


def best_move(board, depth=1):
    return _search(board, depth)[1]


def _search(board, depth):
    found = [(_value(slid, depth), direction) for direction in DIRECTIONS if (slid := slide(board, direction)) != board]
    return max(found, default=(-1000.0, None))


def _value(board, depth):
    size = len(board)
    empty = [(row, column) for row in range(size) for column in range(size) if board[row][column] == 0]
    if depth == 0:
        snake = [board[row][column if row % 2 == 0 else size - 1 - column] for row in range(size) for column in range(size)]
        return 20 * len(empty) + sum(10 * tile * 0.25**place for place, tile in enumerate(snake))
    total = 0.0
    for row, column in empty:
        for tile, share in ((2, 0.9), (4, 0.1)):
            board[row][column] = tile
            total += share * _search(board, depth - 1)[0]
        board[row][column] = 0
    return total / len(empty)
