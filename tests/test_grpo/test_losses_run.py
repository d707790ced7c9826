"""A step with each file of configs/loss that trains on rewards, with a KL penalty."""
import json

import pytest
from paths import ROOT

OTHERS = {"sft", "dpo", "user", "gdpo"}  # on data; of one's own; the parts of this reward have no spread
NAMES = sorted({path.stem for path in (ROOT / "configs/loss").glob("*.yaml")} - OTHERS)


@pytest.mark.slow
def test_every_loss_makes_a_step(entry_points, spread_folder, tmp_path):
    done = entry_points.run(
        "grpo.train", "-m", "+experiment=smoke", f"loss={','.join(NAMES)}", "env._target_=spread.Spread", "steps=1",
        "warmup=null", "++name=${hydra.runtime.choices.loss}",
        f"output_dir={tmp_path}", "eval.at_start=false", "eval.at_end=false",
        "eval.every=0", "kl.coefficient=0.1", "optim.minibatches=2", path=(spread_folder,), writes_report=False)
    assert done.code == 0, done.err
    for name in NAMES:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["grad_norm"] > 1e-4 for row in rows if "loss" in row] == [True], name
