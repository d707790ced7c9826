"""A class of the user's whose public methods are tools: the form of TRL's `environment_factory`, run unmodified.

    python -m grpo.train +experiment=gpt_oss_20b_lora env=tool_class env.environment=my_game.py:Game

    class Game:  # my_game.py
        def reset(self, seed: int, **row) -> str:
            self.secret, self.guesses = random.Random(seed).randrange(100), 0
            return "Guess my number, from 0 to 99."

        def guess(self, number: int) -> str:
            '''Says whether the number is too small, too large or right.'''
            ...

        def get_reward(self) -> float:
            return float(self.found)

`reset` is called with the row's columns, as many of them as it takes; what it returns is put behind the prompt of the row. Every
completion has an object of its own, on which `reset` is called with the same row: so it must return the same text. Global random
generators are seeded by the row before. What a tool draws from them later may differ from run to run, and so may what an async
reset draws, since others run beside it. An object that has close() is closed, one that was made for a prompt too.

Tools run in this process. Code in C that keeps Python's lock (a regular expression that the model wrote, a huge power) stops the
whole run, and no limit ends it; stderr shows where it is then. Run such a tool in a process of its own, as an MCP server does.
Processes that a thread of the tool's own starts, or that leave their parents as daemons do, are not found when an episode ends.

A method user_turn(answer) -> str | None is no tool: it returns what the user says to a final message, or None to end the episode.
"""

import asyncio
import faulthandler
import hashlib
import inspect
import itertools
import json
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from grpo.envs.data_files import DataError
from grpo.envs.data_sources import read_rows
from grpo.envs.drawn_tasks import is_chosen
from grpo.envs.global_random import HELD, seed_all
from grpo.envs.rows import build_tool_tokenizer
from grpo.rewards.functions import load_function
from grpo.rewards.values import shorten
from grpo.rollout.episode_forms import PROTOCOL
from grpo.rollout.episodes import EpisodeFault
from models.chat.form import Form
from models.chat.functions import function_schema, public_methods
from models.chat.parse import parse_completion
from models.chat.render import harmony_messages, render_prompt
from models.chat.tokenizer import Tokenizer

PROMPT_SECONDS = 60.0  # after which stderr shows where an object is that is still being made for a prompt


class ToolClass:
    """The environment.

    environment: the class, or a function that makes an object, as package.module:name or file.py:name; `kwargs`: its keywords
    path: rows for `reset`, as env=dataset takes them; null: the environment owns the problems, and a row is a number, `seed`
    prompt_key: the column with the prompt, text or messages; a row without it has an empty prompt
    reward: a reward function of TRL's form, f(environments, **columns) -> list, as module:name or file.py:name; sync or async. It
        is called for each completion, with lists of one, and added to what get_reward() returns, if the class has that
    instructions, reasoning_effort, current_date: of the developer's and the system's message
    held_out_fraction: share of the rows of `path`, chosen by hash, that is kept from training

    Raises ValueError for a value out of range and for a class that is none of this form."""

    build_tokenizer = staticmethod(build_tool_tokenizer)

    def __init__(self, *, tokenizer: Tokenizer, seed: int, environment: str, kwargs: dict | None, path: str | list | None,
                 prompt_key: str, instructions: str | None, reasoning_effort: str, current_date: str, held_out_fraction: float,
                 num_eval_prompts: int, subset: str | None = None, split: str | None = None, reward: str | None = None,
                 chat_form: Form = Form.hub):
        if not 0 < held_out_fraction < 1:
            raise ValueError(f"env.held_out_fraction={held_out_fraction}: must lie between 0 and 1, both excluded")
        if num_eval_prompts < 1:
            raise ValueError(f"env.num_eval_prompts={num_eval_prompts}: must be at least 1")
        self.tokenizer, self.seed, self.name, self.prompt_key = tokenizer, seed, environment, prompt_key
        self.held_out_fraction = held_out_fraction
        factory = load_function(environment, key="env.environment")
        self._make: Callable[[], object] = lambda: factory(**(kwargs or {}))
        self._reward = None if reward is None else load_function(reward, key="env.reward")
        self._chat = {"instructions": instructions, "reasoning_effort": reasoning_effort, "current_date": current_date,
                      "form": chat_form}
        self.train_rows: list[dict] = []
        self.eval_rows = [{"seed": number} for number in range(num_eval_prompts)]
        if path is not None:
            rows = read_rows(path, "env.path", subset=subset, split=split)
            self.train_rows, self.eval_rows = hold_out(rows, path, held_out_fraction, num_eval_prompts)
        self.tools = self._check_tools(environment)

    def prompts(self, step: int, *, num_prompts: int, attempt: int = 0) -> list[Prompt]:
        """The step's rows, in epochs; new numbers without `path`. `attempt` > 0 draws others for groups that were dropped."""
        rng = random.Random(f"tool_class prompts {self.seed} {step} {attempt}")
        if not self.train_rows:
            rows = [{"seed": rng.randrange(len(self.eval_rows), 2**31)} for _ in range(num_prompts)]
        elif attempt:
            rows = rng.choices(self.train_rows, k=num_prompts)
        else:
            rows = list(itertools.islice(self._from(step * num_prompts), num_prompts))
        return [self._watched_prompt(attempt * num_prompts + i, row) for i, row in enumerate(rows)]

    def eval_prompts(self) -> list[Prompt]:
        return [self._watched_prompt(i, row) for i, row in enumerate(self.eval_rows)]

    def episode(self, prompt: Prompt, sample: int) -> object:
        episode, observation = self._begin(prompt.row["row"])
        if inspect.isawaitable(observation):
            return self._await(episode, observation, prompt)
        return self._checked(episode, observation, prompt)

    async def _await(self, episode: object, observation: Awaitable, prompt: Prompt) -> object:
        return self._checked(episode, await observation, prompt)

    def _checked(self, episode: object, observation: object, prompt: Prompt) -> object:
        """The object of an episode. Raises EpisodeFault if its reset did not return what it did for the prompt."""
        if observation != prompt.row["observation"]:
            raise EpisodeFault(
                f"reset() returned {shorten(observation)} and before, for the same row, {shorten(prompt.row['observation'])}: "
                "the completions of a group share their prompt, so reset must depend on its arguments alone, such as `seed`")
        if self._reward is not None:
            episode.get_reward = self._reward_of(episode, prompt.row["row"])
        return episode

    def _reward_of(self, episode: object, row: dict) -> Callable[[], Awaitable]:
        """What gives the sum of the object's own reward, if it has one, and that of the reward function."""
        own = episode.get_reward if hasattr(episode, "get_reward") else None
        taken = inspect.signature(self._reward).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        columns = {name: [value] for name, value in row.items() if takes_all or name in taken}

        async def total() -> object:
            terms = [] if own is None else [await _value_of(own())]
            values = await _value_of(self._reward(environments=[episode], **columns))
            if not isinstance(values, (list, tuple)) or len(values) != 1:
                raise EpisodeFault(f"env.reward returned {shorten(values)} for one environment; it must return a list of one")
            terms = [term for term in (*terms, *values) if term is not None]
            return sum(terms) if terms else None

        return total

    def score(self, completions: list[Completion]) -> list[Score]:
        """What get_reward() and the reward function gave."""
        return [Score(completion.episode.reward, {}, {}, None) for completion in completions]

    def describe(self, completion: Completion) -> dict:
        parsed = parse_completion(completion.completion_ids, self.tokenizer, is_policy=completion.is_policy)
        return {"row": completion.prompt.row["row"], "final": parsed.final, "fault": parsed.fault}

    def summary(self) -> str:
        rows = f"{len(self.train_rows):,} rows" if self.train_rows else "rows of its own"
        return f"{self.name} with {', '.join(tool['name'] for tool in self.tools)}; {rows}"

    def fingerprint(self) -> str:
        """SHA-256 of the rows and of what the model is told of the tools."""
        return hashlib.sha256(_text([self.train_rows, self.eval_rows, self.tools]).encode()).hexdigest()

    def _from(self, place: int) -> Iterator[dict]:
        num_rows = len(self.train_rows)
        for epoch in itertools.count(place // num_rows):
            order = random.Random(f"tool_class epoch {self.seed} {epoch}").sample(self.train_rows, num_rows)
            yield from order[place % num_rows:] if epoch == place // num_rows else order

    def _watched_prompt(self, prompt_id: int, row: dict) -> Prompt:
        """Without its prompt a step cannot begin, so there is no limit of time; but a run that waits says for what."""
        faulthandler.dump_traceback_later(PROMPT_SECONDS, file=2)
        try:
            return self._prompt(prompt_id, row)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _prompt(self, prompt_id: int, row: dict) -> Prompt:
        episode, observation = self._begin(row)
        if inspect.isawaitable(observation):
            observation = asyncio.run(_awaited(observation, episode))
        else:
            close_now(episode)
        if observation is not None and not isinstance(observation, str):
            raise EpisodeFault(f"reset() returned a {type(observation).__name__}; it must return a text or None")
        asked = "" if row.get(self.prompt_key) is None else row[self.prompt_key]
        if not isinstance(asked, (str, list)) or asked == []:
            raise DataError(f"env.prompt_key={self.prompt_key!r}: a row has {shorten(asked)} there; it must be text, or a list "
                            f"of at least one message; the row: {shorten(row)}")
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else [*asked]
        if observation is not None:
            messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}{observation}"}
        ids = render_prompt(harmony_messages(messages, tools=self.tools, **self._chat), self.tokenizer)
        return Prompt(prompt_id, ids, {"row": row, "observation": observation})

    def _check_tools(self, environment: str) -> list[dict]:
        """What a prompt says of the tools."""
        probe = self._make()
        self.has_user_turns = hasattr(probe, "user_turn")
        needed = ("reset", "get_reward") if self._reward is None else ("reset",)
        if missing := [f"{method}()" for method in needed if not hasattr(type(probe), method)]:
            raise ValueError(
                f"env.environment={environment!r}: {type(probe).__name__} has no {' and no '.join(missing)}: reset(**row) begins "
                "an episode and may return a text for the prompt, get_reward() returns its reward (or the function env.reward), "
                "user_turn(answer), if it has that, what the user says next, and every other public method is a tool")
        functions = public_methods(probe, without=PROTOCOL)
        if not functions and not self.has_user_turns:
            raise ValueError(f"env.environment={environment!r}: {type(probe).__name__} has no public method that could be a tool")
        return [function_schema(function) for function in functions.values()]

    def _begin(self, row: dict) -> tuple[object, object]:
        """A new object, and what its reset returned, perhaps an awaitable."""
        episode = self._make()
        parameters = inspect.signature(episode.reset).parameters.values()
        takes_all = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        names = row.keys() if takes_all else [parameter.name for parameter in parameters if parameter.name in row]
        if missing := [parameter.name for parameter in parameters if parameter.name not in row and parameter.default is
                       parameter.empty and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)]:
            raise DataError(f"env.path: {type(episode).__name__}.reset() needs {', '.join(missing)}, which a row lacks; it has: "
                            f"{', '.join(map(str, row))}")
        with self._seeded(row):
            return episode, episode.reset(**{name: row[name] for name in names})

    @contextmanager
    def _seeded(self, row: dict) -> Iterator[int]:
        """Holds the global random generators, seeded by a row; gives a seed of 31 bits."""
        key = hashlib.sha256(f"{self.seed} {_text(row)}".encode()).digest()
        with HELD:
            seed_all(key)
            yield int.from_bytes(key[:4], "big") >> 1


async def _value_of(result: object) -> object:
    return await result if inspect.isawaitable(result) else result


async def _awaited(awaitable: Awaitable, episode: object) -> object:
    """What it gives; the episode is closed then, if it can be, in the same event loop."""
    result = await awaitable
    if hasattr(episode, "close") and inspect.isawaitable(closed := episode.close()):
        await closed
    return result


def close_now(owner: object) -> None:
    """Closes an object that can be closed, outside an event loop."""
    if hasattr(owner, "close") and inspect.isawaitable(closed := owner.close()):
        asyncio.run(_awaited(closed, None))


def hold_out(rows: Iterable[tuple[str, dict]], path: str | list, fraction: float,
             num_eval_prompts: int) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and held-out rows, told apart by their hash. rows: each with its place."""
    train, held_out = [], []
    for place, record in rows:
        if isinstance(record, str):
            raise DataError(f"{place}: {record}")
        (held_out if is_chosen(_text(record), fraction) else train).append(record)
    if not train or not held_out:
        raise DataError(f"{path}: env.held_out_fraction={fraction} leaves {len(train)} training and {len(held_out)} evaluation "
                        f"rows: each row's text says to which it belongs; {'lower' if held_out else 'raise'} it, or add rows")
    return train, held_out[:num_eval_prompts]


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=repr)
