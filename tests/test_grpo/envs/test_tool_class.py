"""Classes in the form of TRL's environment_factory, as they are."""

import json
import random
import re

import pytest
from played_episodes import SETTINGS, TOKENIZER, call, final, play, text_of

from grpo.config import ConfigError
from grpo.configuration.targets import bind
from grpo.environment import EnvironmentFault, checked_prompts, checked_scores, make_environment
from grpo.envs.data_files import DataError
from grpo.envs.tool_class import ToolClass

GAMES = '''
import asyncio, random, threading

class Guess:
    """The form that TRL's documentation gives, without a line for this program."""

    def __init__(self, most: int = 99):
        self.most = most

    def reset(self, **kwargs) -> str | None:
        self.secret, self.guesses, self.found = random.randint(0, self.most), 0, False
        return f" Guess my number, from 0 to {self.most}; it is {'even' if self.secret % 2 == 0 else 'odd'}."

    def guess(self, number: int) -> str:
        """
        Guesses the number.

        Args:
            number: The guess.

        Returns:
            Whether it is too small or too large.
        """
        if self.found:
            raise ValueError("Game over.")
        self.guesses, self.found = self.guesses + 1, number == self.secret
        return "right" if self.found else "too small" if number < self.secret else "too large"

    def get_reward(self) -> float:
        return 1.0 / self.guesses if self.found else 0.0

class Async(Guess):
    async def reset(self, answer: str) -> None:
        self.answer, self.seen = answer, []

    async def guess(self, number: int) -> str:
        """Guesses."""
        await asyncio.sleep(0)
        self.seen.append(number)
        return self.answer

    async def get_reward(self) -> float:
        return float(len(self.seen))

class Fickle(Guess):
    made = 0

    def reset(self):
        Fickle.made += 1
        return str(Fickle.made)

class Stuck(Guess):
    made = 0

    def reset(self, seed):
        Stuck.made += 1
        if Stuck.made == 3:  # the first of the episodes
            threading.Event().wait(600)
        return super().reset()

class Closed(Guess):
    num_open = 0

    def reset(self, seed):
        Closed.num_open += 1

    def guess(self, number: int) -> str:
        """Guesses."""
        return str(Closed.num_open)

    def get_reward(self):
        return 0.0

    def close(self):
        Closed.num_open -= 1

class AsyncClosed(Closed):
    async def reset(self, seed):
        self.lock = asyncio.Lock()
        super().reset(seed)

    async def close(self):
        async with self.lock:
            super().close()

class Slow(Guess):
    def reset(self, seed):
        threading.Event().wait(0.5)
        return super().reset()

class Uncounted(Guess):
    def get_reward(self):
        return float("nan") if self.guesses == 0 else 1.0 / self.guesses

class Counter:
    """Without get_reward(), as in the documentation of TRL's trainer: functions judge it."""

    def reset(self, **kwargs) -> None:
        self.counter = 0

    def increment(self, step: int) -> int:
        """
        Increments the counter.

        Args:
            step: The step.
        """
        self.counter += step
        return self.counter

def counted(environments, **kwargs):
    return [float(environment.counter) for environment in environments]

async def counted_by_rows(environments, number, **kwargs):
    await asyncio.sleep(0)
    return [environment.counter + 10 * n for environment, n in zip(environments, number, strict=True)]

def closeness(environments):
    return [None if environment.found else -environment.guesses for environment in environments]

def two(environments):
    return [1, 2]

class NoReset:
    def f(self) -> None:
        """Does nothing."""

class NoTools:
    def reset(self, **row): ...
    def get_reward(self): ...

class Untyped(Guess):
    def look(self, where):
        """Looks."""
'''



@pytest.fixture
def make(tmp_path):
    (tmp_path / "games.py").write_text(GAMES)

    def make(name, **changes):
        return ToolClass(tokenizer=TOKENIZER, seed=0, **SETTINGS | {"environment": f"{tmp_path}/games.py:{name}"} | changes)

    return make


def calls(*numbers: int) -> list[str]:
    return [*(call("guess", number=number) for number in numbers), final("done")]


def test_a_prompt_declares_the_tools_and_ends_with_what_reset_returned(make):
    env = make("Guess", instructions="Play.", kwargs={"most": 9})
    prompt = env.prompts(0, num_prompts=2)[0]
    assert ("# Instructions\n\nPlay.\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n// Guesses the number.\n"
            "type guess = (_: {\n// The guess.\nnumber: number,\n}) => any;") in text_of(prompt)
    assert "<|start|>user<|message|> Guess my number, from 0 to 9; it is " in text_of(prompt)
    assert text_of(prompt).endswith(".<|end|><|start|>assistant") and "guess" in env.summary()


def test_an_unmodified_class_is_played_to_its_end(make, monkeypatch):
    env = make("Guess")
    prompts = checked_prompts(env, "prompts", env.prompts(3, num_prompts=3), vocab_size=TOKENIZER.vocab_size)
    secrets = [env.episode(prompt, 0).secret for prompt in prompts]
    assert secrets == [env.episode(prompt, 5).secret for prompt in prompts] and len(set(secrets)) > 1
    completions = play(env, prompts, monkeypatch,
                       lambda prompt: calls(101, -1, secrets[prompt.id], 5) if prompt.id else calls(3.5))
    assert [score.reward for score in env.score(completions)] == [0.0, pytest.approx(1 / 3), pytest.approx(1 / 3)]
    assert [call.result for call in completions[1].episode.calls] == ['"too large"', '"too small"', '"right"', "Game over."]
    assert [call.is_failed for call in completions[1].episode.calls] == [False, False, False, True]
    assert "must be integer" in completions[0].episode.calls[0].result
    assert '{"error": "Game over."}<|end|>' in TOKENIZER.decode(completions[1].completion_ids, keep_special=True)


def test_an_async_class_gets_the_columns_of_its_rows_that_it_takes(make, monkeypatch, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"row {i}"}], "answer": f"a{i}", "other": i} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = make("Async", path=str(tmp_path / "rows.jsonl"))
    asked = [prompt for step in range(4) for prompt in env.prompts(step, num_prompts=4)]
    held_out = [prompt.row["row"]["other"] for prompt in env.eval_prompts()]
    seen = [prompt.row["row"]["other"] for prompt in asked]
    assert set(seen).isdisjoint(held_out) and len(set(seen[:len(env.train_rows)])) == min(len(env.train_rows), 16)
    prompts = env.prompts(0, num_prompts=2)
    assert text_of(prompts[0]).endswith(f"<|message|>row {prompts[0].row['row']['other']}<|end|><|start|>assistant")
    completions = play(env, prompts, monkeypatch, lambda prompt: calls(1, 2))
    assert [score.reward for score in env.score(completions)] == [2.0, 2.0]
    assert completions[0].episode.calls[0].result == json.dumps(prompts[0].row["row"]["answer"])


def test_prompts_depend_on_seed_and_step_alone(make):
    env, again = make("Guess"), make("Guess")
    random.seed(1)
    first = [text_of(prompt) for prompt in env.prompts(2, num_prompts=4)]
    assert first == [text_of(prompt) for prompt in again.prompts(2, num_prompts=4)]
    assert env.fingerprint() == again.fingerprint() != make("Guess", num_eval_prompts=5).fingerprint()
    assert [p.row for p in env.prompts(2, num_prompts=4)] != [p.row for p in env.prompts(3, num_prompts=4)]


def test_a_reset_that_returns_another_text_for_the_same_row_loses_the_episode(make, monkeypatch):
    env = make("Fickle")
    with pytest.raises(EnvironmentFault, match=r"reset\(\) returned '\d' and before, for the same row, '\d': the"):
        play(env, env.prompts(0, num_prompts=1), monkeypatch, lambda prompt: calls(1))


@pytest.mark.parametrize("asked, message", [(None, None), ("Go.", None), (5, "has '?5'? there"), ([], "at least one message")])
def test_a_rows_prompt_is_text_or_messages_and_may_be_missing(make, tmp_path, asked, message):
    rows = [json.dumps({"prompt": asked, "number": number}) for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    env = make("Guess", path=str(tmp_path / "rows.jsonl"))
    if message is None:
        assert f"<|start|>user<|message|>{asked or ''} Guess my number" in text_of(env.prompts(0, num_prompts=1)[0])
    else:
        with pytest.raises(DataError, match=message):
            env.prompts(0, num_prompts=1)


def test_a_reset_that_holds_up_the_prompts_is_shown_on_stderr(make, monkeypatch, capfd):
    env = make("Slow")
    env.prompts(0, num_prompts=1)
    assert "reset" not in capfd.readouterr().err
    monkeypatch.setattr("grpo.envs.tool_class.PROMPT_SECONDS", 0.2)
    env.prompts(0, num_prompts=1)
    assert re.search(r"Timeout.*games.py\", line \d+ in reset", capfd.readouterr().err, re.DOTALL)


@pytest.mark.parametrize("name", ["Closed", "AsyncClosed"])
def test_every_object_that_was_reset_is_closed(make, monkeypatch, name):
    env = make(name)
    for step in range(2):
        completion, = play(env, env.prompts(step, num_prompts=1), monkeypatch, lambda prompt: calls(1))
        assert completion.episode.calls[0].result == '"1"'  # none is open but that of the episode


def test_a_reset_that_hangs_loses_its_episode_and_lets_others_have_the_random_generators(make, monkeypatch):
    env = make("Stuck")
    completions = play(env, env.prompts(0, num_prompts=2), monkeypatch, lambda prompt: calls(1), call_seconds=0.5)
    failures = {completion.episode.failure for completion in completions}
    assert failures == {None, "its code ran over 0.5 s (turns.call_seconds)"}
    assert len(env.prompts(1, num_prompts=2)) == 2


def test_a_reward_that_is_not_finite_loses_its_episode_and_no_other(make, monkeypatch):
    env = make("Uncounted")
    prompts = env.prompts(0, num_prompts=2)
    nan, other = completions = play(env, prompts, monkeypatch, lambda prompt: calls(*[1, 2] * prompt.id))
    assert "get_reward() returned nan, which is not finite" in nan.episode.failure
    assert [score.reward for score in checked_scores(env, completions)] == [None, 0.5] and other.episode.failure is None


def test_a_class_without_a_reward_is_judged_by_a_function_of_trls_form(make, monkeypatch, tmp_path):
    def rewards(name, texts, **changes):
        env = make(name, **changes | {"reward": f"{tmp_path}/games.py:{changes['reward']}"})
        completions = play(env, env.prompts(0, num_prompts=2), monkeypatch, lambda prompt: texts[prompt.id])
        return [score.reward for score in checked_scores(env, completions)], completions

    texts = [[call("increment", step=2), call("increment", step=3), final("5")], [final("0")]]
    assert rewards("Counter", texts, reward="counted")[0] == [5.0, 0.0]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"number": {i}}}\n' for i in range(20)))
    found, completions = rewards("Counter", texts, reward="counted_by_rows", path=str(tmp_path / "rows.jsonl"))
    assert found == [n + 10 * completion.prompt.row["row"]["number"] for n, completion in zip((5, 0), completions)]
    assert rewards("Guess", [calls(101, 102), calls(101)], reward="closeness")[0] == [-2.0, -1.0]  # beside get_reward()'s 0
    with pytest.raises(EnvironmentFault, match="env.reward returned .* for one environment; it must return a list of one"):
        rewards("Counter", texts, reward="two")
    with pytest.raises(ValueError, match=r"Counter has no get_reward\(\): .* \(or the function env.reward\)"):
        make("Counter")


def test_rows_without_a_column_that_reset_needs_are_refused_by_name(make, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"reply": "a{i}"}}\n' for i in range(20)))
    env = make("Async", path=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match="Async.reset.. needs answer, which a row lacks; it has: reply"):
        env.prompts(0, num_prompts=1)


@pytest.mark.parametrize("name, message", [
    ("NoReset", r"NoReset has no reset\(\) and no get_reward\(\)"), ("NoTools", "no public method that could be a tool"),
    ("Untyped", "argument where has no type hint"), ("Nothing", "has no 'Nothing'; it defines: Async, AsyncClosed, ")])
def test_a_class_of_another_form_is_refused_by_name(make, name, message):
    with pytest.raises(ValueError, match=message):
        make(name)


def test_rows_too_few_to_hold_some_out_are_refused(make, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"answer": "a"}\n')
    with pytest.raises(DataError, match="leaves . training and . evaluation rows"):
        make("Async", path=str(tmp_path / "one.jsonl"))


def test_such_a_class_as_the_environment_itself_is_refused_with_the_way_to_run_it(tmp_path):
    (tmp_path / "games.py").write_text(GAMES)
    with pytest.raises(ConfigError, match="env=tool_class env.environment=.*games.py:Guess"):
        bind({"_target_": f"{tmp_path}/games.py:Guess"}, "env")
    node = {"_target_": "grpo.envs.tool_class.ToolClass", "environment": f"{tmp_path}/games.py:Guess", **SETTINGS}
    assert isinstance(make_environment(node, TOKENIZER, seed=0, total_steps=1), ToolClass)
