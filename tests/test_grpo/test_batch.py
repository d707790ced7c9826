"""Packing: masks from sources, normalisers, kept sets; micro-batches and minibatches."""

import pytest
import torch

from grpo.batch import (
    Completion,
    Prompt,
    RolloutBatch,
    Segment,
    even_rows_of_micro_batches,
    micro_batches,
    minibatches,
    pack,
)


def completion(prompt_ids, *turns, sample=0, finish_reason="stop") -> Completion:
    """Turns alternate: ids of the policy, ids of the environment, ..."""
    segments = [Segment(prompt_ids, "prompt")]
    for i, ids in enumerate(turns):
        segments.append(Segment(ids, "env") if i % 2 else Segment(ids, "policy", [-0.1 * token for token in ids]))
    return Completion(Prompt(0, prompt_ids, {}), sample, segments, finish_reason)


def three() -> list[Completion]:
    return [completion([1, 2], [3, 4, 5]), completion([6], [7], [8, 9], [10, 11]), completion([12, 13, 14], [15])]


def of_lengths(*lengths: int) -> RolloutBatch:
    """One prompt token each, so `length - 1` policy tokens; token ids tell sequences apart."""
    return pack([completion([100 * row], [100 * row + i for i in range(1, length)]) for row, length in enumerate(lengths)],
                [float(row) for row in range(len(lengths))])


def test_only_tokens_that_the_policy_sampled_are_trained_on():
    batch = pack(three(), [0.5, -1.0, 2.0])
    assert batch.tokens.tolist() == list(range(1, 16))
    assert batch.cu_seqlens.tolist() == [0, 5, 11, 15] and batch.cu_seqlens.dtype == torch.int32
    assert batch.tokens[batch.loss_mask].tolist() == [3, 4, 5, 7, 10, 11, 15]  # 8 and 9 are the environment's
    assert batch.advantages.tolist() == [0.5] * 5 + [-1.0] * 6 + [2.0] * 4
    assert batch.sequence_ids.tolist() == [0] * 5 + [1] * 6 + [2] * 4
    assert batch.sequence_lengths.tolist() == [3, 3, 1]
    assert (batch.num_policy_tokens, batch.num_sequences, batch.num_rows) == (7, 3, 3)
    expected = [-0.1 * token if sampled else 0.0 for token, sampled in zip(batch.tokens.tolist(), batch.loss_mask.tolist())]
    assert batch.sampler_log_probs.tolist() == pytest.approx(expected)
    assert batch.kept is None and batch.old_log_probs is None and batch.ref_log_probs is None


def sets(*kept):
    return [torch.tensor(ids, dtype=torch.int32) for ids in kept]


def test_the_record_of_a_completion():
    record = three()[1]
    assert record.completion_ids == [7, 8, 9, 10, 11]
    assert record.num_policy_tokens == 3 and record.num_tokens == 6


def test_kept_sets_stand_at_the_tokens_they_were_sampled_from():
    filtered = completion([1], [2, 3])
    filtered.segments[1].kept_ids = sets([2, 9], [])
    other = completion([4, 5], [6], [7], [8])
    other.segments[3].kept_ids = sets([8, 1, 0])
    batch = pack([filtered, other], [0.0, 0.0])
    rows = {t: batch.kept.ids[batch.kept.offsets[t]:batch.kept.offsets[t + 1]].tolist() for t in range(len(batch.tokens))}
    assert {t: ids for t, ids in rows.items() if ids} == {1: [2, 9], 7: [8, 1, 0]}
    assert len(batch.kept.offsets) == 9 and batch.kept.ids.dtype == torch.int32

    swapped = batch.select([1, 0])
    rows = {t: swapped.kept.ids[swapped.kept.offsets[t]:swapped.kept.offsets[t + 1]].tolist() for t in range(8)}
    assert {t: ids for t, ids in rows.items() if ids} == {4: [8, 1, 0], 6: [2, 9]}
    assert swapped.tokens.tolist() == [4, 5, 6, 7, 8, 1, 2, 3]


def test_selected_sequences_keep_the_step_s_normalisers():
    batch = pack(three(), [0.5, -1.0, 2.0])
    batch.old_log_probs = torch.arange(15.0)
    part = batch.select([2, 0])
    assert part.tokens.tolist() == [12, 13, 14, 15, 1, 2, 3, 4, 5]
    assert part.cu_seqlens.tolist() == [0, 4, 9] and part.cu_seqlens.dtype == torch.int32
    assert part.sequence_ids.tolist() == [2] * 4 + [0] * 5 and part.sequence_lengths.tolist() == [3, 3, 1]
    assert part.advantages.tolist() == [2.0] * 4 + [0.5] * 5
    assert part.old_log_probs.tolist() == [11, 12, 13, 14, 0, 1, 2, 3, 4] and part.ref_log_probs is None
    assert part.tokens[part.loss_mask].tolist() == [15, 3, 4, 5]
    assert part.sampler_log_probs[part.loss_mask].tolist() == pytest.approx([-1.5, -0.3, -0.4, -0.5])
    assert (part.num_policy_tokens, part.num_sequences, part.num_rows) == (7, 3, 2)


@pytest.mark.parametrize("max_tokens, num_batches", [(9, 4), (10, 4), (17, 2), (18, 2), (34, 1), (1000, 1)])
def test_micro_batches_hold_every_sequence_once_within_the_budget(max_tokens, num_batches):
    lengths = [3, 9, 2, 7, 5, 8]  # 34 tokens
    batch = of_lengths(*lengths)
    parts = micro_batches(batch, max_tokens)
    assert all(len(part.tokens) <= max_tokens for part in parts) and len(parts) == num_batches
    rows = [int(part.tokens[start]) // 100 for part in parts for start in part.cu_seqlens[:-1]]
    assert sorted(rows) == list(range(6))
    for part in parts:
        assert (part.num_policy_tokens, part.num_sequences) == (28, 6)
        for start, end in zip(part.cu_seqlens, part.cu_seqlens[1:]):
            row = int(part.tokens[start]) // 100
            assert part.tokens[start:end].tolist() == [100 * row + i for i in range(lengths[row])]
            assert part.advantages[start:end].tolist() == [row] * lengths[row]
            assert part.loss_mask[start:end].tolist() == [False] + [True] * (lengths[row] - 1)


def test_the_longest_sequences_are_placed_first():
    parts = micro_batches(of_lengths(3, 9, 2, 7, 5, 8), 12)
    # 9 + 3, 8 + 2, 7 + 5
    assert [[int(part.tokens[start]) // 100 for start in part.cu_seqlens[:-1]] for part in parts] == [[0, 1], [2, 5], [3, 4]]


def test_a_sequence_over_the_budget_is_a_micro_batch_of_its_own():
    parts = micro_batches(of_lengths(3, 9, 5, 20), 8)
    assert [len(part.tokens) for part in parts] == [20, 9, 8]


def test_minibatches_partition_the_sequences_with_normalisers_of_their_own():
    batch = of_lengths(2, 3, 4, 5, 6, 7, 8)
    parts = minibatches(batch, 3, seed=0)
    rows = [sorted(int(part.tokens[start]) // 100 for start in part.cu_seqlens[:-1]) for part in parts]
    assert sorted(sum(rows, [])) == list(range(7)) and sorted(map(len, rows)) == [2, 2, 3]
    for part, chosen in zip(parts, rows):
        assert part.num_sequences == len(chosen)
        assert part.num_policy_tokens == sum(row + 1 for row in chosen) == int(part.loss_mask.sum())
    again, other = (minibatches(batch, 3, seed=seed) for seed in (0, 1))
    assert [part.tokens.tolist() for part in again] == [part.tokens.tolist() for part in parts]
    assert [part.tokens.tolist() for part in other] != [part.tokens.tolist() for part in parts]


def test_prompts_are_counted_of_the_optimizer_step_where_a_group_is_spread_over_two():
    batch = pack([completion([prompt], [sample + 5]) for prompt in range(3) for sample in range(2)], [0.0] * 6)
    parts = minibatches(batch, 2, seed=0)
    assert batch.num_prompts == 3
    prompts = [{int(part.tokens[start]) for start in part.cu_seqlens[:-1]} for part in parts]
    assert [part.num_prompts for part in parts] == [len(own) for own in prompts] and sum(map(len, prompts)) > 3
    assert [micro.num_prompts for micro in micro_batches(parts[0], 4)] == [parts[0].num_prompts] * 2


def test_one_minibatch_is_the_batch_and_more_than_sequences_are_one_each():
    batch = of_lengths(2, 3)
    assert minibatches(batch, 1, seed=0) == [batch]
    assert [part.num_sequences for part in minibatches(batch, 5, seed=0)] == [1, 1]


def test_moving_to_a_device_leaves_what_plans_a_forward_on_the_host():
    filtered = completion([1], [2])
    filtered.segments[1].kept_ids = sets([2])
    batch = pack([filtered], [1.0])
    batch.ref_log_probs = torch.zeros(2)
    moved = batch.to(torch.device("meta"))
    tensors = [moved.tokens, moved.loss_mask, moved.sampler_log_probs, moved.advantages, moved.sequence_ids,
               moved.sequence_lengths, moved.kept.ids, moved.kept.offsets, moved.ref_log_probs]
    assert all(tensor.is_meta for tensor in tensors) and moved.num_policy_tokens == 1 and moved.old_log_probs is None
    assert moved.cu_seqlens.tolist() == [0, 2] and moved.host_mask.tolist() == [False, True]


def test_the_mask_on_the_host_is_that_of_the_tokens_in_every_part():
    batch = of_lengths(4, 3, 5)
    for part in (batch, *micro_batches(batch, 7), *micro_batches(batch, 9, share_prompts=True), batch.select([2, 0])):
        assert torch.equal(part.host_mask, part.loss_mask) and part.host_mask.any()


@pytest.mark.parametrize("segment, message", [
    (Segment([3], "assistant", [-1.0]), "source is 'assistant'; allowed: prompt, policy, env"),
    (Segment([3, 4], "policy", [-1.0]), "a policy segment of 2 tokens has 1 log_probs"),
    (Segment([3, 4], "policy"), "a policy segment of 2 tokens has 0 log_probs"),
    (Segment([3, 4], "policy", [-1.0, -1.0], sets([3])), "a policy segment of 2 tokens has 1 kept_ids"),
])
def test_a_segment_that_does_not_add_up_is_refused(segment, message):
    record = Completion(Prompt(0, [1], {}), 0, [Segment([1], "prompt"), segment], "stop")
    with pytest.raises(ValueError, match=message):
        pack([record], [0.0])


def test_nothing_to_pack_and_a_missing_advantage_are_refused():
    with pytest.raises(ValueError, match="no completions"):
        pack([], [])
    with pytest.raises(ValueError, match="3 completions but 2 advantages"):
        pack(three(), [0.0, 1.0])


# ---- completions of several sequences, with user turns


def with_user_turn(prompt_id: int, start: int) -> Completion:
    """A prompt of 2 tokens and 3 sampled ones, of which a user's turn keeps the last; then 2 tokens more and 1 sampled."""
    first = completion([prompt_id, prompt_id], [start, start + 1, start + 2])
    later = [Segment([prompt_id, prompt_id, start + 2, start + 3, start + 4], "prompt", num_repeated=3),
             Segment([start + 5], "policy", [-7.0])]
    return Completion(Prompt(prompt_id, [prompt_id, prompt_id], {}), 0, [*first.segments, *later], "stop")


def test_a_completion_with_a_user_turn_has_two_sequences_and_is_one_completion():
    long = with_user_turn(1, 10)
    assert long.completion_ids == [10, 11, 12, 13, 14, 15]
    assert long.is_policy == [True] * 3 + [False] * 2 + [True] and long.num_policy_tokens == 4
    batch = pack([completion([5], [6]), long], [1.0, 2.0])
    assert batch.tokens.tolist() == [5, 6, 1, 1, 10, 11, 12, 1, 1, 12, 13, 14, 15]
    assert batch.cu_seqlens.tolist() == [0, 2, 7, 13] and batch.owners == [0, 1, 1]
    assert batch.tokens[batch.loss_mask].tolist() == [6, 10, 11, 12, 15]  # each sampled token once
    assert batch.sequence_ids.tolist() == [0] * 2 + [1] * 11 and batch.advantages.tolist() == [1.0] * 2 + [2.0] * 11
    assert batch.sequence_lengths.tolist() == [1, 4]
    assert (batch.num_sequences, batch.num_prompts, batch.num_rows, batch.num_policy_tokens) == (2, 2, 3, 5)
    assert batch.prompts == [(0, 1), (1, 2), (2, 5)]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_its_sequences_stay_together_in_micro_batches_and_minibatches(share_prompts):
    batch = pack([with_user_turn(index // 2, 10 * index) for index in range(6)], [0.0] * 6)
    for part in micro_batches(batch, 22, share_prompts=share_prompts):  # 11 tokens each, 9 with a prompt that is there
        rows = part.cu_seqlens.diff().tolist()
        own = [owner for owner, prefix in zip(part.owners, part.prefixes or [-1] * len(rows), strict=True)
               if not share_prompts or prefix >= 0]
        assert sorted(own) == sorted([*dict.fromkeys(own)] * 2) and len(set(own)) == 2
        assert int(part.host_mask.sum()) == 8
    parts = minibatches(batch, 3, seed=0)
    assert [part.num_sequences for part in parts] == [2, 2, 2] and [part.num_policy_tokens for part in parts] == [8, 8, 8]
    assert sorted(owner for part in parts for owner in part.owners) == sorted([*range(6)] * 2)
    assert [part.num_prompts for part in parts] == [len({owner // 2 for owner in part.owners}) for part in parts]


@pytest.mark.parametrize(
    "max_tokens, rows",
    [
        (15, [[0, 3], [1, 2, 4]]),  # 9 + 4 and 7 + 5 + 3 tokens
        (14, [[0], [1], [2], [3, 4]]),  # two do not suffice: four
        (5, [[0], [1], [2], [3], [4]]),  # no more than there are
    ],
)
def test_even_micro_batches_are_as_many_as_a_multiple_and_of_about_equal_length(max_tokens, rows):
    batch = of_lengths(9, 7, 5, 4, 3)
    assert even_rows_of_micro_batches(batch, max_tokens, share_prompts=False, multiple=2) == rows


@pytest.mark.parametrize("multiple, rows", [(2, [[0, 1], [2, 3]]), (4, [[0], [1], [2], [3]]), (3, [[0], [1], [2, 3]])])
def test_even_micro_batches_split_a_group_only_if_there_are_too_few_groups(multiple, rows):
    prompts = [[1] * 6, [2] * 5]
    batch = pack([completion(prompts[i // 2], [3] * (4 - i), sample=i % 2) for i in range(4)], [0.0] * 4)
    assert even_rows_of_micro_batches(batch, 100, share_prompts=True, multiple=multiple) == rows
