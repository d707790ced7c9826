"""Kernels of processes that hold a model's experts together: the bits of one. Here threads, one of which runs at a time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from moe_problem import ALPHA, LIMIT, SCALE, normal, problem
from test_block_triton import ARCHITECTURE, EVERYTHING, build, gradients

from kernels.device import is_few
from kernels.experts.few_rows import few_rows_forward
from kernels.experts.forward import local_backward, local_forward
from kernels.experts.sorting import make_routing
from kernels.packed.fragments import to_fragments_
from kernels.packed.weights import Mxfp4Fragments
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


def computed(x, grad, gates, routing, packed, t, own, *, keeps_h):
    """Rows, gradients of rows and gate weights, and LoRA's, of a part of the experts."""
    gate_up, down = (Mxfp4Fragments(*(tensor[own] for tensor in pair), t[bias][own], True)
                     for pair, bias in zip(packed, ("b1", "b2")))
    settings = {"lora": [t[name][own] for name in ("A1", "B1", "A2", "B2")], "lora_scale": SCALE, "alpha": ALPHA, "limit": LIMIT}
    projections = [weights.few_rows(x, routing.offsets_device) for weights in (gate_up, down)]
    few = [few_rows_forward(x, routing, *projections, **settings)] if is_few(x) else []
    rows, kept = local_forward(x, routing, gate_up, down, dtype=x.dtype, scratch_bytes=1 << 28, keeps_h=keeps_h, **settings)
    grad_rows, grad_gates, lora_grads, _ = local_backward(grad, x, gates, routing, gate_up, down, kept, scratch_bytes=1 << 28,
                                                          needs_base=False, **settings)
    return [*few, rows, grad_rows, grad_gates], lora_grads


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_tokens, keeps_h", [(9, True), (333, False), (9000, True)])  # from 8,193 rows on, sums of chunks
def test_parts_at_real_widths_add_up_to_the_whole_in_bf16(num_tokens, keeps_h):
    indices, packed, tensors = problem(num_tokens, 8, 4, 2880, 2880, 16)
    t = {name: tensor.cuda() if name == "weights" else tensor.to("cuda", torch.bfloat16) for name, tensor in tensors.items()}
    t |= {name: tensors[name].float().cuda() for name in ("weights", "A1", "B1", "A2", "B2")}
    packed = [tuple(tensor.cuda() for tensor in pair) for pair in packed]
    for pair in packed:
        to_fragments_(*pair)
    routing, grad = make_routing(indices.cuda(), num_experts=8), normal(num_tokens, 2880, seed=12).to("cuda", torch.bfloat16)
    settings = t["x"], grad, t["weights"]
    expected, expected_lora = computed(*settings, routing, packed, t, slice(None), keeps_h=keeps_h)
    found = [computed(*settings, routing.part(own, 4), packed, t, own, keeps_h=keeps_h)
             for own in (slice(first, first + 2) for first in range(0, 8, 2))]
    for number, whole in enumerate(expected):
        parts = torch.stack([rows[number].view(torch.uint8) for rows, _ in found])
        assert whole.isfinite().all() and whole.any() and (parts != 0).sum(0).max() <= 1
        assert torch.equal(parts.sum(0, dtype=torch.uint8), whole.view(torch.uint8)), number
    for number, whole in enumerate(expected_lora):
        assert whole.any() and torch.equal(torch.cat([lora[number] for _, lora in found]), whole), number
