"""Scored groups of completions: what a step trains on.

Each prompt gets a group of completions, which are scored. A group whose rewards are all equal has no gradient: it is dropped,
counted, and replaced by another prompt, for at most `rollout.refill_rounds` rounds. With `rollout.oversampling` a round samples
more prompts than it needs; of the groups that are live the first ones are trained on, in the order of their prompts, so neither
rewards nor lengths choose among them.
"""
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from grpo.advantages import OF_THE_GROUP, component_advantages, group_advantages, whitened, zero_variance_groups
from grpo.batch import Completion, Prompt
from grpo.config import TrainConfig
from grpo.configuration.algorithm import AdvantageConfig, Baseline, Whiten
from grpo.curriculum import PromptHistory, key_of
from grpo.distributed.ranks import Ranks
from grpo.distributed.rollout import all_scored, own_completions
from grpo.environment import (
    Environment,
    EnvironmentFault,
    Score,
    calling,
    check_lengths,
    checked_prompts,
    description_of,
)
from grpo.overlong import soft_overlong_punishment
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from grpo.rollout.turns import Turns, generator
from models.chat.tokenizer import Tokenizer

MOST_SHOWN = 1000  # characters of a call's arguments or result in the log


@dataclass
class Groups:
    completions: list[Completion]  # to train on: those of groups with different rewards
    advantages: list[float]
    scored: list[tuple[Completion, Score]]  # everything sampled this step, dropped groups included
    metrics: dict[str, float] = field(default_factory=dict)
    is_recorded: bool = False  # they come from data (grpo/recorded.py): no sampler has log-probs of them
    greedy_rewards: dict[int, float] = field(default_factory=dict)  # by prompt id, with advantage.baseline=greedy


def collect(env: Environment, sampler: Sampler, config: TrainConfig, step: int, should_stop: Callable[[], bool],
            progress: Callable[[int, int], None] | None = None, turns: Turns | None = None,
            history: PromptHistory | None = None, ranks: Ranks | None = None,
            begun: list[Completion] | None = None) -> Groups:
    """Samples and scores the groups of one step. `progress` is called with the number of finished completions of a round, and of
    all; `turns` lets the model call tools; `history` chooses the prompts; `ranks` share them; `begun`: the first round's
    completions, if they are drawn. Raises EnvironmentFault, and grpo.rollout.session.Interrupted if should_stop returns true."""
    rollout = config.rollout
    params = replace(SamplingParams.of(rollout), records_routing=rollout.replay_routing)
    generate = partial(generator(sampler, turns), params=params, step=step, num_samples=rollout.group_size,
                       should_stop=should_stop, progress=progress)
    scored: list[tuple[Completion, Score]] = []
    live: list[Completion] = []
    seconds = {"time/rollout": 0.0, "time/reward": 0.0}
    prompts_of = prompt_source(env, config, step, vocab_size=sampler.model.config.vocab_size, history=history)
    for _ in range(rollout.refill_rounds + 1):
        prompts = prompts_of(math.ceil((rollout.prompts_per_step - _num_groups(live)) * rollout.oversampling))
        check_lengths(env, "prompts", prompts, max_len=sampler.max_len)
        started = time.perf_counter()
        if begun is not None and not scored:
            check_begun(env, prompts, begun)
            completions = begun
        else:
            completions = own_completions(ranks, sampler, generate, prompts)
        sampled = time.perf_counter()
        scored += (found := all_scored(ranks, env, prompts, completions))
        punish_overlong([completion for completion, _ in found], config)
        seconds["time/rollout"] += sampled - started
        seconds["time/reward"] += time.perf_counter() - sampled
        rewarded = [completion for completion, _ in scored if completion.reward is not None]
        dead = dead_groups(rewarded, config)
        live = [completion for completion in rewarded if completion.prompt.id not in dead]
        if _num_groups(live) >= rollout.prompts_per_step:
            break
    completions = [completion for completion, _ in scored]
    num_groups, num_live = _num_groups(completions), _num_groups(live)
    live = _first_groups(live, rollout.prompts_per_step)
    greedy_rewards: dict[int, float] = {}
    if config.advantage.baseline == Baseline.greedy and live:
        prompts = list({completion.prompt.id: completion.prompt for completion in live}.values())
        draw = partial(generate, params=replace(params, greedy=True, records_routing=False), num_samples=1)
        greedy = [completion for completion, _ in all_scored(ranks, env, prompts, own_completions(ranks, sampler, draw, prompts))]
        punish_overlong(greedy, config)
        greedy_rewards = {completion.prompt.id: completion.reward for completion in greedy if completion.reward is not None}
        live = [completion for completion in live if completion.prompt.id in greedy_rewards]
    advantages = advantages_of(live, [completion.reward for completion in live], config.advantage, greedy_rewards)
    metrics = {**reward_metrics(scored), **length_metrics(completions), **outcome_metrics(scored), **turn_metrics(completions),
               **advantage_metrics(advantages),
               "frac_reward_zero_std": (num_groups - num_live) / num_groups, "groups/dropped": num_groups - num_live,
               "groups/live": _num_groups(live), "groups/surplus": num_live - _num_groups(live),
               "groups/unscored": num_groups - _num_groups(rewarded), "reward/errors": len(scored) - len(rewarded), **seconds}
    if rollout.overlong_buffer is not None:
        metrics["reward/overlong"] = statistics.fmean(completion.reward - verdict.reward for completion, verdict in scored
                                                      if completion.reward is not None) if rewarded else math.nan
    if config.optim.mask_truncated:  # truncated completions count in their group's mean and spread, but are not trained on
        kept = [row for row, completion in enumerate(live) if not completion.is_truncated]
        live, advantages = [live[row] for row in kept], [advantages[row] for row in kept]
    return Groups(live, advantages, scored, metrics, greedy_rewards=greedy_rewards)


def first_prompts(env: Environment, config: TrainConfig, step: int, *, max_len: int, vocab_size: int) -> list[Prompt]:
    """The prompts of a step's first round, as `collect` draws them."""
    prompts = prompt_source(env, config, step, vocab_size=vocab_size, history=None)(
        math.ceil(config.rollout.prompts_per_step * config.rollout.oversampling))
    check_lengths(env, "prompts", prompts, max_len=max_len)
    return prompts


def check_begun(env: Environment, prompts: list[Prompt], begun: list[Completion]) -> None:
    """Raises EnvironmentFault unless the completions are those of the prompts."""
    drawn = {completion.prompt.id: completion.prompt.token_ids for completion in begun}
    if drawn != {prompt.id: prompt.token_ids for prompt in prompts}:
        raise EnvironmentFault(f"environment {type(env).__name__}: asked again for a step's prompts, it gave others; they must "
                               "depend on the arguments and the seed alone")


def dead_groups(completions: list[Completion], config: TrainConfig) -> set[int]:
    """The ids of the groups without a gradient: their rewards are equal (of components: each part is), and nothing but the
    group's own rewards makes its advantages. A group of one is dropped, too."""
    ids, components = [completion.prompt.id for completion in completions], config.advantage.components
    columns = [[completion.reward for completion in completions]]
    if components is not None:
        names = components or dict.fromkeys(name for completion in completions for name in completion.reward_parts)
        columns = [[completion.reward_parts.get(name, 0.0) for completion in completions] for name in names]
    dead = set.intersection(*(set(zero_variance_groups(column, ids)) for column in columns)) if columns else set()
    if config.advantage.baseline not in OF_THE_GROUP or config.kl.is_in_reward:
        return {group_id for group_id in dead if ids.count(group_id) < 2}
    return dead


def advantages_of(completions: list[Completion], rewards: list[float], settings: AdvantageConfig,
                  greedy_rewards: dict[int, float]) -> list[float]:
    """The advantage of each completion of whole groups, whose rewards are given in the same order."""
    if not completions:
        return []
    ids = [completion.prompt.id for completion in completions]
    of_rewards = partial(group_advantages, group_ids=ids, baseline=settings.baseline, scale=settings.scale, k=settings.k,
                         greedy_rewards=greedy_rewards, lengths=[completion.num_policy_tokens for completion in completions])
    if settings.components is not None:
        parts = [completion.reward_parts for completion in completions]
        advantages = component_advantages(parts, of_rewards, weights=settings.components)
    else:
        advantages = of_rewards(rewards)
    if settings.whiten == Whiten.sequences:
        advantages = whitened(torch.tensor(advantages, dtype=torch.float64), torch.ones(len(ids), dtype=torch.bool)).tolist()
    return advantages


def prompt_source(env: Environment, config: TrainConfig, step: int, *, vocab_size: int,
                  history: PromptHistory | None) -> Callable[[int], list[Prompt]]:
    """A function that returns so many prompts of the step, checked, with ids that no earlier call returned; the environment may
    give fewer."""
    rollout, attempts, taken, sampled = config.rollout, itertools.count(), set[int](), set[str]()
    share = rollout.oversampling * (1.0 if history is None else history.settings.candidates)
    num_drawn = math.ceil(rollout.prompts_per_step * share)

    def draw() -> list[Prompt]:
        with calling(env, "prompts"):
            prompts = env.prompts(step, num_prompts=num_drawn, attempt=next(attempts))
        prompts = checked_prompts(env, "prompts", prompts, vocab_size=vocab_size, taken=taken)
        if history is not None:
            taken.update(prompt.id for prompt in prompts)
        return prompts

    def prompts_of(num: int) -> list[Prompt]:
        prompts = draw()[:num] if history is None else history.choose(draw, num, taken=sampled)
        taken.update(prompt.id for prompt in prompts)
        sampled.update(key_of(prompt) for prompt in prompts)
        return prompts

    return prompts_of


def punish_overlong(completions: list[Completion], config: TrainConfig) -> None:
    """Adds DAPO's soft punishment to the rewards that groups are compared by; those of the metrics stay the environment's."""
    rollout = config.rollout
    if rollout.overlong_buffer is None:
        return
    for completion in completions:
        if completion.reward is not None:
            completion.reward += rollout.overlong_penalty * soft_overlong_punishment(
                len(completion.completion_ids), max_len=rollout.max_new_tokens, buffer=rollout.overlong_buffer)


def _first_groups(completions: list[Completion], num: int) -> list[Completion]:
    """The completions of the first `num` groups."""
    kept = set(list(dict.fromkeys(completion.prompt.id for completion in completions))[:num])
    return [completion for completion in completions if completion.prompt.id in kept]


def _num_groups(completions: list[Completion]) -> int:
    return len({completion.prompt.id for completion in completions})


def reward_metrics(scored: list[tuple[Completion, Score]]) -> dict[str, float]:
    """Means of rewards, their parts and the environment's metrics, over the completions that have them; NaN if none has. A part's
    standard deviation divides by n - 1, as TRL's metric of the same name does."""
    rewards = [verdict.reward for _, verdict in scored if verdict.reward is not None]
    metrics = {"reward": statistics.fmean(rewards) if rewards else math.nan,
               "reward_std": statistics.pstdev(rewards) if rewards else math.nan}
    values: dict[str, list[float]] = {}
    for _, verdict in scored:
        for name, value in verdict.parts.items():
            values.setdefault(f"rewards/{name}/mean", []).append(value)
        for name, value in verdict.metrics.items():
            values.setdefault(name if name.startswith("sandbox/") else f"env/{name}", []).append(value)
    spreads = {name.replace("/mean", "/std"): statistics.stdev(numbers) if len(numbers) > 1 else math.nan
               for name, numbers in values.items() if name.endswith("/mean")}
    return metrics | {name: statistics.fmean(numbers) for name, numbers in values.items()} | spreads


def length_metrics(completions: list[Completion]) -> dict[str, float]:
    """Lengths of completions in tokens, and the share cut off by the length limit."""
    lengths = [len(completion.completion_ids) for completion in completions]
    clipped = [completion.is_truncated for completion in completions]
    return {"completions/mean_length": statistics.fmean(lengths), "completions/min_length": min(lengths),
            "completions/max_length": max(lengths), "completions/clipped_ratio": statistics.fmean(clipped)}


def outcome_metrics(scored: list[tuple[Completion, Score]]) -> dict[str, float]:
    """Mean lengths in tokens of the completions that ended by themselves, of the correct and of the wrong ones; those that there
    are."""
    chosen = {"terminated": [completion for completion, _ in scored if not completion.is_truncated],
              "correct": [completion for completion, verdict in scored if verdict.is_correct],
              "wrong": [completion for completion, verdict in scored if verdict.is_correct is False]}
    return {f"completions/mean_length_{name}": statistics.fmean(len(completion.completion_ids) for completion in completions)
            for name, completions in chosen.items() if completions}


def advantage_metrics(advantages: list[float]) -> dict[str, float]:
    """Of the completions of live groups, before truncated ones are masked; {} if there are none."""
    if not advantages:
        return {}
    return {"advantages/mean": statistics.fmean(advantages), "advantages/std": statistics.pstdev(advantages),
            "advantages/min": min(advantages), "advantages/max": max(advantages)}


def turn_metrics(completions: list[Completion]) -> dict[str, float]:
    """Turns, calls and tokens of completions with tools; {} without. Means are over completions."""
    episodes = [completion.episode for completion in completions if completion.episode is not None]
    if not episodes:
        return {}
    num_turns = [num_turns_of(completion) for completion in completions]
    num_users = [len(completion.sequences) - 1 for completion in completions]
    calls = [call for episode in episodes for call in episode.calls]
    num_policy = sum(completion.num_policy_tokens for completion in completions)
    num_env = sum(len(completion.completion_ids) for completion in completions) - num_policy
    return {"turns/mean": statistics.fmean(num_turns), "turns/max": max(num_turns),
            "calls/mean": len(calls) / len(episodes),
            "calls/share": statistics.fmean(bool(episode.calls) for episode in episodes),
            "calls/failed": statistics.fmean(call.is_failed for call in calls) if calls else 0.0,
            "calls/raised": statistics.fmean(call.raised is not None for call in calls) if calls else 0.0,
            "episodes/failed": sum(episode.failure is not None for episode in episodes),
            "episodes/failed_in_call": sum(episode.may_be_models for episode in episodes),
            **({"turns/user": statistics.fmean(num_users)} if any(num_users) else {}),
            "tokens/policy": num_policy / len(completions), "tokens/env": num_env / len(completions),
            "time/tools": sum(episode.seconds for episode in episodes)}


def num_turns_of(completion: Completion) -> int:
    return sum(segment.source == "policy" for segment in completion.segments)


def recorded_log_probs(completion: Completion) -> list[float | None]:
    """The sampler's log-prob of each of completion_ids, in nats, None for an environment's; in the nine digits of fp32."""
    values = []
    for segment in completion.segments[1:]:
        values += [float(f"{value:.9g}") for value in segment.log_probs] if segment.log_probs is not None else [None] * (
            len(segment.token_ids) - segment.num_repeated)
    return values


def completion_record(tokenizer: Tokenizer, env: Environment, completion: Completion, verdict: Score, *, split: str) -> dict:
    """A completion's line in completions.jsonl: text, token ids, reward and its parts, and the environment's own entries, which
    get a prefix if their name is taken."""
    record = {"split": split, "prompt_id": completion.prompt.id, "sample": completion.sample,
              "prompt": tokenizer.decode(completion.prompt.token_ids, keep_special=True),
              "completion": tokenizer.decode(completion.completion_ids, keep_special=True),
              "reward": verdict.reward, "parts": verdict.parts, "is_correct": verdict.is_correct,
              "finish_reason": completion.finish_reason, "num_tokens": len(completion.completion_ids),
              "token_ids": completion.completion_ids, "log_probs": recorded_log_probs(completion)}
    versions = [version for segment in completion.segments for version in segment.versions or ()]
    if versions:
        record["versions"] = versions
    if completion.episode is not None:
        record["turns"] = num_turns_of(completion)
        record["calls"] = [{"name": call.name, "arguments": call.arguments[:MOST_SHOWN],
                            "result": call.result[:MOST_SHOWN], "failed": call.is_failed}
                           for call in completion.episode.calls]
    for prefix, added in (("env/", description_of(env, completion)), ("extra/", verdict.extra)):
        record |= {prefix + name if name in record or name == "step" else name: value for name, value in added.items()}
    return record
