"""Writing a fast matrix product in pure Python: the model answers with a function, which the sandbox runs.

A task asks for one of 56 products: of ints or floats; sums of products, the same modulo a prime, or the largest or smallest sum
(as in longest and shortest paths); each matrix as rows or as columns. So no one answer fits many tasks, and some are held out.

A reward is 0, or 0.5 for a right function and up to 0.5 more for speed. First the function must be right on small matrices; then
it takes turns with the textbook's triple loop on larger ones. Each timed call has a process and inputs of its own, each result
is checked, and the time is the CPU time that the kernel counted for the process. Inputs are small multiples of 1 or 1/8, so that
sums are exact in any order and results are compared exactly. Whatever violates the sandbox's rules earns 0 and is counted by its
kind.

Prompts and inputs are pure functions of the seed; times are measured, so rewards for speed differ a little from run to run.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from grpo.envs.code_answers import RefusedAnswer, code_of, refuse_violation, violation_metrics
from grpo.envs.drawn_tasks import DrawnTasks, check_ranges
from grpo.sandbox.calls import Outcome, SandboxError
from grpo.sandbox.pool import Sandbox
from models.chat.tokenizer import Tokenizer

MODULUS = 997
FORMULAS = {  # of an entry of the result; the triple loop's start and step, and what follows the steps
    "product": ("the sum of {a} * {b} over all k", "0", "{c} + {a} * {b}", ""),
    "modular": (f"the sum of {{a}} * {{b}} over all k, modulo {MODULUS}", "0", "{c} + {a} * {b}", f"{{c}} %= {MODULUS}"),
    "longest": ("the largest of {a} + {b} over all k", "-10**9", "max({c}, {a} + {b})", ""),
    "shortest": ("the smallest of {a} + {b} over all k", "10**9", "min({c}, {a} + {b})", "")}
NUMBERS = {"int": "whole numbers from -99 to 99", "float": "multiples of 0.125 from -12.375 to 12.375"}
RIGHT = 0.5  # reward of a right function that is no faster than the triple loop


@dataclass(frozen=True)
class Task:
    formula: str  # a key of FORMULAS
    number: str  # int or float
    a_is_columns: bool  # a[k][i] in place of a[i][k]
    b_is_columns: bool  # b[j][k] in place of b[k][j]
    c_is_columns: bool  # c[j][i] in place of c[i][j]

    @property
    def entries(self) -> tuple[str, str, str]:
        return (("a[i][k]", "a[k][i]")[self.a_is_columns], ("b[k][j]", "b[j][k]")[self.b_is_columns],
                ("c[i][j]", "c[j][i]")[self.c_is_columns])

    def question(self) -> str:
        a, b, c = self.entries
        entry = FORMULAS[self.formula][0].format(a=a, b=b)
        return (
            f"Write a Python function `matmul(a, b)` that is as fast as pure Python allows. `a`, `b` and its result `c` are "
            f"lists of lists of {self.number}s, not empty and not always square, with {c} = {entry}. Entries of `a` and `b` are "
            f"{NUMBERS[self.number]}. Leave `a` and `b` as they are. Only the standard library may be imported; files, network, "
            "threads and other processes are out of reach. The result must be exact. Answer with one ```python code block that "
            "holds the function and what it needs, and with nothing else in code blocks.")

    def triple_loop(self) -> str:
        """The textbook's code, which a function must beat."""
        a, b, c = self.entries
        _, start, step, end = FORMULAS[self.formula]
        sides = "columns, rows" if self.c_is_columns else "rows, columns"
        return "\n".join([
            "def matmul(a, b):",
            f"    rows, depth = {'len(a[0]), len(a)' if self.a_is_columns else 'len(a), len(a[0])'}",
            f"    columns = {'len(b)' if self.b_is_columns else 'len(b[0])'}",
            f"    height, width = {sides}",
            f"    c = [[{start}] * width for _ in range(height)]",
            "    for i in range(rows):",
            "        for j in range(columns):",
            "            for k in range(depth):",
            f"                {c} = {step.format(a=a, b=b, c=c)}",
            f"            {end.format(c=c)}",
            "    return c"])

    def draw(self, rng: random.Random, shape: tuple[int, int, int]) -> tuple[list[list], list[list]]:
        """Arguments for c of shape[0] rows and shape[2] columns."""
        rows, depth, columns = shape
        values = [number * (1 if self.number == "int" else 0.125) for number in range(-99, 100)]
        a, b = ([rng.choices(values, k=width) for _ in range(height)]
                for height, width in ((depth, rows) if self.a_is_columns else (rows, depth),
                                      (columns, depth) if self.b_is_columns else (depth, columns)))
        return a, b

    def answer(self, a: list[list], b: list[list]) -> list[list]:
        """The right result, by NumPy."""
        left = np.array(a).T if self.a_is_columns else np.array(a)  # [rows, depth]
        right = np.array(b).T if self.b_is_columns else np.array(b)  # [depth, columns]
        if self.formula in ("product", "modular"):
            result = left @ right
            result = result % MODULUS if self.formula == "modular" else result
        else:
            sums = left[:, :, None] + right[None, :, :]  # [rows, depth, columns]
            result = sums.max(1) if self.formula == "longest" else sums.min(1)
        return (result.T if self.c_is_columns else result).tolist()


TASKS = [Task(formula, number, *columns) for formula, number in itertools.product(FORMULAS, ("int", "float"))
         if (formula, number) != ("modular", "float") for columns in itertools.product((False, True), repeat=3)]


class Matmul(DrawnTasks):
    """The environment.

    size: longest side of a timed matrix; sides are drawn from 3/4 of it upwards
    timed_trials: timed calls, each of the function and of the triple loop; the fastest of each counts
    full_speedup: how many times as fast as the triple loop a function must be for the whole reward
    seconds: wall time for one call
    held_out_fraction: share of the tasks that is kept for evaluation

    Raises ValueError for a value out of range."""

    def __init__(self, *, tokenizer: Tokenizer, seed: int, sandbox: Sandbox | None, size: int, timed_trials: int,
                 full_speedup: float, seconds: float, held_out_fraction: float, reasoning_effort: str, current_date: str):
        check_ranges({"size": (size, 8, 128), "timed_trials": (timed_trials, 1, 20), "full_speedup": (full_speedup, 1.1, 100),
                      "seconds": (seconds, 0.1, 60), "held_out_fraction": (held_out_fraction, 0.05, 0.9)})
        ranked = sorted(TASKS, key=lambda task: hashlib.sha256(repr(task).encode()).digest())
        num_held_out = max(1, round(held_out_fraction * len(TASKS)))
        self.held_out, self.trained = ranked[:num_held_out], ranked[num_held_out:]
        super().__init__(tokenizer=tokenizer, seed=seed, held_out_fraction=held_out_fraction, num_eval_prompts=num_held_out,
                         reasoning_effort=reasoning_effort, current_date=current_date)
        self.sandbox, self.size, self.timed_trials = sandbox, size, timed_trials
        self.full_speedup, self.seconds = full_speedup, seconds

    def prompts(self, step: int, *, num_prompts: int, attempt: int = 0) -> list[Prompt]:
        """Tasks of a step, all different while there are enough; `attempt` > 0 draws others for groups that were dropped."""
        rng = random.Random(f"matmul prompts {self.seed} {step} {attempt}")
        tasks = []
        while len(tasks) < num_prompts:
            tasks += rng.sample(self.trained, min(num_prompts - len(tasks), len(self.trained)))
        return [self._prompt(attempt * num_prompts + i, task) for i, task in enumerate(tasks)]

    def eval_prompts(self) -> list[Prompt]:
        """The held-out tasks."""
        return [self._prompt(i, task) for i, task in enumerate(self.held_out)]

    def score(self, completions: list[Completion]) -> list[Score]:
        """See the module. A completion that the sandbox itself failed on gets no reward."""
        return self.sandbox.map(self.score_one, completions)

    def summary(self) -> str:
        return f"{len(self.trained)} tasks to train on and {len(self.held_out)} held out"

    def _prompt(self, prompt_id: int, task: Task) -> Prompt:
        return self.prompt(prompt_id, {"question": task.question(), "task": TASKS.index(task)})

    # --- scoring ----------------------------------------------------------------------------------------------------

    def score_one(self, completion: Completion) -> Score:
        parts = {"correct": 0.0, "speed": 0.0}
        metrics, extra = violation_metrics([]), {}
        try:
            code = code_of(self.parse(completion).final)
            digest = hashlib.sha256(repr(completion.completion_ids).encode()).hexdigest()
            rng = random.Random(f"matmul inputs {self.seed} {completion.prompt.id} {completion.sample} {digest}")
            speedup = self._speedup(TASKS[completion.prompt.row["task"]], code, rng)
            parts = {"correct": 1.0, "speed": min(max(math.log(speedup) / math.log(self.full_speedup), 0.0), 1.0)}
            metrics["speedup"] = speedup
        except RefusedAnswer as refused:
            metrics, extra = violation_metrics([refused.violation]), {"refused": str(refused)}
        except SandboxError as error:
            return Score(None, {}, {}, None, {"refused": f"no verdict: {error}"})
        return Score(parts["correct"] * (RIGHT + (1 - RIGHT) * parts["speed"]), parts, metrics, bool(parts["correct"]), extra)

    def _speedup(self, task: Task, code: str, rng: random.Random) -> float:
        """CPU time of the triple loop / CPU time of the function. Raises RefusedAnswer for one that is not right."""
        small = [task.draw(rng, shape) for shape in ((1, 1, 1), *(tuple(rng.sample(range(1, 9), 3)) for _ in range(3)))]
        rng.shuffle(small)
        self._checked(task, code, small)
        shape = tuple(rng.randint(self.size * 3 // 4, self.size) for _ in range(3))
        seconds: dict[str, list[float]] = {"loop": [], "function": []}
        for _ in range(self.timed_trials):
            try:
                seconds["loop"].append(self._checked(task, task.triple_loop(), [task.draw(rng, shape)]).cpu_seconds)
            except RefusedAnswer as refused:
                raise SandboxError(f"the triple loop came to a wrong end: {refused}") from refused
            seconds["function"].append(self._checked(task, code, [task.draw(rng, shape)]).cpu_seconds)
        return max(min(seconds["loop"]), 1e-6) / max(min(seconds["function"]), 1e-6)

    def _checked(self, task: Task, code: str, inputs: list[tuple[list[list], list[list]]]) -> Outcome:
        """Calls the function on each of the inputs in one process. Raises RefusedAnswer unless every result is right."""
        outcome = self.sandbox.call(code, "matmul", inputs, seconds=self.seconds)
        refuse_violation(outcome, outcome.violation)
        if outcome.error is not None:
            raise RefusedAnswer(f"error: {outcome.error}")
        for value, (a, b) in zip(outcome.values, inputs):
            check_result(value, task.answer(a, b), {"int": int, "float": float}[task.number])
        return outcome


def check_result(value: object, expected: Sequence[list], kind: type) -> None:
    """Raises RefusedAnswer unless the value is the expected list of lists, of numbers of exactly this kind."""
    is_matrix = isinstance(value, list) and all(isinstance(line, list) for line in value)
    if not is_matrix or not all(type(entry) is kind for line in value for entry in line):
        raise RefusedAnswer(f"violation: the result is no list of lists of {kind.__name__}s", "type")
    if value != expected:
        raise RefusedAnswer("a wrong result")
