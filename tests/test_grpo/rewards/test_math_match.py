"""Expressions against accepted answers, by math-verify in workers; right and wrong by hand."""

import importlib.util
import threading

import pytest

from grpo.rewards.functions import Result
from grpo.rewards.math_match import MathMatch
from grpo.rewards.workers import WorkerOutcome, Workers

pytest.importorskip("math_verify", reason="the extra `math` is not installed")


@pytest.fixture(scope="module")
def match():
    match = MathMatch(tolerance=0.0)
    yield match
    match.workers.close()


def values(match, pairs):
    return [result.value for result in match([text for text, _ in pairs], [[answer] for _, answer in pairs])]


RIGHT = [  # text, answer
    (r"\boxed{\sqrt{9}}", "3"),
    ("3!", "6"),
    ("2^3", "8"),
    ("|-5|", "5"),
    ("-(-5)", "5"),
    (r"\binom{5}{2}", "10"),
    (r"5 \times 2", "10"),
    (r"\boxed{\frac12}", "0.5"),
    (r"\boxed{42 \text{ cm}}", "42"),
    (r"\boxed{1{,}000}", "1000"),
    (r"1{,}000\sqrt{2}", r"1000\sqrt2"),
    ("11111", r"11,\! 111"),
    (r"50\%", r"\frac{1}{2}"),
    (r"\boxed{\pi/2}", r"\frac{\pi}{2}"),
    ("2π", r"2\pi"),
    ("2*pi", r"2\pi"),
    ("2**10", "1024"),
    ("**42**", "42"),
    ("x = 5 or x = -5", "5, -5"),
    ("(x, y) = (2, 3)", "(2,3)"),
    ("sqrt(2)/2", r"\frac{1}{\sqrt{2}}"),
    ("√2", r"\sqrt{2}"),
    (r"5\sqrt2", r"\sqrt{50}"),
    (r"3\frac12", "7/2"),
    ("1.41421356", r"\sqrt{2}"),
    ("x²+1", "1 + x^2"),
    ("(x-1)(x+1)", "x^2-1"),
    (r"\sin^2 x + \cos^2 x", "1"),
    (r"x+\frac 1 2", "x+1/2"),
    ("The answer is $x+1$.", "1+x"),
    (r"So \(x+1\).", "1+x"),
    (r"\boxed{A = \pi r^2}", r"\pi r^2"),
    (r"\boxed{m+n = 42}", "42"),
    (r"\frac{84}{2} = 41 + 1", "42"),
    ("y = 3+2x", "y=2x+3"),
    ("3+2x", "y=2x+3"),
    ("4x+6y=10", "2x+3y=5"),
    ("5", "x=5"),
    ("2, 1", "1,2"),
    (r"x=2 \text{ or } x=3", "2,3"),
    (r"\left(1, 2\right)", "(1,2)"),
    ("(1, 200)", "(1,200)"),
    (r"x \le 3", r"(-\infty,3]"),
    (r"\text{B}", "B"),
    (r"\text{east}", "east"),
    ("i+1", "1+i"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\boxed{\frac12} or \boxed{0.5}", "1/2"),
    (r"\int_0^1 f", r"\int_0^1 f"),
    (r"\begin{pmatrix} 1/2 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} \frac{1}{2} \\ \frac{2}{3} \end{pmatrix}"),
    (r"\log_2 8", "3"),
    (r"f^{-1}(x) = \frac{x+2}{7}", r"\frac{x + 2}{7}"),
    (r"\varnothing", r"\emptyset"),
    (r"2516_{8}", "2516_8"),
]
WRONG = [
    (r"\sqrt{9}", "9"),
    ("3!", "3"),
    ("5π", "5"),
    (r"e^5", "5"),
    ("x_{5}", "5"),
    ("5x", "5"),
    (r"\log 5", "5"),
    ("5/0", "5"),
    ("42x", "42"),
    ("2x = 42", "42"),
    ("x > 42", "42"),
    (r"x \neq 42", "42"),
    (r"\pm 42", "42"),
    ("3.14", r"\pi"),
    ("1/3", "0.3333"),
    ("x+2", "x+1"),
    ("y", "x"),
    ("y = 42", "x = 42"),
    ("(1,2)", "[1,2]"),
    ("(2,1)", "(1,2)"),
    (r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"42 \text{ million}", "42"),
    (r"\text{not } 42", "42"),
    ("", "42"),
    (r"\boxed{42", "42"),
    ("nan", "42"),
    (r"\infty", "42"),
    ("forty-two", "42"),
    ("2516_9", "2516_8"),
    ("2516_8", "2516"),
]
HEDGES = [
    ("41, 42", "42"),
    ("42 41", "42"),
    ("4 2", "6"),
    ("42 41", "83"),
    (r"41 \quad 42", "83"),
    ("x=41, x=42", "42"),
    ("x = 41 = 42", "42"),
    ("41 = 42", "42"),
    (r"41 \approx 42", "42"),
    (r"41 \text{ or } 42", "42"),
    (r"\{41, 42\}", "42"),
    (r"41 \Rightarrow 42", "42"),
    (r"\boxed{41}\boxed{42}", "42"),
    (r"\boxed{x+1} \boxed{x+2}", "x+1"),
    (r"\boxed{\boxed{x+1} \boxed{x+2}}", "x+1"),
    ("$x+2$ or $x+1$", "x+1"),
    ("It costs $42 or $41", "42"),
    ("$41 and $42", "42"),
    ("1, 2, 3", "1, 2"),
    (r"42, \pi", "42"),
    (r"x = 42 \text{ or } y", "42"),
]
HOSTILE = [
    "9^{9^{9^9}}",
    "9^{9^9}",
    "((9^{999})^{999})^{999}",
    r"2^{2^{2^{2^{2^{2}}}}}",
    r"10^{-10^{10}}",
    r"\sin(10^{10^{10}})",
    r"\lfloor 10^{10^8} \rfloor",
    r"e^{e^{e^{e^{79}}}}",
    "(10^9)!",
    "((9!)!)!",
    r"\binom{10^9}{5}",
    r"\binom{10^9}{5 \cdot 10^8}",
    r"\sum_{1}^{10^9}",
    r"\sum_{i=1}^{10^9} i",
    r"\prod_{i=1}^{10^7} i",
    r"\int_0^1 e^{x^{x^x}} dx",
    r"\lim_{x \to 0} \frac{\sin x}{x}",
    "(x+1)^{10000}",
    "(a+b+c+d)^{60}",
    "(" * 400 + "1" + ")" * 400,
    r"\sin(" * 20 + "1" + ")" * 20,
    r"\frac{1}{1+" * 20 + "1" + "}" * 20,
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{10000000}",
    "9" * 100_000,
    "1+" * 50_000 + "1",
    "$" * 100_000,
    r"\(" * 50_000,
    r"\text{" * 20_000,
]


@pytest.mark.parametrize(("pairs", "value"), [(RIGHT, 1.0), (WRONG, 0.0), (HEDGES, 0.0)])
def test_expressions_are_judged_by_what_they_are_and_hedges_are_wrong(match, pairs, value):
    assert [pair for pair, found in zip(pairs, values(match, pairs)) if found != value] == []


def test_hostile_expressions_are_wrong_answers_and_cost_no_worker(match):
    pairs = [(rf"\boxed{{{text}}}", answer) for text in HOSTILE for answer in ("42", "x+1")]
    match.warm_up()
    before = [worker.process.pid for worker in match.workers._workers]
    assert values(match, pairs) == [0.0] * len(pairs)
    assert [worker.process.pid for worker in match.workers._workers] == before


def test_any_accepted_answer_is_right_but_not_one_for_each_box(match):
    accepted = [[r"\sqrt{2}", "x+1"]] * 4
    texts = ["1+x", r"2^{1/2}", r"\boxed{1+x} \boxed{2^{1/2}}", "x+2"]
    assert [result.value for result in match(texts, accepted)] == [1.0, 1.0, 0.0, 0.0]


def test_equal_texts_and_plain_numbers_need_no_worker():
    match = MathMatch(tolerance=0.01)
    pairs = [("42", "42"), ("42.1", "42"), ("43", "42"), (r"\boxed{\frac12}", "0.5"), (r"$x+1$", r"\(x+1\)"), ("", "1")]
    assert values(match, pairs) == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert match.workers._workers == []


def test_expressions_are_judged_off_the_main_thread_too():
    match, found = MathMatch(tolerance=0.0), []

    def judge():
        found.extend(values(match, [("1+x", "x+1"), ("1+x", "x+2")]))
        match.workers.close()

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert found == [1.0, 0.0]


def judge_with(tmp_path, equals):
    """The outcome of an item whose comparison is replaced by the statements `equals`."""
    (tmp_path / "stuck.py").write_text(
        f"from grpo.rewards import expressions\n\ndef equals(text, answer):\n{equals}\n"
        "def judge(item):\n    expressions._equals = equals\n    return expressions.are_equal(item)\n"
    )
    workers = Workers(
        f"{tmp_path}/stuck.py:judge", num_workers=1, timeout=1000.0, setup="grpo.rewards.expressions:prepare"
    )
    [outcome] = workers.map([(("1",), ("1",))])
    workers.close()
    return outcome


def test_an_expression_that_takes_too_long_is_false_by_the_workers_own_limit(tmp_path):
    patient = "    while True:\n        try:\n            sum(range(1000))\n        except Exception:\n            pass\n"
    assert judge_with(tmp_path, patient) == WorkerOutcome(False)


def test_one_long_operation_ends_the_worker_by_cpu_time(tmp_path):
    assert judge_with(tmp_path, "    return sum(range(10 ** 12))\n").signal == "SIGVTALRM"


def test_an_expression_that_takes_too_much_memory_is_false(tmp_path):
    assert judge_with(tmp_path, "    return bytearray(1 << 40)\n") == WorkerOutcome(False)


class ScriptedWorkers:
    def __init__(self, outcomes):
        self.outcomes = outcomes

    def map(self, items, *, budget):
        assert len(items) == len(self.outcomes)
        return self.outcomes


def test_time_is_the_expressions_fault_but_a_dead_worker_is_not():
    match = MathMatch(tolerance=0.0)
    died = WorkerOutcome(error="its worker died with signal SIGKILL")
    late = WorkerOutcome(error="not finished within the 120 s of the whole call")
    over = [WorkerOutcome(error="ran over", is_timeout=True), WorkerOutcome(error="died", signal="SIGVTALRM")]
    match.workers = ScriptedWorkers([WorkerOutcome(True), *over, died, late])
    results = match(["x+1", "x+2", "x+3", "x+4", "x+5", "x+1"], [["y"]] * 6)
    assert [result.value for result in results] == [1.0, 0.0, 0.0, None, None, 1.0]
    assert results[3:5] == [Result(None, died.error), Result(None, late.error)]


def test_without_math_verify_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"env.match=math: needs the package math-verify.*'\.\[math\]'"):
        MathMatch(tolerance=0.0)
