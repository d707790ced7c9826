"""Groups of a step: what is dropped, refilled and counted, and what an environment may hand back."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

import grpo.groups
from grpo.batch import Completion, Prompt, Segment
from grpo.config import InFlight
from grpo.configuration.algorithm import AdvantageConfig, Baseline, KlConfig, Scale
from grpo.environment import EnvironmentFault, Score, check_environment, checked_scores, held_out_prompts
from grpo.envs.data_files import DataError
from grpo.groups import collect, length_metrics, reward_metrics
from grpo.rewards.functions import RewardError
from grpo.rollout.sampling import SamplingParams

GROUP = 2


class Sampler:
    """Completions of 1 + sample tokens; records what it was asked for."""

    model = SimpleNamespace(config=SimpleNamespace(vocab_size=3))

    def __init__(self, max_len=100):
        self.asked, self.max_len = [], max_len

    def generate(self, prompts, params=None, **settings):
        self.asked.append(([prompt.id for prompt in prompts], {"params": params} | settings))
        return [Completion(prompt, sample, [Segment([1], "prompt"), Segment([2] * (1 + sample), "policy", [-1.0] * (1 + sample))],
                           "stop" if sample else "length")
                for prompt in prompts for sample in range(settings["num_samples"])]


class Env:
    """Rewards by prompt id: a list with one for each sample."""

    def __init__(self, rewards: dict[int, list[float | None]]):
        self.rewards = rewards

    def prompts(self, step, *, num_prompts, attempt=0):
        return [Prompt(attempt * num_prompts + i, [1], {"step": step}) for i in range(num_prompts)]

    def score(self, completions):
        return [Score(self.rewards[c.prompt.id][c.sample], {"exact": float(c.sample)}, {}, None) for c in completions]


def config(*, prompts=3, refill=2, scale="none", max_tokens=100, mask_truncated=False, oversampling=1.0, overlong=None,
           penalty=1.0):
    return SimpleNamespace(
        rollout=SimpleNamespace(prompts_per_step=prompts, group_size=GROUP, refill_rounds=refill, max_new_tokens=5,
                                temperature=0.9, top_k=7, top_p=0.8, min_p=0.1, replay_routing=True, oversampling=oversampling,
                                overlong_buffer=overlong, overlong_penalty=penalty, in_flight=InFlight.keep),
        optim=SimpleNamespace(max_tokens=max_tokens, mask_truncated=mask_truncated), eval=SimpleNamespace(max_prompts=2),
        advantage=AdvantageConfig(Baseline.group, Scale(scale)), kl=KlConfig(0.0), warmup=None)


def run(rewards, **settings):
    sampler = Sampler()
    return collect(Env(rewards), sampler, config(**settings), 4, lambda: False), sampler


def live_ids(groups) -> list[tuple[int, int]]:
    return [(completion.prompt.id, completion.sample) for completion in groups.completions]


def test_groups_with_a_spread_are_kept_with_their_advantages():
    groups, sampler = run({0: [1.0, 0.0], 1: [0.0, 1.0], 2: [0.25, 0.75]})
    assert live_ids(groups) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert groups.advantages == [0.5, -0.5, -0.5, 0.5, -0.25, 0.25]
    assert [c.reward for c in groups.completions] == [1.0, 0.0, 0.0, 1.0, 0.25, 0.75]
    (ids, settings), = sampler.asked
    assert ids == [0, 1, 2]
    settings.pop("should_stop")
    settings.pop("progress")
    params = SamplingParams(max_new_tokens=5, temperature=0.9, top_k=7, top_p=0.8, min_p=0.1, records_routing=True)
    assert settings == {"step": 4, "num_samples": 2, "params": params}


def test_groups_without_a_spread_are_dropped_counted_and_replaced_by_fresh_prompts():
    groups, sampler = run({0: [1.0, 1.0], 1: [0.0, 1.0], 2: [0.5, 0.5], 3: [0.0, 0.0], 4: [1.0, 0.0], 6: [0.0, 2.0]})
    # the first round leaves 2 missing, the second 1, the third none
    assert [ids for ids, _ in sampler.asked] == [[0, 1, 2], [3, 4], [6]]
    assert live_ids(groups) == [(1, 0), (1, 1), (4, 0), (4, 1), (6, 0), (6, 1)]
    assert groups.advantages == [-0.5, 0.5, 0.5, -0.5, -1.0, 1.0]
    assert len(groups.scored) == 12
    assert (groups.metrics["groups/dropped"], groups.metrics["groups/live"]) == (3, 3)
    assert groups.metrics["frac_reward_zero_std"] == 0.5
    assert groups.metrics["reward"] == pytest.approx(7 / 12)


def test_ids_that_come_again_in_a_later_attempt_are_refused():
    class Repeats(Env):
        def prompts(self, step, *, num_prompts, attempt=0):
            return super().prompts(step, num_prompts=num_prompts)

    with pytest.raises(EnvironmentFault, match=r"Repeats.prompts: prompt 0 \(id '0'\): another prompt of this step"):
        collect(Repeats({0: [1.0, 1.0], 1: [0.0, 1.0], 2: [0.5, 0.5]}), Sampler(), config(), 4, lambda: False)


def test_refilling_ends_after_its_rounds_even_with_nothing_live():
    groups, sampler = run({i: [1.0, 1.0] for i in range(20)}, refill=1)
    assert len(sampler.asked) == 2 and groups.completions == [] and groups.advantages == []
    assert groups.metrics["groups/dropped"] == 6 and groups.metrics["frac_reward_zero_std"] == 1.0
    _, sampler = run({i: [1.0, 1.0] for i in range(20)}, refill=0)
    assert len(sampler.asked) == 1


def test_a_completion_without_a_reward_leaves_its_group_and_a_group_of_one_is_dropped():
    groups, _ = run({0: [None, 1.0], 1: [0.0, 1.0], 2: [None, None]}, refill=0)
    assert live_ids(groups) == [(1, 0), (1, 1)]
    assert groups.metrics["reward/errors"] == 3 and groups.metrics["groups/dropped"] == 2
    assert groups.metrics["reward"] == pytest.approx(2 / 3)


def test_advantages_are_divided_by_the_spread_when_asked():
    groups, _ = run({0: [1.0, 0.0], 1: [0.0, 10.0], 2: [0.0, 0.5]}, scale="group")
    assert groups.advantages == pytest.approx([0.5**0.5, -(0.5**0.5)] + [-(0.5**0.5), 0.5**0.5] * 2, rel=1e-4)


def test_greedy_rewards_are_kept_for_the_update_and_sampled_completions_stay_sampled():
    settings = config()
    settings.advantage = AdvantageConfig(Baseline.greedy, Scale.none)
    sampler = Sampler()
    groups = collect(Env({0: [1.0, 0.0], 1: [0.25, 1.0], 2: [0.5, 0.5]}), sampler, settings, 4, lambda: False)
    assert sampler.asked[1][1]["params"].greedy
    assert groups.greedy_rewards == {0: 1.0, 1: 0.25, 2: 0.5}
    assert groups.advantages == [0.0, -1.0, 0.0, 0.75, 0.0, 0.0]
    assert groups.is_recorded is False  # or the trainer's log-probs would stand in for the sampler's


def test_means_of_rewards_are_over_those_that_have_them():
    completions = Sampler().generate([Prompt(0, [1], {}), Prompt(1, [1], {})], num_samples=2)
    scores = [Score(1.0, {"exact": 1.0}, {"carry": 0.5}, True), Score(None, {}, {}, None), Score(0.0, {"exact": 0.0}, {}, False),
              Score(2.0, {"exact": 1.0}, {"carry": 1.5}, True)]
    metrics = reward_metrics(list(zip(completions, scores)))
    assert metrics["reward"] == 1.0 and metrics["reward_std"] == pytest.approx((2 / 3) ** 0.5)
    assert metrics["rewards/exact/mean"] == pytest.approx(2 / 3) and metrics["env/carry"] == 1.0
    assert metrics["rewards/exact/std"] == pytest.approx((1 / 3) ** 0.5)  # of a sample: 2 degrees of freedom
    assert math.isnan(reward_metrics([(completions[0], scores[0])])["rewards/exact/std"])


def test_every_metric_of_the_groups_stands_in_the_list_of_metrics():
    groups, _ = run({0: [1.0, 0.0], 1: [0.0, 1.0], 2: [0.25, 0.75]}, overlong=2)
    text = (Path(grpo.groups.__file__).parent / "METRICS.md").read_text(encoding="utf-8")
    names = [name.replace("exact", "PART") for name in groups.metrics]
    assert "rewards/PART/std" in names and "groups/unscored" in names
    brief = {name: name.partition("/")[2].removeprefix("mean_length") for name in names}
    assert [name for name in names if f"`{name}`" not in text and f"`{brief[name]}`" not in text] == []


def test_without_any_reward_the_mean_reward_is_not_a_number():
    completions = Sampler().generate([Prompt(0, [1], {})], num_samples=2)
    metrics = reward_metrics([(completion, Score(None, {}, {}, None)) for completion in completions])
    assert math.isnan(metrics["reward"]) and math.isnan(metrics["reward_std"])


def test_groups_that_nobody_scored_are_dropped_and_counted_and_a_step_may_have_no_others():
    groups, _ = run({0: [None, None], 1: [None, None], 2: [None, 1.0]}, refill=0)
    assert groups.completions == [] and groups.advantages == []
    assert (groups.metrics["groups/unscored"], groups.metrics["groups/dropped"], groups.metrics["groups/live"]) == (2, 3, 0)
    assert groups.metrics["reward"] == 1.0


def test_masked_completions_that_were_cut_off_keep_their_say_in_their_group_but_are_not_trained_on():
    rewards = {0: [1.0, 0.0], 1: [0.0, 3.0], 2: [0.5, 0.5]}
    groups, _ = run(rewards, refill=0)
    masked, _ = run(rewards, refill=0, mask_truncated=True)
    assert [completion.finish_reason for completion in groups.completions] == ["length", "stop"] * 2
    assert live_ids(masked) == [(0, 1), (1, 1)] and masked.advantages == [-0.5, 1.5]
    assert {name: value for name, value in masked.metrics.items() if not name.startswith("time/")} == {
        name: value for name, value in groups.metrics.items() if not name.startswith("time/")}


def test_lengths_are_those_of_completions():
    completions = Sampler().generate([Prompt(0, [1, 1, 1], {})], num_samples=3)  # 1, 2 and 3 tokens, the first cut off
    assert length_metrics(completions) == {"completions/mean_length": 2.0, "completions/min_length": 1,
                                           "completions/max_length": 3, "completions/clipped_ratio": pytest.approx(1 / 3)}


def scoring(result):
    return SimpleNamespace(score=lambda completions: result)


@pytest.mark.parametrize("result, message", [
    ([], "returned 0 scores for 2 completions"),
    (None, "score returned NoneType"),
    ([1.0, 0.0], r"score returned \['float'\]"),
    ([Score(1.0, {}, {}, None), Score(float("nan"), {}, {}, None)], "the reward nan to sample 1 of prompt 0"),
    ([Score("1", {}, {}, None)] * 2, "the reward '1' to sample 0 of prompt 0"),
])
def test_scores_that_cannot_be_trained_on_are_faults_of_the_environment(result, message):
    completions = Sampler().generate([Prompt(0, [1], {})], num_samples=2)
    with pytest.raises(EnvironmentFault, match=message):
        checked_scores(scoring(result), completions)


def raising(error):
    def prompts(*_, **__):
        raise error

    return SimpleNamespace(prompts=prompts, eval_prompts=prompts)


def test_an_environment_that_raises_is_named_with_the_place():
    with pytest.raises(EnvironmentFault, match=r"SimpleNamespace.prompts raised KeyError: 'x' \(.*test_groups.py:\d+\)"):
        collect(raising(KeyError("x")), Sampler(), config(), 0, lambda: False)


@pytest.mark.parametrize("error", [RewardError("fn, row 3"), DataError("data.jsonl:7")])
def test_errors_that_name_their_place_pass_unchanged(error):
    with pytest.raises(type(error), match=str(error)):
        held_out_prompts(raising(error), max_prompts=3, max_len=9, vocab_size=3)


@pytest.mark.parametrize("prompts, message", [
    ([], "returned no prompts"), (["text"], r"a list that holds \['str'\]"), (None, "NoneType")])
def test_prompts_of_another_kind_are_faults(prompts, message):
    with pytest.raises(EnvironmentFault, match=message):
        held_out_prompts(SimpleNamespace(eval_prompts=lambda: prompts), max_prompts=3, max_len=9, vocab_size=3)


def test_held_out_prompts_are_the_first():
    prompts = [Prompt(i, [1], {}) for i in range(5)]
    assert held_out_prompts(SimpleNamespace(eval_prompts=lambda: prompts), max_prompts=2, max_len=9, vocab_size=3) == prompts[:2]


# --- lengths of prompts -----------------------------------------------------------------------------------------------


class Lengths(Env):
    """Prompts of the given lengths in tokens."""

    def __init__(self, lengths, row):
        self.lengths, self.row = lengths, row

    def prompts(self, step, *, num_prompts, attempt=0):
        return [Prompt(i, [1] * length, self.row(i)) for i, length in enumerate(self.lengths)]

    def eval_prompts(self):
        return self.prompts(0, num_prompts=len(self.lengths))


class Data(Lengths):
    def train_prompts(self):
        return iter(self.prompts(0, num_prompts=len(self.lengths)))


def of_a_file(i):
    return {"_source": f"data.jsonl:{i + 1}"}


def test_known_prompts_that_are_too_long_are_refused_by_file_and_line():
    for max_tokens in (5, 100):  # a sequence that a micro-batch does not hold is one of its own
        check_environment(Data([1, 9, 2], of_a_file), config(max_tokens=max_tokens), max_len=10, vocab_size=3)
    with pytest.raises(DataError, match=r"^data.jsonl:2: a prompt has 10 tokens: the model's sequences end at 10 "
                                        r"\(max_position_embeddings\).*2 such of 4 prompts, the longest 50.*"
                                        r"env.on_long_prompt=skip env.max_prompt_tokens=9$"):
        check_environment(Data([1, 10, 2, 50], of_a_file), config(), max_len=10, vocab_size=3)


def test_evaluation_prompts_need_only_fit_the_model():
    class Evaluated(Data):
        def eval_prompts(self):
            return [Prompt(0, [1] * 9, of_a_file(6)), Prompt(1, [1] * 9, {}), Prompt(2, [1] * 20, {})]  # two are asked

    check_environment(Evaluated([1], of_a_file), config(max_tokens=8), max_len=10, vocab_size=3)
    with pytest.raises(DataError, match="^data.jsonl:7: a prompt has 9 tokens: the model's sequences end at 9"):
        check_environment(Evaluated([1], of_a_file), config(max_tokens=8), max_len=9, vocab_size=3)


def test_other_prompts_that_are_too_long_are_refused_where_they_enter():
    env = Lengths([3, 8, 3], lambda i: {"n": i})
    check_environment(env, config(), max_len=8, vocab_size=3)  # not known yet
    with pytest.raises(EnvironmentFault, match=r"Lengths.prompts: a prompt has 8 tokens: the model's sequences end at 8.*prompt "
                                               r"1 \(\"{'n': 1}\"\)$"):
        collect(env, Sampler(max_len=8), config(), 0, lambda: False)
    with pytest.raises(EnvironmentFault, match="Lengths.eval_prompts: a prompt has 8 tokens: the model's sequences end at 8"):
        held_out_prompts(env, max_prompts=3, max_len=8, vocab_size=3)
