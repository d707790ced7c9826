"""Recording which experts tokens go to, against the golden router logits, and replaying it."""

from dataclasses import replace

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

import models.offload
import models.routing_record
from models.formats.hugging_face import load_model
from models.gpt_oss import GptOss
from models.keys import PrefillChunk
from models.lora import LoraConfig, attach_lora
from models.routing_record import RoutingRecord, RoutingReplay, empty_routing, no_record

NAMES = ("tiny_bf16", "tiny_mxfp4")
BOUNDS = torch.tensor([0, 40, 80, 120], dtype=torch.int32)
NOT_RECORDED = 255


@pytest.fixture(params=NAMES)
def pair(request) -> tuple[GptOss, dict[str, torch.Tensor]]:
    model = load_model(FIXTURES / request.param, device="cpu", dtype=torch.float32)
    return model, load_file(FIXTURES / request.param / "golden.safetensors")


def golden_routing(model: GptOss, data: dict[str, torch.Tensor]) -> torch.Tensor:
    """[120, L, A] uint8: the experts of transformers' router, best first, for input_ids end to end."""
    per_token = model.config.num_experts_per_tok
    layers = [data[f"router_logits.{layer}"].flatten(0, 1).topk(per_token).indices
              for layer in range(model.config.num_hidden_layers)]
    return torch.stack(layers, dim=1).to(torch.uint8)


def log_probs(model: GptOss, data: dict[str, torch.Tensor], routing: RoutingReplay | None) -> torch.Tensor:
    mask = torch.ones(120, dtype=torch.bool)
    mask[BOUNDS[:-1].long()] = False
    return model.log_probs(data["input_ids"].flatten(), BOUNDS, temperature=1.0, mask=mask, record=routing)[0]


@torch.no_grad()
@pytest.mark.parametrize("chunk_tokens", [models.offload.CHUNK_TOKENS, 50])
def test_prefill_and_decode_record_the_experts_of_the_golden_router(pair, chunk_tokens, monkeypatch):
    monkeypatch.setattr(models.offload, "CHUNK_TOKENS", chunk_tokens)
    model, data = pair
    tokens, expected = data["input_ids"], golden_routing(model, data).unflatten(0, (3, 40))
    cache, slots = model.new_cache(3, 40), torch.arange(3)
    assert all(cache.reserve(slot, 40) for slot in range(3))
    record = RoutingRecord(3 * 30, model.config, "cpu")
    model.prefill(tokens[:, :30].flatten(), [PrefillChunk(slot, 0, 30) for slot in slots.tolist()], cache, record=record)
    assert torch.equal(record.indices.unflatten(0, (3, 30)), expected[:, :30])
    for position in range(30, 40):
        record = RoutingRecord(3, model.config, "cpu")
        model.decode(tokens[:, position], torch.full((3,), position), cache, slots, record=record)
        assert torch.equal(record.indices, expected[:, position]), position


@torch.no_grad()
def test_recording_changes_no_bit_of_the_logits(pair):
    model, data = pair
    tokens, cache = data["input_ids"][0], model.new_cache(1, 40)
    assert cache.reserve(0, 40)
    plain, recorded = (model.head(model.prefill(tokens, [PrefillChunk(0, 0, 40)], cache, record=record))
                       for record in (None, RoutingRecord(40, model.config, "cpu")))
    assert torch.equal(plain, recorded)


@torch.no_grad()
def test_replaying_the_own_choices_gives_the_same_bits_and_no_flips(pair):
    model, data = pair
    replay = RoutingReplay(golden_routing(model, data))
    assert torch.equal(log_probs(model, data, replay), log_probs(model, data, None))
    assert replay.num_flips == 0
    assert replay.num_choices == 120 * model.config.num_hidden_layers * model.config.num_experts_per_tok


@torch.no_grad()
def test_a_replay_in_chunks_of_tokens_is_that_of_all_at_once(pair, monkeypatch):
    model, data = pair
    routing = golden_routing(model, data)
    whole, parts = RoutingReplay(routing), RoutingReplay(routing)
    expected = log_probs(model, data, whole)
    monkeypatch.setattr(models.offload, "CHUNK_TOKENS", 50)
    torch.testing.assert_close(log_probs(model, data, parts), expected, rtol=0, atol=1e-6)
    assert parts.num_choices == whole.num_choices == routing.numel() and parts.num_flips == 0


def test_a_changed_record_changes_the_log_probs_and_counts_as_flips(pair):
    model, data = pair
    recorded = golden_routing(model, data)
    # token 50, last layer, second expert: another one that is not its first either; nothing runs after it but the head
    taken = recorded[50, -1].tolist()
    recorded[50, -1, 1] = next(expert for expert in range(4) if expert not in taken)
    replay = RoutingReplay(recorded)
    changed, expected = log_probs(model, data, replay), log_probs(model, data, None)
    others = torch.arange(120) != 51
    assert torch.equal(changed[others], expected[others])
    assert abs(changed[51] - expected[51]) > 1e-4  # token 51 is drawn after token 50
    assert replay.num_flips == 1


@torch.no_grad()
def test_the_order_of_experts_is_no_flip(pair):
    model, data = pair
    replay = RoutingReplay(golden_routing(model, data).flip(2))
    torch.testing.assert_close(log_probs(model, data, replay), log_probs(model, data, None), rtol=0, atol=1e-5)
    assert replay.num_flips == 0


@torch.no_grad()
def test_tokens_without_a_record_are_routed_by_the_trainer_and_not_counted(pair):
    model, data = pair
    recorded = golden_routing(model, data)
    recorded[[39, 79, 100, 119]] = NOT_RECORDED
    replay = RoutingReplay(recorded)
    assert torch.equal(log_probs(model, data, replay), log_probs(model, data, None))
    assert replay.num_choices == 116 * model.config.num_hidden_layers * model.config.num_experts_per_tok


@torch.no_grad()
def test_recorded_experts_are_used_whatever_the_router_prefers(pair):
    model, data = pair
    recorded = golden_routing(model, data)
    expected = log_probs(model, data, None)
    router = model.model.layers[-1].mlp.router
    favourite = 3
    router.bias[favourite] += 1000.0  # chosen for every token from now on, with all of the weight
    spared = (recorded[:, -1] != favourite).all(1)  # tokens whose recorded weights do not know of it
    after_spared = torch.cat([torch.tensor([False]), spared[:-1]])
    replay = RoutingReplay(recorded)
    assert torch.equal(log_probs(model, data, replay)[after_spared], expected[after_spared])
    assert replay.num_flips >= spared.sum() > 20
    assert not torch.equal(log_probs(model, data, None)[after_spared], expected[after_spared])


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_repeats_the_forward_s_experts_without_choosing_again(name, monkeypatch):
    calls, choose = [], models.routing_record.choose_experts
    monkeypatch.setattr(models.routing_record, "choose_experts",
                        lambda *args, **settings: calls.append(1) or choose(*args, **settings))
    gradients = []
    for checkpointed in (False, True):
        model = load_model(FIXTURES / name, device="cpu", dtype=torch.float32, activation_checkpointing=checkpointed)
        data = load_file(FIXTURES / name / "golden.safetensors")
        attach_lora(model, LoraConfig(3, 6.0, ["q_proj", "router", "experts"], False, False), seed=1)
        for key, parameter in model.trainable_parameters().items():
            if key.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(key)))
        recorded = golden_routing(model, data)
        recorded[::7] = NOT_RECORDED
        replay = RoutingReplay(recorded)
        log_probs(model, data, replay).sum().backward()
        flips = int(replay.num_flips)
        gradients.append({key: parameter.grad for key, parameter in model.trainable_parameters().items()})
        assert len(calls) == model.config.num_hidden_layers * (1 + checkpointed)  # over both models
        assert flips > 0  # the adapter moved the router
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key
        assert gradient.any() or "experts" in key, key  # the router's too, through the gate weights


def test_experts_beyond_a_byte_are_recorded_in_two(pair):
    model, _ = pair
    small = empty_routing(2, replace(model.config, num_local_experts=255), "cpu")
    large = empty_routing(2, replace(model.config, num_local_experts=256), "cpu")
    assert small.dtype == torch.uint8 and large.dtype == torch.int16
    assert (small == 255).all() and (large == 32767).all() and no_record(torch.uint8) == NOT_RECORDED
