"""The optimizer's state in host memory, with a CPU in the place of streams and pinned memory.

tests/test_grpo/test_optim.py has the bits of the state, also on a GPU."""

import contextlib
from functools import partial

import pytest
import torch

import models.adam_state
from models.adam_state import AdamState, _append, _Stream, pinned_tensors


def build(sizes, *, moments="int8", streams=False, in_order=True):
    params = {name: torch.nn.Parameter(torch.linspace(-1, 1, size)) for name, size in sizes.items()}
    state = AdamState(params, moments, "master", betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, seed=0, on_host=False,
                      in_order=in_order, starts={})
    if streams:
        state._stream = _Stream(state.pieces, state._held, state.device, in_order=in_order, most=512)
    return params, state


class Stream:
    """Runs everything at once."""

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        assert event is not None

    def record_event(self):
        return object()


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr(models.adam_state, "piece_size", lambda moments: 512)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())


def update(state, order, gradients, num_updates):
    state.begin()
    for index in order:
        state.update(index, gradients[state.pieces[index].name].clone(), lr=0.1, scale=1.0, num_updates=num_updates)
    state.end()


@pytest.mark.parametrize("moments", ["fp32", "int8"])
@pytest.mark.parametrize("order", [[*range(8)], [6, 7, 0, 1, 2, 3, 5, 4], [3, 0, 6, 1, 7, 2, 5, 4]])
def test_pieces_pass_through_buffers_in_any_order(streams, moments, order):
    sizes = {"a": 1700, "b": 3, "c": 512, "d": 513}
    (plain, resident), (streamed, passing) = build(sizes, moments=moments), build(
        sizes, moments=moments, streams=True, in_order=order == sorted(order))
    assert len(passing.pieces) == 8
    for step in range(1, 4):
        gradients = {name: torch.sin(torch.arange(size) * float(step)) for name, size in sizes.items()}
        update(resident, range(8), gradients, step)
        update(passing, order, gradients, step)
        assert passing._stream._buffers == []
    assert all(torch.equal(plain[name], streamed[name]) for name in sizes)
    assert all(torch.equal(tensor, passing.tensors[name]) for name, tensor in resident.tensors.items())


def test_small_parameters_are_copied_together_and_large_ones_in_parts(streams):
    passing = build({"a": 100, "b": 200, "c": 300, "d": 513, "e": 1})[1]
    stream = _Stream(passing.pieces, passing._held, passing.device, in_order=True, most=512)
    assert stream._batches == [[0, 1], [2], [3], [4, 5]]  # 100 + 200, 300, 512 of 513, 1 + 1
    slab = torch.arange(2000, dtype=torch.uint8)
    segments = []
    for start, end in ((0, 300), (512, 600), (768, 1000), (1300, 1400)):  # places are multiples of 256
        _append(segments, slab[start:end])
    assert [(part[0].item(), len(part)) for part in segments] == [(0, 1000), (1300 % 256, 100)]


def test_a_failed_piece_is_updated_again_from_what_its_buffer_holds(streams, monkeypatch):
    sizes, original, calls = {"a": 1700, "b": 3}, models.adam_state.adamw, []
    gradients = {name: torch.ones(size) for name, size in sizes.items()}
    (plain, resident), (streamed, passing) = build(sizes), build(sizes, streams=True)
    update(resident, range(5), gradients, 1)

    def fails(*args, **settings):
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        original(*args, **settings)

    monkeypatch.setattr(models.adam_state, "adamw", fails)
    with pytest.raises(torch.OutOfMemoryError):
        update(passing, range(5), gradients, 1)
    update(passing, range(2, 5), gradients, 1)
    assert all(torch.equal(plain[name], streamed[name]) for name in sizes)
    assert all(torch.equal(tensor, passing.tensors[name]) for name, tensor in resident.tensors.items())


def test_pinned_memory_is_taken_in_few_powers_of_two_that_the_tensors_fill(monkeypatch):
    zeros, slabs = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda size, *, dtype, pin_memory: slabs.append(size) or zeros(size, dtype=dtype))
    wanted = [(100_000 + 7 * i, torch.float32 if i % 2 else torch.uint8) for i in range(100)]
    found = pinned_tensors(wanted)
    size = sum(count * dtype.itemsize for count, dtype in wanted)
    assert [(len(tensor), tensor.dtype) for tensor in found] == wanted
    assert all(slab & (slab - 1) == 0 for slab in slabs) and len(slabs) <= 6 and sum(slabs) < 1.1 * size
    starts = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()) for tensor in found)
    assert all(end <= start and start % 64 == 0 for (_, end), (start, _) in zip(starts, starts[1:]))


def test_memory_that_the_system_refuses_to_pin_is_an_error_that_says_how_much(monkeypatch):
    def refuse(size, *, dtype, pin_memory):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(torch, "zeros", partial(refuse))
    with pytest.raises(RuntimeError, match=r"refuses another 2.1 GB \(CUDA error: out of memory\)"):
        pinned_tensors([(300_000_000, torch.float32), (300_000_000, torch.float32)])
