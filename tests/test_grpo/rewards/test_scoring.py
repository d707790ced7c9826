"""The reward functions of a data set together: error rates, retries, time limits, worker processes, names and values."""

import os
import warnings

import pytest

from grpo.config import settings_of_steps
from grpo.configuration.launch import load_config
from grpo.rewards.forms import Sample, TrainerState
from grpo.rewards.functions import RewardError
from grpo.rewards.scoring import Scorer

STATE = TrainerState(global_step=3, max_steps=10, epoch=0.5, num_train_epochs=2, train_batch_size=4)
LONG = 100.0  # seconds; a limit that no test reaches

FUNCTIONS = """
import asyncio, os, sys, time

calls = [0]

def judge(row, text):            # one call in 21 fails, as a judge over the network does
    calls[0] += 1
    if calls[0] % 21 == 20:
        raise TimeoutError("judge did not answer")
    return float(text)

def always(row, text):
    raise ValueError("no such judge")

def by_text(row, text):
    if text == "hang":
        time.sleep(1000)
    if text == "spin":
        while True:
            pass
    if text == "die":
        os._exit(3)
    if text == "exit":
        sys.exit("leaving")
    return float(text)

def batch(completions, **kwargs):
    if "hang" in completions:
        time.sleep(1000)
    return [float(text) + len(completions) for text in completions]

def pid(row, text):
    return {"score": float(text), "pid": os.getpid()}

loops = []

async def looped(row, text):
    await asyncio.sleep(0)
    loops.append(id(asyncio.get_running_loop()))
    return float(len(set(loops)))

def state(completions, trainer_state, **kwargs):
    return [trainer_state.global_step + trainer_state.max_steps + trainer_state.epoch] * len(completions)
"""


@pytest.fixture
def scorer(tmp_path):
    made = []

    def build(*names, **options):
        file = tmp_path / "functions.py"
        file.write_text(FUNCTIONS)
        settings = {"max_error_rate": 0.05, "timeout": None, "num_workers": 0, "retries": 0, **options}
        entries = [f"{file}:{name}" for name in names]
        made.append(Scorer(entries, columns={"question"}, has_answer=True, **settings))
        return made[-1]

    yield build
    for one in made:
        one.close()


def samples(texts, *, groups=1):
    size = len(texts) // groups
    return [
        Sample(row={"question": "q"}, source=f"train.jsonl:{i // size + 1}", prompt="q", text=text, thinking="",
               completion_ids=[1], is_truncated=False, answer="1")
        for i, text in enumerate(texts)
    ]


def values(scorer, texts, **options):
    [results] = scorer.results(samples(texts, **options), STATE)
    return [result.value for result in results]


def test_a_judge_that_fails_now_and_then_is_asked_again(scorer):
    judge = scorer("judge", retries=1)
    assert [values(judge, ["1"] * 12) for _ in range(10)] == [[1.0] * 12] * 10


def test_without_a_second_try_a_failure_costs_its_sample_and_no_more(scorer):
    judge = scorer("judge")
    scored = [value for _ in range(20) for value in values(judge, ["1"] * 3)]  # calls 20 and 41 fail
    assert scored.count(None) == 2 and scored.count(1.0) == 58


def test_the_first_error_of_each_function_is_told_with_row_cause_and_completion(scorer):
    two = scorer("always", "by_text", max_error_rate=1.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for texts in (["1", "2"], ["1", "exit"], ["exit", "exit"]):
            two.results(samples(texts, groups=2), STATE)
    always, by_text = [str(warning.message) for warning in told]
    assert always.startswith("reward 'always' failed on row train.jsonl:1: ValueError: no such judge (functions.py:13); "
                             "completion: '1'. Completions on which it fails get no reward")
    assert by_text.startswith("reward 'by_text' failed on row train.jsonl:2: SystemExit") and "completion: 'exit'" in by_text


@pytest.mark.parametrize("rate, num_allowed", [(0.05, 5), (0.0, 0), (0.2, 20)])
def test_a_function_that_always_fails_stops_the_run_soon_with_row_and_cause(scorer, rate, num_allowed):
    failing = scorer("always", max_error_rate=rate, retries=1)
    for _ in range(num_allowed):
        assert values(failing, ["1"]) == [None]
    with pytest.raises(RewardError, match=rf"reward 'always' failed on {num_allowed + 1} of its last {num_allowed + 1} "
                                          r"completions \(max_error_rate=.*train.jsonl:1: ValueError: no such judge"):
        values(failing, ["1"])


def test_the_rate_is_that_of_the_latest_results(scorer):
    late = scorer("by_text", max_error_rate=0.1)
    assert values(late, ["1"] * 2000) == [1.0] * 2000
    for _ in range(100):
        assert values(late, ["exit"]) == [None]
    with pytest.raises(RewardError, match="failed on 101 of its last 1000"):
        values(late, ["exit"])


def test_a_batch_function_may_fail_twice_whatever_its_batch(scorer):
    failing = scorer("batch")
    assert [values(failing, ["no number"] * 64) for _ in range(2)] == [[None] * 64] * 2
    assert values(failing, ["1"] * 2) == [3.0] * 2
    with pytest.raises(RewardError, match="'batch' failed on 192 of its last 194 completions.*could not convert"):
        values(failing, ["no number"] * 64)


def test_a_rate_of_one_never_stops(scorer):
    assert values(scorer("always", max_error_rate=1.0), ["1"] * 500) == [None] * 500


# --- worker processes -------------------------------------------------------------------------------------------------


def holds(*texts):
    """Whether what a worker is handed scores one of these texts."""
    return lambda item: any(sample.text in texts for sample in item[2])


def test_a_sample_that_hangs_has_an_error_and_the_others_their_values(scorer, hurried):
    hurried(holds("hang", "spin"))
    [results] = scorer("by_text", timeout=LONG).results(samples(["1", "hang", "2", "spin", "3"]), STATE)
    assert [result.value for result in results] == [1.0, None, 2.0, None, 3.0]
    assert results[1].error == "ran over its limit of 100 s; its worker was killed (env.reward_timeout)"


def test_a_batch_function_that_hangs_loses_its_group_alone(scorer, hurried):
    hurried(holds("hang"))
    assert values(scorer("batch", timeout=LONG, num_workers=2), ["1", "hang", "2", "3"], groups=2) == [None, None, 4.0, 5.0]


def test_a_function_that_always_hangs_stops_the_run(scorer):
    limited = scorer("by_text", timeout=0.2, num_workers=4, retries=5)
    with pytest.raises(RewardError, match="'by_text' failed on 16 of its last 16 completions.*ran over its limit of 0.2 s"):
        values(limited, ["hang"] * 400)


def test_a_sample_whose_worker_dies_or_that_exits_has_an_error(scorer):
    [results] = scorer("by_text", num_workers=1).results(samples(["die", "1", "exit"]), STATE)
    assert [result.value for result in results] == [None, 1.0, None]
    assert "exit status 3" in results[0].error and results[2].error.startswith("SystemExit: leaving")


def test_workers_are_other_processes_and_are_asked_only_where_wanted(scorer):
    def pids(**options):
        [results] = scorer("pid", **options).results(samples(["1", "2"]), STATE)
        return {result.metrics["pid/pid"] for result in results}

    assert pids() == {float(os.getpid())}
    assert float(os.getpid()) not in pids(num_workers=1) | pids(timeout=LONG)


def test_coroutines_share_one_loop_in_a_worker_too(scorer):
    looped = scorer("looped", num_workers=1)
    assert values(looped, ["1", "2"]) == values(looped, ["3", "4"]) == [1.0, 1.0]


def test_the_trainers_state_is_shown_here_and_in_workers(scorer):
    assert values(scorer("state"), ["1"]) == values(scorer("state", num_workers=1), ["1"]) == [13.5]


def test_a_dry_run_names_function_row_and_cause(scorer):
    with pytest.raises(RewardError, match="'always' failed its dry run on row train.jsonl:1, .*ValueError: no such judge"):
        scorer("always", retries=1).try_out(samples(["1"]), STATE)


# --- what env.rewards may be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [str, lambda path: [path], lambda path: {"fn": path}, lambda path: [{"fn": path}]])
def test_a_function_is_named_by_a_text_an_entry_or_a_list(tmp_path, wrap):
    (tmp_path / "f.py").write_text("def even(row, text):\n    return 1 - len(text) % 2\n")
    made = Scorer(wrap(f"{tmp_path}/f.py:even"), columns=set(), has_answer=False, max_error_rate=0.0, timeout=None,
                  num_workers=0, retries=0)
    assert [(reward.name, reward.weight) for reward in made.rewards] == [("even", 1.0)]
    assert values(made, ["12", "123"]) == [1.0, 0.0]


def test_no_function_is_no_work():
    made = Scorer(None, columns=set(), has_answer=False, max_error_rate=0.0, timeout=LONG, num_workers=4, retries=0)
    assert made.rewards == [] and made.results(samples(["1"]), STATE) == []


def test_a_run_may_go_on_with_other_limits_of_its_reward_functions():
    dataset = ["+experiment=gpt_oss_20b_lora", "env.path=FILE", "model.path=some/model"]
    limits = ["env.reward_timeout=60", "env.reward_workers=2", "env.reward_retries=3", "env.max_error_rate=0.5"]
    before, after, other = (settings_of_steps(load_config("train", [*dataset, *more]))
                            for more in ([], limits, ["env.rewards=mine.py:even"]))
    assert before == after != other
