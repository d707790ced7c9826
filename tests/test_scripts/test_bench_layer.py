"""The benchmark of full fine-tuning: its counts, its model and its check of gradients, on the CPU."""


import pytest
import torch
from paths import ROOT


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


def test_operations_per_token_of_a_fully_trained_layer(scripts):
    from bench_layer import layer_config
    from bench_train import flops_per_token

    # by hand, per token and product: attention projections 26,542,080, four experts 99,532,800, router 92,160, head 1,474,560;
    # three products each; a token of 2,048 sees 1,024.5 keys, of 128 in a window 124.03
    weights = 26_542_080 + 99_532_800 + 92_160 + 1_474_560
    full = 3 * 2 * weights + 3.5 * 4 * 4096 * 1024.5
    assert flops_per_token(layer_config("full"), 2048, trains_base=True) == pytest.approx(full, rel=1e-9)
    windowed = 3 * 2 * weights + 3.5 * 4 * 4096 * (128 * 129 / 2 + 1920 * 128) / 2048
    assert flops_per_token(layer_config("windowed"), 2048, trains_base=True) == pytest.approx(windowed, rel=1e-9)


def test_gradients_of_all_layers_are_compared_together(scripts):
    from bench_layer import by_kind

    tensors = {"model.layers.0.norm.weight": torch.ones(2, 2), "model.layers.11.norm.weight": torch.zeros(1),
               "lm_head.weight": torch.ones(1)}
    kinds = by_kind(tensors)
    assert {name: value.tolist() for name, value in kinds.items()} == {"model.layers.*.norm.weight": [1, 1, 1, 1, 0],
                                                                        "lm_head.weight": [1]}


def test_assigned_experts_leave_one_idle_and_the_router_trainable(scripts):
    import bench_layer

    model = bench_layer.random_model(bench_layer.small_config(), trains="full", dtype=torch.float32, device="cpu")
    bench_layer.assign_experts(model, 40)
    seen = []
    for block in model.model.layers:
        block.mlp.router.register_forward_hook(lambda _, __, logits: seen.append(logits.topk(2).indices))
    tokens = torch.randint(0, 384, (40,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) > 0
    log_probs, _ = model.log_probs(tokens, torch.tensor([0, 40], dtype=torch.int32), temperature=1.0, mask=mask)
    log_probs.sum().backward()
    assert len(seen) == 2 and not torch.equal(*seen)
    for chosen, block in zip(seen, model.model.layers):
        assert set(chosen.flatten().tolist()) == {0, 1, 2}
        assert block.mlp.experts.gate_up_proj.grad[3].count_nonzero() == 0
        assert block.mlp.experts.gate_up_proj.grad[0].abs().max() > 0 and block.mlp.router.weight.grad.abs().max() > 0


def test_the_check_of_gradients_reports_every_kind_of_parameter(scripts, monkeypatch):
    import bench_layer
    from timing import Report

    monkeypatch.setattr(bench_layer, "REPORT", Report())
    bench_layer.check_gradients([21, 40], "cpu")
    lines = bench_layer.REPORT.lines
    assert len(lines) == 2 * 20 and all(line["ok"] for line in lines)
    kinds = {line["parameter"] for line in lines}
    assert {"model.layers.*.self_attn.sinks", "model.layers.*.mlp.experts.down_proj_bias", "lm_head.weight"} < kinds
    assert all(0 < line["relative_error"] < 1e-5 for line in lines if line["dtype"] == "float32")
    assert all(1e-3 < line["reference_bf16_error"] < 5e-2 for line in lines)


def test_a_wrong_gradient_is_not_ok(scripts, monkeypatch):
    import bench_layer
    from timing import Report

    original = bench_layer.gradients

    def wrong(config, source, lengths, *, dtype, device):
        found = original(config, source, lengths, dtype=dtype, device="cpu")
        return found if device == "cpu" else found | {"model.norm.weight": -found["model.norm.weight"]}

    monkeypatch.setattr(bench_layer, "REPORT", Report())
    monkeypatch.setattr(bench_layer, "gradients", wrong)
    bench_layer.check_gradients([20], "elsewhere")
    assert {line["parameter"] for line in bench_layer.REPORT.lines if not line["ok"]} == {"model.norm.weight"}


def test_a_layer_with_an_adapter_trains_it_alone_on_packed_experts(scripts):
    import bench_layer
    from bench_train import random_batch, train_step

    model = bench_layer.random_model(bench_layer.small_config(), trains="lora", dtype=torch.float32, device="cpu")
    assert model.expert_format.name == "mxfp4" and all("lora_" in name for name in model.trainable_parameters())
    assert 0 < train_step(model, random_batch(model, 2, 20)).item() < 6  # nats; log 384 = 5.95
    assert all(parameter.grad.abs().max() > 0 for parameter in model.trainable_parameters().values())
