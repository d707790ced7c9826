"""Sampling and training at once, on a GPU."""

import threading

import pytest
import torch
from paths import FIXTURES

from grpo.batch import Prompt, pack
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from models.behaviour import BehaviourCopy
from models.decoder import CAPTURES, first_served_stream
from models.formats.hugging_face import load_model
from models.lora import LoraConfig, attach_lora

pytestmark = pytest.mark.gpu
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def policy():
    model = load_model(FIXTURES / "tiny_mxfp4", device="cuda", dtype=torch.bfloat16)
    attach_lora(model, LoraConfig(rank=4, alpha=8.0), seed=0)
    move(model, seed=1)
    return model


@torch.no_grad()
def move(model, *, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    for parameter in model.trainable_parameters().values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator, device="cuda")


def sample(sampler, step):
    prompts = [Prompt(i, list(range(5 + i, 12 + 17 * i)), {}) for i in range(6)]
    return sampler.generate(prompts, SamplingParams(max_new_tokens=100, temperature=TEMPERATURE), step=step, num_samples=3)


def contents(completions):
    return [[(segment.token_ids, segment.log_probs) for segment in completion.segments] for completion in completions]


def log_probs_of(model, batch):
    return model.log_probs(batch.tokens, batch.cu_seqlens, temperature=TEMPERATURE, mask=batch.host_mask)[0]


def gradient(model, batch):
    log_probs_of(model, batch).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.trainable_parameters().values()]
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    return gradients


def test_at_once_both_have_the_bits_that_they_have_alone_and_the_old_policy_its_log_probs(policy):
    copy = BehaviourCopy(policy)
    sampler = Sampler(copy.model, [1], max_batch=18, seed=3)
    first, expected = sample(sampler, 0), sample(sampler, 1)
    batch = pack(first, [1.0] * len(first)).to(policy.device)
    with torch.no_grad():
        assert torch.equal(log_probs_of(policy, batch)[batch.loss_mask], batch.sampler_log_probs[batch.loss_mask])
    alone, beside, is_done = gradient(policy, batch), [], threading.Event()

    def train():
        torch.cuda.set_device(policy.device)
        while not is_done.is_set() or len(beside) < 3:
            with CAPTURES.computing():
                beside.append(gradient(policy, batch))

    sampler.forget()  # so that graphs are captured while the other thread trains
    thread = threading.Thread(target=train)
    torch.cuda.synchronize()
    thread.start()
    try:
        with torch.cuda.stream(first_served_stream(policy.device)):
            again = [sample(sampler, 1) for _ in range(4)]
    finally:
        is_done.set()
        thread.join()
    torch.cuda.synchronize()
    assert all(contents(completions) == contents(expected) for completions in again)
    assert beside and all(torch.equal(*pair) for found in beside for pair in zip(found, alone, strict=True))


def test_after_the_policy_moved_the_copy_samples_as_before_until_it_is_refreshed(policy):
    copy = BehaviourCopy(policy)
    sampler = Sampler(copy.model, [1], max_batch=18, seed=3)
    before = sample(sampler, 0)
    move(policy, seed=2)
    drawn = sample(sampler, 0)
    assert contents(drawn) == contents(before)
    batch = pack(drawn, [1.0] * len(drawn)).to(policy.device)
    with torch.no_grad():
        old, new = (log_probs_of(model, batch)[batch.loss_mask] for model in (copy.model, policy))
    assert torch.equal(old, batch.sampler_log_probs[batch.loss_mask]) and (new - old).abs().max() > 1e-3
    copy.refresh()  # graphs read the new values at the same addresses
    moved = sample(sampler, 0)
    assert contents(moved) != contents(before)
    batch = pack(moved, [1.0] * len(moved)).to(policy.device)
    with torch.no_grad():
        assert torch.equal(log_probs_of(policy, batch)[batch.loss_mask], batch.sampler_log_probs[batch.loss_mask])
