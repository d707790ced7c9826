"""Which policy samples which step, and that it is the one whose log-probs are on record."""

import json
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from version_gaps import gaps

import grpo.ahead
from grpo.ahead import beside, fill, staleness
from grpo.batch import pack
from grpo.config import InFlight
from grpo.explain import Request, explain
from grpo.out_of_memory import attempt
from grpo.rollout.session import Interrupted
from grpo.run.checkpoint import load_run
from grpo.run.policy import load_run_policy
from grpo.run.rollouts import read
from grpo.run.start import Run
from grpo.update import make_update
from models.decoder import CAPTURES


@pytest.mark.parametrize("num_ahead", [0, 1, 3])
@pytest.mark.parametrize("resumed_at", [0, 2])
def test_a_step_trains_on_the_policy_of_so_many_steps_before(monkeypatch, num_ahead, resumed_at):
    drawn = []
    monkeypatch.setattr(grpo.ahead, "collect", lambda env, sampler, config, step, *_: drawn.append((step, run.step)) or step)
    monkeypatch.setattr(grpo.ahead, "write", lambda rollouts: None)
    config = SimpleNamespace(rollout=SimpleNamespace(max_staleness=num_ahead, in_flight=InFlight.keep), steps=6)
    run = Run(config, *[None] * 6, SimpleNamespace(progress=lambda name: None), None)
    trained = []
    for run.step in range(6):
        if run.step == resumed_at:  # killed amid a step, after all were drawn: a checkpoint has the others
            run.rollouts = run.rollouts[:num_ahead]
        fill(run, num_ahead=num_ahead, should_stop=lambda: False)
        trained.append((run.rollouts[0].groups, run.step - staleness(run, run.rollouts[0])))
        run.rollouts.pop(0)
    assert trained == [(step, max(0, step - num_ahead)) for step in range(6)]
    assert max(step for step, _ in drawn) == 5 and not run.rollouts


def test_a_finished_run_that_goes_on_begins_with_the_policy_it_has(monkeypatch):
    monkeypatch.setattr(grpo.ahead, "collect", lambda env, sampler, config, step, *_: step)
    monkeypatch.setattr(grpo.ahead, "write", lambda rollouts: None)
    config = SimpleNamespace(rollout=SimpleNamespace(max_staleness=2, in_flight=InFlight.keep), steps=4)
    run = Run(config, *[None] * 6, SimpleNamespace(progress=lambda name: None), None)
    versions = []
    for run.step in range(8):
        if run.step == 4:
            assert not run.rollouts
            config.steps = 8
        fill(run, num_ahead=2, should_stop=lambda: False)
        versions.append(run.rollouts.pop(0).version)
    assert versions == [0, 0, 0, 1, 4, 4, 4, 5]


def test_an_older_policy_than_the_bound_is_an_error():
    config = SimpleNamespace(rollout=SimpleNamespace(max_staleness=1), steps=6)
    run = Run(config, *[None] * 8, step=3)
    with pytest.raises(AssertionError):
        staleness(run, grpo.ahead.Rollout(3, 1, None))
    assert staleness(run, grpo.ahead.Rollout(3, 2, None)) == 1


@pytest.fixture(scope="module")
def ahead(entry_points, spread_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead")
    result = entry_points.run(
        "grpo.train", "+experiment=smoke", "steps=4", "name=run", f"output_dir={folder}", "env._target_=spread.Spread",
        "rollout.max_staleness=1", "corrections.weight=truncate", "optim.lr=0.01", "checkpoint.every=1", "checkpoint.keep=9",
        "eval.every=0", "eval.at_start=false", "eval.at_end=false", path=(spread_folder,), writes_report=False)
    assert result.code == 0, result.err
    assert "ahead    a step trains on what the policy of 1 steps before sampled, corrected for that" in result.out
    assert "the sampler's log-probs are not the trainer's" not in result.err
    return folder / "run"


def test_the_recorded_log_probs_are_those_of_the_policy_that_sampled_and_of_no_other(ahead):
    policy = load_run_policy(ahead, step=0, device=torch.device("cpu"), dtype=torch.float32)[0]
    for step in (2, 3):
        state = load_run(ahead, step=step)
        rollout, = read(state.state["rollouts"], state.tensors)
        assert (rollout.step, rollout.version) == (step, step - 1)
        batch = pack(rollout.groups.completions, rollout.groups.advantages)
        drew, newer = (float(gaps(policy, ahead, version, batch).max()) for version in (step - 1, step))
        assert drew < 1e-5 < 1e-3 < newer  # a CPU's decode and packed forward round differently


def test_metrics_say_how_old_the_policy_was_and_show_the_ratios(ahead):
    steps = [row for row in map(json.loads, (ahead / "metrics.jsonl").read_text().splitlines()) if "reward" in row]
    assert [row["rollout/staleness"] for row in steps] == [0, 1, 1, 1]
    assert steps[0]["corrections/ratio/max"] == pytest.approx(1, abs=1e-5) and steps[0]["sampling/log_prob_diff/max"] < 1e-5
    for row in steps[1:]:
        assert row["corrections/ratio/max"] > 1.001 and row["sampling/log_prob_diff/max"] > 1e-3
        assert row["ratio/max"] == 1  # to the policy as the update begins: decoupled from the sampler's
    assert load_file(ahead / "checkpoints/step_000002/tensors.safetensors").keys() >= {"rollouts.0"}
    assert load_run(ahead, step=4).state["rollouts"]["rollouts"] == []


# as on a GPU: a copy of the policy samples in one thread while the policy trains in another
BESIDE = "import grpo.run.start as start; start.samples_beside = lambda config, device: config.rollout.max_staleness > 0"


def test_sampling_beside_the_update_changes_no_bit(entry_points, spread_folder, ahead, tmp_path):
    result = entry_points.start(
        "grpo.train", "+experiment=smoke", "steps=4", "name=run", f"output_dir={tmp_path}", "env._target_=spread.Spread",
        "rollout.max_staleness=1", "corrections.weight=truncate", "optim.lr=0.01", "checkpoint.every=1", "checkpoint.keep=9",
        "eval.every=0", "eval.at_start=false", "eval.at_end=false", before=BESIDE, path=(spread_folder,),
        writes_report=False).wait()
    assert result.code == 0, result.err
    for step in range(5):
        ours, theirs = (load_run(folder, step=step) for folder in (tmp_path / "run", ahead))
        assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())
        assert (tmp_path / "run/completions.jsonl").read_text() == (ahead / "completions.jsonl").read_text()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("failing", ["update", "rollout", "neither", "signal in the update", "signal after it"])
def test_if_one_fails_the_other_stops_and_weights_never_move_without_their_rollout(failing):
    reached, signal = threading.Event(), threading.Event()
    run = Run(None, None, SimpleNamespace(device=torch.device("cpu")), *[None] * 5, signal.is_set)
    run.behaviour = SimpleNamespace(refresh=lambda: None, with_room=nullcontext)
    drawn = []

    def update():
        if failing == "update":
            raise Stopped("update")
        if failing == "signal after it":
            reached.set()
            return {"loss": 1.0}
        while failing != "neither" and not run.should_stop():
            signal.set() if failing == "signal in the update" else None
        if run.should_stop():
            raise Interrupted("abandoned before its update")
        return {"loss": 1.0}

    def draw(should_stop):
        if failing == "rollout":
            raise Stopped("rollout")
        if failing == "signal after it":
            reached.wait()
            signal.set()
            assert not should_stop()  # it goes on to its end
        while failing in ("update", "signal in the update"):
            if should_stop():
                raise Interrupted("while sampling")
        drawn.append(True)

    if failing in ("neither", "signal after it"):
        assert beside(run, update, draw) == {"loss": 1.0} and drawn
        return
    with pytest.raises(Interrupted if "signal" in failing else Stopped, match="abandoned" if "signal" in failing else failing):
        beside(run, update, draw)
    assert not drawn and run.should_stop == signal.is_set


@pytest.mark.parametrize("refused", ["a micro-batch", "the optimizer"])
def test_memory_refused_to_an_update_is_given_back_while_no_graph_is_captured_beside_it(monkeypatch, refused):
    held, attempts = [], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: held.append((name, CAPTURES._lock.locked())))

    def work():
        attempts.append(CAPTURES._lock.locked())
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.5

    if refused == "the optimizer":
        run = SimpleNamespace(optimizer=SimpleNamespace(step=work, zero_grad=lambda: None), shards=None)
        assert make_update(run) == 0.5 and attempts == [True, True] and not run.is_between_steps
    else:
        assert attempt(work) == (None, "CUDA out of memory") and attempts == [False]
    assert held == [("synchronize", True), ("empty_cache", True)] and not CAPTURES._lock.locked()


def test_a_step_on_an_older_policy_s_rollout_is_explained_from_its_checkpoint(ahead, monkeypatch, spread_folder):
    monkeypatch.syspath_prepend(spread_folder)
    num_threads = torch.get_num_threads()
    try:
        found = explain(Request(ahead, 3))
    finally:
        torch.set_num_threads(num_threads)
    assert found.is_reproduced, found.checks
    assert found.metrics["rollout/staleness"] == 1
