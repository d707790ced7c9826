"""Kernels of processes that hold a model's experts together: the bits of one. Here threads, one of which runs at a time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_block_triton import ARCHITECTURE, EVERYTHING, build, gradients

from models.expert_share import ExpertShare
from models.gpt_oss import GptOss
from models.keys import PrefillChunk
from models.lora import LoraConfig, attach_lora

LAYER = ARCHITECTURE | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}


def together(num_ranks, work):
    """What work(share) returns on each rank. A rank runs until it waits for the others: the interpreter serves one at a time."""
    tensors, barrier, turn = [None] * num_ranks, threading.Barrier(num_ranks, timeout=60), threading.Lock()

    def run(rank):
        def fill_in(tensor):
            tensors[rank] = tensor.clone()
            turn.release()
            barrier.wait()
            turn.acquire()
            assert sum((other.view(torch.uint8) != 0).int() for other in tensors).max() <= 1  # nobody writes another's elements
            tensor.view(torch.uint8).copy_(sum(other.view(torch.uint8) for other in tensors))
            turn.release()
            barrier.wait()  # all have read
            turn.acquire()
        with turn:
            return work(ExpertShare(rank, num_ranks, fill_in))

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(run, range(num_ranks)))


def part_of(whole, share, **settings):
    """The same model, with a rank's experts."""
    part = GptOss(whole.config, dtype=whole.dtype, device=whole.device, experts=whole.expert_format.name, share=share, **settings)
    attach_lora(part, LoraConfig(3, 6.0, EVERYTHING, True, True), seed=1)
    own = share.of(whole.config.num_local_experts)
    part.load_state_dict({name: tensor[own] if ".mlp.experts." in name and "lora" not in name else tensor
                          for name, tensor in whole.state_dict().items()})
    return part


def arranged(model, in_fragments):
    for block in model.model.layers if in_fragments else ():
        block.mlp.experts.arrange()
    return model


def whole_gradients(model):
    """With those of all ranks' experts, as an update adds them up."""
    found = gradients(model, (5, 4))
    for name, gradient in found.items():
        if ".mlp.experts." in name:
            model.share.fill_in(gradient)
    return found


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned", "ordered_products")
@pytest.mark.parametrize("experts, num_ranks, recomputes, in_fragments", [("mxfp4", 2, True, True), ("bf16", 4, False, False)])
def test_gradients_have_the_bits_of_one_process(experts, num_ranks, recomputes, in_fragments):
    whole = build(LAYER, experts, activation_checkpointing=recomputes)

    def work(share):
        return whole_gradients(arranged(part_of(whole, share, activation_checkpointing=recomputes), in_fragments))

    found = together(num_ranks, work)
    expected = gradients(arranged(whole, in_fragments), (5, 4))
    for own in found:
        assert own.keys() == expected.keys() and any(".mlp.experts." in name for name in own)
        for name, gradient in expected.items():
            assert gradient.isfinite().all() and gradient.any() and torch.equal(own[name], gradient), name


def states(model):
    """Of prompts' last tokens, and of one that follows."""
    tokens, cache = torch.arange(7) * 7 % 40 + 1, model.new_cache(2, 32)
    for slot in range(2):
        cache.reserve(slot, 32)
    found = [model.prefill(tokens, [PrefillChunk(0, 0, 4), PrefillChunk(1, 0, 3)], cache)]
    found.append(model.decode(tokens[:2], torch.tensor([4, 3]), cache, torch.arange(2)))
    return torch.cat(found)


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned", "ordered_products")
@pytest.mark.parametrize("experts, num_ranks", [("mxfp4", 2), ("nf4", 4)])
def test_prefill_and_decode_have_the_bits_of_one_process(experts, num_ranks):
    whole = build(LAYER, experts)
    found = together(num_ranks, lambda share: states(arranged(part_of(whole, share), experts == "mxfp4")))
    expected = states(arranged(whole, experts == "mxfp4"))
    assert expected.isfinite().all()
    assert all(torch.equal(own, expected) for own in found)
