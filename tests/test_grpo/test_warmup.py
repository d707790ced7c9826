"""The supervised warm-up: what it minimises, what it writes down, and its cache."""

import math
from types import SimpleNamespace

import pytest
import torch

from grpo.configuration.launch import load_config
from grpo.environment import EnvironmentFault
from grpo.optim import NonFiniteError
from grpo.rollout.session import Interrupted
from grpo.warmup import pack_demonstrations, warm_up
from models.config import GptOssConfig
from models.gpt_oss import GptOss
from models.lora import set_full_training

VOCAB = 12


class Env:
    """The completion of `[a]` is always `[a + 1, a + 2]`. Counts its calls."""

    def __init__(self):
        self.steps = []

    def demonstrations(self, step, batch_size):
        self.steps.append((step, batch_size))
        return [([a], [a + 1, a + 2]) for a in ((step + i) % 10 for i in range(batch_size))]


class Log:
    """The part of Metrics that the warm-up uses."""

    def __init__(self):
        self.lines, self.texts = {}, []

    def log_warmup(self, step, line, *, num_steps, prints_line):
        self.lines[step] = {name: value for name, value in line.items() if not name.startswith("time/")}

    def print(self, text):
        self.texts.append(text)


def make_policy(seed: int = 0) -> GptOss:
    config = GptOssConfig.from_architecture({
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4})
    policy = GptOss(config, dtype=torch.float32, device="cpu", experts="bf16")
    policy.init_weights(seed)
    set_full_training(policy)
    return policy


@pytest.fixture
def config(tmp_path):
    loaded = load_config("train", ["+experiment=quickstart", "name=test", f"output_dir={tmp_path}"])
    warmup = loaded.warmup
    warmup.steps, warmup.batch_size, warmup.lr, warmup.warmup_steps, warmup.cache_dir = 31, 6, 0.02, 2, None
    return loaded


def run(config, *, policy=None, env=None, should_stop=lambda: False):
    policy, env, log = policy or make_policy(), env or Env(), Log()
    warm_up(policy, env, config, log, should_stop)
    return policy, env, log


def weights(policy: GptOss) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.trainable_parameters().values()]


def test_the_policy_learns_the_demonstrations(config):
    policy, env, log = run(config)
    assert env.steps == [(step, 6) for step in range(31)]
    assert sorted(log.lines) == [1, 11, 21, 31]
    assert log.lines[1]["loss"] == pytest.approx(math.log(VOCAB), rel=0.1)  # a small head: nearly uniform
    assert log.lines[31]["loss"] < 0.5 * log.lines[1]["loss"]
    with torch.no_grad():
        logits = policy.logits(torch.tensor([3, 4]), torch.tensor([0, 2]))
    assert logits.argmax(-1).tolist() == [4, 5]


def test_the_loss_is_the_mean_over_the_tokens_of_completions_only(config):
    config.warmup.steps = 1
    env = Env()
    with torch.no_grad():
        logits = [make_policy().logits(torch.tensor([a, a + 1, a + 2]), torch.tensor([0, 3])).log_softmax(-1) for a in range(6)]
    expected = -sum((row[0, a + 1] + row[1, a + 2]).item() for a, row in enumerate(logits)) / 12
    _, _, log = run(config, env=env)
    assert log.lines[1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_warms_up_stays_and_falls_over_the_last_part(config):
    config.warmup.decay_fraction, config.warmup.final_lr_ratio = 0.5, 0.1
    _, _, log = run(config)
    assert log.lines[1]["lr"] == pytest.approx(0.01) and log.lines[11]["lr"] == pytest.approx(0.02)
    # the fall takes the last 16 updates; the 21st is its 6th
    assert log.lines[21]["lr"] == pytest.approx(0.02 * (1 - 0.9 * 6 / 16)) and log.lines[31]["lr"] == pytest.approx(0.002)


def test_demonstrations_are_packed_with_their_completions_trained_on():
    batch = pack_demonstrations([([1, 2], [3]), ([4], [5, 6])])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6] and batch.cu_seqlens.tolist() == [0, 3, 6]
    assert batch.tokens[batch.loss_mask].tolist() == [3, 5, 6] and batch.num_policy_tokens == 3


def test_a_cached_warm_up_gives_the_same_weights_and_history_without_training(config, tmp_path):
    config.warmup.cache_dir = str(tmp_path / "cache")
    first, _, log = run(config)
    again, env, cached_log = run(config)
    assert env.steps == [] and cached_log.lines == log.lines
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again)))
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("change", [
    lambda config: setattr(config, "seed", config.seed + 1), lambda config: setattr(config.warmup, "lr", 0.01),
    lambda config: config.env.__setitem__("note", 1)])
def test_another_seed_setting_or_environment_is_another_warm_up(config, tmp_path, change):
    config.warmup.cache_dir, config.warmup.steps = str(tmp_path / "cache"), 2
    run(config)
    change(config)
    _, env, _ = run(config)
    assert len(env.steps) == 2 and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("changed", ["models/gpt_oss.py", "kernels/attention/decode.py", "grpo/envs/carry.py", "own_env.py"])
def test_other_source_code_is_another_warm_up(config, tmp_path, monkeypatch, changed):
    for name in ("models/gpt_oss.py", "kernels/attention/decode.py", "grpo/warmup.py", "grpo/envs/carry.py", "own_env.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr("grpo.run.identity.CHECKOUT", tmp_path)
    monkeypatch.setattr("grpo.warmup.inspect", SimpleNamespace(getsourcefile={Env: tmp_path / "own_env.py"}.__getitem__))
    config.warmup.cache_dir, config.warmup.steps = str(tmp_path / "cache"), 1
    for text, num_trained in (("x = 1\n", 1), ("x = 1\n", 0), ("x = 2\n", 1)):
        (tmp_path / changed).write_text(text)
        assert len(run(config)[1].steps) == num_trained


def test_a_truncated_cache_is_trained_again_and_replaced(config, tmp_path):
    config.warmup.cache_dir, config.warmup.steps = str(tmp_path / "cache"), 2
    run(config)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    _, env, _ = run(config)
    assert len(env.steps) == 2 and path.stat().st_size == len(whole)


def test_a_stop_leaves_no_cache(config, tmp_path):
    config.warmup.cache_dir = str(tmp_path / "cache")
    env = Env()
    with pytest.raises(Interrupted, match="step 3 of 31"):
        run(config, env=env, should_stop=lambda: len(env.steps) == 3)
    assert not (tmp_path / "cache").exists()


def test_a_loss_that_is_not_finite_stops_before_any_weight_moves(config):
    policy = make_policy()
    policy.lm_head.weight.data[0, 0] = float("inf")
    before = weights(policy)
    with pytest.raises(NonFiniteError):
        run(config, policy=policy)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(policy)))


def test_an_environment_whose_demonstrations_raise_is_named(config):
    with pytest.raises(EnvironmentFault, match="demonstrations raised ZeroDivisionError"):
        run(config, env=SimpleNamespace(demonstrations=lambda step, batch_size: 1 / 0))
