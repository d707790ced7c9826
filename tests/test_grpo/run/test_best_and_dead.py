"""The checkpoint of the best evaluation is kept, runs that learn nothing end, and TensorBoard gets the metrics."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo.config import ConfigError
from grpo.configuration.nodes import WandbConfig, WandbMode
from grpo.record.metrics import Metrics
from grpo.record.tensorboard_run import TensorBoardRun
from grpo.run.checkpoint import save_run
from grpo.run.failures import DeadRun, describe_failure
from grpo.run.finish import save_best
from grpo.train import end_if_dead


@pytest.fixture
def metrics(tmp_path):
    made = Metrics(tmp_path, wandb=WandbConfig(mode=WandbMode.disabled, project="x"), config={}, run_name="x", total_steps=9)
    yield made
    made.display.stop()


def test_the_best_value_is_read_from_the_record_and_lower_losses_are_better(metrics):
    for step, (accuracy, loss) in enumerate([(0.25, 3.0), (0.75, 1.0), (0.75, 2.0), (0.5, 1.5)]):
        metrics.log_eval(step, {"greedy_accuracy": accuracy, "loss": loss})
    assert metrics.best("eval/greedy_accuracy") == {"step": 1, "value": 0.75}  # the earliest of two
    assert metrics.best("eval/loss") == {"step": 1, "value": 1.0}
    metrics.truncate_after(0)  # as a resume does
    assert metrics.best("eval/greedy_accuracy") == {"step": 0, "value": 0.25}
    assert metrics.best("eval/avg@4") is None


def test_the_best_checkpoint_outlives_pruning(tmp_path):
    for step in range(1, 6):
        save_run(tmp_path, step=step, tensors={"x": torch.zeros(1)}, state={}, keep=2, spared=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step_00000{step}" for step in (2, 4, 5)]


def run_of(metrics, monkeypatch, *, step, best):
    saved = []
    monkeypatch.setattr("grpo.run.finish.save", lambda run: saved.append(run.step))
    config = SimpleNamespace(checkpoint=SimpleNamespace(best=best))
    return SimpleNamespace(config=config, metrics=metrics, step=step, ranks=None, shards=None), saved


def test_only_an_evaluation_that_is_the_best_so_far_is_saved(metrics, monkeypatch):
    found = []
    for step, value in enumerate([0.2, 0.1, 0.3, 0.3]):
        metrics.log_eval(step, {"avg@1": value})
        run, saved = run_of(metrics, monkeypatch, step=step, best="eval/avg@1")
        save_best(run)
        found += saved
    assert found == [0, 2]
    run, saved = run_of(metrics, monkeypatch, step=3, best=None)
    save_best(run)
    assert saved == []


def test_a_metric_that_evaluations_lack_is_refused_with_those_they_have(metrics, monkeypatch):
    metrics.log_eval(0, {"avg@1": 0.5, "reward": 1.0, "time/eval": 2.0})
    run, _ = run_of(metrics, monkeypatch, step=0, best="avg@1")
    with pytest.raises(ConfigError, match=r"checkpoint.best = 'avg@1': .* they have eval/avg@1, eval/reward$"):
        save_best(run)


@pytest.mark.parametrize("most, num_dead, step, ends", [
    (3, 3, 5, True), (3, 2, 5, False), (None, 99, 5, False), (3, 3, 9, False)])
def test_a_run_ends_after_so_many_steps_with_nothing_to_learn(most, num_dead, step, ends):
    config = SimpleNamespace(rollout=SimpleNamespace(max_dead_steps=most), steps=9)
    run = SimpleNamespace(config=config, steps_without_update=num_dead, step=step)
    if not ends:
        end_if_dead(run)
        return
    with pytest.raises(DeadRun, match="nothing was learnt in the last 3 steps") as raised:
        end_if_dead(run)
    failure = describe_failure(raised.value, config=None, log=None)
    assert (failure.code, failure.reason) == (7, "nothing to learn")


class Writer:
    made: list = []

    def __init__(self, log_dir, purge_step):
        self.lines, self.purge_step, self.log_dir = [], purge_step, log_dir
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.lines.append((name, value, step))

    def close(self):
        self.lines.append("closed")


def test_tensorboard_gets_every_finite_number_and_a_resume_purges_later_steps(tmp_path, monkeypatch):
    library = ModuleType("torch.utils.tensorboard")
    library.SummaryWriter, Writer.made = Writer, []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", library)
    metrics = Metrics(tmp_path, wandb=WandbConfig(mode=WandbMode.disabled, project="x"), config={}, run_name="x", total_steps=9,
                      tensorboard=True)
    metrics.truncate_after(2)
    metrics.log_warmup(1, {"loss": 1.0}, num_steps=2, prints_line=False)
    metrics.log(3, {"reward": 0.5, "loss": float("nan")})
    metrics.log_eval(3, {"avg@1": 0.25})
    metrics.finish("finished")
    writer, = Writer.made
    assert writer.purge_step == 3 and writer.log_dir == str(tmp_path / "tensorboard")
    assert [line for line in writer.lines if line == "closed" or not line[0].startswith("time/")] == [
        ("reward", 0.5, 3), ("eval/avg@1", 0.25, 3), "closed"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["reward"] == 0.5


def test_a_missing_library_is_a_config_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"log.tensorboard = True.*pip install"):
        TensorBoardRun(tmp_path)
