"""Prompts and answers from a file: JSONL, a JSON list or CSV, each also gzipped (.gz), in UTF-8.

    {"question": "What is 17 + 25?", "answer": "42"}        # a line of tests/fixtures/arithmetic.jsonl, say
    python -m grpo.train +experiment=gpt_oss_20b_lora model.path=FOLDER env.path=tests/fixtures/arithmetic.jsonl

`prompt_key` names the column with the prompt, text or a list of messages; `answer_key` the reference answer (both may be
dotted, `reward_model.ground_truth`); `question_template` builds the user message from columns instead. The final channel of
a completion is matched with the answer (`match`: exact, numeric, none) and shown to the reward functions of `rewards`, which
grpo/rewards/functions.py describes. Evaluation rows come from a file of their own or are a fraction held out by hash of the
prompt.

The whole file is read, checked and tokenised when the environment is built, before any model is loaded: every problem is a
DataError that starts with file:line. Training rows are visited in epochs, each a permutation keyed by (seed, epoch);
everything is a pure function of (seed, step, attempt), so there is no state to save.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
from array import array
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from grpo.envs.data_files import DataError, read_records
from grpo.rewards.functions import Result, Reward, RewardError, Sample, load_reward, score_with, try_rewards
from grpo.rewards.match import exact_match, is_well_formed, numeric_match, parse_number, stated_answer
from models.harmony import parse_completion, render_chat
from models.tokenizer import Tokenizer

EFFORTS = ("low", "medium", "high")
ROLES = ("system", "developer", "user", "assistant", "tool")
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


class Dataset:
    """The environment.

    path, eval_path: files; without `eval_path`, `held_out_fraction` of the rows of `path` is held out
    num_eval_prompts: evaluation rows used, chosen by hash; null uses all
    question_template: text with {column} placeholders ({{ and }} for braces); null takes the prompt column as it is
    answer_after: keep what follows the last occurrence of this in the answer column ("####" for GSM8K)
    instructions: developer message for rows that bring neither a system nor a developer message
    reasoning_effort: low, medium or high; `reasoning_effort_key` names a column that overrides it
    current_date: YYYY-MM-DD in the system message; pinned, since a prompt must not change from day to day
    match: exact, numeric (equal within the relative `numeric_tolerance`) or none; worth `match_reward`
    format_reward: for a completion that parses and ends in its only final message
    rewards: [{fn: ..., weight: 1.0, name: ..., kwargs: {...}}]; weight 0 makes it a metric
    max_error_rate: share of the completions of a call on which a reward function may fail
    correct_at: with match=none, the total reward from which a completion counts as correct; null: never counted
    max_prompt_tokens: longest prompt, rendered
    on_bad_row, on_long_prompt, on_duplicate, on_overlap: "error" or "skip" (overlap: the training row is skipped)
    dry_run: call the reward functions at start on two rows, with their answers as the completions

    Raises DataError for the data, ValueError for a keyword, RewardError if a dry run fails."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        seed: int,
        path: str,
        prompt_key: str,
        answer_key: str | None,
        match: str,
        current_date: str,
        reasoning_effort: str,
        max_prompt_tokens: int,
        eval_path: str | None = None,
        held_out_fraction: float | None = None,
        num_eval_prompts: int | None = None,
        question_template: str | None = None,
        answer_after: str | None = None,
        instructions: str | None = None,
        reasoning_effort_key: str | None = None,
        numeric_tolerance: float = 0.0,
        match_reward: float = 1.0,
        format_reward: float = 0.0,
        rewards: list | None = None,
        max_error_rate: float = 0.05,
        correct_at: float | None = None,
        on_bad_row: str = "error",
        on_long_prompt: str = "error",
        on_duplicate: str = "error",
        on_overlap: str = "error",
        dry_run: bool = True,
    ):
        self.tokenizer, self.seed = tokenizer, seed
        self.prompt_key, self.answer_key, self.answer_after = prompt_key, answer_key, answer_after
        self.question_template, self.instructions = question_template, instructions
        self.reasoning_effort, self.reasoning_effort_key = reasoning_effort, reasoning_effort_key
        self.current_date, self.max_prompt_tokens = current_date, max_prompt_tokens
        self.match, self.numeric_tolerance, self.match_reward = match, numeric_tolerance, match_reward
        self.format_reward, self.max_error_rate, self.correct_at = format_reward, max_error_rate, correct_at
        self.on_bad_row, self.on_long_prompt = on_bad_row, on_long_prompt
        self.on_duplicate, self.on_overlap = on_duplicate, on_overlap
        self._check_keywords(eval_path, held_out_fraction, num_eval_prompts)
        train = self._read(path, "path")
        if eval_path is None:
            cut = int(held_out_fraction * 2**64)
            held_out = [row for row in train if _hash(row) < cut]
            self.train_rows = [row for row in train if _hash(row) >= cut]
            if not held_out or not self.train_rows:
                raise DataError(
                    f"{path}: env.held_out_fraction={held_out_fraction} leaves {len(self.train_rows)} "
                    f"training and {len(held_out)} evaluation rows of {len(train)}; change it or give eval_path"
                )
        else:
            held_out = self._read(eval_path, "eval_path")
            self.train_rows = self._without_overlap(train, held_out)
        self.eval_rows = sorted(held_out, key=_hash)[:num_eval_prompts]
        self._rows = {row.source: row for row in self.train_rows + self.eval_rows}
        self.rewards = self._load_rewards(rewards or [])
        self._epoch: tuple[int, list[int]] | None = None  # the last permutation asked for
        self._step = 0  # only shown to reward functions, as trainer_state.global_step
        if dry_run:
            self._dry_run()

    def prompts(self, step: int, *, num_prompts: int, attempt: int = 0) -> list[Prompt]:
        """The step's rows in epoch order; `attempt` > 0 draws rows at random for groups that were dropped."""
        self._step = step
        num_rows = len(self.train_rows)
        if attempt:
            rng = random.Random(f"dataset refill {self.seed} {step} {attempt}")
            indices = [rng.randrange(num_rows) for _ in range(num_prompts)]
        else:
            positions = range(step * num_prompts, (step + 1) * num_prompts)
            indices = [self._permutation(p // num_rows)[p % num_rows] for p in positions]
        return [_prompt(attempt * num_prompts + i, self.train_rows[index]) for i, index in enumerate(indices)]

    def eval_prompts(self) -> list[Prompt]:
        """The held-out rows, the same for every seed."""
        return [_prompt(i, row) for i, row in enumerate(self.eval_rows)]

    def score(self, completions: list[Completion]) -> list[Score]:
        """The weighted sum of match, format and reward functions. Raises RewardError if too many of them fail."""
        samples, parsed = [], []
        for completion in completions:
            row = self._rows[completion.prompt.row["_source"]]
            parsed.append(parse_completion(completion.completion_ids, self.tokenizer))
            samples.append(
                Sample(
                    row=row.columns,
                    source=row.source,
                    prompt=row.prompt,
                    text=parsed[-1].final,
                    answer=row.answer,
                    thinking=parsed[-1].analysis,
                    completion_ids=completion.completion_ids,
                    is_truncated=completion.finish_reason == "length",
                )
            )
        results = score_with(self.rewards, samples, step=self._step, max_error_rate=self.max_error_rate)
        scores = []
        for i, sample in enumerate(samples):
            parts = {"format": float(is_well_formed(parsed[i]))}
            if self.match != "none":
                answer = stated_answer(parsed[i])
                parts[f"{self.match}_match"] = 0.0 if answer is None else self._matches(answer, sample.answer)
            scores.append(self._combine(parts, [of_reward[i] for of_reward in results]))
        self._check_applicable(scores, samples)
        return scores

    def describe(self, completion: Completion) -> dict:
        row = self._rows[completion.prompt.row["_source"]]
        parsed = parse_completion(completion.completion_ids, self.tokenizer)
        question = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
        return {
            "source": row.source,
            "question": question,
            "answer": row.answer,
            "analysis": parsed.analysis,
            "final": parsed.final,
        }

    # --- rewards ----------------------------------------------------------------------------------------------------

    def _matches(self, text: str, answer: str) -> float:
        if self.match == "exact":
            return exact_match(text, answer)
        return numeric_match(text, answer, tolerance=self.numeric_tolerance)

    def _combine(self, parts: dict[str, float], results: list[Result]) -> Score:
        weights = {"format": self.format_reward, f"{self.match}_match": self.match_reward}
        terms = [weights[name] * value for name, value in parts.items() if weights[name] != 0]
        is_correct = bool(parts[f"{self.match}_match"]) if self.match != "none" else None
        metrics, extra = {}, {}
        is_failed = False
        for reward, result in zip(self.rewards, results):
            metrics |= result.metrics
            extra |= result.extra
            if result.error is not None:
                is_failed |= reward.weight != 0
                extra[f"{reward.name}/error"] = result.error
            elif result.value is not None:
                parts[reward.name] = result.value
                terms += [reward.weight * result.value] if reward.weight != 0 else []
        if self.rewards:
            metrics["reward/error_rate"] = float(any(result.error is not None for result in results))
        total = sum(terms) if terms and not is_failed else None
        if self.match == "none" and self.correct_at is not None:
            is_correct = total is not None and total >= self.correct_at
        return Score(total, parts, metrics, is_correct, extra)

    def _check_applicable(self, scores: list[Score], samples: list[Sample]) -> None:
        if scores and all(score.reward is None for score in scores):
            raise RewardError(
                f"no reward for any of {len(scores)} completions, first row {samples[0].source}: every "
                "reward function failed or returned None (not applicable)"
            )

    def _load_rewards(self, entries: list) -> list[Reward]:
        columns = {name for row in self._rows.values() for name in row.columns}
        rewards = []
        for i, entry in enumerate(entries):
            key = f"env.rewards[{i}]"
            if not isinstance(entry, dict) or not isinstance(entry.get("fn"), str):
                raise ValueError(f"{key}={entry!r}: expected {{fn: package.module:function, weight: 1.0}}")
            for name in entry:
                if name not in ("fn", "weight", "name", "kwargs"):
                    near = difflib.get_close_matches(str(name), ("weight", "name", "kwargs"), n=1)
                    raise ValueError(
                        f"{key}.{name}: unknown key{f'; did you mean {near[0]}?' if near else ''} "
                        "(allowed: fn, weight, name, kwargs)"
                    )
            options = {name: value for name, value in entry.items() if name != "fn"}
            rewards.append(
                load_reward(
                    entry["fn"], key=f"{key}.fn", columns=columns, has_answer=self.answer_key is not None, **options
                )
            )
        names = ["format", f"{self.match}_match", *(reward.name for reward in rewards)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"env.rewards: the name {repeated[0]!r} is taken twice; give one of them another with name:"
            )
        weights = [self.format_reward, self.match_reward * (self.match != "none"), *(r.weight for r in rewards)]
        if not any(weights):
            raise ValueError(
                "env.rewards: every weight is 0, so there is nothing to learn; set match, match_reward or the "
                "weight of a reward function"
            )
        return rewards

    def _dry_run(self) -> None:
        samples = []
        for row in self.train_rows[:2]:
            text = row.answer or ""
            samples.append(
                Sample(
                    row=row.columns,
                    source=row.source,
                    prompt=row.prompt,
                    text=text,
                    thinking="",
                    completion_ids=self.tokenizer.encode(text),
                    is_truncated=False,
                    answer=row.answer,
                )
            )
        try_rewards(self.rewards, samples)

    # --- rows -------------------------------------------------------------------------------------------------------

    def _permutation(self, epoch: int) -> list[int]:
        if self._epoch is None or self._epoch[0] != epoch:
            order = list(range(len(self.train_rows)))
            random.Random(f"dataset epoch {self.seed} {epoch}").shuffle(order)
            self._epoch = (epoch, order)
        return self._epoch[1]

    def _check_keywords(
        self, eval_path: str | None, held_out_fraction: float | None, num_eval_prompts: int | None
    ) -> None:
        if (eval_path is None) == (held_out_fraction is None):
            raise ValueError(
                f"env.eval_path={eval_path!r}, env.held_out_fraction={held_out_fraction}: set exactly one, "
                "the other null: evaluation rows are a file of their own or a part of path"
            )
        if held_out_fraction is not None and not 0 < held_out_fraction < 1:
            raise ValueError(f"env.held_out_fraction={held_out_fraction}: must lie between 0 and 1, both excluded")
        if num_eval_prompts is not None and num_eval_prompts < 1:
            raise ValueError(f"env.num_eval_prompts={num_eval_prompts}: must be at least 1, or null for all")
        if self.max_prompt_tokens < 1:
            raise ValueError(f"env.max_prompt_tokens={self.max_prompt_tokens}: must be at least 1")
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError(f"env.max_error_rate={self.max_error_rate}: must lie in 0..1")
        if not 0 <= self.numeric_tolerance < 1:
            raise ValueError(f"env.numeric_tolerance={self.numeric_tolerance}: must lie in 0..1 (relative; 0 is exact)")
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

    def _read(self, path: str, key: str) -> list[Row]:
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
        try:
            text = json.dumps(_messages(prompt), ensure_ascii=False, sort_keys=True).encode()
        except UnicodeEncodeError as error:
            raise _BadRow("the prompt cannot be tokenised: it holds half of a surrogate pair") from error
        return Row(record, source, prompt, answer, effort, hashlib.sha256(text).digest(), array("i"))

    def _tokenize(self, row: Row) -> array:
        messages = _messages(row.prompt)
        if self.instructions is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "developer", "content": self.instructions}, *messages]
        if sum(len(message["content"]) for message in messages) > CHARS_PER_TOKEN * self.max_prompt_tokens:
            return array("i", [-1]) * (self.max_prompt_tokens + 1)
        try:
            return array(
                "i", render_chat(messages, self.tokenizer, reasoning_effort=row.effort, current_date=self.current_date)
            )
        except ValueError as error:  # characters that the tokenizer lacks, tool calls without a name
            raise _BadRow(f"the prompt cannot be tokenised: {error}") from error

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

    def _without_overlap(self, train: list[Row], held_out: list[Row]) -> list[Row]:
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
    if not isinstance(prompt, list) or not prompt:
        raise _BadRow(f"the prompt is a {type(prompt).__name__}; expected text or a list of messages")
    for i, message in enumerate(prompt):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("content"), str)
            or message.get("role") not in ROLES
        ):
            raise _BadRow(
                f"message {i} of the prompt must be {{role, content}} with text content and a role of "
                f"{', '.join(ROLES)}"
            )
        if message["role"] in ("system", "developer") and i > 0:
            raise _BadRow(f"message {i} of the prompt: a {message['role']} message can only come first")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise _BadRow(f"the prompt ends with a message of the {prompt[-1]['role']}; the model needs one to answer")
    return prompt


def _hash(row: Row) -> int:
    return int.from_bytes(row.digest[:8], "big")


def _prompt(prompt_id: int, row: Row) -> Prompt:
    return Prompt(prompt_id, row.token_ids.tolist(), {**row.columns, "_source": row.source})
