"""Episodes of several turns by a scripted policy: what is sampled, appended and trained on; environments that misbehave."""

import ctypes
import json
import os
import random
import re
import time
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harmony import encode_with_special
from paths import FIXTURES
from rollout_problem import assert_equal
from scripted_turns import (
    CALL,
    FINAL,
    HANGS,
    TOKENIZER,
    Env,
    Tools,
    call,
    misbehave,
    random_scripts,
    text_of,
)

from grpo.batch import Completion, ToolCall, pack
from grpo.config import TurnsConfig
from grpo.configuration.algorithm import AdvantageConfig, Baseline, KlConfig, Scale
from grpo.environment import EnvironmentFault, checked_scores
from grpo.groups import collect, completion_record, turn_metrics
from grpo.losses import NORMALIZERS, LossInputs, ppo
from grpo.rollout.scheduler import Scheduler
from grpo.rollout.session import Interrupted, Sampler
from grpo.rollout.turns import Turns
from models.chat.form import Form
from models.chat.parse import parse_completion
from models.chat.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

CASES = json.loads((FIXTURES / "harmony" / "tool_turns.json").read_text(encoding="utf-8"))


def test_a_call_is_answered_and_the_model_goes_on(play):
    (completion, other), _ = play({(0, 0): ["<|channel|>analysis<|message|>so<|end|><|start|>assistant", call(text="ab", times=2),
                                            CALL.replace("echo", "count"), FINAL.format("abab")], (0, 1): [FINAL.format("no")]})
    result = '<|start|>functions.{} to=assistant<|channel|>commentary<|message|>{}<|end|><|start|>assistant'
    assert text_of(completion) == (
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant" + call(text="ab", times=2) + result.format("echo", '"abab"')
        + CALL.replace("echo", "count") + result.format("count", "2") + FINAL.format("abab"))
    assert [segment.source for segment in completion.segments] == ["prompt", *["policy", "env"] * 2, "policy"]
    assert completion.finish_reason == "stop" and completion.episode.reward == 2.0 and other.episode.reward == 0.125
    assert completion.episode.calls == [ToolCall("functions.echo", '{"text": "ab", "times": 2}', '"abab"', False),
                                        ToolCall("functions.count", "{}", "2", False)]
    parsed = parse_completion(completion.completion_ids, TOKENIZER, is_policy=completion.is_policy)
    assert (parsed.fault, parsed.final, parsed.analysis) == (None, "abab", "so")


@pytest.mark.parametrize("turn, answer", [
    (call(text=3), "argument text of echo must be string"), (CALL.replace("{}", '{"te'), "the arguments are no JSON"),
    (CALL.replace("echo", "reset"), "no tool 'functions.reset'; there are: functions.echo, functions.count"),
    (CALL.replace("functions.echo", "python"), "no tool 'python'"), (CALL.replace("echo", "refuse"), "game over"),
    ("<|channel|>commentary<|message|>hello<|call|>", "no recipient"), ("<|channel|>commentary<|call|>", "cannot be read"),
    ("<|message|><|call|>", "no recipient"), ("<|channel|><|message|>x<|call|>", "cannot be read"),
    ("<|channel|>gossip to=functions.refuse<|message|>{}<|call|>", "game over")])
def test_a_malformed_call_is_answered_by_an_error(play, turn, answer):
    (completion,), _ = play({(0, 0): [turn, FINAL.format("1")]})
    made, = completion.episode.calls
    assert made.is_failed and answer in made.result
    assert answer.split("'")[0] in text_of(completion).split("<|call|>")[1]
    assert completion.finish_reason == "stop" and completion.episode.failure is None


@pytest.mark.parametrize("case", CASES["results"], ids=lambda case: case["name"])
def test_results_are_written_as_the_library_writes_them(case):
    turns = Turns(Env(), Tokenizer.load(FIXTURES / "tokenizer_real_ids"), TurnsConfig(form=Form.library))
    ids = turns.reply(ToolCall(case["name"], "", case["content"], False), case["channel"])
    expected = encode_with_special(turns.tokenizer, case["text"].split("<|message|>")[0] + "<|message|>")
    assert ids[:len(expected)] == expected
    assert ids[len(expected):-len(turns.tokenizer.encode("assistant")) - 1] == [*turns.tokenizer.encode(case["content"]),
                                                                                turns.tokenizer.end]
    assert turns.tokenizer.decode(ids, keep_special=True) == case["text"] + "<|start|>assistant"


@pytest.mark.parametrize("case", CASES["rollouts"], ids=lambda case: case["name"])
def test_calls_are_read_as_the_library_reads_them(case):
    turns = Turns(Env(), TOKENIZER, TurnsConfig())
    pieces = case["text"].split("<|call|>")
    called = [message for message in case["messages"] if message["role"] == "assistant" and "recipient" in message]
    assert len(called) == len(pieces) - 1
    for piece, expected in zip(pieces, called):
        turn = piece.rpartition("<|end|><|start|>assistant")[2] if piece.startswith("<|start|>") else piece
        message, problem = turns.read_call(encode_with_special(TOKENIZER, turn + "<|call|>"))
        assert problem == "" and {key: getattr(message, key) for key in expected} == expected


def test_in_random_episodes_exactly_the_sampled_tokens_are_trained_on(play, model):
    """Beside it: the sampler's log-probs are the trainer's, and what follows env tokens is as if they had been there before."""
    scripts = random_scripts(25, 4, seed=1)
    completions, stats = play(scripts)
    batch = pack(completions, [0.0] * len(completions))
    assert {len(completion.segments) // 2 for completion in completions} == {1, 2, 3, 4, 5, 6}
    for completion in completions:
        sampled = [id for text in scripts[completion.prompt.id, completion.sample]
                   for id in encode_with_special(TOKENIZER, text)]
        assert completion.finish_reason == "stop"
        assert sampled == [id for id, is_own in zip(completion.completion_ids, completion.is_policy) if is_own]
        assert [source for source, _ in groupby(completion.is_policy)] == [True, *[False, True] * (
            len(scripts[completion.prompt.id, completion.sample]) - 1)]
    mask = [is_own for completion in completions for is_own in [False] * 12 + completion.is_policy]
    assert batch.loss_mask.tolist() == mask
    log_probs, _ = model.log_probs(batch.tokens, batch.cu_seqlens, temperature=1.0, mask=batch.host_mask)
    assert (log_probs - batch.sampler_log_probs)[batch.loss_mask].abs().max() <= 1e-5
    assert log_probs[~batch.loss_mask].abs().max() == 0


@pytest.mark.parametrize("loss_fn", [partial(ppo, normalizer=normalizer) for normalizer in NORMALIZERS], ids=NORMALIZERS)
def test_what_stands_at_env_tokens_as_targets_changes_no_loss(play, loss_fn):
    """Their log-probs, entropies, advantages and what the sampler recorded are noise in one of two batches."""
    completions, _ = play(random_scripts(6, 2, seed=2))
    advantages = [float(index % 3 - 1) for index in range(len(completions))]
    generator = torch.Generator().manual_seed(0)
    batch = pack(completions, advantages)
    own = torch.randn(len(batch.tokens), generator=generator).abs().neg()
    found = []
    for noise in (torch.zeros(len(own)), torch.randn(len(own), generator=generator)):
        log_probs, sampled, entropy, weights = (torch.where(batch.loss_mask, values, noise) for values in (
            own, batch.sampler_log_probs, own.abs(), batch.advantages))
        log_probs.requires_grad_()
        noisy = replace(batch, sampler_log_probs=sampled, advantages=weights)
        loss, _ = loss_fn(LossInputs.of(noisy, log_probs, entropy, old_log_probs=sampled, max_new_tokens=400),
                          clip_low=0.2, clip_high=0.2)
        loss.backward()
        found.append((loss.item(), log_probs.grad))
    assert found[0][0] == found[1][0] != 0 and torch.equal(found[0][1], found[1][1])
    assert (found[0][1] != 0).any() and (found[0][1][~batch.loss_mask] == 0).all()


@pytest.fixture(scope="module")
def undisturbed():
    return {}


@pytest.mark.parametrize("how", ["three at a time", "prefilled in chunks", "preempted", "decoded while tools run"])
def test_episodes_end_alike_however_their_rows_are_run(play, undisturbed, monkeypatch, how):
    """On a GPU rows are decoded while tools run; then they are continued in another order."""
    scripts = random_scripts(4, 3, seed=3)
    if not undisturbed:
        undisturbed["completions"], _ = play(scripts, prompt_len=50)
    settings = {"three at a time": {"max_batch": 3}, "prefilled in chunks": {"max_prefill_tokens": 40}}.get(how, {})
    rng, make_room = random.Random(0), Scheduler.make_room

    def preempt(scheduler, num_steps):
        preempted = make_room(scheduler, num_steps)
        if len(scheduler.live) > 1 and rng.random() < 0.2:
            preempted.append(scheduler.live.pop())
            scheduler._preempt(preempted[-1])
        scheduler._evict(scheduler.parked)
        return preempted

    class SlowEnv(Env):
        def episode(self, prompt, sample):
            time.sleep(0.002 * (prompt.id % 3))
            return Tools(prompt, sample)

    if how in ("preempted", "decoded while tools run"):
        monkeypatch.setattr(Scheduler, "make_room", preempt)
    if how == "decoded while tools run":
        monkeypatch.setattr("grpo.rollout.turns.overlaps", lambda device: True)
    found, stats = play(scripts, env=SlowEnv(), prompt_len=50, **settings)
    assert_equal(found, undisturbed["completions"])
    assert [completion.episode.calls for completion in found] == [
        completion.episode.calls for completion in undisturbed["completions"]]
    assert (stats.num_preemptions > 0) == (not settings)


def test_limits_of_turns_tokens_and_results(play):
    scripts = {(0, 0): [call(text="a")] * 3, (0, 1): [call(text="b", times=60), FINAL.format("1")]}
    (many, long), _ = play(scripts, limits=TurnsConfig(max_turns=3, max_result_tokens=9))
    assert (many.finish_reason, many.is_truncated, len(many.episode.calls)) == ("turns", True, 2)
    assert '"bbbbbbbb... (cut off)<|end|>' in text_of(long) and long.finish_reason == "stop"
    (short, _), _ = play(scripts, max_new_tokens=len(encode_with_special(TOKENIZER, call(text="a"))) + 20)
    assert (short.finish_reason, short.episode.reward) == ("length", 1.0)  # there was no room for the result


@pytest.mark.parametrize("how, reason", [
    ("exit", "raised SystemExit: 3"),
    ("hang", r"ran over 0.5 s \(turns.call_seconds\)"), ("flood", "returned 10,000,000 characters"),
    ("leak", "left 1 processes running"), ("fork", "")])
def test_an_environment_that_misbehaves_loses_its_episode_and_no_other(play, how, reason):
    scripts = {(0, 0): [misbehave(how), FINAL.format("1")], (0, 1): [misbehave("not"), FINAL.format("2")],
               (1, 0): [FINAL.format("3")], (1, 1): [call(text="ab"), FINAL.format("4")]}
    completions, _ = play(scripts, limits=TurnsConfig(call_seconds=0.5))
    failed, *others = completions
    assert [completion.episode.failure for completion in others] == [None] * 3
    assert [completion.episode.reward for completion in others] == [0.125, 0.0, 1.125]
    if how == "fork":  # the child ends where the tool's code ends
        assert failed.episode.failure is None
    else:
        assert re.search(reason, failed.episode.failure)
        assert "1 of 4 episodes failed" in play.warnings[0] and "sample 0: " + failed.episode.failure in play.warnings[0]
    scores = checked_scores(Env(), completions)
    assert [score.reward is None for score in scores] == [how != "fork", False, False, False]
    assert turn_metrics(completions)["episodes/failed"] == (how != "fork")
    assert children_of_this_process() == []


def test_a_tool_that_keeps_pythons_lock_is_named_while_nothing_else_can_run(play, monkeypatch, capfd):
    class Locking(Tools):
        def echo(self, text: str) -> str:
            """Sleeps in C."""
            ctypes.PyDLL(None).usleep(1_500_000)
            return text

    monkeypatch.setattr("grpo.rollout.turns.GRACE", 0.2)
    env = Env()
    env.episode = Locking
    scripts = {(0, 0): [call(text="a"), FINAL.format("1")], (0, 1): [FINAL.format("2")]}
    play(scripts, env=env, limits=TurnsConfig(call_seconds=0.2))
    assert re.search(r"Timeout.*test_turns.py\", line \d+ in echo", capfd.readouterr().err, re.DOTALL)


def children_of_this_process() -> list[str]:
    """Those that sleep. A thread or a child that ends meanwhile has none, and is none."""
    children = " ".join(content(f"/proc/self/task/{task}/children") for task in os.listdir("/proc/self/task")).split()
    return [child for child in children if content(f"/proc/{child}/cmdline").startswith("sleep")]


def content(path: str) -> str:
    """Of a file of /proc; "" if it is gone."""
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_what_a_tool_raises_is_a_result_so_that_no_model_leaves_an_episode_by_it(play):
    scripts = {(0, 0): [misbehave("raise"), FINAL.format("1")], (0, 1): [FINAL.format("2")]}
    for _ in range(2):
        (told, _), _ = play(scripts)
        made, = told.episode.calls
        assert (told.episode.failure, told.episode.reward, made.is_failed) == (None, 0.0, True)
        assert made.result == "KeyError: 'lost'" and re.search(r"KeyError: 'lost' \(.*scripted_turns.py:\d+\)", made.raised)
        assert """{"error": "KeyError: 'lost'"}<|end|>""" in text_of(told)
    assert len(play.warnings) == 2 and "1 calls raised, which the model was told" in play.warnings[0]  # once for each Turns


class Breaking(Tools):
    """Its own code fails, in what is no call of the model's."""

    def get_reward(self):
        raise RuntimeError("no judge")


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_a_call_to_a_role_is_not_answered_in_the_name_of_that_role(play, role):
    (told,), _ = play({(0, 0): [CALL.replace("functions.echo", role), FINAL.format("1")]})
    assert f"""<|start|>functions to=assistant<|channel|>commentary<|message|>{{"error": "no tool '{role}'""" in text_of(told)


class Unreadable(ValueError):
    def __str__(self):
        raise RuntimeError("no text")


def test_an_exception_without_a_text_or_with_a_huge_one_loses_its_episode_and_no_other(play):
    class Odd(Tools):
        def echo(self, text: str) -> str:
            """Fails."""
            raise Unreadable

        def get_reward(self):
            if self.sample == 0:
                return 1.0
            raise Unreadable if self.sample == 1 else KeyError("x" * 10_000_000)

    env = Env()
    env.episode = Odd
    (told, unreadable, huge), _ = play({(0, sample): [call(text="a"), FINAL.format("1")] for sample in range(3)}, env=env)
    assert (told.episode.failure, told.episode.calls[0].result) == (None, "(its text cannot be read)")
    assert "raised Unreadable: (its text cannot be read)" in unreadable.episode.failure
    assert huge.episode.failure.startswith("raised KeyError: 'xxx") and len(huge.episode.failure) < 2000


def test_an_environment_that_crashes_by_itself_drops_its_episode_whatever_a_failed_call_earns(play):
    class Half(Env):
        def episode(self, prompt, sample):
            if sample == 1:
                raise OSError("no board")
            return Breaking(prompt, sample) if sample == 2 else Tools(prompt, sample)

    scripts = {(0, sample): [call(text="a"), FINAL.format("1")] for sample in range(3)} | {
        (0, 3): [misbehave("exit")], (0, 4): [misbehave("leak"), FINAL.format("1")]}
    completions, _ = play(scripts, env=Half(), limits=TurnsConfig(failed_call_reward=-1.0))
    assert [completion.episode.failure and completion.episode.failure[:17] for completion in completions] == [
        None, "raised OSError: n", "raised RuntimeErr", "raised SystemExit", "left 1 processes "]
    assert [score.reward for score in checked_scores(Half(), completions)] == [1.0, None, None, -1.0, -1.0]
    assert [completion.reward for completion in completions] == [1.0, None, None, -1.0, -1.0]
    found = turn_metrics(completions)
    assert (found["episodes/failed"], found["episodes/failed_in_call"], found["calls/raised"]) == (4, 2, 0.0)
    assert "2 of 5 episodes failed and drop out" in play.warnings[0] and "no board" in play.warnings[0]
    assert "2 of 5 episodes failed in the model's calls and get -1" in play.warnings[1]


def test_a_judge_that_breaks_after_a_tool_has_raised_may_be_the_models_doing(play):
    class Broken(Env):
        def episode(self, prompt, sample):
            return Breaking(prompt, sample) if sample == 0 else Tools(prompt, sample)

    scripts = {(0, 0): [misbehave("raise"), FINAL.format("1")], (0, 1): [FINAL.format("1")]}
    (broken, other), _ = play(scripts, env=Broken(), limits=TurnsConfig(failed_call_reward=0.0))
    assert broken.episode.may_be_models and "RuntimeError: no judge" in broken.episode.failure
    assert [score.reward for score in checked_scores(Broken(), [broken, other])] == [0.0, 0.125]


def test_if_all_episodes_fail_the_run_ends_and_says_why(play):
    with pytest.raises(EnvironmentFault, match="all 2 episodes failed, prompt 0 .*raised SystemExit"):
        play({(0, 0): [misbehave("exit")], (0, 1): [misbehave("exit")]})


def test_a_stop_signal_ends_the_wait_for_a_tool(play):
    HANGS.clear()
    with pytest.raises(Interrupted):
        play({(0, 0): [misbehave("hang")]}, should_stop=HANGS.is_set)


def test_episodes_that_have_ended_when_a_signal_comes_may_be_kept(play):
    HANGS.clear()
    scripts = {(0, 0): [misbehave("hang")], (0, 1): [FINAL.format("1")], (0, 2): [FINAL.format("1" * 400)]}
    (ended,), _ = play(scripts, should_stop=HANGS.is_set, keeps_finished=True)
    assert (ended.sample, ended.finish_reason, ended.episode.reward) == (1, "stop", 0.125)


def test_a_signal_is_what_ends_a_rollout_though_all_episodes_that_have_ended_failed(play):
    class Half(Env):
        def episode(self, prompt, sample):
            return Breaking(prompt, sample) if sample == 1 else Tools(prompt, sample)

    HANGS.clear()
    scripts = {(0, 0): [misbehave("hang")], (0, 1): [FINAL.format("1")]}
    (ended,), _ = play(scripts, env=Half(), should_stop=HANGS.is_set, keeps_finished=True)
    assert ended.sample == 1 and "no judge" in ended.episode.failure
    assert "1 of 1 episodes failed and drop out" in play.warnings[0]


def test_groups_of_a_step_carry_turns_and_calls(play, model, monkeypatch):
    scripts = {(0, 0): [call(text="a"), FINAL.format("1")], (0, 1): [FINAL.format("2")]}
    completions, _ = play(scripts)

    class Whole(Env):
        def prompts(self, step, *, num_prompts, attempt):
            return [completions[0].prompt]

    config = SimpleNamespace(
        rollout=SimpleNamespace(prompts_per_step=1, group_size=2, refill_rounds=0, max_new_tokens=400, temperature=1.0, top_k=0,
                                top_p=1.0, min_p=0.0, replay_routing=False, oversampling=1.0, overlong_buffer=None),
        optim=SimpleNamespace(mask_truncated=False), advantage=AdvantageConfig(Baseline.group, Scale.none), kl=KlConfig(0.0))
    turns = Turns(Whole(), TOKENIZER, TurnsConfig())
    monkeypatch.setattr(turns, "generate", lambda sampler, *_, **__: completions)
    groups = collect(Whole(), Sampler(model, TOKENIZER.stop_ids, max_batch=4, seed=0), config, 0, lambda: False, turns=turns)
    found = groups.metrics
    assert (found["turns/mean"], found["turns/max"], found["calls/mean"], found["calls/share"], found["calls/failed"]) == (
        1.5, 2, 0.5, 0.5, 0.0)
    assert found["tokens/policy"] + found["tokens/env"] == found["completions/mean_length"] and found["tokens/env"] > 0
    record = completion_record(TOKENIZER, Whole(), *groups.scored[0], split="train")
    assert (record["turns"], record["calls"]) == (
        2, [{"name": "functions.echo", "arguments": '{"text": "a"}', "result": '"a"', "failed": False}])
    assert turn_metrics([Completion(completions[0].prompt, 0, [], "stop")]) == {}


@pytest.mark.parametrize("apart, together", [(1, [3] * 8), (3, [2] * 12)])
def test_where_rows_are_decoded_meanwhile_results_go_on_together(play, monkeypatch, apart, together):
    """24 rows, which park `apart` model calls after one another; the others are decoded all the time. Three of them are an
    eighth of 21, two are less than an eighth of 22; and a result waits for at most four calls."""
    monkeypatch.setattr("grpo.rollout.turns.overlaps", lambda device: True)
    resumed, resume = [], Scheduler.resume
    monkeypatch.setattr(Scheduler, "resume", lambda *args: resumed.append(resume(*args)) or resumed[-1])
    scripts = {(0, sample): ["<|message|>" + "1" * apart * sample + "<|call|>", FINAL.format("2" * 24 * 3)]
               for sample in range(24)}  # a call without a recipient, which is answered at once
    completions, _ = play(scripts)
    assert [len(rows) for rows in resumed if rows] == together
    assert all(completion.finish_reason == "stop" and len(completion.episode.calls) == 1 for completion in completions)
