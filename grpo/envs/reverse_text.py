"""Reversing a text, character by character: `tamiro kel` becomes `lek orimat`.

The reward is the share of the text up to the first wrong character, so a guess earns nearly nothing and each character further
earns more. Texts are made of syllables, and have no meaning to lean on. Demonstrations for the warm-up of a small model
come from a teacher that swaps the last two characters in `fault_rate` of the texts.

Everything drawn is a pure function of (seed, step, attempt). The held-out texts are the same for every seed, and never occur in
prompts or demonstrations, reversed or not.
"""

import hashlib
import os.path
import random

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from models.chat.parse import Parsed, parse_completion
from models.chat.render import Message, generation_prompt, harmony_messages, render_message, render_prompt
from models.chat.tokenizer import Tokenizer, build_tiny_tokenizer

INSTRUCTIONS = "Reverse the user's text, character by character. Answer with the reversed text alone."
CURRENT_DATE = "2025-08-05"  # in the system message; pinned, so that prompts do not change from day to day
CONSONANTS, VOWELS = "bcdfghjklmnprstvz", "aeiou"


def prompt_of(text: str) -> list[Message]:
    return harmony_messages([{"role": "user", "content": text}], current_date=CURRENT_DATE, reasoning_effort="low",
                            instructions=INSTRUCTIONS)


class ReverseText:
    """The environment.

    num_words: words of a text; letters: shortest and longest word
    fault_rate: share of the demonstrations that are wrong
    held_out_fraction: share of the texts, chosen by hash, that is kept from training

    Raises ValueError for a value out of range."""

    def __init__(self, *, tokenizer: Tokenizer, seed: int, num_words: int, letters: list, fault_rate: float,
                 held_out_fraction: float, num_eval_prompts: int):
        if not 1 <= num_words <= 100:
            raise ValueError(f"env.num_words={num_words}: must lie in 1..100")
        if len(letters) != 2 or not all(type(count) is int for count in letters) or not 2 <= letters[0] <= letters[1] <= 20:
            raise ValueError(f"env.letters={letters}: must be the shortest and the longest word, such as [3,8], within 2..20")
        if not 0 <= fault_rate <= 1:
            raise ValueError(f"env.fault_rate={fault_rate}: must lie in 0..1")
        if not 0 < held_out_fraction < 1:
            raise ValueError(f"env.held_out_fraction={held_out_fraction}: must lie between 0 and 1, both excluded")
        if not 1 <= num_eval_prompts <= 1024:
            raise ValueError(f"env.num_eval_prompts={num_eval_prompts}: must lie in 1..1024")
        self.tokenizer, self.seed, self.num_words, self.letters = tokenizer, seed, num_words, letters
        self.fault_rate, self.held_out_fraction, self.num_eval_prompts = fault_rate, held_out_fraction, num_eval_prompts

    @staticmethod
    def build_tokenizer() -> Tokenizer:
        """For models without a checkpoint: letters, and the system and developer messages as a token each."""
        return build_tiny_tokenizer([message.content for message in prompt_of("x")[:2]], "abcdefghijklmnopqrstuvwxyz \n.,'")

    def prompts(self, step: int, *, num_prompts: int, attempt: int = 0) -> list[Prompt]:
        """Training texts of a step; `attempt` > 0 draws others for groups that were dropped."""
        rng = random.Random(f"reverse_text prompts {self.seed} {step} {attempt}")
        return [self._prompt(attempt * num_prompts + i, self._draw(rng, is_held_out=False)) for i in range(num_prompts)]

    def eval_prompts(self) -> list[Prompt]:
        """The held-out texts."""
        rng = random.Random("reverse_text evaluation")
        return [self._prompt(i, self._draw(rng, is_held_out=True)) for i in range(self.num_eval_prompts)]

    def demonstrations(self, step: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) by the faulty teacher, for a supervised step."""
        rng = random.Random(f"reverse_text demonstrations {self.seed} {step}")
        pairs = []
        for _ in range(batch_size):
            text = self._draw(rng, is_held_out=False)
            answer = text[::-1]
            if rng.random() < self.fault_rate:
                answer = answer[:-2] + answer[:-3:-1]
            ids = render_message(Message("assistant", answer, "final"), self.tokenizer)
            pairs.append((self.encode_prompt(text), [*ids[len(generation_prompt(self.tokenizer)):-1], self.tokenizer.return_]))
        return pairs

    def score(self, completions: list[Completion]) -> list[Score]:
        """The share of the final message up to the first wrong character, of what is longer: it, or the right answer."""
        scores = []
        for completion in completions:
            answer, right = self._parse(completion).final, completion.prompt.row["answer"]
            share = len(os.path.commonprefix([answer, right])) / max(len(answer), len(right))
            scores.append(Score(share, {"prefix": share, "exact_match": float(answer == right)}, {}, answer == right))
        return scores

    def describe(self, completion: Completion) -> dict:
        parsed = self._parse(completion)
        return {"question": completion.prompt.row["question"], "answer": completion.prompt.row["answer"],
                "analysis": parsed.analysis, "final": parsed.final, "fault": parsed.fault}

    def encode_prompt(self, question: str) -> list[int]:
        return render_prompt(prompt_of(question), self.tokenizer)

    def is_held_out(self, text: str) -> bool:
        digest = hashlib.sha256(min(text, text[::-1]).encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.held_out_fraction * 2**64

    def _parse(self, completion: Completion) -> Parsed:
        return parse_completion(completion.completion_ids, self.tokenizer, is_policy=completion.is_policy)

    def _draw(self, rng: random.Random, *, is_held_out: bool) -> str:
        while True:
            words = ["".join(rng.choice((CONSONANTS, VOWELS)[place % 2]) for place in range(rng.randint(*self.letters)))
                     for _ in range(self.num_words)]
            text = " ".join(words)
            if text != text[::-1] and text[0] != text[1] and self.is_held_out(text) == is_held_out:
                return text

    def _prompt(self, prompt_id: int, text: str) -> Prompt:
        return Prompt(prompt_id, self.encode_prompt(text), {"question": text, "answer": text[::-1]})
