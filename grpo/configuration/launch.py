"""From a command line to a checked, typed config and its run: what the three entry points share.

`launch` follows the way: the words of the command line become overrides in Hydra's grammar (`prepare`), Hydra composes
`configs/` and the folders that the command line adds (`compose`), `finish` makes the composed YAML a checked dataclass, and
`run_one` or `run_sweep` hands it to the task. Every job is checked before the first one runs, so that a mistake ends in one
message and exit code 2 before any folder is made and, unless a keyword of the loss or the environment is set, before torch is
imported.
"""

import argparse
import contextlib
import copy
import difflib
import hashlib
import os
import re
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
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
    dataclass_of,
    flatten,
    key_matches,
    key_of_wrong_kind,
    run_folder,
    to_typed,
    type_at,
    wrong_type,
)
from grpo.configuration.command_line import (
    DEFAULT_EXPERIMENT,
    as_typed,
    default_first,
    parse,
    read_flags,
    refuse_repeats,
    repeats,
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
from grpo.configuration.targets import bind, dotted_target, keyword_parameters, resolve_target
from grpo.configuration.validate import validate, validate_inference
from grpo.distributed.place import find_place
from grpo.record.terminal import hold_standard_streams, print_error

_GRPO = Path(__file__).resolve().parent.parent
CONFIG_DIR = next(path for path in (_GRPO / "configs", _GRPO.parent / "configs") if path.is_dir())  # of a wheel, a checkout
# exit codes, beside those of sweeps.py
CONFIG_ERROR = 2
INTERRUPTED = 128 + 2  # as of a process that SIGINT ends
SCHEMAS = {"train": TrainConfig, "evaluate": EvaluateConfig, "generate": GenerateConfig}
NODES = ("env", "loss")  # nodes that name a target


class Loader(ConfigLoaderImpl):
    """Hydra's loader, which composes a choice of files once. Whoever asks for the same files again (each job of a sweep, Hydra's
    launcher, --cfg) gets a copy with the values of its own overrides."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.composed: dict[tuple, DictConfig] = {}

    def load_configuration(self, config_name: str, overrides: list[str], run_mode: RunMode, from_shell: bool = True,
                           validate_sweep_overrides: bool = True) -> DictConfig:
        parsed = parse(overrides)
        tasks = [override for override in parsed if not override.is_hydra_override()]
        choices = [override for override in tasks if self.repository.group_exists(override.key_or_group)]
        chosen = [override.input_line for override in parsed if override.is_hydra_override()]
        chosen += [override.input_line for override in choices]
        key = (config_name, run_mode, *chosen)
        if key not in self.composed:
            self.composed[key] = super().load_configuration(config_name, chosen, run_mode, from_shell, validate_sweep_overrides)
        cfg = copy.deepcopy(self.composed[key])
        self._apply_overrides_to_config(
            [override for override in tasks if override not in choices and not override.is_sweep_override()], cfg)
        cfg.hydra.overrides.task = [override.input_line for override in tasks]
        names = cfg.hydra.job.config.override_dirname
        cfg.hydra.job.override_dirname = get_overrides_dirname(
            tasks, kv_sep=names.kv_sep, item_sep=names.item_sep, exclude_keys=names.exclude_keys)
        return cfg


@dataclass
class CommandPlan:
    """A command line ready to be composed."""

    hydra: Hydra
    config_name: str
    flags: argparse.Namespace  # Hydra's
    parser: argparse.ArgumentParser
    folders: list[str]  # of further configs
    groups: list[str]  # folders of configs that hold choices for this entry point: model, env, ...
    keys: list[str]  # all that can be set, for suggestions
    chosen: list[str] = field(default_factory=list)  # of the overrides those that choose files, targets, Hydra's settings
    overrides: list[str] = field(default_factory=list)  # as Hydra takes them
    repeats: list[str] = field(default_factory=list)  # what to say of keys that are given twice
    params: dict[str, Any] = field(default_factory=dict)  # the sweeper's own
    is_sweep: bool = False
    is_grid: bool = True  # the sweeper takes every combination, and draws none

    @property
    def primary(self) -> str:
        """The name of the file that is composed first."""
        return self.flags.config_name or self.config_name

    @property
    def shows_only(self) -> bool:
        """Whether the command line asks for information and runs nothing."""
        flags = self.flags
        return bool(flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion)


def launch(config_name: str, task: Callable[[Any], int]) -> int:
    """Runs `task(config)` on the config of this process's command line, for each job of a sweep in turn.

    task: takes the dataclass of `config_name` and returns an exit code. Returns the first code of a job that is not 0; a job
    that was preempted ends the sweep, others that fail are listed at its end. A sweep of training runs leaves a table, best run
    first."""
    hold_standard_streams()
    try:
        with prepare(config_name, sys.argv[1:]) as plan:
            if plan.shows_only:
                return show(plan)
            check(plan)
            place = find_place(os.environ)
            for text in plan.repeats if place is None or place.rank == 0 else ():
                print_error("note", f"{text}: the last counts")
            return run_sweep(plan, task) if plan.is_sweep else run_one(plan, task)
    except ConfigError as error:
        refuse(error)
        return CONFIG_ERROR
    except KeyboardInterrupt:  # of a training run only before it starts: it catches the signal itself
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def refuse(error: ConfigError) -> None:
    if speaks_for_node():
        print_error("config error", str(error))


def speaks_for_node() -> bool:
    """Whether this process prints a mistake that all processes find which torchrun started on one node, having one command line.
    torchrun ends all as soon as one has ended, so the others wait for that: the first must have spoken."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["LOCAL_RANK"] == "0":
        return True
    time.sleep(10)
    return False


def load_config(config_name: str, arguments: list[str]) -> Any:
    """The checked config that `python -m grpo.<config_name> ARGUMENTS` would run first. Raises ConfigError."""
    with prepare(config_name, arguments) as plan:
        job = jobs_planned(plan)[0]
        return finish(compose(plan, job), config_name, job)


# ---- from words to overrides


@contextlib.contextmanager
def prepare(config_name: str, arguments: list[str]) -> Iterator[CommandPlan]:
    """The plan of a command line, while Hydra's global state is set up for it. Raises ConfigError; tells what raises UnknownKey
    in the block which keys there are and where the unknown one comes from."""
    schema = SCHEMAS[config_name]
    promised = [key for key in OTHER_NAMES if key.partition(".")[0] in NODES]
    keys = [*leaf_keys(schema, ""), *(key for key in promised if key.partition(".")[0] in typing.get_type_hints(schema))]
    flags, parser = read_flags(arguments, keys)
    folders, words = added_folders(flags)
    search_path = create_config_search_path(os.path.abspath(flags.config_path or CONFIG_DIR))
    for provider, folder in folders:
        search_path.prepend(provider=provider, path=folder, anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    hydra = Hydra(task_name=config_name, config_loader=Loader(search_path))
    GlobalHydra.instance().initialize(hydra)
    of_training = {"experiment", *typing.get_type_hints(TrainConfig)} - typing.get_type_hints(schema).keys()
    others = {"hydra"} if schema is TrainConfig else {"hydra", *of_training}
    groups = [name for name in hydra.config_loader.list_groups("") if name not in others]
    plan = CommandPlan(hydra, config_name, flags, parser, [folder for _, folder in folders], groups, [*keys, *groups])
    try:
        fill(plan, words)
        yield plan
    except UnknownKey as error:
        error.origin = origin_of(plan, error)
        if not error.parent and not error.origin:  # a file chooses no experiment
            error.allowed = sorted({*error.allowed, *groups})
        error.keys = [*plan.keys, *keyword_types(compose(plan, plan.chosen), [])]
        raise
    finally:
        GlobalHydra.instance().clear()


def added_folders(flags: argparse.Namespace) -> tuple[list[tuple[str, str]], list[str]]:
    """(provider, URL) of each folder of configs that the command line adds, and its other words."""
    folders = [("--config-dir", flags.config_dir)] if flags.config_dir else []
    words = []
    for word in flags.overrides:
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
    """Brings the words into Hydra's grammar. Which values are text depends on the environment and the loss, and what a comma
    means on whether the command line is a sweep: so what the words choose is composed first."""
    plan.repeats = repeats(words)
    if plan.config_name != "train":  # of training, scripts append words that replace their own
        refuse_repeats(words)
    words = default_first(words, plan.config_name)
    if plan.flags.multirun:
        words.append("hydra.mode=MULTIRUN")
    plan.chosen = chosen_of(plan, words)
    base = compose(plan, plan.chosen)
    check_composed(plan, base, words)
    plan.is_sweep = base.hydra.mode == RunMode.MULTIRUN
    keywords = keyword_types(base, words)
    kinds = {word: kind_of(plan, word, keywords) for word in words}
    plan.overrides = [to_override(word, kinds[word], is_sweep=plan.is_sweep) for word in words]
    for word, override in zip(words, parse(plan.overrides)):
        key, value, is_optional = override.key_or_group, override.value(), type(None) in typing.get_args(kinds[word])
        if override.is_sweep_override():
            if not plan.is_sweep:
                raise ConfigError(f"{as_typed(str(override.input_line))}: several values for {key}; add -m for a sweep, or "
                                  f"write a list as {key}=[...]")
        elif dataclass_of(kinds[word]) and not (
                isinstance(value, dict) or override.is_delete() or (value is None and is_optional)):
            raise ConfigError(f"{key} = {value!r}: {key} holds keys; set {key}.KEY=VALUE")
    sweeper = OmegaConf.to_container(base.hydra.sweeper, resolve=False)
    plan.is_grid = str(sweeper.get("_target_", "")).endswith("BasicSweeper")
    plan.params = sweeper.get("params") or {}
    if plan.is_sweep and plan.params:
        plan.overrides = replace_params(plan.overrides, plan.params)


def check_composed(plan: CommandPlan, base: DictConfig, words: list[str]) -> None:
    """Raises ConfigError where a file of an experiment keeps its keys to itself, words set keys of a model that nothing chooses,
    or Hydra's own settings cannot be read."""
    of_model = [word for word in words if word.lstrip("+").startswith("model.")]
    if of_model and base.get("model") is None:
        names = ", ".join(plan.hydra.config_loader.get_group_options("model"))
        raise ConfigError(f"{of_model[0]}: no model is chosen here; add +model=NAME with one of {names}, or leave this out where "
                          "run=runs/NAME has its own")
    if "experiment" in base:
        choice = base.hydra.runtime.choices.experiment
        raise ConfigError(f"experiment = {choice!r}: the first line of experiment/{choice}.yaml must be `# @package _global_`; "
                          "without it its keys are no settings of the run")
    for key in ("launcher", "sweeper"):
        if not isinstance(base.hydra[key], DictConfig):
            raise ConfigError(f"hydra.{key} = {base.hydra[key]!r}: hydra.{key} holds keys; choose a file with hydra/{key}=NAME")


def chosen_of(plan: CommandPlan, words: list[str]) -> list[str]:
    """The overrides among the words that choose files, targets and Hydra's settings; of several values the first."""
    chosen = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        is_target = key.endswith("._target_")
        if key.startswith(("hydra.", "hydra/")):
            chosen.append(word)
        elif is_target or key in plan.groups:
            override = parse([to_override(word, str if is_target else None, is_sweep=bool(plan.flags.multirun))])[0]
            choice = override.value()
            if isinstance(choice, dict):  # keys of the node, and no choice of a file
                continue
            if not (is_target or override.is_delete() or override.is_sweep_override() or isinstance(choice, (str, list))):
                raise ConfigError(f"{key} = {choice!r}: no file of configs/{key}; keys below it are set as {key}.KEY=VALUE")
            chosen.append(values_of(override)[0])
    return chosen


def kind_of(plan: CommandPlan, word: str, keywords: dict[str, Any]) -> Any:
    """The type of the value that a word sets, None where Hydra decides. Raises UnknownKey for a key that the schema lacks."""
    key = word.lstrip("+~").partition("=")[0]
    if not key.strip():
        raise ConfigError(f"unknown key {key!r} in {word!r}: write KEY=VALUE")
    if key in plan.groups or key.startswith(("hydra.", "hydra/")) or not ("=" in word or word.startswith("~")):
        return None
    return keywords[key] if key in keywords else type_at(SCHEMAS[plan.config_name], key)


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


def jobs_planned(plan: CommandPlan) -> list[list[str]]:
    """The overrides of each job."""
    if not plan.is_sweep:
        return [plan.overrides]
    settings = [word for word in plan.overrides if word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    return [[*settings, *job] for job in jobs_of(parse(plan.overrides), plan.params, is_grid=plan.is_grid)]


# ---- from overrides to a config


def compose(plan: CommandPlan, overrides: list[str]) -> DictConfig:
    """The composed config with Hydra's node. Raises ConfigError."""
    try:
        return plan.hydra.config_loader.load_configuration(plan.primary, overrides, RunMode.RUN)
    except MissingConfigException as error:
        raise ConfigError(missing_file(error, plan)) from error
    except (HydraException, OmegaConfBaseException, ValueError, AttributeError, yaml.YAMLError) as error:  # with file and line
        is_merge = "Cannot merge" in str(error)  # of a list and a mapping: Hydra's message names no key
        raise ConfigError(is_merge and wrong_kind_in_file(plan) or explain(error)) from error


def finish(cfg: DictConfig, config_name: str, overrides: list[str]) -> Any:
    """The composed config as a dataclass that passed every check. Raises ConfigError."""
    with open_dict(cfg):
        if "${hydra." in str(OmegaConf.to_container(cfg).get("name")):  # ${hydra.runtime.choices.loss} is the file of loss/
            cfg.name = cfg.name
        cfg.pop("hydra", None)
    if config_name != "train":
        config = to_typed(cfg, SCHEMAS[config_name])
        validate_inference(config)
        return config
    with contextlib.suppress(OmegaConfBaseException):  # an interpolation that leads nowhere, which `to_typed` says better
        if OmegaConf.select(cfg, "name") is None:
            cfg.name = default_name(cfg, overrides)
    config = to_typed(cfg, TrainConfig)
    targets = [dotted_target(node) for node in (config.env, config.loss)]
    if not any(target.startswith(("grpo.envs.conversations.", "grpo.supervised.")) for target in targets):  # of data: others
        check_objective("eval.objective", config.eval.objective, config.eval)
        check_objective("checkpoint.best", config.checkpoint.best, config.eval, prefix="eval/")
    validate(config)
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


def check(plan: CommandPlan) -> None:
    """Composes and checks what is about to run. Raises ConfigError."""
    jobs = jobs_planned(plan)[:MAX_CHECKED]
    configs = [finish(compose(plan, job), plan.config_name, job) for job in jobs]
    if plan.config_name == "train":
        check_names([config.name for config in configs], jobs)
        bind(configs[0].env, "env")
        bind(configs[0].loss, "loss")


# ---- running


@dataclass
class Job:
    """The function that Hydra calls for each job, in this process or, pickled, in another one."""

    config_name: str
    task: Callable[[Any], int]
    is_stopped: bool = False  # a signal ended a job of this process: those that follow do not start

    def __call__(self, cfg: DictConfig) -> JobResult:
        if self.is_stopped:
            return outcome(PREEMPTED)
        with open_dict(cfg):  # for names such as ${hydra.runtime.choices.loss}; Hydra has taken the rest of its node away
            cfg.hydra = {"runtime": {"choices": HydraConfig.get().runtime.choices}}
        try:
            config = finish(cfg, self.config_name, list(HydraConfig.get().overrides.task))
        except ConfigError as error:
            refuse(error)
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
            refuse(error)
            return outcome(CONFIG_ERROR, run_dir=run_dir)


def run_one(plan: CommandPlan, task: Callable[[Any], int]) -> int:
    return plan.hydra.run(plan.primary, Job(plan.config_name, task), plan.overrides).return_value.code


def run_sweep(plan: CommandPlan, task: Callable[[Any], int]) -> int:
    with recorded_results() as results:
        problem = None
        try:
            plan.hydra.multirun(plan.primary, Job(plan.config_name, task), plan.overrides)
        except ConfigError:
            raise
        except Exception as error:  # of the sweeper or the launcher, each with kinds of its own
            problem = error
        code = end_sweep(results, command=plan.config_name)
    if problem is not None:
        print(f"sweep: {explain(problem)}", file=sys.stderr)
    return code or (FAILED if problem is not None else 0)


def show(plan: CommandPlan) -> int:
    """--help, --hydra-help, --cfg, --info and --shell-completion. Of a sweep, what they show is the first job."""
    flags, hydra = plan.flags, plan.hydra
    overrides = jobs_planned(plan)[0]
    # what app_help and hydra_help read; the latter composes Hydra's own settings alone
    flags.overrides = [word for word in overrides if not flags.hydra_help or word.startswith("hydra")]
    try:
        if flags.help:
            hydra.app_help(config_name=plan.primary, args_parser=plan.parser, args=flags)
        elif flags.hydra_help:
            hydra.hydra_help(config_name=plan.primary, args_parser=plan.parser, args=flags)
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


# ---- what a message says


def leaf_keys(schema: type, prefix: str) -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(schema).items():
        nested = dataclass_of(hint)
        keys += [prefix + name] if nested is None else leaf_keys(nested, f"{prefix}{name}.")
    return keys


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


def origin_of(plan: CommandPlan, error: UnknownKey) -> str:
    """Which file sets the unknown key, and how to leave it out, with `error.also` where it sets those too; empty where the
    command line does."""
    if not plan.overrides or any(word.lstrip("+~").partition("=")[0].startswith(error.key) for word in plan.overrides):
        return ""  # without overrides, their words are what was read
    origin = ""
    for file, values in chosen_files(plan):
        keys = [key for key in (error.key, *error.also) if any(key_matches(name, (key,)) for name in flatten(values))]
        if keys[:1] == [error.key]:
            origin = f"set by {file}; " + (
                f"~{error.key} leaves it out" if len(keys) == 1 else f"~{' ~'.join(keys)} leave them out")
    return origin


def chosen_files(plan: CommandPlan) -> Iterator[tuple[str, dict | list]]:
    """Each file that the command line composes, as one would type it, and the settings it makes, before they are resolved (a
    list where it holds no settings)."""
    loader = plan.hydra.config_loader
    for default in loader.compute_defaults_list(plan.primary, plan.chosen, RunMode.RUN).defaults:
        loaded = loader.repository.load_config(default.config_path)
        if loaded is None:
            continue
        values = OmegaConf.to_container(loaded.config, resolve=False)
        for name in reversed(default.package.split(".") if default.package else []):
            values = {name: values}
        folder = "configs" if str(loaded.path).removeprefix("file://") == str(CONFIG_DIR) else as_folder(str(loaded.path))
        yield f"{folder}/{default.config_path}.yaml", values


def wrong_kind_in_file(plan: CommandPlan) -> str:
    """Which key of a file holds a list where the schema has a mapping, or the like; empty without one."""
    schema = SCHEMAS[plan.config_name]
    for file, values in chosen_files(plan):
        if not isinstance(values, dict):
            return f"{file}: is a list; expected lines KEY: VALUE"
        key = key_of_wrong_kind(schema, values)
        if key:
            return f"{wrong_type(schema, values, key)}; set by {file}"
    return ""


def explain(error: Exception) -> str:
    """Hydra's message with that of its cause, on one line."""
    causes = [str(error)]
    if error.__cause__ is not None:
        causes.append(str(error.__cause__))
    return "; ".join(" ".join(cause.split()) for cause in causes)
