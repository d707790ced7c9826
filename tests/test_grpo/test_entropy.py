"""The entropy bonus, and runs with it and other options that carry a state or choose among the tokens of a step, resumed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from grpo.config import ConfigError
from grpo.configuration.algorithm import EntropyConfig
from grpo.entropy import EntropyBonus, check_entropy


def test_a_constant_coefficient_is_on_from_the_first_step():
    bonus = EntropyBonus.of(EntropyConfig(0.01))
    bonus.observe(9.0)
    assert bonus.coefficient == 0.01


def test_the_adaptive_coefficient_grows_below_the_target_and_is_off_above():
    bonus = EntropyBonus.of(EntropyConfig(0.01, target=0.2, step=0.005))
    assert bonus.coefficient == 0.0  # nothing observed yet
    found = []
    for entropy in (0.1, 0.15, 0.2, 0.3, 0.1):
        bonus.observe(entropy)
        found.append(bonus.coefficient)
    # 0.015, 0.02, at the target 0.015, above it off (0.01), 0.015
    assert found == pytest.approx([0.015, 0.02, 0.015, 0.0, 0.015])
    for _ in range(9):
        bonus.observe(1.0)
    assert bonus.adapted == 0.0
    again = EntropyBonus.of(bonus.settings, json.loads(json.dumps(bonus.state)))
    assert again == bonus


def test_float16_has_no_bonus():
    check_entropy(EntropyConfig(), torch.float16)
    with pytest.raises(ConfigError, match="entropy.coefficient = 0.1: .* float16"):
        check_entropy(EntropyConfig(0.1), torch.float16)


RUN = ("+experiment=smoke", "env._target_=spread.Spread", "name=run", "eval.at_start=false", "eval.every=0", "eval.at_end=false",
       "rollout.max_new_tokens=6", "optim.lr=0.02", "checkpoint.every=1", "warmup=null", "rollout.prompts_per_step=4",
       "optim.schedule=constant")
ADAPTIVE = ("entropy.target=10", "entropy.step=0.1", "entropy.top_fraction=0.5", "kl.coefficient=0.3", "kl.refresh_every=2")
IN_REWARD = ("loss=reinforce_plus_plus", "kl.coefficient=0.3", "kl.refresh_every=1")
CHOOSING = ("loss=clip_cov", "loss.share=0.5", "loss.cov_low=-1", "optim.minibatches=2", "optim.epochs=2",
            "advantage.baseline=greedy")


@pytest.mark.parametrize("options", [
    pytest.param(ADAPTIVE, id="adaptive", marks=pytest.mark.slow),
    pytest.param(IN_REWARD, id="in the reward", marks=pytest.mark.slow), pytest.param(CHOOSING, id="choosing")])
def test_a_resumed_run_ends_with_the_bytes_of_one_that_was_not_stopped(entry_points, spread_folder, tmp_path, options):
    rows = {}
    for name, parts in {"whole": [("steps=4",)], "parts": [("steps=2",), ("steps=4", "resume=true")]}.items():
        for part in parts:
            done = entry_points.run("grpo.train", *RUN, *options, *part, f"output_dir={tmp_path / name}", path=(spread_folder,),
                                    writes_report=False)
            assert done.code == 0, done.err
        lines = [json.loads(line) for line in (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()]
        rows[name] = [line for line in lines if "loss" in line]
    for key in ("loss", "grad_norm", *(["entropy/coefficient", "kl"] if options == ADAPTIVE else [])):
        assert [row.get(key) for row in rows["whole"]] == [row.get(key) for row in rows["parts"]], key
    last = {name: tmp_path / name / "run/checkpoints/step_000004" for name in rows}
    whole, parts = (load_file(folder / "tensors.safetensors") for folder in last.values())
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    if options == ADAPTIVE:
        assert [row.get("entropy/coefficient") for row in rows["whole"]] == [None, *map(pytest.approx, (0.1, 0.2, 0.3))]
        # the reference is the policy of step 2: in step 3 the policy is the reference still
        assert [row["kl"] > 1e-5 for row in rows["whole"]] == [False, True, False, True]
        states = [json.loads((folder / "state.json").read_text())["state"]["entropy"] for folder in last.values()]
        assert states[0] == states[1] and states[0]["adapted"] == pytest.approx(0.4)
    elif options == IN_REWARD:
        assert all(abs(row["kl"]) < 1e-5 for row in rows["whole"])  # the reference is the policy of the step before
        assert all(row["groups/live"] == 4 for row in rows["whole"])  # equal rewards drop no group
    else:
        assert all(0.2 < row["cov/chosen"] <= 0.6 for row in rows["whole"])
