"""What tasks share whose answer is code that runs in the sandbox: the code block, and why an answer earns nothing."""

import re
from collections.abc import Collection

from grpo.sandbox.calls import VIOLATIONS, Outcome

BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)\n?```", re.DOTALL)
MOST_CODE = 20_000  # characters


class RefusedAnswer(Exception):
    """Why a function earns nothing; `violation` is the kind, or None for an honest failure."""

    def __init__(self, reason: str, violation: str | None = None):
        super().__init__(reason)
        self.violation = violation


def code_of(text: str) -> str:
    """The code block of an answer. Raises RefusedAnswer if it has none, several, or one that is too long."""
    blocks = BLOCK.findall(text)
    if len(blocks) != 1:
        raise RefusedAnswer(f"{len(blocks)} code blocks; one was asked for")
    if len(blocks[0]) > MOST_CODE:
        raise RefusedAnswer(f"a code of {len(blocks[0])} characters; the limit is {MOST_CODE}")
    return blocks[0]


def refuse_violation(outcome: Outcome, kind: str | None) -> None:
    """Raises RefusedAnswer for a violation of this kind, a key of VIOLATIONS; None is none."""
    if kind is not None:
        detail = f" ({outcome.detail})" if outcome.detail else ""
        raise RefusedAnswer(f"violation: {VIOLATIONS[kind]}{detail}", kind)


def violation_metrics(kinds: Collection[str | None]) -> dict[str, float]:
    """1 for each of these kinds of violation, 0 for all others."""
    return {f"sandbox/violations/{kind}": float(kind in kinds) for kind in VIOLATIONS}
