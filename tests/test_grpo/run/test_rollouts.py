"""Rollouts in a checkpoint come back equal."""

import datetime
import json
import math

import pytest
import torch

from grpo.batch import Completion, Episode, Prompt, Segment, ToolCall
from grpo.config import ConfigError
from grpo.environment import Score
from grpo.groups import Groups
from grpo.run.checkpoint import load_run, save_run
from grpo.run.rollouts import Rollout, read, write


def draw(row) -> Rollout:
    prompt = Prompt(3, list(range(12)), row)
    completions = []
    for sample in range(2):
        kept = [torch.arange(i % 3 + 1, dtype=torch.int32) for i in range(9)]
        drawn = Segment([7 + i for i in range(9)], "policy", [-0.1 * i - 1e-17 for i in range(9)], kept,
                        torch.arange(36, dtype=torch.int16).reshape(9, 2, 2) + sample)
        answered = Segment([1, 2], "env")
        segments = [Segment(prompt.token_ids, "prompt", routing=torch.zeros(12, 2, 2, dtype=torch.uint8)), drawn, answered,
                    Segment([5], "policy", [-2.0], [torch.tensor([5], dtype=torch.int32)])]
        episode = Episode([ToolCall("f", '{"x": 1}', "2", False)], seconds=0.25, reward=object())
        completions.append(Completion(prompt, sample, segments, "stop", [None, 0.1][sample], {"part": 0.5}, episode))
    scores = [Score(completion.reward, {"part": 0.5}, {}, None, {"note": ["x", {"y": 1}]}) for completion in completions]
    return Rollout(4, 3, Groups(completions[:1], [0.7], list(zip(completions, scores)), {"reward": math.nan, "n": 2}))


def test_what_a_checkpoint_gives_back_is_what_it_was_given(tmp_path):
    rows = [{"question": "1+1", "ids": list(range(20)), "nested": {"a": (1, None), 2: True}}, {}]
    rollouts = [draw(row) for row in rows]
    document, tensors = write(rollouts)
    save_run(tmp_path, step=4, tensors=tensors | {"optim.x": torch.zeros(1)}, state={"rollouts": document}, keep=2)
    found = load_run(tmp_path)
    again = read(found.state["rollouts"], found.tensors)
    assert write(again)[0] == json.loads(json.dumps(document)) and write(again)[1].keys() == tensors.keys()
    assert all(torch.equal(write(again)[1][name], tensor) and write(again)[1][name].dtype == tensor.dtype
               for name, tensor in tensors.items())
    for ours, theirs in zip(again, rollouts, strict=True):
        assert (ours.step, ours.version, ours.groups.advantages) == (4, 3, [0.7])
        assert math.isnan(ours.groups.metrics["reward"]) and ours.groups.metrics["n"] == 2
        assert ours.groups.completions[0] is ours.groups.scored[0][0]  # as when it was drawn
        for (completion, score), (expected, verdict) in zip(ours.groups.scored, theirs.groups.scored, strict=True):
            assert score == verdict and completion.prompt == expected.prompt and completion.reward == expected.reward
            assert completion.episode.calls == expected.episode.calls and completion.episode.reward is None
            assert completion.completion_ids == expected.completion_ids and completion.is_policy == expected.is_policy
            for segment, other in zip(completion.segments, expected.segments, strict=True):
                assert segment.log_probs == other.log_probs
                assert (segment.routing is None) == (other.routing is None)
                assert segment.routing is None or (torch.equal(segment.routing, other.routing)
                                                   and segment.routing.dtype == other.routing.dtype)
                assert segment.kept_ids is None or all(map(torch.equal, segment.kept_ids, other.kept_ids))
        first, second = (completion for completion, _ in ours.groups.scored)
        assert first.prompt is second.prompt


def test_a_value_that_no_checkpoint_can_hold_is_named():
    with pytest.raises(ConfigError, match="the row of prompt 3, under 'when' has a value of type date, which a checkpoint"):
        write([draw({"when": datetime.date(2026, 1, 1)})])
