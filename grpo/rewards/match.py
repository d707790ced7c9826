"""Answers in completions: which text is the answer, and whether it matches the wanted one."""

from __future__ import annotations

import re
from fractions import Fraction

from models.chat.parse import Parsed

MAX_NUMBER_LEN = 64  # characters; longer "numbers" in model output are never parsed
MAX_EXPONENT = 300
MAX_SPELLINGS = 32  # of one number in one text


def is_well_formed(parsed: Parsed) -> bool:
    """Whether a completion is a finished answer in the right form; `parsed.fault` says what it lacks."""
    return parsed.fault is None


def stated_answer(parsed: Parsed) -> str | None:
    """The text to match, `parsed.final`; None for a completion that is no finished answer in the right form: one that was
    cut off (42 may have been about to become 421), has no final message or several (a second guess), speaks for others."""
    return parsed.final if is_well_formed(parsed) else None


# --- matching -------------------------------------------------------------------------------------------------------


def exact_match(text: str, answer: str) -> float:
    """1.0 if the text equals the answer, surrounding white space aside."""
    return float(text.strip() == answer.strip())


def numeric_match(text: str, answer: str, *, tolerance: float) -> float:
    """1.0 if the text states exactly one number, and that equals the answer within `tolerance` (relative; 0 = exactly).

    "42", "the answer is **42.0**", "1/2" for 0.5, "1,000", "4.2e1" count, as does one number inside `\\boxed{}` among
    others outside. Two different candidates are a hedge and score 0, and so do nan, inf, digits outside ASCII and numbers
    glued to letters. Nothing is evaluated; time is linear in the length of the text.

    Raises ValueError if the answer itself is no number."""
    expected = parse_number(answer)
    if expected is None:
        raise ValueError(f"the answer {answer[:60]!r} is not a number, which a numeric match needs")
    stated = _stated_number(text)
    if stated is None:
        return 0.0
    return float(abs(stated - expected) <= Fraction(tolerance) * abs(expected))


_NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(\.\d*)?(?:[eE]([+-]?\d{1,4}))?(?:/(\d+))?", re.ASCII)
_WORD = re.compile(r"[\w.,/+\-]+", re.ASCII)
_DIGIT = re.compile(r"\d", re.ASCII)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_FRAC = re.compile(r"\\[dt]?frac\s*\{(\d{1,32})\}\s*\{(\d{1,32})\}", re.ASCII)


def parse_number(text: str) -> Fraction | None:
    """The exact value of a whole text that is one decimal number or fraction, else None."""
    text = text.strip().replace("\u2212", "-")
    if len(text) > MAX_NUMBER_LEN:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, decimals, exponent, denominator = match.groups()
    power = int(exponent or 0)
    if abs(power) > MAX_EXPONENT or (denominator is not None and int(denominator) == 0):
        return None
    value = Fraction((whole.replace(",", "") or "0") + (decimals or "")) * Fraction(10) ** power
    return (-value if sign == "-" else value) / int(denominator or 1)


def _stated_number(text: str) -> Fraction | None:
    """The one number that a text states, or None if there is none, more than one, or something like a number."""
    if not text.isascii() and any(char.isnumeric() and not char.isascii() for char in text):
        return None
    text = _FRAC.sub(r"\1/\2", text.replace("\u2212", "-"))
    num_boxes = text.count("\\boxed")
    if num_boxes:
        boxes = _BOXED.findall(text)
        if len(boxes) != num_boxes:
            return None
        text = " ".join(boxes)
    words, values = set(), set()
    for match in _WORD.finditer(text):
        word = match.group().rstrip(".,")  # of the sentence
        if word in words or _DIGIT.search(word) is None:
            continue
        words.add(word)
        values.add(parse_number(word))
        if len(values) > 1 or None in values or len(words) > MAX_SPELLINGS:
            return None
    return values.pop() if values else None
