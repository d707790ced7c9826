"""prime-rl: TOML files with the tables of trainer and orchestrator, in one file or apart."""
import tomllib

from grpo.porting.recipe import Recipe, Rule, adam, apply, every, group_size, real, top_k, whole

ROLL, T = "orchestrator.", "trainer."
SAMPLING = tuple(f"{ROLL}{node}sampling." for node in ("", "train."))


def names(*tails: str, under: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(node + tail for node in under for tail in tails)


TABLE = {
    "max_steps": Rule("steps", lambda value: None if value is None else whole(value)), T + "max_steps": Rule("steps", whole),
    ROLL + "max_steps": Rule("steps", whole),
    **{name: Rule("rollout.max_new_tokens", whole) for name in names("max_tokens", "max_completion_tokens", under=SAMPLING)},
    **{name: Rule("rollout.temperature", real) for name in names("temperature", under=SAMPLING)},
    **{name: Rule("rollout.top_p", real) for name in names("top_p", under=SAMPLING)},
    **{name: Rule("rollout.top_k", top_k) for name in names("top_k", under=SAMPLING)},
    **{name: Rule("rollout.min_p", real) for name in names("min_p", under=SAMPLING)},
    **{ROLL + name: Rule("rollout.group_size", group_size)
       for name in ("group_size", "rollouts_per_example", "rollouts_per_prompt")},
    T + "optim.type": Rule(None, adam),
    T + "optim.lr": Rule("optim.lr", real), T + "optim.weight_decay": Rule("optim.weight_decay", real),
    T + "optim.max_norm": Rule("optim.max_grad_norm", real),
    T + "scheduler.warmup_steps": Rule("optim.warmup_steps", whole),
    T + "scheduler.decay_steps": Rule("optim.decay_steps", lambda value: whole(value) or None),
    T + "enable_router_replay": Rule("rollout.replay_routing", bool),
    "enable_router_replay": Rule("rollout.replay_routing", bool),
    **{name: Rule("rollout.max_staleness", lambda value: min(whole(value), 8),
                  "exactly that many steps, there at most; rollout.in_flight=switch also goes on under newer policies, as there")
       for name in ("max_async_level", ROLL + "max_async_level", T + "max_async_level")},
    ROLL + "max_off_policy_steps": Rule("rollout.max_staleness", lambda value: min(whole(value), 1),
                                        "a bound there, and a completion is seldom that old; here all are exactly "
                                        "rollout.max_staleness steps old"),
    "ckpt.interval": Rule("checkpoint.every", every), "ckpt.keep_last": Rule("checkpoint.keep", lambda v: max(2, whole(v))),
    ROLL + "eval.interval": Rule("eval.every", every),
    **{name: Rule("eval.num_samples", whole) for name in (ROLL + "eval.rollouts_per_example", ROLL + "eval.group_size")},
    ROLL + "eval.num_examples": Rule("eval.max_prompts", lambda value: whole(value) if whole(value) > 0 else None),
    **{f"{node}wandb.{name}": Rule(f"wandb.{name}", str) for node in ("", "monitors.")
       for name in ("project", "group", "entity")},
    "seed": Rule("seed", whole), ROLL + "seed": Rule("seed", whole),
    ROLL + "oversampling_factor": Rule("rollout.oversampling", real,
                                    "there the rollouts that end first are kept; here the first groups in order"),
    **{ROLL + name: Rule("rollout.max_batch", whole) for name in ("max_inflight_rollouts", "concurrency.max_inflight")},
    ROLL + "eval.sampling.temperature": Rule("eval.temperature", real),
    ROLL + "eval.sampling.max_completion_tokens": Rule(None, remark="evaluations have rollout.max_new_tokens here"),
    "seq_len": Rule(None),
    ROLL + "seq_len": Rule(None, remark="it counts prompt and completion; rollout.max_new_tokens the latter"),
    **{name: Rule(None) for name in (
        *("model.name", T + "model.name", ROLL + "model.name", ROLL + "batch_size", ROLL + "prompts_per_step"),
        T + "optim.betas1",
        *(T + "optim.betas2", T + "scheduler.type", T + "scheduler.min_lr", T + "loss.type", T + "loss.dppo_mask_low"),
        *(T + "loss.dppo_mask_high", T + "loss.kl_tau", T + "loss.adv_tau", T + "loss.ipo_threshold", ROLL + "algo.type"),
        *(T + "model.lora.rank", T + "model.lora.alpha", T + "model.lora.target_modules", ROLL + "model.lora.rank"),
        *(T + "loss.ratio_type", T + "loss.token_mask_low", T + "loss.token_mask_high"))},
}
NO_ACCOUNT = (r"inference.*|deployment.*|((trainer|orchestrator)\.)?(monitors\.)?wandb\.(name|offline|log_extras.*)|"
              r"monitors\.(prime|file).*|output_dir|clean_output_dir|slurm.*|log.*|"
              r"bench|env_vars.*|resume.*|clean|run\.name|(trainer|orchestrator)\.(dist_timeout.*|env_vars.*|enable_token_export)|"
              r"(trainer|orchestrator)\.(log|wandb|output_dir|num_workers|client|weight_broadcast|renderer|tokenizer).*|"
              r"trainer\.model\.(seq_len|ac|ac_offloading|.*_offload|fused_lm_head.*|cp_style|reduce_dtype|"
              r"fsdp.*|compile|attn|impl|optimization.*|cp|ep|dp.*|reshard.*|moe.*)(\..*)?|"
              r"trainer\.(dist.*|profile.*|memory.*|data\..*)|orchestrator\.(concurrency\..*|use_.*|strict.*|ckpt.*)|"
              r"renderer.*|weight_broadcast.*|ckpt|ckpt\.(output_dir|weights.*|resume_step)|trainer\.ckpt.*")


def read(text: str, name: str) -> dict[str, object]:
    found: dict[str, object] = {}

    def walk(node: dict, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value

    walk(tomllib.loads(text), "")
    if any(name.startswith((ROLL, T)) for name in found):
        return found
    # a file for one of the two alone, which has its table at the top
    node = ROLL if any(name.startswith("train.") for name in found) else T
    if node == T and (not any(name.startswith("optim.") for name in found) or any(name.startswith("data.") for name in found)):
        raise ValueError("has no table of trainer or orchestrator; supervised fine-tuning here is +experiment=sft_20b")
    return {name if name in TABLE and node + name not in TABLE else node + name: value for name, value in found.items()}


def port(found: dict[str, object]) -> Recipe:
    environments = {name: found[name] for name in found if name.endswith((".env", ".source", "environments")) or name == "env"}
    recipe = apply({name: value for name, value in found.items() if name not in environments}, TABLE, NO_ACCOUNT)
    for name, value in environments.items():
        recipe.not_carried.append(f"{name} = {value!r}: env=dataset with env.path in its place. An environment of verifiers runs "
                                  "by env=resource_sessions and grpo/envs/adapters/verifiers_tasks.py")
    if "zero_advantage" in str(environments):
        recipe.settings["rollout.refill_rounds"] = 10
        recipe.remarks.append("zero_advantage: groups with equal rewards are replaced here, at most rollout.refill_rounds times")
    else:
        recipe.keep_equal_groups()
    recipe.set_model(recipe.get("model.name", T + "model.name", ROLL + "model.name"))
    has_lora = any(name.startswith(T + "model.lora") for name in found)
    recipe.set_lora(rank=recipe.number(T + "model.lora.rank", ROLL + "model.lora.rank", default=16 if has_lora else None),
                    alpha=recipe.number(T + "model.lora.alpha", default=32), targets=recipe.get(T + "model.lora.target_modules"))
    if "rollout.group_size" not in recipe.settings:
        recipe.remarks.append("no number of completions is carried, the default there is 1: rollout.group_size is ours, 8")
    group_size = recipe.settings.get("rollout.group_size", 8)
    batch = recipe.number(ROLL + "batch_size", default=128)
    recipe.set_batch(prompts=recipe.number(ROLL + "prompts_per_step", default=max(1, batch / group_size)))
    if "rollout.max_new_tokens" not in recipe.settings:
        recipe.settings["rollout.max_new_tokens"] = int(recipe.number(ROLL + "seq_len", "seq_len", default=2048))
        recipe.remarks.append("no length of a completion is given: rollout.max_new_tokens is seq_len")
    recipe.settings["optim.betas"] = [recipe.number(T + "optim.betas1", default=0.9),
                                      recipe.number(T + "optim.betas2", default=0.999)]
    recipe.settings.setdefault("optim.lr", 1e-6)
    recipe.settings.setdefault("optim.weight_decay", 0.01)
    lr, min_lr = recipe.settings["optim.lr"], recipe.number(T + "scheduler.min_lr", default=0.0)
    kind = recipe.get(T + "scheduler.type", default="constant")
    if kind in ("linear", "cosine"):
        recipe.settings.setdefault("optim.warmup_steps", 10)
    if kind == "linear":
        recipe.settings.setdefault("optim.decay_steps", 10)
    recipe.set_schedule(kind, warmup_share=None, min_ratio=min(1.0, min_lr / lr))
    _set_loss(recipe)
    return recipe


def _set_loss(recipe: Recipe) -> None:
    kind = str(recipe.get(T + "loss.type", default="default"))
    if kind not in ("default", "dppo"):
        recipe.not_carried.append(f"trainer.loss.type = {kind!r}: the default, DPPO, in its place")
    if recipe.number(T + "loss.adv_tau", default=1.0) != 1:
        recipe.not_carried.append(f"trainer.loss.adv_tau = {recipe.get(T + 'loss.adv_tau')}: the loss is not scaled here")
    low, high = (recipe.number(f"{T}loss.dppo_mask_{side}", default=0.2) for side in ("low", "high"))
    recipe.set_loss("dppo_tv", low=low, high=high)
    recipe.remarks.append("the default loss there is DPPO (total variation) with a penalty kl_tau (1e-3) times the squared "
                          "log-ratio to the sampler, which is not carried: on policy that ratio is 1")
    if "rollout.max_staleness" not in recipe.settings:
        recipe.remarks.append("rollouts are drawn ahead there, up to max_off_policy_steps (8): here rollout.max_staleness is 0, "
                              "on policy")
    algorithm = str(recipe.get(ROLL + "algo.type", default="grpo"))
    scale = {"grpo": "none", "max_rl": "mean"}.get(algorithm)
    if scale is None:
        recipe.not_carried.append(f"orchestrator.algo.type = {algorithm!r}: grpo in its place")
    recipe.settings |= {"advantage.baseline": "group", "advantage.scale": scale or "none"}
