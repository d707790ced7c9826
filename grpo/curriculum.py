"""Which prompts a step samples, by how often they have been solved.

A prompt's pass rate is the mean, over its last `curriculum.window` groups, of the share of a group's completions that are correct
(ScaleRL, arXiv 2510.13786, retires prompts from 0.9 on). Prompts are known by their token ids, so the history outlasts epochs and
works with any environment; it is part of a checkpoint. What is chosen depends on history and candidates alone, never on chance.
"""
import hashlib
import math
import statistics
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from grpo.batch import Completion, Prompt
from grpo.config import CurriculumConfig
from grpo.environment import Score

MOST_DRAWS = 10  # of an environment's prompts, for one round of sampling; then resting prompts fill up


@dataclass
class PromptHistory:
    """The pass rates of all prompts sampled so far."""

    settings: CurriculumConfig
    rates: dict[str, list[float]] = field(default_factory=dict)  # of a prompt's last groups, the newest last, by key_of(prompt)

    def record(self, scored: list[tuple[Completion, Score]]) -> None:
        """Adds the groups of a step. Completions that nobody judged do not count."""
        groups: dict[int, list[tuple[Prompt, float]]] = {}
        for completion, verdict in scored:
            if (passed := is_passed(verdict)) is not None:
                groups.setdefault(completion.prompt.id, []).append((completion.prompt, passed))
        kept = max(self.settings.window, self.settings.retire_unsolved or 0)
        for members in groups.values():
            key = key_of(members[0][0])
            rate = statistics.fmean(passed for _, passed in members)
            self.rates[key] = [*self.rates.get(key, []), rate][-kept:]

    def pass_rate(self, key: str) -> float | None:
        """None for a prompt that was never sampled."""
        rates = self.rates.get(key)
        return statistics.fmean(rates[-self.settings.window:]) if rates else None

    def is_resting(self, key: str) -> bool:
        """Whether the prompt is retired: solved nearly always, or never."""
        rates, settings = self.rates.get(key, []), self.settings
        is_solved = (settings.retire_at is not None and len(rates) >= settings.window
                     and self.pass_rate(key) >= settings.retire_at)
        is_hopeless = (settings.retire_unsolved is not None and len(rates) >= settings.retire_unsolved
                       and not any(rates[-settings.retire_unsolved:]))
        return is_solved or is_hopeless

    def choose(self, draw: Callable[[], list[Prompt]], num: int, *, taken: set[str]) -> list[Prompt]:
        """`num` prompts to sample, of the next that `draw` gives; `taken`: keys of prompts that the step has sampled already.

        Prompts that rest, or came before, are passed over. If MOST_DRAWS draws have too few others, the ones with the lowest pass
        rate fill up: a run whose every prompt is retired goes on with the least solved."""
        fresh: dict[str, Prompt] = {}
        spare: dict[str, Prompt] = {}
        for _ in range(MOST_DRAWS):
            for prompt in draw():
                key = key_of(prompt)
                (spare if key in taken or self.is_resting(key) else fresh).setdefault(key, prompt)
            if len(fresh) >= num:
                break
        if self.settings.candidates > 1:
            fresh = dict(sorted(fresh.items(), key=lambda item: self._distance(item[0])))  # stable: ties keep their order
        chosen = list(fresh.values())[:num]
        least_solved = sorted(spare.items(), key=lambda item: (item[0] in taken, self.pass_rate(item[0]) or 0.0))
        return chosen + [prompt for _, prompt in least_solved][:num - len(chosen)]

    def _distance(self, key: str) -> float:
        rate = self.pass_rate(key)
        return -1.0 if rate is None else abs(rate - self.settings.target)

    def metrics(self) -> dict[str, float]:
        rates = [self.pass_rate(key) for key in self.rates]
        return {"curriculum/prompts": len(rates), "curriculum/resting": sum(map(self.is_resting, self.rates)),
                "curriculum/pass_rate": statistics.fmean(rates) if rates else math.nan}


def key_of(prompt: Prompt) -> str:
    """16 hexadecimal digits that depend on the prompt's token ids alone."""
    return hashlib.sha256(array("q", prompt.token_ids).tobytes()).hexdigest()[:16]


def is_passed(verdict: Score) -> bool | None:
    """Whether a completion is correct; where the environment does not judge that, whether its reward is at least 1, as in an
    evaluation. None if it has neither."""
    if verdict.is_correct is not None:
        return verdict.is_correct
    return None if verdict.reward is None else verdict.reward >= 1
