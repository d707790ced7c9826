"""What tasks share whose problems are drawn by a seed and asked in words: prompts, the held-out part, entries for the log."""

import hashlib
import random
from collections.abc import Mapping

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from models.chat.functions import public_methods, read_arguments
from models.chat.parse import Parsed, parse_completion
from models.chat.render import Message, harmony_messages, render_prompt
from models.chat.tokenizer import Tokenizer, build_byte_tokenizer

CURRENT_DATE = "2025-08-05"  # in the system message; pinned, so that prompts do not change from day to day
MOST_DRAWS = 1000  # for each held-out problem


def check_ranges(ranges: Mapping[str, tuple[float, float, float]]) -> None:
    """Raises ValueError for the first key whose (value, lowest, highest) does not fit."""
    for key, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"env.{key}={value}: must lie in {low}..{high}")


def is_chosen(text: str, fraction: float) -> bool:
    """Whether a hash of the text falls into this fraction of all: the same ones in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2**64


class DrawnTasks:
    """A task draws a problem in `draw`, which returns the row of a prompt with its `question`, and scores a completion in
    `score_one`, or several together in `score`.

    held_out_fraction: share of the problems, chosen by a hash of `identity`, that is kept from training
    num_eval_prompts: held-out problems to evaluate on; they are the same for every seed

    Everything drawn is a pure function of (seed, step, attempt). Raises ValueError for a value out of range."""

    KEY: str | None = None  # of what is drawn; None: the name of the class
    INSTRUCTIONS: str | None = None  # for the developer message
    TOOLS: tuple[Mapping, ...] = ()  # schemas of the functions that the model may call
    BUILTIN_TOOLS: tuple[str, ...] = ()

    def __init__(self, *, tokenizer: Tokenizer, seed: int, held_out_fraction: float, num_eval_prompts: int,
                 reasoning_effort: str = "low", current_date: str = CURRENT_DATE):
        check_ranges({"held_out_fraction": (held_out_fraction, 0.01, 0.9), "num_eval_prompts": (num_eval_prompts, 1, 100_000)})
        self.tokenizer, self.seed, self.key = tokenizer, seed, self.KEY or type(self).__name__
        self.held_out_fraction, self.num_eval_prompts = held_out_fraction, num_eval_prompts
        self.chat_settings = {"reasoning_effort": reasoning_effort, "current_date": current_date,
                              "instructions": self.INSTRUCTIONS}

    def draw(self, rng: random.Random) -> dict:
        raise NotImplementedError

    def score(self, completions: list[Completion]) -> list[Score]:
        return [self.score_one(completion) for completion in completions]

    def score_one(self, completion: Completion) -> Score:
        raise NotImplementedError

    def identity(self, row: dict) -> str:
        """What two askings of the same problem have in common."""
        return row["question"]

    @classmethod
    def build_tokenizer(cls) -> Tokenizer:
        """For models without a checkpoint: bytes, and the lines of the system's and the developer's message as a token each."""
        return build_byte_tokenizer([line for message in cls.first_messages() for line in message.content.splitlines() if line])

    @classmethod
    def first_messages(cls) -> list[Message]:
        """The system's and the developer's, as of a date that the configurations have."""
        return cls.messages("", current_date=CURRENT_DATE, reasoning_effort="low", instructions=cls.INSTRUCTIONS)[:-1]

    @classmethod
    def messages(cls, question: str, *, current_date: str, reasoning_effort: str, instructions: str | None) -> list[Message]:
        return harmony_messages([{"role": "user", "content": question}], current_date=current_date,
                                reasoning_effort=reasoning_effort, instructions=instructions, tools=cls.TOOLS,
                                builtin_tools=cls.BUILTIN_TOOLS)

    def prompts(self, step: int, *, num_prompts: int, attempt: int = 0) -> list[Prompt]:
        """Training problems of a step; `attempt` > 0 draws others for groups that were dropped."""
        rng = random.Random(f"{self.key} prompts {self.seed} {step} {attempt}")
        rows = [self._draw(rng, is_held_out=False) for _ in range(num_prompts)]
        return [self.prompt(attempt * num_prompts + i, row) for i, row in enumerate(rows)]

    def eval_prompts(self) -> list[Prompt]:
        """The held-out problems, all different."""
        rng = random.Random(f"{self.key} evaluation")
        rows: dict[str, dict] = {}
        for _ in range(MOST_DRAWS * self.num_eval_prompts):
            row = self._draw(rng, is_held_out=True)
            rows.setdefault(self.identity(row), row)
            if len(rows) == self.num_eval_prompts:
                return [self.prompt(i, row) for i, row in enumerate(rows.values())]
        raise ValueError(f"env.num_eval_prompts={self.num_eval_prompts}: only {len(rows)} different problems are held out; ask "
                         "for fewer, or raise env.held_out_fraction")

    def describe(self, completion: Completion) -> dict:
        parsed, row = self.parse(completion), completion.prompt.row
        asked = {name: row[name] for name in ("question", "answer") if name in row}
        return {**asked, "analysis": parsed.analysis, "final": parsed.final, "fault": parsed.fault}

    def encode_prompt(self, question: str) -> list[int]:
        return render_prompt(self.messages(question, **self.chat_settings), self.tokenizer)

    def prompt(self, prompt_id: int, row: dict) -> Prompt:
        return Prompt(prompt_id, self.encode_prompt(row["question"]), row)

    def parse(self, completion: Completion) -> Parsed:
        return parse_completion(completion.completion_ids, self.tokenizer, is_policy=completion.is_policy)

    def is_held_out(self, row: dict) -> bool:
        return is_chosen(self.identity(row), self.held_out_fraction)

    def _draw(self, rng: random.Random, *, is_held_out: bool) -> dict:
        for _ in range(MOST_DRAWS):
            if self.is_held_out(row := self.draw(rng)) == is_held_out:
                return row
        part = "held out" if is_held_out else "to train on"
        raise ValueError(f"env.held_out_fraction={self.held_out_fraction}: no problem {part} in {MOST_DRAWS} draws")


def replay(game: object, completion: Completion) -> tuple[int, int]:
    """Makes the moves of a completion's calls in a new game. Returns how many there were, and how many were refused."""
    moves = public_methods(game, without=())
    calls = completion.episode.calls if completion.episode is not None else []
    num_moves = num_refused = 0
    for call in calls:
        namespace, _, name = call.name.rpartition(".")
        if namespace != "functions" or name not in moves:
            continue
        num_moves += 1
        try:
            moves[name](**read_arguments(moves[name], call.arguments))
        except ValueError:
            num_refused += 1
    return num_moves, num_refused
