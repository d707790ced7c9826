"""The reference that a KL penalty compares with: what it holds, how it takes the policy's place, and that a run keeps it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from grpo.config import ConfigError
from grpo.configuration.algorithm import Estimator, KlConfig
from grpo.configuration.launch import load_config
from grpo.kl import Reference, check_estimator
from models.config import GptOssConfig
from models.gpt_oss import GptOss
from models.lora import LoraConfig, attach_lora, set_full_training

TOKENS, BOUNDS = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([0, 5], dtype=torch.int32)
LORA = LoraConfig(2, 4.0, ["q_proj", "k_proj", "v_proj", "experts"], train_sinks=True, train_norms=True)


def build_policy(lora: LoraConfig | None) -> GptOss:
    config = GptOssConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2, sliding_window=4,
                          layer_types=["sliding_attention", "full_attention"])
    policy = GptOss(config, dtype=torch.float32, device="cpu", experts="bf16")
    policy.init_weights(seed=1)
    set_full_training(policy) if lora is None else attach_lora(policy, lora, seed=2)
    return policy


@torch.no_grad()
def move(policy: GptOss) -> None:
    for parameter in policy.trainable_parameters().values():
        parameter += 0.1


def logits(policy: GptOss) -> torch.Tensor:
    with torch.no_grad():
        return policy.logits(TOKENS, BOUNDS)


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "full"])
@pytest.mark.parametrize("is_loaded", [True, False], ids=["moved", "fresh"])
def test_the_reference_is_the_policy_as_it_was_and_leaves_the_policy_as_it_is(lora, is_loaded):
    policy = build_policy(lora)
    if is_loaded:
        move(policy)
    start, reference = logits(policy), Reference.of(policy)
    move(policy)
    moved, places = logits(policy), [parameter.data_ptr() for parameter in policy.parameters()]
    assert (moved - start).abs().max() > 0.01
    again = Reference.load({"param.x": torch.zeros(1)} | reference.state_dict(), policy)
    for held in (reference, again):
        with pytest.raises(KeyError), held.in_place_of(policy):
            assert torch.equal(logits(policy), start)
            raise KeyError
        assert torch.equal(logits(policy), moved)
        assert [parameter.data_ptr() for parameter in policy.parameters()] == places  # a CUDA graph reads them there


def test_an_adapter_that_adds_nothing_takes_no_memory():
    policy = build_policy(LORA)
    kept = Reference.of(policy).tensors
    assert sorted({name.rpartition(".")[2] for name in kept}) == ["sinks", "weight"]  # of norms
    move(policy)
    assert Reference.of(policy).tensors.keys() == policy.trainable_parameters().keys()
    assert Reference.of(build_policy(LoraConfig(2, 4.0, ["q_proj"]))).tensors == {}


RUN = ("+experiment=smoke", "env._target_=spread.Spread", "name=run", "model.train=lora", "eval.at_start=false", "eval.every=0",
       "eval.at_end=false", "rollout.max_new_tokens=6", "kl.coefficient=0.3", "optim.lr=0.02", "checkpoint.every=1")
SETTINGS = "rank:2,alpha:4,targets:[q_proj,v_proj,experts],train_norms:true,train_sinks:true"


@pytest.fixture(scope="module")
def train(entry_points, spread_folder, tmp_path_factory):
    """Runs that start with an adapter (the result of another run) and a warm-up, or without either."""
    folder = tmp_path_factory.mktemp("first")

    def start(output_dir, *arguments, adapter=None):
        lora = f"+model.lora={{{SETTINGS},adapter:{adapter or 'null'}}}"
        done = entry_points.run("grpo.train", *RUN, lora, f"output_dir={output_dir}", *arguments, path=(spread_folder,),
                                writes_report=False)
        assert done.code == 0, done.err
        rows = [json.loads(line) for line in (output_dir / "run/metrics.jsonl").read_text().splitlines()]
        return done.out, [row for row in rows if "kl" in row]

    start(folder, "warmup=null")
    start.adapter = folder / "run/adapter"
    return start


def test_a_run_is_held_to_where_it_starts_after_a_loaded_adapter_and_a_warm_up(train, tmp_path):
    out, rows = train(tmp_path, adapter=train.adapter)
    assert "kl       0.3 x k3 to the policy as GRPO starts, whose copy of what trains takes up to " in out
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["kl"] == 0 and rows[1]["kl"] > 1e-4


@pytest.mark.parametrize("warmup", ["warmup=null", "warmup.steps=4"])
def test_the_base_is_the_model_before_adapter_and_warm_up_where_it_is_asked_for(train, tmp_path, warmup):
    out, rows = train(tmp_path, "kl.reference=base", warmup, adapter=train.adapter if warmup == "warmup=null" else None)
    assert "kl       0.3 x k3 to the base model" in out
    assert rows[0]["kl"] > 2e-5


def test_the_base_has_its_own_norms_and_sinks_though_those_of_the_adapter_stay_frozen(train, tmp_path):
    frozen = ("kl.reference=base", "warmup=null", "model.lora.train_norms=false", "model.lora.train_sinks=false")
    at_start = [train(tmp_path / str(i), *more, "steps=1", adapter=train.adapter)[1][0]["kl"]
                for i, more in enumerate([frozen[:2], frozen])]
    assert at_start[0] == at_start[1] > 1e-4


@pytest.mark.parametrize("estimator", ["k3", "full"])
def test_a_fully_trained_policy_has_a_reference_too(entry_points, spread_folder, tmp_path, estimator):
    done = entry_points.run("grpo.train", *RUN, "model.train=full", f"kl.estimator={estimator}", f"output_dir={tmp_path}",
                            path=(spread_folder,), writes_report=False)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["kl"] for row in rows if "kl" in row][0] == 0  # the reference is the policy: exactly
    assert [row["kl"] > 1e-4 for row in rows if "kl" in row] == [False, True]


def test_a_resumed_run_is_held_to_the_same_reference_without_the_adapter_and_the_cache_it_came_from(train, tmp_path):
    adapter, cache = tmp_path / "adapter", tmp_path / "cache"
    shutil.copytree(train.adapter, adapter)
    _, whole = train(tmp_path / "whole", "steps=3", f"warmup.cache_dir={cache}", adapter=adapter)
    train(tmp_path / "parts", "steps=1", f"warmup.cache_dir={cache}", adapter=adapter)
    shutil.rmtree(adapter)
    shutil.rmtree(cache)
    _, parts = train(tmp_path / "parts", "steps=3", "resume=true", f"warmup.cache_dir={cache}", adapter=adapter)
    for name in ("kl", "num_tokens", "lr", "loss", "grad_norm"):
        assert [row[name] for row in parts] == [row[name] for row in whole], name
    assert whole[2]["kl"] > 1e-4 and whole[2]["num_tokens"] > whole[1]["num_tokens"] > whole[0]["num_tokens"]
    tensors = [load_file(tmp_path / name / "run/checkpoints/step_000003/tensors.safetensors") for name in ("whole", "parts")]
    assert any(name.startswith("reference.") for name in tensors[0])
    assert tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_the_full_kl_is_a_penalty_of_the_loss_only():
    with pytest.raises(ConfigError, match=r"kl.estimator = 'full': its gradient is one of the loss, .* set kl.place=loss"):
        load_config("train", ["kl.estimator=full", "kl.coefficient=0.1", "kl.place=reward"])


def test_the_full_kl_without_a_penalty_is_refused_as_nothing_would_compute_it():
    with pytest.raises(ConfigError, match=r"kl.estimator = 'full': changes nothing without kl.coefficient above 0"):
        load_config("train", ["kl.estimator=full"])
    assert load_config("train", ["kl.estimator=full", "kl.coefficient=0.1"]).kl.is_full
    load_config("train", ["loss=reinforce_plus_plus_baseline", "kl.coefficient=0"])  # its k2 was nobody's wish


def test_an_estimator_that_float16_cannot_have_is_refused():
    check_estimator(KlConfig(0.1, Estimator.full), torch.bfloat16)
    check_estimator(KlConfig(0.0, Estimator.full), torch.float16)
    with pytest.raises(ConfigError, match=r"kl.estimator = 'full': its gradient would underflow in float16.*set kl.estimator=k2"):
        check_estimator(KlConfig(0.1, Estimator.full), torch.float16)
