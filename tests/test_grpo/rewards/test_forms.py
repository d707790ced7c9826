"""Reward functions in the forms that other trainers' users have them, unmodified: each with values worked out by hand."""

import json

import pytest
from harmony import encode_with_special
from paths import FIXTURES

from grpo.batch import Completion, Segment
from grpo.envs.dataset import Dataset
from grpo.rewards.forms import Sample, TrainerState
from grpo.rewards.functions import load_reward
from models.chat.tokenizer import Tokenizer

STATE = TrainerState(global_step=5, max_steps=20, epoch=0.25, num_train_epochs=1, train_batch_size=2)

FUNCTIONS = '''
from __future__ import annotations

import asyncio
import functools
import re


# TRL: one list of messages for each completion, columns by name
def accuracy(completions: list[list[dict[str, str]]], solution: list[str], log_extra=None, **kwargs) -> list[float | None]:
    contents = [completion[0]["content"] for completion in completions]
    if log_extra is not None:
        log_extra("wanted", solution)
    return [None if truth == "" else float(content == truth) for content, truth in zip(contents, solution, strict=True)]


def boxed_format(completions, **kwargs):
    pattern = re.compile(r"^\\\\boxed\\{.*\\}$")
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [1.0 if pattern.match(text) else 0.0 for text in texts]


def only_rest(**kwargs):
    return [float(len(ids)) for ids in kwargs["completion_ids"]]


def curriculum(prompts, completions, trainer_state=None, **kwargs):
    assert trainer_state.is_world_process_zero and trainer_state.log_history == []
    progress = trainer_state.global_step / trainer_state.max_steps  # 5 / 20
    return [progress + trainer_state.epoch for _ in completions]


class Client:
    def __init__(self):
        self.loop = None

    async def post(self, text):
        loop = asyncio.get_running_loop()
        self.loop = self.loop or loop
        assert self.loop is loop, "Event loop is closed"
        return float(len(text))


client = Client()


async def judged(prompts, completions, **kwargs):
    return list(await asyncio.gather(*(client.post(completion) for completion in completions)))


# factories and classes
def get_overlong(max_len: int, cache: int):
    def overlong(completion_ids, **kwargs):
        return [min(0.0, (max_len - cache - len(ids)) / cache) for ids in completion_ids]

    return overlong


def make_task_reward(task, scale=2.0):     # its parameters have the names of a function's, and come from kwargs
    return lambda text: scale * (task in text)


class Repetition:
    def __init__(self, n=2, penalty=-1.0):
        self.n, self.penalty = n, penalty

    def __call__(self, completion_ids, **kwargs):
        return [self.penalty * (1 - len(set(ids)) / len(ids)) for ids in completion_ids]


class Judge:
    def __init__(self, bonus):
        self.bonus = bonus

    def score(self, completion, answer):
        return self.bonus + (completion == answer)

    @staticmethod
    def length(text):
        return len(text)


judge = Judge(0.5)


# verl
def compute_score(data_source, solution_str, ground_truth, extra_info=None, scale=1.0, **kwargs):
    assert not kwargs, kwargs
    if data_source != "sums":
        raise NotImplementedError(data_source)
    correct = solution_str in ground_truth["target"]
    return {"score": scale * correct, "acc": correct, "pred": solution_str, "index": extra_info["index"]}


def compute_number(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0 if solution_str in ground_truth["target"] else 0.1 * extra_info["index"]


def compute_scores(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):
    rows = zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)
    return [(source == "sums") * (text in truth["target"]) + info["index"] for source, text, truth, info in rows]


# wrapped
def weighted(text, weight):
    return weight * len(text)


heavy = functools.partial(weighted, weight=3.0)


def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def opaque(function):
    return lambda *args, **kwargs: function(*args, **kwargs)


@logged
def shown(row, text):
    return float(row["index"])


@opaque
def hidden(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


# a module that makes its attributes when they are asked for
def __getattr__(name):
    if name == "lazy":
        return lambda text: 4.0
    if name == "missing_package":
        raise ImportError("pip install judge")
    raise AttributeError(name)
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("forms") / "public_rewards.py"
    path.write_text(FUNCTIONS)
    return path


def samples():
    """Answers "42" (right) and "7" (wrong) to text prompts; completions of 2 and 5 tokens, of which 1 and 2 differ."""
    made = []
    for i, (text, ids) in enumerate((("42", [9, 9]), ("7", [9, 9, 9, 9, 8]))):
        row = {"question": "6 * 7?", "solution": "42", "data_source": "sums", "index": i, "extra_info": {"index": i},
               "reward_model": {"style": "rule", "ground_truth": {"target": ["42", "forty-two"]}}}
        made.append(Sample(row=row, source=f"train.jsonl:{i + 1}", prompt="6 * 7?", text=text, thinking="hm",
                           completion_ids=ids, is_truncated=False, answer=None))
    return made


def results(path, made=None, *, has_answer=False, **kwargs):
    made = made or samples()
    reward = load_reward(str(path), key="env.rewards[0].fn", columns=set(made[0].row), has_answer=has_answer, kwargs=kwargs)
    return reward(made, state=STATE, retries=0)


@pytest.mark.parametrize("name, kwargs, expected", [
    ("accuracy", {}, [1.0, 0.0]),
    ("boxed_format", {}, [0.0, 0.0]),
    ("only_rest", {}, [2.0, 5.0]),
    ("curriculum", {}, [0.5, 0.5]),
    ("judged", {}, [2.0, 1.0]),
    ("get_overlong", {"max_len": 5, "cache": 2}, [0.0, -1.0]),  # 3 tokens are free, then (3 - 5) / 2
    ("make_task_reward", {"task": "4"}, [2.0, 0.0]),
    ("make_task_reward", {"task": "7", "scale": 3.0}, [0.0, 3.0]),
    ("Repetition", {}, [-0.5, pytest.approx(-0.6)]),  # 1 of 2 and 2 of 5 are different
    ("Repetition", {"penalty": -2.0}, [-1.0, pytest.approx(-1.2)]),
    ("Judge.length", {}, [2.0, 1.0]),
    ("compute_score", {}, [1.0, 0.0]),
    ("compute_score", {"scale": 2.0}, [2.0, 0.0]),
    ("compute_number", {}, [1.0, pytest.approx(0.1)]),
    ("compute_scores", {}, [1.0, 1.0]),  # right with index 0, wrong with index 1
    ("heavy", {}, [6.0, 3.0]),
    ("heavy", {"weight": 1.0}, [2.0, 1.0]),
    ("weighted", {"weight": 2.0}, [4.0, 2.0]),
    ("shown", {}, [0.0, 1.0]),
    ("hidden", {}, [2.0, 1.0]),
    ("lazy", {}, [4.0, 4.0]),
])
def test_public_forms_run_unmodified(file, name, kwargs, expected):
    for _ in range(2):  # a second call finds the same clients
        found = results(f"{file}:{name}", **kwargs)
        assert [(result.value, result.error) for result in found] == [(value, None) for value in expected]


def test_a_method_of_an_object_in_a_module_is_a_function(file):
    made = samples()
    for sample in made:
        sample.answer = "42"
    assert [result.value for result in results(f"{file}:judge.score", made, has_answer=True)] == [1.5, 0.5]


def test_completions_have_the_form_of_their_prompt_unless_the_annotation_asks_for_another(tmp_path):
    (tmp_path / "kinds.py").write_text(
        "from typing import List\n"
        "def plain(completions): return [{'score': 0, 'kind': type(c).__name__} for c in completions]\n"
        "def texts(completions: List[str]): return [{'score': 0, 'kind': type(c).__name__} for c in completions]\n"
        "def messages(completions: list[list[dict]]): return [{'score': 0, 'kind': type(c).__name__} for c in completions]\n"
        "def asked(prompts: 'list[list[dict]]', completions): return [{'score': 0, 'kind': str(p)} for p in prompts]\n")

    def kinds(name, prompt):
        made = samples()
        for sample in made:
            sample.prompt = prompt
        return [result.extra[f"{name}/kind"] for result in results(f"{tmp_path}/kinds.py:{name}", made)]

    chat = [{"role": "user", "content": "6 * 7?"}]
    assert [kinds(name, "6 * 7?") for name in ("plain", "texts", "messages")] == [["str"] * 2, ["str"] * 2, ["list"] * 2]
    assert [kinds(name, chat) for name in ("plain", "texts", "messages")] == [["list"] * 2, ["str"] * 2, ["list"] * 2]
    assert kinds("asked", "6 * 7?") == kinds("asked", chat) == [str(chat)] * 2


def test_entries_of_a_dict_are_metrics_and_columns_of_the_log(file):
    right, wrong = results(f"{file}:compute_score")
    assert right.metrics == {"compute_score/acc": 1.0, "compute_score/index": 0.0}
    assert right.extra == {"compute_score/pred": "42"}
    assert [result.extra for result in results(f"{file}:accuracy")] == [{"wanted": "42"}] * 2


def test_values_logged_that_are_no_numbers_go_to_the_log(tmp_path):
    (tmp_path / "logs.py").write_text(
        "def batch(completions, log_metric, log_extra):\n"
        "    log_metric('level', 'high')\n"
        "    log_metric('nothing', None)\n"
        "    log_metric('huge', 1e300)\n"
        "    log_metric('share', 0.5)\n"
        "    log_extra('step', [1] * len(completions))\n"
        "    return [1.0] * len(completions)\n")
    first, _ = results(f"{tmp_path}/logs.py:batch")
    assert first.metrics == {"share": 0.5} and first.extra == {"level": "high", "huge": 1e300, "step": 1}


@pytest.mark.parametrize("name, kwargs, words", [
    ("missing_package", {}, "cannot import missing_package: ImportError: pip install judge"),
    ("absent", {}, "has no 'absent'; it defines: .*compute_score"),
    ("judge.absent", {}, "has no 'judge.absent'"),
    ("get_overlong", {}, "name no completion.*gets its own parameters from kwargs"),
    ("get_overlong", {"max_length": 5}, "name no completion"),
    ("get_overlong", {"max_len": 5, "cache": 2, "scale": 1}, "kwargs 'scale': 'get_overlong' has no such parameter"),
    ("get_overlong", {"max_len": 5, "cache": "2"}, None),
    ("logged", {"function": 3}, "fails when it is called with its kwargs.*AttributeError|names no completion|cannot be read"),
    ("Judge", {}, "fails when it is called with its kwargs {}: TypeError.*bonus"),
    ("Judge", {"bonus": 1.0}, "it made a Judge"),
])
def test_what_makes_no_reward_function_names_the_key_and_why(file, name, kwargs, words):
    if words is None:  # only the call tells: an error of each completion
        assert "TypeError" in results(f"{file}:{name}", **kwargs)[0].error
        return
    with pytest.raises(ValueError, match=f"^env.rewards\\[0\\].fn.*({words})"):
        results(f"{file}:{name}", **kwargs)


def test_a_reward_file_that_exits_while_it_is_imported_is_named(tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"cannot import .*leaves.py: ImportError: .*leaves.py ends Python while it is imported: "
                                         r"SystemExit: 0 \(leaves.py:2\)"):
        results(f"{tmp_path}/leaves.py:score")


# --- through an environment -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(FIXTURES / "tokenizer_compact")


def environment(tokenizer, folder, rows, **settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"path": str(path), "prompt_key": "prompt", "answer_key": None, "match": "none", "held_out_fraction": 0.5,
             "current_date": "2025-06-28", "reasoning_effort": "low", "max_prompt_tokens": 600, "total_steps": 12}
    return Dataset(tokenizer=tokenizer, seed=0, **given | settings)


def score(env, text):
    prompt = env.prompts(3, num_prompts=1)[0]
    ids = encode_with_special(env.tokenizer, f"<|channel|>final<|message|>{text}<|return|>")
    return env.score([Completion(prompt, 0, [Segment(prompt.token_ids, "prompt"), Segment(ids, "policy")], "stop")])[0]


def test_rows_of_verls_form_reach_its_functions_as_they_are(tokenizer, tmp_path, file):
    rows = [{"data_source": "sums", "prompt": [{"role": "user", "content": f"{i} + 1?"}], "ability": "math",
             "reward_model": {"style": "rule", "ground_truth": {"target": [str(i + 1)]}}, "extra_info": {"index": i}}
            for i in range(8)]
    for settings in ({}, {"answer_key": "reward_model.ground_truth"}):
        env = environment(tokenizer, tmp_path, rows, rewards=f"{file}:compute_score", **settings)
        row = env.prompts(3, num_prompts=1)[0].row
        target = row["reward_model"]["ground_truth"]["target"][0]
        right, wrong = score(env, target), score(env, target + "0")
        assert (right.reward, wrong.reward) == (1.0, 0.0)
        assert right.metrics["compute_score/index"] == row["extra_info"]["index"]


def test_the_trainers_state_knows_steps_and_epochs(tokenizer, tmp_path):
    (tmp_path / "spy.py").write_text(
        "def spy(completions, trainer_state, **kwargs):\n"
        "    s = trainer_state\n"
        "    return [{'score': s.epoch, 'step': s.global_step, 'max': s.max_steps, 'n': s.num_train_epochs}]\n")
    rows = [{"prompt": f"{i} + 1?"} for i in range(40)]
    env = environment(tokenizer, tmp_path, rows, rewards=f"{tmp_path}/spy.py:spy", dry_run=False)
    num_rows = len(env.train_rows)
    found = score(env, "1")
    assert found.reward == pytest.approx(3 / num_rows)
    assert [found.metrics[f"spy/{name}"] for name in ("step", "max", "n")] == [3, 12, 1]


def test_a_functions_names_do_not_replace_the_environments(tokenizer, tmp_path):
    (tmp_path / "names.py").write_text(
        "def one(completions, log_metric, **kwargs):\n"
        "    log_metric('reward/error_rate', 9.0)\n"
        "    log_metric('shared', 1.0)\n"
        "    return [1.0] * len(completions)\n"
        "def two(completions, log_metric, **kwargs):\n"
        "    log_metric('shared', 2.0)\n"
        "    return [1.0] * len(completions)\n")
    rows = [{"prompt": f"{i} + 1?"} for i in range(8)]
    env = environment(tokenizer, tmp_path, rows, rewards=[f"{tmp_path}/names.py:one", f"{tmp_path}/names.py:two"])
    assert score(env, "1").metrics == {
        "reward/error_rate": 0.0, "one/reward/error_rate": 9.0, "shared": 1.0, "two/shared": 2.0}
