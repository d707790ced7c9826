"""Episodes of several turns by a scripted policy: what is sampled, appended and trained on; environments that misbehave."""

import json
import os
import random
import re
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from harmony import encode_with_special
from paths import FIXTURES
from rollout_problem import assert_equal, make_config

from grpo.batch import Completion, Prompt, ToolCall, pack
from grpo.config import ResultForm, TurnsConfig
from grpo.environment import EnvironmentFault, Score, checked_scores
from grpo.groups import collect, completion_record, turn_metrics
from grpo.losses import LossInputs, dapo, dr_grpo, grpo
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.scheduler import Scheduler
from grpo.rollout.session import Interrupted, Sampler, Session
from grpo.rollout.turns import Turns
from models.chat.parse import parse_completion
from models.chat.tokenizer import Tokenizer
from models.gpt_oss import KeptSets

pytestmark = pytest.mark.slow

CASES = json.loads((FIXTURES / "harmony" / "tool_turns.json").read_text(encoding="utf-8"))
TOKENIZER = Tokenizer.load(FIXTURES / "tokenizer_compact")
CALL = "<|channel|>commentary to=functions.echo <|constrain|>json<|message|>{}<|call|>"
FINAL = "<|channel|>final<|message|>{}<|return|>"


HANGS = threading.Event()  # set by a tool that does not come back


class Tools:
    """What answers calls in these tests."""

    def __init__(self, prompt: Prompt, sample: int) -> None:
        self.prompt, self.sample, self.num_calls = prompt, sample, 0
        self.children: list[subprocess.Popen] = []

    def reset(self) -> None:
        """Not a tool."""

    def echo(self, text: str, times: int = 1) -> str:
        """Repeats."""
        self.num_calls += 1
        return text * times

    async def count(self) -> int:
        """Counts the calls."""
        self.num_calls += 1
        return self.num_calls

    def refuse(self) -> None:
        """Tells the model no."""
        raise ValueError("game over")

    def misbehave(self, how: str) -> object:
        """Fails."""
        if how == "raise":
            raise KeyError("lost")
        if how == "exit":
            raise SystemExit(3)
        if how == "hang":
            HANGS.set()
            threading.Event().wait(600)
        if how == "leak":
            self.children.append(subprocess.Popen(["sleep", "600"]))
        if how == "fork" and os.fork() == 0:
            return "in the child"
        return "x" * 10_000_000 if how == "flood" else "fine"

    def get_reward(self) -> float:
        return self.num_calls + self.sample / 8


class Env:
    def episode(self, prompt, sample):
        return Tools(prompt, sample)

    def score(self, completions):
        return [Score(float(completion.episode.reward), {}, {}, None) for completion in completions]


@pytest.fixture(scope="module")
def model(lively_model):
    config = make_config()
    config.vocab_size, config.max_position_embeddings = TOKENIZER.vocab_size, 2048
    return lively_model(config, head_factor=5.0)


@pytest.fixture
def play(model, monkeypatch):
    """Plays scripts, texts of turns by (prompt id, sample), against an environment; returns completions and statistics."""

    def play(scripts, *, env=None, limits=None, max_new_tokens=1500, prompt_len=12, records_routing=False,
             should_stop=None, **settings):
        ids = {key: [id for text in texts for id in encode_with_special(TOKENIZER, text)] for key, texts in scripts.items()}
        num_drawn = dict.fromkeys(ids, 0)

        def scripted(session, hidden, rows):
            """The script's tokens, with the model's own log-probs."""
            tokens = []
            for index in rows.items.tolist():
                key = session.rows[index].prompt.id, session.rows[index].sample
                tokens.append(ids[key][num_drawn[key]])
                num_drawn[key] += 1
            tokens = torch.tensor(tokens)
            everything = KeptSets.of_counts(torch.arange(TOKENIZER.vocab_size, dtype=torch.int32).repeat(len(tokens)),
                                            torch.full((len(tokens),), TOKENIZER.vocab_size))
            return tokens, session._model.score(hidden, tokens, temperature=1.0, kept=everything)

        monkeypatch.setattr(Session, "_draw", scripted)
        rng = random.Random(5)
        prompts = [Prompt(id, [rng.randrange(256) for _ in range(prompt_len)], {"row": id}) for id in dict.fromkeys(
            id for id, _ in scripts)]
        sampler = Sampler(model, TOKENIZER.stop_ids, **{"max_batch": 64, "seed": 7} | settings)
        sampler.warn = play.warnings.append
        turns = Turns(Env() if env is None else env, TOKENIZER, limits or TurnsConfig())
        completions = turns.generate(sampler, prompts, SamplingParams(max_new_tokens=max_new_tokens,
                                                                      records_routing=records_routing),
                                     step=3, num_samples=len(scripts) // len(prompts), should_stop=should_stop)
        return completions, sampler.last_stats

    play.warnings = []
    return play


def call(**arguments) -> str:
    return CALL.replace("{}", json.dumps(arguments))


def misbehave(how: str) -> str:
    return call(how=how).replace("echo", "misbehave")


def text_of(completion: Completion) -> str:
    return TOKENIZER.decode(completion.completion_ids, keep_special=True)


def random_scripts(num_prompts: int, num_samples: int, *, seed: int) -> dict[tuple[int, int], list[str]]:
    """Turns with and without analysis, calls of all kinds, malformed ones among them, and an end."""
    rng = random.Random(seed)
    calls = [
        lambda: call(text="ab", times=rng.randrange(4)), lambda: CALL.replace("echo", "count").replace("{}", "{}"),
        lambda: call(text=rng.randrange(9)), lambda: CALL.replace("echo", "nothing"), lambda: CALL.replace("echo", "refuse"),
        lambda: CALL.replace("{}", '{"text": '), lambda: "<|channel|>commentary<|message|>to whom?<|call|>",
        lambda: "<|channel|>commentary<|channel|>x<|call|>", lambda: call(text="é<|end|>\n")]
    scripts = {}
    for key in [(prompt, sample) for prompt in range(num_prompts) for sample in range(num_samples)]:
        thought = "<|channel|>analysis<|message|>hm {}<|end|><|start|>assistant"
        turns = [rng.choice(["", thought.format(i)]) + rng.choice(calls)() for i in range(rng.randrange(6))]
        scripts[key] = [*turns, FINAL.format(rng.randrange(99))]
    return scripts


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
    turns = Turns(Env(), Tokenizer.load(FIXTURES / "tokenizer_real_ids"), TurnsConfig(form=ResultForm.library))
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


@pytest.mark.parametrize("loss_fn", [grpo, dapo, partial(dr_grpo, length_normalizer=100.0)], ids=["grpo", "dapo", "dr_grpo"])
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
    ("raise", r"raised KeyError: 'lost' \(.*test_turns.py"), ("exit", "raised SystemExit: 3"),
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


def children_of_this_process() -> list[str]:
    return [child for task in os.listdir("/proc/self/task") for child in open(f"/proc/self/task/{task}/children").read().split()
            if open(f"/proc/{child}/cmdline").read().startswith("sleep")]


def test_if_all_episodes_fail_the_run_ends_and_says_why(play):
    with pytest.raises(EnvironmentFault, match="all 2 episodes failed, prompt 0 .*raised KeyError"):
        play({(0, 0): [misbehave("raise")], (0, 1): [misbehave("raise")]})


def test_a_stop_signal_ends_the_wait_for_a_tool(play):
    HANGS.clear()
    with pytest.raises(Interrupted):
        play({(0, 0): [misbehave("hang")]}, should_stop=HANGS.is_set)


def test_groups_of_a_step_carry_turns_and_calls(play, model, monkeypatch):
    scripts = {(0, 0): [call(text="a"), FINAL.format("1")], (0, 1): [FINAL.format("2")]}
    completions, _ = play(scripts)

    class Whole(Env):
        def prompts(self, step, *, num_prompts, attempt):
            return [completions[0].prompt]

    config = SimpleNamespace(
        rollout=SimpleNamespace(prompts_per_step=1, group_size=2, refill_rounds=0, max_new_tokens=400, temperature=1.0, top_k=0,
                                top_p=1.0, min_p=0.0, replay_routing=False),
        optim=SimpleNamespace(mask_truncated=False), advantage=SimpleNamespace(normalize_std=False))
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
