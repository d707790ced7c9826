"""TRL's GRPO (names of 1.16): GRPOConfig(...) in Python, a YAML of its command line, or that command line itself."""
import ast

import yaml

from grpo.porting.recipe import Recipe, Rule, Unknown, apply, effort, every, real, top_k, truth, whole
from grpo.porting.shell import calculate, commands_of, flags_of

ASYNC = "AsyncGRPOTrainer"
NEEDED = ("GRPOConfig", "GRPOTrainer", "AsyncGRPOConfig", ASYNC)
CALLS = (*NEEDED, "LoraConfig", "ModelConfig", "ScriptArguments", "GRPOScriptArguments")


def effort_of(value: object) -> str:
    if not isinstance(value, dict) or list(value) != ["reasoning_effort"]:
        raise ValueError("only reasoning_effort has a key here, env.reasoning_effort")
    return effort(value["reasoning_effort"])


TABLE = {
    "learning_rate": Rule("optim.lr", real),
    "adam_epsilon": Rule("optim.eps", real),
    "weight_decay": Rule("optim.weight_decay", real),
    "warmup_steps": Rule("optim.warmup_steps", whole),
    "max_grad_norm": Rule("optim.max_grad_norm", real),
    "max_steps": Rule("steps", lambda value: whole(value) if whole(value) > 0 else None),
    "num_generations": Rule("rollout.group_size", whole),
    "max_completion_length": Rule("rollout.max_new_tokens", whole),
    "max_prompt_length": Rule("env.max_prompt_tokens", lambda value: None if value is None else whole(value),
                              "TRL cuts longer ones off at their beginning; here they are an error, or env.on_long_prompt=skip"),
    "temperature": Rule("rollout.temperature", real),
    "top_p": Rule("rollout.top_p", real),
    "top_k": Rule("rollout.top_k", top_k),
    "min_p": Rule("rollout.min_p", lambda value: 0.0 if value is None else real(value)),
    "beta": Rule("kl.coefficient", real),
    "num_iterations": Rule("optim.epochs", whole),
    "mask_truncated_completions": Rule("optim.mask_truncated", truth),
    "entropy_coef": Rule("entropy.coefficient", real),
    "use_adaptive_entropy": Rule(None), "entropy_target": Rule(None),
    "top_entropy_quantile": Rule("entropy.top_fraction", real, "the quantile is of the whole step here, of a micro-batch in TRL"),
    "off_policy_mask_threshold": Rule("corrections.opsm_delta", real),
    "sync_ref_model": Rule(None), "ref_model_sync_steps": Rule(None), "ref_model_mixup_alpha": Rule(None),
    "seed": Rule("seed", whole),
    "chat_template_kwargs": Rule("env.reasoning_effort", effort_of),
    ASYNC: Rule("rollout.max_staleness", lambda _: 1, "there a bound, max_staleness, on how old a completion is; here all are "
                "exactly rollout.max_staleness steps old"),
    "max_staleness": Rule(None),
    "save_steps": Rule("checkpoint.every", every),
    "save_total_limit": Rule("checkpoint.keep", lambda value: max(2, whole(value))),
    "eval_steps": Rule("eval.every", every),
    "gradient_checkpointing": Rule("model.activation_checkpointing", truth),
    "report_to": Rule("wandb.mode", lambda value: "auto" if "wandb" in str(value) or value == "all" else "disabled"),
    "dataset_name": Rule("env.path", str), "train_dataset": Rule("env.path", str),
    "dataset_config": Rule("env.subset", lambda value: None if value is None else str(value)),
    "dataset_train_split": Rule("env.split", str), "dataset_test_split": Rule("env.eval_split", str),
    "dataset_prompt_column": Rule("env.prompt_key", str),
    "system_prompt": Rule("env.instructions", lambda value: str(value).strip()),
    "router_aux_loss_coef": Rule(None, remark="no auxiliary loss on the router here; TRL's default for gpt-oss is 0.9"),
    "use_bias_correction_kl": Rule(None),
    **{name: Rule(None) for name in (
        *("model_name_or_path", "model", "loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta"),
        *("scale_rewards", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"),
        *("generation_batch_size", "num_processes", "adam_beta1", "adam_beta2", "warmup_ratio", "lr_scheduler_type"),
        *("lr_scheduler_kwargs", "reward_funcs", "reward_weights", "use_peft", "lora_r", "lora_alpha", "lora_target_modules"),
        *("LoraConfig.r", "LoraConfig.lora_alpha", "LoraConfig.target_modules", "sapo_temperature_pos"),
        "sapo_temperature_neg", "num_train_epochs")},
}
NO_ACCOUNT = (r"output_dir|run_name|overwrite_output_dir|logging_\w+|log_\w+|num_completions_to_print|wandb_\w+|hub_\w+|"
              r"trackio_\w+|project|push_to_hub|"
              r"use_vllm|vllm_\w+|bf16|fp16|tf32|torch_dtype|dtype|attn_implementation|dataloader_\w+|ddp_\w+|fsdp\w*|deepspeed|"
              r"save_strategy|eval_strategy|do_eval|per_device_eval_batch_size|remove_unused_columns|optim|"
              r"gradient_checkpointing_kwargs|args|peft_config|processing_class|LoraConfig.(task_type|bias|lora_dropout)|"
              r"model_revision|trust_remote_code|config_file|ds3_gather_for_generation|shuffle_dataset|disable_dropout")


def read(text: str, name: str) -> dict[str, object]:
    if name.endswith(".py"):
        return _read_python(text)
    if name.endswith(".sh"):
        return _of_commands(commands_of(text))
    found = yaml.safe_load(text)
    if not isinstance(found, dict):
        raise ValueError("holds no mapping of names to values")
    return found


def _of_commands(commands: list[list[str]]) -> dict[str, object]:
    """The flags of a command that starts a program, or `trl grpo`; of all commands, where none does."""
    found = dict[str, object]()
    programs = [words for words in commands if any(word.endswith(".py") or word == "trl" for word in words)]
    for words in programs or commands:
        if "trl" in words and words[words.index("trl") + 1:][:1] != ["grpo"]:
            raise ValueError(f"{' '.join(words[:3])} is no recipe of trl grpo")
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))  # before it: the launcher's
        flags = flags_of(words[:script]) | flags_of(words[script + 1:])
        found |= {key.replace("-", "_"): _plain(value) for key, value in flags.items()}
    return found


def _read_python(text: str) -> dict[str, object]:
    """The keywords of the calls that make the configuration, as far as they are literals, or names with one value; a script that
    reads them from its command line says in its docstring what that is."""
    tree, found = ast.parse(text), dict[str, object]()
    if not any(isinstance(node, ast.Name) and node.id in NEEDED for node in ast.walk(tree)):
        raise ValueError(f"uses none of {', '.join(NEEDED)}; RLOO here is loss=rloo")
    calls = [(node, ast.unparse(node.func).split(".")[-1]) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names, configs = _names(tree, calls)
    if not any(kind in ("GRPOConfig", "AsyncGRPOConfig") for _, kind in calls):
        try:
            written = commands_of(ast.get_docstring(tree) or "")
            commands = [words for words in written if any(word.endswith(".py") for word in words)]
        except ValueError:
            commands = []  # prose
        found |= _of_commands(commands[:1])
        if commands[1:]:  # of another model, say
            found["further commands of the docstring"] = len(commands) - 1
    for node, kind in calls:
        if kind == "load_dataset" and node.args:
            _take_dataset(node, names, found)
        if kind == ASYNC:
            found[ASYNC] = True
        prefix = "LoraConfig." if kind == "LoraConfig" else ""
        for item in node.keywords if kind in CALLS else []:
            if item.arg is not None and item.arg not in ("train_dataset", "eval_dataset"):
                value = _literal(item.value, names)
                if not (isinstance(value, Unknown) and prefix + item.arg in found):
                    found[prefix + item.arg] = value
    for node in ast.walk(tree):
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) in configs:  # training_args.name = value
            found[target.attr] = _literal(node.value, names)
    return found


def _take_dataset(node: ast.Call, names: dict[str, object], found: dict[str, object]) -> None:
    found.setdefault("dataset_name", _literal(node.args[0], names))
    if len(node.args) > 1:
        found["dataset_config"] = _literal(node.args[1], names)
    for item in node.keywords:
        if item.arg == "split":
            value = _literal(item.value, names)
            found |= dict(zip(["dataset_train_split", "dataset_test_split"], value if isinstance(value, list) else [value]))


def _names(tree: ast.Module, calls: list[tuple[ast.Call, str]]) -> tuple[dict[str, object], set[str]]:
    """Values of names, and of args.name where argparse has a default; and the names of configurations."""
    names, configs, parsed = dict[str, object](), set[str](), {"args"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            kind = ast.unparse(node.value.func).split(".")[-1] if isinstance(node.value, ast.Call) else ""
            target = node.targets[0]
            if kind in ("GRPOConfig", "AsyncGRPOConfig", "parse_args_and_config", "parse_args_into_dataclasses"):
                configs |= {ast.unparse(item) for item in (target.elts if isinstance(target, ast.Tuple) else [target])}
            if kind == "parse_args":
                parsed.add(ast.unparse(target))
            try:
                names[ast.unparse(target)] = calculate(node.value, names)
            except ValueError:
                continue
    for node, kind in calls:
        keywords = {item.arg: item.value for item in node.keywords}
        flag = next((argument.value for argument in node.args if kind == "add_argument" and isinstance(argument, ast.Constant)
                     and str(argument.value).startswith("--")), None)
        if flag is not None and "default" in keywords:
            value = _literal(keywords["default"], names)
            if not isinstance(value, Unknown):
                names |= {f"{args}.{flag[2:].replace('-', '_')}": value for args in parsed}
    return names, configs


def _literal(node: ast.expr, names: dict[str, object]) -> object:
    try:
        return calculate(node, names)
    except ValueError:
        return Unknown(ast.unparse(node))


def _plain(value: object) -> object:
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def port(found: dict[str, object]) -> Recipe:
    recipe = apply(found, TABLE, NO_ACCOUNT)
    recipe.set_model(recipe.get("model_name_or_path", "model"))
    is_peft = any(name.startswith("LoraConfig.") for name in found)
    recipe.set_lora(rank=recipe.number("lora_r", "LoraConfig.r",
                                       default=8 if is_peft else 16 if recipe.get("use_peft") else None),
                    alpha=recipe.number("lora_alpha", "LoraConfig.lora_alpha", default=8 if is_peft else 32),
                    targets=recipe.get("lora_target_modules", "LoraConfig.target_modules"))
    recipe.settings.setdefault("rollout.max_new_tokens", 2048 if ASYNC in found else 512)
    recipe.settings.setdefault("rollout.group_size", 8)
    recipe.settings.setdefault("env.prompt_key", "prompt")
    recipe.settings.setdefault("optim.lr", 1e-6)
    recipe.settings["optim.betas"] = [recipe.number("adam_beta1", default=0.9), recipe.number("adam_beta2", default=0.999)]
    _set_batch(recipe)
    kwargs = recipe.get("lr_scheduler_kwargs")
    recipe.set_schedule(recipe.get("lr_scheduler_type", default="constant" if ASYNC in found else "linear"),
                        warmup_share=recipe.number("warmup_ratio"),
                        min_ratio=kwargs.get("min_lr_rate") if isinstance(kwargs, dict) else None)
    _set_loss(recipe)
    recipe.keep_equal_groups()
    if ASYNC in found and recipe.get("max_staleness") == 0:
        recipe.settings["rollout.max_staleness"] = 0
    scale = recipe.get("scale_rewards", default="group")
    recipe.settings["advantage.scale"] = {"true": "group", "group": "group", "batch": "batch"}.get(str(scale).lower(), "none")
    if recipe.settings.get("kl.coefficient"):
        unbiased = recipe.is_true("use_bias_correction_kl", default=True)
        recipe.settings["kl.estimator"] = "k2" if unbiased else "k3"
        if unbiased:
            recipe.remarks.append("use_bias_correction_kl (on by default): TRL's k3 times the ratio has k2's gradient on policy, "
                                  "so kl.estimator is k2")
        if recipe.is_true("sync_ref_model", default=False):
            recipe.settings["kl.refresh_every"] = int(recipe.number("ref_model_sync_steps", default=512))
            recipe.remarks.append("ref_model_mixup_alpha: the reference becomes the policy here, there a mixture")
    if recipe.is_true("use_adaptive_entropy", default=False):
        recipe.settings["entropy.target"] = real(recipe.number("entropy_target", default=0.2))
    names = recipe.get("reward_funcs", default=[])
    if not isinstance(names, list):
        names = [part.strip("'\"") for part in str(names).strip("[]").split(", ") if part]
    names = [str(name) for name in names]
    try:
        weights = [real(weight) for weight in recipe.get("reward_weights", default=[])]
    except (ValueError, TypeError) as problem:
        weights = []
        recipe.not_carried.append(f"reward_weights = {recipe.get('reward_weights')!r}: {problem}")
    recipe.set_rewards([f"trl.rewards:{name}" if name in TRL_REWARDS else name for name in names], weights)
    recipe.remarks.append("vllm_importance_sampling_*: the sampler here is the trainer, so the ratio that TRL corrects for is 1")
    return recipe


TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


def _set_batch(recipe: Recipe) -> None:
    """A step of ours is a generation batch of TRL's, which may make several updates."""
    accumulation = recipe.number("gradient_accumulation_steps", default=1)
    rounds = recipe.number("steps_per_generation", default=accumulation)
    processes = recipe.number("num_processes", default=1)
    completions = recipe.number("generation_batch_size",
                                default=recipe.number("per_device_train_batch_size", default=8) * rounds * processes)
    recipe.set_batch(prompts=max(1, completions / recipe.settings["rollout.group_size"]), updates=rounds / accumulation)
    if "num_processes" not in recipe.found:
        recipe.remarks.append("batch sizes are of one process: multiply rollout.prompts_per_step by the number of TRL's "
                              "processes")
    if recipe.settings.get("optim.epochs", 1) * recipe.settings.get("optim.minibatches", 1) > 1:
        recipe.remarks.append("max_steps counts updates in TRL, and steps counts generated batches here")
        if "steps" in recipe.settings:
            updates = recipe.settings.get("optim.epochs", 1) * recipe.settings.get("optim.minibatches", 1)
            recipe.settings["steps"] = max(1, recipe.settings["steps"] // updates)
    if "steps" not in recipe.settings and recipe.get("num_train_epochs") is not None:
        recipe.remarks.append("num_train_epochs: steps counts batches here; rows x epochs / rollout.prompts_per_step of them")


def _set_loss(recipe: Recipe) -> None:
    name = str(recipe.get("loss_type", default="dapo"))
    low = recipe.number("epsilon", default=0.2)
    high = recipe.number("epsilon_high", default=low)
    delta = recipe.number("delta")
    if name == "cispo":
        if high < 1:
            recipe.not_carried.append(f"loss_type cispo with a cap of {high:g}: epsilon_high is the largest ratio itself, and "
                                      "unset it is epsilon; the paper's 5 in its place")
        recipe.set_loss("cispo", max_ratio=float(high) if high >= 1 else 5.0)
        return
    if recipe.get("importance_sampling_level") == "sequence" and name != "luspo":
        if name not in ("grpo", "dapo"):
            recipe.remarks.append(f"loss_type {name} with sequence-level ratios: gspo averages over sequences")
        recipe.set_loss("gspo", low=low, high=high, normalizer="token" if name in ("dapo", "bnpo") else None)
        if delta is not None:
            recipe.not_carried.append(f"delta = {delta:g}: gspo has no second bound")
        return
    if name == "sapo":
        recipe.set_loss("sapo", temperature_positive=recipe.number("sapo_temperature_pos"),
                        temperature_negative=recipe.number("sapo_temperature_neg"))
        return
    if name not in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "vespo"):
        recipe.not_carried.append(f"loss_type = {name!r}: dapo in its place")
        name = "dapo"
    if name == "luspo" and recipe.get("importance_sampling_level") != "sequence":
        recipe.remarks.append("luspo takes the ratio of the sequence here, as its paper does; there that of the token unless "
                              "importance_sampling_level is sequence")
    if name in ("luspo", "vespo") and delta is not None:
        recipe.not_carried.append(f"delta = {delta:g}: {name} has no second bound")
        delta = None
    recipe.set_loss(name, low=low, high=high, max_ratio=None if delta is None else float(delta))

