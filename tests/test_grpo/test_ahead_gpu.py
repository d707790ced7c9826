"""Sampling and training at once, on a GPU."""

import threading

import pytest
import torch
from paths import FIXTURES

from grpo.batch import Prompt, pack
from grpo.rollout.in_flight import begin, go_on
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from models.behaviour import BehaviourCopy
from models.decoder import CAPTURES, fetching_stream, first_served_stream
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


def test_steps_and_what_they_drew_are_on_two_streams_that_come_before_training(policy):
    streams = first_served_stream(policy.device), fetching_stream(policy.device)
    assert streams[0] != streams[1] and all(stream.priority < torch.cuda.current_stream().priority for stream in streams)
    assert fetching_stream(policy.device) == streams[1]  # of all decoders


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


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_completions_that_go_on_under_a_newer_policy_have_the_log_probs_of_each_for_its_tokens(policy, shares_prompts):
    old, copy = BehaviourCopy(policy), BehaviourCopy(policy)
    sampler = Sampler(copy.model, [1], max_batch=24, seed=3, shares_prompts=shares_prompts)
    prompts = [Prompt(i, list(range(5 + i, 12 + 17 * i)), {}) for i in range(6)]
    params = SamplingParams(max_new_tokens=90, temperature=TEMPERATURE)
    begun = [begin(step, 0, prompts, num_samples=3) for step in (0, 1)]  # more rows than run at once
    for version, limits in enumerate([(45, 1), (90, 90)]):
        if version:
            move(policy, seed=5)
            copy.refresh()
        begun = go_on(sampler, begun, limits, params, version=version, should_stop=lambda: False, progress=None)
    completions = [completion for rollout in begun for completion in rollout.completions]
    for rollout, num_old in zip(begun, (45, 1), strict=True):
        for completion in rollout.completions:
            assert completion.segments[1].versions == ([0] * num_old + [1] * 90)[:completion.num_policy_tokens]
    versions = torch.tensor([version for completion in completions
                             for version in [-1] * len(completion.prompt.token_ids) + completion.segments[1].versions])
    batch = pack(completions, [1.0] * len(completions))
    work = batch.select(list(range(batch.num_rows)), share_prompts=shares_prompts)
    versions, work = versions[work.token_index], work.to(policy.device)
    with torch.no_grad():
        found = [model.log_probs(work.tokens, work.cu_seqlens, temperature=TEMPERATURE, mask=work.host_mask,
                                 prefixes=work.prefixes)[0] for model in (old.model, policy)]
    for version, log_probs in enumerate(found):
        gaps = (log_probs - work.sampler_log_probs).abs().cpu()
        assert work.host_mask[versions == version].any()
        assert float(gaps[(versions == version) & work.host_mask].max()) == 0
        assert float(gaps[(versions == 1 - version) & work.host_mask].max()) > 1e-3
