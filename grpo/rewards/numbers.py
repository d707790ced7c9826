"""Plain numbers in a text, in the spellings of prose, Markdown and LaTeX.

A number is taken only where it stands for itself: next to an operator, a function, a variable or an index it is a part of
an expression, whose value is another. Nothing is evaluated, and time is linear in the length of the text.
"""

import re
from fractions import Fraction

MAX_NUMBER_LEN = 64  # characters; longer "numbers" in model output are never parsed
MAX_EXPONENT = 300
MAX_SPELLINGS = 32  # of one number in one text
MAX_BOXES = 64


def is_close(stated: Fraction, expected: Fraction, tolerance: float) -> bool:
    """Whether they differ by at most `tolerance` times the expected one."""
    return abs(stated - expected) <= Fraction(tolerance) * abs(expected)


def boxes_of(text: str) -> list[str] | None:
    """The contents of a text's outermost `\\boxed{}`s; None if one is not closed, or for more than MAX_BOXES."""
    boxes, end = [], 0
    for match in _BOX.finditer(text):
        if match.start() < end:  # inside the box before it
            continue
        depth, end = 1, match.end()
        if match.group(1) is None or len(boxes) == MAX_BOXES:
            return None
        for brace in _BRACE.finditer(text, end):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                break
        if depth:
            return None
        boxes.append(text[end : brace.start()])
        end = brace.end()
    return boxes


def stated_number(text: str) -> Fraction | None:
    """The one number that a text states, or None if there is none, more than one, or something like a number."""
    boxes = boxes_of(text)
    if boxes is None:
        return None
    values: set[Fraction | None] = set()
    for part in boxes or [text]:
        if "\\boxed" in part or "\\fbox" in part:  # a box in a box
            values.add(stated_number(part) if part.count("\\") < MAX_BOXES else None)
        else:
            values |= _numbers(plain_text(part))
        if len(values) > 1 or None in values:
            return None
    return values.pop() if values else None


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


_NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(\.\d*)?(?:[eE]([+-]?\d{1,4}))?(?:/(\d+))?", re.ASCII)
_GLUED = re.compile(r"[\w.,/+\-]+", re.ASCII)  # what stands together with a number: all of it has to be the number
_DIGIT = re.compile(r"\d", re.ASCII)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]{0,9}(\{)?")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character


# --- spellings ------------------------------------------------------------------------------------------------------

_FRAC_PART = r"\s?(?:\{\s?([+-]?[\d,]{1,40}(?:\.\d{1,40})?)\s?\}|(\d))"
_UNITS = "cm mm km kg mg ml mL ft yd lb oz hr Hz kW mi nm GB MB kB ms"
_SPELLINGS: list[tuple[re.Pattern, object]] = [
    (re.compile(pattern, re.ASCII), replacement) for pattern, replacement in (
        ("\u2212", "-"),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|bf|rm|[lL]arge|huge)(?![A-Za-z])", ""),
        (r"\\(?:angle|measuredangle|triangle)(?![A-Za-z])", ""),
        (r"\\(?:text)?color\s?\{\w{0,20}\}", ""),
        (r"(?<=\d)(?:,?\\!\s?|\\[,:; ]|\{,\}|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ","),
        (r"\{,\}", ","),
        (r"\\!\s?", ""),
        (r"(?<=\})\s?\\cdot\s?(?=\\(?:text|mathrm)\s?\{)", " "),
        (r"\\[,:; ]|\\q?quad(?![A-Za-z])|~|[\u00a0\u2009\u202f]", " "),
        (r"\\([$%#])", r"\1"),
        (r"</?[A-Za-z]{2,20}>", " "),
        (r"(?<=\*)(?:[$€£¥]|\\[(\[])\s?(?=[-+.\d])", ""),  # **$5**
        (r"\\[()\[\]]|\$", " "),
        (r"\\(?:to|(?:long)?rightarrow|Rightarrow|implies|therefore)(?![A-Za-z])|[-=]{1,2}>|[→⇒∴]", " : "),
        (r"\\approx(?![A-Za-z])|≈|:=|\\equiv(?![A-Za-z])", "="),
        (r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|sf|it|tt|normal)|boldsymbol|bm|mbox|emph|underline)\s?"
         r"\{((?:[^{}]|\{[^{}]*\})*)\}", lambda match: f" {_LONE_LETTER.sub('unit', _UNIT_POWER.sub('', match[1]))} "),
        (r"(?<![\w.,/])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\w/]|[.,]\d)", r"\1\\frac{\2}{\3}"),
        (rf"([+-]\s?)?(?:(?<![\w.,])(\d{{1,32}})\s?)?\\[dtc]?frac(?![A-Za-z]){_FRAC_PART}{_FRAC_PART}",
         lambda match: _fraction(match)),
        (r"(?:\^\s?(?:\{\s?\\circ\s?\}|\\circ)|°|\\degree(?![A-Za-z]))(?:\s?[CF](?![A-Za-z]))?", " unit "),
        (r"[%€£¥]", " unit "),
        (rf"(?<=\d)(?=(?:{_UNITS.replace(' ', '|')})(?![A-Za-z]))", " "),
        (r"(?<=\d)\s/\s(?=\d)", "/"),
        (r"(?<=\d)\s?(?:\\times|\\cdot|×|\*)\s?10\s?\^\s?(?:\{\s?([+-]?\d{1,3})\s?\}|([+-]?\d))", r"e\1\2"),
        (r"(?<![\w)\]*])(\*{1,3})(?=[^\s*])([^*\n]*)\1(?![\w(*])", r" \2 "),  # Markdown
        (r"(^|=)\s{0,9}([+-])\s{0,9}(?=[.\d])", r"\1 \2"),
        (r"(?<![\d.,/])(\d[\d.,/]*\s{1,9}[A-Za-z]{2,}(?:[\s/.]{1,9}[A-Za-z]+){0,4})"
         r"\s{0,9}(?:\^\s?(?:\{\s?-?[1-3]\s?\}|-?[1-3](?!\d))|[²³])", r"\1"))]
_LONE_LETTER = re.compile(r"(?<![A-Za-z\\])(?![iek])[A-Za-z](?![A-Za-z])")  # an upright m is metres; e, i, k (1000) are not
_UNIT_POWER = re.compile(r"(?<=[A-DF-Za-df-hj-z])\^(?:\{-?[1-9]\}|-?[1-9])")


def plain_text(text: str) -> str:
    """The text without LaTeX's and Markdown's ways to write plain numbers, units and words."""
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def _fraction(match: re.Match) -> str:
    sign, whole, *parts = match.groups()
    numerator, denominator = (braced or digit for braced, digit in (parts[:2], parts[2:]))
    if whole is not None:
        is_mixed = numerator.isdigit() and denominator.isdigit() and int(numerator) < int(denominator)
        if not is_mixed:
            return match[0]
        numerator = str(int(whole) * int(denominator) + int(numerator))
    is_negative = [part[0] == "-" for part in (sign or "+", numerator, denominator)].count(True) % 2
    return f" {'-' if is_negative else ''}{numerator.lstrip('+-')}/{denominator.lstrip('+-').replace(',', '')} "


# --- what a number stands beside ------------------------------------------------------------------------------------

# Words that make another number of the one beside them.
_FUNCTIONS = "sqrt root cbrt log ln lg exp sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh abs floor ceil mod pi"
_BEFORE = frozenset((
    f"{_FUNCTIONS} logarithm base sine cosine tangent square cube factorial plus minus negative times over half third "
    "quarter twice double triple thrice sum product multiple multiples divided multiplied divisible raised power choose "
    "reciprocal inverse opposite not never cannot than least most under above below except").split())
_AFTER = frozenset((
    f"{_FUNCTIONS} squared cubed factorial plus minus times over mod modulo choose hundred thousand million billion "
    "trillion lakh crore dozen score hundreds thousands millions billions halves thirds quarters fourths fifths sixths "
    "sevenths eighths ninths tenths hundredths thousandths to divided multiplied raised").split())
ALTERING_WORDS = (_BEFORE | _AFTER) - frozenset(_FUNCTIONS.split())
# words and units; others of two letters are products of variables
_SHORT_WORDS = frozenset(f"I is as by in so at on of if we it or an no he do us be up my me {_UNITS}".split())
_NAME = r"\\?[A-Za-z]+(?:_(?:\w|\{\w{1,9}\}))?'{0,3}(?:\([\w,= ]{0,20}\))?"
_LEFT_SIDE = re.compile(rf"(?<![\w\\}}')])({_NAME}(?:(?:\s[+-]\s|[+-]){_NAME}){{0,4}})\s{{0,9}}(?==)", re.ASCII)
_RIGHT_SIDE = re.compile(rf"=\s{{0,9}}(?:{_NAME}\s*(?:$|[.,;:?\n])|[+-]?[.\d])", re.ASCII)
_LAST_WORD = re.compile(r"(\\?)([^\W\d_]+(?:['\u2019][a-z]{1,2})?)(?:\s{1,9}(?:of|the|a|an|by|to|be)){0,3}\s*$")
_UNIT_WORDS = re.compile(r"(?:a\s(?=[A-Za-z]{3}))?([^\W\d_]+)(?:[\s/.\-]{1,9}[^\W\d_]+)*")
_REMARK = re.compile(r"[(\[]\s?[^\W\d_]{2,}[^()\[\]+*^=\\]*[)\]]")
_NO_WORD = re.compile("[\u0370-\u03ff\u2100-\u214f\U0001d400-\U0001d7ff]")  # Greek and mathematical letters
_SYMBOL = r"[-+]?(?:\\[A-Za-z]+|[A-Za-z])\s{0,9}"  # a value without digits, as an item of a list
_SYMBOL_BEFORE = re.compile(rf"(?:^|[(\[{{,;])\s{{0,9}}{_SYMBOL}[,;]\s{{0,9}}$")
_SYMBOL_AFTER = re.compile(rf"\s{{0,9}}(?:[,;]|or\s|and\s)\s{{0,9}}{_SYMBOL}(?:$|[,;.)\]}}\n])")
_BOUND = re.compile(r"(?:[A-Za-z]+ )?(?:(?:or|and) (?:more|less|fewer|above|below|up)|at (?:least|most))(?![A-Za-z])")
_INDEX = re.compile(r"[_^]\s?\{[^{}]*$")
_OPENING = " \t\r\"'`\u201c\u201d#([{"
_OPEN_BRACKET = re.compile(r"[(\[]([^()\[\]\n]*)$")
_CLOSED_BRACKET = re.compile(r"([^()\[\]\n]*)[)\]]")
_WORD = re.compile(r"[^\W\d_]+")
WINDOW = 200  # characters looked at on each side of a number


def _numbers(text: str) -> set[Fraction | None]:
    """The values of all numbers in a plain text, None among them if something is like a number but is none."""
    if not text.isascii() and any(char.isnumeric() and not char.isascii() for char in text):
        return {None}
    text = _LEFT_SIDE.sub(_without_name, text)
    spellings, values = set(), set()
    for match in _GLUED.finditer(text):
        word = match.group().rstrip(".,")  # of the sentence; dots that stand for further digits stay
        word += match.group()[len(word) :] if ".." in match.group()[len(word) :] else ""
        if _DIGIT.search(word) is None:
            continue
        before, after = text[max(0, match.start() - WINDOW) : match.start()], text[match.start() + len(word) :][:WINDOW]
        spellings.add(word)
        is_free = _is_free_before(before) and _is_free_after(after) and _is_alone_in_brackets(before, after)
        values.add(parse_number(word) if is_free else None)
        if len(values) > 1 or None in values or len(spellings) > MAX_SPELLINGS:
            return {None}
    return values


def _without_name(match: re.Match) -> str:
    words = re.findall(r"[A-Za-z]+", match[1])
    return match[0] if any(word.lower() in _BEFORE for word in words) else " "


def _is_free_before(before: str) -> bool:
    """Whether what stands before a number, or before the equals sign of which it is a side, lets it stand for itself."""
    if _INDEX.search(before) or _SYMBOL_BEFORE.search(before):
        return False
    outside = before.rstrip(_OPENING)
    opened = before[len(outside) :]
    if opened[:1] in tuple("([{") and outside and not outside[-1].isspace() and outside[-1] not in "=:,.;":
        return False  # an argument, an index, a factor
    line = outside.rpartition("\n")[2]
    if not line.strip() or line.strip() == "*" or line[-1] in ".,;:?!。，：；、—":
        return True
    if line[-1] == "=":
        side = line[:-1].rstrip()
        return side[-1:].isdigit() or (side[-1:] != "!" and _is_free_before(side))
    word = _LAST_WORD.search(line)
    return word is not None and not word[1] and _is_word(word[2], _BEFORE)


def _is_free_after(after: str) -> bool:
    inside = after.lstrip("\"'`\u201d*)]}")
    if len(inside) < len(after) and inside[:1] and (inside[0].isalnum() or inside[0] in "(^_!\\"):
        return False  # (5)x, {5}!
    rest = inside.lstrip(" \t\r\"'`)]}")
    if _SYMBOL_AFTER.match(rest) or _BOUND.match(rest):
        return False
    if not rest or rest[0] in ".,;:?\n。，：；、—":
        return True
    if rest[0] == "=":
        return _RIGHT_SIDE.match(rest) is not None
    if rest[0] in "([":
        return rest != inside and _REMARK.match(rest) is not None
    words = _UNIT_WORDS.match(rest)
    if words is None or not _is_word(words[1], _AFTER):
        return False
    return rest[words.end() :].lstrip()[:1] not in tuple("+*^_\\|<>!/×·÷√")


def _is_alone_in_brackets(before: str, after: str) -> bool:
    """Whether the bracket around a number, if there is one, holds words beside it and not other values, as (5, x) does."""
    head = _OPEN_BRACKET.search(before)
    tail = _CLOSED_BRACKET.match(after)
    if head is None or tail is None:
        return True
    beside = f"{head[1]} {tail[1]}"
    words = [word for word in _WORD.findall(beside) if _is_word(word, frozenset())]
    return "=" in beside or bool(words) or not beside.strip(" \"'`$")


def _is_word(word: str, excluded: frozenset[str]) -> bool:
    if _NO_WORD.search(word):
        return False
    if not word.isascii():
        return not word.endswith("n\u2019t")
    is_known = word in _SHORT_WORDS or word[0].lower() + word[1:] in _SHORT_WORDS  # at the start of a sentence
    return word.lower() not in excluded and not word.endswith("n't") and (len(word) > 2 or is_known)
