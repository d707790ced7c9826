"""The rollout of several ranks: each samples and scores the completions of some prompts, and then all ranks have all of them.

Every draw is keyed by (seed, step, prompt id, sample), so who samples a prompt changes nothing. On a CPU, whose products round by
the number of rows, a rank samples one prompt after the other: the rows beside it would otherwise depend on the number of ranks.
"""
import hashlib
from collections.abc import Callable
from dataclasses import replace

from grpo.batch import Completion, Prompt
from grpo.distributed.ranks import ROLLOUT, Ranks
from grpo.environment import Environment, EnvironmentFault, Score, checked_scores
from grpo.rollout.session import Sampler


def own_completions(ranks: Ranks | None, sampler: Sampler, generate: Callable[[list[Prompt]], list[Completion]],
                    prompts: list[Prompt]) -> list[Completion]:
    """The completions of the prompts that this rank samples, by prompt, then sample. generate: samples those of some prompts."""
    if ranks is None:
        return generate(prompts)
    own = prompts[ranks.part::ranks.num_parts]
    parts = [own] if sampler.model.device.type == "cuda" else [[prompt] for prompt in own]
    return [completion for part in parts if part for completion in generate(part)]


def all_scored(ranks: Ranks | None, env: Environment, prompts: list[Prompt],
               completions: list[Completion]) -> list[tuple[Completion, Score]]:
    """Scores this rank's completions. Returns those of all ranks with their scores, by prompt, then sample. Raises
    EnvironmentFault if the ranks do not have the same prompts."""
    if ranks is None:
        return list(zip(completions, checked_scores(env, completions))) if completions else []
    # ranks that share experts have the same completions: each scores some prompts'
    own = {prompt.id for place, prompt in enumerate(prompts) if place // ranks.num_parts % ranks.num_sharers == ranks.sharer}
    completions = [completion for completion in completions if completion.prompt.id in own]
    scores = checked_scores(env, completions) if completions else []
    # rows stay: every rank has the prompts, and what is in a row may be anything
    sent = [(replace(completion, prompt=None, episode=_sendable(completion)), completion.prompt.id, score)
            for completion, score in zip(completions, scores)]
    found = ranks.exchange("the scores", (digest_prompts(prompts), sent), channel=ROLLOUT)
    if other := rank_with_others([digest for digest, _ in found]):
        raise EnvironmentFault(f"environment {type(env).__name__}: rank {other} got other prompts than rank 0; prompts "
                               "must depend on the arguments and the seed alone")
    by_id = {prompt.id: prompt for prompt in prompts}
    pairs = [(replace(completion, prompt=by_id[id]), score) for _, items in found for completion, id, score in items]
    place = {prompt.id: place for place, prompt in enumerate(prompts)}
    return sorted(pairs, key=lambda pair: (place[pair[0].prompt.id], pair[0].sample))


def _sendable(completion: Completion):
    """A completion's episode without what its code returned: that has been scored, and may be anything."""
    return None if completion.episode is None else replace(completion.episode, reward=None)


def rank_with_others(digests: list[str]) -> int:
    """The first rank whose digest is not that of rank 0; 0 if there is none."""
    return next((rank for rank, digest in enumerate(digests) if digest != digests[0]), 0)


def digest_prompts(prompts: list[Prompt]) -> str:
    """Of their ids and tokens."""
    return hashlib.sha256(repr([(prompt.id, prompt.token_ids) for prompt in prompts]).encode()).hexdigest()
