"""`modules`: a folder from which the ranks import the environment `spread.Spread`."""

import pytest
from started_ranks import SPREAD


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "spread.py").write_text(SPREAD)
    return folder
