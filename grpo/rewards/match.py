"""Whether the text that a completion gives as its answer matches the wanted one."""

from grpo.rewards.numbers import is_close, stated_number


def exact_match(text: str, answer: str) -> float:
    """1.0 if the text equals the answer, surrounding white space aside."""
    return float(text.strip() == answer.strip())


def numeric_match(text: str, answer: str, *, tolerance: float) -> float:
    """1.0 if the text states exactly one number, and that equals the answer within `tolerance` (relative; 0 = exactly).

    "42", "the answer is **42.0**", "1/2" or `\\frac12` for 0.5, "1,000", "4.2e1", "x = 42", "42 cm", "42%" count, as does
    one number inside `\\boxed{}` among others outside. Two different candidates are a hedge and score 0, and so do nan,
    inf, digits outside ASCII and numbers that are part of an expression (`\\sqrt{9}`, `3!`, `5\\pi`, `x_5`, "9 squared").
    Nothing is evaluated; time is linear in the length of the text.

    Raises ValueError if the answer itself is no number."""
    expected = stated_number(answer)
    if expected is None:
        raise ValueError(f"the answer {answer[:60]!r} is not a number, which a numeric match needs")
    stated = stated_number(text)
    return float(stated is not None and is_close(stated, expected, tolerance))
