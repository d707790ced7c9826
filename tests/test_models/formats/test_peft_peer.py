"""What PEFT writes for gpt-oss either gives PEFT's log-probs here or is refused by the name of the setting.

PEFT runs in a process of its own: the interpreter in GRPO_PEER_PYTHON, or this one, if it has transformers and peft.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import BF16, load

from models.formats.files import CheckpointError
from models.formats.peft import load_adapter

HERE = Path(__file__).parent
IDS = torch.randint(0, 384, (1, 24), generator=torch.Generator().manual_seed(0))
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora(*, convert=False, save=None, **settings):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **settings}
    return {"type": "LoraConfig", "settings": settings, "convert": convert, "save": save or {}}


LOADED = {
    "plain": lora(),
    "untrained_B": lora(init_lora_weights=False),
    "gaussian": lora(init_lora_weights="gaussian"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "eva": lora(init_lora_weights="eva"),
    "mica": lora(init_lora_weights="mica"),
    "task_type": lora(task_type="CAUSAL_LM", lora_dropout=0.1, revision="main"),
    "all_linear": lora(target_modules="all-linear"),
    "unsloth_list": lora(target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"]),
    "regex": lora(target_modules=r".*layers\.[02]\.self_attn\.(q|o)_proj"),
    "one_module": lora(target_modules=["model.layers.2.self_attn.k_proj"]),
    "some_layers": lora(layers_to_transform=[1, 3]),
    "one_layer": lora(layers_to_transform=2, layers_pattern="layers"),
    "excluded": lora(target_modules=ATTENTION, exclude_modules=["layers.0.self_attn.q_proj", "v_proj"]),
    "excluded_regex": lora(target_modules="all-linear", exclude_modules=r".*\.3\..*"),
    "experts": lora(target_parameters=EXPERTS),
    "experts_alone": lora(target_modules=[], target_parameters=EXPERTS[::-1]),
    "gate_up_alone": lora(target_modules=None, target_parameters=EXPERTS[:1]),
    "down_alone": lora(target_modules=["o_proj"], target_parameters=EXPERTS[1:]),
    "cookbook": lora(target_parameters=[f"{layer}.{name}" for layer in (1, 3) for name in EXPERTS]),
    "halves_by_layer": lora(target_parameters=[f"0.{EXPERTS[0]}", f"1.{EXPERTS[1]}", f"layers.2.{EXPERTS[0]}"]),
    "router": lora(target_parameters=["mlp.router.weight"]),
    "weight_of_q": lora(target_modules=["k_proj"], target_parameters=["2.self_attn.q_proj.weight"], alpha_pattern={
        r".*q_proj\.weight": 20}),
    "rslora": lora(use_rslora=True, target_parameters=EXPERTS),
    "rank_pattern": lora(rank_pattern={"q_proj": 2, "layers.1.self_attn.k_proj": 7}, target_parameters=EXPERTS),
    "rank_pattern_of_experts": lora(rank_pattern={"experts.down_proj": 2, "1.mlp.experts.gate_up_proj": 6},
                                    target_parameters=EXPERTS),
    "alpha_pattern": lora(alpha_pattern={"v_proj": 3, r"layers\.[01]\.mlp\.experts\.gate_up_proj": 32},
                          target_parameters=EXPERTS),
    "rslora_and_patterns": lora(use_rslora=True, rank_pattern={"k_proj": 9}, alpha_pattern={"k_proj": 5.5}),
    "pissa_converted": lora(init_lora_weights="pissa", convert=True),
    "olora_converted": lora(init_lora_weights="olora", convert=True),
}  # fmt: skip
REFUSED = {
    "pissa": (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "pissa_niter": (lora(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    "olora": (lora(init_lora_weights="olora"), "init_lora_weights='olora'"),
    "dora": (lora(use_dora=True), "use_dora"),
    "biases": (lora(bias="all"), "bias='all'"),
    "lora_biases": (lora(bias="lora_only"), "bias='lora_only'"),
    "bias_of_B": (lora(lora_bias=True), "lora_bias"),
    "saved_head": (lora(modules_to_save=["lm_head"]), "modules_to_save"),
    "saved_norms": (lora(modules_to_save=["input_layernorm"]), "modules_to_save"),
    "tokens": (lora(trainable_token_indices=[3, 5]), "trainable_token_indices"),
    "head": (lora(target_modules=["q_proj", "lm_head"]), "target_modules.*lm_head"),
    "embedding": (lora(target_modules=["q_proj", "embed_tokens"]), "target_modules.*embed_tokens"),
    "everything_by_regex": (lora(target_modules=r".*(proj|lm_head)"), "target_modules.*lm_head"),
    "expert_biases": (lora(target_parameters=["mlp.experts.gate_up_proj_bias"]), "target_parameters.*gate_up_proj_bias"),
    "saved_embedding": (lora(save={"save_embedding_layers": True}), r"not used: .*embed_tokens\.weight"),
    "velora": (lora(velora_config={"num_groups": 4}), "velora_config"),
    "monteclora": (lora(monteclora_config={"num_samples": 2}), "monteclora_config"),
    "kasa": (lora(kasa_config={"beta": 1e-4}), "kasa_config"),
    "alora": (lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"), "alora_invocation_tokens"),
    "ia3": ({"type": "IA3Config", "settings": {"target_modules": ["k_proj"], "feedforward_modules": []}}, "peft_type='IA3'"),
    "loha": ({"type": "LoHaConfig", "settings": {"target_modules": ["q_proj"]}}, "peft_type='LOHA'"),
    "lokr": ({"type": "LoKrConfig", "settings": {"target_modules": ["q_proj"]}}, "peft_type='LOKR'"),
    "oft": ({"type": "OFTConfig", "settings": {"target_modules": ["q_proj"]}}, "peft_type='OFT'"),
    "vera": ({"type": "VeraConfig", "settings": {"target_modules": ["q_proj"]}}, "peft_type='VERA'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of the adapters, PEFT's log-probs by name, and what PEFT could not make."""
    python = os.environ.get("GRPO_PEER_PYTHON", sys.executable)
    probe = "import importlib.util as u, sys; sys.exit(not (u.find_spec('transformers') and u.find_spec('peft')))"
    if subprocess.run([python, "-c", probe], cwd="/", capture_output=True).returncode:
        pytest.skip(f"{python} has no transformers and peft; set GRPO_PEER_PYTHON to one that has")
    folder = tmp_path_factory.mktemp("adapters")
    adapters = LOADED | {name: job for name, (job, _) in REFUSED.items()}
    jobs = {"base": str(BF16), "input_ids": IDS.tolist(), "adapters": adapters}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, HERE / "peer_adapters.py", folder / "jobs.json", folder]
    done = subprocess.run(command, cwd=folder, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, load_file(folder / "log_probs.safetensors"), json.loads((folder / "refused.json").read_text())


def log_probs_of(model):
    bounds = torch.tensor([0, IDS.numel()], dtype=torch.int32)
    with torch.no_grad():
        return model.logits(IDS.flatten(), bounds).log_softmax(-1)


@pytest.mark.parametrize("name", LOADED)
def test_an_adapter_that_peft_wrote_gives_its_log_probs(written, name):
    folder, theirs, unmade = written
    assert name in theirs, unmade.get(name)
    model = load(BF16)
    before = log_probs_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about layers that the adapter leaves out
        load_adapter(model, folder / name)
    torch.testing.assert_close(log_probs_of(model), theirs[name][0], rtol=0, atol=1e-4)
    assert (before - theirs[name][0]).abs().max() > 0.02  # the adapter does something


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_peft_wrote_is_refused_by_the_name_of_the_setting(written, name):
    folder, _, unmade = written
    if not (folder / name / "adapter_config.json").exists():
        pytest.skip(f"this PEFT does not write it: {unmade.get(name)}")
    with pytest.raises(CheckpointError, match=REFUSED[name][1]):
        load_adapter(load(BF16), folder / name)
