"""The two nodes of a config that name a callable, `loss` and `env`: found by `_target_`, their keywords checked."""

import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from grpo.config import ConfigError, UnknownKey, describe_type
from grpo.rewards.functions import load_function
from grpo.rewards.user_code import import_user_code
from grpo.rewards.values import describe_error


def bind(node: dict, key: str) -> Callable:
    """The callable that `node["_target_"]` names, with the node's other keys as keywords. What the loop supplies itself (env:
    tokenizer, seed, total_steps, sandbox; loss: its first parameter, whatever its name, and `step`) is left open and cannot be
    set from YAML. Raises ConfigError for a target that cannot be found and for keywords that are unknown, missing or of another
    type."""
    keywords = {name: value for name, value in node.items() if name != "_target_"}
    path, target = node.get("_target_"), resolve_target(node.get("_target_"), key)
    if key == "env" and hasattr(target, "reset") and not hasattr(target, "prompts"):
        raise ConfigError(f"env._target_ = {path!r}: a class with reset() and tools is run by env=tool_class "
                          f"env.environment={path} (without env._target_)")
    parameters = keyword_parameters(target)
    supplied = ("tokenizer", "seed", "total_steps", "sandbox", "chat_form") if key == "env" else _first_of_loss(path, parameters)
    allowed = [name for name in parameters if name not in supplied]
    for name, value in keywords.items():
        if name in supplied:
            raise ConfigError(f"{key}.{name} = {value!r}: the loop supplies {name}; remove it")
        if name not in allowed:
            unknown = [other for other in keywords if other not in (*allowed, *supplied)]
            raise UnknownKey(f"{key}.{name}", allowed, also=unknown[1:])
        if not fits(value, parameters[name].annotation):
            expected = describe_type(parameters[name].annotation)
            raise ConfigError(f"{key}.{name} = {value!r} ({type(value).__name__}): {path} expects {expected}")
    required = [name for name in allowed if parameters[name].default is inspect.Parameter.empty]
    missing = [f"{key}.{name}" for name in required if name not in keywords]
    if missing:
        lacking = [name for name in supplied if name not in ("total_steps", "sandbox", "step") and name not in parameters]
        contract = f"; it does not take {', '.join(lacking)}, with which the loop calls it" if lacking else ""
        raise ConfigError(f"{', '.join(missing)}: required by {path}; set with `{missing[0]}=VALUE` or in the YAML{contract}")
    return functools.partial(target, **keywords)


def _first_of_loss(path: str, parameters: dict[str, inspect.Parameter]) -> tuple[str, ...]:
    """The names of the parameters that get a loss's inputs and the step's tokens. Raises ConfigError for the signature that
    losses had before."""
    positional = [name for name, parameter in parameters.items() if parameter.kind in (
        inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    if {"log_probs", "old_log_probs"} <= parameters.keys():
        name = re.split("[.:]", path)[-1]
        raise ConfigError(
            f"loss._target_ = {path!r}: {name}({', '.join(parameters)}) must be {name}(inputs, *, KEYWORDS): inputs is a "
            "grpo.losses.LossInputs, which has log_probs, old_log_probs and the fields of the batch")
    return (*(positional[:1] or ["inputs"]), "step")


def keyword_parameters(target: Callable) -> dict[str, inspect.Parameter]:
    """The parameters by name; of a class whose constructor hands `**keywords` on, those of its bases too."""
    try:
        signature = inspect.signature(target, eval_str=True).parameters
    except NameError:  # annotations that only a type checker resolves
        signature = inspect.signature(target).parameters
    except (TypeError, ValueError) as error:  # of builtins
        raise ConfigError(f"the parameters of {target} cannot be read ({error}); name a function or class written in "
                          "Python") from error
    hands_on = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in signature.values())
    if not hands_on or not inspect.isclass(target):
        return dict(signature)
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found: dict[str, inspect.Parameter] = {}
    for base in target.__mro__[:-1]:
        if "__init__" in vars(base) and hands_on:
            _, *own = inspect.signature(base.__init__, eval_str=True).parameters.values()
            found = {parameter.name: parameter for parameter in own if parameter.kind not in variable} | found
            hands_on = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in own)
    return found


def dotted_target(node: dict) -> str:
    """What the node's `_target_` names, with a dot where it may have a colon: grpo.losses:ppo is grpo.losses.ppo."""
    return str(node.get("_target_")).replace(":", ".")


def resolve_target(path: Any, key: str) -> Callable:
    if not isinstance(path, str) or not re.search("[.:]", path):
        raise ConfigError(f"{key}._target_ = {path!r}: expected a dotted path such as grpo.losses.ppo, "
                          "module:name or file.py:name")
    if ":" in path or path.endswith(".py"):
        try:
            return load_function(path, key=f"{key}._target_")
        except ValueError as error:
            raise ConfigError(str(error)) from error
    module_name, _, name = path.rpartition(".")
    try:
        module = import_user_code(module_name)
    except Exception as error:
        reason = describe_error(error)
        raise ConfigError(f"{key}._target_ = {path!r}: cannot import {module_name} ({reason}); check the path") from error
    if not callable(vars(module).get(name)):
        choices = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        near = difflib.get_close_matches(name, choices, n=1)
        hint = f"; did you mean {module_name}.{near[0]}?" if near else ""
        raise ConfigError(f"{key}._target_ = {path!r}: {module_name} has no function or class {name}{hint}")
    return vars(module)[name]


def fits(value: Any, annotation: Any) -> bool:
    """Whether a YAML value suits an annotation made of int, float, bool, str, list, dict and None; others are left to
    the callable."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(annotation))
    kind = typing.get_origin(annotation) or annotation
    if kind in (None, type(None)):
        return value is None
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind in (int, float, bool, str, list, dict):
        return isinstance(value, (int, float) if kind is float else kind)
    return True
