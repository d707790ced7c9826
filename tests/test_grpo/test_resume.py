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
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"

# Rewards spread over every group, so that each step has a gradient although the tiny policy is never right.
SPREAD = '''
import zlib
from grpo.envs.carry import Carry
from grpo.rewards import Score

def spread(completions, completion_ids, **columns):
    return [zlib.crc32(repr(ids).encode()) % 11 / 10 for ids in completion_ids]

class SpreadCarry(Carry):
    def score(self, completions):
        return [Score(zlib.crc32(repr(c.completion_ids).encode()) % 11 / 10, {"spread": 1.0}, {}, False) for c in completions]
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
    "rollout": ("models.gpt_oss", "module.GptOss", "decode_step", False, (3, 30)),
    "backward": ("grpo.losses", "module", "token_stats", False, (1, 2)),
    "after the weights moved": ("grpo.optim", "module.Optimizer", "step", True, (1, 2)),
    "logging": ("grpo.metrics", "module._JsonlFile", "append", True, (1, 5)),
    "writing a checkpoint": ("grpo.checkpoint", "module", "_fsync", False, (1, 5)),
    "publishing a checkpoint": ("grpo.checkpoint", "module", "_publish", False, (2, 2)),
    "pruning": ("grpo.checkpoint", "module", "_prune", False, (1, 1)),
}
CARRY = ("+experiment=smoke", "name=run", "steps=8", "env._target_=spread.SpreadCarry", "checkpoint.every=2", "eval.every=3",
         "eval.max_prompts=2", "rollout.max_new_tokens=12")
UPDATES = (*CARRY, "optim.minibatches=2", "optim.epochs=2", "checkpoint.every=3", "rollout.top_p=0.9", "loss=grpo")
LORA = ("+experiment=gpt_oss_20b_lora", "name=run", "device=cpu", "dtype=float32", "threads=1", "steps=5",
        f"model.path={FIXTURES / 'tiny_mxfp4'}", f"model.tokenizer={FIXTURES / 'tokenizer_compact'}", "model.lora.rank=2",
        "model.lora.train_sinks=true", "model.lora.train_norms=true", f"env.path={FIXTURES / 'arithmetic.jsonl'}",
        "env.match=none", "env.rewards=[{fn: spread.spread}]", "kl.coefficient=0.01", "rollout.prompts_per_step=2",
        "rollout.group_size=3", "rollout.max_new_tokens=8", "eval.every=2", "eval.max_prompts=2", "checkpoint.every=1",
        "log.completions_every=1", "wandb.mode=disabled")


def signal_at(phase: str, count: int, number: signal.Signals) -> str:
    module, owner, name, after, _ = PHASES[phase]
    return SIGNAL_AT.format(module=module, owner=owner, name=name, after=after, count=count, number=int(number))


@pytest.fixture(scope="module")
def train(entry_points, tmp_path_factory):
    """Starts `python -m grpo.train` with the spread rewards importable."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "spread.py").write_text(SPREAD)

    def start(arguments, output_dir, before=""):
        return entry_points.start("grpo.train", *arguments, f"output_dir={output_dir}", before=before, path=(folder,),
                                  PYTHONPATH=f"{ROOT}:{folder}")

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
    for arguments, num_steps in ((CARRY, 8), (UPDATES, 8), (LORA, 5)):
        run_dir, _ = never_killed(arguments)
        steps = [line for line in lines(run_dir / "metrics.jsonl") if "grad_norm" in line and "warmup/step" not in line]
        assert [line["step"] for line in steps] == list(range(1, num_steps + 1))
        assert all(line["grad_norm"] > 0 for line in steps)
        paths = sorted((run_dir / "checkpoints").glob("step_*/tensors.safetensors"))
        with safe_open(paths[0], framework="pt") as older, safe_open(paths[1], framework="pt") as newer:
            assert sum(not older.get_tensor(name).equal(newer.get_tensor(name)) for name in newer.keys()) > 10


@pytest.mark.parametrize("arguments", [CARRY, UPDATES, LORA], ids=["carry", "several updates", "lora"])
def test_a_run_killed_in_five_phases_ends_like_one_never_killed(train, never_killed, tmp_path, arguments):
    expected, _ = never_killed(arguments)
    rng = random.Random(f"kill {arguments}")
    first = ["warm-up", "publishing a checkpoint"] if arguments is not LORA else ["publishing a checkpoint"]
    others = [phase for phase in PHASES if phase not in ("warm-up", *first)]
    for index, phase in enumerate([*first, *rng.sample(others, 5 - len(first))]):
        count = rng.randint(*PHASES[phase][-1])
        resume = ["resume=true"] if index else []
        result = train([*arguments, *resume], tmp_path, signal_at(phase, count, signal.SIGKILL)).wait()
        assert result.code == -signal.SIGKILL, (phase, count, result)
    result = train([*arguments, "resume=true"], tmp_path).wait()
    assert result.code == 0, result.err
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize("arguments", [CARRY, LORA], ids=["carry", "lora"])
def test_a_run_killed_at_five_random_times_ends_like_one_never_killed(train, never_killed, tmp_path, arguments):
    expected, seconds = never_killed(arguments)
    rng = random.Random(f"time {arguments}")
    for _ in range(5):
        command = train([*arguments, "resume=true"], tmp_path)
        time.sleep(rng.uniform(0.1, 0.9) * seconds)
        command.send(signal.SIGKILL)
        assert command.wait().code in (-signal.SIGKILL, 0)
    assert train([*arguments, "resume=true"], tmp_path).wait().code == 0
    assert_same_run(tmp_path / "run", expected)
