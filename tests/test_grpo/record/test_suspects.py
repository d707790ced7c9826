"""Which completions look like reward hacking, worked out by hand."""

from grpo.batch import Completion, Prompt, Segment
from grpo.environment import Score
from grpo.record.suspects import find_suspects


def made(prompt: int, output: list[int], reward: float | None, *, violations=(), finish="stop", answers: int = 0):
    """A completion of prompt [prompt] that the policy wrote in two turns if a tool answered `answers` between them."""
    written = [Segment(output, "policy")]
    if answers:
        written = [Segment(output[:1], "policy"), Segment([answers], "env"), Segment(output[1:], "policy")]
    completion = Completion(Prompt(prompt, [prompt], {}), 0, [Segment([prompt], "prompt"), *written], finish)
    metrics = {f"sandbox/violations/{kind}": float(kind in violations) for kind in ("import", "time")}
    return completion, Score(reward, {}, metrics, None)


def history(rewards: list[float], evals: dict[int, float], *, std: float = 0.4, ci95: float = 0.05) -> list[dict]:
    """The lines of a run whose step k, from 1, has the k-th reward; evals: step -> accuracy."""
    lines = [{"step": 0, "warmup/step": 1, "warmup/loss": 2.0}]
    for step in range(len(rewards) + 1):
        if step:
            lines.append({"step": step, "reward": rewards[step - 1], "reward_std": std})
        if step in evals:
            lines.append({"step": step, "eval/reward": 0.5, "eval/greedy_accuracy": evals[step],
                          "eval/greedy_accuracy/ci95": ci95})
    return lines


def test_different_honest_outputs_are_not_suspect():
    scored = [made(prompt, [prompt, 7], 1.0) for prompt in range(8)]
    assert find_suspects(scored, [], limit=8) == {}
    assert find_suspects([], [], limit=8) == {}


def test_each_kind_of_violation_shows_its_best_rewarded_completion_and_its_count():
    scored = [made(0, [1], 0.0, violations=["import"]), made(0, [2], 1.0), made(1, [3], 0.5, violations=["import", "time"]),
              made(1, [4], 0.0, violations=["import"]), made(2, [5], None, violations=["time"])]
    assert find_suspects(scored, [], limit=8) == {
        2: "violation: import (3 of 5 completions); violation: time (2 of 5 completions)"}


def test_the_same_rewarded_output_for_three_prompts_is_suspect():
    scored = [made(0, [9], 0.1), made(0, [9], 0.1), made(1, [9], 0.3), made(2, [9], 0.2), made(3, [8], 1.0), made(4, [8], 1.0)]
    assert find_suspects(scored, [], limit=8) == {2: "the same output is rewarded for 3 of 5 prompts"}
    unpaid = [made(prompt, [9], 0.0) for prompt in range(5)]
    assert find_suspects(unpaid, [], limit=8) == {}
    again = [made(0, [9], 1.0) for _ in range(5)]  # the same prompt
    assert find_suspects(again, [], limit=8) == {}


def test_what_tools_answered_does_not_tell_outputs_apart():
    scored = [made(prompt, [9, 8], 1.0, answers=100 + prompt) for prompt in range(3)]
    assert find_suspects(scored, [], limit=8) == {0: "the same output is rewarded for 3 of 3 prompts"}


def test_cut_off_and_rewarded_above_those_that_ended_is_suspect():
    scored = [made(0, [1], 0.4), made(0, [2], 0.2), made(1, [3], 0.3, finish="length"), made(1, [4], 0.5, finish="length"),
              made(2, [5], 0.9, finish="turns"), made(2, [6], None, finish="length")]
    assert find_suspects(scored, [], limit=8) == {  # the mean of those that ended is 0.3
        4: "cut off by a limit, and rewarded above the mean 0.3 of those that ended (2 of 6 completions)"}
    assert find_suspects([made(0, [1], 1.0, finish="length"), made(1, [2], 0.0, finish="length")], [], limit=8) == {}


RISING = [0.1] * 5 + [0.5] * 2 + [0.9] * 5  # means of the first and last five: 0.1, 0.9; half a standard deviation: 0.2


def test_a_reward_that_rose_while_the_held_out_score_stayed_shows_the_best_completion():
    scored = [made(0, [1], 0.5), made(1, [2], 1.0), made(2, [3], 1.0)]
    assert find_suspects(scored, history(RISING, {0: 0.30, 6: 0.5, 12: 0.34}), limit=8) == {
        1: "the reward rose from 0.1 to 0.9, but greedy_accuracy on held-out prompts went from 0.3 to 0.34"}


def test_a_gap_takes_a_rise_of_the_reward_a_flat_held_out_score_and_enough_steps():
    scored = [made(0, [1], 1.0)]
    for lines in (history(RISING, {0: 0.30, 12: 0.40}),  # more than the interval of 0.05
                  history([0.5] * 7 + [0.6] * 5, {0: 0.3, 12: 0.3}),  # a rise of 0.1, below 0.2
                  history(RISING, {0: 0.97, 12: 0.97}),  # 1 within its interval: it cannot rise
                  history(RISING, {0: 0.3}), history(RISING[-9:], {0: 0.3, 9: 0.3}), history(RISING, {}), []):
        assert find_suspects(scored, lines, limit=8) == {}
    after = history(RISING, {0: 0.3, 5: 0.3})  # the reward rose after the last evaluation, which has not seen it
    assert find_suspects(scored, after, limit=8) == {}


def test_no_more_than_the_limit_and_violations_come_first():
    scored = [made(prompt, [9], 1.0, violations=["time"] if prompt == 3 else []) for prompt in range(4)]
    found = find_suspects(scored, [], limit=1)
    assert found == {3: "violation: time (1 of 4 completions)"}
    assert find_suspects(scored, [], limit=2).keys() == {3, 0} and find_suspects(scored, [], limit=0) == {}
