"""The words of a command line: text as the shell passed it, Hydra's flags in any place, commands as one would type them."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import OmegaConf

from grpo.config import ConfigError
from grpo.configuration.command_line import as_typed, repeats, to_override
from grpo.configuration.launch import load_config, prepare

TEXTS = [
    "####",
    "(1)",
    "step=100",
    "a=b=c",
    "naïve café 数学 🙂",
    "a,b, c",
    r"\boxed{}",
    r"ends in \\",
    "it's",
    '"quoted"',
    "'x'",
    "$HOME",
    "${seed}",
    r"\${y}",
    "a: b",
    "  two  spaces ",
    "--help",
    "-1",
    "",
    "[1, 2",
    "[1]",
    "{a: 1}",
    "a\nb\tc",
    "~",
    "NULL",
    "true",
    "12",
    "1e-3",
    "#",
    "%s",
    "*?",
    "!x",
    "a;b|c&d",
    "???x",
    "@",
    "`x`",
    "a\\'b",
    "'",
    '"',
    "\\",
    ",",
]


TEXT_KEYS = {
    "train": [
        "env.answer_after",
        "env.instructions",
        "env.question_template",
        "wandb.project",
        "wandb.group",
        "wandb.entity",
    ],
    "evaluate": ["output", "env.answer_after", "env.instructions", "env.question_template"],
    "generate": ["prompt", "instructions", "current_date"],
}
ALREADY = {
    "train": ["env=dataset", "env.path=x.jsonl"],
    "evaluate": ["model=gpt_oss_20b", "env=dataset", "env.path=x.jsonl"],
    "generate": ["run=runs/x"],
}


@pytest.mark.parametrize("config_name", TEXT_KEYS)
def test_text_is_taken_literally_by_every_entry_point(config_name):
    keys = TEXT_KEYS[config_name]
    for i in range(0, len(TEXTS), len(keys)):
        given = dict(zip(keys, TEXTS[i:]))
        config = load_config(config_name, [*ALREADY[config_name], *(f"{key}={text}" for key, text in given.items())])
        for key, text in given.items():
            node, _, name = key.rpartition(".")
            holder = getattr(config, node) if node else config
            assert (holder[name] if isinstance(holder, dict) else getattr(holder, name)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_quoted_text_is_read_back_as_it_was_typed(text):
    assert as_typed(to_override(f"env.path={text}", str, is_sweep=False)) == f"env.path={text}"


def test_paths_keep_tildes_and_odd_characters(tmp_path):
    folder = tmp_path / "a (1), b=c: 'é' ${x}"
    folder.mkdir()
    (folder / "config.json").touch()
    config = load_config(
        "train",
        [
            "experiment=gpt_oss_20b_lora",
            f"model.path={folder}",
            f"model.lora.adapter={folder}",
            f"env.path={folder}/x #1.jsonl",
            f"output_dir={tmp_path}/ü",
        ],
    )
    assert (config.model.path, config.model.lora.adapter) == (str(folder), str(folder))
    assert config.env["path"] == f"{folder}/x #1.jsonl" and config.output_dir == f"{tmp_path}/ü"
    with pytest.raises(ConfigError, match=re.escape("model.path = '~/no-such-folder (1)': no such folder")):
        load_config("train", ["experiment=gpt_oss_20b_lora", "model.path=~/no-such-folder (1)"])


def test_null_is_no_text_and_two_plus_signs_bring_back_the_grammar():
    config = load_config(
        "train", ["env=dataset", "env.path=x", "env.answer_after=null", "++env.instructions='a, \"b\"'"]
    )
    assert (config.env["answer_after"], config.env["instructions"]) == (None, 'a, "b"')
    assert load_config("train", ["seed=3", "++name=s-${seed}"]).name == "s-3"
    for argument in ("name=s-${seed}", "output_dir=${oc.env:HOME}/runs"):
        with pytest.raises(ConfigError, match=re.escape(f"{argument.partition('=')[0]} = ")) as caught:
            load_config("train", [argument])
        assert f"++{argument.partition('=')[0]}=" in str(caught.value)


def test_what_is_no_text_is_still_typed():
    config = load_config("train", ["optim.lr=1", "resume=true", "wandb.tags=[a,é]", "env.digits=3", "steps=7"])
    assert (config.optim.lr, config.resume, config.wandb.tags, config.env["digits"], config.steps) == (
        1.0,
        True,
        ["a", "é"],
        3,
        7,
    )
    one = load_config("train", ["env=dataset", "env.path=x", "env.rewards=my_rewards.py:even"])
    assert one.env["rewards"] == "my_rewards.py:even"
    rewards = load_config("train", ["env=dataset", "env.path=x", "env.rewards=[{fn: my_rewards.py:even, weight: 0.5}]"])
    assert rewards.env["rewards"] == [{"fn": "my_rewards.py:even", "weight": 0.5}]


def test_keywords_of_an_own_environment_hold_text_where_its_annotations_say_so(tmp_path, monkeypatch):
    (tmp_path / "own_env.py").write_text(
        "class Own:\n    def __init__(self, *, tokenizer, seed, title: str, note: str | None = None, parts: list | str = '',\n"
        "                 size: int | str = 1, untyped=None):\n        pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    chosen = ["~env", "+env._target_=own_env.Own"]
    env = load_config(
        "train", [*chosen, "env.title=a, b #1", "env.note=(x)", "env.parts=[a,b]", "env.size=5", "env.untyped=5"]
    ).env
    assert env == {
        "_target_": "own_env.Own",
        "title": "a, b #1",
        "note": "(x)",
        "parts": ["a", "b"],
        "size": 5,
        "untyped": 5,
    }
    env = load_config("train", [*chosen, "env.title=5", "env.parts=f.py:g", "env.size=big (1)"]).env
    assert (env["title"], env["parts"], env["size"]) == ("5", "f.py:g", "big (1)")


def test_an_argument_that_is_not_utf_8_is_refused():
    with pytest.raises(ConfigError, match="it is not valid UTF-8"):
        load_config("generate", ["run=x", "prompt=" + os.fsdecode(b"caf\xe9")])


# ---- flags


@pytest.mark.parametrize(
    "words",
    [
        "seed=7 --cfg job",
        "--cfg job seed=7",
        "seed=7 --cfg job steps=3",
        "-c job seed=7 experiment=smoke",
        "seed=7 --cfg=job --resolve",
        "--package _global_ seed=7 --cfg job",
    ],
)
def test_the_composed_config_is_shown_wherever_the_flag_stands(launched, words):
    result = launched(*words.split())
    assert result.code == 0 and result.err == "", result.err
    assert "\nseed: 7\n" in result.out and "warmup:\n" in result.out  # of quickstart, not only train.yaml


@pytest.mark.parametrize(
    "words, part",
    [
        ("seed=7 --cfg hydra", "hydra:\n"),
        ("--info", "Config search path"),
        ("--info seed=7", "Config search path"),
        ("seed=7 --info defaults", "experiment/quickstart"),
        ("-i seed=7", "Config search path"),
        ("--hydra-help seed=1", "--multirun"),
        ("seed=1 --help", "== Config"),
        ("-h", "num_hidden_layers"),
        ("--cfg job -p optim seed=1", "lr: 0.0003"),
        ("--cfg job experiment=quickstart_sweep", "lr: 0.0001"),
    ],
)
def test_flags_that_show_something_stand_anywhere(launched, tmp_path, words, part):
    result = launched(*words.split(), task="raise SystemExit('ran')")
    assert result.code == 0 and part in result.out, result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["seed=1,2 -m", "-m seed=1,2", "seed=1,2 --multirun steps=5", "steps=5 -m seed=1,2"])
def test_a_sweep_runs_wherever_its_flag_stands(launched, words):
    result = launched(*words.split(), task="print('ran', config.seed); return 0")
    assert [line for line in result.out.splitlines() if line.startswith("ran")] == ["ran 1", "ran 2"], result.err


@pytest.mark.parametrize("name, words, said", [
    ("generate", ["run=x", "prompt=1", "prompt=2"], "prompt is given twice, prompt=1 and prompt=2"),
    ("generate", ["+model=tiny", "model=gpt_oss_20b"], "model is given twice, model=tiny and model=gpt_oss_20b"),
    ("evaluate", ["run=x", "++seed=1", "seed=2"], "seed is given twice, seed=1 and seed=2"),
])
def test_a_key_with_two_values_is_refused_where_one_would_be_lost(name, words, said):
    with pytest.raises(ConfigError, match=f"^{said}: leave one out$"):
        load_config(name, words)


def test_a_key_with_one_value_may_be_given_again_and_beside_a_file_and_a_mapping():
    words = ["seed=1", "+seed=1", "~optim.betas", "+optim.betas=[0.9,0.99]", "env=carry", "env={digits: 3}",
             "hydra.job.chdir=false", "hydra.job.chdir=false"]
    assert repeats(words) == []
    assert repeats(["a=1", "a=2", "a=1"]) == ["a is given twice, a=1 and a=2", "a is given twice, a=2 and a=1"]


def test_training_counts_the_last_of_two_values_and_says_so(launched):
    result = launched("steps=3", "seed=1", "steps=4", task="print(config.steps)\nreturn 0")
    assert result.code == 0 and result.out == "4\n"
    assert result.err == "note: steps is given twice, steps=3 and steps=4: the last counts\n"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            ["--steps", "5"],
            "unknown option --steps: settings are written KEY=VALUE; did you mean steps=5 or warmup.steps=5?",
        ),
        (
            ["--learning-rate=1e-4"],
            "unknown option --learning-rate=1e-4: settings are written KEY=VALUE; did you mean optim.lr=1e-4?",
        ),
        (["seed=1", "--verbose"], "unknown option --verbose: settings are written KEY=VALUE"),
        (["--cfg", "jub"], "argument --cfg/-c: invalid choice"),
        (["--cfg", "job", "-m"], "only one of --run, --multirun, --cfg"),
        (["--resolve"], "--resolve goes with --cfg or --help"),
        (["seed=1,2"], "seed=1,2: several values for seed; add -m for a sweep"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused_in_words(arguments, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config("train", arguments)


# ---- names of others


@pytest.mark.parametrize(
    "argument, key",
    [
        ("lr", "optim.lr"),
        ("group_size", "rollout.group_size"),
        ("kl.beta", "kl.coefficient"),
        ("beta", "kl.coefficient"),
        ("num_generations", "rollout.group_size"),
        ("learning_rate", "optim.lr"),
        ("epsilon", "loss.clip_low"),
        ("per_device_train_batch_size", "rollout.prompts_per_step"),
        ("max_completion_length", "rollout.max_new_tokens"),
        ("temperature", "rollout.temperature"),
        ("rollout.n", "rollout.group_size"),
        ("max_steps", "steps"),
        ("num_train_epochs", "steps"),  # passes over the data; optim.epochs are over a batch
        ("gradient_accumulation_steps", "optim.max_tokens"),  # one update all the same
        ("custom_reward_function.path", "env.rewards"),
        ("rank", "model.lora.rank"),
        ("actor.optim.lr", "optim.lr"),
        ("algorithm.kl_ctrl.kl_coef", "kl.coefficient"),
        ("reward_funcs", "env.rewards"),
        ("model_name_or_path", "model.path"),
        ("digits", "env.digits"),
        ("clip_high", "loss.clip_high"),
        ("save_steps", "checkpoint.every"),
    ],
)
def test_what_others_call_a_key_points_to_it(argument, key):
    with pytest.raises(ConfigError, match=f"unknown key .*; did you mean (.* or )?{re.escape(key)}( or .*)?\\?"):
        load_config("train", [f"{argument}=1"])


@pytest.mark.parametrize("argument", ["trainer.nnodes", "trainer.n_gpus_per_node", "estimators.x"])
def test_a_section_of_another_trainer_is_no_slip_for_a_key_below_one_of_ours(argument):
    with pytest.raises(ConfigError, match=r"unknown key \w+\. Allowed: "):
        load_config("train", [f"{argument}=1"])


def test_a_slip_in_a_section_above_an_unknown_key_is_pointed_out():
    with pytest.raises(ConfigError, match=r"unknown key optm; did you mean optim\?"):
        load_config("train", ["optm.nnodes=1"])


def test_a_function_given_as_a_file_of_configs_is_pointed_to_its_key():
    with pytest.raises(ConfigError, match=re.escape("did you mean loss._target_=my_losses.py:own? Available: bnpo, cispo,")):
        load_config("train", ["loss=my_losses.py:own"])


# ---- configs elsewhere


@pytest.fixture
def conf(tmp_path) -> Path:
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/loss").mkdir()
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - smoke\n  - override /loss: mine\n  - _self_\nsteps: 3\n"
    )
    (tmp_path / "conf/experiment/typo.yaml").write_text("# @package _global_\ndefaults: [smoke, _self_]\nstepz: 3\n")
    (tmp_path / "conf/experiment/missing.yaml").write_text(
        "# @package _global_\ndefaults: [smoke, override /loss: mime]\n"
    )
    (tmp_path / "conf/experiment/own_loss.yaml").write_text(
        "# @package _global_\ndefaults: [smoke, _self_]\nloss: {_target_: grpo.losses.ppo, normaliser: 3}\n"
    )
    (tmp_path / "conf/loss/mine.yaml").write_text(
        "_target_: grpo.losses.ppo\nnormalizer: sequence\nclip_low: 0.1\nclip_high: 0.3\n")
    return tmp_path / "conf"


def test_configs_of_another_folder_are_found_by_flag_and_by_search_path(conf, monkeypatch):
    monkeypatch.chdir(conf.parent)
    for place in (
        ["--config-dir", "conf"],
        ["hydra.searchpath=[file://conf]"],
        [f"hydra.searchpath=[{conf}]"],
        [f"--config-dir={conf}"],
        ["-cd", "conf"],
    ):
        config = load_config("train", ["experiment=mine", *place, "seed=4"])
        assert (config.name, config.steps, config.seed, config.loss["clip_low"]) == ("mine-carry-seed4", 3, 4, 0.1)
    with pytest.raises(ConfigError, match="--config-dir elsewhere: no such folder"):
        load_config("train", ["--config-dir", "elsewhere"])
    with pytest.raises(ConfigError, match="hydra.searchpath elsewhere: no such folder"):
        load_config("train", ["hydra.searchpath=[elsewhere]"])


@pytest.mark.parametrize(
    "words, expected",
    [
        ("+experiment=mine stepz=2", "unknown key stepz; did you mean steps?"),
        ("+experiment=mine optim.lrr=2", "unknown key optim.lrr; did you mean optim.lr?"),
        (
            "+experiment=typo",
            "unknown key stepz (set by conf/experiment/typo.yaml; ~stepz leaves it out); did you mean steps?",
        ),
        (
            "+experiment=mime",
            "experiment = 'mime': no file configs/experiment/mime.yaml or conf/experiment/mime.yaml; "
            "did you mean experiment=mine? Available: calculator, countdown_20b,",
        ),
        (
            "+experiment=missing",
            "loss = 'mime': no file configs/loss/mime.yaml or conf/loss/mime.yaml; did you mean loss=mine?",
        ),
    ],
)
def test_mistakes_in_configs_of_another_folder_get_the_same_messages(conf, monkeypatch, words, expected):
    monkeypatch.chdir(conf.parent)
    for place in ("--config-dir=conf", "hydra.searchpath=[conf]"):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            load_config("train", [place, *words.split()])


@pytest.mark.parametrize("line, expected", [
    ("model: tiny", "model = 'tiny' (str): expected a mapping with the keys path, tokenizer, architecture,"),
    ("checkpoint: often", "checkpoint = 'often' (str): expected a mapping with the keys every, keep, best"),
    ("eval: [1]", "eval = [1] (list): expected a mapping with the keys "),
    ("model: {lora: [8]}", "model.lora = [8] (list): expected a mapping with the keys rank, alpha,"),
    ("env: carry", "env = 'carry' (str): expected a mapping"),
    ("loss: [dapo]", "loss = ['dapo'] (list): expected a mapping"),
    ("warmup: 10", "warmup = 10 (int): expected a mapping with the keys steps,"),
    ("optim: {betas: {first: 0.9}}", "optim.betas = {'first': 0.9} (dict): expected a list, each entry a number"),
    ("- 1", "{conf}/experiment/wrong.yaml: is a list; expected lines KEY: VALUE"),
    ("wandb: {tags: {a: 1}}", "wandb.tags = {'a': 1} (dict): expected a list, each entry a string"),
])
def test_a_file_with_a_value_where_a_key_holds_others_is_refused_by_name(conf, line, expected):
    (conf / "experiment/wrong.yaml").write_text(f"# @package _global_\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load_config("train", ["--config-dir", str(conf), "+experiment=wrong"])
    assert str(caught.value).startswith(expected.replace("{conf}", str(conf)))


@pytest.mark.parametrize("text", ["steps: 3\n", "", "- 1\n"])
def test_an_experiment_without_its_first_line_is_told_what_is_missing(conf, text):
    (conf / "experiment/bare.yaml").write_text(text)
    with pytest.raises(ConfigError, match="experiment = 'bare': the first line of experiment/bare.yaml must be `# @pack"):
        load_config("train", ["--config-dir", str(conf), "+experiment=bare"])


def test_only_the_command_line_is_told_that_it_may_choose_an_experiment(conf):
    for word, keys in (("+experiment=typo", "eval, kl"), ("stepz=2", "eval, experiment, kl")):
        with pytest.raises(ConfigError, match=f"unknown key stepz.* Allowed: advantage, .*{keys}"):
            load_config("train", [f"--config-dir={conf}", word])


def test_an_unknown_keyword_says_which_file_brought_it(launched, conf):
    result = launched("--config-dir=conf", "experiment=own_loss", "~loss.clip_high")
    assert result.code == 2 and result.out == ""
    assert "unknown key loss.normaliser (set by conf/experiment/own_loss.yaml; " in result.err
    assert "~loss.normaliser leaves it out); did you mean loss.normalizer?" in result.err
    (conf.parent / "own.py").write_text("def own(inputs, *, scale: float):\n    pass\n")
    result = launched("loss._target_=own.own", "loss.scale=2", "~loss.clip_high", "~loss.normalizer")
    assert result.code == 2, result.out
    assert (
        "unknown key loss.clip_low (set by configs/loss/dapo.yaml; ~loss.clip_low leaves it out). "
        "Allowed in loss: scale"
    ) in result.err


def test_all_keywords_that_a_file_sets_for_another_function_are_named_at_once(launched, conf):
    (conf.parent / "own.py").write_text(
        "class Own:\n    def __init__(self, tokenizer, seed, size=1):\n        pass\n\n\n"
        "def swapped(inputs, batch):\n    pass\n\n\ndef own(inputs):\n    pass\n"
    )
    result = launched("loss._target_=own:own")
    assert "(set by configs/loss/dapo.yaml; ~loss.normalizer ~loss.clip_low ~loss.clip_high leave them out). " in result.err
    result = launched("env._target_=own.py:Own", "~env.digits", "++env.sise=3")
    assert "(set by configs/env/carry.yaml; ~env.fault_rate ~env.keep_no_carry ~env.held_out_fraction " in result.err
    assert " ~env.digits" not in result.err and " ~env.sise" not in result.err
    result = launched("loss=user", "loss._target_=own.py:swapped")
    assert "loss.batch: required by own.py:swapped; set with `loss.batch=VALUE` or in the YAML" in result.err


# ---- commands


def test_printed_commands_are_as_one_would_type_them(launched):
    words = [
        "experiment=smoke",
        "optim.lr=1e-3",
        "wandb.group=a b's #1",
        "env.digits=3",
        "model.architecture.head_dim=8",
    ]
    result = launched(*words, task="print('typed', __import__('json').dumps(typed_words())); return 0")
    (line,) = [line for line in result.out.splitlines() if line.startswith("typed ")]
    typed = json.loads(line.removeprefix("typed "))
    assert typed == [
        "+experiment=smoke",
        "optim.lr=1e-3",
        "wandb.group=a b's #1",
        "env.digits=3",
        "model.architecture.head_dim=8",
    ]
    again = load_config("train", shlex.split(shlex.join(typed)))
    assert again == load_config("train", words)


def test_the_default_experiment_is_not_spelled_out_and_added_folders_are(launched, conf):
    code = "print('typed', *typed_words()); return 0"
    assert "typed seed=3\n" in launched("seed=3", task=code).out
    result = launched("seed=3", "--config-dir", "conf", "experiment=mine", task=code)
    assert f"typed --config-dir {conf} +experiment=mine seed=3\n" in result.out, result.err


# ---- composing

COUNTED = """
import shared_compositions
from hydra._internal.config_loader_impl import ConfigLoaderImpl

shared_compositions.SHARED.clear()
original = ConfigLoaderImpl.load_configuration

def load_configuration(self, *arguments, **keywords):
    print("composed")
    return original(self, *arguments, **keywords)

ConfigLoaderImpl.load_configuration = load_configuration
"""


@pytest.mark.parametrize("words, times", [
    ("env.digits=3 seed=1", 1), ("--cfg job seed=1", 1), ("optim.lrr=1", 1),
    ("-m seed=1,2,3", 2), ("-m loss=dapo,grpo seed=1,2", 3),  # a sweep itself, and each choice of files
])  # fmt: skip
def test_a_choice_of_files_is_composed_once(launched, words, times):
    assert launched(*words.split(), before=COUNTED).out.count("composed") == times


@pytest.mark.parametrize("words", [
    "seed=3 env.digits=3 hydra.job.config.override_dirname.kv_sep=-", "+experiment=quickstart_sweep ~wandb.group loss=grpo",
    "~env +env._target_=own.Env eval={every:3} ++name=lr-${optim.lr}",
])  # fmt: skip
def test_a_copy_with_its_own_values_is_what_hydra_composes(words):
    with prepare("train", words.split()) as plan:
        loader = plan.hydra.config_loader
        plain = ConfigLoaderImpl(loader.config_search_path)
        for overrides in (plan.overrides, [*plan.overrides, "++seed=5"]):
            copy, composed = (it.load_configuration("train", overrides, RunMode.RUN) for it in (loader, plain))
            assert OmegaConf.to_container(copy, resolve=False) == OmegaConf.to_container(composed, resolve=False)
