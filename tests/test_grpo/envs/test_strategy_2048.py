"""Strategies for 2048: the code sees boards as values, and earns by what the games of this process came to."""

import re
import sys
from pathlib import Path

import pytest
from audit import GARBAGE, answered, block
from paths import ROOT

from grpo.configuration.launch import load_config
from grpo.environment import checked_scores, make_environment
from grpo.envs.code_answers import RefusedAnswer
from grpo.envs.game_2048 import DIRECTIONS, Game2048
from grpo.envs.strategy_2048 import VARIANTS, Strategy2048, Variant
from grpo.sandbox.calls import VIOLATIONS, Outcome, SandboxError

sys.path.insert(0, str(Path(__file__).parent))
import strategy_answers as answers  # noqa: E402

pytestmark = pytest.mark.slow

SETTINGS = load_config("train", ["+experiment=strategy_2048_20b", f"model.path={ROOT / 'tests/fixtures/tiny_bf16'}"]).env
PLAIN = Variant(3, "rows", 0, DIRECTIONS)


@pytest.fixture(scope="module")
def env(sandbox):
    return make_environment(SETTINGS, Strategy2048.build_tokenizer(), seed=0, total_steps=1, sandbox=sandbox)


def score(env, variant, text, *, sample=0):
    prompt = env.prompt(0, {"question": variant.question(), "variant": VARIANTS.index(variant)})
    return checked_scores(env, [answered(env, prompt, text, sample=sample)])[0]


def violations(verdict) -> dict[str, float]:
    found = {kind: verdict.metrics[f"sandbox/violations/{kind}"] for kind in VIOLATIONS}
    return {kind: value for kind, value in found.items() if value}


class Scripted:
    """A sandbox whose function is `play`, in this process; `calls` has those of each round."""

    def __init__(self, play):
        self.play, self.calls = play, []

    def converse(self, code, function, calls, respond, *, seconds, cpu_seconds):
        while calls is not None:
            self.calls.append(calls)
            found = [self.play(*arguments) for arguments in calls]
            if isinstance(found[0], Outcome):
                return found[0]
            calls = respond(found)
        return Outcome(values=found, cpu_seconds=0.01)

    def map(self, function, items):
        return [function(item) for item in items]


@pytest.fixture
def scripted(env, monkeypatch):
    def make(play):
        sandbox = Scripted(play)
        monkeypatch.setattr(env, "sandbox", sandbox)
        return sandbox

    return make


# --- the tasks --------------------------------------------------------------------------------------------------------


def test_there_are_48_variants_with_questions_of_their_own():
    assert len({variant.question() for variant in VARIANTS}) == len(VARIANTS) == 48


def test_a_board_is_seen_as_the_question_says():
    board = [[0, 2, 4], [8, 0, 0], [16, 32, 0]]
    assert Variant(3, "rows", 0, DIRECTIONS).view(board) == board
    assert Variant(3, "columns", None, DIRECTIONS).view(board) == [[None, 8, 16], [2, None, 32], [4, None, None]]
    assert Variant(3, "flat", 0, DIRECTIONS).view(board) == [0, 2, 4, 8, 0, 0, 16, 32, 0]
    text = Variant(4, "columns", None, (0, 1, 2, 3)).question()
    assert "4 columns from left to right, each a list of 4 cells" in text and "an empty cell is None" in text
    assert "0 (up), 1 (down), 2 (left), 3 (right)" in text and "a tile of 128 within 100 moves" in text


def test_moves_are_read_by_their_names_and_types():
    assert [Variant(3, "rows", 0, ("U", "D", "L", "R")).direction(move) for move in ("D", "down")] == ["down", None]
    assert [Variant(3, "rows", 0, (0, 1, 2, 3)).direction(move) for move in (3, 4, -1)] == ["right", None, None]
    for names, moves in ((DIRECTIONS, (0, None, ["up"], {"move": "up"})), ((0, 1, 2, 3), (True, 1.0, "1", None))):
        for move in moves:
            with pytest.raises(RefusedAnswer) as refused:
                Variant(3, "rows", 0, names).direction(move)
            assert refused.value.violation == "type"


def test_held_out_variants_are_never_trained_on(env):
    held_out = {prompt.row["variant"] for prompt in env.eval_prompts()}
    assert len(held_out) == 12 == len(env.eval_prompts())
    trained = {prompt.row["variant"] for step in range(20) for prompt in env.prompts(step, num_prompts=16)}
    assert len(trained) == 36 and not held_out & trained
    assert env.prompts(3, num_prompts=4) == env.prompts(3, num_prompts=4) != env.prompts(4, num_prompts=4)


# --- the games --------------------------------------------------------------------------------------------------------


def test_the_function_sees_copies_and_its_changes_change_nothing(scripted, env):
    def vandal(board):
        board[0][0] = 2048
        board.clear()
        return "up"

    sandbox = scripted(vandal)
    verdict = score(env, PLAIN, block("x"))
    assert verdict.reward < 0.02 and all(2048 not in row for calls in sandbox.calls[1:] for board, in calls for row in board)


def test_games_differ_from_each_other_and_by_completion_and_repeat(scripted, env):
    boards = []
    for sample in (0, 1, 0):
        sandbox = scripted(lambda board: "nowhere")
        assert score(env, PLAIN, block("x"), sample=sample).reward == 0.0
        boards.append(str(sandbox.calls[0]))
        assert len(set(map(str, sandbox.calls[0]))) == len(sandbox.calls[0]) == 4 and len(sandbox.calls) == 1
    assert boards[0] == boards[2] != boards[1]


def test_the_reward_is_the_mean_of_the_games_and_a_refused_move_ends_only_its_own(scripted, env, monkeypatch):
    results = iter([1.0, 0.5, 0.25, 0.25])
    monkeypatch.setattr(Game2048, "progress", lambda game: next(results))
    sandbox = scripted(lambda board: "nowhere" if sandbox_first(board) else "left")
    stopped = []

    def sandbox_first(board):
        stopped.append(board)
        return len(stopped) == 1

    verdict = score(env, PLAIN, block("x"))
    assert verdict.reward == 0.5 and not verdict.is_correct and len(sandbox.calls[1]) <= 3 and "problem" in verdict.extra


def test_an_exception_ends_the_games_and_time_over_all_steps_is_a_violation(scripted, env):
    scripted(lambda board: Outcome(error="ValueError: no"))
    verdict = score(env, PLAIN, block("x"))
    assert (verdict.reward, verdict.extra, violations(verdict)) == (0.0, {"problem": "error: ValueError: no"}, {})
    scripted(lambda board: Outcome(values=["nowhere"] * 4, cpu_seconds=21.0))
    verdict = score(env, PLAIN, block("x"))
    assert verdict.reward == 0.0 and violations(verdict) == {"time": 1.0}


def test_nothing_of_one_step_is_there_in_the_next(env):
    """The names of the code are new in each step, though one process runs them all."""
    start, end = answers.first_that_moves(PLAIN).rsplit("    return", 1)
    counting = f"seen = []\n{start}    seen.append(1)\n    assert len(seen) <= {env.num_games}\n    return{end}"
    verdict = score(env, PLAIN, block(counting))
    assert verdict.reward == score(env, PLAIN, block(counting)).reward > 0 and "error" not in verdict.extra.get("problem", "")


def test_a_failure_of_the_sandbox_leaves_the_completion_out(scripted, env):
    def fail(board):
        raise SandboxError("gone")

    scripted(fail)
    verdict = score(env, PLAIN, block("x"))
    assert verdict.reward is None and "gone" in verdict.extra["refused"]


# --- the audit --------------------------------------------------------------------------------------------------------

SOME = [VARIANTS[0], VARIANTS[13], VARIANTS[23], VARIANTS[26]]  # each layout, set of names, size and empty cell


def test_some_have_everything_that_varies():
    for key in ("size", "layout", "empty", "names"):
        assert {getattr(v, key) for v in SOME} == {getattr(v, key) for v in VARIANTS}


@pytest.mark.parametrize("variant", SOME, ids=lambda variant: f"{variant.size}-{variant.layout}")
def test_the_oracle_earns_what_there_is(env, variant, monkeypatch):
    """Tiles are drawn by chance, so the best player of so small boards loses a game now and then."""
    monkeypatch.setattr(env, "num_games", 2)
    verdict = max((score(env, variant, block(answers.player(variant, depth=1)), sample=sample) for sample in range(2)),
                  key=lambda verdict: verdict.reward)  # fmt: skip
    assert verdict.reward >= 0.99 and verdict.is_correct and violations(verdict) == {}


def test_no_constant_answer_earns_half(env, monkeypatch):
    """A function fits its variant: of the others it reads boards or names moves wrong."""
    monkeypatch.setattr(env, "num_games", 1)
    texts = [block(answers.first_that_moves(variant)) for variant in VARIANTS[::5]]
    texts += [block(answers.wrapped(f"return {move!r}")) for move in (*DIRECTIONS, "U", "L", "north", "west", 0, 1, 2, 3)]
    texts += [block(answers.wrapped(f"import random\nreturn random.choice({names!r})")) for names in {v.names for v in VARIANTS}]
    texts += ["", "up", "42", block("strategy = 3")]
    means = [sum(score(env, variant, text).reward for variant in VARIANTS[1::12]) / len(VARIANTS[1::12]) for text in texts]
    assert len(texts) >= 30 and max(means) <= 0.5


HOSTILE = [
    *GARBAGE, block(""), block("def strategy(:"), block("return"), block("def strategy(): return 'up'"), block("(" * 19_000),
    block("import os\nos.system('true')"), block("open('/etc/passwd').read()"), block("raise SystemExit(0)"),
    block("x = bytearray(1 << 40)"), block("def strategy(board): return strategy"),
    block("def strategy(board): return 'x' * (1 << 22)"),
    block("x = 1") * 2,
]  # fmt: skip


def test_garbage_and_hostile_texts_earn_nothing_and_raise_nothing(env):
    for text in HOSTILE:
        verdict = score(env, PLAIN, text)
        assert verdict.reward == 0.0 and not verdict.is_correct, text


@pytest.mark.parametrize("name", answers.EXPLOITS)
def test_an_exploit_earns_no_more_than_an_honest_wrong_answer(env, monkeypatch, name):
    monkeypatch.setattr(env, "step_seconds", 0.5)
    for variant in (PLAIN, VARIANTS[23]):
        code = answers.EXPLOITS[name].replace("{move}", repr(variant.names[0])).replace("{{", "{").replace("}}", "}")
        honest = score(env, variant, block(answers.wrapped(f"return {variant.names[0]!r}")))
        assert score(env, variant, block(code)).reward <= honest.reward < 0.02


def test_there_are_fifteen_exploits():
    assert len(answers.EXPLOITS) == 15


@pytest.mark.parametrize("code, kind", [
    ("import numpy", "import"), ("open('/etc/passwd')", "call"), ("while True: pass", "time"),
    ("x = bytearray(1 << 40)", "memory"),
    ("import random\nrandom._os._exit(1)", "crash"), ("def strategy(board): return float('inf')", "non_finite"),
    ("def strategy(board): return 3", "type"), ("def strategy(board): return board", "type")])  # fmt: skip
def test_a_violation_is_counted_by_its_kind_and_earns_nothing(env, monkeypatch, code, kind):
    monkeypatch.setattr(env, "step_seconds", 0.5)
    verdict = score(env, PLAIN, block(code))
    assert violations(verdict) == {kind: 1.0} and verdict.reward == 0.0 and verdict.extra["refused"].startswith("violation: ")


def test_a_function_that_is_right_at_first_and_violates_later_earns_nothing(env):
    start, end = answers.first_that_moves(PLAIN).rsplit("    return", 1)
    late = f"{start}    if max(map(max, lines)) >= 16: import numpy\n    return{end}"
    assert score(env, PLAIN, block(answers.first_that_moves(PLAIN))).reward > 0.02
    verdict = score(env, PLAIN, block(late))
    assert verdict.reward == 0.0 and violations(verdict) == {"import": 1.0}


@pytest.mark.parametrize("key, value", [("num_games", 0), ("step_seconds", 0), ("seconds", 0), ("held_out_fraction", 1.0)])
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=re.escape(f"env.{key}={value}: must lie in ")):
        make_environment(SETTINGS | {key: value}, Strategy2048.build_tokenizer(), seed=0, total_steps=1, sandbox=None)
