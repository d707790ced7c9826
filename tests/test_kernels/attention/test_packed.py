"""Attention with sinks against float64 goldens, forward and every gradient; windows, packing and chunks."""

import json
import math

import pytest
import torch
from attention_problem import without_sinks
from paths import FIXTURES
from safetensors.torch import load_file

import kernels.attention.reference
from kernels.attention.packed import attention
from kernels.attention.plan import AttentionPlan

GOLDEN = load_file(FIXTURES / "kernels.safetensors")
META = json.loads((FIXTURES / "kernels_meta.json").read_text())
CASES = [name.removeprefix("attn.") for name in META if name.startswith("attn.")]
INPUTS = ("q", "k", "v", "sinks")


def golden(case: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and settings; queries of a decode case are put at the end of a full-length sequence, others are zero."""
    prefix = f"attn.{case}."
    data = {name.removeprefix(prefix): tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}
    meta = META[f"attn.{case}"]
    for name in ("q", "do"):
        padding = torch.zeros(meta["q_offset"], *data[name].shape[1:], dtype=data[name].dtype)
        data[name] = torch.cat((padding, data[name]))
    cu_seqlens = data["cu_seqlens"].tolist() if meta["varlen"] else [0, meta["Tk"]]
    return data, {"cu_seqlens": cu_seqlens, "window": meta["window"], "scale": meta["scale"]}


def check_golden(case: str) -> None:
    data, settings = golden(case)
    first = META[f"attn.{case}"]["q_offset"]
    leaves = {name: data[name].float().requires_grad_() for name in INPUTS}
    out = attention(**leaves, **settings)
    out.backward(data["do"].float())
    torch.testing.assert_close(out[first:], data["o"], rtol=1e-5, atol=2e-6)
    for name, leaf in leaves.items():
        expected = data[f"d{name}"]
        grad = leaf.grad[first:] if name == "q" else leaf.grad
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=5e-6 * max(1.0, expected.abs().max().item()),
                                   msg=lambda text, name=name: f"d{name}: {text}")


def random_inputs(num_tokens, *, heads=4, kv_heads=2, width=8, seed=0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (num_tokens, heads, width), "k": (num_tokens, kv_heads, width), "v": (num_tokens, kv_heads, width),
              "sinks": (heads,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def gradients(inputs, grad, **settings) -> list[torch.Tensor]:
    """The output and the gradients of q, k, v and sinks."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    out = attention(**leaves, **settings)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves.values())]


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_match_the_golden_ones(case):
    check_golden(case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_scores", [1, 2000, 20000])
def test_chunks_of_any_size_match_the_golden_ones(case, max_scores, monkeypatch):
    monkeypatch.setattr(kernels.attention.reference, "_MAX_SCORES", max_scores)
    check_golden(case)


@pytest.mark.parametrize("products", ["reference", "library"])
@pytest.mark.parametrize("case", [case for case in CASES if META[f"attn.{case}"]["q_offset"]])
def test_queries_of_the_last_rows_alone_match_the_golden_ones(case, products, monkeypatch):
    if products == "library":
        monkeypatch.setenv("GRPO_PRODUCTS", products)
    data, settings = golden(case)
    first = META[f"attn.{case}"]["q_offset"]
    inputs = {name: data[name].float() for name in INPUTS}
    plan = AttentionPlan(settings["cu_seqlens"], first_query=first)
    out = attention(**inputs | {"q": inputs["q"][first:]}, **settings, plan=plan)
    torch.testing.assert_close(out, data["o"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("products", ["reference", "library"])
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("first", [11, 37, 80])
def test_queries_of_the_last_rows_alone_see_what_they_see_among_all(first, window, products, monkeypatch):
    if products == "library":
        monkeypatch.setenv("GRPO_PRODUCTS", products)
    bounds, prefixes = [0, 37, 60, 92], [-1, 0, 0]
    inputs, settings = random_inputs(92), {"cu_seqlens": bounds, "window": window, "scale": 0.3}
    whole = attention(**inputs, **settings, plan=AttentionPlan(bounds, prefixes=prefixes))
    plan = AttentionPlan(bounds, prefixes=prefixes, first_query=first)
    torch.testing.assert_close(attention(**inputs | {"q": inputs["q"][first:]}, **settings, plan=plan), whole[first:], rtol=1e-5,
                               atol=2e-6)


@pytest.mark.parametrize("window", [0, 1, 8, 128])
def test_scores_held_at_once_stay_within_the_limit(window, monkeypatch):
    limit, sizes = 20_000, []
    attend = kernels.attention.reference.attend

    def measured(q, k, *arguments):
        sizes.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1])
        return attend(q, k, *arguments)

    monkeypatch.setattr(kernels.attention.reference, "_MAX_SCORES", limit)
    monkeypatch.setattr(kernels.attention.reference, "attend", measured)
    inputs = random_inputs(700)
    attention(**inputs, cu_seqlens=[0, 600, 610, 640, 641, 700], window=window, scale=1.0)
    assert len(sizes) > 2 and max(sizes) <= limit


@pytest.mark.parametrize("window, expected", [(0, [0, 0.5, 1, 1.5, 2, 2.5]), (1, [0, 1, 2, 3, 4, 5]), (3, [0, 0.5, 1, 2, 3, 4]),
                                              (6, [0, 0.5, 1, 1.5, 2, 2.5])])
def test_a_window_of_w_keys_holds_the_query_itself(window, expected):
    # equal scores and no sink: the mean of the visible values, and value j is j
    q, v = torch.zeros(6, 1, 2), torch.arange(6.0).view(6, 1, 1).expand(6, 1, 2)
    out = attention(q, q, v, torch.full((1,), -1e9), cu_seqlens=[0, 6], window=window, scale=1.0)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)


def test_a_sink_takes_probability_and_gives_no_value():
    # n visible keys of score 0 and value 1, a sink of log 2: n / (n + 2)
    q, v = torch.zeros(3, 1, 2), torch.ones(3, 1, 2)
    out = attention(q, q, v, torch.tensor([math.log(2)]), cu_seqlens=[0, 3], window=0, scale=1.0)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([1 / 3, 2 / 4, 3 / 5]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("products", ["reference", "library"])
@pytest.mark.parametrize("window", [0, 9])
def test_a_sink_of_minus_infinity_leaves_the_keys_alone_and_has_no_gradient(window, products, monkeypatch):
    if products == "library":
        monkeypatch.setenv("GRPO_PRODUCTS", "library")
    settings = {"cu_seqlens": [0, 1, 30, 42], "window": window, "scale": 0.4}
    inputs, grad = random_inputs(42), random_inputs(42, seed=1)["q"]
    leaves = [inputs[name].clone().requires_grad_() for name in ("q", "k", "v")]
    out = without_sinks(*leaves, **settings)
    out.backward(grad)
    ours = gradients(inputs | {"sinks": torch.full((4,), float("-inf"))}, grad, **settings)
    for actual, expected in zip(ours, (out.detach(), *(leaf.grad for leaf in leaves))):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (ours[4] == 0).all()


def test_neither_scale_nor_position_changes_the_sink():
    q, v = torch.zeros(2, 1, 2), torch.ones(2, 1, 2)
    out = attention(q, q, v, torch.zeros(1), cu_seqlens=[0, 1, 2], window=1, scale=1e-3)
    assert out.flatten().tolist() == [0.5] * 4


@pytest.mark.parametrize("window", [0, 4])
def test_sequences_of_one_token_give_their_value_times_a_sigmoid(window):
    inputs = random_inputs(5)
    out = attention(**inputs, cu_seqlens=[0, 1, 2, 3, 4, 5], window=window, scale=0.3)
    k, v = (inputs[name].repeat_interleave(2, dim=1) for name in ("k", "v"))
    score = 0.3 * (inputs["q"] * k).sum(-1)
    torch.testing.assert_close(out, v * torch.sigmoid(score - inputs["sinks"])[..., None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [0, 1, 7, 8, 9, 64])
@pytest.mark.parametrize("max_scores", [1 << 26, 600])
def test_packing_changes_neither_output_nor_gradients(window, max_scores, monkeypatch):
    monkeypatch.setattr(kernels.attention.reference, "_MAX_SCORES", max_scores)
    bounds = [0, 8, 9, 39, 46, 63]
    inputs = random_inputs(63)
    grad = torch.randn(63, 4, 8, generator=torch.Generator().manual_seed(1))
    packed = gradients(inputs, grad, cu_seqlens=bounds, window=window, scale=0.4)
    sinks = torch.zeros(4)
    for start, end in zip(bounds, bounds[1:]):
        part = {name: tensor if name == "sinks" else tensor[start:end] for name, tensor in inputs.items()}
        alone = gradients(part, grad[start:end], cu_seqlens=[0, end - start], window=window, scale=0.4)
        for ours, theirs in zip(packed[:4], alone[:4]):
            torch.testing.assert_close(ours[start:end], theirs, rtol=1e-5, atol=2e-6)
        sinks += alone[4]
    torch.testing.assert_close(packed[4], sinks, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("window", [0, 3])
def test_nothing_passes_between_sequences_or_from_later_tokens(window):
    inputs = random_inputs(12)
    clean = attention(**inputs, cu_seqlens=[0, 5, 12], window=window, scale=1.0)
    poisoned = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in ("q", "k", "v"):
        poisoned[name][5:] = float("nan")
    out = attention(**poisoned, cu_seqlens=[0, 5, 12], window=window, scale=1.0)
    assert torch.equal(out[:5], clean[:5]) and out[5:].isnan().all()
    later = inputs | {"k": inputs["k"].clone(), "v": inputs["v"].clone()}
    later["k"][9:] = float("nan")
    assert torch.equal(attention(**later, cu_seqlens=[0, 5, 12], window=window, scale=1.0)[:9], clean[:9])
    later["k"] = inputs["k"]
    later["v"][9:] += 100
    out = attention(**later, cu_seqlens=[0, 5, 12], window=window, scale=1.0)
    assert torch.equal(out[:9], clean[:9]) and (out[9:] - clean[9:]).amax(dim=(1, 2)).min() > 1


def test_scores_and_sinks_far_from_zero_stay_finite():
    inputs = random_inputs(20)
    inputs["q"] *= 1e4
    inputs["sinks"] = torch.tensor([1e5, -1e5, 0.0, 3e4])
    grad = torch.ones(20, 4, 8)
    assert all(tensor.isfinite().all() for tensor in gradients(inputs, grad, cu_seqlens=[0, 20], window=5, scale=1.0))


def test_strided_inputs_give_the_same_values():
    inputs = random_inputs(20)
    strided = {name: tensor if name == "sinks" else tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0)
               for name, tensor in inputs.items()}
    settings = {"cu_seqlens": [0, 7, 20], "window": 4, "scale": 0.5}
    torch.testing.assert_close(attention(**strided, **settings), attention(**inputs, **settings), rtol=1e-6, atol=1e-6)


def eager(q, k, v, sinks, *, cu_seqlens, window, scale) -> torch.Tensor:
    """The formula head by head in the inputs' dtype."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        for head in range(q.shape[1]):
            scores = (q[start:end, head] @ k[start:end, head // group].T * scale).masked_fill(hidden, float("-inf"))
            sink = sinks[head].expand(end - start, 1)
            probabilities = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[:, :-1]
            out[start:end, head] = probabilities @ v[start:end, head // group]
    return out


@pytest.mark.parametrize("window", [0, 8])
def test_bf16_error_is_at_most_twice_that_of_eager_bf16(window):
    inputs = random_inputs(63, width=16, dtype=torch.bfloat16)
    settings = {"cu_seqlens": [0, 20, 63], "window": window, "scale": 0.25}
    exact = eager(**{name: tensor.double() for name, tensor in inputs.items()}, **settings)
    ours = attention(**inputs, **settings)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() <= 2 * (eager(**inputs, **settings).double() - exact).norm()
    grads = gradients(inputs, torch.ones_like(ours), **settings)
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in grads)
