"""Streamed experts through the kernels: in the interpreter, and on a GPU with streams, graphs and memory that comes back."""

import functools

import pytest
import torch
from streaming import add_adapter, assert_same, gradients, logits_of_decode, poison_slots

from kernels.packed.weights import Mxfp4Fragments
from models.config import GptOssConfig
from models.expert_store import ExpertStore, Placement, views
from models.gpt_oss import GptOss

pytestmark = pytest.mark.slow

ARCHITECTURE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 16,
                "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 4, "vocab_size": 16}


@functools.cache
def random_state(experts, **sizes):
    """Tensors of a small model with such experts."""
    dense = GptOss(GptOssConfig.from_architecture(ARCHITECTURE | sizes), dtype=torch.float32, device="cpu", experts="bf16")
    dense.init_weights(0)
    state, generator = dense.state_dict(), torch.Generator().manual_seed(4)
    for name, tensor in GptOss(dense.config, dtype=torch.float32, device="cpu", experts=experts).state_dict().items():
        if tensor.dtype == torch.uint8:
            codes = (120, 124) if name.endswith("_scales") else (0, 256)
            state[name] = torch.randint(*codes, tensor.shape, generator=generator, dtype=torch.uint8)
        elif name.endswith("_absmax"):
            state[name] = torch.rand(tensor.shape, generator=generator) * 0.3
    return state


def make(experts, placement=None, *, activation_checkpointing=False, **sizes):
    """The model, its packed experts in fragments."""
    model = GptOss(GptOssConfig.from_architecture(ARCHITECTURE | sizes), dtype=torch.float32, device="cpu", experts=experts,
                   placement=placement, activation_checkpointing=activation_checkpointing)
    names, state = model.state_dict(), random_state(experts, **sizes)
    model.load_state_dict({name: state[name] for name in names})
    for block in model.model.layers:
        block.mlp.experts.arrange()
    add_adapter(model)
    return model


@functools.cache
def expected(experts):
    """Gradients and logits of a model with all experts in place."""
    return gradients(model := make(experts)), logits_of_decode(model)


@pytest.mark.interpreter
@pytest.mark.parametrize("recomputes", [False, True])
def test_the_training_pass_reads_each_layer_from_its_slot_forwards_and_backwards(recomputes, monkeypatch):
    grads, _ = expected("mxfp4")
    model = make("mxfp4", Placement(3, 3), activation_checkpointing=recomputes)
    assert {block.mlp.experts.layout for block in model.model.layers} == {Mxfp4Fragments}
    arrivals = poison_slots(monkeypatch)
    assert_same(gradients(model), grads)
    assert arrivals == [(0, 1), (1, 1), (2, 1), (2, -1), (1, -1), (0, -1)]


@pytest.mark.interpreter
@pytest.mark.parametrize("experts", ["bf16", "nf4"])
def test_other_formats_stream_too(experts, monkeypatch):
    (grads, logits), model = expected(experts), make(experts, Placement(2, 3))
    poison_slots(monkeypatch)
    assert_same(gradients(model), grads)
    model.expert_store.for_sampling()
    assert all(map(torch.equal, logits_of_decode(model), logits))


@pytest.mark.interpreter
def test_a_decode_step_reads_fragments_from_the_slots(monkeypatch):
    (_, logits), model = expected("mxfp4"), make("mxfp4", Placement(2, 3))
    arrivals = poison_slots(monkeypatch)
    model.expert_store.for_sampling()
    assert all(map(torch.equal, logits_of_decode(model), logits))
    assert [layer for layer, _ in arrivals] == [0, 1, 2] * 3


@pytest.mark.interpreter
def test_a_step_of_few_rows_copies_only_the_experts_that_have_some(monkeypatch):
    many = {"num_local_experts": 4, "num_experts_per_tok": 1}  # of 2 rows: 44 % of the experts at most
    (resident, model), seen = (make("mxfp4", placement, **many) for placement in (None, Placement(3, 3))), []
    plain = ExpertStore.arrive_routed

    def arrive_routed(store, layer, offsets, tensors):
        for slot in store._slots:
            slot.fill_(255)
        arrived = plain(store, layer, offsets, tensors)
        has_rows = offsets.diff() > 0
        for part, home in zip(views(arrived, tensors), tensors, strict=True):
            assert torch.equal(part[has_rows], home[has_rows]) and (part[~has_rows].view(torch.uint8) == 255).all()
        seen.append((layer, int(has_rows.sum())))
        return arrived

    monkeypatch.setattr(ExpertStore, "arrive_routed", arrive_routed)
    model.expert_store.for_sampling()
    assert all(map(torch.equal, logits_of_decode(model), logits_of_decode(resident)))
    assert [layer for layer, _ in seen] == [0, 1, 2] * 2 and all(1 <= count <= 2 for _, count in seen)


@pytest.mark.interpreter
def test_a_backward_takes_the_last_layers_from_where_the_forward_left_them(monkeypatch):
    model, copied, plain = make("mxfp4", Placement(3, 3)), [], torch.Tensor.copy_
    homes = {model.expert_store.home(layer).data_ptr(): layer for layer in range(3)}

    def copy_(self, source, *arguments, **settings):
        copied.extend([homes[source.data_ptr()]] if source.data_ptr() in homes and source.dtype == torch.uint8 else [])
        return plain(self, source, *arguments, **settings)

    model.expert_store.for_sampling()
    model.expert_store.for_update()
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    gradients(model)
    assert copied == [0, 1, 2, 0]
