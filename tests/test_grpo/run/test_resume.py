"""A run that is killed or stopped again and again ends with the same bytes as one that never was."""

import filecmp
import json
import random
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from paths import FIXTURES
from safetensors import safe_open
from safetensors.torch import load_file

# Rewards spread over every group, so that each step has a gradient although the tiny policy is never right.
SPREAD = '''
import gc, os, sys, zlib
from grpo.envs.calculator import Calculator
from grpo.envs.carry import Carry
from grpo.environment import Score
from models.gpt_oss import GptOss

def spread(completions, completion_ids, **columns):
    return [zlib.crc32(repr(ids).encode()) % 11 / 10 for ids in completion_ids]

class SpreadCarry(Carry):
    """Says how many models are alive when a run starts; fails with seed 1 in a sweep."""

    def __init__(self, **keywords):
        super().__init__(**keywords)
        if os.environ.get("IS_SWEEP"):
            num_models = sum(isinstance(item, GptOss) for item in gc.get_objects())
            print(f"seed {self.seed} starts beside {num_models} models", file=sys.stderr)

    def prompts(self, step, **keywords):
        if os.environ.get("IS_SWEEP") == "failing" and self.seed == 1 and step == 1:
            raise KeyError("no such problem")
        return super().prompts(step, **keywords)

    def score(self, completions):
        return [Score(zlib.crc32(repr(c.completion_ids).encode()) % 11 / 10, {"spread": 1.0}, {}, False) for c in completions]

class SpreadCalculator(Calculator):
    score = SpreadCarry.score
'''

# Sends the process a signal at call number COUNT of a function: before it, or after it has returned.
SIGNAL_AT = '''
import functools, os
import {module} as module
owner = {owner}
original, calls = getattr(owner, {name!r}), [0]
@functools.wraps(original)
def counted(*arguments, **keywords):
    calls[0] += 1
    if calls[0] == {count} and not {after}:
        os.kill(os.getpid(), {number})
    result = original(*arguments, **keywords)
    if calls[0] == {count} and {after}:
        os.kill(os.getpid(), {number})
    return result
setattr(owner, {name!r}, counted)
'''

# phase -> (module, owner, function, after it, range of the call number within one process)
PHASES = {
    "warm-up": ("grpo.optim", "module.Optimizer", "step", True, (1, 3)),
    "rollout": ("models.gpt_oss", "module.GptOss", "decode", False, (3, 30)),
    "backward": ("grpo.losses", "module", "token_stats", False, (1, 2)),
    "after the weights moved": ("grpo.optim", "module.Optimizer", "step", True, (1, 2)),
    "logging": ("grpo.record.jsonl", "module.JsonlFile", "append", True, (1, 5)),
    "writing a checkpoint": ("models.formats.atomic", "module", "sync", False, (1, 5)),
    # the second one: its three files and their folder are synced, as those of the first and the folder that this went to
    "publishing a checkpoint": ("models.formats.atomic", "module", "sync", True, (9, 9)),
    "evaluation": ("grpo.evaluate", "module", "all_scored", False, (3, 3)),
    "pruning": ("grpo.run.checkpoint", "module", "_prune", False, (1, 1)),
}
CARRY = ("+experiment=smoke", "name=run", "steps=6", "env._target_=spread.SpreadCarry", "checkpoint.every=2", "eval.every=3",
         "eval.max_prompts=2", "rollout.max_new_tokens=8")
CALLS = ("+experiment=smoke", "name=run", "steps=3", "env=calculator", "env._target_=spread.SpreadCalculator",
         "env.call_rate=1.0", "rollout.max_new_tokens=80", "warmup.steps=40", "warmup.batch_size=16", "warmup.lr=0.005",
         "eval.max_prompts=2")
UPDATES = (*CARRY, "optim.minibatches=2", "optim.epochs=2", "checkpoint.every=3", "rollout.top_p=0.9", "loss=grpo",
           "optim.whole_prompts=true", "optim.replay_routing=true")
AHEAD = (*UPDATES, "optim.replay_routing=false", "rollout.max_staleness=2", "rollout.replay_routing=true", "steps=8",
         "corrections.weight=mask", "corrections.opsm_delta=0.001", "corrections.geometric=[0.9,1.1]")
SWITCH = ("+experiment=smoke", "name=run", "steps=6", "seed=3", "warmup=null", "env._target_=spread.SpreadCarry",
          "checkpoint.every=2", "eval.every=0", "eval.at_start=false", "eval.at_end=false", "rollout.max_new_tokens=8",
          "rollout.max_staleness=3", "rollout.in_flight=switch", "rollout.top_p=0.9", "rollout.refill_rounds=2",
          "rollout.prompts_per_step=4", "rollout.group_size=2", "corrections.weight=truncate")
LORA = ("+experiment=gpt_oss_20b_lora", "name=run", "device=cpu", "dtype=float32", "threads=1", "steps=3",
        f"model.path={FIXTURES / 'tiny_mxfp4'}", f"model.tokenizer={FIXTURES / 'tokenizer_brief'}", "model.lora.rank=2",
        "model.lora.train_sinks=true", "model.lora.train_norms=true", f"env.path={FIXTURES / 'arithmetic.jsonl'}",
        "env.match=none", "env.rewards=[{fn: spread.spread}]", "kl.coefficient=0.01", "rollout.prompts_per_step=2",
        "rollout.group_size=2", "rollout.max_new_tokens=6", "eval.every=2", "eval.max_prompts=2", "checkpoint.every=1",
        "log.completions_every=1", "wandb.mode=disabled")

FULL = ("+experiment=gpt_oss_20b_full", "dtype=bfloat16", "optim.lr=0.001",
        *(word for word in LORA[1:] if not word.startswith(("dtype=", "steps=", "model.lora.", "kl."))))


def signal_at(phase: str, count: int, number: signal.Signals) -> str:
    module, owner, name, after, _ = PHASES[phase]
    return SIGNAL_AT.format(module=module, owner=owner, name=name, after=after, count=count, number=int(number))


@pytest.fixture(scope="module")
def train(entry_points, tmp_path_factory):
    """Starts `python -m grpo.train` with the spread rewards importable."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "spread.py").write_text(SPREAD)

    def start(arguments, output_dir, before="", **environment):
        if output_dir is not None:
            arguments = [*arguments, f"output_dir={output_dir}"]
        return entry_points.start("grpo.train", *arguments, before=before, path=(folder,), writes_report=False,
                                  **environment)

    return start


@pytest.fixture(scope="module")
def never_killed(train, tmp_path_factory):
    """Arguments -> the folder of a run that nobody disturbed, and the seconds it took."""
    done = {}

    def run(arguments):
        if arguments not in done:
            output_dir, started = tmp_path_factory.mktemp("never_killed"), time.monotonic()
            result = train(arguments, output_dir).wait()
            assert result.code == 0, result.err
            done[arguments] = output_dir / "run", time.monotonic() - started
        return done[arguments]

    return run


def lines(path: Path) -> list[dict]:
    """The lines of a metrics file without what depends on the clock."""
    def is_timing(name):
        return name.startswith(("time/", "memory/")) or name.endswith("_per_s")

    return [{name: value for name, value in json.loads(line).items() if not is_timing(name)}
            for line in path.read_text().splitlines()]


def assert_same_run(run_dir: Path, expected: Path) -> None:
    checkpoints = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (run_dir, expected)]
    assert checkpoints[0][-1] == checkpoints[1][-1]
    newest = Path("checkpoints") / checkpoints[1][-1]
    for name in ("tensors.safetensors", "state.json"):
        assert filecmp.cmp(run_dir / newest / name, expected / newest / name, shallow=False), name
    exported = "adapter" if (expected / "adapter").exists() else "model"
    for path in (expected / exported).glob("*.safetensors"):
        assert filecmp.cmp(run_dir / exported / path.name, path, shallow=False), path.name
    assert lines(run_dir / "metrics.jsonl") == lines(expected / "metrics.jsonl")
    assert (run_dir / "completions.jsonl").read_text() == (expected / "completions.jsonl").read_text()


def test_the_runs_compared_here_do_learn_something(never_killed):
    for arguments, num_steps in ((CARRY, 6), (UPDATES, 6), (LORA, 3), (AHEAD, 8)):
        run_dir, _ = never_killed(arguments)
        steps = [line for line in lines(run_dir / "metrics.jsonl") if "grad_norm" in line and "warmup/step" not in line]
        assert [line["step"] for line in steps] == list(range(1, num_steps + 1))
        assert all(line["grad_norm"] > 0 for line in steps)
        paths = sorted((run_dir / "checkpoints").glob("step_*/tensors.safetensors"))
        with safe_open(paths[0], framework="pt") as older, safe_open(paths[1], framework="pt") as newer:
            assert sum(not older.get_tensor(name).equal(newer.get_tensor(name)) for name in newer.keys()) > 10


def test_full_training_in_bf16_with_8_bit_moments_resumes_to_the_same_bytes(train, never_killed, tmp_path):
    expected, _ = never_killed((*FULL, "steps=3"))
    for more in (("steps=2",), ("steps=3", "resume=true")):
        result = train((*FULL, *more), tmp_path).wait()
        assert result.code == 0, result.err
    newest = Path("run/checkpoints/step_000003/tensors.safetensors")
    assert filecmp.cmp(tmp_path / newest, expected.parent / newest, shallow=False)
    with safe_open(tmp_path / newest, framework="pt") as file:
        kept = {name.split(".")[1] for name in file.keys() if name.startswith("optim.")}
        assert kept == {"num_updates", "exp_avg", "exp_avg_absmax", "exp_avg_root", "exp_avg_root_absmax"}
        weight = "model.layers.0.mlp.experts.gate_up_proj"
        assert file.get_tensor(f"param.{weight}").dtype == torch.bfloat16


@pytest.mark.slow
def test_a_run_with_tools_killed_amid_its_calls_resumes_to_the_same_bytes(train, never_killed, tmp_path):
    expected, _ = never_killed(CALLS)
    calls = [call for line in (expected / "completions.jsonl").read_text().splitlines() for call in json.loads(line)["calls"]]
    assert any(not call["failed"] for call in calls) and max(line.get("turns/max", 0) for line in lines(
        expected / "metrics.jsonl")) == 2
    killed = train(CALLS, tmp_path, SIGNAL_AT.format(module="grpo.rollout.episodes", owner="module.EpisodeThread", name="_call",
                                                     after=True, count=12, number=int(signal.SIGKILL))).wait()
    assert killed.code == -signal.SIGKILL
    result = train([*CALLS, "resume=true"], tmp_path).wait()
    assert result.code == 0, result.err
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize("arguments, num_phases", [(CARRY, 5), (UPDATES, 3), (LORA, 5), (AHEAD, 3)],
                         ids=["carry", "several updates", "lora", "ahead"])
def test_a_run_killed_in_phases_ends_like_one_never_killed(train, never_killed, tmp_path, arguments, num_phases, request):
    expected, _ = never_killed(arguments)
    rng = random.Random(f"kill {request.node.callspec.id}")  # the same phases in whatever folder the project lies
    first = ["warm-up", "publishing a checkpoint"] if arguments is not LORA else ["publishing a checkpoint"]
    others = [phase for phase in PHASES if phase not in ("warm-up", "evaluation", *first)]
    for index, phase in enumerate([*first, *rng.sample(others, num_phases - len(first))]):
        count = rng.randint(*PHASES[phase][-1])
        resume = ["resume=true"] if index else []
        result = train([*arguments, *resume], tmp_path, signal_at(phase, count, signal.SIGKILL)).wait()
        assert result.code == -signal.SIGKILL, (phase, count, result)
    result = train([*arguments, "resume=true"], tmp_path).wait()
    assert result.code == 0, result.err
    assert_same_run(tmp_path / "run", expected)


def test_a_run_killed_at_random_times_ends_like_one_never_killed(train, never_killed, tmp_path):
    expected, seconds = never_killed(CARRY)
    rng = random.Random("times")
    for _ in range(3):
        is_there = (tmp_path / "run/config.yaml").exists()  # not yet, where the kill came early
        command = train([*CARRY, "resume=true"] if is_there else CARRY, tmp_path)
        time.sleep(rng.uniform(0.1, 0.9) * seconds)
        command.send(signal.SIGKILL)
        assert command.wait().code in (-signal.SIGKILL, 0)
    assert train([*CARRY, "resume=true"], tmp_path).wait().code == 0
    assert_same_run(tmp_path / "run", expected)


def newest_step(run_dir: Path) -> int:
    return max(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_??????"))


def resume_arguments(text: str) -> list[str]:
    """The arguments of the command that the last line of a stopped run's message gives."""
    found = re.search(r"resume with: python -m grpo\.train (.*)", text.strip().splitlines()[-1])
    assert found, text
    return shlex.split(found[1])


@pytest.mark.parametrize("number, num_phases", [(signal.SIGTERM, 5), (signal.SIGINT, 2), (signal.SIGHUP, 2)])
def test_a_signal_saves_finished_steps_and_the_printed_command_goes_on(train, never_killed, tmp_path, number, num_phases):
    expected, _ = never_killed(CARRY)
    run_dir = tmp_path / "run"
    spelling = "+experiment=smoke" if number == signal.SIGTERM else "experiment=smoke"
    arguments, output_dir = [spelling, *CARRY[1:]], tmp_path
    rng = random.Random(f"signal {number}")
    phases = ["warm-up", "rollout", "backward", "after the weights moved", "logging", "writing a checkpoint"]
    for phase in [phases[0], *rng.sample(phases[1:], num_phases - 1)]:
        result = train(arguments, output_dir, signal_at(phase, rng.randint(*PHASES[phase][-1]), number)).wait()
        assert result.code == 75, (phase, result)
        assert "Traceback" not in result.err and result.err.count("stopped: ") == 1
        if phase == "warm-up":
            assert not (run_dir / "checkpoints").exists()
            assert "start again with the same command" in result.err.splitlines()[-1]
        else:
            assert newest_step(run_dir) == max(line["step"] for line in lines(run_dir / "metrics.jsonl"))
        assert json.loads((run_dir / "summary.json").read_text())["exit_reason"] == "interrupted"
        if phase != "warm-up":
            arguments, output_dir = resume_arguments(result.err), None
    result = train(arguments, output_dir).wait()
    assert result.code == 0, result.err
    assert_same_run(run_dir, expected)


def test_a_signal_amid_a_rollout_drawn_ahead_or_an_update_loses_no_rollout(train, never_killed, tmp_path):
    expected, _ = never_killed(AHEAD)
    arguments, output_dir = AHEAD, tmp_path
    for phase, count in (("rollout", 20), ("backward", 2), ("after the weights moved", 5)):  # the warm-up makes four updates
        result = train(arguments, output_dir, signal_at(phase, count, signal.SIGTERM)).wait()
        assert result.code == 75, (phase, result)
        arguments, output_dir = resume_arguments(result.err), None
    result = train(arguments, output_dir).wait()
    assert result.code == 0, result.err
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_completions_in_flight_go_on_after_a_resume_as_without_it(train, never_killed, tmp_path, number):
    expected, _ = never_killed(SWITCH)
    steps = lines(expected / "metrics.jsonl")
    assert [line["step"] for line in steps if line["grad_norm"] > 0] == [1, 2, 3, 4, 5, 6]
    assert any(line["groups/dropped"] > 0 for line in steps[3:])  # refilled by the newest of the policies
    assert all(line[f"rollout/age_{age}"] > 0 for line in steps[3:] for age in (1, 2, 3))
    resume = []
    for phase, count in (("backward", 3), ("rollout", 2)):
        result = train([*SWITCH, *resume], tmp_path, signal_at(phase, count, number)).wait()
        assert result.code == (75 if number == signal.SIGTERM else -number), (phase, result)
        resume = ["resume=true"]
        state = json.loads((sorted((tmp_path / "run/checkpoints").iterdir())[-1] / "state.json").read_text())
        kinds = [name for name, _ in state["state"]["rollouts"]["records"]]
        assert "BegunRollout" in kinds
    result = train([*SWITCH, *resume], tmp_path).wait()
    assert result.code == 0, result.err
    assert_same_run(tmp_path / "run", expected)


def test_an_interrupted_evaluation_is_made_again(train, never_killed, tmp_path):
    expected, _ = never_killed(CARRY)
    # calls of score: the evaluation before training makes two, that of step 3 the third and fourth
    result = train(CARRY, tmp_path, signal_at("evaluation", 3, signal.SIGTERM)).wait()
    assert result.code == 75
    assert newest_step(tmp_path / "run") == 3
    assert not any("eval/avg@1" in line for line in lines(tmp_path / "run" / "metrics.jsonl") if line["step"] == 3)
    assert train(resume_arguments(result.err), None).wait().code == 0
    assert_same_run(tmp_path / "run", expected)


def test_a_second_signal_leaves_at_once_and_harms_nothing(train, never_killed, tmp_path):
    expected, _ = never_killed(CARRY)
    stuck = "import models.formats.atomic as atomic, time; atomic.sync = lambda *a: time.sleep(10_000)\n"
    command = train([*CARRY, "eval.at_start=false", "checkpoint.every=0"], tmp_path,
                    stuck + signal_at("rollout", 20, signal.SIGTERM))
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("run/checkpoints/.*.tmp/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "SIGTERM: saves at the next safe moment" in command.error_text()
    command.send(signal.SIGTERM)
    result = command.wait()
    assert result.code == 128 + signal.SIGTERM
    assert "SIGTERM again" in result.err
    assert train([*CARRY, "resume=true"], tmp_path).wait().code == 0
    assert_same_run(tmp_path / "run", expected)


def test_a_run_that_finished_goes_on_when_it_gets_more_steps(train, never_killed, tmp_path):
    constant = (*CARRY, "optim.schedule=constant")
    expected, _ = never_killed(constant)
    assert train([*constant, "steps=3", "eval.at_end=false"], tmp_path).wait().code == 0
    old = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert train([*constant, "resume=true"], tmp_path).wait().code == 0
    assert (tmp_path / "run/model/model.safetensors").read_bytes() != old
    assert_same_run(tmp_path / "run", expected)


SWEEP = ("-m", "experiment=smoke", "seed=1,2", "steps=2", "eval.at_start=false", "eval.at_end=false", "eval.every=0",
         "env._target_=spread.SpreadCarry")


def test_a_sweep_outlives_a_failing_member_and_says_which_failed(train, tmp_path):
    result = train(SWEEP, tmp_path, IS_SWEEP="failing").wait()
    assert result.code == 4
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1 and "SpreadCarry.prompts raised KeyError" in result.err
    summary, failed = result.err.splitlines()[-2:]
    assert summary == "sweep: 1 of 2 runs failed" and "seed=1" in failed and failed.endswith(": exit code 4")
    reasons = {path.parent.name.split("-")[2]: json.loads(path.read_text())["exit_reason"]
               for path in tmp_path.glob("*/summary.json")}
    assert reasons == {"seed1": "environment failed", "seed2": "finished"}
    assert "seed 2 starts beside 0 models" in result.err


def test_a_stopped_sweep_goes_on_with_the_printed_command(train, tmp_path):
    result = train(SWEEP, tmp_path, signal_at("backward", 2, signal.SIGTERM), IS_SWEEP="yes").wait()
    assert result.code == 75
    assert "seed 2 starts" not in result.err
    arguments = resume_arguments(result.err)
    assert "-m" in arguments and "seed=1,2" in arguments
    result = train(arguments, None).wait()
    assert result.code == 0, result.err
    assert sorted(newest_step(path.parent) for path in tmp_path.glob("*/summary.json")) == [2, 2]


BROKEN_LOG_PROBS = """
import torch, models.gpt_oss as module
original, calls = module.GptOss.scores, [0]
def scores(*arguments, **keywords):
    calls[0] += 1
    scored = original(*arguments, **keywords)
    result = scored.log_probs
    if calls[0] > {calls}:
        {fault}
    return scored._replace(log_probs=result)
module.GptOss.scores = scores
"""


def test_numbers_that_are_not_finite_end_the_run_before_the_weights_move(train, never_killed, tmp_path):
    expected, _ = never_killed(CARRY)
    # the warm-up makes 4 calls, each step one
    broken = BROKEN_LOG_PROBS.format(calls=6, fault='result = result * float("nan")')
    result = train(CARRY, tmp_path, broken).wait()
    assert result.code == 6
    assert "Traceback" not in result.err and result.err.count("error: ") == 1
    assert "step 2" in result.err and "loss" in result.err
    saved = tmp_path / "run/checkpoints/step_000002/tensors.safetensors"
    assert newest_step(tmp_path / "run") == 2 and all(t.isfinite().all() for t in load_file(saved).values())
    assert json.loads((tmp_path / "run/summary.json").read_text())["exit_reason"] == "diverged"
    assert train([*CARRY, "resume=true"], tmp_path).wait().code == 0  # healthy again: nothing of the step had happened
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize("raised, where", [
    ('torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")', "out of GPU memory: CUDA out of memory"),
    ("torch.empty(10**15)", "out of host memory: [enforce fail"), ("MemoryError()", "out of host memory: MemoryError")])
def test_out_of_memory_names_the_keys_to_change_and_the_run_resumes_with_what_only_costs_memory(train, tmp_path, raised, where):
    broken = BROKEN_LOG_PROBS.format(calls=7, fault=f"raise {raised}")
    result = train(CARRY, tmp_path, broken).wait()
    assert result.code == 5 and where in result.err, result.err
    assert "Traceback" not in result.err and "The least that was tried is a micro-batch of one sequence of" in result.err
    assert "lower rollout.max_new_tokens (now" in result.err and "a run resumes with none of these changes" in result.err
    assert newest_step(tmp_path / "run") == 3
    if where == "out of host memory: MemoryError":
        return
    smaller = ("optim.max_tokens=40", "rollout.max_batch=3", "model.activation_checkpointing=true")
    assert train([*CARRY, *smaller, "resume=true"], tmp_path).wait().code == 0
    assert newest_step(tmp_path / "run") == 6


def test_a_kept_warm_up_gives_the_same_run_and_a_damaged_one_is_made_again(train, never_killed, tmp_path):
    expected, _ = never_killed(CARRY)
    cached = [*CARRY, f"warmup.cache_dir={tmp_path / 'cache'}"]
    for output, is_loaded in (("first", False), ("second", True), ("third", False)):
        result = train(cached, tmp_path / output).wait()
        assert result.code == 0, result.err
        assert ("warm-up: loaded" in result.out) == is_loaded
        assert_same_run(tmp_path / output / "run", expected)
        file, = (tmp_path / "cache").iterdir()
        if output == "second":
            file.write_bytes(file.read_bytes()[:-1000])


CURRICULUM = (*CARRY, "curriculum.retire_unsolved=1", "curriculum.candidates=1.5", "rollout.oversampling=1.5",
              "rollout.refill_rounds=1", "rollout.overlong_buffer=4", "checkpoint.best=eval/reward", "eval.every=1")
SFT = ("+experiment=sft_tiny", "name=run", "steps=5", "checkpoint.every=2", "eval.every=2", "checkpoint.best=eval/loss",
       "rollout.prompts_per_step=3", "wandb.mode=disabled")
DPO = (*SFT, "env=preferences", f"env.path={FIXTURES / 'preferences.jsonl'}", "loss=dpo", "optim.sums_log_probs=true",
       "checkpoint.best=eval/accuracy")


@pytest.mark.parametrize("arguments", [pytest.param(CURRICULUM, marks=pytest.mark.slow), SFT, pytest.param(
    DPO, marks=pytest.mark.slow)], ids=["curriculum", "sft", "dpo"])
def test_options_about_data_resume_to_the_same_bytes_after_a_stop_within_a_step_and_a_kill(
        train, never_killed, tmp_path, arguments):
    expected, _ = never_killed(arguments)
    # a signal to stop in the update of step 3: that step is given up after its prompts were sampled, and done again
    result = train(arguments, tmp_path, signal_at("backward", 3, signal.SIGTERM)).wait()
    assert result.code == 75, result.err
    # killed as the weights of step 4 have moved
    result = train([*arguments, "resume=true"], tmp_path, signal_at("after the weights moved", 2, signal.SIGKILL)).wait()
    assert result.code == -signal.SIGKILL
    result = train([*arguments, "resume=true"], tmp_path).wait()
    assert result.code == 0, result.err
    assert_same_run(tmp_path / "run", expected)
    kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (tmp_path / "run", expected)]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_the_options_about_data_compared_here_do_something(never_killed):
    run_dir, _ = never_killed(CURRICULUM)
    steps = [line for line in lines(run_dir / "metrics.jsonl") if "groups/live" in line]
    assert max(line["curriculum/resting"] for line in steps) > 0 and min(line["reward/overlong"] for line in steps) < 0
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    assert len(json.loads((newest / "state.json").read_text())["state"]["prompt_pass_rates"]) > 6
    run_dir, _ = never_killed(DPO)
    losses = [line["loss"] for line in lines(run_dir / "metrics.jsonl") if "preference/margin" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]
