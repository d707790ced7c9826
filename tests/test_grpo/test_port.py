"""Recipes of other trainers become experiments that load, and nothing of them is passed over."""

from pathlib import Path

import pytest
import yaml
from paths import FIXTURES

from grpo.config import flatten
from grpo.configuration.launch import load_config
from grpo.port import FRAMEWORKS, main, ported
from grpo.porting.shell import commands_of, flags_of

RECIPES = sorted((FIXTURES / "recipes").iterdir())
DATA = (f"env.path={FIXTURES / 'arithmetic.jsonl'}", "env.subset=null", "env.split=null", "env.prompt_key=question",
        "env.answer_key=answer", "env.answer_after=null", "env.match=numeric", "env.rewards=null", "env.eval_path=null",
        "env.held_out_fraction=0.25", f"model.path={FIXTURES / 'tiny_mxfp4'}",
        f"model.tokenizer={FIXTURES / 'tokenizer_compact'}")


def framework_of(path: Path) -> str:
    return path.name.partition("_")[0]


def settings(name: str) -> dict:
    text = ported(framework_of(Path(name)), FIXTURES / "recipes" / name)
    tree = yaml.safe_load(text)
    groups = {key.removeprefix("override /"): value for item in tree.pop("defaults") for key, value in item.items()}
    return flatten(tree) | {f"/{group}": value for group, value in groups.items()}


def comments(name: str) -> str:
    text = ported(framework_of(Path(name)), FIXTURES / "recipes" / name)
    return " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))


def place(path: Path, folder: Path) -> list[str]:
    """Writes the ported recipe where the loader finds it; returns the words that choose it."""
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / f"{path.stem}.yaml").write_text(ported(framework_of(path), path))
    return ["--config-dir", str(folder), f"+experiment={path.stem}"]


def test_there_are_ten_recipes_of_the_four_trainers():
    assert len(RECIPES) == 10 and {framework_of(path) for path in RECIPES} == set(FRAMEWORKS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_what_is_printed_is_an_experiment(path, tmp_path):
    config = load_config("train", [*place(path, tmp_path), *DATA])
    wanted = yaml.safe_load(ported(framework_of(path), path))
    assert (config.steps, config.rollout.group_size, config.optim.lr) == (
        wanted["steps"], wanted["rollout"]["group_size"], wanted["optim"]["lr"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_name_of_a_recipe_is_used_or_named(path):
    module = FRAMEWORKS[framework_of(path)]
    found = module.read(path.read_text(), path.name)
    recipe = module.port(found)
    told = recipe.no_account + recipe.not_carried
    assert len(found) > 5
    for name in found:
        assert name in module.TABLE or any(entry.split(" ")[0] == name for entry in told), name


def test_trl():
    found = settings("trl_lora.py")
    # 4 x 8 completions of groups of 8; a tenth of 100 updates
    assert (found["rollout.prompts_per_step"], found["optim.warmup_steps"], found["steps"]) == (4, 10, 100)
    assert (found["/loss"], found["advantage.scale"], found["loss.max_ratio"]) == ("dr_grpo", "none", 4.0)
    assert (found["rollout.max_new_tokens"], found["rollout.top_k"], found["env.subset"]) == (1024, 0, "main")
    assert (found["model.lora.rank"], found["model.lora.alpha"], found["optim.betas"]) == (32, 64.0, [0.9, 0.99])
    assert "not carried: frobnicate = 3" in comments("trl_lora.py") and "reward 'brevity'" in comments("trl_lora.py")


def test_trl_yaml_with_several_rewards_and_a_penalty():
    found = settings("trl_math.yaml")
    assert [(item["fn"], item["weight"]) for item in found["env.rewards"]] == [
        ("trl.rewards:accuracy_reward", 1.0), ("trl.rewards:think_format_reward", 0.5), ("my_rewards.py:tag_count", 0.25)]
    assert (found["kl.coefficient"], found["kl.estimator"], found["optim.epochs"]) == (0.04, "k2", 2)
    assert (found["optim.schedule"], found["optim.final_lr_ratio"], found["checkpoint.keep"]) == ("cosine", 0.1, 2)
    assert "only gpt-oss is trained here" in comments("trl_math.yaml")


def test_trl_command_line_with_sequence_ratios():
    found = settings("trl_sequence.sh")
    # 2 x 8 rounds x 8 processes / groups of 16; 8 / 2 updates of each batch, so 300 / 4 steps
    assert (found["rollout.prompts_per_step"], found["optim.minibatches"], found["steps"]) == (8, 4, 75)
    assert (found["/loss"], found["loss.clip_low"], found["loss.clip_high"]) == ("gspo", 3e-4, 4e-4)
    assert (found["rollout.max_new_tokens"], found["optim.mask_truncated"]) == (2048, True)


def test_verl():
    found = settings("verl_lora.sh")
    assert (found["rollout.prompts_per_step"], found["optim.minibatches"], found["rollout.group_size"]) == (64, 4, 5)
    assert (found["kl.coefficient"], found["kl.estimator"], found["loss.dual_clip"]) == (0.001, "k3", 3.0)
    assert found["env.path"] == "~/data/train.parquet" and found["env.on_long_prompt"] == "skip"
    assert "dual clip is always on" in comments("verl_lora.sh")


def test_verl_with_variables_of_the_script():
    found = settings("verl_dapo.sh")
    assert (found["rollout.max_new_tokens"], found["rollout.overlong_buffer"]) == (4096, 1024)
    assert (found["rollout.overlong_penalty"], found["optim.max_tokens"], found["env.reasoning_effort"]) == (0.5, 12288, "medium")
    assert (found["rollout.refill_rounds"], found["rollout.oversampling"], found["loss.clip_high"]) == (9, 3.0, 0.28)
    assert (found["optim.warmup_steps"], found["optim.minibatches"]) == (40, 4)  # 10 steps of 4 updates
    assert (found["/model"], found["model.path"], found["rollout.top_k"]) == ("gpt_oss_120b", "~/models/gpt-oss-120b", 0)


def test_verl_yaml():
    found = settings("verl_gspo.yaml")
    assert (found["/loss"], found["loss.normalizer"], found["advantage.scale"]) == ("gspo", "sequence", "none")
    assert (found["corrections.weight"], found["corrections.high"], found["optim.warmup_steps"]) == ("truncate", 2.0, 40)
    assert found["env.rewards"] == "my_rewards.py:grade"
    assert (found["corrections.geometric"], found["corrections.max_k3"]) == ([0.8, 1.25], 0.01)
    assert found["rollout.replay_routing"] is True
    assert "rollout_rs = 'seq_max_k2' with 3" in comments("verl_gspo.yaml")
    assert "not carried: actor_rollout_ref.actor.router_replay_speed = 2" in comments("verl_gspo.yaml")


def port_text(framework: str, text: str, name: str):
    return FRAMEWORKS[framework].port(FRAMEWORKS[framework].read(text, name))


def test_verl_losses_keep_their_own_average_and_bounds():
    actor = "actor_rollout_ref.actor."
    words = f"{actor}policy_loss.loss_mode={{}} {actor}loss_agg_mode={{}} trainer.total_training_steps=-1"
    found = port_text("verl", "python3 x " + words.format("cispo", "seq-mean-token-mean"), "x.sh").settings
    assert (found["loss.min_ratio"], found["loss.max_ratio"], found["loss.normalizer"]) == (0.8, 1.2, "sequence")
    assert "steps" not in found  # -1 is the number of epochs there
    found = port_text("verl", "python3 x " + words.format("kl_cov", "seq-mean-token-sum-norm"), "x.sh").settings
    assert (found["loss.normalizer"], found["loss.share"], found["loss.coefficient"]) == ("constant", 2e-4, 0.1)
    found = port_text("verl", "python3 x " + words.format("dppo_tv", "token-mean"), "x.sh").settings
    assert (found["loss.max_ratio"], found["loss.normalizer"]) == (3.0, "token")
    recipe = port_text("verl", "python3 x " + words.format("gspo", "seq-mean-token-sum"), "x.sh")
    assert recipe.settings["loss.normalizer"] == "sequence"
    assert any("gspo averages over sequences in verl" in remark for remark in recipe.remarks)


def test_verl_names_of_the_file_are_filled_in_and_others_are_named():
    recipe = port_text("verl", """
data: {train_batch_size: 64, max_response_length: "${data.train_batch_size}", max_prompt_length: "${env.of.nobody}"}
actor_rollout_ref: {actor: {ppo_mini_batch_size: "${data.train_batch_size}", clip_ratio_high: "${env.of.nobody}"}}
algorithm: {use_kl_in_reward: true, kl_penalty: low_var_kl}
""", "x.yaml")
    assert "optim.minibatches" not in recipe.settings and recipe.settings["rollout.max_new_tokens"] == 64
    assert [text.split(" = ")[0] for text in recipe.not_carried[:3]] == [
        "data.max_prompt_length", "actor_rollout_ref.actor.clip_ratio_high", "algorithm.adv_estimator"]
    assert "algorithm.kl_penalty = 'low_var_kl': rewards are lowered by k1 here" in recipe.not_carried


def test_trl_keeps_weights_of_known_rewards_an_entropy_target_that_is_on_and_no_cap_below_1():
    text = ("GRPOConfig(loss_type='cispo', reward_weights=[2.0, 0.5], entropy_target=0.3{})\n"
            "GRPOTrainer(reward_funcs=[mine, 'r.py:two'])")
    recipe = port_text("trl", text.format(""), "x.py")
    assert recipe.settings["env.rewards"] == [{"fn": "r.py:two", "weight": 0.5}] and "reward 'mine'" in recipe.not_carried[-1]
    assert recipe.settings["loss.max_ratio"] == 5.0 and any("a cap of 0.2" in text for text in recipe.not_carried)
    assert "entropy.target" not in recipe.settings
    assert port_text("trl", text.format(", use_adaptive_entropy=True"), "x.py").settings["entropy.target"] == 0.3


@pytest.mark.parametrize("text, told", [
    ("importance_sampling_level='sequence', delta=4.0", "delta = 4: gspo has no second bound"),
    ("loss_type='luspo', delta=4.0", "delta = 4: luspo has no second bound"),
    ("loss_type='luspo'", "luspo takes the ratio of the sequence here")])
def test_what_trl_s_sequence_losses_lose_is_told(text, told):
    recipe = port_text("trl", f"GRPOConfig({text})", "x.py")
    assert "loss.max_ratio" not in recipe.settings and any(told in line for line in recipe.not_carried + recipe.remarks)


def test_slime():
    found = settings("slime_gpt_oss.sh")
    assert (found["steps"], found["rollout.prompts_per_step"], found["/loss"]) == (3000, 32, "dapo")
    assert found["env.eval_path"] == ["/data/small.jsonl", "/data/hard.jsonl"] and "force" not in comments("slime_gpt_oss.sh")
    assert (found["kl.estimator"], found["optim.warmup_steps"], found["env.match"]) == ("k1", 30, "math")
    assert "optim.minibatches" not in found  # 32 x 8 completions are one global batch
    found = settings("slime_tis.sh")
    assert (found["rollout.oversampling"], found["corrections.high"], found["corrections.opsm_delta"]) == (2.0, 3.0, 1e-4)
    assert (found["optim.minibatches"], found["rollout.replay_routing"], found["advantage.scale"]) == (4, True, "none")
    assert "not carried: brand-new-option = '7'" in comments("slime_tis.sh")


def test_prime():
    found = settings("prime_lora.toml")
    assert (found["rollout.prompts_per_step"], found["rollout.max_staleness"], found["/loss"]) == (16, 2, "dppo_tv")
    assert "orchestrator.train.env = [{'name': 'alphabet'" in comments("prime_lora.toml")
    assert (found["rollout.refill_rounds"], found["optim.weight_decay"], found["wandb.project"]) == (0, 0.0, "example")
    found = settings("prime_math.toml")
    assert (found["loss.clip_low"], found["loss.clip_high"], found["advantage.scale"]) == (0.1, 0.3, "mean")
    assert (found["optim.schedule"], found["optim.decay_steps"], found["rollout.temperature"]) == ("linear", 100, 0.8)
    assert (found["rollout.refill_rounds"], found["rollout.max_batch"], found["wandb.project"]) == (10, 96, "example")
    assert "trainer.optim.type = 'muon': AdamW in its place" in comments("prime_math.toml")
    assert "'ratio': 0.5" in comments("prime_math.toml")


def test_prime_files_of_one_program_have_its_table_at_the_top():
    recipe = port_text("prime", "batch_size = 64\ngroup_size = 4\n[train.sampling]\nmax_completion_tokens = 32\n"
                                "[[train.source]]\nname = 'a'\n", "orch.toml")
    assert [recipe.settings[f"rollout.{name}"] for name in ("prompts_per_step", "group_size", "max_new_tokens")] == [16, 4, 32]
    recipe = port_text("prime", "max_steps = 9\n[model]\nseq_len = 256\n[optim]\nlr = 3e-6\n[model.lora]\n", "train.toml")
    assert (recipe.settings["optim.lr"], recipe.settings["optim.weight_decay"]) == (3e-6, 0.01)


def test_how_old_completions_may_get_is_carried_as_steps_and_told():
    text = "[orchestrator]\nmax_off_policy_steps = 32\ngroup_size = 8\n[trainer.optim]\nlr = 1e-6\n"
    recipe = port_text("prime", text, "x.toml")
    assert recipe.settings["rollout.max_staleness"] == 1 and any("a bound there" in remark for remark in recipe.remarks)
    words = ("python -m verl.x.main async_training.staleness_threshold=0.5 async_training.require_batches=2 "
             "async_training.trigger_parameter_sync_step=3 rollout.total_rollout_steps=$(((64*10*3))) data.train_batch_size=0 "
             "actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.rollout.n=8")
    found = port_text("verl", words, "x.sh").settings
    # 2 x 3 batches of 32 prompts lie between two handings over of the weights; 1,920 prompts / 192
    assert (found["rollout.max_staleness"], found["rollout.prompts_per_step"], found["optim.minibatches"], found["steps"]) == (
        1, 192, 6, 10)
    words = "python3 -m verl.experimental.one_step_off_policy.main_ppo actor_rollout_ref.rollout.n=8"
    assert port_text("verl", words, "x.sh").settings["rollout.max_staleness"] == 1
    assert settings("slime_tis.sh")["rollout.max_staleness"] == 1


@pytest.mark.parametrize("framework, name, text", [
    ("prime", "sft.toml", "[data]\nname = 'a'\n[optim]\nlr = 1e-5\n"), ("prime", "infer.toml", "[vllm]\nmodel = 'a'\n"),
    ("slime", "sft.sh", "A=(--rollout-batch-size 8 --loss-type sft_loss)\npython train_async.py ${A[@]}"),
    ("verl", "sft.sh", "torchrun -m verl.trainer.sft data.train_files=a optim.lr=1e-5"),
    ("trl", "rloo.py", "RLOOTrainer(args=RLOOConfig(learning_rate=1e-5), train_dataset=load_dataset('a'))"),
    ("trl", "sft.sh", "trl sft --learning_rate 1e-5")])
def test_recipes_of_something_else_are_refused(framework, name, text):
    with pytest.raises(ValueError, match="has no|has none|is none of GRPO|uses none of|is no recipe of trl grpo"):
        port_text(framework, text, name)


def corrected(options: str) -> str:
    return "python x actor_rollout_ref.rollout.n=8 " + " ".join(
        f"algorithm.rollout_correction.{option}" for option in options.split())


@pytest.mark.parametrize("options, expected", [
    # bounds of k1 hold for sampler / trainer: 1 / 1.25 and 1 / 0.8
    ("rollout_rs=seq_mean_k1 rollout_rs_threshold=0.5_1.25", {"geometric": [0.8, 2.0]}),
    ("rollout_rs=seq_mean_k1 rollout_rs_threshold=1.25", {"geometric": [0.8, 1.25]}),
    ("rollout_rs=geometric rollout_rs_threshold=1.25 rollout_rs_threshold_lower=0.5", {"geometric": [0.5, 1.25]}),
    ("rollout_rs=seq_mean_k3 rollout_rs_threshold=0.01", {"max_k3": 0.01}),
    ("rollout_rs=token_k1 rollout_rs_threshold=0.5_1.25", {"weight": "mask", "level": "token", "low": 0.8, "high": 2.0}),
    ("rollout_is=token rollout_is_threshold=3 rollout_rs=token_k1 rollout_rs_threshold=0.5_1.25",
     {"weight": "mask", "level": "token", "low": 0.8, "high": 2.0}),
    ("rollout_is=sequence rollout_rs=null rollout_rs_threshold=null",
     {"weight": "truncate", "level": "sequence", "low": 0.0, "high": 2.0})])
def test_verl_corrections(options, expected):
    found = port_text("verl", corrected(options), "x.sh").settings
    assert {key.removeprefix("corrections."): value for key, value in found.items() if key.startswith("corrections.")} == expected


@pytest.mark.parametrize("options, told", [
    ("rollout_rs=seq_max_k2 rollout_rs_threshold=2", "rollout_rs = 'seq_max_k2' with 2"),
    ("rollout_rs=seq_mean_k1 rollout_rs_threshold=null", "rollout_rs = 'seq_mean_k1' with None: no bounds"),
    ("rollout_rs=geometric rollout_rs_threshold=0.9_0.95", "a ratio of 1 is outside"),
    ("rollout_is=sequence rollout_rs=token_k1 rollout_rs_threshold=0.5_2.0", "corrections.weight is truncate already"),
    ("bypass_mode=true rollout_rs=token_k1 rollout_rs_threshold=0.5_2.0", "needs optim.old_log_probs=trainer"),
    ("rollout_is=token rollout_is_batch_normalize=true", "weights keep their mean here")])
def test_what_of_verl_s_corrections_has_no_counterpart_is_told(options, told):
    recipe = port_text("verl", corrected(options), "x.sh")
    assert any(told in line for line in recipe.not_carried)


def test_verl_in_bypass_mode_takes_the_ratio_to_the_sampler_or_weighs_reinforce_by_it():
    words = corrected("bypass_mode=true rollout_is=sequence loss_type={}") + " algorithm.adv_estimator=rloo"
    recipe = port_text("verl", words.format("reinforce"), "x.sh")
    assert (recipe.loss, recipe.settings["corrections.level"], recipe.settings["optim.old_log_probs"]) == (
        "reinforce", "sequence", "trainer")
    assert not {"loss.clip_low", "loss.dual_clip"} & recipe.settings.keys()
    recipe = port_text("verl", words.format("ppo_clip"), "x.sh")
    assert recipe.loss == "dapo" and recipe.settings["optim.old_log_probs"] == "sampler"
    assert "corrections.weight" not in recipe.settings


def test_trl_scripts_take_settings_from_argparse_from_their_docstring_and_from_assignments():
    recipe = port_text("trl", '''"""
Run it with
accelerate launch --num_processes 2 script.py --learning_rate 3e-5 --num_generations 4 --per_device_train_batch_size 8
or for another model
accelerate launch script.py --learning_rate 1e-4
"""
script_args, training_args, model_args = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config()
training_args.max_steps = 30
train, test = load_dataset("org/questions", split=["train[:5%]", "test[:5%]"])
trainer = GRPOTrainer(model=model_args.model_name_or_path, args=training_args, reward_funcs=["r.py:one"])
''', "x.py")
    found = recipe.settings
    # 8 x 2 completions of groups of 4
    assert (found["optim.lr"], found["rollout.prompts_per_step"], found["rollout.group_size"], found["steps"]) == (3e-5, 4, 4, 30)
    assert (found["env.split"], found["env.eval_split"], found["rollout.refill_rounds"]) == ("train[:5%]", "test[:5%]", 0)
    assert "model (none)" in " ".join(recipe.remarks) and "further commands of the docstring = 1" in recipe.not_carried
    recipe = port_text("trl", '''
parser.add_argument("--learning-rate", type=float, default=5e-6)
parser.add_argument("--temperature", type=float)
args = parser.parse_args()
config = GRPOConfig(learning_rate=args.learning_rate, temperature=args.temperature, max_steps=len(rows),
                    chat_template_kwargs={"reasoning_effort": "high"})
GRPOTrainer(model=args.model, args=config, train_dataset=load_dataset(args.name))
''', "x.py")
    assert recipe.settings["optim.lr"] == 5e-6 and recipe.settings["env.reasoning_effort"] == "high"
    assert not {"rollout.temperature", "env.path", "steps"} & recipe.settings.keys()
    assert {"temperature = args.temperature: is known only when the program runs",
            "dataset_name = args.name: is known only when the program runs"} <= set(recipe.not_carried)


def test_a_path_with_a_variable_of_the_shell_is_not_taken_for_a_path():
    text = ported("verl", FIXTURES / "recipes" / "verl_dapo.sh")
    assert "eval_path: " not in text and "not carried: env.eval_path = '$heldout_path'" in text


def test_a_recipe_without_a_number_of_steps_or_completions_is_told_so():
    assert "the file gives no number of steps: steps is 200" in comments("verl_lora.sh")
    recipe = port_text("verl", "python x actor_rollout_ref.rollout.n=1", "x.sh")
    assert "rollout.group_size" not in recipe.settings and "actor_rollout_ref.rollout.n = 1" in recipe.not_carried[0]


def test_shell_words_have_variables_arithmetic_arrays_and_defaults():
    text = 'N=3\nARGS=(\n  --a $((N * 2))  # --gone 1\n  --b "x y"\n)\nM=${M:-7}\nrun.sh --c ${M} \\\n  --flag ${ARGS[@]}\n'
    assert flags_of([word for words in commands_of(text) for word in words]) == {"a": "6", "b": "x y", "c": "7", "flag": True}


def test_shell_words_in_quotes_go_over_lines_and_arrays_keep_theirs():
    text = ("cat > x.py <<'END'\nprint(\"don't\")\nEND\n"
            "if [ -n \"$X\" ]; then\n  A=(\n    --a \"1 2\"  # it's (one\n  )\nelse\n  A=()\nfi\n"
            "HERE=\"$(cd \"$(dirname \"$0\")\" && pwd)\"\nMORE=\"\n  b.c=3 \\\n  d.e=${Y:-\"4\"}\n\"\n"
            "launch --json='{\n \"k\": 1}' \"${A[@]}\" $MORE --here \"$HERE\" --len $(((1 + 2) * 3 / 2)) 2>&1 | tee log\n")
    assert commands_of(text)[-2] == ["launch", '--json={\n "k": 1}', "--a", "1 2", "b.c=3", "d.e=4", "--here",
                                     '$(cd "$(dirname "$0")" && pwd)', "--len", "4"]
    with pytest.raises(ValueError, match="line 2 opens \" which nothing closes"):
        commands_of('a\nb "c\n')


def test_arrays_may_grow_and_have_a_comment_behind():
    text = "local N=${M:=3}\nA=( --x 1 ) # of one line\nA+=( --y 2 )\nB=(\n  --z ${N} # and ) here\n)\nrun ${A[@]} ${B[@]}\n"
    assert flags_of([word for words in commands_of(text) for word in words]) == {"x": "1", "y": "2", "z": "3"}


def test_a_file_of_another_kind_is_refused_with_its_name(tmp_path, capsys):
    files = (("trl", "a.py", "x = 1"), ("verl", "a.sh", "echo"), ("slime", "a.sh", "echo"), ("prime", "a.toml", "="))
    for framework, name, text in files:
        (tmp_path / name).write_text(text)
        assert main([framework, str(tmp_path / name)]) == 2
        assert f"{tmp_path / name}: cannot be read as a recipe of {framework}" in capsys.readouterr().err
    assert main(["trlx", "a"]) == 2 and "expected: python -m grpo.port trl|verl|slime|prime FILE" in capsys.readouterr().err


@pytest.mark.parametrize("name, content, said", [
    ("none.yaml", None, "none.yaml"), ("bytes.yaml", b"\xff\x00", "bytes.yaml: cannot be read as a recipe of trl: 'utf-8' codec"),
    ("zero.yaml", b"learning_rate: 1\ngradient_accumulation_steps: 0", "zero.yaml: a learning rate, batch or number of steps")])
def test_a_recipe_that_cannot_be_read_or_divides_by_0_is_refused_with_its_name(tmp_path, capsys, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["trl", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("framework, text, said", [
    ("verl", "x actor_rollout_ref.model.lora_rank=8 actor_rollout_ref.model.lora_alpha=abc", "lora_alpha = 'abc': is no number"),
    ("verl", "x actor_rollout_ref.model.lora_rank=abc", "lora_rank = 'abc': is no number"),
    ("verl", "x actor_rollout_ref.model.lora_rank=8 data.train_files='[a'", "train_files = '[a': is no list that YAML reads"),
    ("slime", "x --n-samples-per-prompt 8 --use-lora --lora-alpha y", "lora-alpha = 'y': is no number"),
    ("trl", "beta: 0.1\nsync_ref_model: true\nref_model_sync_steps: x", "ref_model_sync_steps = 'x': is no number"),
    ("trl", "beta: 0.1\nreward_weights: [a]", r"reward_weights = ['a']: is no number"),
    ("prime", "[trainer.model.lora]\nalpha = 'y'\n[orchestrator]\ngroup_size = 8", "model.lora.alpha = 'y': is no number")])
def test_a_value_of_another_type_is_named_and_the_rest_carried(framework, text, said):
    name = {"verl": "a.sh", "slime": "a.sh", "trl": "a.yaml", "prime": "a.toml"}[framework]
    assert any(said in line for line in port_text(framework, text, name).not_carried)
