"""2048 with a tool: the rules, and a judge that plays the calls again."""

import json
import random
import re

import pytest
from audit import GARBAGE, answered
from paths import ROOT
from players_2048 import best_move

from grpo.configuration.launch import load_config
from grpo.environment import checked_scores, make_environment
from grpo.envs.game_2048 import DIRECTIONS, Game2048, MoveTool, Play2048, slide

pytestmark = pytest.mark.slow

SETTINGS = load_config("train", ["+experiment=game_2048_20b", f"model.path={ROOT / 'tests/fixtures/tiny_bf16'}"]).env


@pytest.fixture(scope="module")
def env():
    return make_environment(SETTINGS, Play2048.build_tokenizer(), seed=0, total_steps=1)


@pytest.fixture(scope="module")
def prompts(env):
    return env.eval_prompts()


def moving(*directions: str) -> tuple[tuple[str, str], ...]:
    return tuple(("functions.move", json.dumps({"direction": direction})) for direction in directions)


def score(env, prompt, calls, text="64"):
    return checked_scores(env, [answered(env, prompt, text, calls=calls)])[0]


# --- the game ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line, left", [
    ([0, 0, 0, 0], [0, 0, 0, 0]), ([0, 2, 0, 2], [4, 0, 0, 0]), ([2, 2, 2, 2], [4, 4, 0, 0]), ([2, 2, 2, 0], [4, 2, 0, 0]),
    ([4, 2, 2, 0], [4, 4, 0, 0]), ([2, 4, 2, 4], [2, 4, 2, 4]), ([4, 4, 8, 16], [8, 8, 16, 0]), ([0, 0, 2, 4], [2, 4, 0, 0])])
def test_a_line_slides_and_merges_each_pair_once(line, left):
    assert slide([line], "left") == [left] and slide([line[::-1]], "right") == [left[::-1]]
    assert slide([[tile] for tile in line], "up") == [[tile] for tile in left]
    assert slide([[tile] for tile in line[::-1]], "down") == [[tile] for tile in left[::-1]]


def test_a_game_begins_with_two_tiles_and_gets_one_with_each_move():
    rng, fours, tiles = random.Random(0), 0, 0
    for seed in range(60):
        game = MoveTool(Game2048(seed, 4, 2048, 30))
        assert sum(tile > 0 for line in game.game.board for tile in line) == 2
        while not game.game.is_over:
            before = sum(map(sum, game.game.board))
            try:
                game.move(rng.choice(DIRECTIONS))
            except ValueError as error:
                assert "moves no tile" in str(error)
                continue
            new = sum(map(sum, game.game.board)) - before
            assert new in (2, 4)
            tiles, fours = tiles + 1, fours + (new == 4)
        assert game.game.num_moves == 30
    assert 0.05 < fours / tiles < 0.15


def test_a_game_ends_with_the_goal_or_without_a_move_and_says_so():
    game = MoveTool(Game2048(0, 2, 8, 100))
    game.game.board = [[4, 4], [2, 2]]
    assert game.move("left").endswith("\nThe goal of 8 is reached.") and game.game.progress() == 1.0
    with pytest.raises(ValueError, match="the game is over"):
        game.move("left")
    stuck = MoveTool(Game2048(0, 2, 64, 100))
    stuck.game.board = [[8, 0], [16, 32]]
    assert stuck.move("right").endswith("\nThe game is over.") and stuck.game.progress() == (28 / 60) ** 2
    idle = MoveTool(Game2048(0, 2, 64, 100))
    idle.game.board = [[2, 0], [4, 0]]
    with pytest.raises(ValueError, match="left moves no tile"):
        idle.move("left")


# --- the task and its audit -------------------------------------------------------------------------------------------


def test_the_oracle_reaches_the_goal_on_every_board(env, prompts):
    for prompt in prompts[:10]:
        for depth in (1, 2):  # the deeper one where the other fails
            game, directions = env.episode(prompt, 0), []
            while not game.game.is_over:
                directions.append(best_move(game.game.board, depth))
                game.move(directions[-1])
            if game.game.progress() == 1.0:
                break
        verdict = score(env, prompt, moving(*directions))
        assert verdict.reward == 1.0 and verdict.is_correct and verdict.metrics["largest_tile"] == 64
        assert verdict.metrics["moves"] == len(directions) <= 50 and verdict.metrics["moves/refused"] == 0


def test_the_reward_never_falls_with_a_further_move_and_is_0_without_any(env, prompts):
    rng, prompt = random.Random(0), prompts[0]
    directions = [rng.choice(DIRECTIONS) for _ in range(40)]
    rewards = [score(env, prompt, moving(*directions[:end])).reward for end in range(40)]
    assert rewards[0] == 0.0 and rewards == sorted(rewards) and rewards[-1] > 0


def test_problems_are_those_of_the_seed_and_step_and_never_held_out(env, prompts):
    other = make_environment(SETTINGS, env.tokenizer, seed=1, total_steps=1)
    rows = [prompt.row for prompt in env.prompts(3, num_prompts=16)]
    assert rows == [prompt.row for prompt in env.prompts(3, num_prompts=16)]
    assert rows != [prompt.row for prompt in other.prompts(3, num_prompts=16)]
    assert [prompt.row for prompt in prompts] == [prompt.row for prompt in other.eval_prompts()]
    assert not {prompt.row["game_seed"] for prompt in prompts} & {row["game_seed"] for row in rows}


def test_no_fixed_order_of_moves_earns_half(env, prompts):
    rng = random.Random(0)
    orders = [["up", "left", "down", "right"], ["left", "down", "right", "up"], ["up", "left", "up", "right"], ["up", "left"],
              ["left", "up", "right", "up"], ["down", "left", "down", "right"], ["left"], ["up", "left", "left", "up", "right"]]
    orders += [rng.choices(DIRECTIONS, k=rng.choice((3, 4, 5, 6, 40))) for _ in range(22)]
    means = [sum(score(env, prompt, moving(*(order * 60)[:60])).reward for prompt in prompts[:32]) / 32 for order in orders]
    assert len(orders) == 30 and max(means) <= 0.5


BAD_CALLS = [
    "", "{}", "null", '{"direction": "Left"}', '{"direction": 0}', '{"direction": ["left"]}', '{"direction": "left", "times": 9}',
    '{"direction": null}', '{"direction": "left"', '{"board": [[2048]]}', "[" * 10_000, "x" * 100_000, '{"direction": NaN}',
]  # fmt: skip


def test_garbage_and_hostile_calls_and_texts_earn_nothing_and_raise_nothing(env, prompts):
    names = ["move", "functions.game", "functions.make_move", "functions.__init__", "python", "functions."]
    calls = tuple(("functions.move", arguments) for arguments in BAD_CALLS)
    calls += tuple((name, arguments) for name in names for arguments in ("{}", '{"direction": "left"}'))
    for text in GARBAGE:
        assert score(env, prompts[0], (), text).reward == score(env, prompts[0], calls, text).reward == 0.0
    assert checked_scores(env, [answered(env, prompts[0], "2048")])[0].reward == 0.0


def test_a_prompt_shows_the_board_and_not_the_seed(env, prompts):
    prompt = prompts[0]
    text = env.tokenizer.decode(prompt.token_ids, keep_special=True)
    assert 'type move = (_: {\ndirection: "up" | "down" | "left" | "right",\n}) => any;' in text
    assert f"The board:\n{env.episode(prompt, 0).game.shown()}<|end|>" in text and str(prompt.row["game_seed"]) not in text


@pytest.mark.parametrize("key, value", [("size", 1), ("goal", 4), ("goal", 100), ("most_moves", 0)])
def test_a_value_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=re.escape(f"env.{key}={value}: must ")):
        make_environment(SETTINGS | {key: value}, Play2048.build_tokenizer(), seed=0, total_steps=1)
