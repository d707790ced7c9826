"""Completions that several policies draw: which one draws which token, and that its log-probs are those on record."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from rollout_problem import MAX_LEN, assert_equal, make_config, make_prompts
from version_gaps import gaps

from grpo.ahead import age_metrics
from grpo.batch import Completion, Prompt, Segment, pack
from grpo.config import ConfigError, InFlight
from grpo.configuration.launch import load_config
from grpo.environment import EnvironmentFault, check_environment
from grpo.explain import Request, explain
from grpo.groups import Groups, check_begun
from grpo.rollout.in_flight import UNFINISHED, begin, go_on, stamp, tokens_due
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Interrupted, Sampler
from grpo.run.checkpoint import load_run
from grpo.run.memory import needs_of
from grpo.run.policy import load_run_policy
from grpo.run.rollouts import BegunRollout, Rollout, read
from grpo.run.start import start


@pytest.mark.parametrize("most_staleness, max_new_tokens, expected", [
    (2, 8, [8, 8, 4]), (3, 20, [20, 20, 14, 7]), (3, 8, [8, 8, 6, 3]), (2, 1, [1, 1, 1]), (4, 2, [2, 2, 2, 2, 1])])
def test_each_policy_owes_a_step_so_many_tokens(most_staleness, max_new_tokens, expected):
    settings = SimpleNamespace(max_staleness=most_staleness, max_new_tokens=max_new_tokens)
    assert [tokens_due(settings, num_ahead) for num_ahead in range(most_staleness + 1)] == expected


# ---- rows that another session began


@pytest.fixture(scope="module")
def model(lively_model):
    return lively_model(make_config(), head_factor=20.0)


def drawn(model, limits, *, max_new_tokens=20, **settings):
    """The completions of steps 4 and 5, which have prompts of equal ids, by versions 7, 8, ...; and what each of them left."""
    sampler = Sampler(model, (3, 11), max_batch=64, seed=7)
    params = SamplingParams(max_new_tokens=max_new_tokens, **settings)
    begun = [begin(step, 7, make_prompts([3, 9, 6]), num_samples=3) for step in (4, 5)]
    for version, pair in enumerate(limits, start=7):
        begun = go_on(sampler, begun, pair, params, version=version, should_stop=lambda: False, progress=None)
        for rollout, limit in zip(begun, pair, strict=True):
            for completion in rollout.completions:
                is_over = completion.finish_reason != UNFINISHED
                assert completion.num_policy_tokens == limit or is_over and completion.num_policy_tokens < limit
    return begun


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8, "temperature": 1.3}], ids=["plain", "filtered"])
def test_a_policy_that_stays_draws_the_same_completion_in_parts_as_at_once(model, settings):
    sampler = Sampler(model, (3, 11), max_batch=64, seed=7)
    begun = drawn(model, [(5, 1), (10, 10), (10, 19), (20, 20)], **settings)
    for rollout in begun:
        expected = sampler.generate(make_prompts([3, 9, 6]), SamplingParams(max_new_tokens=20, **settings), step=rollout.step,
                                    num_samples=3)
        assert_equal(rollout.completions, expected)
    reasons = {completion.finish_reason for rollout in begun for completion in rollout.completions}
    assert reasons == {"stop", "length"}
    assert begun[0].completions[0].completion_ids != begun[1].completions[0].completion_ids  # of another step


def test_each_token_knows_the_policy_that_drew_it(model):
    first, second = drawn(model, [(5, 1), (10, 10), (10, 19), (20, 20)])
    for rollout, expected in ((first, [7] * 5 + [8] * 5 + [10] * 10), (second, [7] + [8] * 9 + [9] * 9 + [10])):
        assert rollout.version == 7
        for completion in rollout.completions:
            assert completion.segments[1].versions == expected[:completion.num_policy_tokens]
            assert [segment.source for segment in completion.segments] == ["prompt", "policy"]
    assert any(len(completion.segments[1].versions) == 20 for completion in first.completions)


def test_a_completion_ends_where_the_model_s_longest_sequence_does(model):
    sampler = Sampler(model, (), max_batch=4, seed=7, max_len=16)
    begun, params = [begin(0, 0, make_prompts([4, 10]), num_samples=2)], SamplingParams(max_new_tokens=20)
    for version in range(2):
        begun = go_on(sampler, begun, [10 * version + 10], params, version=version, should_stop=lambda: False, progress=None)
        found = [(completion.num_policy_tokens, completion.finish_reason) for completion in begun[0].completions]
        assert found == [((10, UNFINISHED), (12, "length"))[version]] * 2 + [(6, "length")] * 2


def test_what_is_interrupted_leaves_the_rollouts_as_they_were(model):
    sampler = Sampler(model, (3, 11), max_batch=64, seed=7)
    begun, params = drawn(model, [(5, 5)]), SamplingParams(max_new_tokens=20)
    before = [[(list(segment.token_ids), segment.versions) for segment in completion.segments]
              for rollout in begun for completion in rollout.completions]
    calls = iter([False] * 4 + [True])
    with pytest.raises(Interrupted):
        go_on(sampler, begun, [20, 20], params, version=9, should_stop=lambda: next(calls), progress=None)
    assert before == [[(segment.token_ids, segment.versions) for segment in completion.segments]
                      for rollout in begun for completion in rollout.completions]
    again, whole = (go_on(sampler, rollouts, [20, 20], params, version=9, should_stop=lambda: False, progress=None)
                    for rollouts in (begun, drawn(model, [(5, 5)])))
    for ours, theirs in zip(again, whole, strict=True):
        assert_equal(ours.completions, theirs.completions)


# ---- metrics and refusals


def completion_of(versions):
    segments = [Segment([1, 2], "prompt"), Segment([5] * len(versions), "policy", [-1.0] * len(versions), versions=versions)]
    return Completion(Prompt(0, [1, 2], {}), 0, segments, "stop")


def run_at(step):
    return SimpleNamespace(step=step, config=SimpleNamespace(rollout=SimpleNamespace(max_staleness=3, in_flight=InFlight.switch)))


def test_metrics_share_the_trained_tokens_by_age():
    whole = completion_of([0, 0])
    whole.segments[1].versions = None
    stamp([whole], version=5)
    rollout = Rollout(6, 3, Groups([completion_of([3, 3, 4]), whole, completion_of([3, 5, 5])], [1.0] * 3, []))
    # ages 3 3 2 | 1 1 | 3 1 1
    assert age_metrics(run_at(6), rollout) == {"rollout/staleness": 15 / 8, "rollout/age_0": 0, "rollout/age_1": 4 / 8,
                                               "rollout/age_2": 1 / 8, "rollout/age_3": 3 / 8}


@pytest.mark.parametrize("versions", [[3, 2], [3, 7], [3]], ids=["too old", "of the future", "unknown"])
def test_a_token_of_no_allowed_policy_is_an_error(versions):
    rollout = Rollout(6, 3, Groups([completion_of(versions)], [1.0], []))
    rollout.groups.completions[0].segments[1].token_ids = [5, 5]
    with pytest.raises(AssertionError):
        age_metrics(run_at(6), rollout)


SWITCH = ("rollout.in_flight=switch", "rollout.max_staleness=2")


@pytest.mark.parametrize("arguments, expected", [
    (["rollout.max_staleness=1"], "rollout.in_flight = 'switch': with rollout.max_staleness=1 one policy draws a completion"),
    (["rollout.replay_routing=true"], "rollout.in_flight = 'switch': the experts on record"),
    (["curriculum.candidates=2"], "rollout.in_flight = 'switch': a curriculum would choose other prompts"),
    (["rollout.in_flight=often"], "rollout.in_flight = 'often' (str): expected one of keep, switch")])
def test_what_does_not_go_with_several_policies_is_refused(arguments, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config("train", ["+experiment=smoke", *SWITCH, *arguments])


def test_memory_is_planned_for_the_completions_of_all_steps_in_flight():
    for arguments, expected in ((["rollout.max_staleness=3"], 8), ([*SWITCH, "rollout.max_staleness=3"], 24)):
        config = load_config("train", ["+experiment=smoke", "eval.num_samples=1", *arguments])
        assert needs_of(config, make_config(), prompt_len=9, dtype=torch.float32).num_rows == expected


def test_tools_and_several_ranks_are_refused(tmp_path):
    config = load_config("train", ["+experiment=smoke", *SWITCH])
    config.warmup = None
    with pytest.raises(ConfigError, match="completions with calls of tools are drawn by one policy"):
        check_environment(SimpleNamespace(episode=None), config, max_len=MAX_LEN, vocab_size=99)
    with pytest.raises(ConfigError, match="several ranks draw a completion by one policy"):
        start(config, SimpleNamespace(run_dir=tmp_path), lambda: False, SimpleNamespace())


def test_an_environment_that_gives_other_prompts_when_asked_again_is_named():
    begun = begin(0, 0, make_prompts([3, 4]), num_samples=2).completions
    check_begun(None, make_prompts([3, 4]), begun)
    with pytest.raises(EnvironmentFault, match="asked again for a step's prompts, it gave others"):
        check_begun(None, make_prompts([3, 5]), begun)


# ---- runs

ARGUMENTS = ("+experiment=smoke", "steps=5", "name=run", "warmup=null", "env._target_=spread.Spread", "rollout.max_staleness=3",
             "rollout.in_flight=switch", "rollout.max_new_tokens=8", "corrections.weight=truncate", "optim.lr=0.01",
             "checkpoint.every=1", "checkpoint.keep=9", "eval.every=0", "eval.at_start=false", "eval.at_end=false",
             "rollout.temperature=0.9")


@pytest.fixture(scope="module")
def switched(entry_points, spread_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("switched")
    result = entry_points.run("grpo.train", *ARGUMENTS, f"output_dir={folder}", path=(spread_folder,), writes_report=False)
    assert result.code == 0, result.err
    assert ("ahead    a step trains on what the policy of 3 steps before sampled and newer ones went on with, each for 3 tokens, "
            "corrected for that") in result.out
    assert "the sampler's log-probs are not the trainer's" not in result.err
    return folder / "run"


def test_the_recorded_log_probs_of_each_token_are_those_of_the_policy_that_drew_it_and_of_no_other(switched):
    policy = load_run_policy(switched, step=0, device=torch.device("cpu"), dtype=torch.float32)[0]
    for step in (3, 4):
        state = load_run(switched, step=step)
        found = read(state.state["rollouts"], state.tensors)
        rollout = found[0]
        assert [(type(item), item.step, item.version) for item in found] == [
            (Rollout, step, step - 3), *((BegunRollout, later, later - 3) for later in range(step + 1, 5))]
        batch = pack(rollout.groups.completions, rollout.groups.advantages)
        versions = torch.tensor([version for completion in rollout.groups.completions
                                 for version in [-1] * len(completion.prompt.token_ids) + completion.segments[1].versions])
        assert versions[batch.loss_mask].unique().tolist() == [step - 3, step - 2, step - 1]
        for version in range(step - 3, step + 1):
            apart = gaps(policy, switched, version, batch)
            for other in (step - 3, step - 2, step - 1):
                gap = float(apart[versions == other].max())
                assert gap < 1e-5 if other == version else gap > 1e-3, (step, version, other, gap)


def test_metrics_and_the_log_of_completions_say_which_policies_drew_them(switched):
    steps = [row for row in map(json.loads, (switched / "metrics.jsonl").read_text().splitlines()) if "reward" in row]
    oldest = [max(age for age in range(4) if row[f"rollout/age_{age}"] > 0) for row in steps]
    newest = [min(age for age in range(4) if row[f"rollout/age_{age}"] > 0) for row in steps]
    assert (oldest, newest) == ([0, 1, 2, 3, 3], [0, 1, 1, 1, 1])
    for row in steps:
        assert sum(row[f"rollout/age_{age}"] for age in range(4)) == pytest.approx(1)
        assert row["rollout/staleness"] == pytest.approx(sum(age * row[f"rollout/age_{age}"] for age in range(4)))
    for line in map(json.loads, (switched / "completions.jsonl").read_text().splitlines()):
        first = line["step"] - 1  # of the policy that is trained
        due = {0: [0] * 8, 1: [0] * 8, 2: [0] * 6 + [1] * 2}.get(first, [first - 3] * 3 + [first - 2] * 3 + [first - 1] * 2)
        assert line["versions"] == due[:line["num_tokens"]], line["step"]


# as on a GPU: a copy of the policy samples in one thread while the policy trains in another
BESIDE = "import grpo.run.start as start; start.samples_beside = lambda config, device: config.rollout.max_staleness > 0"


def test_sampling_beside_the_update_changes_no_bit(entry_points, spread_folder, switched, tmp_path):
    result = entry_points.run("grpo.train", *ARGUMENTS, f"output_dir={tmp_path}", before=BESIDE, path=(spread_folder,),
                              writes_report=False)
    assert result.code == 0, result.err
    for step in range(6):
        ours, theirs = (load_run(folder, step=step) for folder in (tmp_path / "run", switched))
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())
    assert (tmp_path / "run/completions.jsonl").read_text() == (switched / "completions.jsonl").read_text()


def test_a_step_that_several_policies_drew_is_explained_from_its_checkpoint(switched, monkeypatch, spread_folder):
    monkeypatch.syspath_prepend(spread_folder)
    num_threads = torch.get_num_threads()
    try:
        found = explain(Request(switched, 4))
    finally:
        torch.set_num_threads(num_threads)
    assert found.is_reproduced, found.checks
