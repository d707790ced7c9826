"""Countdown: reach a target from given numbers with + - * / and brackets, each number used at most once.

The reward is 1 if the final message is an expression that does so, else 0. A parser of its own reads it: whole numbers, the four
operators and brackets, in exact fractions; Python evaluates nothing. Every problem can be solved, and none by a number alone.
"""

import random
import re
from collections import Counter
from fractions import Fraction

from grpo.batch import Completion
from grpo.environment import Score
from grpo.envs.drawn_tasks import DrawnTasks, check_ranges
from models.chat.tokenizer import Tokenizer

MOST_CHARACTERS, MOST_DEPTH = 200, 20  # of an expression, of its brackets
SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
PIECE = re.compile(r"[0-9]{1,6}|[-+*/()]")


class Refused(ValueError):
    """Why a text is no answer."""


class Countdown(DrawnTasks):
    """The environment.

    fewest_numbers, most_numbers: how many are given
    largest_number: they are drawn from 1 to this, repeats included
    largest_target: targets lie between 1 and this"""

    INSTRUCTIONS = ("Write an arithmetic expression that equals the target. Use the given numbers, each at most once, with the "
                    "operators + - * / and brackets. Answer with the expression alone, such as (3+4)*2.")

    def __init__(self, *, tokenizer: Tokenizer, seed: int, fewest_numbers: int, most_numbers: int, largest_number: int,
                 largest_target: int, held_out_fraction: float, num_eval_prompts: int, reasoning_effort: str, current_date: str):
        super().__init__(tokenizer=tokenizer, seed=seed, held_out_fraction=held_out_fraction, num_eval_prompts=num_eval_prompts,
                         reasoning_effort=reasoning_effort, current_date=current_date)
        check_ranges({"fewest_numbers": (fewest_numbers, 2, 8), "most_numbers": (most_numbers, fewest_numbers, 8),
                      "largest_number": (largest_number, 4, 999), "largest_target": (largest_target, 10, 99_999)})
        self.counts, self.largest_number, self.largest_target = (fewest_numbers, most_numbers), largest_number, largest_target

    def draw(self, rng: random.Random) -> dict:
        while True:
            numbers = [rng.randint(1, self.largest_number) for _ in range(rng.randint(*self.counts))]
            target, solution = combine(numbers, rng)
            if target.denominator == 1 and 1 <= target <= self.largest_target and target not in numbers:
                return {"question": f"Numbers: {', '.join(map(str, numbers))}\nTarget: {target}", "numbers": numbers,
                        "target": int(target), "solution": solution}

    def identity(self, row: dict) -> str:
        return f"{sorted(row['numbers'])} {row['target']}"

    def score_one(self, completion: Completion) -> Score:
        """See the module. The part `valid` is 1 for an expression of the given numbers, whatever its value."""
        row, extra, is_valid, is_correct = completion.prompt.row, {}, False, False
        try:
            value = evaluate(self.parse(completion).final, row["numbers"], row["target"])
            is_valid, is_correct = True, value == row["target"]
            extra = {} if is_correct else {"refused": f"the expression equals {value}"}
        except Refused as refused:
            extra = {"refused": str(refused)}
        return Score(float(is_correct), {"correct": float(is_correct), "valid": float(is_valid)}, {}, is_correct, extra)


def combine(numbers: list[int], rng: random.Random) -> tuple[Fraction, str]:
    """All of the numbers joined at random: the value, and the expression. Divisions that leave a rest, and values that are not
    positive, are not drawn."""
    parts = [(Fraction(number), str(number)) for number in numbers]
    while len(parts) > 1:
        (left, first), (right, second) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        allowed = ["+", "*", *(["-"] if left > right else []), *(["/"] if left % right == 0 else [])]
        operator = rng.choice(allowed)
        parts.append((apply(operator, left, right), f"({first}{operator}{second})"))
    value, expression = parts[0]
    return value, expression[1:-1]


def apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    if operator == "/":
        if right == 0:
            raise Refused("a division by zero")
        return left / right
    return left + right if operator == "+" else left - right if operator == "-" else left * right


def evaluate(text: str, numbers: list[int], target: int) -> Fraction:
    """The value of an expression of these numbers, which may be followed by `= target`. Raises Refused for anything else."""
    text = text.strip()
    if len(text) > MOST_CHARACTERS:
        raise Refused(f"{len(text)} characters; an expression has at most {MOST_CHARACTERS}")
    if not text:
        raise Refused("no answer")
    expression, _, result = text.translate(SPELLINGS).partition("=")
    if result and result.strip() != str(target):
        raise Refused("something else than the target behind =")
    pieces = PIECE.findall(expression)
    if "".join(pieces) != re.sub(r"[ \t]+", "", expression) or re.search(r"[0-9][ \t]+[0-9]", expression):
        raise Refused("no expression of numbers, + - * / and brackets")
    used = Counter(int(piece) for piece in pieces if piece.isdigit())
    if missing := used - Counter(numbers):
        raise Refused(f"it uses {', '.join(map(str, missing))}, which is not given, or not that often")
    pieces.reverse()  # the next one is the last
    value = _sum(pieces, 0)
    if pieces:
        raise Refused(f"an unexpected {pieces[-1]!r}")
    return value


def _sum(pieces: list[str], depth: int) -> Fraction:
    value = _product(pieces, depth)
    while pieces and pieces[-1] in "+-":
        value = apply(pieces.pop(), value, _product(pieces, depth))
    return value


def _product(pieces: list[str], depth: int) -> Fraction:
    value = _factor(pieces, depth)
    while pieces and pieces[-1] in "*/":
        value = apply(pieces.pop(), value, _factor(pieces, depth))
    return value


def _factor(pieces: list[str], depth: int) -> Fraction:
    piece = pieces.pop() if pieces else ""
    if piece.isdigit():
        return Fraction(int(piece))
    if piece != "(":
        raise Refused(f"a number or ( is missing before {repr(piece) if piece else 'the end'}")
    if depth == MOST_DEPTH:
        raise Refused("too many brackets")
    value = _sum(pieces, depth + 1)
    if not pieces or pieces.pop() != ")":
        raise Refused("a bracket that is not closed")
    return value
