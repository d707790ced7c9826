"""Whether LaTeX expressions are equal, by math-verify. For worker processes, which alone import this file and can be killed.

math-verify knows that 1/2 equals 0.5, and compares sets, intervals and equations. But it computes whatever it gets: 9^{9^{9^9}}
for ever, a simplification for seconds. So the cost of an expression is estimated before it is computed, expressions with
different values are not simplified, and CPU time is limited.
"""

import logging
import math
import re
import resource
import signal
from functools import lru_cache

import sympy
from latex2sympy2_extended import is_expr_of_only_symbols
from math_verify import LatexExtractionConfig, parse, verify

CPU_LIMIT = 0.5  # seconds for one item; of the process, so that a busy machine changes no verdict
LAST_CPU_LIMIT = 1.0  # seconds, then SIGVTALRM ends the process: inside one call into C it does not see the first limit
MEMORY_LIMIT = 4 << 30  # bytes of address space
MAX_BITS = 20_000  # of the numbers that computing an expression would make
MAX_TERMS = 500  # of a power of a sum, multiplied out
CONFIG = (LatexExtractionConfig(),)
UNBOUNDED = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
FACTORIALS = (sympy.factorial, sympy.factorial2, sympy.subfactorial, sympy.gamma)
NAME = r"\\?[A-Za-z]+(?:_(?:\w|\{\w{1,9}\})|\^\{-1\})?'{0,3}(?:\([\w,]{0,20}\))?"
NAMED = re.compile(
    r"(^|,|\\text\s?\{\s?(?:or|and)\s?\}|\bor\b|\band\b)\s*"
    rf"(?:\([A-Za-z, ]{{1,20}}\)|\\text\s?\{{[^{{}}]*\}}|{NAME}(?:\s?[+-]\s?{NAME}){{0,4}})\s*=")
PERCENT = re.compile(r"\s*\\?%\s*$")


class _OutOfTime(BaseException):
    """Not an Exception: sympy and math-verify catch those."""


def prepare() -> None:
    """Sets the limits of this process and makes it fast: the parser learns its grammar from the first expressions."""
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    signal.signal(signal.SIGPROF, _end)
    for text in (r"\frac{\sqrt{3}}{2}x^{2}+2x-1", r"\left(0, \frac{\pi}{2}\right]", r"\{1, -2\}", "x = -1", r"e^{2}|x_{1}|"):
        verify(_parse(text), _parse(rf"2 \cdot {text}"), timeout_seconds=None)


def _end(number: int, frame: object) -> None:
    raise _OutOfTime


def are_equal(item: tuple[list[str], list[str]]) -> bool:
    """Whether all texts of item[0] equal one and the same accepted answer of item[1].

    False also for texts that cannot be parsed, or if the comparison needs more than CPU_LIMIT or MEMORY_LIMIT."""
    texts, answers = item
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, LAST_CPU_LIMIT)
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT, 0.1)  # again, should code that catches everything catch it
        try:
            return any(all(_equals(text, answer) for text in texts) for answer in answers)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except (_OutOfTime, MemoryError, RecursionError):
        return False


def _equals(text: str, answer: str) -> bool:
    """If the accepted answer is no equation, each side of an equation in the text counts as an answer ("41 = 42" is two), except
    for names ("x = 42" is one)."""
    sides = [text] if "=" in answer else NAMED.sub(r"\1", text).split("=")
    wanted = _parse(answer)
    return bool(wanted) and all(_is_value(side, wanted) for side in sides)


def _is_value(side: str, wanted: list) -> bool:
    found = _parse(side)
    if not found or max(map(_num_bits, found + wanted)) > MAX_BITS or _differ(wanted[0], found[0]):
        return False
    return verify(wanted, found, timeout_seconds=None, allow_set_relation_comp=True)


@lru_cache(maxsize=4096)
def _parse(text: str) -> list:
    is_percent = PERCENT.search(text) is not None
    latex = f"${PERCENT.sub('', text)}$" + r"\%" * is_percent
    found = parse(latex, CONFIG, fallback_mode="no_fallback", parsing_timeout=None)
    return [expression for expression in found if not expression.has(sympy.nan, sympy.zoo)]


def _num_bits(node: sympy.Basic | sympy.MatrixBase) -> float:
    """An upper bound of the size of the numbers and sums in computing an expression; infinite if that may never end."""
    if isinstance(node, sympy.MatrixBase):
        return sum(map(_num_bits, node.flat()))
    if isinstance(node, UNBOUNDED):
        return math.inf
    if isinstance(node, sympy.Rational):
        return node.p.bit_length() + node.q.bit_length()
    if isinstance(node, sympy.Float):
        return 64.0 + abs(node._mpf_[2])
    bits = [_num_bits(argument) for argument in node.args]
    if isinstance(node, (sympy.Pow, sympy.MatPow)):
        base, exponent = node.args
        if isinstance(base, sympy.Add) and base.free_symbols and isinstance(exponent, sympy.Integer):
            power, num_terms = abs(int(exponent)), len(base.args)
            if power > MAX_TERMS or math.comb(power + num_terms - 1, num_terms - 1) > MAX_TERMS:
                return math.inf
        return (bits[0] + 1) * _two_to(bits[1])
    if isinstance(node, FACTORIALS):
        return bits[0] * _two_to(bits[0])
    if isinstance(node, (sympy.exp, sympy.binomial)):
        return 2 * _two_to(bits[0])
    return sum(bits) + 1


def _two_to(bits: float) -> float:
    return 2.0 ** min(bits, 64)


def _differ(expected: object, found: object) -> bool:
    """Whether two expressions have different values at one point of all variables. False: they may differ all the same."""
    if not (isinstance(expected, sympy.Expr) and isinstance(found, sympy.Expr)):
        return False
    if any(e.has(sympy.UnevaluatedExpr) or is_expr_of_only_symbols(e) for e in (expected, found)):
        return False  # per cent, which may be meant without; words
    symbols = sorted(expected.free_symbols | found.free_symbols, key=str)
    point = {symbol: sympy.Rational(17 * i + 23, 29) for i, symbol in enumerate(symbols)}
    try:
        first, second = (complex(e.subs(point).evalf(20)) for e in (expected, found))
    except (TypeError, ValueError, ArithmeticError, AttributeError):  # no numbers
        return False
    return abs(first - second) > 1e-5 * max(1.0, abs(first), abs(second))
