"""Environments that others wrote, unmodified, played by a scripted policy on a tiny model.

Tests of a library run where it is installed. GRPO_ENVS_PYTHON names a Python with this program's dependencies, pytest and
libraries, in which they all run; GRPO_OPENENV_ENVS the folder `envs` of OpenEnv's repository and
GRPO_VERIFIERS_ENVS `environments` of verifiers': what lies there is not on PyPI.
"""

import os
import re
import subprocess
import sys
from collections import deque
from importlib.util import find_spec
from itertools import product

import pytest
from paths import ROOT
from played_episodes import SETTINGS, TOKENIZER, call, final, play, text_of

from grpo.envs.resource_sessions import ResourceSessions

SERVER = '''
try:
    from mcp.server.fastmcp import FastMCP as Server
except ImportError:
    from mcp.server import MCPServer as Server
server, count = Server("numbers"), 0

@server.tool()
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b

@server.tool()
def count_calls() -> str:
    """Counts its calls."""
    global count
    count += 1
    if count > 1:
        raise ValueError("too often")
    return f"call {count}"

server.run()
'''


def needs(library: str) -> None:
    if find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install -e '.[{library.replace('_', '-')}]', or as GRPO_ENVS_PYTHON a Python with it")


def sessions(adapter: str, *, path: str | None = None, **kwargs) -> ResourceSessions:
    settings = SETTINGS | {"environment": f"grpo.envs.adapters.{adapter}", "kwargs": kwargs, "path": path}
    return ResourceSessions(tokenizer=TOKENIZER, seed=0, **settings)


def test_the_libraries_of_another_python():
    python = os.environ.get("GRPO_ENVS_PYTHON")
    if not python or os.path.abspath(python) == os.path.abspath(sys.executable):  # links of two environments lead to one file
        pytest.skip("GRPO_ENVS_PYTHON does not name another Python")
    command = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__]
    environment = {name: value for name, value in os.environ.items() if name != "GRPO_ENVS_PYTHON"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def played(env, monkeypatch, texts, *, max_len: int = 8192):
    """The two first prompts' completions, by what `texts` writes for the session of each, and their scores."""
    prompts = env.prompts(0, num_prompts=2)
    scripts = {}
    for prompt in prompts:
        session = env.episode(prompt, 0)
        scripts[prompt.id] = texts(session, text_of(prompt))
        session.close()
    completions = play(env, prompts, monkeypatch, lambda prompt: scripts[prompt.id], max_len=max_len)
    assert [completion.episode.failure for completion in completions] == [None, None]
    return completions, env.score(completions)


# ---- TextArena


def moves(*texts: str) -> list[str]:
    return [*(call("play", move=text) for text in texts), final("done")]


def test_textarena_mastermind(monkeypatch):
    needs("textarena")
    env = sessions("textarena_games:TextArenaGames", game="Mastermind-v0", settings={"num_numbers": 6, "max_turns": 20,
                                                                                   "code_length": 4, "duplicate_numbers": False})

    def solve(session, text):
        assert "You need to find the code that is 4 digits long" in text
        code = session.game.env.state.game_state["secret_code"]
        other = [digit for digit in range(1, 7) if digit not in code] + code[:2]
        return moves(" ".join(map(str, other)), "[9 9 9 9]", " ".join(map(str, code)), "1 2 3 4")

    completions, scores = played(env, monkeypatch, solve)
    assert [score.reward for score in scores] == [1.0, 1.0]
    results = [call.result for call in completions[0].episode.calls]
    assert re.search(r"0 black peg\(s\), 2 white peg\(s\)", results[0]) and "invalid move" in results[1].lower()
    assert "cracked the code" in results[2] and results[3] == "the episode is over"
    assert completions[0].episode.calls[0].arguments != completions[1].episode.calls[0].arguments  # another seed, another code


def test_textarena_frozen_lake(monkeypatch):
    needs("textarena")
    env = sessions("textarena_games:TextArenaGames", game="FrozenLake-v0")

    def solve(session, text):
        lines = re.findall(r"^\|(.*)\|$", text, flags=re.MULTILINE)
        return moves(*shortest([[cell.strip() for cell in line.split("|")] for line in lines]))

    completions, scores = played(env, monkeypatch, solve)
    assert [score.reward for score in scores] == [1.0, 1.0] and scores[0].metrics["finished"] == 1.0
    assert "You reached the goal" in completions[0].episode.calls[-1].result


def shortest(board: list[list[str]]) -> list[str]:
    """The directions from P to G that avoid H."""
    size = len(board)
    start = next((i, j) for i, j in product(range(size), repeat=2) if board[i][j] == "P")
    paths = deque([(start, [])])
    seen = {start}
    while paths:
        (i, j), path = paths.popleft()
        if board[i][j] == "G":
            return path
        for name, di, dj in (("up", -1, 0), ("down", 1, 0), ("left", 0, -1), ("right", 0, 1)):
            place = i + di, j + dj
            if min(place) >= 0 and max(place) < size and board[place[0]][place[1]] != "H" and place not in seen:
                seen.add(place)
                paths.append((place, [*path, name]))
    raise AssertionError(f"no way in {board}")


def test_textarena_sudoku(monkeypatch):
    needs("textarena")
    env = sessions("textarena_games:TextArenaGames", game="Sudoku-v0")

    def solve(session, text):
        grid = [[int(cell) if cell.isdigit() else 0 for cell in re.findall(r"[\d.]", line.split("  ", 1)[1])]
                for line in re.findall(r"^R\d.*$", text, flags=re.MULTILINE)[-9:]]
        full = solved(grid)
        holes = [(i, j) for i, j in product(range(9), repeat=2) if grid[i][j] == 0]
        return moves(*(f"{i + 1} {j + 1} {full[i][j]}" for i, j in holes[:3]))

    completions, scores = played(env, monkeypatch, solve)
    assert all("\\nR9 " in result.result for result in completions[0].episode.calls)
    assert [score.metrics["moves"] for score in scores] == [3.0, 3.0] and scores[0].metrics["invalid_move"] == 0.0


def solved(grid: list[list[int]]) -> list[list[int]]:
    holes = [(i, j) for i, j in product(range(9), repeat=2) if grid[i][j] == 0]

    def allowed(i: int, j: int) -> set[int]:
        box = [grid[3 * (i // 3) + k // 3][3 * (j // 3) + k % 3] for k in range(9)]
        return set(range(1, 10)) - set(grid[i]) - {row[j] for row in grid} - set(box)

    def fill() -> bool:
        left = [(len(allowed(i, j)), i, j) for i, j in holes if grid[i][j] == 0]
        if not left:
            return True
        _, i, j = min(left)
        for digit in allowed(i, j):
            grid[i][j] = digit
            if fill():
                return True
        grid[i][j] = 0
        return False

    before = [[*row] for row in grid]
    assert fill()
    result = [[*row] for row in grid]
    grid[:] = before
    return result


def test_textarena_2048_draws_the_same_tiles_for_all_of_a_group(monkeypatch):
    needs("textarena")
    env = sessions("textarena_games:TextArenaGames", game="2048-v0")
    path = ["up", "left", "down", "right", "sideways"]
    completions, scores = played(env, monkeypatch, lambda session, text: moves(*path))
    again, _ = played(env, monkeypatch, lambda session, text: moves(*path))
    results = [[call.result for call in completion.episode.calls] for completion in completions]
    assert results == [[call.result for call in completion.episode.calls] for completion in again] and results[0] != results[1]
    assert "Score: " in results[0][0] and "Invalid action" in results[0][4] and scores[0].metrics["finished"] == 0.0


def test_textarena_refuses_unknown_games_and_those_for_several_players():
    needs("textarena")
    with pytest.raises(ValueError, match="textarena has no such game; near: FrozenLake-v0,"):
        sessions("textarena_games:TextArenaGames", game="frozenlake-v9")
    with pytest.raises(ValueError, match="cannot be played by one player"):
        sessions("textarena_games:TextArenaGames", game="KuhnPoker-v0")


# ---- others


def test_gymnasium_frozen_lake(monkeypatch):
    needs("gymnasium")
    env = sessions("gymnasium_games:GymnasiumGames", game="FrozenLake-v1", settings={"is_slippery": False})
    way = [2, 2, 1, 1, 1, 2]  # right, right, down, down, down, right on the standard map

    def solve(session, text):
        assert "[S]FFF\nFHFH\nFFFH\nHFFG" in text and "\x1b" not in text and "## Version History" not in text
        return [*(call("act", action=action) for action in way), call("act", action=7), final("done")]

    completions, scores = played(env, monkeypatch, solve)
    assert [score.reward for score in scores] == [1.0, 1.0]
    results = [call.result for call in completions[0].episode.calls]
    assert "HFF[G]" in results[5] and results[6] == "argument action of act must be one of 0, 1, 2, 3"
    with pytest.raises(ValueError, match="only Discrete and Text"):
        sessions("gymnasium_games:GymnasiumGames", game="Pendulum-v1")


@pytest.mark.parametrize("task", ["chain_sum", "mini_sudoku", "knights_knaves", "spell_backward", "number_sorting"])
def test_reasoning_gym(task, monkeypatch):
    needs("reasoning_gym")
    import reasoning_gym

    env = sessions("reasoning_gym_tasks:ReasoningGymTasks", task=task)
    prompts = env.prompts(0, num_prompts=2)
    entries = []

    def answer(session, text):
        entries.append(session)
        gold = session.score.__closure__
        entry = next(cell.cell_contents for cell in gold if isinstance(cell.cell_contents, dict))
        assert entry["question"].strip().splitlines()[-1] in text
        return [final(entry["answer"] if len(entries) == 1 else "__import__('os').system('true')[0]")]

    _, scores = played(env, monkeypatch, answer)
    assert [score.reward for score in scores] == [1.0, 0.0] and len({tuple(prompt.token_ids) for prompt in prompts}) == 2
    assert scores[1].metrics == {"solved": 0.0, "answer_form": 0.0}
    assert task in reasoning_gym.factory.DATASETS


def test_reasoning_gym_gives_gold_answers_the_whole_reward_and_constants_at_most_half():
    needs("reasoning_gym")
    from grpo.envs.adapters.reasoning_gym_tasks import ALLOWED, ReasoningGymTasks

    constants = ["0", "1", "2", "10", "a", "yes", "[]", "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1"]
    for task in ALLOWED:
        tasks = ReasoningGymTasks(task)
        found = [tasks.create(None, seed=seed) for seed in range(20)]
        scores = {text: sum(session.score(text)[0] for session in found) / 20 for text in constants}
        golds = [tasks.library.create_dataset(task, seed=seed, size=1)[0]["answer"] for seed in range(20)]
        assert min(session.score(gold)[0] for session, gold in zip(found, golds)) >= 0.99, task
        assert max(scores.values()) <= 0.5, (task, scores)


@pytest.mark.parametrize("name, arguments, reward", [
    ("grid_world_env.server.grid_world_environment:GridWorldEnvironment",
     [{"action": way} for way in ["DOWN"] * 4 + ["RIGHT"] * 4], 1 - 0.7),
    ("maze_env.server.maze_env_environment:MazeEnvironment", None, None),
    ("connect4_env.server.connect4_environment:Connect4Environment",
     [{"column": column} for column in (0, 1, 0, 1, 0, 1, 0)], 1.0)])
def test_openenv(name, arguments, reward, monkeypatch):
    needs("openenv")
    folder = os.environ.get("GRPO_OPENENV_ENVS")
    if not folder:
        pytest.skip("GRPO_OPENENV_ENVS does not name the folder `envs` of a checkout of OpenEnv")
    monkeypatch.syspath_prepend(folder)
    env = sessions("openenv_environments:OpenEnvEnvironments", environment=name)

    def solve(session, text):
        steps = arguments or [{"action": 3}, {"action": 3}]
        return [*(call("step", **step) for step in steps), final("done")]

    completions, scores = played(env, monkeypatch, solve)
    calls = completions[0].episode.calls
    assert not any(call.is_failed for call in calls), calls
    if reward is None:  # the maze: the first step is allowed, and costs a little
        assert '"current_position": [0, 0]' not in calls[0].result and scores[0].reward < 0
    else:
        assert [score.reward for score in scores] == [pytest.approx(reward)] * 2 and '"done": true' in calls[-1].result


def verifiers_folder(monkeypatch) -> None:
    needs("verifiers")
    folder = os.environ.get("GRPO_VERIFIERS_ENVS")
    if not folder:
        pytest.skip("GRPO_VERIFIERS_ENVS does not name the folder `environments` of verifiers' repository")
    for name in ("kuhn_poker", "reverse_text"):
        monkeypatch.syspath_prepend(f"{folder}/{name}")


def test_verifiers_reverse_text(monkeypatch, tmp_path):
    verifiers_folder(monkeypatch)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(f'{{"prompt": "abcd{i:02}"}}\n' for i in range(40)))
    env = sessions("verifiers_tasks:VerifiersTasks", taskset="reverse_text",
                   settings={"taskset": {"dataset_name": str(tmp_path / "data")}})
    assert len(env.train_rows) + len(env.eval_rows) <= 40 and not any(row in env.train_rows for row in env.eval_rows)

    def answer(session, text):
        assert "# Instructions\n\nReverse the text character-by-character." in text
        given = re.search(r"abcd\d\d", text).group()
        asked.append(given)
        return [final(f"<reversed_text>{given[::-1] if len(asked) == 1 else given[0]}</reversed_text>")]

    asked = []
    _, scores = played(env, monkeypatch, answer)
    assert [score.reward for score in scores] == [1.0, pytest.approx(2 / 7)]  # one of 6 and 1 characters matches


def test_verifiers_kuhn_poker(monkeypatch, tmp_path):
    verifiers_folder(monkeypatch)
    (tmp_path / "rival.py").write_text("import re\ndef passive(messages):\n"
                                       "    legal = re.findall(r'\\[(\\w+)\\]', messages[-1]['content'])\n"
                                       "    return f'[{legal[-2]}]'\n")  # of the two legal actions: check, or fold
    settings = {"taskset": "kuhn_poker", "num_tasks": 40, "opponent": f"{tmp_path}/rival.py:passive"}
    with pytest.raises(ValueError, match="kuhn_poker has the agents player0, player1; .*name a function"):
        sessions("verifiers_tasks:VerifiersTasks", taskset="kuhn_poker", num_tasks=40)
    with pytest.raises(ValueError, match="agent='dealer': allowed: player0, player1"):
        sessions("verifiers_tasks:VerifiersTasks", **settings, agent="dealer")

    env = sessions("verifiers_tasks:VerifiersTasks", **settings, agent="player0")

    def bet(session, text):
        assert "You are playing Kuhn poker as Player 0." in text and text.count("Your private card: ") == 1
        assert text.endswith("Your legal actions: [check] or [bet].<|end|><|start|>assistant")
        first = call("reply", message="I check or bet: [check] [bet]") if not seen else ""
        seen.append(session)
        return [first, call("reply", message="[bet]"), final("done")]

    seen = []
    completions, scores = played(env, monkeypatch, bet)
    assert [score.reward for score in scores] == [1.0, 1.0] and scores[0].metrics == {"forfeit": 0.0}
    calls = [call.result for call in completions[0].episode.calls]
    assert "That was not a legal move." in calls[0] and calls[1] == '"The exchange is over."'

    _, scores = played(env, monkeypatch, lambda session, text: [final("I do not play")])
    assert [(score.reward, score.metrics) for score in scores] == [(-1.0, {"forfeit": 1.0})] * 2


def test_verifiers_tasks_that_need_a_runtime_are_refused_by_name(monkeypatch, tmp_path):
    needs("verifiers")
    (tmp_path / "needy_tasks.py").write_text("""
import verifiers.v1 as vf

class NeedyTask(vf.Task[vf.TaskData]):
    async def setup(self, trace, runtime):
        pass

    @vf.reward(weight=1.0)
    async def tests_pass(self, trace, runtime) -> float:
        return 1.0

class NeedyTaskset(vf.Taskset[NeedyTask]):
    def load(self):
        return [NeedyTask(vf.TaskData(prompt="x", image="python:3"), self.config.task)]

__all__ = ["NeedyTaskset"]
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"NeedyTask.setup\(\), NeedyTask.tests_pass\(runtime\), the image python:3"):
        sessions("verifiers_tasks:VerifiersTasks", taskset="needy_tasks")


def test_an_mcp_server_gives_each_episode_its_tools_afresh(monkeypatch, tmp_path):
    needs("mcp")
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "Add {i} and 2.", "answer": "{i + 2}"}}\n' for i in range(12)))
    env = sessions("mcp_tools:McpTools", path=str(tmp_path / "rows.jsonl"), command=[sys.executable, str(tmp_path / "server.py")])

    def solve(session, text):
        assert "// Adds two numbers.\ntype add = (_: {\na: number,\nb: number,\n}) => any;" in text
        number = int(re.search(r"Add (\d+) and 2\.<\|end\|>", text).group(1))
        return [call("add", a=number, b=2), call("count_calls"), call("count_calls"), call("add", a="x", b=2), final(number + 2)]

    completions, scores = played(env, monkeypatch, solve)
    assert [score.reward for score in scores] == [1.0, 1.0]
    for completion in completions:
        first, *others = completion.episode.calls
        assert first.result == f'"{int(completion.prompt.row["row"]["answer"])}"'
        assert [call.is_failed for call in others] == [False, True, True] and others[0].result == '"call 1"'
        assert "too often" in others[1].result and others[2].result == "argument a of add must be integer"
    with pytest.raises(ValueError, match="no MCP server answers"):
        sessions("mcp_tools:McpTools", path=str(tmp_path / "rows.jsonl"), command=["false"])
    monkeypatch.setattr("grpo.envs.adapters.mcp_tools.START_SECONDS", 0.5)
    with pytest.raises(ValueError, match="it listed no tools within 0.5 s"):
        sessions("mcp_tools:McpTools", path=str(tmp_path / "rows.jsonl"), command=["sleep", "599"])
