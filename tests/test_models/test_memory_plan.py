"""Bytes against numbers worked out by hand, and placements: what moves first, what never gets slower, where nothing fits."""

from dataclasses import replace

import pytest
import torch

from models.config import released
from models.host_store import pinned_bytes
from models.memory_plan import (
    GPU_SPECS,
    DoesNotFit,
    Needs,
    cache_bytes,
    embedding_parameters,
    has_plan,
    least_limit,
    lora_parameters,
    optimizer_needs,
    plan,
    rest_parameters,
    state_bytes,
    table,
    trained_sizes,
)

B20, B120 = released("openai/gpt-oss-20b"), released("openai/gpt-oss-120b")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
HOST = 120_000_000_000
# LoRA r = 8 on attention and experts, 8 completions of one prompt, 2,048 tokens each
RUN = Needs(B20, "mxfp4", num_prompts=1, group_size=8, max_rows=64, prompt_len=148, new_len=1900, lora_rank=8,
            lora_targets=(*ATTENTION, "experts"), max_tokens=8192, shares_prompts=True)
RUN_120B = replace(RUN, config=B120)


def planned(needs: Needs, gb: float, *, gpu: str = "H200", host_bytes: int = HOST):
    return plan(needs, GPU_SPECS[gpu], limit=int(1e9 * gb), host_bytes=host_bytes)


def test_bytes_of_experts():
    # 32 experts x (2880 x 5760 + 2880 x 2880) weights: 17 bytes of MXFP4 for 32 of them, 9 of NF4 for 16, 2 of bf16 for each
    assert RUN.expert_layer_bytes == 796_262_400 * 17 // 32
    assert 24 * RUN.expert_layer_bytes == 10_152_345_600
    assert replace(RUN, experts="nf4").expert_layer_bytes == 796_262_400 * 9 // 16
    assert replace(RUN, experts="bf16").expert_layer_bytes == 2 * 796_262_400
    assert 36 * RUN_120B.expert_layer_bytes == 60_914_073_600


def test_bytes_of_everything_else():
    # a layer: qkv 2881 x 5120, o 4097 x 2880, 64 sinks, 2 norms, router 2881 x 32, biases 32 x 8640; the last norm
    layer = 2881 * 5120 + 4097 * 2880 + 64 + 2 * 2880 + 2881 * 32 + 32 * 8640
    assert rest_parameters(B20) == 24 * layer + 2880
    assert embedding_parameters(B20) == 201_088 * 2880
    assert lora_parameters(B20, 8, RUN.lora_targets) == 24 * (32 * 8 * 14_400 + 8 * 20_736)
    assert lora_parameters(B20, 4, ("router",)) == 24 * 4 * (2880 + 32)
    assert state_bytes(RUN) == 8 * 92_454_912  # two fp32 moments
    full = replace(RUN, trains_all=True, lora_rank=0, experts="bf16", moments="int8", weights="stochastic")
    assert sum(trained_sizes(full)[1]) == 20_914_757_184
    assert optimizer_needs(full).gradients == 2 * 20_914_757_184
    assert state_bytes(full) == pytest.approx(2 * 20_914_757_184, rel=0.04)  # and an absmax for each 256
    assert [pinned_bytes(size) for size in (0, 1, 5, 64, 65)] == [0, 1, 8, 64, 128]


def test_bytes_of_the_cache():
    # keys and values of a token in a layer are 2 x 8 x 64 x 2 bytes; 12 layers keep whole pages of 64 tokens, 12 keep 128 tokens
    long = replace(RUN, num_prompts=1, group_size=2, prompt_len=1, new_len=1023)
    row = 12 * 2048 * 1024 + 12 * 2048 * 128
    assert cache_bytes(long, 2) == 2 * row
    assert cache_bytes(long, 1) == 2 * row  # and the slot of the prompt that the other completion waits for
    assert cache_bytes(replace(long, new_len=1024), 2) - 2 * row == 2 * 12 * 2048 * 64
    assert cache_bytes(replace(long, new_len=62), 2) == 2 * (12 * 2048 * 64 + 12 * 2048 * 63)


def test_micro_batches_hold_what_the_settings_allow_and_one_sequence_at_least():
    assert RUN.micro_tokens == 8192
    assert replace(RUN, max_tokens=100_000).micro_tokens == 148 + 8 * 1900
    assert replace(RUN, max_tokens=100_000, shares_prompts=False).micro_tokens == 8 * 2048
    assert replace(RUN, max_tokens=1000).micro_tokens == 2048
    assert replace(RUN, max_tokens=100_000, num_prompts=4, minibatches=2).micro_tokens == 2 * (148 + 8 * 1900)


def test_an_update_in_the_backward_keeps_the_gradients_of_a_layer():
    at_once = replace(RUN, max_tokens=100_000, in_backward=True)
    assert planned(at_once, 140).update.lines["gradients"] == 369_819_648 // 24
    assert planned(replace(at_once, max_tokens=8192), 140).update.lines["gradients"] == 25 * 369_819_648 // 24


def test_ranks_that_divide_the_model_hold_their_parts_and_the_layers_that_are_gathered():
    full = replace(RUN, trains_all=True, lora_rank=0, experts="bf16", moments="int8", weights="stochastic", num_ranks=2)
    found = planned(replace(full, num_shards=2), 140)
    matrix, experts, layer = 1_158_266_880, 1_592_524_800, 2 * (rest_parameters(B20) // 24)
    sampling, update = found.sampling.lines, found.update.lines
    assert sampling["experts"] == 24 * experts and update["experts"] == 12 * experts
    assert sampling["head"] == matrix and "gathered weights" not in sampling
    assert update["head"] == matrix // 2
    assert update["gathered weights"] == pytest.approx(3 * (experts + layer) + 2 * matrix, rel=1e-6)
    assert update["gradients"] == 20_914_757_184 + 3 * (2 * 20_914_757_184 // 24)  # its part; a layer's, one sent, one received
    assert sampling["optimizer"] == update["optimizer"] == state_bytes(full) // 2
    limits = [least_limit(replace(full, num_shards=number), GPU_SPECS["H200"], host_bytes=0) for number in (1, 2, 4, 8)]
    assert limits[0] > 130e9 and 95e9 > limits[1] > limits[2] > limits[3] > 45e9  # each holds the whole model while sampling


def test_with_room_for_everything_nothing_moves():
    found = planned(RUN, 140)
    assert (found.embedding_on_host, found.state_on_host, found.host_bytes) == (False, False, 0)
    assert (found.sampling.num_streamed, found.update.num_streamed, found.num_rows) == (0, 0, 8)
    lines = found.update.lines
    assert lines["experts"] == 10_152_345_600 and lines["head"] == lines["embedding"] == 1_158_266_880
    assert lines["LoRA"] == 369_819_648 and lines["gradients"] == 25 * lines["LoRA"] // 24
    assert lines["optimizer"] == 2 * lines["LoRA"] == 4 * lines["LoRA for decoding"]
    assert found.update.peak == sum(lines.values()) < 40e9
    assert found.sampling.lines["cache"] == cache_bytes(RUN, 8) and "gradients" not in found.sampling.lines


@pytest.mark.parametrize("settings", [{"lora_rank": 0}, {"dtype": torch.float16}, {"lora_targets": ("router",)}])
def test_an_adapter_that_decoding_does_not_copy_takes_no_more(settings):
    assert planned(replace(RUN, **settings), 140).update.lines["LoRA for decoding"] == 0


def test_20b_within_15_gb_streams_in_the_update_only():
    found = planned(RUN, 15)
    assert found.embedding_on_host and found.state_on_host and found.num_rows == 8
    assert found.sampling.num_streamed == 0 and 0 < found.update.num_streamed <= 8
    assert max(found.sampling.peak, found.update.peak) <= 15e9
    assert found.host["embedding"] == 1 << 31 and found.host["optimizer"] == 2 * 369_819_648
    assert found.host["experts"] >= found.update.num_streamed * 423_014_400


@pytest.mark.parametrize("needs, gb", [
    (RUN, 10), (RUN, 8), (RUN_120B, 80), (RUN_120B, 48), (RUN_120B, 24),
    (replace(RUN, group_size=16, new_len=876, max_rows=16), 15),
    (replace(RUN, group_size=2, prompt_len=50, new_len=718, lora_rank=4, lora_targets=ATTENTION), 14),
    (replace(RUN, group_size=1, prompt_len=1072, new_len=130_000, max_tokens=131_072), 60)])
def test_runs_that_must_fit_do_and_stay_within_their_limit(needs, gb):
    found = planned(needs, gb)
    assert max(found.sampling.peak, found.update.peak) <= 1e9 * gb and found.host_bytes <= HOST
    assert found.sampling.num_streamed <= found.update.num_streamed


@pytest.mark.parametrize("needs", [RUN, RUN_120B, replace(RUN, num_prompts=16), replace(RUN, experts="nf4"),
                                   replace(RUN_120B, num_prompts=8, max_rows=128)])
def test_more_memory_never_plans_slower(needs):
    least = least_limit(needs, GPU_SPECS["H200"], host_bytes=HOST) / 1e9
    plans = [planned(needs, least + 1.7 * step) for step in range(50)]
    seconds, streamed = [found.seconds for found in plans], [found.update.num_streamed for found in plans]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]
    assert streamed == sorted(streamed, reverse=True) and streamed[0] == needs.config.num_hidden_layers and streamed[-1] == 0


def test_longer_rows_take_more_for_parts_of_attention():
    # 8 rows of 1,024 tokens have 4 parts of 256 keys and one that a prefix ends, of 2,048 (as of 4,096) 16 and one; a part has
    # 64 heads of 64 + 2 numbers
    short, long = (planned(replace(RUN, new_len=length - RUN.prompt_len), 140).sampling.lines["prefill and logits"]
                   for length in (1024, 2048))
    assert long - short == 8 * (17 - 5) * 64 * 66 * 4


def test_rows_wait_before_decoding_streams():
    # 16 prompts: all 128 completions at once want 7 GB more than there is
    found = planned(replace(RUN, num_prompts=16, max_rows=128), 16)
    assert 16 < found.num_rows < 128 and found.sampling.num_streamed == 0
    assert planned(replace(RUN, num_prompts=16, max_rows=128), 10).sampling.num_streamed > 0


def test_little_host_memory_keeps_things_on_the_gpu():
    found = planned(RUN, 40, host_bytes=0)
    assert found.host_bytes == 0 and not found.embedding_on_host
    with pytest.raises(DoesNotFit):
        planned(RUN, 14, host_bytes=0)
    few = planned(RUN, 16.2, host_bytes=5_000_000_000)
    assert few.host_bytes <= 5_000_000_000 and few.update.num_streamed <= 2


@pytest.mark.parametrize("needs", [
    RUN, RUN_120B, replace(RUN, lora_targets=ATTENTION), replace(RUN, max_tokens=0), replace(RUN, recomputes=False),
    replace(RUN, group_size=1, prompt_len=1072, new_len=130_000, max_tokens=131_072), replace(RUN, experts="bf16")])
def test_half_a_gigabyte_below_the_least_is_refused(needs):
    gpu = GPU_SPECS["H200"]
    least = least_limit(needs, gpu, host_bytes=HOST)
    assert has_plan(needs, gpu, limit=least, host_bytes=HOST)
    for below in (500_000_000, 10_000_000):
        with pytest.raises(DoesNotFit):
            plan(needs, gpu, limit=least - below, host_bytes=HOST)


def test_gpus_that_share_experts_hold_and_update_half_each_and_stream_nothing():
    alone, shared = RUN_120B, replace(RUN_120B, num_sharers=2)
    assert 2 * shared.expert_layer_bytes == alone.expert_layer_bytes
    # r = 8: fp32 moments of attention's adapters, and of those of 64 experts
    assert state_bytes(shared) == 8 * 36 * 8 * (20_736 + 64 * 14_400)
    assert state_bytes(alone) == 8 * 36 * 8 * (20_736 + 128 * 14_400)
    found = planned(shared, 77, gpu="H100")
    for phase in (found.sampling, found.update):
        assert phase.num_streamed == 0 and phase.lines["experts"] == 30_457_036_800
        assert phase.lines["LoRA"] == 4 * 36 * 8 * (20_736 + 64 * 14_400)
        assert phase.lines["LoRA for decoding"] == phase.lines["LoRA"] // 2
    assert planned(alone, 36).update.num_streamed > 0
    with pytest.raises(DoesNotFit):
        planned(shared, 36)


def test_a_gpu_without_triton_products_has_scratch_while_it_decodes():
    without, with_them = (planned(RUN, 15.5, gpu=gpu).sampling.lines["prefill and logits"] for gpu in ("T4", "L4"))
    assert without - with_them == 32 * 5760 * 2880 * 2  # all of gate_up dequantised


def test_sampling_beside_the_update_counts_both_and_streams_nothing():
    both = replace(RUN, samples_beside=True)
    large, apart = planned(both, 100), planned(RUN, 100)
    copy = 4 * lora_parameters(B20, 8, RUN.lora_targets)
    for phase in (large.sampling, large.update):
        assert phase.lines["copy of what trains"] == copy and phase.lines["cache"] == apart.sampling.lines["cache"]
        assert phase.num_streamed == 0 and phase.peak <= large.limit
    many = [planned(replace(both, group_size=64), gb) for gb in (100, 18)]  # with less, fewer rows are decoded together
    assert 0 < many[1].num_rows < many[0].num_rows == 64 and many[1].update.peak <= 18e9 and many[1].samples_beside
    least = [least_limit(needs, GPU_SPECS["H200"], host_bytes=HOST) for needs in (RUN, both)]
    assert least[0] + 9e9 < least[1]  # where streaming is needed, both at once are refused
    assert not has_plan(both, GPU_SPECS["H200"], limit=least[1] - 10_000_000, host_bytes=HOST)


def test_the_table_has_a_line_for_all_that_takes_memory():
    found = planned(RUN, 15)
    text = table(found, RUN)
    for name, size in found.update.lines.items():
        assert not size or f"{name:<26}" in text
    assert "in all, of 15.00" in text and "rows decoded at once: 8" in text and "optimizer 0.74" in text
