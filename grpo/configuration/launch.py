"""From a command line to a checked, typed config: what the three entry points share.

Hydra composes `configs/` and the folders that a command line adds (--config-dir, hydra.searchpath). Before anything runs, the
overrides are checked against the schema and every job's configuration is composed, typed and validated, so that a mistake ends
in one message and exit code 2 before any folder is made and, unless a keyword of the loss or the environment is set, before
torch is imported.
"""

import contextlib
import difflib
import hashlib
import os
import re
import sys
import traceback
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from grpo.config import (
    RESUMABLE_KEYS,
    ConfigError,
    EvaluateConfig,
    GenerateConfig,
    TrainConfig,
    UnknownKey,
    check_keys,
    dataclass_of,
    key_matches,
    run_folder,
    to_typed,
)
from grpo.configuration.command_line import (
    DEFAULT_EXPERIMENT,
    CommandLine,
    as_typed,
    default_first,
    hint_at,
    parse,
    read_command_line,
    to_override,
)
from grpo.configuration.suggestions import OTHER_NAMES
from grpo.configuration.sweeps import (
    FAILED,
    MAX_CHECKED,
    PREEMPTED,
    JobResult,
    check_names,
    check_objective,
    end_sweep,
    jobs_of,
    objective_of,
    outcome,
    recorded_results,
    replace_params,
    values_of,
)
from grpo.configuration.targets import bind, keyword_parameters, resolve_target
from grpo.configuration.validate import validate, validate_inference
from grpo.record.text import print_error
from grpo.run.signals import hold_standard_streams

_GRPO = Path(__file__).resolve().parent.parent
CONFIG_DIR = next(path for path in (_GRPO / "configs", _GRPO.parent / "configs") if path.is_dir())  # of a wheel, a checkout
# exit codes, beside those of sweeps.py
CONFIG_ERROR = 2
INTERRUPTED = 128 + 2  # as of a process that SIGINT ends
SCHEMAS = {"train": TrainConfig, "evaluate": EvaluateConfig, "generate": GenerateConfig}
NODES = ("env", "loss")  # nodes that name a target


@dataclass
class CommandPlan:
    """A command line ready to be composed."""

    hydra: Hydra
    config_name: str
    line: CommandLine
    folders: list[str]  # of further configs
    overrides: list[str] = field(default_factory=list)  # as Hydra takes them
    params: dict[str, Any] = field(default_factory=dict)  # the sweeper's own
    is_sweep: bool = False
    is_grid: bool = True  # the sweeper takes every combination, and draws none
    keys: list[str] = field(default_factory=list)  # all that can be set, for suggestions
    chosen: list[str] = field(default_factory=list)  # of the overrides those that choose files, targets, Hydra's settings
    composed: DictConfig | None = None  # of `overrides`, where it is there already

    @property
    def schema(self) -> type:
        return SCHEMAS[self.config_name]

    @property
    def primary(self) -> str:
        return self.line.flags.config_name or self.config_name


def launch(config_name: str, task: Callable[[Any], int]) -> int:
    """Runs `task(config)` on the config of this process's command line, for each job of a sweep in turn.

    task: takes the dataclass of `config_name` and returns an exit code. Returns the first code of a job that is not 0; a job
    that was preempted ends the sweep, others that fail are listed at its end. A sweep of training runs leaves a table, best run
    first."""
    hold_standard_streams()
    try:
        with prepare(config_name, sys.argv[1:]) as plan:
            if plan.line.shows_only:
                return show(plan)
            check(plan)
            return run_sweep(plan, task) if plan.is_sweep else run_one(plan, task)
    except ConfigError as error:
        print_error("config error", str(error))
        return CONFIG_ERROR
    except KeyboardInterrupt:  # of a training run only before it starts: it catches the signal itself
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def load_config(config_name: str, arguments: list[str]) -> Any:
    """The checked config that `python -m grpo.<config_name> ARGUMENTS` would run first. Raises ConfigError."""
    with prepare(config_name, arguments) as plan:
        return first_config(plan)


# ---- running


@dataclass
class Job:
    """What Hydra runs for each job, in this process or, pickled, in another one."""

    config_name: str
    task: Callable[[Any], int]
    is_stopped: bool = False  # a signal ended a job of this process: those that follow do not start

    def __call__(self, cfg: DictConfig) -> JobResult:
        if self.is_stopped:
            return outcome(PREEMPTED)
        try:
            config = finish(cfg, self.config_name, list(HydraConfig.get().overrides.task))
        except ConfigError as error:
            print_error("config error", str(error))
            return outcome(CONFIG_ERROR)
        try:
            code = self.task(config)
        except Exception:  # the whole traceback, which Hydra would cut, and the sweep's other jobs still run
            print_error("error", traceback.format_exc())
            code = FAILED
        self.is_stopped = code == PREEMPTED
        if self.config_name != "train":
            return outcome(code)
        run_dir = run_folder(config)
        if code or not is_sweep() or not (run_dir / "summary.json").is_file():
            return outcome(code, run_dir=run_dir)
        try:
            return outcome(code, objective_of(run_dir, config.eval), run_dir)
        except ConfigError as error:
            print_error("config error", str(error))
            return outcome(CONFIG_ERROR, run_dir=run_dir)


def run_one(plan: CommandPlan, task: Callable[[Any], int]) -> int:
    result = plan.hydra.run(plan.primary, Job(plan.config_name, task), with_mode(plan.overrides, RunMode.RUN))
    return result.return_value.code


def run_sweep(plan: CommandPlan, task: Callable[[Any], int]) -> int:
    with recorded_results() as results:
        problem = None
        try:
            plan.hydra.multirun(plan.primary, Job(plan.config_name, task), with_mode(plan.overrides, RunMode.MULTIRUN))
        except Exception as error:  # of the sweeper or the launcher, each with kinds of its own
            problem = error
        code = end_sweep(results)
    if problem is not None:
        print(f"sweep: {explain(problem)}", file=sys.stderr)
    return code or (FAILED if problem is not None else 0)


def with_mode(overrides: list[str], mode: RunMode) -> list[str]:
    return [*(word for word in overrides if not word.lstrip("+").startswith("hydra.mode=")), f"hydra.mode={mode.name}"]


def show(plan: CommandPlan) -> int:
    """--help, --hydra-help, --cfg, --info and --shell-completion. Of a sweep, --cfg shows the first job."""
    flags, hydra = plan.line.flags, plan.hydra
    overrides = [word for word in plan.overrides if not flags.cfg or not word.lstrip("+").startswith("hydra.mode=")]
    if flags.cfg and plan.is_sweep:
        overrides = jobs_of(parse(overrides), plan.params, is_grid=plan.is_grid)[0]
    # what app_help and hydra_help read; the latter composes Hydra's own settings alone
    flags.overrides = [word for word in overrides if not flags.hydra_help or word.startswith("hydra")]
    try:
        if flags.help:
            hydra.app_help(config_name=plan.primary, args_parser=plan.line.parser, args=flags)
        elif flags.hydra_help:
            hydra.hydra_help(config_name=plan.primary, args_parser=plan.line.parser, args=flags)
        elif flags.cfg:
            hydra.show_cfg(plan.primary, overrides, flags.cfg, package=flags.package, resolve=flags.resolve)
        elif flags.info:
            hydra.show_info(flags.info, config_name=plan.primary, overrides=overrides)
        else:
            hydra.shell_completion(config_name=plan.primary, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return 0


def is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def typed_words() -> list[str]:
    """The command line of the job that runs, as one would type it: its own values where a sweep varies them. Empty outside
    `launch`."""
    if not HydraConfig.initialized():
        return []
    settings = HydraConfig.get()
    words = []
    for source in settings.runtime.config_sources:
        if source.provider == "--config-dir":
            words += ["--config-dir", str(source.path)]
        elif source.provider == "hydra.searchpath":
            words.append(f"hydra.searchpath=[{source.schema}://{source.path}]")
    words += sorted(map(as_typed, settings.overrides.task), key=lambda word: not word.startswith("+experiment="))
    return [word for word in words if word != f"+experiment={DEFAULT_EXPERIMENT}"]


# ---- composing


@contextlib.contextmanager
def prepare(config_name: str, arguments: list[str]) -> Iterator[CommandPlan]:
    """The plan of a command line, while Hydra's global state is set up for it. Raises ConfigError; tells what raises UnknownKey
    in the block which keys there are and where the unknown one comes from."""
    schema = SCHEMAS[config_name]
    promised = [key for key in OTHER_NAMES if key.partition(".")[0] in NODES]
    keys = [*leaf_keys(schema, ""), *(key for key in promised if key.partition(".")[0] in typing.get_type_hints(schema))]
    line = read_command_line(arguments, keys)
    folders, words = added_folders(line)
    search_path = create_config_search_path(os.path.abspath(line.flags.config_path or CONFIG_DIR))
    for provider, folder in folders:
        search_path.prepend(provider=provider, path=folder, anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2(config_name, search_path)
    plan = CommandPlan(hydra, config_name, line, [folder for _, folder in folders], keys=keys)
    try:
        fill(plan, words)
        yield plan
    except UnknownKey as error:
        error.keys = [*plan.keys, *keyword_types(compose(plan, plan.chosen), [])]
        error.origin = origin_of(plan, error.key, error.also)
        raise
    finally:
        GlobalHydra.instance().clear()


def added_folders(line: CommandLine) -> tuple[list[tuple[str, str]], list[str]]:
    """(provider, URL) of each folder of configs that the command line adds, and its other words."""
    folders = [("--config-dir", line.flags.config_dir)] if line.flags.config_dir else []
    words = []
    for word in line.words:
        key, _, value = word.lstrip("+").partition("=")
        if key == "hydra.searchpath":
            entries = parse([word])[0].value()
            folders += [(key, str(entry)) for entry in (entries if isinstance(entries, list) else [entries])]
        else:
            words.append(word)
    found = []
    for provider, folder in folders:
        scheme, has_scheme, path = folder.rpartition("://")
        if has_scheme and scheme != "file":
            found.append((provider, folder))
        elif not os.path.isdir(os.path.expanduser(path)):
            raise ConfigError(f"{provider} {folder}: no such folder; give one laid out as configs/, with experiment/, loss/, ...")
        else:
            found.append((provider, "file://" + os.path.abspath(os.path.expanduser(path))))
    return found, words


def fill(plan: CommandPlan, words: list[str]) -> None:
    """Brings the words into Hydra's form. Where their meaning depends on it (keywords of environment and loss, values with
    commas), what they choose is composed first: groups, targets, Hydra's own settings."""
    words = default_first(words, plan.config_name)
    groups = [name for name in plan.hydra.config_loader.list_groups("") if name != "hydra"]
    plan.is_sweep = bool(plan.line.flags.multirun)
    plan.keys += groups
    plan.chosen = chosen_of(plan, words, groups)
    depends = plan.is_sweep or any(word.startswith(("env.", "loss.")) or "," in word for word in words)
    base = compose(plan, plan.chosen) if depends else None
    keywords = keyword_types(base, words) if depends else {}
    plan.is_sweep = plan.is_sweep or (depends and base.hydra.mode == RunMode.MULTIRUN)
    hints = [hint_at(word.partition("=")[0], plan.schema, keywords) for word in words]
    plan.overrides = [to_override(word, hint, is_sweep=plan.is_sweep) for word, hint in zip(words, hints)]
    check_overrides(parse(plan.overrides), plan, groups)
    if not depends:
        base = plan.composed = compose(plan, plan.overrides)
        plan.is_sweep = base.hydra.mode == RunMode.MULTIRUN
    sweeper = OmegaConf.to_container(base.hydra.sweeper, resolve=False)
    plan.is_grid = str(sweeper.get("_target_", "")).endswith("BasicSweeper")
    plan.params = sweeper.get("params") or {}
    if plan.is_sweep and plan.params:
        plan.overrides = replace_params(plan.overrides, plan.params)


def chosen_of(plan: CommandPlan, words: list[str], groups: list[str]) -> list[str]:
    """The overrides among the words that choose files, targets and Hydra's settings; of several values the first."""
    chosen = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        is_target = key.endswith("._target_")
        if is_target or key in groups or key.startswith(("hydra.", "hydra/")):
            override = parse([to_override(word, str if is_target else None, is_sweep=plan.is_sweep)])[0]
            choice = override.value()
            is_value = not (word.startswith("~") or override.is_sweep_override() or isinstance(choice, (str, list)))
            if key in groups and is_value:
                raise ConfigError(f"{key} = {choice!r}: no file of configs/{key}; keys below it are set as {key}.KEY=VALUE")
            chosen.append(values_of(override)[0] if key in groups or is_target else word)
    return chosen


def keyword_types(base: DictConfig, words: list[str]) -> dict[str, Any]:
    """The types of the keywords of environment and loss by key (`env.path`): annotations of the target, which is imported only
    where a word sets one of its keywords, and before that str where the YAML has text."""
    types: dict[str, Any] = {}
    for name in NODES:
        node = OmegaConf.select(base, name)
        values = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else {}
        types |= {f"{name}.{key}": str if isinstance(value, str) and value != "???" else None for key, value in values.items()}
        if "_target_" in values and any(word.startswith(f"{name}.") for word in words):
            with contextlib.suppress(ConfigError):  # `bind` says it better
                parameters = keyword_parameters(resolve_target(values["_target_"], name))
                known = {key: item.annotation for key, item in parameters.items() if item.annotation is not item.empty}
                types |= {f"{name}.{key}": annotation for key, annotation in known.items()}
    return types


def compose(plan: CommandPlan, overrides: list[str]) -> DictConfig:
    """The composed config with Hydra's node. Raises ConfigError."""
    try:
        return plan.hydra.compose_config(plan.primary, overrides, RunMode.RUN, with_log_configuration=False, from_shell=False,
                                         validate_sweep_overrides=False)
    except MissingConfigException as error:
        raise ConfigError(missing_file(error, plan)) from error
    except (HydraException, OmegaConfBaseException, ValueError, AttributeError, yaml.YAMLError) as error:  # with file and line
        raise ConfigError(explain(error)) from error


def missing_file(error: MissingConfigException, plan: CommandPlan) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    if not group or error.options is None:
        return explain(error)
    near = difflib.get_close_matches(choice, error.options, n=1)
    hint = f"; did you mean {group}={near[0]}?" if near else "."
    if group in NODES and re.search("[.:]", choice):
        hint = f"; did you mean {group}._target_={choice}?"
    places = " or ".join(f"{folder}/{group}/{choice}.yaml" for folder in ("configs", *map(as_folder, plan.folders)))
    return f"{group} = {choice!r}: no file {places}{hint} Available: {', '.join(sorted(error.options))}"


def as_folder(url: str) -> str:
    path = url.removeprefix("file://")
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def finish(cfg: DictConfig, config_name: str, overrides: list[str]) -> Any:
    with open_dict(cfg):
        cfg.pop("hydra", None)
    if config_name == "train":
        if OmegaConf.select(cfg, "name") is None:
            cfg.name = default_name(cfg, overrides)
        config = to_typed(cfg, TrainConfig)
        check_objective(config.eval)
        validate(config)
        return config
    config = to_typed(cfg, SCHEMAS[config_name])
    validate_inference(config)
    return config


def default_name(cfg: DictConfig, overrides: list[str]) -> str:
    """EXPERIMENT-ENV-seedN, and four hex digits of the overrides that change results where there are any: the same
    command finds its run again with resume=true, another one does not collide with it."""
    experiment, relevant = DEFAULT_EXPERIMENT, []
    for override in overrides:
        key, _, value = as_typed(override).lstrip("+~").partition("=")
        if key == "experiment":
            experiment = re.sub(r"[^\w.]+", "-", value).strip("-")
        elif key != "seed" and not key.startswith("hydra") and not key_matches(key, RESUMABLE_KEYS):
            relevant.append(f"{key}={value}")
    target = OmegaConf.select(cfg, "env._target_")
    env = re.split("[.:]", str(target))[-1].lower()
    digest = "-" + hashlib.sha256("\n".join(sorted(relevant)).encode()).hexdigest()[:4] if relevant else ""
    return f"{experiment[:80]}-{env[:40]}-seed{OmegaConf.select(cfg, 'seed')}{digest}"


# ---- checking


def jobs_planned(plan: CommandPlan) -> list[list[str]]:
    """The overrides of each job, Hydra's own settings aside."""
    if not plan.is_sweep:
        return [plan.overrides]
    return jobs_of(parse(plan.overrides), plan.params, is_grid=plan.is_grid)


def first_config(plan: CommandPlan) -> Any:
    job = jobs_planned(plan)[0]
    composed, plan.composed = plan.composed if job == plan.overrides else None, None
    return finish(compose(plan, job) if composed is None else composed, plan.config_name, job)


def check(plan: CommandPlan) -> None:
    """Composes and checks what is about to run. Raises ConfigError."""
    config = first_config(plan)
    if plan.is_sweep and plan.config_name == "train":
        jobs = jobs_planned(plan)[:MAX_CHECKED]
        check_names([finish(compose(plan, job), plan.config_name, job).name for job in jobs], jobs)
    if isinstance(config, TrainConfig):
        for name in NODES:
            bind({"loss": config.loss, "env": config.env}[name], name)


def check_overrides(overrides: list[Override], plan: CommandPlan, groups: list[str]) -> None:
    """Raises ConfigError for keys that the schema lacks, and for several values outside a sweep."""
    for override in overrides:
        key = override.key_or_group
        if override.is_sweep_override() and not plan.is_sweep:
            raise ConfigError(f"{as_typed(str(override.input_line))}: several values for {key}; add -m for a sweep, or write a "
                              f"list as {key}=[...]")
        if key in groups or key.split(".")[0] == "hydra" or key.startswith("hydra/"):
            continue
        node = check_path(key, plan.schema, groups)
        value = override.value()
        if node is not None and isinstance(value, dict):
            check_keys(value, node, key)
        elif node is not None and value is not None and not override.is_delete() and not override.is_sweep_override():
            raise ConfigError(f"{key} = {value!r}: {key} holds keys; set {key}.KEY=VALUE")


def check_path(key: str, schema: type, groups: list[str]) -> type | None:
    """The dataclass at `key`, None for a value; raises ConfigError where the schema has no such key."""
    walked, node = [], schema
    for part in key.split("."):
        hints = typing.get_type_hints(node)
        walked.append(part)
        if part not in hints:
            extra = groups if node is schema else []
            raise UnknownKey(".".join(walked), [*hints, *extra], typed=key)
        nested = dataclass_of(hints[part])
        if nested is None:
            return None
        node = nested
    return node


def leaf_keys(schema: type, prefix: str) -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(schema).items():
        nested = dataclass_of(hint)
        keys += [prefix + name] if nested is None else leaf_keys(nested, f"{prefix}{name}.")
    return keys


def origin_of(plan: CommandPlan, key: str, also: list[str]) -> str:
    """Which file sets an unknown key, and how to leave it out, with `also` where it sets those too; empty where the
    command line does."""
    if any(word.lstrip("+~").partition("=")[0].startswith(key) for word in plan.overrides):
        return ""
    loader, origin = plan.hydra.config_loader, ""
    overrides = [word for word in plan.overrides if not parse([word])[0].is_sweep_override()]
    for default in loader.compute_defaults_list(plan.primary, overrides, RunMode.RUN).defaults:
        loaded = loader.repository.load_config(default.config_path)
        package = f"{default.package}." if default.package else ""
        if loaded is None or not key.startswith(package):
            continue
        node: Any = OmegaConf.to_container(loaded.config, resolve=False)
        *parents, name = key.removeprefix(package).split(".")
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and name in node:
            keys = [key, *(other for other in also if other.rpartition(".")[2] in node)]
            folder = "configs" if str(loaded.path).removeprefix("file://") == str(CONFIG_DIR) else as_folder(str(loaded.path))
            origin = f"set by {folder}/{default.config_path}.yaml; " + (
                f"~{key} leaves it out" if len(keys) == 1 else f"~{' ~'.join(keys)} leave them out")
    return origin


def explain(error: Exception) -> str:
    """Hydra's message with that of its cause, on one line."""
    causes = [str(error)]
    if error.__cause__ is not None:
        causes.append(str(error.__cause__))
    return "; ".join(" ".join(cause.split()) for cause in causes)
