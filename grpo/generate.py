"""Prompt in, completion out: one prompt, or a chat, with a run or a checkpoint; tokens appear as they are drawn.

    python -m grpo.generate run=runs/NAME [step=N] [prompt=14+49]
    python -m grpo.generate +model=gpt_oss_20b model.path=FOLDER prompt="Why is the sky blue?"
    python -m grpo.generate run=runs/NAME prompts=FILE.jsonl output=ANSWERS.jsonl [num_samples=4]

The last answers many prompts together, each of which stands alone; under torchrun each process answers some of them, and the file
is that of one process. Stopped by a signal, it keeps the finished answers in OUTPUT.partial; the same command goes on, with
any number of processes.

With an environment that has tools, an answer appears when it is complete, its calls and their results in it.

Without a prompt it chats: a line is a question, /new forgets the conversation, Ctrl-C cuts an answer short, Ctrl-D ends;
from a pipe or a file, each line is a question. Prompts are rendered as in training: by the environment of a run that offers
`encode_prompt(question)` (every question then stands alone), otherwise as a harmony conversation whose instructions,
reasoning effort and date are those given, else those of the run's environment. History is the hub template's: earlier answers
without their analysis, their <|return|> an <|end|>.

A message's header stands in brackets before its text: [analysis], [final]. What the model writes is untrusted: control
characters are shown as escapes. Notes and errors go to stderr.
"""
import contextlib
import datetime
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from grpo.batch import Completion, Prompt
from grpo.config import (
    ConfigError,
    GenerateConfig,
    ReasoningEffort,
    flatten,
    key_matches,
    shown,
    to_dict,
)
from grpo.configuration.launch import FAILED, launch, speaks_for_node
from grpo.configuration.targets import resolve_target
from grpo.distributed.place import check_alone
from grpo.distributed.ranks import Ranks, leads
from grpo.distributed.rollout import digest_prompts, own_completions, rank_with_others
from grpo.environment import encode_question, make_environment
from grpo.envs.data_files import DataError
from grpo.envs.data_sources import read_rows
from grpo.envs.rows import PROMPT_NAMES
from grpo.evaluate import Unfinished, join_sampler, run_shared, stop_signal
from grpo.record.outputs import keep_inputs, keep_part, part_of
from grpo.record.terminal import clean, flush_standard_streams, print_error, tell
from grpo.rollout.sampling import SamplingParams
from grpo.rollout.session import Sampler
from grpo.rollout.turns import Turns, until_stopped
from grpo.run.checkpoint import MANIFEST, checkpoints_of
from grpo.run.failures import describe_failure
from grpo.run.identity import digest_base, digest_file
from grpo.run.policy import load_policy
from grpo.run.signals import GracefulStop
from models.chat.parse import parse_completion
from models.chat.render import harmony_messages, render_prompt
from models.chat.tokenizer import REPLACEMENT, Tokenizer

GENERATE_STEP = -2  # in place of the step in sampling keys: neither training nor evaluation draws with it
MAX_HEADER_LEN = 32  # tokens; what has not become a header by then is shown as text
# Keys that do not decide what the answers to a file of prompts are, but by the prompts that they render.
FREE_KEYS = ("prompts", "output", "max_batch", "threads", "device", "distributed", "model.memory_gb", "model.host_gb",
             "instructions", "reasoning_effort", "current_date")
INTERRUPTED = 128 + 2  # exit code of a process that SIGINT ends
NEW_CONVERSATION = "/new"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class TextStream:
    """Token ids in, text out, piece by piece: the pieces together are `tokenizer.decode` of all ids. Bytes of a character
    that later tokens may complete are held back until `flush`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pending: list[int] = []  # ids since the last complete character
        self.num_shown = 0  # characters of their text already returned

    def feed(self, token_id: int) -> str:
        self.pending.append(token_id)
        # U+FFFD at the end may be the beginning of a character; all before it is final
        text = self.tokenizer.decode(self.pending, keep_special=True)
        if not text.endswith(REPLACEMENT):
            return self.flush()
        start, self.num_shown = self.num_shown, max(self.num_shown, len(text.rstrip(REPLACEMENT)))
        return text[start:self.num_shown]

    def flush(self) -> str:
        piece = self.tokenizer.decode(self.pending, keep_special=True)[self.num_shown:]
        self.pending, self.num_shown = [], 0
        return piece


class CompletionView:
    """Writes a completion to stdout while it is drawn: headers in brackets, analysis dim on a terminal."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.has_styles = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.closing = {tokenizer.end, *tokenizer.stop_ids}
        self.text = TextStream(tokenizer)
        self.header: list[int] | None = []  # ids of the header being read (the prompt has its <|start|>); None in content
        self.is_line_start = True

    def feed(self, token_id: int) -> None:
        tokenizer = self.tokenizer
        if self.header is None and token_id in self.closing:
            self.end_message()
        elif self.header is None:
            self._show(self.text.feed(token_id))
        elif token_id == tokenizer.message:
            title = tokenizer.decode(self.header, keep_special=True).replace("<|channel|>", " ")
            title = " ".join(title.replace("<|start|>", "").removeprefix("assistant").split())
            self._style(DIM if title.startswith("analysis") else "")
            self._show(f"[{title}] ")
            self.header = None
        else:
            self.header.append(token_id)
            if len(self.header) > MAX_HEADER_LEN or token_id in self.closing:
                self.end_message()

    def end_message(self) -> None:
        """Shows what was held back and ends the line; ids that became no header are shown as they are."""
        for token_id in self.header or []:
            self._show(self.text.feed(token_id))
        self._show(self.text.flush())
        self.header = []
        self._style(PLAIN)
        if not self.is_line_start:
            self._show("\n")

    def _show(self, piece: str) -> None:
        if piece:
            text = "\t".join(clean(part, sys.stdout.encoding) for part in piece.split("\t"))
            print(text, end="", flush=True)
            self.is_line_start = piece.endswith("\n")

    def _style(self, code: str) -> None:
        if self.has_styles:
            print(code, end="", flush=True)


class Conversation:
    """Questions to one policy, and what it answered."""

    def __init__(self, config: GenerateConfig, sampler: Sampler, tokenizer: Tokenizer,
                 encode_prompt: Callable[[str], list[int]] | None, chat_settings: dict, turns: Turns | None = None) -> None:
        self.config, self.sampler, self.tokenizer = config, sampler, tokenizer
        self.params = replace(SamplingParams.of(config), greedy=config.greedy)
        self.encode_prompt, self.chat_settings, self.turns = encode_prompt, chat_settings, turns
        self.messages: list[dict] = []
        self.num_asked = 0  # part of the sampling key: a question asked twice is answered anew
        self.step: int | None = None  # of the run's checkpoint whose weights these are

    def ask(self, question: str) -> None:
        """Streams an answer to stdout. Ctrl-C ends it early and leaves the turn out of the history. Raises ValueError for a
        question that cannot be encoded or does not fit."""
        config, view, ids, is_policy = self.config, CompletionView(self.tokenizer), [], []
        prompt = Prompt(self.num_asked, self.render(question), {})
        self.num_asked += 1
        try:
            for token_id in self.answer(prompt, is_policy):
                ids.append(token_id)
                view.feed(token_id)
        finally:
            view.end_message()
        parsed = parse_completion(ids, self.tokenizer, is_policy=is_policy or None)
        if ids[-1] not in self.tokenizer.stop_ids:
            note(f"cut off after {len(ids)} tokens: raise max_new_tokens, unless the model's context is full")
        elif parsed.fault is not None:
            note(f"not a finished answer in the chat format: {parsed.fault}")
        if self.encode_prompt is None and parsed.final:
            self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": parsed.final}]
        elif self.encode_prompt is None and config.prompt is None:
            note("no final answer: this turn is left out of the conversation")

    def answer(self, prompt: Prompt, is_policy: list[bool]) -> Iterable[int]:
        """Token ids as they are drawn; with tools all at the end, and `is_policy` gets which of them the policy drew."""
        if self.turns is None:
            return self.sampler.stream(prompt, self.params, step=GENERATE_STEP)
        completion, = self.turns.generate(self.sampler, [prompt], self.params, step=GENERATE_STEP, num_samples=1)
        is_policy += completion.is_policy
        return completion.completion_ids

    def render(self, question: str | list[dict]) -> list[int]:
        """The prompt for a question that goes on with the conversation, or for a conversation of its own."""
        if self.encode_prompt is not None:
            return self.encode_prompt(question)
        asked = [*self.messages, {"role": "user", "content": question}] if isinstance(question, str) else question
        return render_prompt(harmony_messages(asked, **self.chat_settings), self.tokenizer)


def note(text: str) -> None:
    tell(f"({clean(text, sys.stderr.encoding)})", sys.stderr)


def load_conversation(config: GenerateConfig, *, is_silent: bool = False) -> Conversation:
    """Loads the run or the checkpoint that the config names."""
    loaded = load_policy(config, None, max_batch=1 if config.prompts is None else config.max_batch)
    tokenizer, trained = loaded.tokenizer, loaded.trained
    env, encode_prompt, turns = {} if trained is None else trained.env, None, None
    if trained is not None:
        if hasattr(resolve_target(env["_target_"], "env"), "encode_prompt"):
            asked = make_environment(env, tokenizer, seed=trained.seed, total_steps=trained.steps, chat_form=config.turns.form)
            encode_prompt = functools.partial(encode_question, asked, vocab_size=loaded.policy.config.vocab_size)
            turns = Turns.of(asked, tokenizer, config.turns)
            if turns is not None:
                turns.has_user_turns = False  # the user sits here
        if not is_silent:
            note(f"{config.run}, step {loaded.step} of {trained.steps}")
    given = {"instructions": config.instructions, "reasoning_effort": config.reasoning_effort,
             "current_date": config.current_date}
    useless = [f"{key} = {str(value)!r}" for key, value in given.items() if value is not None]
    if encode_prompt is not None and useless:
        raise ConfigError(f"{', '.join(useless)}: this run's environment renders its own prompts; leave it out")
    default = {"reasoning_effort": str(ReasoningEffort.medium), "current_date": datetime.date.today().isoformat()}
    chat_settings = {key: value if value is not None else env.get(key) or default.get(key) for key, value in given.items()}
    chat_settings["form"] = config.turns.form
    conversation = Conversation(config, loaded.sampler, tokenizer, encode_prompt, chat_settings, turns)
    conversation.step = None if trained is None else loaded.step
    return conversation


def chat(conversation: Conversation) -> None:
    """Answers line after line until the input ends. A question that cannot be answered costs a message, not the chat."""
    for question in questions():
        if question == NEW_CONVERSATION:
            conversation.messages.clear()
            continue
        try:
            conversation.ask(question)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            note("stopped: this turn is left out of the conversation")
        except ValueError as error:
            print_error("error", str(error))


def questions() -> Iterator[str]:
    """The lines of stdin that are not blank; from a terminal with a prompt sign and line editing."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                print(f"> {clean(line.strip(), sys.stdout.encoding)}", flush=True)
                yield line.strip()
        return
    with contextlib.suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401  (gives input() its history and editing)
    note(f"a line is a question; {NEW_CONVERSATION} forgets the conversation, Ctrl-D ends")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            yield line


# ---- the prompts of a file


def answers_to_file(config: GenerateConfig, ranks: Ranks | None, held: contextlib.ExitStack) -> str:
    """A JSON line for each answer, by row of the file, then sample. held: as of run_shared."""
    keep_inputs(config.output, {"prompts": config.prompts})
    rows = list(read_rows(config.prompts, "prompts", subset=None, split=None))  # before the model, which takes longer
    if not rows:
        raise DataError(f"{config.prompts}: holds no rows; prompts needs at least one")
    conversation = load_conversation(config, is_silent=not leads(ranks))
    part = lines_of_part(config) if leads(ranks) else ({}, [])
    conversation.chat_settings["current_date"] = date_of_answers(conversation, part[0], ranks)
    asked = list(read_questions(rows, takes_messages=conversation.encode_prompt is None))
    prompts = [Prompt(number, encode_row(conversation, place, question), {}) for number, (place, question) in enumerate(asked)]
    return "".join(map(json_line, answers_until_stopped(conversation, prompts, asked, part, ranks, held)))


def answers_until_stopped(conversation: Conversation, prompts: list[Prompt], asked: list[tuple[str, str | list[dict]]],
                          part: tuple[dict, list[dict]], ranks: Ranks | None, held: contextlib.ExitStack) -> list[dict]:
    """The answers to all prompts, by row, then sample. Those that a command of the same kind left when a signal stopped it are
    taken over; part: lines_of_part on rank 0. Raises Unfinished, with all that are finished, when a signal comes, and RankFault
    (RuntimeError where the connection broke off) where another rank fails: then rank 0 keeps its own."""
    config, sampler, num_samples = conversation.config, conversation.sampler, conversation.config.num_samples
    progress, same, earlier = join_sampler(ranks, sampler, "answering"), None, {}
    if leads(ranks):
        same = fingerprint(conversation, prompts)
        earlier = earlier_answers(config, *part, same)
    taken = earlier.keys() if ranks is None else rows_taken(config, prompts, earlier, ranks)
    left = [prompt for prompt in prompts if prompt.id not in taken]
    if earlier:
        note(f"{len(earlier)} of {len(prompts)} rows were answered before the command was stopped; it goes on with the others")

    def summary(answers: list[dict]) -> str:
        return f"{len(answers)} of {len(prompts) * num_samples} answers"

    def text_of_part(answers: list[dict]) -> str:
        head = {"partial": summary(answers), "of": same}
        if config.current_date is None:  # one that was given has to be given again, as any other key
            head["current_date"] = conversation.chat_settings["current_date"]
        return "".join(map(json_line, [head, *in_order(answers)] if answers else []))

    stop = held.enter_context(GracefulStop("the same command", keeps="keeps the finished answers and ends",
                                           is_silent=not leads(ranks)))
    generate = functools.partial(
        until_stopped(sampler, conversation.turns), params=conversation.params, step=GENERATE_STEP, num_samples=num_samples,
        should_stop=stop if ranks is None else ranks.watch(stop), progress=progress)
    completions = own_completions(ranks, sampler, generate, left) if left else []
    answers = [answer for of_row in earlier.values() for answer in of_row]  # a signal from here on ends nothing: all are kept
    answers += [answer_record(conversation.tokenizer, asked[completion.prompt.id][1], completion) for completion in completions]
    try:
        answers = answers if ranks is None else [found for part in ranks.exchange("the answers", answers) for found in part]
    except RuntimeError:  # a RankFault, or of a connection to another node that broke; the others' answers are lost with them
        if leads(ranks):
            note(f"rank 0 had {summary(answers)}{keep_part(Path(config.output).expanduser(), text_of_part(answers))}")
        raise
    if len(answers) < len(prompts) * num_samples:
        raise Unfinished(f"{stop_signal(stop)}: {summary(answers)} were finished; the same command goes on with the rows that "
                         "lack some", text_of_part(answers))
    return in_order(answers)


def rows_taken(config: GenerateConfig, prompts: list[Prompt], earlier: dict[int, list[dict]], ranks: Ranks) -> set[int]:
    """The rows that rank 0 has answers to. Raises DataError if the ranks do not have the same prompts."""
    found = ranks.exchange("the rows of a stopped command", (digest_prompts(prompts), list(earlier)))
    if other := rank_with_others([digest for digest, _ in found]):
        raise DataError(f"{config.prompts}: rank {other} has other prompts than rank 0; file and tokenizer must be the same on "
                        "all nodes")
    return set(found[0][1])


def in_order(answers: list[dict]) -> list[dict]:
    """By row, then sample."""
    return sorted(answers, key=lambda answer: (answer["row"], answer["sample"]))


def date_of_answers(conversation: Conversation, head: dict, ranks: Ranks | None) -> str:
    """YYYY-MM-DD of all prompts, where nobody gave it that of a stopped command with which this one goes on on another day. The
    same on all ranks, though they may have started at midnight. head: of what a stopped command left, on rank 0."""
    date = conversation.chat_settings["current_date"]
    if conversation.config.current_date is None:
        date = head.get("current_date", date)
    return date if ranks is None else ranks.exchange("the date", date)[0]


def fingerprint(conversation: Conversation, prompts: list[Prompt]) -> str:
    """Of all that decides what the answers are: prompts, weights and settings."""
    config = conversation.config
    settings = {key: value for key, value in flatten(to_dict(config)).items() if not key_matches(key, FREE_KEYS)}
    asked = [settings, files_of_weights(config, step=conversation.step), [(prompt.id, prompt.token_ids) for prompt in prompts]]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def files_of_weights(config: GenerateConfig, *, step: int | None) -> dict[str, str]:
    """The files of the weights, with digests. step: of the run's checkpoint that was loaded, which need not be the newest: that
    may be damaged."""
    if config.run is not None:
        folder = checkpoints_of(Path(config.run).expanduser())[step]
        return {folder.name: (folder / MANIFEST).read_text(encoding="utf-8")}
    found = digest_base(config.model.path)
    if config.model.lora is not None and config.model.lora.adapter is not None:
        found |= {path.name: digest_file(path) for path in Path(config.model.lora.adapter).expanduser().glob("*.safetensors")}
    return found


def lines_of_part(config: GenerateConfig) -> tuple[dict, list[dict]]:
    """Head and answers of what a stopped command left for `output`; an empty head where there is none, or another file."""
    path = part_of(Path(config.output).expanduser())
    try:
        head, *answers = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}, []
    return (head, answers) if isinstance(head, dict) else ({}, [])


def earlier_answers(config: GenerateConfig, head: dict, answers: list[dict], same: str) -> dict[int, list[dict]]:
    """Row -> its answers, of the rows that have all of theirs, from what a stopped command left (lines_of_part); empty where it
    left nothing. Raises ConfigError where the file is that of another command."""
    path = part_of(Path(config.output).expanduser())
    if path.is_file() and head.get("of") != same:
        raise ConfigError(f"output: {shown(path)} holds answers of a stopped command with other prompts, weights or settings "
                          "(current_date is one); go on with that command, move the file away, or give another output")
    rows: dict[int, list[dict]] = {}
    for answer in answers:
        rows.setdefault(answer["row"], []).append(answer)
    return {row: found for row, found in rows.items() if len(found) == config.num_samples}


def json_line(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def read_questions(rows: list[tuple[str, dict | str]], *, takes_messages: bool) -> Iterator[tuple[str, str | list[dict]]]:
    """(place, text or messages) of each of `rows`, as read_rows gives them. Raises DataError."""
    for place, row in rows:
        if isinstance(row, str):
            raise DataError(f"{place}: {row}")
        column = next((name for name in PROMPT_NAMES if row.get(name)), None)
        if column is None:
            raise DataError(f"{place}: no prompt in its columns ({', '.join(row)}); one of {', '.join(PROMPT_NAMES)} is needed")
        if not isinstance(row[column], str) and not (takes_messages and isinstance(row[column], list)):
            allowed = "text or a list of messages" if takes_messages else "text: this run's environment renders its own prompts"
            raise DataError(f"{place}: {column} is a {type(row[column]).__name__}; it must be {allowed}")
        yield place, row[column]


def encode_row(conversation: Conversation, place: str, question: str | list[dict]) -> list[int]:
    try:
        token_ids = conversation.render(question)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
    longest = conversation.sampler.max_len - 1
    if len(token_ids) > longest:
        raise DataError(f"{place}: a prompt of {len(token_ids)} tokens; the model takes at most {longest}, and one of an answer")
    return token_ids


def answer_record(tokenizer: Tokenizer, question: str | list[dict], completion: Completion) -> dict:
    ids = completion.completion_ids
    return {"row": completion.prompt.id, "sample": completion.sample, "prompt": question,
            "answer": parse_completion(ids, tokenizer, is_policy=completion.is_policy).final,  # null without one
            "completion": tokenizer.decode(ids, keep_special=True), "finish_reason": completion.finish_reason,
            "num_tokens": len(ids)}


def run_generation(config: GenerateConfig) -> int:
    """Answers the prompt or those of a file, or chats. Returns the exit code."""
    if config.prompts is not None:
        return run_shared(config, answers_to_file)
    try:
        check_alone("grpo.generate")
        conversation = load_conversation(config)
        if config.prompt is None:
            chat(conversation)
        else:
            conversation.ask(config.prompt)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # as in `... | head`: nobody reads on, and Python's flush at exit must not complain
        flush_standard_streams()
        return FAILED
    except Exception as error:
        failure = describe_failure(error, log=None, config=config)
        if failure.reason == "failed":
            raise
        if speaks_for_node():
            print_error("error", failure.message)
        return failure.code
    return 0


if __name__ == "__main__":
    sys.exit(launch("generate", run_generation))
