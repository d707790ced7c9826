"""DAPO's soft punishment of overlong completions (arXiv 2503.14476, eq. 13)."""


def soft_overlong_punishment(length: int, *, max_len: int, buffer: int) -> float:
    """What is added to the reward of a completion of `length` tokens: 0 up to max_len - buffer, then falling linearly to -1 at
    max_len. One cut off at max_len gets -1, where the paper's completions may be longer than its L_max."""
    return -min(max(length - (max_len - buffer), 0) / buffer, 1.0)
