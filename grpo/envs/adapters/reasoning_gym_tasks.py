"""Tasks of reasoning-gym, one answer each: env.environment=grpo.envs.adapters.reasoning_gym_tasks:ReasoningGymTasks.

    env=resource_sessions env.environment=grpo.envs.adapters.reasoning_gym_tasks:ReasoningGymTasks "env.kwargs={task: chain_sum}"

Several of the library's scorers run the answer as code in this process (eval, sympy's parser), or give a constant answer the
whole reward. So only tasks of ALLOWED can be used, whose scorers do neither; and an answer reaches the scorer only if it is
short and has no character that an answer of that task cannot have.
"""

import re
from typing import Any

from grpo.envs.adapters.session import QuestionSession, import_extra

NUMBER = re.compile(r"[-+]?[\d,]{1,40}(\.\d{1,40})?", re.ASCII)
WORDS = re.compile(r"[\w ,.'!?;:\"()-]{1,2000}")
DIGITS = re.compile(r"[\d\s]{1,400}", re.ASCII)
LIST = re.compile(r"\[[\d\s,.'\"-]{1,2000}\]", re.ASCII)
ALLOWED = {  # what an answer may look like
    "base_conversion": re.compile(r"[0-9a-z]{1,64}"), "basic_arithmetic": NUMBER, "chain_sum": NUMBER,
    "decimal_chain_sum": NUMBER, "gsm_symbolic": NUMBER, "knights_knaves": WORDS, "lcm": NUMBER, "leg_counting": NUMBER,
    "letter_jumble": WORDS, "mini_sudoku": DIGITS, "number_sorting": LIST, "products": NUMBER, "spell_backward": WORDS,
    "sudoku": DIGITS, "word_sorting": WORDS}
ASK = "\n\nGive the answer alone as your final message."


class ReasoningGymTasks:
    """task: the name of a dataset; settings: keywords of its configuration."""

    def __init__(self, task: str, settings: dict[str, Any] | None = None) -> None:
        if task not in ALLOWED:
            raise ValueError(f"env.kwargs.task={task!r}: allowed: {', '.join(ALLOWED)}; the scorers of others run the answer as "
                             "code, are content with a constant, or were not looked at")
        self.library = import_extra("reasoning_gym", "reasoning-gym")
        self.task, self.settings = task, settings or {}

    def create(self, task: object, seed: int = 0, episode_id: str | None = None) -> QuestionSession:
        try:
            dataset = self.library.create_dataset(self.task, seed=seed, size=1, **self.settings)
        except (AssertionError, TypeError) as error:
            raise ValueError(f"env.kwargs.settings={self.settings!r}: {error}") from error
        entry = dataset[0]

        def score(answer: str) -> tuple[float, dict]:
            answer = answer.strip()
            has_form = ALLOWED[self.task].fullmatch(answer) is not None
            reward = float(dataset.score_answer(answer, entry)) if has_form else 0.0
            return reward, {"solved": float(reward >= 1), "answer_form": float(has_form)}

        return QuestionSession(entry["question"] + ASK, score)
