"""Ranks that divide a model's weights, gradients and optimizer state: the bytes of one process, on any number of ranks."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from started_ranks import at_call, launch_alone, run_ranks

from grpo.config import ConfigError, Train
from grpo.distributed.settings import Reduction
from grpo.distributed.shards import check_shards
from grpo.optim import LearningRate, Optimizer
from models.adam_state import can_divide

RUN = ("+experiment=smoke", "name=run", "steps=3", "warmup=null", "env._target_=spread.Spread", "rollout.prompts_per_step=4",
       "rollout.group_size=3", "rollout.max_new_tokens=6", "rollout.refill_rounds=0", "optim.max_tokens=60",
       "optim.max_grad_norm=0.5", "eval.every=0", "eval.max_prompts=2", "eval.at_start=false", "eval.at_end=false",
       "checkpoint.every=2", "distributed.timeout=60")
# as in configs/optim/full.yaml: state and rounding that depend on an element's place in its parameter
LOW = ("dtype=bfloat16", "optim.moments=int8", "optim.weights=stochastic", "optim.lr=1e-2", "optim.minibatches=2")
STOP = "os.kill(os.getpid(), signal.SIGTERM)"


@pytest.fixture(scope="module")
def launch(entry_points, modules):
    def run(num_ranks: int, output_dir: Path, *arguments: str, **options):
        return run_ranks(entry_points, "grpo.train", num_ranks, *RUN, f"output_dir={output_dir}", *arguments,
                         writes_report=False, path=(modules,), **options)

    return run


def assert_equal_runs(run: Path, other: Path) -> None:
    for file in ("checkpoints/step_000003/tensors.safetensors", "model/model.safetensors", "completions.jsonl"):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    ("kl.coefficient=0.1", "eval.every=1", "checkpoint.best=eval/reward"), LOW,
    ("dtype=bfloat16", "model.activation_checkpointing=true"),
    ("dtype=bfloat16", "optim.weights=compensated", "optim.max_grad_norm=null")])
def test_four_ranks_stopped_within_an_update_and_resumed_on_two_have_the_bytes_of_one(launch, tmp_path, settings):
    assert launch(1, tmp_path / "one", *settings).codes == [0]
    ended = launch(4, tmp_path / "more", "distributed.shard=true", *settings,
                   before={3: at_call("grpo.update.token_stats", 2, STOP)})
    assert ended.codes == [75] * 4, ended.errors
    ended = launch(2, tmp_path / "more", "distributed.shard=true", "resume=true", *settings)
    assert ended.codes == [0, 0], ended.errors
    assert_equal_runs(tmp_path / "more/run", tmp_path / "one/run")


@pytest.mark.slow
def test_a_rank_that_fails_in_a_pass_ends_all_and_the_last_checkpoint_stands(launch, tmp_path):
    ended = launch(2, tmp_path, "distributed.shard=true",
                   before={1: at_call("grpo.update.loss_and_stats", 3, "raise KeyError('no such loss')")})
    assert ended.codes == [1, 1] and "rank 1" in ended.message and "no such loss" in ended.message
    assert (tmp_path / "run/checkpoints/step_000000").is_dir()


@pytest.mark.parametrize("moments, weights, dtype", [("int8", "stochastic", torch.bfloat16), ("int8", "master", torch.bfloat16),
                                                     ("fp32", "compensated", torch.bfloat16), ("int8", "master", torch.float32)])
def test_parts_of_a_parameter_are_updated_as_the_whole_is(moments, weights, dtype):
    whole = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    rate = LearningRate(0.01, 0, "constant", None, 0.1, total_steps=9)

    def make(tensors: dict[str, torch.Tensor], **settings) -> Optimizer:
        return Optimizer({name: torch.nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}, rate, betas=(0.9, 0.99),
                         eps=1e-8, weight_decay=0.1, max_grad_norm=math.inf, moments=moments, weights=weights, **settings)

    alone = make({"other": whole, "matrix": whole})
    parts = [make({"other": whole, "matrix": whole[2 * rank:2 * rank + 2]}, starts={"matrix": 512 * rank}) for rank in range(2)]
    for step in range(3):
        gradients = torch.randn(2, 4, 256, generator=torch.Generator().manual_seed(step + 1)).to(dtype)
        for optimizer, rows in ((alone, slice(None)), (parts[0], slice(0, 2)), (parts[1], slice(2, 4))):
            optimizer.add("other", [gradient.view(-1) for gradient in gradients])
            optimizer.add("matrix", [gradient[rows].reshape(-1) for gradient in gradients])
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(torch.cat([part.params["matrix"] for part in parts]), alone.params["matrix"])
    assert torch.equal(parts[1].params["other"], alone.params["other"])
    assert not torch.equal(alone.params["matrix"], whole)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("more", [(), ("model.activation_checkpointing=true",)])
def test_two_gpus_that_divide_the_model_have_the_bytes_of_one(modules, tmp_path, more):
    for num_ranks in (1, 2):
        launch_alone(num_ranks, modules, *RUN, *LOW, "device=cuda", "kl.coefficient=0.1", *more,
                     f"output_dir={tmp_path / str(num_ranks)}", f"distributed.shard={num_ranks == 2}")
    assert_equal_runs(tmp_path / "2/run", tmp_path / "1/run")


def test_what_is_divided_has_equal_parts_of_whole_blocks():
    assert can_divide(torch.empty(32, 16, 8), 4)
    assert not can_divide(torch.empty(32, 16, 8), 32)  # 128 elements: half a block of the state
    assert not can_divide(torch.empty(6, 1024), 4)


@pytest.mark.parametrize("changes, message", [
    ({"train": Train.lora}, "model.train = 'lora' trains an adapter, which is small; set model.train=full"),
    ({"reduction": Reduction.fast}, "set distributed.reduction=ordered .now 'fast'.")])
def test_settings_with_which_a_model_cannot_be_divided_are_refused(changes, message):
    given = {"train": Train.full, "reduction": Reduction.ordered} | changes
    config = SimpleNamespace(distributed=SimpleNamespace(shard=True, reduction=given["reduction"]),
                             model=SimpleNamespace(train=given["train"]))
    with pytest.raises(ConfigError, match=message):
        check_shards(config)
