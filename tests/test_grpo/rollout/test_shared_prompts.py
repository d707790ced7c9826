"""A prompt that stands once for its group: the layout by hand, and every number of a step as without sharing."""

import json
import random
from functools import partial

import pytest
import torch

from grpo.batch import Completion, Prompt, Segment, micro_batches, minibatches, pack
from grpo.losses import NORMALIZERS, LossInputs, ppo, reduce_stats, token_stats
from models.config import GptOssConfig
from models.gpt_oss import GptOss

CLIP = dict(clip_low=0.2, clip_high=0.28)
LOSSES = {normalizer: partial(ppo, normalizer=normalizer, **CLIP) for normalizer in NORMALIZERS}


def completion(prompt_id, prompt_ids, *turns, sample=0) -> Completion:
    """Turns alternate: ids of the policy, ids of the environment, ..."""
    segments = [Segment(prompt_ids, "prompt")]
    for i, ids in enumerate(turns):
        segments.append(Segment(ids, "env") if i % 2 else Segment(ids, "policy", [-0.1 * token for token in ids]))
    return Completion(Prompt(prompt_id, prompt_ids, {}), sample, segments, "stop")


def of_groups(*groups: tuple[int, list[int]]):
    """Groups of a prompt's length and completions' lengths; token ids tell prompts (100 g + i) and completions apart."""
    completions = [completion(g, [100 * g + i for i in range(prompt_len)],
                              [1000 * (g + 1) + 100 * k + i for i in range(length)], sample=k)
                   for g, (prompt_len, lengths) in enumerate(groups) for k, length in enumerate(lengths)]
    return pack(completions, [float(i) for i in range(len(completions))])


def sequences(batch) -> list[tuple[list[int], int]]:
    bounds = batch.cu_seqlens.tolist()
    prefixes = batch.prefixes or [-1] * batch.num_rows
    return [(batch.tokens[start:end].tolist(), prefix) for start, end, prefix in zip(bounds, bounds[1:], prefixes)]


def test_a_group_is_its_prompt_once_and_then_its_completions():
    batch = pack([completion(0, [1, 2], [3, 4, 5]), completion(0, [1, 2], [7], [8, 9], [10], sample=1)], [0.5, -1.0])
    shared, = micro_batches(batch, 100, share_prompts=True)
    assert sequences(shared) == [([1, 2], -1), ([3, 4, 5], 0), ([7, 8, 9, 10], 0)]
    assert shared.tokens[shared.loss_mask].tolist() == [3, 4, 5, 7, 10]  # 8 and 9 are the environment's
    assert shared.advantages[shared.loss_mask].tolist() == [0.5, 0.5, 0.5, -1.0, -1.0]
    assert shared.sampler_log_probs[shared.loss_mask].tolist() == pytest.approx([-0.3, -0.4, -0.5, -0.7, -1.0])
    assert shared.sequence_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert shared.sequence_lengths.tolist() == [3, 2]
    assert shared.token_index.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10]  # in [1 2 3 4 5] [1 2 7 8 9 10]
    assert (shared.num_policy_tokens, shared.num_sequences, shared.num_prompts) == (5, 2, 1)


def test_a_lone_completion_continues_its_prompt_too_so_that_no_split_changes_its_rounding():
    shared, = micro_batches(of_groups((2, [3]), (2, [1, 1])), 100, share_prompts=True)
    assert sequences(shared) == [([0, 1], -1), ([1000, 1001, 1002], 0), ([100, 101], -1), ([2000], 2), ([2100], 2)]


def test_a_group_is_kept_in_one_micro_batch_where_it_fits():
    batch = of_groups((5, [4, 4, 4]), (5, [4, 4, 4]), (5, [2]))  # 17, 17 and 7 tokens
    parts = micro_batches(batch, 24, share_prompts=True)
    assert [len(part.tokens) for part in parts] == [24, 17]
    assert [part.prefixes for part in parts] == [[-1, 0, 0, 0, -1, 4], [-1, 0, 0, 0]]


def test_a_group_over_the_budget_repeats_its_prompt():
    batch = of_groups((5, [4, 3, 3, 2]))  # 17 tokens together
    parts = micro_batches(batch, 12, share_prompts=True)
    # 4 + 3 fill a micro-batch beside the prompt, 3 + 2 the next
    assert [sequences(part) for part in parts] == [
        [([0, 1, 2, 3, 4], -1), ([1000, 1001, 1002, 1003], 0), ([1100, 1101, 1102], 0)],
        [([0, 1, 2, 3, 4], -1), ([1200, 1201, 1202], 0), ([1300, 1301], 0)]]


def test_a_sequence_over_the_budget_is_alone_behind_its_prompt():
    for prompt_len in (5, 8, 20):  # a prompt alone may exceed the budget
        parts = micro_batches(of_groups((prompt_len, [4, 3]), (2, [1])), 8, share_prompts=True)
        assert [len(part.tokens) for part in parts] == [prompt_len + 4, prompt_len + 3, 3]
        assert [part.prefixes for part in parts] == [[-1, 0]] * 3


def test_a_group_scattered_over_the_batch_stands_together():
    first, second = [completion(0, [1], [k], sample=k) for k in (2, 3)], [completion(1, [5], [k], sample=k) for k in (6, 7)]
    shared, = micro_batches(pack([first[0], second[0], second[1], first[1]], [0.0] * 4), 100, share_prompts=True)
    assert sequences(shared) == [([1], -1), ([2], 0), ([3], 0), ([5], -1), ([6], 3), ([7], 3)]


def test_prompts_of_one_id_but_other_tokens_are_not_shared():
    shared, = micro_batches(pack([completion(0, [1], [2]), completion(0, [3], [4])], [0.0, 0.0]), 100, share_prompts=True)
    assert shared.prefixes == [-1, 0, -1, 2] and shared.tokens.tolist() == [1, 2, 3, 4]


def test_minibatches_hold_the_same_completions_with_and_without_sharing():
    batch = of_groups((4, [3, 2, 5, 1]), (3, [2, 2, 6, 4]))
    for part in minibatches(batch, 3, seed=1):
        shared, = micro_batches(part, 100, share_prompts=True)
        assert sorted(shared.tokens[shared.loss_mask].tolist()) == sorted(part.tokens[part.loss_mask].tolist())
        assert (shared.num_policy_tokens, shared.num_sequences, shared.num_prompts) == (
            part.num_policy_tokens, part.num_sequences, part.num_prompts)


def tiny_model() -> GptOss:
    config = GptOssConfig(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
                          layer_types=["sliding_attention", "full_attention"], max_position_embeddings=64)
    model = GptOss(config, dtype=torch.float32, device="cpu", experts="bf16")
    model.init_weights(seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "lm_head.weight":
                parameter.mul_(15.0)
            elif name.endswith("sinks"):
                parameter.add_(0.5)
    return model.requires_grad_()


def random_batch():
    """Four groups of one to five completions, some with tokens of an environment, kept sets on some, old log-probs."""
    rng = random.Random(3)

    def draw(count):
        return [rng.randrange(11) for _ in range(count)]

    completions = []
    for group, size in enumerate((3, 1, 5, 2)):
        prompt = Prompt(group, draw(2 + 3 * group), {})
        for sample in range(size):
            segments = [Segment(prompt.token_ids, "prompt")]
            for turn in range(1 + sample % 2):
                ids = draw(rng.randint(1, 7))
                kept = [[token, *{(token + 3) % 11, (token + 5) % 11}] if sample == 1 else [] for token in ids]
                segments += ([Segment(draw(3), "env")] if turn else []) + [
                    Segment(ids, "policy", [-2.0 + rng.gauss(0, 1) for _ in ids],
                            [torch.tensor(row, dtype=torch.int32) for row in kept])]
            completions.append(Completion(prompt, sample, segments, "stop"))
    batch = pack(completions, [rng.gauss(0, 1) for _ in completions])
    batch.old_log_probs = torch.where(batch.loss_mask, batch.sampler_log_probs - 0.1, 0.0)
    return batch


def step(model, loss_fn, micros):
    """The gradient of a step and its statistics."""
    model.zero_grad()
    stats = []
    for micro in micros:
        log_probs, entropy = model.log_probs(micro.tokens, micro.cu_seqlens, temperature=0.9, mask=micro.loss_mask,
                                             kept=micro.kept, prefixes=micro.prefixes)
        inputs = LossInputs.of(micro, log_probs, entropy, old_log_probs=micro.old_log_probs, max_new_tokens=7)
        loss, loss_stats = loss_fn(inputs)
        stats.append({**token_stats(inputs), **loss_stats})
        loss.backward()
    return (torch.cat([parameter.grad.flatten() for parameter in model.parameters()]),
            reduce_stats(stats, num_updates=1))


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_and_statistics_of_a_step_are_those_without_sharing(name):
    model, batch = tiny_model(), random_batch()
    expected, expected_stats = step(model, LOSSES[name], [batch])
    assert expected_stats["clip_ratio/low"] > 0 and expected_stats["clip_ratio/high"] > 0
    for max_tokens, num_micros in ((1000, 1), (60, 2), (28, 4)):
        micros = micro_batches(batch, max_tokens, share_prompts=True)
        assert len(micros) >= num_micros and any(micro.prefixes for micro in micros)
        gradient, stats = step(model, LOSSES[name], micros)
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), max_tokens
        assert stats == pytest.approx(expected_stats, rel=1e-5, abs=1e-6), max_tokens


def test_a_run_with_shared_prompts_has_the_metrics_of_one_without(entry_points, spread_folder, tmp_path):
    steps = {}
    for shares in ("false", "true"):
        result = entry_points.run(
            "grpo.train", "+experiment=smoke", "steps=3", f"name=shares-{shares}", f"output_dir={tmp_path}",
            "env._target_=spread.Spread", f"optim.share_prompts={shares}", "optim.minibatches=2", "optim.epochs=2",
            "optim.max_tokens=120", "eval.every=0", "eval.at_start=false", "eval.at_end=false", path=(spread_folder,),
            writes_report=False)
        assert result.code == 0, result.err
        lines = (tmp_path / f"shares-{shares}/metrics.jsonl").read_text().splitlines()
        steps[shares] = [row for row in map(json.loads, lines) if "reward" in row]
    assert len(steps["true"]) == 3
    for whole, shared in zip(steps["false"], steps["true"]):
        own = {name for name in whole if name.startswith(("time/", "memory/", "update/")) or name == "tokens_per_s"}
        assert shared.keys() == whole.keys()
        for name in whole.keys() - own:
            assert shared[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name
        assert whole["update/frac_tokens_shared"] == 0
        assert shared["update/tokens"] == pytest.approx(
            whole["update/tokens"] * (1 - shared["update/frac_tokens_shared"]))
        assert 0.02 < shared["update/frac_tokens_shared"] < 0.5
