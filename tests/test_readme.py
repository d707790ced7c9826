"""README.md stays true: its tree, its paths, its error messages, its commands' keys, its metrics."""

import re
import shlex
from pathlib import Path

import pytest
from paths import ROOT

from grpo.config import ConfigError
from grpo.configuration.launch import load_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line.removeprefix("$ "), comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"(\$ )?(python|make) ", line)
]
MISTAKES = [
    (shlex.split(arguments), message)
    for arguments, message in re.findall(r"^\$ python -m grpo\.train (.*)\nconfig error: (.*)$", README, flags=re.MULTILINE)
]


def test_every_file_of_the_packages_stands_in_the_tree():
    tree = README[README.index("## The tree") : README.index("## Where a change goes")]
    for package in ("grpo", "models", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.name == "__init__.py" or re.search(rf"\b{path.stem}\b", tree), f"{path.relative_to(ROOT)}"
    for name in re.findall(r"\b[a-z_]+\.py\b", tree):
        assert list(ROOT.rglob(name)), f"README's tree has {name}, which does not exist"


def test_paths_in_the_text_exist():
    for path in set(re.findall(r"\b(?:grpo|models|kernels|configs|scripts|tests)/[\w/.-]*\w", README)):
        is_example = "NAME" in path or any(path in message for _, message in MISTAKES)
        assert is_example or (ROOT / path).exists(), path


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes_print_what_the_readme_says(arguments, message):
    with pytest.raises(ConfigError) as raised:
        load_config("train", arguments)
    assert str(raised.value) == message


def test_the_readme_shows_mistakes_and_commands():
    assert len(MISTAKES) == 2
    assert len(COMMANDS) > 15


def placed(argument: str, folder: Path) -> str:
    """The argument with the README's stand-ins filled in."""
    (folder / "config.json").touch()
    argument = argument.replace("runs/NAME", "runs/x").replace("=FOLDER", f"={folder}")
    return argument.replace(f"={folder}/adapter", f"={folder}").replace("=runs/x/adapter", f"={folder}")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "-m" in c and c[0] == "python"], ids=" ".join)
def test_commands_of_the_entry_points_pass_the_checks(command, tmp_path):
    name, arguments = command[2].removeprefix("grpo."), [placed(item, tmp_path) for item in command[3:]]
    if "-m" in arguments:  # the first value stands for all of a sweep
        arguments = [re.sub(r"=([^\[,]*),.*", r"=\1", item) for item in arguments if item != "-m"]
    if name in ("train", "evaluate", "generate") and arguments not in [wrong for wrong, _ in MISTAKES]:
        load_config(name, arguments)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "make"], ids=" ".join)
def test_make_targets_exist_and_their_overrides_pass_the_checks(command, tmp_path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{command[1]}:.*##", makefile, flags=re.MULTILINE), command[1]
    variables = dict(item.split("=", 1) for item in command[2:])
    if command[1] in ("train", "sweep"):
        overrides = [placed(item, tmp_path) for item in shlex.split(variables.get("ARGS", ""))]
        load_config("train", [f"+experiment={variables['EXP']}", *overrides])
