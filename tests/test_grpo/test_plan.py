"""python -m grpo.plan: a table for every GPU, refusals with ways that do fit, and plain errors."""

import json

import pytest

from grpo.config import ConfigError
from grpo.plan import main, report
from models.config import released
from models.memory_plan import GPU_SPECS
from models.rehearsal import GPUS

SMALL = ["rollout.prompts_per_step=1", "rollout.max_new_tokens=512", "model.lora.rank=8", "optim.max_tokens=4096",
         "prompt_tokens=200", "eval.at_start=false", "eval.at_end=false", "eval.every=0"]  # fmt: skip


def test_plans_and_compilations_know_the_same_gpus():
    assert list(GPU_SPECS) == list(GPUS)


@pytest.mark.parametrize("gpu", GPU_SPECS)
def test_20b_is_planned_on_every_gpu(gpu):
    text = report([f"gpu={gpu}", "+experiment=gpt_oss_20b_lora", *SMALL])
    assert text.startswith(f"openai/gpt-oss-20b, experts mxfp4, on {gpu}; prompts of up to 200 tokens")
    assert "rows decoded at once: 8" in text


@pytest.mark.parametrize("gpu", GPU_SPECS)
def test_120b_is_planned_or_refused_on_every_gpu(gpu):
    words = [f"gpu={gpu}", "+experiment=gpt_oss_120b_lora", *SMALL]
    if GPU_SPECS[gpu].num_bytes > 16e9:
        assert "layers streamed, of 36" in report(words)
    else:
        with pytest.raises(ConfigError, match=r"^model.memory_gb = null: 15.51 GB of the GPU do not hold this run"):
            report([*words, "optim.max_tokens=65536", "rollout.prompts_per_step=16"])


def test_each_way_that_a_refusal_names_does_fit():
    words = ["gpu=24", "+experiment=gpt_oss_20b_lora", *SMALL, "model.memory_gb=6", "optim.max_tokens=16384",
             "rollout.prompts_per_step=4"]
    with pytest.raises(ConfigError) as raised:
        report(words)
    assert str(raised.value).startswith("model.memory_gb = 6: 6.00 GB of the GPU do not hold this run; each of these alone fits")
    ways = [way.split(" ")[0] for way in str(raised.value).partition("fits: ")[2].split("; ")]
    assert {way.partition("=")[0] for way in ways} >= {"model.memory_gb", "optim.max_tokens"}
    for way in ways:
        report([word for word in words if word.partition("=")[0] != way.partition("=")[0]] + [way])


def test_a_folder_with_config_json_alone_is_enough(tmp_path):
    config = released("openai/gpt-oss-20b")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf(quantization=config.quantization)))
    there, known = (report(["gpu=L4", "+experiment=gpt_oss_20b_lora", *SMALL, *path])
                    for path in ([f"model.path={tmp_path}"], []))  # fmt: skip
    assert there.splitlines()[1:] == known.splitlines()[1:]


def line_of(text, name):
    return next([float(number) for number in line.split()[-2:]] for line in text.splitlines() if line.startswith(f"  {name}  "))


def test_a_plan_of_several_gpus_is_that_of_one_among_them():
    words = ["gpu=H200", "+experiment=gpt_oss_20b_full", *SMALL, "model.lora=null"]
    alone, four = report(words), report([*words, "gpus=4", "distributed.shard=true", "rollout.prompts_per_step=4"])
    assert "on each of 4 H200; prompts" in four
    assert line_of(four, "optimizer")[1] == pytest.approx(line_of(alone, "optimizer")[1] / 4, abs=1e-3)
    words = ["gpu=H200", "+experiment=gpt_oss_120b_lora", *SMALL]
    alone, pair, pairs = (report([*words, *more]) for more in (
        [], ["distributed.expert_parallel=2"], ["distributed.expert_parallel=2", "gpus=8", "rollout.prompts_per_step=4"]))
    for text in (pair, pairs):
        assert line_of(text, "experts") == pytest.approx([size / 2 for size in line_of(alone, "experts")], abs=1e-3)
    assert line_of(pairs, "gradients")[1] > line_of(pair, "gradients")[1]  # those of other pairs, on their way


def test_full_training_of_120b_is_refused_on_any_number_of_gpus_with_the_reason():
    words = ["gpu=H200", "+experiment=gpt_oss_120b_lora", *SMALL, "rollout.prompts_per_step=64", "optim=full",
             "model.train=full", "model.lora=null", "model.experts=bf16", "optim.max_tokens=8192"]  # fmt: skip
    reason = "147.02 GB of the GPU do not hold this run (while sampling each GPU has all weights, 233.66 GB, however many train"
    for more in ["gpus=8"], ["gpus=8", "distributed.shard=true"], ["gpus=64", "distributed.shard=true"]:
        with pytest.raises(ConfigError) as raised:  # 116,829,156,672 parameters of 2 bytes, by the published shapes
            report([*words, *more])
        assert reason in str(raised.value) and "; each of these alone fits: model.memory_gb=" in str(raised.value)
    with pytest.raises(ConfigError) as raised:  # what does not fit there is the update
        report(["gpu=H200", "+experiment=gpt_oss_20b_full", *SMALL, "model.lora=null", "optim.moments=fp32", "model.host_gb=1"])
    assert "do not hold this run; each of these alone fits" in str(raised.value)


def test_a_larger_gpu_is_capped_and_memory_beyond_the_gpu_is_not_planned_with():
    assert "in all, of 15.00" in report(["gpu=H200", "+experiment=gpt_oss_20b_lora", *SMALL, "model.memory_gb=15"])
    assert "in all, of 24.00" in report(["gpu=24", "+experiment=gpt_oss_20b_lora", *SMALL, "model.memory_gb=500"])


@pytest.mark.parametrize("words, message", [
    ([], "gpu: required; give gpu=NAME with one of T4, L4, 4090, "),
    (["gpu=H20"], "gpu = 'H20': give gpu=NAME with one of T4, "),
    (["gpu=-3"], "gpu = '-3': give "),
    (["gpu=L4", "prompt_tokens=many"], "prompt_tokens = 'many': must be a number of tokens, at least 1"),
    (["gpu=L4", "prompt_tokens=²"], "prompt_tokens = '²': must be a number of tokens, at least 1"),
    (["gpu=L4", "prompt_tokens=131072"], "prompt_tokens = '131072': must be a number of tokens, at least 1 and below 131072"),
    (["gpu=L4", "gpu=H200"], "gpu is given twice, gpu=L4 and gpu=H200: leave one out"),
    (["gpu=3090"], "gpu = '3090': give gpu=NAME with one of T4, L4, "),
    (["gpu=L4", "gpus=0"], "gpus = '0': must be a number of GPUs, at least 1"),
    (["gpu=L4", "gpus=999"], "rollout.prompts_per_step = 8: must be at least the number of ranks (999)"),
    (["gpu=L4", "distributed.expert_parallel=3"], "distributed.expert_parallel = 3: must divide the 32 experts of a layer"),
    (["gpu=L4", "gpus=3", "distributed.expert_parallel=2"], "distributed.expert_parallel = 2: the number of processes must be a"),
    (["gpu=L4", "distributed.shard=true", "model.train=full", "model.lora=null"], "distributed.shard = True: give gpus=N"),
    (["gpu=L4", "optim.max_token=5"], "unknown key optim.max_token; did you mean optim.max_tokens?"),
    (["gpu=L4", "rollout.group_size=1"], "rollout.group_size = 1: must be at least 2"),
])  # fmt: skip
def test_mistakes_are_told(words, message):
    with pytest.raises(ValueError) as raised:
        report(["+experiment=gpt_oss_20b_lora", *words])
    assert str(raised.value).startswith(message)


def test_completions_end_where_the_models_sequences_do():
    for new_len in (131072, 500000):
        text = report(["gpu=H200", "+experiment=gpt_oss_20b_lora", f"rollout.max_new_tokens={new_len}"])
        assert "prompts of up to 1024 tokens" in text and "in a micro-batch 131,072\n" in text


def test_a_cache_too_small_for_a_row_is_refused_by_the_key_that_makes_it_so():
    words = ["gpu=L4", "+experiment=gpt_oss_20b_lora", *SMALL]
    with pytest.raises(ConfigError, match=r"rollout.cache_gb=0.045 \(now 0.01\)$"):
        report([*words, "rollout.cache_gb=0.01"])
    assert "rows decoded at once: 1;" in report([*words, "rollout.cache_gb=0.045"])


def test_the_plan_is_for_the_dtype_of_the_run():
    words = ["gpu=H100", "+experiment=gpt_oss_20b_lora", *SMALL]
    half, wide = report([*words, "dtype=float16"]), report([*words, "dtype=bfloat16"])
    assert half != wide and half == report(["gpu=H100", *words[1:], "dtype=float16"])


def test_the_command_prints_its_table_and_ends_with_2_where_nothing_fits(capsys):
    assert main(["gpu=L4", "+experiment=gpt_oss_20b_lora", *SMALL]) == 0
    assert "GPU memory in GB            sampling    update" in capsys.readouterr().out
    assert main(["gpu=4", "+experiment=gpt_oss_20b_lora"]) == 2
    assert "config error: model.memory_gb = null: 3.92 GB of the GPU do not hold this run" in capsys.readouterr().err
    assert main([]) == 0 and "python -m grpo.plan" in capsys.readouterr().out
