r"""Questions of arithmetic that take a computation, with the tool `python` at hand.

A question is one of eight kinds (powers modulo a number, primes in a range, Collatz steps, ways to pay, ...) with numbers drawn
for it. The reward is 1 for a final message that states the right number, by grpo.rewards.match.numeric_match, else 0.

Code that a model may write in good faith (a module that is not there, a loop without end) costs nothing but the turn. Code that
reaches for files, the network or other processes, or ends its process, makes the reward 0. All is counted by its kind.
"""

import math
import random
from collections.abc import Callable

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from grpo.envs.code_answers import violation_metrics
from grpo.envs.drawn_tasks import DrawnTasks, check_ranges
from grpo.envs.python_tool import PythonTool
from grpo.rewards.match import numeric_match
from grpo.sandbox.pool import Sandbox
from models.chat.tokenizer import Tokenizer

STATELESS = " Each call of python begins anew, without the names of earlier calls."
MOST_CHARACTERS = 10_000  # of a final message; a longer one is wrong
GATING = ("call", "crash")  # violations that no honest code commits


def power(rng: random.Random) -> tuple[str, int]:
    base, exponent, modulus = rng.randint(12, 999), rng.randint(100, 9999), rng.randint(1000, 99999)
    return f"What is the remainder of {base}^{exponent} divided by {modulus}?", pow(base, exponent, modulus)


def multiples(rng: random.Random) -> tuple[str, int]:
    last, (a, b, c) = rng.randint(1000, 9999), rng.sample(range(3, 30), 3)
    count = sum((n % a == 0 or n % b == 0) and n % c != 0 for n in range(1, last + 1))
    return f"How many whole numbers from 1 to {last} are divisible by {a} or {b}, but not by {c}?", count


def factorial_digits(rng: random.Random) -> tuple[str, int]:
    n = rng.randint(20, 999)
    return f"What is the sum of the decimal digits of {n}! (the factorial of {n})?", sum(map(int, str(math.factorial(n))))


def primes(rng: random.Random) -> tuple[str, int]:
    first, width = rng.randint(100, 20_000), rng.randint(200, 1000)
    count = sum(all(n % d for d in range(2, math.isqrt(n) + 1)) for n in range(first, first + width + 1))
    return f"How many primes p are there with {first} <= p <= {first + width}?", count


def collatz(rng: random.Random) -> tuple[str, int]:
    start = n = rng.randint(1000, 999_999)
    steps = 0
    while n != 1:
        n, steps = (n // 2 if n % 2 == 0 else 3 * n + 1), steps + 1
    return (f"Begin with {start}. In each step halve an even number, and replace an odd number n by 3n+1. How many steps does it "
            "take to reach 1?"), steps


def coins(rng: random.Random) -> tuple[str, int]:
    amount, kinds = rng.randint(60, 300), sorted(rng.sample(range(2, 40), 4))
    ways = [1] + [0] * amount
    for coin in kinds:
        for total in range(coin, amount + 1):
            ways[total] += ways[total - coin]
    return (f"In how many ways can {amount} be paid with coins of {', '.join(map(str, kinds))}, as many of each as one likes, if "
            "their order does not count?"), ways[amount]


def recurrence(rng: random.Random) -> tuple[str, int]:
    start, factor, term, modulus = rng.randint(1, 99), rng.randint(2, 99), rng.randint(1, 99), rng.randint(500, 9999)
    index, value = rng.randint(50, 999), start
    for _ in range(index):
        value = (factor * value * value + term) % modulus
    return f"Let x_0 = {start} and x_(n+1) = ({factor} * x_n^2 + {term}) mod {modulus}. What is x_{index}?", value


def largest_factor(rng: random.Random) -> tuple[str, int]:
    number = n = rng.randint(10**6, 10**7)
    largest, divisor = 1, 2
    while divisor * divisor <= n:
        if n % divisor:
            divisor += 1
        else:
            n, largest = n // divisor, divisor
    return f"What is the largest prime factor of {number}?", max(n, largest)


KINDS: tuple[Callable[[random.Random], tuple[str, int]], ...] = (
    power, multiples, factorial_digits, primes, collatz, coins, recurrence, largest_factor)


class PythonMath(DrawnTasks):
    """The environment.

    seconds, keeps_state: see grpo.envs.python_tool.PythonTool"""

    INSTRUCTIONS = ("Use the tool python to compute. It returns what the code prints, and has only the standard library, no "
                    "files and no network. Answer with the number in \\boxed{}.")
    BUILTIN_TOOLS = ("python",)

    def __init__(self, *, tokenizer: Tokenizer, seed: int, sandbox: Sandbox | None, seconds: float, keeps_state: bool,
                 held_out_fraction: float, num_eval_prompts: int, reasoning_effort: str, current_date: str):
        super().__init__(tokenizer=tokenizer, seed=seed, held_out_fraction=held_out_fraction, num_eval_prompts=num_eval_prompts,
                         reasoning_effort=reasoning_effort, current_date=current_date)
        check_ranges({"seconds": (seconds, 0.1, 60)})
        self.sandbox, self.seconds, self.keeps_state = sandbox, seconds, keeps_state
        self.chat_settings["instructions"] += "" if keeps_state else STATELESS

    def draw(self, rng: random.Random) -> dict:
        question, answer = rng.choice(KINDS)(rng)
        return {"question": question, "answer": str(answer)}

    def episode(self, prompt: Prompt, sample: int) -> PythonTool:
        return PythonTool(self.sandbox, seconds=self.seconds, keeps_state=self.keeps_state)

    def score_one(self, completion: Completion) -> Score:
        found = completion.episode.reward if completion.episode is not None else None
        violations = found if isinstance(found, list) else []
        final = self.parse(completion).final
        is_short = len(final) <= MOST_CHARACTERS
        match = numeric_match(final, completion.prompt.row["answer"], tolerance=0.0) if is_short else 0.0
        is_allowed = not any(kind in GATING for kind in violations)
        metrics = violation_metrics(violations)
        return Score(match * is_allowed, {"numeric_match": match}, metrics, bool(match) and is_allowed)
