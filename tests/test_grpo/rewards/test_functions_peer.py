"""TRL's shipped rewards and verl's `default_compute_score`, unmodified, with values worked out by hand.

They run in the interpreter that GRPO_PEER_PYTHON names, or this one; each test skips where the package is missing.
"""

import json
import math
import os
import subprocess
import sys

import pytest
from paths import ROOT

# reads cases from stdin: {entry, samples, num_workers}; writes for each the values, errors and log entries
RUN = """
import json, sys
from grpo.rewards.forms import Sample, TrainerState
from grpo.rewards.scoring import Scorer

state = TrainerState(global_step=1, max_steps=10, epoch=0.1, num_train_epochs=1, train_batch_size=2)
found = []
for case in json.load(sys.stdin):
    samples = [Sample(thinking="", is_truncated=False, **fields) for fields in case["samples"]]
    scorer = Scorer(case["entry"], columns=set(samples[0].row), has_answer=False, max_error_rate=1.0, timeout=None,
                    num_workers=case["num_workers"], retries=0)
    [results] = scorer.results(samples, state)
    scorer.close()
    found.append([[result.value, result.error, result.metrics, result.extra] for result in results])
print("found", json.dumps(found))
"""


def peer(package):
    python = os.environ.get("GRPO_PEER_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", f"import {package}"], cwd="/", capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"{python} has no {package}: {found.stderr.strip().splitlines()[-1]}; set GRPO_PEER_PYTHON to one that has")
    return python


def run(python, cases):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([python, "-c", RUN], input=json.dumps(cases), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    [line] = [line for line in result.stdout.splitlines() if line.startswith("found ")]
    return json.loads(line.removeprefix("found "))


def case(entry, texts, rows, *, lengths=None, num_workers=0):
    samples = [{"row": row, "source": f"train.jsonl:{i}", "prompt": "question", "text": text,
                "completion_ids": [7] * (lengths[i] if lengths else 3), "answer": None}
               for i, (text, row) in enumerate(zip(texts, rows, strict=True))]
    return {"entry": entry, "samples": samples, "num_workers": num_workers}


def values(outcomes):
    assert [error for _, error, _, _ in outcomes] == [None] * len(outcomes)
    return [value for value, _, _, _ in outcomes]


SOLUTIONS = [{"solution": r"\frac{1}{3}"}, {"solution": r"\frac{1}{3}"}]
ANSWERS = [r"It is \boxed{\frac{2}{6}}.", r"It is \boxed{\frac{1}{2}}."]


def test_trls_six_rewards_run_unmodified_here_and_in_a_worker():
    python = peer("trl, math_verify")

    def entry(name, **kwargs):
        return {"fn": f"trl.rewards:{name}", "kwargs": kwargs}

    cases = [
        case("trl.rewards:accuracy_reward", ANSWERS, SOLUTIONS),
        case("trl.rewards.accuracy_reward", ANSWERS, SOLUTIONS, num_workers=1),
        case("trl.rewards:reasoning_accuracy_reward", ["<think>x</think> " + text for text in ANSWERS], SOLUTIONS),
        case(entry("reasoning_accuracy_reward", reasoning_delimiters=["<end>"]), ["no end " + ANSWERS[0], ANSWERS[1]], SOLUTIONS),
        case("trl.rewards:think_format_reward", ["<think>a</think>b", "b"], [{}, {}]),
        case(entry("get_soft_overlong_punishment", max_completion_len=100, soft_punish_cache=20), ["", "", ""], [{}] * 3,
             lengths=[80, 90, 101]),
        case(entry("get_repetition_penalty_reward", ngram_size=2), ["", ""], [{}, {}], lengths=[5, 1]),
        case(entry("get_cosine_scaled_reward", max_len=4), ANSWERS, SOLUTIONS, lengths=[2, 4]),
    ]
    found = run(python, cases)
    expected = [
        [1.0, 0.0],
        [1.0, 0.0],
        [1.0, 0.0],
        [0.0, 0.0],  # without a delimiter there is no answer
        [1.0, 0.0],
        [0.0, -0.5, -1.0],  # free to 100 - 20 tokens, then (80 - 90) / 20
        [-0.75, 0.0],  # 1 of 4 pairs is different; a single token has none
        [0.5 + 0.25 * (1 + math.cos(math.pi / 2)), -0.5],  # halfway from 1 to 0.5; the longest wrong one
    ]
    for outcomes, wanted in zip(found, expected, strict=True):
        assert values(outcomes) == pytest.approx(wanted)
    assert found[0][0][3]["solution"] == r"\frac{1}{3}" and "answer_parsed" in found[0][0][3]


def test_verls_default_score_runs_unmodified_on_rows_of_its_form():
    python = peer("verl.utils.reward_score")

    def row(source, truth):
        return {"data_source": source, "prompt": [{"role": "user", "content": "q"}], "ability": "x",
                "reward_model": {"style": "rule", "ground_truth": truth}, "extra_info": {"split": "train", "index": 0}}

    rows = [
        ("openai/gsm8k", "72", "so it is\n#### 72", 1.0),
        ("openai/gsm8k", "72", "#### 71", 0.0),
        ("openai/gsm8k", "72", "it is 72", 0.0),  # without its marker
        ("lighteval/MATH", r"\frac{1}{2}", r"\boxed{\frac12}", 1.0),
        ("DigitalLearningGmbH/MATH-lighteval", "x^2", r"\boxed{x^3}", 0.0),
        ("searchR1_nq", {"target": ["Paris", "the city of Paris"]}, "<answer>paris</answer>", 1.0),
        ("searchR1_hotpotqa", {"target": ["Paris"]}, "<answer>London</answer>", 0.0),
    ]
    texts, made = [text for _, _, text, _ in rows], [row(source, truth) for source, truth, _, _ in rows]
    fn = "verl.utils.reward_score:default_compute_score"
    dapo = case(fn, ["Answer: 34", "Answer: 35"], [row("math_dapo", "34")] * 2)
    unknown = case(fn, ["x"], [row("no such source", "x")])
    known, of_dapo, of_none = run(python, [case(fn, texts, made), dapo, unknown])
    assert values(known) == [wanted for _, _, _, wanted in rows]
    assert values(of_dapo) == [1.0, -1.0]
    assert [metrics["default_compute_score/acc"] for _, _, metrics, _ in of_dapo] == [1.0, 0.0]
    assert of_none[0][0] is None and of_none[0][1].startswith("NotImplementedError: Reward function is not implemented")
