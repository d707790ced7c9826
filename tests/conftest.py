"""`entry_points`: runs `python -m grpo.NAME ARGUMENTS` and scripts many times without importing torch every time.

A server process imports what the entry points need, then forks a child for each command; the child runs the module as
`python -m` does, with its own argv, folder, environment and standard streams. A few tests elsewhere start real interpreters.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import ROOT

SERVER = r"""
import gc, importlib.machinery, json, os, runpy, signal, sys, time
import yaml
if yaml.__with_libyaml__:  # libyaml reads the same in a third of the time
    yaml.SafeLoader = yaml.CSafeLoader
import torch, torch._dynamo, hydra, rich.live, matplotlib.pyplot, tokenizers, safetensors.torch
import models.formats.hugging_face, models.lora
import grpo.configuration.launch, grpo.evaluate, grpo.warmup, grpo.report, grpo.envs.carry, grpo.envs.dataset
import huggingface_hub.repocard  # nothing else of grpo: tests replace functions of it before others import them
sys.path.insert(0, "tests")
import shared_compositions
del sys.path[0]
shared_compositions.share()
for words in ([], ["experiment=smoke"], ["experiment=gpt_oss_20b_lora"]):  # fills the caches of Hydra's parsers too
    grpo.configuration.launch.load_config("train", words)
gc.freeze()  # no child looks through what the imports have made
children = set()

def run(command):
    os.setsid()
    os.chdir(command["folder"])
    os.environ.update(command["environment"])
    sys.path[:0] = command["path"]
    if any(name.startswith("HF_") for name in command["environment"]):  # which the hub's library reads when it is imported
        for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
            del sys.modules[name]
    for descriptor, name in ((0, os.devnull), (1, command["output"] + ".out"), (2, command["output"] + ".err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o644), descriptor)
    code = 1
    try:
        exec(command["before"], {})
        sys.modules.pop(command["module"], None)
        sys.argv = [command["module"], *command["arguments"]]
        runpy.run_module(command["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

def wait(pid, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            children.discard(pid)
            return {"code": os.waitstatus_to_exitcode(status)}
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    children.discard(pid)
    return {"code": None}

for line in sys.stdin:
    command = json.loads(line)
    if "pid" in command:
        reply = wait(command["pid"], command["seconds"])
    else:
        pid = os.fork()
        if pid == 0:
            run(command)
        children.add(pid)
        reply = {"pid": pid}
    print(json.dumps(reply), flush=True)
for pid in children:
    os.kill(pid, signal.SIGKILL)
"""


def pytest_collection_finish():
    """Modules stay to the end. Without them a garbage collection, which every refusal of memory makes, takes a thousandth of
    the time."""
    gc.collect()
    gc.freeze()


@dataclass
class Result:
    code: int | None  # exit code, -N for signal N, None after a time-out
    out: str
    err: str


class Command:
    """A started entry point."""

    def __init__(self, server, pid: int, output: Path):
        self.pid, self._server, self._output = pid, server, output

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def output_text(self) -> str:
        return Path(f"{self._output}.out").read_text(errors="replace")

    def error_text(self) -> str:
        return Path(f"{self._output}.err").read_text(errors="replace")

    def wait(self, seconds: float = 600) -> Result:
        reply = self._server.ask({"pid": self.pid, "seconds": seconds})
        out, err = (Path(f"{self._output}{ending}").read_text(errors="replace") for ending in (".out", ".err"))
        return Result(reply["code"], out, err)


class EntryPoints:
    def __init__(self, folder: Path):
        self.folder, self._count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
        environment.pop("WANDB_API_KEY", None)
        self._process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, env=environment, cwd=ROOT)

    def ask(self, command: dict) -> dict:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, module: str, *arguments: str, before: str = "", path: tuple = (), folder: Path = ROOT,
              writes_report: bool = True, **environment: str) -> Command:
        """`before`: Python code that the child runs first, to break something on purpose. `path`: more import folders.
        `writes_report`: the report of a training run takes longer than a tiny run."""
        self._count += 1
        if not writes_report:
            before = f"import grpo.record.metrics; grpo.record.metrics.write_report = lambda *arguments: None\n{before}"
        output = self.folder / str(self._count)
        reply = self.ask({"module": module, "arguments": [str(argument) for argument in arguments], "before": before,
                          "path": [str(entry) for entry in path], "folder": str(folder), "environment": environment,
                          "output": str(output)})
        while not Path(f"{output}.err").exists():
            time.sleep(0.001)
        return Command(self, reply["pid"], output)

    def run(self, module: str, *arguments: str, seconds: float = 600, **options) -> Result:
        return self.start(module, *arguments, **options).wait(seconds)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def entry_points(tmp_path_factory):
    server = EntryPoints(tmp_path_factory.mktemp("entry_points"))
    yield server
    server.close()


# Lengths as rewards: every group has a spread although the policy is never right, so each step updates.
SPREAD = """
from grpo.envs.carry import Carry

class Spread(Carry):
    def score(self, completions):
        scores = super().score(completions)
        for completion, score in zip(completions, scores):
            score.reward = completion.sample / 4 + len(completion.completion_ids) / 100
        return scores
"""


@pytest.fixture(scope="session")
def spread_folder(tmp_path_factory):
    """An import folder with the environment `spread.Spread`."""
    folder = tmp_path_factory.mktemp("spread")
    (folder / "spread.py").write_text(SPREAD)
    return folder


@pytest.fixture
def hurried(monkeypatch):
    """`hurried(is_slow)`: workers give the items that is_slow(item) names a moment only, and others the whole limit, which no
    busy machine may exceed."""
    from grpo.rewards.workers import Workers

    def hurry(is_slow):
        hand_out = Workers._hand_out

        def hand_out_with_limit(self, worker, index, items, outcomes):
            hand_out(self, worker, index, items, outcomes)
            if is_slow(items[index]):
                worker.deadline = time.monotonic() + 0.2

        monkeypatch.setattr(Workers, "_hand_out", hand_out_with_limit)

    return hurry
