"""verl (names of 0.9): a launch script of Hydra overrides, or a YAML."""
import math
import re

import yaml

from grpo.porting.recipe import Recipe, Rule, adam, apply, effort, every, group_size, real, top_k, truth, whole
from grpo.porting.shell import commands_of

ACTOR, ROLLOUT = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
CORRECTION, ASYNC = "algorithm.rollout_correction.", "async_training."
ONE_STEP = "one_step_off_policy"  # the program of the launch script, which no setting names
OVERLONG = tuple(f"{node}.{buffer}." for buffer in ("overlong_buffer_cfg", "overlong_buffer")
                 for node in ("reward_model.reward_kwargs", "reward_model", "custom_reward_function", "reward.reward_kwargs"))


def path(value: object) -> object:
    """A file, or a list of them, also as text."""
    try:
        found = yaml.safe_load(value) if isinstance(value, str) and value.strip().startswith("[") else value
    except yaml.YAMLError as error:
        raise ValueError("is no list that YAML reads") from error
    return [str(item) for item in found] if isinstance(found, list) else str(found)


TABLE = {
    "data.train_files": Rule("env.path", path), "data.val_files": Rule("env.eval_path", path),
    "data.prompt_key": Rule("env.prompt_key", str),
    "data.max_prompt_length": Rule("env.max_prompt_tokens", whole),
    "data.max_response_length": Rule("rollout.max_new_tokens", whole),
    "data.filter_overlong_prompts": Rule("env.on_long_prompt", lambda value: "skip" if truth(value) else "error"),
    "data.truncation": Rule(None, remark="prompts are never cut off here: env.on_long_prompt is error or skip"),
    "data.seed": Rule("seed", whole),
    "data.shuffle": Rule(None, remark="prompts come in a new order in each epoch here"),
    "data.apply_chat_template_kwargs.reasoning_effort": Rule("env.reasoning_effort", effort),
    ACTOR + "optim.lr": Rule("optim.lr", real),
    ACTOR + "optim.weight_decay": Rule("optim.weight_decay", real),
    ACTOR + "optim.lr_warmup_steps": Rule("optim.warmup_steps", lambda value: whole(value) if whole(value) >= 0 else None),
    ACTOR + "optim.total_training_steps": Rule(None),
    ACTOR + "optim.betas": Rule("optim.betas", lambda value: [real(item) for item in path(value)]),
    ACTOR + "optim.clip_grad": Rule("optim.max_grad_norm", real), ACTOR + "grad_clip": Rule("optim.max_grad_norm", real),
    ACTOR + "ppo_epochs": Rule("optim.epochs", whole),
    ACTOR + "entropy_coeff": Rule("entropy.coefficient", real),
    ACTOR + "ppo_max_token_len_per_gpu": Rule("optim.max_tokens", whole),
    ACTOR + "shuffle": Rule(None, remark="minibatches are shuffled here, by completions"),
    ROLLOUT + "n": Rule("rollout.group_size", group_size),
    ROLLOUT + "temperature": Rule("rollout.temperature", real),
    ROLLOUT + "top_p": Rule("rollout.top_p", real), ROLLOUT + "top_k": Rule("rollout.top_k", top_k),
    ROLLOUT + "max_num_seqs": Rule("rollout.max_batch", whole),
    ROLLOUT + "val_kwargs.n": Rule("eval.num_samples", whole),
    ROLLOUT + "val_kwargs.temperature": Rule("eval.temperature", lambda value: real(value) or None),
    ROLLOUT + "val_kwargs.top_p": Rule("eval.top_p", real), ROLLOUT + "val_kwargs.top_k": Rule("eval.top_k", top_k),
    "algorithm.filter_groups.metric": Rule(None, remark="groups are dropped by their rewards here, a punished length included"),
    "algorithm.gamma": Rule(None, remark="a completion has one reward here: no discount"),
    "algorithm.lam": Rule(None, remark="no critic here"),
    "trainer.total_training_steps": Rule("steps", lambda value: whole(value) if value is not None and whole(value) > 0 else None),
    "trainer.total_epochs": Rule(None, remark="steps counts batches here; rows x epochs / rollout.prompts_per_step of them"),
    "trainer.save_freq": Rule("checkpoint.every", every),
    "trainer.test_freq": Rule("eval.every", every),
    "trainer.val_before_train": Rule("eval.at_start", truth),
    "trainer.max_actor_ckpt_to_keep": Rule("checkpoint.keep", lambda value: None if value is None else max(2, whole(value))),
    "trainer.logger": Rule("wandb.mode", lambda value: "auto" if "wandb" in str(value) else "disabled"),
    "trainer.project_name": Rule("wandb.project", str),
    "actor_rollout_ref.model.enable_gradient_checkpointing": Rule("model.activation_checkpointing", truth),
    ACTOR + "optim.optimizer": Rule(None, adam),
    ACTOR + "router_replay.mode": Rule("rollout.replay_routing", lambda value: str(value) in ("R2", "R3"),
                                       "R3 is what rollout.replay_routing does; R2 needs nothing on policy"),
    ONE_STEP: Rule("rollout.max_staleness", lambda _: 1),
    ASYNC + "staleness_threshold": Rule("rollout.max_staleness", lambda value: math.ceil(real(value)),
                                        "it bounds the share of older completions; here all are exactly so many steps old"),
    ASYNC + "partial_rollout": Rule(None, remark="here: rollout.in_flight=switch, with rollout.max_staleness=2 or more"),
    "rollout.test_freq": Rule("eval.every", every),
    "rollout.total_epochs": Rule(None),
    **{name: Rule(None) for name in (
        *("data.train_batch_size", "data.gen_batch_size", "data.max_length", "actor_rollout_ref.model.path"),
        *(f"actor_rollout_ref.model.{name}" for name in ("lora_rank", "lora_alpha", "target_modules", "lora.rank", "lora.alpha",
                                                         "lora.target_modules")),
        *(ACTOR + name for name in (
            *("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "loss_agg_mode", "loss_scale_factor"),
            *("use_kl_loss", "kl_loss_coef", "kl_loss_type", "ppo_mini_batch_size", "optim.lr_warmup_steps_ratio"),
            *("optim.warmup_style", "optim.lr_scheduler_type", "optim.min_lr_ratio", "policy_loss.loss_mode", "tau_pos"),
            *("use_token_level_loss", "policy_loss.clip_cov_ratio", "policy_loss.kl_cov_ratio", "tau_neg"),
            *("policy_loss.ppo_kl_coef", "optim.lr_decay_style"))),
        *("algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo", "algorithm.use_kl_in_reward", "algorithm.kl_penalty"),
        *("algorithm.kl_ctrl.kl_coef", "algorithm.filter_groups.enable", "algorithm.filter_groups.max_num_gen_batches"),
        *(CORRECTION + name for name in ("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize", "rollout_rs",
                                         "rollout_rs_threshold", "rollout_rs_threshold_lower", "bypass_mode", "loss_type")),
        *(ASYNC + name for name in ("trigger_parameter_sync_step", "require_batches", "use_rollout_log_probs",
                                    "compute_prox_log_prob")),
        *("rollout.total_rollout_steps", "custom_reward_function.path", "custom_reward_function.name", "reward_model.enable"),
        *(node + name for node in OVERLONG for name in ("enable", "len", "penalty_factor", "log")))},
}
NO_ACCOUNT = (r".*\._target_|critic\..*|ray\w*\..*|"
              r".*(fsdp|megatron|offload|parallel|micro_batch|dynamic_bsz|log_prob_|profiler).*|"
              r"actor_rollout_ref\.(rollout\.(name|mode|gpu_memory_utilization|load_format|enforce_eager|free_cache_engine|"
              r"enable_chunked_prefill|layered_summon|max_num_batched_tokens|max_model_len|dtype|engine_kwargs.*|val_kwargs\.do_sample|"
              r"calculate_log_probs|enable_rollout_routing_replay|multi_stage_wake_up|enable_sleep_mode|enable_prefix_caching|skip_tokenizer_init|"
              r"disable_log_stats|checkpoint_engine\..*|trace\..*|prometheus\..*|agent\.num_workers)"
              r"|model\.(use_shm|use_remove_padding|trust_remote_code|use_fused_kernels|fused_kernel_options.*|use_liger|torch_dtype|"
              r"override_config.*|external_lib)|hybrid_engine|nccl_timeout"
              r"|actor\.(strategy|use_torch_compile|checkpoint.*|entropy_checkpointing|entropy_from_logits_with_chunking|"
              r"optim\.override_optimizer_config.*)|ref\..*)|"
              r"trainer\.(critic_warmup|n_gpus_per_node|nnodes|experiment_name|default_local_dir|resume_mode|log_val_generations|"
              r"balance_batch|default_hdfs_dir|use_legacy_worker_impl|device)|rollout\.(nnodes|n_gpus_per_node)|"
              r"data\.(return_raw_chat|trust_remote_code|dataloader_num_workers|filter_overlong_prompts_workers|val_batch_size)|"
              r"reward_model\.(reward_manager|reward_kwargs\.max_resp_len)")


def read(text: str, name: str) -> dict[str, object]:
    if name.endswith((".yaml", ".yml")):
        return _checked(_filled_in(_flat(yaml.safe_load(text))))
    found = {}
    for word in (word for words in commands_of(text) for word in words):
        if match := re.fullmatch(r"\+{0,2}([a-z_]+(?:\.\w+)+)=(.*)", word, flags=re.DOTALL):
            found[match[1]] = _plain(match[2])
        elif ONE_STEP in word:
            found[ONE_STEP] = True
    return _checked(found)


def _checked(found: dict[str, object]) -> dict[str, object]:
    if not any(name.startswith(("actor_rollout_ref.", "algorithm.")) for name in found):
        raise ValueError("has no settings actor_rollout_ref.NAME, as recipes of reinforcement learning have")
    return found


def _plain(value: str) -> object:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _filled_in(found: dict[str, object]) -> dict[str, object]:
    """The same, with ${name.name} of the file's own names filled in, and of these again."""
    def filled(value: object, depth: int) -> object:
        if not isinstance(value, str) or depth > 8:
            return value
        if match := re.fullmatch(r"\$\{([\w.]+)\}", value.strip()):
            return filled(found[match[1]], depth + 1) if match[1] in found else value
        return re.sub(r"\$\{[\w.]+\}", lambda part: str(filled(part[0], depth + 1)), value)

    return {name: filled(value, 0) for name, value in found.items()}


def _flat(node: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(node, dict):
        raise ValueError("holds no mapping of names to values")
    found = {}
    for name, value in node.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return {name: value for name, value in found.items() if not name.startswith(("defaults", "hydra."))}


def port(found: dict[str, object]) -> Recipe:
    recipe = apply(found, TABLE, NO_ACCOUNT)
    model = "actor_rollout_ref.model."
    recipe.set_model(recipe.get(model + "path"))
    recipe.set_lora(rank=recipe.number(model + "lora_rank", model + "lora.rank"),
                    alpha=recipe.number(model + "lora_alpha", model + "lora.alpha", default=16),
                    targets=recipe.get(model + "target_modules", model + "lora.target_modules"))
    recipe.settings.setdefault("env.prompt_key", "prompt")
    for key, value in (("optim.lr", 1e-6), ("optim.weight_decay", 0.01), ("optim.betas", [0.9, 0.999])):
        recipe.settings.setdefault(key, value)  # verl's
    recipe.settings |= {"env.answer_key": "reward_model.ground_truth", "optim.old_log_probs": "trainer"}
    prompts = _set_batch(recipe)
    recipe.set_schedule(recipe.get(*(f"{ACTOR}optim.{name}" for name in ("warmup_style", "lr_scheduler_type", "lr_decay_style")),
                                   default="constant"),
                        warmup_share=recipe.number(ACTOR + "optim.lr_warmup_steps_ratio"),
                        min_ratio=recipe.number(ACTOR + "optim.min_lr_ratio"))
    _set_loss(recipe)
    _set_kl(recipe)
    _set_groups(recipe, prompts)
    _set_corrections(recipe)
    function = recipe.get("custom_reward_function.path")
    if function is not None:
        recipe.settings["env.rewards"] = f"{function}:{recipe.get('custom_reward_function.name', default='compute_score')}"
    else:
        recipe.settings["env.rewards"] = "verl.utils.reward_score:default_compute_score"
        recipe.remarks.append("the reward is verl's own scorer by data_source, which needs verl installed; env.match=math and "
                              "env.rewards=null need nothing")
    if recipe.is_true("reward_model.enable", default=False):
        recipe.not_carried.append("reward_model.enable = True: a model that scores is a reward function here that asks it")
    recipe.settings["env.match"] = "none"
    return recipe


def _set_batch(recipe: Recipe) -> float:
    """The number of prompts of a step, which is set. Where training runs beside rollouts, a step goes from one handing over of
    the weights to the next."""
    mini = recipe.number(ACTOR + "ppo_mini_batch_size", default=256)
    if any(name.startswith(ASYNC) for name in recipe.found):
        updates = (recipe.number(ASYNC + "require_batches", default=1)
                   * recipe.number(ASYNC + "trigger_parameter_sync_step", default=1))
        prompts = mini * updates
        total = recipe.number("rollout.total_rollout_steps")
        if total is not None:
            recipe.settings["steps"] = max(1, round(total / prompts))
        if recipe.is_true(ASYNC + "use_rollout_log_probs", default=False) and not recipe.is_true(
                ASYNC + "compute_prox_log_prob", default=False):
            recipe.settings["optim.old_log_probs"] = "sampler"
    else:
        prompts = recipe.number("data.train_batch_size", default=1024)
        updates = prompts / mini
    recipe.set_batch(prompts=prompts, updates=updates)
    if "optim.warmup_steps" in recipe.settings:  # verl's are steps, each of several updates
        epochs = recipe.settings.get("optim.epochs", 1)
        recipe.settings["optim.warmup_steps"] *= recipe.settings.get("optim.minibatches", 1) * epochs
    if "rollout.group_size" not in recipe.settings:
        recipe.remarks.append("no number of completions is carried, verl's default is 1: rollout.group_size is ours, 8")
    return prompts


def _set_loss(recipe: Recipe) -> None:
    low = recipe.number(ACTOR + "clip_ratio_low", ACTOR + "clip_ratio", default=0.2)
    high = recipe.number(ACTOR + "clip_ratio_high", ACTOR + "clip_ratio", default=0.2)
    default = "token-mean" if recipe.is_true(ACTOR + "use_token_level_loss", default=True) else "seq-mean-token-mean"
    how = str(recipe.get(ACTOR + "loss_agg_mode", default=default))
    normalizer = {"token-mean": "token", "seq-mean-token-mean": "sequence", "seq-mean-token-sum-norm": "constant"}.get(how)
    if ACTOR + "clip_ratio" in recipe.found and not {ACTOR + "clip_ratio_low", ACTOR + "clip_ratio_high"} <= recipe.found.keys():
        recipe.remarks.append("clip_ratio: taken at its word, where verl takes the defaults of clip_ratio_low and "
                              "clip_ratio_high, 0.2")
    mode = str(recipe.get(ACTOR + "policy_loss.loss_mode", default="vanilla"))
    if recipe.is_true(CORRECTION + "bypass_mode", default=False):
        mode = "reinforce" if recipe.get(CORRECTION + "loss_type") == "reinforce" else "vanilla"
        recipe.remarks.append("bypass_mode: its loss_type stands above policy_loss.loss_mode")
    if mode in ("gspo", "sapo", "geo_mean"):
        if how != "seq-mean-token-mean":
            recipe.remarks.append(f"{mode} averages over sequences in verl, whatever loss_agg_mode is, and so it does here")
        normalizer = "sequence"
    if normalizer is None:
        recipe.not_carried.append(f"loss_agg_mode = {how!r}: the mean over tokens in its place")
        normalizer = "token"
    if normalizer == "constant":
        recipe.remarks.append("seq-mean-token-sum-norm: divided by rollout.max_new_tokens here, in verl by the padded width "
                              "unless loss_scale_factor is set")
    if mode == "vanilla":
        dual = recipe.number(ACTOR + "clip_ratio_c", default=3.0)
        recipe.set_loss("dapo", low=low, high=high, normalizer=normalizer, dual_clip=float(dual))
        if ACTOR + "clip_ratio_c" not in recipe.found:
            recipe.remarks.append("verl's dual clip is always on: loss.dual_clip is its default, 3")
    elif mode in ("gpg", "reinforce"):
        recipe.set_loss(mode, normalizer=normalizer)
    elif mode == "cispo":
        recipe.set_loss("cispo", max_ratio=1 + float(high), min_ratio=max(0.0, 1 - float(low)), normalizer=normalizer)
    elif mode == "gspo":
        recipe.set_loss("gspo", low=low, high=high, normalizer=normalizer)
    elif mode == "sapo":
        recipe.set_loss("sapo", temperature_positive=recipe.number(ACTOR + "tau_pos", default=1.0),
                        temperature_negative=recipe.number(ACTOR + "tau_neg", default=1.05))
    elif mode in ("geo_mean", "dppo_tv", "dppo_kl"):
        is_dppo = mode.startswith("dppo")
        recipe.set_loss({"geo_mean": "gmpo"}.get(mode, mode), low=low, high=high, normalizer=normalizer,
                        max_ratio=recipe.number(ACTOR + "clip_ratio_c", default=3.0) if is_dppo else None)
        if is_dppo:
            recipe.remarks.append(f"{mode}: verl anchors on its old log-probs, here the anchor is the sampler; clip_ratio_c, 3 "
                                  "unless it is set, is what truncates there")
    elif mode == "clip_cov":
        recipe.set_loss("clip_cov", low=low, high=high, normalizer=normalizer,
                        share=recipe.number(ACTOR + "policy_loss.clip_cov_ratio"))
    elif mode == "kl_cov":
        recipe.set_loss("kl_cov", normalizer=normalizer, share=recipe.number(ACTOR + "policy_loss.kl_cov_ratio", default=2e-4))
        recipe.settings["loss.coefficient"] = float(recipe.number(ACTOR + "policy_loss.ppo_kl_coef", default=0.1))
    else:
        recipe.not_carried.append(f"policy_loss.loss_mode = {mode!r}: dapo in its place")
        recipe.set_loss("dapo", low=low, high=high, normalizer=normalizer)
    _set_advantage(recipe)


def _set_advantage(recipe: Recipe) -> None:
    estimator = str(recipe.get("algorithm.adv_estimator", default="gae")).removesuffix("_vectorized")
    known = {"grpo": ("group", "group", "none"), "rloo": ("leave_one_out", "none", "none"), "gpg": ("group", "none", "none"),
             "opo": ("length_weighted", "none", "none"), "remax": ("greedy", "none", "none"),
             "reinforce_plus_plus": ("none", "none", "tokens"), "reinforce_plus_plus_baseline": ("group", "none", "tokens")}
    if estimator not in known:
        what = " (verl's default): there is no critic here," if estimator == "gae" else ":"
        recipe.not_carried.append(f"algorithm.adv_estimator = {estimator!r}{what} grpo in its place")
        estimator = "grpo"
    baseline, scale, whiten = known[estimator]
    if estimator == "gpg":
        recipe.remarks.append("gpg: verl multiplies advantages by the number of completions over that of nonzero rewards")
    if estimator == "grpo" and not recipe.is_true("algorithm.norm_adv_by_std_in_grpo", default=True):
        scale = "none"
    recipe.settings |= {"advantage.baseline": baseline, "advantage.scale": scale, "advantage.whiten": whiten}


def _set_kl(recipe: Recipe) -> None:
    estimator = {"low_var_kl": "k3", "k3": "k3", "kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl+": "k2",
                 "k3+": "k2", "full": "full"}
    if recipe.is_true(ACTOR + "use_kl_loss", default=False):
        kind = str(recipe.get(ACTOR + "kl_loss_type", default="low_var_kl"))
        recipe.settings |= {"kl.coefficient": recipe.number(ACTOR + "kl_loss_coef", default=0.001),
                            "kl.estimator": estimator.get(kind, "k3")}
        if kind in ("kl", "k1"):
            recipe.remarks.append("kl_loss_type k1: as a loss its expected gradient is zero in verl; here k1 has that of the KL")
    elif recipe.is_true("algorithm.use_kl_in_reward", default=False):
        recipe.settings |= {"kl.coefficient": recipe.number("algorithm.kl_ctrl.kl_coef", default=0.001),
                            "kl.place": "reward", "kl.estimator": "k1"}
        kind = str(recipe.get("algorithm.kl_penalty", default="kl"))
        if kind not in ("kl", "k1"):
            recipe.not_carried.append(f"algorithm.kl_penalty = {kind!r}: rewards are lowered by k1 here")
    if recipe.is_true("algorithm.use_kl_in_reward", default=False) and recipe.is_true(ACTOR + "use_kl_loss", default=False):
        recipe.not_carried.append("algorithm.use_kl_in_reward beside use_kl_loss: one place at a time")


def _set_groups(recipe: Recipe, prompts: float) -> None:
    if recipe.is_true("algorithm.filter_groups.enable", default=False):
        rounds = recipe.number("algorithm.filter_groups.max_num_gen_batches", default=0)
        recipe.settings["rollout.refill_rounds"] = int(rounds) - 1 if rounds else 10
        if not rounds:
            recipe.remarks.append("max_num_gen_batches 0 has no limit there: rollout.refill_rounds is 10")
        generated = recipe.number("data.gen_batch_size", default=prompts)
        if generated > prompts:
            recipe.settings["rollout.oversampling"] = generated / prompts
            recipe.remarks.append("data.gen_batch_size: a refill samples that many times the groups still missing, there a whole "
                                  "batch")
    else:
        recipe.keep_equal_groups()
    for node in OVERLONG:
        if recipe.is_true(f"{node}enable", default=False):
            recipe.settings["rollout.overlong_buffer"] = int(recipe.number(f"{node}len", default=4096))
            recipe.settings["rollout.overlong_penalty"] = recipe.number(f"{node}penalty_factor", default=1.0)


def _set_corrections(recipe: Recipe) -> None:
    level, rejections = (value if str(value) not in ("None", "null") else None
                         for value in (recipe.get(CORRECTION + "rollout_is"), recipe.get(CORRECTION + "rollout_rs")))
    if recipe.is_true(CORRECTION + "bypass_mode", default=False) and recipe.loss != "reinforce":
        recipe.settings["optim.old_log_probs"] = "sampler"
        if level is not None:
            recipe.remarks.append("rollout_is: in bypass_mode the ratio to the sampler is the one that is clipped: no weight "
                                  "beside it")
        if rejections is not None:
            recipe.not_carried.append(f"rollout_rs = {rejections!r}: needs optim.old_log_probs=trainer here, which is no "
                                      "bypass_mode")
        return
    if level is None and rejections is None:
        return
    if recipe.settings.get("optim.old_log_probs") == "sampler" or recipe.loss.startswith("dppo"):
        recipe.not_carried.append("algorithm.rollout_correction: the loss takes its ratio to the sampler already")
        return
    if level in ("token", "sequence"):
        _set_weight(recipe, level)
    elif level is not None:
        recipe.not_carried.append(f"rollout_is = {level!r}: token or sequence there is")
    if rejections is not None:
        _set_rejections(recipe, str(rejections))
    if recipe.is_true(CORRECTION + "rollout_is_batch_normalize", default=False):
        recipe.not_carried.append("rollout_is_batch_normalize = True: weights keep their mean here")
    if not recipe.settings.get("rollout.max_staleness"):
        recipe.remarks.append("rollout_is, rollout_rs: the sampler here is the trainer, so these ratios are 1 unless rollouts "
                              "are drawn ahead")


def _set_weight(recipe: Recipe, level: str) -> None:
    spec = str(recipe.get(CORRECTION + "rollout_is_threshold", default=2.0))
    try:
        bounds = [real(bound) for bound in spec.split("_")]
    except ValueError:
        recipe.not_carried.append(f"rollout_is_threshold = {spec!r}")
        return
    recipe.settings |= {"corrections.weight": "mask" if len(bounds) == 2 else "truncate", "corrections.level": level,
                        "corrections.low": bounds[0] if len(bounds) == 2 else 0.0, "corrections.high": bounds[-1]}


def _set_rejections(recipe: Recipe, names: str) -> None:
    """Names of verl 0.9, whose bounds of k1 hold for sampler / trainer; token, sequence, geometric before it, for the inverse."""
    kinds = [name.strip() for name in names.split(",") if name.strip()]
    specs = str(recipe.get(CORRECTION + "rollout_rs_threshold")).split(",")
    for kind, spec in zip(kinds, specs * len(kinds) if len(specs) == 1 else specs):
        told = f"rollout_rs = {kind!r} with {spec}"
        try:
            bounds = [real(bound) for bound in spec.strip().split("_")]
            lower = bounds[0] if len(bounds) > 1 else recipe.number(CORRECTION + "rollout_rs_threshold_lower",
                                                                    default=1 / bounds[-1])
        except (ValueError, ZeroDivisionError):
            recipe.not_carried.append(f"{told}: no bounds")
            continue
        low, high = (1 / bounds[-1], 1 / lower) if kind.endswith("k1") else (lower, bounds[-1])
        if kind == "seq_mean_k3":
            recipe.settings["corrections.max_k3"] = bounds[-1]
        elif not low <= 1 <= high:
            recipe.not_carried.append(f"{told}: a ratio of 1 is outside of it")
        elif kind in ("seq_mean_k1", "geometric"):
            recipe.settings["corrections.geometric"] = [low, high]
        elif kind in ("token_k1", "token", "seq_sum_k1", "sequence"):
            _set_mask(recipe, "token" if kind.startswith("token") else "sequence", low, high, told)
        else:
            recipe.not_carried.append(f"{told}: there are corrections.geometric, max_k3, and weight=mask")


def _set_mask(recipe: Recipe, level: str, low: float, high: float, told: str) -> None:
    """The weight of ours that leaves out and weighs by one ratio, where that is what both of verl's do."""
    weight = recipe.settings.get("corrections.weight", "none")
    is_same = recipe.settings.get("corrections.level") == level and recipe.settings.get("corrections.high", 0.0) >= high
    if weight == "mask" or (weight == "truncate" and not is_same):
        recipe.not_carried.append(f"{told}: corrections.weight is {weight} already, by other ratios or bounds")
        return
    if weight == "none":
        recipe.remarks.append(f"{told}: what is kept is weighed by its ratio here, and in verl only with rollout_is")
    recipe.settings |= {"corrections.weight": "mask", "corrections.level": level, "corrections.low": low,
                        "corrections.high": high}
