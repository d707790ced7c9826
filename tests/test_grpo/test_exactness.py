"""The warning where the sampler's log-probs are not the trainer's: when it must come, what it names, and that it comes once."""

import json
import math
from pathlib import Path

import pytest
import torch
from paths import FIXTURES

from grpo.batch import Completion, Prompt, Segment, micro_batches, pack
from grpo.exactness import allowed_difference, describe_mismatch, differences
from models.formats.hugging_face import load_model


@pytest.fixture
def completions():
    """Two prompts of two completions, of 2, 1, 3 and 2 tokens; each token's log-prob is its id, negative."""
    lengths = {(4, 0): [7, 8], (4, 1): [9], (6, 0): [10, 11, 12], (6, 1): [13, 14]}
    return [Completion(Prompt(number, [1, 2, number], {}), sample,
                       [Segment([1, 2, number], "prompt"), Segment(ids, "policy", [-float(i) for i in ids])], "stop")
            for (number, sample), ids in lengths.items()]


def found_in(batch, wrong, *, share_prompts, max_tokens=9):
    """differences() of every micro-batch, for a trainer with other log-probs of the tokens `wrong` alone."""
    micros = micro_batches(batch, max_tokens, share_prompts=share_prompts)
    assert len(micros) > 1
    found = []
    for micro in micros:
        log_probs = torch.where(torch.isin(micro.tokens, torch.tensor(wrong)), -99.0, -micro.tokens.float())
        found.append(differences(log_probs, micro, allowed=0.0))
    return found


@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_first_differing_token_of_the_batch_is_named_whatever_the_micro_batches(completions, share_prompts):
    batch = pack(completions, [0.0] * 4)
    found = found_in(batch, [14, 11, 12], share_prompts=share_prompts)
    text = describe_mismatch(found, batch, completions, step=3, largest=0.25, allowed=0.0, run_dir=Path("runs/a b"))
    assert "in step 3" in text and "3 of 8 tokens differ, by up to 0.25 nats where 0 is allowed" in text
    assert "position 4 of prompt 6, sample 0 (its prompt has 3 tokens)" in text
    assert text.endswith("python scripts/explain_mismatch.py --run 'runs/a b'")


def test_differences_outside_the_trained_tokens_are_none(completions):
    batch = pack(completions, [0.0] * 4)
    found = found_in(batch, [1, 2, 4, 6], share_prompts=True)
    assert describe_mismatch(found, batch, completions, step=1, largest=0.0, allowed=0.0, run_dir=Path("runs")) is None


def test_differences_of_what_is_allowed_are_none(completions):
    batch = pack(completions, [0.0] * 4)
    off = batch.sampler_log_probs + torch.where(batch.tokens == 11, 0.5, 0.25)
    assert differences(off, batch, allowed=0.5)[0] == 0
    assert differences(off, batch, allowed=0.25).tolist() == [1, 13]  # 5 + 4 + 4 come before


def test_rounding_is_allowed_on_the_cpu_and_nothing_is_known_of_bfloat16():
    model = load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32)
    assert allowed_difference(model) == 1e-3
    model.dtype = torch.bfloat16
    assert allowed_difference(model) == math.inf


DISTURB = """
import grpo.rollout.session
generate = grpo.rollout.session.Sampler.generate

def disturbed(self, *arguments, step, **settings):
    completions = generate(self, *arguments, step=step, **settings)
    if step >= 1:
        completions[2].segments[1].log_probs[0] += 0.01
    return completions

grpo.rollout.session.Sampler.generate = disturbed
"""


def test_a_run_warns_once_and_names_the_first_token(entry_points, spread_folder, tmp_path):
    result = entry_points.run("grpo.train", "+experiment=smoke", "steps=3", "name=a", f"output_dir={tmp_path}",
                              "env._target_=spread.Spread", "eval.every=0", "eval.at_start=false", "eval.at_end=false",
                              path=(spread_folder,), before=DISTURB, writes_report=False)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    largest = [row["sampling/log_prob_diff/max"] for row in rows if "reward" in row]
    assert largest[0] < 1e-4 and min(largest[1:]) == pytest.approx(0.01, rel=1e-2)
    assert result.out.count("warning: in step") == 1
    warning = result.out[result.out.index("warning: in step"):]
    assert warning.startswith("warning: in step 2 the sampler's log-probs are not the trainer's")
    assert ", sample 2 (its prompt has " in warning and "\n  python scripts/explain_mismatch.py --run " in warning
