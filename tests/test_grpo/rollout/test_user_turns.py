"""Episodes in which the user goes on after an answer: another row, whose prompt lacks the analysis of the finished turn."""

import pytest
from harmony import encode_with_special
from rollout_problem import assert_equal
from scripted_turns import CALL, FINAL, TOKENIZER, Env, Tools, call, text_of

from grpo.batch import pack
from grpo.config import TurnsConfig
from grpo.envs.resource_sessions import ResourceSessions
from grpo.envs.tool_class import ToolClass
from grpo.rollout.scheduler import Scheduler
from grpo.rollout.session import Session
from models.chat.form import Form
from models.chat.history import history_ids
from models.chat.parse import conversation, parse_completion
from models.chat.render import Message, harmony_messages, kept_messages, render_prompt

THOUGHT = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
USER = "<|start|>user<|message|>{}<|end|><|start|>assistant"
RESULT = '<|start|>functions.echo to=assistant<|channel|>commentary<|message|>"{}"<|end|><|start|>assistant'


class Talk(Tools):
    """A user who wants more, twice."""

    def __init__(self, prompt, sample):
        super().__init__(prompt, sample)
        self.answers = []

    def user_turn(self, answer: str) -> str | None:
        if answer == "crash":
            raise OSError("no user")
        self.answers.append(answer)
        return f"more than {answer}?" if len(self.answers) < 3 else None

    def get_reward(self):
        return float(len(self.answers))


class TalkEnv(Env):
    has_user_turns = True

    def episode(self, prompt, sample):
        return Talk(prompt, sample)


TALKS = """
class Chat:
    def reset(self, seed):
        return "q"

    def user_turn(self, answer: str) -> str | None:
        return "and?"

    def get_reward(self):
        return 1.0

class Talk(Chat):
    def guess(self, number: int) -> str:
        'Guesses.'
        return "no"

class Silent:
    reset, get_reward, guess = Chat.reset, Chat.get_reward, Talk.guess

class Session:
    def initial_messages(self): return [{"role": "user", "content": "q"}]
    def list_tools(self): return [{"name": "guess", "description": "Guesses.", "inputSchema": {}}]
    def call_tool(self, name, arguments): ...
    def verify(self, transcript): ...
    def close(self): ...
    def user_turn(self, answer): ...

class Factory:
    def create(self, task, seed=None, episode_id=None): return Session()
"""
SCRIPT = [THOUGHT.format("one"), call(text="ab"), THOUGHT.format("two"), FINAL.format("1"), THOUGHT.format("three"),
          FINAL.format("2"), FINAL.format("3")]


def test_a_user_turn_begins_a_row_without_the_analysis_of_the_finished_turn(play):
    (completion,), _ = play({(0, 0): SCRIPT}, env=TalkEnv())
    echo = call(text="ab")
    assert text_of(completion) == "".join([
        SCRIPT[0], echo, RESULT.format("ab"), SCRIPT[2], SCRIPT[3], USER.format("more than 1?"), SCRIPT[4], SCRIPT[5],
        USER.format("more than 2?"), SCRIPT[6]])
    assert (completion.finish_reason, completion.episode.reward) == ("stop", 3.0)
    prompts = [segment for segment in completion.segments if segment.source == "prompt"]
    own = TOKENIZER.decode(prompts[0].token_ids, keep_special=True)
    second = own + echo + RESULT.format("ab") + FINAL.format("1").replace("return", "end") + USER.format("more than 1?")
    third = second + FINAL.format("2").replace("return", "end") + USER.format("more than 2?")
    assert [TOKENIZER.decode(segment.token_ids, keep_special=True) for segment in prompts] == [own, second, third]
    parsed = parse_completion(completion.completion_ids, TOKENIZER, is_policy=completion.is_policy)
    assert (parsed.fault, parsed.final) == (None, "3")
    assert [(entry["role"], entry["content"]) for entry in conversation(parsed)] == [
        ("assistant", ""), ("tool", '"ab"'), ("assistant", "1"), ("user", "more than 1?"), ("assistant", "2"),
        ("user", "more than 2?"), ("assistant", "3")]


def test_each_sampled_token_is_trained_on_once_with_the_samplers_log_prob(play, model):
    scripts = {(0, 0): SCRIPT, (0, 1): [FINAL.format("no"), THOUGHT.format("x"), FINAL.format("a"), CALL.replace("{}", "{"),
                                        FINAL.format("b")]}
    completions, _ = play(scripts, env=TalkEnv())
    for completion in completions:
        sampled = [id for text in scripts[0, completion.sample] for id in encode_with_special(TOKENIZER, text)]
        assert [id for id, is_own in zip(completion.completion_ids, completion.is_policy) if is_own] == sampled
    batch = pack(completions, [1.0, -1.0])
    assert batch.owners == [0] * 3 + [1] * 3 and batch.sequence_lengths.tolist() == [one.num_policy_tokens for one in completions]
    log_probs, _ = model.log_probs(batch.tokens, batch.cu_seqlens, temperature=1.0, mask=batch.host_mask)
    assert (log_probs - batch.sampler_log_probs)[batch.loss_mask].abs().max() <= 1e-5


def disturbed(scheduler, num_steps, make_room=Scheduler.make_room):
    preempted = make_room(scheduler, num_steps)
    if len(scheduler.live) > 1 and scheduler.num_preemptions % 5 < 4:
        preempted.append(scheduler.live.pop())
        scheduler._preempt(preempted[-1])
    elif scheduler.live:
        scheduler.num_preemptions += 1
    scheduler._evict(scheduler.parked)
    return preempted


@pytest.mark.parametrize("how", ["two at a time", "prefilled in chunks", "preempted", "decoded while tools run"])
def test_they_end_alike_however_their_rows_are_run(play, monkeypatch, how):
    scripts = {(prompt, sample): SCRIPT if sample else SCRIPT[3:] for prompt in range(2) for sample in range(2)}
    expected, _ = play(scripts, env=TalkEnv())
    settings = {"two at a time": {"max_batch": 2}, "prefilled in chunks": {"max_prefill_tokens": 20}}.get(how, {})
    if how in ("preempted", "decoded while tools run"):
        monkeypatch.setattr(Scheduler, "make_room", disturbed)
    if how == "decoded while tools run":
        monkeypatch.setattr("grpo.rollout.turns.overlaps", lambda device: True)
    found, stats = play(scripts, env=TalkEnv(), **settings)
    assert_equal(found, expected)
    assert settings or stats.num_preemptions > 0


def test_limits_hold_for_all_rows_of_a_completion_together(play):
    (two,), _ = play({(0, 0): SCRIPT[3:]}, env=TalkEnv(), limits=TurnsConfig(max_turns=2))
    assert (two.finish_reason, two.episode.reward, len(two.sequences)) == ("stop", 1.0, 2)
    used = len(encode_with_special(TOKENIZER, SCRIPT[3] + USER.format("more than 1?")))
    for room, num_sequences, reason in ((0, 1, "length"), (1, 2, "length")):
        (cut,), _ = play({(0, 0): SCRIPT[3:]}, env=TalkEnv(), max_new_tokens=used + room)
        assert (cut.finish_reason, len(cut.sequences), len(cut.completion_ids)) == (reason, num_sequences, used + room
                                                                                   if room else len(cut.segments[1].token_ids))
    most = len(encode_with_special(TOKENIZER, SCRIPT[3]))
    (whole,), _ = play({(0, 0): SCRIPT[3:]}, env=TalkEnv(), max_new_tokens=most)  # the answer takes all of it
    assert (whole.finish_reason, len(whole.completion_ids)) == ("stop", most)


def test_the_user_hears_only_finished_answers_and_a_user_who_crashes_drops_the_episode(play):
    faulty = "<|channel|>analysis<|message|>only thoughts<|return|>"
    (silent, crashed), _ = play({(0, 0): [faulty], (0, 1): [FINAL.format("crash")]}, env=TalkEnv(),
                                limits=TurnsConfig(failed_call_reward=-1.0))
    assert (silent.finish_reason, silent.episode.reward) == ("stop", 0.0)
    assert "OSError: no user" in crashed.episode.failure and crashed.episode.failure_reward is None


def test_rows_of_user_turns_have_draws_of_their_own(play, monkeypatch):
    ids = []
    before = Session.submit

    def noted(session, prompts, num_samples, **keywords):
        ids.extend((prompt.id, keywords.get("first_sample", 0)) for prompt in prompts)
        return before(session, prompts, num_samples, **keywords)

    monkeypatch.setattr(Session, "submit", noted)
    scripts = {(0, 0): SCRIPT[3:], (0, 1): SCRIPT[3:]}
    play(scripts, env=TalkEnv())
    first = ids[:]
    ids.clear()
    play(scripts, env=TalkEnv(), max_batch=1)
    assert len(set(first)) == len(first) == 5 and sorted(ids) == sorted(first)  # by completion and turn alone


# ---- what stays in the prompt


HISTORY = [Message("user", "q"), Message("assistant", "t", "analysis"), Message("assistant", "p", "commentary"),
           Message("assistant", "1", "analysis", "python", "code"), Message("tool", "2", "analysis", "assistant", name="python"),
           Message("assistant", "{}", "commentary", "functions.f", "json"),
           Message("tool", "3", "commentary", "assistant", name="functions.f"), Message("assistant", "a", "final")]
LATER = [Message("user", "r"), Message("assistant", "u", "analysis"), Message("assistant", "b", "final")]


def test_the_forms_differ_in_what_they_drop():
    assert kept_messages(HISTORY, Form.hub) == [True, False, True, True, True, True, True, True]
    assert kept_messages(HISTORY, Form.library) == [True, False, True, False, False, True, True, True]
    assert kept_messages(HISTORY[:7], Form.hub) == kept_messages(HISTORY[:7], Form.library) == [True] * 7  # a chain that goes on
    assert kept_messages([*HISTORY, *LATER], Form.hub)[8:] == [True, False, True]
    assert kept_messages([*HISTORY, *LATER], Form.library)[8:] == [True, True, True]  # only what comes before the first answer


def turn_end() -> list[int]:
    return encode_with_special(TOKENIZER, "<|start|>assistant" + FINAL.format("a").replace("return", "end"))


def test_history_of_ids_is_what_a_rendering_of_the_conversation_has():
    """Calls are written as the hub's template writes them, so that a rendering gives the same ids."""
    arguments = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    asked = [{"role": "user", "content": "q"}]
    done = [*asked, {**arguments, "thinking": "t"}, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]
    pending = render_prompt(harmony_messages(done[:3], current_date="2025-06-28"), TOKENIZER)  # its analysis is in the prompt
    turn = encode_with_special(TOKENIZER, THOUGHT.format("u") + FINAL.format("a"))
    expected = render_prompt(harmony_messages([*done, {"role": "user", "content": "more"}], current_date="2025-06-28"), TOKENIZER)
    more = encode_with_special(TOKENIZER, USER.format("more"))
    assert history_ids(pending, turn, TOKENIZER, Form.hub) + more == expected
    broken = encode_with_special(TOKENIZER, "<|channel|>x<|channel|>y<|call|>" + RESULT.format("no"))
    rest = history_ids(pending, turn, TOKENIZER, Form.hub)[:-len(turn_end())]
    assert history_ids(pending, broken + turn, TOKENIZER, Form.hub) == [
        *rest, *encode_with_special(TOKENIZER, "<|start|>assistant"), *broken[:-2], *turn_end()]
    foreign = [3, 4, *encode_with_special(TOKENIZER, "<|start|>assistant")]  # no harmony: stays whole
    assert history_ids(foreign, turn, TOKENIZER, Form.hub) == [3, 4, *encode_with_special(
        TOKENIZER, "<|start|>assistant" + FINAL.format("a").replace("return", "end"))]


def test_classes_and_sessions_with_user_turn_are_known_and_it_is_no_tool(tmp_path):
    path = tmp_path / "talks.py"
    path.write_text(TALKS)
    settings = {"kwargs": None, "path": None, "prompt_key": "prompt", "instructions": None, "reasoning_effort": "low",
                "current_date": "2025-08-05", "held_out_fraction": 0.25, "num_eval_prompts": 4}
    for kind, name, has_user_turns in ((ToolClass, "Silent", False), (ToolClass, "Talk", True), (ToolClass, "Chat", True),
                                       (ResourceSessions, "Factory", True)):
        env = kind(tokenizer=ToolClass.build_tokenizer(), seed=0, environment=f"{path}:{name}", **settings)
        assert env.has_user_turns == has_user_turns
        assert [tool["name"] for tool in env.tools] == ([] if name == "Chat" else ["guess"])
