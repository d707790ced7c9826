"""A layer's kernels and its backward (models/block.py) against autograd through the references on the CPU, in the interpreter and
on a GPU; and the kernels for few rows against those for many.

The references are themselves compared with golden tensors elsewhere."""

import gc
import os
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from paths import FIXTURES

import kernels.device
import models.decoder
import models.experts
import models.host_store
import models.offload
from kernels.packed.mxfp4 import quantize
from kernels.packed.weights import Mxfp4Fragments
from models.config import GptOssConfig
from models.decoder import Decoder
from models.experts import PROJECTIONS, RoutedExperts
from models.formats.hugging_face import load_model
from models.gpt_oss import GptOss
from models.keys import PrefillChunk, rotated
from models.lora import LoraConfig, attach_lora, set_full_training
from models.offload import NAMES, MemoryBudget, Place, TrainingPass

ARCHITECTURE = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "vocab_size": 48,
    "layer_types": ["sliding_attention", "full_attention"], "rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "swiglu_alpha": 1.702,
    "max_position_embeddings": 256, "initial_context_length": 64, "rope_theta": 150000.0, "eos_token_id": 1, "pad_token_id": 0,
    "rope_scaling": {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64,
                     "truncate": False},
}  # fmt: skip
WIDE = ARCHITECTURE | {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
                       "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 4, "sliding_window": 16,
                       "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size": 512}  # fmt: skip
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "router", "experts"]


def build(architecture, experts="mxfp4", *, targets=EVERYTHING, device="cpu", dtype=torch.float32, trains_more=True,
          in_fragments=False, **settings):
    """A random model whose adapters are not zero, or without targets one that trains whole; experts packed as NF4 are of random
    codes."""
    config = GptOssConfig.from_architecture(architecture)
    model = GptOss(config, dtype=dtype, device="cpu", experts="bf16")
    model.init_weights(0)
    state = model.state_dict()
    if experts == "mxfp4":
        for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
            state[f"{name}_blocks"], state[f"{name}_scales"] = quantize(state.pop(name).to(device).transpose(1, 2))
    if experts == "nf4":
        generator = torch.Generator().manual_seed(4)
        for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
            num, size_in, size_out = state.pop(name).shape
            state[f"{name}_codes"] = torch.randint(0, 256, (num, size_out, size_in // 2), generator=generator, dtype=torch.uint8)
            state[f"{name}_absmax"] = 2 * torch.rand(num, size_out * size_in // 64, generator=generator) * size_in**-0.5
    model = GptOss(config, dtype=dtype, device=device, experts=experts, **settings)
    model.load_state_dict(state)
    if in_fragments:
        for block in model.model.layers:
            block.mlp.experts.arrange()
    if targets is None:
        set_full_training(model)
    else:
        attach_lora(model, LoraConfig(3, 6.0, targets, trains_more, trains_more), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B") or name.endswith(("sinks", "bias")):
                # wide margins between the router's choices: rounding flips few of them
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (3.0 if "router.bias" in name else 0.3))
    return model


def gradients(model, lengths=(7, 1, 12), seed=3):
    """Of a weighted sum of log-probs and entropies of packed random sequences; and the log-probs."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (sum(lengths),), generator=generator).to(model.device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(model.device)
    mask = torch.ones(sum(lengths), dtype=torch.bool, device=model.device)
    mask[cu_seqlens[:-1].long()] = False
    factors = torch.randn(sum(lengths), generator=generator).to(model.device)
    model.zero_grad()
    chosen, _ = model.log_probs(tokens, cu_seqlens, temperature=0.8, mask=mask)
    (chosen * factors).sum().backward()
    return {name: p.grad for name, p in model.trainable_parameters().items()} | {"log_probs": chosen.detach()}


def by_autograd(model, monkeypatch, dtype=None, **settings):
    """The same through the references on the CPU, by a model of `dtype` with the same weights; where the model is."""
    with monkeypatch.context() as patch:
        for name in ("TRITON_INTERPRET", "GRPO_PRODUCTS"):
            patch.delenv(name, raising=False)
        if model.device.type == "cpu" and dtype is None:
            return gradients(model, **settings)
        other = GptOss(model.config, dtype=dtype or model.dtype, device="cpu", experts=model.expert_format.name)
        for block, source in zip(other.model.layers, model.model.layers):
            if source.mlp.experts.weights("down_proj").__class__ is Mxfp4Fragments:
                block.mlp.experts.arrange()
        targets = sorted({name.split(".")[-2] for name in model.trainable_parameters() if name.endswith("proj.lora_A")})
        kinds = {"router.lora_A": "router", "gate_up_proj_lora_A": "experts"}
        targets += [kind for end, kind in kinds.items() if any(name.endswith(end) for name in model.trainable_parameters())]
        trains_more = model.model.norm.weight.requires_grad
        if targets:
            attach_lora(other, LoraConfig(3, 6.0, targets, trains_more, trains_more), seed=1)
        else:
            set_full_training(other)
        other.load_state_dict(model.state_dict())
        return {name: tensor.to(model.device) for name, tensor in gradients(other, **settings).items()}


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.any(), f"{name}: nothing to compare"
        error = (ours[name] - expected).norm() / expected.norm()
        assert error <= tolerance, (name, error)


@pytest.fixture(params=["triton", "library"])
def products(request, monkeypatch):
    """Each way of making matrix products (kernels.device.product_path)."""
    if request.param == "library":
        monkeypatch.setenv("GRPO_PRODUCTS", "library")


@pytest.mark.interpreter
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("experts, targets, recomputes, in_fragments", [
    ("mxfp4", EVERYTHING, True, True), ("mxfp4", EVERYTHING, False, False), ("bf16", EVERYTHING, True, False),
    ("nf4", EVERYTHING, True, False), ("bf16", None, True, False), ("bf16", None, False, False)])
def test_gradients_of_everything_that_may_train(experts, targets, recomputes, in_fragments, monkeypatch):
    model = build(ARCHITECTURE, experts, targets=targets, activation_checkpointing=recomputes, in_fragments=in_fragments)
    ours = gradients(model)
    assert ours.keys() - {"log_probs"} == model.trainable_parameters().keys()
    assert_close(ours, by_autograd(model, monkeypatch), 2e-5)


@pytest.mark.interpreter
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("experts, targets, recomputes", [("mxfp4", EVERYTHING, True), ("bf16", None, False)])
def test_experts_take_tokens_in_chunks_with_the_outputs_and_gradients_of_all_at_once(experts, targets, recomputes, monkeypatch):
    model = build(ARCHITECTURE, experts, targets=targets, activation_checkpointing=recomputes)
    exact_bits = "GRPO_PRODUCTS" not in os.environ  # the library's depend on the number of rows
    whole = gradients(model) if exact_bits else None
    exact = by_autograd(model, monkeypatch, dtype=torch.float64)
    seen, plain = [], RoutedExperts.local_forward
    monkeypatch.setattr(models.offload, "CHUNK_TOKENS", 7)
    monkeypatch.setattr(RoutedExperts, "local_forward", lambda self, routing, x, *more: seen.append(len(x))
                        or plain(self, routing, x, *more))
    chunked = gradients(model)
    assert seen == [7, 7, 6] * 2  # the second chunk has tokens of three sequences
    if exact_bits:
        assert torch.equal(chunked["log_probs"], whole["log_probs"])
    assert_close(chunked, exact, 2e-5)
    assert_close(by_autograd(model, monkeypatch), exact, 2e-5)  # autograd takes the same chunks


@pytest.mark.interpreter
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_adapters_and_all_that_carries_them_may_train_together(experts, monkeypatch):
    model = build(ARCHITECTURE, experts, in_fragments=experts == "mxfp4")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    ours = gradients(model, lengths=(9,))
    assert "model.layers.0.mlp.experts.down_proj_bias" in ours
    assert_close(ours, by_autograd(model, monkeypatch, lengths=(9,)), 2e-5)


@pytest.mark.interpreter
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "experts"], ["o_proj"]])
def test_adapters_on_some_projections_only(targets, monkeypatch):
    model = build(ARCHITECTURE, targets=targets, trains_more=False, activation_checkpointing=True)
    assert_close(gradients(model, lengths=(9,)), by_autograd(model, monkeypatch, lengths=(9,)), 2e-5)


@pytest.mark.interpreter
@pytest.mark.usefixtures("products")
def test_an_adapter_switched_off_leaves_the_base(monkeypatch):
    model, base = build(ARCHITECTURE), build(ARCHITECTURE)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("lora_B"):
                parameter.zero_()
    tokens = torch.arange(9)
    with torch.no_grad(), model.adapter_disabled():
        off = model.logits(tokens, torch.tensor([0, 9]))
    with torch.no_grad():
        torch.testing.assert_close(off, base.logits(tokens, torch.tensor([0, 9])), rtol=0, atol=1e-5)
        assert (model.logits(tokens, torch.tensor([0, 9])) - off).abs().max() > 1e-2


class MixingKeys:
    """Stands for attention: each token has its own key and value."""

    def __init__(self, angles):
        self.angles = angles.cos(), angles.sin()

    def attend(self, attn, qkv, kept):
        q, k, v = rotated(attn, qkv, self.angles)
        return (q + (k + v).repeat_interleave(q.shape[1] // v.shape[1], 1)).flatten(1)


@pytest.mark.interpreter
@pytest.mark.usefixtures("products")
def test_a_forward_whose_gradient_nobody_wants_leaves_nothing_behind(monkeypatch):
    model, made, plain = build(ARCHITECTURE, activation_checkpointing=False), [], TrainingPass.new

    def watched(self, layer):
        kept = plain(self, layer)
        made.append(weakref.ref(kept))
        return kept

    monkeypatch.setattr(TrainingPass, "new", watched)
    gc.disable()
    try:
        log_probs, _ = model.log_probs(torch.arange(9), torch.tensor([0, 9]), temperature=1.0, mask=torch.arange(9) > 0)
        assert [ref() is not None for ref in made] == [True, True]
        del log_probs, _
        assert [ref() is not None for ref in made] == [False, False]
    finally:
        gc.enable()


def random_rows(model, num_tokens):
    """A block's input, and angles of the rotation."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, model.config.hidden_size, generator=generator).to(model.device, model.dtype)
    return x, torch.rand(num_tokens, model.config.head_dim // 2, generator=generator).to(model.device)


def block_outputs(model, num_tokens, monkeypatch):
    """What every block gives for the same random tokens, by kernels for few rows and by those for many."""
    x, angles = random_rows(model, num_tokens)
    outputs = []
    for most in (512, 0):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(kernels.device, "MAX_FEW_ROWS", most)
            outputs.append([block(x, MixingKeys(angles), None) for block in model.model.layers])
    return list(zip(*outputs))


def watch_few_rows(monkeypatch):
    """The experts' inputs for which their kernels for few rows were called from now on."""
    seen, plain = [], models.experts.few_rows_forward
    monkeypatch.setattr(models.experts, "few_rows_forward", lambda x, *arguments, **settings: seen.append(x)
                        or plain(x, *arguments, **settings))
    return seen


@pytest.mark.interpreter
@pytest.mark.usefixtures("products")
def test_packed_as_nf4_the_block_computes_what_it_does_on_the_same_dense_weights():
    packed, dense = build(ARCHITECTURE, "nf4"), build(ARCHITECTURE, "bf16")
    for block, other in zip(packed.model.layers, dense.model.layers):
        for name in PROJECTIONS:
            weights = torch.stack([block.mlp.experts.dense(name, expert) for expert in range(4)]).transpose(1, 2)
            other.mlp.experts.get_parameter(name).data.copy_(weights)
            assert weights.std() > 0.05
    assert_close(gradients(packed), gradients(dense), 2e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("experts, targets", [("mxfp4", EVERYTHING), ("mxfp4", ["q_proj", "v_proj"]), ("bf16", EVERYTHING),
                                              ("nf4", EVERYTHING)])
def test_a_decode_step_computes_what_training_does(experts, targets, monkeypatch):
    model = build(ARCHITECTURE, experts, targets=targets, trains_more=False, in_fragments=experts == "mxfp4")
    by_few = watch_few_rows(monkeypatch)
    for num_tokens in (1, 19):
        outputs = block_outputs(model, num_tokens, monkeypatch)
        for ours, theirs in outputs:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        with model.adapter_disabled():
            (base, same), *_ = block_outputs(model, num_tokens, monkeypatch)
        torch.testing.assert_close(base, same, rtol=1e-5, atol=1e-5)
        assert (base - outputs[0][0]).abs().max() > 1e-2
    assert [len(x) for x in by_few] == [1] * 4 + [19] * 4  # two layers, with the adapter and without


@pytest.mark.interpreter
@pytest.mark.usefixtures("products")
def test_more_rows_and_weights_in_the_order_of_a_checkpoint_take_the_experts_kernels_for_many(monkeypatch):
    by_few = watch_few_rows(monkeypatch)
    monkeypatch.setattr(kernels.device, "MAX_FEW_ROWS", 4)
    for in_fragments, num_tokens in ((True, 5), (False, 3)):
        x, angles = random_rows(model := build(ARCHITECTURE, in_fragments=in_fragments), num_tokens)
        with torch.no_grad():
            assert model.model.layers[0](x, MixingKeys(angles), None).isfinite().all()
    assert by_few == []


@pytest.mark.interpreter
def test_a_loaded_model_decodes_from_fragments_what_prefill_computes():
    model = load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32)
    model.model.layers = model.model.layers[:2]  # a windowed and a full one
    assert {block.mlp.experts.layout for block in model.model.layers} == {Mxfp4Fragments}
    tokens = torch.arange(3, 9)
    cache, slots = model.new_cache(1, 16), torch.zeros(1, dtype=torch.int64)
    assert cache.reserve(0, 16)
    model.prefill(tokens[:-1], [PrefillChunk(0, 0, 5)], cache)
    logits = model.head(model.decode(tokens[-1:], torch.tensor([5]), cache, slots))
    with torch.no_grad():
        torch.testing.assert_close(logits[0], model.logits(tokens, torch.tensor([0, 6]))[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("start", [0, 9])
def test_a_prefill_of_few_tokens_computes_and_stores_what_others_do(start, monkeypatch):
    model = load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32)
    model.model.layers = model.model.layers[:2]  # a windowed and a full one
    by_few = watch_few_rows(monkeypatch)
    tokens, results = torch.arange(3, 23), []
    for most in (512, 0):
        monkeypatch.setattr(kernels.device, "MAX_FEW_ROWS", most)
        cache = model.new_cache(2, 40)
        assert cache.reserve(0, 20) and cache.reserve(1, 20)
        if start:  # the rest of one sequence
            model.prefill(tokens[:start], [PrefillChunk(1, 0, start)], cache)
            hidden = model.prefill(tokens[start:], [PrefillChunk(1, start, 20)], cache)
        else:
            hidden = model.prefill(tokens, [PrefillChunk(1, 0, 13), PrefillChunk(0, 0, 7)], cache)
        results.append([hidden, *cache.keys[:2], *cache.values[:2]])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours.any()
    assert len(by_few) == len(model.model.layers) * (2 if start else 1)


@pytest.mark.interpreter
def test_a_prefill_as_for_a_graph_computes_and_stores_what_another_does(monkeypatch):
    """Padded to a bucket with idle rows, of a sequence that goes on and one that begins; one layer with a window, one without."""
    model = load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    monkeypatch.setattr(models.decoder, "PREFILL_BUCKETS", (16,))
    monkeypatch.setattr(models.decoder.Decoder, "_replay", lambda decoder, key, function: function())
    first, tokens, results = torch.arange(3, 12), torch.arange(20, 31), []
    chunks = [PrefillChunk(1, 9, 17), PrefillChunk(0, 0, 3)]
    for has_graphs in (True, False):
        monkeypatch.setattr(models.decoder, "can_decode_by_graph", lambda model, has=has_graphs: has)
        cache = model.new_cache(2, 40)
        assert cache.reserve(0, 20) and cache.reserve(1, 20)
        decoder = Decoder(model, cache, max_rows=2, stop_ids=[], counts_prompts_apart=False)
        model.prefill(first, [PrefillChunk(1, 0, 9)], cache)
        hidden, experts = decoder.prefill(tokens, chunks, records=has_graphs)
        assert not has_graphs or experts.shape == (11, 4, 2) and (experts[:, :2] < 4).all()
        results.append([hidden, *cache.keys[:2], *cache.values[:2]])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours.any()


# a layer of gpt-oss-20b with fewer experts
REAL = ARCHITECTURE | {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 1, "num_attention_heads": 64,
                       "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 4,
                       "sliding_window": 128, "layer_types": ["full_attention"], "vocab_size": 64}  # fmt: skip


@pytest.mark.interpreter
def test_a_decode_step_reaches_every_kernel_through_few_calls_and_files(monkeypatch):
    """Of the product's own, from GptOss.decode to launch: at most 10 calls, in at most 5 files."""
    model = build(ARCHITECTURE, targets=EVERYTHING[:4] + ["experts"], trains_more=False, in_fragments=True)
    cache, slots, ways, plain = model.new_cache(1, 16), torch.zeros(1, dtype=torch.int64), set(), kernels.device.launch

    def launch(*arguments, **constants):
        way, frame = ["kernels.device"], sys._getframe(1)
        while frame.f_globals["__name__"] != __name__:
            way += [frame.f_globals["__name__"]] if frame.f_globals["__name__"].startswith(("models.", "kernels.")) else []
            frame = frame.f_back
        ways.add(tuple(way))
        plain(*arguments, **constants)

    for module in [module for name, module in sys.modules.items() if name.startswith("kernels.")]:
        if vars(module).get("launch") is plain:
            monkeypatch.setattr(module, "launch", launch)
    assert cache.reserve(0, 6)
    model.decode(torch.zeros(1, dtype=torch.int64), slots, cache, slots)
    assert len(ways) >= 8
    for way in ways:
        assert len(way) <= 10 and len(set(way)) <= 5, way


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("targets", [EVERYTHING, ["q_proj", "v_proj", "experts"], ["o_proj"]])
@pytest.mark.parametrize("experts", ["mxfp4", "bf16", "nf4"])
def test_a_decode_step_gives_the_bits_of_the_training_forward(experts, targets, monkeypatch):
    model = build(REAL, experts, targets=targets, device="cuda", dtype=torch.bfloat16, trains_more=False,
                  in_fragments=experts == "mxfp4")
    for num_tokens in (1, 7, 17, 64, 200, 512):
        for is_on in (True, False):
            with nullcontext() if is_on else model.adapter_disabled():
                for ours, theirs in block_outputs(model, num_tokens, monkeypatch):
                    differing = (ours != theirs).float().mean()
                    assert torch.equal(ours, theirs), f"{num_tokens} tokens, adapter {is_on}: {differing:.2%} differ"


@pytest.mark.gpu
def test_a_decode_step_runs_in_a_graph():
    model = build(REAL, device="cuda", dtype=torch.bfloat16, trains_more=False, in_fragments=True)
    (block,), x = model.model.layers, torch.randn(7, 2880, device="cuda", dtype=torch.bfloat16)
    keys = MixingKeys(torch.rand(7, 32, device="cuda"))

    def step():
        return block(x, keys, None)

    with torch.no_grad():
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()
        for _ in range(3):  # other tokens go to other experts; adapters train in place
            x.normal_()
            for parameter in model.trainable_parameters().values():
                parameter.mul_(1.1)
            graph.replay()
            assert torch.equal(y, step())


@pytest.mark.gpu
@pytest.mark.parametrize("experts, targets", [("mxfp4", EVERYTHING), ("nf4", EVERYTHING), ("bf16", None)])
def test_on_a_gpu_gradients_are_those_of_autograd(experts, targets, monkeypatch):
    lengths = (70, 1, 130, 33)
    model = build(WIDE, experts, targets=targets, device="cuda", activation_checkpointing=True)
    assert_close(gradients(model, lengths=lengths), by_autograd(model, monkeypatch, lengths=lengths), 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("experts, targets", [("mxfp4", EVERYTHING), ("bf16", None)])
def test_in_bf16_gradients_are_as_near_to_float64_as_those_of_autograd(experts, targets, monkeypatch):
    model = build(WIDE, experts, targets=targets, device="cuda", dtype=torch.bfloat16, activation_checkpointing=True,
                  trains_more=False)
    # over several batches: the router's gradients are sums of terms that cancel, whose error in one batch is a matter of luck
    norms, our_errors, their_errors = Counter(), Counter(), Counter()
    for seed in range(3, 11):
        settings = {"lengths": (70, 1, 130, 33), "seed": seed}
        ours, theirs = gradients(model, **settings), by_autograd(model, monkeypatch, **settings)
        for name, expected in by_autograd(model, monkeypatch, dtype=torch.float64, **settings).items():
            for total, difference in ((norms, expected), (our_errors, ours[name].double() - expected),
                                      (their_errors, theirs[name].double() - expected)):
                total[name] += difference.double().norm().item() ** 2
    for name, norm in norms.items():
        our_error, their_error = ((errors[name] / norm) ** 0.5 for errors in (our_errors, their_errors))
        assert our_error <= 2 * their_error + 1e-3, (name, our_error, their_error)


@pytest.mark.gpu
@pytest.mark.parametrize("place", list(Place))
@pytest.mark.parametrize("name", ["x", *NAMES])
def test_where_an_activation_waits_changes_no_bit(place, name, monkeypatch):
    """One activation of every layer there, the rest on the GPU; two batches, so that memory is used again."""
    if name == "x" and place == Place.recompute:
        pytest.skip("a block's input cannot be computed again")
    model = build(WIDE, device="cuda", dtype=torch.bfloat16, activation_checkpointing=True, host_gb=0.1)
    lengths = (70, 1, 130, 33)
    whole = gradients(model, lengths=lengths)
    monkeypatch.setattr(models.offload, "CHUNK_TOKENS", 100)
    expected = gradients(model, lengths=lengths)
    assert torch.equal(expected["log_probs"], whole["log_probs"])
    assert_close(expected, whole, 2e-2)
    plain = MemoryBudget.plan

    def planned(self, *arguments, **settings):
        result = plain(self, *arguments, **settings)
        result.layers = [models.offload.everything(Place.gpu) | {name: place} for _ in result.layers]
        self.store.reserve(8_000_000)
        result.max_pending_bytes = 100_000
        return result

    monkeypatch.setattr(MemoryBudget, "plan", planned)
    monkeypatch.setattr(models.host_store, "_SLAB", 1 << 16)  # tensors lie across several slabs
    for _ in range(2):
        ours = gradients(model, lengths=lengths)
        assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert model.memory.store.num_held == 0


class OnGpu:
    """Stands for a gradient there."""

    is_cuda, device = True, torch.device("cuda")


@pytest.mark.parametrize("memory_gb, reserved, largest, emptied",
                         [(10.0, 9_900_000_000, 400_000_000, 0), (10.0, 10_100_000_000, 400_000_000, 1),
                          (10.0, 9_900_000_000, 600_000_000, 1),
                          (None, 16_900_000_000, 800_000_000, 0), (None, 17_100_000_000, 800_000_000, 1),
                          (None, 16_900_000_000, 900_000_000, 1)])
def test_a_backward_begins_without_holes_where_tensors_are_large_or_the_budget_is_passed(memory_gb, reserved, largest, emptied,
                                                                                         monkeypatch):
    """The budget without memory_gb is 85% of a GPU of 20 GB; large is what takes more than 5% of it."""
    calls = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=20_000_000_000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    for recomputes, grad in ((True, OnGpu()), (False, OnGpu()), (True, torch.zeros(1))):
        memory = MemoryBudget(None, recomputes=recomputes, memory_gb=memory_gb, host_gb=0.0)
        memory._largest_bytes = largest
        memory.before_backward(grad)
        assert (memory._margin > 0.04) == (recomputes and grad.is_cuda and reserved > 1e9 * (memory_gb or 17.0))
        assert len(calls) == emptied  # the latter two add none: nothing was kept for want of memory, or no GPU


@pytest.mark.gpu
def test_the_embedding_may_lie_in_host_memory():
    model, other = (build(WIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = other.model.embed_tokens.weight
    other.model.embed_tokens.weight = torch.nn.Parameter(weight.detach().cpu().pin_memory(), requires_grad=False)
    ours, theirs = gradients(other), gradients(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
