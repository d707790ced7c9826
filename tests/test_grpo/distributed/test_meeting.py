"""Which rank speaks, which processes it can look up, and what it compares with the others."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from grpo.config import ConfigError
from grpo.distributed.place import RankPlace
from grpo.distributed.ranks import RankFault, Ranks
from grpo.run.identity import digest_code
from grpo.run.start import check_equal_files


def members(store, num_ranks=4, num_local=2, *, is_torchrun=True) -> list[Ranks]:
    return [Ranks(RankPlace(rank, num_ranks, rank % num_local, num_local, "localhost", 1, is_torchrun), store)
            for rank in range(num_ranks)]


def test_where_rank_0_is_lost_the_first_that_asks_speaks_alone():
    ranks = members(dist.HashStore())
    ranks[3].report("rank 0 hangs", reason="failed", code=1, rank=0, is_lost=True)
    assert [ranks[number].speaks() for number in (0, 2, 3, 2)] == [False, True, False, True]  # rank 1 may be lost too


def test_where_rank_0_only_failed_it_speaks_for_all():
    ranks = members(dist.HashStore())
    ranks[0].report("a full disk", reason="disk", code=1)
    assert [member.speaks() for member in ranks] == [True, False, False, False]


class GoneStore:
    """Of a node that has lost its power."""

    def check(self, keys):
        raise RuntimeError("Connection reset by peer")

    def set(self, key, value):
        raise RuntimeError("Connection reset by peer")

    def compare_set(self, key, expected, desired):
        raise RuntimeError("Connection reset by peer")


def test_where_the_store_is_gone_with_a_node_the_others_have_a_rank_that_speaks():
    ranks = members(GoneStore())
    with pytest.raises(RankFault, match="the store at localhost:1, by which the ranks meet, is gone"):
        ranks[2].fault()
    assert [member.speaks() for member in ranks] == [False, True, True, False]


@pytest.mark.parametrize("rank, is_torchrun, limit", [
    (0, True, "0 s after the stop signal"), (0, False, "0 s after the stop signal"), (1, True, "0 s after the stop signal"),
    (1, False, "0.05 s")])  # the others of srun's ranks leave rank 0 the time to save
def test_how_long_a_rank_waits_after_a_stop_signal(monkeypatch, rank, is_torchrun, limit):
    monkeypatch.setattr("grpo.distributed.ranks.GRACE_SECONDS", 0.0)
    monkeypatch.setattr("grpo.distributed.ranks.LOOK_SECONDS", 0.0)
    member = members(dist.HashStore(), 2, is_torchrun=is_torchrun)[rank]
    member.timeout = 0.05
    member.watch(lambda: True)
    with pytest.raises(RankFault, match=f"rank {1 - rank} did not come to 'the scores' within {limit}:"):
        member.exchange("the scores")


def test_ranks_save_together_or_not_at_all():
    ranks = members(dist.HashStore())
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda member: member.all_save(True), ranks)) == [True] * 4
    ranks = members(dist.HashStore())
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda member: member.all_save(member.rank != 2), ranks)) == [False] * 4
    assert not members(GoneStore())[1].all_save(True)


def test_processes_are_looked_up_only_where_their_numbers_mean_the_same():
    ranks = members(dist.HashStore())[0]
    never = 2**22 + 1  # above the highest number of a process
    ranks._peers = [{"host": "localhost", "processes": space, "pid": never} for space in ("a", "a", "b", "b")]
    assert [ranks._is_dead(rank) for rank in range(4)] == [False, True, False, False]


@pytest.mark.parametrize("is_installed", [False, True])
def test_the_digest_of_the_code_has_no_file_of_other_packages(tmp_path, is_installed):
    grpo = tmp_path / "grpo"
    own = grpo if is_installed else tmp_path
    for folder in (grpo, own / "kernels", own / "models", tmp_path / "kernels", tmp_path / "other"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.py").write_text("1")

    def changes(folder):
        before = digest_code(tmp_path)
        (folder / "a.py").write_text("2")
        return digest_code(tmp_path) != before

    assert not changes(tmp_path / "other")
    assert changes(grpo) and changes(own / "models")
    assert changes(tmp_path / "kernels") != is_installed  # Hugging Face has a package of this name


def test_ranks_whose_files_differ_are_told_which():
    own = {"settings": {"seed": 0}, "base model": {"config.json": "1", "model.safetensors": "2"}, "data": {"rows": "3"}}
    equal = SimpleNamespace(exchange=lambda what, value: [value, value])
    check_equal_files(equal, own)
    other = {"base model": {"config.json": "1", "model.safetensors": "9", "more.safetensors": "4"}, "data": {"rows": "3"}}
    with pytest.raises(ConfigError) as caught:
        check_equal_files(SimpleNamespace(exchange=lambda what, value: [value, other]), own)
    differing = "base model: model.safetensors of rank 1 is not that of rank 0\n  base model: more.safetensors of rank 1 is not"
    assert differing in str(caught.value)
    assert "seed" not in str(caught.value) and "rows" not in str(caught.value)
