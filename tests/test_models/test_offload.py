"""Predicted sizes by hand, the plan that just fits, and the margin of a budget, which follows what steps have reserved."""

import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import models.offload
from kernels.attention.plan import AttentionPlan
from models import host_store
from models.config import GptOssConfig
from models.offload import (
    MemoryBudget,
    NewestPlan,
    Place,
    TrainingPass,
    Workload,
    always_kept,
    bytes_of,
    chunks_of,
    everything,
    layer_memory,
    most_held,
    plan_layers,
    scratch,
    visible_pairs,
    workspaces,
)

BUDGET = 20_000_000_000


def budget(*, is_tight: bool) -> MemoryBudget:
    memory = MemoryBudget(None, recomputes=True, memory_gb=20.0, host_gb=0.0)
    memory._is_tight = is_tight
    return memory


def test_a_margin_begins_at_a_twenty_fifth_and_gives_half_of_what_steps_leave():
    memory = budget(is_tight=True)
    memory.learn(19_000_000_000, BUDGET)  # 4% below 99% of the budget
    assert memory._margin == pytest.approx(0.02)
    memory.learn(19_600_000_000, BUDGET)  # 1% below
    assert memory._margin == pytest.approx(0.015)
    memory.learn(10_000_000_000, BUDGET)
    assert memory._margin == 0.01  # at least


def test_a_step_above_the_budget_widens_the_margin_for_good():
    memory = budget(is_tight=True)
    memory.learn(20_400_000_000, BUDGET)  # 3% above 99% of the budget
    assert memory._margin == pytest.approx(0.07)
    memory.learn(15_000_000_000, BUDGET)
    assert memory._margin == pytest.approx(0.07)
    memory.learn(30_000_000_000, BUDGET)
    assert memory._margin == 0.15  # at most


def test_a_step_that_keeps_everything_on_the_gpu_teaches_only_excess():
    memory = budget(is_tight=False)
    memory.learn(5_000_000_000, BUDGET)
    assert memory._margin == 0.04
    memory.learn(20_200_000_000, BUDGET)
    assert memory._margin == pytest.approx(0.06)


# 2 heads of 8 and one of keys and values; each token goes to 2 of 3 experts of width 24
CONFIG = GptOssConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2, sliding_window=4,
                      layer_types=["sliding_attention", "full_attention"])
RUN = Workload(num_tokens=10, full_pairs=55, windowed_pairs=34, element_size=2, stream_size=4, is_packed=True, keeps_h=True,
               scratch_bytes=10**9)
LIBRARY = 100_000_000
OF_20B = GptOssConfig(vocab_size=201_088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
                      num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4, sliding_window=128)


def test_the_activations_of_a_layer_have_these_sizes():
    # a token: 16 x 4 bytes; (16 + 8 + 8) x 2; 16 x 2 and an fp32 log-sum of each head; 2 experts x 2 x 24 x 2
    assert bytes_of(CONFIG, RUN) == {"x": 640, "qkv": 640, "attended": 400, "middle": 640, "h": 1920}


def test_each_layer_keeps_the_choice_of_experts_and_attentions_low_rank_rows():
    # of 2 experts: int64, three int32 and a float32; of q, k, v and o 3 numbers of 2 bytes each
    assert always_kept(CONFIG, num_tokens=10, rank=3, element_size=2) == 10 * (2 * (8 + 12 + 4) + 4 * 3 * 2)


@pytest.mark.parametrize("is_packed, keeps_h, scratch_bytes, expected", [
    (False, False, 10**9, 0),  # dense weights are used as they are
    (True, True, 10**9, 4608),  # gate and up of 3 experts: 3 x 16 x 48 x 2 bytes, after which down has their place
    (True, False, 10**9, 6912),  # computing h again needs gate and up beside all of down, 3 x 24 x 16 x 2
    (True, False, 4608, 6912), (True, False, 4607, 4607), (True, True, 1000, 1000)])
def test_dequantised_weights_take_what_stands_at_once(is_packed, keeps_h, scratch_bytes, expected):
    assert scratch(CONFIG, replace(RUN, is_packed=is_packed, keeps_h=keeps_h, scratch_bytes=scratch_bytes)) == expected


def test_a_layers_workspace_is_the_sum_of_what_its_passes_cannot_do_without():
    # backward: x, middle and grad in 4 bytes; qkv, attended, h; per token and expert 24 of the activation and 16 of the rows; the
    # norm's output and its gradient in 2 bytes; weights
    assert workspaces(CONFIG, RUN)[1] == 3 * 640 + 640 + 400 + 1920 + 40 * (24 + 16) + 2 * 320 + 4608 + LIBRARY
    assert workspaces(CONFIG, replace(RUN, keeps_h=False))[1] - workspaces(CONFIG, RUN)[1] == 2304
    square = replace(CONFIG, intermediate_size=16)  # the rows take the activation's place
    assert workspaces(square, replace(RUN, is_packed=False))[1] == 3 * 640 + 640 + 400 + 1280 + 40 * 16 + 2 * 320 + LIBRARY
    # forward: x, middle and the sum in 4 bytes, as the rows; the norm's output; qkv, attended and h only if they are kept
    assert workspaces(CONFIG, RUN)[0] == 3 * 640 + 320 + 640 + 400 + 1920 + 40 * 24 + 80 * 16 + 4608 + LIBRARY
    assert workspaces(CONFIG, replace(RUN, keeps_h=False))[0] == 3 * 640 + 320 + 40 * 24 + 80 * 16 + 4608 + LIBRARY


def test_of_the_experts_tensors_only_a_chunk_is_there_at_once(monkeypatch):
    monkeypatch.setattr(models.offload, "CHUNK_TOKENS", 4)
    assert chunks_of(10) == [slice(0, 4), slice(4, 8), slice(8, 10)] and chunks_of(4) == [slice(0, 4)]
    again, run = everything(Place.recompute), replace(RUN, is_packed=False)
    # of 4 tokens in 8 rows: activation, rows; in the backward h and middle, too, and the norm's output and its gradient
    assert layer_memory(CONFIG, run, again)[0] == 3 * 640 + 320 + 16 * 24 + 32 * 16 + LIBRARY
    assert layer_memory(CONFIG, run, again)[1] == max(
        2 * 640 + 640 + 400 + 16 * (24 + 16) + 2 * 128 + 256 + 768,  # the experts'
        2 * 640 + 640 + 2 * 400 + 80,  # attention's
        3 * 640 + 2 * 320 + 640) + LIBRARY
    # a kept h is there for all tokens, and not once more for a chunk
    with_h = layer_memory(CONFIG, run, again | {"h": Place.host})
    assert with_h[1] == 2 * 640 + 640 + 400 + 1920 + 16 * (24 + 16) + 2 * 128 + 256 + LIBRARY


def test_a_layer_of_20b_takes_a_few_gigabytes_for_its_longest_sequence():
    config, tokens = OF_20B, 131_072
    workload = Workload(tokens, 0, 0, element_size=2, stream_size=2, is_packed=True, keeps_h=False, scratch_bytes=10**9)
    forward, backward = layer_memory(config, workload, everything(Place.recompute))
    # four streams; a chunk of 16,384: twice four rows of 5,760 a token
    assert forward == tokens * 4 * 5760 + 16_384 * 8 * 5760 + 10**9 + LIBRARY
    # a token's x and grad: 5,760 bytes each; qkv: 10,240; attended and lse: 8,448. A chunk has h, too, twice four rows, and three
    # more streams
    of_tokens, of_chunk = tokens * (2 * 5760 + 10_240 + 8_448), 16_384 * (3 * 4 + 3) * 5760
    assert backward == of_tokens + of_chunk + 10**9 + LIBRARY
    workload.scratch_bytes = 1_100_000_000  # holds gate_up; down comes to it
    assert layer_memory(config, workload, everything(Place.recompute))[1] == (
        of_tokens + of_chunk + 32 * 3 * 2880 * 2880 * 2 + LIBRARY)
    # twice as many tokens need as much beside the experts: x, its norm, their gradients, those of middle and of qkv
    workload.num_tokens, workload.scratch_bytes = 2 * tokens, 1 << 26
    assert layer_memory(config, workload, everything(Place.recompute))[1] == 2 * tokens * (5 * 5760 + 10_240) + LIBRARY


def test_most_is_held_before_the_last_layer_or_by_gradients_after_it():
    sizes = {"x": 1, "qkv": 10, "attended": 100, "middle": 1000, "h": 10_000}
    kept, again = everything(Place.gpu), everything(Place.recompute)
    host = everything(Place.host) | {"x": Place.gpu}
    # before the last of three layers, two keep 11,111 each; gradients of 30 come a third at a time: 10 beside both, 30 at last
    assert most_held([kept] * 3, sizes, gradients=30, pending=0) == (22_222, 22_232)
    assert most_held([again] * 3, sizes, gradients=30, pending=0) == (2, 30)
    # on their way: in the forward at most `pending`, in the backward at least the layer before, 11,110
    assert most_held([host, host, again], sizes, gradients=0, pending=5000) == (5002, 11_112)


def test_a_plan_keeps_everything_where_that_just_fits_and_less_with_a_byte_less():
    memory = MemoryBudget(CONFIG, recomputes=True, memory_gb=1.0, host_gb=0.0)
    memory._product_rate = 1e12
    one_layer = 640 + 640 + 400 + 640 + 1920
    free = one_layer + max(workspaces(CONFIG, RUN))  # while the second layer runs, the first keeps all
    whole, tight = (memory._fit(RUN, free - less, gradients=0, pending=0) for less in (0, 1))
    assert whole[0] == everything(Place.gpu)
    assert sum(place == Place.gpu for plan in tight for place in plan.values()) < sum(
        place == Place.gpu for plan in whole for place in plan.values())


def test_a_plan_is_found_in_few_steps_where_a_little_is_missing(monkeypatch):
    memory = MemoryBudget(replace(OF_20B, num_hidden_layers=36, layer_types=OF_20B.layer_types[:2] * 18), recomputes=True,
                          memory_gb=1.0, host_gb=48.0)
    calls, plain = [], models.offload.plan_layers
    memory._product_rate, memory._host_rate = 6e14, 5.5e10
    monkeypatch.setattr(models.offload, "plan_layers", lambda *given, **settings: calls.append(1) or plain(*given, **settings))
    run = Workload(8192, 8192**2 // 2, 8192 * 128, element_size=2, stream_size=2, is_packed=True, keeps_h=False,
                   scratch_bytes=1_100_000_000)
    memory._fit(run, 6 * 10**9, gradients=3 * 10**8, pending=10**10)  # the second plan takes 20 KB too much
    assert len(calls) < 20


def test_each_retreat_gives_a_plan_that_takes_less_until_nothing_but_inputs_is_kept():
    memory = MemoryBudget(CONFIG, recomputes=True, memory_gb=1.0, host_gb=0.0)
    memory._product_rate, free = 1e12, 10**9
    sizes, texts = [], []
    while not texts or texts[-1] is not None:
        plans, workload = memory._choose(RUN, min(free, memory._most_bytes), gradients=0, pending=0)
        sizes.append(memory._needed(plans, workload, 0, 0))
        memory._newest = NewestPlan(plans, workload, 0, 0)
        texts.append(memory.retreat())
    assert plans == [everything(Place.recompute)] * 2 and workload.scratch_bytes <= 1 << 26
    assert len(sizes) > 1 and sizes == sorted(sizes, reverse=True)
    assert memory._most_bytes == int(0.7 * sizes[-1])  # for a batch of fewer tokens
    assert texts[0] == f"a micro-batch's activations and workspaces take at most {0.7 * sizes[0] / 1e9:.2f} GB of the GPU"
    memory.recomputes = False
    assert memory.retreat() == "the backward computes again what does not fit" and memory.recomputes


WIDE = GptOssConfig(vocab_size=512, hidden_size=256, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8,
                    num_key_value_heads=2, head_dim=64, num_local_experts=8, num_experts_per_tok=4, sliding_window=16,
                    layer_types=["sliding_attention", "full_attention"] * 2)


def test_visible_pairs_are_those_of_enumeration():
    bounds, prefixes, window = [0, 5, 5, 12, 30], [-1, -1, 0, -1], 4
    full = windowed = 0
    for (start, end), prefix in zip(zip(bounds, bounds[1:]), prefixes):
        before = 0 if prefix == -1 else bounds[prefix + 1] - bounds[prefix]
        for position in range(before, before + end - start):
            full += position + 1
            windowed += min(position + 1, window)
    assert visible_pairs(AttentionPlan(bounds, prefixes=prefixes), window) == (full, windowed)


def plan(*, gpu_bytes, host_bytes=0, host_rate=1e18, pending=float("inf")):
    run = Workload(1000, 500_000, 16_000, 2, 2, True, False, 1 << 30)
    plans = plan_layers(WIDE, run, gpu_bytes=gpu_bytes, host_bytes=host_bytes, host_rate=host_rate, pending=pending,
                        peak_flops=1e12)
    sizes = bytes_of(WIDE, run)
    used = {place: sum(sizes[name] for layer in plans for name, where in layer.items() if where == place) for place in Place}
    return plans, used, sizes


def test_a_float32_stream_takes_twice_the_memory_of_a_half_one_and_nothing_else_does():
    half, full = (bytes_of(WIDE, Workload(1000, 0, 0, 2, stream_size, True, False, 0)) for stream_size in (2, 4))
    assert half["x"] == half["middle"] == 1000 * 256 * 2
    assert full == half | {"x": 1000 * 256 * 4, "middle": 1000 * 256 * 4}


def test_a_plan_stays_within_its_budget_and_keeps_every_input():
    sizes = plan(gpu_bytes=0)[2]
    for gpu_bytes in (4 * sizes["x"], 10_000_000, 20_000_000, 10**9):
        plans, used, _ = plan(gpu_bytes=gpu_bytes)
        assert used[Place.host] == 0 and 0 < used[Place.gpu] <= gpu_bytes
        assert all(layer["x"] == Place.gpu for layer in plans)
    assert used[Place.recompute] == 0  # everything fits the last


def test_a_plan_prefers_what_saves_most_time_per_byte():
    sizes = plan(gpu_bytes=0)[2]
    plans, _, _ = plan(gpu_bytes=4 * sizes["x"] + 2 * sizes["attended"])
    # full attention over 500,000 pairs is the dearest to compute again; a windowed layer's is not
    assert [layer["attended"] for layer in plans] == [Place.recompute, Place.gpu, Place.recompute, Place.gpu]
    assert all(layer["h"] == Place.recompute for layer in plans)


def test_what_has_no_room_on_the_gpu_goes_to_the_host_first_layers_first():
    sizes = plan(gpu_bytes=0)[2]
    total = 4 * sum(sizes.values())
    plans, used, _ = plan(gpu_bytes=total // 2, host_bytes=total)
    assert used[Place.recompute] == 0 and used[Place.gpu] <= total // 2
    assert all(place == Place.host for place in plans[0].values()) and all(place == Place.gpu for place in plans[3].values())
    _, slow, _ = plan(gpu_bytes=total // 2, host_bytes=total, host_rate=1.0)  # a host too slow to be of use
    assert slow[Place.host] == 0 and slow[Place.recompute] > 0


def test_copies_to_the_host_are_spread_over_the_layers_where_they_take_time():
    sizes = plan(gpu_bytes=0)[2]
    total, layer = 4 * sum(sizes.values()), sum(sizes.values())
    settings = dict(gpu_bytes=6 * total // 10, host_bytes=total, host_rate=4e9)
    plans, _, _ = plan(**settings, pending=0.8 * layer)
    waits = [sum(sizes[name] for name, place in kept.items() if place == Place.host) / layer for kept in plans]
    first, *_ = (sum(sizes[name] for name, place in kept.items() if place == Place.host) / layer for kept in plan(**settings)[0])
    assert first == 1.0  # without a bound all of the first layer's
    assert 0 < waits[0] <= 0.8 and waits[1] > 0 and waits[2] > 0 and waits[3] == 0, waits


def test_the_most_held_counts_what_waits_what_is_on_its_way_and_what_is_done():
    # sizes of 1, 10, 100 ... tell who is counted; three layers with x on the GPU, in host memory, on the GPU
    sizes = {"x": 1, "qkv": 10, "attended": 100, "middle": 1000, "h": 10_000}
    gpu, host, again = Place.gpu, Place.host, Place.recompute
    plans = [{"x": gpu, "qkv": gpu, "attended": again, "middle": host, "h": again},
             {"x": host, "qkv": again, "attended": gpu, "middle": again, "h": host},
             {"x": gpu, "qkv": again, "attended": again, "middle": gpu, "h": again}]  # fmt: skip
    forward, backward = most_held(plans, sizes, gradients=300_000, pending=10**9)
    # the third layer's forward: 11 + 100 kept, 1,000 + 10,001 on their way out
    assert forward == 111 + 11_001
    # the first layer's backward has nothing before it and all gradients; the second's two thirds of them, 11 and 1,000
    assert backward == max(111 + 11_001 + 100_000, 11 + 1_000 + 200_000, 300_000)
    assert most_held(plans, sizes, gradients=0, pending=500)[1] == 111 + 10_001  # of several, at most one layer's


def test_few_layers_are_on_their_way_to_the_host_and_fewer_where_that_takes_too_much():
    memory = MemoryBudget(CONFIG, recomputes=True, memory_gb=1.0, host_gb=1.0)
    host = everything(Place.recompute) | {"x": Place.host}
    plans = [host] * 4 + [everything(Place.recompute)]
    running = max(layer_memory(CONFIG, RUN, host))
    # the backward, which needs more, has two layers of 640 bytes on their way back; a byte less, and it is half of three
    allowed = [memory._allowed_pending(plans, RUN, running + free, gradients=0) for free in (2 * 640, 2 * 640 - 1, 0)]
    assert allowed == [3 * 640, 3 * 640 // 2, 640]


def test_host_memory_is_granted_as_long_as_there_is_some():
    memory = MemoryBudget(CONFIG, recomputes=True, memory_gb=None, host_gb=1e-6)
    assert [memory.claim_host(num_bytes) for num_bytes in (1001, 600, 401, 400, 1)] == [False, True, False, True, False]
    assert memory.host_bytes == 0


class FakeStream:
    """A stream whose copies are done when they are asked for."""

    def __init__(self, *_) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    wait_event = wait_stream

    def record_event(self) -> None:
        pass


@pytest.mark.parametrize("host_layers", [range(2), range(6), (0, 3, 4)])
def test_copies_to_the_host_hold_the_tensors_of_the_layers_that_the_plan_counts(monkeypatch, host_layers):
    for name, fake in {"Stream": FakeStream, "current_stream": FakeStream, "stream": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(host_store, "_SLAB", 1 << 12)
    store = host_store.HostStore(1 << 12, torch.device("cpu"))
    store._slabs.append(torch.empty(1 << 12, dtype=torch.uint8))
    plans = [everything(Place.gpu) | ({"x": Place.host} if layer in host_layers else {}) for layer in range(8)]
    training_pass = TrainingPass(plans, 0, 1 << 12, store, lambda device: None)
    alive = []
    for layer in range(8):
        kept = training_pass.new(layer)
        kept.keep({"x": torch.full([16], float(layer))})
        alive.append(weakref.ref(kept.tensors["x"]))
        training_pass.put(layer, kept)
        held = {number for number, tensor in enumerate(alive) if tensor() is not None and number in host_layers}
        assert held == {number for number in host_layers if layer - 2 <= number <= layer}  # three layers, the newest
    for layer in reversed(range(8)):
        assert torch.equal(training_pass.take(layer).take("x"), torch.full([16], float(layer)))
