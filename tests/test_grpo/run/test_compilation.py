"""The process that compiles beside a run: what it is asked for, what is read from it, and how it ends."""

import json
import subprocess
import sys
import types

import pytest
import torch

import kernels.ahead
import models.rehearsal
from grpo.configuration.launch import load_config
from grpo.run.compilation import Compilation, begin_compiling, describe_failures, rehearsal_of
from grpo.train import seconds_of_compilation
from grpo.warm import chosen_gpu, warm
from models.config import released
from models.rehearsal import GPUS, compile_beside, is_compiled, variants


def process(*lines: str, code: int = 0, first: str = "pass") -> subprocess.Popen:
    """One that prints these lines and ends with this code."""
    text = f"{first}; import os; print({chr(10).join(lines)!r}, flush=True); os._exit({code})"
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, bufsize=0, start_new_session=True)


def goes_on() -> bool:
    return False


def plan_of(*words: str):
    config = load_config("train", ["+experiment=gpt_oss_20b_lora", *words])
    return rehearsal_of(config, released("openai/gpt-oss-20b"), prompt_len=50, dtype=torch.bfloat16)


def test_what_decides_about_kernels_follows_from_the_config():
    plan = plan_of("rollout.prompts_per_step=2", "rollout.group_size=8", "rollout.max_new_tokens=100", "eval.max_prompts=3",
                   "eval.num_samples=2")
    assert (plan.experts, plan.max_rows, plan.max_len, plan.lora.rank) == ("mxfp4", 16, 256, 16)
    assert [draw.is_greedy for draw in plan.draws] == [False, True] and not plan.filters
    assert plan.shares_prompts and plan.activation_checkpointing and not plan.scores
    assert plan_of("eval.max_prompts=40", "eval.num_samples=1", "rollout.prompts_per_step=1").max_rows == 40
    assert plan_of("rollout.max_batch=24").max_rows == 24
    assert all(plan_of(*settings).scores for settings in (
        ("kl.coefficient=0.1",), ("loss=dpo", "optim.sums_log_probs=true"), ("optim.minibatches=2",)))
    filtered = plan_of("rollout.top_p=0.9", "eval.greedy=false")
    assert filtered.filters and filtered.draws == []
    unevaluated = plan_of("eval.every=0", "eval.at_start=false", "eval.at_end=false")
    assert [draw.is_greedy for draw in unevaluated.draws] == [False]


def test_progress_and_failures_are_read_until_the_process_ends():
    counts, compilation = [], Compilation(process("[0, 3]", "[1, 3]", "[2, 3]", "[3, 3]", '["_norm_kernel: no"]'))
    assert compilation.wait(lambda *pair: counts.append(pair), goes_on) > 0
    assert counts == [(0, 3), (1, 3), (2, 3), (3, 3)] and compilation.num_compiled == 3
    assert compilation.failures == ["_norm_kernel: no"] and "(_norm_kernel: no)" in describe_failures(compilation.failures)
    assert compilation.wait(lambda *_: pytest.fail("it has ended"), goes_on) > 0


@pytest.mark.parametrize("code", [0, 9])
def test_a_process_that_dies_is_a_failure_and_not_an_error(code):
    compilation = Compilation(process("[0, 2]", "[1, 2]", code=code))
    compilation.wait(lambda *_: None, goes_on)
    assert compilation.failures == [f"the process that compiles ended with code {code}"]


@pytest.mark.parametrize("stops", [False, True])
def test_a_silent_process_is_ended_as_is_one_of_a_run_that_stops(stops, monkeypatch):
    monkeypatch.setattr("grpo.run.compilation.SILENCE", 0.0 if not stops else 60.0)
    asleep = process(first="import time; time.sleep(60)")
    compilation = Compilation(asleep)
    assert compilation.wait(lambda *_: None, lambda: stops) < 60 and asleep.returncode == -9
    assert compilation.failures == ["the process that compiles ended with code -9"]


def test_ctrl_c_ends_the_process_too():
    def interrupt(*_):
        raise KeyboardInterrupt

    endless = process(first="import time; print([0, 3], flush=True); time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        Compilation(endless).wait(interrupt, goes_on)
    assert endless.wait(30) == -9


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, capfd):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/cache")
    compilation = Compilation(compile_beside(plan_of(), GPUS["H100"]))
    compilation.wait(lambda *_: None, goes_on)
    assert compilation.failures == ["Triton's cache, /dev/null/cache: Not a directory; TRITON_CACHE_DIR names another folder"]
    assert "Traceback" not in capfd.readouterr().err


def test_no_process_starts_without_a_gpu():
    config = load_config("train", ["+experiment=gpt_oss_20b_lora", "device=cpu"])
    settings = {"prompt_len": 50, "device": torch.device("cpu"), "dtype": torch.float32}
    compilation = begin_compiling(config, released("openai/gpt-oss-20b"), **settings)
    assert compilation.process is None and compilation.wait(lambda *_: None, goes_on) >= 0 and compilation.failures == []


def test_what_is_compiled_is_not_rehearsed_again(tmp_path, monkeypatch):
    """Until a kernel leaves Triton's cache, or the plan or the GPU is another."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plan, gpu = plan_of(), GPUS["H100"]
    some = [variant for variant in variants(plan, gpu) if variant.name in ("_advance_kernel", "_bias_dots_kernel")]
    assert len(some) == 2 and not is_compiled(plan, gpu)
    file = models.rehearsal._list_file(plan, gpu)
    file.write_text(json.dumps([(variant.name, variant.cache_key()) for variant in some]))
    assert not is_compiled(plan, gpu)
    assert kernels.ahead.compile_all(some, num_processes=2, progress=lambda *_: None) == []
    assert is_compiled(plan, gpu) and compile_beside(plan, gpu) is None
    assert not is_compiled(plan_of("rollout.max_batch=24"), gpu) and not is_compiled(plan, GPUS["A100-80"])
    next(tmp_path.rglob("_advance_kernel.json")).unlink()
    next(tmp_path.rglob("__grp___advance_kernel.json")).unlink()
    assert not is_compiled(plan, gpu)


def test_the_process_says_what_it_cannot_do(tmp_path, monkeypatch, capfd):
    """A plan that is no plan ends it; the run goes on."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compilation = Compilation(compile_beside("no plan", GPUS["H100"]))
    compilation.wait(lambda *_: None, goes_on)
    assert compilation.failures == ["the process that compiles ended with code 1"]


def test_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_gpu("H200").capability == 90
    for name, reason in ((None, "torch sees none here"), ("V100", "gpu = 'V100': give one of T4"), ("T4", "little is compiled")):
        with pytest.raises(ValueError, match=reason):
            chosen_gpu(name)
    with pytest.raises(ValueError, match="gpu is given twice, gpu=H100 and gpu=H200"):
        warm(["gpu=H100", "+experiment=gpt_oss_20b_lora", "gpu=H200"])
    monkeypatch.setenv("GRPO_PRODUCTS", "library")
    with pytest.raises(ValueError, match="little is compiled"):
        chosen_gpu("H200")


def test_a_line_names_what_is_compiled_after_the_first_step(monkeypatch):
    compiled, lines = [("_dq_kernel", 1.25), ("sort_kernel", 0.5)], []
    monkeypatch.setattr("grpo.train.compiled_meanwhile", lambda: compiled)
    run = types.SimpleNamespace(has_stepped=False, step=1, metrics=types.SimpleNamespace(print=lines.append))
    assert seconds_of_compilation(run) == 1.75 and lines == []
    run.step = 2
    assert seconds_of_compilation(run) == 1.75 and lines == ["compiled _dq_kernel, sort_kernel in step 2: 1.8 s"]
    compiled.clear()
    assert seconds_of_compilation(run) == 0 and len(lines) == 1
