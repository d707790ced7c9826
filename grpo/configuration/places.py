"""Where the files lie that a config names: absolute in a saved config, and no part of what a run is."""
import os
import re
from collections.abc import Callable
from typing import Any

from grpo.config import TrainConfig

_CODE = re.compile(r"([^\n]+\.py)(:[\w.]+)")  # FILE.py:NAME


def anchor_paths(config: TrainConfig) -> None:
    """Makes the relative paths of model, environment and loss absolute, in place, so that the saved config means the same
    files from every folder. What names no file here (a hub id, say) stays as it is."""
    model = config.model
    model.path, model.tokenizer = anchored(model.path), anchored(model.tokenizer)
    if model.lora is not None and model.lora.adapter is not None:
        model.lora.adapter = os.path.abspath(os.path.expanduser(model.lora.adapter))  # never a hub id; may be gone by now
    config.env, config.loss = rename_code(config.env, anchored), rename_code(config.loss, anchored)
    for key, value in config.env.items():
        if key == "path" or key.endswith("_path"):
            config.env[key] = [anchored(item) for item in value] if isinstance(value, list) else anchored(value)


def anchored(value: Any) -> Any:
    if not isinstance(value, str) or not value:
        return value
    path = os.path.expanduser(value)
    return os.path.abspath(path) if os.path.exists(path) else value


def rename_code(value: Any, rename: Callable[[str], str]) -> Any:
    """The value, also of lists and dicts, with `rename` of each file that a text of the form FILE.py:NAME names code in."""
    if isinstance(value, dict):
        return {key: rename_code(item, rename) for key, item in value.items()}
    if isinstance(value, list):
        return [rename_code(item, rename) for item in value]
    match = _CODE.fullmatch(value) if isinstance(value, str) else None
    return value if match is None else rename(match[1]) + match[2]


def without_folders(value: Any) -> Any:
    """The value with the code that it names by the name of its file alone, which is the same wherever that lies."""
    return rename_code(value, os.path.basename)
