"""The cache: full layers and rings, slots, copies, and decoding past the window against full recomputation."""

import pytest
import torch

from models.config import GptOssConfig
from models.gpt_oss import GptOss
from models.kv_cache import KVCache

WINDOW = 4


@pytest.fixture(scope="module")
def config() -> GptOssConfig:
    return GptOssConfig.from_architecture({
        "vocab_size": 30, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW})


@pytest.fixture(scope="module")
def model(config) -> GptOss:
    policy = GptOss(config, dtype=torch.float32, device="cpu", experts="bf16")
    policy.init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if name == "lm_head.weight":
            parameter.mul_(20.0)
        elif parameter.ndim == 1 and "norm" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return policy


def make_cache(config, *, num_slots=3, max_len=10, dtype=torch.float32) -> KVCache:
    return KVCache(config, num_slots=num_slots, max_len=max_len, device=torch.device("cpu"), dtype=dtype)


def test_windowed_layers_hold_a_window_and_full_layers_everything(config):
    cache = make_cache(config, dtype=torch.bfloat16)
    assert cache.lengths == [WINDOW, 10, WINDOW]
    # keys and values, 3 slots, 2 heads of 8, 2 bytes
    assert cache.num_bytes == 2 * 3 * (WINDOW + 10 + WINDOW) * 2 * 8 * 2
    assert make_cache(config, max_len=3).lengths == [3, 3, 3]


def test_a_ring_keeps_position_p_at_p_modulo_its_length(config):
    cache = make_cache(config)
    for position in range(7):
        k = torch.full((1, 2, 8), float(position))
        for layer in range(3):
            cache.write(layer, k, -k, torch.tensor([1]), torch.tensor([position]))
    assert cache.keys[0][1, :, 0, 0].tolist() == [4, 5, 6, 3]
    assert cache.values[2][1, :, 1, 7].tolist() == [-4, -5, -6, -3]
    assert cache.keys[1][1, :, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0, 0]
    assert not any(keys[[0, 2]].any() for keys in cache.keys)


@pytest.mark.parametrize("num_tokens, copied", [(None, 10), (6, 6)])
def test_a_copied_slot_holds_what_its_source_holds(config, num_tokens, copied):
    cache = make_cache(config)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    before = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    cache.copy_slot(1, torch.tensor([2, 0]), num_tokens)
    for old, new in zip(before, (*cache.keys, *cache.values)):
        count = min(copied, old.shape[1])
        for slot in (0, 2):
            assert torch.equal(new[slot, :count], old[1, :count]) and torch.equal(new[slot, count:], old[slot, count:])
        assert torch.equal(new[1], old[1])


@torch.no_grad()
@pytest.mark.parametrize("prompt_lengths", [[1, 3, 4], [5, 2, 9], [4, 4, 4]])
def test_decoding_past_the_window_equals_full_recomputation(model, prompt_lengths):
    generator = torch.Generator().manual_seed(3)
    total = 14  # more than three times around the ring
    rows = torch.randint(0, 30, (3, total), generator=generator)
    expected = [model.logits(row, torch.tensor([0, total])) for row in rows]
    cache = model.new_cache(num_slots=5, max_len=total)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))  # what an earlier sequence left behind must not matter
    slots = torch.tensor([4, 0, 2])
    prompts = [row[:length] for row, length in zip(rows, prompt_lengths)]
    cu_seqlens = torch.tensor([0, *prompt_lengths]).cumsum(0).int()
    logits = model.prefill(torch.cat(prompts), cu_seqlens, cache, slots)
    for row, length in enumerate(prompt_lengths):
        torch.testing.assert_close(logits[row], expected[row][length - 1], rtol=1e-5, atol=2e-5)
    positions = torch.tensor(prompt_lengths)
    while (alive := (positions < total).nonzero().flatten()).numel():
        tokens = rows[alive, positions[alive]]
        logits = model.decode_step(tokens, positions[alive], cache, slots[alive])
        for row, result in zip(alive.tolist(), logits):
            torch.testing.assert_close(result, expected[row][positions[row]], rtol=1e-5, atol=2e-5)
        positions[alive] += 1


@torch.no_grad()
def test_copies_of_a_prompt_go_on_independently(model):
    prompt = torch.randint(0, 30, (6,), generator=torch.Generator().manual_seed(4))
    cache = model.new_cache(num_slots=3, max_len=12)
    model.prefill(prompt, torch.tensor([0, 6], dtype=torch.int32), cache, torch.tensor([0]))
    cache.copy_slot(0, torch.tensor([1, 2]), 6)
    ends = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    for step in range(4):
        logits = model.decode_step(ends[:, step], torch.full((3,), 6 + step), cache, torch.arange(3))
    for row, end in enumerate(ends):
        expected = model.logits(torch.cat((prompt, end)), torch.tensor([0, 10]))[-1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=2e-5)


def test_what_does_not_fit_is_refused(model):
    cache = model.new_cache(num_slots=1, max_len=5)
    slot = torch.tensor([0])
    with pytest.raises(ValueError, match="a prompt of 6 tokens does not fit a cache of 5"):
        model.prefill(torch.zeros(6, dtype=torch.int64), torch.tensor([0, 6]), cache, slot)
    with pytest.raises(ValueError, match="position 5 does not fit a cache of 5"):
        model.decode_step(torch.tensor([1]), torch.tensor([5]), cache, slot)
