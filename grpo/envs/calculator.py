"""Multiplying two numbers with a calculator at hand: the built-in task with a tool, learnable on a CPU in minutes.

A prompt describes the function `multiply` and asks `69*88`. The wanted completion calls it and gives its result as the final
message. Demonstrations for the supervised warm-up come from a teacher that calls in `call_rate` of the problems, and otherwise
answers with a random number: a model warmed up on them answers greedily without the tool, and is wrong. The reward, 1 for the
right answer, lets GRPO find that calling pays.

Everything drawn is a pure function of (seed, step, attempt). The held-out problems are the same for every seed, and never occur
in prompts or demonstrations, mirrored (88*69) or not.
"""

import json
import random

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from grpo.envs.drawn_tasks import DrawnTasks, check_ranges, is_chosen
from models.chat.functions import function_schema
from models.chat.render import Message, generation_prompt, render_message
from models.chat.tokenizer import Tokenizer, build_tiny_tokenizer

WORDS = [" to=", "functions.", "multiply", " json", '{"a": ', ', "b": ']
CHARS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-*/=,.:;?!'\"()[]{}_<>|# \n"


class Multiplication:
    """The tool of one completion."""

    def multiply(self, a: int, b: int) -> int:
        """Multiplies two whole numbers."""
        if max(abs(a), abs(b)) >= 10**18:
            raise ValueError("numbers must have at most 18 digits")
        return a * b


class Calculator(DrawnTasks):
    """The environment.

    digits: length of both numbers
    call_rate: share of the demonstrations that call the tool
    held_out_fraction: share of the pairs of numbers, chosen by hash, that is kept from training

    Raises ValueError for a value out of range."""

    KEY = "calculator"
    INSTRUCTIONS = "Answer with the product alone."
    TOOLS = (function_schema(Multiplication().multiply),)

    def __init__(self, *, tokenizer: Tokenizer, seed: int, digits: int, call_rate: float, held_out_fraction: float,
                 num_eval_prompts: int):
        super().__init__(tokenizer=tokenizer, seed=seed, held_out_fraction=held_out_fraction, num_eval_prompts=num_eval_prompts)
        check_ranges({"digits": (digits, 1, 9), "call_rate": (call_rate, 0, 1)})
        self.lowest, self.highest, self.call_rate = 10 ** (digits - 1), 10**digits - 1, call_rate
        most = int(held_out_fraction * (self.highest - self.lowest + 1) ** 2 / 4)
        check_ranges({"num_eval_prompts": (num_eval_prompts, 1, most)})

    def draw(self, rng: random.Random) -> dict:
        a, b = rng.randint(self.lowest, self.highest), rng.randint(self.lowest, self.highest)
        return {"question": f"{a}*{b}", "answer": str(a * b)}

    def is_held_out(self, row: dict) -> bool:
        low, high = sorted(factors(row))
        return is_chosen(f"{low}*{high}", self.held_out_fraction)

    @classmethod
    def build_tokenizer(cls) -> Tokenizer:
        """For models without a checkpoint: characters, and the system and developer messages as a token each."""
        return build_tiny_tokenizer([*WORDS, *(message.content for message in cls.first_messages())], CHARS)

    def episode(self, prompt: Prompt, sample: int) -> Multiplication:
        return Multiplication()

    def demonstrations(self, step: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) by the teacher, for a supervised step. A demonstration that calls is two of them, one for
        each turn: nobody learns to write the tool's result."""
        rng = random.Random(f"calculator demonstrations {self.seed} {step}")
        tokenizer, start = self.tokenizer, generation_prompt(self.tokenizer)
        pairs = []
        for _ in range(batch_size):
            row = self._draw(rng, is_held_out=False)
            prompt, (a, b), answer = self.encode_prompt(row["question"]), factors(row), row["answer"]
            if rng.random() < self.call_rate:
                call = Message("assistant", json.dumps({"a": a, "b": b}), "commentary", "functions.multiply", "json")
                result = Message("tool", answer, "commentary", "assistant", name="functions.multiply")
                call_ids = render_message(call, tokenizer)[len(start):]
                pairs.append((prompt, call_ids))
                prompt = [*prompt, *call_ids, *render_message(result, tokenizer), *start]
            else:
                answer = rng.randint(self.lowest**2, self.highest**2)
            final = render_message(Message("assistant", str(answer), "final"), tokenizer)
            pairs.append((prompt, [*final[len(start):-1], tokenizer.return_]))
        return pairs

    def score_one(self, completion: Completion) -> Score:
        """1 for the product as the final message."""
        is_correct = self.parse(completion).final == completion.prompt.row["answer"]
        return Score(float(is_correct), {"exact_match": float(is_correct)}, {}, is_correct)


def factors(row: dict) -> tuple[int, int]:
    a, _, b = row["question"].partition("*")
    return int(a), int(b)
