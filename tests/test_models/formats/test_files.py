"""Checkpoint folders: indices, shards and hub ids that are read or refused, and folders that are written whole or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import BF16, MXFP4, load

import models.formats.files as tensor_files
from models.formats.files import CheckpointError, checkpoint_folder
from models.formats.hugging_face import save_model


def test_the_file_list_comes_from_the_index_not_from_the_names(damaged):
    index_path = damaged / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] = {name: f"part-{file[6:11]}.bin.safetensors" for name, file in index["weight_map"].items()}
    index_path.write_text(json.dumps(index))
    for path in damaged.glob("model-0*.safetensors"):
        path.rename(damaged / f"part-{path.name[6:11]}.bin.safetensors")
    save_file({"model.norm.weight": torch.zeros(1)}, damaged / "model-00009-of-00009.safetensors")  # of something else
    ours, theirs = load(damaged).state_dict(), load(MXFP4).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_truncated_file_is_named(damaged):
    path = damaged / "model-00001-of-00002.safetensors"
    for size in (path.stat().st_size - 1, 100, 3, 0):
        with open(path, "rb+") as file:
            file.truncate(size)
        with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors: .*truncated or damaged"):
            load(damaged)


def test_a_missing_shard_is_named(damaged):
    (damaged / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json: lists files that are not there: \['model-00001-of-00002"):
        load(damaged)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 200_000, '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_malformed_index_is_named(damaged, content):
    (damaged / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        load(damaged)


@pytest.mark.parametrize("name", ["../tiny_bf16/model.safetensors", "{folder}/model-00000-of-00002.safetensors", "a/../../b"])
def test_an_index_that_leads_out_of_its_folder_is_refused(damaged, name):
    path = damaged / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name.format(folder=damaged)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: names files outside its folder"):
        load(damaged)


def test_an_index_of_another_version_is_refused(damaged):
    path = damaged / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00000-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="listed but absent: model.norm.weight in model-00000"):
        load(damaged)


def test_a_folder_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="config.json: not found"):
        load(tmp_path)
    shutil.copyfile(BF16 / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="neither model.safetensors.index.json nor model.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "a/b/c", "nowhere", "x/"])
def test_a_source_that_is_neither_folder_nor_hub_id_is_refused(source):
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint_folder(source)


def test_a_hub_id_is_downloaded_without_the_other_layouts(monkeypatch, tmp_path):
    calls = {}

    def snapshot_download(repo, *, allow_patterns, ignore_patterns):
        calls.update(repo=repo, allow=allow_patterns, ignore=ignore_patterns)
        return str(BF16)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert load("openai/gpt-oss-20b").config.vocab_size == 512
    assert calls["repo"] == "openai/gpt-oss-20b" and calls["ignore"] == ["original/*", "metal/*"]
    assert "*.safetensors" in calls["allow"] and "*.json" in calls["allow"]


def test_an_unreachable_hub_is_a_clear_error(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(repo, **_):
        raise LocalEntryNotFoundError("no network\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"nobody/nothing: no folder .* \(no network\); check the spelling"):
        checkpoint_folder("nobody/nothing")


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and holds notes.txt"):
        save_model(load(BF16), tmp_path / "out", merge_lora=False)
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", no_space)
    with pytest.raises(CheckpointError, match=r"out: could not be written .*No space left.* bytes are free"):
        save_model(load(BF16), tmp_path / "out", merge_lora=False)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(CheckpointError, match="1,000 are free"):
        save_model(load(BF16), tmp_path / "out", merge_lora=False)
    assert list(tmp_path.iterdir()) == []


def test_exported_files_are_readable_as_their_folder_is(tmp_path):
    save_model(load(BF16), tmp_path / "out", merge_lora=False)
    folder_mode = (tmp_path / "out").stat().st_mode & 0o666
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o777 == folder_mode
