"""Sessions of the form that OpenEnv calls ResourceSession, run unmodified, and of the adapters in grpo/envs/adapters/.

    python -m grpo.train +experiment=gpt_oss_20b_lora env=resource_sessions env.environment=my_tasks.py:Factory

    class Factory:  # my_tasks.py
        def create(self, task, seed=None, episode_id=None): ...  # a session, in which tools are called

A session's initial_messages() are the prompt, list_tools() its functions, in the form of MCP; call_tool(name, arguments) gives an
object with `data`, `done`, `metadata` and `error`; verify(transcript) one with `env_reward` and `metrics`; close() ends it. By
user_turn(answer) -> str | None, which OpenEnv lacks, a user goes on. Every completion has a session of its own, created for
the same task and seed: so its messages and tools must be the same. Global random generators are seeded before create().
"""

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from grpo.envs.tool_class import ToolClass, close_now, hold_out
from grpo.rollout.episode_forms import SESSION, tool_schemas
from grpo.rollout.episodes import EpisodeFault
from models.chat.render import harmony_messages, render_prompt


class ResourceSessions(ToolClass):
    """The environment. Its keywords are those of ToolClass; `environment` names the factory's class.

    A row of `path` is the task, or one of the rows that the factory's tasks() returns, if it has that; without either the task is
    None, and prompts differ by their seed.

    Raises ValueError for a factory or session without the methods."""

    def episode(self, prompt: Prompt, sample: int) -> object:
        session = self._create(prompt.row["row"])
        if self._asked(session) != prompt.row["asked"]:
            raise EpisodeFault("another session of the same task and seed has other messages or tools; the completions of a "
                               "group share their prompt, so create() must depend on its arguments alone")
        return session

    def score(self, completions: list[Completion]) -> list[Score]:
        """What verify() gave; its metrics that are numbers are averaged, others kept."""
        scores = []
        for completion in completions:
            verdict = completion.episode.reward
            numbers = {name: float(value) for name, value in verdict.metrics.items() if isinstance(value, (int, float))}
            others = {name: value for name, value in verdict.metrics.items() if name not in numbers}
            scores.append(Score(verdict.reward, {}, numbers, None, others))
        return scores

    def _check_tools(self, environment: str) -> list[dict]:
        if self._reward is not None:
            raise ValueError("env.reward: a session's reward is that of its verify(); leave it out")
        self._factory = self._make()
        if not hasattr(self._factory, "create"):
            raise ValueError(f"env.environment={environment!r}: {type(self._factory).__name__} has no create(task, seed); "
                             "a class with reset() is run by env=tool_class")
        if not self.train_rows and hasattr(self._factory, "tasks"):
            rows = [(f"{environment}.tasks()", row) for row in self._factory.tasks()]
            self.train_rows, self.eval_rows = hold_out(rows, environment, self.held_out_fraction, len(self.eval_rows))
        session = self._create(self.eval_rows[0])
        if missing := [f"{method}()" for method in SESSION if not hasattr(session, method)]:
            raise ValueError(f"env.environment={environment!r}: its session, {type(session).__name__}, has no "
                             f"{' and no '.join(missing)}")
        _, tools = self._asked(session)
        self.has_user_turns = hasattr(session, "user_turn")
        close_now(session)
        return tools

    def _prompt(self, prompt_id: int, row: dict) -> Prompt:
        session = self._create(row)
        messages, tools = asked = self._asked(session)
        close_now(session)
        ids = render_prompt(harmony_messages(messages, tools=tools, **self._chat), self.tokenizer)
        return Prompt(prompt_id, ids, {"row": row, "asked": asked})

    def _create(self, row: dict) -> object:
        with self._seeded(row) as seed:
            task = row if self.train_rows else None
            return self._factory.create(task, seed=seed)

    @staticmethod
    def _asked(session: object) -> tuple[list[dict], list[dict]]:
        return list(session.initial_messages()), tool_schemas(session.list_tools())
