"""A step made again: the run's own bits, what each token did in it, and what is said where the bits are others."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import grpo.explain
from grpo.batch import Completion, Prompt, Segment
from grpo.config import ConfigError, read_saved_config, save_config
from grpo.configuration.launch import load_config
from grpo.explain import Request, explain, explained_completions, read_request, why_left_out
from grpo.groups import Groups
from grpo.record.explanation import ExplainedCompletion, Explanation, as_page, as_text
from grpo.run.checkpoint import LoadError
from grpo.run.identity import earlier_settings, keep_earlier_settings
from grpo.run.policy import load_run_policy

RUN = ("+experiment=smoke", "env._target_=spread.Spread", "eval.at_start=false", "eval.every=0", "eval.at_end=false",
       "rollout.max_new_tokens=6", "optim.lr=0.02", "checkpoint.every=2", "checkpoint.keep=9", "log.completions_every=1",
       "steps=3", "warmup=null", "loss=dapo", "log.num_completions=3")
OFF_POLICY = ("model.train=lora",
              "+model.lora={rank:2,alpha:4,targets:[q_proj,v_proj,experts],train_norms:true,train_sinks:true}",
              "optim.minibatches=2", "optim.epochs=2", "kl.coefficient=0.1", "rollout.replay_routing=true",
              "optim.share_prompts=true")


@pytest.fixture(scope="module")
def runs(entry_points, spread_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained")
    for name, more in (("plain", ()), ("off_policy", (*OFF_POLICY, "steps=2"))):
        done = entry_points.run("grpo.train", *RUN, *more, f"name={name}", f"output_dir={folder}", path=(spread_folder,),
                                writes_report=False)
        assert done.code == 0, done.err
    return folder


@pytest.fixture
def explained(monkeypatch, spread_folder):
    monkeypatch.syspath_prepend(spread_folder)
    num_threads = torch.get_num_threads()
    yield explain
    torch.set_num_threads(num_threads)


def copied(runs, tmp_path, name="plain"):
    return shutil.copytree(runs / name, tmp_path / name)


def rewrite(path, change) -> None:
    """Applies change(row) to each line of a file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_token_has_the_policys_numbers_and_its_part_of_the_loss(runs, explained, monkeypatch):
    prompts, made = [], grpo.explain.explained_completion

    def noted(run, completion, *more):
        prompts.append(completion.prompt.token_ids)
        return made(run, completion, *more)

    monkeypatch.setattr(grpo.explain, "explained_completion", noted)
    explanation = explained(Request(runs / "plain", 3))
    assert explanation.is_reproduced and "made again from the checkpoint of step 2: 1 step, " in explanation.checks[0]
    assert re.search(r"[3-8] logged completions compared", explanation.checks[0])
    with pytest.raises(ConfigError, match="sample = 99: step 3 has samples 0 to [0-9]+$") as refused:  # by the step's metrics
        explain(Request(runs / "plain", 3, sample=99))
    assert str(refused.value).endswith(f"0 to {len(explanation.completions) - 1}")
    policy = load_run_policy(runs / "plain", step=2, device=torch.device("cpu"), dtype=torch.float32)[0]
    logits = {}
    for layer, block in enumerate(policy.model.layers):
        block.mlp.router.register_forward_hook(lambda _, __, output, layer=layer: logits.__setitem__(layer, output))
    num_tokens = sum(len(item.texts) for item in explanation.completions)
    gradients = []
    for item, prompt in zip(explanation.completions, prompts, strict=True):
        ids = torch.tensor(prompt + item.tokens.tokens.tolist())
        with torch.no_grad():
            table = policy.logits(ids, torch.tensor([0, len(ids)])).log_softmax(-1)
        rows, columns = torch.arange(len(prompt), len(ids)), item.tokens.columns
        log_probs = table[rows - 1, ids[rows]]
        torch.testing.assert_close(columns["log_prob"], log_probs, rtol=0, atol=1e-5)
        torch.testing.assert_close(columns["entropy"], -(table.exp() * table).sum(1)[rows - 1], rtol=0, atol=1e-5)
        assert (columns["ratio"] == 1).all() and (columns["advantage"] == item.advantage).all()
        # DAPO on policy: L = -sum A log pi / N, and nothing else
        torch.testing.assert_close(columns["c"], torch.full((len(rows),), -item.advantage / num_tokens), rtol=1e-6, atol=0)
        gradients.append(columns["c"].abs() * (1 - log_probs.exp()))
        for layer in logits:
            expected = logits[layer][rows - 1].topk(item.tokens.experts.shape[2]).indices
            assert torch.equal(item.tokens.experts[:, layer].long(), expected)
    for item, gradient in zip(explanation.completions, gradients):
        torch.testing.assert_close(item.tokens.columns["share"], gradient / sum(map(torch.sum, gradients)), rtol=1e-4, atol=0)


def test_steps_of_several_updates_are_made_again_from_an_older_checkpoint(runs, explained):
    explanation = explained(Request(runs / "off_policy", 2, epoch=2))
    assert explanation.is_reproduced and "made again from the checkpoint of step 0: 2 steps, " in explanation.checks[0]
    tokens = [item.tokens for item in explanation.completions if item.tokens]
    assert all((part.experts < 16).all() and len(part.tokens) == item.num_tokens
               for part, item in zip(tokens, (item for item in explanation.completions if item.tokens)))
    assert not any((part.columns["ratio"] == 1).all() for part in tokens)  # three updates after the sampler
    assert sum(float(part.columns["share"].sum()) for part in tokens) == pytest.approx(1, abs=1e-5)
    text, page = as_text(explanation, [1]), as_page(explanation, [1, 0])
    assert re.search(r"^\s+token\s+log-prob\s+entropy\s+advantage\s+ratio\s+KL\s+dL/dlogp\s+share\s+experts$", text, re.M)
    assert page.count('class="tokens"') == 2 and "://" not in page and "<script" not in page


def test_the_entry_point_prints_the_step_and_writes_the_page_beside_the_run(runs, entry_points, spread_folder):
    done = entry_points.run("grpo.explain", f"run={runs / 'plain'}", "step=3", "sample=2", path=(spread_folder,))
    assert done.code == 0, done.err
    assert "reproduced exactly: every metric, token, reward and log-prob" in done.out
    assert "sample 2, prompt: <|start|>" in done.out
    assert (runs / "plain/explain/step_000003.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in (runs / "plain/checkpoints").iterdir()) == [
        "step_000000", "step_000002", "step_000003"]


def test_a_last_bit_that_differs_is_said_loudly_with_what_has_changed(runs, entry_points, spread_folder, tmp_path):
    run_dir = copied(runs, tmp_path)
    summary = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").write_text(json.dumps(summary | {"commit": "0123abc", "versions": {"torch": "2.0"}}))

    def change(row):
        if row["step"] == 1 and "grad_norm" in row:
            row["grad_norm"] = torch.tensor(row["grad_norm"], dtype=torch.float64).nextafter(torch.tensor(9.0).double()).item()

    rewrite(run_dir / "metrics.jsonl", change)
    rewrite(run_dir / "completions.jsonl", lambda row: row["log_probs"].__setitem__(0, row["log_probs"][0] * (1 + 1e-7)))
    done = entry_points.run("grpo.explain", f"run={run_dir}", "step=2", path=(spread_folder,))
    assert done.code == 1
    for said in (done.out, done.err):
        assert re.search(r"NOT REPRODUCED: step 1, grad_norm: [\d.]+ recorded, [\d.]+ now", said)
        assert re.search(r"prompt \d+, sample 0: other log-probs", said)
        assert re.search(r"what differs from when the run was made: commit 0123abc, now .*torch 2.0, now", said)


def test_a_step_has_the_settings_that_made_it_not_those_of_a_later_resume(runs, entry_points, explained, spread_folder, tmp_path):
    run_dir = copied(runs, tmp_path)
    done = entry_points.run("grpo.train", *RUN, "name=plain", f"output_dir={tmp_path}", "steps=5", "resume=true",
                            path=(spread_folder,), writes_report=False)
    assert done.code == 0 and "the learning rate follows the linear schedule of 5 steps from here on" in done.out
    for step in (3, 5):
        explanation = explained(Request(run_dir, step))
        assert explanation.is_reproduced and not any("settings" in text for text in explanation.checks)
    shutil.rmtree(run_dir / "checkpoints/step_000003")
    explanation = explained(Request(run_dir, 4))  # from step 2: with one config for both settings
    assert not explanation.is_reproduced and "step 3, lr" in explanation.checks[1]
    assert ("settings: steps up to 3 were made with those of config_until_000003.yaml, and now with those of step 4"
            in explanation.checks[-1])


def test_settings_are_kept_once_for_steps_that_stand_and_dropped_for_steps_made_again(runs, tmp_path):
    run_dir, config = copied(runs, tmp_path), read_saved_config(runs / "plain/config.yaml")
    keep_earlier_settings(run_dir, config, step=2)
    assert earlier_settings(run_dir) == {}  # nothing has changed
    for step, num_steps in ((0, 9), (2, 9), (2, 8), (3, 8)):
        keep_earlier_settings(run_dir, replace(config, steps=num_steps), step=step)
        save_config(replace(config, steps=num_steps), run_dir / "config.yaml")
    assert {last: read_saved_config(path).steps for last, path in earlier_settings(run_dir).items()} == {2: 9}
    keep_earlier_settings(run_dir, replace(config, steps=7), step=3)
    assert {last: read_saved_config(path).steps for last, path in earlier_settings(run_dir).items()} == {2: 9, 3: 8}
    keep_earlier_settings(run_dir, replace(config, steps=7), step=2)  # the checkpoint of step 3 was damaged
    assert list(earlier_settings(run_dir)) == [2]


@pytest.mark.parametrize("words, said", [
    (["run=x"], "step is required: python -m grpo.explain run=runs/NAME step=N"),
    (["run=x", "step=1", "step=2"], "step is given twice, step=1 and step=2: leave one out"),
    (["run=x", "step=two"], "step = 'two': must be a whole number of at least 1"),
    (["run=x", "step=1", "smaple=2"], "smaple: no such key; write KEY=VALUE with one of run, step, sample"),
    (["run=x", "step=1", "output={plain}"], "output = .*plain': is a folder; name a file, such as .*plain/step.html"),
    (["run={plain}", "step=9"], "step = 9: .*plain has steps 1 to 3 in metrics.jsonl"),
    (["run={plain}", "step=1", "epoch=2"], "epoch = 2: the run has optim.epochs = 1"),
    (["run={plain}/none", "step=1"], "none"),
    (["run={plain}", "step=1", "sample=99"], "sample = 99: step 1 has samples 0 to [0-9]+"),
])  # fmt: skip
def test_a_request_that_cannot_be_met_is_refused_before_a_step_is_made(runs, monkeypatch, words, said):
    monkeypatch.setattr(grpo.explain, "start", None)
    with pytest.raises(ConfigError, match=said):
        explain(read_request([word.format(plain=runs / "plain") for word in words]))


def test_help_is_the_description_of_the_command(capsys):
    assert grpo.explain.main(["--help"]) == 0
    assert "python -m grpo.explain run=runs/NAME step=12" in capsys.readouterr().out


def test_a_completion_that_was_not_trained_on_says_why():
    def item(prompt_id, reward, finish_reason="stop"):
        return Completion(Prompt(prompt_id, [1], {}), 0, [Segment([1], "prompt")], finish_reason, reward=reward)

    config = load_config("train", ["experiment=smoke"])
    assert why_left_out(item(1, None), {1}, config) == "it has no reward"
    assert why_left_out(item(1, 0.5), {1}, config) == "its group had equal rewards"
    assert why_left_out(item(2, 0.5, "length"), {1}, config) == "groups of prompts before it were enough for the step"
    config.optim.mask_truncated = True
    assert why_left_out(item(2, 0.5, "length"), {1}, config) == "it was cut off (optim.mask_truncated)"
    explained = ExplainedCompletion("<p>", 1, 0, 0.5, None, "stop", 3, [], None, "its group had equal rewards")
    explanation = Explanation("x", [], True, {}, [explained])
    for said in (as_text(explanation, [0]), as_page(explanation, [0])):
        assert "not trained on: its group had equal rewards" in said and ("&lt;p&gt;" in said or "prompt: <p>" in said)


def test_a_sample_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="sample = 2: step 1 has samples 0 to 1"):
        explained_completions(None, Groups([], [], [None, None]), None, Request(Path(), 1, sample=2))


def test_a_step_without_a_checkpoint_before_it_and_another_kind_of_device_are_refused(runs, tmp_path):
    run_dir = copied(runs, tmp_path)
    shutil.rmtree(run_dir / "checkpoints/step_000000")
    with pytest.raises(ConfigError, match=r"step = 2: .* checkpoints of steps 2, 3, none of them before it; steps 3 to 3 can be"):
        explain(Request(run_dir, 2))
    summary = json.loads((run_dir / "summary.json").read_text())
    (run_dir / "summary.json").write_text(json.dumps(summary | {"device": "NVIDIA H200"}))
    with pytest.raises(ConfigError, match="it was made on NVIDIA H200, this would be on CPU, .* on a machine with that GPU"):
        explain(Request(run_dir, 3))
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(ConfigError, match="it has no checkpoints, so no step can be made again; train with checkpoint.every=N"):
        explain(Request(run_dir, 3))


def test_a_damaged_checkpoint_is_named_where_it_lies(runs, explained, tmp_path):
    run_dir = copied(runs, tmp_path)
    folder = run_dir / "checkpoints/step_000002"
    (folder / "state.json").write_text("{}")
    said = re.escape(f"{folder} is damaged (state.json has 2 bytes, its manifest says ")
    with pytest.raises(LoadError, match=f"^{said}.*; restore it from a copy, or move it away: an older checkpoint is taken"):
        explained(Request(run_dir, 3))


@pytest.mark.gpu
def test_a_step_with_the_full_kl_is_made_again_on_a_gpu(entry_points, spread_folder, tmp_path):
    more = ("device=cuda", "dtype=bfloat16", "kl.coefficient=0.1", "kl.estimator=full", "entropy.coefficient=0.01", "name=gpu")
    done = entry_points.run("grpo.train", *RUN, *more, f"output_dir={tmp_path}", path=(spread_folder,), writes_report=False)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "gpu/metrics.jsonl").read_text().splitlines()]
    assert [row["kl"] > 1e-4 for row in rows if "kl" in row] == [False, True, True]
    done = entry_points.run("grpo.explain", f"run={tmp_path / 'gpu'}", "step=2", path=(spread_folder,))
    assert done.code == 0 and "reproduced exactly" in done.out and "dL/dKL" in done.out and "dL/dH" in done.out, done.err
