"""Every experiment composes and passes its checks; every kind of mistake ends in one message that says what to do."""

import dataclasses
import re
import subprocess
import sys
import typing

import pytest
from paths import ROOT

from grpo.config import (
    ConfigError,
    EvaluateConfig,
    GenerateConfig,
    TrainConfig,
    dataclass_of,
    read_saved_config,
    save_config,
    settings_of_steps,
    to_dict,
)
from grpo.configuration.launch import CONFIG_DIR, load_config
from grpo.configuration.targets import bind

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_passes_the_checks(name, tmp_path):
    (tmp_path / "warm-seed0/start").mkdir(parents=True)  # the checkpoint that formats_sweep starts from
    (tmp_path / "warm-seed0/start/config.json").touch()
    config = load_config("train", [f"+experiment={name}", f"output_dir={tmp_path}"])
    assert config == load_config("train", [f"experiment={name}", f"output_dir={tmp_path}"])
    assert bind(config.loss, "loss").keywords == {key: value for key, value in config.loss.items() if key != "_target_"}
    assert "tokenizer" not in bind(config.env, "env").keywords


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_begins_with_its_command_line(name):
    lines = (CONFIG_DIR / f"experiment/{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# python -m grpo.train")
    assert name == "quickstart" or f"+experiment={name}" in lines[1]


@pytest.mark.parametrize("group", ["model", "env", "loss", "optim", "rollout"])
def test_every_file_of_a_group_can_be_chosen(group):
    for path in (CONFIG_DIR / group).glob("*.yaml"):
        needed = {**dict.fromkeys(["dataset", "conversations", "preferences"], ["env.path=x.jsonl"]),
                  **dict.fromkeys(["tool_class", "resource_sessions"], ["env.environment=x.py:X"]),
                  "user": ["loss._target_=grpo.losses.reinforce", "loss.normalizer=token"]}
        overrides = [f"{group}={path.stem}", *needed.get(path.stem, [])]
        config = load_config("train", overrides)
        bind(config.loss, "loss")
        bind(config.env, "env")


def test_training_without_an_experiment_runs_the_quickstart():
    config = load_config("train", [])
    assert config == load_config("train", ["+experiment=quickstart"])
    assert config.name == "quickstart-carry-seed0"
    assert config.env["_target_"] == "grpo.envs.carry.Carry"
    assert (config.warmup.steps, config.warmup.batch_size, config.warmup.lr, config.warmup.betas) == (
        450,
        64,
        2e-3,
        [0.9, 0.98],
    )
    assert (config.steps, config.rollout.prompts_per_step, config.rollout.group_size) == (60, 16, 16)
    assert (config.optim.lr, config.optim.warmup_steps, config.optim.schedule) == (3e-4, 5, "linear")
    assert config.optim.lr * config.optim.final_lr_ratio == pytest.approx(3e-5)
    assert (config.threads, config.dtype, config.device) == (1, "float32", "cpu")


def test_the_released_models_train_adapters_over_packed_experts_on_shipped_questions():
    for size in ("20b", "120b"):
        config = load_config("train", [f"+experiment=gpt_oss_{size}_lora"])
        assert config.model.path == f"openai/gpt-oss-{size}"
        assert (config.model.experts, config.model.train, config.model.lora.rank) == ("auto", "lora", 16)
        assert config.model.lora.targets == ["q_proj", "k_proj", "v_proj", "o_proj", "experts"]
        assert (ROOT / config.env["path"]).is_file()
    small = ["steps=3", "rollout.prompts_per_step=1", "rollout.group_size=8", "rollout.max_new_tokens=128"]
    assert load_config("train", ["+experiment=gpt_oss_20b_lora", *small]).rollout.max_new_tokens == 128


def test_values_are_converted_to_the_types_of_the_schema():
    config = load_config("train", ["optim.lr=1", "resume=true", "name=7", "eval.every=0"])
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.resume is True and config.name == "7" and config.eval.every == 0


BAD_ARGUMENTS = [
    # unknown keys, wherever a key can stand
    ("lr=1", "unknown key lr; did you mean optim.lr or warmup.lr? Allowed: advantage, checkpoint,"),
    ("sed=1", "unknown key sed; did you mean seed?"),
    ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr? Allowed in optim: betas, decay_steps,"),
    ("+optim.typo=1", "unknown key optim.typo."),
    ("++rollout.groupsize=4", "unknown key rollout.groupsize; did you mean rollout.group_size?"),
    ("optim={lrr: 1.0}", "unknown key optim.lrr; did you mean optim.lr?"),
    ("eval={every: 5, evry: 5}", "unknown key eval.evry; did you mean eval.every?"),
    ("warmup.stepz=5", "unknown key warmup.stepz; did you mean warmup.steps?"),
    ("model.lora.rnk=5", "unknown key model.lora.rnk; did you mean model.lora.rank?"),
    (
        "model.architecture.hidden=5",
        "unknown key model.architecture.hidden; did you mean model.architecture.hidden_size?",
    ),
    ("model.architecture.rope_scaling.factr=2", "unknown keys ['factr']"),
    ("seed.x=1", "seed"),
    # choices and missing values
    (
        "experiment=quikstart",
        "experiment = 'quikstart': no file configs/experiment/quikstart.yaml; "
        "did you mean experiment=quickstart? Available: calculator, countdown_20b,",
    ),
    ("loss=ppo", "loss = 'ppo': no file configs/loss/ppo.yaml; did you mean loss=opo? Available: bnpo, cispo,"),
    ("optim=3", "optim = 3: no file of configs/optim"),
    ("loss=null", "loss = None: no file of configs/loss"),
    ("wandb=offline", "wandb = 'offline': wandb holds keys; set wandb.KEY=VALUE"),
    ("log=null", "log = None: log holds keys; set log.KEY=VALUE"),
    ("env=dataset", "env.path: required, no value given; set with `env.path=VALUE`"),
    ("optim.lr=???", "optim.lr: required"),
    ("~rollout.temperature", "rollout.temperature: required"),
    ("optim.lr=${optim.nothing}", "optim.lr: Interpolation key 'optim.nothing' not found"),
    ("++name=lr-${optim.lrx}", "name: Interpolation key 'optim.lrx' not found; give it a value or fix the ${...}"),
    ("++seed=${sed}", "seed: Interpolation key 'sed' not found"),  # part of the name that a run gets
    # types
    ("optim.lr=abc", "optim.lr = 'abc' (str): expected a number"),
    ("rollout.group_size=2.5", "rollout.group_size = 2.5 (float): expected an integer"),
    ("optim.betas=0.9", "optim.betas = 0.9 (float): expected a list, each entry a number"),
    ("optim.betas=[a,b]", "optim.betas[0] = 'a' (str): expected a number"),
    ("resume=maybe", "resume = 'maybe' (str): expected true or false"),
    ("optim.share_prompts=often", "optim.share_prompts = 'often' (str): expected true or false"),
    ("rollout.replay_routing=sampler", "rollout.replay_routing = 'sampler' (str): expected true or false"),
    ("warmup.lr=null", "warmup.lr = None (NoneType): expected a number"),
    ("device=tpu", "device = 'tpu' (str): expected one of auto, cpu, cuda"),
    ("kl.estimator=k4", "kl.estimator = 'k4' (str): expected one of k1, k2, k3"),
    ("wandb.tags=a", "wandb.tags = 'a' (str): expected a list, each entry a string"),
    ("model.architecture.hidden_size=big", "model.architecture.hidden_size = 'big' (str): expected an integer"),
    # ranges
    ("rollout.cache_gb=0", "rollout.cache_gb = 0.0: must be > 0"),
    ("rollout.group_size=1", "rollout.group_size = 1: must be at least 2"),
    ("rollout.temperature=0", "rollout.temperature = 0.0: must be > 0"),
    ("rollout.top_p=0", "rollout.top_p = 0.0: must lie in (0, 1]"),
    ("rollout.min_p=1", "rollout.min_p = 1.0: must lie in [0, 1)"),
    ("optim.lr=-1", "optim.lr = -1.0: must be > 0"),
    ("optim.lr=.nan", "optim.lr = '.nan' (str): expected a number"),
    ("optim.lr=nan", "optim.lr = nan: must be > 0"),
    ("optim.lr=inf", "optim.lr = inf: must be > 0 and finite"),
    ("turns.failed_call_reward=nan", "turns.failed_call_reward = nan: must be finite: or null"),
    ("optim.loss_scale=1000", "optim.loss_scale = 1000.0: must be null or a power of two"),
    ("optim.in_backward=true", "optim.in_backward = True: a parameter is updated before the norm of all gradients is known: set "
                               "optim.max_grad_norm=null (now 1)"),
    ("optim.moments=int4", "optim.moments = 'int4' (str): expected one of fp32, int8"),
    ("dtype=half", "dtype = 'half' (str): expected one of auto, float32, bfloat16, float16"),
    ("optim.betas=[0.9]", "optim.betas = [0.9]: must be two numbers in [0, 1)"),
    ("optim.betas=[0.9,1]", "optim.betas = [0.9, 1.0]: must lie in [0, 1)"),
    ("checkpoint.keep=1", "checkpoint.keep = 1: must be at least 2"),
    ("seed=-1", "seed = -1: must lie in [0, 9223372036854775807]"),
    ("steps=0", "steps = 0: must be at least 1"),
    ("name=a/b", "name = 'a/b': must be a folder name"),
    (f"name={'x' * 201}", "of at most 200 bytes"),
    (f"model.path={'x' * 300}", "no such folder, nor a hub id"),
    (f"model.path={'x' * 200}/{'y' * 200}", "no such folder, nor a hub id"),
    ("threads=100000000", "threads = 100000000: must be 0 (torch's choice) or at most"),
    ("rollout.group_size=10000000000", "rollout.group_size = 10000000000: must be at least 2 and less than 2^31"),
    # contradictions
    ("optim.minibatches=20", "optim.minibatches = 20: must not exceed rollout.prompts_per_step (16)"),
    ("model.path=/nowhere", "model.path = '/nowhere': give a checkpoint"),
    ("model.architecture=null", "model.path = None: give a checkpoint"),
    ("model.train=lora", "model.lora = None: required by model.train=lora"),
    ("kl.coefficient=-1", "kl.coefficient = -1.0: must be at least 0: 0 is off"),
    ("kl.refresh_every=5", "kl.refresh_every = 5: no reference is there to renew: set kl.coefficient above 0"),
    ("checkpoint.best=avg@1", "checkpoint.best = 'avg@1': must be null or a metric of evaluations, eval/NAME"),
    ("kl.reference=first", "kl.reference = 'first' (str): expected one of start, base"),
    ("model.experts=mxfp4", "model.experts = 'mxfp4': packed experts come from a checkpoint only"),
    ("model.architecture.num_experts_per_tok=99", "num_experts_per_tok=99"),
    # the command line itself
    ("optim.lr=1e-4,2e-4", "optim.lr"),
    ("seed", "cannot read 'seed': Error parsing override 'seed'"),
    ("+seed=1=2", "cannot read '+seed=1=2': mismatched input '='"),
    ("seed=1=2", "seed = '1=2' (str): expected an integer"),
    ("optim.betas=[0.9", "optim.betas = '[0.9' (str): expected a list, each entry a number"),
    ("optim.betas.first=0.9", "optim.betas.first: optim.betas is a list; set the whole of it, as optim.betas=[A,B]"),
    ("hydra.sweeper=grid", "hydra.sweeper = 'grid': hydra.sweeper holds keys; choose a file with hydra/sweeper=NAME"),
    ("hydra=x", "unknown key hydra. Allowed: advantage,"),
    ("=5", "unknown key '' in '=5': write KEY=VALUE"),
]


@pytest.mark.parametrize("argument, expected", BAD_ARGUMENTS, ids=[argument[:60] for argument, _ in BAD_ARGUMENTS])
def test_a_bad_argument_is_refused_by_name(argument, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config("train", [argument])


def test_contradictions_of_the_released_models_are_refused():
    for arguments, expected in (
        (["model.train=full"], "model.lora = 'settings': contradict model.train=full"),
        (["model.path=/nowhere"], "model.path = '/nowhere': no such folder, nor a hub id"),
        (
            ["model.lora.targets=[q_proj,up_proj]"],
            "must be distinct names among q_proj, k_proj, v_proj, o_proj, experts, router",
        ),
        (["model.lora.rank=0"], "model.lora.rank = 0: must be at least 1"),
        (["model.memory_gb=-1"], "model.memory_gb = -1.0: must be > 0"),
        (["model.host_gb=-1"], "model.host_gb = -1.0: must be at least 0"),
        (["model.lora.adapter=/nowhere"], "model.lora.adapter = '/nowhere': no such folder"),
        (["model.train=full", "model.lora=null", "model.experts=mxfp4"], "packed experts cannot be trained in full"),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            load_config("train", ["+experiment=gpt_oss_20b_lora", *arguments])


def test_a_folder_that_is_no_checkpoint_is_named_with_the_exported_model_in_it(tmp_path):
    words = ["+experiment=gpt_oss_20b_lora", f"model.path={tmp_path}"]
    with pytest.raises(ConfigError, match=f"model.path = '{tmp_path}': a folder without config.json, .*; name one with it$"):
        load_config("train", words)
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=f"name one with it, as {tmp_path}/model, which this run exported$"):
        load_config("train", words)
    (tmp_path / "original").mkdir()
    (tmp_path / "original/config.json").write_text("{}")
    load_config("train", words)


@pytest.mark.parametrize("name, word, left", [
    ("evaluate", "+experiment=smoke", "device, distributed, dtype, env, greedy, max_batch"),
    ("evaluate", "+loss=dapo", "device, distributed, dtype, env, greedy, max_batch"),
    ("generate", "+env=carry", "current_date, device, distributed, dtype, greedy, instructions, max_batch")])
def test_files_that_choose_for_training_are_no_choice_of_evaluation_and_chat(name, word, left):
    with pytest.raises(ConfigError, match=rf"^unknown key {word[1:].partition('=')[0]}\. Allowed: {left}"):
        load_config(name, ["run=runs/x", word])


@pytest.mark.parametrize("name, words, expected", [
    ("evaluate", ["run=runs/x", "env.path=rows.jsonl"], "env = {'path': 'rows.jsonl'}: names no environment: choose one with +"),
    ("generate", ["+model=tiny", "prompt=1"], "model.path = None: a model without a checkpoint has no tokenizer: set")])
def test_an_environment_and_a_tokenizer_that_nothing_names_are_asked_for(name, words, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(name, words)


@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_a_key_of_a_model_that_nothing_chooses_is_told_how_to_choose_one(name):
    with pytest.raises(ConfigError, match=r"^model.path=x: no model is chosen here; add \+model=NAME with one of gpt_oss"):
        load_config(name, ["model.path=x", "env.path=y"][: 1 + (name == "evaluate")])


def numbers_of(schema: type, prefix: str = ""):
    """(key, type, field) of every number in a schema."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        kinds = {kind for kind in (hints[item.name], *typing.get_args(hints[item.name])) if isinstance(kind, type)}
        nested = dataclass_of(hints[item.name])
        if nested is not None:
            yield from numbers_of(nested, f"{prefix}{item.name}.")
        elif kinds & {int, float}:
            yield prefix + item.name, hints[item.name], item


def test_every_number_of_the_schema_has_an_interval_that_excludes_infinity():
    for schema in (TrainConfig, EvaluateConfig, GenerateConfig):
        keys = [(key, item.metadata["interval"]) for key, _, item in numbers_of(schema)]
        assert len(keys) >= 8 and not any(interval.endswith("inf]") for _, interval in keys)


FLOATS = [key for key, hint, _ in numbers_of(TrainConfig) if float in (hint, *typing.get_args(hint))]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_no_number_may_be_infinite_or_nan(value, tmp_path):
    lists = [f"{key}=[0.9,{value}]" for key in FLOATS if key.endswith("betas")]
    plain = [f"{key}={value}" for key in FLOATS if not key.endswith("betas")]
    assert {"kl.coefficient=inf", "optim.weight_decay=inf", "model.lora.alpha=inf", "eval.temperature=inf"} <= {
        argument.replace(value, "inf") for argument in plain}
    warmup = ["warmup.steps=1", "warmup.batch_size=1", "warmup.warmup_steps=0"]
    with pytest.raises(ConfigError) as caught:
        load_config("train", ["+experiment=gpt_oss_20b_lora", *plain, *lists, *warmup])
    assert {line.split(" =")[0] for line in str(caught.value).splitlines()} == set(FLOATS)


def test_a_reference_without_a_coefficient_can_be_renewed_where_it_has_another_use():
    renewed = ["kl.coefficient=0", "kl.refresh_every=5"]
    assert load_config("train", [*renewed, "loss=dpo", "optim.sums_log_probs=true"]).kl.refresh_every == 5


def test_the_best_checkpoint_needs_an_evaluation():
    off = ["checkpoint.best=eval/reward", "eval.every=0", "eval.at_start=false"]
    with pytest.raises(ConfigError, match="checkpoint.best = 'eval/reward': the run makes no evaluation"):
        load_config("train", [*off, "eval.at_end=false"])
    assert load_config("train", [*off, "eval.at_end=true"]).checkpoint.best == "eval/reward"


def test_all_problems_of_a_config_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config("train", ["rollout.group_size=1", "optim.lr=0", "checkpoint.keep=0"])
    assert [line.split(" =")[0] for line in str(caught.value).splitlines()] == [
        "rollout.group_size",
        "optim.lr",
        "checkpoint.keep",
    ]


BAD_NODES = [
    (
        "loss",
        {"clip_low": 0.2, "clip_hihg": 0.2},
        "unknown key loss.clip_hihg; did you mean loss.clip_high? Allowed in loss: clip_high, clip_low, dual_clip, max_ratio, "
        "normalizer",
    ),
    ("loss", {"clip_low": 0.2, "normalizer": "token"}, "loss.clip_high: required by grpo.losses.ppo"),
    ("loss", {"clip_low": "x", "clip_high": 0.2}, "loss.clip_low = 'x' (str): grpo.losses.ppo expects a number"),
    ("loss", {"clip_low": 0.2, "clip_high": 0.2, "step": 1}, "loss.step = 1: the loop supplies step"),
    ("loss", {"clip_low": 0.2, "clip_high": 0.2, "inputs": 1}, "loss.inputs = 1: the loop supplies inputs"),
    ("loss", {"_target_": "grpo.losses.gspoo"}, "has no function or class gspoo; did you mean grpo.losses.gspo?"),
    ("loss", {"_target_": "grpo.lossess.dapo"}, "cannot import grpo.lossess"),
    ("loss", {"_target_": "mine.py"}, "loss._target_='mine.py': names a file and nothing in it; write mine.py:NAME"),
    ("loss", {"_target_": "dapo"}, "loss._target_ = 'dapo': expected a dotted path"),
    ("env", {"digitz": 2}, "unknown key env.digitz; did you mean env.digits?"),
    ("env", {"digits": True}, "env.digits = True (bool): grpo.envs.carry.Carry expects an integer"),
    ("env", {"seed": 3}, "env.seed = 3: the loop supplies seed"),
    ("env", {"tokenizer": "x"}, "env.tokenizer = 'x': the loop supplies tokenizer"),
]


@pytest.mark.parametrize("key, node, expected", BAD_NODES)
def test_a_bad_keyword_of_a_target_is_refused_by_name(key, node, expected):
    target = {"loss": "grpo.losses.ppo", "env": "grpo.envs.carry.Carry"}[key]
    with pytest.raises(ConfigError, match=re.escape(expected)):
        bind({"_target_": target, **node}, key)


def test_a_target_may_be_named_by_its_file(tmp_path):
    (tmp_path / "mine.py").write_text("def half(log_probs, *, scale: float):\n    return log_probs / 2 * scale\n")
    assert bind({"_target_": f"{tmp_path}/mine.py:half", "scale": 3.0}, "loss")(4) == 6
    with pytest.raises(ConfigError, match="unknown key loss.scal; did you mean loss.scale"):
        bind({"_target_": f"{tmp_path}/mine.py:half", "scal": 3.0}, "loss")
    for path, expected in (("mine.py:halve", "mine.py has no 'halve'; it defines: half"), ("none.py:f", "no such file")):
        with pytest.raises(ConfigError, match=expected):
            bind({"_target_": f"{tmp_path}/{path}"}, "loss")


def test_a_typo_below_env_or_loss_on_the_command_line_reaches_bind():
    config = load_config("train", ["loss.clip_hihg=0.3"])
    with pytest.raises(ConfigError, match="unknown key loss.clip_hihg; did you mean loss.clip_high"):
        bind(config.loss, "loss")


def test_a_bound_target_runs_with_the_keywords_of_the_config():
    node = {"_target_": "fractions.Fraction", "denominator": 4}
    assert bind(node, "env")(3) * 4 == 3


def test_a_saved_config_is_read_back_equal(tmp_path):
    config = load_config(
        "train", ["+experiment=gpt_oss_20b_lora", r"wandb.tags=['costs \${x}',b]", "kl.coefficient=0.01"]
    )
    assert config.wandb.tags == ["costs ${x}", "b"]
    save_config(config, tmp_path / "config.yaml")
    assert read_saved_config(tmp_path / "config.yaml") == config
    with pytest.raises(ConfigError, match="nothing.yaml: no such file"):
        read_saved_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("damage", [b"seed: [1, 2", b"\xff\xfe\x00seed", b"- 1\n- 2\n", b"just text", b"", b"seed: 1\n",
                                    b"seed: ${nothing.there}\n", b"a: &a [*a]\n"])
def test_a_damaged_saved_config_is_one_message_that_names_the_file(tmp_path, damage):
    (tmp_path / "config.yaml").write_bytes(damage)
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read: ") as caught:
        read_saved_config(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


def test_plain_dicts_hold_plain_strings():
    assert type(to_dict(load_config("train", []))["device"]) is str


def test_what_may_change_on_resume_is_not_among_the_settings_of_the_steps_and_all_else_is():
    saved = settings_of_steps(load_config("train", []))
    changed = ["resume=true", "steps=80", "wandb.mode=offline", "optim.share_prompts=true", "optim.loss_scale=1024",
               "warmup.cache_dir=null", "name=other", "output_dir=elsewhere"]
    assert settings_of_steps(load_config("train", changed)) == saved
    other = settings_of_steps(load_config("train", ["resume=true", "optim.lr=1e-3", "warmup=null"]))
    assert (saved["optim.lr"], other["optim.lr"]) == (3e-4, 1e-3)
    assert saved["warmup.steps"] == 450 and "warmup.steps" not in other and other["warmup"] is None


def test_names_tell_experiments_seeds_and_settings_apart_and_find_a_run_again():
    def name(*arguments):
        return load_config("train", list(arguments)).name

    assert name("seed=3") == "quickstart-carry-seed3"
    assert name("+experiment=smoke") == "smoke-carry-seed0"
    changed = name("optim.lr=1e-3", "loss=grpo")
    assert re.fullmatch("quickstart-carry-seed0-[0-9a-f]{4}", changed)
    assert changed == name("loss=grpo", "optim.lr=1e-3", "resume=true", "steps=70", "wandb.mode=disabled")
    assert changed != name("optim.lr=2e-3", "loss=grpo")
    assert name("name=mine", "optim.lr=2e-3") == "mine"


def test_the_name_of_a_run_on_an_environment_in_a_file_is_a_folders(tmp_path):
    (tmp_path / "mine.py").write_text("class Env:\n    def __init__(self, *, tokenizer, seed): pass\n")
    name = load_config("train", [f"env._target_={tmp_path}/mine.py:Env"]).name
    assert re.fullmatch("quickstart-env-seed0-[0-9a-f]{4}", name)


def test_evaluate_and_generate_take_a_run_or_a_model():
    assert load_config("evaluate", ["run=runs/x", "num_samples=4"]).num_samples == 4
    assert load_config("generate", ["model=gpt_oss_20b"]).model.path == "openai/gpt-oss-20b"
    config = load_config("evaluate", ["model=gpt_oss_20b", "env=dataset", "env.path=x.jsonl"])
    assert config.env["path"] == "x.jsonl" and config.run is None
    for config_name, arguments, expected in (
        ("evaluate", [], "run = None: give either run=runs/NAME or a model"),
        ("evaluate", ["model=gpt_oss_20b"], "env = None: required without run="),
        ("evaluate", ["run=runs/x", "num_samples=0", "greedy=false"], "num_samples = 0: nothing to measure"),
        ("generate", ["run=runs/x", "model=gpt_oss_20b"], "and not both"),
        ("generate", ["run=runs/x", "temprature=0.5"], "unknown key temprature; did you mean temperature?"),
        ("generate", ["run=runs/x", "temperature=0"], "temperature = 0.0: must be > 0"),
        ("generate", ["step=4"], "step = 4: a step needs run="),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            load_config(config_name, arguments)


def test_a_bad_key_ends_with_code_2_without_torch_or_folders(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom grpo.configuration.launch import launch\n"
            "code = launch('train', print)\nprint('torch imported' if 'torch' in sys.modules else 'no torch')\nsys.exit(code)")
    for argument, message in (("+optim.typo=1", "unknown key optim.typo."), ("steps=0", "steps = 0: must be at least 1")):
        result = subprocess.run([sys.executable, "-c", code, argument], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 2 and result.stdout == "no torch\n"
        assert result.stderr.startswith(f"config error: {message}") and result.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_a_bad_keyword_of_the_loss_ends_with_code_2_and_without_folders(launched, tmp_path):
    result = launched("loss.clip_hihg=0.3", task="print('ran')")
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("config error: unknown key loss.clip_hihg; did you mean loss.clip_high?")
    assert list(tmp_path.iterdir()) == []


def test_a_single_run_leaves_no_folders_of_hydra_behind(launched, tmp_path):
    assert launched(task="return 6").code == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("experiment", ["tiny_lora", "gpt_oss_20b_lora", "gpt_oss_20b_full", "gpt_oss_120b_lora"])
def test_an_experiment_to_try_leaves_none_of_its_questions_to_another_environment(experiment):
    assert load_config("train", [f"+experiment={experiment}"]).env["path"] == "tests/fixtures/arithmetic.jsonl"
    other = load_config("train", [f"+experiment={experiment}", "env=tool_class", "env.environment=game.py:Game"])
    assert other.env["path"] is None
    assert "path" not in load_config("train", [f"+experiment={experiment}", "env=countdown"]).env
