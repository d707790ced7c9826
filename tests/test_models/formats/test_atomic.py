"""Files and folders that are whole or not there; grpo's checkpoints test the same with kills and full disks."""

import os

import pytest

from models.formats.atomic import new_file, new_folder, recover, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_fails_half_way_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    write_text(tmp_path / "a.txt", "old \ud83d")
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old \\ud83d"


def test_a_folder_takes_the_place_of_one_with_other_files(tmp_path):
    for name in ("first", "second"):
        with new_folder(tmp_path / "out") as folder:
            (folder / name).write_text(name)
            assert names(tmp_path) == [".out.tmp"] + ["out"] * (name == "second")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["second"]


def test_every_file_of_a_folder_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "replace", lambda old, new: (synced.append("renamed"), replace(old, new)))
    with new_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner/weights").write_text("w")
    partial = tmp_path / ".out.tmp"
    assert sorted(synced[:-2]) == [str(partial), str(partial / "inner"), str(partial / "inner/weights")]
    assert synced[-2:] == ["renamed", str(tmp_path)]


@pytest.mark.parametrize("left, expected", [
    ((".out.tmp",), []), ((".out.old",), ["out"]), ((".out.tmp", ".out.old", "out"), ["out"]), ((".out.gone",), []),
    (("out", "out.tmp", ".other.tmp"), [".other.tmp", "out", "out.tmp"])])
def test_what_a_killed_process_left_is_undone(tmp_path, left, expected):
    for name in left:
        (tmp_path / name).mkdir()
    recover(tmp_path / "out")
    assert names(tmp_path) == expected
