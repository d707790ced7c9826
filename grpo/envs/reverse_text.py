"""Reversing a text, character by character: `tamiro kel` becomes `lek orimat`.

The reward is the share of the text up to the first wrong character, so a guess earns nearly nothing and each character further
earns more. Texts are made of syllables, and have no meaning to lean on. Demonstrations for the warm-up of a small model
come from a teacher that swaps the last two characters in `fault_rate` of the texts.

Everything drawn is a pure function of (seed, step, attempt). The held-out texts are the same for every seed, and never occur in
prompts or demonstrations, reversed or not.
"""

import os.path
import random

from grpo.batch import Completion
from grpo.environment import Score
from grpo.envs.drawn_tasks import DrawnTasks, check_ranges
from models.chat.render import Message, generation_prompt, render_message
from models.chat.tokenizer import Tokenizer, build_tiny_tokenizer

CONSONANTS, VOWELS = "bcdfghjklmnprstvz", "aeiou"


class ReverseText(DrawnTasks):
    """The environment.

    num_words: words of a text; letters: shortest and longest word
    fault_rate: share of the demonstrations that are wrong
    held_out_fraction: share of the texts, chosen by hash, that is kept from training

    Raises ValueError for a value out of range."""

    KEY = "reverse_text"
    INSTRUCTIONS = "Reverse the user's text, character by character. Answer with the reversed text alone."

    def __init__(self, *, tokenizer: Tokenizer, seed: int, num_words: int, letters: list, fault_rate: float,
                 held_out_fraction: float, num_eval_prompts: int):
        super().__init__(tokenizer=tokenizer, seed=seed, held_out_fraction=held_out_fraction, num_eval_prompts=num_eval_prompts)
        check_ranges({"num_words": (num_words, 1, 100), "fault_rate": (fault_rate, 0, 1)})
        if len(letters) != 2 or not all(type(count) is int for count in letters) or not 2 <= letters[0] <= letters[1] <= 20:
            raise ValueError(f"env.letters={letters}: must be the shortest and the longest word, such as [3,8], within 2..20")
        self.num_words, self.letters, self.fault_rate = num_words, letters, fault_rate

    def draw(self, rng: random.Random) -> dict:
        while True:
            words = ["".join(rng.choice((CONSONANTS, VOWELS)[place % 2]) for place in range(rng.randint(*self.letters)))
                     for _ in range(self.num_words)]
            text = " ".join(words)
            if text != text[::-1] and text[0] != text[1]:
                return {"question": text, "answer": text[::-1]}

    def identity(self, row: dict) -> str:
        return min(row["question"], row["answer"])

    @classmethod
    def build_tokenizer(cls) -> Tokenizer:
        """For models without a checkpoint: letters, and the system and developer messages as a token each."""
        return build_tiny_tokenizer([message.content for message in cls.first_messages()], "abcdefghijklmnopqrstuvwxyz \n.,'")

    def demonstrations(self, step: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) by the faulty teacher, for a supervised step."""
        rng = random.Random(f"reverse_text demonstrations {self.seed} {step}")
        pairs = []
        for _ in range(batch_size):
            row = self._draw(rng, is_held_out=False)
            answer = row["answer"]
            if rng.random() < self.fault_rate:
                answer = answer[:-2] + answer[:-3:-1]
            ids = render_message(Message("assistant", answer, "final"), self.tokenizer)[len(generation_prompt(self.tokenizer)):-1]
            pairs.append((self.encode_prompt(row["question"]), [*ids, self.tokenizer.return_]))
        return pairs

    def score_one(self, completion: Completion) -> Score:
        """The share of the final message up to the first wrong character, of what is longer: it, or the right answer."""
        answer, right = self.parse(completion).final, completion.prompt.row["answer"]
        share = len(os.path.commonprefix([answer, right])) / max(len(answer), len(right))
        return Score(share, {"prefix": share, "exact_match": float(answer == right)}, {}, answer == right)
