"""Conversations from data, to train on as they are: supervised fine-tuning, and pairs of answers of which one is preferred.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "thinking": "...", "content": "..."}, ...]}
    {"prompt": "...", "completion": "..."}                   # texts or lists of messages; by env.messages_key=null
                                                             # env.prompt_key=prompt env.completion_key=completion
    {"prompt": "...", "chosen": "...", "rejected": "..."}    # env=preferences; or two whole conversations without a prompt

Nothing is sampled: `recorded_completions` gives the rows as the sampler would give its completions, so all that follows is what
GRPO does. What the assistant says is trained on, in the tokens in which it would say it: analysis, calls of tools and the final
message with <|return|>. What users and tools say is not. gpt-oss forgets the analysis of earlier turns, so each turn of a
conversation is a sequence of its own, behind the prompt that the model would be given there.

Rows are visited in epochs, each a permutation keyed by (seed, epoch). All of them are read, checked and rendered when the
environment is built; a problem is a DataError with file and line.
"""
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from grpo.batch import Completion, Prompt, Segment
from grpo.envs.data_files import DataError
from grpo.envs.data_sources import read_rows
from grpo.envs.rows import build_tokenizer, in_epochs
from models.chat.render import (
    Message,
    generation_prompt,
    harmony_messages,
    read_template_kwargs,
    render_message,
    render_prompt,
)
from models.chat.tokenizer import Tokenizer


@dataclass
class Recorded:
    """A row: its completions, each with the reward that it stands for."""

    source: str  # file:line
    columns: dict
    completions: list[tuple[list[Segment], float | None]]
    digest: bytes  # of all tokens: the row's identity

    @property
    def longest(self) -> list[int]:
        """The tokens of the longest sequence."""
        return max((token_ids for segments, _ in self.completions for token_ids in _sequences(segments)), key=len)


class Conversations:
    """The environment.

    path, subset, split, eval_path, eval_split: as in grpo.envs.dataset.Dataset; without any rows to evaluate on,
        `held_out_fraction` of the rows is held out, by a hash of their tokens (0: none)
    messages_key: the column with a conversation, whose assistant turns are trained on
    prompt_key, completion_key: instead of it, a prompt and its continuation, text or messages
    chosen_key, rejected_key: instead of it, two continuations, or two conversations that differ in their last turn
    turns: "all" turns of the assistant are trained on, or the "last" one; of a pair always the last
    instructions, reasoning_effort, current_date: of the system and developer message, for rows that bring none
    max_tokens: longest sequence, prompt included; on_long: "error" or "skip" for rows beyond it

    Raises DataError for the data, ValueError for a keyword."""

    build_tokenizer = staticmethod(build_tokenizer)

    def __init__(self, *, tokenizer: Tokenizer, seed: int, path: str | list, current_date: str, reasoning_effort: str,
                 max_tokens: int, messages_key: str | None = None, prompt_key: str | None = None,
                 completion_key: str | None = None, chosen_key: str | None = None, rejected_key: str | None = None,
                 subset: str | None = None, split: str | None = None, eval_path: str | list | None = None,
                 eval_split: str | None = None, held_out_fraction: float = 0.0, turns: str = "all", on_long: str = "error",
                 instructions: str | None = None):
        self.tokenizer, self.seed, self.turns, self.max_tokens, self.on_long = tokenizer, seed, turns, max_tokens, on_long
        self.messages_key, self.prompt_key, self.completion_key = messages_key, prompt_key, completion_key
        self.chosen_key, self.rejected_key = chosen_key, rejected_key
        self._settings = {"current_date": current_date, "reasoning_effort": reasoning_effort, "instructions": instructions}
        self._check_keywords(held_out_fraction, has_eval=bool(eval_path or eval_split))
        self.num_skipped = 0
        self.rows = self._read(path, "env.path", subset, split)
        if eval_path or eval_split:
            own_path, own_subset = (path, subset) if eval_path is None else (eval_path, None)
            self.eval_rows = self._read(own_path, "env.eval_path", own_subset, eval_split)
        else:
            cut = int(held_out_fraction * 2**64)
            ranked = [(int.from_bytes(row.digest[:8], "big") < cut, row) for row in self.rows]
            self.rows, self.eval_rows = ([row for is_held_out, row in ranked if is_held_out == part] for part in (False, True))
        if not self.rows:
            raise DataError(f"{path}: no rows are left to train on; give more, or lower env.held_out_fraction")

    def recorded_completions(self, step: int, *, num_prompts: int) -> list[Completion]:
        """The completions of the step's `num_prompts` rows, in epoch order."""
        chosen = in_epochs(f"conversations epoch {self.seed}", len(self.rows), first=step * num_prompts, count=num_prompts)
        return _completions([self.rows[index] for index in chosen])

    def held_out_completions(self) -> list[Completion]:
        return _completions(self.eval_rows)

    def train_prompts(self) -> Iterator[Prompt]:
        """The longest sequence of each row, so that memory is planned for it and its length checked."""
        return (Prompt(i, row.longest, {"_source": row.source}) for i, row in enumerate(self.rows))

    def summary(self) -> str:
        skipped = f" (left out: {self.num_skipped} too long)" if self.num_skipped else ""
        what = "pairs" if self.chosen_key is not None else "conversations"
        return f"{len(self.rows):,} {what} to train and {len(self.eval_rows):,} to evaluate on{skipped}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split, rows in (("train", self.rows), ("eval", self.eval_rows)):
            for row in rows:
                digest.update(split.encode() + row.digest)
        return digest.hexdigest()

    # --- rows -------------------------------------------------------------------------------------------------------

    def _read(self, path: str | list, key: str, subset: str | None, split: str | None) -> list[Recorded]:
        rows, num_rows = [], 0
        for source, record in read_rows(path, key, subset=subset, split=split):
            num_rows += 1
            if isinstance(record, str):
                raise DataError(f"{source}: {record}")
            try:
                row = self._row(source, record)
            except (ValueError, UserWarning) as problem:
                raise DataError(f"{source}: {problem}; columns: {', '.join(map(str, record))}") from problem
            length = len(row.longest)
            if length <= self.max_tokens:
                rows.append(row)
            elif self.on_long == "error":
                raise DataError(f"{source}: a sequence of {length} tokens, more than env.max_tokens={self.max_tokens}; raise it, "
                                "or set env.on_long=skip")
        self.num_skipped += num_rows - len(rows)
        if not rows:
            fitting = " that fit env.max_tokens" if num_rows else ""
            raise DataError(f"{path}: holds no rows{fitting}; {key} needs at least one")
        return rows

    def _row(self, source: str, record: dict) -> Recorded:
        settings = self._settings | read_template_kwargs(record.get("chat_template_kwargs"))
        conversations: list[tuple[list[dict], float | None]]
        if self.chosen_key is not None:
            prompt = _as_messages(record[self.prompt_key], "user") if record.get(self.prompt_key) else []
            conversations = [(prompt + _as_messages(_column(record, key), "assistant"), reward)
                             for key, reward in ((self.chosen_key, 1.0), (self.rejected_key, 0.0))]
        elif self.completion_key is not None:
            prompt = _as_messages(_column(record, self.prompt_key), "user")
            conversations = [(prompt + _as_messages(_column(record, self.completion_key), "assistant"), None)]
        else:
            conversations = [(_as_messages(_column(record, self.messages_key, or_else=(
                ", which env.messages_key names; for a prompt and its completion set env.messages_key=null, env.prompt_key and "
                "env.completion_key")), "user"), None)]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of a message or call that the template leaves out
            completions = [(render_turns(messages, self.tokenizer, turns=self.turns if reward is None else "last",
                                         tools=record.get("tools"), settings=settings), reward)
                           for messages, reward in conversations]
        texts = [segment.token_ids for segments, _ in completions for segment in segments]
        if len(completions) == 2:
            first, second = (segments[0].token_ids for segments, _ in completions)
            if first != second:
                raise ValueError(f"{self.chosen_key!r} and {self.rejected_key!r} differ before their last turn; they must answer "
                                 "one prompt")
        return Recorded(source, record, completions, hashlib.sha256(json.dumps(texts).encode()).digest())

    def _check_keywords(self, held_out_fraction: float, *, has_eval: bool) -> None:
        if (self.chosen_key is None) != (self.rejected_key is None):
            raise ValueError("env.chosen_key and env.rejected_key: set both, or neither")
        forms = [self.messages_key is not None, self.completion_key is not None, self.chosen_key is not None]
        if sum(forms) != 1:
            raise ValueError("env.messages_key, env.completion_key, env.chosen_key: set one, which says what a row is, the "
                             "others null")
        if self.completion_key is not None and self.prompt_key is None:
            raise ValueError("env.prompt_key: required beside env.completion_key")
        if self.turns not in ("all", "last"):
            raise ValueError(f"env.turns={self.turns!r}: must be all or last")
        if self.on_long not in ("error", "skip"):
            raise ValueError(f"env.on_long={self.on_long!r}: must be error or skip")
        if not 0 <= held_out_fraction < 1 or has_eval and held_out_fraction:
            raise ValueError(f"env.held_out_fraction={held_out_fraction}: must lie in [0, 1), and be 0 beside env.eval_path or "
                             "env.eval_split")


def render_turns(messages: list[dict], tokenizer: Tokenizer, *, turns: str, tools: object, settings: dict) -> list[Segment]:
    """A conversation as the segments of a completion: for each turn of the assistant the prompt before it, and what it says.

    turns: "all" or "last". settings: keywords of `harmony_messages`. Raises ValueError for a conversation that does not end with
    the assistant's message."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    # a turn: from the message after a user's to the one before the next
    starts = [i for i, role in enumerate(roles) if role == "assistant" and roles[i - 1] == "user" and i > 0]
    if not starts or roles[-1] != "assistant":
        raise ValueError("the conversation must end with a turn of the assistant that follows a user's message")
    ends = [roles.index("user", start) if "user" in roles[start:] else len(roles) for start in starts]
    segments: list[Segment] = []
    for start, end in list(zip(starts, ends))[-1 if turns == "last" else 0:]:
        context = harmony_messages(messages[:start], tools=tools, **settings)
        repeated = []
        if segments:  # up to the turn before, which the completion has had
            known = harmony_messages(messages[:start - 1], tools=tools, **settings)
            repeated = [id for message in known for id in render_message(message, tokenizer)]
        segments.append(Segment(render_prompt(context, tokenizer), "prompt", num_repeated=len(repeated)))
        segments += _said(messages[:end], len(context), tokenizer, tools=tools, settings=settings)
    return segments


def _said(messages: list[dict], num_context: int, tokenizer: Tokenizer, *, tools: object, settings: dict) -> list[Segment]:
    """The segments of the last turn: what the assistant says ("policy") and what tools answer ("env")."""
    last = messages[-1]
    is_call = bool(last.get("tool_calls"))
    # without its final message a turn keeps its analysis
    rendered = harmony_messages(messages if is_call else messages[:-1], tools=tools, **settings)[num_context:]
    if not is_call:
        thinking = next((last[key] for key in ("thinking", "reasoning_content", "reasoning") if last.get(key)), None)
        final = harmony_messages([{"role": "user", "content": "-"}, last], **settings)[-1]  # checks it, too
        rendered += [Message("assistant", thinking, "analysis")] if thinking else []
        rendered.append(final)
    header, segments, is_open = generation_prompt(tokenizer), list[Segment](), True  # is_open: the header stands there already
    for message in rendered:
        ids = render_message(message, tokenizer)
        if message.role != "assistant":
            segments.append(Segment([*ids, *header], "env"))
            is_open = True
            continue
        assert ids[:len(header)] == header, (ids[:len(header)], header)
        ids = ids[len(header):] if is_open else ids
        if message.channel == "final":
            ids[-1] = tokenizer.return_
        if segments and segments[-1].source == "policy":
            segments[-1] = Segment(segments[-1].token_ids + ids, "policy")
        else:
            segments.append(Segment(ids, "policy"))
        is_open = False
    return [Segment(segment.token_ids, segment.source, [0.0] * len(segment.token_ids) if segment.source == "policy" else None)
            for segment in segments]


def _completions(rows: list[Recorded]) -> list[Completion]:
    return [Completion(Prompt(i, segments[0].token_ids, {**row.columns, "_source": row.source}), sample, segments, "stop",
                       reward=reward)
            for i, row in enumerate(rows) for sample, (segments, reward) in enumerate(row.completions)]


def _sequences(segments: list[Segment]) -> list[list[int]]:
    found: list[list[int]] = []
    for segment in segments:
        if segment.source == "prompt":
            found.append([])
        found[-1].extend(segment.token_ids)
    return found


def _column(record: dict, key: str, *, or_else: str = "") -> object:
    if record.get(key) is None:
        raise ValueError(f"no column {key!r}{or_else}")
    return record[key]


def _as_messages(value: object, role: str) -> list[dict]:
    """Messages as they are, without their null keys; a text is one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"found a {type(value).__name__} where text or a list of messages is expected")
    return [{name: item for name, item in message.items() if item is not None} for message in value]
