"""Completions of data in place of sampled ones: what a step of supervised fine-tuning or of preferences trains on.

An environment with `recorded_completions` (grpo/envs/conversations.py) has no sampling, no scoring and no dropped groups."""
import math

import torch

from grpo.batch import Completion, RolloutBatch, Segment, pack
from grpo.config import ConfigError, TrainConfig
from grpo.configuration.algorithm import Whiten
from grpo.configuration.targets import dotted_target
from grpo.environment import Environment, EnvironmentFault, Score, calling
from grpo.groups import Groups, length_metrics


def is_recorded(env: Environment) -> bool:
    return hasattr(env, "recorded_completions")


def check_recorded(env: Environment, config: TrainConfig) -> None:
    """Raises ConfigError for a loss of data on sampled completions, and for settings that data cannot have."""
    target = dotted_target(config.loss)
    is_of_data = target in ("grpo.supervised.sft", "grpo.supervised.dpo")
    if not is_recorded(env):
        if is_of_data:
            raise ConfigError(f"loss._target_ = {target!r}: learns from data, whatever the rewards of sampled completions are: "
                              "set env=conversations or env=preferences, or a policy loss such as loss=dapo")
        return
    if config.kl.is_in_reward:
        raise ConfigError(f"kl.place = {str(config.kl.place)!r}: data have no reward that the KL could lower: set kl.place=loss")
    if is_of_data and (config.entropy.top_fraction < 1 or config.corrections.is_on):
        key, value = (("entropy.top_fraction", config.entropy.top_fraction) if config.entropy.top_fraction < 1
                      else ("corrections", "on"))
        raise ConfigError(f"{key} = {value}: weighs advantages, which {target} has none of: leave it off")
    of_samples = {"curriculum.retire_at, retire_unsolved or candidates": config.curriculum.is_on,
                  "rollout.oversampling": config.rollout.oversampling > 1,
                  "rollout.overlong_buffer": config.rollout.overlong_buffer is not None,
                  "rollout.replay_routing": config.rollout.replay_routing, "optim.mask_truncated": config.optim.mask_truncated}
    if is_set := [key for key, is_on in of_samples.items() if is_on]:
        raise ConfigError(f"{', '.join(is_set)}: about completions that are sampled, and this environment's are data; leave it "
                          "off")
    if config.advantage.whiten != Whiten.none:
        raise ConfigError(f"advantage.whiten = {str(config.advantage.whiten)!r}: the advantages of data are 1 (of what is "
                          "rejected -1), which whitening would take away: set advantage.whiten=none")


def collect_recorded(env: Environment, config: TrainConfig, step: int) -> Groups:
    """The completions of a step. Each has the advantage 1; that of a pair is 1 for the chosen one and -1 for the rejected one."""
    with calling(env, "recorded_completions"):
        completions = checked(env, env.recorded_completions(step, num_prompts=config.rollout.prompts_per_step))
    advantages = [1.0 if completion.reward is None else 2 * completion.reward - 1 for completion in completions]
    scored = [(completion, Score(completion.reward, {}, {}, None)) for completion in completions]
    return Groups(completions, advantages, scored, length_metrics(completions), is_recorded=True)


def checked(env: Environment, completions: object) -> list[Completion]:
    is_list = isinstance(completions, list) and completions and all(isinstance(item, Completion) for item in completions)
    if not is_list or not all(isinstance(item, Segment) for completion in completions for item in completion.segments):
        raise EnvironmentFault(f"{type(env).__name__}: its recorded completions are a {type(completions).__name__}; return a "
                               "list of at least one grpo.batch.Completion")
    return completions


def held_out(env: Environment, *, most: int) -> list[Completion]:
    """The completions of the first `most` rows that are held out; [] if there are none."""
    if not hasattr(env, "held_out_completions"):
        return []
    with calling(env, "held_out_completions"):
        completions = env.held_out_completions()
    return [completion for completion in checked(env, completions) if completion.prompt.id < most] if completions else []


def pack_recorded(completions: list[Completion]) -> RolloutBatch:
    return pack(completions, [0.0] * len(completions))


def held_out_metrics(batch: RolloutBatch, log_probs: torch.Tensor, ref_log_probs: torch.Tensor | None) -> dict[str, float]:
    """`loss`, the mean of -log pi over the trained tokens, in nats, with `perplexity`; of pairs, over what is chosen, with
    `accuracy`: the share of pairs whose chosen completion gained more log-prob over the reference (or has more, without one)
    than its rejected one. log_probs, ref_log_probs: [T] fp32 nats."""
    sums = sums_of(batch, log_probs)
    wanted = ~(batch.rewards.cpu() == 0)
    loss = -float(sums[wanted].sum() / batch.sequence_lengths.cpu()[wanted].sum())
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if not bool(wanted.all()):
        gains = sums - (0 if ref_log_probs is None else sums_of(batch, ref_log_probs))
        metrics["accuracy"] = float((gains[wanted] > gains[~wanted]).double().mean())
    return metrics


def sums_of(batch: RolloutBatch, log_probs: torch.Tensor) -> torch.Tensor:
    """The log-prob of each completion: [N] float64 on the host, so that its bits do not depend on a GPU's order of adding."""
    values = torch.where(batch.host_mask, log_probs.cpu().double(), 0.0)
    return torch.zeros(len(batch.rewards), dtype=torch.float64).index_add(0, batch.sequence_ids.cpu(), values)
