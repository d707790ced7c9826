"""Evaluation: estimates and intervals against numbers worked out by hand, and the same draws at every call."""
from __future__ import annotations

import itertools
import json
import math
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from grpo.batch import Completion, Prompt, Segment
from grpo.config import save_config
from grpo.configuration.launch import load_config
from grpo.environment import Score
from grpo.envs.carry import Carry
from grpo.envs.drawn_tasks import DrawnTasks
from grpo.evaluate import evaluate, half_width, pass_at_k, run_evaluation
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from grpo.run.checkpoint import save_run
from grpo.run.policy import build_model, build_tokenizer, parameter_tensors
from models.config import GptOssConfig
from models.gpt_oss import GptOss

PARAMS = SamplingParams(max_new_tokens=8)
SETTINGS = {"num_samples": 4, "greedy": True}


class TableSampler:
    """Hands back prepared verdicts as completions: `sampled[i][j]` for sample j of prompt i, `greedy[i]`."""

    def __init__(self, sampled: list[list[object]], greedy: list[object]) -> None:
        self.sampled, self.greedy, self.calls = sampled, greedy, []

    def generate(self, prompts, params, *, step, num_samples, should_stop=None, progress=None):
        self.calls.append((step, params))
        table = [[verdict] for verdict in self.greedy] if params.greedy else self.sampled
        return [Completion(prompt, sample, [Segment(prompt.token_ids, "prompt"), Segment([7] * (sample + 1), "policy")],
                           "length" if sample == 3 else "stop", reward_parts={"verdict": table[prompt.id][sample]})
                for prompt in prompts for sample in range(num_samples)]


class TableEnv:
    """Scores a completion by the verdict it carries: True or False, or a number for a reward without correctness."""

    def score(self, completions):
        verdicts = [completion.reward_parts["verdict"] for completion in completions]
        return [Score(float(verdict), {}, {"by_env": 2.0}, verdict) if isinstance(verdict, bool)
                else Score(verdict, {}, {}, None) for verdict in verdicts]


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(i, [1, 2], {}) for i in range(count)]


@pytest.mark.parametrize(
    "correct, n, low, high",
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3: the score interval
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_the_published_width(correct, n, low, high):
    assert half_width([1.0] * correct + [0.0] * (n - correct)) == pytest.approx((high - low) / 2, abs=1e-4)


def test_wilson_interval_does_not_change_when_right_and_wrong_swap():
    assert half_width([1.0] * 5 + [0.0] * 45) == pytest.approx(half_width([0.0] * 5 + [1.0] * 45), rel=1e-12)


@pytest.mark.parametrize("values, expected", [
    ([1.0], 0.396725),  # 1.959964 / (1 + 3.841459) * 1.959964 / 2
    ([0.25], 0.396725),
    ([0.5] * 10, 0.138766),  # 1.959964 / 1.3841459 * 1.959964 / 20
    ([0.25, 1.0, 0.0], 0.351107),  # the variance is 0.180556: 0.859450 * sqrt(0.180556 / 3 + 3.841459 / 36)
])
def test_an_interval_knows_how_few_values_it_has(values, expected):
    assert half_width(values) == pytest.approx(expected, abs=2e-6)


def test_an_interval_of_rewards_is_1_96_standard_errors_and_unknown_for_one():
    assert half_width([2.0, 4.0, -3.0]) == pytest.approx(1.959964 * math.sqrt(13 / 3), rel=1e-6)  # variance 13, of three
    assert math.isnan(half_width([2.0]))


def test_pass_at_k_equals_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(range(n), k))
                share = sum(any(sample < correct for sample in subset) for subset in subsets) / len(subsets)
                assert pass_at_k(n, correct, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_two_correct_in_five_draws_of_three():
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9, abs=1e-12)  # one of the ten triples misses both


def test_accuracies_and_intervals_are_those_worked_out_by_hand():
    sampler = TableSampler([[True, False, False, False], [True] * 4, [False] * 4], [True, True, False])
    metrics, _ = evaluate(TableEnv(), sampler, prompts_of(3), PARAMS, **SETTINGS)
    assert metrics["greedy_accuracy"] == pytest.approx(2 / 3)
    # Wilson: 1.959964 / (1 + 3.841459/3) * sqrt(2/9/3 + 3.841459/36) = 0.859450 * 0.425184
    assert metrics["greedy_accuracy/ci95"] == pytest.approx(0.365424, abs=2e-6)
    assert metrics["avg@4"] == pytest.approx(5 / 12)
    # prompts' means 1/4, 1, 0: 0.859450 * sqrt(0.180556 / 3 + 3.841459 / 36)
    assert metrics["avg@4/ci95"] == pytest.approx(0.351107, abs=1e-5)
    assert metrics["pass@2"] == pytest.approx(0.5)  # 1/2, 1, 0
    assert metrics["pass@2/ci95"] == pytest.approx(0.859450 * math.sqrt(1 / 6 / 3 + 3.841459 / 36), rel=1e-5)
    assert metrics["pass@4"] == pytest.approx(2 / 3)
    assert "pass@1" not in metrics and "pass@8" not in metrics


def test_lengths_cuts_and_the_metrics_of_the_environment_are_averaged():
    sampler = TableSampler([[True, False, False, False], [True] * 4], [True, False])
    metrics, _ = evaluate(TableEnv(), sampler, prompts_of(2), PARAMS, **SETTINGS)
    assert metrics["mean_length"] == 2.5 and metrics["greedy/mean_length"] == 1  # tokens: 1, 2, 3, 4 of each prompt
    assert metrics["clipped_ratio"] == 0.25 and metrics["greedy/clipped_ratio"] == 0
    assert metrics["reward"] == 5 / 8 and metrics["greedy/reward"] == 0.5
    assert metrics["by_env"] == 2.0


def test_rewards_stand_for_correctness_where_the_environment_does_not_judge_it():
    metrics, _ = evaluate(TableEnv(), TableSampler([[0.5, 1.5, 0.0, None]], [0.25]), prompts_of(1), PARAMS, **SETTINGS)
    assert metrics["avg@4"] == pytest.approx(2 / 3)  # of three: the one without a reward was not scored
    assert metrics["unscored"] == 1
    assert metrics["pass@2"] == pytest.approx(2 / 3)  # one of three reaches 1
    assert math.isnan(metrics["pass@4"])  # no prompt has four scores
    assert metrics["greedy_accuracy"] == 0.25


@pytest.mark.parametrize("changes, absent", [({"num_samples": 0}, "avg@0"), ({"greedy": False}, "greedy_accuracy")])
def test_what_is_switched_off_is_neither_sampled_nor_reported(changes, absent):
    sampler = TableSampler([[True] * 4], [True])
    metrics, scored = evaluate(TableEnv(), sampler, prompts_of(1), PARAMS, **(SETTINGS | changes))
    assert absent not in metrics and len(sampler.calls) == 1
    assert len(scored) == (4 if "greedy" in changes else 1)


def test_the_settings_reach_the_sampler_under_a_step_of_their_own():
    sampler = TableSampler([[True] * 4], [True])
    params = SamplingParams(max_new_tokens=8, temperature=0.7, top_p=0.9)
    evaluate(TableEnv(), sampler, prompts_of(1), params, **SETTINGS)
    assert sampler.calls == [(-1, replace(params, greedy=True)), (-1, params)]


def test_no_held_out_prompts_are_the_environment_s_fault(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(Carry, "eval_prompts", lambda self: [])
    assert run_evaluation(load_config("evaluate", [f"run={run_dir}"])) == 4
    assert "Carry.eval_prompts" in capsys.readouterr().err


# ---- with a model


class FirstTokenEnv:
    """Correct where the first token is below 20."""

    def score(self, completions):
        return [Score(float(is_low), {}, {}, is_low) for is_low in (c.completion_ids[0] < 20 for c in completions)]


@pytest.fixture(scope="module")
def policy() -> GptOss:
    config = GptOssConfig(vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
                          layer_types=["sliding_attention", "full_attention"], max_position_embeddings=64)
    model = GptOss(config, dtype=torch.float32, device="cpu", experts="bf16")
    model.init_weights(seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(10.0)
    return model


def test_every_evaluation_draws_the_same_completions(policy):
    prompts = [Prompt(i, [i + 1, 5, 9], {}) for i in range(6)]
    sampler = Sampler(policy, (3,), max_batch=16, seed=4)
    first = evaluate(FirstTokenEnv(), sampler, prompts, PARAMS, **SETTINGS)
    trained = sampler.generate(prompts, SamplingParams(max_new_tokens=8), step=0, num_samples=4)  # a step in between
    again = evaluate(FirstTokenEnv(), Sampler(policy, (3,), max_batch=5, seed=4), prompts, PARAMS, **SETTINGS)
    ids = [[completion.completion_ids for completion, _ in scored] for _, scored in (first, again)]
    assert ids[0] == ids[1] and first[0] == again[0]
    assert len(ids[0]) == 6 + 6 * 4
    assert ids[0][6:] != [completion.completion_ids for completion in trained]
    other, _ = evaluate(FirstTokenEnv(), Sampler(policy, (3,), max_batch=16, seed=5), prompts, PARAMS, **SETTINGS)
    assert other["mean_length"] != first[0]["mean_length"] or other["avg@4"] != first[0]["avg@4"]


def test_metrics_of_a_model_are_those_of_the_completions_handed_back(policy):
    prompts = [Prompt(i, [i + 1, 5, 9], {}) for i in range(6)]
    metrics, scored = evaluate(FirstTokenEnv(), Sampler(policy, (3,), max_batch=16, seed=4), prompts, PARAMS, **SETTINGS)
    is_low = [completion.completion_ids[0] < 20 for completion, _ in scored]
    assert metrics["greedy_accuracy"] == pytest.approx(sum(is_low[:6]) / 6)
    assert metrics["avg@4"] == pytest.approx(sum(is_low[6:]) / 24)
    assert [completion.prompt.id for completion, _ in scored] == [*range(6), *(i for i in range(6) for _ in range(4))]
    other = Sampler(policy, (3,), max_batch=16, seed=9)
    greedy, _ = evaluate(FirstTokenEnv(), other, prompts, PARAMS, **(SETTINGS | {"num_samples": 0}))
    assert greedy["greedy_accuracy"] == metrics["greedy_accuracy"]  # no randomness in it


# ---- the entry point


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    config = load_config("train", ["+experiment=smoke", "name=run", f"output_dir={folder}"])
    tokenizer = build_tokenizer(config.model, config.env)
    policy = build_model(config.model, tokenizer, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    save_run(folder / "run", step=1, tensors=parameter_tensors(policy, config.model), state={"wandb_id": None}, keep=2)
    save_config(config, folder / "run/config.yaml")
    tokenizer.save(folder / "run/tokenizer")
    return folder / "run"


def test_a_run_is_evaluated_on_its_held_out_problems_and_the_result_written(run_dir, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = [f"run={run_dir}", "num_samples=2", "max_prompts=5", "max_new_tokens=6", f"output={output}"]
    assert run_evaluation(load_config("evaluate", arguments)) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    result = json.loads(output.read_text())
    assert lines["greedy_accuracy"] == "0.000 ± 0.217" and lines["num_prompts"] == "5"
    assert not any("ci95" in name for name in lines)
    assert (result["run"], result["step"], result["num_prompts"]) == (str(run_dir), 1, 5)
    assert result["greedy_accuracy"] == 0.0 and result["avg@2"] == 0.0  # random weights cannot add
    # 0 of 5: 1.959964 / (1 + 3.841459/5) * 1.959964 / 10
    assert result["greedy_accuracy/ci95"] == pytest.approx(0.217241, abs=1e-5)
    assert 1 <= result["mean_length"] <= 6


@pytest.mark.parametrize("count, done, found", [
    (8, "2 of 4 prompts were finished, 4 of them greedily", {"greedy_accuracy", "avg@2"}),
    (9, "2 of 4 prompts were finished, 4 of them greedily", {"greedy_accuracy", "avg@2"}),  # half of the third
    (3, "0 of 4 prompts were finished, 3 of them greedily", {"greedy_accuracy"}),
])
def test_a_signal_leaves_the_results_of_the_prompts_that_were_finished_marked_as_such(
        run_dir, tmp_path, capsys, monkeypatch, count, done, found):
    def progress(finished, total):
        if finished == count:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("grpo.evaluate.join_sampler", lambda *_: progress)
    output, part = tmp_path / "result.json", tmp_path / "result.json.partial"
    words = [f"run={run_dir}", "num_samples=2", "max_prompts=4", "max_new_tokens=6", "max_batch=1", f"output={output}"]
    assert run_evaluation(load_config("evaluate", words)) == 75
    printed = capsys.readouterr()
    assert f"SIGINT: {done}; the same command starts again" in printed.err and str(part) in printed.err
    result = json.loads(part.read_text())
    assert next(iter(result)) == "partial" and result["partial"].startswith(f"SIGINT: {done}")
    assert {name for name in result if name in ("greedy_accuracy", "avg@2")} == found and not output.exists()
    assert printed.out.startswith("partial ") and "greedy_accuracy" in printed.out

    assert run_evaluation(load_config("evaluate", words)) == 0
    assert "partial" not in json.loads(output.read_text()) and not part.exists()


def test_nothing_is_kept_of_an_evaluation_without_a_finished_prompt(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("grpo.evaluate.join_sampler", lambda *_: lambda *_: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr("grpo.run.signals.GracefulStop._handle", lambda self, number, _: setattr(self, "signal_name", "SIGTERM"))
    words = [f"run={run_dir}", "num_samples=0", "max_prompts=2", "max_new_tokens=99", f"output={tmp_path / 'result.json'}"]
    assert run_evaluation(load_config("evaluate", words)) == 75
    assert "SIGTERM: 0 of 2 prompts were finished; the same" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_terminal_that_is_closed_costs_no_results(run_dir, tmp_path, monkeypatch, leave_readers):
    leave_readers()
    output = tmp_path / "result.json"
    words = [f"run={run_dir}", "num_samples=0", "max_prompts=2", "max_new_tokens=3"]
    assert run_evaluation(load_config("evaluate", [*words, f"output={output}"])) == 0
    assert json.loads(output.read_text())["num_prompts"] == 2
    stop = Mock(side_effect=lambda finished, total: finished == 1 and signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr("grpo.evaluate.join_sampler", lambda *_: stop)
    assert run_evaluation(load_config("evaluate", [*words, "max_batch=1", f"output={output}"])) == 75
    assert "1 of 2 prompts" in json.loads((tmp_path / "result.json.partial").read_text())["partial"]


def test_results_that_are_only_printed_must_be_read(run_dir, leave_readers):
    leave_readers()
    words = [f"run={run_dir}", "num_samples=0", "max_prompts=2", "max_new_tokens=3"]
    assert run_evaluation(load_config("evaluate", words)) == 1


def test_a_program_may_evaluate_in_a_thread(run_dir, tmp_path):
    words = [f"run={run_dir}", "num_samples=0", "max_prompts=2", "max_new_tokens=2", f"output={tmp_path / 'result.json'}"]
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(run_evaluation, load_config("evaluate", words)).result() == 0
    assert json.loads((tmp_path / "result.json").read_text())["num_prompts"] == 2


def test_the_environment_may_be_another_than_the_run_s(run_dir, capsys):
    arguments = [f"run={run_dir}", "env=carry", "env.num_eval_prompts=3", "num_samples=0", "max_new_tokens=2"]
    assert run_evaluation(load_config("evaluate", arguments)) == 0
    assert re.search(r"^num_prompts +3$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["run=nowhere"], "nowhere/config.yaml: no such file"),
        (["run={run}", "step=9"], "step = 9: no such checkpoint"),
        (["run={run}", "env=carry", "env.digits=1"], "env.digits=1: must lie in 2..9"),
        (["run={run}", "env=carry", "env.digit=3"], "digit"),
    ],
)
def test_mistakes_end_in_one_message_and_exit_code_2(run_dir, capsys, overrides, expected):
    config = load_config("evaluate", [item.replace("{run}", str(run_dir)) for item in overrides])
    assert run_evaluation(config) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and expected in captured.err
    assert captured.out == "" and "Traceback" not in captured.err


def test_an_environment_without_evaluation_prompts_is_named_with_what_to_read(run_dir, capsys, monkeypatch):
    monkeypatch.delattr(DrawnTasks, "eval_prompts")
    assert run_evaluation(load_config("evaluate", [f"run={run_dir}"])) == 4
    captured = capsys.readouterr()
    assert "environment Carry has no eval_prompts; grpo.environment.Environment says" in captured.err
    assert "Traceback" not in captured.err


def test_an_environment_that_raises_is_named(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(Carry, "score", lambda self, completions: 1 / 0)
    assert run_evaluation(load_config("evaluate", [f"run={run_dir}", "max_new_tokens=2", "max_prompts=1"])) == 4
    assert "environment Carry.score raised ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["nowhere/result.json", "folder", "file.txt/result.json", "r" * 300])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(entry_points, tmp_path, output):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    result = entry_points.run("grpo.evaluate", "run=no/such/run", f"output={tmp_path / output}")
    assert result.code == 2 and "output = " in result.err and "cannot be written" in result.err, result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_a_result_that_cannot_be_written_in_the_end_was_printed(run_dir, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    arguments = [f"run={run_dir}", "num_samples=0", "max_prompts=3", "max_new_tokens=2", f"output={tmp_path / 'result.json'}"]
    assert run_evaluation(load_config("evaluate", arguments)) == 1
    printed = capsys.readouterr()
    assert re.search(r"^num_prompts +3$", printed.out, re.MULTILINE) and "No space left on device" in printed.err
