"""Starts the ranks of a program, as torchrun would, and says how they ended."""

import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from paths import FIXTURES, ROOT

# A small run whose completions.jsonl has every completion with its log-probs, and what makes it train an adapter of a checkpoint.
RUN = ("+experiment=smoke", "name=run", "steps=10", "warmup=null", "env._target_=spread.Spread", "rollout.prompts_per_step=4",
       "rollout.group_size=3", "rollout.max_new_tokens=6", "rollout.refill_rounds=1", "optim.max_tokens=60",
       "optim.minibatches=2", "kl.coefficient=0.1", "eval.every=5", "eval.max_prompts=3", "eval.at_end=false",
       "checkpoint.every=2", "log.num_completions=30", "distributed.timeout=60")
LORA = "{rank: 2, alpha: 4.0, targets: [q_proj, o_proj, router, experts], train_sinks: true, train_norms: false}"
ADAPTER = (f"model.path={FIXTURES / 'tiny_mxfp4'}", f"model.tokenizer={FIXTURES / 'tokenizer_brief'}",
           "model.architecture=null", "model.train=lora", f"model.lora={LORA}")
# Every group has a spread, but for one now and then, which is replaced; the numbers show each token of a completion.
SPREAD = """
import zlib
from grpo.envs.carry import Carry
from grpo.environment import Score

def judge(completion):
    return zlib.crc32(repr(completion.completion_ids).encode()) % 11 / 10 if completion.prompt.id % 5 != 3 else 0.0

class Spread(Carry):
    def score(self, completions):
        return [Score(judge(completion), {}, {}, False) for completion in completions]
"""
# Ends this process at the given call of a function: by a signal, or never.
AT_CALL = """
import os, pkgutil, signal, time
module = pkgutil.resolve_name("{module}")
original, calls = module.{name}, []
def counted(*arguments, **keywords):
    calls.append(None)
    if len(calls) == {count}:
        {action}
    return original(*arguments, **keywords)
module.{name} = counted
"""
HURRY = "import grpo.distributed.ranks as ranks\nranks.GRACE_SECONDS = 1.0\nranks.LOOK_SECONDS = 0.1\n"


def at_call(place: str, count: int, action: str) -> str:
    module, _, name = place.rpartition(".")
    return AT_CALL.format(module=module, name=name, count=count, action=action)


# At a run's end, writes the bytes that this rank holds for each trained parameter: itself, its gradient, its state.
HELD = """
import json
import grpo.run.finish as finish
export = finish.export_policy
def measured(run):
    run.optimizer.allocate_gradients()
    state = run.optimizer.state_dict().items()
    held = {name: [parameter.untyped_storage().nbytes(), parameter.grad.nbytes,
                   sum(tensor.nbytes for key, tensor in state if key.partition(".")[2] == name)]
            for name, parameter in run.policy.trainable_parameters().items()}
    run.optimizer.zero_grad()
    (run.run_dir / f"held_{0 if run.ranks is None else run.ranks.rank}.json").write_text(json.dumps(held))
    return export(run)
finish.export_policy = measured
"""


@dataclass
class Ended:
    codes: list[int]
    out: list[str]
    errors: list[str]

    @property
    def message(self) -> str:
        """The only error that the ranks printed together."""
        lines = [line for text in self.errors for line in text.splitlines() if re.match(r"(error|stopped|config error):", line)]
        assert len(lines) == 1, self.errors
        return lines[0]


def run_ranks(entry_points, module: str, num_ranks: int, *arguments: str, before: dict[int, str] | None = None,
              own: dict[int, tuple] | None = None, port: int | None = None, **options) -> Ended:
    """before, own: code that a rank runs first, and arguments that it alone has."""
    port = port or free_port()
    commands = [entry_points.start(
        module, *arguments, *(own or {}).get(rank, ()), before=HURRY + (before or {}).get(rank, ""), RANK=str(rank),
        LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), **options) for rank in range(num_ranks)]
    results = [command.wait(120) for command in commands]
    return Ended([result.code for result in results], [result.out for result in results], [result.err for result in results])


def launch_alone(num_ranks: int, modules: Path, *arguments: str) -> None:
    """A run by processes of its own, which may use GPUs; one rank is started without torchrun."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
    path = os.pathsep.join([str(modules), str(ROOT), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run([sys.executable, *start, "-m", "grpo.train", *arguments], capture_output=True, text=True, timeout=300,
                           env=os.environ | {"PYTHONPATH": path}, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
