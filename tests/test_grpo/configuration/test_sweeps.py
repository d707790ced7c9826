"""Sweeps: their jobs before they start, and what is told of them when they end, whichever launcher and sweeper ran them."""

import functools
import importlib.util
import json
import pickle
import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus

from grpo.config import ConfigError
from grpo.configuration.launch import check, compose, finish, jobs_planned, load_config, prepare
from grpo.configuration.sweeps import JobResult, check_names, end_sweep, jobs_of, objective_of, outcome

# A training run in a moment: leaves a summary, and ends as its seed says.
TASK = """
print("ran", config.name, *typed_words(), flush=True)
run_dir = run_folder(config)
run_dir.mkdir(parents=True)
value = config.optim.lr * 1000
record = {key: {"value": value, "step": 1} for key in ("first", "last", "best")}
(run_dir / "summary.json").write_text(json.dumps({
    "run_name": config.name, "exit_reason": "finished", "steps": 1, "seconds": 1.0, "config": to_dict(config), "train": {},
    "eval": {"eval/greedy_accuracy": record, "eval/greedy_accuracy/ci95": record, "eval/reward": record}}))
if config.seed == 7:
    raise RuntimeError("broken")
return {8: 6, 9: 75}.get(config.seed, 0)
"""
# A launcher as those of others are: every job in a process of its own, only its pickled result comes back.
LAUNCHER = """
import pickle, subprocess, sys
import cloudpickle
from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

ConfigStore.instance().store(group="hydra/launcher", name="elsewhere", node={"_target_": "hydra_plugins.elsewhere.Elsewhere"})

class Elsewhere(Launcher):
    def setup(self, *, hydra_context, task_function, config):
        self.context, self.function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides, initial_job_idx):
        return [self.run(overrides, initial_job_idx + i) for i, overrides in enumerate(job_overrides)]

    def run(self, overrides, number):
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        job = cloudpickle.dumps((Singleton.get_state(), self.context, self.function, config))
        code = ("import pickle, sys; from hydra.core.singleton import Singleton;"
                "from hydra.core.utils import run_job, setup_globals;"
                "setup_globals(); state, context, function, config = pickle.load(sys.stdin.buffer); Singleton.set_state(state);"
                "result = run_job(hydra_context=context, task_function=function, config=config, job_dir_key='hydra.sweep.dir',"
                "job_subdir_key='hydra.sweep.subdir'); "
                "pickle.dump((result.overrides, result._return_value, result.status), open(sys.argv[1], 'wb'))")
        subprocess.run([sys.executable, "-c", code, f"{number}.pickle"], input=job, check=True)
        with open(f"{number}.pickle", "rb") as file:
            overrides, value, status = pickle.load(file)
        result = JobReturn(overrides=overrides, status=status)
        result.return_value = value
        return result
"""


@pytest.mark.parametrize("command, printed", [
    ("train", "resume with: python -m grpo.train -m seed=1,2 resume=true\n"),
    ("evaluate", "start again with: python -m grpo.evaluate -m seed=1,2\n"),  # it has no `resume`
])
def test_what_continues_a_stopped_sweep_is_the_command_that_was_typed(monkeypatch, capsys, command, printed):
    monkeypatch.setattr("sys.argv", ["command", "-m", "seed=1,2"])
    results = [JobReturn(overrides=[], status=JobStatus.COMPLETED) for _ in range(2)]
    for result in results:
        result.return_value = outcome(75)
    assert end_sweep(results, command=command) == 75
    assert capsys.readouterr().err == f"stopped: the sweep, 0 of 2 runs finished; {printed}"


@pytest.fixture
def sweep(launched):
    return functools.partial(launched, task=TASK)


def ran(result) -> list[str]:
    return [line.removeprefix("ran ") for line in result.out.splitlines() if line.startswith("ran ")]


def settings(result) -> set[tuple[float, int]]:
    """(learning rate, seed) of each job."""
    return {
        (float(re.search(r"optim\.lr=(\S+)", line)[1]), int(re.search(r"seed=(\S+)", line)[1])) for line in ran(result)
    }


def test_a_sweep_of_an_experiment_runs_every_job_under_a_name_of_its_own(sweep):
    result = sweep("experiment=quickstart_sweep")
    assert settings(result) == {(lr, seed) for lr in (1e-4, 3e-4, 6e-4) for seed in (0, 1)} and result.code == 0
    assert len({line.split()[0] for line in ran(result)}) == 6


def test_values_of_the_command_line_replace_those_of_the_experiment(sweep):
    result = sweep("-m", "+experiment=quickstart_sweep", "optim.lr=1e-4,2e-4")
    assert settings(result) == {(lr, seed) for lr in (1e-4, 2e-4) for seed in (0, 1)} and len(ran(result)) == 4
    assert result.code == 0, result.err


def test_one_value_fixes_a_key_that_the_experiment_sweeps(sweep):
    result = sweep("experiment=quickstart_sweep", "optim.lr=5e-4", "seed=3,4")
    assert settings(result) == {(5e-4, 3), (5e-4, 4)} and len(ran(result)) == 2


def test_the_sweep_of_formats_trains_each_seed_in_full_and_with_adapters_on_experts_of_each_format(tmp_path):
    for seed in range(3):
        (tmp_path / f"warm-seed{seed}/start").mkdir(parents=True)
        (tmp_path / f"warm-seed{seed}/start/config.json").touch()
    with prepare("train", ["+experiment=formats_sweep", f"output_dir={tmp_path}"]) as plan:
        configs = [finish(compose(plan, job), "train", job) for job in jobs_planned(plan)]
    variants = [("bf16", "full", None), ("bf16", "lora", 8), ("mxfp4", "lora", 8), ("nf4", "lora", 8)]
    assert [(config.seed, config.model.experts, config.model.train, config.model.lora and config.model.lora.rank)
            for config in configs] == [(seed, *variant) for seed in range(3) for variant in variants]
    assert {(config.model.path, config.optim.lr, config.warmup) for config in configs[4:8]} == {
        (str(tmp_path / "warm-seed1/start"), 3e-4, None)}
    assert len({config.name for config in configs}) == 12
    words = ["+experiment=formats_sweep", "model={experts: nf4}", "seed=2", f"output_dir={tmp_path}"]  # as a run names itself
    with prepare("train", words) as plan:
        (job,) = jobs_planned(plan)
        assert finish(compose(plan, job), "train", job).name == "formats-nf4-lora-seed2"


def test_each_job_has_a_command_of_its_own_that_runs_it_alone(sweep):
    (one, other) = ran(sweep("-m", "experiment=smoke", "seed=1,2", "wandb.group=a b"))
    assert [line.split(" ", 1)[1] for line in (one, other)] == [
        "+experiment=smoke seed=1 wandb.group=a b",
        "+experiment=smoke seed=2 wandb.group=a b",
    ]
    sweeping = ran(sweep("experiment=quickstart_sweep", "seed=5", "optim.lr=1e-4"))
    words = sweeping[0].split(" ")[1:]
    with prepare("train", words) as plan:
        (job,) = jobs_planned(plan)
        assert "seed=5" in " ".join(job)


@pytest.mark.parametrize(
    "words",
    ["name=x seed=0,1", "++name=lr${optim.lr} optim.lr=1e-4,2e-4 seed=0,1", "experiment=quickstart_sweep steps=3,4"],
)
def test_two_jobs_of_one_name_are_refused_before_any_starts(sweep, words):
    result = sweep("-m", *words.split())
    assert result.code == 2 and ran(result) == []
    assert "two jobs of the sweep would share it" in result.err and "Traceback" not in result.err


def test_a_bad_value_of_a_later_job_is_found_before_any_starts(sweep):
    result = sweep("-m", "rollout.group_size=8,1")
    assert result.code == 2 and ran(result) == [] and "rollout.group_size = 1" in result.err


def test_texts_are_swept_by_commas_without_a_space(tmp_path):
    with prepare(
        "train", ["-m", "env=dataset", "env.path=a b.jsonl,c#d.jsonl", "env.instructions=Think, then answer."]
    ) as plan:
        paths = [next(word for word in job if "env.path" in word) for job in jobs_planned(plan)]
        assert paths == ["++env.path='a b.jsonl'", "++env.path='c#d.jsonl'"]
        check(plan)
    config = load_config("train", ["-m", "++wandb.group='a,b','c'", "seed=1,2"])
    assert config.wandb.group == "a,b"


def test_jobs_of_a_sweeper_that_draws_values_are_its_ends():
    parsed = OverridesParser.create().parse_overrides(["optim.lr=interval(1,2)", "seed=0,1,2", "steps=5"])
    assert jobs_of(parsed, {}, is_grid=False) == [
        ["optim.lr=1.0", "seed=0", "steps=5"],
        ["optim.lr=2.0", "seed=2", "steps=5"],
    ]
    assert len(jobs_of(parsed[1:], {"eval.every": "1,2"}, is_grid=True)) == 6


# ---- what jobs return


def test_an_outcome_is_the_number_and_carries_code_and_folder_through_a_pickle():
    copy = pickle.loads(pickle.dumps(outcome(4, 0.5, Path("runs/x"))))
    assert (float(copy), copy.code, copy.run_dir) == (0.5, 4, Path("runs/x")) and isinstance(copy, JobResult)


def test_failed_jobs_are_listed_with_their_codes_and_the_others_have_their_table(sweep, tmp_path):
    result = sweep("-m", "seed=0,7,8", "wandb.group=a b")
    assert result.code == 1 and len(ran(result)) == 3 and "RuntimeError: broken" in result.err
    assert "sweep: 2 of 3 runs failed\n  seed=7 'wandb.group=a b': exit code 1\n" in result.err.replace(
        "+experiment=quickstart ", ""
    )
    assert "exit code 6" in result.err and "sweep: " in result.out
    assert (tmp_path / "runs/sweep_summary.md").is_file()


def test_a_signal_in_one_job_keeps_the_others_from_starting(sweep):
    result = sweep("-m", "seed=0,9,1,2")
    assert result.code == 75 and [line.split()[1] for line in ran(result)] == ["seed=0", "seed=9"]


def test_jobs_of_other_processes_report_by_their_results(sweep, tmp_path):
    pytest.importorskip("cloudpickle", reason="the launcher of this test pickles jobs with it")
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins/elsewhere.py").write_text(LAUNCHER)
    register = ("import hydra_plugins.elsewhere\nfrom hydra.core.plugins import Plugins\n"
                "Plugins.instance().register(hydra_plugins.elsewhere.Elsewhere)")
    result = sweep("-m", "hydra/launcher=elsewhere", "seed=0,8,7", before=register)
    assert result.code == 6, result.err
    assert (
        "sweep: 2 of 3 runs failed" in result.err
        and "exit code 6" in result.err
        and "exit code 1" in result.err
    )
    assert (tmp_path / "runs/sweep_summary.md").is_file() and len(ran(result)) == 3


def has_plugin(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{name}") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_of_a_plugin_report_by_their_results(sweep, tmp_path, launcher):
    if not has_plugin(f"hydra_{launcher.removesuffix('_local')}_launcher"):
        pytest.skip(f"hydra's {launcher} plugin is not installed")
    result = sweep("-m", f"hydra/launcher={launcher}", "seed=0,8")
    assert result.code == 6, result.err
    assert "sweep: 1 of 2 runs failed" in result.err and (tmp_path / "runs/sweep_summary.md").is_file()


def test_optuna_judges_runs_by_the_objective_and_ends_in_words_where_all_fail(sweep):
    if not has_plugin("hydra_optuna_sweeper"):
        pytest.skip("hydra's optuna plugin is not installed")
    drawn = [
        "-m",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=1",
        "eval.objective=reward",
    ]
    result = sweep(*drawn, "optim.lr=interval(0.001,0.002)", "hydra.sweeper.direction=maximize")
    assert result.code == 0 and len(ran(result)) == 4, result.err
    rates = [float(re.search(r"optim\.lr=(\S+)", line)[1]) for line in ran(result)]
    best = float(re.search(r"Best value: (\S+)", result.out + result.err)[1])
    assert best == pytest.approx(1000 * max(rates)) and max(rates) > min(rates)
    result = sweep(*drawn, "optim.lr=interval(0.001,0.002)", "seed=8", "output_dir=failing")
    assert result.code == 6 and "4 of 4 runs failed" in result.err and "Traceback" not in result.err, (
        result.err
    )
    assert "sweep: No trials are completed yet" in result.err


def test_an_outcome_without_a_number_cannot_be_taken_for_one():
    with pytest.raises(ValueError, match="no value to judge it by .exit code 4."):
        float(outcome(4))


def test_a_job_given_twice_is_refused_with_its_settings():
    check_names(["a", "b"], [["seed=0"], ["seed=0"]])
    with pytest.raises(ConfigError, match=r"^seed=0 optim.lr=1: two jobs of the sweep have these same settings; give each value"):
        check_names(["a", "a"], [["seed=0", "optim.lr=1"], ["seed=0", "optim.lr=1"]])


# ---- the objective


def write_summary(run_dir: Path, **values: float) -> None:
    names = {
        f"eval/{name.replace('_at_', '@')}": {"last": {"value": value, "step": 1}} for name, value in values.items()
    }
    (run_dir / "summary.json").write_text(json.dumps({"eval": names}))


def test_the_objective_is_the_last_value_of_the_named_metric(tmp_path):
    config = load_config("train", ["eval.objective=reward"])
    write_summary(tmp_path, mean_length=30.0, greedy_accuracy=0.25, reward=0.5)
    assert objective_of(tmp_path, config.eval) == 0.5
    config.eval.objective = None
    assert objective_of(tmp_path, config.eval) == 0.25
    config.eval.objective = "length"
    with pytest.raises(
        ConfigError, match="eval.objective = 'length': no metric .* There are mean_length, greedy_accuracy, reward"
    ):
        objective_of(tmp_path, config.eval)


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["eval.objective=greedy_acuracy"], "did you mean greedy_accuracy?"),
        (["eval.objective=avg@8"], "did you mean avg@1?"),
        (["eval.objective=greedy_accuracy", "eval.greedy=false"], "There are reward,"),
        (["eval.objective=reward", "eval.num_samples=0"], "There are greedy_accuracy,"),
    ],
)
def test_an_objective_that_is_not_measured_is_refused_at_the_start(arguments, part):
    with pytest.raises(ConfigError, match="eval.objective = ") as caught:
        load_config("train", arguments)
    assert part in str(caught.value)


def test_an_objective_of_the_environment_is_left_to_the_end():
    assert load_config("train", ["eval.objective=carry_accuracy_of_mine"]).eval.objective == "carry_accuracy_of_mine"


def test_a_glob_sweeps_over_the_files_of_a_group():
    with prepare("train", ["-m", "experiment=smoke", "loss=glob(*_grpo)"]) as plan:
        assert [job[-1] for job in jobs_planned(plan)] == ["loss=dr_grpo"]
    with prepare("train", ["-m", "experiment=smoke", "loss=glob(reinforce*)"]) as plan:
        assert [job[-1] for job in jobs_planned(plan)] == [
            "loss=reinforce", "loss=reinforce_plus_plus", "loss=reinforce_plus_plus_baseline"]
    with pytest.raises(ConfigError, match=r"loss=glob\(x\*\): no file of configs/loss matches"):
        load_config("train", ["-m", "loss=glob(x*)"])


def test_a_name_may_hold_the_file_that_was_chosen_for_a_group():
    assert load_config("train", ["+experiment=losses_sweep", "seed=2"]).name == "losses-dapo-seed2"
    assert load_config("train", ["+experiment=losses_sweep", "loss=rloo"]).name == "losses-rloo-seed0"
