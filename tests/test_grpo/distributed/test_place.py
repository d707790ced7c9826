"""Which rank a process is, from the variables of torchrun and srun."""

import pytest

from grpo.config import ConfigError
from grpo.distributed.place import find_place, first_host
from grpo.run.finish import launcher

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu7",
            "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "1234567"}


def test_a_process_started_alone_has_no_place():
    assert find_place({}) is None
    # the batch script itself, and an interactive shell of one task
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) is None
    assert find_place({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_torchruns_variables_are_read():
    place = find_place(TORCHRUN)
    assert (place.rank, place.num_ranks, place.local_rank, place.num_local) == (5, 8, 1, 4)
    assert (place.address, place.port) == ("gpu7", 29500)


def test_without_torchrun_those_of_srun_count_and_the_port_follows_from_the_job():
    place = find_place(SRUN)
    assert (place.rank, place.num_ranks, place.local_rank, place.num_local) == (3, 4, 1, 2)
    assert (place.address, place.port) == ("gpu03", 20000 + 4567)
    assert find_place({**SRUN, "MASTER_ADDR": "a", "MASTER_PORT": "1"}).port == 1
    assert find_place({**SRUN, **TORCHRUN}).rank == 5


@pytest.mark.parametrize("nodes, first", [("gpu[03-05,09],login1", "gpu03"), ("gpu7,gpu9", "gpu7"), ("n-1-[2,4]", "n-1-2")])
def test_the_first_of_slurms_nodes(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("variables, text", [
    ({"RANK": "0", "WORLD_SIZE": "2"}, "not MASTER_ADDR, MASTER_PORT"),
    ({**TORCHRUN, "RANK": "8"}, "RANK = 8: must lie in 0..7"),
    ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
])
def test_variables_that_contradict_each_other_are_named(variables, text):
    with pytest.raises(ConfigError, match=text):
        find_place(variables)


def test_the_command_that_resumes_starts_python_in_the_same_way():
    assert launcher({}) == "python"
    assert launcher({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}) == "torchrun --nproc-per-node 8"
    assert launcher(SRUN) == "srun python"
