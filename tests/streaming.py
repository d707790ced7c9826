"""What tests of streamed experts share: slots that are poisoned as soon as nothing may read them, and a model's results."""

import torch

from models.expert_store import ExpertStore
from models.gpt_oss import GptOss
from models.keys import PrefillChunk
from models.lora import LoraConfig, attach_lora

LENGTHS = (4, 1, 5)


def poison_slots(monkeypatch) -> list[tuple[int, int]]:
    """From now on a slot holds NaN and wrong codes once another layer has arrived. Returns a list that will get the (layer, step)
    of every arrival."""
    arrivals, plain = [], ExpertStore.arrive

    def arrive(store, layer, step):
        last = arrivals[-1][0] if arrivals else layer
        if last != layer and last in store._contents:
            slot = store._contents.index(last)
            store._slots[slot].fill_(255)
            store._contents[slot] = None
        arrived = plain(store, layer, step)
        assert torch.equal(arrived.cpu(), store.home(layer))
        arrivals.append((layer, step))
        return arrived

    monkeypatch.setattr(ExpertStore, "arrive", arrive)
    return arrivals


def add_adapter(model: GptOss) -> None:
    """An adapter on everything, that is not zero."""
    attach_lora(model, LoraConfig(3, 6.0, ["q_proj", "k_proj", "v_proj", "o_proj", "router", "experts"], True, True), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.trainable_parameters().items():
        if name.endswith("lora_B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def gradients(model: GptOss) -> dict[str, torch.Tensor]:
    """Of a weighted sum of the log-probs of packed random sequences; and the log-probs."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, model.config.vocab_size, (sum(LENGTHS),), generator=generator)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    mask = torch.ones(sum(LENGTHS), dtype=torch.bool)
    mask[bounds[:-1].long()] = False
    factors = torch.randn(sum(LENGTHS), generator=generator).to(model.device)
    model.zero_grad()
    chosen, _ = model.log_probs(tokens.to(model.device), bounds, temperature=0.8, mask=mask)
    (chosen * factors).sum().backward()
    return {name: parameter.grad for name, parameter in model.trainable_parameters().items()} | {"log_probs": chosen.detach()}


@torch.no_grad()
def logits_of_decode(model: GptOss) -> list[torch.Tensor]:
    """The logits of a prefill and of two decode steps of two sequences."""
    cache, slots = model.new_cache(2, 32), torch.arange(2, device=model.device)
    assert cache.reserve(0, 32) and cache.reserve(1, 32)
    tokens = torch.arange(3, 12, device=model.device)
    hidden = [model.prefill(tokens, [PrefillChunk(0, 0, 5), PrefillChunk(1, 0, 4)], cache)]
    for step in range(2):
        hidden.append(model.decode(tokens[step:step + 2], torch.tensor([5, 4], device=model.device) + step, cache, slots))
    return [model.head(rows) for rows in hidden]


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected) and expected.any(), name
