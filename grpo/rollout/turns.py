"""Completions of several turns: the model calls tools, the environment answers, and the model goes on.

A row that draws <|call|> parks (grpo/rollout/session.py). Its call is parsed and made in the episode's thread
(grpo/rollout/episodes.py), and the result is appended as tokens of the source `env`: a tool message, and the start of the
assistant's next one. What the model sampled is never rendered again, and analysis stays, as harmony wants it within a chain of
calls. A call that cannot be understood is answered by an error.

Where the environment has user turns, a row that draws <|return|> parks too. If the user has something to say, harmony drops the
analysis that led to the answer (models/chat/history.py), so another row goes on from what stays and the user's message. Both are
trained on, as the sequences of one completion; the limits hold for them together.

On a GPU other rows are decoded while tools run, and results wait a little for one another, since each prefill holds up everything
else. On a CPU, whose products round by the number of rows, decoding waits for tools, so that a run repeats bit by bit. An
environment's object begins anew with each completion: there is no state to save. What it does must depend only on its arguments;
what a clock decides (a call past its time) is the exception.
"""

import faulthandler
import hashlib
import queue
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from grpo.batch import Completion, Episode, Prompt, ToolCall
from grpo.config import ConfigError, TurnsConfig
from grpo.environment import Environment, EnvironmentFault
from grpo.rewards.user_code import protected
from grpo.rewards.values import shorten
from grpo.rollout.episodes import EpisodeFault, EpisodeThread, UserTurn, describe
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.scheduler import RolloutRow
from grpo.rollout.session import Interrupted, Sampler, Session
from models.chat.form import Form
from models.chat.history import history_ids
from models.chat.parse import Parsed, conversation, parse_completion
from models.chat.render import CHANNELS, ROLES, Message, generation_prompt, render_message
from models.chat.tokenizer import Tokenizer
from models.chat.tools import to_json

MOST_JOBS = 64  # episodes whose code runs at the same time; others wait, and their time does not count
PATIENCE = 0.1  # seconds between two looks at deadlines and stop signals
GRACE = 60.0  # seconds beyond turns.call_seconds; see _Rollout._watch
CUT = "... (cut off)"
# Results go on together once they are a share of the rows that are decoded, or after so many model calls (of SYNC_STEPS decode
# steps). A row that waits takes no part in decoding; one that does not holds up all others (scripts/EXPERIMENTS.md: turns).
SHARE_TOGETHER = 1 / 8
MOST_CALLS_HELD = 4


class Turns:
    """Takes turns between the policy and an environment that has `episode` (grpo.environment.OptionalMethods)."""

    def __init__(self, env: Environment, tokenizer: Tokenizer, limits: TurnsConfig) -> None:
        self.env, self.tokenizer, self.limits = env, tokenizer, limits
        self.has_user_turns = hasattr(env, "has_user_turns") and bool(env.has_user_turns)
        self.has_warned = False  # of what tools raise, once a run
        try:
            tokenizer.encode("functions to=assistant commentary")
        except ValueError as error:
            raise ConfigError(f"model.tokenizer: cannot write the header of a tool's result: {error}") from error

    @staticmethod
    def of(env: Environment, tokenizer: Tokenizer, limits: TurnsConfig) -> "Turns | None":
        """None for an environment without tools."""
        return Turns(env, tokenizer, limits) if hasattr(env, "episode") else None

    def generate(self, sampler: Sampler, prompts: list[Prompt], params: SamplingParams, *, step: int, num_samples: int,
                 should_stop: Callable[[], bool] | None = None, progress: Callable[[int, int], None] | None = None,
                 keeps_finished: bool = False) -> list[Completion]:
        """As Sampler.generate, with turns; each completion has its `episode`. Completions whose environment fails end with the
        reason "failed". Raises EnvironmentFault if all of them do. keeps_finished: as of `until_stopped`."""
        name = type(self.env).__name__
        ends = (self.tokenizer.call, self.tokenizer.return_) if self.has_user_turns else (self.tokenizer.call,)
        params = replace(params, park_ids=ends)
        with (sampler.open(params, step=step, should_stop=should_stop, progress=progress) as session,
              protected(f"environment {name}.episode")):
            rollout = _Rollout(self, session, overlaps=overlaps(sampler.model.device), should_stop=should_stop)
            try:
                rollout.run(session.submit(prompts, num_samples))
                finished, sequences = rollout.plays, dict(enumerate(session.drain()))
            except Interrupted:
                if not keeps_finished:
                    raise
                finished = rollout.finished()
                sequences = {row.index: session.completion(row) for play in finished for row in play.rows}
            finally:
                rollout.leave()
        completions = [play.completion(sequences) for play in finished]
        self._report(name, completions, sampler.warn, step=step, are_all=len(finished) == len(rollout.plays))
        return completions

    def _report(self, name: str, completions: list[Completion], warn: Callable[[str], None], *, step: int, are_all: bool) -> None:
        """Warns of episodes that failed and, once, of tools that raise. Raises EnvironmentFault if all have failed. are_all: no
        signal has stopped others, which might have ended well."""
        failed, raised = [], []
        for completion in completions:
            episode = completion.episode
            where = f"prompt {completion.prompt.id} ({shorten(completion.prompt.row, 80)}), sample {completion.sample}: "
            if episode.failure is not None:
                episode.failure_reward = self.limits.failed_call_reward if episode.may_be_models else None
                failed.append((episode, where + episode.failure))
            raised += [f"{where}{call.name} {call.raised}" for call in episode.calls if call.raised is not None]
        dropped = [text for episode, text in failed if episode.failure_reward is None]
        if are_all and dropped and len(dropped) == len(completions):
            raise EnvironmentFault(f"environment {name}: all {len(completions)} episodes failed, {dropped[0]}")
        if dropped:
            warn(f"warning: environment {name}: {len(dropped)} of {len(completions)} episodes failed and drop out of their "
                 f"groups (step {step}); {dropped[0]}")
        if len(failed) > len(dropped):
            warn(f"warning: environment {name}: {len(failed) - len(dropped)} of {len(completions)} episodes failed in the "
                 f"model's calls and get {self.limits.failed_call_reward:g} (turns.failed_call_reward; step {step}); "
                 + next(text for episode, text in failed if episode.failure_reward is not None))
        if raised and not self.has_warned:
            self.has_warned = True
            warn(f"warning: environment {name}: {len(raised)} calls raised, which the model was told; correct the tool if that "
                 f"is not its arguments' fault (said once; calls/raised counts them); {raised[0]}")

    def reply(self, call: ToolCall, channel: str | None) -> list[int]:
        """Token ids that follow a sampled <|call|>: the tool's message, and the start of the assistant's."""
        tokenizer = self.tokenizer
        name = self._encodable(re.sub(r"[^\w.-]", "", call.name)[:64])
        name = "functions" if name in ("", *ROLES) else name  # nothing that the model names speaks as the user or the system
        channel = channel if channel in CHANNELS else "commentary"
        message = Message("tool", "", channel, recipient="assistant", name=name)
        *header, end = render_message(message, tokenizer)
        is_json = call.is_failed and self.limits.form == Form.hub
        text = to_json({"error": call.result}, call.name) if is_json else call.result
        return [*header, *self._cut(text), end, *generation_prompt(tokenizer)]

    def user_message(self, text: str) -> list[int]:
        """Token ids of the user's message, and the start of the assistant's."""
        *header, end = render_message(Message("user", ""), self.tokenizer)
        return [*header, *self._cut(text), end, *generation_prompt(self.tokenizer)]

    def _cut(self, text: str) -> list[int]:
        """Token ids of what the environment says, within its limit."""
        ids, most = self.tokenizer.encode(self._encodable(text)), self.limits.max_result_tokens
        return ids if len(ids) <= most else ids[:most] + self.tokenizer.encode(self._encodable(CUT))

    def read_call(self, turn_ids: list[int]) -> tuple[Message | None, str]:
        """The call that ends a turn; or None, and the reason why there is none."""
        parsed = parse_completion(turn_ids, self.tokenizer)
        if parsed.error is not None:
            return None, f"the message cannot be read: {parsed.error}"
        message = parsed.messages[-1]
        if message.role != "assistant" or not message.recipient:
            return None, "the message has no recipient; a call is written to=functions.NAME"
        return message, ""

    def parse(self, play: "_Play") -> Parsed:
        """A completion's messages behind its first prompt."""
        marked = play.marked_ids()
        return parse_completion([id for id, _ in marked], self.tokenizer, is_policy=[is_own for _, is_own in marked])

    def _encodable(self, text: str) -> str:
        """The text, without what the tokenizer cannot encode."""
        try:
            self.tokenizer.encode(text)
            return text
        except ValueError:
            known = {char: self._encodes(char) for char in set(text)}
            return "".join(char for char in text if known[char])

    def _encodes(self, text: str) -> bool:
        try:
            self.tokenizer.encode(text)
            return True
        except ValueError:
            return False


def generator(sampler: Sampler, turns: Turns | None) -> Callable[..., list[Completion]]:
    """The sampler's generate, or that of `turns` with the sampler."""
    return sampler.generate if turns is None else partial(turns.generate, sampler)


def until_stopped(sampler: Sampler, turns: Turns | None) -> Callable[..., list[Completion]]:
    """As `generator`, but where should_stop ends it, it returns the completions that are finished, in the same order."""
    return partial(_finished, sampler) if turns is None else partial(turns.generate, sampler, keeps_finished=True)


def _finished(sampler: Sampler, prompts: list[Prompt], params: SamplingParams, *, step: int, num_samples: int,
              should_stop: Callable[[], bool] | None, progress: Callable[[int, int], None] | None) -> list[Completion]:
    with sampler.open(params, step=step, should_stop=should_stop, progress=progress) as session:
        rows = session.submit(prompts, num_samples)
        try:
            return session.drain()
        except Interrupted:
            return [session.completion(row) for row in rows if row.is_finished]


def overlaps(device: torch.device) -> bool:
    """Whether rows are decoded while tools run."""
    return device.type == "cuda"


@dataclass
class _Play:
    """A completion while it is played: its rows, one after the other, and its episode."""

    index: int  # among the completions
    rows: list[RolloutRow]
    repeated: list[int]  # of each row's prompt: the first tokens that the completion has had before
    thread: EpisodeThread | None = None  # from the first job to the end
    record: Episode = field(default_factory=Episode)
    channel: str | None = None  # of the call that is answered

    @property
    def row(self) -> RolloutRow:
        return self.rows[-1]

    @property
    def turns(self) -> list[list[int]]:
        """What the policy has sampled, turn by turn."""
        return [segment.token_ids for row in self.rows for segment in row.segments if segment.source == "policy"]

    def marked_ids(self) -> list[tuple[int, bool]]:
        """The tokens behind the first prompt, each once, and whether the policy sampled them."""
        ids = []
        for index, (row, num_repeated) in enumerate(zip(self.rows, self.repeated)):
            ids += [(id, False) for id in row.prompt.token_ids[num_repeated:]] if index else []
            ids += [(id, segment.source == "policy") for segment in row.segments for id in segment.token_ids]
        return ids

    def completion(self, sequences: dict[int, Completion]) -> Completion:
        """The completion. sequences: of its rows, by their index."""
        parts = [sequences[row.index].segments for row in self.rows]
        for (prompt, *_), num_repeated in zip(parts[1:], self.repeated[1:]):
            prompt.num_repeated = num_repeated
        segments = [segment for part in parts for segment in part]
        return Completion(self.rows[0].prompt, self.row.sample, segments, self.row.finish_reason, episode=self.record)


class _Rollout:
    """The episodes of one session."""

    def __init__(self, turns: Turns, session: Session, *, overlaps: bool, should_stop: Callable[[], bool] | None) -> None:
        self.turns, self.session, self.overlaps, self.should_stop = turns, session, overlaps, should_stop
        self.plays: list[_Play] = []
        self.play_of: dict[int, _Play] = {}  # by the index of any of its rows
        self.waiting: deque[tuple[int, Callable[[EpisodeThread], None]]] = deque()
        self.running: set[int] = set()  # indices of plays, as in `waiting`
        self.replies: queue.SimpleQueue = queue.SimpleQueue()
        self.outcomes: dict[int, object] = {}  # what jobs came to, by the index of the play, until it is taken
        self.num_calls_held = 0  # model calls since the first of them came

    def run(self, rows: list[RolloutRow]) -> None:
        self.plays = [_Play(index, [row], [0]) for index, row in enumerate(rows)]
        self.play_of = {play.row.index: play for play in self.plays}
        while self.session.is_running or self.waiting or self.running or self.outcomes:
            for row in sorted(self.session.poll(), key=lambda row: row.index):
                self._take_turn(self.play_of[row.index])
            self._receive(waits=not (self.overlaps and self.session.is_running))

    def finished(self) -> list[_Play]:
        """Those whose row and episode have ended."""
        waiting = {index for index, _ in self.waiting}
        return [play for play in self.plays if play.row.is_finished and play.thread is None and play.index not in waiting]

    def leave(self) -> None:
        """Lets the threads of unfinished episodes go."""
        faulthandler.cancel_dump_traceback_later()
        for play in self.plays:
            self._leave(play)

    def _take_turn(self, play: _Play) -> None:
        """Begins what follows a turn: a call, the user's turn or the end."""
        row, tokenizer, turns = play.row, self.turns.tokenizer, play.turns
        is_answer, is_last = turns[-1][-1] == tokenizer.return_, len(turns) >= self.turns.limits.max_turns
        if row.is_finished:
            row.finish_reason = "stop" if is_answer else row.finish_reason  # an answer without room for another turn
            return self._end(play)
        if is_last:
            self.session.finish(row, "stop" if is_answer else "turns")
            return self._end(play)
        if is_answer:
            parsed = parse_completion(turns[-1], tokenizer)  # a malformed call before it has been answered, and is past
            if parsed.fault is None:
                job = partial(EpisodeThread.reply, answer=parsed.final, transcript=partial(self._transcript, play))
                return self._enqueue(play, job)
            self.session.finish(row, "stop")
            return self._end(play)
        message, problem = self.turns.read_call(turns[-1])
        if message is None:
            self.outcomes[play.index] = ToolCall("", tokenizer.decode(turns[-1], keep_special=True), problem, True)
            return None
        play.channel = message.channel
        self._enqueue(play, partial(EpisodeThread.call, name=message.recipient, arguments=message.content))

    def _transcript(self, play: _Play) -> list[dict]:
        return conversation(self.turns.parse(play))

    def _end(self, play: _Play) -> None:
        self._enqueue(play, partial(EpisodeThread.end, transcript=partial(self._transcript, play)))

    def _answer(self, play: _Play, call: ToolCall) -> None:
        """Continues a row with a call's result, or ends it where there is no room."""
        play.record.calls.append(call)
        ids, play.channel = self.turns.reply(call, play.channel), None
        if len(ids) <= play.row.room:
            self.session.continue_with(play.row, ids)
        else:
            self.session.finish(play.row, "length")
            self._end(play)

    def _go_on(self, play: _Play, text: str) -> None:
        """Begins another row behind the user's message, or ends the completion where there is no room. Its draws have a key of
        their own, since its positions are those of other tokens."""
        row, ids = play.row, self.turns.user_message(text)
        if len(ids) > row.room:
            self.session.finish(row, "length")
            return self._end(play)
        self.session.finish(row, "user")
        past = history_ids(row.prompt.token_ids, row.completion_ids, self.turns.tokenizer, self.turns.limits.form)
        digest = hashlib.sha256(f"{play.rows[0].prompt.id} {row.sample} {len(play.rows)}".encode()).digest()
        prompt = Prompt(int.from_bytes(digest[:8], "big") >> 1, past + ids, row.prompt.row)
        play.rows += self.session.submit([prompt], 1, first_sample=row.sample, most_new_tokens=row.limit - row.num_new - len(ids))
        play.repeated.append(len(past))
        self.play_of[play.row.index] = play

    def _fail(self, play: _Play, reason: str) -> None:
        play.record.failure = reason
        play.record.may_be_models = play.thread.is_in_tool or any(call.raised is not None for call in play.record.calls)
        if not play.row.is_finished:
            self.session.finish(play.row, "failed")

    # ---- jobs

    def _enqueue(self, play: _Play, job: Callable[[EpisodeThread], None]) -> None:
        self.waiting.append((play.index, job))

    def _receive(self, *, waits: bool) -> None:
        """Starts jobs and takes outcomes: with `waits` all, in the order of the rows, or at least one if rows can be decoded
        beside; without, those that there are, once they are enough."""
        while True:
            while self.waiting and len(self.running) < MOST_JOBS:
                self._start(*self.waiting.popleft())
            try:
                thread, outcome = self.replies.get(timeout=PATIENCE) if waits and self.running else self.replies.get_nowait()
                if thread.index in self.running:  # not one that was given up
                    self._note(thread.index, outcome)
            except queue.Empty:
                if self.should_stop is not None and waits and self.should_stop():
                    raise Interrupted("while tools were running") from None
            self._give_up_late()
            self._watch()
            if not waits and self.replies.empty() or waits and not (self.running or self.waiting):
                break
            if waits and self.overlaps and self.outcomes:
                break
        if self.outcomes and (waits or self._are_enough()):
            self.num_calls_held = 0
            while self.outcomes:
                index = min(self.outcomes)
                self._finish_job(self.plays[index], self.outcomes.pop(index))

    def _are_enough(self) -> bool:
        """Whether the outcomes are enough to interrupt the decoding of the other rows."""
        self.num_calls_held += 1
        num_parked = sum(self.plays[index].row.is_parked for index in self.outcomes)
        num_decoded = sum(row.slot is not None and not row.is_parked for row in (play.row for play in self.plays))
        return num_parked >= SHARE_TOGETHER * num_decoded or self.num_calls_held >= MOST_CALLS_HELD

    def _start(self, index: int, job: Callable[[EpisodeThread], None]) -> None:
        play, turns = self.plays[index], self.turns
        if play.thread is None:
            play.thread = EpisodeThread(index, partial(turns.env.episode, play.row.prompt, play.row.sample), self.replies,
                                        writes_json=turns.limits.form == Form.hub)
        self.running.add(index)
        self._watch()
        job(play.thread)

    def _leave(self, play: _Play) -> None:
        if play.thread is not None:
            play.thread.leave()
            play.thread = None

    def _note(self, index: int, outcome: object) -> None:
        self.outcomes[index] = outcome
        self.running.remove(index)
        self.plays[index].record.seconds += time.monotonic() - self.plays[index].thread.started

    def _give_up_late(self) -> None:
        limit = self.turns.limits.call_seconds
        for index in [index for index in self.running if self.plays[index].thread.is_late(limit)]:
            self.plays[index].thread.give_up()
            self._note(index, EpisodeFault(f"its code ran over {limit:g} s (turns.call_seconds)"))

    def _watch(self) -> None:
        """Has the lines that all threads are at written to stderr, unless this is called again in time. Code in C that keeps
        Python's lock (a regular expression, a huge power) holds up this thread too, so that nothing can give it up."""
        if self.running:
            faulthandler.dump_traceback_later(self.turns.limits.call_seconds + GRACE, file=2)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _finish_job(self, play: _Play, outcome: object) -> None:
        if isinstance(outcome, ToolCall):
            return self._answer(play, outcome)
        if isinstance(outcome, UserTurn):
            return self._go_on(play, outcome.text)
        if isinstance(outcome, BaseException):
            self._fail(play, describe(outcome))
        else:
            play.record.reward = outcome
            if not play.row.is_finished:  # the user had nothing to say
                self.session.finish(play.row, "stop")
        self._leave(play)
