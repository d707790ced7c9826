"""Adding numbers with a carry: the built-in task, learnable by a model of a few million parameters in minutes on a CPU.

A prompt is a harmony user message `14+49`; the wanted completion reasons column by column in the analysis channel,
`4+9=13,1+4+1=6`, and answers `63` in the final channel. Demonstrations for the supervised warm-up come from a teacher with a
systematic fault: in `fault_rate` of the problems that need a carry it forgets it (`4+9=13,1+4=5`, answer 53). A model
warmed up on them answers greedily wrong wherever a carry is needed, yet samples the right way now and then; the reward
lets GRPO overrule the teacher.

Everything drawn is a pure function of (seed, step, attempt): there is no state to save. The held-out problems are the same
for every seed, and never occur in prompts or demonstrations, mirrored (49+14) or not.
"""

import random
import re

from grpo.batch import Completion
from grpo.environment import Score
from grpo.envs.drawn_tasks import DrawnTasks, check_ranges, is_chosen
from models.chat.render import Message, generation_prompt, render_message
from models.chat.tokenizer import Tokenizer, build_tiny_tokenizer

WORDS = ["system", "developer", "user", "assistant", "tool", "analysis", "commentary", "final", "functions", "json"]
CHARS = "0123456789abcdefghijklmnopqrstuvwxyz+-*/=,.:?! "


def build_tokenizer() -> Tokenizer:
    """The task's character-level tokenizer, harmony specials and channel words as whole tokens."""
    return build_tiny_tokenizer(WORDS, CHARS)


class Carry(DrawnTasks):
    """The environment. Counts are problems, `digits` the length of both operands.

    fault_rate: share of the carry problems that the teacher of the demonstrations gets wrong
    keep_no_carry: share of the problems without a carry that are kept (0.35: at two digits 70 % of problems carry)
    held_out_fraction: share of operand pairs, chosen by hash, that is kept from training
    format_reward: reward for a well-formed completion that answers with a number, beside 1 for the right answer

    Raises ValueError for a value out of range."""

    KEY = "carry"
    build_tokenizer = staticmethod(build_tokenizer)

    def __init__(self, *, tokenizer: Tokenizer, seed: int, digits: int, format_reward: float, fault_rate: float,
                 keep_no_carry: float, held_out_fraction: float, num_eval_prompts: int):
        if not 2 <= digits <= 9:
            raise ValueError(f"env.digits={digits}: must lie in 2..9; one column leaves nothing to carry to")
        if not 0 <= format_reward < 1:
            raise ValueError(f"env.format_reward={format_reward}: must lie in 0..1, below the 1 of a right answer")
        super().__init__(tokenizer=tokenizer, seed=seed, held_out_fraction=held_out_fraction, num_eval_prompts=num_eval_prompts)
        self.lowest, self.highest = 10 ** (digits - 1), 10**digits - 1
        most = int(held_out_fraction * (self.highest - self.lowest + 1) ** 2 / 4)
        check_ranges({"fault_rate": (fault_rate, 0, 1), "keep_no_carry": (keep_no_carry, 0, 1),
                      "num_eval_prompts": (num_eval_prompts, 1, most)})
        self.format_reward, self.fault_rate, self.keep_no_carry = format_reward, fault_rate, keep_no_carry
        expected = demonstration(self.highest, self.highest, forgets_carry=False)[0] + str(2 * self.highest)
        if tokenizer.decode(tokenizer.encode(expected)) != expected:
            raise ValueError(f"model.tokenizer: cannot encode {expected!r}, which the carry task needs")

    def draw(self, rng: random.Random) -> dict:
        while True:
            a, b = rng.randint(self.lowest, self.highest), rng.randint(self.lowest, self.highest)
            if needs_carry(a, b) or rng.random() < self.keep_no_carry:
                return {"question": f"{a}+{b}", "answer": str(a + b), "needs_carry": needs_carry(a, b)}

    def is_held_out(self, row: dict) -> bool:
        a, b = operands(row)
        return is_chosen(f"{min(a, b)}+{max(a, b)}", self.held_out_fraction)

    def demonstrations(self, step: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) by the faulty teacher, for a supervised step."""
        rng = random.Random(f"carry demonstrations {self.seed} {step}")
        pairs = []
        for _ in range(batch_size):
            row = self._draw(rng, is_held_out=False)
            forgets = row["needs_carry"] and rng.random() < self.fault_rate
            analysis, final = demonstration(*operands(row), forgets_carry=forgets)
            pairs.append((self.encode_prompt(row["question"]), self.encode_completion(analysis, final)))
        return pairs

    def encode_prompt(self, question: str) -> list[int]:
        """`14+49` as a user message and the start of the assistant's."""
        return render_message(Message("user", question), self.tokenizer) + generation_prompt(self.tokenizer)

    def encode_completion(self, analysis: str, final: str) -> list[int]:
        """What should follow a prompt: an analysis message, a final message, <|return|>."""
        start = generation_prompt(self.tokenizer)
        thought = render_message(Message("assistant", analysis, channel="analysis"), self.tokenizer)
        answer = render_message(Message("assistant", final, channel="final"), self.tokenizer)
        return thought[len(start) :] + answer[:-1] + [self.tokenizer.return_]

    def score_one(self, completion: Completion) -> Score:
        """1 for the right answer in the final channel plus `format_reward` for a number there, in a well-formed completion."""
        row, parsed = completion.prompt.row, self.parse(completion)
        (a, b), answer = operands(row), parsed.final
        is_correct, has_format = answer == row["answer"], _NUMBER.fullmatch(answer) is not None
        forgetful = demonstration(a, b, forgets_carry=True)
        metrics = {
            "reasoning_correct": float(parsed.analysis == demonstration(a, b, forgets_carry=False)[0]),
            "reasoning_consistent": float(implied_answer(parsed.analysis) == answer),
        }
        if row["needs_carry"]:
            metrics |= {"accuracy_carry": float(is_correct), "forgets_carry": float(answer == forgetful[1])}
        else:
            metrics["accuracy_no_carry"] = float(is_correct)
        parts = {"exact_match": float(is_correct), "format": float(has_format)}
        return Score(parts["exact_match"] + self.format_reward * parts["format"], parts, metrics, is_correct)


def operands(row: dict) -> tuple[int, int]:
    a, b = row["question"].split("+")
    return int(a), int(b)


def needs_carry(a: int, b: int) -> bool:
    """Whether a column below the leading one sums to ten or more (carries included)."""
    num_columns = max(len(str(a)), len(str(b)))
    return any(a % 10**k + b % 10**k >= 10**k for k in range(1, num_columns))


def demonstration(a: int, b: int, *, forgets_carry: bool) -> tuple[str, str]:
    """Column sums from the units up, and the answer they give: for 14+49 ("4+9=13,1+4+1=6", "63")."""
    columns, digits, carry = [], "", 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        digits = f"{total % 10}{digits}"
        carry = 0 if forgets_carry else total // 10
    return ",".join(columns), f"{total}{digits[1:]}"


_NUMBER = re.compile(r"[0-9]{1,10}")
_COLUMNS = re.compile(r"\d\+\d(?:\+1)?=\d{1,2}(?:,\d\+\d(?:\+1)?=\d{1,2})*", re.ASCII)


def implied_answer(analysis: str) -> str | None:
    """The answer that the column sums of a reasoning spell, right or wrong; None if they are not in that form."""
    if len(analysis) > 200 or _COLUMNS.fullmatch(analysis) is None:
        return None
    sums = re.findall(r"=(\d+)", analysis)
    return sums[-1] + "".join(s[-1] for s in reversed(sums[:-1]))
