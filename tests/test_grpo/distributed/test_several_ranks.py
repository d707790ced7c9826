"""Runs of 1, 2 and 4 ranks on the CPU, by gloo: the same bytes for any number, and one message where a rank fails."""

import json
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paths import FIXTURES
from started_ranks import ADAPTER, HELD, RUN, Ended, at_call, run_ranks
from tiny_models import fill_trainable

from grpo.config import ConfigError, Device, Train
from grpo.distributed.experts import check_sharing
from models.formats.hugging_face import load_model
from models.formats.peft import save_adapter
from models.lora import LoraConfig, attach_lora

SHARED = (*ADAPTER, "distributed.expert_parallel=2")
BRIEF = ("eval.every=0", "eval.at_start=false", "kl.coefficient=0", "optim.minibatches=1")  # for runs that fail
KILL, HANG, STOP = "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(1e6)", "os.kill(os.getpid(), signal.SIGTERM)"
LAST = "checkpoints/step_000010/tensors.safetensors"
# from then on, when both ranks are there: a limit for the start would depend on how busy the machine is
SHORTEN = "import gc; [setattr(item, 'timeout', 1.0) for item in gc.get_objects() if type(item).__name__ == 'Ranks']"


@pytest.fixture(scope="module")
def launch(entry_points, modules):
    """Starts the ranks of a run, as torchrun would, and waits for all of them."""
    def run(num_ranks: int, output_dir: Path, *arguments: str, **options) -> Ended:
        return run_ranks(entry_points, "grpo.train", num_ranks, *RUN, f"output_dir={output_dir}", *arguments,
                         writes_report=False, path=(modules,), **options)

    return run


def metrics(run_dir: Path) -> list[dict]:
    """The lines without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items()
             if not name.startswith(("time/", "memory/")) and not name.endswith("_per_s")} for line in lines]


def assert_equal_runs(run: Path, other: Path, *, last: str = LAST) -> None:
    """In all completions, with the log-probs of their tokens; in metrics, which the trainer's log-probs, rewards, gradients and
    evaluations give; in trained weights, optimizer state, and export."""
    assert metrics(run) == metrics(other)
    export = "adapter/adapter_model.safetensors" if (other / "adapter").exists() else "model/model.safetensors"
    for file in ("completions.jsonl", last, export):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file


def assert_killed(ended: Ended, rank: int) -> None:
    assert ended.codes == [-9 if number == rank else 1 for number in range(len(ended.codes))], ended.errors
    assert re.match(rf"error: rank {rank} \(.*, process \d+\) ended without a word: it was killed, or crashed", ended.message)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max(int(path.name[-6:]) for path in (folder / "run/checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def one(launch, tmp_path_factory):
    """The folder of a run of one rank."""
    folder = tmp_path_factory.mktemp("one")
    ended = launch(1, folder)
    assert ended.codes == [0], ended.errors
    assert sum(line["groups/dropped"] for line in metrics(folder / "run") if "groups/dropped" in line) > 0  # some were replaced
    return folder / "run"


def test_a_run_of_four_ranks_has_the_bytes_of_one(launch, one, tmp_path):
    ended = launch(4, tmp_path)
    assert ended.codes == [0] * 4, ended.errors
    assert ended.out[0].count("step 10/10") == 1 and ended.out[1:] == ["", "", ""]
    assert_equal_runs(tmp_path / "run", one)


def test_two_ranks_that_divide_the_model_go_on_after_a_kill_within_a_pass_with_the_bytes_of_one(launch, one, tmp_path):
    ended = launch(2, tmp_path, "distributed.shard=true", before={1: at_call("grpo.update.loss_and_stats", 13, KILL)})
    assert_killed(ended, 1)
    assert 0 < newest(tmp_path) < 10
    ended = launch(2, tmp_path, "distributed.shard=true", "resume=true")
    assert ended.codes == [0, 0], ended.errors
    assert_equal_runs(tmp_path / "run", one)


AFTER_A_STEP = """
import grpo.update as update
make_update = update.make_update
def changed(run):
    norm = make_update(run)
    {change}
    return norm
update.make_update = changed
"""
FAILING = "import spread; spread.judge = lambda completion: 1 / 0"
WAITING = """import time, models.gpt_oss as module
    decode, ranks = module.GptOss.decode, run.ranks
    def wait(*arguments, **keywords):
        while ranks.fault() is None:
            time.sleep(0.01)
        return decode(*arguments, **keywords)
    module.GptOss.decode = wait"""


def test_a_rank_that_fails_while_others_sample_does_not_let_them_wait_to_save_what_all_divide(launch, tmp_path):
    before = {rank: AFTER_A_STEP.format(change=change) for rank, change in ((0, WAITING), (1, FAILING))}
    ended = launch(2, tmp_path, "distributed.shard=true", *BRIEF, "checkpoint.every=5", "distributed.timeout=600", before=before)
    assert ended.codes == [4, 4]
    assert re.match(r"error: rank 1 \(.*\): environment Spread.score raised ZeroDivisionError", ended.message)
    assert newest(tmp_path) == 0


@pytest.mark.slow
def test_the_fast_sum_is_the_ordered_one_up_to_rounding(launch, one, tmp_path):
    ended = launch(2, tmp_path, "distributed.reduction=fast", "steps=1", "eval.at_start=false")
    assert ended.codes == [0, 0], ended.errors
    found, = (line for line in metrics(tmp_path / "run") if line["step"] == 1)
    expected = next(line for line in metrics(one) if line["step"] == 1 and "loss" in line)
    for name in ("grad_norm", "loss", "kl", "entropy", "reward", "update/trained_tokens"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_a_rank_killed_in_the_backward_is_named_and_the_run_resumes_on_another_number(launch, one, tmp_path):
    ended = launch(2, tmp_path, before={1: at_call("grpo.update.token_stats", 13, KILL)})
    assert_killed(ended, 1)
    assert 0 < newest(tmp_path) < 10
    ended = launch(3, tmp_path, "resume=true")
    assert ended.codes == [0] * 3, ended.errors
    assert_equal_runs(tmp_path / "run", one)


@pytest.mark.slow
def test_rank_0_killed_while_it_saves_leaves_the_last_checkpoint(launch, one, tmp_path):
    ended = launch(2, tmp_path, before={0: at_call("grpo.run.checkpoint._write_tensors", 2, KILL)})
    assert ended.codes[0] == -9 and ended.codes[1] == 1
    assert re.match(r"error: (rank 0 .*ended without a word|rank 1 .*: the store at .* is gone)", ended.message)
    ended = launch(1, tmp_path, "resume=true")
    assert ended.codes == [0], ended.errors
    assert_equal_runs(tmp_path / "run", one)


def test_a_rank_that_fails_in_a_reward_ends_all_with_its_code_and_finished_steps_are_saved(launch, tmp_path):
    ended = launch(2, tmp_path, *BRIEF, before={1: at_call("spread.judge", 14, "raise KeyError('no such answer')")})
    assert ended.codes == [4, 4]
    assert re.match(r"error: rank 1 \(.*\): environment Spread.score raised KeyError.*; saved after step \d", ended.message)


def test_a_rank_that_hangs_in_a_reward_is_named_with_the_place(launch, tmp_path):
    ended = launch(2, tmp_path, *BRIEF, before={0: at_call("spread.judge", 1, SHORTEN), 1: at_call("spread.judge", 1, HANG)})
    assert ended.codes == [1, 1]
    assert re.match(r"error: rank 1 \(.*\) did not come to 'the scores' within 1 s \(distributed.timeout\)", ended.message)


def test_a_stop_signal_on_one_rank_stops_all_and_is_resumable(launch, tmp_path):
    ended = launch(2, tmp_path, *BRIEF, before={1: at_call("grpo.update.token_stats", 3, STOP)})
    assert ended.codes == [75, 75]
    assert re.match(r"stopped: .*resume with: torchrun --nproc-per-node 2 -m grpo.train .*resume=true", ended.message)


def test_unequal_settings_and_code_are_listed_before_a_model_is_loaded(launch, tmp_path):
    other_code = "import grpo.distributed.ranks as ranks\nranks.digest_code = lambda: 'older'\n"
    ended = launch(2, tmp_path, own={1: ("optim.lr=0.5", "seed=7")}, before={1: other_code})
    assert ended.codes == [2, 2]
    text = ended.errors[0] + ended.errors[1]
    assert "optim.lr: 0.0003 on rank 0, 0.5 on rank 1" in text and "seed: 0 on rank 0, 7 on rank 1" in text
    assert re.search(r"code: [0-9a-f]{16} on rank 0, older on rank 1", text)
    assert "trains" not in ended.out[0]


def test_a_port_in_use_is_named(launch, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        ended = launch(1, tmp_path, port=port)
    assert ended.codes == [2]
    assert f"MASTER_PORT = {port} on 127.0.0.1: the port cannot be served there" in ended.message


# ---- ranks that share the experts


@pytest.fixture(scope="module")
def one_with_adapter(launch, tmp_path_factory):
    """The folder of a run of one rank that trains an adapter."""
    folder = tmp_path_factory.mktemp("one_with_adapter")
    ended = launch(1, folder, *ADAPTER, before={0: HELD})
    assert ended.codes == [0], ended.errors
    return folder / "run"


def assert_parts(run: Path, one: Path, num_ranks: int, num_sharers: int) -> None:
    """That each rank held its part of the experts' adapters, and of their gradients and state, and all of the others."""
    whole = json.loads((one / "held_0.json").read_text())
    down = 4 * 4 * 96 * 2  # bytes: of fp32, experts, width, rank
    assert whole["model.layers.3.mlp.experts.down_proj_lora_B"] == [down, down, 2 * down]
    for rank in range(num_ranks):
        held = json.loads((run / f"held_{rank}.json").read_text())
        assert held == {name: [size // num_sharers for size in sizes] if ".mlp.experts." in name else sizes
                        for name, sizes in whole.items()}


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks, num_sharers", [(2, 2), (4, 2), (4, 4)])
def test_ranks_that_share_experts_have_the_bytes_of_one(launch, one_with_adapter, tmp_path, num_ranks, num_sharers):
    ended = launch(num_ranks, tmp_path, *ADAPTER, f"distributed.expert_parallel={num_sharers}",
                   before=dict.fromkeys(range(num_ranks), HELD))
    assert ended.codes == [0] * num_ranks, ended.errors
    assert_equal_runs(tmp_path / "run", one_with_adapter)
    assert_parts(tmp_path / "run", one_with_adapter, num_ranks, num_sharers)


def test_a_run_killed_again_and_again_goes_from_one_layout_of_experts_to_the_next(launch, one_with_adapter, tmp_path):
    """Two ranks that share experts, two groups of two, one group of four that ends."""
    saved = [0]
    for num_ranks, num_sharers, killed, call in ((2, 2, 1, 15), (4, 2, 2, 12)):
        ended = launch(num_ranks, tmp_path, *ADAPTER, f"distributed.expert_parallel={num_sharers}", f"resume={saved != [0]}",
                       before={killed: at_call("grpo.update.token_stats", call, KILL)})
        assert_killed(ended, killed)
        saved.append(newest(tmp_path))
    ended = launch(4, tmp_path, *ADAPTER, "distributed.expert_parallel=4", "resume=true", before=dict.fromkeys(range(4), HELD))
    assert ended.codes == [0] * 4, ended.errors
    assert saved == sorted(set(saved)) and saved[-1] < 10  # each has finished steps
    assert_equal_runs(tmp_path / "run", one_with_adapter)
    assert_parts(tmp_path / "run", one_with_adapter, 4, 4)


def test_ranks_that_share_experts_save_the_finished_steps_where_nothing_is_left_to_learn(launch, tmp_path):
    equal = "import spread\nspread.judge = lambda completion: 0.5"
    ended = launch(2, tmp_path, *SHARED, *BRIEF, "rollout.max_dead_steps=1", "rollout.refill_rounds=0", "checkpoint.every=0",
                   before={0: equal, 1: equal})
    assert ended.codes == [7, 7], ended.errors
    assert re.search(r"nothing was learnt in the last 1 steps.*; saved after step 1$", ended.message)
    assert newest(tmp_path) == 1


def test_a_rank_that_hangs_in_a_pass_of_those_that_share_experts_is_named(launch, tmp_path):
    place = "models.gpt_oss.GptOss.decode"
    ended = launch(2, tmp_path, *SHARED, *BRIEF, before={0: at_call(place, 5, SHORTEN), 1: at_call(place, 5, HANG)})
    assert ended.codes == [1, 1]
    assert re.match(r"error: rank 1 \(.*\) did not come to .the experts' rows. within 1 s \(distributed.timeout\)", ended.message)


@pytest.mark.slow
def test_a_signal_in_a_rollout_stops_sharing_ranks_at_one_place_and_one_rank_resumes(launch, one_with_adapter, tmp_path):
    ended = launch(2, tmp_path, *SHARED, before={1: at_call("models.gpt_oss.GptOss.decode", 60, STOP)})
    assert ended.codes == [75, 75], ended.errors
    ended = launch(1, tmp_path, *ADAPTER, "resume=true")
    assert ended.codes == [0], ended.errors
    assert_equal_runs(tmp_path / "run", one_with_adapter)


def from_adapter(folder: Path) -> tuple[str, ...]:
    """Settings of a run that starts from an adapter, keeps a copy of it as reference, and its state in 8 bits."""
    model = load_model(FIXTURES / "tiny_mxfp4", device="cpu", dtype=torch.float32)
    attach_lora(model, LoraConfig(8, 16.0, ["q_proj", "experts"], True, False), seed=5)
    fill_trainable(model)
    save_adapter(model, folder / "adapter")
    lora = f"{{rank: 8, alpha: 16.0, targets: [q_proj, experts], train_sinks: true, adapter: '{folder / 'adapter'}'}}"
    return *ADAPTER, f"model.lora={lora}", "optim.moments=int8", "checkpoint.every=1", "eval.every=0", "eval.at_start=false"


def test_ranks_that_share_experts_take_their_parts_of_a_checkpoint_with_a_reference_and_a_state_in_8_bits(launch, tmp_path):
    settings, run = (*from_adapter(tmp_path), "steps=4", "kl.refresh_every=2", "checkpoint.keep=9"), tmp_path / "more/run"
    ended = launch(1, tmp_path / "one", *settings)
    assert ended.codes == [0], ended.errors
    shutil.copytree(tmp_path / "one/run", run)
    for step in (2, 3, 4):
        shutil.rmtree(run / f"checkpoints/step_{step:06d}")
    shutil.rmtree(run / "adapter")
    ended = launch(2, tmp_path / "more", *settings, "distributed.expert_parallel=2", "resume=true")
    assert ended.codes == [0, 0], ended.errors
    for step in (2, 3, 4):  # with the first reference, and with the second
        assert_equal_runs(run, tmp_path / "one/run", last=f"checkpoints/step_{step:06d}/tensors.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["kl.refresh_every=2", "kl.reference=base", "kl.reference=start"])
def test_ranks_that_share_experts_start_from_an_adapter_and_one_rank_goes_on(launch, tmp_path, reference):
    settings = (*from_adapter(tmp_path), "steps=6", reference)
    ended = launch(1, tmp_path / "one", *settings)
    assert ended.codes == [0], ended.errors
    ended = launch(2, tmp_path / "more", *settings, "distributed.expert_parallel=2",
                   before={1: at_call("grpo.update.token_stats", 15, KILL)})
    assert_killed(ended, 1)
    assert 0 < newest(tmp_path / "more") < 6
    ended = launch(1, tmp_path / "more", *settings, "resume=true")
    assert ended.codes == [0], ended.errors
    assert_equal_runs(tmp_path / "more/run", tmp_path / "one/run", last="checkpoints/step_000006/tensors.safetensors")


@pytest.mark.parametrize("num_ranks, changes, message", [
    (3, {}, "expert_parallel = 2: the number of processes must be a multiple of it, and is 3"),
    (2, {"train": Train.full}, "only the frozen experts of a checkpoint can be shared"),
    (2, {"path": None}, "only the frozen experts of a checkpoint can be shared"),
    (2, {"warmup": {}}, "a warm-up is the work of ranks that have all experts; set warmup=null")])
def test_settings_with_which_experts_cannot_be_shared_are_refused(num_ranks, changes, message):
    model = SimpleNamespace(**{"train": Train.lora, "path": "folder"} | changes)
    config = SimpleNamespace(distributed=SimpleNamespace(expert_parallel=2), device=Device.cpu, model=model,
                             warmup=changes.get("warmup"))
    with pytest.raises(ConfigError, match=message):
        check_sharing(config, num_ranks)
