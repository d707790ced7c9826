"""Attention of new tokens behind a cache, in one launch: in the interpreter bit for bit against the kernel for whole sequences,
and compiled. On a GPU: tests/test_grpo/test_gpu.py."""
import pytest
import torch
from aot import check_fits, compile_for

from kernels.attention.chunks import _attend_chunks_kernel, chunk_attention
from kernels.attention.packed import AttentionPlan, attention, blocks_for
from kernels.device import family_of
from models.config import GptOssConfig
from models.keys import PrefillChunk, PromptKeys, prompt_numbers
from models.kv_cache import KVCache

WIDTH = 16


@pytest.mark.interpreter
@pytest.mark.parametrize("prefix_len", [0, 55])
def test_a_query_gets_the_bits_that_it_gets_in_the_whole_sequence(prefix_len, poisoned):
    """On full layers and in rings, behind nothing, less and more than a ring, with idle rows; what no query sees is NaN."""
    config = GptOssConfig(vocab_size=9, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=WIDTH, num_local_experts=2, num_experts_per_tok=1, sliding_window=24)
    cache = KVCache(config, num_slots=4, max_len=140, num_pages=9, device=torch.device("cpu"), dtype=torch.float32)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    generator = torch.Generator().manual_seed(prefix_len)
    chunks = [PrefillChunk(2, 0, 5, prefix_len), PrefillChunk(0, 49, 70, prefix_len), PrefillChunk(3, 17, 19, prefix_len),
              PrefillChunk(1, 110, 132, prefix_len)]  # parts end among its keys: at 64 and 128, or 64 after its prefix
    heads = {"q": 2, "k": 1, "v": 1}
    sequences = [{name: torch.randn(chunk.end, count, WIDTH, generator=generator) for name, count in heads.items()}
                 for chunk in chunks]
    sinks = torch.tensor([float("-inf"), torch.randn(1, generator=generator).item()])  # the first head has none
    for chunk in chunks:
        assert cache.reserve(chunk.slot, chunk.end)
    cache.flush()
    num_rows = sum(chunk.end - chunk.start for chunk in chunks) + 7
    new = {name: torch.cat([sequence[name][chunk.start:] for chunk, sequence in zip(chunks, sequences)]
                           + [torch.zeros(7, count, WIDTH)]) for name, count in heads.items()}
    numbers = prompt_numbers(chunks, cache, num_rows=num_rows)
    sections = PromptKeys(numbers, lambda positions: None, cache, None, num_rows=num_rows, is_prefixed=prefix_len > 0).sections
    for layer, window in ((0, 24), (1, 0)):
        assert cache.is_paged[layer] == (window == 0)
        for chunk, sequence in zip(chunks, sequences):
            positions = torch.arange(max(chunk.start - cache.lengths[layer], 0), chunk.start)
            slots = torch.full_like(positions, chunk.slot)
            cache.write(layer, sequence["k"][positions], sequence["v"][positions], slots, positions)
        out = chunk_attention(*new.values(), cache.keys[layer], cache.values[layer], sinks, sections=sections,
                              is_prefixed=prefix_len > 0, window=window, scale=0.3, page_table=cache.table_of(layer))
        assert out.isfinite().all()
        start = 0
        for chunk, sequence in zip(chunks, sequences):
            bounds = [0, prefix_len, chunk.end] if 0 < prefix_len < chunk.end else [0, chunk.end]
            plan = AttentionPlan(bounds, prefixes=[-1, 0] if len(bounds) == 3 else None)
            whole = attention(**sequence, sinks=sinks, cu_seqlens=bounds, plan=plan, window=window, scale=0.3)
            assert torch.equal(out[start:start + chunk.end - chunk.start], whole[chunk.start:]), (layer, chunk)
            start += chunk.end - chunk.start


@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_the_kernel_fits_a_gpu(arch):
    blocks = blocks_for(family_of(arch), torch.bfloat16, windowed=False, width=64).forward
    pointers = {name: "*bf16" for name in ("q", "k", "v", "keys", "values", "sinks", "out")}
    pointers |= {"sections": "*i64", "page_table": "*i32"}
    strides = ("stride_q", "stride_k", "stride_v", "stride_out", "stride_slot", "num_heads")
    signature = pointers | dict.fromkeys((*strides, "num_rows", "pages_per_slot", "window"), "i32") | {"scale_log2": "fp32"}
    constants = {"STRIDE_KEY": 512, "SECTIONS": 16, "GROUP": 8, "WINDOWED": False, "PREFIXED": False, "RING": 0, "PAGE": 64,
                 "D": 64, "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys, "PART": 256, "OVERLAPS": arch == 90}
    resources = compile_for(_attend_chunks_kernel, signature, constants, arch, num_warps=blocks.warps, num_stages=blocks.stages,
                            divisible=(*pointers, *strides))
    check_fits(resources, arch, max_stack=56 if arch == 80 else 0)  # 14 addresses, kept over a loop
    assert resources.has_mma
