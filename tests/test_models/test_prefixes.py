"""Sequences that continue a shared prompt against the same sequences packed whole."""


import pytest
import torch
from paths import FIXTURES

from models.formats.hugging_face import load_model
from models.gpt_oss import GptOss, KeptSets, previous_rows
from models.keys import PrefillChunk, chunk_plan, packed_positions
from models.lora import LoraConfig, attach_lora, set_full_training
from models.routing_record import RoutingRecord

NAMES = ("tiny_bf16", "tiny_mxfp4")  # full layers and layers with a window of 8 keys, sinks on both
# lengths of prompts and of their completions: longer and shorter than the window, a lone completion, one of a single token
GROUPS = [(19, [5, 12, 1, 9]), (3, [7]), (8, [8, 2]), (1, [4, 4, 10])]


def trained(name: str, **settings) -> GptOss:
    """The fixture with everything that can train training."""
    model = load_model(FIXTURES / name, device="cpu", dtype=torch.float32, **settings)
    if name == "tiny_bf16":
        set_full_training(model)
        return model
    attach_lora(model, LoraConfig(3, 6.0, ["q_proj", "k_proj", "v_proj", "o_proj", "router", "experts"], True, True), seed=1)
    for key, parameter in model.trainable_parameters().items():
        if key.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(key)))
    return model


class Layouts:
    """GROUPS with random tokens, packed whole and with every prompt once."""

    def __init__(self, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(5)
        whole, shared, prefixes, weights = [], [], [], []
        for prompt_len, lengths in GROUPS:
            prompt = torch.randint(0, vocab_size, (prompt_len,), generator=generator)
            parts = [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]
            weights += [torch.randn(length, generator=generator) for length in lengths]
            prefixes += [-1] + [len(shared)] * len(parts)
            shared += [prompt, *parts]
            whole += [torch.cat([prompt, part]) for part in parts]
        self.prefixes = prefixes
        self.whole, self.whole_bounds = torch.cat(whole), bounds(whole)
        self.shared, self.shared_bounds = torch.cat(shared), bounds(shared)
        self.weights = torch.cat(weights)  # of every completion token, in order
        prompt_lens = [prompt_len for prompt_len, lengths in GROUPS for _ in lengths]
        self.whole_mask = torch.cat([torch.arange(len(row)) >= length for row, length in zip(whole, prompt_lens)])
        self.shared_mask = torch.cat([torch.full((len(row),), prefix >= 0) for row, prefix in zip(shared, prefixes)])

    def log_probs(self, model, **settings):
        """Log-probs and entropy of the completion tokens, from either layout."""
        whole = model.log_probs(self.whole, self.whole_bounds, temperature=0.8, mask=self.whole_mask, **settings)
        shared = model.log_probs(self.shared, self.shared_bounds, temperature=0.8, mask=self.shared_mask,
                                 prefixes=self.prefixes, **settings)
        return [part[self.whole_mask] for part in whole], [part[self.shared_mask] for part in shared]


def bounds(rows) -> torch.Tensor:
    return torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_log_probs_and_entropy_are_those_of_whole_sequences(name):
    model = trained(name)
    layouts = Layouts(model.config.vocab_size)
    assert len(layouts.shared) == 31 + 62 and len(layouts.whole) == 62 + 4 * 19 + 3 + 2 * 8 + 3  # tokens
    for expected, actual in zip(*layouts.log_probs(model)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
        assert expected.std() > 0.5  # not a trivial agreement of constants


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_shared_prompt_gets_the_sum_of_its_completions_gradients(name, checkpointed):
    model = trained(name, activation_checkpointing=checkpointed)
    layouts = Layouts(model.config.vocab_size)
    gradients = []
    for side in (0, 1):
        model.zero_grad()
        chosen, _ = layouts.log_probs(model)[side]
        (chosen * layouts.weights).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in model.trainable_parameters().items()})
    for key, expected in gradients[0].items():
        assert expected.any(), key
        assert (gradients[1][key] - expected).abs().max() <= 2e-4 * expected.abs().max(), key


@torch.no_grad()
def test_the_first_token_of_a_completion_is_drawn_from_the_prompts_last_row():
    model = trained("tiny_bf16")
    tokens = torch.tensor([7, 8, 9, 20, 21, 30])  # a prompt of three tokens, completions of two and one
    chosen, _ = model.log_probs(tokens, torch.tensor([0, 3, 5, 6]), temperature=1.0, mask=torch.arange(6) >= 3,
                                prefixes=[-1, 0, 0])
    after_prompt = model.logits(tokens[:3], torch.tensor([0, 3]))[-1].log_softmax(-1)
    torch.testing.assert_close(chosen[[3, 5]], after_prompt[[20, 30]], rtol=0, atol=1e-5)


@torch.no_grad()
def test_kept_sets_stay_with_their_tokens():
    model = trained("tiny_bf16")
    layouts = Layouts(model.config.vocab_size)
    sets = []
    for tokens, mask in ((layouts.whole, layouts.whole_mask), (layouts.shared, layouts.shared_mask)):
        ids = torch.stack([tokens, (tokens + 1) % 500, (tokens + 40) % 500], dim=1)[mask]  # three ids a completion token
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (3 * mask).cumsum(0)])
        sets.append(KeptSets(ids.flatten().int(), offsets))
    whole, _ = model.log_probs(layouts.whole, layouts.whole_bounds, temperature=0.8, mask=layouts.whole_mask, kept=sets[0])
    shared, _ = model.log_probs(layouts.shared, layouts.shared_bounds, temperature=0.8, mask=layouts.shared_mask, kept=sets[1],
                                prefixes=layouts.prefixes)
    torch.testing.assert_close(shared[layouts.shared_mask], whole[layouts.whole_mask], rtol=0, atol=2e-5)


def test_positions_of_a_continuation_go_on_after_its_prompt():
    device = torch.device("cpu")
    assert packed_positions([0, 3, 5, 6, 8], device, [-1, 0, 0, -1]).tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert packed_positions([0, 2, 5], device, None).tolist() == [0, 1, 0, 1, 2]


def test_the_token_before_a_continuation_is_the_last_of_its_prompt():
    assert previous_rows([0, 3, 5, 6, 8], [-1, 0, 0, -1]).tolist() == [-1, 0, 1, 2, 3, 2, -1, 6]
    assert previous_rows([0, 2, 2, 4], None).tolist() == [-1, 0, -1, 2]  # the sequence without tokens has no first


def test_the_first_token_of_a_shared_prompt_has_no_log_prob():
    model = trained("tiny_bf16")
    with pytest.raises(AssertionError, match="first token"):
        model.log_probs(torch.arange(5), torch.tensor([0, 3, 5]), temperature=1.0, mask=torch.arange(5) != 1, prefixes=[-1, 0])


@torch.no_grad()
@pytest.mark.parametrize("prompt_len, lengths", [(3, 2), (19, 30), (1, 1)])
def test_a_prefill_of_a_prompt_and_its_continuation_is_that_of_the_whole_sequence(prompt_len, lengths):
    """The cache too, as the next tokens show; beside sequences that continue none."""
    model = load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    alone, prompt, continuation, last = (torch.randint(0, model.config.vocab_size, (length,), generator=generator)
                                         for length in (9, prompt_len, lengths, 2))
    results = []
    for prefix_len in (prompt_len, 0):
        cache = model.new_cache(3, 64)
        assert cache.reserve(0, 64) and cache.reserve(2, 64)
        chunks = [PrefillChunk(2, 0, 9), PrefillChunk(0, 0, prompt_len + lengths, prefix_len)]
        hidden = model.prefill(torch.cat([alone, prompt, continuation]), chunks, cache)
        logits = [model.head(hidden)]
        for offset, token in enumerate(last):
            positions = torch.tensor([9, prompt_len + lengths]) + offset
            logits.append(model.head(model.decode(token.repeat(2), positions, cache, torch.tensor([2, 0]))))
        results.append(torch.stack(logits))
    assert results[0].shape == (3, 2, model.config.vocab_size)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-5)
    assert results[0].std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("prefix_len", [0, 20, 75, 130])
@pytest.mark.parametrize("cuts", [[64, 128], [1, 2, 20, 75], [7, 76, 100, 129]])
@pytest.mark.parametrize("max_len", [160, 140])
def test_a_prefill_in_chunks_is_that_of_the_whole_sequence(cuts, prefix_len, max_len):
    """The cache too, as the next tokens show; its rings (8 entries) are those of an earlier sequence before."""
    model = load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (132,), generator=torch.Generator().manual_seed(2))
    prompt, last = tokens[:130], tokens[130:]
    results = []
    for bounds_of_chunks in ([0, *(cut for cut in cuts if cut < 130), 130], [0, 130]):
        cache = model.new_cache(3, max_len)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(float("nan"))
        assert cache.reserve(2, 1) and cache.reserve(1, 132)
        records = []
        for start, end in zip(bounds_of_chunks, bounds_of_chunks[1:]):
            records.append(RoutingRecord(end - start, model.config, "cpu"))
            chunk = PrefillChunk(1, start, end, prefix_len if len(bounds_of_chunks) > 2 else 0)
            hidden = model.prefill(prompt[start:end], [chunk], cache, record=records[-1])
        logits = [model.head(hidden)]
        for offset, token in enumerate(last):
            logits.append(model.head(model.decode(token[None], torch.tensor([130 + offset]), cache, torch.tensor([1]))))
        results.append((torch.cat(logits), torch.cat([record.indices for record in records])))
    (logits, experts), (expected, expected_experts) = results
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert torch.equal(experts, expected_experts) and expected.std() > 0.1


@pytest.mark.parametrize("prefix_len", [0, 50])
def test_chunks_of_several_sequences_give_what_each_gives_alone(prefix_len):
    """Shorter and longer than the rings (8 entries), after slots that hold nothing, less and more than those."""
    model = load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (3, 132), generator=torch.Generator().manual_seed(3))
    bounds = [(0, 5), (60, 63), (7, 130)]  # what each slot holds, and the end of its chunk
    results = []
    for together in (True, False):
        cache = model.new_cache(3, 160)
        chunks = [PrefillChunk(slot, start, end, prefix_len) for slot, (start, end) in enumerate(bounds)]
        for slot, start, _, _ in chunks:
            assert cache.reserve(slot, 132)
            if start:
                model.prefill(tokens[slot, :start], [PrefillChunk(slot, 0, start, prefix_len)], cache)
        parts = [tokens[slot, start:end] for slot, start, end, _ in chunks]
        calls = [(torch.cat(parts), chunks)] if together else [(part, [chunk]) for part, chunk in zip(parts, chunks)]
        logits = [model.head(torch.cat([model.prefill(*call, cache) for call in calls]))]
        ends = torch.tensor([end for _, end in bounds])
        logits.append(model.head(model.decode(tokens[torch.arange(3), ends], ends, cache, torch.arange(3))))
        results.append(torch.cat(logits))
    torch.testing.assert_close(*results, rtol=0, atol=2e-5)


def test_a_chunk_takes_whole_tiles_of_keys_counted_from_where_the_whole_sequence_counts_them():
    def plan(start, end, length, prefix_len=0):
        first, plan = chunk_plan(start, end, length, prefix_len)
        return first, plan.cu_seqlens, plan.prefixes, plan.first_query

    assert plan(0, 50, 128) == (0, [0, 50], None, 0)
    assert plan(256, 400, 10_000) == (0, [0, 400], None, 256)
    assert plan(256, 400, 128) == (128, [0, 272], None, 128)
    assert plan(300, 400, 100) == (192, [0, 208], None, 108)  # 200 and after are seen
    # a prompt of 250 tokens counted apart: a chunk of it, one that crosses its end, and chunks of the completion
    assert plan(200, 250, 128, 250) == (64, [0, 186], None, 136)
    assert plan(200, 300, 128, 250) == (64, [0, 186, 236], [-1, 0], 136)
    assert plan(300, 350, 128, 250) == (128, [0, 122, 222], [-1, 0], 172)
    assert plan(450, 500, 128, 250) == (314, [0, 186], None, 136)  # 250 + 64
    assert plan(450, 500, 10_000, 250) == (0, [0, 250, 500], [-1, 0], 450)
