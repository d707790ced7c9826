"""A rehearsal finds every kernel that a run of gpt-oss-20b compiles, whatever the lengths of its prompts and completions."""

import random
from collections import Counter

import pytest
import torch

import kernels.device
from grpo.batch import Prompt, micro_batches, pack
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from kernels.ahead import Recording
from kernels.device import Gpu
from models.config import GptOssConfig
from models.decoder import BUCKETS, PlainDraw
from models.gpt_oss import GptOss
from models.lora import LoraConfig, attach_lora
from models.rehearsal import Rehearsal, build, gpu_here, rehearse, rehearse_rollout, rehearse_training, rehearse_update

pytestmark = pytest.mark.slow

H200, A100 = Gpu(90, 132), Gpu(80, 108)
SAMPLED, GREEDY = PlainDraw(1.0, False), PlainDraw(1.0, True)


def plan_of(num_experts: int = 32, **settings) -> Rehearsal:
    config = GptOssConfig(
        vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=4, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, num_local_experts=num_experts, num_experts_per_tok=4, sliding_window=128)
    lora = LoraConfig(16, 32.0, ["q_proj", "k_proj", "v_proj", "o_proj", "experts"])
    return Rehearsal(**dict(config=config, dtype=torch.bfloat16, experts="mxfp4", lora=lora, activation_checkpointing=True,
                            max_rows=64, max_len=4096, draws=[SAMPLED, GREEDY], filters=True, shares_prompts=True,
                            scores=True) | settings)


def rehearsed(plan: Rehearsal, gpu: Gpu):
    """The recording of a rehearsal, and its model."""
    recording = Recording(gpu)
    with recording.on():
        model = build(plan)
        rehearse(model, plan)
    return recording, model


def names(keys) -> Counter:
    return Counter(key[0].fn.__name__ for key in keys)


@pytest.mark.parametrize(
    "gpu, settings",
    [
        (H200, {}),
        (H200, {"shares_prompts": False, "max_rows": 300, "experts": "bf16", "full_kl": True}),
        (H200, {"experts": "bf16", "lora": None, "num_experts": 128, "full_kl": True}),
        (A100, {"experts": "nf4", "num_experts": 128}),
    ],
)
def test_no_length_that_was_not_rehearsed_compiles_a_kernel(gpu, settings):
    plan = plan_of(**settings)
    recording, model = rehearsed(plan, gpu)
    before, draw = set(recording.launches), random.Random(0)
    few = [draw.randrange(1, 513) for _ in range(16)] + [3, 5, 7, 13, 17, 65, 129, 511]
    many = [draw.randrange(513, 20_000) for _ in range(6)] + [513, 1024, 1025]
    trained = [draw.randrange(8, 20_000) for _ in range(6)] + [9, 128, 129, 513, 1024, 1025, 2049]
    plan.max_len = 32_768
    with recording.on():
        rehearse_rollout(model, plan, few=few, many=many)
        rehearse_training(model, plan, lengths=trained)
        for scratch_bytes in (1 << 29, 300_000_000, 1 << 26):  # for the dequantised weights, as memory allows
            rehearse_training(model, plan, lengths=[700, 3001], scratch_bytes=scratch_bytes)
    assert not names(set(recording.launches) - before)


def test_the_kernels_of_a_rehearsal_are_those_counted_by_hand():
    """Of a layer without window and one with it, on a GPU whose launches for at most 1,024 rows overlap."""
    recording, _ = rehearsed(plan_of(full_kl=True, entropy_loss=True), H200)
    found = Counter(variant.name for variant in recording.variants())
    assert found["_norm_kernel"] == 2 * 2  # with a residual or without; overlapping or not
    assert found["_rotate_and_write_kernel"] == 2  # rings, pages
    assert found["_decode_kernel"] == 5  # a window; none, with shared prefixes, by few parts, by many or neither
    assert found["_attend_chunks_kernel"] == 2 * 2 * 2  # a window or none; few sections or many; overlapping or not
    assert found["_prefix_kernel"] == found["_add_parts_kernel"] == 1
    assert found["_dq_kernel"] == found["_dkv_kernel"] == 2  # a window, none
    assert found["_advance_kernel"] == found["_chunk_kernel"] == found["_row_kernel"] == 1
    # tokens and choices of a tile: 16 and 16, 32 or 64 (up to 4, 8 and 16 tokens), 32 and 128, 64 and 256, 128 and 256
    assert found["_route_few_kernel"] == 6
    assert found["_kl_partials_kernel"] == found["_kl_reduce_kernel"] == found["_kl_gradient_kernel"] == 1
    assert found["_logits_gradient_kernel"] == 1  # the entropy's


def test_one_row_of_many_tokens_is_rehearsed_with_few_parts_and_with_many():
    recording = Recording(H200)
    plan = plan_of(max_rows=1, max_len=131_072)
    with recording.on():
        rehearse_rollout(build(plan), plan, few=(), many=(600,))
    found = [variant for variant in recording.variants() if variant.name == "_decode_kernel"]
    assert sorted(variant.options["num_stages"] for variant in found) == [2, 3, 3, 4]  # many parts, few, no parts, a window


@pytest.mark.parametrize("settings", [{}, *({"lora": None, "experts": "bf16", "weights": weights}
                                            for weights in ("stochastic", "compensated"))])
def test_the_kernel_of_an_update_with_8_bit_moments_is_rehearsed(settings):
    plan, recording = plan_of(moments="int8", **settings), Recording(H200)
    with recording.on():
        rehearse_update(build(plan), plan)
    assert Counter(variant.name for variant in recording.variants()) == {"_adamw8_kernel": 1}


def test_every_number_of_rows_that_a_batch_can_have_is_rehearsed():
    """Buckets up to that of the largest batch: 40 rows run as 48."""
    counts = []

    class Watched:
        def rehearse(self, num_rows, draw, *, longest):
            counts.append(num_rows)

    plan = plan_of(max_rows=40)
    with pytest.MonkeyPatch.context() as patch, Recording(H200).on():
        patch.setattr("models.rehearsal.Decoder", lambda *_, **__: Watched())
        rehearse_rollout(build(plan), plan, few=(), many=(600,))
    assert sorted(set(counts)) == [bucket for bucket in BUCKETS if bucket <= 48]


@pytest.mark.gpu
@pytest.mark.parametrize("shares_prompts", [False, True])
def test_a_real_rollout_and_update_launch_nothing_that_was_not_rehearsed(shares_prompts):
    """With prompts and completions of many lengths, on this GPU."""
    lora = LoraConfig(8, 16.0)
    config = GptOssConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=192, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, num_local_experts=8, num_experts_per_tok=4, sliding_window=128)
    model = GptOss(config, dtype=torch.bfloat16, device="cuda", experts="bf16", activation_checkpointing=True)
    model.init_weights(0)
    attach_lora(model, lora, seed=0)
    kernels.device._COMPILED.clear()
    draw = random.Random(0)
    prompts = [Prompt(i, [draw.randrange(2048) for _ in range(draw.randrange(3, 900))], {}) for i in range(11)]
    sampler = Sampler(model, [1, 2, 3], max_batch=24, seed=0, shares_prompts=shares_prompts)
    for step, settings in enumerate(({}, {"greedy": True})):
        completions = sampler.generate(prompts, SamplingParams(max_new_tokens=200, **settings), step=step, num_samples=3)
    batch = pack(completions, [1.0] * len(completions)).to(model.device)
    for micro in micro_batches(batch, 4000, share_prompts=shares_prompts):
        log_probs, _ = model.log_probs(micro.tokens, micro.cu_seqlens, temperature=1.0, mask=micro.host_mask,
                                       prefixes=micro.prefixes)
        log_probs.sum().backward()
    torch.cuda.synchronize()
    plan = Rehearsal(config, torch.bfloat16, "bf16", lora, True, 24, 2048, [SAMPLED, GREEDY], False, shares_prompts, False)
    recording, _ = rehearsed(plan, gpu_here(model.device))
    known = {(id(kernel), *rest) for kernel, *rest in recording.launches}
    launched = {(kernel, *rest) for kernel, _, *rest in kernels.device._COMPILED}
    assert len(launched) > 50 and [key for key in launched if key not in known] == []
