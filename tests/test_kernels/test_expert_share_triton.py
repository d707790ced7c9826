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
    part.load_state_dict({name: part.own(name, tensor) for name, tensor in whole.state_dict().items()})
    return part


def arranged(model):
    for block in model.model.layers:
        block.mlp.experts.arrange()
    return model


def whole_gradients(model):
    """With those of all ranks' experts, as an update adds them up."""
    return {name: model.whole(name, gradient) for name, gradient in gradients(model, (3, 2)).items()}


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned")
def test_gradients_have_the_bits_of_one_process():
    whole = build(LAYER, "mxfp4", activation_checkpointing=True)
    found = together(2, lambda share: whole_gradients(arranged(part_of(whole, share, activation_checkpointing=True))))
    expected = gradients(arranged(whole), (3, 2))
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
@pytest.mark.usefixtures("poisoned")
def test_prefill_and_decode_have_the_bits_of_one_process():
    whole = build(LAYER, "mxfp4")
    found = together(2, lambda share: states(arranged(part_of(whole, share))))
    expected = states(arranged(whole))
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


def check_parts(num_tokens, per_token, width, rank, *, keeps_h, device, dtype):
    """Four parts of eight experts against the whole."""
    indices, packed, tensors = problem(num_tokens, 8, per_token, width, width, rank)
    t = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    t |= {name: tensors[name].float().to(device) for name in ("weights", "A1", "B1", "A2", "B2")}
    packed = [tuple(tensor.clone().to(device) for tensor in pair) for pair in packed]
    for pair in packed:
        to_fragments_(*pair)
    routing, grad = make_routing(indices.to(device), num_experts=8), normal(num_tokens, width, seed=12).to(device, dtype)
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


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("keeps_h", [False, True])
def test_parts_add_up_to_the_whole(keeps_h):
    check_parts(7, 2, 32, 4, keeps_h=keeps_h, device="cpu", dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_tokens, keeps_h", [(9, True), (333, False), (9000, True)])  # from 8,193 rows on, sums of chunks
def test_parts_at_real_widths_add_up_to_the_whole_in_bf16(num_tokens, keeps_h):
    check_parts(num_tokens, 4, 2880, 16, keeps_h=keeps_h, device="cuda", dtype=torch.bfloat16)
