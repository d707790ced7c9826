"""Attention by library products, forced on the CPU and on another GPU: goldens, float64, bounded scratch and linear cost."""

import json

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file

import kernels.attention.library
from kernels.attention.library import chunks
from kernels.attention.packed import attention, attention_backward, attention_forward
from kernels.attention.plan import AttentionPlan

GOLDEN = load_file(FIXTURES / "kernels.safetensors")
META = json.loads((FIXTURES / "kernels_meta.json").read_text())
CASES = [name.removeprefix("attn.") for name in META if name.startswith("attn.") and not name.startswith("attn.decode")]
NAMES = ("out", "q", "k", "v", "sinks")


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.setenv("GRPO_PRODUCTS", "library")


def random_inputs(num_tokens, *, heads=4, kv_heads=2, width=16, dtype=torch.float32, device="cpu", seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (num_tokens, heads, width), "k": (num_tokens, kv_heads, width), "v": (num_tokens, kv_heads, width),
              "sinks": (heads,)}
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}


def gradients(function, inputs, dout) -> dict[str, torch.Tensor]:
    """The output and the gradients of q, k, v and sinks."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    out = function(**leaves)
    out.backward(dout.to(out.dtype))
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def plain(q, k, v, sinks, *, cu_seqlens, window, scale, prefixes=None):
    """The formula head by head in the arguments' dtype; each continuation beside its own copy of its prefix."""
    group, outputs = q.shape[1] // k.shape[1], []
    for sequence, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        prefix = -1 if prefixes is None else prefixes[sequence]
        before = range(cu_seqlens[prefix], cu_seqlens[prefix + 1]) if prefix != -1 else range(0)
        rows = [*before, *range(start, end)]
        distance = torch.arange(len(before), len(rows), device=q.device)[:, None] - torch.arange(len(rows), device=q.device)
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        heads = []
        for head in range(q.shape[1]):
            scores = (q[start:end, head] @ k[rows, head // group].T * scale).masked_fill(hidden, float("-inf"))
            logits = torch.cat((scores, sinks[head].expand(end - start, 1)), dim=-1)
            heads.append(torch.softmax(logits, dim=-1)[:, :-1] @ v[rows, head // group])
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs)


def assert_close(ours, exact, tolerance) -> None:
    for name in NAMES:
        error = (ours[name].double() - exact[name]).abs().max()
        assert error <= tolerance * max(1.0, exact[name].abs().max().item()), f"{name}: {error}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_scores", [1, 2000, 1 << 23])
def test_output_and_gradients_match_the_golden_ones(case, max_scores, monkeypatch, poisoned):
    monkeypatch.setattr(kernels.attention.library, "MAX_SCORES", max_scores)
    monkeypatch.setattr(kernels.attention.library, "_MIN_CHUNK", 1)
    prefix, meta = f"attn.{case}.", META[f"attn.{case}"]
    data = {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}
    bounds = data["cu_seqlens"].tolist() if meta["varlen"] else [0, meta["Tk"]]
    ours = gradients(lambda **leaves: attention(**leaves, cu_seqlens=bounds, window=meta["window"], scale=meta["scale"]),
                     {name: data[name].float() for name in NAMES[1:]}, data["do"].float())
    assert_close(ours, {"out": data["o"].double()} | {name: data[f"d{name}"].double() for name in NAMES[1:]}, 5e-6)


BOUNDS, PREFIXES = [0, 37, 40, 75, 75, 92, 108, 110], [-1, 0, 0, 0, -1, 4, 4]


@pytest.mark.parametrize("window", [0, 1, 5, 16, 33, 64])
@pytest.mark.parametrize("prefixes", [None, PREFIXES])
@pytest.mark.parametrize("max_scores", [300, 1 << 23])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float16, 2e-3)])
def test_packed_sequences_and_continuations_match_float64(window, prefixes, max_scores, dtype, tolerance, monkeypatch, poisoned):
    monkeypatch.setattr(kernels.attention.library, "MAX_SCORES", max_scores)
    inputs = random_inputs(110, dtype=dtype)
    dout = torch.randn(110, 4, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    settings = {"cu_seqlens": BOUNDS, "window": window, "scale": 0.3}
    plan = AttentionPlan(BOUNDS, prefixes=prefixes)
    ours = gradients(lambda **leaves: attention(**leaves, **settings, plan=plan), inputs, dout)
    exact = gradients(lambda **leaves: plain(**leaves, **settings, prefixes=prefixes),
                      {name: tensor.double() for name, tensor in inputs.items()}, dout)
    assert_close(ours, exact, tolerance)


def test_strided_inputs_and_gradients_give_the_same_bits():
    inputs, dout = random_inputs(50), torch.randn(50, 4, 16, generator=torch.Generator().manual_seed(1))
    settings = {"cu_seqlens": [0, 20, 50], "window": 4, "scale": 0.5}

    def strided(x):
        return x if x.dim() == 1 else x.permute(2, 1, 0).contiguous().permute(2, 1, 0)

    ours = gradients(lambda **leaves: attention(**leaves, **settings), inputs, dout)
    others = gradients(lambda **leaves: attention(**{name: strided(leaf) for name, leaf in leaves.items()}, **settings), inputs,
                       strided(dout))
    for name in NAMES:
        torch.testing.assert_close(others[name], ours[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slices_of_one_buffer_are_read_and_their_gradients_written_in_place(dtype, poisoned):
    fused = torch.randn(110, 8 * 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    buffer = torch.full_like(fused, torch.nan)

    def split(x):
        return [part.unflatten(1, (-1, 16)) for part in x.split([4 * 16, 2 * 16, 2 * 16], 1)]

    dout, sinks = torch.randn(110, 4, 16, generator=torch.Generator().manual_seed(1)).to(dtype), torch.tensor([0.0, 1, -2, 3])
    plan, settings = AttentionPlan(BOUNDS, prefixes=PREFIXES), {"window": 5, "scale": 0.3}
    out, lse = attention_forward(*split(fused), sinks, plan, **settings)
    *_, dsinks = attention_backward(*split(fused), sinks, out, lse, dout, plan, **settings, grads=tuple(split(buffer)))
    inputs = dict(zip(NAMES[1:], (*split(fused), sinks)))
    expected = gradients(lambda **leaves: attention(**leaves, cu_seqlens=BOUNDS, plan=plan, **settings), inputs, dout)
    ours = dict(zip(NAMES, (out, *split(buffer), dsinks.sum(0))))
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)
    scores = fused[:37, :16].double() @ fused[:37, 64:80].double().T * 0.3  # first head of the first sequence
    distance = torch.arange(37)[:, None] - torch.arange(37)
    scores = scores.masked_fill((distance < 0) | (distance >= 5), -torch.inf)
    torch.testing.assert_close(lse[0, :37].double(), (scores.exp().sum(1) + 1).log(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("sink", [-1e4, 12.0, 1e4])
def test_small_gradients_beside_large_sinks_keep_their_digits_in_float16(sink):
    # a sink of 12 leaves 60 keys weights of 6e-6: scores' gradients are below what float16 holds, those of q well within
    inputs = random_inputs(60, dtype=torch.float16) | {"sinks": torch.full((4,), sink)}
    inputs |= {name: (inputs[name] * size).half() for name, size in (("q", 1 / 128), ("k", 128), ("v", 1024))}
    dout = (torch.randn(60, 4, 16, generator=torch.Generator().manual_seed(1)) * 1e-4).half()
    settings = {"cu_seqlens": [0, 60], "window": 0, "scale": 0.25}
    ours = gradients(lambda **leaves: attention(**leaves, **settings), inputs, dout)
    exact = gradients(lambda **leaves: plain(**leaves, **settings), {name: x.double() for name, x in inputs.items()}, dout)
    assert all(tensor.isfinite().all() for tensor in ours.values())
    for name in ("out", "q", "sinks"):
        assert (ours[name].double() - exact[name]).norm() <= 1.5e-3 * exact[name].norm(), name


@pytest.mark.parametrize("window", [0, 1, 8, 128])
def test_scores_held_at_once_stay_within_the_limit(window, monkeypatch):
    monkeypatch.setattr(kernels.attention.library, "MAX_SCORES", 20_000)
    made = list(chunks(AttentionPlan([0, 600, 610, 640, 641, 700]), 4, window))
    assert [row for chunk in made for row in range(700)[chunk.queries]] == list(range(700))
    sizes = [4 * pairs(chunk) for chunk in made]
    assert len(sizes) > 2 and max(sizes) <= 20_000


def pairs(chunk) -> int:
    return (chunk.queries.stop - chunk.queries.start) * sum(part.stop - part.start for part in chunk.keys)


def scored_pairs(length, window) -> int:
    return sum(map(pairs, chunks(AttentionPlan([0, length]), 64, window)))


def test_the_cost_of_a_window_grows_with_the_length_alone():
    # twice what is visible, 128 keys a query
    assert scored_pairs(8192, 128) <= 2.01 * 128 * 8192 and scored_pairs(16384, 128) <= 2.01 * scored_pairs(8192, 128)


def test_dtypes_that_differ_are_refused():
    inputs = random_inputs(5)
    with pytest.raises(ValueError, match="k torch.float16"):
        attention(**inputs | {"k": inputs["k"].half()}, cu_seqlens=[0, 5], window=0, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 128])
@pytest.mark.parametrize("prefixes", [None, [-1, 0, 0, -1]])
def test_float16_on_a_gpu_stays_within_twice_the_error_of_eager_float16(window, prefixes, poisoned):
    inputs = random_inputs(1100, heads=64, kv_heads=8, width=64, dtype=torch.float16, device="cuda")
    dout = torch.randn(1100, 64, 64, generator=torch.Generator().manual_seed(1)).to("cuda", torch.float16)
    settings = {"cu_seqlens": [0, 300, 301, 700, 1100], "window": window, "scale": 0.125}
    plan = AttentionPlan(settings["cu_seqlens"], prefixes=prefixes)
    ours, again = (gradients(lambda **leaves: attention(**leaves, **settings, plan=plan), inputs, dout) for _ in range(2))
    eager = gradients(lambda **leaves: plain(**leaves, **settings, prefixes=prefixes), inputs, dout)
    exact = gradients(lambda **leaves: plain(**leaves, **settings, prefixes=prefixes),
                      {name: tensor.double() for name, tensor in inputs.items()}, dout)
    for name in NAMES:
        assert torch.equal(ours[name], again[name]), name
        error, allowed = ((result[name].double() - exact[name]).norm() for result in (ours, eager))
        assert error <= 2 * allowed, f"{name}: {error} against {allowed}"


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 128])
def test_scratch_on_a_gpu_is_bounded(window):
    inputs = random_inputs(8192, heads=64, kv_heads=8, width=64, dtype=torch.float16, device="cuda")
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attention(**leaves, cu_seqlens=[0, 8192], window=window, scale=0.125)
    out.backward(torch.ones_like(out))
    tensors = 8192 * 64 * 64 * 2  # of q's size: out, its gradient, dq; keys' gradients in fp32 are as large again
    assert torch.cuda.max_memory_allocated() - before < 5 * tensors + 40 * (1 << 23)
