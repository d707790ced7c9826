"""From a command line to a checked, typed config: what the three entry points share.

Hydra composes `configs/`. Before it starts, the overrides are checked against the schema and the whole configuration is
composed, typed and validated once, so that a mistake ends in one message and exit code 2 before any folder is made and,
unless it is a keyword of the loss or the environment, before torch is imported.
"""

import difflib
import hashlib
import re
import sys
import traceback
import typing
from pathlib import Path
from typing import Any, Callable

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config import (
    RESUMABLE_KEYS,
    ConfigError,
    EvaluateConfig,
    GenerateConfig,
    TrainConfig,
    bind,
    check_keys,
    dataclass_of,
    escaped,
    key_matches,
    run_folder,
    to_typed,
    unknown_key,
)
from grpo.console import print_error
from grpo.report import SUMMARY_FILE
from grpo.run_table import sweep_summary
from grpo.signals import hold_standard_streams
from grpo.validate import validate, validate_inference

_HERE = Path(__file__).resolve().parent
CONFIG_DIR = next(path for path in (_HERE / "configs", _HERE.parent / "configs") if path.is_dir())  # of a wheel, a checkout
DEFAULT_EXPERIMENT = "quickstart"
# exit codes
FAILED = 1
CONFIG_ERROR = 2
PREEMPTED = 75  # a run that saved itself on a signal
INTERRUPTED = 128 + 2  # as of a process that SIGINT ends
TEXT_KEYS = ("prompt", "instructions")  # taken literally: no quotes needed around what Hydra's grammar would refuse


def schema_of(config_name: str) -> type:
    return {"train": TrainConfig, "evaluate": EvaluateConfig, "generate": GenerateConfig}[config_name]


def launch(config_name: str, task: Callable[[Any], int]) -> int:
    """Runs `task(config)` on the config of this process's command line, for each job of a sweep in turn.

    task: takes the dataclass of `config_name` and returns an exit code. Returns the first code of a job that is not 0;
    a job that was preempted ends the sweep, others that fail are listed at its end. A sweep of training runs leaves a
    table, best run first."""
    hold_standard_streams()
    argv = normalize_argv(sys.argv[1:], config_name)
    codes: list[int] = []
    jobs: list[str] = []  # the overrides of each
    runs: list[Path] = []  # folders of training runs

    def job(cfg: DictConfig) -> None:
        jobs.append(" ".join(HydraConfig.get().overrides.task))
        try:
            config = finish(cfg, config_name, list(HydraConfig.get().overrides.task))
        except ConfigError as error:
            print_error("config error", str(error))
            codes.append(CONFIG_ERROR)
            return
        if config_name == "train":
            runs.append(run_folder(config))
        try:
            codes.append(task(config))
        except Exception:  # the whole traceback, which Hydra would cut, and the sweep's other jobs still run
            print_error("error", traceback.format_exc())
            codes.append(FAILED)
        if codes[-1] == PREEMPTED:
            raise SystemExit(PREEMPTED)

    try:
        check_command_line(argv, config_name)
    except ConfigError as error:
        print_error("config error", str(error))
        return CONFIG_ERROR
    sys.argv[1:] = argv
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(job)()
    except KeyboardInterrupt:  # of a training run only before it starts: it catches the signal itself
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    failed = [f"  {overrides}: exit code {code}" for overrides, code in zip(jobs, codes) if code]
    if failed and len(jobs) > 1:
        print(f"sweep: {len(failed)} of {len(jobs)} runs failed", *failed, sep="\n", file=sys.stderr)
    finished = [run for run in runs if (run / SUMMARY_FILE).is_file()]
    if len(jobs) > 1 and finished:
        table = sweep_summary(finished[0].parent, finished)
        print(table.read_text(encoding="utf-8"), f"sweep: {table}", sep="\n")
    return next((code for code in codes if code), 0)


def load_config(config_name: str, overrides: list[str]) -> Any:
    """The checked config that `python -m grpo.<config_name> OVERRIDES` would run. Raises ConfigError."""
    overrides = normalize_argv(overrides, config_name)
    check_overrides(parse(overrides), schema_of(config_name))
    return compose(config_name, overrides)


def compose(config_name: str, overrides: list[str]) -> Any:
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            cfg = hydra.compose(config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:  # YAMLError names file and line
        raise ConfigError(explain(error)) from error
    return finish(cfg, config_name, overrides)


def finish(cfg: DictConfig, config_name: str, overrides: list[str]) -> Any:
    if config_name == "train":
        if OmegaConf.select(cfg, "name") is None:
            cfg.name = default_name(cfg, overrides)
        config = to_typed(cfg, TrainConfig)
        validate(config)
        return config
    config = to_typed(cfg, schema_of(config_name))
    validate_inference(config)
    return config


def default_name(cfg: DictConfig, overrides: list[str]) -> str:
    """EXPERIMENT-ENV-seedN, and four hex digits of the overrides that change results where there are any: the same
    command finds its run again with resume=true, another one does not collide with it."""
    experiment, relevant = DEFAULT_EXPERIMENT, []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key == "experiment":
            experiment = re.sub(r"[^\w.]+", "-", value).strip("-")
        elif key != "seed" and not key.startswith("hydra") and not key_matches(key, RESUMABLE_KEYS):
            relevant.append(f"{key}={value}")
    target = OmegaConf.select(cfg, "env._target_")
    env = str(target).rpartition(".")[2].lower()
    digest = "-" + hashlib.sha256("\n".join(sorted(relevant)).encode()).hexdigest()[:4] if relevant else ""
    return f"{experiment}-{env}-seed{OmegaConf.select(cfg, 'seed')}{digest}"


def normalize_argv(argv: list[str], config_name: str) -> list[str]:
    """The arguments in the form Hydra takes: `experiment=x` becomes `+experiment=x`, a training run without one gets
    the default, keys below a node (`env.path=x`, `warmup.steps=3`) are set whether the YAML has them or not (the schema
    and `bind` refuse unknown ones), and free text is quoted."""
    normalized = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if argument.startswith("-") or not equals:
            normalized.append(argument)
        elif key == "experiment" or (key in ("model", "env") and config_name != "train"):
            normalized.append("+" + argument)  # Hydra's form for a group that the defaults list leaves out
        elif key in TEXT_KEYS and config_name == "generate" and value != "null" and value[:1] not in ("'", '"'):
            # in Hydra's quoted strings backslashes count only before a quote, the closing one included
            quoted = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), escaped(value))
            normalized.append(f"{key}='{quoted}'")
        elif "." in key and key[0] not in "+~" and not key.startswith("hydra"):
            normalized.append("++" + argument)
        else:
            normalized.append(argument)
    if config_name == "train" and not any(argument.startswith("+experiment=") for argument in normalized):
        normalized.append(f"+experiment={DEFAULT_EXPERIMENT}")
    return normalized


def parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(
            f"cannot read an argument: {str(error).splitlines()[0]}; write KEY=VALUE, quoted where needed: "
            "'KEY=\"a value\"'"
        ) from error


def check_command_line(argv: list[str], config_name: str) -> None:
    """Composes and checks what is about to run; a sweep's first values stand for all of them. A command line with
    Hydra's own flags (--help, --cfg, --config-dir) is left to Hydra."""
    flags = [argument for argument in argv if argument.startswith("-")]
    if any(flag not in ("-m", "--multirun") for flag in flags):
        return
    overrides = [argument for argument in argv if not argument.startswith("-")]
    parsed = parse(overrides)
    check_overrides(parsed, schema_of(config_name))
    single = []
    for text, override in zip(overrides, parsed):
        if flags and override.is_sweep_override():
            text = f"{text.partition('=')[0]}={next(override.sweep_string_iterator())}"
        single.append(text)
    config = compose(config_name, single)
    if isinstance(config, TrainConfig):
        bind(config.loss, "loss")
        bind(config.env, "env")


def check_overrides(overrides: list[Override], schema: type) -> None:
    """Raises ConfigError for keys that the schema lacks and for group files that do not exist."""
    groups = sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())
    for override in overrides:
        key = override.key_or_group
        if key in groups:
            choice = override.value()
            options = sorted(path.stem for path in (CONFIG_DIR / key).glob("*.yaml"))
            choices = choice if isinstance(choice, list) else [choice]
            if (
                not override.is_delete()
                and not override.is_sweep_override()
                and not all(item in options for item in choices)
            ):
                near = difflib.get_close_matches(str(choice), options, n=1)
                hint = f"; did you mean {key}={near[0]}?" if near else ""
                raise ConfigError(
                    f"{key} = {choice!r}: no file configs/{key}/{choice}.yaml{hint or '.'} "
                    f"Available: {', '.join(options)}"
                )
        elif key.split(".")[0] != "hydra" and not key.startswith("hydra/"):
            node = check_path(key, schema, groups)
            if node is not None and isinstance(override.value(), dict):
                check_keys(override.value(), node, key)


def check_path(key: str, schema: type, groups: list[str]) -> type | None:
    """The dataclass at `key`, None for a value; raises ConfigError where the schema has no such key."""
    walked, node = [], schema
    for part in key.split("."):
        hints = typing.get_type_hints(node)
        walked.append(part)
        if part not in hints:
            extra = groups if node is schema else []
            raise unknown_key(".".join(walked), sorted({*hints, *extra}))
        nested = dataclass_of(hints[part])
        if nested is None:
            return None
        node = nested
    return node


def explain(error: Exception) -> str:
    """Hydra's message with that of its cause, on one line."""
    causes = [str(error)]
    if error.__cause__ is not None:
        causes.append(str(error.__cause__))
    return "; ".join(" ".join(cause.split()) for cause in causes)
