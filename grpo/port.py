"""A recipe of another trainer as an experiment of ours: python -m grpo.port trl|verl|slime|prime FILE > conf/experiment/NAME.yaml

Prints YAML for `python -m grpo.train --config-dir conf +experiment=NAME`, and above it, as comments, all that differs in meaning
or has no counterpart: no name of the file is passed over. The file is read, never run.

trl: Python with GRPOConfig(...), YAML, or a launch script; verl: a launch script of Hydra overrides, or YAML; slime (and miles):
a launch script; prime: prime-rl's TOML.
"""
import re
import sys
import textwrap
import tomllib
from pathlib import Path

import yaml

from grpo.porting import prime, slime, trl, verl
from grpo.porting.recipe import Recipe
from grpo.record.terminal import print_error

FRAMEWORKS = {"trl": trl, "verl": verl, "slime": slime, "prime": prime}


def ported(framework: str, path: Path) -> str:
    """The experiment for a recipe. Raises ValueError and OSError, which name the file."""
    module = FRAMEWORKS[framework]
    try:
        found = module.read(path.read_text(encoding="utf-8"), path.name)
    except (ValueError, SyntaxError, yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a recipe of {framework}: {' '.join(str(error).split())[:300]}") from error
    try:
        return written(module.port(found), f"{framework} {path.name}")
    except ZeroDivisionError as error:
        raise ValueError(f"{path}: a learning rate, batch or number of steps in it is 0, by which {framework} divides") from error


def written(recipe: Recipe, source: str) -> str:
    unknown = {key: value for key, value in recipe.settings.items()
               if key != "env.instructions" and re.search(r"\$[A-Za-z_{(]", str(value))}
    settings = {key: value for key, value in recipe.settings.items() if key not in unknown}
    head = [f"Ported from {source} by python -m grpo.port."]
    differs = [f"differs: {remark}" for remark in recipe.remarks]
    differs += [f"not carried: {text}" for text in recipe.not_carried]
    differs += [f"not carried: {key} = {value!r}: the file does not say what the variable is" for key, value in unknown.items()]
    if recipe.no_account:
        differs.append(f"of no account here (engine, distribution, logs): {', '.join(recipe.no_account)}")
    groups = {"model": settings.pop("/model"), "env": "dataset", "loss": recipe.loss, "optim": settings.pop("/optim"),
              "rollout": "default"}
    defaults = [{f"override /{group}": name} for group, name in groups.items()]
    if "steps" not in settings:
        settings["steps"] = 200
        differs.append("differs: the file gives no number of steps: steps is 200")
    if {"env.eval_split", "env.eval_path"} & settings.keys():
        settings["env.held_out_fraction"] = None
    settings |= {"device": "auto", "dtype": "auto"}
    tree: dict = {"defaults": defaults}
    for key in sorted(settings, key=lambda key: (key.count("."), key)):
        node = tree
        *parents, name = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = settings[key]
    comments = [line for text in (*head, *differs) for line in textwrap.wrap(text, 110, subsequent_indent="    ")]
    body = yaml.safe_dump(tree, sort_keys=False, width=120)
    return "# @package _global_\n" + "".join(f"# {line}\n" for line in comments) + body


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in FRAMEWORKS:
        print_error("error", f"expected: python -m grpo.port {'|'.join(FRAMEWORKS)} FILE")
        return 2
    try:
        print(ported(arguments[0], Path(arguments[1]).expanduser()), end="")
    except (OSError, ValueError) as error:
        print_error("error", str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
