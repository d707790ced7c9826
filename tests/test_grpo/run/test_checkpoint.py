"""Saving, resuming and pruning checkpoints, with damage done on purpose."""
from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from child_process import fork_python

from grpo.run.checkpoint import (
    CheckpointFallbackWarning,
    LoadError,
    SaveError,
    clean_stale,
    load_run,
    save_run,
)
from grpo.run.lock import lock_run


def contents(step):
    generator = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(6, 5, generator=generator), "view": torch.arange(12.0).view(3, 4).t(),
            "packed": torch.randint(0, 255, (7,), dtype=torch.uint8, generator=generator),
            "half": torch.randn(3, generator=generator).bfloat16(), "num_updates": torch.tensor(step)}


def save(run_dir, step, keep=3):
    return save_run(run_dir, step=step, tensors=contents(step), state={"best": 0.1 + step, "ids": [step]}, keep=keep)


def saved_names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def assert_is_step(loaded, step):
    assert loaded.step == step and loaded.state == {"best": 0.1 + step, "ids": [step]}
    expected = contents(step)
    assert set(loaded.tensors) == set(expected)
    for name, tensor in expected.items():
        assert loaded.tensors[name].dtype == tensor.dtype and torch.equal(loaded.tensors[name], tensor), name


def test_a_run_without_checkpoints_loads_nothing(tmp_path):
    assert load_run(tmp_path / "none") is None


def test_what_was_saved_comes_back_exactly_and_the_newest_wins(tmp_path):
    folder = save(tmp_path, 3)
    save(tmp_path, 12)
    assert folder == tmp_path / "checkpoints" / "step_000003"
    assert_is_step(load_run(tmp_path), 12)


def test_tensors_of_any_shape_and_dtype_are_a_file_of_the_library_at_aligned_places(tmp_path):
    tensors = {"bytes": torch.arange(5, dtype=torch.uint8), "bf16": torch.randn(3, 4).bfloat16().T, "fp32": torch.randn(2, 1),
               "scalar": torch.tensor(7), "none": torch.empty(0, 3), "half": torch.randn(3).half(), "flag": torch.tensor([True])}
    folder = save_run(tmp_path, step=1, tensors=tensors, state={}, keep=2)
    content = (folder / "tensors.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = safetensors.torch.load(content)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert (start + json.loads(content[8:start])[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_a_checkpoint_can_be_asked_for_by_its_step(tmp_path):
    assert load_run(tmp_path, step=3) is None
    for step in (3, 12, 20):
        save(tmp_path, step)
    assert_is_step(load_run(tmp_path, step=12), 12)
    with pytest.raises(LoadError, match=r"step = 4: no such checkpoint .* there are \[3, 12, 20\]"):
        load_run(tmp_path, step=4)
    flip_a_bit(tmp_path / "checkpoints" / "step_000012")
    with pytest.raises(LoadError, match="step_000012 is damaged"):
        load_run(tmp_path, step=12)


def test_the_manifest_holds_the_sha256_of_each_file(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"tensors.safetensors", "state.json"}
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_equal_contents_give_equal_files(tmp_path):
    first, second = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    for name in ("tensors.safetensors", "state.json", "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert saved_names(tmp_path) == ["step_000015", "step_000020"]


def flip_a_bit(folder):
    data = bytearray((folder / "tensors.safetensors").read_bytes())
    data[-3] ^= 4
    (folder / "tensors.safetensors").write_bytes(data)


def truncate(folder):
    os.truncate(folder / "tensors.safetensors", 40)


@pytest.mark.parametrize("damage, named", [
    (flip_a_bit, "tensors.safetensors does not match the SHA-256"),
    (truncate, "tensors.safetensors has 40 bytes"),
    (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is not readable"),
    (lambda folder: (folder / "manifest.json").write_text('{"format_version": 9}'), "format_version 9"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], "manifest.json is missing"),
])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path, damage, named):
    save(tmp_path, 10)
    damage(save(tmp_path, 20))
    with pytest.warns(CheckpointFallbackWarning, match=f"resuming from step_000010.*step_000020 is damaged .*{named}"):
        loaded = load_run(tmp_path)
    assert_is_step(loaded, 10)
    # the run goes on and reaches the damaged step again
    save(tmp_path, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_is_step(load_run(tmp_path), 20)


def test_damaged_newer_checkpoints_never_push_out_the_good_ones(tmp_path):
    save(tmp_path, 10)
    for step in (20, 30, 40):
        flip_a_bit(save(tmp_path, step, keep=9))
    save(tmp_path, 11, keep=2)
    assert saved_names(tmp_path) == ["step_000010", "step_000011", "step_000020", "step_000030", "step_000040"]
    with pytest.warns(CheckpointFallbackWarning):
        assert_is_step(load_run(tmp_path), 11)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(tmp_path):
    for step in (10, 20):
        flip_a_bit(save(tmp_path, step))
    with pytest.raises(LoadError, match="step_000020 is damaged.*step_000010 is damaged"):
        load_run(tmp_path)


def test_leftovers_of_a_killed_process_are_ignored_then_cleaned(tmp_path):
    save(tmp_path, 10)
    root = tmp_path / "checkpoints"
    (root / ".step_000020.tmp").mkdir()
    (root / ".step_000020.tmp" / "state.json").write_text("{")
    (root / ".step_000005.gone").mkdir()
    (root / "notes.txt").write_text("mine")
    assert_is_step(load_run(tmp_path), 10)
    with lock_run(tmp_path):
        pass
    assert saved_names(tmp_path) == ["notes.txt", "step_000010"]


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path):
    save(tmp_path, 10)
    root = tmp_path / "checkpoints"
    (root / "step_000010").rename(root / ".step_000010.old")
    clean_stale(tmp_path)
    assert_is_step(load_run(tmp_path), 10)


def test_leftovers_of_an_older_version_are_restored_or_cleaned(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    root = tmp_path / "checkpoints"
    (root / "step_000030").rename(root / "step_000030.old-71")  # killed between the two renames of an exchange
    (root / "step_000030.tmp-71").mkdir()
    (root / "step_000030.tmp-71" / "state.json").write_text("{")
    for name in ("step_000005.gone-7", "step_000020.old-7", "step_000020.old-8"):
        (root / name).mkdir()
    (root / "step_000040.tmp-mine").mkdir()
    assert_is_step(load_run(tmp_path), 20)
    with lock_run(tmp_path):
        assert_is_step(load_run(tmp_path), 30)
    assert saved_names(tmp_path) == ["step_000010", "step_000020", "step_000030", "step_000040.tmp-mine"]


def out_of_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("owner, function", [
    (Path, "open"), (os, "fsync"), (os, "replace"),
    (Path, "write_text"), (Path, "mkdir"),
])
def test_a_full_disk_at_any_moment_of_a_save_leaves_the_old_checkpoints(tmp_path, monkeypatch, owner, function):
    save(tmp_path, 10)
    save(tmp_path, 20)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for step in (30, 20):  # a new one, and the replacement of one that is there
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, out_of_space)
            with pytest.raises(SaveError, match=rf"step_0000{step}: .*No space left on device.*bytes free in "):
                save(tmp_path, step, keep=2)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert_is_step(load_run(tmp_path), 20)
    assert_is_step((save(tmp_path, 30), load_run(tmp_path))[1], 30)


def test_a_failed_replacement_puts_the_old_checkpoint_back(tmp_path, monkeypatch):
    save(tmp_path, 10)
    save(tmp_path, 20)
    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda old, new: out_of_space() if ".tmp" in str(old) else replace(old, new))
        with pytest.raises(SaveError, match="step_000020"):
            save_run(tmp_path, step=20, tensors={}, state={"other": 1}, keep=2)
    assert saved_names(tmp_path) == ["step_000010", "step_000020"]
    assert_is_step(load_run(tmp_path), 20)


def test_a_disk_that_is_really_full_leaves_the_old_checkpoints(entry_points, tmp_path, tmp_path_factory):
    code = """
import sys, torch
from pathlib import Path
from grpo.run.checkpoint import SaveError, load_run, save_run
run = Path(sys.argv[1]) / "run"
save_run(run, step=1, tensors={"w": torch.ones(20_000)}, state={}, keep=2)
try:
    save_run(run, step=2, tensors={"w": torch.ones(400_000)}, state={}, keep=2)
except SaveError as error:
    print(error)
loaded = load_run(run)
print(loaded.step, loaded.tensors["w"].sum().item(), sorted(p.name for p in (run / "checkpoints").iterdir()))
"""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mount.returncode != 0:
        pytest.skip(f"mounting a small tmpfs is not allowed here: {mount.stderr.decode().strip()}")
    try:
        done = fork_python(entry_points, tmp_path_factory.mktemp("code"), code, tmp_path).wait()
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    lines = done.out.splitlines()
    assert len(lines) == 2, done
    assert "cannot save" in lines[0] and "No space left on device" in lines[0] and "bytes free" in lines[0]
    assert lines[1] == "1 20000.0 ['step_000001']"


def test_a_process_killed_before_any_disk_operation_of_a_save_leaves_whole_checkpoints(entry_points, tmp_path):
    """A child for each operation kills itself just before it; step 20 is new, then saved again, differently."""
    code = """
import os, shutil, signal, sys, warnings, torch
from pathlib import Path
import grpo.run.checkpoint as c, grpo.run.lock
warnings.simplefilter("error")  # no checkpoint may need a fallback
template, run = Path(sys.argv[1]) / "template", Path(sys.argv[1]) / "run"

def save(run, step, value):
    c.save_run(run, step=step, tensors={"w": torch.full((50,), value)}, state={"value": value}, keep=2)

def arm(owner, name):
    original = getattr(owner, name)
    def armed(*arguments, **keywords):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)
    setattr(owner, name, armed)

for step in (5, 10):
    save(template, step, 1.0 * step)
for previous in (10.0, 20.0):
    if previous == 20.0:
        save(template, 20, 20.0)
    outcomes = []
    for operation in range(1, 60):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)
        child = os.fork()
        if child == 0:
            countdown = operation
            for owner, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "write_text"),
                                (Path, "mkdir"), (c.safetensors.torch, "save_file")):
                arm(owner, name)
            save(run, 20, 21.0)
            os._exit(0)
        was_killed = os.waitpid(child, 0)[1] == signal.SIGKILL
        with grpo.run.lock.lock_run(run):
            pass
        loaded = c.load_run(run)
        value = loaded.state["value"]
        assert torch.equal(loaded.tensors["w"], torch.full((50,), value)), operation
        assert not list(run.glob("checkpoints/*.*")), operation
        outcomes.append(value)
        if not was_killed:
            break
    assert not was_killed and outcomes == sorted(outcomes) and set(outcomes) == {previous, 21.0}, outcomes
    print(len(outcomes))
"""
    done = fork_python(entry_points, tmp_path, code, tmp_path).wait()
    counts = [int(line) for line in done.out.split()]
    assert len(counts) == 2 and min(counts) > 10, done


def test_a_process_killed_at_any_time_leaves_whole_checkpoints(entry_points, tmp_path, tmp_path_factory):
    code = """
import sys, torch
from grpo.run.checkpoint import load_run, save_run
from grpo.run.lock import lock_run
lock = lock_run(sys.argv[1])
lock.__enter__()
loaded = load_run(sys.argv[1])
step = 0 if loaded is None else loaded.step
print("ready", flush=True)
while True:
    step += 1
    save_run(sys.argv[1], step=step, tensors={"w": torch.full((200_000,), float(step))}, state={"step": step}, keep=2)
"""
    last_step = 0
    for seconds in (0.07, 0.13):
        process = fork_python(entry_points, tmp_path_factory.mktemp("code"), code, tmp_path)
        while process.output_text() != "ready\n":
            assert not process.error_text()
            time.sleep(0.01)
        while not list(tmp_path.glob("checkpoints/step_??????")):
            time.sleep(0.01)
        time.sleep(seconds)
        process.send(signal.SIGKILL)
        process.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_run(tmp_path)
        assert loaded.step > 0 and loaded.step >= last_step and loaded.state["step"] == loaded.step
        assert torch.equal(loaded.tensors["w"], torch.full((200_000,), float(loaded.step)))
        last_step = loaded.step


def test_links_and_stray_files_among_the_checkpoints_hinder_nothing_and_are_never_followed(tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save(run_dir, 10)
    elsewhere.mkdir()
    root = run_dir / "checkpoints"
    (root / "step_000010").rename(elsewhere / "ten")
    (root / "step_000010").symlink_to(elsewhere / "ten")
    (root / ".step_000020.tmp").write_text("a file")
    (root / ".step_000008.gone").symlink_to(elsewhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lock_run(run_dir):
            pass
        assert saved_names(run_dir) == ["step_000010"]
        assert_is_step(load_run(run_dir), 10)
        (root / ".step_000010.tmp").write_text("a file")
        save(run_dir, 10)  # in the place of the link
        save(run_dir, 11, keep=2)
        (root / "step_000010").rename(elsewhere / "other ten")
        (root / "step_000010").symlink_to(elsewhere / "other ten")
        save(run_dir, 12, keep=2)  # prunes a link
    assert saved_names(run_dir) == ["step_000011", "step_000012"]
    assert sorted(path.name for path in elsewhere.iterdir()) == ["other ten", "ten"]
    assert (elsewhere / "ten/state.json").is_file() and (elsewhere / "other ten/state.json").is_file()


def test_a_folder_of_checkpoints_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    for step in (1, 2, 3):
        save(tmp_path / "run", step, keep=2)
    with lock_run(tmp_path / "run"):
        pass
    assert_is_step(load_run(tmp_path / "run"), 3)
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["step_000002", "step_000003"]


def test_a_leftover_that_cannot_be_deleted_is_a_warning_that_names_it(tmp_path, monkeypatch):
    save(tmp_path, 10)
    (tmp_path / "checkpoints/.step_000020.tmp").mkdir()
    monkeypatch.setattr(shutil, "rmtree", out_of_space)
    with pytest.warns(UserWarning, match=r"cannot delete .*\.step_000020\.tmp"):
        with lock_run(tmp_path):
            pass


def test_a_renamed_checkpoint_is_passed_over_and_named(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 11).rename(tmp_path / "checkpoints/step_000030")
    with pytest.warns(CheckpointFallbackWarning, match="step_000030 is damaged .it was saved as step_000011"):
        assert_is_step(load_run(tmp_path), 10)
