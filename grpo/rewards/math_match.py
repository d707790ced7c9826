"""Whether expressions match an answer: simple cases are decided here from texts and numbers, others by math-verify in workers."""

import importlib.util
import os
import re

from grpo.rewards.functions import Result
from grpo.rewards.numbers import ALTERING_WORDS, boxes_of, is_close, stated_number
from grpo.rewards.workers import Workers

MAX_LEN = 300  # characters of an expression
MAX_DEPTH = 12  # of brackets in brackets: the parser's time doubles with each
MAX_CANDIDATES = 8
MAX_WORKERS = 4
ITEM_LIMIT = 60.0  # seconds until a worker is killed; its own limits of CPU time, in expressions.py, come first
CALL_LIMIT = 120.0  # seconds for all completions of a call


class MathMatch:
    """1.0 for a text whose one candidate equals an accepted answer as an expression, else 0.0.

    The candidates are the text's boxes, else its parts between dollar signs, else all of it; several different ones are a
    hedge, as for numbers. An expression that is too long, too deep, or takes too much time or memory to compute is a wrong
    answer. If its worker dies, or the call's time ends first, it is not judged: its Result has an error.

    Raises ValueError if math-verify is not installed."""

    def __init__(self, *, tolerance: float):
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("env.match=math: needs the package math-verify, which is not installed; install the extra `math` "
                             "(pip install -e '.[math]') or set env.match to numeric or exact")
        self.tolerance = tolerance
        self.workers = Workers("grpo.rewards.expressions:are_equal", setup="grpo.rewards.expressions:prepare",
                               num_workers=min(MAX_WORKERS, os.cpu_count() or 1), timeout=ITEM_LIMIT)

    def __call__(self, texts: list[str], accepted: list[list[str]]) -> list[Result]:
        """A Result for each text; `accepted` has each text's accepted answers, any of which is right."""
        verdicts = [self._judge_here(text, answers) for text, answers in zip(texts, accepted)]
        items = list(dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, tuple)))
        judged = {}
        for item, outcome in zip(items, self.workers.map(items, budget=CALL_LIMIT)):
            is_judged = outcome.error is None or outcome.is_timeout or outcome.signal == "SIGVTALRM"
            judged[item] = Result(float(outcome.value is True)) if is_judged else Result(None, outcome.error)
        return [judged[verdict] if isinstance(verdict, tuple) else Result(float(verdict)) for verdict in verdicts]

    def warm_up(self) -> None:
        """Starts the workers. Raises WorkerError if they cannot."""
        self.workers.map([(("1",), ("1",))] * self.workers.num_workers)

    def _judge_here(self, text: str, answers: list[str]) -> bool | tuple[tuple[str, ...], tuple[str, ...]]:
        """The verdict, or the item for a worker: candidates and answers."""
        candidates = _candidates(text)
        if not candidates:
            return False
        wanted = tuple(_cleaned(answer) for answer in answers)
        if any(set(candidates) == {answer} for answer in wanted):
            return True
        # 50% may be meant as 50 or 0.5, and of two equations the names count
        if "%" not in "".join((text, *wanted)) and not ("=" in text and "=" in "".join(wanted)):
            stated, numbers = stated_number(text), [stated_number(answer) for answer in answers]
            if stated is not None and any(n is not None and is_close(stated, n, self.tolerance) for n in numbers):
                return True
            if stated is not None and None not in numbers:
                return False
        known = set(_WORD.findall(" ".join(wanted).lower()))
        if any(_is_hopeless(candidate, known) for candidate in candidates):
            return False
        return tuple(candidates), wanted


def _candidates(text: str) -> list[str]:
    """The different expressions that a text gives as its answer, none if a box is not closed or there are too many."""
    boxes = boxes_of(text)
    parts = [text] if boxes == [] else boxes or []
    if not boxes:
        marked = [part for match in _DOLLARS.finditer(text) for part in match.groups() if part]
        if not any(_BARE_WORD.search(_TEXT.sub("", part)) for part in marked):  # "$41 or $42" are prices
            parts = marked or parts
    found: dict[str, None] = {}
    for part in parts:
        inner = boxes_of(part)
        found |= dict.fromkeys(_candidates(part) if inner else [] if inner is None else [_cleaned(part)])
    return list(found) if len(found) <= MAX_CANDIDATES and "" not in found else []


_DOLLARS = re.compile(r"\$\$?([^$]{1,400})\$\$?|\\\(([^$]{1,400}?)\\\)|\\\[([^$]{1,400}?)\\\]")
_TEXT = re.compile(r"\\[a-z]{4,6}\s?\{[^{}]*\}")
_BARE_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}")
_HOSTILE = re.compile(
    r"\\(?:sum|prod|i*nt|oint|lim|limsup|liminf|bigcup|bigcap)(?![A-Za-z])"
    r"|\d{65}|(?<![\d_])(?<!frac)(?<!frac )\d+ \d"
    r"|\d_"  # to a base, which math-verify passes over
)
_FUNCTION_WORDS = "sqrt|pi|sin|cos|tan|cot|sec|csc|log|ln|exp|infty"
_CLEANING = [
    (re.compile(pattern), replacement) for pattern, replacement in (
        (r"\\[()\[\]]|(?<!\\)\$|\*\*(?=\s|$)|^\*\*|`", ""),
        (r"(?<=\d)(?:,?\\!\s?|\\[,:; ]|\{,\}|~|[\u00a0\u2009\u202f])(?=\d{3}(?:\D|$))|\\!", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle|textstyle)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,:; ]|\\q?quad(?![A-Za-z])|~|\s", " "),
        (r"(?<=\d)_\{(\w{1,2})\}", r"_\1"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (rf"(?<![\\A-Za-z])({_FUNCTION_WORDS})(?![A-Za-z])", r"\\\1"),
        (r"\\?√\s?(?:\(([^()]{1,40})\)|(\w+))|\\sqrt\s?\(([^()]{1,40})\)", r"\\sqrt{\1\2\3}"),
        (r"\*\*\s?(?:\(([^()]{1,40})\)|(-?\w{1,40}))", r"^{\1\2}"),
        (r" {2,}", " "),
        (r"^ |[ .]{1,9}$", ""))]
_BRACKET = re.compile(r"[(\[]|\\\{")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CHARACTERS = str.maketrans({
    "\u2212": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
    "∪": r"\cup ", "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}", "°": r"^{\circ}"})


def _cleaned(text: str) -> str:
    """One spelling for what LaTeX and plain text spell in several."""
    if len(text) > 2 * MAX_LEN:
        return text[: 2 * MAX_LEN]  # more than _is_hopeless lets through
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return text if _BRACKET.search(text) else _THOUSANDS.sub("", text)  # (1,200) is a pair


def _is_hopeless(text: str, known_words: set[str]) -> bool:
    """Whether an expression is too costly to parse or says in words that it is another ("42 million", "not 42")."""
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(depth, deepest)
    words = set(_WORD.findall(text.lower())) - known_words
    return len(text) > MAX_LEN or deepest > MAX_DEPTH or bool(_HOSTILE.search(text) or words & ALTERING_WORDS)
