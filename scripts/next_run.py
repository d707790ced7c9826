"""Prints what `python -m grpo.train ARGS` needs beside ARGS to run once more: nothing where its run does not exist yet,
`name=NAME resume=true` to go on with an unfinished one, `name=NAME-2` (or a higher number) where it has finished.

    python -m grpo.train $(python scripts/next_run.py ARGS) ARGS

A run that was started with another configuration is left alone. Used by `make quickstart`.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo.config import ConfigError, read_saved_config, run_folder, settings_of_steps  # noqa: E402
from grpo.configuration.launch import load_config  # noqa: E402
from grpo.configuration.places import anchor_paths  # noqa: E402


def next_run(arguments: list[str]) -> list[str]:
    """The overrides to add; none where the arguments decide themselves, or where training will refuse them."""
    if any(argument.startswith(("-", "name=", "resume=")) for argument in arguments):
        return []
    try:
        config = load_config("train", arguments)
    except ConfigError:
        return []
    anchor_paths(config)
    default_name = config.name
    for number in itertools.count(1):
        config.name = default_name if number == 1 else f"{default_name}-{number}"
        run_dir = run_folder(config)
        checkpoints = [path.name for path in (run_dir / "checkpoints").glob("step_*")]
        if not checkpoints:
            return [] if number == 1 else [f"name={config.name}"]
        try:
            if settings_of_steps(read_saved_config(run_dir / "config.yaml")) != settings_of_steps(config):
                continue
        except ConfigError:
            continue
        steps = [int(name[5:]) for name in checkpoints if name[5:].isdigit()]  # no copies with other names
        if max(steps, default=0) < config.steps:
            return [f"name={config.name}", "resume=true"]


if __name__ == "__main__":
    print(*next_run(sys.argv[1:]))
