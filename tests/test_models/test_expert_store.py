"""Experts that stream from host memory: the same bits as on the GPU, from the right slot, and where they lie in each phase."""

import pytest
import torch
from streaming import add_adapter, assert_same, gradients, logits_of_decode, poison_slots
from tiny_models import BF16, MXFP4, load

import models.offload
from kernels.packed.weights import Dense, Mxfp4, Nf4
from models.config import GptOssConfig
from models.expert_store import ExpertStore, Placement, layer_bytes, slabs
from models.formats.hugging_face import load_model, save_model
from models.gpt_oss import GptOss
from models.lora import count_parameters, set_full_training

ALL = Placement(4, 4)


def streamed(folder=MXFP4, placement=ALL, **settings):
    return load_model(folder, device="cpu", dtype=torch.float32, placement=placement, **settings)


def copies_of(store, monkeypatch):
    """The layers that a store copies to its slots from now on."""
    copied, plain = [], ExpertStore._fetch

    def fetch(self, layer):
        held = list(self._contents)
        plain(self, layer)
        copied.extend([layer] if self._contents != held else [])

    monkeypatch.setattr(ExpertStore, "_fetch", fetch)
    return copied


# ---- where layers lie


def test_streamed_layers_are_spread_evenly_and_those_of_sampling_among_those_of_the_update():
    assert Placement(3, 6).layers(24, is_sampling=False) == [2, 6, 10, 14, 18, 22]
    assert Placement(3, 6).layers(24, is_sampling=True) == [6, 14, 22]
    assert Placement(4, 4).layers(4, is_sampling=True) == [0, 1, 2, 3]
    assert Placement().layers(24, is_sampling=False) == []


@pytest.mark.parametrize("numbers", [(-1, 2), (3, 2), (0, 5)])
def test_numbers_that_do_not_fit_are_refused(numbers):
    with pytest.raises(ValueError, match=f"num_streamed_sampling={numbers[0]}, num_streamed_update={numbers[1]}: of 4 layers"):
        Placement(*numbers).layers(4, is_sampling=False)


def test_bytes_of_a_layer_are_those_of_its_tensors():
    config = GptOssConfig.from_architecture({
        "num_local_experts": 32, "num_experts_per_tok": 4, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 24, "sliding_window": 128, "vocab_size": 200})
    blocks, scales = 32 * (5760 + 2880) * 90 * 16, 32 * (5760 + 2880) * 90
    assert layer_bytes(config, Mxfp4, torch.bfloat16) == blocks + scales  # all multiples of 256
    assert layer_bytes(config, Dense, torch.bfloat16) == 32 * 3 * 2880 * 2880 * 2
    assert layer_bytes(config, Nf4, torch.bfloat16) == 32 * 3 * 2880 * 2880 // 2 + 32 * 3 * 2880 * 2880 // 64 * 4


def test_host_memory_is_taken_in_powers_of_two_that_layers_fill_well():
    one = 423_000_000
    assert slabs(24, one) == [20, 4] and slabs(5, one) == [5] and slabs(1, one) == [1] and slabs(0, one) == []
    assert Placement(0, 24).host_bytes(one) == 2**33 + 2**31
    assert slabs(36, 4 * one) == [5] * 7 + [1]  # at most 2^33 bytes at once


def test_layers_that_always_stay_need_no_host_memory():
    store = streamed(placement=Placement(1, 3)).expert_store
    assert [store.home(layer) is not None for layer in range(4)] == [True, False, True, True]


def test_a_refusal_to_pin_memory_says_what_to_do(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(ValueError, match=r"model.host_gb: .* pin 0.5 GB .*\(CUDA error: out of memory\); free some"):
        ExpertStore(Placement(0, 1), 4, 500_000_000, torch.device("cpu"))


# ---- the same bits


@pytest.mark.parametrize("folder, settings", [(MXFP4, {}), (BF16, {}), (MXFP4, {"experts": "bf16"})])
@pytest.mark.parametrize("placement", [ALL, Placement(2, 3), Placement(1, 1), Placement(0, 4)])
def test_a_streamed_model_computes_the_bits_of_a_resident_one(folder, settings, placement, monkeypatch):
    resident, model = load(folder, **settings), streamed(folder, placement, **settings)
    for other in (resident, model):
        add_adapter(other)
    arrivals = poison_slots(monkeypatch)
    for switch in (model.expert_store.for_sampling, model.expert_store.for_update, model.expert_store.for_sampling):
        switch()
        for ours, theirs in zip(logits_of_decode(model), logits_of_decode(resident), strict=True):
            assert torch.equal(ours, theirs)
        assert_same(gradients(model), gradients(resident))
    assert {layer for layer, _ in arrivals} == set(placement.layers(4, is_sampling=False))


def test_each_layer_is_copied_once_in_a_forward(monkeypatch):
    model = streamed(placement=Placement(3, 4))
    copied = copies_of(model.expert_store, monkeypatch)
    tokens, bounds = torch.arange(9), torch.tensor([0, 9])
    with torch.no_grad():
        model.logits(tokens, bounds)
        assert copied == [0, 1, 2, 3]
        model.expert_store.for_sampling()
        for _ in range(2):  # nothing is taken from the pass before: a graph may have run in between
            copied.clear()
            model.logits(tokens, bounds)
            assert copied == model.expert_store.placement.layers(4, is_sampling=True) == [0, 2, 3]


@pytest.mark.parametrize("step, order", [(1, [0, 1, 2, 3]), (-1, [3, 2, 1, 0])])
def test_the_next_layer_is_on_its_way_while_one_computes(step, order):
    store = streamed().expert_store
    for layer, next_layer in zip(order, [*order[1:], None]):
        store.arrive(layer, step)
        assert layer in store._contents and (next_layer is None or next_layer in store._contents)


def test_chunks_of_tokens_read_the_layer_that_has_arrived(monkeypatch):
    resident, model, rows = load(MXFP4), streamed(), (torch.arange(9), torch.tensor([0, 9]))
    monkeypatch.setattr(models.offload, "CHUNK_TOKENS", 4)
    arrivals, copied = poison_slots(monkeypatch), copies_of(model.expert_store, monkeypatch)
    with torch.no_grad():
        assert torch.equal(model.logits(*rows), resident.logits(*rows))
    assert [layer for layer, _ in arrivals] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and copied == [0, 1, 2, 3]


def test_a_pass_that_failed_leaves_the_store_usable(monkeypatch):
    resident, model = load(MXFP4), streamed()
    poison_slots(monkeypatch)
    tokens, bounds = torch.arange(9), torch.tensor([0, 9])
    for layer in range(4):
        for is_sampling in (False, True):
            model.expert_store.for_sampling() if is_sampling else model.expert_store.for_update()
            with torch.no_grad():
                with monkeypatch.context() as patch:
                    patch.setattr(model.model.layers[layer].mlp.experts, "project", lambda *_: 1 / 0)
                    with pytest.raises(ZeroDivisionError):
                        model.logits(tokens, bounds)
                assert torch.equal(model.logits(tokens, bounds), resident.logits(tokens, bounds))


# ---- phases


def test_the_switch_frees_slots_that_sampling_does_not_need():
    store = streamed(placement=Placement(0, 3)).expert_store
    store.begin(copies_routed=False)
    assert len(store._slots) == 2 and not store._returned
    store.for_sampling()
    assert store._slots == [] and sorted(store._returned) == [0, 2, 3]
    store.for_sampling()  # changes nothing
    store.for_update()
    assert not store._returned
    store.begin(copies_routed=False)
    assert len(store._slots) == 2


def test_slots_that_sampling_needs_stay_where_they_are():
    store = streamed(placement=Placement(2, 3)).expert_store
    places = []
    for switch in (store.for_update, store.for_sampling, store.for_update, store.for_sampling):
        switch()
        store.begin(copies_routed=False)
        places.append([slot.data_ptr() for slot in store._slots])
    assert len(places[0]) == 2 and places == places[:1] * 4


def test_without_memory_for_sampling_the_update_goes_on(monkeypatch):
    model = streamed(placement=Placement(0, 3))

    def no_memory(self):
        raise torch.OutOfMemoryError("no memory")

    tokens, bounds = torch.arange(9), torch.tensor([0, 9])
    with monkeypatch.context() as patch:
        patch.setattr(ExpertStore, "_take_back", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model.expert_store.for_sampling()
    with torch.no_grad():
        assert not model.expert_store.is_sampling
        assert torch.equal(model.logits(tokens, bounds), load(MXFP4).logits(tokens, bounds))


# ---- whoever else reads weights


@pytest.mark.parametrize("folder, experts", [(MXFP4, "as_loaded"), (MXFP4, "bf16"), (BF16, "as_loaded")])
@pytest.mark.parametrize("arranged", [False, True])
def test_an_export_has_the_same_bytes(folder, experts, arranged, tmp_path):
    for name, model in (("resident", load(folder)), ("streamed", streamed(folder))):
        if arranged:
            for block in model.model.layers:
                block.mlp.experts.arrange()
        add_adapter(model)
        save_model(model, tmp_path / name, merge_lora=False, experts=experts)
        save_model(model, tmp_path / f"{name}_merged", merge_lora=True, experts="bf16")
    for kind in ("", "_merged"):
        files = sorted(path.name for path in (tmp_path / f"resident{kind}").iterdir() if path.is_file())
        assert files == sorted(path.name for path in (tmp_path / f"streamed{kind}").iterdir() if path.is_file())
        for file in files:
            assert (tmp_path / f"streamed{kind}" / file).read_bytes() == (tmp_path / f"resident{kind}" / file).read_bytes()


def test_state_and_counts_are_those_of_a_resident_model():
    resident, model = load(BF16), streamed(BF16)
    assert_same(model.state_dict(), resident.state_dict())
    assert count_parameters(model) == count_parameters(resident)
    other = GptOss(model.config, dtype=torch.float32, device="cpu", experts="bf16", placement=ALL)
    other.load_state_dict(resident.state_dict())
    rows = torch.arange(9), torch.tensor([0, 9])
    with torch.no_grad():
        assert torch.equal(other.logits(*rows), resident.logits(*rows))


def test_experts_that_train_cannot_stream():
    with pytest.raises(ValueError, match="model.train=full: the experts of 2 layers stream"):
        set_full_training(streamed(BF16, Placement(0, 2)))
