"""The copy that samples while the policy trains."""

import pytest
import torch
from tiny_models import BF16, MXFP4, fill_trainable, load, logits_of

from models.behaviour import BehaviourCopy
from models.lora import LoraConfig, attach_lora, set_full_training

IDS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("trains", ["adapter", "adapter, norms and sinks", "all"])
def test_it_computes_as_the_policy_did_at_the_last_refresh_and_shares_what_is_frozen(trains):
    policy = load(BF16 if trains == "all" else MXFP4)
    if trains == "all":
        set_full_training(policy)
    else:
        has_norms = trains != "adapter"
        attach_lora(policy, LoraConfig(2, 4.0, train_norms=has_norms, train_sinks=has_norms), seed=1)
    fill_trainable(policy)
    copy, before = BehaviourCopy(policy), logits_of(policy, IDS)
    assert torch.equal(logits_of(copy.model, IDS), before)
    fill_trainable(policy, seed=1)
    after = logits_of(policy, IDS)
    assert torch.equal(logits_of(copy.model, IDS), before) and not torch.equal(before, after)
    addresses = [parameter.data_ptr() for parameter in copy.model.parameters()]
    copy.refresh()
    assert torch.equal(logits_of(copy.model, IDS), after)
    assert addresses == [parameter.data_ptr() for parameter in copy.model.parameters()]  # graphs hold them
    trained = policy.trainable_parameters()
    for name, own in copy.model.named_parameters():
        assert (own is dict(policy.named_parameters())[name]) == (name not in trained), name
    assert all(own is other for own, other in zip(copy.model.buffers(), policy.buffers(), strict=True))
    assert not copy.model.trainable_parameters() and trained
    with policy.adapter_disabled():
        assert copy.model.adapter_is_enabled


def test_adapters_that_lie_side_by_side_stay_so():
    policy = load(MXFP4)
    attach_lora(policy, LoraConfig(2, 4.0), seed=1)
    copy = BehaviourCopy(policy).model
    for model in (policy, copy):
        attention = model.model.layers[1].self_attn
        first, second = attention.q_proj.lora_A, attention.k_proj.lora_A
        assert second.data_ptr() == first.data_ptr() + first.nbytes
    assert attention.q_proj.lora_A.data_ptr() != policy.model.layers[1].self_attn.q_proj.lora_A.data_ptr()
