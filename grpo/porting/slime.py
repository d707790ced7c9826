"""slime and miles: launch scripts whose arrays hold Megatron's and slime's flags."""
from grpo.porting.recipe import Recipe, Rule, adam, apply, every, group_size, real, top_k, truth, whole
from grpo.porting.shell import commands_of, flags_of

FLAGS = {"advantage-estimator", "rollout-batch-size", "n-samples-per-prompt"}


def paths(value: object) -> list[str]:
    """Of names and paths in turn, or of one path."""
    return [str(path) for path in value[1::2]] if isinstance(value, list) else [str(value)]


def no_loss(value: object) -> None:
    if real(value):
        raise ValueError("no auxiliary loss on the router here")


TABLE = {
    "num-rollout": Rule("steps", whole),
    "num-epoch": Rule(None, remark="steps counts batches here; rows x epochs / rollout.prompts_per_step of them"),
    "n-samples-per-prompt": Rule("rollout.group_size", group_size),
    "rollout-max-response-len": Rule("rollout.max_new_tokens", whole),
    "rollout-max-prompt-len": Rule("env.max_prompt_tokens", whole),
    "rollout-temperature": Rule("rollout.temperature", real),
    "rollout-top-p": Rule("rollout.top_p", real), "rollout-top-k": Rule("rollout.top_k", top_k),
    "rollout-seed": Rule("seed", whole), "seed": Rule("seed", whole),
    "prompt-data": Rule("env.path", str), "input-key": Rule("env.prompt_key", str), "label-key": Rule("env.answer_key", str),
    "lr": Rule("optim.lr", real), "lora-learning-rate": Rule("optim.lr", real),
    "weight-decay": Rule("optim.weight_decay", real), "lora-weight-decay": Rule("optim.weight_decay", real),
    "adam-eps": Rule("optim.eps", real), "clip-grad": Rule("optim.max_grad_norm", real),
    "lr-warmup-iters": Rule("optim.warmup_steps", whole),
    "entropy-coef": Rule("entropy.coefficient", real),
    "use-opsm": Rule(None), "opsm-delta": Rule(None),
    "eval-interval": Rule("eval.every", every), "n-samples-per-eval-prompt": Rule("eval.num_samples", whole),
    "eval-top-k": Rule("eval.top_k", top_k), "eval-prompt-data": Rule("env.eval_path", paths),
    "skip-eval-before-train": Rule("eval.at_start", lambda _: False),
    "train_async.py": Rule("rollout.max_staleness", lambda _: 1),  # the program, which no flag names
    "optimizer": Rule(None, adam), "moe-aux-loss-coeff": Rule(None, no_loss),
    "ref-update-interval": Rule("kl.refresh_every", whole),
    "use-tensorboard": Rule("log.tensorboard", truth), "wandb-team": Rule("wandb.entity", str),
    "eval-top-p": Rule("eval.top_p", real), "eval-temperature": Rule("eval.temperature", real),
    "eval-max-response-len": Rule(None, remark="evaluations have rollout.max_new_tokens here"),
    "save-interval": Rule("checkpoint.every", every),
    "max-tokens-per-gpu": Rule("optim.max_tokens", whole),
    "use-rollout-routing-replay": Rule("rollout.replay_routing", bool),
    "use-routing-replay": Rule(None, remark="R2 needs nothing where the policy is new; rollout.replay_routing is R3"),
    "use-rollout-logprobs": Rule("optim.old_log_probs", lambda _: "sampler"),
    "wandb-project": Rule("wandb.project", str), "wandb-group": Rule("wandb.group", str),
    "over-sampling-batch-size": Rule(None), "dynamic-sampling-filter-path": Rule(None),
    "rm-type": Rule(None), "custom-rm-path": Rule(None),
    "recompute-granularity": Rule("model.activation_checkpointing", lambda _: True),
    "partial-rollout": Rule(None, remark="here: rollout.in_flight=switch, with rollout.max_staleness=2 or more"),
    **{name: Rule(None) for name in (
        *("hf-checkpoint", "rollout-batch-size", "global-batch-size", "num-steps-per-rollout", "lr-decay-style", "min-lr"),
        *("lr-warmup-fraction", "adam-beta1", "adam-beta2", "advantage-estimator", "eps-clip", "eps-clip-high", "eps-clip-c"),
        *("use-kl-loss", "kl-loss-coef", "kl-loss-type", "kl-coef", "use-unbiased-kl", "use-tis", "tis-clip", "tis-clip-low"),
        *("calculate-per-token-loss", "disable-grpo-std-normalization", "use-lora", "lora-rank", "lora-alpha"),
        *("lora-target-preset", "lora-target-modules", "loss-type"))},
}
NO_ACCOUNT = (r"load|save|ref-load|save-hf|save-lora|colocate|actor-.*|rollout-num-.*|sglang-.*|.*parallel.*|recompute-.*|"
              r"micro-batch-size|seq-length|use-dynamic-batch-size|balance-data|.*offload.*|overlap-.*|"
              r"use-precision-aware-optimizer|.*dropout|accumulate-.*|attention-.*|moe-token-dispatcher-type|.*-backend|megatron-.*|"
              r"wandb-(key|host|exp-name|dir)|use-wandb|apply-chat-template.*|rollout-shuffle|address|runtime-env-json|working-dir|"
              r"swiglu|num-layers|hidden-size|ffn-.*|num-attention-.*|group-query-.*|num-query-.*|use-rotary-.*|rotary-.*|normalization|"
              r"norm-epsilon|qk-layernorm|vocab-.*|disable-bias-linear|untie-.*|kv-channels|max-position-.*|moe-.*|num-experts|head|"
              r"node-ip-address|num-gpus|disable-usage-stats|dashboard-.*|finetune|no-.*|debug-.*|update-weight.*|"
              r"decoder-.*|use-distributed-optimizer|bf16|fp8-.*|transformer-impl|log-probs-chunk-size|data-pad-size-multiplier|spec|"
              r"use-gated-attention|apply-layernorm-1p|position-embedding-type|deterministic-mode|disable-wandb-random-suffix|"
              r"save-debug-.*|prefill-num-servers|model-name")


def read(text: str, name: str) -> dict[str, object]:
    found = {}
    for words in commands_of(text):
        if FLAGS & (flags := flags_of(words)).keys():  # no other command's: that of an engine, say
            found |= flags
            if any(word.endswith("train_async.py") for word in words):
                found["train_async.py"] = True
    if not found:
        raise ValueError("has none of slime's flags, such as --n-samples-per-prompt or --rollout-batch-size")
    if found.get("loss-type", "policy_loss") != "policy_loss":
        raise ValueError(f"--loss-type {found['loss-type']} is none of GRPO; supervised fine-tuning here is +experiment=sft_20b")
    return found


def port(found: dict[str, object]) -> Recipe:
    recipe = apply(found, TABLE, NO_ACCOUNT)
    recipe.set_model(recipe.get("hf-checkpoint"))
    recipe.set_lora(rank=recipe.number("lora-rank", default=16 if "use-lora" in found else None),
                    alpha=recipe.number("lora-alpha"),
                    targets=recipe.get("lora-target-preset", "lora-target-modules"))
    recipe.settings.setdefault("optim.lr", 1e-6)
    recipe.settings.setdefault("optim.weight_decay", 0.01)  # Megatron's
    recipe.settings["optim.betas"] = [recipe.number("adam-beta1", default=0.9), recipe.number("adam-beta2", default=0.999)]
    prompts = recipe.number("rollout-batch-size", default=32)
    updates = recipe.number("num-steps-per-rollout")
    if updates is None and "global-batch-size" in found:
        updates = prompts * recipe.number("n-samples-per-prompt", default=1) / recipe.number("global-batch-size", default=1)
    recipe.set_batch(prompts=prompts, updates=updates)
    lr, min_lr = recipe.number("lora-learning-rate", "lr", default=1e-6), recipe.number("min-lr", default=0.0)
    recipe.set_schedule(recipe.get("lr-decay-style", default="linear"), warmup_share=recipe.number("lr-warmup-fraction"),
                        min_ratio=min(1.0, min_lr / lr) if lr else 0.0)
    _set_loss(recipe)
    _set_kl(recipe)
    _set_groups(recipe, prompts)
    kind = recipe.get("rm-type")
    recipe.settings["env.match"] = "math"
    if "custom-rm-path" in found:
        recipe.not_carried.append(f"custom-rm-path = {found['custom-rm-path']!r}: write it as a reward function, "
                                  "env.rewards=my_rewards.py:NAME")
    elif kind not in ("math", "deepscaler", "dapo", None):
        recipe.not_carried.append(f"rm-type = {kind!r}: env.match=math in its place; rewards of your own go into env.rewards")
    else:
        recipe.remarks.append(f"rm-type {kind}: env.match=math compares expressions by math-verify (an extra)")
    return recipe


def _set_loss(recipe: Recipe) -> None:
    estimator = str(recipe.get("advantage-estimator", default="grpo"))
    low = recipe.number("eps-clip", default=0.2)
    high = recipe.number("eps-clip-high", default=low)
    per_token = "calculate-per-token-loss" in recipe.found
    dual = recipe.number("eps-clip-c")
    if estimator == "gspo":
        recipe.set_loss("gspo", low=low, high=high, normalizer="token" if per_token else "sequence")
    elif estimator == "cispo":
        recipe.set_loss("cispo", max_ratio=1 + float(high), normalizer="token" if per_token else "sequence")
    elif estimator in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        recipe.set_loss(estimator, low=low, high=high, normalizer="token" if per_token else "sequence")
    else:
        if estimator != "grpo":
            recipe.not_carried.append(f"advantage-estimator = {estimator!r}: grpo in its place")
        recipe.set_loss("dapo" if per_token else "grpo", low=low, high=high,
                        dual_clip=None if dual is None else float(dual))
    if not estimator.startswith("reinforce"):
        recipe.settings["advantage.scale"] = "none" if "disable-grpo-std-normalization" in recipe.found else "group"
    if "use-tis" in recipe.found:
        recipe.settings |= {"corrections.weight": "truncate", "corrections.low": recipe.number("tis-clip-low", default=0.0),
                            "corrections.high": recipe.number("tis-clip", default=2.0)}
        if not recipe.settings.get("rollout.max_staleness"):
            recipe.remarks.append("use-tis: the sampler here is the trainer, so these ratios are 1 unless rollouts are drawn "
                                  "ahead")
        if recipe.settings.get("optim.old_log_probs") == "sampler":
            for name in ("weight", "low", "high"):
                recipe.settings.pop(f"corrections.{name}")
            recipe.remarks.append("use-rollout-logprobs beside use-tis: the ratio of the loss is the sampler's already, so there "
                                  "is no second weight")
    if "use-opsm" in recipe.found:
        recipe.settings["corrections.opsm_delta"] = recipe.number("opsm-delta", default=1e-4)


def _set_kl(recipe: Recipe) -> None:
    kinds = {"low_var_kl": "k3", "k3": "k3", "k2": "k2", "k1": "k1"}
    coefficient = recipe.number("kl-loss-coef", default=0.0)
    if "use-kl-loss" in recipe.found and coefficient:
        kind = str(recipe.get("kl-loss-type", default="k1"))
        recipe.settings |= {"kl.coefficient": coefficient, "kl.estimator": kinds.get(kind, "k3")}
        if kind == "k1":
            recipe.remarks.append("kl-loss-type k1 (slime's default): its expected gradient is zero there; here k1 has that of "
                                  "the KL")
    elif recipe.number("kl-coef", default=0.0):
        recipe.settings |= {"kl.coefficient": recipe.number("kl-coef"), "kl.place": "reward", "kl.estimator": "k1"}
    elif recipe.settings.pop("kl.refresh_every", None) is not None:
        recipe.not_carried.append("ref-update-interval: without a KL penalty there is no reference")


def _set_groups(recipe: Recipe, prompts: float) -> None:
    name = str(recipe.get("dynamic-sampling-filter-path", default=""))
    if not name:
        recipe.keep_equal_groups()
    else:
        recipe.settings["rollout.refill_rounds"] = 10
        recipe.remarks.append("dynamic-sampling-filter-path: groups with equal rewards are replaced here, at most "
                              "rollout.refill_rounds times")
        if "nonzero_std" not in name:
            recipe.not_carried.append(f"dynamic-sampling-filter-path = {name!r}: a filter of its own")
    more = recipe.number("over-sampling-batch-size", default=prompts)
    if more > prompts:
        recipe.settings["rollout.oversampling"] = min(16.0, more / prompts)
        recipe.remarks.append("over-sampling-batch-size: slime keeps the groups that end first; here the first in order, so that "
                              "short completions are not preferred")
