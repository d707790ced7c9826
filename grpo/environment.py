"""The boundary to an environment: what it must have and hand back, how it is built and called, and what its faults become."""
from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from grpo.batch import Completion, Prompt
from grpo.config import TrainConfig, bind
from grpo.envs.data_files import DataError
from grpo.rewards.functions import RewardError
from models.tokenizer import Tokenizer


@dataclass
class Score:
    """An environment's verdict on one completion.

    `reward` None: no reward could be computed, so the completion is left out of its group. `parts` are unweighted values,
    `metrics` further numbers (a key may be absent from some scores: average over those that have it), `extra` anything
    else worth a column in the log of completions."""

    reward: float | None
    parts: dict[str, float]
    metrics: dict[str, float]
    is_correct: bool | None
    extra: dict[str, object] = field(default_factory=dict)


class EnvironmentFault(RuntimeError):
    """The environment raised, or handed back something that cannot be trained on."""


def make_environment(node: dict, tokenizer: Tokenizer, *, seed: int):
    """The environment that `node` describes. Raises ConfigError for its keywords, and EnvironmentFault for what its
    constructor raises, but for a ValueError, which names key or file by itself."""
    make = bind(node, "env")
    try:
        return make(tokenizer=tokenizer, seed=seed)
    except ValueError:
        raise
    except Exception as error:
        raise EnvironmentFault(f"environment {node['_target_']} cannot be built: {type(error).__name__}: {error} "
                               f"({_place(error)}); correct its keywords under env, or its code") from error


def held_out_prompts(env, *, max_prompts: int, max_len: int) -> list[Prompt]:
    """The first prompts that the environment evaluates on, of a model whose sequences have at most `max_len` tokens."""
    with calling(env, "eval_prompts"):
        prompts = env.eval_prompts()
    prompts = checked_prompts(env, "eval_prompts", prompts)[:max_prompts]
    check_lengths(env, "eval_prompts", prompts, max_len=max_len)
    return prompts


def checked_prompts(env, method: str, prompts: list[Prompt]) -> list[Prompt]:
    is_list = isinstance(prompts, list)
    if not is_list or not prompts or not all(isinstance(prompt, Prompt) for prompt in prompts):
        found = f"a list that holds {sorted({type(item).__name__ for item in prompts})}" if is_list else type(prompts).__name__
        raise EnvironmentFault(f"environment {type(env).__name__}.{method} returned {'no prompts' if prompts == [] else found}; "
                               "return a list of at least one grpo.batch.Prompt")
    return prompts


def check_lengths(env, method: str, prompts: Iterable[Prompt], *, max_len: int, max_new_tokens: int | None = None,
                  max_tokens: int | None = None) -> None:
    """Raises for prompts that cannot be answered in `max_len` tokens (the model's longest sequence), or that, with a completion
    of `max_new_tokens`, make sequences which no micro-batch of `max_tokens` holds: DataError if the prompt tells its file and
    line, EnvironmentFault otherwise."""
    limit = max_len - 1
    reason = f"the model's sequences end at {max_len} (max_position_embeddings), and a completion needs one"
    advice = "shorten it"
    if max_tokens is not None and max_tokens < max_len:
        limit = max_tokens - max_new_tokens
        reason = f"with rollout.max_new_tokens={max_new_tokens} it does not fit optim.max_tokens={max_tokens}"
        advice = "raise optim.max_tokens, lower rollout.max_new_tokens or shorten it"
    num_prompts, long = 0, []
    for prompt in prompts:
        num_prompts += 1
        if len(prompt.token_ids) > limit:
            long.append(prompt)
    if not long:
        return
    text = (f"a prompt has {len(long[0].token_ids)} tokens: {reason} ({len(long)} such of {num_prompts} prompts, the longest "
            f"{max(len(prompt.token_ids) for prompt in long)}); {advice}")
    if "_source" in long[0].row:
        raise DataError(f"{long[0].row['_source']}: {text}, or leave such rows out: env.on_long_prompt=skip "
                        f"env.max_prompt_tokens={limit}")
    raise EnvironmentFault(f"environment {type(env).__name__}.{method}: {text}; prompt {long[0].id} ({_shorten(long[0])})")


def check_known_prompts(env, config: TrainConfig, *, max_len: int) -> None:
    """`check_lengths` of all that an environment with fixed prompts will ask, before anything is loaded or sampled."""
    if not hasattr(env, "train_prompts"):
        return
    with calling(env, "train_prompts"):
        check_lengths(env, "train_prompts", env.train_prompts(), max_len=max_len,
                      max_new_tokens=config.rollout.max_new_tokens, max_tokens=config.optim.max_tokens)
    held_out_prompts(env, max_prompts=config.eval.max_prompts, max_len=max_len)


@contextmanager
def calling(env, method: str) -> Iterator[None]:
    """Around a call of the environment's `method`: what it raises becomes an EnvironmentFault that says where. Errors that
    already name function and row, or file and line, pass."""
    try:
        yield
    except (RewardError, DataError):
        raise
    except Exception as error:
        raise EnvironmentFault(f"environment {type(env).__name__}.{method} raised {type(error).__name__}: {error} "
                               f"({_place(error)})") from error


def _place(error: Exception) -> str:
    """file:line where it was raised."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"


def score(env, completions: list[Completion]) -> list[Score]:
    """The environment's scores, checked; sets each completion's reward and parts."""
    with calling(env, "score"):
        scores = env.score(completions)
    name = type(env).__name__
    if not isinstance(scores, list) or not all(isinstance(verdict, Score) for verdict in scores):
        found = sorted({type(item).__name__ for item in scores}) if isinstance(scores, list) else type(scores).__name__
        raise EnvironmentFault(f"environment {name}.score returned {found}; return a list of grpo.environment.Score, one for "
                               "each completion")
    if len(scores) != len(completions):
        raise EnvironmentFault(f"environment {name}.score returned {len(scores)} scores for {len(completions)} completions; "
                               "return one for each, in their order")
    for completion, verdict in zip(completions, scores):
        is_number = isinstance(verdict.reward, numbers.Real) and math.isfinite(verdict.reward)
        if verdict.reward is not None and not is_number:
            raise EnvironmentFault(f"environment {name}.score gave the reward {verdict.reward!r} to sample {completion.sample} "
                                   f"of prompt {completion.prompt.id} ({_shorten(completion.prompt)}); rewards must be finite "
                                   "numbers, or None to leave the completion out")
        completion.reward, completion.reward_parts = verdict.reward, verdict.parts
    return scores


def _shorten(prompt: Prompt) -> str:
    text = str(prompt.row)
    return text if len(text) <= 80 else text[:77] + "..."
