"""Rows in flight that go on under a newer policy (rollout.in_flight=switch).

With rollout.max_staleness = S, a step's completions are begun S steps ahead, and each policy until then draws the next
c = ceil(max_new_tokens / S) tokens of those that have not ended: the first c tokens are S steps old when they are trained on, the
last ones a single step, or more where fewer than S such parts are enough. At a run's start there is no older policy, and the
first one draws all that is due by then. So numbers of steps alone say which policy draws a token. All that is in flight, the
completions of S steps, is decoded together, which takes as long as c tokens.

A row that goes on is prefilled by the newer policy: each log-prob is that of one policy, over the whole context.
"""
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from grpo.batch import Completion, Prompt, Segment
from grpo.config import RolloutConfig
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.scheduler import RolloutRow
from grpo.rollout.session import Sampler

UNFINISHED = "in flight"  # finish_reason of a completion that goes on


@dataclass
class BegunRollout:
    """Completions of a step's prompts, by prompt, then sample. Some may have ended."""

    step: int  # that trains on them: the number of steps finished before
    version: int  # of the oldest policy that drew a token of them: the number of steps finished then
    completions: list[Completion]


def begin(step: int, version: int, prompts: list[Prompt], *, num_samples: int) -> BegunRollout:
    """A rollout without any token yet."""
    return BegunRollout(step, version, [Completion(prompt, sample, [Segment(list(prompt.token_ids), "prompt")], UNFINISHED)
                                        for prompt in prompts for sample in range(num_samples)])


def tokens_due(settings: RolloutConfig, num_ahead: int) -> int:
    """Most tokens of a completion that the present policy and older ones draw, for a step `num_ahead` steps after the next."""
    num_parts = settings.max_staleness
    part = -(-settings.max_new_tokens // num_parts)
    return min((num_parts + 1 - num_ahead) * part, settings.max_new_tokens)


def go_on(sampler: Sampler, begun: list[BegunRollout], limits: list[int], params: SamplingParams, *, version: int,
          should_stop: Callable[[], bool], progress: Callable[[int, int], None] | None) -> list[BegunRollout]:
    """The rollouts after the sampler's policy, `version`, has drawn further tokens: every completion has ended or has as many as
    its rollout's limit. Raises as a session does; what it was given stays as it was."""
    rows, groups = list[RolloutRow](), dict[tuple[int, int], int]()
    for rollout, limit in zip(begun, limits, strict=True):
        for completion in rollout.completions:
            most = min(limit, sampler.max_len - len(completion.prompt.token_ids))
            if completion.finish_reason == UNFINISHED and completion.num_policy_tokens < most:
                group = groups.setdefault((rollout.step, completion.prompt.id), len(groups))
                rows.append(RolloutRow(len(rows), group, completion.prompt, completion.sample, rollout.step, most,
                                       completion.num_policy_tokens, segments=_copied(completion.segments[1:])))
    if not rows:
        return begun
    with sampler.open(params, step=version, should_stop=should_stop, progress=progress) as session:
        session.queue(rows)
        drawn = {(row.step, row.prompt.id, row.sample): completion for row, completion in zip(rows, session.drain(), strict=True)}
    return [BegunRollout(rollout.step, rollout.version, [
        _merged(completion, drawn.get((rollout.step, completion.prompt.id, completion.sample)), version=version,
                most=min(params.max_new_tokens, sampler.max_len - len(completion.prompt.token_ids)))
        for completion in rollout.completions]) for rollout in begun]


def stamp(completions: list[Completion], *, version: int) -> None:
    """Notes which policy drew the tokens that say nothing of it: those of completions that it drew whole."""
    for segment in chain.from_iterable(completion.segments for completion in completions):
        if segment.source == "policy" and segment.versions is None:
            segment.versions = [version] * len(segment.token_ids)


def _copied(segments: list[Segment]) -> list[Segment]:
    """Segments that a session may extend."""
    return [Segment(list(segment.token_ids), segment.source, list(segment.log_probs),
                    None if segment.kept_ids is None else list(segment.kept_ids)) for segment in segments]


def _merged(before: Completion, drawn: Completion | None, *, version: int, most: int) -> Completion:
    """A completion as it was drawn on; `most`: tokens with which it ends."""
    if drawn is None:
        return before
    segment, old = drawn.segments[1], before.segments[1:]
    versions = old[0].versions if old else []
    segment.versions = versions + [version] * (len(segment.token_ids) - len(versions))
    if drawn.finish_reason == "length" and len(segment.token_ids) < most:
        drawn.finish_reason = UNFINISHED
    return drawn
