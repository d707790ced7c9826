"""Completions that look like reward hacking: what a reader should see first. A suspicion is no proof, and changes no reward.

Looked for are, among a step's completions: violations of the sandbox's rules; the same output, rewarded, for different prompts;
completions that a limit cut off and that earn more than those that came to an end; and, over the run, a training reward that rose
while the held-out score did not.
"""

import itertools
import math
import statistics
from collections.abc import Iterator

from grpo.batch import Completion
from grpo.environment import Score
from grpo.record.summary import headline, series

VIOLATIONS = "sandbox/violations/"
FEWEST_PROMPTS = 3  # with the same output
NUM_STEPS = 5  # at each end of the run, whose rewards are compared
LEAST_RISE = 0.5  # of the reward, in standard deviations of the rewards of the first steps

Scored = list[tuple[Completion, Score]]


def find_suspects(scored: Scored, history: list[dict[str, float]], *, limit: int) -> dict[int, str]:
    """Index -> why the completion is suspect: for each suspicion the one of highest reward, at most `limit` of them. history: the
    lines of metrics.jsonl up to this step."""
    reasons: dict[int, list[str]] = {}
    for indices, reason in itertools.chain(_violations(scored), _same_outputs(scored), _cut_off(scored), _gap(scored, history)):
        best = max(indices, key=lambda index: (_reward(scored[index]), -index))
        reasons.setdefault(best, []).append(reason)
    return {index: "; ".join(found) for index, found in itertools.islice(reasons.items(), limit)}


def _reward(pair: tuple[Completion, Score]) -> float:
    return -math.inf if pair[1].reward is None else pair[1].reward


def _violations(scored: Scored) -> Iterator[tuple[list[int], str]]:
    found: dict[str, list[int]] = {}
    for index, (_, verdict) in enumerate(scored):
        for name, value in verdict.metrics.items():
            if name.startswith(VIOLATIONS) and value > 0:
                found.setdefault(name.removeprefix(VIOLATIONS), []).append(index)
    for kind, indices in found.items():
        yield indices, f"violation: {kind} ({len(indices)} of {len(scored)} completions)"


def _same_outputs(scored: Scored) -> Iterator[tuple[list[int], str]]:
    """What the policy itself wrote counts, without the answers of tools."""
    outputs: dict[tuple[int, ...], list[int]] = {}
    for index, (completion, verdict) in enumerate(scored):
        if verdict.reward is not None and verdict.reward > 0:
            written = (segment.token_ids for segment in completion.segments if segment.source == "policy")
            outputs.setdefault(tuple(itertools.chain.from_iterable(written)), []).append(index)
    num_prompts = len({tuple(completion.prompt.token_ids) for completion, _ in scored})
    counts = [(len({tuple(scored[index][0].prompt.token_ids) for index in indices}), indices) for indices in outputs.values()]
    for count, indices in sorted(counts, key=lambda entry: -entry[0]):
        if count >= FEWEST_PROMPTS:
            yield indices, f"the same output is rewarded for {count} of {num_prompts} prompts"


def _cut_off(scored: Scored) -> Iterator[tuple[list[int], str]]:
    ended = [verdict.reward for completion, verdict in scored if verdict.reward is not None and not completion.is_truncated]
    if not ended:
        return
    mean = statistics.fmean(ended)
    indices = [index for index, (completion, _) in enumerate(scored) if completion.is_truncated and _reward(scored[index]) > mean]
    if indices:
        yield indices, (f"cut off by a limit, and rewarded above the mean {mean:.3g} of those that ended ({len(indices)} of "
                        f"{len(scored)} completions)")


def _gap(scored: Scored, history: list[dict[str, float]]) -> Iterator[tuple[list[int], str]]:
    """A share that is 1 within its interval cannot rise, and is no sign of anything."""
    names = headline(dict.fromkeys(name for line in history for name in line if name.startswith("eval/")))
    if not names:
        return
    steps, scores = series(history, names[0])
    widths = [width for width in series(history, f"{names[0]}/ci95")[1] if math.isfinite(width)]
    width = max(widths, default=0.0)
    lines = [line for line in history if "reward" in line and line["step"] <= steps[-1] and math.isfinite(line["reward"])]
    if len(scores) < 2 or len(lines) < 2 * NUM_STEPS:
        return
    early, late = (statistics.fmean(line["reward"] for line in part) for part in (lines[:NUM_STEPS], lines[-NUM_STEPS:]))
    spread = statistics.fmean(line.get("reward_std", 0.0) for line in lines[:NUM_STEPS])
    is_flat = scores[-1] - scores[0] <= width and not scores[-1] <= 1 <= scores[-1] + width
    if is_flat and late - early > LEAST_RISE * spread:
        yield list(range(len(scored))), (f"the reward rose from {early:.3g} to {late:.3g}, but {names[0].removeprefix('eval/')} "
                                         f"on held-out prompts went from {scores[0]:.3g} to {scores[-1]:.3g}")
