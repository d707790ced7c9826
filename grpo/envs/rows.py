"""Rows of data to prompts and answers: columns looked up, checked, tokenised; duplicates, overlap and long prompts.

Every problem is a DataError that starts with the place of the row, such as file:line.
"""

import functools
import hashlib
import json
import math
import random
import re
import shlex
import warnings
from array import array
from collections import Counter
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

from grpo.envs.data_files import DataError
from grpo.envs.data_sources import read_rows
from grpo.rewards.numbers import stated_number
from models.chat.form import Form
from models.chat.render import (
    REASONING_EFFORTS,
    Message,
    generation_prompt,
    harmony_messages,
    read_template_kwargs,
    render_message,
    system_content,
)
from models.chat.tokenizer import Tokenizer, build_byte_tokenizer

# what such columns are often called, the most telling first
PROMPT_NAMES = ("prompt", "question", "problem", "messages", "query", "instruction", "input", "text")
ANSWER_NAMES = ("answer", "reward_model.ground_truth", "ground_truth", "solution", "label", "target", "final_answer",
                "expected_answer", "completion", "response", "output", "result")
CHARS_PER_TOKEN = 128  # no token of o200k is longer: prompts beyond it are too long without counting


def build_tokenizer() -> Tokenizer:
    """For models without a checkpoint: bytes, and the usual lines of the system message as a token each."""
    return _tokenizer_of(system_content(current_date="2025-08-05", reasoning_effort="low"))


def build_tool_tokenizer() -> Tokenizer:
    """The same, of the system message that a task with tools has."""
    return _tokenizer_of(system_content(current_date="2025-08-05", reasoning_effort="low", has_functions=True))


def _tokenizer_of(text: str) -> Tokenizer:
    return build_byte_tokenizer([line for line in text.splitlines() if line])


def in_epochs(key: str, num_rows: int, *, first: int, count: int) -> list[int]:
    """The numbers of `count` rows from place `first` on, where each epoch is a permutation of all, keyed by (key, epoch)."""
    return [_permutation(f"{key} {place // num_rows}", num_rows)[place % num_rows] for place in range(first, first + count)]


@functools.lru_cache(maxsize=2)
def _permutation(key: str, num_rows: int) -> list[int]:
    order = list(range(num_rows))
    random.Random(key).shuffle(order)
    return order


@dataclass
class Row:
    columns: dict  # as the file has them
    source: str  # "file:line"
    prompt: str | list[dict]  # user text or messages
    answer: object  # text; a list or dict as the data has it; None without an answer column
    accepted: list[str]  # the answers of which any is right; empty for what only reward functions can read
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
    max_bad_rows: float
    on_bad_row: str
    on_long_prompt: str
    on_duplicate: str
    on_overlap: str
    chat_form: Form

    def __post_init__(self) -> None:
        self._render_shared = functools.lru_cache(maxsize=64)(
            lambda role, content: render_message(Message(role, content), self.tokenizer))
        self._generation_prompt = generation_prompt(self.tokenizer)
        self.num_skipped = Counter[str]()  # rows left out, by the reason
        if self.max_prompt_tokens < 1:
            raise ValueError(f"env.max_prompt_tokens={self.max_prompt_tokens}: must be at least 1")
        if not 0 <= self.max_bad_rows <= 1:
            raise ValueError(f"env.max_bad_rows={self.max_bad_rows}: must lie in 0..1, a share of the rows")
        choices = {"match": ("exact", "numeric", "math", "none"), "reasoning_effort": REASONING_EFFORTS}
        choices |= dict.fromkeys(("on_bad_row", "on_long_prompt", "on_duplicate", "on_overlap"), ("error", "skip"))
        for key, allowed in choices.items():
            if vars(self)[key] not in allowed:
                raise ValueError(f"env.{key}={vars(self)[key]!r}: must be one of {', '.join(allowed)}")
        if self.match != "none" and self.answer_key is None:
            raise ValueError(f"env.match={self.match}: needs env.answer_key, the column with the reference answer")
        try:
            date.fromisoformat(self.current_date)
        except ValueError as error:
            raise ValueError(f"env.current_date={self.current_date!r}: expected YYYY-MM-DD") from error
        if self.question_template is not None:
            names = {name for name in _PLACEHOLDER.findall(self.question_template) if name}
            if not names:
                raise ValueError(f"env.question_template={self.question_template!r}: names no column; expected a placeholder "
                                 f"such as {{{self.prompt_key}}}")
            if self.answer_key in names:
                raise ValueError(f"env.question_template: {{{self.answer_key}}} would put the answer into the prompt; write "
                                 f"{{{{{self.answer_key}}}}} for braces")

    def read(self, path: str | list, key: str, *, subset: str | None, split: str | None) -> list[Row]:
        """The checked rows, in their order; `key` is the config key that named the path."""
        rows, bad, num_records, columns = [], [], 0, dict[str, None]()
        place = ", ".join(map(str, path)) if isinstance(path, list) else path
        wanted = self._wanted_columns()
        for source, record in read_rows(path, key, subset=subset, split=split):
            num_records += 1
            try:
                if isinstance(record, str):
                    raise _BadRow(record)
                known = dict.fromkeys(_paths_of(record) if wanted else record)
                columns |= known
                wanted = {name: option for name, option in wanted.items() if name not in known}
                rows.append(self._row(record, source))
            except _BadRow as problem:
                bad.append(f"{source}: {problem}")
        if not num_records:
            raise DataError(f"{place}: holds no rows; {key} needs at least one")
        if wanted and columns:
            raise DataError(self._no_such_columns(place, wanted, list(columns)))
        self._refuse(bad, num_records, list(columns))
        rows = self._without_duplicates(rows)
        for row in rows:  # the slow part, after everything that can be told without it
            try:
                row.token_ids = self._tokenize(row)
            except _BadRow as problem:
                bad.append(f"{row.source}: {problem}")
        self._refuse(bad, num_records, list(columns))
        self.num_skipped += Counter({"bad": len(bad)})  # which drops a reason with no rows, as adding counters does
        return self._without_long_prompts([row for row in rows if row.token_ids], place)

    def _wanted_columns(self) -> dict[str, str]:
        """The columns that every row must have, each with the key that asks for it."""
        names = {self.prompt_key: "prompt_key"}
        if self.question_template is not None:
            names = {name: "question_template" for name in _PLACEHOLDER.findall(self.question_template) if name}
        optional = {self.answer_key: "answer_key", self.reasoning_effort_key: "reasoning_effort_key"}
        return names | {name: key for name, key in optional.items() if name is not None and name not in names}

    def _no_such_columns(self, place: str, missing: dict[str, str], columns: list[str]) -> str:
        """One line for columns that no row has, with what to set instead."""
        advice = []
        for key, likely in (("prompt_key", PROMPT_NAMES), ("answer_key", ANSWER_NAMES)):
            if key in missing.values():
                taken = {self.prompt_key, self.answer_key} - missing.keys()
                spelled = {name.lower(): name for name in reversed(columns) if name not in taken}
                found = next((spelled[name] for name in likely if name in spelled), None)
                advice.append(f"env.{key}={shlex.quote(found or 'COLUMN')}")
        names = " and ".join(f"{name!r} (env.{key})" for name, key in missing.items())
        return (f"{place}: no row has a column {names}; columns: {_listed(columns)}; "
                + (f"set {' '.join(advice)}" if advice else "correct the key"))

    def _refuse(self, bad: list[str], num_records: int, columns: list[str]) -> None:
        """Raises DataError if there are bad rows; with on_bad_row=skip, if there are too many."""
        share = len(bad) / num_records
        if not bad or (share <= self.max_bad_rows and self.on_bad_row == "skip"):
            return
        advice = "correct the data or the column mapping"
        if self.on_bad_row == "skip":
            advice += f"; env.max_bad_rows={self.max_bad_rows:g} of them may be skipped, and these are {share:.3g}"
        else:
            needed = "" if share <= self.max_bad_rows else f" env.max_bad_rows={math.ceil(share * 100) / 100:g}"
            advice += f", or set env.on_bad_row=skip{needed}" if share < 0.2 else ""
        more = "".join(f"\n  {line}" for line in bad[1:5])
        raise DataError(f"{bad[0]}\n{len(bad)} bad of {num_records} rows: {advice}; columns: {_listed(columns)}{more}")

    def _row(self, record: dict, source: str) -> Row:
        if self.question_template is None:
            prompt = _lookup(record, self.prompt_key, "prompt_key")
            if self.answer_key == self.prompt_key:
                if not _is_conversation(prompt) or prompt[-1]["role"] != "assistant":
                    raise _BadRow(f"{self.prompt_key!r} is prompt and answer at once (env.prompt_key, env.answer_key), so it "
                                  "must be messages of which the last is the assistant's")
                prompt = prompt[:-1]
        else:
            prompt = _PLACEHOLDER.sub(lambda m: _fill(m, record), self.question_template)
        answer, accepted = (None, []) if self.answer_key is None else self._answer(record)
        effort = self.reasoning_effort
        if self.reasoning_effort_key is not None:
            effort = _lookup(record, self.reasoning_effort_key, "reasoning_effort_key")
            if effort not in REASONING_EFFORTS:
                raise _BadRow(f"{self.reasoning_effort_key!r} is {effort!r}; must be one of {', '.join(REASONING_EFFORTS)}")
        # a null key is an absent one, so that a file and a table agree on what a prompt is
        messages = [{name: value for name, value in message.items() if value is not None}
                    if isinstance(message, dict) else message for message in _messages(prompt)]
        asked = [messages, *(record[key] for key in ("tools", "chat_template_kwargs") if record.get(key))]
        text = json.dumps(asked if len(asked) > 1 else asked[0], ensure_ascii=False, sort_keys=True, default=repr)
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        return Row(record, source, prompt, answer, accepted, effort, digest, array("i"))

    def _tokenize(self, row: Row) -> array:
        messages = _messages(row.prompt)
        settings = {"reasoning_effort": row.effort, "current_date": self.current_date, "form": self.chat_form}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # of a message or call that the template leaves out
                settings |= read_template_kwargs(row.columns.get("chat_template_kwargs"))
                chat = harmony_messages(messages, instructions=self.instructions, tools=row.columns.get("tools"), **settings)
            if chat[-1].role not in ("user", "tool"):
                raise _BadRow(f"the prompt ends with a message of the {chat[-1].role}; the model needs one to answer. "
                              "Where that turn is the reference answer, set env.answer_key to this column too")
            if chat[-1].role == "user" and not chat[-1].content.strip():
                raise _BadRow("the prompt is empty")
            if sum(len(message.content) for message in chat) > CHARS_PER_TOKEN * self.max_prompt_tokens:
                return array("i", [-1]) * (self.max_prompt_tokens + 1)
            ids = array("i")
            for message in chat:
                is_shared = message.role in ("system", "developer")  # by nearly all rows, and longer than most questions
                ids.extend(self._render_shared(message.role, message.content) if is_shared
                           else render_message(message, self.tokenizer))
            ids.extend(self._generation_prompt)
            return ids
        except (ValueError, UserWarning) as problem:  # also characters that the tokenizer lacks
            raise _BadRow(f"the prompt cannot be tokenised: {problem}") from problem

    def _answer(self, record: dict) -> tuple[object, list[str]]:
        """The answer as reward functions see it, and the accepted answers: a list may hold several, and so may the
        `target` of a dict, as in verl's search data."""
        value = _lookup(record, self.answer_key, "answer_key")
        if _is_conversation(value):  # of a column `completion` or `messages`
            if value[-1]["role"] != "assistant" or value[-1].get("tool_calls"):
                raise _BadRow(f"{self.answer_key!r} is messages that do not end with an answer of the assistant")
            value = content_of(value[-1])
        if not isinstance(value, (list, dict)):
            text = self._answer_text(value)
            return text, [text]
        if self.match == "none":
            return value, []
        several = value.get("target", value) if isinstance(value, dict) else value
        accepted = [self._answer_text(each) for each in (several if isinstance(several, list) else [several])]
        if not accepted:
            raise _BadRow(f"{self.answer_key!r} is a list of no answers; nothing would be right")
        return value, accepted

    def _answer_text(self, value: object) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
            raise _BadRow(f"{self.answer_key!r} is a {type(value).__name__}; expected text, a number, or a list or "
                          "{'target': ...} of accepted ones (env.match=none leaves others to reward functions)")
        answer = str(value)
        if any("\ud800" <= char <= "\udfff" for char in answer):  # JSON's escapes can spell it, and no tokenizer reads it
            raise _BadRow(f"{self.answer_key!r} holds half of a surrogate pair, {answer[:60]!r}")
        if self.answer_after is not None:
            _, found, answer = answer.rpartition(self.answer_after)
            if not found:
                raise _BadRow(f"{self.answer_key!r} has no {self.answer_after!r} (env.answer_after)")
        answer = answer.strip()
        if not answer:
            raise _BadRow(f"{self.answer_key!r} is empty; a completion that says nothing would be right")
        if self.match == "numeric" and stated_number(answer) is None:
            raise _BadRow(f"{self.answer_key!r} is {answer[:60]!r}, which is not a number (env.match=numeric)")
        return answer

    def _without_long_prompts(self, rows: list[Row], place: str) -> list[Row]:
        long = [row for row in rows if len(row.token_ids) > self.max_prompt_tokens]
        if long and self.on_long_prompt == "error":
            size = f"{len(long[0].token_ids)} tokens" if long[0].token_ids[0] >= 0 else "millions of characters"
            raise DataError(f"{long[0].source}: the prompt has {size}, more than env.max_prompt_tokens={self.max_prompt_tokens} "
                            f"({len(long)} such of {len(rows)} rows); raise it or set env.on_long_prompt=skip")
        if len(long) == len(rows):
            raise DataError(f"{place}: no prompt fits env.max_prompt_tokens={self.max_prompt_tokens}")
        self.num_skipped += Counter({"too long": len(long)})
        return [row for row in rows if len(row.token_ids) <= self.max_prompt_tokens]

    def _without_duplicates(self, rows: list[Row]) -> list[Row]:
        first: dict[bytes, Row] = {}
        for row in rows:
            other = first.setdefault(row.digest, row)
            if other is not row and self.on_duplicate == "error":
                answers = "" if other.answer == row.answer else f", with another answer ({other.answer!r}, {row.answer!r})"
                raise DataError(f"{row.source}: the same prompt as {other.source}{answers}; remove one, or set "
                                "env.on_duplicate=skip to keep the first")
        self.num_skipped += Counter({"repeated": len(rows) - len(first)})
        return list(first.values())

    def without_overlap(self, train: list[Row], held_out: list[Row]) -> list[Row]:
        evaluated = {row.digest: row for row in held_out}
        overlap = [row for row in train if row.digest in evaluated]
        if overlap and self.on_overlap == "error":
            raise DataError(
                f"{overlap[0].source}: the prompt is also an evaluation row, {evaluated[overlap[0].digest].source} "
                f"({len(overlap)} such of {len(train)} training rows); remove them, or set env.on_overlap=skip")
        if len(overlap) == len(train):
            raise DataError(f"{train[0].source}: every training prompt is also an evaluation row; nothing is left to train on")
        self.num_skipped += Counter({"of the evaluation": len(overlap)})
        return [row for row in train if row.digest not in evaluated]


def content_of(message: dict) -> str:
    """A message's text; of content parts, the text parts joined."""
    content = message.get("content") or ""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


class _BadRow(Exception):
    """Why one row cannot be used."""


_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+|[A-Za-z_]\w*(?:\.\w+)+)\}")
_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]\s*:""")


def _fill(match: re.Match, record: dict) -> str:
    if match.group(1) is None:
        return match.group()[0]
    value = _lookup(record, match.group(1), "question_template")
    if not isinstance(value, (str, int, float, Decimal)):
        raise _BadRow(f"{match.group(1)!r} is a {type(value).__name__}; a template takes text and numbers")
    return str(value)


def _lookup(record: dict, name: str, key: str) -> object:
    value = record
    for part in [name] if name in record else name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise _BadRow(f"no column {name!r} (env.{key})")
        value = value[part]
    if value is None or isinstance(value, float) and math.isnan(value):  # pandas writes NaN for what is missing
        raise _BadRow(f"{name!r} is null (env.{key})")
    return value


def _paths_of(record: dict, prefix: str = "") -> list[str]:
    """The names of all columns; of a struct also those inside it, dotted."""
    names = []
    for name, value in record.items():
        names.append(f"{prefix}{name}")
        names += _paths_of(value, f"{prefix}{name}.") if isinstance(value, dict) else []
    return names


def _listed(columns: list[str]) -> str:
    names = [name if name.isprintable() else repr(name) for name in columns[:20]]
    shown = [name if len(name) <= 60 else name[:57] + "..." for name in names]
    return (", ".join(shown) or "none") + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)


def _messages(prompt: object) -> list[dict]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _BadRow("the prompt is empty")
        if _WRITTEN_MESSAGES.match(prompt):
            raise _BadRow("the prompt is messages written as text, as in a CSV; in JSON lines or Parquet they can stay a list")
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise _BadRow(f"the prompt is a {type(prompt).__name__}; expected text or a list of messages")
    return prompt
