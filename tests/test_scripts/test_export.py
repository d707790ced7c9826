"""scripts/export.py on a run that trained an adapter: alone, merged, as folders for the hub, and refused requests."""

import json
import shutil
from functools import partial

import pytest
import torch
import yaml
from paths import FIXTURES, ROOT
from tiny_models import BF16, golden, load
from tiny_models import LORA as ADAPTER
from tiny_models import logits_of as tiny_logits

from grpo.config import read_saved_config
from grpo.run.model_card import Origin, hub_id, model_card
from grpo.run.policy import load_run_policy
from models.formats.hugging_face import load_model
from models.formats.peft import load_adapter, read_adapter_config, save_adapter
from models.lora import LoraConfig, attach_lora


@pytest.fixture(scope="module")
def run_dir(entry_points, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    lora = "+model.lora={rank:4,alpha:12,targets:[q_proj,experts,router],train_norms:true,train_sinks:true}"
    done = entry_points.run("grpo.train", "+experiment=smoke", f"output_dir={folder}", "name=adapted", "model.train=lora", lora,
                            "optim.lr=0.05", writes_report=False)
    assert done.code == 0, done.err
    return folder / "adapted"


@pytest.fixture
def export(entry_points):
    return partial(entry_points.run, "export", path=(ROOT / "scripts",))


def logits_of(model):
    with torch.no_grad():
        return model.logits(torch.arange(40), torch.tensor([0, 40], dtype=torch.int32))


def policy_of(run_dir):
    return load_run_policy(run_dir, step=None, device=torch.device("cpu"), dtype=torch.float32)[0]


def test_a_merged_export_is_the_policy_of_the_run(export, run_dir, tmp_path):
    done = export(run_dir, tmp_path / "out", "--merge", "--dtype", "float32")
    assert done.code == 0, done.err
    policy = policy_of(run_dir)
    merged = logits_of(load_model(tmp_path / "out", device="cpu", dtype=torch.float32))
    torch.testing.assert_close(merged, logits_of(policy), rtol=0, atol=1e-4)
    with policy.adapter_disabled():
        assert (logits_of(policy) - merged).abs().max() > 0.01  # the adapter was there to merge
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run_dir / "tokenizer" / name).read_bytes()


def test_an_export_without_merge_is_the_adapter_that_the_run_wrote(export, run_dir, tmp_path):
    done = export(run_dir, tmp_path / "out")
    assert done.code == 0, done.err
    assert "left out: a chat template (the tokenizer brings none); trained norms and sinks" in done.out
    assert "the base, weights drawn from a seed (--merge writes them too)" in done.out.strip().splitlines()[-1]
    assert read_adapter_config(tmp_path / "out") == read_adapter_config(run_dir / "adapter")
    for name in ("adapter_model.safetensors", "trained_weights.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (run_dir / "adapter" / name).read_bytes()
    policy = policy_of(run_dir)
    expected = logits_of(policy)
    for parameter in policy.trainable_parameters().values():
        parameter.data.fill_(0.5)
    assert not torch.equal(logits_of(policy), expected)
    load_adapter(policy, tmp_path / "out")
    assert torch.equal(logits_of(policy), expected)


# ---- a run on a checkpoint with everything that the hub's folders hold


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint as the hub cache holds it: models--ORG--NAME/snapshots/REVISION."""
    folder = tmp_path_factory.mktemp("hub") / "models--team--tiny-oss/snapshots/0123"
    shutil.copytree(FIXTURES / "tiny_mxfp4", folder)
    for path in (FIXTURES / "tokenizer_brief").iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5], "temperature": 0.75}')
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\ntags: [x]\n---\n# tiny\n")
    return folder


REWARD = """
def even(completion_ids, **columns):
    return [sum(token % 2 for token in ids) / (1 + len(ids)) for ids in completion_ids]
"""
LORA = "+model.lora={rank:4,alpha:12,targets:[q_proj,experts],train_norms:true,train_sinks:false}"


@pytest.fixture(scope="module")
def hub_run(entry_points, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rewards.py").write_text(REWARD)
    done = entry_points.run(
        "grpo.train", "+experiment=smoke", f"output_dir={folder}", "name=tuned", "model.train=lora", LORA, "optim.lr=0.05",
        f"model.path={base}", "model.architecture=null", "warmup=null", "model.experts=auto", "env=dataset",
        f"env.path={FIXTURES / 'arithmetic.jsonl'}", "env.held_out_fraction=0.5", "env.instructions=Be brief.",
        "env.reasoning_effort=high", f"env.rewards=[{{fn: {folder / 'rewards.py'}:even}}]", "env.dry_run=false",
        "rollout.max_new_tokens=6", "eval.at_end=true", "eval.max_prompts=2", writes_report=False)
    assert done.code == 0, done.err
    return folder / "tuned", done.out


def front_matter(folder):
    text = (folder / "README.md").read_text()
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


KEPT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def test_a_run_ends_with_an_adapter_as_the_hub_expects_it(hub_run, base):
    folder = hub_run[0] / "adapter"
    assert {name: (folder / name).read_bytes() for name in KEPT} == {name: (base / name).read_bytes() for name in KEPT}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "team/tiny-oss"
    matter, body = front_matter(folder)
    assert matter == {"base_model": "team/tiny-oss", "base_model_relation": "adapter", "library_name": "peft",
                      "license": "other", "license_name": "tiny", "pipeline_tag": "text-generation",
                      "tags": ["gpt_oss", "grpo", "reinforcement-learning", "lora"]}
    for row in ("| run | tuned |", "| steps | 2 of 2 |", "| trained | LoRA of rank 4, alpha 12, on q_proj, experts; norms |",
                "| loss | ppo, normalizer token, clip_low 0.2, clip_high 0.28 |",
                "| learning rate | 0.05, linear |", "| path | arithmetic.jsonl (local) |",
                "| held_out_fraction | 0.5 |", "| rewards | rewards.py:even, weight 1.0 |", "| reasoning_effort | high |",
                "| instructions | Be brief. |", "| current_date | 2025-08-05 |"):
        assert row in body.splitlines(), row
    assert "PeftModel.from_pretrained" in body and "torch " in body and "(step 2) |" in body
    assert str(base) not in body and str(hub_run[0]) not in body  # nothing of this machine
    assert "- trained norms and sinks (in trained_weights.safetensors" in body
    last = hub_run[1].strip().splitlines()[-1]
    assert "a PEFT adapter; left out: trained norms and sinks" in last


def test_a_card_takes_the_settings_of_any_environment(hub_run, tmp_path):
    config = read_saved_config(hub_run[0] / "config.yaml")
    config.env = {"_target_": "mine.Env", "rewards": [{"weight": None}, 3, "a.py:b"], "path": ["a/b", "/data/x|y.csv"],
                  "instructions": "two\nlines", "split": 7}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": null, "eval/note": "text", "eval/avg@1": 0.25}\n')
    card = model_card(Origin("a/b", config=config, run_dir=tmp_path, step=1), None, [], is_adapter=False, is_merged=False)
    assert "datasets:\n- a/b\n" in card and "| path | a/b, x\\|y.csv (local) |" in card
    assert "| rewards | None, weight None; 3, weight 1.0; a.py:b, weight 1.0 |" in card
    assert "| instructions | two lines |" in card and "| eval/avg@1 | 0.250 (step 1) | 0.250 (step 1) |" in card
    assert "eval/note" not in card and "| reward |" not in card


def test_a_later_export_of_the_run_is_the_same_as_its_own(export, hub_run, tmp_path):
    done = export(hub_run[0], tmp_path / "out")
    assert done.code == 0, done.err
    own = {path.name: path.read_bytes() for path in (hub_run[0] / "adapter").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == own
    assert "left out: trained norms and sinks" in done.out.strip().splitlines()[-1]


def test_a_merged_export_keeps_packed_experts_and_says_where_their_adapter_is(export, hub_run, base, tmp_path):
    done = export(hub_run[0], tmp_path / "out", "--merge")
    assert done.code == 0, done.err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in KEPT} == {
        name: (base / name).read_bytes() for name in KEPT}
    assert "left out: the experts' adapter (in expert_adapter/" in done.out.strip().splitlines()[-1]
    matter, body = front_matter(tmp_path / "out")
    assert (matter["library_name"], matter["base_model_relation"]) == ("transformers", "finetune")
    assert "- the experts' adapter" in body and "PeftModel" not in body
    described = json.loads((tmp_path / "out/expert_adapter/adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tmp_path / "out")


@pytest.mark.parametrize("experts, form", [("bf16", "bf16"), ("mxfp4", "mxfp4")])
def test_an_adapter_on_packed_experts_merges_into_the_original_layout(export, hub_run, tmp_path, experts, form):
    refused = export(hub_run[0], tmp_path / "out", "--merge", "--layout", "original")
    assert refused.code == 1 and "--experts bf16" in refused.err
    done = export(hub_run[0], tmp_path / "out", "--merge", "--layout", "original", "--experts", experts)  # as it advises
    assert done.code == 0, done.err
    assert "left out: tokenizer and generation settings" in done.out.strip().splitlines()[-1]
    model = load_model(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert model.expert_format.name == form
    if form == "bf16":  # packing rounds more than a short run changes
        again = export(hub_run[0], tmp_path / "hf", "--merge", "--experts", experts)
        assert again.code == 0, again.err
        expected = logits_of(load_model(tmp_path / "hf", device="cpu", dtype=torch.float32))
        assert torch.equal(logits_of(model), expected)
        with (policy := policy_of(hub_run[0])).adapter_disabled():
            assert (logits_of(policy) - expected).abs().max() > 1


def test_an_export_is_uploaded_with_its_card(export, hub_run, tmp_path):
    """The script's own steps; tests/test_grpo/run/test_hub.py has the upload itself."""
    before = """
import grpo.run.hub
grpo.run.hub.push = lambda folder, name, private: f"{name} {private} {sorted(path.name for path in folder.iterdir())[0]}"
"""
    done = export(hub_run[0], tmp_path / "out", "--push", "team/tuned", "--private", before=before, HF_TOKEN="hf_x")
    assert done.code == 0, done.err
    assert done.out.strip().splitlines()[-1] == "uploaded to team/tuned True README.md"
    matter, body = front_matter(tmp_path / "out")
    assert 'PeftModel.from_pretrained(model, "team/tuned")' in body and body.strip().startswith("# tuned")
    refused = export(hub_run[0], tmp_path / "other", "--push", "tuned", HF_TOKEN="hf_x")
    assert refused.code == 1 and "expected ORGANISATION/NAME" in refused.err and not (tmp_path / "other").exists()


def test_a_local_base_is_named_by_its_absolute_path_or_by_the_id_that_is_given(export, base, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(base, plain)
    (plain / "tokenizer.json").unlink()
    adapter = tmp_path / "adapter"
    model = load_model(plain, device="cpu", dtype=torch.float32)
    attach_lora(model, LoraConfig(rank=2, alpha=4.0, targets=["q_proj"]), seed=0)
    save_adapter(model, adapter)
    done = export("plain", tmp_path / "out", "--adapter", adapter, folder=tmp_path)
    assert done.code == 0, done.err
    assert "left out: a tokenizer (the source has none; --tokenizer FOLDER adds one)" in done.out
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(plain)
    assert "base_model" not in front_matter(tmp_path / "out")[0]  # the hub takes ids alone there
    done = export("plain", tmp_path / "named", "--adapter", adapter, "--base", "openai/gpt-oss-20b", folder=tmp_path)
    assert done.code == 0, done.err
    assert front_matter(tmp_path / "named")[0]["base_model"] == "openai/gpt-oss-20b"
    named = json.loads((tmp_path / "named/adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == "openai/gpt-oss-20b"


@pytest.mark.parametrize("source, expected", [
    ("openai/gpt-oss-20b", "openai/gpt-oss-20b"), ("/nowhere/model", None), ("model", None),
    ("{tmp}/models--org--a--b/snapshots/12", "org/a--b"), ("{tmp}/plain", None),
])  # fmt: skip
def test_the_hub_id_of_a_base_is_read_off_its_name_or_its_place_in_the_cache(tmp_path, source, expected):
    for folder in ("models--org--a--b/snapshots/12", "plain"):
        (tmp_path / folder).mkdir(parents=True)
    assert hub_id(source.format(tmp=tmp_path)) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [(["--step", "99"], "99"), (["--experts", "bf16"], "add --merge"), (["--adapter", "x"], "a run has its own")],
)
def test_requests_that_make_no_sense_end_in_one_line(export, run_dir, tmp_path, arguments, message):
    done = export(run_dir, tmp_path / "out", *arguments)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_merges_into_the_checkpoint_that_it_belongs_to(export, tmp_path):
    done = export(BF16, tmp_path / "merged", "--adapter", ADAPTER, "--merge", "--dtype", "float32")
    assert done.code == 0, done.err
    expected, merged = golden(ADAPTER), load(tmp_path / "merged")
    torch.testing.assert_close(tiny_logits(merged, expected["input_ids"]), expected["logits"], rtol=0, atol=1e-4)
    done = export(BF16, tmp_path / "again", "--merge")
    assert done.code == 1 and done.err.startswith("export: ") and "no adapter to merge" in done.err
