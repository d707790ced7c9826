"""The adapters without the libraries that they adapt: what they share, what they refuse, and environments made here."""

import random
import re

import pytest
from paths import ROOT
from played_episodes import SETTINGS, TOKENIZER, call, final, play, text_of

from grpo.envs.adapters.mcp_tools import read_result
from grpo.envs.adapters.openenv_environments import OpenEnvEnvironments
from grpo.envs.adapters.reasoning_gym_tasks import ALLOWED, ReasoningGymTasks
from grpo.envs.adapters.session import final_text, import_extra
from grpo.envs.global_random import OwnRandom
from grpo.envs.resource_sessions import ResourceSessions

LIBRARY = '''
import random
from pydantic import BaseModel, ConfigDict

class Step(BaseModel):
    """How far."""
    model_config = ConfigDict(extra="forbid")
    metadata: dict = {}
    distance: int

class Seen(BaseModel):
    metadata: dict = {}
    done: bool = False
    reward: float | None = None
    place: int

class Walk:
    """Walk to 10."""

    def reset(self, seed=None) -> Seen:
        self.place, self.is_closed = random.randrange(3), False
        return Seen(place=self.place)

    def step(self, action: Step) -> Seen:
        self.place += action.distance
        return Seen(place=self.place, reward=1.0 if self.place == 10 else -0.25, done=self.place >= 10)

    def close(self):
        self.is_closed = True

class Untyped(Walk):
    def step(self, action):
        ...
'''


@pytest.fixture
def walk(tmp_path):
    (tmp_path / "walk.py").write_text(LIBRARY)
    return f"{tmp_path}/walk.py:"


def sessions(adapter: str, **kwargs) -> ResourceSessions:
    settings = SETTINGS | {"environment": f"grpo.envs.adapters.{adapter}", "kwargs": kwargs}
    return ResourceSessions(tokenizer=TOKENIZER, seed=0, **settings)


def test_an_environment_of_openenvs_form_is_played(walk, monkeypatch):
    env = sessions("openenv_environments:OpenEnvEnvironments", environment=walk + "Walk")
    prompts = env.prompts(0, num_prompts=2)
    text = text_of(prompts[0])
    assert "// How far.\ntype step = (_: {\ndistance: number,\n}) => any;" in text
    places = [int(text_of(prompt).split('"place": ')[1][0]) for prompt in prompts]
    assert f'Walk to 10.\n\n{{"done": false, "place": {places[0]}}}<|end|>' in text
    texts = {0: [call("step", distance=1), call("step", distance=9 - places[0]), call("step", distance=1), final("done")],
             1: [call("step", distance=99), call("step", metadata={}, distance=1), call("step", far=1), final("lost")]}
    completions = play(env, prompts, monkeypatch, lambda prompt: texts[prompt.id])
    scores = env.score(completions)
    assert [score.reward for score in scores] == [0.75, -0.25]
    assert [score.metrics for score in scores] == [{"moves": 2.0, "finished": 1.0}, {"moves": 1.0, "finished": 1.0}]
    assert completions[0].episode.calls[1].result == '{"done": true, "reward": 1.0, "place": 10}'
    assert completions[0].episode.calls[2].result == "the episode is over"
    assert completions[1].episode.calls[2].result == "arguments of step: missing distance; unknown far"


def test_the_last_reward_can_be_taken_instead_of_the_sum(walk):
    session = OpenEnvEnvironments(walk + "Walk", reward="last").create(None, seed=1)
    assert session.verify([]).env_reward == 0.0
    session.call_tool("step", {"distance": 1})
    session.call_tool("step", {"distance": 1})
    assert session.verify([]).env_reward == -0.25
    session.close()
    assert session.game.env.is_closed


def test_a_class_of_another_form_is_refused(walk, tmp_path):
    with pytest.raises(ValueError, match="names no pydantic model as the type of `action`"):
        OpenEnvEnvironments(walk + "Untyped")
    with pytest.raises(ValueError, match="reward='mean': allowed: sum, last"):
        OpenEnvEnvironments(walk + "Walk", reward="mean")
    (tmp_path / "needs.py").write_text("import openenv_that_is_missing\n")
    with pytest.raises(ValueError, match=r"pip install -e '\.\[openenv\]'"):
        OpenEnvEnvironments(f"{tmp_path}/needs.py:X")


def test_a_missing_library_is_named_with_the_extra_that_brings_it():
    with pytest.raises(ValueError, match=r"needs the package 'no_such_games', .*pip install -e '\.\[games\]'"):
        import_extra("no_such_games", "games")


def test_tasks_whose_scorers_run_answers_are_refused():
    for task in ("countdown", "spiral_matrix", "n_queens", "coin_flip", "nothing"):
        with pytest.raises(ValueError, match=f"task='{task}': allowed: base_conversion"):
            ReasoningGymTasks(task)


@pytest.mark.parametrize("text", [
    "__import__('os').system('true')[0]", "[].__class__", "9**9**9",
    "\u0661+" * 5, "1" * 3000, "1.5e999999999+1", "{1}", "a\\b", "`id`"])
def test_no_answer_with_code_in_it_has_the_form_of_an_answer(text):
    assert [task for task, form in ALLOWED.items() if form.fullmatch(text)] == []


def test_a_session_draws_its_own_numbers_whatever_others_draw():
    def drawn(seed: int, disturbed: bool) -> list[float]:
        own, found = OwnRandom(seed), []
        for _ in range(3):
            with own.held():
                found.append(random.random())
            if disturbed:
                random.seed(5)
        return found

    assert drawn(1, False) == drawn(1, True) != drawn(2, False)
    random.seed(7)
    expected = random.random()
    random.seed(7)
    drawn(1, False)
    assert random.random() == expected
    assert len(set(drawn(1, False))) == 3


def test_the_final_text_is_the_last_message_if_that_is_the_assistants_answer():
    asked = [{"role": "user", "content": "42?"}]
    calling = {"role": "assistant", "content": "", "tool_calls": []}
    assert final_text(asked) == final_text([*asked, calling]) == ""
    assert final_text([*asked, calling, {"role": "assistant", "content": "42"}]) == "42"


def test_results_of_mcp_are_their_texts():
    parts = [{"type": "text", "text": "a"}, {"type": "image", "data": "..."}, {"type": "text", "text": "b"}]
    assert read_result({"content": parts}).data == "a\n[image]\nb"
    assert read_result({"content": parts[:1], "isError": True}).error == "a"
    assert read_result({"content": [], "isError": True}).error == "the tool failed"


def test_the_adapters_import_no_library():
    for path in (ROOT / "grpo" / "envs" / "adapters").glob("*.py"):
        imported = re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), flags=re.MULTILINE)
        assert not {"textarena", "gymnasium", "reasoning_gym", "mcp", "openenv", "verifiers"} & {*imported}, path
