"""The comparison with transformers layer by layer: what it reads, what it counts; the whole of it where transformers is."""

import json
import os
import subprocess
import sys

import pytest
import torch
from paths import FIXTURES, ROOT

from models.formats.hugging_face import load_model

MXFP4 = FIXTURES / "tiny_mxfp4"
SCRIPT = ROOT / "scripts/compare_layers.py"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


def load(folder):
    return load_model(folder, device="cpu", dtype=torch.float32)


def test_the_first_layers_are_a_checkpoint_of_their_own(scripts, tmp_path):
    from compare_layers import first_layers

    whole, short = load(MXFP4), load(first_layers(MXFP4, 2, tmp_path))
    assert short.config.num_hidden_layers == 2 and short.expert_format.name == "mxfp4"
    kept = short.state_dict()
    assert {name for name in whole.state_dict() if ".layers.2." not in name and ".layers.3." not in name} == set(kept)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in kept.items())
    assert first_layers(MXFP4, 4, tmp_path) == MXFP4
    with pytest.raises(ValueError, match="--layers 5"):
        first_layers(MXFP4, 5, tmp_path)


def test_first_tokens_have_no_factor(scripts):
    from compare_layers import random_tokens

    tokens, factors = random_tokens([3, 4], load(MXFP4).config, "cpu")
    assert tokens.shape == (7,) and tokens.max() < 384
    assert (factors == 0).nonzero().flatten().tolist() == [0, 3]


def test_a_token_has_the_same_routes_where_every_layer_agrees(scripts):
    from compare_layers import same_routes

    expected = torch.tensor([[[0, 1], [0, 2], [1, 3]], [[0, 1], [2, 3], [0, 3]]])  # [2 layers, 3 tokens, 2 experts]
    routes = expected.clone()
    routes[1, 2, 0] = 1
    assert same_routes(routes, expected).tolist() == [True, True, False]


def test_our_run_gives_states_routes_and_the_gradient_at_the_embeddings(scripts, tmp_path):
    from compare_layers import first_layers, random_tokens, run_ours

    model = load(first_layers(MXFP4, 2, tmp_path))
    tokens, factors = random_tokens([9, 20], model.config, "cpu")
    found, routes = run_ours(model, tokens, factors, [9, 20])
    assert list(found) == ["layer 0", "layer 1", "final norm", "logits", "log-probs", "gradient at embeddings"]
    assert routes.shape == (2, 29, 2)
    expected = found["logits"].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(found["log-probs"][1:9], expected[:8])  # 9 is the second sequence's first token
    assert found["log-probs"][[0, 9]].tolist() == [0, 0]
    # the objective moves along the gradient as it says
    weight = model.model.embed_tokens.weight
    step, row = 1e-2, (tokens == tokens[4]).nonzero().flatten()
    direction = found["gradient at embeddings"][row].sum(0)
    weight.data[tokens[4]] += step * direction / direction.norm()
    moved = (run_ours(model, tokens, factors, [9, 20])[0]["log-probs"] * factors).sum()
    change = (moved - (found["log-probs"] * factors).sum()).item()
    assert change == pytest.approx(step * direction.norm().item(), rel=0.1)


def test_without_transformers_the_reason_is_given(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('not today')\n")
    done = subprocess.run([sys.executable, SCRIPT, "--checkpoint", MXFP4, "--device", "cpu"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "transformers cannot be imported (not today)" in done.stderr


def test_float32_agrees_with_transformers():
    python = os.environ.get("GRPO_PEER_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import transformers, triton"], cwd="/", capture_output=True).returncode:
        pytest.skip(f"{python} has no transformers and triton; set GRPO_PEER_PYTHON to one that has")
    command = [python, SCRIPT, "--checkpoint", MXFP4, "--tokens", "20", "33", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line for line in lines if "error" in line] == []
    errors = {run: {line["what"]: line["relative_error"] for line in lines if line.get("run") == run and "max_abs" in line}
              for run in ("float32", "bf16", "transformers bf16")}
    assert len(errors["float32"]) == 6 and max(errors["float32"].values()) < 1e-5
    assert all(1e-4 < errors["bf16"][name] <= 2 * error for name, error in errors["transformers bf16"].items())
