"""The protocol of an environment; safe calls into it (grpo/rewards/user_code.py protects the process); checks of its results,
which become plain Python values; and the types of its errors."""
import inspect
import operator
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from grpo.batch import Completion, Prompt
from grpo.config import ConfigError, InFlight, OldLogProbs, TrainConfig
from grpo.configuration.targets import bind, keyword_parameters, resolve_target
from grpo.configuration.validate import is_evaluating
from grpo.envs.data_files import DataError
from grpo.rewards.user_code import UserCodeFault, is_users_interrupt, protected
from grpo.rewards.values import loggable, shorten, to_number
from grpo.sandbox.pool import Sandbox
from models.chat.form import Form
from models.chat.tokenizer import Tokenizer

MOST_PROMPT_ID = 2**63 - 1  # ids are part of RNG keys, which are int64


@dataclass
class Score:
    """An environment's verdict on one completion."""

    reward: float | None  # None: no reward could be computed, so the completion is left out of its group
    parts: dict[str, float]  # unweighted values that the reward is made of
    metrics: dict[str, float]  # further numbers; each is averaged over the scores that have it
    is_correct: bool | None  # None: not judged
    extra: dict[str, object] = field(default_factory=dict)  # anything else worth a column in the log of completions


class Environment(Protocol):
    """Where prompts come from and what completions are worth: any class with these methods, named by `env._target_`.

    Its constructor gets the other keys of its YAML, `tokenizer` (models.chat.tokenizer.Tokenizer) and `seed` as keywords, and, if
    it takes them, `total_steps`, the steps of the run (0 without training), `chat_form` (`turns.form`, for prompts rendered by
    `models.chat.render.harmony_messages`), and `sandbox`, a grpo.sandbox.pool.Sandbox that runs code which the model writes (None
    in a chat). A resumed run asks only for later steps, so results should depend only on the
    arguments and the seed. Token ids, numbers and lists may be of any library; they are checked and
    become plain Python values. An exception ends the run with exit code 4 and says where it was raised; a
    grpo.envs.data_files.DataError is shown as it is, with exit code 3, and a ValueError of the constructor with exit code 2."""

    def prompts(self, step: int, *, num_prompts: int, attempt: int) -> list[Prompt]:
        """Prompts to train on in step `step` (from 0): at least one; those beyond `num_prompts` are not used. `attempt` > 0
        asks for other prompts, which replace dropped groups. All prompts of a step, over all attempts, have different ids."""

    def eval_prompts(self) -> list[Prompt]:
        """Prompts to evaluate on, at least one, with distinct ids; the same at every call. `eval.max_prompts` limits them. Needed
        only where something is evaluated."""

    def score(self, completions: list[Completion]) -> list[Score]:
        """One Score for each completion, in their order; a call has completions of several prompts. `completion.prompt.row` is
        the row that `prompts` gave it, `completion_ids` its tokens; `is_truncated` is true if it was cut off."""


class OptionalMethods(Protocol):
    """Methods that an environment may also have. All are optional: callers test with hasattr."""

    @staticmethod
    def build_tokenizer() -> Tokenizer:
        """A tokenizer for models without a checkpoint; without this method they need model.tokenizer."""

    def summary(self) -> str:
        """A short text about the environment, for the first lines of a run."""

    def describe(self, completion: Completion) -> dict[str, object]:
        """Further entries for a completion in the log; a name that is taken gets the prefix `env/`."""

    def fingerprint(self) -> str:
        """A digest of its data, which a resumed run must find again."""

    def train_prompts(self) -> Iterable[Prompt]:
        """All prompts that `prompts` can return, if they are fixed: their lengths, and those of `eval_prompts`, are then checked
        before the model is loaded."""

    def recorded_completions(self, step: int, *, num_prompts: int) -> list[Completion]:
        """Completions of data that a step trains on, in place of sampled ones: an environment with this method needs no other
        (grpo/envs/conversations.py). A completion's policy segments have any log-probs, 0 say; its reward is None, or within a
        pair 1 for the better one and 0 for the other. `held_out_completions()`, if it has that, returns those to evaluate on."""

    def demonstrations(self, step: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) for a step of the supervised warm-up; without it `warmup` must be null."""

    def episode(self, prompt: Prompt, sample: int) -> object:
        """The tools of one completion, if the model may call some: a new object, whose public methods, typed and documented, are
        the functions, sync or async; `models.chat.functions.function_schema` describes one for the prompt. A method python(code)
        also answers harmony's built-in tool of that name (grpo/envs/python_tool.py). What a function raises is told to the
        model, which chose the arguments: of a ValueError the text alone. A completion whose object fails otherwise drops out of
        its group. If it has get_reward(), that is called at the end, and `score` finds the result in completion.episode.reward;
        close(), if it has one, is called last. All its code runs in a thread of its own. It must depend on its arguments alone:
        nothing of it is saved."""

    has_user_turns: bool
    """Whether the objects of `episode` have user_turn(answer), which returns what the user says to a final message, or None if
    the episode ends with that."""

    def encode_prompt(self, question: str) -> list[int]:
        """A question asked in the chat as a prompt's token ids; a ValueError tells the user what is wrong with the question."""


REQUIRED = ("prompts", "eval_prompts", "score")


class EnvironmentFault(UserCodeFault):
    """The environment raised, or returned something that cannot be trained on."""


def make_environment(node: dict, tokenizer: Tokenizer, *, seed: int, total_steps: int,
                     sandbox: Sandbox | None = None, chat_form: Form = Form.hub) -> Environment:
    """The environment that `node` describes. Raises ConfigError for wrong keywords, and EnvironmentFault if its constructor
    raises, except for a ValueError, which is raised unchanged: it should name key or file."""
    make = bind(node, "env")
    supplied = {"tokenizer": tokenizer, "seed": seed}
    if "total_steps" in keyword_parameters(make.func):
        supplied["total_steps"] = total_steps
    if "sandbox" in keyword_parameters(make.func):
        supplied["sandbox"] = sandbox
    if "chat_form" in keyword_parameters(make.func):
        supplied["chat_form"] = chat_form
    with _named_faults(f"environment {node['_target_']}", "cannot be built:", passes=ValueError,
                       advice="; correct its keywords under env, or its code"):
        return make(**supplied)


def make_sandbox(node: dict, mode: str) -> Sandbox | None:
    """The sandbox for an environment whose constructor takes one. Raises SandboxRefused, which says what to do."""
    return Sandbox(mode) if "sandbox" in keyword_parameters(resolve_target(node.get("_target_"), "env")) else None


def check_environment(env: Environment, config: TrainConfig, *, max_len: int, vocab_size: int) -> None:
    """Checks a run's environment before its model is loaded: its methods and, if its prompts are fixed, their lengths. Raises
    ConfigError, DataError and EnvironmentFault. max_len: tokens of the model's longest sequence."""
    if config.warmup is not None and not hasattr(env, "demonstrations"):
        raise ConfigError(f"warmup: {type(env).__name__} has no demonstrations(step, batch_size) to train on; set warmup=null")
    if hasattr(env, "recorded_completions"):
        check_methods(env, ("recorded_completions",))
        if config.rollout.max_staleness:
            raise ConfigError(f"rollout.max_staleness = {config.rollout.max_staleness}: this environment's completions are data, "
                              "which nothing samples ahead; set rollout.max_staleness=0")
        if config.optim.old_log_probs == OldLogProbs.sampler:
            raise ConfigError("optim.old_log_probs = 'sampler': this environment's completions are data, which no sampler has "
                              "log-probs of; set optim.old_log_probs=trainer")
        with calling(env, "train_prompts"):
            check_lengths(env, "train_prompts", env.train_prompts() if hasattr(env, "train_prompts") else (), max_len=max_len)
        return
    if config.rollout.in_flight == InFlight.switch and hasattr(env, "episode"):
        raise ConfigError("rollout.in_flight = 'switch': completions with calls of tools are drawn by one policy; set "
                          "rollout.in_flight=keep")
    is_evaluated = hasattr(env, "eval_prompts") or is_evaluating(config.eval)
    check_methods(env, [method for method in REQUIRED if method != "eval_prompts" or is_evaluated])
    if not hasattr(env, "train_prompts"):
        return
    with calling(env, "train_prompts"):
        check_lengths(env, "train_prompts", env.train_prompts(), max_len=max_len)
    if is_evaluated:
        held_out_prompts(env, max_prompts=config.eval.max_prompts, max_len=max_len, vocab_size=vocab_size)


def longest_prompt(env: Environment) -> int | None:
    """Tokens of the longest prompt that a run may train on, None if the environment does not know its prompts."""
    if not hasattr(env, "train_prompts"):
        return None
    with calling(env, "train_prompts"):
        return max((len(prompt.token_ids) for prompt in env.train_prompts()), default=None)


def check_methods(env: Environment, methods: Sequence[str]) -> None:
    """Raises EnvironmentFault for methods that it lacks or that do not take what they are called with, and for a property in a
    method's place that raises."""
    for method in methods:
        if hasattr(type(env), method):  # where hasattr(env) would hide an AttributeError of a property
            with calling(env, method):
                getattr(env, method)
    missing = [method for method in methods if not hasattr(env, method)]
    if missing:
        raise EnvironmentFault(f"environment {type(env).__name__} has no {', '.join(missing)}; grpo.environment.Environment says "
                               "what each takes and returns")
    for method in methods:
        if hasattr(Environment, method):
            check_parameters(env, method)


def check_parameters(env: Environment, method: str) -> None:
    """Raises EnvironmentFault for a method whose parameters are not those that Environment says."""
    called = inspect.signature(getattr(Environment, method))
    parameters = list(called.parameters.values())[1:]  # without self
    positional = [parameter.name for parameter in parameters if parameter.kind == parameter.POSITIONAL_OR_KEYWORD]
    keywords = [parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
    try:
        inspect.signature(getattr(env, method)).bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        form = ", ".join([*positional, *(["*", *keywords] if keywords else [])])
        raise EnvironmentFault(f"environment {type(env).__name__}.{method} is called as {method}({form}), which it does not "
                               f"take: {error}; grpo.environment.Environment says what each is") from error
    except ValueError:  # of a function without a signature
        pass


def summary_of(env: Environment) -> str:
    """The environment's summary; empty if it has none."""
    if not hasattr(env, "summary"):
        return ""
    with calling(env, "summary"):
        return str(env.summary())


def calling(env: Environment | type, method: str) -> AbstractContextManager[None]:
    """A context for a call of the environment's `method`, with the process protected: an exception becomes an EnvironmentFault
    that says where it was raised. Errors that already name function and row, or file and line, are raised unchanged."""
    return _named_faults(_name(env, method), "raised", passes=DataError)


@contextmanager
def _named_faults(who: str, what: str, *, passes: type[Exception], advice: str = "") -> Iterator[None]:
    try:
        with protected(who):
            yield
    except (UserCodeFault, passes):
        raise
    except BaseException as error:  # user code: SystemExit and others that are not Exceptions, too
        if is_users_interrupt(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]  # where it was raised
        raise EnvironmentFault(f"{who} {what} {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
                               f"{advice}") from error


def _name(env: Environment | type, method: str) -> str:
    kind = env if isinstance(env, type) else type(env)
    return f"environment {kind.__name__}.{method}"


# --- prompts ----------------------------------------------------------------------------------------------------------


def held_out_prompts(env: Environment, *, max_prompts: int, max_len: int, vocab_size: int) -> list[Prompt]:
    """The environment's first `max_prompts` prompts to evaluate on, checked. max_len: tokens of the model's longest sequence."""
    with calling(env, "eval_prompts"):
        prompts = env.eval_prompts()
    prompts = checked_prompts(env, "eval_prompts", prompts, vocab_size=vocab_size)[:max_prompts]
    check_lengths(env, "eval_prompts", prompts, max_len=max_len)
    return prompts


def checked_prompts(env: Environment, method: str, prompts: list[Prompt], *, vocab_size: int,
                    taken: set[int] | None = None) -> list[Prompt]:
    """The prompts with plain integers for ids and tokens. taken: ids of the step's earlier prompts.

    Raises EnvironmentFault naming method and prompt."""
    is_list = isinstance(prompts, list)
    if not is_list or not prompts or not all(isinstance(prompt, Prompt) for prompt in prompts):
        found = f"a list that holds {sorted({type(item).__name__ for item in prompts})}" if is_list else type(prompts).__name__
        raise EnvironmentFault(f"{_name(env, method)} returned {'no prompts' if prompts == [] else found}; "
                               "return a list of at least one grpo.batch.Prompt")
    seen = set() if taken is None else set(taken)
    for i, prompt in enumerate(prompts):
        who = f"{_name(env, method)}: prompt {i} (id {shorten(prompt.id)})"
        is_integer = hasattr(prompt.id, "__index__") and not isinstance(prompt.id, bool)
        if not is_integer or not 0 <= (index := operator.index(prompt.id)) <= MOST_PROMPT_ID:
            raise EnvironmentFault(f"{who}: the id must be an integer from 0 to 2^63 - 1")
        if index in seen:
            raise EnvironmentFault(f"{who}: another prompt of this step has the same id; ids tell groups apart, so each prompt "
                                   "of a step needs its own, those of later attempts too")
        seen.add(index)
        prompt.id, prompt.token_ids = index, checked_ids(who, prompt.token_ids, vocab_size=vocab_size)
    return prompts


def check_lengths(env: Environment, method: str, prompts: Iterable[Prompt], *, max_len: int) -> None:
    """Raises if a prompt leaves no room for a completion in `max_len` tokens (the model's longest sequence): DataError if the
    prompt has its file and line, EnvironmentFault otherwise."""
    limit, num_prompts, long = max_len - 1, 0, []
    for prompt in prompts:
        num_prompts += 1
        if len(prompt.token_ids) > limit:
            long.append(prompt)
    if not long:
        return
    text = (f"a prompt has {len(long[0].token_ids)} tokens: the model's sequences end at {max_len} (max_position_embeddings), "
            f"and a completion needs one ({len(long)} such of {num_prompts} prompts, the longest "
            f"{max(len(prompt.token_ids) for prompt in long)}); shorten it")
    if "_source" in long[0].row:
        raise DataError(f"{long[0].row['_source']}: {text}, or leave such rows out: env.on_long_prompt=skip "
                        f"env.max_prompt_tokens={limit}")
    raise EnvironmentFault(f"{_name(env, method)}: {text}; prompt {long[0].id} ({shorten(long[0].row, 80)})")


def checked_ids(who: str, token_ids: object, *, vocab_size: int) -> list[int]:
    """Token ids (a list, tuple, array or tensor of integers) as a plain list. Raises EnvironmentFault starting with `who`."""
    values = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
    if not isinstance(values, (list, tuple)) or not values:
        raise EnvironmentFault(f"{who}: token ids are {shorten(token_ids)}; expected a list of at least one")
    for value in values:
        if not hasattr(value, "__index__") or isinstance(value, bool) or not 0 <= operator.index(value) < vocab_size:
            raise EnvironmentFault(f"{who}: token id {shorten(value)} is none of the model's vocabulary, the integers from 0 to "
                                   f"{vocab_size - 1}")
    return [operator.index(value) for value in values]


def checked_demonstrations(env: Environment, step: int, batch_size: int, *, vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """The environment's (prompt ids, completion ids) pairs for a step of the warm-up, checked."""
    with calling(env, "demonstrations"):
        pairs = env.demonstrations(step, batch_size)
    name = _name(env, "demonstrations")
    is_list = isinstance(pairs, list) and pairs
    if not is_list or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise EnvironmentFault(f"{name} returned {shorten(pairs)}; return a list of at least one (prompt ids, completion ids)")
    return [tuple(checked_ids(f"{name}: {part} of pair {i}", ids, vocab_size=vocab_size)
                  for part, ids in zip(("prompt", "completion"), pair)) for i, pair in enumerate(pairs)]


def encode_question(env: Environment, question: str, *, vocab_size: int) -> list[int]:
    """The token ids of the environment's prompt for a question. Raises ValueError for a question that it cannot encode."""
    try:
        with calling(env, "encode_prompt"):
            token_ids = env.encode_prompt(question)
    except EnvironmentFault as fault:
        if isinstance(fault.__cause__, ValueError):
            raise fault.__cause__ from None
        raise
    return checked_ids(_name(env, "encode_prompt"), token_ids, vocab_size=vocab_size)


def tiny_tokenizer(target) -> Tokenizer:
    """The tokenizer that an environment's class has for models without a checkpoint."""
    with calling(target, "build_tokenizer"):
        tokenizer = target.build_tokenizer()
    if not isinstance(tokenizer, Tokenizer):
        raise EnvironmentFault(f"{_name(target, 'build_tokenizer')} returned a {type(tokenizer).__name__}; return a "
                               "models.chat.tokenizer.Tokenizer")
    return tokenizer


# --- scores -----------------------------------------------------------------------------------------------------------


def checked_scores(env: Environment, completions: list[Completion]) -> list[Score]:
    """The environment's scores, checked and in plain numbers; sets each completion's reward and parts. The environment does not
    judge a completion whose episode failed."""
    failed = {index: completion.episode for index, completion in enumerate(completions)
              if completion.episode is not None and completion.episode.failure is not None}
    if failed:
        others = [completion for i, completion in enumerate(completions) if i not in failed]
        judged = iter(checked_scores(env, others) if others else [])
        for index, episode in failed.items():
            completions[index].reward = episode.failure_reward
        return [Score(failed[i].failure_reward, {}, {}, None, {"failure": failed[i].failure}) if i in failed else next(judged)
                for i in range(len(completions))]
    with calling(env, "score"):
        scores = env.score(completions)
    name = _name(env, "score")
    if not isinstance(scores, list) or not all(isinstance(verdict, Score) for verdict in scores):
        found = sorted({type(item).__name__ for item in scores}) if isinstance(scores, list) else type(scores).__name__
        raise EnvironmentFault(f"{name} returned {found}; return a list of grpo.environment.Score, one for each completion")
    if len(scores) != len(completions):
        raise EnvironmentFault(f"{name} returned {len(scores)} scores for {len(completions)} completions; "
                               "return one for each, in their order")
    for completion, verdict in zip(completions, scores):
        to = f"to sample {completion.sample} of prompt {completion.prompt.id} ({shorten(completion.prompt.row, 80)})"
        reward, problem = to_number(verdict.reward)
        if problem is not None:
            raise EnvironmentFault(f"{name} gave the reward {verdict.reward!r} {to}: {problem}; rewards must be finite "
                                   "numbers, or None to leave the completion out")
        correct, problem = to_number(verdict.is_correct)
        if problem is not None:
            raise EnvironmentFault(f"{name} gave is_correct={shorten(verdict.is_correct)} {to}: true, false or None")
        verdict.reward, verdict.is_correct = reward, None if correct is None else bool(correct)
        verdict.parts = _numbers(verdict.parts, f"{name} gave {to} the part")
        verdict.metrics = _numbers(verdict.metrics, f"{name} gave {to} the metric")
        verdict.extra = _entries(verdict.extra, f"{name} gave {to} extra")
        completion.reward, completion.reward_parts = verdict.reward, verdict.parts
    return scores


def _numbers(values: object, what: str) -> dict[str, float]:
    """Plain numbers by name; None and NaN, which mean "not measured", are left out."""
    numbers = {}
    for name, value in _items(values, what):
        number, problem = (None, None) if isinstance(value, float) and value != value else to_number(value)
        if problem is not None:
            raise EnvironmentFault(f"{what} {name!r}: {problem}; texts belong into extra")
        if number is not None:
            numbers[str(name)] = number
    return numbers


def _entries(values: object, what: str) -> dict[str, object]:
    return {str(name): loggable(value) for name, value in _items(values, what)}


def _items(values: object, what: str) -> list[tuple]:
    if not isinstance(values, dict):
        raise EnvironmentFault(f"{what} {shorten(values)}; expected a dict of names and values")
    return list(values.items())


def description_of(env: Environment, completion: Completion) -> dict[str, object]:
    """The environment's further entries for a completion in the log; {} if it has no describe()."""
    if not hasattr(env, "describe"):
        return {}
    with calling(env, "describe"):
        described = env.describe(completion)
    return _entries(described, f"{_name(env, 'describe')} returned")
