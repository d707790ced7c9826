"""A recipe of another trainer, name by name, as settings of ours: the tables of grpo/porting/ are made of rules.

Every name of a recipe ends in one of four ways: a setting of ours, with a remark if it means something else; of no account here
(serving engines, ways of distributing, logs); handled together with others by the framework's `settle`; or "not carried".
"""
import re
from collections.abc import Callable
from dataclasses import dataclass, field

LOSSES_WITH_CLIP = ("grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo", "gmpo", "clip_cov", "dppo_tv", "dppo_kl",
                    "reinforce_plus_plus", "reinforce_plus_plus_baseline")


class Unknown(str):
    """What stands in a program where its value is known only when it runs."""


@dataclass
class Rule:
    """What becomes of one name."""

    key: str | None  # of our config; None: the value matters to `settle` alone
    convert: Callable[[object], object] = lambda value: value  # a ValueError's text says why the value has no counterpart
    remark: str | None = None  # what differs in meaning


@dataclass
class Recipe:
    found: dict[str, object]  # what the file says, by the framework's names
    settings: dict[str, object] = field(default_factory=dict)  # of ours, by dotted key
    remarks: list[str] = field(default_factory=list)
    no_account: list[str] = field(default_factory=list)
    not_carried: list[str] = field(default_factory=list)
    loss: str = "dapo"  # file of configs/loss/

    def get(self, *names: str, default: object = None) -> object:
        """The value of the first of these names that the file has."""
        return next((self.found[name] for name in names if self.found.get(name) is not None), default)

    def number(self, *names: str, default: float | None = None) -> float | None:
        """The same, as a number; the default for what is none, which is then named."""
        value = self.get(*names, default=default)
        try:
            return default if value is None else number(value)
        except ValueError as problem:
            name = next(name for name in names if self.found.get(name) is not None)
            text = f"{name} = {value!r}: {problem}"
            if text not in self.not_carried:
                self.not_carried.append(text)
            return default

    def is_true(self, name: str, *, default: bool) -> bool:
        try:
            return truth(self.get(name, default=default))
        except ValueError as problem:
            self.not_carried.append(f"{name} = {self.found[name]!r}: {problem}")
            return default

    def set_model(self, name: object) -> None:
        """The base model, which must be a gpt-oss."""
        text = "" if isinstance(name, Unknown) else str(name or "")
        if "gpt-oss" in text.lower() or "gpt_oss" in text.lower():
            self.settings["model.path"] = text
        else:
            self.settings["model.path"] = "openai/gpt-oss-20b"
            self.remarks.append(f"model {text or '(none)'}: only gpt-oss is trained here, so model.path is openai/gpt-oss-20b")
        is_large = "120b" in text.lower()
        self.settings["/model"] = "gpt_oss_120b" if is_large else "gpt_oss_20b"

    def set_lora(self, *, rank: float | None, alpha: float | None, targets: object) -> None:
        """LoRA where the recipe has it; without, LoRA all the same, which is what packed experts can train."""
        self.settings["/optim"] = "lora"
        if rank is None or rank < 1:
            self.remarks.append("the recipe trains all weights; here LoRA trains attention and experts, with the recipe's "
                                "learning rate, for which 10 times more is usual. All weights: model.train=full model.lora=null "
                                "model.experts=bf16, as in configs/experiment/gpt_oss_20b_full.yaml")
            return
        self.settings["model.lora.rank"] = int(rank)
        if alpha is not None:
            self.settings["model.lora.alpha"] = float(alpha)
        if targets is not None:
            self.remarks.append(f"adapter targets {targets!r}: model.lora.targets is ours, attention and experts")

    def set_loss(self, name: str, *, low: float | None = None, high: float | None = None, normalizer: str | None = None,
                 max_ratio: float | None = None, min_ratio: float | None = None, dual_clip: float | None = None,
                 temperature_positive: float | None = None, temperature_negative: float | None = None,
                 share: float | None = None) -> None:
        """The file of configs/loss/, and its keywords; None: as the file has them. Losses without a clip take no bounds."""
        self.loss = name
        has_clip = name in LOSSES_WITH_CLIP
        keywords = {"clip_low": low if has_clip else None, "clip_high": (low if high is None else high) if has_clip else None,
                    "normalizer": normalizer, "max_ratio": max_ratio, "min_ratio": min_ratio,
                    "dual_clip": dual_clip, "share": share, "temperature_positive": temperature_positive,
                    "temperature_negative": temperature_negative}
        self.settings |= {f"loss.{key}": value if isinstance(value, str) else float(value)
                          for key, value in keywords.items() if value is not None}

    def set_batch(self, *, prompts: float | None, updates: float | None = None) -> None:
        """Prompts of a step, and the updates that it makes of them."""
        if prompts is not None and prompts >= 1:
            self.settings["rollout.prompts_per_step"] = int(prompts)
            if prompts != int(prompts):
                self.remarks.append(f"a step has {prompts:g} prompts there: {int(prompts)} here")
        else:
            self.not_carried.append(f"a batch of {prompts} prompts: rollout.prompts_per_step is ours")
        if updates is not None and updates > 1:
            self.settings["optim.minibatches"] = int(updates)

    def set_schedule(self, kind: object, *, warmup_share: float | None, min_ratio: float | None) -> None:
        name = str(kind or "constant").lower()
        known = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
                 "cosine_with_min_lr": "cosine"}
        if known.get(name) is None:
            self.not_carried.append(f"schedule {name}: constant, linear and cosine there are")
            name = "constant"
        self.settings["optim.schedule"] = known[name]
        if known[name] == "constant":
            self.settings.pop("optim.decay_steps", None)
        self.settings["optim.final_lr_ratio"] = 0.0 if min_ratio is None else float(min_ratio)
        self.settings.setdefault("optim.warmup_steps", 0)
        if warmup_share:
            steps = self.settings.get("steps")
            if steps is None:
                self.not_carried.append(f"a warm-up of {warmup_share:g} of all steps, whose number the file does not give: set "
                                        "optim.warmup_steps")
            else:
                updates = int(steps) * self.settings.get("optim.minibatches", 1) * self.settings.get("optim.epochs", 1)
                self.settings["optim.warmup_steps"] = round(warmup_share * updates)

    def keep_equal_groups(self) -> None:
        """For trainers that train on whatever groups a step drew."""
        self.settings["rollout.refill_rounds"] = 0
        self.remarks.append("groups with equal rewards are dropped here; there they count as zero in the mean over tokens")

    def set_rewards(self, rewards: list[str], weights: list[float]) -> None:
        """Reward functions by path; others by name are the user's to place."""
        known = [name for name in rewards if re.fullmatch(r"[\w./-]+:\w+", name)]
        self.not_carried += [f"reward {name!r}: name it as file.py:function or package.module:function in env.rewards"
                             for name in rewards if name not in known]
        if known:
            numbers = weights if len(weights) == len(rewards) else [1.0] * len(rewards)
            self.settings["env.rewards"] = [{"fn": name, "weight": float(weight)} for name, weight in zip(rewards, numbers)
                                            if name in known]
            self.settings |= {"env.match": "none", "env.answer_key": None}


def apply(found: dict[str, object], table: dict[str, Rule], of_no_account: str) -> Recipe:
    """The recipe after its rules. of_no_account: a regular expression of whole names."""
    recipe = Recipe(found)
    for name, value in found.items():
        if name not in table and value in (None, {}):  # says nothing
            recipe.no_account.append(name)
            continue
        if name not in table:
            (recipe.no_account if re.fullmatch(of_no_account, name) else recipe.not_carried).append(
                name if re.fullmatch(of_no_account, name) else f"{name} = {value!r}")
            continue
        rule = table[name]
        if rule.key is not None and isinstance(value, Unknown):
            recipe.not_carried.append(f"{name} = {value}: is known only when the program runs")
            continue
        try:
            converted = rule.convert(value)
        except (ValueError, TypeError, KeyError) as problem:
            if value is None:
                continue
            recipe.not_carried.append(f"{name} = {value!r}" + (f": {problem}" if isinstance(problem, ValueError) else ""))
            continue
        if rule.key is not None and converted is not None:
            recipe.settings[rule.key] = converted
        if rule.remark is not None:
            recipe.remarks.append(f"{name}: {rule.remark}")
    return recipe


def number(value: object) -> float:
    """A number as it is or as text. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("is no number")
    try:
        found = float(value)
    except ValueError as error:
        raise ValueError("is no number that the file itself gives") from error
    return int(found) if found.is_integer() and not (isinstance(value, str) and re.search("[.e]", value)) else found


def real(value: object) -> float:
    return float(number(value))


def whole(value: object) -> int:
    found = number(value)
    if found != int(found):
        raise ValueError("is no whole number")
    return int(found)


def adam(value: object) -> str:
    if str(value).lower() not in ("adam", "adamw"):
        raise ValueError("AdamW in its place")
    return str(value)


def effort(value: object) -> str:
    if str(value) not in ("low", "medium", "high"):
        raise ValueError("low, medium and high there are")
    return str(value)


def truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "1", "yes"):
        return True
    if str(value).lower() in ("false", "0", "no", "none", "null"):
        return False
    raise ValueError("is neither true nor false")


def top_k(value: object) -> int:
    """0 is off here, elsewhere -1 or none too."""
    return 0 if value in (None, "None", "null") else max(0, whole(value))


def every(value: object) -> int:
    """An interval in steps; elsewhere -1, false or none is never."""
    return 0 if value in (False, None) else max(0, whole(value))


def group_size(value: object) -> int:
    if whole(value) < 2:
        raise ValueError("an advantage compares at least 2 completions of a prompt here: rollout.group_size is ours, 8")
    return whole(value)
