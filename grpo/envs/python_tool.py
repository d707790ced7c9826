"""The tool `python` as gpt-oss knows it: the message's text is code, the result is what it prints. The code runs in the sandbox.

Each call has a process of its own. With state, the process first runs the code of the earlier calls again, so that their names
are there; what they drew from a clock or from unseeded random numbers may differ then.
"""

from grpo.sandbox.calls import MOST_PRINTED, VIOLATIONS
from grpo.sandbox.pool import Sandbox

RUNNER = """
import ast, sys, traceback

def run(cells):
    printed, names = sys.stdout, {"__name__": "__main__"}
    for cell in cells:
        sys.stdout = sys.stderr = printed
        printed.seek(0)
        printed.truncate()
        try:
            body = compile(cell, "<code>", "exec", ast.PyCF_ONLY_AST).body
            shown = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), "<code>", "exec"), names)
            if shown is not None and (value := eval(compile(shown, "<code>", "eval"), names)) is not None:
                print(repr(value))
        except BaseException as error:
            sys.stdout = sys.stderr = printed
            traceback.print_exception(error.with_traceback(error.__traceback__.tb_next), file=printed)
"""


class PythonTool:
    """The episode of an environment with the tool.

    seconds: wall time for a call, with what runs again before it
    keeps_state: whether a call sees the names of the earlier ones"""

    def __init__(self, sandbox: Sandbox, *, seconds: float, keeps_state: bool):
        self.sandbox, self.seconds, self.keeps_state = sandbox, seconds, keeps_state
        self.earlier: list[str] = []
        self.violations: list[str] = []

    def python(self, code: str) -> str:
        """Runs Python code. Returns what it prints, and the value of its last expression."""
        outcome = self.sandbox.call(RUNNER, "run", [[[*self.earlier, code]]], seconds=self.seconds)
        lines = [outcome.printed.rstrip("\n")] if outcome.printed.strip() else []
        if len(outcome.printed) >= MOST_PRINTED:
            lines.append(f"(cut off after {MOST_PRINTED} characters)")
        if outcome.violation is not None:
            self.violations.append(outcome.violation)
            lines.append(f"error: {VIOLATIONS[outcome.violation]}")
        elif outcome.error is not None:
            lines.append(f"error: {outcome.error}")
        elif self.keeps_state:
            self.earlier.append(code)
        return "\n".join(lines) or "(no output)"

    def get_reward(self) -> list[str]:
        """The kinds of violations of all calls (keys of VIOLATIONS), for the environment to judge."""
        return self.violations
