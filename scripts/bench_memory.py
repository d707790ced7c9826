"""Trains a few GRPO steps within less GPU memory than there is, each case in a process of its own, and watches the whole GPU.

    python scripts/random_checkpoint.py /dev/shm/gpt-oss-20b --size 20b --dtype mxfp4
    python scripts/bench_memory.py --checkpoint /dev/shm/gpt-oss-20b --cases free:2048x8 15.0:2048x8 10:512x8 [--out FOLDER]

A case is GB:LENGTHxGROUP, then any keys of grpo.train after further colons: the process may use so many 1e9 bytes of the GPU
(model.memory_gb; `free`: no bound) for a group of so many sequences of about LENGTH tokens with the prompt's --prompt-tokens.
Weights are random, so the reward is one with spread (the share of even token ids).

One JSON line per case. used_gb: the most memory of the GPU that nvidia-smi saw in use, everything counted, sampled every 20 ms or
so: no other process may use this GPU. seconds: of each step, update_seconds: of its update; total_seconds: of the whole process.
memory/peak_gb, memory/planned_gb: what the run itself says of both. same_as_free: whether the adapter at the end has the same
bytes as that of the last free case with the same length, group and keys; null without one.
"""
import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REWARD = """
def even(completions, completion_ids, **columns):
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]
"""
CHAT_TOKENS = 235  # of a prompt beside its question, whose numbers of three digits take four tokens each with a random checkpoint


class GpuWatch:
    """The most memory in use on GPU 0, MiB, between start and stop, as nvidia-smi reports it."""

    def __enter__(self) -> "GpuWatch":
        self.most = 0
        self._process = subprocess.Popen(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=20"],
            stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def _read(self) -> None:
        for line in self._process.stdout:
            self.most = max(self.most, int(line))

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()


def run_case(case: str, checkpoint: Path, folder: Path, *, prompt_tokens: int, steps: int, timeout: float) -> dict:
    """Trains, and returns the measurements."""
    budget, shape, *keys = case.split(":")
    length, group = map(int, shape.split("x"))
    folder.mkdir(parents=True)
    draw = random.Random(0)
    count = (prompt_tokens - CHAT_TOKENS + 1) // 4
    questions = [" ".join(str(draw.randrange(100, 1000)) for _ in range(count)) for _ in range(64)]
    rows = [{"question": question, "answer": "1"} for question in questions]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    command = [
        sys.executable, "-m", "grpo.train", "+experiment=gpt_oss_20b_lora", f"model.path={checkpoint}",
        f"env.path={folder / 'data.jsonl'}", f"env.rewards={folder / 'rewards.py'}:even", f"steps={steps}",
        f"env.max_prompt_tokens={prompt_tokens}", "rollout.prompts_per_step=1", f"rollout.group_size={group}",
        f"rollout.max_new_tokens={length - prompt_tokens}", "rollout.refill_rounds=0", "eval.at_start=false", "eval.at_end=false",
        "eval.every=0", "checkpoint.every=0", "name=run",
        f"output_dir={folder}", "wandb.mode=disabled", *keys]
    if budget != "free":
        command.append(f"model.memory_gb={budget}")
    started = time.perf_counter()
    with GpuWatch() as watch, open(folder / "log", "w") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            code = "timeout"
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()] \
        if (folder / "run/metrics.jsonl").exists() else []
    steps_done = [line for line in lines if "time/step" in line]
    result = {"case": case, "exit": code, "used_gb": round(watch.most * 2**20 / 1e9, 3),
              "seconds": [round(line["time/step"], 2) for line in steps_done],
              "update_seconds": [round(line["time/update"], 2) for line in steps_done],
              "total_seconds": round(time.perf_counter() - started, 1),
              "tokens": steps_done[-1]["num_tokens"] if steps_done else 0}
    result |= {name: value for name, value in (steps_done[-1] if steps_done else {}).items() if name.startswith("memory/")}
    adapter = sorted((folder / "run").glob("adapter/*.safetensors"))
    result["adapter"] = hashlib.sha256(adapter[0].read_bytes()).hexdigest()[:16] if adapter else None
    if code != 0:
        result["log"] = (folder / "log").read_text()[-1500:]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=354)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a case")
    parser.add_argument("--out", type=Path, help="keeps the runs here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        free: dict[str, str] = {}  # the adapter of each free case, by shape and keys
        for number, case in enumerate(args.cases):
            result = run_case(case, args.checkpoint, (args.out or Path(temporary)) / f"{number}",
                              prompt_tokens=args.prompt_tokens, steps=args.steps, timeout=args.timeout)
            budget, _, kind = case.partition(":")
            if budget == "free":
                free[kind] = result["adapter"]
            result["same_as_free"] = free.get(kind) and free[kind] == result["adapter"]
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
