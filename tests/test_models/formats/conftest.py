"""`damaged`: a copy of the sharded checkpoint to break."""

import shutil

import pytest
from tiny_models import MXFP4


@pytest.fixture
def damaged(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(MXFP4, folder)
    (folder / "golden.safetensors").unlink()
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder
