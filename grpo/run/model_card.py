"""The README.md of an export: a front matter that the hub parses, and how the policy was trained, prompted and measured."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from grpo.config import Train, TrainConfig, to_dict
from grpo.configuration.places import without_folders
from grpo.record.summary import read_metrics, series
from grpo.run.identity import version_of
from models.lora import LoraConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LIBRARIES = ("torch", "triton", "safetensors", "tokenizers")
DATA_KEYS = ("path", "subset", "split", "eval_path", "eval_split", "held_out_fraction", "prompt_key", "answer_key", "match")
PROMPT_KEYS = ("reasoning_effort", "reasoning_effort_key", "current_date", "instructions", "question_template", "builtin_tools")
LICENSE_KEYS = ("license", "license_name", "license_link")
SETTINGS = ("loss", "advantage", "kl", "rollout", "optim", "warmup")


@dataclass
class Origin:
    """Where a policy comes from, as far as it is known, and what its export will be called."""

    base: str | None  # folder or hub id of the checkpoint that training began with; None: weights drawn from the seed
    tokenizer_folder: Path | None = None
    config: TrainConfig | None = None  # of the run
    run_dir: Path | None = None
    step: int | None = None  # finished steps of the run
    base_id: str | None = None  # hub id of the base, where `base` is a folder and the id is known
    name: str | None = None  # hub id of the export

    def __post_init__(self) -> None:
        if self.base_id is None and self.base is not None:
            self.base_id = hub_id(self.base)

    @property
    def base_name(self) -> str | None:
        """The base as an adapter names it: its hub id, else an absolute path, which means the same from every folder."""
        return self.base_id or (self.base and str(Path(self.base).expanduser().absolute()))

    def base_file(self, name: str) -> Path | None:
        """A file of the base, if it is on this machine."""
        if self.base is None or not HUB_ID.fullmatch(self.base) or Path(self.base).is_dir():
            path = self.base and Path(self.base).expanduser() / name
            return path if path and path.is_file() else None
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.base, name)
        return Path(found) if isinstance(found, str) else None


def hub_id(source: str) -> str | None:
    """The hub id of a checkpoint given as hub id or as a folder of the hub's cache; None for other folders."""
    path = Path(source).expanduser()
    if not path.exists():
        return source if HUB_ID.fullmatch(source) else None
    cached = [part for part in path.resolve().parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/", 1) if cached else None


def model_card(origin: Origin, lora: LoraConfig | None, left_out: list[str], *, is_adapter: bool, is_merged: bool) -> str:
    """The text of README.md for an export of a policy that carries `lora`."""
    config = origin.config
    name = origin.name or (config.name if config else None) or "gpt-oss export"
    kind = "A LoRA adapter" if is_adapter else "A model with its LoRA adapter merged" if is_merged else "A model"
    base = f"[{origin.base_id}](https://huggingface.co/{origin.base_id})" if origin.base_id else (
        "weights drawn from a seed" if origin.base is None else f"a local checkpoint, {Path(origin.base).name}")
    trained = f", trained with GRPO for {origin.step} steps" if config else ""
    about = f"{kind} of gpt-oss, from {base}{trained}."
    paragraphs = [f"# {name.rpartition('/')[2]}", about, "## Use", _usage(origin, is_adapter)]
    if config is not None:
        paragraphs += _training(origin, config, lora)
    elif lora is not None:
        paragraphs.append(f"{_trained(None, lora)}.")
    if left_out:
        paragraphs += ["## Left out", "\n".join(f"- {item}" for item in left_out)]
    return f"---\n{_front_matter(origin, is_adapter)}\n---\n\n" + "\n\n".join(paragraphs) + "\n"


def _front_matter(origin: Origin, is_adapter: bool) -> str:
    is_trained = origin.config is not None
    tags = ["gpt_oss", *(["grpo", "reinforcement-learning"] if is_trained else []), *(["lora"] if is_adapter else [])]
    data = (origin.config.env if is_trained else {}).get("path")
    datasets = [path for path in (data if isinstance(data, list) else [data]) if _is_hub_id(path)]
    relation = "adapter" if is_adapter else "finetune" if is_trained else None
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=origin.base_id, base_model_relation=relation if origin.base_id else None,
        library_name="peft" if is_adapter else "transformers", pipeline_tag="text-generation", tags=tags,
        datasets=datasets or None, **_license(origin)).to_yaml()


def _license(origin: Origin) -> dict[str, str]:
    """What the base states of its license."""
    from huggingface_hub.repocard import metadata_load

    path = origin.base_file("README.md")
    try:
        stated = (metadata_load(path) or {}) if path else {}
    except (ValueError, yaml.YAMLError):
        return {}  # a README without front matter that can be read states nothing
    return {key: stated[key] for key in LICENSE_KEYS if isinstance(stated.get(key), str)}


def _usage(origin: Origin, is_adapter: bool) -> str:
    name, base = origin.name or "FOLDER", origin.base_id or "BASE"
    lines = ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
             f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
             f'model = AutoModelForCausalLM.from_pretrained("{base if is_adapter else name}", dtype="auto", device_map="auto")']
    if is_adapter:
        lines.insert(2, "from peft import PeftModel")
        lines.append(f'model = PeftModel.from_pretrained(model, "{name}")')
    return "\n".join([*lines, "```"])


def _training(origin: Origin, config: TrainConfig, lora: LoraConfig | None) -> list[str]:
    config = replace(config, env=without_folders(config.env), loss=without_folders(config.loss))
    rollout, optim, env = config.rollout, config.optim, config.env
    recipe = {
        "run": config.name, "steps": f"{origin.step} of {config.steps}", "trained": _trained(config, lora),
        "loss": ", ".join([re.split("[.:]", config.loss["_target_"])[-1],
                           *(f"{key} {value}" for key, value in config.loss.items() if key != "_target_")]),
        "learning rate": f"{optim.lr:g}, {optim.schedule}",
        "prompts a step": rollout.prompts_per_step, "completions a prompt": rollout.group_size,
        "tokens a completion": f"at most {rollout.max_new_tokens}", "temperature": f"{rollout.temperature:g}",
        "KL coefficient": f"{config.kl.coefficient:g}", "seed": config.seed}
    data = {"environment": env["_target_"]} | {key: _public(env[key]) for key in DATA_KEYS if env.get(key) is not None}
    if isinstance(env.get("rewards"), list) and env["rewards"]:
        data["rewards"] = "; ".join(map(_reward, env["rewards"]))
    prompts = {key: env[key] for key in PROMPT_KEYS if env.get(key) is not None}
    settings = {key: value for key, value in to_dict(config).items() if key in SETTINGS and value is not None}
    settings.get("warmup", {}).pop("cache_dir", None)
    versions = [f"{library} {version}" for library in LIBRARIES if (version := version_of(library))]  # triton is for GPUs
    return [
        "## Training", _table(("", ""), recipe.items()), "## Data", _table(("", ""), data.items()), "## Prompts",
        "Prompts are harmony messages, as the chat template of gpt-oss renders them. Other settings than those of training give "
        "other results.",
        _table(("setting", "value"), prompts.items()) if prompts else f"The environment `{env['_target_']}` writes them.",
        *_results(origin), "## Settings", f"```yaml\n{yaml.safe_dump(settings, sort_keys=False).strip()}\n```",
        f"Versions: {', '.join(versions)}."]


def _reward(entry: dict | str) -> str:
    """A reward function by its name, and its weight."""
    entry = entry if isinstance(entry, dict) else {"fn": entry}
    return f"{entry.get('fn')}, weight {entry.get('weight', 1.0)}"


def _trained(config: TrainConfig | None, lora: LoraConfig | None) -> str:
    if lora is None or (config is not None and config.model.train == Train.full):
        return "all weights"
    adapter = [f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"] if lora.targets else []
    return "; ".join([*adapter, *(["norms"] if lora.train_norms else []), *(["sinks"] if lora.train_sinks else [])])


def _results(origin: Origin) -> list[str]:
    """The first and the last value of each evaluation and of the reward, up to the step that is exported."""
    rows = [row for row in read_metrics(origin.run_dir) if row["step"] <= origin.step] if origin.run_dir else []
    shown = []
    for name in sorted({name for row in rows for name in row if name == "reward" or name.startswith("eval/")}):
        values = [f"{value:.3f} (step {step})" for step, value in zip(*series(rows, name)) if math.isfinite(value)]
        if values:
            shown.append((name, values[0], values[-1]))
    return ["## Results", _table(("metric", "first", "last"), shown)] if shown else []


def _table(head: tuple[str, ...], rows: Iterable[tuple]) -> str:
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


def _is_hub_id(path: object) -> bool:
    return isinstance(path, str) and HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def _public(value: object) -> object:
    """Paths of this machine by their last part: a card is read elsewhere."""
    if isinstance(value, list):
        return ", ".join(str(_public(item)) for item in value)
    return Path(value).name + " (local)" if isinstance(value, str) and Path(value).is_absolute() else value
