"""Makes a step of a run again, bit for bit, and shows what each of its tokens did.

    python -m grpo.explain run=runs/NAME step=12                    all completions of step 12, the tokens of one
    python -m grpo.explain run=runs/NAME step=12 sample=3           the tokens of that one
        epoch=2 pages=4 output=FILE.html                            of the second epoch; a page with 4 completions, its place

The newest checkpoint before the step is continued in a folder of its own, by the trainer's own functions, up to the step; the
run's folder gets nothing but the page, explain/step_000012.html. Metrics of every step made again (loss, gradient norm, rewards,
lengths) and the step's logged completions (tokens, rewards, log-probs) must equal the run's own to the last bit. If they do not,
it says so, says what differs between then and now (code, versions, device), and ends with exit code 1. Settings are those of the
step, also where a resume has changed some since. An environment is called again: tools, judges and clocks outside this process
may answer otherwise.
"""
import contextlib
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch

from grpo.batch import Completion
from grpo.config import (
    ConfigError,
    Device,
    TrainConfig,
    read_saved_config,
    run_folder,
    save_config,
    shown,
)
from grpo.configuration.command_line import refuse_repeats
from grpo.configuration.launch import CONFIG_ERROR, FAILED, refuse
from grpo.configuration.nodes import WandbMode
from grpo.configuration.places import anchor_paths
from grpo.distributed.place import check_alone
from grpo.groups import Groups, dead_groups, recorded_log_probs
from grpo.record.explanation import ExplainedCompletion, Explanation, as_page, as_text
from grpo.record.jsonl import json_safe, read_records
from grpo.record.outputs import files_of_env, keep_inputs, keep_run_files, write_output
from grpo.record.summary import COMPLETIONS_FILE, METRICS_FILE, read_summary
from grpo.record.terminal import clean, hold_standard_streams, print_error
from grpo.run.checkpoint import LoadError, checkpoints_of, damage_of
from grpo.run.failures import describe_failure
from grpo.run.identity import earlier_settings, provenance
from grpo.run.lock import lock_run
from grpo.run.start import Run, await_kernels, prepare_weights, start
from grpo.token_record import TokenRecord, UpdateObserver
from grpo.train import take_step

NOT_REPRODUCED = 1
_VOLATILE = ("time/", "memory/")  # metrics that no two runs have alike


@dataclass
class Request:
    run: Path
    step: int  # finished steps, as in metrics.jsonl: the first is 1
    sample: int | None = None  # of the step's completions; None: that with the largest share of the gradient
    epoch: int = 1  # of optim.epochs
    pages: int = 8  # completions of the page, where sample names none
    output: Path | None = None  # of the page


def main(words: list[str]) -> int:
    hold_standard_streams()
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    request = None
    try:
        check_alone("grpo.explain")
        request = read_request(words)
        explanation = explain(request)
        samples = [request.sample] if request.sample is not None else explanation.by_share[:request.pages]
        output = request.output or request.run / "explain" / f"step_{request.step:06d}.html"
        output.parent.mkdir(parents=True, exist_ok=True)
        write_output(output, as_page(explanation, samples))
        print(clean(as_text(explanation, samples[:1]), sys.stdout.encoding))
        print(f"\npage     {shown(output)}", flush=True)
    except ConfigError as error:
        refuse(error)
        return CONFIG_ERROR
    except Exception as error:
        failure = describe_failure(error, log=None, config=request)
        if failure.code == FAILED and failure.reason == "failed":
            raise
        print_error("error", failure.message)
        return failure.code
    if not explanation.is_reproduced:
        print_error("NOT REPRODUCED", "; ".join(explanation.checks))
    return 0 if explanation.is_reproduced else NOT_REPRODUCED


def read_request(words: list[str]) -> Request:
    """The request of a command line of KEY=VALUE words. Raises ConfigError."""
    refuse_repeats(words)
    values = dict(word.partition("=")[::2] for word in words)
    allowed = ("run", "step", "sample", "epoch", "pages", "output")
    for key in values:
        if key not in allowed:
            raise ConfigError(f"{key}: no such key; write KEY=VALUE with one of {', '.join(allowed)}")
    numbers = {}
    for key, least in (("step", 1), ("sample", 0), ("epoch", 1), ("pages", 1)):
        if key in values:
            if not values[key].isdecimal() or int(values[key]) < least:
                raise ConfigError(f"{key} = {values[key]!r}: must be a whole number of at least {least}")
            numbers[key] = int(values[key])
    for key in ("run", "step"):
        if not values.get(key):
            raise ConfigError(f"{key} is required: python -m grpo.explain run=runs/NAME step=N")
    output = Path(values["output"]).expanduser() if values.get("output") else None
    if output is not None and output.is_dir():
        raise ConfigError(f"output = {values['output']!r}: is a folder; name a file, such as {values['output']}/step.html")
    if output is not None:
        keep_run_files(output, "output = ")
    return Request(Path(values["run"]).expanduser(), **numbers, output=output)


def explain(request: Request) -> Explanation:
    """Makes the step again and compares. Raises ConfigError where that cannot be done."""
    earlier = earlier_settings(request.run)
    config = read_saved_config(next((path for last, path in earlier.items() if last >= request.step),
                                    request.run / "config.yaml"))
    keep_inputs(None if request.output is None else str(request.output), files_of_env(config.env))
    recorded = {row["step"]: row for row in read_records(request.run / METRICS_FILE) if "loss" in row and row["step"] > 0}
    first = starting_step(request, config, recorded)
    if "groups/live" in recorded[request.step]:  # of data, the count is known when the step is made
        num_groups = sum(recorded[request.step][f"groups/{kind}"] for kind in ("live", "surplus", "dropped"))
        check_sample(request, num_groups * config.rollout.group_size)
    differences = differences_from(request.run, config) + [
        f"settings: steps up to {last} were made with those of {path.name}, and now with those of step {request.step}"
        for last, path in earlier.items() if first < last < request.step]
    with tempfile.TemporaryDirectory(prefix="explain-") as folder, contextlib.redirect_stdout(sys.stderr):
        copy = copied_run(config, request.run, first, Path(folder))
        with lock_run(run_folder(copy)) as lock:
            try:
                run, state = start(copy, lock, lambda: False)
            except LoadError as error:  # which names the copy
                source = checkpoints_of(request.run)[first]
                raise LoadError(f"{shown(source)} is damaged ({damage_of(source)}); restore it from a copy, or move it away: an "
                                "older checkpoint is taken where there is one") from error
            prepare_weights(run, state)
            await_kernels(run)
            try:
                metrics, wrong = replay(run, request, recorded)
            finally:
                run.metrics.display.stop()
    stats, groups, tokens = metrics
    compared, faults = compare_completions(request, groups)
    wrong += faults
    checks = [f"made again from the checkpoint of step {first}: {request.step - first} step{'s' * (request.step - first > 1)}, "
              f"{len(recorded[request.step])} metrics each and {compared} logged completions compared"]
    checks += [f"NOT REPRODUCED: {text}" for text in wrong] or ["reproduced exactly: every metric, token, reward and log-prob"]
    if wrong:
        checks.append("what differs from when the run was made: " + ("; ".join(differences) or "nothing that is on record"))
    else:
        checks += [f"although this differs from when the run was made: {text}" for text in differences]
    completions = explained_completions(run, groups, tokens, request)
    return Explanation(f"{config.name}, step {request.step}", checks, not wrong, stats, completions)


def starting_step(request: Request, config: TrainConfig, recorded: dict[int, dict]) -> int:
    """The newest checkpoint before the step. Raises ConfigError if there is none, or no such step."""
    name, saved = shown(request.run), list(checkpoints_of(request.run))
    if request.step not in recorded:
        has = f"steps {min(recorded)} to {max(recorded)}" if recorded else "no finished step"
        raise ConfigError(f"step = {request.step}: {name} has {has} in {METRICS_FILE}")
    if request.epoch > config.optim.epochs:
        raise ConfigError(f"epoch = {request.epoch}: the run has optim.epochs = {config.optim.epochs}")
    if not saved:
        raise ConfigError(f"run = {str(request.run)!r}: it has no checkpoints, so no step can be made again; train with "
                          "checkpoint.every=N, and with checkpoint.keep=N to keep more than the newest")
    before = [step for step in saved if step < request.step]
    if not before:
        later = [step for step in recorded if step > saved[0]]
        can = f"steps {saved[0] + 1} to {max(later)} can be explained" if later else "no later step is finished"
        raise ConfigError(f"step = {request.step}: {name} has checkpoints of steps {', '.join(map(str, saved))}, none of them "
                          f"before it; {can}. checkpoint.keep=N keeps more of them")
    return before[-1]


def check_sample(request: Request, num_completions: int) -> None:
    """Raises ConfigError for a sample that is none of the step's completions."""
    if request.sample is not None and request.sample >= num_completions:
        raise ConfigError(f"sample = {request.sample}: step {request.step} has samples 0 to {num_completions - 1}")


def differences_from(run_dir: Path, config: TrainConfig) -> list[str]:
    """What of code, versions and device is not as summary.json has it. Raises ConfigError for another kind of device."""
    try:
        then = read_summary(run_dir) or {}
    except (OSError, ValueError):
        then = {}
    is_gpu = torch.cuda.is_available() and config.device != Device.cpu
    now = provenance(seed=config.seed, device=torch.device("cuda" if is_gpu else "cpu"))
    if then.get("device") is not None and (then["device"] == "CPU") != (not is_gpu):
        hint = "set CUDA_VISIBLE_DEVICES= to hide the GPU" if is_gpu else "explain it on a machine with that GPU"
        raise ConfigError(f"run = {str(run_dir)!r}: it was made on {then['device']}, this would be on {now['device']}, whose "
                          f"bits are others; {hint}")
    pairs = {key: (then.get(key), now[key]) for key in ("commit", "device")}
    pairs |= {name: ((then.get("versions") or {}).get(name), version) for name, version in now["versions"].items()}
    return [f"{name} {before}, now {after}" for name, (before, after) in pairs.items() if before is not None and before != after]


def copied_run(config: TrainConfig, run_dir: Path, step: int, folder: Path) -> TrainConfig:
    """A run in `folder` that resumes from that checkpoint, and records nothing elsewhere. Returns its config."""
    copy = replace(config, output_dir=str(folder), resume=True, wandb=replace(config.wandb, mode=WandbMode.disabled),
                   distributed=replace(config.distributed, expert_parallel=1))  # one process has all experts
    anchor_paths(copy)
    target = run_folder(copy) / "checkpoints"
    target.mkdir(parents=True)
    source = checkpoints_of(run_dir)[step]
    (target / source.name).symlink_to(source.resolve())
    save_config(config, target.parent / "config.yaml")
    shutil.copy(run_dir / METRICS_FILE, target.parent)
    return copy


def replay(run: Run, request: Request, recorded: dict[int, dict]) -> tuple[tuple[dict, Groups, TokenRecord | None], list[str]]:
    """Takes the steps up to the one that is asked for, which is observed. Returns its metrics, groups and tokens, and a line for
    each metric of each step that is not the recorded one."""
    wrong = []
    while run.step < request.step:
        if run.step == request.step - 1:
            run.observer = UpdateObserver(run.policy.config, run.optimizer)
        stats, groups = take_step(run)
        row = recorded.get(run.step, {})
        ours = json_safe({name: value if isinstance(value, int) else float(value) for name, value in stats.items()})
        for name in sorted(row.keys() | ours.keys()):
            if name == "step" or name.startswith(_VOLATILE) or name.endswith("_per_s") or row.get(name) == ours.get(name):
                continue
            wrong.append(f"step {run.step}, {name}: {row.get(name)} recorded, {ours.get(name)} now")
    tokens = run.observer.record(request.epoch - 1, num_epochs=run.config.optim.epochs) if groups.completions else None
    return (stats, groups, tokens), wrong


def compare_completions(request: Request, groups: Groups) -> tuple[int, list[str]]:
    """How many logged completions of the step there are, and a line for each that is not the one made again."""
    made = {(completion.prompt.id, completion.sample): (completion, verdict) for completion, verdict in groups.scored}
    rows = [row for row in read_records(request.run / COMPLETIONS_FILE)
            if row["step"] == request.step and row["split"] == "train"]
    wrong = []
    for row in rows:
        whom = f"prompt {row['prompt_id']}, sample {row['sample']}"
        completion, verdict = made.get((row["prompt_id"], row["sample"]), (None, None))
        if completion is None:
            wrong.append(f"{whom}: recorded, and not sampled now")
        elif row["token_ids"] != completion.completion_ids:
            both = zip(row["token_ids"], completion.completion_ids)
            wrong.append(f"{whom}: other tokens from token {sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))} on")
        elif row.get("log_probs") is not None and row["log_probs"] != recorded_log_probs(completion):
            wrong.append(f"{whom}: other log-probs")
        elif row["reward"] != json_safe(verdict.reward):
            wrong.append(f"{whom}: reward {row['reward']} recorded, {verdict.reward} now")
    return len(rows), wrong


def explained_completions(run: Run, groups: Groups, tokens: TokenRecord | None, request: Request) -> list[ExplainedCompletion]:
    """The step's completions, each with its trained tokens. Raises ConfigError for a sample that is not there."""
    check_sample(request, len(groups.scored))
    trained = {id(completion): row for row, completion in enumerate(groups.completions)}
    dead = dead_groups([completion for completion, _ in groups.scored if completion.reward is not None], run.config)
    return [explained_completion(run, completion, trained.get(id(completion)), groups, tokens, dead)
            for completion, _ in groups.scored]


def why_left_out(completion: Completion, dead: set[int], config: TrainConfig) -> str:
    """Why a step did not train on a completion; `dead`: ids of its groups without a gradient."""
    if completion.reward is None:
        return "it has no reward"
    if completion.prompt.id in dead:
        return "its group had equal rewards"
    if config.optim.mask_truncated and completion.is_truncated:
        return "it was cut off (optim.mask_truncated)"
    return "groups of prompts before it were enough for the step"


def explained_completion(run: Run, completion: Completion, row: int | None, groups: Groups, tokens: TokenRecord | None,
                         dead: set[int]) -> ExplainedCompletion:
    decode = run.tokenizer.decode
    own = None if row is None else tokens.of(row)
    return ExplainedCompletion(
        prompt=decode(completion.prompt.token_ids, keep_special=True), prompt_id=completion.prompt.id, sample=completion.sample,
        reward=completion.reward, advantage=None if row is None else groups.advantages[row],
        finish_reason=completion.finish_reason, num_tokens=completion.num_policy_tokens, tokens=own,
        left_out=why_left_out(completion, dead, run.config) if own is None else None,
        texts=[] if own is None else [decode([token], keep_special=True) for token in own.tokens.tolist()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
