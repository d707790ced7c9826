"""Processes that hold a model's experts together, here threads that exchange rows: the bits of one process."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BF16, MXFP4, fill_trainable

from grpo.config import ConfigError
from grpo.distributed.experts import ExpertAdapters
from grpo.kl import Reference
from grpo.run.start import check_equal_weights
from models.expert_share import ExpertShare
from models.expert_store import Placement
from models.formats.files import CheckpointError
from models.formats.hugging_face import load_model, save_model
from models.formats.peft import CONFIG_NAME, WEIGHTS_NAME, load_adapter, save_adapter
from models.keys import PrefillChunk
from models.lora import (
    LoraConfig,
    attach_lora,
    count_active_parameters,
    count_parameters,
    describe_trainable,
    set_full_training,
)

TOKENS = torch.arange(23) * 7 % 60 + 1
BOUNDS = torch.tensor([0, 9, 23], dtype=torch.int32)


class Meeting:
    """Adds up the ranks' tensors, byte by byte, and counts how often."""

    def __init__(self, num_ranks):
        self.tensors, self.barrier, self.num_calls = [None] * num_ranks, threading.Barrier(num_ranks, timeout=20), 0

    def share(self, rank):
        def fill_in(tensor):
            self.tensors[rank] = tensor.clone()
            self.barrier.wait()
            own = tensor.contiguous().view(-1).view(torch.uint8)
            total = torch.stack([other.contiguous().view(-1).view(torch.uint8) for other in self.tensors]).sum(0)
            own.copy_(total)
            self.num_calls += rank == 0
            self.barrier.wait()
        return ExpertShare(rank, len(self.tensors), fill_in)


def together(num_ranks, work):
    """What work(share) returns on each rank."""
    meeting = Meeting(num_ranks)
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(lambda rank: work(meeting.share(rank)), range(num_ranks)))


def policy(folder, share=None, **settings):
    model = load_model(folder, device="cpu", dtype=torch.float32, share=share, **settings)
    attach_lora(model, LoraConfig(4, 8.0, ["q_proj", "k_proj", "v_proj", "o_proj", "router", "experts"], True, True), seed=3)
    fill_trainable(model)
    return model


def scored(folder, share=None, **settings):
    """Log-probs, and gradients of two micro-batches."""
    model = policy(folder, share, **settings)
    mask = torch.ones(len(TOKENS), dtype=torch.bool)
    mask[BOUNDS[:-1].long()] = False
    for weight in (1.0, 0.3):
        log_probs, entropy = model.log_probs(TOKENS, BOUNDS, temperature=0.9, mask=mask)
        (weight * log_probs.sum() + entropy.square().sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.trainable_parameters().items()}
    if share is not None:
        for name in gradients:
            gradients[name] = model.whole(name, gradients[name])
    return log_probs.detach(), gradients


@pytest.mark.parametrize("folder, num_ranks, settings", [
    (BF16, 2, {}), (BF16, 4, {"activation_checkpointing": True}), (MXFP4, 2, {"activation_checkpointing": True}), (MXFP4, 4, {}),
    (MXFP4, 2, {"experts": "bf16"})])
def test_log_probs_and_gradients_have_the_bits_of_one_process(folder, num_ranks, settings):
    expected, expected_gradients = scored(folder, **settings)
    for log_probs, gradients in together(num_ranks, lambda share: scored(folder, share, **settings)):
        assert torch.equal(log_probs, expected)
        assert gradients.keys() == expected_gradients.keys() and any(".mlp.experts." in name for name in gradients)
        for name, gradient in gradients.items():
            assert gradient.abs().sum() > 0 and torch.equal(gradient, expected_gradients[name]), name


def sampled(folder, share=None):
    """The states of a prompt's last token, and of two that follow."""
    model = policy(folder, share)
    cache = model.new_cache(2, 32)
    for slot in range(2):
        cache.reserve(slot, 32)
    states = [model.prefill(TOKENS, [PrefillChunk(0, 0, 9), PrefillChunk(1, 0, 14)], cache)]
    for step in range(2):
        states.append(model.decode(TOKENS[step:step + 2], torch.tensor([9, 14]) + step, cache, torch.arange(2)))
    return torch.cat(states)


def test_prefill_and_decode_have_the_bits_of_one_process():
    expected = sampled(MXFP4)
    for states in together(4, lambda share: sampled(MXFP4, share)):  # 4 choices a step: some rank has no row
        assert torch.equal(states, expected)


def test_a_process_has_its_experts_only():
    whole = policy(MXFP4)
    meeting = Meeting(2)
    for rank in range(2):
        model = policy(MXFP4, meeting.share(rank))
        for block, own in zip(whole.model.layers, model.model.layers):
            held, all_held = (dict(experts.named_buffers()) | dict(experts.named_parameters())
                              for experts in (own.mlp.experts, block.mlp.experts))
            assert "down_proj_bias" in held and held["gate_up_proj_lora_B"].any()
            for name, tensor in held.items():
                assert torch.equal(tensor, all_held[name][2 * rank:2 * rank + 2]), name
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, name  # the others' are gone
        assert count_parameters(model) == count_parameters(whole)
        assert count_active_parameters(model) == count_active_parameters(whole)
        assert describe_trainable(model) == describe_trainable(whole)


def loaded_and_saved(folder, out, share):
    """The bytes of a folder's adapter, after processes that share experts have loaded it and made it whole."""
    model = load_model(MXFP4, device="cpu", dtype=torch.float32, share=share)
    load_adapter(model, folder)
    whole = {parameter: model.whole(name, parameter.detach()) for name, parameter in model.trainable_parameters().items()}
    save_adapter(model, out / str(share.rank), read=whole.__getitem__)
    return (out / str(share.rank) / WEIGHTS_NAME).read_bytes()


def expert_by_expert(tensors, num_experts):
    """An adapter's tensors as files have them that name single experts."""
    found = {}
    for name, tensor in tensors.items():
        prefix, _, side = name.partition(".lora_")
        if not prefix.endswith(("experts", "experts.base_layer")):
            found[name] = tensor
            continue
        matrix = f"{prefix.partition('.base_layer')[0]}.{'gate_up' if 'base_layer' in prefix else 'down'}_projs"
        for expert in range(num_experts):
            rows, columns = tensor.unflatten(0, (num_experts, -1)), tensor.unflatten(1, (-1, num_experts))
            found[f"{matrix}.{expert}.lora_{side}"] = (rows[expert] if side[0] == "A" else columns[..., expert]).contiguous()
    return found


@pytest.mark.parametrize("is_single", [False, True], ids=["experts together", "expert by expert"])
def test_each_process_loads_its_part_of_an_adapter(tmp_path, is_single):
    save_adapter(policy(MXFP4), tmp_path / "adapter")
    expected = (tmp_path / "adapter" / WEIGHTS_NAME).read_bytes()
    if is_single:
        save_file(expert_by_expert(load_file(tmp_path / "adapter" / WEIGHTS_NAME), 4), tmp_path / "adapter" / WEIGHTS_NAME)
        settings = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
        (tmp_path / "adapter" / CONFIG_NAME).write_text(json.dumps(settings | {"target_parameters": ["mlp.router.weight"]}))
    for saved in together(2, lambda share: loaded_and_saved(tmp_path / "adapter", tmp_path, share)):
        assert saved == expected


def test_a_reference_is_the_base_on_all_processes_or_on_none():
    def reference_of(share):
        model = policy(MXFP4, share)
        for name, parameter in model.trainable_parameters().items():
            if name.endswith("lora_B") and (share.rank == 0 or ".mlp.experts." not in name):
                parameter.data.zero_()
        return Reference.of(model).tensors

    first, second = together(2, reference_of)
    assert first.keys() == second.keys() and any(name.endswith("lora_A") for name in first)


def test_a_rank_that_starts_from_other_experts_adapters_is_named():
    sums = []

    def exchange(what, value):
        sums.append(value)
        return found or [value]

    meeting, found = Meeting(2), []
    runs = [SimpleNamespace(policy=policy(MXFP4, meeting.share(rank)), ranks=SimpleNamespace(num_sharers=2, exchange=exchange))
            for rank in range(2)]
    for run in runs:
        check_equal_weights(run)
    runs[1].policy.model.layers[2].mlp.experts.down_proj_lora_B.data[1, 5, 0] += 1.0
    check_equal_weights(runs[1])
    first, second, other = sums
    assert first[0] == second[0] == other[0] and first[1] != second[1]
    found = [first, second, first, second]
    check_equal_weights(runs[0])
    found = [first, second, first, other]
    with pytest.raises(RuntimeError, match="rank 3 starts from other weights than ranks 0 and 1"):
        check_equal_weights(runs[0])


@pytest.mark.parametrize("rank, fits", [(2, False), (8, True)])
def test_a_state_in_8_bits_needs_adapters_of_whole_blocks(rank, fits):
    model = load_model(MXFP4, device="cpu", dtype=torch.float32, share=Meeting(2).share(0))
    attach_lora(model, LoraConfig(rank, 4.0, ["experts"]), seed=0)
    ranks = SimpleNamespace(sharer=0, num_sharers=2)
    with nullcontext() if fits else pytest.raises(ConfigError, match="optim.moments = 'int8': .* do not fill blocks of 256"):
        assert ExpertAdapters(ranks, model, moments="int8").parameters
    assert ExpertAdapters(ranks, model, moments="fp32").parameters


def test_what_needs_all_experts_is_refused(tmp_path):
    share = Meeting(2).share(0)
    with pytest.raises(CheckpointError, match="holds some of the model's experts"):
        save_model(policy(BF16, share), tmp_path / "export", merge_lora=False)
    with pytest.raises(ValueError, match="model.train=full: each process holds some of the experts"):
        set_full_training(load_model(BF16, device="cpu", dtype=torch.float32, share=share))
    with pytest.raises(ValueError, match="expert_parallel = 3: must divide the 8 experts of a layer"):
        load_model(BF16, device="cpu", dtype=torch.float32, share=Meeting(3).share(0))
    with pytest.raises(ValueError, match="a share of the experts does not stream"):
        load_model(BF16, device="cpu", dtype=torch.float32, share=share, placement=Placement(0, 1))
