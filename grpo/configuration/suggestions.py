"""Suggestions for an unknown key: from the names of other trainers, and for typing errors."""

import difflib

# TRL, verl, Unsloth, prime-rl, slime, OpenRLHF, transformers and habit; words of our own keys' last parts are found without.
OTHER_NAMES = {
    "name": "run_name experiment_name exp_name",
    "steps": "max_steps num_steps total_steps total_training_steps training_steps iterations num_iters num_rollout "
             "num_train_epochs total_epochs num_epochs max_epochs",
    "dtype": "torch_dtype bf16 fp16 precision",
    "output_dir": "out_dir save_dir save default_local_dir log_dir",
    "resume": "resume_from_checkpoint resume_mode resume_from",
    "model.path": "model_name_or_path model_name model_id pretrained_model_name_or_path pretrained hf_checkpoint checkpoint_path",
    "model.experts": "load_in_4bit quantization_config",
    "model.activation_checkpointing": "gradient_checkpointing use_gradient_checkpointing enable_gradient_checkpointing",
    "model.lora.rank": "r lora_r lora_rank",
    "model.lora.alpha": "lora_alpha",
    "model.lora.targets": "target_modules lora_target_modules",
    "env.path": "dataset dataset_name train_dataset train_files train_data data data_path prompt_data",
    "env.eval_path": "eval_dataset val_files test_files",
    "env.rewards": "reward_funcs reward_fn reward_function reward_functions custom_reward_function custom_reward_function.path "
                   "custom_reward_function.name custom_rm_path reward_weights",
    "env.max_prompt_tokens": "max_prompt_length prompt_max_len",
    "loss": "loss_type loss_mode policy_loss adv_estimator",
    "loss.clip_low": "epsilon clip_ratio clip_ratio_low cliprange clip_range clip_eps eps_clip ratio_clip_min",
    "loss.clip_high": "epsilon_high clip_ratio_high eps_clip_high ratio_clip_max",
    "loss.normalizer": "loss_agg_mode length_normalizer calculate_per_token_loss token_level_loss loss_scale_factor",
    "loss.dual_clip": "clip_ratio_c eps_clip_c ratio_clip_c",
    "loss.max_ratio": "delta",
    "advantage.scale": "normalize_std scale_rewards norm_adv_by_std_in_grpo std_normalization normalize_rewards",
    "advantage.baseline": "use_leave_one_out_baseline",
    "advantage.components": "multi_objective_aggregation gdpo_reward_keys",
    "entropy.coefficient": "entropy_coef entropy_coeff",
    "entropy.target": "use_adaptive_entropy",
    "entropy.top_fraction": "top_entropy_quantile",
    "kl.coefficient": "beta kl_coef kl_loss_coef use_kl_loss kl_beta init_kl_coef kl_tau reference_policy_kl_penalty",
    "kl.estimator": "kl_loss_type kl_penalty",
    "kl.place": "use_kl_in_reward",
    "kl.refresh_every": "ref_model_sync_steps sync_ref_model ref_update_interval",
    "rollout.group_size": "num_generations n rollout_n n_samples_per_prompt rollouts_per_example num_generations_per_prompt G",
    "rollout.prompts_per_step": "batch_size train_batch_size per_device_train_batch_size rollout_batch_size global_batch_size",
    "rollout.max_new_tokens": "max_completion_length max_tokens response_length max_response_length generate_max_len max_gen_len",
    "rollout.cache_gb": "gpu_memory_utilization vllm_gpu_memory_utilization mem_fraction_static",
    "rollout.refill_rounds": "dynamic_sampling filter_groups max_num_gen_batches",
    "rollout.replay_routing": "router_replay use_rollout_routing_replay enable_router_replay",
    "rollout.max_staleness": "max_off_policy_steps async_level staleness_threshold max_async_level one_step_off_policy",
    "rollout.in_flight": "partial_rollout in_flight_weight_updates interruptible_generation",
    "corrections.weight": "use_tis rollout_is vllm_importance_sampling_correction vllm_importance_sampling_mode",
    "corrections.high": "tis_clip rollout_is_threshold vllm_importance_sampling_clip_max",
    "corrections.low": "tis_clip_low vllm_importance_sampling_clip_min",
    "corrections.geometric": "rollout_rs rollout_rs_threshold",
    "corrections.opsm_delta": "use_opsm opsm_delta off_policy_mask_threshold",
    "optim.replay_routing": "use_routing_replay",
    "optim.lr": "learning_rate actor_learning_rate step_size",
    "optim.epochs": "num_iterations ppo_epochs",
    "optim.minibatches": "steps_per_generation ppo_mini_batch_size num_minibatches",
    "optim.max_tokens": "max_tokens_per_gpu ppo_max_token_len_per_gpu micro_batch_size gradient_accumulation_steps",
    "optim.schedule": "lr_scheduler_type lr_scheduler lr_decay_style",
    "optim.warmup_steps": "warmup_ratio lr_warmup_steps num_warmup_steps",
    "optim.max_grad_norm": "grad_clip clip_grad gradient_clip_val",
    "optim.old_log_probs": "use_rollout_logprobs bypass_mode",
    "eval.every": "eval_steps test_freq eval_interval eval_freq",
    "checkpoint.every": "save_steps save_freq save_interval",
    "checkpoint.keep": "save_total_limit max_ckpt_to_keep",
    "log.completions_every": "logging_steps log_freq log_completions",
    "wandb.mode": "report_to use_wandb logger",
    "wandb.project": "project_name wandb_project",
}
MEANT = {name: key for key, names in OTHER_NAMES.items() for name in names.split()}


def suggest(key: str, keys: list[str], siblings: list[str]) -> list[str]:
    """The keys that `key` may stand for, the likeliest first: another trainer's name, the same last part, a typing error."""
    name = key.rpartition(".")[2]
    meant = MEANT.get(".".join(key.split(".")[-2:])) or MEANT.get(name, MEANT.get(name.lower(), ""))
    found = [other for other in keys if other == key]
    found += [other for other in keys if meant and other in (meant, meant.rpartition(".")[2])]
    found += [other for other in keys if other.rpartition(".")[2] == name]
    return list(dict.fromkeys(found or near(name, siblings) or near(name, keys, cutoff=0.8)))[:3]


def near(name: str, keys: list[str], *, cutoff: float = 0.6) -> list[str]:
    names = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in keys], n=1, cutoff=cutoff)
    return [key for key in keys if key.rpartition(".")[2] in names]
