"""Rows of data to prompts and answers: columns looked up, checked, tokenised; duplicates, overlap and long prompts.

Every problem is a DataError that starts with the place of the row, such as file:line.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from array import array
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from grpo.envs.data_files import DataError, read_records
from grpo.rewards.match import parse_number
from models.chat.render import generation_prompt, harmony_messages, read_template_kwargs, render_messages
from models.tokenizer import Tokenizer

EFFORTS = ("low", "medium", "high")
MAX_SKIPPED = 0.01  # share of bad rows that on_bad_row=skip puts up with
CHARS_PER_TOKEN = 128  # no token of o200k is longer: prompts beyond it are too long without counting


@dataclass
class Row:
    columns: dict  # as the file has them
    source: str  # "file:line"
    prompt: str | list[dict]  # user text or messages
    answer: str | None
    effort: str
    digest: bytes  # of the messages, instructions aside: the identity of the prompt
    token_ids: array  # the rendered prompt; empty until tokenised

    @property
    def rank(self) -> int:
        """A number below 2^64 that depends on the prompt alone: what is held out."""
        return int.from_bytes(self.digest[:8], "big")

    @property
    def question(self) -> str:
        """The text of the last user message."""
        messages = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        asked = [message for message in messages if message["role"] == "user"] or messages
        return content_of(asked[-1])


@dataclass(kw_only=True)
class RowReader:
    """Reads rows. The fields are keywords of grpo.envs.dataset.Dataset, which explains them."""

    tokenizer: Tokenizer
    prompt_key: str
    answer_key: str | None
    answer_after: str | None
    question_template: str | None
    instructions: str | None
    reasoning_effort: str
    reasoning_effort_key: str | None
    current_date: str
    match: str
    max_prompt_tokens: int
    on_bad_row: str
    on_long_prompt: str
    on_duplicate: str
    on_overlap: str

    def __post_init__(self) -> None:
        if self.max_prompt_tokens < 1:
            raise ValueError(f"env.max_prompt_tokens={self.max_prompt_tokens}: must be at least 1")
        choices = [
            ("match", self.match, ("exact", "numeric", "none")),
            ("reasoning_effort", self.reasoning_effort, EFFORTS),
        ]
        choices += [
            (key, vars(self)[key], ("error", "skip"))
            for key in ("on_bad_row", "on_long_prompt", "on_duplicate", "on_overlap")
        ]
        for key, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"env.{key}={value!r}: must be one of {', '.join(allowed)}")
        if self.match != "none" and self.answer_key is None:
            raise ValueError(f"env.match={self.match}: needs env.answer_key, the column with the reference answer")
        try:
            date.fromisoformat(self.current_date)
        except ValueError as error:
            raise ValueError(f"env.current_date={self.current_date!r}: expected YYYY-MM-DD") from error
        if self.question_template is not None:
            names = {name for name in _PLACEHOLDER.findall(self.question_template) if name}
            if not names:
                raise ValueError(
                    f"env.question_template={self.question_template!r}: names no column; expected a placeholder "
                    f"such as {{{self.prompt_key}}}"
                )
            if self.answer_key in names:
                raise ValueError(
                    f"env.question_template: {{{self.answer_key}}} would put the answer into the prompt; write "
                    f"{{{{{self.answer_key}}}}} for braces"
                )

    def read(self, path: str, key: str) -> list[Row]:
        """The checked rows of a file, in file order."""
        rows, bad, num_records, columns = [], [], 0, dict[str, None]()
        for source, record in read_records(Path(path).expanduser(), key):
            num_records += 1
            try:
                if isinstance(record, str):
                    raise _BadRow(record)
                columns |= dict.fromkeys(record)
                rows.append(self._row(record, source))
            except _BadRow as problem:
                bad.append(f"{source}: {problem}")
        if not num_records:
            raise DataError(f"{path}: holds no rows; env.{key} needs at least one")
        self._refuse(bad, num_records, list(columns))
        rows = self._without_duplicates(rows)
        for row in rows:  # the slow part, after everything that can be told without it
            try:
                row.token_ids = self._tokenize(row)
            except _BadRow as problem:
                bad.append(f"{row.source}: {problem}")
        self._refuse(bad, num_records, list(columns))
        return self._without_long_prompts([row for row in rows if row.token_ids], path)

    def _refuse(self, bad: list[str], num_records: int, columns: list) -> None:
        """Raises DataError if there are bad rows, or more than on_bad_row=skip puts up with."""
        can_skip = len(bad) <= MAX_SKIPPED * num_records
        if not bad or (can_skip and self.on_bad_row == "skip"):
            return
        advice = "correct the file or its column mapping"
        if self.on_bad_row == "skip":
            advice += f"; env.on_bad_row=skip accepts at most {MAX_SKIPPED:.0%}"
        elif can_skip:
            advice += ", or set env.on_bad_row=skip"
        more = "".join(f"\n  {line}" for line in bad[1:5])
        raise DataError(
            f"{bad[0]}\n{len(bad)} bad of {num_records} rows: {advice}; columns: "
            f"{', '.join(map(str, columns)) or 'none'}{more}"
        )

    def _row(self, record: dict, source: str) -> Row:
        if self.question_template is None:
            prompt = _lookup(record, self.prompt_key, "prompt_key")
        else:
            prompt = _PLACEHOLDER.sub(lambda m: _fill(m, record), self.question_template)
        answer = None if self.answer_key is None else self._answer(record)
        effort = self.reasoning_effort
        if self.reasoning_effort_key is not None:
            effort = _lookup(record, self.reasoning_effort_key, "reasoning_effort_key")
            if effort not in EFFORTS:
                raise _BadRow(f"{self.reasoning_effort_key!r} is {effort!r}; must be one of {', '.join(EFFORTS)}")
        asked = [_messages(prompt), *(record[key] for key in ("tools", "chat_template_kwargs") if record.get(key))]
        text = json.dumps(asked if len(asked) > 1 else asked[0], ensure_ascii=False, sort_keys=True, default=repr)
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        return Row(record, source, prompt, answer, effort, digest, array("i"))

    def _tokenize(self, row: Row) -> array:
        messages = _messages(row.prompt)
        settings = {"reasoning_effort": row.effort, "current_date": self.current_date}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # of a message or call that the template leaves out
                settings |= read_template_kwargs(row.columns.get("chat_template_kwargs"))
                chat = harmony_messages(
                    messages, instructions=self.instructions, tools=row.columns.get("tools"), **settings
                )
            if chat[-1].role not in ("user", "tool"):
                raise _BadRow(f"the prompt ends with a message of the {chat[-1].role}; the model needs one to answer")
            if sum(len(message.content) for message in chat) > CHARS_PER_TOKEN * self.max_prompt_tokens:
                return array("i", [-1]) * (self.max_prompt_tokens + 1)
            return array("i", render_messages(chat, self.tokenizer) + generation_prompt(self.tokenizer))
        except (ValueError, UserWarning) as problem:  # also characters that the tokenizer lacks
            raise _BadRow(f"the prompt cannot be tokenised: {problem}") from problem

    def _answer(self, record: dict) -> str:
        value = _lookup(record, self.answer_key, "answer_key")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise _BadRow(f"{self.answer_key!r} is a {type(value).__name__}; expected text or a number")
        answer = str(value)
        if self.answer_after is not None:
            _, found, answer = answer.rpartition(self.answer_after)
            if not found:
                raise _BadRow(f"{self.answer_key!r} has no {self.answer_after!r} (env.answer_after)")
        answer = answer.strip()
        if not answer:
            raise _BadRow(f"{self.answer_key!r} is empty; a completion that says nothing would be right")
        if self.match == "numeric" and parse_number(answer) is None:
            raise _BadRow(f"{self.answer_key!r} is {answer[:60]!r}, which is not a number (env.match=numeric)")
        return answer

    def _without_long_prompts(self, rows: list[Row], path: str) -> list[Row]:
        long = [row for row in rows if len(row.token_ids) > self.max_prompt_tokens]
        if long and self.on_long_prompt == "error":
            size = f"{len(long[0].token_ids)} tokens" if long[0].token_ids[0] >= 0 else "millions of characters"
            raise DataError(
                f"{long[0].source}: the prompt has {size}, more than env.max_prompt_tokens="
                f"{self.max_prompt_tokens} ({len(long)} such of {len(rows)} rows); raise it or set "
                "env.on_long_prompt=skip"
            )
        if len(long) == len(rows):
            raise DataError(f"{path}: no prompt fits env.max_prompt_tokens={self.max_prompt_tokens}")
        return [row for row in rows if len(row.token_ids) <= self.max_prompt_tokens]

    def _without_duplicates(self, rows: list[Row]) -> list[Row]:
        first: dict[bytes, Row] = {}
        for row in rows:
            other = first.setdefault(row.digest, row)
            if other is not row and self.on_duplicate == "error":
                answers = (
                    "" if other.answer == row.answer else f", with another answer ({other.answer!r}, {row.answer!r})"
                )
                raise DataError(
                    f"{row.source}: the same prompt as {other.source}{answers}; remove one, or set "
                    "env.on_duplicate=skip to keep the first"
                )
        return list(first.values())

    def without_overlap(self, train: list[Row], held_out: list[Row]) -> list[Row]:
        evaluated = {row.digest: row for row in held_out}
        overlap = [row for row in train if row.digest in evaluated]
        if overlap and self.on_overlap == "error":
            raise DataError(
                f"{overlap[0].source}: the prompt is also an evaluation row, {evaluated[overlap[0].digest].source} "
                f"({len(overlap)} such of {len(train)} training rows); remove them, or set env.on_overlap=skip"
            )
        if len(overlap) == len(train):
            raise DataError(
                f"{train[0].source}: every training prompt is also an evaluation row; nothing is left to train on"
            )
        return [row for row in train if row.digest not in evaluated]


def content_of(message: dict) -> str:
    """A message's text; of content parts, the text parts joined."""
    content = message.get("content") or ""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def digest_of(rows_of_split: dict[str, list[Row]]) -> str:
    """SHA-256 of rows in their order: split, answer, columns and rendered prompt; neither file names nor formats count."""
    digest = hashlib.sha256()
    for split, rows in rows_of_split.items():
        for row in rows:
            columns = json.dumps(row.columns, sort_keys=True, default=repr)
            digest.update(json.dumps([split, row.answer, columns, len(row.token_ids)]).encode())
            digest.update(row.token_ids.tobytes())
    return digest.hexdigest()


class _BadRow(Exception):
    """Why one row cannot be used."""


_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def _fill(match: re.Match, record: dict) -> str:
    if match.group(1) is None:
        return match.group()[0]
    value = _lookup(record, match.group(1), "question_template")
    if isinstance(value, (dict, list)):
        raise _BadRow(f"{match.group(1)!r} is a {type(value).__name__}; a template takes text and numbers")
    return str(value)


def _lookup(record: dict, name: str, key: str) -> object:
    value = record
    for part in [name] if name in record else name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise _BadRow(f"no column {name!r} (env.{key})")
        value = value[part]
    if value is None:
        raise _BadRow(f"{name!r} is null (env.{key})")
    return value


def _messages(prompt: object) -> list[dict]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _BadRow("the prompt is empty")
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise _BadRow(f"the prompt is a {type(prompt).__name__}; expected text or a list of messages")
    return prompt
