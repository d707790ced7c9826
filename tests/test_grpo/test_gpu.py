"""The same code on a CUDA device: goldens, sampling and a run from start to end."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from paths import FIXTURES, ROOT
from rollout_problem import assert_equal, converse
from streaming import assert_same, gradients

import grpo.rollout.session
import kernels.device
import kernels.linear
import models.decoder
import models.gpt_oss
from grpo.batch import Prompt, micro_batches, pack
from grpo.kl import Reference
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from grpo.update import make_replay
from models.decoder import Decoder
from models.expert_store import ExpertStore, Placement
from models.formats.hugging_face import load_model
from models.keys import PrefillChunk
from models.kv_cache import page_bytes, slot_bytes
from models.lora import LoraConfig, attach_lora, set_full_training
from models.routing_record import RoutingRecord

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("folder", ["tiny_bf16", "tiny_mxfp4"])
def test_the_goldens_agree_on_cuda(folder):
    command = [sys.executable, ROOT / "scripts/compare_logits.py", FIXTURES / folder, FIXTURES / folder / "golden.safetensors",
               "--device", "cuda"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["logits_max_abs"] <= 1e-4 and result["packed_max_abs"] <= 1e-4, result
    assert result["logprob_max_abs"] <= 5e-5 and result["grad_max_rel"] <= 1e-4, result
    assert result["greedy_equal"] is True


def sample(device, dtype):
    model = load_model(FIXTURES / "tiny_mxfp4", device=device, dtype=dtype)
    sampler = Sampler(model, [1], max_batch=16, seed=3)
    prompts = [Prompt(i, list(range(5 + i, 12 + 2 * i)), {}) for i in range(4)]
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=20, temperature=0.7), step=2, num_samples=4)
    return model, completions


def test_a_completion_is_the_same_on_cuda_and_cpu():
    (_, on_cuda), (_, on_cpu) = sample("cuda", torch.float32), sample("cpu", torch.float32)
    assert [c.completion_ids for c in on_cuda] == [c.completion_ids for c in on_cpu]


def test_sampler_and_trainer_agree_on_cuda():
    model, completions = sample("cuda", torch.float32)
    batch = pack(completions, [0.0] * len(completions)).to(model.device)
    with torch.no_grad():
        log_probs, _ = model.log_probs(batch.tokens, batch.cu_seqlens, temperature=0.7, mask=batch.loss_mask)
    assert (log_probs - batch.sampler_log_probs)[batch.loss_mask].abs().max() <= 5e-5


def adapted_model(targets=("q_proj", "k_proj", "v_proj", "o_proj", "experts"), **settings):
    """The tiny packed checkpoint in bf16 with adapters that are not zero."""
    model = load_model(FIXTURES / "tiny_mxfp4", device="cuda", dtype=torch.bfloat16, **settings)
    attach_lora(model, LoraConfig(rank=4, alpha=8.0, targets=list(targets)), seed=0)
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=generator)
    return model


def assert_trainers_bits(model, completions, *, shares_prompts, temperature=0.7, max_tokens=100_000):
    """The sampler's log-probs are those of a training forward, bit for bit, in micro-batches of so many tokens."""
    batch = pack(completions, [1.0] * len(completions)).to(model.device)
    for micro in micro_batches(batch, max_tokens, share_prompts=shares_prompts):
        routing = make_replay(micro)
        log_probs, _ = model.log_probs(micro.tokens, micro.cu_seqlens, temperature=temperature, mask=micro.host_mask,
                                       kept=micro.kept, prefixes=micro.prefixes, record=routing)
        assert torch.equal(log_probs[micro.loss_mask], micro.sampler_log_probs[micro.loss_mask])
        assert routing is None or (int(routing.num_flips) == 0 and int(routing.num_choices) > 0)


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_sampled_log_probs_are_the_trainers_bit_for_bit(shares_prompts):
    model = adapted_model()
    prompts = [Prompt(i, list(range(5 + i, 12 + 17 * i)), {}) for i in range(6)]
    # five slots for 18 completions: rows are admitted while others run, and prompts wait
    sampler = Sampler(model, [1], max_batch=5, seed=3, shares_prompts=shares_prompts)
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=150, temperature=0.7), step=2, num_samples=3)
    for max_tokens in (100_000, 300):
        assert_trainers_bits(model, completions, shares_prompts=shares_prompts, max_tokens=max_tokens)


@pytest.mark.parametrize("max_batch", [5, 1])  # few rows: only experts that have some are copied
@pytest.mark.parametrize("placement", [Placement(4, 4), Placement(2, 3), Placement(0, 4)], ids=str)
def test_streamed_experts_give_the_bits_of_resident_ones_by_graphs_and_in_training(placement, max_batch):
    resident, model = adapted_model(), adapted_model(placement=placement, activation_checkpointing=True)
    prompts = [Prompt(i, list(range(5 + i, 12 + 17 * i)), {}) for i in range(6)]
    samplers, store = [Sampler(each, [1], max_batch=max_batch, seed=3) for each in (resident, model)], model.expert_store
    graphs, places = [], []
    for step in range(3):
        ours, theirs = (sampler.generate(prompts, SamplingParams(max_new_tokens=60, temperature=0.7), step=step, num_samples=3)
                        for sampler in samplers)
        assert contents(ours) == contents(theirs)
        graphs.append({key: id(graph) for key, (graph, _) in samplers[1]._decoder._graphs.items()})
        places.append([tensor.data_ptr() for tensor in (*store._slots, *store._returned.values())])
        samplers[1].offload()
        assert_same(gradients(model), gradients(resident))
        for slot in store._slots:
            slot.fill_(255)  # a graph must not read what it has not copied
    assert graphs[0] and graphs[0].items() <= graphs[1].items() <= graphs[2].items() and places[1:] == places[:1] * 2


@pytest.mark.parametrize("slow", ["computation", "copies"])
def test_streamed_experts_and_their_copies_wait_for_each_other(monkeypatch, slow):
    resident, model, cycles = adapted_model(), adapted_model(placement=Placement(4, 4)), 2_000_000
    arrive, fetch = ExpertStore.arrive, ExpertStore._fetch

    def slow_arrive(store, *arguments):
        arrived = arrive(store, *arguments)
        torch.cuda._sleep(cycles)  # between a layer's arrival and its products
        return arrived

    def slow_fetch(store, layer):
        if layer not in store._contents:  # so a copy follows, which is waited for
            store._copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(store._copies):
                torch.cuda._sleep(cycles)
        fetch(store, layer)

    if slow == "computation":
        monkeypatch.setattr(ExpertStore, "arrive", slow_arrive)
    else:
        monkeypatch.setattr(ExpertStore, "_fetch", slow_fetch)
    prompts = [Prompt(i, list(range(5 + i, 12 + 17 * i)), {}) for i in range(3)]
    samplers = [Sampler(each, [1], max_batch=3, seed=3) for each in (resident, model)]
    for step in range(2):
        ours, theirs = (contents(sampler.generate(prompts, SamplingParams(max_new_tokens=20), step=step, num_samples=1))
                        for sampler in samplers)
        assert ours == theirs
        assert_same(gradients(model), gradients(resident))


def test_memory_of_experts_that_stream_in_the_update_only_is_given_back():
    store = adapted_model(placement=Placement(0, 4)).expert_store
    store.begin(copies_routed=False)
    torch.cuda.synchronize()
    for _ in range(2):
        store.for_sampling()
        before = torch.cuda.mem_get_info()[0]
        store.for_update()
        assert torch.cuda.mem_get_info()[0] - before >= store._arena.num_bytes >= 4 * store.layer_bytes


@pytest.mark.parametrize("is_sampling", [False, True])
def test_rollouts_after_a_pass_that_failed_have_the_bits_of_resident_experts(monkeypatch, is_sampling):
    resident, model = adapted_model(), adapted_model(placement=Placement(4, 4))
    prompts = [Prompt(i, list(range(5 + i, 12 + 17 * i)), {}) for i in range(3)]
    samplers = [Sampler(each, [1], max_batch=5, seed=3) for each in (resident, model)]
    for layer in range(4):
        (model.expert_store.for_sampling if is_sampling else model.expert_store.for_update)()
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(model.model.layers[layer].mlp.experts, "local_forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model.logits(torch.arange(9, device="cuda"), torch.tensor([0, 9]))
        ours, theirs = (contents(sampler.generate(prompts, SamplingParams(max_new_tokens=30), step=layer, num_samples=1))
                        for sampler in samplers)
        assert ours == theirs


@pytest.mark.parametrize("trains_base", [False, True])
def test_a_pass_of_the_kl_reference_leaves_the_policy_and_its_graphs_as_they_were(trains_base):
    if trains_base:
        model = load_model(FIXTURES / "tiny_bf16", device="cuda", dtype=torch.bfloat16)
        set_full_training(model)
    else:
        model = adapted_model()
    sampler = Sampler(model, [1], max_batch=8, seed=3)
    prompts = [Prompt(i, list(range(5 + i, 25 + i)), {}) for i in range(2)]

    def log_probs_of(completions):
        batch = pack(completions, [1.0] * len(completions)).to(model.device)
        with torch.no_grad():
            return model.log_probs(batch.tokens, batch.cu_seqlens, temperature=0.7, mask=batch.host_mask)[0]

    for _ in range(2):  # the second rollout replays graphs
        before = sampler.generate(prompts, SamplingParams(max_new_tokens=40, temperature=0.7), step=0, num_samples=4)
    reference, at_start = Reference.of(model), log_probs_of(before)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():  # in place, as the optimizer updates
            parameter.mul_(1.1)
    updated = log_probs_of(before)
    with reference.in_place_of(model):
        assert torch.equal(log_probs_of(before), at_start)
    assert torch.equal(log_probs_of(before), updated) and not torch.equal(updated, at_start)
    after = sampler.generate(prompts, SamplingParams(max_new_tokens=40, temperature=0.7), step=0, num_samples=4)
    assert_trainers_bits(model, after, shares_prompts=False)


def test_prompts_read_once_for_their_completions_leave_the_trainers_bits(monkeypatch):
    monkeypatch.setattr(models.decoder, "_SHARED_TOKENS", 40)
    monkeypatch.setattr(models.decoder, "_PARTS_ROWS", 0)
    model, shared = adapted_model(), []
    original = models.decoder.share_prefixes
    monkeypatch.setattr(models.decoder, "share_prefixes", lambda *args, **kw: shared.append(original(*args, **kw)) or shared[-1])
    prompts = [Prompt(i, list(range(5 + i, 12 + 29 * i)), {}) for i in range(6)]
    sampler = Sampler(model, [1], max_batch=24, seed=3, shares_prompts=True)  # fewer than 54: rows come and go in the tiles
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=150, temperature=0.7), step=2, num_samples=9)
    assert_trainers_bits(model, completions, shares_prompts=True)
    assert len({tuple(tiles) for tiles in shared}) > 3 and max(map(len, shared)) > 1


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_keys_read_by_many_programs_leave_the_trainers_bits(monkeypatch, shares_prompts):
    monkeypatch.setattr(models.decoder, "_SHORT_PARTS", 64)
    monkeypatch.setattr(models.decoder, "_MANY_PARTS", 128)
    model, longest = adapted_model(), set()
    prompts = [Prompt(i, list(range(5 + i, 12 + 29 * i)), {}) for i in range(6)]
    original = models.decoder.Decoder._feed
    monkeypatch.setattr(models.decoder.Decoder, "_feed", lambda self, rows, record, reading: longest.add(reading.longest)
                        or original(self, rows, record, reading))
    sampler = Sampler(model, [1], max_batch=12, seed=3, shares_prompts=shares_prompts)
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=150, temperature=0.7), step=2, num_samples=3)
    assert_trainers_bits(model, completions, shares_prompts=shares_prompts)
    assert {128, 256} <= longest


@pytest.mark.parametrize("trains_base", [False, True])
@pytest.mark.parametrize("shares_prompts", [False, True])
def test_the_explanation_of_differences_sees_the_kernels_of_both_paths(monkeypatch, shares_prompts, trains_base):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from explain_mismatch import Settings, explain

    monkeypatch.setattr(kernels.device, "MAX_FEW_ROWS", 8)  # prompts by the kernels of training
    if trains_base:
        model = load_model(FIXTURES / "tiny_bf16", device="cuda", dtype=torch.bfloat16)
        set_full_training(model)
    else:
        model = adapted_model()
    prompts = [Prompt(i, list(range(5 + i, 12 + 17 * i)), {}) for i in range(3)]
    sampler = Sampler(model, [], max_batch=4, seed=3, shares_prompts=shares_prompts)
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=40, temperature=0.7), step=0, num_samples=2)
    batch = pack(completions, [0.0] * len(completions)).to(model.device)
    settings = Settings(num_samples=2, params=SamplingParams(max_new_tokens=40, temperature=0.7), max_batch=4, max_tokens=1000,
                        shares_prompts=shares_prompts, seed=3)
    position = len(prompts[1].token_ids) + 30
    assert explain(model, completions, batch, settings, index=3, position=position) is None
    original = kernels.linear.decode_linear
    monkeypatch.setattr(kernels.linear, "decode_linear", lambda *arguments, **settings: original(*arguments, **settings) * 1.01)
    at, findings = explain(model, completions, batch, settings, index=3, position=position)
    first = next(finding for finding in findings if finding.num_differing)
    assert (at, first.layer, first.operation) == (len(prompts[1].token_ids), 0, "queries, keys and values")


def test_a_completion_is_the_same_alone_and_in_any_batch():
    model, prompts = adapted_model(), [Prompt(i, list(range(5 + i, 12 + 9 * i)), {}) for i in range(4)]

    def sampled(prompts, max_batch):
        sampler = Sampler(model, [1], max_batch=max_batch, seed=3)
        return {(c.prompt.id, c.sample): (c.completion_ids, c.segments[1].log_probs) for c in
                sampler.generate(prompts, SamplingParams(max_new_tokens=40), step=2, num_samples=4)}

    together = sampled(prompts, 16)
    assert together == sampled(prompts, 3)
    assert {key: value for key, value in together.items() if key[0] == 2} == sampled(prompts[2:3], 1)


@pytest.mark.parametrize("settings", [{"greedy": True}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.05},
                                      {"records_routing": True}, {"top_p": 0.9, "records_routing": True}], ids=str)
def test_other_draws_by_graphs_are_those_of_launches_one_by_one(monkeypatch, settings):
    model, prompts = adapted_model(), [Prompt(i, list(range(5 + i, 12 + 9 * i)), {}) for i in range(4)]

    def sampled():
        sampler = Sampler(model, [1], max_batch=6, seed=3)  # fewer than completions: rows come and go
        return sampler.generate(prompts, SamplingParams(max_new_tokens=40, temperature=0.8, **settings), step=2, num_samples=3)

    by_graph = sampled()
    monkeypatch.setattr(grpo.rollout.session, "can_decode_by_graph", lambda model: False)
    one_by_one = sampled()
    assert_equal(by_graph, one_by_one)
    for completion in by_graph:
        drawn = completion.segments[1]
        assert (drawn.kept_ids is None) == ("greedy" in settings or settings == {"records_routing": True})
        assert "records_routing" not in settings or len(drawn.routing[:-1].unique()) > 2  # the last token was not fed


def test_log_probs_are_the_trainers_bit_for_bit_with_an_adapter_on_the_router():
    model, prompts = adapted_model(["router", "v_proj"]), [Prompt(i, list(range(5 + i, 12 + 90 * i)), {}) for i in range(4)]
    sampler = Sampler(model, [1], max_batch=6, seed=3, shares_prompts=True)
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=150, temperature=0.7), step=0, num_samples=3)
    for max_tokens in (100_000, 500):
        assert_trainers_bits(model, completions, shares_prompts=True, max_tokens=max_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_log_probs_of_a_base_that_trains_are_the_trainers_bit_for_bit_after_every_update(dtype):
    model, prompts = load_model(FIXTURES / "tiny_bf16", device="cuda", dtype=dtype), [
        Prompt(i, list(range(5 + i, 12 + 17 * i)), {}) for i in range(6)]
    set_full_training(model)
    sampler, before = Sampler(model, [1], max_batch=5, seed=3, shares_prompts=True), None
    for _ in range(2):
        completions = sampler.generate(prompts, SamplingParams(max_new_tokens=100, temperature=0.7), step=0, num_samples=3)
        assert sampler._decoder._graphs and contents(completions) != before
        assert_trainers_bits(model, completions, shares_prompts=True, max_tokens=300)
        before = contents(completions)
        with torch.no_grad():  # in place, as the optimizer's
            for parameter in model.trainable_parameters().values():
                parameter.mul_(1.05)


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 20, "min_p": 0.05}, {"records_routing": True},
                                      {"top_p": 0.9, "records_routing": True}], ids=str)
def test_log_probs_over_kept_sets_and_recorded_experts_are_the_trainers_bit_for_bit(settings):
    model, prompts = adapted_model(), [Prompt(i, list(range(5 + i, 12 + 17 * i)), {}) for i in range(5)]
    sampler = Sampler(model, [1], max_batch=6, seed=3, shares_prompts=True)
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=60, temperature=0.7, **settings), step=0, num_samples=3)
    assert_trainers_bits(model, completions, shares_prompts=True, max_tokens=400)


def test_greedy_log_probs_are_the_trainers_bit_for_bit_and_its_tokens_the_most_likely():
    model, prompts = adapted_model(), [Prompt(i, list(range(5 + i, 12 + 17 * i)), {}) for i in range(5)]
    sampler = Sampler(model, [1], max_batch=4, seed=3)
    completions = sampler.generate(prompts, SamplingParams(max_new_tokens=60, temperature=0.7, greedy=True), step=0,
                                   num_samples=1)
    assert_trainers_bits(model, completions, shares_prompts=False, temperature=1.0)
    for completion in completions:
        ids = completion.prompt.token_ids + completion.completion_ids
        logits = model.logits(torch.tensor(ids, device="cuda"), torch.tensor([0, len(ids)]))
        best = logits[len(completion.prompt.token_ids) - 1:-1].max(-1).values
        drawn = logits[len(completion.prompt.token_ids) - 1:-1].gather(1, torch.tensor(completion.completion_ids).cuda()[:, None])
        assert (best - drawn.squeeze(1)).max() <= 1e-4  # of equal hidden states; logits() adds products in another order


def test_an_update_of_the_adapter_shows_in_the_next_rollout():
    model, prompts = adapted_model(), [Prompt(0, [5, 6, 7], {})]
    sampler = Sampler(model, [], max_batch=4, seed=3)
    sample = partial(sampler.generate, prompts, SamplingParams(max_new_tokens=20), step=0, num_samples=4)
    before = [c.completion_ids for c in sample()]
    assert before == [c.completion_ids for c in sample()]
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            if name.endswith("lora_B"):
                parameter.mul_(-3.0)
    assert before != [c.completion_ids for c in sample()]


def contents(completions):
    return [(c.prompt.id, c.sample, c.finish_reason, c.completion_ids, c.segments[1].log_probs) for c in completions]


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_preempted_completions_have_the_trainers_log_probs_bit_for_bit(shares_prompts):
    model = adapted_model()
    prompts = [Prompt(i, list(range(5 + i, 12 + 17 * i)), {}) for i in range(6)]
    params, settings = SamplingParams(max_new_tokens=150, temperature=0.7), {"step": 2, "num_samples": 3}
    make = partial(Sampler, model, [1], max_batch=18, seed=3, shares_prompts=shares_prompts)
    expected = make().generate(prompts, params, **settings)
    num_bytes = 18 * slot_bytes(model.config, model.dtype, max_len=256) + 10 * page_bytes(model.config, model.dtype)
    sampler = make(cache_gb=num_bytes / 1e9)
    completions = sampler.generate(prompts, params, **settings)
    assert sampler.last_stats.num_preemptions > 0 and contents(completions) == contents(expected)
    assert_trainers_bits(model, completions, shares_prompts=shares_prompts)


@pytest.mark.parametrize("shares_prompts", [False, True])
@pytest.mark.parametrize("max_prefill_tokens", [64, 100])
def test_prompts_and_completions_prefilled_in_chunks_have_the_trainers_log_probs_bit_for_bit(shares_prompts, max_prefill_tokens):
    model = adapted_model()
    prompts = [Prompt(i, [5 + (7 * k + 3 * i) % 200 for k in range(length)], {})
               for i, length in enumerate([63, 64, 65, 200, 300])]
    params, settings = SamplingParams(max_new_tokens=150, temperature=0.7), {"step": 2, "num_samples": 3}
    make = partial(Sampler, model, [1], max_batch=8, seed=3, shares_prompts=shares_prompts)
    expected = make().generate(prompts, params, **settings)
    num_bytes = 9 * slot_bytes(model.config, model.dtype, max_len=512) + 10 * page_bytes(model.config, model.dtype)
    for cache_gb in (None, num_bytes / 1e9):
        sampler = make(max_prefill_tokens=max_prefill_tokens, cache_gb=cache_gb)
        completions = sampler.generate(prompts, params, **settings)
        assert contents(completions) == contents(expected)
        assert (sampler.last_stats.num_preemptions > 0) == (cache_gb is not None)
    assert_trainers_bits(model, completions, shares_prompts=shares_prompts)


@pytest.mark.parametrize("shares_prompts", [False, True])
def test_rows_that_park_have_the_trainers_log_probs_bit_for_bit_however_they_go_on(shares_prompts):
    """Replies shorter and longer than a window and than a prefill; graphs of whole steps; pages kept, given up, taken again."""
    model = adapted_model()
    prompts = [Prompt(i, [5 + (7 * k + 3 * i) % 200 for k in range(length)], {}) for i, length in enumerate([63, 64, 130, 20])]
    settings = {"park_ids": tuple(range(40, 48)), "stop_ids": [1], "num_samples": 3, "max_new_tokens": 250, "temperature": 0.7,
                "shares_prompts": shares_prompts, "sync_steps": None}

    def reply(completion):
        length = [1, 3, 40, 90][(completion.prompt.id + completion.sample + len(completion.segments)) % 4]
        return [100 + (11 * k + completion.sample) % 200 for k in range(length)]

    expected, _ = converse(model, prompts, reply=reply, **settings)
    assert_trainers_bits(model, expected, shares_prompts=shares_prompts)
    lengths = [len(segment.token_ids) for completion in expected for segment in completion.segments if segment.source == "env"]
    assert len(lengths) > 12 and max(lengths) == 90
    num_bytes = 13 * slot_bytes(model.config, model.dtype, max_len=512) + 9 * page_bytes(model.config, model.dtype)
    for changes in ({"max_batch": 1}, {"max_batch": 5, "delay": 6}, {"max_prefill_tokens": 64}, {"cache_gb": num_bytes / 1e9},
                    {"cache_gb": num_bytes / 1e9, "delay": 12, "max_prefill_tokens": 100}, {"sync_steps": 1}):
        completions, stats = converse(model, prompts, reply=reply, **settings | changes)
        assert [segments_of(c) for c in completions] == [segments_of(c) for c in expected], changes
        assert stats.num_preemptions > 0 or "cache_gb" not in changes


def segments_of(completion):
    return completion.finish_reason, [(part.source, part.token_ids, part.log_probs) for part in completion.segments]


@pytest.mark.parametrize("bounds", [[0, 1], [0, 23, 70], [0, 211, 512]], ids=str)
def test_a_prefill_of_few_tokens_leaves_the_bits_of_others(monkeypatch, bounds):
    model, results = adapted_model(), []
    tokens = (torch.arange(bounds[-1], device="cuda") * 37 + 5) % 380
    for most in (512, 0):
        monkeypatch.setattr(kernels.device, "MAX_FEW_ROWS", most)
        cache = model.new_cache(2, 512)
        assert cache.reserve(0, 512) and cache.reserve(1, 512)
        chunks = [PrefillChunk(slot, 0, end - first) for slot, (first, end) in enumerate(zip(bounds, bounds[1:]))]
        hidden = model.prefill(tokens, chunks, cache)
        results.append([hidden, *(tensor.clone() for tensor in (*cache.keys, *cache.values))])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results)) and results[0][0].any()


@pytest.mark.parametrize("prefix_len", [0, 70])
def test_one_launch_for_all_chunks_gives_the_bits_of_one_for_each(monkeypatch, prefix_len):
    """And so those of whole sequences, also where a chunk holds the prompt's end."""
    model, results, bounds = adapted_model(), [], [(0, 5), (130, 300), (60, 163), (7, 200)]
    tokens = (torch.arange(4 * 300, device="cuda").view(4, 300) * 37 + 5) % 380
    for most in (512, 0):
        monkeypatch.setattr(models.gpt_oss, "MAX_FEW_ROWS", most)
        cache = model.new_cache(4, 512)
        for slot, (start, end) in enumerate(bounds):
            assert cache.reserve(slot, end)
            if start:
                model.prefill(tokens[slot, :start], [PrefillChunk(slot, 0, start, prefix_len)], cache)
        chunks = [PrefillChunk(slot, start, end, prefix_len) for slot, (start, end) in enumerate(bounds)]
        hidden = model.prefill(torch.cat([tokens[slot, start:end] for slot, start, end, _ in chunks]), chunks, cache)
        results.append([hidden, *(tensor.clone() for tensor in (*cache.keys, *cache.values))])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results)) and results[0][0].any()


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("shares_prompts", [False, True])
def test_prefills_by_a_graph_give_the_bits_of_launches(shares_prompts, records):
    """Of sequences that begin, go on and hold a prompt's end, 65 to 128 tokens of them together; the first is not captured."""
    model = adapted_model()
    caches = [model.new_cache(3, 512) for _ in range(2)]
    decoder = Decoder(model, caches[0], max_rows=3, stop_ids=[], counts_prompts_apart=shares_prompts)
    for slot in range(3):
        assert all(cache.reserve(slot, 300) for cache in caches)
    for number, spans in enumerate([[(0, 0, 100)], [(1, 0, 20), (0, 100, 180)], [(2, 0, 128)], [(1, 20, 90), (2, 128, 140)],
                                    [(0, 180, 250), (2, 140, 141), (1, 90, 135)]]):
        chunks = [PrefillChunk(*span, 110 if shares_prompts else 0) for span in spans]
        tokens = torch.cat([torch.arange(start, end) * (37 + slot) % 380 for slot, start, end in spans])
        record = RoutingRecord(len(tokens), model.config, "cuda")
        expected = model.prefill(tokens.cuda(), chunks, caches[1], record=record)
        hidden, experts = decoder.prefill(tokens, chunks, records=records)
        assert torch.equal(hidden, expected) and hidden.any(), number
        assert torch.equal(experts, record.indices) if records else experts is None
        assert len(decoder._graphs) == min(number, 1)
        for ours, theirs in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values)):
            assert torch.equal(ours, theirs)


def test_steps_between_syncs_change_nothing_and_graphs_serve_later_rollouts():
    model, prompts = adapted_model(), [Prompt(i, list(range(5 + i, 12 + 9 * i)), {}) for i in range(4)]
    sampler = Sampler(model, [1, 7, 30], max_batch=6, seed=3)
    sample = partial(sampler.generate, prompts, SamplingParams(max_new_tokens=60), step=2, num_samples=4)
    sampler.sync_steps = 1
    expected = contents(sample())
    decoder = sampler._decoder
    graphs = dict(decoder._graphs)
    for sync_steps in (None, 3, 64):
        sampler.sync_steps = sync_steps
        assert contents(sample()) == expected
    assert sampler._decoder is decoder and {key: decoder._graphs[key] for key in graphs} == graphs
    with model.adapter_disabled():
        assert contents(sample()) != expected
    assert contents(sample()) == expected
    sampler.offload()
    assert contents(sample()) == expected


def test_graphs_of_a_rollout_serve_the_next_one_after_an_update_of_the_adapter():
    model, prompts = adapted_model(), [Prompt(i, list(range(5 + i, 12 + 9 * i)), {}) for i in range(4)]
    sampler, found = Sampler(model, [1], max_batch=6, seed=3), []
    for _ in range(2):
        completions = sampler.generate(prompts, SamplingParams(max_new_tokens=40, temperature=0.7), step=0, num_samples=2)
        assert_trainers_bits(model, completions, shares_prompts=False)
        found.append((contents(completions), set(map(id, sampler._decoder._graphs.values()))))
        with torch.no_grad():  # in place, as an optimizer does
            for parameter in model.trainable_parameters().values():
                parameter.mul_(-1.5)
    assert found[0][0] != found[1][0] and found[0][1] & found[1][1]


def test_offload_gives_the_memory_back():
    model, prompts = adapted_model(), [Prompt(0, [5, 6, 7], {})]
    sampler = Sampler(model, [], max_batch=4, seed=3)
    sample = partial(sampler.generate, prompts, SamplingParams(max_new_tokens=20), step=0, num_samples=4)
    sizes = []
    for _ in range(4):
        sample()
        sampler.offload()
        sizes.append(torch.cuda.memory_reserved())
    assert sizes[1:] == sizes[1:2] * 3, sizes


def test_a_run_trains_on_cuda(tmp_path):
    (tmp_path / "reward.py").write_text(
        "def even(completions, completion_ids, **columns):\n"
        "    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]\n"
    )
    command = [
        sys.executable, "-m", "grpo.train", "+experiment=smoke", "device=cuda", "wandb.mode=disabled", "name=gpu",
        f"output_dir={tmp_path}", "warmup=null", "env=dataset", "env.path=tests/fixtures/arithmetic.jsonl",
        "env.held_out_fraction=0.25", "env.match=none", "env.answer_key=null", "model.tokenizer=tests/fixtures/tokenizer_compact",
        f'env.rewards=[{{fn: "{tmp_path}/reward.py:even"}}]',
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "gpu/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "sampling/log_prob_diff/max" in line]
    assert len(steps) == 2 and all(line["sampling/log_prob_diff/max"] <= 5e-5 for line in steps), steps
    assert all(line["grad_norm"] > 0 for line in steps)
