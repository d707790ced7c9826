"""Pass rates by prompt: what is chosen, what rests, and what a step does with it."""

import json

import pytest
from test_groups import Env, Sampler, config

from grpo.batch import Completion, Prompt, Segment
from grpo.config import CurriculumConfig
from grpo.curriculum import MOST_DRAWS, PromptHistory, key_of
from grpo.environment import Score
from grpo.groups import collect


def prompt(number: int, id: int = 0) -> Prompt:
    return Prompt(id, [number], {})


def played(number: int, *passed: bool | None) -> list:
    verdicts = [Score(None if verdict is None else 0.0, {}, {}, verdict) for verdict in passed]
    return [(Completion(prompt(number), sample, [Segment([number], "prompt")], "stop"), verdict)
            for sample, verdict in enumerate(verdicts)]


def history(**settings) -> PromptHistory:
    return PromptHistory(CurriculumConfig(**settings))


def numbers(prompts) -> list[int]:
    return [item.token_ids[0] for item in prompts]


def test_a_pass_rate_is_the_mean_of_the_last_groups():
    known = history(window=2)
    for passed in ((True, True), (True, False), (False, False, False, True)):
        known.record(played(5, *passed))
    assert known.pass_rate(key_of(prompt(5))) == (0.5 + 0.25) / 2
    assert known.pass_rate(key_of(prompt(6))) is None
    known.record(played(6, None, None))  # nobody judged it
    assert known.pass_rate(key_of(prompt(6))) is None


def test_where_correctness_is_not_judged_a_reward_of_one_passes():
    known = history()
    rewards = (1.0, 0.9)
    known.record([(completion, Score(reward, {}, {}, None)) for (completion, _), reward in zip(played(5, True, True), rewards)])
    assert known.pass_rate(key_of(prompt(5))) == 0.5


def test_prompts_rest_when_nearly_always_solved_over_the_window_or_never():
    known = history(window=2, retire_at=0.75, retire_unsolved=3)
    known.record(played(1, True, True))
    assert not known.is_resting(key_of(prompt(1)))  # one group is no window
    known.record(played(1, True, False))
    assert known.is_resting(key_of(prompt(1)))
    for rests in (False, False, True):
        known.record(played(2, False, False))
        assert known.is_resting(key_of(prompt(2))) == rests
    known.record(played(2, False, True))
    assert not known.is_resting(key_of(prompt(2)))


def test_resting_and_repeated_prompts_are_passed_over_and_more_are_drawn():
    known = history(window=1, retire_at=1.0)
    known.record(played(1, True, True))
    draws = iter([[prompt(1), prompt(2), prompt(2), prompt(3)], [prompt(4), prompt(5)]])
    assert numbers(known.choose(lambda: next(draws), 3, taken={key_of(prompt(3))})) == [2, 4, 5]


def test_candidates_nearest_to_the_target_are_chosen_new_ones_first():
    known = history(window=1, candidates=2.0, target=0.5)
    for number, num_passed in ((1, 4), (2, 1), (3, 2), (4, 0)):
        known.record(played(number, *(sample < num_passed for sample in range(4))))
    drawn = [prompt(number) for number in (1, 2, 3, 4, 9)]
    assert numbers(known.choose(lambda: drawn, 4, taken=set())) == [9, 3, 2, 1]


def test_if_all_prompts_rest_the_least_solved_are_used():
    known, num_draws = history(window=1, retire_at=0.5), [0]
    for number, passed in ((1, (True, True)), (2, (True, False)), (3, (True, True, True, False))):
        known.record(played(number, *passed))

    def draw():
        num_draws[0] += 1
        return [prompt(number) for number in (1, 2, 3)]

    assert numbers(known.choose(draw, 2, taken=set())) == [2, 3]
    assert num_draws == [MOST_DRAWS]


def test_the_history_survives_json_exactly():
    known = history(window=3)
    known.record(played(1, True, False, False))
    known.record(played(2, True, False, True))
    assert json.loads(json.dumps(known.rates)) == known.rates and known.rates[key_of(prompt(1))] == [1 / 3]


class Solved(Env):
    """Prompts of the tokens 0 to 2, in turn; token 0 is always solved, the others by every second sample."""

    def prompts(self, step, *, num_prompts, attempt=0):
        start = attempt * num_prompts
        return [Prompt(start + i, [(start + i) % 3], {}) for i in range(num_prompts)]

    def score(self, completions):
        return [Score(float(solved), {}, {}, solved)
                for c in completions for solved in [c.prompt.token_ids == [0] or bool(c.sample)]]


def test_a_retired_prompt_is_no_longer_sampled():
    known, sampler = history(window=1, retire_at=1.0), Sampler()
    first = collect(Solved({}), sampler, config(prompts=3, refill=0), 0, lambda: False, history=known)
    assert known.rates == {}  # a step that is abandoned before its update leaves no trace
    known.record(first.scored)
    second = collect(Solved({}), sampler, config(prompts=2, refill=0), 1, lambda: False, history=known)
    assert [c.prompt.token_ids for c, _ in first.scored[::2]] == [[0], [1], [2]]
    assert [c.prompt.token_ids for c, _ in second.scored[::2]] == [[1], [2]]
    assert known.metrics() == {"curriculum/resting": 1, "curriculum/prompts": 3,
                               "curriculum/pass_rate": pytest.approx((1 + 0.5 + 0.5) / 3)}


def test_a_round_samples_more_prompts_and_trains_on_the_first_live_groups():
    rewards = {0: [1.0, 1.0], 1: [0.0, 1.0], 2: [0.5, 0.5], 3: [0.0, 1.0], 4: [1.0, 0.0], 5: [1.0, 0.0]}
    sampler = Sampler()
    groups = collect(Env(rewards), sampler, config(prompts=3, refill=2, oversampling=2.0), 4, lambda: False)
    assert [ids for ids, _ in sampler.asked] == [[0, 1, 2, 3, 4, 5]]
    assert [completion.prompt.id for completion in groups.completions[::2]] == [1, 3, 4]
    assert (groups.metrics["groups/live"], groups.metrics["groups/surplus"], groups.metrics["groups/dropped"]) == (3, 1, 2)
    assert len(groups.scored) == 12


def test_refills_are_oversampled_too():
    rewards = dict.fromkeys(range(3), [1.0, 1.0]) | {0: [1.0, 0.0]} | dict.fromkeys(range(3, 6), [0.0, 1.0])
    sampler = Sampler()
    collect(Env(rewards), sampler, config(prompts=2, refill=1, oversampling=1.5), 4, lambda: False)
    assert [ids for ids, _ in sampler.asked] == [[0, 1, 2], [3, 4]]  # 1 is missing: ceil(1.5 x 1) are sampled
