"""Completions of several turns: the model calls tools, the environment answers, and the model goes on.

A row that draws <|call|> parks (grpo/rollout/session.py). Its call is parsed and made in the episode's thread
(grpo/rollout/episodes.py), and the result is appended as tokens of the source `env`: a tool message, and the start of the
assistant's next one. What the model sampled is never rendered again, and analysis stays, as harmony wants it within a chain of
calls. A call that cannot be understood is answered by an error.

On a GPU other rows are decoded while tools run. On a CPU, whose products round by the number of rows, decoding waits for them,
so that a run repeats bit by bit. An environment's object begins anew with each completion: there is no state to save. What it
does must depend only on its arguments; what a clock decides (a call past its time) is the exception.
"""

import queue
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from grpo.batch import Completion, Episode, Prompt, ToolCall
from grpo.config import ConfigError, ResultForm, TurnsConfig
from grpo.environment import Environment, EnvironmentFault
from grpo.rewards.user_code import protected
from grpo.rewards.values import shorten
from grpo.rollout.episodes import EpisodeFault, EpisodeThread, describe
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.scheduler import RolloutRow
from grpo.rollout.session import Interrupted, Sampler, Session
from models.chat.parse import conversation, parse_completion
from models.chat.render import CHANNELS, Message, generation_prompt, render_message
from models.chat.tokenizer import Tokenizer
from models.chat.tools import to_json

MOST_JOBS = 64  # episodes whose code runs at the same time; others wait, and their time does not count
PATIENCE = 0.1  # seconds between two looks at deadlines and stop signals
CUT = "... (cut off)"


class Turns:
    """Takes turns between the policy and an environment that has `episode` (grpo.environment.OptionalMethods)."""

    def __init__(self, env: Environment, tokenizer: Tokenizer, limits: TurnsConfig) -> None:
        self.env, self.tokenizer, self.limits = env, tokenizer, limits
        self.park_ids = (tokenizer.call,)
        try:
            tokenizer.encode("functions to=assistant commentary")
        except ValueError as error:
            raise ConfigError(f"model.tokenizer: cannot write the header of a tool's result: {error}") from error

    @staticmethod
    def of(env: Environment, tokenizer: Tokenizer, limits: TurnsConfig) -> "Turns | None":
        """None for an environment without tools."""
        return Turns(env, tokenizer, limits) if hasattr(env, "episode") else None

    def generate(self, sampler: Sampler, prompts: list[Prompt], params: SamplingParams, *, step: int, num_samples: int,
                 should_stop: Callable[[], bool] | None = None,
                 progress: Callable[[int, int], None] | None = None) -> list[Completion]:
        """As Sampler.generate, with turns; each completion has its `episode`. Completions whose environment fails end with the
        reason "failed". Raises EnvironmentFault if all of them do."""
        name = type(self.env).__name__
        params = replace(params, park_ids=self.park_ids)
        with (sampler.open(params, step=step, should_stop=should_stop, progress=progress) as session,
              protected(f"environment {name}.episode")):
            rollout = _Rollout(self, session, overlaps=overlaps(sampler.model.device), should_stop=should_stop)
            try:
                rollout.run(session.submit(prompts, num_samples))
            finally:
                rollout.leave()
            completions = session.drain()
        for completion, row in zip(completions, session.rows, strict=True):
            completion.episode = rollout.records[row.index]
        failures = [f"prompt {completion.prompt.id} ({shorten(completion.prompt.row, 80)}), sample {completion.sample}: "
                    f"{completion.episode.failure}" for completion in completions if completion.episode.failure is not None]
        if failures and len(failures) == len(completions):
            raise EnvironmentFault(f"environment {name}: all {len(completions)} episodes failed, {failures[0]}")
        if failures:
            sampler.warn(f"warning: environment {name}: {len(failures)} of {len(completions)} episodes failed and drop out of "
                         f"their groups (step {step}); {failures[0]}")
        return completions

    def reply(self, call: ToolCall, channel: str | None) -> list[int]:
        """Token ids that follow a sampled <|call|>: the tool's message, and the start of the assistant's."""
        tokenizer = self.tokenizer
        name = self._encodable(re.sub(r"[^\w.-]", "", call.name)[:64]) or "functions"
        channel = channel if channel in CHANNELS else "commentary"
        message = Message("tool", "", channel, recipient="assistant", name=name)
        *header, end = render_message(message, tokenizer)
        is_json = call.is_failed and self.limits.form == ResultForm.hub
        text = to_json({"error": call.result}, call.name) if is_json else call.result
        content = tokenizer.encode(self._encodable(text))
        if len(content) > self.limits.max_result_tokens:
            content = content[:self.limits.max_result_tokens] + tokenizer.encode(self._encodable(CUT))
        return [*header, *content, end, *generation_prompt(tokenizer)]

    def read_call(self, turn_ids: list[int]) -> tuple[Message | None, str]:
        """The call that ends a turn; or None, and the reason why there is none."""
        parsed = parse_completion(turn_ids, self.tokenizer)
        if parsed.error is not None:
            return None, f"the message cannot be read: {parsed.error}"
        message = parsed.messages[-1]
        if message.role != "assistant" or not message.recipient:
            return None, "the message has no recipient; a call is written to=functions.NAME"
        return message, ""

    def transcript(self, row: RolloutRow) -> list[dict]:
        """A row's messages behind its prompt, as APIs have them."""
        ids = [id for segment in row.segments for id in segment.token_ids]
        is_policy = [segment.source == "policy" for segment in row.segments for _ in segment.token_ids]
        return conversation(parse_completion(ids, self.tokenizer, is_policy=is_policy))

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


def overlaps(device: torch.device) -> bool:
    """Whether rows are decoded while tools run."""
    return device.type == "cuda"


class _Rollout:
    """The episodes of one session."""

    def __init__(self, turns: Turns, session: Session, *, overlaps: bool, should_stop: Callable[[], bool] | None) -> None:
        self.turns, self.session, self.overlaps, self.should_stop = turns, session, overlaps, should_stop
        self.records: dict[int, Episode] = {}  # by row, as everything here
        self.rows: dict[int, RolloutRow] = {}
        self.threads: dict[int, EpisodeThread] = {}
        self.channels: dict[int, str | None] = {}  # of the call that is answered
        self.waiting: deque[tuple[int, Callable[[EpisodeThread], None]]] = deque()
        self.running: set[int] = set()
        self.replies: queue.SimpleQueue = queue.SimpleQueue()

    def run(self, rows: list[RolloutRow]) -> None:
        self.rows = {row.index: row for row in rows}
        self.records = {row.index: Episode() for row in rows}
        while self.session.is_running or self.waiting or self.running:
            for row in sorted(self.session.poll(), key=lambda row: row.index):
                self._take_turn(row)
            self._receive(waits=not (self.overlaps and self.session.is_running))

    def leave(self) -> None:
        """Lets the threads of unfinished episodes go."""
        for thread in self.threads.values():
            thread.leave()

    def _take_turn(self, row: RolloutRow) -> None:
        """Begins what follows a row's turn: a call, or the end."""
        turns = [segment.token_ids for segment in row.segments if segment.source == "policy"]
        if row.is_finished:
            return self._end(row)
        if len(turns) >= self.turns.limits.max_turns:
            self.session.finish(row, "turns")
            return self._end(row)
        message, problem = self.turns.read_call(turns[-1])
        if message is None:
            return self._answer(row, ToolCall("", self.turns.tokenizer.decode(turns[-1], keep_special=True), problem, True))
        self.channels[row.index] = message.channel
        self._enqueue(row, partial(EpisodeThread.call, name=message.recipient, arguments=message.content))

    def _end(self, row: RolloutRow) -> None:
        self._enqueue(row, partial(EpisodeThread.end, transcript=partial(self.turns.transcript, row)))

    def _answer(self, row: RolloutRow, call: ToolCall) -> None:
        """Continues a row with a call's result, or ends it where there is no room."""
        self.records[row.index].calls.append(call)
        ids = self.turns.reply(call, self.channels.pop(row.index, None))
        if len(ids) <= row.room:
            self.session.continue_with(row, ids)
        else:
            self.session.finish(row, "length")
            self._end(row)

    def _fail(self, row: RolloutRow, reason: str) -> None:
        self.records[row.index].failure = reason
        if not row.is_finished:
            self.session.finish(row, "failed")

    # ---- jobs

    def _enqueue(self, row: RolloutRow, job: Callable[[EpisodeThread], None]) -> None:
        self.waiting.append((row.index, job))

    def _receive(self, *, waits: bool) -> None:
        """Starts jobs and takes outcomes: with `waits` all, in the order of the rows, or at least one if rows can be decoded
        beside; without, those that there are."""
        outcomes: dict[int, object] = {}
        while True:
            while self.waiting and len(self.running) < MOST_JOBS:
                self._start(*self.waiting.popleft())
            try:
                thread, outcome = self.replies.get(timeout=PATIENCE) if waits and self.running else self.replies.get_nowait()
                if thread.index in self.running:  # not one that was given up
                    self._note(thread.index, outcome, outcomes)
            except queue.Empty:
                if self.should_stop is not None and waits and self.should_stop():
                    raise Interrupted("while tools were running") from None
            self._give_up_late(outcomes)
            if not waits and self.replies.empty() or waits and not (self.running or self.waiting):
                break
            if waits and self.overlaps and outcomes:
                break
        for index in sorted(outcomes):
            self._finish_job(self.rows[index], outcomes[index])

    def _start(self, index: int, job: Callable[[EpisodeThread], None]) -> None:
        row, turns = self.rows[index], self.turns
        if index not in self.threads:
            self.threads[index] = EpisodeThread(index, partial(turns.env.episode, row.prompt, row.sample), self.replies,
                                                writes_json=turns.limits.form == ResultForm.hub)
        self.running.add(index)
        job(self.threads[index])

    def _note(self, index: int, outcome: object, outcomes: dict[int, object]) -> None:
        outcomes[index] = outcome
        self.running.remove(index)
        self.records[index].seconds += time.monotonic() - self.threads[index].started

    def _give_up_late(self, outcomes: dict[int, object]) -> None:
        limit = self.turns.limits.call_seconds
        late = [index for index in self.running if time.monotonic() - self.threads[index].started > limit]
        for index in late:
            self._note(index, EpisodeFault(f"its code ran over {limit:g} s (turns.call_seconds)"), outcomes)

    def _finish_job(self, row: RolloutRow, outcome: object) -> None:
        if isinstance(outcome, ToolCall):
            return self._answer(row, outcome)
        record = self.records[row.index]
        if isinstance(outcome, BaseException):
            self._fail(row, describe(outcome))
        else:
            record.reward = outcome
        self.threads.pop(row.index).leave()
