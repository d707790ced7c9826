"""Reads the words of a command line, before Hydra composes them.

A word KEY=VALUE sets a key. Where the key holds text (a string or a path, by the schema or by the keyword's annotation) the
value is taken literally, as the shell passed it: quotes, commas, `${...}` and `#` are characters like others. Two values are
not: `null`, and in a sweep a list with commas and no spaces after them (`env.path=a.jsonl,b.jsonl`). ++KEY=VALUE, and every
key that does not hold text, is in Hydra's grammar: '++name="a, b"', '++name=lr-${optim.lr}'. Hydra's flags (--cfg job, -m,
--config-dir FOLDER) may stand anywhere.
"""

import argparse
import contextlib
import json
import re
import types
import typing
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config import ConfigError, escaped
from grpo.configuration.suggestions import suggest

DEFAULT_EXPERIMENT = "quickstart"
INFO_FLAGS = ("--info", "-i")


class Once(argparse.Action):
    """An option that keeps its value, and takes no second one. parser.register("action", None, Once) makes it the usual kind."""

    first: Any = None

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        if self.first is not None and self.first != values:
            parser.error(f"{option_string} is given twice, {self.first} and {values}: leave one out")
        self.first = values
        setattr(namespace, self.dest, values)


def repeats(words: list[str]) -> list[str]:
    """What to say of each key that two of the words KEY=VALUE set to different values. A choice of a file and a mapping {...} of
    keys go together; Hydra's own settings may add up."""
    given, found = {}, []
    for word in words:
        key, equals, value = word.lstrip("+").partition("=")
        if equals and not key.startswith(("~", "hydra.", "hydra/")):
            before = given.get((key, value[:1] == "{"), value)
            given[key, value[:1] == "{"] = value
            if before != value:
                found.append(f"{key} is given twice, {key}={before} and {key}={value}")
    return found


def refuse_repeats(words: list[str]) -> None:
    """Raises ConfigError for a key that two of the words set to different values, one of which would be lost without a word."""
    for text in repeats(words):
        raise ConfigError(f"{text}: leave one out")


def read_flags(argv: list[str], keys: list[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Hydra's flags, whose `overrides` are the other words (KEY=VALUE, +KEY=VALUE, ++KEY=VALUE, ~KEY), and the parser that knows
    them. `keys`: the settings there are. Raises ConfigError for unknown flags and for flags that contradict each other."""
    parser = get_args_parser()
    parser.allow_abbrev = False

    def refuse(message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}; --hydra-help lists the options")

    parser.error = refuse
    words = list(argv)
    (info,) = (action for action in parser._actions if action.dest == "info")
    for i, word in enumerate(words):
        if word in INFO_FLAGS and (i + 1 == len(words) or words[i + 1] not in info.choices):
            words[i] = f"{word}=all" if word.startswith("--") else f"{word}all"  # a setting after it is not its value
    flags, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        raise unknown_option(unknown[0], words, keys)
    if flags.run + flags.multirun + bool(flags.cfg) + bool(flags.info) + flags.shell_completion > 1:
        refuse("only one of --run, --multirun, --cfg, --info and --shell-completion can be given")
    if flags.resolve and not (flags.cfg or flags.help):
        refuse("--resolve goes with --cfg or --help")
    if flags.experimental_rerun is not None:
        refuse("--experimental-rerun is not supported; a run goes on with its own command and resume=true")
    for word in flags.overrides:
        if not word.isprintable() and any("\ud800" <= character <= "\udfff" for character in word):
            raise ConfigError(f"cannot read {ascii(word)}: it is not valid UTF-8")
    return flags, parser


def unknown_option(option: str, words: list[str], keys: list[str]) -> ConfigError:
    name, _, value = option.lstrip("-").partition("=")
    after = words[words.index(option) + 1:][:1]
    if not value:
        value = after[0] if after and not after[0].startswith("-") and "=" not in after[0] else "VALUE"
    found = [f"{key}={value}" for key in suggest(name.replace("-", "_"), keys, keys)]
    hint = f"; did you mean {' or '.join(found)}?" if found else ""
    return ConfigError(f"unknown option {option}: settings are written KEY=VALUE{hint}")


def default_first(words: list[str], config_name: str) -> list[str]:
    """The words in the form Hydra takes, values aside: `experiment=x` becomes `+experiment=x`, and a training run without one
    gets the default, before everything that may override it."""
    groups = ("experiment",) if config_name == "train" else ("experiment", "model", "env")
    placed = ["+" + word if word.partition("=")[0] in groups and "=" in word else word for word in words]
    if config_name == "train" and not any(word.lstrip("+").startswith("experiment=") for word in placed):
        placed.insert(0, f"+experiment={DEFAULT_EXPERIMENT}")
    return placed


def to_override(word: str, kind: Any, *, is_sweep: bool) -> str:
    """One word in Hydra's grammar: text quoted, a key below a node (`env.path=x`, `warmup.steps=3`) set whether the YAML has it
    or not (the schema and `bind` refuse unknown ones). kind: the type of the key's value, None where Hydra decides."""
    key, equals, value = word.partition("=")
    if not equals or key[:1] in ("+", "~") or key.startswith(("hydra.", "hydra/")):
        return word
    if is_text(value, kind):
        parts = re.split(r",(?!\s)", value)
        value = ",".join(map(quoted, parts)) if is_sweep and len(parts) > 1 and all(parts) else quoted(value)
    elif not is_in_grammar(value):
        value = rendered(value)
    return f"++{key}={value}" if "." in key or value[:1] == "{" else f"{key}={value}"


def is_text(value: str, kind: Any) -> bool:
    """Whether the value of a key of this type is literal text. Of a key that also takes a list or a number, what looks like
    one is none."""
    kinds = set(typing.get_args(kind)) if typing.get_origin(kind) in (typing.Union, types.UnionType) else {kind}
    if str not in kinds or value == "null":
        return False
    others = {typing.get_origin(other) or other for other in kinds} - {str, type(None)}
    is_container = value[:1] + value[-1:] in ("[]", "{}")
    is_number = bool({int, float, bool} & others) and isinstance(yaml.safe_load(value or "''"), (int, float))
    return not (others & {list, dict} and is_container) and not is_number


def quoted(text: str) -> str:
    """The text as a quoted string of Hydra's grammar."""
    return QuotedString(escaped(text), Quote.single).with_quotes()


def as_typed(override: str) -> str:
    """The word to type for an override: the inverse of `to_override`."""
    key, _, value = override.partition("=")
    if value[:1] == "'" and is_in_grammar(value):
        with contextlib.suppress(OmegaConfBaseException):  # where it holds a ${...} that is no text
            text = OmegaConf.create([parse([f"key={value}"])[0].value()])[0]
            if quoted(text) == value:
                return f"{key.lstrip('+')}={text}"
    return override[2:] if key.startswith("++") and "${" not in value else override


def is_in_grammar(value: str) -> bool:
    try:
        parse([f"key={value}"])
    except ConfigError:
        return False
    return True


def rendered(value: str) -> str:
    """A value in Hydra's grammar, which takes fewer characters unquoted: a list or mapping where YAML reads one, else the text
    (which a key that holds none then refuses by name)."""
    def render(node: Any) -> str:
        if isinstance(node, dict):
            return "{" + ",".join(f"{quoted(str(key))}:{render(item)}" for key, item in node.items()) + "}"
        if isinstance(node, list):
            return "[" + ",".join(map(render, node)) + "]"
        return quoted(node) if isinstance(node, str) else json.dumps(node)

    node = None
    with contextlib.suppress(yaml.YAMLError):
        node = yaml.safe_load(value)
    return render(node) if value[:1] in ("[", "{") and isinstance(node, (list, dict)) else quoted(value)


def parse(overrides: list[str]) -> list[Override]:
    """The overrides as Hydra reads them. Raises ConfigError for the first that is not in its grammar."""
    parser, parsed = OverridesParser.create(), []
    for override in overrides:
        try:
            parsed += parser.parse_overrides([override])
        except HydraException as error:
            raise ConfigError(f"cannot read {override.removeprefix('++')!r}: {str(error).splitlines()[0]}; write KEY=VALUE, "
                              "a list as KEY=[a,b], quoted for the shell where it has spaces or brackets") from error
    return parsed
