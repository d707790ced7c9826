"""The comparison script on the golden fixtures, and that it notices what is wrong."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from paths import FIXTURES, ROOT
from safetensors.torch import load_file, save_file

BF16, MXFP4, LORA = FIXTURES / "tiny_bf16", FIXTURES / "tiny_mxfp4", FIXTURES / "tiny_bf16_lora"
DIFFERENCES = (
    "logits_max_abs",
    "packed_max_abs",
    "pad_left_max_abs",
    "pad_right_max_abs",
    "router_max_abs",
    "entropy_max_abs",
    "gen_logprob_max_abs",
)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import compare_logits

    return compare_logits


@pytest.fixture
def run(script, monkeypatch, capsys):
    """The script on arguments, in this process: what it printed, and the message it ended with or None."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare_logits.py", *map(str, arguments)])
        try:
            script.main()
        except SystemExit as stop:
            return capsys.readouterr().out, stop.code
        return capsys.readouterr().out, None

    return call


@pytest.fixture
def result_of(run):
    def call(*arguments):
        out, message = run(*arguments)
        assert message is None and len(out.splitlines()) == 1
        return json.loads(out)

    return call


def compared(script, checkpoint, tensors, adapter=None):
    return script.compare(str(checkpoint), tensors, adapter=adapter, device="cpu", dtype=torch.float32)


def changed_copy(tmp_path, change):
    """The dense fixture with other tensors."""
    shutil.copytree(BF16, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("golden*", "model*"))
    tensors = load_file(BF16 / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "checkpoint/model.safetensors")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("folder, num_gradients", [(BF16, 24), (MXFP4, 25)])
def test_the_fixtures_agree_with_transformers(result_of, folder, num_gradients):
    result = result_of(folder, folder / "golden.safetensors")
    assert all(result[key] <= 1e-4 for key in DIFFERENCES), result
    # the golden numbers were made on another CPU: transformers itself differs from them by 1.3e-5 at T = 0.7 here
    assert result["logprob_max_abs_t1"] <= 1e-5 and result["logprob_max_abs"] <= 2e-5
    assert result["logprob_max_abs"] == max(result["logprob_max_abs_t1"], result["logprob_max_abs_t0.7"])
    assert result["greedy_equal"] is True and result["route_flips"] == 0
    assert result["grad_max_rel"] <= 1e-4 and result["grad_num_tensors"] == num_gradients
    assert result["grad_not_compared"] == [] and result["grad_max_rel_tensor"].startswith("model.")
    assert result["objective_rel"] <= 1e-5
    if folder == MXFP4:
        assert result["experts"] == "mxfp4" and result["experts_grad"] == "bf16"
        assert result["grad_packed_max_rel"] <= 1e-4 and result["grad_packed_num_tensors"] == num_gradients - 2
        assert result["dequant_max_abs"] == 0


def test_the_adapter_fixture_agrees_with_peft(result_of):
    result = result_of(BF16, LORA, "--adapter", LORA)
    assert result["logits_max_abs"] <= 1e-4 and result["grad_max_rel"] <= 1e-4
    assert result["grad_num_tensors"] == 24 and result["grad_not_compared"] == []
    assert result["grad_max_rel_tensor"].startswith("base_model.model.model.layers.")
    without = result_of(BF16, LORA)
    assert without["logits_max_abs"] > 1 and "grad_max_rel" not in without


def test_a_wrong_weight_shows_in_every_figure(script, tmp_path):
    def change(tensors):
        tensors["model.layers.1.self_attn.sinks"] -= 20  # no sink in one layer

    result = compared(script, changed_copy(tmp_path, change), script.read_golden(BF16))
    assert all(result[key] > 0.01 for key in DIFFERENCES), result
    assert result["logprob_max_abs"] > 0.1 and result["grad_max_rel"] > 0.1 and not result["greedy_equal"]


def test_a_wrong_gradient_is_named(script):
    golden = script.read_golden(BF16)
    name = "model.layers.2.self_attn.o_proj.bias"
    golden[f"grad.{name}"] = -golden[f"grad.{name}"]
    result = compared(
        script, BF16, {key: golden[key] for key in golden if key.startswith("grad.") or key == "input_ids"}
    )
    assert result["grad_max_rel"] == pytest.approx(2.0, abs=1e-3) and result["grad_max_rel_tensor"] == name
    assert "logits_max_abs" not in result and "objective_rel" not in result


@pytest.mark.parametrize(
    "kept, keys",
    [
        (("input_ids", "logits"), {"experts", "logits_max_abs"}),
        (("packed.",), {"experts", "packed_max_abs"}),
        (("input_ids", "entropy_t0.7"), {"experts", "entropy_max_abs", "entropy_max_abs_t0.7"}),
        (("gen.",), {"experts", "greedy_equal", "gen_logprob_max_abs"}),
    ],
)
def test_what_the_golden_file_does_not_hold_is_left_out(script, kept, keys):
    golden = {name: tensor for name, tensor in script.read_golden(BF16).items() if name.startswith(kept)}
    assert compared(script, BF16, golden).keys() == keys


def test_logits_that_are_not_numbers_are_infinitely_far(script):
    assert script.max_abs(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 1.0])) == float("inf")


@pytest.mark.parametrize(
    "checkpoint, golden, expected",
    [
        (BF16, "none.safetensors", "none.safetensors: not found"),
        (FIXTURES, BF16, "config.json: not found"),
        (BF16, FIXTURES / "kernels.safetensors", "nothing to compare"),
    ],
)
def test_bad_arguments_end_in_one_line(run, checkpoint, golden, expected):
    out, message = run(checkpoint, golden)  # sys.exit(text) prints the text and returns code 1
    assert out == "" and expected in message and "\n" not in message


def test_the_script_runs_in_an_interpreter_of_its_own():
    command = [sys.executable, ROOT / "scripts/compare_logits.py", BF16, FIXTURES / "kernels.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "nothing to compare" in done.stderr and "Traceback" not in done.stderr
