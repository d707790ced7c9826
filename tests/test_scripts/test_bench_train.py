"""The training benchmark: its count of operations, its step, and the reading of a timeline."""

import json
from dataclasses import replace

import pytest
import torch
from paths import FIXTURES, ROOT


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


def test_operations_per_token_of_the_20b_model(scripts):
    from bench_train import flops_per_token
    from random_checkpoint import model_config

    # by hand, forward per token: attention projections 24 x 53.1, experts 24 x 199.1, router 24 x 0.2, head 1158.3 (1e6), twice;
    # keys at 2048 tokens: 12 layers x 1024.5, 12 x 124.03; 4 x 4096 x 3.5 each
    linear = 2 * (24 * (53_084_160 + 199_065_600 + 184_320) + 1_158_266_880)
    attention = 3.5 * 4 * 4096 * 12 * (1024.5 + (128 * 129 / 2 + 1920 * 128) / 2048)
    assert flops_per_token(model_config("20b"), 2048) == pytest.approx(linear + attention, rel=1e-9)


def test_operations_per_token_of_a_fully_trained_layer(scripts):
    from bench_train import flops_per_token
    from random_checkpoint import model_config

    # by hand, per token and product: attention projections 26,542,080, four experts 99,532,800, router 92,160, head 1,474,560;
    # three products each; a token of 2,048 sees 1,024.5 keys, of 128 in a window 124.03
    weights = 26_542_080 + 99_532_800 + 92_160 + 1_474_560
    for kind, keys in (("full_attention", 1024.5), ("sliding_attention", (128 * 129 / 2 + 1920 * 128) / 2048)):
        config = replace(model_config("20b", num_layers=1), layer_types=[kind], vocab_size=512)
        expected = 3 * 2 * weights + 3.5 * 4 * 4096 * keys
        assert flops_per_token(config, 2048, trains_base=True) == pytest.approx(expected, rel=1e-9)
        forward = flops_per_token(config, 2048, trains_base=True, with_backward=False)
        assert forward == pytest.approx(2 * weights + 4 * 4096 * keys, rel=1e-9)


def test_a_step_gives_every_adapter_a_gradient(scripts):
    from bench_train import random_batch, train_step
    from random_policy import load_policy

    policy = load_policy(FIXTURES / "tiny_mxfp4", lora="all", rank=2, device="cpu", dtype=torch.float32)
    batch = random_batch(policy, 2, 12)
    assert batch["cu_seqlens"].tolist() == [0, 12, 24] and (~batch["mask"]).nonzero().flatten().tolist() == [0, 12]
    assert 0 < train_step(policy, batch).item() < 6  # nats; log 384 = 5.95
    gradients = {name: parameter.grad for name, parameter in policy.trainable_parameters().items()}
    assert len(gradients) == 4 * (4 + 2) * 2
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_idle_time_is_what_no_kernel_covers(scripts):
    from bench_train import summarize

    def event(name, start, duration, category="kernel"):
        return {"name": name, "cat": category, "ts": start, "dur": duration}

    events = [event("b", 30, 10), event("a", 0, 10), event("a", 5, 15), event("copy", 32, 2, "gpu_memcpy"),
              event("host", 0, 100, "cpu_op"), event("a", 45, 5)]
    span, idle, table = summarize(events)
    assert (span, idle) == (50, 10 + 5)
    assert table == [("a", 3, 30), ("b", 1, 10), ("copy", 1, 2)]


def test_the_timeline_holds_two_steps_and_nothing_of_the_warm_up(scripts, monkeypatch, tmp_path):
    import bench_train
    from random_policy import load_policy

    policy = load_policy(FIXTURES / "tiny_mxfp4", lora="all", rank=2, device="cpu", dtype=torch.float32)
    steps, original = [], bench_train.train_step
    monkeypatch.setattr(bench_train, "train_step", lambda *arguments: steps.append(1) or original(*arguments))
    bench_train.record(policy, bench_train.random_batch(policy, 2, 12), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(steps) == 5  # two to warm up, one that the profiler sees the start of
    names = [event["name"] for event in events if event["name"].startswith("ProfilerStep#") and event["ph"] == "X"]
    assert len(names) == 2 == len(set(names))
