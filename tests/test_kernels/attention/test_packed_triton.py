"""The attention kernels: in the interpreter against goldens and the reference, ahead of time for every GPU, and on a GPU."""

import json

import pytest
import torch
from aot import ARCHITECTURES, check_fits, product_loops
from attention_problem import compile_kernel, eager, without_sinks
from paths import FIXTURES
from safetensors.torch import load_file

import kernels.attention.packed
from kernels.attention.packed import (
    AttentionBlocks,
    AttentionPlan,
    KernelBlocks,
    attention,
    attention_backward,
    attention_forward,
    blocks_for,
)
from kernels.attention.reference import attention_reference
from kernels.device import family_of

META = json.loads((FIXTURES / "kernels_meta.json").read_text())
# the decode cases are long sequences of which few queries count
CASES = [name.removeprefix("attn.") for name in META if name.startswith("attn.") and not name.startswith("attn.decode")]
NAMES = ("out", "q", "k", "v", "sinks")


def random_inputs(num_tokens, *, heads=4, kv_heads=2, width=16, dtype=torch.float32, device="cpu", seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (num_tokens, heads, width), "k": (num_tokens, kv_heads, width), "v": (num_tokens, kv_heads, width),
              "sinks": (heads,)}
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}


def gradients(function, inputs, dout) -> list[torch.Tensor]:
    """The output and the gradients of q, k, v and sinks."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    out = function(**leaves)
    out.backward(dout)
    return [out.detach(), *(leaf.grad for leaf in leaves.values())]


def assert_close(ours, theirs, *, rtol=1e-5, atol=5e-6) -> None:
    for name, actual, expected in zip(NAMES, ours, theirs):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol * max(1.0, expected.abs().max().item()),
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that an element nobody writes shows."""
    empty = torch.empty

    def filled(*arguments, **settings):
        tensor = empty(*arguments, **settings)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", filled)


def use_blocks(monkeypatch, queries: int, keys: int, descriptor: bool) -> None:
    blocks = AttentionBlocks(queries, keys, 4, 1, descriptor, in_registers=descriptor)
    monkeypatch.setattr(kernels.attention.packed, "blocks_for", lambda *_, **__: KernelBlocks(blocks, blocks, blocks))


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_match_the_golden_ones(case, poisoned):
    prefix, meta = f"attn.{case}.", META[f"attn.{case}"]
    data = {name.removeprefix(prefix): tensor for name, tensor in load_file(FIXTURES / "kernels.safetensors").items()
            if name.startswith(prefix)}
    bounds = data["cu_seqlens"].tolist() if meta["varlen"] else [0, meta["Tk"]]
    inputs = {name: data[name].float() for name in ("q", "k", "v", "sinks")}
    ours = gradients(lambda **leaves: attention(**leaves, cu_seqlens=bounds, window=meta["window"], scale=meta["scale"]),
                     inputs, data["do"].float())
    assert_close(ours, [data["o"], *(data[f"d{name}"] for name in ("q", "k", "v", "sinks"))])
    blocks = blocks_for("interpreter", torch.float32, windowed=False, width=64).forward
    lse = kernels.attention.packed.forward_triton(*inputs.values(), AttentionPlan(bounds), window=meta["window"],
                                                  scale=meta["scale"], blocks=blocks)[1]
    torch.testing.assert_close(lse, data["lse"], rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("window, queries, keys, descriptor", [(0, 16, 32, False), (0, 32, 16, True), (1, 16, 16, False),
                                                               (15, 16, 32, False), (16, 32, 16, True), (17, 16, 16, False),
                                                               (40, 32, 16, False)])
def test_odd_lengths_windows_and_tiles_match_the_reference(window, queries, keys, descriptor, monkeypatch, poisoned):
    use_blocks(monkeypatch, queries, keys, descriptor)
    settings = {"cu_seqlens": [0, 1, 64, 64, 79, 210], "window": window, "scale": 0.3}  # 131 tokens: parts of 64, 64 and 3 keys
    inputs = random_inputs(210, heads=2, kv_heads=1)
    dout = torch.randn(210, 2, 16, generator=torch.Generator().manual_seed(1))
    ours = gradients(lambda **leaves: attention(**leaves, **settings), inputs, dout)
    assert_close(ours, gradients(lambda **leaves: attention_reference(**leaves, **settings), inputs, dout))


@pytest.mark.interpreter
@pytest.mark.parametrize("num_tokens, heads, kv_heads, width", [(1, 2, 2, 16), (63, 2, 1, 32), (40, 1, 1, 128), (35, 8, 1, 64)])
def test_head_counts_and_widths_match_the_reference(num_tokens, heads, kv_heads, width, poisoned):
    settings = {"cu_seqlens": [0, num_tokens], "window": 0, "scale": width**-0.5}
    inputs = random_inputs(num_tokens, heads=heads, kv_heads=kv_heads, width=width)
    dout = torch.randn(num_tokens, heads, width, generator=torch.Generator().manual_seed(1))
    ours = gradients(lambda **leaves: attention(**leaves, **settings), inputs, dout)
    assert_close(ours, gradients(lambda **leaves: attention_reference(**leaves, **settings), inputs, dout))


@pytest.mark.interpreter
@pytest.mark.parametrize("window, queries, keys", [(0, 16, 32), (0, 32, 16), (5, 16, 16), (16, 16, 32), (33, 32, 16)])
def test_continuations_of_a_prefix_match_sequences_with_the_prefix_repeated(window, queries, keys, monkeypatch, poisoned):
    use_blocks(monkeypatch, queries, keys, True)
    bounds, prefixes = [0, 37, 40, 75, 75, 92, 108, 110], [-1, 0, 0, 0, -1, 4, 4]
    inputs = random_inputs(110, heads=2, kv_heads=1)
    dout = torch.randn(110, 2, 16, generator=torch.Generator().manual_seed(1))
    plan = AttentionPlan(bounds, prefixes=prefixes)
    ours = gradients(lambda **leaves: attention(**leaves, cu_seqlens=bounds, window=window, scale=0.3, plan=plan), inputs, dout)
    # each continuation beside its own copy of the prefix; the prefix's gradient is the sum over the copies
    order = [*range(37), *range(37), 37, 38, 39, *range(37), *range(40, 75), *range(37), *range(75, 92), *range(75, 92),
             *range(92, 108), *range(75, 92), 108, 109]
    own = [*range(37), *range(74, 77), *range(114, 149), *range(186, 203), *range(220, 236), *range(253, 255)]
    repeated = [0, 37, 77, 149, 186, 203, 236, 255]
    theirs = gradients(lambda q, k, v, sinks: attention_reference(q[order], k[order], v[order], sinks, repeated, window,
                                                                  0.3)[own], inputs, dout)
    assert_close(ours, theirs)


def attention_in_chunks(inputs, cuts, *, prefix_len, window, scale) -> torch.Tensor:
    """The output of one sequence whose first `prefix_len` tokens are counted apart, from the queries of one chunk after the other
    and the keys that they see; before those stand others, up to a tile's end."""
    outputs = []
    for start, end in zip([0, *cuts], [*cuts, len(inputs["q"])]):
        seen = max(start - window + 1, 0) if window else 0
        origin = prefix_len if prefix_len <= seen else 0
        first = origin + (seen - origin) // 64 * 64  # 64: a multiple of every key tile
        keys, values = inputs["k"][first:end].clone(), inputs["v"][first:end].clone()
        keys[:seen - first], values[:seen - first] = 3.0, -5.0  # as of other tokens: hidden, they change nothing
        apart = first < prefix_len < end
        bounds = [0, prefix_len - first, end - first] if apart else [0, end - first]
        plan = AttentionPlan(bounds, prefixes=[-1, 0] if apart else None, first_query=start - first)
        outputs.append(attention(inputs["q"][start:end], keys, values, inputs["sinks"], cu_seqlens=bounds, window=window,
                                 scale=scale, plan=plan))
    return torch.cat(outputs)


def attention_at_once(inputs, *, prefix_len, window, scale) -> torch.Tensor:
    num_tokens = len(inputs["q"])
    bounds = [0, prefix_len, num_tokens] if prefix_len else [0, num_tokens]
    plan = AttentionPlan(bounds, prefixes=[-1, 0] if prefix_len else None)
    return attention(**inputs, cu_seqlens=bounds, window=window, scale=scale, plan=plan)


@pytest.mark.interpreter
@pytest.mark.parametrize("window, queries, keys", [(0, 32, 16), (0, 16, 64), (1, 16, 16), (20, 32, 16), (64, 32, 32),
                                                   (100, 16, 64)])
@pytest.mark.parametrize("prefix_len", [0, 90])
def test_a_sequence_in_chunks_has_the_bits_of_the_whole(window, queries, keys, prefix_len, monkeypatch, poisoned,
                                                        ordered_products):
    use_blocks(monkeypatch, queries, keys, queries > keys)
    inputs = random_inputs(300, heads=2, kv_heads=1)
    settings = {"prefix_len": prefix_len, "window": window, "scale": 0.3}
    whole = attention_at_once(inputs, **settings)
    for cuts in ([64, 128, 256], [1, 70, 90, 91, 231]):
        assert torch.equal(attention_in_chunks(inputs, cuts, **settings), whole), cuts


@pytest.mark.interpreter
def test_keys_without_queries_have_no_gradient():
    inputs = {name: tensor.requires_grad_() for name, tensor in random_inputs(40).items()}
    out = attention(inputs["q"][8:], inputs["k"], inputs["v"], inputs["sinks"], cu_seqlens=[0, 40], window=0, scale=0.3,
                    plan=AttentionPlan([0, 40], first_query=8))
    with pytest.raises(AssertionError, match="8 rows before the first query"):
        out.sum().backward()


@pytest.mark.interpreter
def test_strided_inputs_and_gradients_match_the_reference(poisoned):
    fused = torch.randn(50, 4 * 16 + 2 * 2 * 16, generator=torch.Generator().manual_seed(0))  # q, k and v side by side
    q, k, v = (part.unflatten(1, (-1, 16)) for part in fused.split([64, 32, 32], dim=1))
    sinks = torch.tensor([1.0, -1.0, 0.5, 2.0])
    dout = torch.randn(16, 4, 50, generator=torch.Generator().manual_seed(1)).permute(2, 1, 0)
    settings = {"cu_seqlens": [0, 20, 50], "window": 0, "scale": 0.25}
    theirs = gradients(lambda **leaves: attention_reference(**leaves, **settings), {"q": q, "k": k, "v": v, "sinks": sinks}, dout)
    for transposed in (False, True):
        leaves = [tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0) if transposed else tensor for tensor in (q, k, v)]
        leaves = [tensor.detach().requires_grad_() for tensor in (*leaves, sinks)]
        out = attention(*leaves, **settings)
        out.backward(dout)
        assert_close([out.detach(), *(leaf.grad for leaf in leaves)], theirs)


def check_gradients_in_place(heads, kv_heads, width, bounds, window, *, device, dtype):
    """The gradients of a buffer of queries, keys and values, written over the output, keys and values; and elsewhere."""
    settings, plan = {"window": window, "scale": width**-0.5}, AttentionPlan(bounds, prefixes=[-1, 0, 0, -1])
    generator = torch.Generator().manual_seed(5)
    fused, dout = (torch.randn(bounds[-1], number, width, generator=generator).to(device, dtype)
                   for number in (heads + 2 * kv_heads, heads))
    q, k, v = fused.split([heads, kv_heads, kv_heads], 1)
    sinks = torch.randn(heads, generator=generator).to(device, dtype)
    out, lse = attention_forward(q, k, v, sinks, plan, **settings)
    expected = [tensor.clone() for tensor in attention_backward(q, k, v, sinks, out, lse, dout, plan, **settings)]
    *_, dsinks = attention_backward(q, k, v, sinks, out, lse, dout, plan, grads=(out, k, v), **settings)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip((out, k, v, dsinks), expected, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("window, descriptor", [(0, True), (0, False), (20, False)])
def test_gradients_may_take_the_memory_of_the_output_keys_and_values(window, descriptor, monkeypatch, poisoned):
    use_blocks(monkeypatch, 16, 32, descriptor)
    check_gradients_in_place(4, 2, 16, [0, 37, 60, 61, 90], window, device="cpu", dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 128])
def test_on_a_gpu_gradients_may_take_the_memory_of_the_output_keys_and_values(window, poisoned):
    for _ in range(3):
        check_gradients_in_place(64, 8, 64, [0, 700, 1600, 1601, 3000], window, device="cuda", dtype=torch.bfloat16)


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [0, 20])
def test_nothing_passes_between_sequences(window):
    inputs = random_inputs(60)
    settings = {"cu_seqlens": [0, 25, 60], "window": window, "scale": 0.25}
    dout = torch.randn(60, 4, 16, generator=torch.Generator().manual_seed(1))
    clean = gradients(lambda **leaves: attention(**leaves, **settings), inputs, dout)
    poisoned = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in ("q", "k", "v"):
        poisoned[name][25:] = float("nan")
    ours = gradients(lambda **leaves: attention(**leaves, **settings), poisoned, dout)
    for actual, expected in zip(ours[:4], clean[:4]):
        assert torch.equal(actual[:25], expected[:25]) and actual[25:].isnan().all()


@pytest.mark.interpreter
def test_scores_and_sinks_far_from_zero_match_the_reference():
    inputs = random_inputs(40)
    inputs["q"] *= 30
    inputs["sinks"] = torch.tensor([1e4, -1e9, 0.0, 50.0])
    settings = {"cu_seqlens": [0, 40], "window": 18, "scale": 1.0}
    dout = torch.ones(40, 4, 16)
    assert_close(gradients(lambda **leaves: attention(**leaves, **settings), inputs, dout),
                 gradients(lambda **leaves: attention_reference(**leaves, **settings), inputs, dout), rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [0, 17])
def test_a_sink_of_minus_infinity_leaves_the_keys_alone_and_has_no_gradient(window, poisoned):
    settings = {"cu_seqlens": [0, 1, 140, 150], "window": window, "scale": 0.3}  # 139 tokens: parts of 64, 64 and 11 keys
    inputs = random_inputs(150, heads=2, kv_heads=1) | {"sinks": torch.full((2,), float("-inf"))}
    dout = torch.randn(150, 2, 16, generator=torch.Generator().manual_seed(1))
    ours = gradients(lambda **leaves: attention(**leaves, **settings), inputs, dout)
    assert_close(ours, gradients(lambda q, k, v, sinks: without_sinks(q, k, v, **settings) + sinks.clamp(min=0).sum(),
                                 inputs, dout))
    assert (ours[4] == 0).all()
    # a sink that half precision can just hold is none either, and one that is not a number shows
    lowest = attention(**inputs | {"sinks": torch.full((2,), torch.finfo(torch.bfloat16).min)}, **settings)
    assert torch.equal(lowest, ours[0])
    broken = attention(**inputs | {"sinks": torch.tensor([float("nan"), 0.0])}, **settings)
    assert broken[:, 0].isnan().all() and broken[:, 1].isfinite().all()


@pytest.mark.interpreter
def test_what_the_kernels_cannot_serve_is_refused_with_the_reason():
    inputs = random_inputs(4, width=24)
    with pytest.raises(ValueError, match="head width 24"):
        attention(**inputs, cu_seqlens=[0, 4], window=0, scale=1.0)
    inputs = random_inputs(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        attention(**inputs, cu_seqlens=[0, 4], window=0, scale=1.0)


def test_plans_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="never fall"):
        AttentionPlan([0, 5, 3])
    with pytest.raises(ValueError, match="start at 0"):
        AttentionPlan([1, 5])
    with pytest.raises(ValueError, match="one each"):
        AttentionPlan([0, 5, 9], prefixes=[-1])
    with pytest.raises(ValueError, match="sequence 2 continues 1"):
        AttentionPlan([0, 5, 9, 12], prefixes=[-1, 0, 1])
    with pytest.raises(ValueError, match="first_query=13"):
        AttentionPlan([0, 5, 12], first_query=13)


def test_no_tile_is_empty_or_made_twice_and_the_heaviest_come_first():
    plan = AttentionPlan([0, 5, 5, 12, 30], prefixes=[-1, -1, 0, -1])
    tiles = plan.query_tiles(8, torch.device("cpu"))
    # rows 0-4 see none before them; 5-11 the prefix's 5; then a sequence of its own in three tiles
    assert tiles.tolist() == [[28, 30, 12, 12, 12], [20, 30, 12, 12, 12], [5, 12, 5, 0, 5], [0, 5, 0, 0, 0], [12, 30, 12, 12, 12]]
    assert plan.query_tiles(8, torch.device("cpu")) is tiles
    keys, readers = plan.key_tiles(8, torch.device("cpu"))
    assert readers.tolist() == [[0, 5, 0], [5, 12, 0], [5, 12, 0], [12, 30, 0]]
    assert keys.tolist() == [[12, 30, 3, 4], [0, 5, 0, 2], [20, 30, 3, 4], [5, 12, 2, 3], [28, 30, 3, 4]]


def test_rows_before_the_first_query_have_no_tiles():
    tiles = AttentionPlan([0, 12, 30], prefixes=[-1, 0], first_query=9).query_tiles(8, torch.device("cpu"))
    assert tiles.tolist() == [[28, 30, 12, 0, 12], [20, 30, 12, 0, 12], [12, 30, 12, 0, 12], [9, 12, 0, 0, 0]]
    assert AttentionPlan([0, 12, 30], first_query=30).query_tiles(8, torch.device("cpu")).tolist() == []


# bytes a thread may keep in memory where keys and values stay in registers, a thread has few of them, or heads are wide: what
# loops need at start and end
LOOP_INVARIANTS = 64


@pytest.mark.parametrize("kind", ["forward", "dq", "dkv"])
@pytest.mark.parametrize("arch, windowed", [(arch, False) for arch in ARCHITECTURES] + [(80, True), (86, True), (90, True),
                                                                                      (100, True)])
def test_kernels_fit_every_gpu_and_use_its_tensor_cores(kind, windowed, arch):
    blocks = blocks_for(family_of(arch), torch.bfloat16, windowed=windowed, width=64)._asdict()[kind]
    resources = compile_kernel(kind, arch, blocks, windowed=windowed)
    check_fits(resources, arch, max_stack=LOOP_INVARIANTS if blocks.in_registers or blocks.max_registers else 0)
    loops = product_loops(resources.sass)
    assert loops and not any(line.startswith(("LDL", "STL")) for loop in loops for line in loop)
    assert resources.mma == {{90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")}


@pytest.mark.parametrize("kind", ["forward", "dq", "dkv"])
@pytest.mark.parametrize("arch, dtype, width, prefixed", [(86, "fp16", 128, False), (90, "fp32", 32, False),
                                                          (90, "bf16", 64, True)])
def test_other_dtypes_widths_and_prefixes_fit_too(kind, dtype, width, prefixed, arch):
    torch_dtype = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    blocks = blocks_for(family_of(arch), torch_dtype, windowed=False, width=width)._asdict()[kind]
    check_fits(compile_kernel(kind, arch, blocks, dtype=dtype, width=width, prefixed=prefixed), arch,
               max_stack=LOOP_INVARIANTS if blocks.in_registers or blocks.max_registers or width > 64 else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 127, 128, 129])
@pytest.mark.parametrize("lengths", [[2048], [1, 63, 127, 128, 129, 300, 640, 1000], [1]])
@pytest.mark.parametrize("heads, kv_heads, width", [(64, 8, 64), (8, 2, 16), (4, 2, 32), (4, 4, 128)])
def test_error_is_at_most_twice_that_of_eager_bf16_and_runs_repeat(heads, kv_heads, width, lengths, window, poisoned):
    bounds = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    inputs = random_inputs(bounds[-1], heads=heads, kv_heads=kv_heads, width=width, dtype=torch.bfloat16, device="cuda")
    dout = torch.randn(bounds[-1], heads, width, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    settings = {"cu_seqlens": bounds, "window": window, "scale": width**-0.5}
    ours = gradients(lambda **leaves: attention(**leaves, **settings), inputs, dout)
    again = gradients(lambda **leaves: attention(**leaves, **settings), inputs, dout)
    assert all(torch.equal(first, second) for first, second in zip(ours, again))
    exact = gradients(lambda **leaves: eager(**leaves, **settings), {n: t.double() for n, t in inputs.items()}, dout.double())
    rough = gradients(lambda **leaves: eager(**leaves, **settings), inputs, dout)
    for name, actual, expected, other in zip(NAMES, ours, exact, rough):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error <= 2 * (other.double() - expected).norm() / expected.norm() + 1e-6, f"{name}: {error.item()}"


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 8])
def test_float32_on_the_gpu_matches_float64(window):
    inputs = random_inputs(127, heads=8, kv_heads=2, width=32, device="cuda")
    dout = torch.randn(127, 8, 32, generator=torch.Generator().manual_seed(1)).cuda()
    settings = {"cu_seqlens": [0, 64, 127], "window": window, "scale": 0.2}
    ours = gradients(lambda **leaves: attention(**leaves, **settings), inputs, dout)
    exact = gradients(lambda **leaves: eager(**leaves, **settings), {n: t.double() for n, t in inputs.items()}, dout.double())
    assert_close([tensor.double() for tensor in ours], exact)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 128])
def test_continuations_match_repeated_prefixes_on_the_gpu(window, poisoned):
    bounds, prefixes = [0, 300, 500, 501, 900], [-1, 0, 0, 0]
    inputs = random_inputs(900, heads=16, kv_heads=2, width=64, dtype=torch.bfloat16, device="cuda")
    dout = torch.randn(900, 16, 64, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    plan = AttentionPlan(bounds, prefixes=prefixes)
    ours = gradients(lambda **leaves: attention(**leaves, cu_seqlens=bounds, window=window, scale=0.125, plan=plan), inputs, dout)
    theirs = gradients(lambda **leaves: attention_reference(**leaves, cu_seqlens=bounds, window=window, scale=0.125,
                                                            prefixes=prefixes), inputs, dout)
    for name, actual, expected in zip(NAMES, ours, theirs):
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < 0.01, f"{name}: {error.item()}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 8, 100, 128])
@pytest.mark.parametrize("prefix_len", [0, 700])
def test_a_sequence_in_chunks_has_the_bits_of_the_whole_on_the_gpu(window, prefix_len, dtype, poisoned):
    inputs = random_inputs(2000, heads=16, kv_heads=2, width=64, dtype=dtype, device="cuda")
    settings = {"prefix_len": prefix_len, "window": window, "scale": 0.125}
    whole = attention_at_once(inputs, **settings)
    for cuts in ([64, 640, 1600], [1, 127, 700, 701, 1333]):
        assert torch.equal(attention_in_chunks(inputs, cuts, **settings), whole), cuts
