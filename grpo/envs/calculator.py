"""Multiplying two numbers with a calculator at hand: the built-in task with a tool, learnable on a CPU in minutes.

A prompt describes the function `multiply` and asks `69*88`. The wanted completion calls it and gives its result as the final
message. Demonstrations for the supervised warm-up come from a teacher that calls in `call_rate` of the problems, and otherwise
answers with a random number: a model warmed up on them answers greedily without the tool, and is wrong. The reward, 1 for the
right answer, lets GRPO find that calling pays.

Everything drawn is a pure function of (seed, step, attempt). The held-out problems are the same for every seed, and never occur
in prompts or demonstrations, mirrored (88*69) or not.
"""

import hashlib
import json
import random

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from models.chat.functions import function_schema
from models.chat.parse import parse_completion
from models.chat.render import Message, generation_prompt, harmony_messages, render_message, render_prompt
from models.chat.tokenizer import Tokenizer, build_tiny_tokenizer

CURRENT_DATE = "2025-08-05"  # in the system message; pinned, so that prompts do not change from day to day
INSTRUCTIONS = "Answer with the product alone."
WORDS = [" to=", "functions.", "multiply", " json", '{"a": ', ', "b": ']
CHARS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-*/=,.:;?!'\"()[]{}_<>|# \n"


class Multiplication:
    """The tool of one completion."""

    def multiply(self, a: int, b: int) -> int:
        """Multiplies two whole numbers."""
        if max(abs(a), abs(b)) >= 10**18:
            raise ValueError("numbers must have at most 18 digits")
        return a * b


def prompt_of(question: str) -> list[Message]:
    return harmony_messages([{"role": "user", "content": question}], current_date=CURRENT_DATE, reasoning_effort="low",
                            instructions=INSTRUCTIONS, tools=[function_schema(Multiplication().multiply)])


class Calculator:
    """The environment.

    digits: length of both numbers
    call_rate: share of the demonstrations that call the tool
    held_out_fraction: share of the pairs of numbers, chosen by hash, that is kept from training

    Raises ValueError for a value out of range."""

    def __init__(self, *, tokenizer: Tokenizer, seed: int, digits: int, call_rate: float, held_out_fraction: float,
                 num_eval_prompts: int):
        if not 1 <= digits <= 9:
            raise ValueError(f"env.digits={digits}: must lie in 1..9")
        if not 0 <= call_rate <= 1:
            raise ValueError(f"env.call_rate={call_rate}: must lie in 0..1")
        if not 0 < held_out_fraction < 1:
            raise ValueError(f"env.held_out_fraction={held_out_fraction}: must lie between 0 and 1, both excluded")
        self.lowest, self.highest = 10 ** (digits - 1), 10**digits - 1
        most = int(held_out_fraction * (self.highest - self.lowest + 1) ** 2 / 4)
        if not 1 <= num_eval_prompts <= most:
            raise ValueError(f"env.num_eval_prompts={num_eval_prompts}: must lie in 1..{most} for digits={digits}, "
                             f"held_out_fraction={held_out_fraction}")
        self.tokenizer, self.seed, self.call_rate = tokenizer, seed, call_rate
        self.held_out_fraction, self.num_eval_prompts = held_out_fraction, num_eval_prompts

    @staticmethod
    def build_tokenizer() -> Tokenizer:
        """For models without a checkpoint: characters, and the system and developer messages as a token each."""
        return build_tiny_tokenizer([*WORDS, *(message.content for message in prompt_of("")[:2])], CHARS)

    def episode(self, prompt: Prompt, sample: int) -> Multiplication:
        return Multiplication()

    def prompts(self, step: int, *, num_prompts: int, attempt: int = 0) -> list[Prompt]:
        """Training problems of a step; `attempt` > 0 draws others for groups that were dropped."""
        rng = random.Random(f"calculator prompts {self.seed} {step} {attempt}")
        return [self._prompt(attempt * num_prompts + i, *self._draw(rng, is_held_out=False)) for i in range(num_prompts)]

    def eval_prompts(self) -> list[Prompt]:
        """The held-out problems, all different."""
        rng = random.Random("calculator evaluation")
        pairs: dict[tuple[int, int], None] = {}  # ordered, without repeats
        while len(pairs) < self.num_eval_prompts:
            pairs[self._draw(rng, is_held_out=True)] = None
        return [self._prompt(i, a, b) for i, (a, b) in enumerate(pairs)]

    def demonstrations(self, step: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) by the teacher, for a supervised step. A demonstration that calls is two of them, one for
        each turn: nobody learns to write the tool's result."""
        rng = random.Random(f"calculator demonstrations {self.seed} {step}")
        tokenizer, start = self.tokenizer, generation_prompt(self.tokenizer)
        pairs = []
        for _ in range(batch_size):
            a, b = self._draw(rng, is_held_out=False)
            prompt, answer = self.encode_prompt(f"{a}*{b}"), a * b
            if rng.random() < self.call_rate:
                call = Message("assistant", json.dumps({"a": a, "b": b}), "commentary", "functions.multiply", "json")
                result = Message("tool", str(answer), "commentary", "assistant", name="functions.multiply")
                call_ids = render_message(call, tokenizer)[len(start):]
                pairs.append((prompt, call_ids))
                prompt = [*prompt, *call_ids, *render_message(result, tokenizer), *start]
            else:
                answer = rng.randint(self.lowest**2, self.highest**2)
            final = render_message(Message("assistant", str(answer), "final"), tokenizer)
            pairs.append((prompt, [*final[len(start):-1], tokenizer.return_]))
        return pairs

    def score(self, completions: list[Completion]) -> list[Score]:
        """1 for the product as the final message."""
        scores = []
        for completion in completions:
            is_correct = self._parse(completion).final == completion.prompt.row["answer"]
            scores.append(Score(float(is_correct), {"exact_match": float(is_correct)}, {}, is_correct))
        return scores

    def describe(self, completion: Completion) -> dict:
        parsed = self._parse(completion)
        return {"question": completion.prompt.row["question"], "answer": completion.prompt.row["answer"], "final": parsed.final,
                "fault": parsed.fault}

    def encode_prompt(self, question: str) -> list[int]:
        """`69*88` behind the system's and the developer's message."""
        return render_prompt(prompt_of(question), self.tokenizer)

    def is_held_out(self, a: int, b: int) -> bool:
        digest = hashlib.sha256(f"{min(a, b)}*{max(a, b)}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.held_out_fraction * 2**64

    def _parse(self, completion: Completion):
        return parse_completion(completion.completion_ids, self.tokenizer, is_policy=completion.is_policy)

    def _draw(self, rng: random.Random, *, is_held_out: bool) -> tuple[int, int]:
        while True:
            a, b = rng.randint(self.lowest, self.highest), rng.randint(self.lowest, self.highest)
            if self.is_held_out(a, b) == is_held_out:
                return a, b

    def _prompt(self, prompt_id: int, a: int, b: int) -> Prompt:
        row = {"question": f"{a}*{b}", "answer": str(a * b)}
        return Prompt(prompt_id, self.encode_prompt(row["question"]), row)
