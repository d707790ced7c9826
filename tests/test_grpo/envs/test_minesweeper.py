"""Minesweeper: the rules, boards that need no guess, and a judge that plays the calls again."""

import itertools
import json
import queue
import random
import re

import pytest
from audit import GARBAGE, answered
from paths import ROOT

from grpo.batch import Prompt
from grpo.configuration.launch import load_config
from grpo.environment import checked_scores, make_environment
from grpo.envs.minesweeper import Minefield, Minesweeper
from grpo.rollout.episodes import EpisodeThread

SETTINGS = load_config("train", ["+experiment=minesweeper_20b", f"model.path={ROOT / 'tests/fixtures/tiny_bf16'}"]).env
CELLS = list(itertools.product(range(6), range(6)))


@pytest.fixture(scope="module")
def env():
    settings = SETTINGS | {"num_eval_prompts": 24}
    return make_environment(settings, Minesweeper.build_tokenizer(), seed=0, total_steps=1)


@pytest.fixture(scope="module")
def prompts(env):
    return env.eval_prompts()


def opening(*cells) -> tuple[tuple[str, str], ...]:
    return tuple(("functions.open", json.dumps({"row": row, "column": column})) for row, column in cells)


def score(env, prompt, calls, text="won"):
    return checked_scores(env, [answered(env, prompt, text, calls=calls)])[0]


def safe_cells(prompt):
    return [cell for cell in CELLS if cell not in prompt.row["mines"]]


# --- the game ---------------------------------------------------------------------------------------------------------


def test_a_small_board_worked_out_by_hand():
    game = Minefield(3, 4, [(0, 0), (2, 1)], (0, 3))
    assert game._shown() == "  0 1 2 3\n0 # 1 0 0\n1 # 2 1 0\n2 # # 1 0"
    assert game.open(1, 0) == "  0 1 2 3\n0 # 1 0 0\n1 2 2 1 0\n2 # # 1 0"
    for cell, text in (((1, 0), "is open"), ((3, 0), "rows lie in 0..2 and columns in 0..3"), ((0, -1), "rows lie in")):
        with pytest.raises(ValueError, match=text):
            game.open(*cell)
    assert game._share() == 0.5 and not game._is_over  # (1, 0) and (2, 0) were left
    assert game.open(2, 0).endswith("2 1 # 1 0\nAll safe cells are open. The game is won.")
    with pytest.raises(ValueError, match="the game is over"):
        game.open(2, 1)
    lost = Minefield(3, 4, [(0, 0), (2, 1)], (0, 3))
    assert lost.open(2, 1) == "A mine. The game is lost." and lost._is_over and not lost._is_won


def layouts(shown: str, num_mines: int) -> list[set]:
    """All ways to lay the mines that agree with a board of 4 x 4, by trying each."""
    seen = {(row, c): cell for row, line in enumerate(shown.splitlines()[1:]) for c, cell in enumerate(line.split()[1:])}
    closed = [cell for cell, text in seen.items() if text == "#"]
    found = []
    for mines in map(set, itertools.combinations(closed, num_mines)):
        if all(text == "#" or int(text) == sum(abs(r - row) <= 1 and abs(c - column) <= 1 for row, column in mines)
               for (r, c), text in seen.items()):
            found.append(mines)
    return found


def test_what_is_deduced_holds_in_every_layout_that_agrees():
    """The solver opens only cells that are safe whatever the layout; so it never opens a mine."""
    rng, num_solved = random.Random(0), 0
    cells = list(itertools.product(range(4), range(4)))
    for _ in range(60):
        mines = rng.sample(cells, 3)
        first = rng.choice([cell for cell in cells if cell not in mines])
        game = Minefield(4, 4, mines, first)
        if game._deduce():
            num_solved += 1
            assert game._is_won
        else:
            assert not game._opened & set(mines) and len(layouts(game._shown(), 3)) > 1
    assert 10 < num_solved < 60


# --- the task and its audit -------------------------------------------------------------------------------------------


def test_the_oracle_wins_every_board(env, prompts):
    for prompt in prompts:
        verdict = score(env, prompt, opening(*safe_cells(prompt)))
        assert verdict.reward == 1.0 and verdict.is_correct and verdict.metrics["lost"] == 0
        assert verdict.metrics["moves"] == 30 and verdict.metrics["moves/refused"] >= 30 - 25


def test_boards_need_no_guess_and_begin_open(env, prompts):
    for prompt in prompts:
        game = env.episode(prompt, 0)
        assert game._number(prompt.row["first"]) == 0 and 5 <= 30 - game._num_given <= 25
        assert game._deduce() and len(prompt.row["mines"]) == 6
        assert prompt.row["question"].endswith(env.episode(prompt, 0)._shown())


def test_the_reward_is_half_the_share_opened_and_half_for_a_win_and_a_mine_takes_nothing_back(env, prompts):
    prompt = prompts[0]
    given = env.episode(prompt, 0)._num_given
    game, cells, last = env.episode(prompt, 0), [], 0.0
    for cell in safe_cells(prompt):
        try:
            game.open(*cell)
        except ValueError:
            continue
        cells.append(cell)
        share = (len(game._opened) - given) / (30 - given)
        stopped = score(env, prompt, opening(*cells))
        assert stopped.reward == pytest.approx(0.5 * share + 0.5 * (share == 1)) and stopped.reward > last
        if share < 1:
            lost = score(env, prompt, opening(*cells, prompt.row["mines"][0], *safe_cells(prompt)))
            assert (lost.reward, lost.metrics["lost"]) == (stopped.reward, 1.0)
        last = stopped.reward
    assert last == 1.0


def test_problems_are_those_of_the_seed_and_step_and_never_held_out(env, prompts):
    other = make_environment(SETTINGS | {"num_eval_prompts": 24}, env.tokenizer, seed=1, total_steps=1)
    rows = [prompt.row for prompt in env.prompts(3, num_prompts=16)]
    assert rows == [prompt.row for prompt in env.prompts(3, num_prompts=16)]
    assert rows != [prompt.row for prompt in other.prompts(3, num_prompts=16)]
    assert [prompt.row for prompt in prompts] == [prompt.row for prompt in other.eval_prompts()]
    assert not {env.identity(prompt.row) for prompt in prompts} & {env.identity(row) for row in rows}


def test_no_fixed_order_of_cells_earns_half(env, prompts):
    rng = random.Random(0)
    orders = [CELLS, CELLS[::-1], sorted(CELLS, key=lambda cell: cell[1]), *(rng.sample(CELLS, 36) for _ in range(27))]
    means = [sum(score(env, prompt, opening(*order)).reward for prompt in prompts[:8]) / 8 for order in orders]
    assert len(orders) == 30 and max(means) <= 0.3


BAD_CALLS = [
    "", "{}", "null", "[0, 0]", '{"row": "0", "column": 0}', '{"row": 0.0, "column": 0}', '{"row": true, "column": false}',
    '{"row": -1, "column": 0}', '{"row": 1e99, "column": 0}', f'{{"row": {10**30}, "column": 0}}', '{"row": NaN, "column": 0}',
    '{"row": 0, "column": 0, "force": true}', "[" * 10_000, "x" * 100_000, '{"row": 0, "column": 0', "__import__('os')",
]  # fmt: skip


def test_garbage_and_hostile_calls_and_texts_earn_nothing_and_raise_nothing(env, prompts):
    prompt = prompts[0]
    for text in GARBAGE:
        assert score(env, prompt, (), text).reward == 0.0
        assert score(env, prompt, tuple(("functions.open", arguments) for arguments in BAD_CALLS), text).reward == 0.0
    names = ["open", "functions._uncover", "functions._deduce", "functions.score", "functions.__init__", "python", "functions."]
    cell = next(cell for cell in safe_cells(prompt) if cell not in env.episode(prompt, 0)._opened)
    calls = tuple((name, arguments) for name in names for arguments in ("{}", opening(cell)[0][1], '{"cell": [0, 0]}'))
    assert score(env, prompt, calls).reward == 0.0
    assert checked_scores(env, [answered(env, prompt, "won")])[0].reward == 0.0


def test_the_same_cell_again_and_again_earns_once(env, prompts):
    cell = next(cell for cell in safe_cells(prompts[0]) if cell not in env.episode(prompts[0], 0)._opened)
    once = score(env, prompts[0], opening(cell))
    assert score(env, prompts[0], opening(*[cell] * 50)).reward == once.reward > 0


def test_the_tool_answers_calls_as_the_judge_replays_them(env, prompts):
    replies, prompt = queue.SimpleQueue(), prompts[0]
    thread = EpisodeThread(0, lambda: env.episode(prompt, 0), replies, writes_json=False)
    calls = []
    for cell in [*safe_cells(prompt), prompt.row["mines"][0]]:
        thread.call("functions.open", opening(cell)[0][1])
        calls.append(replies.get()[1])
    thread.leave()
    assert any("The game is won." in call.result for call in calls) and calls[-1].result == "the game is over"
    assert score(env, prompt, tuple((call.name, call.arguments) for call in calls)).is_correct


def test_a_prompt_declares_the_function_and_hides_the_mines(env, prompts):
    text = env.tokenizer.decode(prompts[0].token_ids, keep_special=True)
    assert "type open = (_: {\n// from 0, the topmost\nrow: number," in text and "_uncover" not in text
    assert isinstance(prompts[0], Prompt) and re.search(r"<\|message\|>The board has 6 mines:\n  0 1 2 3 4 5\n0 ", text)


@pytest.mark.parametrize("key, value", [("height", 3), ("width", 11), ("mines", 8)])
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=re.escape(f"env.{key}={value}: must lie in ")):
        make_environment(SETTINGS | {key: value}, Minesweeper.build_tokenizer(), seed=0, total_steps=1)
