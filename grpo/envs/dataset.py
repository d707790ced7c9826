"""Prompts and answers from data: JSON lines, JSON, CSV, TSV, Parquet, Arrow, folders and ids of the Hugging Face hub.

    {"question": "What is 17 + 25?", "answer": "42"}        # a line of tests/fixtures/arithmetic.jsonl, say
    python -m grpo.train +experiment=gpt_oss_20b_lora model.path=FOLDER env.path=tests/fixtures/arithmetic.jsonl

`prompt_key` names the column with the prompt, text or a list of messages; `answer_key` the reference answer (both may be
dotted, `reward_model.ground_truth`; of a list of messages the last turn is the answer, and where both keys name one column the
turns before it are the prompt); `question_template` builds the user message from columns instead. The final channel of
a completion is matched with the answer (`match`: exact, numeric, math, none) and shown to the reward functions of `rewards`,
which grpo/rewards/functions.py describes. Columns named `tools` and `chat_template_kwargs` are read as TRL reads them, by
`read_tools` and `read_template_kwargs` of models/chat. Evaluation rows come from a file or split of their own or are a fraction
held out by hash of the prompt.

All data is read, checked and tokenised when the environment is built, before any model is loaded: every problem is a DataError
that starts with file:line, or file[row] for tables. Training rows are visited in epochs, each a permutation keyed by
(seed, epoch); everything is a pure function of (seed, step, attempt), so there is no state to save.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator
from functools import partial

from grpo.batch import Completion, Prompt
from grpo.environment import Score
from grpo.envs.data_files import DataError
from grpo.envs.rows import Row, RowReader, build_tokenizer, in_epochs
from grpo.rewards.forms import Sample, TrainerState
from grpo.rewards.functions import Result
from grpo.rewards.match import exact_match, numeric_match
from grpo.rewards.math_match import MathMatch
from grpo.rewards.scoring import Scorer
from models.chat.form import Form
from models.chat.parse import Parsed, parse_completion
from models.chat.render import Message, generation_prompt, render_message
from models.chat.tokenizer import Tokenizer


class Dataset:
    """The environment.

    path: a file, folder or hub id, or a list of them (as text, with commas); globs; a file or folder here wins over a hub id
    subset, split: for folders and hub ids; without `split`, the only one or "train"
    eval_path, eval_split: evaluation rows (`eval_split` alone: of `path`); else `held_out_fraction` of `path` is held out
    num_eval_prompts: evaluation rows used, chosen by hash; null uses all
    question_template: text with {column} placeholders ({{ and }} for braces); null takes the prompt column as it is
    answer_after: keep what follows the last occurrence of this in the answer column ("####" for GSM8K)
    instructions: developer message for rows that bring neither a system nor a developer message
    reasoning_effort: low, medium or high; `reasoning_effort_key` names a column that overrides it
    current_date: YYYY-MM-DD in the system message; pinned, since a prompt must not change from day to day
    match: exact, numeric (a plain number, equal within the relative `numeric_tolerance`), math (an expression, by
        math-verify) or none; worth `match_reward`; a list of answers in the data: any of them is right
    format_reward: for a completion that parses and ends in its only final message
    rewards: a function's path, or {fn: path, weight: 1.0, name: ..., kwargs: {...}} (weight 0 makes it a metric), or a list
    max_error_rate: share of a function's latest results (the last 1000, taken as 100 if fewer) that may be errors
    reward_timeout: seconds for one call of a reward function, or null; takes at least one worker
    reward_workers: processes that call the functions, each a completion or, of batch functions, a group at a time; 0: none
    reward_retries: more tries of a call that raised
    correct_at: with match=none, the total reward from which a completion counts as correct; null: never counted
    max_prompt_tokens: longest prompt, rendered
    max_bad_rows: share of bad rows that on_bad_row=skip puts up with
    on_bad_row, on_long_prompt, on_duplicate, on_overlap: "error" or "skip" (overlap: the training row is skipped)
    dry_run: call the reward functions at start on two rows, with their answers as the completions

    Raises DataError for the data, ValueError for a keyword, RewardError if a dry run fails."""

    build_tokenizer = staticmethod(build_tokenizer)

    def __init__(self, *, tokenizer: Tokenizer, seed: int, path: str | list, prompt_key: str, answer_key: str | None, match: str,
                 current_date: str, reasoning_effort: str, max_prompt_tokens: int, subset: str | None = None,
                 split: str | None = None, eval_path: str | list | None = None, eval_split: str | None = None,
                 held_out_fraction: float | None = None, num_eval_prompts: int | None = None,
                 question_template: str | None = None, answer_after: str | None = None, instructions: str | None = None,
                 reasoning_effort_key: str | None = None, numeric_tolerance: float = 0.0, match_reward: float = 1.0,
                 format_reward: float = 0.0, total_steps: int = 0, rewards: str | dict | list | None = None,
                 max_error_rate: float = 0.05, reward_timeout: float | None = None, reward_workers: int = 0,
                 reward_retries: int = 1, correct_at: float | None = None, max_bad_rows: float = 0.01, on_bad_row: str = "error",
                 on_long_prompt: str = "error", on_duplicate: str = "error", on_overlap: str = "error", dry_run: bool = True,
                 chat_form: Form = Form.hub):
        self.tokenizer, self.seed = tokenizer, seed
        self.answer_key, self.match, self.numeric_tolerance = answer_key, match, numeric_tolerance
        self.match_reward, self.format_reward = match_reward, format_reward
        self.total_steps, self.correct_at = total_steps, correct_at
        self._check_keywords(eval_path or eval_split, held_out_fraction, num_eval_prompts)
        self._match_expressions = MathMatch(tolerance=numeric_tolerance) if match == "math" else None
        reader = RowReader(
            tokenizer=tokenizer, prompt_key=prompt_key, answer_key=answer_key, answer_after=answer_after, match=match,
            question_template=question_template, instructions=instructions, reasoning_effort=reasoning_effort,
            reasoning_effort_key=reasoning_effort_key, current_date=current_date, max_prompt_tokens=max_prompt_tokens,
            max_bad_rows=max_bad_rows, on_bad_row=on_bad_row, on_long_prompt=on_long_prompt, on_duplicate=on_duplicate,
            on_overlap=on_overlap, chat_form=chat_form)
        train = reader.read(path, "env.path", subset=subset, split=split)
        if held_out_fraction is not None:
            self.train_rows, held_out = _hold_out(train, held_out_fraction, path)
        else:
            own_path, own_subset = (path, subset) if eval_path is None else (eval_path, None)
            held_out = reader.read(own_path, "env.eval_path", subset=own_subset, split=eval_split)
            self.train_rows = reader.without_overlap(train, held_out)
        self.eval_rows = sorted(held_out, key=lambda row: row.rank)[:num_eval_prompts]
        self._num_skipped = reader.num_skipped
        self._rows = {row.source: row for row in self.train_rows + self.eval_rows}
        columns = {name for row in self._rows.values() for name in row.columns}
        self.scorer = Scorer(rewards, columns=columns, has_answer=answer_key is not None, max_error_rate=max_error_rate,
                             timeout=reward_timeout, num_workers=reward_workers, retries=reward_retries)
        self._check_rewards()
        self._step, self._num_prompts = 0, 1  # of the last prompts; only shown to reward functions, as trainer_state
        if dry_run:
            self._dry_run()

    def prompts(self, step: int, *, num_prompts: int, attempt: int = 0) -> list[Prompt]:
        """The step's rows in epoch order; `attempt` > 0 draws rows at random for groups that were dropped."""
        self._step, self._num_prompts = step, num_prompts
        num_rows = len(self.train_rows)
        if attempt:
            rng = random.Random(f"dataset refill {self.seed} {step} {attempt}")
            indices = [rng.randrange(num_rows) for _ in range(num_prompts)]
        else:
            indices = in_epochs(f"dataset epoch {self.seed}", num_rows, first=step * num_prompts, count=num_prompts)
        return [_prompt(attempt * num_prompts + i, self.train_rows[index]) for i, index in enumerate(indices)]

    def train_prompts(self) -> Iterator[Prompt]:
        """All prompts that `prompts` can return, in the order of the data."""
        return (_prompt(i, row) for i, row in enumerate(self.train_rows))

    def eval_prompts(self) -> list[Prompt]:
        """The held-out rows, the same for every seed."""
        return [_prompt(i, row) for i, row in enumerate(self.eval_rows)]

    def demonstrations(self, step: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) of rows drawn at random, with their answers as final messages: so a model trained from
        scratch learns to give answers before rewards judge them."""
        if self.answer_key is None:
            raise DataError("warmup: demonstrations need env.answer_key, the column with the answers; or set warmup=null")
        rng = random.Random(f"dataset demonstrations {self.seed} {step}")
        rows = [self.train_rows[rng.randrange(len(self.train_rows))] for _ in range(batch_size)]
        start = len(generation_prompt(self.tokenizer))
        pairs = []
        for row in rows:
            if not row.accepted:
                raise DataError(f"{row.source}: the answer is a {type(row.answer).__name__}, and a demonstration for the warm-up "
                                "needs text; set warmup=null")
            answer = render_message(Message("assistant", row.accepted[0], channel="final"), self.tokenizer)
            pairs.append((row.token_ids.tolist(), answer[start:-1] + [self.tokenizer.return_]))
        return pairs

    def score(self, completions: list[Completion]) -> list[Score]:
        """The weighted sum of match, format and reward functions. Raises RewardError if too many of them fail."""
        parsed = [self._parse(completion) for completion in completions]
        samples = [
            _sample(self._row_of(completion), text=each.final, thinking=each.analysis, completion_ids=completion.completion_ids,
                    is_truncated=completion.is_truncated) for completion, each in zip(completions, parsed)]
        results = self.scorer.results(samples, self._trainer_state(len(samples)))
        if self.match != "none":
            results = [self._match([each.final for each in parsed], completions), *results]
        return [self._combine(float(each.fault is None), [of_reward[i] for of_reward in results])
                for i, each in enumerate(parsed)]

    def summary(self) -> str:
        """How many rows there are, and how many were left out, for the first lines of a run."""
        skipped = ", ".join(f"{num} {reason}" for reason, num in self._num_skipped.items())
        return (f"{len(self.train_rows):,} training and {len(self.eval_rows):,} evaluation rows"
                + (f" (left out: {skipped})" if skipped else ""))

    def fingerprint(self) -> str:
        """SHA-256 of the rows in order: split, answer, columns and rendered prompt; file names and formats do not count."""
        digest = hashlib.sha256()
        for split, rows in (("train", self.train_rows), ("eval", self.eval_rows)):
            for row in rows:
                columns = json.dumps(row.columns, sort_keys=True, default=repr)
                digest.update(json.dumps([split, row.answer, columns, len(row.token_ids)], default=repr).encode())
                digest.update(row.token_ids.tobytes())
        return digest.hexdigest()

    def describe(self, completion: Completion) -> dict:
        row, parsed = self._row_of(completion), self._parse(completion)
        return {"source": row.source, "question": row.question, "answer": row.answer, "analysis": parsed.analysis,
                "final": parsed.final, "fault": parsed.fault}

    def _row_of(self, completion: Completion) -> Row:
        return self._rows[completion.prompt.row["_source"]]

    def _parse(self, completion: Completion) -> Parsed:
        return parse_completion(completion.completion_ids, self.tokenizer, is_policy=completion.is_policy)

    # --- rewards ----------------------------------------------------------------------------------------------------

    def _match(self, texts: list[str], completions: list[Completion]) -> list[Result]:
        """Whether each final text is one of its row's accepted answers. "", that of a completion with a fault, never is."""
        accepted = [self._row_of(completion).accepted for completion in completions]
        if self._match_expressions is not None:
            return self._match_expressions(texts, accepted)
        equals = exact_match if self.match == "exact" else partial(numeric_match, tolerance=self.numeric_tolerance)
        return [Result(max(equals(text, answer) for answer in answers)) for text, answers in zip(texts, accepted)]

    def _combine(self, has_format: float, results: list[Result]) -> Score:
        scorers = [(f"{self.match}_match", self.match_reward)] if self.match != "none" else []
        scorers += [(reward.name, reward.weight) for reward in self.scorer.rewards]
        parts = {"format": has_format}
        terms = [self.format_reward * has_format] if self.format_reward != 0 else []
        metrics, extra = {}, {}
        if self.scorer.rewards or self._match_expressions is not None:
            metrics["reward/error_rate"] = float(any(result.error is not None for result in results))
        is_failed = False
        for (name, weight), result in zip(scorers, results):
            for own, theirs in ((metrics, result.metrics), (extra, result.extra)):
                # a name that is taken gets the function's in front of it
                own |= {f"{name}/{key}" if key in own else key: value for key, value in theirs.items()}
            if result.error is not None:
                is_failed |= weight != 0
                extra[f"{name}/error"] = result.error
            elif result.value is not None:
                parts[name] = result.value
                terms += [weight * result.value] if weight != 0 else []
        total = sum(terms) if terms and not is_failed else None
        is_correct = None
        if self.match != "none":
            is_correct = bool(results[0].value) if results[0].error is None else None
        elif self.correct_at is not None:
            is_correct = total is not None and total >= self.correct_at
        return Score(total, parts, metrics, is_correct, extra)

    def _check_rewards(self) -> None:
        names = ["format", f"{self.match}_match", *(reward.name for reward in self.scorer.rewards)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"env.rewards: the name {repeated[0]!r} is taken twice; give one of them another with name:")
        weights = [reward.weight for reward in self.scorer.rewards]
        if not any([self.format_reward, self.match_reward * (self.match != "none"), *weights]):
            raise ValueError("env.rewards: every weight is 0, so there is nothing to learn; set match, match_reward or the "
                             "weight of a reward function")

    def _trainer_state(self, num_completions: int) -> TrainerState:
        epochs_per_step = self._num_prompts / len(self.train_rows)
        return TrainerState(
            global_step=self._step, max_steps=self.total_steps, epoch=self._step * epochs_per_step,
            num_train_epochs=math.ceil(self.total_steps * epochs_per_step), train_batch_size=num_completions)

    def _dry_run(self) -> None:
        answers = [(row, row.accepted[0] if row.accepted else "") for row in self.train_rows[:2]]
        samples = [_sample(row, text=text, thinking="", completion_ids=self.tokenizer.encode(text), is_truncated=False)
                   for row, text in answers]
        self.scorer.try_out(samples, self._trainer_state(len(samples)))
        if self._match_expressions is not None:
            self._match_expressions.warm_up()

    # --- rows -------------------------------------------------------------------------------------------------------

    def _check_keywords(self, evaluation: str | list | None, held_out_fraction: float | None,
                        num_eval_prompts: int | None) -> None:
        if (evaluation is None) == (held_out_fraction is None):
            raise ValueError(
                f"env.eval_path (or env.eval_split)={evaluation!r}, env.held_out_fraction={held_out_fraction}: set exactly "
                "one, the other null: evaluation rows are a file or split of their own or a part of path")
        if held_out_fraction is not None and not 0 < held_out_fraction < 1:
            raise ValueError(f"env.held_out_fraction={held_out_fraction}: must lie between 0 and 1, both excluded")
        if num_eval_prompts is not None and num_eval_prompts < 1:
            raise ValueError(f"env.num_eval_prompts={num_eval_prompts}: must be at least 1, or null for all")
        if not 0 <= self.numeric_tolerance < 1:
            raise ValueError(f"env.numeric_tolerance={self.numeric_tolerance}: must lie in 0..1 (relative; 0 is exact)")


def _hold_out(rows: list[Row], fraction: float, path: str | list) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows, told apart by their prompts alone."""
    cut = int(fraction * 2**64)
    train, held_out = [row for row in rows if row.rank >= cut], [row for row in rows if row.rank < cut]
    if not train or not held_out:
        raise DataError(
            f"{path}: env.held_out_fraction={fraction} leaves {len(train)} training and {len(held_out)} evaluation rows of "
            f"{len(rows)}: each row's prompt says to which it belongs; {'lower' if held_out else 'raise'} it, add rows, or set "
            "env.eval_path=FILE env.held_out_fraction=null")
    return train, held_out


def _prompt(prompt_id: int, row: Row) -> Prompt:
    return Prompt(prompt_id, row.token_ids.tolist(), {**row.columns, "_source": row.source})


def _sample(row: Row, *, text: str, thinking: str, completion_ids: list[int], is_truncated: bool) -> Sample:
    return Sample(row=row.columns, source=row.source, prompt=row.prompt, text=text, thinking=thinking,
                  completion_ids=completion_ids, is_truncated=is_truncated, answer=row.answer)
