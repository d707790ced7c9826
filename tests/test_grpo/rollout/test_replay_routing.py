"""Routing from the sampler through packing to the update."""

import copy
import json
import random

import pytest
import torch

from grpo.batch import Completion, Prompt, Segment, micro_batches, pack
from grpo.config import ConfigError
from grpo.configuration.launch import load_config
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from grpo.update import routing_metrics
from models.config import GptOssConfig
from models.gpt_oss import GptOss
from models.routing_record import RoutingReplay

NOT_RECORDED = 255
LAYERS, PER_TOKEN = 2, 2


@pytest.fixture(scope="module")
def model():
    config = GptOssConfig(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, num_local_experts=6, num_experts_per_tok=PER_TOKEN,
                          sliding_window=8, layer_types=["sliding_attention", "full_attention"], max_position_embeddings=64)
    policy = GptOss(config, dtype=torch.float32, device="cpu", experts="bf16")
    policy.init_weights(seed=0)
    return policy


def prompts(count=3):
    rng = random.Random(0)
    return [Prompt(i, [rng.randrange(40) for _ in range(3 + 4 * i)], {}) for i in range(count)]


def sample(model, *, max_batch, **settings):
    return Sampler(model, (3, 17), max_batch=max_batch, seed=7).generate(
        prompts(), SamplingParams(max_new_tokens=20, **settings), step=3, num_samples=4)


def routing_of(completion) -> torch.Tensor:
    return torch.cat([segment.routing for segment in completion.segments])


def own_choices(model, token_ids) -> torch.Tensor:
    """[tokens, L, A] int64: the experts of a forward of the whole sequence, read where each layer's router answers."""
    found, hooks = [], []
    for block in model.model.layers:
        hooks.append(block.mlp.router.register_forward_hook(lambda module, args, logits: found.append(logits.topk(PER_TOKEN)[1])))
    with torch.no_grad():
        model.logits(torch.tensor(token_ids), torch.tensor([0, len(token_ids)], dtype=torch.int32))
    for hook in hooks:
        hook.remove()
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("max_batch", [64, 3])
def test_completions_hold_the_experts_of_every_token_but_the_last(model, max_batch):
    completions = sample(model, max_batch=max_batch, records_routing=True)  # with 3, groups wait for slots
    assert len({len(completion.completion_ids) for completion in completions}) > 2
    for completion in completions:
        ids = completion.prompt.token_ids + completion.completion_ids
        recorded = routing_of(completion)
        assert torch.equal(recorded[:-1].long(), own_choices(model, ids)[:-1])
        assert (recorded[-1] == NOT_RECORDED).all()
        assert recorded.device.type == "cpu" and recorded.dtype == torch.uint8


def test_a_group_shares_its_prompt_s_record(model):
    first, second = sample(model, max_batch=64, records_routing=True)[:2]
    assert first.segments[0].routing is second.segments[0].routing


def test_recording_changes_no_completion_and_is_off_unless_asked_for(model):
    plain, recorded = sample(model, max_batch=64), sample(model, max_batch=64, records_routing=True)
    for ours, theirs in zip(plain, recorded, strict=True):
        assert ours.completion_ids == theirs.completion_ids
        assert ours.segments[1].log_probs == theirs.segments[1].log_probs
        assert all(segment.routing is None for segment in ours.segments)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_on_policy_the_replay_has_the_sampler_s_log_probs_and_no_flips(model, share_prompts):
    completions = sample(model, max_batch=64, records_routing=True)
    batch = pack(completions, [0.0] * len(completions))
    micros = micro_batches(batch, 120, share_prompts=share_prompts)
    replays = []
    for micro in micros:
        replays.append(RoutingReplay(micro.routing))
        with torch.no_grad():
            log_probs, _ = model.log_probs(micro.tokens, micro.cu_seqlens, temperature=1.0, mask=micro.loss_mask,
                                           prefixes=micro.prefixes, record=replays[-1])
        torch.testing.assert_close(log_probs, micro.sampler_log_probs, rtol=0, atol=1e-5)
    assert len(micros) > 1 and routing_metrics(replays) == {"routing/flips": 0.0}
    num_tokens = sum(len(micro.tokens) for micro in micros)
    num_unrecorded = len(completions)  # the last token of each
    assert sum(int(replay.num_choices) for replay in replays) == (num_tokens - num_unrecorded) * LAYERS * PER_TOKEN


def test_off_policy_the_replay_keeps_the_sampler_s_experts_and_the_router_its_gradient(model):
    completions = sample(model, max_batch=64, records_routing=True)
    batch, moved = pack(completions, [0.0] * len(completions)), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for block in moved.model.layers:
        block.mlp.router.weight.data += 0.3 * torch.randn(block.mlp.router.weight.shape, generator=generator)
        block.mlp.router.weight.requires_grad_()
    replay = RoutingReplay(batch.routing)
    log_probs, _ = moved.log_probs(batch.tokens, batch.cu_seqlens, temperature=1.0, mask=batch.loss_mask, record=replay)
    log_probs.sum().backward()
    assert routing_metrics([replay])["routing/flips"] > 0.05
    is_recorded = batch.routing[:, 0, 0] != NOT_RECORDED
    for layer, block in enumerate(moved.model.layers):
        taken = replay.choose(layer, None, slice(0, len(batch.tokens)))
        assert torch.equal(taken[is_recorded], batch.routing[is_recorded, layer].long())
        assert block.mlp.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("words, reason", [
    (["optim.minibatches=2", "rollout.replay_routing=true"], "already fixes the experts"),
    ([], "one update, which needs no replay")])
def test_replaying_the_trainer_s_routing_where_it_makes_no_sense_is_refused(words, reason):
    with pytest.raises(ConfigError, match=rf"(?m)^optim.replay_routing = True: .*{reason}"):
        load_config("train", ["name=x", "optim.replay_routing=true", *words])


def test_routing_flips_is_a_share_of_the_choices_of_all_micro_batches():
    first, second = RoutingReplay(torch.zeros(1, 1, 1)), RoutingReplay(torch.zeros(1, 1, 1))
    first.num_choices += 30
    first.num_flips += 3
    second.num_choices += 10
    second.num_flips += 1
    assert routing_metrics([first, second]) == {"routing/flips": 0.1}
    assert routing_metrics([]) == {}


def recorded_pair() -> list[Completion]:
    """One layer, one expert a token, the expert's number telling tokens apart; the second completion has no record of its
    environment's tokens."""
    def rows(*experts):
        return torch.tensor(experts, dtype=torch.uint8).view(-1, 1, 1)

    first = [Segment([1, 2], "prompt", routing=rows(10, 11)),
             Segment([3, 4], "policy", [-1.0, -1.0], None, rows(12, NOT_RECORDED))]
    second = [Segment([1, 2], "prompt", routing=rows(10, 11)), Segment([5], "policy", [-1.0], None, rows(13)),
              Segment([6, 7], "env"), Segment([8], "policy", [-1.0], None, rows(NOT_RECORDED))]
    return [Completion(Prompt(0, [1, 2], {}), i, segments, "stop") for i, segments in enumerate((first, second))]


def test_records_stand_at_their_tokens_in_a_batch_and_in_its_parts():
    batch = pack(recorded_pair(), [0.0, 0.0])
    none = NOT_RECORDED
    assert batch.routing.flatten().tolist() == [10, 11, 12, none, 10, 11, 13, none, none, none]
    assert batch.select([1]).routing.flatten().tolist() == [10, 11, 13, none, none, none]
    shared, = micro_batches(batch, 100, share_prompts=True)
    assert shared.routing.flatten().tolist() == [10, 11, 12, none, 13, none, none, none]
    assert batch.to(torch.device("meta")).routing.is_meta


def test_completions_without_records_pack_without_routing():
    assert pack([Completion(Prompt(0, [1], {}), 0, [Segment([1], "prompt"), Segment([2], "policy", [-1.0])], "stop")],
                [0.0]).routing is None


def test_a_record_of_another_length_than_its_segment_is_refused():
    segments = [Segment([1, 2], "prompt", routing=torch.zeros(3, 1, 1, dtype=torch.uint8)), Segment([3], "policy", [-1.0])]
    with pytest.raises(ValueError, match="a prompt segment of 2 tokens has 3 rows of routing"):
        pack([Completion(Prompt(0, [1, 2], {}), 0, segments, "stop")], [0.0])


def test_a_run_that_replays_on_policy_has_the_metrics_of_one_that_does_not(entry_points, spread_folder, tmp_path):
    steps = {}
    for replays in ("false", "true"):
        result = entry_points.run(
            "grpo.train", "+experiment=smoke", "steps=2", f"name=replay-{replays}", f"output_dir={tmp_path}",
            "env._target_=spread.Spread", f"rollout.replay_routing={replays}", "model.activation_checkpointing=true",
            "eval.every=0", "eval.at_start=false", "eval.at_end=false", path=(spread_folder,),
            writes_report=False)
        assert result.code == 0, result.err
        lines = (tmp_path / f"replay-{replays}/metrics.jsonl").read_text().splitlines()
        steps[replays] = [row for row in map(json.loads, lines) if "reward" in row]
    for free, replayed in zip(steps["false"], steps["true"], strict=True):
        assert replayed.pop("routing/flips") == 0 and "routing/flips" not in free
        for name in free:
            if not name.startswith(("time/", "memory/")) and name != "tokens_per_s":
                assert replayed[name] == pytest.approx(free[name], rel=1e-4, abs=1e-6), name
